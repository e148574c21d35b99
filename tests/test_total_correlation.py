"""beta-TCVAE: sums over all data by loops, expectations over all minibatches by enumeration."""

import math
from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_codes import LinearCodes, Pinned, Tensors
from pyro import poutine
from torch.distributions import Normal

from pyro_vae import scale_kl
from pyro_vae.evaluation import aggregate_posterior
from pyro_vae.guides import AmortizedMultivariateNormal
from pyro_vae.models import LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceTotalCorrelation_ELBO
from pyro_vae.runs import Run
from pyro_vae.terms import terms_of

close = torch.testing.assert_close


def by_loops(p: LinearCodes, z: torch.Tensor, num_data: int, estimator: str) -> dict[str, Any]:
    """The three parts of the KL, summed over the rows, and the log-likelihood; nats."""
    loc, scale = p.moments(p.x)
    num, width = z.shape

    def q(i: int, m: int, j: int) -> torch.Tensor:
        return Normal(loc[m, j], scale[m, j]).log_prob(z[i, j]).exp()

    def weight(i: int, m: int) -> float:
        if estimator == "weighted":
            return 1 / (num_data * num)
        return 1 / num_data if i == m else (num_data - 1) / num_data / (num - 1)

    parts: dict[str, Any] = {"mi": 0.0, "tc": 0.0, "dwkl": 0.0}
    for i in range(num):
        whole, marginals = 0.0, [0.0] * width
        for m in range(num):
            density = math.prod(q(i, m, j) for j in range(width))
            whole = whole + weight(i, m) * density
            marginals = [marginals[j] + weight(i, m) * q(i, m, j) for j in range(width)]
        log_q, log_product = torch.log(whole), sum(torch.log(marginal) for marginal in marginals)
        parts["mi"] = parts["mi"] + sum(q(i, i, j).log() for j in range(width)) - log_q
        parts["tc"] = parts["tc"] + log_q - log_product
        parts["dwkl"] = parts["dwkl"] + log_product - p.prior(z).log_prob(z[i]).sum()
    parts["log_likelihood"] = Normal(z @ p.params["weight"], 0.7).log_prob(p.x).sum()
    return parts


def loss_by_loops(
    p: LinearCodes, z: torch.Tensor, weights: tuple[float, float, float], num_data: int, name: str
) -> torch.Tensor:
    parts = by_loops(p, z, num_data, name)
    alpha, beta, gamma = weights
    kl = alpha * parts["mi"] + beta * parts["tc"] + gamma * parts["dwkl"]
    return kl - parts["log_likelihood"]


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
@pytest.mark.parametrize("num_data", [5, 40])
def test_value_and_gradient_against_loops(estimator: Any, num_data: int) -> None:
    p, weights = LinearCodes(), (0.3, 4.0, 1.7)
    objective = TraceTotalCorrelation_ELBO(num_data, *weights, estimator=estimator)
    expected = p.with_gradient(loss_by_loops(p, p.codes(p.x, 7), weights, num_data, estimator))
    close(p.of(objective.training_loss, 7), expected)


class _Recorder(poutine.messenger.Messenger):
    """Keeps the latents of the last run: ``(num, batch, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, list[torch.Tensor]] = {"a": [], "b": []}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.drawn:
            self.drawn[msg["name"]].append(msg["value"])

    def codes(self, num: int, at_once: bool) -> list[torch.Tensor]:
        values = {k: v[-1] if at_once else torch.stack(v[-num:]) for k, v in self.drawn.items()}
        return list(torch.cat([values["a"], values["b"].unsqueeze(-1)], -1))


@pytest.mark.parametrize("at_once", [False, True])
def test_every_particle_has_its_own_codes(at_once: bool) -> None:
    p, recorder, weights = LinearCodes(), _Recorder(), (0.3, 4.0, 1.7)
    objective = TraceTotalCorrelation_ELBO(
        40, *weights, num_particles=3, vectorize_particles=at_once
    )
    loss = objective.training_loss(p.model, recorder(p.guide), p.x)
    codes = recorder.codes(3, at_once)
    assert not torch.equal(codes[0], codes[1])
    expected = sum(loss_by_loops(p, z, weights, 40, "weighted") for z in codes) / 3
    close(p.with_gradient(loss), p.with_gradient(expected))


@pytest.mark.parametrize("part", ["mi", "tc", "dwkl"])
def test_all_data_at_once_give_the_exact_sums(part: str) -> None:
    """Against the evaluation of the same quantities, which sums over all data."""
    x = LinearCodes(num_rows=6).x
    matrix = torch.randn(4, 3)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", Pinned(x @ matrix, torch.tensor([0.5, 0.9, 1.3])).to_event(1))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 4), 1.0).to_event(1), obs=x
            )

    exact = aggregate_posterior(guide, x, model=model)
    expected = {
        "mi": exact.index_code_mutual_information,
        "tc": exact.total_correlation,
        "dwkl": exact.dimension_wise_kl,
    }[part]

    def loss(weight: float) -> torch.Tensor:
        name = {"mi": "alpha", "tc": "beta", "dwkl": "gamma"}[part]
        objective = TraceTotalCorrelation_ELBO(6, estimator="stratified", **{name: weight})
        return objective.training_loss(model, guide, x)

    assert float(loss(2.0) - loss(1.0)) / 6 == pytest.approx(expected, rel=1e-10)


def test_the_stratified_density_is_unbiased_over_all_minibatches() -> None:
    p = LinearCodes(Pinned, num_rows=6)
    p.x = p.x[:, :4]
    loc, scale = p.moments(p.x)
    num, size = 6, 3

    def log_q(rows: tuple[int, ...], estimator: Any) -> Tensors:
        objective = TraceTotalCorrelation_ELBO(num, estimator=estimator)
        objective.loss(p.model, p.guide, p.x[list(rows)])
        runs = objective._runs(p.model, p.guide, (p.x[list(rows)],), {}, training=True)
        codes = objective._codes(runs, terms_of(runs).scales)
        return dict(zip(rows, objective._log_densities(codes)[1][0].detach(), strict=True))

    def mean(estimator: str) -> torch.Tensor:
        subsets = [log_q(rows, estimator) for rows in combinations(range(num), size)]
        return torch.stack(
            [torch.stack([s[i].exp() for s in subsets if i in s]).mean() for i in range(num)]
        )

    z = p.codes(p.x, 0)
    each = Normal(loc, scale).log_prob(z.unsqueeze(1)).sum(-1).exp()
    close(mean("stratified"), each.mean(1).detach(), rtol=1e-12, atol=0.0)
    assert not torch.allclose(mean("weighted"), each.mean(1), rtol=0.01)


def test_a_support_that_moves_with_the_row() -> None:
    """Codes that another row cannot have; for Pareto's density torch has a number there."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Pareto(x, 2.0).to_event(1))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = 1 + torch.arange(4.0).unsqueeze(1)
    pyro.set_rng_seed(7)
    z = poutine.trace(guide).get_trace(x).nodes["z"]["value"]
    assert not (z >= x.T).all()
    density = torch.where(z >= x.T, 2 * x.T**2 / z**3, 0.0)
    expected = (density.diagonal() / density.mean(1)).log().sum()
    loss = []
    for alpha in (1.0, 2.0):
        pyro.set_rng_seed(7)
        objective = TraceTotalCorrelation_ELBO(4, alpha, estimator="stratified")
        loss.append(objective.training_loss(model, guide, x))
    close(loss[1] - loss[0], expected)


def test_single_rows() -> None:
    p, num_data = LinearCodes(num_rows=1), 40
    objective = TraceTotalCorrelation_ELBO(num_data, 1.0, 3.0)
    expected = p.with_gradient(
        loss_by_loops(p, p.codes(p.x, 7), (1.0, 3.0, 1.0), num_data, "weighted")
    )
    close(p.of(objective.training_loss, 7), expected)
    stratified = TraceTotalCorrelation_ELBO(num_data, 1.0, 3.0, estimator="stratified")
    stratified.loss(p.model, p.guide, p.x)  # Nothing to estimate.
    with pytest.raises(ValueError, match="at least 2 rows for estimator='stratified', got a batch"):
        stratified.training_loss(p.model, p.guide, p.x)
    alone = TraceTotalCorrelation_ELBO(1, 1.0, 3.0, estimator="stratified")
    plain = TraceTotalCorrelation_ELBO(1)
    close(p.of(alone.training_loss, 7), p.of(plain.training_loss, 7))  # One datum: TC is 0.
    p = LinearCodes()
    keep = torch.tensor([True, False, False, False, False])
    loss = p.of(stratified.training_loss, 7, mask=keep)
    assert all(v.isfinite().all() for v in loss.values())


def test_it_takes_the_total_correlation_out_of_codes() -> None:
    """A guide of one affine map, trained for a while with a large and with no weight."""
    pyro.set_rng_seed(0)
    x = torch.randn(40, 2) @ torch.tensor([[2.0, 1.5], [0.0, 0.5]])
    found = []
    for beta in (1.0, 20.0):
        pyro.clear_param_store()

        def guide(x: torch.Tensor) -> None:
            matrix = pyro.param("matrix", torch.eye(2))
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(x @ matrix, 0.5).to_event(1))

        def model(x: torch.Tensor) -> None:
            weight = pyro.param("weight", torch.eye(2))
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)

        objective = TraceTotalCorrelation_ELBO(40, beta=beta, estimator="stratified")
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.06}), loss=objective)
        for _ in range(30):
            svi.step(x)
        found.append(aggregate_posterior(guide, x, num_samples=10).total_correlation)
    assert found[1] < 0.5 * found[0]


# What is refused.


def test_num_data_is_needed() -> None:
    for arguments in ((), (None,)):
        with pytest.raises(TypeError, match=r"expected num_data, .* Pass num_data=len\(train\)"):
            TraceTotalCorrelation_ELBO(*arguments)
    with pytest.raises(ValueError, match="expected num_data >= 1, got 0"):
        TraceTotalCorrelation_ELBO(0)


def test_arguments_that_are_none_of_ours() -> None:
    with pytest.raises(ValueError, match=r"expected estimator in \['weighted', 'stratified'\]"):
        TraceTotalCorrelation_ELBO(10, estimator="exact")  # type: ignore[arg-type]
    for name in ("alpha", "beta", "gamma"):
        with pytest.raises(ValueError, match=f"expected a finite {name} >= 0, got -1"):
            TraceTotalCorrelation_ELBO(10, **{name: -1.0})


def test_num_data_that_the_plate_contradicts() -> None:
    p = LinearCodes()
    objective = TraceTotalCorrelation_ELBO(30)
    with pytest.raises(ValueError, match="num_data to be the full size 40 of plate 'rows', got 30"):
        objective.training_loss(p.model, p.guide, p.x, size=40)
    with pytest.raises(ValueError, match="a batch of at most num_data = 4 rows, got 5"):
        TraceTotalCorrelation_ELBO(4).training_loss(p.model, p.guide, p.x)
    TraceTotalCorrelation_ELBO(4).loss(p.model, p.guide, p.x)  # The bound needs no num_data.


def test_guides_without_densities_of_elements() -> None:
    x = torch.randn(7, 5)
    model = LinearGaussian(5, 2)
    guide = AmortizedMultivariateNormal(MLP(5, [], 5), 2)
    with pytest.raises(ValueError, match="element of site 'z', got MultivariateNormal"):
        TraceTotalCorrelation_ELBO(10).loss(model, guide, x)

    def point(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :2]).to_event(1))

    with pytest.raises(ValueError, match="element of site 'z', got Delta"):
        TraceTotalCorrelation_ELBO(10).loss(model, point, x)


def test_scales_that_differ_between_latents() -> None:
    p = LinearCodes()
    model, guide = (_ScaleSite("b", 2.0)(program) for program in (p.model, p.guide))
    with pytest.raises(ValueError, match="expected one scale for all latents .* at site 'b'"):
        TraceTotalCorrelation_ELBO(40).loss(model, guide, p.x)
    TraceTotalCorrelation_ELBO(40, sites=["b"]).loss(model, guide, p.x)
    TraceTotalCorrelation_ELBO(40).loss(scale_kl(p.model, 2.0), scale_kl(p.guide, 2.0), p.x)


class _ScaleSite(poutine.messenger.Messenger):
    def __init__(self, name: str, scale: float) -> None:
        super().__init__()
        self._name, self._scale = name, scale

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self._name:
            msg["scale"] = msg["scale"] * self._scale


def test_codes_in_the_middle_dimensions() -> None:
    """Matrices as codes, and rows that are not the last dimension of the batch."""
    objective = TraceTotalCorrelation_ELBO(10, 2.0, 3.0, 4.0)
    x = torch.randn(4, 6)

    def loss(shape: tuple[int, ...], dim: int) -> torch.Tensor:
        batch = (4,) + (1,) * (-1 - dim)

        def guide(x: torch.Tensor) -> None:
            with pyro.plate("rows", 4, dim=dim):
                fn = Pinned(x.reshape(*batch, *shape), 0.7)
                pyro.sample("z", fn.to_event(len(shape)))

        def model(x: torch.Tensor) -> None:
            with pyro.plate("rows", 4, dim=dim):
                fn = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
                z = pyro.sample("z", fn)
                fn = dist.Normal(z, 1.0).to_event(len(shape))
                pyro.sample("x", fn, obs=x.reshape(*batch, *shape))

        return objective.training_loss(model, guide, x)

    close(loss((2, 3), -2), loss((6,), -1))


def test_the_run_of_a_single_particle_has_the_shape_of_many() -> None:
    """The weights of the data and the dimensions that the plates spell out."""
    p = LinearCodes()
    trace = poutine.trace(p.guide).get_trace(p.x)
    model = poutine.trace(poutine.replay(p.model, trace=trace)).get_trace(p.x)
    run = Run(trace, model, 1, 1, print, print)
    objective = TraceTotalCorrelation_ELBO(40)
    objective.loss(p.model, p.guide, p.x)
    codes = objective._codes([run], terms_of([run]).scales)
    assert codes.values.shape == (1, 5, 3)
    close(codes.values[0, :, 2], trace.nodes["b"]["value"])
    assert codes.weights.tolist() == [1.0] * 5
