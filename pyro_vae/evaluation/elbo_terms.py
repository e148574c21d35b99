"""The ELBO of every datum, site by site: expected log-likelihoods and KLs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vae.evaluation.chunked_runs import ChunkedRuns
from pyro_vae.isolation import without_side_effects
from pyro_vae.runs import Run
from pyro_vae.terms import terms_of
from pyro_vae.traces import is_random, sites_of

__all__ = ["ElboTerms", "elbo_terms"]


@dataclass(frozen=True)
class ElboTerms:
    """The ELBO of every datum in its parts.

    Attributes:
        log_likelihood: Expected log-likelihood E_q[log p(x | z)] of each observed site, nats,
            ``(batch,)``.
        kl: E_q[log q(z | x) - log p(z)] of each latent, nats, ``(batch,)``. An auxiliary site or
            a factor of the guide has an entry of its own; only the sum over them and the latents
            made of them is a KL.
        closed_form: Names in ``kl`` that come from a formula; the others are averages over the
            particles, whose noise can make them negative.
        is_data: Rows that are data, bool, ``(batch,)``: those of which a mask leaves anything.
            The terms of the others are 0.
        num_particles: Samples from the guide behind each number.

    Example:
        >>> one = torch.ones(2, dtype=torch.float64)
        >>> terms = ElboTerms({"x": -80 * one}, {"z": 5 * one}, frozenset("z"), one > 0, 10)
        >>> ElboTerms.cat([terms, terms]).elbo
        tensor([-85., -85., -85., -85.], dtype=torch.float64)
    """

    log_likelihood: dict[str, torch.Tensor]
    kl: dict[str, torch.Tensor]
    closed_form: frozenset[str]
    is_data: torch.Tensor
    num_particles: int

    def __len__(self) -> int:
        return len(self.is_data)

    @property
    def rate(self) -> torch.Tensor:
        """Sum of the KLs, nats, ``(batch,)``."""
        zero = torch.zeros_like(self.is_data, dtype=torch.float64)
        return sum(self.kl.values(), start=zero)

    @property
    def distortion(self) -> torch.Tensor:
        """Negative expected log-likelihood of all observed sites, nats, ``(batch,)``."""
        zero = torch.zeros_like(self.is_data, dtype=torch.float64)
        return zero - sum(self.log_likelihood.values(), start=zero)

    @property
    def elbo(self) -> torch.Tensor:
        """Lower bound on log p(x) with beta = 1, nats, ``(batch,)``: -distortion - rate."""
        return -self.distortion - self.rate

    @staticmethod
    def cat(terms: Sequence["ElboTerms"]) -> "ElboTerms":
        """Joins the terms of several batches, in order.

        Raises:
            ValueError: If there are none, or they differ in sites or in the number of particles.
        """
        if not terms:
            raise ValueError(
                "ElboTerms.cat: expected the terms of at least one batch, got none. "
                "Pass the terms of your batches."
            )
        first = terms[0]
        for other in terms[1:]:
            for of_first, of_other in zip(_alike(first), _alike(other), strict=True):
                if of_first != of_other:
                    raise ValueError(
                        f"ElboTerms.cat: expected the same sites and num_particles in all, got "
                        f"{of_first} and {of_other}. Evaluate all batches alike."
                    )

        def joined(of: Callable[[ElboTerms], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            return {name: torch.cat([of(t)[name] for t in terms]) for name in of(first)}

        return ElboTerms(
            log_likelihood=joined(lambda t: t.log_likelihood),
            kl=joined(lambda t: t.kl),
            closed_form=first.closed_form,
            is_data=torch.cat([t.is_data for t in terms]),
            num_particles=first.num_particles,
        )


def _alike(terms: ElboTerms) -> tuple[Any, ...]:
    """What the terms of two batches of one evaluation share."""
    sites = sorted(terms.log_likelihood), sorted(terms.kl), sorted(terms.closed_form)
    return *sites, terms.num_particles


def elbo_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 100,
    chunk_size: int = 10,
    **kwargs: Any,
) -> ElboTerms:
    r"""Estimates the ELBO of every datum in a batch, site by site.

    .. math::
        \text{ELBO}(x) = \sum_{\text{observed}} E_q[\log p(x \mid z)]
        - \sum_{\text{latent}} E_q[KL(q(z \mid x) \,\|\, p(z))]

    A KL is in closed form where Pyro has a formula and all latents before it in the model, which
    may be its parents, come before it in the guide as well; else it is the mean of log q - log p.
    Either is averaged over the particles, as it may depend on other latents. Evaluation only:
    modules run in eval mode, no gradient is kept, parameters are not touched, every scale (beta,
    subsampling) is ignored and every mask kept.

    Args:
        model: Any callable with Pyro statements whose sites share a plate over the data.
        guide: A callable with the same signature that samples every latent.
        *args: One batch, as for ``svi.step``.
        num_particles: Samples from the guide.
        chunk_size: Particles run at a time. More take more memory; results differ only in the
            random numbers drawn.
        **kwargs: Keyword arguments of model and guide.

    Returns:
        Per-datum terms in nats, float64, ``(batch,)``. If sites share several plates the shape
        is theirs, outermost first.

    Raises:
        TypeError: If ``num_particles`` or ``chunk_size`` is no integer.
        ValueError: If either is below 1; the data are empty, not finite or outside the
            likelihood's support; a site lies outside the data plate; guide and model have
            different latents; the guide has no density or leaves the support of the prior; a
            term is NaN.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> terms = elbo_terms(model, guide, torch.tensor([0.0, 2.0]))
        >>> terms.kl["z"], terms.closed_form  # x^2 / 8
        (tensor([0.0000, 0.5000], dtype=torch.float64), frozenset({'z'}))

    References:
        Kingma and Welling (2014), Auto-encoding variational Bayes, equation 3. The names rate
        and distortion are those of Alemi et al. (2018), Fixing a broken ELBO, section 2,
        https://arxiv.org/abs/1711.00464
    """
    where = "elbo_terms"
    with without_side_effects(model, guide):
        runs = ChunkedRuns(model, guide, args, kwargs, num_particles, chunk_size, where)
        log_likelihood: dict[str, torch.Tensor] = {}
        kl: dict[str, torch.Tensor] = {}
        for run in runs:
            terms = terms_of([run])
            for totals, parts in ((log_likelihood, terms.log_likelihood), (kl, terms.kl)):
                for name, term in parts.items():
                    values = runs.plates.sum_others(term.values) * run.num_particles
                    totals[name] = totals[name] + values if name in totals else values
        closed_form = frozenset(n for n, term in terms.kl.items() if term.closed_form)
        is_data = _is_data(run, runs)
    result = ElboTerms(
        log_likelihood={name: total / num_particles for name, total in log_likelihood.items()},
        kl={name: total / num_particles for name, total in kl.items()},
        closed_form=closed_form,
        is_data=is_data,
        num_particles=num_particles,
    )
    _check_terms(result, where)
    return result


def _is_data(run: Run, runs: ChunkedRuns) -> torch.Tensor:
    sites = sites_of(run.model_trace, is_random).values()
    seen = [runs.plates.sum_others(run.present(site)) > 0 for site in sites]
    return torch.stack(seen).any(0)


def _check_terms(terms: ElboTerms, where: str) -> None:
    """An expected log-likelihood of -inf and a KL of inf are what they say; the rest is wrong."""
    signs = (("log-likelihood", terms.log_likelihood, 1), ("KL", terms.kl, -1))
    for what, parts, sign in signs:
        for name, values in parts.items():
            wrong = values.isnan() | (sign * values == torch.inf)
            if wrong.any():
                raise ValueError(
                    f"{where}: expected a finite {what} at site '{name}', got "
                    f"{float(values[wrong][0])} for {int(wrong.sum())} of {wrong.numel()} data. "
                    "Look at the parameters and data that site depends on."
                )
