"""A linear-Gaussian pair with two latents, for tests of objectives about the codes of a batch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

Tensors = dict[str, torch.Tensor]


class Pinned(dist.Normal):
    """A normal distribution whose sample is fixed by its location: rows do not change places."""

    def rsample(self, sample_shape: Any = ()) -> torch.Tensor:
        noise = torch.sin(50 * self.loc.detach() + 1)
        return (self.loc + self.scale * noise).expand(self._extended_shape(sample_shape))

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


class LinearCodes:
    """a ~ N(0, 1)^2, b ~ N(0.3, 1.2), x ~ N([a, b] W, 0.7); a guide with independent elements.

    Both programs take a batch, and the size of the plate, a mask and a scale for its rows.
    """

    def __init__(self, normal: Any = dist.Normal, num_rows: int = 5) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.normal = normal
        self.x = random(num_rows, 4)
        self.params = {
            "weight": random(3, 4).requires_grad_(),
            "encoder": (0.6 * random(4, 3)).requires_grad_(),
            "log_scale": (0.3 * random(3)).requires_grad_(),
        }

    def model(self, x: torch.Tensor, **of_plate: Any) -> None:
        zero = x.new_zeros(())
        with _plate(x, **of_plate):
            a = pyro.sample("a", self.normal(zero.expand(2), zero + 1).to_event(1))
            b = pyro.sample("b", self.normal(zero + 0.3, zero + 1.2))
            loc = torch.cat([a, b.unsqueeze(-1)], -1) @ self.params["weight"]
            pyro.sample("x", dist.Normal(loc, 0.7).to_event(1), obs=x)

    def guide(self, x: torch.Tensor, **of_plate: Any) -> None:
        loc, scale = self.moments(x)
        with _plate(x, **of_plate):
            pyro.sample("a", self.normal(loc[:, :2], scale[:, :2]).to_event(1))
            pyro.sample("b", self.normal(loc[:, 2], scale[:, 2]))

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of q([a, b] | x), ``(batch, 3)`` each."""
        loc = x @ self.params["encoder"]
        return loc, (self.params["log_scale"] + 0.1 * loc).exp()

    def codes(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """What the guide draws after that seed, with gradient: ``(batch, 3)``."""
        pyro.set_rng_seed(seed)
        trace = poutine.trace(self.guide).get_trace(x)
        a, b = (trace.nodes[name]["value"] for name in "ab")
        return torch.cat([a, b.unsqueeze(-1)], -1)

    def prior(self, like: torch.Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(
            like.new_tensor([0.0, 0.0, 0.3]), like.new_tensor([1, 1, 1.2])
        )

    def with_gradient(self, loss: torch.Tensor) -> Tensors:
        """A loss and its gradient with regard to all parameters."""
        leaves = list(self.params.values())
        gradient = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        zeros = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(gradient, self.params.values(), strict=True)
        ]
        return {"loss": loss.detach(), **dict(zip(self.params, zeros, strict=True))}

    def of(self, loss: Callable[..., torch.Tensor], seed: int, **of_plate: Any) -> Tensors:
        """The same of a method of an objective, after that seed."""
        pyro.set_rng_seed(seed)
        return self.with_gradient(loss(self.model, self.guide, self.x, **of_plate))


@contextmanager
def _plate(
    x: torch.Tensor,
    size: int | None = None,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> Iterator[None]:
    with ExitStack() as stack:
        subsample = None if size is None else torch.arange(len(x))
        stack.enter_context(pyro.plate("rows", size or len(x), subsample=subsample))
        if mask is not None:
            stack.enter_context(poutine.mask(mask=mask))
        if scale is not None:
            stack.enter_context(poutine.scale(scale=scale))
        yield
