"""The course of a training run."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["History"]


@dataclass
class History:
    """Losses per epoch, in nats per datum (with ELBOs: the negative bound, lower is better).

    Attributes:
        loss: Training loss of each epoch, averaged over its data while parameters changed.
        validation_loss: Loss on the validation batches after each epoch; empty without them.
        seconds: Duration of each epoch, validation included.
        interrupted: Whether a keyboard interrupt ended the run.

    Example:
        >>> history = History()
        >>> history.append(120.5, None, 0.3)
        >>> history.to_frame()
                loss  seconds
        epoch
        1      120.5      0.3
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    interrupted: bool = False

    def append(self, loss: float, validation_loss: float | None, seconds: float) -> None:
        """Adds an epoch."""
        self.loss.append(loss)
        if validation_loss is not None:
            self.validation_loss.append(validation_loss)
        self.seconds.append(seconds)

    def to_frame(self) -> "pd.DataFrame":
        """A row per epoch, counted from 1."""
        import pandas as pd

        columns: dict[str, Any] = {"loss": self.loss}
        if self.validation_loss:
            columns["validation_loss"] = self.validation_loss
        columns["seconds"] = self.seconds
        index = pd.RangeIndex(1, len(self.loss) + 1, name="epoch")
        return pd.DataFrame(columns, index=index)

    def plot(self, ax: "Axes | None" = None, label: str = "") -> "Axes":
        """Draws the losses over the epochs, see ``pyro_vae.plots.plot_history``."""
        from pyro_vae.plots import plot_history

        return plot_history({label: self}, ax=ax)
