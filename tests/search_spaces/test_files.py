from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.search_spaces import MoesaicError
from moesaic.search_spaces.architecture import ArchitectureField
from moesaic.search_spaces.files import (
    complete_replacement,
    read_json,
    read_value,
    replace_folder,
    sweep,
    temporary_beside,
    write_atomically,
    write_json,
    write_text,
    write_value,
)
from tests.search_spaces.test_architecture import architectures, pinned


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new ü")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.txt": "new ü".encode()}


def test_a_write_makes_the_folders_it_needs(tmp_path: Path) -> None:
    write_text(tmp_path / "b" / "c" / "a.txt", "x")
    assert contents(tmp_path / "b" / "c") == {"a.txt": "x"}


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        assert temporary.parent == tmp_path  # on the same disk, so that the rename is one step
        assert path.read_text() == "old"
        raise failure

    with pytest.raises(MoesaicError if isinstance(failure, OSError) else type(failure)) as caught:
        write_atomically(path, half)
    assert contents(tmp_path) == {"a.txt": "old"}
    if isinstance(caught.value, MoesaicError):
        assert caught.value.where == str(path)
        assert "No space left on device" in caught.value.problem


def test_a_replaced_file_keeps_its_permissions_and_a_link_its_place(tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "a.txt", tmp_path / "a.txt"
    write_text(target, "old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o7777 == 0o640


def test_a_name_of_full_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_text(path, "x")
    assert contents(tmp_path) == {path.name: "x"}


def test_another_file_that_cannot_be_read_is_not_called_a_failed_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "a.txt", lambda path: path.write_bytes((tmp_path / "source").read_bytes()))
    assert caught.value.filename == str(tmp_path / "source")
    assert contents(tmp_path) == {}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(40))
def test_a_folder_whose_replacement_is_killed_at_any_moment_is_old_or_new_and_keeps_a_persons_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    folder, new = tmp_path / "best", tmp_path / "new"
    for name in ("model", "sub/a", "notes.txt", "sub/mine.txt"):
        write_text(folder / name, "old" if name in ("model", "sub/a") else "mine")
    (folder / "link").symlink_to("notes.txt")
    for name in ("model", "sub/a", "card"):
        write_text(new / name, "new")
    done = 0

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: Any, **named: Any) -> object:
            nonlocal done
            done += 1
            if done > moment:
                raise Killed
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("link", "rename", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            replace_folder(folder, new)
        except Killed:
            pass
        else:
            assert moment > 8, "the faults were never reached"
    complete_replacement(folder)
    left = {
        name: path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
        for name in [str(path)[len(str(folder)) + 1 :]]
    }
    whose = "new" if "card" in left else "old"
    expected = {"model": whose, "sub/a": whose, "notes.txt": "mine", "sub/mine.txt": "mine", "link": "mine"}
    assert left == expected | ({"card": "new"} if whose == "new" else {})
    assert (folder / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} <= {"best", "new"}


def test_sweeping_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    code = f"""
import pathlib
from moesaic.search_spaces.files import temporary_beside
temporary_beside(pathlib.Path({str(tmp_path)!r}, "a.txt")).write_text("half")
folder = temporary_beside(pathlib.Path({str(tmp_path)!r}, "best"))
folder.mkdir()
(folder / "model").write_text("half")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    mine, old = temporary_beside(tmp_path / "mine"), temporary_beside(tmp_path / "old")
    users = [tmp_path / "notes.tmp", tmp_path / ".moesaic-notes.tmp", tmp_path / ".b.txt.4000000.tmp"]
    for path in (mine, old, *users):
        path.write_text("x")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    assert len(list(tmp_path.iterdir())) == 7
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, *users}


def test_a_failed_first_write_leaves_an_empty_folder(tmp_path: Path) -> None:
    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk")

    with pytest.raises(MoesaicError):
        write_atomically(tmp_path / "a.txt", half)
    assert contents(tmp_path) == {}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "a.txt", tmp_path / "file" / "deeper" / "a.txt"):
        with pytest.raises(MoesaicError) as caught:
            write_text(path, "x")
        assert caught.value.where == str(path)
    assert contents(tmp_path) == {"file": "kept"}


def test_json_round_trip(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None, "ü"], "b": {}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data == json.loads((tmp_path / "a.json").read_text())


def test_json_without_a_standard_form_is_not_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    for data in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "a.json", data)
    assert contents(tmp_path) == {"a.json": "1\n"}


@pytest.mark.parametrize("damage", [b"", b'{"a": 1', b"\xff\xfe{}", b'{"a": 1}}'])
def test_damaged_json_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(damage)
    with pytest.raises(MoesaicError, match="damaged") as caught:
        read_json(path)
    assert caught.value.where == str(path)


def test_missing_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(MoesaicError, match="cannot be read"):
        read_json(tmp_path)


# ---------------------------------------------------------------- typed values


@dataclass(frozen=True)
class Row:
    architecture: ArchitectureField
    scores: tuple[float, ...]
    note: str | None = None


rows = st.builds(
    Row,
    architectures(),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
    st.none() | st.text(st.characters(codec="utf-8"), max_size=5),
)


@given(found=st.lists(rows, max_size=2))
def test_a_value_is_read_as_the_equal_one_that_was_written(found: list[Row], tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("values") / "rows.json"
    write_value(path, found, list[Row])
    assert read_value(path, list[Row]) == found
    assert [row["architecture"] for row in read_json(path)] == [row.architecture.to_dict() for row in found]
    for row in found[:1]:
        write_value(path, row)
        assert read_value(path, Row) == row


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda row: row.pop("scores"), "scores"),
        (lambda row: row.update(scores=[0.5, "high"]), "scores.1"),
        (lambda row: row["architecture"].update(format=1), "architecture"),
        (lambda row: row["architecture"]["decoder"].update(width=40), "architecture"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_place(tmp_path: Path, change, place: str) -> None:
    path = tmp_path / "row.json"
    write_value(path, Row(pinned(), (0.5, 1.0)))
    data = read_json(path)
    change(data)
    write_json(path, data)
    with pytest.raises(MoesaicError, match=f"is damaged or of another version: {place}: ") as caught:
        read_value(path, Row)
    assert caught.value.where == str(path)


def test_a_missing_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="no such file"):
        read_value(tmp_path / "row.json", Row)
