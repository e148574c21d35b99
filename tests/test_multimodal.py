"""``MultimodalVAE`` and its guides: exact answers for every pattern of what is observed.

With the experts of a linear-Gaussian model the product is the exact posterior, so that every
single log-weight is log p of what is observed. The mixtures are compared with sums by hand.
"""

import copy
import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_modalities import WIDTHS, LinearModalities, Tensors, all_patterns, mixed_patterns
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import evaluation, likelihoods
from pyro_vae import importance_weighted_log_likelihood as log_likelihood
from pyro_vae.guides import AmortizedSet, MixtureOfExperts, MixtureOfProducts, ProductOfExperts
from pyro_vae.handlers import replay_values
from pyro_vae.models import MultimodalVAE
from pyro_vae.nets import _SMALLEST_SCALE, MLP, NormalEncoder
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.priors import GaussianMixturePrior, StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

NAMES = tuple(WIDTHS)
ROWS = 9


# The linear pair.


class Expert(nn.Module):
    """A modality's likelihood of the code, as a network would put it; without parameters."""

    def __init__(self, oracle: LinearModalities, name: str) -> None:
        super().__init__()
        self.oracle, self.name = oracle, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loc, scale = self.oracle.expert(self.name, x)
        return torch.cat([loc, (scale - _SMALLEST_SCALE).expm1().log()], -1)


def experts(oracle: LinearModalities) -> dict[str, nn.Module]:
    return {name: Expert(oracle, name) for name in NAMES}


def linear_model(oracle: LinearModalities, **how: Any) -> MultimodalVAE:
    decoders = {name: nn.Linear(oracle.latent_dim, width) for name, width in WIDTHS.items()}
    with torch.no_grad():
        for name, decoder in decoders.items():
            decoder.weight.copy_(oracle.weight[name])
            decoder.bias.copy_(oracle.loc[name])
    noise = {name: likelihoods.Normal(oracle.scale[name]) for name in NAMES}
    return MultimodalVAE(decoders, noise, StandardNormalPrior(oracle.latent_dim), **how)


def marginal(oracle: LinearModalities, complete: Tensors, present: Tensors) -> torch.Tensor:
    """log p of what is observed in each row, from the joint normal of the data."""
    result = []
    for row in range(len(complete["image"])):
        seen = [name for name in NAMES if present[name][row]]
        if not seen:
            result.append(torch.zeros(()))
            continue
        loc, weight, scale = (
            torch.cat([part[name] for name in seen])
            for part in (oracle.loc, oracle.weight, oracle.scale)
        )
        covariance = weight @ weight.T + scale.square().diag()
        value = torch.cat([complete[name][row] for name in seen])
        result.append(torch.distributions.MultivariateNormal(loc, covariance).log_prob(value))
    return torch.stack(result)


def by_row(program: Any, *args: Any, among: str = "") -> torch.Tensor:
    """Log-density of each row of all sites whose name begins so, nats."""
    trace = poutine.trace(program).get_trace(*args)
    trace.compute_log_prob()
    sites = [s for n, s in trace.nodes.items() if s["type"] == "sample" and n.startswith(among)]
    total: torch.Tensor = sum(site["log_prob"] for site in sites if site["name"] != "data")
    return total


def log_weights(model: Any, guide: Any, *args: Any) -> torch.Tensor:
    """log p(x, z) - log q(z | x) of one particle, for each row."""
    trace = poutine.trace(guide).get_trace(*args)
    return by_row(poutine.replay(model, trace=trace), *args) - by_row(
        poutine.replay(guide, trace=trace), *args
    )


def tellings(pattern: Any) -> list[tuple[Any, ...]]:
    """The ways to say what is observed."""
    if not pattern.seen:
        return [(pattern.batch, pattern.present), ({}, pattern.present)]
    hidden = {name: mask for name, mask in pattern.present.items() if name not in pattern.seen}
    return [
        (pattern.batch, pattern.present),
        (pattern.batch_of_seen,),
        (pattern.batch_with_none,),
        (pattern.batch_of_seen, hidden),
        (pattern.batch_with_none, hidden),
    ]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_the_exact_product_has_equal_log_weights_in_every_pattern(latent_dim: int) -> None:
    oracle = LinearModalities(latent_dim)
    model, guide = linear_model(oracle), ProductOfExperts(experts(oracle), latent_dim)
    complete = oracle.data(ROWS)
    for pattern in all_patterns(complete):
        expected = marginal(oracle, complete, pattern.present)
        for args in tellings(pattern):
            for _ in range(2):
                assert_close(log_weights(model, guide, *args).detach(), expected)


def test_the_exact_product_in_rows_that_differ() -> None:
    oracle = LinearModalities()
    model, guide = linear_model(oracle), ProductOfExperts(experts(oracle), 2)
    complete = oracle.data(ROWS)
    batch, present = mixed_patterns(complete)
    kept = copy.deepcopy((batch, present))
    expected = marginal(oracle, complete, present)
    assert_close(oracle.exact.log_prob(batch, present), expected)
    assert_close(log_weights(model, guide, batch, present).detach(), expected)
    loc, scale = oracle.product(batch, present)
    fn = poutine.trace(guide).get_trace(batch, present).nodes["z"]["fn"].base_dist
    assert_close((fn.loc, fn.scale), (loc, scale))
    # Every way to train and to evaluate.
    assert float(Trace_ELBO().loss(model, guide, batch, present)) == pytest.approx(
        -float(expected.sum())
    )
    for elbo in (
        Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
        TraceIWAE_ELBO(3),
        TraceIWAE_ELBO(3, vectorize_particles=False),
    ):
        assert elbo.loss(model, guide, batch, present) == pytest.approx(-float(expected.sum()))
    estimate = log_likelihood(model, guide, batch, present, num_particles=40, chunk_size=7)
    assert_close((estimate.log_likelihood, estimate.elbo), (expected, expected))
    assert float(estimate.standard_error.max()) < 1e-6
    torch.testing.assert_close((batch, present), kept, equal_nan=True)


@pytest.mark.parametrize("kind", [MixtureOfExperts, MixtureOfProducts, ProductOfExperts])
def test_any_guide_estimates_the_exact_likelihood(kind: Any) -> None:
    """Within five standard errors, with rows that miss different modalities."""
    oracle = LinearModalities()
    model = linear_model(oracle)
    guide = kind(experts(oracle), 2)
    complete = oracle.data(16)
    batch, present = mixed_patterns(complete)
    estimate = log_likelihood(model, guide, batch, present, num_particles=2000)
    error = (estimate.log_likelihood - marginal(oracle, complete, present)).abs()
    assert (error < 5 * estimate.standard_error + 1e-9).all()
    nobody = ~torch.stack(list(present.values())).any(0)
    assert nobody.any()
    for value in (estimate.log_likelihood, estimate.elbo):
        assert float(value[nobody].abs().max()) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """A float32 program stays one, whatever torch's default is."""
    oracle = LinearModalities(dtype=dtype)
    model = linear_model(oracle).to(dtype)
    complete = oracle.data(16)
    batch, present = mixed_patterns(complete)
    expected = marginal(oracle, complete, present).double()
    for guide in (ProductOfExperts(experts(oracle), 2), MixtureOfProducts(experts(oracle), 2)):
        trace = poutine.trace(guide).get_trace(batch, present)
        assert trace.nodes["z"]["value"].dtype == dtype
        assert trace.nodes["z"]["fn"].log_prob(trace.nodes["z"]["value"]).dtype == dtype
        estimate = log_likelihood(model, guide, batch, present, num_particles=200)
        error = (estimate.log_likelihood - expected).abs()
        assert (error < 5 * estimate.standard_error + 1e-4).all()


# Densities by hand.


def product_by_hand(
    normals: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.distributions.Distribution:
    precision = sum((scale**-2 for _, scale in normals), torch.zeros(()))
    loc = sum((loc * scale**-2 for loc, scale in normals), torch.zeros(())) / precision
    fn = torch.distributions.Normal(loc, precision**-0.5)
    return torch.distributions.Independent(fn, 1)


PRIOR = (torch.zeros(2), torch.ones(2))


def density_by_hand(
    kind: str, experts: dict[str, tuple[torch.Tensor, torch.Tensor]], z: torch.Tensor
) -> torch.Tensor:
    """log q(z | these experts) of one row, at all z."""
    normals = list(experts.values())
    prior = (torch.zeros(2), torch.ones(2))
    if not normals:
        return product_by_hand([prior]).log_prob(z)
    if kind == "ProductOfExperts":
        return product_by_hand([*normals, prior]).log_prob(z)
    if kind == "product without prior":
        return product_by_hand(normals).log_prob(z)
    if kind == "MixtureOfExperts":
        parts = [product_by_hand([normal]) for normal in normals]
    else:
        subsets = [s for size in range(1, 4) for s in combinations(normals, size)]
        with_prior = [] if kind == "products without prior" else [prior]
        parts = [product_by_hand([*subset, *with_prior]) for subset in subsets]
    return torch.stack([part.log_prob(z) for part in parts]).exp().mean(0).log()


def nets(out: int = 4, hidden: int = 5) -> dict[str, nn.Module]:
    return {name: MLP(width, [hidden], out, activation=nn.Tanh) for name, width in WIDTHS.items()}


GUIDES: dict[str, Callable[..., Any]] = {
    "ProductOfExperts": lambda networks: ProductOfExperts(networks, 2),
    "product without prior": lambda networks: ProductOfExperts(networks, 2, with_prior=False),
    "MixtureOfExperts": lambda networks: MixtureOfExperts(networks, 2),
    "MixtureOfProducts": lambda networks: MixtureOfProducts(networks, 2),
    "products without prior": lambda networks: MixtureOfProducts(networks, 2, with_prior=False),
    "all seven subsets": lambda networks: MixtureOfProducts(networks, 2, num_subsets=7),
}
EVERY: dict[str, Callable[..., Any]] = {
    **GUIDES,
    "learnt weights": lambda networks: ProductOfExperts(networks, 2, learn_weights=True),
    "four subsets": lambda networks: MixtureOfProducts(networks, 2, num_subsets=4),
    "AmortizedSet": lambda networks: AmortizedSet(networks, 2, MLP(4, [5], 4)),
}


def q_of(guide: Any, *args: Any) -> Any:
    return poutine.trace(guide).get_trace(*args).nodes["z"]["fn"]


@pytest.mark.parametrize("kind", GUIDES)
def test_densities_by_hand(kind: str) -> None:
    networks = nets()
    guide, oracle = GUIDES[kind](networks), LinearModalities()
    batch, present = mixed_patterns(oracle.data(ROWS))
    q = q_of(guide, batch, present)
    z = torch.randn(6, ROWS, 2)
    got = q.log_prob(z).detach()
    for row in range(ROWS):
        of_row = {}
        for name in NAMES:
            if present[name][row]:
                normal = NormalEncoder(networks[name])(batch[name][row]).base_dist
                of_row[name] = (normal.loc.detach(), normal.scale.detach())
        assert_close(got[:, row], density_by_hand(kind, of_row, z[:, row]))
        # The same row alone, told by keys.
        alone = {name: batch[name][row : row + 1] for name in of_row}
        if of_row:
            assert_close(
                q_of(guide, alone).log_prob(z[:, row : row + 1])[:, 0].detach(), got[:, row]
            )


def test_learnt_weights_are_exponents() -> None:
    guide, batch = ProductOfExperts(nets(), 2, learn_weights=True), LinearModalities().data(ROWS)
    plain = ProductOfExperts(dict(guide.networks.items()), 2)
    z = torch.randn(ROWS, 2)
    assert_close(q_of(guide, batch).log_prob(z), q_of(plain, batch).log_prob(z))
    with torch.no_grad():
        guide.log_weights.copy_(torch.randn(3, 2))
    # Of each expert its own, however few take part, in any order.
    for seen in (["sound"], ["text", "image"], list(NAMES)):
        precision, weighted = torch.ones(ROWS, 2), torch.zeros(ROWS, 2)
        for name in seen:
            normal = NormalEncoder(guide.networks[name])(batch[name]).base_dist
            own = guide.log_weights[NAMES.index(name)].exp() * normal.scale**-2
            precision, weighted = precision + own, weighted + own * normal.loc
        q = q_of(guide, {name: batch[name] for name in seen}).base_dist
        assert_close((q.loc, q.scale), (weighted / precision, precision**-0.5))


def test_the_set_encoder_adds_embeddings() -> None:
    guide = AmortizedSet(nets(), 2, MLP(4, [5], 4))
    batch, present = mixed_patterns(LinearModalities().data(ROWS))
    q = q_of(guide, batch, present).base_dist
    for row in range(ROWS):
        seen = [name for name in NAMES if present[name][row]]
        if not seen:
            assert (q.loc[row] == 0).all()
            assert (q.scale[row] == 1).all()
            continue
        total = sum(guide.networks[name](batch[name][row]) for name in seen)
        normal = NormalEncoder(guide.head)(total).base_dist
        assert_close((q.loc[row], q.scale[row]), (normal.loc, normal.scale))


# What holds of all guides.


@pytest.fixture(params=EVERY)
def guide(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(4)
    return EVERY[request.param](nets())


def test_all_ways_to_say_what_is_observed_are_one(guide: Any) -> None:
    z = torch.randn(5, ROWS, 2)
    for pattern in all_patterns(LinearModalities().data(ROWS)):
        first, *others = [q_of(guide, *args).log_prob(z).detach() for args in tellings(pattern)]
        for other in others:
            assert_close(other, first)


def test_the_order_of_keys_does_not_matter(guide: Any) -> None:
    batch, present = mixed_patterns(LinearModalities().data(ROWS))
    z = torch.randn(ROWS, 2)
    expected = q_of(guide, batch, present).log_prob(z)
    turned = [dict(reversed(given.items())) for given in (batch, present)]
    assert torch.equal(q_of(guide, *turned).log_prob(z), expected)
    torch.manual_seed(1)
    value = guide(batch, present)
    torch.manual_seed(1)
    assert torch.equal(guide(*turned), value)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "four subsets"])
def test_the_order_in_the_constructor_does_not_matter(kind: str) -> None:
    networks = nets()
    first = EVERY[kind](networks)
    second = EVERY[kind](dict(reversed(networks.items())))
    if kind == "AmortizedSet":
        second.head = first.head
    if kind == "learnt weights":
        with torch.no_grad():
            first.log_weights.copy_(torch.randn(3, 2))
            second.log_weights.copy_(first.log_weights.flip(0))
    batch, present = mixed_patterns(LinearModalities().data(ROWS))
    z = torch.randn(ROWS, 2)
    assert_close(q_of(first, batch, present).log_prob(z), q_of(second, batch, present).log_prob(z))


def test_rows_are_independent(guide: Any) -> None:
    oracle = LinearModalities()
    model = linear_model(oracle)
    batch, present = mixed_patterns(oracle.data(ROWS))
    trace = poutine.trace(guide).get_trace(batch, present)
    values = {"z": trace.nodes["z"]["value"]}
    order = torch.randperm(ROWS)
    for program in (model, guide):
        expected = by_row(poutine.condition(program, data=values), batch, present)
        moved = [{name: part[order] for name, part in given.items()} for given in (batch, present)]
        given = {name: value[order] for name, value in values.items()}
        assert_close(by_row(poutine.condition(program, data=given), *moved), expected[order])
        one = [{name: part[3:4] for name, part in given.items()} for given in (batch, present)]
        given = {name: value[3:4] for name, value in values.items()}
        assert_close(by_row(poutine.condition(program, data=given), *one), expected[3:4])


def test_with_nothing_observed_it_is_the_prior(guide: Any) -> None:
    nobody = {"sound": torch.zeros(ROWS, dtype=torch.bool)}
    z = torch.randn(4, ROWS, 2)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    nan = {"sound": torch.full((ROWS, WIDTHS["sound"]), torch.nan)}
    for batch in ({}, {"image": None}, nan):
        torch.testing.assert_close(
            q_of(guide, batch, nobody).log_prob(z), expected, rtol=1e-14, atol=1e-14
        )
        assert guide(batch, nobody).isfinite().all()


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_a_row_with_nothing_observed_adds_nothing(guide: Any, elbo: Any) -> None:
    """To the loss and to its gradient: the same with and without the row."""
    model = linear_model(LinearModalities())
    complete = LinearModalities().data(4)
    nobody = {name: torch.tensor([True, False, True, True]) for name in NAMES}
    batch = {
        name: torch.where(nobody[name].unsqueeze(-1), complete[name], torch.nan) for name in NAMES
    }
    trace = poutine.trace(guide).get_trace(batch, nobody)
    results = []
    for rows in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 3])):
        values = {"z": trace.nodes["z"]["value"].detach()[rows]}
        args = [{name: part[rows] for name, part in mapping.items()} for mapping in (batch, nobody)]
        for program in (model, guide):
            program.zero_grad()
        log_p, log_q = (by_row(replay_values(p, values), *args) for p in (model, guide))
        if len(rows) == 4:
            assert float((log_p - log_q).detach()[1]) == pytest.approx(0.0, abs=1e-14)
        (log_p - log_q).sum().backward()
        gradients = [p.grad.clone() for m in (model, guide) for p in m.parameters()]
        results.append([(log_p - log_q).sum().detach(), *gradients])
    assert_close(*results)
    loss = elbo.loss(model, guide, {}, {"text": torch.zeros(3, dtype=torch.bool)})
    assert loss == pytest.approx(0.0, abs=1e-12)


def test_gradients_are_finite_in_every_pattern(guide: Any) -> None:
    oracle = LinearModalities()
    model = linear_model(oracle)
    batch, present = mixed_patterns(oracle.data(ROWS))
    for bad in (torch.nan, torch.inf, 1e30):
        filled = {n: x.masked_fill(~present[n].unsqueeze(-1), bad) for n, x in batch.items()}
        for program in (model, guide):
            program.zero_grad()
        torch.manual_seed(0)
        loss = Trace_ELBO().differentiable_loss(model, guide, filled, present)
        loss.backward()
        assert loss.isfinite()
        for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", [k for k in EVERY if k != "AmortizedSet"])
def test_networks_of_unequal_latents(kind: str) -> None:
    networks = nets()
    networks["sound"] = MLP(WIDTHS["sound"], [], 6)
    guide = EVERY[kind](networks)
    match = r"expected the network of modality 'sound' to give 2 \* 2 numbers for each of 9 rows"
    with pytest.raises(ValueError, match=match):
        guide(LinearModalities().data(ROWS))
    networks["sound"] = MLP(WIDTHS["sound"], [], 3)
    with pytest.raises(ValueError, match="NormalEncoder: expected a network with an even number"):
        EVERY[kind](networks)(LinearModalities().data(ROWS))


def test_bad_arguments_of_guides() -> None:
    batch = LinearModalities().data(ROWS)
    with pytest.raises(
        ValueError, match="AmortizedSet: expected embeddings of one width .* got 3 "
    ):
        AmortizedSet({**nets(), "text": MLP(3, [], 3)}, 2, MLP(4, [], 4))(batch)
    with pytest.raises(ValueError, match=r"AmortizedSet: expected a head with 2 \* 2 outputs for"):
        AmortizedSet(nets(), 2, MLP(4, [], 6))(batch)
    for kind in (ProductOfExperts, MixtureOfExperts, MixtureOfProducts):
        where = kind.__name__
        with pytest.raises(ValueError, match=f"{where}: expected latent_dim >= 1, got 0"):
            kind(nets(), 0)
        with pytest.raises(ValueError, match=f"{where}: expected networks by modality, at least o"):
            kind({}, 2)
        with pytest.raises(
            ValueError, match=f"{where}: expected modalities among .* in private, g"
        ):
            kind(nets(), 2, {"txt": MLP(3, [], 2)})
        with pytest.raises(ValueError, match=f"{where}: expected names of modalities that can be"):
            kind({"a.b": MLP(3, [], 2)}, 1)
    for num in (0, 3, 8):
        with pytest.raises(ValueError, match="MixtureOfProducts: expected num_subsets"):
            MixtureOfProducts(nets(), 2, num_subsets=num)


# Subsets.


def many(num: int) -> dict[str, nn.Module]:
    return {f"m{n}": MLP(1, [], 2) for n in range(num)}


def test_more_than_ten_modalities() -> None:
    MixtureOfProducts(many(10), 1)
    with pytest.raises(ValueError, match=r"expected at most 10 modalities .*got 11, .*2,047"):
        MixtureOfProducts(many(11), 1)
    with pytest.raises(ValueError, match=r"expected num_subsets in 12 ... 2,047 for 11 modalities"):
        MixtureOfProducts(many(11), 1, num_subsets=11)
    guide = MixtureOfProducts(many(11), 1, num_subsets=40)
    subsets = guide.subsets
    assert subsets.shape == (40, 11)
    assert subsets.dtype == torch.bool
    assert len(subsets.unique(dim=0)) == 40
    sizes = subsets.sum(-1)
    assert (sizes > 0).all()
    assert (sizes == 11).sum() == 1
    assert len(subsets[sizes == 1].unique(dim=0)) == 11
    batch = {f"m{n}": torch.randn(3, 1) for n in range(11)}
    z = torch.randn(3, 1)
    q = q_of(guide, batch).log_prob(z)
    parts = []
    for members in subsets:
        chosen = [f"m{n}" for n in range(11) if members[n]]
        normals = [NormalEncoder(guide.networks[m])(batch[m]).base_dist for m in chosen]
        pairs = [(n.loc, n.scale) for n in normals] + [(torch.zeros(3, 1), torch.ones(3, 1))]
        parts.append(product_by_hand(pairs).log_prob(z))
    assert_close(q, torch.stack(parts).exp().mean(0).log())


def test_a_subset_stands_for_what_is_left_of_it() -> None:
    """By mask as by missing keys, also where two subsets then say the same."""
    guide = MixtureOfProducts(nets(), 2, num_subsets=5)
    batch = LinearModalities().data(ROWS)
    z = torch.randn(ROWS, 2)
    for seen in (["image"], ["image", "text"], ["text", "sound"]):
        parts = []
        for members in guide.subsets:
            chosen = [m for n, m in enumerate(NAMES) if members[n] and m in seen]
            if chosen:
                normals = [NormalEncoder(guide.networks[m])(batch[m]).base_dist for m in chosen]
                pairs = [(n.loc, n.scale) for n in normals]
                pairs.append((torch.zeros(ROWS, 2), torch.ones(ROWS, 2)))
                parts.append(product_by_hand(pairs).log_prob(z))
        expected = torch.stack(parts).exp().mean(0).log()
        masks = {name: torch.full((ROWS,), name in seen) for name in NAMES}
        assert_close(q_of(guide, batch, masks).log_prob(z), expected)
        assert_close(q_of(guide, {name: batch[name] for name in seen}).log_prob(z), expected)


def test_subsets_are_saved() -> None:
    first, second = (MixtureOfProducts(many(11), 1, num_subsets=40) for _ in range(2))
    assert not torch.equal(first.subsets, second.subsets)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.subsets, second.subsets)
    assert torch.equal(copy.deepcopy(first).subsets, first.subsets)
    assert "subsets" not in MixtureOfProducts(nets(), 2).state_dict()


# Private latents.


def private_pair(
    private: dict[str, Any] | None = None, kind: Any = ProductOfExperts, **how: Any
) -> tuple[MultimodalVAE, Any]:
    """Image and text have latents of their own, of 3 and 1 dimensions."""
    own = {"image": 3, "text": 1}
    decoders = {
        name: MLP(2 + own.get(name, 0), [5], width, activation=nn.Tanh)
        for name, width in WIDTHS.items()
    }
    noise = {name: likelihoods.Normal(torch.ones(w), learn=True) for name, w in WIDTHS.items()}
    model = MultimodalVAE(decoders, noise, StandardNormalPrior(2), private or own, **how)
    networks = {name: MLP(WIDTHS[name], [5], 2 * dim) for name, dim in own.items()}
    return model, kind(nets(), 2, networks)


def sites_by_name(program: Any, *args: Any) -> dict[str, Any]:
    nodes = poutine.trace(program).get_trace(*args).nodes
    return {n: s for n, s in nodes.items() if s["type"] == "sample" and n != "data"}


def test_private_latents_come_and_go_with_their_modality() -> None:
    model, guide = private_pair()
    batch = LinearModalities().data(ROWS)
    assert list(sites_by_name(model, batch)) == [
        *("z", "w_image", "w_text", "x_image", "x_sound", "x_text")
    ]
    assert set(sites_by_name(guide, batch)) == {"z", "w_image", "w_text"}
    without = {name: batch[name] for name in ("text", "sound")}
    assert set(sites_by_name(model, without)) == {"z", "x_sound", "w_text", "x_text"}
    assert set(sites_by_name(guide, without)) == {"z", "w_text"}
    drawn = sites_by_name(model, {**without, "image": None})
    assert set(drawn) == {"z", "w_image", "x_image", "x_sound", "w_text", "x_text"}
    assert set(sites_by_name(guide, {**without, "image": None})) == {"z", "w_text"}
    for name in ("w_image", "x_image"):
        assert drawn[name]["mask"] is False
        assert not drawn[name]["is_observed"]
        assert len(drawn[name]["value"].unique(dim=0)) == ROWS
    assert drawn["w_image"]["value"].shape == (ROWS, 3)


def test_private_latents_by_hand() -> None:
    model, guide = private_pair()
    batch, present = mixed_patterns(LinearModalities().data(ROWS))
    sites = sites_by_name(guide, batch, present)
    for name, width in (("image", 3), ("text", 1)):
        fn = sites[f"w_{name}"]["fn"].base_dist
        wanted = NormalEncoder(guide.private[name])(batch[name].nan_to_num()).base_dist
        there = present[name]
        assert_close((fn.loc[there], fn.scale[there]), (wanted.loc[there], wanted.scale[there]))
        assert fn.loc.shape == (ROWS, width)
        assert (fn.loc[~there] == 0).all()
        assert (fn.scale[~there] == 1).all()
    values = {name: site["value"] for name, site in sites.items()}
    conditioned = poutine.condition(model, data=values)
    trace = poutine.trace(conditioned).get_trace(batch, present)
    for name in NAMES:
        code = torch.cat([values["z"], *[values[w] for w in (f"w_{name}",) if w in values]], -1)
        loc = model.decoders[name](code)
        fn = dist.Normal(loc, model.likelihoods[name].scale).to_event(1)
        log_prob = fn.log_prob(batch[name].nan_to_num())
        site = trace.nodes[f"x_{name}"]
        site_log_prob = torch.where(site["mask"], site["fn"].log_prob(site["value"]), 0.0)
        assert_close(site_log_prob, torch.where(present[name], log_prob, 0.0))


@pytest.mark.parametrize("kind", [ProductOfExperts, MixtureOfExperts, MixtureOfProducts])
def test_private_latents_in_every_pattern(kind: Any) -> None:
    """A row with nothing observed adds nothing; by mask and by keys the bound is one."""
    model, guide = private_pair(kind=kind)
    batch = LinearModalities().data(4)
    for pattern in all_patterns(batch):
        for args in tellings(pattern):
            weights = log_weights(model, guide, *args).detach()
            if not pattern.seen:
                assert_close(weights, torch.zeros(4), 1e-14)
    first, second, third = (
        log_likelihood(model, guide, *args, num_particles=1000)
        for args in (
            (batch, {"image": torch.zeros(4, dtype=torch.bool)}),
            *[
                ({name: batch[name] for name in ("sound", "text")} | extra,)
                for extra in ({}, {"image": None})
            ],
        )
    )
    for other in (second, third):
        error = (first.standard_error**2 + other.standard_error**2).sqrt()
        assert ((first.log_likelihood - other.log_likelihood).abs() < 5 * error).all()


def test_a_private_prior_of_its_own_is_trained() -> None:
    """Its parameters are in the param store once, named after the model."""
    prior = GaussianMixturePrior(3, num_components=2, site="w_image")
    model, guide = private_pair({"image": prior, "text": 1})
    batch = LinearModalities().data(ROWS)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    programs = (model, guide)
    before = [p.detach().clone() for program in programs for p in program.parameters()]
    for _ in range(2):
        svi.step(batch)
    after = [p for program in programs for p in program.parameters()]
    for old, new in zip(before, after, strict=True):
        assert not torch.equal(old, new)
    names = list(pyro.get_param_store().keys())
    assert len(names) == len(after)
    stored = {id(pyro.get_param_store()._params[name]) for name in names}
    assert stored == {id(parameter) for parameter in after}
    assert all(name.startswith((model._pyro_name, guide._pyro_name)) for name in names)


def test_a_guide_of_ones_own_has_the_bound_it_should() -> None:
    """Where a modality is missing its latents still count, in model and guide alike."""
    model, _ = private_pair()
    scale = torch.tensor([0.3, 1.0, 4.0, 20.0])
    x = {"image": torch.full((4, 5), torch.nan), "sound": torch.zeros(4, 4)}
    present = {"image": torch.zeros(4, dtype=torch.bool)}

    def own(batch: Any, present: Any = None) -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(torch.zeros(4, 2), 1.0).to_event(1))
            pyro.sample("w_image", dist.Normal(torch.zeros(4, 3), scale.unsqueeze(-1)).to_event(1))

    terms = evaluation.elbo_terms(model, own, x, present)
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, scale), standard)
    assert_close(terms.kl["w_image"], 3 * expected)
    log_likelihood(model, own, x, present, num_particles=20)


def test_bad_private_priors() -> None:
    decoders, noise = {"image": MLP(5, [], 4)}, {"image": likelihoods.Normal()}

    def make(**how: Any) -> MultimodalVAE:
        return MultimodalVAE(decoders, noise, StandardNormalPrior(2), **how)

    with pytest.raises(ValueError, match="prior of modality 'image' to sample site 'w_image', got"):
        make(private={"image": StandardNormalPrior(3)})
    with pytest.raises(ValueError, match=r"modalities among \['image'\] in private, got 'text'"):
        make(private={"text": 3})
    with pytest.raises(ValueError, match="StandardNormalPrior: expected latent_dim >= 1, got 0"):
        make(private={"image": 0})

    def own() -> torch.Tensor:
        return pyro.sample("w_image", dist.Normal(torch.zeros(3), 2.0).to_event(1))

    model = make(private={"image": own})
    site = sites_by_name(model, {"image": torch.zeros(5, 4)})["w_image"]
    assert (site["fn"].base_dist.scale == 2).all()


# Weights of training.


@pytest.mark.parametrize("weight", [0, 0.0, 0.5, 3.0, torch.tensor(2.0)])
def test_weights_act_in_training_and_not_in_evaluation(weight: Any) -> None:
    oracle = LinearModalities()
    plain, guide = linear_model(oracle), ProductOfExperts(experts(oracle), 2)
    weighted = linear_model(oracle, weights={"sound": weight})
    batch, present = mixed_patterns(oracle.data(ROWS))
    trace = poutine.trace(guide).get_trace(batch, present)

    def loss(model: Any) -> torch.Tensor:
        return -by_row(poutine.replay(model, trace=trace), batch, present)

    sound = by_row(poutine.replay(plain, trace=trace), batch, present, among="x_sound")
    assert_close(loss(weighted), loss(plain) - (float(weight) - 1) * sound)
    expected = oracle.exact.log_prob(batch, present)
    estimate = log_likelihood(weighted, guide, batch, present, num_particles=5)
    assert_close((estimate.log_likelihood, estimate.elbo), (expected, expected))
    # Zero trains everything but its own decoder.
    weighted.zero_grad()
    Trace_ELBO().differentiable_loss(weighted, guide, batch, present).backward()
    for name, parameter in weighted.named_parameters():
        zero = parameter.grad is None or float(parameter.grad.abs().max()) == 0.0
        assert zero == (float(weight) == 0.0 and "sound" in name), name


def test_a_schedule_as_weight() -> None:
    oracle = LinearModalities()
    schedule = LinearWarmup(4)
    model = linear_model(oracle, weights={"text": schedule})
    batch = oracle.data(ROWS)
    values = {"z": torch.randn(ROWS, 2)}
    conditioned = poutine.condition(model, data=values)
    for _ in range(5):
        trace = poutine.trace(conditioned).get_trace(batch)
        trace.compute_log_prob()
        site = trace.nodes["x_text"]
        assert_close(site["log_prob"], float(schedule.value) * site["unscaled_log_prob"])
        schedule.step()


def test_bad_weights() -> None:
    oracle = LinearModalities()
    with pytest.raises(ValueError, match=r"modalities among .* in weights, got 'x_text'"):
        linear_model(oracle, weights={"x_text": 1.0})
    with pytest.raises(ValueError, match=r"MultimodalVAE: expected .*weights\['text'\]"):
        linear_model(oracle, weights={"text": -1.0})
    with pytest.raises(TypeError, match=r"MultimodalVAE: expected .*weights\['text'\]"):
        linear_model(oracle, weights={"text": "1"})


def test_bad_arguments_of_the_model() -> None:
    decoders = {"image": MLP(2, [], 4), "label": MLP(2, [], 3)}
    noise = {"image": likelihoods.Bernoulli(), "label": likelihoods.Categorical(event_dim=0)}
    for bad in ({"image": noise["image"]}, {**noise, "text": noise["image"]}):
        with pytest.raises(ValueError, match="expected one likelihood for each of .*'label'"):
            MultimodalVAE(decoders, bad, StandardNormalPrior(2))
    with pytest.raises(ValueError, match="expected names of modalities that can be names of modul"):
        MultimodalVAE({"a.b": MLP(2, [], 4)}, {"a.b": noise["image"]}, StandardNormalPrior(2))
    model = MultimodalVAE(decoders, noise, StandardNormalPrior(2))
    labels = torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected batch\['image'\] of shape \(batch, 4\), got"):
        model({"image": torch.zeros(5, 3), "label": labels})
    with pytest.raises(ValueError, match=r"expected batch\['label'\] of shape \(batch,\), got"):
        model({"label": labels.unsqueeze(-1)})
    with pytest.raises(ValueError, match="expected values 0 and 1 at site 'x_image' under a Bern"):
        model({"image": torch.full((5, 4), 0.5)})
    with pytest.raises(ValueError, match="expected finite data at site 'x_image'"):
        model({"image": torch.full((5, 4), torch.nan)}, {"image": torch.arange(5) < 1})
    with pytest.raises(ValueError, match="expected values at site 'x_label' in the support"):
        model({"label": labels + 3}, {"label": torch.arange(5) < 1})
    model({"label": labels - 1}, {"label": torch.arange(5) < 0})  # -1 is how one marks them.


# Use.


def labels_pair() -> tuple[MultimodalVAE, Any, dict[str, torch.Tensor]]:
    """Binary pictures of digits and their classes."""
    decoders = {"image": MLP(2, [8], 16), "label": MLP(2, [8], 4)}
    noise = {"image": likelihoods.Bernoulli(), "label": likelihoods.Categorical(event_dim=0)}
    model = MultimodalVAE(decoders, noise, StandardNormalPrior(2))

    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP(4, [8], 4)

        def forward(self, label: torch.Tensor) -> torch.Tensor:
            return self.net(torch.nn.functional.one_hot(label, 4).to(self.net[0].weight))

    guide = ProductOfExperts({"image": MLP(16, [8], 4), "label": OneHot()}, 2)
    batch = {"image": (torch.rand(12, 16) < 0.4).double(), "label": torch.arange(12) % 4}
    return model, guide, batch


def test_generating_one_modality_from_another() -> None:
    model, guide, batch = labels_pair()
    given = {"image": batch["image"], "label": None}
    out = Predictive(model, guide=guide, num_samples=3)(given)
    assert out["x_label"].shape == (3, 12)
    assert out["x_label"].dtype == torch.int64
    drawn = Predictive(model, guide=guide, num_samples=5, parallel=True)(given)
    assert drawn["x_label"].shape == (5, 12)
    values = model(given)
    assert list(values) == ["image", "label"]
    assert values["image"] is given["image"]
    assert list(model({"label": None, "image": batch["image"]})) == ["image", "label"]
    assert given["label"] is None
    assert list(model({"image": batch["image"]})) == ["image"]


def test_what_is_drawn_follows_the_decoder() -> None:
    """Frequencies of classes against the probabilities at the code."""
    model, guide, _ = labels_pair()
    num = 20_000
    z = torch.randn(1, 2).expand(num, 2)
    batch = {"image": torch.zeros(num, 16), "label": None}
    label = poutine.condition(model, data={"z": z})(batch)["label"]
    probs = model.decoders["label"](z[0]).softmax(-1).detach()
    error = (probs * (1 - probs) / num).sqrt()
    assert ((label.bincount(minlength=4) / num - probs).abs() < 5 * error).all()


def test_classes_that_are_marked_as_missing() -> None:
    """-1, or any other number that is no class, in rows where the label is not observed."""
    model, guide, batch = labels_pair()
    present = {"label": torch.arange(12) % 3 > 0}
    hidden = {**batch, "label": torch.where(present["label"], batch["label"], -1)}
    kept = copy.deepcopy((hidden, present))
    for program in (model, guide):
        program.zero_grad()
    Trace_ELBO().differentiable_loss(model, guide, hidden, present).backward()
    for program in (model, guide):
        for name, parameter in program.named_parameters():
            assert parameter.grad.isfinite().all(), name
    torch.manual_seed(0)
    first = log_likelihood(model, guide, hidden, present, num_particles=50)
    torch.manual_seed(0)
    second = log_likelihood(model, guide, batch, present, num_particles=50)
    assert_close(first.log_likelihood, second.log_likelihood)
    assert torch.equal(hidden["label"], kept[0]["label"])
    assert torch.equal(present["label"], kept[1]["label"])


ELBOS = {
    "Trace_ELBO": lambda: Trace_ELBO(),
    "Trace_ELBO, particles": lambda: Trace_ELBO(3),
    "Trace_ELBO, vectorised": lambda: Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "TraceMeanField_ELBO, vectorised": lambda: TraceMeanField_ELBO(
        3, vectorize_particles=True, max_plate_nesting=1
    ),
    "TraceIWAE_ELBO": lambda: TraceIWAE_ELBO(3),
    "TraceIWAE_ELBO, one by one": lambda: TraceIWAE_ELBO(3, vectorize_particles=False),
    "TraceIWAE_ELBO, stratified": lambda: TraceIWAE_ELBO(3, stratified=True),
}


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("kind", [ProductOfExperts, MixtureOfExperts, MixtureOfProducts])
def test_training_without_warnings(elbo: str, kind: Any) -> None:
    """One objective, and one svi, over batches that tell different things in all three ways."""
    model, guide = private_pair(kind=kind)
    complete = LinearModalities().data(ROWS)
    batch, present = mixed_patterns(complete)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ELBOS[elbo]())
    before = [p.detach().clone() for m in (model, guide) for p in m.parameters()]
    for args in (
        (complete,),
        (batch, present),
        ({"sound": complete["sound"]},),
        ({n: x for n, x in complete.items() if n != "sound"}, {"text": present["text"]}),
        ({n: x[:3] for n, x in complete.items()},),
    ):
        assert math.isfinite(svi.step(*args))
    after = [p for m in (model, guide) for p in m.parameters()]
    for old, new in zip(before, after, strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_the_caller_keeps_batch_and_masks() -> None:
    model, guide = private_pair()
    batch, present = mixed_patterns(LinearModalities().data(ROWS))
    batch, present = {**batch, "text": None}, {n: present[n] for n in ("image", "sound")}
    kept = copy.deepcopy((batch, present))
    for program in (model, guide):
        program(batch, present)
    Predictive(model, guide=guide, num_samples=2)(batch, present)
    log_likelihood(model, guide, batch, present, num_particles=3)
    Trace_ELBO().loss(model, guide, {n: x for n, x in batch.items() if x is not None}, present)
    assert list(batch) == list(kept[0])
    assert list(present) == list(kept[1])
    torch.testing.assert_close(batch["image"], kept[0]["image"], equal_nan=True)
    torch.testing.assert_close(batch["sound"], kept[0]["sound"], equal_nan=True)
    assert batch["text"] is None
    for name in present:
        assert torch.equal(present[name], kept[1][name])


def test_a_modality_of_pictures() -> None:
    """Events of several dimensions, with masks."""
    decoders = {"image": nn.Sequential(MLP(2, [5], 8), nn.Unflatten(-1, (2, 2, 2)))}
    model = MultimodalVAE(
        decoders, {"image": likelihoods.Normal(event_dim=3)}, StandardNormalPrior(2)
    )
    guide = ProductOfExperts({"image": nn.Sequential(nn.Flatten(), MLP(8, [5], 4))}, 2)
    x = torch.randn(5, 2, 2, 2)
    present = {"image": torch.arange(5) < 3}
    x[3:] = torch.nan
    estimate = log_likelihood(model, guide, {"image": x}, present, num_particles=30)
    short = log_likelihood(model, guide, {"image": x[:3]}, num_particles=30)
    assert_close(estimate.log_likelihood[3:], torch.zeros(2))
    assert estimate.log_likelihood[:3].isfinite().all()
    assert short.log_likelihood.shape == (3,)


def test_masks_around_the_whole_pair() -> None:
    """A mask of the user's own is joined with that of the rows."""
    oracle = LinearModalities()
    model, guide = linear_model(oracle), ProductOfExperts(experts(oracle), 2)
    batch, present = mixed_patterns(oracle.data(ROWS))
    rows = torch.arange(ROWS) % 2 == 0
    pair = [poutine.mask(program, mask=rows) for program in (model, guide)]
    estimate = log_likelihood(*pair, batch, present, num_particles=3)
    expected = torch.where(rows, oracle.exact.log_prob(batch, present), 0.0)
    assert_close(estimate.log_likelihood, expected)
    # Where it hides rows, their values are not looked at either.
    hidden = {n: torch.where(rows.unsqueeze(-1), x, torch.nan) for n, x in batch.items()}
    pair[0](hidden, present)
    complete = oracle.data(ROWS)
    pair[0]({n: torch.where(rows.unsqueeze(-1), x, torch.nan) for n, x in complete.items()})
    with pytest.raises(ValueError, match="expected finite data at site 'x_image'"):
        pair[0]({n: torch.where(rows.unsqueeze(-1), torch.nan, x) for n, x in complete.items()})


def test_likelihoods_and_priors_that_cannot_be_called() -> None:
    decoders, noise = {"a": nn.Linear(2, 3)}, {"a": likelihoods.Normal()}
    prior: Any = StandardNormalPrior(2)
    with pytest.raises(TypeError, match=r"expected likelihoods\['a'\] to be a module or a functi"):
        MultimodalVAE(decoders, {"a": None}, prior)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="expected prior to be a module or a function, got int"):
        MultimodalVAE(decoders, noise, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected private\['a'\] to be a module or a function"):
        MultimodalVAE(decoders, noise, prior, {"a": None})  # type: ignore[dict-item]


def test_what_the_usual_mistakes_are_told() -> None:
    model = MultimodalVAE(
        {"label": nn.Linear(2, 3)}, {"label": likelihoods.Categorical()}, StandardNormalPrior(2)
    )
    with pytest.raises(ValueError, match="expected batch") as caught:
        model({"label": torch.zeros(4, dtype=torch.int64)})
    assert "Categorical(event_dim=0)" in str(caught.value.__notes__)
    model = MultimodalVAE(
        {"image": nn.Linear(2, 3)}, {"image": likelihoods.Normal()}, StandardNormalPrior(2)
    )
    with pytest.raises(ValueError, match="expected finite data") as caught:
        model({"image": torch.full((4, 3), torch.nan)})
    assert "present={'image': mask}" in str(caught.value.__notes__)


def test_module_dicts_are_mappings_too() -> None:
    decoders = nn.ModuleDict({"a": nn.Linear(2, 3)})
    noise: Any = nn.ModuleDict({"a": likelihoods.Normal()})
    model = MultimodalVAE(decoders, noise, StandardNormalPrior(2))  # type: ignore[arg-type]
    assert model({"a": torch.zeros(4, 3)})["a"].shape == (4, 3)
