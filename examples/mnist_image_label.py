"""MNIST images and their labels as two modalities, in the setting of the MVAE paper.

    python examples/mnist_image_label.py --data-root data --download --epochs 60

Wu and Goodman (2018), Multimodal generative models for scalable weakly-supervised learning: 64
latents, a product of experts trained by the sum of the bounds of both and of each alone, the KL
warmed up over the first 40 % of the epochs, the label's likelihood weighted more in training
(``--label-weight``; evaluation ignores that). After 500 epochs they report
log p(x, y) = -86.26 nats on the test set.
Images are binarised at every batch, the test set once. An epoch takes about 40 seconds on one
core, the evaluation of 10,000 test rows with K = 1,000 about half an hour.
"""

import argparse
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from tqdm import tqdm
from vae_mnist import write_tiny_mnist

from pyro_vae import LogLikelihoodEstimate, fit, importance_weighted_log_likelihood, scale_kl
from pyro_vae.datasets import Batches, binarize, load_mnist
from pyro_vae.evaluation import conditional_log_likelihood
from pyro_vae.guides import ProductOfExperts
from pyro_vae.likelihoods import Bernoulli, Categorical
from pyro_vae.models import MultimodalVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceSubsets_ELBO
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

Batch = dict[str, torch.Tensor]


def build(x_mean: torch.Tensor, args: argparse.Namespace) -> tuple[Any, Any]:
    """The networks of the paper; the image's decoder starts at the mean of each pixel."""
    size, width = args.latent_dim, args.hidden
    decoder = MLP(size, 3 * [width], len(x_mean), activation=nn.SiLU)
    with torch.no_grad():
        decoder[-1].get_parameter("bias").copy_(x_mean.clamp(0.001, 0.999).logit())
    model = MultimodalVAE(
        {"image": decoder, "label": MLP(size, 3 * [width], 10, activation=nn.SiLU)},
        {"image": Bernoulli(), "label": Categorical(event_dim=0)},
        StandardNormalPrior(size),
        weights={"label": args.label_weight},
    )
    from_image = MLP(len(x_mean), 2 * [width], 2 * size, activation=nn.SiLU)
    from_label = MLP(width, [width], 2 * size, activation=nn.SiLU)
    embedding = nn.Sequential(nn.Embedding(10, width), nn.SiLU(), from_label)
    return model, ProductOfExperts({"image": from_image, "label": embedding}, size)


def binarized(batch: Batch) -> Batch:
    """The images drawn anew."""
    return {**batch, "image": binarize(batch["image"])}


def report(name: str, parts: list[LogLikelihoodEstimate]) -> None:
    """Prints one log-likelihood."""
    estimate = LogLikelihoodEstimate.cat(parts)
    unreliable = float((estimate.pareto_k > 0.7).double().mean())
    print(
        f"{name:12} {estimate.mean():8.2f} nats per row "
        f"(+- {estimate.data_standard_error():.2f} over rows, "
        f"+- {estimate.mean_standard_error():.3f} Monte Carlo; {unreliable:.0%} with k > 0.7)"
    )


def main(args: argparse.Namespace) -> None:
    """Trains, evaluates and prints."""
    pyro.set_rng_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    root = write_tiny_mnist(args.out / "tiny_mnist") if args.smoke_test else args.data_root
    (x, y), (x_test, y_test) = load_mnist(root, download=args.download)
    train: Batch = {"image": x.to(args.device), "label": y.to(args.device)}
    test = {"image": binarize(x_test).to(args.device), "label": y_test.to(args.device)}
    test = {name: part[: args.num_test] for name, part in test.items()}
    model, guide = build(x.mean(0), args)
    model.to(args.device), guide.to(args.device)

    batches = Batches(train, batch_size=100, transform=binarized)
    num_steps = args.epochs * len(batches)
    beta = LinearWarmup(max(1, int(0.4 * num_steps)))
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-3, "lrd": 0.1 ** (1 / num_steps)})
    objective = TraceSubsets_ELBO(TraceMeanField_ELBO(), "joint+single")
    svi = SVI(scale_kl(model, beta), scale_kl(guide, beta), optimizer, objective)
    history = fit(svi, batches, args.epochs, schedules=[beta])
    history.to_frame().to_csv(args.out / "mnist_image_label_history.csv")
    states = {"model": model.state_dict(), "guide": guide.state_dict()}
    torch.save(states, args.out / "mnist_image_label.pt")

    joint, image, given = [], [], []
    settings: dict[str, Any] = {"num_particles": args.num_particles}
    rows = [
        {n: part[r] for n, part in test.items()} for r in torch.arange(args.num_test).split(100)
    ]
    for part in tqdm(rows, desc="evaluating", unit="batch"):
        joint.append(importance_weighted_log_likelihood(model, guide, part, **settings))
        alone = {"image": part["image"]}
        image.append(importance_weighted_log_likelihood(model, guide, alone, **settings))
        given.append(conditional_log_likelihood(model, guide, part, given=["label"], **settings))
    print(f"{len(history.loss)} epochs, {args.num_test} test rows, K = {args.num_particles}")
    report("log p(x, y)", joint)
    report("log p(x)", image)
    report("log p(x | y)", given)
    print("Where k > 0.7 few particles count: log p is too low, and the Monte Carlo error, too.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="holds MNIST/raw")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is missing")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--label-weight", type=float, default=10.0)
    parser.add_argument("--latent-dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--num-test", type=int, default=10_000, help="test rows to evaluate")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds on tiny data")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs, arguments.num_particles, arguments.num_test = 1, 20, 20
    try:
        main(arguments)
    except FileNotFoundError as err:
        parser.error(str(err))
