"""Joints between a guide and a model, where gradients can be stopped or weighted."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from pyro_vae.traces import is_latent, is_point_mass, layers

__all__ = ["Links", "Valve"]


class Links(Messenger):
    """Puts a joint at every latent of a guide, where gradients can be stopped or weighted.

    A value flows from the guide's site (``upstream``) to the later sites of the guide, and
    through a second joint (``downstream``) to the model.

    Attributes:
        upstream: What later sites of the guide see of each latent.
        downstream: What the model sees of each latent.
        valve: What the joints do with the gradients.
        parametrised: Point masses that depend on parameters directly: the guide's density changes
            with those, but not along the samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parametrised: list[str] = []
        self.upstream: dict[str, torch.Tensor] = {}
        self.downstream: dict[str, torch.Tensor] = {}
        self.valve = Valve()

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not is_latent(msg):
            return
        if is_point_mass(msg["fn"]):
            mass: Any = layers(msg["fn"])[-1]
            joints = {joint.grad_fn for joint in self.upstream.values()}
            if any(_reaches_a_leaf(tensor, joints) for tensor in (mass.v, mass.log_density)):
                self.parametrised.append(msg["name"])
        if not value.requires_grad:
            return
        value.register_hook(self.valve.gate)
        self.upstream[msg["name"]] = msg["value"] = value.view_as(value)
        linked = self.upstream[msg["name"]].view_as(value)
        linked.register_hook(partial(self.valve.weigh, event_dim=msg["fn"].event_dim))
        self.downstream[msg["name"]] = linked


def _reaches_a_leaf(tensor: Any, stops: set[Any]) -> bool:
    """Whether a gradient would reach a parameter other than through the nodes ``stops``."""
    left, seen = [getattr(tensor, "grad_fn", None)], set(stops)
    if isinstance(tensor, torch.Tensor) and tensor.is_leaf and tensor.requires_grad:
        return True
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if hasattr(node, "variable"):  # It adds to the gradient of a leaf.
            return True
        seen.add(node)
        left += [next_node for next_node, _ in node.next_functions]
    return False


@dataclass
class Valve:
    """What the joints of one run do with the gradients that come back through them.

    It holds no samples: a hook that reached the sample it hangs on would close a circle through
    the autograd graph, where no garbage collector finds it.

    Attributes:
        closed: Whether gradients stop at ``upstream`` instead of reaching the guide's parameters
            and earlier latents.
        weight: Multiplies the gradients that the model sends back, if not ``None``; its
            dimensions are particles and plates.
    """

    closed: bool = False
    weight: torch.Tensor | None = None

    def gate(self, grad: torch.Tensor) -> torch.Tensor:
        """What goes on from a sample to the guide's parameters."""
        return torch.zeros_like(grad) if self.closed else grad

    def weigh(self, grad: torch.Tensor, event_dim: int) -> torch.Tensor:
        """What goes on from the model to a sample."""
        if self.weight is None:
            return grad
        shape = self.weight.shape + (1,) * event_dim
        # A site of a single particle spells out only as many dimensions as it has plates.
        return grad * self.weight.reshape(shape[len(shape) - grad.dim() :]).to(grad.dtype)
