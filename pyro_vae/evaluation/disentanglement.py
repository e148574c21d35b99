"""Does one code alone carry a factor? Gaps between the best and the second-best code.

Codes are any tensor, for instance ``encode(guide, x).mean`` or ``.sample()``. A score depends on
this choice and on the protocol as much as on the model: on dSprites the mutual information gap of
one and the same encoder can be near 0 or near 0.5. Report both with the number.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.evaluation.known_factors import (
    check_columns,
    check_known_factors,
    num_values_of,
    split_rows,
    standardised,
)

__all__ = ["GapScore", "code_factor_information", "mutual_information_gap", "sap_score"]


@dataclass(frozen=True)
class GapScore:
    """How far the best code of each factor is ahead of the second-best.

    Attributes:
        score: Mean of the gaps, in [0, 1]; higher is better.
        gaps: One a factor, shape ``(F,)``.
        table: What each code says about each factor, shape ``(L, F)``; a gap is the difference
            of the two largest entries of a column, or the entry where there is one code only.
    """

    score: float
    gaps: torch.Tensor
    table: torch.Tensor

    @classmethod
    def of(cls, table: torch.Tensor) -> "GapScore":
        """The gaps of a table."""
        table = table.clamp(0, 1)  # Rounding can take a share just outside.
        best = torch.cat([table, torch.zeros_like(table[:1])]).topk(2, dim=0).values
        gaps = best[0] - best[1]
        return cls(score=float(gaps.mean()), gaps=gaps, table=table)


def mutual_information_gap(
    codes: torch.Tensor, factors: torch.Tensor, *, num_bins: int = 20
) -> GapScore:
    r"""Mutual information gap (MIG): does one code alone know a factor?

    .. math:: \frac{1}{F} \sum_f \frac{I(z_{(1)}; v_f) - I(z_{(2)}; v_f)}{H(v_f)}

    with the most and second most informative code of each factor. Protocol: all given rows; each
    code cut into bins of equal width between its smallest and largest value; information and
    entropy of the joint histogram (see :func:`code_factor_information` for its bias).

    A factor of K values cannot reach 1 with fewer than K bins. A code that knows two factors
    counts for both, so the score says nothing about codes shared by factors; :func:`dci` does.

    Args:
        codes: Means or samples of the latent, shape ``(N, L)``.
        factors: Known factors, integers of shape ``(N, F)``; their order does not count.
        num_bins: Bins of each code.

    Returns:
        Score in [0, 1], the gap of each factor, and the table of I / H. Around 0 for codes that
        know nothing, or spread a factor evenly over several.

    Raises:
        TypeError: If the factors are no integers.
        ValueError: If shapes do not fit, a code is not finite, a factor does not vary, or
            ``num_bins`` is below 2.

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(3), torch.arange(4))
        >>> codes = factors.flip(1) * torch.tensor([0.5, -2.0])
        >>> result = mutual_information_gap(codes, factors)
        >>> round(result.score, 6), result.gaps
        (1.0, tensor([1., 1.], dtype=torch.float64))

    References:
        Chen et al. (2018), Isolating sources of disentanglement in variational autoencoders,
        equation 6, https://arxiv.org/abs/1802.04942, who integrate over q(z | x) where this
        counts the codes given. Bins as in Locatello et al. (2019), Challenging common assumptions
        in the unsupervised learning of disentangled representations,
        https://arxiv.org/abs/1811.12359, with 20 bins of the means of 10,000 rows.
    """
    where = "mutual_information_gap"
    codes, factors = check_known_factors(where, codes, factors, num_factors=1)
    check_at_least(where, "num_bins", num_bins, 2)
    entropies = torch.stack([_entropy(factor.bincount()) for factor in factors.T])
    return GapScore.of(_information(_in_bins(codes, num_bins), factors) / entropies)


def code_factor_information(
    codes: torch.Tensor, factors: torch.Tensor, *, num_bins: int = 20
) -> torch.Tensor:
    """Mutual information of each code, cut into bins, with each factor, in nats.

    Exact for the histogram of the rows given. As an estimate for the population it is too high, by
    about (bins - 1) (K - 1) / 2N for an independent factor of K values: 0.005 nats for 20 bins, 10
    values and 17,280 rows, but 0.85 for 100 rows. Compare only numbers from as many rows and bins.

    Args:
        codes: Means or samples of the latent, shape ``(N, L)``.
        factors: Known factors, integers of shape ``(N, F)``.
        num_bins: Bins of equal width of each code, between its smallest and largest value.

    Returns:
        Float64 of shape ``(L, F)``, at least 0; exactly 0 for a code that does not vary.

    Raises:
        TypeError: If the factors are no integers.
        ValueError: If shapes do not fit, a code is not finite, a factor does not vary, or
            ``num_bins`` is below 2.

    Example:
        >>> factors = torch.tensor([[0], [0], [1], [1]])
        >>> codes = torch.tensor([[0.1, 5.0], [0.2, 5.0], [0.9, 5.0], [0.8, 5.0]])
        >>> code_factor_information(codes, factors, num_bins=2).exp()
        tensor([[2.],
                [1.]], dtype=torch.float64)
    """
    where = "code_factor_information"
    codes, factors = check_known_factors(where, codes, factors, num_factors=1)
    check_at_least(where, "num_bins", num_bins, 2)
    return _information(_in_bins(codes, num_bins), factors)


def sap_score(
    codes: torch.Tensor,
    factors: torch.Tensor,
    *,
    categorical: Collection[int],
    test_fraction: float = 0.5,
    seed: int = 0,
) -> GapScore:
    """Separated attribute predictability (SAP): does one code alone predict a factor?

    The mean over factors of the gap between the two codes that predict it best. Protocol: an
    ordered factor counts by its squared linear correlation with a code, on all rows. A categorical
    one counts by the balanced accuracy (mean over values of the part recognised), on rows held
    out, of thresholds on one code: a decision tree with one leaf for each value, fitted to the
    other rows with equal weight for each value. A code that does not vary scores 0.

    An unrelated code still has a balanced accuracy of about 1 / K among K values. So a categorical
    factor known to one code alone reaches 1 - 1 / K, or 1 if the others are constant.

    Args:
        codes: Means or samples of the latent, shape ``(N, L)``.
        factors: Known factors, integers of shape ``(N, F)``.
        categorical: Columns of factors without an order, such as shapes. Those of ordered factors
            are taken as the numbers given. May be empty.
        test_fraction: Part of the rows held out, each value of the factor in proportion.
        seed: Seed of split and trees; the global random state is not touched.

    Returns:
        Score in [0, 1], the gap of each factor, and the table of predictability. Around 0 for
        codes that know nothing, or spread a factor evenly over several.

    Raises:
        TypeError: If the factors are no integers.
        ValueError: If shapes do not fit, a code is not finite, a factor does not vary,
            ``categorical`` names no column, or a value has too few rows to split.

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(3), torch.arange(4))
        >>> codes = factors * torch.tensor([0.5, -2.0])
        >>> round(sap_score(codes, factors, categorical=()).score, 6)
        1.0

    References:
        Kumar et al. (2018), Variational inference of disentangled latent concepts from unlabeled
        observations, section 3, https://arxiv.org/abs/1711.00848. Locatello et al. (2019) take
        every factor as categorical and a linear support vector machine in place of thresholds.
    """
    where = "sap_score"
    given = factors
    codes, factors = check_known_factors(where, codes, factors, num_factors=1)
    check_columns(where, "categorical", categorical, factors.shape[1])
    codes, numbers, columns = standardised(codes), given.detach().cpu().double(), []
    for number, factor in enumerate(factors.T):
        if number in categorical:
            rows = split_rows(where, number, factor, test_fraction, seed)
            columns.append(_threshold_accuracy(codes, factor, *rows, seed))
        else:
            columns.append(_squared_correlation(codes, numbers[:, number]))
    return GapScore.of(torch.stack(columns, -1))


def _in_bins(codes: torch.Tensor, num_bins: int) -> torch.Tensor:
    """The bin of every code, ``(N, L)``; 0 for a constant one."""
    low, high = codes.aminmax(dim=0)
    width = torch.where(high > low, high - low, 1.0)
    # The largest value closes the last bin.
    return ((codes - low) / width * num_bins).long().clamp_(max=num_bins - 1)


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of a histogram."""
    p = counts.double() / counts.sum()
    return -torch.special.xlogy(p, p).sum()


def _information(bins: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """I(bin; factor) = H(bin) + H(factor) - H(bin, factor) in nats, ``(L, F)``."""
    rows = []
    for code in bins.T:
        for factor in factors.T:
            joint = (code * num_values_of(factor) + factor).bincount()
            alone = _entropy(code.bincount()) + _entropy(factor.bincount())
            rows.append(alone - _entropy(joint))
    # Rounding can take the difference just below zero.
    return torch.stack(rows).reshape(bins.shape[1], -1).clamp(min=0.0)


def _squared_correlation(codes: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Of each standardised code with a factor, ``(L,)``."""
    factor = factor - factor.mean()
    return (factor @ codes).square() / (len(codes) * factor.square().sum())


def _threshold_accuracy(
    codes: torch.Tensor, factor: torch.Tensor, train: torch.Tensor, test: torch.Tensor, seed: int
) -> torch.Tensor:
    """Balanced accuracy on ``test`` of thresholds on each code, ``(L,)``; 0 for a constant code."""
    from sklearn.tree import DecisionTreeClassifier

    num_values = num_values_of(factor)
    found = torch.zeros(codes.shape[1], dtype=torch.float64)
    for number, code in enumerate(codes.T):
        if not code.any():
            continue
        tree = DecisionTreeClassifier(
            max_leaf_nodes=num_values, class_weight="balanced", random_state=seed
        ).fit(code[train].reshape(-1, 1).numpy(), factor[train].numpy())
        hit = torch.as_tensor(tree.predict(code[test].reshape(-1, 1).numpy())) == factor[test]
        hits = torch.zeros(num_values, dtype=torch.float64).index_add_(
            0, factor[test], hit.double()
        )
        found[number] = (hits / factor[test].bincount(minlength=num_values)).mean()
    return found
