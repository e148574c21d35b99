"""What holds for all objectives about the codes of a batch, whatever they ask of these."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_codes import LinearCodes, Pinned
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_vae import scale_kl
from pyro_vae.guides import AmortizedNormal
from pyro_vae.models import LinearGaussian
from pyro_vae.nets import MLP
from pyro_vae.objectives import (
    TraceDIP_ELBO,
    TraceFactor_ELBO,
    TraceMMD_ELBO,
    TraceTotalCorrelation_ELBO,
)
from pyro_vae.schedules import LinearWarmup

close = torch.testing.assert_close
NUM_DATA = 40


def discriminator(width: int) -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MLP(width, [4], 1)


@dataclass
class Kind:
    """An objective with a weight w; ``neutral`` is the one that makes it an ELBO."""

    make: Callable[..., Any]
    neutral: float
    elbo: type


KINDS = {
    "weighted": Kind(
        lambda w, width=3, **k: TraceTotalCorrelation_ELBO(NUM_DATA, w, 2 * w - 1, 1.0, **k),
        1.0,
        Trace_ELBO,
    ),
    "stratified": Kind(
        lambda w, width=3, **k: TraceTotalCorrelation_ELBO(
            NUM_DATA, 1.0, w, w, estimator="stratified", **k
        ),
        1.0,
        Trace_ELBO,
    ),
    "dip": Kind(
        lambda w, width=3, **k: TraceDIP_ELBO(w, 2 * w, kind="II", **k), 0.0, TraceMeanField_ELBO
    ),
    "mmd": Kind(lambda w, width=3, **k: TraceMMD_ELBO(w / 10, 1.0, **k), 0.0, TraceMeanField_ELBO),
    "factor": Kind(
        lambda w, width=3, **k: TraceFactor_ELBO(w, discriminator(width), **k),
        0.0,
        TraceMeanField_ELBO,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def test_the_reported_loss_is_pyros(kind: Kind) -> None:
    p = LinearCodes()
    for weight in (kind.neutral, 3.0):
        objective = kind.make(weight)
        for size in (None, NUM_DATA):
            pyro.set_rng_seed(7)
            expected = kind.elbo().loss(p.model, p.guide, p.x, size=size)
            for method in (objective.loss, objective.loss_and_grads, objective.differentiable_loss):
                pyro.set_rng_seed(7)
                loss = method(p.model, p.guide, p.x, size=size)
                assert torch.as_tensor(loss).item() == pytest.approx(expected, rel=1e-12)


def test_neutral_weights_give_the_elbo(kind: Kind) -> None:
    p = LinearCodes()
    expected = p.of(kind.elbo().differentiable_loss, 7)
    close(p.of(kind.make(kind.neutral).training_loss, 7), expected)
    close(p.of(kind.make(kind.neutral).differentiable_loss, 7), expected)
    other = p.of(kind.make(3.0).training_loss, 7)
    assert not torch.allclose(other["loss"], expected["loss"])
    assert not torch.allclose(other["encoder"], expected["encoder"])


def test_training_has_the_gradient_of_the_training_loss(kind: Kind) -> None:
    p = LinearCodes()
    expected = p.of(kind.make(3.0).training_loss, 7)
    del expected["loss"]
    close(
        {k: v for k, v in p.of(kind.make(3.0).differentiable_loss, 7).items() if k != "loss"},
        expected,
    )
    pyro.set_rng_seed(7)
    kind.make(3.0).loss_and_grads(p.model, p.guide, p.x)
    close({k: p.params[k].grad for k in expected if k != "loss"}, expected)


def test_a_subsample_stands_for_all_data(kind: Kind) -> None:
    p = LinearCodes()
    alone = p.of(kind.make(3.0).training_loss, 7)
    scaled = p.of(kind.make(3.0).training_loss, 7, size=NUM_DATA)
    close(scaled, {k: v * NUM_DATA / len(p.x) for k, v in alone.items()})


@pytest.mark.parametrize("inside", [False, True])
def test_rows_that_are_masked_out_are_no_data(kind: Kind, inside: bool) -> None:
    p = LinearCodes(Pinned)
    keep = torch.tensor([True, False, True, True, False])
    objective = kind.make(3.0)
    if inside:
        masked = _mask_inside(p, keep)
        pyro.set_rng_seed(7)
        loss = p.with_gradient(objective.training_loss(masked.model, masked.guide, p.x))
    else:
        loss = p.of(objective.training_loss, 7, mask=keep)
    p.x = p.x[keep]
    close(loss, p.of(kind.make(3.0).training_loss, 7))


class _Masked:
    def __init__(self, model: Any, guide: Any) -> None:
        self.model, self.guide = model, guide


def _mask_inside(p: LinearCodes, keep: torch.Tensor) -> _Masked:
    """The same pair, its masks in the distributions instead of around the sites."""

    class Inside(poutine.messenger.Messenger):  # type: ignore[misc]
        def _pyro_sample(self, msg: Any) -> None:
            if msg["name"] in "abx":
                msg["fn"] = msg["fn"].mask(keep)

    return _Masked(Inside()(p.model), Inside()(p.guide))


def test_a_batch_without_any_datum(kind: Kind) -> None:
    p = LinearCodes()
    loss = p.of(kind.make(3.0).training_loss, 7, mask=torch.zeros(5, dtype=torch.bool))
    assert all((v == 0).all() for v in loss.values())


@pytest.mark.parametrize("name", ["weighted", "dip"])
def test_a_weight_of_two_is_a_row_twice(name: str) -> None:
    p = LinearCodes(Pinned)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0])
    weighted = p.of(KINDS[name].make(3.0).training_loss, 7, scale=weights)
    p.x = p.x.repeat_interleave(weights.long(), 0)
    close(weighted, p.of(KINDS[name].make(3.0).training_loss, 7))


def test_particles_one_by_one_and_at_once(kind: Kind) -> None:
    p = LinearCodes(Pinned)
    expected = p.of(kind.make(3.0).training_loss, 7)
    for vectorize in (None, True, False):
        objective = kind.make(3.0, num_particles=3, vectorize_particles=vectorize)
        close(p.of(objective.training_loss, 7), expected)


def test_other_latents_contribute_their_kl(kind: Kind) -> None:
    p = LinearCodes()
    expected = p.of(kind.elbo().differentiable_loss, 7)
    neutral = kind.make(kind.neutral, 2, sites=["a"])
    if kind.elbo is TraceMeanField_ELBO:
        close(p.of(neutral.training_loss, 7), expected)
    only_a = p.of(kind.make(3.0, 2, sites=["a"]).training_loss, 7)
    only_b = p.of(kind.make(3.0, 1, sites=["b"]).training_loss, 7)
    both = p.of(kind.make(3.0, sites=["a", "b"]).training_loss, 7)
    close(both, p.of(kind.make(3.0).training_loss, 7))
    assert not torch.allclose(only_a["loss"], both["loss"])
    assert not torch.allclose(only_a["loss"], only_b["loss"])


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_plate_within_a_datum_is_part_of_its_code(kind: Kind, dim: int) -> None:
    """Elements in a plate to the right or left of the data's, or in one event, are the same."""
    p = LinearCodes(Pinned)
    parts_dim = -3 - dim

    def pair(inner: bool) -> tuple[Any, Any]:
        def sample(loc: torch.Tensor, scale: float, rows: Any) -> torch.Tensor:
            if not inner:
                with rows:
                    return pyro.sample("z", Pinned(loc, scale).to_event(1))
            with rows, pyro.plate("parts", 3, dim=parts_dim):
                return pyro.sample("z", Pinned(loc if dim == -2 else loc.T, scale))

        def plate() -> Any:
            return pyro.plate("rows", len(p.x), dim=dim if inner else -1)

        def model(x: torch.Tensor) -> None:
            rows = plate()
            z = sample(torch.zeros(len(x), 3), 1.0, rows)
            z = z.T if inner and dim == -1 else z
            shape = (len(x), 1, 4) if inner and dim == -2 else x.shape
            fn = dist.Normal((z @ p.params["weight"]).reshape(shape), 1.0).to_event(1)
            with rows:
                pyro.sample("x", fn, obs=x.reshape(shape))

        return model, lambda x: sample(x @ p.params["encoder"], 0.4, plate())

    losses = []
    for inner in (False, True):
        model, guide = pair(inner)
        pyro.set_rng_seed(7)
        losses.append(p.with_gradient(kind.make(3.0).training_loss(model, guide, p.x)))
    close(losses[0], losses[1])


def test_a_schedule_is_followed(kind: Kind) -> None:
    p = LinearCodes()
    schedule = LinearWarmup(2, start=1.0, end=3.0)
    make: Any = {
        "weighted": lambda w: TraceTotalCorrelation_ELBO(NUM_DATA, beta=w),
        "stratified": lambda w: TraceTotalCorrelation_ELBO(NUM_DATA, gamma=w),
        "dip": lambda w: TraceDIP_ELBO(1.0, w),
        "mmd": lambda w: TraceMMD_ELBO(0.5, w),
        "factor": lambda w: TraceFactor_ELBO(w, discriminator(3)),
    }[next(name for name, k in KINDS.items() if k is kind)]
    objective = make(schedule)
    for value in (1.0, 2.0, 3.0):
        close(p.of(objective.training_loss, 7), p.of(make(value).training_loss, 7))
        schedule.step()


def test_modules_float32_and_last_short_batches(kind: Kind) -> None:
    torch.set_default_dtype(torch.float32)
    try:
        model, guide = LinearGaussian(5, 2), AmortizedNormal(MLP(5, [4], 4))
        objective = kind.make(3.0, 2)
        adam = pyro.optim.Adam({"lr": 0.01})
        svi = SVI(model, guide, adam, loss=objective)
        x = torch.randn(11, 5)
        before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
        for batch in x.split(4):
            svi.step(batch)
        after = [*model.parameters(), *guide.parameters()]
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not any(name.startswith("MLP") for name in pyro.get_param_store())
        for p in after:
            p.grad = None
        seed = 3
        module = kind.make(3.0, 2)(model, guide)
        pyro.set_rng_seed(seed)
        module(x).backward()
        gradient = [p.grad.clone() for p in after]
        for p in after:
            p.grad = None
        pyro.set_rng_seed(seed)
        kind.make(3.0, 2).loss_and_grads(model, guide, x)
        close(gradient, [p.grad for p in after])
    finally:
        torch.set_default_dtype(torch.float64)


def test_scale_kl_stays_on_the_kl(kind: Kind) -> None:
    p = LinearCodes()
    extra = p.of(kind.make(3.0).training_loss, 7)["loss"]
    extra = extra - p.of(kind.elbo().differentiable_loss, 7)["loss"]
    model, guide = scale_kl(p.model, 0.5), scale_kl(p.guide, 0.5)
    pyro.set_rng_seed(7)
    scaled = kind.make(3.0).training_loss(model, guide, p.x)
    pyro.set_rng_seed(7)
    reported = kind.elbo().differentiable_loss(model, guide, p.x)
    if kind.elbo is Trace_ELBO:  # All of it is KL.
        extra = 0.5 * extra
    elif kind is KINDS["mmd"]:  # Of this one a part.
        loc, deviation = p.moments(p.x)
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(loc, deviation), p.prior(p.x)
        ).sum()
        extra = extra + 0.3 * 0.5 * kl
    close((scaled - reported).detach(), extra.detach())


# What is refused.


def refuse(kind: Kind, model: Any, guide: Any, match: str, **kwargs: Any) -> None:
    objective = kind.make(3.0, **kwargs)
    for _ in range(2):  # Not only the first time.
        with pytest.raises(ValueError, match=match):
            objective.loss(model, guide, torch.zeros(4, 3))


def pair_of(sample: Callable[[Any, Any], None]) -> tuple[Any, Any]:
    """Latents as ``sample`` draws them, and data that do not depend on them."""

    def guide(x: torch.Tensor) -> None:
        sample(x, pyro.plate("rows", len(x), dim=-1))

    def model(x: torch.Tensor) -> None:
        rows = pyro.plate("rows", len(x), dim=-1)
        sample(x, rows)
        with rows:
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    return model, guide


def test_names_of_sites_that_are_none(kind: Kind) -> None:
    for sites in ("a", []):
        with pytest.raises(TypeError, match="expected sites to be a list of names"):
            kind.make(3.0, sites=sites)
    p = LinearCodes()
    with pytest.raises(
        ValueError, match=r"among the latents \['a', 'b'\] in plate 'rows', got 'c'"
    ):
        kind.make(3.0, sites=["a", "c"]).loss(p.model, p.guide, p.x)


def test_no_latent_in_the_plate(kind: Kind) -> None:
    pair = pair_of(lambda x, rows: pyro.sample("w", dist.Normal(0.0, 1.0)))
    refuse(kind, *pair, match="expected a latent in plate 'rows', got none")


def test_no_plate(kind: Kind) -> None:
    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def model(x: torch.Tensor) -> None:
        guide(x)
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(2), obs=x)

    refuse(kind, model, guide, match="expected one vectorised plate over the data")


def test_several_plates_of_data(kind: Kind) -> None:
    def guide(x: torch.Tensor) -> None:
        with pyro.plate("r", 4, dim=-2), pyro.plate("c", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("r", 4, dim=-2), pyro.plate("c", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refuse(kind, model, guide, match=r"expected one plate over the data, .* got \['c', 'r'\]")


def test_no_reparameterised_samples(kind: Kind) -> None:
    def sample(x: torch.Tensor, rows: Any) -> None:
        with rows:
            pyro.sample("z", dist.Bernoulli(0.5))

    refuse(kind, *pair_of(sample), match="expected a reparameterised guide, got site 'z'")


def test_a_subsample_of_the_elements(kind: Kind) -> None:
    def sample(x: torch.Tensor, rows: Any) -> None:
        parts = pyro.plate("parts", 6, subsample=torch.arange(3), dim=-2)
        with parts, rows:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    refuse(kind, *pair_of(sample), match="expected whole codes at site 'z', got a subsample")


def test_a_mask_over_elements(kind: Kind) -> None:
    def sample(x: torch.Tensor, rows: Any) -> None:
        keep = torch.tensor([True, False, True])
        with rows:
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(keep).to_event(1))

    refuse(kind, *pair_of(sample), match="expected a mask over whole codes at site 'z'")


@pytest.mark.parametrize("name", ["weighted", "dip"])
@pytest.mark.parametrize("route", ["plain", "buffer", "opaque"])
def test_a_code_that_depends_on_another_latent(name: str, route: str) -> None:
    """Found by following values, and where they get lost by another draw."""

    def sample(x: torch.Tensor, rows: Any) -> None:
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            if route == "buffer":
                loc = torch.zeros(len(x))
                loc[:] = a
            elif route == "opaque":
                if type(a) is not torch.Tensor:
                    raise RuntimeError("no tensor")
                loc = a + 0
            else:
                loc = a + 0
            pyro.sample("b", dist.Normal(loc, 1.0))

    pair = pair_of(sample)
    refuse(KINDS[name], *pair, match="q\\(z | x\\) at site 'b' is fixed by the data")
    # The other one is fine.
    KINDS[name].make(3.0, sites=["a"]).loss(*pair, torch.zeros(4, 3))
