"""Coherence of programs whose answer is known: exact copies, chance, shuffled classes, noise."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.evaluation import Coherence, Rate, coherence
from pyro_vae.evaluation.labelled import subsets_of
from pyro_vae.guides import MixtureOfExperts, ProductOfExperts
from pyro_vae.latents import generate
from pyro_vae.likelihoods import Categorical, Normal
from pyro_vae.models import MultimodalVAE
from pyro_vae.priors import StandardNormalPrior

NUM_CLASSES = 4
NAMES = ("photo", "sound", "tag")
SITES = {"photo": "photo pixels", "sound": "waves", "tag": "x_tag"}

Batch = Mapping[str, torch.Tensor | None]
Masks = Mapping[str, torch.Tensor] | None


def num_rows(batch: Batch) -> int:
    return next(len(x) for x in batch.values() if x is not None)


def class_model(
    permuted: int = 0, shared: bool = True, weights: torch.Tensor | None = None
) -> Callable[..., Any]:
    """The latent is the class, and three decoders show it without an error.

    Args:
        permuted: By how many classes the sound is off.
        shared: Whether the modalities see the latent, or a class of their own each.
        weights: Of the classes in the prior.
    """
    p = torch.ones(NUM_CLASSES) if weights is None else weights

    def model(batch: Batch, present: Masks) -> None:
        with pyro.plate("things", num_rows(batch)):
            code = pyro.sample("class", dist.Categorical(p))

            def seen(name: str) -> torch.Tensor:
                if shared:
                    return code
                return pyro.sample(f"own {name}", dist.Categorical(p))

            eye = torch.eye(NUM_CLASSES)
            if "photo" in batch:
                fn = dist.Normal(eye[seen("photo")], 0.1).to_event(1)
                observe("photo pixels", fn, "photo", batch, present)
            if "sound" in batch:
                moved = (seen("sound") + permuted) % NUM_CLASSES
                fn = dist.Normal(10.0 * moved, 0.1)
                observe("waves", fn, "sound", batch, present)
            if "tag" in batch:
                fn = dist.Categorical(logits=50 * eye[seen("tag")])
                observe("x_tag", fn, "tag", batch, present)

    return model


def observe(site: str, fn: Any, name: str, batch: Batch, present: Masks) -> None:
    x = batch[name]
    mask = False if x is None else (present or {}).get(name, True)
    with pyro.poutine.mask(mask=mask):
        if isinstance(mask, torch.Tensor) and x is not None and x.is_floating_point():
            x = x.where(mask.reshape(-1, *(1,) * (x.dim() - 1)), 0.0)
        pyro.sample(site, fn, obs=x)


def class_of(batch: Batch, present: Masks) -> torch.Tensor:
    """What the first modality says."""
    name, x = next((n, x) for n, x in batch.items() if x is not None)
    return (
        CLASSIFIERS[name](x).reshape(len(x), -1).argmax(1)
        if name == "photo"
        else (CLASSIFIERS[name](x))
    )


def class_guide(flip: float = 0.0) -> Callable[..., Any]:
    """The right class, or with probability ``flip`` one of the others."""

    def guide(batch: Batch, present: Masks) -> None:
        eye = torch.eye(NUM_CLASSES)[class_of(batch, present)]
        probs = eye * (1 - flip) + (1 - eye) * flip / (NUM_CLASSES - 1)
        with pyro.plate("things", num_rows(batch)):
            pyro.sample("class", dist.Categorical(probs))

    return guide


CLASSIFIERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "photo": lambda x: x,  # Logits.
    "sound": lambda x: (x / 10).round().long(),
    "tag": lambda y: y,
}


def real(num: int = 200) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    y = torch.randint(NUM_CLASSES, (num,))
    return {"photo": torch.eye(NUM_CLASSES)[y], "sound": 10.0 * y, "tag": y}, y


def judged(model: Any, guide: Any, batch: Any, y: torch.Tensor, **settings: Any) -> Coherence:
    settings = {"sites": SITES, **settings}
    return coherence(model, guide, batch, y, CLASSIFIERS, **settings)


def near(rate: Rate, expected: float) -> bool:
    error = (expected * (1 - expected) / rate.num_rows) ** 0.5
    return abs(rate.value - expected) < 5 * error


# Known answers.


def test_a_shared_class_is_coherent() -> None:
    result = judged(class_model(), class_guide(), *real())
    assert result.accuracy == {name: Rate(1.0, 0.0, 200) for name in NAMES}
    assert result.joint == Rate(1.0, 0.0, 200)
    singles, pairs = [(n,) for n in NAMES], [(a, b) for a in NAMES for b in NAMES if a < b]
    keys = [(s, t) for s in (*singles, *pairs) for t in NAMES if t not in s]
    assert list(result.cross) == keys
    assert set(result.cross.values()) == {Rate(1.0, 0.0, 200)}


def test_modalities_that_share_nothing_agree_by_chance() -> None:
    y = torch.arange(4000) % NUM_CLASSES
    batch = {"photo": torch.eye(NUM_CLASSES)[y], "sound": 10.0 * y, "tag": y}
    result = judged(class_model(shared=False), class_guide(), batch, y)
    assert result.joint is not None
    assert near(result.joint, NUM_CLASSES ** (1 - 3))
    for rate in result.cross.values():
        assert near(rate, 1 / NUM_CLASSES)
    weights = torch.tensor([0.7, 0.1, 0.1, 0.1])
    result = judged(class_model(shared=False, weights=weights), class_guide(), batch, y)
    assert result.joint is not None
    assert near(result.joint, float((weights**3).sum()))
    assert all(near(rate, 1 / NUM_CLASSES) for rate in result.cross.values())


def test_a_shuffled_modality_is_never_right() -> None:
    batch, y = real()
    batch["sound"] = 10.0 * ((y + 1) % NUM_CLASSES)  # So are the data: nothing to read there.
    result = judged(class_model(permuted=1), class_guide(), batch, y)
    assert result.accuracy["sound"].value == 0
    assert result.joint == Rate(0.0, 0.0, 200)
    for (given, target), rate in result.cross.items():
        wrong = (target == "sound") != (given[0] == "sound")
        assert rate.value == (0 if wrong else 1), (given, target)


@pytest.mark.parametrize("num_samples", [1, 20])
def test_a_guide_that_errs(num_samples: int) -> None:
    batch, y = real(1000)
    result = judged(class_model(), class_guide(0.3), batch, y, num_samples=num_samples)
    assert result.num_samples == num_samples
    assert result.joint == Rate(1.0, 0.0, 1000 * num_samples)
    for rate in result.cross.values():
        error = (0.7 * 0.3 / (1000 * num_samples)) ** 0.5
        assert abs(rate.value - 0.7) < 5 * error
        assert rate.num_rows == 1000
        # Here samples of a row are independent; the error is that of the rows' averages.
        assert rate.standard_error == pytest.approx(error, rel=0.1)
        if num_samples == 1:
            p = rate.value
            assert rate.standard_error == pytest.approx((p * (1 - p) / 1000) ** 0.5, rel=1e-12)


def test_codes_are_drawn_from_the_guide() -> None:
    """At their means every target would be right."""

    def model(batch: Batch, present: Masks) -> None:
        with pyro.plate("rows", num_rows(batch)):
            code = pyro.sample("code", dist.Normal(0.0, 1.0))
            for name, x in batch.items():
                pyro.sample(f"x_{name}", dist.Normal(code, 0.01), obs=x)

    def guide(batch: Batch, present: Masks) -> None:
        x = next(x for x in batch.values() if x is not None)
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.Normal(x, 2.0))

    y = torch.arange(2000) % 2
    batch = {"left": 2.0 * y - 1, "right": 2.0 * y - 1}
    classifiers = {name: lambda x: (x > 0).long() for name in batch}
    result = coherence(model, guide, batch, y, classifiers)
    expected = float(dist.Normal(0.0, 1.0).cdf(torch.tensor(0.5)))
    assert all(near(rate, expected) for rate in result.cross.values())


def test_samples_of_a_row_are_not_counted_as_rows() -> None:
    """Half of the rows are always right, the others never: more samples know no more."""
    batch, y = real(100)
    wrong = y.clone()
    wrong[:50] = (y[:50] + 1) % NUM_CLASSES
    result = judged(class_model(), class_guide(), batch, wrong, num_samples=9)
    assert set(result.cross.values()) == {Rate(0.5, 0.05, 100)}


def test_targets_of_one_subset_share_their_latents() -> None:
    """Errors of the guide strike all targets in the same rows."""
    seen: dict[str, torch.Tensor] = {}

    def spy(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def classify(x: torch.Tensor) -> torch.Tensor:
            seen[name] = CLASSIFIERS[name](x)
            return seen[name]

        return classify

    batch, y = real(500)
    classifiers = {name: spy(name) for name in ("sound", "tag")}
    result = coherence(
        class_model(), class_guide(0.5), batch, y, classifiers, sites=SITES, given=[("photo",)]
    )
    assert list(result.cross) == [(("photo",), "sound"), (("photo",), "tag")]
    assert torch.equal(seen["sound"], seen["tag"])
    assert 0.3 < result.cross[("photo",), "tag"].value < 0.7


def test_missing_modalities() -> None:
    batch, y = real(200)
    missing = torch.arange(200) < 60
    batch["photo"][missing] = torch.nan
    batch["tag"] = y.where(torch.arange(200) < 190, -1)
    present = {"photo": ~missing, "tag": torch.arange(200) < 190}
    result = judged(class_model(), class_guide(), batch, y, present=present)
    rows = {name: rate.num_rows for name, rate in result.accuracy.items()}
    assert rows == {"photo": 140, "sound": 200, "tag": 190}
    for (given, _), rate in result.cross.items():
        wanted = {"photo": 140, "sound": 200, "tag": 190, ("photo", "tag"): 130}
        assert rate.value == 1
        num = min(wanted[name] for name in given)
        assert rate.num_rows == wanted.get(given, num)
    assert result.joint == Rate(1.0, 0.0, 200)


def test_a_subset_that_is_nowhere_present() -> None:
    batch, y = real(20)
    batch["photo"][:] = torch.nan
    present = {"photo": torch.zeros(20, dtype=torch.bool)}
    result = judged(class_model(), class_guide(), batch, y, present=present)
    assert str(result.cross[("photo",), "tag"]) == str(Rate(torch.nan, torch.nan, 0))
    assert result.accuracy["photo"].num_rows == 0
    assert result.cross[("sound",), "tag"].value == 1


def test_a_modality_without_classifier_is_given_only() -> None:
    batch, y = real()
    classifiers = {"tag": CLASSIFIERS["tag"]}
    result = coherence(class_model(), class_guide(), batch, y, classifiers, sites=SITES)
    keys = [("photo",), ("sound",), ("photo", "sound")]
    assert list(result.cross) == [(given, "tag") for given in keys]
    assert result.joint is None
    assert "(prior)" not in str(result)


def test_one_row() -> None:
    batch, y = real(1)
    rate = judged(class_model(), class_guide(), batch, y).cross[("photo",), "tag"]
    assert (rate.value, rate.num_rows) == (1.0, 1)
    assert rate.standard_error != rate.standard_error  # One row says nothing of others.


def test_the_table() -> None:
    rates = Rate.of(torch.tensor([1.0, 0.0])), Rate(1.0, 0.0, 30)
    result = Coherence({"a": rates[0]}, rates[1], {(("a", "b"), "c"): rates[0]}, 1)
    assert str(result).splitlines() == [
        "given        target     right   s.e.  rows",
        "(real data)  a          0.500  0.354     2",
        "(prior)      all agree  1.000  0.000    30",
        "a, b         c          0.500  0.354     2",
    ]


# Programs in which one modality depends on the value of another.


def chain_model(batch: Batch, present: Masks) -> None:
    """The class is a modality itself, and the others are made of it."""
    with pyro.plate("things", num_rows(batch)):
        pyro.sample("style", dist.Normal(0.0, 1.0))
        tag = pyro.sample("x_tag", dist.Categorical(torch.ones(NUM_CLASSES)), obs=batch["tag"])
        fn = dist.Normal(torch.eye(NUM_CLASSES)[tag], 0.1).to_event(1)
        pyro.sample("x_photo", fn, obs=batch["photo"])
        if "sound" in batch:
            pyro.sample("x_sound", dist.Normal(10.0 * tag, 0.1), obs=batch["sound"])


def style_guide(batch: Batch, present: Masks) -> None:
    with pyro.plate("things", num_rows(batch)):
        pyro.sample("style", dist.Normal(0.0, 1.0))


def test_pictures_of_a_class() -> None:
    batch, y = real(100)
    subsets: Any = [("tag",), ("tag", "photo")]
    result = coherence(chain_model, style_guide, batch, y, CLASSIFIERS, given=subsets)
    assert result.joint == Rate(1.0, 0.0, 100)
    assert result.cross == {
        (("tag",), "photo"): Rate(1.0, 0.0, 100),
        (("tag",), "sound"): Rate(1.0, 0.0, 100),
        (("tag", "photo"), "sound"): Rate(1.0, 0.0, 100),
    }
    message = r"got 'x_tag', on whose value 'x_photo' depends, so that the model cannot draw 'tag' "
    with pytest.raises(ValueError, match=message):
        coherence(chain_model, style_guide, batch, y, CLASSIFIERS)


def test_joint_draws_are_no_draws_given_a_modality_without_classifier() -> None:
    batch = {"photo": torch.eye(NUM_CLASSES)[[0] * 50], "tag": torch.zeros(50).long()}
    batch["sound"] = torch.zeros(50)
    shown: list[torch.Tensor] = []

    def classify(x: torch.Tensor) -> torch.Tensor:
        shown.append(x.argmax(-1))
        return x

    classifiers = {"photo": classify, "sound": CLASSIFIERS["sound"]}
    settings: Any = {"given": [("tag",)]}
    result = coherence(chain_model, style_guide, batch, batch["tag"], classifiers, **settings)
    assert result.joint == Rate(1.0, 0.0, 50)
    assert [len(classes.unique()) for classes in shown] == [1, NUM_CLASSES, 1]


# The library's own programs.


@pytest.mark.parametrize("make", [ProductOfExperts, MixtureOfExperts])
def test_the_multimodal_vae(make: Any) -> None:
    """A code of two dimensions whose sign is the class, in both modalities and in the guide."""
    decoders = {"image": nn.Linear(2, 3), "label": nn.Linear(2, 2)}
    likelihoods = {"image": Normal(0.1), "label": Categorical(event_dim=0)}
    model = MultimodalVAE(decoders, likelihoods, StandardNormalPrior(2))
    networks = {"image": nn.Linear(3, 4), "label": nn.Embedding(2, 4)}
    guide = make(networks, 2)
    with torch.no_grad():
        for module in (*decoders.values(), networks["image"]):
            module.weight.zero_()
            module.bias.zero_()
        decoders["image"].weight[0, 0] = 1.0
        decoders["label"].weight[1, 0] = 1.0
        networks["image"].weight[0, 0] = 5.0
        networks["image"].bias[2:] = -5.0
        networks["label"].weight.copy_(torch.tensor([[-5.0, 0, -5, -5], [5.0, 0, -5, -5]]))
    y = torch.arange(200) % 2
    batch = {"image": (2.0 * y - 1).unsqueeze(1) * torch.ones(3), "label": y}
    batch["image"][:50] = torch.nan
    present = {"image": torch.arange(200) >= 50}
    classifiers = {"image": lambda x: (x[:, 0] > 0).long(), "label": lambda y: y}
    result = coherence(model, guide, batch, y, classifiers, present=present)
    assert result.accuracy == {"image": Rate(1.0, 0.0, 150), "label": Rate(1.0, 0.0, 200)}
    assert result.joint == Rate(1.0, 0.0, 200)
    assert result.cross == {
        (("image",), "label"): Rate(1.0, 0.0, 150),
        (("label",), "image"): Rate(1.0, 0.0, 200),
    }
    drawn = generate(model, batch, present, site=["x_image", "x_label"])
    assert 50 < int(drawn["x_label"].sum()) < 150


def test_random_numbers_outside_of_sites_are_no_dependence() -> None:
    def model(batch: Batch, present: Masks) -> None:
        with pyro.plate("things", num_rows(batch)):
            code = pyro.sample("class", dist.Categorical(torch.ones(NUM_CLASSES)))
            noise = 0.1 * torch.rand(len(code))
            for name in batch:
                pyro.sample(f"x_{name}", dist.Normal(code + noise, 0.01), obs=batch[name])

    def guide(batch: Batch, present: Masks) -> None:
        x = next(x for x in batch.values() if x is not None)
        with pyro.plate("things", len(x)):
            pyro.sample("class", dist.Delta(x.round()))

    y = torch.arange(12) % NUM_CLASSES
    batch = {"left": 1.0 * y, "right": 1.0 * y}
    classifiers = {name: lambda x: x.round().long() for name in batch}
    result = coherence(model, guide, batch, y, classifiers)
    assert {rate.value for rate in result.cross.values()} == {1.0}


# What is left as it was.


def test_no_side_effects() -> None:
    torch.manual_seed(1)
    decoder, encoder = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    judge = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 2))

    def model(batch: Batch, present: Masks) -> None:
        net = pyro.module("decoder", decoder)
        with pyro.plate("rows", num_rows(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for name, x in batch.items():
                pyro.sample(f"x_{name}", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(batch: Batch, present: Masks) -> None:
        net = pyro.module("encoder", encoder)
        x = next(x for x in batch.values() if x is not None)
        with pyro.plate("rows", len(x)):
            loc, scale = net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    batch = {"left": torch.randn(6, 3), "right": torch.randn(6, 3)}
    before = {name: x.clone() for name, x in batch.items()}
    present = {"left": torch.arange(6) < 4}
    y = torch.arange(6) % 2
    modes: list[tuple[bool, bool]] = []

    def classify(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = judge(x)
        modes.append((judge[0].training, logits.requires_grad))
        return logits

    coherence(model, guide, batch, y, {"left": classify, "right": judge}, present=present)
    assert list(batch) == ["left", "right"]
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert list(present) == ["left"]
    assert y.tolist() == [0, 1, 0, 1, 0, 1]
    assert set(modes) == {(False, False)}
    assert all(m.training for net in (decoder, encoder, judge) for m in net.modules())
    assert not list(pyro.get_param_store())
    assert all(p.grad is None for net in (decoder, encoder, judge) for p in net.parameters())


def test_float32() -> None:
    batch, y = real(20)
    batch = {n: x.float() if x.is_floating_point() else x for n, x in batch.items()}
    assert judged(class_model(), class_guide(), batch, y.int()).cross[("photo",), "tag"].value == 1


# Errors.


def refused(error: type[Exception], message: str, **changes: Any) -> None:
    batch, y = real(8)
    settings: dict[str, Any] = {"batch": batch, "labels": y, "classifiers": CLASSIFIERS}
    settings |= {"sites": SITES, **changes}
    with pytest.raises(error, match="coherence: expected " + message):
        coherence(class_model(), class_guide(), **settings)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, r"batch to be a mapping .*, got Tensor", {"batch": torch.zeros(3)}),
        (
            ValueError,
            r"at least two modalities in the batch, got \['a'\]",
            {"batch": {"a": torch.ones(8)}},
        ),
        (ValueError, r"real data .* None for 'a'", {"batch": {"a": None, "b": torch.ones(2)}}),
        (TypeError, r"labels to be a tensor of integers, got list", {"labels": [1] * 8}),
        (TypeError, r"labels .* integers, got torch.float32", {"labels": torch.ones(8)}),
        (
            ValueError,
            r"labels of shape \(8,\), got \(7,\)",
            {"labels": torch.arange(7)},
        ),
        (ValueError, r"classes 0, 1, ... as labels, got -1", {"labels": torch.arange(8) - 1}),
        (ValueError, r"names .* in classifiers, got 'smell'", {"classifiers": {"smell": len}}),
        (ValueError, r"a classifier for one modality", {"classifiers": {}}),
        (ValueError, r"names .* in sites, got 'smell'", {"sites": {"smell": "x"}}),
        (ValueError, r"a site 'x_photo' for modality 'photo', got .*waves", {"sites": None}),
        (ValueError, r"modalities among .* in present, got 'smell'", {"present": {"smell": None}}),
        (TypeError, r"present\['tag'\] .* torch.int64", {"present": {"tag": torch.arange(8)}}),
        (TypeError, r"present\['tag'\] .* got list", {"present": {"tag": [True] * 8}}),
        (
            ValueError,
            r"present\['tag'\] of shape \(batch,\) .* got \(8, 1\)",
            {"present": {"tag": torch.ones(8, 1, dtype=torch.bool)}},
        ),
        (TypeError, r"given to hold tuples of names, got str", {"given": ["photo"]}),
        (ValueError, r"names .* in given=\('smell',\)", {"given": [("smell",)]}),
        (ValueError, r"subsets of 1 to 2 different modalities, got \(\)", {"given": [()]}),
        (ValueError, r"subsets of 1 to 2 .*, got \('photo', 's", {"given": [NAMES]}),
        (ValueError, r"subsets of 1 to 2 .*'tag', 'tag'", {"given": [("tag", "tag")]}),
        (ValueError, r"num_samples >= 1, got 0", {"num_samples": 0}),
    ],
)
def test_arguments(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    refused(error, message, **changes)


@pytest.mark.parametrize(
    ("error", "message", "classifier"),
    [
        (TypeError, "a tensor of logits or of integers, got list", lambda x: x.tolist()),
        (TypeError, "a tensor of logits .* got torch.bool", lambda x: x > 0),
        (ValueError, r"classes of shape \(8,\), got \(8, 4\)", lambda x: x.long()),
        (ValueError, r"logits of shape \(8, classes\) .* got \(8,\) of", lambda x: x[:, 0]),
        (ValueError, r"logits .* at least 4 classes, .* got \(8, 3\)", lambda x: x[:, :3]),
        (ValueError, r"logits .* got \(4, 8\)", lambda x: x.T),
        (ValueError, r"logits, got NaN in 8 of 8 rows", lambda x: x * torch.nan),
    ],
)
def test_results_of_a_classifier(error: type[Exception], message: str, classifier: Any) -> None:
    refused(
        error,
        r"the classifier of 'photo' to return " + message,
        classifiers=CLASSIFIERS | {"photo": classifier},
        labels=torch.arange(8) % NUM_CLASSES,
    )


def test_many_modalities_need_a_choice() -> None:
    message = r"f: expected at most 4 modalities .* got 5 with 30 subsets. .*given=\[\('a',\)\]"
    with pytest.raises(ValueError, match=message):
        subsets_of("f", list("abcde"), None, proper=True)
    assert subsets_of("f", list("abcde"), [("b", "a")], proper=True) == [("b", "a")]
    assert len(subsets_of("f", list("abcd"), None, proper=True)) == 14
    assert len(subsets_of("f", list("abcd"), None, proper=False)) == 15
