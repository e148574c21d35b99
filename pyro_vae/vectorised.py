"""A Pyro program run over many particles: all at once where it broadcasts, else one by one."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from torch.distributions import TransformedDistribution, constraints

from pyro_vae.checks import support_of
from pyro_vae.elimination import ExactLogRing, with_dims
from pyro_vae.handlers import replay_values
from pyro_vae.strata import Strata
from pyro_vae.traces import (
    DataPlates,
    Site,
    frames,
    is_latent,
    is_point_mass,
    is_random,
    layers,
    site_log_prob,
    sites_of,
)

__all__ = ["PARTICLES", "NotFixedError", "Values", "VectorisedProgram", "check_support"]

Values = dict[str, torch.Tensor]
"""Latent values by site, ``(num, *plates, *event)`` with every plate dimension spelled out."""

PARTICLES = "_pyro_vae_particles"
"""Name of the plate over particles."""


class VectorisedProgram:
    """A model or guide, bound to its arguments, under a plate over particles.

    The first scores are compared with those of single particles: a network may take the
    particle dimension without complaint and still mix it up with another one.

    Args:
        program: The program without arguments.
        role: "model" or "guide", for the messages.
        plates: The data plates.
        nesting: How many dimensions the plates of model and guide take.
        where: The function that asks, for the messages.
        shapes: What shape each latent has for a single particle.
        enumerated: Names of discrete latents to sum out.
    """

    def __init__(
        self,
        program: Callable[[], Any],
        role: str,
        plates: DataPlates,
        nesting: int,
        where: str,
        shapes: Mapping[str, torch.Size],
        enumerated: tuple[str, ...] = (),
    ) -> None:
        def configure(site: Any) -> Any:
            how = "parallel" if site["name"] in enumerated else None
            return {"enumerate": how, "num_samples": None, "expand": False}

        self._program = program
        self._enumerating = poutine.infer_config(program, configure)
        self._role = role
        self._plates = plates
        self._nesting = nesting
        self._where = where
        self._shapes = shapes
        self._enumerated = enumerated
        self._broadcasts: bool | None = None
        self._eps = 0.0  # Rounding of the coarsest dtype among the log-densities.

    @property
    def broadcasts(self) -> bool | None:
        """Whether it takes all particles at once; ``None`` before that is known."""
        return self._broadcasts

    def draw(
        self, num: int, given: Values | None = None, *, strata: Strata | None = None
    ) -> tuple[Values, torch.Tensor]:
        """Samples ``num`` particles: their values and log-densities ``(num, *data)``, nats.

        Latents in ``given`` keep their values there. Under ``strata`` particles are spread over
        the components of a mixture.
        """
        if self._broadcasts is not False:
            try:
                with strata or nullcontext():
                    trace = self._trace_all(num, given)
                sites = sites_of(trace, is_latent)
                values = {name: site["value"] for name, site in sites.items()}
                # A transformed site (a Delta) follows from the others, up to rounding.
                random = {n: v for n, v in values.items() if not is_point_mass(sites[n]["fn"])}
                log_density = self._log_density(trace, (num,))
            except Exception as err:
                self._fall_back(err)
            else:
                if self._broadcasts or self._agrees(random, log_density):
                    return values, log_density
        draws = []
        for k in range(num):
            if strata is not None:
                strata.first = k
            with strata or nullcontext():
                draws.append(self._draw_one(given, k))
        values = {name: torch.stack([v[name] for v, _ in draws]) for name in draws[0][0]}
        return values, torch.stack([log_density for _, log_density in draws])

    def draw_enumerated(self, values: Values, num: int) -> Values:
        """Samples the enumerated latents given the data and ``values``, exactly."""
        if self._broadcasts is None:
            self.score(values, num)  # Compares all at once with one by one.
        if self._broadcasts:
            plate = pyro.plate(PARTICLES, num, dim=-1 - self._nesting)
            return self._infer_discrete(values, plate)
        draws = [self._infer_discrete(self._particle(values, k)) for k in range(num)]
        return {name: torch.cat([v[name] for v in draws]) for name in self._enumerated}

    def score(self, values: Values, num: int) -> torch.Tensor:
        """Log-density of the program at ``values``: nats, ``(num, *data)``, float64."""
        if self._broadcasts is not False:
            try:
                log_density = self._log_density(self._trace_all(num, values), (num,))
            except Exception as err:
                if self._broadcasts:
                    raise
                self._fall_back(err)
            else:
                if self._broadcasts or self._agrees(values, log_density):
                    return log_density
        return torch.stack([self.score_one(values, k) for k in range(num)])

    def score_one(self, values: Values, k: int) -> torch.Tensor:
        """Log-density of particle ``k`` of ``values``: nats, shape of the data."""
        return self._log_density(self.trace_one(values, k), ())

    def trace_one(self, values: Values, k: int) -> poutine.Trace:
        """Runs the program as its author wrote it, at particle ``k`` of ``values``."""
        return self._trace(self._particle(values, k))

    def _particle(self, values: Values, k: int) -> Values:
        """Particle ``k`` in the shapes that the program itself would draw."""
        return {
            name: value[k].reshape(self._shapes.get(name, value[k].shape))
            for name, value in values.items()
        }

    def _trace_all(self, num: int, values: Values | None = None) -> poutine.Trace:
        with pyro.plate(PARTICLES, num, dim=-1 - self._nesting):
            return self._trace(values)

    def _trace(self, values: Values | None) -> poutine.Trace:
        program = self._program
        if self._enumerated:
            program = poutine.enum(self._enumerating, first_available_dim=-2 - self._nesting)
        if values is not None:  # Outside: enum has to see that a replayed site depends on its own.
            program = replay_values(program, values)
        with pyro.validation_enabled(False):
            return poutine.trace(program).get_trace()

    def _draw_one(self, given: Values | None, k: int) -> tuple[Values, torch.Tensor]:
        trace = self._trace(self._particle(given, k) if given else None)
        values = {}
        for name, site in sites_of(trace, is_latent).items():
            value = site["value"]
            missing = self._nesting + site["fn"].event_dim - value.dim()
            values[name] = value.reshape((1,) * missing + value.shape)
        return values, self._log_density(trace, ())

    def _infer_discrete(self, values: Values, particles: Any = None) -> Values:
        """Samples the enumerated latents: ``(num or 1, *plates, *event)``."""
        # Not replay: that would hide from enum that a given site depends on an enumerated one.
        conditioned = poutine.condition(self._enumerating, data=values)

        def program() -> None:
            with particles or nullcontext():
                conditioned()

        sampled = infer_discrete(program, first_available_dim=-2 - self._nesting)
        with pyro.validation_enabled(False):
            trace = poutine.trace(sampled).get_trace()
        drawn = {}
        for name in self._enumerated:
            site = trace.nodes[name]
            value, event_dim = site["value"], site["fn"].event_dim
            missing = 1 + self._nesting + event_dim - value.dim()
            value = value.reshape((1,) * missing + value.shape)
            drawn[name] = value.expand(particles.size if particles else 1, *value.shape[1:])
        return drawn

    def _log_density(self, trace: poutine.Trace, particles: tuple[int, ...]) -> torch.Tensor:
        if self._role == "model":
            for site in sites_of(trace, is_latent).values():
                check_support(self._where, site)
        if self._enumerated:
            return self._marginal_log_density(trace, particles)
        total: torch.Tensor | float = 0.0
        for site in sites_of(trace, is_random).values():
            # A replayed site is not expanded by the plates around it.
            shape = [*particles, *(1,) * self._nesting]
            for frame in frames(site):
                shape[frame.dim] = frame.size
            log_prob = site_log_prob(site)
            self._note_rounding(log_prob)
            log_prob = log_prob.expand(torch.broadcast_shapes(log_prob.shape, shape))
            total = total + self._plates.sum_others(log_prob, leading=len(particles))
        return torch.as_tensor(total)

    def _marginal_log_density(
        self, trace: poutine.Trace, particles: tuple[int, ...]
    ) -> torch.Tensor:
        """Sums the enumerated latents out, by tensor variable elimination within the plates."""
        trace.compute_log_prob()
        trace.pack_tensors()
        sizes: dict[str, int] = {}
        factors: OrderedDict[frozenset[str], list[torch.Tensor]] = OrderedDict()
        for site in sites_of(trace, is_random).values():
            around = {trace.plate_to_symbol[f.name]: f.size for f in frames(site)}
            sizes.update(around)
            self._note_rounding(site["unscaled_log_prob"])
            factor = packed.scale_and_mask(
                site["packed"]["unscaled_log_prob"], mask=site["packed"]["mask"]
            )
            wide = with_dims(factor.to(torch.float64), factor._pyro_dims)
            factors.setdefault(frozenset(around), []).append(wide)
        keep = [*self._plates.names, *([PARTICLES] if particles else [])]
        symbols = [
            site["infer"].get("_enumerate_symbol") for site in sites_of(trace, is_random).values()
        ]
        total = contract_to_tensor(
            factors,
            {symbol for symbol in symbols if symbol},
            target_ordinal=frozenset(trace.plate_to_symbol[name] for name in keep),
            ring=ExactLogRing(dim_to_size=sizes),
        )
        total = packed.unpack(total, trace.symbol_to_dim)
        total = self._plates.sum_others(total, leading=len(particles))
        return total.reshape([*particles, *self._plates.sizes])

    def _agrees(self, values: Values, log_density: torch.Tensor) -> bool:
        """Compares the first and last particle with the program run on each alone."""
        for k in {0, len(log_density) - 1}:
            alone = self.score_one(values, k)
            if not self._close(log_density[k], alone):
                if not self._close(self.score_one(values, k), alone):
                    raise NotFixedError(
                        f"{self._where}: expected a {self._role} whose log-density is fixed by "
                        "its latent values, got two values for the same latents. Put its "
                        "randomness into pyro.sample sites."
                    )
                self._fall_back(None)
                return False
        self._broadcasts = True
        return True

    def _note_rounding(self, log_prob: torch.Tensor) -> None:
        if log_prob.is_floating_point():  # A factor may be an integer.
            self._eps = max(self._eps, torch.finfo(log_prob.dtype).eps)

    def _close(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        """Equal up to rounding."""
        tolerance = self._eps**0.5
        return torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)

    def _fall_back(self, err: Exception | None) -> None:
        if isinstance(err, OutsideSupportError):
            raise err
        self._broadcasts = False
        reason = str(err).splitlines()[0] if str(err or "") else ""
        what = f"raised {type(err).__name__}: {reason}" if err else "gave other log-densities"
        warnings.warn(
            f"{self._where}: the {self._role} does not broadcast over particles (with a leading "
            f"particle dimension it {what}), so particles run one at a time: the same numbers, "
            "slowly. Let its networks accept (*sample, batch, *event), for instance with "
            "pyro_vae.nets.FlattenLeading.",
            stacklevel=2,
        )


class OutsideSupportError(ValueError):
    """A guide's value where the model has no density."""


class NotFixedError(ValueError):
    """A program has two densities at the same latents."""


def _is_unbounded(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (None, constraints.real)


def check_support(where: str, site: Site) -> None:
    """Raises if the guide's value at a latent of the model has no density there.

    Where validation is off, torch returns finite densities outside the support.
    """
    fn, value = site["fn"], site["value"]
    support = support_of(fn)
    if _is_unbounded(support):
        # Torch says where the transforms end, whatever they start from: a shifted Exponential is
        # real to it.
        for layer in () if _is_unbounded(support_of(layers(fn)[-1])) else layers(fn):
            if isinstance(layer, TransformedDistribution):
                for transform in reversed(layer.transforms):
                    value = transform.inv(value)
                support = support_of(layer.base_dist)
    if _is_unbounded(support):
        return
    if not support.check(value).all():
        raise OutsideSupportError(
            f"{where}: expected the guide to sample site '{site['name']}' in the support "
            f"{support} of the model, got values outside it. Use a guide distribution with the "
            "same support."
        )
