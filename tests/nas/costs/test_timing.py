"""A clock that tests turn: every pass takes a known time on a machine whose speed is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest

from moesaic.nas.costs.latency.calibrate import NOISY, Survey
from moesaic.nas.costs.latency.timing import Series, Timer, time_alone, time_round, time_with_anchors
from moesaic.search_spaces import StageFailed


@dataclass
class Machine:
    """Passes take ``milliseconds * slowness(now)``, disturbed by log-normal noise."""

    slowness: Callable[[float], float] = lambda now: 1.0
    noise: float = 0.01
    now: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)

    def work(self, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += milliseconds / 1e3 * self.slowness(self.now) * math.exp(self.rng.gauss(0, self.noise))

        return run

    @property
    def timer(self) -> Timer:
        return Timer(clock=lambda: self.now)


ANCHORS = (3.0, 7.0, 11.0)
TRUTH = np.linspace(2.0, 12.0, 24)


def survey(machine: Machine, rounds: int = 5) -> Survey:
    cases, anchors = ([Series(machine.work(t)) for t in times] for times in (TRUTH, ANCHORS))
    for case in cases:
        case.run()  # a calibration counts the load first
    found = Survey(cases, anchors, machine.timer, Random(machine.seed))
    found.measure(rounds)
    return found


def relative(found: Survey) -> np.ndarray:
    """Figures over truths, scaled to the anchor: only ratios to it are meant to be right."""
    return found.milliseconds() / TRUTH / (found.anchor_milliseconds() / ANCHORS).mean()


@pytest.mark.parametrize(
    "slowness",
    [
        lambda now: 1.0,
        lambda now: 2.0 if now > 1.6 else 1.0,  # twice as slow from the middle on
        lambda now: 1.0 + 0.3 * math.sin(now),
        lambda now: 1.35 if int(now / 0.7) % 2 else 1.0,  # two clocks in turn
    ],
    ids=["steady", "slower from the middle", "waves", "two clocks"],
)
def test_the_speed_of_the_machine_is_taken_out(slowness):
    found = survey(Machine(slowness))
    assert np.abs(relative(found) - 1).max() < 0.03


def test_without_the_correction_a_slower_half_would_show():
    found = survey(Machine(lambda now: 2.0 if now > 1.6 else 1.0))
    raw = np.array([np.median(case.milliseconds) for case in found.cases]) / TRUTH
    assert np.ptp(raw) > 0.3


def test_a_steady_machine_has_no_drift_and_no_noise_to_speak_of():
    measured = survey(Machine()).summary(1.0, 0, None)
    assert measured.noise < 0.03
    assert measured.slowest == pytest.approx(1, abs=0.02)
    assert measured.fastest == pytest.approx(1, abs=0.02)


def test_a_machine_that_drifts_says_by_how_much():
    measured = survey(Machine(lambda now: 1.3 if int(now) % 2 else 1.0)).summary(1.0, 0, None)
    assert measured.slowest / measured.fastest == pytest.approx(1.3, rel=0.05)
    assert measured.raw_noise > 4 * measured.noise


def test_noise_that_no_anchor_sees_is_measured_longer_and_then_not_trusted():
    found = survey(Machine(noise=0.6))
    assert len(found.cases[0].milliseconds) > 15
    assert found.summary(1.0, 0, None).noise > NOISY


def test_a_quiet_machine_is_measured_no_longer_than_asked():
    assert {len(case.milliseconds) for case in survey(Machine()).cases} == {5}


def test_a_model_whose_repeats_disagree_is_measured_again():
    machine = Machine()
    found = survey(machine)
    terms = np.stack([np.ones(len(TRUTH)), TRUTH], axis=1)
    assert not found.doubtful(terms)
    case = found.cases[5]
    case.milliseconds[:3] = [t * 1.5 for t in case.milliseconds[:3]]
    assert found.doubtful(terms) == [case]
    assert abs(relative(found)[5] - 1) > 0.1
    found.time([case], 20)
    assert abs(relative(found)[5] - 1) < 0.02


def test_a_model_far_from_what_the_others_predict_is_measured_again():
    found = survey(Machine())
    case = found.cases[5]
    case.milliseconds[:] = [t * 1.5 for t in case.milliseconds]
    assert case in found.doubtful(np.stack([np.ones(len(TRUTH)), TRUTH], axis=1))


def test_every_case_is_timed_once_a_round_between_anchors():
    machine = Machine()
    cases, anchors = ([Series(machine.work(1.0)) for _ in range(count)] for count in (10, 3))
    time_round(cases, anchors, machine.timer, Random(0))
    assert [len(case.moments) for case in cases] == [1] * 10
    assert [len(anchor.moments) for anchor in anchors] == [2, 1, 1]
    moments = [moment for anchor in anchors for moment in anchor.moments]
    assert min(moments) < min(c.moments[0] for c in cases) < max(c.moments[0] for c in cases) < max(moments)


def test_a_short_pass_is_repeated_more_often():
    machine = Machine(noise=0.0)
    calls: list[float] = []
    run = machine.work(0.9)
    machine.timer(lambda: (calls.append(1), run()))
    assert len(calls) == 7  # until 6 ms
    calls.clear()
    long = machine.work(50.0)
    machine.timer(lambda: (calls.append(1), long()))
    assert len(calls) == 3


@pytest.mark.parametrize("speed", [0.5, 1.0, 1.7])
def test_a_model_timed_later_is_corrected_to_the_speed_of_the_calibration(speed):
    machine = Machine(lambda now: speed * (1.2 if int(now * 2) % 2 else 1.0), noise=0.02)
    found = time_with_anchors(machine.work(9.0), [(machine.work(t), t) for t in ANCHORS], machine.timer)
    assert found.corrected_ms == pytest.approx(9.0, rel=0.02)
    assert found.raw_ms == pytest.approx(found.corrected_ms * found.anchor_ratio)
    assert speed * 0.95 < found.anchor_ratio < speed * 1.25


@pytest.mark.parametrize(("limit", "surely_over"), [(math.inf, False), (9.05, False), (8.0, True), (4.0, True)])
def test_a_time_that_is_surely_over_its_limit_is_not_made_more_precise(limit, surely_over):
    machine = Machine(noise=0.06)
    anchors = [(machine.work(t), t) for t in ANCHORS]
    found = time_with_anchors(machine.work(9.0), anchors, machine.timer, limit)
    whole = Machine(noise=0.06)
    precise = time_with_anchors(whole.work(9.0), [(whole.work(t), t) for t in ANCHORS], whole.timer)
    assert (machine.now < 0.7 * whole.now) == surely_over
    assert found.corrected_ms == pytest.approx(9.0, rel=0.06)
    assert surely_over or found == precise


@pytest.mark.parametrize("step", [0.0, -1e-3, math.nan])
def test_a_clock_that_does_not_run_is_refused(step):
    @dataclass
    class Broken:
        now: float = 0.0

        def __call__(self) -> float:
            self.now += step
            return self.now

    with pytest.raises(StageFailed, match="impossible duration measured"):
        time_alone(lambda: None, Timer(clock=Broken()))
