"""Parts, copies and KLs of distributions."""

import pyro.distributions as dist
import torch

from pyro_vae.densities import closed_form_kl, elementwise, log_prob_anywhere, unchecked, unwrapped


def test_unchecked_is_a_copy() -> None:
    fn = dist.LogNormal(torch.zeros(3), 1.0).expand([2, 3]).to_event(1)
    fn.log_prob(torch.ones(2, 3))
    uniform = dist.Uniform(0.0, torch.ones(3), validate_args=True).to_event(1)
    assert unchecked(uniform).log_prob(torch.full((3,), 2.0)) == -torch.inf
    assert uniform.base_dist._validate_args
    assert torch.equal(unchecked(fn).log_prob(torch.ones(2, 3)), fn.log_prob(torch.ones(2, 3)))


def test_elementwise() -> None:
    normal = dist.Normal(torch.zeros(3, 2), 1.0)
    assert elementwise(normal.to_event(2)) is normal
    assert elementwise(normal) is normal
    assert elementwise(dist.MultivariateNormal(torch.zeros(2), torch.eye(2))) is None
    assert elementwise(dist.Dirichlet(torch.ones(3)).mask(torch.tensor(True))) is None
    rows = torch.tensor([True, False, True])
    inner = elementwise(normal.to_event(1).mask(rows))
    assert inner is not None
    expected = normal.log_prob(torch.ones(())) * rows.unsqueeze(-1)
    torch.testing.assert_close(inner.log_prob(torch.ones(3, 2)), expected)


def test_densities_outside_the_support() -> None:
    fn = dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]), validate_args=True)
    log_prob = log_prob_anywhere(fn, torch.tensor(0.5))
    assert log_prob.tolist() == [0.0, -torch.inf]
    assert log_prob_anywhere(dist.Exponential(1.0), torch.tensor(-2.0)) == -torch.inf


def test_unwrapped() -> None:
    normal = dist.Normal(torch.zeros(3, 2), 1.0)
    wrapped = dist.ExpandedDistribution(normal, torch.Size([4, 3, 2])).mask(torch.ones(2) > 0)
    assert unwrapped(wrapped.to_event(1)) is normal
    categorical = dist.Categorical(torch.ones(3))
    assert unwrapped(categorical) is categorical


def test_closed_forms() -> None:
    q, p = dist.Normal(torch.ones(3), 1.0), dist.Normal(torch.zeros(3), 1.0)
    kl = closed_form_kl(q.to_event(1), p.to_event(1))
    assert kl is not None
    torch.testing.assert_close(kl, torch.tensor(1.5))
    assert closed_form_kl(q, dist.StudentT(torch.full((3,), 4.0))) is None
    assert closed_form_kl(dist.Delta(torch.zeros(3)), p) is None
    assert closed_form_kl(q.mask(False), p.mask(False)) is None
