"""One journal on its way to the server: what is sent when, what is never sent twice, and who may send at all.

Two lanes share a journal: params, tags and points in order, and checkpoints and artifacts. Pictures are drawn from
the histories on the server. A checkpoint's pointer joins the lanes: it is sent when its file is verified on the
server and all points appended before it are acknowledged.

Whatever a server answers, short of finding a record invalid, the queue is held and tried again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tracked import description, flavour
from tracked.archive import digest
from tracked.errors import (
    CheckpointError,
    NoSuchRun,
    RecordRejected,
    ServerError,
    ServerRefused,
    ServerUnavailable,
)
from tracked.failpoints import reach
from tracked.journal import START, Place, Reader, Record
from tracked.names import (
    CHECKPOINT,
    COMMAND,
    FILE,
    FORK,
    HEARTBEAT,
    MANIFEST,
    STATE,
    STOP_REASON,
    folder_name,
    newest_attempt,
    step_of,
)
from tracked.packing import LinkedPoint, Point, unpack
from tracked.spool import RunFolder, read_json, write_json

if TYPE_CHECKING:
    from tracked.server import RunView, Server

POINTS_IN_A_REQUEST = 1000
GATHER_SECONDS = 1.0
"""For so long what a run logs waits for more, and its first checkpoint for a newer one: few requests do for all."""
REQUEST_SECONDS = 5.0
UPLOAD_REST = 100.0
"""For so many times as long as its last one took, no checkpoint is sent for a run that is trained …"""
LONGEST_UPLOAD_REST = 5.0
"""… but for no more than so many seconds: who loses the machine loses what had not arrived."""
_MODEL_TRIES = 10
"""So often a model is sent to a server that answers everything else."""
_POINTER = ("step", "next_step", "saved_at", "epoch", "path", "sha256", "bytes")


def watch_seconds() -> float:
    """How long a heartbeat must have stood still before its run may be taken: `TRACKED_WATCH`, else 30 s."""
    return float(os.environ.get("TRACKED_WATCH", "30"))


def lease_seconds() -> float:
    """How long a look at the run's newest attempt counts: less than a newcomer watches before it claims."""
    return min(10.0, watch_seconds() / 3)


def grace_seconds() -> float:
    """How long after its run was claimed by a newer attempt a sender's last points may still arrive."""
    return lease_seconds() + REQUEST_SECONDS


class Delivery:
    """One journal on its way to the server."""

    _STAND_ALONE: ClassVar = {"damaged", "inputs"}
    """Kinds of records in the points lane that no other shares a request with."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.run = RunFolder(folder.parent)
        self.reader = Reader(folder, ("points", "files"))
        self.server = server
        self.view: RunView | None = None
        self.superseded = False
        self._start: dict[str, Any] = {}
        self._experiment = ""
        self._files_seen = self.reader.cursor("files")
        self._uploaded: Place | None = None
        # What a sender before this one has passed it may not have drawn; once more does no harm.
        passed = self.reader.records("files", Place(self._files_seen.segment, 0))
        self._pictures = [
            record for record in passed if record.kind == "picture" and record.end <= self._files_seen
        ]
        self.draws_again = 0.0
        self._sends_again = time.monotonic() + GATHER_SECONDS
        self._model_tries = 0
        self._on_server: set[int] | None = None
        self._points_at_once = POINTS_IN_A_REQUEST
        self._ended = False
        self._sent_points = time.monotonic()
        self._lease_until = 0.0
        self._beaten = -math.inf
        self._about_lock = threading.Lock()
        self._is_closed = False
        self._open_lock = threading.Lock()

    # -- what is told to the training, and kept for the next attempt on this machine

    def tell(self, **changes: Any) -> None:
        """Change entries of the run's `run.json`, which the training polls."""
        with self._about_lock:
            if self._is_closed:
                return  # a lane was still on its way, and `run.json` may speak of the next attempt by now
            about = self.run.about
            if any(about.get(key) != value for key, value in changes.items()):
                write_json(self.run.path / "run.json", {**about, **changes})

    # -- opening the run, and the right to send for it

    def is_open(self) -> bool:
        """Whether the run exists on the server and is ours to send for; makes it if it is new.

        Raises:
            ServerError: The server did not answer as it should.
        """
        with self._open_lock:
            if self.view is None and not self._open():
                return False
        return not self.superseded and self._has_lease()

    def _open(self) -> bool:
        if not self._start:
            self._start = self._read_start()
            if not self._start:
                return False
            # From here on `run.json` speaks of this attempt, also while the server cannot be reached.
            self.tell(
                attempt=self._start["attempt"],
                points=self.reader.acknowledged,
                superseded=False,
                command="",
                trouble="",
            )
        asked = _boot_seconds()
        if self._start["run_id"]:
            view = self.server.get_run(self._start["run_id"])
            # A sender before this one may have sent the end, and was killed before it deleted the journal.
            self._ended = self.run.about.get("ended") == self.folder.name
            if self._is_mine(view, asked) and not self._ended:
                self._experiment = self.server.experiment_name(view.experiment_id)
                self.server.set_status(view.run_id, "RUNNING")
                tags = self._start["tags"]
                described = description.renewed(view, self._experiment, tags)
                # Whoever watches a run that stands still hears of its sender before anything is sent.
                self.server.set_tags(view.run_id, {**tags, **described, **_heartbeat()})
                self._drop_tags(view, STOP_REASON)
        else:
            tried = self.run.about.get("creating", False) or self._start.get("may_exist", False)
            self.tell(creating=True, handle=self.run.handle)
            if made := self.run.about.get("run_id"):
                view = self.server.get_run(made)  # deleted or not: none is made in its place
            else:
                view = self.server.create_run(
                    experiment=self._start["experiment"],
                    handle=self.run.handle,
                    name=self._start["name"],
                    start_time=self._start["start_time"],
                    tags=self._start["tags"],
                    retry=tried,
                )
            if origin := self._start.get("forked_from"):
                self._link(origin["run_id"], origin["step"], view.run_id)
            self._experiment = self._start["experiment"]
            is_over = self.run.about.get("ended") == self.folder.name
            if self._is_mine(view, asked) and not is_over and description.has(view):
                self.server.set_tags(view.run_id, description.renewed(view, self._experiment, {}))
            if not tried:
                self._on_server = set()
                self._beaten = time.monotonic()  # nobody watches a run that is as new as that
            reach("sender.run-created")
        self.view = view  # only now: what failed on the way is done again
        self.tell(
            run_id=view.run_id,
            experiment_id=view.experiment_id,
            url=self.server.url(view),
            superseded=self.superseded,
            trouble="",
        )
        return True

    def _link(self, origin: str, step: int, fork: str) -> None:
        """Have the run that this one was forked from name it."""
        # That one may be gone, or somebody else's: no reason to hold up this one, which names it anyway.
        with contextlib.suppress(NoSuchRun, RecordRejected, ServerRefused):
            self.server.set_tags(origin, {f"{FORK}{fork}": str(step)})

    def _drop_tags(self, view: RunView, *names: str) -> None:
        """Take away what no longer holds: an empty tag would still show."""
        for name in names:
            if name in view.tags:
                self.server.drop_tag(view.run_id, name)

    def _read_start(self) -> dict[str, Any]:
        kept = self.folder / "start.json"  # the segment that began with it may be delivered and gone
        if not kept.exists():
            first = next(self.reader.records("points", START), None)
            if first is None:
                return {}
            if first.kind != "start":
                raise ServerRefused(
                    f"the first record of {self.folder} is damaged, so its run is not known",
                    try_next="python -m tracked.run list, for the run's other attempts; the folder is kept",
                )
            write_json(kept, first.body)
        return read_json(kept)

    def _has_lease(self) -> bool:
        return self._may_send() or self._renew()

    def _may_send(self) -> bool:
        """Whether the last look at the run's newest attempt counts still."""
        # Time that the machine spent suspended counts: somebody may have taken over meanwhile.
        return _boot_seconds() < self._lease_until

    def _renew(self) -> bool:
        assert self.view is not None
        asked = _boot_seconds()
        self.view = self.server.get_run(self.view.run_id)
        return self._is_mine(self.view, asked)

    def _is_mine(self, view: RunView, asked: float) -> bool:
        """Whether the run's newest attempt, as seen by the look that began at `asked`, is this one."""
        number, nonce = newest_attempt(view.params)
        mine = self._start["attempt"]
        if number > mine or (number == mine and nonce not in ("", self._start["nonce"])):
            self.superseded = True
            self.tell(superseded=True)
            return False
        self._lease_until = asked + lease_seconds()
        return True

    def beat(self) -> None:
        """Renew the lease, tell the server that the run is alive, fetch a person's command.

        Where the training is over and its last records wait, only as often as keeps newcomers away: there may be many.
        """
        if self.view is None or self.superseded or self._ended:
            return
        rests = time.monotonic() - self._beaten < lease_seconds() and not self.reader.is_written()
        if rests or not self._renew():
            return
        self._beaten = time.monotonic()
        self.tell(command=self.view.tags.get(COMMAND, ""))
        self.server.set_tags(self.view.run_id, _heartbeat())

    # -- the points lane

    def send_points(self) -> bool:
        """Send the next batch of the points lane; whether there was one.

        Raises:
            ServerError: The server did not take it; it stays in the journal.
        """
        if not self.is_open():
            return False
        batch: list[Record] = []
        facts: dict[str, dict[str, str]] = {"params": {}, "tags": {}}
        count = 0
        end = self.reader.cursor("points")
        for record in self.reader.records("points"):
            if record.kind in ("points", "linked"):
                if batch and count + record.body["count"] > self._points_at_once:
                    break
                batch.append(record)
                count += record.body["count"]
            elif record.kind in facts:
                known = facts["params"] if record.kind == "params" else {}
                if any(known.get(name, value) != value for name, value in record.body.items()):
                    break  # a second value of a param is a mistake that stands by itself
                facts[record.kind] |= record.body
            elif record.kind in self._STAND_ALONE:
                if end != self.reader.cursor("points"):
                    break
                self._send_by_itself(record.kind, record.body)
                self.reader.acknowledge("points", record.end)
                return True
            end = record.end
        else:
            if not self._is_time():
                return False
        if end == self.reader.cursor("points"):
            return False
        if batch or any(facts.values()):
            points: list[Point | LinkedPoint] = []
            for record in batch:
                points += unpack(record.body) if record.kind == "points" else record.body["points"]
            if not self.is_open():
                return False  # reading all of this may have taken longer than a look counts
            # What a slow server could not store in time, it could never, if as much came again.
            self._points_at_once = max(1, count // 2)
            self._send(points, **facts)
            self._points_at_once = POINTS_IN_A_REQUEST
            self._sent_points = time.monotonic()
            reach("sender.before-acknowledge")
        self.reader.acknowledge("points", end, count)
        self.tell(points=self.reader.acknowledged, trouble="")
        return True

    def _is_time(self) -> bool:
        """Whether less than fits is worth a request: full ones disturb a training beside the server least."""
        return time.monotonic() - self._sent_points >= GATHER_SECONDS or not self.reader.is_written()

    def _send(
        self, points: Sequence[Point | LinkedPoint], params: dict[str, str], tags: dict[str, str]
    ) -> None:
        """Send all of it; what the server finds invalid is found by halves, and left out."""
        assert self.view is not None
        try:
            self.server.log(self.view.run_id, points, params, tags, may_send=self._may_send)
        except RecordRejected as error:
            items: list[tuple[str, Any]] = [
                *(("point", point) for point in points),
                *(("params", item) for item in params.items()),
                *(("tags", item) for item in tags.items()),
            ]
            if len(items) == 1:
                kind, item = items[0]
                self._reject(kind, item if kind == "point" else dict([item]), error)
                return
            for half in (items[: len(items) // 2], items[len(items) // 2 :]):
                self.is_open()  # looks again in time: what is interrupted here begins anew, with what was rejected
                self._send(
                    [item for kind, item in half if kind == "point"],
                    dict(item for kind, item in half if kind == "params"),
                    dict(item for kind, item in half if kind == "tags"),
                )

    def _send_by_itself(self, kind: str, body: Any) -> None:
        if kind == "inputs":
            self._send_inputs(body)
            return
        damage = ServerError(f"part of the journal is {kind} and could not be read")
        self._reject("journal", body, damage)

    def _send_inputs(self, body: list[dict[str, str]]) -> None:
        assert self.view is not None
        source = {name: value for name, value in self.view.tags.items() if name.startswith("mlflow.source.")}
        try:
            self.server.log_inputs(self.view.run_id, body, source)
        except RecordRejected as error:
            self._reject("inputs", body, error)

    def _reject(self, kind: str, body: Any, error: Exception) -> None:
        with (self.run.path / "rejected.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, "record": body, "reason": str(error)[:500]}) + "\n")
        self.tell(
            rejected=self.run.about.get("rejected", 0) + 1, rejected_reason=f"{kind} {body}: {error}"[:300]
        )

    # -- the files lane

    def send_file(self) -> bool:
        """Send the next record of the files lane; whether anything moved.

        Raises:
            ServerError: The server did not take it; it stays in the journal.
        """
        if not self.is_open():
            return False
        for record in self.reader.records("files", self._files_seen):
            if record.kind == "artifact":
                self._send_artifact(record.body)
            elif record.kind == "checkpoint":
                if not self._send_checkpoint(record.body, record.end):
                    return False
            elif record.kind == "model":
                if self.reader.cursor("points") < record.end:
                    return False
                self._send_model(record.body)
            elif record.kind == "end":
                if self.reader.cursor("points") < record.end or self._pictures:
                    return False
                self._send_end(record.body)
            else:
                if record.kind == "picture":
                    self._pictures.append(record)
                self._files_seen = record.end
                continue
            self.reader.acknowledge("files", record.end)
            self._files_seen = record.end
            self.tell(trouble="")
            return True
        if self._files_seen.segment > self.reader.cursor("files").segment:
            self.reader.acknowledge("files", self._files_seen)
        return False

    def _send_artifact(self, body: dict[str, str]) -> None:
        assert self.view is not None
        path = self.folder / body["file"]
        try:
            self.server.upload(self.view.run_id, path, body["directory"])
        except (RecordRejected, CheckpointError) as error:
            self._reject("artifact", body, error)
        path.unlink(missing_ok=True)

    def _send_model(self, body: dict[str, Any]) -> None:
        assert self.view is not None
        folder = self.folder / body["folder"]
        if (folder / flavour.ABOUT).exists():
            run_id = self.view.run_id
            try:
                flavour.log(self.server, run_id, folder, step=body["step"], register=body["register"])
            except Exception as error:
                # Of models alone, or of everything? Then this call says so.
                if self.server.get_run(run_id).deleted:
                    raise
                self._model_tries += 1
                may_pass = isinstance(error, (ServerUnavailable, NoSuchRun, OSError))
                if may_pass and self._model_tries < _MODEL_TRIES:
                    if isinstance(error, NoSuchRun):
                        # The model is not found; the run was, just now, so this is no reason for its sender to leave.
                        raise ServerUnavailable(error.found) from error
                    raise
                # The run's end waits behind the model.
                self._reject("model", body, error)
                with contextlib.suppress(ServerError):
                    flavour.forget(self.server, run_id, folder)
        shutil.rmtree(folder, ignore_errors=True)

    def _send_checkpoint(self, body: dict[str, Any], end: Place) -> bool:
        """Upload, verify, and commit by the tag; False while points before it are not acknowledged."""
        assert self.view is not None
        run_id = self.view.run_id
        local, name = self.run.checkpoints / folder_name(body["step"]), body.get("file", FILE)
        directory = f"checkpoints/{local.name}"
        if self._uploaded != end:
            if time.monotonic() < self._sends_again and self.reader.is_written():
                return False  # by then newer ones may have taken its place
            if self._is_outdated(body):
                return True
            try:
                if digest(local / name) != body["sha256"]:
                    return True
            except FileNotFoundError:
                return True  # a newer one has taken its place while the server was away
            reach("sender.before-upload")
            began = time.monotonic()
            if self._on_server is not None:
                self._on_server.add(body["step"])  # also if it stays half of one, superseded meanwhile
            try:
                self.server.upload(run_id, local / name, directory)
                reach("sender.mid-upload")
                self.server.upload(run_id, local / MANIFEST, directory)
            except (CheckpointError, ServerUnavailable):
                if local.exists():
                    raise
                return True  # superseded by a newer one meanwhile
            found = self.server.sizes(run_id, directory).get(name)
            if found != body["bytes"]:
                raise ServerUnavailable(
                    f"the server holds {found} of {body['bytes']} bytes of {directory}/{name}"
                )
            self._uploaded = end
            took = time.monotonic() - began
            self._sends_again = time.monotonic() + min(UPLOAD_REST * took, LONGEST_UPLOAD_REST)
            if not self.is_open():
                return False  # an upload may outlast the lease, and its pointer would undo a newer attempt's
        if self.reader.cursor("points") < end:
            return False
        reach("sender.before-tag")
        pointer = {key: body[key] for key in _POINTER if key in body}
        self.server.set_tags(run_id, {CHECKPOINT: json.dumps(pointer)})
        self.tell(committed=body["step"], keep=body.get("keep", []))
        reach("sender.before-prune")
        self._prune(self._kept(body))
        return True

    def _is_outdated(self, body: dict[str, Any]) -> bool:  # noqa: ARG002 - for other code's checkpoints
        """Whether the run has come further than this checkpoint since it was taken."""
        return False  # whoever goes on with the run takes away the right to send for it

    def _kept(self, body: dict[str, Any]) -> set[int]:
        """The steps whose checkpoints stay on the server."""
        return {*body["keep"], body["step"]}

    def _steps_on_server(self) -> set[int]:
        """Of all checkpoints of the run, this delivery's among them."""
        assert self.view is not None
        if self._on_server is None:
            names = self.server.directories(self.view.run_id, "checkpoints")
            self._on_server = {step for name in names if (step := step_of(name)) is not None}
        return self._on_server

    def _prune(self, keep: set[int]) -> None:
        """Delete this run's superseded checkpoints on the server, and nothing else."""
        assert self.view is not None
        on_server = self._steps_on_server()
        # Newer ones are a newer attempt's, if this sender slept while its run was taken over.
        for step in sorted(step for step in on_server - keep if step < max(keep)):
            self.server.delete(self.view.run_id, f"checkpoints/{folder_name(step)}")
            on_server.discard(step)

    def _send_end(self, body: dict[str, Any]) -> None:
        assert self.view is not None
        self._ended = True  # no heartbeat may follow it
        self._drop_tags(self.view, COMMAND)
        view, tags = self.view, body["tags"]
        if description.has(view):
            view = self.server.get_run(view.run_id)  # a person may have written one meanwhile
        self.server.set_tags(view.run_id, {**tags, **description.renewed(view, self._experiment, tags)})
        self.server.set_status(view.run_id, body["status"], body["end_time"])
        self.tell(ended=self.folder.name, state=body["tags"][STATE], trouble="")

    # -- the pictures

    def send_picture(self) -> bool:
        """Draw and upload the newest of each picture whose points are on the server; whether there was one.

        Raises:
            ServerError: The server did not give the histories or did not take the file; it is drawn again.
        """
        # The files lane may append meanwhile: only what is there now is looked at.
        points = self.reader.cursor("points")
        ready = [record for record in self._pictures[:] if record.end <= points]
        if not ready or (time.monotonic() < self.draws_again and self.reader.is_written()):
            return False
        if not self.is_open():
            return False
        for picture in {record.body["name"]: record.body for record in ready}.values():
            self._draw(picture)
        del self._pictures[: len(ready)]
        self.tell(trouble="")
        return True

    def _draw(self, body: dict[str, Any]) -> None:
        assert self.view is not None
        run_id = self.view.run_id
        keyed = body.get("panels", [])
        panels = [{key: self.server.history(run_id, key) for key in keys} for keys in keyed]
        try:
            # matplotlib takes most of a second to import, so not before there is a picture.
            from tracked import plots

            title = self.view.name
            if "confusion" in body:
                figure = plots.confusion(
                    body["confusion"], classes=body["classes"], title=title, step=body["step"]
                )
            else:
                figure = plots.curves(
                    panels, title=title, best_step=body["best_step"], attempts=body["attempts"]
                )
            image = plots.png(figure)
        except Exception as error:  # noqa: BLE001 - whatever drawing raises, it would raise again
            self._reject("picture", body["name"], error)
            return
        directory, _, name = body["name"].rpartition("/")
        path = self.folder / "pictures" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
        self._send_artifact({"file": f"pictures/{name}", "directory": directory})

    # -- the end of a journal

    def close_if_done(self) -> bool:
        """Finish a journal whose writer is gone and whose records are all delivered.

        Raises:
            ServerError: The server did not answer as it should.
        """
        if self.reader.is_written():
            return False
        if self.superseded:
            # All up to a committed checkpoint was delivered before; the newer attempt computes the rest.
            self.tell(discarded=self.folder.name)
        elif self.view is None and not self._read_start():
            pass  # killed before its first record: there is nothing to tell, and no run
        elif not self.is_open() or not self._at_end():
            return False
        elif self.run.about.get("ended") != self.folder.name:
            crashed = {STATE: "crashed", STOP_REASON: "the training process was killed or died"}
            self._send_end({"status": "FAILED", "end_time": int(time.time() * 1000), "tags": crashed})
        reach("sender.before-delete")
        self._close()
        return True

    def _close(self) -> None:
        """Delete the journal; from here on nothing is told of it, nor of what was in its way."""
        if self.run.about.get("trouble"):
            self.tell(trouble="")
        with self._about_lock:
            self._is_closed = True
        shutil.rmtree(self.folder, ignore_errors=True)

    def _at_end(self) -> bool:
        """Whether both lanes have passed the last whole record, and no picture waits."""
        unsent = next(self.reader.records("points"), None)
        unseen = next(self.reader.records("files", self._files_seen), None)
        return unsent is None and unseen is None and not self._pictures


def _heartbeat() -> dict[str, str]:
    return {HEARTBEAT: str(int(time.time() * 1000))}


def _boot_seconds() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)
