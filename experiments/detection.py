"""Finding rectangles: targets of different lengths, a loss in `step`, mean average precision in `evaluate`.

An image has one to three rectangles, so targets do not stack: a batch is a tensor of images and a list of dicts.
The network has no anchors: in each cell of 8×8 pixels it says whether a rectangle's centre is there, how far its
sides are, and of which kind it is (FCOS in small, https://arxiv.org/abs/1904.01355). In half a minute on a CPU
map_50 is above 0.85.

The metric is torchmetrics' own:
    pip install torchmetrics pycocotools
Try it:
    python -m tracked.run train experiments/detection.py --epochs 12
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import batched_nms

import tracked
from tracked.errors import ExperimentError

SIZE, CELL, KINDS = 64, 8, 2  # pixels, pixels, filled or hollow
Boxes = dict[str, Tensor]
Batch = tuple[Tensor, list[Boxes]]


@dataclass(frozen=True)
class Params:
    width: int = 16
    lr: float = 4e-3
    batch_size: int = 32
    samples: int = 768


class Rectangles(Dataset[tuple[Tensor, Boxes]]):
    """Images [1, 64, 64] in 0…1 with noise; boxes [n, 4] as x1, y1, x2, y2 in pixels, labels int64 [n]."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items = [self.drawn(generator) for _ in range(samples)]

    def drawn(self, generator: torch.Generator) -> tuple[Tensor, Boxes]:
        image = 0.2 * torch.rand(1, SIZE, SIZE, generator=generator)
        count = int(torch.randint(1, 4, (), generator=generator))
        sides = torch.randint(10, 25, (count, 2), generator=generator)
        corners = (torch.rand(count, 2, generator=generator) * (SIZE - sides)).long()
        labels = torch.randint(KINDS, (count,), generator=generator)
        boxes = torch.cat([corners, corners + sides], 1)
        for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            image[0, top:bottom, left:right] += 0.6
            if label:
                image[0, top + 3 : bottom - 3, left + 3 : right - 3] -= 0.6
        return image.clamp_(0, 1), {"boxes": boxes.float(), "labels": labels}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Boxes]:
        return self.items[index]


def collate(samples: list[tuple[Tensor, Boxes]]) -> Batch:
    """Images [N, 1, 64, 64], and their targets as they are."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)


class Detector(nn.Module):
    """Images [N, 1, 64, 64] to a score, four distances in cells and a logit per kind: [N, 64, 5 + KINDS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [1, width, 2 * width, 4 * width]
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(channels)
        ]
        wide = nn.Conv2d(channels[-1], channels[-1], 5, padding=2)  # sees whole rectangles
        self.layers = nn.Sequential(*blocks, wide, nn.ReLU(), nn.Conv2d(channels[-1], 5 + KINDS, 1))

    def forward(self, images: Tensor) -> Tensor:
        """What each cell says, row by row."""
        said: Tensor = self.layers(images).flatten(2).transpose(1, 2)
        return torch.cat([said[..., :1], said[..., 1:5].exp(), said[..., 5:]], -1)


def loss(said: Tensor, targets: list[Boxes]) -> Tensor:
    """The mean over images of what their scores, sides and kinds lack, a scalar."""
    image = torch.cat([torch.full_like(each["labels"], i) for i, each in enumerate(targets)])
    boxes = torch.cat([each["boxes"] for each in targets]) / CELL
    labels = torch.cat([each["labels"] for each in targets])
    column, row = ((boxes[:, :2] + boxes[:, 2:]) / 2).long().unbind(1)
    cell = row * (SIZE // CELL) + column
    is_centre = torch.zeros_like(said[..., 0])
    is_centre[image, cell] = 1.0
    middle = torch.stack([column, row], 1) + 0.5
    distances = torch.cat([middle - boxes[:, :2], boxes[:, 2:] - middle], 1)
    found = said[image, cell]
    score = nn.functional.binary_cross_entropy_with_logits(said[..., 0], is_centre, reduction="sum")
    sides = nn.functional.smooth_l1_loss(found[:, 1:5], distances, reduction="sum")
    kinds = nn.functional.cross_entropy(found[:, 5:], labels, reduction="sum")
    return (score + sides + kinds) / len(targets)


def step(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The mean loss, and how many images it is over."""
    images, targets = batch
    return loss(model(images), targets), len(images)


def detections(said: Tensor) -> list[Boxes]:
    """For each image boxes [n, 4] in pixels, scores [n] and labels [n]; of those that overlap the likeliest."""
    cells = torch.arange(said.shape[1], device=said.device)
    middle = torch.stack([cells % (SIZE // CELL), cells // (SIZE // CELL)], 1) + 0.5
    scores, boxes = said[..., 0].sigmoid(), torch.cat([middle - said[..., 1:3], middle + said[..., 3:5]], -1)
    labels = said[..., 5:].argmax(-1)
    found = []
    for box, score, label in zip(boxes * CELL, scores, labels, strict=True):
        kept = batched_nms(box, score, label, 0.5)[:10]
        found.append({"boxes": box[kept], "scores": score[kept], "labels": label[kept]})
    return found


def precision() -> Any:
    """The metric: mean average precision over overlaps from 0.5 to 0.95, as COCO has it.

    Raises:
        ExperimentError: A package that it needs is missing.
    """
    try:
        import pycocotools  # noqa: F401 - torchmetrics asks for it only when there is something to compute
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise ExperimentError(
            f"mean average precision cannot be computed: {error}",
            expected="torchmetrics and pycocotools",
            try_next="pip install torchmetrics pycocotools",
        ) from error
    return MeanAveragePrecision()


def evaluate(model: nn.Module, loader: Iterator[Batch]) -> dict[str, Any]:
    """Loss and mean average precision; the model is in eval mode, and the batches are on its device."""
    metric = precision()  # a new one for each evaluation: nothing of it has to be resumed
    total, count = 0.0, 0
    for images, targets in loader:
        said = model(images)
        metric.update(detections(said), targets)
        total, count = total + float(loss(said, targets)) * len(images), count + len(images)
    found = metric.compute()
    return {"loss": total / count, "map": found["map"], "map_50": found["map_50"]}


def build(params: Params) -> tracked.Task:
    precision()  # what is missing is told now, and not after the first epoch
    model = Detector(params.width)
    return tracked.Task(
        model=model,
        step=step,
        evaluate=evaluate,
        optimizer=torch.optim.Adam(model.parameters(), lr=params.lr),
        train_data=Rectangles(params.samples, seed=0),
        val_data=Rectangles(params.samples // 6, seed=1),
        batch_size=params.batch_size,
        loader={"collate_fn": collate},
        monitor="val/map",
        mode="max",
    )
