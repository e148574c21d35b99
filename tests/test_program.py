"""Names of the library's programs in Pyro's param store."""

import copy
from collections import Counter

import pyro
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_vae.program
from pyro_vae.program import Program


class Made(Program):
    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self) -> torch.Tensor:
        return self.loc


class Other(Made):
    pass


@pytest.fixture(autouse=True)
def fresh_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_vae.program, "_created", Counter())


def store_names(*programs: Program) -> list[str]:
    for program in programs:
        program()
    return list(pyro.get_param_store())


def test_programs_of_a_class_are_numbered() -> None:
    names = store_names(Made(), Other(), Made(), Made())
    assert names == ["Made.loc", "Other.loc", "Made_2.loc", "Made_3.loc"]


def test_each_has_its_own_parameter() -> None:
    first, second = Made(), Made()
    store_names(first, second)
    stored = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert stored == {id(first.loc), id(second.loc)}


def test_a_name_of_ones_own_does_not_count() -> None:
    names = store_names(Made("mine"), Made())
    assert names == ["mine.loc", "Made.loc"]


def test_a_copy_has_a_name_of_its_own_and_trains_alone() -> None:
    first = Made()
    first()  # Its name is in the param store.
    second = copy.deepcopy(first)
    assert second._pyro_name == "Made_2"
    second()
    store = pyro.get_param_store()
    assert store["Made.loc"] is not store["Made_2.loc"]
    assert dict(store.named_parameters())["Made_2.loc"] is second.loc


def test_parts_of_a_copy_follow_its_name() -> None:
    class Whole(Program):
        def __init__(self) -> None:
            super().__init__()
            self.part = PyroModule()
            self.part.loc = nn.Parameter(torch.zeros(()))

        def forward(self) -> torch.Tensor:
            return self.part.loc

    whole = Whole()
    whole()
    copied = copy.deepcopy(whole)
    copied()
    assert set(pyro.get_param_store()) == {"Whole.part.loc", "Whole_2.part.loc"}
    assert copied.part is not whole.part
