"""The textbook pictures of latent variable models, computed and not sketched.

    python examples/textbook.py --out results

After figures 17.1 to 17.8 of Prince (2023), Understanding deep learning: a mixture as the sum of
slices p(x, z), a nonlinear model, and the figures of ``textbook_bounds.py`` and
``textbook_posteriors.py``. Expect "value" and "exact" of every claim to agree within the last
column; in the short form the posteriors do not. Takes about a minute on one core.
"""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace as Picture
from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine

from pyro_vae.curves import Trochoid
from pyro_vae.evaluation.quadrature import quadrature
from pyro_vae.latents import generate
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE, GaussianMixture
from pyro_vae.priors import StandardNormalPrior

NOISE = 0.3


def claim(text: str, value: Any, exact: Any, within: Any) -> dict[str, Any]:
    """A row of the table: two numbers that should agree."""
    return {"claim": text, "value": float(value), "exact": float(exact), "within": float(within)}


def slices() -> Picture:
    """A mixture of three Gaussians: p(x, z) for each z, and p(x)."""
    model = GaussianMixture(1, 3)
    model.locs.data.copy_(torch.tensor([[-3.0], [0.0], [2.2]]))
    model.weights = torch.tensor([0.3, 0.5, 0.2])
    model.scale = torch.tensor([0.6, 1.0, 0.5]).reshape(3, 1, 1)
    x, joint = torch.linspace(-6, 5, 1101), []
    for z in torch.arange(3):
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x[:, None])
        trace.compute_log_prob()
        joint.append((trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]).exp().detach())
    p = model.log_prob(x[:, None]).exp().detach()
    claims = [
        claim("sum of the slices p(x, z), less p(x)", (sum(joint) - p).abs().max(), 0, 1e-12),
        claim("integral of p(x)", torch.trapezoid(p, x), 1, 1e-6),
        claim("integral of p(x, z=0), its weight", torch.trapezoid(joint[0], x), 0.3, 1e-6),
    ]
    return Picture(x=x, joint=joint, p=p, claims=claims)


def plane(resolution: int, num_samples: int) -> Picture:
    """z ~ N(0, 1), x ~ N(f(z), NOISE^2 I) with a curve f: p(x) over the plane, and samples."""
    model = VAE(Trochoid(), Normal(NOISE), StandardNormalPrior(1))
    z = torch.linspace(-9, 9, 1201)
    across, up = (torch.linspace(-end, end, resolution) for end in (7.0, 3.6))
    x = torch.cartesian_prod(across, up)
    log_p = quadrature(model, x, grid=z).log_likelihood.reshape(resolution, resolution)
    data = generate(model, torch.zeros(num_samples, 2), mean=False)
    of_data = quadrature(model, data, grid=z).log_likelihood
    p, cell = log_p.exp(), (across[1] - across[0]) * (up[1] - up[0])
    second = 2 * (1 + math.exp(-8)) + NOISE**2  # As x2 is -2 cos(2 z) and noise.
    entropy, error = -cell * (p * log_p).sum(), of_data.std() / num_samples**0.5
    claims = [
        claim("integral of p(x) over the plane", cell * p.sum(), 1, 1e-3),
        claim("E[x2^2] under p(x)", cell * (p * up**2).sum(), second, 5e-3),
        claim("entropy of p(x), from samples", -of_data.mean(), entropy, 5 * error),
    ]
    return Picture(z=z, curve=model.decoder(z[:, None]), p=p, data=data, claims=claims)


def draw_mixture(picture: Picture, axes: Any) -> None:
    """The slices on the left, stacked on the right."""
    lower = torch.zeros_like(picture.x)
    for z, part in enumerate(picture.joint):
        axes[0].fill_between(picture.x, part, color=f"C{z}", alpha=0.4, lw=0)
        top = part.argmax()
        axes[0].text(picture.x[top], part[top] + 0.004, f"p(x, z={z})", color=f"C{z}", ha="center")
        axes[1].fill_between(picture.x, lower, lower + part, color=f"C{z}", alpha=0.4, lw=0)
        lower = lower + part
    axes[1].plot(picture.x, picture.p, color="black")
    axes[0].set(title="joint: a slice for each z", xlabel="x", ylabel="density")
    axes[1].set(title="marginal p(x): their sum", xlabel="x", ylim=(0, 0.22), yticks=[0, 0.1, 0.2])


def draw_plane(picture: Picture, axes: Any) -> None:
    """Conditionals along the curve, the marginal, samples."""
    titles = "p(x | z): noise around a curve", "p(x): added up over all z", "samples from p(x)"
    for ax, title in zip(axes, titles, strict=True):
        ax.plot(*picture.curve[picture.z.abs() < 2.6].T, color="0.6", linewidth=1)
        ax.set(title=title, xlabel="$x_1$", aspect="equal", xlim=(-6, 6), ylim=(-3.5, 3.5))
    axes[0].set_ylabel("$x_2$")
    labels = {-1.9: (-1, 1), -1.178: (-1.2, 1.4), -0.5: (2.1, -0.1), 0.0: (0, -1)}
    labels |= {-z: (-dx, dy) for z, (dx, dy) in labels.items()}
    angle = torch.linspace(0, 2 * math.pi, 100)
    for z, (dx, dy) in labels.items():
        x1, x2 = picture.curve[(picture.z - z).abs().argmin()]
        for radius in (NOISE, 2 * NOISE):
            axes[0].fill(x1 + radius * angle.cos(), x2 + radius * angle.sin(), "C0", alpha=0.25)
        axes[0].text(x1 + dx, x2 + dy, f"z={z:.3g}", color="C0", ha="center", va="center")
    axes[1].contourf(picture.p.T, 50, extent=(-7, 7, -3.6, 3.6), cmap="Blues")
    axes[2].scatter(*picture.data[:1500].T, s=6, color="C0", alpha=0.5, lw=0)


def figures(smoke_test: bool) -> list[tuple[Any, ...]]:
    """Name of each figure, what it shows, the function that draws it, and its panels."""
    nonlinear = plane(61, 500) if smoke_test else plane(121, 5000)
    return [
        ("mixture", slices(), draw_mixture, {"ncols": 2, "sharey": True, "figsize": (12, 4.5)}),
        ("nonlinear", nonlinear, draw_plane, {"ncols": 3, "sharey": True, "figsize": (15, 3.6)}),
    ]


def main(*parts: Any) -> None:
    """Draws the ``figures`` of each part, all from the same seed, and prints their claims."""
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(torch.float64)
    plt.rcParams.update({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False})
    rows = []
    for part in parts:
        pyro.set_rng_seed(args.seed)
        for name, picture, draw, panels in part(args.smoke_test):
            figure, axes = plt.subplots(**{"figsize": (8, 5), "layout": "constrained", **panels})
            draw(picture, axes)
            figure.savefig(args.out / f"textbook_{name}.png", dpi=150)
            rows += [{"figure": name, **row} for row in picture.claims]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format))
    print(f"\nThe figures are in {args.out}/")


if __name__ == "__main__":
    import textbook_bounds
    import textbook_posteriors

    main(figures, textbook_bounds.figures, textbook_posteriors.figures)
