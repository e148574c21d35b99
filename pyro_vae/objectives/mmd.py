"""InfoVAE: the distribution of the codes brought to the prior by maximum mean discrepancy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pyro import poutine

from pyro_vae.dependence import dependent_latents
from pyro_vae.handlers import stop_after
from pyro_vae.isolation import evaluation_mode
from pyro_vae.objectives.code_objective import CodeObjective, Codes
from pyro_vae.objectives.objective import check_weight, require_densities
from pyro_vae.runs import Run
from pyro_vae.schedules import Weight
from pyro_vae.terms import Terms

__all__ = ["TraceMMD_ELBO"]

KERNELS = ("rbf", "imq")


class TraceMMD_ELBO(CodeObjective):
    r"""The ELBO with a weaker KL of every code and a discrepancy between all codes and prior.

    The training loss is, per datum, with :math:`q(z) = E_x \, q(z \mid x)`,

    .. math::
        - E \log p(x \mid z) + (1 - \alpha) \, KL(q(z \mid x) \,\|\, p(z))
        + (\alpha + \lambda - 1) \, MMD^2(q(z), p(z)),

    .. math::
        MMD^2(q, p) = E \, k(z, z') + E \, k(y, y') - 2 E \, k(z, y),
        \qquad z, z' \sim q, \quad y, y' \sim p

    :math:`\alpha = 0, \lambda = 1` is the ELBO; :math:`\alpha = 1` the MMD-VAE. The kernels, with
    a bandwidth h, are

    - ``"rbf"``: :math:`\exp(-\|z - z'\|^2 / 2 h^2)`;
    - ``"imq"``: :math:`2 h^2 / (2 h^2 + \|z - z'\|^2)`, whose tails reach far codes.

    The estimate takes one code of each row and as many of the prior, without the pairs of a code
    with itself. It is unbiased for rows drawn independently, and may be negative. Rows with
    weights (``poutine.scale`` around all observed sites) count in it accordingly. Particles are
    averaged over.

    The prior is that of the model itself, whatever it is: its latents are sampled for the rows of
    the batch. No gradient of the discrepancy reaches the parameters of the prior; they are
    trained by the KL, thus not at all for :math:`\alpha = 1`.

    Args:
        mutual_information: :math:`\alpha` in [0, 1]: how much of the mutual information between
            data and codes is not penalised; a number, a 0-d tensor or a schedule.
        divergence: :math:`\lambda`, at least :math:`1 - \alpha`: the weight of the divergence of
            q(z) from p(z), 1 in the ELBO.
        kernel: "rbf" or "imq".
        bandwidth: h, by default sqrt(D) for codes of D dimensions: 2 D is the mean squared
            distance of two standard normal codes.
        sites: Latents that make up the code; all in the data plate by default. The others
            contribute their KL as it is.
        num_particles: Samples from the guide.
        vectorize_particles: Whether to run them at once in an outermost plate; by default
            wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        ValueError: While running, if there is not one plate over the data, if a batch has one
            row, or if a latent has no reparameterised samples.

    Example:
        >>> from pyro_vae.guides import AmortizedNormal
        >>> from pyro_vae.models import LinearGaussian
        >>> from pyro_vae.nets import MLP
        >>> model, guide = LinearGaussian(5, 2), AmortizedNormal(MLP(5, [], 4))
        >>> elbo = TraceMMD_ELBO(mutual_information=0.0, divergence=1000.0)
        >>> elbo.training_loss(model, guide, torch.randn(7, 5)).shape
        torch.Size([])

    References:
        Zhao et al. (2019), InfoVAE: Balancing learning and inference in variational autoencoders,
        equation 6 and section 3.3, https://arxiv.org/abs/1706.02262. Their code includes the pairs
        of a code with itself. Gretton et al. (2012), A kernel two-sample test, equation 3.
        Tolstikhin et al. (2018), Wasserstein auto-encoders, section 4, for "imq" and its default
        bandwidth, https://arxiv.org/abs/1711.01558
    """

    def __init__(
        self,
        mutual_information: Weight,
        divergence: Weight,
        *,
        kernel: Literal["rbf", "imq"] = "rbf",
        bandwidth: float | None = None,
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
        where = "TraceMMD_ELBO"
        if kernel not in KERNELS:
            raise ValueError(
                f"{where}: expected kernel in {list(KERNELS)}, got {kernel!r}. The tails of 'imq' "
                "reach farther."
            )
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(
                f"{where}: expected bandwidth > 0, got {bandwidth}. It is a distance between "
                "codes; leave it out for sqrt(D)."
            )
        self.kernel, self.bandwidth = kernel, bandwidth
        self.mutual_information = check_weight(where, "mutual_information", mutual_information)
        self.divergence = check_weight(where, "divergence", divergence)
        if self.mutual_information > 1 or self.mutual_information + self.divergence < 1:
            raise ValueError(
                f"{where}: expected mutual_information <= 1 and divergence >= 1 - "
                f"mutual_information, got {float(self.mutual_information)} and "
                f"{float(self.divergence)}. Elsewhere a divergence would be maximised; 0 and 1 "
                "give the ELBO."
            )
        self._dependent = set[str]()  # Latents of the model that follow others in some batch.

    def _check_codes(self, codes: Codes, terms: Terms) -> None:
        _require_pairs(codes)
        require_densities(codes.runs[0], codes.names, "TraceMMD_ELBO")
        (run,) = codes.runs
        self._dependent |= dependent_latents(run.model, run.model_trace)

    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        codes = self._codes(runs, terms.scales)
        _require_pairs(codes)
        kl = terms.sum_of(terms.kl[name] for name in codes.names)
        discrepancy = self._squared_discrepancy(codes.values, self._prior(codes), codes.weights)
        penalty = codes.weights.sum() * discrepancy.mean(0)
        alpha, divergence = self.mutual_information.to(bound), self.divergence.to(bound)
        return bound - alpha * kl + (alpha + divergence - 1) * penalty

    def _prior(self, codes: Codes) -> torch.Tensor:
        """Codes of the prior for the rows of the batch, ``(num_particles or 1, batch, D)``."""
        with torch.no_grad():
            if self._dependent.isdisjoint(codes.names):
                return codes.collect(lambda site: site["fn"].sample(), "model")
            first = codes.runs[0]
            # In eval mode: codes of the prior are no training data for a batch norm.
            with evaluation_mode(first.model), poutine.block(), poutine.trace() as tracer:
                with stop_after(codes.names):
                    first.model()
            trace = tracer.trace
            drawn = replace(first, guide_trace=trace, model_trace=trace, num_particles=1)
            return replace(codes, runs=[drawn]).values

    def _squared_discrepancy(
        self, codes: torch.Tensor, prior: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Unbiased estimate from ``(num or 1, batch, D)`` each: ``(num,)``."""
        pairs = weights.unsqueeze(0) * weights.unsqueeze(1)
        others = pairs - pairs.diag().diag()
        smallest = torch.finfo(weights.dtype).tiny  # Should a mask leave no pair, the sums are 0.
        pairs, others = (
            pairs / pairs.sum().clamp(min=smallest),
            others / others.sum().clamp(min=smallest),
        )
        alike = (others * (self._kernel(codes, codes) + self._kernel(prior, prior))).sum((1, 2))
        return alike - 2 * (pairs * self._kernel(codes, prior)).sum((1, 2))

    def _kernel(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """k of all pairs, ``(num, batch, batch)``."""
        distance = (first.unsqueeze(2) - second.unsqueeze(1)).square().sum(3)
        width = first.shape[2] if self.bandwidth is None else self.bandwidth**2
        scaled = distance / (2 * width)
        return (-scaled).exp() if self.kernel == "rbf" else 1 / (1 + scaled)


def _require_pairs(codes: Codes) -> None:
    if codes.plate.size < 2:
        raise ValueError(
            "TraceMMD_ELBO: expected a batch of at least 2 rows, got 1: a discrepancy compares "
            "pairs of codes. Leave out a last batch of 1 (drop_last=True)."
        )
