"""Amortized guides for a hierarchy of latents: z1 nearest the data, above it z2, z3 and so on."""

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn.functional import logsigmoid

from pyro_vae.checks import check_batch
from pyro_vae.nets import NormalEncoder
from pyro_vae.priors import HierarchicalPrior
from pyro_vae.program import Program

__all__ = ["AmortizedBottomUp", "AmortizedLadder"]


class AmortizedBottomUp(Program):
    """q(z | x) = q(z1 | x) q(z2 | z1) q(z3 | z2) ..., each factor a diagonal normal.

    It samples from the bottom up, against the order of the model: ``TraceMeanField_ELBO`` is
    not valid with it, ``Trace_ELBO`` and importance weights are.

    Args:
        networks: From data to ``2 * dim`` numbers for z1, from z1 to those for z2, and so on:
            the locs and the raw scales (through a softplus). Two or more.
        sites: Names of the latent sites, the lowest first; "z1", "z2", ... by default.
        name: Name in the param store.

    Raises:
        ValueError: If there are fewer than two networks, or not one site for each.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> guide = AmortizedBottomUp([MLP(64, [32], 2 * 4), MLP(4, [16], 2 * 2)])
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 4])

    References:
        Burda et al. (2016), Importance weighted autoencoders, section 2,
        https://arxiv.org/abs/1509.00519
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        sites: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        _check_number("AmortizedBottomUp", "networks", networks, None)
        default = [f"z{level}" for level in range(1, len(networks) + 1)]
        sites = default if sites is None else list(sites)
        if len(set(sites)) != len(networks):
            raise ValueError(
                f"AmortizedBottomUp: expected {len(networks)} different sites, one per network, "
                f"got {sites}. Name the lowest latent first."
            )
        super().__init__(name)
        self.encoders = nn.ModuleList([NormalEncoder(network) for network in networks])
        self.sites = sites

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Samples all latents of a batch ``(batch, *event)``; returns z1, ``(..., batch, dim)``."""
        check_batch("AmortizedBottomUp", "x", x)
        codes = [x]
        with pyro.plate("data", len(x)):
            for encoder, site in zip(self.encoders, self.sites, strict=True):
                q: TorchDistribution = encoder(codes[-1])
                if len(codes) == 1:
                    _check_rows("AmortizedBottomUp", q, x)
                codes.append(pyro.sample(site, q))
        return codes[1]


class AmortizedLadder(Program):
    r"""q(z | x) = q(z_L | x) ... q(z2 | z3, x) q(z1 | z2, x), corrected from the bottom up.

    Deterministic features rise from the data, d_1(x), d_2(d_1), ..., and a head on each gives a
    normal in that level's latent. At the top it is the posterior; below, it is multiplied with
    the model's own conditional p(z_l | z_{l+1}):

    .. math:: q(z_l \mid z_{l+1}, x) \propto N(z_l; \hat\mu_l(x), \hat\sigma_l^2(x))\,
        p(z_l \mid z_{l+1})

    Sites run in the model's order, so ``TraceMeanField_ELBO`` may be used.

    Args:
        prior: The model's ``HierarchicalPrior``, whose conditionals return diagonal normals. Its
            parameters stay the model's alone.
        networks: Features: from data to d_1, from d_1 to d_2, and so on, one per latent.
        heads: From each d_l to ``2 * dim`` numbers for z_l: the locs and the raw scales (through
            a softplus).
        top_site: Name of the top latent's site, "z2" in a hierarchy of two by default.
        name: Name in the param store.

    Raises:
        TypeError: If ``prior`` is another one; when called, if a conditional is no diagonal normal.
        ValueError: If there is not one network and one head per latent; when called, if a head
            and its conditional differ in width.

    Example:
        >>> from pyro_vae.likelihoods import Bernoulli
        >>> from pyro_vae.models import HierarchicalVAE
        >>> from pyro_vae.nets import MLP
        >>> model = HierarchicalVAE([4, 2], MLP(4, [32], 64), Bernoulli(), hidden=[16])
        >>> networks = [MLP(64, [], 32), MLP(32, [32], 16)]
        >>> heads = [MLP(32, [], 2 * 4), MLP(16, [], 2 * 2)]
        >>> AmortizedLadder(model.prior, networks, heads)(torch.zeros(5, 64)).shape
        torch.Size([5, 4])

    References:
        Sonderby et al. (2016), Ladder variational autoencoders, equations 17-19,
        https://arxiv.org/abs/1602.02282
    """

    def __init__(
        self,
        prior: Callable[[], torch.Tensor],
        networks: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        *,
        top_site: str | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(prior, HierarchicalPrior):
            raise TypeError(
                f"AmortizedLadder: expected a HierarchicalPrior, got {type(prior).__name__}. "
                "Pass the prior of the model, model.prior."
            )
        depth = len(prior.conditionals) + 1
        _check_number("AmortizedLadder", "networks", networks, depth)
        _check_number("AmortizedLadder", "heads", heads, depth)
        super().__init__(name)
        self._prior = (prior,)  # In a tuple: the parameters stay the model's alone.
        self.networks = nn.ModuleList(networks)
        self.encoders = nn.ModuleList([NormalEncoder(head) for head in heads])
        self.top_site = top_site or f"z{depth}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Samples all latents of a batch ``(batch, *event)``; returns z1, ``(..., batch, dim)``."""
        check_batch("AmortizedLadder", "x", x)
        prior, feature, normals = self._prior[0], x, []
        with pyro.plate("data", len(x)):
            for network, encoder in zip(self.networks, self.encoders, strict=True):
                feature = network(feature)
                normals.append(encoder(feature))
                _check_rows("AmortizedLadder", normals[-1], x)
            code: torch.Tensor = pyro.sample(self.top_site, normals.pop())
            for conditional, site in zip(prior.conditionals, prior.sites, strict=True):
                try:
                    top_down = conditional(code)
                except (RuntimeError, ValueError) as err:
                    err.add_note(
                        f"AmortizedLadder: the prior's conditional of site '{site}' got the code "
                        f"above, of shape {tuple(code.shape)}. Each head has twice as many outputs "
                        "as its level has latents; list networks and heads from the data upwards."
                    )
                    raise
                code = pyro.sample(site, _product(normals.pop(), top_down, site))
        return code


def _product(
    bottom_up: TorchDistribution, top_down: TorchDistribution, site: str
) -> TorchDistribution:
    """The normalised product of two diagonal normals, precisions added in log space."""
    normals = []
    for fn in (bottom_up, top_down):
        if not (isinstance(fn, Independent) and isinstance(fn.base_dist, Normal)):
            raise TypeError(
                f"AmortizedLadder: expected a diagonal normal as the prior's conditional of site "
                f"'{site}', got {fn}. Return dist.Normal(loc, scale).to_event(1), or use "
                "AmortizedBottomUp."
            )
        normals.append(fn.base_dist)
    up, down = normals
    if up.loc.shape[-1] != down.loc.shape[-1]:
        raise ValueError(
            f"AmortizedLadder: expected a head with 2 * {down.loc.shape[-1]} outputs for site "
            f"'{site}', got 2 * {up.loc.shape[-1]}. List networks and heads from the data "
            "upwards."
        )
    log_ratio = 2 * (down.scale.log() - up.scale.log())
    loc = torch.lerp(down.loc, up.loc, log_ratio.sigmoid())
    scale = (up.scale.log() + logsigmoid(log_ratio) / 2).exp()
    return dist.Normal(loc, scale).to_event(1)


def _check_number(where: str, name: str, networks: Sequence[nn.Module], wanted: int | None) -> None:
    number = len(networks)
    if number < 2 or number != (wanted or number):
        raise ValueError(
            f"{where}: expected {wanted or 'two or more'} {name}, one for each latent, got "
            f"{number}. With a single latent use AmortizedNormal."
        )


def _check_rows(where: str, q: TorchDistribution, x: torch.Tensor) -> None:
    if q.batch_shape != (len(x),):
        raise ValueError(
            f"{where}: expected the networks to encode each of {len(x)} rows into one code, got "
            f"codes of batch shape {tuple(q.batch_shape)} from x of shape {tuple(x.shape)}. "
            "Flatten each datum (x.flatten(1)), or start with a network for data of that shape."
        )
