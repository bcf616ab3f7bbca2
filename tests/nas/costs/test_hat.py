"""HAT's convention: the published figures of all its networks, and the command that imports and prices one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from experiments.hat_costs.run import PUBLISHED, row_of
from moesaic.nas.cli import app
from moesaic.nas.costs.hat import hat_costs
from moesaic.search_spaces import Architecture, load_space, read_hat
from moesaic.search_spaces.yaml_source import YamlSource
from tests.search_spaces.hat_files import HAT_NETWORKS, hat_file


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


NETWORKS = Path(__file__).parents[3] / "experiments" / "hat_costs" / "networks"


@pytest.mark.parametrize("network", HAT_NETWORKS, ids=lambda n: f"{n['task']}, {n['hardware']}, {n['latency']}")
def test_parameters_and_flops_are_the_published_ones(network, tmp_path):
    path = tmp_path / "network.yml"
    path.write_text(hat_file(network))
    costs = hat_costs(read_hat(path), 23 if "IWSLT" in network["task"] else 30)
    assert f"{costs.params / 1e6:.2f}" == network["params_m"]
    assert f"{costs.flops / 1e9:.2f}" == network["gflops"]
    assert costs.sparsity == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_automoes_figures_are_of_padded_layers(name):
    """Table 4 of AutoMoE: parameters a token uses, and the sparsity as if all layers had the most experts."""
    row, published = row_of(NETWORKS / f"{name}.yml"), PUBLISHED[name]
    assert round(row["active_params_m"]) == published["active_params_m"]
    assert round(row["padded_sparsity"], 2) == published["sparsity"]
    assert row["gflops_at_least"] < published["gflops"] < row["gflops_at_most"]
    assert row["sparsity"] < published["sparsity"] - 0.1


def test_a_mixture_counts_its_router_and_the_mean_of_its_experts():
    (fract,) = (read_hat(path) for path in NETWORKS.glob("*fract.yml"))
    dense, tokens = 0, 30
    for slot, layer in fract.layers.items():
        width, part = fract.width_at(slot), layer.feed_forward
        mean = sum(part.expert_sizes) / part.experts
        dense += 2 * tokens * (2 * width * mean + (part.experts > 1) * width * part.experts)
    without = fract.with_layers(
        {
            s: type(layer)(layer.attention, type(layer.feed_forward)(()), layer.cross)
            for s, layer in fract.layers.items()
        }
    )
    norms = 2 * tokens * sum(fract.width_at(slot) for slot in fract.layers)
    assert hat_costs(fract).flops - hat_costs(without).flops == pytest.approx(dense + norms, abs=1)


def test_a_file_is_imported_and_priced(tmp_path):
    network = HAT_NETWORKS[-1]
    source, out = tmp_path / "network.yml", tmp_path / "architecture.yaml"
    source.write_text(hat_file(network))
    done = command("import", "hat", source, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert Architecture.from_yaml(out) == read_hat(source)
    assert command("import", "hat", source).stdout == out.read_text()
    again = command("import", "hat", source, "--out", out)
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)
    found = json.loads(command("cost", out, "--convention", "hat", "--json").stdout)
    assert f"{found['params'] / 1e6:.2f}" == network["params_m"]
    assert f"{found['flops'] / 1e9:.2f}" == network["gflops"]
    table = command("cost", out, "--convention", "hat", "--sequence-length", 23)
    assert table.exit_code == 0, table.stderr
    assert f"{found['params']:,}" in table.stdout
    assert "23 source and target tokens" in table.stdout
    wrong = command("cost", out, "--convention", "hat", "--batch-size", 4)
    assert (wrong.exit_code, "--batch-size has no meaning" in wrong.stderr) == (2, True)


def test_a_model_without_an_encoder_has_costs_too():
    architecture = load_space(YamlSource("test", "tiny")).smallest
    longer, shorter = (hat_costs(architecture, length) for length in (60, 30))
    assert longer.params == shorter.params
    assert longer.flops > 2 * shorter.flops  # attention grows with the square
