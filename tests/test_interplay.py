"""Joints of interacting latents against brute force, closed forms and quadrature."""

import copy
import itertools
import math
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae import scale_kl
from pyro_vae.evaluation import importance_weighted_log_likelihood
from pyro_vae.guides.interplay import AmortizedInterplay
from pyro_vae.handlers import replay_values
from pyro_vae.interplay import Interplay
from pyro_vae.interplay_prior import InterplayPrior
from pyro_vae.interplay_sites import sample_interplay
from pyro_vae.latents import reconstruct
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.models.interplay import InterplayVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives.interplay import TraceInterplay_ELBO, _anything_observed
from pyro_vae.objectives.weighted_draws import WeightedDraws
from pyro_vae.statistics import BernoulliStatistics, NormalStatistics, Statistics

close = torch.testing.assert_close
Kind = Literal["normal", "normal-squares", "bernoulli"]

DIMS = {"a": 2, "b": 1, "c": 2}
PAIRS = list(itertools.combinations(DIMS, 2))


def within(values: torch.Tensor, expected: torch.Tensor, errors: float = 5.0) -> None:
    """The mean of independent values, along the first dimension, is what it should be."""
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() <= errors * error + 1e-12).all()


# ---------------------------------------------------------------- binary: brute force


def binary(*batch: int, requires_grad: bool = False) -> Interplay:
    natural = {n: torch.randn(*batch, d).requires_grad_(requires_grad) for n, d in DIMS.items()}
    weights = {
        (m, n): torch.randn(DIMS[m], DIMS[n]).requires_grad_(requires_grad) for m, n in PAIRS
    }
    return Interplay(BernoulliStatistics(), natural, weights)


def all_states(dims: dict[str, int]) -> dict[str, torch.Tensor]:
    table = torch.tensor(list(itertools.product((0.0, 1.0), repeat=sum(dims.values()))))
    return dict(zip(dims, table.split(list(dims.values()), -1), strict=True))


def brute(joint: Interplay) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """All states and their log-density, written out once more: ``(states, *batch)``."""
    z = all_states({n: joint.dim(n) for n in joint.names})
    total: Any = 0.0
    for k in range(len(next(iter(z.values())))):
        rows = {n: v[k] for n, v in z.items()}
        value: Any = sum((joint.natural[n] * rows[n]).sum(-1) for n in joint.names)
        for (m, n), w in joint.interaction.items():
            value = value + torch.einsum("i,ij,j", rows[m], w, rows[n])
        total = value.unsqueeze(0) if k == 0 else torch.cat([total, value.unsqueeze(0)])
    return z, total


@pytest.mark.parametrize("batch", [(), (3,)])
def test_binary_log_partition_and_its_gradient(batch: tuple[int, ...]) -> None:
    joint = binary(*batch, requires_grad=True)
    z, log_density = brute(joint)
    expanded = {n: v.reshape(len(v), *(1,) * len(batch), -1) for n, v in z.items()}
    close(joint.log_density(expanded), log_density)
    close(joint.log_partition(), log_density.logsumexp(0))
    leaves = [*joint.natural.values(), *joint.interaction.values()]
    ours = torch.autograd.grad(joint.log_partition().sum(), leaves)
    theirs = torch.autograd.grad(log_density.logsumexp(0).sum(), leaves)
    for first, second in zip(ours, theirs, strict=True):
        close(first, second)
    # Expected sufficient statistics.
    p = log_density.softmax(0)
    close(ours[0], torch.einsum("s...,sd->...d", p, z["a"]))


def test_binary_exact_samples_and_gibbs_samples_have_the_marginals() -> None:
    joint = binary()
    z, log_density = brute(joint)
    p, states = log_density.softmax(0), torch.cat(list(z.values()), -1)
    outer = torch.einsum("s,si,sj->ij", p, states, states)
    many = joint.expand((20_000,))
    exact = torch.cat(list(many.sample().values()), -1)
    within(exact.unsqueeze(-1) * exact.unsqueeze(-2), outer)
    latents = {n: torch.zeros(20_000, d) for n, d in DIMS.items()}
    for _ in range(40):
        latents = many.sweep(latents)
    drawn = torch.cat(list(latents.values()), -1)
    within(drawn.unsqueeze(-1) * drawn.unsqueeze(-2), outer)


@pytest.mark.parametrize("num_temperatures", [1, 3, 20])
def test_annealed_weights_are_unbiased(num_temperatures: int) -> None:
    joint = binary(2)
    z, log_density = brute(joint)
    latents, log_weight = joint.annealed(num_temperatures, (20_000,))
    assert latents["a"].shape == (20_000, 2, 2)
    weights = (log_weight - log_density.logsumexp(0)).exp()
    within(weights, torch.ones(2))
    mean = torch.einsum("sb,sd->bd", log_density.softmax(0), z["a"])
    within(weights.unsqueeze(-1) * latents["a"], mean)


def test_given_some_modalities_the_others_have_the_conditional_density() -> None:
    joint = binary()
    z, log_density = brute(joint)
    known = torch.tensor([1.0, 0.0])
    rest = joint.given({"a": known})
    assert rest.names == ("b", "c")
    rows = (z["a"] == known).all(-1)
    close(
        rest.log_density({n: z[n][rows] for n in rest.names}) - rest.log_partition(),
        log_density[rows].log_softmax(0),
    )


def test_evidence_adds_to_the_natural_parameters_and_a_missing_one_is_nothing() -> None:
    joint = binary()
    z, log_density = brute(joint)
    evidence = torch.randn(3, 1)
    tilted = joint.tilted({"b": evidence})
    expected = log_density.unsqueeze(-1) + (z["b"].unsqueeze(1) * evidence).sum(-1)
    close(tilted.log_partition(), expected.logsumexp(0))
    close(joint.tilted({}).log_partition(), joint.log_partition())


# ---------------------------------------------------------------- normal, values interact


def normal(*batch: int) -> tuple[Interplay, torch.distributions.MultivariateNormal]:
    """A joint and the multivariate normal that it is."""
    total = sum(DIMS.values())
    precisions = {n: 1 + torch.rand(*batch, d) for n, d in DIMS.items()}
    linear = {n: torch.randn(*batch, d) for n, d in DIMS.items()}
    natural = {n: torch.cat([linear[n], -0.5 * precisions[n]], -1) for n in DIMS}
    weights = {(m, n): 0.5 * torch.rand(DIMS[m], DIMS[n]) - 0.2 for m, n in PAIRS}
    matrix = torch.cat(list(precisions.values()), -1).diag_embed()
    at = {"a": (0, 2), "b": (2, 3), "c": (3, 5)}
    for (m, n), w in weights.items():
        rows, columns = slice(*at[m]), slice(*at[n])
        matrix[..., rows, columns] -= w
        matrix[..., columns, rows] -= w.mT
    loc = torch.linalg.solve(matrix, torch.cat(list(linear.values()), -1))
    assert loc.shape == (*batch, total)
    fn = torch.distributions.MultivariateNormal(loc, precision_matrix=matrix)
    return Interplay(NormalStatistics(), natural, weights), fn


@pytest.mark.parametrize("full", [False, True])
def test_normal_log_partition_is_that_of_a_multivariate_normal(full: bool) -> None:
    joint, fn = normal(3)
    z = torch.randn(4, 3, 5)
    parts = dict(zip(DIMS, z.split(list(DIMS.values()), -1), strict=True))
    assert joint.is_exact
    close(joint.log_density(parts) - joint.log_partition(), fn.log_prob(z))
    rest = joint.given({"a": parts["a"]})
    marginal = torch.distributions.MultivariateNormal(
        fn.loc[:, :2], fn.covariance_matrix[:, :2, :2]
    )
    own = (joint.natural["a"] * joint.statistics.of(parts["a"])).sum(-1)
    close(own + rest.log_partition() - joint.log_partition(), marginal.log_prob(parts["a"]))
    if full:  # The same W, the squares named and zero.
        wide = {}
        for (m, n), w in joint.interaction.items():
            wide[m, n] = torch.zeros(2 * DIMS[m], 2 * DIMS[n])
            wide[m, n][: DIMS[m], : DIMS[n]] = w
        other = Interplay(joint.statistics, joint.natural, wide)
        assert not other.is_exact
        close(other.log_density(parts), joint.log_density(parts))


def test_normal_exact_samples_gibbs_samples_and_annealed_weights() -> None:
    joint, fn = normal()
    many = joint.expand((20_000,))
    second = fn.covariance_matrix + fn.loc.unsqueeze(-1) * fn.loc
    latents = {n: torch.zeros(20_000, d) for n, d in DIMS.items()}
    for _ in range(60):
        latents = many.sweep(latents)
    for draws in (many.sample(), latents):
        drawn = torch.cat(list(draws.values()), -1)
        within(drawn, fn.loc)
        within(drawn.unsqueeze(-1) * drawn.unsqueeze(-2), second)
    _, log_weight = joint.annealed(10, (20_000,))
    within((log_weight - joint.log_partition()).exp(), torch.ones(()))


@pytest.mark.parametrize("kind", ["normal", "binary"])
def test_what_samples_and_the_log_partition_share_is_worked_out_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a gradient apart, also where a joint was expanded."""
    joint = normal(3)[0] if kind == "normal" else binary(3)
    natural = {n: v.clone().requires_grad_() for n, v in joint.natural.items()}
    joint = Interplay(joint.statistics, natural, joint.interaction)
    solved: list[Interplay] = []
    solve = type(joint.statistics).solve

    def counted(self: Statistics, joint: Interplay) -> torch.Tensor:
        solved.append(joint)
        return solve(self, joint)

    monkeypatch.setattr(type(joint.statistics), "solve", counted)
    with torch.no_grad():
        wide = joint.expand((4, 3))
        for _ in range(2):
            assert wide.sample()["a"].shape == (4, 3, 2)
            assert wide.expand((5, 4, 3)).log_partition().shape == (5, 4, 3)
    assert [each is joint for each in solved] == [True]
    value = joint.log_partition()
    close(wide.log_partition(), value.expand(4, 3))
    wide.sample()
    assert len(solved) == 2
    # Expected statistics, in spite of what was worked out without a gradient before.
    (grad,) = torch.autograd.grad(value.sum(), natural["a"])
    draws = {n: z.detach() for n, z in joint.expand((20_000, 3)).sample().items()}
    within(joint.statistics.of(draws["a"]), grad)


# ---------------------------------------------------------------- normal, squares interact

SQUARES = [[0.9, -0.5], [0.45, -0.6]]
"""W of (z, z^2) with (z, z^2)."""


def squares(shift: float = 0.0) -> Interplay:
    natural = {"a": torch.tensor([0.5 + shift, -0.5]), "b": torch.tensor([-0.2, -0.7])}
    return Interplay(NormalStatistics(), natural, {("a", "b"): torch.tensor(SQUARES)})


def grid(num: int = 241) -> tuple[dict[str, torch.Tensor], float]:
    line = torch.linspace(-9, 9, num)
    a, b = torch.meshgrid(line, line, indexing="ij")
    z = {"a": a.reshape(-1, 1), "b": b.reshape(-1, 1)}
    return z, 2 * math.log(float(line[1] - line[0]))


def test_squares_density_is_the_formula() -> None:
    a, b = 0.7, -1.3
    value = squares().log_density({"a": torch.tensor([a]), "b": torch.tensor([b])})
    expected = 0.5 * a - 0.5 * a**2 - 0.2 * b - 0.7 * b**2
    expected += 0.9 * a * b - 0.5 * a * b**2 + 0.45 * a**2 * b - 0.6 * a**2 * b**2
    close(value, torch.tensor(expected))


def test_squares_by_quadrature() -> None:
    joint = squares()
    z, log_cell = grid()
    log_density = joint.log_density(z)
    log_partition = log_density.logsumexp(0) + log_cell
    coarse = grid(181)
    other = joint.log_density(coarse[0]).logsumexp(0) + coarse[1]
    close(log_partition, other, atol=1e-9, rtol=0)  # The quadrature has converged.
    assert not joint.is_exact
    moments = torch.cat([z["a"], z["b"], z["a"] ** 2, z["b"] ** 2, z["a"] * z["b"]], -1)
    expected = log_density.softmax(0) @ moments
    latents, log_weight = joint.annealed(10, (20_000,))
    weights = (log_weight - log_partition).exp()
    within(weights, torch.ones(()))
    for _ in range(40):
        latents = joint.expand((20_000,)).sweep(latents)
    a, b = latents["a"], latents["b"]
    within(torch.cat([a, b, a**2, b**2, a * b], -1), expected)


# ---------------------------------------------------------------- sites


def traced(program: Any, *args: Any) -> poutine.Trace:
    trace = poutine.trace(program).get_trace(*args)
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("kind", ["binary", "normal"])
@pytest.mark.parametrize("num_sweeps", [None, 2])
def test_site_densities_add_up_to_the_joint(kind: str, num_sweeps: int | None) -> None:
    joint = binary() if kind == "binary" else normal()[0]

    def program() -> Any:
        with pyro.plate("particles", 3, dim=-2), pyro.plate("data", 4):
            return sample_interplay(joint, num_sweeps=num_sweeps)

    trace = traced(program)
    z = trace.nodes["_RETURN"]["value"]
    assert {n: v.shape for n, v in z.items()} == {n: (3, 4, d) for n, d in DIMS.items()}
    total = sum(trace.nodes[f"z_{n}"]["log_prob"] for n in DIMS)
    close(total, joint.log_density(z) - joint.log_partition())


def test_values_put_in_place_of_the_first_latent_move_the_others() -> None:
    """Conditioned on its first site, the rest is drawn given that value."""
    joint = binary()
    z, log_density = brute(joint)
    known = torch.tensor([1.0, 1.0])

    def program() -> Any:
        with pyro.plate("data", 20_000):
            return sample_interplay(joint)

    latents = poutine.condition(program, data={"z_a": known.expand(20_000, 2)})()
    rows = (z["a"] == known).all(-1)
    within(latents["c"], log_density[rows].softmax(0) @ z["c"][rows])
    assert (latents["a"] == known).all()


def test_without_a_normaliser_there_is_no_density() -> None:
    def program() -> Any:
        with pyro.plate("data", 4):
            return sample_interplay(squares())

    with pytest.raises(ValueError, match=r"log-partition is known, got modalities \['a', 'b'\]"):
        traced(program)


# ---------------------------------------------------------------- the model and its guide


def pair(kind: Kind, num_sweeps: int | None = None) -> tuple[InterplayVAE, AmortizedInterplay]:
    """Two modalities of 2 and 1 latents, strongly coupled."""
    dims = {"a": 2, "b": 1}
    prior = InterplayPrior(dims, kind, num_sweeps=num_sweeps)
    per_dim = 1 if kind == "bernoulli" else 2
    model = InterplayVAE(
        {n: MLP(d, [], 3) for n, d in dims.items()}, {n: Normal(0.8) for n in dims}, prior
    )
    guide = AmortizedInterplay({n: MLP(3, [], per_dim * d) for n, d in dims.items()}, prior)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, guide


def batch_of(num_rows: int = 3) -> dict[str, torch.Tensor | None]:
    return {"a": torch.randn(num_rows, 3), "b": torch.randn(num_rows, 3)}


PRESENT = {"a": torch.tensor([True, True, False])}


def log_likelihood(model: InterplayVAE, z: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    """Per row, of what is observed under ``PRESENT``."""
    of_a = dist.Normal(model.decoders["a"](z["a"]), 0.8).log_prob(batch["a"]).sum(-1)
    of_b = dist.Normal(model.decoders["b"](z["b"]), 0.8).log_prob(batch["b"]).sum(-1)
    result: torch.Tensor = of_a.where(PRESENT["a"], 0.0) + of_b
    return result


def posterior(model: InterplayVAE, guide: AmortizedInterplay, batch: Any) -> Interplay:
    """The guide's joint, written out: ``(batch,)``."""
    prior = model.prior
    evidence = {n: prior.statistics.evidence(guide.networks[n](batch[n])) for n in ("a", "b")}
    evidence["a"] = evidence["a"].where(PRESENT["a"].unsqueeze(-1), 0.0)
    joint = prior.joint()
    natural = {n: joint.natural[n] + evidence[n] for n in joint.names}
    return Interplay(prior.statistics, natural, joint.interaction)


def on_states(
    model: InterplayVAE, guide: AmortizedInterplay, batch: Any, points: Any, log_cell: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By a sum over ``(points, 1, dim)``: log p(x | z), log p(z), log q(z | x) with a cell each."""
    p = model.prior.joint().log_density(points)
    q = posterior(model, guide, batch).log_density(points)
    of_p, of_q = p.logsumexp(0) + log_cell, q.logsumexp(0) + log_cell
    return log_likelihood(model, points, batch), p - of_p, q - of_q


def elbo_by_sum(
    model: InterplayVAE,
    guide: AmortizedInterplay,
    batch: Any,
    points: Any,
    log_cell: float = 0.0,
    beta: float = 1.0,
) -> torch.Tensor:
    log_x, p, q = on_states(model, guide, batch, points, log_cell)
    return ((q + log_cell).exp() * (log_x + beta * (p - q))).sum()


def elbo_of_normals(
    model: InterplayVAE, guide: AmortizedInterplay, batch: Any, beta: float = 1.0
) -> torch.Tensor:
    """In closed form: normal prior, guide and likelihood, linear decoders."""
    p, q = (
        torch.distributions.MultivariateNormal(torch.linalg.solve(matrix, linear), matrix.inverse())
        for joint in (model.prior.joint(), posterior(model, guide, batch))
        for linear, matrix in [precision_of(joint)]
    )
    total = -beta * torch.distributions.kl_divergence(q, p).sum()
    for name, dims in {"a": slice(0, 2), "b": slice(2, 3)}.items():
        decoder = model.decoders[name][0]
        loc = decoder(q.loc[:, dims])
        spread = torch.einsum(
            "oi,bij,oj->bo", decoder.weight, q.covariance_matrix[:, dims, dims], decoder.weight
        )
        error = (batch[name] - loc).square() + spread
        log_x = (-0.5 * error / 0.64 - math.log(0.8) - 0.5 * math.log(2 * math.pi)).sum(-1)
        total = total + (log_x.where(PRESENT["a"], 0.0) if name == "a" else log_x).sum()
    return total


def precision_of(joint: Interplay) -> tuple[torch.Tensor, torch.Tensor]:
    linear = torch.cat([joint.natural["a"][..., :2], joint.natural["b"][..., :1]], -1)
    diagonal = torch.cat([joint.natural["a"][..., 2:], joint.natural["b"][..., 1:]], -1)
    weight = torch.zeros(3, 3)
    weight[:2, 2:] = 1.0
    weight = weight * torch.nn.functional.pad(joint.interaction["a", "b"], (2, 0, 0, 1))
    return linear, (-2 * diagonal).diag_embed() - weight - weight.mT


def estimates(
    elbo: TraceInterplay_ELBO, model: Any, guide: Any, batch: Any, num: int, beta: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent values of the bound ``(num,)`` and its gradients ``(num, parameters)``."""
    programs = scale_kl(model, beta), scale_kl(guide, beta)
    bounds, grads = [], []
    for _ in range(num):
        bound = -elbo.differentiable_loss(*programs, batch, PRESENT)
        bounds.append(bound.detach())
        grads.append(gradient(bound, model, guide))
    return torch.stack(bounds), torch.stack(grads)


def gradient(value: torch.Tensor, model: Any, guide: Any) -> torch.Tensor:
    grads = torch.autograd.grad(value, [*model.parameters(), *guide.parameters()])
    return torch.cat([grad.flatten() for grad in grads])


def all_points() -> dict[str, torch.Tensor]:
    return {n: v.unsqueeze(1) for n, v in all_states({"a": 2, "b": 1}).items()}


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_binary_elbo_and_its_gradient_are_those_of_a_sum(beta: float) -> None:
    model, guide = pair("bernoulli")
    batch = batch_of()
    exact = elbo_by_sum(model, guide, batch, all_points(), beta=beta)
    bounds, grads = estimates(TraceInterplay_ELBO(20), model, guide, batch, 30, beta)
    within(bounds, exact)
    within(grads, gradient(exact, model, guide))


def test_binary_gradient_from_two_particles_is_unbiased() -> None:
    model, guide = pair("bernoulli")
    batch = batch_of()
    exact = elbo_by_sum(model, guide, batch, all_points())
    _, grads = estimates(TraceInterplay_ELBO(2), model, guide, batch, 150)
    within(grads, gradient(exact, model, guide))


def test_binary_gradient_by_gibbs_samples() -> None:
    """With many sweeps, and the reported bound below the ELBO by little."""
    model, guide = pair("bernoulli", num_sweeps=30)
    batch = batch_of()
    exact = elbo_by_sum(model, guide, batch, all_points())
    elbo = TraceInterplay_ELBO(50, num_chains=1000)
    bounds, grads = estimates(elbo, model, guide, batch, 25)
    within(grads, gradient(exact, model, guide))
    error = bounds.std() / math.sqrt(len(bounds))
    assert exact - 0.5 < bounds.mean() < exact + 5 * error


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_normal_elbo_and_its_gradient_are_the_closed_form(beta: float) -> None:
    model, guide = pair("normal")
    batch = batch_of()
    exact = elbo_of_normals(model, guide, batch, beta)
    bounds, grads = estimates(TraceInterplay_ELBO(20), model, guide, batch, 30, beta)
    within(bounds, exact)
    within(grads, gradient(exact, model, guide))


def test_normal_gradient_by_gibbs_samples() -> None:
    model, guide = pair("normal", num_sweeps=30)
    batch = batch_of()
    exact = elbo_of_normals(model, guide, batch)
    elbo = TraceInterplay_ELBO(50, num_chains=1000)
    bounds, grads = estimates(elbo, model, guide, batch, 25)
    within(grads, gradient(exact, model, guide))
    error = bounds.std() / math.sqrt(len(bounds))
    assert exact - 0.5 < bounds.mean() < exact + 5 * error


def small_pair(num_sweeps: int | None = None) -> tuple[InterplayVAE, AmortizedInterplay]:
    """Squares interact; one latent each, for quadrature."""
    dims = {"a": 1, "b": 1}
    prior = InterplayPrior(dims, "normal-squares", num_sweeps=num_sweeps)
    nn.init.normal_(prior.raw_interaction["a & b"], std=1.0)
    model = InterplayVAE({n: MLP(1, [], 3) for n in dims}, {n: Normal(0.8) for n in dims}, prior)
    return model, AmortizedInterplay({n: MLP(3, [], 2) for n in dims}, prior)


def test_squares_elbo_and_its_gradient_by_quadrature() -> None:
    model, guide = small_pair()
    batch = batch_of()
    z, log_cell = grid()
    points = {n: v.unsqueeze(1) for n, v in z.items()}
    exact = elbo_by_sum(model, guide, batch, points, log_cell)
    elbo = TraceInterplay_ELBO(50, num_chains=1000)
    bounds, grads = estimates(elbo, model, guide, batch, 25)
    within(grads, gradient(exact, model, guide))
    error = bounds.std() / math.sqrt(len(bounds))
    assert exact - 0.5 < bounds.mean() < exact + 5 * error
    value, standard_error = elbo.log_partition(model, guide, batch, PRESENT)
    log_z = model.prior.joint().log_density(z).logsumexp(0) + log_cell
    assert (value - log_z).abs() < 5 * standard_error
    assert 0 < standard_error < 0.1


def test_a_chain_that_has_not_mixed_still_reports_a_bound() -> None:
    """One sweep, strong interactions: below log p(x), far from the ELBO of q."""
    model, guide = pair("bernoulli", num_sweeps=1)
    nn.init.constant_(model.prior.raw_interaction["a & b"], 4.0)
    batch = batch_of()
    with torch.no_grad():
        log_x, p, _ = on_states(model, guide, batch, all_points(), 0.0)
    log_marginal = (log_x + p).logsumexp(0).sum()
    elbo = TraceInterplay_ELBO(2000, num_chains=20_000)
    bounds, _ = estimates(elbo, model, guide, batch, 5)
    error = bounds.std() / math.sqrt(len(bounds))
    assert bounds.mean() < log_marginal + 5 * error
    # exp of it is unbiased for p(x), whatever the chain.
    chains = posterior(model, guide, batch).annealed(1, (200_000,))
    with torch.no_grad():
        gain = log_likelihood(model, chains[0], batch) + model.prior.joint().log_density(chains[0])
        gain = gain - posterior(model, guide, batch).log_density(chains[0]) + chains[1]
        gain = gain - model.prior.joint().log_partition()
    within((gain - (log_x + p).logsumexp(0)).exp(), torch.ones(3))


@pytest.mark.parametrize("kind", ["normal", "bernoulli"])
def test_other_objectives_and_evaluation_take_what_has_a_normaliser(kind: Kind) -> None:
    model, guide = pair(kind)
    batch = batch_of()
    with torch.no_grad():
        if kind == "normal":
            exact = elbo_of_normals(model, guide, batch)
        else:
            exact = elbo_by_sum(model, guide, batch, all_points())
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    losses = [elbo.loss(model, guide, batch, PRESENT) for _ in range(30)]
    within(-torch.tensor(losses), exact)
    estimate = importance_weighted_log_likelihood(
        model, guide, batch, PRESENT, num_particles=500, chunk_size=500
    )
    marginal = log_marginal(model, batch, kind)
    assert ((estimate.log_likelihood - marginal).abs() < 5 * estimate.standard_error).all()


def log_marginal(model: InterplayVAE, batch: Any, kind: Kind) -> torch.Tensor:
    """log p of what is observed, per row, by a sum or in closed form."""
    joint = model.prior.joint()
    with torch.no_grad():
        if kind == "bernoulli":
            points = all_points()
            log_p = joint.log_density(points) - joint.log_partition()
            return (log_likelihood(model, points, batch) + log_p).logsumexp(0)
        linear, matrix = precision_of(joint)
        decoders = [model.decoders[n][0] for n in ("a", "b")]
        weight = torch.block_diag(*(d.weight for d in decoders))
        loc = weight @ torch.linalg.solve(matrix, linear) + torch.cat([d.bias for d in decoders])
        cov = weight @ matrix.inverse() @ weight.mT + 0.64 * torch.eye(6)
        both = torch.distributions.MultivariateNormal(loc, cov)
        of_b = torch.distributions.MultivariateNormal(loc[3:], cov[3:, 3:])
        full = both.log_prob(torch.cat([batch["a"], batch["b"]], -1))
        return full.where(PRESENT["a"], of_b.log_prob(batch["b"]))


@pytest.mark.parametrize("num_sweeps", [None, 4])
def test_weights_of_data_multiply_the_bound(num_sweeps: int | None) -> None:
    model, guide = pair("bernoulli", num_sweeps)
    batch, values = batch_of(), []
    for scale in (1.0, 3.0):
        programs = poutine.scale(model, scale), poutine.scale(guide, scale)
        pyro.set_rng_seed(1)
        values.append(TraceInterplay_ELBO(3).loss(*programs, batch, PRESENT))
    close(3 * values[0], values[1])


def test_masked_rows_add_nothing() -> None:
    model, guide = pair("bernoulli")
    batch, mask = batch_of(), torch.tensor([False, False, False])
    programs = poutine.mask(model, mask), poutine.mask(guide, mask)
    assert TraceInterplay_ELBO(3).loss(*programs, batch) == 0


# ---------------------------------------------------------------- missing modalities


@pytest.mark.parametrize("kind", ["normal", "bernoulli"])
def test_rows_without_a_modality_are_those_of_a_batch_without_it(kind: Kind) -> None:
    """Values there are NaN; posterior, density and gradients do not see them."""
    model, guide = pair(kind)
    batch: Any = batch_of()
    batch["a"][2] = math.nan
    trace = poutine.trace(guide).get_trace(batch, PRESENT)
    z = {n: trace.nodes[f"z_{n}"]["value"] for n in ("a", "b")}
    trace.compute_log_prob()

    def rows_of(program: Any, given: Any, rows: Any, *args: Any) -> poutine.Trace:
        data = {f"z_{n}": v[rows] for n, v in z.items()}
        return traced(poutine.condition(program, data=data), given, *args)

    for rows, names in {(0, 1): ("a", "b"), (2,): ("b",)}.items():
        part = {n: batch[n][list(rows)] for n in names}
        for program in (guide, model):
            of_part = rows_of(program, part, list(rows))
            of_all = rows_of(program, batch, [0, 1, 2], PRESENT)
            for site in ("z_a", "z_b", *(f"x_{n}" for n in names if program is model)):
                close(
                    of_part.nodes[site]["log_prob"],
                    of_all.nodes[site]["log_prob"][list(rows)],
                    msg=site,
                )
    TraceInterplay_ELBO(4).differentiable_loss(model, guide, batch, PRESENT).backward()
    for parameter in [*model.parameters(), *guide.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["normal", "normal-squares", "bernoulli"])
def test_sites_of_a_run(kind: Kind) -> None:
    model, guide = pair(kind)
    batch: Any = batch_of()
    result = model({"a": batch["a"], "b": None})
    assert result["a"] is batch["a"]
    assert result["b"].shape == (3, 3)
    assert set(model({"a": batch["a"]})) == {"a"}
    codes = guide({"a": batch["a"], "b": None})
    assert {n: v.shape for n, v in codes.items()} == {"a": (3, 2), "b": (3, 1)}
    trace = poutine.trace(model).get_trace({"a": batch["a"], "b": None})
    assert trace.nodes["x_b"]["mask"] is False
    assert not trace.nodes["x_b"]["is_observed"]
    assert [f.name for f in trace.nodes["z_a"]["cond_indep_stack"]] == ["data"]


NOTHING = {n: torch.zeros(3, dtype=torch.bool) for n in ("a", "b")}


@pytest.mark.parametrize("kind", ["normal", "bernoulli"])
def test_with_nothing_observed_the_guide_is_the_prior(kind: Kind) -> None:
    model, guide = pair(kind)
    of_guide, of_model = (traced(program, batch_of(), NOTHING) for program in (guide, model))
    joint = of_guide.nodes["z_a"]["fn"].joint
    for name, natural in model.prior.joint().natural.items():
        close(joint.natural[name], natural.expand(3, -1))
    assert of_model.nodes["z_a"]["log_prob"].shape == (3,)
    estimate = importance_weighted_log_likelihood(
        model, guide, batch_of(), NOTHING, num_particles=5
    )
    close(estimate.log_likelihood, torch.zeros(3))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("kind", ["normal", "normal-squares", "bernoulli"])
@pytest.mark.parametrize("num_sweeps", [None, 2])
def test_rows_with_nothing_observed_add_exactly_nothing(
    kind: Kind, num_sweeps: int | None, at_once: bool
) -> None:
    """Gibbs chains included, whose estimates of the two normalisers differ."""
    model, guide = pair(kind, num_sweeps)
    elbo = TraceInterplay_ELBO(3, num_chains=10, vectorize_particles=at_once)
    batch = batch_of()
    loss = elbo.differentiable_loss(model, guide, batch, NOTHING)
    assert loss.item() == 0
    assert gradient(loss, model, guide).eq(0).all()
    assert elbo.loss(poutine.scale(model, 2.0), poutine.scale(guide, 2.0), batch, NOTHING) == 0


@pytest.mark.parametrize("num_sweeps", [None, 20])
def test_rows_with_nothing_observed_leave_the_others_alone(num_sweeps: int | None) -> None:
    model, guide = pair("bernoulli", num_sweeps)
    two: Any = {n: x[:2] for n, x in batch_of(2).items() if x is not None}
    batch = {n: torch.cat([x, torch.full((2, 3), math.nan)]) for n, x in two.items()}
    present = dict.fromkeys(batch, torch.tensor([True, True, False, False]))
    elbo = TraceInterplay_ELBO(200, num_chains=1000)
    values, grads = [], []
    for data, *rest in ((two,), (batch, present)):
        losses = [elbo.differentiable_loss(model, guide, data, *rest) for _ in range(20)]
        values.append(torch.stack([loss.detach() for loss in losses]))
        grads.append(torch.stack([gradient(loss, model, guide) for loss in losses]))
    for of_two, of_four in (values, grads):
        error = ((of_two.var(0) + of_four.var(0)) / 20).sqrt()
        assert ((of_two.mean(0) - of_four.mean(0)).abs() <= 5 * error + 1e-12).all()


def test_a_row_counts_where_one_of_its_elements_is_observed() -> None:
    """A plate within a datum, whose elements are masked one by one."""
    prior = InterplayPrior({"a": 1, "b": 1}, "bernoulli")

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("rows", 3, dim=-2):
            loc = sum(z[..., 0] for z in prior().values())
            with pyro.plate("elements", 2, dim=-1), poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("rows", 3, dim=-2):
            prior()

    x, seen = torch.randn(3, 2), torch.tensor([[True, False], [False, False], [True, True]])
    elbo = TraceInterplay_ELBO(2)
    elbo.loss(model, guide, x, seen)
    run = elbo._runs(model, guide, (x, seen), {}, training=False)[0]
    known = _anything_observed(run, WeightedDraws.of([run]))
    assert known.tolist() == [[True], [False], [True]]


# ---------------------------------------------------------------- training


def test_training_raises_the_bound_and_one_modality_predicts_the_other() -> None:
    """Two views of one sign, each with noise."""
    sign = torch.randint(2, (200, 1)) * 2.0 - 1
    batch: Any = {n: sign * torch.ones(3) + 0.3 * torch.randn(200, 3) for n in ("a", "b")}
    for kind in ("normal", "bernoulli"):
        pyro.clear_param_store()
        kinds: Kind = "normal" if kind == "normal" else "bernoulli"
        prior = InterplayPrior({"a": 1, "b": 1}, kinds)
        model = InterplayVAE(
            {n: MLP(1, [], 3) for n in batch}, {n: Normal(0.3) for n in batch}, prior
        )
        width = prior.statistics.per_dim
        guide = AmortizedInterplay({n: MLP(3, [], width) for n in batch}, prior)
        elbo = TraceInterplay_ELBO(4)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.2}), elbo)
        before = elbo.loss(model, guide, batch)
        for _ in range(50):
            svi.step(batch)
        assert elbo.loss(model, guide, batch) < before - 200
        with torch.no_grad():
            z = guide({"a": batch["a"], "b": None})
            crossed = model.decoders["b"](z["b"])
        again = reconstruct(model, guide, {"a": batch["a"], "b": None}, site="x_b", sample=True)
        assert again.shape == crossed.shape
        agreement = (crossed.sign() == sign).double().mean()
        assert agreement > 0.7, kind


def test_parameters_stay_the_models_and_a_copy_of_both_trains() -> None:
    model, guide = pair("bernoulli")
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in model.parameters()}
    batch = batch_of()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceInterplay_ELBO(4))
    svi.step(batch)
    other, of_other = copy.deepcopy((model, guide))
    assert of_other._prior[0] is other.prior
    before = [p.detach().clone() for p in (*other.parameters(), *of_other.parameters())]
    SVI(other, of_other, pyro.optim.Adam({"lr": 0.1}), TraceInterplay_ELBO(4)).step(batch)
    for old, new in zip(before, (*other.parameters(), *of_other.parameters()), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize("kind", ["normal", "normal-squares", "bernoulli"])
def test_float32_and_three_modalities(kind: Kind) -> None:
    dims = {"a": 2, "b": 1, "c": 3}
    prior = InterplayPrior(dims, kind)
    model = InterplayVAE(
        {n: MLP(d, [], 4) for n, d in dims.items()}, dict.fromkeys(dims, Bernoulli()), prior
    )
    width = prior.statistics.per_dim
    guide = AmortizedInterplay({n: MLP(4, [], width * d) for n, d in dims.items()}, prior)
    model, guide = model.float(), guide.float()
    batch = {n: torch.ones(5, 4, dtype=torch.float32) for n in dims}
    loss = TraceInterplay_ELBO(3).differentiable_loss(model, guide, batch)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["normal", "normal-squares"])
@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
def test_any_parameters_have_a_normaliser(kind: Kind, size: float) -> None:
    """The constructor of the joint checks it."""
    prior = InterplayPrior({"a": 1, "b": 4, "c": 2}, kind)
    for _ in range(5):
        for parameter in prior.raw_interaction.values():
            nn.init.normal_(parameter, std=size)
        for parameter in prior.raw_natural.values():
            nn.init.normal_(parameter, std=1.0)
        joint = prior.joint()
        if kind == "normal":
            assert joint.log_partition().isfinite()


# ---------------------------------------------------------------- errors


NATURAL = {"a": torch.tensor([0.0, -0.5]), "b": torch.tensor([0.0, -0.5])}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {("a", "b"): torch.zeros(3, 1)},
            r"expected W of \('a', 'b'\) of shape \(1, 1\) or \(2, 2\)",
        ),
        ({("a", "c"): torch.zeros(1, 1)}, r"two of the modalities \['a', 'b'\], got \('a', 'c'\)"),
        ({("a", "a"): torch.zeros(1, 1)}, "does not act on itself"),
        ({("a", "b"): torch.zeros(1, 1), ("b", "a"): torch.zeros(1, 1)}, "and its reverse"),
        ({("a", "b"): torch.ones(1, 1)}, "too strong .* from pyro_vae.priors.InterplayPrior"),
        ({("a", "b"): torch.tensor([[0.0, 0.0], [0.0, 0.1]])}, "a W of two squares above 0"),
        ({("a", "b"): torch.tensor([[0.0, 0.1], [0.0, 0.0]])}, "without one of the two squares"),
        ({("a", "b"): torch.tensor([[0.0, 1.5], [0.0, -1.0]])}, "interactions too strong"),
    ],
)
def test_interactions_that_cannot_be(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interplay(NormalStatistics(), NATURAL, weights)


def test_natural_parameters_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="expected 2 natural parameters .* modality 'a'"):
        Interplay(NormalStatistics(), {"a": torch.zeros(3)}, {})
    flat = {**NATURAL, "b": torch.tensor([0.0, 0.0])}
    with pytest.raises(ValueError, match="of a square of 0, which is not < 0"):
        Interplay(NormalStatistics(), flat, {})
    joint = Interplay(NormalStatistics(), NATURAL, {})
    with pytest.raises(ValueError, match="of a square of 0.5, which is not < 0"):
        joint.tilted({"a": torch.tensor([0.0, 1.0])})
    with pytest.raises(ValueError, match=r"expected evidence of widths .* got \(3,\) for 'a'"):
        joint.tilted({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="for 'sound'"):
        joint.tilted({"sound": torch.zeros(2)})


def test_a_normaliser_is_looked_for_while_validation_is_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not again where evidence can only help."""
    strong = {("a", "b"): torch.ones(1, 1)}
    pyro.enable_validation(False)
    try:
        Interplay(NormalStatistics(), NATURAL, strong)
        Interplay(NormalStatistics(), NATURAL, {}).tilted({"a": torch.tensor([0.0, 1.0])})
    finally:
        pyro.enable_validation(True)
    joint = Interplay(NormalStatistics(), NATURAL, {})
    monkeypatch.setattr(NormalStatistics, "check", lambda *_: pytest.fail("checked"))
    joint.tilted({"a": torch.tensor([[3.0, -1.0], [1.0, 0.0]])})
    with pytest.raises(pytest.fail.Exception, match="checked"):
        joint.tilted({"a": torch.tensor([[3.0, -1.0], [1.0, 0.1]])})


def test_without_closed_form() -> None:
    with pytest.raises(ValueError, match=r"Interplay.log_partition: .* NormalStatistics of dim"):
        squares().log_partition()
    with pytest.raises(ValueError, match=r"Interplay.sample: expected a joint whose log-part"):
        squares().sample()
    with pytest.raises(ValueError, match="expected num_temperatures >= 1, got 0"):
        squares().annealed(0)
    natural = {"a": torch.zeros(13), "b": torch.zeros(13)}
    assert not Interplay(BernoulliStatistics(), natural, {}).is_exact
    natural = {"a": torch.zeros(40), "b": torch.zeros(12)}
    assert Interplay(BernoulliStatistics(), natural, {}).is_exact


def test_arguments_of_prior_model_and_guide() -> None:
    unknown: Any = "gamma"
    with pytest.raises(ValueError, match="expected kind to be one of"):
        InterplayPrior({"a": 1, "b": 1}, unknown)
    with pytest.raises(ValueError, match="expected two modalities or more"):
        InterplayPrior({"a": 1})
    with pytest.raises(ValueError, match=r"expected dims\['b'\] >= 1, got 0"):
        InterplayPrior({"a": 1, "b": 0})
    with pytest.raises(ValueError, match="expected num_sweeps >= 1, got 0"):
        InterplayPrior({"a": 1, "b": 1}, num_sweeps=0)
    prior = InterplayPrior({"a": 1, "b": 1})
    functions = dict.fromkeys("ab", lambda loc: dist.Normal(loc, 1.0).to_event(1))
    vae = InterplayVAE({n: MLP(1, [], 3) for n in "ab"}, functions, prior)
    assert vae({"a": torch.zeros(5, 3), "b": None})["b"].shape == (5, 3)
    unfit: Any = {"a": Normal(), "b": 0.8}
    with pytest.raises(
        TypeError, match=r"likelihoods\['b'\] to be a module or a function, got flo"
    ):
        InterplayVAE({n: MLP(1, [], 3) for n in "ab"}, unfit, prior)
    with pytest.raises(ValueError, match="expected likelihoods of the prior's modalities"):
        InterplayVAE({n: MLP(1, [], 3) for n in "ab"}, {"a": Normal()}, prior)
    with pytest.raises(ValueError, match="expected decoders of the prior's modalities"):
        InterplayVAE({"a": MLP(1, [], 3)}, {"a": Normal()}, prior)
    with pytest.raises(ValueError, match="expected networks of the prior's modalities"):
        AmortizedInterplay({"a": MLP(3, [], 2)}, prior)
    guide = AmortizedInterplay({"a": MLP(3, [], 2), "b": MLP(3, [], 3)}, prior)
    with pytest.raises(ValueError, match=r"network of 'b' to return shape \(5, 2\), got \(5, 3\)"):
        guide({"b": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match="expected num_sweeps >= 1"):
        sample_interplay(prior.joint(), num_sweeps=0)


def test_batches_that_cannot_be() -> None:
    for program in pair("normal"):
        with pytest.raises(ValueError, match="got 'sound'"):
            program({"sound": torch.zeros(5, 3)})
        with pytest.raises(ValueError, match="expected the same number of rows"):
            program({"a": torch.zeros(5, 3), "b": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match=r"expected batch\['a'\] of shape \(batch, 3\)"):
        pair("normal")[0]({"a": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match="expected finite data at site 'x_a'"):
        pair("normal")[0]({"a": torch.full((5, 3), math.nan)})


def test_programs_that_the_objective_cannot_take() -> None:
    model, guide = pair("bernoulli", num_sweeps=2)
    batch = batch_of()
    with pytest.raises(ValueError, match="expected num_particles >= 2 for site 'z_a'"):
        TraceInterplay_ELBO(1).loss(model, guide, batch)
    with pytest.raises(ValueError, match="expected num_chains >= 2"):
        TraceInterplay_ELBO(num_chains=1)
    fixed = replay_values(guide, {"z_a": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="expected a guide that draws all latents"):
        TraceInterplay_ELBO(2, vectorize_particles=False).loss(model, fixed, batch)

    def plain(batch: Any) -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch["a"][:, 0])

    def of_plain(batch: Any) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected one interplay in the model"):
        TraceInterplay_ELBO(2).loss(plain, of_plain, batch)
    with pytest.raises(ValueError, match="one scale and one mask .* got others at site 'z_"):
        TraceInterplay_ELBO(2).loss(model, scale_kl(guide, 0.5), batch)
    turned = InterplayPrior({"b": 1, "a": 2}, "bernoulli")
    other = AmortizedInterplay({"a": MLP(3, [], 2), "b": MLP(3, [], 1)}, turned)
    with pytest.raises(ValueError, match="the same modalities in the same order"):
        TraceInterplay_ELBO(2).loss(model, other, batch)


def test_a_mode_that_the_chains_of_the_prior_never_meet() -> None:
    """All ones, where the data lie; the chains start at all zeros, behind a barrier."""
    prior = InterplayPrior({"a": 8, "b": 8}, "bernoulli", num_sweeps=30)
    with torch.no_grad():
        prior.raw_interaction["a & b"].fill_(1.6)
        for natural in prior.raw_natural.values():
            natural.fill_(-6.1)
    exact = prior.joint().log_partition()
    decoders = {name: MLP(8, [], 2) for name in ("a", "b")}
    model = InterplayVAE(decoders, {name: Normal(0.5) for name in decoders}, prior)
    guide = AmortizedInterplay({name: MLP(2, [], 8) for name in decoders}, prior)
    with torch.no_grad():
        for network in guide.networks.values():
            for parameter in network.parameters():
                parameter.fill_(12.0 if parameter.dim() == 1 else 0.0)
        batch = {name: decoder(torch.ones(3, 8)) for name, decoder in decoders.items()}
    objective = TraceInterplay_ELBO(10)
    value, _ = objective.log_partition(model, guide, batch)
    assert abs(value - exact) < 0.1
    with torch.no_grad():  # The prior's own chains do not know.
        _, log_weight = prior.joint().annealed(15, (100,), num_more=15)
    assert log_weight.logsumexp(0) - math.log(100) < exact - 3
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
    of_states = [
        Normal(0.5)(decoder(states)).log_prob(batch[name][:1]) + states @ prior.raw_natural[name]
        for name, decoder in decoders.items()
    ]
    coupling = states @ prior.joint().interaction["a", "b"] @ states.T
    both = of_states[0].unsqueeze(-1) + of_states[1] + coupling
    log_p = float((both.logsumexp((0, 1)) - exact).detach())
    losses = torch.tensor([objective.loss(model, guide, batch) / 3 for _ in range(20)])
    error = float(losses.std()) / 20**0.5
    assert -float(losses.mean()) < log_p + 5 * error
    assert -float(losses.mean()) > log_p - 1


def test_one_lucky_chain_of_the_guide_does_not_overrule_those_of_the_prior() -> None:
    """Their weights have heavy tails: the larger of the two estimates would be too large."""
    prior = InterplayPrior({"a": 5, "b": 5}, "normal-squares")
    model = InterplayVAE(
        {name: MLP(5, [], 2) for name in ("a", "b")}, {"a": Normal(), "b": Normal()}, prior
    )
    guide = AmortizedInterplay({name: MLP(2, [], 10) for name in ("a", "b")}, prior)
    batch = {name: torch.randn(50, 2) for name in ("a", "b")}
    with torch.no_grad():
        _, log_weight = prior.joint().annealed(15, (20_000,), num_more=15)
    exact = log_weight.logsumexp(0) - math.log(20_000)
    objective = TraceInterplay_ELBO()
    found = torch.stack([objective.log_partition(model, guide, batch)[0] for _ in range(60)])
    assert (found - exact).abs().max() < 0.15
