"""Discrete codes: VQ-VAE with a codebook learnt in two ways, then a prior over its codes.

    python examples/vq_vae.py --out results

Trains a VQ-VAE (van den Oord et al. 2017, Neural discrete representation learning,
https://arxiv.org/abs/1711.00937) on binarised digits, four out of 32 codes an image: with a
codebook learnt by gradient, and by moving averages that revive dead codes. Then the uniform prior
gives way to an autoregressive one, and it alone learns. Prints what held-out images get: the bound
log p(x | codes) + log p(codes) at the nearest codes, which is what such models report; and an
importance-weighted log-likelihood, from a posterior with a spread over the codes, beside that of a
VAE trained as long. Expect moving averages to use the codes twice as evenly (perplexity 30 of 32,
against 15), which the uniform prior rewards with two nats. The learnt prior levels the bounds,
-20.8 and -20.7, but not the log-likelihoods: -18.6 and -17.6, to -18.4 of the VAE. Takes about
two minutes on one core.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import LogLikelihoodEstimate, fit, importance_weighted_log_likelihood, latents
from pyro_vae.codebook import Codebook
from pyro_vae.datasets import Batches, load_digits
from pyro_vae.evaluation import codebook_usage
from pyro_vae.guides import AmortizedNormal, NearestCode
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceVQ_ELBO
from pyro_vae.priors import AutoregressiveCodePrior, StandardNormalPrior, UniformCodePrior

Args = argparse.Namespace
NUM_CODES, CODE_DIM, NUM_POSITIONS = 32, 8, 4
WIDTH = NUM_POSITIONS * CODE_DIM
CODEBOOKS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "moving averages": {"decay": 0.99, "revive_below": 0.1},
}


def networks(code_width: int, out_width: int, hidden: int) -> tuple[MLP, MLP]:
    """A decoder and an encoder."""
    decoder = MLP(code_width, [hidden], 64, dropout=0.1)
    return decoder, MLP(64, [hidden], out_width, dropout=0.1)


def train(pair: Any, objective: Any, rate: float, x: torch.Tensor, num_epochs: int) -> None:
    """SVI with Adam and a learning rate that falls to a tenth."""
    batches = Batches(x, batch_size=100)
    decay = 0.1 ** (1 / (num_epochs * len(batches)))
    optimizer = pyro.optim.ClippedAdam({"lr": rate, "lrd": decay})
    fit(SVI(pair[0], pair[1], optimizer, objective), batches, num_epochs)


def evaluate(pair: Any, x: torch.Tensor, x_test: torch.Tensor, num: int) -> dict[str, Any]:
    """The bound of training, at the nearest codes, and the log-likelihood."""

    def estimate(data: torch.Tensor, num: int, temperature: float | None) -> LogLikelihoodEstimate:
        if isinstance(pair[1], NearestCode):
            pair[1].temperature = temperature
        return importance_weighted_log_likelihood(*pair, data, num_particles=num)

    temperature = None
    if isinstance(pair[1], NearestCode):  # A spread over the codes that suits training images.
        q: Any = latents.encode(pair[1], x)
        distance = float((q.encoded - q.mean).square().sum(-1).mean())
        tried = {n: estimate(x[:100], num, n * distance).mean() for n in (1, 2, 4, 8)}
        temperature = distance * max(tried, key=tried.__getitem__)
    found = estimate(x_test, num, temperature)
    bound = float(estimate(x_test, 20, None).elbo.mean())
    return {"bound": bound, "log-lik.": found.mean(), "+- images": found.data_standard_error()}


def main(args: Args) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    (x, _), (x_test, _) = load_digits(dequantize=False)
    x, x_test = (x > 0.5).to(x), (x_test > 0.5).to(x)
    data = x, x_test, args.num_particles
    pairs, rows, drawn = dict[str, tuple[VAE, Any]](), [], {}
    for name, learning in CODEBOOKS.items():
        pyro.set_rng_seed(args.seed)
        codebook = Codebook(NUM_CODES, CODE_DIM, **learning)
        decoder, encoder = networks(WIDTH, WIDTH, args.hidden)
        model = VAE(decoder, Bernoulli(), UniformCodePrior(codebook, NUM_POSITIONS))
        pair = model, NearestCode(encoder, codebook, NUM_POSITIONS)
        train(pair, TraceVQ_ELBO(), 1e-3, x, args.epochs)
        usage = codebook_usage(pair[1], x)
        row = {"latents": f"codes by {name}", "used": f"{usage.num_used}/{NUM_CODES}"}
        row["perplexity"] = f"{usage.perplexity:.1f}"
        rows.append(row | {"prior": "uniform"} | evaluate(pair, *data))
        drawn["uniform prior"] = latents.generate(model, x[:60])
        # From here on only a new prior learns.
        for program in pair:
            program.requires_grad_(False).eval()
        model.prior = AutoregressiveCodePrior(codebook, NUM_POSITIONS, [args.hidden])
        train(pair, Trace_ELBO(), 3e-3, x, args.epochs)
        rows.append(row | {"prior": "learnt"} | evaluate(pair, *data))
        drawn["learnt prior"] = latents.generate(model, x[:60])
        pairs[f"codes by {name}"] = pair
    decoder, encoder = networks(16, 2 * 16, args.hidden)
    vae = VAE(decoder, Bernoulli(), StandardNormalPrior(16)), AmortizedNormal(encoder)
    train(vae, Trace_ELBO(), 1e-3, x, 2 * args.epochs)
    rows.append({"latents": "normal code", "prior": "N(0, I)"} | evaluate(vae, *data))
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "vq_vae.csv", index=False)
    print(f"\n{len(x_test)} held-out binary digits, nats per image; codes of training data\n")
    print(table.to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    draw(pairs | {"normal code": vae}, drawn, x_test[:10], args.out / "vq_vae.png")
    print(f"\nThe table and the figure are in {args.out}/")
    return table


def draw(pairs: Any, drawn: dict[str, torch.Tensor], x: torch.Tensor, path: Path) -> None:
    """Writes reconstructions, and samples with the codebook of moving averages."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    figure, panels = plt.subplots(1, 3, figsize=(16, 3.4), layout="tight", width_ratios=[1.3, 1, 1])
    made = {name: latents.reconstruct(*pair, x) for name, pair in pairs.items()}
    plots.plot_reconstructions(x, made, ax=panels[0]).set_title("reconstructions")
    for ax, (name, images) in zip(panels[1:], drawn.items(), strict=True):
        plots.plot_images(images, 10, ax=ax).set_title(f"samples, {name}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=100, help="of each of two stages")
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs, arguments.num_particles, arguments.hidden = 2, 20, 20
    main(arguments)
