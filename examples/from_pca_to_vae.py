"""From PCA to the VAE: what a nonlinear decoder, noise and a prior add, in one table.

    python examples/from_pca_to_vae.py --out results

PCA, autoencoders (linear, deterministic, denoising), pPCA and a VAE with ten latents each, and MADE
with none, on dequantised digits. Prints the squared error of held-out images, their
log-likelihood where there is one, and how far samples, decoded without noise, lie from the nearest
training image (blurred ones lie near as well): with codes from N(0, I), and from a normal
fitted to the training codes.

Expect the linear autoencoder to be PCA again (Baldi and Hornik 1989), and the nonlinear one to
nearly halve the error. But nothing told it where codes should lie: N(0, I) misses them, a fitted
normal often hits the holes between them, and neither makes a density of images. The VAE gives up
some of the error for codes that fill the prior, and for a likelihood; that of MADE, which has
no codes, is higher. The second figure shows two latents, dark where what is decoded is far from
every digit, with circles at 1, 2 and 3 standard deviations of N(0, I). Takes about two minutes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.decomposition import PCA

from pyro_vae import baselines, fit, importance_weighted_log_likelihood, latents
from pyro_vae.baselines.autoencoder import fit_autoencoder
from pyro_vae.baselines.linear_autoencoder import linear_autoencoder, principal_angles
from pyro_vae.baselines.made import MADE, fit_made
from pyro_vae.datasets import DIGITS_GREY_LEVELS, Batches, load_digits
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

Args = argparse.Namespace
Tensor = torch.Tensor
Coder = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""From images to codes, and back to mean images."""
HIDDEN = [200, 100]


class DroppingReLU(torch.nn.Dropout):
    """ReLU and dropout, without which MADE soon knows 1,437 images by heart."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies both."""
        return super().forward(x.relu())


def train_vae(x: Tensor, latent_dim: int, args: Args) -> tuple[VAE, AmortizedNormal]:
    """A VAE with learnt noise for each pixel; the learning rate falls along a cosine."""
    pyro.set_rng_seed(args.seed)
    guide = AmortizedNormal(MLP(64, HIDDEN, 2 * latent_dim))
    likelihood = Normal(x.std(0).clamp(min=1 / DIGITS_GREY_LEVELS), learn=True)
    vae = VAE(MLP(latent_dim, HIDDEN[::-1], 64), likelihood, StandardNormalPrior(latent_dim))
    batches = Batches(x, batch_size=100)
    num_steps = args.epochs * len(batches)
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-3}, "T_max": num_steps}
    optimizer = pyro.optim.CosineAnnealingLR(settings)
    svi = SVI(vae, guide, optimizer, TraceMeanField_ELBO())
    fit(svi, batches, args.epochs, schedules=[optimizer])
    return vae, guide


def coder_of_vae(vae: VAE, guide: AmortizedNormal) -> Coder:
    """Means of q(z | x) and of p(x | z)."""
    return (
        lambda x: latents.encode(guide, x).mean,
        lambda z: latents.decode(vae, {"z": z}, z.new_zeros(len(z), 64)).mean,
    )


def coder_of_autoencoder(x: Tensor, latent_dim: int, noise: float, args: Args) -> Coder:
    """The same networks, trained the same way on the squared error."""
    torch.manual_seed(args.seed)
    encoder, decoder = MLP(64, HIDDEN, latent_dim), MLP(latent_dim, HIDDEN[::-1], 64)
    autoencoder = fit_autoencoder(x, encoder, decoder, noise=noise, num_epochs=args.epochs)
    return autoencoder.encode, autoencoder.decode


def linear_coders(x: Tensor, latent_dim: int) -> dict[str, Coder]:
    """PCA and the linear autoencoder, which have no density, and pPCA."""
    pca, ppca = PCA(latent_dim).fit(x.double().numpy()), baselines.ppca(x, latent_dim)
    linear, axes = linear_autoencoder(x, latent_dim), torch.as_tensor(pca.components_)
    angle = principal_angles(linear.get_parameter("decoder.weight"), axes.mT).max()
    print(f"largest angle between the linear autoencoder and PCA: {float(angle):.1e} rad")
    linear.to(x.dtype)
    loc, axes, weight = ppca.loc.to(x), axes.to(x), ppca.weight.to(x)
    return {
        "PCA": (lambda x: (x - loc) @ axes.mT, lambda z: loc + z @ axes),
        "linear autoencoder": (linear.encode, linear.decode),
        "pPCA": (lambda x: ppca.posterior(x).mean.to(x), lambda z: loc + z @ weight.mT),
    }


def distance(images: Tensor, x: Tensor) -> float:
    """From an image to the nearest one of the training data, on average."""
    return float(torch.cdist(images, x).amin(1).mean())


def main(args: Args) -> pd.DataFrame:
    """Fits, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    (x, y), (x_test, _) = load_digits()
    size = args.latent_dim
    vae = train_vae(x, size, args)
    coders = linear_coders(x, size)
    coders["autoencoder"] = coder_of_autoencoder(x, size, 0.0, args)
    coders["denoising autoencoder"] = coder_of_autoencoder(x, size, args.noise, args)
    coders["VAE"] = coder_of_vae(*vae)
    made = MADE(64, [200], num_components=5, activation=DroppingReLU)
    fit_made(x, made, num_epochs=args.epochs)
    planes = {"autoencoder": coder_of_autoencoder(x, 2, 0.0, args)}
    planes["VAE"] = coder_of_vae(*train_vae(x, 2, args))

    rows: dict[str, dict[str, float]] = {}
    images = {"held-out digits": x_test}
    with torch.no_grad():
        for name, (encode, decode) in coders.items():
            images[name] = decode(encode(x_test))
            rows[name] = {"error": float((images[name] - x_test).square().sum(1).mean())}
            fitted = baselines.gaussian(encode(x)).sample(1000).to(x)
            for prior, codes in {"N(0, I)": torch.randn(1000, size), "fitted": fitted}.items():
                images[f"{name}: {prior}"] = samples = decode(codes)
                rows[name][prior] = distance(samples, x)
        images["MADE: samples"] = made.sample(20)
        exact = {"pPCA": baselines.ppca(x, size).log_prob(x_test), "MADE": made.log_prob(x_test)}
        draw_planes(x, y, planes, args.out / "from_pca_to_vae_planes.png")
    draw_images(images, args.out / "from_pca_to_vae.png")
    estimate = importance_weighted_log_likelihood(*vae, x_test, num_particles=args.num_particles)
    table = pd.DataFrame({**rows, "MADE": {}}).T
    log_lik = {name: float(values.mean()) for name, values in exact.items()}
    table.insert(1, "log-lik.", pd.Series({**log_lik, "VAE": estimate.mean()}))
    table.insert(2, "+- MC", pd.Series({"VAE": estimate.mean_standard_error()}))
    table.to_csv(args.out / "from_pca_to_vae.csv")
    print(
        f"\n{len(x_test)} held-out digits, {size} latents: squared error and nats per image; mean"
    )
    print("distance of samples to the nearest training image, by where their codes come from")
    print(f"(of held-out digits {distance(x_test, x):.3f})\n")
    print(table.to_string(float_format="{:.3f}".format, na_rep="-"))
    print(f"\nThe table and the figures are in {args.out}/")
    return table


def draw_images(images: dict[str, Tensor], path: Path) -> None:
    """Writes digits, their reconstructions and samples."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    data, *names = (name for name in images if "linear" not in name)
    names = [name for name in names if ":" not in name] + [name for name in names if ":" in name]
    figure, ax = plt.subplots(figsize=(9, 6.5), layout="constrained")
    plots.plot_reconstructions(images[data][:20], {n: images[n][:20] for n in names}, ax=ax)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_planes(x: Tensor, y: Tensor, planes: dict[str, Coder], path: Path) -> None:
    """Writes codes in the plane, above what is decoded there."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Circle

    from pyro_vae import plots

    figure, axes = plt.subplots(2, len(planes), figsize=(12, 11), layout="constrained")
    for (top, bottom), (name, (encode, decode)) in zip(axes.T, planes.items(), strict=True):
        down, right = torch.meshgrid(*2 * [torch.linspace(-4, 4, 120)], indexing="ij")
        images = decode(torch.stack([right, -down], -1).flatten(0, 1))
        nearest = torch.cdist(images, x).amin(1).reshape(down.shape)
        top.imshow(nearest, cmap="gray_r", vmin=0.9, vmax=2.5, extent=[-4, 4, -4, 4])
        plots.plot_codes(encode(x), y, ax=top)
        for radius in (1, 2, 3):
            top.add_patch(Circle((0, 0), radius, fill=False, color="red", linestyle="--"))
        top.set(title=name, xlim=(-4, 4), ylim=(-4, 4))
        plots.plot_images(images.reshape(120, 120, -1)[3::6, 3::6].flatten(0, 1), 20, ax=bottom)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--noise", type=float, default=0.2, help="of the denoising autoencoder")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs, arguments.num_particles = 2, 20
    main(arguments)
