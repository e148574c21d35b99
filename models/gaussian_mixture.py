"""The mixture of Gaussians: a model with a discrete latent."""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints, transform_to

from pyro_vae.baselines import GaussianMixtureFit
from pyro_vae.checks import check_at_least, check_data
from pyro_vae.program import Program

__all__ = ["GaussianMixture"]


class GaussianMixture(Program):
    """z ~ Categorical(weights), x ~ N(locs[z], covariances[z]).

    ``TraceEnum_ELBO`` sums the component out, with a guide that does not sample ``"z"``.

    Args:
        data_dim: D.
        num_components: K.
        covariance: "full", "diagonal" or "spherical".
        name: Name in the param store.

    Attributes:
        locs: Means of the components, ``(K, D)``.
        raw_weights: Logits of the weights, ``(K,)``.
        raw_scale: Unconstrained form of ``scale``.

    Sites: discrete ``"z"`` and ``"x"`` in the plate ``"data"``.

    Example:
        >>> model = GaussianMixture(data_dim=2, num_components=3)
        >>> model.log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
    """

    def __init__(
        self,
        data_dim: int,
        num_components: int,
        *,
        covariance: Literal["full", "diagonal", "spherical"] = "full",
        name: str | None = None,
    ) -> None:
        check_at_least("GaussianMixture", "data_dim", data_dim, 1)
        check_at_least("GaussianMixture", "num_components", num_components, 1)
        shapes = {"full": (data_dim, data_dim), "diagonal": (data_dim,), "spherical": (1,)}
        if covariance not in shapes:
            raise ValueError(
                f"GaussianMixture: expected covariance in {list(shapes)}, got {covariance!r}. "
                "Full covariances have D (D + 1) / 2 parameters per component."
            )
        super().__init__(name)
        self.data_dim, self.num_components, self.covariance = data_dim, num_components, covariance
        # Not PyroParams: those are read from the param store by name, so that a copy of the model
        # would be evaluated with the parameters of the original. Zeros are equal weights and
        # unit variances.
        self.locs = nn.Parameter(torch.randn(num_components, data_dim))
        self.raw_weights = nn.Parameter(torch.zeros(num_components))
        self.raw_scale = nn.Parameter(torch.zeros(num_components, *shapes[covariance]))

    @staticmethod
    def from_fit(fit: GaussianMixtureFit, *, name: str | None = None) -> "GaussianMixture":
        """The model with the parameters of an EM fit (full covariances), in the default dtype."""
        num_components, data_dim = fit.locs.shape
        model = GaussianMixture(data_dim, num_components, name=name)
        model.weights, model.scale = fit.weights, torch.linalg.cholesky(fit.covariances)
        model.locs.data.copy_(fit.locs)
        return model

    @property
    def weights(self) -> torch.Tensor:
        """Probabilities of the components, ``(K,)``."""
        return self.raw_weights.softmax(-1)

    @weights.setter
    def weights(self, value: torch.Tensor) -> None:
        _check("weights", value, self.raw_weights.shape, constraints.simplex)
        self.raw_weights.data.copy_(value.log())

    @property
    def scale(self) -> torch.Tensor:
        """Cholesky factors ``(K, D, D)`` of full covariances, else standard deviations.

        Those are ``(K, D)`` for diagonal and ``(K, 1)`` for spherical covariances.
        """
        scale: torch.Tensor = transform_to(self._constraint)(self.raw_scale)
        return scale

    @scale.setter
    def scale(self, value: torch.Tensor) -> None:
        _check("scale", value, self.raw_scale.shape, self._constraint)
        self.raw_scale.data.copy_(transform_to(self._constraint).inv(value))

    @property
    def _constraint(self) -> constraints.Constraint:
        full = self.covariance == "full"
        return constraints.lower_cholesky if full else constraints.positive

    def _components(self, z: torch.Tensor | slice) -> dist.TorchDistribution:
        locs, scale = self.locs[z], self.scale[z]
        if self.covariance == "full":
            return dist.MultivariateNormal(locs, scale_tril=scale)
        return dist.Normal(locs, scale).to_event(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the model on a batch ``(batch, D)``; returns ``x``."""
        check_data("GaussianMixture", "x", x, (self.data_dim,))
        # From logits: Categorical clamps small probabilities.
        component = dist.Categorical(logits=self.raw_weights)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", component, infer={"enumerate": "parallel"})
            result: torch.Tensor = pyro.sample("x", self._components(z), obs=x)
        return result

    def _log_joint(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x, z) for every z: nats, ``(batch, K)``."""
        check_data("GaussianMixture", "x", x, (self.data_dim,))
        log_prob: torch.Tensor = self._components(slice(None)).log_prob(x.unsqueeze(-2))
        return log_prob + self.raw_weights.log_softmax(-1)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) of a batch ``(batch, D)``: nats, ``(batch,)``."""
        return self._log_joint(x).logsumexp(-1)

    def posterior(self, x: torch.Tensor) -> dist.Categorical:
        """Exact p(z | x), the responsibilities: batch ``(batch,)``."""
        return dist.Categorical(logits=self._log_joint(x))


def _check(
    name: str, value: torch.Tensor, shape: torch.Size, constraint: constraints.Constraint
) -> None:
    if value.shape != shape or not constraint.check(value).all():
        raise ValueError(
            f"GaussianMixture: expected {name} of shape {tuple(shape)} that satisfy {constraint}, "
            f"got shape {tuple(value.shape)}. Weights add up to one; a full covariance is set by "
            "its Cholesky factor, torch.linalg.cholesky(covariance)."
        )
