"""The linear autoencoder, which finds PCA's subspace, and how far apart two subspaces are."""

import warnings

import torch
from torch import Tensor, nn

from pyro_vae.baselines._data import as_data_matrix, check_integer, covariance_root
from pyro_vae.baselines._gradient import check_noise
from pyro_vae.baselines.autoencoder import Autoencoder

__all__ = ["linear_autoencoder", "principal_angles"]

_STEPS_PER_ROUND = 50


def linear_autoencoder(
    x: Tensor, latent_dim: int, *, noise: float = 0.0, num_steps: int = 2000
) -> Autoencoder:
    r"""Train a linear autoencoder to the optimum of its squared error, by gradients.

    The loss has no local minima, so every start ends in the span of the first principal axes,
    :math:`U_L`: the map from data to reconstructions is :math:`U_L U_L^\top` on centred
    data, the error the sum of the discarded eigenvalues of the covariance :math:`\Sigma`. With
    ``noise`` the expectation over all corruptions is minimised, and the k-th axis shrinks by
    :math:`\lambda_k / (\lambda_k + \text{noise}^2)`, the optimum
    :math:`\Sigma (\Sigma + \text{noise}^2 I)^{-1}` cut to rank L.

    The decoder is trained by L-BFGS on all rows, from a random start drawn with torch's
    global generator. Each decoder is paired with the encoder that is best for it, a
    least-squares problem (variable projection), which keeps the minima of the loss. Every 50
    steps the loss is put in terms of uncorrelated codes, and the decoder's step for each in units
    of the code's spread: columns of ``x`` in units far apart then slow the training little.
    The end is compared with the optimum in closed form.

    Args:
        x: Data of shape ``(N, D)``, any real dtype; computed in float64.
        latent_dim: Number of latents L, from 1 to D.
        noise: Standard deviation of the corruption, in units of the data; 0 for none.
        num_steps: Largest number of steps.

    Returns:
        Two linear layers in float64, in eval mode. Codes of the data are centred, and the columns
        of ``decoder.weight``, of shape ``(D, L)``, are orthonormal, known up to a rotation only.
        ``losses`` holds one value for each evaluation.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the data are no finite matrix or all rows are equal, or an argument is out
            of range.

    Warns:
        UserWarning: If the error is more than one part in a million above the optimum.

    Example:
        >>> x = torch.randn(100, 3).double() * torch.tensor([9.0, 5.0, 1.0])
        >>> axes = torch.linalg.svd(x - x.mean(0)).Vh[:2].mT
        >>> bool(principal_angles(linear_autoencoder(x, 2).decoder.weight, axes).max() < 1e-6)
        True

    References:
        Baldi and Hornik 1989, "Neural networks and principal component analysis: learning from
        examples without local minima", https://doi.org/10.1016/0893-6080(89)90014-2; Golub and
        Pereyra 1973, "The differentiation of pseudo-inverses and nonlinear least squares problems
        whose variables separate".
    """
    where = "linear_autoencoder"
    data = as_data_matrix(x, where)
    num_columns = data.shape[1]
    fix = "The best map with more latents is the one with one latent per column."
    check_integer(latent_dim, "latent_dim", 1, num_columns, where, fix)
    check_integer(num_steps, "num_steps", 1, None, where, "Pass for instance num_steps=2000.")
    check_noise(noise, where)
    loc, root = covariance_root(data)
    power = float(root.square().sum())
    if not power:
        raise ValueError(
            f"{where}: expected rows of `x` that differ, got {len(data)} equal ones. Pass data "
            "with some variance."
        )
    best, target = _without_bottleneck(root, noise)
    scale = power**0.5
    start = torch.randn(num_columns, latent_dim, dtype=data.dtype, device=data.device)
    axes, losses = _train_decoder(target / scale, start, num_steps)
    encoder = nn.Linear(num_columns, latent_dim, dtype=data.dtype, device=data.device)
    decoder = nn.Linear(latent_dim, num_columns, dtype=data.dtype, device=data.device)
    with torch.no_grad():
        encoder.weight.copy_(axes.mT @ best)
        encoder.bias.copy_(-encoder.weight @ loc)
        decoder.weight.copy_(axes)
        decoder.bias.copy_(loc)
    autoencoder = Autoencoder(encoder, decoder)
    values = torch.linalg.svdvals(root).square()
    # What noise costs without a bottleneck; the difference of two sums would lose its digits.
    rest = float((values * (noise**2 / (values + noise**2))).sum()) if noise else 0.0
    autoencoder.losses = power * losses + rest
    tail = float(torch.linalg.svdvals(target)[latent_dim:].square().sum())
    _warn_above_optimum(float(autoencoder.losses[-1]), rest + tail, power, num_columns)
    return autoencoder.eval()


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles between the spans of the columns of two matrices: 0 if one contains the other.

    Args:
        a: Shape ``(D, L)``, linearly independent columns.
        b: Shape ``(D, M)``, linearly independent columns.

    Returns:
        Radians, from 0 to pi / 2, descending, shape ``(min(L, M),)``, float64, no gradient. Small
        angles keep their digits: they come from the sine, not from the cosine.

    Raises:
        ValueError: If a matrix has another shape, is not finite or has dependent columns.

    Example:
        >>> principal_angles(torch.eye(3)[:, :2], torch.tensor([[1.0], [0.0], [1.0]]))
        tensor([0.7854], dtype=torch.float64)

    References:
        Bjorck and Golub 1973, "Numerical methods for computing angles between linear subspaces";
        Knyazev and Argentati 2002, "Principal angles between subspaces in an A-based scalar
        product", for small angles by the sine.
    """
    spans = [_check_span(name, matrix) for name, matrix in (("a", a), ("b", b))]
    if len(a) != len(b):
        raise ValueError(
            f"principal_angles: expected matrices with the same number of rows, got {len(a)} and "
            f"{len(b)}. Transpose the one whose rows are the vectors."
        )
    small, large = sorted(spans, key=lambda span: span.shape[1])
    inside = large.mT @ small
    cosine = torch.linalg.svdvals(inside).flip(0).clamp(max=1.0)
    sine = torch.linalg.svdvals(small - large @ inside).clamp(max=1.0)
    return torch.where(sine < cosine, sine.asin(), cosine.acos())


def _without_bottleneck(root: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Return the best linear map B of full rank, and T: a map V V' B costs rest + |T - T V V'|^2.

    In expectation, noise adds rows ``noise * I``, whose target is zero, below the root of the
    covariance. With ``stack = Q R`` the problem without the rest is to approach ``Q' [root; 0]``.
    """
    size = root.shape[1]
    eye = torch.eye(size, dtype=root.dtype, device=root.device)
    if not noise:
        return eye, root
    q, r = torch.linalg.qr(torch.cat([root, noise * eye]))
    target = q[: len(root)].mT @ root
    return torch.linalg.solve_triangular(r, target, upper=True).mT, target


def _train_decoder(target: Tensor, start: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of the best decoder's columns, and the losses on the way."""
    axes = torch.linalg.qr(start).Q
    best = float((target - target @ axes @ axes.mT).square().sum())
    losses = [best]
    eps = torch.finfo(target.dtype).eps
    while num_steps > 0 and best > eps**2:
        # To uncorrelated codes. In units of their spread, the curvature for moving kept axis i
        # towards discarded axis j is 1 - l_j / l_i, however far apart the eigenvalues l are.
        _, spread, rotation = torch.linalg.svd(target @ axes)
        spread = torch.nn.functional.pad(spread, (0, len(rotation) - len(spread)))
        spread = spread.clamp(min=float(spread[0]) * eps**0.75) / best**0.5
        num_iter = min(num_steps, _STEPS_PER_ROUND)
        axes, values = _improve_decoder(target, axes @ rotation.mT, spread, best, num_iter)
        axes = axes @ rotation  # Back: the codes are as arbitrary as the start.
        losses += values
        num_steps -= num_iter
        before, best = best, values[-1]
        if not best < before * (1 - 1e-15):
            break
    return axes, torch.tensor(losses, dtype=target.dtype, device=target.device)


def _improve_decoder(
    target: Tensor, axes: Tensor, spread: Tensor, unit: float, num_steps: int
) -> tuple[Tensor, list[float]]:
    """Run L-BFGS from ``axes``, on the loss in terms of ``unit``; the last loss is the end's."""
    step = torch.zeros_like(axes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [step],
        max_iter=num_steps,
        max_eval=10 * num_steps,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    losses: list[float] = []

    def decode() -> tuple[Tensor, Tensor]:
        basis = torch.linalg.qr(axes + step / spread).Q
        return basis, (target - target @ basis @ basis.mT).square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = decode()[1]
        losses.append(float(loss.detach()))
        loss = loss / unit
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        basis, loss = decode()
    # The line search may end at a step that rounding made worse.
    return (basis, [*losses, float(loss)]) if float(loss) <= unit else (axes, [*losses, unit])


def _warn_above_optimum(loss: float, optimum: float, power: float, num_columns: int) -> None:
    """Warn if the loss is above the optimum by more than tolerance and rounding explain."""
    rounding = 1e4 * num_columns * torch.finfo(torch.float64).eps ** 2 * power
    if loss - optimum > 1e-6 * optimum + rounding:
        excess = f"{loss / optimum - 1:.2g}" if optimum else "inf"
        warnings.warn(
            "linear_autoencoder: expected the error at its optimum, to one part in a million, got "
            f"a relative excess of {excess}. Standardise the columns, or raise num_steps.",
            UserWarning,
            stacklevel=3,
        )


def _check_span(name: str, matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the span in float64, unless that is not well defined."""
    if matrix.ndim != 2 or not 0 < matrix.shape[1] <= matrix.shape[0]:
        raise ValueError(
            f"principal_angles: expected `{name}` of shape (D, L) with 1 <= L <= D, got "
            f"{tuple(matrix.shape)}. The columns are the vectors; transpose rows of vectors."
        )
    values = matrix.detach().to(torch.float64)
    rank = int(torch.linalg.matrix_rank(values)) if bool(values.isfinite().all()) else 0
    if rank < matrix.shape[1]:
        raise ValueError(
            f"principal_angles: expected `{name}` to have finite, linearly independent columns, "
            f"got rank {rank} from {matrix.shape[1]} columns. Drop those that add nothing."
        )
    return torch.linalg.qr(values).Q
