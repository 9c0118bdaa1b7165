"""Which parameters train: frozen and unfrozen by name, at once or by a schedule of epochs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

import torch
from torch import nn

from tracked.errors import UsageError
from tracked.state import own_name

Patterns = str | Sequence[str]
Schedule = Mapping[int, Patterns]
"""Epoch, counted from 1 -> what is unfrozen when it begins."""

_SHOWN = 5


def freeze(model: nn.Module, *patterns: str) -> None:
    """Keep parameters as they are: they get no gradient, so an optimizer passes them over.

    Args:
        model: The module that the names begin at.
        patterns: Dotted names of parameters or modules, also with `*`, `?` and `[…]` as in file names (a `*`
            goes over dots). A module stands for everything in it.

    Raises:
        UsageError: No pattern, or one that no parameter goes by.
    """
    for parameter in matching(model, patterns).values():
        parameter.requires_grad_(False)
        parameter.grad = None  # else an optimizer would go on applying the last one


def unfreeze(model: nn.Module, *patterns: str) -> None:
    """Let frozen parameters train again; see `freeze`.

    An optimizer has to hold them from the start: see `trainable`.
    """
    for parameter in matching(model, patterns).values():
        parameter.requires_grad_(True)


def trainable(model: nn.Module, also: Patterns | Schedule = ()) -> list[nn.Parameter]:
    """What an optimizer is to get: the parameters that train, in the order of the model.

    Args:
        model: With what is to be frozen frozen already.
        also: What will be unfrozen later, as patterns or as `Task.unfreeze` has it.

    Raises:
        UsageError: A pattern that no parameter goes by, or nothing trains.
    """
    groups = list(also.values()) if isinstance(also, Mapping) else [also]
    patterns = [each for group in groups for each in _listed(group)]
    later = {id(each) for each in matching(model, patterns).values()} if patterns else set()
    found = [each for each in model.parameters() if each.requires_grad or id(each) in later]
    if not found:
        raise _all_frozen("every parameter of the model is frozen")
    return found


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but frozen normalizations are in eval mode.

    Their running statistics would change otherwise, although nothing of them trains. Frozen is one whose own
    parameters all are; one without parameters goes by the smallest module around it that has any.
    """
    model.train()
    for module in _frozen_normalizations(model):
        module.eval()


def table(model: nn.Module) -> str:
    """What trains and what is frozen, by the model's children (by theirs, where one is mixed), with counts."""
    names = _parameters(model)
    rows: list[tuple[str, str, str]] = []
    for child, parameters in _grouped(names, 1).items():
        if len({each.requires_grad for each in parameters.values()}) == 1:
            rows.append(_row(child, parameters))
        else:
            rows += [_row(name, inner) for name, inner in _grouped(parameters, 2).items()]
    counted = [("all", f"{_count(names, trains=True):,}", f"{_count(names, trains=False):,}")]
    lines = [("part", "trains", "frozen"), *rows, *counted]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [
        f"{name:<{widths[0]}}  {trains:>{widths[1]}}  {frozen:>{widths[2]}}" for name, trains, frozen in lines
    ]
    if norms := len(_frozen_normalizations(model)):
        text.append(
            f"{norms} frozen normalization{'s keep their' if norms > 1 else ' keeps its'} running statistics"
        )
    return "\n".join(text)


def check_schedule(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """See that each epoch of the schedule unfreezes something, and that the optimizer holds it.

    Raises:
        UsageError: It does not.
    """
    held = _held(optimizer)
    frozen = {id(each) for each in model.parameters() if not each.requires_grad}
    for epoch in sorted(schedule):
        due = matching(model, _listed(schedule[epoch]))
        thawed = {name: each for name, each in due.items() if id(each) in frozen}
        if not thawed:
            raise UsageError(
                f"unfreeze at epoch {epoch}: {_quoted(schedule[epoch])} is not frozen by then",
                expected="parameters that are frozen until that epoch",
                try_next=f"finetune.freeze(model, {_quoted(schedule[epoch])}) before the optimizer is made",
            )
        if lost := [name for name, each in thawed.items() if id(each) not in held]:
            raise UsageError(
                f"unfreeze at epoch {epoch}: the optimizer does not hold {_some(lost)}",
                expected="an optimizer over all that will ever train; what is frozen it passes over",
                try_next="make it over finetune.trainable(model, also=SCHEDULE)",
            )
        frozen -= {id(each) for each in thawed.values()}


def unfreeze_until(epoch: int, model: nn.Module, schedule: Schedule) -> None:
    """Unfreeze what is due by the time `epoch` begins.

    What trains is then a function of the epoch, so a resumed training needs nothing else to be saved. In a loop
    of one's own: at the first batch of each epoch, with `run.epoch`, followed by `train_mode(model)`.
    """
    for due in sorted(schedule):
        if due <= epoch:
            unfreeze(model, *_listed(schedule[due]))


def check_trains(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """See that a step can change the model.

    Raises:
        UsageError: Everything is frozen, or the optimizer holds nothing that trains.
    """
    parameters = _parameters(model)
    trains = {name: each for name, each in parameters.items() if each.requires_grad}
    if parameters and not trains:
        raise _all_frozen(f"all {len(parameters)} parameters of the model are frozen as the training begins")
    if trains and not {id(each) for each in trains.values()} & _held(optimizer):
        raise UsageError(
            f"the optimizer holds none of the parameters that train: {_some(list(trains))}",
            expected="an optimizer that is made after heads are replaced and parts are frozen",
            try_next="torch.optim.AdamW(finetune.trainable(model), lr=…) as the last thing",
        )


def matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that the patterns mean, each pattern at least one, by name (tied ones by all of theirs)."""
    if not patterns:
        raise UsageError("no pattern is given", expected='dotted names, such as "backbone" or "layer4.*"')
    parameters = _parameters(model, tied=True)
    # A parameter goes by its own name and by those of the modules around it.
    paths = {name: list(accumulate(name.split("."), "{}.{}".format)) for name in parameters}
    for pattern in patterns:
        if not any(fnmatchcase(each, pattern) for path in paths.values() for each in path):
            known = list(dict.fromkeys(each for path in paths.values() for each in path))
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
            children = [each for each in known if "." not in each]
            raise UsageError(
                f"no parameter goes by {pattern!r}",
                expected=f"names such as {_some(near or children)}" if known else "a model with parameters",
                try_next=f"{near[0]!r}" if near else "print(finetune.table(model))",
            )
    return {
        name: parameters[name]
        for name, path in paths.items()
        if any(fnmatchcase(each, pattern) for each in path for pattern in patterns)
    }


def _parameters(model: nn.Module, *, tied: bool = False) -> dict[str, nn.Parameter]:
    """By their own names, compiled or not; with `tied`, those that have several by each of them."""
    return {own_name(name): each for name, each in model.named_parameters(remove_duplicate=not tied)}


def _frozen_normalizations(model: nn.Module) -> list[nn.Module]:
    """What keeps running statistics and is frozen."""
    modules = dict(model.named_modules())

    def is_frozen(name: str) -> bool:
        trains = [each.requires_grad for each in modules[name].parameters()]
        if trains or not name:
            return bool(trains) and not any(trains)
        return is_frozen(name.rpartition(".")[0])

    return [
        module
        for name, module in modules.items()
        if isinstance(getattr(module, "running_mean", None), torch.Tensor) and is_frozen(name)
    ]


def _grouped(parameters: Mapping[str, nn.Parameter], depth: int) -> dict[str, dict[str, nn.Parameter]]:
    """By the first `depth` parts of their names."""
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(".".join(name.split(".")[:depth]), {})[name] = parameter
    return groups


def _row(name: str, parameters: Mapping[str, nn.Parameter]) -> tuple[str, str, str]:
    counts = (_count(parameters, trains=trains) for trains in (True, False))
    trains, frozen = (f"{count:,}" if count else "–" for count in counts)
    return name, trains, frozen


def _count(parameters: Mapping[str, nn.Parameter], *, trains: bool) -> int:
    return sum(each.numel() for each in parameters.values() if each.requires_grad is trains)


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(each) for group in optimizer.param_groups for each in group["params"]}


def _listed(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _quoted(patterns: Patterns) -> str:
    return ", ".join(map(repr, _listed(patterns)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _all_frozen(found: str) -> UsageError:
    return UsageError(
        found,
        expected="something that trains from the first epoch on, such as a new head",
        try_next='finetune.unfreeze(model, "fc"), with the name of what is to train',
    )
