"""The guide made from a model: against joint Gaussians, changes of variables, and by contract."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import BATCH, Case, GuideContract, latent_sites, normal_x, traced
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch.distributions import constraints

from pyro_vae import importance_weighted_log_likelihood
from pyro_vae.guides.auto import AmortizedAutoGuide
from pyro_vae.likelihoods import Normal
from pyro_vae.models import HierarchicalVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.site_heads import to_support

# A linear-Gaussian model: every variable is a matrix times those above it, plus noise.

Links = dict[str, dict[str, torch.Tensor]]


class Chain:
    """A linear-Gaussian graph, as a program, and its joint normal distribution.

    Args:
        dims: Numbers of dimensions, in the model's order.
        above: By variable, those that its mean depends on.
        observed: Names of the data, whose columns stand side by side.
    """

    def __init__(
        self, dims: dict[str, int], above: dict[str, list[str]], observed: list[str]
    ) -> None:
        generator = torch.Generator().manual_seed(4)
        self.dims, self.observed = dims, observed
        self.links: Links = {
            name: {
                up: torch.randn(dim, dims[up], generator=generator) / 1.2
                for up in above.get(name, [])
            }
            for name, dim in dims.items()
        }
        self.noise = {n: 0.4 + torch.rand(d, generator=generator) for n, d in dims.items()}
        total = sum(dims.values())
        starts = torch.tensor([0, *dims.values()]).cumsum(0).tolist()
        self.at = {n: slice(a, a + d) for (n, d), a in zip(dims.items(), starts, strict=False)}
        links = torch.zeros(total, total)
        for name, ups in self.links.items():
            for up, matrix in ups.items():
                links[self.at[name], self.at[up]] = matrix
        spread = torch.linalg.inv(torch.eye(total) - links)
        noise = torch.cat(list(self.noise.values()))
        self.cov = spread @ noise.square().diag() @ spread.T

    def __call__(self, x: torch.Tensor) -> None:
        values = self.columns(x)
        with pyro.plate("patients", len(x)):
            for name, ups in self.links.items():
                loc = sum((values[up] @ m.T for up, m in ups.items()), torch.zeros(()))
                fn = dist.Normal(loc, self.noise[name]).to_event(1)
                obs = values[name] if name in self.observed else None
                values[name] = pyro.sample(name, fn, obs=obs)

    def columns(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        widths = [self.dims[name] for name in self.observed]
        return dict(zip(self.observed, x.split(widths, -1), strict=True))

    def where(self, names: list[str]) -> torch.Tensor:
        index = torch.arange(len(self.cov))
        return torch.cat([index[self.at[name]] for name in names])

    def given(self, names: list[str], known: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Regression matrix and covariance of some variables given others."""
        a, b = self.where(names), self.where(known)
        weights = self.cov[a][:, b] @ torch.linalg.inv(self.cov[b][:, b])
        return weights, self.cov[a][:, a] - weights @ self.cov[b][:, a]

    def draw(self, num_rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        at = self.where(self.observed)
        noise = torch.randn(num_rows, len(at), generator=generator)
        return noise @ torch.linalg.cholesky(self.cov[at][:, at]).T

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        at = self.where(self.observed)
        return dist.MultivariateNormal(torch.zeros(len(at)), self.cov[at][:, at]).log_prob(x)


def hierarchy() -> Chain:
    dims = {"region": 2, "town": 2, "house": 3, "price": 4}
    return Chain(dims, {"town": ["region"], "house": ["town"], "price": ["house"]}, ["price"])


def state_space() -> Chain:
    dims: dict[str, int] = {}
    above: dict[str, list[str]] = {}
    for t in range(4):
        dims |= {f"state_{t}": 2, f"seen_{t}": 2}
        above |= {f"state_{t}": [f"state_{t - 1}"] if t else [], f"seen_{t}": [f"state_{t}"]}
    return Chain(dims, above, [f"seen_{t}" for t in range(4)])


def collider() -> Chain:
    dims = {"left": 2, "right": 1, "both": 3}
    return Chain(dims, {"both": ["left", "right"]}, ["both"])


GRAPHS = {"hierarchy": hierarchy, "state space": state_space, "collider": collider}


def make(model: Any, example: tuple[Any, ...], **how: Any) -> AmortizedAutoGuide:
    encoder = how.pop("encoder", None) or torch.nn.Identity()
    return AmortizedAutoGuide(model, encoder, example=example, **how)


def softplus_inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.log(torch.expm1(scale - 1e-6))


def set_head(head: Any, weights: torch.Tensor, cov: torch.Tensor, *, full: bool) -> None:
    """Writes a linear regression into a head without hidden layers."""
    linear, dim = head.encoder.net.net[-1], len(cov)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        linear.weight[:dim] = weights
        if not full or dim == 1:
            linear.bias[dim:] = softplus_inverse(cov.diagonal().sqrt())
            return
        tril = torch.linalg.cholesky(cov)
        raw = tril.tril(-1) + softplus_inverse(tril.diagonal()).diag()
        linear.bias[dim:] = raw[tuple(torch.tril_indices(dim, dim))]


def set_exact(guide: AmortizedAutoGuide, chain: Chain, *, full: bool = True) -> None:
    """Every head becomes the conditional given its parents and the data."""
    for head, (name, parents) in zip(guide.heads, guide.parents.items(), strict=True):
        set_head(head, *chain.given([name], [*chain.observed, *parents]), full=full)


def log_weights(model: Any, guide: Any, *args: Any) -> torch.Tensor:
    guide_trace = traced(guide, *args)
    model_trace = traced(poutine.replay(model, trace=guide_trace), *args)
    total: Any = 0.0
    for trace, sign in ((model_trace, 1), (guide_trace, -1)):
        for site in trace.nodes.values():
            if site["type"] == "sample":
                total = total + sign * site["unscaled_log_prob"]
    return total


@pytest.mark.parametrize("name", GRAPHS)
def test_the_inverse_contains_the_exact_posterior(name: str) -> None:
    """With the conditionals of the joint normal as heads, every log-weight equals log p(x)."""
    chain = GRAPHS[name]()
    x = chain.draw(BATCH)
    guide = make(chain, (x,), structure="inverse", full_covariance=True)
    set_exact(guide, chain)
    for _ in range(3):
        torch.testing.assert_close(
            log_weights(chain, guide, x), chain.log_prob(x), rtol=0, atol=1e-10
        )


def test_parents_of_the_known_graphs() -> None:
    x = hierarchy().draw(BATCH)
    guide = make(hierarchy(), (x,), structure="inverse")
    assert guide.parents == {"house": (), "town": ("house",), "region": ("town",)}
    assert make(hierarchy(), (x,)).parents == {"region": (), "town": (), "house": ()}
    backwards = make(state_space(), (state_space().draw(BATCH),), structure="inverse").parents
    assert list(backwards.items()) == [
        ("state_3", ()),
        ("state_2", ("state_3",)),
        ("state_1", ("state_2",)),
        ("state_0", ("state_1",)),
    ]


@pytest.mark.parametrize("full", [True, False])
def test_the_gap_of_mean_field(full: bool) -> None:
    """Right means and conditional precisions leave the KL that the theory gives."""
    chain = hierarchy()
    x, latents = chain.draw(BATCH), ["region", "town", "house"]
    guide = make(chain, (x,), full_covariance=full)
    weights, cov = chain.given(latents, chain.observed)
    precision, blocks, start = torch.linalg.inv(cov), [], 0
    for head, name in zip(guide.heads, latents, strict=True):
        part = slice(start, start + chain.dims[name])
        start = part.stop
        block = precision[part, part] if full else precision[part, part].diagonal().diag()
        blocks.append(block.logdet())
        set_head(head, weights[part], torch.linalg.inv(block), full=full)
    gap = (sum(blocks) - precision.logdet()) / 2
    assert gap > 0.1
    num = 20_000
    with torch.no_grad(), pyro.plate("particles", num, dim=-2):
        found = log_weights(chain, guide, x)
    error = float(found.mean(1).std()) / math.sqrt(num)
    assert abs(float(found.mean() - (chain.log_prob(x) - gap).mean())) < 5 * error


@pytest.mark.parametrize("name", GRAPHS)
def test_no_gradient_pulls_the_exact_posterior_away(name: str) -> None:
    """Gradients along the samples are zero there, in every draw, and nowhere else."""
    chain = GRAPHS[name]()
    x = chain.draw(BATCH)
    guide = make(chain, (x,), structure="inverse", full_covariance=True)
    elbo = TraceIWAE_ELBO(1, "stl")
    for is_exact in (False, True):
        if is_exact:
            set_exact(guide, chain)
        elbo.loss_and_grads(chain, guide, x)
        for parameter in guide.parameters():
            assert parameter.grad is not None
            assert (float(parameter.grad.abs().max()) < 1e-9) == is_exact
            parameter.grad = None


def test_training_comes_to_the_exact_posterior() -> None:
    chain = Chain({"left": 1, "right": 1, "both": 2}, {"both": ["left", "right"]}, ["both"])
    x = chain.draw(20)
    guide = make(chain, (x,), structure="inverse")
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97})
    svi = SVI(chain, guide, optimizer, Trace_ELBO())
    for _ in range(120):
        svi.step(x)
    with torch.no_grad(), pyro.plate("particles", 200, dim=-2):
        gap = chain.log_prob(x) - log_weights(chain, guide, x)
    assert float(gap.mean()) < 0.02
    assert float(gap.std(0).max()) < 0.3


# Densities.

SUPPORTS: dict[str, Callable[[int], Any]] = {
    "real": lambda n: dist.Normal(torch.zeros(n), 1.0),
    "real vector": lambda n: dist.Normal(torch.zeros(n, 3), 1.0).to_event(1),
    "real matrix": lambda n: dist.Normal(torch.zeros(n, 2, 3), 1.0).to_event(2),
    "positive": lambda n: dist.LogNormal(torch.zeros(n), 1.0),
    "positive vector": lambda n: dist.Gamma(torch.ones(n, 3), 1.0).to_event(1),
    "interval": lambda n: dist.Uniform(-torch.ones(n), 3.0),
    "simplex": lambda n: dist.Dirichlet(torch.ones(n, 4)),
    "simplices": lambda n: dist.Dirichlet(torch.ones(n, 2, 3)).to_event(1),
    "cholesky": lambda n: dist.LKJCholesky(3, torch.ones(n)),
}


def one_latent(fn: Callable[[int], Any]) -> Callable[[torch.Tensor], Any]:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("patients", len(x)):
            z = pyro.sample("z", fn(len(x)))
            loc = z.reshape(*z.shape[: z.dim() - fn(1).event_dim], -1).sum(-1)
            loc = loc[..., None].expand(*loc.shape, 4)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", SUPPORTS)
def test_density_by_a_change_of_variables(name: str, full: bool) -> None:
    fn, x = SUPPORTS[name](1), normal_x(2)
    guide = make(one_latent(SUPPORTS[name]), (x,), full_covariance=full)
    site = traced(guide, x).nodes["z"]
    value, transform = site["value"].detach(), to_support(fn.support)
    assert fn.support.check(value).all()
    raw = guide.heads[0].encoder.net.net(x)
    for n in range(2):
        real = transform.inv(value[n : n + 1])
        dim = real.numel()
        loc, rest = raw[n, :dim], raw[n, dim:]
        tril = torch.nn.functional.softplus(rest[:dim]).add(1e-6).diag()
        if full and dim > 1:
            tril = torch.zeros(dim, dim)
            tril[tuple(torch.tril_indices(dim, dim))] = rest
            diagonal = torch.nn.functional.softplus(tril.diagonal()) + 1e-6
            tril = tril.tril(-1) + diagonal.diag()
        density = dist.MultivariateNormal(loc, scale_tril=tril).log_prob(real.reshape(-1))

        def free(flat: torch.Tensor, shape: Any = real.shape) -> torch.Tensor:
            """As many numbers of the value as are free."""
            y = transform(flat.reshape(shape))
            if name.startswith("simpl"):
                y = y[..., :-1]
            if name == "cholesky":
                y = y[..., *torch.tril_indices(3, 3, -1)]
            return y.reshape(-1)

        jacobian = torch.autograd.functional.jacobian(free, real.reshape(-1))
        torch.testing.assert_close(
            site["log_prob"][n].detach(), (density - jacobian.slogdet()[1]).detach()
        )


def test_simplices_in_float32_lose_nothing() -> None:
    """A share beside one that is almost 1: values, and their way back, with gradients."""
    real = torch.tensor([[21.0, 3.0, -2.0], [-9.0, 11.0, -30.0]], dtype=torch.float32)
    transform = to_support(constraints.simplex)
    share = transform(real).requires_grad_()
    back = transform.inv(share)
    torch.testing.assert_close(back, real, rtol=0, atol=1e-4)
    back.sum().backward()
    assert share.grad is not None
    assert share.grad.isfinite().all()
    assert transform.forward_shape(torch.Size([5, 3])) == (5, 4)
    assert bool((transform(10 * real) > 0).all())


def test_real_latents_have_a_plain_normal() -> None:
    """So that KLs have their closed forms."""
    x = normal_x(BATCH)
    for fn, kind in (("real vector", dist.Independent), ("real", dist.Normal)):
        assert type(traced(make(one_latent(SUPPORTS[fn]), (x,)), x).nodes["z"]["fn"]) is kind
    full = make(one_latent(SUPPORTS["real vector"]), (x,), full_covariance=True)
    assert type(traced(full, x).nodes["z"]["fn"]) is dist.MultivariateNormal


def test_closed_form_and_sampled_kl_agree() -> None:
    """TraceMeanField_ELBO is valid without dependence, in the model's order."""

    def model(x: torch.Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("patients", len(x)):
            top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            low = pyro.sample("low", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            loc = (weight * top * low)[..., [0, 1, 0, 1]]
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = normal_x(2)
    guide = make(model, (x,))
    how: Any = {"num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 1}
    losses = [
        torch.tensor([elbo(**how).loss(model, guide, x) for _ in range(20)])
        for elbo in (Trace_ELBO, TraceMeanField_ELBO)
    ]
    error = math.sqrt(sum(float(some.var()) for some in losses) / 20)
    assert abs(float(losses[0].mean() - losses[1].mean())) < 5 * error


# Plates.


def texts(counts: torch.Tensor, *, dims: tuple[int, int] = (-2, -1)) -> None:
    """Words within texts; a code and a share of a text, an amount of each word, some weights."""
    num_texts, num_words = (counts.shape[dim] for dim in dims)
    rows = pyro.plate("texts", num_texts, dim=dims[0])
    words = pyro.plate("words", num_words, dim=dims[1])
    with words:
        weight = pyro.sample("weight", dist.LogNormal(torch.tensor(0.0), 0.5))
    with rows:
        code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with rows, words:
        loc = code.sum(-1) + share[..., 0]
        amount = pyro.sample("amount", dist.LogNormal(loc, 0.5))
        pyro.sample("counts", dist.Poisson(amount * weight), obs=counts)


def texts_across(counts: torch.Tensor) -> None:
    texts(counts, dims=(-1, -2))


class Rows(torch.nn.Module):
    """Texts in the first dimension, or in the last."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.across = across

    def forward(self, counts: torch.Tensor) -> torch.Tensor:
        return (counts.T if self.across else counts) / 3


def counted(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.poisson(torch.full((num_rows, 3), 2.0), generator=generator)


@pytest.mark.parametrize("structure", ["mean-field", "inverse"])
@pytest.mark.parametrize("across", [False, True])
def test_plates_within_the_data(across: bool, structure: str) -> None:
    """Values and densities of a row depend on that row alone, wherever the plates lie."""
    model = texts_across if across else texts
    counts = counted(4)
    guide = make(
        model,
        (counts.T if across else counts,),
        encoder=Rows(across),
        structure=structure,
        hidden=[5],
        plate="texts",
    )
    if structure == "inverse":
        assert guide.parents == {
            "share": ("weight",),
            "code": ("weight", "share"),
            "amount": ("weight", "share", "code"),
        }
    x = counts.T if across else counts
    trace = traced(guide, x)
    model_trace = traced(poutine.replay(model, trace=trace), x)
    for name, site in latent_sites(model_trace).items():
        if name not in ("texts", "words"):
            assert site["value"].shape == trace.nodes[name]["value"].shape
            assert site["log_prob"].shape == trace.nodes[name]["log_prob"].shape
            frames = (
                {(f.name, f.dim, f.size) for f in t.nodes[name]["cond_indep_stack"]}
                for t in (trace, model_trace)
            )
            assert next(frames) == next(frames)

    def row(tensor: torch.Tensor, n: int, event_dim: int) -> torch.Tensor:
        dim = (-1 if across else -2) - event_dim
        return tensor.narrow(dim, n, 1) if tensor.dim() >= -dim else tensor

    for n in range(4):
        values = {
            name: row(trace.nodes[name]["value"], n, trace.nodes[name]["fn"].event_dim)
            for name in ("code", "share", "amount")
        }
        values["weight"] = trace.nodes["weight"]["value"]
        values["weight_unconstrained"] = trace.nodes["weight_unconstrained"]["value"]
        alone = traced(poutine.condition(guide, data=values), row(x, n, 0))
        for name in ("code", "share", "amount"):
            torch.testing.assert_close(
                alone.nodes[name]["log_prob"], row(trace.nodes[name]["log_prob"], n, 0)
            )


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("num_dims", [0, 1])
def test_bounds_along_a_plate_within_the_data(num_dims: int, across: bool) -> None:
    """log q is that of a change of variables with the bounds of each word."""
    dims = (-1, -2) if across else (-2, -1)

    def model(x: torch.Tensor) -> None:
        rows = pyro.plate("texts", 4, dim=dims[0])
        words = pyro.plate("words", 3, dim=dims[1])
        high = torch.arange(1.0, 4.0).expand(4, 3)
        high = high.T if across else high
        shape = (*high.shape, *(2,) * num_dims)
        high = high.reshape(*high.shape, *(1,) * num_dims).expand(shape)
        with rows:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            with words:
                u = pyro.sample("u", dist.Uniform(torch.zeros(()), high).to_event(num_dims))
                loc = z + (u.sum(-1) if num_dims else u)
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x.T if across else x)

    x = torch.rand(4, 3)
    guide = make(model, (x,), structure="inverse", plate="texts")
    assert guide.parents == {"u": (), "z": ("u",)} or guide.parents == {"z": (), "u": ("z",)}
    trace = traced(guide, x)
    site = trace.nodes["u"]
    top = torch.arange(1.0, 4.0)
    top = top[:, None] if across else top
    top = top[..., None] if num_dims else top
    share = site["value"] / top
    assert ((share > 0) & (share < 1)).all()
    base = site["fn"].base_dist
    log_prob = base.log_prob(torch.logit(share))
    jacobian = (top * share * (1 - share)).log()
    log_prob = log_prob - (jacobian.sum(-1) if num_dims else jacobian)
    torch.testing.assert_close(site["log_prob"], log_prob)
    assert site["value"].shape[:2] == ((3, 4) if across else (4, 3))
    how: Any = {"num_particles": 7, "vectorize_particles": True, "max_plate_nesting": 2}
    assert math.isfinite(Trace_ELBO(**how).loss(model, guide, x))


def test_values_side_by_side_in_a_plate_are_given_what_they_share() -> None:
    """Once the mean of a row is gone its values depend on one another: it has to come first."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("columns", 3, dim=-1):
                value = pyro.sample("value", dist.Normal(mean, 0.5))
                pyro.sample("x", dist.Normal(value, 0.7), obs=x)

    x = normal_x(BATCH)[:, :3]
    guide = make(model, (x,), structure="inverse")
    assert guide.parents == {"mean": (), "value": ("mean",)}
    noise, total = 0.5**2 + 0.7**2, 1 + 3 / (0.5**2 + 0.7**2)
    set_head(
        guide.heads[0], torch.full((1, 3), 1 / noise / total), torch.eye(1) / total, full=False
    )
    share = 0.5**2 / noise  # How far a value goes from the mean to what was seen.
    weights = torch.cat([share * torch.eye(3), torch.full((3, 1), 1 - share)], 1)
    linear = guide.heads[1].encoder.net.net[-1]
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[0::2] = weights  # Loc and raw scale of each column side by side.
        linear.bias[0::2] = 0.0
        linear.bias[1::2] = softplus_inverse(torch.tensor(share).sqrt() * 0.7)
    cov = torch.ones(3, 3) + noise * torch.eye(3)
    expected = dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x)
    trace = traced(guide, x)
    model_trace = traced(poutine.replay(model, trace=trace), x)
    log_weight = sum(
        sign * t.nodes[name]["log_prob"].reshape(BATCH, -1).sum(-1)
        for t, names, sign in ((model_trace, ("mean", "value", "x"), 1), (trace, guide.parents, -1))
        for name in names
    )
    torch.testing.assert_close(log_weight, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("across", [False, True])
def test_particles_in_nested_plates(across: bool) -> None:
    """Each of several particles has the density that it has alone."""
    model = texts_across if across else texts
    x = counted(4).T if across else counted(4)
    guide = make(model, (x,), encoder=Rows(across), structure="inverse", plate="texts")
    with pyro.plate("particles", 3, dim=-3):
        trace = traced(guide, x)
    names = ["weight", "weight_unconstrained", "amount", "share", "code"]
    for k in range(3):
        values = {}
        for name in names:
            site = traced(guide, x).nodes[name]
            values[name] = trace.nodes[name]["value"][k].reshape(site["value"].shape)
        alone = traced(poutine.condition(guide, data=values), x)
        for name in names:
            found = trace.nodes[name]["log_prob"][k]
            torch.testing.assert_close(alone.nodes[name]["log_prob"].expand(found.shape), found)


def test_importance_weights_at_once() -> None:
    """Warnings are errors: a program that does not broadcast is run one by one, with one."""
    x = counted(4)
    model = poutine.block(poutine.condition(texts, data={"weight": torch.ones(3)}), hide=["weight"])
    guide = make(model, (x,), structure="inverse", plate="texts")
    estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=50)
    assert estimate.log_likelihood.shape == (4,)
    for elbo in (
        TraceIWAE_ELBO(5, "dreg"),
        TraceIWAE_ELBO(1, "stl"),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2),
    ):
        assert math.isfinite(elbo.loss_and_grads(model, guide, x))
    exact = hierarchy()
    data = exact.draw(BATCH)
    guide = make(exact, (data,), structure="inverse", full_covariance=True)
    set_exact(guide, exact)
    estimate = importance_weighted_log_likelihood(exact, guide, data, num_particles=3)
    torch.testing.assert_close(estimate.log_likelihood, exact.log_prob(data), rtol=0, atol=1e-8)


# Subsampling: with the exact posterior the loss is that of the rows, scaled, without noise.


def subsampled(chain: Chain, num_all: int) -> Callable[..., None]:
    def model(x: torch.Tensor, **how: Any) -> None:
        with pyro.plate("patients", num_all, **how) as rows, poutine.block(hide=["patients"]):
            x = x[rows] if len(x) == num_all else x
            values = chain.columns(x)
            for name, ups in chain.links.items():
                loc = sum((values[up] @ m.T for up, m in ups.items()), torch.zeros(()))
                fn = dist.Normal(loc, chain.noise[name]).to_event(1)
                obs = values[name] if name in chain.observed else None
                values[name] = pyro.sample(name, fn, obs=obs)

    return model


class First(torch.nn.Module):
    def forward(self, x: torch.Tensor, **how: Any) -> torch.Tensor:
        return x


def exact_pair(chain: Chain, model: Any, x: torch.Tensor, how: Any) -> AmortizedAutoGuide:
    guide = AmortizedAutoGuide(model, First(), structure="inverse", full_covariance=True)
    guide(x, **how)
    set_exact(guide, chain)
    return guide


def test_rows_that_are_given() -> None:
    chain, rows = hierarchy(), torch.tensor([7, 2, 4])
    x = chain.draw(10)
    model = subsampled(chain, 10)
    guide = exact_pair(chain, model, x[rows], {"subsample": rows})
    for chosen in (rows, torch.tensor([1, 9])):
        loss = Trace_ELBO().loss(model, guide, x[chosen], subsample=chosen)
        expected = -chain.log_prob(x[chosen]).sum() * 10 / len(chosen)
        torch.testing.assert_close(torch.tensor(loss), expected)
    trace = poutine.trace(guide).get_trace(x[rows], subsample=rows)
    assert "patients" not in trace.nodes


def test_rows_that_are_drawn_by_the_model() -> None:
    """The features of all rows are known, and those that the plate draws are taken."""
    chain = hierarchy()
    x, how = chain.draw(10), {"subsample_size": 3}
    model = subsampled(chain, 10)
    guide = exact_pair(chain, model, x, how)
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().loss(model, guide, x, **how)
    pyro.set_rng_seed(1)
    rows = poutine.trace(guide).get_trace(x, **how).nodes["patients"]["value"]
    torch.testing.assert_close(torch.tensor(loss), -chain.log_prob(x[rows]).sum() * 10 / 3)


def test_a_size_without_rows() -> None:
    """A minibatch in a plate of the size of all data."""
    chain = hierarchy()
    x, model = chain.draw(10), subsampled(chain, 100)
    guide = exact_pair(chain, model, x, {"subsample_size": 10})
    for num_rows in (10, 4):
        loss = Trace_ELBO().loss(model, guide, x[:num_rows], subsample_size=num_rows)
        expected = -chain.log_prob(x[:num_rows]).sum() * 100 / num_rows
        torch.testing.assert_close(torch.tensor(loss), expected)


def test_full_size_then_a_short_batch() -> None:
    """A first batch of all data does not make later ones look whole."""
    chain = hierarchy()
    x, model = chain.draw(10), subsampled(chain, 10)
    guide = exact_pair(chain, model, x, {"subsample_size": 10})
    loss = Trace_ELBO().loss(model, guide, x[:4], subsample_size=4)
    torch.testing.assert_close(torch.tensor(loss), -chain.log_prob(x[:4]).sum() * 10 / 4)


def test_short_batches_cost_one_run_of_the_model_and_known_ones_none() -> None:
    runs = []
    chain = hierarchy()

    def model(x: torch.Tensor) -> None:
        runs.append(len(x))
        chain(x)

    x = chain.draw(BATCH)
    guide = make(model, (x,), structure="mean-field")
    runs.clear()
    for num_rows in (BATCH, 2, BATCH, 2):
        assert guide(x[:num_rows])["house"].shape == (num_rows, 3)
    assert runs == [2]


# Latents outside the data plate.


def shared_mean(x: torch.Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0), 2.0))
    with pyro.plate("patients", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])


def test_latents_that_all_data_share() -> None:
    """p(mean, z | x) is a normal and n conditionals: then every log-weight equals log p(x)."""
    x = normal_x(BATCH)
    guide = make(shared_mean, (x,), structure="inverse")
    assert guide.parents == {"z": ("mean",)}
    precision = 1 / 4 + BATCH / 1.25
    linear = guide.heads[0].encoder.net.net[-1]
    weights = torch.zeros(2, 5)
    weights[0, 0], weights[0, 4] = 0.8, 0.2  # Of x and of the mean, prior to noise as 1 to 0.25.
    with torch.no_grad():
        linear.weight.copy_(weights)
        linear.bias.copy_(torch.tensor([0.0, softplus_inverse(torch.tensor(0.2).sqrt())]))
        guide.global_guide.locs.mean = x[:, 0].sum() / 1.25 / precision
        guide.global_guide.scales.mean = torch.tensor(precision).rsqrt()
    cov = torch.full((BATCH, BATCH), 4.0) + 1.25 * torch.eye(BATCH)
    expected = dist.MultivariateNormal(torch.zeros(BATCH), cov).log_prob(x[:, 0])
    loss = Trace_ELBO().loss(shared_mean, guide, x)
    torch.testing.assert_close(torch.tensor(-loss), expected, rtol=0, atol=1e-10)
    vectorised = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    loss = vectorised.loss(shared_mean, guide, x)
    torch.testing.assert_close(torch.tensor(-loss), expected, rtol=0, atol=1e-10)


def clustered(x: torch.Tensor) -> None:
    """Two plates side by side, at the same dimension."""
    with pyro.plate("clusters", 4):
        centre = pyro.sample("centre", dist.Uniform(torch.zeros(4), torch.arange(1.0, 5.0)))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(centre.sum(-1, keepdim=True), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])


def test_shared_latents_in_a_plate_beside_that_of_the_data() -> None:
    x = normal_x(BATCH)
    guide = make(clustered, (x,), structure="inverse")
    assert guide.parents == {"z": ("centre",)}
    weights = guide.heads[0].encoder.net.net[-1].weight
    assert weights.shape == (2, 4 + 4)
    with torch.no_grad():
        weights[0, :4] = 0
        weights[0, 4:] = 1
    trace = traced(guide, x)
    centre = trace.nodes["centre"]["value"]
    assert centre.shape == (4,)
    real = torch.logit(centre / torch.arange(1.0, 5.0))
    loc = trace.nodes["z"]["fn"].mean - guide.heads[0].encoder.net.net[-1].bias[0]
    torch.testing.assert_close(loc, real.sum().expand(BATCH))
    how: Any = {"num_particles": 7, "vectorize_particles": True, "max_plate_nesting": 1}
    assert math.isfinite(Trace_ELBO(**how).loss(clustered, guide, x))


def test_another_guide_for_shared_latents() -> None:
    x = normal_x(BATCH)
    guide = make(shared_mean, (x,), global_guide=AutoDiagonalNormal)
    assert guide(x).keys() == {"mean", "z"}
    assert "loc" in dict(guide.global_guide.named_parameters())
    with pytest.raises(TypeError, match="one of Pyro's autoguides, got function"):
        make(shared_mean, (x,), global_guide=lambda model: test_another_guide_for_shared_latents)


def test_globals_are_trained_from_the_first_step() -> None:
    x = normal_x(BATCH)
    guide = AmortizedAutoGuide(shared_mean, torch.nn.Identity(), structure="inverse")
    svi = SVI(shared_mean, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    assert len(before) == 4
    svi.step(x)
    for name, parameter in guide.named_parameters():
        assert not torch.equal(parameter, before[name]), name


# Discrete latents, masks.


def test_enumerated_latents_are_left_to_the_elbo() -> None:
    """The same loss as of a model that sums them out itself."""
    locs, odds = torch.tensor([-2.0, 1.0]), torch.tensor([0.3, 0.7])

    def observe(z: torch.Tensor, x: torch.Tensor) -> None:
        loc = (z[..., None] ** 2).expand(*z.shape, 4)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("patients", len(x)):
            kind = pyro.sample("kind", dist.Categorical(odds), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(locs[kind], 0.5))
            observe(z, x)

    def summed(x: torch.Tensor) -> None:
        with pyro.plate("patients", len(x)):
            parts = dist.Normal(locs, 0.5)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(odds), parts))
            observe(z, x)

    x = normal_x(BATCH)
    guide = make(model, (x,), structure="inverse")
    assert guide(x).keys() == {"z"}
    losses = []
    for program, elbo in ((model, TraceEnum_ELBO(max_plate_nesting=1)), (summed, Trace_ELBO())):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(program, guide, x))
    torch.testing.assert_close(*map(torch.tensor, losses))
    at_once = TraceEnum_ELBO(max_plate_nesting=1, num_particles=3, vectorize_particles=True)
    assert math.isfinite(at_once.loss(model, guide, x))
    assert importance_weighted_log_likelihood(model, guide, x, num_particles=9).elbo.shape == (5,)


def padded(x: torch.Tensor, lengths: torch.Tensor) -> None:
    """Sequences of several lengths."""
    with pyro.plate("patients", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z{t}", dist.Normal(0.9 * z, 0.5))
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])


class Lengths(torch.nn.Module):
    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("drawn", [False, True])
def test_masks_are_those_of_the_model(drawn: bool) -> None:
    """Behind the end of a sequence neither program has a density; masks change with the batch."""
    x = normal_x(6)

    def model(x: torch.Tensor, lengths: torch.Tensor) -> None:
        with pyro.plate("patients", 6, subsample_size=3) as rows:
            with poutine.mask(mask=1 < lengths[rows]):
                z = pyro.sample("z1", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows, 0])

    program = model if drawn else padded
    guide = AmortizedAutoGuide(program, Lengths(), structure="inverse")
    for lengths in (torch.tensor([4, 1, 2, 4, 1, 3]), torch.tensor([1, 2, 3, 1, 4, 1])):
        trace = traced(guide, x, lengths)
        model_trace = traced(poutine.replay(program, trace=trace), x, lengths)
        rows = trace.nodes["patients"]["value"] if drawn else torch.arange(6)
        assert torch.equal(model_trace.nodes["patients"]["value"], rows)
        for t in (1,) if drawn else range(4):
            site = trace.nodes[f"z{t}"]
            assert torch.equal(site["mask"], t < lengths[rows])
            assert torch.equal(site["mask"], model_trace.nodes[f"z{t}"]["mask"])
            assert torch.equal(site["log_prob"] == 0, t >= lengths[rows])
    if not drawn:
        estimate = importance_weighted_log_likelihood(program, guide, x, lengths, num_particles=9)
        assert estimate.log_likelihood.isfinite().all()


# A module like others.


def plain(x: torch.Tensor) -> None:
    with pyro.plate("patients", len(x)):
        top = pyro.sample("top", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        loc = top.expand(*top.shape[:-1], 4)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def contract_case(**how: Any) -> Case:
    def pair() -> tuple[Any, Any]:
        decoder = MLP(3, [7], 4, activation=torch.nn.Tanh)
        model = HierarchicalVAE(
            [3, 2], decoder, Normal(learn=True), hidden=[7], activation=torch.nn.Tanh
        )
        encoder = MLP(4, [7], 5, activation=torch.nn.Tanh)
        return model, AmortizedAutoGuide(model, encoder, example=(normal_x(3),), **how)

    return Case(pair, normal_x, latents={"z1": (3,), "z2": (2,)})


CASES = {
    "mean-field": contract_case(),
    "inverse, hidden layers": contract_case(structure="inverse", hidden=[6]),
    "inverse, full covariance": contract_case(structure="inverse", full_covariance=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class TestGuide(GuideContract):
    pass


def test_copies_and_files_of_a_guide_with_shared_latents() -> None:
    x = normal_x(BATCH)
    guides = [make(shared_mean, (x,), structure="inverse") for _ in range(2)]
    guides[1].load_state_dict(guides[0].state_dict())
    trace = traced(guides[0], x)
    for other in (guides[1], copy.deepcopy(guides[0])):
        found = traced(poutine.replay(other, trace=trace), x).log_prob_sum()
        torch.testing.assert_close(found, trace.log_prob_sum())


def test_a_state_needs_heads() -> None:
    x = normal_x(BATCH)
    state = make(plain, (x,)).state_dict()
    fresh = AmortizedAutoGuide(plain, torch.nn.Identity())
    with pytest.raises(ValueError, match="heads are made.*Pass example="):
        fresh.load_state_dict(state)
    fresh(x)
    fresh.load_state_dict(state)


def test_the_models_parameters_stay_its_own() -> None:
    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = torch.nn.Linear(2, 4)

        def forward(self, measured: torch.Tensor) -> None:
            with pyro.plate("patients", len(measured)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                fn = dist.Normal(self.decoder(z), 1.0).to_event(1)
                pyro.sample("x", fn, obs=measured)

    model = Model()
    guide = AmortizedAutoGuide(model, torch.nn.Linear(4, 3), example=(normal_x(2),))
    assert len(list(guide.parameters())) == 4
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in model.parameters()}
    assert not pyro.get_param_store().keys()
    assert model.training
    with pytest.raises(ValueError, match="at least one row in measured, got an empty batch"):
        guide(torch.zeros(0, 4))
    twin_model, twin = copy.deepcopy((model, guide))
    assert twin._model[0] is twin_model


def test_set_up_does_not_move_what_a_seed_gives() -> None:
    """But for the weights of the heads, which draw as any module does."""
    x, states = normal_x(BATCH), []
    for structure in ("mean-field", "inverse"):
        pyro.set_rng_seed(0)
        make(one_latent(SUPPORTS["real"]), (x,), structure=structure)
        states.append(torch.get_rng_state())
    pyro.set_rng_seed(0)
    MLP(4, (), 2)
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


def test_dtype_follows_the_features() -> None:
    x = normal_x(BATCH).float()
    torch.set_default_dtype(torch.float32)
    try:
        model = one_latent(SUPPORTS["simplex"])
        guide = AmortizedAutoGuide(model, torch.nn.Identity())
        torch.set_default_dtype(torch.float64)
        assert guide(x)["z"].dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in guide.parameters())
    finally:
        torch.set_default_dtype(torch.float64)


# Refusals.


class Returning(torch.nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(x)


FEATURES: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = {
    "a tuple": (lambda x: (x, x), TypeError, "a tensor of floats, got tuple"),
    "integers": (lambda x: x.long(), TypeError, "a tensor of floats, got torch.int64"),
    "images": (lambda x: x[None], ValueError, r"\(batch, width\), got \(1, 5, 4\)"),
    "other rows": (lambda x: x[:3], ValueError, r"features of 5 rows, those of plate 'patients'"),
    "NaN": (lambda x: x.clamp(max=-9).log(), ValueError, "finite features, got 20 that are not"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_are_none(name: str) -> None:
    change, error, match = FEATURES[name]
    guide = AmortizedAutoGuide(hierarchy(), Returning(change))
    with pytest.raises(error, match=match):
        guide(hierarchy().draw(5))


def test_features_that_change_their_width() -> None:
    chain = hierarchy()
    guide = AmortizedAutoGuide(chain, Returning(lambda x: x[:, : len(x)]))
    guide(chain.draw(3))
    with pytest.raises(ValueError, match=r"shape \(batch, 3\), got \(2, 2\)"):
        guide(chain.draw(2))


def test_arguments_of_the_constructor() -> None:
    encoder: Any = torch.nn.Identity()
    with pytest.raises(TypeError, match="an encoder that is a module, got function"):
        AmortizedAutoGuide(plain, plain)
    wrong: Any = "inverted"
    with pytest.raises(ValueError, match="'mean-field' or 'inverse', got 'inverted'"):
        AmortizedAutoGuide(plain, encoder, structure=wrong)
    wrong = normal_x(2)
    with pytest.raises(TypeError, match="example to be a tuple of arguments, got Tensor"):
        AmortizedAutoGuide(plain, encoder, example=wrong)


def maybe(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    with pyro.plate("patients", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        y = pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.sample("x", dist.Normal(y, 1.0), obs=x[:, 0])


class Ignoring(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x


def test_a_model_that_changes_with_its_arguments() -> None:
    x = normal_x(BATCH)
    guide = AmortizedAutoGuide(maybe, Ignoring(), example=(x,))
    with pytest.raises(ValueError, match=r"same latents of the data plate in all arguments, got "):
        guide(x, x[:, 0])
    nested = AmortizedAutoGuide(texts, torch.nn.Identity(), plate="texts", example=(counted(4),))
    nested_again = Returning(lambda counts: counts[:, :3])
    nested.encoder = nested_again
    with pytest.raises(ValueError, match="same plates around site '.*' in all arguments, got siz"):
        nested(torch.cat([counted(4), counted(4)], 1))


def limited(x: torch.Tensor, high: Any) -> None:
    with pyro.plate("patients", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, high))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_bounds_that_change_with_an_argument(number: Callable[[float], Any]) -> None:
    x = normal_x(BATCH)
    guide = AmortizedAutoGuide(limited, Ignoring(), example=(x, number(1.0)))
    guide(x, number(1.0))
    with pytest.raises(ValueError, match=r"site 'z' to have one support, got .* in two arguments"):
        guide(x, number(10.0))


def test_a_size_in_a_tensor() -> None:
    def model(x: torch.Tensor, size: torch.Tensor) -> None:
        with pyro.plate("patients", int(size), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x = normal_x(BATCH)
    guide = AmortizedAutoGuide(model, Ignoring(), example=(x, torch.tensor(10)))
    assert traced(guide, x, torch.tensor(40)).nodes["z"]["scale"] == 40 / BATCH
