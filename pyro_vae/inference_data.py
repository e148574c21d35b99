"""Export of a model/guide pair on one batch to ArviZ."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pyro.distributions import MaskedDistribution, Unit
from torch.distributions import Independent

from pyro_vae.checks import check_at_least, refuse_subsampling
from pyro_vae.evaluation.draws import Draws
from pyro_vae.isolation import without_side_effects
from pyro_vae.pairs import Pair, data_plates, trace_pair
from pyro_vae.traces import DataPlates, Site, frames, is_random, sites_of

__all__ = ["to_inference_data"]

_WHERE = "to_inference_data"
_CHUNK_BYTES = 2**26
# ArviZ's own dimensions; "sample" is what it calls chain and draw stacked.
_RESERVED = ("chain", "draw", "sample", "__sample__")

Array = np.ndarray[Any, Any]


def to_inference_data(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draws from a model and its guide on one batch, as an object for ArviZ.

    The posterior is the guide's, so its draws are as good as the guide. The groups are

    - ``posterior``: the model's latents, drawn from the guide. Discrete latents that the guide
      leaves out are drawn from their exact conditional given the data and the other latents.
    - ``prior``: the latents, drawn from the model.
    - ``posterior_predictive``, ``prior_predictive``: the observed sites, all of them drawn anew.
    - ``log_likelihood``: :math:`\log p(x_i \mid z_i)` of every datum i, draw and observed site
      in nats, all latents in ``posterior`` given. Masks are kept, scales (beta) are ignored.
      ``pyro.factor`` sites are here but in no predictive group. With latents of its own each
      datum is predicted from a code that saw it, so ``arviz.loo`` corrects for that by importance
      sampling and warns, by its Pareto-k, where it cannot.
    - ``observed_data``: the observed values, NaN where a mask says "not observed".

    Dimensions are ``chain`` (of size 1) and ``draw``, the data plate, any other plates of the
    site by their names in the model, then the dimensions of one datum, ``<site>_dim_0`` and so
    on. A "/" in a name, which ArviZ keeps for groups, becomes ".".

    Evaluation only: modules run in eval mode, no gradient is kept, parameters are not touched.
    The draws are made in chunks, but all that the groups hold is in memory at the end:
    ``num_samples`` times the batch, four times over.

    Args:
        model: Any callable with Pyro statements whose sites share a plate over the data.
        guide: A callable with the same signature.
        *args: One batch, as for ``svi.step``.
        num_samples: Draws per group.
        chunk_size: Draws made at a time, by default as many as fit 64 MiB; changes which
            random numbers are used.
        **kwargs: Keyword arguments of model and guide.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: If ``num_samples`` or ``chunk_size`` is below 1; the data are empty, not
            finite or outside the likelihood's support; the model observes nothing; a site lies
            outside the data plate; guide and model have different latents; a site or plate has
            the name of another dimension; a site cannot be sampled; a log-likelihood is NaN.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the exact posterior
        >>> data = to_inference_data(model, guide, torch.zeros(3), num_samples=100)
        >>> dict(data.posterior["z"].sizes)
        {'chain': 1, 'draw': 100, 'data': 3}
    """
    check_at_least(_WHERE, "num_samples", num_samples, 1)
    if chunk_size is not None:
        check_at_least(_WHERE, "chunk_size", chunk_size, 1)
    with without_side_effects(model, guide):
        with refuse_subsampling(_WHERE):
            pair = trace_pair(model, guide, args, kwargs, _WHERE)
        plates = data_plates(pair, _WHERE)
        layout = _Layout(pair, plates)
        draws = Draws(pair, plates, _WHERE)
        chunk_size = chunk_size or draws.chunk_size_within(_CHUNK_BYTES)
        chunks = list(_chunks(draws, num_samples, chunk_size, layout))
        observed = {
            layout.variable[name]: layout.observed(name, site)
            for name, site in draws.predicted.items()
        }
    groups = {
        group: {
            layout.variable[name]: np.concatenate([chunk[group][name] for chunk in chunks])[None]
            for name in chunks[0][group]
        }
        for group in chunks[0]
    }
    return _from_dict({**groups, "observed_data": observed}, layout)


def _chunks(
    draws: Draws, num_samples: int, chunk_size: int, layout: "_Layout"
) -> Iterator[dict[str, dict[str, Array]]]:
    """Yields ``num_samples`` draws in all, by group and site, on the CPU."""
    for start in range(0, num_samples, chunk_size):
        groups = draws.draw(min(chunk_size, num_samples - start))
        log_likelihood = groups.pop("log_likelihood")  # Has the data's dimensions alone.
        arrays = {
            group: {name: layout.array(name, value) for name, value in values.items()}
            for group, values in groups.items()
        }
        yield arrays | {"log_likelihood": {n: v.cpu().numpy() for n, v in log_likelihood.items()}}


class _Layout:
    """Where the dimensions of a site go, and what they are called.

    Attributes:
        variable: ArviZ's name of each site.
        dims: The names of its dimensions, data plates first.
    """

    def __init__(self, pair: Pair, plates: DataPlates) -> None:
        self._nesting = pair.max_plate_nesting
        self.variable: dict[str, str] = {}
        self.dims: dict[str, list[str]] = {}
        self._plates: dict[str, dict[str, tuple[int, int]]] = {}
        for name, site in sites_of(pair.model_trace, is_random).items():
            around: list[Any] = list(frames(site))
            around.sort(key=lambda f: (f.dim not in plates.dims, f.dim))
            self._plates[name] = {_variable(f.name): (f.dim, f.size) for f in around}
            self.variable[name] = _variable(name)
            event = [f"{_variable(name)}_dim_{i}" for i in range(_event_dim(site))]
            self.dims[name] = [*self._plates[name], *event]
        self._check_names()

    def array(self, name: str, value: torch.Tensor) -> Array:
        """Brings values ``(num, *plates, *event)`` into ArviZ's order of dimensions."""
        first_event = 1 + self._nesting
        sizes = [1] * self._nesting
        for dim, size in self._plates[name].values():
            sizes[dim] = size
        value = value.expand(len(value), *sizes, *value.shape[first_event:])
        kept = [0, *(first_event + dim for dim, _ in self._plates[name].values())]
        kept += range(first_event, value.dim())
        absent = [dim for dim in range(value.dim()) if dim not in kept]  # Of size 1.
        shape = [value.shape[dim] for dim in kept]
        return value.permute(*kept, *absent).reshape(shape).cpu().numpy()

    def observed(self, name: str, site: Site) -> Array:
        """The observed value of a site, NaN where it is masked."""
        value = torch.as_tensor(site["value"])
        hidden = _hidden(site, value)
        if hidden.any():
            value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
            value = value.masked_fill(hidden, torch.nan)
        missing = 1 + self._nesting + site["fn"].event_dim - value.dim()
        return self.array(name, value.reshape((1,) * missing + value.shape))[0]

    def _check_names(self) -> None:
        sites = list(self.variable.values())
        plates = {plate for of_site in self._plates.values() for plate in of_site}
        events = [dim for name in self.dims for dim in self.dims[name][len(self._plates[name]) :]]
        taken = [*_RESERVED, *events, *plates, *sites]
        for kind, names in (("site", sites), ("plate", plates)):
            for name in names:
                if taken.count(name) > 1:
                    raise ValueError(
                        f"{_WHERE}: expected sites and dimensions of different names, got {kind} "
                        f"'{name}' and another of that name. Rename the {kind}."
                    )


def _variable(name: str) -> str:
    """A name in a group of ArviZ, where a slash would mean a group inside."""
    return name.replace("/", ".")


def _event_dim(site: Site) -> int:
    """How many dimensions one datum has in a group; a factor has no value there."""
    return 0 if isinstance(site["fn"], Unit) else site["fn"].event_dim


def _hidden(site: Site, value: torch.Tensor) -> torch.Tensor:
    """Where a mask, around the site or inside its distribution, says "not observed"."""
    fn, masks = site["fn"], [(site["mask"], site["fn"].event_dim)]
    while isinstance(fn, Independent | MaskedDistribution):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    hidden = torch.zeros_like(value, dtype=torch.bool)
    for mask, event_dim in masks:
        if mask is not None:
            mask = torch.as_tensor(mask, device=value.device)
            hidden = hidden | ~mask.reshape(mask.shape + (1,) * event_dim)
    return hidden


def _from_dict(groups: dict[str, dict[str, Array]], layout: _Layout) -> Any:
    import arviz  # Takes seconds.

    dims = {layout.variable[name]: names for name, names in layout.dims.items()}
    # A group without variables, such as the predictive ones of a factor, is left out.
    groups = {group: arrays for group, arrays in groups.items() if arrays}
    from_dict: Any = arviz.from_dict
    if int(arviz.__version__.split(".")[0]) >= 1:
        return from_dict(groups, dims=dims)
    return from_dict(**groups, dims=dims)
