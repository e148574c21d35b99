"""Test log-likelihood of the one-layer VAE and IWAE of Burda et al. (2016) on MNIST.

    python benchmarks/mnist_iwae.py --data-root DATA --num-particles 50 --num-passes 12

Importance weighted autoencoders, https://arxiv.org/abs/1509.00519, section 5 and table 1: 50
latents, two layers of 200 tanh units on both sides, batches of 20 images binarised anew each time,
Adam with eps 1e-4, Glorot-uniform weights, the output's bias from the mean image; eight learning
rates 0.001 * 10^(-i/7), each for 3^i passes, here scaled to ``--num-passes`` (the paper's: 3280).
The test set is binarised once, the same for every seed. DATA holds ``MNIST/raw``.

Prints the loss at each of the rates, then the log-likelihood from 5,000 particles with its two
standard errors, the ELBO of the same particles, and the number of active units, and adds them as
a row to ``OUT/mnist_iwae.csv``. What to expect is in ``mnist_iwae.md``.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyro
import torch
from pyro.infer import Trace_ELBO

from pyro_vae import CompiledSVI, LogLikelihoodEstimate, importance_weighted_log_likelihood
from pyro_vae.datasets import binarize, load_digits, load_mnist
from pyro_vae.evaluation import active_units
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.priors import StandardNormalPrior

BATCH_SIZE, NUM_RATES, PAPER_PASSES = 20, 8, 3280
PAPER = {1: -86.76, 5: -85.54, 50: -84.78}
"""Table 1, one stochastic layer: test log-likelihoods in nats."""


def build(args: argparse.Namespace, mean: torch.Tensor) -> tuple[VAE, AmortizedNormal]:
    """The VAE and its guide, with the paper's starting values."""
    hidden, num_pixels = [args.hidden] * 2, len(mean)
    decoder = MLP(args.latent_dim, hidden, num_pixels, activation=torch.nn.Tanh)
    encoder = MLP(num_pixels, hidden, 2 * args.latent_dim, activation=torch.nn.Tanh)
    for layer in (*decoder, *encoder):
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    *_, bias = decoder.parameters()
    bias.data.copy_(mean.logit(eps=1e-3))  # Some pixels are never on.
    return VAE(decoder, Bernoulli(), StandardNormalPrior(args.latent_dim)), AmortizedNormal(encoder)


def schedule(num_passes: float, steps_a_pass: int) -> list[tuple[float, int]]:
    """The learning rates and how many steps to take at each, at least one."""
    scale = num_passes * steps_a_pass / PAPER_PASSES
    return [(1e-3 * 10 ** (-i / 7), max(1, round(3**i * scale))) for i in range(NUM_RATES)]


def batches(grey: torch.Tensor) -> Iterator[torch.Tensor]:
    """Endless passes over the images in new orders; every batch is binarised anew."""
    while True:
        for rows in torch.randperm(len(grey)).split(BATCH_SIZE):
            yield torch.bernoulli(grey[rows])


def train(vae: VAE, guide: AmortizedNormal, grey: torch.Tensor, args: argparse.Namespace) -> float:
    """Trains through all rates; returns the seconds, those for compiling included."""
    # With one particle the bound is the ELBO, and Pyro has it.
    objective = TraceIWAE_ELBO(args.num_particles) if args.num_particles > 1 else Trace_ELBO()
    optimizer = torch.optim.Adam([*vae.parameters(), *guide.parameters()], eps=1e-4)
    svi = CompiledSVI(vae, guide, optimizer, objective, mode=args.mode)
    source, start = batches(grey), time.perf_counter()
    for rate, num_steps in schedule(args.num_passes, math.ceil(len(grey) / BATCH_SIZE)):
        optimizer.param_groups[0]["lr"] = rate
        loss, num_images, began = 0.0, 0, time.perf_counter()
        for _ in range(num_steps):
            x = next(source)
            loss, num_images = loss + svi.step(x), num_images + len(x)
        a_step = (time.perf_counter() - began) / num_steps
        print(
            f"rate {rate:.2e}, {num_steps:7d} steps: loss {loss / num_images:8.3f} nats an image, "
            f"{a_step * 1e3:.2f} ms a step",
            flush=True,
        )
    seconds = time.perf_counter() - start
    print(svi.summary(), flush=True)
    return seconds


def evaluate(
    vae: VAE, guide: AmortizedNormal, x: torch.Tensor, num_particles: int
) -> LogLikelihoodEstimate:
    """The log-likelihood of every image, a hundred at a time."""
    parts = [
        importance_weighted_log_likelihood(vae, guide, part, num_particles=num_particles)
        for part in x.split(100)
    ]
    return LogLikelihoodEstimate.cat(parts)


def main(args: argparse.Namespace) -> pd.DataFrame:
    """Trains, evaluates, prints; returns the row that it adds to the table."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.smoke_test:
        (grey, _), (grey_test, _) = load_digits(dequantize=False)
    else:
        (grey, _), (grey_test, _) = load_mnist(args.data_root)
    pyro.set_rng_seed(0)
    x_test = binarize(grey_test)
    pyro.set_rng_seed(args.seed)
    vae, guide = build(args, grey.mean(0))
    seconds = train(vae, guide, grey, args)
    name = f"{'digits' if args.smoke_test else 'mnist'}_k{args.num_particles}_seed{args.seed}"
    torch.save([vae.state_dict(), guide.state_dict()], args.out / f"{name}.pt")

    num_images, start = min(args.eval_images, len(x_test)), time.perf_counter()
    print(
        f"trained in {seconds:.1f} s; evaluating {num_images} of {len(x_test)} test images with "
        f"{args.eval_particles} particles",
        flush=True,
    )
    estimate = evaluate(vae, guide, x_test[:num_images], args.eval_particles)
    result = {
        "data": "digits" if args.smoke_test else "mnist",
        "K": args.num_particles,
        "passes": args.num_passes,
        "seconds": seconds,
        "a pass": seconds / args.num_passes,
        "images": num_images,
        "log p(x)": estimate.mean(),
        "+- images": estimate.data_standard_error(),
        "+- MC": estimate.mean_standard_error(),
        "ELBO": float(estimate.elbo.mean()),
        "active": active_units(guide, x_test).count,
        "paper": math.nan if args.smoke_test else PAPER.get(args.num_particles, math.nan),
        "seed": args.seed,
        "seconds of evaluation": time.perf_counter() - start,
    }
    row, path = pd.DataFrame([result]), args.out / "mnist_iwae.csv"
    row.to_csv(path, mode="a", index=False, header=not path.exists())
    print(row.to_string(index=False, float_format="{:.3f}".format))
    print(f"added to {path}")
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--num-particles", type=int, default=1, help="1 is the VAE")
    parser.add_argument("--num-passes", type=float, default=PAPER_PASSES)
    parser.add_argument("--eval-particles", type=int, default=5000)
    parser.add_argument("--eval-images", type=int, default=10000, help="the first of the test set")
    parser.add_argument("--latent-dim", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--mode", choices=["inductor", "graph"], default="inductor")
    # On matrices this small a second thread costs more in waiting than it computes.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="seconds, on 8x8 digits")
    arguments = parser.parse_args()
    if arguments.data_root is None and not arguments.smoke_test:
        print("No --data-root with MNIST: this is the smoke test, on scikit-learn's 8x8 digits.")
        arguments.smoke_test = True
    if arguments.smoke_test:
        arguments.num_passes, arguments.eval_particles = 2, 100
        arguments.hidden, arguments.latent_dim, arguments.mode = 20, 5, "graph"
    main(arguments)
