"""The sender: what a server, a proxy or a person does to it costs no point and makes none twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.nursery import Nursery
from tests.processes import Workplace, wait_until
from tests.proofs import assert_whole, curves, handle_of, only_run, run_id_of, told, until_committed
from tests.servers import Answer, FakeFront, MlflowServer, Request, _Rule
from tracked import delivery, sender
from tracked.delivery import Delivery
from tracked.errors import ServerUnavailable
from tracked.journal import Journal
from tracked.packing import pack
from tracked.sender import Sender
from tracked.server import Server
from tracked.spool import Lock, RunFolder, open_outbox


@dataclass
class Writing:
    """A run as a training would journal it."""

    folder: RunFolder
    experiment: str
    number: int = 1
    run_id: str | None = None
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.folder.make()
        self.journal = Journal(self.folder.path / f"attempt-{self.number:04d}-{uuid.uuid4().hex[:8]}")
        start = {
            "run_id": self.run_id,
            "experiment": self.experiment,
            "name": None,
            "start_time": 1_700_000_000_000,
            "tags": {"tracked.state": "running", "mlflow.source.name": "train.py"},
            "attempt": self.number,
            "nonce": "0123456789abcdef",
        }
        self.append("start", start)

    def append(self, kind: str, body: Any) -> None:
        self.journal.append(kind, body)
        self.journal.flush()

    def points(self, key: str, first: int, last: int) -> None:
        for begin in range(first, last, 500):
            steps = range(begin, min(begin + 500, last))
            self.append("points", pack([(key, step, 1_700_000_000_000 + step, step / 3) for step in steps]))

    def checkpoint(self, step: int, content: bytes, keep: list[int] | None = None) -> None:
        folder = self.folder.checkpoints / f"step-{step:08d}"
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        (folder / "manifest.json").write_text(json.dumps({"sha256": sha256}))
        body = {"step": step, "epoch": 1, "sha256": sha256, "bytes": len(content), "keep": keep or []}
        self.append("checkpoint", {**body, "path": f"checkpoints/{folder.name}/checkpoint.pt"})

    def picture(self, best_step: int = 1, **changes: Any) -> None:
        body = {"name": "plots/curves.png", "panels": [["train/loss", "val/loss"]], "attempts": []}
        self.append("picture", {**body, "best_step": best_step, **changes})

    def end(self) -> None:
        tags = {"tracked.state": "finished", "mlflow.tracked.points": "0"}
        self.append("end", {"status": "FINISHED", "end_time": 1_700_000_999_000, "tags": tags})
        self.journal.close()

    def delivered(self, seconds: float = 30) -> None:
        wait_until(lambda: not self.journal.folder.exists(), f"the delivery: {self.folder.about}", seconds)

    def trouble(self) -> str:
        return str(self.folder.about.get("trouble", ""))


class Post:
    """An outbox and a sender for it, in threads of this process; the server and the requests are real."""

    def __init__(self, path: Path, uri: str) -> None:
        self.uri = uri
        self.experiment = f"sender {uuid.uuid4().hex}"
        self.outbox = open_outbox(path, uri)
        self.sender: Sender | None = None

    def writing(self) -> Writing:
        return Writing(self.outbox.run(uuid.uuid4().hex), self.experiment)

    def __enter__(self) -> Self:
        lock = Lock(self.outbox.sender_lock)
        assert lock.acquire()
        self.sender = Sender(self.outbox, lock, Server(self.uri, timeout=30))
        self._thread = threading.Thread(target=self.sender.serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.sender is not None
        self.sender._leaving.set()
        self._thread.join()
        self.sender.lock.release()


@pytest.fixture
def front(server_uri: str) -> Iterator[FakeFront]:
    with FakeFront(server_uri) as front:
        yield front


@pytest.fixture
def post(tmp_path: Path, front: FakeFront, monkeypatch: pytest.MonkeyPatch) -> Post:
    monkeypatch.setenv("TRACKED_HEARTBEAT", "0.2")
    return Post(tmp_path, front.uri)


def delivered(post: Post, server_uri: str) -> Run:
    return only_run(server_uri, post.experiment)


def points(count: int) -> list[tuple[int, float]]:
    return [(step, step / 3) for step in range(count)]


def test_points_arrive_in_requests_of_at_most_a_thousand_each_once(
    post: Post, front: FakeFront, server_uri: str
) -> None:
    writing = post.writing()
    writing.points("loss", 0, 3456)
    writing.end()
    with post:
        writing.delivered()
    run = delivered(post, server_uri)
    assert curves(server_uri, run.info.run_id) == {"loss": points(3456)}
    assert (run.info.status, run.info.end_time) == ("FINISHED", 1_700_000_999_000)
    sizes = [request.body.count(b'"key"') for request in front.requests if "runs/log-batch" in request.path]
    assert max(sizes) <= 1000
    assert len(sizes) < 20


@pytest.mark.parametrize("path", ["runs/log-batch", "runs/create", "runs/set-tag", "runs/update"])
def test_a_lost_answer_is_asked_for_again_and_nothing_stands_twice(
    post: Post, front: FakeFront, server_uri: str, path: str
) -> None:
    front.drop_answer(path, times=2)
    writing = post.writing()
    writing.points("loss", 0, 1500)
    writing.append("tags", {"mlflow.note": "a tag"})
    writing.end()
    with post:
        writing.delivered()
    run = delivered(post, server_uri)
    assert curves(server_uri, run.info.run_id) == {"loss": points(1500)}
    assert run.info.status == "FINISHED"


ANSWERS = [
    Answer(401, b"who are you?"),
    Answer(403, b"not you"),
    Answer(404, b"<html>no such page</html>"),
    Answer(408),
    Answer(413, b"<html>too large</html>"),
    Answer(429, b"slower"),
    Answer(500, b"<html>oh</html>"),
    Answer(502),
    Answer(503),
    Answer(200, b"<html>please log in</html>"),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: f"{answer.status} {answer.body.decode()}")
def test_an_answer_that_is_not_a_verdict_holds_the_queue_is_shown_and_then_all_is_delivered(
    post: Post, front: FakeFront, server_uri: str, answer: Answer
) -> None:
    front.answer("runs/log-batch", answer, times=2)
    writing = post.writing()
    writing.points("loss", 0, 1500)  # more than a request holds, so the first goes at once
    with post:
        trouble = wait_until(writing.trouble, "the trouble")
        assert str(answer.status) in trouble or "html" in trouble.lower(), trouble
        # A sender that is refused when nobody writes any more leaves the rest to `sync`.
        wait_until(lambda: writing.folder.about.get("points") == 1500, "the points that were held")
        writing.points("loss", 1500, 1600)
        writing.end()
        writing.delivered()
    run = delivered(post, server_uri)
    assert curves(server_uri, run.info.run_id) == {"loss": points(1600)}
    assert not (writing.folder.path / "rejected.jsonl").exists()
    assert writing.trouble() == ""


def test_a_record_that_mlflow_refuses_is_found_by_bisecting_and_the_rest_arrives(
    post: Post, server_uri: str
) -> None:
    writing = post.writing()
    writing.points("loss", 0, 300)
    writing.append("points", pack([("not/../a/name", 5, 1_700_000_000_000, 1.0)]))
    writing.append("tags", {"fine": "yes", "x" * 300: "too long a name", "also": "fine"})
    writing.points("loss", 300, 600)
    writing.end()
    with post:
        writing.delivered()
    run = delivered(post, server_uri)
    assert curves(server_uri, run.info.run_id) == {"loss": points(600)}
    assert run.data.tags["fine"] == "yes"
    assert run.data.tags["also"] == "fine"
    rejected = [
        json.loads(line) for line in (writing.folder.path / "rejected.jsonl").read_text().splitlines()
    ]
    assert [each["kind"] for each in rejected] == ["point", "tags"]
    assert rejected[0]["record"][0] == "not/../a/name"
    assert writing.folder.about["rejected"] == 2


def test_a_run_whose_server_side_is_gone_does_not_hold_the_others(post: Post, server_uri: str) -> None:
    orphan = Writing(post.outbox.run(uuid.uuid4().hex), post.experiment, 2, uuid.uuid4().hex)
    orphan.points("loss", 0, 10)
    with post:
        wait_until(orphan.trouble, "the trouble")
        started = time.monotonic()
        others = [post.writing() for _ in range(3)]
        for writing in others:
            writing.points("loss", 0, 10)
            writing.end()
        for writing in others:
            writing.delivered()
        assert time.monotonic() - started < 10
    orphan.journal.close()
    assert orphan.journal.folder.exists(), "what cannot be delivered is kept"


def are_points(request: Request) -> bool:
    return "runs/log-batch" in request.path and b'"timestamp"' in request.body


def refuse_points(front: FakeFront, times: int | None) -> None:
    """Answer requests that carry points with 503, and no others: tags go to the same address."""

    def act(front: FakeFront, handler: BaseHTTPRequestHandler, _: Request) -> None:
        front._write(handler, Answer(503))

    front._rules.append(_Rule(are_points, act, times))


def slow_uploads(
    front: FakeFront, begun: threading.Event, go_on: threading.Event, name: str = "checkpoint.pt"
) -> None:
    """Hold every upload of a file of that name until `go_on` is set."""

    def act(front: FakeFront, handler: BaseHTTPRequestHandler, request: Request) -> None:
        begun.set()
        go_on.wait(60)
        front._pass_on(handler, request)

    front._rules.append(_Rule(lambda request: request.method == "PUT" and name in request.path, act, None))


def test_an_upload_of_50_mb_holds_neither_points_nor_heartbeats_and_its_pointer_waits_for_it(
    post: Post, front: FakeFront, server_uri: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    slow_uploads(front, begun, go_on)
    client = MlflowClient(server_uri)
    one, other = post.writing(), post.writing()
    one.checkpoint(10, os.urandom(50 << 20))
    try:
        with post:
            assert begun.wait(30)
            for writing in (one, other):
                writing.points("loss", 0, 2000)
            for writing in (one, other):
                points_acknowledged(writing, 2000)
            run_id = one.folder.about["run_id"]
            heartbeats_go_on(client, run_id)
            assert "tracked.checkpoint" not in client.get_run(run_id).data.tags
            go_on.set()
            one.end()
            other.end()
            one.delivered()
            other.delivered()
    finally:
        go_on.set()
    assert json.loads(client.get_run(run_id).data.tags["tracked.checkpoint"])["step"] == 10


def heartbeat(client: MlflowClient, run_id: str) -> str:
    return str(client.get_run(run_id).data.tags.get("mlflow.tracked.heartbeat", ""))


def points_acknowledged(writing: Writing, count: int) -> None:
    wait_until(lambda: writing.folder.about.get("points") == count, f"{count} points")


def heartbeats_go_on(client: MlflowClient, run_id: str) -> None:
    seen: set[str] = set()

    def enough() -> bool:
        seen.add(heartbeat(client, run_id))
        return len(seen) > 4

    wait_until(enough, "heartbeats", 20)


def test_heartbeats_go_on_while_points_are_refused_and_wait(
    post: Post, front: FakeFront, server_uri: str
) -> None:
    refuse_points(front, None)
    writing = post.writing()
    writing.points("loss", 0, 10)
    client = MlflowClient(server_uri)
    with post:
        wait_until(writing.trouble, "the trouble")
        run_id = writing.folder.about["run_id"]
        heartbeats_go_on(client, run_id)
    writing.journal.close()


def test_a_pointer_waits_for_the_points_before_it(post: Post, front: FakeFront, server_uri: str) -> None:
    refuse_points(front, 3)
    writing = post.writing()
    writing.points("loss", 0, 10)
    writing.checkpoint(9, b"state")
    client = MlflowClient(server_uri)
    with post:
        wait_until(lambda: "tracked.checkpoint" in tags(client, writing), "the pointer")
        assert writing.folder.about["points"] == 10
        assert curves(server_uri, writing.folder.about["run_id"]) == {"loss": points(10)}
        writing.end()
        writing.delivered()
    (named,) = (at for at, each in enumerate(front.requests) if b'"tracked.checkpoint"' in each.body)
    sent = [at for at, each in enumerate(front.requests) if are_points(each)]
    assert len(sent) == 4
    assert named > max(sent)


def tags(client: MlflowClient, writing: Writing) -> dict[str, str]:
    run_id = writing.folder.about.get("run_id")
    return dict(client.get_run(run_id).data.tags) if run_id else {}


INPUT = {
    "name": "digits",
    "digest": "0123456789abcdef",
    "schema": "{}",
    "profile": "{}",
    "context": "training",
}


@pytest.mark.parametrize("path", ["runs/log-inputs", "runs/log-batch"])
def test_a_killed_training_is_described_and_its_data_named_once_whatever_answer_is_lost(
    post: Post, front: FakeFront, server_uri: str, path: str
) -> None:
    writing = post.writing()
    front.drop_answer(path)
    writing.append("inputs", [INPUT])
    writing.points("loss", 0, 10)
    writing.journal.close()  # without an end: the training is gone
    with post:
        writing.delivered()
    run = delivered(post, server_uri)
    assert run.inputs is not None
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("digits", "0123456789abcdef")
    assert curves(server_uri, run.info.run_id) == {"loss": points(10)}
    text = run.data.tags["mlflow.note.content"]
    assert "the last one crashed (the training process was killed or died)" in text
    assert f"python -m tracked.run resume {run.info.run_id}" in text


def test_a_description_that_a_person_has_written_or_deleted_stays_so(post: Post, server_uri: str) -> None:
    client = MlflowClient(server_uri)
    for words in ("my own words", ""):
        post.experiment = f"sender {uuid.uuid4().hex}"
        writing = post.writing()
        with post:
            writing.points("loss", 0, 1)
            wait_until(lambda writing=writing: writing.folder.about.get("run_id"), "the run")  # type: ignore[misc]
            client.set_tag(writing.folder.about["run_id"], "mlflow.note.content", words)
            writing.end()
            writing.delivered()
        assert delivered(post, server_uri).data.tags["mlflow.note.content"] == words


def test_superseded_checkpoints_are_deleted_on_the_server_and_nothing_else(
    post: Post, server_uri: str
) -> None:
    writing = post.writing()
    with post:
        writing.checkpoint(0, b"zero")
        writing.checkpoint(5, b"five", keep=[0])
        writing.checkpoint(10, b"ten", keep=[5])
        writing.append("tags", {"checkpoints/mine": "a tag"})
        writing.end()
        writing.delivered()
    client = MlflowClient(server_uri)
    run = delivered(post, server_uri)
    left = [Path(each.path).name for each in client.list_artifacts(run.info.run_id, "checkpoints")]
    assert sorted(left) == ["step-00000005", "step-00000010"]


def test_facts_travel_with_the_points_beside_them(post: Post, front: FakeFront, server_uri: str) -> None:
    writing = post.writing()
    writing.append("params", {"lr": "0.1"})
    writing.append("tags", {"color": "blue"})
    writing.points("loss", 0, 10)
    writing.append("tags", {"color": "red"})
    writing.append("params", {"loop.epochs": "3"})
    writing.end()
    with post:
        writing.delivered()
    run = delivered(post, server_uri)
    assert curves(server_uri, run.info.run_id) == {"loss": points(10)}
    assert run.data.params == {"lr": "0.1", "loop.epochs": "3"}
    assert run.data.tags["color"] == "red"
    batches = [request.body for request in front.requests if "runs/log-batch" in request.path]
    assert sum(b'"lr"' in body or b'"color"' in body or b'"loss"' in body for body in batches) == 1


def test_of_checkpoints_that_come_faster_than_they_are_sent_the_newest_is_next(
    post: Post, front: FakeFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "UPLOAD_REST", 1e6)
    monkeypatch.setattr(delivery, "LONGEST_UPLOAD_REST", 60.0)
    writing = post.writing()
    with post:
        for step in range(1, 9):
            writing.checkpoint(step, b"x" * 1000 * step, keep=[step])
            if step == 1:
                wait_until(lambda: writing.folder.about.get("committed") == 1, "the first checkpoint")
            elif step > 2:  # as a training does, once a newer one is whole
                shutil.rmtree(writing.folder.checkpoints / f"step-{step - 1:08d}")
        writing.end()
        writing.delivered()
    sent = [request.path for request in front.requests if "checkpoint.pt" in request.path]
    assert [path.split("step-")[1][:8] for path in sent if "step-" in path] == ["00000001", "00000008"]
    assert writing.folder.about["committed"] == 8


def test_an_attempt_that_was_superseded_sends_nothing_more_and_says_so(post: Post, server_uri: str) -> None:
    writing = post.writing()
    writing.points("loss", 0, 10)
    client = MlflowClient(server_uri)
    with post:
        wait_until(lambda: writing.folder.about.get("points") == 10, "the points")
        run_id = writing.folder.about["run_id"]
        client.log_param(run_id, "tracked.attempt.2", "another's")
        wait_until(lambda: writing.folder.about.get("superseded"), "the news")
        writing.points("loss", 10, 20)
        writing.end()
        writing.delivered()
    assert curves(server_uri, run_id) == {"loss": points(10)}
    assert client.get_run(run_id).info.status == "RUNNING", "the newer attempt's status was overwritten"
    assert writing.folder.about["discarded"] == writing.journal.folder.name


def test_a_lane_that_is_late_does_not_tell_the_next_attempt_that_it_is_superseded(
    post: Post, server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = post.writing()
    writing.end()
    late = Delivery(writing.journal.folder, Server(server_uri, timeout=30))
    while not late.close_if_done():
        assert late.send_file() or late.send_points() or late.view is not None
    told = writing.folder.about
    MlflowClient(server_uri).log_param(told["run_id"], "tracked.attempt.2", "the next")
    monkeypatch.setattr(late, "_lease_until", 0.0)
    assert not late.is_open()
    assert writing.folder.about == told


def test_a_machine_that_sleeps_in_the_middle_of_a_request_sends_no_more_of_it(
    post: Post, server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = post.writing()
    writing.points("loss", 0, 10)
    writing.end()
    sleeper = Delivery(writing.journal.folder, Server(server_uri, timeout=30))
    assert sleeper.is_open()
    run_id = writing.folder.about["run_id"]
    send_headers = HTTPConnection.endheaders

    def fall_asleep(self: HTTPConnection, *args: Any, **kwargs: Any) -> None:
        send_headers(self, *args, **kwargs)
        monkeypatch.undo()
        MlflowClient(server_uri).log_param(run_id, "tracked.attempt.2", "another's")
        monkeypatch.setattr(delivery, "_boot_seconds", lambda: time.monotonic() + 1e9)

    monkeypatch.setattr(HTTPConnection, "endheaders", fall_asleep)
    with pytest.raises(ServerUnavailable, match="too much time has passed"):
        sleeper.send_points()
    assert not sleeper.send_points()
    assert writing.folder.about["superseded"] is True
    assert curves(server_uri, run_id) == {}


def test_an_attempt_superseded_before_its_sender_first_asks_hears_of_it(post: Post, server_uri: str) -> None:
    client = MlflowClient(server_uri)
    run_id = client.create_run(client.create_experiment(post.experiment)).info.run_id
    client.log_param(run_id, "tracked.attempt.3", "another's")
    writing = Writing(post.outbox.run(uuid.uuid4().hex), post.experiment, 2, run_id)
    writing.points("loss", 0, 10)
    with post:
        wait_until(lambda: writing.folder.about.get("url"), "the run")
        assert writing.folder.about["superseded"] is True
        writing.end()
        writing.delivered()
    assert curves(server_uri, run_id) == {}


def test_a_checkpoint_whose_upload_outlasts_its_attempt_is_not_named(
    post: Post, front: FakeFront, server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKED_WATCH", "0")
    begun, go_on = threading.Event(), threading.Event()
    slow_uploads(front, begun, go_on)
    client = MlflowClient(server_uri)
    writing = post.writing()
    writing.checkpoint(10, b"state")
    try:
        with post:
            assert begun.wait(30)
            run_id = writing.folder.about["run_id"]
            client.log_param(run_id, "tracked.attempt.2", "another's")
            client.set_tag(run_id, "tracked.checkpoint", "the other's")
            go_on.set()
            writing.journal.close()
            writing.delivered()
    finally:
        go_on.set()
    assert client.get_run(run_id).data.tags["tracked.checkpoint"] == "the other's"


# -- pictures


def drawings(front: FakeFront) -> list[bytes]:
    """The pictures that were uploaded, in their order."""
    return [each.body for each in list(front.requests) if each.method == "PUT" and "curves.png" in each.path]


def until_drawn(front: FakeFront, count: int) -> None:
    wait_until(lambda: len(drawings(front)) >= count, f"{count} pictures")


def test_a_picture_is_drawn_of_all_that_was_logged_before_it_and_renewed(
    post: Post, front: FakeFront, server_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "DRAWING_REST", 0.0)
    writing = post.writing()
    with post:
        for number in (1, 2):
            writing.points("train/loss", 100 * number, 100 * number + 100)
            writing.points("val/loss", 100 * number, 100 * number + 1)
            writing.picture(100)
            until_drawn(front, number)
        writing.end()
        writing.delivered()
    first, second = drawings(front)
    assert first.startswith(b"\x89PNG")
    assert second.startswith(b"\x89PNG")
    assert first != second
    sent = [at for at, each in enumerate(front.requests) if are_points(each)]
    (drawn_last,) = [at for at, each in enumerate(front.requests) if each.body == second]
    assert max(sent) < drawn_last
    client = MlflowClient(server_uri)
    run_id = delivered(post, server_uri).info.run_id
    found = client.download_artifacts(run_id, "plots/curves.png", str(tmp_path))
    assert Path(found).read_bytes() == second


def test_of_many_pictures_the_newest_is_drawn_and_the_last_for_certain(post: Post, front: FakeFront) -> None:
    writing = post.writing()
    with post:
        for step in range(20):
            writing.points("val/loss", step, step + 1)
            writing.picture(step)
            if step == 0:
                until_drawn(front, 1)
        points_acknowledged(writing, 20)
        assert len(drawings(front)) == 1, "a training is drawn more often than costs nothing"
        writing.end()
        writing.delivered()
    assert len(drawings(front)) == 2


@pytest.mark.parametrize(
    "changes",
    [{"attempts": 7}, {"best_step": "a word"}, {"name": "../../elsewhere.png"}],
    ids=["nothing to go through", "no number", "a name that leads out"],
)
def test_a_picture_that_cannot_be_drawn_is_left_out_and_holds_nothing_up(
    post: Post, front: FakeFront, server_uri: str, changes: dict[str, Any]
) -> None:
    writing = post.writing()
    writing.points("val/loss", 0, 10)
    writing.picture(**changes)
    writing.checkpoint(9, b"state")
    writing.end()
    with post:
        writing.delivered()
    assert delivered(post, server_uri).info.status == "FINISHED"
    assert drawings(front) == []
    rejected = [
        json.loads(line) for line in (writing.folder.path / "rejected.jsonl").read_text().splitlines()
    ]
    assert len(rejected) == 1
    assert rejected[0]["kind"] in ("picture", "artifact")


def test_a_picture_on_its_way_holds_neither_points_nor_checkpoints_and_the_end_waits_for_it(
    post: Post, front: FakeFront, server_uri: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    slow_uploads(front, begun, go_on, "curves.png")
    client = MlflowClient(server_uri)
    writing = post.writing()
    writing.points("val/loss", 0, 10)
    writing.picture(9)
    try:
        with post:
            assert begun.wait(30)
            writing.points("val/loss", 10, 20)
            writing.checkpoint(19, b"state")
            writing.end()
            wait_until(lambda: "tracked.checkpoint" in tags(client, writing), "the pointer")
            assert writing.folder.about["points"] == 20
            assert tags(client, writing)["tracked.state"] == "running"
            go_on.set()
            writing.delivered()
    finally:
        go_on.set()
    assert tags(client, writing)["tracked.state"] == "finished"


def test_a_picture_that_a_sender_did_not_get_to_is_drawn_by_the_next(post: Post, front: FakeFront) -> None:
    front.answer("curves.png", Answer(503))
    client = MlflowClient(front.uri)
    writing = post.writing()
    writing.points("val/loss", 0, 10)
    writing.picture(9)
    writing.checkpoint(9, b"state")
    with post:
        wait_until(lambda: "tracked.checkpoint" in tags(client, writing), "the pointer")
        until_drawn(front, 1)
    front._rules.clear()
    refused = len(drawings(front))
    writing.end()
    with post:
        writing.delivered()
    assert len(drawings(front)) == refused + 1
    assert "plots" in {each.path for each in client.list_artifacts(writing.folder.about["run_id"])}


# -- as processes

EXPERIMENT_LINE = ("train", "experiment.py", "pause=0.01", "--checkpoint-every", "1 epoch")


def test_a_server_that_is_down_at_the_start_costs_nothing_but_a_sync(
    tmp_path: Path, own_server: MlflowServer, nursery: Nursery
) -> None:
    workplace = Workplace(tmp_path, own_server.uri)
    workplace.experiment()
    try:
        line = ("--epochs", "3", "--drain-timeout", "0.5", "--json")
        result = nursery.run(workplace, *EXPERIMENT_LINE, *line, check=False)
        assert result.returncode == 3, result
        assert result.json["undelivered"] > 30
        assert result.json["state"] == "finished"
        assert "python -m tracked.run sync" in result.stderr
        own_server.start()
        elsewhere = nursery.run(workplace, "sync", "--tracking-uri", "http://127.0.0.1:9", "--json")
        assert elsewhere.json == {"undelivered": 0}
        assert "nothing waits in the spool" in elsewhere.stderr
        assert nursery.run(workplace, "sync", "--json").json == {"undelivered": 0}
        found = assert_whole(own_server.uri, only_run(own_server.uri).info.run_id)
        assert sum(map(len, found.values())) == result.json["undelivered"]
    finally:
        workplace.close()


def test_a_server_killed_in_the_middle_loses_nothing(
    tmp_path: Path, own_server: MlflowServer, nursery: Nursery
) -> None:
    workplace = Workplace(tmp_path, own_server.uri)
    workplace.experiment()
    own_server.start()
    try:
        trainer = nursery.start(workplace, *EXPERIMENT_LINE, "--epochs", "60")
        handle = handle_of(trainer)
        until_committed(workplace, handle)
        own_server.kill()
        wait_until(lambda: told(workplace, handle).get("trouble"), "the trouble")
        assert trainer.returncode is None, "the training was held up"
        own_server.start()
        result = trainer.wait()
        assert result.returncode == 0, result
        assert "the server answers again" in result.stderr
        assert_whole(own_server.uri, run_id_of(workplace, handle))
        only_run(own_server.uri)
    finally:
        workplace.close()


def test_two_trainings_in_one_spool_share_a_sender_and_start_another_when_it_is_killed(
    workplace: Workplace, nursery: Nursery
) -> None:
    workplace.experiment()
    trainers = [nursery.start(workplace, *EXPERIMENT_LINE, "--epochs", "60") for _ in range(2)]
    handles = [handle_of(trainer) for trainer in trainers]
    for handle in handles:
        until_committed(workplace, handle)
    (first,) = workplace.sender_pids()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: workplace.sender_pids() not in ([], [first]), "another sender")
    assert len(workplace.sender_pids()) == 1
    for trainer, handle in zip(trainers, handles, strict=True):
        result = trainer.wait()
        assert result.returncode == 0, result
        assert_whole(workplace.tracking_uri, run_id_of(workplace, handle))


def test_a_sender_leaves_when_it_is_idle_and_when_its_spool_is_deleted(
    workplace: Workplace, nursery: Nursery
) -> None:
    workplace.experiment()
    nursery.run(workplace, *EXPERIMENT_LINE, "--epochs", "1", env={"TRACKED_SENDER_IDLE": "0.5"})
    wait_until(lambda: not workplace.sender_pids(), "the idle sender's end", 10)
    nursery.run(workplace, *EXPERIMENT_LINE, "--epochs", "1")
    (pid,) = workplace.sender_pids()
    shutil.rmtree(workplace.spool)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or is_zombie(pid), "the sender's end", 10)


def test_deleted_runs_do_not_keep_a_sender_and_it_first_delivers_what_the_others_have(
    post: Post, front: FakeFront, server_uri: str
) -> None:
    late, *lost = post.writing(), post.writing(), post.writing()
    with post:
        for writing in (late, *lost):
            writing.points("loss", 0, 10)
        wait_until(lambda: all("run_id" in each.folder.about for each in (late, *lost)), "the runs")
    for writing in lost:
        MlflowClient(server_uri).delete_run(writing.folder.about["run_id"])
    for writing in (late, *lost):
        writing.points("loss", 10, 20)
        writing.end()
    front.answer("log-batch", Answer(503), times=5)
    with post:
        assert post.sender is not None
        wait_until(lambda: all(each.folder.about.get("deleted") for each in lost), "word of the deleted runs")
        late.delivered()
        wait_until(post.sender._leaving.is_set, "the sender's leave")
    assert curves(server_uri, late.folder.about["run_id"]) == {"loss": points(20)}
    assert all(each.journal.folder.exists() for each in lost), "a run can be restored"


def test_a_run_that_is_deleted_just_before_its_end_keeps_no_sender(post: Post, server_uri: str) -> None:
    writing = post.writing()
    with post:
        assert post.sender is not None
        writing.points("loss", 0, 10)
        run_id = wait_until(lambda: writing.folder.about.get("run_id"), "the run")
        wait_until(lambda: curves(server_uri, run_id) == {"loss": points(10)}, "its points")
        MlflowClient(server_uri).delete_run(run_id)
        writing.journal.close()
        wait_until(post.sender._leaving.is_set, "the sender's leave")
    assert writing.folder.about["deleted"]
    assert "was deleted" in writing.trouble()


def test_what_can_never_be_sent_as_it_is_keeps_no_sender(post: Post, server_uri: str) -> None:
    client, gone = MlflowClient(server_uri), f"gone {uuid.uuid4().hex}"
    client.delete_experiment(client.create_experiment(gone))
    homeless = Writing(post.outbox.run(uuid.uuid4().hex), gone)
    damaged = post.outbox.run(uuid.uuid4().hex)
    damaged.make()
    headless = Journal(damaged.path / "attempt-0001-00000000")
    headless.append("points", pack([("loss", 1, 1, 0.5)]))
    for journal in (homeless.journal, headless):
        journal.close()
    with post:
        assert post.sender is not None
        wait_until(post.sender._leaving.is_set, "the sender's leave")
    assert "is damaged" in damaged.about["trouble"]
    assert "was deleted" in homeless.trouble()
    assert homeless.journal.folder.exists()
    assert headless.folder.exists()


def is_zombie(pid: int) -> bool:
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()
