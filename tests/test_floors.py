"""Imports only go down: between the four packages, and between the rooms of nas. No two modules import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "search_spaces", "supernet", "nas")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "search_spaces": {"search_spaces"},
    "supernet": {"supernet", "kernels", "search_spaces"},
    "nas": set(FLOORS),
}
LIBRARIES = {
    "kernels": {"torch", "triton"},
    "search_spaces": {"numpy", "yaml", "pydantic"},
    "supernet": {"torch", "numpy", "scipy", "safetensors", "sacrebleu"},
}
ROOMS = (
    ("__init__", "units", "context"),
    ("config",),
    ("device",),
    ("terminal",),
    ("data",),
    ("tasks",),
    ("costs",),
    ("executors",),
    ("search",),
    ("training",),
    ("trust",),
    ("exports",),
    ("report",),
    ("stages",),
    ("pipeline",),
    ("plan", "doctor", "inspect"),
    ("api",),
    ("cli",),
)
"""The rooms of nas, the lowest first; a module of nas' top level is a room of its own."""


def name_of(path: Path) -> str:
    """``moesaic.nas.config`` of ``nas/config.py``."""
    parts = ("moesaic", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))}


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules that a module imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


IMPORTS = {name: imports(ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}


def floor_of(module: str) -> str | None:
    return module.split(".")[1] if module.startswith("moesaic.") else None


def room_of(module: str) -> int | None:
    """Height of a module's room in nas."""
    if floor_of(module) != "nas":
        return None
    room = [*module.split("."), "__init__"][2]
    return next(height for height, names in enumerate(ROOMS) if room in names)


def test_imports_are_found_wherever_they_stand() -> None:
    text = "import os.path as p, json\ndef f():\n    from torch.nn import functional\n    from moesaic.nas import cli\n"
    assert imports(ast.parse(text)) == {"os.path", "json", "torch.nn", "moesaic.nas.cli"}
    assert {floor_of(name) for name in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    floor = floor_of(module)
    assert floor is not None
    found = IMPORTS[module]
    assert {floor_of(name) for name in found} - {None} <= MAY_IMPORT[floor]
    assert not {name.split(".")[0] for name in found} & set(FLOORS), "the packages are imported as parts of moesaic"
    if floor in LIBRARIES:
        top = {name.split(".")[0] for name in found} - {"moesaic"}
        assert top - set(sys.stdlib_module_names) <= LIBRARIES[floor]


@pytest.mark.parametrize("module", [name for name in MODULES if floor_of(name) == "nas"])
def test_imports_inside_nas_only_go_down(module: str) -> None:
    here = room_of(module)
    assert here is not None
    upward = [name for name in IMPORTS[module] if (there := room_of(name)) is not None and there > here]
    assert upward == []


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes on a way back to themselves; empty where there is none."""

    def walk(node: str, way: list[str]) -> Iterator[list[str]]:
        if node in way:
            yield way[way.index(node) :]
        elif node not in done:
            for after in sorted(graph.get(node, set())):
                yield from walk(after, [*way, node])
            done.add(node)

    done: set[str] = set()
    return next((found for start in sorted(graph) for found in walk(start, [])), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_two_modules_import_each_other() -> None:
    assert circle({name: found & set(MODULES) for name, found in IMPORTS.items()}) == []


@pytest.mark.parametrize(
    ("package", "absent"),
    [("search_spaces", ["torch", "kernels", "supernet", "nas"]), ("kernels", ["search_spaces", "supernet", "nas"]),
     ("supernet", ["nas", "tensorboard"])],
)  # fmt: skip
def test_importing_a_floor_loads_no_other(package: str, absent: list[str]) -> None:
    names = [f"moesaic.{name}" if name in FLOORS else name for name in absent]
    code = f"import sys, moesaic.{package}; print([name for name in {names} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
