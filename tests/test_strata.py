"""Draws in proportion to the components of a mixture: counts, expectations and calibration."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae.mixtures import FixedNormalMixture, NormalMixture
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.strata import Strata, can_stratify, stratified_sample

LOCS = torch.tensor([-100.0, 0.0, 100.0, 200.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)


def mixture(rows: int = 5, kind: Any = FixedNormalMixture, weights: Any = WEIGHTS) -> Any:
    """Components so far apart that a draw tells where it came from."""
    probs = weights.expand(rows, len(weights))
    components = dist.Normal(LOCS[: len(weights), None].expand(rows, -1, 2), 1.0).to_event(1)
    return kind(dist.Categorical(probs=probs), components)


def components_of(draws: torch.Tensor) -> torch.Tensor:
    return (draws[..., 0] / 100).round().long() + 1


def counts(draws: torch.Tensor) -> torch.Tensor:
    """Draws of each component, over the first dimension: ``(components, *batch)``."""
    found = components_of(draws)
    return torch.stack([(found == k).sum(0) for k in range(len(LOCS))])


class Plain(dist.MixtureSameFamily):  # type: ignore[misc]
    """A mixture of another class."""


KINDS = [FixedNormalMixture, NormalMixture, Plain]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [1, 7, 10, 16, 1000])
def test_components_get_their_share(kind: Any, num: int) -> None:
    with torch.no_grad():
        draws = stratified_sample(mixture(kind=kind), num)
    assert draws.shape == (num, 5, 2)
    exact = (num * WEIGHTS).unsqueeze(-1)
    got = counts(draws)
    assert (got >= exact.floor()).all()
    assert (got <= exact.ceil()).all()
    if num == 10:
        assert (got == exact).all()


@pytest.mark.parametrize("nesting", [1, 2, 3])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("num", [7, 20])
def test_particles_of_a_program(nesting: int, at_once: bool, num: int) -> None:
    """All at once or one by one, and whatever plates are around."""
    rows = 50
    strata = Strata(num, -1 - nesting, [-1])

    def guide() -> torch.Tensor:
        with pyro.plate("rows", rows, dim=-1):
            value: torch.Tensor = pyro.sample("z", mixture(rows))
            pyro.sample("other", mixture(rows))
            return value

    draws = []
    for first in [0] if at_once else range(num):
        strata.first = first
        with strata:
            if at_once:
                with pyro.plate("particles", num, dim=-1 - nesting):
                    draws.append(guide())
            else:
                draws.append(guide())
    value = draws[0].reshape(num, rows, 2) if at_once else torch.stack(draws)
    exact = (num * WEIGHTS).unsqueeze(-1)
    assert (counts(value) >= exact.floor()).all()
    assert (counts(value) <= exact.ceil()).all()
    assert (components_of(value).diff(dim=0) >= 0).all()


def test_draws_within_a_component_are_its_own() -> None:
    """Means, deviations and independence of what is drawn from each component."""
    with torch.no_grad():
        draws = stratified_sample(mixture(1), 20_000)[:, 0]
    found = components_of(draws.unsqueeze(1))[:, 0]
    for k in (0, 2, 3):
        own = draws[found == k] - LOCS[k]
        error = 5 / math.sqrt(len(own))
        assert float(own.mean(0).abs().max()) < error
        assert float((own.T.cov() - torch.eye(2)).abs().max()) < 2 * error


def test_rows_have_offsets_of_their_own() -> None:
    """So that rows do not err together: the one particle of each is of any component."""
    with torch.no_grad():
        found = components_of(stratified_sample(mixture(4000), 1)[0])
    share = torch.stack([(found == k).double().mean() for k in range(4)])
    error = 5 * (WEIGHTS * (1 - WEIGHTS) / 4000).sqrt()
    assert ((share - WEIGHTS).abs() <= error).all()


def test_only_the_first_mixture_is_stratified() -> None:
    """Two of them in step would be dependent."""
    num, rows = 8, 3000
    half = torch.tensor([0.5, 0.5])

    def guide() -> tuple[torch.Tensor, torch.Tensor]:
        with pyro.plate("rows", rows):
            return pyro.sample("a", mixture(rows, weights=half)), pyro.sample(
                "b", mixture(rows, weights=half)
            )

    with Strata(num, -2, [-1]), pyro.plate("particles", num, dim=-2):
        first, second = (components_of(value).double() for value in guide())
    assert (first.sum(0) == num / 2).all()
    assert (second.sum(0) != num / 2).any()
    agreement = (first == second).double().mean()
    assert abs(float(agreement) - 0.5) < 5 * 0.5 / math.sqrt(num * rows)


def test_observed_and_given_sites_are_left_alone() -> None:
    value = torch.zeros(5, 2)

    def program(obs: Any = None) -> Any:
        with pyro.plate("rows", 5):
            return pyro.sample("z", mixture(), obs=obs)

    with Strata(4, -2, [-1]):
        assert program(value) is value
        replayed = poutine.condition(program, data={"z": value})()
        assert replayed is value
        pyro.sample("w", dist.Normal(0.0, 1.0))


def test_what_can_be_stratified() -> None:
    weights = WEIGHTS.clone().requires_grad_()
    assert can_stratify(mixture(), [-1])
    assert can_stratify(mixture().expand((1, 5)), [-1])
    assert not can_stratify(mixture(), [-2])  # Several values a datum.
    assert not can_stratify(mixture().expand((2, 5)), [-1])
    assert not can_stratify(dist.Normal(0.0, 1.0), [-1])
    assert not can_stratify(mixture(weights=weights), [-1])
    with torch.no_grad():
        assert can_stratify(mixture(weights=weights), [-1])


@pytest.mark.parametrize("at_once", [True, False])
def test_several_values_a_datum_are_independent(at_once: bool) -> None:
    """An ELBO in which they multiply, against the same without strata."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-1):
            with pyro.plate("parts", 2, dim=-2):
                u = pyro.sample("u", dist.Normal(torch.zeros(1), 1.0).to_event(1)).squeeze(-1)
            pyro.sample("x", dist.Normal(u[..., :1, :] * u[..., 1:, :], 2.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        components = dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
        with pyro.plate("rows", len(x), dim=-1), pyro.plate("parts", 2, dim=-2):
            pyro.sample("u", FixedNormalMixture(dist.Categorical(torch.ones(2)), components))

    x, losses = torch.full((2000 if at_once else 200,), 1.5), []
    for stratified in (True, False):
        objective = TraceIWAE_ELBO(
            1, num_groups=10, stratified=stratified, vectorize_particles=at_once
        )
        losses.append(torch.tensor([objective.loss(model, guide, row) for row in x.chunk(20)]))
    means, errors = ([f(loss) for loss in losses] for f in (torch.mean, torch.std))
    error = 5 * (errors[0] ** 2 + errors[1] ** 2).sqrt() / 20**0.5
    assert abs(means[0] - means[1]) < error
    assert error < 0.15 * means[1]


# Gradients.


LOC = torch.tensor([[0.4], [-1.1]], dtype=torch.float64)


def normal_model(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.8).to_event(1), obs=x)


def guide_of(
    loc: torch.Tensor, kind: Any, logits: torch.Tensor | None = None
) -> Callable[[torch.Tensor], None]:
    weights = torch.zeros(2) if logits is None else logits

    def guide(x: torch.Tensor) -> None:
        components = dist.Normal(loc.expand(len(x), 2, 1), 0.9).to_event(1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", kind(dist.Categorical(logits=weights.expand(len(x), 2)), components))

    return guide


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [1, 2])
def test_gradients_of_the_bound_it_draws(kind: Any, num: int) -> None:
    """Against finite differences of the bound; by quadrature, so that no noise is left.

    With two particles each component has one of them: E_{q1 q2}[log mean w]. Where a mixture
    cannot follow its components, particles are independent, which is right as well.
    """
    x, rows = torch.tensor([[0.7]]), 60_000
    nodes = torch.linspace(-7, 7, 281)

    def bound(loc: torch.Tensor, stratified: bool) -> torch.Tensor:
        normal = torch.distributions.Normal(loc[:, 0], torch.tensor(0.9))
        parts = normal.log_prob(nodes.unsqueeze(-1)).exp()  # (nodes, 2)
        log_w = (
            torch.distributions.Normal(0.0, 1.0).log_prob(nodes)
            + torch.distributions.Normal(nodes, 0.8).log_prob(x[0])
            - parts.mean(-1).log()
        )
        mixed, step = parts.mean(-1), nodes[1] - nodes[0]
        if num == 1:
            return (mixed * log_w).sum() * step
        both = torch.logaddexp(log_w.unsqueeze(-1), log_w) - math.log(2)
        first, second = (parts[:, 0], parts[:, 1]) if stratified else (mixed, mixed)
        return (first.unsqueeze(-1) * second * both).sum() * step**2

    expected = []
    for stratified in (True, False):
        loc = LOC.clone().requires_grad_()
        value = bound(loc, stratified)
        expected.append((value.detach(), torch.autograd.grad(value, loc)[0]))
    loc = LOC.clone().requires_grad_()
    rowwise = loc.expand(rows, 2, 1).detach().clone().requires_grad_()
    objective = TraceIWAE_ELBO(num, stratified=True)
    loss = objective.differentiable_loss(normal_model, guide_of(rowwise, kind), x.expand(rows, 1))
    gradient = -torch.autograd.grad(loss, rowwise)[0]
    error = 5 * gradient.std(0) / math.sqrt(rows)
    assert error.max() < 0.2
    value = -loss.detach() / rows
    matches = [
        bool((gradient.mean(0) - wanted).abs().le(error).all()) and abs(float(value - level)) < 0.05
        for level, wanted in expected
    ]
    assert any(matches)
    if kind is FixedNormalMixture:
        assert matches[0]
        assert num == 1 or not matches[1]


@pytest.mark.parametrize(
    ("kind", "learnt"),
    [(FixedNormalMixture, False), (NormalMixture, False), (NormalMixture, True), (Plain, True)],
)
def test_the_loss_that_is_reported_is_that_of_training(kind: Any, learnt: bool) -> None:
    """``svi.evaluate_loss`` draws as ``svi.step`` does."""
    x, logits = torch.tensor([[0.7]]).expand(40_000, 1), torch.zeros(2, requires_grad=learnt)
    objective, guide = TraceIWAE_ELBO(2, stratified=True), guide_of(LOC * 3, kind, logits)
    first = objective.differentiable_loss(normal_model, guide, x).detach() / len(x)
    second = objective.loss(normal_model, guide, x) / len(x)
    assert float(first) == pytest.approx(second, abs=0.1)
