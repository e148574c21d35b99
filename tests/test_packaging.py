"""What is built and installed is the source, once, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import pyro_vae

ROOT = Path(__file__).parent.parent
PACKAGES = {"pyro_vae": "pyro_vae", "models": "pyro_vae/models", "guides": "pyro_vae/guides"}


@pytest.fixture(scope="module", params=["wheel", "sdist, then wheel"])
def wheel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> zipfile.ZipFile:
    """Builds from a copy, because a build leaves files behind."""
    source = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "examples", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source]
    if request.param == "wheel":
        command.insert(-1, "--wheel")
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_module_once_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = ["pyro_vae/py.typed"]
    for folder, package in PACKAGES.items():
        modules = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
        assert modules, f"no module in {folder}/"
        expected += [f"{package}/{module.as_posix()}" for module in modules]
    info = f"pyro_vae-{pyro_vae.__version__}.dist-info"
    expected += [f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")]
    expected += [f"{info}/licenses/LICENSE"]
    assert sorted(wheel.namelist()) == sorted(expected)


def test_the_wheel_states_the_version_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = HeaderParser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == pyro_vae.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize("name", ["models", "guides"])
def test_the_links_lead_to_the_folders_beside_the_package(name: str) -> None:
    link = ROOT / "pyro_vae" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


@pytest.mark.parametrize("name", ["models", "guides"])
def test_no_module_is_imported_twice(name: str) -> None:
    """A twin of a class, under another name, would fail ``isinstance`` and register twice."""
    folder = (ROOT / name).resolve()
    twins = [
        module
        for module, loaded in sys.modules.items()
        if folder in Path(getattr(loaded, "__file__", None) or "/").resolve().parents
        and not module.startswith(f"pyro_vae.{name}")
    ]
    assert not twins
