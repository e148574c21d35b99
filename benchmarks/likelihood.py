"""Speed of the importance-weighted log-likelihood: decodes a second, beside Pyro and the limit.

    python benchmarks/likelihood.py

A decode is one particle of one image through the decoder (50 latents, 400 hidden units, 784
pixels). The limit is the decoder's two matrix products alone. All rows are measured in turn in
one run; the ratios are what counts.
"""

import argparse
import time
from collections.abc import Callable

import torch
from pyro.infer import RenyiELBO

from pyro_vae import importance_weighted_log_likelihood
from pyro_vae.datasets import binarize
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

LATENT_DIM, HIDDEN, NUM_PIXELS = 50, 400, 784


def main(args: argparse.Namespace) -> None:
    """Measures all rows in turn and prints the best of each."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    prior = StandardNormalPrior(LATENT_DIM)
    vae = VAE(MLP(LATENT_DIM, [HIDDEN], NUM_PIXELS), Bernoulli(), prior).to(device)
    guide = AmortizedNormal(MLP(NUM_PIXELS, [HIDDEN], 2 * LATENT_DIM)).to(device)
    x = binarize(torch.full((args.batch_size, NUM_PIXELS), 0.3, device=device))
    num, chunk = args.num_particles, 50
    renyi = RenyiELBO(alpha=0, num_particles=chunk, vectorize_particles=True, max_plate_nesting=1)
    first, last = torch.randn(LATENT_DIM, HIDDEN), torch.randn(HIDDEN, NUM_PIXELS)
    z = torch.randn(chunk * args.batch_size, LATENT_DIM, device=device)
    first, last = first.to(device), last.to(device)

    @torch.no_grad()
    def products() -> None:
        for _ in range(num // chunk):
            z @ first @ last

    @torch.no_grad()
    def stock() -> None:
        for _ in range(num // chunk):
            renyi.loss(vae, guide, x)

    def ours(chunk_size: int | None) -> Callable[[], object]:
        return lambda: importance_weighted_log_likelihood(
            vae, guide, x, num_particles=num, chunk_size=chunk_size
        )

    rows: dict[str, Callable[[], object]] = {
        "matrix products alone": products,
        "RenyiELBO, 50 particles": stock,
        "ours, chunk chosen": ours(None),
        "ours, chunks of 10": ours(10),
        "ours, chunks of 200": ours(200),
    }
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(args.repeats):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)

    print(f"{args.batch_size} images x {num} particles, {torch.get_num_threads()} threads")
    print(f"{'':26}{'of RenyiELBO':>14}{'of the limit':>14}{'decodes/s':>12}")
    for name, seconds in best.items():
        of_stock = best["RenyiELBO, 50 particles"] / seconds
        of_limit = best["matrix products alone"] / seconds
        print(f"{name:26}{of_stock:14.2f}{of_limit:14.2f}{args.batch_size * num / seconds:12,.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
