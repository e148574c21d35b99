"""Bounds on subsets of the modalities against exact answers, values by hand, and row by row."""

import copy
import pickle
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_codes import Pinned
from linear_modalities import LinearModalities, mixed_patterns
from pyro import poutine
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from pyro_vae import fit, scale_kl
from pyro_vae.guides import MixtureOfExperts, ProductOfExperts
from pyro_vae.likelihoods import Normal
from pyro_vae.models import MultimodalVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import (
    TraceCapacity_ELBO,
    TraceExpertKL_ELBO,
    TraceFreeBits_ELBO,
    TraceGECO_ELBO,
    TraceIWAE_ELBO,
    TraceSubsets_ELBO,
)
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

Tensors = dict[str, torch.Tensor]
close = torch.testing.assert_close
ALL = [names for r in (3, 2, 1) for names in combinations(("image", "sound", "text"), r)]
SINGLE = [("image",), ("sound",), ("text",)]


def masked_nowhere(batch: Tensors) -> Tensors:
    return {name: torch.ones(len(x), dtype=torch.bool) for name, x in batch.items()}


# ---------------------------------------------------------------- exact answers


@pytest.mark.parametrize("inner", [Trace_ELBO(), TraceIWAE_ELBO(3)])
@pytest.mark.parametrize(
    ("subsets", "listed"),
    [
        ("joint+single", [ALL[0], *SINGLE]),
        ("single", SINGLE),
        ("all", ALL),
        ([("text", "image"), ["sound"]], [("image", "text"), ("sound",)]),
    ],
)
def test_at_the_exact_posterior_each_term_is_a_log_likelihood(
    inner: Any, subsets: Any, listed: Any
) -> None:
    """In every pattern of missing modalities, which NaN in their place do not disturb."""
    p = LinearModalities()
    objective = TraceSubsets_ELBO(inner, subsets)
    for batch, present in ((p.data(), None), mixed_patterns(p.data(9))):
        masks = present or masked_nowhere(batch)
        each = []
        for names in listed:
            seen = {n: mask & (n in names) for n, mask in masks.items()}
            if subsets == "all":  # Each that a row holds, once.
                held = torch.stack([masks[n] for n in names]).all(0)
                seen = {n: mask & held for n, mask in seen.items()}
            each.append(p.exact.log_prob(batch, seen).sum())
        joint = p.exact.log_prob(batch, masks).sum()
        args = (p.model, p.guide, batch, present)
        assert objective.loss(*args) == pytest.approx(-float(joint), rel=1e-12)
        assert objective.loss_and_grads(*args) == pytest.approx(-float(joint), rel=1e-12)
        close(objective.differentiable_loss(*args), -joint)
        close(objective.training_loss(*args), -torch.stack(each).sum())


def log_likelihood(
    p: LinearModalities, batch: Tensors, loc: torch.Tensor, scale: torch.Tensor
) -> Tensors:
    """E[log p(x_m | code)] of each row for code ~ N(loc, scale), by hand."""
    found = {}
    for name, x in batch.items():
        weight, noise = p.weight[name], p.scale[name]
        mean = p.loc[name] + loc @ weight.mT
        error = (x - mean).square() + scale.square() @ weight.square().mT
        found[name] = (-0.5 * error / noise**2 - noise.log() - 0.9189385332046727).sum(-1)
    return found


def kl(loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """KL(N(loc, scale) || N(0, I)) by hand."""
    return 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)


@pytest.mark.parametrize(
    ("subsets", "listed"),
    [("all", ALL), ("single", SINGLE), ("joint+single", [None, *SINGLE]), (ALL[2:], ALL[2:])],
)
def test_the_average_over_what_a_row_holds(subsets: Any, listed: Any) -> None:
    """With closed forms, five standard errors of 30 times 100 particles."""
    p = LinearModalities(noise=1.5)
    batch, present = mixed_patterns(p.data(9))
    expected = torch.zeros(9)
    for row in range(9):
        held = tuple(n for n in batch if present[n][row])
        one = {n: batch[n][row : row + 1] for n in held}
        terms = []
        for names in listed:
            names = held if names is None else names
            if names and set(names) <= set(held):
                loc, scale = p.product({n: one[n] for n in names})
                values = log_likelihood(p, one, loc, scale)
                terms.append(sum(values.values()) - kl(loc, scale))
        expected[row] = torch.cat(terms).mean() if terms else 0.0
    inner = TraceMeanField_ELBO(num_particles=100, vectorize_particles=True)
    objective = TraceSubsets_ELBO(inner, subsets, target="all")
    args = (p.model, p.guide, batch, present)
    draws = torch.tensor([-objective.loss(*args) for _ in range(30)])
    error = draws.std() / 30**0.5
    assert abs(draws.mean() - expected.sum()) < 5 * error
    assert 5 * error < 0.02 * expected.sum().abs()
    assert expected.sum() < p.exact.log_prob(batch, present).sum()


# ---------------------------------------------------------------- samples that are fixed


class Pair:
    """A user's pair: u ~ N(0, 1)^2 shared, own_m ~ N(0.3, 1.2) private, in a plate "rows".

    What is drawn is fixed by the locations, so that runs can be compared sample by sample.
    """

    def __init__(self, *, private: bool = False, hierarchical: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params: Tensors = {}
        for name, width in (("a", 3), ("b", 2), ("c", 4)):
            for what, shape in (("out", (3, width)), ("in", (width, 2)), ("own", (width,))):
                value = 0.5 * torch.randn(shape, generator=generator)
                self.params[f"{what} {name}"] = value.requires_grad_()
        self.params["prior"] = torch.tensor(0.3).requires_grad_()
        self.private, self.hierarchical = private, hierarchical
        self.batch = {
            n: torch.randn(5, width, generator=generator)
            for n, width in zip("abc", (3, 2, 4), strict=True)
        }

    def expert(self, names: Any, batch: Any, present: Any) -> tuple[torch.Tensor, torch.Tensor]:
        num = len(next(iter(batch.values())))
        loc, precision = torch.zeros(num, 2), torch.ones(num, 1)
        for name in names:
            seen = (present or {}).get(name, torch.ones(num, dtype=torch.bool)).unsqueeze(-1)
            x = torch.where(seen, batch[name], 0.0)
            loc = loc + torch.where(seen, 2 * x @ self.params[f"in {name}"], 0.0)
            precision = precision + torch.where(seen, 2.0, 0.0)
        return loc / precision, precision**-0.5

    def own(self, name: str, x: torch.Tensor, u: torch.Tensor) -> Any:
        shift = u.sum(-1) if self.hierarchical else 0.0
        return Pinned(x @ self.params[f"own {name}"] + shift, torch.tensor(0.4))

    def prior(self) -> Any:
        return Pinned(self.params["prior"], torch.tensor(1.2))

    def likelihood(self, name: str, u: torch.Tensor, own: torch.Tensor) -> Any:
        weight = self.params[f"out {name}"]
        return dist.Normal(u @ weight[:2] + own.unsqueeze(-1) * weight[2], 0.8).to_event(1)

    def model(self, batch: Mapping[str, torch.Tensor], present: Any = None) -> None:
        with pyro.plate("rows", len(next(iter(batch.values())))):
            u = pyro.sample("u", Pinned(torch.zeros(2), torch.ones(2)).to_event(1))
            for name, x in batch.items():
                own = torch.zeros(())
                with masked(name, present):
                    if self.private:
                        own = pyro.sample(f"own_{name}", self.prior())
                    pyro.sample(f"view {name}", self.likelihood(name, u, own), obs=x)

    def guide(self, batch: Mapping[str, torch.Tensor], present: Any = None) -> None:
        loc, scale = self.expert(batch, batch, present)
        with pyro.plate("rows", len(loc)):
            u = pyro.sample("u", Pinned(loc, scale.expand_as(loc)).to_event(1))
            for name, x in batch.items() if self.private else ():
                with masked(name, present):
                    pyro.sample(f"own_{name}", self.own(name, x, u))

    def elbo(
        self,
        names: Any,
        batch: Tensors,
        private: str | None = None,
    ) -> torch.Tensor:
        """E_{q(u | names)}[log p(batch | u)] - KL of a complete batch, row by row, by hand."""
        loc, scale = self.expert(names, batch, None)
        u = Pinned(loc, scale.expand_as(loc)).rsample()
        value = -kl(loc, scale.expand_as(loc))
        for name, x in batch.items():
            own = torch.zeros(())
            if self.private:
                prior, q = self.prior(), self.own(name, x, u)
                if private == "prior" and name not in names:
                    q = prior.expand(q.batch_shape)
                own = q.rsample()
                ratio = q.scale**2 / prior.scale**2
                mean = (q.loc - prior.loc).square() / prior.scale**2
                value = value - 0.5 * (ratio + mean - 1 - ratio.log())
            value = value + self.likelihood(name, u, own).log_prob(x)
        return value

    def with_gradient(self, loss: torch.Tensor) -> Tensors:
        grads = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        zeros = zip(self.params.items(), grads, strict=True)
        return {"loss": loss.detach()} | {
            n: torch.zeros_like(v) if g is None else g for (n, v), g in zeros
        }


def masked(name: str, present: Any) -> Any:
    mask = (present or {}).get(name)
    return nullcontext() if mask is None else poutine.mask(mask=mask)


SUBSETS_OF_ABC = [names for r in (3, 2, 1) for names in combinations("abc", r)]
PRESENT = {
    "a": torch.tensor([True, True, False, False, True]),
    "b": torch.tensor([True, False, True, False, True]),
    "c": torch.tensor([True, False, False, False, False]),
}


def row_of(batch: Tensors, present: Tensors, row: int) -> Tensors:
    return {n: x[row : row + 1] for n, x in batch.items() if present[n][row]}


INNER: dict[str, Callable[[], Any]] = {
    "trace": Trace_ELBO,
    "mean field": TraceMeanField_ELBO,
    "mean field, particles": lambda: TraceMeanField_ELBO(2, vectorize_particles=True),
    "iwae": lambda: TraceIWAE_ELBO(3),
    "iwae, dreg": lambda: TraceIWAE_ELBO(3, "dreg"),
    "free bits": lambda: TraceFreeBits_ELBO(3.0, over="datum"),
}


ROWS: list[tuple[str, dict[str, Any]]] = [
    ("trace", {}),
    ("mean field", {"subsets": "all"}),
    ("mean field", {"subsets": "all", "target": "all", "private": "prior"}),
    ("mean field, particles", {"subsets": "single"}),
    ("mean field, particles", {"target": "all"}),
    ("iwae", {}),
    ("iwae", {"subsets": "single", "target": "all"}),
    ("iwae, dreg", {"subsets": "single", "target": "all", "private": "prior"}),
    ("free bits", {}),
    ("free bits", {"subsets": "all", "target": "all"}),
]


@pytest.mark.parametrize(("inner", "k"), ROWS)
def test_masks_say_the_same_as_rows_one_by_one(inner: str, k: dict[str, Any]) -> None:
    """Reported loss, training loss and gradients, for every inner objective."""
    p = Pair(private="private" in k)
    objective, found = TraceSubsets_ELBO(INNER[inner](), **k), []
    for method in (objective.differentiable_loss, objective.training_loss):
        apart = torch.zeros(())
        for row in range(5):
            if one := row_of(p.batch, PRESENT, row):
                apart = apart + method(p.model, p.guide, one)
        found.append(p.with_gradient(method(p.model, p.guide, p.batch, PRESENT)))
        close(found[-1], p.with_gradient(apart))
    assert torch.equal(found[0]["loss"], found[1]["loss"]) == (
        k.get("target") == "all" and "free" not in inner
    )


# ---------------------------------------------------------------- values by hand


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("private", [None, "own", "prior"])
@pytest.mark.parametrize(
    ("subsets", "listed"), [("all", SUBSETS_OF_ABC), ([("b",), ("a", "c")], [("b",), ("a", "c")])]
)
def test_the_average_by_hand(subsets: Any, listed: Any, private: Any, hierarchical: bool) -> None:
    """With private latents, which in a hierarchy see the shared ones of the subset."""
    p = Pair(private=private is not None, hierarchical=hierarchical)
    for inner in (TraceMeanField_ELBO(), TraceFreeBits_ELBO(0.0)):
        objective = TraceSubsets_ELBO(inner, subsets, target="all", private=private or "own")
        found = objective.differentiable_loss(p.model, p.guide, p.batch)
        expected = torch.stack([p.elbo(names, p.batch, private) for names in listed]).mean(0)
        close(p.with_gradient(found), p.with_gradient(-expected.sum()))


@pytest.mark.parametrize("private", ["own", "prior"])
def test_where_private_latents_come_from(private: Any) -> None:
    """Their sites keep the order of the guide, and those from the prior cancel."""
    p, seen = Pair(private=True), list[Any]()

    class Watched(TraceMeanField_ELBO):  # type: ignore[misc]
        def _get_trace(self, *args: Any) -> Any:
            model_trace, guide_trace = super()._get_trace(*args)
            seen.append((model_trace.nodes, guide_trace.nodes))
            return model_trace, guide_trace

    objective = TraceSubsets_ELBO(Watched(), [("b",)], target="all", private=private)
    objective.loss(p.model, p.guide, p.batch)
    ((of_model, of_guide),) = seen
    drawn = [n for n, s in of_guide.items() if s["type"] == "sample" and n != "rows"]
    assert drawn == ["u", "own_a", "own_b", "own_c"]
    loc, scale = p.expert("b", p.batch, None)
    close(of_guide["u"]["fn"].base_dist.loc, loc)
    for name in "abc":
        loc = of_guide[f"own_{name}"]["fn"].loc
        same = torch.equal(loc, of_model[f"own_{name}"]["fn"].loc)
        assert same == (private == "prior" and name != "b")
        if not same:
            close(loc, p.batch[name] @ p.params[f"own {name}"])
    found = p.with_gradient(objective.differentiable_loss(p.model, p.guide, p.batch))
    for name in "ac":
        assert bool(found[f"own {name}"].any()) == (private == "own")


@pytest.mark.parametrize("private", ["own", "prior"])
@pytest.mark.parametrize("estimator", ["standard", "stl", "dreg", "vimco"])
def test_particles_at_once_and_one_by_one(private: Any, estimator: Any) -> None:
    p = Pair(private=True, hierarchical=True)
    found = []
    for how in (True, False, None):
        inner = TraceIWAE_ELBO(3, estimator, vectorize_particles=how)
        objective = TraceSubsets_ELBO(inner, "all", target="all", private=private)
        loss = objective.differentiable_loss(p.model, p.guide, p.batch, PRESENT)
        found.append(p.with_gradient(loss))
    close(found[1], found[0])
    close(found[2], found[0])


def test_particles_have_priors_of_their_own() -> None:
    """Not one draw of a private latent for all of them."""
    p = Pair(private=True)
    shapes = []

    class Watch(poutine.messenger.Messenger):  # type: ignore[misc]
        def _pyro_post_sample(self, msg: Any) -> None:
            if msg["name"] == "own_a":
                shapes.append(tuple(msg["value"].shape))

    inner = TraceIWAE_ELBO(4, vectorize_particles=True)
    objective = TraceSubsets_ELBO(inner, [("b",)], target="all", private="prior")
    objective.loss(p.model, p.guide, p.batch)
    with Watch():
        objective.loss(p.model, p.guide, p.batch)
    assert set(shapes) == {(4, 5)}


def test_a_guide_of_one_modality_has_no_private_latents() -> None:
    p = Pair(private=True)
    batch = {"a": p.batch["a"]}
    objective = TraceSubsets_ELBO(TraceMeanField_ELBO(), "all", target="all")
    found = objective.differentiable_loss(p.model, p.guide, batch)
    close(found, -p.elbo("a", batch, "own").sum())


# ---------------------------------------------------------------- subsets


def test_random_subsets_are_others_and_change() -> None:
    p = LinearModalities()
    rows = {f"{n}{i}": x for i in (1, 2) for n, x in p.data().items()}  # Six modalities.
    seen: list[tuple[str, ...]] = []

    def model(batch: Tensors) -> None:
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for name, x in batch.items():
                fn = dist.Normal(z.sum(-1, keepdim=True), 1.0).expand(x.shape)
                pyro.sample(name, fn.to_event(1), obs=x)

    def guide(batch: Tensors) -> None:
        seen.append(tuple(batch))
        with pyro.plate("rows", 6):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    objective = TraceSubsets_ELBO(Trace_ELBO(), num_random=3)
    drawn = set()
    for _ in range(20):
        seen.clear()
        objective.training_loss(model, guide, rows)
        joint, *others = seen
        assert joint == tuple(rows)
        assert others[:6] == [(name,) for name in rows]
        assert len(set(others[6:])) == 3
        assert all(1 < len(names) < 6 for names in others[6:])
        drawn |= set(others[6:])
    assert len(drawn) > 20
    seen.clear()
    objective.loss(model, guide, rows)  # The joint bound needs none of them.
    assert seen == [tuple(rows)]
    seen.clear()
    objective.training_loss(model, guide, dict(list(rows.items())[:2]))
    assert len(seen) == 3  # There are no others.


def test_a_missing_modality_may_be_told_by_none_a_missing_key_or_a_mask() -> None:
    p, absent = Pair(private=True), torch.zeros(5, dtype=torch.bool)
    ab = {n: p.batch[n] for n in "ab"}
    told: list[tuple[Any, ...]] = [
        (ab,),
        ({**ab, "c": None},),
        (p.batch, {"c": absent}),
        ({**p.batch, "c": p.batch["c"] * torch.nan}, {"c": absent}),
        (ab, {"c": absent}),
    ]
    for subsets, target in (("joint+single", "subset"), ("joint+single", "all"), ("all", "all")):
        objective = TraceSubsets_ELBO(TraceMeanField_ELBO(), subsets, target=target)  # type: ignore[arg-type]
        for method in (objective.training_loss, objective.loss):
            values = []
            for batch, *present in told:
                with pyro.validation_enabled(False):  # NaN: Pair looks at masked values.
                    value = torch.as_tensor(method(p.model, p.guide, batch, *present))
                    values.append(value.item())
            assert values == pytest.approx([values[0]] * 5, nan_ok=False)


def test_rows_in_which_nothing_is_observed() -> None:
    """They cost nothing, though this guide does not return to the prior there."""
    p, nothing = Pair(), {n: torch.zeros(5, dtype=torch.bool) for n in "abc"}

    def guide(batch: Any, present: Any = None) -> None:
        with pyro.plate("rows", 5):
            pyro.sample("u", dist.Normal(torch.full((2,), 7.0), 0.1).to_event(1))

    for target in ("subset", "all"):
        objective = TraceSubsets_ELBO(TraceMeanField_ELBO(), target=target)  # type: ignore[arg-type]
        assert objective.loss(p.model, guide, p.batch, nothing) == 0
        assert objective.training_loss(p.model, guide, p.batch, nothing) == 0
        assert objective.loss(p.model, guide, {"a": None}, nothing) == 0
        grads = p.with_gradient(objective.differentiable_loss(p.model, p.guide, p.batch, nothing))
        assert not any(value.any() for value in grads.values())
    iwae = TraceSubsets_ELBO(TraceIWAE_ELBO(2), target="all")
    assert iwae.loss(p.model, p.guide, {"a": None}, nothing) == 0


# ---------------------------------------------------------------- programs of all kinds


def grid_model(batch: Tensors, present: Any = None) -> None:
    """A row lies in the second plate dimension from the right; "rate" belongs to no row."""
    rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
    num = len(next(iter(batch.values())))
    with pyro.plate("data", 3 * num, subsample=torch.arange(num), dim=-2):
        code = pyro.sample("code", dist.Normal(0.0, 1.0))
        for name, x in batch.items():
            mask = (present or {}).get(name, torch.ones(num, dtype=torch.bool))
            with (
                pyro.plate(f"entries of {name}", x.shape[1], dim=-1),
                poutine.mask(mask=mask.unsqueeze(-1)),
            ):
                pyro.sample(name, dist.Normal(code + rate, 1.0), obs=x)


def grid_guide(batch: Tensors, present: Any = None) -> None:
    num = len(next(iter(batch.values())))
    pyro.sample("rate", Pinned(torch.tensor(0.2), torch.tensor(0.5)))
    loc = sum(x.mean(-1, keepdim=True) for x in batch.values())
    with pyro.plate("data", 3 * num, subsample=torch.arange(num), dim=-2):
        pyro.sample("code", Pinned(loc, torch.full_like(loc, 0.7)))


def test_a_plate_elsewhere_a_subsample_and_a_latent_of_all_rows() -> None:
    """The sum is that of the ELBOs of each subset of rows; the shared latent counts in each."""
    batch = {"a": torch.randn(3, 3), "b": torch.randn(3, 2)}
    present = {"b": torch.tensor([True, False, True])}
    objective = TraceSubsets_ELBO(TraceMeanField_ELBO(), "single")
    a, b = ({n: batch[n]} for n in "ab")
    b = {"b": b["b"][[0, 2]]}
    loss = objective.training_loss(grid_model, grid_guide, batch, present)
    elbo = TraceMeanField_ELBO().differentiable_loss
    close(loss, elbo(grid_model, grid_guide, a) + elbo(grid_model, grid_guide, b))
    to_all = TraceSubsets_ELBO(TraceMeanField_ELBO(), "single", target="all")
    with pytest.raises(ValueError, match="expected every random site inside .*, got site 'rate'"):
        to_all.loss(grid_model, grid_guide, batch, present)
    fixed = [poutine.condition(p, {"rate": torch.tensor(0.2)}) for p in (grid_model, grid_guide)]
    hidden = [poutine.block(program, hide=["rate"]) for program in fixed]
    whole = to_all.loss(*hidden, batch, present)
    rows = [
        to_all.loss(*hidden, {n: x[r : r + 1] for n, x in batch.items() if n == "a" or r != 1})
        for r in range(3)
    ]
    assert whole == pytest.approx(sum(rows))


def test_weights_of_modalities_and_beta() -> None:
    p = Pair()
    half = [scale_kl(program, 0.5) for program in (p.model, p.guide)]
    objective = TraceSubsets_ELBO(TraceMeanField_ELBO(), "single", target="all")
    found = objective.differentiable_loss(*half, p.batch)
    kls = torch.stack([kl(*_expanded(p.expert(n, p.batch, None))) for n in "abc"]).mean(0)
    plain = torch.stack([p.elbo(n, p.batch) for n in "abc"]).mean(0)
    close(found, -(plain + 0.5 * kls).sum())


def _expanded(moments: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return moments[0], moments[1].expand_as(moments[0])


def test_last_short_batches_and_several_forms_with_one_objective() -> None:
    p = Pair(private=True)

    def make() -> TraceSubsets_ELBO:
        inner = TraceIWAE_ELBO(2, vectorize_particles=True)
        return TraceSubsets_ELBO(inner, "single", target="all", private="prior")

    objective = make()
    for rows in (5, 2):
        batch = {n: x[:rows] for n, x in p.batch.items()}
        present = {n: mask[:rows] for n, mask in PRESENT.items()}
        for args in ((batch, present), (batch,), ({"b": batch["b"], "a": batch["a"]},)):
            fresh = make().loss(p.model, p.guide, *args)
            assert objective.loss(p.model, p.guide, *args) == pytest.approx(fresh)


def library_pair(guide: Any = ProductOfExperts, private: bool = True, **k: Any) -> Any:
    widths = {"image": 5, "sound": 4, "text": 3}
    dim = 2 + private
    model = MultimodalVAE(
        {n: MLP(dim, [6], w) for n, w in widths.items()},
        {n: Normal() for n in widths},
        StandardNormalPrior(2),
        dict.fromkeys(widths, 1) if private else None,
        **k,
    )
    of_private = {n: MLP(w, [], 2) for n, w in widths.items()} if private else None
    return model, guide({n: MLP(w, [6], 4) for n, w in widths.items()}, 2, of_private)


@pytest.mark.parametrize("private", ["own", "prior"])
@pytest.mark.parametrize("guide", [ProductOfExperts, MixtureOfExperts])
def test_programs_of_the_library(guide: Any, private: Any) -> None:
    """Every parameter that a step of SVI is to move gets there."""
    model, guide = library_pair(guide)
    batch, present = mixed_patterns(LinearModalities().data(9))
    inner = TraceIWAE_ELBO(2, "dreg") if private == "prior" else Trace_ELBO()
    objective = TraceSubsets_ELBO(inner, target="all", private=private)
    parameters = [*model.parameters(), *guide.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    svi.step(batch, present)
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert not any(map(torch.equal, before, parameters))


def test_weights_in_the_model_stand_outside_of_no_logarithm() -> None:
    model, guide = library_pair(private=False, weights={"image": 0.5})
    batch = LinearModalities().data()
    TraceSubsets_ELBO(TraceIWAE_ELBO(2)).loss(model, guide, batch)
    TraceSubsets_ELBO(TraceMeanField_ELBO(), target="all").loss(model, guide, batch)
    objective = TraceSubsets_ELBO(TraceIWAE_ELBO(2), target="all")
    with pytest.raises(ValueError, match="expected one scale around all observed sites"):
        objective.loss(model, guide, batch)


# ---------------------------------------------------------------- the inner objective


def test_what_inner_learns_stays_there_and_nothing_else() -> None:
    p, inner = Pair(), TraceGECO_ELBO(1.0, rate=0.1)
    before = copy.copy(inner.__dict__)
    objective = TraceSubsets_ELBO(inner, "single")
    objective.loss_and_grads(p.model, p.guide, p.batch)
    assert set(inner.__dict__) == set(before)
    assert all(value is inner.__dict__[name] for name, value in before.items())
    assert inner.multiplier > 1
    again = TraceIWAE_ELBO(2)
    TraceSubsets_ELBO(again).loss(p.model, p.guide, p.batch)
    assert again._runner is None


def test_the_schedule_of_inner_goes_on() -> None:
    p, schedule = Pair(), LinearWarmup(2, end=50.0)
    objective = TraceSubsets_ELBO(TraceCapacity_ELBO(schedule, 3.0))
    losses = []
    for _ in range(3):
        losses.append(objective.training_loss(p.model, p.guide, p.batch).item())
        schedule.step()
    assert len({round(loss, 6) for loss in losses}) == 3


def test_programs_are_looked_at_once() -> None:
    """For each subset, not in every step."""
    p, calls = Pair(private=True), list[int]()

    def guide(*args: Any) -> None:
        calls.append(1)
        p.guide(*args)

    for inner in (TraceIWAE_ELBO(1), TraceMeanField_ELBO()):
        objective = TraceSubsets_ELBO(inner, "all", target="all")
        objective.loss(p.model, guide, p.batch)
        calls.clear()
        objective.loss(p.model, guide, p.batch)
        assert len(calls) == 1 + 2 * 6  # Given a subset, and everything for what is private.


def test_copies_of_inner_are_made_once_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    p, other, made = Pair(), Pair(), list[Any]()

    class Counted(TraceMeanField_ELBO):  # type: ignore[misc]
        def __copy__(self) -> Any:
            made.append(TraceMeanField_ELBO())
            return made[-1]

    objective = TraceSubsets_ELBO(Counted(), "all", target="all")
    for _ in range(3):
        objective.loss(p.model, p.guide, p.batch)
    assert len(made) == len(objective._copies) == 7
    objective.loss(other.model, other.guide, {"a": p.batch["a"]})
    assert len(objective._copies) == 1  # None that knows programs which may be gone.
    monkeypatch.setattr("pyro_vae.objectives.subsets.MOST_SUBSETS", 3)
    monkeypatch.setattr("pyro_vae.objectives.subset_programs.MOST_SUBSETS", 3)
    p = Pair(private=True)
    fresh = TraceSubsets_ELBO(TraceMeanField_ELBO(), "all", target="all", private="prior")
    loss = fresh.loss(p.model, p.guide, p.batch)
    assert fresh.loss(p.model, p.guide, p.batch) == pytest.approx(loss)
    assert fresh._programs is not None
    assert 0 < len(fresh._copies) <= 3
    assert 0 < len(fresh._programs[2]._latents) <= 3


def test_inner_elbos_of_pyro_without_a_differentiable_loss() -> None:
    p = LinearModalities()
    batch, present = mixed_patterns(p.data())
    joint = -float(p.exact.log_prob(batch, present).sum())
    for inner in (TraceGraph_ELBO(), RenyiELBO(num_particles=2)):
        objective = TraceSubsets_ELBO(inner)
        args = (p.model, p.guide, batch, present)
        assert objective.loss(*args) == pytest.approx(joint)
        assert objective.loss_and_grads(*args) == pytest.approx(joint)
    averaged = TraceSubsets_ELBO(TraceGraph_ELBO(), [("image",)], target="all")
    complete = p.data()
    pyro.set_rng_seed(1)
    found = averaged.loss(p.model, p.guide, complete)
    pyro.set_rng_seed(1)
    again = TraceSubsets_ELBO(Trace_ELBO(), [("image",)], target="all")
    assert found == pytest.approx(again.loss(p.model, p.guide, complete))


# ---------------------------------------------------------------- what it is for


def single_bounds(model: Any, guide: Any, batch: Tensors) -> float:
    """Mean of the negative ELBOs of each modality alone, nats, given all."""
    elbo = TraceMeanField_ELBO(num_particles=50, vectorize_particles=True)
    with torch.no_grad():
        return sum(elbo.loss(model, guide, {n: x}) for n, x in batch.items()) / len(batch)


def test_subsets_teach_the_guide_about_single_modalities() -> None:
    z = torch.randn(100, 2)
    batch = {n: z @ torch.randn(2, 3) + 0.5 * torch.randn(100, 3) for n in ("image", "sound")}
    found = []
    for objective in (TraceMeanField_ELBO(), TraceSubsets_ELBO(TraceMeanField_ELBO())):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        model = MultimodalVAE(
            {n: MLP(2, [], 3) for n in batch},
            {n: Normal() for n in batch},
            StandardNormalPrior(2),
        )
        guide = ProductOfExperts({n: MLP(3, [], 4) for n in batch}, 2)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
        for _ in range(80):
            svi.step(batch)
        found.append(single_bounds(model, guide, batch))
    joint_only, with_subsets = found
    assert with_subsets < joint_only - 10


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("args", "k", "error", "message"),
    [
        ((1,), {}, TypeError, "expected an ELBO for each subset, got int"),
        ((Trace_ELBO,), {}, TypeError, "expected an ELBO for each subset, got Trace_ELBO"),
        ((Trace_ELBO(), "pairs"), {}, ValueError, "expected subsets to be 'joint.single' or 'si"),
        ((Trace_ELBO(), 3), {}, TypeError, "expected subsets to be one of .* got 3"),
        ((Trace_ELBO(), ["image"]), {}, TypeError, "or a list of tuples of names, got .'image'"),
        ((Trace_ELBO(), []), {}, ValueError, "expected different subsets with at least one"),
        ((Trace_ELBO(), [("a", "b"), ("b", "a")]), {}, ValueError, "expected different subsets"),
        ((Trace_ELBO(), [()]), {}, ValueError, "expected different subsets with at least one"),
        ((Trace_ELBO(),), {"target": "x"}, ValueError, "target to be 'subset' or 'all', got 'x'"),
        ((Trace_ELBO(),), {"private": "x"}, ValueError, "private to be 'own' or 'prior', got 'x'"),
        ((Trace_ELBO(),), {"num_random": -1}, ValueError, "expected num_random >= 0, got -1"),
        ((Trace_ELBO(), "all"), {"num_random": 1}, ValueError, "expected num_random=0 with sub"),
        ((RenyiELBO(),), {"target": "all"}, ValueError, r"got RenyiELBO. Use TraceIWAE_ELBO\(K\)"),
        (
            (TraceExpertKL_ELBO(1.0),),
            {"target": "all"},
            ValueError,
            "got TraceExpertKL_ELBO. Use TraceMeanField_ELBO",
        ),
    ],
)
def test_arguments_that_cannot_be(args: Any, k: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        TraceSubsets_ELBO(*args, **k)


def test_batches_that_do_not_fit() -> None:
    p = Pair()
    objective = TraceSubsets_ELBO(Trace_ELBO(), [("a",), ("a", "speech")])
    with pytest.raises(TypeError, match="expected batch to be a mapping .* got Tensor"):
        objective.loss(p.model, p.guide, p.batch["a"])
    with pytest.raises(TypeError, match="expected present to be a mapping .* got list"):
        objective.loss(p.model, p.guide, p.batch, [True])
    with pytest.raises(ValueError, match=r"among \['a', 'b', 'c'\] in subsets, got 'speech'"):
        objective.loss(p.model, p.guide, p.batch)
    many = {f"m{i}": torch.zeros(2, 1) for i in range(12)}
    with pytest.raises(ValueError, match="at most 10 modalities .*, got 12, which have 4,095"):
        TraceSubsets_ELBO(Trace_ELBO(), "all").loss(p.model, p.guide, many)
    pairs = TraceSubsets_ELBO(Trace_ELBO(), [("a", "b")], target="all")
    with pytest.raises(ValueError, match="a subset that is observed as a whole, got none for 2 ro"):
        pairs.loss(p.model, p.guide, p.batch, PRESENT)
    with pytest.raises(ValueError, match="observed as a whole, got none for 5 rows"):
        pairs.loss(p.model, p.guide, {"a": p.batch["a"], "b": None})
    with pyro.validation_enabled(False):  # To say it would wait for the device.
        both = ({n: x[[0, 4]] for n, x in part.items()} for part in (p.batch, PRESENT))
        expected = pairs.loss(p.model, p.guide, *both)
        assert pairs.loss(p.model, p.guide, p.batch, PRESENT) == pytest.approx(expected)


def test_rows_without_a_plate() -> None:
    def model(batch: Tensors, present: Any = None) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        for name, x in batch.items():
            loc = z.reshape(5, 1).expand(x.shape)
            pyro.sample(name, dist.Normal(loc, 1.0).to_event(2), obs=x)

    def guide(batch: Tensors, present: Any = None) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))

    p, objective = Pair(), TraceSubsets_ELBO(Trace_ELBO(), target="all")
    objective.loss(model, guide, p.batch)  # No row is to be left out.
    with pytest.raises(ValueError, match="expected one plate over the 5 rows of the batch"):
        objective.loss(model, guide, p.batch, PRESENT)

    def in_another_plate(program: Any) -> Any:
        return pyro.plate("others", 1)(program)

    with pytest.raises(ValueError, match=r"got the plates \[\('others', 1\)\] over data"):
        objective.loss(in_another_plate(model), in_another_plate(guide), p.batch, PRESENT)


def test_private_latents_that_cannot_come_from_elsewhere() -> None:
    p = Pair(private=True)

    def guide(batch: Any, present: Any = None) -> None:
        total = torch.zeros(5)
        with pyro.plate("rows", 5):
            for name, x in batch.items():
                total = total + pyro.sample(f"own_{name}", dist.Normal(x.mean(-1), 1.0))
            pyro.sample("u", dist.Normal(total.unsqueeze(-1).expand(5, 2), 1.0).to_event(1))

    for private in ("own", "prior"):
        objective = TraceSubsets_ELBO(Trace_ELBO(), target="all", private=private)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="shared latents that do not depend .* got site 'u'"):
            objective.loss(p.model, guide, p.batch)

    def chain(batch: Any, present: Any = None) -> None:
        before = torch.zeros(5)
        with pyro.plate("rows", 5):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for name, x in batch.items():
                before = pyro.sample(f"own_{name}", dist.Normal(before, 1.0))
                pyro.sample(f"view {name}", p.likelihood(name, u, before), obs=x)

    TraceSubsets_ELBO(Trace_ELBO(), target="all").loss(chain, p.guide, p.batch)
    objective = TraceSubsets_ELBO(Trace_ELBO(), target="all", private="prior")
    with pytest.raises(ValueError, match="expected priors of private latents .* site 'own_b'"):
        objective.loss(chain, p.guide, p.batch)

    def auxiliary(batch: Any, present: Any = None) -> None:
        loc, scale = p.expert(batch, batch, present)
        with pyro.plate("rows", 5):
            u = pyro.sample("u", dist.Normal(loc, scale).to_event(1))
            for name, x in batch.items():
                pyro.sample(f"a{name}", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
                pyro.sample(f"own_{name}", p.own(name, x, u))

    with pytest.raises(ValueError, match="private latents of the model .* site 'aa' that only"):
        objective.loss(p.model, auxiliary, p.batch)


def test_noise_of_networks_is_no_dependence_on_private_latents() -> None:
    p = Pair(private=True)

    def noisy(batch: Any, present: Any = None) -> None:
        with pyro.plate("rows", 5):
            loc = torch.nn.functional.dropout(torch.ones(5, 2), 0.5)
            u = pyro.sample("u", dist.Normal(loc, 1.0).to_event(1))
            for name, x in batch.items():
                pyro.sample(f"own_{name}", p.own(name, x, u))

    objective = TraceSubsets_ELBO(Trace_ELBO(), target="all", private="prior")
    assert objective.loss(p.model, noisy, p.batch) > 0


# ---------------------------------------------------------------- training plain functions


def plain_rows(batch: Any, present: Any) -> int:
    masks = (present or {}).values()
    return len(next(x for x in (*batch.values(), *masks) if x is not None))


def plain_filled(name: str, x: torch.Tensor, present: Any) -> torch.Tensor:
    mask = (present or {}).get(name)
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)


def plain_model(batch: Any, present: Any = None) -> None:
    """A user's: keys may be missing, a value may be ``None``, masks may be given or not."""
    with pyro.plate("people", plain_rows(batch, present)):
        code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for name, x in batch.items():
            weight = pyro.param(f"weight {name}", lambda: torch.eye(2, 3))
            fn = dist.Normal(code @ weight, 0.5).to_event(1)
            if x is None:
                with poutine.mask(mask=False):
                    pyro.sample(f"view {name}", fn)
                continue
            with masked(name, present):
                pyro.sample(f"view {name}", fn, obs=plain_filled(name, x, present))


def plain_guide(batch: Any, present: Any = None, sampled: Any = dist.Normal) -> None:
    num = plain_rows(batch, present)
    loc, precision = torch.zeros(num, 2), torch.ones(num, 1)
    for name, x in batch.items():
        if x is not None:
            seen = (present or {}).get(name, torch.ones(num, dtype=torch.bool)).unsqueeze(-1)
            encoder = pyro.param(f"encoder {name}", lambda: torch.eye(3, 2))
            told = plain_filled(name, x, present) @ encoder
            certainty = pyro.param(f"certainty {name}", lambda: torch.tensor(0.5))
            loc = loc + torch.where(seen, told, 0.0)
            precision = precision + torch.where(seen, certainty.exp(), 0.0)
    with pyro.plate("people", num):
        scale = (precision**-0.5).expand_as(loc)
        pyro.sample("code", sampled(loc / precision, scale).to_event(1))


TRAINING: dict[str, Callable[[], Any]] = {
    "mvae": lambda: TraceSubsets_ELBO(TraceMeanField_ELBO()),
    "mvae, random": lambda: TraceSubsets_ELBO(TraceIWAE_ELBO(2), num_random=1),
    "mopoe": lambda: TraceSubsets_ELBO(TraceMeanField_ELBO(), "all", target="all"),
    "listed": lambda: TraceSubsets_ELBO(
        TraceIWAE_ELBO(2, "dreg"), [("a",), ("b",)], target="all", private="prior"
    ),
}


def plain_data() -> Tensors:
    code = torch.randn(40, 2)
    return {n: code @ torch.randn(2, 3) + 0.5 * torch.randn(40, 3) for n in "abc"}


def pinned_guide(batch: Any, present: Any = None) -> None:
    """What is drawn is fixed."""
    plain_guide(batch, present, Pinned)


@pytest.mark.parametrize("objective", ["mvae", "mopoe", "listed"])
def test_steps_are_the_same_however_a_missing_modality_is_told(objective: str) -> None:
    batch, absent = plain_data(), torch.zeros(40, dtype=torch.bool)
    ab = {n: batch[n] for n in "ab"}
    told: list[tuple[Any, ...]] = [
        (ab,),
        (ab, None),
        (ab, {"a": ~absent}),
        ({**ab, "c": None},),
        ({**batch, "c": batch["c"] * torch.nan}, {"c": absent}),
    ]
    found = []
    for args in told:
        pyro.clear_param_store()
        adam = pyro.optim.Adam({"lr": 0.05})
        svi = SVI(plain_model, pinned_guide, adam, TRAINING[objective]())
        losses = [svi.step(*args) for _ in range(3)]
        store = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
        of_ab = {n: p for n, p in store.items() if not n.endswith("c")}
        assert len(of_ab) == 6
        found.append({"losses": torch.tensor(losses), **of_ab})
        close(store.get("encoder c", torch.eye(3, 2)), torch.eye(3, 2))
    for other in found[1:]:
        close(other, found[0])


@pytest.mark.parametrize("objective", TRAINING)
def test_steps_on_mixed_batches_train_all_there_is(objective: str) -> None:
    full = plain_data()
    rows = torch.arange(40)
    present = {"b": rows % 2 == 0, "c": rows % 3 > 0}
    batches: list[tuple[Any, ...]] = [
        (full,),
        (full, present),
        ({"a": full["a"], "c": full["c"]}, {"c": present["c"]}),
        ({"a": full["a"][:7], "b": None, "c": full["c"][:7]},),
        ({"b": full["b"]},),
    ]
    if objective == "listed":  # Which names "a" and "b": a batch says of both what it has.
        batches = [({**dict.fromkeys("ab"), **batch}, *masks) for batch, *masks in batches]
    bound = TraceMeanField_ELBO(num_particles=20, vectorize_particles=True)
    svi = SVI(plain_model, plain_guide, pyro.optim.Adam({"lr": 0.03}), TRAINING[objective]())

    def bounds() -> list[float]:
        found = []
        for batch, *masks in batches:
            held = {n: x for n, x in batch.items() if x is not None}
            with torch.no_grad():
                found.append(bound.loss(plain_model, plain_guide, held, *masks))
        return found

    before, first = bounds(), {n: p.clone() for n, p in pyro.get_param_store().items()}
    for _ in range(15):
        assert all(torch.tensor(svi.step(*args)).isfinite() for args in batches)
    assert all(new < old for old, new in zip(before, bounds(), strict=True))
    moved = {n for n, p in pyro.get_param_store().items() if not torch.equal(p, first[n])}
    of_c = {"encoder c", "certainty c"} if objective == "listed" else set()
    assert moved == set(first) - of_c


# ---------------------------------------------------------------- no side effects


def test_a_used_objective_is_copied_without_its_programs() -> None:
    p = Pair()

    def model(batch: Any, present: Any = None) -> None:
        p.model(batch, present)

    objective = TraceSubsets_ELBO(TraceIWAE_ELBO(2), "all", target="all")
    expected = objective.loss(model, p.guide, p.batch)
    for again in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert not again._copies
        assert again.loss(model, p.guide, p.batch) == expected


def test_the_batch_stays_as_it_is_and_so_do_random_numbers_of_a_first_look() -> None:
    programs, data = library_pair(), LinearModalities().data(5)
    masks = dict(zip(data, PRESENT.values(), strict=True))
    batch, present = dict(data), dict(masks)
    objective = TraceSubsets_ELBO(TraceMeanField_ELBO(), "all", target="all", private="prior")
    losses, after = [], []
    for _ in range(2):
        pyro.set_rng_seed(4)
        losses.append(objective.loss(*programs, batch, present))
        after.append(torch.rand(()))
    assert losses[0] == losses[1]
    assert after[0] == after[1]
    assert list(batch) == list(data)
    assert all(batch[n] is data[n] for n in batch)
    assert all(present[n] is masks[n] for n in present)


def test_the_training_loop() -> None:
    model, guide = library_pair()
    batch, present = mixed_patterns(LinearModalities().data(9))
    objective = TraceSubsets_ELBO(TraceMeanField_ELBO(), num_random=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    history = fit(svi, [(batch, present)], 2, validation=[(batch, present)], progress=False)
    assert len(history.loss) == len(history.validation_loss) == 2
