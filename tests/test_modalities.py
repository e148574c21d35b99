"""What a batch of several modalities says, and the messages about what it cannot mean."""

from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from pyro_vae import likelihoods
from pyro_vae.guides import AmortizedSet, MixtureOfExperts, MixtureOfProducts, ProductOfExperts
from pyro_vae.modalities import modules_by_name, observed_of
from pyro_vae.models import MultimodalVAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

NAMES = ("image", "sound")
WIDTHS = {"image": 4, "sound": 3}


def data(num_rows: int = 5) -> dict[str, torch.Tensor]:
    return {name: torch.randn(num_rows, width) for name, width in WIDTHS.items()}


def nets(out: int = 4) -> dict[str, nn.Module]:
    return {name: MLP(width, [], out) for name, width in WIDTHS.items()}


PROGRAMS: dict[str, Callable[[], Any]] = {
    "MultimodalVAE": lambda: MultimodalVAE(
        {name: MLP(2, [], width) for name, width in WIDTHS.items()},
        {name: likelihoods.Normal() for name in WIDTHS},
        StandardNormalPrior(2),
    ),
    "ProductOfExperts": lambda: ProductOfExperts(nets(), 2),
    "MixtureOfExperts": lambda: MixtureOfExperts(nets(), 2),
    "MixtureOfProducts": lambda: MixtureOfProducts(nets(), 2),
    "AmortizedSet": lambda: AmortizedSet(nets(6), 2, MLP(6, [], 4)),
}


def test_what_a_complete_batch_says() -> None:
    batch = data()
    seen = observed_of("here", NAMES, batch)
    assert seen.num_rows == 5
    assert list(seen.values) == list(NAMES)
    assert all(seen.values[name] is batch[name] for name in NAMES)
    assert seen.masks == {"image": None, "sound": None}
    assert seen.unknown == ()
    assert seen.device == batch["image"].device
    for name in NAMES:
        assert seen.filled(name) is batch[name]
        assert seen.mask(name).tolist() == [True] * 5


def test_the_order_is_that_of_the_program() -> None:
    batch = data()
    mask = torch.arange(5) < 2
    for given in (batch, OrderedDict(reversed(batch.items())), MappingProxyType(batch)):
        seen = observed_of("here", NAMES, given, {"sound": mask})
        assert list(seen.values) == ["image", "sound"]
        assert seen.masks["sound"] is mask


def test_missing_keys_and_none() -> None:
    batch = data()
    left_out = observed_of("here", NAMES, {"sound": batch["sound"]})
    assert list(left_out.values) == ["sound"]
    assert left_out.unknown == ()
    drawn = observed_of("here", NAMES, {"image": None, "sound": batch["sound"]})
    assert list(drawn.values) == ["sound"]
    assert drawn.unknown == ("image",)
    nobody = torch.zeros(5, dtype=torch.bool)
    with_mask = observed_of("here", NAMES, {**batch, "image": None}, {"image": nobody})
    assert with_mask.unknown == ("image",)
    assert list(with_mask.masks) == ["sound"]


def test_rows_are_counted_by_masks_where_there_are_no_data() -> None:
    nobody = torch.zeros(7, dtype=torch.bool)
    for batch in ({}, {"image": None}):
        seen = observed_of("here", NAMES, batch, {"image": nobody})
        assert seen.num_rows == 7
        assert seen.values == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("event", [(), (3,), (1, 2, 2)])
def test_what_is_missing_is_filled_with_zeros(dtype: torch.dtype, event: tuple[int, ...]) -> None:
    value = torch.ones(4, *event).to(dtype)
    if dtype.is_floating_point:
        value[2] = torch.nan
    mask = torch.tensor([True, False, False, True])
    kept = value.clone(), mask.clone()
    filled = observed_of("here", ["m"], {"m": value}, {"m": mask}).filled("m")
    assert filled.dtype == dtype
    assert filled.shape == value.shape
    assert (filled[mask] == 1).all()
    assert (filled[~mask] == 0).all()
    torch.testing.assert_close((value, mask), kept, equal_nan=True)


# Bad calls, of every program alike.


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Any:
    return PROGRAMS[request.param]()


def where(program: Any) -> str:
    return type(program).__name__


def test_a_batch_that_is_no_mapping(program: Any) -> None:
    for batch in (torch.zeros(5, 4), [torch.zeros(5, 4)], None):
        with pytest.raises(TypeError, match=f"{where(program)}: expected batch to be a mapping fr"):
            program(batch)
    with pytest.raises(TypeError, match=f"{where(program)}: expected present to be a mapping from"):
        program(data(), torch.ones(5, dtype=torch.bool))


def test_an_unknown_modality(program: Any) -> None:
    match = rf"{where(program)}: expected modalities among \['image', 'sound'\] in "
    with pytest.raises(ValueError, match=match + "batch, got 'text'. Use the names"):
        program({**data(), "text": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match=match + "batch, got 'text'"):
        program({**data(), "text": None})
    with pytest.raises(ValueError, match=match + "batch, got 3"):
        program({**data(), 3: None})
    with pytest.raises(ValueError, match=match + "present, got 'x_image'"):
        program(data(), {"x_image": torch.ones(5, dtype=torch.bool)})


def test_numbers_of_rows_that_differ(program: Any) -> None:
    batch = {"image": data(5)["image"], "sound": data(4)["sound"]}
    with pytest.raises(
        ValueError, match=r"same number of rows everywhere, got 5 in batch\['image'"
    ):
        program(batch)
    with pytest.raises(ValueError, match=r"5 in batch\['image'\] and 1 in present\['image'\]"):
        program(data(5), {"image": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"5 in batch\['sound'\] and 3 in present\['image'\]"):
        program({"sound": data(5)["sound"]}, {"image": torch.zeros(3, dtype=torch.bool)})


@pytest.mark.parametrize("shape", [(), (5, 1), (5, 4), (0,)])
def test_a_mask_of_another_shape(program: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected present\['sound'\] of shape \(batch,\) with"):
        program(data(), {"sound": torch.ones(shape, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(5, dtype=torch.float32), "torch.float32"),
        (torch.ones(5, dtype=torch.int64), "torch.int64"),
        ([True] * 5, "list"),
        (True, "bool"),
        (None, "NoneType"),
    ],
)
def test_a_mask_that_is_not_bool(program: Any, mask: Any, got: str) -> None:
    match = rf"{where(program)}: expected present\['sound'\] to be a bool tensor .* got {got}"
    with pytest.raises(TypeError, match=match):
        program(data(), {"sound": mask})


@pytest.mark.parametrize("how", ["no key", "None"])
def test_a_mask_that_is_true_for_what_is_not_given(program: Any, how: str) -> None:
    batch = {"image": data()["image"], **({"sound": None} if how == "None" else {})}
    match = r"expected data of modality 'sound', which present\['sound'\] says is observed"
    with pytest.raises(ValueError, match=match):
        program(batch, {"sound": torch.arange(5) == 3})
    program(batch, {"sound": torch.zeros(5, dtype=torch.bool)})


def test_nothing_at_all(program: Any) -> None:
    for batch in ({}, {"image": None}, {"image": None, "sound": None}):
        with pytest.raises(ValueError, match=f"{where(program)}: expected data of at least one"):
            program(batch)
    program({}, {"image": torch.zeros(5, dtype=torch.bool)})  # As the message says.


def test_no_rows(program: Any) -> None:
    with pytest.raises(ValueError, match=r"expected at least one row in batch\['image'\], got an"):
        program(data(0))


def test_data_that_are_no_batch(program: Any) -> None:
    with pytest.raises(TypeError, match=r"expected batch\['image'\] to be a tensor .* got list"):
        program({**data(), "image": [[0.0] * 4] * 5})
    with pytest.raises(ValueError, match=r"expected batch\['image'\] of shape .* got \(\)"):
        program({**data(), "image": torch.tensor(0.0)})


# Names.


@pytest.mark.parametrize("name", ["a.b", "keys", "items", "forward", ""])
def test_names_that_torch_refuses(name: str) -> None:
    with pytest.raises(ValueError, match="here: expected names of modalities that can be names of"):
        modules_by_name("here", "networks", {name: MLP(1, [], 2)})


@pytest.mark.parametrize("name", [3, None])
def test_names_that_are_no_strings(name: Any) -> None:
    with pytest.raises(ValueError, match="here: expected names of modalities that can be names of"):
        modules_by_name("here", "networks", {name: MLP(1, [], 2)})


def test_modules_that_are_none() -> None:
    with pytest.raises(
        ValueError, match="here: expected networks by modality, at least one, got n"
    ):
        modules_by_name("here", "networks", {})
    with pytest.raises(ValueError, match="at least one, got list. Write {'image': network"):
        modules_by_name("here", "networks", [MLP(1, [], 2)])  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="expected a module for modality 'image' in decoders, got f"
    ):
        modules_by_name("here", "decoders", {"image": lambda z: z})  # type: ignore[dict-item]


def test_names_as_people_write_them() -> None:
    made = modules_by_name("here", "networks", {"a b": MLP(1, [], 2), "ECG-1": MLP(1, [], 2)})
    assert list(made) == ["a b", "ECG-1"]
