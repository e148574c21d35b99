"""The ELBO of a semi-supervised model, whose classifier also learns from the labels."""

from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.infer import ELBO, TraceEnum_ELBO

from pyro_vae.labelled import Labelled
from pyro_vae.objectives.added_term import AddedTermELBO
from pyro_vae.objectives.objective import check_weight
from pyro_vae.schedules import Weight
from pyro_vae.traces import layers, masked

__all__ = ["TraceClassification_ELBO"]


class TraceClassification_ELBO(AddedTermELBO):
    r"""Any ELBO, and the cross-entropy of the guide's classifier in the rows with a label.

    .. math:: \text{negative ELBO} - \lambda \sum_{\text{labelled rows}} \log q(y \mid x)

    In those rows the ELBO of a semi-supervised pair does not contain q(y | x), which would learn
    from the rest alone. The term is that of every site of the guide whose distribution is
    :class:`pyro_vae.labelled.Labelled`, so of none where no labels are given. It is in the
    gradient only: ``loss`` stays the negative bound on log p(x, y) and log p(x), nats. Scales,
    such as those of subsampled plates, and masks of the site apply to it.

    Args:
        weight: :math:`\lambda`, nats for each labelled row: a number, a 0-d tensor or a schedule.
            The paper's :math:`\alpha = 0.1 N`, in front of a mean over labelled rows, is
            0.1 N / N_labelled here.
        elbo: The ELBO; ``TraceEnum_ELBO(max_plate_nesting=1)``, which sums over classes, by
            default.

    Raises:
        TypeError: If ``weight`` is no number, tensor or schedule, or ``elbo`` no ELBO with a
            ``differentiable_loss``.
        ValueError: If ``weight`` is negative, not finite or not 0-d.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> from pyro_vae.conditioning import Concatenate, OneHot
        >>> from pyro_vae.guides.semi_supervised import AmortizedSemiSupervised
        >>> from pyro_vae.likelihoods import Bernoulli
        >>> from pyro_vae.models.semi_supervised import SemiSupervisedVAE
        >>> from pyro_vae.nets import MLP
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> decoder = Concatenate(MLP(2 + 3, [16], 64), embed=OneHot(3))
        >>> model = SemiSupervisedVAE(decoder, Bernoulli(), StandardNormalPrior(2), num_classes=3)
        >>> network = Concatenate(MLP(64 + 3, [16], 2 * 2), embed=OneHot(3))
        >>> guide = AmortizedSemiSupervised(MLP(64, [16], 3), network, num_classes=3)
        >>> svi = SVI(model, guide, Adam({"lr": 0.01}), TraceClassification_ELBO(1.0))
        >>> loss = svi.step(torch.zeros(2, 64), torch.tensor([1, -1]), torch.tensor([True, False]))

    References:
        Kingma et al. (2014), Semi-supervised learning with deep generative models, equation 9,
        https://arxiv.org/abs/1406.5298
    """

    def __init__(self, weight: Weight, elbo: ELBO | None = None) -> None:
        super().__init__(TraceEnum_ELBO(max_plate_nesting=1) if elbo is None else elbo)
        self.weight = check_weight("TraceClassification_ELBO", "weight", weight)

    def _wanted(self, fn: Any) -> bool:
        return isinstance(layers(fn)[-1], Labelled)

    def _term(self, fn: Any) -> torch.Tensor:
        if isinstance(fn, MaskedDistribution):
            return masked(self._term(fn.base_dist), fn._mask)
        log_prob: torch.Tensor = fn.label_log_prob()
        return -self.weight.to(log_prob) * log_prob
