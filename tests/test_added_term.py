"""A term from the guide's sites: in the gradient only, once a run, masked and scaled."""

import copy
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_vae import scale_kl
from pyro_vae.objectives import TraceFreeBits_ELBO, TraceIWAE_ELBO
from pyro_vae.objectives.added_term import AddedTermELBO


class _Tagged(dist.Normal):  # type: ignore[misc]
    """A normal that carries a term: the square of its loc."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return super().expand(batch_shape, self._get_checked_instance(_Tagged, _instance))


class _Late(_Tagged):
    """One whose term is computed from a parameter when it is asked for."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, self._get_checked_instance(_Late, _instance))
        new.parameter = self.parameter
        return new


class Late_ELBO(AddedTermELBO):
    def _wanted(self, fn: Any) -> bool:
        return isinstance(fn, _Late)

    def _term(self, fn: Any) -> torch.Tensor:
        return fn.parameter**2


class Added_ELBO(AddedTermELBO):
    def _wanted(self, fn: Any) -> bool:
        return isinstance(fn, _Tagged)

    def _term(self, fn: Any) -> torch.Tensor:
        return fn.loc**2


class Counting:
    """A pair of programs in one dimension that counts the runs of the guide."""

    def __init__(self) -> None:
        self.loc = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        self.runs = 0

    def model(self, x: torch.Tensor) -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        self.runs += 1
        with pyro.plate("rows", 3):
            pyro.sample("z", _Tagged(self.loc, 1.0))


X = torch.zeros(3)


def gradient(objective: Any, pair: Counting, guide: Any = None) -> torch.Tensor:
    pyro.set_rng_seed(0)
    (grad,) = torch.autograd.grad(
        objective.differentiable_loss(pair.model, guide or pair.guide, X), pair.loc
    )
    return grad


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=4),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        TraceFreeBits_ELBO(0.1),
        Trace_ELBO(num_particles=4, vectorize_particles=True),
        TraceEnum_ELBO(strict_enumeration_warning=False),
        TraceIWAE_ELBO(3, num_groups=2),
        TraceIWAE_ELBO(3, "dreg", num_groups=2, vectorize_particles=False),
    ],
    ids=[
        "plain",
        "four",
        "four at once",
        "mean field",
        "enumeration",
        "free bits",
        "four at once, any plates",
        "enumeration, any plates",
        "groups",
        "groups, one by one",
    ],
)
def test_the_gradient_gains_the_term_and_the_loss_does_not(elbo: Any) -> None:
    # A copy each: where plates have to be guessed, that is part of the first step of both.
    pair, inner = Counting(), copy.deepcopy(elbo)
    added = gradient(Added_ELBO(copy.deepcopy(elbo)), pair) - gradient(inner, pair)
    torch.testing.assert_close(added, 2 * pair.loc.detach())
    for method in ("loss", "loss_and_grads", "differentiable_loss"):
        pyro.set_rng_seed(0)
        expected = getattr(copy.deepcopy(elbo), method)(pair.model, pair.guide, X)
        pyro.set_rng_seed(0)
        added_elbo = Added_ELBO(copy.deepcopy(elbo))
        actual = getattr(added_elbo, method)(pair.model, pair.guide, X)
        assert float(torch.as_tensor(actual).detach()) == pytest.approx(
            float(torch.as_tensor(expected).detach()), rel=1e-12
        )


def test_the_guide_runs_once_a_particle() -> None:
    pair = Counting()
    Added_ELBO(Trace_ELBO(num_particles=4)).differentiable_loss(pair.model, pair.guide, X)
    assert pair.runs == 4


def test_masks_and_scales_of_the_site_count() -> None:
    pair, elbo = Counting(), Trace_ELBO()
    mask = torch.tensor([True, False, True])
    for handler, weight in (
        (poutine.mask(mask=mask), mask.double()),
        (poutine.mask(mask=False), torch.zeros(3)),
        (poutine.scale(scale=2.5), torch.tensor(2.5)),
    ):
        guide = handler(pair.guide)
        added = gradient(Added_ELBO(elbo), pair, guide) - gradient(elbo, pair, guide)
        torch.testing.assert_close(added, weight * 2 * pair.loc.detach())


def test_a_masked_row_may_have_a_term_that_is_not_finite() -> None:
    pair = Counting()
    pair.loc.data[1] = 1e200  # Its square overflows.
    guide = poutine.mask(pair.guide, mask=torch.tensor([True, False, True]))
    assert gradient(Added_ELBO(Trace_ELBO()), pair, guide).isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_beta_does_not_scale_the_term(beta: float) -> None:
    pair, elbo = Counting(), Trace_ELBO()
    guide = poutine.scale(scale_kl(poutine.scale(pair.guide, scale=2.0), beta), scale=5.0)
    added = gradient(Added_ELBO(elbo), pair, guide) - gradient(elbo, pair, guide)
    torch.testing.assert_close(added, 10.0 * 2 * pair.loc.detach())


def test_subsampling_scales_the_term() -> None:
    loc = torch.tensor([1.0, 2.0], requires_grad=True)

    def model() -> None:
        with pyro.plate("rows", 10, subsample=torch.arange(2)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))

    def guide() -> None:
        with pyro.plate("rows", 10, subsample=torch.arange(2)):
            pyro.sample("z", _Tagged(loc, 1.0))

    def grad(objective: Any) -> torch.Tensor:
        pyro.set_rng_seed(0)
        return torch.autograd.grad(objective.differentiable_loss(model, guide), loc)[0]

    added = grad(Added_ELBO(Trace_ELBO())) - grad(Trace_ELBO())
    torch.testing.assert_close(added, 5 * 2 * loc.detach())


def test_a_run_that_failed_leaves_nothing() -> None:
    pair, objective = Counting(), Added_ELBO(Trace_ELBO())

    def broken(x: torch.Tensor) -> None:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        objective.differentiable_loss(broken, pair.guide, X)
    added = gradient(objective, pair) - gradient(Trace_ELBO(), pair)
    torch.testing.assert_close(added, 2 * pair.loc.detach())


def test_objectives_inside_look_at_the_programs_once() -> None:
    pair = Counting()
    objective = Added_ELBO(TraceFreeBits_ELBO(0.1))
    objective.loss_and_grads(pair.model, pair.guide, X)
    after_first = pair.runs
    objective.loss_and_grads(pair.model, pair.guide, X)
    assert pair.runs == after_first + 1


def test_a_first_look_adds_no_term() -> None:
    """Our objectives run a new pair once without gradients."""
    pair = Counting()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", 3):
            fn = _Late(pair.loc, 1.0)
            fn.parameter = pair.loc
            pyro.sample("z", fn)

    elbo = TraceFreeBits_ELBO(0.1)
    added = gradient(Late_ELBO(elbo), pair, guide) - gradient(elbo, pair, guide)
    torch.testing.assert_close(added, 2 * pair.loc.detach())


def test_it_steps_under_svi_and_can_be_copied() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.ones(3))
        with pyro.plate("rows", 3):
            pyro.sample("z", _Tagged(loc, 1.0))

    objective = Added_ELBO(Trace_ELBO())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), objective)
    for _ in range(50):
        svi.step(X)
    assert float(pyro.param("loc").detach().abs().max()) < 0.5
    pyro.set_rng_seed(0)
    expected = objective.loss(model, guide, X)
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        pyro.set_rng_seed(0)
        assert other.loss(model, guide, X) == expected


def test_what_is_no_elbo_is_refused() -> None:
    for wrong in (RenyiELBO(), Trace_ELBO, None):
        with pytest.raises(TypeError, match="expected an ELBO with a differentiable_loss"):
            Added_ELBO(wrong)
