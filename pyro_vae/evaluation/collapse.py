"""Posterior collapse: latents whose guide ignores the data and returns the prior."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vae.checks import support_of
from pyro_vae.evaluation.active_units import ActiveUnits, active_units
from pyro_vae.evaluation.chunked_runs import ChunkedRuns
from pyro_vae.isolation import without_side_effects
from pyro_vae.runs import Run
from pyro_vae.terms import kl_per_dimension, terms_of
from pyro_vae.traces import Site, is_latent, is_point_mass, is_random, sites_of

__all__ = ["LatentUse", "PosteriorCollapse", "posterior_collapse"]


@dataclass(frozen=True)
class LatentUse:
    """How much a model and guide use one latent.

    Attributes:
        kl: Mean over the data of E_q[KL(q(z | x) || p(z))], nats.
        kl_per_dimension: The same for each dimension, nats, of the event shape of the site
            behind the shape of its plates within a datum; ``None`` where guide or prior does not
            factorise.
        share_below: Share of the data whose KL is below epsilon, in 0 ... 1: of each dimension,
            or one number, 0-d, for a site that does not factorise.
        collapsed: Which of them have collapsed, bool, the shape of ``share_below``.
        num_dimensions: How many dimensions a datum has at this site.
        active_units: Dimensions whose mean follows the data; ``None`` for a discrete site and
            for one in further plates.
    """

    kl: float
    kl_per_dimension: torch.Tensor | None
    share_below: torch.Tensor
    collapsed: torch.Tensor
    num_dimensions: int
    active_units: ActiveUnits | None

    @property
    def collapsed_fraction(self) -> float:
        """Fraction of the dimensions that have collapsed."""
        return float(self.collapsed.double().mean())

    @property
    def verdict(self) -> str:
        """In words: ``"in use"``, ``"partly collapsed"`` or ``"collapsed"``.

        A dimension is in use if its KL has not collapsed and, where units are counted, it is
        active. Of a site that does not factorise, the KL is that of all dimensions.
        """
        unused = self.collapsed
        if self.active_units is not None:
            unused = unused | ~self.active_units.active
        if unused.all():
            return "collapsed"
        return "partly collapsed" if unused.any() else "in use"


@dataclass(frozen=True)
class PosteriorCollapse:
    """Which latents have collapsed; printed, a table.

    Attributes:
        sites: The latents by name, in the order of the model.
        epsilon: KL in nats below which a dimension says nothing of a datum.
        delta: Share of the data that may have a larger KL.
        threshold: Variance above which a unit is active.
        num_data: How many data.
    """

    sites: Mapping[str, LatentUse]
    epsilon: float
    delta: float
    threshold: float
    num_data: int

    def __str__(self) -> str:
        rows = [("site", "KL (nats)", "dimensions", "collapsed", "active", "verdict")]
        for name, use in self.sites.items():
            whole = use.kl_per_dimension is None
            collapsed = "-" if whole else str(int(use.collapsed.sum()))
            active = "-" if use.active_units is None else str(use.active_units.count)
            kl, dimensions = f"{use.kl:.3f}", str(use.num_dimensions)
            rows.append((name, kl, dimensions, collapsed, active, use.verdict))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *cells, verdict in rows:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells, verdict]))
        return "\n".join(
            [
                *lines,
                f"collapsed: KL below {self.epsilon:g} nats for at least {1 - self.delta:.6g} of "
                f"the {self.num_data} data",
                f"active: variance of the mean over the data above {self.threshold:g}",
            ]
        )


def posterior_collapse(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    epsilon: float = 0.01,
    delta: float = 0.01,
    threshold: float = 0.01,
    num_particles: int = 100,
    chunk_size: int = 10,
    **kwargs: Any,
) -> PosteriorCollapse:
    r"""Says of every latent whether its posterior has collapsed to the prior.

    Dimension i of a latent has :math:`(\epsilon, \delta)`-collapsed if

    .. math:: P_x[KL(q(z_i \mid x) \,\|\, p(z_i)) < \epsilon] \geq 1 - \delta

    with the probability over the data given. A site whose guide or prior does not factorise over
    its dimensions is judged as a whole. The KLs are those of ``elbo_terms``: where one has no
    closed form, it is the mean of log q - log p over the particles, and near epsilon their noise
    decides. Active units are counted as well, because a unit with a constant q other than the
    prior has a KL, but says nothing of x.

    Evaluation only: modules run in eval mode, no gradient is kept, parameters are not touched,
    scales (beta, subsampling) are ignored. Rows that a mask leaves out are not data. A latent
    that follows from others (a Delta on both sides) is left out.

    Args:
        model: Any callable with Pyro statements whose sites share a plate over the data.
        guide: A callable with the same signature that samples every latent, and nothing else.
        *args: The whole data set, as for ``svi.step``.
        epsilon: KL in nats, > 0.
        delta: Share of the data, 0 <= delta < 1.
        threshold: Variance above which a unit is active, see ``active_units``.
        num_particles: Samples from the guide.
        chunk_size: Particles run at a time. More take more memory; results differ only in the
            random numbers drawn.
        **kwargs: Keyword arguments of model and guide.

    Returns:
        A report of numbers and verdicts by site; ``print`` it for a table.

    Raises:
        TypeError: If ``num_particles`` or ``chunk_size`` is no integer.
        ValueError: If a setting is out of range; the guide has auxiliary sites or factors; all
            rows of a site are masked out; and as ``elbo_terms`` and ``active_units``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 0.0]])  # The model ignores z_2.
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)
        >>> def guide(x):  # So does the exact posterior.
        ...     with pyro.plate("data", len(x)):
        ...         q = dist.Normal(x @ weight / 5, torch.tensor([0.2**0.5, 1.0]))
        ...         pyro.sample("z", q.to_event(1))
        >>> report = posterior_collapse(model, guide, torch.randn(100, 2))
        >>> report.sites["z"].verdict, report.sites["z"].collapsed
        ('partly collapsed', tensor([False,  True]))

    References:
        Lucas et al. (2019), Don't blame the ELBO! A linear VAE perspective on posterior
        collapse, section 4, https://arxiv.org/abs/1911.02469. The defaults are ours.
    """
    where = "posterior_collapse"
    _check_settings(epsilon, delta, where)
    latents: list[_Latent] = []
    with without_side_effects(model, guide):
        runs = ChunkedRuns(model, guide, args, kwargs, num_particles, chunk_size, where)
        for run in runs:
            latents = latents or [_Latent(run, n, runs, where) for n in _names(run, where)]
            for latent in latents:
                latent.add(run)

    def use(latent: _Latent) -> LatentUse:
        units = None
        if latent.has_units:
            settings: dict[str, Any] = {"site": latent.name, "threshold": threshold}
            settings["num_samples"] = max(2, num_particles)
            units = active_units(guide, *args, **settings, **kwargs)
        return latent.use(epsilon, delta, units)

    return PosteriorCollapse(
        sites={latent.name: use(latent) for latent in latents},
        epsilon=epsilon,
        delta=delta,
        threshold=threshold,
        num_data=max((latent.num_data for latent in latents), default=0),
    )


def _check_settings(epsilon: float, delta: float, where: str) -> None:
    if not 0 < epsilon < float("inf"):
        raise ValueError(
            f"{where}: expected a finite epsilon > 0, got {epsilon}. It is a KL in nats; 0.01 is "
            "a start."
        )
    if not 0 <= delta < 1:
        raise ValueError(
            f"{where}: expected 0 <= delta < 1, got {delta}. It is the share of the data that may "
            "have a larger KL; 0.01 is a start."
        )


def _names(run: Run, where: str) -> list[str]:
    """The latents with a density, in the order of the model."""
    in_model = sites_of(run.model_trace, is_latent)
    in_guide = sites_of(run.guide_trace, is_random)
    for name in in_guide:
        if name not in in_model:
            raise ValueError(
                f"{where}: expected a guide of the model's latents {list(in_model)} alone, got "
                f"'{name}', an auxiliary site or a factor, so that no single latent has a KL. "
                "Sample the latents themselves, or look at the sum of all: elbo_terms(...).rate."
            )
    return [name for name in in_model if not is_point_mass(in_guide[name]["fn"])]


class _Latent:
    """The KLs of one latent: a row for each datum, behind it the dimensions if they factorise."""

    def __init__(self, run: Run, name: str, runs: ChunkedRuns, where: str) -> None:
        site: Site = run.guide_trace.nodes[name]
        self.name, self._plates, self._where = name, runs.plates, where
        self._event_shape = site["fn"].event_shape
        self._factorises = kl_per_dimension([run], name) is not None
        mask = run.present(site)
        is_data = self._plates.sum_others(mask).reshape(-1) > 0
        each = mask.reshape(mask.shape + (1,) * len(self._event_shape))
        each = self._rows(each.expand(mask.shape + self._event_shape))
        self._seen = each if self._factorises else is_data
        self.num_data, self.num_dimensions = int(is_data.sum()), each[0].numel()
        if not self.num_data:
            raise ValueError(
                f"{where}: expected at least one row of data at site '{name}', got a mask that "
                f"leaves out all {len(is_data)}. Look at the mask."
            )
        discrete = getattr(support_of(site["fn"]), "is_discrete", False)
        self.has_units = not discrete and len(run.plates(site)) == 1
        self._total, self._num_particles = torch.zeros_like(self._seen, dtype=torch.float64), 0

    def add(self, run: Run) -> None:
        """Adds the particles of a run."""
        per_dimension = kl_per_dimension([run], self.name)
        if per_dimension is None:
            kl = self._plates.sum_others(terms_of([run]).kl[self.name].values).reshape(-1)
        else:
            kl = self._rows(per_dimension.to(torch.float64))
        self._total = self._total + kl * run.num_particles
        self._num_particles += run.num_particles

    def use(self, epsilon: float, delta: float, units: ActiveUnits | None) -> LatentUse:
        """What the KLs say."""
        kl, count = self._total / self._num_particles, self._seen.sum(0)
        if kl.isnan().any():
            raise ValueError(
                f"{self._where}: expected KLs at site '{self.name}', got NaN for "
                f"{int(kl.isnan().sum())} of {kl.numel()}. Look at the parameters and data that "
                "the site depends on."
            )
        below = ((kl < epsilon) & self._seen).sum(0).double()
        # What a mask hides for all data holds nothing.
        share_below = torch.where(count > 0, below / count, 1.0)
        return LatentUse(
            kl=float(kl.sum() / self.num_data),  # It is 0 where a mask leaves nothing.
            kl_per_dimension=kl.sum(0) / count if self._factorises else None,
            share_below=share_below,
            collapsed=share_below >= 1 - delta - 1e-9,  # The share is rounded.
            num_dimensions=self.num_dimensions,
            active_units=units,
        )

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """From ``(*plates, *event)`` to ``(N, *plates within a datum, *event)``."""
        nesting = values.dim() - len(self._event_shape)
        data = [nesting + dim for dim in self._plates.dims]
        values = values.movedim(data, list(range(len(data)))).flatten(0, len(data) - 1)
        within = [n for n in values.shape[1 : values.dim() - len(self._event_shape)] if n > 1]
        return values.reshape(len(values), *within, *self._event_shape)
