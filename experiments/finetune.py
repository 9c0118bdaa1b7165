"""Transfer learning: a frozen ResNet-18 with a new head, whose last block joins in at epoch 3.

The data is a folder of images, one folder per class (with `train` and `val` above them, or split here);
without one, striped pictures are drawn. `weights` is one of torchvision's ("DEFAULT", fetched once), a file,
or another run. Without any, the backbone is random, which is enough for the stripes and for nothing else.

Try it:
    python -m tracked.run train experiments/finetune.py --epochs 4
    python -m tracked.run train experiments/finetune.py data=FOLDER size=224 weights=DEFAULT
    python -m tracked.run train experiments/finetune.py weights=run:RUN_ID
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

import tracked
from tracked import finetune
from tracked.errors import ExperimentError

# The mean and spread of ImageNet's channels, which torchvision's models were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 4


@dataclass(frozen=True)
class Params:
    model: str = "resnet18"
    weights: str = ""
    data: str = ""
    size: int = 64  # pixels
    unfreeze: int = 3  # the epoch at which layer4 begins to train; 0: never
    lr: float = 3e-3
    batch_size: int = 32
    samples: int = 384  # drawn, where there is no folder
    workers: int = 0


def drawn(samples: int, size: int) -> tuple[TensorDataset, TensorDataset]:
    """Noisy stripes in four directions, five sixths to train on: float32 [N, 3, size, size], normalised."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % CLASSES
    angles = labels * math.pi / CLASSES + 0.1 * torch.randn(samples, generator=generator)
    phases = 2 * math.pi * torch.rand(samples, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    along = angles.cos().view(-1, 1, 1) * columns + angles.sin().view(-1, 1, 1) * rows
    stripes = (along * (2 * math.pi / 8) + phases.view(-1, 1, 1)).sin().unsqueeze(1)
    colours = 0.5 + torch.rand(samples, 3, 1, 1, generator=generator)
    images = stripes * colours + 0.5 * torch.randn(samples, 3, size, size, generator=generator)
    cut = samples - samples // 6
    return TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:])


def folder(root: Path, size: int) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Images of a folder to train on (cropped and flipped anew each time) and to validate on, and the classes.

    Raises:
        ExperimentError: There are no images in folders under `root`.
    """
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    ends = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    # torchvision draws from torch's generator, which `tracked` seeds for every batch.
    varied = transforms.Compose(
        [transforms.RandomResizedCrop(size, scale=(0.5, 1.0)), transforms.RandomHorizontalFlip(), *ends]
    )
    fixed = transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *ends])
    halves = (root / "train", root / "val")
    split = all(half.is_dir() for half in halves)
    try:
        train, val = (
            ImageFolder(str(half if split else root), transform)
            for half, transform in zip(halves, (varied, fixed), strict=True)
        )
    except FileNotFoundError as error:
        raise ExperimentError(
            f"no images under {str(root)!r}: {error}",
            expected="a folder for each class, with images in it, or these under train and val",
            try_next="data=FOLDER",
        ) from error
    if split:
        return train, val, len(train.classes)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(order) - max(1, len(order) // 6)
    return Subset(train, order[:cut]), Subset(val, order[cut:]), len(train.classes)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of images whose largest logit is the right one, a scalar."""
    return (outputs.argmax(1) == targets).float().mean()


def build(params: Params) -> tracked.Task:
    train_data: Dataset[Any]
    val_data: Dataset[Any]
    if params.data:
        train_data, val_data, classes = folder(Path(params.data), params.size)
    else:
        (train_data, val_data), classes = drawn(params.samples, params.size), CLASSES

    model = finetune.pretrained(params.model, params.weights or None, head=classes)
    finetune.freeze(model, "*")
    finetune.unfreeze(model, "fc")
    schedule = {params.unfreeze: "layer4"} if params.unfreeze else {}
    # Over all that will ever train: what is frozen has no gradient, and the optimizer passes it over.
    optimizer = torch.optim.AdamW(finetune.trainable(model, also=schedule), lr=params.lr)
    return tracked.Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        train_data=train_data,
        val_data=val_data,
        batch_size=params.batch_size,
        metrics={"accuracy": accuracy},
        monitor="val/accuracy",
        mode="max",
        loader={"num_workers": params.workers},
        unfreeze=schedule,
    )
