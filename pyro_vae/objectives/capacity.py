"""A target for the KL, to be raised during training."""

from functools import reduce

import torch

from pyro_vae.objectives.objective import TermsObjective, check_weight, require_densities
from pyro_vae.pairs import Pair
from pyro_vae.runs import Run
from pyro_vae.schedules import Weight
from pyro_vae.terms import Terms

__all__ = ["TraceCapacity_ELBO"]


class TraceCapacity_ELBO(TermsObjective):
    r"""The ELBO with the KL held at a capacity.

    .. math:: E_q[\log p(x \mid z)] - \gamma \, |KL - C| \quad \text{per datum}

    The KL is the mean over the data, summed over all latents inside the plate over the data: with
    a capacity that rises slowly from 0 the latents take up one factor of variation after another.
    ``loss`` reports the negative ELBO; ``training_loss`` has the capacity.

    The weights of the data (subsampled plates, ``poutine.scale``) weigh the mean, and data whose
    latents a mask hides are not counted. The scale of the latents, the beta of ``scale_kl``,
    multiplies the whole penalty; if latents differ in scale, the largest does and each KL counts
    in proportion. Latents outside the plate are no code of a datum: their KL stays as it is in
    the ELBO.

    The difference is that of the batch's sums. Where a KL has no closed form its estimate may be
    negative, which the KL is not: with C = 0 the difference therefore keeps its sign, and
    C = 0 with gamma = 1 is the ELBO.

    Args:
        capacity: C, nats per datum: a number, a 0-d tensor or a schedule, such as
            ``LinearWarmup(num_steps, end=25.0)``.
        gamma: Weight of the difference, likewise. The paper has 1,000; with C = 0 it is the beta
            of a beta-VAE.
        num_particles: Samples from the guide; the KL is their mean.
        vectorize_particles: Whether to run the particles at once in an outermost plate; by
            default wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        ValueError: While running, if there is no plate over the data or no latent inside, or if
            the guide is not reparameterised.

    Example:
        >>> import torch
        >>> from pyro_vae.guides import ExactLinearGaussian
        >>> from pyro_vae.models import LinearGaussian
        >>> from pyro_vae.schedules import LinearWarmup
        >>> model, x = LinearGaussian(5, 2), torch.randn(7, 5)
        >>> capacity = LinearWarmup(num_steps=1000, end=25.0)
        >>> objective = TraceCapacity_ELBO(capacity, gamma=10.0)
        >>> objective.training_loss(model, ExactLinearGaussian(model), x).shape
        torch.Size([])

    References:
        Burgess et al. (2018), Understanding disentangling in beta-VAE, equation 8,
        https://arxiv.org/abs/1804.03599
    """

    def __init__(
        self,
        capacity: Weight,
        gamma: Weight,
        *,
        num_particles: int = 1,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        where = type(self).__name__
        self.capacity = check_weight(where, "capacity", capacity)
        self.gamma = check_weight(where, "gamma", gamma)

    def _check_terms(self, pair: Pair, terms: Terms) -> None:
        if not any(term.local for term in terms.kl.values()):
            raise ValueError(
                f"{type(self).__name__}: expected a latent inside the plate over the data, got "
                f"none among {sorted(terms.kl)}. The capacity is that of the code of a datum; "
                "train with Trace_ELBO."
            )
        run = Run.of(pair)
        local = [name for name, term in terms.kl.items() if term.local and name in run.model_trace]
        require_densities(run, local, type(self).__name__)

    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        local = [term for term in terms.kl.values() if term.local]
        kl = terms.sum_of(local)
        weights = reduce(torch.maximum, map(terms.weights, local))
        capacity, gamma = self.capacity.to(kl), self.gamma.to(kl)
        # The scales multiply both, and are never divided by: beta may be 0.
        target = capacity * terms.scales.total(weights)
        below = (kl < target) & (capacity > 0)
        penalty = gamma * torch.where(below, target - kl, kl - target)
        others = terms.sum_of(term for term in terms.kl.values() if not term.local)
        return others + penalty - terms.sum_of(terms.log_likelihood.values())
