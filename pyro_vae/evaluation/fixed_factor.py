"""Which factor was held fixed? Accuracy of simple classifiers that see codes of groups of rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.evaluation.known_factors import check_known_factors, standardised

__all__ = ["FixedFactorScore", "beta_vae_score", "factor_vae_score"]

_CHUNK = 1000


@dataclass(frozen=True)
class FixedFactorScore:
    """Accuracy of naming the factor that a group of rows shares.

    Attributes:
        score: Accuracy on groups held out, in [0, 1]; higher is better.
        chance: Accuracy of guessing, 1 / F. Codes that know nothing come near it from above: the
            groups held out are drawn from the same rows as those fitted to, whose chance
            regularities count as knowledge. Thousands of rows make that small.
        train_score: Accuracy on the groups that the classifier was fitted to.
        score_of_factors: Accuracy on the groups held out that share each factor, shape ``(F,)``.
    """

    score: float
    chance: float
    train_score: float
    score_of_factors: torch.Tensor

    @classmethod
    def of(
        cls, train_hits: torch.Tensor, test_hits: torch.Tensor, fixed: torch.Tensor
    ) -> "FixedFactorScore":
        """From hits and misses; ``fixed`` are the factors of the groups held out."""
        groups = fixed.bincount()
        return cls(
            score=float(test_hits.double().mean()),
            chance=1 / len(groups),
            train_score=float(train_hits.double().mean()),
            score_of_factors=fixed.bincount(test_hits.double()) / groups,
        )


def factor_vae_score(
    codes: torch.Tensor,
    factors: torch.Tensor,
    *,
    group_size: int = 64,
    num_train: int = 10_000,
    num_test: int = 5_000,
    min_scale: float = 0.05,
    seed: int = 0,
) -> FixedFactorScore:
    """The FactorVAE metric: does the code that varies least tell which factor is fixed?

    Protocol: for one vote, one factor takes its value in a random row, and ``group_size`` rows
    with that value are drawn with replacement; the vote is the code with the smallest variance in
    the group relative to its variance over all rows, one of them by lot where several do not vary.
    Each code stands for the factor that was
    fixed most often when it won in training; the score is the part of held-out votes where this
    is right. Every factor is fixed equally often.

    Args:
        codes: Means or samples of the latent, shape ``(N, L)``.
        factors: Known factors, integers of shape ``(N, F)``, at least 2. Any rows will do, but
            factors that depend on one another in these rows are confused.
        group_size: Rows in a group.
        num_train: Votes to fit to.
        num_test: Votes held out.
        min_scale: A code whose standard deviation over all rows is not above this has no vote.
            The default suits means under a standard normal prior, where collapsed codes have
            means near 0. On another scale, or for samples, give your own, for instance 0.
        seed: Seed of all draws; the global random state is not touched.

    Returns:
        Score in [0, 1], with its chance level 1 / F.

    Raises:
        TypeError: If the factors are no integers.
        ValueError: If shapes do not fit, a code is not finite, a factor does not vary, there is
            one factor only, a value has fewer than ``group_size`` rows, or no code varies enough.

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(9), torch.arange(9))
        >>> result = factor_vae_score(factors.flip(1), factors, group_size=9)
        >>> result.score, result.chance
        (1.0, 0.5)

    References:
        Kim and Mnih (2018), Disentangling by factorising, section 4,
        https://arxiv.org/abs/1802.05983, who leave codes out by their KL divergence. Numbers of
        votes and the smallest scale as in the code of Locatello et al. (2019),
        https://arxiv.org/abs/1811.12359.
    """
    where = "factor_vae_score"
    codes, factors = check_known_factors(where, codes, factors, num_factors=2)
    _check_sizes(where, group_size, num_train, num_test, factors)
    scale = codes.std(0, correction=0)
    active = scale > min_scale
    if not active.any():
        raise ValueError(
            f"{where}: expected a code with a standard deviation above min_scale={min_scale}, got "
            f"at most {float(scale.max()):.3g}. Lower min_scale if the codes are smaller than "
            "those of a standard normal prior; else the encoder has collapsed."
        )
    codes = standardised(codes[:, active])
    rows = _Rows(where, factors, group_size, seed)

    def votes(num: int) -> tuple[torch.Tensor, torch.Tensor]:
        won = [(rows.least(codes[group].var(1)), fixed) for group, fixed in rows.groups(num)]
        return torch.cat([code for code, _ in won]), torch.cat([fixed for _, fixed in won])

    train, fixed = votes(num_train)
    table = torch.zeros(codes.shape[1], factors.shape[1], dtype=torch.int64)
    table.index_put_((train, fixed), torch.ones_like(fixed), accumulate=True)
    factor_of = table.argmax(1)
    train_hits = factor_of[train] == fixed
    test, fixed = votes(num_test)
    return FixedFactorScore.of(train_hits, factor_of[test] == fixed, fixed)


def beta_vae_score(
    codes: torch.Tensor,
    factors: torch.Tensor,
    *,
    group_size: int = 64,
    num_train: int = 10_000,
    num_test: int = 5_000,
    seed: int = 0,
) -> FixedFactorScore:
    """The beta-VAE metric: do differences between codes tell which factor is fixed?

    Protocol: for one example, one factor is chosen and ``group_size`` random rows are paired each
    with another random row of the same value of it; the example is the mean over pairs of the
    absolute difference of their codes. A linear classifier (multinomial logistic regression on
    standardised examples, scikit-learn's with C = 1) names the factor; the score is its accuracy
    on examples held out. Every factor is fixed equally often.

    High scores are easy to reach, also for entangled codes: the classifier weighs all of them.

    Args:
        codes: Means or samples of the latent, shape ``(N, L)``.
        factors: Known factors, integers of shape ``(N, F)``, at least 2. Any rows will do, but
            factors that depend on one another in these rows are confused.
        group_size: Pairs in a group.
        num_train: Examples to fit to.
        num_test: Examples held out.
        seed: Seed of all draws; the global random state is not touched.

    Returns:
        Score in [0, 1], with its chance level 1 / F.

    Raises:
        TypeError: If the factors are no integers.
        ValueError: If shapes do not fit, a code is not finite, a factor does not vary, there is
            one factor only, or a value has a single row.

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(9), torch.arange(9))
        >>> result = beta_vae_score(factors.flip(1), factors, num_train=500)
        >>> result.score, result.chance
        (1.0, 0.5)

    References:
        Higgins et al. (2017), beta-VAE: learning basic visual concepts with a constrained
        variational framework, section 3, https://openreview.net/forum?id=Sy2fzU9gl. Sizes as in
        Locatello et al. (2019), https://arxiv.org/abs/1811.12359.
    """
    where = "beta_vae_score"
    codes, factors = check_known_factors(where, codes, factors, num_factors=2)
    _check_sizes(where, group_size, num_train, num_test, factors)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    codes, rows = standardised(codes), _Rows(where, factors, 2, seed)

    def examples(num: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen = [
            ((codes[first] - codes[second]).abs().mean(1), fixed)
            for first, second, fixed in rows.pairs(num, group_size)
        ]
        return torch.cat([x for x, _ in seen]), torch.cat([fixed for _, fixed in seen])

    train, fixed = examples(num_train)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train.numpy(), fixed.numpy())
    train_hits = torch.as_tensor(classifier.predict(train.numpy())) == fixed
    test, fixed = examples(num_test)
    test_hits = torch.as_tensor(classifier.predict(test.numpy())) == fixed
    return FixedFactorScore.of(train_hits, test_hits, fixed)


def _check_sizes(
    where: str, group_size: int, num_train: int, num_test: int, factors: torch.Tensor
) -> None:
    check_at_least(where, "group_size", group_size, 2)
    for name, num in (("num_train", num_train), ("num_test", num_test)):
        check_at_least(where, name, num, factors.shape[1])


class _Rows:
    """Draws rows that share the value of one factor, each factor in turn.

    Args:
        where: The function that asks, for the messages.
        factors: Checked factors, ``(N, F)``.
        least: Fewest rows of every value, and the size of a group.
        seed: Seed of the draws.
    """

    def __init__(self, where: str, factors: torch.Tensor, least: int, seed: int) -> None:
        self._num_rows, self._num_factors = factors.shape
        self._size, self._generator = least, torch.Generator().manual_seed(seed)
        # The rows in the order of each factor; where each row stands in it; of the rows that
        # share its value, the place of the first and the number.
        self._sorted = factors.argsort(stable=True, dim=0)
        self._place = self._sorted.argsort(0)
        self._first, self._count = torch.empty_like(factors), torch.empty_like(factors)
        smaller = " or a smaller group_size" if least > 2 else ""
        for number, factor in enumerate(factors.T):
            counts = factor.bincount()
            fewest = int(counts.min())
            if fewest < least:
                raise ValueError(
                    f"{where}: expected at least {least} rows of every value of factor {number}, "
                    f"got a value with {fewest}. Pass more rows{smaller}."
                )
            self._count[:, number] = counts[factor]
            self._first[:, number] = (counts.cumsum(0) - counts)[factor]

    def least(self, values: torch.Tensor) -> torch.Tensor:
        """Where each row of ``values`` is least, by lot among equals up to rounding."""
        is_least = values <= values.amin(-1, keepdim=True) + 1e-12
        lots = torch.rand(values.shape, generator=self._generator, dtype=torch.float64)
        return (is_least * (lots + 1)).argmax(-1)

    def groups(self, num: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Chunks of rows ``(chunk, size)``, and the factors that they share, ``(chunk,)``."""
        for fixed in self._fixed(num):
            row = self._below(torch.full_like(fixed, self._num_rows))
            first, count = self._first[row, fixed], self._count[row, fixed]
            places = first.unsqueeze(-1) + self._below(count.unsqueeze(-1).expand(-1, self._size))
            yield self._sorted[places, fixed.unsqueeze(-1)], fixed

    def pairs(self, num: int, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Chunks of rows and different ones of the same value, ``(chunk, size)``; the factors."""
        for fixed in self._fixed(num):
            column = fixed.unsqueeze(-1)
            row = self._below(torch.full((len(fixed), size), self._num_rows))
            first, count = self._first[row, column], self._count[row, column]
            step = 1 + self._below(count - 1)
            place = first + (self._place[row, column] - first + step) % count
            yield row, self._sorted[place, column], fixed

    def _fixed(self, num: int) -> tuple[torch.Tensor, ...]:
        return (torch.arange(num) % self._num_factors).split(_CHUNK)

    def _below(self, limits: torch.Tensor) -> torch.Tensor:
        """Random integers from 0 to below each limit."""
        u = torch.rand(limits.shape, generator=self._generator, dtype=torch.float64)
        return (u * limits).long()
