"""The delivery of what other MLflow code has logged to a run through the plugin."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, ClassVar

from tracked.delivery import Delivery
from tracked.errors import RecordRejected
from tracked.journal import Place, Reader
from tracked.names import MANIFEST, folder_name
from tracked.resumption import pointer_in
from tracked.spool import is_held, read_json


class CallDelivery(Delivery):
    """The journal of what other MLflow code logs to a run: many may write to one, so there is no right to it.

    A process that is gone has its say before any that came after it.
    """

    _STAND_ALONE: ClassVar = {"damaged", "status"}

    def is_open(self) -> bool:
        if any(_has_points(older) for older in self._ended_before()):
            return False
        if self.view is None:
            self.view = self.server.get_run(self.run.handle)
            self.tell(run_id=self.view.run_id, url=self.server.url(self.view), trouble="")
        return True

    def _may_send(self) -> bool:
        return True

    def _ended_before(self) -> list[Path]:
        """Journals that were written before this one, by processes that have let go of them."""
        older = [journal for journal in self.run.journals() if journal.name < self.folder.name]
        return [journal for journal in older if journal.exists() and not is_held(journal / "lock")]

    def _send_by_itself(self, kind: str, body: Any) -> None:
        assert self.view is not None
        if kind == "status":
            try:
                self.server.set_status(self.view.run_id, body["status"], body["end_time"])
            except RecordRejected as error:
                self._reject("status", body, error)
        else:
            super()._send_by_itself(kind, body)

    def _is_time(self) -> bool:
        return super()._is_time() or self.run.is_wanted()

    def beat(self) -> None:
        pass  # as with MLflow itself: a run whose program was killed goes on running there

    def send_file(self) -> bool:
        return not self._ended_before() and super().send_file()

    def _send_checkpoint(self, body: dict[str, Any], end: Place) -> bool:
        done = super()._send_checkpoint(body, end)
        local = self.run.checkpoints / folder_name(body["step"])
        if done and read_json(local / MANIFEST).get("sha256") == body["sha256"]:
            shutil.rmtree(local, ignore_errors=True)  # who wrote it has it, and so has the server
        return done

    def _is_outdated(self, body: dict[str, Any]) -> bool:
        assert self.view is not None
        standing = pointer_in(self.server.get_run(self.view.run_id).tags)
        return standing is not None and bool(standing["step"] > body["step"])

    def _kept(self, body: dict[str, Any]) -> set[int]:
        return {*sorted({*self._steps_on_server(), body["step"]})[-body["keep_last"] :]}

    def send_picture(self) -> bool:
        return False

    def close_if_done(self) -> bool:
        if self.reader.is_written() or not self._at_end():
            return False
        self._close()
        if not self.run.journals() and not (self.run.path / "rejected.jsonl").exists():
            for name in ("run.json", "wanted"):
                (self.run.path / name).unlink(missing_ok=True)
            for folder in (self.run.checkpoints, self.run.path):
                with contextlib.suppress(OSError):  # another process begins a journal, or saves a checkpoint
                    folder.rmdir()
        return True


def _has_points(journal: Path) -> bool:
    reader = Reader(journal, ("points",))
    return reader.cursor("points") < reader.end()
