"""Coherence: whether modalities that are generated together, or from one another, agree."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine

from pyro_vae.checks import check_at_least
from pyro_vae.drawn_sites import DrawMessenger, moved_by
from pyro_vae.evaluation.labelled import LabelledBatch, Rate, check_names, subsets_of, table
from pyro_vae.isolation import without_side_effects
from pyro_vae.latents import generate, reconstruct
from pyro_vae.traces import is_random, sites_of

__all__ = ["Coherence", "coherence"]

_WHERE = "coherence"

Classifier = Callable[[torch.Tensor], torch.Tensor]
Given = tuple[str, ...]


@dataclass(frozen=True)
class Coherence:
    """How often classifiers recognise what a model generates; printed, a table.

    Attributes:
        accuracy: Of each classifier on the rows of the real batch that have its modality. The
            others cannot be judged better than their classifiers.
        joint: Fraction of joint draws from the prior in which all classifiers name one class;
            ``None`` if there is one classifier only. Its rows are the draws.
        cross: By given subset and target: fraction of generated targets that are recognised as
            the row's true class, over the rows in which the whole subset is present.
        num_samples: Draws for each row.
    """

    accuracy: Mapping[str, Rate]
    joint: Rate | None
    cross: Mapping[tuple[Given, str], Rate]
    num_samples: int

    def __str__(self) -> str:
        rows = [("given", "target", "right", "s.e.", "rows")]
        rows += [("(real data)", name, *rate.cells()) for name, rate in self.accuracy.items()]
        if self.joint is not None:
            rows.append(("(prior)", "all agree", *self.joint.cells()))
        for (given, target), rate in self.cross.items():
            rows.append((", ".join(given), target, *rate.cells()))
        return table(rows, num_left=2)


def coherence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    classifiers: Mapping[str, Classifier],
    *,
    present: Mapping[str, torch.Tensor] | None = None,
    sites: Mapping[str, str] | None = None,
    given: Collection[Given] | None = None,
    num_samples: int = 1,
) -> Coherence:
    """Joint and cross-modal coherence, as classifiers of single modalities see it.

    Joint: modalities are drawn from the prior together, and their classes compared with one
    another. If modalities ignored one another, M classifiers would still agree on one of K
    classes by chance, in K^(1 - M) of the draws for equally frequent classes; and a model that
    draws one class only is fully coherent.

    Cross: codes are drawn from the guide given some modalities, the others generated at these
    codes, and their classes compared with the labels.

    Data are the means of the likelihood given a code, of classes the mode. The programs are called
    as ``model(batch, present)``: ``batch[m]`` is ``None`` for a modality that is not given, which
    the guide leaves out and the model draws; ``present`` is ``None`` if it is here.

    Evaluation only: modules run in eval mode, no gradient is kept, parameters are not touched.
    Programs run on all rows at once: pass some hundreds or thousands.

    Args:
        model: Any model of that signature.
        guide: Its guide.
        batch: Real data ``(batch, *event)`` by modality.
        labels: True classes 0, 1, ..., integers of shape ``(batch,)``.
        classifiers: By modality, from data ``(batch, *event)`` to logits of the classes,
            ``(batch, classes)``, or to the classes, integers ``(batch,)``. So a modality that is
            the label itself has the identity as classifier, ``lambda y: y``. Modalities without a
            classifier are given, but never targets.
        present: bool ``(batch,)`` by modality; one without a key is present in all rows. Other
            values are not looked at.
        sites: Observed site of the model by modality, ``"x_<modality>"`` where not named.
        given: Which subsets are given in turn; all but the full one for up to 4 modalities.
        num_samples: Draws for each row. Standard errors are over the rows, averaged over these.

    Returns:
        Rates in 0 ... 1 with standard errors and numbers of rows.

    Raises:
        TypeError: If the batch, labels, masks, subsets or a classifier's result are of the wrong
            type.
        ValueError: If there are fewer than two modalities, or more than 4 and no ``given``; a
            modality or site is unknown; a shape does not fit; a classifier has fewer classes
            than the labels or returns NaN; something given depends on the value of a target,
            which the model then cannot draw.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(batch, present):  # Two copies of a code that is the class.
        ...     num = next(len(x) for x in batch.values() if x is not None)
        ...     with pyro.plate("data", num):
        ...         z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(num)))
        ...         for name, x in batch.items():
        ...             pyro.sample(f"x_{name}", dist.Normal(z, 0.1), obs=x)
        >>> def guide(batch, present):
        ...     x = next(x for x in batch.values() if x is not None)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli((x > 0.5) * 1.0))
        >>> y = torch.arange(6) % 2
        >>> batch = {"left": y * 1.0, "right": y * 1.0}
        >>> round_off = {name: lambda x: x.round().long() for name in batch}
        >>> print(coherence(model, guide, batch, y, round_off))
        given        target     right   s.e.  rows
        (real data)  left       1.000  0.000     6
        (real data)  right      1.000  0.000     6
        (prior)      all agree  1.000  0.000     6
        left         right      1.000  0.000     6
        right        left       1.000  0.000     6

    References:
        Shi et al. (2019), Variational mixture-of-experts autoencoders for multi-modal deep
        generative models, https://arxiv.org/abs/1911.03393. Sutter et al. (2021),
        Generalized multimodal ELBO, https://arxiv.org/abs/2105.02470, who give
        subsets.
    """
    data = LabelledBatch(_WHERE, batch, labels, present)
    names = list(data.data)
    check_at_least(_WHERE, "num_samples", num_samples, 1)
    check_names(_WHERE, "classifiers", classifiers, names)
    check_names(_WHERE, "sites", sites or {}, names)
    if not classifiers:
        raise ValueError(
            f"{_WHERE}: expected a classifier for one modality of {names} at least, got none. "
            "Train one on real data."
        )
    subsets = subsets_of(_WHERE, names, given, proper=True)
    with without_side_effects(model, guide, *classifiers.values()):
        judge = _Judge(data, classifiers, {m: f"x_{m}" for m in names} | dict(sites or {}))
        judge.check_model(model, subsets)
        return Coherence(
            accuracy=judge.accuracy(),
            joint=judge.joint(model, num_samples) if len(classifiers) > 1 else None,
            cross={
                (subset, target): rate
                for subset in subsets
                for target, rate in judge.cross(model, guide, subset, num_samples).items()
            },
            num_samples=num_samples,
        )


class _Judge:
    """Classifies real and generated data.

    Args:
        data: The checked batch.
        classifiers: By modality.
        sites: Site of the model by modality.
    """

    def __init__(
        self,
        data: LabelledBatch,
        classifiers: Mapping[str, Classifier],
        sites: Mapping[str, str],
    ) -> None:
        self._data, self._classifiers, self._sites = data, classifiers, sites
        self._num_classes = int(data.labels.max()) + 1

    def check_model(self, model: Callable[..., Any], subsets: Collection[Given]) -> None:
        """Raises unless the model has the sites, and can draw every target given the rest."""
        sites = self._sites
        program = partial(
            DrawMessenger(sites.values())(model), dict(self._data.data), self._data.present
        )
        trace = poutine.trace(program).get_trace()
        found = sites_of(trace, is_random)
        for name, site in sites.items():
            if site not in found:
                raise ValueError(
                    f"{_WHERE}: expected a site '{site}' for modality '{name}', got a model with "
                    f"the sites {list(found)}. Name it with sites={{'{name}': ...}}."
                )
        for target in self._classifiers:
            site = sites[target]
            other = {site: found[site]["fn"].sample()}
            moved = moved_by(program, trace, other, sites.values())
            for name in (name for name in sites if sites[name] in moved):
                if any(name in subset and target not in subset for subset in subsets):
                    raise ValueError(
                        f"{_WHERE}: expected modalities that depend on one another through the "
                        f"latents alone, got '{site}', on whose value '{sites[name]}' depends, so "
                        f"that the model cannot draw '{target}' given '{name}'. Leave that out "
                        "with given=[...]."
                    )

    def accuracy(self) -> dict[str, Rate]:
        """Of each classifier on the rows that have its modality."""
        result = {}
        for name in self._classifiers:
            rows = self._data.rows([name])
            result[name] = Rate.of(torch.zeros(0))
            if rows.any():
                x = self._data.data[name]
                result[name] = Rate.of(self._right(name, x[rows.to(x.device)], rows))
        return result

    def joint(self, model: Callable[..., Any], num_samples: int) -> Rate:
        """How often all classifiers agree on a draw from the prior."""
        names, agree = self._sites, []
        for _ in range(num_samples):
            batch = dict(self._data.data)
            drawn = generate(model, batch, self._data.present, site=list(names.values()))
            seen = [self._classes(name, drawn[names[name]]) for name in self._classifiers]
            classes = torch.stack(seen)
            agree.append((classes == classes[0]).all(0))
        return Rate.of(torch.cat(agree))

    def cross(
        self, model: Callable[..., Any], guide: Callable[..., Any], given: Given, num_samples: int
    ) -> dict[str, Rate]:
        """By target: how often it is recognised when generated from these modalities."""
        names = {n: self._sites[n] for n in self._classifiers if n not in given}
        rows = self._data.rows(given)
        if not rows.any():
            return {name: Rate.of(torch.zeros(0)) for name in names}
        right = {name: torch.zeros(int(rows.sum()), dtype=torch.float64) for name in names}
        for _ in range(num_samples if names else 0):
            batch, present = self._data.only(given, rows)
            wanted = list(names.values())
            made = reconstruct(model, guide, batch, present, site=wanted, sample=True)
            for name, site in names.items():
                right[name] += self._right(name, made[site], rows)
        return {name: Rate.of(times / num_samples) for name, times in right.items()}

    def _right(self, name: str, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Whether these rows of the batch are recognised: bool ``(rows,)`` on the CPU."""
        labels = self._data.labels.cpu()[rows]
        return self._classes(name, x) == labels

    def _classes(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The classes that a classifier sees: int64 ``(batch,)`` on the CPU."""
        output = self._classifiers[name](x)
        what = f"{_WHERE}: expected the classifier of '{name}' to return"
        if not isinstance(output, torch.Tensor) or output.dtype == torch.bool:
            kind = output.dtype if isinstance(output, torch.Tensor) else type(output).__name__
            raise TypeError(
                f"{what} a tensor of logits or of integers, got {kind}. Return logits "
                "(batch, classes) or classes (batch,)."
            )
        if not output.is_floating_point():
            if output.shape != (len(x),):
                raise ValueError(
                    f"{what} classes of shape ({len(x)},), got {tuple(output.shape)}. Where a "
                    "label is a row of one number, use lambda y: y.squeeze(-1)."
                )
            return output.cpu().long()
        if output.dim() != 2 or len(output) != len(x) or output.shape[1] < self._num_classes:
            raise ValueError(
                f"{what} logits of shape ({len(x)}, classes) with at least {self._num_classes} "
                f"classes, or integers of shape ({len(x)},), got {tuple(output.shape)} of "
                f"{output.dtype}. Give it one output for each class of the labels."
            )
        if output.isnan().any():
            raise ValueError(
                f"{what} logits, got NaN in {int(output.isnan().any(1).sum())} of {len(x)} rows. "
                "Look at what the model generates there."
            )
        return output.argmax(1).cpu()
