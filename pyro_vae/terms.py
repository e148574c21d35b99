"""The ELBO site by site: expected log-likelihoods, and KLs in closed form where there is one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from pyro_vae.densities import closed_form_kl, elementwise
from pyro_vae.pairs import Pair
from pyro_vae.runs import Run
from pyro_vae.scales import Scale, Scales, same_scale
from pyro_vae.traces import (
    Plate,
    Site,
    is_latent,
    is_observed,
    is_point_mass,
    is_random,
    mask_of,
    masked,
    plates_over_data,
    site_log_prob,
    sites_of,
)

__all__ = [
    "Term",
    "Terms",
    "kl_per_dimension",
    "require_terms",
    "terms_of",
]


@dataclass(frozen=True)
class Term:
    """One site's share of the ELBO.

    Attributes:
        values: Mean over the particles, nats, ``(*plates, *event)``: masked, not scaled. There
            are event dimensions only where asked for.
        scale: The site's own scale, beside the weight of the data.
        local: Whether the site lies inside the plates over the data.
        present: Where masks let values through, ``(*plates)``, or ``None`` for everywhere.
        within: The part of ``scale`` that comes from subsampled plates within a datum.
        closed_form: Whether the values are a KL in closed form.
    """

    values: torch.Tensor
    scale: Scale
    local: bool
    present: torch.Tensor | None
    within: float = 1.0
    closed_form: bool = False


@dataclass(frozen=True)
class Terms:
    """The ELBO of some runs, site by site.

    Attributes:
        log_likelihood: The observed sites' terms.
        kl: The latents' terms; auxiliary sites and factors of the guide are among them.
        scales: The weights of data and sites.
    """

    log_likelihood: dict[str, Term]
    kl: dict[str, Term]
    scales: Scales

    def per_datum(self, term: Term) -> torch.Tensor:
        """A term with the scale of its site, ``(*plates)`` with a 1 for all but the data's."""
        return self.sum_others(term.values * term.scale, term)

    def sum_others(self, values: torch.Tensor, term: Term, leading: int = 0) -> torch.Tensor:
        """Sums every plate of a term but the data's; those and ``leading`` dimensions stay."""
        others = self._others(term, values.dim() - leading)
        return values.sum(others, keepdim=True) if others else values

    def _others(self, term: Term, num_plates: int) -> list[int]:
        """The plates that are not the data's; for a term that all data share, all of them.

        Plates that follow one another share a dimension.
        """
        kept = self.scales.dims if term.local else frozenset[int]()
        return [dim for dim in range(-num_plates, 0) if dim not in kept]

    def presence(self, term: Term) -> torch.Tensor:
        """1 for each datum of which the masks leave something, else 0: ``(*plates)``."""
        present = torch.ones_like(term.values) if term.present is None else term.present
        return (self.sum_others(present.to(term.values), term) > 0).to(term.values)

    def weights(self, term: Term) -> torch.Tensor:
        """The scale of a term's site for each datum, 0 where it is masked out: ``(*plates)``.

        The scale of a latent's site multiplies its KL of each datum; the weight of the datum,
        and subsampled plates within it, are not counted. Where a scale varies within a datum it
        is the largest.
        """
        present = torch.ones_like(term.values) if term.present is None else term.present
        scale = present.to(term.values) * term.scale / term.within
        others = self._others(term, scale.dim())
        return scale.amax(others, keepdim=True) if others else scale

    def sum_data(self, values: torch.Tensor, term: Term, leading: int = 0) -> torch.Tensor:
        """Sums over the data with their weights, or over what they share if the term is not local.

        Args:
            values: ``(*leading, *plates)`` with a 1 for all plates but the data's.
            term: Whose values these are.
            leading: How many first dimensions stay.
        """
        if term.local:
            values = values * self.scales.of_data
        return values.sum(list(range(leading, values.dim()))) if values.dim() > leading else values

    def total(self, term: Term) -> torch.Tensor:
        """A term summed over all data, 0-d, as it stands in the ELBO."""
        return self.sum_data(self.per_datum(term), term)

    def sum_of(self, terms: Iterable[Term]) -> torch.Tensor:
        """Several terms, each summed over all data, 0-d."""
        return sum(map(self.total, terms), start=torch.zeros(()))

    def num_data(self, like: torch.Tensor) -> torch.Tensor:
        """How many data the terms stand for, 0-d: the sum of their weights.

        Data that masks hide at every site are none.
        """
        local = [t for t in (*self.log_likelihood.values(), *self.kl.values()) if t.local]
        return self.scales.total(reduce(torch.maximum, map(self.presence, local))).to(like)

    @property
    def negative_elbo(self) -> torch.Tensor:
        """The negative ELBO, 0-d, nats."""
        return self.sum_of(self.kl.values()) - self.sum_of(self.log_likelihood.values())


def terms_of(runs: Sequence[Run]) -> Terms:
    """Collects the terms of the ELBO from runs of a model and its guide.

    A KL is in closed form where Pyro or torch has one and where that is right: where all
    latents that precede a site in the model precede it in the guide as well, so that its
    parents are given. Elsewhere it is log q - log p of the particles.
    """
    first = runs[0]
    scales = Scales(first, data_plates_of(first))
    observed = sites_of(first.model_trace, is_observed)
    latent = sites_of(first.model_trace, is_latent)
    of_guide = sites_of(first.guide_trace, is_random)
    log_likelihood = {
        name: _term([_log_prob(run, "model", name) for run in runs], first, scales, site)
        for name, site in observed.items()
    }
    closed = [_closed_forms(run) for run in runs]
    kl = {
        name: _term(
            [_kl(run, name, by_site) for run, by_site in zip(runs, closed, strict=True)],
            first,
            scales,
            site,
            closed_form=name in closed[0],
        )
        for name, site in (of_guide | latent).items()
    }
    return Terms(log_likelihood, kl, scales)


def require_terms(pair: Pair, where: str) -> Terms:
    """The terms of a first execution, for objectives that need each per datum.

    Args:
        pair: An execution of model and guide.
        where: The objective, for the message.

    Raises:
        ValueError: If no plate is over the data, or if a latent's scale differs in the guide.
    """
    run = Run.of(pair)
    if not data_plates_of(run):
        sites = sites_of(run.model_trace, is_random)
        around = {n: [p.name for p in sorted(run.plates(s))] for n, s in sites.items()}
        raise ValueError(
            f"{where}: expected one vectorised plate over the data, around every observed site "
            f"and every latent of a single datum, got these plates by site: {around}. Without "
            "it nothing is per datum; write `with pyro.plate('data', len(x)):` around them."
        )
    for name, site in sites_of(run.guide_trace, is_latent).items():
        of_model: Site = run.model_trace.nodes.get(name, site)
        if not same_scale(site["scale"], of_model["scale"]):
            raise ValueError(
                f"{where}: expected the same scale on latent site '{name}' in model and guide, "
                "got different ones. Wrap both programs in scale_kl or poutine.scale, and give "
                "their plates the same size and subsample."
            )
    return terms_of([run])


def data_plates_of(run: Run) -> frozenset[Plate]:
    """The plates over the data, see :func:`pyro_vae.traces.plates_over_data`."""
    random, observed = (sites_of(run.model_trace, kind) for kind in (is_random, is_observed))
    return plates_over_data(map(run.plates, random.values()), map(run.plates, observed.values()))


def _term(
    values_of_runs: list[torch.Tensor],
    first: Run,
    scales: Scales,
    site: Site,
    *,
    closed_form: bool = False,
) -> Term:
    values = torch.cat(values_of_runs)
    mask = None if mask_of(site) is None else first.present(site)
    local = any(map(scales.is_data, first.plates(site))) or not scales.dims
    return Term(values.mean(0), scales.of_site(site), local, mask, scales.within(site), closed_form)


def _log_prob(run: Run, role: str, name: str) -> torch.Tensor:
    site = (run.model_trace if role == "model" else run.guide_trace).nodes[name]
    return run.spread(site_log_prob(site), site)


def _closed_forms(run: Run) -> dict[str, torch.Tensor]:
    """The KLs that have a closed form, where that is right: ``(num, *plates)`` by site."""
    found = {}
    for name in _given_by_parents(run):
        of_guide: Site = run.guide_trace.nodes[name]
        of_model: Site = run.model_trace.nodes[name]
        kl = closed_form_kl(of_guide["fn"], of_model["fn"])
        if kl is not None:
            found[name] = run.spread(masked(kl, of_guide["mask"]), of_guide)
    return found


def _kl(run: Run, name: str, closed: dict[str, torch.Tensor]) -> torch.Tensor:
    """log q - log p of one site, or its expectation: ``(num, *plates)``."""
    if name in closed:
        return closed[name]
    of_model: Site = run.model_trace.nodes.get(name)
    if of_model is None or not is_latent(of_model):
        return _log_prob(run, "guide", name)
    return _log_prob(run, "guide", name) - _log_prob(run, "model", name)


def _given_by_parents(run: Run) -> set[str]:
    """Latents whose parents in the model cannot depend on them in the guide."""
    in_guide = list(sites_of(run.guide_trace, is_latent))
    result, before = set(), set[str]()
    for name in sites_of(run.model_trace, is_latent):
        if name in in_guide and before <= set(in_guide[: in_guide.index(name)]):
            result.add(name)
        before.add(name)
    return result


def kl_per_dimension(runs: Sequence[Run], name: str) -> torch.Tensor | None:
    """The KL of every element of one latent, nats, mean over particles: ``(*plates, *event)``.

    Args:
        runs: Runs of a model and its guide.
        name: The latent.

    Returns:
        The masked KL, without scales, or ``None`` where the distribution of guide or model does
        not factorise over the elements of its event.
    """
    closed = name in _given_by_parents(runs[0])
    values = []
    for run in runs:
        of_guide: Site = run.guide_trace.nodes[name]
        of_model: Site = run.model_trace.nodes[name]
        q, p = elementwise(of_guide["fn"]), elementwise(of_model["fn"])
        if q is None or p is None or is_point_mass(q):
            return None
        kl = closed_form_kl(q, p) if closed else None
        if kl is None:
            kl = q.log_prob(of_guide["value"]) - p.log_prob(of_model["value"])
        event_dim, mask = of_guide["fn"].event_dim, of_guide["mask"]
        if isinstance(mask, torch.Tensor):
            mask = mask.reshape(mask.shape + (1,) * event_dim)
        values.append(run.spread(masked(kl, mask), of_guide, event_dim))
    return torch.cat(values).mean(0)
