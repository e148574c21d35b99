"""Bounds on subsets of the modalities, added up or averaged, around any other ELBO."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro.infer import ELBO, RenyiELBO

from pyro_vae.checks import check_at_least
from pyro_vae.modalities import Batch, observed_of
from pyro_vae.objectives.expert_kl import TraceExpertKL_ELBO
from pyro_vae.objectives.iwae import TraceIWAE_ELBO
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.subset_choice import (
    MOST_SUBSETS,
    Subset,
    check_choice,
    checked_subsets,
    rows_and_weight,
    subsets_of,
)
from pyro_vae.objectives.subset_programs import SubsetPrograms
from pyro_vae.objectives.subset_runs import Given, Rows, SubsetRun

__all__ = ["TraceSubsets_ELBO"]

Program = Callable[..., Any]


class TraceSubsets_ELBO(ELBO):
    r"""The bounds of another ELBO with the guide on subsets S of the modalities.

    For models and guides called ``(batch, present=None)``, see ``pyro_vae.models.MultimodalVAE``,
    with sites of any name. With ``target="subset"`` the model, too, sees the subset only, and the
    training loss is the sum

    .. math:: \sum_S \left( E_{q(z \mid x_S)}[\log p(x_S \mid z)]
        - KL(q(z \mid x_S) \,\|\, p(z)) \right)

    which trains the guide for whatever may be missing later. ``loss`` reports the negative bound
    of all that is observed, the joint one; if that is no term of the sum it is computed besides.
    In a row with missing modalities a subset that is listed or drawn stands for what is left of
    it, and where nothing is left it has no part; "all" are those that are left.

    With ``target="all"`` the model sees all that is observed in a row, x, and training loss and
    reported loss are the negative average over the subsets that are observed as a whole in
    that row, each of which is a lower bound on log p(x):

    .. math:: \frac{1}{|\{S\}|} \sum_S \left( E_{q(z \mid x_S)}[\log p(x \mid z)]
        - KL(q(z \mid x_S) \,\|\, p(z)) \right)

    A row with nothing observed has no part. The average lies below the bound of the mixture of
    the same posteriors, such as ``MixtureOfProducts`` with ``Trace_ELBO``, which costs the
    density of the mixture.

    ============================  =================================================================
    MVAE                          ``TraceSubsets_ELBO(inner)``, with ``num_random=k`` for k more
    MoPoE                         ``TraceSubsets_ELBO(inner, "all", target="all")``
    DMVAE                         ``TraceSubsets_ELBO(inner, target="all")``
    MMVAE+                        ``TraceSubsets_ELBO(TraceIWAE_ELBO(K, "dreg"), "single",``
                                  ``target="all", private="prior")``
    a mixture of experts, looser  ``TraceSubsets_ELBO(inner, "single", target="all")``
    ============================  =================================================================

    with ``inner=TraceMeanField_ELBO()``, for instance, and a guide ``ProductOfExperts``.

    A modality may have private latents: those that the guide does not sample where the
    modality is left out. With ``target="all"`` they come from elsewhere:

    - ``private="own"``: from the guide given all that is observed, the shared latents being those
      of the subset. In the library's guides that is each from its own modality.
    - ``private="prior"``: those of modalities outside the subset from the model's prior, in model
      and guide, so that they cancel. Nothing of a modality then reaches its own
      reconstruction but through the shared latents.

    Each subset has a copy of ``inner`` of its own. What ``inner`` learns itself, such as the
    multiplier of GECO, the copies share and keep in ``inner``; it is updated once a subset, so
    that a rate counts as many times in a step.

    Args:
        inner: The ELBO of each term: one of Pyro's or of the library's, with its particles and
            weights.
        subsets: "joint+single" for all that is observed and each modality alone; "single"; "all"
            for every subset but the empty one; or a list of tuples of names.
        target: What the model sees, see above.
        num_random: With "joint+single", this many other subsets besides, drawn anew every time,
            or as many as there are: 2^M - M - 2 of M modalities. A subset that is drawn for the
            first time costs about twice its step with an objective of the library inside, which
            looks at the programs on it; a thousand subsets are remembered.
        private: See above.

    Raises:
        TypeError: If ``inner`` is no ELBO, ``subsets`` has another type, or a batch is no mapping.
        ValueError: If an argument has another value; while running, if a subset names a modality
            that is no key of the batch; with "all" beyond ten modalities; with ``target="all"``,
            if a row has data but no subset as a whole, which is asked of masks where Pyro's
            validation is on; if rows are to be left out and there is no plate over them.

    Example:
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> from pyro_vae.guides import ProductOfExperts
        >>> from pyro_vae.likelihoods import Normal
        >>> from pyro_vae.models import MultimodalVAE
        >>> from pyro_vae.nets import MLP
        >>> from pyro_vae.priors import StandardNormalPrior
        >>> decoders = {"image": MLP(2, [], 5), "sound": MLP(2, [], 3)}
        >>> likelihoods = {"image": Normal(), "sound": Normal()}
        >>> model = MultimodalVAE(decoders, likelihoods, StandardNormalPrior(2))
        >>> guide = ProductOfExperts({"image": MLP(5, [], 4), "sound": MLP(3, [], 4)}, 2)
        >>> elbo = TraceSubsets_ELBO(TraceMeanField_ELBO(), "all", target="all")
        >>> batch = {"image": torch.randn(7, 5), "sound": torch.randn(7, 3)}
        >>> elbo.differentiable_loss(model, guide, batch, {"sound": torch.arange(7) < 4}).shape
        torch.Size([])

    References:
        Wu and Goodman (2018), Multimodal generative models for scalable weakly-supervised
        learning, https://arxiv.org/abs/1802.05335 (MVAE);
        Sutter et al. (2021), Generalized multimodal ELBO, https://arxiv.org/abs/2105.02470
        (MoPoE);
        Lee and Pavlovic (2021), Private-shared disentangled multimodal VAE,
        https://arxiv.org/abs/2012.13024 (DMVAE);
        Palumbo et al. (2023), MMVAE+: Enhancing the generative quality of multimodal VAEs without
        compromises, https://openreview.net/forum?id=sdQGxouELX. Here each expert's own density
        stands in the denominator, not the mixture's, and the private latents of other
        modalities are drawn from the prior of the model instead of one that is learnt apart.
    """

    def __init__(
        self,
        inner: ELBO,
        subsets: Literal["joint+single", "single", "all"] | Sequence[Collection[str]] = (
            "joint+single"
        ),
        *,
        target: Literal["subset", "all"] = "subset",
        num_random: int = 0,
        private: Literal["own", "prior"] = "own",
    ) -> None:
        where = type(self).__name__
        _check_inner(where, inner, target)
        check_choice(where, "target", target, ("subset", "all"))
        check_choice(where, "private", private, ("own", "prior"))
        check_at_least(where, "num_random", num_random, 0)
        self.subsets = checked_subsets(where, subsets)
        if num_random and self.subsets != "joint+single":
            raise ValueError(
                f"{where}: expected num_random=0 with subsets={subsets!r}, got {num_random}. "
                "Random subsets come beside subsets='joint+single'."
            )
        super().__init__(num_particles=inner.num_particles, retain_graph=inner.retain_graph)
        self.inner, self.target, self.private = inner, target, private
        self.num_random = num_random
        self._programs: tuple[Program, Program, SubsetPrograms] | None = None
        self._copies: dict[tuple[str, ...], ELBO] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: without the programs it last saw, which it will look at again."""
        return {**self.__dict__, "_programs": None, "_copies": {}}

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("The inner ELBO runs the programs.")

    def loss(
        self, model: Program, guide: Program, batch: Batch, present: Any = None, **kwargs: Any
    ) -> float:
        """The negative bound, nats, summed over all data."""
        calls = self._calls(model, guide, batch, present, kwargs)
        return sum((call.loss() for call in calls if call.reports), start=0.0)

    def loss_and_grads(
        self, model: Program, guide: Program, batch: Batch, present: Any = None, **kwargs: Any
    ) -> float:
        """Adds the gradient of training to the parameters' and returns the negative bound."""
        bound = 0.0
        for call in self._calls(model, guide, batch, present, kwargs):
            value = call.of(call.inner.loss_and_grads) if call.trains else call.loss()
            bound += value if call.reports else 0.0  # Not float(): it may be a tensor.
        return bound

    def differentiable_loss(
        self, model: Program, guide: Program, batch: Batch, present: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """A 0-d tensor with the value of the negative bound and the gradient of training."""
        bound, trained = torch.zeros(()), torch.zeros(())
        for call in self._calls(model, guide, batch, present, kwargs):
            value = call.of(call.inner.differentiable_loss) if call.trains else call.loss()
            value = torch.as_tensor(value)
            bound = bound + value.detach() if call.reports else bound
            trained = trained + value if call.trains else trained
        return bound + (trained - trained.detach())

    def training_loss(
        self, model: Program, guide: Program, batch: Batch, present: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """The loss that training minimises, with its own value and gradient, 0-d, nats."""
        calls = self._calls(model, guide, batch, present, kwargs)
        losses = (call.training_loss() for call in calls if call.trains)
        return sum(losses, start=torch.zeros(()))

    def _calls(
        self, model: Program, guide: Program, batch: Batch, present: Any, kwargs: dict[str, Any]
    ) -> "list[_Call]":
        """The inner ELBOs to call; one that reports without being trained is the first."""
        where, average = type(self).__name__, self.target == "all"
        given = Given(observed_of(where, None, batch, present), batch, present, kwargs)
        programs = self._programs_of(model, guide)
        subsets = subsets_of(
            where, self.subsets, given.seen, average=average, num_random=self.num_random
        )
        runs = [programs.run_of(subset.names, given) for subset in subsets]
        calls = []
        for subset, run in zip(subsets, self._weigh(runs, subsets, programs, given), strict=True):
            arguments = programs.model, programs.guide, *given.only(run.all_names)
            inner = self._inner_of(subset.names)
            calls.append(
                _Call(inner, arguments, {**kwargs, "_run": run}, subset.trains, subset.reports)
            )
        return calls

    def _programs_of(self, model: Program, guide: Program) -> SubsetPrograms:
        known = self._programs
        if known is None or known[:2] != (model, guide):
            private = self.private if self.target == "all" else None
            known = model, guide, SubsetPrograms(model, guide, private, type(self).__name__)
            self._programs = known
            self._copies.clear()  # They hold the programs that came before.
        return known[2]

    def _inner_of(self, names: tuple[str, ...]) -> ELBO:
        """The copy of ``inner`` for a subset, which may hold what it learnt of the programs."""
        if names not in self._copies:
            if len(self._copies) >= MOST_SUBSETS:
                self._copies.clear()
            self._copies[names] = copy.copy(self.inner)
        return self._copies[names]

    def _weigh(
        self,
        runs: list[SubsetRun],
        subsets: list[Subset],
        programs: SubsetPrograms,
        given: Given,
    ) -> list[SubsetRun]:
        """Says which rows count in each term, and how much."""
        where, average = type(self).__name__, self.target == "all"
        rows, weight = rows_and_weight(where, subsets, given.seen, average=average)
        if average and runs and isinstance(self.inner, TraceIWAE_ELBO):
            programs.layout(given).require_one_scale(where)
        weighed = []
        for run, mask in zip(runs, rows, strict=True):
            of_run = None
            if mask is not None:
                dim = programs.layout(given).dim_of_rows(where, separate=average)
                of_run = Rows(dim, mask)
            weighed.append(replace(run, rows=of_run, weight=weight))
        return weighed


@dataclass(frozen=True)
class _Call:
    """An inner ELBO with the programs of a subset."""

    inner: Any  # What ELBOs can do is not written in their base class.
    arguments: tuple[Any, ...]
    kwargs: dict[str, Any]
    trains: bool
    reports: bool

    def of(self, method: Callable[..., Any]) -> Any:
        return method(*self.arguments, **self.kwargs)

    def loss(self) -> float:
        with torch.no_grad():
            value: float = self.of(self.inner.loss)
        return value

    def training_loss(self) -> torch.Tensor:
        inner = self.inner
        own = isinstance(inner, Objective)
        return torch.as_tensor(self.of(inner.training_loss if own else inner.differentiable_loss))


def _check_inner(where: str, inner: Any, target: str) -> None:
    if not isinstance(inner, ELBO):
        got = inner.__name__ if isinstance(inner, type) else type(inner).__name__
        raise TypeError(
            f"{where}: expected an ELBO for each subset, got {got}. Pass "
            "pyro.infer.TraceMeanField_ELBO(), for instance."
        )
    if target == "all" and isinstance(inner, RenyiELBO | TraceExpertKL_ELBO):
        fix = "TraceIWAE_ELBO(K)" if isinstance(inner, RenyiELBO) else "TraceMeanField_ELBO()"
        raise ValueError(
            f"{where}: expected an inner ELBO that takes weights of rows and leaves what the guide "
            f"sees to target='all', got {type(inner).__name__}. Use {fix}."
        )
