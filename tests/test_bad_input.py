"""Whatever is wrong is told: what was found, what was expected, the next command; and no traceback but the user's."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from tests.nursery import Nursery
from tests.processes import EXPERIMENT, Result, Workplace, wait_until
from tests.servers import Answer, FakeFront
from tracked import archive
from tracked.names import CHECKPOINT

HTML = b"<html><head><title>Sign in</title></head><body>who are you?</body></html>"


def assert_told(result: Result, status: int, *words: str) -> None:
    """The command ended with `status`, and its error has three parts, with these words in them, and no traceback."""
    assert result.returncode == status, result
    assert "Traceback" not in result.stderr, result.stderr
    error = result.stderr[result.stderr.index("error: ") :]
    for part in ("error: ", "\n  expected: ", "\n  try: "):
        assert part in error, error
    for word in words:
        assert word in error, (word, error)


@dataclass
class Trained:
    """A run of two epochs, finished, with one checkpoint; a test leaves it as it was."""

    nursery: Nursery
    workplace: Workplace
    run_id: str

    def run(self, *args: str | Path, env: dict[str, str] | None = None, seconds: float = 60) -> Result:
        return self.nursery.run(self.workplace, *args, check=False, env=env, seconds=seconds)

    def train(self, change: tuple[str, str], *args: str) -> Result:
        """Train the usual experiment with a change in its text."""
        assert change[0] in EXPERIMENT
        file = self.workplace.experiment(EXPERIMENT.replace(*change), "changed.py")
        return self.run("train", file, "--epochs", "1", *args)

    @property
    def files(self) -> list[Path]:
        """Its checkpoint, wherever it is kept: with the server's artifacts, and in the spool."""
        return sorted((self.workplace.path / "mlruns").rglob("checkpoint.pt"))


def end_senders(path: Path) -> None:
    """End the senders of a spool below `path`, another one than the workplace's."""
    Workplace(path, "").end_senders()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Trained]:
    path = tmp_path_factory.mktemp("trained")
    workplace = Workplace(path, f"sqlite:///{path}/mlruns/mlflow.db")
    line = ("--epochs", "2", "--keep-last", "1", "--keep-best", "0", "--json")
    result = nursery.run(workplace, "train", workplace.experiment(), *line)
    yield Trained(nursery, workplace, result.json["run_id"])
    workplace.close()


# -- runs


@pytest.mark.parametrize("command", ["resume", "pause", "show", "verify"])
@pytest.mark.parametrize("word", ["ffffffffffff", "no such run"])
def test_an_unknown_run_is_told_with_the_command_that_lists_runs(
    trained: Trained, command: str, word: str
) -> None:
    result = trained.run(command, word)

    assert_told(result, 2, f"there is no run {word!r}", "at least 4 characters", "run list")


@pytest.mark.parametrize("command", ["resume", "pause", "verify"])
def test_a_run_of_another_tool_is_left_alone(trained: Trained, command: str) -> None:
    client = MlflowClient(trained.workplace.tracking_uri)
    theirs = client.create_run("0").info.run_id

    assert_told(trained.run(command, theirs), 1, f"run {theirs} was not made by this package", "run list")
    assert client.get_run(theirs).data.tags.get("tracked.state") is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--state", "sleeping"], ["there is no state 'sleeping'", "running, paused, finished"]),
        (["--filter", "nonsense"], ["MLflow refuses the filter 'nonsense'", "Invalid clause(s)", "AND"]),
        (
            ["--filter", "params.lr = 0.1"],
            ["Expected a quoted string value for parameter", 'params.lr = "0.05"'],
        ),
        (["--sort-by", "val/los"], ["no run has a metric 'val/los'", "train/loss, val/loss", "show last"]),
        (["--descending"], ["--descending needs a metric", "--sort-by METRIC"]),
        (["--experiment", "chess"], ["there is no experiment 'chess'", "one of Default, ", "run list"]),
    ],
)
def test_what_list_cannot_look_for_is_told(trained: Trained, line: list[str], words: list[str]) -> None:
    assert_told(trained.run("list", *line), 2, *words)


def test_a_comparison_of_less_than_two_runs_is_told(trained: Trained) -> None:
    assert_told(trained.run("compare", "last"), 2, "there is one run to compare", "two different", "run list")
    assert_told(trained.run("compare", "last", "nobody"), 2, "there is no run 'nobody'", "run list")
    absent = trained.run("compare", "--experiment", "chess")
    assert_told(absent, 2, "there is no experiment 'chess'", "one of ", "run list")


def test_a_run_without_a_checkpoint_cannot_be_resumed(trained: Trained) -> None:
    failing = EXPERIMENT.replace(
        "    model = ", "    raise ValueError('before the first checkpoint')\n    model = "
    )
    file = trained.workplace.experiment(failing, "never.py")
    id_file = trained.workplace.path / "never-id"
    assert trained.run("train", file, "--run-id-file", id_file).returncode == 1

    result = trained.run("resume", id_file.read_text().strip())

    assert_told(result, 1, "has no checkpoint (state: failed)", "tracked.checkpoint", "same `train` line")


# -- experiment files

FILES = {
    "missing": (None, 2, ["there is no file 'case.py'", "an experiment file", "experiment.py"]),
    "no python": ("def build(:\n", 2, ["case.py:1: invalid syntax", "Python source", "py_compile case.py"]),
    "neither": (
        "def bild(params): ...\n",
        2,
        ["neither build nor main; its functions: bild", "tracked.Task", "rename bild"],
    ),
    "both": (
        "def build(params): ...\ndef main(run, params): ...\n",
        2,
        ["both build (line 1) and main (line 2)", "for your own"],
    ),
    "signature": (
        "def main(run): ...\n\n",
        2,
        ["line 1 of case.py: main takes (run)", "def main(run, params)"],
    ),
    "no task": (
        "def build(params): return 3\n",
        2,
        ["returned 3 (int)", "a tracked.Task", "return tracked.Task"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_an_experiment_file_that_cannot_be_used_says_why(trained: Trained, case: str) -> None:
    text, status, words = FILES[case]
    path = trained.workplace.path / "case.py"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)

    result = trained.run("train", "case.py")

    assert_told(result, status, *words)


def test_a_file_that_raises_on_import_shows_the_users_traceback_and_none_of_our_frames(
    trained: Trained,
) -> None:
    file = trained.workplace.experiment("import torch\nimport no_such_module\n", "raises.py")

    result = trained.run("train", file)

    assert result.returncode == 2
    assert f'File "{trained.workplace.path}/raises.py", line 2' in result.stderr
    assert "error: raises.py:2 raised ModuleNotFoundError: No module named 'no_such_module'" in result.stderr
    assert "\n  try: python raises.py" in result.stderr
    assert "/tracked/" not in result.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("    model = ", "    raise RuntimeError('mine')\n    model = "),
        ("        time.sleep(params.pause)", "        raise RuntimeError('mine')"),
    ],
    ids=["build", "loss"],
)
def test_what_the_users_code_raises_is_shown_from_the_users_first_frame(
    trained: Trained, change: tuple[str, str]
) -> None:
    result = trained.train(change, "--json")

    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.rstrip().endswith("RuntimeError: mine")
    assert "/tracked/" not in result.stderr


def test_a_changed_file_is_told_and_one_that_is_gone_is_not_replaced_by_the_servers_copy(
    trained: Trained,
) -> None:
    path = trained.workplace.path / "experiment.py"
    path.write_text(
        EXPERIMENT.replace("nn.Linear(4, 4)", "nn.Linear(4, 5)").replace("Linear(4, 1)", "Linear(5, 1)")
    )
    try:
        changed = trained.run("resume", trained.run_id, "--epochs", "3")
        path.unlink()
        gone = trained.run("resume", trained.run_id, "--epochs", "3")
    finally:
        path.write_text(EXPERIMENT)

    assert f"warning: {path} has changed since the run started (sha256 " in changed.stderr
    assert_told(
        changed,
        1,
        "does not fit model: 0.weight is (4, 4) in the checkpoint and (5, 4) in the model",
        "show RUN",
    )
    assert_told(
        gone, 2, "'experiment.py', is not in this working tree", "never run", "--file", "artifacts download"
    )


# -- params and settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lrr=0.1"], ["there is no param 'lrr'", "one of lr, pause", "try: lr"]),
        (["lr=fast"], ["lr=fast cannot be read", "float", "lr=1e-3"]),
        (["lr"], ["'lr' is no override", "name=value", "lr="]),
        (["--epochs", "0"], ["epochs is 0", "1 or more", "--epochs 1"]),
        (["--checkpoint-every", "often"], ["'often' cannot be read", "200 steps", "1 epoch"]),
        (["--device", "cuda:77"], ["the device 'cuda:77' cannot be used", "auto, cpu", "--device cpu"]),
        (["--monitor", "val/nope"], ["'val/nope' is never logged", "one of val/loss", "--monitor val/loss"]),
    ],
)
def test_a_param_or_setting_that_cannot_work_ends_with_2(
    trained: Trained, words: list[str], said: list[str]
) -> None:
    assert_told(trained.run("train", "experiment.py", *words), 2, *said)


def test_a_param_is_checked_before_a_run_is_taken_over(trained: Trained) -> None:
    client = MlflowClient(trained.workplace.tracking_uri)
    before = client.get_run(trained.run_id).data

    result = trained.run("resume", trained.run_id, "--epochs", "3", "pauze=1")

    assert_told(result, 2, "there is no param 'pauze'", "lr, pause", "try: pause")
    after = client.get_run(trained.run_id).data
    assert after.params == before.params
    assert after.tags == before.tags


# -- what is logged


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run_as_failed(trained: Trained, value: str) -> None:
    id_file = trained.workplace.path / f"{value}-id"
    bad = f"return float('{value}') * nn.functional.mse_loss"

    result = trained.train(("return nn.functional.mse_loss", bad), "--run-id-file", str(id_file))

    assert_told(
        result, 1, f"the training loss is {value} at step 1", "a finite number", "smaller learning rate"
    )
    run = MlflowClient(trained.workplace.tracking_uri).get_run(id_file.read_text().strip())
    assert run.info.status == "FAILED"


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            "{'rows': lambda outputs, targets: outputs}",
            ["'rows' is a tensor of shape (8, 1)", "one number", "value.mean()"],
        ),
        ("{'text': lambda outputs, targets: 'high'}", ["'text' is the text 'high'", "one number"]),
        (
            "{'loss*2': lambda outputs, targets: 1.0}",
            ["'val/loss*2' holds a character", "letters", "'val/loss_2'"],
        ),
    ],
)
def test_a_metric_that_mlflow_could_not_take_is_told(trained: Trained, metrics: str, said: list[str]) -> None:
    result = trained.train(("batch_size=8)", f"batch_size=8, metrics={metrics})"))

    assert_told(result, 1, *said)


def test_a_key_logged_twice_at_a_step_names_both_values(trained: Trained) -> None:
    file = trained.workplace.experiment(
        "def main(run, params):\n    for _ in run.steps(2):\n        run.log({'a': 1.5})\n        run.log({'a': 2})\n",
        "twice.py",
    )

    assert_told(trained.run("train", file), 1, "'a' is logged twice at step 1: 1.5 and 2.0", "one value")


# -- checkpoints


@contextmanager
def replaced(files: list[Path], contents: bytes | None) -> Iterator[None]:
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        if contents is None:
            path.unlink()
        else:
            path.write_bytes(contents)
    yield
    for path, content in whole.items():
        path.write_bytes(content)


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "missing"])
def test_a_damaged_checkpoint_is_not_resumed_from(trained: Trained, damage: str) -> None:
    whole = trained.files[0].read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    contents = {"truncated": whole[:-100], "bit-flipped": flipped, "missing": None}[damage]

    with replaced(trained.files, contents):
        result = trained.run("resume", trained.run_id, "--epochs", "3")
        proof = trained.run("verify", trained.run_id)

    assert_told(
        result,
        1,
        f"no checkpoint of run {trained.run_id} is whole: step 16: ",
        "" if damage == "missing" else "is damaged: its SHA-256 is ",
        "SHA-256 is the recorded one",
        f"verify {trained.run_id}",
    )
    assert proof.returncode == 1
    assert "wrong  checkpoint of step 16" in proof.stdout or "wrong  the tag" in proof.stdout
    assert "Traceback" not in proof.stderr


@pytest.mark.parametrize("wrapped", ["torch file", "bare pickle"])
def test_code_in_a_checkpoint_is_never_executed_even_under_the_recorded_hash(
    trained: Trained, tmp_path: Path, wrapped: str
) -> None:
    evil, file = {"step": 16, "model_state_dict": _Malicious(tmp_path / "ran")}, tmp_path / "evil.pt"
    if wrapped == "torch file":
        torch.save(evil, file)
    else:
        file.write_bytes(pickle.dumps(evil))
    client = MlflowClient(trained.workplace.tracking_uri)
    pointer = client.get_run(trained.run_id).data.tags[CHECKPOINT]
    content = file.read_bytes()
    forged = {**json.loads(pointer), "sha256": archive.digest(file), "bytes": len(content)}
    client.set_tag(trained.run_id, CHECKPOINT, json.dumps(forged))
    try:
        with replaced(trained.files, content):
            result = trained.run("resume", trained.run_id, "--epochs", "3")
            proof = trained.run("verify", trained.run_id)
    finally:
        client.set_tag(trained.run_id, CHECKPOINT, pointer)

    assert_told(result, 1, "cannot be loaded as plain data", "SHA-256", "verify")
    assert proof.returncode == 1
    assert not (tmp_path / "ran").exists()


# -- the spool


@pytest.mark.parametrize("command", [["train", "experiment.py"], ["resume", "last"]])
@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_a_spool_that_cannot_be_written_is_told_before_anything_starts(
    trained: Trained, tmp_path: Path, command: list[str], kind: str
) -> None:
    spool = tmp_path / "spool"
    if kind == "a file":
        spool.write_text("")
    elif os.geteuid() == 0:
        spool = Path("/proc/self/spool")  # not even root can write there
    else:
        spool.mkdir(mode=0o500)

    result = trained.run(*command, "--spool-dir", spool)

    assert_told(result, 1, f"the spool at {spool}", "cannot be used", "free space", "--spool-dir")


def limited(workplace: Workplace, kib: int, *args: str) -> Result:
    """Run a command whose files may grow to so many KiB: what a full disk does to it."""
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {kib} && exec "$@"', "-", sys.executable, "-m", "tracked.run", *args],
        cwd=workplace.path,
        env=workplace.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_full_spool_is_told_before_anything_starts(trained: Trained, tmp_path: Path) -> None:
    result = limited(trained.workplace, 0, "train", "experiment.py", "--spool-dir", str(tmp_path / "spool"))

    assert_told(result, 1, f"the spool at {tmp_path / 'spool'}", "File too large", "run gc", "--spool-dir")


@pytest.mark.parametrize(
    ("kilobytes", "what"), [(12, "File too large\n"), (18, "File too large: ")], ids=["memory", "disk"]
)
def test_too_little_space_for_checkpoints_is_told_and_costs_no_point(
    trained: Trained, remote_workplace: Workplace, kilobytes: int, what: str
) -> None:
    # With all the space that it wants.
    sender = trained.nursery.start_sender(
        remote_workplace, {"TRACKED_SENDER_URI": remote_workplace.tracking_uri}
    )
    file = remote_workplace.experiment()

    result = limited(remote_workplace, kilobytes, "train", file, "--epochs", "2", "--json")

    assert f"warning: a checkpoint could not be written: {what}" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 0
    assert result.json["undelivered"] == 0
    assert result.json["checkpoint"] is None
    line = ("resume", result.json["run_id"], "--epochs", "3")
    assert_told(trained.nursery.run(remote_workplace, *line, check=False), 1, "has no checkpoint", "train")
    sender.kill()


def test_a_damaged_journal_is_told_and_kept(trained: Trained, tmp_path: Path) -> None:
    spool = tmp_path / "mlruns/spool"
    line = ("--tracking-uri", "http://127.0.0.1:9", "--spool-dir", spool)
    left = trained.run("train", "experiment.py", "--epochs", "1", "--drain-timeout", "0.1", *line)
    assert left.returncode == 3
    end_senders(tmp_path)
    (outbox,) = (path.parent for path in spool.rglob("target.json"))
    (journal,) = outbox.glob("runs/*/attempt-*")
    (journal / "start.json").unlink(missing_ok=True)
    segment = min(path for path in journal.iterdir() if path.is_file() and path.stat().st_size > 200)
    data = bytearray(segment.read_bytes())
    data[20] ^= 0xFF
    segment.write_bytes(data)

    result = trained.run("sync", "--timeout", "2", *line)

    assert result.returncode == 3, result
    assert "is damaged, so it cannot be sent; it is kept" in result.stderr
    assert "Traceback" not in result.stderr
    assert journal.is_dir()


# -- the server

REFUSING = {
    "401": (
        Answer(401, b'{"error_code": "UNAUTHENTICATED", "message": "who are you?"}', "application/json"),
        "401",
    ),
    "404": (Answer(404, b"<html>nothing here</html>"), "404"),
    "500": (Answer(500, b"<html>oops</html>"), "500"),
    "HTML": (Answer(200, HTML), "Sign in"),
}


@pytest.fixture
def front() -> Iterator[FakeFront]:
    with FakeFront() as front:
        yield front


@pytest.mark.parametrize("kind", REFUSING)
def test_a_training_goes_on_without_its_server_says_so_at_once_and_ends_with_3(
    trained: Trained, front: FakeFront, tmp_path: Path, kind: str
) -> None:
    answer, word = REFUSING[kind]
    front.answer("/", answer)
    place = Workplace(tmp_path, front.uri)
    sender = trained.nursery.start_sender(place, {"TRACKED_SENDER_URI": front.uri})  # spares its imports
    try:
        result = trained.nursery.run(
            place, "train", place.experiment(), "--epochs", "1", "--drain-timeout", "2", "--json", check=False
        )
    finally:
        sender.kill()
        place.end_senders()  # the training has started another one

    assert result.returncode == 3, result
    assert "warning: nothing is delivered at the moment: " in result.stderr
    assert word in result.stderr
    assert "points are not delivered yet" in result.stderr
    assert "try: python -m tracked.run sync" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.json["undelivered"] > 8
    assert result.json["state"] == "finished"


@pytest.mark.parametrize("kind", ["401", "404", "HTML"])
@pytest.mark.parametrize("command", [["list"], ["show", "last"], ["verify", "last"], ["resume", "last"]])
def test_a_server_that_refuses_is_told_at_once(
    trained: Trained, front: FakeFront, tmp_path: Path, command: list[str], kind: str
) -> None:
    answer, word = REFUSING[kind]
    front.answer("/", answer)
    try:
        result = trained.run(
            *command, "--tracking-uri", front.uri, "--spool-dir", tmp_path / "mlruns/spool", seconds=20
        )
    finally:
        end_senders(tmp_path)

    assert_told(result, 1, front.uri, word)


@pytest.mark.parametrize(
    "command",
    [
        *(["list"], ["show", "last"], ["verify", "last"], ["pause", "last"]),
        ["export", "last", "--form", "weights", "--to", "weights"],
    ],
)
def test_a_server_in_trouble_is_told(
    trained: Trained, front: FakeFront, tmp_path: Path, command: list[str]
) -> None:
    front.answer("/", REFUSING["500"][0])

    result = trained.run(*command, "--tracking-uri", front.uri, "--spool-dir", tmp_path / "spool")

    assert_told(result, 1, front.uri, "500")


def test_a_resume_waits_for_a_server_in_trouble_and_says_so(
    trained: Trained, front: FakeFront, tmp_path: Path
) -> None:
    front.answer("/", REFUSING["500"][0])
    line = ("--tracking-uri", front.uri, "--spool-dir", tmp_path / "mlruns/spool")
    waiting = trained.nursery.start(trained.workplace, "resume", "last", *line)
    try:
        wait_until(lambda: f"waiting for the server: {front.uri}" in waiting.errors, "the word", 20)
    finally:
        waiting.kill()
        end_senders(tmp_path)


@pytest.mark.parametrize("uri", ["ftp://host", "./mlruns", "htp://localhost:5000", "sqlite:///:memory:"])
@pytest.mark.parametrize("command", [["train", "experiment.py"], ["resume", "last"], ["list"]])
def test_an_address_that_cannot_be_one_is_refused_with_those_that_can(
    trained: Trained, command: list[str], uri: str
) -> None:
    result = trained.run(*command, "--tracking-uri", uri)

    assert_told(result, 2, repr(uri), "sqlite:///PATH/mlflow.db", "--tracking-uri sqlite:///mlruns/mlflow.db")


def test_a_resume_that_cannot_begin_leaves_the_run_as_it_was(trained: Trained) -> None:
    client = MlflowClient(trained.workplace.tracking_uri)
    before = client.get_run(trained.run_id)

    result = trained.run("resume", trained.run_id, "--epochs", "3", "--device", "cuda:77")

    assert_told(result, 2, "'cuda:77' cannot be used", "--device cpu")
    after = client.get_run(trained.run_id)
    assert after.info.status == before.info.status == "FINISHED"
    kept = ("tracked.state", "tracked.checkpoint", "tracked.stop_reason", "mlflow.tracked.settings")
    assert {name: after.data.tags.get(name) for name in kept} == {
        name: before.data.tags.get(name) for name in kept
    }


def test_patience_without_anything_to_watch_is_refused(trained: Trained) -> None:
    file = trained.workplace.experiment(
        "def main(run, params):\n    for step in run.steps(5):\n        run.log({'a': step})\n", "watch.py"
    )

    assert_told(
        trained.run("train", file, "--patience", "2"), 2, "no metric is monitored", "--monitor val/loss"
    )
