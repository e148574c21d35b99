"""beta-VAEs: what a code costs (rate) against what is lost without it (distortion).

    python examples/beta_vae.py --out results

Trains one VAE on digits of black and white pixels for every weight beta of the KL term (Higgins
et al. 2017, beta-VAE, https://openreview.net/forum?id=Sy2fzU9gl) and evaluates all of them, without
that weight, on the same 360 held-out images. Expect rates from 21 nats (beta = 0.1) down to 0
(beta = 10, where the code has collapsed), distortions from 6 to 25, and the best ELBO, -18.0, and
log-likelihood, -17.4 +- 0.2 over images, at beta = 1. ``rate_distortion.png`` shows the curve
(Alemi et al. 2018, Fixing a broken ELBO, https://arxiv.org/abs/1711.00464), ``traversals.png``
what each unit of a code does: the larger beta, the fewer do anything. Takes about two minutes on
one core.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from tqdm import tqdm

from pyro_vae import fit, importance_weighted_log_likelihood, latents, scale_kl
from pyro_vae.datasets import Batches, load_digits
from pyro_vae.evaluation import RateDistortionPoint, posterior_collapse, rate_distortion
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

Args = argparse.Namespace
Pair = tuple[VAE, AmortizedNormal]
NUM_PIXELS = 64
STEPS = (-3, -2, -1, 0, 1, 2, 3)


def train(beta: float, x: torch.Tensor, args: Args) -> Pair:
    """Trains by SVI with Adam, its learning rate falling to zero along a cosine."""
    pyro.set_rng_seed(args.seed)
    decoder = MLP(args.latent_dim, [args.hidden], NUM_PIXELS, dropout=0.1)
    encoder = MLP(NUM_PIXELS, [args.hidden], 2 * args.latent_dim, dropout=0.1)
    vae = VAE(decoder, Bernoulli(), StandardNormalPrior(args.latent_dim)).to(args.device)
    guide = AmortizedNormal(encoder).to(args.device)
    batches = Batches(x, batch_size=100)
    num_steps = args.epochs * len(batches)
    optimizer = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 2e-3},
            "lr_lambda": lambda step: (1 + math.cos(math.pi * min(step / num_steps, 1))) / 2,
        }
    )
    # Around both programs, so that every ELBO means the same by it.
    svi = SVI(scale_kl(vae, beta), scale_kl(guide, beta), optimizer, TraceMeanField_ELBO())
    fit(svi, batches, args.epochs, schedules=[optimizer])
    return vae, guide


def row(pair: Pair, point: RateDistortionPoint, x: torch.Tensor, args: Args) -> dict[str, Any]:
    """What the table says of one model."""
    estimate = importance_weighted_log_likelihood(*pair, x, num_particles=args.num_particles)
    use = posterior_collapse(*pair, x).sites["z"]
    return {
        "beta": point.beta,
        "rate": point.rate,
        "distortion": point.distortion,
        "ELBO": point.elbo,
        "log-lik.": estimate.mean(),
        "+- images": estimate.data_standard_error(),
        "active units": use.active_units.count if use.active_units else 0,
        "the code is": use.verdict,
    }


def main(args: Args) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    (x, _), (x_test, _) = load_digits(dequantize=False, seed=args.seed)
    x, x_test = ((images > 0.5).float().to(args.device) for images in (x, x_test))
    pairs = {beta: train(beta, x, args) for beta in args.betas}
    points = rate_distortion(pairs, x_test)
    table = pd.DataFrame(
        row(pairs[point.beta], point, x_test, args)
        for point in tqdm(points, desc="evaluating", unit="model")
    )
    print(f"\n{len(x_test)} held-out digits, nats per image, K = {args.num_particles} particles\n")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    draw(pairs, points, x_test, args)
    print(f"\nThe figures are in {args.out}/")
    return table


def draw(
    pairs: dict[float, Pair], points: list[RateDistortionPoint], x: torch.Tensor, args: Args
) -> None:
    """Writes the figures."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    plots.plot_rate_distortion(points)
    plt.savefig(args.out / "rate_distortion.png", dpi=150)
    plt.close()

    shown = sorted(pairs)[::2]
    figure, panels = plt.subplots(
        1, len(shown), figsize=(3.3 * len(shown), 4.6), squeeze=False, layout="constrained"
    )
    for ax, beta in zip(panels[0], shown, strict=True):
        kl = posterior_collapse(*pairs[beta], x).sites["z"].kl_per_dimension
        assert kl is not None  # Guide and prior factorise.
        order = kl.argsort(descending=True).tolist()
        moved = latents.traverse(*pairs[beta], x[:1], dims=order, values=STEPS)
        plots.plot_images(moved.reshape(-1, NUM_PIXELS), len(STEPS), ax=ax)
        ax.set_title(f"$\\beta$ = {beta:g}")
        bottom, top = ax.get_ylim()
        for index, unit in enumerate(order):
            y = top + (index + 0.5) * (bottom - top) / len(order)
            ax.text(-2, y, f"{kl[unit]:.2f}", ha="right", va="center", fontsize="x-small")
    title = (
        "Each row moves one unit of the code of a digit from -3 to 3; left of it, its KL in nats"
    )
    figure.suptitle(title, fontsize="medium")
    figure.savefig(args.out / "traversals.png", dpi=150)
    plt.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1, 0.3, 1, 2, 3, 10])
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    # On matrices this small a second thread costs more in waiting than it computes.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs, arguments.num_particles, arguments.hidden = 2, 20, 20
    main(arguments)
