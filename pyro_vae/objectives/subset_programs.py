"""A model and its guide run on a subset of the modalities, or the guide alone, row by row."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_vae.densities import unchecked
from pyro_vae.handlers import stop_after
from pyro_vae.isolation import same_random_numbers_again, without_side_effects
from pyro_vae.modalities import Batch, Present
from pyro_vae.pairs import Pair, trace_pair
from pyro_vae.runs import Run
from pyro_vae.scales import same_scale
from pyro_vae.terms import data_plates_of
from pyro_vae.traces import (
    Site,
    frames,
    is_latent,
    is_observed,
    is_random,
    sites_of,
    subsampling,
)

__all__ = ["Form", "Look", "Private", "Rows", "SubsetPrograms", "restricted"]

Program = Callable[..., Any]
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Rows:
    """Which rows count, and how much.

    Attributes:
        dim: Dimension of the plate over them, negative.
        mask: bool, ``(batch,)``.
        weight: A positive number for all rows, or ``(batch,)``.
    """

    dim: int
    mask: torch.Tensor
    weight: float | torch.Tensor


@dataclass(frozen=True)
class Private:
    """Latents that the guide samples for what it sees of a single modality.

    Attributes:
        names: All of them.
        from_prior: Those drawn from the model's prior, for this subset.
    """

    names: frozenset[str]
    from_prior: frozenset[str]


@dataclass(frozen=True)
class Form:
    """How to run the programs on one subset.

    Attributes:
        names: What the guide sees.
        all_names: What the model sees.
        rows: Which rows count; ``None`` for all.
        weight: Of all rows.
        private: Latents that do not come from the guide that sees the subset.
    """

    names: tuple[str, ...]
    all_names: tuple[str, ...]
    rows: Rows | None = None
    weight: float = 1.0
    private: Private | None = None


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
        self._looks: dict[tuple[str, ...], Look] = {}

    def model(
        self, batch: Batch, present: Present | None = None, *, _form: Form, **kwargs: Any
    ) -> None:
        """The model on what it sees."""
        with _weighted(_form):
            self._model(*restricted(batch, present, _form.all_names), **kwargs)

    def guide(
        self, batch: Batch, present: Present | None = None, *, _form: Form, **kwargs: Any
    ) -> None:
        """The guide on the subset, with private latents from elsewhere where it lacks them."""
        subset = restricted(batch, present, _form.names)
        with _weighted(_form):
            if _form.private is None:
                self._guide(*subset, **kwargs)
            else:
                everything = restricted(batch, present, _form.all_names)
                self._guide_with(_form.private, subset, everything, kwargs)

    def _guide_with(
        self, private: Private, subset: Arguments, everything: Arguments, kwargs: Any
    ) -> None:
        """The shared latents given the subset, then the private ones given everything.

        In this order a latent lies after all that its distribution may depend on, and the
        private ones among themselves as the guide has them.
        """
        with poutine.trace() as tracer, _hiding(lambda name: name in private.names):
            self._guide(*subset, **kwargs)
        shared = tracer.trace
        priors = {}
        if private.from_prior:
            with _hiding(lambda name: True), poutine.trace() as tracer:
                with stop_after(private.from_prior), poutine.replay(trace=shared):
                    self._model(*everything, **kwargs)
            priors = {name: tracer.trace.nodes[name]["fn"] for name in private.from_prior}
        with _hiding(lambda name: name in shared), _Replaced(priors), poutine.replay(trace=shared):
            self._guide(*everything, **kwargs)

    def form(
        self, names: tuple[str, ...], observed: tuple[str, ...], batch: Batch, present: Any, kw: Any
    ) -> Form:
        """How to run a subset of what is observed, rows and weights aside.

        Raises:
            ValueError: If private latents cannot come from elsewhere.
        """
        if self._private is None:
            return Form(names, names)
        look = self.look(observed, batch, present, kw)
        if not look.private or names == observed:
            return Form(names, observed)
        from_prior = frozenset[str]()
        if self._private == "prior":
            if names not in look.of_guide:
                with self._without_effect():
                    look.of_guide[names] = self._latents(restricted(batch, present, names), kw)
            from_prior = look.private - look.of_guide[names]
        return Form(names, observed, private=Private(look.private, from_prior))

    def look(self, observed: tuple[str, ...], batch: Batch, present: Any, kw: Any) -> "Look":
        """What one execution on everything observed tells, without effect on anything.

        Raises:
            ValueError: If the programs do not fit together, or private latents cannot come from
                elsewhere.
        """
        if observed not in self._looks:
            arguments = restricted(batch, present, observed)
            num_rows = len(next(iter(arguments[0].values())))
            with self._without_effect():
                pair = trace_pair(self._model, self._guide, arguments, kw, self._where)
                guide_trace = pair.guide_trace
                private = frozenset[str]()
                for left_out in observed if self._private and len(observed) > 1 else ():
                    others = restricted(batch, present, (n for n in observed if n != left_out))
                    names = frozenset(sites_of(guide_trace, is_random))
                    private |= names - self._latents(others, kw)
                if private:
                    self._check_private(pair, private, arguments, kw)
            self._looks[observed] = Look.of(pair, num_rows, private)
        return self._looks[observed]

    def _latents(self, arguments: Arguments, kw: Any) -> frozenset[str]:
        """The random sites of the guide."""
        trace = poutine.trace(self._guide).get_trace(*arguments, **kw)
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

    def _check_private(
        self, pair: Pair, private: frozenset[str], arguments: Arguments, kw: Any
    ) -> None:
        """Raises if shared latents depend on private ones, or private priors on each other."""
        where, shared = self._where, pair.guide_trace.copy()
        for name in private:
            shared.remove_node(name)

        def moving(program: Program, names: Iterable[str]) -> list[str]:
            """Sites whose distribution is another one in a second run, given the shared."""
            given = poutine.replay(program, trace=shared)
            first, second = (poutine.trace(given).get_trace(*arguments, **kw) for _ in range(2))
            return [name for name in names if _differ(first.nodes[name], second.nodes[name])]

        for name in moving(self._guide, sites_of(shared, is_latent)):
            raise ValueError(
                f"{where}: expected shared latents that do not depend on the private ones "
                f"{sorted(private)} in the guide, got site '{name}' that does, so that it cannot "
                "be drawn given a subset and they given their own modality. Sample the shared "
                "latents first, from the data alone."
            )
        if self._private == "own":
            return
        for name in sorted(private - set(sites_of(pair.model_trace, is_latent))):
            raise ValueError(
                f"{where}: expected private latents of the model for private='prior', got site "
                f"'{name}' that only the guide has and that has no prior. Use private='own'."
            )
        for name in moving(self._model, sorted(private)):
            raise ValueError(
                f"{where}: expected priors of private latents that depend on shared ones at most "
                f"for private='prior', got site '{name}' whose prior moves with another private "
                "one. Use private='own'."
            )


@dataclass(frozen=True)
class Look:
    """What is known of the programs on batches that hold certain modalities.

    Attributes:
        plates: Names of the plates over the data.
        dims: Dimensions of those of them that are over the rows of the batch.
        around: Dimensions of the plates around each random site.
        one_scale: Whether all observed sites have the same scale, plates not counted.
        private: Latents that the guide lacks where one of the modalities is left out.
        of_guide: The guide's latents for subsets seen so far.
    """

    plates: tuple[str, ...]
    dims: tuple[int, ...]
    around: dict[str, frozenset[int]]
    one_scale: bool
    private: frozenset[str]
    of_guide: dict[tuple[str, ...], frozenset[str]]

    @staticmethod
    def of(pair: Pair, num_rows: int, private: frozenset[str]) -> "Look":
        """What an execution tells."""
        sites = sites_of(pair.model_trace, is_random) | sites_of(pair.guide_trace, is_random)
        observed = sites_of(pair.model_trace, is_observed).values()
        first, *others = (site["scale"] / subsampling(frames(site)) for site in observed)
        plates = sorted(data_plates_of(Run.of(pair)))
        return Look(
            tuple(plate.name for plate in plates),
            tuple(plate.dim for plate in plates if plate.size == num_rows),
            {name: frozenset(f.dim for f in frames(site)) for name, site in sites.items()},
            all(same_scale(first, other) for other in others),
            private,
            {},
        )


def restricted(batch: Batch, present: Present | None, names: Iterable[str]) -> Arguments:
    """Arguments that say the same of some modalities, and nothing of others.

    Without masks the programs are called with the batch alone.
    """
    names = tuple(names)
    some = {name: batch[name] for name in names if name in batch}
    if present is None:
        return (some,)
    return some, {name: present[name] for name in names if name in present}


class _Rows(Messenger):
    """Masks and scales what lies in the plate over the rows."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self._rows = rows

    def _pyro_sample(self, msg: Any) -> None:
        rows = self._rows
        size = len(rows.mask)
        if not is_random(msg) or (rows.dim, size) not in {(f.dim, f.size) for f in frames(msg)}:
            return
        shape = (size,) + (1,) * (-rows.dim - 1)
        mask = rows.mask.reshape(shape)
        msg["mask"] = mask if msg["mask"] is None else mask & msg["mask"]
        weight = rows.weight
        if isinstance(weight, torch.Tensor):
            weight = weight.reshape(shape)
        msg["scale"] = msg["scale"] * weight


class _Replaced(Messenger):
    """Samples some sites from other distributions."""

    def __init__(self, fns: dict[str, Any]) -> None:
        super().__init__()
        self._fns = fns

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = self._fns.get(msg["name"], msg["fn"])


def _weighted(form: Form) -> Any:
    if form.rows is not None:
        return _Rows(form.rows)
    return nullcontext() if form.weight == 1 else poutine.scale(scale=form.weight)


def _hiding(hidden: Callable[[str], bool]) -> Any:
    """Keeps samples from handlers further out; parameters are seen."""
    return poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and hidden(str(msg["name"])))


def _differ(first: Site, second: Site) -> bool:
    """Whether two sites of one name have different distributions."""
    value = first["value"]
    one, other = (unchecked(site["fn"]).log_prob(value) for site in (first, second))
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    return not torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
