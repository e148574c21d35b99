"""What the pictures of the textbook examples claim, as numbers."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from pyro_vae.evaluation import importance_weighted_log_likelihood
from pyro_vae.evaluation.quadrature import quadrature, quadrature_elbo

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_claims(picture: Any) -> None:
    for row in picture.claims:
        assert math.isfinite(row["within"]), row
        assert abs(row["value"] - row["exact"]) <= row["within"], row


def num_modes(log_density: torch.Tensor) -> list[int]:
    """Local maxima that are no lower than a hundredth of the highest point, for each column."""
    inner = log_density[1:-1]
    is_peak = (inner > log_density[:-2]) & (inner > log_density[2:])
    return (is_peak & (inner > inner.amax(0) + math.log(0.01))).sum(0).tolist()


def test_figure_1_slices_add_up_to_the_marginal() -> None:
    picture = example("textbook").slices()
    assert_claims(picture)
    heights = [float(part.max()) for part in picture.joint]
    assert heights[0] == pytest.approx(0.3 / (0.6 * math.sqrt(2 * math.pi)), rel=1e-6)
    assert max(heights) < float(picture.p.max())


def test_figures_2_and_3_the_marginal_over_the_plane() -> None:
    textbook = example("textbook")
    picture = textbook.plane(resolution=41, num_samples=500)
    assert_claims(picture)
    assert picture.data.shape == (500, 2)
    assert torch.allclose(picture.p, picture.p.flip(0), rtol=1e-6)  # As the curve is symmetric.


def test_figure_4_jensen() -> None:
    picture = example("textbook_bounds").jensen()
    assert_claims(picture)
    assert picture.gap > 0.5


def test_figure_5_bounds_touch_where_q_is_exact() -> None:
    picture = example("textbook_bounds").touching()
    assert_claims(picture)
    gaps = picture.exact - picture.bounds
    for i in range(3):  # It touches there and nowhere else, and EM descends on the noise.
        near = (picture.noises - picture.path[i]).abs()
        assert float(gaps[i][near.argmin()]) < 0.1
        assert float(gaps[i][near > 0.05].min()) > 0.01
        assert picture.path[i + 1] < picture.path[i]
    assert float(picture.loss) > 1  # Of normal guides.


def test_figure_6_em_is_coordinate_ascent() -> None:
    picture = example("textbook_bounds").climbing(60)
    assert_claims(picture)
    stairs = torch.stack([picture.e, picture.m], 1).flatten()
    assert float(stairs.diff().min()) > -1e-12
    assert float(stairs[-1] - stairs[0]) > 0.5
    assert float((picture.exact - picture.m)[:5].min()) > 1e-5  # The E step has something to do.


def test_figure_7_true_posteriors() -> None:
    textbook = example("textbook_posteriors")
    x = torch.tensor(list(textbook.DATA.values()))
    posterior = quadrature(textbook.nonlinear_model(), x, grid=torch.linspace(-3, 3, 6001))
    assert num_modes(posterior.log_density) == [1, 2, 2]
    low = posterior.log_density[2900:3100].amin(0) - posterior.log_density.amax(0)
    assert float(low[1]) < -20  # Far apart.
    assert float(low[2]) > -3  # They touch.


def test_figure_7_guides() -> None:
    textbook = example("textbook_posteriors")
    model, x = textbook.nonlinear_model(), torch.tensor(list(textbook.DATA.values()))
    best, kl = textbook.best_normal(x), {}
    assert float(best[0]) < 0.01
    assert float(best[1]) == pytest.approx(math.log(2), abs=0.002)
    assert 0.4 < float(best[2]) < math.log(2)
    for name in ("normal", "mixture"):
        pyro.set_rng_seed(0)
        textbook.train(getattr(textbook, name), x, 200)
        kl[name] = quadrature_elbo(model, getattr(textbook, name), x, tolerance=1e-3).kl
    assert (kl["normal"] > best - 1e-3).all()
    assert float(kl["normal"][0]) < 0.2
    assert float(kl["mixture"][1]) < 0.4 < 0.6 < float(kl["normal"][1])
    assert float(kl["mixture"][2]) < 0.2 < 0.4 < float(kl["normal"][2])
    # Importance sampling from the mixture, which has both modes, knows the same marginal.
    estimate = importance_weighted_log_likelihood(model, textbook.mixture, x, num_particles=4000)
    exact = quadrature(model, x).log_likelihood
    assert ((estimate.log_likelihood - exact).abs() < 5 * estimate.standard_error).all()
