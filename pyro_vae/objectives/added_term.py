"""The common root of objectives that add to an ELBO what the guide's distributions carry."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger

from pyro_vae.objectives.objective import Objective
from pyro_vae.traces import frames, is_random, subsampling

__all__ = ["AddedTermELBO"]

Program = Callable[..., Any]


class AddedTermELBO(ELBO):
    """Abstract: any ELBO, and in its gradient a term from the guide's sites in the same run.

    ``loss`` is that of the inner ELBO, the negative bound in nats: what is added exists in
    training only. Masks of a site, subsampling and ``poutine.scale`` count in its term, the beta
    of ``scale_kl`` does not.

    Args:
        elbo: Any ELBO with a ``differentiable_loss``.
    """

    def __init__(self, elbo: ELBO) -> None:
        if not isinstance(elbo, ELBO) or not hasattr(elbo, "differentiable_loss"):
            raise TypeError(
                f"{type(self).__name__}: expected an ELBO with a differentiable_loss, got "
                f"{type(elbo).__name__}. Pass an instance such as pyro.infer.Trace_ELBO()."
            )
        super().__init__(num_particles=elbo.num_particles, retain_graph=elbo.retain_graph)
        self.elbo: Any = elbo
        self._recorded: tuple[Program, _Recorder, Program] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: without the guide it last saw."""
        return {**self.__dict__, "_recorded": None}

    @abstractmethod
    def _wanted(self, fn: Any) -> bool:
        """Whether a distribution of the guide carries a term."""

    @abstractmethod
    def _term(self, fn: Any) -> torch.Tensor:
        """The term of one of them: of its batch shape, not scaled, to be minimised."""

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("The inner ELBO runs the programs.")

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The negative bound of the inner ELBO, nats, summed over all data."""
        loss: float = self.elbo.loss(model, guide, *args, **kwargs)
        return loss

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """A 0-d tensor with the value of the negative bound and the gradient of training."""
        self._guess_nesting(model, guide, args, kwargs)
        recorder, recorded = self._record(guide)
        bound: torch.Tensor = self.elbo.differentiable_loss(model, recorded, *args, **kwargs)
        total = bound.new_zeros(())
        for fn, mask, scale in recorder.taken():
            term = self._term(fn)
            if mask is not None:
                term = torch.where(torch.as_tensor(mask, device=term.device), term, 0.0)
            total = total + (scale * term).sum()
        # Inner ELBOs run the guide once a particle, or once for all of them side by side.
        of_ours = isinstance(self.elbo, Objective)  # These may have groups of particles.
        total = total / (self.elbo._total_particles if of_ours else self.elbo.num_particles)
        return bound + (total - total.detach())

    def _guess_nesting(self, model: Program, guide: Program, args: Any, kwargs: Any) -> None:
        """Lets an ELBO of Pyro that does not know its plates run the guide now, not recorded."""
        elbo = self.elbo
        guesses = elbo.vectorize_particles or isinstance(elbo, TraceEnum_ELBO)
        if guesses and not isinstance(elbo, Objective) and elbo.max_plate_nesting == math.inf:
            elbo._guess_max_plate_nesting(model, guide, args, kwargs)

    def _record(self, guide: Program) -> "tuple[_Recorder, Program]":
        """The guide under a recorder: the same program in every step, as objectives expect."""
        if self._recorded is None or self._recorded[0] != guide:
            recorder = _Recorder(self._wanted, type(self).__name__)
            self._recorded = guide, recorder, recorder(guide)
        _, recorder, recorded = self._recorded
        recorder.taken()  # What a run that failed has left.
        return recorder, recorded

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The negative bound, nats, after adding the gradient of training to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach().item()


class _Recorder(Messenger):
    """Keeps the distributions that are wanted, with mask and scale, in all runs of a program."""

    def __init__(self, wanted: Callable[[Any], bool], where: str) -> None:
        super().__init__()
        self._wanted, self._where = wanted, where
        self._sites: list[tuple[Any, Any, Any]] = []

    def taken(self) -> list[tuple[Any, Any, Any]]:
        """The sites kept so far, which are forgotten."""
        sites = list(self._sites)
        self._sites.clear()  # The same list in every run.
        return sites

    def _pyro_post_sample(self, msg: Any) -> None:
        # Without gradients an objective takes its first look at a pair: that is no step.
        if torch.is_grad_enabled() and is_random(msg) and self._wanted(msg["fn"]):
            plates = frames(msg)
            nesting = max((-plate.dim for plate in plates), default=0)
            shape = msg["fn"].batch_shape
            if any(size > 1 for size in shape[: len(shape) - nesting]):
                raise ValueError(
                    f"{self._where}: expected site '{msg['name']}' to depend on no enumerated "
                    f"site, got batch shape {tuple(shape)} in {nesting} plate dimensions, so that "
                    "its term would count once for each value. Sample the other site, without "
                    "enumeration."
                )
            scale: Any = subsampling(plates)
            # Not the scale of the site: in that the beta of scale_kl counts, which may be zero.
            for handler in _PYRO_STACK:
                if isinstance(handler, ScaleMessenger):
                    scale = scale * handler.scale
            self._sites.append((msg["fn"], msg["mask"], scale))
