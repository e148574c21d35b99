"""Priors: the same VAE with a standard normal, a learnt mixture, a VampPrior and a flow.

    python examples/priors.py --out results

Trains on binarised digits and prints the held-out log-likelihoods, and for each prior the paired
difference from the standard normal with its standard error over the images (Tomczak and Welling
2018, VAE with a VampPrior, https://arxiv.org/abs/1705.07120). Expect all three ahead, by about
half a nat, which is more than five standard errors. Two pictures: digits drawn from each prior,
and, with two latents, the density that each prior learns beside the codes of held-out digits.
Takes about three minutes on one core.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import fit, importance_weighted_log_likelihood, latents
from pyro_vae.datasets import Batches, load_digits
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.priors import FlowPrior, GaussianMixturePrior, StandardNormalPrior, VampPrior

Args = argparse.Namespace
Pair = tuple[VAE, AmortizedNormal]
NUM_COMPONENTS = 50
PRIORS = ["standard normal", "mixture", "VampPrior", "flow"]


def build(name: str, x: torch.Tensor, latent_dim: int, args: Args) -> Pair:
    """A VAE with that prior, and its guide; dropout because 1,437 images are few."""
    guide = AmortizedNormal(MLP(64, [args.hidden], 2 * latent_dim, dropout=0.3))
    if name == "standard normal":
        prior: Any = StandardNormalPrior(latent_dim)
    elif name == "mixture":
        prior = GaussianMixturePrior(latent_dim, NUM_COMPONENTS)
    elif name == "VampPrior":
        some = x[torch.randperm(len(x))[:NUM_COMPONENTS]]
        prior = VampPrior(guide.encoder, some, limits=(0, 1))
    else:
        layers = [transforms.affine_autoregressive(latent_dim, [50]) for _ in range(3)]
        prior = FlowPrior(latent_dim, [layer.inv for layer in layers])
    decoder = MLP(latent_dim, [args.hidden], 64, dropout=0.1)
    return VAE(decoder, Bernoulli(), prior), guide


def train(name: str, x: torch.Tensor, latent_dim: int, args: Args) -> Pair:
    """Trains by SVI with Adam."""
    pyro.set_rng_seed(args.seed)
    pair = build(name, x, latent_dim, args)
    batches = Batches(x, batch_size=100)
    decay = 0.1 ** (1 / (args.epochs * len(batches)))  # the learning rate ends at a tenth
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-3, "lrd": decay})
    fit(SVI(*pair, optimizer, Trace_ELBO()), batches, args.epochs)
    return pair


def main(args: Args) -> pd.DataFrame:
    """Trains, compares, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    (x, _), (x_test, y_test) = load_digits(dequantize=False)
    x, x_test = (x > 0.5).to(x), (x_test > 0.5).to(x)
    pairs, rows, standard = {}, [], None
    for name in PRIORS:
        print(f"{name}, {args.latent_dim} latents")
        pairs[name] = train(name, x, args.latent_dim, args)
        estimate = importance_weighted_log_likelihood(
            *pairs[name], x_test, num_particles=args.num_particles
        )
        standard = estimate if standard is None else standard
        better = estimate.log_likelihood - standard.log_likelihood
        row = {"prior": name, "log-lik.": estimate.mean()}
        row |= {"+- images": estimate.data_standard_error(), "ELBO": float(estimate.elbo.mean())}
        row |= {"ahead of standard": float(better.mean())}
        row |= {"+- paired": float(better.std()) / len(better) ** 0.5}
        row |= {"k > 0.7": float((estimate.pareto_k > 0.7).double().mean())}
        rows.append(row)
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "priors.csv", index=False)
    print(f"\nlog-likelihood of {len(x_test)} held-out binary digits, nats per image\n")
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print("\nThe same with two latents, for the picture")
    planes = {name: train(name, x, 2, args) for name in PRIORS}
    draw(args, pairs, planes, x_test, y_test)
    print(f"\nThe table and the figures are in {args.out}/")
    return table


@torch.no_grad()
def log_density(model: VAE, codes: torch.Tensor) -> torch.Tensor:
    """The prior's log-density at codes ``(N, 2)``."""
    model.eval()
    with poutine.trace() as tracer, pyro.plate("grid", len(codes)):
        poutine.condition(model.prior, data={"z": codes})()
    site: Any = tracer.trace.nodes["z"]
    return site["fn"].log_prob(codes)


def draw(args: Args, pairs: Any, planes: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """Writes the figures."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    figure, panels = plt.subplots(1, len(pairs), figsize=(14, 4), layout="tight")
    for ax, (name, pair) in zip(panels, pairs.items(), strict=True):
        plots.plot_images(latents.generate(pair[0], x[:64]), 8, ax=ax)
        ax.set_title(name)
    figure.savefig(args.out / "priors_samples.png", dpi=150)
    figure, panels = plt.subplots(1, len(planes), figsize=(16, 4), layout="constrained")
    for ax, (name, (model, guide)) in zip(panels, planes.items(), strict=True):
        codes = latents.encode(guide, x).mean
        low, high = codes.min(0).values - 1, codes.max(0).values + 1
        axes = [torch.linspace(float(a), float(b), 150) for a, b in zip(low, high, strict=True)]
        grid = torch.cartesian_prod(*axes)
        density = log_density(model, grid).exp().reshape(150, 150).T
        plots.plot_codes(codes, y, ax=ax)
        ax.contourf(*axes, density.sqrt(), levels=12, cmap="Greys", zorder=0)
        ax.set_title(name)
        if ax is not panels[-1]:
            ax.get_legend().remove()
    figure.savefig(args.out / "priors_codes.png", dpi=150)
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=150)
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
