"""Log-likelihood of some modalities given others."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from pyro_vae.evaluation.estimate import LogLikelihoodEstimate
from pyro_vae.evaluation.likelihood import importance_weighted_log_likelihood
from pyro_vae.modalities import Batch, Observed, Present, check_row_mask, observed_of

__all__ = ["conditional_log_likelihood"]


def conditional_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    present: Present | None = None,
    *,
    given: Collection[str] | Present,
    num_particles: int = 5000,
    chunk_size: int | None = None,
    chunk_bytes: int | None = None,
) -> LogLikelihoodEstimate:
    r"""Estimates log p(x_A | x_B) of every row: B is what is given, A all else observed.

    .. math:: \log \hat p(x_A \mid x_B) = \log \hat p(x_A, x_B) - \log \hat p(x_B)

    Both terms come from :func:`importance_weighted_log_likelihood` with particles of their own,
    the guide seeing what stands in each. Each row may have its own pattern of what is observed
    and what is given. Where nothing is given the estimate is that of log p(x_A), and where
    nothing else is observed it is 0, without error.

    The two estimates are bounds from below in expectation; their difference is not a bound.

    Args:
        model: Any callable ``model(batch, present)``, see ``pyro_vae.models.MultimodalVAE``. It
            is called with ``present`` as given here, and with masks of what is given.
        guide: A callable with the same signature.
        batch: Data by modality, ``(batch, *event)``. A missing key or ``None``: not observed.
        present: By modality, bool ``(batch,)``: the rows in which it is observed.
        given: The modalities in B: their names; or masks by modality, bool ``(batch,)``, for
            rows that differ. What a row does not have is not given.
        num_particles: K, for each of the two estimates.
        chunk_size: See :func:`importance_weighted_log_likelihood`.
        chunk_bytes: Likewise.

    Returns:
        Per-row estimates in nats, ``(batch,)``. The standard error is that of the difference,
        the effective sample size the smaller and Pareto-k the larger of the two; ``elbo`` is the
        difference of two ELBOs.

    Raises:
        TypeError: If ``batch``, ``present`` or ``given`` has another type.
        ValueError: If ``given`` is empty or names a modality that is not in ``batch``; and as
            in :func:`importance_weighted_log_likelihood`.

    Example:
        >>> import pyro, torch
        >>> from pyro_vae.guides import ProductOfExperts
        >>> from pyro_vae.likelihoods import Bernoulli, Categorical
        >>> from pyro_vae.models import MultimodalVAE
        >>> from pyro_vae.nets import MLP
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> model = MultimodalVAE(
        ...     {"image": MLP(2, [], 64), "label": MLP(2, [], 10)},
        ...     {"image": Bernoulli(), "label": Categorical(event_dim=0)},
        ...     StandardNormalPrior(2),
        ... )
        >>> guide = ProductOfExperts({"image": MLP(64, [], 4)}, 2)
        >>> batch = {"image": torch.zeros(5, 64)}
        >>> conditional_log_likelihood(
        ...     model, guide, batch, given=["image"], num_particles=10
        ... ).log_likelihood
        tensor([0., 0., 0., 0., 0.], dtype=torch.float64)

    References:
        Wu and Goodman (2018), Multimodal generative models for scalable weakly-supervised
        learning, https://arxiv.org/abs/1802.05335
    """
    where = "conditional_log_likelihood"
    seen = observed_of(where, None, batch, present)
    masks = _given_masks(where, given, seen)
    known = {name: seen.mask(name) & mask.to(seen.device) for name, mask in masks.items()}
    anything_given = torch.stack(list(known.values())).any(0)
    asked = [seen.mask(name) & ~known.get(name, torch.tensor(False)) for name in seen.values]
    anything_asked = torch.stack(asked).any(0)

    settings: dict[str, Any] = {
        "num_particles": num_particles,
        "chunk_size": chunk_size,
        "chunk_bytes": chunk_bytes,
    }
    joint = importance_weighted_log_likelihood(model, guide, batch, present, **settings)
    of_given = {name: seen.values[name] for name in known}
    marginal = importance_weighted_log_likelihood(model, guide, of_given, known, **settings)

    def difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        second = torch.where(anything_given, second, 0.0)
        return torch.where(anything_asked, first - second, 0.0)

    def of_both(first: torch.Tensor, second: torch.Tensor, combine: Any, exact: float) -> Any:
        both = torch.where(anything_given, combine(first, second), first)
        return torch.where(anything_asked, both, exact)

    return LogLikelihoodEstimate(
        log_likelihood=difference(joint.log_likelihood, marginal.log_likelihood),
        standard_error=of_both(joint.standard_error, marginal.standard_error, torch.hypot, 0.0),
        effective_sample_size=of_both(
            joint.effective_sample_size,
            marginal.effective_sample_size,
            torch.minimum,
            float(num_particles),
        ),
        pareto_k=of_both(joint.pareto_k, marginal.pareto_k, torch.maximum, -torch.inf),
        elbo=difference(joint.elbo, marginal.elbo),
        num_particles=num_particles,
    )


def _given_masks(
    where: str, given: Collection[str] | Present, seen: Observed
) -> dict[str, torch.Tensor]:
    """The rows in which each modality is given."""
    if isinstance(given, str) or not isinstance(given, Collection):
        fix = f"given=['{given}']" if isinstance(given, str) else "given=['image']"
        raise TypeError(
            f"{where}: expected given to be a collection of modalities, got {given!r}. Write {fix}."
        )
    for name in given:
        if name not in seen.values:
            raise ValueError(
                f"{where}: expected given among the modalities {list(seen.values)} of the batch, "
                f"got {name!r}. Only what is in the batch can be given."
            )
    if not given:
        raise ValueError(
            f"{where}: expected at least one modality in given, got none. Without one use "
            "importance_weighted_log_likelihood."
        )
    everywhere = torch.ones(seen.num_rows, dtype=torch.bool)
    masks = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, everywhere)
    for name, mask in masks.items():
        check_row_mask(where, f"given['{name}']", mask)
        if len(mask) != seen.num_rows:
            raise ValueError(
                f"{where}: expected given['{name}'] with {seen.num_rows} rows as in batch, got "
                f"{len(mask)}. It has one entry for each row."
            )
    return masks
