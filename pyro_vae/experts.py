"""Products and mixtures of experts: tensors in, tensors out. No Pyro.

An expert is what one modality says of the latents. Experts stand side by side in a dimension of
their own, and ``present`` says which of them there are, row by row.
"""

import torch

__all__ = ["mixture_log_prob", "product_of_normals"]


def product_of_normals(
    loc: torch.Tensor,
    scale: torch.Tensor,
    present: torch.Tensor | None = None,
    *,
    log_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The normalised product of diagonal normals, again a diagonal normal.

    .. math::
        \prod_m N(z; \mu_m, \sigma_m^2)^{\alpha_m} \propto N(z; \mu, \sigma^2), \quad
        \sigma^{-2} = \sum_m \alpha_m \sigma_m^{-2}, \quad
        \mu = \sigma^2 \sum_m \alpha_m \sigma_m^{-2} \mu_m

    Precisions are added in log space, so that nearly certain and nearly flat experts go together
    in one product; float16 and bfloat16 are computed in float32. An absent expert is the
    identity: its numbers, which may be NaN, have no influence on values or gradients.

    Args:
        loc: Means, ``(*batch, experts, dim)``.
        scale: Standard deviations, of the same shape.
        present: Which experts take part, bool, ``(*batch, experts)``; all by default.
        log_weight: log alpha, broadcasts with ``loc``; 0 by default, the plain product.

    Returns:
        Mean and standard deviation, ``(*batch, dim)`` each. Where no expert is present, 0 and
        infinity: the product of none is flat.

    Raises:
        TypeError: If ``present`` is not bool.
        ValueError: If the shapes do not fit.

    Example:
        >>> loc = torch.tensor([[0.0], [3.0]])
        >>> scale = torch.tensor([[1.0], [0.5**0.5]])
        >>> product_of_normals(loc, scale)  # precisions 1 and 2
        (tensor([2.]), tensor([0.5774]))
        >>> product_of_normals(loc, scale, torch.tensor([True, False]))
        (tensor([0.]), tensor([1.]))

    References:
        Hinton (2002), Training products of experts by minimizing contrastive divergence;
        Cao and Fleet (2014), Generalized product of experts, https://arxiv.org/abs/1410.7827;
        Wu and Goodman (2018), Multimodal generative models
        https://arxiv.org/abs/1802.05335
    """
    if loc.dim() < 2 or loc.shape != scale.shape:
        raise ValueError(
            "product_of_normals: expected loc and scale of one shape (*batch, experts, dim), got "
            f"{tuple(loc.shape)} and {tuple(scale.shape)}. Stack the experts in dimension -2."
        )
    dtype = loc.dtype
    if dtype in (torch.float16, torch.bfloat16):
        loc, scale = loc.float(), scale.float()
    if present is not None:
        _check_present("product_of_normals", present, loc.shape[:-1])
        present = present.unsqueeze(-1)
        loc, scale = torch.where(present, loc, 0.0), torch.where(present, scale, 1.0)
    log_precision = -2 * scale.log()
    if log_weight is not None:
        try:
            weighted = log_precision + log_weight
        except RuntimeError:
            weighted = log_weight.new_empty(0)
        if weighted.shape != loc.shape:
            raise ValueError(
                f"product_of_normals: expected log_weight that broadcasts with {tuple(loc.shape)}, "
                f"(*batch, experts, dim), got {tuple(log_weight.shape)}. For one weight an expert "
                "write log_weight.unsqueeze(-1)."
            )
        log_precision = weighted
    if present is not None:
        log_precision = torch.where(present, log_precision, -torch.inf)
    share = log_precision.softmax(-2)
    if present is not None:  # Where there is no expert at all, 0 / 0.
        share = torch.where(present, share, 0.0)
    scale = (-log_precision.logsumexp(-2) / 2).exp()
    return (share * loc).sum(-2).to(dtype), scale.to(dtype)


def mixture_log_prob(
    log_prob: torch.Tensor,
    present: torch.Tensor | None = None,
    *,
    log_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Log-density of a mixture of experts, :math:`\log \sum_m \pi_m q_m(z)`.

    The weights are normalised over the experts present, row by row.

    Args:
        log_prob: Log-densities of the experts at one value, ``(*batch, experts)``, nats.
        present: Which experts take part, bool, ``(*batch, experts)``; all by default.
        log_weight: Logarithms of the weights, normalised or not, ``(experts,)`` or more; equal
            weights by default.

    Returns:
        ``(*batch,)``, nats. Where no expert is present, ``-inf``: there is no density.

    Raises:
        TypeError: If ``present`` is not bool.
        ValueError: If the shapes do not fit.

    Example:
        >>> log_prob = torch.tensor([[-1.0, -3.0], [-1.0, -3.0]])
        >>> present = torch.tensor([[True, True], [False, True]])
        >>> mixture_log_prob(log_prob, present)
        tensor([-1.5662, -3.0000])

    References:
        Shi et al. (2019), Variational mixture-of-experts autoencoders,
        https://arxiv.org/abs/1911.03393
    """
    if log_prob.dim() < 1:
        raise ValueError(
            "mixture_log_prob: expected log_prob of shape (*batch, experts), got a number. "
            "Stack the log-densities of the experts in the last dimension."
        )
    weight = torch.zeros_like(log_prob) if log_weight is None else log_weight.expand_as(log_prob)
    if present is None:
        return (log_prob + weight.log_softmax(-1)).logsumexp(-1)
    _check_present("mixture_log_prob", present, log_prob.shape)
    anyone = present.any(-1, keepdim=True)
    # Where nobody is present, numbers that keep the gradients finite stand in until the end.
    counted = present | ~anyone
    weight = torch.where(counted, weight, -torch.inf).log_softmax(-1)
    total = torch.where(present, log_prob, 0.0) + torch.where(counted, weight, -torch.inf)
    return torch.where(anyone.squeeze(-1), total.logsumexp(-1), -torch.inf)


def _check_present(where: str, present: torch.Tensor, shape: torch.Size) -> None:
    if present.dtype != torch.bool:
        raise TypeError(
            f"{where}: expected present to be a bool tensor, got {present.dtype}. "
            "Write present.bool()."
        )
    try:
        fits = torch.broadcast_shapes(present.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{where}: expected present of shape {tuple(shape)}, one entry an expert, got "
            f"{tuple(present.shape)}. Stack the masks in the dimension of the experts."
        )
