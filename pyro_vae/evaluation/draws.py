"""Draws from a model and its guide: latents, replicated data, pointwise log-likelihoods."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger

from pyro_vae.drawn_sites import DrawMessenger
from pyro_vae.evaluation.particles import Particles
from pyro_vae.pairs import Pair
from pyro_vae.traces import DataPlates, is_latent, is_observed, is_random, sites_of
from pyro_vae.vectorised import Values, VectorisedProgram

__all__ = ["Draws"]


class Draws:
    """Draws of latents and data from prior and guide, by the names of ArviZ's groups.

    Args:
        pair: A checked execution of both.
        plates: Their data plates.
        where: The function that asks, for the messages.

    Attributes:
        predicted: The observed sites that have a value, which a factor has not.
    """

    def __init__(self, pair: Pair, plates: DataPlates, where: str) -> None:
        model = pair.model

        def program(
            of: Callable[[], Any], role: str = "model", enumerated: tuple[str, ...] = ()
        ) -> VectorisedProgram:
            common = plates, pair.max_plate_nesting, where, pair.latent_shapes
            return VectorisedProgram(of, role, *common, enumerated)

        self._where = where
        self._latents = list(sites_of(pair.model_trace, is_latent))
        scored = sites_of(pair.model_trace, is_observed)
        self.predicted = {
            name: site for name, site in scored.items() if not isinstance(site["fn"], Unit)
        }
        self._guide = Particles(pair, plates, where)
        self._enumerated = program(model, enumerated=pair.enumerated) if pair.enumerated else None
        self._likelihoods = {name: program(_Only(name)(model)) for name in scored}
        self._posterior = program(DrawMessenger()(model), "resampled model")
        self._prior = program(DrawMessenger()(model), "resampled model")

    def chunk_size_within(self, num_bytes: int) -> int:
        """How many draws fit a byte budget at once, at least 1."""
        return self._guide.chunk_size_within(num_bytes)

    def draw(self, num: int) -> dict[str, Values]:
        """Values ``(num, *plates, *event)`` by group and site.

        Those of the group "log_likelihood" are ``(num, *data)``, in nats.
        """
        latents = self._guide.draw(num)
        if self._enumerated:
            latents |= self._enumerated.draw_enumerated(latents, num)
        log_likelihood = {}
        for name, program in self._likelihoods.items():
            log_likelihood[name] = program.score(latents, num)
            self._check_finite(name, log_likelihood[name])
        try:
            replicated, _ = self._posterior.draw(num, latents)
            prior, _ = self._prior.draw(num)
        except NotImplementedError as err:
            raise ValueError(
                f"{self._where}: expected sites that can be sampled, got a distribution without "
                "a sample method. Define it, or give the model a distribution that has one."
            ) from err
        return {
            "posterior": {name: latents[name] for name in self._latents},
            "prior": {name: prior[name] for name in self._latents},
            "posterior_predictive": {name: replicated[name] for name in self.predicted},
            "prior_predictive": {name: prior[name] for name in self.predicted},
            "log_likelihood": log_likelihood,
        }

    def _check_finite(self, name: str, log_likelihood: torch.Tensor) -> None:
        bad = log_likelihood.isnan() | (log_likelihood == torch.inf)
        if bad.any():
            raise ValueError(
                f"{self._where}: expected finite log-likelihoods at site '{name}', got "
                f"{float(log_likelihood[bad][0])} in {int(bad.sum())} of {bad.numel()} values. "
                "Look at the parameters and data that site depends on."
            )


class _Only(Messenger):
    """Masks every site but one, so that the log-density of the program is that site's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != self._name and is_random(msg):
            msg["mask"] = False
