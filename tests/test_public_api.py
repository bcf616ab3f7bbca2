"""The public interface: its lists agree, loading it costs nothing, and the experiments need no more than it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesaic

ROOT = Path(__file__).parent.parent
PACKAGES = ("moesaic", "moesaic.search_spaces", "moesaic.supernet", "moesaic.kernels")
# Those of experiments/kernels compile and time what is behind the interface.
SCRIPTS = [path for path in sorted((ROOT / "experiments").rglob("*.py")) if "kernels" not in path.parts]


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a module imports from this project."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_three_lists_of_names_agree() -> None:
    typed = {(module, name) for module, name in imported(parsed(ROOT / "moesaic/__init__.py")) if "moesaic." in module}
    lazy = {(f"moesaic.{module}", name) for module, names in moesaic._WHERE.items() for name in names}
    assert typed == lazy
    names = [name for _, name in lazy]
    assert sorted(names) == sorted(moesaic.__all__) == dir(moesaic)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", moesaic.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(moesaic, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = moesaic.nothing_of_that_name


def test_importing_moesaic_loads_no_library() -> None:
    code = "import sys, moesaic; print([name for name in ('torch', 'pydantic', 'numpy') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_import_public_names_alone(path: Path) -> None:
    public = {(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__}
    ours = {pair for pair in imported(parsed(path)) if pair[0].partition(".")[0] == "moesaic"}
    assert ours - public == set()
