"""The latents of an interplay as Pyro sites, whose log-densities add up to that of the joint."""

from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK

from pyro_vae.checks import check_at_least
from pyro_vae.interplay import Interplay

__all__ = ["Chain", "InterplayMarginal", "Unnormalised", "sample_interplay"]

_NUM_SWEEPS = 30


class Unnormalised(Messenger):
    """Inside it the log-densities of an interplay lack its log-partition."""


class Chain:
    """How the latents of one run are drawn, and what is known of the joint's normaliser.

    Args:
        joint: Of all modalities.
        num_sweeps: Gibbs sweeps; ``None`` for exact samples.

    Attributes:
        joint: As given, not expanded by plates.
        latents: What was drawn, by modality.
        log_weight: Of each chain, ``(*sample, batch)``, see
            :meth:`pyro_vae.interplay.Interplay.annealed`; ``None`` where samples are exact.
    """

    def __init__(self, joint: Interplay, num_sweeps: int | None) -> None:
        self.joint, self.num_sweeps = joint, num_sweeps
        self.latents: dict[str, torch.Tensor] = {}
        self.log_weight: torch.Tensor | None = None

    def run(
        self, joint: Interplay, sample_shape: tuple[int, ...] = ()
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Latents and log-weights of Gibbs chains: the interactions grow in half of the sweeps."""
        assert self.num_sweeps is not None
        num_more = self.num_sweeps // 2
        return joint.annealed(self.num_sweeps - num_more, sample_shape, num_more=num_more)

    def draw(self, joint: Interplay, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """The first modality of ``joint``: the others of the chain, given some of them."""
        name = joint.names[0]
        if given and all(self.latents.get(n) is value for n, value in given.items()):
            return self.latents[name]
        self.log_weight = None
        if self.num_sweeps is None:
            latents = joint.sample()
        else:
            latents, log_weight = self.run(joint)
            # Given some modalities, the weight is not that of the whole.
            self.log_weight = None if given else log_weight
        self.latents = {**given, **latents}
        return latents[name]


class InterplayMarginal(TorchDistribution):
    """The first modality of a joint, the others summed out.

    Args:
        joint: What is left of the joint, given the modalities before this one.
        chain: Where samples come from.
        given: The latents of the modalities before this one.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, joint: Interplay, chain: Chain, given: dict[str, torch.Tensor]) -> None:
        self.joint, self.chain, self.given = joint, chain, given
        self.has_rsample = joint.statistics.has_rsample
        event_shape = torch.Size([joint.dim(joint.names[0])])
        super().__init__(joint.batch_shape, event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """Where a latent may lie."""
        return self.joint.statistics.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "InterplayMarginal":
        """The same for every row of a batch."""
        return InterplayMarginal(self.joint.expand(tuple(batch_shape)), self.chain, self.given)

    def rsample(self, sample_shape: Any = ()) -> torch.Tensor:
        """Draws ``(*sample_shape, *batch, dim)``."""
        joint = self.joint.expand((*sample_shape, *self.batch_shape))
        return self.chain.draw(joint, self.given)

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        """Draws ``(*sample_shape, *batch, dim)`` without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density, nats, ``(*batch,)``.

        Raises:
            ValueError: If the normaliser is not known and is not left out on purpose.
        """
        joint, name = self.joint, self.joint.names[0]
        own = (joint.natural[name] * joint.statistics.of(value)).sum(-1)
        if any(isinstance(handler, Unnormalised) for handler in _PYRO_STACK):
            return own
        if not joint.is_exact:
            raise ValueError(
                f"InterplayMarginal: expected a joint whose log-partition is known, got modalities "
                f"{list(joint.names)} without. Their density is known up to a factor only: train "
                "and report the bound with pyro_vae.objectives.TraceInterplay_ELBO."
            )
        if len(joint.names) == 1:
            return own - joint.log_partition()
        return own + joint.given({name: value}).log_partition() - joint.log_partition()


def sample_interplay(joint: Interplay, *, num_sweeps: int | None = None) -> dict[str, torch.Tensor]:
    """Samples the sites ``"z_<modality>"`` within the plates around the call.

    The joint is drawn at the first site. Values that handlers put in its place hold for the
    sites after it, which are then drawn given those.

    Args:
        joint: Of all modalities.
        num_sweeps: Gibbs sweeps; in the first half the interactions grow to their strength. By
            default samples are exact where that is possible, else 30.

    Returns:
        The latents by modality, ``(*sample, batch, dim)``.
    """
    if num_sweeps is not None:
        check_at_least("sample_interplay", "num_sweeps", num_sweeps, 1)
    if num_sweeps is None and not joint.is_exact:
        num_sweeps = _NUM_SWEEPS
    chain = Chain(joint, num_sweeps)
    values: dict[str, torch.Tensor] = {}
    for name in joint.names:
        rest = joint.given(values) if values else joint
        fn = InterplayMarginal(rest, chain, dict(values))
        values[name] = pyro.sample(f"z_{name}", fn)
    return values
