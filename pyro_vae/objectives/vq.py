"""The objective of VQ-VAE: what a codebook and an encoder learn from each other."""

from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch.distributions import Independent

from pyro_vae.code_distributions import NearestCodes
from pyro_vae.codebook import Codebook
from pyro_vae.objectives.added_term import AddedTermELBO
from pyro_vae.objectives.objective import check_weight
from pyro_vae.schedules import Weight
from pyro_vae.traces import is_latent, mask_of, masked

__all__ = ["TraceVQ_ELBO"]


class TraceVQ_ELBO(AddedTermELBO):
    r"""An ELBO, and in its gradient the terms that bring codes and encoded vectors together.

    The training loss is, per datum, with encoded vectors :math:`v_i(x)` and their nearest codes
    :math:`e_{k_i}` as z,

    .. math::
        - \log p(x \mid z) - \log p(z) + \sum_i \|sg[v_i] - e_{k_i}\|^2
        + \beta \sum_i \|v_i - sg[e_{k_i}]\|^2

    where sg stops gradients. The last term commits the network to the codes. The one before is
    how a codebook learns by gradient; one with a ``decay`` is moved instead, after each gradient
    in train mode, by the vectors of all rows that no mask leaves out and all particles. The
    reported loss is the negative bound, -log p(x | z) - log p(z): nats, summed over all data.

    In the paper log p(x | z) is that of a normal with unit variance. With ``likelihoods.Normal``
    of scale s the terms weigh 2 s^2 as much against the squared error. Code that averages the
    squared error over M pixels and the last term over the N D numbers of a code, with a weight b
    on the latter, has :math:`\beta = b M / (2 s^2 N D)`.

    Args:
        commitment_cost: :math:`\beta`: a number, a 0-d tensor or a schedule.
        elbo: The ELBO; ``pyro.infer.Trace_ELBO()`` by default.

    Raises:
        TypeError: If ``elbo`` is no ELBO with a ``differentiable_loss``, or ``commitment_cost`` no
            number.
        ValueError: If ``commitment_cost`` is negative or not finite; when training, if the guide
            has no nearest codes.

    Example:
        >>> import pyro
        >>> from pyro_vae.priors import UniformCodePrior
        >>> from pyro_vae.guides import NearestCode
        >>> from pyro_vae.likelihoods import Bernoulli
        >>> from pyro_vae.models import VAE
        >>> from pyro_vae.nets import MLP
        >>> codebook = Codebook(num_codes=8, code_dim=2, decay=0.99)
        >>> model = VAE(MLP(3 * 2, [16], 64), Bernoulli(), UniformCodePrior(codebook, 3))
        >>> guide = NearestCode(MLP(64, [16], 3 * 2), codebook, 3)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceVQ_ELBO())
        >>> loss = svi.step(torch.ones(5, 64))

    References:
        van den Oord et al. (2017), Neural discrete representation learning, equation 3,
        https://arxiv.org/abs/1711.00937
    """

    def __init__(self, commitment_cost: Weight = 0.25, elbo: ELBO | None = None) -> None:
        check_weight("TraceVQ_ELBO", "commitment_cost", commitment_cost)
        super().__init__(Trace_ELBO() if elbo is None else elbo)
        self.commitment_cost = commitment_cost

    def differentiable_loss(
        self, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """A 0-d tensor with the value of the negative bound and the gradient of training.

        Codebooks with a ``decay`` move, where gradients are enabled.
        """
        with _Assigned() as assigned:
            loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if not torch.is_grad_enabled():
            return loss
        if not assigned.vectors:
            raise ValueError(
                "TraceVQ_ELBO: expected a guide that samples nearest codes, got none. Use "
                "guides.NearestCode; with a temperature it has them in train mode alone."
            )
        for codebook, vectors in assigned.vectors.items():
            codebook.update(torch.cat(vectors), torch.cat(assigned.masks[codebook]))
        return loss

    def _wanted(self, fn: Any) -> bool:
        return _nearest(fn) is not None

    def _term(self, fn: Any) -> torch.Tensor:
        if isinstance(fn, MaskedDistribution):
            return masked(self._term(fn.base_dist), fn._mask)
        if isinstance(fn, Independent):  # A grid of positions.
            inner = self._term(fn.base_dist)
            return inner.flatten(len(fn.batch_shape)).sum(-1)
        weight = check_weight("TraceVQ_ELBO", "commitment_cost", self.commitment_cost)
        codes, encoded = fn.codes, fn.encoded
        of_codebook = (encoded.detach() - codes).square()
        of_encoder = (encoded - codes.detach()).square()
        term = (of_codebook + weight.to(encoded) * of_encoder).sum((-2, -1))
        return term.expand(fn.batch_shape)


def _nearest(fn: Any) -> NearestCodes | None:
    """The nearest codes of a distribution, perhaps masked or reshaped; ``None`` for any other."""
    while isinstance(fn, MaskedDistribution | Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, NearestCodes) else None


class _Assigned(Messenger):
    """Keeps encoded vectors, and which of them are data, by codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors: dict[Codebook, list[torch.Tensor]] = {}
        self.masks: dict[Codebook, list[torch.Tensor]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = _nearest(msg["fn"])
        # Without gradients an objective takes its first look at a pair: that is no step.
        if fn is None or not is_latent(msg) or not torch.is_grad_enabled():
            return
        encoded = fn.encoded.detach().expand(*fn.batch_shape, *fn.event_shape)
        mask, is_data = mask_of(msg), torch.ones_like(encoded[..., 0], dtype=torch.bool)
        if mask is not None:
            outer = msg["fn"].batch_shape
            mask = mask.expand(outer).reshape(outer + (1,) * (len(fn.batch_shape) - len(outer)))
            is_data = is_data & mask.expand(fn.batch_shape).unsqueeze(-1)
        self.masks.setdefault(fn.codebook, []).append(is_data.flatten())
        self.vectors.setdefault(fn.codebook, []).append(encoded.reshape(-1, encoded.shape[-1]))
