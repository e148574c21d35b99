"""Speed of training by importance-weighted bounds, beside Pyro, PyTorch by hand and the limit.

    python benchmarks/iwae_training.py

A step is the loss of a batch and its gradient, without the optimizer, of a VAE with 50 latents,
two layers of 200 hidden units and 784 pixels. The limit is the matrix products of the decoder
alone, forward and backward. All rows are measured in turn in one run; the ratios are what
counts.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable

import torch
from pyro.infer import RenyiELBO
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal

from pyro_vae.datasets import binarize
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.priors import StandardNormalPrior

LATENT_DIM, HIDDEN, NUM_PIXELS = 50, 200, 784


def by_hand(vae: VAE, guide: AmortizedNormal, x: torch.Tensor, num: int) -> None:
    """The bound as one would write it for this model alone."""
    encoder, decoder = guide.encoder.net, vae.decoder
    assert isinstance(encoder, MLP)
    loc, raw_scale = encoder(x).chunk(2, -1)
    q = Normal(loc, torch.nn.functional.softplus(raw_scale), validate_args=False)
    z = q.rsample((num,))
    log_p = Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(-1)
    pixels = TorchBernoulli(logits=decoder(z), validate_args=False)
    log_w = log_p + pixels.log_prob(x).sum(-1) - q.log_prob(z).sum(-1)
    (-(log_w.logsumexp(0) - math.log(num)).sum()).backward()


def main(args: argparse.Namespace) -> None:
    """Measures all rows in turn and prints the best of each."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device, num = torch.device(args.device), args.num_particles
    widths = [LATENT_DIM, HIDDEN, HIDDEN, NUM_PIXELS]
    prior = StandardNormalPrior(LATENT_DIM)
    vae = VAE(MLP(LATENT_DIM, [HIDDEN] * 2, NUM_PIXELS), Bernoulli(), prior).to(device)
    guide = AmortizedNormal(MLP(NUM_PIXELS, [HIDDEN] * 2, 2 * LATENT_DIM)).to(device)
    parameters = [*vae.parameters(), *guide.parameters()]
    x = binarize(torch.full((args.batch_size, NUM_PIXELS), 0.3, device=device))
    renyi = RenyiELBO(alpha=0, num_particles=num, vectorize_particles=True, max_plate_nesting=1)
    rows = num * args.batch_size
    layers = [
        (torch.randn(rows, a, device=device), torch.randn(a, b, device=device))
        for a, b in zip(widths, widths[1:], strict=False)
    ]
    grads = [torch.randn(rows, weight.shape[1], device=device) for _, weight in layers]

    def products() -> None:
        for (inputs, weight), grad in zip(layers, grads, strict=True):
            inputs @ weight
            grad @ weight.T
            inputs.T @ grad

    def ours(estimator: str) -> Callable[[], object]:
        objective = TraceIWAE_ELBO(num, estimator)  # type: ignore[arg-type]
        return lambda: objective.loss_and_grads(vae, guide, x)

    steps: dict[str, Callable[[], object]] = {
        "matrix products alone": products,
        "PyTorch by hand": lambda: by_hand(vae, guide, x, num),
        "RenyiELBO": lambda: renyi.loss_and_grads(vae, guide, x),
    }
    estimators = ["standard", "stl", "dreg", "vimco"][: 4 if num > 1 else 3]
    steps |= {f"ours, {name}": ours(name) for name in estimators}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(args.repeats):
        for name, step in steps.items():
            for _ in range(3):  # The first after another row may wait for memory.
                best[name] = min(best[name], seconds(step, parameters, device))

    print(f"batch of {len(x)}, {num} particles, {torch.get_num_threads()} threads")
    print(f"{'':24}{'of RenyiELBO':>14}{'by hand':>10}{'of the limit':>14}{'ms a step':>12}")
    for name, best_of in best.items():
        ratios = [best[other] / best_of for other in list(best)[2::-1]]
        print(f"{name:24}{ratios[0]:14.2f}{ratios[1]:10.2f}{ratios[2]:14.2f}{best_of * 1e3:12.2f}")


def seconds(
    step: Callable[[], object], parameters: Iterable[torch.nn.Parameter], device: torch.device
) -> float:
    """Duration of one step, from gradients of ``None``."""
    for parameter in parameters:
        parameter.grad = None
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--num-particles", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
