"""The ELBO of latents whose joint is known up to a normaliser, and its gradient by sampling."""

import math
from functools import reduce
from operator import or_
from typing import Any

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.interplay import Interplay
from pyro_vae.interplay_sites import Chain, InterplayMarginal, Unnormalised
from pyro_vae.objectives.objective import Objective
from pyro_vae.objectives.weighted_draws import WeightedDraws
from pyro_vae.pairs import Pair
from pyro_vae.runs import Run
from pyro_vae.scales import same_scale
from pyro_vae.traces import Site, is_latent, is_observed, layers, masked, sites_of

__all__ = ["TraceInterplay_ELBO"]


class TraceInterplay_ELBO(Objective):
    r"""The ELBO of ``InterplayVAE`` and other programs of ``sample_interplay``.

    With u the log-density of latents without normaliser, p(z) = exp(u_p(z)) / Z_p and
    q(z | x) = exp(u_q(z)) / Z_q(x), the ELBO of a datum is

    .. math::
        E_q[\log p(x \mid z) + u_p(z) - u_q(z)] + \log Z_q(x) - \log Z_p

    and the gradient of the last two terms is :math:`E_q[\nabla u_q] - E_p[\nabla u_p]`: expected
    sufficient statistics, which Gibbs samples give. Real latents are reparameterised through all
    sweeps. For binary ones the gradient of the first term is the covariance of what is in the
    brackets with :math:`\nabla u_q`, estimated without bias from two particles or more.

    A row of which nothing is observed adds exactly 0 to bound and gradient, whatever the guide:
    log p of nothing is 0.

    **What is reported.** Where the program samples exactly and knows its normalisers: an
    unbiased estimate of the negative ELBO; so is the gradient then.

    Otherwise both normalisers are estimated. In the place of log Z_q(x) stands the log-weight
    of the very chain that gave the latents (annealed importance sampling from no interaction to
    full strength), so that for any number of sweeps, mixed or not, the expected value lies below
    log p(x) + log Z_p, and below the ELBO only as far as the chain is from q. log Z_p is one number
    for all data, estimated from ``num_chains`` chains of the prior; or from those of the guide,
    each weighted by exp(u_p - u_q), where more than one of them show at least twice as much.
    Either is unbiased for Z_p and on average too small for its logarithm, by as much as it misses
    of where the prior has its mass; the second finds what the data lie in, should the first not
    get there. So what is reported is an *estimate* of a bound, which may lie above log p(x), for
    every datum alike, by what both miss.
    Neither the standard error of :meth:`log_partition` nor more sweeps will tell: a chain that
    never meets a mode does not know of it. The gradient is that of the ELBO up to how far the
    chains are from p and q.

    Args:
        num_particles: Chains from the guide for each datum.
        num_chains: Chains from the prior, for all data together, where it has no closed form.
        vectorize_particles: Whether to run particles at once in an outermost plate; by default
            wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        ValueError: While running, if model or guide has not one interplay, they are of different
            modalities, the guide's latents are not the chain's own, or latents without a
            gradient have a single particle.

    Example:
        >>> from pyro_vae.guides.interplay import AmortizedInterplay
        >>> from pyro_vae.likelihoods import Normal
        >>> from pyro_vae.interplay_prior import InterplayPrior
        >>> from pyro_vae.models.interplay import InterplayVAE
        >>> from pyro_vae.nets import MLP
        >>> prior = InterplayPrior({"a": 2, "b": 2}, "bernoulli")
        >>> nets = {"a": MLP(3, [], 2), "b": MLP(3, [], 2)}
        >>> back = {"a": MLP(2, [], 3), "b": MLP(2, [], 3)}
        >>> model = InterplayVAE(back, {"a": Normal(), "b": Normal()}, prior)
        >>> guide = AmortizedInterplay(nets, prior)
        >>> elbo = TraceInterplay_ELBO(num_particles=4)
        >>> batch = {"a": torch.randn(5, 3), "b": torch.randn(5, 3)}
        >>> elbo.differentiable_loss(model, guide, batch).shape
        torch.Size([])

    References:
        Welling, Rosen-Zvi and Hinton (2005), Exponential family harmoniums with an application
        to information retrieval, for the gradient of log Z. Neal (2001), Annealed
        importance sampling.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        num_chains: int = 100,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, vectorize_particles=vectorize_particles, retain_graph=retain_graph
        )
        check_at_least("TraceInterplay_ELBO", "num_chains", num_chains, 2)
        self.num_chains = num_chains

    def log_partition(
        self, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An estimate of log Z of the model's latents, and its standard error, nats.

        The shape is that of the prior's batch, 0-d for ``InterplayPrior``. The standard error is 0
        where log Z is known.
        """
        with torch.no_grad():
            runs = self._runs(model, guide, args, kwargs, training=False)
            value, _, error = self._of_prior(runs)
        return value, error

    def _runs(self, model: Any, guide: Any, args: Any, kwargs: Any, *, training: bool) -> list[Run]:
        with Unnormalised():
            return super()._runs(model, guide, args, kwargs, training=training)

    def _losses(self, runs: list[Run], training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with Unnormalised():
            draws = WeightedDraws.of(runs)
        known = _anything_observed(runs[0], draws)

        def total(per_datum: torch.Tensor) -> torch.Tensor:
            return draws.scales.total(torch.where(known, per_datum, 0.0))

        gain = draws.log_p - draws.log_q  # (num, *plates)
        of_prior, trained_of_prior, _ = self._of_prior(runs)
        values, trained = [], []
        for run in runs:
            of_guide, trained_of_guide = _of_guide(run)
            values.append(_per_datum(of_guide - of_prior, run, draws))
            trained.append(_per_datum(trained_of_guide - trained_of_prior, run, draws))
        bound = -total((gain + torch.cat(values)).mean(0))
        if not training:
            return bound, bound
        training_loss = -total((gain + torch.cat(trained)).mean(0))
        if draws.score is not None:
            centred = (gain - gain.mean(0)).detach() * len(gain) / (len(gain) - 1)
            training_loss = training_loss - total((centred * draws.score).mean(0))
        return bound, training_loss

    def _of_prior(self, runs: list[Run]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log Z of the prior, a number with its gradient, and the standard error of the first."""
        chain = _chain(runs[0], "model")
        if chain.num_sweeps is None:
            value = chain.joint.log_partition()
            return value, value, torch.zeros_like(value)
        with torch.no_grad():
            latents, log_weight = chain.run(chain.joint, (self.num_chains,))
            value, relative = _log_mean(log_weight), _relative_error(log_weight)
            # Weighted: an expectation under p, even where the chains have not arrived there.
            weights = log_weight.softmax(0)
            if not chain.joint.batch_shape:
                others, other_weight = _through_the_guide(runs, chain.joint)
                more = _finds_more(other_weight, log_weight)
                value = torch.where(more, _log_mean(other_weight), value)
                relative = torch.where(more, _relative_error(other_weight), relative)
                weights = torch.cat(
                    [
                        torch.where(more, 0.0, weights),
                        torch.where(more, other_weight.softmax(0), 0.0),
                    ]
                )
                latents = {name: torch.cat([z, others[name]]) for name, z in latents.items()}
        return value, (weights * chain.joint.log_density(latents)).sum(0), relative

    def _check(self, pair: Pair) -> None:
        where, run = "TraceInterplay_ELBO", Run.of(pair)
        names = [_chain(run, role).joint.names for role in ("model", "guide")]
        if names[0] != names[1]:
            raise ValueError(
                f"{where}: expected the same modalities in the same order, got {list(names[0])} in "
                f"the model and {list(names[1])} in the guide. Make the guide with the model's "
                "prior."
            )
        sites = [*_sites(run, "model").values(), *_sites(run, "guide").values()]
        for site in sites[1:]:
            if not same_scale(site["scale"], sites[0]["scale"]) or not torch.equal(
                run.present(site), run.present(sites[0])
            ):
                raise ValueError(
                    f"{where}: expected one scale and one mask around all latents of the "
                    f"interplay, got others at site '{site['name']}'. Their density is known as a "
                    "whole only: wrap all of them, in model and guide."
                )
        scored = [n for n, s in sites_of(run.guide_trace, is_latent).items() if not _has_path(s)]
        if scored and self.num_particles == 1:
            raise ValueError(
                f"{where}: expected num_particles >= 2 for site '{scored[0]}', whose samples have "
                "no gradient, got 1. Pass num_particles=8."
            )


def _finds_more(log_weight: torch.Tensor, than: torch.Tensor) -> torch.Tensor:
    """Whether weights show a part of Z that is larger than all that others show.

    Without the largest of them, too: the weights from the guide have heavy tails, and the larger
    of two estimates would often be the one with the luckier draw.
    """
    others = log_weight.sort().values[:-1]
    return others.logsumexp(0) - math.log(len(log_weight)) > _log_mean(than) + math.log(2)


def _log_mean(log_weight: torch.Tensor) -> torch.Tensor:
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def _relative_error(log_weight: torch.Tensor) -> torch.Tensor:
    relative = (log_weight - _log_mean(log_weight)).exp()
    return relative.std(0) / math.sqrt(len(log_weight))


def _through_the_guide(
    runs: list[Run], prior: Interplay
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The guide's latents with weights for the prior: of mean Z_p, ``(chains,)``.

    A chain's own weight w has E[w f(z)] = Z_q E_q[f] for any f, so for f = exp(u_p - u_q) too.
    """
    latents: dict[str, list[torch.Tensor]] = {name: [] for name in prior.names}
    log_weights = []
    for run in runs:
        chain = _chain(run, "guide")
        own_weight, _ = _of_guide(run)
        sites = _sites(run, "guide")
        values = {name: sites[name]["value"] for name in prior.names}
        log_weight = own_weight + prior.log_density(values) - chain.joint.log_density(values)
        log_weights.append(log_weight.flatten())
        for name, value in values.items():
            latents[name].append(value.expand(*log_weight.shape, -1).flatten(0, -2))
    return {name: torch.cat(parts) for name, parts in latents.items()}, torch.cat(log_weights)


def _of_guide(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """log Z_q, or the log-weight in its place, and a number with the gradient of log Z_q."""
    chain = _chain(run, "guide")
    if chain.num_sweeps is None:
        value = chain.joint.log_partition()
        return value, value
    latents = {name: site["value"] for name, site in _sites(run, "guide").items()}
    own = all(chain.latents.get(name) is value for name, value in latents.items())
    if chain.log_weight is None or not own:
        raise ValueError(
            "TraceInterplay_ELBO: expected a guide that draws all latents of the interplay by "
            "itself, got values that a handler put there. Their density is not known: remove "
            "poutine.condition or poutine.replay around the guide."
        )
    still = {name: value.detach() for name, value in latents.items()}
    return chain.log_weight.detach(), chain.joint.log_density(still)


def _per_datum(log_partition: torch.Tensor, run: Run, draws: WeightedDraws) -> torch.Tensor:
    """As it stands in the ELBO: ``(num, *plates)`` with a 1 for all plates but the data's."""
    site = next(iter(_sites(run, "guide").values()))
    values = run.spread(masked(log_partition, run.present(site)), site)
    values = values * draws.scales.of_site(site)
    others = [dim for dim in range(-run.nesting, 0) if dim not in draws.scales.dims]
    return values.sum(others, keepdim=True) if others else values


def _anything_observed(run: Run, draws: WeightedDraws) -> torch.Tensor:
    """Which data have an observed site that is not masked: bool, as in :func:`_per_datum`."""
    others = [dim for dim in range(-run.nesting, 0) if dim not in draws.scales.dims]
    observed = sites_of(run.model_trace, is_observed).values()
    known = [run.present(site) for site in observed]
    return reduce(or_, (k.any(dim=others, keepdim=True) if others else k for k in known))


def _sites(run: Run, role: str) -> dict[str, Site]:
    """The sites of the interplay by modality."""
    trace = run.model_trace if role == "model" else run.guide_trace
    found = {}
    for site in sites_of(trace, is_latent).values():
        fn = layers(site["fn"])[-1]
        if isinstance(fn, InterplayMarginal):
            found[fn.joint.names[0]] = site
    return found


def _chain(run: Run, role: str) -> Chain:
    """Of the only interplay of a program."""
    found = _sites(run, role)
    chains = {id(fn.chain): fn.chain for fn in (layers(s["fn"])[-1] for s in found.values())}
    if len(chains) != 1 or set(found) != set(next(iter(chains.values())).joint.names):
        raise ValueError(
            f"TraceInterplay_ELBO: expected one interplay in the {role}, with a latent for each "
            f"modality, got latents of {list(found)}. Sample them with "
            "pyro_vae.interplay_sites.sample_interplay, or train with another objective."
        )
    return next(iter(chains.values()))


def _has_path(site: Site) -> bool:
    return bool(site["fn"].has_rsample)
