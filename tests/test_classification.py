"""The classification term: its gradient by hand and by differences; the loss without it."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contracts import normal_x
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from semi_linear import LABELLED, C, D, K, Y
from torch import nn
from torch.nn.functional import cross_entropy

from pyro_vae import fit, scale_kl
from pyro_vae.conditioning import Concatenate, OneHot
from pyro_vae.datasets import Batches
from pyro_vae.guides.semi_supervised import AmortizedSemiSupervised
from pyro_vae.labelled import Labelled
from pyro_vae.likelihoods import Normal
from pyro_vae.models.semi_supervised import SemiSupervisedVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives.classification import TraceClassification_ELBO
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

close = torch.testing.assert_close
Pair = tuple[SemiSupervisedVAE, AmortizedSemiSupervised]
WEIGHT = 2.5


def pair() -> Pair:
    decoder = Concatenate(MLP(K + C, [7], D, activation=nn.Tanh), embed=OneHot(C))
    network = Concatenate(MLP(D + C, [7], 2 * K, activation=nn.Tanh), embed=OneHot(C))
    model = SemiSupervisedVAE(decoder, Normal(), StandardNormalPrior(K), C)
    return model, AmortizedSemiSupervised(MLP(D, [7], C, activation=nn.Tanh), network, C)


def data() -> torch.Tensor:
    return normal_x(len(Y))


def enum(**options: Any) -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1, **options)


def parameters(programs: Any) -> list[torch.Tensor]:
    return [p for program in programs for p in program.parameters()]


def of(elbo: Any, programs: Any, *args: Any, wrap: Any = None) -> tuple[float, list[torch.Tensor]]:
    """The loss and its gradient, with the same random numbers in each call."""
    pyro.set_rng_seed(1)
    loss = elbo.differentiable_loss(*map(wrap or (lambda p: p), programs), *args)
    found = torch.autograd.grad(loss, parameters(programs), allow_unused=True)
    values = zip(found, parameters(programs), strict=True)
    return float(loss.detach()), [torch.zeros_like(p) if g is None else g for g, p in values]


def cross_entropy_of(programs: Pair, rows: torch.Tensor) -> torch.Tensor:
    return cross_entropy(programs[1].classifier(data()[rows]), Y[rows], reduction="sum")


def check_term(
    programs: Pair, elbo: Any, inner: Any, factor: float, rows: torch.Tensor = LABELLED, **how: Any
) -> None:
    """The loss is that of the inner ELBO, the gradient has the term on top."""
    args = data(), Y, LABELLED
    loss, gradient = of(elbo, programs, *args, **how)
    bound, expected = of(inner, programs, *args, **how)
    assert loss == pytest.approx(bound, abs=1e-12)
    term = factor * cross_entropy_of(programs, rows)
    added = torch.autograd.grad(term, parameters(programs), allow_unused=True)
    for found, of_bound, of_term in zip(gradient, expected, added, strict=True):
        close(found, of_bound if of_term is None else of_bound + of_term)


def test_the_term_is_in_the_gradient_and_not_in_the_loss() -> None:
    check_term(pair(), TraceClassification_ELBO(WEIGHT), enum(), WEIGHT)


def test_the_gradient_by_differences() -> None:
    programs, args = pair(), (data(), Y, LABELLED)
    elbo, step = TraceClassification_ELBO(WEIGHT), 1e-5
    _, gradient = of(elbo, programs, *args)

    def total() -> float:
        pyro.set_rng_seed(1)
        term = cross_entropy_of(programs, LABELLED)
        return enum().loss(*programs, *args) + WEIGHT * float(term.detach())

    for parameter, of_parameter in zip(parameters(programs), gradient, strict=True):
        flat, at = parameter.data.view(-1), parameter.numel() // 2
        values = []
        for sign in (1, -1):
            flat[at] += sign * step
            values.append(total())
            flat[at] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        close(of_parameter.view(-1)[at], torch.tensor(difference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles(vectorize: bool) -> None:
    options = {"num_particles": 3, "vectorize_particles": vectorize}
    elbo = TraceClassification_ELBO(WEIGHT, enum(**options))
    check_term(pair(), elbo, enum(**options), WEIGHT)


@pytest.mark.parametrize("make", [Trace_ELBO, lambda: enum(num_particles=2)])
def test_any_elbo(make: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(?s).*If you want to enumerate sites")
        check_term(pair(), TraceClassification_ELBO(WEIGHT, make()), make(), WEIGHT)


def test_scales_and_masks_of_the_site() -> None:
    elbo = TraceClassification_ELBO(WEIGHT)
    check_term(pair(), elbo, enum(), 3 * WEIGHT, wrap=lambda p: poutine.scale(p, scale=3.0))
    check_term(pair(), elbo, enum(), WEIGHT, wrap=lambda p: scale_kl(p, 0.5))
    seen = torch.tensor([True, False, True, True, False, True])
    check_term(
        pair(), elbo, enum(), WEIGHT, LABELLED & seen, wrap=lambda p: poutine.mask(p, mask=seen)
    )


def test_a_schedule_is_read_at_each_step() -> None:
    programs, warmup = pair(), LinearWarmup(2, end=WEIGHT)
    elbo = TraceClassification_ELBO(warmup)
    for factor in (0.0, WEIGHT / 2, WEIGHT):
        check_term(programs, elbo, enum(), factor)
        warmup.step()


@pytest.mark.parametrize("known", [(), (Y, LABELLED & False)])
def test_without_labels_there_is_no_term(known: tuple[torch.Tensor, ...]) -> None:
    programs = pair()
    loss, gradient = of(TraceClassification_ELBO(WEIGHT), programs, data(), *known)
    bound, expected = of(enum(), programs, data(), *known)
    assert loss == pytest.approx(bound, abs=1e-12)
    close(gradient, expected)


def test_programs_of_ones_own() -> None:
    """Plain functions with other names; a mask in the distribution itself."""
    logits = torch.zeros(4, C).requires_grad_()
    kind, is_known = torch.tensor([0, 2, 1, 1]), torch.tensor([True, True, True, False])
    x = normal_x(4)[:, 0]

    def model(x: torch.Tensor) -> None:
        prior = dist.Categorical(torch.ones(C))
        with pyro.plate("rows", len(x)):
            fn = Labelled(prior, kind, is_known).mask(torch.arange(4) > 0)
            of_kind = pyro.sample("kind", fn)
            pyro.sample("value", dist.Normal(of_kind.to(x), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        fn = Labelled(dist.Categorical(logits=logits), kind, is_known)
        with pyro.plate("rows", len(x)):
            mask = torch.arange(4) > 0
            pyro.sample("kind", fn.mask(mask), infer={"enumerate": "parallel"})

    totals = []
    for elbo in (TraceClassification_ELBO(WEIGHT), enum()):
        loss = elbo.differentiable_loss(model, guide, x)
        totals.append(torch.autograd.grad(loss, logits)[0])
    expected = WEIGHT * (torch.full((C,), 1 / 3) - torch.eye(C)[kind])
    close(totals[0][1:3], expected[1:3])
    close(totals[0] - totals[1], expected * (is_known & (torch.arange(4) > 0))[:, None])


def test_it_trains_the_classifier() -> None:
    """In rows with a label the bound alone teaches it nothing."""
    programs = pair()
    before = float(cross_entropy_of(programs, LABELLED).detach())
    labelled = data()[LABELLED], Y[LABELLED]
    for elbo, learns in ((enum(), False), (TraceClassification_ELBO(1.0), True)):
        svi = SVI(*programs, pyro.optim.Adam({"lr": 0.02}), elbo)
        fit(svi, Batches(*labelled, batch_size=3), 5, progress=False)
        after = float(cross_entropy_of(programs, LABELLED).detach())
        assert (after < before) == learns


def test_loss_copies_and_gradients_in_place() -> None:
    programs, args, elbo = pair(), (data(), Y, LABELLED), TraceClassification_ELBO(WEIGHT)
    pyro.set_rng_seed(1)
    assert elbo.loss(*programs, *args) == pytest.approx(of(enum(), programs, *args)[0])
    _, expected = of(elbo, programs, *args)
    pyro.set_rng_seed(1)
    copy.deepcopy(elbo).loss_and_grads(*programs, *args)
    for parameter, gradient in zip(parameters(programs), expected, strict=True):
        close(torch.zeros_like(gradient) if parameter.grad is None else parameter.grad, gradient)


def test_weights_and_objectives_that_are_none() -> None:
    for weight in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="TraceClassification_ELBO: expected a finite weight"):
            TraceClassification_ELBO(weight)
    with pytest.raises(TypeError, match="TraceClassification_ELBO: expected weight to be a numb"):
        TraceClassification_ELBO("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TraceClassification_ELBO: expected a 0-d tensor weight"):
        TraceClassification_ELBO(torch.ones(2))
    with pytest.raises(TypeError, match="TraceClassification_ELBO: expected an ELBO with a differ"):
        TraceClassification_ELBO(1.0, "TraceEnum_ELBO")  # type: ignore[arg-type]
    assert isinstance(TraceClassification_ELBO(1.0, TraceMeanField_ELBO()).elbo, Trace_ELBO)
