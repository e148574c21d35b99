"""What a captured program changes besides its parameters, where a step has to be undone."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae import CompiledSVI


def empty_guide(*args):
    return None


def test_a_refused_batch_leaves_buffers_and_random_state_as_svi_does() -> None:
    ends = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        norm = nn.BatchNorm1d(2)

        def model(x, y, norm=norm):
            pyro.module("norm", norm)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Bernoulli(logits=norm(x)[:, 0]), obs=y)

        options = {} if kind is SVI else {"mode": "graph", "strict": True}
        svi = kind(model, empty_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
        losses = []
        for step in range(6):
            x, y = torch.randn(4, 2), torch.ones(4)
            if step == 4:  # Outside of the support.
                y[0] = 0.5
                with pytest.raises(ValueError, match="support"):
                    svi.step(x, y)
            elif step == 3:  # Another tensor in the place of the buffer that was captured.
                norm.running_mean = norm.running_mean.clone()
                losses.append(svi.step(x, y))
            else:
                losses.append(svi.step(x, y))
        buffers = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
        ends.append((losses, [b.clone() for b in buffers], torch.get_rng_state()))
    first, second = ends
    assert second[0] == pytest.approx(first[0], rel=1e-12)
    for mine, pyros in zip(second[1], first[1], strict=True):
        torch.testing.assert_close(mine, pyros, rtol=1e-12, atol=0)
    assert second[2].equal(first[2])


def test_setting_the_data_of_a_tensor_is_left_to_pyro() -> None:
    losses = []
    x = torch.tensor([1.0, 2.0])
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        factor = torch.tensor(1.0)

        def model(x, factor=factor):
            factor.data = factor.data * 1.1
            loc = pyro.param("loc", torch.tensor(0.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(loc * factor, 1.0), obs=x)

        options = {} if kind is SVI else {"mode": "graph"}
        svi = kind(model, empty_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
        losses.append([svi.step(x)])
        if kind is CompiledSVI:
            with pytest.warns(UserWarning, match=r"sets the data of a tensor at .*effects\.py"):
                losses[-1].append(svi.step(x))
        else:
            losses[-1].append(svi.step(x))
        losses[-1] += [svi.step(x) for _ in range(5)]
    assert losses[0] == losses[1]


def test_an_epoch_goes_on_from_tensors_that_pyro_replaced() -> None:
    """At its comparisons a graph is not what wrote the average; the next step has to read it."""
    ends = []
    for compiled in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        holder = nn.Module()
        holder.register_buffer("mean", torch.zeros(()))

        def model(x, holder=holder):
            loc = pyro.param("loc", torch.tensor(0.0))
            holder.mean = 0.5 * holder.mean + 0.5 * x.mean()  # A new tensor every time.
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(loc + holder.mean, 1.0), obs=x)

        adam = pyro.optim.Adam({"lr": 0.1})
        data = torch.arange(24.0)
        if compiled:
            svi = CompiledSVI(model, empty_guide, adam, Trace_ELBO(), mode="graph", strict=True)
            losses = svi.epoch(data, batch_size=2, shuffle=False).tolist()
            assert len(svi.graphs) == 1
        else:
            svi = SVI(model, empty_guide, adam, Trace_ELBO())
            losses = [svi.step(x) for x in data.split(2)]
        ends.append((losses, holder.mean.item(), pyro.param("loc").item()))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-12)
    assert ends[1][1:] == pytest.approx(ends[0][1:], rel=1e-12)
