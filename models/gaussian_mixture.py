"""The mixture of Gaussians: a model with a discrete latent."""

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch.distributions import constraints

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
        weights: ``(K,)``, on the simplex.
        locs: ``(K, D)``.
        scale: Cholesky factors ``(K, D, D)`` for full covariances; standard deviations
            ``(K, D)`` for diagonal and ``(K, 1)`` for spherical ones.

    Sites: discrete ``"z"`` and ``"x"`` in the plate ``"data"``.

    Example:
        >>> model = GaussianMixture(data_dim=2, num_components=3)
        >>> model.log_prob(torch.zeros(7, 2)).shape
        torch.Size([7])
    """

    # Attributes of type PyroParam read as tensors.
    weights: Any
    locs: Any
    scale: Any

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
        starts = {
            "full": torch.eye(data_dim).expand(num_components, -1, -1).clone(),
            "diagonal": torch.ones(num_components, data_dim),
            "spherical": torch.ones(num_components, 1),
        }
        if covariance not in starts:
            raise ValueError(
                f"GaussianMixture: expected covariance in {list(starts)}, got {covariance!r}. "
                "Full covariances have D (D + 1) / 2 parameters per component."
            )
        super().__init__(name)
        self.data_dim, self.num_components, self.covariance = data_dim, num_components, covariance
        self.weights = PyroParam(
            torch.full((num_components,), 1 / num_components), constraints.simplex
        )
        self.locs = PyroParam(torch.randn(num_components, data_dim))
        if covariance == "full":
            self.scale = PyroParam(starts["full"], constraints.lower_cholesky)
        else:
            self.scale = PyroParam(starts[covariance], constraints.positive)

    @staticmethod
    def from_fit(fit: GaussianMixtureFit, *, name: str | None = None) -> "GaussianMixture":
        """The model with the parameters of an EM fit (full covariances), in the default dtype."""
        num_components, data_dim = fit.locs.shape
        model = GaussianMixture(data_dim, num_components, name=name)
        dtype = torch.get_default_dtype()
        model.weights = fit.weights.to(dtype)
        model.locs = fit.locs.to(dtype)
        model.scale = torch.linalg.cholesky(fit.covariances).to(dtype)
        return model

    def _components(self, z: torch.Tensor | slice) -> dist.TorchDistribution:
        locs, scale = self.locs[z], self.scale[z]
        if self.covariance == "full":
            return dist.MultivariateNormal(locs, scale_tril=scale)
        return dist.Normal(locs, scale).to_event(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the model on a batch ``(batch, D)``; returns ``x``."""
        check_data("GaussianMixture", "x", x, (self.data_dim,))
        weights = self.weights
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            result: torch.Tensor = pyro.sample("x", self._components(z), obs=x)
        return result

    def _log_joint(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x, z) for every z: nats, ``(batch, K)``."""
        check_data("GaussianMixture", "x", x, (self.data_dim,))
        log_prob: torch.Tensor = self._components(slice(None)).log_prob(x.unsqueeze(-2))
        return log_prob + self.weights.log()

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) of a batch ``(batch, D)``: nats, ``(batch,)``."""
        return self._log_joint(x).logsumexp(-1)

    def posterior(self, x: torch.Tensor) -> dist.Categorical:
        """Exact p(z | x), the responsibilities: batch ``(batch,)``."""
        return dist.Categorical(logits=self._log_joint(x))
