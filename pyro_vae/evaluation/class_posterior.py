"""The generative classifier: Bayes' rule with the log-likelihoods of any conditional model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vae.checks import check_at_least, check_batch
from pyro_vae.evaluation.likelihood import importance_weighted_log_likelihood
from pyro_vae.isolation import same_random_numbers_again, without_side_effects
from pyro_vae.pairs import trace_pair
from pyro_vae.traces import is_observed, sites_of

__all__ = ["ClassPosterior", "class_posterior"]

_WHERE = "class_posterior"
_PER_CLASS = ("log_likelihood", "standard_error", "pareto_k")


@dataclass(frozen=True)
class ClassPosterior:
    """Log-likelihoods of every datum under every class, and what Bayes' rule makes of them.

    Attributes:
        log_likelihood: Estimate of log p(x | y), a lower bound in expectation; nats,
            ``(batch, C)``.
        standard_error: Its Monte-Carlo standard error; nats, ``(batch, C)``.
        pareto_k: Shape of the weights' tail, ``(batch, C)``; above 0.7 do not trust the standard
            error.
        log_prior: log p(y), nats, ``(C,)``.
        num_particles: K, for each class.

    Example:
        >>> two = torch.tensor([[-80.0, -80.0], [-79.0, -81.0]])
        >>> posterior = ClassPosterior(two, 0 * two, 0 * two, torch.tensor([0.8, 0.2]).log(), 10)
        >>> posterior.log_prob.exp()
        tensor([[0.8000, 0.2000],
                [0.9673, 0.0327]])
        >>> posterior.predict()
        tensor([0, 0])
    """

    log_likelihood: torch.Tensor
    standard_error: torch.Tensor
    pareto_k: torch.Tensor
    log_prior: torch.Tensor
    num_particles: int

    def __len__(self) -> int:
        return len(self.log_likelihood)

    @property
    def log_marginal(self) -> torch.Tensor:
        """Log p(x) of the mixture of all classes; nats, ``(batch,)``."""
        return (self.log_likelihood + self.log_prior).logsumexp(-1)

    @property
    def log_marginal_standard_error(self) -> torch.Tensor:
        """Standard error of ``log_marginal`` by the delta method; nats, ``(batch,)``."""
        weight = self.log_prob.exp()
        # A class without weight has no part, however uncertain it is.
        parts = torch.where(weight > 0, weight * self.standard_error, 0.0)
        return parts.square().sum(-1).sqrt()

    @property
    def log_prob(self) -> torch.Tensor:
        """Log p(y | x); nats, ``(batch, C)``."""
        return self.log_likelihood + self.log_prior - self.log_marginal.unsqueeze(-1)

    def predict(self) -> torch.Tensor:
        """The most probable class of each datum, int64, ``(batch,)``."""
        return self.log_prob.argmax(-1)

    @staticmethod
    def cat(posteriors: Sequence["ClassPosterior"]) -> "ClassPosterior":
        """Joins the posteriors of several batches, in order.

        Raises:
            ValueError: If there are none, or their priors or numbers of particles differ.
        """
        if not posteriors:
            raise ValueError(
                "ClassPosterior.cat: expected at least one posterior, got none. Pass the "
                "posteriors of your batches."
            )
        first = posteriors[0]
        for other in posteriors[1:]:
            if other.num_particles != first.num_particles:
                raise ValueError(
                    "ClassPosterior.cat: expected the same num_particles in all, got "
                    f"{first.num_particles} and {other.num_particles}. Bounds with different K "
                    "are not comparable: evaluate all batches alike."
                )
            if not torch.equal(other.log_prior, first.log_prior):
                raise ValueError(
                    "ClassPosterior.cat: expected the same log_prior in all, got different ones. "
                    "Evaluate all batches with one prior."
                )
        joined = {name: torch.cat([getattr(p, name) for p in posteriors]) for name in _PER_CLASS}
        return ClassPosterior(
            **joined, log_prior=first.log_prior, num_particles=first.num_particles
        )


def class_posterior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: torch.Tensor,
    *,
    num_classes: int,
    log_prior: torch.Tensor | None = None,
    num_particles: int = 1000,
    chunk_size: int | None = None,
    chunk_bytes: int | None = None,
) -> ClassPosterior:
    r"""Estimates p(y | x) of every datum by Bayes' rule from a model of x given its class.

    .. math:: \hat p(y \mid x) = \frac{p(y) \, \hat p(x \mid y)}{\sum_c p(c) \, \hat p(x \mid c)}

    The likelihoods come from :func:`importance_weighted_log_likelihood`, one run a class on the
    whole batch, with ``y`` of int64 and shape ``(batch,)``. Memory does not grow with the number
    of particles; go through much data in batches and join them by ``ClassPosterior.cat``.

    Each log-likelihood is too low in expectation, by about half its squared standard error where
    the weights behave, and by more for a class whose guide is worse. With few particles the
    classes are not judged alike: watch ``standard_error`` and ``pareto_k``, and raise
    ``num_particles`` until the answer stays. A guide is seldom trained on pairs of a datum and
    a wrong class, so it is there that the bounds are loose.

    Args:
        model: Any callable ``model(x, y)`` that scores x given integer classes y, and not y. A
            prior of y by ``pyro.factor`` would count twice; it cannot be told from a normalising
            constant of p(x | y), so it is not noticed.
        guide: A callable with the same signature.
        x: One batch, ``(batch, *event)``.
        num_classes: C.
        log_prior: log p(y), ``(C,)``; all classes alike by default.
        num_particles: K, for each class.
        chunk_size: See :func:`importance_weighted_log_likelihood`.
        chunk_bytes: Likewise.

    Returns:
        log p(x | y) and log p(y | x) of every datum and class, ``(batch, C)``, and log p(x),
        ``(batch,)``; nats.

    Raises:
        TypeError: If ``x`` is no tensor, or ``log_prior`` no tensor of floats.
        ValueError: If ``num_classes`` is below 2; ``log_prior`` is of another shape or not
            normalised; the model scores the class, too, as integers or one-hot; some datum has no
            density under any class; and as in :func:`importance_weighted_log_likelihood`, which
            also refuses data outside the support that a single class gives them.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y):  # classes 0 and 1 have means 0 and 2
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(2.0 * y, 0.6))
        ...         pyro.sample("x", dist.Normal(z, 0.8), obs=x)
        >>> def guide(x, y):  # the exact posterior
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(2.0 * y + 0.36 * (x - 2.0 * y), 0.48))
        >>> x = torch.tensor([0.0, 1.0, 3.0])
        >>> posterior = class_posterior(model, guide, x, num_classes=2, num_particles=10)
        >>> exact = torch.sigmoid(2.0 * x - 2.0)
        >>> torch.allclose(posterior.log_prob[:, 1].exp().float(), exact, atol=1e-5)
        True

    References:
        Ng and Jordan (2001), On discriminative vs. generative classifiers; Li et al. (2019),
        Are generative classifiers more robust to adversarial attacks?,
        https://arxiv.org/abs/1802.06552
    """
    check_batch(_WHERE, "x", x)
    check_at_least(_WHERE, "num_classes", num_classes, 2)
    log_p_y = _checked_log_prior(log_prior, num_classes, x.device)
    _refuse_scored_classes(model, guide, x, num_classes)
    estimates = [
        importance_weighted_log_likelihood(
            model,
            guide,
            x,
            torch.full((len(x),), label, device=x.device),
            num_particles=num_particles,
            chunk_size=chunk_size,
            chunk_bytes=chunk_bytes,
        )
        for label in range(num_classes)
    ]
    columns = {name: torch.stack([getattr(e, name) for e in estimates], -1) for name in _PER_CLASS}
    result = ClassPosterior(**columns, log_prior=log_p_y, num_particles=num_particles)
    impossible = result.log_marginal == -math.inf
    if impossible.any():
        raise ValueError(
            f"{_WHERE}: expected every datum to have a density under some class, got none for "
            f"{int(impossible.sum())} of {len(x)} rows, the first of them "
            f"{int(impossible.nonzero()[0])}. Look at the likelihood, or leave those rows out."
        )
    return result


def _checked_log_prior(log_prior: Any, num_classes: int, device: torch.device) -> torch.Tensor:
    """The prior in float64 on the device of the data."""
    if log_prior is None:
        uniform = torch.full((num_classes,), -math.log(num_classes), dtype=torch.float64)
        return uniform.to(device)
    if not isinstance(log_prior, torch.Tensor) or not log_prior.is_floating_point():
        got = getattr(log_prior, "dtype", type(log_prior).__name__)
        raise TypeError(
            f"{_WHERE}: expected log_prior to be a tensor of floats, got {got}. Pass the "
            "logarithms of the classes' probabilities, for instance (labels.bincount() / "
            "len(labels)).log()."
        )
    if tuple(log_prior.shape) != (num_classes,):
        raise ValueError(
            f"{_WHERE}: expected log_prior of shape ({num_classes},), got "
            f"{tuple(log_prior.shape)}. It has one entry for each class."
        )
    total = float(log_prior.detach().double().logsumexp(0).exp())
    if not abs(total - 1) <= torch.finfo(log_prior.dtype).eps ** 0.5:
        raise ValueError(
            f"{_WHERE}: expected a log_prior whose probabilities sum to 1, got {total:g}. "
            "Pass logarithms, and normalise them with log_prior.log_softmax(-1)."
        )
    return log_prior.detach().to(device, torch.float64)


def _refuse_scored_classes(
    model: Callable[..., Any], guide: Callable[..., Any], x: torch.Tensor, num_classes: int
) -> None:
    """Of a model of x and y together, the prior of the class would count twice."""
    scored = []
    for label in (0, num_classes - 1):
        y = torch.full((len(x),), label, device=x.device)
        with same_random_numbers_again(), without_side_effects(model, guide):
            pair = trace_pair(model, guide, (x, y), {}, _WHERE)
        sites = sites_of(pair.model_trace, is_observed).items()
        scored.append({n for n, site in sites if _is_class(site["value"], label, num_classes)})
    for name in scored[0] & scored[1]:
        raise ValueError(
            f"{_WHERE}: expected a model of x given its class, got one that scores the class as "
            f"well, at site '{name}'. Leave that site out, "
            f"pyro.poutine.block(model, hide=['{name}']), and pass its prior as log_prior."
        )


def _is_class(value: Any, label: int, num_classes: int) -> bool:
    """Whether a site observes the class itself, or its one-hot vector, in all rows."""
    value = torch.as_tensor(value)
    one_hot = torch.arange(num_classes, device=value.device) == label
    if not value.numel():  # A factor.
        return False
    is_one_hot = value.shape[-1:] == one_hot.shape and bool((value == one_hot).all())
    return is_one_hot or bool((value == label).all())
