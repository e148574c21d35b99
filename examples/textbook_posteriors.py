"""The textbook picture of variational posteriors: what a family of guides can and cannot be.

    python examples/textbook_posteriors.py --out results

After figure 17.8 of Prince (2023), Understanding deep learning; ``textbook.py`` draws it too. The
true posterior of three data, by quadrature, beside the normal guide, mixture and flow that SVI
finds. The table has their KLs and those of the best normal and mixture, by direct minimisation.
Expect the normal guide to lose 0.00 nats where the posterior has one mode, 0.69 = log 2 where it
has two alike that are far apart, and 0.47 where they touch; the mixture 0.00, 0.00 and 0.04. The
flow could be exact but SVI need not find that: 0.69 where the modes are far apart, as it finds one,
and 0.01 where they touch, but 0.45 with ``--seed 1``. Takes half a minute on one core.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace as Picture
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

from pyro_vae.curves import Trochoid
from pyro_vae.evaluation.quadrature import quadrature, quadrature_elbo
from pyro_vae.flows import neural_spline
from pyro_vae.guides import AmortizedFlow
from pyro_vae.likelihoods import Normal
from pyro_vae.mixtures import FixedNormalMixture
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior

COLORS = {"normal": "tab:red", "mixture": "tab:orange", "flow": "tab:green"}
# The second lies where the curve crosses itself, the third inside its loop.
DATA = {
    "one mode": (0.2, -2.2),
    "two modes far apart": (0.0, 2**0.5),
    "two modes that touch": (0.0, -0.75),
}


def nonlinear_model() -> VAE:
    """z ~ N(0, 1), x ~ N(f(z), 0.3^2 I) with a curve f in the plane."""
    return VAE(Trochoid(), Normal(0.3), StandardNormalPrior(1))


def normal(x: torch.Tensor) -> None:
    """A normal guide with parameters for each datum, without a network."""
    loc = pyro.param("normal.loc", torch.full((len(x), 1), 0.5))
    scale = pyro.param("normal.scale", torch.full_like(loc, 0.5), constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def mixture(x: torch.Tensor) -> None:
    """Likewise a mixture of two normals, of equal weights."""
    locs = pyro.param("mixture.locs", torch.tensor([[-1.0], [1.0]]).repeat(len(x), 1, 1))
    scales = pyro.param("mixture.scales", torch.full_like(locs, 0.5), constraints.positive)
    with pyro.plate("data", len(x)):
        halves = dist.Categorical(logits=torch.zeros_like(locs[..., 0]))
        pyro.sample("z", FixedNormalMixture(halves, dist.Normal(locs, scales).to_event(1)))


def train(guide: Callable[..., Any], x: torch.Tensor, num_steps: int) -> None:
    """SVI with Adam, its learning rate falling to zero along a cosine."""
    settings: dict[str, Any] = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}}
    settings["lr_lambda"] = lambda step: (1 + math.cos(math.pi * min(step / num_steps, 1))) / 2
    optimizer = pyro.optim.LambdaLR(settings)
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(nonlinear_model(), guide, optimizer, elbo)
    for _ in range(num_steps):
        svi.step(x)
        optimizer.step()


def best_normal(x: torch.Tensor, num: int = 1) -> torch.Tensor:
    """The smallest KL of ``num`` normals of equal weights, nats, ``(batch,)``, by quadrature."""
    z = torch.linspace(-4, 4, 1001)
    posterior, found = quadrature(nonlinear_model(), x, grid=z), []
    for start in (-1.2, -0.5, 0.0):
        locs = (start * torch.linspace(1, -1, num)).repeat(len(x), 1).requires_grad_()
        log_scales = torch.full_like(locs, -1.0).requires_grad_()
        optimizer = torch.optim.Adam([locs, log_scales], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            each = dist.Normal(locs, log_scales.exp()).log_prob(z[:, None, None])
            kl = posterior.kl(each.logsumexp(-1) - math.log(num))
            kl.sum().backward()
            optimizer.step()
        found.append(kl.detach())
    return torch.stack(found).amin(0)


def families(num_steps: int) -> Picture:
    """Guides of three families trained by SVI, beside the true posteriors."""
    x, z = torch.tensor(list(DATA.values())), torch.linspace(-3, 3, 6001)
    flow = AmortizedFlow(MLP(2, [32], 2 + 8), 1, neural_spline(1, 8, num_transforms=1))
    guides: dict[str, Callable[..., Any]] = {"normal": normal, "mixture": mixture, "flow": flow}
    known = {"normal": best_normal(x), "mixture": best_normal(x, 2)}
    known["flow"] = torch.tensor([0.0, math.log(2), 0.0])  # Of two modes far apart it finds one.
    results, claims = {}, []
    for name, guide in guides.items():
        train(guide, x, num_steps)
        # The splines have kinks, where quadrature converges slowly.
        results[name] = quadrature_elbo(nonlinear_model(), guide, x, grid=z, tolerance=0.05)
        for text, kl, best in zip(DATA, results[name].kl, known[name], strict=True):
            numbers = {"value": float(kl), "exact": float(best), "within": 0.01}
            claims.append({"claim": f"KL of the {name} guide, {text}", **numbers})
    numbers = {"value": float(known["normal"][1]), "exact": math.log(2), "within": 0.001}
    claims.append({"claim": "KL of the best normal, two modes far apart, and log 2", **numbers})
    return Picture(results=results, claims=claims)


def draw(picture: Picture, axes: Any) -> None:
    """Posteriors in grey, guides in colour, one panel for each datum."""
    for i, (ax, name) in enumerate(zip(axes, DATA, strict=True)):
        posterior = picture.results["normal"].posterior
        density = posterior.log_density[:, i].exp()
        ax.fill_between(posterior.grid, density, color="0.8", lw=0)
        for row, (family, result) in enumerate(picture.results.items()):
            color, style = COLORS[family], "--" if family == "flow" else "-"
            ax.plot(posterior.grid, result.log_guide[:, i].exp(), style, color=color, linewidth=2)
            at, text = 0.98 - 0.08 * row, f"{family}: KL {abs(result.kl[i]):.2f}"
            ax.text(0.5, at, text, color=color, transform=ax.transAxes, ha="center", va="top")
        inside = posterior.grid[density > 1e-3 * density.max()]
        ax.set(title=name, xlabel="z", xlim=(inside[0] - 0.4, inside[-1] + 0.4), yticks=[])
        ax.set_ylim(0, 1.4 * ax.get_ylim()[1])
    axes[0].set_ylabel("p(z | x), grey, and q(z | x)")


def figures(smoke_test: bool) -> list[tuple[Any, ...]]:
    """The name of the figure, what it shows, the function that draws it, and its panels."""
    panels = {"ncols": 3, "figsize": (15, 4.8)}
    return [("posteriors", families(20 if smoke_test else 1500), draw, panels)]


if __name__ == "__main__":
    import textbook

    textbook.main(figures)
