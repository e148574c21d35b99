"""Guide and model run for training: on one particle, or on a plate of them."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import nn
from torch.distributions import TransformedDistribution
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten

from pyro_vae.isolation import same_random_numbers_again, without_side_effects
from pyro_vae.links import Links
from pyro_vae.pairs import Pair, common_plates, trace_pair
from pyro_vae.strata import Strata
from pyro_vae.traces import (
    DataPlates,
    Plate,
    Site,
    frames,
    is_latent,
    is_random,
    layers,
    mask_of,
    sites_of,
    subsampling,
    without_hidden,
)
from pyro_vae.vectorised import PARTICLES, NotFixedError, VectorisedProgram

__all__ = ["Run", "Runner"]


@dataclass(frozen=True)
class Run:
    """One execution of guide and model.

    Attributes:
        guide_trace: Trace of the guide, without the sites of subsampling.
        model_trace: Trace of the model, replayed on the guide's values.
        num_particles: How many particles it holds.
        nesting: How many dimensions the plates take, particles not counted.
        model: The model, bound to its arguments.
        guide: The guide, bound to its arguments.
        links: The joints between guide and model, where asked for.
    """

    guide_trace: poutine.Trace
    model_trace: poutine.Trace
    num_particles: int
    nesting: int
    model: Callable[[], Any]
    guide: Callable[[], Any]
    links: Links | None = None

    @staticmethod
    def of(pair: Pair) -> "Run":
        """The first execution of a pair, of one particle."""
        traces = pair.guide_trace, pair.model_trace
        return Run(*traces, 1, pair.max_plate_nesting, pair.model, pair.guide)

    def plates(self, site: Site) -> frozenset[Plate]:
        """The plates around a site, that of the particles not counted."""
        return frozenset(f for f in frames(site) if f.name != PARTICLES)

    def spread(self, values: torch.Tensor, site: Site, event_dim: int = 0) -> torch.Tensor:
        """``values`` with every dimension spelled out: ``(num, *plates, *event)``.

        Raises:
            ValueError: If they have a batch dimension that is no plate.
        """
        shape = [self.num_particles, *(1,) * self.nesting]
        for plate in self.plates(site):
            shape[plate.dim] = plate.size
        event_shape = values.shape[values.dim() - event_dim :]
        batch_shape = values.shape[: values.dim() - event_dim]
        try:
            return values.expand(*shape, *event_shape)
        except RuntimeError as err:
            raise ValueError(
                f"{site['name']}: expected a site of batch shape {tuple(shape[1:])}, its plates, "
                f"got {tuple(batch_shape)}. Was `.to_event(1)` forgotten?"
            ) from err

    def present(self, site: Site) -> torch.Tensor:
        """Where the masks of a site let values through: bool, ``(*plates)``."""
        mask = mask_of(site)
        if mask is None:
            mask = torch.ones((), dtype=torch.bool, device=site["value"].device)
        return self.spread(mask, site).any(0)


@dataclass(frozen=True)
class _Plan:
    """How to run programs on arguments of one form.

    Attributes:
        nesting: How many dimensions the plates of both programs take.
        vectorize: Whether particles run at once.
        data_dims: Dimensions of the plates around all random sites of both programs.
        structures: Of the traces for which this is known to be right.
    """

    nesting: int
    vectorize: bool
    data_dims: tuple[int, ...]
    structures: set[frozenset[Any]]

    def fits(self, other: "_Plan") -> bool:
        """Whether both run the programs in the same way."""
        first, second = ((plan.nesting, plan.vectorize, plan.data_dims) for plan in (self, other))
        return first == second


class Runner:
    """Runs a pair of programs on particles, and knows what it learnt of them the first time.

    Args:
        model: The model.
        guide: The guide.
        args: Arguments of both, for the first look.
        kwargs: Keyword arguments.
        num_particles: How many.
        vectorize: Whether at once in a plate; ``None`` for wherever that gives the same numbers.
        where: Who asks, for the messages.
        check: Called with the first execution, to raise where it does not suit.

    Raises:
        ValueError: If the programs do not belong together or do not fit the data.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Any,
        kwargs: Any,
        *,
        num_particles: int,
        vectorize: bool | None,
        where: str,
        check: Callable[[Pair], None],
    ) -> None:
        self.model, self.guide = model, guide
        self._num_particles, self._where = num_particles, where
        self._wanted, self._check = vectorize, check
        self._plans: dict[Any, _Plan] = {}
        self._look(args, kwargs)

    def _look(self, args: Any, kwargs: Any) -> "_Plan":
        """Checks the programs on these arguments, without effect on anything."""
        # Blocked, because SVI watches which parameters a step uses.
        with (
            poutine.block(),
            same_random_numbers_again(),
            without_side_effects(self.model, self.guide),
        ):
            pair = trace_pair(self.model, self.guide, args, kwargs, self._where)
            _require_all_in_guide(pair, self._where)
            self._check(pair)
            vectorize = self._wanted
            if vectorize is None:
                vectorize = self._num_particles > 1 and self._broadcast(pair, args, kwargs)
        vectorize = vectorize and self._num_particles > 1
        plan = _Plan(pair.max_plate_nesting, vectorize, _common_plates(pair).dims, set())
        form = _form(args, kwargs)
        known = self._plans.get(form)
        if known is not None and known.fits(plan):
            plan = known
        if len(self._plans) > 100:  # Arguments of ever new forms are not worth a memory.
            self._plans.clear()
        self._plans[form] = plan
        plan.structures.add(_structure(pair.guide_trace, pair.model_trace))
        return plan

    def runs(
        self,
        args: Any,
        kwargs: Any,
        *,
        num_particles: int | None = None,
        linked: bool = False,
        stratified: bool = False,
    ) -> list[Run]:
        """Runs both programs on all particles, or on so many, in one go or one at a time.

        Under ``stratified`` they are spread over the components of a mixture guide.

        A latent may be observed in some batches only, and a plate may come and go. So arguments
        of a new form are looked at first, and programs that turn out otherwise than before are
        looked at afterwards.
        """
        num_particles = num_particles or self._num_particles
        plan = self._plans.get(_form(args, kwargs)) or self._look(args, kwargs)
        how = num_particles, linked, stratified
        try:
            runs = self._runs(args, kwargs, plan, *how)
        except Exception:
            again = self._look(args, kwargs)
            if again.fits(plan):
                raise
            return self._runs(args, kwargs, again, *how)
        if _structure(runs[0].guide_trace, runs[0].model_trace) in plan.structures:
            return runs
        again = self._look(args, kwargs)
        if again.fits(plan):
            return runs
        return self._runs(args, kwargs, again, *how)

    def _runs(
        self,
        args: Any,
        kwargs: Any,
        plan: "_Plan",
        num_particles: int,
        linked: bool,
        stratified: bool,
    ) -> list[Run]:
        at_once = num_particles if plan.vectorize else 1
        rows = poutine.Trace()  # Of subsampled plates: all particles see the same.
        strata = None
        if stratified:
            strata = Strata(num_particles, -1 - plan.nesting, plan.data_dims, training=True)
        runs = []
        for first in range(0, num_particles, at_once):
            if strata is not None:
                strata.first = first
            runs.append(self._run(args, kwargs, at_once, plan.nesting, linked, rows, strata))
        return runs

    def _run(
        self,
        args: Any,
        kwargs: Any,
        num_particles: int,
        nesting: int,
        linked: bool,
        rows: poutine.Trace,
        strata: Strata | None,
    ) -> Run:
        model, guide = self.model, self.guide
        if num_particles > 1:
            model, guide = (
                pyro.plate(PARTICLES, num_particles, dim=-1 - nesting)(program)
                for program in (model, guide)
            )
        links = Links() if linked else None
        with poutine.replay(trace=rows):
            with links or nullcontext(), strata or nullcontext():
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            if not linked:
                _score_flows(guide_trace)
            given = guide_trace.copy()
            for name, value in links.downstream.items() if links else ():
                given.nodes[name] = {**given.nodes[name], "value": value}
            replayed = poutine.replay(model, trace=given)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        model_trace = without_hidden(model_trace, guide_trace.nodes)
        for trace in (guide_trace, model_trace):
            rows.nodes.update(sites_of(trace, site_is_subsample))
        traces = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        self._check_latents(*traces)
        model, guide = (partial(program, *args, **kwargs) for program in (self.model, self.guide))
        return Run(*traces, num_particles, nesting, model, guide, links)

    def _check_latents(self, guide_trace: poutine.Trace, model_trace: poutine.Trace) -> None:
        """A program may sample other latents than it did at the first look."""
        of_guide, of_model = sites_of(guide_trace, is_latent), sites_of(model_trace, is_latent)
        names = {n for n, s in of_guide.items() if not s["infer"].get("is_auxiliary")}
        if odd := names ^ set(of_model):
            raise ValueError(
                f"{self._where}: expected the same latents in model and guide, got site "
                f"'{min(odd)}' in one of them only. Sample it in both, or name it alike."
            )
        for name, site in of_model.items():
            sizes = [subsampling(frames(s)) for s in (site, of_guide[name])]
            if not math.isclose(*sizes):
                raise ValueError(
                    f"{self._where}: expected the plates around site '{name}' to stand for the "
                    f"same number of data in model and guide, got a subsample scaled by "
                    f"{sizes[0]:g} and by {sizes[1]:g}. Give both plates the same size."
                )

    def _broadcast(self, pair: Pair, args: Any, kwargs: Any) -> bool:
        """Whether both programs take a plate of particles and give the numbers of single ones."""
        fixed = pair.guide_trace.copy()
        for trace in (pair.guide_trace, pair.model_trace):
            for name, site in sites_of(trace, site_is_subsample).items():
                fixed.nodes[name] = site
        for name in sites_of(fixed, is_random):
            fixed.remove_node(name)
        plates = _common_plates(pair)

        def program(of: Callable[..., Any], role: str) -> VectorisedProgram:
            def bound() -> Any:
                return poutine.replay(of, trace=fixed)(*args, **kwargs)

            return VectorisedProgram(
                bound, role, plates, pair.max_plate_nesting, self._where, pair.latent_shapes
            )

        if not pair.guide_sites:
            return False
        guide, model = program(self.guide, "guide"), program(self.model, "model")
        try:
            with _ranks_of_batch_norm() as ranks:
                values, _ = guide.draw(2)
                model.score(values, 2)
        except (KeyError, NotFixedError):  # A flow without an inverse; randomness of no site.
            warnings.warn(
                f"{self._where}: running particles at once cannot be compared with running them "
                "one by one, because a density cannot be computed again at the same latents, so "
                "they run one at a time. Pass vectorize_particles=True if the networks accept "
                "(*sample, batch, *event).",
                stacklevel=2,
            )
            return False
        if not (guide.broadcasts and model.broadcasts):
            return False
        if mixed := [module for module, seen in ranks.items() if len(seen) > 1]:
            warnings.warn(
                f"{self._where}: {mixed[0]} takes rows of the batch for channels where particles "
                "run at once, so they run one at a time: the right numbers, slowly. Wrap its "
                "network in pyro_vae.nets.FlattenLeading.",
                stacklevel=2,
            )
        return not mixed


@contextmanager
def _ranks_of_batch_norm() -> Iterator[dict[nn.Module, set[int]]]:
    """How many dimensions the inputs of every batch norm have inside the block.

    A new one is the identity outside training, so that numbers do not tell a wrong dimension.
    """
    ranks: dict[nn.Module, set[int]] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, _BatchNorm):
            ranks.setdefault(module, set()).update(part.dim() for part in inputs)

    hook = register_module_forward_pre_hook(note)
    try:
        yield ranks
    finally:
        hook.remove()


def _common_plates(pair: Pair) -> DataPlates:
    """The plates around all random sites of both programs."""
    return common_plates(
        map(frames, sites_of(pair.model_trace, is_random).values()),
        map(frames, pair.guide_sites.values()),
    )


def _require_all_in_guide(pair: Pair, where: str) -> None:
    """Raises if the guide leaves out a latent of the model."""
    for name in pair.enumerated:
        raise ValueError(
            f"{where}: expected the guide to sample every latent, got no site '{name}' in the "
            f"guide, and none is summed out here. Sample '{name}' in the guide, or train with "
            "TraceEnum_ELBO."
        )


def _score_flows(guide_trace: poutine.Trace) -> None:
    """Scores samples of flows while their transforms remember them: some have no inverse."""
    for site in sites_of(guide_trace, is_latent).values():
        if any(isinstance(layer, TransformedDistribution) for layer in layers(site["fn"])):
            site["unscaled_log_prob"] = site["fn"].log_prob(site["value"])


def _form(args: Any, kwargs: Any) -> Any:
    """What of the arguments may decide which sites there are: not numbers, nor sizes."""
    leaves, tree = tree_flatten((args, kwargs))
    return str(tree), tuple(
        leaf.dim() if isinstance(leaf, torch.Tensor) else (type(leaf), leaf is None or leaf is True)
        for leaf in leaves
    )


def _structure(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> frozenset[Any]:
    """What the checks of a pair look at: sites, kinds of distributions and plates, not sizes.

    Sites that a loop numbers count as one.
    """
    return frozenset(
        (
            role,
            name.rstrip("0123456789"),
            site["is_observed"],
            type(layers(site["fn"])[-1]),
            getattr(site["fn"], "has_rsample", None),
            frozenset(
                (f.name.rstrip("0123456789"), f.dim) for f in frames(site) if f.name != PARTICLES
            ),
        )
        for role, trace in (("guide", guide_trace), ("model", model_trace))
        for name, site in sites_of(trace, is_random).items()
    )
