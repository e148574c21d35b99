"""Runs for evaluation: any number of particles, some at a time."""

from collections.abc import Callable, Iterator
from typing import Any

from pyro_vae.checks import check_at_least, refuse_subsampling
from pyro_vae.pairs import Pair, data_plates, refuse_point_mass
from pyro_vae.runs import Run, Runner
from pyro_vae.traces import DataPlates, is_latent, sites_of
from pyro_vae.vectorised import check_support

__all__ = ["ChunkedRuns"]


class ChunkedRuns:
    """Runs of a pair whose random sites all lie in a plate over the data.

    To be made and used inside ``without_side_effects``.

    Args:
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_particles: How many particles in all.
        chunk_size: How many at a time.
        where: The function that asks, for the messages.

    Attributes:
        plates: The data plates.
    """

    plates: DataPlates

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Any,
        kwargs: Any,
        num_particles: int,
        chunk_size: int,
        where: str,
    ) -> None:
        check_at_least(where, "num_particles", num_particles, 1)
        check_at_least(where, "chunk_size", chunk_size, 1)
        # Around the programs, as the first look is blocked from handlers outside.
        model, guide = (refuse_subsampling(where)(program) for program in (model, guide))
        self._arguments, self._where = (args, kwargs), where
        self._num_particles, self._chunk_size = num_particles, min(chunk_size, num_particles)
        self._runner = Runner(
            model,
            guide,
            args,
            kwargs,
            num_particles=self._chunk_size,
            vectorize=None,
            where=where,
            check=self._check,
        )

    def __iter__(self) -> Iterator[Run]:
        left = self._num_particles
        while left:
            num = min(self._chunk_size, left)
            for run in self._runner.runs(*self._arguments, num_particles=num):
                for site in sites_of(run.model_trace, is_latent).values():
                    check_support(self._where, site)
                yield run
            left -= num

    def _check(self, pair: Pair) -> None:
        refuse_point_mass(pair, self._where)
        self.plates = data_plates(pair, self._where)
