"""Export to ArviZ, on whichever ArviZ the interpreter has."""

import math
import warnings

import arviz
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_vae import inference_data
from pyro_vae.guides import ExactGaussianMixture, ExactLinearGaussian
from pyro_vae.inference_data import to_inference_data
from pyro_vae.models import GaussianMixture, LinearGaussian

GROUPS = {
    "posterior",
    "prior",
    "posterior_predictive",
    "prior_predictive",
    "log_likelihood",
    "observed_data",
}
BATCH = 6


def draws(data, group, name):
    """The draws of a variable as a tensor ``(draw, ...)``; there is one chain."""
    values = torch.as_tensor(np.array(data[group][name].values))
    assert values.shape[0] == 1
    return values[0]


def assert_mean(samples, expected):
    """The mean over draws, within five standard errors."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - expected).abs() < 5 * error).all()


def assert_variance(samples, expected):
    assert_mean((samples - samples.mean(0)) ** 2, expected)


@pytest.fixture(scope="module")
def linear_gaussian():
    """A model, its batch and its draws under the exact posterior."""
    model = LinearGaussian(data_dim=4, latent_dim=2)
    x = torch.randn(BATCH, 4)
    data = to_inference_data(model, ExactLinearGaussian(model), x, num_samples=3000)
    return model, x, data


def groups_of(data):
    names = data.groups() if callable(data.groups) else data.groups
    return {str(name).strip("/") for name in names} - {""}


def model_of_many(x, y):
    """Two plates around the data, an inner plate, two latents, two observed sites, a factor."""
    rows = pyro.plate("rows", 3, dim=-1)
    columns = pyro.plate("columns", 2, dim=-2)
    pixels = pyro.plate("pixels", 5, dim=-3)
    with rows, columns:
        a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pixels:
            b = pyro.sample("b", dist.Normal(a.sum(-1), 1.0))
            pyro.sample("u", dist.Normal(b, 2.0), obs=x)
        pyro.sample("v", dist.Normal(a[..., :2], 1.0).to_event(1), obs=y)
        pyro.factor("f", a.mean(-1))


def guide_of_many(x, y):
    with pyro.plate("lines", 3, dim=-1), pyro.plate("posts", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(y.mean() * torch.ones(4), 0.5).to_event(1))
        with pyro.plate("dots", 5, dim=-3):
            pyro.sample("b", dist.Normal(a.sum(-1) / 2 + x / 2, 0.5))


class TestAgainstExactAnswers:
    def test_posterior_moments(self, linear_gaussian):
        model, x, data = linear_gaussian
        exact = model.posterior(x)
        z = draws(data, "posterior", "z")
        assert_mean(z, exact.mean)
        assert_variance(z, exact.variance)

    def test_prior_moments(self, linear_gaussian):
        model, _, data = linear_gaussian
        z, x = draws(data, "prior", "z"), draws(data, "prior_predictive", "x")
        assert_mean(z, 0.0)
        assert_variance(z, 1.0)
        assert_mean(x, model.loc)
        assert_variance(x, (model.weight**2).sum(1) + model.noise_variance)

    def test_posterior_predictive_belongs_to_the_posterior_draws(self, linear_gaussian):
        model, _, data = linear_gaussian
        z, x = draws(data, "posterior", "z"), draws(data, "posterior_predictive", "x")
        noise = x - z @ model.weight.T - model.loc
        assert_mean(noise, 0.0)
        assert_variance(noise, model.noise_variance)

    def test_prior_predictive_belongs_to_the_prior_draws(self, linear_gaussian):
        model, _, data = linear_gaussian
        z, x = draws(data, "prior", "z"), draws(data, "prior_predictive", "x")
        assert_variance(x - z @ model.weight.T - model.loc, model.noise_variance)

    def test_log_likelihood_is_that_of_the_posterior_draws(self, linear_gaussian):
        model, x, data = linear_gaussian
        loc = draws(data, "posterior", "z") @ model.weight.T + model.loc
        direct = dist.Normal(loc, model.noise_variance.sqrt()).log_prob(x).sum(-1)
        log_likelihood = draws(data, "log_likelihood", "x")
        torch.testing.assert_close(log_likelihood, direct, rtol=0, atol=1e-12)

    def test_every_draw_obeys_bayes_rule(self, linear_gaussian):
        """Every draw has log p(x | z) + log p(z) - log p(z | x) = log p(x)."""
        model, x, data = linear_gaussian
        z = draws(data, "posterior", "z")
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        log_weights = prior.log_prob(z) - model.posterior(x).log_prob(z)
        log_marginal = draws(data, "log_likelihood", "x") + log_weights
        torch.testing.assert_close(log_marginal, model.log_prob(x).expand(3000, -1))

    def test_harmonic_mean_of_the_likelihood(self):
        """The mean of 1 / p(x | z) over the posterior is 1 / p(x)."""
        model = LinearGaussian(data_dim=2, latent_dim=1)
        with torch.no_grad():
            model.log_scale.fill_(math.log(3.0))  # Little information: light weights.
        x = torch.randn(BATCH, 2)
        data = to_inference_data(model, ExactLinearGaussian(model), x, num_samples=3000)
        inverse = (-draws(data, "log_likelihood", "x")).exp()
        assert_mean(inverse, (-model.log_prob(x)).exp())

    def test_observed_data(self, linear_gaussian):
        _, x, data = linear_gaussian
        np.testing.assert_array_equal(data["observed_data"]["x"].values, x.numpy())

    def test_sampled_discrete_latent(self):
        model = GaussianMixture(data_dim=2, num_components=3)
        x = torch.randn(BATCH, 2)
        data = to_inference_data(model, ExactGaussianMixture(model), x, num_samples=2000)
        z = draws(data, "posterior", "z")
        assert_mean((z == 1).double(), model.posterior(x).probs[:, 1])
        assert_mean((draws(data, "prior", "z") == 1).double(), model.weights[1])


class TestNames:
    def test_groups(self, linear_gaussian):
        assert groups_of(linear_gaussian[2]) == GROUPS

    def test_dimensions(self, linear_gaussian):
        data = linear_gaussian[2]
        latent = {"chain": 1, "draw": 3000, "data": BATCH, "z_dim_0": 2}
        observed = {"chain": 1, "draw": 3000, "data": BATCH, "x_dim_0": 4}
        for group in ("posterior", "prior"):
            assert dict(data[group]["z"].sizes) == latent
        for group in ("posterior_predictive", "prior_predictive"):
            assert dict(data[group]["x"].sizes) == observed
        assert data["log_likelihood"]["x"].dims == ("chain", "draw", "data")
        assert data["observed_data"]["x"].dims == ("data", "x_dim_0")

    def test_many_sites_and_plates(self):
        x, y = torch.randn(5, 2, 3), torch.randn(2, 3, 2)
        data = to_inference_data(model_of_many, guide_of_many, x, y, num_samples=20)
        plates = ("chain", "draw", "columns", "rows")
        assert data["posterior"]["a"].dims == (*plates, "a_dim_0")
        assert data["posterior"]["b"].dims == (*plates, "pixels")
        assert data["prior"]["b"].dims == (*plates, "pixels")
        assert data["posterior_predictive"]["u"].dims == (*plates, "pixels")
        assert data["observed_data"]["v"].dims == ("columns", "rows", "v_dim_0")
        assert set(data["prior_predictive"].data_vars) == {"u", "v"}
        assert set(data["observed_data"].data_vars) == {"u", "v"}
        a, b = draws(data, "posterior", "a"), draws(data, "posterior", "b")
        u, v = x.permute(1, 2, 0), y
        np.testing.assert_array_equal(data["observed_data"]["u"].values, u.numpy())
        direct = {
            "u": dist.Normal(b, 2.0).log_prob(u).sum(-1),
            "v": dist.Normal(a[..., :2], 1.0).log_prob(v).sum(-1),
            "f": a.mean(-1),
        }
        assert set(data["log_likelihood"].data_vars) == set(direct)
        for name, log_likelihood in direct.items():
            assert data["log_likelihood"][name].dims == plates
            torch.testing.assert_close(draws(data, "log_likelihood", name), log_likelihood)

    def test_slashes_become_dots(self):
        def program(x, obs=None):
            with pyro.plate("my/rows", len(x)):
                z = pyro.sample("my/z", dist.Normal(0.0, 1.0))
                if obs is not None:
                    pyro.sample("my/x", dist.Normal(z, 1.0), obs=obs)

        x = torch.zeros(3)
        data = to_inference_data(lambda x: program(x, x), program, x, num_samples=2)
        assert data["posterior"]["my.z"].dims == ("chain", "draw", "my.rows")
        assert set(data["observed_data"].data_vars) == {"my.x"}

    @pytest.mark.parametrize(
        ("plate", "latent", "message"),
        [
            ("draw", "z", "got plate 'draw' and another of that name"),
            ("sample", "z", "got plate 'sample' and another of that name"),
            ("rows", "chain", "got site 'chain' and another of that name"),
            ("rows", "x_dim_0", "got site 'x_dim_0' and another of that name"),
            ("x_dim_0", "z", "got plate 'x_dim_0' and another of that name"),
            ("a.b", "a/b", "got site 'a.b' and another of that name"),
        ],
    )
    def test_clash(self, plate, latent, message):
        def guide(x):
            with pyro.plate(plate, len(x)):
                return pyro.sample(latent, dist.Normal(0.0, 1.0))

        def model(x):
            with pyro.plate(plate, len(x)):
                z = pyro.sample(latent, dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

        with pytest.raises(ValueError, match=message):
            to_inference_data(model, guide, torch.zeros(3, 1), num_samples=2)


def mixture_of_factors(x):
    """A discrete latent that depends on a continuous one."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(logits=torch.stack([z, -z], -1)))
        loc = torch.tensor([-1.0, 2.0])[k]
        pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x)


def guide_without_discrete(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5))


def one_row_at_a_time(x):
    """The same model, written so that it refuses a particle dimension."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z.dim() > 1:
            raise RuntimeError("one batch dimension only")
        k = pyro.sample("k", dist.Categorical(logits=torch.stack([z, -z], -1)))
        loc = torch.tensor([-1.0, 2.0])[k]
        pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x)


class TestDiscreteLatentsOutsideTheGuide:
    def check(self, data, x):
        z, k = draws(data, "posterior", "z"), draws(data, "posterior", "k")
        prior = dist.Categorical(logits=torch.stack([z, -z], -1)).probs
        locs = torch.tensor([-1.0, 2.0]) + z.unsqueeze(-1)
        joint = prior * dist.Normal(locs, 1.0).log_prob(x.unsqueeze(-1)).exp()
        conditional = joint[..., 1] / joint.sum(-1)
        assert_mean(k.double() - conditional, 0.0)
        # Independent given z: no more, no less noise than a Bernoulli's.
        assert_mean((k - conditional) ** 2 - conditional * (1 - conditional), 0.0)
        direct = dist.Normal(locs, 1.0).log_prob(x.unsqueeze(-1))
        direct = direct.gather(-1, k.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(draws(data, "log_likelihood", "x"), direct)

    def test_drawn_from_their_conditional(self):
        x = torch.linspace(-2.0, 3.0, 4)
        data = to_inference_data(mixture_of_factors, guide_without_discrete, x, num_samples=2000)
        self.check(data, x)

    def test_scales_are_ignored(self):
        x = torch.linspace(-2.0, 3.0, 4)
        model = poutine.scale(mixture_of_factors, scale=7.0)
        data = to_inference_data(model, guide_without_discrete, x, num_samples=2000)
        self.check(data, x)

    @pytest.mark.filterwarnings("ignore:.*does not broadcast over particles")
    def test_one_at_a_time(self):
        x = torch.linspace(-2.0, 3.0, 4)
        data = to_inference_data(one_row_at_a_time, guide_without_discrete, x, num_samples=300)
        self.check(data, x)

    @pytest.mark.parametrize("particles", ["all at once", "one by one"])
    @pytest.mark.filterwarnings("ignore:.*does not broadcast over particles")
    def test_continuous_latent_that_depends_on_it(self, particles):
        locs = torch.tensor([-1.0, 2.0])

        def model(x):
            with pyro.plate("rows", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
                z = pyro.sample("z", dist.Normal(locs[k], 1.0))
                if particles == "one by one" and z.dim() > 1:
                    raise RuntimeError("one batch dimension only")
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.linspace(-2.0, 3.0, 4)
        data = to_inference_data(model, guide_without_discrete, x, num_samples=400)
        z, k = draws(data, "posterior", "z"), draws(data, "posterior", "k")
        joint = torch.tensor([0.3, 0.7]) * dist.Normal(locs, 1.0).log_prob(z.unsqueeze(-1)).exp()
        assert_mean(k.double() - joint[..., 1] / joint.sum(-1), 0.0)

    def test_guide_without_any_latent(self):
        model = GaussianMixture(data_dim=2, num_components=3)
        x = torch.randn(BATCH, 2)
        data = to_inference_data(model, lambda x: None, x, num_samples=2000)
        z = draws(data, "posterior", "z")
        for k in range(3):
            assert_mean((z == k).double(), model.posterior(x).probs[:, k])


class TestMasks:
    def test_masked_rows(self):
        seen = torch.tensor([True, False, True])

        def model(x):
            with pyro.plate("rows", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with poutine.mask(mask=seen):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("rows", 3):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        x = torch.tensor([0.5, math.nan, 1.5])
        data = to_inference_data(model, guide, x, num_samples=50)
        log_likelihood = draws(data, "log_likelihood", "x")
        direct = dist.Normal(draws(data, "posterior", "z"), 1.0).log_prob(x.nan_to_num())
        torch.testing.assert_close(log_likelihood, torch.where(seen, direct, 0.0))
        np.testing.assert_array_equal(data["observed_data"]["x"].values, x.numpy())
        assert draws(data, "posterior_predictive", "x").isfinite().all()

    def test_masked_entries_inside_the_distribution(self):
        seen = torch.tensor([[True, False], [True, True]])

        def model(x):
            with pyro.plate("rows", 2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                fn = dist.Poisson(z.exp().unsqueeze(-1).expand(*z.shape, 2))
                pyro.sample("x", fn.mask(seen).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("rows", 2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        x = torch.tensor([[1, 2], [3, 4]])
        data = to_inference_data(model, guide, x, num_samples=50)
        rate = draws(data, "posterior", "z").exp().unsqueeze(-1)
        direct = torch.where(seen, dist.Poisson(rate).log_prob(x), 0.0).sum(-1)
        torch.testing.assert_close(draws(data, "log_likelihood", "x"), direct)
        expected = [[1.0, math.nan], [3.0, 4.0]]
        np.testing.assert_array_equal(data["observed_data"]["x"].values, expected)


class FlatNet(nn.Module):
    """Flattens from the first dimension on, as many a user's net does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, z):
        return self.dropout(self.norm(self.linear(z.flatten(1))))


def flat_pair(net):
    def model(x):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.01).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2] + shift, 1.0).to_event(1))

    return model, guide


class TestUsersPrograms:
    def test_net_that_does_not_broadcast(self):
        net = FlatNet()
        x = torch.randn(BATCH, 3)
        with pytest.warns(UserWarning, match="does not broadcast over particles"):
            data = to_inference_data(*flat_pair(net), x, num_samples=7)
        z = draws(data, "posterior", "z")
        net.eval()
        loc = torch.stack([net(one) for one in z])
        direct = dist.Normal(loc, 0.01).log_prob(x).sum(-1)
        torch.testing.assert_close(draws(data, "log_likelihood", "x"), direct)
        replicated = draws(data, "posterior_predictive", "x")
        torch.testing.assert_close(replicated, loc, rtol=0, atol=0.06)
        assert data["prior"]["z"].dims == ("chain", "draw", "rows", "z_dim_0")

    @pytest.mark.filterwarnings("ignore:.*does not broadcast over particles")
    def test_no_side_effects(self):
        net = FlatNet()
        net.norm.eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        x = torch.randn(BATCH, 3)
        batch = x.clone()
        to_inference_data(*flat_pair(net), x, num_samples=5)
        assert (net.training, net.norm.training, net.dropout.training) == (True, False, True)
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name])
        assert not pyro.get_param_store().keys()
        assert all(p.grad is None for p in net.parameters())
        assert torch.equal(x, batch)

    def test_auxiliary_sites_of_the_guide_are_left_out(self):
        def guide(x):
            with pyro.plate("rows", len(x)):
                auxiliary = dist.Normal(0.0, 1.0)
                e = pyro.sample("e", auxiliary, infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(e.exp(), log_density=-e))

        def model(x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        data = to_inference_data(model, guide, torch.zeros(3), num_samples=2)
        assert set(data["posterior"].data_vars) == {"z"}

    def test_conditioned_model_and_deterministic_site(self):
        def model(n):
            with pyro.plate("rows", n):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                loc = pyro.deterministic("loc", 2 * z)
                pyro.sample("x", dist.Normal(loc, 1e-6))

        def guide(n):
            with pyro.plate("rows", n):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        conditioned = poutine.condition(model, data={"x": torch.zeros(3)})
        data = to_inference_data(conditioned, guide, 3, num_samples=8)
        for z, x in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
            twice = 2 * draws(data, z, "z")
            torch.testing.assert_close(draws(data, x, "x"), twice, rtol=0, atol=1e-4)
        assert set(data["observed_data"].data_vars) == {"x"}

    def test_single_datum_and_single_draw(self):
        model = LinearGaussian(data_dim=4, latent_dim=2)
        data = to_inference_data(
            model, ExactLinearGaussian(model), torch.zeros(1, 4), num_samples=1
        )
        assert data["posterior"]["z"].shape == (1, 1, 1, 2)


class TestChunks:
    @pytest.mark.parametrize("chunk_size", [1, 4, 10, 100])
    def test_any_chunk_size(self, chunk_size):
        model = LinearGaussian(data_dim=4, latent_dim=2)
        x = torch.randn(BATCH, 4)
        guide = ExactLinearGaussian(model)
        data = to_inference_data(model, guide, x, num_samples=10, chunk_size=chunk_size)
        z = draws(data, "posterior", "z")
        assert len(z) == 10
        assert len(z[:, 0, 0].unique()) == 10
        loc = z @ model.weight.T + model.loc
        direct = dist.Normal(loc, 1.0).log_prob(x).sum(-1)
        torch.testing.assert_close(draws(data, "log_likelihood", "x"), direct)

    def test_default_is_bounded_by_memory(self, monkeypatch):
        monkeypatch.setattr(inference_data, "_CHUNK_BYTES", 20_000)
        sizes = []
        model = LinearGaussian(data_dim=50, latent_dim=2)

        def watched(x):
            trace = poutine.trace(model).get_trace(x)
            sizes.append(trace.nodes["z"]["value"].shape[:-2].numel())

        x = torch.zeros(BATCH, 50)
        to_inference_data(watched, ExactLinearGaussian(model), x, num_samples=20)
        assert 1 <= max(sizes) < 10


class TestArviz:
    def test_loo(self, linear_gaussian):
        data = linear_gaussian[2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loo = arviz.loo(data, pointwise=True)
        assert np.isfinite(loo.loo_i if hasattr(loo, "loo_i") else loo.elpd_i).all()

    def test_loo_recovers_the_log_likelihood(self):
        """Given fixed parameters the data are independent, so that LOO is log p(x)."""
        model = LinearGaussian(data_dim=2, latent_dim=1)
        with torch.no_grad():
            model.log_scale.fill_(math.log(3.0))
        x = torch.randn(BATCH, 2)
        data = to_inference_data(model, ExactLinearGaussian(model), x, num_samples=2000)
        loo = arviz.loo(data, pointwise=True)
        pointwise = torch.as_tensor(np.array(loo.loo_i if hasattr(loo, "loo_i") else loo.elpd_i))
        inverse = (-draws(data, "log_likelihood", "x")).exp()
        error = inverse.std(0) / inverse.mean(0) / len(inverse) ** 0.5
        assert ((pointwise - model.log_prob(x)).abs() < 5 * error).all()

    def test_loo_of_one_site_among_several(self):
        x, y = torch.randn(5, 2, 3), torch.randn(2, 3, 2)
        data = to_inference_data(model_of_many, guide_of_many, x, y, num_samples=50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loo = arviz.loo(data, var_name="v")
        assert np.isfinite(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)

    def test_plot_forest(self, linear_gaussian):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arviz.plot_forest(linear_gaussian[2], var_names=["z"])
        assert plt.get_fignums()
        plt.close("all")


def model_without_data(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


class TestErrors:
    @pytest.fixture
    def pair(self):
        model = LinearGaussian(data_dim=4, latent_dim=2)
        return model, ExactLinearGaussian(model)

    @pytest.mark.parametrize("name", ["num_samples", "chunk_size"])
    def test_counts(self, pair, name):
        with pytest.raises(ValueError, match=f"to_inference_data: expected {name} >= 1, got 0"):
            to_inference_data(*pair, torch.zeros(3, 4), **{name: 0})
        with pytest.raises(TypeError, match=f"expected an integer {name}, got float"):
            to_inference_data(*pair, torch.zeros(3, 4), **{name: 2.0})

    def test_empty_batch(self, pair):
        with pytest.raises(ValueError, match="expected at least one row of data, got an empty"):
            to_inference_data(*pair, torch.zeros(0, 4))

    def test_nan_seen_by_the_guide_first(self, pair):
        x = torch.tensor([[0.0, math.nan, 0.0, math.inf]])
        with pytest.raises(ValueError, match="expected finite data .* got 1 NaN and 1 infinite"):
            to_inference_data(*pair, x)

    def test_nan_seen_by_the_model_alone(self):
        x = torch.tensor([0.0, math.nan])
        with pytest.raises(ValueError, match="expected finite data at site 'x', got 1 NaN"):
            to_inference_data(mixture_of_factors, model_without_data, x)

    def test_no_observed_site(self):
        with pytest.raises(ValueError, match="expected the model to observe data"):
            to_inference_data(model_without_data, model_without_data, torch.zeros(3))

    def test_subsample(self):
        def program(x):
            with pyro.plate("rows", 5, subsample_size=2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(ValueError, match="got a random subsample of 2 of 5 rows"):
            to_inference_data(program, program, torch.zeros(2))

    def test_nan_log_likelihood(self):
        def model(x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.factor("bad", z * math.nan)

        message = "expected finite log-likelihoods at site 'bad', got nan in 30 of 30 values"
        with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
            to_inference_data(model, model_without_data, torch.zeros(3), num_samples=10)

    @pytest.mark.filterwarnings("ignore:.*does not broadcast over particles")
    def test_likelihood_without_a_sampler(self):
        class OnlyDensity(dist.TorchDistribution):
            support = dist.constraints.real
            arg_constraints = {}

            def expand(self, batch_shape, _instance=None):
                return OnlyDensity(batch_shape)

            def log_prob(self, value):
                return dist.Normal(0.0, 1.0).log_prob(value).expand(self.batch_shape)

        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", OnlyDensity(), obs=x)

        with pytest.raises(ValueError, match="got a distribution without a sample method"):
            to_inference_data(model, model_without_data, torch.zeros(3), num_samples=2)
