"""Two views of a digit, trained with parts of them missing: product, mixture, mixture of products.

    python examples/multimodal_digits.py --out results

Image and label, left and right half, and with ``--data-root`` a digit of 8x8 pixels and one of
MNIST of the same class. For each guide and 0, 30 and 60 % of all modalities missing in training
it prints the held-out log-likelihoods log p(a, b), log p(a), log p(b), log p(a | b), log p(b | a)
in nats per row, and how often what is generated is of the right class, beside the accuracy of the
classifiers that judge it. The product is trained by the bounds of all subsets (Wu and Goodman
2018), the mixtures (Shi et al. 2019, Sutter et al. 2021) by bounds with particles from all their
components. With nothing missing expect the product ahead in log p(a, b) and the mixtures in
coherence: all but every image they make for a label is of that class, of the product's every
second. Missing modalities cost coherence everywhere, and the product its lead. Of the halves the
product can put log p(a | b) below log p(a): on held-out data what it learnt of one from the other
misleads. Where k > 0.7 few particles carry the weight of a row: +- MC is understated there, and
log p rather too low. A picture for each data set: given and generated. Takes about ten minutes on
one core.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.linear_model import LogisticRegression
from torch import nn

from pyro_vae import evaluation, fit, guides, importance_weighted_log_likelihood, latents
from pyro_vae.datasets import Batches, drop_modalities, load_digits, load_mnist, pair_by_class
from pyro_vae.likelihoods import Categorical, Normal
from pyro_vae.models import MultimodalVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceIWAE_ELBO, TraceSubsets_ELBO
from pyro_vae.priors import StandardNormalPrior

Args = argparse.Namespace
Batch = dict[str, torch.Tensor]
Pair = tuple[MultimodalVAE, Any]
GUIDES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "product": (guides.ProductOfExperts, lambda: TraceSubsets_ELBO(Trace_ELBO(), "joint+single")),
    "mixture": (
        guides.MixtureOfExperts,
        lambda: TraceIWAE_ELBO(1, num_groups=2, stratified=True),
    ),
    "mixture of products": (
        guides.MixtureOfProducts,
        lambda: TraceIWAE_ELBO(1, num_groups=3, stratified=True),
    ),
}


def load(args: Args) -> dict[str, list[tuple[Batch, torch.Tensor]]]:
    """By name of the data: training and test set, each a batch of two modalities and labels."""
    digits = load_digits(seed=args.seed)
    images = [x.reshape(-1, 8, 8) for x, _ in digits]
    labels = [y for _, y in digits]
    views = {
        "image + label": [
            {"image": x.flatten(1), "label": y} for x, y in zip(images, labels, strict=True)
        ],
        "halves": [{"left": x[..., :4].flatten(1), "right": x[..., 4:].flatten(1)} for x in images],
    }
    if args.data_root is not None:
        mnist = []
        for x, (images_of_mnist, y), (_, own) in zip(
            images, load_mnist(args.data_root), digits, strict=True
        ):
            rows, partners = pair_by_class(own, y, seed=args.seed)
            mnist.append({"digit": x[rows].flatten(1), "mnist": images_of_mnist[partners]})
        views["digits + MNIST"] = mnist
    return {name: list(zip(parts, labels, strict=True)) for name, parts in views.items()}


def build(guide: str, batch: Batch, args: Args) -> Pair:
    """A model of these modalities and its guide."""
    size, decoders, likelihoods, encoders = args.latent_dim, {}, {}, {}
    for name, x in batch.items():
        is_label = not x.is_floating_point()
        width = 10 if is_label else x.shape[-1]
        decoders[name] = MLP(size, [args.hidden], width)
        likelihoods[name] = (
            Categorical(event_dim=0) if is_label else Normal(0.3 * torch.ones(width), learn=True)
        )
        first = nn.Embedding(10, args.hidden) if is_label else nn.Linear(width, args.hidden)
        last = nn.Linear(args.hidden, 2 * size)
        encoders[name] = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.2), last)
    model = MultimodalVAE(decoders, likelihoods, StandardNormalPrior(size))
    return model, GUIDES[guide][0](encoders, size)


def train(guide: str, batch: Batch, missing: float, args: Args) -> Pair:
    """Trains with that fraction of all modalities missing at random."""
    pyro.set_rng_seed(args.seed)
    pair = build(guide, batch, args)
    present = drop_modalities(batch, missing, keep_one=False, seed=args.seed)
    batches = Batches(batch, present, batch_size=128)
    decay = 0.1 ** (1 / (args.epochs * len(batches)))  # the learning rate ends at a tenth
    optimizer = pyro.optim.ClippedAdam({"lr": 2e-3, "lrd": decay})
    fit(SVI(*pair, optimizer, GUIDES[guide][1]()), batches, args.epochs, progress=False)
    return pair


def classifier(x: torch.Tensor, y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logistic regression on real data; a label is its own class."""
    if not x.is_floating_point():
        return lambda label: label
    trained = LogisticRegression(max_iter=2000).fit(x.numpy(), y.numpy())
    return lambda image: torch.as_tensor(trained.predict(image.numpy()))


def evaluate(pair: Pair, batch: Batch, labels: Any, judges: Any, args: Args) -> dict[str, float]:
    """Log-likelihoods and coherence of held-out rows."""
    a, b = batch
    settings: dict[str, Any] = {"num_particles": args.num_particles}
    joint = importance_weighted_log_likelihood(*pair, batch, **settings)
    row = {"p(a,b)": joint.mean(), "+- rows": joint.data_standard_error()}
    row["+- MC"] = joint.mean_standard_error()
    for key, name in (("p(a)", a), ("p(b)", b)):
        alone = importance_weighted_log_likelihood(*pair, {name: batch[name]}, **settings)
        row[key] = alone.mean()
    for key, name in (("p(a|b)", b), ("p(b|a)", a)):
        rest = evaluation.conditional_log_likelihood(*pair, batch, given=[name], **settings)
        row[key] = rest.mean()
    row["k>0.7"] = float((joint.pareto_k > 0.7).double().mean())
    found = evaluation.coherence(*pair, batch, labels, judges, num_samples=5)
    row |= {"a>b": found.cross[(a,), b].value, "b>a": found.cross[(b,), a].value}
    return row | {"agree": found.joint.value if found.joint else float("nan")}


def pictures(name: str, x: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Images ``(rows, height, width)`` of a modality; a half keeps its place, a label is a mean."""
    if name == "label":
        return prototypes[x]
    if name in ("left", "right"):
        side = x.reshape(-1, 8, 4)
        blank = torch.zeros_like(side)
        return torch.cat([side, blank] if name == "left" else [blank, side], -1)
    width = round(x.shape[-1] ** 0.5)
    image = x.reshape(-1, width, width)
    return image if width == 8 else nn.functional.interpolate(image.unsqueeze(1), 8).squeeze(1)


def draw(name: str, pairs: Any, data: Any, args: Args) -> None:
    """A grid for each guide and direction: on the left what is given, then what is generated."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    (batch, labels), (test, y) = data
    first = next(iter(batch.values()))
    means = [first[labels == k].mean(0) for k in range(10)]
    prototypes = torch.stack(means).reshape(10, 8, -1)
    rows = torch.stack([(y == k).nonzero()[0, 0] for k in range(10)])
    figure, panels = plt.subplots(2, len(pairs), figsize=(4 * len(pairs), 10), layout="tight")
    for column, (guide, pair) in zip(panels.T, pairs.items(), strict=True):
        for ax, (given, target) in zip(column, (list(batch), list(batch)[::-1]), strict=True):
            x = test[given][rows]
            shown = [pictures(given, x, prototypes)]
            for _ in range(8):
                made = latents.reconstruct(
                    *pair, {given: x, target: None}, site=f"x_{target}", sample=True
                )
                beside = shown[0] if given in ("left", "right") else 0
                shown.append(pictures(target, made, prototypes) + beside)
            plots.plot_images(torch.stack(shown, 1).flatten(0, 1), 9, ax=ax)
            ax.set_title(f"{guide}: {given}, then {target}", fontsize=9)
    figure.savefig(args.out / f"multimodal_{name.replace(' + ', '_').lower()}.png", dpi=120)
    plt.close(figure)


def main(args: Args) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    table = []
    for name, data in load(args).items():
        (batch, labels), (test, y) = data
        judges = {modality: classifier(x, labels) for modality, x in batch.items()}
        accuracy = {m: float((judge(test[m]) == y).double().mean()) for m, judge in judges.items()}
        a, b = batch
        print(f"\n{name}: a is {a}, b is {b}; {len(y)} held-out rows, nats per row")
        print("accuracy of the classifiers on real data:", accuracy)
        rows: list[dict[str, Any]] = []
        whole: dict[str, Pair] = {}
        for missing in args.missing:
            for guide in GUIDES:
                pair = train(guide, batch, missing, args)
                whole.setdefault(guide, pair)
                row: dict[str, Any] = {"guide": guide, "missing": missing}
                rows.append(row | evaluate(pair, test, y, judges, args))
        print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))
        table += [{"data": name} | row for row in rows]
        draw(name, whole, data, args)
    result = pd.DataFrame(table)
    result.to_csv(args.out / "multimodal_digits.csv", index=False)
    print(f"\nThe table and the figures are in {args.out}/")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, help="folder with MNIST, for the third data set")
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--missing", type=float, nargs="+", default=[0.0, 0.3, 0.6])
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs, arguments.num_particles, arguments.hidden = 2, 20, 20
        arguments.missing = arguments.missing[:1]
    try:
        main(arguments)
    except FileNotFoundError as err:
        parser.error(str(err))
