"""DIP-VAE: codes whose covariance over the data is the identity."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal
from torch.nn.functional import pad

from pyro_vae.densities import unwrapped
from pyro_vae.objectives.code_objective import (
    CodeObjective,
    Codes,
    require_fixed_by_data,
    rows,
)
from pyro_vae.objectives.objective import check_weight
from pyro_vae.runs import Run
from pyro_vae.schedules import Weight
from pyro_vae.terms import Terms
from pyro_vae.traces import Site

__all__ = ["TraceDIP_ELBO"]

KINDS = ("I", "II")


class TraceDIP_ELBO(CodeObjective):
    r"""The ELBO with a penalty on the covariance C of the codes over the data.

    The training loss is the negative ELBO plus, for each of the data,

    .. math::
        \lambda_{od} \sum_{i \ne j} C_{ij}^2 + \lambda_d \sum_i (C_{ii} - 1)^2

    Kind I takes :math:`C = Cov_x[E(z \mid x)]`; kind II adds :math:`E_x[Cov(z \mid x)]`, which
    makes C the covariance of q(z). Expectation and covariance over x are those of the batch,
    divided by its number of rows, not by one less: a small batch has a biased C. Rows with
    weights (``poutine.scale`` around all observed sites) count in C accordingly. The penalty is
    averaged over particles.

    Args:
        off_diagonal: :math:`\lambda_{od}`; a number, a 0-d tensor or a schedule. 0 for both
            weights gives the ELBO.
        diagonal: :math:`\lambda_d`. The paper sets it to 10 times the other for kind I and to
            the same for kind II.
        kind: "I" or "II".
        sites: Latents that make up the code; all in the data plate by default.
        num_particles: Samples from the guide.
        vectorize_particles: Whether to run them at once in an outermost plate; by default
            wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        ValueError: While running, if there is not one plate over the data, or if a latent has no
            reparameterised samples, no finite mean or, for kind II, covariance in closed form,
            or a distribution that depends on another latent.

    Example:
        >>> from pyro_vae.guides import AmortizedNormal
        >>> from pyro_vae.models import LinearGaussian
        >>> from pyro_vae.nets import MLP
        >>> model, guide = LinearGaussian(5, 2), AmortizedNormal(MLP(5, [], 4))
        >>> elbo = TraceDIP_ELBO(off_diagonal=5.0, diagonal=50.0)
        >>> elbo.training_loss(model, guide, torch.randn(7, 5)).shape
        torch.Size([])

    References:
        Kumar et al. (2018), Variational inference of disentangled latent concepts from
        unlabeled observations, equations 5 to 7, https://arxiv.org/abs/1711.00848
    """

    def __init__(
        self,
        off_diagonal: Weight,
        diagonal: Weight,
        *,
        kind: Literal["I", "II"] = "I",
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
        if kind not in KINDS:
            raise ValueError(
                f"TraceDIP_ELBO: expected kind 'I' or 'II', got {kind!r}. Kind I looks at the "
                "means of the codes, kind II at the codes."
            )
        self.kind = kind
        self.off_diagonal = check_weight("TraceDIP_ELBO", "off_diagonal", off_diagonal)
        self.diagonal = check_weight("TraceDIP_ELBO", "diagonal", diagonal)

    def _check_codes(self, codes: Codes, terms: Terms) -> None:
        for name in codes.names:
            _check_moments(codes.runs[0].guide_trace.nodes[name], self.kind)
        fix = "Draw its distribution from the data alone, or leave it out of sites."
        require_fixed_by_data(codes, "TraceDIP_ELBO", fix)

    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        codes = self._codes(runs, terms.scales)
        covariance = self._covariance(codes)
        variance = covariance.diagonal(dim1=1, dim2=2)
        squares = covariance.square().sum((1, 2)) - variance.square().sum(1)
        off_diagonal, diagonal = self.off_diagonal.to(bound), self.diagonal.to(bound)
        penalty = off_diagonal * squares + diagonal * (variance - 1).square().sum(1)
        return bound + codes.weights.sum() * penalty.mean(0)

    def _covariance(self, codes: Codes) -> torch.Tensor:
        """C of every particle, ``(num, D, D)``."""
        share = codes.shares.unsqueeze(1)
        mean = codes.collect(lambda site: site["fn"].mean)
        centered = mean - (share * mean).sum(1, keepdim=True)
        covariance = centered.mT @ (share * centered)
        if self.kind == "II":
            start, width = 0, mean.shape[2]
            for name in codes.names:
                block = _mean_covariance(codes, name)
                end = start + block.shape[2]
                covariance = covariance + pad(block, (start, width - end, start, width - end))
                start = end
        return covariance


def _mean_covariance(codes: Codes, name: str) -> torch.Tensor:
    """Average over the data of the covariance of one latent given a datum: ``(num, d, d)``."""
    blocks, share = [], codes.shares.unsqueeze(1)
    for run in codes.runs:
        site: Site = run.guide_trace.nodes[name]
        given_x = _covariance_blocks(site)
        size, event_dim = given_x.shape[-1], site["fn"].event_dim + 1
        flat = rows(run.spread(given_x, site, event_dim), codes.plate, event_dim)
        mean = (share * flat).sum(1).reshape(run.num_particles, -1, size, size)
        # Blocks of jointly normal elements along the diagonal.
        which = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
        square = torch.einsum("ngij,gh->ngihj", mean, which)
        blocks.append(square.reshape(run.num_particles, *(mean.shape[1] * size,) * 2))
    return torch.cat(blocks)


def _covariance_blocks(site: Site) -> torch.Tensor:
    """Covariances between the elements of a site: ``(*batch, *event, size of a block)``."""
    fn, base = site["fn"], unwrapped(site["fn"])
    if base.event_shape:
        covariance: torch.Tensor = base.covariance_matrix  # type: ignore[attr-defined]
        return covariance.expand(*fn.batch_shape, *fn.event_shape, -1)
    variance: torch.Tensor = fn.variance
    return variance.unsqueeze(-1)


def _check_moments(site: Site, kind: str) -> None:
    name, fn = site["name"], site["fn"]
    base = unwrapped(fn)
    found = f"{type(base).__name__} at site '{name}'"
    fix = f"Use a Normal, or leave '{name}' out of sites."
    try:
        moments = [fn.mean] if kind == "I" else [fn.mean, fn.variance]
    except NotImplementedError as err:
        raise ValueError(
            f"TraceDIP_ELBO: expected a guide whose mean and variance have formulas, got {found}, "
            f"which has none. {fix}"
        ) from err
    joint = isinstance(base, MultivariateNormal | LowRankMultivariateNormal)
    if kind == "II" and base.event_shape and not joint:
        raise ValueError(
            f"TraceDIP_ELBO: expected a guide with independent elements or a MultivariateNormal, "
            f"got {found}, whose covariance is not known. {fix}"
        )
    if not all(moment.isfinite().all() for moment in moments):
        raise ValueError(
            f"TraceDIP_ELBO: expected finite means and variances, got {found}, which has others. "
            f"{fix}"
        )
