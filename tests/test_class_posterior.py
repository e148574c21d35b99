"""The generative classifier against Bayes' rule with exact Gaussian densities."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import normal_x
from linear_given_class import NOISE, LinearGivenClass
from pyro import poutine
from torch import nn

from pyro_vae.conditional_priors import Unconditional
from pyro_vae.conditioning import Concatenate, OneHot
from pyro_vae.evaluation import importance_weighted_log_likelihood
from pyro_vae.evaluation.class_posterior import ClassPosterior, class_posterior
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models.conditional import ConditionalVAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

LOG_PRIOR = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()


@pytest.fixture
def exact() -> LinearGivenClass:
    return LinearGivenClass()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


# Exact answers.


@pytest.mark.parametrize("log_prior", [None, LOG_PRIOR])
def test_bayes_rule_with_the_exact_guide(
    exact: LinearGivenClass, log_prior: torch.Tensor | None
) -> None:
    x = 2 * normal_x(6)
    posterior = class_posterior(
        exact.model, exact.guide, x, num_classes=3, log_prior=log_prior, num_particles=6
    )
    likelihood = exact.log_prob(x).exp()
    close(posterior.log_likelihood, likelihood.log())
    prior = torch.full((3,), 1 / 3) if log_prior is None else log_prior.exp()
    joint = likelihood * prior
    marginal = joint.sum(1)
    close(posterior.log_prior, prior.log())
    close(posterior.log_marginal, marginal.log())
    close(posterior.log_prob.exp(), joint / marginal.unsqueeze(1))
    assert posterior.predict().tolist() == joint.argmax(1).tolist()
    assert len(posterior.predict().unique()) > 1
    assert (posterior.standard_error < 1e-6).all()
    assert (posterior.log_marginal_standard_error < 1e-6).all()
    assert (posterior.pareto_k == -math.inf).all()
    assert posterior.num_particles == 6
    assert len(posterior) == 6


def test_quadratic_discriminant_analysis() -> None:
    """A linear model whose moments are those that scikit-learn fits."""
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    y = torch.arange(90) % 3
    x = torch.randn(90, 3) * (1.0 + y.unsqueeze(1)) + y.unsqueeze(1) + torch.randn(90, 1)
    qda = QuadraticDiscriminantAnalysis(priors=LOG_PRIOR.exp().numpy(), store_covariance=True)
    qda.fit(x.numpy(), y.numpy())
    exact = LinearGivenClass(data_dim=3, latent_dim=3)
    with torch.no_grad():
        for parameter in exact.prior.parameters():
            parameter.zero_()
        scale = exact.prior.encoder(torch.tensor(0)).stddev  # the same for all
        for label, covariance in enumerate(qda.covariance_):
            rest = torch.as_tensor(covariance) - NOISE**2 * torch.eye(3)
            exact.decoder.weight[label] = torch.linalg.cholesky(rest) / scale
            exact.decoder.bias[label] = torch.as_tensor(qda.means_[label])
    posterior = class_posterior(
        exact.model, exact.guide, x, num_classes=3, log_prior=LOG_PRIOR, num_particles=2
    )
    close(posterior.log_prob, torch.as_tensor(qda.predict_log_proba(x.numpy())))
    assert posterior.predict().tolist() == qda.predict(x.numpy()).tolist()


def test_plain_functions_with_other_names() -> None:
    """Class 0 is a normal, class 1 a mixture over a discrete latent that the guide leaves out."""

    def model(data: torch.Tensor, kind: torch.Tensor) -> None:
        with pyro.plate("rows", len(data)):
            high = pyro.sample("high", dist.Bernoulli(0.25))
            level = pyro.sample("level", dist.Normal(3.0 * kind * high, 0.6))
            pyro.sample("number", dist.Normal(level, 0.8), obs=data)

    def guide(data: torch.Tensor, kind: torch.Tensor) -> None:
        with pyro.plate("rows", len(data)):
            pyro.sample("level", dist.Normal(data / 2, 1.0))

    x = torch.tensor([-1.0, 0.0, 2.0, 4.0])
    posterior = class_posterior(model, guide, x, num_classes=2, num_particles=4000)
    low, high = (dist.Normal(loc, 1.0).log_prob(x) for loc in (0.0, 3.0))
    exact = torch.stack([low, (0.75 * low.exp() + 0.25 * high.exp()).log()], -1)
    error = (posterior.log_likelihood - exact).abs()
    assert (error < 5 * posterior.standard_error).all()
    assert (posterior.standard_error < 0.05).all()


# Noise.


def wide(x: torch.Tensor, y: torch.Tensor) -> Any:
    """A guide that is not exact, for the model of ``LinearGivenClass``."""
    with pyro.plate("data", len(x)):
        return pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))


@pytest.fixture
def many(exact: LinearGivenClass) -> tuple[ClassPosterior, torch.Tensor]:
    """One datum many times, each with particles of its own; and its exact log-joint."""
    num = 2000
    x = exact.moments[0].mean(0, keepdim=True)
    with torch.no_grad():
        exact.decoder.weight.mul_(0.3)
        exact.decoder.bias.mul_(0.3)
    posterior = class_posterior(
        exact.model, wide, x.expand(num, -1), num_classes=3, log_prior=LOG_PRIOR, num_particles=200
    )
    return posterior, exact.log_prob(x)[0] + LOG_PRIOR


def test_the_standard_error_of_the_marginal(many: tuple[ClassPosterior, torch.Tensor]) -> None:
    posterior, joint = many
    assert (joint.softmax(0) > 0.05).all()  # more than one class counts
    spread = posterior.log_marginal.std()
    of_spread = spread / math.sqrt(2 * (len(posterior) - 1))
    claimed = posterior.log_marginal_standard_error
    error = float(of_spread + claimed.std() / math.sqrt(len(posterior)))
    # The delta method itself is off by a part of about the relative error of the weights.
    assert abs(float(spread - claimed.mean())) < 5 * error + 0.02 * float(spread)
    largest = posterior.standard_error.amax(1).mean()
    assert float(claimed.mean()) < 0.9 * float(largest)


def test_the_marginal_is_unbiased(many: tuple[ClassPosterior, torch.Tensor]) -> None:
    posterior, joint = many
    weights = (posterior.log_marginal - joint.logsumexp(0)).exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert abs(float(weights.mean()) - 1) < 5 * error
    assert error < 0.01


def test_one_particle_has_no_standard_error(exact: LinearGivenClass) -> None:
    posterior = class_posterior(exact.model, wide, normal_x(3), num_classes=3, num_particles=1)
    assert posterior.log_marginal_standard_error.isnan().all()
    torch.testing.assert_close(posterior.log_prob.exp().sum(1), torch.ones(3))


def test_a_class_that_never_comes(exact: LinearGivenClass) -> None:
    log_prior = torch.tensor([0.6, 0.0, 0.4]).log()
    posterior = class_posterior(
        exact.model, wide, normal_x(5), num_classes=3, log_prior=log_prior, num_particles=50
    )
    assert (posterior.log_prob[:, 1] == -math.inf).all()
    torch.testing.assert_close(posterior.log_prob.exp().sum(1), torch.ones(5))
    assert posterior.log_marginal.isfinite().all()
    assert posterior.log_marginal_standard_error.isfinite().all()
    assert not (posterior.predict() == 1).any()


# Evaluation leaves no trace.


def digit_pair() -> tuple[ConditionalVAE, AmortizedNormal]:
    decoder = Concatenate(MLP(2 + 3, [7], 4, dropout=0.5), embed=OneHot(3))
    network = Concatenate(MLP(4 + 3, [7], 4, dropout=0.5), embed=OneHot(3))
    prior = Unconditional(StandardNormalPrior(2))
    return ConditionalVAE(decoder, Bernoulli(), prior), AmortizedNormal(network)


def test_it_changes_nothing() -> None:
    model, guide = digit_pair()
    x = (normal_x(5) > 0).double()
    before = x.clone()
    posterior = class_posterior(model, guide, x, num_classes=3, num_particles=20)
    assert not pyro.get_param_store().keys()
    assert torch.equal(x, before)
    assert all(module.training for program in (model, guide) for module in program.modules())
    assert not posterior.log_prob.requires_grad


def test_the_look_at_the_model_draws_no_random_numbers() -> None:
    model, guide = digit_pair()
    x = (normal_x(5) > 0).double()
    pyro.set_rng_seed(3)
    posterior = class_posterior(model, guide, x, num_classes=3, num_particles=20)
    pyro.set_rng_seed(3)
    of_first = importance_weighted_log_likelihood(
        model, guide, x, torch.zeros(5, dtype=torch.int64), num_particles=20
    )
    assert torch.equal(posterior.log_likelihood[:, 0], of_first.log_likelihood)


def test_chunks_do_not_matter() -> None:
    model, guide = digit_pair()
    x = (normal_x(5) > 0).double()
    results = []
    for settings in ({}, {"chunk_size": 7}, {"chunk_bytes": 1}):
        pyro.set_rng_seed(3)
        results.append(
            class_posterior(model, guide, x, num_classes=3, num_particles=20, **settings)
        )
    for other in results[1:]:
        close(other.log_likelihood, results[0].log_likelihood)
    with pytest.raises(ValueError, match="expected chunk_bytes >= 1, got 0"):
        class_posterior(model, guide, x, num_classes=3, chunk_bytes=0)


def test_float32_data() -> None:
    model, guide = (program.float() for program in digit_pair())
    x = (normal_x(5) > 0).float()
    posterior = class_posterior(
        model, guide, x, num_classes=3, log_prior=LOG_PRIOR.float(), num_particles=20
    )
    assert posterior.log_prob.dtype == torch.float64
    close(posterior.log_prob.exp().sum(1), torch.ones(5))


# Batches.


def test_batches_join_in_order(exact: LinearGivenClass) -> None:
    x = normal_x(5)
    settings: dict[str, Any] = {"num_classes": 3, "log_prior": LOG_PRIOR, "num_particles": 3}
    whole = class_posterior(exact.model, exact.guide, x, **settings)
    parts = [class_posterior(exact.model, exact.guide, part, **settings) for part in x.split(2)]
    assert len(parts[-1]) == 1
    joined = ClassPosterior.cat(parts)
    for name in ("log_likelihood", "log_prob", "log_marginal", "log_prior"):
        close(getattr(joined, name), getattr(whole, name))
    for name in ("standard_error", "pareto_k"):
        assert getattr(joined, name).shape == (5, 3)
    assert joined.num_particles == 3


def test_batches_that_do_not_join() -> None:
    two = torch.zeros(1, 3)
    one = ClassPosterior(two, two, two, LOG_PRIOR, 10)
    with pytest.raises(ValueError, match=r"ClassPosterior.cat: expected at least one posterior"):
        ClassPosterior.cat([])
    with pytest.raises(ValueError, match="expected the same num_particles in all, got 10 and 20"):
        ClassPosterior.cat([one, ClassPosterior(two, two, two, LOG_PRIOR, 20)])
    with pytest.raises(ValueError, match="expected the same log_prior in all, got different"):
        ClassPosterior.cat([one, ClassPosterior(two, two, two, LOG_PRIOR.flip(0), 10)])


# A model of x and y together is refused.


def joint_model(score: Callable[[torch.Tensor], None]) -> Callable[..., None]:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            score(y)
            z = pyro.sample("z", dist.Normal(y.double(), 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    return model


def one_dimensional(x: torch.Tensor, y: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(y + 0.36 * (x - y), 0.48))


def as_integer(y: torch.Tensor) -> None:
    pyro.sample("kind", dist.Categorical(LOG_PRIOR.exp()), obs=y)


def as_one_hot(y: torch.Tensor) -> None:
    fn = dist.OneHotCategorical(LOG_PRIOR.exp())
    pyro.sample("kind", fn, obs=nn.functional.one_hot(y, 3).double())


@pytest.mark.parametrize("score", [as_integer, as_one_hot])
def test_a_model_that_scores_the_class(score: Callable[[torch.Tensor], None]) -> None:
    model, x = joint_model(score), torch.tensor([-1.0, 0.5, 2.0])
    settings: dict[str, Any] = {"num_classes": 3, "log_prior": LOG_PRIOR, "num_particles": 3}
    match = r"expected a model of x given its class, got .* at site 'kind'.*hide=\['kind'\]"
    with pytest.raises(ValueError, match=match):
        class_posterior(model, one_dimensional, x, **settings)
    hidden = poutine.block(model, hide=["kind"])  # as the message says
    posterior = class_posterior(hidden, one_dimensional, x, **settings)
    joint = dist.Normal(torch.arange(3.0), 1.0).log_prob(x.unsqueeze(1)) + LOG_PRIOR
    close(posterior.log_prob, joint.log_softmax(1))


def test_data_that_are_moved_by_the_class() -> None:
    """What is left of x is no class, and may be observed."""

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x - y)

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.36 * (x - y), 0.48))

    x = torch.tensor([-1.0, 0.0, 2.0])
    joint = dist.Normal(torch.arange(3.0), 1.0).log_prob(x.unsqueeze(1))
    for rows in (slice(3), slice(1, 2)):
        posterior = class_posterior(model, guide, x[rows], num_classes=3, num_particles=3)
        close(posterior.log_likelihood, joint[rows])


@pytest.mark.parametrize("how", ["mask", "NaN is missing"])
def test_data_that_are_not_observed_are_no_classes(how: str) -> None:
    x = torch.tensor([-1.0, math.nan, 2.0])
    seen = ~x.isnan()

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y.double(), 0.6))
            fn = dist.NanMaskedNormal(z, torch.full((), 0.8))
            if how == "mask":
                fn = dist.Normal(z, 0.8).mask(seen)
            pyro.sample("x", fn, obs=x)

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        exact = y + 0.36 * (x - y)
        with pyro.plate("data", len(x)):
            loc, scale = torch.where(seen, exact, y.double()), torch.where(seen, 0.48, 0.6)
            pyro.sample("z", dist.Normal(loc, scale))

    posterior = class_posterior(model, guide, x, num_classes=3, num_particles=3)
    expected = dist.Normal(torch.arange(3.0), 1.0).log_prob(x.nan_to_num().unsqueeze(1))
    expected[1] = 0
    close(posterior.log_likelihood, expected)


# Errors.


def test_the_number_of_classes() -> None:
    x = (normal_x(2) > 0).double()
    with pytest.raises(ValueError, match="class_posterior: expected num_classes >= 2, got 1"):
        class_posterior(*digit_pair(), x, num_classes=1)
    with pytest.raises(ValueError, match=r"expected classes 0 \.\.\. 2 .*, got 3"):
        class_posterior(*digit_pair(), x, num_classes=4)


def test_data_that_are_no_batch(exact: LinearGivenClass) -> None:
    with pytest.raises(TypeError, match="class_posterior: expected x to be a tensor"):
        class_posterior(exact.model, exact.guide, [[0.0]], num_classes=3)
    with pytest.raises(ValueError, match="class_posterior: expected at least one row in x"):
        class_posterior(exact.model, exact.guide, normal_x(2)[:0], num_classes=3)
    with pytest.raises(ValueError, match="expected num_particles >= 1, got 0"):
        class_posterior(exact.model, exact.guide, normal_x(2), num_classes=3, num_particles=0)


@pytest.mark.parametrize("log_prior", [[0.5, 0.2, 0.3], torch.tensor([1, 1, 1])])
def test_a_log_prior_of_another_type(exact: LinearGivenClass, log_prior: Any) -> None:
    match = (
        "class_posterior: expected log_prior to be a tensor of floats, got (list|torch.int64)"
        r".*\(labels.bincount\(\) / len\(labels\)\).log\(\)"
    )
    with pytest.raises(TypeError, match=match):
        class_posterior(exact.model, exact.guide, normal_x(2), num_classes=3, log_prior=log_prior)


def test_a_log_prior_of_another_shape(exact: LinearGivenClass) -> None:
    log_prior = torch.full((2,), 0.5).log()
    match = r"class_posterior: expected log_prior of shape \(3,\), got \(2,\)"
    with pytest.raises(ValueError, match=match):
        class_posterior(exact.model, exact.guide, normal_x(2), num_classes=3, log_prior=log_prior)


@pytest.mark.parametrize("bad", [LOG_PRIOR.exp(), LOG_PRIOR + 0.01, LOG_PRIOR * math.nan])
def test_a_log_prior_that_is_not_normalised(exact: LinearGivenClass, bad: torch.Tensor) -> None:
    match = "class_posterior: expected a log_prior whose probabilities sum to 1, got .*log_softmax"
    with pytest.raises(ValueError, match=match):
        class_posterior(exact.model, exact.guide, normal_x(2), num_classes=3, log_prior=bad)


def test_a_datum_without_density() -> None:
    def score(y: torch.Tensor) -> None:
        pyro.factor("rule", torch.tensor([0.0, -math.inf, 0.0]) + 0.0 * y)

    x = torch.tensor([-1.0, 0.5, 2.0])
    match = "expected every datum to have a density under some class, got none for 1 of 3 .* 1. Lo"
    with pytest.raises(ValueError, match=match):
        class_posterior(joint_model(score), one_dimensional, x, num_classes=2, num_particles=3)


def test_data_outside_the_support_of_a_class() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(y + 0.0 * z, y + 1.5), obs=x)

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    match = "class_posterior: expected values at site 'x' in the support .* of Uniform"
    with pytest.raises(ValueError, match=match):
        class_posterior(model, guide, torch.tensor([0.5, 1.2, 2.2]), num_classes=3)
