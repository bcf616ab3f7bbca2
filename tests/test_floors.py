"""Imports only go down: kernels and search_spaces know no other floor, the supernet knows both, nas knows all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"kernels", "search_spaces", "supernet", "nas"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "search_spaces": {"search_spaces"},
    "supernet": {"supernet", "kernels", "search_spaces"},
    "nas": FLOORS,
}
LIBRARIES = {
    "kernels": {"torch", "triton"},
    "search_spaces": {"numpy", "yaml", "pydantic"},
    "supernet": {"torch", "numpy", "safetensors"},
}


def imports(tree: ast.AST) -> set[str]:
    """Top-level packages that a module imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            found.add(str(node.module).split(".")[0])
    return found


def modules() -> list[tuple[str, Path]]:
    return [(floor, path) for floor in sorted(FLOORS) for path in sorted((ROOT / floor).rglob("*.py"))]


def test_imports_are_found_wherever_they_stand() -> None:
    text = "import os.path as p, json\ndef f():\n    from torch.nn import functional\n    import nas.cli\n"
    assert imports(ast.parse(text)) == {"os", "json", "torch", "nas"}
    assert {floor for floor, _ in modules()} == FLOORS


@pytest.mark.parametrize(("floor", "path"), [pytest.param(*m, id=str(m[1].relative_to(ROOT))) for m in modules()])
def test_imports_only_go_down(floor: str, path: Path) -> None:
    found = imports(ast.parse(path.read_text(encoding="utf-8")))
    assert found & FLOORS <= MAY_IMPORT[floor]
    if floor in LIBRARIES:
        assert found - FLOORS - set(sys.stdlib_module_names) <= LIBRARIES[floor]


@pytest.mark.parametrize(
    ("package", "absent"),
    [("search_spaces", ["torch", "kernels", "supernet", "nas"]), ("kernels", ["search_spaces", "supernet", "nas"]),
     ("supernet", ["nas", "tensorboard"])],
)  # fmt: skip
def test_importing_a_floor_loads_no_other(package: str, absent: list[str]) -> None:
    code = f"import sys, {package}; print([name for name in {absent} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
