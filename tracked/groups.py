"""Parameter groups for an optimizer: no decay on biases and norms, learning rates by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tracked.freezing import Patterns, Schedule, matching, trainable


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    lr: Mapping[str, float] | None = None,
    also: Patterns | Schedule = (),
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` optimizer, over the parameters that train.

    Parameters of fewer than two dimensions (biases, the scales of norms) get no weight decay, which is the
    usual practice for transformers. Each group has a `name`, under which its learning rate is logged.

    Args:
        model: With what is to be frozen frozen already.
        weight_decay: Of all others.
        lr: Pattern (as in `freeze`) -> learning rate; the first that fits counts. The others get the optimizer's own.
        also: What will be unfrozen later, as in `trainable`.

    Raises:
        UsageError: A pattern that no parameter goes by, or nothing trains.
    """
    wanted = {id(each) for each in trainable(model, also)}
    rate_of = {
        id(each): pattern
        for pattern in reversed(list(lr or {}))
        for each in matching(model, [pattern]).values()
    }
    groups: dict[tuple[str | None, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if id(parameter) not in wanted:
            continue
        pattern = rate_of.get(id(parameter))
        decays = parameter.dim() > 1
        name = (pattern or "rest") + ("" if decays else " without decay")
        options = {"name": name, "params": [], "weight_decay": weight_decay if decays else 0.0}
        if lr is not None and pattern is not None:
            options["lr"] = lr[pattern]
        groups.setdefault((pattern, decays), options)["params"].append(parameter)
    return list(groups.values())
