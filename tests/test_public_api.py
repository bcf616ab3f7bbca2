"""The public interface: its three lists agree, every name is there, nothing heavy loads early, and it is enough."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import moesaic
from moesaic import kernels, search_spaces, supernet

ROOT = Path(__file__).parent.parent
TREE = ast.parse((ROOT / "moesaic" / "__init__.py").read_text(encoding="utf-8"))
PUBLIC = {
    "moesaic": sorted(moesaic.__all__),
    "moesaic.search_spaces": sorted(search_spaces.__all__),
    "moesaic.supernet": sorted(supernet.__all__),
    "moesaic.kernels": sorted(kernels.__all__),
}


def test_the_lists_agree() -> None:
    block = next(node for node in TREE.body if isinstance(node, ast.If))  # of TYPE_CHECKING
    typed = {
        (f"{node.module}", alias.name)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(f"moesaic.{module}", name) for module, names in moesaic._WHERE.items() for name in names}
    assert sorted(moesaic.__all__) == sorted(moesaic._MODULES)
    assert dir(moesaic) == sorted(moesaic.__all__)


@pytest.mark.parametrize("name", moesaic.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(moesaic, name) is not None


def test_what_is_not_there_is_said_as_python_says_it() -> None:
    with pytest.raises(AttributeError, match="module 'moesaic' has no attribute 'nonsense'"):
        moesaic.nonsense  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, moesaic; print([name for name in ('torch', 'pydantic', 'optuna') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, and the public methods of public classes, with their constructors."""
    for module, names in PUBLIC.items():
        for name in names:
            value = getattr(import_module(module), name)
            methods = vars(value).items() if inspect.isclass(value) else [("", value)]
            for method, found in methods:
                function = getattr(found, "__func__", found)
                if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                    yield f"{name}.{method}".strip("."), function


@pytest.mark.parametrize(("name", "function"), list(public_functions()))
def test_a_path_may_be_a_str(name: str, function: Callable[..., Any]) -> None:
    if name == "Run.__init__":
        return  # written by its dataclass; it converts its path, see below
    given = {parameter: kind for parameter, kind in inspect.get_annotations(function).items() if parameter != "return"}
    assert [parameter for parameter, kind in given.items() if str(kind).split(" | ")[0] == "Path"] == []


def test_files_are_read_and_written_by_a_str(tmp_path: Path) -> None:
    values = str(tmp_path / "new" / "values.json")
    moesaic.write_value(values, [1, 2], list[int])
    assert moesaic.read_value(values, list[int]) == [1, 2]
    log = moesaic.TrialLog(str(tmp_path / "trials.jsonl"))
    log.close()
    assert moesaic.read_trials(str(log.path)) == []
    (tmp_path / "run.yaml").write_text("name: x\nbudget: {flops: 50%}\n")
    loaded = moesaic.load_config(str(tmp_path / "run.yaml"))
    assert moesaic.Run(loaded, str(tmp_path / "run")).path == tmp_path / "run"  # pyright: ignore[reportArgumentType]


INSIDE = {"kernels", "choosers.py", "merging.py", "routers.py"}
"""Experiments that compare what is inside: kernels, routers of layers, merged experts."""
SCRIPTS = [path for path in sorted((ROOT / "experiments").rglob("*.py")) if not INSIDE & {*path.parts}]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_use_public_names_alone(path: Path) -> None:
    """But for those that compare what is inside."""
    used = {
        (str(node.module), alias.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "moesaic"
        for alias in node.names
    }
    assert {(module, name) for module, name in used if name not in PUBLIC.get(module, set())} == set()
