"""Use of a codebook: closed cases, masks, and what is no site of codes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae.code_distributions import CategoricalCodes, NearestCodes
from pyro_vae.codebook import Codebook
from pyro_vae.evaluation.codebook_usage import CodebookUsage, codebook_usage
from pyro_vae.guides.codes import NearestCode

K, D = 6, 2


def codebook() -> Codebook:
    result = Codebook(K, D)
    result.vectors.data.copy_(torch.arange(12.0).reshape(K, D))
    return result


def test_counts_and_perplexity_in_closed_form() -> None:
    c = codebook()
    indices = torch.tensor([[0, 0, 2], [2, 5, 5], [5, 5, 0], [2, 5, 2]])
    x = c(indices).detach() + 0.3
    usage = codebook_usage(NearestCode(torch.nn.Flatten(), c, 3), x)
    assert usage.counts.tolist() == [3, 0, 4, 0, 0, 5]
    assert usage.num_used == 3
    entropy = -sum(n / 12 * math.log(n / 12) for n in (3, 4, 5))
    assert usage.entropy == pytest.approx(entropy, rel=1e-12)
    assert usage.perplexity == pytest.approx(math.exp(entropy), rel=1e-12)
    assert str(usage) == f"3 of 6 codes used, perplexity {math.exp(entropy):.1f}"


def test_extremes() -> None:
    even = CodebookUsage(torch.full((7,), 3))
    assert even.perplexity == pytest.approx(7, rel=1e-12)
    assert even.entropy == pytest.approx(math.log(7), rel=1e-12)
    assert CodebookUsage(torch.tensor([1, 0, 7])).num_used == 2
    single = CodebookUsage(torch.tensor([0, 9, 0]))
    assert (single.num_used, single.entropy, single.perplexity) == (1, 0.0, 1.0)


def two_sites(x: torch.Tensor) -> None:
    c = codebook()
    with pyro.plate("rows", len(x)):
        pyro.sample("top", NearestCodes(c, x[:, :1]))
        pyro.sample("bottom", NearestCodes(c, x[:, 1:]).mask(torch.arange(len(x)) != 1))
        pyro.sample("w", dist.Normal(0.0, 1.0))


def test_a_site_by_name_and_masks() -> None:
    c = codebook()
    x = c(torch.tensor([[0, 1, 2], [3, 4, 4], [0, 5, 2]])).detach()
    assert codebook_usage(two_sites, x, site="top").counts.tolist() == [2, 0, 0, 1, 0, 0]
    assert codebook_usage(two_sites, x, site="bottom").counts.tolist() == [0, 1, 2, 0, 0, 1]
    masked = poutine.mask(two_sites, mask=torch.tensor([False, True, True]))
    assert codebook_usage(masked, x, site="top").counts.tolist() == [1, 0, 0, 1, 0, 0]


def test_random_codes_are_drawn() -> None:
    probs, c = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0, 0.0]), codebook()

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", CategoricalCodes(c, probs.log().expand(len(x), 4, K)))

    usage = codebook_usage(guide, torch.zeros(5000, 1))
    num = 20_000
    assert int(usage.counts.sum()) == num
    error = (probs * (1 - probs) / num).sqrt()
    assert ((usage.counts / num - probs).abs() <= 5 * error).all()


def test_what_has_no_codes() -> None:
    x = codebook()(torch.tensor([[0, 1, 2]])).detach()
    with pytest.raises(ValueError, match=r"expected site 'w' to have codes .* got Normal. Name"):
        codebook_usage(two_sites, x, site="w")
    with pytest.raises(ValueError, match=r"expected site to be one of .*'top', 'bottom', 'w'"):
        codebook_usage(two_sites, x)
