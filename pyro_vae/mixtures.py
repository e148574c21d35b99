"""Mixtures of diagonal normals with reparameterised samples, and draws in proportion."""

from typing import Any

import pyro.distributions as dist
import torch

__all__ = ["FixedNormalMixture", "NormalMixture", "stratified_components"]


class FixedNormalMixture(dist.MixtureSameFamily):  # type: ignore[misc]
    r"""sum_k w_k N(loc_k, diag scale_k^2) with weights that are not learnt.

    A sample follows the component it came from, :math:`z = \mu_k + \sigma_k \epsilon`. As long as
    the weights are constants, that gives exact gradients of locs and scales; use
    :class:`NormalMixture` where they are not. A component of logit ``-inf`` is absent.

    Example:
        >>> components = dist.Normal(torch.zeros(5, 4, 3), torch.ones(5, 4, 3)).to_event(1)
        >>> q = FixedNormalMixture(dist.Categorical(logits=torch.zeros(5, 4)), components)
        >>> q.rsample().shape
        torch.Size([5, 3])
    """

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws with gradients: ``(*sample_shape, *batch, dim)``."""
        return self.rsample_of(self.mixture_distribution.sample(sample_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws without gradients: ``(*sample_shape, *batch, dim)``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample_of(self, component: torch.Tensor) -> torch.Tensor:
        """Draws from given components, int64 ``(*sample, *batch)``: ``(*sample, *batch, dim)``."""
        normal = self.component_distribution.base_dist
        dim = normal.loc.shape[-1]
        index = component[..., None, None].expand(*component.shape, 1, dim)
        shape = component.shape + normal.loc.shape[-2:]
        loc, scale = (
            part.expand(shape).gather(-2, index).squeeze(-2) for part in (normal.loc, normal.scale)
        )
        return loc + scale * torch.randn_like(loc)


class NormalMixture(dist.MixtureSameFamily):  # type: ignore[misc]
    r"""q(z) = sum_k w_k N(loc_k, diag scale_k^2), whose samples carry exact gradients.

    The distribution functions :math:`F_d(z_d \mid z_1, \dots, z_{d-1})` of the mixture map its
    samples to uniform ones, T(z) = u, and implicit differentiation at fixed u gives
    :math:`dz = -(\partial T / \partial z)^{-1}\, dT`: of locs, scales and weights alike.
    Pyro's ``MixtureOfDiagNormals`` has the same density, but wrong gradients of the weights.

    The gradient of the weights rests on the samples between the components: the farther those
    lie apart, the rarer and larger these contributions are.

    Example:
        >>> components = dist.Normal(torch.zeros(5, 4, 3), torch.ones(5, 4, 3)).to_event(1)
        >>> NormalMixture(dist.Categorical(logits=torch.zeros(5, 4)), components).rsample().shape
        torch.Size([5, 3])

    References:
        Figurnov et al. (2018), Implicit reparameterization gradients, section 3;
        Graves (2016), Stochastic backpropagation through mixture density distributions.
    """

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> torch.Tensor:
        """Draws with gradients: ``(*sample_shape, *batch, dim)``."""
        z: torch.Tensor = self.sample(sample_shape)
        if not torch.is_grad_enabled():
            return z
        normal = self.component_distribution.base_dist
        uniform, jacobian = self._to_uniform(z, normal.loc, normal.scale)
        change = (uniform - uniform.detach()).unsqueeze(-1)  # Zero, but for its gradient.
        moved = torch.linalg.solve_triangular(jacobian.detach(), change, upper=False)
        return z - moved.squeeze(-1)

    def _to_uniform(
        self, z: torch.Tensor, loc: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """T(z), ``(..., dim)``, and its lower triangular Jacobian, ``(..., dim, dim)``.

        Below, component k and dimension d are the last two dimensions, ``(..., K, dim)``.
        """
        standard = (z.unsqueeze(-2) - loc) / scale
        log_density = dist.Normal(loc, scale).log_prob(z.unsqueeze(-2))
        # Weights of the components given the coordinates before d.
        # Not the cumulated sum minus its last term: that would cancel in float32.
        none = torch.zeros_like(log_density[..., :1])
        before = torch.cat([none, log_density[..., :-1]], -1).cumsum(-1)
        weights = (self.mixture_distribution.logits.unsqueeze(-1) + before).softmax(-2)
        cdf = torch.special.ndtr(standard)
        uniform = (weights * cdf).sum(-2)
        with torch.no_grad():
            density = (weights * log_density.exp()).sum(-2)
            # dF_d / dz_i, i < d, through the weights: sum_k w_dk (Phi_dk - F_d) dlog N_ki / dz_i.
            excess = weights * (cdf - uniform.unsqueeze(-2))
            jacobian = excess.mT @ (-standard / scale)
        return uniform, jacobian.tril(-1) + density.diag_embed()


def stratified_components(
    probs: torch.Tensor, position: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Components in proportion to their weights: systematic sampling.

    Of P particles at positions 0 ... P - 1 over P, component k gets P w_k, rounded up or down at
    random; earlier particles get earlier components. Over all particles and offsets together
    the components have their weights exactly.

    Args:
        probs: Weights, ``(*batch, K)``.
        position: i / P for each particle, broadcasts with ``batch``.
        offset: Uniform in [0, 1 / P), the same for all particles of a row; broadcasts likewise.

    Returns:
        Indices, int64, ``(*batch)``; never of a component of weight 0.

    Example:
        >>> probs = torch.tensor([0.5, 0.0, 0.5]).expand(4, 3)
        >>> stratified_components(probs, torch.arange(4) / 4, torch.tensor(0.1))
        tensor([0, 0, 2, 2])

    References:
        Owen (2013), Monte Carlo theory, methods and examples, sections 8.4 and 9.11.
    """
    cumulated = probs.cumsum(-1)
    # Rounding must not carry the last particle past the last component that has weight.
    below_one = 1 - 2 * torch.finfo(probs.dtype).eps
    level = (position + offset).clamp(max=below_one) * cumulated[..., -1]
    return (level.unsqueeze(-1) >= cumulated).sum(-1)
