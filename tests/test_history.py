"""The record of a training run."""

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from pyro_vae import History


def test_frame_without_validation() -> None:
    history = History()
    history.append(3.0, None, 0.1)
    history.append(2.0, None, 0.2)
    frame = history.to_frame()
    index = pd.RangeIndex(1, 3, name="epoch")
    expected = pd.DataFrame({"loss": [3.0, 2.0], "seconds": [0.1, 0.2]}, index=index)
    pd.testing.assert_frame_equal(frame, expected)


def test_frame_with_validation() -> None:
    history = History()
    history.append(3.0, 3.5, 0.1)
    frame = history.to_frame()
    assert list(frame.columns) == ["loss", "validation_loss", "seconds"]
    assert frame.loc[1].tolist() == [3.0, 3.5, 0.1]


def test_frame_of_nothing() -> None:
    frame = History(interrupted=True).to_frame()
    assert list(frame.columns) == ["loss", "seconds"]
    assert len(frame) == 0


def test_a_frame_is_a_copy() -> None:
    history = History(loss=[1.0], seconds=[0.1])
    frame = history.to_frame()
    frame.loc[1, "loss"] = 5.0
    assert history.loss == [1.0]


def test_histories_do_not_share_lists() -> None:
    first, second = History(), History()
    first.append(1.0, 2.0, 3.0)
    assert second == History(loss=[], validation_loss=[], seconds=[], interrupted=False)


@pytest.mark.parametrize(("label", "labels"), [("", ["training", "held out"]), ("A", ["A"])])
def test_plot(label: str, labels: list[str]) -> None:
    figure, ax = plt.subplots()
    history = History(loss=[3.0, 2.0], validation_loss=[4.0, 3.0])
    assert history.plot(ax, label) is ax
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3.0, 2.0], [4.0, 3.0]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == labels
    plt.close(figure)
