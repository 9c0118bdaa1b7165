"""What of a training is saved: everything attached that has `state_dict` and `load_state_dict`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

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
        self._fresh: dict[str, tuple[torch.Tensor, int]] = {}

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
        self._parts[name] = _uncompiled(part)
        self._built[name] = copy.deepcopy(_hyperparameters(part))
        self._fresh |= {key: (buffer, buffer._version) for key, buffer in _other_buffers(name, part)}  # noqa: SLF001

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
            f"{name}_state_dict": part.state_dict() for name, part in self._parts.items()
        }
        state["built"] = {name: built for name, built in self._built.items() if built is not None}
        state["optimizer_parameters"] = {
            name: self._names(part)
            for name, part in self._parts.items()
            if isinstance(part, torch.optim.Optimizer)
        }
        state["other_buffers"] = {
            key: buffer
            for name, part in self._parts.items()
            for key, buffer in _other_buffers(name, part)
            if key not in self._fresh or not _is_untouched(buffer, *self._fresh[key])
        }
        # `zero_grad(set_to_none=False)` leaves zeros, and an optimizer treats zero unlike None.
        state["parameters_with_gradient"] = [
            name for name, parameter in self._parameters().items() if parameter.grad is not None
        ]
        return state

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
        for name, part in self._parts.items():
            if only is not None and name not in only:
                continue
            saved = state.get(f"{name}_state_dict")
            if saved is None:
                there = sorted(
                    key.removesuffix("_state_dict") for key in state if key.endswith("_state_dict")
                )
                raise StateMismatch(
                    f"the checkpoint has no state for {name!r}",
                    expected=f"one of {', '.join(there) or 'none'}",
                )
            if isinstance(part, nn.Module):
                _load_module(name, part, saved)
                _load_buffers(name, part, state.get("other_buffers", {}))
            elif isinstance(part, torch.optim.Optimizer):
                recorded = state.get("optimizer_parameters", {}).get(name)
                _load_optimizer(name, part, saved, recorded, self._names(part))
            else:
                part.load_state_dict(saved)
        with_gradient = set(state.get("parameters_with_gradient", ()))
        for name, parameter in self._parameters().items():
            if name in with_gradient and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if overridden:
            recorded = state.get("built", {})
            names = [name for name in recorded if name in self._built and (only is None or name in only)]
            # Optimizers first: a scheduler is told their new rates.
            names.sort(key=lambda name: not isinstance(self._parts[name], torch.optim.Optimizer))
            for name in names:
                self._apply_changes(name, recorded[name])

    def _apply_changes(self, name: str, before: Any) -> None:
        """Set what the part's constructor set otherwise than the recorded one, on top of the loaded state."""
        part, after = self._parts[name], copy.deepcopy(self._built[name])
        if isinstance(part, torch.optim.Optimizer):
            attached = any(getattr(other, "optimizer", None) is part for other in self._parts.values())
            for group, old, new in zip(part.param_groups, before, after, strict=False):
                changed = {key: new[key] for key in new if key not in old or old[key] != new[key]}
                if attached or "initial_lr" in new:
                    changed["lr"] = group["lr"] * _ratio(old, new)
                group.update(changed)
        else:
            loaded = part.state_dict()
            changed = _with_changes(loaded, before, after)
            if "_last_lr" in loaded:
                changed["_last_lr"] = [group["lr"] for group in part.optimizer.param_groups]  # type: ignore[attr-defined]
            part.load_state_dict(changed)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{part_name}.{name}": parameter
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


def _uncompiled(part: Any) -> Any:
    """The module under `torch.compile`, whose state names have no `_orig_mod.`."""
    return getattr(part, "_orig_mod", part)


def _other_buffers(name: str, part: Stateful) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of a module that its `state_dict` leaves out (`persistent=False`), as `part.module.buffer`."""
    if isinstance(part, nn.Module):
        for path, module in part.named_modules(prefix=name):
            for leaf in sorted(module._non_persistent_buffers_set):  # noqa: SLF001 - there is no public way
                if (buffer := getattr(module, leaf)) is not None:
                    yield f"{path}.{leaf}", buffer


def _is_untouched(buffer: torch.Tensor, fresh: torch.Tensor, version: int) -> bool:
    """Most such buffers are constants, as masks are, and need not be saved; torch counts changes in place."""
    return buffer is fresh and buffer._version == version  # noqa: SLF001


def _load_buffers(name: str, module: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    for key, value in saved.items():
        part, _, path = key.partition(".")
        if part != name:
            continue
        owner, _, leaf = path.rpartition(".")
        holder = module.get_submodule(owner)
        present = getattr(holder, leaf, None)
        if present is not None and (present.shape, present.dtype) == (value.shape, value.dtype):
            with torch.no_grad():
                present.copy_(value)
        else:
            device = next(module.parameters(), value).device if present is None else present.device
            setattr(holder, leaf, value.to(device))


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


def _ratio(old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
    """By how much a rate under a schedule changes, so that it goes on from where the schedule stands.

    The rate that the schedule is relative to decides; `lr` itself has been scaled by its first step already.
    """
    base = next(key for key in ("max_lr", "initial_lr", "lr") if key in old and key in new)
    return new[base] / old[base] if old[base] else 1


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


def _load_module(name: str, module: nn.Module, saved: Mapping[str, Any]) -> None:
    present = module.state_dict()
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
    module.load_state_dict(saved)


def _load_optimizer(
    name: str,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    recorded: list[list[str]] | None,
    present: list[list[str]],
) -> None:
    """Load by parameter name: the order in which a module gives its parameters may have changed."""
    if recorded is not None and recorded != present:
        if [sorted(group) for group in recorded] != [sorted(group) for group in present]:
            flat_recorded = {each for group in recorded for each in group}
            flat_present = {each for group in present for each in group}
            wrong = [f"{each} was optimized, and is not now" for each in sorted(flat_recorded - flat_present)]
            wrong += [f"{each} is optimized, and was not" for each in sorted(flat_present - flat_recorded)]
            raise _misfit(name, wrong or ["its parameters lie in other groups"])
        saved = _reordered(saved, recorded, present)
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise _misfit(
            name, [f"{len(saved['param_groups'])} groups recorded, {len(optimizer.param_groups)} now"]
        )
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
