"""A plan makes no model, unless it times the machine, and then a small one."""

from __future__ import annotations

import pytest

from moesaic.nas import plan
from moesaic.nas.plan import _estimate_seconds, build_plan
from moesaic.supernet import Transformer
from tests.nas.run_tools import only, open_run


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Parameters of every model that is made, also of those without memory."""
    counts, make = [], Transformer.__init__

    def counting(self, *arguments, **keys):
        make(self, *arguments, **keys)
        counts.append(sum(parameter.numel() for parameter in self.parameters()))

    monkeypatch.setattr(Transformer, "__init__", counting)
    return counts


def test_nothing_is_made_where_nothing_is_timed(micro_config, tmp_path, made):
    found = build_plan(only(open_run(micro_config, tmp_path)))
    assert made == []
    assert found.seconds == {}


def test_stages_are_estimated_from_one_layer(micro_config, tmp_path, made, monkeypatch):
    def estimated(*overrides: str) -> dict[str, float]:
        return _estimate_seconds(open_run(micro_config, tmp_path, "space=medium", *overrides))

    assert set(estimated()) == {"supernet", "search", "fidelity", "retrain"}
    assert 0 < max(made) < 10**7  # the supernet has 4e8
    monkeypatch.setattr(plan, "seconds_per_flop", lambda *_: 1e-9)
    assert estimated("retrain.seeds=3")["retrain"] == pytest.approx(3 * estimated()["retrain"])
    assert estimated("search.trials=48")["search"] > estimated()["search"]


def test_a_budget_of_latency_alone_is_unchecked(micro_config, tmp_path):
    found = build_plan(only(open_run(micro_config, tmp_path, 'budget={"latency": "50%"}', "latency.batch_size=3")))
    assert (found.unchecked, found.share_inside, found.problem) == (("latency",), 1.0, None)
