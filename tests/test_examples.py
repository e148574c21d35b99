"""Every example runs in its short form, offline, and writes only where it is told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    "auto_guide.py",
    "beta_vae.py",
    "categorical.py",
    "compare.py",
    "conditional.py",
    "disentangle.py",
    "experts.py",
    "from_pca_to_vae.py",
    "hierarchical.py",
    "iwae.py",
    "latent_arithmetic.py",
    "mnist_image_label.py",
    "mnist_svhn.py",
    "multimodal_digits.py",
    "priors.py",
    "semi_supervised.py",
    "textbook.py",
    "textbook_bounds.py",
    "textbook_posteriors.py",
    "vae_mnist.py",
    "vq_vae.py",
]


def files_of_the_checkout() -> set[Path]:
    """All but the hidden folders, such as the environment, and what Python caches."""
    visible = [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    paths = {path for top in visible for path in (top, *top.rglob("*"))}
    return {path for path in paths if "__pycache__" not in path.parts}


def test_every_example_is_listed() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    before = files_of_the_checkout()
    command = [sys.executable, ROOT / "examples" / name, "--smoke-test", "--out", tmp_path / "out"]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    assert files_of_the_checkout() == before
