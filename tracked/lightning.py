"""Lightning's checkpoints in the run that its own `MLFlowLogger` logs to through the plugin."""

from __future__ import annotations

import logging
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from tracked.address import PLUGIN
from tracked.errors import TrackedError, UsageError
from tracked.logged_run import LoggedRun

log = logging.getLogger("tracked")


class RunCheckpoint(Checkpoint):
    """Saves the whole state of a training with its run, so that `resume RUN -- COMMAND` can go on from there.

    The trainer needs an `MLFlowLogger` whose `tracking_uri` begins with `tracked+`, and
    `trainer.fit(…, ckpt_path=tracked.fetch_checkpoint())`.

    Args:
        every_n_epochs: At the end of every so many epochs; 0 for none.
        every_n_train_steps: Also after every so many steps.
        keep_last: So many stay on the server.

    Raises:
        UsageError: When the training begins: no such logger, or checkpoints that are written later than saved.
    """

    def __init__(
        self, every_n_epochs: int = 1, every_n_train_steps: int | None = None, keep_last: int = 1
    ) -> None:
        self._epochs, self._steps, self._keep_last = every_n_epochs, every_n_train_steps, keep_last
        self._run: LoggedRun | None = None
        self._saved: tuple[Path, int, int, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return  # the loggers of the other ranks know no run
        if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise UsageError(
                "RunCheckpoint cannot know when AsyncCheckpointIO has written a checkpoint",
                expected="one that is written when `save_checkpoint` returns",
                try_next="Trainer(…) without that plugin: RunCheckpoint sends beside the training anyway",
            )
        for logger in trainer.loggers:
            uri = getattr(logger, "_tracking_uri", None)
            if isinstance(logger, MLFlowLogger) and str(uri).startswith(PLUGIN) and logger.run_id:
                self._run = LoggedRun(logger.run_id, uri)
                return
        raise UsageError(
            "RunCheckpoint finds no MLFlowLogger that logs through the plugin",
            expected=f'an address that begins with "{PLUGIN}"',
            try_next=f'Trainer(logger=MLFlowLogger(tracking_uri="{PLUGIN}http://…"))',
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        # Lightning counts this step only after its callbacks; within an accumulation window it is none.
        step = loop._batches_that_stepped + 1  # noqa: SLF001
        if self._steps and step % self._steps == 0 and not loop._should_accumulate():  # noqa: SLF001
            self._save(trainer, step, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epochs and (trainer.current_epoch + 1) % self._epochs == 0:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001
            self._save(trainer, step, trainer.current_epoch + 1)

    def _save(self, trainer: Trainer, step: int, epoch: int) -> None:
        earlier = self._saved if self._saved and self._saved[1] == step else None
        if earlier is None:
            self._send()
        path = Path(trainer.strategy.broadcast(str(Path(self._folder.name) / f"{step}-{epoch}.ckpt")))
        trainer.save_checkpoint(path)  # on every rank: it may gather what is spread over them
        if trainer.is_global_zero:
            if earlier is not None:
                _remove(earlier[0])  # as it was before the epoch's end
            # What it logs first where it goes on; `global_step` counts the steps of each optimizer.
            next_step = trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001
            self._saved = (path, step, next_step, epoch)

    # Lightning logs a step's metrics, and an epoch's, only after it has called the callbacks of its end. They belong
    # to the checkpoint, so it is sent with whatever is called next.

    def on_train_batch_start(self, *_: Any) -> None:
        self._send()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._send()

    def on_train_end(self, *_: Any) -> None:
        self._send()

    def on_exception(self, *_: Any) -> None:
        self._send()

    def _send(self) -> None:
        if self._saved is None or self._run is None:
            return
        path, step, next_step, epoch = self._saved
        self._saved = None
        try:
            self._run.save_checkpoint(path, step, next_step=next_step, epoch=epoch, keep_last=self._keep_last)
        except TrackedError as error:  # a full disk does not end a training
            log.warning("%s", error)
        _remove(path)

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="tracked-lightning-")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)  # a CheckpointIO may write elsewhere
