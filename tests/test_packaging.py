"""What is installed: every package and its data, under the project's own name alone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_folder_with_modules_is_a_listed_package() -> None:
    """The list is explicit, since folders are installed under another name than they have."""
    floors = ("kernels", "search_spaces", "supernet", "nas")
    found = {path.parent for floor in floors for path in (ROOT / floor).rglob("*.py")}
    names = {"moesaic", *(".".join(("moesaic", *folder.relative_to(ROOT).parts)) for folder in found)}
    assert set(SETUPTOOLS["packages"]) == names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if not name.startswith(("tests/", "experiments/", "docs/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder)]
    subprocess.run([*build, str(source)], capture_output=True, check=True)
    (found,) = folder.glob("moesaic-*.whl")
    return found


def test_the_wheel_has_one_package_and_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"moesaic"}
    data = ("py.typed", "search_spaces/presets/tiny.yaml", "nas/templates/config.yaml", "nas/report/style.css")
    assert {f"moesaic/{name}" for name in data} <= set(names)


def test_it_lives_beside_another_package_called_kernels(wheel: Path, tmp_path: Path) -> None:
    """Hugging Face's ``kernels``, which transformers imports, must stay what ``import kernels`` finds."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("owner = 'somebody else'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import kernels, moesaic.kernels, moesaic.nas, moesaic.search_spaces, moesaic.supernet\n"
        f"assert kernels.owner == 'somebody else' and moesaic.kernels.__file__.startswith({str(site)!r})\n"
        "print(len(moesaic.search_spaces.preset_names()))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 4
