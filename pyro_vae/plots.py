"""Figures of training runs, bounds, images, codes and loadings. All but films return their axes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vae.checks import check_at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.evaluation import RateDistortionPoint
    from pyro_vae.history import History

__all__ = [
    "plot_bounds",
    "plot_codes",
    "plot_em",
    "plot_gap",
    "plot_history",
    "plot_images",
    "plot_jensen",
    "plot_loadings",
    "plot_rate_distortion",
    "plot_reconstructions",
    "save_gif",
]


def _axes(ax: "Axes | None", figsize: tuple[float, float] = (6, 4)) -> "Axes":
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=figsize, layout="constrained")[1]


def plot_history(histories: "Mapping[str, History]", ax: "Axes | None" = None) -> "Axes":
    """Losses over epochs: training dashed, validation solid, one colour a run.

    Args:
        histories: Runs by label.
        ax: Where to draw; a new figure by default.

    Example:
        >>> from matplotlib import pyplot as plt
        >>> from pyro_vae import History
        >>> ax = plot_history({"VAE": History(loss=[3.0, 2.0], validation_loss=[3.1, 2.2])})
        >>> ax.get_ylabel()
        'loss (nats per datum)'
        >>> plt.close()
    """
    ax = _axes(ax)
    for index, (label, history) in enumerate(histories.items()):
        color, epochs = f"C{index}", range(1, len(history.loss) + 1)
        marker = "o" if len(history.loss) == 1 else None  # A line needs two points.
        if not history.validation_loss:
            ax.plot(epochs, history.loss, marker=marker, color=color, label=label or None)
            continue
        # With several runs their names fill the legend, so its title explains the dashes.
        name = None if label else "training"
        ax.plot(epochs, history.loss, "--", marker=marker, color=color, label=name)
        name, held_out = label or "held out", history.validation_loss
        ax.plot(epochs[: len(held_out)], held_out, marker=marker, color=color, label=name)
    curves = [c for h in histories.values() for c in (h.loss, h.validation_loss)]
    losses = [v for curve in curves for v in curve[len(curve) // 20 :] if math.isfinite(v)]
    if losses:  # The first epochs would flatten everything else.
        low, high = min(losses), max(losses)
        ax.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low))
    ax.set(xlabel="epoch", ylabel="loss (nats per datum)")
    if ax.get_legend_handles_labels()[0]:
        dashes = any(label and history.validation_loss for label, history in histories.items())
        title = "held out (dashed: training)" if dashes else None
        ax.legend(frameon=False, fontsize="small", title=title, title_fontsize="small")
    return ax


def plot_em(
    runs: Mapping[str, torch.Tensor],
    closed_form: Mapping[str, float] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Log-likelihood after every EM step, on a logarithmic axis of steps.

    Args:
        runs: ``log_likelihoods`` of EM fits by label, nats per datum.
        closed_form: Values to reach, drawn as dotted lines.
        ax: Where to draw; a new figure by default.
    """
    ax = _axes(ax)
    for index, (label, values) in enumerate(runs.items()):
        ax.plot(range(1, len(values) + 1), values.tolist(), color=f"C{index}", label=label)
    for label, value in (closed_form or {}).items():
        ax.axhline(value, color="black", linestyle=":", linewidth=1, label=label)
    ax.set(xscale="log", xlabel="EM step", ylabel="training log-likelihood (nats per datum)")
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_bounds(
    num_particles: Sequence[int],
    bounds: Mapping[str, Sequence[float]],
    exact: Mapping[str, float] | None = None,
    standard_errors: Mapping[str, Sequence[float]] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Importance-weighted bounds over the number of particles; K = 1 is the ELBO.

    Args:
        num_particles: The K of each point.
        bounds: Values by label, nats per datum.
        exact: Log-likelihoods that are known, by the same labels, drawn as dashed lines.
        standard_errors: Monte-Carlo standard errors by label.
        ax: Where to draw; a new figure by default.
    """
    ax = _axes(ax)
    for index, (label, values) in enumerate(bounds.items()):
        color = f"C{index}"
        errors = (standard_errors or {}).get(label)
        ax.errorbar(
            num_particles, values, yerr=errors, fmt="o-", color=color, markersize=3, label=label
        )
        if exact and label in exact:
            ax.axhline(exact[label], color=color, linestyle="--", label=f"{label}, exact")
    ax.set(xscale="log", xlabel="particles K", ylabel="bound (nats per datum)")
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_gap(
    x: torch.Tensor, log_likelihood: torch.Tensor, elbo: torch.Tensor, ax: "Axes | None" = None
) -> "Axes":
    """An ELBO below the log-likelihood, over steps or a parameter; their gap, the KL, is shaded.

    Args:
        x: Positions in ascending order, ``(num,)``.
        log_likelihood: Exact values there, ``(num,)``.
        elbo: Likewise the bound.
        ax: Where to draw; a new figure by default.
    """
    ax = _axes(ax)
    x, log_likelihood, elbo = (f.detach().cpu() for f in (x, log_likelihood, elbo))
    ax.fill_between(x, elbo, log_likelihood, color="C0", alpha=0.25, linewidth=0)
    ax.plot(x, log_likelihood, color="black", linewidth=2.5)
    ax.plot(x, elbo, color="C0", linewidth=2.5)
    # The names stand where there is most room between the curves, away from the ends.
    edge = len(x) // 4
    at = edge + int((log_likelihood - elbo)[edge : len(x) - edge].argmax())
    where: dict[str, Any] = {"xytext": (-8, 4), "textcoords": "offset points", "ha": "right"}
    ax.annotate("log p(x)", (float(x[at]), float(log_likelihood[at])), **where)
    where = {"xytext": (8, -4), "textcoords": "offset points", "va": "top", "color": "C0"}
    ax.annotate("ELBO", (float(x[at]), float(elbo[at])), **where)
    return ax


def plot_jensen(
    log_weights: torch.Tensor,
    probabilities: torch.Tensor | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Why the ELBO of a datum lies below log p(x): the mean of a logarithm, and that of a mean.

    Bars show how often q draws which weight :math:`w = p(x, z) / q(z \mid x)`, in units of its
    mean.

    Args:
        log_weights: log w, nats, ``(num,)``. From draws, log E[w] is an estimate of log p(x).
        probabilities: Of the weights under q, ``(num,)``; equal by default.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: If the shapes are not those, or a weight is zero or not finite.
    """
    log_w = log_weights.detach().cpu().double()
    p = torch.ones_like(log_w) if probabilities is None else probabilities.detach().cpu().double()
    if log_w.dim() != 1 or p.shape != log_w.shape or not log_w.isfinite().all():
        raise ValueError(
            "plot_jensen: expected finite log-weights and probabilities of one shape (num,), got "
            f"{tuple(log_w.shape)} and {tuple(p.shape)}. Pass those of one datum."
        )
    p = p / p.sum()
    log_mean = (log_w + p.log()).logsumexp(0)
    w, gap = (log_w - log_mean).exp(), float(log_mean - p @ log_w)
    end, low = 1.1 * float(w[p > 1e-6 * p.max()].max()), -max(3.0, 1.5 * gap)
    ax = _axes(ax, (8, 5))
    curve = torch.linspace(math.exp(low), end, 300)
    ax.plot(curve, curve.log(), color="0.5")
    beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right"}
    ax.annotate("log w", (0.85 * end, math.log(0.85 * end)), (0, 8), color="0.5", **beside)
    heights, edges = np.histogram(w.numpy(), 50, range=(0, end), weights=p.numpy())
    tops = low * (1 - 0.18 * heights / heights.max())
    ax.stairs(tops, edges, baseline=low, fill=True, color="0.85")
    ax.text(0.5 * end, 0.92 * low, "how often q draws w", color="0.5")
    levels = (0.0, "black", "log E[w] = log p(x)"), (-gap, "C0", "E[log w] = ELBO")
    for level, color, text in levels:
        ax.axhline(level, color=color, linestyle="--")
        ax.annotate(text, (end, level), (0, -4), color=color, va="top", **beside)
    ax.plot([1, 1], [low, 0], color="black", linestyle=":")
    ax.text(1 + 0.01 * end, low / 2, "E[w]")
    arrow = {"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (0.06 * end, 0.0), (0.06 * end, -gap), arrowprops=arrow)
    ax.text(0.075 * end, -gap / 2, f"KL = {gap:.2f}", va="center")
    ax.set(xlabel="w = p(x, z) / q(z | x), divided by its mean", ylabel="nats above log p(x)")
    ax.set(xlim=(0, end), ylim=(low, math.log(end) + 0.2))
    return ax


def plot_rate_distortion(
    points: "Sequence[RateDistortionPoint]",
    *,
    entropy: float | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Models in the plane of rate and distortion, with lines of equal ELBO behind them.

    Bars are standard errors over the data. The points are joined in the order given.

    Args:
        points: From ``rate_distortion``.
        entropy: E[-log p(x)] of the data where it is known, nats per datum: no model lies below
            the line distortion = entropy - rate, drawn in black.
        ax: Where to draw; a new figure by default.

    Example:
        >>> from matplotlib import pyplot as plt
        >>> from pyro_vae.evaluation import RateDistortionPoint
        >>> ax = plot_rate_distortion([RateDistortionPoint(1.0, 5, 80, -85, 0.1, 1, 1, 100)])
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('rate (nats per datum)', 'distortion (nats per datum)')
        >>> plt.close()

    References:
        Alemi et al. (2018), Fixing a broken ELBO, figure 1, https://arxiv.org/abs/1711.00464
    """
    ax = _axes(ax)
    x, y = [p.rate for p in points], [p.distortion for p in points]
    x_errors = [p.rate_standard_error for p in points]
    y_errors = [p.distortion_standard_error for p in points]
    ax.errorbar(x, y, xerr=x_errors, yerr=y_errors, fmt="o-", color="C0", markersize=4)
    ax.margins(0.12)
    if min(x) >= 0:
        ax.set_xlim(left=max(0.0, ax.get_xlim()[0]))
    limits = ax.get_xlim(), ax.get_ylim()
    _annotate_betas(ax, points)
    _draw_equal_elbos(ax)
    if entropy is not None:
        ax.axline((0, entropy), slope=-1, color="black", linewidth=1, label="entropy of the data")
        ax.legend(frameon=False, fontsize="small")
    ax.set(xlim=limits[0], ylim=limits[1])
    ax.set(xlabel="rate (nats per datum)", ylabel="distortion (nats per datum)")
    return ax


def _annotate_betas(ax: "Axes", points: "Sequence[RateDistortionPoint]") -> None:
    """One label for neighbours so close that theirs would cover one another."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    groups: list[list[RateDistortionPoint]] = []
    for point in points:
        last = groups[-1][0] if groups else None
        near = last is not None and (
            abs(point.rate - last.rate) < 0.1 * (right - left)
            and abs(point.distortion - last.distortion) < 0.05 * (top - bottom)
        )
        if near:
            groups[-1].append(point)
        else:
            groups.append([point])
    for group in groups:
        text = "$\\beta$ = " + ", ".join(f"{point.beta:g}" for point in group)
        at = group[0].rate, group[0].distortion
        ax.annotate(text, at, xytext=(6, 5), textcoords="offset points", fontsize="small")


def _draw_equal_elbos(ax: "Axes") -> None:
    """Lines of equal rate + distortion, with the ELBO at the lower end of each."""
    from matplotlib.ticker import MaxNLocator

    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for total in MaxNLocator(8).tick_values(left + bottom, right + top):
        ax.axline((0, total), slope=-1, color="0.75", linewidth=0.8, linestyle=":", zorder=0)
        end = min(right, total - bottom)
        if not left + 0.15 * (right - left) < end or total - end > top - 0.15 * (top - bottom):
            continue  # No room for the words.
        ax.text(
            end,
            total - end,
            f"ELBO {-total:g}    ",
            rotation=-45,
            rotation_mode="anchor",
            transform_rotates_text=True,
            ha="right",
            va="bottom",
            color="0.55",
            fontsize="x-small",
            zorder=0,
            clip_on=True,
        )


def _canvas(
    images: torch.Tensor, num_columns: int, image_shape: tuple[int, int] | None
) -> torch.Tensor:
    """Lays images out in rows on one tensor, with a gap of NaN between them."""
    check_at_least("plots", "num_columns", num_columns, 1)
    images = images.cpu().double()
    side = round(images[0].numel() ** 0.5)
    height, width = image_shape or (images.shape[-2:] if images.dim() > 2 else (side, side))
    if images[0].numel() != height * width:
        raise ValueError(
            f"plots: expected images of {height} x {width} = {height * width} pixels, got "
            f"{images[0].numel()}. Pass image_shape=(height, width)."
        )
    images = images.reshape(len(images), height, width)
    num_rows = -(-len(images) // num_columns)
    gap = max(1, height // 12)
    canvas = torch.full(
        (num_rows * (height + gap) - gap, num_columns * (width + gap) - gap), torch.nan
    ).double()
    for index, image in enumerate(images):
        row, column = divmod(index, num_columns)
        top, left = row * (height + gap), column * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def plot_images(
    images: torch.Tensor,
    num_columns: int = 10,
    *,
    image_shape: tuple[int, int] | None = None,
    cmap: str = "gray_r",
    limits: tuple[float, float] | None = (0.0, 1.0),
    ax: "Axes | None" = None,
) -> "Axes":
    """Images in rows.

    Args:
        images: ``(N, pixels)`` or ``(N, height, width)``, on the CPU or not.
        num_columns: Images in a row.
        image_shape: Height and width; by default those of the tensor, or a square.
        cmap: Matplotlib's colour map.
        limits: Values of the two ends of the colour map; the extremes if ``None``.
        ax: Where to draw; a new figure by default.

    Raises:
        TypeError: If ``num_columns`` is no integer.
        ValueError: If it is below 1, or the images do not have that shape.
    """
    images = images.detach()
    canvas = _canvas(images, num_columns, image_shape)
    height, width = canvas.shape
    inch_per_pixel = max(0.06, 3 / max(height, width))
    ax = _axes(ax, (inch_per_pixel * width, inch_per_pixel * height))
    low, high = limits or (float(images.min()), float(images.max()))
    ax.imshow(canvas.numpy(), cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    ax.set_axis_off()
    return ax


def plot_reconstructions(
    images: torch.Tensor,
    reconstructions: Mapping[str, torch.Tensor],
    *,
    image_shape: tuple[int, int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """A row of images above one row of reconstructions for each model.

    Args:
        images: ``(N, pixels)``.
        reconstructions: Tensors of the same shape by label.
        image_shape: Height and width; a square by default.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: If the shapes differ.
    """
    for label, reconstruction in reconstructions.items():
        if reconstruction.shape != images.shape:
            raise ValueError(
                f"plot_reconstructions: expected '{label}' of the shape of the images, "
                f"{tuple(images.shape)}, got {tuple(reconstruction.shape)}. Pass the "
                "reconstructions of the same rows."
            )
    stacked = torch.cat([images.cpu(), *(r.cpu() for r in reconstructions.values())])
    ax = plot_images(stacked, len(images), image_shape=image_shape, ax=ax)
    labels = ["data", *reconstructions]
    height = ax.get_ylim()[0] / len(labels)
    for index, label in enumerate(labels):
        ax.text(-2, (index + 0.5) * height, label, ha="right", va="center", fontsize="small")
    return ax


def plot_codes(codes: torch.Tensor, labels: torch.Tensor, ax: "Axes | None" = None) -> "Axes":
    """Codes in the plane, coloured by class.

    Args:
        codes: ``(N, 2)``; only the first two coordinates are drawn.
        labels: ``(N,)`` classes.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: If the shapes do not fit.
    """
    from matplotlib import colormaps

    if codes.dim() != 2 or codes.shape[1] < 2 or labels.shape != codes.shape[:1]:
        raise ValueError(
            f"plot_codes: expected codes (N, 2) and labels (N,), got {tuple(codes.shape)} and "
            f"{tuple(labels.shape)}. Give each code two coordinates and one label."
        )
    ax = _axes(ax, (6, 5))
    codes, labels = codes.detach().cpu(), labels.cpu()
    classes = labels.unique().tolist()
    colors = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for index, label in enumerate(classes):
        points = codes[labels == label]
        color = colors[index % len(colors)]
        ax.scatter(points[:, 0], points[:, 1], s=8, alpha=0.7, color=color, label=str(label))
    ax.set(xlabel="code 1", ylabel="code 2")
    ax.legend(
        frameon=False, fontsize="small", markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return ax


def plot_loadings(
    weight: torch.Tensor,
    num_columns: int = 10,
    *,
    image_shape: tuple[int, int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Columns of a loading matrix as images, red positive and blue negative, zero white.

    Args:
        weight: ``(pixels, latent_dim)``.
        num_columns: Images in a row.
        image_shape: Height and width; a square by default.
        ax: Where to draw; a new figure by default.
    """
    largest = float(weight.detach().abs().max())
    return plot_images(
        weight.T,
        min(num_columns, weight.shape[1]),
        image_shape=image_shape,
        cmap="RdBu_r",
        limits=(-largest, largest),
        ax=ax,
    )


def save_gif(
    images: torch.Tensor,
    path: str | Path,
    num_columns: int = 10,
    *,
    image_shape: tuple[int, int] | None = None,
    zoom: int = 4,
    frames_per_second: int = 20,
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> None:
    """Writes a film of images in rows, dark where they are large, that starts again at its end.

    Args:
        images: ``(num_frames, N, pixels)`` or ``(num_frames, N, height, width)``.
        path: Name of the file, with the suffix ``.gif``.
        num_columns: Images in a row.
        image_shape: Height and width; by default those of the tensor, or a square.
        zoom: Width of a pixel of the images on the screen.
        frames_per_second: A GIF counts hundredths of a second: 10, 20, 25 and 50 are exact.
        limits: Values of the two ends of the colour map; the extremes if ``None``.

    Raises:
        TypeError: If one of the numbers is no integer.
        ValueError: If one of them is below 1; if there is not one row of images for each frame, or
            not of that shape.
    """
    from matplotlib import pyplot as plt
    from matplotlib.animation import PillowWriter

    check_at_least("save_gif", "zoom", zoom, 1)
    check_at_least("save_gif", "frames_per_second", frames_per_second, 1)
    if images.dim() < 3 or not images.numel():
        raise ValueError(
            f"save_gif: expected images (num_frames, N, pixels), got shape {tuple(images.shape)}. "
            "With one image a frame that is images.unsqueeze(1)."
        )
    images = images.detach()
    limits = limits or (float(images.min()), float(images.max()))
    canvases = [_canvas(frame, num_columns, image_shape) for frame in images]
    height, width = canvases[0].shape
    dpi = 100
    figure = plt.figure(figsize=(zoom * width / dpi, zoom * height / dpi), dpi=dpi)
    try:
        ax = plot_images(
            images[0],
            num_columns,
            image_shape=image_shape,
            limits=limits,
            ax=figure.add_axes((0, 0, 1, 1)),
        )
        writer = PillowWriter(frames_per_second)
        with writer.saving(figure, str(path), dpi):
            for canvas in canvases:
                ax.images[0].set_data(canvas.numpy())
                writer.grab_frame()
    finally:  # A path that cannot be written to leaves no figure open.
        plt.close(figure)
