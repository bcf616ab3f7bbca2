"""Judges of architectures (inherited loss, corrected loss, costs) and their agreement with trained models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesaic.nas.config import FEWEST_MEMBERS
from moesaic.nas.search.rivals import Rival
from moesaic.nas.search.trials import Trial
from moesaic.nas.trust.correction import FEWEST_TRAININGS, Correction, Judged
from moesaic.nas.trust.findings import CheckedMember
from moesaic.nas.trust.ranking import Agreement, agreement
from moesaic.nas.trust.sentences import CORRECTED, FLOPS, INHERITED, PARAMETERS


def judged_trial(trial: Trial) -> Judged:
    assert trial.loss is not None, "a feasible trial was evaluated"
    return Judged(trial.architecture, trial.loss, trial.costs["flops"], trial.costs["parameters"])


def judged_rival(rival: Rival) -> Judged:
    return Judged(rival.architecture, rival.loss, rival.costs["flops"], rival.costs["parameters"])


def correction_of(trials: Sequence[Trial], members: Sequence[CheckedMember]) -> Correction | None:
    """The correction learnt from the members that finished training; None if they are too few."""
    by_number, finished = {trial.number: trial for trial in trials}, _finished(members)
    if len(finished) < FEWEST_TRAININGS:
        return None
    judged = [judged_trial(by_number[member.trial]) for member in finished]
    return Correction.of(judged, _column(finished, "retrained_loss"))


def compare_judges(
    members: Sequence[CheckedMember], correction: Correction | None = None
) -> dict[str, Agreement] | None:
    """Agreement with the losses of the members that finished training, for inherited losses, corrected ones
    (leave-one-out) and two judges that need no evaluation; None if those members are too few."""
    finished = _finished(members)
    if len(finished) < FEWEST_MEMBERS:
        return None
    judges = {INHERITED: _column(finished, "inherited_loss")}
    if correction is not None:
        judges[CORRECTED] = correction.left_out()
    judges[FLOPS], judges[PARAMETERS] = -_column(finished, "flops"), -_column(finished, "parameters")  # more is better
    truth = _column(finished, "retrained_loss")
    return {name: agreement(marks, truth) for name, marks in judges.items()}


def _finished(members: Sequence[CheckedMember]) -> list[CheckedMember]:
    return [member for member in members if member.retrained_loss is not None]


def _column(members: Sequence[CheckedMember], name: str) -> np.ndarray:
    return np.array([getattr(member, name) for member in members], dtype=float)
