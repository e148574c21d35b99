"""The training loop: what it computes, what it takes, what it says when something is wrong."""

import copy
import math
import random
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import History, fit, scale_kl
from pyro_vae.baselines import gaussian_mixture_em
from pyro_vae.datasets import Batches
from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.models import VAE, GaussianMixture, LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.schedules import LinearWarmup

DATA_DIM = 3


def no_latents(*args: Any) -> None:
    """A guide for a model whose only unknowns are parameters."""


def line(x: torch.Tensor) -> None:
    """x ~ N(loc, 1), the least program there is."""
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(loc, 1.0), obs=x)


def sgd(lr: float = 0.1) -> pyro.optim.PyroOptim:
    return pyro.optim.SGD({"lr": lr})


def adam(lr: float = 1e-2) -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": lr})


def linear_pair(data_dim: int = DATA_DIM) -> tuple[LinearGaussian, AmortizedNormal]:
    return LinearGaussian(data_dim, 2), AmortizedNormal(MLP(data_dim, [], 4))


def parameters() -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in pyro.get_param_store().named_parameters()}


def batches_of(*rows: int) -> list[torch.Tensor]:
    return [torch.randn(n, DATA_DIM) for n in rows]


class Recorder:
    """Looks like SVI, and returns prepared losses."""

    def __init__(self, *losses: float) -> None:
        self.losses = list(losses)
        self.calls: list[tuple[Any, ...]] = []
        self.evaluated: list[tuple[Any, ...]] = []

    def step(self, *args: Any) -> float:
        self.calls.append(args)
        return self.losses[len(self.calls) - 1]

    def evaluate_loss(self, *args: Any) -> float:
        self.evaluated.append(args)
        return 7.0


class LocalSVI:
    """How modules whose parameters are their own are trained: Pyro's SVI cannot."""

    def __init__(self, model: Any, guide: Any, params: list[nn.Parameter]) -> None:
        self.model, self.guide = model, guide
        self.optim = torch.optim.Adam(params, lr=0.01)

    def step(self, *args: Any) -> float:
        self.optim.zero_grad()
        loss = Trace_ELBO()(self.model, self.guide)(*args)
        loss.backward()
        self.optim.step()
        return loss.item()


# What it computes.


@pytest.mark.parametrize("as_loader", [False, True])
def test_fit_is_a_loop_of_svi_steps(as_loader: bool) -> None:
    x = torch.randn(25, DATA_DIM)
    batches: Any = Batches(x, batch_size=10)
    if as_loader:
        batches = DataLoader(TensorDataset(x), batch_size=10, shuffle=True)

    def build() -> SVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model = LinearGaussian(DATA_DIM, 2, name="model")
        guide = AmortizedNormal(MLP(DATA_DIM, [], 4, dropout=0.5), name="guide")
        return SVI(model, guide, adam(), Trace_ELBO())

    svi = build()
    losses = []
    for _ in range(3):
        total = 0.0
        for batch in batches:
            total += svi.step(*batch) if as_loader else svi.step(batch)
        losses.append(total / len(x))
    by_hand = parameters()

    history = fit(build(), batches, 3, progress=False)

    assert history.loss == pytest.approx(losses, rel=1e-12)
    assert history.validation_loss == []
    assert not history.interrupted
    assert parameters().keys() == by_hand.keys()
    for name, value in parameters().items():
        assert torch.equal(value, by_hand[name]), name


def test_losses_are_averaged_over_data_not_over_batches() -> None:
    svi = Recorder(100.0, 100.0, 6.0)
    history = fit(svi, batches_of(10, 10, 2), 1, progress=False)
    assert history.loss == [206.0 / 22]  # The mean over batches would be 23 / 3.


def test_loss_per_datum_of_a_program_without_subsampling() -> None:
    x = torch.randn(7)
    history = fit(SVI(line, no_latents, sgd(0.0), Trace_ELBO()), [x[:5], x[5:]], 1, progress=False)
    exact = -dist.Normal(0.0, 1.0).log_prob(x).mean()
    assert history.loss[0] == pytest.approx(float(exact), rel=1e-12)


def test_loss_per_datum_with_the_rows_as_subsample() -> None:
    x = torch.randn(7)

    def model(rows: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", 7, subsample=rows):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=rows)

    svi = SVI(model, no_latents, sgd(0.0), Trace_ELBO())
    history = fit(svi, [x[:5], x[5:]], 1, validation=[x[:3]], progress=False)
    exact = -dist.Normal(0.0, 1.0).log_prob(x)
    assert history.loss[0] == pytest.approx(float(exact.mean()), rel=1e-12)
    assert history.validation_loss[0] == pytest.approx(float(exact[:3].mean()), rel=1e-12)


def test_validation_on_part_of_a_plate_that_training_fills() -> None:
    x = torch.randn(8)

    def model(rows: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", 8, subsample=rows):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=rows)

    svi = SVI(model, no_latents, sgd(0.0), Trace_ELBO())
    history = fit(svi, [x], 1, validation=[x[:2]], progress=False)
    exact = -dist.Normal(0.0, 1.0).log_prob(x)
    assert history.loss[0] == pytest.approx(float(exact.mean()), rel=1e-12)
    assert history.validation_loss[0] == pytest.approx(float(exact[:2].mean()), rel=1e-12)


def test_loss_per_datum_with_a_random_subsample() -> None:
    x = torch.full((9,), 2.0)

    def model(data: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", len(data), subsample_size=4) as rows:
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data[rows])

    history = fit(SVI(model, no_latents, sgd(0.0), Trace_ELBO()), [x], 2, progress=False)
    exact = -float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0)))
    assert history.loss == pytest.approx([exact, exact], rel=1e-12)


def test_random_subsample_in_model_and_guide_trains() -> None:
    x = 3.0 + torch.randn(50)

    def model(data: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", len(data), subsample_size=20) as rows:
            z = pyro.sample("code", dist.Normal(loc, 0.5))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=data[rows])

    def guide(data: torch.Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.0))
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("rows", len(data), subsample_size=20) as rows:
            pyro.sample("code", dist.Normal(slope * data[rows] + shift, 0.4))

    history = fit(SVI(model, guide, adam(0.05), Trace_ELBO()), [x], 300, progress=False)
    assert pyro.param("loc").item() == pytest.approx(float(x.mean()), abs=0.5)
    assert history.loss[-1] < history.loss[0] - 1


def test_a_plate_without_data_does_not_hide_the_subsample() -> None:
    x = torch.randn(12)

    def model(rows: torch.Tensor) -> None:
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1e-3))
        with pyro.plate("rows", 12, subsample=rows):
            pyro.sample("obs", dist.Normal(locs[0], 1.0), obs=rows)

    guide = AutoNormal(model, init_scale=1e-3)
    history = fit(SVI(model, guide, sgd(0.0), Trace_ELBO()), x.split(4), 1, progress=False)
    exact = -dist.Normal(0.0, 1.0).log_prob(x).mean()
    assert history.loss[0] == pytest.approx(float(exact), abs=0.5)  # Not three times as much.


def test_nested_plates_and_global_latents_count_rows() -> None:
    x = torch.randn(6, 4)

    def model(x: torch.Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("pixels", 4, dim=-1):
                pyro.sample("obs", dist.Normal(0 * z + 0 * shift, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))

    history = fit(SVI(model, guide, sgd(), Trace_ELBO()), [x[:4], x[4:]], 1, progress=False)
    exact = -dist.Normal(0.0, 1.0).log_prob(x).sum(-1).mean()
    assert history.loss[0] == pytest.approx(float(exact), rel=1e-10)


# What it takes.


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_sequence_is_several_arguments(kind: Callable[[Any], Any]) -> None:
    x, y = torch.zeros(4, 2), torch.zeros(4)
    svi = Recorder(1.0)
    assert fit(svi, [kind([x, y])], 1, progress=False).loss == [0.25]
    (call,) = svi.calls
    assert len(call) == 2
    assert call[0] is x
    assert call[1] is y


def test_a_mapping_is_one_argument() -> None:
    batch = {"image": torch.zeros(4, 2), "label": torch.zeros(4)}
    svi = Recorder(1.0)
    assert fit(svi, [batch], 1, progress=False).loss == [0.25]
    assert svi.calls[0][0] is batch
    assert len(svi.calls[0]) == 1


def test_dictionaries_of_data_and_of_what_is_present() -> None:
    """The least program of two modalities: its loss per datum, also of a short batch."""
    x, y = torch.randn(7), torch.randn(7)
    here = torch.tensor([True, True, False, True, False, True, True])
    y[~here] = 1e3

    def model(batch: dict[str, torch.Tensor], present: dict[str, torch.Tensor]) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", len(batch["left"])):
            pyro.sample("left", dist.Normal(loc, 1.0), obs=batch["left"])
            with poutine.mask(mask=present["right"]):
                pyro.sample("right", dist.Normal(loc, 2.0), obs=batch["right"])

    batches = Batches({"left": x, "right": y}, {"right": here}, batch_size=4)
    svi = SVI(model, no_latents, sgd(0.0), Trace_ELBO())
    history = fit(svi, batches, 2, validation=batches, progress=False)
    left = dist.Normal(0.0, 1.0).log_prob(x).sum()
    exact = -float(left + dist.Normal(0.0, 2.0).log_prob(y[here]).sum()) / 7
    assert history.loss == pytest.approx([exact, exact], rel=1e-12)
    assert history.validation_loss == pytest.approx([exact, exact], rel=1e-12)
    fit(SVI(model, no_latents, sgd(), Trace_ELBO()), batches, 100, progress=False)
    best = (x.sum() + y[here].sum() / 4) / (7 + int(here.sum()) / 4)
    assert pyro.param("loc").item() == pytest.approx(float(best), abs=0.2)


def test_an_object_with_step_and_evaluate_loss_is_enough() -> None:
    svi, x = Recorder(2.0, 4.0), torch.zeros(2, 1)
    history = fit(svi, [x], 2, validation=[x], progress=False)
    assert history.loss == [1.0, 2.0]
    assert history.validation_loss == [3.5, 3.5]
    assert len(svi.evaluated) == 2


def generator() -> Iterator[torch.Tensor]:
    yield from batches_of(4, 2)


def test_a_generator_serves_one_epoch() -> None:
    svi = Recorder(4.0, 2.0)
    assert fit(svi, generator(), 1, progress=False).loss == [1.0]
    with pytest.raises(ValueError, match="fit: expected batches that can be walked 2 times, got"):
        fit(svi, generator(), 2, progress=False)
    assert len(svi.calls) == 2


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="expected at least one batch in batches, got none"):
        fit(Recorder(), [], 1, progress=False)


def test_an_exhausted_validation_iterator() -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="expected at least one batch in validation, got none"):
        fit(Recorder(1.0, 1.0), [x], 2, validation=iter([x]), progress=False)


@pytest.mark.parametrize(("batch", "name"), [("text", "str"), ((), "none"), ([1.5], "float")])
def test_batches_without_tensors(batch: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"fit: expected batches of tensors, got {name}"):
        fit(Recorder(1.0), [batch], 1, progress=False)


def test_num_epochs_is_a_positive_integer() -> None:
    with pytest.raises(ValueError, match="fit: expected num_epochs >= 1, got 0"):
        fit(Recorder(), [], 0)
    with pytest.raises(TypeError, match="fit: expected an integer num_epochs, got float"):
        fit(Recorder(), [], 1.0)  # type: ignore[arg-type]


def test_two_library_models_in_one_script_both_train() -> None:
    for _ in range(2):
        model, guide = linear_pair()
        before = model.weight.detach().clone(), guide.encoder.net[0].weight.detach().clone()
        fit(SVI(model, guide, adam(), Trace_ELBO()), batches_of(5), 1, progress=False)
        assert not torch.equal(model.weight, before[0])
        assert not torch.equal(guide.encoder.net[0].weight, before[1])


class Twin(PyroModule):
    """A user's module without a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(self.loc, 1.0), obs=x)


@pytest.mark.parametrize("wrapped", [False, True])
def test_two_modules_of_one_name(wrapped: bool) -> None:
    x = torch.randn(4)
    first, second = Twin(), Twin()
    fit(SVI(first, no_latents, adam(), Trace_ELBO()), [x], 1, progress=False)
    model = scale_kl(second, 0.5) if wrapped else second
    with pytest.raises(ValueError, match="of Twin to be trained, got 'loc' which is not in Pyro's"):
        fit(SVI(model, no_latents, adam(), Trace_ELBO()), [x], 1, progress=False)


@pytest.mark.parametrize("wrapped", [False, True])
def test_module_local_params(wrapped: bool) -> None:
    x = torch.randn(4)
    with pyro.settings.context(module_local_params=True):
        for _ in range(2):
            twin = Twin()
            model = scale_kl(twin, 0.5) if wrapped else twin
            svi = LocalSVI(model, no_latents, list(twin.parameters()))
            fit(svi, [x], 2, progress=False)
            assert twin.loc.item() != 0.0
        assert not list(pyro.get_param_store())


def test_enumerated_mixture_with_an_empty_guide_reaches_em() -> None:
    centres = torch.tensor([[0.0, 0.0], [6.0, 0.0]])
    x = centres[torch.arange(80) % 2] + torch.randn(80, 2)
    best = float(gaussian_mixture_em(x, 2).log_likelihoods[-1])
    model = GaussianMixture(2, 2)
    model.locs.data = centres + 1.0
    svi = SVI(model, no_latents, adam(0.05), TraceEnum_ELBO(max_plate_nesting=1))
    history = fit(svi, [x], 300, progress=False)
    assert -history.loss[-1] == pytest.approx(best, abs=1e-2)
    assert -history.loss[-1] <= best + 1e-9


def test_discrete_latents_enumerated_on_both_sides() -> None:
    x = torch.randn(9)

    def model(x: torch.Tensor) -> None:
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(9, 2))
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits))

    svi = SVI(
        config_enumerate(model),
        config_enumerate(guide),
        sgd(0.0),
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    history = fit(svi, [x], 1, progress=False)
    log_probs = [dist.Normal(loc, 1.0).log_prob(x) for loc in (-1.0, 1.0)]
    exact = -float(torch.stack(log_probs).mean(0).mean())  # q is the prior: no KL.
    assert history.loss[0] == pytest.approx(exact, rel=1e-10)


def test_autoguide_on_a_model_with_a_global_latent() -> None:
    x = 2.0 + torch.randn(40)

    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", 40, subsample=x):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=x)

    guide = AutoNormal(model)
    svi = SVI(model, guide, adam(0.02), TraceMeanField_ELBO())
    history = fit(svi, Batches(x, batch_size=20), 250, progress=False)
    posterior_mean = float(x.sum()) / (40 + 1 / 100)
    assert guide.median(x)["loc"].item() == pytest.approx(posterior_mean, abs=0.15)
    covariance = torch.eye(40) + 100.0
    exact = -float(dist.MultivariateNormal(torch.zeros(40), covariance).log_prob(x)) / 40
    assert history.loss[-1] == pytest.approx(exact, abs=0.1)


# Validation, schedules, progress, interrupts.


class Watching(nn.Module):
    """Batch normalisation and dropout, and a note of the mode of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(DATA_DIM), nn.Dropout(0.5), nn.Linear(DATA_DIM, 4))
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.net[0].training and self.net[1].training)
        return self.net(x)


@pytest.mark.parametrize("hidden", [False, True])
def test_validation_runs_in_eval_mode(hidden: bool) -> None:
    watching = Watching()
    model, guide = LinearGaussian(DATA_DIM, 2), AmortizedNormal(watching)

    def closure(x: torch.Tensor) -> torch.Tensor:
        return guide(x)

    stats: list[torch.Tensor] = []

    class Watched(SVI):
        def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
            stats.append(watching.net[0].running_mean.clone())
            return super().evaluate_loss(*args, **kwargs)

    svi = Watched(model, closure if hidden else guide, adam(), Trace_ELBO())
    fit(svi, batches_of(8, 8), 1, validation=[100 + b for b in batches_of(6, 6)], progress=False)
    # The first look, two steps, the first look at the validation data, two evaluations.
    assert watching.modes == [False, True, True, False, False, False]
    assert torch.equal(watching.net[0].running_mean, stats[0])
    assert watching.net[0].num_batches_tracked == 2
    assert all(module.training for module in [*model.modules(), *guide.modules()])


@pytest.mark.parametrize("position", [0, 1])
def test_bad_validation_data(position: int) -> None:
    good, *held_out = batches_of(4, 4, 4)
    held_out[position][0, 0] = math.nan
    svi = SVI(*linear_pair(), adam(), Trace_ELBO())
    with pytest.raises(ValueError, match="fit: expected finite data .*, got 1 NaN and 0 infinite"):
        fit(svi, [good], 1, validation=held_out, progress=False)


def test_validation_of_a_method_that_reads_its_mode() -> None:
    modes = []

    class Owner(nn.Module):
        def model(self, x: torch.Tensor) -> None:
            modes.append(self.training)
            line(x)

    owner, x = Owner(), torch.randn(3)
    fit(SVI(owner.model, no_latents, sgd(), Trace_ELBO()), [x], 1, validation=[x], progress=False)
    assert modes == [False, True, False, False]  # A look, a step, a look, an evaluation.
    assert owner.training


def test_validation_does_not_train() -> None:
    svi = SVI(line, no_latents, sgd(0.0), Trace_ELBO())
    x = torch.randn(5)
    history = fit(svi, [x], 2, validation=[x[:1], x[1:]], progress=False)
    exact = -float(dist.Normal(0.0, 1.0).log_prob(x).mean())
    assert history.validation_loss == pytest.approx([exact, exact], rel=1e-12)
    assert len(history.seconds) == 2
    assert min(history.seconds) > 0


def test_schedules_step_once_a_training_step() -> None:
    model, guide = linear_pair()
    beta = LinearWarmup(8)
    seen = []

    class Watched(SVI):
        def step(self, *args: Any, **kwargs: Any) -> float:
            seen.append(float(beta.value))
            return super().step(*args, **kwargs)

    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-3}, "gamma": 0.5}
    )
    svi = Watched(scale_kl(model, beta), scale_kl(guide, beta), optimizer, TraceMeanField_ELBO())
    batches = [1e-3 * b for b in batches_of(2, 2, 2)]
    fit(svi, batches, 2, validation=batches, schedules=[beta, optimizer], progress=False)
    assert seen == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8]
    assert beta.num_steps_taken == 6
    rates = {s.get_last_lr()[0] for s in optimizer.optim_objs.values()}
    assert rates == {1e-3 * 0.5**6}


def test_progress_bar_shows_nats_per_datum(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Recorder(30.0, 20.0), [torch.zeros(10, 1)], 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().split("\r")[-1]
    assert "epoch 2/2" in last
    assert "2/2" in last
    assert "loss 2.000 nats per datum" in last


def test_no_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Recorder(30.0), [torch.zeros(10, 1)], 1, progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_keyboard_interrupt_returns_what_was_learnt() -> None:
    class Impatient(Recorder):
        def step(self, *args: Any) -> float:
            if len(self.calls) == 5:
                raise KeyboardInterrupt
            return super().step(*args)

    history = fit(Impatient(*range(9)), [torch.zeros(1, 1)] * 2, 4, progress=False)
    assert history.interrupted
    assert history.loss == [0.5, 2.5]


def test_interrupted_validation_leaves_train_mode() -> None:
    model, guide = linear_pair()

    class Impatient(SVI):
        def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
            raise KeyboardInterrupt

    x = batches_of(4)
    history = fit(Impatient(model, guide, adam(), Trace_ELBO()), x, 3, validation=x, progress=False)
    assert history == History(interrupted=True)
    assert model.training
    assert guide.training


# Losses that are not finite.

NAN_WARNING = pytest.mark.filterwarnings("ignore:Encountered:UserWarning")


@NAN_WARNING
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_data_in_a_later_batch(validation: bool, value: float) -> None:
    x = torch.randn(4)
    bad = torch.tensor([0.0, value])
    svi = SVI(line, no_latents, sgd(), Trace_ELBO())
    fit(svi, [x], 1, progress=False)
    start = parameters()
    message = "got .* at step 3, with non-finite observed data at site 'obs' of the model. Param"
    with pyro.validation_enabled(validation), pytest.raises(FloatingPointError, match=message):
        fit(svi, [x, x, bad], 2, progress=False)
    assert torch.equal(parameters()["loc"], start["loc"])


@NAN_WARNING
@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("style", ["library", "wrapped", "closure", "local"])
def test_bad_data_in_the_first_epoch(validation: bool, style: str) -> None:
    good, bad = batches_of(4, 4)
    bad[1, 2] = math.nan
    with (
        pyro.validation_enabled(validation),
        pyro.settings.context(module_local_params=style == "local"),
    ):
        linear, encoder = linear_pair()
        owned = [*linear.parameters(), *encoder.parameters()]
        start = [p.detach().clone() for p in owned]
        model: Any = linear
        guide: Any = encoder
        if style == "closure":
            model, guide = (lambda x: linear(x)), (lambda x: encoder(x))
        elif style != "library":
            model, guide = scale_kl(linear, 0.5), scale_kl(encoder, 0.5)
        svi: Any = SVI(model, guide, adam(), Trace_ELBO())
        if style == "local":
            svi = LocalSVI(model, guide, owned)
        message = "at step 3, with non-finite .* at site '[xz]'"
        with pytest.raises(FloatingPointError, match=message):
            fit(svi, [good, good, bad], 1, progress=False)
    for parameter, value in zip(owned, start, strict=True):
        assert torch.equal(parameter, value)


@NAN_WARNING
def test_log_density_overflow_names_the_site() -> None:
    svi = SVI(line, no_latents, sgd(), Trace_ELBO())
    x = torch.zeros(2)
    message = "got inf at step 4, with a non-finite log-density at site 'obs' of the model"
    with pytest.raises(FloatingPointError, match=message):
        fit(svi, [x, x, x, x + 1e200], 1, progress=False)
    assert pyro.param("loc").item() == 0.0


@NAN_WARNING
@pytest.mark.parametrize("num_batches", [1, 2, 3])
@pytest.mark.parametrize("validation", [False, True])
def test_diverged_parameters_are_restored(num_batches: int, validation: bool) -> None:
    model, guide = linear_pair()
    svi = SVI(model, guide, sgd(1e160), Trace_ELBO())
    x = batches_of(*[5] * num_batches)
    with pyro.validation_enabled(validation), pytest.raises(FloatingPointError) as caught:
        fit(svi, x, 4, progress=False)
    text = str(caught.value)
    assert re.match(
        "fit: expected (a finite loss, got .* at step [12345], with (a )?non-finite .* at site "
        "'[xz]' of the|finite parameters, got '.*' with NaN or infinite values after step [1234])",
        text,
    ), text
    assert "start of this epoch" in text
    for name, value in parameters().items():
        assert value.isfinite().all(), name


def test_parameters_spoilt_by_the_last_step_of_an_epoch() -> None:
    class Spoils(SVI):
        def step(self, *args: Any, **kwargs: Any) -> float:
            loss = super().step(*args, **kwargs)
            with torch.no_grad():
                pyro.param("loc").fill_(math.nan)
            return loss

    svi = Spoils(line, no_latents, sgd(), Trace_ELBO())
    with pytest.raises(FloatingPointError, match="expected finite parameters, got 'loc' .* step 1"):
        fit(svi, [torch.randn(4)], 1, progress=False)
    assert pyro.param("loc").item() == 0.0


@NAN_WARNING
def test_running_statistics_are_restored() -> None:
    watching = Watching()
    model, guide = LinearGaussian(DATA_DIM, 2), AmortizedNormal(watching)
    good, bad = batches_of(6, 6)
    bad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="at step 2"):
        fit(SVI(model, guide, adam(), Trace_ELBO()), [good, bad], 1, progress=False)
    assert watching.net[0].running_mean.tolist() == [0.0] * DATA_DIM
    assert watching.net[0].num_batches_tracked == 0


def test_non_finite_loss_of_an_unknown_object() -> None:
    with pytest.raises(FloatingPointError, match="got nan at step 2. Parameters are back"):
        fit(Recorder(1.0, math.nan), [torch.zeros(2, 1)] * 2, 1, progress=False)


def test_errors_of_a_step_that_are_no_matter_of_numbers_stay_as_they_are() -> None:
    model, guide = linear_pair()
    good, wide = torch.randn(4, DATA_DIM), torch.randn(4, DATA_DIM + 1)
    with pytest.raises(ValueError, match=r"expected .*\b3\b.* got .*4\)"):
        fit(SVI(model, guide, adam(), Trace_ELBO()), [good, wide], 1, progress=False)


# The first look.


def test_first_look_has_no_side_effects() -> None:
    watching = Watching()
    model, guide = LinearGaussian(DATA_DIM, 2), AmortizedNormal(watching)
    seen: dict[str, Any] = {}

    class Stops(SVI):
        def step(self, *args: Any, **kwargs: Any) -> float:
            seen.update(
                rng=torch.get_rng_state(),
                store=list(pyro.get_param_store()),
                mean=watching.net[0].running_mean.tolist(),
                grad=torch.is_grad_enabled(),
                training=model.training and guide.training and watching.net[0].training,
            )
            raise KeyboardInterrupt

    (x,) = batches_of(5)
    copy, rng = x.clone(), torch.get_rng_state()
    history = fit(Stops(model, guide, adam(), Trace_ELBO()), [x], 1, progress=False)
    assert history.interrupted
    assert torch.equal(seen.pop("rng"), rng)
    assert seen == {"store": [], "mean": [0.0] * DATA_DIM, "grad": True, "training": True}
    assert torch.equal(x, copy)
    assert watching.modes == [False]


def bernoulli_pair() -> tuple[VAE, AmortizedNormal]:
    vae = VAE(MLP(2, [4], DATA_DIM), Bernoulli(), StandardNormalPrior(2))
    return vae, AmortizedNormal(MLP(DATA_DIM, [4], 4))


def test_first_look_leaves_python_and_numpy_alone() -> None:
    drawn = []

    def model(x: torch.Tensor) -> None:
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        line(x)

    fit(SVI(model, no_latents, sgd(), Trace_ELBO()), [torch.randn(3)], 2, progress=False)
    look, first, second = drawn
    assert look == first
    assert all(a != b for a, b in zip(first, second, strict=True))


def with_entry(value: float) -> torch.Tensor:
    x = torch.zeros(4, DATA_DIM)
    x[2, 1] = value
    return x


BAD_BATCHES: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "nan": (lambda: with_entry(math.nan), ".*expected finite data.* got 1 NaN and 0 infinite"),
    "inf": (lambda: with_entry(-math.inf), ".*expected finite data.* got 0 NaN and 1 infinite"),
    "rank": (lambda: torch.zeros(DATA_DIM), r".*: expected .*, got .*\(3,\)"),
    "width": (lambda: torch.zeros(4, DATA_DIM + 2), r".*: expected .*\b3\b.*, got .*\(4, 5\)"),
    "empty": (
        lambda: torch.zeros(0, DATA_DIM),
        "fit: expected at least one row of data in every",
    ),
}


@pytest.mark.parametrize("pair", [linear_pair, bernoulli_pair])
@pytest.mark.parametrize("name", BAD_BATCHES)
@pytest.mark.parametrize("validation", [False, True])
def test_bad_first_batch(pair: Callable[[], Any], name: str, validation: bool) -> None:
    batch, message = BAD_BATCHES[name]
    svi = SVI(*pair(), adam(), Trace_ELBO())
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match=message):
        fit(svi, [batch()], 1, progress=False)
    assert not list(pyro.get_param_store())


def test_bad_data_in_a_plain_function() -> None:
    svi = SVI(line, no_latents, sgd(), Trace_ELBO())
    message = "fit: expected finite data at site 'obs', got 1 NaN and 0 infinite values. Remove"
    with pytest.raises(ValueError, match=message):
        fit(svi, [torch.tensor([1.0, math.nan])], 1, progress=False)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0])
@pytest.mark.parametrize("validation", [False, True])
def test_grey_values_under_a_bernoulli(value: float, validation: bool) -> None:
    svi = SVI(*bernoulli_pair(), adam(), Trace_ELBO())
    message = "expected values 0 and 1 at site 'x' under a Bernoulli, .* Binarise the data"
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match=message):
        fit(svi, [with_entry(value)], 1, progress=False)


def test_forgotten_to_event_inside_a_plate() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(torch.zeros(DATA_DIM), 1.0), obs=x)

    message = (
        "fit: expected size 5 at dimension -1 of site 'obs' inside plate 'rows', got 3. "
        r"Was `.to_event\(1\)` forgotten"
    )
    with pytest.raises(ValueError, match=message):
        fit(SVI(model, no_latents, adam(), Trace_ELBO()), batches_of(5), 1, progress=False)


@pytest.mark.parametrize("validation", [False, True])
def test_forgotten_to_event_on_square_data(validation: bool) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(torch.zeros(DATA_DIM, DATA_DIM), 1.0), obs=x)

    message = (
        r"of site 'obs' to be a plate, got batch shape \(3, 3\) where dimension -2 has no plate. "
        r"Was `.to_event\(1\)` forgotten"
    )
    svi = SVI(model, no_latents, adam(), Trace_ELBO())
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match=message):
        fit(svi, batches_of(3), 1, progress=False)


def latent_guide(*names: str) -> Callable[[torch.Tensor], None]:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            for name in names:
                pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return guide


def test_different_latents_in_model_and_guide() -> None:
    model = LinearGaussian(DATA_DIM, 2)
    x = batches_of(5)
    with pytest.raises(ValueError, match="got site 'code' that the model does not have. Rename"):
        fit(SVI(model, latent_guide("z", "code"), adam(), Trace_ELBO()), x, 1, progress=False)
    with pytest.raises(ValueError, match="got no site 'z' in the guide. Add pyro.sample"):
        fit(SVI(model, latent_guide(), adam(), Trace_ELBO()), x, 1, progress=False)


def test_a_model_without_data() -> None:
    guide = latent_guide("z")
    with pytest.raises(ValueError, match="expected the model to observe data, got no observed"):
        fit(SVI(guide, guide, adam(), Trace_ELBO()), batches_of(5), 1, progress=False)


def test_masked_nan_is_no_data() -> None:
    x = torch.tensor([1.0, 3.0, 0.0])
    mask = torch.tensor([True, True, False])

    def model(x: torch.Tensor, mask: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=mask):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=x)

    fit(SVI(model, no_latents, adam(0.1), Trace_ELBO()), [(x, mask)], 100, progress=False)
    assert pyro.param("loc").item() == pytest.approx(2.0, abs=0.05)


def test_constrained_parameters_are_restored_where_they_live() -> None:
    class Scaled(PyroModule):
        def __init__(self) -> None:
            super().__init__("scaled")
            self.scale = PyroParam(torch.tensor(2.0), constraints.positive)

        def forward(self, x: torch.Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("obs", dist.Normal(0.0, self.scale), obs=x)

    model, x = Scaled(), torch.randn(4)
    svi = SVI(model, no_latents, adam(), Trace_ELBO())
    with pytest.raises(FloatingPointError, match="at step 2"):
        fit(svi, [x, x * math.nan], 1, progress=False)
    assert model.scale.item() == pytest.approx(2.0, rel=1e-12)


def test_programs_are_found_by_name_only() -> None:
    """An object whose model is no program is still an object with a step."""
    svi = SimpleNamespace(model="linear", guide=None, step=lambda x: 3.0, evaluate_loss=None)
    assert fit(svi, [torch.zeros(3, 1)], 1, progress=False).loss == [1.0]


def test_an_empty_batch_later_on() -> None:
    svi = SVI(*linear_pair(), adam(), Trace_ELBO())
    with pytest.raises(ValueError, match=r"row of data in every batch, got an empty one of shape"):
        fit(svi, [torch.randn(4, DATA_DIM), torch.zeros(0, DATA_DIM)], 1, progress=False)


def test_bad_data_in_a_later_batch_are_named_before_what_they_spoil() -> None:
    bad = torch.randn(4, DATA_DIM)
    bad[1, 2] = torch.nan
    svi = SVI(*linear_pair(), adam(), Trace_ELBO())
    with pytest.raises(FloatingPointError, match="observed data at site 'x'.*Remove those rows"):
        fit(svi, [torch.randn(4, DATA_DIM), bad], 1, progress=False)


def test_a_module_that_is_not_registered_is_warned_about() -> None:
    net = nn.Linear(2, DATA_DIM)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = torch.randn(4, DATA_DIM)
    with pytest.warns(UserWarning, match="got 'weight' that gets a gradient and is not in Pyro's"):
        fit(SVI(model, guide, adam(), Trace_ELBO()), [x], 1, progress=False)

    net.requires_grad_(False)
    fit(SVI(model, guide, adam(), Trace_ELBO()), [x], 1, progress=False)


def test_a_copy_of_a_model_trains_beside_the_original() -> None:
    model, guide = linear_pair()
    fit(SVI(model, guide, adam(), Trace_ELBO()), [torch.randn(4, DATA_DIM)], 1, progress=False)
    copied = copy.deepcopy(model)
    before = copied.weight.detach().clone()
    other = linear_pair()[1]
    fit(SVI(copied, other, adam(), Trace_ELBO()), [torch.randn(4, DATA_DIM)], 1, progress=False)
    assert not copied.weight.equal(before)


def test_one_module_in_both_programs() -> None:
    net = nn.Linear(1, 1)

    def model(x: torch.Tensor) -> None:
        pyro.module("b", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("a", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x).squeeze(-1), 1.0))

    before = net.weight.detach().clone()
    fit(SVI(model, guide, adam(), Trace_ELBO()), [torch.randn(5, 1)], 2, progress=False)
    assert not net.weight.equal(before)


def test_a_guide_value_with_a_dimension_of_one_more() -> None:
    def model(x: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.zeros(1)), 1.0))

    fit(SVI(model, guide, adam(), Trace_ELBO()), [torch.randn(5)], 2, progress=False)


def test_lazy_layers_train() -> None:
    net = nn.LazyLinear(2)

    def guide(x: torch.Tensor) -> None:
        out = net(x)
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(out, 1.0).to_event(1))

    fit(
        SVI(linear_pair()[0], guide, adam(), Trace_ELBO()),
        [torch.randn(5, DATA_DIM)],
        2,
        progress=False,
    )
    assert net.weight.shape == (2, DATA_DIM)


def test_a_step_that_returns_several_losses() -> None:
    svi = SimpleNamespace(step=lambda x: (1.0, 2.0))
    with pytest.raises(TypeError, match=r"expected svi.step to return one loss, got 2"):
        fit(svi, [torch.zeros(3)], 1, progress=False)
