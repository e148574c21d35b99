"""The textbook pictures of latent variable models, computed and not sketched.

    python examples/textbook.py --out results

After figures 17.1 to 17.8 of Prince (2023), Understanding deep learning, with a curve of our own.
Draws a mixture of Gaussians as the sum of its slices p(x, z); a nonlinear model with one latent as
its conditionals p(x | z) along a curve, the marginal that they add up to, and samples; and what
``textbook_bounds.py`` and ``textbook_posteriors.py`` draw, which can be run alone. What a picture
claims stands in the table in numbers, p(x) by quadrature: expect "value" and "exact" to agree
within the last column, five standard errors where samples are involved. The short form trains too
little for the posteriors. Takes about a minute on one core.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Picture
from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from torch.distributions import Normal

from pyro_vae import likelihoods
from pyro_vae.curves import Trochoid
from pyro_vae.evaluation.quadrature import quadrature
from pyro_vae.latents import generate
from pyro_vae.models import VAE, GaussianMixture
from pyro_vae.priors import StandardNormalPrior

NOISE = 0.3
COLORS = ["tab:blue", "tab:orange", "tab:green"]


def claim(text: str, value: Any, exact: Any, within: Any) -> dict[str, Any]:
    """A row of the table: two numbers that should agree."""
    return {"claim": text, "value": float(value), "exact": float(exact), "within": float(within)}


def slices() -> Picture:
    """A mixture of three Gaussians: p(x, z) for each z, and p(x)."""
    model = GaussianMixture(1, 3)
    model.locs.data.copy_(torch.tensor([[-3.0], [0.0], [2.2]]))
    model.weights = torch.tensor([0.3, 0.5, 0.2])
    model.scale = torch.tensor([0.6, 1.0, 0.5]).reshape(3, 1, 1)
    x, joint = torch.linspace(-8, 8, 801), []
    for z in range(3):
        conditioned = poutine.condition(model, {"z": torch.tensor(z)})
        trace = poutine.trace(conditioned).get_trace(x[:, None])
        trace.compute_log_prob()
        joint.append((trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]).exp().detach())
    p = model.log_prob(x[:, None]).exp().detach()
    difference = (torch.stack(joint).sum(0) - p).abs().max()
    claims = [
        claim("sum of the slices p(x, z), less p(x), at most", difference, 0, 1e-12),
        claim("integral of p(x)", torch.trapezoid(p, x), 1, 1e-6),
        claim("integral of p(x, z=0), its weight", torch.trapezoid(joint[0], x), 0.3, 1e-6),
    ]
    return Picture(x=x, joint=joint, p=p, claims=claims)


def plane(resolution: int, num_samples: int) -> Picture:
    """z ~ N(0, 1), x ~ N(f(z), NOISE^2 I) with a curve f: p(x) over the plane, and samples."""
    model = VAE(Trochoid(), likelihoods.Normal(NOISE), StandardNormalPrior(1))
    z = torch.linspace(-9, 9, 1201)
    across, up = (torch.linspace(-end, end, resolution) for end in (7.0, 3.6))
    columns = [torch.stack([x1.expand(resolution), up], -1) for x1 in across]
    log_p = torch.stack([quadrature(model, x, grid=z).log_likelihood for x in columns])
    data = generate(model, torch.zeros(num_samples, 2), mean=False)
    of_data = quadrature(model, data, grid=z).log_likelihood

    def integral(f: torch.Tensor) -> torch.Tensor:
        return torch.trapezoid(torch.trapezoid(f, up), across)

    p, curve = log_p.exp(), model.decoder(z[:, None])
    second = torch.trapezoid(Normal(0.0, 1.0).log_prob(z).exp() * curve[:, 1] ** 2, z) + NOISE**2
    entropy, error = -integral(p * log_p), of_data.std() / num_samples**0.5
    claims = [
        claim("integral of p(x) over the plane", integral(p), 1, 1e-3),
        claim("E[x2^2] under p(x), along the curve", integral(p * up**2), second, 5e-3),
        claim("entropy of p(x), from samples", -of_data.mean(), entropy, 5 * error),
    ]
    return Picture(z=z, curve=curve, p=p, data=data, claims=claims)


def draw_mixture(picture: Picture, axes: Any) -> None:
    """The slices on the left, stacked on the right."""
    lower = torch.zeros_like(picture.x)
    for z, (part, color) in enumerate(zip(picture.joint, COLORS, strict=True)):
        axes[0].fill_between(picture.x, part, color=color, alpha=0.4, lw=0)
        top = part.argmax()
        axes[0].text(picture.x[top], part[top] + 0.004, f"p(x, z={z})", color=color, ha="center")
        axes[1].fill_between(picture.x, lower, lower + part, color=color, alpha=0.4, lw=0)
        lower = lower + part
    axes[1].plot(picture.x, picture.p, color="black")
    for ax, title in zip(
        axes, ("joint: a slice for each z", "marginal p(x): their sum"), strict=True
    ):
        ax.set(title=title, xlabel="x", xlim=(-6, 5), ylim=(0, 0.22), yticks=[0, 0.1, 0.2])
    axes[0].set_ylabel("density")


def draw_plane(picture: Picture, axes: Any) -> None:
    """Conditionals along the curve, the marginal, samples."""
    from matplotlib.patches import Circle

    titles = "p(x | z): noise around a curve", "p(x): added up over all z", "samples from p(x)"
    for ax, title in zip(axes, titles, strict=True):
        ax.plot(*picture.curve[picture.z.abs() < 2.6].T, color="0.6", linewidth=1)
        ax.set(title=title, xlabel="$x_1$", aspect="equal", xlim=(-6, 6), ylim=(-3.5, 3.5))
    axes[0].set_ylabel("$x_2$")
    labels = {-1.9: (-1, 1), -0.5: (2.1, -0.1), 0.0: (0, -1), 0.5: (-1.9, -0.1), 1.9: (1, 1)}
    for z in (*labels, -1.178, 1.178):
        x1, x2 = picture.curve[(picture.z - z).abs().argmin()].tolist()
        for radius in (NOISE, 2 * NOISE):
            axes[0].add_patch(Circle((x1, x2), radius, color=COLORS[0], alpha=0.25, lw=0))
        dx, dy = labels.get(z, (0, 1.1))
        text = f"z={z:g}" if z in labels else "z=$\\pm$1.18"
        axes[0].text(x1 + dx, x2 + dy, text, color=COLORS[0], ha="center", va="center")
    extent = (-7, 7, -3.6, 3.6)
    axes[1].imshow(picture.p.T, origin="lower", extent=extent, cmap="Blues")
    axes[2].scatter(*picture.data[:1500].T, s=6, color=COLORS[0], alpha=0.5, lw=0)


def figures(smoke_test: bool) -> list[tuple[Any, ...]]:
    """Name of each figure, what it shows, the function that draws it, and its panels."""
    nonlinear = plane(61, 500) if smoke_test else plane(121, 5000)
    return [
        ("mixture", slices(), draw_mixture, {"ncols": 2, "sharey": True, "figsize": (12, 4.5)}),
        ("nonlinear", nonlinear, draw_plane, {"ncols": 3, "sharey": True, "figsize": (15, 3.9)}),
    ]


def main(args: argparse.Namespace, *parts: Callable[[bool], list[tuple[Any, ...]]]) -> pd.DataFrame:
    """Computes, draws, prints; returns the claims. Every part begins with the same seed."""
    from matplotlib import pyplot as plt

    torch.set_num_threads(args.threads)
    torch.set_default_dtype(torch.float64)
    args.out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 15, "axes.titlesize": 15})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    rows = []
    for part in parts:
        pyro.set_rng_seed(args.seed)
        for name, picture, draw, panels in part(args.smoke_test):
            figure, axes = plt.subplots(layout="constrained", **panels)
            draw(picture, axes)
            figure.savefig(args.out / f"textbook_{name}.png", dpi=150)
            plt.close(figure)
            rows += [{"figure": name, **row} for row in picture.claims]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    print(f"\nThe figures are in {args.out}/")
    return table


def arguments() -> argparse.Namespace:
    """The options, the same for all three scripts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    return parser.parse_args()


if __name__ == "__main__":
    import textbook_bounds
    import textbook_posteriors

    main(arguments(), figures, textbook_bounds.figures, textbook_posteriors.figures)
