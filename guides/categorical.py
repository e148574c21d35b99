"""Amortized guides of categorical latents: as integers, to be summed over, or one-hot vectors."""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK, InferDict
from torch import nn

from pyro_vae.categorical_priors import category_sites, check_sizes, check_temperature
from pyro_vae.checks import check_batch
from pyro_vae.guides.vae import _Amortized
from pyro_vae.one_hot import OneHotStraightThrough, RelaxedOneHot
from pyro_vae.program import Program
from pyro_vae.schedules import Weight

__all__ = ["AmortizedCategorical", "AmortizedOneHot"]

Estimator = Literal["straight-through", "gumbel-straight-through", "gumbel-softmax"]

ESTIMATORS = ("straight-through", "gumbel-straight-through", "gumbel-softmax")


class AmortizedCategorical(Program):
    """q(z | x) = prod_l Categorical(z_l; weights_l(x)), integers, each in a site of its own.

    With ``TraceEnum_ELBO`` the expectation over all K^L configurations is exact, and so is its
    gradient. ``Trace_ELBO`` and ``TraceIWAE_ELBO(K, "vimco")`` sample instead: their gradient, by
    the score function, is unbiased and noisy. The model's prior is ``CategoricalPrior``.

    Args:
        network: From data to ``num_latents * num_categories`` numbers, the logits. With a context
            it is called ``network(x, context)``, see ``pyro_vae.conditioning``.
        num_latents: L.
        num_categories: K of each, two or more.
        site: Name of the latent site; with several latents they are called ``"z1"``, ``"z2"``, ...
        name: Name in the param store.

    Raises:
        ValueError: If L or K is too small; when called, if the network has another number of
            outputs or does not encode every row.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> guide = AmortizedCategorical(MLP(64, [32], 2 * 10), num_latents=2, num_categories=10)
        >>> z1, z2 = guide(torch.zeros(5, 64))
        >>> z1.shape
        torch.Size([5])
    """

    def __init__(
        self,
        network: nn.Module,
        num_latents: int,
        num_categories: int,
        *,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        check_sizes("AmortizedCategorical", num_latents, num_categories)
        super().__init__(name)
        self.network, self.site = network, site
        self.num_latents, self.num_categories = num_latents, num_categories

    def forward(
        self, x: torch.Tensor, *context: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Samples categories for a batch ``(batch, *event)``.

        Returns:
            int64, ``(*sample, batch)``; of several latents a tuple of these, which broadcast.
        """
        where = "AmortizedCategorical"
        check_batch(where, "x", x)
        logits = _logits(where, self.network(x, *context), self.num_latents, self.num_categories)
        if logits.shape[:-2] != (len(x),):
            raise ValueError(
                f"{where}: expected the network to encode each of {len(x)} rows, got an output of "
                f"shape {(*logits.shape[:-2], self.num_latents * self.num_categories)} from x of "
                f"shape {tuple(x.shape)}. Flatten each datum (x.flatten(1)), or use a network for "
                "data of that shape."
            )
        # Not always: an ELBO that does not enumerate warns of sites that ask for it.
        enumerating = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
        infer: InferDict = {"enumerate": "parallel"} if enumerating else {}
        sites = category_sites(self.site, self.num_latents)
        with pyro.plate("data", len(x)):
            codes = tuple(
                pyro.sample(site, dist.Categorical(logits=of_site), infer=infer.copy())
                for site, of_site in zip(sites, logits.unbind(-2), strict=True)
            )
        return codes[0] if len(codes) == 1 else codes


class AmortizedOneHot(_Amortized):
    r"""q(z | x) of L one-hot vectors of K categories each, whose samples carry gradients.

    In eval mode, and so in all evaluation, samples are plain one-hot vectors. In training they are,
    by ``estimator``:

    - ``"straight-through"``: one-hot, with the gradient of the probabilities.
    - ``"gumbel-straight-through"``: one-hot, with the gradient of a relaxed sample that has the
      same noise.
    - ``"gumbel-softmax"``: relaxed, with their own exact gradient. They need a relaxed prior:
      ``OneHotPrior(..., temperature=...)``. The loss is then a bound for the relaxed model.

    The first two need a discrete prior, ``OneHotPrior`` without a temperature: the loss is the true
    bound, its gradient biased. ``TraceMeanField_ELBO`` has the KL and its gradient exactly, so
    that only the gradient of the reconstruction is biased. In a model of your own write the prior
    as a ``pyro_vae.one_hot.OneHotStraightThrough`` too, which says why. Where K^L is small,
    :class:`AmortizedCategorical` with ``TraceEnum_ELBO`` has no bias and no noise.

    Args:
        network: From data to ``num_latents * num_categories`` numbers, the logits. With a context
            it is called ``network(x, context)``, see ``pyro_vae.conditioning``.
        num_latents: L.
        num_categories: K of each, two or more.
        estimator: See above.
        temperature: Of the relaxation, > 0: a number, a 0-d tensor or a schedule, whose tensor is
            read at each run. High ones make more bias, low ones more noise.
        site: Name of the latent site, of events ``(L, K)``.
        name: Name in the param store.

    Raises:
        TypeError: If ``temperature`` is no number, tensor or schedule.
        ValueError: If L or K is too small; ``estimator`` is unknown; ``temperature`` is not
            positive, is missing, or is given where it plays no role; when called, if the network
            has another number of outputs or does not encode every row.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> network = MLP(64, [32], 2 * 10)
        >>> guide = AmortizedOneHot(network, num_latents=2, num_categories=10)
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 2, 10])

    References:
        Bengio et al. (2013), Estimating or propagating gradients through stochastic neurons for
        conditional computation, https://arxiv.org/abs/1308.3432;
        Jang et al. (2017), Categorical reparameterization with Gumbel-softmax,
        https://arxiv.org/abs/1611.01144;
        Maddison et al. (2017), The Concrete distribution, https://arxiv.org/abs/1611.00712
    """

    def __init__(
        self,
        network: nn.Module,
        num_latents: int,
        num_categories: int,
        *,
        estimator: Estimator = "straight-through",
        temperature: Weight | None = None,
        site: str = "z",
        name: str | None = None,
    ) -> None:
        check_sizes("AmortizedOneHot", num_latents, num_categories)
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"AmortizedOneHot: expected estimator in {list(ESTIMATORS)}, got {estimator!r}. "
                "They differ in training alone."
            )
        if (temperature is None) != (estimator == "straight-through"):
            needs = "no temperature" if temperature is not None else "a temperature"
            fix = "Leave it out" if temperature is not None else "Pass temperature=0.5, for example"
            raise ValueError(
                f"AmortizedOneHot: expected {needs} with estimator='{estimator}', got "
                f"{temperature}. {fix}."
            )
        if temperature is not None:
            check_temperature("AmortizedOneHot", temperature)
        super().__init__(site, name)
        self.encoder = _OneHotEncoder(network, num_latents, num_categories, estimator, temperature)


class _OneHotEncoder(nn.Module):
    """Turns a network's output into a distribution over L one-hot vectors, or relaxed ones."""

    def __init__(
        self,
        net: nn.Module,
        num_latents: int,
        num_categories: int,
        estimator: str,
        temperature: Weight | None,
    ) -> None:
        super().__init__()
        self.net, self.num_latents, self.num_categories = net, num_latents, num_categories
        self.estimator, self.temperature = estimator, temperature

    def forward(self, x: torch.Tensor, *context: torch.Tensor) -> TorchDistribution:
        """Encodes ``x`` into a distribution of batch ``(*sample, batch)``."""
        out = self.net(x, *context)
        logits = _logits("AmortizedOneHot", out, self.num_latents, self.num_categories)
        if self.temperature is None or not self.training:
            return OneHotStraightThrough(logits=logits).to_event(1)
        temperature = torch.as_tensor(check_temperature("AmortizedOneHot", self.temperature))
        if self.estimator == "gumbel-softmax":
            return RelaxedOneHot(temperature, logits=logits).to_event(1)
        return OneHotStraightThrough(logits=logits, temperature=temperature).to_event(1)


def _logits(where: str, out: torch.Tensor, num_latents: int, num_categories: int) -> torch.Tensor:
    """A network's output as ``(*sample, batch, L, K)``."""
    if out.dim() == 0 or out.shape[-1] != num_latents * num_categories:
        raise ValueError(
            f"{where}: expected {num_latents * num_categories} outputs for num_latents="
            f"{num_latents} and num_categories={num_categories}, got shape {tuple(out.shape)}. "
            "Give the network num_latents * num_categories outputs."
        )
    return out.unflatten(-1, (num_latents, num_categories))
