"""The same programs in numpyro, in a process of its own: no torch here, another Python may run it.

    python numpyro_steps.py THREADS

Prints the versions it has, or nothing if there is no numpyro. Reads requests from its input, one
JSON object a line, and answers with one line each: the seconds of a step.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Answers until the input ends."""
    if hasattr(os, "sched_setaffinity"):  # jax takes as many threads as it is given cores.
        cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]
        os.sched_setaffinity(0, cores)
    try:
        import jax
        import numpyro
    except ImportError:
        return  # Without an answer.
    print(f"numpyro {numpyro.__version__}, jax {jax.__version__}", flush=True)
    runs: dict[str, dict[str, Callable[[int], float]]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["name"]
        if name not in runs:
            runs = {name: _runs(request["sizes"], request["batch_size"], request["num_batches"])}
        print(runs[name][request["kind"]](request["num_steps"]), flush=True)


def _runs(
    sizes: dict[str, int], batch_size: int, num_batches: int
) -> dict[str, Callable[[int], float]]:
    """By kind, what takes a number of steps and returns the seconds of one."""
    import jax
    from jax import lax, random
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.optim import Adam

    make = _ppca if "data_dim" in sizes else _vae
    model, guide, data = make(num_rows=num_batches * batch_size, **sizes)
    batches = list(data.reshape(num_batches, batch_size, -1))
    svi = SVI(model, guide, Adam(1e-3), Trace_ELBO())
    state = {name: svi.init(random.PRNGKey(0), batches[0]) for name in ("step", "epoch")}
    update, seeds = jax.jit(svi.update), itertools.count()

    def steps(num_steps: int) -> float:
        at, start = state["step"], time.perf_counter()
        for number in range(num_steps):
            at, loss = update(at, batches[number % num_batches])
        jax.block_until_ready((at, loss))
        state["step"] = at
        return (time.perf_counter() - start) / num_steps

    def one_epoch(at: Any, key: Any, data: Any) -> Any:
        order = random.permutation(key, len(data)).reshape(num_batches, batch_size)

        def body(number: Any, carry: Any) -> Any:
            at, losses = carry
            at, loss = svi.update(at, data[order[number]])
            return at, losses.at[number].set(loss)

        return lax.fori_loop(0, num_batches, body, (at, jax.numpy.zeros(num_batches)))

    compiled = jax.jit(one_epoch)

    def epoch(num_steps: int) -> float:
        start = time.perf_counter()
        state["epoch"], losses = compiled(state["epoch"], random.PRNGKey(next(seeds)), data)
        jax.block_until_ready((state["epoch"], losses))
        return (time.perf_counter() - start) / num_batches

    return {"step": steps, "epoch": epoch}


def _layer(name: str, num_in: int, num_out: int, x: Any) -> Any:
    """A linear layer whose weights are parameters."""
    import jax.numpy as jnp
    import numpyro
    from jax import random

    key = random.PRNGKey(sum(map(ord, name)))
    start = random.uniform(key, (num_in, num_out), minval=-1, maxval=1) / num_in**0.5
    weight = numpyro.param(f"{name}_weight", start)
    return x @ weight + numpyro.param(f"{name}_bias", jnp.zeros(num_out))


def _normal(output: Any) -> Any:
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist

    loc, raw_scale = jnp.split(output, 2, -1)
    return dist.Normal(loc, jax.nn.softplus(raw_scale) + 1e-6).to_event(1)


def _vae(num_rows: int, num_pixels: int, hidden: int, latent_dim: int) -> tuple[Any, Any, Any]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax import random

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            standard = dist.Normal(jnp.zeros(latent_dim), jnp.ones(latent_dim)).to_event(1)
            z = numpyro.sample("z", standard)
            h = jax.nn.relu(_layer("decoder_1", latent_dim, hidden, z))
            logits = _layer("decoder_2", hidden, num_pixels, h)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            h = jax.nn.relu(_layer("encoder_1", num_pixels, hidden, x))
            output = _layer("encoder_2", hidden, 2 * latent_dim, h)
            numpyro.sample("z", _normal(output))

    uniform = random.uniform(random.PRNGKey(1), (num_rows, num_pixels))
    return model, guide, (uniform < 0.3).astype(jnp.float32)


def _ppca(num_rows: int, data_dim: int, latent_dim: int) -> tuple[Any, Any, Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax import random

    def model(x: Any) -> None:
        start = random.normal(random.PRNGKey(2), (data_dim, latent_dim)) / latent_dim**0.5
        weight, loc = numpyro.param("weight", start), numpyro.param("loc", jnp.zeros(data_dim))
        scale = jnp.exp(numpyro.param("log_scale", jnp.zeros(())))
        with numpyro.plate("data", len(x)):
            standard = dist.Normal(jnp.zeros(latent_dim), jnp.ones(latent_dim)).to_event(1)
            z = numpyro.sample("z", standard)
            numpyro.sample("x", dist.Normal(z @ weight.T + loc, scale).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", _normal(_layer("encoder", data_dim, 2 * latent_dim, x)))

    return model, guide, random.normal(random.PRNGKey(1), (num_rows, data_dim))


if __name__ == "__main__":
    main()
