"""The common root of the objectives: losses for ``pyro.infer.SVI``."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.util import warn_if_nan

from pyro_vae.checks import check_at_least
from pyro_vae.pairs import Pair
from pyro_vae.runs import Run, Runner
from pyro_vae.schedules import Weight, weight_of
from pyro_vae.terms import Terms, require_terms, terms_of
from pyro_vae.traces import Plate, Site, is_point_mass, is_random, sites_of

__all__ = [
    "Objective",
    "TermsObjective",
    "check_weight",
    "dim_of_rows",
    "require_densities",
    "require_reparameterized",
]

Program = Callable[..., Any]


class Objective(ELBO):
    """Abstract: reports the negative bound of the programs, trains by a loss of its own.

    ``loss`` is the negative lower bound on log p(x) in nats, summed over all data, in which the
    scales of the programs count, as in Pyro's own ELBOs, and the weights of the objective do
    not. The gradient is that of the training loss. The first call with a pair of programs looks
    at them once, without effect on parameters or random numbers, to say in plain words what
    does not fit.

    Args:
        num_particles: Samples from the guide.
        vectorize_particles: Whether to run them at once in an outermost plate; by default
            wherever that gives the numbers of single runs, tested at the first call.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        check_at_least(type(self).__name__, "num_particles", num_particles, 1)
        super().__init__(num_particles=num_particles, retain_graph=retain_graph)
        self.vectorize_particles = vectorize_particles
        self._runner: Runner | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: without the programs it last saw, which it will look at again."""
        return {**self.__dict__, "_runner": None}

    @abstractmethod
    def _losses(self, runs: list[Run], training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The negative bound and the training loss, both 0-d; the latter only if training."""

    def _check(self, pair: Pair) -> None:
        """Raises where the objective cannot take a pair of programs."""

    def _update(self, runs: list[Run]) -> None:
        """Advances what the objective itself learns, once for every gradient of training."""

    @property
    def _linked(self) -> bool:
        """Whether the training loss needs joints between guide and model."""
        return False

    @property
    def _stratified(self) -> bool:
        """Whether particles are spread over the components of a mixture guide in proportion."""
        return False

    @property
    def _total_particles(self) -> int:
        return self.num_particles

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("Objectives look at runs; see pyro_vae.runs.")

    def _runs(
        self, model: Program, guide: Program, args: Any, kwargs: Any, *, training: bool
    ) -> list[Run]:
        known = self._runner
        # Equal, not identical: a bound method is another object each time it is asked for.
        if known is None or (known.model, known.guide) != (model, guide):
            known = Runner(
                model,
                guide,
                args,
                kwargs,
                num_particles=self._total_particles,
                vectorize=self.vectorize_particles,
                where=type(self).__name__,
                check=self._check,
            )
            self._runner = known
        return known.runs(
            args, kwargs, linked=training and self._linked, stratified=self._stratified
        )

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The negative bound, nats, summed over all data."""
        with torch.no_grad():
            runs = self._runs(model, guide, args, kwargs, training=False)
            bound, _ = self._losses(runs, training=False)
        return _item(bound)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """A 0-d tensor with the value of the negative bound and the gradient of training."""
        training = torch.is_grad_enabled()
        runs = self._runs(model, guide, args, kwargs, training=training)
        bound, training_loss = self._losses(runs, training=training)
        warn_if_nan(training_loss.detach(), "loss")
        if training:
            self._update(runs)
        return bound.detach() + (training_loss - training_loss.detach())

    def training_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The loss that training minimises, with its own value and gradient, 0-d, nats."""
        runs = self._runs(model, guide, args, kwargs, training=True)
        return self._losses(runs, training=True)[1]

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Adds the gradient of training to the parameters' and returns the negative bound."""
        runs = self._runs(model, guide, args, kwargs, training=True)
        bound, training_loss = self._losses(runs, training=True)
        if training_loss.requires_grad:
            training_loss.backward(retain_graph=self.retain_graph)
        if torch.is_grad_enabled():
            self._update(runs)
        return _item(bound)


class TermsObjective(Objective):
    """Abstract: trains by a loss made of the terms of the ELBO, which is the bound it reports."""

    @abstractmethod
    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        """The training loss, 0-d, nats; ``bound`` is the negative ELBO of ``terms``."""

    def _terms(self, runs: list[Run]) -> Terms:
        return terms_of(runs)

    def _losses(self, runs: list[Run], training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        terms = self._terms(runs)
        bound = terms.negative_elbo
        return bound, self._training_loss(runs, terms, bound) if training else bound

    def _check(self, pair: Pair) -> None:
        where = type(self).__name__
        fix = "Use a distribution with rsample, or train with Trace_ELBO or TraceIWAE_ELBO(1)."
        require_reparameterized(pair, where, fix)
        self._check_terms(pair, require_terms(pair, where))

    def _check_terms(self, pair: Pair, terms: Terms) -> None:
        """Raises where the objective cannot take the terms of a first execution."""


def _item(bound: torch.Tensor) -> float:
    warn_if_nan(bound.detach(), "loss")
    return bound.detach().item()  # Not float(): a captured run keeps it as a tensor.


def dim_of_rows(where: str, plates: Iterable[Plate], num_rows: int) -> int:
    """The dimension of the plate over the rows of a batch, negative.

    Args:
        where: The objective, for the message.
        plates: The plates over the data.
        num_rows: Number of rows of the batch.

    Raises:
        ValueError: If none of the plates has so many rows, or if several have.
    """
    plates = sorted(plates)
    dims = [plate.dim for plate in plates if plate.size == num_rows]
    if len(dims) != 1:
        raise ValueError(
            f"{where}: expected one plate over the {num_rows} rows of the batch, around every "
            "observed site and every latent of a row, got the plates "
            f"{[(plate.name, plate.size) for plate in plates]} over data. Without it no row can be "
            "left out; write `with pyro.plate('data', num_rows):` around them, and give the "
            "programs the rows of that plate and no others."
        )
    return dims[0]


def require_reparameterized(pair: Pair, where: str, fix: str) -> None:
    """Raises if a site of the guide has no reparameterised samples.

    Args:
        pair: An execution of model and guide.
        where: The objective, for the message.
        fix: What to do instead.
    """
    for name, site in sites_of(pair.guide_trace, is_random).items():  # A factor's, too.
        if not site["fn"].has_rsample:
            raise ValueError(
                f"{where}: expected a reparameterised guide, got site '{name}' of "
                f"{type(site['fn']).__name__}, whose samples have no gradient. {fix}"
            )


def require_densities(run: Run, names: Iterable[str], where: str) -> None:
    """Raises if one of these latents is a point mass in the guide, whose KL is not its own.

    Args:
        run: A first execution.
        names: The latents.
        where: The objective, for the message.
    """
    for name in names:
        of_guide: Site = run.guide_trace.nodes[name]
        of_model: Site = run.model_trace.nodes[name]
        if is_point_mass(of_guide["fn"]) and not is_point_mass(of_model["fn"]):
            raise ValueError(
                f"{where}: expected a density for site '{name}' in the guide, got a point mass "
                "(Delta), as Pyro's autoguides make them, whose KL is spread over other sites. "
                "Sample it from a distribution, or train with Trace_ELBO."
            )


def check_weight(where: str, name: str, weight: Weight) -> torch.Tensor:
    """A weight of an objective as a 0-d tensor, see :func:`pyro_vae.schedules.weight_of`."""
    value = weight_of(where, name, weight)
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
