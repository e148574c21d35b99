"""An amortized guide for any model, made from what the model's own runs show."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from torch import nn

from pyro_vae.feature_checks import check_features, check_rows, form_of, refuse_empty
from pyro_vae.inversion import faithful_inverse, model_parents
from pyro_vae.isolation import same_random_numbers_again, without_side_effects
from pyro_vae.program import Program
from pyro_vae.site_heads import SiteHead, rows_of, to_support
from pyro_vae.structure import DataPlate, ModelStructure, Reading, read_structure
from pyro_vae.structure_checks import check_same_structure

__all__ = ["AmortizedAutoGuide"]

_WHERE = "AmortizedAutoGuide"
_MAX_FORMS = 100  # Arguments of ever new forms are not worth a memory.


class AmortizedAutoGuide(Program):
    r"""An amortized posterior for the local latents of any model, found by running the model.

    Local are the latents inside the plate over the data. Each has a head, an ``MLP`` from the
    encoder's features of a row, and from the latents it depends on, to a normal distribution over
    the reals, which ``biject_to(support)`` carries into the site's support (for simplices, the
    softmax with a last logit of zero). With h_n the features of row n and ``pa`` the parents of a
    site in the guide

    .. math:: q(z \mid x) = \prod_n \prod_i q(z_{in} \mid h_n, z_{pa(i),n})

    - ``"mean-field"``: no parents; sites run in the model's order.
    - ``"inverse"``: the parents that variable elimination gives (Webb et al. 2018), so that the
      guide asserts no independence between sites which the posterior lacks. Values of one site
      side by side in further plates of a row are independent given its parents, in both
      structures; ``full_covariance`` is of one value. From z3 -> z2 -> z1 -> x it makes
      q(z1 | x) q(z2 | z1, x) q(z3 | z2, x); from a state-space model, a smoother that runs
      backwards. It samples against the model's order: ``TraceMeanField_ELBO`` is not valid.

    Latents outside the data plate get one of Pyro's autoguides, and are sampled first. (With those
    that have a bounded support ``TraceMeanField_ELBO`` is not valid either: of the point masses
    in Pyro's autoguides it leaves out the density.) Discrete latents marked for parallel
    enumeration are left to ``TraceEnum_ELBO``, others are refused. Masks around local latents are
    the model's, for which it is run once more at every call. Scales are not: ``scale_kl`` and
    ``poutine.scale`` go around model and guide.

    The heads are made at the first call, in the dtype and on the device of the features, or from
    ``example``. The model's sites, shapes, supports and plates have to be the same at every call,
    but for the rows of the data plate. They are read again, in one run of the model, when the
    arguments change shape, or a single number among them its value (of a schedule, at every
    call); that a support changes with larger tensors or parameters shows only in the densities.
    The model is run in eval mode, without gradients, and random numbers are put back.

    Args:
        model: Any callable with Pyro statements.
        encoder: Called with the guide's arguments, it returns features, ``(batch, width)``.
        structure: See above.
        hidden: Widths of the hidden layers of each head; empty for linear heads, which contain
            the exact posterior of a linear-Gaussian model.
        full_covariance: Whether a site's normal has a full covariance instead of a diagonal one.
        global_guide: Makes the guide of the latents outside the data plate from a model: one of
            Pyro's classes of autoguides, or a function that calls it.
        plate: Name of the plate over the data, where several may be it.
        example: Positional arguments to make the heads from at once, as is needed for
            ``load_state_dict`` and for optimizers of torch.
        name: Name in the param store.

    Returns (when called): values by site, ``(*sample, *plates, *event)``.

    Attributes:
        encoder: As given.
        heads: One for each site in ``parents``, in that order.
        global_guide: The autoguide of the latents outside the data plate, if there are any.
        parents: Parents in the guide by local site, in the order of sampling.

    Raises:
        TypeError: If ``encoder`` is no module or returns no tensor of floats, or ``global_guide``
            makes no autoguide.
        ValueError: If ``structure`` is unknown; when heads are made, if the model has no latents,
            no data, or no single plate around them; a latent is discrete and not enumerated, a
            point mass or an angle, or has a support that moves, differs between rows, is claimed
            wider than it is, or is not known to torch; sites hang on random values; later, if the
            model has changed its structure, or the features are not finite or not one row for
            each row of the data.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae.nets import MLP
        >>> def model(counts):
        ...     with pyro.plate("texts", len(counts)):
        ...         length = pyro.sample("length", dist.LogNormal(torch.tensor(3.0), 1.0))
        ...         topics = pyro.sample("topics", dist.Dirichlet(torch.ones(3)))
        ...         rates = length[..., None] * topics @ torch.eye(3, 5)
        ...         pyro.sample("counts", dist.Poisson(rates + 0.1).to_event(1), obs=counts)
        >>> guide = AmortizedAutoGuide(model, MLP(5, [16], 8), structure="inverse")
        >>> {site: tuple(value.shape) for site, value in guide(torch.ones(7, 5)).items()}
        {'topics': (7, 3), 'length': (7,)}
        >>> guide.parents
        {'topics': (), 'length': ('topics',)}

    References:
        Webb et al. (2018), Faithful inversion of generative models for effective amortized
        inference, https://arxiv.org/abs/1712.00287; Kucukelbir et al. (2017), Automatic
        differentiation variational inference, section 2, https://arxiv.org/abs/1603.00788
    """

    heads: nn.ModuleList
    global_guide: AutoGuide | None
    parents: dict[str, tuple[str, ...]]

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        *,
        structure: Literal["mean-field", "inverse"] = "mean-field",
        hidden: Sequence[int] = (),
        full_covariance: bool = False,
        global_guide: Callable[[Any], AutoGuide] = AutoNormal,
        plate: str | None = None,
        example: tuple[Any, ...] | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise TypeError(
                f"{_WHERE}: expected an encoder that is a module, got {type(encoder).__name__}. "
                "Pass an nn.Module that returns features (batch, width)."
            )
        if structure not in ("mean-field", "inverse"):
            raise ValueError(
                f"{_WHERE}: expected structure 'mean-field' or 'inverse', got {structure!r}. "
                "Pass structure='inverse' for dependent latents."
            )
        if example is not None and not isinstance(example, tuple):
            raise TypeError(
                f"{_WHERE}: expected example to be a tuple of arguments, got "
                f"{type(example).__name__}. Pass example=(x,)."
            )
        super().__init__(name)
        self._model = (model,)  # In a tuple: the parameters stay the model's alone.
        self.encoder = encoder
        self._inverse = structure == "inverse"
        self._hidden, self._full_covariance = tuple(hidden), full_covariance
        self._make_global, self._plate = global_guide, plate
        self.structure: ModelStructure | None = None
        self._data: dict[Hashable, DataPlate] = {}  # By form of the arguments.
        self._width: int | None = None
        self.heads, self.global_guide, self.parents = nn.ModuleList(), None, {}
        if example is not None:
            with poutine.block(), without_side_effects(model, encoder):
                features = self._features(example, {})
                self._set_up(features, example, {})

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Samples all latents that the guide stands for: values by site."""
        features = self._features(args, kwargs)
        if self.structure is None:
            self._set_up(features, args, kwargs)
        structure = self.structure
        assert structure is not None
        data = self._data_plate(features, args, kwargs)
        values: dict[str, torch.Tensor] = {}
        plates: dict[str, Any] = {}
        if self.global_guide is not None:
            values |= self.global_guide(*args, **kwargs)
            plates |= self.global_guide.plates
        features, rows, plates[data.name] = self._enter(features, data)
        masks = self._masks(rows, args, kwargs)
        for head, (name, parents) in zip(self.heads, self.parents.items(), strict=True):
            inputs = [features]
            for parent in parents:
                site = structure.shared.get(parent) or structure.local[parent]
                real = to_support(site.support).inv(values[parent])
                event_dim = len(site.unconstrained_shape)
                dim = None if parent in structure.shared else data.dim
                inputs.append(rows_of(real, event_dim, structure.nesting, dim))
            values[name] = self._sample(name, head(inputs), plates, masks.get(name))
        return values

    def _sample(
        self, name: str, fn: Any, plates: dict[str, Any], mask: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.structure is not None
        with ExitStack() as stack:
            if mask is not None:
                hide: Any = poutine.mask(mask=mask)  # type: ignore[call-overload]
                stack.enter_context(hide)
            for plate in sorted(self.structure.local[name].plates, key=lambda p: p.dim):
                if plate.name not in plates:
                    plates[plate.name] = pyro.plate(plate.name, plate.size, dim=plate.dim)
                stack.enter_context(plates[plate.name])
            value: torch.Tensor = pyro.sample(name, fn)
        return value

    def _enter(
        self, features: torch.Tensor, data: DataPlate
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """The data plate, the features of its rows, and which rows they are, where it draws."""
        size, device = len(features), str(features.device)
        if data.rows == "all":
            return features, None, pyro.plate(data.name, size, dim=data.dim, device=device)
        if data.rows == "given":
            # Hidden, because a model that is replayed would take its rows from this plate.
            rows = torch.arange(size, device=device)
            with poutine.block(hide=[data.name]):
                plate = pyro.plate(data.name, data.full_size, subsample=rows, dim=data.dim)
            return features, None, plate
        plate = pyro.plate(
            data.name,
            data.full_size,
            subsample_size=data.size,
            dim=data.dim,
            device=device,
        )
        rows = plate.indices
        return features if size == data.size else features[rows.to(device)], rows, plate

    def _masks(
        self, rows: torch.Tensor | None, args: Any, kwargs: Any
    ) -> Mapping[str, torch.Tensor]:
        """The model's masks around local latents, which depend on the arguments."""
        assert self.structure is not None
        if not any(site.masked for site in self.structure.local.values()):
            return {}
        return self._read(args, kwargs, rows=rows, num_runs=1).masks

    def _read(self, args: Any, kwargs: Any, **how: Any) -> Reading:
        known = self.structure
        plate = known.data.name if known else self._plate
        reading = read_structure(self._model[0], args, kwargs, where=_WHERE, plate=plate, **how)
        if known is not None:
            check_same_structure(known, reading.structure, _WHERE, among="arguments")
        return reading

    def _set_up(self, features: torch.Tensor, args: Any, kwargs: Any) -> None:
        """Reads the model and makes the heads, in the dtype and on the device of the features."""
        reading = self._read(args, kwargs)
        structure, model = reading.structure, self._model[0]
        check_rows(_WHERE, features, structure.data)
        parents: dict[str, tuple[str, ...]] = {name: () for name in structure.local}
        with poutine.block(), without_side_effects(model):
            if self._inverse:
                with same_random_numbers_again():
                    above = model_parents(reading)
                parents = faithful_inverse(
                    above,
                    list(structure.local),
                    summed_out=structure.enumerated,
                    given=list(structure.shared),
                    repeated={n: len(site.plates) - 1 for n, site in structure.local.items()},
                )
            if structure.shared:
                self._set_up_global(list(structure.shared), args, kwargs)
        sites = structure.local | structure.shared
        heads = [
            SiteHead(
                sites[name],
                [sites[parent] for parent in above_it],
                structure,
                features.shape[-1],
                hidden=self._hidden,
                full_covariance=self._full_covariance,
            )
            for name, above_it in parents.items()
        ]
        self.heads = nn.ModuleList(heads).to(features.device, features.dtype)
        self.parents, self.structure = parents, structure
        self._data = {form_of(args, kwargs, features): structure.data}
        self._width = features.shape[1]

    def _set_up_global(self, names: list[str], args: Any, kwargs: Any) -> None:
        made = self._make_global(poutine.block(self._model[0], expose=names))
        if not isinstance(made, AutoGuide):
            raise TypeError(
                f"{_WHERE}: expected global_guide to make one of Pyro's autoguides, got "
                f"{type(made).__name__}. Pass pyro.infer.autoguide.AutoNormal, for instance."
            )
        self.global_guide = made  # First of all, for a name of its own in the param store.
        made(*args, **kwargs)

    def _data_plate(self, features: torch.Tensor, args: Any, kwargs: Any) -> DataPlate:
        """The data plate for these arguments."""
        form = form_of(args, kwargs, features)
        if form not in self._data:
            if len(self._data) > _MAX_FORMS:
                self._data.clear()
            self._data[form] = self._read(args, kwargs, num_runs=1).structure.data
        check_rows(_WHERE, features, self._data[form])
        return self._data[form]

    def _features(self, args: Any, kwargs: Any) -> torch.Tensor:
        refuse_empty(_WHERE, self._model[0], args, kwargs)
        features = self.encoder(*args, **kwargs)
        check_features(_WHERE, features, self._width)
        result: torch.Tensor = features
        return result

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        parts = (f"{prefix}heads.", f"{prefix}global_guide.")
        if self.structure is None and any(key.startswith(parts) for key in state_dict):
            raise ValueError(
                f"{_WHERE}: expected a guide whose heads are made, got one that has not seen data "
                "yet. Pass example=(x,) to its constructor, or call it once before "
                "load_state_dict."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
