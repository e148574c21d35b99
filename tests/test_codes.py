"""Codebooks and distributions over codes, against recursions by hand, k-means and full sums."""

import copy
import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from sklearn.cluster import KMeans

from pyro_vae.autoregressive import AutoregressiveNet
from pyro_vae.code_distributions import AutoregressiveCodes, CategoricalCodes, NearestCodes
from pyro_vae.code_priors import AutoregressiveCodePrior, UniformCodePrior
from pyro_vae.codebook import Codebook

close = torch.testing.assert_close
K, D, N = 3, 2, 4


def codebook(**k: Any) -> Codebook:
    result = Codebook(K, D, **k)
    start = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]])
    result.vectors.data.copy_(start)
    return result


def all_indices(num_codes: int = K, num_positions: int = N) -> torch.Tensor:
    numbers = [torch.arange(num_codes)] * num_positions
    return torch.cartesian_prod(*numbers).reshape(-1, num_positions)


def autoregressive() -> AutoregressiveCodes:
    net = AutoregressiveNet(N, [20], in_features=K, out_features=K)
    for parameter in net.parameters():
        parameter.data.mul_(3)
    return AutoregressiveCodes(codebook(), net, N)


# The codebook.


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_nearest_and_lookup_by_hand(kind: torch.dtype) -> None:
    c = codebook().to(kind)
    vectors = torch.randn(7, 5, D, dtype=kind)
    distances = (vectors.unsqueeze(-2) - c.vectors).square().sum(-1)
    close(c.nearest(vectors), distances.argmin(-1))
    indices = torch.randint(K, (7, 5))
    assert torch.equal(c(indices), c.vectors[indices])
    assert torch.equal(c(indices.to(torch.uint8)), c.vectors[indices])
    assert torch.equal(c.locate(c(indices).detach()), indices)
    rounded = c(indices).detach() * (1 + 10 * torch.finfo(kind).eps)
    assert torch.equal(c.locate(rounded), indices)
    assert not c.find(c(indices) + 1e-2)[1].any()


def test_codes_close_to_one_another_are_told_apart() -> None:
    """In float32 a squared distance by the dot product would be off by 0.1 here."""
    c = Codebook(10, 1).float()
    c.vectors.data.copy_(1000 + torch.arange(10.0)[:, None] / 10)
    assert c.locate(c.vectors).tolist() == list(range(10))
    assert c.nearest(c.vectors.detach() + 0.04).tolist() == list(range(10))


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_moving_averages_are_those_of_the_paper(decay: float) -> None:
    """N_k and m_k as in its appendix A.1, from zero, and e_k = m_k / N_k where anything came."""
    c = codebook(decay=decay)
    start = c.vectors.clone()
    counts, sums = torch.zeros(K), torch.zeros(K, D)
    for step in range(6):
        v = torch.randn(9, 2, D) - torch.tensor([0.0, 3.0 * (step < 3)])  # Code 1 gets none first.
        nearest = (v.reshape(-1, 1, D) - c.vectors).norm(dim=-1).argmin(-1)
        one_hot = torch.nn.functional.one_hot(nearest, K).double()
        new = one_hot.sum(0)
        counts = decay * counts + (1 - decay) * new
        sums = decay * sums + (1 - decay) * one_hot.T @ v.reshape(-1, D)
        before = c.vectors.clone()
        c.update(v)
        expected = torch.where(new[:, None] > 0, sums / counts[:, None], before)
        close(c.vectors, expected)
        close(c.running_counts, counts)
        if step == 0:
            assert torch.equal(c.vectors[1], start[1])  # Nothing came: it stays.
    assert not torch.equal(c.vectors[1], start[1])


def blobs() -> torch.Tensor:
    centers = torch.tensor([[0.0, 3.0], [3.0, -2.0], [-3.0, -1.0], [0.0, -1.0]])
    return (centers + 1.2 * torch.randn(50, 4, 2)).reshape(-1, 2)


def test_without_memory_it_is_lloyd_s_algorithm() -> None:
    x, c = blobs(), Codebook(4, 2, decay=0.0)
    start = x[:4].clone()
    for num_steps in (1, 3, 100):
        c.vectors.copy_(start)
        for _ in range(num_steps):
            c.update(x)
        k_means = KMeans(4, init=start.numpy(), n_init=1, max_iter=100, tol=0, algorithm="lloyd")
        if num_steps == 100:
            close(c.vectors, torch.as_tensor(k_means.fit(x.numpy()).cluster_centers_))
        else:
            lloyd = start.clone()
            for _ in range(num_steps):
                nearest = torch.cdist(x, lloyd).argmin(-1)
                lloyd = torch.stack([x[nearest == k].mean(0) for k in range(4)])
            close(c.vectors, lloyd)


def test_moving_averages_end_at_the_centroids() -> None:
    x, c = blobs(), Codebook(4, 2, decay=0.9)
    c.vectors.copy_(x[:4])
    for _ in range(400):
        c.update(x)
    nearest = c.nearest(x)
    close(c.vectors, torch.stack([x[nearest == k].mean(0) for k in range(4)]))
    k_means = KMeans(4, init=c.vectors.numpy(), n_init=1, tol=0).fit(x.numpy())
    assert k_means.n_iter_ <= 2
    close(c.running_counts, torch.bincount(nearest).double())


def test_dead_codes_are_put_at_vectors_of_the_batch() -> None:
    c = Codebook(5, 2, decay=0.9, revive_below=0.2)
    c.vectors.copy_(torch.tensor([[0.0, 0.0], [5.0, 5.0], [90.0, 0.0], [0.0, 90.0], [90.0, 90.0]]))
    x = torch.randn(40, 2) + 5.0 * (torch.arange(40) % 2)[:, None]
    assert c.nearest(x).unique().tolist() == [0, 1]
    plain = Codebook(5, 2, decay=0.9)
    plain.load_state_dict(c.state_dict())
    for part in (c, plain):
        part.update(x)
    assert torch.equal(c.vectors[:2], plain.vectors[:2])
    assert not torch.equal(c.vectors[2:], plain.vectors[2:])
    rows = (c.vectors[2:].unsqueeze(1) == x).all(-1).nonzero()[:, 1]
    assert len(rows) == 3
    assert len(rows.unique()) == 3
    close(c.running_counts[2:], torch.full((3,), float(plain.running_counts.mean())))
    assert torch.equal(c.running_counts[:2], plain.running_counts[:2])


def test_a_code_is_given_up_once_its_average_use_is_too_small() -> None:
    c, x = Codebook(2, 1, decay=0.9, revive_below=0.2), torch.full((10, 1), 5.0)
    c.vectors.copy_(torch.tensor([[5.0], [90.0]]))
    c.running_counts.copy_(torch.tensor([5.0, 5.0]))
    for step in range(1, 40):
        c.update(x)
        of_second = 5 * 0.9**step  # Of 10 in all.
        if of_second < 0.2 * 10 / 2:
            break
        assert float(c.vectors[1]) == 90.0
    assert step == 16
    assert c.vectors.flatten().tolist() == [5.0, 5.0]


def test_more_dead_codes_than_vectors() -> None:
    """Each vector gets one code; the others wait."""
    c = Codebook(6, 2, decay=0.9, revive_below=0.5)
    before = c.vectors.clone()
    x = torch.tensor([[9.0, 9.0], [9.5, 9.0]])
    c.update(x)
    at_data = (torch.cdist(c.vectors, x) < 1).any(-1)
    assert int(at_data.sum()) == 3  # The code used, and two revived.
    assert torch.equal(c.vectors[~at_data], before[~at_data])
    for row in x:
        assert (c.vectors == row).all(-1).any()


def test_revival_draws_with_torch_s_generator() -> None:
    def revived(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        c, x = Codebook(8, 2, decay=0.9, revive_below=0.1), torch.randn(50, 2)
        torch.manual_seed(seed)
        c.update(x)
        return c.vectors

    assert torch.equal(revived(1), revived(1))
    assert not torch.equal(revived(1), revived(2))


def test_it_stays_in_eval_mode_without_vectors_and_without_a_decay() -> None:
    fixed = codebook(decay=0.9, revive_below=0.5).eval()
    empty = codebook(decay=0.9, revive_below=0.5)
    learnt = codebook()
    for c, x in (
        (fixed, torch.randn(9, D)),
        (empty, torch.zeros(0, D)),
        (learnt, torch.ones(1, D)),
    ):
        before = copy.deepcopy(c.state_dict())
        c.update(x)
        for name, value in c.state_dict().items():
            assert torch.equal(value, before[name])


def test_a_codebook_says_what_it_is() -> None:
    assert repr(Codebook(3, 2, decay=0.9, revive_below=0.1)) == (
        "Codebook(3, 2, decay=0.9, revive_below=0.1)"
    )
    assert repr(Codebook(3, 2)) == "Codebook(3, 2)"
    assert list(dict(Codebook(3, 2).named_parameters())) == ["vectors"]
    assert list(Codebook(3, 2, decay=0.9).state_dict()) == ["vectors", "running_counts"]
    assert not list(Codebook(3, 2, decay=0.9).parameters())


# The distributions.


def test_nearest_codes_are_exact_and_certain() -> None:
    c, encoded = codebook(), (30 * torch.randn(5, N, D)).requires_grad_()
    c.vectors.data.mul_(math.pi)
    fn = NearestCodes(c, encoded)
    nearest = c.nearest(encoded)
    for value in (fn.rsample(), fn.sample(), fn.mean):
        assert torch.equal(value.detach(), c.vectors.detach()[nearest])
        assert torch.equal(fn.log_prob(value), torch.zeros(5))
        assert torch.equal(fn.indices_of(value), nearest)
    assert not fn.sample().requires_grad
    assert fn.rsample((3, 2)).shape == (3, 2, 5, N, D)
    other = c.vectors.detach()[(nearest + (torch.arange(5) == 2)[:, None]) % K]
    assert fn.log_prob(other).tolist() == [0.0, 0.0, -math.inf, 0.0, 0.0]
    wide = fn.expand((7, 5))
    assert wide.rsample().shape == (7, 5, N, D)
    assert torch.equal(wide.log_prob(wide.rsample()), torch.zeros(7, 5))
    total = fn.log_prob(fn.enumerate_support()).logsumexp(0)
    close(total, torch.zeros(5))


def test_the_gradient_goes_straight_through() -> None:
    c, encoded = codebook(), torch.randn(5, N, D, requires_grad=True)
    weights = torch.randn(5, N, D)
    (NearestCodes(c, encoded).rsample() * weights).sum().backward()
    assert torch.equal(encoded.grad, weights)
    assert c.vectors.grad is None


def test_categorical_codes_by_hand() -> None:
    logits = torch.randn(5, N, K)
    fn = CategoricalCodes(codebook(), logits)
    indices = torch.randint(K, (7, 5, N))
    value = fn.codebook(indices).detach()
    expected = torch.distributions.Categorical(logits=logits).log_prob(indices).sum(-1)
    close(fn.log_prob(value), expected)
    close(fn.expand((2, 1, 5)).log_prob(value[0]), expected[0].expand(2, 1, 5))
    close(fn.log_prob(fn.enumerate_support()).logsumexp(0), torch.zeros(5))
    close(fn.log_prob(fn.enumerate_support(expand=False)).logsumexp(0), torch.zeros(5))
    assert fn.expand((6, 5)).sample((3,)).shape == (3, 6, 5, N, D)
    assert fn.support.is_discrete
    assert fn.support.check(value).all()
    assert not fn.support.check(value + torch.tensor([0.1, 0.0])).any()
    assert "3 codes of 2 numbers" in str(fn.support)


def frequencies_agree(fn: Any) -> None:
    num, values = 20_000, all_indices()
    numbers = fn.indices_of(fn.sample((num,))) @ K ** torch.arange(N - 1, -1, -1)
    found = torch.bincount(numbers, minlength=K**N) / num
    probs = fn.log_prob(fn.codebook(values).detach()).exp().detach()
    close(probs.sum(), torch.tensor(1.0))
    error = (probs * (1 - probs) / num).sqrt()
    # Of 81 numbers, some with an expectation far below one draw.
    assert ((found - probs).abs() < 5 * error + 1 / num).all()
    assert float(probs.max()) > 3 / K**N  # Far from uniform.


def test_draws_have_their_probabilities() -> None:
    frequencies_agree(CategoricalCodes(codebook(), torch.randn(N, K)))
    frequencies_agree(autoregressive())


def test_autoregressive_log_prob_by_the_chain_rule() -> None:
    """Logits of a position from the codes before it, all others set to the first code."""
    fn = autoregressive()
    indices = all_indices()
    total = torch.zeros(len(indices))
    for position in range(N):
        before = indices.clone()
        before[:, position:] = 0
        one_hot = torch.nn.functional.one_hot(before, K).double().flatten(-2)
        logits = fn.net(one_hot)[:, position]
        total += logits.log_softmax(-1).gather(-1, indices[:, position, None])[:, 0]
    close(fn.log_prob(fn.codebook(indices).detach()), total)
    assert fn.expand((5,)).log_prob(fn.codebook(indices[0]).detach()).shape == (5,)
    assert fn.expand((5,)).sample((7,)).shape == (7, 5, N, D)


def test_enumeration_lists_every_value_once() -> None:
    fn = UniformCodePrior(codebook(), N)._distribution()
    support = fn.enumerate_support()
    assert support.shape == (K**N, N, D)
    assert len(support.flatten(1).unique(dim=0)) == K**N
    close(fn.log_prob(support), torch.full((K**N,), -N * math.log(K)))


# Errors.


def test_arguments_of_a_codebook() -> None:
    with pytest.raises(ValueError, match=r"expected num_codes >= 1, got 0"):
        Codebook(0, 2)
    with pytest.raises(TypeError, match=r"expected an integer code_dim, got float"):
        Codebook(2, 2.0)  # type: ignore[arg-type]
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"expected decay in \[0, 1\), got .* decay=0.99"):
            Codebook(2, 2, decay=decay)
    with pytest.raises(ValueError, match=r"expected revive_below in \[0, 1\), got 1.5"):
        Codebook(2, 2, decay=0.9, revive_below=1.5)
    with pytest.raises(
        ValueError, match=r"expected a decay with revive_below, got .*=0.1 and none"
    ):
        Codebook(2, 2, revive_below=0.1)


def test_indices_and_vectors_that_are_none() -> None:
    c = codebook()
    for indices in (torch.tensor([0, 3]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"expected indices in 0 ... 2, got values in \["):
            c(indices)
    for wrong in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"expected integer indices, got torch"):
            c(wrong)
    assert c(torch.zeros(0, dtype=torch.long)).shape == (0, D)
    for shape in ((), (4, D + 1)):
        with pytest.raises(ValueError, match=r"expected vectors of length 2 in the last dimension"):
            c.nearest(torch.zeros(shape))
    value = c(torch.tensor([0, 1, 2])).detach()
    value[1] += 0.1
    for bad in (value, torch.full((3, D), math.nan)):
        num = 1 if bad is value else 3
        match = rf"Codebook.locate: expected .* of 3 codes, got {num} of 3 that are none of them"
        with pytest.raises(ValueError, match=match):
            c.locate(bad)


def test_values_outside_the_codebook() -> None:
    c = codebook()
    fns = [
        CategoricalCodes(c, torch.zeros(N, K)),
        autoregressive(),
        NearestCodes(c, torch.zeros(N, D)),
    ]
    for fn in fns:
        value = torch.zeros(N, D)
        with pytest.raises(ValueError, match=rf"{type(fn).__name__}: .* codebook of 3 codes"):
            fn.log_prob(value)
        with pytest.raises(ValueError, match=r"expected values of 4 codes of 2 numbers"):
            fn.log_prob(torch.zeros(N + 1, D))
        unchecked = copy.copy(fn)
        unchecked._validate_args = False
        assert unchecked.log_prob(value).item() == -math.inf
        value = c(c.nearest(value)).detach()
        value[2] += 0.1  # A single one.
        assert unchecked.log_prob(value).item() == -math.inf
        assert not fn.support.check(value)
    big = CategoricalCodes(Codebook(32, 2), torch.zeros(5, 32))
    with pytest.raises(ValueError, match=r"expected at most 1048576 values .* got 32\^5"):
        big.enumerate_support()
    with pytest.raises(ValueError, match="Expected parameter encoded"):
        NearestCodes(c, torch.full((N, D), math.nan))


PRIORS = [
    lambda c, n: UniformCodePrior(c, n),
    lambda c, n: AutoregressiveCodePrior(c, n, [8]),
]


@pytest.mark.parametrize("make", PRIORS)
def test_priors_sample_codes_side_by_side(make: Any) -> None:
    c = codebook()
    prior = make(c, N)
    with pyro.plate("particles", 3, dim=-2), pyro.plate("rows", 5, dim=-1):
        trace = poutine.trace(prior).get_trace()
    site = trace.nodes["z"]
    assert site["value"].shape == (3, 5, N, D)
    assert torch.equal(trace.nodes["_RETURN"]["value"], site["value"].flatten(-2))
    c.locate(site["value"])
    trace.compute_log_prob()
    assert site["log_prob"].shape == (3, 5)


@pytest.mark.parametrize("make", PRIORS)
def test_priors_refuse_what_is_no_codebook_and_values_that_are_no_codes(make: Any) -> None:
    with pytest.raises(TypeError, match=r"CodePrior: expected a Codebook, got Embedding"):
        make(torch.nn.Embedding(3, 2), N)
    with pytest.raises(ValueError, match=r"expected num_positions >= 1, got 0"):
        make(codebook(), 0)
    prior = poutine.condition(make(codebook(), N), data={"z": torch.zeros(5, N, D)})
    match = r"CodePrior, site 'z': expected vectors of a codebook .* got 20 of 20"
    with pytest.raises(ValueError, match=match), pyro.plate("rows", 5):
        prior()


def test_another_site_and_a_hidden_layer_that_is_too_narrow() -> None:
    with pyro.plate("rows", 2):
        assert "code" in poutine.trace(UniformCodePrior(codebook(), 1, site="code")).get_trace()
        prior = AutoregressiveCodePrior(codebook(), 1, [], site="code")
        assert "code" in poutine.trace(prior).get_trace()
    with pytest.raises(ValueError, match="hidden >= 3"):
        AutoregressiveCodePrior(codebook(), N, [2])
