"""Metrics of torchmetrics in the thin loop are what they give by hand, at every evaluation and after every resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import AUROC, Accuracy, MetricCollection
from torchmetrics.detection import MeanAveragePrecision

import tracked
from tests.trainings import Trained, differing, fitting, nothing, train
from tracked.schedule import Settings

# Evaluated and saved in the middle of an epoch, too.
SETTINGS = Settings(epochs=2, device="cpu", keep_last=100, eval_every="2 steps", checkpoint_every="2 steps")
THREE: dict[str, Any] = {"task": "multiclass", "num_classes": 3}


def clusters(samples: int, seed: int) -> TensorDataset:
    """Points [N, 2] around one of three centres, and which, int64 [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    centres = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    return TensorDataset(centres[labels] + torch.randn(samples, 2, generator=generator), labels)


NEAR, FAR = (
    clusters(23, seed=1),
    clusters(17, seed=2),
)  # 17 is no multiple of the batch: the last one is smaller


def classifying(metrics: Callable[[], dict[str, Any]], **more: Any) -> Callable[[], tracked.Task]:
    def build() -> tracked.Task:
        model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        return tracked.Task(
            model=model,
            loss=nn.functional.cross_entropy,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
            train_data=clusters(24, seed=0),
            val_data={"near": NEAR, "far": FAR},
            batch_size=4,
            metrics=metrics(),
            monitor="far/loss",
            **more,
        )

    return build


def objects() -> dict[str, Any]:
    accuracy = Accuracy(**THREE)
    accuracy.persistent(mode=True)  # the state it has gathered stands in each checkpoint
    both = MetricCollection({"top2": Accuracy(**THREE, top_k=2), "micro": Accuracy(**THREE)})
    return {"accuracy": accuracy, "auroc": AUROC(**THREE), "both": both}


def values(trained: Trained, key: str) -> dict[int, float]:
    return {step: float(value) for name, step, value in trained.points if name == key}


def test_accuracy_and_auroc_of_every_evaluation_and_set_are_those_of_all_its_samples_at_once(
    tmp_path: Path,
) -> None:
    build = classifying(objects)
    found = train(tmp_path, fitting(build), SETTINGS)
    model = build().model
    for step in range(2, 13, 2):
        model.load_state_dict(found.state(step)["model_state_dict"])
        for name, data in (("near", NEAR), ("far", FAR)):
            inputs, targets = data.tensors
            with torch.no_grad():
                outputs = model(inputs)
            accuracy = (outputs.argmax(1) == targets).double().mean().item()
            assert values(found, f"{name}/accuracy")[step] == pytest.approx(accuracy)
            assert values(found, f"{name}/both/micro")[step] == pytest.approx(accuracy)
            top2 = (outputs.topk(2).indices == targets[:, None]).any(1).double().mean().item()
            assert values(found, f"{name}/both/top2")[step] == pytest.approx(top2)
            whole = pairwise_auroc(outputs.softmax(1), targets)
            assert values(found, f"{name}/auroc")[step] == pytest.approx(whole)
    assert {key.partition("/")[0] for key, *_ in found.points} == {"train", "lr", "epoch", "near", "far"}


def pairwise_auroc(scores: Tensor, targets: Tensor) -> float:
    """Over the classes the mean share of pairs in which the sample of the class has the higher score."""
    shares = []
    for label in range(3):
        its, others = scores[targets == label, label], scores[targets != label, label]
        higher = (its[:, None] > others).double() + 0.5 * (its[:, None] == others).double()
        shares.append(higher.mean())
    return torch.stack(shares).mean().item()


def test_a_resume_between_evaluations_computes_the_same_metrics(tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint_every=("3 steps", "4 steps"))
    found = differing(tmp_path, fitting(classifying(objects)), settings)
    assert found == nothing(found)
    assert {3, 4} < found.keys()


# -- detection: boxes of different numbers


class Boxes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Boxes [n, 4] that are too small by a part of their sides, and as they should be, with labels; n from 1 to 3."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items = []
        for number in range(samples):
            corners = 50 * torch.rand(1 + number % 3, 2, generator=generator)
            boxes = torch.cat(
                [corners, corners + 20 + 20 * torch.rand(corners.shape, generator=generator)], 1
            )
            labels = torch.arange(len(boxes)) % 2
            small = torch.cat([corners, corners + (boxes[:, 2:] - corners) * 0.5], 1)
            self.items.append((small, {"boxes": boxes, "labels": labels}))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.items[index]


class Grow(nn.Module):
    """Learns by how much the boxes have to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, small: list[Tensor]) -> list[dict[str, Tensor]]:
        """One detection for each box, the first of an image the surest."""
        found = []
        for each in small:
            boxes = torch.cat([each[:, :2], each[:, :2] + (each[:, 2:] - each[:, :2]) * self.factor], 1)
            scores = 1 - torch.arange(len(each)) / 4
            found.append({"boxes": boxes, "scores": scores, "labels": torch.arange(len(each)) % 2})
        return found


def too_small(outputs: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> Tensor:
    pairs = zip(outputs, targets, strict=True)
    return torch.cat([(a["boxes"] - b["boxes"]).abs().flatten() for a, b in pairs]).mean()


def as_lists(samples: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return [small for small, _ in samples], [target for _, target in samples]


def detecting(**more: Callable[[], Any]) -> Callable[[], tracked.Task]:
    def build() -> tracked.Task:
        model = Grow()
        return tracked.Task(
            model=model,
            loss=too_small,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.03),
            train_data=Boxes(10, seed=0),
            val_data=Boxes(7, seed=1),
            batch_size=3,
            loader={"collate_fn": as_lists},
            **{key: make() for key, make in more.items()},
        )

    return build


def precision_by_hand(state: dict[str, Any]) -> dict[str, Tensor]:
    """Mean average precision of a checkpoint's model over the validation set, all samples at once."""
    model = Grow()
    model.load_state_dict(state["model_state_dict"])
    metric = MeanAveragePrecision()
    with torch.no_grad():
        small, targets = as_lists(Boxes(7, seed=1).items)
        metric.update(model(small), targets)
    found: dict[str, Tensor] = metric.compute()
    return found


def test_mean_average_precision_as_a_metric_is_that_of_all_detections_at_once(tmp_path: Path) -> None:
    build = detecting(metrics=lambda: {"coco": MeanAveragePrecision()})
    found = train(tmp_path, fitting(build), SETTINGS)
    for step in (2, 4, 6, 8):
        expected = precision_by_hand(found.state(step))
        for key in ("map", "map_50", "mar_10"):
            assert values(found, f"val/coco/{key}")[step] == pytest.approx(float(expected[key]))
    assert len({*values(found, "val/coco/map").values()}) > 2, "it must have changed to show anything"
    assert not values(found, "val/coco/classes"), "two classes are no single number"


def test_mean_average_precision_resumes_exactly_as_a_metric_and_in_an_evaluation_of_ones_own(
    tmp_path: Path,
) -> None:
    def evaluate(model: nn.Module, batches: Iterator[Any]) -> dict[str, Any]:
        metric = MeanAveragePrecision()
        for small, targets in batches:
            metric.update(model(small), targets)
        return {"loss": 0.0, **metric.compute()}  # with the classes, which are no single number

    settings = replace(SETTINGS, epochs=1)
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "metric": {"metrics": lambda: {"coco": MeanAveragePrecision()}},
        "evaluate": {"evaluate": lambda: evaluate},
    }
    for name, more in ways.items():
        found = differing(tmp_path / name, fitting(detecting(**more)), settings)
        assert found == nothing(found)
    trained = train(tmp_path, fitting(detecting(evaluate=lambda: evaluate)), settings)
    expected = float(precision_by_hand(trained.last)["map"])
    assert values(trained, "val/map")[4] == pytest.approx(expected)
