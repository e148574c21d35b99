"""FactorVAE: total correlation as a discriminator sees it."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import softplus

from pyro_vae.objectives.code_objective import CodeObjective, Codes
from pyro_vae.objectives.objective import check_weight, require_densities
from pyro_vae.runs import Run
from pyro_vae.scales import Scales
from pyro_vae.schedules import Weight
from pyro_vae.terms import Terms, data_plates_of

__all__ = ["TraceFactor_ELBO"]


class TraceFactor_ELBO(CodeObjective):
    r"""The ELBO with a penalty on the total correlation, which a discriminator estimates.

    The training loss is, per datum,

    .. math::
        - ELBO + \gamma \, E \log \frac{D(z)}{1 - D(z)}, \qquad
        \log \frac{D(z)}{1 - D(z)} \approx \log \frac{q(z)}{\prod_j q_j(z_j)},

    where D(z), the sigmoid of the discriminator's output, is its probability that z comes from
    q(z) and not from the product of the marginals.

    The discriminator is trained along: after every gradient of the VAE its optimizer takes one
    step on :math:`-\frac12 E \log D(z) - \frac12 E \log (1 - D(z'))`, where z are the codes of
    the batch and z' fresh codes of the same rows, every dimension permuted over the rows; both
    without gradient to the VAE. The VAE's loss gives the discriminator none. A batch of one row
    has nothing to permute and does not train it. It weighs all rows alike.

    Args:
        gamma: Weight of the total correlation; a number, a 0-d tensor or a schedule. 0 gives the
            ELBO.
        discriminator: Network from codes ``(batch, D)`` to logits ``(batch,)`` or
            ``(batch, 1)``, on the device of the codes. It stays in the mode it is in.
        optimizer: Optimizer from ``torch.optim`` of its parameters; by default the paper's,
            Adam with a learning rate of 1e-4 and betas (0.5, 0.9). ``CompiledSVI`` needs one that
            is made with ``fused=True``, as this is.
        sites: Latents that make up the code; all in the data plate by default.
        num_particles: Samples from the guide.
        vectorize_particles: Whether to run them at once in an outermost plate; by default
            wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        TypeError: If the discriminator is no module or the optimizer none of torch.
        ValueError: If the discriminator has nothing to train, or the optimizer trains something
            else; while running, if there is not one plate over the data, if a latent has no
            reparameterised samples, or if the discriminator does not take the codes.

    Example:
        >>> from pyro_vae.guides import AmortizedNormal
        >>> from pyro_vae.models import LinearGaussian
        >>> from pyro_vae.nets import MLP
        >>> model, guide = LinearGaussian(5, 2), AmortizedNormal(MLP(5, [], 4))
        >>> elbo = TraceFactor_ELBO(gamma=10.0, discriminator=MLP(2, [16, 16], 1))
        >>> elbo.training_loss(model, guide, torch.randn(7, 5)).shape
        torch.Size([])

    References:
        Kim and Mnih (2018), Disentangling by factorising, equations 2 and 3 and algorithm 2,
        https://arxiv.org/abs/1802.05983. There the permuted codes come from a second batch; here
        they are second samples for the rows of the first.
    """

    def __init__(
        self,
        gamma: Weight,
        discriminator: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        sites: Sequence[str] | None = None,
        num_particles: int = 1,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            sites=sites,
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.gamma = check_weight("TraceFactor_ELBO", "gamma", gamma)
        if not isinstance(discriminator, nn.Module):
            raise TypeError(
                f"TraceFactor_ELBO: expected discriminator to be a torch module, got "
                f"{type(discriminator).__name__}. Pass a network such as MLP(latent_dim, "
                "[1000] * 5, 1)."
            )
        trainable = [p for p in discriminator.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(
                "TraceFactor_ELBO: expected a discriminator with parameters to train, got none. "
                "Pass a network such as MLP(latent_dim, [1000] * 5, 1)."
            )
        if optimizer is None:
            optimizer = torch.optim.Adam(trainable, lr=1e-4, betas=(0.5, 0.9), fused=True)
        _check_optimizer(optimizer, discriminator)
        self.discriminator, self.optimizer = discriminator, optimizer

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the states of the discriminator and of its optimizer."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved state.

        Raises:
            ValueError: If ``state`` does not come from ``state_dict``.
        """
        if missing := {"discriminator", "optimizer"} - set(state):
            raise ValueError(
                f"TraceFactor_ELBO.load_state_dict: expected the key '{min(missing)}', got "
                f"{sorted(state)}. Pass what state_dict() returned."
            )
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _check_codes(self, codes: Codes, terms: Terms) -> None:
        require_densities(codes.runs[0], codes.names, "TraceFactor_ELBO")
        values = codes.values
        for name, parameter in self.discriminator.named_parameters():
            if (parameter.device, parameter.dtype) != (values.device, values.dtype):
                raise ValueError(
                    f"TraceFactor_ELBO: expected a discriminator of {values.dtype} on "
                    f"{values.device} like the codes, got its parameter '{name}' of "
                    f"{parameter.dtype} on {parameter.device}. Call discriminator.to(...) first."
                )
        try:
            logits = self._fixed(values[0])
        except (RuntimeError, ValueError) as err:  # It knows nothing of codes.
            raise ValueError(_expected(values, f"{type(err).__name__}: {err}")) from err
        _checked(logits, values[0])

    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        codes = self._codes(runs, terms.scales)
        return bound + self.gamma.to(bound) * codes.total(self._logits(codes.values))

    def _logits(self, codes: torch.Tensor) -> torch.Tensor:
        """The discriminator at codes ``(num, batch, D)``, not to be trained: ``(num, batch)``."""
        flat = codes.flatten(0, 1)
        return _checked(self._fixed(flat), flat).reshape(codes.shape[:2])

    def _fixed(self, codes: torch.Tensor) -> Any:
        """What the discriminator returns; no gradient, running mean or the like reaches it.

        It computes with copies, because it may be trained before a caller's backward pass.
        """
        module = self.discriminator
        tensors = chain(module.named_parameters(), module.named_buffers())
        copies = {name: tensor.detach().clone() for name, tensor in tensors}
        return functional_call(module, copies, (codes,))

    def _update(self, runs: list[Run]) -> None:
        codes = self._codes(runs, Scales(runs[0], data_plates_of(runs[0])))
        with torch.no_grad():
            values = codes.values
            fresh = codes.collect(lambda site: site["fn"].sample())
            if codes.is_masked:
                kept = codes.weights > 0
                values, fresh = values[:, kept], fresh[:, kept]
            if values.shape[1] < 2:
                return
            order = torch.rand_like(fresh).argsort(1)
            permuted = fresh.gather(1, order)
        real, product = values.flatten(0, 1), permuted.flatten(0, 1)
        self.optimizer.zero_grad()
        of_real = _checked(self.discriminator(real), real)
        of_product = _checked(self.discriminator(product), product)
        loss = (softplus(-of_real).mean() + softplus(of_product).mean()) / 2
        loss.backward()
        self.optimizer.step()


def _check_optimizer(optimizer: Any, discriminator: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"TraceFactor_ELBO: expected an optimizer from torch.optim, got "
            f"{type(optimizer).__name__}. Pass torch.optim.Adam(discriminator.parameters())."
        )
    own = set(map(id, discriminator.parameters()))
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "TraceFactor_ELBO: expected an optimizer of the discriminator's parameters, got others "
            "among them. Pass torch.optim.Adam(discriminator.parameters()); SVI trains the VAE."
        )


def _checked(logits: Any, codes: torch.Tensor) -> torch.Tensor:
    """One logit for each code, ``(batch,)``."""
    size = len(codes)
    if not isinstance(logits, torch.Tensor) or logits.shape not in ((size,), (size, 1)):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(_expected(codes, str(shape)))
    return logits.reshape(size)


def _expected(codes: torch.Tensor, actual: str) -> str:
    width = codes.shape[-1]
    return (
        f"TraceFactor_ELBO: expected a discriminator from codes (batch, {width}) to one logit "
        f"each, (batch,) or (batch, 1), got {actual}. Give it an input width of {width}, such as "
        f"MLP({width}, [1000] * 5, 1)."
    )
