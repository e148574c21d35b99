"""Handwritten digits: a VAE beside exact probabilistic PCA, factor analysis, EM and one Gaussian.

    python examples/compare.py --out results

Fits every model on the same 1,437 images (8x8, dequantised, so that all log-likelihoods are
densities of the same data) and evaluates it on the same 360 held-out images, to which nothing
is fitted. Prints a table, writes it to ``table.csv`` and draws the figures. Takes about two
minutes on two cores. Expect the linear-Gaussian model trained by SVI within 0.5 nats of pPCA
with the same number of latents, and the VAE far above both.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from tqdm import tqdm

from pyro_vae import (
    History,
    LogLikelihoodEstimate,
    baselines,
    fit,
    importance_weighted_log_likelihood,
    latents,
    scale_kl,
)
from pyro_vae.datasets import DIGITS_GREY_LEVELS, Batches, load_digits
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE, LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

Args = argparse.Namespace
Pair = tuple[Any, Any]
NUM_PIXELS = 64
COLUMNS = ["model", "fitted by", "log-lik.", "+- images", "+- MC", "ELBO", "exact", "bits/dim"]
COLUMNS += ["ESS", "k > 0.7", "seconds"]


def bits_per_dim(nats: float) -> float:
    """Bits that one grey level costs: undoes the division of the pixels by 17."""
    return (math.log(DIGITS_GREY_LEVELS) - nats / NUM_PIXELS) / math.log(2)


def fit_baselines(x: torch.Tensor, args: Args) -> dict[tuple[str, str], Any]:
    """The rows without gradients, by (model, how it is fitted)."""
    fits: dict[tuple[str, str], Callable[[], Any]] = {
        ("one Gaussian", "closed form"): lambda: baselines.gaussian(x),
        (f"mixture of {args.num_components} Gaussians", "EM"): lambda: (
            baselines.gaussian_mixture_em(
                x, args.num_components, covariance="diagonal", min_variance=1e-4
            )
        ),
        ("pPCA", "closed form"): lambda: baselines.ppca(x, args.latent_dim),
        ("pPCA", "EM"): lambda: baselines.ppca_em(x, args.latent_dim),
        ("factor analysis", "EM"): lambda: baselines.factor_analysis_em(x, args.latent_dim),
    }
    results = {}
    for key, run in tqdm(fits.items(), desc="exact and EM fits", unit="fit"):
        start = time.perf_counter()
        results[key] = run(), time.perf_counter() - start
    return results


def linear_pair(x: torch.Tensor, args: Args) -> Pair:
    """The linear-Gaussian model, started at mean and spread of the data, and a linear encoder."""
    model = LinearGaussian(NUM_PIXELS, args.latent_dim)
    with torch.no_grad():
        model.loc.copy_(x.mean(0))
        model.log_scale.copy_(x.std().log())
    return model, AmortizedNormal(MLP(NUM_PIXELS, [], 2 * args.latent_dim))


def vae_pair(x: torch.Tensor, args: Args) -> Pair:
    """A VAE with learnt noise for each pixel; dropout because 1,437 images are few."""
    decoder = MLP(args.latent_dim, [args.hidden], NUM_PIXELS, dropout=0.1)
    likelihood = Normal(x.std(0).clamp(min=1 / DIGITS_GREY_LEVELS), learn=True)
    model = VAE(decoder, likelihood, StandardNormalPrior(args.latent_dim))
    encoder = MLP(NUM_PIXELS, [args.hidden], 2 * args.latent_dim, dropout=0.3)
    return model, AmortizedNormal(encoder)


def plane_pair(x: torch.Tensor, args: Args) -> Pair:
    """The same VAE with two latents, for the map."""
    return vae_pair(x, Args(latent_dim=2, hidden=args.hidden))


def train(
    pair: Pair, x: torch.Tensor, x_test: torch.Tensor, args: Args, *, warmup: bool, lr: float
) -> History:
    """Trains by SVI with Adam, its learning rate falling to zero along a cosine."""
    batches = Batches(x, batch_size=100)
    num_steps = args.epochs * len(batches)
    optimizer = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": lr},
            "lr_lambda": lambda step: (1 + math.cos(math.pi * min(step / num_steps, 1))) / 2,
        }
    )
    beta = LinearWarmup(num_steps // 3)
    model, guide = (scale_kl(program, beta) for program in pair) if warmup else pair
    svi = SVI(model, guide, optimizer, TraceMeanField_ELBO())
    held_out = Batches(x_test, batch_size=len(x_test), shuffle=False)
    schedules = [optimizer, beta] if warmup else [optimizer]
    return fit(svi, batches, args.epochs, validation=held_out, schedules=schedules)


def evaluate(pair: Pair, x: torch.Tensor, num_particles: int, name: str) -> LogLikelihoodEstimate:
    """Importance-weighted log-likelihoods, with a progress bar over batches."""
    estimates = [
        importance_weighted_log_likelihood(*pair, batch, num_particles=num_particles)
        for batch in tqdm(x.split(60), desc=f"evaluating {name}", unit="batch")
    ]
    return LogLikelihoodEstimate.cat(estimates)


@torch.no_grad()
def exact_mean(model: Any, x: torch.Tensor) -> float:
    """Mean exact log-likelihood, nats per image."""
    return float(model.log_prob(x).mean())


def exact_row(key: tuple[str, str], log_prob: torch.Tensor, seconds: float) -> dict[str, Any]:
    """A row whose log-likelihood is known."""
    mean = float(log_prob.mean())
    return {
        "model": key[0],
        "fitted by": key[1],
        "log-lik.": mean,
        "+- images": float(log_prob.std()) / len(log_prob) ** 0.5,
        "exact": mean,
        "bits/dim": bits_per_dim(mean),
        "seconds": seconds,
    }


def estimated_row(
    key: tuple[str, str], e: LogLikelihoodEstimate, exact: float | None, seconds: float
) -> dict[str, Any]:
    """A row whose log-likelihood is estimated from particles."""
    return {
        "model": key[0],
        "fitted by": key[1],
        "log-lik.": e.mean(),
        "+- images": e.data_standard_error(),
        "+- MC": e.mean_standard_error(),
        "ELBO": float(e.elbo.mean()),
        "exact": exact,
        "bits/dim": bits_per_dim(e.mean()),
        "ESS": float(e.effective_sample_size.median()),
        "k > 0.7": float((e.pareto_k > 0.7).double().mean()),
        "seconds": seconds,
    }


def main(args: Args) -> pd.DataFrame:
    """Fits, evaluates, prints, draws; returns the table."""
    pyro.set_rng_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (x, y), (x_test, y_test) = load_digits(seed=args.seed)
    fits = fit_baselines(x, args)
    rows = [exact_row(key, f.log_prob(x_test), seconds) for key, (f, seconds) in fits.items()]

    x, x_test = x.to(args.device), x_test.to(args.device)
    pairs, histories = {}, {}
    settings = {
        ("linear-Gaussian", "SVI"): (linear_pair, False, 1e-2),
        ("VAE", "SVI"): (vae_pair, False, 1e-3),
        ("VAE, beta warm-up", "SVI"): (vae_pair, True, 1e-3),
        ("VAE, 2 latents", "SVI"): (plane_pair, False, 1e-3),
    }
    for key, (build, warmup, lr) in settings.items():
        start = time.perf_counter()
        pairs[key[0]] = pair = tuple(p.to(args.device) for p in build(x, args))
        histories[key[0]] = train(pair, x, x_test, args, warmup=warmup, lr=lr)
        seconds = time.perf_counter() - start
        estimate = evaluate(pair, x_test, args.num_particles, key[0])
        exact = exact_mean(pair[0], x_test) if isinstance(pair[0], LinearGaussian) else None
        rows.append(estimated_row(key, estimate, exact, seconds))

    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(args.out / "table.csv", index=False)
    print(f"\nlog-likelihood of {len(x_test)} held-out digits, nats per image")
    print(f"{args.latent_dim} latents, K = {args.num_particles} particles, seconds of training\n")
    print(table.to_string(index=False, na_rep="", float_format="{:.3f}".format))
    unreliable = table.loc[table["k > 0.7"] > 0.1, "model"]
    if len(unreliable):
        print(
            f"\nFew particles carry the weight for many images of: {'; '.join(unreliable)} "
            "(k > 0.7).\nTheir +- MC is understated, and log-lik. is more likely too low than "
            "too high."
        )
    draw(args, fits, pairs, histories, (x.cpu(), x_test, y_test))
    print(f"\nThe table and the figures are in {args.out}/")
    return table


def draw(args: Args, fits: Any, pairs: Any, histories: Any, data: Any) -> None:
    """Writes the figures."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    def save(name: str) -> None:
        plt.gcf().savefig(args.out / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close()

    x_train, x_test, y_test = data
    ppca, vae = fits["pPCA", "closed form"][0], pairs["VAE"]
    curves = {f"{m}, EM": f.log_likelihoods for (m, how), (f, _) in fits.items() if how == "EM"}
    best = exact_mean(ppca, x_train)

    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    plots.plot_history(histories, ax=left)
    left.set_title("the warm-up's loss is beta-weighted until beta = 1", fontsize="small")
    plots.plot_em(curves, {"pPCA, closed form": best}, ax=right)
    save("training")

    plots.plot_em({"pPCA, EM": curves["pPCA, EM"]}, {"pPCA, closed form": best})
    save("em")

    some = x_test[:100]
    nums = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    nums = [k for k in nums if k <= args.num_particles]
    _, panels = plt.subplots(1, len(pairs), figsize=(4 * len(pairs), 4), layout="constrained")
    for ax, (name, pair) in zip(panels, tqdm(pairs.items(), desc="bounds over K"), strict=True):
        bounds = [importance_weighted_log_likelihood(*pair, some, num_particles=k) for k in nums]
        linear = isinstance(pair[0], LinearGaussian)
        plots.plot_bounds(
            nums,
            # The ELBO, K = 1, is the mean over the particles of the last estimate.
            {name: [float(bounds[-1].elbo.mean()), *(e.mean() for e in bounds[1:])]},
            exact={name: exact_mean(pair[0], some)} if linear else None,
            standard_errors={name: [e.mean_standard_error() for e in bounds]},
            ax=ax,
        )
    save("bounds")

    plots.plot_images(latents.generate(vae[0], some), 20)
    save("samples")
    shown = x_test[:15]
    ppca_means = ppca.posterior(shown.cpu()).mean @ ppca.weight.T + ppca.loc
    vae_means = latents.reconstruct(*vae, shown)
    plots.plot_reconstructions(shown, {"pPCA": ppca_means, "VAE": vae_means})
    save("reconstructions")

    plots.plot_codes(latents.encode(pairs["VAE, 2 latents"][1], x_test).mean, y_test)
    save("latent_map")
    plots.plot_loadings(ppca.weight, num_columns=5)
    save("loadings")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--num-components", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--num-particles", type=int, default=5000)
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
