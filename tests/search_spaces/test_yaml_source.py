from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from moesaic.search_spaces import Architecture, MoesaicError, load_space, yaml_source
from moesaic.search_spaces.yaml_source import YamlSource, parse_yaml, read_yaml


def refused(text: str) -> MoesaicError:
    with pytest.raises(MoesaicError) as caught:
        parse_yaml(text, "a.yaml")
    return caught.value


def test_every_key_and_item_knows_its_line() -> None:
    source = parse_yaml("# head\na: 1\nb:\n  c: [x,\n    y]\n  3: {d: 4}\n", "a.yaml")
    assert source.data == {"a": 1, "b": {"c": ["x", "y"], 3: {"d": 4}}}
    assert source.where(("a",)) == "a.yaml:2: a"
    assert source.where(("b", "c", 0)) == "a.yaml:4: b.c.0"
    assert source.where(("b", "c", 1)) == "a.yaml:5: b.c.1"
    assert source.where(("b", 3, "d")) == "a.yaml:6: b.3.d"
    assert source.at("b").where((3,)) == "a.yaml:6: b.3"
    assert source.at("b", "c").data == ["x", "y"]


def test_a_missing_key_has_the_line_of_its_parent() -> None:
    source = parse_yaml("a: 1\nb:\n  c: 2\n", "a.yaml")
    assert source.where(("b", "absent")) == "a.yaml:2: b.absent"
    assert source.where(("absent",)) == "a.yaml: absent"
    assert source.where() == "a.yaml"


def test_a_key_from_elsewhere_has_its_own_place() -> None:
    assert YamlSource("a.yaml", {"a": 1}, {("a",): "command line"}).where(("a",)) == "command line: a"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "a.yaml:3:2"),
        ("a: 1\n b: 2\n", "a.yaml:2:3"),
        ("a: 1\n\tb: 2\n", "a.yaml:2:1"),
        ("a: 'x\n", "a.yaml:2:1"),
        ("a: 1\n---\nb: 2\n", "a.yaml:2:1"),
        ("a: *nowhere\n", "a.yaml:1:4"),
        ("x: 1\n? [a]\n: b\n", "a.yaml:2:3"),
    ],
)
def test_a_syntax_error_has_line_and_column(text: str, where: str) -> None:
    error = refused(text)
    assert error.where == where
    assert error.problem.startswith("YAML syntax error")


@pytest.mark.parametrize("value", ["2024-13-45", "!!int ten", "!!float x", "!!bool maybe", "!!timestamp soon", "0x_"])
def test_an_invalid_value_is_refused_with_its_line(value: str) -> None:
    """PyYAML answers these with a bare ValueError, KeyError or AttributeError."""
    assert refused(f"a: 1\nb: {value}\n").where == "a.yaml:2:4"


@given(st.integers(0, 10**30), st.integers(0, 4), st.sampled_from(["", "-", "+"]))
def test_an_integer_is_read_in_base_ten_whatever_zeros_lead(number: int, zeros: int, sign: str) -> None:
    value = parse_yaml(f"a: {sign}{'0' * zeros}{number}", "a.yaml").data["a"]
    assert (value, type(value)) == (-number if sign == "-" else number, int)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("010.5", 10.5), ("1e-3", 1e-3), ("1.e3", 1e3), (".5", 0.5), ("-.inf", -math.inf), (".INF", math.inf)],
        *[("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("-0b11", -3), ("1_0.5", 10.5)],
        *[(text, text) for text in ("1:30", "190:20:30.15", "1.2.3", ".", "0x", "+")],
    ],
)
def test_a_number_is_read_as_it_is_written(text: str, value: object) -> None:
    assert parse_yaml(f"a: {text}", "a.yaml").data["a"] == value


def test_no_number_is_read_from_nan_but_nan() -> None:
    assert math.isnan(parse_yaml("a: .nan", "a.yaml").data["a"])


@pytest.mark.parametrize(
    ("text", "where", "first"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml:3: a", 1),
        ("a:\n  b: 1\n  c: 2\n\n  b: 3\n", "a.yaml:5: a.b", 2),
        ("a:\n- {b: 1}\n- b: 1\n  b: 2\n", "a.yaml:4: a.1.b", 3),
        ("1: x\n0x1: y\n", "a.yaml:2: 1", 1),
        ("10: x\n010: y\n", "a.yaml:2: 10", 1),
    ],
)
def test_a_duplicate_key_is_refused(text: str, where: str, first: int) -> None:
    error = refused(text)
    assert error.where == where
    assert error.problem == f"duplicate key (first on line {first})"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"])
def test_a_python_object_is_refused_and_runs_nothing(tag: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"a: 1\nb: {tag} ['touch {mark}']\n"
    yaml.unsafe_load(text)
    assert mark.exists()  # the text is a working attack on a loader that trusts it
    mark.unlink()
    assert refused(text).where == "a.yaml:2:4"
    assert not mark.exists()


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "budget.yaml").write_text("a: 1\n")
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(MoesaicError) as caught:
        read_yaml(tmp_path / "buget.yaml")
    assert caught.value.where == str(tmp_path / "buget.yaml")
    assert caught.value.nearest == "budget.yaml"
    with pytest.raises(MoesaicError) as caught:
        read_yaml(tmp_path / "nowhere" / "a.yaml")
    assert caught.value.nearest is None


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "a.yaml"
    binary.write_bytes(b"\xff\xfe\x00a")
    for path in (tmp_path, binary, binary / "below.yaml"):
        with pytest.raises(MoesaicError) as caught:
            read_yaml(path)
        assert caught.value.where == str(path)


def test_deep_nesting_is_refused_with_a_message() -> None:
    assert "nested too deeply" in refused("[" * 5000).problem


def test_aliases_neither_loop_nor_multiply() -> None:
    assert parse_yaml("a: &a [*a]", "a.yaml").where(("a", 0)) == "a.yaml:1: a.0"
    lines = ["l0: &l0 [x, x]", *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 25))]
    start = time.perf_counter()
    source = parse_yaml("\n".join(lines), "a.yaml")
    assert time.perf_counter() - start < 5
    assert source.where(("l24",)) == "a.yaml:25: l24"


def test_aliased_values_keep_their_data() -> None:
    source = parse_yaml("base: &base {x: 1}\nmore: {<<: *base, y: 2}\n", "a.yaml")
    assert source.data == {"base": {"x": 1}, "more": {"x": 1, "y": 2}}


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_plain_data_round_trip(data: object) -> None:
    assert parse_yaml(yaml.safe_dump(data), "a.yaml").data == data


@given(st.text(alphabet=st.sampled_from("ab1:-?[]{}&*!|>'\"%@#, \n\t0x."), max_size=30) | st.text(max_size=20))
def test_any_text_is_data_or_a_clear_error(text: str) -> None:
    try:
        parse_yaml(text, "a.yaml")
    except MoesaicError as error:
        assert error.where is not None
        assert error.where.startswith("a.yaml")


def test_a_kind_is_compiled_once_however_often_it_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a TypeAdapter takes milliseconds, using it takes a tenth of one."""
    built, plain = [], load_space(YamlSource("test", "tiny")).largest.to_dict()
    monkeypatch.setattr(yaml_source, "TypeAdapter", lambda kind: built.append(kind) or TypeAdapter(kind))
    yaml_source.adapter.cache_clear()
    found = {Architecture.from_dict(plain) for _ in range(20)}
    assert len(found) == 1
    assert built == [Architecture]
