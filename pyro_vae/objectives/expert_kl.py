"""The ELBO with the KL of the joint posterior to that of each modality alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_vae.densities import closed_form_kl
from pyro_vae.handlers import replay_values
from pyro_vae.modalities import Batch, Observed, Present, observed_of
from pyro_vae.objectives.objective import (
    TermsObjective,
    check_weight,
    dim_of_rows,
    require_densities,
)
from pyro_vae.objectives.subset_runs import restricted
from pyro_vae.pairs import Pair
from pyro_vae.runs import Run
from pyro_vae.schedules import Weight
from pyro_vae.terms import Terms, data_plates_of
from pyro_vae.traces import Site, is_latent, masked, site_log_prob, sites_of
from pyro_vae.vectorised import PARTICLES

__all__ = ["TraceExpertKL_ELBO"]


class TraceExpertKL_ELBO(TermsObjective):
    r"""The ELBO with the KL of the joint posterior to each modality's own.

    .. math::
        \lambda \, E_q[\log p(x \mid z)] - \beta \, KL(q(z \mid x) \,\|\, p(z))
        - \alpha \sum_m KL(q(z \mid x) \,\|\, q(z \mid x_m)) \quad \text{per row}

    For models and guides called ``(batch, present=None)``, see ``pyro_vae.models.MultimodalVAE``,
    with sites of any name. The sum runs over the modalities m observed in a row, and q(z | x_m) is
    the same guide given that modality alone, so that after training one modality tells what
    all would have told. ``loss`` reports the negative ELBO, in which all weights are 1 but
    those of the programs; ``training_loss`` has these.

    ============  =================================================================================
    JMVAE-kl      ``TraceExpertKL_ELBO(alpha)``
    MVTCAE        ``TraceExpertKL_ELBO(beta * alpha / M, likelihood_weight=(M - alpha) / M,``
                  ``kl_weight=beta * (1 - alpha))`` and ``ProductOfExperts(..., with_prior=False)``
    ============  =================================================================================

    M is the number of modalities in MVTCAE, whose weights hold for rows with all of them: where
    some are missing the sum has fewer terms beside the same weights, so that its likelihoods
    count for more than a total correlation of what is observed would say.

    A KL is in closed form where Pyro or torch has one, else the mean of log q(z | x) -
    log q(z | x_m) over the particles. Gradients flow into both guides. Latents that the guide
    does not sample given a modality alone have no part in its term, and private ones that it
    samples in the same way add 0. The scale of a latent, the beta of ``scale_kl``, and the weights
    of data multiply these KLs too.

    Args:
        expert_weight: alpha: a number, a 0-d tensor or a schedule.
        likelihood_weight: lambda, likewise.
        kl_weight: beta, likewise.
        num_particles: Samples from the guide.
        vectorize_particles: Whether to run the particles at once in an outermost plate; by
            default wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        TypeError: While running, if the batch is no mapping.
        ValueError: While running, if there is no plate over the rows, if the guide is not
            reparameterised, or if it samples a point mass.

    Example:
        >>> from pyro_vae.guides import ProductOfExperts
        >>> from pyro_vae.likelihoods import Normal
        >>> from pyro_vae.models import MultimodalVAE
        >>> from pyro_vae.nets import MLP
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> decoders = {"image": MLP(2, [], 5), "sound": MLP(2, [], 3)}
        >>> likelihoods = {"image": Normal(), "sound": Normal()}
        >>> model = MultimodalVAE(decoders, likelihoods, StandardNormalPrior(2))
        >>> guide = ProductOfExperts({"image": MLP(5, [], 4), "sound": MLP(3, [], 4)}, 2)
        >>> batch = {"image": torch.randn(7, 5), "sound": torch.randn(7, 3)}
        >>> objective = TraceExpertKL_ELBO(0.1)
        >>> objective.training_loss(model, guide, batch, {"sound": torch.arange(7) < 4}).shape
        torch.Size([])

    References:
        Suzuki et al. (2017), Joint multimodal learning with deep generative models,
        https://arxiv.org/abs/1611.01891 (JMVAE-kl; its encoders of all modalities and of
        each have no parts in common, here they are one guide);
        Hwang et al. (2021), Multi-view representation learning via total correlation objective,
        NeurIPS 2021 (MVTCAE)
    """

    def __init__(
        self,
        expert_weight: Weight,
        *,
        likelihood_weight: Weight = 1.0,
        kl_weight: Weight = 1.0,
        num_particles: int = 1,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        where = type(self).__name__
        self._arguments: _Arguments | None = None
        self.expert_weight = check_weight(where, "expert_weight", expert_weight)
        self.likelihood_weight = check_weight(where, "likelihood_weight", likelihood_weight)
        self.kl_weight = check_weight(where, "kl_weight", kl_weight)

    def _runs(self, model: Any, guide: Any, args: Any, kwargs: Any, *, training: bool) -> list[Run]:
        self._arguments = _Arguments.of(guide, args, kwargs)
        return super()._runs(model, guide, args, kwargs, training=training)

    def _losses(self, runs: list[Run], training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return super()._losses(runs, training)
        finally:
            self._arguments = None  # No batch outlives its step.

    def _check_terms(self, pair: Pair, terms: Terms) -> None:
        run = Run.of(pair)
        latents = [n for n in sites_of(pair.guide_trace, is_latent) if n in pair.model_trace]
        require_densities(run, latents, type(self).__name__)
        self._dim_of_rows(run)

    def _dim_of_rows(self, run: Run) -> int:
        assert self._arguments is not None
        num_rows = self._arguments.seen.num_rows
        return dim_of_rows(type(self).__name__, data_plates_of(run), num_rows)

    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        likelihood = terms.sum_of(terms.log_likelihood.values())
        kl = terms.sum_of(terms.kl.values())
        weights = self.likelihood_weight, self.kl_weight, self.expert_weight
        of_likelihood, of_kl, of_experts = (weight.to(bound) for weight in weights)
        experts = self._kl_to_experts(runs, terms)
        return of_kl * kl - of_likelihood * likelihood + of_experts * experts

    def _kl_to_experts(self, runs: list[Run], terms: Terms) -> torch.Tensor:
        """KL(q(z | x) || q(z | x_m)) summed over modalities and data, 0-d."""
        arguments = self._arguments
        assert arguments is not None
        dim = self._dim_of_rows(runs[0])
        total = torch.zeros(())
        for modality, mask in arguments.seen.masks.items():
            of_runs = [_kl_to_expert(run, arguments, modality) for run in runs]
            for name in of_runs[0]:
                kl, term = torch.cat([found[name] for found in of_runs]).mean(0), terms.kl[name]
                if mask is not None and term.local:
                    kl = torch.where(mask.reshape(mask.shape + (1,) * (-dim - 1)), kl, 0.0)
                total = total + terms.total(replace(term, values=kl))
        return total


@dataclass(frozen=True)
class _Arguments:
    """What a guide is called with.

    Attributes:
        guide: The guide.
        batch: Data by modality.
        present: Rows in which they are observed.
        kwargs: Other arguments, ``present`` among them if it was given by name.
        seen: What is observed.
    """

    guide: Callable[..., Any]
    batch: Batch
    present: Present | None
    kwargs: dict[str, Any]
    seen: Observed

    @staticmethod
    def of(guide: Callable[..., Any], args: Any, kwargs: Any) -> "_Arguments":
        """Reads the arguments."""
        batch, present = (*args, kwargs.get("present"))[:2] if args else (None, None)
        seen = observed_of("TraceExpertKL_ELBO", None, batch, present)
        return _Arguments(guide, batch, present, dict(kwargs), seen)

    def alone(self, modality: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same of one modality: arguments and keyword arguments."""
        batch, *present = restricted(self.batch, self.present, [modality])
        if "present" in self.kwargs and present:
            return (batch,), {**self.kwargs, "present": present[0]}
        return (batch, *present), self.kwargs


def _kl_to_expert(run: Run, arguments: _Arguments, modality: str) -> dict[str, torch.Tensor]:
    """The KL of each latent to the guide given one modality, ``(num, *plates)`` by site."""
    guide = arguments.guide
    if run.num_particles > 1:
        guide = pyro.plate(PARTICLES, run.num_particles, dim=-1 - run.nesting)(guide)
    of_joint = sites_of(run.guide_trace, is_latent)
    values = {name: site["value"] for name, site in of_joint.items()}
    args, kwargs = arguments.alone(modality)
    trace = poutine.trace(replay_values(guide, values)).get_trace(*args, **kwargs)
    of_expert = sites_of(trace, is_latent)
    common = [name for name in of_joint if name in of_expert]
    # Given its parents, a latent has a closed form; these come first on both sides.
    parents_first = common == [name for name in of_expert if name in of_joint]
    found = {}
    for name in common:
        site: Site = of_joint[name]
        kl = closed_form_kl(site["fn"], of_expert[name]["fn"]) if parents_first else None
        if kl is None:
            kl = site_log_prob(site) - site_log_prob(of_expert[name])
        found[name] = run.spread(masked(kl, site["mask"]), site)
    return found
