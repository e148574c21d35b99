"""Living in latent space: paths between digits, random walks, and attributes as directions.

    python examples/latent_arithmetic.py --out results

Trains a VAE on the grey digits of scikit-learn and moves about in its latent space: on straight
lines and great circles (White 2016, https://arxiv.org/abs/1609.04468), along coordinates, at random
without leaving the prior, and along attribute vectors, differences of mean codes (Larsen et al.
2016, https://arxiv.org/abs/1512.09300). Logistic regression on real digits judges the pictures.
Expect it to be surer halfway along a circle, where codes keep their norm, than along a line; six
digits of seven to turn into another along the vector between two classes; and a vector of slant,
averaged within the classes, to keep at least as many digits in their class for the same slant.
Writes a table, a figure and a film. Takes about half a minute on one core.
"""

import argparse
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from sklearn.linear_model import LogisticRegression

from pyro_vae import fit, latents
from pyro_vae.datasets import Batches, load_digits
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

LATENT_DIM = 10
PATHS: list[Any] = ["linear", "spherical"]
AMOUNTS = [-2, -1, 0, 1, 2]
SHOWN = [(3, 8), (8, 3), (5, 6), (0, 6), (1, 7), (7, 2), (4, 9), (9, 5), (6, 4), (2, 1)]


def train(x: torch.Tensor, num_epochs: int) -> tuple[VAE, AmortizedNormal]:
    """Trains by SVI with Adam; the noise of the pixels is learnt, too."""
    decoder, prior = MLP(LATENT_DIM, [200, 200], 64), StandardNormalPrior(LATENT_DIM)
    model = VAE(decoder, Normal(0.2, learn=True), prior)
    guide = AmortizedNormal(MLP(64, [200, 200], 2 * LATENT_DIM))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    fit(svi, Batches(x, batch_size=100), num_epochs)
    return model, guide


def slant(x: torch.Tensor) -> torch.Tensor:
    """Columns to the right for each row upwards, from second moments of the ink: ``(batch,)``."""
    ink, at = x.clamp(min=0).reshape(-1, 8, 8), torch.arange(8, dtype=x.dtype)
    ink = ink / ink.sum((1, 2), keepdim=True)
    right, up = at - (ink.sum(1) @ at)[:, None], (ink.sum(2) @ at)[:, None] - at
    return torch.einsum("nij,ni,nj->n", ink, up, right) / (ink.sum(2) * up**2).sum(-1)


def halfway(pair: Any, judge: Any, x: torch.Tensor, x_train: torch.Tensor) -> pd.DataFrame:
    """What lies halfway between random pairs of digits, beside the digits and the prior."""
    ends, rows = (x, x[torch.randperm(len(x))]), []
    found = {"digits": latents.reconstruct(*pair, x), "prior": latents.generate(pair[0], x)}
    for path in PATHS:
        found[f"halfway, {path}"] = latents.interpolate(*pair, *ends, num_steps=3, path=path)[1]
    for codes, images in found.items():
        p = judge.predict_proba(images.numpy()).max(-1).mean()
        nearest = torch.cdist(images, x_train).min(-1).values / 8  # The root of 64 pixels.
        rows.append({"codes": codes, "p of class": p, "RMS to nearest": float(nearest.mean())})
    return pd.DataFrame(rows)


def main(args: argparse.Namespace) -> pd.DataFrame:
    """Trains, measures, prints, draws; returns the table of attribute vectors."""
    pyro.set_rng_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (x, y), (x_test, y_test) = load_digits(dequantize=False)
    pair, lean, rows = train(x, args.epochs), slant(x), []
    judge = LogisticRegression(max_iter=2000).fit(x.numpy(), y.numpy())
    vectors: dict[Any, torch.Tensor] = {}
    for a, b in permutations(range(10), 2):
        either = (y == a) | (y == b)
        vectors[a, b] = latents.attribute_vector(pair[1], x[either], y[either] == b)
    usual = torch.stack([lean[y == label].median() for label in range(10)])
    vectors["slant"] = latents.attribute_vector(pair[1], x, lean > lean.median())
    vectors["slant, within"] = latents.attribute_vector(pair[1], x, lean > usual[y], within=y)
    for name, vector in vectors.items():
        kind = name if isinstance(name, str) else "all 90 pairs of classes"
        some = y_test >= 0 if kind == name else y_test == name[0]
        moved = latents.move(*pair, x_test[some], vector, AMOUNTS)
        for amount, images in zip(AMOUNTS, moved, strict=True):
            found = torch.as_tensor(judge.predict(images.numpy()))
            kept = float((found == y_test[some]).double().mean())
            new = None if kind == name else float((found == name[1]).double().mean())
            rows.append([kind, amount, float(slant(images).mean()), kept, new])
    table = pd.DataFrame(rows, columns=["vector", "amount", "slant", "own class", "new class"])
    table = table.groupby(["vector", "amount"], as_index=False).mean()
    table.to_csv(args.out / "latent_arithmetic.csv", index=False)
    print(f"\nReal held-out digits classified correctly: {judge.score(x_test, y_test):.1%}\n")
    print(halfway(pair, judge, x_test, x).round(3).to_string(index=False))
    print("\nHeld-out digits moved along attribute vectors, and the share in each class\n")
    print(table.round(3).to_string(index=False, na_rep=""))
    draw(pair, x_test, y_test, vectors, table, args.out)
    print(f"\nThe table, the figure and the film are in {args.out}/")
    return table


def draw(pair: Any, x: torch.Tensor, y: torch.Tensor, vectors: Any, table: Any, out: Path) -> None:
    """Writes the figure and the film."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    digits = torch.stack([x[y == label][0] for label in range(10)])
    ends = digits[[0, 3, 8, 2, 5]], digits[[7, 4, 1, 6, 9]]
    between = [latents.interpolate(*pair, *ends, num_steps=10, path=path) for path in PATHS]
    to, values = torch.linspace(0, 1.5, 10), torch.linspace(-2, 2, 10)
    turning = [latents.move(*pair, digits[[a]], vectors[a, b], to) for a, b in SHOWN]
    leaning = latents.move(*pair, digits, vectors["slant, within"], values)
    strips = {
        "between digits, linear above spherical": torch.stack(between).permute(2, 0, 1, 3),
        "random walks in the prior": latents.walk(pair[0], digits, num_steps=10).transpose(0, 1),
        "one coordinate, -2 to 2": latents.traverse(*pair, digits[[5]], values=values),
        "towards another class, by 0 to 1.5": torch.stack(turning),
        "slant within classes, by -2 to 2": leaning.transpose(0, 1),
    }
    figure, axes = plt.subplots(2, 3, figsize=(15, 10), layout="tight")
    for ax, (title, images) in zip(axes.flat, strips.items(), strict=False):
        plots.plot_images(images.reshape(-1, 64), 10, ax=ax).set_title(title)
    for name, part in table[table["new class"].isna()].groupby("vector"):
        axes[1, 2].plot(part["slant"], part["own class"], "o-", label=name)
    axes[1, 2].set(xlabel="mean slant", ylabel="share that keeps its class", ylim=(0, 1))
    axes[1, 2].legend(frameon=False)
    figure.savefig(out / "latent_arithmetic.png", dpi=110)
    plt.close(figure)
    film = latents.loop(pair[0], x[:18], num_steps=100)
    plots.save_gif(film, out / "latent_arithmetic.gif", 6, zoom=6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs = 2
    main(arguments)
