"""Linear classification of codes whose class content is known."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from pyro_vae.evaluation import LatentClassification, Rate, latent_classification

Batch = Mapping[str, torch.Tensor | None]
Masks = Mapping[str, torch.Tensor] | None


def sum_guide(batch: Batch, present: Masks) -> None:
    """Adds up what is given; the second modality counts little, a third latent nothing."""
    given = {name: x for name, x in batch.items() if x is not None}
    code = sum(x * (0.1 if name == "sound" else 1.0) for name, x in given.items())
    assert isinstance(code, torch.Tensor)
    with pyro.plate("things", len(code)):
        pyro.sample("code", dist.Normal(code, 3.0).to_event(1))


def real(num: int, num_classes: int = 3) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of the modalities the first knows the class, the second nothing, the third half of it."""
    y = torch.arange(num) % num_classes
    eye = torch.eye(num_classes)
    third = eye[y] * (torch.arange(num) % 2).unsqueeze(1)
    return {"photo": 9 * eye[y], "sound": torch.randn(num, num_classes), "text": 9 * third}, y


def test_what_each_subset_knows() -> None:
    batch, y = real(900)
    test_batch, test_y = real(600)
    result = latent_classification(sum_guide, batch, y, test_batch, test_y)
    keys = [
        ("photo",),
        ("sound",),
        ("text",),
        ("photo", "sound"),
        ("photo", "text"),
        ("sound", "text"),
        ("photo", "sound", "text"),
    ]
    assert list(result.accuracy) == list(result.majority) == list(result.num_train) == keys
    for given, rate in result.accuracy.items():
        assert rate.num_rows == 600
        assert result.num_train[given] == 900
        assert result.majority[given] == pytest.approx(1 / 3)
        p = rate.value
        assert rate.standard_error == pytest.approx((p * (1 - p) / 600) ** 0.5)
        if "photo" in given:
            assert p == 1
    chance = (1 / 3 * 2 / 3 / 600) ** 0.5
    assert abs(result.accuracy[("sound",)].value - 1 / 3) < 5 * chance
    # Half of the rows show the class, the others one guess for all.
    assert result.accuracy[("text",)].value == pytest.approx(1 / 2 + 1 / 6)


def test_scikit_learn_by_hand() -> None:
    batch, y = real(200)
    del batch["photo"]
    batch["text"] = (batch["text"] / 5 + torch.randn(200, 3)) * torch.tensor([1, 0.01, 0.01])
    half = {n: x[:100] for n, x in batch.items()}, {n: x[100:] for n, x in batch.items()}
    result = latent_classification(sum_guide, half[0], y[:100], half[1], y[100:])
    scaler = StandardScaler().fit(half[0]["text"].numpy())
    model = LogisticRegression().fit(scaler.transform(half[0]["text"].numpy()), y[:100].numpy())
    expected = model.score(scaler.transform(half[1]["text"].numpy()), y[100:].numpy())
    assert 0.35 < expected < 0.9
    assert result.accuracy[("text",)].value == pytest.approx(expected)


def test_samples_carry_the_noise_of_the_guide() -> None:
    """Two classes 3 apart with noise of scale 3: half a scale on each side of the border."""
    y = torch.arange(4000) % 2
    x = torch.stack([3.0 * y, torch.zeros(4000)], -1)
    batch = {"photo": x, "sound": torch.zeros(4000, 2)}
    settings: dict[str, Any] = {"given": [("photo",)]}
    means = latent_classification(sum_guide, batch, y, batch, y, **settings)
    assert means.accuracy[("photo",)] == Rate(1.0, 0.0, 4000)
    drawn = latent_classification(sum_guide, batch, y, batch, y, sample=True, **settings)
    best = float(dist.Normal(0.0, 1.0).cdf(torch.tensor(0.5)))
    rate = drawn.accuracy[("photo",)]
    assert abs(rate.value - best) < 5 * rate.standard_error


def test_the_most_frequent_class_is_that_of_the_training_rows() -> None:
    batch, y = real(90)
    y = torch.cat([torch.zeros(60), torch.ones(30)]).long()
    test_batch, test_y = real(20)
    test_y = (torch.arange(20) < 15).long()
    result = latent_classification(sum_guide, batch, y, test_batch, test_y)
    assert set(result.majority.values()) == {0.25}


def test_missing_modalities() -> None:
    batch, y = real(90)
    test_batch, test_y = real(60)
    test_batch["photo"][:15] = torch.nan
    batch["sound"][50:] = torch.nan
    result = latent_classification(
        sum_guide,
        batch,
        y,
        test_batch,
        test_y,
        train_present={"sound": torch.arange(90) < 50},
        test_present={"photo": torch.arange(60) >= 15},
        given=[("photo",), ("sound",), ("sound", "photo")],
    )
    assert [rate.num_rows for rate in result.accuracy.values()] == [45, 60, 45]
    assert list(result.num_train.values()) == [90, 50, 50]
    assert result.accuracy[("photo",)].value == 1


def test_a_latent_among_several_and_one_without_a_mean() -> None:
    def guide(batch: Batch, present: Masks) -> None:
        x = next(x for x in batch.values() if x is not None)
        with pyro.plate("things", len(x)):
            pyro.sample("other", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            flow = dist.transforms.AffineTransform(0.0, 2.0)
            base = dist.Normal(x, 0.01)
            pyro.sample("code", dist.TransformedDistribution(base, flow).to_event(1))

    batch, y = real(60)
    settings: dict[str, Any] = {"given": [("photo",)]}
    result = latent_classification(guide, batch, y, batch, y, site="code", **settings)
    assert result.accuracy[("photo",)].value == 1
    with pytest.raises(ValueError, match=r"expected site to be one of \['other', 'code'\]"):
        latent_classification(guide, batch, y, batch, y, **settings)


def test_no_side_effects() -> None:
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

    def guide(batch: Batch, present: Masks) -> None:
        net = pyro.module("encoder", encoder)
        x = next(x for x in batch.values() if x is not None)
        with pyro.plate("things", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    batch, y = real(30)
    before = {name: x.clone() for name, x in batch.items()}
    results = [latent_classification(guide, batch, y, batch, y) for _ in range(2)]
    assert results[0] == results[1]  # Dropout is off, and nothing is drawn.
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert all(m.training for m in encoder.modules())
    assert all(p.grad is None for p in encoder.parameters())
    assert not list(pyro.get_param_store())


def test_the_table() -> None:
    result = LatentClassification(
        {("a",): Rate(0.5, 0.05, 100), ("a", "b"): Rate(1.0, 0.0, 9)},
        {("a",): 0.25, ("a", "b"): 0.5},
        {("a",): 10, ("a", "b"): 10},
    )
    assert str(result).splitlines() == [
        "given  right   s.e.  rows  majority",
        "a      0.500  0.050   100     0.250",
        "a, b   1.000  0.000     9     0.500",
    ]


# Errors.

OTHER = {"a": torch.ones(30, 1), "b": torch.ones(30, 1)}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "the same modalities in both", {"test_batch": OTHER}),
        (ValueError, r"labels of shape \(30,\), got \(29,\)", {"test_labels": torch.arange(29)}),
        (
            ValueError,
            r"two classes .* got 1 classes and 30 test rows",
            {"train_labels": torch.ones(30).long()},
        ),
        (
            ValueError,
            r"test rows that have all of \('photo',\), got 3 classes and 0 test rows",
            {"test_present": {"photo": torch.zeros(30, dtype=torch.bool)}},
        ),
        (ValueError, r"subsets of 1 to 3", {"given": [()]}),
        (ValueError, r"at least two modalities", {"train_batch": {"a": OTHER["a"]}}),
    ],
)
def test_arguments(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    batch, y = real(30)
    settings = {"train_batch": batch, "train_labels": y, "test_batch": batch, "test_labels": y}
    with pytest.raises(error, match=r"latent_classification: expected .*" + message):
        latent_classification(sum_guide, **(settings | changes))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: dist.Categorical(logits=x), "a continuous latent, got a discrete one"),
        (
            lambda x: dist.Normal(x.log(), 1.0).to_event(1),
            r"finite codes given .*'photo',\), got 30",
        ),
        (lambda x: dist.Normal(x.T, 1.0), r"one code for each of 30 rows, got .* \(3, 30\)"),
    ],
)
def test_codes(fn: Any, message: str) -> None:
    def guide(batch: Batch, present: Masks) -> None:
        x = next(x for x in batch.values() if x is not None)
        with pyro.plate("things", len(x)), pyro.validation_enabled(False):
            pyro.sample("z", fn(x))

    batch, y = real(30)
    with pytest.raises(ValueError, match="latent_classification: expected " + message):
        latent_classification(guide, batch, y, batch, y)
