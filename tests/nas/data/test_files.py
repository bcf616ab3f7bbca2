import json
import os
from pathlib import Path

import pytest

from moesaic.nas.config import DataConfig
from moesaic.nas.data.file_search import shown
from moesaic.nas.data.files import absolute_files, find_files
from moesaic.search_spaces import MoesaicError
from tests.nas.data.data_tools import config, found, lines, write


def test_folders_globs_and_files_find_the_same_text_once(tmp_path):
    write(tmp_path, {f"{name}.txt": lines(name) for name in "abc"})
    names = {"a.txt", "b.txt", "c.txt"}
    for files in (tmp_path, f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt", [str(tmp_path), f"{tmp_path}/a.txt"]):
        assert found(files) == (names, "3 text files, 1.9 kB")


def test_globs_match_as_in_a_shell(tmp_path):
    write(tmp_path, {name: lines(name) for name in ("a.txt", "ab.txt", "x/a.txt", "x/y/a.txt", "x/y/b.md")})
    for pattern, count in {"?.txt": 1, "[ab]*.txt": 2, "*/a.txt": 1, "**/a.txt": 3, "x/**/*": 3, "*/y": 2}.items():
        assert len(find_files(config(f"{tmp_path}/{pattern}"), "test").files) == count, pattern


@pytest.mark.parametrize("folder", ["data [v1]", "a*b", "what?", "[x]/[y]"])
def test_names_that_look_like_globs_are_names_where_they_exist(tmp_path, folder):
    write(tmp_path, {f"{folder}/in/a.txt": lines("a"), f"{folder}/in/b [1].txt": lines("b")})
    write(tmp_path, {name: lines(name) for name in ("data v/in/no.txt", "aab/in/no.txt", "whata/in/no.txt")})
    for pattern in ("", "/in", "/in/*.txt", "/*/*.txt", "/**/*.txt"):
        assert found(f"{tmp_path}/{folder}{pattern}")[0] == {"a.txt", "b [1].txt"}
    assert found(f"{tmp_path}/{folder}/in/b [1].txt")[0] == {"b [1].txt"}
    assert found(f"{tmp_path}/{folder}/*/b [1].txt")[0] == {"b [1].txt"}


def test_names_in_any_bytes_are_found_and_shown(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"na\xefve.txt", b"two\nlines.txt", b"\xe2\x82\xac.txt"):
        Path(os.fsdecode(folder + b"/" + name)).write_text(lines(name.decode("latin-1")))
    Path(os.fsdecode(folder + b"/zip\xe9.bin")).write_bytes(b"\0")
    names, said = found(tmp_path)
    assert {os.fsencode(name) for name in names} == {b"na\xefve.txt", b"two\nlines.txt", b"\xe2\x82\xac.txt"}
    assert "1 binary (caf\\xe9/zip\\xe9.bin)" in said
    assert len(found(os.fsdecode(folder + b"/*.txt"))[0]) == 3


def test_what_is_shown_prints_on_one_line(tmp_path):
    assert shown(Path("a\nb\x1b[1m.txt")) == "a\\nb\\x1b[1m.txt"
    assert shown(Path("naïve €.txt")) == "naïve €.txt"


def test_every_file_left_out_is_counted_with_its_reason(tmp_path):
    latin = {f"old/latin{number}.txt": "voil\xe0 l'\xe9t\xe9".encode("latin-1") for number in range(5)}
    others = {"empty": b" \n", "zero": b"a\0b", ".hidden": "x", ".git/config": "x", "good.txt~": "x", "#good.txt#": "x"}
    copies = {".ipynb_checkpoints/good.txt": "x", "good.txt.bak": "x", "again/good.txt": lines("good")}
    write(tmp_path, {"good.txt": lines("good"), **latin, **others, **copies})
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    names, said = found(tmp_path)
    assert names == {"good.txt"}
    for part in (
        "1 text file",
        "5 not UTF-8 (old/latin0.txt, old/latin1.txt, old/latin2.txt, ...)",
        "1 empty (empty)",
        "1 binary (zero)",
        "3 hidden (.git, .hidden, .ipynb_checkpoints)",
        "3 backup (#good.txt#, good.txt.bak, good.txt~)",
        "1 broken link (broken)",
        "1 not a regular file (pipe)",
        "1 repeated (good.txt)",
    ):
        assert part in said


def test_a_glob_that_asks_for_hidden_files_or_copies_finds_them(tmp_path):
    write(tmp_path, {"a.txt.bak": lines("a"), ".b": lines("b"), "c": lines("c")})
    assert found(f"{tmp_path}/*.bak")[0] == {"a.txt.bak"}
    assert found(f"{tmp_path}/.*")[0] == {".b"}
    assert found(f"{tmp_path}/*")[0] == {"c"}


def test_unreadable_files_and_folders_are_counted(tmp_path, monkeypatch):
    write(tmp_path, {"good.txt": lines("good"), "secret.txt": lines("x"), "locked/a.txt": lines("a")})
    read, listed = Path.read_bytes, os.listdir

    def refuse(path, name, then):
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied")
        return then(path)

    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path, "secret.txt", read))
    monkeypatch.setattr("os.listdir", lambda path: refuse(path, "locked", listed))
    names, said = found(tmp_path)
    assert names == {"good.txt"}
    assert "1 unreadable (Permission denied) (secret.txt)" in said
    assert "1 unreadable (locked)" in said
    with pytest.raises(MoesaicError, match="unreadable"):
        found(tmp_path / "secret.txt")


def test_links_are_followed_and_loops_end(tmp_path):
    write(tmp_path, {"corpus/a.txt": lines("a"), "elsewhere/b.txt": lines("b")})
    corpus = tmp_path / "corpus"
    (corpus / "more").symlink_to(tmp_path / "elsewhere")
    for name in ("loop", "second"):
        (corpus / name).symlink_to(corpus)
    (tmp_path / "elsewhere" / "back").symlink_to(corpus)
    (corpus / "same.txt").symlink_to(corpus / "a.txt")
    (corpus / "itself").symlink_to(corpus / "itself")
    for files in (corpus, f"{corpus}/**/*.txt", f"{corpus}/**"):
        result = find_files(config(str(files)), "test")
        assert {os.path.realpath(file.path) for file in result.files} == {
            os.path.realpath(corpus / "a.txt"),
            os.path.realpath(corpus / "more" / "b.txt"),
        }
    assert found(corpus)[1] == "2 text files, 1.3 kB; left out: 1 broken link (itself)"


def test_what_the_program_writes_is_no_corpus(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": lines("a"), "run.yaml": "name: x", "mine/search/log.txt": "trials", "cache/x": "cached"})
    write(tmp_path, {"other/.lock": "", "other/env.json": "{}", "other/card.md": "a run"})
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    own = [tmp_path / "run.yaml", tmp_path / "mine"]
    for files in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**/*"):
        names, said = found(files, own)
        assert names == {"a.txt"}
        assert "4 of this program (cache, mine, other, ...)" in said
    assert found([str(tmp_path / "a.txt"), str(tmp_path / "mine/search/log.txt")], own)[0] == {"a.txt", "log.txt"}


def test_the_file_that_the_output_goes_to_is_no_corpus(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": lines("a"), "log": "started\n", "older.log": "started\n"})
    log = os.stat(tmp_path / "log")
    monkeypatch.setattr("os.fstat", lambda descriptor: log)
    names, said = found(tmp_path)
    assert names == {"a.txt", "older.log"}
    assert "1 of this program (log)" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"text\x00with zero", "binary"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not UTF-8"),
    ],
)
def test_unusable_files_named_directly_are_refused(tmp_path, content, words):
    write(tmp_path, {"a.txt": content})
    with pytest.raises(MoesaicError, match=words) as caught:
        found(tmp_path / "a.txt")
    assert "run.yaml:3" in str(caught.value)


@pytest.mark.parametrize("inside", ["corpse.txt", "corpse*.txt", "c[a]rpse/x.txt"])
def test_a_missing_file_says_where_relative_paths_start(tmp_path, inside):
    write(tmp_path, {"corpus.txt": "text"})
    with pytest.raises(MoesaicError, match="no such file") as caught:
        found(tmp_path / inside)
    assert "current folder" in str(caught.value)
    assert inside != "corpse.txt" or caught.value.nearest == "corpus.txt"


def test_a_folder_without_text_says_what_is_in_it(tmp_path):
    write(tmp_path, {"a.bin": b"\0"})
    with pytest.raises(MoesaicError, match=r"(?s)corpus is empty.*1 binary \(a.bin\)"):
        found(tmp_path)


def test_special_files_named_directly_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MoesaicError, match="no file and no folder"):
        found(tmp_path / "pipe")


def test_home_is_known_by_its_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path, {"texts/a.txt": lines("a")})))
    assert found("~/texts")[0] == found("~/texts/*.txt")[0] == {"a.txt"}


def test_absolute_files_find_the_same_text_from_any_folder(tmp_path, monkeypatch):
    write(tmp_path, {f"[v1]/{name}.txt": lines(name) for name in "abc"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"train": ["[v1]/a.txt"], "validation": ["~/*/b.txt"], "test": ["*/c.txt"]}
    for files in ("[v1]/*.txt", "[v1]", ["[v1]/a.txt", "~/*/[bc].txt"], given):
        relative = config(files)
        before = find_files(relative, "test").files
        absolute = absolute_files(relative)
        monkeypatch.chdir("/")
        assert find_files(absolute, "test").files == [
            type(file)(tmp_path / file.path, file.digest, file.size, file.split) for file in before
        ]
        monkeypatch.chdir(tmp_path)


def test_the_standard_library_is_there_without_its_tests():
    paths = {file.path for file in find_files(DataConfig(), "test").files}
    assert {Path(os.__file__), Path(json.decoder.__file__)} <= paths
    assert not any({"test", "tests", "site-packages"}.intersection(path.parts) for path in paths)
