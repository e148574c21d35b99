"""Categorical latents: summed over, sampled by score, relaxed, straight-through.

    python examples/categorical.py --out results

Trains VAEs on binarised digits whose code is one latent of 20 categories, then three of 6: with the
sum over all configurations in the model or under a guide (Pyro's TraceEnum_ELBO), by the score
function with its control variate (VIMCO, Mnih and Rezende 2016, https://arxiv.org/abs/1602.06725)
and without, with straight-through gradients (Bengio et al. 2013; Jang et al. 2017,
https://arxiv.org/abs/1611.01144) and with relaxed samples (Maddison et al. 2017,
https://arxiv.org/abs/1611.00712). Prints held-out log-likelihoods of the discrete model, exact sums
over all configurations, beside the ELBO under the guide. Expect the sums and VIMCO within half a
nat of one another, straight-through gradients, which are biased, one to two nats behind, and the
other two hardly better than independent pixels: the score of a single sample is too noisy here, and
the relaxed density pays a far larger KL than the categories would. The picture shows the mean
image of each category. Takes about two minutes on one core.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_vae import fit, importance_weighted_log_likelihood, latents
from pyro_vae.datasets import Batches, load_digits
from pyro_vae.evaluation import LogLikelihoodEstimate, elbo_terms
from pyro_vae.guides import AmortizedCategorical, AmortizedOneHot
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceIWAE_ELBO
from pyro_vae.priors import CategoricalPrior, OneHotPrior

Args = argparse.Namespace
SIZES = [(1, 20), (3, 6)]
INTEGERS: dict[str, Any] = {
    "summed in the model": TraceEnum_ELBO(max_plate_nesting=1),
    "summed under the guide": TraceEnum_ELBO(max_plate_nesting=1),
    "score function": Trace_ELBO(),
    "score function, VIMCO": TraceIWAE_ELBO(10, "vimco"),
}
ONE_HOTS: dict[str, Any] = {
    "straight-through": TraceMeanField_ELBO(),
    "gumbel-straight-through": TraceMeanField_ELBO(),
    "gumbel-softmax": Trace_ELBO(),
}


def nothing(x: torch.Tensor) -> None:
    """A guide without latents: all of the model's are summed out."""


def build(method: str, num: int, size: int, args: Args) -> tuple[VAE, Any]:
    """The model and its guide."""
    decoder, network = MLP(num * size, [args.hidden], 64), MLP(64, [args.hidden], num * size)
    if method in INTEGERS:
        model = VAE(decoder, Bernoulli(), CategoricalPrior(num, size))
        guide = AmortizedCategorical(network, num, size)
        return model, nothing if method == "summed in the model" else guide
    of_guide = None if method == "straight-through" else args.temperature
    of_prior = of_guide if method == "gumbel-softmax" else None
    model = VAE(decoder, Bernoulli(), OneHotPrior(num, size, temperature=of_prior))
    how: dict[str, Any] = {"estimator": method, "temperature": of_guide}
    return model, AmortizedOneHot(network, num, size, **how)


def train(method: str, num: int, size: int, x: torch.Tensor, args: Args) -> tuple[VAE, Any]:
    """Trains by SVI with Adam."""
    pyro.set_rng_seed(args.seed)
    model, guide = build(method, num, size, args)
    batches = Batches(x, batch_size=100)
    decay = 0.1 ** (1 / (args.epochs * len(batches)))
    optimizer = pyro.optim.ClippedAdam({"lr": 5e-3, "lrd": decay})
    svi = SVI(model, guide, optimizer, (INTEGERS | ONE_HOTS)[method])
    fit(svi, batches, args.epochs, progress=False)
    return model, guide


def exact(model: VAE, num: int, size: int, x: torch.Tensor) -> LogLikelihoodEstimate:
    """log p(x), the sum over all configurations, with the decoder of a model."""
    summed = VAE(model.decoder, model.likelihood, CategoricalPrior(num, size))
    evaluate = importance_weighted_log_likelihood
    parts = [evaluate(summed, nothing, rows, num_particles=1) for rows in x.split(60)]
    return LogLikelihoodEstimate.cat(parts)


def main(args: Args) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    (x, _), (x_test, _) = load_digits(dequantize=False)
    x, x_test = (x > 0.5).to(x), (x_test > 0.5).to(x)
    rows, models = [], {}
    for num, size in SIZES:
        for method in (*INTEGERS, *ONE_HOTS):
            print(f"{num} x {size}, {method}")
            start = time.perf_counter()
            model, guide = train(method, num, size, x, args)
            seconds = time.perf_counter() - start
            models[num, method] = model
            estimate = exact(model, num, size, x_test)
            row: dict[str, Any] = {"latents": f"{num} x {size}", "gradient": method}
            row |= {"log-lik.": estimate.mean(), "+- images": estimate.data_standard_error()}
            if guide is not nothing:
                row["ELBO"] = float(elbo_terms(model, guide, x_test, num_particles=20).elbo.mean())
            rows.append(row | {"seconds": seconds})
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "categorical.csv", index=False)
    print(f"\n{len(x_test)} held-out binary digits, nats per image\n")
    print(table.to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    draw({method: model for (num, method), model in models.items() if num == 1}, x, args.out)
    print(f"\nThe table and the figure are in {args.out}/")
    return table


def draw(models: dict[str, VAE], x: torch.Tensor, out: Path) -> None:
    """Writes the mean image of each category, a row for each model."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    figure, panels = plt.subplots(len(models), 1, figsize=(12, 1.1 * len(models)), layout="tight")
    _, size = SIZES[0]
    for ax, (method, model) in zip(panels, models.items(), strict=True):
        code = torch.arange(size) if method in INTEGERS else torch.eye(size).unsqueeze(1)
        images = latents.decode(model, {"z": code}, x[:size]).mean
        plots.plot_images(images, size, ax=ax)
        ax.set_title(method, fontsize=9)
    figure.savefig(out / "categorical.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.5, help="of relaxed samples")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs, arguments.hidden = 1, 20
    main(arguments)
