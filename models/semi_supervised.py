"""A generative model of data with labels for some of them."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import is_validation_enabled
from pyro.poutine.runtime import get_mask
from torch import nn

from pyro_vae.checks import check_at_least, check_batch, check_data, check_values
from pyro_vae.labelled import Labelled, known_labels
from pyro_vae.program import Program

__all__ = ["SemiSupervisedVAE"]


class SemiSupervisedVAE(Program):
    r"""y ~ Categorical(class_probs), z ~ prior, x ~ likelihood(decoder(z, y)): the model M2.

    The class y is a latent where no label is known. With ``TraceEnum_ELBO``, which sums over
    classes, a row contributes to the loss

    .. math::
        -\log p(y) - E_{q(z \mid x, y)}\left[\log \frac{p(x, z \mid y)}{q(z \mid x, y)}\right]
        \quad \text{with a label}, \qquad
        -E_{q(y, z \mid x)}\left[\log \frac{p(x, y, z)}{q(y, z \mid x)}\right]
        \quad \text{without},

    the negative bounds on log p(x, y) and log p(x). Both kinds of rows stand in one batch.
    ``Trace_ELBO`` draws the class instead: the same loss on average, with a noisier gradient.

    M1+M2 is this model on the codes of a VAE: ``latents.encode(guide, x).mean`` in place of x,
    and ``likelihoods.Normal``.

    Args:
        decoder: Network ``decoder(z, y)`` from codes ``(*sample, batch, latent_dim)`` and classes
            ``(*sample, batch)``, whose leading dimensions broadcast, to ``(*sample, batch, ...)``,
            see ``pyro_vae.conditioning``.
        likelihood: From its output to the distribution of one datum, see
            ``pyro_vae.likelihoods``.
        prior: Samples the code inside the plate, see ``pyro_vae.priors``.
        num_classes: C.
        class_probs: p(y), ``(C,)``; uniform by default.
        learn_class_probs: Whether ``class_probs`` is only the start of a parameter.
        name: Name in the param store.

    Attributes:
        raw_class_probs: Logits of p(y), ``(C,)``.

    Sites: ``"y"``, ``"x"`` and those of the prior (``"z"``) in the plate ``"data"``. Where labels
    are given, ``"y"`` is the label itself with probability 1, and ``"y_label"`` observes it. A
    guide of one's own leaves ``"y"`` out, or draws it from ``pyro_vae.labelled.Labelled``.

    Raises:
        ValueError: If ``class_probs`` is not a distribution over C classes.

    Example:
        >>> from pyro_vae.conditioning import Concatenate, OneHot
        >>> from pyro_vae.likelihoods import Bernoulli
        >>> from pyro_vae.nets import MLP
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> decoder = Concatenate(MLP(2 + 3, [16], 64), embed=OneHot(3))
        >>> model = SemiSupervisedVAE(decoder, Bernoulli(), StandardNormalPrior(2), num_classes=3)
        >>> y, labelled = torch.tensor([2, 0, -1, -1, -1]), torch.arange(5) < 2
        >>> model(torch.zeros(5, 64), y, labelled).shape
        torch.Size([5, 64])

    References:
        Kingma et al. (2014), Semi-supervised learning with deep generative models, equations 2, 6
        and 7, https://arxiv.org/abs/1406.5298
    """

    raw_class_probs: torch.Tensor

    def __init__(
        self,
        decoder: nn.Module,
        likelihood: Callable[[torch.Tensor], dist.TorchDistribution],
        prior: Callable[[], torch.Tensor],
        num_classes: int,
        *,
        class_probs: torch.Tensor | None = None,
        learn_class_probs: bool = False,
        name: str | None = None,
    ) -> None:
        check_at_least("SemiSupervisedVAE", "num_classes", num_classes, 2)
        if class_probs is None:
            class_probs = torch.full((num_classes,), 1 / num_classes)
        _check_probs(class_probs, num_classes)
        super().__init__(name)
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = prior
        self.num_classes = num_classes
        raw = class_probs.log()
        if learn_class_probs:
            self.raw_class_probs = nn.Parameter(raw)
        else:
            self.register_buffer("raw_class_probs", raw)

    @property
    def class_probs(self) -> torch.Tensor:
        """p(y), ``(C,)``."""
        return self.raw_class_probs.softmax(-1)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor | None = None, labelled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs the model on a batch; returns ``x``.

        Args:
            x: Data, ``(batch, *event)``.
            y: Classes, integers of shape ``(batch,)``; without them no row has a label.
            labelled: bool, ``(batch,)``: the rows whose label is known; all by default. The values
                of ``y`` in the others play no role.

        Raises:
            TypeError: If ``y`` holds no integers or ``labelled`` no truth values; if the decoder
                takes no classes.
            ValueError: If ``x`` is not a batch of what the decoder makes, a label is not in
                0 ... C-1, a shape is another one, or ``labelled`` comes without ``y``.
        """
        where = "SemiSupervisedVAE"
        check_batch(where, "x", x)
        known = known_labels(where, y, labelled, self.num_classes, x)
        with pyro.plate("data", len(x)):
            code = self._decode(*self._sample_latents(known))
            fn = self.likelihood(code)
            check_data(where, "x", x, tuple(fn.event_shape))
            if is_validation_enabled():
                check_values(where, "x", fn, x, get_mask())
            result: torch.Tensor = pyro.sample("x", fn, obs=x)
        return result

    def _sample_latents(
        self, known: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fn = dist.Categorical(logits=self.raw_class_probs)
        if known is not None:
            label, labelled = known
            with poutine.mask(mask=labelled):  # type: ignore[call-overload]
                pyro.sample("y_label", fn, obs=label)
            fn = Labelled(fn, label, labelled)
        y = pyro.sample("y", fn, infer={"enumerate": "parallel"})
        if known is not None:
            # The same wherever it counts. But where the model alone sums over classes, TraceEnum
            # exponentiates each factor alone, and all but one of p(y) are 0 in labelled rows.
            y = torch.where(labelled, label, y)
        return self.prior(), y

    def _decode(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        try:
            output: torch.Tensor = self.decoder(z, y)
        except TypeError as err:
            err.add_note(
                "SemiSupervisedVAE: the decoder is called with code and classes, decoder(z, y). "
                "Wrap a network of codes alone, with an input wider by num_classes: "
                "pyro_vae.conditioning.Concatenate(net, embed=OneHot(num_classes))."
            )
            raise
        return output


def _check_probs(probs: torch.Tensor, num_classes: int) -> None:
    right = isinstance(probs, torch.Tensor) and probs.is_floating_point()
    shape = tuple(probs.shape) if isinstance(probs, torch.Tensor) else type(probs).__name__
    right = right and shape == (num_classes,) and bool((probs > 0).all())
    if not right or abs(float(probs.sum()) - 1) > 1e-4:
        raise ValueError(
            f"SemiSupervisedVAE: expected class_probs as a tensor of {num_classes} positive "
            f"numbers that add up to 1, got {shape}. Pass counts / counts.sum(), for instance."
        )
