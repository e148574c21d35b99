"""Labels for some: 100 of 1,437 digits have one, the others only show what digits look like.

    python examples/semi_supervised.py --out results

Trains M2 (Kingma et al. 2014, Semi-supervised learning with deep generative models), which sums
over classes where no label is known, with and without the classification term, and M2 on codes
of a VAE (M1+M2). Prints accuracies on 360 held-out digits beside that of a network that sees the
100 alone: mean and standard error over five draws of labels and weights. Expect M2 two points
above the network, M1+M2 within the error of it, and M2 without the term far below: it settles on
clusters of its own. Settings were chosen for M2 by the true classes of training digits, more
than 100 labels tell. The picture has styles in rows. Takes four minutes.
"""

import argparse
from pathlib import Path

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae import fit, latents, plots
from pyro_vae.conditioning import Concatenate, OneHot
from pyro_vae.datasets import Batches, load_digits, mask_labels
from pyro_vae.guides import AmortizedNormal, AmortizedSemiSupervised
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE, SemiSupervisedVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceClassification_ELBO
from pyro_vae.priors import StandardNormalPrior

Pair = tuple[SemiSupervisedVAE, AmortizedSemiSupervised]
NUM_CLASSES, HIDDEN, WEIGHT = 10, 64, 10.0  # The weight is in nats for each labelled digit.


def classifier(width: int) -> nn.Module:
    """The same network for the guide and for supervised learning."""
    return nn.Sequential(nn.Dropout(0.1), MLP(width, [HIDDEN], NUM_CLASSES, dropout=0.3))


def supervised(x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> nn.Module:
    """Learns from the labelled digits alone."""
    net = classifier(x.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, weight_decay=1e-3)
    for _ in range(2 * args.epochs):
        for x_batch, y_batch in Batches(x, y, batch_size=25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x_batch), y_batch).backward()
            optimizer.step()
    return net.eval()


def train(
    data: tuple[torch.Tensor, ...], noise: float, weight: float, args: argparse.Namespace
) -> Pair:
    """M2 on digits, or on codes of digits; ``noise`` is in standard deviations of the data."""
    x, y, kept = data
    width, size = x.shape[1], 4
    decoder = Concatenate(MLP(size + NUM_CLASSES, [HIDDEN], width), embed=OneHot(NUM_CLASSES))
    network = MLP(width + NUM_CLASSES, [HIDDEN], 2 * size, dropout=0.1)
    encoder = Concatenate(network, embed=OneHot(NUM_CLASSES))
    likelihood, prior = Normal(noise * x.std()), StandardNormalPrior(size)
    model = SemiSupervisedVAE(decoder, likelihood, prior, NUM_CLASSES)
    guide = AmortizedSemiSupervised(classifier(width), encoder, NUM_CLASSES)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), TraceClassification_ELBO(weight))
    # The labelled rows first, so that classes have their meaning when the others join.
    fit(svi, Batches(x[kept], y[kept], batch_size=25), args.epochs // 4, progress=False)
    fit(svi, Batches(x, y, kept, batch_size=200), args.epochs)
    return model, guide


def train_m1(x: torch.Tensor, args: argparse.Namespace) -> AmortizedNormal:
    """A VAE of all digits, labels or not; returns its guide."""
    likelihood, prior = Normal(0.3 * x.std()), StandardNormalPrior(16)
    model = VAE(MLP(16, [HIDDEN], x.shape[1]), likelihood, prior)
    guide = AmortizedNormal(MLP(x.shape[1], [HIDDEN], 2 * 16, dropout=0.1))
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 3e-3}), Trace_ELBO())
    fit(svi, Batches(x, batch_size=100), args.epochs)
    return guide


def compare(seed: int, args: argparse.Namespace) -> tuple[dict[str, float], Pair]:
    """Accuracies with the labels and weights of one seed; M2 for the picture."""
    (x, y), (x_test, y_test) = load_digits(dequantize=False)
    kept = mask_labels(y, 100, seed=seed)
    y = torch.where(kept, y, -1)  # So that no method can look at the others.
    pyro.set_rng_seed(seed)

    def score(guide: AmortizedSemiSupervised, x_test: torch.Tensor) -> float:
        return float((latents.encode(guide, x_test, site="y").mode == y_test).double().mean())

    classes = supervised(x[kept], y[kept], args)(x_test).argmax(-1)
    _, plain = train((x, y, kept), 0.6, 0.0, args)
    pair, encoder = train((x, y, kept), 0.6, WEIGHT, args), train_m1(x, args)
    codes, codes_test = (latents.encode(encoder, data).mean for data in (x, x_test))
    _, of_codes = train((codes, y, kept), 0.9, WEIGHT, args)
    return {
        "network, labelled digits alone": float((classes == y_test).double().mean()),
        "M2 without the classification term": score(plain, x_test),
        "M2": score(pair[1], x_test),
        "M1+M2": score(of_codes, codes_test),
    }, pair


def main(args: argparse.Namespace) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    results = [compare(args.seed + number, args) for number in range(args.num_seeds)]
    table = pd.DataFrame([result for result, _ in results]).agg(["mean", "sem"]).T
    table.columns = pd.Index(["accuracy", "+- seeds"])
    table.to_csv(args.out / "semi_supervised.csv")
    print(f"\n360 held-out digits, 100 labels, {args.num_seeds} seeds\n")
    print(table.to_string(float_format="{:.3f}".format))
    draw(results[0][1], args.out / "semi_supervised.png")
    print(f"\nThe table and the figure are in {args.out}/")
    return table


def draw(pair: Pair, path: Path) -> None:
    """Writes styles of held-out digits, from common to unusual ones, in all classes."""
    from matplotlib import pyplot as plt

    _, (x, y) = load_digits(dequantize=False)
    styles, rows = latents.encode(pair[1], x, y, site="z").mean, []
    for row in styles.norm(dim=-1).argsort()[:: len(x) // 8][:8]:
        codes = {"z": styles[row].expand(NUM_CLASSES, -1), "y": torch.arange(NUM_CLASSES)}
        pictures = latents.decode(pair[0], codes, x[:NUM_CLASSES]).mean
        rows += [x[row, None], torch.zeros(1, x.shape[1]), pictures]
    figure, ax = plt.subplots(figsize=(8, 5.5), layout="tight")
    plots.plot_images(torch.cat(rows), NUM_CLASSES + 2, ax=ax)
    ax.set_title("a digit, and its style z in every class y")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs, arguments.num_seeds = 4, 2
    main(arguments)
