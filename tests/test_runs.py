"""Guide and model run for training: particles at once or one at a time, joints between them."""

import gc
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae.guides import AmortizedNormal
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.links import Links
from pyro_vae.models import VAE
from pyro_vae.nets import MLP, ConvDecoder, ConvEncoder, FlattenLeading
from pyro_vae.objectives import TraceFreeBits_ELBO, TraceIWAE_ELBO
from pyro_vae.pairs import Pair
from pyro_vae.priors import StandardNormalPrior
from pyro_vae.runs import Run, Runner


def accept(pair: Pair) -> None:
    """Every pair will do."""


def runner(model: Any, guide: Any, *args: Any, num: int = 3, **kwargs: Any) -> Runner:
    how = {"num_particles": num, "vectorize": None, "where": "here", "check": accept} | kwargs
    return Runner(model, guide, args, {}, **how)


def model(x: torch.Tensor) -> None:
    with pyro.plate("rows", len(x)):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(u.sum(-1), 1.0), obs=x)


def guide(x: torch.Tensor) -> None:
    scale = pyro.param("scale", torch.rand(2), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("u", dist.Normal(x[:, None].expand(-1, 2), scale).to_event(1))


def images(num: int = 5) -> torch.Tensor:
    return (torch.rand(num, 1, 8, 8) < 0.5).double()


def vae(decoder: nn.Module, encoder: nn.Module, event_dim: int = 1) -> tuple[VAE, AmortizedNormal]:
    return VAE(decoder, Bernoulli(event_dim), StandardNormalPrior(2)), AmortizedNormal(encoder)


@pytest.mark.parametrize("at_once", [True, False])
def test_runs_hold_all_particles(at_once: bool) -> None:
    x = torch.randn(4)
    runs = list(runner(model, guide, x, vectorize=at_once).runs((x,), {}))
    assert [run.num_particles for run in runs] == ([3] if at_once else [1, 1, 1])
    for run in runs:
        site, observed = run.guide_trace.nodes["u"], run.model_trace.nodes["obs"]
        assert run.model_trace.nodes["u"]["value"] is site["value"]
        assert site["value"].shape == ((3, 4, 2) if at_once else (4, 2))
        assert {plate.name for plate in run.plates(observed)} == {"rows"}
        log_prob = observed["fn"].log_prob(observed["value"])
        assert run.spread(log_prob, observed).shape == (run.num_particles, 4)
        assert run.spread(site["value"], site, event_dim=1).shape == (run.num_particles, 4, 2)
        names = set(run.guide_trace.nodes) | set(run.model_trace.nodes)
        assert names == {"_INPUT", "_RETURN", "scale", "u", "obs"}


def test_particles_are_different() -> None:
    x = torch.randn(4)
    for at_once in (True, False):
        runs = runner(model, guide, x, vectorize=at_once).runs((x,), {})
        values = [run.guide_trace.nodes["u"]["value"].reshape(-1, 4, 2) for run in runs]
        assert len(torch.cat(values).flatten(1).unique(dim=0)) == 3


def test_the_first_look_leaves_no_trace() -> None:
    x, state = torch.randn(4), torch.get_rng_state
    before = state()
    with poutine.trace() as outside:
        runner(model, guide, x)
    assert torch.equal(state(), before)
    assert not pyro.get_param_store().keys()
    assert not outside.trace.nodes  # SVI watches its steps for parameters.


class Noisy(nn.Module):
    """Batch norm and dropout around linear layers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(inputs, 7), nn.BatchNorm1d(7)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(7, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.norm(self.first(x)).relu())
        return self.last(hidden)


def test_the_first_look_leaves_networks_as_they_were() -> None:
    """Batch norm counts one batch for every step, dropout draws what it draws for Trace_ELBO."""
    x = images().flatten(1)
    results = []
    for objective in (Trace_ELBO(), TraceIWAE_ELBO(1)):
        pyro.set_rng_seed(3)
        pair = vae(Noisy(2, 64), Noisy(64, 4))
        loss = objective.differentiable_loss(*pair, x)
        loss.backward()
        modules = [*pair[0].modules(), *pair[1].modules()]
        assert all(module.training for module in modules)
        grads = [p.grad for program in pair for p in program.parameters()]
        buffers = [b for program in pair for b in program.buffers()]
        results.append([loss.detach(), *grads, *buffers, torch.get_rng_state()])
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_kept(mode: bool) -> None:
    x, pair = images().flatten(1), vae(Noisy(2, 64), Noisy(64, 4))
    for program in pair:
        program.train(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner(*pair, x)
    assert all(module.training == mode for program in pair for module in program.modules())


def test_a_network_that_does_not_broadcast_runs_one_particle_at_a_time() -> None:
    """With one warning, and the numbers of the network that does."""

    class Flat(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            if z.dim() != 2:
                raise RuntimeError("expected a matrix")
            return self.net(z)

    x, decoder = images().flatten(1), MLP(2, [6], 64)
    good = vae(decoder, MLP(64, [6], 4))
    bad = VAE(Flat(decoder), good[0].likelihood, good[0].prior), good[1]
    objective = TraceIWAE_ELBO(4)
    with pytest.warns(UserWarning, match="expected a matrix.*one at a time") as caught:
        objective.loss(*bad, x)
    assert len(caught) == 1
    pyro.set_rng_seed(1)
    loss = objective.loss(*bad, x)  # No second warning, which would be an error.
    pyro.set_rng_seed(1)
    sequential = TraceIWAE_ELBO(4, vectorize_particles=False)
    assert loss == pytest.approx(sequential.loss(*good, x))


def test_a_network_that_mixes_up_dimensions_is_found_out() -> None:
    """It takes the particles for rows of the batch, without complaint."""
    x = torch.randn(2)

    def mixing(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(u.cumsum(0).sum(-1), 1.0), obs=x)

    with pytest.warns(UserWarning, match="gave other log-densities.*one at a time"):
        found = runner(mixing, guide, x)
    assert [run.num_particles for run in found.runs((x,), {})] == [1, 1, 1]


def test_batch_norm_as_wide_as_the_batch_is_found_out() -> None:
    """It takes rows for channels, and new, outside training, it is the identity."""
    x = images(7).flatten(1)
    pair = vae(Noisy(2, 64), MLP(64, [6], 4))
    with pytest.warns(UserWarning, match="BatchNorm1d.*takes rows of the batch for channels"):
        found = runner(*pair, x)
    assert [run.num_particles for run in found.runs((x,), {})] == [1, 1, 1]
    pair = vae(FlattenLeading(Noisy(2, 64), event_dim=1), Noisy(64, 4))
    (run,) = runner(*pair, x).runs((x,), {})
    assert run.num_particles == 3


@pytest.mark.parametrize("vectorize", [True, None])
def test_library_networks_run_at_once(vectorize: bool | None) -> None:
    x = images()
    pairs = [
        (vae(ConvDecoder(2, [4, 3], (1, 8, 8)), ConvEncoder((1, 8, 8), [3, 4], 4), 3), x),
        (vae(MLP(2, [6], 64, dropout=0.5), MLP(64, [6], 4, dropout=0.5)), x.flatten(1)),
    ]
    for pair, data in pairs:
        (run,) = runner(*pair, data, vectorize=vectorize).runs((data,), {})
        assert run.num_particles == 3


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_all_particles_see_the_same_subsample(at_once: bool, linked: bool) -> None:
    seen: list[list[int]] = []

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", 10, subsample_size=3) as rows:
            seen.append(rows.tolist())
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("others", 10, subsample_size=2) as others:
            seen.append(others.tolist())
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x[others])

    def guide(x: torch.Tensor) -> None:
        loc = torch.zeros((), requires_grad=True)
        with pyro.plate("rows", 10, subsample_size=3) as rows:
            seen.append(rows.tolist())
            pyro.sample("z", dist.Normal(loc, 1.0))

    x = torch.randn(10)
    programs = runner(model, guide, x, vectorize=at_once)
    steps = []
    for _ in range(2):
        seen.clear()
        list(programs.runs((x,), {}, linked=linked))
        assert len(seen) == (3 if at_once else 9)
        rows, others = seen[0], seen[2]
        assert seen == [rows, rows, others] * (len(seen) // 3)
        steps.append(rows)
    assert steps[0] != steps[1]


def test_other_latents_than_at_the_first_look() -> None:
    def programs(*, in_model: bool, in_guide: bool) -> Iterator[Any]:
        for also in (in_model, in_guide):

            def program(x: torch.Tensor, also: bool = also, role: bool = also) -> None:
                with pyro.plate("rows", len(x)):
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                    if also and len(x) > 3:
                        pyro.sample("w", dist.Normal(0.0, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

            yield program

    for which in ({"in_model": True, "in_guide": False}, {"in_model": False, "in_guide": True}):
        both = list(programs(**which))
        pair = both[0], poutine.block(both[1], hide=["x"])
        known = runner(*pair, torch.randn(3), vectorize=False)
        with pytest.raises(ValueError, match="here: expected the guide to sample .*'w'"):
            list(known.runs((torch.randn(4),), {}))


def test_plates_that_stand_for_different_numbers_of_data() -> None:
    def program(size: int, role: str, x: torch.Tensor) -> None:
        with pyro.plate("rows", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if role == "model":
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(3)
    known = runner(partial(program, 12, "model"), partial(program, 6, "guide"), x)
    with pytest.raises(ValueError, match="site 'z'.*same number of data.*scaled by 4 and by 2"):
        list(known.runs((x,), {}))


def test_a_latent_that_the_guide_leaves_out() -> None:
    def model() -> None:
        with pyro.plate("rows", 3):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(c, 1.0), obs=torch.zeros(3))

    with pytest.raises(ValueError, match="here: expected the guide to sample every latent.*'c'"):
        runner(model, lambda: None)


def test_a_batch_dimension_that_is_no_plate() -> None:
    """Of the distribution, which the first look finds, or of the data beside it."""

    def programs(fn: Any) -> tuple[Any, Any]:
        def model(x: torch.Tensor) -> None:
            with pyro.plate("rows", len(x), dim=-2):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", fn, obs=x)

        def guide(x: torch.Tensor) -> None:
            with pyro.plate("rows", len(x), dim=-2):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        return model, guide

    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"site 'x' to be a plate.*`.to_event\(1\)` forgotten"):
        runner(*programs(dist.Normal(torch.zeros(3), 1.0)), x)
    (run,) = runner(*programs(dist.Normal(0.0, 1.0)), x, num=1).runs((x,), {})
    site = run.model_trace.nodes["x"]
    with pytest.raises(ValueError, match=r"x: expected a site of batch shape \(4, 1\), its plates"):
        run.spread(site["fn"].log_prob(x), site)


def test_a_bound_method_is_looked_at_once() -> None:
    class Pair:
        looks = 0

        def model(self, x: torch.Tensor) -> None:
            model(x)

        def guide(self, x: torch.Tensor) -> None:
            self.looks += 1
            guide(x)

    pair, x, objective = Pair(), torch.randn(4), TraceIWAE_ELBO(2, vectorize_particles=True)
    objective.loss(pair.model, pair.guide, x)
    assert pair.looks == 2
    objective.loss(pair.model, pair.guide, x)
    assert pair.looks == 3
    objective.loss(Pair().model, pair.guide, x)
    assert pair.looks == 5  # Another program.


# ---------------------------------------------------------------- joints


def linked_run() -> tuple[Run, Links, torch.Tensor, torch.Tensor]:
    """z2 then z1 in the guide, z1 + 10 z2 in the model, two particles of three rows."""
    loc, x = torch.tensor(0.5, requires_grad=True), torch.zeros(3)

    def model() -> None:
        with pyro.plate("rows", 3):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1 + 10 * z2.sum(-1), 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("rows", 3):
            z2 = pyro.sample("z2", dist.Normal(loc * torch.ones(2), 1.0).to_event(1))
            pyro.sample("z1", dist.Normal(3 * z2.sum(-1), 1.0))

    (run,) = runner(model, guide, num=2, vectorize=True).runs((), {}, linked=True)
    assert run.links is not None
    value = run.model_trace.nodes["x"]["fn"].mean.sum()
    return run, run.links, value, loc


def test_joints_are_where_model_and_guide_look() -> None:
    run, links, _, _ = linked_run()
    assert list(links.upstream) == list(links.downstream) == ["z2", "z1"]
    for name in links.upstream:
        assert run.guide_trace.nodes[name]["value"] is links.upstream[name]
        assert run.model_trace.nodes[name]["value"] is links.downstream[name]
        assert torch.equal(links.upstream[name], links.downstream[name])


def test_open_joints_change_no_gradient() -> None:
    _, _, value, loc = linked_run()
    (grad,) = torch.autograd.grad(value, [loc])
    assert grad.item() == 2 * 3 * (2 * 3 + 10 * 2)


def test_a_closed_joint_stops_gradients_at_its_sample() -> None:
    """Each sample stands for itself: z1's path to z2 is not part of z2's derivative."""
    _, links, value, loc = linked_run()
    links.valve.closed = True
    joints = [links.upstream["z2"], links.upstream["z1"], loc]
    of_z2, of_z1, of_loc = torch.autograd.grad(value, joints, retain_graph=True, allow_unused=True)
    assert (of_z2 == 10).all()
    assert (of_z1 == 1).all()
    assert (of_loc == 0).all()
    links.valve.closed = False
    (grad,) = torch.autograd.grad(value, [loc])
    assert grad.item() == 2 * 3 * 26


def test_weights_act_on_what_comes_back_from_the_model() -> None:
    _, links, value, loc = linked_run()
    links.valve.weight = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.5]])
    (grad,) = torch.autograd.grad(value, [loc])
    assert grad.item() == 6.5 * 26


def test_values_without_gradient_have_no_joint() -> None:
    x = torch.randn(4)
    with torch.no_grad():
        (run,) = runner(model, guide, x, vectorize=True).runs((x,), {}, linked=True)
    assert run.links is not None
    assert not run.links.downstream
    assert run.model_trace.nodes["u"]["value"] is run.guide_trace.nodes["u"]["value"]


@pytest.mark.parametrize("at_once", [True, False])
def test_no_sample_outlives_its_step(at_once: bool) -> None:
    """And so no graph: a joint that held its own sample would keep it for ever."""
    samples: list[Any] = []

    def watched(x: torch.Tensor) -> None:
        guide(x)
        with pyro.plate("more", len(x)):
            scale = pyro.param("scale").sum()
            samples.append(weakref.ref(pyro.sample("w", dist.Normal(x, scale))))

    def wider(x: torch.Tensor) -> None:
        model(x)
        with pyro.plate("more", len(x)):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    x, groups = torch.randn(4), {"num_groups": 2, "partial": True}
    objective = TraceIWAE_ELBO(3, "dreg", vectorize_particles=at_once, **groups)
    svi = SVI(wider, watched, pyro.optim.Adam({"lr": 0.01}), objective)
    svi.step(x)
    samples.clear()
    for _ in range(3):
        svi.step(x)
    gc.collect()
    assert len(samples) == (3 if at_once else 18)
    assert not [sample for sample in samples if sample() is not None]


def mean_loss(objective: Any, programs: Any, *args: Any) -> float:
    """Of 20 seeds."""
    losses = []
    for seed in range(20):
        pyro.set_rng_seed(seed)
        losses.append(objective.loss(*programs, *args))
    return sum(losses) / 20


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("objective", [TraceIWAE_ELBO, TraceFreeBits_ELBO])
def test_a_structure_keeps_its_own_way_of_running(objective: Any, num_particles: int) -> None:
    """Unlabelled rows do not broadcast, labelled ones do: neither decides for the other."""

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        with pyro.plate("n", len(x)):
            given = y is not None
            y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mixed = y if given else y.flatten().cumsum(0).reshape(y.shape)
            pyro.sample("x", dist.Normal(z + mixed, 1.0), obs=x)

    def guide(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        with pyro.plate("n", len(x)):
            if y is None:
                pyro.sample("y", dist.Normal(0.1 * x, 1.0))
            pyro.sample("z", dist.Normal(0.5 * x, 0.7))

    def make() -> Any:
        if objective is TraceIWAE_ELBO:
            return TraceIWAE_ELBO(num_particles)
        return TraceFreeBits_ELBO(0.0, num_particles=num_particles)

    x, y = torch.tensor([0.7, -1.2, 2.0]), torch.tensor([0.3, 0.1, -0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That they run one at a time.
        one, forms = make(), [(x,), (x, y), (x, None)]
        expected = [mean_loss(make(), (model, guide), *args) for args in forms]
        for form in (0, 1, 0, 2, 1, 2):
            assert mean_loss(one, (model, guide), *forms[form]) == expected[form]


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("first", [0, 1])
def test_a_plate_that_comes_and_goes(first: int, vectorize: bool | None) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if x.dim() == 2:
                with pyro.plate("t", 4, dim=-2):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            else:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("n", 3, dim=-1):
            pyro.sample("z", dist.Normal(x.reshape(-1, 3).mean(0), 0.5))

    batches = [torch.randn(3), torch.randn(4, 3)]
    objective = TraceIWAE_ELBO(3, vectorize_particles=vectorize)
    for index in (first, 1 - first, first, 1 - first):
        fresh = TraceIWAE_ELBO(3, vectorize_particles=vectorize)
        expected = mean_loss(fresh, (model, guide), batches[index])
        assert mean_loss(objective, (model, guide), batches[index]) == expected


def test_programs_that_change_on_the_same_arguments() -> None:
    """Found out after a run, or by its failure."""
    deep = [False]

    def model(x: torch.Tensor) -> None:
        with pyro.plate("n", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if deep[0]:
                with pyro.plate("t", 4, dim=-2):
                    pyro.sample("more", dist.Normal(z, 1.0), obs=torch.ones(4, 3))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("n", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7))

    x, objective = torch.randn(3), TraceIWAE_ELBO(3)
    for deep[0] in (False, True, False, True):
        fresh = mean_loss(TraceIWAE_ELBO(3), (model, guide), x)
        mean_loss(objective, (model, guide), x)
        assert mean_loss(objective, (model, guide), x) == fresh


def test_latents_that_come_and_go_by_themselves() -> None:
    """A look after the failed run finds nothing wrong, so the run's own message is raised."""
    calls = [0]

    def model(x: torch.Tensor) -> None:
        calls[0] += 1
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if calls[0] % 2 == 0:
                pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.randn(3)
    known = runner(model, guide, x, vectorize=False)
    with pytest.raises(ValueError, match="expected the same latents in model and guide, .*'w'"):
        known.runs((x,), {}, num_particles=1)
