"""Where the time of one step of ``CompiledSVI`` goes."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from pyro_vae import CompiledSVI, compiled_svi
from svi_step_parts.contestants import FLOOR
from svi_step_parts.programs import NUM_BATCHES, Program

__all__ = ["profile"]


def profile(
    svi: CompiledSVI, program: Program, products: Callable[[], None], num_steps: int
) -> dict[str, float]:
    """Medians over steps, in seconds, of the parts and the whole of a step.

    Args:
        svi: One that has taken steps of the program.
        program: The program.
        products: The matrix products of a step; they take turns with the steps.
        num_steps: How many steps to take. Those that are compared with Pyro do not count.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            spent[part] += time.perf_counter() - start
            return result

        return run

    [graph] = svi.graphs
    watched: dict[tuple[Any, str], str] = {
        (graph, "_compiled"): "graph",
        (graph, "changed_place"): "guards: what the program reads",
        (compiled_svi, "form_of"): "guards: form of the arguments",
        (svi, "_update"): "update of the parameters",
    }
    before = {key: getattr(*key) for key in watched}
    for (owner, name), part in watched.items():
        setattr(owner, name, timed(part, before[owner, name]))
    try:
        for batch in (program.batches() * (num_steps // NUM_BATCHES + 1))[:num_steps]:
            spent.clear()
            last_check, start = graph.last_check, time.perf_counter()
            svi.step(*batch)
            whole = time.perf_counter() - start
            start = time.perf_counter()
            products()
            seconds[FLOOR].append(time.perf_counter() - start)
            if graph.last_check == last_check:
                for part, value in spent.items():
                    seconds[part].append(value)
                seconds["the rest"].append(whole - sum(spent.values()))
                seconds["a step"].append(whole)
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)
    order = [*dict.fromkeys(watched.values()), "the rest", "a step", FLOOR]
    return {part: statistics.median(seconds[part]) for part in order}
