"""A look inside a checkpoint: its tensors and learning rates, as they are."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.processes import Workplace
from tests.test_commands import place_of, silent
from tracked.retrieval import retrieve
from tracked.tensors import look_inside, modules, page

NAN, INF = math.nan, math.inf


def a_state(**tensors: torch.Tensor) -> dict[str, object]:
    """A checkpoint of step 3 whose model has these tensors."""
    return {"step": 3, "model_state_dict": tensors}


@pytest.mark.parametrize(
    ("tensor", "norm", "smallest", "largest", "nan", "inf"),
    [
        (torch.tensor([[3.0, -4.0]]), 5, -4, 3, 0, 0),
        (torch.tensor([NAN, 3.0, INF, 4.0, -INF]), 5, 3, 4, 1, 2),
        (torch.tensor([NAN]), None, None, None, 1, 0),
        (torch.zeros(0, 4), None, None, None, 0, 0),
        (torch.tensor(7), 7, 7, 7, 0, 0),
        (torch.tensor([True, False]), 1, 0, 1, 0, 0),
        (torch.tensor([300.0] * 4, dtype=torch.float16), 600, 300, 300, 0, 0),
        (torch.full((4,), 3e4, dtype=torch.float16), 6e4, 3e4, 3e4, 0, 0),
        (torch.tensor([2.0, 1.5]).to(torch.float8_e4m3fn), 2.5, 1.5, 2, 0, 0),
        (torch.tensor([3 + 4j]), 5, 5, 5, 0, 0),
    ],
)
def test_a_tensor_is_measured_by_its_finite_elements(
    tensor: torch.Tensor, norm: float, smallest: float, largest: float, nan: int, inf: int
) -> None:
    (found,) = look_inside(a_state(x=tensor)).tensors

    assert (found.name, found.shape) == ("model.x", list(tensor.shape))
    assert f"torch.{found.dtype}" == str(tensor.dtype)
    assert (found.norm, found.min, found.max) == (norm, smallest, largest)
    assert (found.nan, found.inf) == (nan, inf)


def test_modules_are_told_from_other_parts() -> None:
    weight = torch.ones(2)
    state = {
        **a_state(weight=weight, _extra_state=torch.ones(1)),
        "ema_state_dict": {"weight": weight, "_extra_state": {"updates": 3}},
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "scaler_state_dict": {},
        "running_loss_state_dict": {"total": weight, "count": 1},
        "metric_f1_state_dict": {"total": weight},
        "step": 3,
    }

    assert {name: list(tensors) for name, tensors in modules(state).items()} == {
        "model": ["weight", "_extra_state"],
        "ema": ["weight"],
    }


def test_show_prints_the_committed_checkpoints_tensors_and_rates(workplace: Workplace) -> None:
    line = ("train", workplace.experiment(), "lr=0.25", "--epochs", 1, "--json")
    run_id = workplace.tracked(*line).json["run_id"]
    state = retrieve(place_of(workplace), run_id, workplace.path / "here", silent).state

    told = workplace.tracked("show", run_id, "--tensors", "--json").json
    text = workplace.tracked("show", "last", "--tensors").stdout

    assert (told["run_id"], told["state"], told["checkpoint_step"]) == (run_id, "finished", 8)
    assert {each["name"]: each["norm"] for each in told["tensors"]} == {
        f"model.{name}": float(value.double().norm()) for name, value in state["model_state_dict"].items()
    }
    assert all(each["optimized"] for each in told["tensors"])
    (group,) = told["optimizers"]["optimizer"]
    assert (group["parameters"], group["lr"], group["nesterov"]) == (4, 0.25, False)
    assert "model.0.weight  4×4    float32" in text
    assert "optimizer, group 0: 4 parameters\n  lr 0.25  momentum 0" in text
    assert "checkpoints\n" in text


def test_a_tied_weight_is_optimized_under_each_of_its_names() -> None:
    weight = torch.ones(2, 2)
    state = {
        **a_state(first=weight, second=weight, other=torch.ones(2, 2)),
        "optimizer_parameters": {"optimizer": [["model.first"]]},
        "optimizer_state_dict": {"param_groups": [{"params": [0], "lr": 0.5}]},
    }

    assert [each.optimized for each in look_inside(state).tensors] == [True, True, False]


def test_what_is_wrong_with_a_tensor_stands_in_its_row() -> None:
    state = {
        **a_state(weight=torch.tensor([NAN, 1.0]), steps=torch.tensor(5)),
        "optimizer_parameters": {"optimizer": [["model.weight"]]},
        "optimizer_state_dict": {
            "param_groups": [{"params": [0], "lr": torch.tensor(0.5), "betas": (0.9, 0.99), "foreach": None}]
        },
        "other_buffers": {"model.mask": torch.ones(2)},
    }

    inside = look_inside(state)
    rows = page(inside).splitlines()

    assert rows[0] == "checkpoint of step 3"
    assert rows[1].split() == ["tensor", "shape", "dtype", "norm", "min", "max", "NaN"]
    assert rows[2].split() == ["model.weight", "2", "float32", "1", "1", "1", "1"]
    assert rows[3].split() == ["model.steps", "scalar", "int64", "5", "5", "5", "not", "optimized"]
    assert rows[4].split()[0] == "model.mask"
    assert inside.optimizers == {"optimizer": [{"parameters": 1, "lr": 0.5, "betas": [0.9, 0.99]}]}
    json.dumps(inside.as_json(), allow_nan=False)
