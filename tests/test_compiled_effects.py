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
