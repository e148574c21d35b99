"""What every comparison of codes with known factors needs: checks, and rows held out."""

from collections.abc import Collection

import torch

from pyro_vae.checks import check_at_least, check_data

__all__ = [
    "check_columns",
    "check_known_factors",
    "num_values_of",
    "split_rows",
    "standardised",
]


def check_known_factors(
    where: str, codes: torch.Tensor, factors: torch.Tensor, *, num_codes: int = 1, num_factors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks codes and factors, and brings them to one form on the CPU.

    Args:
        where: The function that asks, for the messages.
        codes: Real numbers, shape ``(N, L)``.
        factors: Integers, shape ``(N, F)``.
        num_codes: Fewest columns of the codes.
        num_factors: Fewest columns of the factors.

    Returns:
        The codes in float64; and the factors in int64 with values 0 ... K - 1, in the order of
        the given ones.

    Raises:
        TypeError: If either is no tensor, or of the wrong kind of number.
        ValueError: If a shape does not fit, a code is not finite, or a factor has one value only.
    """
    for name, table in (("codes", codes), ("factors", factors)):
        if isinstance(table, torch.Tensor) and table.dim() == 1:
            raise ValueError(
                f"{where}: expected {name} of shape (batch, any), got {tuple(table.shape)}. "
                f"Pass {name}.unsqueeze(1) if there is one column only."
            )
        check_data(where, name, table, (-1,))
    if codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(
            f"{where}: expected codes of real numbers, got {codes.dtype}. "
            "Pass means or samples of the guide's latent."
        )
    if factors.is_floating_point() or factors.is_complex() or factors.dtype == torch.bool:
        raise TypeError(
            f"{where}: expected factors of an integer type, got {factors.dtype}. "
            "Pass the index of each factor's value, factors.long() if they are whole numbers."
        )
    if len(codes) != len(factors):
        raise ValueError(
            f"{where}: expected codes and factors of the same rows, got {len(codes)} and "
            f"{len(factors)}. Encode the very images that the factors describe."
        )
    for name, table, least in (("codes", codes, num_codes), ("factors", factors, num_factors)):
        if table.shape[1] < least:
            raise ValueError(
                f"{where}: expected {name} with at least {least} columns, got {table.shape[1]}. "
                "The score compares columns with one another."
            )
    codes = codes.detach().to("cpu", torch.float64)
    if not codes.isfinite().all():
        raise ValueError(
            f"{where}: expected finite codes, got {int(codes.isnan().sum())} NaN and "
            f"{int(codes.isinf().sum())} infinite values. Look for the rows the guide fails on."
        )
    columns = [column.unique(return_inverse=True)[1] for column in factors.detach().cpu().T]
    for number, column in enumerate(columns):
        if not column.any():
            raise ValueError(
                f"{where}: expected every factor to vary, got one single value in column {number} "
                f"of the factors in {len(column)} rows. Leave that column out, or pass more rows."
            )
    return codes, torch.stack(columns, -1)


def check_columns(where: str, name: str, columns: Collection[int], num_factors: int) -> None:
    """Raises unless ``columns`` are numbers of factors."""
    if not isinstance(columns, Collection):
        raise TypeError(
            f"{where}: expected {name} to be a list of columns, got {type(columns).__name__}. "
            f"Pass {name}=[0] for the first factor alone."
        )
    if not all(column in range(num_factors) for column in columns):
        raise ValueError(
            f"{where}: expected {name} among the columns 0 ... {num_factors - 1} of the factors, "
            f"got {list(columns)}. Count the columns from 0."
        )


def standardised(codes: torch.Tensor) -> torch.Tensor:
    """Checked codes with mean 0 and variance 1 over the rows; exactly 0 for a constant one."""
    # In units of the largest, squares neither overflow nor vanish, and a constant is exactly 1.
    largest = codes.abs().amax(0)
    codes = codes / torch.where(largest > 0, largest, 1.0)
    codes = codes - codes.mean(0)
    scale = codes.square().mean(0).sqrt()
    return codes / torch.where(scale > 0, scale, 1.0)


def num_values_of(factor: torch.Tensor) -> int:
    """How many values a checked factor has."""
    return int(factor.max()) + 1


def split_rows(
    where: str, number: int, factor: torch.Tensor, test_fraction: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to fit on and rows held out, each value of a factor in proportion.

    Args:
        where: The function that asks, for the messages.
        number: Which factor this is, for the messages.
        factor: A checked factor, shape ``(N,)``.
        test_fraction: Part of the rows held out.
        seed: Seed of the split.

    Raises:
        ValueError: If ``test_fraction`` is outside (0, 1), or leaves a value out of either part.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"{where}: expected test_fraction in (0, 1), got {test_fraction}. "
            "0.2 holds out every fifth row."
        )
    fewest = int(factor.bincount().min())
    if fewest * min(test_fraction, 1 - test_fraction) < 1:
        raise ValueError(
            f"{where}: expected rows of every value of factor {number} on both sides of the split, "
            f"got a value with {fewest} rows and test_fraction={test_fraction}. Pass more rows."
        )
    check_at_least(where, "seed", seed, 0)
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        torch.arange(len(factor)).numpy(),
        test_size=test_fraction,
        random_state=seed,
        stratify=factor.numpy(),
    )
    return torch.as_tensor(train), torch.as_tensor(test)
