"""The guide of data with labels for some of them."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.checks import check_at_least, check_batch
from pyro_vae.labelled import Labelled, known_labels
from pyro_vae.nets import NormalEncoder
from pyro_vae.program import Program

__all__ = ["AmortizedSemiSupervised"]


class AmortizedSemiSupervised(Program):
    """q(y | x) q(z | x, y): a classifier, and a normal distribution given data and class.

    Where a label is known, y is that label. So q(y | x) learns from rows without a label alone,
    unless ``TraceClassification_ELBO`` teaches it the labels. ``latents.encode(guide, x,
    site="y")`` is q(y | x), for predictions: its ``logits.argmax(-1)`` are the classes.

    Args:
        classifier: From data to C numbers, the logits of q(y | x).
        network: ``network(x, y)`` from data and classes, whose leading dimensions broadcast, to
            ``2 * latent_dim`` numbers: the locs and the raw scales of q(z | x, y), see
            ``pyro_vae.conditioning``.
        num_classes: C, as that of the model.
        site: Name of the continuous latent site.
        name: Name in the param store.

    Example:
        >>> from pyro_vae.conditioning import Concatenate, OneHot
        >>> from pyro_vae.nets import MLP
        >>> network = Concatenate(MLP(64 + 3, [16], 2 * 2), embed=OneHot(3))
        >>> guide = AmortizedSemiSupervised(MLP(64, [16], 3), network, num_classes=3)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5])

    References:
        Kingma et al. (2014), Semi-supervised learning with deep generative models, equation 4,
        https://arxiv.org/abs/1406.5298
    """

    def __init__(
        self,
        classifier: nn.Module,
        network: nn.Module,
        num_classes: int,
        *,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        check_at_least("AmortizedSemiSupervised", "num_classes", num_classes, 2)
        super().__init__(name)
        self.classifier, self.encoder = classifier, NormalEncoder(network)
        self.num_classes, self.site = num_classes, site

    def forward(
        self, x: torch.Tensor, y: torch.Tensor | None = None, labelled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Samples classes and codes for a batch; returns the classes, ``(*sample, batch)``.

        Args:
            x: Data, ``(batch, *event)``.
            y: Classes, integers of shape ``(batch,)``; without them no row has a label.
            labelled: bool, ``(batch,)``: the rows whose label is known; all by default. The values
                of ``y`` in the others play no role.

        Raises:
            TypeError: If ``y`` holds no integers or ``labelled`` no truth values; if the network
                takes no classes.
            ValueError: If a network does not give one result for every row, or the classifier
                not one logit for every class; a label is not in 0 ... C-1, a shape is another one,
                or ``labelled`` comes without ``y``.
        """
        where = "AmortizedSemiSupervised"
        check_batch(where, "x", x)
        known = known_labels(where, y, labelled, self.num_classes, x)
        with pyro.plate("data", len(x)):
            fn = self._classify(x)
            fn = fn if known is None else Labelled(fn, *known)
            drawn: torch.Tensor = pyro.sample("y", fn, infer={"enumerate": "parallel"})
            pyro.sample(self.site, self._encode(x, drawn))
        return drawn

    def _classify(self, x: torch.Tensor) -> dist.Categorical:
        logits = self.classifier(x)
        wanted = (len(x), self.num_classes)
        if tuple(logits.shape) != wanted:
            raise ValueError(
                f"AmortizedSemiSupervised: expected logits of shape {wanted} from the classifier, "
                f"one for each row and class, got {tuple(logits.shape)} from x of shape "
                f"{tuple(x.shape)}. Give it num_classes outputs, and flatten each datum "
                "(x.flatten(1)) or use a network for data of that shape."
            )
        return dist.Categorical(logits=logits)

    def _encode(self, x: torch.Tensor, y: torch.Tensor) -> dist.TorchDistribution:
        try:
            q: dist.TorchDistribution = self.encoder(x, y)
        except TypeError as err:
            err.add_note(
                "AmortizedSemiSupervised: the network is called with data and classes, "
                "network(x, y). Wrap a network of data alone, with an input wider by num_classes: "
                "pyro_vae.conditioning.Concatenate(net, embed=OneHot(num_classes))."
            )
            raise
        if q.batch_shape[-1:] != (len(x),):
            raise ValueError(
                f"AmortizedSemiSupervised: expected the network to encode each of {len(x)} rows "
                f"into one code, got codes of batch shape {tuple(q.batch_shape)} from x of shape "
                f"{tuple(x.shape)}. Flatten each datum (x.flatten(1)), or use a network for data "
                "of that shape."
            )
        return q
