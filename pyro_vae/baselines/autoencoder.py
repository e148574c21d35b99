"""Autoencoders without probabilities, deterministic and denoising."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.baselines._gradient import check_noise, check_training, train_epochs
from pyro_vae.checks import check_batch
from pyro_vae.isolation import evaluation_mode

__all__ = ["Autoencoder", "fit_autoencoder"]


class Autoencoder(nn.Module):
    """A network to codes and one back; it has no density, and no distribution of codes.

    Args:
        encoder: From data ``(N, *event)`` to codes.
        decoder: From codes to reconstructions ``(N, *event)``.

    Attributes:
        losses: Training loss of each epoch, shape ``(num_epochs,)``, in squared units of the
            data, summed over a datum and averaged over rows; empty before training.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> autoencoder = Autoencoder(MLP(64, [16], 2), MLP(2, [16], 64))
        >>> autoencoder.encode(torch.zeros(5, 64)).shape, autoencoder(torch.zeros(5, 64)).shape
        (torch.Size([5, 2]), torch.Size([5, 64]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.losses = torch.empty(0)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the rows of ``x``, with gradients."""
        codes: Tensor = self.encoder(x)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Data at given codes, with gradients."""
        x: Tensor = self.decoder(codes)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructs the rows of ``x``, with gradients.

        Raises:
            ValueError: If the decoder's output is not of the shape of ``x``.
        """
        out = self.decode(self.encode(x))
        if out.shape != x.shape:
            raise ValueError(
                f"Autoencoder: expected a reconstruction of the shape of x, {tuple(x.shape)}, got "
                f"{tuple(out.shape)}. Give the decoder as many outputs as a datum has numbers."
            )
        return out

    def reconstruction_error(self, x: Tensor) -> Tensor:
        """Squared distance between each row and its reconstruction.

        Networks run in eval mode, which is undone, and without gradients. Nothing is added to x,
        also where the training was a denoising one.

        Args:
            x: Shape ``(N, *event)``.

        Returns:
            Shape ``(N,)``, squared units of the data, summed over a datum.

        Raises:
            TypeError: If ``x`` is no tensor of floats.
            ValueError: If ``x`` is empty or not finite, or its shape does not fit.
        """
        _check("Autoencoder", x)
        with torch.no_grad(), evaluation_mode(self):
            return _squared_distance(self(x), x)


def fit_autoencoder(
    x: Tensor,
    encoder: nn.Module,
    decoder: nn.Module,
    *,
    noise: float = 0.0,
    num_epochs: int = 100,
    batch_size: int = 100,
    lr: float = 1e-3,
) -> Autoencoder:
    """Train an autoencoder on the squared error, by Adam with a rate that falls along a cosine.

    With ``noise`` it is a denoising one: the input gets Gaussian noise, fresh in every batch, and
    the target is the clean datum. Order of the rows and noise come from torch's global generator.

    Args:
        x: Data of shape ``(N, *event)``, on the device and of the dtype of the networks.
        encoder: From data to codes. Both networks are trained in place; parameters that require
            no gradient stay as they are.
        decoder: From codes to data.
        noise: Standard deviation of the corruption, in units of the data; 0 for none.
        num_epochs: Number of passes over the data.
        batch_size: Rows in a batch; the last one may be shorter.
        lr: First learning rate.

    Returns:
        The networks, in eval mode, as one autoencoder.

    Raises:
        TypeError: If ``x`` is no tensor of floats, or a number of epochs or rows no integer.
        ValueError: If ``x`` is empty or not finite, if a setting is out of range, if there is
            nothing to train, or if the networks do not return data of the shape of ``x``.
        FloatingPointError: If the loss of a batch is not finite.

    Example:
        >>> from pyro_vae.nets import MLP
        >>> x = torch.randn(200, 1) * torch.tensor([1.0, 2.0, 3.0])
        >>> autoencoder = fit_autoencoder(x, MLP(3, [], 1), MLP(1, [], 3), batch_size=20, lr=0.03)
        >>> bool(autoencoder.reconstruction_error(x).mean() < 1e-3)
        True

    References:
        Vincent et al. 2008, "Extracting and composing robust features with denoising
        autoencoders", section 2.3, https://doi.org/10.1145/1390156.1390294. There pixels are
        set to zero at random instead.
    """
    where = "fit_autoencoder"
    _check(where, x)
    check_noise(noise, where)
    autoencoder = Autoencoder(encoder, decoder)
    check_training(autoencoder, num_epochs, batch_size, lr, where)
    x = x.detach()

    def loss(clean: Tensor) -> Tensor:
        dirty = clean + noise * torch.randn_like(clean) if noise else clean
        return _squared_distance(autoencoder(dirty), clean)

    losses = train_epochs(
        loss, autoencoder, x, num_epochs=num_epochs, batch_size=batch_size, lr=lr, where=where
    )
    autoencoder.losses = torch.tensor([*losses])
    return autoencoder.eval()


def _squared_distance(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Summed over each datum, shape ``(N,)``."""
    return (reconstruction - x).square().flatten(1).sum(1)


def _check(where: str, x: Any) -> None:
    """Raise unless ``x`` is a tensor of finite floats with rows."""
    check_batch(where, "x", x)
    if not x.is_floating_point():
        raise TypeError(
            f"{where}: expected x to hold floats, got {x.dtype}. Convert it with x.float()."
        )
    num_bad = int(x.numel() - torch.isfinite(x).sum())
    if num_bad:
        raise ValueError(
            f"{where}: expected x to be finite, got {num_bad} NaN or infinite of {x.numel()} "
            "entries. Drop or impute them first."
        )
