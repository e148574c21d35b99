"""Disentanglement, completeness and informativeness, from what a predictor of factors uses."""

import math
from dataclasses import dataclass

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.evaluation.known_factors import check_known_factors, split_rows, standardised

__all__ = ["DCIScore", "dci"]


@dataclass(frozen=True)
class DCIScore:
    """Three sides of a code, all in [0, 1], higher is better, and what they are made of.

    Attributes:
        disentanglement: Whether each code serves one factor only; mean of
            ``disentanglement_of_codes``, weighted by how much a code is used at all.
        completeness: Whether each factor is served by one code only; mean of
            ``completeness_of_factors``.
        informativeness: Mean accuracy on rows held out.
        disentanglement_of_codes: Shape ``(L,)``; 0 for a code that is not used.
        completeness_of_factors: Shape ``(F,)``; 0 for a factor that no code predicts.
        informativeness_of_factors: Accuracy for each factor, shape ``(F,)``. One that cannot be
            predicted has that of guessing: 1 / K for K equally frequent values.
        importance: How much the predictor of a factor uses each code, shape ``(L, F)``; columns
            sum to 1, or to 0 for a factor that no code predicts.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    disentanglement_of_codes: torch.Tensor
    completeness_of_factors: torch.Tensor
    informativeness_of_factors: torch.Tensor
    importance: torch.Tensor


def dci(
    codes: torch.Tensor,
    factors: torch.Tensor,
    *,
    num_trees: int = 20,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DCIScore:
    r"""Disentanglement, completeness and informativeness (DCI) of codes.

    With R the importance of code l for factor f, of non-negative entries,

    .. math::
        D_l = 1 - H_F(R_{l f} / \sum_f R_{l f}), \quad
        C_f = 1 - H_L(R_{l f} / \sum_l R_{l f})

    with entropies to base F and L. Protocol: one random forest a factor, of ``num_trees``
    trees that may use every code at every split, with at least 5 rows in a leaf; a factor's values
    are classes without order; importance is the mean decrease of Gini impurity; informativeness
    the accuracy on rows held out, each value of a factor in proportion.

    Trees divide chance differences among unrelated codes too. So scores of codes that know nothing
    are small but above 0, the more so the fewer codes, factors and rows there are. The forests of
    five factors take some ten seconds for 10,000 rows of 10 codes, and as many rows are enough.

    Args:
        codes: Means or samples of the latent, shape ``(N, L)`` with at least 2 codes.
        factors: Known factors, integers of shape ``(N, F)``, at least 2; their order does not
            count.
        num_trees: Trees in each forest.
        test_fraction: Part of the rows held out.
        seed: Seed of splits and forests; the global random state is not touched.

    Returns:
        The three scores and the importances. 1, 1, 1 for codes that are the factors, in any order,
        each on its own increasing or decreasing scale.

    Raises:
        TypeError: If the factors are no integers, or ``num_trees`` is none.
        ValueError: If shapes do not fit, a code is not finite, a factor does not vary, there is
            one code or factor only, or a value has too few rows to split.

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(10), torch.arange(10)).repeat(3, 1)
        >>> result = dci(factors.flip(1) * torch.tensor([0.5, -2.0]), factors)
        >>> round(result.disentanglement, 2), round(result.completeness, 2), result.informativeness
        (1.0, 1.0, 1.0)

    References:
        Eastwood and Williams (2018), A framework for the quantitative evaluation of disentangled
        representations, section 2, https://openreview.net/forum?id=By-7dz-AZ. Their predictors are
        lasso and random forests, and they report informativeness as an error. Locatello et al.
        (2019), https://arxiv.org/abs/1811.12359, take boosted trees and, as here, accuracy.
    """
    where = "dci"
    codes, factors = check_known_factors(where, codes, factors, num_codes=2, num_factors=2)
    check_at_least(where, "num_trees", num_trees, 1)
    codes, columns, accuracies = standardised(codes), [], []
    for number, factor in enumerate(factors.T):
        rows = split_rows(where, number, factor, test_fraction, seed)
        importance, accuracy = _forest(codes, factor, *rows, num_trees, seed)
        columns.append(importance)
        accuracies.append(accuracy)
    importance = torch.stack(columns, -1)
    of_codes = _concentration(importance)
    of_factors = _concentration(importance.T)
    # All importances are 0 if the codes are constant.
    weights = importance.sum(1) / importance.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return DCIScore(
        disentanglement=float(weights @ of_codes),
        completeness=float(of_factors.mean()),
        informativeness=sum(accuracies) / len(accuracies),
        disentanglement_of_codes=of_codes,
        completeness_of_factors=of_factors,
        informativeness_of_factors=torch.tensor(accuracies, dtype=torch.float64),
        importance=importance,
    )


def _forest(
    codes: torch.Tensor,
    factor: torch.Tensor,
    train: torch.Tensor,
    test: torch.Tensor,
    num_trees: int,
    seed: int,
) -> tuple[torch.Tensor, float]:
    """The importance of each code for one factor, ``(L,)``, and the accuracy held out."""
    from sklearn.ensemble import RandomForestClassifier

    # With a choice of few codes at each split, a tree would have to use unrelated ones.
    forest = RandomForestClassifier(
        num_trees, max_features=None, min_samples_leaf=5, random_state=seed
    ).fit(codes[train].numpy(), factor[train].numpy())
    accuracy = float(forest.score(codes[test].numpy(), factor[test].numpy()))
    return torch.as_tensor(forest.feature_importances_), accuracy


def _concentration(table: torch.Tensor) -> torch.Tensor:
    """1 less the entropy of each row, to the base of its length; 0 for a row of zeros."""
    total = table.sum(1, keepdim=True)
    p = table / torch.where(total > 0, total, 1.0)
    entropy = -torch.special.xlogy(p, p).sum(1) / math.log(table.shape[1])
    return torch.where(total.squeeze(1) > 0, (1 - entropy).clamp(min=0.0), 0.0)
