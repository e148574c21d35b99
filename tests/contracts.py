"""Contracts that every public model and guide keeps: suites to inherit, one test a promise.

A subclass names a fresh pair of model and guide and what is special about it; pytest collects the
tests from the subclass. See ``test_models.py`` and ``test_guides.py``.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

from pyro_vae.evaluation import importance_weighted_log_likelihood

BATCH = 5


@dataclass
class Case:
    """What the suites need to know of a model and guide.

    Attributes:
        make: Makes a fresh model and guide.
        make_x: Data of a given number of rows.
        latents: Shape of one datum's value, by latent site; the guide returns the first.
        discrete: Whether the latents are discrete, and so trained by ``TraceEnum_ELBO``.
        data_only: Whether the guide has no parameters of its own.
        observed: Name of the observed site.
        named: What the model's name in the param store starts with; its class by default.
        given: From these data to the argument of both programs, which may be a mapping; or to
            a tuple of arguments, such as data and labels.
        returned: From what the model returns to the data.
    """

    make: Callable[[], tuple[Any, Any]]
    make_x: Callable[[int], torch.Tensor]
    latents: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"z": (2,)})
    discrete: bool = False
    data_only: bool = False
    observed: str = "x"
    named: str | None = None
    given: Callable[[torch.Tensor], Any] = field(default=lambda x: x)
    returned: Callable[[Any], torch.Tensor] = field(default=lambda x: x)

    def args(self, x: torch.Tensor) -> tuple[Any, ...]:
        given = self.given(x)
        return given if isinstance(given, tuple) else (given,)

    def traced(self, program: Any, x: torch.Tensor) -> poutine.Trace:
        return traced(program, *self.args(x))

    def elbo(self) -> Any:
        return TraceEnum_ELBO(max_plate_nesting=1) if self.discrete else Trace_ELBO()


def latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and name != "data"
    }


def traced(program: Any, *args: Any) -> poutine.Trace:
    trace = poutine.trace(program).get_trace(*args)
    trace.compute_log_prob()
    return trace


def log_density(case: Case, trace: poutine.Trace) -> torch.Tensor:
    """Of all latents of each datum."""
    total: torch.Tensor = sum(trace.nodes[name]["log_prob"] for name in case.latents)
    return total


class ProgramContract:
    """What holds for a model and for a guide alike."""

    program_index: int

    @pytest.fixture
    def pair(self, case: Case) -> tuple[Any, Any]:
        return case.make()

    @pytest.fixture
    def program(self, pair: tuple[Any, Any]) -> Any:
        return pair[self.program_index]

    def test_the_constructor_writes_no_parameters(self, case: Case) -> None:
        case.make()
        assert not pyro.get_param_store().keys()

    def test_it_is_a_module(self, program: Any) -> None:
        assert isinstance(program, torch.nn.Module)
        assert isinstance(program, pyro.nn.PyroModule)

    @pytest.mark.parametrize("num_rows", [1, BATCH])
    def test_sites_plate_and_shapes(self, case: Case, program: Any, num_rows: int) -> None:
        trace = case.traced(program, case.make_x(num_rows))
        assert "data" in trace.nodes
        sites = latent_sites(trace)
        assert set(sites) == set(case.latents)
        for name, site in sites.items():
            assert site["value"].shape == (num_rows, *case.latents[name])
            assert site["log_prob"].shape == (num_rows,)
            assert [f.name for f in site["cond_indep_stack"]] == ["data"]
            assert site["cond_indep_stack"][0].size == num_rows
            assert site["cond_indep_stack"][0].dim == -1

    def test_the_batch_is_not_changed(self, case: Case, program: Any) -> None:
        x = case.make_x(BATCH)
        before = x.clone()
        case.traced(program, x)
        assert torch.equal(x, before)

    def test_parameters_are_named_after_the_program(self, case: Case, program: Any) -> None:
        name = program._pyro_name
        named = case.named if self.program_index == 0 else None
        assert name.startswith(named or type(program).__name__)
        case.traced(program, case.make_x(BATCH))
        for parameter in pyro.get_param_store().keys():  # noqa: SIM118 - not a dict
            assert parameter.startswith(f"{name}.")

    def test_deepcopy_and_state_dict_give_the_same_density(self, case: Case) -> None:
        """Of a model and guide each: saved, loaded into fresh ones, and copied."""
        model, guide = case.make()
        fresh = case.make()
        x = case.make_x(BATCH)
        trace = case.traced(guide, x)

        def log_density(model: Any, guide: Any) -> torch.Tensor:
            pyro.clear_param_store()
            log_p = case.traced(poutine.replay(model, trace=trace), x).log_prob_sum()
            log_q = case.traced(poutine.replay(guide, trace=trace), x).log_prob_sum()
            return torch.stack([log_p, log_q]).detach()

        expected = log_density(model, guide)
        assert not torch.allclose(log_density(*fresh), expected)  # they start elsewhere
        for program, other in zip((model, guide), fresh, strict=True):
            other.load_state_dict(program.state_dict())
        torch.testing.assert_close(log_density(*fresh), expected)
        torch.testing.assert_close(log_density(*copy.deepcopy((model, guide))), expected)

    def test_state_dict_survives_a_file(self, case: Case, program: Any, tmp_path: Any) -> None:
        torch.save(program.state_dict(), tmp_path / "state.pt")
        other = case.make()[self.program_index]
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for name, value in program.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name

    def test_every_parameter_gets_a_gradient(self, case: Case, pair: tuple[Any, Any]) -> None:
        """From its own objective, without help of the other side."""
        model, guide = pair
        case.elbo().differentiable_loss(model, guide, *case.args(case.make_x(BATCH))).backward()
        program = pair[self.program_index]
        parameters = dict(program.named_parameters())
        assert parameters or (case.data_only and self.program_index == 1)
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name

    def test_two_instances_train_in_one_script(self, case: Case) -> None:
        """The param store is global: names that collide would leave one of them untrained."""
        x = case.make_x(BATCH)
        for model, guide in (case.make(), case.make()):
            before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), case.elbo())
            svi.step(*case.args(x))
            svi.step(*case.args(x))
            after = [*model.parameters(), *guide.parameters()]
            for old, new in zip(before, after, strict=True):
                assert not torch.equal(old, new)

    def test_names_can_be_chosen(self, case: Case, program: Any) -> None:
        assert program._pyro_name != case.make()[self.program_index]._pyro_name

    @pytest.mark.parametrize("shape", [(), (0, 3)])
    def test_data_that_are_no_batch(self, case: Case, program: Any, shape: tuple[int, ...]) -> None:
        match = r"expected (x|batch\[.*\]) of shape|expected at least one row|width"
        with pytest.raises(ValueError, match=match):
            program(*case.args(torch.zeros(shape)))

    def test_an_empty_batch(self, case: Case, program: Any) -> None:
        match = r"expected at least one row in (x|batch\[.*\]), got an empty batch"
        with pytest.raises(ValueError, match=match):
            program(*case.args(case.make_x(BATCH)[:0]))


class ModelContract(ProgramContract):
    """What every public model promises."""

    program_index = 0

    def test_it_observes_the_data(self, case: Case, program: Any) -> None:
        x = case.make_x(BATCH)
        site = case.traced(program, x).nodes[case.observed]
        assert site["is_observed"]
        assert site["value"] is x
        assert site["log_prob"].shape == (BATCH,)
        assert site["fn"].event_shape == x.shape[1:]
        assert [f.name for f in site["cond_indep_stack"]] == ["data"]

    def test_it_returns_the_data(self, case: Case, program: Any) -> None:
        x = case.make_x(BATCH)
        assert case.returned(program(*case.args(x))) is x

    def test_unconditioned_it_generates_data(self, case: Case, program: Any) -> None:
        x = case.make_x(BATCH)
        generated = case.returned(poutine.uncondition(program)(*case.args(x)))
        assert generated.shape == x.shape
        assert not torch.equal(generated, x)

    def test_it_uses_the_replayed_latents(self, case: Case, pair: tuple[Any, Any]) -> None:
        model, guide = pair
        x = case.make_x(BATCH)
        guide_trace = case.traced(guide, x)
        trace = case.traced(poutine.replay(model, trace=guide_trace), x)
        for name in case.latents:
            assert trace.nodes[name]["value"] is guide_trace.nodes[name]["value"]

    @pytest.mark.parametrize("num_rows", [1, BATCH])
    def test_particles_at_once_and_one_by_one(self, case: Case, num_rows: int) -> None:
        model, guide = case.make()
        x, num_particles = case.make_x(num_rows), 3
        values = [latent_sites(case.traced(guide, x)) for _ in range(num_particles)]
        stacked = poutine.Trace()
        for name in case.latents:
            value = torch.stack([sites[name]["value"] for sites in values])
            stacked.add_node(
                name, name=name, type="sample", is_observed=False, value=value, infer={}
            )
        with pyro.plate("particles", num_particles, dim=-2):
            at_once = case.traced(poutine.replay(model, trace=stacked), x)
        for k in range(num_particles):
            single = poutine.Trace()
            for name, site in values[k].items():
                single.add_node(name, **site)
            alone = case.traced(poutine.replay(model, trace=single), x)
            for name in (*case.latents, case.observed):
                torch.testing.assert_close(
                    at_once.nodes[name]["log_prob"][k], alone.nodes[name]["log_prob"]
                )

    def test_rows_are_independent(self, case: Case, pair: tuple[Any, Any]) -> None:
        """The density of a row does not depend on the rows beside it."""
        model, guide = pair
        x = case.make_x(BATCH)
        latents = latent_sites(case.traced(guide, x))

        def run(rows: torch.Tensor) -> torch.Tensor:
            given = {name: site["value"][rows] for name, site in latents.items()}
            trace = case.traced(poutine.condition(model, data=given), x[rows])
            return trace.nodes[case.observed]["log_prob"]

        rows = torch.tensor([3, 1])
        torch.testing.assert_close(run(rows), run(torch.arange(BATCH))[rows])

    def test_evaluation_takes_it(self, case: Case, pair: tuple[Any, Any]) -> None:
        """All at once, hence without a warning, and with finite numbers."""
        model, guide = pair
        estimate = importance_weighted_log_likelihood(
            model, guide, *case.args(case.make_x(BATCH)), num_particles=20, chunk_size=7
        )
        assert estimate.log_likelihood.shape == (BATCH,)
        assert estimate.log_likelihood.isfinite().all()
        assert not pyro.get_param_store().keys()


class GuideContract(ProgramContract):
    """What every public guide promises."""

    program_index = 1

    def test_it_samples_what_the_model_wants(self, case: Case, pair: tuple[Any, Any]) -> None:
        model, guide = pair
        x = case.make_x(BATCH)
        assert (
            latent_sites(case.traced(guide, x)).keys() == latent_sites(case.traced(model, x)).keys()
        )

    def test_it_observes_nothing(self, case: Case, program: Any) -> None:
        nodes = case.traced(program, case.make_x(BATCH)).nodes.values()
        assert not [site for site in nodes if site["type"] == "sample" and site["is_observed"]]

    def test_it_returns_its_sample(self, case: Case, program: Any) -> None:
        trace = case.traced(program, case.make_x(BATCH))
        name = next(iter(case.latents))
        returned = trace.nodes["_RETURN"]["value"]
        if isinstance(returned, dict):  # By modality, where each has latents of its own.
            returned = returned[name.removeprefix("z_")]
        assert returned is trace.nodes[name]["value"]

    def test_it_depends_on_the_data(self, case: Case, program: Any) -> None:
        x = case.make_x(BATCH)
        trace = case.traced(program, x)
        moved = case.traced(poutine.replay(program, trace=trace), x + 1)
        assert (log_density(case, trace) - log_density(case, moved)).abs().min() > 1e-6

    def test_rows_are_independent(self, case: Case, program: Any) -> None:
        x, rows = case.make_x(BATCH), torch.tensor([3, 1])
        trace = case.traced(program, x)
        values = {name: trace.nodes[name]["value"][rows] for name in case.latents}
        part = case.traced(poutine.condition(program, data=values), x[rows])
        for name in case.latents:
            torch.testing.assert_close(
                part.nodes[name]["log_prob"], trace.nodes[name]["log_prob"][rows]
            )

    def test_particles_at_once_have_the_density_of_single_ones(
        self, case: Case, program: Any
    ) -> None:
        x = case.make_x(BATCH)
        with pyro.plate("particles", 3, dim=-2):
            trace = case.traced(program, x)
        values = {name: trace.nodes[name]["value"] for name in case.latents}
        for name, value in values.items():
            assert value.shape == (3, BATCH, *case.latents[name])
            assert len(value.flatten(1).unique(dim=0)) > 1  # particles differ
        for k in range(3):
            given = {name: value[k] for name, value in values.items()}
            alone = case.traced(poutine.condition(program, data=given), x)
            for name in case.latents:
                torch.testing.assert_close(
                    alone.nodes[name]["log_prob"], trace.nodes[name]["log_prob"][k]
                )

    def test_its_density_is_normalised(self, case: Case, program: Any) -> None:
        """E_q[p / q] = 1 for any density p, here another guide's of the same latents."""
        x = case.make_x(1)
        fn = case.traced(program, x).nodes[next(iter(case.latents))]["fn"]
        if fn.has_enumerate_support:
            total = fn.log_prob(fn.enumerate_support()).logsumexp(0).exp()
            torch.testing.assert_close(total, torch.ones_like(total))
            return
        num = 20_000
        with torch.no_grad(), pyro.plate("particles", num, dim=-2):
            trace = case.traced(program, x)
        # A normal with the same mean and half of the spread, so that the weights are bounded.
        flat = torch.cat([trace.nodes[n]["value"].reshape(num, -1) for n in case.latents], -1)
        cov = torch.atleast_2d(flat.T.cov()) / 4
        other = torch.distributions.MultivariateNormal(flat.mean(0), cov)
        weights = (other.log_prob(flat) - log_density(case, trace).squeeze(-1)).exp()
        error = float(weights.std()) / math.sqrt(num)
        assert abs(float(weights.mean()) - 1) < 5 * error
        assert error < 0.05


def normal_x(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_rows, 4, generator=generator, dtype=torch.float64)
