"""The textbook pictures of the variational bound: Jensen, where it touches, how EM climbs.

    python examples/textbook_bounds.py --out results

After figures 17.4 to 17.7 of Prince (2023), Understanding deep learning; ``textbook.py`` draws
them too. Jensen's inequality for one datum; the log-likelihood of 20 data over the noise of a
nonlinear model, and below it ELBOs that touch it where their q is the true posterior, each step of
EM at the top of the bound before, and the ELBO of normal q, which touches nowhere; EM on a mixture
as coordinate ascent. All bounds are exact, by quadrature or enumeration: expect "value" and "exact"
in the table to agree within the last column. Takes about ten seconds on one core.
"""

from types import SimpleNamespace as Picture
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_vae.baselines import gaussian_mixture_em
from pyro_vae.curves import Trochoid
from pyro_vae.evaluation.quadrature import quadrature
from pyro_vae.latents import generate
from pyro_vae.likelihoods import Normal
from pyro_vae.models import VAE, GaussianMixture
from pyro_vae.priors import StandardNormalPrior

BLUE, RED = "tab:blue", "tab:red"


def model_of(noise: float) -> VAE:
    """z ~ N(0, 1), x ~ N(f(z), noise^2 I) with a curve f in the plane."""
    return VAE(Trochoid(), Normal(noise), StandardNormalPrior(1))


def claim(text: str, value: Any, exact: Any, within: float) -> dict[str, Any]:
    """A row of the table: two numbers that should agree."""
    return {"claim": text, "value": float(value), "exact": float(exact), "within": within}


def above(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """By how much ``first`` exceeds ``second`` at most; 0 if nowhere."""
    return (first - second).clamp(min=0).max()


def jensen() -> Picture:
    """The weights w = p(x, z) / q(z) of one datum: log E[w] is above E[log w]."""
    x, z = torch.tensor([[0.2, -2.1]]), torch.linspace(-6, 6, 24001)
    posterior = quadrature(model_of(0.3), x, grid=z)
    log_q = dist.Normal(0.03, 0.14).log_prob(z)[:, None]
    log_w, q = posterior.log_joint - log_q, posterior.weights * log_q[:, 0].exp()
    bound, exact = posterior.elbo(log_q), posterior.log_likelihood
    gap = q @ (log_q - posterior.log_density)
    claims = [
        claim("log E[w], and log p(x)", (q @ log_w.exp()).log(), exact, 1e-9),
        claim("log E[w] - E[log w], and KL(q || p(z | x))", exact - bound, gap, 1e-9),
    ]
    return Picture(w=(log_w - exact).exp()[:, 0], q=q, gap=float(gap), claims=claims)


def touching() -> Picture:
    """The log-likelihood over the noise, bounds that touch it, and the way EM takes over them."""
    z, noises = torch.linspace(-6, 6, 2401), torch.linspace(0.15, 0.75, 61)
    data = generate(model_of(0.3), torch.zeros(20, 2), mean=False)
    posteriors = [quadrature(model_of(float(noise)), data, grid=z) for noise in noises]
    exact = torch.stack([p.log_likelihood.sum() for p in posteriors])
    squares = torch.cdist(Trochoid()(z[:, None]), data) ** 2
    path, heights, gaps, qs = [0.65], [], [], []
    for _ in range(4):
        posterior = quadrature(model_of(path[-1]), data, grid=z)
        qs.append(posterior.log_density)
        heights.append(float(posterior.log_likelihood.sum()))
        gaps.append(heights[-1] - posterior.elbo(qs[-1]).sum())
        q = posterior.weights[:, None] * qs[-1].exp()
        path.append(float((q * squares).sum() / (2 * len(data))) ** 0.5)
    # The last is a normal q at the highest mode of the posterior before, with the curvature there.
    peak = qs[2].argmax(0, keepdim=True)
    before, here, after = (qs[2].gather(0, peak + step) for step in (-1, 0, 1))
    scale = (z[1] - z[0]) / (2 * here - before - after).sqrt()
    qs[-1] = dist.Normal(z[peak], scale).log_prob(z[:, None])
    bounds = torch.stack([torch.stack([p.elbo(q).sum() for p in posteriors]) for q in qs])
    tops = noises[bounds[:3].argmax(1)]
    claims = [
        claim("ELBOs above log p(x): by how much", above(bounds, exact), 0, 1e-9),
        claim("gap of q = p(z | x): the largest", torch.stack(gaps).abs().max(), 0, 1e-9),
        *(claim("noise at the top, and of the M step", *p, 0.01) for p in zip(tops, path[1:4])),
    ]
    loss = (exact - bounds[-1]).min()
    curves = {"noises": noises, "exact": exact, "bounds": bounds}
    return Picture(**curves, path=path, heights=heights, loss=loss, claims=claims)


def climbing(num_steps: int) -> Picture:
    """EM on a mixture of three Gaussians: bound and log-likelihood after every half step."""
    truth = dist.Normal(torch.tensor([-3.0, 0.0, 2.5]), torch.tensor([0.5, 1.0, 0.4]))
    x = truth.sample((100,)).reshape(-1, 1)
    model, values = GaussianMixture(1, 3), []
    model.locs.data.copy_(torch.tensor([[-1.0], [-0.5], [0.5]]))

    def bound(probs: torch.Tensor) -> list[float]:
        """ELBO with these probabilities of the components as q, and log-likelihood."""

        def guide(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})

        elbo = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x) / len(x)
        return [elbo, float(model.log_prob(x).detach().mean())]

    for _ in range(num_steps):
        probs = model.posterior(x).probs.detach()  # E step.
        after_e, counts = bound(probs), probs.sum(0)
        locs = probs.T @ x / counts[:, None]  # M step.
        model.locs.data.copy_(locs)
        variances = (probs * (x - locs.T) ** 2).sum(0) / counts
        model.scale, model.weights = variances.sqrt().reshape(3, 1, 1), counts / len(x)
        values.append([*after_e, *bound(probs)])
    e, exact_e, m, exact = torch.tensor(values).T
    best = gaussian_mixture_em(x, 3, num_restarts=3).log_likelihoods[-1]
    claims = [
        claim("gap after an E step: the largest", (exact_e - e).abs().max(), 0, 1e-9),
        claim("M steps that lower the ELBO: by how much", above(e, m), 0, 1e-9),
        claim("ELBO above log p(x) after an M step: by how much", above(m, exact), 0, 1e-9),
        claim("log p(x) at the end, and by gaussian_mixture_em", exact[-1], best, 1e-3),
    ]
    return Picture(e=e, m=m, exact=exact, claims=claims)


def draw_jensen(picture: Picture, ax: Any) -> None:
    """The logarithm is concave, so the mean of logs lies below the log of the mean."""
    w = torch.linspace(0.05, 2.35, 300)
    ax.plot(w, w.log(), color="0.5")
    ax.text(2.05, 0.8, "log w", color="0.5", ha="right")
    ax.hist(picture.w, 45, range=(0, 2.25), weights=8 * picture.q, bottom=-3, color="0.85")
    ax.text(1.1, -2.75, "how often q draws w", color="0.5")
    lines = (0.0, "black", "log E[w] = log p(x)"), (-picture.gap, BLUE, "E[log w] = ELBO")
    for level, color, text in lines:
        ax.axhline(level, color=color, linestyle="--")
        ax.text(2.4, level - 0.06, text, color=color, ha="right", va="top")
    ax.plot([1, 1], [-3, 0], color="black", linestyle=":")
    ax.text(1.02, -1.7, "E[w]")
    ax.annotate("", (0.15, 0.03), (0.15, -picture.gap - 0.03), arrowprops={"arrowstyle": "<->"})
    ax.text(0.18, -picture.gap / 2, f"KL = {picture.gap:.2f}", va="center")
    ax.set(xlabel="w = p(x, z) / q(z), divided by p(x)", ylabel="nats above log p(x)")
    ax.set(xlim=(0, 2.4), ylim=(-3, 1), xticks=[0, 0.5, 1, 1.5, 2], yticks=range(-3, 2))


def draw_touching(picture: Picture, ax: Any) -> None:
    """The log-likelihood, bounds that touch it in a dot, and the way from their tops up to it."""
    ax.plot(picture.noises, picture.exact, color="black", linewidth=2.5)
    for i, bound in enumerate(picture.bounds[:3]):
        ax.plot(picture.noises, bound, color=BLUE, linewidth=1.5)
        ax.plot([picture.path[i + 1]] * 2, [bound.max(), picture.heights[i + 1]], "k:")
        ax.plot(picture.path[i + 1], bound.max(), "^", color=BLUE, markersize=9)
    ax.plot(picture.path[:4], picture.heights, "o", color="black", markersize=8)
    ax.plot(picture.noises, picture.bounds[-1], color=RED, linestyle="--")
    top, end = float(picture.exact.max()), float(picture.bounds[-1, -6])
    ax.text(0.76, picture.exact[-1] + 1.5, "log p(x)", ha="right")
    ax.text(0.7, end - 1, "normal q:\ntouches nowhere", color=RED, va="top", ha="right")
    text = "ELBOs: each touches (dot) where\nits q is p(z | x); M step to its top,\nE step up to the next"
    ax.text(0.76, top - 29.5, text, color=BLUE, ha="right")
    ax.set(xlabel="noise of the model", ylabel="nats, sum of 20 data", ylim=(top - 30, top + 2))


def draw_climbing(picture: Picture, ax: Any) -> None:
    """Bound and log-likelihood: the M step lifts both, the E step closes the gap."""
    end = picture.exact[-1]
    num = int((picture.e < end - 0.002).sum())
    elbo = torch.stack([picture.e, picture.m], 1).flatten() - end
    # At the beginning, and after each E step, the two agree.
    log_p = torch.stack([picture.e, picture.exact], 1).flatten() - end
    steps = torch.arange(len(elbo)) / 2
    ax.fill_between(steps, elbo, log_p, color=BLUE, alpha=0.25, lw=0)
    ax.plot(steps, log_p, color="black", linewidth=2.5)
    ax.plot(steps, elbo, color=BLUE, linewidth=2.5)
    ax.plot(steps[::2], elbo[::2], "o", color="black", markersize=8)
    low = float(elbo[1])
    ax.text(num - 4, 0.3 * low, "log p(x)", ha="right")
    ax.text(num - 4, 0.6 * low, "ELBO", color=BLUE)
    ax.set(xlabel="EM step", ylabel="nats per datum", xlim=(0, num), ylim=(1.05 * low, -0.05 * low))


def figures(smoke_test: bool) -> list[tuple[Any, ...]]:
    """Name of each figure, what it shows, the function that draws it, and its panels."""
    em, panels = climbing(20 if smoke_test else 150), {"figsize": (8, 5)}
    return [
        ("jensen", jensen(), draw_jensen, panels),
        ("bounds", touching(), draw_touching, panels),
        ("em", em, draw_climbing, panels),
    ]


if __name__ == "__main__":
    import textbook

    textbook.main(textbook.arguments(), figures)
