"""What trainings from scratch usually need, in one page: digits by a small transformer over their rows.

Warm-up and a cosine by steps, no decay on biases and norms, a smaller rate for the embedding, clipping, bfloat16,
`torch.compile`, batches as dicts from workers with a seed of their own, balanced classes, two validation sets, and
a metric with a state. Take what you need.

Try it:
    python -m tracked.run train experiments/recipe.py --epochs 10 --eval-every "50 steps"
    python -m tracked.run train experiments/recipe.py --max-steps 500 precision=fp32 compile=true workers=2
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import Dataset, WeightedRandomSampler

import tracked
from digits import accuracy, load


@dataclass(frozen=True)
class Params:
    width: int = 64
    layers: int = 2
    lr: float = 3e-3
    embedding_lr: float = 1e-3
    weight_decay: float = 0.05
    warm_up: int = 20  # steps
    steps: int = 230  # that the cosine takes down to a hundredth
    batch_size: int = 64
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = False
    workers: int = 0


class Rows(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]: each row is a token."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedding(images.flatten(1, 2)) + self.position
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


class Worst:
    """The accuracy of the digit that is told worst, over a whole validation set."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right, self.seen = torch.zeros(10), torch.zeros(10)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        found, targets = outputs.argmax(1).cpu(), targets.cpu()
        self.seen += torch.bincount(targets, minlength=10)
        self.right += torch.bincount(targets[found == targets], minlength=10)

    def compute(self) -> Tensor:
        return (self.right / self.seen.clamp(min=1)).min()


class Darker(Dataset[tuple[Tensor, Tensor]]):
    """The same images at half their brightness."""

    def __init__(self, data: Dataset[tuple[Tensor, Tensor]]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        return image / 2, label


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch as a dict: float32 [N, 1, 8, 8], of a brightness of its own, and int64 [N]."""
    images, labels = (torch.stack(column) for column in zip(*samples, strict=True))
    brightness = random.uniform(0.4, 1.2)  # drawn in the worker; `tracked` seeds it for every batch
    return {"images": images * brightness, "labels": labels}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch["images"]), batch["labels"]


def one_thread(_worker: int) -> None:
    """What a worker is to set up for itself before its first batch."""
    torch.set_num_threads(1)


def build(params: Params) -> tracked.Task:
    train_data, val_data = load(shift=1)
    weights = 1 / torch.bincount(train_data.labels).float()
    model = Rows(params.width, params.layers)
    groups = tracked.param_groups(
        model, weight_decay=params.weight_decay, lr={"embedding": params.embedding_lr}
    )
    optimizer = torch.optim.AdamW(groups, lr=params.lr)
    schedules = [
        LinearLR(optimizer, start_factor=0.01, total_iters=params.warm_up),
        CosineAnnealingLR(optimizer, params.steps - params.warm_up, eta_min=params.lr / 100),
    ]
    trained: Any = torch.compile(model) if params.compile else model  # saved under the model's own names
    loader: dict[str, Any] = {
        "sampler": WeightedRandomSampler(weights[train_data.labels].tolist(), len(train_data)),
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available(),
    }
    if params.workers:
        loader |= {
            "num_workers": params.workers,
            "persistent_workers": True,
            "prefetch_factor": 4,
            "worker_init_fn": one_thread,
            "timeout": 60,  # seconds: a worker that hangs ends the run, and a resume goes on
        }
    return tracked.Task(
        model=trained,
        loss=nn.CrossEntropyLoss(label_smoothing=0.05),
        forward=forward,
        optimizer=optimizer,
        scheduler=SequentialLR(optimizer, schedules, milestones=[params.warm_up]),
        scheduler_interval="step",
        train_data=train_data,
        val_data={"val": val_data, "dark": Darker(val_data)},
        batch_size=params.batch_size,
        clip_norm=1.0,
        precision=params.precision,
        loader=loader,
        metrics={"accuracy": accuracy, "worst": Worst()},
        monitor="val/accuracy",
        mode="max",
    )
