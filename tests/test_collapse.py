"""Posterior collapse of the linear VAE, where it is known which dimensions collapse."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae.evaluation import PosteriorCollapse, active_units, posterior_collapse
from pyro_vae.guides import ExactLinearGaussian
from pyro_vae.handlers import scale_kl
from pyro_vae.models import LinearGaussian

Program = Callable[..., Any]
WHERE = "posterior_collapse: "
EIGENVALUES = torch.tensor([5.0, 2.0, 1.05, 0.5], dtype=torch.float64)


def data() -> torch.Tensor:
    """Eight rows whose second moments are exactly diag(EIGENVALUES)."""
    signs = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(3):
        signs = torch.cat([torch.cat([signs, signs]), torch.cat([signs, -signs])], 1)
    return signs[:, 1:5] * EIGENVALUES.sqrt()


def linear_vae(noise_variance: float) -> tuple[Program, Program]:
    """Its maximum-likelihood weights, (L - s2)^(1/2) or 0, and its exact posterior."""
    weight = (EIGENVALUES - noise_variance).clamp(min=0).sqrt()
    variance = noise_variance / (weight.square() + noise_variance)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * weight, noise_variance**0.5).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = x * weight * variance / noise_variance
            pyro.sample("z", dist.Normal(loc, variance.sqrt()).to_event(1))

    return model, guide


@pytest.mark.parametrize("noise_variance", [0.3, 1.0, 1.9, 4.0, 6.0])
def test_a_dimension_collapses_below_the_noise(noise_variance: float) -> None:
    report = posterior_collapse(*linear_vae(noise_variance), data(), num_particles=2)
    use = report.sites["z"]
    expected = (EIGENVALUES / noise_variance).clamp(min=1).log() / 2  # of each datum, even
    assert use.kl_per_dimension is not None
    torch.testing.assert_close(use.kl_per_dimension, expected)
    assert use.kl == pytest.approx(float(expected.sum()))
    collapsed = noise_variance > EIGENVALUES
    assert use.collapsed.equal(collapsed)
    assert use.share_below.equal(collapsed.double())
    assert use.collapsed_fraction == float(collapsed.double().mean())
    assert use.num_dimensions == 4
    assert use.active_units is not None
    assert use.active_units.active.equal(~collapsed)
    words = {0: "in use", 4: "collapsed"}.get(int(collapsed.sum()), "partly collapsed")
    assert use.verdict == words
    assert report.num_data == 8


def test_epsilon_is_a_kl_in_nats() -> None:
    pair = linear_vae(1.0)  # The third dimension has a KL of log(1.05) / 2 = 0.0244.
    for epsilon, third in ((0.024, False), (0.025, True)):
        use = posterior_collapse(*pair, data(), epsilon=epsilon).sites["z"]
        assert use.collapsed.tolist() == [False, False, third, True]


def shifted(model_scale: float = 1.0) -> tuple[Program, Program]:
    """KL(N(x, 1) || N(0, 1)) = x^2 / 2."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, model_scale))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    return model, guide


@pytest.mark.parametrize(
    ("delta", "collapsed"), [(0.0, False), (0.28, False), (0.29, True), (0.5, True)]
)
def test_delta_is_a_share_of_the_data(delta: float, collapsed: bool) -> None:
    x = (torch.arange(100) < 29).double()
    use = posterior_collapse(*shifted(), x, delta=delta, epsilon=0.5 - 1e-6).sites["z"]
    assert float(use.share_below) == pytest.approx(0.71)
    assert bool(use.collapsed) is collapsed
    assert use.verdict == ("collapsed" if collapsed else "in use")
    assert use.kl == pytest.approx(0.29 / 2)
    assert use.num_dimensions == 1


def test_threshold_is_that_of_active_units() -> None:
    x = 0.2 * torch.tensor([1.0, -1.0])
    for threshold in (0.01, 0.05):
        report = posterior_collapse(*shifted(), x, threshold=threshold)
        units = report.sites["z"].active_units
        assert units is not None
        expected = active_units(shifted()[1], x, threshold=threshold)
        assert (units.count, units.threshold) == (expected.count, threshold)
        assert units.variances.equal(expected.variances)
        assert report.threshold == threshold


def test_scales_do_not_count() -> None:
    pair = linear_vae(1.0)
    scaled = scale_kl(pair[0], 4.0), scale_kl(pair[1], 4.0)
    assert str(posterior_collapse(*scaled, data())) == str(posterior_collapse(*pair, data()))


def test_a_constant_posterior_beside_the_prior_is_not_in_use() -> None:
    """It has a KL, but says nothing of the data."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x: torch.Tensor, used: bool) -> None:
        loc = torch.stack([x * used + 2, torch.ones_like(x)], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = torch.tensor([1.0, -1.0])
    for used, verdict in ((True, "partly collapsed"), (False, "collapsed")):
        use = posterior_collapse(model, lambda x, used=used: guide(x, used), x).sites["z"]
        assert use.collapsed.tolist() == [False, False]
        assert use.verdict == verdict


# Sites that do not factorise.


@pytest.mark.parametrize(
    ("columns", "verdict"),
    [((1, 1), "in use"), ((1, 0), "partly collapsed"), ((0, 0), "collapsed")],
)
def test_a_full_covariance_is_judged_as_a_whole(columns: tuple[int, int], verdict: str) -> None:
    linear = LinearGaussian(data_dim=4, latent_dim=2)
    with torch.no_grad():
        linear.weight.copy_(data()[:4, :2] * torch.tensor(columns))
    report = posterior_collapse(linear, ExactLinearGaussian(linear), data(), num_particles=500)
    use = report.sites["z"]
    assert use.kl_per_dimension is None
    assert use.collapsed.shape == ()
    assert use.num_dimensions == 2
    assert use.verdict == verdict
    posterior = linear.posterior(data())
    standard = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    exact = torch.distributions.kl_divergence(posterior, standard).mean().item()
    assert use.kl == pytest.approx(exact, abs=0.2)
    assert str(report).splitlines()[1].split()[2:4] == ["2", "-"]


def test_discrete_latents() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)

    def program(x: torch.Tensor, of_guide: bool) -> None:
        with pyro.plate("data", 2):
            fn = dist.Categorical(logits=logits if of_guide else torch.zeros(3))
            pyro.sample("y", fn)
            if not of_guide:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    pair = (lambda x: program(x, False)), (lambda x: program(x, True))
    use = posterior_collapse(*pair, torch.zeros(2)).sites["y"]
    q = logits[0].softmax(0)
    assert use.kl == pytest.approx(float((q * (3 * q).log()).sum()) / 2)
    assert float(use.share_below) == 0.5
    assert use.active_units is None
    assert use.verdict == "in use"


# Programs with several latents, plates and masks.


def hierarchy(of_guide: bool) -> Program:
    """A used code z, an unused v for each of three parts, and t, which follows from z."""

    def program(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc = x[:, None].expand(-1, 2) if of_guide else torch.zeros(2)
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("t", dist.Delta(z, event_dim=1))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("v", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            if not of_guide:
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    return program


def test_several_sites_and_plates() -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    report = posterior_collapse(hierarchy(False), hierarchy(True), x, num_particles=3, chunk_size=2)
    assert list(report.sites) == ["z", "v"]
    z, v = report.sites.values()
    assert z.kl == pytest.approx(float(x.square().mean()))
    assert z.kl_per_dimension is not None
    torch.testing.assert_close(z.kl_per_dimension, x.square().mean().expand(2) / 2)
    assert (z.verdict, v.verdict) == ("in use", "collapsed")
    assert v.collapsed.shape == (3, 4)
    assert v.num_dimensions == 12
    assert v.active_units is None


def test_rows_and_parts_that_a_mask_leaves_out_are_no_data() -> None:
    x = torch.tensor([1.0, -2.0, 3.0, 0.0])
    seen = torch.tensor([True, True, False, False])
    programs = [poutine.mask(program, mask=seen) for program in shifted()]
    report = posterior_collapse(*programs, x, epsilon=1.0)
    use = report.sites["z"]
    assert report.num_data == 2
    assert use.kl == pytest.approx((1 / 2 + 4 / 2) / 2)
    assert float(use.share_below) == 0.5
    none = [poutine.mask(program, mask=torch.tensor(False)) for program in shifted()]
    with pytest.raises(ValueError, match=f"{WHERE}expected at least one row of data at site 'z'"):
        posterior_collapse(*none, x)


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_parts_that_some_data_lack(data_dim: int) -> None:
    seen = torch.tensor([[True, True], [True, False], [True, True]])  # parts, data
    x = torch.tensor([1.0, 2.0])
    if data_dim == -2:
        seen, x = seen.T, x[:, None]

    def program(x: torch.Tensor, of_guide: bool) -> None:
        with pyro.plate("data", 2, dim=data_dim):
            with pyro.plate("parts", 3, dim=-3 - data_dim), poutine.mask(mask=seen):
                pyro.sample("z", dist.Normal(x if of_guide else 0.0, 1.0))
            if not of_guide:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    pair = (lambda x: program(x, False)), (lambda x: program(x, True))
    report = posterior_collapse(*pair, x, epsilon=1.0)
    use = report.sites["z"]
    assert report.num_data == 2
    assert use.kl_per_dimension is not None
    torch.testing.assert_close(use.kl_per_dimension, torch.tensor([1.25, 0.5, 1.25]))
    assert use.share_below.tolist() == [0.5, 1.0, 0.5]
    assert use.kl == pytest.approx((1.5 + 4) / 2)


# The report.


def test_the_table() -> None:
    report = posterior_collapse(*linear_vae(1.0), data())
    kl = float(EIGENVALUES[:3].log().sum()) / 2
    assert str(report).splitlines() == [
        "site  KL (nats)  dimensions  collapsed  active  verdict",
        f"z         {kl:.3f}           4          1       3  partly collapsed",
        "collapsed: KL below 0.01 nats for at least 0.99 of the 8 data",
        "active: variance of the mean over the data above 0.01",
    ]
    assert isinstance(report, PosteriorCollapse)
    assert (report.epsilon, report.delta) == (0.01, 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, "posterior_collapse: expected a finite epsilon > 0, got 0.0"),
        ({"epsilon": math.inf}, "posterior_collapse: expected a finite epsilon > 0, got inf"),
        ({"delta": 1.0}, "posterior_collapse: expected 0 <= delta < 1, got 1.0"),
        ({"delta": -0.1}, "posterior_collapse: expected 0 <= delta < 1, got -0.1"),
        ({"num_particles": 0}, "posterior_collapse: expected num_particles >= 1, got 0"),
        ({"threshold": -1.0}, "active_units: expected a finite threshold >= 0, got -1.0"),
    ],
)
def test_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior_collapse(*shifted(), torch.tensor([1.0, 2.0]), **settings)


def test_auxiliary_sites() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))

    with pytest.raises(ValueError, match=rf"{WHERE}expected a guide of .* \['z'\] alone, got 'u'"):
        posterior_collapse(shifted()[0], guide, torch.tensor([1.0, 2.0]))


def test_kls_that_are_not_numbers() -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, torch.inf))

    message = f"{WHERE}expected KLs at site 'z', got NaN for 2 of 2"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        posterior_collapse(shifted(math.inf)[0], guide, torch.tensor([1.0, 2.0]))


def test_an_element_that_a_mask_hides_everywhere() -> None:
    """It holds nothing, and so leaves the verdict of what can be seen."""
    seen = torch.tensor([[True], [True], [False]])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("part", 3, dim=-2), poutine.mask(mask=seen):
                pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with (
            pyro.plate("data", len(x), dim=-1),
            pyro.plate("part", 3, dim=-2),
            poutine.mask(mask=seen),
        ):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    use = posterior_collapse(model, guide, torch.randn(6), num_particles=2).sites["z"]
    assert use.share_below.tolist() == [1.0, 1.0, 1.0]
    assert use.verdict == "collapsed"
