"""Every executor keeps the contract."""

from collections.abc import Iterator

import pytest

from moesaic.nas.executors import LocalExecutor
from moesaic.nas.executors.cluster import connected
from moesaic.nas.executors.ray_lanes import RayExecutor
from moesaic.nas.executors.tune_trials import TuneExecutor
from moesaic.supernet import Judge
from tests.contracts.executors import ExecutorContract
from tests.nas.executors.tools import DEVICE, lanes


@pytest.fixture(scope="class")
def one_ray() -> Iterator[None]:
    """One Ray for all tests of a class: an executor keeps a connection that exists."""
    with connected(lanes("ray", 2), DEVICE):
        yield


class TestLocal(ExecutorContract):
    def make(self, judge: Judge) -> LocalExecutor:
        return LocalExecutor(judge)


@pytest.mark.usefixtures("one_ray")
class TestRay(ExecutorContract):
    def make(self, judge: Judge) -> RayExecutor:
        return RayExecutor(lanes("ray", 2), judge, DEVICE)


@pytest.mark.usefixtures("one_ray")
class TestTune(ExecutorContract):
    def make(self, judge: Judge) -> TuneExecutor:
        return TuneExecutor(lanes("tune", 2), judge, DEVICE)
