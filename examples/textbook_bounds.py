"""The textbook pictures of the variational bound: Jensen, where it touches, how EM climbs.

    python examples/textbook_bounds.py --out results

After figures 17.4 to 17.7 of Prince (2023), Understanding deep learning: Jensen's inequality; ELBOs
that touch the log-likelihood of 20 data, and one that does not; EM on a mixture. By quadrature or
enumeration: "value" and "exact" agree within the last column. About ten seconds on one core.
"""

from types import SimpleNamespace as Picture
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_vae import likelihoods, plots
from pyro_vae.baselines import gaussian_mixture_em
from pyro_vae.curves import Trochoid
from pyro_vae.evaluation.quadrature import quadrature
from pyro_vae.latents import generate
from pyro_vae.models import VAE, GaussianMixture
from pyro_vae.priors import StandardNormalPrior


def model_of(noise: float) -> VAE:
    """z ~ N(0, 1), x ~ N(f(z), noise^2 I) with a curve f in the plane."""
    return VAE(Trochoid(), likelihoods.Normal(noise), StandardNormalPrior(1))


def claim(text: str, value: Any, exact: Any, within: float) -> dict[str, Any]:
    """A row of the table: two numbers that should agree."""
    return {"claim": text, "value": float(value), "exact": float(exact), "within": within}


def jensen() -> Picture:
    """The weights w = p(x, z) / q(z) of one datum: log E[w] is above E[log w]."""
    x, z = torch.tensor([[0.2, -2.1]]), torch.linspace(-6, 6, 24001)
    posterior = quadrature(model_of(0.3), x, grid=z)
    log_q = dist.Normal(0.03, 0.14).log_prob(z)[:, None]
    log_w, q = posterior.log_joint - log_q, posterior.weights * log_q[:, 0].exp()
    exact, kl = posterior.log_likelihood, q @ (log_q - posterior.log_density)
    claims = [
        claim("log E[w], and log p(x)", (q @ log_w.exp()).log(), exact, 1e-9),
        claim("log p(x) - ELBO, and KL(q || p(z | x))", exact - posterior.elbo(log_q), kl, 1e-9),
    ]
    return Picture(log_w=log_w[:, 0], q=q, gap=float(kl), claims=claims)


def touching() -> Picture:
    """The log-likelihood over the noise, bounds that touch it, and the way EM takes over them."""
    z, path, log_qs = torch.linspace(-6, 6, 2401), [0.65], []
    data = generate(model_of(0.3), torch.zeros(20, 2), mean=False)
    squares = torch.cdist(Trochoid()(z[:, None]), data) ** 2
    for _ in range(3):
        posterior = quadrature(model_of(path[-1]), data, grid=z)
        log_qs.append(posterior.log_density)
        path.append(float((posterior.weights @ (log_qs[-1].exp() * squares)).mean() / 2) ** 0.5)
    # A normal q at the highest mode, with the curvature there.
    peak = log_qs[-1].argmax(0, keepdim=True)
    scale = (z[1] - z[0]) / (-log_qs[-1].diff(n=2, dim=0).gather(0, peak - 1)).sqrt()
    log_qs.append(dist.Normal(z[peak], scale).log_prob(z[:, None]))
    noises = torch.cat([torch.linspace(0.15, 0.75, 61), torch.tensor(path)]).unique()
    posteriors = [quadrature(model_of(float(noise)), data, grid=z) for noise in noises]
    exact = torch.stack([p.log_likelihood.sum() for p in posteriors])
    bounds = torch.stack([torch.stack([p.elbo(q).sum() for p in posteriors]) for q in log_qs])
    touch = torch.searchsorted(noises, torch.tensor(path))
    gaps = exact - bounds
    off = (noises[bounds[:3].argmax(1)] - noises[touch[1:]]).abs().max()
    claims = [
        claim("ELBOs above log p(x): by how much", (-gaps).relu().max(), 0, 1e-9),
        claim("gap where q = p(z | x), at most", gaps[range(3), touch[:3]].abs().max(), 0, 1e-9),
        claim("M steps off the tops of the ELBOs: by how much", off, 0, 1e-9),
    ]
    curves = {"noises": noises, "exact": exact, "bounds": bounds, "touch": touch}
    return Picture(**curves, path=path, loss=gaps[3].min(), claims=claims)


def climbing(num_steps: int) -> Picture:
    """EM on a mixture of three Gaussians: bound and log-likelihood after every half step."""
    truth = dist.Normal(torch.tensor([-3.0, 0.0, 2.5]), torch.tensor([0.5, 1.0, 0.4]))
    x = truth.sample((100,)).reshape(-1, 1)
    model, bound, values = GaussianMixture(1, 3), TraceEnum_ELBO(max_plate_nesting=1), []
    model.locs.data.copy_(torch.tensor([[-1.0], [-0.5], [0.5]]))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})

    for step in range(2 * num_steps):
        if step % 2 == 0:  # E step.
            probs = model.posterior(x).probs.detach()
        else:  # M step.
            counts = probs.sum(0)
            model.weights, locs = counts / len(x), probs.T @ x / counts[:, None]
            model.locs.data.copy_(locs)
            model.scale = ((probs * (x - locs.T) ** 2).sum(0) / counts).sqrt().reshape(3, 1, 1)
        values.append([-bound.loss(model, guide, x) / len(x), model.log_prob(x).mean().item()])
    elbo, log_p = torch.tensor(values).T
    best = gaussian_mixture_em(x, 3, num_restarts=3).log_likelihoods[-1]
    claims = [
        claim("gap after E steps, at most", (log_p - elbo)[::2].abs().max(), 0, 1e-9),
        claim("half steps that lower the ELBO: by how much", (-elbo.diff()).relu().max(), 0, 1e-9),
        claim("ELBO above log p(x): by how much", (elbo - log_p).relu().max(), 0, 1e-9),
        claim("log p(x) at the end, and by gaussian_mixture_em", log_p[-1], best, 1e-3),
    ]
    halves = {"e": elbo[::2], "m": elbo[1::2], "exact": log_p[1::2]}
    return Picture(elbo=elbo, log_p=log_p, **halves, claims=claims)


def draw_touching(picture: Picture, ax: Any) -> None:
    """The log-likelihood, bounds that touch it in a dot, and their tops, where EM goes on."""
    noises, bounds, touch = picture.noises, picture.bounds, picture.touch
    top = float(picture.exact.max())
    ax.plot(noises, picture.exact, color="black", linewidth=2.5)
    ax.text(0.75, picture.exact[-1] + 1.5, "log p(x)", ha="right")
    ax.plot(noises, bounds[:3].T, color="C0")
    text = "ELBOs: each touches (dot)\nwhere q = p(z | x);\nEM goes to its top"
    ax.text(0.75, top - 29.5, text, color="C0", ha="right")
    ax.plot(noises, bounds[3], color="C3", linestyle="--")
    ax.text(0.7, bounds[3, -6] - 1, "normal q:\ntouches nowhere", color="C3", va="top", ha="right")
    ax.plot(noises[touch[:3]], picture.exact[touch[:3]], "o", color="black", markersize=9)
    ax.plot(noises[touch[1:]], bounds[:3].amax(1), "^", color="C0", markersize=9)
    ax.set(xlabel="noise of the model", ylabel="nats, sum of 20 data", ylim=(top - 30, top + 2))


def draw_climbing(picture: Picture, ax: Any) -> None:
    """The M step lifts bound and log-likelihood, the E step closes the gap; from step 1 on."""
    num = 2 * int((picture.e < picture.log_p[-1] - 0.002).sum()) + 1
    steps, elbo, log_p = torch.arange(2, num) / 2, picture.elbo[2:num], picture.log_p[2:num]
    plots.plot_gap(steps, log_p, elbo, ax)
    ax.plot(steps[::2], elbo[::2], "o", color="black", markersize=9)
    ax.set(xlabel="EM step: first M, then E", ylabel="nats per datum")


def figures(smoke_test: bool) -> list[tuple[Any, ...]]:
    """Name of each figure, what it shows, the function that draws it, and its panels."""
    return [
        ("jensen", jensen(), lambda p, ax: plots.plot_jensen(p.log_w, p.q, ax), {}),
        ("bounds", touching(), draw_touching, {}),
        ("em", climbing(20 if smoke_test else 150), draw_climbing, {}),
    ]


if __name__ == "__main__":
    import textbook

    textbook.main(figures)
