"""Messages for parameters and arguments of the multimodal linear-Gaussian model that do not fit."""

from collections.abc import Mapping

from torch import Tensor
from torch.distributions import constraints

__all__ = ["check_parameters"]

_WHERE = "MultimodalLinearGaussian"


def check_parameters(
    loc: Mapping[str, Tensor], weight: Mapping[str, Tensor], noise: Mapping[str, Tensor]
) -> None:
    """Raise unless the parameters fit together."""
    if not loc or set(loc) != set(weight) or set(loc) != set(noise):
        raise ValueError(
            f"{_WHERE}: expected loc, weight and noise_covariance of the same modalities, got "
            f"{list(loc)}, {list(weight)} and {list(noise)}. Pass one tensor of each."
        )
    latent_dim = next(iter(weight.values())).shape[-1:]
    for name, mean in loc.items():
        if mean.ndim != 1 or weight[name].shape != mean.shape + latent_dim:
            raise ValueError(
                f"{_WHERE}: expected loc of shape (D,) and weight of shape (D, L) of modality "
                f"'{name}', the same L in all, got {tuple(mean.shape)} and "
                f"{tuple(weight[name].shape)}. Pass one row of loadings per column of x."
            )
        if noise[name].shape not in (mean.shape, mean.shape * 2):
            raise ValueError(
                f"{_WHERE}: expected noise_covariance of modality '{name}' of shape ({len(mean)},) "
                f"or ({len(mean)}, {len(mean)}), got {tuple(noise[name].shape)}. Pass the diagonal "
                "or the whole matrix."
            )
        value = noise[name].detach()
        domain = constraints.positive if value.ndim == 1 else constraints.positive_definite
        if not (value.isfinite().all() and domain.check(value).all()):
            raise ValueError(
                f"{_WHERE}: expected a positive definite noise_covariance of modality '{name}', "
                "got one that is singular, asymmetric or not finite. Pass variances, not "
                "logarithms, and a symmetric matrix."
            )
