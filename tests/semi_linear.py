"""A linear-Gaussian model with classes: its marginals, and its posterior as a guide."""

import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.conditioning import Concatenate, OneHot
from pyro_vae.guides.semi_supervised import AmortizedSemiSupervised
from pyro_vae.likelihoods import Normal
from pyro_vae.models.semi_supervised import SemiSupervisedVAE
from pyro_vae.priors import StandardNormalPrior

C, D, K = 3, 4, 2
NOISE = 0.7
Y = torch.tensor([2, 0, 1, -1, 7, -1])
LABELLED = torch.tensor([True, True, True, False, False, False])


class LinearClasses:
    """x ~ N(W z + locs[y], s^2), W with orthogonal columns so that the posterior is diagonal."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        random = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.weight = torch.linalg.qr(random)[0][:, :K] * torch.tensor([1.5, 0.8])
        self.locs = 2 * torch.randn(C, D, generator=generator, dtype=torch.float64)
        self.probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        self.x = 2 * torch.randn(len(Y), D, generator=generator, dtype=torch.float64)
        decoder = nn.Linear(K + C, D)
        decoder.weight.data.copy_(torch.cat([self.weight, self.locs.T], 1))
        decoder.bias.data.zero_()
        self.model = SemiSupervisedVAE(
            Concatenate(decoder, embed=OneHot(C)),
            Normal(NOISE),
            StandardNormalPrior(K),
            C,
            class_probs=self.probs,
        )
        self.guide = AmortizedSemiSupervised(_Classifier(self), _Posterior(self), C)

    def log_joint(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x, y) of every class: ``(rows, C)``."""
        cov = self.weight @ self.weight.T + NOISE**2 * torch.eye(D)
        log_prob: torch.Tensor = dist.MultivariateNormal(self.locs, cov).log_prob(x[:, None])
        return log_prob + self.probs.log()

    def log_marginal(
        self, y: torch.Tensor | None = None, labelled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log p(x, y) of rows with a label and log p(x) of the others: ``(rows,)``."""
        joint = self.log_joint(self.x)
        if y is None:
            return joint.logsumexp(1)
        labelled = torch.ones_like(y, dtype=torch.bool) if labelled is None else labelled
        of_label = joint.gather(1, torch.where(labelled, y, 0)[:, None])[:, 0]
        return torch.where(labelled, of_label, joint.logsumexp(1))


class _Classifier(nn.Module):
    def __init__(self, exact: LinearClasses) -> None:
        super().__init__()
        self.exact = (exact,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.exact[0].log_joint(x)


class _Posterior(nn.Module):
    """The locs and raw scales of p(z | x, y)."""

    def __init__(self, exact: LinearClasses) -> None:
        super().__init__()
        self.exact = (exact,)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        exact = self.exact[0]
        precision = 1 + (exact.weight**2).sum(0) / NOISE**2
        loc = (x - exact.locs[y]) @ exact.weight / NOISE**2 / precision
        raw_scale = (precision.rsqrt() - 1e-6).expm1().log()  # Undoes what NormalEncoder does.
        return torch.cat([loc, raw_scale.expand_as(loc)], -1)
