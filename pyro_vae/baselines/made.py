"""A density without latents, variable by variable: what a VAE's likelihood competes with."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, MixtureSameFamily, Normal
from torch.nn.functional import softplus

from pyro_vae.autoregressive import AutoregressiveNet
from pyro_vae.baselines._data import as_data_matrix, check_integer, constant_columns
from pyro_vae.baselines._gradient import check_training, train_epochs
from pyro_vae.isolation import evaluation_mode

__all__ = ["MADE", "fit_made"]


class MADE(nn.Module):
    r"""p(x) = prod_i p(x_i | x_1 ... x_{i-1}), all conditionals from one masked network.

    The density is exact, in one pass of the network; a sample takes one pass for each variable.
    The variables depend on one another in the order in which they are given.

    Args:
        num_variables: Number of variables D.
        hidden: Widths of the hidden layers, each at least D - 1; empty for linear conditionals.
        num_components: Number K of normals in the mixture that is the conditional of a real
            variable; None for binary variables, whose conditionals are Bernoulli.
        min_scale: Smallest standard deviation of a normal, in units of ``scale``. Without a floor
            the likelihood has no maximum.
        activation: Class of the activation.
        dropout: Probability of dropping a hidden unit while training.

    Attributes:
        loc: Shape ``(D,)``, zeros at first; subtracted from real data before the network.
        scale: Shape ``(D,)``, ones at first; the data are divided by it.
        log_likelihoods: Mean log-likelihood of the validation rows after each epoch, nats per
            datum, shape ``(epochs,)``; empty before training.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is too small.

    Example:
        >>> made = MADE(6, [16], num_components=3)
        >>> made.log_prob(made.sample(5)).shape
        torch.Size([5])

    References:
        Germain et al. 2015, "MADE: masked autoencoder for distribution estimation",
        https://arxiv.org/abs/1502.03509, with one fixed order and fixed masks; Uria et al. 2013,
        "RNADE: the real-valued neural autoregressive density-estimator", eq. 5 to 8,
        https://arxiv.org/abs/1306.0186, for the mixtures.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        num_variables: int,
        hidden: Sequence[int],
        *,
        num_components: int | None = None,
        min_scale: float = 1e-3,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        if num_components is not None:
            fix = "Leave it out for binary data."
            check_integer(num_components, "num_components", 1, None, "MADE", fix)
        if not 0.0 < min_scale < math.inf:
            raise ValueError(
                f"MADE: expected a positive, finite `min_scale`, got {min_scale}. Choose a small "
                "part of the spread of a variable, for instance 1e-3."
            )
        super().__init__()
        self.num_components, self.min_scale = num_components, min_scale
        out_features = 1 if num_components is None else 3 * num_components
        self.net = AutoregressiveNet(
            num_variables,
            hidden,
            out_features=out_features,
            activation=activation,
            dropout=dropout,
        )
        self.register_buffer("loc", torch.zeros(num_variables))
        self.register_buffer("scale", torch.ones(num_variables))
        self.log_likelihoods = torch.empty(0)

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the exact log-density, or log-probability of binary data, with gradients.

        Args:
            x: Shape ``(N, D)``, any real dtype or bool; binary data hold 0 and 1.

        Returns:
            Shape ``(N,)``, nats, in the dtype of the network.

        Raises:
            ValueError: If the shape does not fit, or a value is not finite or not binary.
        """
        self._check(x)
        if x.dtype == torch.bool:  # From which torch subtracts nothing.
            x = x.to(self.loc.dtype)
        # In the precision of the data: far from zero, float32 would round the differences away.
        x = ((x.to(self.loc.device) - self.loc) / self.scale).to(self.loc.dtype)
        return self._conditionals(self.net(x)).log_prob(x).sum(-1) - self.scale.log().sum()

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Draw new data, one variable after the other, with the network in eval mode.

        Args:
            num_samples: Number of rows n, from 0.

        Returns:
            Shape ``(n, D)``, in the dtype of the network.

        Raises:
            TypeError: If ``num_samples`` is no integer.
            ValueError: If it is negative.
        """
        fix = "Pass the number of rows to draw."
        check_integer(num_samples, "num_samples", 0, None, "MADE", fix)
        x = self.loc.new_zeros(num_samples, self.net.num_variables)
        with evaluation_mode(self):
            for index in range(self.net.num_variables):
                # The output at `index` depends on the columns drawn before it alone.
                x[:, index] = self._conditionals(self.net(x)[:, index]).sample()
        return self.loc + self.scale * x

    def _conditionals(self, out: Tensor) -> Distribution:
        """Of standardised data, from outputs ``(*batch, out_features)``; batch shape ``batch``."""
        # Data are checked before, parameters by the loss: torch's own messages name neither.
        if self.num_components is None:
            return Bernoulli(logits=out.squeeze(-1), validate_args=False)
        logits, loc, raw_scale = out.chunk(3, dim=-1)
        components = Normal(loc, softplus(raw_scale) + self.min_scale, validate_args=False)
        weights = Categorical(logits=logits, validate_args=False)
        return MixtureSameFamily(weights, components, validate_args=False)

    def _check(self, x: Tensor) -> None:
        """Raise unless ``x`` holds data of this model."""
        size = self.net.num_variables
        if x.ndim != 2 or x.shape[1] != size:
            raise ValueError(
                f"MADE: expected data of shape (N, {size}), got {tuple(x.shape)}. Flatten each "
                "example into one row."
            )
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"MADE: expected finite data, got {int((~x.isfinite()).sum())} NaN or infinite of "
                f"{x.numel()} entries. Drop or impute them first."
            )
        if self.num_components is None and not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                f"MADE: expected binary data of 0 and 1, got values from {float(x.min()):g} to "
                f"{float(x.max()):g}. Round them, or give MADE num_components for real data."
            )


def fit_made(
    x: Tensor,
    made: MADE,
    *,
    num_epochs: int = 100,
    batch_size: int = 100,
    lr: float = 1e-3,
    validation_fraction: float = 0.1,
) -> MADE:
    """Train by maximum likelihood, and keep the epoch that is best on rows set apart.

    Nothing else keeps a flexible density without latents from learning the rows by heart. Which
    rows are set apart, and the order of the others, comes from torch's global generator.

    Args:
        x: Data of shape ``(N, D)``, any real dtype; binary unless ``made`` has components.
        made: Trained in place; its ``loc`` and ``scale`` become those of the real data trained on.
        num_epochs: Number of passes over the data.
        batch_size: Rows in a batch; the last one may be shorter.
        lr: First learning rate of Adam, which falls to zero along a cosine.
        validation_fraction: Part of the rows set apart, at least one row.

    Returns:
        ``made``, in eval mode.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data are no finite matrix as wide as ``made``, are not binary although
            it is, or have a constant column although it is not, or one so far from zero that the
            dtype of ``made`` does not resolve its spread; if a setting is out of range.
        FloatingPointError: If the loss of a batch, or of the rows set apart, is not finite.

    Example:
        >>> x = torch.randn(200, 2) @ torch.tensor([[1.0, 2.0], [0.0, 0.5]])
        >>> made = fit_made(x, MADE(2, [], num_components=1), num_epochs=50, lr=0.05)
        >>> bool(made.log_prob(x).mean() > made.log_likelihoods[0])
        True

    References:
        Germain et al. 2015, section 6: early stopping on a validation set.
    """
    where = "fit_made"
    data = as_data_matrix(x, where)
    check_training(made, num_epochs, batch_size, lr, where)
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(
            f"{where}: expected `validation_fraction` in (0, 1), got {validation_fraction}. "
            "0.1 sets every tenth row apart."
        )
    made._check(data)
    num_apart = min(max(round(validation_fraction * len(data)), 1), len(data) - 1)
    order = torch.randperm(len(data)).to(data.device)
    apart, rows = data[order[:num_apart]], data[order[num_apart:]]
    if made.num_components is not None:
        _standardise(made, rows, where)
    best, state, history = -math.inf, made.state_dict(), []
    for _ in train_epochs(
        lambda batch: -made.log_prob(batch),
        made,
        rows,
        num_epochs=num_epochs,
        batch_size=batch_size,
        lr=lr,
        where=where,
    ):
        made.eval()
        with torch.no_grad():
            history.append(float(made.log_prob(apart).mean()))
        if not math.isfinite(history[-1]):
            raise FloatingPointError(
                f"{where}: expected a finite log-likelihood of the rows set apart, got "
                f"{history[-1]} in epoch {len(history)}. Lower lr, or rescale the data."
            )
        if history[-1] > best:
            best, state = history[-1], copy.deepcopy(made.state_dict())
    made.load_state_dict(state)
    made.log_likelihoods = torch.tensor(history)
    return made


def _standardise(made: MADE, rows: Tensor, where: str) -> None:
    """Give the network the units of the data."""
    if constant := constant_columns(rows):
        raise ValueError(
            f"{where}: expected columns of `x` that vary in the {len(rows)} rows trained on, got "
            f"constant ones at {constant}, where a density is unbounded. Leave them out, or add "
            "the noise that dequantises them."
        )
    loc, scale = rows.mean(0), rows.std(0, correction=0)
    dtype = made.loc.dtype
    coarse = torch.finfo(dtype).eps * loc.abs() > 0.1 * scale
    if bool(coarse.any()):
        columns = coarse.nonzero().flatten().tolist()
        raise ValueError(
            f"{where}: expected columns of `x` whose standard deviation is well above the rounding "
            f"error of {dtype} at their mean, got means too far from zero at {columns}. Subtract "
            "an offset from them, or use made.double()."
        )
    made.loc.copy_(loc)
    made.scale.copy_(scale)
