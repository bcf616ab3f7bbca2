"""What the README shows works: every command and its settings, the configuration, every link to a file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

import moesaic
from moesaic.nas.cli import app
from moesaic.nas.config import load_config, load_retrain_file
from tests.nas.command import moesaic as command

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES if line.startswith("moesaic ")]
KNOWN = set(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `moesaic init` writes."""
    path = tmp_path_factory.mktemp("readme") / "my.yaml"
    assert command("init", path).returncode == 0
    return path


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_exists_and_takes_these_settings(words: list[str], written: Path, tmp_path: Path) -> None:
    _, name, *arguments = words
    assert name in KNOWN
    settings = [word for word in arguments if re.match(r"[a-z_.]+=", word)]
    if "my.yaml" in arguments:
        load_config(written, settings)
    elif settings:
        (tmp_path / "retrain.yaml").write_text("name: x\ndata: {}\n")
        load_retrain_file(tmp_path / "retrain.yaml", settings)


def test_there_are_commands() -> None:
    assert {words[1] for words in COMMANDS} >= {"init", "plan", "run", "cost", "retrain", "doctor"}


def test_the_configuration_it_shows_is_read(tmp_path: Path) -> None:
    (heart,) = (block for kind, block in BLOCKS if kind == "yaml")
    (tmp_path / "my.yaml").write_text(heart)
    loaded = load_config(tmp_path / "my.yaml")
    assert set(loaded.config.budget) == {"flops", "latency", "parameters", "memory"}
    assert [group.experts for group in loaded.space.decoder.layers[0].groups] == [1]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", TEXT))))
def test_a_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_names_it_mentions_are_public() -> None:
    names = set(re.findall(r"`moesaic\.(\w+)\(", TEXT))
    assert names and names <= set(moesaic.__all__)
