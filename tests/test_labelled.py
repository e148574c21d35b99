"""Classes that are known in some rows, against sums over classes."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_vae.labelled import Labelled

close = torch.testing.assert_close
LABEL = torch.tensor([2, -1, 0, 99])
LABELLED = torch.tensor([True, False, True, False])


def base(seed: int = 1) -> dist.Categorical:
    generator = torch.Generator().manual_seed(seed)
    return dist.Categorical(logits=torch.randn(4, 3, generator=generator, dtype=torch.float64))


def some() -> Labelled:
    return Labelled(base(), LABEL, LABELLED)


def test_probabilities_are_those_of_the_base_or_of_the_label() -> None:
    fn = some()
    expected = base().probs.clone()
    expected[0], expected[2] = torch.tensor([0, 0, 1.0]), torch.tensor([1.0, 0, 0])
    close(fn.probs, expected)
    for expand in (True, False):
        classes = fn.enumerate_support(expand)
        assert classes.shape == ((3, 4) if expand else (3, 1))
        close(fn.log_prob(classes).exp().T, fn.probs)
    assert fn.batch_shape == (4,)
    assert fn.event_shape == ()
    assert torch.equal(fn.mode, torch.where(LABELLED, LABEL, base().probs.argmax(-1)))
    assert fn.mean.isnan().all()


def test_samples_are_labels_or_follow_the_base() -> None:
    num = 4000
    drawn = some().sample((num,))
    assert drawn.shape == (num, 4)
    assert (drawn[:, LABELLED] == LABEL[LABELLED]).all()
    share, p = (drawn[:, 1] == 2).double().mean(), base().probs[1, 2]
    assert abs(share - p) < 5 * (p * (1 - p) / num).sqrt()


def test_labels_are_scored_by_the_base() -> None:
    score = some().label_log_prob()
    close(score[0], base().logits[0, 2])
    close(score[2], base().logits[2, 0])
    assert (score[~LABELLED] == 0).all()


def test_it_expands() -> None:
    fn = some().expand((5, 4))
    assert fn.batch_shape == fn.sample().shape == fn.label_log_prob().shape == (5, 4)
    assert fn.enumerate_support(expand=False).shape == (3, 1, 1)
    close(fn.log_prob(fn.enumerate_support())[:, 3], some().log_prob(some().enumerate_support()))
    single = Labelled(dist.Categorical(torch.ones(3)), LABEL, LABELLED)
    assert single.batch_shape == (4,)  # the batch of the labels
    with pyro.plate("particles", 2, dim=-2), pyro.plate("data", 4):
        assert pyro.sample("y", some()).shape == (2, 4)


def test_it_takes_a_mask_and_a_copy() -> None:
    masked = some().mask(torch.tensor([False, True, True, True]))
    wrong = torch.tensor([0, 0, 0, 0])
    assert masked.log_prob(wrong)[0] == 0
    close(masked.log_prob(wrong)[1:], some().log_prob(wrong)[1:])
    close(copy.deepcopy(some()).probs, some().probs)


def test_no_class_beside_the_label_weighs_anything() -> None:
    """In value and in gradient, and multiplied by a weight of 0."""
    for dtype in (torch.float32, torch.float64):
        logits = base().logits.to(dtype).requires_grad_()
        fn = Labelled(dist.Categorical(logits=logits), LABEL, LABELLED)
        log_prob = fn.log_prob(fn.enumerate_support())
        assert log_prob.dtype == dtype
        weights = log_prob.exp()[:, LABELLED]
        assert ((weights == 0) | (weights == 1)).all()
        assert (weights.sum(0) == 1).all()
        assert (0 * log_prob == 0)[:, LABELLED].all()
        log_prob.exp()[0].sum().backward()
        assert (logits.grad[LABELLED] == 0).all()
        assert (logits.grad[~LABELLED] != 0).all()


def test_entropy_and_kl_are_sums_over_classes() -> None:
    def summed(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (torch.where(p > 0, p * (p / q).log(), 0.0)).sum(-1)

    fn = some()
    close(fn.entropy(), -torch.where(fn.probs > 0, fn.probs * fn.probs.log(), 0.0).sum(-1))
    known = {
        "alike": Labelled(base(2), LABEL, LABELLED),
        "other rows": Labelled(base(2), torch.tensor([-1, 1, 0, 2]), LABELLED.roll(1)),
        "other labels": Labelled(base(2), torch.tensor([1, -1, 0, -1]), LABELLED),
        "none": Labelled(base(2), LABEL, LABELLED & False),
    }
    for name, other in known.items():
        close(kl_divergence(fn, other), summed(fn.probs, other.probs), msg=name)
    assert (kl_divergence(fn, known["alike"])[LABELLED] == 0).all()
    assert kl_divergence(fn, known["other labels"])[0] == torch.inf


def test_what_is_no_base_and_no_label() -> None:
    with pytest.raises(TypeError, match="Labelled: expected a Categorical as base, got Normal. P"):
        Labelled(dist.Normal(0, 1), LABEL, LABELLED)
    with pytest.raises(TypeError, match=r"Labelled: expected label of integers, .* got torch.fl"):
        Labelled(base(), LABEL.double(), LABELLED)
    with pytest.raises(TypeError, match="Labelled: expected labelled to be a bool tensor, got"):
        Labelled(base(), LABEL, LABELLED.long())
    with pytest.raises(ValueError, match=r"Labelled: expected classes 0 \.\.\. 2 in label, got 99"):
        Labelled(base(), LABEL, LABELLED | (LABEL == 99))
    with pytest.raises(ValueError, match=r"Labelled: expected labelled of shape \(4,\)"):
        Labelled(base(), LABEL, LABELLED[:3])
