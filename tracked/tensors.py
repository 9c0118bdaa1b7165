"""What a checkpoint holds, for a look inside: shapes, norms, and the options of its optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tracked.tables import aligned

_SUFFIX = "_state_dict"


@dataclass(frozen=True)
class Tensor:
    """One parameter or buffer. Norm and extremes are those of its finite elements; None if it has none.

    Attributes:
        name: `part.module.parameter`, such as `model.0.weight`.
        shape: Its dimensions.
        dtype: Such as `float32`.
        norm: The 2-norm, summed in float64.
        nan, inf: How many elements are NaN, and infinite.
        optimized: Whether an optimizer of the run changes it.
    """

    name: str
    shape: list[int]
    dtype: str
    norm: float | None
    min: float | None
    max: float | None
    nan: int
    inf: int
    optimized: bool


@dataclass(frozen=True)
class Inside:
    """A checkpoint's tensors, and each optimizer's groups: learning rate and other options by name."""

    step: int
    tensors: list[Tensor]
    optimizers: dict[str, list[dict[str, Any]]]

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"checkpoint_step": fields.pop("step"), **fields}


def modules(state: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each part that has nothing else, as a module's `state_dict` has; `model` in any case.

    Args:
        state: A checkpoint.

    Returns:
        Part -> name -> parameter or buffer.
    """
    found = {}
    for key, part in state.items():
        name = key.removesuffix(_SUFFIX)
        # The running state of a metric has the form of a module's, and is none.
        if name == key or name.startswith("metric_") or not isinstance(part, Mapping):
            continue
        tensors = {key: value for key, value in part.items() if isinstance(value, torch.Tensor)}
        plain = all(key in tensors or key.endswith("_extra_state") for key in part)
        if tensors and (plain or name == "model"):
            found[name] = tensors
    return found


def look_inside(state: Mapping[str, Any]) -> Inside:
    """Measure a checkpoint's parameters and buffers, and read its optimizers' options."""
    groups_of = state.get("optimizer_parameters", {})
    optimized = {name for groups in groups_of.values() for group in groups for name in group}
    named = {
        f"{part}.{name}": tensor
        for part, tensors in modules(state).items()
        for name, tensor in tensors.items()
    }
    named |= state.get("other_buffers", {})
    # Of tied weights an optimizer knows one name.
    changed = {tensor.data_ptr() for name, tensor in named.items() if name in optimized}
    return Inside(
        step=state["step"],
        tensors=[
            _measured(name, tensor, optimized=name in optimized or tensor.data_ptr() in changed - {0})
            for name, tensor in named.items()
        ],
        optimizers={
            optimizer: [_options(group) for group in state[f"{optimizer}{_SUFFIX}"]["param_groups"]]
            for optimizer in groups_of
        },
    )


def _measured(name: str, tensor: torch.Tensor, *, optimized: bool) -> Tensor:
    values = tensor.detach()
    if values.is_complex():
        values = values.abs()
    elif values.is_floating_point() and values.element_size() == 1:
        values = values.float()  # hardly anything can be computed in eight bits
    elif values.dtype == torch.bool:
        values = values.to(torch.uint8)
    nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
    if nan or inf:
        values = values[values.isfinite()]
    some = values.numel() > 0
    return Tensor(
        name=name,
        shape=list(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        norm=float(torch.linalg.vector_norm(values.double())) if some else None,
        min=float(values.min()) if some else None,
        max=float(values.max()) if some else None,
        nan=nan,
        inf=inf,
        optimized=optimized,
    )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """How many parameters a group has, its learning rate, and all else that is a number, a flag, or a few of them."""
    options = {key: _plain(value) for key, value in group.items() if key not in ("params", "lr")}
    shown = {key: value for key, value in options.items() if value is not None}
    return {"parameters": len(group["params"]), "lr": _plain(group["lr"]), **shown}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        plain = [_plain(each) for each in value]
        return plain if None not in plain else None
    return value if isinstance(value, bool | int | float | str) else None


def page(inside: Inside) -> str:
    """A checkpoint's tensors and learning rates as text."""
    rows: list[tuple[str, ...]] = [("tensor", "shape", "dtype", "norm", "min", "max", "NaN", "Inf", "")]
    rows += [
        (
            each.name,
            "×".join(map(str, each.shape)) or "scalar",
            each.dtype,
            *("" if value is None else f"{value:.6g}" for value in (each.norm, each.min, each.max)),
            *(str(count) if count else "" for count in (each.nan, each.inf)),
            "" if each.optimized else "not optimized",
        )
        for each in inside.tensors
    ]
    table = aligned(rows) if inside.tensors else ""
    lines = [f"checkpoint of step {inside.step}", *(f"  {line}" for line in table.splitlines())]
    for optimizer, groups in inside.optimizers.items():
        for number, group in enumerate(groups):
            options = "  ".join(f"{key} {value}" for key, value in group.items() if key != "parameters")
            lines += ["", f"{optimizer}, group {number}: {group['parameters']} parameters", f"  {options}"]
    return "\n".join(lines)
