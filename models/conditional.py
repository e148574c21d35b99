"""The conditional variational autoencoder's generative model: data given a context."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import is_validation_enabled
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK, get_mask

from pyro_vae.checks import check_batch, check_data, check_values
from pyro_vae.program import Program

__all__ = ["ConditionalVAE"]


class ConditionalVAE(Program):
    """z ~ prior(y), x ~ likelihood(decoder(z, y)), given y.

    The context y may be the class of each row, a vector or an image, such as one half of a
    picture whose other half is x. It is an argument, not a site: the model is p(x | y) and says
    nothing about y. Its guide is called with both as well: ``AmortizedNormal(net)(x, y)`` calls
    ``net(x, y)``. So the held-out log p(x | y) is
    ``importance_weighted_log_likelihood(model, guide, x, y)``.

    Args:
        decoder: Network ``decoder(z, y)`` from codes ``(*sample, batch, latent_dim)`` and the
            context to ``(*sample, batch, ...)``, see ``pyro_vae.conditioning``.
        likelihood: From its output to the distribution of one datum, see
            ``pyro_vae.likelihoods``.
        prior: Samples the code inside the plate, called with the context, see
            ``pyro_vae.conditional_priors``.
        name: Name in the param store.

    Sites: ``"x"``, and those of the prior (``"z"``), in the plate ``"data"``.

    Example:
        >>> from pyro_vae.conditional_priors import Unconditional
        >>> from pyro_vae.conditioning import Concatenate, OneHot
        >>> from pyro_vae.likelihoods import Bernoulli
        >>> from pyro_vae.nets import MLP
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> decoder = Concatenate(MLP(2 + 10, [16], 64), embed=OneHot(10))
        >>> model = ConditionalVAE(decoder, Bernoulli(), Unconditional(StandardNormalPrior(2)))
        >>> model(torch.zeros(5, 64), torch.tensor([3, 1, 4, 1, 5])).shape
        torch.Size([5, 64])

    References:
        Sohn et al. (2015), Learning structured output representation using deep conditional
        generative models, section 4. Here the prior's network and the guide's are apart, and
        there is no extra term in the objective.
    """

    def __init__(
        self,
        decoder: torch.nn.Module,
        likelihood: Callable[[torch.Tensor], TorchDistribution],
        prior: Callable[[torch.Tensor], torch.Tensor],
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = prior

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Runs the model on a batch ``(batch, *event)`` and its context; returns ``x``.

        Args:
            x: Data, ``(batch, *event)``.
            y: Context, ``(batch, *context_event)``: classes ``(batch,)``, vectors, images.

        Raises:
            TypeError: If ``y`` is no tensor, or prior or decoder does not take a context.
            ValueError: If ``x`` is not a batch of what the decoder makes, or ``y`` has another
                number of rows, or dimensions that the decoder takes for more rows.
        """
        check_batch("ConditionalVAE", "x", x)
        _check_context(y, len(x))
        with pyro.plate("data", len(x)):
            fn = self.likelihood(self._decode(self._sample_code(y), y))
            check_data("ConditionalVAE", "x", x, tuple(fn.event_shape))
            _check_output(fn, y)
            if is_validation_enabled():
                check_values("ConditionalVAE", "x", fn, x, get_mask())
            result: torch.Tensor = pyro.sample("x", fn, obs=x)
        return result

    def _sample_code(self, y: torch.Tensor) -> torch.Tensor:
        try:
            return self.prior(y)
        except TypeError as err:
            err.add_note(
                "ConditionalVAE: the prior is called with the context, prior(y). Wrap one that "
                "takes none: pyro_vae.conditional_priors.Unconditional(prior)."
            )
            raise

    def _decode(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        try:
            output: torch.Tensor = self.decoder(z, y)
        except TypeError as err:
            err.add_note(
                "ConditionalVAE: the decoder is called with code and context, decoder(z, y). Give "
                "a network that takes both, such as pyro_vae.conditioning.Concatenate(net)."
            )
            raise
        return output


def _check_context(y: Any, num_rows: int) -> None:
    if not isinstance(y, torch.Tensor):
        raise TypeError(
            f"ConditionalVAE: expected the context y to be a tensor, got {type(y).__name__}. "
            "Convert it with torch.as_tensor(y)."
        )
    if y.dim() == 0 or len(y) != num_rows:
        raise ValueError(
            f"ConditionalVAE: expected a context y of {num_rows} rows, as x has, got shape "
            f"{tuple(y.shape)}. Give each row its context; one for all rows is y.expand("
            f"{num_rows}, ...)."
        )


def _check_output(fn: TorchDistribution, y: torch.Tensor) -> None:
    """A column of classes would make networks broadcast to all pairs of rows."""
    if any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK):
        return  # Enumerated latents have dimensions of their own; the objective checks the rest.
    shape = fn.batch_shape
    plates = {handler.dim for handler in _PYRO_STACK if isinstance(handler, IndepMessenger)}
    if any(shape[dim] != 1 and dim not in plates for dim in range(-len(shape), 0)):
        raise ValueError(
            f"ConditionalVAE: expected one output of the decoder for each of {len(y)} rows, got "
            f"batch shape {tuple(shape)} with a context of shape {tuple(y.shape)}. Classes are "
            f"integers of shape ({len(y)},): y.squeeze(-1), or y.argmax(-1) of one-hot rows."
        )
