"""The ELBO by site against closed forms, brute-force sums, exact answers and Pyro's own ELBOs."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae.evaluation import ElboTerms, elbo_terms, importance_weighted_log_likelihood
from pyro_vae.guides import AmortizedNormal, ExactLinearGaussian
from pyro_vae.handlers import scale_kl
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE, LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

Program = Callable[..., Any]
WHERE = "elbo_terms: "
NOISE = 2.0


def rows(num: int = 5, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, width, generator=generator, dtype=torch.float64)


WEIGHT = rows(2)


def prior(dtype: torch.dtype = torch.float64) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)


def posterior(x: torch.Tensor) -> dist.TorchDistribution:
    return dist.Normal(x[:, :2] / 2 + 0.1, 0.3 + x[:, 2:].abs() / 8).to_event(1)


def plate(x: torch.Tensor, size: int | None = None) -> AbstractContextManager[Any]:
    return pyro.plate("rows", size or len(x), subsample=torch.arange(len(x)) if size else None)


def model(x: torch.Tensor, size: int | None = None, decode: Program | None = None) -> None:
    with plate(x, size):
        code = pyro.sample("code", prior(x.dtype))
        loc = decode(code) if decode else code @ WEIGHT.to(x.dtype)
        pyro.sample("pixels", dist.Normal(loc, NOISE).to_event(1), obs=x)


def guide(x: torch.Tensor, size: int | None = None) -> None:
    with plate(x, size):
        pyro.sample("code", posterior(x))


def expected_log_likelihood(x: torch.Tensor) -> torch.Tensor:
    """E|x - z W|^2 = |x - m W|^2 + tr(W S W^T)."""
    q = posterior(x)
    square = (x - q.mean @ WEIGHT).square().sum(1) + (q.variance @ WEIGHT.square()).sum(1)
    return -square / (2 * NOISE**2) - 4 * math.log(NOISE * math.sqrt(2 * math.pi))


def seeded(*args: Any, **kwargs: Any) -> ElboTerms:
    pyro.set_rng_seed(0)
    return elbo_terms(*args, **kwargs)


def assert_mean(values: torch.Tensor, expected: Any) -> None:
    """The mean of copies of the data, within five standard errors."""
    expected = torch.as_tensor(expected)
    copies = values.reshape(-1, *expected.shape)
    error = 5 * copies.std(0) / len(copies) ** 0.5
    assert (error < 0.3).all()
    assert ((copies.mean(0) - expected).abs() <= error + 1e-12).all()


# Values.


def test_closed_form_kl_and_expected_log_likelihood() -> None:
    x = rows()
    terms = elbo_terms(model, guide, x.repeat(1000, 1), num_particles=4)
    kl = kl_divergence(posterior(x), prior())
    torch.testing.assert_close(terms.kl["code"], kl.repeat(1000))
    assert torch.equal(terms.rate, terms.kl["code"])
    assert torch.equal(terms.distortion, -terms.log_likelihood["pixels"])
    torch.testing.assert_close(terms.elbo, terms.log_likelihood["pixels"] - terms.kl["code"])
    assert_mean(terms.log_likelihood["pixels"], expected_log_likelihood(x))
    assert terms.closed_form == {"code"}
    assert terms.log_likelihood.keys() == {"pixels"}
    assert terms.kl.keys() == {"code"}
    assert terms.num_particles == 4
    assert terms.is_data.all()
    assert len(terms) == 5000


@pytest.mark.parametrize(("num_particles", "chunk_size"), [(1, 10), (4, 4), (7, 3), (7, 1), (3, 9)])
def test_the_exact_posterior_leaves_no_noise(num_particles: int, chunk_size: int) -> None:
    """Sampled KL and log-likelihood of the same particles: each sums to log p(x)."""
    linear = LinearGaussian(data_dim=4, latent_dim=2)
    pair = linear, ExactLinearGaussian(linear)
    terms = elbo_terms(*pair, rows(), num_particles=num_particles, chunk_size=chunk_size)
    assert not terms.closed_form
    torch.testing.assert_close(terms.elbo, linear.log_prob(rows()).detach())
    assert terms.num_particles == num_particles


@pytest.mark.parametrize(
    ("chunk_size", "used"),
    [(1, range(-7, 0)), (3, range(-3, 0)), (7, (-1,)), (100, (-1,))],  # Before them a first look.
)
def test_every_particle_counts_once(chunk_size: int, used: Sequence[int]) -> None:
    drawn = []

    def counting(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            drawn.append(pyro.sample("code", posterior(x)))

    terms = elbo_terms(model, counting, rows(), num_particles=7, chunk_size=chunk_size)
    codes = torch.cat([drawn[i].reshape(-1, 5, 2) for i in used])
    assert len(codes) == 7
    fn = dist.Normal(codes @ WEIGHT, NOISE).to_event(1)
    torch.testing.assert_close(terms.log_likelihood["pixels"], fn.log_prob(rows()).mean(0))


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_agreement_with_pyro(loss: Any) -> None:
    """On average, and exactly for the KL that both have in closed form."""
    x = rows().repeat(400, 1)
    elbo = elbo_terms(model, guide, x, num_particles=5).elbo.reshape(400, 5).mean(1)
    theirs = torch.tensor([-loss().loss(model, guide, x) / len(x) for _ in range(10)])
    error = 5 * (elbo.var() / len(elbo) + theirs.var() / len(theirs)).sqrt()
    assert error < 0.2
    assert (elbo.mean() - theirs.mean()).abs() < error
    x = torch.zeros_like(x)

    def blind(x: torch.Tensor) -> None:  # Nothing in the likelihood depends on the code.
        model(x, None, lambda code: 0 * code @ WEIGHT)

    ours = elbo_terms(blind, guide, x, num_particles=1).elbo.sum()
    if loss is TraceMeanField_ELBO:
        torch.testing.assert_close(ours.item(), -loss().loss(blind, guide, x))


def test_agreement_with_the_estimator_of_likelihoods() -> None:
    x = rows().repeat(400, 1)
    elbo = elbo_terms(model, guide, x, num_particles=5).elbo
    estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=5)
    assert_mean(elbo - estimate.elbo, torch.zeros(5))


def test_a_model_and_guide_of_the_library() -> None:
    vae = VAE(MLP(2, [8], 6), Bernoulli(), StandardNormalPrior(2))
    amortized = AmortizedNormal(MLP(6, [8], 4))
    x = (rows(5, 6) > 0).double()
    terms = elbo_terms(vae, amortized, x, num_particles=3)
    expected = kl_divergence(amortized.encoder(x), prior()).detach()
    torch.testing.assert_close(terms.kl["z"], expected)
    assert terms.log_likelihood["x"].shape == (5,)
    assert not pyro.get_param_store().keys()


# Scales and masks.


@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_scales_do_not_count(beta: float) -> None:
    plain = seeded(model, guide, rows(), num_particles=3)
    scaled = seeded(scale_kl(model, beta), scale_kl(guide, beta), rows(), num_particles=3)
    assert torch.equal(scaled.rate, plain.rate)
    assert torch.equal(scaled.distortion, plain.distortion)
    scaled = seeded(poutine.scale(model, 0.1), poutine.scale(guide, 0.1), rows(), num_particles=3)
    assert torch.equal(scaled.rate, plain.rate)
    assert torch.equal(scaled.distortion, plain.distortion)


def test_subsampled_rows_have_no_weight() -> None:
    plain = seeded(model, guide, rows(), num_particles=3)
    assert torch.equal(seeded(model, guide, rows(), 100, num_particles=3).elbo, plain.elbo)


def test_masked_rows_are_no_data() -> None:
    seen = torch.tensor([True, True, False, True, False])
    plain = seeded(model, guide, rows(), num_particles=3)
    masked = [poutine.mask(program, mask=seen) for program in (model, guide)]
    terms = seeded(*masked, rows(), num_particles=3)
    assert terms.is_data.equal(seen)
    for part in ("elbo", "rate", "distortion"):
        values = torch.where(seen, getattr(plain, part), 0.0)
        torch.testing.assert_close(getattr(terms, part), values)


def test_masks_inside_distributions() -> None:
    seen = torch.tensor([True, False, True])

    def masked_guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("code", posterior(x).mask(seen))

    def masked_model(x: torch.Tensor, fn: Program) -> None:
        with pyro.plate("rows", len(x)):
            code = pyro.sample("code", fn())
            pyro.sample("pixels", dist.Normal(code @ WEIGHT, NOISE).to_event(1).mask(seen), obs=x)

    x = rows(3)
    missing = elbo_terms(lambda x: masked_model(x, prior), guide, x, num_particles=3)
    assert missing.is_data.all()  # The latents of a row without observations are data.
    assert missing.elbo[1] == -missing.kl["code"][1] != 0

    padding = elbo_terms(
        lambda x: masked_model(x, lambda: prior().mask(seen)), masked_guide, x, num_particles=3
    )
    assert padding.is_data.equal(seen)
    assert padding.elbo[1] == 0
    expected = torch.where(seen, kl_divergence(posterior(x), prior()), 0.0)
    torch.testing.assert_close(padding.kl["code"], expected)


# Other programs.


def chain_model(x: torch.Tensor) -> None:
    """z2 -> z1 -> x, each with unit noise."""
    with pyro.plate("rows", len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


def chain_guide(x: torch.Tensor) -> None:
    """Bottom up, x -> z1 -> z2: the exact posterior with its first mean shifted."""
    with pyro.plate("rows", len(x)):
        z1 = pyro.sample("z1", dist.Normal(2 * x / 3 + 0.2, (2 / 3) ** 0.5))
        pyro.sample("z2", dist.Normal(z1 / 2, 0.5**0.5))


def test_reversed_order_of_latents() -> None:
    """q(z2 | z1) against p(z2) has a formula, q(z1 | x) against p(z1 | z2) must be sampled."""
    x = rows()[:, 0]
    terms = elbo_terms(chain_model, chain_guide, x.repeat(2000), num_particles=2)
    assert terms.closed_form == {"z2"}
    log_p = dist.Normal(0.0, 3**0.5).log_prob(x)
    assert_mean(terms.elbo, log_p - 0.2**2 / 2 / (2 / 3))
    # KL(N(z1 / 2, 1/2) || N(0, 1)) with E z1^2 = m^2 + 2/3, and E(z1 - z2)^2 = m^2 / 4 + 1/6 + 1/2
    square = (2 * x / 3 + 0.2).square()
    kl_z2 = ((square + 2 / 3) / 4 + 0.5 - 1 - math.log(0.5)) / 2
    kl_z1 = -math.log(2 / 3) / 2 - 0.5 + (square / 4 + 1 / 6 + 1 / 2) / 2
    assert_mean(terms.kl["z2"], kl_z2)
    assert_mean(terms.kl["z1"], kl_z1)
    torch.testing.assert_close(terms.rate, terms.kl["z1"] + terms.kl["z2"])


def test_latents_and_observations_in_nested_plates() -> None:
    """A code for each datum and one for each of its three patches, two observed sites."""

    def nested(x: torch.Tensor, of_guide: bool) -> None:
        loc = x.mean(0) if of_guide else torch.zeros(())
        patches = pyro.plate("patches", 3, dim=-2)
        with pyro.plate("rows", x.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(loc, 0.5 if of_guide else 1.0))
            with patches:
                w = pyro.sample("w", dist.Normal(x / 2 if of_guide else 0.0, 1.0))
                if not of_guide:
                    pyro.sample("x", dist.Normal(w, 1.0), obs=x)
            if not of_guide:
                pyro.sample("top", dist.Normal(z, 2.0), obs=x[0])

    x = rows(3, 5)
    pair = (lambda x: nested(x, False)), (lambda x: nested(x, True))
    terms = elbo_terms(*pair, x.repeat(1, 1000), num_particles=4)
    assert terms.closed_form == {"z", "w"}
    kl_w = (x / 2).square().sum(0) / 2
    torch.testing.assert_close(terms.kl["w"], kl_w.repeat(1000))
    kl_z = kl_divergence(dist.Normal(x.mean(0), 0.5), dist.Normal(0.0, 1.0))
    torch.testing.assert_close(terms.kl["z"], kl_z.repeat(1000))
    log_x = -((x / 2).square() + 1 + math.log(2 * math.pi)).sum(0) / 2
    assert_mean(terms.log_likelihood["x"], log_x)
    log_top = dist.Normal(x.mean(0), 2.0).log_prob(x[0]) - 0.5**2 / 8
    assert_mean(terms.log_likelihood["top"], log_top)
    assert_mean(terms.elbo, log_x + log_top - kl_z - kl_w)


@pytest.mark.parametrize("closed", [True, False])
def test_discrete_latents(closed: bool) -> None:
    x = rows(4)[:, 0]
    logits = rows(4, 3)
    loc = torch.tensor([-1.0, 0.5, 2.0])
    binomial = dist.Binomial(2, torch.tensor(0.3))
    weights = torch.tensor([0.2, 0.5, 0.3])

    def discrete_model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Categorical(weights) if closed else binomial)
            pyro.sample("x", dist.Normal(loc[y.long()], 1.0), obs=x)

    def discrete_guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits.repeat(1000, 1)))

    log_p = weights.log() if closed else binomial.log_prob(torch.arange(3.0))
    q, log_q = logits.softmax(1), logits.log_softmax(1)
    kl = (q * (log_q - log_p)).sum(1)
    log_x = (q * dist.Normal(loc, 1.0).log_prob(x[:, None])).sum(1)
    terms = elbo_terms(discrete_model, discrete_guide, x.repeat(1000), num_particles=4)
    assert terms.closed_form == ({"y"} if closed else set())
    if closed:
        torch.testing.assert_close(terms.kl["y"], kl.repeat(1000))
    else:
        assert_mean(terms.kl["y"], kl)
    assert_mean(terms.log_likelihood["x"], log_x)


def test_an_auxiliary_site_adds_to_the_kl_of_what_is_made_of_it() -> None:
    def positive_model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def positive_guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(x, 0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    x = rows()[:, 0]
    terms = elbo_terms(positive_model, positive_guide, x.repeat(1000), num_particles=4)
    assert terms.kl.keys() == {"u", "z"}
    assert not terms.closed_form
    expected = kl_divergence(dist.Normal(x, 0.5), dist.Normal(0.0, 1.0))
    assert_mean(terms.rate, expected)


def test_several_data_plates_and_one_row() -> None:
    def two_plates(x: torch.Tensor, of_guide: bool) -> None:
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(x if of_guide else 0.0, 1.0))
            if not of_guide:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = rows(3, 4)
    terms = elbo_terms(lambda x: two_plates(x, False), lambda x: two_plates(x, True), x)
    torch.testing.assert_close(terms.rate, x.square() / 2)
    assert terms.is_data.shape == (3, 4)
    assert elbo_terms(model, guide, rows(1)).elbo.shape == (1,)


def test_a_model_that_takes_one_particle_at_a_time() -> None:
    def narrow(code: torch.Tensor) -> torch.Tensor:
        return code.reshape(5, 2) @ WEIGHT

    with pytest.warns(UserWarning, match="elbo_terms: the model does not broadcast"):
        terms = seeded(
            lambda x: model(x, None, narrow), guide, rows(), num_particles=5, chunk_size=2
        )
    singles = seeded(model, guide, rows(), num_particles=5, chunk_size=1)
    torch.testing.assert_close(terms.elbo, singles.elbo)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype: torch.dtype) -> None:
    terms = elbo_terms(model, guide, rows().to(dtype), num_particles=3)
    assert terms.elbo.dtype == terms.kl["code"].dtype == torch.float64
    exact = kl_divergence(posterior(rows()), prior())
    torch.testing.assert_close(terms.kl["code"], exact, rtol=1e-5, atol=1e-5)


def test_an_infinite_kl_is_no_error() -> None:
    def wide_guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])))

    def narrow_model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Categorical(torch.tensor([1.0, 0.0])))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    terms = elbo_terms(narrow_model, wide_guide, rows()[:, 0], num_particles=2)
    assert (terms.elbo == -torch.inf).all()


def test_nothing_else_changes() -> None:
    network = nn.Sequential(MLP(4, [8], 4, dropout=0.5))
    amortized = AmortizedNormal(network)
    vae = VAE(MLP(2, [8], 4, dropout=0.5), Bernoulli(), StandardNormalPrior(2))
    x = (rows() > 0).double()
    before = {k: v.clone() for p in (vae, amortized) for k, v in p.state_dict().items()}
    first = seeded(vae, amortized, x, num_particles=3)
    assert torch.equal(first.elbo, seeded(vae, amortized, x, num_particles=3).elbo)
    assert network.training
    assert vae.decoder.training
    assert not first.elbo.requires_grad
    after = {k: v for p in (vae, amortized) for k, v in p.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in after)
    assert not pyro.get_param_store().keys()


# Batches.


def test_batches_are_joined_in_order() -> None:
    x = rows(5)
    parts = [elbo_terms(model, guide, batch, num_particles=2) for batch in x.split(2)]
    joined = ElboTerms.cat(parts)
    assert len(joined) == 5
    assert joined.num_particles == 2
    assert joined.closed_form == {"code"}
    assert joined.is_data.all()
    torch.testing.assert_close(joined.kl["code"], kl_divergence(posterior(x), prior()))
    assert torch.equal(joined.elbo, torch.cat([part.elbo for part in parts]))


def test_batches_that_differ() -> None:
    terms = elbo_terms(model, guide, rows(), num_particles=2)
    with pytest.raises(ValueError, match="expected the terms of at least one batch, got none"):
        ElboTerms.cat([])
    with pytest.raises(ValueError, match="same sites and num_particles in all, got 2 and 3"):
        ElboTerms.cat([terms, elbo_terms(model, guide, rows(), num_particles=3)])
    other = elbo_terms(chain_model, chain_guide, rows()[:, 0], num_particles=2)
    with pytest.raises(ValueError, match=r"in all, got \['pixels'\] and \['x'\]"):
        ElboTerms.cat([terms, other])


# What it cannot take.


@pytest.mark.parametrize("name", ["num_particles", "chunk_size"])
def test_counts(name: str) -> None:
    with pytest.raises(ValueError, match=f"{WHERE}expected {name} >= 1, got 0"):
        elbo_terms(model, guide, rows(), **{name: 0})
    with pytest.raises(TypeError, match=f"{WHERE}expected an integer {name}, got float"):
        elbo_terms(model, guide, rows(), **{name: 2.0})


def test_data_that_cannot_be_right() -> None:
    with pytest.raises(ValueError, match=f"{WHERE}expected at least one row of data"):
        elbo_terms(model, guide, rows()[:0])
    with pytest.raises(ValueError, match=f"{WHERE}expected finite data"):
        elbo_terms(model, guide, rows().index_fill(0, torch.tensor([1]), torch.nan))

    def random_rows(x: torch.Tensor) -> None:
        with pyro.plate("rows", 5, subsample_size=2) as index:
            pyro.sample("code", posterior(x[index]))

    with pytest.raises(ValueError, match=f"{WHERE}expected plate 'rows' over the rows given"):
        elbo_terms(model, random_rows, rows())


def test_a_site_outside_the_data_plate() -> None:
    def with_global(program: Program) -> Program:
        def wrapped(x: torch.Tensor) -> None:
            pyro.sample("weight", dist.Normal(0.0, 1.0))
            program(x)

        return wrapped

    message = f"{WHERE}expected every sample site inside plate 'rows', got site 'weight' outside"
    with pytest.raises(ValueError, match=message):
        elbo_terms(with_global(model), with_global(guide), rows())


def one_latent(fn: Program, observe: bool) -> Program:
    def program(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", fn(x))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return program


def test_guides_without_the_latents_or_their_density() -> None:
    x = rows()[:, 0]
    discrete = one_latent(lambda x: dist.Bernoulli(0.5), True)
    with pytest.raises(ValueError, match=f"{WHERE}expected the guide to sample every latent"):
        elbo_terms(discrete, lambda x: None, x)
    normal = one_latent(lambda x: dist.Normal(0.0, 1.0), True)
    with pytest.raises(ValueError, match=f"{WHERE}expected the guide to sample every latent"):
        elbo_terms(normal, lambda x: None, x)
    with pytest.raises(ValueError, match=f"{WHERE}expected a guide with a density, got a point m"):
        elbo_terms(normal, one_latent(dist.Delta, False), x)


@pytest.mark.parametrize("validation", [True, False])
def test_a_guide_that_leaves_the_support_of_the_prior(validation: bool) -> None:
    x = rows()[:, 0]
    positive = one_latent(lambda x: dist.Gamma(2.0, 1.0), True)
    normal = one_latent(lambda x: dist.Normal(x, 1.0), False)
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match="support"):
        elbo_terms(positive, normal, x, num_particles=1)
    message = f"{WHERE}expected the guide to sample site 'z' in the support"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        elbo_terms(positive, normal, x, num_particles=1)


@pytest.mark.parametrize("of_model", [True, False])
def test_terms_that_are_not_numbers(of_model: bool) -> None:
    def nan_model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.where(x > 0, torch.nan, z) if of_model else z
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def nan_guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0 if of_model else torch.inf))

    x = torch.tensor([1.0, -1.0, 2.0])
    what = "log-likelihood at site 'x', got nan for 2 of 3" if of_model else "KL at site 'z'"
    no_check = pyro.validation_enabled(False)
    with nullcontext(), no_check, pytest.raises(ValueError, match=f"expected a finite {what}"):
        elbo_terms(nan_model, nan_guide, x, num_particles=1)
