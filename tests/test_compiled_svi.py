"""``CompiledSVI`` from outside: arguments, errors, epochs, and a machine without compiler."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from side_by_side import Training, check_same, normal_guide, normal_model, rows, train

import pyro_vae.capture.step
from pyro_vae import CompiledSVI, fit


def model_of(x: Any, beta: Any = 1.0, name: Any = None, more: Any = None) -> None:
    """Many kinds of arguments."""
    loc = pyro.param("loc", torch.zeros(()))
    shift = 0.0 if more is None else torch.as_tensor(more["y"])
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, torch.as_tensor(beta)))
        pyro.sample("x", dist.Normal(z * (2.0 if name == "a" else 1.0) + shift, 1.0), obs=x)


def guide_of(x: Any, *args: Any, **kwargs: Any) -> None:
    """Sees the data alone."""
    normal_guide(x)


ARGUMENTS: dict[str, tuple[Callable[[int], Any], int]] = {
    "keywords": (lambda s: ((rows(s),), {"name": "a" if s % 2 else None}), 2),
    "mappings": (lambda s: ((rows(s),), {"more": {"y": rows(s + 9)}}), 1),
    "1, 1.0 and True": (lambda s: ((rows(s), [1, 1.0, True][s % 3]), {}), 3),
    "a 0-d tensor": (lambda s: ((rows(s), torch.tensor(1.0 + s)), {}), 1),
    "a float at every step": (lambda s: ((rows(s), 1.0 + s), {}), 4),
    "a number of numpy": (lambda s: ((rows(s), np.float64(1.0 + s)), {}), 4),
    "an array": (lambda s: ((rows(s), np.full(4, 1.0 + s)), {}), 0),
    "short last batches": (lambda s: rows(s, 4 if s % 3 < 2 else 1), 2),
    "many lengths": (lambda s: rows(s, 2 + s), 4),
    "strides": (lambda s: torch.stack([rows(s)] * 2, 1)[:, 0] if s % 2 else rows(s), 2),
    "expanded": (lambda s: rows(s)[:1].expand(4), 1),
    "precisions": (lambda s: rows(s).float() if s % 2 else rows(s), 2),
    "with gradient": (lambda s: rows(s).requires_grad_(), 1),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str) -> None:
    prepare, graphs = ARGUMENTS[name]
    course = check_same(
        lambda: Training(model_of, guide_of, prepare), 9, graphs=graphs, max_graphs=4
    )
    assert len(course.warned) == (graphs in (0, 4))
    if graphs == 4:
        assert "more forms than the 4 graphs that are kept" in course.warned[0]
    if graphs == 0:
        assert "neither a tensor nor a plain number or string" in course.warned[0]


def test_the_same_tensor_twice_and_later_not() -> None:
    def prepare(step: int) -> Any:
        x = rows(step)
        return (x, 1.0, None, {"y": x if step < 5 else rows(step + 50)}), {}

    check_same(lambda: Training(model_of, guide_of, prepare))


def test_an_argument_that_is_also_a_global() -> None:
    def build() -> Training:
        held = rows(0)

        def model(x: torch.Tensor) -> None:
            model_of(x, more={"y": held})

        return Training(model, normal_guide, lambda step: held if step < 5 else rows(step))

    check_same(build)


LOSSES: dict[str, Callable[[], Any]] = {
    "mean field": TraceMeanField_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=3),
    "a function": lambda: lambda m, g, x: 2.0 * Trace_ELBO().differentiable_loss(m, g, x),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    check_same(lambda: Training(normal_model, normal_guide, rows, None, LOSSES[name]()))


def test_losses_that_are_tuples() -> None:
    def model(x: torch.Tensor, observations: Any = None) -> None:
        normal_model(x)

    loss = ReweightedWakeSleep(num_particles=3, vectorize_particles=False)
    check_same(lambda: Training(model, guide_of, rows, None, loss))


def labels_model(y: torch.Tensor) -> None:
    """Draws, then looks at its data; keeps a count of its runs."""
    probs = pyro.param("probs", torch.ones(3) / 3, constraint=dist.constraints.simplex)
    COUNT.add_(1.0)
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Categorical(probs), obs=y)


def labels_guide(y: torch.Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(pyro.param("shift", torch.zeros(())), 1.0))


COUNT = torch.zeros(())


@pytest.mark.parametrize("num_steps", [4, 5, 6])
def test_labels_out_of_support_in_a_later_batch(num_steps: int) -> None:
    def run(kind: Callable[..., Any], **options: Any) -> Any:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        COUNT.zero_()
        optim = pyro.optim.Adam({"lr": 0.1})
        svi = kind(labels_model, labels_guide, optim, Trace_ELBO(), **options)
        for _ in range(num_steps):
            svi.step(torch.tensor([0.0, 1.0, 2.0]))
        with pytest.raises(ValueError, match="support") as raised:
            svi.step(torch.tensor([0.0, 1.0, 7.0]))
        kept = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        return str(raised.value)[:80], kept, COUNT.clone(), torch.get_rng_state()

    wanted, actual = run(SVI), run(CompiledSVI, mode="graph")
    assert actual[0] == wanted[0]
    torch.testing.assert_close(actual[1], wanted[1])
    assert torch.equal(actual[2], wanted[2])
    assert torch.equal(actual[3], wanted[3])


def make(**options: Any) -> CompiledSVI:
    optim = pyro.optim.Adam({"lr": 0.05})
    return CompiledSVI(normal_model, normal_guide, optim, Trace_ELBO(), mode="graph", **options)


def test_a_loss_that_is_nan_warns() -> None:
    with pyro.validation_enabled(False):
        svi = make()
        for step in range(5):
            svi.step(rows(step))
        with pytest.warns(UserWarning, match="Encountered NaN"):
            svi.step(rows(5) * torch.nan)


def test_handlers_around_a_step() -> None:
    def run(svi: Any) -> list[float]:
        losses = []
        for step in range(8):
            if step in (3, 6):
                with poutine.scale(scale=2.0):
                    losses.append(svi.step(rows(step)))
            else:
                losses.append(svi.step(rows(step)))
        return losses

    wanted = run(SVI(normal_model, normal_guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    assert run(make()) == pytest.approx(wanted, rel=1e-9)


def test_two_share_their_parameters() -> None:
    def run(kind: Callable[..., Any], **options: Any) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        first, second = (
            kind(normal_model, normal_guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO(), **options)
            for lr in (0.1, 0.01)
        )
        return [(first if step % 3 else second).step(rows(step)) for step in range(14)]

    assert run(CompiledSVI, mode="graph") == pytest.approx(run(SVI), rel=1e-9)


def fresh() -> CompiledSVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return make()


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_is_its_steps(drop_last: bool) -> None:
    x = rows(0, 22)
    losses = fresh().epoch(x, batch_size=4, drop_last=drop_last)
    assert losses.shape == (5 if drop_last else 6,)
    after = pyro.param("loc").item()
    again = fresh().epoch(x, batch_size=4, drop_last=drop_last)
    assert torch.equal(again, losses)
    svi = fresh()
    batches = x[torch.randperm(22)].split(4)
    wanted = [svi.step(batch) for batch in batches[: len(losses)]]
    assert losses.tolist() == pytest.approx(wanted, rel=1e-12)
    assert pyro.param("loc").item() == pytest.approx(after, rel=1e-12)


def test_an_epoch_of_mappings() -> None:
    svi = CompiledSVI(
        lambda data: model_of(data["x"], more=data),
        lambda data: normal_guide(data["x"]),
        pyro.optim.Adam({"lr": 0.05}),
        Trace_ELBO(),
        mode="graph",
    )
    losses = svi.epoch({"x": rows(0, 12), "y": rows(1, 12)}, batch_size=4, shuffle=False)
    assert losses.isfinite().all()
    assert len(svi.graphs) == 1


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        ((rows(0, 4), rows(0, 5)), {"batch_size": 2}, "same number of rows, at least 1, got"),
        ((rows(0, 0),), {"batch_size": 2}, "same number of rows, at least 1, got"),
        ((rows(0, 4),), {"batch_size": 0}, "expected batch_size >= 1, got 0"),
        ((rows(0, 4),), {"batch_size": 5, "drop_last": True}, "at least one batch of 5 rows"),
    ],
)
def test_epochs_that_cannot_be(data: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make().epoch(*data, **options)


def test_fit() -> None:
    def run(svi: Any) -> Any:
        batches = [rows(step) for step in range(4)]
        return fit(svi, batches, 3, validation=[rows(9)], progress=False)

    wanted = run(SVI(normal_model, normal_guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()))
    history = run(fresh())
    assert history.loss == pytest.approx(wanted.loss, rel=1e-9)
    assert history.validation_loss == pytest.approx(wanted.validation_loss, rel=1e-9)


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: Any, inputs: Any) -> Any:
        raise OSError("no g++")

    monkeypatch.setattr(pyro_vae.capture.step, "compile_graph", fail)
    course = check_same(lambda: Training(normal_model, normal_guide, rows), 6, mode="inductor")
    [warned] = course.warned
    assert "expected torch's compiler to work, got OSError: no g++" in warned
    assert course.svi.graphs[0].backend == "graph"


def test_a_machine_without_compiler(tmp_path: Path) -> None:
    code = (
        "import warnings, pyro, side_by_side as s\n"
        "task = s.Training(s.normal_model, s.normal_guide, s.rows)\n"
        "course = s.train(lambda: task, 4, compiled=True, mode='inductor')\n"
        "print(len([w for w in course.warned if 'Install g++' in w]), course.svi.graphs[0].backend)"
    )
    environment = {
        **os.environ,
        "PATH": str(tmp_path),
        "CXX": "/nowhere/g++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "graph"], done.stderr


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"optim": "Adam"}, TypeError, "expected optim to be an optimizer of pyro.optim or torch"),
        ({"mode": "eager"}, ValueError, "expected mode 'inductor' or 'graph', got 'eager'"),
        ({"max_graphs": 0}, ValueError, "expected max_graphs >= 1, got 0"),
    ],
)
def test_options_that_are_wrong(options: Any, error: Any, match: str) -> None:
    given = {"optim": pyro.optim.Adam({}), "loss": Trace_ELBO(), **options}
    with pytest.raises(error, match=match):
        CompiledSVI(normal_model, normal_guide, **given)


def test_summary_and_evaluation() -> None:
    svi = make()
    assert svi.summary() == "no graph so far"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            svi.step(rows(step))
    before = pyro.param("loc").item()
    assert svi.evaluate_loss(rows(0)) > 0
    assert pyro.param("loc").item() == before
    assert "arguments (4,):" in svi.summary()
    assert train(lambda: Training(normal_model, normal_guide, rows), 3, False).losses
