"""Priors of quantised codes: uniform while the codebook is trained, then an autoregressive one."""

from abc import abstractmethod
from collections.abc import Sequence

import pyro
import torch
from pyro.distributions.util import is_validation_enabled
from torch import nn

from pyro_vae.autoregressive import AutoregressiveNet
from pyro_vae.checks import check_at_least
from pyro_vae.code_distributions import AutoregressiveCodes, CategoricalCodes, CodeDistribution
from pyro_vae.codebook import Codebook
from pyro_vae.program import Program

__all__ = ["AutoregressiveCodePrior", "UniformCodePrior"]


class _CodePrior(Program):
    """Abstract: samples N codes of a codebook."""

    def __init__(self, codebook: Codebook, num_positions: int, site: str) -> None:
        where = type(self).__name__
        if not isinstance(codebook, Codebook):
            raise TypeError(
                f"{where}: expected a Codebook, got {type(codebook).__name__}. Pass the one that "
                "the guide has: Codebook(num_codes, code_dim)."
            )
        check_at_least(where, "num_positions", num_positions, 1)
        super().__init__()
        self.codebook, self.num_positions, self.site = codebook, num_positions, site

    @abstractmethod
    def _distribution(self) -> CodeDistribution:
        """The distribution over one datum's codes."""

    def forward(self) -> torch.Tensor:
        """Samples the codes within the plates around the call; returns them side by side."""
        code: torch.Tensor = pyro.sample(self.site, self._distribution())
        if is_validation_enabled():
            self.codebook.locate(code, f"{type(self).__name__}, site '{self.site}'")
        return code.flatten(-2)


class UniformCodePrior(_CodePrior):
    """All sequences of N out of K codes alike: log p(z) = -N log K.

    Args:
        codebook: The codes, shared with the guide.
        num_positions: N.
        site: Name of the sample site, of events ``(N, D)``.

    Returns (when called inside a plate): the codes side by side, ``(*sample, batch, N * D)``.

    Raises:
        TypeError: If ``codebook`` is no ``Codebook``, or ``num_positions`` no integer.
        ValueError: If ``num_positions`` is below 1; when called, under validation, if the value
            of the site holds a vector that is no code.

    Example:
        >>> prior = UniformCodePrior(Codebook(num_codes=8, code_dim=2), num_positions=3)
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 6])

    References:
        van den Oord et al. (2017), Neural discrete representation learning, section 3.1,
        https://arxiv.org/abs/1711.00937
    """

    def __init__(self, codebook: Codebook, num_positions: int, *, site: str = "z") -> None:
        super().__init__(codebook, num_positions, site)

    def _distribution(self) -> CodeDistribution:
        codebook = self.codebook
        even = codebook.vectors.new_zeros(self.num_positions, codebook.num_codes)
        return CategoricalCodes(codebook, even)


class AutoregressiveCodePrior(_CodePrior):
    r"""p(i_1) p(i_2 | i_1) ... p(i_N | i_1 ... i_{N-1}) over the numbers of the codes, learnt.

    The second stage of training: ``model.prior = AutoregressiveCodePrior(codebook, N, [128])`` in
    place of the uniform one, then maximise the same bound with all other parameters fixed. A
    draw takes N passes through the network.

    Args:
        codebook: The codes, shared with the guide.
        num_positions: N.
        hidden: Widths of the hidden layers of a masked network, each at least N - 1.
        site: Name of the sample site, of events ``(N, D)``.

    Returns (when called inside a plate): the codes side by side, ``(*sample, batch, N * D)``.

    Attributes:
        net: The network, from one-hot numbers to logits.

    Raises:
        TypeError: If ``codebook`` is no ``Codebook``, or ``num_positions`` no integer.
        ValueError: If ``num_positions`` is below 1 or a hidden layer too narrow; when called,
            under validation, if the value of the site holds a vector that is no code.

    Example:
        >>> codebook = Codebook(num_codes=8, code_dim=2)
        >>> prior = AutoregressiveCodePrior(codebook, num_positions=3, hidden=[16])
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 6])

    References:
        van den Oord et al. (2017), Neural discrete representation learning, section 3.3,
        https://arxiv.org/abs/1711.00937. There the network is a PixelCNN; here a masked
        perceptron: Germain et al. (2015), MADE, https://arxiv.org/abs/1502.03509
    """

    def __init__(
        self, codebook: Codebook, num_positions: int, hidden: Sequence[int], *, site: str = "z"
    ) -> None:
        super().__init__(codebook, num_positions, site)
        size = codebook.num_codes
        self.net: nn.Module = AutoregressiveNet(
            num_positions, hidden, in_features=size, out_features=size
        )

    def _distribution(self) -> CodeDistribution:
        return AutoregressiveCodes(self.codebook, self.net, self.num_positions)
