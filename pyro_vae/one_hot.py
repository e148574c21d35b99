"""Distributions over one-hot vectors, and over the simplex, whose samples have gradients.

A one-hot sample is a jump, without a gradient of its own. The estimators put one in its place:
that of the probabilities, or that of a point of the simplex drawn with the same noise. They are
biased, unless what follows is linear in the sample.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import OneHotCategorical, register_kl

__all__ = ["OneHotStraightThrough", "RelaxedOneHot", "log_of"]


class OneHotStraightThrough(dist.OneHotCategorical):
    r"""A one-hot categorical distribution whose samples carry a gradient of your choice.

    Samples are exactly one-hot and have exactly the probabilities. Their gradient is that of the
    probabilities, or with a ``temperature`` T that of

    .. math:: softmax((\log \pi + g) / T), \qquad g_k \sim Gumbel(0, 1)

    whose largest entry is the sample's. The log-probability is that of the discrete variable,
    linear in the value, :math:`\sum_k z_k \log \pi_k`. So in an ELBO the gradients of log p(z) and
    log q(z) along the samples reach the guide, as the KL demands: with the gradient of the
    probabilities that part is unbiased. (Torch's own takes the index of the largest entry, which
    has no gradient: the guide would be trained as if there were no KL, but for
    ``TraceMeanField_ELBO``. Pyro's ``RelaxedOneHotCategoricalStraightThrough`` gives one-hot
    samples the density of the relaxed ones, which says nothing about a discrete prior.)

    Write the prior in a model of your own with this class as well: the density of a plain
    ``OneHotCategorical`` has no gradient along the samples, so that the guide would be trained as
    if that prior were uniform, but for ``TraceMeanField_ELBO`` and a single layer of latents.

    Args:
        probs: Weights of the categories, ``(*batch, K)``.
        logits: Or their logarithms; ``-inf`` for categories that do not occur.
        temperature: T > 0, a number or a 0-d tensor; ``None`` for the gradient of the
            probabilities.
        validate_args: Whether to check parameters and values, as in torch.

    Example:
        >>> logits = torch.zeros(5, 3, requires_grad=True)
        >>> z = OneHotStraightThrough(logits=logits).rsample()
        >>> z.sum(-1)
        tensor([1., 1., 1., 1., 1.], grad_fn=<SumBackward1>)
        >>> (z @ torch.tensor([0.0, 1.0, 2.0])).sum().backward()
        >>> logits.grad[0]  # of the mean of 0, 1, 2
        tensor([-0.3333,  0.0000,  0.3333])

    References:
        Bengio et al. (2013), Estimating or propagating gradients through stochastic neurons for
        conditional computation, section 3, https://arxiv.org/abs/1308.3432;
        Jang et al. (2017), Categorical reparameterization with Gumbel-softmax, sections 2.1
        and 2.2, https://arxiv.org/abs/1611.01144
    """

    has_rsample = True

    def __init__(
        self,
        probs: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        temperature: float | torch.Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.temperature = temperature
        super().__init__(probs, logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OneHotStraightThrough":
        """The same distribution with a larger batch shape."""
        new: OneHotStraightThrough = self._get_checked_instance(OneHotStraightThrough, _instance)
        new.temperature = self.temperature
        super().expand(batch_shape, _instance=new)
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws with gradients: one-hot, ``(*sample_shape, *batch, K)``."""
        if not torch.is_grad_enabled():
            return self.sample(sample_shape)
        if self.temperature is None:
            hard, soft = self.sample(sample_shape), self.probs
        else:
            perturbed = self.logits + self._gumbel(sample_shape)
            soft = (perturbed / self.temperature).softmax(-1)
            # Not from soft, whose entries are rounded alike at high temperatures.
            index = perturbed.argmax(-1, keepdim=True)
            hard = torch.zeros_like(soft).scatter(-1, index, 1.0)
        return hard + (soft - soft.detach())  # Zero, but for its gradient.

    def _gumbel(self, sample_shape: Any) -> torch.Tensor:
        noise = torch.empty(
            self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device
        )
        tiny = torch.finfo(noise.dtype).tiny
        return -noise.exponential_().clamp(min=tiny).log()

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-probability of one-hot values ``(*sample, *batch, K)``, nats."""
        if self._validate_args:
            self._validate_sample(value)
        possible, logits = _finite(self.logits)
        log_prob = (value * logits).sum(-1)
        return log_prob.masked_fill(((value > 0) & ~possible).any(-1), -torch.inf)


class RelaxedOneHot(dist.RelaxedOneHotCategorical):  # type: ignore[misc]
    r"""The density of softmax((log pi + g) / T) on the simplex, at temperatures of any size.

    Entries far below the largest are 0 in floating point, where torch's density is NaN. Samples
    remember their logarithms: the log-density of a sample is finite under any such distribution.
    One that went through another operation has only its entries.

    Args:
        temperature: T > 0, a 0-d tensor.
        probs: Weights of the categories, ``(*batch, K)``.
        logits: Or their logarithms, all finite.
        validate_args: Whether to check parameters and values, as in torch.

    Example:
        >>> q = RelaxedOneHot(torch.tensor(0.01), logits=torch.tensor([0.0, 9.0, 0.0]))
        >>> z = q.rsample()
        >>> bool((z == 0).any()), bool(q.log_prob(z).isfinite())
        (True, True)

    References:
        Maddison et al. (2017), The Concrete distribution, equation 10 and appendix C.3,
        https://arxiv.org/abs/1611.00712
    """

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws with gradients: points of the simplex, ``(*sample_shape, *batch, K)``."""
        log_value = self.base_dist.rsample(sample_shape)
        value: torch.Tensor = log_value.exp()
        value._log = log_value  # type: ignore[attr-defined]
        return value

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density of points of the simplex, nats."""
        log_value = log_of(value)
        if log_value is None:
            if self._validate_args:
                self._validate_sample(value)
            log_value = value.log()
        log_prob: torch.Tensor = self.base_dist.log_prob(log_value) - log_value.sum(-1)
        return log_prob


def log_of(value: torch.Tensor) -> torch.Tensor | None:
    """The logarithm that a sample of a :class:`RelaxedOneHot` remembers."""
    return getattr(value, "_log", None)


def _finite(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where logits are finite, and the same with 0 elsewhere: 0 times infinity is NaN."""
    possible = logits > -torch.inf
    return possible, logits.where(possible, 0.0)


# Torch's own takes probabilities that underflow for impossible, and has NaN in the gradient where
# a category is.
@register_kl(OneHotStraightThrough, OneHotCategorical)  # type: ignore[untyped-decorator]
@register_kl(OneHotCategorical, OneHotStraightThrough)  # type: ignore[untyped-decorator]
def _kl_one_hot(p: OneHotCategorical, q: OneHotCategorical) -> torch.Tensor:
    (of_p, p_logits), (of_q, q_logits) = _finite(p.logits), _finite(q.logits)
    kl = (p.probs * (p_logits - q_logits)).sum(-1)
    return kl.masked_fill((of_p & ~of_q).any(-1), torch.inf)
