"""From PCA to the VAE: what a nonlinear decoder, noise and a prior add, in one table.

    python examples/from_pca_to_vae.py --out results

With ten latents each, on dequantised digits; MADE has none. Prints the squared error of held-out
images, their log-likelihood where there is one, and how far samples, decoded without noise, lie
from the nearest training image (blurred ones lie near as well): with codes from N(0, I), and from
a normal fitted to the codes. Takes about two minutes.

Expect the linear autoencoder to be PCA again (Baldi and Hornik 1989), and the nonlinear one to
nearly halve the error. But nothing told it where codes should lie: N(0, I) misses them, the fitted
normal often hits the holes in between, and neither makes a density of images. The VAE gives up some
of the error for codes that fill the prior, and for a likelihood; that of MADE is higher. The second
figure is dark where what two latents decode to is far from every digit; circles at 1, 2 and 3 s.d.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.decomposition import PCA

from pyro_vae import baselines, fit, importance_weighted_log_likelihood, latents
from pyro_vae.datasets import DIGITS_GREY_LEVELS, Batches, load_digits
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

Args = argparse.Namespace
Coder = tuple[Any, Any]  # From images to codes, and back to mean images.
HIDDEN, LATENT_DIM = [200, 100], 10


def linear_coders(x: torch.Tensor) -> dict[str, Coder]:
    """PCA and the linear autoencoder, which have no density, and pPCA."""
    linear, ppca = baselines.linear_autoencoder(x, LATENT_DIM), baselines.ppca(x, LATENT_DIM)
    axes = torch.as_tensor(PCA(LATENT_DIM).fit(x.double()).components_)
    angles = baselines.principal_angles(linear.get_parameter("decoder.weight"), axes.mT)
    print(f"largest angle between the linear autoencoder and PCA: {float(angles.max()):.1e} rad")
    axes, loc, weight = axes.to(x), ppca.loc.to(x), ppca.weight.to(x)
    return {
        "PCA": (lambda x: (x - loc) @ axes.mT, lambda z: loc + z @ axes),
        "linear autoencoder": (linear.to(x).encode, linear.decode),
        "pPCA": (lambda x: ppca.posterior(x).mean.to(x), lambda z: loc + z @ weight.mT),
    }


def autoencoder(x: torch.Tensor, latent_dim: int, noise: float, args: Args) -> Coder:
    """Networks trained on the squared error."""
    torch.manual_seed(args.seed)
    nets = MLP(64, HIDDEN, latent_dim), MLP(latent_dim, HIDDEN[::-1], 64)
    fitted = baselines.fit_autoencoder(x, *nets, noise=noise, num_epochs=args.epochs)
    return fitted.encode, fitted.decode


def train_vae(x: torch.Tensor, latent_dim: int, args: Args) -> tuple[Coder, Any]:
    """The same with learnt noise for each pixel: its means, and model and guide."""
    pyro.set_rng_seed(args.seed)
    guide = AmortizedNormal(MLP(64, HIDDEN, 2 * latent_dim))
    likelihood = Normal(x.std(0).clamp(min=1 / DIGITS_GREY_LEVELS), learn=True)
    vae = VAE(MLP(latent_dim, HIDDEN[::-1], 64), likelihood, StandardNormalPrior(latent_dim))
    batches = Batches(x, batch_size=100)
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-3}}
    optimizer = pyro.optim.CosineAnnealingLR({**settings, "T_max": args.epochs * len(batches)})
    svi = SVI(vae, guide, optimizer, TraceMeanField_ELBO())
    fit(svi, batches, args.epochs, schedules=[optimizer])
    return (lambda x: latents.encode(guide, x).mean, vae.decoder), (vae, guide)


@torch.no_grad()
def main(args: Args) -> pd.DataFrame:
    """Fits, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    (x, y), (x_test, _) = load_digits()
    with torch.enable_grad():
        (vae_coder, vae), coders = train_vae(x, LATENT_DIM, args), linear_coders(x)
        coders["autoencoder"] = autoencoder(x, LATENT_DIM, 0.0, args)
        coders["denoising autoencoder"] = autoencoder(x, LATENT_DIM, 0.2, args)
        coders["VAE"] = vae_coder
        # Without dropout MADE soon knows 1,437 images by heart.
        made = baselines.MADE(64, [200], num_components=5, dropout=0.5)
        baselines.fit_made(x, made, num_epochs=args.epochs)
        planes = {"autoencoder": autoencoder(x, 2, 0.0, args), "VAE": train_vae(x, 2, args)[0]}
    rows: dict[str, dict[str, float]] = {}
    decoded, samples = {}, {"MADE": made.sample(20)}
    for name, (encode, decode) in coders.items():
        decoded[name] = decode(encode(x_test))
        rows[name] = {"error": float((decoded[name] - x_test).square().sum(1).mean())}
        fitted = baselines.gaussian(encode(x)).sample(1000).to(x)
        for prior, codes in {"N(0, I)": torch.randn(1000, LATENT_DIM), "fitted": fitted}.items():
            samples[f"{name}: {prior}"] = images = decode(codes)
            rows[name][prior] = float(torch.cdist(images, x).amin(1).mean())
    estimate = importance_weighted_log_likelihood(*vae, x_test, num_particles=1000)
    rows["VAE"] |= {"log-lik.": estimate.mean(), "+- MC": estimate.mean_standard_error()}
    rows["pPCA"]["log-lik."] = float(baselines.ppca(x, LATENT_DIM).log_prob(x_test).mean())
    rows["MADE"] = {"log-lik.": float(made.log_prob(x_test).mean())}
    table = pd.DataFrame(rows).T[["error", "log-lik.", "+- MC", "N(0, I)", "fitted"]]
    table.to_csv(args.out / "from_pca_to_vae.csv")
    print(f"\n{len(x_test)} held-out digits: squared error, nats; of samples, mean distance to the")
    print(f"nearest training image (of those digits {torch.cdist(x_test, x).amin(1).mean():.3f})\n")
    print(table.to_string(float_format="{:.3f}".format, na_rep="-"))
    draw(x, y, x_test, decoded | samples, planes, args.out)
    print(f"\nThe table and the figures are in {args.out}/")
    return table


def draw(x: Any, y: Any, x_test: Any, images: Any, planes: Any, out: Path) -> None:
    """Writes reconstructions and samples; codes in the plane, above what is decoded there."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    figure, ax = plt.subplots(figsize=(9, 6.5), layout="constrained")
    shown = {name: rows[:20] for name, rows in images.items() if "linear" not in name}
    plots.plot_reconstructions(x_test[:20], shown, ax=ax)
    figure.savefig(out / "from_pca_to_vae.png", dpi=120)
    figure, axes = plt.subplots(2, len(planes), figsize=(12, 11), layout="constrained")
    ticks = torch.linspace(-4, 4, 120)
    codes = torch.cartesian_prod(-ticks, ticks).flip(1)
    for (top, bottom), (name, (encode, decode)) in zip(axes.T, planes.items(), strict=True):
        grid = decode(codes)
        far = torch.cdist(grid, x).amin(1).reshape(120, 120)
        top.imshow(far, cmap="gray_r", vmin=0.9, vmax=2.5, extent=[-4, 4, -4, 4])
        plots.plot_codes(encode(x), y, ax=top)
        top.contour(ticks, -ticks, codes.norm(dim=1).reshape(120, 120), [1, 2, 3], colors="red")
        top.set(title=name, xlim=(-4, 4), ylim=(-4, 4))
        plots.plot_images(grid.reshape(120, 120, -1)[3::6, 3::6].flatten(0, 1), 20, ax=bottom)
    figure.savefig(out / "from_pca_to_vae_planes.png", dpi=120, bbox_inches="tight")
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs = 2
    main(arguments)
