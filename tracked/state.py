"""What of a training is saved: everything attached that has `state_dict` and `load_state_dict`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau

from tracked.errors import StateMismatch, UsageError

_SHOWN = 5


@runtime_checkable
class Stateful(Protocol):
    """Anything that can be resumed."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Parts:
    """The attached parts by name, and their state under `<name>_state_dict`."""

    def __init__(self) -> None:
        self._parts: dict[str, Stateful] = {}
        self._built: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def attach(self, name: str, part: Any) -> None:
        """Add a part.

        Raises:
            UsageError: It cannot be saved and loaded, or the name is taken.
        """
        if not isinstance(part, Stateful):
            raise UsageError(
                f"{name}={part!r:.60} cannot be attached",
                expected="something with state_dict() and load_state_dict()",
                try_next="run.state[...] for plain values",
            )
        if name in self._parts:
            raise UsageError(f"{name!r} is attached already", expected="a name for each part")
        self._parts[name] = uncompiled(part)
        self._built[name] = copy.deepcopy(_hyperparameters(part))

    def check_together(self, names: Collection[str]) -> None:
        """Refuse a scheduler apart from its optimizer.

        A scheduler's constructor sets the optimizer's rates, and would undo what was restored before.

        Args:
            names: The parts that are attached in one call.

        Raises:
            UsageError: One of them drives, or is driven by, a part of another call.
        """
        for name, part in self._parts.items():
            if isinstance(part, LRScheduler) and name in names and not self._is_saved(part.optimizer):
                raise UsageError(
                    f"{name!r} is attached without the optimizer that it drives",
                    expected="both in one call",
                    try_next=f"run.attach(…, optimizer=optimizer, {name}={name})",
                )
            for other_name, other in self._parts.items():
                if getattr(part, "optimizer", None) is other and (name in names) != (other_name in names):
                    raise UsageError(
                        f"{name!r} is attached apart from {other_name!r}, the optimizer that it drives",
                        expected="both in one call",
                        try_next=f"run.attach(…, {other_name}={other_name}, {name}={name})",
                    )

    def _is_saved(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is a part, or belongs to one that is no scheduler, such as a trainer of one's own."""
        owners = [each for each in self._parts.values() if not isinstance(each, LRScheduler)]
        return any(each is optimizer for owner in owners for each in (owner, *vars(owner).values()))

    def device(self) -> torch.device:
        """Where the first attached parameter lies; the CPU if there is none."""
        for part in self._parts.values():
            if isinstance(part, nn.Module):
                for parameter in part.parameters():
                    return parameter.device
        return torch.device("cpu")

    def capture(self) -> dict[str, Any]:
        """The state of all parts, referring to their tensors (nothing is copied)."""
        state: dict[str, Any] = {
            f"{name}_state_dict": module_state(part) if isinstance(part, nn.Module) else part.state_dict()
            for name, part in self._parts.items()
        }
        state["built"] = {name: built for name, built in self._built.items() if built is not None}
        state["optimizer_parameters"] = {
            name: self._names(part)
            for name, part in self._parts.items()
            if isinstance(part, torch.optim.Optimizer)
        }
        state["other_buffers"] = {
            name: buffers
            for name, part in self._parts.items()
            if isinstance(part, nn.Module) and (buffers := dict(_other_buffers(part)))
        }
        # `zero_grad(set_to_none=False)` leaves zeros, and an optimizer treats zero unlike None.
        state["parameters_with_gradient"] = [
            name for name, parameter in self._parameters().items() if parameter.grad is not None
        ]
        return state

    def check(self, state: Mapping[str, Any]) -> None:
        """See that modules and optimizers fit what `capture` took, and change nothing.

        Raises:
            StateMismatch: As `restore`.
        """
        for name, part in self._parts.items():
            saved = _saved(state, name)
            if isinstance(part, nn.Module):
                _check_module(name, part, saved)
            elif isinstance(part, torch.optim.Optimizer):
                recorded = state.get("optimizer_parameters", {}).get(name)
                _check_optimizer(name, part, saved, recorded, self._names(part))

    def restore(
        self, state: Mapping[str, Any], only: tuple[str, ...] | None = None, *, overridden: bool = False
    ) -> None:
        """Load what `capture` took into the parts (into those named in `only`).

        Args:
            state: What a checkpoint holds.
            only: Names of parts.
            overridden: The code was given other hyperparameters than the one that `state` is from. What it
                builds differently in optimizers and schedulers, which loading puts back, goes on top.

        Raises:
            StateMismatch: A part is missing from the state, or its tensors do not fit.
        """
        recorded_built = state.get("built", {}) if overridden else {}
        changing = [name for name in recorded_built if name in self._built and (only is None or name in only)]
        rehearsals = {name: self._rehearsals(name, recorded_built) for name in changing}
        for name, part in self._parts.items():
            if only is not None and name not in only:
                continue
            saved = _saved(state, name)
            if isinstance(part, nn.Module):
                _check_module(name, part, saved)
                load_module(part, saved)
                _load_buffers(name, part, state.get("other_buffers", {}).get(name, {}))
            elif isinstance(part, torch.optim.Optimizer):
                recorded = state.get("optimizer_parameters", {}).get(name)
                _load_optimizer(name, part, saved, recorded, self._names(part))
            else:
                part.load_state_dict(saved)
        with_gradient = set(state.get("parameters_with_gradient", ()))
        for name, parameter in self._parameters().items():
            if name in with_gradient and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # Optimizers first: a scheduler is told their new rates.
        for name in sorted(
            changing, key=lambda name: not isinstance(self._parts[name], torch.optim.Optimizer)
        ):
            self._apply_changes(name, recorded_built[name], rehearsals[name])

    def _rehearsals(self, name: str, recorded: Mapping[str, Any]) -> Rehearsals | None:
        """For a scheduler: itself as it was recorded and as it is built now, both from their beginning."""
        part = self._parts[name]
        optimizer = getattr(part, "optimizer", None)
        driven = next((each for each, other in self._parts.items() if other is optimizer), "")
        if not isinstance(part, LRScheduler) or isinstance(part, ReduceLROnPlateau) or driven not in recorded:
            return None
        try:
            before = _rehearsal(part, recorded[driven])
            before.load_state_dict(copy.deepcopy(recorded[name]))
            return part, before, _rehearsal(part, self._built[driven])
        except Exception:  # noqa: BLE001 - a scheduler of the user's own that cannot be copied
            return None

    def _apply_changes(self, name: str, before: Any, rehearsals: Rehearsals | None) -> None:
        """Set what the part's constructor set otherwise than the recorded one, on top of the loaded state."""
        part, after = self._parts[name], copy.deepcopy(self._built[name])
        if isinstance(part, torch.optim.Optimizer):
            attached = any(getattr(other, "optimizer", None) is part for other in self._parts.values())
            for group, old, new in zip(part.param_groups, before, after, strict=False):
                changed = _changed(old, new)
                if "lr" in group and (attached or "initial_lr" in new):
                    changed["lr"] = group["lr"] * _ratio(old, new)
                group.update(changed)
        elif rehearsals is None or not _replay(*rehearsals):
            loaded = part.state_dict()
            changed = _with_changes(loaded, before, after)
            if "_last_lr" in loaded:
                changed["_last_lr"] = [group["lr"] for group in part.optimizer.param_groups]  # type: ignore[attr-defined]
            part.load_state_dict(changed)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{part_name}.{own_name(name)}": parameter
            for part_name, part in self._parts.items()
            if isinstance(part, nn.Module)
            for name, parameter in part.named_parameters()
        }

    def _names(self, optimizer: torch.optim.Optimizer) -> list[list[str]]:
        """The parameters of each group by name; by position where no attached module has them."""
        names = {id(parameter): name for name, parameter in self._parameters().items()}
        return [
            [names.get(id(parameter), f"[{g}][{p}]") for p, parameter in enumerate(group["params"])]
            for g, group in enumerate(optimizer.param_groups)
        ]


def uncompiled(part: Any) -> Any:
    """The module under `torch.compile`, whose state names have no `_orig_mod.`."""
    return getattr(part, "_orig_mod", part)


def own_name(name: str) -> str:
    """A dotted name without what `torch.compile` adds, also where only a part of the model is compiled."""
    return name.replace("_orig_mod.", "")


def module_state(module: nn.Module) -> dict[str, Any]:
    """A module's `state_dict`, whether it or a part of it is compiled or not."""
    return {own_name(name): value for name, value in module.state_dict().items()}


def load_module(module: nn.Module, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load what `module_state` gave, compiled or not."""
    present = {own_name(name): name for name in module.state_dict()}
    module.load_state_dict({present.get(name, name): each for name, each in state.items()}, strict=strict)


def _other_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The buffers that a module's `state_dict` leaves out (`persistent=False`), by their dotted names.

    All of them: one that never changes may have been drawn at random.
    """
    for path, holder in module.named_modules():
        for leaf in sorted(holder._non_persistent_buffers_set):  # noqa: SLF001 - there is no public way
            yield own_name(f"{path}.{leaf}".lstrip(".")), holder._buffers[leaf]  # noqa: SLF001


def _load_buffers(name: str, module: nn.Module, saved: Mapping[str, torch.Tensor | None]) -> None:
    # Of a compiled part the module in it, which comes after its wrapper.
    holders = {own_name(f"{path}.")[:-1]: holder for path, holder in module.named_modules()}
    for key, value in saved.items():
        path, _, leaf = key.rpartition(".")
        holder = holders.get(path)
        if holder is None or (leaf not in holder._buffers and hasattr(holder, leaf)):  # noqa: SLF001
            raise _misfit(name, [f"the buffer {key} is not in the model"])
        present = holder._buffers.get(leaf)  # noqa: SLF001
        if value is None or present is None or not _is_writable_as(present, value):
            device = next(module.parameters(), torch.empty(0)).device
            holder.register_buffer(leaf, None if value is None else value.to(device), persistent=False)
        else:
            with torch.no_grad():
                present.copy_(value)  # in place: others may refer to it


def _is_writable_as(present: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `value` can be copied into the tensor; not into one that is expanded."""
    overlaps = any(
        stride == 0 and size > 1 for stride, size in zip(present.stride(), present.shape, strict=True)
    )
    return not overlaps and (present.shape, present.dtype) == (value.shape, value.dtype)


def _hyperparameters(part: Stateful) -> Any:
    """What a constructor sets and loading puts back: an optimizer's options, a schedule."""
    if isinstance(part, torch.optim.Optimizer):
        return [{k: v for k, v in group.items() if k != "params"} for group in part.param_groups]
    if not hasattr(part, "optimizer"):
        return None
    state = part.state_dict()
    # Else it is no schedule but a trainer of one's own, with a whole model in it.
    return state if isinstance(part, LRScheduler) or not _holds_tensors(state) else None


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


Rehearsals = tuple[LRScheduler, LRScheduler, LRScheduler]
"""A scheduler, and copies of it as it was recorded and as it is built now, with optimizers of their own."""


def _rehearsal(scheduler: LRScheduler, groups: Sequence[Mapping[str, Any]]) -> LRScheduler:
    """A copy of a scheduler that has made no step, which drives nothing but these options."""
    dummy = torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in groups])
    for group, options in zip(dummy.param_groups, groups, strict=True):
        group.update(copy.deepcopy(dict(options)))
    return copy.deepcopy(scheduler, {id(scheduler.optimizer): dummy})


def _replay(scheduler: LRScheduler, before: LRScheduler, after: LRScheduler) -> bool:
    """Put a scheduler where it would stand had it been built as it is now from the beginning.

    Its optimizer has been given the other options. False, with nothing changed, if the recorded schedule
    does not lead to the rates that it had: they hang on more than the number of steps.
    """
    count = _count(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer made a step
        try:
            for _ in range(count):
                before.step()
                after.step()
        except ValueError:  # such as one cycle, which ends before
            return False
    reached = zip(before.optimizer.param_groups, scheduler.get_last_lr(), strict=True)
    if not all(math.isclose(float(group["lr"]), float(rate), rel_tol=1e-6) for group, rate in reached):
        return False
    pairs = zip(before.optimizer.param_groups, after.optimizer.param_groups, strict=True)
    for group, (old, new) in zip(scheduler.optimizer.param_groups, pairs, strict=True):
        group.update({key: value for key, value in _changed(old, new).items() if key != "params"})
        group["lr"] = new["lr"]
    scheduler.load_state_dict(after.state_dict())
    return True


def _count(scheduler: LRScheduler) -> int:
    """How many steps a scheduler has made."""
    inner = scheduler._schedulers[0] if isinstance(scheduler, ChainedScheduler) else scheduler  # noqa: SLF001
    return int(inner.last_epoch)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that differ, as they are now."""
    return {key: value for key, value in new.items() if key not in old or not _equal(old[key], value)}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return bool(a == b)


def _ratio(old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
    """By how much a rate under a schedule changes, so that it goes on from where the schedule stands.

    The rate that the schedule is relative to decides; `lr` itself has been scaled by its first step already.
    """
    base = next((key for key in ("max_lr", "initial_lr", "lr") if key in old and key in new), None)
    return new[base] / old[base] if base and old[base] else 1


def _with_changes(loaded: Any, before: Any, after: Any) -> Any:
    """`loaded`, with those leaves that two fresh states differ in taken from the second."""
    # A subclass of dict, such as the Counter of MultiStepLR, is a value of its own.
    dicts = type(loaded) is dict and type(before) is dict and type(after) is dict
    if dicts and before.keys() == after.keys():
        return {
            key: _with_changes(value, before[key], after[key])
            if key in before and key != "_last_lr"
            else value
            for key, value in loaded.items()
        }
    lists = isinstance(loaded, list) and isinstance(before, list) and isinstance(after, list)
    if lists and len(loaded) == len(before) == len(after):
        return [_with_changes(*each) for each in zip(loaded, before, after, strict=True)]
    return after if before != after else loaded


def _saved(state: Mapping[str, Any], name: str) -> Any:
    saved = state.get(f"{name}_state_dict")
    if saved is None:
        there = sorted(key.removesuffix("_state_dict") for key in state if key.endswith("_state_dict"))
        raise StateMismatch(
            f"the checkpoint has no state for {name!r}", expected=f"one of {', '.join(there) or 'none'}"
        )
    return saved


def _check_module(name: str, module: nn.Module, saved: Mapping[str, Any]) -> None:
    present = module_state(module)
    wrong = [f"{key} is not in the checkpoint" for key in present if key not in saved]
    wrong += [f"{key} is not in the model" for key in saved if key not in present]
    wrong += [
        f"{key} is {tuple(saved[key].shape)} in the checkpoint and {tuple(present[key].shape)} in the model"
        for key in present
        if isinstance(present[key], torch.Tensor)
        and isinstance(saved.get(key), torch.Tensor)
        and present[key].shape != saved[key].shape
    ]
    if wrong:
        raise _misfit(name, wrong)


def _check_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    recorded: list[list[str]] | None,
    present: list[list[str]],
) -> None:
    if recorded is not None and [sorted(group) for group in recorded] != [sorted(group) for group in present]:
        flat_recorded = {each for group in recorded for each in group}
        flat_present = {each for group in present for each in group}
        wrong = [f"{each} was optimized, and is not now" for each in sorted(flat_recorded - flat_present)]
        wrong += [f"{each} is optimized, and was not" for each in sorted(flat_present - flat_recorded)]
        raise _misfit(name, wrong or ["its parameters lie in other groups"])
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise _misfit(
            name, [f"{len(saved['param_groups'])} groups recorded, {len(optimizer.param_groups)} now"]
        )


def _load_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    recorded: list[list[str]] | None,
    present: list[list[str]],
) -> None:
    """Load by parameter name: the order in which a module gives its parameters may have changed."""
    _check_optimizer(name, optimizer, saved, recorded, present)
    if recorded is not None and recorded != present:
        saved = _reordered(saved, recorded, present)
    optimizer.load_state_dict(dict(saved))
    # torch casts a state to its parameter's dtype; a state kept in another one would lose bits.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if (
                isinstance(value, torch.Tensor)
                and isinstance(loaded, torch.Tensor)
                and loaded.dtype != value.dtype
            ):
                optimizer.state[parameter][key] = value.to(loaded.device)


def _reordered(
    saved: Mapping[str, Any], recorded: list[list[str]], present: list[list[str]]
) -> dict[str, Any]:
    index_of = {
        each: index
        for group, indices in zip(recorded, (group["params"] for group in saved["param_groups"]), strict=True)
        for each, index in zip(group, indices, strict=True)
    }
    groups = [
        {**group, "params": [index_of[each] for each in names]}
        for group, names in zip(saved["param_groups"], present, strict=True)
    ]
    return {**saved, "param_groups": groups}


def _misfit(name: str, wrong: list[str]) -> StateMismatch:
    more = f" … and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return StateMismatch(
        f"the checkpoint does not fit {name}: {'; '.join(wrong[:_SHOWN])}{more}",
        expected="the model and optimizer that the run was trained with",
        try_next="the params that the run records (`python -m tracked.run show RUN`), or a new run with `train`",
    )
