"""Several views of one normal latent, x_m = loc_m + W_m z + noise_m, in closed form."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.baselines._multimodal_checks import check_parameters
from pyro_vae.baselines._whitened import Whitened
from pyro_vae.baselines.linear_gaussian import marginal, posterior_factors
from pyro_vae.checks import check_at_least, check_data
from pyro_vae.modalities import Batch, Present, check_names, check_row_mask, observed_of

__all__ = ["MultimodalLinearGaussian"]

_WHERE = "MultimodalLinearGaussian"


@dataclass(frozen=True, eq=False)
class MultimodalLinearGaussian:
    r"""z ~ N(0, I) and x_m ~ N(loc_m + W_m z, noise_m) for each modality m, answered exactly.

    Every row has its own set of observed modalities. A modality is not observed if its key is
    missing from ``batch`` or its value is ``None``, and in the rows where ``present`` is false; the
    values there are never looked at and may be NaN. All answers are in the dtype and on the
    device of the parameters, and differentiable.

    Divided by a root of its noise, the modalities that a row observes are one linear-Gaussian
    model with unit noise. It is solved by the QR decomposition of
    :func:`~pyro_vae.baselines.linear_gaussian.posterior_factors`, once for each set of observed
    modalities that occurs. A conditional density takes p(z | given) for the prior of the rest. It
    is no difference of two log-likelihoods, so that small noise costs few digits.

    Args:
        loc: Mean of each modality, shape ``(D_m,)``.
        weight: Loadings W_m of each modality, shape ``(D_m, L)``, in the same dtype.
        noise_covariance: Covariance of each modality's noise, shape ``(D_m, D_m)``, or its diagonal
            if it has no other entries, shape ``(D_m,)``.

    Raises:
        ValueError: If the names or shapes do not fit together, or a covariance is not positive
            definite.

    Example:
        >>> model = MultimodalLinearGaussian(
        ...     loc={"image": torch.zeros(3), "label": torch.zeros(1)},
        ...     weight={"image": torch.ones(3, 1), "label": torch.ones(1, 1)},
        ...     noise_covariance={"image": torch.ones(3), "label": torch.ones(1)},
        ... )
        >>> batch = {"image": torch.ones(5, 3), "label": None}
        >>> model.predict(batch, "label")[0]
        tensor([0.7500])
        >>> model.log_prob(batch).shape
        torch.Size([5])

    References:
        Tipping and Bishop 1999, "Probabilistic principal component analysis", section 3, for one
        modality; Bach and Jordan 2005, "A probabilistic interpretation of canonical correlation
        analysis", for two with full noise covariances.
    """

    loc: Mapping[str, Tensor]
    weight: Mapping[str, Tensor]
    noise_covariance: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_parameters(self.loc, self.weight, self.noise_covariance)

    def log_prob(self, batch: Batch, present: Present | None = None) -> Tensor:
        """Compute the exact log-likelihood of what each row observes.

        Args:
            batch: Values of shape ``(batch, D_m)`` by modality.
            present: Booleans of shape ``(batch,)`` by modality, observed everywhere by default.

        Returns:
            Shape ``(batch,)``, nats; 0 where nothing is observed.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a name is unknown, a shape does not fit or an observed value is not
                finite.
        """
        return self.conditional_log_prob(batch, (), present)

    def conditional_log_prob(
        self,
        batch: Batch,
        given: Collection[str] | Mapping[str, Tensor],
        present: Present | None = None,
    ) -> Tensor:
        """Compute log p(rest | given) of each row, over the modalities that it observes.

        Args:
            batch: Values of shape ``(batch, D_m)`` by modality.
            given: Names of the modalities to condition on, or booleans of shape ``(batch,)`` by
                modality. In a row that does not observe them there is nothing to condition on.
            present: Booleans of shape ``(batch,)`` by modality, observed everywhere by default.

        Returns:
            Shape ``(batch,)``, nats; 0 where nothing else is observed.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: As :meth:`log_prob`.
        """
        values, observed = self._read(batch, present)
        whitened = self._whitened(values)
        num_rows = len(next(iter(observed.values())))
        conditioned = self._given(given, num_rows)
        known = {name: seen & conditioned[name] for name, seen in observed.items()}
        rest = {name: seen & ~conditioned[name] for name, seen in observed.items()}
        result = self._like.new_zeros(num_rows)
        patterns, index = _patterns([*known.values(), *rest.values()])
        for number, pattern in enumerate(patterns):
            names_known = _chosen(known, pattern[: len(known)])
            names_rest = _chosen(rest, pattern[len(known) :])
            if not names_rest:
                continue
            rows = (index == number).nonzero().flatten()
            mean, scale_tril = self._latent([whitened[n] for n in names_known], rows)
            weight, residual, log_det = self._joined([whitened[n] for n in names_rest], rows)
            # z = mean + scale_tril u with u ~ N(0, I): the prior of the rest.
            unit = weight.new_ones(len(weight))
            rest_given_known = marginal(unit - unit, weight @ scale_tril, unit)
            result[rows] = rest_given_known.log_prob(residual - mean @ weight.mT) - log_det
        return result

    def posterior(self, batch: Batch, present: Present | None = None) -> MultivariateNormal:
        """Return the exact posterior of the latents given what each row observes.

        Args:
            batch: Values of shape ``(batch, D_m)`` by modality.
            present: Booleans of shape ``(batch,)`` by modality, observed everywhere by default.

        Returns:
            Normal with batch shape ``(batch,)`` and event shape ``(L,)``; N(0, I) where nothing is
            observed.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: As :meth:`log_prob`.
        """
        values, observed = self._read(batch, present)
        whitened = self._whitened(values)
        patterns, index = _patterns(observed.values())
        loc, scale_trils = self._like.new_zeros(len(index), self._like.shape[1]), []
        for number, pattern in enumerate(patterns):
            rows = (index == number).nonzero().flatten()
            seen = [whitened[name] for name in _chosen(observed, pattern)]
            loc[rows], scale_tril = self._latent(seen, rows)
            scale_trils.append(scale_tril)
        # Rows of one pattern share their matrix, in memory as well.
        shared = scale_trils[0] if len(patterns) == 1 else torch.stack(scale_trils)[index]
        return MultivariateNormal(loc, scale_tril=shared)

    def predict(
        self,
        batch: Batch,
        name: str,
        present: Present | None = None,
    ) -> Tensor:
        """Return loc_m + W_m E[z | observed], the mean of a new x_m given what a row observes.

        It is E[x_m | observed] in a row that does not observe m, and the reconstruction of x_m,
        without its noise, in one that does.

        Args:
            batch: Values of shape ``(batch, D_m)`` by modality.
            name: The modality m to predict.
            present: Booleans of shape ``(batch,)`` by modality, observed everywhere by default.

        Returns:
            Shape ``(batch, D_m)``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: As :meth:`log_prob`.
        """
        check_names(_WHERE, "name", [name], self.loc)
        return self.loc[name] + self.posterior(batch, present).mean @ self.weight[name].mT

    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draw new data.

        Args:
            num_samples: Number of rows n.

        Returns:
            Shape ``(n, D_m)`` by modality.

        Raises:
            TypeError: If ``num_samples`` is no integer.
            ValueError: If it is below 1.
        """
        check_at_least(f"{_WHERE}.sample", "num_samples", num_samples, 1)
        like = self._like
        z = torch.randn(num_samples, like.shape[1], dtype=like.dtype, device=like.device)
        samples = {}
        for name, loc in self.loc.items():
            noise = self.noise_covariance[name]
            root = noise.sqrt().diag() if noise.ndim == 1 else torch.linalg.cholesky(noise)
            draws = torch.randn(num_samples, len(loc), dtype=loc.dtype, device=loc.device)
            samples[name] = (loc + z @ self.weight[name].mT + draws @ root.mT).detach()
        return samples

    @property
    def _like(self) -> Tensor:
        """A parameter ``(D_m, L)``, for dtype, device and L."""
        return next(iter(self.weight.values()))

    def _whitened(self, values: Mapping[str, Tensor]) -> dict[str, Whitened]:
        """The modalities that have values, each in units of its noise."""
        return {
            name: Whitened.of(value, self.loc[name], self.weight[name], self.noise_covariance[name])
            for name, value in values.items()
        }

    def _latent(self, seen: list[Whitened], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(rows, L)`` and lower triangular root ``(L, L)`` of p(z | what is seen)."""
        weight, residual, _ = self._joined(seen, rows)
        gain, scale_tril = posterior_factors(weight, weight.new_ones(len(weight)))
        return residual @ gain.mT, scale_tril

    def _joined(self, parts: list[Whitened], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loadings ``(D, L)`` and residuals ``(rows, D)`` in units of the noise, side by side.

        Third the logarithm of the determinant of those units, 0-d.
        """
        weights, residuals = [self._like[:0]], [self._like.new_empty(len(rows), 0)]
        log_det = self._like.new_zeros(())
        for part in parts:
            weights.append(part.weight)
            residuals.append(part.residual(rows))
            log_det = log_det + part.log_det
        return torch.cat(weights), torch.cat(residuals, -1), log_det

    def _read(
        self, batch: Batch, present: Present | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The values given, and for each modality the rows ``(batch,)`` that observe it."""
        read = observed_of(_WHERE, self.loc, batch, present)
        values = {name: value.to(self._like) for name, value in read.values.items()}
        nowhere = torch.zeros(read.num_rows, dtype=torch.bool, device=self._like.device)
        observed = dict.fromkeys(self.loc, nowhere)
        for name, value in values.items():
            check_data(_WHERE, f"batch['{name}']", value, tuple(self.loc[name].shape))
            observed[name] = read.mask(name).to(nowhere.device)
            num_bad = int((~value[observed[name]].isfinite()).any(-1).sum())
            if num_bad:
                raise ValueError(
                    f"{_WHERE}: expected finite values of modality '{name}' where it is observed, "
                    f"got NaN or infinity in {num_bad} rows. Set present['{name}'] to False there."
                )
        return values, observed

    def _given(
        self, given: Collection[str] | Mapping[str, Tensor], num_rows: int
    ) -> dict[str, Tensor]:
        """What to condition on where it is observed: booleans ``(batch,)`` by modality."""
        if isinstance(given, str) or not isinstance(given, Collection):
            raise TypeError(
                f"{_WHERE}: expected given to be a collection of names or a mapping from names to "
                f"masks, got {type(given).__name__}. Pass ['{next(iter(self.loc))}'] for one name."
            )
        check_names(_WHERE, "given", given, self.loc)
        masks = {}
        for name in self.loc:
            mask = torch.full((num_rows,), name in given, device=self._like.device)
            if isinstance(given, Mapping) and name in given:
                check_row_mask(_WHERE, f"given['{name}']", given[name])
                if len(given[name]) != num_rows:
                    raise ValueError(
                        f"{_WHERE}: expected given['{name}'] of shape ({num_rows},), one entry per "
                        f"row, got {tuple(given[name].shape)}. Pass a list of names to condition "
                        "in all rows."
                    )
                mask = given[name].to(mask.device)
            masks[name] = mask
        return masks


def _patterns(masks: Iterable[Tensor]) -> tuple[list[list[bool]], Tensor]:
    """The distinct rows of masks side by side, and for each row the number of its pattern."""
    table = torch.stack(list(masks), -1)
    patterns, index = table.unique(dim=0, return_inverse=True)
    return patterns.tolist(), index


def _chosen(masks: Mapping[str, Tensor], pattern: list[bool]) -> list[str]:
    return [name for name, chosen in zip(masks, pattern, strict=True) if chosen]
