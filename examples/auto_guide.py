"""A guide for any model: mean-field against the faithful inverse of the model's graph.

    python examples/auto_guide.py --out results

Four models are plain functions, as any user of Pyro writes them: a hierarchy of three latents on
digits, a state-space model, a regression whose covariate was measured with error and whose slope
all data share, and a topic model of word counts. ``AmortizedAutoGuide`` finds their latents and
makes the guide, without dependence between them or with that of the posterior (Webb et al. 2018,
Faithful inversion of generative models, https://arxiv.org/abs/1712.00287). Prints the ELBO beside
the exact log-likelihood (for the topics, an importance-weighted estimate). Expect the inverse to
come within 0.01 nats of it in the first two, where mean-field stays GAP nats below. The
picture shows why: what mean-field draws, given a series, is jagged. Takes TIME on one core.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vae import importance_weighted_log_likelihood
from pyro_vae.baselines import ppca
from pyro_vae.datasets import load_digits
from pyro_vae.guides.auto import AmortizedAutoGuide

Args = argparse.Namespace
STEPS = 8
TIMES = torch.arange(STEPS) + 1.0
STATES = 0.3**2 * torch.minimum(TIMES, TIMES[:, None])  # Covariance of a random walk.
WORDS = torch.tensor([[9.0, 9, 9, 9, 3, 1, 0], [0, 1, 6, 6, 6, 1, 0], [0, 0, 0, 0, 1, 2, 2]]) / 20
# A model, its data, their exact log-likelihood in nats per row, and how to make the heads.
Task = tuple[Callable[[torch.Tensor], Any], torch.Tensor, float | None, dict[str, Any]]


def hierarchy(num_rows: int) -> Task:
    """Digits, whose bottom latent is normal by itself: they are as in probabilistic PCA."""
    x = load_digits()[0][0][:num_rows]
    fit = ppca(x, latent_dim=4)
    weight, loc, noise = fit.weight.float(), fit.loc.float(), fit.noise_variance.float().sqrt()

    def model(image: torch.Tensor) -> None:
        z: Any = torch.zeros(4)
        with pyro.plate("images", len(image)):
            for site, keep in (("top", 0.0), ("middle", 0.8), ("bottom", 0.8)):
                z = pyro.sample(site, dist.Normal(keep * z, (1 - keep**2) ** 0.5).to_event(1))
            pyro.sample("image", dist.Normal(loc + z @ weight.T, noise).to_event(1), obs=image)

    return model, x, float(fit.log_prob(x).mean()), {"full_covariance": True}


def state_space(num_rows: int) -> Task:
    """A slow state, seen through noise; all of it is normal."""

    def model(series: torch.Tensor) -> None:
        state: Any = torch.zeros(())
        with pyro.plate("series", len(series)):
            for t in range(STEPS):
                state = pyro.sample(f"state_{t}", dist.Normal(state, 0.3))
                pyro.sample(f"seen_{t}", dist.Normal(state, 0.7), obs=series[:, t])

    cov = STATES + 0.7**2 * torch.eye(STEPS)
    series = dist.MultivariateNormal(torch.zeros(STEPS), cov)
    x = series.sample(torch.Size([num_rows]))
    return model, x, float(series.log_prob(x).mean()), {}


def regression(num_rows: int) -> Task:
    """Covariate and outcome are both measured with error; given the slope they are normal."""

    def model(pairs: torch.Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0), 2.0))
        with pyro.plate("people", len(pairs)):
            true = pyro.sample("true", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("covariate", dist.Normal(true, 1.0), obs=pairs[:, 0])
            pyro.sample("outcome", dist.Normal(slope * true, 0.2), obs=pairs[:, 1])

    num_rows = num_rows // 20  # The slope stays uncertain.
    x = torch.randn(num_rows, 1) + torch.tensor([1.0, 0.2]) * torch.randn(num_rows, 2)
    slope = torch.linspace(-3, 3, 2001).double()  # The integral over a fine grid.
    cov = torch.stack([0 * slope + 2.0, slope, slope, slope**2 + 0.04], -1).reshape(-1, 1, 2, 2)
    log_prob = dist.MultivariateNormal(torch.zeros(2).double(), cov).log_prob(x.double()).sum(1)
    log_prob = log_prob + dist.Normal(0.0, 2.0).log_prob(slope)
    exact = log_prob.logsumexp(0) + torch.tensor(0.003).log()
    start = partial(AutoNormal, init_scale=0.5)  # The heads learn from slopes that differ.
    return model, x, float(exact) / num_rows, {"hidden": [64], "global_guide": start}


def topics(num_rows: int) -> Task:
    """Word counts of texts, which have a length and shares of topics, some of them wordy."""

    def model(counts: torch.Tensor) -> None:
        with pyro.plate("texts", len(counts)):
            length = pyro.sample("length", dist.LogNormal(torch.tensor(3.0), 0.5))
            share = pyro.sample("share", dist.Dirichlet(0.5 * torch.ones(3)))
            rate = length[..., None] * (share @ WORDS + 1e-3)
            pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)

    trace = pyro.poutine.trace(pyro.poutine.uncondition(model))
    counts: Any = trace.get_trace(torch.zeros(num_rows, 7)).nodes["counts"]["value"]
    return model, counts, None, {"hidden": [64]}


def train(task: Task, structure: Any, args: Args) -> AmortizedAutoGuide:
    """Trains the guide alone, for these models have no parameters."""
    model, x, _, how = task
    guide = AmortizedAutoGuide(model, torch.nn.Identity(), structure=structure, **how)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / args.steps)})
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(args.steps):
        svi.step(x)
    return guide


def main(args: Args) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    tasks = {t.__name__: t(args.num_rows) for t in (hierarchy, state_space, regression, topics)}
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    rows, guides = [], {}
    for name, task in tasks.items():
        model, x, exact, _ = task
        for structure in ("mean-field", "inverse"):
            guides[name, structure] = guide = train(task, structure, args)
            with torch.no_grad():
                bounds = -torch.tensor([elbo.loss(model, guide, x) for _ in range(50)]) / len(x)
            if task[2] is None:
                how: Any = {"num_particles": args.num_particles}
                exact = importance_weighted_log_likelihood(model, guide, x, **how).mean()
            bound, error = float(bounds.mean()), float(bounds.std()) / len(bounds) ** 0.5
            rows.append([name, structure, bound, error, exact, float(exact or 0) - bound])
    table = pd.DataFrame(rows, columns=["model", "guide", "ELBO", "+-", "log-lik.", "gap"])
    table.to_csv(args.out / "auto_guide.csv", index=False)
    print(f"{args.num_rows} rows each, nats per row\n")
    print(table.to_string(index=False, float_format="{:.3f}".format))
    draw(table, tasks["state_space"][1], guides, args.out / "auto_guide.png")
    print(f"\nThe table and the figure are in {args.out}/")
    return table


def draw(table: pd.DataFrame, x: torch.Tensor, guides: dict[Any, Any], path: Path) -> None:
    """Writes the gaps, and states drawn given one series over the exact band."""
    from matplotlib import pyplot as plt

    x, cov = x[:1], STATES
    gain = cov @ torch.linalg.inv(cov + 0.7**2 * torch.eye(STEPS))
    loc, scale = gain @ x[0], (cov - gain @ cov).diagonal().sqrt()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    table.pivot(index="model", columns="guide", values="gap").plot.barh(ax=axes[0], legend=True)
    axes[0].set(xlabel="log-likelihood - ELBO, nats per row", ylabel="")
    for ax, structure in zip(axes[1:], ("mean-field", "inverse"), strict=True):
        with torch.no_grad():
            draws = guides["state_space", structure](x.expand(5, -1))
        states = torch.stack([draws[f"state_{t}"] for t in range(STEPS)])
        ax.fill_between(range(STEPS), loc - 2 * scale, loc + 2 * scale, color="0.85")
        ax.plot(states, color="C0" if structure == "inverse" else "C1", lw=1)
        ax.plot(x[0], "k.")
        ax.set(title=f"{structure}: five draws", xlabel="time", ylim=(-3, 3))
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-rows", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke-test", action="store_true", help="a few seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke_test:
        arguments.num_rows, arguments.steps, arguments.num_particles = 50, 20, 20
    main(arguments)
