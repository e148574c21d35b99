"""The aggregate posterior: what codes say about which datum they came from, and how they mix."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributions import Normal, constraints

from pyro_vae.checks import check_at_least, support_of, support_of_numbers
from pyro_vae.evaluation.aggregate_density import AggregateDensity, log_prob_of_rows
from pyro_vae.evaluation.code_site import CodeSite
from pyro_vae.isolation import without_side_effects
from pyro_vae.traces import is_point_mass

__all__ = ["AggregatePosterior", "aggregate_posterior"]

_WHERE = "aggregate_posterior"


@dataclass(frozen=True)
class AggregatePosterior:
    """The average KL of a guide, in three parts; all in nats.

    Attributes:
        index_code_mutual_information: How much a code tells about which of the N data it came
            from, in 0 ... log N.
        total_correlation: KL(q(z) || prod_j q_j(z_j)): how dependent the units are.
        dimension_wise_kl: KL(prod_j q_j(z_j) || p(z)), if p(z) factorises the sum of
            ``kl_per_dimension``.
        kl: Average over the data of KL(q(z | x) || p(z)), the sum of the three.
        kl_per_dimension: KL(q_j(z_j) || p_j(z_j)), of the event shape of the site, as a rule
            ``(latent_dim,)``; ``None`` if p(z) does not factorise.
        standard_errors: Of each of the four numbers, by name: the spread of the data's terms
            over sqrt(N), q(z) held fixed. It covers the Monte-Carlo error. NaN for one datum.
        num_data: N.
        num_samples: Codes drawn for each datum.
    """

    index_code_mutual_information: float
    total_correlation: float
    dimension_wise_kl: float
    kl: float
    kl_per_dimension: torch.Tensor | None
    standard_errors: Mapping[str, float]
    num_data: int
    num_samples: int

    @property
    def marginal_kl(self) -> float:
        """KL(q(z) || p(z)) in nats: how far the codes of all data are from the prior."""
        return self.total_correlation + self.dimension_wise_kl


def aggregate_posterior(
    guide: Callable[..., Any],
    *args: Any,
    model: Callable[..., Any] | None = None,
    num_samples: int = 1,
    site: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> AggregatePosterior:
    r"""Splits the average KL into mutual information, total correlation and dimension-wise KL.

    With the aggregate posterior of the N data given, :math:`q(z) = \frac{1}{N} \sum_n q(z | x_n)`,
    and codes :math:`z \sim q(z | x_n)` of every datum n in turn,

    .. math::
        \underbrace{E \log \frac{q(z | x_n)}{p(z)}}_{\text{KL}}
        = \underbrace{E \log \frac{q(z | x_n)}{q(z)}}_{\text{mutual information}}
        + \underbrace{E \log \frac{q(z)}{\prod_j q_j(z_j)}}_{\text{total correlation}}
        + \underbrace{E \log \frac{\prod_j q_j(z_j)}{p(z)}}_{\text{dimension-wise KL}}

    Every q(z) and q_j(z_j) is the exact sum over all N data, so that the only error is that of
    the codes drawn, and the parts add up exactly. The work grows as N^2; the memory beside the
    guide's own does not. The mutual information cannot exceed log N: give enough data.

    Evaluation only: modules run in eval mode, no gradient is kept, parameters are not touched,
    scales (beta, subsampling) are ignored. Rows that a mask leaves out are not data. The guide
    runs on all rows at once; so does a model, but only as far as the site.

    Args:
        guide: Any guide whose q(z | x) is fixed by the data. Its dimensions are independent
            (``Normal(...).to_event(1)``), or jointly normal.
        *args: The whole data set, as for ``svi.step``.
        model: Where p(z) comes from, the prior at the same site; the standard normal if left out.
        num_samples: Codes drawn for each datum.
        site: Which latent; needed where the guide has several.
        chunk_size: Codes evaluated at a time under all N data, by default as many as fit 32 MiB
            on the CPU, 256 MiB elsewhere; changes memory and speed but not the result.
        **kwargs: Keyword arguments of guide and model.

    Returns:
        Averages over the data, in nats.

    Raises:
        TypeError: If ``num_samples`` or ``chunk_size`` is no integer.
        ValueError: If one is below 1; the data are empty, subsampled at random or all masked
            out; there is no such latent, or several and no ``site``; the site is not in exactly
            one plate; its distribution depends on another latent, is a point mass, or has no
            densities of single dimensions; the prior depends on the datum or on another latent,
            or does not fit the codes; a log-density is not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 0.01).to_event(1))
        >>> parts = aggregate_posterior(guide, torch.arange(8.0).unsqueeze(-1))
        >>> round(parts.index_code_mutual_information, 4)  # log 8: the codes tell all data apart
        2.0794

    References:
        Hoffman and Johnson (2016), ELBO surgery: yet another way to carve up the variational
        evidence lower bound. Chen et al. (2018), Isolating sources of disentanglement in
        variational autoencoders, equation 2, https://arxiv.org/abs/1802.04942. Their q(z) is
        estimated from minibatches, ours is the sum over all data.
    """
    check_at_least(_WHERE, "num_samples", num_samples, 1)
    if chunk_size is not None:
        check_at_least(_WHERE, "chunk_size", chunk_size, 1)
    with without_side_effects(*(p for p in (guide, model) if p is not None)):
        posterior = CodeSite(guide, args, kwargs, name=site, where=_WHERE, role="guide")
        _check_density(posterior)
        aggregate = AggregateDensity(
            posterior.fn, posterior.kept, where=_WHERE, site=posterior.name
        )
        codes = posterior.fn.sample(torch.Size([num_samples]))
        codes = codes.reshape(num_samples, -1, *posterior.fn.event_shape)
        prior = None
        if model is not None:
            name = posterior.name
            prior = CodeSite(model, args, kwargs, name=name, where=_WHERE, role="model")
        log_p = _log_prior(prior, posterior, codes)[:, posterior.kept]
        densities = aggregate.log_prob(codes[:, posterior.kept], chunk_size)
    return _averages(*densities, log_p, posterior)


def _averages(
    log_q_given_x: torch.Tensor,
    log_q: torch.Tensor,
    log_q_j: torch.Tensor,
    log_p: torch.Tensor,
    site: CodeSite,
) -> AggregatePosterior:
    """Means of the terms, first over the samples of a datum, then over the data."""
    num_samples, num_data = log_q.shape
    kl_per_dimension = None
    if log_p.dim() == 3:  # The prior factorises.
        kl_per_dimension = (log_q_j - log_p).mean((0, 1)).reshape(site.fn.event_shape)
        log_p = log_p.sum(-1)
    log_product = log_q_j.sum(-1)
    terms = {
        "index_code_mutual_information": log_q_given_x - log_q,
        "total_correlation": log_q - log_product,
        "dimension_wise_kl": log_product - log_p,
        "kl": log_q_given_x - log_p,
    }
    for name, values in terms.items():
        if not values.isfinite().all():
            raise ValueError(
                f"{_WHERE}: expected finite log-densities at site '{site.name}', got "
                f"{int((~values.isfinite()).sum())} of {values.numel()} codes without a finite "
                f"{name}. Look at the parameters of the guide and the support of the prior."
            )
    per_datum = {name: values.mean(0) for name, values in terms.items()}
    return AggregatePosterior(
        **{name: float(values.mean()) for name, values in per_datum.items()},
        kl_per_dimension=kl_per_dimension,
        standard_errors={
            name: float(values.std()) / num_data**0.5 if num_data > 1 else math.nan
            for name, values in per_datum.items()
        },
        num_data=num_data,
        num_samples=num_samples,
    )


def _log_prior(prior: CodeSite | None, posterior: CodeSite, codes: torch.Tensor) -> torch.Tensor:
    """log p_j(z_j) of codes ``(S, rows, *event)``: ``(S, rows, dimensions)``.

    Of a prior that does not factorise log p(z): ``(S, rows)``.
    """
    if prior is None:
        return _standard_normal(posterior, codes)
    _check_prior(prior, posterior)
    log_p = log_prob_of_rows(prior.fn, codes)
    kept, moved = posterior.kept, codes.clone()
    moved[:, kept] = codes[:, kept].roll(1, 1)  # Every code under the prior of another datum.
    other = log_prob_of_rows(prior.fn, moved)[:, kept]
    if not torch.allclose(log_p[:, kept].roll(1, 1), other, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"{_WHERE}: expected one prior p(z) for all data at site '{prior.name}', got one "
            "that differs between them. Evaluate each group of data that shares a prior alone."
        )
    return log_p


def _standard_normal(site: CodeSite, codes: torch.Tensor) -> torch.Tensor:
    """Log-density of every dimension: ``(S, rows, dimensions)``."""
    support = support_of_numbers(support_of(site.fn))
    if support not in (None, constraints.real):
        raise ValueError(
            f"{_WHERE}: expected real codes at site '{site.name}', whose prior is taken to be the "
            f"standard normal, got the support {site.fn.support}. Pass model=..., whose prior is "
            "used then."
        )
    log_prob: torch.Tensor = Normal(0.0, 1.0).log_prob(codes.to(torch.float64))
    return log_prob.reshape(*codes.shape[:2], -1)


def _check_density(site: CodeSite) -> None:
    if is_point_mass(site.fn):
        raise ValueError(
            f"{_WHERE}: expected a guide with a density, got a point mass (Delta) at site "
            f"'{site.name}'. Sample the site from a distribution such as Normal."
        )
    if not site.is_fixed:
        raise ValueError(
            f"{_WHERE}: expected q(z | x) of site '{site.name}' to be fixed by the data, got a "
            "distribution that depends on another latent of the guide, or on random numbers drawn "
            "outside its sites. Name a site that depends on the data alone with site=..."
        )


def _check_prior(prior: CodeSite, site: CodeSite) -> None:
    name = site.name
    if prior.kept.shape != site.kept.shape or prior.fn.event_shape != site.fn.event_shape:
        shapes = [(len(s.kept), *s.fn.event_shape) for s in (prior, site)]
        raise ValueError(
            f"{_WHERE}: expected codes of the same shape at site '{name}' in model and guide, got "
            f"{shapes[0]} in the model and {shapes[1]} in the guide. Give both the same plate and "
            "event shape."
        )
    if not prior.kept.equal(site.kept):
        raise ValueError(
            f"{_WHERE}: expected the same mask at site '{name}' in model and guide, got different "
            "ones. Mask both sides alike."
        )
    if not prior.is_fixed:
        raise ValueError(
            f"{_WHERE}: expected a prior p(z) at site '{name}', got one that depends on another "
            "latent of the model, or on random numbers outside its sites. Name the latent at the "
            "top of the hierarchy with site=..."
        )
