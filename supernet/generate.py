"""Beam search: the most probable translations of a batch of sources, decoded one token at a time with a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.supernet.cache import KeyValueCache
from moesaic.supernet.model import Transformer


@dataclass
class _Search:
    """What the search knows of one source: at most ``limit`` tokens translate it, the ``best`` of ``finished``
    hypotheses has ``score``."""

    limit: int
    best: list[int] = field(default_factory=list)
    score: float = -math.inf
    finished: int = 0

    def finish(self, tokens: list[int], score: float) -> None:
        self.finished += 1
        if score > self.score:
            self.best, self.score = tokens, score

    def done(self, leader: float, length: int, beam: int, length_penalty: float) -> bool:
        """Whether ``beam`` hypotheses finished, or none that runs on, the best of which has log p ``leader`` after
        ``length`` tokens, can still beat the best: its log p only falls, so its score is at most that at one end of the
        lengths which it may reach."""
        reach = max(leader / total**length_penalty for total in (length + 1, self.limit + 1))
        return self.finished >= beam or self.score >= reach


@torch.inference_mode()
def beam_search(
    model: Transformer,
    source: Tensor,
    source_mask: Tensor | None = None,
    *,
    start: int,
    end: int,
    beam: int = 4,
    length_penalty: float = 0.6,
    min_length: int = 0,
    max_length: int | None = None,
    forbidden: Sequence[int] = (),
    architecture: Architecture | None = None,
) -> list[list[int]]:
    """The best translation found of each of the M sources [M, P]: its token ids, without ``start`` and ``end``.

    The score of a hypothesis is log p / length ** ``length_penalty``, and the length counts ``end``; the search of a
    source ends when ``beam`` hypotheses have finished: both as in fairseq (arXiv 1904.01038). It ends before that where
    no running hypothesis can become the best, which changes no result. A source that is done leaves the batch.

    Parameters
    ----------
    source_mask : [M, P], False at padding.
    start, end : the ids before the first and after the last token of a translation; they may be the same.
    beam : hypotheses that are extended at a time; 1 is greedy.
    min_length : tokens of a translation at least.
    max_length : tokens of a translation at most; None: 1.2 * those of its source + 10. Learned positions may allow
        fewer.
    forbidden : ids that no translation has, as those of padding; ``start`` is one, unless it is ``end``.
    architecture : the slice that translates; None: the whole model.

    Raises
    ------
    MoesaicError : the model has no encoder; a setting is out of range.
    """
    architecture = model.architecture if architecture is None else architecture
    _check(architecture, end, beam, min_length, max_length, forbidden)
    searches = [_Search(limit) for limit in _limits(source, source_mask, max_length, architecture)]
    running, device = list(searches), source.device
    barred = torch.tensor(sorted({start, *forbidden} - {end}), dtype=torch.long, device=device)
    rows, capacity = len(source) * beam, 1 + max((search.limit for search in searches), default=0)
    cache = KeyValueCache(architecture, rows, capacity, model.device, _product_type(model))
    tokens = torch.full((rows, 1), start, device=device)  # of every hypothesis, those of a source together
    totals = torch.full((len(source), beam), -math.inf, device=device)  # log p of each
    totals[:, 0] = 0  # all begin alike: only one is extended
    for length in count(1):
        if not running:
            break
        bars = barred if length > min_length else torch.cat((barred, barred.new_tensor([end])))
        # Nothing as large as the logits outlives the step.
        best, parents, words = _extended(
            model.run(tokens[:, -1:], architecture, cache, source=source, source_mask=source_mask).logits[:, -1],
            totals,
            bars,
            end,
            [search.limit < length for search in running],
        )
        parents = parents + beam * torch.arange(len(running), device=device)[:, None]
        ends = words == end
        for index, rank in (ends[:, :beam] & best[:, :beam].isfinite()).nonzero().tolist():
            score = float(best[index, rank]) / length**length_penalty
            running[index].finish(tokens[parents[index, rank], 1:].tolist(), score)
        on = ends.int().argsort(dim=1, stable=True)[:, :beam]
        totals = best.gather(1, on)
        left = [
            index
            for index, leader in enumerate(totals[:, 0].tolist())
            if not running[index].done(leader, length, beam, length_penalty)
        ]
        sequences = torch.tensor(left, dtype=torch.long, device=device)
        rows = parents.gather(1, on)[sequences].flatten()
        cache.keep(rows, None if len(left) == len(running) else sequences)
        tokens = torch.cat((tokens[rows], words.gather(1, on)[sequences].view(-1, 1)), dim=1)
        totals, running = totals[sequences], [running[index] for index in left]
    return [search.best for search in searches]


def _product_type(model: Transformer) -> torch.dtype:
    """That of keys and values."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(model.parameters()).dtype


def _extended(
    logits: Tensor, totals: Tensor, barred: Tensor, end: int, full: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The best extensions of the hypotheses of m sources with log p ``totals`` [m, n], twice as many as they are, since
    at most one of each is its end: their log p, their hypothesis of n, and their last token, [m, 2 n] each. ``logits``
    are [m * n, V]."""
    log_p = logits.float().log_softmax(-1).index_fill(1, barred, -math.inf).view(*totals.shape, -1)
    _end_only(log_p, end, full)
    best, places = (totals[:, :, None] + log_p).flatten(1).topk(2 * totals.shape[1])
    return best, places // log_p.shape[-1], places % log_p.shape[-1]


def _end_only(log_p: Tensor, end: int, full: list[bool]) -> None:
    """Leave of ``log_p`` [m, n, V] nothing but that of ``end`` in the sources that are ``full``."""
    rows = torch.tensor(full, device=log_p.device)
    ends = log_p[rows, :, end]
    log_p[rows] = -math.inf
    log_p[rows, :, end] = ends


def _limits(source: Tensor, mask: Tensor | None, max_length: int | None, architecture: Architecture) -> list[int]:
    """Tokens that may translate each source."""
    lengths = [source.shape[1]] * len(source) if mask is None else mask.sum(1).tolist()
    limits = [int(1.2 * length + 10) if max_length is None else max_length for length in lengths]
    positions = architecture.backbone.max_positions  # the first is that of ``start``
    return limits if positions is None else [min(limit, positions - 1) for limit in limits]


def _check(
    architecture: Architecture,
    end: int,
    beam: int,
    min_length: int,
    max_length: int | None,
    forbidden: Sequence[int],
) -> None:
    if architecture.encoder is None:
        raise MoesaicError("only a model with an encoder translates", found="a decoder alone")
    for name, value in (("beam", beam), ("max_length", max_length)):
        if value is not None and value < 1:
            raise MoesaicError(f"{name} is too small", found=value, allowed=">= 1", nearest=1)
    if max_length is not None and min_length > max_length:
        raise MoesaicError("min_length exceeds max_length", found=min_length, allowed=f"0 to {max_length}")
    if end in forbidden:
        raise MoesaicError("a translation cannot end", found=f"the end token {end} is forbidden")
