"""Those who take the steps: each returns the seconds of one step, over a number of them."""

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import pyro
import torch
from pyro.infer import ELBO, SVI

from pyro_vae import CompiledSVI
from svi_step_parts.by_hand import ByHand
from svi_step_parts.products import products_of
from svi_step_parts.programs import NUM_BATCHES, Program

__all__ = [
    "COMPILED",
    "EPOCH",
    "FLOOR",
    "NAMES",
    "STOCK",
    "Contestant",
    "Numpyro",
    "compiled_svi",
    "contestants",
    "floor",
]

Contestant = Callable[[int], float]
"""From a number of steps to the seconds of one."""

STOCK, FLOOR = "pyro.infer.SVI", "matrix products alone"
COMPILED, EPOCH = "CompiledSVI.step", "CompiledSVI.epoch"
NAMES = [
    STOCK,
    "SVI, validation off",
    "SVI, JitTrace_ELBO",
    "PyTorch by hand",
    "by hand, torch.compile",
    "numpyro, jitted step",
    "numpyro, fori_loop",
    COMPILED,
    EPOCH,
    FLOOR,
]


class Numpyro:
    """A process that takes numpyro's steps.

    Args:
        python: The interpreter that has numpyro.
        num_threads: How many cores it may use.

    Attributes:
        version: What it runs; empty if it has no numpyro.
    """

    def __init__(self, python: str, num_threads: int) -> None:
        script = Path(__file__).with_name("numpyro_steps.py")
        self._process = subprocess.Popen(
            [python, str(script), str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._read()

    def contestant(self, name: str, program: Program, kind: str) -> Contestant:
        """Steps of a program, one by one or in a loop."""

        def run(num_steps: int) -> float:
            request = {"name": name, "kind": kind, "num_steps": num_steps, "sizes": program.sizes}
            request |= {"batch_size": program.batch_size, "num_batches": NUM_BATCHES}
            assert self._process.stdin is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._read()
            if not answer:
                raise RuntimeError(f"numpyro: no answer to {request}; its message is above")
            return float(answer)

        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # It ends with its input.

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def contestants(
    name: str, program: Program, numpyro: Numpyro, backend: str
) -> tuple[dict[str, Contestant], CompiledSVI]:
    """All that can take the steps of a program, by name and in order, and ours once more.

    Args:
        name: That of the program.
        program: What to step.
        numpyro: The process with numpyro.
        backend: Of ``torch.compile``; ``"eager"`` compiles nothing, here and in ours.
    """
    batches = program.batches()
    result = {
        STOCK: _steps(_stock(program, program.elbo()), batches),
        "SVI, validation off": _steps(
            _stock(program, program.elbo()), batches, lambda: pyro.validation_enabled(False)
        ),
    }
    if program.jit is not None:
        result["SVI, JitTrace_ELBO"] = _steps(_stock(program, program.jit()), batches)
    if program.by_hand is not None:
        result["PyTorch by hand"] = _steps(_step_by_hand(program.by_hand()), batches)
        loss, parameters = program.by_hand()
        fast = torch.compile(loss, backend=backend)
        result["by hand, torch.compile"] = _steps(_step_by_hand((fast, parameters)), batches)
    if numpyro.version and program.sizes is not None:
        result["numpyro, jitted step"] = numpyro.contestant(name, program, "step")
        result["numpyro, fori_loop"] = numpyro.contestant(name, program, "epoch")
    ours = compiled_svi(program, backend)
    result[COMPILED] = _steps(ours.step, batches)
    result[EPOCH] = lambda _: _epoch(ours, program)
    products = floor(program)
    result[FLOOR] = _steps(lambda *_: products(), batches)
    return result, ours


def floor(program: Program) -> Callable[[], None]:
    """The products of a step of Pyro."""
    return products_of(lambda: _stock(program, program.elbo())(*program.batches()[0]))


def compiled_svi(program: Program, backend: str) -> CompiledSVI:
    """Ours, which raises where a program cannot be captured."""
    mode: Any = "graph" if backend == "eager" else "inductor"
    optim, elbo = pyro.optim.Adam({"lr": 1e-3}), program.elbo()
    return CompiledSVI(*program.make(), optim, elbo, mode=mode, strict=True)


def _stock(program: Program, elbo: ELBO) -> Callable[..., object]:
    return SVI(*program.make(), pyro.optim.Adam({"lr": 1e-3}), elbo).step


def _step_by_hand(by_hand: ByHand) -> Callable[[torch.Tensor], float]:
    loss, parameters = by_hand
    optim = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step(x: torch.Tensor) -> float:
        optim.zero_grad()
        value = loss(x)
        value.backward()
        optim.step()
        return value.item()

    return step


def _steps(
    step: Callable[..., object],
    batches: list[tuple[Any, ...]],
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Contestant:
    def run(num_steps: int) -> float:
        with setting():
            start = time.perf_counter()
            for number in range(num_steps):
                step(*batches[number % NUM_BATCHES])
            return (time.perf_counter() - start) / num_steps

    return run


def _epoch(svi: CompiledSVI, program: Program) -> float:
    start = time.perf_counter()
    svi.epoch(*program.data, batch_size=program.batch_size)
    return (time.perf_counter() - start) / NUM_BATCHES
