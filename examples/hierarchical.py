"""A hierarchy of three latents, and what keeps its upper layers alive.

    python examples/hierarchical.py --out results

Trains one hierarchical VAE on binarised digits with a bottom-up guide (Burda et al. 2016) and with
the ladder's, which shares the model's top-down conditionals (Sonderby et al. 2016, Ladder
variational autoencoders, https://arxiv.org/abs/1602.02282), each with and without a warm-up of
beta and free bits (Kingma et al. 2016). Prints held-out log-likelihoods, and the KL and the active
units of each layer. Expect the help to be worth about a nat with the bottom-up guide, and two with
the ladder, whose top layer is dead without it. The picture shows what each layer decides:
digits that share the code of one layer and have those below drawn anew. Takes about two minutes on
one core.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI

from pyro_vae import fit, importance_weighted_log_likelihood, latents, scale_kl
from pyro_vae.datasets import Batches, load_digits
from pyro_vae.evaluation import active_units, elbo_terms
from pyro_vae.guides import AmortizedBottomUp, AmortizedLadder
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE, HierarchicalVAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import TraceFreeBits_ELBO
from pyro_vae.schedules import LinearWarmup

Args = argparse.Namespace
LATENT_DIMS = [16, 8, 4]
SITES = ["z1", "z2", "z3"]


def build(guide_name: str, hidden: int) -> tuple[VAE, Any]:
    """The model and one of its guides."""
    z1, z2, z3 = LATENT_DIMS
    decoder = MLP(z1, [hidden], 64, dropout=0.1)
    model = HierarchicalVAE(LATENT_DIMS, decoder, Bernoulli(), hidden=[hidden // 2])
    bottom = MLP(64, [hidden], 2 * z1, dropout=0.3)
    if guide_name == "bottom-up":
        upper = [MLP(z1, [hidden // 2], 2 * z2), MLP(z2, [hidden // 2], 2 * z3)]
        return model, AmortizedBottomUp([bottom, *upper])
    widths = [hidden, hidden // 2, hidden // 4]
    networks = [
        torch.nn.Sequential(MLP(64, [], widths[0]), torch.nn.ReLU(), torch.nn.Dropout(0.3)),
        *(torch.nn.Sequential(MLP(a, [], b), torch.nn.ReLU()) for a, b in pairwise(widths)),
    ]
    heads = [MLP(width, [], 2 * dim) for width, dim in zip(widths, LATENT_DIMS, strict=True)]
    return model, AmortizedLadder(model.prior, networks, heads)


def train(guide_name: str, helped: bool, x: torch.Tensor, args: Args) -> tuple[VAE, Any]:
    """Trains by SVI with Adam; ``helped`` by a warm-up over half of the time and free bits."""
    pyro.set_rng_seed(args.seed)
    pair = build(guide_name, args.hidden)
    batches = Batches(x, batch_size=100)
    num_steps = args.epochs * len(batches)
    beta = LinearWarmup(max(1, num_steps // 2), start=0.0 if helped else 1.0)
    optimizer = pyro.optim.ClippedAdam({"lr": 1e-3, "lrd": 0.1 ** (1 / num_steps)})
    objective = TraceFreeBits_ELBO(args.free_bits if helped else 0.0)
    model, guide = (scale_kl(program, beta) for program in pair)
    svi = SVI(model, guide, optimizer, objective)
    fit(svi, batches, args.epochs, schedules=[beta])
    return pair


def main(args: Args) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    (x, _), (x_test, _) = load_digits(dequantize=False)
    x, x_test = (x > 0.5).to(x), (x_test > 0.5).to(x)
    pairs, rows = {}, []
    for guide_name in ("bottom-up", "ladder"):
        for helped in (False, True):
            print(f"{guide_name} guide{', warm-up and free bits' if helped else ''}")
            pairs[guide_name, helped] = pair = train(guide_name, helped, x, args)
            estimate = importance_weighted_log_likelihood(
                *pair, x_test, num_particles=args.num_particles
            )
            terms = elbo_terms(*pair, x_test, num_particles=20)
            row: dict[str, Any] = {"guide": guide_name, "helped": "yes" if helped else "no"}
            row |= {"log-lik.": estimate.mean(), "+- images": estimate.data_standard_error()}
            row |= {"ELBO": float(terms.elbo.mean())}
            row |= {f"KL {site}": float(terms.kl[site].mean()) for site in SITES}
            for site, dim in zip(SITES, LATENT_DIMS, strict=True):
                row[f"active {site}"] = f"{active_units(pair[1], x, site=site).count}/{dim}"
            rows.append(row)
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "hierarchical.csv", index=False)
    print(
        f"\n{len(x_test)} held-out binary digits, nats per image; active units of training data\n"
    )
    print(table.to_string(index=False, float_format="{:.3f}".format))
    draw(pairs["ladder", True], x_test, args.out / "hierarchical.png")
    print(f"\nThe table and the figure are in {args.out}/")
    return table


def draw(pair: tuple[VAE, Any], x: torch.Tensor, path: Path) -> None:
    """Writes digits that share their upper latents, row by row."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    figure, panels = plt.subplots(1, 4, figsize=(16, 3.8), layout="tight")
    for ax, site in zip(panels, (None, "z3", "z2", "z1"), strict=True):
        rows = []
        for datum in x[:8, None].expand(-1, 10, -1):  # One image ten times.
            given = {}
            if site is not None:
                code = latents.encode(pair[1], datum, site=site).mean[:1]
                given[site] = code.expand(10, -1)
            rows.append(latents.decode(pair[0], given, datum).mean)
        plots.plot_images(torch.cat(rows), 10, ax=ax)
        ax.set_title(f"one {site} for each row" if site else "every digit on its own")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--free-bits", type=float, default=1.0, help="nats per layer")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.epochs, arguments.num_particles, arguments.hidden = 2, 20, 20
    main(arguments)
