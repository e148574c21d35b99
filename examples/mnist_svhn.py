"""One code for two kinds of pictures: a handwritten digit and a house number of the same class.

    python examples/mnist_svhn.py --data-root data --download --guide moe --copies 20

Each image of MNIST is paired with 20 of SVHN, as in Shi et al. (2019), Variational mixture-of-
experts autoencoders for multi-modal deep generative models, https://arxiv.org/abs/1911.03393. The
guide is a mixture of experts (theirs), a product (Wu and Goodman 2018) or a mixture of products
(Sutter et al. 2021). Nets, likelihoods and objective are our own, so that the numbers compare the
guides with one another, not with the papers. A product learns what to do with one view alone only
if it sees such data: ``--guide poe`` therefore hides each view of a pair with probability 0.5, so
that both, the first or the second are seen equally often; ``--missing`` sets that for any guide.
``--private-dim`` gives each view latents of its own, for instance for its colours.

Prints log-likelihoods of pairs, of one view and of one view given the other, and how often
classifiers recognise what is generated; writes a picture. MNIST is binarised, SVHN dequantised.
An epoch has 600 steps for each of the copies: with 20, about half an hour on one core.
``--smoke-test`` needs no download: scikit-learn's digits stand in for both data sets.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, pad

from pyro_vae import LogLikelihoodEstimate, fit, importance_weighted_log_likelihood, latents
from pyro_vae import datasets as ds
from pyro_vae.evaluation import coherence, conditional_log_likelihood
from pyro_vae.guides import MixtureOfExperts, MixtureOfProducts, ProductOfExperts
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.models import MultimodalVAE
from pyro_vae.nets import ConvDecoder, ConvEncoder
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.priors import StandardNormalPrior

Tensors = dict[str, torch.Tensor]
SHAPES = {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}
CHANNELS = {"mnist": [32, 64], "svhn": [32, 64, 128]}
GUIDES = {"poe": ProductOfExperts, "moe": MixtureOfExperts, "mopoe": MixtureOfProducts}


def stand_ins() -> Any:
    """Scikit-learn's digits in the shapes of MNIST and of SVHN, there in two random colours."""
    mnist, svhn = [], []
    for x, y in ((x[:500], y[:500]) for x, y in ds.load_digits(dequantize=False)):
        small, (ink, paper) = x.reshape(-1, 1, 8, 8), torch.rand(2, len(x), 3, 1, 1)
        mnist.append((pad(interpolate(small, scale_factor=3.0), (2, 2, 2, 2)), y))
        svhn.append((paper.lerp(ink, interpolate(small, scale_factor=4.0)), y))
    return mnist, svhn


def noisy(images: Tensors) -> Tensors:
    """What the likelihoods are of: binary MNIST, SVHN with noise of one grey level."""
    svhn = (255 * images["svhn"] + torch.rand_like(images["svhn"])) / 256
    return {"mnist": ds.binarize(images["mnist"]), "svhn": svhn}


def build(guide: str, latent_dim: int, private_dim: int) -> tuple[MultimodalVAE, nn.Module]:
    """A model and its guide; the private latents take up style."""

    def encoders(width: int) -> dict[str, nn.Module]:
        return {m: ConvEncoder(SHAPES[m], CHANNELS[m], 2 * width) for m in SHAPES if width}

    code_dim = latent_dim + private_dim
    decoders = {m: ConvDecoder(code_dim, CHANNELS[m][::-1], SHAPES[m]) for m in SHAPES}
    likelihoods = {"mnist": Bernoulli(event_dim=3), "svhn": Normal(0.3, learn=True, event_dim=3)}
    private = {m: private_dim for m in SHAPES if private_dim}
    # In training a pixel of MNIST counts as much as SVHN's more numerous ones, as in the paper.
    weights = {"mnist": math.prod(SHAPES["svhn"]) / math.prod(SHAPES["mnist"])}
    prior = StandardNormalPrior(latent_dim)
    vae = MultimodalVAE(decoders, likelihoods, prior, private, weights=weights)
    return vae, GUIDES[guide](encoders(latent_dim), latent_dim, encoders(private_dim))


def train_classifier(name: str, x: torch.Tensor, y: torch.Tensor, num_epochs: int) -> nn.Module:
    """A small convolutional network from images to logits."""
    net = ConvEncoder(SHAPES[name], CHANNELS[name], 10).to(x.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(num_epochs):
        for images, labels in ds.Batches(x, y, batch_size=100):
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            optimizer.step()
    return net


def evaluate(vae: nn.Module, guide: nn.Module, x: Tensors, num_particles: int) -> pd.DataFrame:
    """Log-likelihoods of all, of one view, and of one given the other."""

    def row(name: str, function: Any, data: Tensors, **settings: Any) -> dict[str, Any]:
        parts = zip(*(tensor.split(50) for tensor in data.values()), strict=True)
        batches = (dict(zip(data, part, strict=True)) for part in parts)
        estimate = LogLikelihoodEstimate.cat(
            [function(vae, guide, b, num_particles=num_particles, **settings) for b in batches]
        )
        return {
            "": f"log p({name})",
            "nats per pair": estimate.mean(),
            "+- pairs": estimate.data_standard_error(),
            "+- MC": estimate.mean_standard_error(),
            "k > 0.7": float((estimate.pareto_k > 0.7).double().mean()),
        }

    rows = [row("mnist, svhn", importance_weighted_log_likelihood, x)]
    rows += [row(m, importance_weighted_log_likelihood, {m: x[m]}) for m in x]
    for target, given in (("mnist", "svhn"), ("svhn", "mnist")):
        rows.append(row(f"{target} | {given}", conditional_log_likelihood, x, given=[given]))
    return pd.DataFrame(rows)


def draw(vae: nn.Module, guide: nn.Module, x: Tensors, path: Path) -> None:
    """Reconstructions, one view from the other, and both from the prior."""
    from matplotlib import pyplot as plt

    rows: Tensors = {}
    sites = ["x_mnist", "x_svhn"]
    for given, other in (("mnist", "svhn"), ("svhn", "mnist")):
        batch = {given: x[given], other: None}
        made = latents.reconstruct(vae, guide, batch, site=sites, sample=True)
        rows |= {given: x[given], f"{given} again": made[f"x_{given}"]}
        rows[f"{other} from {given}"] = made[f"x_{other}"]
    drawn = latents.generate(vae, x, site=sites)
    rows |= {f"{site[2:]} from prior": images for site, images in drawn.items()}
    num = len(x["mnist"])
    figure, panels = plt.subplots(len(rows), num, figsize=(num, len(rows)), layout="constrained")
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu(), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(args: argparse.Namespace) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table."""
    pyro.set_rng_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.smoke_test:
        print("Scikit-learn's digits stand in for MNIST and SVHN: these numbers mean nothing.")
        splits = stand_ins()
    else:
        mnist = ds.load_mnist(args.data_root, download=args.download, flatten=False)
        splits = mnist, ds.load_svhn(args.data_root, download=args.download)
    data = dict(zip(SHAPES, splits, strict=True))
    x, x_test = ({m: data[m][part][0].to(args.device) for m in data} for part in (0, 1))
    y, y_test = ({m: data[m][part][1].to(args.device) for m in data} for part in (0, 1))

    # Pairs are rows of both data sets; the images are looked up batch by batch.
    rows = dict(zip(x, ds.pair_by_class(y["mnist"], y["svhn"], copies=args.copies), strict=True))
    missing = args.missing if args.missing is not None else 0.5 * (args.guide == "poe")
    present = ds.drop_modalities(rows, missing, seed=args.seed)
    batches = ds.Batches(
        rows, present, batch_size=100, transform=lambda r: noisy({m: x[m][r[m]] for m in x})
    )
    vae, guide = build(args.guide, args.latent_dim, args.private_dim)
    vae.to(args.device), guide.to(args.device)
    # Two or three particles, one of each component of a mixture; a product has but one.
    num = {"poe": 1, "moe": 2, "mopoe": 3}[args.guide]
    elbo = TraceIWAE_ELBO(1, num_groups=num, stratified=num > 1)
    svi = SVI(vae, guide, pyro.optim.ClippedAdam({"lr": 1e-3}), elbo)
    fit(svi, batches, args.epochs)

    rows_test = dict(zip(x, ds.pair_by_class(y_test["mnist"], y_test["svhn"]), strict=True))
    pairs = noisy({m: x_test[m][rows_test[m]] for m in x})
    labels = y_test["mnist"]
    classifiers = {m: train_classifier(m, x[m], y[m], args.classifier_epochs) for m in x}
    scores = coherence(vae, guide, {m: pairs[m][:2000] for m in x}, labels[:2000], classifiers)
    some = {m: pairs[m][: args.num_test] for m in x}
    table = evaluate(vae, guide, some, args.num_particles)
    table.to_csv(args.out / f"mnist_svhn_{args.guide}.csv", index=False)
    print(f"\n{args.guide}: {len(some['mnist'])} held-out pairs, K = {args.num_particles}")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    print("Where k > 0.7 few particles count: log p is then too low, given another view too low or")
    print(f"too high, and +- MC understates it.\n\n{scores}")
    draw(vae, guide, {m: pairs[m][:10] for m in x}, args.out / f"mnist_svhn_{args.guide}.png")
    print(f"\nThe table and the figure are in {args.out}/")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--download", action="store_true", help="fetch MNIST and SVHN if missing")
    parser.add_argument("--guide", choices=GUIDES, default="moe")
    parser.add_argument("--copies", type=int, default=20, help="partners of each image of MNIST")
    parser.add_argument("--missing", type=float, help="probability of hiding a view in training")
    parser.add_argument("--epochs", type=int, default=1, help="each over all copies")
    parser.add_argument("--latent-dim", type=int, default=20)
    parser.add_argument("--private-dim", type=int, default=0, help="latents of each view alone")
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--num-test", type=int, default=200, help="pairs for the likelihoods")
    parser.add_argument("--classifier-epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="seconds, on stand-ins")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.copies, arguments.num_particles, arguments.num_test = 1, 20, 20
        arguments.classifier_epochs = 1
    try:
        main(arguments)
    except FileNotFoundError as err:
        parser.error(str(err))
