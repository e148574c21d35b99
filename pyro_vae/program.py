"""The common root of the library's models and guides."""

from collections import Counter

from pyro.nn import PyroModule

__all__ = ["Program"]

_created: Counter[str] = Counter()


class Program(PyroModule):
    """A ``PyroModule`` whose parameters have names of their own in Pyro's param store.

    The param store is global and a root ``PyroModule`` has no name: of two models in one script
    that both have a ``decoder``, the second would silently never be trained. Here the first VAE
    is "VAE", the second "VAE_2" and so on, the same in every run of a script.

    Args:
        name: Name in the param store; by default the class name and a running number.
    """

    def __init__(self, name: str | None = None) -> None:
        if name is None:
            name = type(self).__name__
            _created[name] += 1
            if _created[name] > 1:
                name = f"{name}_{_created[name]}"
        super().__init__(name)
