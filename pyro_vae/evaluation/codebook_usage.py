"""How many codes of a codebook the data use, and how evenly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.special import entr

from pyro_vae.code_distributions import CodeDistribution
from pyro_vae.evaluation.code_site import CodeSite
from pyro_vae.isolation import without_side_effects
from pyro_vae.traces import layers

__all__ = ["CodebookUsage", "codebook_usage"]


@dataclass(frozen=True)
class CodebookUsage:
    """How often each code of a codebook occurs.

    Attributes:
        counts: Occurrences of each code, int64, ``(num_codes,)``.

    Example:
        >>> usage = CodebookUsage(torch.tensor([5, 5, 0, 0]))
        >>> usage.num_used, round(usage.perplexity, 6)
        (2, 2.0)
        >>> print(usage)
        2 of 4 codes used, perplexity 2.0
    """

    counts: torch.Tensor

    @property
    def num_used(self) -> int:
        """How many codes occur."""
        return int((self.counts > 0).sum())

    @property
    def entropy(self) -> float:
        """Entropy of the frequencies, nats: from 0, one code, to log K, all alike."""
        counts = self.counts.to(torch.float64)
        return float(entr(counts / counts.sum()).sum())

    @property
    def perplexity(self) -> float:
        """exp(entropy): how many codes, used alike, would have that entropy; 1 to K."""
        return float(torch.tensor(self.entropy, dtype=torch.float64).exp())

    def __str__(self) -> str:
        return f"{self.num_used} of {len(self.counts)} codes used, perplexity {self.perplexity:.1f}"


def codebook_usage(
    guide: Callable[..., Any], *args: Any, site: str | None = None, **kwargs: Any
) -> CodebookUsage:
    """Counts the codes that a guide gives to data, over all rows and positions.

    Evaluation only: modules run in eval mode, no gradient is kept, parameters and codebook are
    not touched. Rows that a mask leaves out are not data. Where the guide's codes are random, one
    draw of them counts.

    Args:
        guide: Any guide with a site of codes, such as ``guides.NearestCode``.
        *args: The whole data set, as for ``svi.step``.
        site: Which latent; needed where the guide has several.
        **kwargs: Keyword arguments of the guide.

    Raises:
        ValueError: If the data are empty, subsampled at random or all masked out; there is no
            such latent, or several and no ``site``; the site is not one of codes, or not in
            exactly one plate.

    Example:
        >>> from pyro_vae.codebook import Codebook
        >>> from pyro_vae.guides import NearestCode
        >>> from pyro_vae.nets import MLP
        >>> guide = NearestCode(MLP(64, [32], 3 * 2), Codebook(8, code_dim=2), num_positions=3)
        >>> codebook_usage(guide, torch.randn(5, 64)).counts.sum()
        tensor(15)

    References:
        van den Oord et al. (2017), Neural discrete representation learning, whose authors' code
        reports the perplexity, https://arxiv.org/abs/1711.00937
    """
    where = "codebook_usage"
    with without_side_effects(guide):
        codes = CodeSite(guide, args, kwargs, name=site, where=where, role="guide")
        fn = layers(codes.fn)[-1]
        if not isinstance(fn, CodeDistribution):
            raise ValueError(
                f"{where}: expected site '{codes.name}' to have codes of a codebook, got "
                f"{type(fn).__name__}. Name another one with site=..., or use guides.NearestCode."
            )
        value = codes.run()["value"].reshape(-1, *codes.fn.event_shape)
        indices = fn.indices_of(value[codes.kept])
    return CodebookUsage(torch.bincount(indices.flatten(), minlength=fn.codebook.num_codes))
