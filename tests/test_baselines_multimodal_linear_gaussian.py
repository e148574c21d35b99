import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import pyro
import pytest
import torch
from linear_modalities import LinearModalities, all_patterns, mixed_patterns
from pyro import poutine
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pyro_vae.baselines import LinearGaussianFit, MultimodalLinearGaussian
from pyro_vae.baselines._whitened import Whitened
from pyro_vae.evaluation import importance_weighted_log_likelihood

Tensors = dict[str, Tensor]
WIDTHS = {"image": 5, "sound": 4, "text": 3}


def arbitrary(noise: float = 0.5, latent_dim: int = 3) -> MultimodalLinearGaussian:
    """Loadings without any structure; full noise for "sound", diagonal for the others."""
    loc = {name: torch.randn(width) for name, width in WIDTHS.items()}
    weight = {name: torch.randn(width, latent_dim) for name, width in WIDTHS.items()}
    covariance = {name: noise * (0.5 + torch.rand(width)) for name, width in WIDTHS.items()}
    root = torch.randn(4, 4)
    covariance["sound"] = noise * (root @ root.mT + 0.1 * torch.eye(4))
    return MultimodalLinearGaussian(loc, weight, covariance)


class Dense:
    """The joint normal of z and all modalities, marginalised and conditioned by indexing."""

    def __init__(self, model: MultimodalLinearGaussian) -> None:
        latent_dim = next(iter(model.weight.values())).shape[1]
        self.columns: dict[str, list[int]] = {"z": list(range(latent_dim))}
        start = latent_dim
        for name, loc in model.loc.items():
            self.columns[name] = list(range(start, start + len(loc)))
            start += len(loc)
        self.loc = torch.cat([torch.zeros(latent_dim), *model.loc.values()])
        weight = torch.cat([torch.eye(latent_dim), *model.weight.values()])
        noise = [n.diag() if n.ndim == 1 else n for n in model.noise_covariance.values()]
        zero = torch.zeros(latent_dim, latent_dim)
        self.covariance = weight @ weight.mT + torch.block_diag(zero, *noise)

    def marginal(self, names: Collection[str]) -> tuple[Tensor, Tensor]:
        index = [column for name in names for column in self.columns[name]]
        return self.loc[index], self.covariance[index][:, index]

    def log_prob(self, row: Tensors, names: Collection[str]) -> float:
        if not names:
            return 0.0
        x = torch.cat([row[name] for name in names])
        return float(MultivariateNormal(*self.marginal(names)).log_prob(x))

    def conditional(
        self, row: Tensors, of: Collection[str], given: Collection[str]
    ) -> tuple[Tensor, Tensor]:
        loc, covariance = self.marginal([*of, *given])
        size = sum(len(self.columns[name]) for name in of)
        if not given:
            return loc, covariance
        x = torch.cat([row[name] for name in given])
        gain = covariance[:size, size:] @ torch.linalg.inv(covariance[size:, size:])
        mean = loc[:size] + gain @ (x - loc[size:])
        return mean, covariance[:size, :size] - gain @ covariance[size:, :size]


def rows_of(batch: Tensors) -> list[Tensors]:
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def seen_in(present: Tensors, row: int) -> list[str]:
    return [name for name in present if present[name][row]]


# Exact answers, each row with a pattern of its own.


def test_log_prob_is_that_of_the_dense_normal() -> None:
    model = arbitrary()
    dense, batch = Dense(model), model.sample(20)
    missing, present = mixed_patterns(batch)
    expected = [dense.log_prob(row, seen_in(present, n)) for n, row in enumerate(rows_of(batch))]
    actual = model.log_prob(missing, present)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-11, atol=1e-11)


def test_conditional_log_prob_is_that_of_the_dense_normal() -> None:
    model = arbitrary()
    dense, batch = Dense(model), model.sample(64)
    missing, present = mixed_patterns(batch)
    choices = list(itertools.product([True, False], repeat=3))
    table = torch.tensor([choices[n // 8] for n in range(64)])
    given = dict(zip(batch, table.unbind(-1), strict=True))
    expected = []
    for n, row in enumerate(rows_of(batch)):
        known = [name for name in seen_in(present, n) if given[name][n]]
        rest = [name for name in seen_in(present, n) if not given[name][n]]
        if not rest:
            expected.append(0.0)
            continue
        conditional = MultivariateNormal(*dense.conditional(row, rest, known))
        x = torch.cat([row[name] for name in rest])
        expected.append(float(conditional.log_prob(x)))
    actual = model.conditional_log_prob(missing, given, present)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", [["text"], ("image", "sound"), {"sound"}, []])
def test_names_condition_in_all_rows(given: Collection[str]) -> None:
    model = arbitrary()
    batch = model.sample(5)
    masks = {name: torch.full((5,), name in given) for name in WIDTHS}
    actual = model.conditional_log_prob(batch, given)
    torch.testing.assert_close(actual, model.conditional_log_prob(batch, masks))
    log_given = model.log_prob(batch, present=masks)  # The chain rule.
    torch.testing.assert_close(actual, model.log_prob(batch) - log_given)


def test_posterior_is_that_of_the_dense_normal() -> None:
    model = arbitrary()
    dense, batch = Dense(model), model.sample(16)
    missing, present = mixed_patterns(batch)
    posterior = model.posterior(missing, present)
    assert (posterior.batch_shape, posterior.event_shape) == ((16,), (3,))
    for n, row in enumerate(rows_of(batch)):
        mean, covariance = dense.conditional(row, ["z"], seen_in(present, n))
        torch.testing.assert_close(posterior.mean[n], mean)
        torch.testing.assert_close(posterior.covariance_matrix[n], covariance)


@pytest.mark.parametrize("name", WIDTHS)
def test_predictions_are_conditional_means(name: str) -> None:
    model = arbitrary()
    dense, batch = Dense(model), model.sample(16)
    missing, present = mixed_patterns(batch)
    prediction = model.predict(missing, name, present)
    assert prediction.shape == (16, WIDTHS[name])
    for n, row in enumerate(rows_of(batch)):
        seen = seen_in(present, n)
        if name in seen:  # A new draw has the posterior mean through the loadings.
            expected = model.loc[name] + model.weight[name] @ dense.conditional(row, ["z"], seen)[0]
            assert not torch.allclose(expected, row[name], atol=1e-3)
        else:
            expected = dense.conditional(row, [name], seen)[0]
        torch.testing.assert_close(prediction[n], expected)


def test_nothing_observed_is_exactly_the_prior() -> None:
    model = arbitrary()
    missing, present = mixed_patterns(model.sample(8))
    assert model.log_prob(missing, present)[7] == 0
    assert model.conditional_log_prob(missing, ["image"], present)[7] == 0
    posterior = model.posterior(missing, present)
    assert torch.equal(posterior.mean[7], torch.zeros(3))
    assert torch.equal(posterior.scale_tril[7], torch.eye(3))
    assert torch.equal(model.predict(missing, "text", present)[7], model.loc["text"])
    # And where no row has anything.
    nowhere = {"image": torch.zeros(4, dtype=torch.bool)}
    assert torch.equal(model.log_prob({}, nowhere), torch.zeros(4))
    assert model.posterior({"image": None}, nowhere).batch_shape == (4,)


def test_three_ways_to_say_not_observed_agree() -> None:
    pair = LinearModalities()
    model = pair.exact
    patterns = list(all_patterns(pair.data()))
    assert len({pattern.seen for pattern in patterns}) == 8
    for pattern in patterns:
        expected = model.log_prob(pattern.batch, pattern.present)
        mean = model.posterior(pattern.batch, pattern.present).mean
        if not pattern.seen:
            assert torch.equal(expected, torch.zeros(6))
            continue
        for batch in (pattern.batch_with_none, pattern.batch_of_seen):
            assert torch.equal(model.log_prob(batch), expected)
            assert torch.equal(model.posterior(batch).mean, mean)


def test_rows_do_not_depend_on_one_another() -> None:
    model = arbitrary()
    missing, present = mixed_patterns(model.sample(16))
    order = torch.randperm(16)
    moved = {name: x[order] for name, x in missing.items()}
    masks = {name: mask[order] for name, mask in present.items()}
    whole = model.log_prob(missing, present)
    torch.testing.assert_close(model.log_prob(moved, masks), whole[order], rtol=0, atol=1e-12)
    for n in range(16):
        one = {name: x[n : n + 1] for name, x in missing.items()}
        mask = {name: m[n : n + 1] for name, m in present.items()}
        torch.testing.assert_close(model.log_prob(one, mask)[0], whole[n])


def test_order_of_names_does_not_matter() -> None:
    model = arbitrary()
    batch = model.sample(4)
    backwards = MultimodalLinearGaussian(
        dict(reversed(model.loc.items())),
        model.weight,
        dict(reversed(model.noise_covariance.items())),
    )
    turned = dict(reversed(batch.items()))
    torch.testing.assert_close(backwards.log_prob(turned), model.log_prob(batch))


def test_one_modality_is_the_linear_gaussian_model() -> None:
    loc, weight, noise = torch.randn(6), torch.randn(6, 2), 0.1 + torch.rand(6)
    one = MultimodalLinearGaussian({"x": loc}, {"x": weight}, {"x": noise})
    fit = LinearGaussianFit(loc, weight, noise, torch.empty(0))
    x = fit.sample(10)
    torch.testing.assert_close(one.log_prob({"x": x}), fit.log_prob(x))
    torch.testing.assert_close(one.posterior({"x": x}).mean, fit.posterior(x).mean)
    torch.testing.assert_close(one.posterior({"x": x}).scale_tril, fit.posterior(x).scale_tril)


# Numerics.


def single(model: MultimodalLinearGaussian) -> MultimodalLinearGaussian:
    return MultimodalLinearGaussian(
        *[{n: p.float() for n, p in part.items()} for part in vars(model).values()]
    )


def double(model: MultimodalLinearGaussian) -> MultimodalLinearGaussian:
    return MultimodalLinearGaussian(
        *[{n: p.double() for n, p in part.items()} for part in vars(model).values()]
    )


def test_float32_is_usable_with_small_noise() -> None:
    coarse = single(arbitrary(noise=1e-6))
    fine = double(coarse)  # The same parameters to the last bit.
    missing, present = mixed_patterns({name: x.float() for name, x in fine.sample(64).items()})
    exact = {name: x.double() for name, x in missing.items()}
    answers: list[Callable[..., Tensor]] = [
        lambda model, x: model.log_prob(x, present),
        lambda model, x: model.conditional_log_prob(x, ["image"], present),
        lambda model, x: model.posterior(x, present).mean,
        lambda model, x: model.predict(x, "text", present),
    ]
    for answer, tolerance in zip(answers, [0.1, 0.1, 1e-4, 1e-4], strict=True):
        actual = answer(coarse, missing)
        assert actual.dtype == torch.float32
        expected = answer(fine, exact)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def test_conditionals_do_not_lose_the_digits_that_differences_lose() -> None:
    # Given 1000 precise columns, one more has a log-density of order 1.
    torch.manual_seed(1)
    weight = {"wide": torch.randn(1000, 2), "narrow": torch.randn(1, 2)}
    noise = {"wide": torch.full((1000,), 1e-6), "narrow": torch.ones(1)}
    fine = MultimodalLinearGaussian(
        {"wide": torch.zeros(1000), "narrow": torch.zeros(1)}, weight, noise
    )
    fine = double(single(fine))
    batch = {name: x.float().double() for name, x in fine.sample(50).items()}
    exact = fine.conditional_log_prob(batch, ["wide"])
    coarse = single(fine)
    ours = (coarse.conditional_log_prob(batch, ["wide"]) - exact).abs().max()
    difference = coarse.log_prob(batch) - coarse.log_prob({"wide": batch["wide"]})
    assert ours < 1e-3
    assert (difference - exact).abs().max() > ours


def test_noise_is_factored_once_a_call_however_many_patterns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, factored = arbitrary(), []
    missing, present = mixed_patterns(model.sample(64))
    of = Whitened.of

    def counted(value: Tensor, *parameters: Tensor) -> Whitened:
        factored.append(value)
        return of(value, *parameters)

    monkeypatch.setattr(Whitened, "of", staticmethod(counted))
    for call in (
        lambda: model.conditional_log_prob(missing, ["sound"], present),
        lambda: model.posterior(missing, present),
    ):
        factored.clear()
        call()
        assert len(factored) == sum(value is not None for value in missing.values())


def test_parameters_have_gradients() -> None:
    model = arbitrary(latent_dim=2)
    missing, present = mixed_patterns(model.sample(8))
    names = list(WIDTHS)
    start = [p.clone().requires_grad_() for part in vars(model).values() for p in part.values()]

    def rebuilt(*params: Tensor) -> MultimodalLinearGaussian:
        parts = [dict(zip(names, params[n : n + 3], strict=True)) for n in (0, 3, 6)]
        noise = parts[2]["sound"]
        parts[2]["sound"] = 0.5 * (noise + noise.mT)  # The finite differences are not symmetric.
        return MultimodalLinearGaussian(*parts)

    def answers(*params: Tensor) -> tuple[Tensor, ...]:
        model = rebuilt(*params)
        return (
            model.log_prob(missing, present),
            model.conditional_log_prob(missing, ["sound"], present),
            model.predict(missing, "image", present),
            model.posterior(missing, present).covariance_matrix,
        )

    assert torch.autograd.gradcheck(answers, start, fast_mode=True)


def test_any_real_dtype_is_accepted_and_the_batch_is_left_alone() -> None:
    model = arbitrary()
    batch = {name: torch.randint(-2, 3, (4, width)) for name, width in WIDTHS.items()}
    before = {name: x.clone() for name, x in batch.items()}
    expected = model.log_prob({name: x.double() for name, x in batch.items()})
    assert torch.equal(model.log_prob(batch), expected)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_samples_have_the_moments_of_the_model() -> None:
    model = arbitrary()
    num_samples = 20_000
    samples = model.sample(num_samples)
    x = torch.cat(list(samples.values()), -1)
    loc, covariance = Dense(model).marginal(WIDTHS)
    diagonal = covariance.diagonal()
    assert ((x.mean(0) - loc).abs() < 5 * (diagonal / num_samples).sqrt()).all()
    error = ((covariance.square() + diagonal.outer(diagonal)) / num_samples).sqrt()
    assert ((x.mT.cov() - covariance).abs() < 5 * error).all()


# The oracle for other tests.


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_the_product_of_diagonal_experts_is_the_exact_posterior(latent_dim: int) -> None:
    pair = LinearModalities(latent_dim)
    dense = Dense(pair.exact)
    batch = pair.data()
    for pattern in all_patterns(batch):
        loc, scale = pair.product(pattern.batch, pattern.present)
        for n, row in enumerate(rows_of(batch)):
            mean, covariance = dense.conditional(row, ["z"], pattern.seen)
            torch.testing.assert_close(loc[n], mean)
            torch.testing.assert_close(scale[n].square().diag(), covariance)


@pytest.mark.parametrize("name", WIDTHS)
def test_experts_are_likelihoods_up_to_a_factor_of_each_row(name: str) -> None:
    pair = LinearModalities()
    x = pair.data()[name]
    loc, scale = pair.expert(name, x)
    assert loc.shape == scale.shape == (6, 2)
    z = torch.randn(7, 1, 2)
    mean = pair.loc[name] + z @ pair.weight[name].mT
    log_likelihood = Normal(mean, pair.scale[name]).log_prob(x).sum(-1)
    factor = log_likelihood - Normal(loc, scale).log_prob(z).sum(-1)
    torch.testing.assert_close(factor, factor[:1].expand(7, 6))


@pytest.mark.parametrize("pattern_index", range(9))
def test_every_log_weight_of_the_pair_is_the_exact_log_likelihood(pattern_index: int) -> None:
    pair = LinearModalities()
    batch = pair.data(9)
    arguments: list[Any] = [(p.batch, p.present) for p in all_patterns(batch)]
    missing, present = (arguments + [mixed_patterns(batch)])[pattern_index]
    guide = poutine.trace(pair.guide).get_trace(missing, present)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(missing, present)
    for trace in (guide, model):
        trace.compute_log_prob()
        assert trace.nodes["rows"]["fn"].size == 9
    views = [model.nodes[f"view_{name}"]["log_prob"] for name in WIDTHS]
    log_weight = sum(views) + model.nodes["code"]["log_prob"] - guide.nodes["code"]["log_prob"]
    expected = pair.exact.log_prob(missing, present)
    torch.testing.assert_close(log_weight, expected, rtol=0, atol=1e-12)


def test_the_pair_runs_with_missing_keys_and_draws_what_is_none() -> None:
    pair = LinearModalities()
    x = pair.data(4)["image"]
    assert set(pair.model({"image": x})) == {"image"}
    values = pair.model({"image": x, "text": None})
    assert values["text"].shape == (4, 3)
    assert torch.equal(values["image"], x)
    trace = poutine.trace(pair.model).get_trace({"text": None}, {"text": torch.zeros(4).bool()})
    trace.compute_log_prob()
    assert torch.equal(trace.nodes["view_text"]["log_prob"], torch.zeros(4))
    expected = pair.exact.log_prob({"image": x})
    for batch in ({"image": x}, {"image": x, "text": None}):
        estimate = importance_weighted_log_likelihood(
            pair.model, pair.guide, batch, num_particles=3
        )
        torch.testing.assert_close(estimate.log_likelihood, expected)


def test_data_of_the_oracle_are_reproducible_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    one, other = LinearModalities(dtype=torch.float32), LinearModalities(dtype=torch.float32)
    assert all(torch.equal(one.data()[name], other.data()[name]) for name in WIDTHS)
    assert one.data()["image"].dtype == one.weight["text"].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    assert not pyro.get_param_store().keys()


# Messages.


def test_batches_that_do_not_fit_are_refused() -> None:
    model = arbitrary()
    batch = model.sample(4)
    with pytest.raises(ValueError, match=r"LinearGaussian: expected modalities .* got 'label'"):
        model.log_prob(batch | {"label": torch.zeros(4, 1)})
    with pytest.raises(ValueError, match=r"expected modalities .* in name, got 'label'"):
        model.predict(batch, "label")
    with pytest.raises(ValueError, match=r"expected modalities .* in given, got 'label'"):
        model.conditional_log_prob(batch, ["label"])
    with pytest.raises(ValueError, match=r"same number of rows everywhere, got 4 in .* and 3 in"):
        model.log_prob(batch | {"text": batch["text"][:3]})
    with pytest.raises(ValueError, match=r"batch\['text'\] of shape \(batch, 3\), got \(4, 2\)"):
        model.log_prob(batch | {"text": batch["text"][:, :2]})
    with pytest.raises(ValueError, match=r"expected data of at least one"):
        model.posterior({"text": None})
    bad = batch["text"].clone()
    bad[1, 0], bad[3] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"finite values of modality 'text' .* in 2 rows. Set"):
        model.log_prob(batch | {"text": bad})
    present = {"text": torch.tensor([True, False, True, False])}
    assert model.log_prob(batch | {"text": bad}, present).isfinite().all()


def test_a_number_of_samples_that_cannot_be() -> None:
    model, some = arbitrary(), 2.0
    with pytest.raises(
        ValueError, match=r"sample: expected num_samples >= 1, got 0. Pass num_samp"
    ):
        model.sample(0)
    with pytest.raises(TypeError, match=r"sample: expected an integer num_samples, got float"):
        model.sample(some)  # type: ignore[arg-type]


def test_masks_that_do_not_fit_are_refused() -> None:
    model = arbitrary()
    batch = model.sample(4)
    with pytest.raises(TypeError, match=r"present\['text'\] .* got torch.float64"):
        model.log_prob(batch, {"text": torch.ones(4)})
    with pytest.raises(ValueError, match=r"and 3 in present\['text'\]"):
        model.log_prob(batch, {"text": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(TypeError, match=r"given\['text'\] to be a bool .* got torch.float64"):
        model.conditional_log_prob(batch, {"text": torch.ones(4)})
    with pytest.raises(TypeError, match=r"given\['text'\] to be a bool .* got list"):
        model.conditional_log_prob(batch, {"text": [True] * 4})
    with pytest.raises(ValueError, match=r"given\['text'\] of shape \(batch,\) .* got \(4, 1\)"):
        model.conditional_log_prob(batch, {"text": torch.ones(4, 1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"given\['text'\] of shape \(4,\), .* got \(3,\)"):
        model.conditional_log_prob(batch, {"text": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(TypeError, match=r"a collection of names .* got str. Pass \['image'\]"):
        model.conditional_log_prob(batch, "text")


def test_parameters_that_do_not_fit_are_refused() -> None:
    loc, weight = {"x": torch.zeros(3), "y": torch.zeros(2)}, {"x": torch.ones(3, 1)}
    with pytest.raises(ValueError, match=r"same modalities, got \['x', 'y'\], \['x'\] and \['x'\]"):
        MultimodalLinearGaussian(loc, weight, weight)
    with pytest.raises(ValueError, match=r"of the same modalities, got \[\], \[\] and \[\]"):
        MultimodalLinearGaussian({}, {}, {})
    noise = {"x": torch.ones(3), "y": torch.ones(2)}
    for bad in (torch.ones(2, 2), torch.ones(3, 1), torch.ones(2)):
        with pytest.raises(ValueError, match=r"weight of shape \(D, L\) of modality 'y'"):
            MultimodalLinearGaussian(loc, weight | {"y": bad}, noise)
    weight["y"] = torch.ones(2, 1)
    for bad in (torch.ones(3), torch.tensor(1.0), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"noise_covariance of modality 'y' of shape \(2,\)"):
            MultimodalLinearGaussian(loc, weight, noise | {"y": bad})
    asymmetric = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    for bad in (torch.tensor([1.0, 0.0]), torch.ones(2, 2), asymmetric, torch.full((2,), math.inf)):
        with pytest.raises(ValueError, match=r"positive definite noise_covariance of modality 'y'"):
            MultimodalLinearGaussian(loc, weight, noise | {"y": bad})
