"""What stage fidelity finds of a run's ranking: the values in ``fidelity.json``."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.nas.search.rivals import Rival
from moesaic.nas.trust.ranking import Agreement
from moesaic.nas.trust.scores import Difference


@dataclass(frozen=True)
class Standing:
    """A member of the front or a rival against the best of the front, by inherited loss in pairs over sequences.

    ``p_value`` is Holm-corrected. ``level`` counts from 1 the levels of the front that can be told apart; None: a
    rival.
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
    """Errors of FLOPs on the test split, of ``models`` with threshold routers: as expected ``before`` a model is
    evaluated, and ``after``, under the routing on the validation split."""

    models: int
    before: Errors
    after: Errors


@dataclass(frozen=True)
class CheckedMember:
    """A trial that was trained from scratch; without a ``retrained_loss`` where that diverged."""

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
    """Trainings of ``steps`` steps each, and how far each judge's order agrees with theirs; None: too few ended."""

    steps: int
    members: tuple[CheckedMember, ...]
    judges: dict[str, Agreement] | None


@dataclass(frozen=True)
class Trust:
    """``front`` by rising loss, each pair judged on the same ``sequences``. ``corrected``: the corrected loss of
    feasible trials by number, where that ranks better than the inherited one. ``chosen_rivals``: the best of each
    kind, which the searched model meets."""

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
        """Levels of the front that its losses can tell apart."""
        return self.front[-1].level or 1
