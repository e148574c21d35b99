"""Bounds on subsets of the modalities, added up or averaged, around any other ELBO."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import torch
from pyro.infer import ELBO, RenyiELBO

from pyro_vae.checks import check_at_least
from pyro_vae.modalities import Batch, Observed, Present, observed_of
from pyro_vae.objectives.expert_kl import TraceExpertKL_ELBO
from pyro_vae.objectives.iwae import TraceIWAE_ELBO
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.subset_programs import Form, Look, Rows, SubsetPrograms, restricted

__all__ = ["TraceSubsets_ELBO"]

_MOST_ENUMERATED = 10
"""Modalities whose subsets are enumerated: 1,023 of them."""

_KINDS = ("joint+single", "single", "all")

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
    multiplier of GECO, the copies share and keep in ``inner``.

    Args:
        inner: The ELBO of each term: one of Pyro's or of the library's, with its particles and
            weights.
        subsets: "joint+single" for all that is observed and each modality alone; "single"; "all"
            for every subset but the empty one; or a list of tuples of names.
        target: What the model sees, see above.
        num_random: With "joint+single", this many other subsets besides, drawn anew every time,
            or as many as there are.
        private: See above.

    Raises:
        TypeError: If ``inner`` is no ELBO, ``subsets`` has another type, or a batch is no mapping.
        ValueError: If an argument has another value; while running, if a subset names a modality
            that is no key of the batch; with "all" beyond ten modalities; with ``target="all"``,
            if a row has data but no subset as a whole; if rows are to be left out and there is
            no plate over them.

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
        learning, section 2.3, https://arxiv.org/abs/1802.05335 (MVAE);
        Sutter et al. (2021), Generalized multimodal ELBO, section 4,
        https://arxiv.org/abs/2105.02470 (MoPoE);
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
        _check_choice(where, "target", target, ("subset", "all"))
        _check_choice(where, "private", private, ("own", "prior"))
        check_at_least(where, "num_random", num_random, 0)
        self.subsets = _checked_subsets(where, subsets)
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
            bound += float(value) if call.reports else 0.0
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
        seen = self._seen(batch, present)
        programs = self._programs_of(model, guide)
        observed = tuple(seen.values)
        subsets = self._subsets_of(batch, seen)
        given = batch, present, kwargs
        forms = [programs.form(s.names, observed, *given) for s in subsets]
        forms = self._weigh(forms, subsets, seen, lambda: programs.look(observed, *given))
        calls = []
        for subset, form in zip(subsets, forms, strict=True):
            arguments = restricted(batch, present, form.all_names)
            inner = self._copies.setdefault(subset.names, copy.copy(self.inner))
            calls.append(
                _Call(
                    inner,
                    (programs.model, programs.guide, *arguments),
                    {**kwargs, "_form": form},
                    trains=subset.trains,
                    reports=subset.reports,
                )
            )
        return calls

    def _seen(self, batch: Batch, present: Present | None) -> Observed:
        where = type(self).__name__
        for what, value in (("batch", batch), ("present", {} if present is None else present)):
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"{where}: expected {what} to be a mapping from modality to tensor, got "
                    f"{type(value).__name__}. Its programs are called (batch, present=None), with "
                    "batch={'image': x, 'label': y}, for instance."
                )
        return observed_of(where, [*{**batch, **(present or {})}], batch, present)

    def _programs_of(self, model: Program, guide: Program) -> SubsetPrograms:
        known = self._programs
        if known is None or known[:2] != (model, guide):
            private = self.private if self.target == "all" else None
            known = model, guide, SubsetPrograms(model, guide, private, type(self).__name__)
            self._programs = known
        return known[2]

    def _subsets_of(self, batch: Batch, seen: Observed) -> "list[_Subset]":
        """The subsets of a batch, without those of which nothing, or not all, is observed."""
        where, observed = type(self).__name__, tuple(seen.values)
        if isinstance(self.subsets, tuple):
            for name in (name for names in self.subsets for name in names):
                if name not in batch:
                    raise ValueError(
                        f"{where}: expected modalities among {list(batch)} in subsets, got "
                        f"{name!r}. Use the keys of the batch, where None stands for a modality "
                        "that this batch lacks."
                    )
            chosen = [tuple(n for n in observed if n in names) for names in self.subsets]
            if self.target == "all":
                pairs = zip(chosen, self.subsets, strict=True)
                chosen = [names for names, wanted in pairs if len(names) == len(wanted)]
            found = [_Subset(names, whole=self.target == "all") for names in chosen if names]
        else:
            found = self._named_subsets(observed)
        if self.target == "all":
            return [replace(subset, reports=True) for subset in found]
        # The joint bound is reported, once, whether or not it is a term of the sum.
        same = (s for s in found if s.names == observed and not (s.whole and _has_masks(seen)))
        first = next(same, None)
        others = [s for s in found if s is not first]
        joint = first or _Subset(observed, whole=False, trains=False)
        return [replace(joint, reports=True), *others] if observed else []

    def _named_subsets(self, observed: tuple[str, ...]) -> "list[_Subset]":
        num = len(observed)
        if self.subsets == "all":
            if num > _MOST_ENUMERATED:
                raise ValueError(
                    f"{type(self).__name__}: expected at most {_MOST_ENUMERATED} modalities for "
                    f"subsets='all', got {num}, which have {2**num - 1:,}. Draw some of them, "
                    "subsets='joint+single' with num_random=20, or list them."
                )
            sizes = range(num, 0, -1)
            return [_Subset(names) for size in sizes for names in combinations(observed, size)]
        single = [_Subset((name,)) for name in observed]
        if self.subsets == "single":
            return single
        joint = [_Subset(observed, whole=False)] if observed else []
        drawn = _draw_subsets(observed, self.num_random)
        return [*joint, *single, *(_Subset(names, whole=self.target == "all") for names in drawn)]

    def _weigh(
        self,
        forms: list[Form],
        subsets: "list[_Subset]",
        seen: Observed,
        look: Callable[[], Look],
    ) -> list[Form]:
        """Says which rows count in each term, and how much."""
        where, to_all = type(self).__name__, self.target == "all"
        if to_all and isinstance(self.inner, TraceIWAE_ELBO) and not look().one_scale:
            raise ValueError(
                f"{where}: expected one scale around all observed sites for target='all' with "
                "TraceIWAE_ELBO inside, got several, such as weights of modalities. That of a "
                "subset would stand inside the logarithm with them. Leave the weights out, or use "
                "target='subset'."
            )
        if not _has_masks(seen):
            if to_all and seen.values and not forms:
                _raise_not_covered(where, seen.num_rows)
            return [replace(form, weight=1 / len(forms)) for form in forms] if to_all else forms
        masks = [subset.rows(seen) for subset in subsets]
        weight: float | torch.Tensor = 1.0
        if to_all:
            count = torch.stack(masks).sum(0) if masks else torch.zeros(seen.num_rows)
            anything = torch.stack([seen.mask(name) for name in seen.values]).any(0)
            if missed := int((anything & (count == 0).to(anything.device)).sum()):
                _raise_not_covered(where, missed)
            weight = 1 / count.clamp(min=1).to(_dtype_of(seen))
        dim = self._dim_of_rows(look(), seen.num_rows)
        return [
            replace(form, rows=Rows(dim, mask, weight))
            for form, mask in zip(forms, masks, strict=True)
        ]

    def _dim_of_rows(self, look: Look, num_rows: int) -> int:
        """The dimension of the plate over the rows, negative."""
        where = type(self).__name__
        if len(look.dims) != 1:
            raise ValueError(
                f"{where}: expected one plate over the {num_rows} rows of the batch, around every "
                "observed site and every latent of a row, got the plates "
                f"{list(look.plates)} over data. Without it no row can be left out; write "
                "`with pyro.plate('data', num_rows):` around them."
            )
        (dim,) = look.dims
        outside = [name for name, around in look.around.items() if dim not in around]
        if outside and self.target == "all":
            raise ValueError(
                f"{where}: expected every random site inside the plate over the rows, got site "
                f"'{outside[0]}' outside it. Rows with different modalities missing have "
                "different weights, and all share this site: make it a parameter, or use "
                "target='subset'."
            )
        return dim


@dataclass(frozen=True)
class _Subset:
    """Modalities that the guide sees.

    Attributes:
        names: Those of them that the batch holds.
        whole: Whether it counts only in rows that hold all of it, or stands for what is left.
        trains: Whether it is a term of the training loss.
        reports: Whether it is a term of the reported loss.
    """

    names: tuple[str, ...]
    whole: bool = True
    trains: bool = True
    reports: bool = False

    def rows(self, seen: Observed) -> torch.Tensor:
        """Where it counts, bool, ``(batch,)``."""
        masks = torch.stack([seen.mask(name) for name in self.names])
        return masks.all(0) if self.whole else masks.any(0)


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
            return float(self.of(self.inner.loss))

    def training_loss(self) -> torch.Tensor:
        inner = self.inner
        own = isinstance(inner, Objective)
        return torch.as_tensor(self.of(inner.training_loss if own else inner.differentiable_loss))


def _draw_subsets(names: tuple[str, ...], num: int) -> list[tuple[str, ...]]:
    """Different subsets, of more than one modality and not all, or all there are of these."""
    num = min(num, 2 ** len(names) - len(names) - 2)
    found: dict[tuple[str, ...], None] = {}
    while len(found) < num:
        members = (torch.rand(len(names)) < 0.5).tolist()
        drawn = tuple(name for name, member in zip(names, members, strict=True) if member)
        if 1 < len(drawn) < len(names):
            found[drawn] = None
    return list(found)


def _has_masks(seen: Observed) -> bool:
    return any(mask is not None for mask in seen.masks.values())


def _dtype_of(seen: Observed) -> torch.dtype:
    dtypes = (value.dtype for value in seen.values.values() if value.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def _raise_not_covered(where: str, num_rows: int) -> None:
    raise ValueError(
        f"{where}: expected for each row with data a subset that is observed as a whole, got none "
        f"for {num_rows} rows, for which there would be no bound. Add each modality alone to "
        "subsets."
    )


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


def _check_choice(where: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{where}: expected {name} to be {' or '.join(map(repr, choices))}, got {value!r}. "
            f"Leave it out for {choices[0]!r}."
        )


def _checked_subsets(where: str, subsets: Any) -> str | tuple[frozenset[str], ...]:
    """What was asked for, where it may be; listed subsets as sets."""
    if isinstance(subsets, str):
        _check_choice(where, "subsets", subsets, _KINDS)
        return subsets
    if not isinstance(subsets, Sequence) or any(
        isinstance(names, str) or not isinstance(names, Collection) for names in subsets
    ):
        raise TypeError(
            f"{where}: expected subsets to be one of {list(_KINDS)} or a list of tuples of names, "
            f"got {subsets!r}. Write [('image',), ('image', 'label')]."
        )
    listed = tuple(map(frozenset, subsets))
    if not listed or not all(listed) or len(set(listed)) < len(listed):
        raise ValueError(
            f"{where}: expected different subsets with at least one modality each, got "
            f"{list(subsets)}. Name each subset once."
        )
    return listed
