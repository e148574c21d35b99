"""Names of the library's programs in Pyro's param store."""

from collections import Counter

import pyro
import pytest
import torch
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
