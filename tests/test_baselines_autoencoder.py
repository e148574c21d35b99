import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from torch import Tensor, nn

from pyro_vae.baselines import Autoencoder, fit_autoencoder, linear_autoencoder, principal_angles
from pyro_vae.datasets import load_digits
from pyro_vae.nets import MLP


def correlated(num_rows: int = 200, num_columns: int = 6) -> Tensor:
    """Rows with spread eigenvalues and a mean far from zero."""
    scale = torch.linspace(1.0, 3.0, num_columns)
    mixing = torch.linalg.qr(torch.randn(num_columns, num_columns)).Q
    return (torch.randn(num_rows, num_columns) * scale) @ mixing + 5.0


def spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of the covariance divided by N."""
    values, vectors = torch.linalg.eigh(x.mT.cov(correction=0))
    return values.flip(0), vectors.flip(1)


def linear_map(autoencoder: Autoencoder) -> Tensor:
    """From data to reconstructions, without the means."""
    decoder, encoder = autoencoder.decoder.weight, autoencoder.encoder.weight
    return (decoder @ encoder).detach()  # type: ignore[operator]


def networks(num_columns: int = 6, latent_dim: int = 2) -> tuple[nn.Module, nn.Module]:
    return MLP(num_columns, [16], latent_dim), MLP(latent_dim, [16], num_columns)


# The linear autoencoder.


@pytest.mark.parametrize("latent_dim", [1, 2, 5, 6])
def test_linear_autoencoder_is_pca(latent_dim: int) -> None:
    x = correlated()
    fit = linear_autoencoder(x, latent_dim)
    values, vectors = spectrum(x)
    axes = vectors[:, :latent_dim]
    assert principal_angles(fit.decoder.weight, axes).max() < 1e-6
    assert principal_angles(fit.encoder.weight.mT, axes).max() < 1e-6
    torch.testing.assert_close(linear_map(fit), axes @ axes.mT, rtol=0, atol=1e-6)
    error = fit.reconstruction_error(x).mean()
    torch.testing.assert_close(error, values[latent_dim:].sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fit.losses[-1], error, rtol=1e-12, atol=1e-12)
    reference = PCA(latent_dim, svd_solver="full").fit(x.numpy())
    decoded = torch.as_tensor(reference.inverse_transform(reference.transform(x.numpy())))
    torch.testing.assert_close(fit(x), decoded, rtol=0, atol=1e-5)


def test_linear_autoencoder_on_digits() -> None:
    (x, _), _ = load_digits()
    fit = linear_autoencoder(x, 10)
    values, vectors = spectrum(x)
    assert principal_angles(fit.decoder.weight, vectors[:, :10]).max() < 1e-6
    error = fit.reconstruction_error(x).mean()
    torch.testing.assert_close(error, values[10:].sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("latent_dim", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_columns_in_units_far_apart(latent_dim: int, noise: float) -> None:
    scale = torch.tensor([1e4, 1e2, 1.0, 0.1, 1e-2, 5e-3])
    x = torch.randn(200, 6) * scale
    fit = linear_autoencoder(x, latent_dim, noise=noise)
    values = torch.linalg.svdvals(x - x.mean(0)).square() / 200
    kept = values[:latent_dim]
    expected = values[latent_dim:].sum() + (kept * noise**2 / (kept + noise**2)).sum()
    torch.testing.assert_close(fit.losses[-1], expected, rtol=1e-8, atol=0)


def test_too_few_steps_are_reported() -> None:
    x = correlated()
    with pytest.warns(
        UserWarning, match=r"linear_autoencoder: .* excess of \d.*\. Standardise .* num_steps"
    ):
        fit = linear_autoencoder(x, 2, num_steps=1)
    assert fit.losses[-1] > (1 + 1e-6) * spectrum(x)[0][2:].sum()


def test_every_start_ends_in_the_same_subspace() -> None:
    x = correlated()
    first, second = (linear_autoencoder(x, 2).decoder.weight for _ in range(2))
    assert principal_angles(first, second).max() < 1e-6
    assert not torch.allclose(first, second)  # A rotation lies between them.


def test_codes_are_centred_and_the_decoder_orthonormal() -> None:
    x = correlated()
    fit = linear_autoencoder(x, 3)
    torch.testing.assert_close(fit.encode(x).mean(0), torch.zeros(3))
    decoder = fit.decoder.weight
    torch.testing.assert_close(decoder.mT @ decoder, torch.eye(3))
    torch.testing.assert_close(fit.decode(torch.zeros(3)), x.mean(0))


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("latent_dim", [1, 3, 6])
def test_denoising_linear_autoencoder_in_closed_form(latent_dim: int, noise: float) -> None:
    x = correlated()
    fit = linear_autoencoder(x, latent_dim, noise=noise)
    values, vectors = spectrum(x)
    kept, axes = values[:latent_dim], vectors[:, :latent_dim]
    best = axes @ (kept / (kept + noise**2)).diag() @ axes.mT
    torch.testing.assert_close(linear_map(fit), best, rtol=0, atol=1e-6)
    torch.testing.assert_close(fit(x.mean(0)), x.mean(0))
    # Discarded eigenvalues, and what is left of each kept one: l - l^2 / (l + noise^2).
    expected = values[latent_dim:].sum() + (kept * noise**2 / (kept + noise**2)).sum()
    torch.testing.assert_close(fit.losses[-1], expected, rtol=1e-12, atol=1e-12)


def test_closed_form_is_the_expectation_over_corruptions() -> None:
    x = correlated()
    fit = linear_autoencoder(x, 2, noise=1.5)
    dirty = x.repeat(200, 1)
    errors = (fit(dirty + 1.5 * torch.randn_like(dirty)) - dirty).square().sum(1).detach()
    # Given the rows, only the noise is random.
    by_row = errors.reshape(200, -1)
    standard_error = float((by_row.var(0) / 200).sum().sqrt() / len(x))
    assert abs(errors.mean() - fit.losses[-1]) < 5 * standard_error
    assert 5 * standard_error < 0.02 * errors.mean()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_no_linear_autoencoder_does_better(noise: float) -> None:
    x = correlated()
    fit = linear_autoencoder(x, 2, noise=noise)
    centred = x - x.mean(0)

    def loss(matrix: Tensor) -> Tensor:
        error = (centred @ matrix.mT - centred).square().sum(1).mean()
        return error + noise**2 * matrix.square().sum()

    encoder, decoder = fit.encoder.weight.detach(), fit.decoder.weight.detach()
    best = loss(decoder @ encoder)
    torch.testing.assert_close(fit.losses[-1], best)
    for _ in range(20):
        near = [w + 0.05 * torch.randn_like(w) for w in (decoder, encoder)]
        assert loss(near[0] @ near[1]) > best


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_fewer_rows_than_columns(noise: float) -> None:
    x = correlated(10, 30)
    fit = linear_autoencoder(x, 3, noise=noise)
    values, _ = spectrum(x)
    kept = values[:3]
    expected = values[3:].sum() + (kept * noise**2 / (kept + noise**2)).sum()
    torch.testing.assert_close(fit.losses[-1], expected, rtol=1e-10, atol=0)


def test_rank_below_the_number_of_latents_is_reconstructed_exactly() -> None:
    x = torch.randn(50, 2) @ torch.randn(2, 6) + 3.0
    error = linear_autoencoder(x, 4).reconstruction_error(x)
    torch.testing.assert_close(error, torch.zeros(50), rtol=0, atol=1e-12)


def test_units_do_not_matter() -> None:
    x = correlated()
    for scale in (1e-8, 1e8):
        fit = linear_autoencoder(scale * x, 2, noise=scale)
        torch.manual_seed(0)
        error = linear_autoencoder(x, 2, noise=1.0).losses[-1] * scale**2
        torch.testing.assert_close(fit.losses[-1], error, rtol=1e-10, atol=0)


def test_gradient_training_comes_to_the_same_error() -> None:
    x = correlated(100) - 5.0
    fit = fit_autoencoder(
        x, nn.Linear(6, 2), nn.Linear(2, 6), num_epochs=400, batch_size=100, lr=0.05
    )
    values, vectors = spectrum(x)
    error = fit.reconstruction_error(x).mean()
    torch.testing.assert_close(error, values[2:].sum(), rtol=1e-4, atol=0)
    assert error >= values[2:].sum()
    assert principal_angles(fit.decoder.weight, vectors[:, :2]).max() < 0.05


@pytest.mark.parametrize(
    "convert",
    [torch.Tensor.float, torch.Tensor.int, lambda x: x.float().numpy(), torch.Tensor.tolist],
)
def test_any_real_input_is_computed_in_float64(convert: Callable[[Tensor], Any]) -> None:
    x = convert(10 * correlated())
    fit = linear_autoencoder(x, 2)
    exact = torch.as_tensor(x, dtype=torch.float64)
    assert fit.losses.dtype == fit.encoder.weight.dtype == torch.float64
    torch.testing.assert_close(fit.losses[-1], spectrum(exact)[0][2:].sum())


def test_linear_autoencoder_refuses() -> None:
    x, name = correlated(), "linear_autoencoder"
    with pytest.raises(ValueError, match=rf"{name}: expected `x` of shape .* got \(6,\)"):
        linear_autoencoder(x[0], 2)
    with pytest.raises(ValueError, match=f"{name}: expected at least 2 rows in `x`, got 1"):
        linear_autoencoder(x[:1], 2)
    for latent_dim in (0, 7):
        with pytest.raises(ValueError, match=f"`latent_dim` between 1 and 6, got {latent_dim}"):
            linear_autoencoder(x, latent_dim)
    with pytest.raises(TypeError, match="expected an integer `latent_dim`, got float"):
        linear_autoencoder(x, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name}: expected `num_steps` of at least 1, got 0"):
        linear_autoencoder(x, 2, num_steps=0)
    for noise in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name}: expected `noise` of at least 0 .* {noise}"):
            linear_autoencoder(x, 2, noise=noise)
    with pytest.raises(ValueError, match=f"{name}: expected rows of `x` that differ, got 20 equal"):
        linear_autoencoder(torch.ones(20, 6), 2)
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: expected `x` to be finite, got 1 NaN"):
        linear_autoencoder(x, 2)


# Principal angles.


def test_principal_angles_by_hand() -> None:
    angles = torch.tensor([1.2, 0.3, 1e-9])
    a = torch.eye(6)[:, :3]
    b = torch.cat([angles.cos().diag(), angles.sin().diag()])
    mixed = b @ torch.randn(3, 3)
    torch.testing.assert_close(principal_angles(a, mixed), angles, rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(principal_angles(mixed, a), angles, rtol=1e-6, atol=1e-15)


def test_principal_angles_agree_with_scipy() -> None:
    a, b = torch.randn(9, 4), torch.randn(9, 3)
    expected = torch.as_tensor(subspace_angles(a.numpy(), b.numpy()))
    torch.testing.assert_close(principal_angles(a, b), expected)
    torch.testing.assert_close(principal_angles(b, a), expected)


def test_principal_angles_of_subspaces_of_other_size() -> None:
    a = torch.randn(6, 4)
    inside = a @ torch.randn(4, 2)
    assert principal_angles(a, inside).shape == (2,)
    assert principal_angles(a, inside).max() < 1e-12
    normal = torch.linalg.qr(a, mode="complete").Q[:, 4:]
    torch.testing.assert_close(principal_angles(a, normal), torch.full((2,), math.pi / 2))


def test_principal_angles_take_float32_with_gradients() -> None:
    a = torch.randn(5, 2, dtype=torch.float32, requires_grad=True)
    angles = principal_angles(a, a)
    assert angles.dtype == torch.float64
    assert not angles.requires_grad
    assert angles.max() < 1e-12


def test_principal_angles_refuse() -> None:
    a = torch.randn(5, 2)
    for bad in (a[:, 0], a.mT, a[:, :0]):
        with pytest.raises(ValueError, match=r"expected `b` of shape \(D, L\) with 1 <= L <= D"):
            principal_angles(a, bad)
    with pytest.raises(ValueError, match="same number of rows, got 5 and 4"):
        principal_angles(a, a[:4])
    with pytest.raises(ValueError, match="expected `a` to have .* got rank 1 from 2 columns"):
        principal_angles(a[:, :1].expand(5, 2), a)
    with pytest.raises(ValueError, match="expected `b` to have finite"):
        principal_angles(a, a / 0)


# Autoencoders of any networks.


def test_parts_and_error() -> None:
    autoencoder = Autoencoder(*networks())
    x = torch.randn(5, 6)
    codes = autoencoder.encode(x)
    assert codes.shape == (5, 2)
    assert torch.equal(autoencoder(x), autoencoder.decode(codes))
    expected = torch.stack([(a - b) @ (a - b) for a, b in zip(autoencoder(x), x, strict=True)])
    error = autoencoder.reconstruction_error(x)
    torch.testing.assert_close(error, expected.detach())
    assert not error.requires_grad
    torch.testing.assert_close(autoencoder.reconstruction_error(x[:1]), error[:1])


def test_images_are_summed_over_all_their_dimensions() -> None:
    autoencoder = Autoencoder(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    x = torch.randn(5, 1, 4, 4)
    error = autoencoder.reconstruction_error(x)
    assert error.shape == (5,)
    expected = (autoencoder(x) - x).square().sum((1, 2, 3)).detach()
    torch.testing.assert_close(error, expected)
    fit = fit_autoencoder(x, autoencoder.encoder, autoencoder.decoder, num_epochs=50, lr=0.05)
    assert fit.reconstruction_error(x).mean() < error.mean()


def test_error_is_that_of_eval_mode_and_leaves_the_mode() -> None:
    autoencoder = Autoencoder(MLP(6, [16], 2, dropout=0.5), MLP(2, [16], 6))
    x = torch.randn(5, 6)
    assert torch.equal(autoencoder.reconstruction_error(x), autoencoder.reconstruction_error(x))
    assert all(module.training for module in autoencoder.modules())


def test_training_lowers_the_error_and_trains_in_place() -> None:
    x = correlated()
    encoder, decoder = networks()
    before = Autoencoder(encoder, decoder).reconstruction_error(x).mean()
    kept = x.clone()
    fit = fit_autoencoder(x.requires_grad_(), encoder, decoder, num_epochs=30, lr=1e-2)
    assert fit.encoder is encoder
    assert fit.decoder is decoder
    assert torch.equal(x, kept)
    assert x.grad is None
    assert fit.reconstruction_error(x.detach()).mean() < 0.5 * before
    assert fit.losses.shape == (30,)
    assert fit.losses[-1] < fit.losses[0]
    assert not any(module.training for module in fit.modules())
    assert all(parameter.grad is None for parameter in fit.parameters())


def test_first_loss_is_the_mean_over_rows_of_unequal_batches() -> None:
    # A rate too small to move anything: the loss of the epoch is that of the start.
    x = correlated(25)
    autoencoder = Autoencoder(*networks())
    expected = autoencoder.reconstruction_error(x).mean()
    fit = fit_autoencoder(
        x, autoencoder.encoder, autoencoder.decoder, num_epochs=1, batch_size=10, lr=1e-12
    )
    torch.testing.assert_close(fit.losses, expected.unsqueeze(0), rtol=1e-9, atol=0)


def test_each_epoch_takes_every_row_once_in_a_new_order_and_follows_the_mean_gradient() -> None:
    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    seen: list[Tensor] = []
    gradients: list[Tensor] = []
    decoder = nn.Linear(2, 6)
    nn.init.zeros_(decoder.weight)
    nn.init.zeros_(decoder.bias)
    decoder.bias.register_hook(gradients.append)  # type: ignore[no-untyped-call]
    x = torch.arange(25.0).unsqueeze(1).expand(25, 6)
    fit_autoencoder(x, Spy(6, 2), decoder, num_epochs=2, batch_size=10, lr=1e-12)
    assert [len(batch) for batch in seen] == 2 * [10, 10, 5]
    first, second = (torch.cat(part) for part in (seen[:3], seen[3:]))
    for epoch in (first, second):
        assert not torch.equal(epoch, x)
        assert torch.equal(epoch.sort(0).values, x)
    assert not torch.equal(first, second)
    # Of the squared distance to zero, the reconstruction: -2 x, in the mean over the batch.
    for batch, gradient in zip(seen, gradients, strict=True):
        torch.testing.assert_close(gradient, -2 * batch.mean(0), rtol=1e-9, atol=0)


def test_frozen_parameters_stay() -> None:
    encoder, decoder = networks()
    encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fit = fit_autoencoder(correlated(), encoder, decoder, num_epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fit.encoder.parameters())


def test_training_is_repeated_by_the_seed() -> None:
    fits = []
    for _ in range(2):
        torch.manual_seed(3)
        fits.append(fit_autoencoder(correlated(), *networks(), noise=0.5, num_epochs=3))
    assert torch.equal(fits[0].losses, fits[1].losses)


def test_denoising_sees_noise_of_the_right_size_and_the_clean_target() -> None:
    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(x)

    seen: list[Tensor] = []
    x = torch.zeros(2000, 6)
    # The decoder returns zeros, the clean data, so the loss vanishes only against them.
    decoder = nn.Linear(2, 6)
    nn.init.zeros_(decoder.weight)
    nn.init.zeros_(decoder.bias)
    fit = fit_autoencoder(x, Spy(6, 2), decoder, noise=0.7, num_epochs=2, batch_size=1000)
    assert torch.equal(fit.losses, torch.zeros(2))
    dirty = torch.cat(seen)
    assert dirty.shape == (4000, 6)
    assert len(dirty.unique(dim=0)) == 4000  # Fresh in every batch of every epoch.
    variance = dirty.square().mean()
    standard_error = 0.7**2 * (2 / dirty.numel()) ** 0.5
    assert abs(variance - 0.7**2) < 5 * standard_error
    assert torch.equal(x, torch.zeros(2000, 6))


def test_denoising_by_gradients_comes_to_the_closed_form() -> None:
    x = correlated(2000)
    x = x - x.mean(0)
    fit = fit_autoencoder(
        x, nn.Linear(6, 2), nn.Linear(2, 6), noise=2.0, num_epochs=60, batch_size=100, lr=0.02
    )
    exact = linear_map(linear_autoencoder(x, 2, noise=2.0))
    torch.testing.assert_close(linear_map(fit), exact, rtol=0, atol=0.05)
    plain = linear_map(linear_autoencoder(x, 2))
    assert (linear_map(fit) - plain).abs().max() > 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    x = correlated().to(dtype)
    fit = fit_autoencoder(x, *(net.to(dtype) for net in networks()), noise=0.1, num_epochs=2)
    assert fit(x).dtype == fit.reconstruction_error(x).dtype == dtype


def test_fit_refuses_data() -> None:
    x, name = correlated(), "fit_autoencoder"
    nets = networks()
    with pytest.raises(TypeError, match=f"{name}: expected x to be a tensor .* got list"):
        fit_autoencoder(x.tolist(), *nets)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"{name}: expected x to hold floats, got torch.int64"):
        fit_autoencoder(x.long(), *nets)
    with pytest.raises(ValueError, match=f"{name}: expected at least one row in x, got an empty"):
        fit_autoencoder(x[:0], *nets)
    with pytest.raises(
        ValueError, match=r"expected a reconstruction of the shape of x, \(100, 6\)"
    ):
        fit_autoencoder(x, nets[0], MLP(2, [], 5))
    x[0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ValueError, match=f"{name}: expected x to be finite, got 2 NaN or infinite"):
        fit_autoencoder(x, *nets)
    with pytest.raises(ValueError, match="Autoencoder: expected x to be finite, got 2"):
        Autoencoder(*nets).reconstruction_error(x)


def test_fit_refuses_settings() -> None:
    x, name = correlated(), "fit_autoencoder"
    nets = networks()
    for noise in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name}: expected `noise` of at least 0 .* {noise}"):
            fit_autoencoder(x, *nets, noise=noise)
    for setting in ("num_epochs", "batch_size"):
        bad: dict[str, Any] = {setting: 0}
        with pytest.raises(ValueError, match=f"{name}: expected `{setting}` of at least 1, got 0"):
            fit_autoencoder(x, *nets, **bad)
        bad = {setting: 2.0}
        with pytest.raises(TypeError, match=f"{name}: expected an integer `{setting}`, got float"):
            fit_autoencoder(x, *nets, **bad)
    for lr in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{name}: expected a positive, finite `lr`, got {lr}"):
            fit_autoencoder(x, *nets, lr=lr)
    with pytest.raises(ValueError, match=f"{name}: expected networks with parameters to train"):
        fit_autoencoder(x, nn.Identity(), nn.Identity())


def test_diverging_training_is_reported() -> None:
    with pytest.raises(
        FloatingPointError, match="fit_autoencoder: expected a finite loss, got .* in epoch 2"
    ):
        fit_autoencoder(correlated(100), *networks(), lr=1e200, num_epochs=3)
