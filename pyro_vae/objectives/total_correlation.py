"""beta-TCVAE: the KL in three parts, each with a weight of its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from pyro_vae.checks import check_at_least
from pyro_vae.densities import log_prob_anywhere, unwrapped
from pyro_vae.objectives.code_objective import (
    CodeObjective,
    Codes,
    require_fixed_by_data,
    rows,
)
from pyro_vae.objectives.objective import check_weight
from pyro_vae.runs import Run
from pyro_vae.schedules import Weight
from pyro_vae.terms import Terms, terms_of
from pyro_vae.traces import Plate, Site, is_point_mass, site_log_prob

__all__ = ["TraceTotalCorrelation_ELBO"]

ESTIMATORS = ("weighted", "stratified")


class TraceTotalCorrelation_ELBO(CodeObjective):
    r"""The ELBO, its KL divided into mutual information, total correlation and the rest.

    With :math:`q(z) = \frac{1}{N} \sum_n q(z \mid x_n)` the training loss is, per datum,

    .. math::
        - E \log p(x \mid z)
        + \alpha \, E \log \frac{q(z \mid x)}{q(z)}
        + \beta \, E \log \frac{q(z)}{\prod_j q_j(z_j)}
        + \gamma \, E \log \frac{\prod_j q_j(z_j)}{p(z)}

    All three expectations are those of the samples. :math:`\alpha = \beta = \gamma = 1` is
    exactly the ELBO of the samples (``Trace_ELBO``), which is also the reported bound. A
    ``scale_kl`` multiplies all three parts.

    For a code z_i of a batch of M rows, q(z_i) and q_j(z_ij) are estimated from the batch:

    - ``"weighted"``: :math:`\frac{1}{NM} \sum_{m=1}^M q(z_i \mid x_m)`, the paper's
      minibatch-weighted sampling. Biased, and not the exact sum even if the batch is all data.
    - ``"stratified"``: :math:`\frac{1}{N} q(z_i \mid x_i) + \frac{N-1}{N (M-1)}
      \sum_{m \ne i} q(z_i \mid x_m)`, unbiased over minibatches and exact if the batch is all
      data. The logarithms are biased nevertheless.

    Rows with weights (``poutine.scale`` around all observed sites) count in q(z) accordingly.

    Args:
        num_data: N, the number of training data. A batch does not tell it.
        alpha: Weight of the mutual information; like the others a number, a 0-d tensor or a
            schedule.
        beta: Weight of the total correlation.
        gamma: Weight of the dimension-wise KL.
        estimator: See above.
        sites: Latents that make up the code; all in the data plate by default. The others
            contribute their KL as it is.
        num_particles: Samples from the guide.
        vectorize_particles: Whether to run them at once in an outermost plate; by default
            wherever that gives the numbers of single runs.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.

    Raises:
        TypeError: If ``num_data`` is missing.
        ValueError: While running, if there is not one plate over the data, if it or the batch
            contradict ``num_data``, if a batch of one row is to be stratified, or if a latent
            has no reparameterised samples, no density that factorises over its elements, or one
            that depends on another latent.

    Example:
        >>> from pyro_vae.guides import AmortizedNormal
        >>> from pyro_vae.models import LinearGaussian
        >>> from pyro_vae.nets import MLP
        >>> model, guide = LinearGaussian(5, 2), AmortizedNormal(MLP(5, [], 4))
        >>> elbo = TraceTotalCorrelation_ELBO(num_data=1000, beta=6.0)
        >>> elbo.training_loss(model, guide, torch.randn(7, 5)).shape
        torch.Size([])

    References:
        Chen et al. (2018), Isolating sources of disentanglement in variational autoencoders,
        equations 2 and 4, section 4.1 and appendix C, https://arxiv.org/abs/1802.04942. Their
        stratified estimator lets one other row, chosen beforehand, stand for the remainder with
        its larger weight; ours is the average over that choice, which has the same expectation
        and less variance. The authors' code gives 1/N to the first column instead of the own
        row of each code.
    """

    def __init__(
        self,
        num_data: int | None = None,
        alpha: Weight = 1.0,
        beta: Weight = 1.0,
        gamma: Weight = 1.0,
        *,
        estimator: Literal["weighted", "stratified"] = "weighted",
        sites: Sequence[str] | None = None,
        num_particles: int = 1,
        vectorize_particles: bool | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            sites=sites,
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        where = type(self).__name__
        if num_data is None:
            raise TypeError(
                f"{where}: expected num_data, the number of training data, got None. Pass "
                "num_data=len(train): q(z) averages over all data, and a batch does not tell how "
                "many there are."
            )
        check_at_least(where, "num_data", num_data, 1)
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"{where}: expected estimator in {list(ESTIMATORS)}, got {estimator!r}. "
                "'stratified' is unbiased for q(z)."
            )
        self.num_data, self.estimator = num_data, estimator
        self.alpha = check_weight(where, "alpha", alpha)
        self.beta = check_weight(where, "beta", beta)
        self.gamma = check_weight(where, "gamma", gamma)

    def _check_codes(self, codes: Codes, terms: Terms) -> None:
        where = type(self).__name__
        (run,) = codes.runs
        for name in codes.names:
            site: Site = run.guide_trace.nodes[name]
            fn = site["fn"]
            if is_point_mass(fn) or unwrapped(fn).event_shape:
                raise ValueError(
                    f"{where}: expected a guide with one density for every element of site "
                    f"'{name}', got {type(unwrapped(fn)).__name__}. Use independent elements, "
                    "such as Normal(loc, scale).to_event(1), or leave it out of sites."
                )
        fix = "Draw its distribution from the data alone, or leave it out of sites."
        require_fixed_by_data(codes, where, fix)
        first, *others = (_scale_rows(terms, codes, name) for name in codes.names)
        for name, scale in zip(codes.names[1:], others, strict=True):
            if not torch.allclose(first, scale):
                raise ValueError(
                    f"{where}: expected one scale for all latents that make up the code, got "
                    f"another at site '{name}' than at '{codes.names[0]}', and q(z) cannot be "
                    "divided between them. Scale them alike, or name some in sites."
                )

    def _terms(self, runs: list[Run]) -> Terms:
        terms = terms_of(runs)
        return _with_sampled_kl(terms, self._codes(runs, terms.scales))

    def _training_loss(self, runs: list[Run], terms: Terms, bound: torch.Tensor) -> torch.Tensor:
        codes = self._codes(runs, terms.scales)
        self._check_num_data(codes.plate)
        log_q_given_x, log_q, log_product = self._log_densities(codes)
        log_p = codes.collect(site_log_prob, "model", event=False).sum(2)
        # The bound has each of the three once.
        alpha, beta, gamma = (w.to(bound) for w in (self.alpha, self.beta, self.gamma))
        more = (alpha - 1) * (log_q_given_x - log_q)
        more = more + (beta - 1) * (log_q - log_product)
        more = more + (gamma - 1) * (log_product - log_p)
        return bound + codes.total(more * _scale_rows(terms, codes, codes.names[0]))

    def _check_num_data(self, plate: Plate) -> None:
        where, given = type(self).__name__, self.num_data
        if plate.full_size not in (plate.size, given):
            raise ValueError(
                f"{where}: expected num_data to be the full size {plate.full_size} of plate "
                f"'{plate.name}', got {given}. Give both the number of training data."
            )
        if plate.size > given:
            raise ValueError(
                f"{where}: expected a batch of at most num_data = {given} rows, got {plate.size}. "
                "Pass the number of training data as num_data."
            )
        if self.estimator == "stratified" and plate.size == 1 < given:
            raise ValueError(
                f"{where}: expected at least 2 rows for estimator='stratified', got a batch of 1: "
                "no other row stands for the rest of the data. Leave out a last batch of 1 "
                "(drop_last=True), or use estimator='weighted'."
            )

    def _log_densities(self, codes: Codes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log q(z | x), log q(z) and sum_j log q_j(z_j) of the codes: ``(num, batch)``, nats."""
        log_w = self._shares(codes).log()
        parts = []
        for run in codes.runs:
            each = _pairwise(run, codes)
            whole = each.sum(3)
            log_q = (whole + log_w).logsumexp(2)
            log_product = (each + log_w.unsqueeze(2)).logsumexp(2).sum(2)
            parts.append((whole.diagonal(dim1=1, dim2=2), log_q, log_product))
        given_x, log_q, log_product = (torch.cat(part) for part in zip(*parts, strict=True))
        return given_x, log_q, log_product

    def _shares(self, codes: Codes) -> torch.Tensor:
        """Weight of q(. | x_m) in q(z_i): ``(batch i, batch m)``."""
        share, kept = codes.shares, codes.weights > 0
        diagonal = torch.eye(len(share), dtype=torch.bool, device=share.device)
        weights = (share / self.num_data).expand(len(share), -1)
        if self.estimator == "stratified":
            own = share * kept.sum() / self.num_data
            # Summed over the others, as 1 - share is 0 for a row that stands alone.
            rest = share.expand(len(share), -1).masked_fill(diagonal, 0.0)
            rest = rest / rest.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
            weights = torch.where(diagonal, own, (1 - own).unsqueeze(1) * rest)
        # A row that is no datum has any finite density.
        return torch.where(kept.unsqueeze(1), weights, diagonal.to(share))


def _pairwise(run: Run, codes: Codes) -> torch.Tensor:
    """log q_j(z_ij | x_m) of every code i under every row m: ``(num, i, m, D)``, nats."""
    plate, parts = codes.plate, []
    for name in codes.names:
        site: Site = run.guide_trace.nodes[name]
        event_dim = site["fn"].event_dim
        dim = plate.dim - event_dim
        value = run.spread(site["value"], site, event_dim)
        # Codes in a new first dimension, the rows of the distribution where they are.
        log_prob = log_prob_anywhere(unwrapped(site["fn"]), value.movedim(dim, 0).unsqueeze(dim))
        log_prob = log_prob.expand(plate.size, *value.shape)
        flat = log_prob.unsqueeze(-1).movedim(dim - 1, 2).flatten(3)
        parts.append(flat.transpose(0, 1))
    return torch.cat(parts, 3)


def _with_sampled_kl(terms: Terms, codes: Codes) -> Terms:
    """The terms with log q - log p of the samples for the latents of the code."""

    def log_ratio(run: Run, name: str) -> torch.Tensor:
        of_guide: Site = run.guide_trace.nodes[name]
        of_model: Site = run.model_trace.nodes[name]
        ratio = run.spread(site_log_prob(of_guide), of_guide)
        return ratio - run.spread(site_log_prob(of_model), of_model)

    sampled = {
        name: replace(
            terms.kl[name], values=torch.cat([log_ratio(run, name) for run in codes.runs]).mean(0)
        )
        for name in codes.names
    }
    return replace(terms, kl={**terms.kl, **sampled})


def _scale_rows(terms: Terms, codes: Codes, name: str) -> torch.Tensor:
    """The scale of a latent, beside the weights of the data: ``(batch,)``."""
    run, scale = codes.runs[0], terms.kl[name].scale
    site: Site = run.model_trace.nodes[name]
    ones = torch.ones_like(codes.weights[:1]).reshape((1,) * run.nesting)
    return rows(run.spread(ones * scale, site), codes.plate)[0, :, 0]
