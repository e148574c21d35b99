"""FactorVAE: with the optimal discriminator in closed form, and one that is trained."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_codes import LinearCodes
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import logsigmoid

from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceFactor_ELBO

close = torch.testing.assert_close


class Optimal(nn.Module):
    """log q(z) - sum_j log q_j(z_j) of a normal q(z)."""

    def __init__(self, covariance: torch.Tensor) -> None:
        super().__init__()
        self.covariance = nn.Parameter(covariance)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        q = MultivariateNormal(torch.zeros(z.shape[-1]), self.covariance)
        product = Normal(0.0, self.covariance.diagonal().sqrt())
        return q.log_prob(z) - product.log_prob(z).sum(-1)


COVARIANCE = torch.tensor([[1.5, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.8]]).double()


@pytest.mark.parametrize("column", [False, True])
def test_value_and_gradient_with_the_optimal_discriminator(column: bool) -> None:
    p, gamma = LinearCodes(), 2.5
    z = p.codes(p.x, 7)
    elbo = Normal(z @ p.params["weight"], 0.7).log_prob(p.x).sum()
    elbo = elbo - kl_divergence(Normal(*p.moments(p.x)), p.prior(z)).sum()
    joint = MultivariateNormal(torch.zeros(3), COVARIANCE).log_prob(z)
    logit = joint - sum(Normal(0.0, COVARIANCE[j, j] ** 0.5).log_prob(z[:, j]) for j in range(3))
    expected = p.with_gradient(gamma * logit.sum() - elbo)
    discriminator: nn.Module = Optimal(COVARIANCE.clone())
    if column:
        discriminator = nn.Sequential(discriminator, nn.Unflatten(0, (5, 1)))
    objective = TraceFactor_ELBO(gamma, discriminator)
    close(p.of(objective.training_loss, 7), expected)


def test_the_optimal_discriminator_averages_to_the_total_correlation() -> None:
    x = MultivariateNormal(torch.zeros(3), COVARIANCE - 0.2 * torch.eye(3)).sample((20_000,))
    model, guide = normal_pair(0.2**0.5)
    objective = TraceFactor_ELBO(1.0, Optimal(COVARIANCE.clone()))
    runs = objective._runs(model, guide, (x,), {}, training=True)
    logits = objective._logits(runs[0].guide_trace.nodes["z"]["value"].unsqueeze(0))
    exact = 0.5 * (COVARIANCE.diagonal().log().sum() - COVARIANCE.logdet())
    assert abs(logits.mean() - exact) < 5 * logits.std() / 20_000**0.5
    bound, loss = objective._losses(runs, training=True)
    close(loss - bound, logits.sum())


def normal_pair(scale: float) -> tuple[Any, Any]:
    """z ~ N(x, scale) given x, and data that do not depend on z."""

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, scale).to_event(1))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    return model, guide


class Quadratic(nn.Module):
    """The family of the optimal discriminator between normal distributions: products of codes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(
            torch.stack([z[:, 0] ** 2, z[:, 0] * z[:, 1], z[:, 1] ** 2], 1)
        )
        return logits


def test_training_finds_the_total_correlation() -> None:
    """Logistic regression is consistent here; independent repetitions tell its error.

    Its average over steps takes the noise of single batches away.
    """
    correlation = 0.7
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])
    of_x = MultivariateNormal(torch.zeros(2), covariance - 0.1 * torch.eye(2))
    model, guide = normal_pair(0.1**0.5)
    z = MultivariateNormal(torch.zeros(2), covariance).sample((20_000,))
    found = []
    for _ in range(4):
        discriminator = Quadratic()
        adam = torch.optim.Adam(discriminator.parameters(), lr=0.05)
        objective = TraceFactor_ELBO(1.0, discriminator, optimizer=adam)
        logits = []
        for step in range(60):
            objective.loss_and_grads(model, guide, of_x.sample((1000,)))
            if step >= 30:
                logits.append(discriminator(z).mean().detach())
        found.append(torch.stack(logits).mean())
    exact = -0.5 * torch.tensor(1 - correlation**2).log()
    values = torch.stack(found)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact) < 5 * error
    assert error < 0.05 * exact


def test_one_step_of_the_discriminator_by_hand() -> None:
    p, seen = LinearCodes(), []
    discriminator = MLP(3, [4], 1)
    initial = copy.deepcopy(discriminator)
    sgd = torch.optim.SGD(discriminator.parameters(), lr=0.3)
    objective = TraceFactor_ELBO(2.0, discriminator, optimizer=sgd)
    objective.training_loss(p.model, p.guide, p.x)
    discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    z = p.codes(p.x, 7).detach()
    loc, scale = (t.detach() for t in p.moments(p.x))
    fresh = torch.cat([loc[:, :2] + scale[:, :2] * torch.randn(5, 2), (loc + scale * 0)[:, 2:]], -1)
    fresh[:, 2] += scale[:, 2] * torch.randn(5)
    pyro.set_rng_seed(7)
    objective.loss_and_grads(p.model, p.guide, p.x)
    _, of_codes, permuted = seen
    close(of_codes, z)
    assert not permuted.requires_grad
    close(permuted.sort(0).values, fresh.sort(0).values)
    order = [[fresh[:, j].tolist().index(v) for v in permuted[:, j].tolist()] for j in range(3)]
    assert len({tuple(o) for o in order}) == 3  # Every dimension goes its own way.
    assert list(range(5)) not in order
    right = logsigmoid(initial(of_codes)).mean() + logsigmoid(-initial(permuted)).mean()
    gradient = torch.autograd.grad(-right / 2, list(initial.parameters()))
    for new, old, grad in zip(
        discriminator.parameters(), initial.parameters(), gradient, strict=True
    ):
        close(new, old - 0.3 * grad)


def test_each_side_trains_itself_alone() -> None:
    p, discriminator = LinearCodes(), MLP(3, [4], 1)
    objective = TraceFactor_ELBO(2.0, discriminator)
    before = copy.deepcopy(discriminator.state_dict())
    objective.training_loss(p.model, p.guide, p.x).backward()
    objective.loss(p.model, p.guide, p.x)
    with torch.no_grad():
        objective.differentiable_loss(p.model, p.guide, p.x)
        objective.loss_and_grads(p.model, p.guide, p.x)
    assert all(q.grad is None and q.requires_grad for q in discriminator.parameters())
    close(discriminator.state_dict(), before)
    gradient = {name: q.grad.clone() for name, q in p.params.items()}
    objective._update(objective._runs(p.model, p.guide, (p.x,), {}, training=True))
    close({name: q.grad for name, q in p.params.items()}, gradient)
    assert not torch.equal(discriminator[0].weight, before["0.weight"])
    assert all(q.requires_grad for q in discriminator.parameters())


def test_running_statistics_are_those_of_its_own_training() -> None:
    p = LinearCodes()
    discriminator = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    objective = TraceFactor_ELBO(2.0, discriminator)
    objective.training_loss(p.model, p.guide, p.x)
    assert discriminator[0].num_batches_tracked == 0
    objective.loss_and_grads(p.model, p.guide, p.x)
    assert discriminator[0].num_batches_tracked == 2


def test_the_default_optimizer_is_the_papers() -> None:
    optimizer = TraceFactor_ELBO(1.0, MLP(3, [4], 1)).optimizer
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 1e-4
    assert optimizer.defaults["betas"] == (0.5, 0.9)


def test_resumed_is_uninterrupted() -> None:
    p = LinearCodes()

    def steps(objective: TraceFactor_ELBO) -> list[torch.Tensor]:
        pyro.set_rng_seed(11)
        for _ in range(4):
            objective.loss_and_grads(p.model, p.guide, p.x)
        return [q.detach().clone() for q in objective.discriminator.parameters()]

    first = TraceFactor_ELBO(2.0, MLP(3, [4], 1))
    steps(first)
    state = copy.deepcopy(first.state_dict())
    expected = steps(first)
    second = TraceFactor_ELBO(2.0, MLP(3, [4], 1))
    second.load_state_dict(state)
    close(steps(second), expected, rtol=0.0, atol=0.0)
    third = TraceFactor_ELBO(2.0, MLP(3, [4], 1))  # Without the optimizer's state.
    third.discriminator.load_state_dict(state["discriminator"])
    assert not torch.allclose(steps(third)[0], expected[0], rtol=1e-9)
    with pytest.raises(ValueError, match="expected the key 'optimizer', got"):
        third.load_state_dict({"discriminator": state["discriminator"]})


def rows_seen(run: Callable[[TraceFactor_ELBO], None]) -> list[int]:
    discriminator, seen = MLP(3, [4], 1), []
    objective = TraceFactor_ELBO(2.0, discriminator)
    hook = discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    run(objective)
    hook.remove()
    return seen


def test_rows_that_train_the_discriminator() -> None:
    p, keep = LinearCodes(), torch.tensor([True, False, True, True, False])

    def step(rows: int, **of_plate: Any) -> Callable[[TraceFactor_ELBO], None]:
        return lambda o: o.loss_and_grads(p.model, p.guide, p.x[:rows], **of_plate) and None

    # A first look, the loss, the codes and the permuted codes.
    assert rows_seen(step(5)) == [5, 5, 5, 5]
    assert rows_seen(step(5, mask=keep)) == [5, 5, 3, 3]
    assert rows_seen(step(1)) == [1, 1]  # Nothing to permute.
    assert rows_seen(step(5, mask=keep & ~keep)) == [5, 5]


def test_every_particle_is_seen() -> None:
    p = LinearCodes()
    discriminator, seen = MLP(3, [4], 1), []
    objective = TraceFactor_ELBO(2.0, discriminator, num_particles=3)
    objective.training_loss(p.model, p.guide, p.x)
    discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    objective.loss_and_grads(p.model, p.guide, p.x)
    assert seen == [15, 15, 15]


# What is refused.


def test_arguments_that_are_none_of_ours() -> None:
    with pytest.raises(TypeError, match="discriminator to be a torch module, got function"):
        TraceFactor_ELBO(1.0, lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a discriminator with parameters to train, got none"):
        TraceFactor_ELBO(1.0, nn.Flatten())
    network = MLP(3, [4], 1)
    with pytest.raises(TypeError, match="an optimizer from torch.optim, got PyroOptim"):
        TraceFactor_ELBO(1.0, network, optimizer=pyro.optim.Adam({"lr": 0.1}))
    other = torch.optim.Adam([*network.parameters(), *MLP(3, [4], 1).parameters()])
    with pytest.raises(ValueError, match="an optimizer of the discriminator's parameters, got oth"):
        TraceFactor_ELBO(1.0, network, optimizer=other)
    with pytest.raises(ValueError, match="expected a finite gamma >= 0, got -1"):
        TraceFactor_ELBO(-1.0, network)


@pytest.mark.parametrize(
    "discriminator",
    [
        MLP(4, [4], 1),
        nn.Linear(4, 1),
        MLP(3, [4], 2),
        nn.LSTM(3, 2),
        nn.Sequential(nn.Linear(3, 5), nn.Flatten(0)),
    ],
)
def test_discriminators_of_something_else(discriminator: nn.Module) -> None:
    p = LinearCodes()
    objective = TraceFactor_ELBO(1.0, discriminator.double())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"from codes \(batch, 3\) to one logit each, .* got "):
            objective.training_loss(p.model, p.guide, p.x)


def test_a_discriminator_elsewhere() -> None:
    p = LinearCodes()
    for network, match in (
        (MLP(3, [4], 1).float(), r"torch.float64 on cpu .* '0.weight' of torch.float32 on cpu"),
        (MLP(3, [4], 1).to("meta"), r"torch.float64 on cpu .* on meta. Call discriminator.to"),
    ):
        with pytest.raises(ValueError, match=match):
            TraceFactor_ELBO(1.0, network).loss(p.model, p.guide, p.x)


def test_a_code_without_a_density() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x))

    match = "TraceFactor_ELBO: expected a density for site 'z' in the guide, got a point mass"
    with pytest.raises(ValueError, match=match):
        TraceFactor_ELBO(1.0, MLP(1, [4], 1)).loss(model, guide, torch.randn(4))
