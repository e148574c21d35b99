"""Speed of a training step: CompiledSVI beside Pyro, PyTorch by hand, numpyro and the limit.

    python benchmarks/svi_step.py --out results

A step is loss, gradient and update by Adam on one batch; 50 batches are in memory. All take turns
in one run: the ratios are what counts. ``pyro.infer.SVI`` checks values, as Pyro does unless told
otherwise, and so does ``CompiledSVI``; the others do not. By hand means a loss written for that
model alone, its KL in closed form, and torch's fused Adam; a dash stands where nobody would write
that. ``JitTrace_ELBO`` takes tensors alone. numpyro runs the same programs in a process of its
own, if its interpreter or that of ``--numpyro-python`` has the package, and need not return a loss
before the next step. ``CompiledSVI.epoch`` and numpyro's loop shuffle the data as well. The limit
is the matrix products and convolutions of stock Pyro's step alone, forward and backward. Takes
about three minutes on two cores.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from svi_step_parts.contestants import (
    COMPILED,
    EPOCH,
    FLOOR,
    NAMES,
    STOCK,
    Contestant,
    Numpyro,
    compiled_svi,
    contestants,
    floor,
)
from svi_step_parts.figure import draw
from svi_step_parts.profile import profile
from svi_step_parts.programs import NUM_BATCHES, programs

from pyro_vae import CaptureError

Times = dict[str, list[float]]


def measure(runs: dict[str, Contestant], num_repeats: int, block_seconds: float) -> Times:
    """Seconds of a step, by contestant and repeat; they take turns, in both orders."""
    num_steps = {}
    for name, run in runs.items():
        run(5)  # Parameters are born, graphs captured and compiled.
        seconds = min(run(5), run(5))
        num_steps[name] = min(NUM_BATCHES, max(3, round(block_seconds / seconds)))
    times: Times = {name: [] for name in runs}
    for repeat in range(num_repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            times[name].append(runs[name](num_steps[name]))
    return times


def rows_of(name: str, numpyro: Numpyro, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures one program; a row of the table for each contestant."""
    program = programs(tiny=args.smoke_test)[name]
    pyro.clear_param_store()
    runs, ours = contestants(name, program, numpyro, backend_of(args))
    start: dict[str, Any] = {}
    try:
        for batch in program.batches()[:3]:
            ours.step(*batch)
    except CaptureError as err:
        print(f"{name:14} not captured: {str(err).splitlines()[0]}", flush=True)
        del runs[COMPILED], runs[EPOCH]
    else:
        [graph] = ours.graphs
        start = {"capture s": graph.capture_seconds, "compile s": graph.compile_seconds}
        print(f"{name:14}{start['capture s']:10.1f}{start['compile s']:10.1f}", flush=True)
    times = measure(runs, args.repeats, args.block_seconds)
    stock, rows = statistics.median(times[STOCK]), []
    for contestant, values in times.items():
        row: dict[str, Any] = {"program": name, "title": program.title, "contestant": contestant}
        row |= {"ratio": stock / statistics.median(values), "ms min": 1e3 * min(values)}
        row |= {"ms median": 1e3 * statistics.median(values)}
        rows.append(row | (start if contestant in (COMPILED, EPOCH) else {}))
    return rows


def main(args: argparse.Namespace) -> pd.DataFrame:
    """Measures, prints and draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    with Numpyro(args.numpyro_python, args.threads) as numpyro:
        used = numpyro.version or "no numpyro"
        print(f"torch {torch.__version__}, {used}, {args.threads} threads\n")
        print(f"{'CompiledSVI':14}{'capture':>10}{'compile':>10}  seconds before the third step")
        if not args.smoke_test:
            print(f"{'compiler':24}{seconds_to_load_compiler():10.1f}  once in a process")
        table = pd.DataFrame([row for name in args.rows for row in rows_of(name, numpyro, args)])
    table.to_csv(args.out / "svi_step.csv", index=False)
    show(table)
    draw(table, args.out / "svi_step.png")
    print(f"\nThe table and the figure are in {args.out}/")
    if not numpyro.version:
        print("For numpyro: pip install 'pyro_vae[benchmark]', or --numpyro-python PATH")
    return table


def show(table: pd.DataFrame) -> None:
    """Prints ratios, then milliseconds, with a line for each contestant."""
    titles = table.drop_duplicates("program").set_index("program")["title"]
    table = table.assign(
        ratio=table["ratio"].map("{:.2f}".format),
        ms=table["ms min"].map("{:.2f}".format) + " /" + table["ms median"].map("{:6.2f}".format),
    )
    for what, title in (
        ("ratio", f"Times as fast as {STOCK}, by medians"),
        ("ms", "Milliseconds a step, smallest / median"),
    ):
        wide = table.pivot(index="contestant", columns="program", values=what)
        wide = wide.reindex(index=NAMES, columns=list(titles.index)).fillna("-")
        print(f"\n{title}\n{wide.rename_axis(index=None, columns=None).to_string()}")
    print()
    for name, title in titles.items():
        print(f"{name:14}{title}")


def show_profile(args: argparse.Namespace) -> None:
    """Prints where the time of a step of ``CompiledSVI`` goes."""
    program = programs(tiny=args.smoke_test)[args.profile]
    svi = compiled_svi(program, backend_of(args))
    for batch in program.batches():
        svi.step(*batch)
    parts = profile(svi, program, floor(program), num_steps=20 if args.smoke_test else 1000)
    whole, products = parts["a step"], parts[FLOOR]
    print(f"{program.title}, {args.threads} threads, medians")
    for part, seconds in parts.items():
        print(f"{part:38}{1e6 * seconds:10.1f} us{seconds / whole:8.0%}")
    above = whole - products
    print(f"{'above the matrix products':38}{1e6 * above:10.1f} us{above / whole:8.0%}")


def backend_of(args: argparse.Namespace) -> str:
    """What compiles."""
    return "eager" if args.smoke_test else "inductor"


def seconds_to_load_compiler() -> float:
    """What torch's compiler takes to compile next to nothing for the first time."""
    start = time.perf_counter()
    torch.compile(lambda x: x.sin() + 1)(torch.zeros(1000))
    return time.perf_counter() - start


if __name__ == "__main__":
    names = list(programs(tiny=True))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--block-seconds", type=float, default=0.1, help="between two turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--numpyro-python", default=sys.executable, help="with numpyro installed")
    parser.add_argument("--profile", choices=names, help="show the parts of a step of this row")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--smoke-test", action="store_true", help="tiny, uncompiled")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)  # JitTrace_ELBO uses it.
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.repeats, arguments.block_seconds = 2, 0.0
    # Compilers start from nothing: what they take is what a user waits for the first time.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        if arguments.profile:
            show_profile(arguments)
        else:
            captured = main(arguments).query("contestant == @COMPILED")["program"]
            if missing := set(arguments.rows) - set(captured):
                sys.exit(f"CompiledSVI could not capture {sorted(missing)}")
