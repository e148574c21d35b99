"""Conditional log-likelihoods: all patterns of missing and given modalities, against exact ones."""

from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_modalities import WIDTHS, LinearModalities, mixed_patterns

from pyro_vae.evaluation import conditional_log_likelihood, importance_weighted_log_likelihood

NAMES = list(WIDTHS)
SUBSETS = [names for size in (1, 2, 3) for names in combinations(NAMES, size)]


@pytest.fixture
def p() -> LinearModalities:
    return LinearModalities()


def wide(p: LinearModalities) -> Any:
    """A guide that is not the posterior: its scales are too large."""

    def guide(batch: Any, present: Any = None) -> None:
        loc, scale = p.product(batch, present)
        with pyro.plate("rows", len(loc)):
            pyro.sample("code", dist.Normal(loc, 1.3 * scale).to_event(1))

    return guide


@pytest.mark.parametrize("given", SUBSETS)
def test_with_the_exact_posterior_every_pattern_is_exact(p: LinearModalities, given: Any) -> None:
    batch, present = mixed_patterns(p.data(16))
    found = conditional_log_likelihood(
        p.model, p.guide, batch, present, given=given, num_particles=3
    )
    exact = p.exact.conditional_log_prob(batch, given, present)
    torch.testing.assert_close(found.log_likelihood, exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.elbo, exact, rtol=0, atol=1e-10)
    assert found.standard_error.max() < 1e-7
    torch.testing.assert_close(found.effective_sample_size, torch.full((16,), 3.0))
    assert found.num_particles == 3


def test_masks_of_what_is_given(p: LinearModalities) -> None:
    """By row; without `present`, and with it, where it wins."""
    whole, (batch, present) = p.data(16), mixed_patterns(p.data(16))
    given = {"image": torch.arange(16) % 3 == 0, "text": torch.arange(16) % 5 < 3}
    for args in ((whole, None), (batch, present)):
        found = conditional_log_likelihood(p.model, p.guide, *args, given=given, num_particles=2)
        exact = p.exact.conditional_log_prob(args[0], given, args[1])
        torch.testing.assert_close(found.log_likelihood, exact, rtol=0, atol=1e-10)


def test_standard_errors(p: LinearModalities) -> None:
    """Calibrated over many equal rows, and what a row lacks or has in full is exact."""
    num = 2000
    batch = {name: x[:1].expand(num, -1) for name, x in p.data(1).items()}
    found = conditional_log_likelihood(p.model, wide(p), batch, given=["sound"], num_particles=300)
    exact = p.exact.conditional_log_prob(batch, ["sound"])
    z = (found.log_likelihood - exact) / found.standard_error
    assert abs(float(z.mean())) < 5 / num**0.5 + 0.05  # The logarithm leaves a small bias.
    assert 0.85 < float(z.var()) < 1.15


def test_nothing_given_and_nothing_asked(p: LinearModalities) -> None:
    batch = p.data(3)
    given = {name: torch.tensor([True, False, True]) for name in NAMES}
    given["text"] = torch.tensor([True, False, False])
    found = conditional_log_likelihood(p.model, wide(p), batch, given=given, num_particles=50)
    assert found.log_likelihood[0] == found.elbo[0] == found.standard_error[0] == 0
    assert found.effective_sample_size[0] == 50
    assert found.pareto_k[0] == -torch.inf
    pyro.set_rng_seed(1)
    alone = conditional_log_likelihood(p.model, wide(p), batch, given=given, num_particles=50)
    pyro.set_rng_seed(1)
    joint = importance_weighted_log_likelihood(p.model, wide(p), batch, None, num_particles=50)
    for name in ("log_likelihood", "standard_error", "effective_sample_size", "pareto_k", "elbo"):
        assert getattr(alone, name)[1] == getattr(joint, name)[1]
    assert alone.log_likelihood[2] != joint.log_likelihood[2]


def test_the_worse_of_the_two_is_reported(p: LinearModalities) -> None:
    batch, settings = p.data(5), {"num_particles": 64}
    pyro.set_rng_seed(2)
    found = conditional_log_likelihood(p.model, wide(p), batch, given=["text"], **settings)
    pyro.set_rng_seed(2)
    joint = importance_weighted_log_likelihood(p.model, wide(p), batch, None, **settings)
    rows = {"text": torch.ones(5, dtype=torch.bool)}
    other = importance_weighted_log_likelihood(
        p.model, wide(p), {"text": batch["text"]}, rows, **settings
    )
    close = torch.testing.assert_close
    close(found.log_likelihood, joint.log_likelihood - other.log_likelihood)
    close(found.standard_error, (joint.standard_error**2 + other.standard_error**2).sqrt())
    sizes = joint.effective_sample_size, other.effective_sample_size
    close(found.effective_sample_size, torch.minimum(*sizes))
    close(found.pareto_k, torch.maximum(joint.pareto_k, other.pareto_k))


def test_the_batch_is_not_changed(p: LinearModalities) -> None:
    batch, present = mixed_patterns(p.data(8))
    before = {name: x.clone() for name, x in batch.items()}
    conditional_log_likelihood(
        p.model, p.guide, batch, present, given=["image"], num_particles=2, chunk_size=1
    )
    assert batch.keys() == before.keys()
    for name, x in batch.items():
        assert torch.equal(x.nan_to_num(7.0), before[name].nan_to_num(7.0))


BOTH = torch.tensor([True, True])


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (["smell"], ValueError, "expected given among the modalities .*, got 'smell'"),
        ([], ValueError, "expected at least one modality in given, got none"),
        ("image", TypeError, r"got 'image'. Write given=\['image'\]"),
        (3, TypeError, "expected given to be a collection of modalities, got 3"),
        ({"image": BOTH.double()}, TypeError, r"given\['image'\] to be a bool tensor"),
        ({"image": BOTH[:, None]}, ValueError, r"given\['image'\] of shape \(batch,\)"),
        ({"image": BOTH[:1]}, ValueError, r"given\['image'\] with 2 rows as in batch, got 1"),
    ],
)
def test_bad_calls(p: LinearModalities, given: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=f"conditional_log_likelihood: .*{match}"):
        conditional_log_likelihood(p.model, p.guide, p.data(2), given=given)


def test_a_batch_that_is_no_mapping(p: LinearModalities) -> None:
    batch: Any = torch.zeros(3)
    with pytest.raises(TypeError, match="expected batch to be a mapping from modality to tensor"):
        conditional_log_likelihood(p.model, p.guide, batch, given=["image"])
