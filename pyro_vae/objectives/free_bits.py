"""Free bits: a floor below which the KL is not pushed."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.densities import elementwise
from pyro_vae.objectives.objective import TermsObjective, check_weight
from pyro_vae.pairs import Pair
from pyro_vae.runs import Run
from pyro_vae.schedules import Weight
from pyro_vae.terms import Term, Terms, kl_per_dimension
from pyro_vae.traces import is_latent, is_point_mass, sites_of

__all__ = ["TraceFreeBits_ELBO"]


class TraceFreeBits_ELBO(TermsObjective):
    r"""The ELBO with a floor under the KL of every group of latents.

    .. math::
        E_q[\log p(x \mid z)] - \sum_j \max\left(\lambda, \frac{1}{N} \sum_n KL_{jn}\right)
        \quad \text{per datum}

    A group below the floor costs the same whatever it holds, so that it is not pushed to the
    prior before the decoder has learnt to use it. ``loss`` reports the negative ELBO without
    floors; ``training_loss`` has them.

    The weights of the data (subsampled plates, ``poutine.scale``) weigh the mean, and data that a
    mask hides at a latent have no part in that one's. A site's own scale, the beta of
    ``scale_kl``, multiplies max(lambda, KL). A latent outside the plate over the data is compared
    once, not once per datum. Where a KL has no closed form it is estimated from the particles,
    and the maximum of an estimate is on average above the maximum.

    Args:
        free_bits: lambda, in nats in spite of the paper's word: a number, a 0-d tensor or a
            schedule, for every group of every latent; or a mapping from latent sites to such,
            where those left out have no floor. 0 is the ELBO, even if an estimated KL is
            negative.
        per: The groups: "site" for every latent as a whole, "dimension" for every element of its
            event, an integer for that many groups of consecutive elements.
        over: "batch" for the maximum of the mean KL, as in the paper; "datum" for the mean of
            every datum's maximum.
        num_particles: Samples from the guide; the KL is their mean.
        vectorize_particles: Whether to run the particles at once in an outermost plate; by
            default wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        ValueError: While running, if there is no plate over the data, if the guide is not
            reparameterised, or if a latent with a floor is unknown, a point mass in the guide,
            or cannot be divided into groups.

    Example:
        >>> import torch
        >>> from pyro_vae.guides import ExactLinearGaussian
        >>> from pyro_vae.models import LinearGaussian
        >>> model, x = LinearGaussian(5, 2), torch.randn(7, 5)
        >>> objective = TraceFreeBits_ELBO(100.0)  # More than the latent holds.
        >>> programs = model, ExactLinearGaussian(model)
        >>> bool(objective.training_loss(*programs, x) > objective.loss(*programs, x) + 500)
        True

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow,
        appendix on free bits, https://arxiv.org/abs/1606.04934
    """

    def __init__(
        self,
        free_bits: Weight | Mapping[str, Weight],
        *,
        per: Literal["site", "dimension"] | int = "site",
        over: Literal["batch", "datum"] = "batch",
        num_particles: int = 1,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        where = type(self).__name__
        if isinstance(per, str):
            if per not in ("site", "dimension"):
                raise ValueError(
                    f"{where}: expected per to be 'site', 'dimension' or a number of groups, got "
                    f"{per!r}. 'site' takes every latent as a whole."
                )
        else:
            check_at_least(where, "per", per, 1)
        if over not in ("batch", "datum"):
            raise ValueError(
                f"{where}: expected over to be 'batch' or 'datum', got {over!r}. 'batch' compares "
                "the mean KL of the batch, as the paper does."
            )
        self.per, self.over = per, over
        self.free_bits: torch.Tensor | dict[str, torch.Tensor]
        if isinstance(free_bits, Mapping):
            self.free_bits = {
                site: check_weight(where, f"free_bits['{site}']", value)
                for site, value in free_bits.items()
            }
        else:
            self.free_bits = check_weight(where, "free_bits", free_bits)

    @property
    def _whole(self) -> bool:
        return self.per in ("site", 1)

    def _floor_of(self, name: str) -> torch.Tensor | None:
        return self.free_bits.get(name) if isinstance(self.free_bits, dict) else self.free_bits

    def _check_terms(self, pair: Pair, terms: Terms) -> None:
        where = type(self).__name__
        latents = sites_of(pair.model_trace, is_latent)
        named = self.free_bits if isinstance(self.free_bits, dict) else {}
        if unknown := set(named) - set(latents):
            raise ValueError(
                f"{where}: expected free_bits for latents of the model, {sorted(latents)}, got "
                f"'{min(unknown)}'. Use the names of its sample statements."
            )
        for name, site in latents.items():
            if self._floor_of(name) is not None:
                fn = pair.guide_trace.nodes[name]["fn"]
                if is_point_mass(fn):
                    raise ValueError(
                        f"{where}: expected a density for site '{name}' in the guide, got a point "
                        "mass, whose KL is not its own. Sample it from a distribution, or name "
                        "the other latents: free_bits={'z': 0.5}."
                    )
                self._check_groups(name, site["fn"], fn, where)

    def _check_groups(self, name: str, p: Any, q: Any, where: str) -> None:
        if self._whole:
            return
        for side, fn in (("model", p), ("guide", q)):
            if elementwise(fn) is None:
                raise ValueError(
                    f"{where}: expected independent elements at site '{name}' for "
                    f"per={self.per!r}, got {type(fn).__name__} in the {side}, whose KL is no sum "
                    "over them. Use dist.Normal(loc, scale).to_event(1), or per='site'."
                )
        num = q.event_shape.numel()
        if isinstance(self.per, int) and num % self.per:
            raise ValueError(
                f"{where}: expected site '{name}' to divide into {self.per} equal groups, got "
                f"{num} elements. Choose a divisor, or name the sites: free_bits={{'z': 0.5}}."
            )

    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        latents = sites_of(runs[0].model_trace, is_latent)
        loss = -terms.sum_of(terms.log_likelihood.values())
        for name, term in terms.kl.items():
            floor = self._floor_of(name) if name in latents else None
            if floor is None:
                loss = loss + terms.total(term)
            else:
                loss = loss + self._floored(terms, term, self._groups(runs, name, term), floor)
        return loss

    def _groups(self, runs: list[Run], name: str, term: Term) -> torch.Tensor:
        """The KL of every group of a latent, ``(groups, *plates)``."""
        kl = None if self._whole else kl_per_dimension(runs, name)
        if kl is None:
            return term.values.unsqueeze(0)
        elements = kl.reshape(*term.values.shape, -1)
        if isinstance(self.per, int):
            elements = elements.unflatten(-1, (self.per, -1)).sum(-1)
        return elements.movedim(-1, 0)

    def _floored(
        self, terms: Terms, term: Term, groups: torch.Tensor, free_bits: torch.Tensor
    ) -> torch.Tensor:
        """Sum over groups and data of the larger of KL and floor, 0-d.

        Both are multiplied by the same weights before they are compared: a weight may be 0.
        """
        free_bits = free_bits.to(groups)
        kl = terms.sum_others(groups * term.scale, term, leading=1)
        floor = (free_bits * terms.weights(term)).unsqueeze(0)
        if self.over == "batch":
            kl, floor = (terms.sum_data(values, term, leading=1) for values in (kl, floor))
        # Without a floor the KL itself, also where an estimate is negative.
        larger = torch.where((kl > floor) | (free_bits == 0), kl, floor)
        return larger.sum() if self.over == "batch" else terms.sum_data(larger, term)
