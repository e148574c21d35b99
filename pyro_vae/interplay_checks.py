"""Messages for joints of interacting latents whose parts do not fit. They cost no synchronisation.

Whether a density has a normaliser is for its statistics to say.
"""

from collections.abc import Collection, Mapping

import torch

__all__ = ["check_evidence", "check_natural", "check_pair"]


def check_natural(natural: torch.Tensor, per_dim: int, name: str) -> int:
    """Raises unless there are ``per_dim`` numbers for each latent; returns how many in all."""
    width = natural.shape[-1] if natural.dim() else 0
    if not width or width % per_dim:
        raise ValueError(
            f"Interplay: expected {per_dim} natural parameters for each latent of modality "
            f"'{name}', got shape {tuple(natural.shape)}. Their last dimension is {per_dim} * dim."
        )
    return width


def check_pair(
    pair: tuple[str, str],
    weight: torch.Tensor,
    pairs: Collection[tuple[str, str]],
    widths: Mapping[str, int],
    per_dim: int,
) -> None:
    """Raises unless W couples two known modalities once, and is as wide as they are."""
    first, second = pair
    text = f"('{first}', '{second}')"
    if first == second or first not in widths or second not in widths:
        raise ValueError(
            f"Interplay: expected interactions between two of the modalities {list(widths)}, got "
            f"{text}. A modality does not act on itself."
        )
    if (second, first) in pairs:
        raise ValueError(
            f"Interplay: expected one W for each pair of modalities, got {text} and its reverse. "
            "Add the transpose of one to the other."
        )
    full = widths[first], widths[second]
    wanted = {full, (full[0] // per_dim, full[1] // per_dim)}
    if tuple(weight.shape) not in wanted:
        raise ValueError(
            f"Interplay: expected W of {text} of shape {' or '.join(map(str, sorted(wanted)))}, "
            f"got {tuple(weight.shape)}. Rows belong to the first modality of the pair, columns "
            "to the second."
        )


def check_evidence(evidence: Mapping[str, torch.Tensor], widths: Mapping[str, int]) -> None:
    """Raises unless evidence is of known modalities, one number for each of their statistics."""
    for name, value in evidence.items():
        if name not in widths or value.shape[-1] != widths[name]:
            raise ValueError(
                f"Interplay.tilted: expected evidence of widths {dict(widths)}, got "
                f"{tuple(value.shape)} for '{name}'. A network of a modality gives one number for "
                "each of its statistics."
            )
