"""Priors: sub-programs that sample the latents of a model."""

import pyro
import pytest
import torch
from pyro import poutine

from pyro_vae.priors import StandardNormalPrior


def test_standard_normal() -> None:
    prior = StandardNormalPrior(3)
    with poutine.trace() as tracer, pyro.plate("data", 5):
        code = prior()
    tracer.trace.compute_log_prob()
    site = tracer.trace.nodes["z"]
    assert code is site["value"]
    assert code.shape == (5, 3)
    normal = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(site["log_prob"], normal.log_prob(code).sum(-1))


def test_standard_normal_under_particles() -> None:
    prior = StandardNormalPrior(3)
    with pyro.plate("particles", 7, dim=-2), pyro.plate("data", 5, dim=-1):
        assert prior().shape == (7, 5, 3)


def test_the_site_can_be_named() -> None:
    with poutine.trace() as tracer, pyro.plate("data", 5):
        StandardNormalPrior(3, site="code")()
    assert "code" in tracer.trace.nodes


def test_it_has_no_parameters_and_moves_with_its_module() -> None:
    prior = StandardNormalPrior(3)
    assert not list(prior.parameters())
    assert not prior.state_dict()
    with pyro.plate("data", 5):
        assert prior.float()().dtype == torch.float32


def test_latent_dim_below_one() -> None:
    with pytest.raises(ValueError, match="StandardNormalPrior: expected latent_dim >= 1, got 0"):
        StandardNormalPrior(0)
