"""Summing discrete latents out of a product of factors, in log space and without underflow."""

from collections.abc import Iterable

import torch
from pyro.ops.rings import LogRing

__all__ = ["ExactLogRing", "with_dims"]


def with_dims(tensor: torch.Tensor, dims: str) -> torch.Tensor:
    """Names the dimensions of a packed tensor, one letter each."""
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    return tensor


def _dims(tensor: torch.Tensor) -> str:
    names: str = tensor._pyro_dims  # type: ignore[attr-defined]
    return names


class ExactLogRing(LogRing):
    """Pyro's ring, adding log-factors before it exponentiates their sum.

    Pyro's own exponentiates each factor alone, relative to that factor's maximum. Where two sites
    disagree about a component by more than the range of the dtype, every product is then zero.
    """

    def sumproduct(self, terms: Iterable[torch.Tensor], dims: Iterable[str]) -> torch.Tensor:
        """Adds all terms and sums ``dims`` out, those first that touch the fewest others."""
        factors, left = list(terms), set(dims)
        while left:
            dim = min(sorted(left), key=lambda d: len(_neighbours(factors, d)))
            left.remove(dim)
            touching = [factor for factor in factors if dim in _dims(factor)]
            factors = [factor for factor in factors if dim not in _dims(factor)]
            if touching:
                product = _add(touching)
                names = _dims(product)
                summed = product.logsumexp(names.index(dim))
                factors.append(with_dims(summed, names.replace(dim, "")))
        return _add(factors)


def _neighbours(factors: list[torch.Tensor], dim: str) -> set[str]:
    """The dimensions of the factor that summing ``dim`` out would make."""
    return set("".join(_dims(factor) for factor in factors if dim in _dims(factor)))


def _add(terms: list[torch.Tensor]) -> torch.Tensor:
    """The sum of packed tensors, over the union of their dimensions."""
    names = "".join(sorted(set("".join(map(_dims, terms)))))
    total = terms[0].new_zeros(())
    for term in terms:
        present = [name for name in names if name in _dims(term)]
        value = term.permute([_dims(term).index(name) for name in present])
        sizes = dict(zip(present, value.shape, strict=True))
        total = total + value.reshape([sizes.get(name, 1) for name in names])
    return with_dims(total, names)
