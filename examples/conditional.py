"""Digits given their class, classes given the digit, and right halves given the left ones.

    python examples/conditional.py --out results

Trains on binarised digits a VAE, and two that are given the class (Sohn et al. 2015, Learning
structured output representation using deep conditional generative models): with the prior N(0, I)
for every class, and with one learnt for each. Then the same three for the right half of a digit,
given the left one. Prints held-out log-likelihoods, and what Bayes' rule makes of them: log p(x),
and classifiers beside logistic regression. Expect about a nat of log p(x) from the class and 0.4
more from its prior. Takes about a minute and a half on one core.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae import fit, importance_weighted_log_likelihood, latents
from pyro_vae.conditioning import Concatenate, FiLM, OneHot
from pyro_vae.datasets import Batches, load_digits
from pyro_vae.evaluation import calibration, class_posterior
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE, ConditionalVAE
from pyro_vae.nets import MLP, NormalEncoder
from pyro_vae.priors import ConditionalPrior, StandardNormalPrior, Unconditional

Pair = tuple[Any, Any]
Split = tuple[torch.Tensor, torch.Tensor]
LATENT_DIM = 8
MODELS = ["VAE", "given, N(0, I)", "given, learnt prior"]


def build(name: str, width: int, embed: nn.Module, features: int, hidden: int) -> Pair:
    """A model of ``width`` pixels and its guide; ``embed`` makes ``features`` of the context."""
    codes, standard = 2 * LATENT_DIM, StandardNormalPrior(LATENT_DIM)
    if name == "VAE":
        guide = AmortizedNormal(MLP(width, [hidden], codes, dropout=0.3))
        return VAE(MLP(LATENT_DIM, [hidden], width), Bernoulli(), standard), guide
    prior: Any = Unconditional(standard)
    if name == "given, learnt prior":
        of_context = nn.Sequential(embed, MLP(features, [hidden], codes, dropout=0.3))
        prior = ConditionalPrior(NormalEncoder(of_context))
    of_both = MLP(width + features, [hidden], codes, dropout=0.3)
    decoder = FiLM(LATENT_DIM, [hidden], width, features, embed=embed)
    guide = AmortizedNormal(Concatenate(of_both, embed=embed))
    return ConditionalVAE(decoder, Bernoulli(), prior), guide


def compare(data: Split, test: Split, embed: nn.Module, features: int, args: Any) -> Any:
    """Trains all models of data and context; returns them, and rows of the table, by name."""
    pairs, rows = dict[str, Pair](), dict[str, dict[str, float]]()
    for name in MODELS:
        print(name)
        pyro.set_rng_seed(args.seed)
        pairs[name] = pair = build(name, data[0].shape[1], embed, features, args.hidden)
        num = 1 if name == "VAE" else 2
        batches = Batches(*data[:num], batch_size=100)
        decay = 0.1 ** (1 / max(1, args.epochs * len(batches)))  # the rate ends at a tenth
        optimizer = pyro.optim.ClippedAdam({"lr": 1e-3, "lrd": decay})
        fit(SVI(*pair, optimizer, Trace_ELBO()), batches, args.epochs)
        given = *pair, *test[:num]
        estimate = importance_weighted_log_likelihood(*given, num_particles=args.num_particles)
        rows[name] = {"log-lik.": estimate.mean(), "ELBO": float(estimate.elbo.mean())}
        rows[name]["+- images"] = estimate.data_standard_error()
    return pairs, rows


def main(args: argparse.Namespace) -> pd.DataFrame:
    """Trains, evaluates, prints, draws; returns the table of log-likelihoods."""
    from sklearn.linear_model import LogisticRegression

    args.out.mkdir(parents=True, exist_ok=True)
    (x, y), (x_test, y_test) = load_digits(dequantize=False)
    x, x_test = (x > 0.5).to(x), (x_test > 0.5).to(x)
    pairs, rows = compare((x, y), (x_test, y_test), OneHot(10), 10, args)
    logistic = LogisticRegression(max_iter=1000).fit(x.numpy(), y.numpy())
    log_prob = torch.as_tensor(logistic.predict_log_proba(x_test.double().numpy()))
    judged = {"logistic regression": calibration(log_prob, y_test)}
    rows["VAE"]["log p(x)"] = rows["VAE"]["log-lik."]
    for name, (model, guide) in list(pairs.items())[1:]:
        num = max(1, args.num_particles // 5)  # for each class
        posterior = class_posterior(model, guide, x_test, num_classes=10, num_particles=num)
        rows[name]["log p(x)"] = float(posterior.log_marginal.mean())
        judged[name] = calibration(posterior.log_prob, y_test)

    halves = [part.reshape(-1, 8, 8).split(4, dim=2) for part in (x, x_test)]
    train, test = ((right.flatten(1), left.flatten(1)) for left, right in halves)
    half_pairs, half_rows = compare(train, test, nn.Identity(), 32, args)
    parts = {"digit, given class": rows, "right half, given left": half_rows}
    table = pd.concat({data: pd.DataFrame(part).T for data, part in parts.items()})
    table = table.rename_axis(["data", "model"]).reset_index()
    columns = ["accuracy", "log_loss", "brier", "expected_calibration_error"]
    classifiers = pd.DataFrame({name: vars(result) for name, result in judged.items()}).T[columns]
    classifiers = classifiers.astype(float).rename_axis("classifier").reset_index()
    print(f"\n{len(x_test)} held-out binary digits, nats per image\n")
    for stem, frame in {"conditional": table, "conditional_classifiers": classifiers}.items():
        frame.to_csv(args.out / f"{stem}.csv", index=False)
        print(frame.to_string(index=False, float_format="{:.3f}".format, na_rep=""), end="\n\n")
    draw(pairs, half_pairs[MODELS[-1]][0], test, judged, args.out / "conditional.png")
    print(f"The tables and the figure are in {args.out}/")
    return table


def draw(pairs: dict[str, Pair], completing: Any, test: Split, judged: Any, path: Path) -> None:
    """Writes digits of each class, completions of left halves, and the reliability diagram."""
    from matplotlib import pyplot as plt

    from pyro_vae import plots

    right, left = (half[:10].reshape(-1, 8, 4) for half in test)
    figure, panels = plt.subplots(1, 4, figsize=(19, 4.8), layout="constrained")
    for ax, name in zip(panels, MODELS[1:], strict=False):
        digits = latents.generate(pairs[name][0], torch.zeros(100, 64), torch.arange(100) // 10)
        plots.plot_images(digits, 10, ax=ax).set_title(f"a class in each row: {name}")
    drawn = [latents.generate(completing, test[0][:10], test[1][:10]) for _ in range(8)]
    rows = [torch.zeros_like(left), *(half.reshape(-1, 8, 4) for half in drawn), right]
    completed = torch.cat([torch.cat([left, half], 2) for half in rows])
    plots.plot_images(completed, 10, ax=panels[2]).set_title("left halves, 8 completions, truth")
    for name, result in judged.items():
        label = f"{name}: ECE {result.expected_calibration_error:.3f}"
        size = 3 * result.bin_count.clamp(max=50)
        panels[3].scatter(result.bin_confidence, result.bin_accuracy, s=size, label=label)
    panels[3].plot([0, 1], [0, 1], color="0.7", zorder=0)
    panels[3].set(xlabel="confidence", ylabel="accuracy", title="classes, by tenths; size: rows")
    panels[3].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=100)
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
