"""MNIST with a network of three linear layers, the same one that the benchmarks train.

Try it:
    python -m tracked.run train experiments/mnist.py --epochs 5 download=true
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tracked
from tracked.errors import ExperimentError


@dataclass(frozen=True)
class Params:
    hidden: int = 64
    lr: float = 1e-3
    batch_size: int = 64
    data: str = "data"  # the folder that holds MNIST/raw
    download: bool = False


class SimpleNet(nn.Module):
    """Images [N, 1, 28, 28] (or [N, 784]) to logits [N, 10]."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, one row per image."""
        logits: Tensor = self.layers(images)
        return logits


def load(root: str, *, train: bool, download: bool) -> TensorDataset:
    """MNIST's images, float32 [N, 1, 28, 28] in -1…1, and labels, int64 [N].

    Raises:
        ExperimentError: The files are not under `root`, and `download` is off.
    """
    from torchvision.datasets import MNIST  # takes a second, and SimpleNet does not need it

    try:
        raw = MNIST(root, train=train, download=download)
    except RuntimeError as error:
        raise ExperimentError(
            f"no MNIST under {root!r}: {error}",
            expected=f"its IDX files in {root}/MNIST/raw",
            try_next="add download=true (fetches 12 MB once), or data=FOLDER",
        ) from error
    # What ToTensor and Normalize(0.5, 0.5) compute, in their order, so the bits are theirs. Done once for all
    # images, not for each image in each epoch again; a batch is then one indexing call.
    images = raw.data.unsqueeze(1).float().div(255).sub(0.5).div(0.5)
    return TensorDataset(images, raw.targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of images whose largest logit is the right one, a scalar."""
    return (outputs.argmax(1) == targets).float().mean()


def build(params: Params) -> tracked.Task:
    model = SimpleNet(params.hidden)
    return tracked.Task(
        model=model,
        loss=nn.functional.cross_entropy,
        optimizer=torch.optim.Adam(model.parameters(), lr=params.lr),
        train_data=load(params.data, train=True, download=params.download),
        val_data=load(params.data, train=False, download=params.download),
        batch_size=params.batch_size,
        metrics={"accuracy": accuracy},
        monitor="val/accuracy",
        mode="max",
    )
