"""One update of all parameters, with the options and the state of the user's own optimizers."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import _load_state_dict, is_scheduler
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.sgd import sgd

__all__ = ["Update"]

Owned = tuple[torch.Tensor, Optimizer, dict[str, Any]]
"""A parameter, its optimizer, and its group of options there."""


class Update:
    """Steps the optimizers of some parameters at once.

    Pyro makes an optimizer for every parameter. Here parameters with equal options take one step
    together, fused where torch has a fused kernel for ``Adam``, ``AdamW`` and ``SGD``. Options
    are read from, and state is kept in, the user's optimizers: schedulers act on them, they can
    be saved, and plain SVI can go on from where this stopped.

    Args:
        optim: An optimizer of Pyro, which takes any parameters, or one of torch.
    """

    def __init__(self, optim: PyroOptim | Optimizer) -> None:
        self._optim = optim
        self._known: tuple[torch.Tensor, ...] = ()
        self._owned: list[Owned] = []
        self._clips: list[Callable[[torch.Tensor], None] | None] = []
        self._groups: list[dict[str, Any]] = []
        self._num_held = 0
        self._options: Any = None
        self._joint: list[Callable[[Sequence[torch.Tensor]], None]] = []

    def __call__(
        self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
    ) -> None:
        """Takes a step; where a torch optimizer has hooks, it takes it by itself."""
        if (
            len(parameters) != len(self._known)
            or any(a is not b for a, b in zip(parameters, self._known, strict=True))
            or self._has_new_owners()
        ):
            self._adopt(tuple(parameters))
            return self._step_of_owners(gradients)
        is_sparse = any(gradient.layout is not torch.strided for gradient in gradients)
        if is_sparse or any(self._clips) or self._has_hooks() or not self._is_ready():
            return self._step_of_owners(gradients)
        with torch.no_grad():
            for step in self._joint:
                step(gradients)
        return None

    def _adopt(self, parameters: tuple[torch.Tensor, ...]) -> None:
        self._known, self._joint, self._options = parameters, [], None
        self._owned, self._clips = [], []
        if isinstance(self._optim, Optimizer):
            groups = {id(p): g for g in self._optim.param_groups for p in g["params"]}
            self._owned = [(p, self._optim, groups[id(p)]) for p in parameters if id(p) in groups]
            self._num_held = _num_held(self._optim)
        else:
            for parameter in parameters:
                optimizer = _optimizer_of(self._optim, parameter)
                self._owned.append((parameter, optimizer, optimizer.param_groups[0]))
                self._clips.append(self._optim.grad_clip[parameter])
        self._groups = list({id(group): group for _, _, group in self._owned}.values())

    def _has_new_owners(self) -> bool:
        """Whether a parameter was added to a torch optimizer, or Pyro's were made anew."""
        if isinstance(self._optim, Optimizer):
            return self._num_held != _num_held(self._optim)
        now = (_without_scheduler(self._optim.optim_objs.get(p)) for p in self._known)
        return any(a is not b for a, (_, b, _) in zip(now, self._owned, strict=True))

    def _has_hooks(self) -> bool:
        if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            return True
        return any(
            optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
            for _, optimizer, _ in self._owned
        )

    def _is_ready(self) -> bool:
        """Whether the joint steps belong to the options and the state there are now."""
        options = [tuple(group.values()) for group in self._groups]
        # Others may do more in a step than move what they are given.
        if any(not type(o).__module__.startswith("torch.optim") for _, o, _ in self._owned):
            return False
        states = [
            (id(state := optimizer.state.get(p, {})), *map(id, state.values()))
            for p, optimizer, _ in self._owned
        ]
        if (options, states) != self._options:
            self._options, self._joint = (options, states), self._joint_steps()
        return bool(self._joint)

    def _joint_steps(self) -> list[Callable[[Sequence[torch.Tensor]], None]]:
        """One step for each set of equal options."""
        buckets: dict[Any, list[int]] = defaultdict(list)
        positions = {id(p): i for i, p in enumerate(self._known)}
        for parameter, optimizer, group in self._owned:
            options = tuple((k, _hashable(v)) for k, v in group.items() if k != "params")
            buckets[(type(optimizer), options)].append(positions[id(parameter)])
        by_position = {positions[id(owned[0])]: owned for owned in self._owned}
        steps = []
        for (kind, _), where in buckets.items():
            owned = [by_position[i] for i in where]
            make = _FUSED.get(kind)
            step = make(owned) if make is not None else None
            steps.append(_at(where, step if step is not None else _together(owned)))
        return steps

    def _step_of_owners(self, gradients: Sequence[torch.Tensor]) -> None:
        """Lets the optimizers themselves step, as Pyro does."""
        for parameter, gradient in zip(self._known, gradients, strict=True):
            parameter.grad = gradient
        try:
            if isinstance(self._optim, Optimizer):
                self._optim.step()
            else:
                self._optim(self._known)
        finally:
            for parameter in self._known:
                parameter.grad = None


def _optimizer_of(optim: PyroOptim, parameter: torch.Tensor) -> Optimizer:
    """The optimizer that Pyro keeps for a parameter; made as Pyro makes it if it is new."""
    if parameter not in optim.optim_objs:
        optim.optim_objs[parameter] = found = optim._get_optim(parameter)
        optim.grad_clip[parameter] = optim._get_grad_clip(parameter)
        name = pyro.get_param_store().param_name(parameter)
        state = optim._state_waiting_to_be_consumed.pop(name, None)
        if state is not None:
            _load_state_dict(found, state)
    optimizer: Optimizer = _without_scheduler(optim.optim_objs[parameter])
    return optimizer


def _without_scheduler(found: Any) -> Any:
    return found.optimizer if is_scheduler(found) else found


def _num_held(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _hashable(value: Any) -> Any:
    return id(value) if isinstance(value, torch.Tensor) else value


def _at(where: list[int], step: Callable[[list[torch.Tensor]], None]) -> Any:
    def run(gradients: Sequence[torch.Tensor]) -> None:
        step([gradients[i] for i in where])

    return run


def _together(owned: Sequence[Owned]) -> Callable[[list[torch.Tensor]], None]:
    """An optimizer of the same kind for several parameters, which shares their state."""
    parameters = [parameter for parameter, _, _ in owned]
    first, options = owned[0][1], owned[0][2]
    joint = object.__new__(type(first))
    joint.__dict__.update(first.__dict__)
    joint.param_groups = [{**options, "params": parameters}]
    joint.state = defaultdict(dict)
    for parameter, optimizer, _ in owned:
        joint.state[parameter] = optimizer.state[parameter]

    def step(gradients: list[torch.Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        joint.step()
        for parameter in parameters:
            parameter.grad = None

    return step


def _fused_adam(owned: Sequence[Owned]) -> Callable[[list[torch.Tensor]], None] | None:
    group = owned[0][2]
    states = [optimizer.state.get(parameter, {}) for parameter, optimizer, _ in owned]
    if not all("exp_avg" in s and isinstance(s["step"], torch.Tensor) for s in states):
        return None
    if group["differentiable"] or group["capturable"] or not _can_fuse(owned):
        return None
    device = owned[0][0].device
    if any(state["step"].device != device for state in states):
        return None
    amsgrad = group["amsgrad"]
    arguments = (
        [parameter for parameter, _, _ in owned],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["max_exp_avg_sq"] for state in states] if amsgrad else [],
        [state["step"] for state in states],
    )
    beta1, beta2 = group["betas"]
    options = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
    decoupled = bool(group.get("decoupled_weight_decay", isinstance(owned[0][1], AdamW)))

    def step(gradients: list[torch.Tensor]) -> None:
        parameters, first_moments, second_moments, largest, counts = arguments
        adam(
            parameters,
            gradients,
            first_moments,
            second_moments,
            largest,
            counts,
            fused=True,
            foreach=False,
            decoupled_weight_decay=decoupled,
            amsgrad=amsgrad,
            beta1=beta1,
            beta2=beta2,
            **options,
        )

    return step


def _fused_sgd(owned: Sequence[Owned]) -> Callable[[list[torch.Tensor]], None] | None:
    group = owned[0][2]
    if group["differentiable"] or not _can_fuse(owned):
        return None
    states = [optimizer.state.get(parameter, {}) for parameter, optimizer, _ in owned]
    momenta = [state.get("momentum_buffer") for state in states]
    if group["momentum"] and any(momentum is None for momentum in momenta):
        return None
    parameters = [parameter for parameter, _, _ in owned]
    names = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
    options = {key: group[key] for key in names}

    def step(gradients: list[torch.Tensor]) -> None:
        sgd(parameters, gradients, list(momenta), fused=True, foreach=False, **options)

    return step


def _can_fuse(owned: Sequence[Owned]) -> bool:
    """Whether torch's fused kernels take these parameters and options."""
    same = {(p.device, p.dtype, isinstance(g["lr"], torch.Tensor)) for p, _, g in owned}
    return len(same) == 1 and all(p.is_floating_point() and not g["foreach"] for p, _, g in owned)


_FUSED: dict[type, Callable[[Sequence[Owned]], Any]] = {
    Adam: _fused_adam,
    AdamW: _fused_adam,
    SGD: _fused_sgd,
}
