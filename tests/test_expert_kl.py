"""The KL to each modality's posterior, against normal formulae by hand."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_modalities import LinearModalities, mixed_patterns
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_vae import scale_kl
from pyro_vae.guides import MixtureOfExperts, ProductOfExperts
from pyro_vae.likelihoods import Normal
from pyro_vae.models import MultimodalVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceExpertKL_ELBO
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

close = torch.testing.assert_close
WIDTHS = {"image": 5, "sound": 4, "text": 3}


def kl(loc: Any, scale: Any, other_loc: Any, other_scale: Any) -> torch.Tensor:
    """Between diagonal normals, by hand, summed over the latents."""
    ratio = (scale / other_scale).square()
    distance = ((loc - other_loc) / other_scale).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


def parts(p: LinearModalities, batch: Any, present: Any) -> tuple[torch.Tensor, ...]:
    """KL to the prior and to the experts, row by row, 0 for those that a row lacks."""
    zeros = {n: torch.where(present[n].unsqueeze(-1), x, 0.0) for n, x in batch.items()}
    loc, scale = p.product(zeros, present)
    experts = torch.zeros(len(loc))
    for name in batch:
        alone = kl(loc, scale, *p.product({name: zeros[name]}, {name: present[name]}))
        experts = experts + torch.where(present[name], alone, 0.0)
    return kl(loc, scale, torch.zeros(()), torch.ones(())), experts


WEIGHTS = {
    "JMVAE-kl": {"expert_weight": 0.3},
    "MVTCAE": {
        "expert_weight": 2.5 * 0.6 / 3,
        "likelihood_weight": (3 - 0.6) / 3,
        "kl_weight": 2.5 * (1 - 0.6),
    },
    "experts alone": {"expert_weight": 1.0, "likelihood_weight": 0.0, "kl_weight": 0.0},
}


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_value_by_hand(weights: str, num_particles: int) -> None:
    """At the samples of the guide, with NaN where nothing was observed."""
    p, k = LinearModalities(), WEIGHTS[weights]
    full = {n: torch.ones(9, dtype=torch.bool) for n in WIDTHS}
    for batch, present in ((p.data(9), None), mixed_patterns(p.data(9))):
        of_prior, of_experts = parts(p, batch, present or full)
        objective = TraceExpertKL_ELBO(**k, num_particles=num_particles)
        pyro.set_rng_seed(3)
        bound = objective.loss(p.model, p.guide, batch, present)
        log_likelihood = of_prior.sum() - bound  # The KL of the bound is in closed form.
        expected = (
            k["expert_weight"] * of_experts
            + k.get("kl_weight", 1.0) * of_prior
            - k.get("likelihood_weight", 1.0) * log_likelihood / 9
        )
        pyro.set_rng_seed(3)
        found = objective.training_loss(p.model, p.guide, batch, present)
        close(found, expected.sum())
        pyro.set_rng_seed(3)
        stock = TraceMeanField_ELBO(
            num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1
        )
        assert bound == pytest.approx(stock.loss(p.model, p.guide, batch, present))


def library_pair(guide: Any = ProductOfExperts, **k: Any) -> Any:
    model = MultimodalVAE(
        {n: MLP(3, [], w) for n, w in WIDTHS.items()},
        {n: Normal() for n in WIDTHS},
        StandardNormalPrior(2),
        dict.fromkeys(WIDTHS, 1),
    )
    of_private = {n: MLP(w, [], 2) for n, w in WIDTHS.items()}
    return model, guide({n: MLP(w, [], 4) for n, w in WIDTHS.items()}, 2, of_private, **k)


def expert_terms(model: Any, guide: Any, *args: Any, **k: Any) -> torch.Tensor:
    objective = TraceExpertKL_ELBO(1.0, likelihood_weight=0.0, kl_weight=0.0, **k)
    return objective.training_loss(model, guide, *args)


def normal_of(guide: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    fn = poutine.trace(guide).get_trace(*args).nodes["z"]["fn"].base_dist
    return fn.loc, fn.scale


@pytest.mark.parametrize("with_prior", [True, False])
def test_gradients_flow_into_both_sides_and_private_latents_add_nothing(with_prior: bool) -> None:
    model, guide = library_pair(with_prior=with_prior)
    batch = LinearModalities().data()
    present = {"sound": torch.tensor([True, False] * 3)}
    joint, expected = normal_of(guide, batch, present), torch.zeros(())
    for name in WIDTHS:
        alone = kl(*joint, *normal_of(guide, {name: batch[name]}))
        expected = expected + (alone * present.get(name, torch.ones(6))).sum()
    found = expert_terms(model, guide, batch, present)
    close(found, expected)
    of_networks = list(guide.networks.parameters())
    grads = (torch.autograd.grad(v, of_networks) for v in (found, expected))
    for grad, other in zip(*grads, strict=True):
        close(grad, other)
        assert grad.any()
    unused = [*guide.private.parameters(), *model.parameters()]
    again = expert_terms(model, guide, batch, present)
    grads = torch.autograd.grad(again, unused, allow_unused=True)
    assert all(grad is None or grad.abs().max() < 1e-12 for grad in grads)


def test_a_single_modality_has_no_distance_from_itself() -> None:
    model, guide = library_pair()
    batch = LinearModalities().data()
    one = {"sound": batch["sound"]}
    assert expert_terms(model, guide, one).abs() < 1e-12
    assert expert_terms(model, guide, {**one, "text": None}).abs() < 1e-12
    absent = {n: torch.zeros(6, dtype=torch.bool) for n in WIDTHS}
    assert expert_terms(model, guide, batch, absent) == 0


def test_a_mixture_has_no_closed_form() -> None:
    """The mean of the log-ratio, within five standard errors of quadrature in one dimension."""
    model = MultimodalVAE(
        {n: MLP(1, [], w) for n, w in WIDTHS.items()},
        {n: Normal() for n in WIDTHS},
        StandardNormalPrior(1),
    )
    guide = MixtureOfExperts({n: MLP(w, [], 2) for n, w in WIDTHS.items()}, 1)
    batch = LinearModalities().data(3)
    grid = torch.linspace(-12, 12, 4001)
    traces = [poutine.trace(guide).get_trace({n: x}) for n, x in batch.items()]
    values = grid.reshape(-1, 1, 1)
    each = torch.stack([t.nodes["z"]["fn"].log_prob(values).T for t in traces])  # (3, batch, grid)
    mixture = each.exp().mean(0)
    ratios = mixture * (mixture.log() - each)
    expected = torch.trapezoid(ratios, grid).sum()
    objective = TraceExpertKL_ELBO(
        1.0, likelihood_weight=0.0, kl_weight=0.0, num_particles=200, vectorize_particles=True
    )
    draws = torch.stack([objective.training_loss(model, guide, batch).detach() for _ in range(20)])
    error = draws.std() / 20**0.5
    assert abs(draws.mean() - expected) < 5 * error
    assert 5 * error < 0.2 * expected


def plain_model(batch: Any, *, present: Any = None, noise: float = 0.5) -> None:
    """Names of its own, two latents in a chain, and a subsample of 30 rows."""
    num = len(next(iter(batch.values())))
    with pyro.plate("people", 30, subsample=torch.arange(num)):
        s = pyro.sample("trait", dist.Normal(0.0, 1.0))
        t = pyro.sample("mood", dist.Normal(s, 1.0))
        for name, x in batch.items():
            mask = (present or {}).get(name, torch.tensor(True))
            with poutine.mask(mask=mask):
                pyro.sample(name, dist.Normal(s + t, noise), obs=x)


def plain_moments(batch: Any, present: Any) -> torch.Tensor:
    masks = [(present or {}).get(n, torch.ones(len(x), dtype=torch.bool)) for n, x in batch.items()]
    total = sum(torch.where(m, x, 0.0) for m, x in zip(masks, batch.values(), strict=True))
    return torch.as_tensor(total) / 3


def plain_guide(batch: Any, *, present: Any = None, noise: float = 0.5) -> None:
    weight = pyro.param("weight", lambda: torch.tensor(0.7))
    loc = weight * plain_moments(batch, present)
    with pyro.plate("people", 30, subsample=torch.arange(len(loc))):
        s = pyro.sample("trait", dist.Normal(loc, noise))
        pyro.sample("mood", dist.Normal(s * loc, 0.6))


@pytest.mark.parametrize("how", [True, False, None])
def test_a_chain_of_latents(how: bool | None) -> None:
    """Given the first of the joint posterior, that of the second is in closed form too."""
    batch = {"a": torch.randn(4), "b": torch.randn(4)}
    present = {"b": torch.tensor([True, True, False, True])}
    k: dict[str, Any] = {"likelihood_weight": 0.0, "kl_weight": 0.0}
    for num in (1, 3):
        objective = TraceExpertKL_ELBO(1.0, **k, num_particles=num, vectorize_particles=how)
        pyro.set_rng_seed(1)
        found = objective.training_loss(plain_model, plain_guide, batch, present=present, noise=0.4)
        loc, expected = 0.7 * plain_moments(batch, present), torch.zeros(4)
        pyro.set_rng_seed(1)
        if how is False or num == 1:
            draws = [(torch.randn(4), torch.randn(4))[0] for _ in range(num)]
            s = loc + 0.4 * torch.stack(draws)
        else:
            s = loc + 0.4 * torch.randn(num, 4)
        for name in batch:
            other = 0.7 * plain_moments({name: batch[name]}, present)
            first = (loc - other).square() / 0.32
            second = (s * (loc - other)).square() / 0.72
            both = (first + second).mean(0)
            expected = expected + both * present.get(name, torch.ones(4))
        close(found, 30 / 4 * expected.sum())


def test_beta_and_weights_of_rows_multiply_it() -> None:
    model, guide = library_pair()
    batch = LinearModalities().data()
    alone = expert_terms(model, guide, batch)
    half = scale_kl(model, 0.5), scale_kl(guide, 0.5)
    close(expert_terms(*half, batch), alone / 2)
    thrice = poutine.scale(model, 3.0), poutine.scale(guide, 3.0)
    close(expert_terms(*thrice, batch), 3 * alone)


def test_weights_may_be_schedules() -> None:
    model, guide = library_pair()
    batch, schedule = LinearModalities().data(), LinearWarmup(2, end=50.0)
    objective = TraceExpertKL_ELBO(schedule, likelihood_weight=0.0, kl_weight=torch.tensor(0.0))
    found = []
    for _ in range(3):
        found.append(objective.training_loss(model, guide, batch).detach())
        schedule.step()
    close(torch.stack(found), torch.tensor([0.0, 25.0, 50.0]) * found[1] / 25)


def test_it_brings_single_modalities_close_to_all() -> None:
    z = torch.randn(100, 2)
    batch = {n: z @ torch.randn(2, 3) + 0.5 * torch.randn(100, 3) for n in ("image", "sound")}
    found = []
    for weight in (0.0, 1.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        likelihoods = {n: Normal() for n in batch}
        prior = StandardNormalPrior(2)
        model = MultimodalVAE({n: MLP(2, [], 3) for n in batch}, likelihoods, prior)
        guide = ProductOfExperts({n: MLP(3, [], 4) for n in batch}, 2)
        loss = TraceExpertKL_ELBO(weight)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        for _ in range(60):
            svi.step(batch)
        found.append(float(expert_terms(model, guide, batch).detach()) / 100)
    assert found[1] < 0.5 * found[0]


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("name", ["expert_weight", "likelihood_weight", "kl_weight"])
def test_weights_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"TraceExpertKL_ELBO: expected a finite {name} >= 0"):
        TraceExpertKL_ELBO(**{"expert_weight": 1.0, name: -1.0})


def test_programs_and_batches_that_do_not_fit() -> None:
    objective = TraceExpertKL_ELBO(1.0)
    with pytest.raises(TypeError, match="expected batch to be a mapping .*, got Tensor"):
        objective.loss(plain_model, plain_guide, torch.zeros(3))
    with pytest.raises(TypeError, match="expected batch to be a mapping .*, got NoneType"):
        objective.loss(plain_model, plain_guide)

    def model(batch: Any) -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=batch["a"].reshape(6))

    def guide(batch: Any) -> None:
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected one plate over the 3 rows of the batch"):
        objective.loss(model, guide, {"a": torch.zeros(3, 2)})

    def point(batch: Any) -> None:
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Delta(torch.zeros(6)))

    with pytest.raises(ValueError, match="expected a density for site 'z' in the guide, got a poi"):
        objective.loss(model, point, {"a": torch.zeros(6)})
