"""Priors of categorical latents: as integers, to be summed out, and as one-hot vectors."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import is_validation_enabled
from torch import nn

from pyro_vae.checks import check_at_least
from pyro_vae.one_hot import OneHotStraightThrough, RelaxedOneHot, log_of
from pyro_vae.program import Program
from pyro_vae.schedules import HasValue, Weight, weight_of

__all__ = ["CategoricalPrior", "OneHotPrior", "category_sites", "check_sizes", "check_temperature"]


class _Categories(Program):
    """Abstract: categories of the same number in every latent, with fixed or learnt weights."""

    logits: torch.Tensor

    def __init__(self, num_latents: int, num_categories: int, learn: bool, site: str) -> None:
        check_sizes(type(self).__name__, num_latents, num_categories)
        super().__init__()
        self.num_latents, self.num_categories, self.site = num_latents, num_categories, site
        logits = torch.zeros(num_latents, num_categories)
        if learn:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)


class CategoricalPrior(_Categories):
    """z_l ~ Categorical(weights_l) for l = 1 ... L, integers, each in a site of its own.

    ``TraceEnum_ELBO`` sums them out: in the guide's expectation with ``AmortizedCategorical``, in
    the model with a guide that leaves them out, which gives log p(x) itself. The decoder runs once
    for each of the K^L configurations, whatever the number of rows. Other ELBOs sample them, by the
    score function. Evaluation sums out exactly what the guide leaves out.

    Args:
        num_latents: L.
        num_categories: K of each, two or more.
        learn: Whether the weights are parameters; they are equal at first.
        site: Name of the sample site; with several latents they are called ``"z1"``, ``"z2"``, ...

    Returns (when called inside a plate): the one-hot vectors side by side,
    ``(*sample, batch, L * K)``; enumerated categories stand in ``*sample``.

    Attributes:
        logits: Of the weights, ``(L, K)``.

    Raises:
        TypeError: When called, if a guide's values are no integers.
        ValueError: If L or K is too small; when called, if a guide's category is not one of K.

    Example:
        >>> prior = CategoricalPrior(2, 10)
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 20])
    """

    def __init__(
        self, num_latents: int, num_categories: int, *, learn: bool = False, site: str = "z"
    ) -> None:
        super().__init__(num_latents, num_categories, learn, site)

    def forward(self) -> torch.Tensor:
        """Samples the categories within the plates around the call."""
        parts = []
        for site, logits in zip(
            category_sites(self.site, self.num_latents), self.logits, strict=True
        ):
            # From logits: Categorical clamps small probabilities.
            fn = dist.Categorical(logits=logits)
            category = pyro.sample(site, fn, infer={"enumerate": "parallel"})
            self._check(site, category)
            indices = torch.arange(self.num_categories, device=category.device)
            parts.append((category.unsqueeze(-1) == indices).to(self.logits.dtype))
        # Enumerated latents have a dimension of their own each.
        leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*leading, -1) for part in parts], -1)

    def _check(self, site: str, category: torch.Tensor) -> None:
        if category.is_floating_point():
            raise TypeError(
                f"CategoricalPrior: expected integers at site '{site}', got {category.dtype} of "
                f"shape {tuple(category.shape)}. Use OneHotPrior with a guide of one-hot vectors, "
                "or AmortizedCategorical with this prior."
            )
        if is_validation_enabled() and (category >= self.num_categories).any():
            raise ValueError(
                f"CategoricalPrior: expected categories 0 ... {self.num_categories - 1} at site "
                f"'{site}', got {int(category.max())}. Give prior and guide the same "
                "num_categories."
            )


class OneHotPrior(_Categories):
    """z = (z_1, ..., z_L), one-hot vectors of K categories each, in one site.

    With a ``temperature`` the prior is, while training, a density on the simplex, as a guide of
    relaxed samples needs: ``AmortizedOneHot(..., estimator="gumbel-softmax")``. The loss is then a
    bound for the relaxed model. Its KL is larger than that of the categories, which a point of
    the simplex determines, and at one temperature for both sides it is the same for all: of the
    perturbed logits, up to their common shift. A guide that is sure of a category pays without
    limit, not log K, and may collapse to the prior instead. In eval mode, and so in all evaluation,
    the latents are discrete.

    Args:
        num_latents: L.
        num_categories: K of each, two or more.
        temperature: Of the relaxation, > 0: a number, a 0-d tensor or a schedule, whose tensor is
            read at each run; ``None`` for a prior that is always discrete, as straight-through
            guides need. It may differ from the guide's.
        learn: Whether the weights are parameters; they are equal at first.
        site: Name of the sample site.

    Returns (when called inside a plate): the vectors side by side, ``(*sample, batch, L * K)``.

    Attributes:
        logits: Of the weights, ``(L, K)``.

    Raises:
        TypeError: If ``temperature`` is no number, tensor or schedule.
        ValueError: If L or K is too small or ``temperature`` not positive; when called, if a
            guide's values have another shape, or are one-hot where the prior is relaxed, or
            the reverse.

    Example:
        >>> prior = OneHotPrior(2, 10)
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 20])

    References:
        Maddison et al. (2017), The Concrete distribution, section 3.3 and appendix C.1,
        https://arxiv.org/abs/1611.00712
    """

    def __init__(
        self,
        num_latents: int,
        num_categories: int,
        *,
        temperature: Weight | None = None,
        learn: bool = False,
        site: str = "z",
    ) -> None:
        super().__init__(num_latents, num_categories, learn, site)
        self.temperature = temperature
        if temperature is not None:
            check_temperature("OneHotPrior", temperature)

    def forward(self) -> torch.Tensor:
        """Samples the vectors within the plates around the call."""
        fn, temperature = OneHotStraightThrough(logits=self.logits), None
        if self.temperature is not None and self.training:
            temperature = torch.as_tensor(check_temperature("OneHotPrior", self.temperature))
            fn = RelaxedOneHot(temperature, logits=self.logits)
        code: torch.Tensor = pyro.sample(self.site, fn.to_event(1))
        self._check(code, temperature)
        return code.flatten(-2)

    def _check(self, code: torch.Tensor, temperature: torch.Tensor | None) -> None:
        shape = (self.num_latents, self.num_categories)
        if not code.is_floating_point() or code.shape[-2:] != shape:
            raise ValueError(
                f"OneHotPrior: expected one-hot vectors of shape {shape} at site '{self.site}', "
                f"got {code.dtype} of shape {tuple(code.shape)}. Give prior and guide the same "
                "num_latents and num_categories; for integers use CategoricalPrior."
            )
        if not is_validation_enabled():
            return
        if temperature is not None and log_of(code) is None and (code == 0).any():
            raise ValueError(
                "OneHotPrior: expected points inside the simplex at site "
                f"'{self.site}', because in training the prior is relaxed (temperature="
                f"{float(temperature):g}), got values with zeros. If they are one-hot, as of a "
                "straight-through guide, leave the prior's temperature out; if they come from a "
                "relaxed guide, its temperature is too low for this dtype: raise it."
            )
        if temperature is None and ((code > 0) & (code < 1)).any():
            mode = "in eval mode" if self.temperature is not None else "without a temperature"
            raise ValueError(
                f"OneHotPrior: expected one-hot vectors at site '{self.site}', because {mode} the "
                "prior is discrete, got relaxed values. Give the prior a temperature for training "
                "with a relaxed guide, and put model and guide in the same mode."
            )


def category_sites(site: str, num_latents: int) -> list[str]:
    """Names of the sites of integer latents: "z", or "z1", "z2", ... of several."""
    return [site] if num_latents == 1 else [f"{site}{n}" for n in range(1, num_latents + 1)]


def check_sizes(where: str, num_latents: int, num_categories: int) -> None:
    """Raises unless there are one latent and two categories or more."""
    check_at_least(where, "num_latents", num_latents, 1)
    check_at_least(where, "num_categories", num_categories, 2)


def check_temperature(where: str, temperature: Weight) -> float | torch.Tensor:
    """The temperature at this moment: a positive number, or the tensor of a schedule itself.

    Raises:
        TypeError: If it is no number, tensor or schedule.
        ValueError: If it is not positive and finite, or not 0-d.
    """
    given = temperature.value if isinstance(temperature, HasValue) else temperature
    is_number = isinstance(given, int | float) or (
        isinstance(given, torch.Tensor) and given.dim() == 0
    )
    if is_number and not isinstance(given, bool) and not 0 < float(given) < math.inf:
        raise ValueError(
            f"{where}: expected a temperature > 0, got {float(given)}. Samples near 0 are almost "
            "one-hot and their gradients vary much; 0.5 is a common choice, and a schedule may "
            "end there."
        )
    return weight_of(where, "temperature", temperature)
