"""Importance-weighted bounds, and gradient estimators that improve with the particles."""

import math
from typing import Literal

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.objectives.objective import (
    Objective,
    check_weight,
    require_reparameterized,
)
from pyro_vae.objectives.weighted_draws import WeightedDraws
from pyro_vae.pairs import Pair
from pyro_vae.runs import Run
from pyro_vae.schedules import Weight

__all__ = ["TraceIWAE_ELBO"]

ESTIMATORS = ("standard", "stl", "dreg", "vimco")


class TraceIWAE_ELBO(Objective):
    r"""The importance-weighted bound of every datum, summed over the data.

    .. math::
        \sum_n s_n \, \log \frac{1}{K} \sum_{k=1}^K \frac{p(x_n, z_k)}{q(z_k \mid x_n)},
        \qquad z_k \sim q(z \mid x_n)

    The weights s_n of the data (subsampled plates, ``poutine.scale`` around a whole program) stand
    outside the logarithm; ``scale_kl`` acts on the latents inside. Where observed sites have
    different scales, ``poutine.scale`` stays inside with all of them. K = 1 is the ELBO.

    The estimators differ in the gradient, not in the bound:

    - ``"standard"``: through reparameterised samples, and by the score function for the others.
      The signal-to-noise ratio of the guide's gradient falls with K.
    - ``"stl"``: without the score of the guide's density. At the exact posterior the guide's
      gradient is zero; elsewhere it is biased for K > 1.
    - ``"dreg"``: doubly reparameterised, unbiased; zero at the exact posterior. Its
      signal-to-noise ratio rises with K, where no few particles carry all the weight.
    - ``"vimco"``: as standard, the score function with leave-one-out control variates.

    Args:
        num_particles: K.
        estimator: See above.
        num_groups: M independent bounds of K particles each, averaged (MIWAE).
        partial: Whether the model is trained by the one bound over all M K particles, while the
            guide is by the average of the M (PIWAE); that one is then the reported bound.
        stratified: Whether particles are spread over the components of a mixture guide in
            proportion, in their order, rather than by chance: with as many groups as experts,
            each group has one expert's particles (MMVAE), with one group all of them stand in one
            bound, which that tightens. Only of the guide's first ``FixedNormalMixture``, as
            ``MixtureOfExperts`` and ``MixtureOfProducts`` have. The gradient by "standard" is
            that of this bound. Not with "dreg" and "vimco", which rest on independent particles:
            with an expert a group, the doubly reparameterised gradient of Shi et al. tends to
            zero as K grows, where that of their bound does not.
        elbo_weight: Weight in [0, 1] of the ELBO of the same particles, the rest being that of
            the importance-weighted bound (CIWAE); a number, a 0-d tensor or a schedule.
        vectorize_particles: Whether to run the particles at once in an outermost plate; by
            default wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        ValueError: While running, if a random site lies outside a subsampled plate, if a latent
            is not in the guide, or if its samples have no gradient under "stl" or "dreg".

    Example:
        >>> import pyro, torch
        >>> from pyro_vae.guides import ExactLinearGaussian
        >>> from pyro_vae.models import LinearGaussian
        >>> model, x = LinearGaussian(5, 2), torch.randn(7, 5)
        >>> loss = TraceIWAE_ELBO(10).loss(model, ExactLinearGaussian(model), x)
        >>> bool(abs(loss + model.log_prob(x).sum()) < 1e-3)  # the exact posterior: no gap
        True

    References:
        Burda et al. (2016), Importance weighted autoencoders, https://arxiv.org/abs/1509.00519;
        Roeder et al. (2017), Sticking the landing, https://arxiv.org/abs/1703.09194;
        Tucker et al. (2019), Doubly reparameterized gradient estimators, equation 8,
        https://arxiv.org/abs/1810.04152;
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better,
        section 4, https://arxiv.org/abs/1802.04537;
        Mnih and Rezende (2016), Variational inference for Monte Carlo objectives,
        https://arxiv.org/abs/1602.06725;
        Shi et al. (2019), Variational mixture-of-experts autoencoders for multi-modal deep
        generative models, equations 3 and 5, https://arxiv.org/abs/1911.03393.
    """

    def __init__(
        self,
        num_particles: int,
        estimator: Literal["standard", "stl", "dreg", "vimco"] = "standard",
        *,
        num_groups: int = 1,
        partial: bool = False,
        stratified: bool = False,
        elbo_weight: Weight = 0.0,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        check_at_least("TraceIWAE_ELBO", "num_groups", num_groups, 1)
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"TraceIWAE_ELBO: expected estimator in {list(ESTIMATORS)}, got {estimator!r}. "
                "All give the same bound; they differ in its gradient."
            )
        if estimator == "vimco" and num_particles == 1:
            raise ValueError(
                "TraceIWAE_ELBO: expected num_particles >= 2 for estimator='vimco', got 1. Each "
                "particle is compared with the others of its group."
            )
        if estimator in ("dreg", "vimco") and stratified:
            raise ValueError(
                f"TraceIWAE_ELBO: expected independent particles for estimator='{estimator}', got "
                "stratified=True, with which its gradient is not that of the bound. Use "
                "estimator='standard' or 'stl', or stratified=False."
            )
        self.estimator, self.num_groups, self.partial = estimator, num_groups, partial
        self.stratified = stratified
        self.elbo_weight = check_weight("TraceIWAE_ELBO", "elbo_weight", elbo_weight)
        if self.elbo_weight > 1:
            raise ValueError(
                f"TraceIWAE_ELBO: expected elbo_weight <= 1, got {float(self.elbo_weight)}. "
                "1 is the ELBO, 0 the importance-weighted bound."
            )

    @property
    def _linked(self) -> bool:
        return self.partial or self.estimator in ("stl", "dreg")

    @property
    def _stratified(self) -> bool:
        return self.stratified

    @property
    def _total_particles(self) -> int:
        return self.num_particles * self.num_groups

    def _check(self, pair: Pair) -> None:
        if self.estimator in ("stl", "dreg"):
            fix = "Use estimator='vimco', or a distribution with rsample."
            require_reparameterized(pair, f"TraceIWAE_ELBO(estimator='{self.estimator}')", fix)

    def _losses(self, runs: list[Run], training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if training and self.estimator in ("stl", "dreg"):
            _refuse_parametrised(runs[0], self.estimator)
        draws = WeightedDraws.of(runs)
        shape = self.num_groups, self.num_particles, *draws.log_p.shape[1:]
        log_w = (draws.log_p - draws.log_q).detach().reshape(shape)
        bounds = log_w.logsumexp(1) - math.log(self.num_particles)
        bound = self._combine(bounds, log_w.mean(1)).mean(0)
        if self.partial:
            whole = log_w.flatten(0, 1).logsumexp(0) - math.log(self._total_particles)
            bound = self._combine(whole, log_w.mean((0, 1)))
        loss = -draws.scales.total(bound)
        if not training:
            return loss, loss
        surrogate = self._surrogate(draws, log_w)
        return loss, loss + (surrogate.detach() - surrogate)

    def _combine(self, of_bound: torch.Tensor, of_elbo: torch.Tensor | float) -> torch.Tensor:
        """Convex combination of what belongs to the importance-weighted bound and to the ELBO."""
        weight = self.elbo_weight.to(of_bound)
        # Either may be infinite where it has no weight.
        first = torch.where(weight < 1, (1 - weight) * of_bound, 0.0)
        return first + torch.where(weight > 0, weight * of_elbo, 0.0)

    def _surrogate(self, draws: WeightedDraws, log_w: torch.Tensor) -> torch.Tensor:
        """What has the gradient of the estimator; its value means nothing.

        It is a sum over particles, with coefficients for the model's parameters (``of_model``)
        and, through the samples, for the guide's (``of_path``).
        """
        normalized, equal = log_w.softmax(1), 1 / self.num_particles
        of_guide = self._combine(normalized, equal) / self.num_groups
        of_path = of_model = of_guide
        if self.estimator == "dreg":
            of_path = self._combine(normalized.square(), equal) / self.num_groups
        if self.partial:
            of_model = self._combine(log_w.flatten(0, 1).softmax(0), 1 / self._total_particles)
        of_guide, of_path, of_model = (
            coefficient.reshape(draws.log_p.shape) for coefficient in (of_guide, of_path, of_model)
        )

        total = draws.sum(of_model, draws.log_p)
        if self.partial:
            # Model and samples have coefficients of their own: two ways back through the model.
            total = total + draws.along_samples(of_path, draws.log_p, to_model=True)
            draws.weigh(torch.zeros_like(of_path))
        elif self.estimator == "dreg":
            # One way back: a particle's samples reach only its own log p.
            ratio = (of_path / of_model).nan_to_num(nan=0.0)  # Both underflow together.
            draws.weigh(ratio)
        if self.estimator in ("stl", "dreg"):
            total = total - draws.along_samples(of_path, draws.log_q)
        else:
            total = total - draws.sum(of_guide, draws.log_q)
        if draws.score is not None:
            signal = self._signal(log_w).reshape(draws.log_p.shape)
            total = total + draws.sum(signal, draws.score)
        return total

    def _signal(self, log_w: torch.Tensor) -> torch.Tensor:
        """What the score of each particle is multiplied with."""
        bound = log_w.logsumexp(1, keepdim=True) - math.log(self.num_particles)
        own = log_w / self.num_particles
        if self.estimator == "vimco":
            without_own, others = _leave_one_out(log_w)
            bound = bound - without_own
            own = own - others / self.num_particles
        return self._combine(bound.expand(log_w.shape), own) / self.num_groups


def _refuse_parametrised(run: Run, estimator: str) -> None:
    """Raises where part of the guide's density does not follow from its samples."""
    for name in run.links.parametrised if run.links else ():
        raise ValueError(
            f"TraceIWAE_ELBO(estimator='{estimator}'): expected a guide whose density follows "
            f"from its samples, got a point mass (Delta) with parameters of its own at site "
            f"'{name}'. Sample the site from a distribution, a TransformedDistribution for "
            "instance, or use estimator='standard'."
        )


def _leave_one_out(log_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bound without each particle, its log-weight replaced by the mean of the others'.

    Args:
        log_w: Log-weights, ``(M, K, ...)``.

    Returns:
        Those bounds and those means, both ``(M, K, ...)``. They are put together from what lies
        before and after a particle: a difference of sums would lose it beside larger ones.
    """
    num = log_w.shape[1]

    def before(cumulated: torch.Tensor, nothing: float) -> torch.Tensor:
        start = torch.full_like(cumulated[:, :1], nothing)
        return torch.cat([start, cumulated[:, :-1]], 1)

    back = log_w.flip(1)
    means = before(log_w.cumsum(1), 0.0) + before(back.cumsum(1), 0.0).flip(1)
    means = means / (num - 1)
    rest = torch.logaddexp(
        before(log_w.logcumsumexp(1), -math.inf),
        before(back.logcumsumexp(1), -math.inf).flip(1),
    )
    return torch.logaddexp(rest, means) - math.log(num), means
