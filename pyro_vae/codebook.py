"""The vectors that quantised codes are made of, learnt by gradient or by moving averages."""

import torch
from torch import nn

from pyro_vae.checks import check_at_least

__all__ = ["Codebook"]


class Codebook(nn.Module):
    r"""K vectors. An encoded vector is quantised to the nearest of them.

    It learns under ``TraceVQ_ELBO``, and under no other objective: by gradient, or with a
    ``decay`` :math:`\gamma` by moving averages of the vectors assigned to each code. If
    :math:`n_k` vectors of mean :math:`\bar v_k` are assigned to code k in one step,

    .. math::
        N_k \leftarrow \gamma N_k + (1 - \gamma) \, n_k, \qquad
        e_k \leftarrow e_k + (1 - \gamma) \frac{n_k}{N_k} (\bar v_k - e_k)

    with :math:`N_k = 0` at the start, so that the first vectors assigned to a code replace its
    random start. This is :math:`e_k = m_k / N_k` of the paper, with :math:`m_k` the moving average
    of the sums. With :math:`\gamma = 0` and all data in one batch a step is one of k-means. In
    eval mode the codebook stays as it is.

    A code far from all data is never assigned and never learns. ``revive_below`` puts it at an
    encoded vector of the batch, drawn at random.

    Args:
        num_codes: K.
        code_dim: D, length of each vector.
        decay: :math:`\gamma` in [0, 1), such as 0.99; ``None`` for a codebook learnt by gradient.
        revive_below: Moving average of a code's use at which it is given up, in units of 1 / K, the
            use of each if all were used alike: in [0, 1), such as 0.1. ``None`` for never.

    Attributes:
        vectors: The codes, ``(K, D)``: a parameter, with a ``decay`` a buffer.
        running_counts: With a ``decay``, :math:`N_k`, ``(K,)``.

    Raises:
        TypeError: If ``num_codes`` or ``code_dim`` is no integer.
        ValueError: If one of the arguments is out of range, or there is ``revive_below`` without
            a ``decay``.

    Example:
        >>> codebook = Codebook(num_codes=4, code_dim=2)
        >>> vectors = codebook(torch.tensor([[3, 0, 0]]))
        >>> vectors.shape, codebook.nearest(vectors)
        (torch.Size([1, 3, 2]), tensor([[3, 0, 0]]))

    References:
        van den Oord et al. (2017), Neural discrete representation learning, section 3.2 and
        appendix A.1, https://arxiv.org/abs/1711.00937. Their :math:`N_k` are not smoothed as in
        other implementations, which draws codes without use to the origin: a code without
        vectors stays where it is. Codes are revived as in Dhariwal et al. (2020), Jukebox,
        section 3, https://arxiv.org/abs/2005.00341
    """

    vectors: torch.Tensor
    running_counts: torch.Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        decay: float | None = None,
        revive_below: float | None = None,
    ) -> None:
        check_at_least("Codebook", "num_codes", num_codes, 1)
        check_at_least("Codebook", "code_dim", code_dim, 1)
        if decay is None and revive_below is not None:
            raise ValueError(
                f"Codebook: expected a decay with revive_below, got revive_below={revive_below} "
                "and none. Pass decay=0.99: use is counted by moving averages."
            )
        for name, value, usual in (("decay", decay, 0.99), ("revive_below", revive_below, 0.1)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(
                    f"Codebook: expected {name} in [0, 1), got {value}. Pass {name}={usual}, for "
                    "instance."
                )
        super().__init__()
        self.num_codes, self.code_dim = num_codes, code_dim
        self.decay, self.revive_below = decay, revive_below
        start = (2 * torch.rand(num_codes, code_dim) - 1) / num_codes
        if decay is None:
            self.vectors = nn.Parameter(start)
        else:
            self.register_buffer("vectors", start)
            self.register_buffer("running_counts", torch.zeros(num_codes))

    def extra_repr(self) -> str:
        """The arguments."""
        learnt = "" if self.decay is None else f", decay={self.decay}"
        revived = "" if self.revive_below is None else f", revive_below={self.revive_below}"
        return f"{self.num_codes}, {self.code_dim}{learnt}{revived}"

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The codes of these numbers: from ``(*)``, 0 ... K-1, to ``(*, D)``.

        Raises:
            TypeError: If the indices are no integers.
            ValueError: If one is out of range.
        """
        kind = indices.dtype
        if kind.is_floating_point or kind.is_complex or kind == torch.bool:
            raise TypeError(
                f"Codebook: expected integer indices, got {kind}. Convert them with indices.long()."
            )
        if not ((indices >= 0) & (indices < self.num_codes)).all():
            raise ValueError(
                f"Codebook: expected indices in 0 ... {self.num_codes - 1}, got values in "
                f"[{int(indices.min())}, {int(indices.max())}]. Make a codebook of more codes, or "
                "look at where the indices come from."
            )
        return self.vectors[indices.long()]

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Numbers of the nearest codes: from ``(*, D)`` to int64, ``(*)``; no gradient."""
        return self._nearest(vectors)[0]

    def find(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the nearest codes, and whether the vectors are those codes up to rounding.

        Args:
            vectors: ``(*, D)``.

        Returns:
            int64 and bool, both ``(*)``. Codes that coincide all count as the first of them.
        """
        indices, distances = self._nearest(vectors)
        tolerance = torch.finfo(self.vectors.dtype).eps ** 0.5 * self.vectors.detach().abs().max()
        return indices, distances <= tolerance

    def locate(self, vectors: torch.Tensor, where: str = "Codebook.locate") -> torch.Tensor:
        """Numbers of codes: from codes ``(*, D)`` to int64, ``(*)``.

        Args:
            vectors: Codes, exact up to rounding.
            where: Who asks, for the message.

        Raises:
            ValueError: If a vector is no code of this codebook.
        """
        indices, is_code = self.find(vectors)
        if not is_code.all():
            raise ValueError(
                f"{where}: expected vectors of a codebook of {self.num_codes} codes, got "
                f"{int((~is_code).sum())} of {is_code.numel()} that are none of them. Make values "
                "from indices, codebook(indices), and give the guide the codebook of the model's "
                "prior."
            )
        return indices

    @torch.no_grad()
    def update(self, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Moves the codes towards the vectors assigned to them: one step of the moving averages.

        Does nothing in eval mode, nothing without a ``decay``, and nothing if there is no vector.

        Args:
            vectors: Encoded vectors, ``(*, D)``.
            mask: Which of them there are, bool, ``(*)``; all by default.
        """
        vectors = vectors.reshape(-1, self.code_dim)
        if self.decay is None or not self.training or not len(vectors):
            return
        # Not in place: a program may have used the codes in a graph that is still to be walked.
        self.vectors, self.running_counts = self.vectors.clone(), self.running_counts.clone()
        present = vectors.new_ones(len(vectors), dtype=torch.bool)
        if mask is not None:
            present = mask.reshape(-1)
            vectors = vectors.where(present.unsqueeze(-1), 0.0)
        codes = self.vectors
        rate = torch.where(present.any(), 1 - self.decay, 0.0).to(codes)
        indices = self.nearest(vectors)
        counts = torch.zeros_like(self.running_counts).index_add_(0, indices, present.to(codes))
        sums = torch.zeros_like(codes).index_add_(0, indices, vectors)
        self.running_counts.lerp_(counts, rate)
        steps = rate * (sums - counts.unsqueeze(-1) * codes)
        used = (counts > 0).unsqueeze(-1)
        codes += torch.where(used, steps / self.running_counts.unsqueeze(-1), 0.0)
        if mask is not None and self.revive_below is not None:
            vectors = vectors[present]
        if self.revive_below is not None and len(vectors):
            even = self.running_counts.mean()
            self._revive(self.running_counts < self.revive_below * even, even, vectors)

    def _revive(self, dead: torch.Tensor, even: torch.Tensor, vectors: torch.Tensor) -> None:
        """Puts codes that are hardly used at different vectors of the batch."""
        vectors = vectors.unique(dim=0)
        drawn = torch.randperm(len(vectors), device=vectors.device)
        # Where codes outnumber vectors, the others wait: two at one place would be one code.
        number = dead.cumsum(0) - 1
        dead = dead & (number < len(vectors))
        new = vectors[drawn[number.clamp(0, len(vectors) - 1)]]
        self.vectors.copy_(torch.where(dead.unsqueeze(-1), new, self.vectors))
        # As if it were used like the others, or the next step would give it up again.
        self.running_counts.copy_(torch.where(dead, even, self.running_counts))

    def _nearest(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the nearest codes and the distances to them, both ``(*)``."""
        if vectors.dim() == 0 or vectors.shape[-1] != self.code_dim:
            raise ValueError(
                f"Codebook: expected vectors of length {self.code_dim} in the last dimension, got "
                f"shape {tuple(vectors.shape)}. Reshape them to (..., {self.code_dim})."
            )
        with torch.no_grad():
            flat = vectors.reshape(-1, self.code_dim)
            # Not by the dot product, which cannot tell codes apart that are close to one another.
            exact = "donot_use_mm_for_euclid_dist"
            distances, indices = torch.cdist(flat, self.vectors, compute_mode=exact).min(-1)
        return indices.reshape(vectors.shape[:-1]), distances.reshape(vectors.shape[:-1])
