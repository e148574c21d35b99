"""Sub-programs that sample the latents inside a model and return the code for the decoder."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import Transform, constraints, transform_to

from pyro_vae.categorical_priors import CategoricalPrior, OneHotPrior
from pyro_vae.checks import check_at_least
from pyro_vae.code_priors import AutoregressiveCodePrior, UniformCodePrior
from pyro_vae.conditional_priors import ConditionalPrior, Unconditional
from pyro_vae.flows import ForeignFlow, TransformedNormal
from pyro_vae.interplay_prior import InterplayPrior
from pyro_vae.isolation import without_side_effects
from pyro_vae.prior_checks import (
    check_code,
    check_distribution,
    check_encoder,
    check_pseudo_inputs,
    check_real,
    check_transforms,
)
from pyro_vae.program import Program

__all__ = [
    "AutoregressiveCodePrior",
    "CategoricalPrior",
    "ConditionalPrior",
    "FlowPrior",
    "GaussianMixturePrior",
    "HierarchicalPrior",
    "InterplayPrior",
    "OneHotPrior",
    "StandardNormalPrior",
    "Unconditional",
    "UniformCodePrior",
    "VampPrior",
]


class StandardNormalPrior(PyroModule):
    """z ~ N(0, I).

    Args:
        latent_dim: Number of latents.
        site: Name of the sample site.

    Returns (when called inside a plate): the code, ``(*sample, batch, latent_dim)``.

    Example:
        >>> prior = StandardNormalPrior(3)
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 3])
    """

    loc: torch.Tensor
    scale: torch.Tensor

    def __init__(self, latent_dim: int, *, site: str = "z") -> None:
        check_at_least("StandardNormalPrior", "latent_dim", latent_dim, 1)
        super().__init__()
        self.site = site
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> torch.Tensor:
        """Samples the code within the plates around the call."""
        code: torch.Tensor = pyro.sample(self.site, dist.Normal(self.loc, self.scale).to_event(1))
        return code


# The priors with parameters are Programs, for names of their own in the param store: a plain
# function that calls a PyroModule makes it a root, and two roots named "" share their entries.


class HierarchicalPrior(Program):
    """z_L ~ top, then z_l ~ p(z_l | z_{l+1}) from top to bottom.

    Args:
        top: A prior, which samples its own site, such as ``StandardNormalPrior(4, site="z3")``.
        conditionals: Networks in order of execution, top to bottom. Each maps the code above,
            ``(*sample, batch, d_above)``, to a distribution over the code below, such as
            ``NormalEncoder(MLP(4, [32], 2 * 8))``.
        sites: Names of their sites, in the same order. By default ``"z{n}"``, ..., ``"z1"`` for n
            networks, ``"z1"`` nearest the data.

    Returns (when called inside a plate): the lowest code, ``(*sample, batch, d_lowest)``.

    Attributes:
        top: As given.
        conditionals: The networks, a ``ModuleList``.
        sites: Names of the sites of the networks, without that of ``top``.

    Raises:
        ValueError: If there is no network, or not one site a network; when called, if a network
            returns another batch shape than that of the code above.
        TypeError: When called, if a network does not return a distribution.

    Example:
        >>> from pyro_vae.nets import MLP, NormalEncoder
        >>> top = StandardNormalPrior(2, site="z2")
        >>> prior = HierarchicalPrior(top, [NormalEncoder(MLP(2, [16], 2 * 6))])
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 6])

    References:
        Sonderby et al. (2016), Ladder variational autoencoders, section 2,
        https://arxiv.org/abs/1602.02282
    """

    def __init__(
        self,
        top: Callable[[], torch.Tensor],
        conditionals: Sequence[nn.Module],
        *,
        sites: Sequence[str] | None = None,
    ) -> None:
        number = len(conditionals)
        if not number:
            raise ValueError(
                "HierarchicalPrior: expected at least one network in conditionals, got none. "
                "Without a network the prior is top itself."
            )
        names = tuple(f"z{n}" for n in range(number, 0, -1)) if sites is None else tuple(sites)
        of_top = getattr(top, "site", None)
        if len(names) != number or len({*names, of_top}) != number + 1:
            raise ValueError(
                f"HierarchicalPrior: expected {number} different sites, one for each network, and "
                f"another for top, got {list(names)} and {of_top!r}. Name them from top to bottom, "
                "without the site of top."
            )
        super().__init__()
        self.top = top
        self.conditionals = nn.ModuleList(conditionals)
        self.sites = names

    def forward(self) -> torch.Tensor:
        """Samples all codes within the plates around the call."""
        code = self.top()
        for site, conditional in zip(self.sites, self.conditionals, strict=True):
            try:
                fn = conditional(code)
            except (RuntimeError, ValueError) as err:
                err.add_note(
                    f"HierarchicalPrior: the network of site '{site}' got the code above, of shape "
                    f"{tuple(code.shape)}. Its input has to be as wide as that."
                )
                raise
            check_code(site, fn, code)
            code = pyro.sample(site, fn)
        return code


class GaussianMixturePrior(Program):
    """z ~ sum_k weights[k] N(locs[k], diag(scales[k]^2)), all of them learnt.

    The locs start at random, all scales at one and all weights equal.

    Args:
        latent_dim: Number of latents.
        num_components: K.
        site: Name of the sample site.

    Returns (when called inside a plate): the code, ``(*sample, batch, latent_dim)``.

    Attributes:
        locs: Means of the components, ``(K, latent_dim)``.
        raw_weights: Logits of the weights, ``(K,)``.
        raw_scales: Logarithms of the scales, ``(K, latent_dim)``.

    Example:
        >>> prior = GaussianMixturePrior(3, num_components=10)
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 3])

    References:
        Dilokthanakul et al. (2016), Deep unsupervised clustering with Gaussian mixture variational
        autoencoders, https://arxiv.org/abs/1611.02648. There the component is a latent; here it
        is summed out.
    """

    def __init__(self, latent_dim: int, num_components: int, *, site: str = "z") -> None:
        check_at_least("GaussianMixturePrior", "latent_dim", latent_dim, 1)
        check_at_least("GaussianMixturePrior", "num_components", num_components, 1)
        super().__init__()
        self.site = site
        # Not PyroParams, as in models.GaussianMixture: copies would share those.
        self.locs = nn.Parameter(torch.randn(num_components, latent_dim))
        self.raw_weights = nn.Parameter(torch.zeros(num_components))
        self.raw_scales = nn.Parameter(torch.zeros(num_components, latent_dim))

    @property
    def weights(self) -> torch.Tensor:
        """Probabilities of the components, ``(K,)``."""
        return self.raw_weights.softmax(-1)

    @property
    def scales(self) -> torch.Tensor:
        """Standard deviations of the components, ``(K, latent_dim)``."""
        scales: torch.Tensor = transform_to(constraints.positive)(self.raw_scales)
        return scales

    def forward(self) -> torch.Tensor:
        """Samples the code within the plates around the call."""
        components = dist.Normal(self.locs, self.scales).to_event(1)
        code: torch.Tensor = pyro.sample(self.site, _Mixture.of(components, self.raw_weights))
        return code


class VampPrior(Program):
    """z ~ 1/K sum_k q(z | u_k): the mixture of the codes of K learnt pseudo-inputs u_k.

    The encoder stays the guide's: its parameters are no parameters of the prior and are not saved
    with it, but they get gradients from the prior as well as from the guide, so train both with
    one ``SVI``. A copy of the model alone has an encoder of its own, which no longer follows the
    guide's: copy both at once, ``copy.deepcopy((model, guide))``. Modes are the guide's as well:
    ``model.eval()`` leaves the encoder as it is, and pseudo-inputs that pass a batch norm in train
    mode count in its running statistics, as data do.

    Args:
        encoder: The guide's own encoder, ``guide.encoder``: from ``(batch, *event)`` to a
            distribution over one code per row.
        pseudo_inputs: Where the pseudo-inputs start, ``(K, *event)``, for instance rows of the
            training data; they are copied.
        limits: ``(low, high)`` of the data: pseudo-inputs are clamped to it, as by the paper's
            hardtanh. On the limits they still learn, beyond them no more.
        site: Name of the sample site.

    Returns (when called inside a plate): the code, ``(*sample, batch, latent_dim)``.

    Attributes:
        pseudo_inputs: As learnt so far, before ``limits`` apply, ``(K, *event)``.

    Raises:
        TypeError: If ``encoder`` is no module or returns no distribution, or ``pseudo_inputs`` is
            no float tensor.
        ValueError: If ``pseudo_inputs`` is empty, not finite, outside ``limits``, or not what the
            encoder takes.

    Example:
        >>> from pyro_vae.guides import AmortizedNormal
        >>> from pyro_vae.nets import MLP
        >>> guide = AmortizedNormal(MLP(64, [32], 2 * 3))
        >>> prior = VampPrior(guide.encoder, torch.rand(10, 64), limits=(0.0, 1.0))
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 3])

    References:
        Tomczak and Welling (2018), VAE with a VampPrior, section 3,
        https://arxiv.org/abs/1705.07120
    """

    def __init__(
        self,
        encoder: nn.Module,
        pseudo_inputs: torch.Tensor,
        *,
        limits: tuple[float, float] | None = None,
        site: str = "z",
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise TypeError(
                "VampPrior: expected the guide's encoder, a module, got "
                f"{type(encoder).__name__}. Pass guide.encoder."
            )
        check_pseudo_inputs(pseudo_inputs, limits)
        check_encoder(encoder, pseudo_inputs)
        super().__init__()
        self.site, self.limits = site, limits
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self._encoder = (encoder,)  # In a tuple: the parameters stay the guide's alone.

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, without the links that Pyro hangs on parameters."""
        for parameter in self._encoder[0].parameters():
            parameter.__dict__.pop("unconstrained", None)
        state: dict[str, Any] = super().__getstate__()
        return state

    def forward(self) -> torch.Tensor:
        """Samples the code within the plates around the call."""
        inputs: torch.Tensor = self.pseudo_inputs
        if self.limits is not None:
            clamped = inputs.detach().clamp(*self.limits)
            # Not the gradient of clamp: that is zero on the limits, where binary data start.
            inputs = torch.where(inputs == clamped, inputs, clamped)
        mixture = _Mixture.of(self._encoder[0](inputs), inputs.new_zeros(len(inputs)))
        code: torch.Tensor = pyro.sample(self.site, mixture)
        return code


class FlowPrior(Program):
    """z = f(e) with e ~ N(0, I) and f learnt and invertible.

    Training and evaluation need the density at given codes, hence the inverse of f: ``planar`` and
    other transforms of Pyro without one are refused, and an autoregressive transform, whose
    inverse takes ``latent_dim`` passes, is best given as ``affine_autoregressive(d).inv``. (Pyro
    computes that inverse in torch's default dtype alone.)

    Args:
        latent_dim: Number of latents.
        transforms: Transforms of torch or Pyro, in the order in which they are applied to noise;
            or a flow with a base of its own: a module that returns a distribution over codes when
            it is called without arguments, such as ``zuko.flows.NSF(latent_dim)``. (Importing zuko
            switches torch's validation of distributions off; ``pyro.enable_validation()`` switches
            it on again.)
        site: Name of the sample site.

    Returns (when called inside a plate): the code, ``(*sample, batch, latent_dim)``.

    Attributes:
        flow: The module that makes the distribution, with all parameters.

    Raises:
        TypeError: If ``transforms`` is neither of the two.
        ValueError: If there are no transforms; one cannot be inverted, or not in Pyro; the codes
            are not of shape ``(latent_dim,)``.

    Example:
        >>> from pyro.distributions.transforms import affine_coupling
        >>> prior = FlowPrior(3, [affine_coupling(3), affine_coupling(3)])
        >>> with pyro.plate("data", 5):
        ...     prior().shape
        torch.Size([5, 3])

    References:
        Chen et al. (2017), Variational lossy autoencoder, section 3.2 (with ``.inv``, an
        autoregressive flow as prior), https://arxiv.org/abs/1611.02731
    """

    def __init__(
        self, latent_dim: int, transforms: Sequence[Transform] | nn.Module, *, site: str = "z"
    ) -> None:
        check_at_least("FlowPrior", "latent_dim", latent_dim, 1)
        super().__init__()
        self.site = site
        given: Any = transforms  # A transform of Pyro is a module, too.
        is_flow = isinstance(given, nn.Module) and not isinstance(given, Transform | nn.ModuleList)
        if not is_flow:
            check_transforms(given)
            given = TransformedNormal(latent_dim, given, site)
        self.flow: nn.Module = given
        with without_side_effects(self.flow):
            fn = self.flow()
        check_distribution("FlowPrior", "the flow", fn)
        if is_flow:
            check_real(site, fn)
        if fn.batch_shape or fn.event_shape != (latent_dim,):
            raise ValueError(
                f"FlowPrior: expected a flow of one code of shape ({latent_dim},), got event shape "
                f"{tuple(fn.event_shape)} and batch shape {tuple(fn.batch_shape)}. "
                f"Make the flow for {latent_dim} latents."
            )

    def forward(self) -> torch.Tensor:
        """Samples the code within the plates around the call."""
        fn = self.flow()
        if not isinstance(fn, TorchDistributionMixin):
            fn = ForeignFlow(fn)
        code: torch.Tensor = pyro.sample(self.site, fn)
        return code


class _Mixture(dist.MixtureSameFamily):  # type: ignore[misc]
    """A mixture whose support is that of its components, which HMC knows how to unconstrain."""

    @staticmethod
    def of(components: Any, logits: torch.Tensor) -> "_Mixture":
        """The mixture along the only batch dimension of ``components``."""
        # From logits: Categorical clamps small probabilities.
        return _Mixture(dist.Categorical(logits=logits), components)

    @property
    def support(self) -> Any:
        """Where a code may lie."""
        return self.component_distribution.support
