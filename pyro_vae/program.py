"""The common root of the library's models and guides."""

from collections import Counter
from copy import deepcopy
from typing import Any, Self

from pyro.nn import PyroModule

__all__ = ["Program", "new_name"]

_created: Counter[str] = Counter()


class Program(PyroModule):
    """A ``PyroModule`` whose parameters have names of their own in Pyro's param store.

    The param store is global and a root ``PyroModule`` has no name: of two models in one script
    that both have a ``decoder``, the second would silently never be trained. Here the first VAE
    is "VAE", the second "VAE_2" and so on, the same in every run of a script; a copy counts as
    another one.

    Args:
        name: Name in the param store; by default the class name and a running number.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name or new_name(type(self).__name__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        for key, value in self.__dict__.items():
            copy.__dict__[key] = deepcopy(value, memo)
        old, parts = self._pyro_name, [m for m in copy.modules() if isinstance(m, PyroModule)]
        # One that is being copied around this one has no name yet.
        others = [
            m.__dict__.get("_pyro_name")
            for m in memo.values()
            if isinstance(m, PyroModule) and m is not copy
        ]
        is_part = any(name and old.startswith(f"{name}.") for name in others)
        has_sites = any(part._pyro_samples for part in parts)  # Their names are the parameters'.
        if not is_part and not has_sites:
            new = new_name(type(self).__name__)
            for part in parts:
                part._pyro_name = new + part._pyro_name.removeprefix(old)
        return copy


def new_name(class_name: str) -> str:
    """A name that no other program has: "VAE", then "VAE_2" and so on."""
    _created[class_name] += 1
    number = _created[class_name]
    return class_name if number == 1 else f"{class_name}_{number}"
