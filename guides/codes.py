"""A guide that quantises: all its probability is on the codes nearest to what a network encodes."""

import math
from typing import Any

import pyro
import torch
from torch import nn

from pyro_vae.checks import check_at_least, check_batch
from pyro_vae.code_distributions import CategoricalCodes, CodeDistribution, NearestCodes
from pyro_vae.codebook import Codebook
from pyro_vae.program import Program

__all__ = ["NearestCode"]


class NearestCode(Program):
    r"""q(z | x) = 1 at the N codes nearest to the vectors v(x) of a network.

    The guide of a VQ-VAE, ``VAE(decoder, likelihood, UniformCodePrior(codebook, N))``. Train it
    with ``TraceVQ_ELBO``: the decoder's gradient goes straight through to the network, and that
    objective adds what codebook and network learn from each other. The bound is
    log p(x | z) + log p(z) at the one value z that the guide knows.

    With a ``temperature`` T evaluation, thus eval mode, has a posterior with a spread,

    .. math:: q(z \mid x) = \prod_i softmax_k(- \|v_i(x) - e_k\|^2 / T)

    with which an importance-weighted bound rises to log p(x). Training does not know it. Any T is
    valid, and the one with the highest bound best: too small a one misses codes, too large a one
    wastes particles. Once to eight times the mean squared distance to the nearest code are worth
    a try.

    Args:
        network: From data to ``num_positions * code_dim`` numbers, or to that shape. With a
            context it is called ``network(x, context)``, see ``pyro_vae.conditioning``.
        codebook: That of the model's prior, whose parameters stay the model's alone. To copy a
            trained pair, copy both at once: ``copy.deepcopy((model, guide))``.
        num_positions: N.
        temperature: T > 0 in squared units of the codes; ``None`` for the nearest codes alone.
        site: Name of the latent site, of events ``(N, D)``.
        name: Name in the param store.

    Raises:
        TypeError: If ``codebook`` is no ``Codebook``, or ``num_positions`` no integer.
        ValueError: If ``num_positions`` is below 1 or ``temperature`` not positive; when called,
            if the network returns another shape.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> guide = NearestCode(MLP(64, [32], 3 * 2), Codebook(8, code_dim=2), num_positions=3)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 3, 2])

    References:
        van den Oord et al. (2017), Neural discrete representation learning, section 3.1,
        https://arxiv.org/abs/1711.00937. A posterior that softens the nearest code: Sonderby et
        al. (2017), Continuous relaxation training of discrete latent variable image models.
    """

    def __init__(
        self,
        network: nn.Module,
        codebook: Codebook,
        num_positions: int,
        *,
        temperature: float | None = None,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        if not isinstance(codebook, Codebook):
            raise TypeError(
                f"NearestCode: expected a Codebook, got {type(codebook).__name__}. Pass that of "
                "the model's prior, model.prior.codebook."
            )
        check_at_least("NearestCode", "num_positions", num_positions, 1)
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(
                f"NearestCode: expected a finite temperature > 0, got {temperature}. Leave it out "
                "for the nearest codes alone."
            )
        super().__init__(name)
        self.network, self.site = network, site
        self.num_positions, self.temperature = num_positions, temperature
        self._codebook = (codebook,)  # In a tuple: the parameters stay the model's alone.

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, without the links that Pyro hangs on parameters."""
        for parameter in self._codebook[0].parameters():
            parameter.__dict__.pop("unconstrained", None)
        state: dict[str, Any] = super().__getstate__()
        return state

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        """Samples codes for a batch ``(batch, *event)``: ``(*sample, batch, N, D)``."""
        check_batch("NearestCode", "x", x)
        with pyro.plate("data", len(x)):
            code: torch.Tensor = pyro.sample(self.site, self._posterior(x, context))
        return code

    def _posterior(self, x: torch.Tensor, context: tuple[torch.Tensor, ...]) -> CodeDistribution:
        codebook = self._codebook[0]
        encoded: torch.Tensor = self.network(x, *context)
        event = (self.num_positions, codebook.code_dim)
        if encoded.shape not in ((len(x), *event), (len(x), math.prod(event))):
            raise ValueError(
                f"NearestCode: expected the network to encode each of {len(x)} rows into "
                f"{event[0]} vectors of {event[1]} numbers, got shape {tuple(encoded.shape)} from "
                f"x of shape {tuple(x.shape)}. Give it {math.prod(event)} outputs, vector after "
                "vector, and flatten each datum (x.flatten(1)) unless it takes its shape."
            )
        encoded = encoded.reshape(len(x), *event)
        if self.temperature is None or self.training:
            return NearestCodes(codebook, encoded)
        distances = (encoded.unsqueeze(-2) - codebook.vectors).square().sum(-1)
        return CategoricalCodes(codebook, -distances / self.temperature)
