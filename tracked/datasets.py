"""How MLflow tells a data set from another: name, digest and shape, found without going through it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from tracked.seeding import preserved_generators, seed_generators

_BYTES_OF_A_LEAF = 1 << 16


def described(data: Dataset[Any], context: str) -> dict[str, str]:
    """What a run tells of a data set that it reads.

    The digest is over its type, its length, and its first, middle and last sample, if it is one of torch's or
    torchvision's own. Of any other, type and length have to do: to draw a sample runs the user's code, which may
    count, or open a file that each worker must open by itself.

    Args:
        data: A data set; its `name`, if it has one, else its class's goes with it.
        context: What it is for: "training", "validation".

    Returns:
        `name`, `digest` (16 hex digits), `schema` and `profile` (JSON as MLflow has it), `context`.
    """
    count = _length(data)
    digest = hashlib.sha256(repr((_type_name(data), count)).encode())
    first: Any = None
    if count and _is_harmless(data):
        try:
            with preserved_generators():
                for number, index in enumerate(sorted({0, count // 2, count - 1})):
                    seed_generators(index)  # what augmentation makes of it is then the same each time
                    sample = data[index]
                    first = sample if number == 0 else first
                    for part in _parts(sample):
                        digest.update(part)
        except Exception:  # noqa: BLE001 - the user's code: a training of it will tell, if it is needed there
            first = None
    name = getattr(data, "name", None)
    return {
        "name": name if isinstance(name, str) and name else type(innermost(data)).__name__,
        "digest": digest.hexdigest()[:16],
        "schema": json.dumps({"mlflow_tensorspec": {"features": _specs(first), "targets": None}}),
        "profile": json.dumps({} if count is None else {"num_rows": count}),
        "context": context,
    }


def merged(inputs: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The inputs with each data set once: MLflow keeps one context of those that a run names of it."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for each in inputs:
        known = found.setdefault((each["name"], each["digest"]), dict(each))
        if each["context"] not in known["context"].split(", "):
            known["context"] += f", {each['context']}"
    return list(found.values())


def innermost(data: Any) -> Any:
    """The data set that others are made of, as `Subset` is."""
    inner = getattr(data, "dataset", None)
    return innermost(inner) if isinstance(inner, Dataset) else data


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except Exception:  # noqa: BLE001 - a stream has none, and one that is wrong is told where it is needed
        return None


def _type_name(data: Any) -> str:
    inner = getattr(data, "dataset", None)
    own = f"{type(data).__module__}.{type(data).__qualname__}"
    return f"{own} of {_type_name(inner)}" if isinstance(inner, Dataset) else own


def _is_harmless(data: Any) -> bool:
    """Whether to draw a sample does nothing else."""
    inner = getattr(data, "dataset", None)
    if isinstance(inner, Dataset):
        return type(data).__module__.startswith("torch.") and _is_harmless(inner)
    return isinstance(data, TensorDataset) or type(data).__module__.startswith("torchvision.datasets")


def _parts(value: Any) -> Iterator[bytes]:
    """What of a sample goes into the digest: of something large its beginning, of something unknown its type."""
    if isinstance(value, torch.Tensor):
        yield repr((tuple(value.shape), str(value.dtype))).encode()
        flat = value.detach().cpu().reshape(-1)[: _BYTES_OF_A_LEAF // max(1, value.element_size())]
        yield flat.contiguous().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray | np.generic):
        yield repr((value.shape, str(value.dtype))).encode()
        yield value.tobytes()[:_BYTES_OF_A_LEAF]
    elif isinstance(value, str | bytes | int | float | bool | None):
        yield repr(value).encode()[:_BYTES_OF_A_LEAF]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _parts(item)
    elif callable(getattr(value, "tobytes", None)):  # a picture of PIL
        yield repr((type(value).__name__, getattr(value, "size", None))).encode()
        yield value.tobytes()[:_BYTES_OF_A_LEAF]
    else:
        yield type(value).__qualname__.encode()


def _specs(sample: Any) -> list[dict[str, Any]]:
    """The tensors of a sample as MLflow's tensor specs, the batch's dimension in front; what is none is left out."""
    if isinstance(sample, Mapping):
        leaves = [(str(key), value) for key, value in sample.items()]
    else:
        items = sample if isinstance(sample, tuple | list) else [sample]
        leaves = [(str(number), value) for number, value in enumerate(items)]
    return [
        {
            "name": name,
            "type": "tensor",
            "tensor-spec": {"dtype": str(array.dtype).removeprefix("torch."), "shape": [-1, *array.shape]},
        }
        for name, value in leaves
        if isinstance(
            array := np.asarray(value) if isinstance(value, int | float) else value, torch.Tensor | np.ndarray
        )
    ]
