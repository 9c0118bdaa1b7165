"""The checkpoints of Hugging Face's Trainer in the run that its own MLflow callback logs to through the plugin."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlflow
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tracked.address import PLUGIN
from tracked.errors import TrackedError, UsageError
from tracked.logged_run import LoggedRun

log = logging.getLogger("tracked")


class RunCheckpoint(TrainerCallback):
    """Sends each checkpoint that the Trainer saves, so that `resume RUN -- COMMAND` can go on from there.

    `MLFLOW_TRACKING_URI` has to begin with `tracked+`, and the training with
    `trainer.train(resume_from_checkpoint=tracked.fetch_checkpoint())`. When to save is the Trainer's own setting
    (`save_strategy`, `save_steps`).

    Args:
        keep_last: So many stay on the server.
    """

    def __init__(self, keep_last: int = 1) -> None:
        self._keep_last = keep_last
        self._run: LoggedRun | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the run.

        Raises:
            UsageError: There is none, or it is not logged to through the plugin.
        """
        if not state.is_world_process_zero:
            return
        active, uri = mlflow.active_run(), mlflow.get_tracking_uri()
        if active is None or not uri.startswith(PLUGIN):
            raise UsageError(
                "RunCheckpoint finds no MLflow run that is logged to through the plugin",
                expected=f'report_to=["mlflow"], and an address that begins with "{PLUGIN}"',
                try_next=f"MLFLOW_TRACKING_URI={PLUGIN}http://…",
            )
        self._run = LoggedRun(active.info.run_id, uri)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            # The Trainer has logged this step's points before it saves.
            epoch = int(state.epoch or 0)
            try:
                self._run.save_checkpoint(folder, state.global_step, epoch=epoch, keep_last=self._keep_last)
            except TrackedError as error:
                # Neither a full disk nor a search that saves elsewhere ends a training.
                log.warning("%s", error)
