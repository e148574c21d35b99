"""A model and its guide as programs that run on subsets of the modalities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pyro import poutine

from pyro_vae.drawn_sites import moved_by
from pyro_vae.handlers import stop_after
from pyro_vae.isolation import same_random_numbers_again, without_side_effects
from pyro_vae.modalities import Batch, Present
from pyro_vae.objectives.objective import dim_of_rows
from pyro_vae.objectives.subset_choice import MOST_SUBSETS
from pyro_vae.objectives.subset_runs import (
    Arguments,
    Given,
    Replaced,
    SubsetRun,
    hiding,
    restricted,
    weighted,
)
from pyro_vae.pairs import Pair, trace_pair
from pyro_vae.runs import Run
from pyro_vae.scales import same_scale
from pyro_vae.terms import data_plates_of
from pyro_vae.traces import (
    Plate,
    frames,
    is_latent,
    is_observed,
    is_random,
    sites_of,
    subsampling,
)

__all__ = ["Layout", "SubsetPrograms"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Layout:
    """How the programs are laid out on batches that hold certain modalities.

    Attributes:
        plates: The plates over the data.
        num_rows: Number of rows of the batch that was looked at.
        around: Dimensions of the plates around each random site.
        one_scale: Whether all observed sites have the same scale, plates not counted.
        private: Latents that the guide lacks where one of the modalities is left out.
    """

    plates: frozenset[Plate]
    num_rows: int
    around: dict[str, frozenset[int]]
    one_scale: bool
    private: frozenset[str]

    @staticmethod
    def of(pair: Pair, num_rows: int, private: frozenset[str]) -> "Layout":
        """What an execution tells."""
        sites = sites_of(pair.model_trace, is_random) | sites_of(pair.guide_trace, is_random)
        observed = sites_of(pair.model_trace, is_observed).values()
        first, *others = (site["scale"] / subsampling(frames(site)) for site in observed)
        return Layout(
            data_plates_of(Run.of(pair)),
            num_rows,
            {name: frozenset(f.dim for f in frames(site)) for name, site in sites.items()},
            all(same_scale(first, other) for other in others),
            private,
        )

    def dim_of_rows(self, where: str, *, separate: bool) -> int:
        """The dimension of the plate over the rows, negative.

        Args:
            where: The objective, for the messages.
            separate: Whether to refuse sites that rows share.

        Raises:
            ValueError: If there is no such plate, or if separate rows share a site.
        """
        dim = dim_of_rows(where, self.plates, self.num_rows)
        outside = [name for name, around in self.around.items() if dim not in around]
        if outside and separate:
            raise ValueError(
                f"{where}: expected every random site inside the plate over the rows, got site "
                f"'{outside[0]}' outside it. Rows with different modalities missing have "
                "different weights, and all share this site: make it a parameter, or use "
                "target='subset'."
            )
        return dim

    def require_one_scale(self, where: str) -> None:
        """Raises if observed sites have different scales."""
        if not self.one_scale:
            raise ValueError(
                f"{where}: expected one scale around all observed sites for target='all' with "
                "TraceIWAE_ELBO inside, got several, such as weights of modalities. That of a "
                "subset would stand inside the logarithm with them. Leave the weights out, or use "
                "target='subset'."
            )


class SubsetPrograms:
    """A pair of programs, called ``(batch, present=None)``, as one that sees subsets.

    Args:
        model: The model.
        guide: The guide.
        private: Where the guide's private latents come from if the model sees everything;
            ``None`` if the model sees the subset as well.
        where: Who asks, for the messages.
    """

    def __init__(
        self, model: Program, guide: Program, private: Literal["own", "prior"] | None, where: str
    ) -> None:
        self._model, self._guide = model, guide
        self._private, self._where = private, where
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._latents: dict[tuple[str, ...], frozenset[str]] = {}

    def model(
        self, batch: Batch, present: Present | None = None, *, _run: SubsetRun, **kwargs: Any
    ) -> None:
        """The model on what it sees."""
        with weighted(_run):
            self._model(*restricted(batch, present, _run.all_names), **kwargs)

    def guide(
        self, batch: Batch, present: Present | None = None, *, _run: SubsetRun, **kwargs: Any
    ) -> None:
        """The guide on the subset, with private latents from elsewhere where it lacks them."""
        subset = restricted(batch, present, _run.names)
        with weighted(_run):
            if not _run.private:
                self._guide(*subset, **kwargs)
            else:
                everything = restricted(batch, present, _run.all_names)
                self._guide_with(_run, subset, everything, kwargs)

    def _guide_with(
        self, run: SubsetRun, subset: Arguments, everything: Arguments, kwargs: Any
    ) -> None:
        """The shared latents given the subset, then the private ones given everything.

        In this order a latent lies after all that its distribution may depend on, and the
        private ones among themselves as the guide has them.
        """
        with poutine.trace() as tracer, hiding(lambda name: name in run.private):
            self._guide(*subset, **kwargs)
        shared = tracer.trace
        priors = {}
        if run.from_prior:
            with hiding(lambda name: True), poutine.trace() as tracer:
                with stop_after(run.from_prior), poutine.replay(trace=shared):
                    self._model(*everything, **kwargs)
            priors = {name: tracer.trace.nodes[name]["fn"] for name in run.from_prior}
        with hiding(lambda name: name in shared), Replaced(priors), poutine.replay(trace=shared):
            self._guide(*everything, **kwargs)

    def run_of(self, names: tuple[str, ...], given: Given) -> SubsetRun:
        """How to run a subset of what is observed, rows and weight aside.

        Raises:
            ValueError: If private latents cannot come from elsewhere.
        """
        if self._private is None:
            return SubsetRun(names, names)
        private = self.layout(given).private
        if not private or names == given.observed:
            return SubsetRun(names, given.observed)
        from_prior = frozenset[str]()
        if self._private == "prior":
            from_prior = private - self._latents_given(names, given)
        return SubsetRun(names, given.observed, private, from_prior)

    def layout(self, given: Given) -> Layout:
        """What one execution on everything observed tells, without effect on anything.

        Raises:
            ValueError: If the programs do not fit together, or private latents cannot come from
                elsewhere.
        """
        observed = given.observed
        if observed not in self._layouts:
            with self._without_effect():
                arguments = given.only(observed)
                pair = trace_pair(self._model, self._guide, arguments, given.kwargs, self._where)
                private = frozenset[str]()
                for left_out in observed if self._private and len(observed) > 1 else ():
                    names = frozenset(sites_of(pair.guide_trace, is_random))
                    others = (name for name in observed if name != left_out)
                    private |= names - self._random_sites(given.only(others), given.kwargs)
                if private:
                    self._check_private(pair, private)
            self._layouts[observed] = Layout.of(pair, given.seen.num_rows, private)
        return self._layouts[observed]

    def _latents_given(self, names: tuple[str, ...], given: Given) -> frozenset[str]:
        """What the guide samples for a subset."""
        if names not in self._latents:
            if len(self._latents) >= MOST_SUBSETS:
                self._latents.clear()
            with self._without_effect():
                self._latents[names] = self._random_sites(given.only(names), given.kwargs)
        return self._latents[names]

    def _random_sites(self, arguments: Arguments, kwargs: Any) -> frozenset[str]:
        """The random sites of the guide."""
        trace = poutine.trace(self._guide).get_trace(*arguments, **kwargs)
        return frozenset(sites_of(trace, is_random))

    @contextmanager
    def _without_effect(self) -> Iterator[None]:
        """A look that leaves nothing behind; SVI, which notes the parameters, is blind to it."""
        with (
            poutine.block(),
            same_random_numbers_again(),
            without_side_effects(self._model, self._guide),
        ):
            yield

    def _check_private(self, pair: Pair, private: frozenset[str]) -> None:
        """Raises if shared latents depend on private ones, or private priors on each other."""
        where, latents = self._where, sites_of(pair.guide_trace, is_latent)
        others = {name: site["fn"].sample() for name, site in latents.items() if name in private}
        shared = [name for name in latents if name not in private]
        for name in moved_by(pair.guide, pair.guide_trace, others, shared):
            raise ValueError(
                f"{where}: expected shared latents that do not depend on the private ones "
                f"{sorted(private)} in the guide, got site '{name}' that does, so that it cannot "
                "be drawn given a subset and they given their own modality. Sample the shared "
                "latents first, from the data alone."
            )
        if self._private == "own":
            return
        of_model = sites_of(pair.model_trace, is_latent)
        for name in sorted(private - of_model.keys()):
            raise ValueError(
                f"{where}: expected private latents of the model for private='prior', got site "
                f"'{name}' that only the guide has and that has no prior. Use private='own'."
            )
        others = {name: of_model[name]["fn"].sample() for name in private}
        for name in moved_by(pair.model, pair.model_trace, others, sorted(private)):
            raise ValueError(
                f"{where}: expected priors of private latents that depend on shared ones at most "
                f"for private='prior', got site '{name}' whose prior moves with another private "
                "one. Use private='own'."
            )
