"""``CompiledSVI`` on programs as in Pyro's own tests, against Pyro's steps."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from torch.distributions import constraints

from pyro_vae import CompiledSVI
from pyro_vae.capture.comparison import precision_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_without_dimensions(dtype: torch.dtype) -> None:
    def model() -> None:
        scale = pyro.param("scale", torch.tensor(1.0, dtype=dtype), constraints.positive)
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=dtype), 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=torch.tensor(0.1, dtype=dtype))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.0, dtype=dtype))
        scale = pyro.param("z_scale", torch.tensor(0.5, dtype=dtype), constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))

    losses = []
    for kind, options in [(SVI, {}), (CompiledSVI, {"mode": "graph", "strict": True})]:
        pyro.clear_param_store()
        pyro.set_rng_seed(20210811)
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
        losses.append([svi.step() for _ in range(12)])
    torch.testing.assert_close(
        torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e3 * torch.finfo(dtype).eps, atol=0
    )
    assert len(svi.graphs) == 1


def _model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3))


def _guide() -> None:
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def _sharp_guide() -> None:
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))


def _wide_model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 9.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3))


@pytest.mark.parametrize("name", ["guide", "model", "optim", "loss_and_grads"])
def test_attributes_may_be_replaced(name: str) -> None:
    def twice(*args: object) -> float:
        return 2 * Trace_ELBO().loss_and_grads(*args)

    results = []
    for kind, options in [(SVI, {}), (CompiledSVI, {"mode": "graph", "strict": True})]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = kind(_model, _guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
        losses = [svi.step() for _ in range(5)]
        new = {
            "guide": _sharp_guide,
            "model": _wide_model,
            "optim": pyro.optim.SGD({"lr": 1e-3}),
            "loss_and_grads": twice,
        }
        setattr(svi, name, new[name])
        losses += [svi.step() for _ in range(2)]  # The graph is next compared at its eighth use.
        results.append((torch.tensor(losses), pyro.param("loc").detach().clone()))
    torch.testing.assert_close(results[1], results[0])


def test_loss_and_grads_as_an_argument() -> None:
    def loss_and_grads(model: object, guide: object) -> torch.Tensor:
        loss = Trace_ELBO().differentiable_loss(model, guide)
        (3 * loss).backward()
        return loss.detach()

    results = []
    for kind, options in [(SVI, {}), (CompiledSVI, {"mode": "graph", "strict": True})]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = pyro.optim.SGD({"lr": 0.01})
        svi = kind(_model, _guide, optim, Trace_ELBO().loss, loss_and_grads, **options)
        losses = torch.tensor([svi.step() for _ in range(5)])
        results.append((losses, pyro.param("loc").detach().clone()))
    torch.testing.assert_close(results[1], results[0])
    assert len(svi.graphs) == 1


def test_the_reason_has_no_table_of_shapes() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if z.sum() > 0:
            raise AssertionError
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", -9 * torch.ones(3)), 1.0).to_event(1))

    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), mode="graph")
    svi.step()
    with pytest.warns(UserWarning, match="reads a number") as warned:
        svi.step()
    assert "Trace Shapes" not in str(warned[0].message)


def test_caches_of_transforms_are_not_stale() -> None:
    grid = torch.linspace(-1, 1, 6).reshape(2, 3)
    results = []
    for kind, options in [(SVI, {}), (CompiledSVI, {"mode": "graph", "strict": True})]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        flow = dist.transforms.affine_autoregressive(3, hidden_dims=[8])

        def guide(flow: torch.nn.Module = flow) -> None:
            pyro.module("flow", flow)
            base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

        svi = kind(_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
        seen = []
        for _ in range(7):  # The same grid object each time, with other weights.
            seen.append(torch.tensor(svi.step()))
            seen.append(flow(grid).detach().sum())
            seen.append(flow.log_abs_det_jacobian(grid, flow(grid)).detach().sum())
        results.append(torch.stack(seen))
    torch.testing.assert_close(results[1], results[0])
    assert len(svi.graphs) == 1


def test_elbos_of_torch_jit_are_left_to_pyro() -> None:
    svi = CompiledSVI(_model, _guide, pyro.optim.Adam({"lr": 0.1}), JitTrace_ELBO(), mode="graph")
    with warnings.catch_warnings():  # Of torch.jit.
        warnings.simplefilter("ignore")
        svi.step()
    with pytest.warns(UserWarning, match="without 'Jit'"):
        assert svi.step() > 0
    assert not svi.graphs


def test_precision_of_programs_without_dimensions() -> None:
    single, double = torch.zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.float64)
    assert precision_of([single, single]) == torch.float32
    assert precision_of([single, double[None]]) == torch.float64
    assert precision_of([]) == torch.float64
