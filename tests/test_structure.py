"""What is read from a model, and the faithful inverse of its graph, against d-separation."""

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import combinations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch.distributions import constraints

from pyro_vae.inversion import faithful_inverse, model_parents
from pyro_vae.structure import ModelStructure, Reading, read_structure

ROWS = 5
Graph = dict[str, tuple[str, ...]]


def data(num_rows: int = ROWS) -> torch.Tensor:
    return torch.randn(num_rows, 2, generator=torch.Generator().manual_seed(3))


def reading(model: Callable[..., Any], *args: Any, **how: Any) -> Reading:
    return read_structure(model, args or (data(),), {}, where="here", **how)


def structure_of(model: Callable[..., Any], *args: Any, **how: Any) -> ModelStructure:
    return reading(model, *args, **how).structure


def normal(name: str, loc: Any = 0.0, scale: Any = 1.0, **how: Any) -> Any:
    return pyro.sample(name, dist.Normal(torch.as_tensor(loc), scale), **how)


def in_plate(body: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """A model whose sites all lie in one plate."""

    def model(measured: torch.Tensor) -> None:
        with pyro.plate("patients", len(measured)):
            body(measured)

    return model


# The inverse of a graph.


def moral(graph: Graph, among: Collection[str]) -> dict[str, set[str]]:
    touches: dict[str, set[str]] = {name: set() for name in among}
    for name in among:
        for first, second in combinations((name, *graph[name]), 2):
            touches[first].add(second)
            touches[second].add(first)
    return touches


def ancestors(graph: Graph, names: Iterable[str]) -> set[str]:
    found, left = set[str](), list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += graph[name]
    return found


def separated(graph: Graph, one: str, others: Collection[str], known: Collection[str]) -> bool:
    """d-separation, by a search through the moral graph of the ancestors."""
    touches = moral(graph, ancestors(graph, [one, *others, *known]))
    left, seen = [one], {one}
    while left:
        for name in touches[left.pop()] - set(known) - seen:
            seen.add(name)
            left.append(name)
    return not seen & set(others)


def random_graph(seed: int, num_latents: int = 6, num_observed: int = 3) -> Graph:
    generator = torch.Generator().manual_seed(seed)
    names = [f"z{i}" for i in range(num_latents)]
    graph: Graph = {}
    for i, name in enumerate([*names, *(f"x{i}" for i in range(num_observed))]):
        up = names[: min(i, num_latents)]
        chance = torch.rand(len(up), generator=generator)
        graph[name] = tuple(n for n, c in zip(up, chance, strict=True) if c < 0.4)
    return graph


def assert_faithful(
    graph: Graph, inverse: Mapping[str, tuple[str, ...]], given: Collection[str] = ()
) -> None:
    """Every independence that the guide asserts holds in the model, given the data."""
    observed = [name for name in graph if name.startswith("x")]
    before = list(given)
    for name, parents in inverse.items():
        others = set(before) - set(parents)
        assert set(parents) <= set(before)
        assert separated(graph, name, others, [*parents, *observed]), (name, parents)
        before.append(name)


@pytest.mark.parametrize("seed", range(40))
def test_the_inverse_asserts_only_what_holds(seed: int) -> None:
    graph = random_graph(seed)
    latents = [name for name in graph if name.startswith("z")]
    inverse = faithful_inverse(graph, latents)
    assert set(inverse) == set(latents)
    assert_faithful(graph, inverse)
    summed, given, rest = latents[1:3], latents[:1], latents[3:]
    inverse = faithful_inverse(graph, rest, summed_out=summed, given=given)
    assert set(inverse) == set(rest)
    assert_faithful(graph, inverse, given)


@pytest.mark.parametrize("seed", range(40))
def test_the_inverse_has_no_edge_too_many(seed: int) -> None:
    """Where data lie below every latent, no parent can be left out (Webb et al. 2018)."""
    graph = random_graph(seed)
    latents = [name for name in graph if name.startswith("z")]
    graph |= {f"x_{name}": (name,) for name in latents}
    observed = [name for name in graph if name.startswith("x")]
    for name, parents in faithful_inverse(graph, latents).items():
        for one in parents:
            rest = [p for p in parents if p != one]
            assert not separated(graph, name, [one], [*rest, *observed])


def test_a_guide_without_edges_is_caught() -> None:
    graph: Graph = {"z1": (), "z2": (), "x": ("z1", "z2")}
    with pytest.raises(AssertionError):
        assert_faithful(graph, {"z1": (), "z2": ()})


KNOWN: dict[str, tuple[Graph, Graph]] = {
    "chain": (
        {"z3": (), "z2": ("z3",), "z1": ("z2",), "x": ("z1",)},
        {"z1": (), "z2": ("z1",), "z3": ("z2",)},
    ),
    "state space": (
        {"a": (), "b": ("a",), "c": ("b",), "xa": ("a",), "xb": ("b",), "xc": ("c",)},
        {"c": (), "b": ("c",), "a": ("b",)},
    ),
    "explaining away": (
        {"rain": (), "sprinkler": (), "x": ("rain", "sprinkler")},
        {"sprinkler": (), "rain": ("sprinkler",)},
    ),
    "no explaining away": (
        {"left": (), "right": (), "x1": ("left",), "x2": ("right",)},
        {"right": (), "left": ()},
    ),
    "binary tree of Webb et al. (2018)": (
        {"a": (), "b": ("a",), "c": ("a",), "xd": ("b",), "xe": ("c",)},
        {"c": (), "b": ("c",), "a": ("c", "b")},
    ),
    "skip connection": (
        {"z2": (), "z1": ("z2",), "x": ("z1", "z2")},
        {"z1": (), "z2": ("z1",)},
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_inverses(name: str) -> None:
    graph, expected = KNOWN[name]
    inverse = faithful_inverse(graph, [n for n in graph if not n.startswith("x")])
    assert inverse == expected
    assert list(inverse) == list(expected)


def test_what_is_summed_out_leaves_its_fill_in() -> None:
    graph = {"state": (), "z1": ("state",), "z2": ("state",), "x": ("z1",), "x2": ("z2",)}
    inverse = faithful_inverse(graph, ["z1", "z2"], summed_out=["state"])
    assert inverse == {"z2": (), "z1": ("z2",)}


def test_given_latents_are_parents_where_they_count() -> None:
    graph = {"w": (), "v": (), "z": (), "u": ("v",), "x": ("w", "z"), "x2": ("u",)}
    inverse = faithful_inverse(graph, ["z", "u"], given=["w", "v"])
    assert inverse == {"u": ("v",), "z": ("w",)}


# What the distributions of a model depend on.


def parents_of(model: Callable[..., Any]) -> dict[str, set[str]]:
    return {name: set(above) for name, above in model_parents(reading(model)).items()}


def test_dependencies_are_direct_and_pass_through_functions() -> None:
    @in_plate
    def model(x: torch.Tensor) -> None:
        top = normal("top")
        middle = normal("middle", top**2)
        pyro.deterministic("shown", middle.exp())
        normal("bottom", pyro.sample("point", dist.Normal(middle, 1.0), obs=x[:, 0]))
        pyro.factor("term", middle * 2)
        normal("x", middle + 1, obs=x[:, 1])

    assert parents_of(model) == {
        "top": set(),
        "middle": {"top"},
        "point": {"middle"},
        "bottom": set(),
        "term": {"middle"},
        "x": {"middle"},
    }


def test_dependencies_survive_writing_into_a_tensor() -> None:
    """Pyro's tracking of values loses them there."""

    @in_plate
    def model(x: torch.Tensor) -> None:
        both = torch.zeros(len(x), 2)
        both[:, 0] = normal("one")
        both[:, 1] = normal("two")
        pyro.sample("x", dist.Normal(both, 1.0).to_event(1), obs=x)

    assert parents_of(model)["x"] == {"one", "two"}


def test_dependencies_where_values_cannot_be_followed() -> None:
    @in_plate
    def model(x: torch.Tensor) -> None:
        one = normal("one")
        loc = torch.as_tensor(one.numpy() * 2)
        normal("two", loc)
        normal("x", one, obs=x[:, 0])

    assert parents_of(model) == {"one": set(), "two": {"one"}, "x": {"one"}}


def test_dependencies_of_enumerated_and_shared_latents() -> None:
    @config_enumerate
    def model(x: torch.Tensor) -> None:
        weight = normal("weight")
        with pyro.plate("patients", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
            z = normal("z", torch.tensor([-1.0, 0.0, 1.0])[kind])
            normal("x", z * weight, obs=x[:, 0])

    found = parents_of(model)
    assert found == {"weight": set(), "kind": set(), "z": {"kind"}, "x": {"weight", "z"}}


# Reading.


def test_what_is_read_from_a_model() -> None:
    def model(x: torch.Tensor) -> None:
        pyro.sample("noise", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("patients", len(x), dim=-2):
            pyro.sample("share", dist.Dirichlet(torch.ones(1, 3)))
            state = pyro.sample(
                "state", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"}
            )
            with pyro.plate("visits", 2, dim=-1):
                z = pyro.sample("z", dist.Beta(torch.tensor(2.0), 1.0))
                normal("x", z + state, obs=x)

    structure = structure_of(model)
    plate = structure.data
    assert (plate.name, plate.dim, plate.size, plate.full_size) == ("patients", -2, ROWS, ROWS)
    assert plate.rows == "all"
    assert list(structure.local) == ["share", "z"]
    assert list(structure.shared) == ["noise"]
    assert structure.enumerated == ("state",)
    assert structure.observed == ("x",)
    assert structure.nesting == 2
    share, z = structure.local["share"], structure.local["z"]
    assert (share.event_shape, share.unconstrained_shape) == ((3,), (2,))
    assert share.support is not None
    assert type(share.support) is type(constraints.simplex)
    assert {(p.name, p.dim, p.size) for p in z.plates} == {
        ("patients", -2, ROWS),
        ("visits", -1, 2),
    }
    assert structure.shared["noise"].support.lower_bound == 0


def test_how_a_plate_comes_by_its_rows() -> None:
    def model(x: torch.Tensor, **how: Any) -> None:
        with pyro.plate("patients", 20, **how):
            normal("z")
            normal("x", obs=x[:, 0])

    rows = torch.arange(ROWS)
    for how, kind in (({"subsample": rows}, "given"), ({"subsample_size": ROWS}, "drawn")):
        plate = read_structure(model, (data(),), how, where="here").structure.data
        assert (plate.rows, plate.size, plate.full_size) == (kind, ROWS, 20)


def test_bounds_that_were_expanded_are_those_of_a_row() -> None:
    @in_plate
    def model(x: torch.Tensor) -> None:
        high = torch.tensor([1.0, 3.0]).expand(len(x), 2)
        u = pyro.sample("u", dist.Uniform(torch.zeros(len(x), 2), high).to_event(1))
        normal("x", u.sum(-1), obs=x[:, 0])

    support = structure_of(model).local["u"].support.base_constraint
    torch.testing.assert_close(support.upper_bound, torch.tensor([1.0, 3.0]))


BOUNDS: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "interval": (lambda n: dist.Uniform(-torch.ones(n), torch.ones(n)), ()),
    "half-line": (lambda n: dist.Pareto(torch.ones(n), torch.ones(n)), ()),
    "vector": (lambda n: dist.Uniform(torch.zeros(n, 3), torch.ones(n, 3)).to_event(1), (3,)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_every_row_are_those_of_one_value(name: str) -> None:
    fn, shape = BOUNDS[name]
    site = structure_of(local(lambda x: fn(len(x)))).local["odd"]
    assert site.unconstrained_shape == site.event_shape == shape


def test_bounds_that_vary_along_a_plate_within_a_row() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("texts", len(x), dim=-2):
            normal("z")
            with pyro.plate("words", 2, dim=-1):
                high = torch.tensor([1.0, 3.0]).expand(len(x), 2)
                pyro.sample("u", dist.Uniform(torch.zeros(len(x), 2), high))
                normal("x", obs=x)

    site = structure_of(model).local["u"]
    torch.testing.assert_close(site.support.upper_bound, torch.tensor([[1.0, 3.0]])[0])
    assert site.support.lower_bound.shape == site.unconstrained_shape == ()


def test_mixtures_have_the_support_of_their_components() -> None:
    def mixed(base: Any) -> Any:
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), base)

    for base, shape in (
        (dist.Normal(torch.zeros(2), 1.0), ()),
        (dist.Gamma(torch.ones(2), 1.0), ()),
        (dist.Normal(torch.zeros(2, 3), 1.0).to_event(1), (3,)),
    ):
        site = structure_of(local(lambda x, base=base: mixed(base))).local["odd"]
        assert site.unconstrained_shape == shape
        assert str(site.support) == str(base.support)


def test_transformed_distributions_that_know_their_support() -> None:
    base = dist.Normal(torch.tensor(0.0), 1.0)
    for fn in (
        dist.TransformedDistribution(base, [dist.transforms.AffineTransform(1.0, 2.0)]),
        dist.TransformedDistribution(base, [dist.transforms.ExpTransform()]),
        dist.Gumbel(torch.tensor(0.0), 1.0),
        dist.Weibull(torch.tensor(1.0), 1.0),
        dist.HalfCauchy(torch.tensor(1.0)),
    ):
        assert "odd" in structure_of(local(lambda x, fn=fn: fn)).local


def test_reading_leaves_no_trace() -> None:
    runs = []

    @in_plate
    def model(x: torch.Tensor) -> None:
        runs.append(torch.is_grad_enabled())
        z = normal("z", pyro.param("p", torch.tensor(1.0)))
        normal("x", z, obs=x[:, 0])

    before = torch.get_rng_state()
    with poutine.trace() as tracer:
        structure_of(model)
    assert not tracer.trace.nodes
    assert not pyro.get_param_store().keys()
    assert torch.equal(before, torch.get_rng_state())
    assert runs == [False, False, False]


def test_conditioned_sites_are_data() -> None:
    @in_plate
    def model(x: torch.Tensor) -> None:
        z = normal("z")
        normal("y", z)

    conditioned = poutine.condition(model, data={"y": torch.zeros(ROWS)})
    structure = structure_of(conditioned)
    assert (list(structure.local), structure.observed) == (["z"], ("y",))


def test_latents_hidden_everywhere_are_none() -> None:
    @in_plate
    def model(x: torch.Tensor) -> None:
        z = normal("z")
        with poutine.mask(mask=False):
            normal("generated", z)
        normal("x", z, obs=x[:, 0])

    assert list(structure_of(model).local) == ["z"]


def test_the_plate_that_holds_the_others_sites_is_the_datas() -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("texts", len(x), dim=-2):
            z = normal("z")
            with pyro.plate("words", 2, dim=-1):
                w = normal("w", z)
                normal("x", w, obs=x)

    assert structure_of(model).data.name == "texts"


# Refusals.


def bare(x: torch.Tensor) -> None:
    normal("z")
    normal("x", obs=x[:, 0].sum())


def crossed(x: torch.Tensor) -> None:
    rows, columns = pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", 2, dim=-1)
    with rows:
        u = normal("u")
    with columns:
        v = normal("v")
    with rows, columns:
        normal("x", u * v, obs=x)


def sizeless(x: torch.Tensor) -> None:
    with pyro.plate("patients"):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        normal("x", obs=x[:, 0])


def all_shared(x: torch.Tensor) -> None:
    with pyro.plate("patients", len(x)):
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
        normal("x", obs=x[:, 0])


def masked_shared(x: torch.Tensor) -> None:
    with poutine.mask(mask=torch.tensor(True)):
        normal("w")
    with pyro.plate("patients", len(x)):
        normal("x", normal("z"), obs=x[:, 0])


def subsampled_words(x: torch.Tensor) -> None:
    with pyro.plate("texts", len(x), dim=-2):
        normal("t")
        with pyro.plate("words", 9, subsample_size=2, dim=-1):
            normal("w")
            normal("x", obs=x)


def forgot_event(x: torch.Tensor) -> None:
    with pyro.plate("patients", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(3, len(x)), 1.0))
        normal("x", obs=x[:, 0])


class WithoutSupport(dist.Normal):
    @property
    def support(self) -> Any:
        raise NotImplementedError


def local(fn: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    @in_plate
    def model(x: torch.Tensor) -> None:
        pyro.sample("odd", fn(x))
        normal("x", normal("z"), obs=x[:, 0])

    return model


def half_masked(x: torch.Tensor) -> Any:
    return dist.Normal(torch.zeros(len(x), 2), 1.0).mask(x > 0).to_event(1)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "no latents": (in_plate(lambda x: normal("x", obs=x[:, 0])), "a model with latents, got none"),
    "no data": (in_plate(lambda x: normal("z")), "observe data, got no observed site"),
    "no plate": (bare, r"a vectorised plate around data and latents, got none .*\['z'\]"),
    "two plates": (crossed, r"one plate over the data among \['columns', 'rows'\], got several"),
    "no size": (sizeless, "a plate with a size, got 'patients' without"),
    "nothing local": (all_shared, r"a continuous latent in plate 'patients', got none.*\['k'\]"),
    "masked and shared": (masked_shared, "without a mask, got one on site 'w'"),
    "words drawn": (subsampled_words, "subsampling in the plate over the data alone, got.*'words'"),
    "no event": (forgot_event, r"dimension of site 'z' to be a plate, got.*\(3, 5\)"),
    "point mass": (
        local(lambda x: dist.Delta(torch.zeros(len(x)))),
        "latents with a density, got a point mass .*'odd'",
    ),
    "not enumerated": (
        local(lambda x: dist.Bernoulli(torch.tensor(0.5))),
        "to be summed out, got site 'odd' without that. Pass infer=",
    ),
    "not enumerable": (
        local(lambda x: dist.Poisson(torch.tensor(3.0))),
        "got Poisson with infinitely many values, or no list of them, at site 'odd'",
    ),
    "no support": (
        local(lambda x: WithoutSupport(torch.tensor(0.0), 1.0)),
        "a known support, got WithoutSupport without one at site 'odd'",
    ),
    "no bijection": (
        local(lambda x: dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0]))),
        "biject_to knows, got .* at site 'odd'",
    ),
    "elements masked": (local(half_masked), "whole values of site 'odd', got one over the elem"),
    "angle": (
        local(lambda x: dist.VonMises(torch.zeros(2), 1.0).to_event(1)),
        "whole support, got angles .* VonMises, .* at site 'odd'.*atan2",
    ),
    "two angles": (
        local(lambda x: dist.SineBivariateVonMises(0.0, 0.0, 2.0, 2.0, correlation=0.1)),
        "whole support, got angles .* SineBivariateVonMises, .* at site 'odd'",
    ),
    "moved angle": (
        local(
            lambda x: dist.TransformedDistribution(
                dist.VonMises(torch.tensor(0.0), 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]
            )
        ),
        "whole support, got angles .* at site 'odd'",
    ),
    "moved half-line": (
        local(
            lambda x: dist.TransformedDistribution(
                dist.Exponential(torch.tensor(1.0)), [dist.transforms.AffineTransform(1.0, 2.0)]
            )
        ),
        r"know their support, got Real\(\) at site 'odd'.*Exponential",
    ),
    "components of other supports": (
        local(
            lambda x: dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)),
                dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])),
            )
        ),
        "biject_to knows, got .* at site 'odd'",
    ),
    "support of a row": (
        local(lambda x: dist.Uniform(0.0, 1 + x[:, 0].abs())),
        "site 'odd' to have the same support in all rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_guide(name: str) -> None:
    model, match = REFUSED[name]
    with pytest.raises(ValueError, match=f"^here: expected .*{match}"):
        structure_of(model)


def test_a_plate_can_be_chosen() -> None:
    assert structure_of(crossed, plate="columns").data.name == "columns"
    with pytest.raises(ValueError, match=r"among \['columns', 'rows'\], got plate='patients'"):
        structure_of(crossed, plate="patients")


def moving_support(x: torch.Tensor) -> None:
    with pyro.plate("patients", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.tensor(0.0), 1.0))
        pyro.sample("u", dist.Uniform(torch.zeros(()), z.max()))
        normal("x", obs=x[:, 0])


def varying(draw: Callable[[int], Any], plate: int = 0) -> Callable[[torch.Tensor], Any]:
    def model(x: torch.Tensor) -> None:
        number = int(torch.randint(1, 10_000, ()))
        with pyro.plate("patients", len(x), dim=-2 if plate else -1):
            normal("z")
            draw(number)
            normal("x", obs=x if plate else x[:, 0])

    return model


def draw_in_plate(number: int) -> None:
    with pyro.plate("visits", 2 + number, dim=-1):
        normal("w")


def draw_masked(number: int) -> None:
    with poutine.mask(mask=torch.arange(ROWS) < number % ROWS):
        normal("w")


def sometimes_masked(number: int) -> None:
    with poutine.mask(mask=torch.ones(ROWS, dtype=torch.bool) if number % 2 else True):
        normal("w")


VARYING = {
    "support": (moving_support, "site 'u' to have one support, got .* in two runs"),
    "sites": (
        varying(lambda n: normal(f"w{n}")),
        r"same latents of the data plate in all runs, got \['w\d+', 'z'\]",
    ),
    "observed": (
        varying(lambda n: normal(f"y{n}", obs=torch.tensor(0.0))),
        r"same observed sites in all runs",
    ),
    "shape": (
        varying(lambda n: pyro.sample("w", dist.Normal(torch.zeros(n), 1.0).to_event(1))),
        "site 'w' of the same event shape in all runs",
    ),
    "plate": (varying(draw_in_plate, 1), "same plates around site 'w' in all runs, got sizes"),
    "mask": (varying(draw_masked), "a mask on site 'w' that differs from run to run"),
    "masked": (varying(sometimes_masked), "site 'w' to be masked in all runs or in none"),
}


@pytest.mark.parametrize("name", VARYING)
def test_models_that_hang_on_random_values(name: str) -> None:
    model, match = VARYING[name]
    with pytest.raises(ValueError, match=match):
        structure_of(model, num_runs=12)


def test_a_data_plate_that_hangs_on_random_values() -> None:
    def model(x: torch.Tensor) -> None:
        dim = -1 - int(torch.randint(0, 2, ()))
        with pyro.plate("patients", len(x), dim=dim):
            normal("z")
            normal("x", obs=x[:, :1] if dim == -2 else x[:, 0])

    with pytest.raises(ValueError, match="same plate over the data in all runs, got 'patients' at"):
        structure_of(model, num_runs=12)


def test_data_that_are_not_finite() -> None:
    model = in_plate(lambda x: normal("x", normal("z"), obs=x[:, 0]))
    with pytest.raises(ValueError, match="here: expected finite data at site 'x', got 1 NaN"):
        structure_of(model, torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))
