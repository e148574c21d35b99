"""Figures: what is on the axes, and that nothing else is opened or changed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import AxLine
from PIL import Image

from pyro_vae import History, plots
from pyro_vae.evaluation import RateDistortionPoint


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def images(num: int = 5, pixels: int = 12) -> torch.Tensor:
    return torch.rand(num, pixels)


def shown(ax: Axes) -> np.ndarray[Any, Any]:
    (image,) = ax.images
    return np.ma.filled(image.get_array().astype(float), np.nan)


def point(beta: float, rate: float, distortion: float) -> RateDistortionPoint:
    errors = 0.5, 1.5, 2.0
    return RateDistortionPoint(beta, rate, distortion, -rate - distortion, *errors, 100)


CALLS: dict[str, Callable[[Axes | None], Axes]] = {
    "history": lambda ax: plots.plot_history({"A": History(loss=[2.0, 1.0])}, ax=ax),
    "em": lambda ax: plots.plot_em({"A": torch.tensor([-2.0, -1.0])}, ax=ax),
    "bounds": lambda ax: plots.plot_bounds([1, 10], {"A": [-2.0, -1.0]}, ax=ax),
    "gap": lambda ax: plots.plot_gap(torch.arange(2), torch.ones(2), torch.zeros(2), ax=ax),
    "jensen": lambda ax: plots.plot_jensen(torch.tensor([0.0, 1.0]), ax=ax),
    "images": lambda ax: plots.plot_images(images(), image_shape=(3, 4), ax=ax),
    "rate_distortion": lambda ax: plots.plot_rate_distortion([point(1, 5.0, 80.0)], ax=ax),
    "reconstructions": lambda ax: plots.plot_reconstructions(images(3, 4), {}, ax=ax),
    "codes": lambda ax: plots.plot_codes(torch.randn(4, 2), torch.arange(4), ax=ax),
    "loadings": lambda ax: plots.plot_loadings(torch.randn(9, 2), ax=ax),
}


def test_every_plot_is_here() -> None:
    assert [*sorted(f"plot_{name}" for name in CALLS), "save_gif"] == plots.__all__


@pytest.mark.parametrize("name", CALLS)
def test_a_new_figure_by_default(name: str) -> None:
    style = dict(mpl.rcParams)
    ax = CALLS[name](None)
    assert isinstance(ax, Axes)
    assert plt.get_fignums() == [ax.figure.number]
    ax.figure.canvas.draw()
    assert dict(mpl.rcParams) == style


@pytest.mark.parametrize("name", CALLS)
def test_drawing_on_given_axes(name: str) -> None:
    figure, (left, right) = plt.subplots(1, 2)
    assert CALLS[name](right) is right
    assert plt.get_fignums() == [figure.number]
    assert not left.has_data()
    assert right.has_data()


# Curves.


def test_history_lines() -> None:
    with_held_out = History(loss=[3.0, 2.0, 1.0], validation_loss=[5.0, 4.0, 3.5])
    ax = plots.plot_history({"A": with_held_out, "B": History(loss=[2.5, 1.5])})
    training, held_out, other = ax.lines
    assert training.get_xdata().tolist() == held_out.get_xdata().tolist() == [1, 2, 3]
    assert training.get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert held_out.get_ydata().tolist() == [5.0, 4.0, 3.5]
    assert other.get_xdata().tolist() == [1, 2]
    assert other.get_ydata().tolist() == [2.5, 1.5]
    assert [line.get_linestyle() for line in ax.lines] == ["--", "-", "-"]
    assert training.get_color() == held_out.get_color() != other.get_color()
    assert legend(ax) == ["A", "B"]
    assert ax.get_legend().get_title().get_text() == "held out (dashed: training)"
    assert ax.get_xlabel() == "epoch"
    assert ax.get_ylabel() == "loss (nats per datum)"


def test_history_shows_a_held_out_loss_above_the_training_loss() -> None:
    ax = plots.plot_history({"A": History(loss=[3.0, 1.0], validation_loss=[4.0, 6.0])})
    low, high = ax.get_ylim()
    assert low < 1.0
    assert high >= 6.0


def test_history_is_not_flattened_by_its_first_epochs() -> None:
    loss = [1e6] + [2.0 - 0.01 * i for i in range(99)]
    ax = plots.plot_history({"A": History(loss=loss)})
    assert ax.get_ylim()[1] < 3


def test_history_without_label_or_epochs() -> None:
    ax = plots.plot_history({"": History(loss=[2.0])})
    assert ax.get_legend() is None
    assert len(ax.lines) == 1
    assert not plots.plot_history({}).lines
    (line,) = plots.plot_history({"A": History()}).lines
    assert len(line.get_xdata()) == 0


def test_history_with_losses_that_are_not_finite() -> None:
    history = History(loss=[2.0, 1.0], validation_loss=[float("inf"), 1.5])
    assert plots.plot_history({"A": history}).get_ylim()[1] < 3


def test_em_lines() -> None:
    runs = {"pPCA": torch.tensor([-3.0, -2.0, -1.5]), "FA": torch.tensor([-1.0])}
    ax = plots.plot_em(runs, {"exact": -1.25})
    first, second, exact = ax.lines
    assert first.get_xdata().tolist() == [1, 2, 3]
    assert first.get_ydata().tolist() == [-3.0, -2.0, -1.5]
    assert second.get_ydata().tolist() == [-1.0]
    assert list(exact.get_ydata()) == [-1.25, -1.25]
    assert legend(ax) == ["pPCA", "FA", "exact"]
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "EM step"
    assert ax.get_ylabel() == "training log-likelihood (nats per datum)"


def test_bounds_lines() -> None:
    ax = plots.plot_bounds(
        [1, 10, 100],
        {"A": [-3.0, -2.0, -1.5], "B": [-4.0, -3.0, -2.5]},
        exact={"A": -1.0, "unknown": 5.0},
        standard_errors={"B": [0.0, 0.5, 0.25]},
    )
    points, no_errors = ax.containers[0].lines[0], ax.containers[0].has_yerr
    assert points.get_xdata().tolist() == [1, 10, 100]
    assert points.get_ydata().tolist() == [-3.0, -2.0, -1.5]
    assert not no_errors
    (bars,) = ax.containers[1].lines[2]
    heights = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert heights == [[-4.0, -4.0], [-3.5, -2.5], [-2.75, -2.25]]
    assert legend(ax) == ["A, exact", "A", "B"]
    (exact,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert list(exact.get_ydata()) == [-1.0, -1.0]
    assert exact.get_color() == points.get_color()
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "particles K"


def test_rate_distortion_points_and_bars() -> None:
    ax = plots.plot_rate_distortion([point(0.5, 10.0, 20.0), point(4, 1.0, 40.0)])
    line, _, (x_bars, y_bars) = ax.containers[0].lines
    assert line.get_xdata().tolist() == [10.0, 1.0]
    assert line.get_ydata().tolist() == [20.0, 40.0]
    assert [bar[:, 0].tolist() for bar in x_bars.get_segments()] == [[9.5, 10.5], [0.5, 1.5]]
    assert [bar[:, 1].tolist() for bar in y_bars.get_segments()] == [[18.5, 21.5], [38.5, 41.5]]
    betas = [text for text in ax.texts if "beta" in text.get_text()]
    assert [text.get_text() for text in betas] == [r"$\beta$ = 0.5", r"$\beta$ = 4"]
    assert [text.xy for text in betas] == [(10.0, 20.0), (1.0, 40.0)]
    assert ax.get_xlabel() == "rate (nats per datum)"
    assert ax.get_ylabel() == "distortion (nats per datum)"
    assert ax.get_legend() is None


def test_labels_of_models_in_one_place_are_joined() -> None:
    ax = plots.plot_rate_distortion(
        [point(1, 9.0, 20.0), point(4, 0.01, 40.0), point(10, 0.0, 40.1)]
    )
    texts = [text.get_text() for text in ax.texts if "beta" in text.get_text()]
    assert texts == [r"$\beta$ = 1", r"$\beta$ = 4, 10"]


def test_lines_of_equal_elbo_and_entropy() -> None:
    ax = plots.plot_rate_distortion([point(1, 10.0, 20.0), point(4, 1.0, 40.0)], entropy=25.0)
    assert legend(ax) == ["entropy of the data"]
    assert all(line.get_slope() == -1 for line in ax.lines if isinstance(line, AxLine))
    (entropy,) = [line for line in ax.lines if line.get_label() == "entropy of the data"]
    assert entropy.get_xy1() == (0, 25.0)
    totals = [sum(line.get_xy1()) for line in ax.lines if line.get_linestyle() == ":"]
    assert len(totals) > 3
    words = [text for text in ax.texts if "ELBO" in text.get_text()]
    assert words
    for text in words:  # At the line they name.
        total = -float(text.get_text().split()[1])
        assert total in totals
        assert sum(text.get_position()) == pytest.approx(total)


# Images.


def test_images_lie_in_rows() -> None:
    x = images(5, 9)
    ax = plots.plot_images(x, num_columns=3)
    canvas = shown(ax)
    assert canvas.shape == (7, 11)
    for index, image in enumerate(x):
        row, column = divmod(index, 3)
        tile = canvas[4 * row : 4 * row + 3, 4 * column : 4 * column + 3]
        assert np.array_equal(tile, image.reshape(3, 3).numpy())
    assert np.isnan(canvas[3]).all()
    assert np.isnan(canvas[:, 3]).all()
    assert np.isnan(canvas[4:, 8:]).all()  # The sixth place is empty.
    assert ax.images[0].get_clim() == (0.0, 1.0)
    assert not ax.axison


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_images_that_are_not_square(shape: tuple[int, int]) -> None:
    x = images(1, 12)
    expected = x.reshape(shape).numpy()
    assert np.array_equal(shown(plots.plot_images(x, 1, image_shape=shape)), expected)
    for of_argument in (shape, None):  # Height and width of the tensor are enough.
        upright = plots.plot_images(x.reshape(1, *shape), 1, image_shape=of_argument)
        assert np.array_equal(shown(upright), expected)


@pytest.mark.parametrize("shape", [(2, 8), (8, 2)])
def test_images_whose_pixels_would_make_a_square(shape: tuple[int, int]) -> None:
    x = images(2, 16).reshape(2, *shape)
    canvas = shown(plots.plot_images(x, 1))
    assert np.array_equal(canvas[: shape[0]], x[0].numpy())
    assert np.array_equal(canvas[shape[0] + 1 :], x[1].numpy())


def test_image_limits() -> None:
    x = 10 * images(4, 4) - 5
    assert plots.plot_images(x, limits=(-5, 5)).images[0].get_clim() == (-5, 5)
    clim = plots.plot_images(x, limits=None).images[0].get_clim()
    assert clim == (x.min().item(), x.max().item())


def test_images_with_gradient_and_in_single_precision() -> None:
    x = torch.rand(2, 4, dtype=torch.float32, requires_grad=True)
    assert shown(plots.plot_images(x, 2)).shape == (2, 5)
    plots.plot_images(x, limits=None)
    plots.plot_loadings(x.T)
    assert x.requires_grad


@pytest.mark.parametrize("shape", [None, (3, 5)])
def test_images_of_another_shape(shape: tuple[int, int] | None) -> None:
    height, width = shape or (3, 3)
    message = f"plots: expected images of {height} x {width} = {height * width} pixels, got 12. "
    for draw in (
        lambda: plots.plot_images(images(), image_shape=shape),
        lambda: plots.plot_reconstructions(images(), {"A": images()}, image_shape=shape),
        lambda: plots.plot_loadings(images().T, image_shape=shape),
    ):
        with pytest.raises(ValueError, match=message + "Pass image_shape"):
            draw()
    assert plt.get_fignums() == []


def test_reconstructions_lie_below_the_images() -> None:
    x = images(3, 4)
    ax = plots.plot_reconstructions(x, {"A": x / 2, "B": x / 4})
    canvas = shown(ax)
    assert canvas.shape == (8, 8)
    for row, factor in enumerate([1, 2, 4]):
        tile = canvas[3 * row : 3 * row + 2, 3:5]
        assert np.array_equal(tile, (x[1] / factor).reshape(2, 2).numpy())
    assert [text.get_text() for text in ax.texts] == ["data", "A", "B"]
    for row, text in enumerate(ax.texts):  # Beside the rows.
        assert 3 * row - 0.5 <= text.get_position()[1] <= 3 * row + 1.5


@pytest.mark.parametrize("shape", [(2, 4), (3, 9)])
def test_reconstructions_of_other_rows(shape: tuple[int, int]) -> None:
    message = r"plot_reconstructions: expected 'A' of the shape of the images, \(3, 4\), got \("
    with pytest.raises(ValueError, match=message):
        plots.plot_reconstructions(images(3, 4), {"A": torch.zeros(shape)})


def test_loadings_are_columns_with_zero_in_the_middle() -> None:
    weight = torch.randn(6, 3)
    ax = plots.plot_loadings(weight, image_shape=(2, 3))
    canvas = shown(ax)
    assert canvas.shape == (2, 11)
    assert np.array_equal(canvas[:, 4:7], weight[:, 1].reshape(2, 3).numpy())
    largest = weight.abs().max().item()
    assert ax.images[0].get_clim() == (-largest, largest)
    assert shown(plots.plot_loadings(weight, 2, image_shape=(2, 3))).shape == (5, 7)


# Films.


@pytest.mark.parametrize("upright", [False, True])
def test_frames_of_a_film(tmp_path: Path, upright: bool) -> None:
    """Every pixel is a square of its own on the screen, black for 1 and white for 0."""
    x = (torch.rand(4, 5, 6) > 0.5).to(torch.float32).requires_grad_()
    path, zoom = tmp_path / "film.gif", 3
    given = x.reshape(4, 5, 2, 3) if upright else x
    shape = None if upright else (2, 3)
    plots.save_gif(given, path, 2, image_shape=shape, zoom=zoom, frames_per_second=25)
    assert plt.get_fignums() == []
    with Image.open(path) as film:
        assert film.n_frames == 4
        assert film.info["loop"] == 0  # For ever.
        assert film.info["duration"] == 40
        for index in range(4):
            film.seek(index)
            frame = np.asarray(film.convert("L"))
            assert frame.shape == (8 * zoom, 7 * zoom)  # 3 rows and 2 columns, and gaps.
            for number, image in enumerate(x[index].detach().reshape(5, 2, 3).numpy()):
                row, column = divmod(number, 2)
                tile = frame[zoom * 3 * row :, zoom * 4 * column :][: 2 * zoom, : 3 * zoom]
                expected = 255 * (1 - image.repeat(zoom, 0).repeat(zoom, 1))
                assert np.array_equal(tile, expected)


def test_limits_of_a_film_are_those_of_all_frames(tmp_path: Path) -> None:
    x = torch.tensor([-2.0, 0.0, 2.0]).reshape(3, 1, 1)
    plots.save_gif(x, tmp_path / "film.gif", 1, limits=None)
    with Image.open(tmp_path / "film.gif") as film:
        greys = []
        for index in range(3):
            film.seek(index)
            greys.append(int(np.asarray(film.convert("L")).mean()))
    assert greys[0] == 255
    assert 100 < greys[1] < 155
    assert greys[2] == 0


@pytest.mark.parametrize("shape", [(5, 9), (0, 5, 9), (9,)])
def test_a_film_has_frames_of_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"save_gif: expected images \(num_frames, N, pixels\), g"):
        plots.save_gif(torch.zeros(shape), tmp_path / "film.gif")
    with pytest.raises(ValueError, match="plots: expected images of 3 x 3 = 9 pixels, got 12"):
        plots.save_gif(torch.zeros(2, 5, 12), tmp_path / "film.gif")
    assert plt.get_fignums() == []
    assert not list(tmp_path.iterdir())


def test_numbers_of_a_film(tmp_path: Path) -> None:
    film = torch.rand(2, 3, 4)
    for name in ("zoom", "frames_per_second"):
        with pytest.raises(ValueError, match=f"save_gif: expected {name} >= 1, got 0"):
            plots.save_gif(film, tmp_path / "film.gif", **{name: 0})
    with pytest.raises(ValueError, match="plots: expected num_columns >= 1, got 0"):
        plots.save_gif(film, tmp_path / "film.gif", 0)
    with pytest.raises(ValueError, match="plots: expected num_columns >= 1, got 0"):
        plots.plot_images(film[0], 0)
    assert plt.get_fignums() == []


def test_a_film_that_cannot_be_written_leaves_no_figure_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plots.save_gif(torch.rand(2, 3, 4), tmp_path / "nowhere" / "film.gif")
    assert plt.get_fignums() == []


# Codes.


def test_codes_are_coloured_by_class() -> None:
    codes, labels = torch.randn(30, 3), torch.arange(30) % 3 * 2
    ax = plots.plot_codes(codes, labels)
    assert legend(ax) == ["0", "2", "4"]
    assert len(ax.collections) == 3
    for label, points in zip([0, 2, 4], ax.collections, strict=True):
        assert np.array_equal(points.get_offsets(), codes[labels == label, :2].numpy())
    assert len({tuple(points.get_facecolor()[0]) for points in ax.collections}) == 3
    assert ax.get_xlabel() == "code 1"
    assert ax.get_ylabel() == "code 2"


def test_more_than_ten_classes_have_their_own_colours() -> None:
    ax = plots.plot_codes(torch.randn(40, 2, requires_grad=True), torch.arange(40) % 20)
    assert len({tuple(points.get_facecolor()[0]) for points in ax.collections}) == 20


@pytest.mark.parametrize(("codes", "labels"), [((4, 1), (4,)), ((4,), (4,)), ((4, 2), (3,))])
def test_codes_of_another_shape(codes: tuple[int, ...], labels: tuple[int, ...]) -> None:
    message = r"plot_codes: expected codes \(N, 2\) and labels \(N,\), got \(4,.* and \([34],\)"
    with pytest.raises(ValueError, match=message):
        plots.plot_codes(torch.zeros(codes), torch.zeros(labels))
    assert plt.get_fignums() == []


def test_gap_shades_what_lies_between() -> None:
    x, exact, elbo = (
        torch.arange(3.0),
        torch.tensor([-2.0, -1.0, 0.0]),
        torch.tensor([-2.5, -4, -1]),
    )
    ax = plots.plot_gap(x, exact, elbo.requires_grad_())
    above, below = (torch.as_tensor(line.get_ydata()) for line in ax.lines)
    assert torch.equal(above, exact)
    assert torch.equal(below, elbo.detach())
    assert {text.get_text(): text.xy for text in ax.texts} == {"log p(x)": (1, -1), "ELBO": (1, -4)}
    (area,) = ax.collections
    box = area.get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (-4, 0)


def test_jensen_levels_and_bars() -> None:
    # Two weights, 1 and 3, of probabilities 3/4 and 1/4: the mean is 3/2.
    log_w, p = torch.tensor([1.0, 3.0]).log(), torch.tensor([0.75, 0.25])
    ax = plots.plot_jensen(log_w + 100, p)
    gap = float(torch.tensor(1.5).log() - 0.25 * log_w[1])
    levels = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert levels == pytest.approx([0, -gap])
    assert f"KL = {gap:.2f}" in [text.get_text() for text in ax.texts]
    (bars,) = ax.patches
    heights, edges, low = bars.get_data()
    tall = {float(edges[i]): heights[i] - low for i in np.flatnonzero(heights > low)}
    assert list(tall) == pytest.approx([1 / 1.5, 3 / 1.5], abs=0.05)
    first, second = tall.values()
    assert first == pytest.approx(3 * second)
    assert ax.get_xlim()[1] > 2  # All weights are in the picture.


def test_jensen_draws_count_alike() -> None:
    log_w = torch.randn(20)
    first, second = plots.plot_jensen(log_w), plots.plot_jensen(log_w, torch.full((20,), 0.05))
    for one, other in zip(first.lines, second.lines, strict=True):
        assert np.allclose(one.get_ydata(), other.get_ydata())


@pytest.mark.parametrize(
    ("log_w", "p"),
    [
        (torch.zeros(3, 2), None),
        (torch.zeros(3), torch.ones(2)),
        (torch.tensor([-torch.inf]), None),
    ],
)
def test_jensen_refuses(log_w: torch.Tensor, p: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"plot_jensen: expected finite log-weights .* one datum"):
        plots.plot_jensen(log_w, p)
