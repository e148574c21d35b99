"""The ELBO site by site: against Pyro's own ELBOs at the same samples, and against quadrature."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence

from pyro_vae.handlers import scale_kl
from pyro_vae.pairs import trace_pair
from pyro_vae.runs import Run, Runner
from pyro_vae.terms import Terms, kl_per_dimension, require_terms, terms_of

X = torch.tensor(
    [[0.5, -1.0], [2.0, 0.1], [-0.7, 0.4], [1.1, -0.2]],
    dtype=torch.float64,
)
ROWS = torch.tensor([6, 1, 3, 8])
SEEN = torch.tensor([True, False, True, True])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
Pair = tuple[Callable[..., None], Callable[..., None]]


class Parameters:
    """Numbers with a gradient, for model (m*) and guide (g*)."""

    def __init__(self) -> None:
        values = {"m1": 0.8, "m2": -0.3, "g1": 0.4, "g2": 0.2, "g3": 0.6}
        self.all = {k: torch.tensor(v, requires_grad=True) for k, v in values.items()}

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.__dict__["all"][name]

    def with_gradient(self, loss: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(loss, list(self.all.values()), allow_unused=True)
        zeros = [torch.zeros(()) if g is None else g for g in grads]
        return torch.stack([loss.detach(), *zeros])


def z_prior(p: Parameters, **_: Any) -> Any:
    return dist.Normal(p.m2 * torch.ones(2), 1.3).to_event(1)


def q_of(p: Parameters, x: torch.Tensor) -> Any:
    return dist.Normal(p.g1 * x + p.g2, p.g3.exp()).to_event(1)


def x_given(p: Parameters, z: torch.Tensor) -> Any:
    return dist.Normal(p.m1 * z + p.m2, 0.7).to_event(1)


def plain(p: Parameters) -> Pair:
    def model() -> None:
        with pyro.plate("cases", 4):
            z = pyro.sample("code", z_prior(p))
            pyro.sample("pixels", x_given(p, z), obs=X)

    def guide() -> None:
        with pyro.plate("cases", 4):
            pyro.sample("code", q_of(p, X))

    return model, guide


def wrapped(handler: Callable[[Any], Any]) -> Callable[[Parameters], Pair]:
    def make(p: Parameters) -> Pair:
        model, guide = plain(p)
        return handler(model), handler(guide)

    return make


def subsampled(p: Parameters) -> Pair:
    def model() -> None:
        with pyro.plate("cases", 10, subsample=ROWS):
            z = pyro.sample("code", z_prior(p))
            pyro.sample("pixels", x_given(p, z), obs=X)

    def guide() -> None:
        with pyro.plate("cases", 10, subsample=ROWS):
            pyro.sample("code", q_of(p, X))

    return model, guide


def nested(p: Parameters) -> Pair:
    """A latent for each datum and one for each part of it; the parts are subsampled as well."""

    def plates() -> tuple[Any, Any]:
        cases = pyro.plate("cases", 10, subsample=ROWS, dim=-1)
        return cases, pyro.plate("parts", 5, subsample=torch.tensor([0, 3]), dim=-2)

    def model() -> None:
        cases, parts = plates()
        with cases:
            z = pyro.sample("code", dist.Normal(p.m2, 1.0))
            with parts:
                u = pyro.sample("detail", dist.Normal(p.m1 * z, 1.0))
                pyro.sample("pixels", dist.Normal(u, 0.5), obs=X.T)

    def guide() -> None:
        cases, parts = plates()
        with cases:
            z = pyro.sample("code", dist.Normal(p.g1 * X.sum(-1), p.g3.exp()))
            with parts:
                pyro.sample("detail", dist.Normal(p.g2 * X.T + z, 0.4))

    return model, guide


def row_weights(p: Parameters) -> Pair:
    model, guide = subsampled(p)
    return poutine.scale(model, WEIGHTS), poutine.scale(guide, WEIGHTS)


def masked_rows(p: Parameters) -> Pair:
    model, guide = plain(p)
    return poutine.mask(model, SEEN), poutine.mask(guide, SEEN)


def masked_inside(p: Parameters) -> Pair:
    """Masks in the distributions, around and inside their events."""
    entries = torch.tensor([[True, False], [False, False], [True, True], [True, True]])

    def model() -> None:
        with pyro.plate("cases", 4):
            z = pyro.sample("code", z_prior(p).mask(SEEN))
            fn = dist.Normal(p.m1 * z, 0.7).mask(entries).to_event(1)
            pyro.sample("pixels", fn, obs=X)

    def guide() -> None:
        with pyro.plate("cases", 4):
            pyro.sample("code", q_of(p, X).mask(SEEN))

    return model, guide


def masked_by_a_bool(p: Parameters) -> Pair:
    def model() -> None:
        with pyro.plate("cases", 4):
            z = pyro.sample("code", z_prior(p).mask(False))
            pyro.sample("pixels", x_given(p, z), obs=X)

    def guide() -> None:
        with pyro.plate("cases", 4):
            pyro.sample("code", q_of(p, X).mask(False))

    return model, guide


def two_observations(p: Parameters) -> Pair:
    """Different scales, one of them row by row."""

    def model() -> None:
        with pyro.plate("cases", 10, subsample=ROWS):
            z = pyro.sample("code", z_prior(p))
            with poutine.scale(scale=0.3):
                pyro.sample("pixels", x_given(p, z), obs=X)
            with poutine.scale(scale=WEIGHTS):
                pyro.sample("label", dist.Normal(z.sum(-1), 1.0), obs=X[:, 0])

    return model, subsampled(p)[1]


def global_latents(size: int) -> Callable[[Parameters], Pair]:
    """A latent of all data, and a plate of components where the data's has been."""

    def make(p: Parameters) -> Pair:
        def model() -> None:
            loc = pyro.sample("loc", dist.Normal(p.m1, 1.0))
            with pyro.plate("components", 2 * size, subsample_size=size):
                a = pyro.sample("a", dist.Normal(p.m2, 1.0))
            with pyro.plate("cases", 10, subsample=ROWS):
                z = pyro.sample("code", dist.Normal(loc * torch.ones(2), 1.0).to_event(1))
                pyro.sample("pixels", x_given(p, z + a[0]), obs=X)

        def guide() -> None:
            pyro.sample("loc", dist.Normal(p.g2, 0.5))
            with pyro.plate("components", 2 * size, subsample_size=size):
                pyro.sample("a", dist.Normal(p.g1 * torch.ones(size), p.g3.exp()))
            with pyro.plate("cases", 10, subsample=ROWS):
                pyro.sample("code", q_of(p, X))

        return poutine.scale(model, 0.25), poutine.scale(guide, 0.25)

    return make


def no_closed_form(p: Parameters) -> Pair:
    def model() -> None:
        with pyro.plate("cases", 10, subsample=ROWS):
            z = pyro.sample("code", dist.StudentT(4.0, p.m2 * torch.ones(2)).to_event(1))
            pyro.sample("pixels", x_given(p, z), obs=X)

    return model, subsampled(p)[1]


def auxiliary(p: Parameters) -> Pair:
    """As AutoNormal does it: an auxiliary site, and a Delta that carries the Jacobian."""

    def model() -> None:
        with pyro.plate("cases", 10, subsample=ROWS):
            z = pyro.sample("code", dist.LogNormal(p.m2 * torch.ones(2), 1.0).to_event(1))
            pyro.sample("pixels", x_given(p, z), obs=X)

    def guide() -> None:
        with pyro.plate("cases", 10, subsample=ROWS):
            u = pyro.sample("log_code", q_of(p, X), infer={"is_auxiliary": True})
            pyro.sample("code", dist.Delta(u.exp(), log_density=-u.sum(-1), event_dim=1))

    return model, guide


def factor_in_the_guide(p: Parameters) -> Pair:
    def guide() -> None:
        with pyro.plate("cases", 4):
            z = pyro.sample("code", q_of(p, X))
            pyro.factor("bonus", p.g2 * z.sum(-1), has_rsample=True)

    return plain(p)[0], guide


def hierarchy(p: Parameters) -> Pair:
    def model() -> None:
        with pyro.plate("cases", 4):
            top = pyro.sample("top", z_prior(p))
            z = pyro.sample("code", dist.Normal(p.m1 * top, 0.9).to_event(1))
            pyro.sample("pixels", x_given(p, z), obs=X)

    def guide() -> None:
        with pyro.plate("cases", 4):
            top = pyro.sample("top", q_of(p, X))
            pyro.sample("code", dist.Normal(p.g2 * top + X, 0.6).to_event(1))

    return model, guide


def reversed_hierarchy(p: Parameters) -> Pair:
    def guide() -> None:
        with pyro.plate("cases", 4):
            z = pyro.sample("code", q_of(p, X))
            pyro.sample("top", dist.Normal(p.g2 * z, 0.6).to_event(1))

    return hierarchy(p)[0], guide


BETA = torch.tensor(0.25, dtype=torch.float64)
PROGRAMS: dict[str, Callable[[Parameters], Pair]] = {
    "plain": plain,
    "subsampled": subsampled,
    "nested": nested,
    "scaled": wrapped(lambda fn: poutine.scale(fn, 0.25)),
    "scaled by a tensor": wrapped(lambda fn: poutine.scale(fn, BETA)),
    "row weights": row_weights,
    "scale_kl": wrapped(lambda fn: scale_kl(fn, 4.0)),
    "scale_kl 0": wrapped(lambda fn: scale_kl(fn, 0.0)),
    "masked rows": masked_rows,
    "masked inside": masked_inside,
    "masked by a bool": masked_by_a_bool,
    "two observations": two_observations,
    "global latents": global_latents(3),
    "as many components as rows": global_latents(4),
    "no closed form": no_closed_form,
    "auxiliary": auxiliary,
    "factor in the guide": factor_in_the_guide,
    "hierarchy": hierarchy,
}
SAMPLED = ["no closed form", "auxiliary", "masked by a bool"]


def runs_of(pair: Pair, num_particles: int = 1, vectorize: bool = False) -> list[Run]:
    runner = Runner(
        *pair,
        (),
        {},
        num_particles=num_particles,
        vectorize=vectorize,
        where="test",
        check=lambda _: None,
    )
    return list(runner.runs((), {}))


def terms(pair: Pair) -> Terms:
    return terms_of(runs_of(pair))


def same_as(elbo: Any, make: Callable[[Parameters], Pair], num: int, vectorize: bool) -> None:
    p = Parameters()
    pair = make(p)
    options = {"vectorize_particles": vectorize, "max_plate_nesting": nesting(pair)}
    pyro.set_rng_seed(0)
    loss = p.with_gradient(terms_of(runs_of(pair, num, vectorize)).negative_elbo)
    pyro.set_rng_seed(0)
    expected = p.with_gradient(elbo(num, **options).differentiable_loss(*pair))
    torch.testing.assert_close(loss, expected)


def nesting(pair: Pair) -> int:
    return trace_pair(*pair, (), {}, "test").max_plate_nesting


@pytest.mark.parametrize("name", sorted(set(PROGRAMS) - {"auxiliary"}))
@pytest.mark.parametrize("vectorize", [False, True])
def test_it_is_the_mean_field_elbo(name: str, vectorize: bool) -> None:
    """Value and gradient. Of a Delta with a density Pyro's closed form forgets the latter."""
    num = 1 if "components" in name or "global" in name else 3  # Pyro draws rows anew.
    same_as(TraceMeanField_ELBO, PROGRAMS[name], num, vectorize)


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("vectorize", [False, True])
def test_without_closed_forms_it_is_the_plain_elbo(name: str, vectorize: bool) -> None:
    same_as(Trace_ELBO, PROGRAMS[name], 3, vectorize)


def test_the_guide_may_name_its_plate_otherwise() -> None:
    p = Parameters()
    model, _ = row_weights(p)

    def guide(plate: str) -> None:
        with pyro.plate(plate, 10, subsample=ROWS), poutine.scale(scale=WEIGHTS):
            pyro.sample("code", q_of(p, X))
            pyro.sample("extra", dist.Normal(p.g2, 1.0), infer={"is_auxiliary": True})

    pyro.set_rng_seed(0)
    expected = Trace_ELBO().differentiable_loss(model, lambda: guide("cases"))
    for plate in ("cases", "encoder"):
        pyro.set_rng_seed(0)
        run = runs_of((model, lambda plate=plate: guide(plate)))[0]
        found = terms_of([run])
        extra, code = found.kl["extra"], found.kl["code"]
        assert extra.local
        torch.testing.assert_close(found.total(extra), 2.5 * (WEIGHTS * extra.values).sum())
        log_q, log_p = (
            t.nodes["code"]["fn"].log_prob(t.nodes["code"]["value"])
            for t in (run.guide_trace, run.model_trace)
        )
        sampled = found.negative_elbo + found.total(
            dataclasses.replace(code, values=log_q - log_p - code.values)
        )
        torch.testing.assert_close(sampled, expected)


def test_a_factor_in_the_guide_is_part_of_its_density() -> None:
    p = Parameters()
    model, guide = factor_in_the_guide(p)
    pyro.set_rng_seed(0)
    trace = poutine.trace(guide).get_trace()
    bonus = trace.nodes["bonus"]["fn"].log_prob(trace.nodes["bonus"]["value"]).sum()
    pyro.set_rng_seed(0)
    without = terms((model, plain(p)[1])).negative_elbo
    pyro.set_rng_seed(0)
    torch.testing.assert_close(terms((model, guide)).negative_elbo, without + bonus)


def test_an_observed_site_of_both_programs_counts_once() -> None:
    """In the guide it is no KL: only its density there is subtracted."""
    p = Parameters()
    model, _ = plain(p)

    def odd_guide() -> None:
        with pyro.plate("cases", 4):
            pyro.sample("code", q_of(p, X))
            infer = {"is_auxiliary": True}
            pyro.sample("pixels", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=X, infer=infer)

    pyro.set_rng_seed(0)
    expected = p.with_gradient(Trace_ELBO().differentiable_loss(model, odd_guide))
    log_q = dist.Normal(0.0, 1.0).log_prob(X).sum()
    pyro.set_rng_seed(0)
    found = terms((model, odd_guide))
    torch.testing.assert_close(found.total(found.kl["pixels"]), log_q)
    kl = found.total(found.kl["code"])
    pyro.set_rng_seed(0)
    run = runs_of((model, odd_guide))[0]
    sampled = sum(
        sign * trace.nodes["code"]["fn"].log_prob(trace.nodes["code"]["value"]).sum()
        for sign, trace in ((1, run.guide_trace), (-1, run.model_trace))
    )
    torch.testing.assert_close((found.negative_elbo - kl + sampled).detach(), expected[0])


@pytest.mark.filterwarnings("ignore:Found vars:UserWarning")
def test_autonormal() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.LogNormal(0.0, 1.0))
        with pyro.plate("cases", 4):
            z = pyro.sample("code", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
            pyro.sample("pixels", dist.Normal(z * loc, 0.7).to_event(1), obs=X)

    guide = AutoNormal(model)
    guide()
    pyro.set_rng_seed(0)
    found = terms((model, guide)).negative_elbo
    pyro.set_rng_seed(0)
    torch.testing.assert_close(float(found.detach()), Trace_ELBO().loss(model, guide))


def closed_kl(run: Run, name: str) -> torch.Tensor:
    return kl_divergence(run.guide_trace.nodes[name]["fn"], run.model_trace.nodes[name]["fn"])


def test_closed_forms_only_where_the_parents_are_given() -> None:
    run = runs_of(hierarchy(Parameters()))[0]
    found = terms_of([run])
    for name in ("top", "code"):
        torch.testing.assert_close(found.kl[name].values, closed_kl(run, name))

    run = runs_of(reversed_hierarchy(Parameters()))[0]
    found = terms_of([run])
    torch.testing.assert_close(found.kl["top"].values, closed_kl(run, "top"))
    q, p = (trace.nodes["code"] for trace in (run.guide_trace, run.model_trace))
    sampled = q["fn"].log_prob(q["value"]) - p["fn"].log_prob(q["value"])
    torch.testing.assert_close(found.kl["code"].values, sampled)
    elements = kl_per_dimension([run], "code")
    assert elements is not None
    torch.testing.assert_close(elements.sum(-1), sampled)


def exact_reversed_elbo(p: Parameters) -> float:
    """Quadrature over code and top of every datum and element."""
    points, weights = np.polynomial.hermite_e.hermegauss(20)
    e, weight = torch.as_tensor(points), torch.as_tensor(weights) / math.sqrt(2 * math.pi)
    q_code = dist.Normal(p.g1 * X + p.g2, p.g3.exp())
    code = q_code.mean + q_code.stddev * e.reshape(-1, 1, 1)
    q_top = dist.Normal(p.g2 * code, 0.6)
    top = q_top.mean + 0.6 * e.reshape(-1, 1, 1, 1)
    log_p = (
        dist.Normal(p.m2, 1.3).log_prob(top)
        + dist.Normal(p.m1 * top, 0.9).log_prob(code)
        + dist.Normal(p.m1 * code + p.m2, 0.7).log_prob(X)
    )
    log_w = log_p - q_code.log_prob(code) - q_top.log_prob(top)
    return float(torch.einsum("tcne,t,c->", log_w, weight, weight).detach())


def test_a_reversed_guide_against_quadrature() -> None:
    """The closed form that Pyro's mean-field ELBO takes there is another number."""
    p = Parameters()
    pair = reversed_hierarchy(p)
    exact = -exact_reversed_elbo(p)
    with torch.no_grad():
        draws = torch.stack(
            [terms_of(runs_of(pair, 500, True)).negative_elbo for _ in range(40)],
        )
    error = float(draws.std()) / math.sqrt(len(draws))
    assert abs(float(draws.mean()) - exact) < 5 * error
    mean_field = TraceMeanField_ELBO(20_000, vectorize_particles=True, max_plate_nesting=1)
    with pytest.warns(UserWarning, match="mean field"):
        wrong = float(mean_field.loss(*pair))
    assert abs(wrong - exact) > 50 * error
    assert error < 0.1


@pytest.mark.parametrize("name", ["nested", "no closed form"])
def test_at_once_and_one_by_one_have_the_same_expectation(name: str) -> None:
    pair = PROGRAMS[name](Parameters())
    with torch.no_grad():
        loops = torch.stack([terms_of(runs_of(pair, 2)).negative_elbo for _ in range(60)])
        at_once = torch.stack([terms_of(runs_of(pair, 20, True)).negative_elbo for _ in range(60)])
    error = float((loops.var() / len(loops) + at_once.var() / len(at_once)).sqrt())
    assert abs(float(loops.mean() - at_once.mean())) < 5 * error
    # The mean, not the sum: ten times the particles, a tenth of the variance.
    assert 4 < float(loops.var() / at_once.var()) < 25


def test_the_weights_of_data_and_sites() -> None:
    found = terms(PROGRAMS["row weights"](Parameters()))
    torch.testing.assert_close(found.scales.of_data, WEIGHTS * 2.5)
    torch.testing.assert_close(found.weights(found.kl["code"]), torch.ones(4))
    assert float(found.num_data(X)) == pytest.approx(2.5 * 6.5)

    found = terms(PROGRAMS["scale_kl"](Parameters()))
    assert found.scales.of_data == 1.0
    torch.testing.assert_close(found.weights(found.kl["code"]), torch.full((4,), 4.0))
    torch.testing.assert_close(found.weights(found.log_likelihood["pixels"]), torch.ones(4))

    found = terms(PROGRAMS["two observations"](Parameters()))
    assert found.scales.of_data == 2.5
    torch.testing.assert_close(found.weights(found.log_likelihood["label"]), WEIGHTS)


def test_a_subsample_within_a_datum_is_no_weight() -> None:
    found = terms(nested(Parameters()))
    detail = found.kl["detail"]
    assert detail.scale == 2.5
    assert detail.within == 2.5
    torch.testing.assert_close(found.weights(detail), torch.ones(1, 4))
    torch.testing.assert_close(found.per_datum(detail), 2.5 * detail.values.sum(0, keepdim=True))
    assert float(found.num_data(X)) == 10.0


def test_data_behind_a_mask_are_none() -> None:
    for name in ("masked rows", "masked inside"):
        found = terms(PROGRAMS[name](Parameters()))
        expected = SEEN.double()
        for term in (found.kl["code"], found.log_likelihood["pixels"]):
            torch.testing.assert_close(found.presence(term), expected)
            torch.testing.assert_close(found.weights(term), expected)
        assert float(found.num_data(X)) == 3.0


def test_a_mask_on_the_observation_alone_leaves_the_datum() -> None:
    p = Parameters()

    def model() -> None:
        with pyro.plate("cases", 4):
            z = pyro.sample("code", z_prior(p))
            with poutine.mask(mask=SEEN):
                pyro.sample("pixels", x_given(p, z), obs=X)

    found = terms((model, plain(p)[1]))
    assert float(found.num_data(X)) == 4.0
    assert float(found.presence(found.log_likelihood["pixels"]).sum()) == 3.0


def test_a_mask_of_single_particles() -> None:
    """A datum is there if any of its particles is."""
    p = Parameters()
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])

    def model() -> None:
        with pyro.plate("cases", 4):
            z = pyro.sample("code", z_prior(p))
            with poutine.mask(mask=mask):
                pyro.sample("pixels", x_given(p, z), obs=X)

    run = runs_of((model, plain(p)[1]), 2, True)[0]
    found = terms_of([run])
    presence = found.presence(found.log_likelihood["pixels"])
    torch.testing.assert_close(presence, torch.tensor([1.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("size", [3, 4])
def test_a_plate_where_the_data_have_been(size: int) -> None:
    """It shares their dimension, perhaps their size, and not their weight."""
    found = terms(global_latents(size)(Parameters()))
    assert {name: term.local for name, term in found.kl.items()} == {
        "loc": False,
        "a": False,
        "code": True,
    }
    assert float(found.num_data(X)) == pytest.approx(0.25 * 10)
    a = found.kl["a"]
    torch.testing.assert_close(found.total(a), 0.25 * 2 * a.values.sum())
    assert a.within == 2.0


@pytest.mark.parametrize("name", ["plain", "subsampled", "masked rows", "masked inside"])
def test_the_kl_of_every_element(name: str) -> None:
    run = runs_of(PROGRAMS[name](Parameters()))[0]
    elements = kl_per_dimension([run], "code")
    assert elements is not None
    assert elements.shape == (4, 2)
    torch.testing.assert_close(elements.sum(-1), terms_of([run]).kl["code"].values)
    q, p = (trace.nodes["code"]["fn"] for trace in (run.guide_trace, run.model_trace))
    if "inside" in name:
        q, p = q.base_dist, p.base_dist
    each = kl_divergence(q.base_dist, p.base_dist)
    if "masked" in name:
        each = each * SEEN.unsqueeze(-1)
    torch.testing.assert_close(elements, each)


def test_elements_without_closed_form() -> None:
    run = runs_of(no_closed_form(Parameters()))[0]
    elements = kl_per_dimension([run], "code")
    assert elements is not None
    q, p = (trace.nodes["code"] for trace in (run.guide_trace, run.model_trace))
    expected = q["fn"].base_dist.log_prob(q["value"]) - p["fn"].base_dist.log_prob(q["value"])
    torch.testing.assert_close(elements, expected)


def test_elements_that_are_not_independent_have_no_kl_of_their_own() -> None:
    p = Parameters()

    def guide() -> None:
        with pyro.plate("cases", 4):
            pyro.sample("code", dist.MultivariateNormal(p.g1 * X, torch.eye(2)))

    assert kl_per_dimension(runs_of((plain(p)[0], guide)), "code") is None
    assert kl_per_dimension(runs_of(auxiliary(p)), "code") is None


def test_programs_without_a_plate_over_the_data() -> None:
    p = Parameters()

    def model() -> None:
        z = pyro.sample("code", z_prior(p))
        pyro.sample("pixels", x_given(p, z), obs=X[0])

    def guide() -> None:
        pyro.sample("code", q_of(p, X[0]))

    with pytest.raises(ValueError, match=r"expected one vectorised plate.*'code': \[\]"):
        require_terms(trace_pair(model, guide, (), {}, "test"), "test")

    def crossed_model() -> None:
        rows, columns = pyro.plate("rows", 4, dim=-1), pyro.plate("columns", 2, dim=-2)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with rows, columns:
            pyro.sample("pixels", dist.Normal(a + b, 1.0), obs=X.T)

    def crossed_guide() -> None:
        with pyro.plate("rows", 4, dim=-1):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 2, dim=-2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'a': \['rows'\], 'b': \['columns'\]"):
        require_terms(trace_pair(crossed_model, crossed_guide, (), {}, "test"), "test")


def test_a_scale_on_one_side_only() -> None:
    model, guide = plain(Parameters())
    for pair in ((scale_kl(model, 4.0), guide), (model, poutine.scale(guide, WEIGHTS))):
        with pytest.raises(ValueError, match="same scale on latent site 'code'"):
            require_terms(trace_pair(*pair, (), {}, "test"), "test")
    pair = poutine.scale(model, WEIGHTS), poutine.scale(guide, WEIGHTS.float().double())
    require_terms(trace_pair(*pair, (), {}, "test"), "test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_data_is_kept(dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    try:
        x, one = X.to(dtype), torch.ones(2, dtype=dtype)

        def model() -> None:
            with pyro.plate("cases", 4):
                z = pyro.sample("code", dist.Normal(0 * one, one).to_event(1))
                pyro.sample("pixels", dist.Normal(z, one).to_event(1), obs=x)

        def guide() -> None:
            with pyro.plate("cases", 4):
                pyro.sample("code", dist.Normal(x, one).to_event(1))

        found = terms((model, guide))
        assert found.negative_elbo.dtype == dtype
        assert found.num_data(x).dtype == dtype
        assert found.weights(found.kl["code"]).dtype == dtype
    finally:
        torch.set_default_dtype(torch.float64)
