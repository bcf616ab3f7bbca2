import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from moesaic.nas.config import Config, load_config
from moesaic.search_spaces import MoesaicError

GOOD = """\
name: example
budget:
  flops: 60%
  latency: 12 ms
search:
  trials: 50
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> MoesaicError:
    with pytest.raises(MoesaicError) as caught:
        load_config(write(tmp_path, text), overrides)
    assert caught.value.exit_code == 2
    return caught.value


def test_defaults_fill_what_is_not_written(tmp_path):
    config = load_config(write(tmp_path, GOOD)).config
    assert config.search.trials == 50
    assert config.search.sampler == "evolution"
    assert config.budget["latency"].bind == "expected"


def test_overrides_reach_any_depth_and_keep_the_rest(tmp_path):
    path = write(tmp_path, GOOD + "space: tiny\n")
    loaded = load_config(path, ["search.trials=7", "space.layer.experts=[1, 2]", "budget.memory=90%"])
    assert loaded.config.search.trials == 7
    assert [group.experts for group in loaded.space.decoder.layers[0].groups] == [1, 2]
    assert set(loaded.config.budget) == {"flops", "latency", "memory"}


def test_the_resolved_configuration_reads_back_the_same(tmp_path):
    loaded = load_config(write(tmp_path, GOOD), ["seed=3"])
    again = load_config(write(tmp_path, loaded.resolved_yaml()))
    assert again.config == loaded.config
    assert again.space == loaded.space


@pytest.mark.parametrize(
    ("text", "where", "problem", "nearest"),
    [
        (GOOD.replace("trials", "trails"), ":6: search.trails", "unknown key", "trials"),
        (GOOD.replace("50", "many"), ":6: search.trials", "integer", None),
        (GOOD.replace("50", "0"), ":6: search.trials", "greater than or equal to 1", None),
        (GOOD.replace("12 ms", "12 GB"), ":4: budget.latency", "not measured in GB", None),
        (GOOD.replace("12 ms", "12"), ":4: budget.latency", "needs a unit", "12 ms"),
        (GOOD.replace("12 ms", "{limit: 12 ms, confidence: 0.5}"), ":4: budget.latency.conf", "greater than 0.5", None),
        (GOOD.replace("12 ms", "{limit: 12 ms, confidence: 1.0}"), ":4: budget.latency.conf", "less than 1", None),
        (GOOD.replace("60%", "{limit: 60%, confidence: 0.9}"), ":3: budget.flops.conf", "takes no confidence", None),
        (GOOD + "latency: {phase: decoding}\n", ":7: latency.phase", "not one of", "decode"),
        (GOOD + "latency: {phase: decode, sequence_length: 0}\n", ":7: latency.sequence_length", "greater", None),
        (GOOD.replace("60%", "0%"), ":3: budget.flops", "leaves nothing", None),
        (GOOD.replace("latency", "latencie"), ":4: budget.latencie", "unknown cost", "latency"),
        (GOOD + "space: smal\n", ":7: space.preset", "no such preset", "small"),
        (GOOD + "space: {preset: tiny, layer: {expert_sizes: [30]}}\n", ":7: space.layer", "multiples of 16", "32"),
        (
            GOOD + "space:\n  preset: tiny\n  layers:\n    1:\n      expertz: [1]\n",
            ":11: space.layers.1.expertz",
            "unknown key",
            "experts",
        ),
        (GOOD + "space:\n  preset: tiny\n  layers: {9: {experts: [1]}}\n", ":9: space.layers.9", "no such layer", None),
        (GOOD + "data: {kind: text}\n", ":7: data", "needs files", None),
        (GOOD + "data: {kind: text, files: {tain: a}}\n", ":7: data.files.tain", "unknown key", "train"),
        (GOOD + "data: {kind: text, files: {test: a}}\n", ":7: data.files.train", "missing key", None),
        (GOOD + "data: {kind: text, files: {train: []}}\n", ":7: data.files.train", "at least 1 item", None),
        (GOOD + "data: {kind: text, files: 3}\n", ":7: data.files", "valid list", None),
        (GOOD + "data: {kind: sdtlib}\n", ":7: data.kind", "not one of", "stdlib"),
        (GOOD + "fidelity: {check: 2}\n", ":7: fidelity.check", "too few to estimate a rank correlation", "4"),
        (GOOD + "fidelity: {check: -1}\n", ":7: fidelity.check", "greater than or equal to 0", None),
        (GOOD + "name: twice\n", ":7: name", "duplicate key", None),
        (GOOD + "search: [\n", ":8", "YAML syntax error", None),
        (GOOD.replace("name: example", "name: ../escape"), ":1: name", "match pattern", None),
        ("name: nothing\n", "run.yaml: budget", "missing key", None),
        ("budget: {}\n", ":1: budget", "at least one line", None),
        ("- a list\n", "run.yaml", "not a mapping", None),
        ("", "run.yaml", "is empty", None),
    ],
)
def test_bad_input_names_file_line_key_and_what_is_near(tmp_path, text, where, problem, nearest):
    error = refusal(tmp_path, text)
    assert problem in error.problem
    assert where in str(error.where)
    if nearest is not None:
        assert str(error.nearest) == nearest


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("search.trails=5", "command line: search.trails"),
        ("search.trials=five", "command line: search.trials"),
        ("nonsense", "command line"),
        ("name.first=x", "command line: name"),
        ("search.objectives=[flops]", "command line: search"),
        ("budget.flops=[", "command line: budget.flops"),
    ],
)
def test_bad_overrides_say_that_they_stand_on_the_command_line(tmp_path, override, where):
    assert where in str(refusal(tmp_path, GOOD, override).where)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, text):
    path = write(tmp_path, GOOD + f"supernet: {{learning_rate: {text}}}\n")
    assert load_config(path).config.supernet.learning_rate == 0.001
    assert load_config(path, [f"retrain.learning_rate={text}"]).config.retrain.learning_rate == 0.001


def test_a_missing_file_names_a_similar_one(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(MoesaicError, match="no such file") as caught:
        load_config(tmp_path / "rum.yaml")
    assert caught.value.nearest == "run.yaml"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary", b"\x00\x01\x02"])
def test_a_binary_file_is_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(MoesaicError):
        load_config(path)


def test_the_shipped_configurations_are_valid():
    for path in Path("experiments").glob("*.yaml"):
        assert load_config(path).space.cardinality > 1


@pytest.mark.parametrize("url", ["postgresql://me:secret@host/name", "mysql://host/name?passwd=secret"])
def test_a_password_is_refused_and_not_repeated(tmp_path, url):
    error = refusal(tmp_path, GOOD, f"mirror={url}")
    assert "secret" not in str(error)
    assert "PGPASSWORD" in str(error)


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and annotation of every setting that is no section itself."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


FLOATS = [key for key, kind in leaves(Config) if "float" in str(kind)]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", [*FLOATS, "budget.flops", "budgets.a.flops.limit"])
def test_a_number_that_is_not_finite_is_refused_or_kept_as_data(tmp_path: Path, key: str, value: str):
    text = GOOD + "executor: {kind: ray}\n"
    if key.startswith("budgets"):
        text = text.replace("budget:\n  flops: 60%\n  latency: 12 ms\n", "")
    try:
        config = load_config(write(tmp_path, text), [f"{key}={value}"]).config
    except MoesaicError as error:
        assert key.removesuffix(".limit") in str(error.where)
    else:
        json.dumps(config.model_dump(mode="json"), allow_nan=False)


def test_an_infinite_clip_norm_turns_clipping_off(tmp_path: Path):
    for value in (".inf", "null"):
        loaded = load_config(write(tmp_path, GOOD), [f"retrain.clip_norm={value}"])
        assert loaded.config.retrain.clip_norm is None
        assert load_config(write(tmp_path, loaded.resolved_yaml())).config == loaded.config


def test_numbers_are_read_as_they_are_written(tmp_path: Path):
    config = load_config(write(tmp_path, GOOD), ["search.trials=010", "seed=0777"]).config
    assert (config.search.trials, config.seed) == (10, 777)
    error = refusal(tmp_path, GOOD, "search.trials=1e3")
    assert (error.problem, error.nearest) == ("not a whole number", 1000)
