"""Results of stage fidelity: the values in ``fidelity.json``."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.nas.search.rivals import Rival
from moesaic.nas.trust.ranking import Agreement
from moesaic.nas.trust.scores import Difference


@dataclass(frozen=True)
class Standing:
    """A member of the front or a rival against the best of the front, by inherited loss paired over sequences.

    ``p_value`` is Holm-corrected. ``level`` numbers, from 1, the levels of the front that can be told apart; None for
    a rival.
    """

    name: str
    fingerprint: str
    loss: float
    standard_error: float
    above_best: Difference
    p_value: float
    differs: bool
    level: int | None = None


@dataclass(frozen=True)
class Errors:
    """Relative errors: the median and the largest."""

    median: float
    largest: float


@dataclass(frozen=True)
class FlopsErrors:
    """Errors of predicted FLOPs on the test split, for ``models`` with threshold routers: ``before`` a model is
    evaluated, and ``after``, with the routing measured on the validation split."""

    models: int
    before: Errors
    after: Errors


@dataclass(frozen=True)
class CheckedMember:
    """A trial that was trained from scratch; ``retrained_loss`` is None if that diverged."""

    trial: int
    fingerprint: str
    inherited_loss: float
    inherited_standard_error: float | None
    retrained_loss: float | None
    retrained_standard_error: float | None
    flops: float
    active_parameters: float
    parameters: float


@dataclass(frozen=True)
class Check:
    """Trainings of ``steps`` steps each, and each judge's agreement with them; None: too few finished."""

    steps: int
    members: tuple[CheckedMember, ...]
    judges: dict[str, Agreement] | None


@dataclass(frozen=True)
class Trust:
    """``front`` by rising loss, all evaluated on the same ``sequences``. ``corrected``: the corrected loss of feasible
    trials by number, where that ranks better than the inherited one. ``chosen_rivals``: the best of each kind, to
    compare with the searched model."""

    sequences: int
    front: tuple[Standing, ...]
    neighbours_that_differ: int
    rivals: tuple[Standing, ...]
    flops: FlopsErrors | None
    check: Check | None
    corrected: dict[int, float]
    chosen_rivals: tuple[Rival, ...]

    @property
    def levels(self) -> int:
        """Number of levels of the front that its losses can tell apart."""
        return self.front[-1].level or 1
