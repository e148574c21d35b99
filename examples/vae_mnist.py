"""A VAE on dynamically binarised MNIST, in the setting of the IWAE paper (one layer, k = 1).

    python examples/vae_mnist.py --data-root data --download --epochs 20

Burda et al. (2016), Importance weighted autoencoders, report a test log-likelihood of -86.76
nats (K = 5000) after 3,280 epochs; ``--epochs`` scales their learning-rate schedule, and
``--schedule cosine`` suits short trainings better. An epoch takes 10 to 20 seconds on one core,
the evaluation of all 10,000 test images about ten minutes.
"""

import argparse
import math
import struct
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from tqdm import tqdm

from pyro_vae import LogLikelihoodEstimate, fit, importance_weighted_log_likelihood
from pyro_vae.datasets import Batches, binarize, load_digits, load_mnist
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior


def build(x_mean: torch.Tensor, latent_dim: int, hidden: list[int]) -> tuple[VAE, AmortizedNormal]:
    """Glorot-uniform weights; the decoder starts at the mean of each pixel."""
    decoder = MLP(latent_dim, hidden[::-1], len(x_mean), activation=nn.Tanh)
    encoder = MLP(len(x_mean), hidden, 2 * latent_dim, activation=nn.Tanh)
    for layer in [*decoder, *encoder]:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        decoder[-1].get_parameter("bias").copy_(x_mean.clamp(0.001, 0.999).logit())
    vae = VAE(decoder, Bernoulli(), StandardNormalPrior(latent_dim))
    return vae, AmortizedNormal(encoder)


def learning_rate(schedule: str, progress: float) -> float:
    """Factor on the learning rate at a fraction of the training.

    The paper's: 10^(-i/7) for 3^i of 3,280 epochs, i = 0 ... 7. Scaled down, two thirds of a
    short training run at its lowest rate; there a cosine gets further.
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * min(progress, 1))) / 2
    epochs_done, stage = progress * 3280, 0
    while stage < 7 and epochs_done >= 3**stage:
        epochs_done -= 3**stage
        stage += 1
    return 10 ** (-stage / 7)


def write_tiny_mnist(root: Path) -> Path:
    """Scikit-learn's digits in MNIST's file format, so that the smoke test needs no download."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, (x, y) in zip(("train", "t10k"), load_digits(dequantize=False), strict=True):
        small = x[:200].reshape(-1, 1, 8, 8)
        images = nn.functional.interpolate(small, (28, 28)).mul(255).to(torch.uint8)
        header = struct.pack(">4i", 2051, len(images), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        labels = y[:200].to(torch.uint8)
        header = struct.pack(">2i", 2049, len(labels))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return root


def main(args: argparse.Namespace) -> None:
    """Trains, evaluates and prints."""
    pyro.set_rng_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    root = write_tiny_mnist(args.out / "tiny_mnist") if args.smoke_test else args.data_root
    (x_train, _), (x_test, _) = load_mnist(root, download=args.download)
    x_train, x_test = x_train.to(args.device), binarize(x_test[: args.num_test]).to(args.device)
    vae, guide = build(x_train.mean(0).cpu(), args.latent_dim, args.hidden)
    vae.to(args.device), guide.to(args.device)

    batches = Batches(x_train, batch_size=args.batch_size, transform=binarize)
    num_steps = args.epochs * len(batches)
    optimizer = pyro.optim.LambdaLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 1e-3, "eps": 1e-4},
            "lr_lambda": lambda step: learning_rate(args.schedule, step / num_steps),
        }
    )
    svi = SVI(vae, guide, optimizer, TraceMeanField_ELBO())
    validation = Batches(x_test, batch_size=1000, shuffle=False)
    history = fit(svi, batches, args.epochs, validation=validation, schedules=[optimizer])
    history.to_frame().to_csv(args.out / "vae_mnist_history.csv")
    torch.save({"vae": vae.state_dict(), "guide": guide.state_dict()}, args.out / "vae_mnist.pt")

    estimate = LogLikelihoodEstimate.cat(
        [
            importance_weighted_log_likelihood(vae, guide, x, num_particles=args.num_particles)
            for x in tqdm(x_test.split(100), desc="evaluating", unit="batch")
        ]
    )
    reliable = float((estimate.pareto_k < 0.7).double().mean())
    print(f"{len(history.loss)} epochs, {len(estimate)} test images, K = {args.num_particles}")
    print(f"test ELBO            {float(estimate.elbo.mean()):.2f} nats per image")
    print(
        f"test log-likelihood  {estimate.mean():.2f} nats per image "
        f"(+- {estimate.data_standard_error():.2f} over images, "
        f"+- {estimate.mean_standard_error():.3f} Monte Carlo; {reliable:.0%} with k < 0.7)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="holds MNIST/raw")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is missing")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--schedule", choices=["paper", "cosine"], default="paper")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--latent-dim", type=int, default=50)
    parser.add_argument("--hidden", type=int, nargs="+", default=[200, 200])
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--num-test", type=int, default=10_000, help="test images to evaluate")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    # On matrices this small a second thread costs more in waiting than it computes.
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
