"""Ten steps of CompiledSVI are ten steps of Pyro's SVI, for whatever the package offers."""

import contextlib
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import test_auto_guide
import test_categorical
import test_conditional_vae
import test_guides
import test_interplay
import test_models
import test_multimodal_objectives
import test_objectives
import test_priors
import test_semi_supervised
import test_vq
import torch
from contracts import BATCH, Case, normal_x
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer import autoguide as autoguides
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.nn.functional import softplus

import pyro_vae.guides
import pyro_vae.models
from pyro_vae import guides, likelihoods, objectives, scale_kl
from pyro_vae.compiled_svi import CaptureError, CompiledSVI
from pyro_vae.models import VAE
from pyro_vae.nets import MLP
from pyro_vae.objectives import (
    TraceClassification_ELBO,
    TraceDIP_ELBO,
    TraceFactor_ELBO,
    TraceInterplay_ELBO,
    TraceVQ_ELBO,
)
from pyro_vae.schedules import LinearWarmup, Schedule

Make = Callable[[], tuple[Any, ...]]
Batches = Sequence[tuple[Any, ...]]

STEPS = 10
STOCK_STEPS = 5
"""Of ten: the first, that of the capture, and the 2nd, 4th and 8th use, which are checks."""


class Trained:
    """What ten steps leave behind.

    Args:
        svi_class: ``SVI`` or ``CompiledSVI``, with its options.
        make: Makes model, guide, loss, and perhaps modules and schedules they use.
        batches: The arguments of each step.
        dtype: Of everything.
        optim: Makes an optimizer.
    """

    def __init__(
        self,
        svi_class: Any,
        make: Make,
        batches: Batches,
        dtype: torch.dtype = torch.float64,
        optim: Callable[[], Any] = lambda: pyro.optim.Adam({"lr": 0.02}),
    ) -> None:
        torch.set_default_dtype(dtype)
        try:
            pyro.clear_param_store()
            pyro.set_rng_seed(1)
            model, guide, loss, *others = make()
            self.svi = svi_class(model, guide, optim(), loss)
            pyro.set_rng_seed(2)
            self.losses = []
            for batch in batches:
                self.losses.append(self.svi.step(*_as(batch, dtype)))
                for schedule in others:
                    if isinstance(schedule, Schedule):
                        schedule.step()
        finally:
            torch.set_default_dtype(torch.float64)
        self.random = torch.get_rng_state()
        store = pyro.get_param_store()
        # A second model of a class has another number in its name.
        self.parameters = [store._params[name].detach().clone() for name in store.keys()]
        self.states = [_state_of(x) for x in (model, guide, loss, *others)]


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _as(v, dtype) for name, v in value.items()}
    return tuple(_as(v, dtype) for v in value) if isinstance(value, tuple) else value


def _state_of(value: Any) -> Any:
    state = getattr(value, "state_dict", None)
    if state is None or isinstance(value, Schedule):
        return None
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in state().values()]


def sgd() -> Any:
    return pyro.optim.SGD({"lr": 0.0005, "momentum": 0.5})


def by_inductor(*args: Any) -> CompiledSVI:
    return CompiledSVI(*args, mode="inductor", strict=True)


def by_graph(*args: Any) -> CompiledSVI:
    return CompiledSVI(*args, mode="graph")


def compiled(*args: Any) -> CompiledSVI:
    return CompiledSVI(*args, mode="graph", strict=True)


def check_parity(
    make: Make,
    batches: Batches,
    *,
    num_graphs: int = 1,
    svi_class: Any = compiled,
    **how: Any,
) -> Trained:
    expected, actual = Trained(SVI, make, batches, **how), Trained(svi_class, make, batches, **how)
    tolerance = 1e-5 if how.get("dtype") is torch.float32 else 1e-10
    check_equal(actual, expected, tolerance)
    assert len(actual.svi.graphs) == num_graphs
    if num_graphs == 1:
        # No step more: a graph whose assumptions fail leaves its step to Pyro.
        assert actual.svi._num_steps == STOCK_STEPS
    return actual


def check_equal(actual: Trained, expected: Trained, tolerance: float) -> None:
    for name in ("losses", "parameters", "states"):
        torch.testing.assert_close(
            getattr(actual, name),
            getattr(expected, name),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert torch.equal(actual.random, expected.random)
    moved = torch.cat([p.flatten() for p in actual.parameters])
    assert moved.isfinite().all()
    assert len(set(actual.losses)) > 1


def batches_of(case: Case) -> Batches:
    """Other rows for every step."""
    x = case.make_x(BATCH + STEPS)
    return [case.args(x[k : k + BATCH]) for k in range(STEPS)]


# ---------------------------------------------------------------- models and guides

# Others of their kind are there.
ALIKE = {
    *("VAE, heteroscedastic", "AmortizedBottomUp, two layers", "ProductOfExperts"),
    *("VAE, Normal", "VAE, negative binomial", "VAE, convolutional", "mixture, diagonal"),
    *("HierarchicalVAE, three layers", "factor analysis", "mixture, spherical"),
    *("AmortizedNormal", "AmortizedBottomUp, three layers", "AmortizedLadder, three layers"),
    *("MixtureOfExperts, private latents", "MixtureOfProducts, private latents"),
    *("ProductOfExperts, private latents", "AmortizedInterplay", "ExactLinearGaussian"),
    *("ExactGaussianMixture", "gumbel-straight-through", "integers, one latent"),
    *("straight-through, learnt prior", "inverse, hidden layers", "another site"),
    *("class, N(0, I)", "vector"),
}

CASES: dict[str, Case] = {
    f"{module.__name__}: {name}": case
    for module in (
        test_models,
        test_guides,
        test_auto_guide,
        test_categorical,
        test_conditional_vae,
        test_semi_supervised,
        test_vq,
    )
    for name, case in module.CASES.items()
    if name not in ALIKE
}


def of_case(case: Case) -> Make:
    return lambda: (*case.make(), case.elbo())


@pytest.mark.parametrize("name", CASES)
def test_models_and_guides(name: str) -> None:
    check_parity(of_case(CASES[name]), batches_of(CASES[name]))


# ---------------------------------------------------------------- objectives


def binary(rows: int = 6) -> Batches:
    x = torch.rand(rows + STEPS, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    return [(x[k : k + rows].double(),) for k in range(STEPS)]


class Everything:
    """A user's pair: two latents, a subsample, a mask and a scale, constrained parameters."""

    def __init__(self) -> None:
        self.parameters = {"weight": torch.randn(3, 6), "encoder": torch.randn(6, 3) * 0.4}

    def model(self, x: torch.Tensor) -> None:
        weight = pyro.param("weight", self.parameters["weight"])
        with pyro.plate("rows", 40, subsample=torch.arange(len(x))), self.around(x):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.2))
            loc = torch.cat([a, b.unsqueeze(-1)], -1) @ weight
            pyro.sample("x", dist.Bernoulli(logits=loc).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        loc = x @ pyro.param("encoder", self.parameters["encoder"])
        scale = pyro.param("scale", lambda: torch.ones(3), constraint=constraints.positive)
        with pyro.plate("rows", 40, subsample=torch.arange(len(x))), self.around(x):
            pyro.sample("a", dist.Normal(loc[:, :2], scale[:2]).to_event(1))
            pyro.sample("b", dist.Normal(loc[:, 2], scale[2]))

    def around(self, x: torch.Tensor) -> Any:
        return poutine.mask(mask=x[:, 0] + x[:, 1] > 0)


@pytest.mark.filterwarnings("ignore:.*the model does not broadcast over particles")
@pytest.mark.parametrize(
    ("name", "particles"),
    [
        *((name, 1) for name in test_objectives.MAKE),
        *((name, 2) for name in ("factor", "iwae, groups")),
    ],
)
def test_objectives_of_a_vae(name: str, particles: int) -> None:
    """With dropout and batch-norm."""
    make = test_objectives.MAKE[name]
    # Adam makes steps of rounding where a gradient is zero, as of a bias before batch-norm.
    check_parity(
        lambda: (*test_objectives.noisy_pair(), make(num_particles=particles)),
        binary(),
        optim=sgd,
    )


@pytest.mark.parametrize("name", [name for name in test_objectives.MAKE if name != "factor"])
def test_objectives_of_a_program(name: str) -> None:
    def make() -> tuple[Any, ...]:
        pair = Everything()
        return pair.model, pair.guide, test_objectives.MAKE[name]()

    check_parity(make, binary())


def modalities(missing: bool = True, names: str = "ab") -> Batches:
    """Batches of which some rows lack some modalities."""
    full, present = test_multimodal_objectives.data(6 + STEPS)
    full = {name: full[name] for name in names}
    present = {name: mask for name, mask in present.items() if missing and name in names}
    return [
        tuple({name: x[k : k + 6] for name, x in part.items()} for part in (full, present))
        for k in range(STEPS)
    ]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *((name, True) for name in test_multimodal_objectives.MAKE if "random" not in name),
        ("expert kl", False),
        ("subsets", False),
    ],
)
def test_objectives_of_modalities(name: str, missing: bool) -> None:
    of = test_multimodal_objectives
    check_parity(lambda: (of.model, of.guide, of.MAKE[name]()), modalities(missing))


@pytest.mark.parametrize("name", ["ProductOfExperts", "MixtureOfProducts, drawn", "AmortizedSet"])
def test_missing_modalities(name: str) -> None:
    case = test_guides.CASES[name]
    present = {"image": torch.arange(BATCH) > 1, "sound": torch.arange(BATCH) < 3}
    batches = [(*args, present) for args in batches_of(case)]
    check_parity(of_case(case), batches)


@pytest.mark.parametrize(("kind", "num_sweeps"), [("normal", 2), ("bernoulli", None)])
def test_objective_of_interplay(kind: Any, num_sweeps: int | None) -> None:
    def make() -> tuple[Any, ...]:
        return *test_interplay.pair(kind, num_sweeps), TraceInterplay_ELBO(2, num_chains=20)

    x = torch.randn(3 + STEPS, 3)
    batches = [({"a": x[k : k + 3], "b": x[k : k + 3].flip(0)},) for k in range(STEPS)]
    check_parity(make, batches)


@pytest.mark.parametrize("vectorize", [False, True])
def test_objective_of_classification(vectorize: bool) -> None:
    case = test_semi_supervised.CASES["some labels"]
    elbo = TraceEnum_ELBO(
        max_plate_nesting=1, num_particles=1 + vectorize, vectorize_particles=vectorize
    )
    check_parity(lambda: (*case.make(), TraceClassification_ELBO(3.0, elbo)), batches_of(case))


@pytest.mark.parametrize("name", ["by gradient", "by moving averages"])
def test_objective_of_codes_with_masks(name: str) -> None:
    case = test_vq.CASES[name]

    def make() -> tuple[Any, ...]:
        pair = case.make()
        masked = [poutine.mask(program, mask=torch.arange(BATCH) > 1) for program in pair]
        return *masked, TraceVQ_ELBO(0.4, TraceMeanField_ELBO()), *pair

    check_parity(make, batches_of(case))


# ---------------------------------------------------------------- Pyro's own


SEVERAL = {"num_particles": 2, "max_plate_nesting": 1}
ELBOS: dict[str, Callable[[], Any]] = {
    "Trace": Trace_ELBO,
    "Trace, particles": lambda: Trace_ELBO(num_particles=2),
    "Trace, particles at once": lambda: Trace_ELBO(**SEVERAL, vectorize_particles=True),
    "mean field": TraceMeanField_ELBO,
    "mean field, particles at once": lambda: TraceMeanField_ELBO(
        **SEVERAL, vectorize_particles=True
    ),
    "graph": TraceGraph_ELBO,
    "Renyi": lambda: RenyiELBO(0.5, num_particles=2),
    "Renyi, particles at once": lambda: RenyiELBO(0.0, **SEVERAL, vectorize_particles=True),
    "enumeration": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "a function": lambda: (
        lambda model, guide, *args: Trace_ELBO().differentiable_loss(model, guide, *args)
    ),
}


@pytest.mark.parametrize(
    ("elbo", "dtype"),
    [
        *((elbo, torch.float64) for elbo in ELBOS),
        *((elbo, torch.float32) for elbo in ("Trace", "graph", "enumeration")),
    ],
)
def test_elbos_of_pyro(elbo: str, dtype: torch.dtype) -> None:
    def make() -> tuple[Any, ...]:
        pair = Everything()
        return pair.model, pair.guide, ELBOS[elbo]()

    check_parity(make, binary(), dtype=dtype)


@pytest.mark.parametrize("elbo", ["Trace", "mean field, particles at once"])
def test_scales_of_a_schedule(elbo: str) -> None:
    """Whose tensor is updated in place: one graph serves all its values."""

    def make() -> tuple[Any, ...]:
        pair, beta = Everything(), LinearWarmup(8, start=0.2)
        programs = [
            scale_kl(poutine.scale(f, torch.tensor(0.3)), beta) for f in (pair.model, pair.guide)
        ]
        return *programs, ELBOS[elbo](), beta

    check_parity(make, binary())


def test_objectives_follow_their_schedules() -> None:
    def make() -> tuple[Any, ...]:
        beta = LinearWarmup(8, start=0.2)
        return *test_objectives.noisy_pair(), TraceDIP_ELBO(beta, 2.0), beta

    check_parity(make, binary(), optim=sgd)


# ---------------------------------------------------------------- programs of a user


class Network(PyroModule):
    """Parameters of all kinds, dropout and batch-norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = PyroModule[nn.Linear](inputs, 5)
        self.rest = PyroModule[nn.Sequential](
            nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, outputs)
        )
        self.gain = PyroParam(torch.tensor(1.5), constraint=constraints.positive)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * self.rest(self.first(x))


def pyro_module() -> tuple[Any, ...]:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network(2, 6)

        def forward(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network(6, 4)

        def forward(self, x: torch.Tensor) -> None:
            loc, raw = self.net(x).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))

    return Model(), Guide(), Trace_ELBO()


def plain_modules() -> tuple[Any, ...]:
    """Registered by ``pyro.module``; the plate draws a subsample."""
    decoder, encoder = test_objectives.Noisy(2, 6), test_objectives.Noisy(6, 4)

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[rows])

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            loc, raw = encoder(x[rows]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))

    return model, guide, Trace_ELBO(), decoder, encoder


def random_module() -> tuple[Any, ...]:
    """A Bayesian regression by PyroSample."""

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](5, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 5]).to_event(2))

        def forward(self, x: torch.Tensor) -> None:
            loc = self.linear(x[:, :5]).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(loc, 1.0), obs=x[:, 5])

    model = Regression()
    return model, autoguides.AutoDiagonalNormal(model), Trace_ELBO()


def global_latents(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(6), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("data", 40, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def by_autoguide(kind: Any) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        return global_latents, kind(global_latents), Trace_ELBO()

    return make


def score_function(elbo: Any, **baseline: Any) -> Callable[[], tuple[Any, ...]]:
    """A latent without reparameterised samples, at which a baseline may stand."""

    def make() -> tuple[Any, ...]:
        net = nn.Linear(6, 1)

        def model(x: torch.Tensor) -> None:
            logits = pyro.param("logits", lambda: torch.randn(2, 6))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
                pyro.sample("x", dist.Bernoulli(logits=logits[z.long()]).to_event(1), obs=x)

        def guide(x: torch.Tensor) -> None:
            weight = pyro.param("weight", lambda: torch.randn(6))
            infer: dict[str, Any] = {"baseline": dict(baseline)}
            if "nn_baseline" in baseline:
                pyro.module("baseline", net)
                infer["baseline"]["nn_baseline"] = lambda x: net(x).squeeze(-1)
                infer["baseline"]["nn_baseline_input"] = x
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=x @ weight), infer=infer)

        return model, guide, elbo()

    return make


PROGRAMS: dict[str, Make] = {
    "PyroModule": pyro_module,
    "pyro.module": plain_modules,
    "PyroSample": random_module,
    "AutoNormal": by_autoguide(autoguides.AutoNormal),
    "AutoMultivariateNormal": by_autoguide(autoguides.AutoMultivariateNormal),
    "AutoDelta": by_autoguide(autoguides.AutoDelta),
    "score function": score_function(Trace_ELBO),
    "score function, graph": score_function(TraceGraph_ELBO),
    "neural baseline": score_function(TraceGraph_ELBO, nn_baseline=True),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_a_user(name: str) -> None:
    check_parity(PROGRAMS[name], binary(), optim=sgd)


@pytest.mark.parametrize("name", ["mixture", "vamp", "spline", "coupling", "zuko"])
def test_priors_of_a_vae(name: str) -> None:
    def make() -> tuple[Any, ...]:
        decoder, encoder = MLP(2, [5], 6), MLP(6, [5], 4)
        model = VAE(decoder, likelihoods.Bernoulli(), test_priors.MAKE[name](2))
        return model, guides.AmortizedNormal(encoder), Trace_ELBO()

    check_parity(make, binary())


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_by_the_inductor(dtype: torch.dtype) -> None:
    """Two latents and dropout: random numbers are drawn in the program's order."""

    class TwoLatents(Everything):
        def around(self, x: torch.Tensor) -> Any:
            return contextlib.nullcontext()

        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(3, 7), nn.Dropout(0.4), nn.Linear(7, 6))

        def model(self, x: torch.Tensor) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("rows", 40, subsample=torch.arange(len(x))):
                a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.2))
                logits = self.decoder(torch.cat([a, b.unsqueeze(-1)], -1))
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def make() -> tuple[Any, ...]:
        pair = TwoLatents()
        return pair.model, pair.guide, Trace_ELBO()

    trained = check_parity(make, binary(), dtype=dtype, svi_class=by_inductor)
    assert trained.svi.graphs[0].backend == "inductor"


# ---------------------------------------------------------------- what no graph holds


def of_revived_codes() -> tuple[Any, ...]:
    pair = test_vq.pair(decay=0.9, revive_below=0.1)
    return *pair, TraceVQ_ELBO(), *pair


def of_masked_factors() -> tuple[Any, ...]:
    pair = Everything()
    return pair.model, pair.guide, test_objectives.MAKE["factor"]()


def of_plain_adam() -> tuple[Any, ...]:
    discriminator = test_objectives.discriminator()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    objective = TraceFactor_ELBO(3.0, discriminator, optimizer=optimizer)
    return *test_objectives.noisy_pair(), objective


def of_random_subsets() -> tuple[Any, ...]:
    of = test_multimodal_objectives
    return of.model, of.guide, of.MAKE["subsets, random"]()


# What makes the operations of a step depend on values, and what the warning says.
DYNAMIC: dict[str, tuple[Make, str]] = {
    # The number of different encoded vectors, of which some become codes.
    "codes that are revived": (of_revived_codes, "the shape that .* returns depends on values"),
    # Codes are permuted among the rows that the mask lets through.
    "factor, with masks": (of_masked_factors, "the shape that .* returns depends on values"),
    # Torch's own loop over parameters needs Python numbers; its fused kernel does not.
    "factor, an optimizer that is not fused": (of_plain_adam, "reads a number that depends on"),
    # Other terms in every step.
    "random subsets of modalities": (of_random_subsets, "reads a number .*tolist"),
    # Pyro makes the average anew in every step, as a tensor of a class of its own.
    "average baseline": (
        score_function(TraceGraph_ELBO, use_decaying_avg_baseline=True),
        "changes pyro.param.'__baseline_avg_downstream_cost_z'",
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_what_no_graph_holds(name: str) -> None:
    """One warning with the reason, and Pyro's steps."""
    make, reason = DYNAMIC[name]
    batches = {
        "codes that are revived": [(x,) for x in normal_x(BATCH * STEPS).split(BATCH)],
        "random subsets of modalities": modalities(names="abc"),
    }.get(name, binary())
    expected = Trained(SVI, make, batches, optim=sgd)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = Trained(by_graph, make, batches, optim=sgd)
    [warning] = [str(w.message) for w in caught if "CompiledSVI" in str(w.message)]
    assert re.search(reason, warning)
    assert "These steps are taken by Pyro" in warning
    check_equal(actual, expected, 0.0)
    assert not actual.svi.graphs
    with pytest.raises(CaptureError, match=reason):
        Trained(compiled, make, batches, optim=sgd)


# ---------------------------------------------------------------- all of them


def test_every_public_name_is_here() -> None:
    pairs = [case.make() for case in CASES.values()]
    assert {type(guide).__name__ for _, guide in pairs} == set(pyro_vae.guides.__all__)
    models = {model._pyro_name.split("_")[0] for model, _ in pairs}
    assert models == set(pyro_vae.models.__all__)
    made = [*test_objectives.MAKE.values(), *test_multimodal_objectives.MAKE.values()]
    others = {"TraceClassification_ELBO", "TraceInterplay_ELBO", "TraceVQ_ELBO"}
    assert {type(make()).__name__ for make in made} | others == set(objectives.__all__)
