"""MoEBERT's split: which neurons every expert keeps, by importance, by chance and inversely, and what recovery mends.

python -m experiments.moebert.run [--out runs/moebert] [--steps 2000] [--encoder DIR --train FILE --test FILE]

The small language model is trained by the tool (dense.yaml); the encoder is a folder of yours (README.md says how to
get the one of the result), judged on text of yours. Layers are pruned to their first neurons, or become four experts of
which a token uses one: with the first sixth shared by all of them (MoEBERT, arXiv 2204.07675), or with none shared.
The small model's experts are then repaired in closed form, and distilled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import moesaic
from experiments.common import Row, facts, markdown, parser_of, run_script
from moesaic import Architecture, Judge, MoesaicError, Run, Transformer, open_run, write_value
from moesaic.search_spaces import FeedForward, Router, Slot
from moesaic.supernet import TrainData, TrainSettings, repaired, split, train

HERE = Path(__file__).parent
CALIBRATION, TEST, SEEDS = 32, 64, (0, 1, 2)
ONE = Router("top_k", k=1, weights="one", score="mass")
LAYOUTS: dict[str, Callable[[int], FeedForward]] = {
    "pruned to 1/2": lambda n: FeedForward((n // 2,)),
    "pruned to 1/4": lambda n: FeedForward((n // 4,)),
    "1 of 4 experts, 1/6 shared": lambda n: FeedForward((n // 12,) * 4, ONE, n // 6),
    "1 of 4 experts, none shared": lambda n: FeedForward((n // 4,) * 4, ONE),
}
"""By name, what a layer of n neurons becomes; all but the first use n / 4 per token."""
RECOVERED = list(LAYOUTS)[2:]
RECOVERY = TrainSettings(steps=100, learning_rate=1e-3, warmup_steps=10, weight_decay=0.0, balance_weight=0.0)
Ranks = Mapping[Slot, Tensor]
"""Of each layer, [N] neurons, those that stay first."""


def by_contribution(run: Run) -> Ranks:
    """The tool's importance: the mean square of what a neuron adds to the layer's output, |h| times the norm of its row
    of ``down``."""
    model, read = source_of(run), {}
    for slot, block in zip(model.architecture.layers, model.layers, strict=True):
        block.feed_forward.register_forward_hook(lambda module, given, out, slot=slot: read.update({slot: given[0]}))
    with torch.no_grad():
        model(run.task.batch(CALIBRATION, run.config.seed, 0).tokens)
        return {slot: _squares(block.feed_forward, read[slot]).argsort(descending=True)
                for slot, block in zip(read, model.layers, strict=True)}  # fmt: skip


def _squares(layer: torch.nn.Module, read: Tensor) -> Tensor:
    """[N] for what a layer with GELU reads, [T, D]."""
    up, bias, down = (getattr(layer, name) for name in ("up", "up_bias", "down"))
    return F.gelu(F.linear(read, up, bias)).square().mean(0) * down.square().sum(1)


def by_gradient(run: Run) -> Ranks:
    """MoEBERT's importance (its equation 4), a sum over windows of |w1 dL/dw1 + w2 dL/dw2|."""
    model, batch = source_of(run), run.task.batch(CALIBRATION, run.config.seed, 0)
    modules = {slot: block.feed_forward for slot, block in zip(model.architecture.layers, model.layers, strict=True)}
    scores = {slot: torch.zeros(len(module.up)) for slot, module in modules.items()}
    for row in range(len(batch)):
        one = batch[row : row + 1]
        model.zero_grad()
        F.cross_entropy(model(one.tokens)[0], one.targets[0]).backward()
        for slot, module in modules.items():
            assert module.up.grad is not None and module.down.grad is not None
            change = (module.up * module.up.grad + module.down * module.down.grad).sum(1)
            scores[slot] += change.detach().abs()
    return {slot: score.argsort(descending=True) for slot, score in scores.items()}


def by_chance(ranks: Ranks, seed: int) -> Ranks:
    generator = torch.Generator().manual_seed(seed)
    return {slot: torch.randperm(len(ranked), generator=generator) for slot, ranked in ranks.items()}


def orders(run: Run) -> Iterator[tuple[str, int, Ranks]]:
    """Name, seed and ranks. A model that is judged by its own states has no gradient there."""
    important = by_contribution(run)
    yield "importance", 0, important
    if run.task.imitation is not None:
        yield "MoEBERT's importance", 0, by_gradient(run)
    for seed in SEEDS:
        yield "random", seed, by_chance(important, seed)
    yield "inverse", 0, {slot: ranked.flip(0) for slot, ranked in important.items()}


def source_of(run: Run) -> Transformer:
    assert run.loaded.checkpoint is not None
    return run.loaded.checkpoint.load()


def dealt(ranked: Tensor, part: FeedForward) -> Tensor:
    """[N] rows in the order of a bank: the first of ``ranked`` are shared, the next dealt to the experts in turn."""
    rest, experts = ranked[part.shared_size :], part.experts
    taken = [rest[place::experts][:size] for place, size in enumerate(part.expert_sizes)]
    first = torch.cat([ranked[: part.shared_size], *taken])
    return torch.cat([first, ranked[~torch.isin(ranked, first)]])


def split_by(run: Run, ranks: Ranks, part: FeedForward) -> Transformer:
    """The source, its neurons ``dealt`` for ``part``, with routers."""
    source = source_of(run)
    for slot, block in zip(source.architecture.layers, source.layers, strict=True):
        rows, module = dealt(ranks[slot], part), block.feed_forward
        for name in ("up", "gate", "down", "up_bias"):
            if (value := getattr(module, name)) is not None:
                setattr(module, name, torch.nn.Parameter(value.detach()[rows]))
    return split(source, run.space, run.task.batch(CALIBRATION, run.config.seed, 0).tokens, "stored").model


def member(run: Run, part: FeedForward) -> Architecture:
    """All layers alike."""
    layers = run.space.largest.layers.items()
    return run.space.largest.with_layers({slot: replace(layer, feed_forward=part) for slot, layer in layers})


def zero_shot(run: Run) -> list[Row]:
    """Losses on the test split without any training."""
    batch = run.task.held_out("test", TEST)
    neurons = next(iter(run.space.largest.layers.values())).feed_forward.neurons
    rows: list[Row] = []
    for order, seed, ranks in orders(run):
        for layout, make in LAYOUTS.items():
            model = split_by(run, ranks, make(neurons))
            loss = Judge(model, batch, loss=run.task.loss)(member(run, make(neurons))).loss
            rows.append({"layout": layout, "order": order, "seed": seed, "loss": round(loss, 4)})
    return rows


def recovery(run: Run, out: Path) -> list[Row]:
    """The same for models that are repaired, and then distilled from the source for ``RECOVERY.steps`` steps."""
    batch, source = run.task.held_out("test", TEST), source_of(run)
    windows = run.task.batch(64, run.config.seed, 1).tokens
    neurons = next(iter(run.space.largest.layers.values())).feed_forward.neurons
    rows: list[Row] = []

    def teacher(batch: moesaic.Batch) -> Tensor:
        with torch.no_grad():
            return source(batch.tokens)

    for order, seed, ranks in orders(run):
        for layout in RECOVERED:
            part = LAYOUTS[layout](neurons)
            whole, architecture = split_by(run, ranks, part), member(run, part)
            judge = Judge(whole, batch, loss=run.task.loss)
            row: Row = {"layout": layout, "order": order, "seed": seed, "zero-shot": round(judge(architecture).loss, 4)}
            model = repaired(whole, run.space.largest, windows)(architecture)
            judge = Judge(model, batch, loss=run.task.loss)
            row["repaired"] = round(judge(architecture).loss, 4)
            data = TrainData(
                lambda step: run.task.batch(8, run.config.seed, step),
                lambda step, architecture=architecture: [architecture],
                "distillation",
                teacher,
            )
            name = f"{order}-{seed}-{layout}".replace(" ", "-").replace("/", "-")
            train(model, data, RECOVERY, out / "recovery" / name, name)
            row["distilled"] = round(judge(architecture).loss, 4)
            rows.append(row)
    return rows


def source_loss(run: Run) -> float:
    model = source_of(run)
    return round(Judge(model, run.task.held_out("test", TEST), loss=run.task.loss)(model.architecture).loss, 4)


def table(rows: list[Row], columns: list[str], key: str) -> str:
    """A row per order, means over seeds with their range; ``key`` gives the columns of a long table."""
    lines = []
    for order in dict.fromkeys(row["order"] for row in rows):
        cells = [order]
        for column in columns:
            own = [row for row in rows if row["order"] == order and (not key or row[key] == column)]
            values = [row["loss" if key else column] for row in own]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{spread}")
        lines.append(cells)
    return markdown("|".join(["order", *columns]), lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/moebert"))
    parser.add_argument("--steps", type=int, default=2000)
    for name in ("encoder", "train", "test"):
        parser.add_argument(f"--{name}", type=Path)
    arguments = parser.parse_args()
    given = [arguments.encoder, arguments.train, arguments.test]
    if any(given) and not all(given):
        raise MoesaicError("an encoder needs its text", where="command line", allowed="--encoder, --train and --test")
    moesaic.run(HERE / "dense.yaml", [f"retrain.steps={arguments.steps}"], arguments.out / "dense")
    settings = [f"model.from={arguments.out / 'dense' / 'exports' / 'best'}"]
    small = open_run(HERE / "split.yaml", settings, arguments.out / "split")
    result = {**facts(small.device), "small": {"source": source_loss(small), "zero_shot": zero_shot(small)}}
    result["small"]["recovery"] = recovery(small, arguments.out)
    if all(given):
        files = f"{{train: '{arguments.train}', test: '{arguments.test}'}}"
        settings = [f"model.from={arguments.encoder}", "data.kind=text", f"data.files={files}"]
        encoder = open_run(HERE / "split.yaml", settings, arguments.out / "encoder")
        result["encoder"] = {"zero_shot": zero_shot(encoder)}
    write_value(HERE / "result.json", result, dict)
    for name in ("small", "encoder"):
        if name in result:
            print(name, table(result[name]["zero_shot"], list(LAYOUTS), "layout"), sep="\n")
    stages = ["zero-shot", "repaired", "distilled"]
    for layout in RECOVERED:
        rows = [row for row in result["small"]["recovery"] if row["layout"] == layout]
        print(layout, table(rows, stages, ""), sep="\n")


if __name__ == "__main__":
    run_script(main)
