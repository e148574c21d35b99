"""Importance-weighted log-likelihood of any model/guide pair."""

from collections.abc import Callable
from typing import Any

from pyro_vae.checks import check_at_least, refuse_subsampling
from pyro_vae.evaluation.estimate import LogLikelihoodEstimate
from pyro_vae.evaluation.particles import Particles
from pyro_vae.evaluation.weights import LogWeightSums
from pyro_vae.isolation import without_side_effects
from pyro_vae.pairs import data_plates, refuse_point_mass, trace_pair

__all__ = ["importance_weighted_log_likelihood"]

# Chunks that stay near the cache are faster on a CPU; a GPU wants large ones.
_CHUNK_BYTES = {"cpu": 2**25}
_CHUNK_BYTES_ACCELERATOR = 2**30


def importance_weighted_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 5000,
    chunk_size: int | None = None,
    chunk_bytes: int | None = None,
    compiled: bool = False,
    **kwargs: Any,
) -> LogLikelihoodEstimate:
    r"""Estimates log p(x) of every datum in a batch by importance sampling from the guide.

    .. math::
        \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
        \qquad z_k \sim q(z \mid x)

    A lower bound in expectation that rises with K to log p(x). All K particles count, in chunks
    whose size changes memory and speed but not the result. Evaluation only: modules run in eval
    mode, no gradient is kept, parameters are not touched, every scale (beta, subsampling) is
    ignored and every mask kept. Discrete latents that the guide leaves out are summed out.

    Args:
        model: Any callable with Pyro statements whose sites share a plate over the data.
        guide: A callable with the same signature.
        *args: One batch, as for ``svi.step``.
        num_particles: K.
        chunk_size: Particles evaluated at a time; chosen from ``chunk_bytes`` by default.
        chunk_bytes: Memory a chunk may take; 32 MiB on the CPU, 1 GiB elsewhere.
        compiled: Whether to compile what runs for every chunk, which takes seconds once for all
            batches of a shape; worth it from a minute of evaluation on. Where that fails a
            warning says why, and the estimate is computed as without.
        **kwargs: Keyword arguments of model and guide.

    Returns:
        Per-datum estimates in nats, shape ``(batch,)``. If sites share several plates the shape
        is theirs, outermost first.

    Raises:
        ValueError: If ``num_particles``, ``chunk_size`` or ``chunk_bytes`` is below 1; the data
            are empty, not finite or outside the likelihood's support; a site lies outside the
            data plate; guide and model have different latents; a log-weight is NaN.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the exact posterior
        >>> x = torch.tensor([0.0, 1.0])
        >>> estimate = importance_weighted_log_likelihood(model, guide, x, num_particles=10)
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
        >>> torch.allclose(estimate.log_likelihood.float(), exact)
        True

    References:
        Burda et al. (2016), Importance weighted autoencoders, equation 8,
        https://arxiv.org/abs/1509.00519
    """
    where = "importance_weighted_log_likelihood"
    check_at_least(where, "num_particles", num_particles, 1)
    for name, value in {"chunk_size": chunk_size, "chunk_bytes": chunk_bytes}.items():
        if value is not None:
            check_at_least(where, name, value, 1)
    with without_side_effects(model, guide):
        with refuse_subsampling(where):
            pair = trace_pair(model, guide, args, kwargs, where)
        refuse_point_mass(pair, where)
        plates = data_plates(pair, where)
        particles = Particles(pair, plates, where, compiled=compiled)
        if chunk_size is None:
            default = _CHUNK_BYTES.get(pair.device.type, _CHUNK_BYTES_ACCELERATOR)
            chunk_size = particles.chunk_size_within(chunk_bytes or default)
        sums = LogWeightSums(plates.sizes, num_particles, pair.device, block=particles.block)
        for log_weights in particles.log_weights(num_particles, chunk_size):
            sums.add(log_weights)
    return LogLikelihoodEstimate(
        log_likelihood=sums.log_mean,
        standard_error=sums.standard_error,
        effective_sample_size=sums.effective_sample_size,
        pareto_k=sums.pareto_k,
        elbo=sums.mean_log,
        num_particles=num_particles,
    )
