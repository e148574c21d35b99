"""What several experts say together: their product, their mixture, the mixture of products.

    python examples/experts.py --out results

Draws the densities of three normal experts on a line and of their combinations, from the
functions that the guides are made of (Wu and Goodman 2018; Shi et al. 2019; Sutter et al. 2021),
and prints mean and standard deviation of each. A product is narrower than any of its experts and
lies where they overlap; a mixture keeps each of their opinions. Takes two seconds.
"""

import argparse
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch.distributions import Normal

from pyro_vae.experts import mixture_log_prob, product_of_normals

Args = argparse.Namespace
LOC, SCALE = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0.5, 1.0, 0.7])


def densities(z: torch.Tensor) -> dict[str, torch.Tensor]:
    """Log-densities at points ``(N,)``, by combination; N(0, 1) is the prior."""
    loc = torch.cat([LOC, torch.zeros(1)]).unsqueeze(-1)  # the prior is the last expert
    scale = torch.cat([SCALE, torch.ones(1)]).unsqueeze(-1)
    subsets = torch.tensor(list(product([False, True], repeat=3))[1:])
    members = torch.cat([subsets, torch.ones(7, 1, dtype=torch.bool)], -1)
    everyone = product_of_normals(loc, scale)
    each = product_of_normals(loc.expand(7, 4, 1), scale.expand(7, 4, 1), members)
    z = z.unsqueeze(-1)
    return {
        "product of experts": Normal(*everyone).log_prob(z).squeeze(-1),
        "mixture of experts": mixture_log_prob(Normal(LOC, SCALE).log_prob(z)),
        "mixture of products": mixture_log_prob(Normal(each[0].T, each[1].T).log_prob(z)),
    }


def main(args: Args) -> pd.DataFrame:
    """Prints the moments, draws the densities; returns the table."""
    from matplotlib import pyplot as plt

    args.out.mkdir(parents=True, exist_ok=True)
    z = torch.linspace(-6, 7, 2001)
    step = z[1] - z[0]
    figure, panels = plt.subplots(1, 3, figsize=(14, 3.6), sharex=True, layout="constrained")
    rows = []
    for ax, (name, log_density) in zip(panels, densities(z).items(), strict=True):
        density = log_density.exp()
        mean = (z * density).sum() * step
        spread = ((z - mean).square() * density).sum().mul(step).sqrt()
        rows.append({"combination": name, "mean": float(mean), "std": float(spread)})
        for loc, scale in zip(LOC, SCALE, strict=True):
            ax.plot(z, Normal(loc, scale).log_prob(z).exp(), color="tab:blue", lw=1)
        ax.plot(z, Normal(0, 1).log_prob(z).exp(), color="tab:gray", ls="--", lw=1)
        ax.fill_between(z, density, color="tab:orange", alpha=0.6)
        ax.set_title(name)
        ax.set_xlabel("z")
    panels[0].set_ylabel("density")
    lines = panels[0].get_lines()
    labels = ["experts", "prior", "combination"]
    panels[0].legend([lines[0], lines[3], panels[0].collections[0]], labels)
    figure.savefig(args.out / "experts.png", dpi=120)
    plt.close(figure)
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "experts.csv", index=False)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(f"\nThe table and the figure are in {args.out}/")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="the same")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments)
