"""Two networks against each other, in a loop of your own: a generator of digits, and a discriminator that judges them.

Everything that learns is attached by its name, both optimizers too, and a resumed run goes on with all of it: the
noise is drawn from torch's generator, which `run.batches` seeds. After each epoch the same 64 points of the
generator's space are drawn, so the pictures under the run's artifacts show how they become digits.

Try it:
    python -m tracked.run train experiments/gan.py --epochs 60
    python -m tracked.run resume last --epochs 120
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tracked
from digits import load

EPOCHS = 60
judge = nn.functional.binary_cross_entropy_with_logits


@dataclass(frozen=True)
class Params:
    noise: int = 16
    hidden: int = 128
    lr: float = 1e-3
    batch_size: int = 64


def networks(noise: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """Noise [N, noise] to images [N, 1, 8, 8] in 0…1, and images to the logit that they are real, [N, 1]."""
    generator = nn.Sequential(
        nn.Linear(noise, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, 64),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, 8, 8)),
    )
    discriminator = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, hidden),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(hidden, 1),
    )
    return generator, discriminator


def main(run: tracked.Run, params: Params) -> None:
    train_data, _ = load(shift=0)
    generator, discriminator = networks(params.noise, params.hidden)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=params.lr, betas=(0.5, 0.999))
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=params.lr, betas=(0.5, 0.999))
    run.attach(
        generator=generator,
        discriminator=discriminator,
        generator_optimizer=generator_optimizer,
        discriminator_optimizer=discriminator_optimizer,
    )
    shown = torch.randn(64, params.noise, generator=torch.Generator().manual_seed(0))

    for images, _ in run.batches(train_data, batch_size=params.batch_size, epochs=EPOCHS, drop_last=True):
        real, not_real = torch.ones(len(images), 1), torch.zeros(len(images), 1)
        drawn = generator(torch.randn(len(images), params.noise))

        told_apart = judge(discriminator(images), real) + judge(discriminator(drawn.detach()), not_real)
        discriminator_optimizer.zero_grad()
        told_apart.backward()
        discriminator_optimizer.step()

        taken_for_real = judge(discriminator(drawn), real)
        generator_optimizer.zero_grad()
        taken_for_real.backward()
        generator_optimizer.step()

        run.log({"discriminator/loss": told_apart, "generator/loss": taken_for_real})
        if run.epoch_ended:
            run.log_figure(picture(generator, shown), f"drawn/epoch-{run.epoch:04d}.png")
            run.draw_curves(["discriminator/loss", "generator/loss"])


@torch.no_grad()
def picture(generator: nn.Module, noise: Tensor) -> Figure:
    """What the generator makes of 64 points, eight by eight."""
    generator.eval()
    images = generator(noise)
    generator.train()
    framed = nn.functional.pad(images, (1,) * 4).view(8, 8, 10, 10)
    rows = framed.transpose(1, 2).reshape(80, 80)
    figure = Figure(figsize=(3, 3))
    axes = figure.subplots()
    axes.imshow(rows.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
    return figure
