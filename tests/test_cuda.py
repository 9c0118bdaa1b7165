"""On a GPU: a resume is exact there too, and a checkpoint goes from one kind of device to the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import tracked
from tests.trainings import differing, fitting, nothing, train
from tracked.loop import choose_device
from tracked.schedule import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SETTINGS = Settings(
    epochs=3, checkpoint_every="2 steps", keep_last=99, device="cuda", deterministic=True, patience=9
)


def task(**changes: Any) -> tracked.Task:
    """Four steps an epoch, with dropout, so that the device's generator counts, and buffers."""
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1))
    defaults: dict[str, Any] = {
        "model": model,
        "loss": nn.functional.mse_loss,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "train_data": data,
        "val_data": data,
        "batch_size": 8,
    }
    return tracked.Task(**{**defaults, **changes})


def test_auto_is_the_gpu() -> None:
    assert choose_device("auto").type == "cuda"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resume_from_every_checkpoint_is_exact(precision: str, accumulate: int, tmp_path: Path) -> None:
    body = fitting(lambda: task(precision=precision, accumulate=accumulate, clip_norm=1.0))
    found = differing(tmp_path, body, SETTINGS)
    assert found == nothing(found)


@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_goes_from_one_device_to_the_other(first: str, then: str, tmp_path: Path) -> None:
    body = fitting(task)
    half = train(tmp_path, body, replace(SETTINGS, epochs=1, device=first))
    whole = train(tmp_path, body, replace(SETTINGS, device=first))
    resumed = train(tmp_path, body, replace(SETTINGS, device=then), half.last, half)

    assert resumed.run.step == whole.run.step == 12
    a, b = (each.last["model_state_dict"] for each in (whole, resumed))
    assert all(value.device.type == "cpu" for value in b.values()), "as any machine can load it"
    # The generators of the two devices draw other dropouts: near, and trained at all.
    assert all(torch.isfinite(value).all() for value in b.values())
    assert any(not value.equal(half.last["model_state_dict"][name]) for name, value in b.items())
    assert a.keys() == b.keys()


def test_the_loss_is_logged_without_waiting_for_the_device(tmp_path: Path) -> None:
    found = train(tmp_path, fitting(task), SETTINGS)
    losses = [float(value) for key, _, value in found.points if key == "train/loss"]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
