"""The loop of the baselines that are trained by gradients, in plain torch."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pyro_vae.baselines._data import check_integer

__all__ = ["check_noise", "check_training", "train_epochs"]


def check_noise(noise: float, where: str) -> None:
    """Raise unless ``noise`` is a standard deviation.

    Args:
        noise: The argument to check.
        where: Name of the calling function, for the error message.

    Raises:
        ValueError: If it is negative, infinite or NaN.

    Example:
        >>> check_noise(0.0, "demo")
    """
    if not 0.0 <= noise < math.inf:
        raise ValueError(
            f"{where}: expected `noise` of at least 0 and finite, got {noise}. It is a standard "
            "deviation in units of the data; pass 0.0 for none."
        )


def check_training(
    module: nn.Module, num_epochs: int, batch_size: int, lr: float, where: str
) -> None:
    """Raise unless the module has something to train, and the settings make sense.

    Args:
        module: What is trained.
        num_epochs: Number of passes over the data.
        batch_size: Rows in a batch.
        lr: First learning rate.
        where: Name of the calling function, for the error message.

    Raises:
        TypeError: If a number of epochs or rows is no integer.
        ValueError: If a setting is not positive, or no parameter asks for a gradient.

    Example:
        >>> check_training(nn.Linear(2, 1), 10, 100, 1e-3, "demo")
    """
    check_integer(num_epochs, "num_epochs", 1, None, where, "Pass for instance num_epochs=100.")
    check_integer(batch_size, "batch_size", 1, None, where, "Pass for instance batch_size=100.")
    if not 0.0 < lr < math.inf:
        raise ValueError(
            f"{where}: expected a positive, finite `lr`, got {lr}. Pass for instance lr=1e-3."
        )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"{where}: expected networks with parameters to train, got none that requires a "
            "gradient. Call requires_grad_() on them."
        )


def train_epochs(
    loss: Callable[[Tensor], Tensor],
    module: nn.Module,
    x: Tensor,
    *,
    num_epochs: int,
    batch_size: int,
    lr: float,
    where: str,
) -> Iterator[float]:
    """Minimise a loss by Adam, its learning rate falling to zero along a cosine.

    Batches are shuffled anew in every epoch, from torch's global generator. Gradients of the
    module are gone at the end of each epoch.

    Args:
        loss: From a batch of rows to the loss of each, shape ``(batch,)``.
        module: Its parameters are trained in place, in train mode; those that require no
            gradient stay as they are.
        x: Data, one row a datum.
        num_epochs: Number of passes over the data.
        batch_size: Rows in a batch; the last one may be shorter.
        lr: First learning rate.
        where: Name of the calling function, for the error message.

    Yields:
        After every epoch its mean loss over all rows.

    Raises:
        FloatingPointError: If the loss of a batch is not finite.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> x = torch.randn(50, 1)
        >>> run = train_epochs(lambda x: (line(x) - 3 * x).square().sum(-1), line, x,
        ...                    num_epochs=200, batch_size=10, lr=0.1, where="demo")
        >>> [*run][-1] < 1e-3
        True
    """
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=lr)
    num_steps = num_epochs * math.ceil(len(x) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for epoch in range(num_epochs):
        module.train()
        total = 0.0
        for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
            optimizer.zero_grad()
            value = loss(x[rows]).sum()
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"{where}: expected a finite loss, got {float(value.detach())} in epoch "
                    f"{epoch + 1}. Lower lr, or rescale the data."
                )
            (value / len(rows)).backward()
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        optimizer.zero_grad()
        yield total / len(x)
