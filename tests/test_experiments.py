"""The experiments that are shipped train, stop and resume through the real command line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from torch import Tensor, nn

from tests.nursery import Nursery
from tests.processes import ROOT, Workplace
from tests.proofs import artifact, assert_same_training, curves, handle_of, run_id_of, runs, state
from tests.trainings import Body, Trained, differing, fitting, nothing, train
from tracked import experiment
from tracked.errors import ExperimentError
from tracked.experiment import Experiment
from tracked.schedule import Settings
from tracked.seeding import derive, seed_generators
from tracked.tracking import Run


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A workplace with the experiments in it."""
    shutil.copytree(ROOT / "experiments", workplace.path / "experiments")
    return workplace


def write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    """Write unsigned bytes as MNIST's files hold them: magic 0x0000080N, N big-endian sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape) + array.tobytes())


def write_mnist(root: Path) -> None:
    """Images [N, 28, 28] that show their label as a bright row, 256 to train on and 64 to test on."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 256), ("t10k", 64)):
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        images = generator.integers(0, 64, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels + 4] = 255
        write_idx(root / f"MNIST/raw/{name}-images-idx3-ubyte", images)
        write_idx(root / f"MNIST/raw/{name}-labels-idx1-ubyte", labels)


def test_mnist_trained_for_three_epochs_and_resumed_to_five_is_mnist_trained_for_five(
    nursery: Nursery, place: Workplace
) -> None:
    write_mnist(place.path / "data")
    line = ("train", "experiments/mnist.py", "--json", "--epochs")
    whole = nursery.run(place, *line, "5").json
    reference = curves(place.tracking_uri, whole["run_id"]), state(place.tracking_uri, whole["run_id"])

    first = nursery.run(place, *line, "3").json
    resumed = nursery.run(place, "resume", first["run_id"], "--epochs", "5", "--json").json

    assert (first["epoch"], resumed["epoch"], resumed["resumed_from"]) == (3, 5, first["step"])
    assert resumed["run_id"] == first["run_id"]
    assert len(runs(place.tracking_uri, "mnist")) == 2
    assert resumed["metrics"]["val/accuracy"] > 0.8
    assert_same_training(place.tracking_uri, resumed["run_id"], reference)


def test_mnist_without_its_files_says_how_to_get_them(nursery: Nursery, place: Workplace) -> None:
    result = nursery.run(place, "train", "experiments/mnist.py", check=False)

    assert result.returncode == 2
    assert "error: no MNIST under 'data'" in result.stderr
    assert "download=true" in result.stderr
    assert "Traceback" not in result.stderr


def test_digits_learn_and_resume_exactly(nursery: Nursery, place: Workplace) -> None:
    # Of one name, as the pictures show it.
    line = ("train", "experiments/digits.py", "lr=0.01", "--run-name", "digits", "--json", "--epochs")
    whole = nursery.run(place, *line, "3").json
    reference = curves(place.tracking_uri, whole["run_id"]), state(place.tracking_uri, whole["run_id"])

    first = nursery.run(place, *line, "2").json
    resumed = nursery.run(place, "resume", first["run_id"], "--epochs", "3", "--json").json

    assert resumed["metrics"]["val/accuracy"] > 0.9
    assert_same_training(place.tracking_uri, resumed["run_id"], reference)
    pictures = [picture(place, whole["run_id"]), picture(place, resumed["run_id"])]
    assert pictures[0] != pictures[1], "the place where it was resumed is marked"


def picture(place: Workplace, run_id: str) -> bytes:
    """The run's curves as they stand on the server: a PNG."""
    client = MlflowClient(place.tracking_uri)
    found = Path(client.download_artifacts(run_id, "plots/curves.png", str(place.path))).read_bytes()
    assert found.startswith(b"\x89PNG")
    return found


def test_a_resnet_with_a_frozen_backbone_resumes_exactly_across_its_unfreezing(
    nursery: Nursery, place: Workplace
) -> None:
    small = ("size=32", "samples=96", "unfreeze=2")
    line = ("train", "experiments/finetune.py", *small, "--json", "--epochs")
    whole = nursery.run(place, *line, "2").json
    reference = curves(place.tracking_uri, whole["run_id"]), state(place.tracking_uri, whole["run_id"])

    first = nursery.run(place, *line, "1").json
    before = state(place.tracking_uri, first["run_id"])["model_state_dict"]
    resumed = nursery.run(place, "resume", first["run_id"], "--epochs", "2", "--json").json

    assert_same_training(place.tracking_uri, resumed["run_id"], reference)
    after = state(place.tracking_uri, resumed["run_id"])["model_state_dict"]
    assert {name.split(".")[0] for name in before if not before[name].equal(after[name])} == {"layer4", "fc"}
    text = artifact(place.tracking_uri, resumed["run_id"], "parameters.txt")
    assert re.search(r"^layer4 +8,393,728 +–$", text, re.MULTILINE)
    assert re.search(r"^all +8,395,780 +2,782,784$", text, re.MULTILINE)


def test_the_finetuning_takes_a_folder_of_images(nursery: Nursery, place: Workplace) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (place.path / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place.path / "pictures" / name / f"{number}.png")
    line = ("train", "experiments/finetune.py", "size=32", "batch_size=4", "--max-steps", "3", "--json")

    done = nursery.run(place, *line, "data=pictures").json
    wrong = nursery.run(place, *line, "data=nothing", check=False)

    assert done["step"] == 3
    assert state(place.tracking_uri, done["run_id"])["model_state_dict"]["fc.bias"].shape == (3,)
    assert wrong.returncode == 2
    assert "no images under 'nothing'" in wrong.stderr


def test_the_own_loop_as_an_experiment_file_resumes_exactly(nursery: Nursery, place: Workplace) -> None:
    line = ("train", "experiments/own_loop.py", "--json", "--epochs")
    whole = nursery.run(place, *line, "3").json
    reference = curves(place.tracking_uri, whole["run_id"]), state(place.tracking_uri, whole["run_id"])

    first = nursery.run(place, *line, "2").json
    resumed = nursery.run(place, "resume", first["run_id"], "--epochs", "3", "--json").json

    assert resumed["epoch"] == 3
    assert_same_training(place.tracking_uri, resumed["run_id"], reference)


# How each is trained, and the steps at which it is killed: inside an epoch, with points on the server beyond its
# checkpoint. What is particular to it happens on both sides: an unfreezing at step 4, the end of patience, a plateau.
KILLED = {
    "mnist": ("--epochs 3 --checkpoint-every '2 steps'", (3, 10)),
    "iris": (
        "--epochs 90 lr=0.1 --eval-every '5 epochs' --patience 4 --min-delta 0.1 --checkpoint-every '7 epochs'",
        (8, 19),
    ),
    "accumulate": ("--epochs 2 --checkpoint-every '9 steps'", (12, 31)),
    "finetune": ("--epochs 3 size=32 samples=96 unfreeze=2 --checkpoint-every '2 steps'", (5, 8)),
    "detection": (
        "--max-steps 8 width=4 samples=36 batch_size=8 --eval-every '2 steps' --checkpoint-every '2 steps'",
        (3, 6),
    ),
    "language_model": (
        "--epochs 2 width=8 lines=150 tokens=900 accumulate=2 --eval-every '5 steps' --checkpoint-every '3 steps'",
        (4, 9),
    ),
    "gan": ("--max-steps 40 hidden=16 --checkpoint-every '8 steps'", (12, 30)),
    "recipe": (
        "--max-steps 30 width=16 warm_up=8 --eval-every '10 steps' --checkpoint-every '4 steps'",
        (7, 22),
    ),
    "stream": (
        "--max-steps 24 width=8 workers=2 --eval-every '4 steps' --checkpoint-every '3 steps'",
        (5, 17),
    ),
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_twice_an_experiment_ends_as_if_nothing_had_happened(
    name: str, nursery: Nursery, place: Workplace
) -> None:
    if name == "mnist":
        write_mnist(place.path / "data")
    text, (once, twice) = KILLED[name]
    line = ("train", f"experiments/{name}.py", *shlex.split(text), "--json")
    whole = nursery.run(place, *line).json
    reference = curves(place.tracking_uri, whole["run_id"]), state(place.tracking_uri, whole["run_id"])

    first = nursery.start(place, *line, env={"KILLED_AT_STEP": str(once)})
    run_id = run_id_of(place, handle_of(first))
    assert first.wait().returncode == -signal.SIGKILL
    second = nursery.run(place, "resume", run_id, env={"KILLED_AT_STEP": str(twice)}, check=False)
    last = nursery.run(place, "resume", run_id, "--json").json

    assert second.returncode == -signal.SIGKILL
    assert 0 < last["resumed_from"] <= twice
    assert (last["run_id"], last["state"], last["step"]) == (run_id, whole["state"], whole["step"])
    assert len(runs(place.tracking_uri, name)) == 2
    assert_same_training(place.tracking_uri, run_id, reference)


# -- in this process and without a server: what is particular to each of these


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Experiment]:
    """Loads one of the experiments by its name, as the command line does."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return lambda name: experiment.load(ROOT / f"experiments/{name}.py")


def built(found: Experiment, **params: Any) -> Body:
    return fitting(lambda: found.task(found.params_class(**params)))


def values(trained: Trained, key: str) -> dict[int, float]:
    return {step: float(value) for name, step, value in trained.points if name == key}


def test_irises_are_told_apart_by_the_very_weights_that_a_bare_loop_ends_with(
    shipped: Callable[[str], Experiment], tmp_path: Path
) -> None:
    iris, faster = shipped("iris"), 0.1  # ten times its rate, for a tenth of the epochs
    settings = Settings(
        epochs=800, eval_every="200 epochs", patience=50, checkpoint_every="400 epochs", device="cpu"
    )
    found = train(tmp_path, built(iris, lr=faster), settings)

    seed_generators(derive(0, "build"))
    task = iris.task(iris.params_class(lr=faster))
    inputs, targets = task.train_data.tensors  # type: ignore[attr-defined]
    for _ in range(800):
        loss = nn.functional.cross_entropy(task.model(inputs), targets)
        task.optimizer.zero_grad()
        loss.backward()
        task.optimizer.step()

    assert [*values(found, "val/accuracy")] == [200, 400, 600, 800]
    assert values(found, "val/accuracy")[800] == pytest.approx(29 / 30)
    weights = found.last["model_state_dict"]
    assert all(weights[name].equal(value) for name, value in task.model.state_dict().items())


def test_four_accumulated_batches_make_the_steps_of_one_four_times_as_large(
    shipped: Callable[[str], Experiment], tmp_path: Path
) -> None:
    accumulate, settings = shipped("accumulate"), Settings(max_steps=8, device="cpu")
    parts = train(tmp_path, built(accumulate, batch_size=16, accumulate=4), settings)
    whole = train(tmp_path, built(accumulate, batch_size=64, accumulate=1), settings)

    losses = values(parts, "train/loss")
    assert [*losses] == [*range(1, 9)]
    assert losses == pytest.approx(values(whole, "train/loss"), rel=1e-4)
    assert losses[8] < losses[1]


def test_the_detector_logs_its_precision_and_resumes_exactly(
    shipped: Callable[[str], Experiment], tmp_path: Path
) -> None:
    detection = shipped("detection")
    settings = Settings(
        max_steps=6, eval_every="2 steps", checkpoint_every="1 steps", keep_last=9, device="cpu"
    )
    body = built(detection, width=4, samples=36, batch_size=8)
    found = differing(tmp_path, body, settings)
    assert found == nothing(found)
    logged = train(tmp_path, body, settings)
    for key in ("val/loss", "val/map", "val/map_50"):
        assert [*values(logged, key)] == [2, 4, 6]


def test_the_detector_says_what_to_install(
    shipped: Callable[[str], Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # as if it were not there
    detection = shipped("detection")
    with pytest.raises(ExperimentError, match="pip install torchmetrics pycocotools"):
        detection.task(detection.params_class(samples=6))


def test_the_language_model_weighs_by_tokens_and_resumes_exactly_in_the_middle_of_its_own_batches(
    shipped: Callable[[str], Experiment], tmp_path: Path
) -> None:
    language_model = shipped("language_model")
    settings = Settings(
        epochs=2, eval_every="5 steps", checkpoint_every="3 steps", keep_last=99, device="cpu"
    )
    small = {"width": 8, "lines": 150, "tokens": 900, "accumulate": 2}
    found = differing(tmp_path, built(language_model, **small), settings)
    assert found == nothing(found)

    last = train(tmp_path, built(language_model, **small), settings)
    losses, final = values(last, "train/loss"), last.run.step
    assert losses[final] < losses[1]
    task = language_model.task(language_model.params_class(**small))
    task.model.load_state_dict(last.last["model_state_dict"])
    total, tokens = 0.0, 0
    lines: list[Tensor] = list(task.val_data)  # type: ignore[arg-type]
    for line in lines:
        logits = task.model(line[None, :-1])[0].detach()
        total += nn.functional.cross_entropy(logits, line[1:], reduction="sum").item()
        tokens += len(line) - 1
    assert values(last, "val/loss")[final] == pytest.approx(total / tokens, rel=1e-5)


def test_the_two_networks_of_the_gan_resume_exactly(
    shipped: Callable[[str], Experiment], tmp_path: Path
) -> None:
    gan = shipped("gan")

    def body(run: Run) -> None:
        seed_generators(derive(run.settings.seed, "build"))
        assert gan.main is not None
        gan.main(run, gan.params_class(hidden=16))

    settings = Settings(max_steps=30, checkpoint_every="8 steps", keep_last=9, device="cpu")
    found = differing(tmp_path, body, settings)
    assert found == nothing(found)
    straight = train(tmp_path, body, settings)
    for key in ("discriminator/loss", "generator/loss"):
        assert [*values(straight, key)] == [*range(1, 31)]
    moments = straight.last["generator_optimizer_state_dict"]["state"][0]["exp_avg"]
    assert torch.count_nonzero(moments), "both optimizers are saved"
    assert "discriminator_optimizer_state_dict" in straight.last


# -- a script, and the demo


# Kills the script at its 60th step, once, when the server has the checkpoint before it.
KILLED_ONCE = """
import os, pathlib, runpy, signal, time, tracked
original, flag = tracked.Run.log, pathlib.Path("killed")
def log(run, values, step=None):
    original(run, values, step)
    if run.step == 60 and not flag.exists():
        while not run._attempt.folder.about.get("committed"):
            time.sleep(0.01)
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
tracked.Run.log = log
runpy.run_path("experiments/own_loop.py", run_name="__main__")
"""


@pytest.mark.timeout(240)
def test_the_own_loop_as_a_script_is_killed_and_resumed_by_its_run_id(place: Workplace) -> None:
    (place.path / "killed.py").write_text(KILLED_ONCE)
    path = f"{place.path / 'experiments'}{os.pathsep}{ROOT}"

    def script(*command: str, ends_with: int = 0) -> None:
        done = subprocess.run(
            command,
            cwd=place.path,
            env=place.environment({"PYTHONPATH": path}),
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == ends_with, done.stdout + done.stderr

    script(sys.executable, "experiments/own_loop.py")
    script(sys.executable, "killed.py", ends_with=-9)
    resume = (sys.executable, "-m", "tracked.run", "resume")
    (box,) = place.outboxes()
    (handle,) = (run.handle for run in box.runs() if run.journals() or "state" not in run.about)
    script(*resume, handle, "--", sys.executable, "experiments/own_loop.py")

    found = runs(place.tracking_uri, "digits")
    resumed, whole = (run.info.run_id for run in found)
    assert len(found) == 2
    reference = curves(place.tracking_uri, whole), state(place.tracking_uri, whole)
    assert_same_training(place.tracking_uri, resumed, reference)


@pytest.mark.timeout(240)
def test_the_demo_proves_that_nothing_differs(tmp_path: Path) -> None:
    place = Workplace(tmp_path, f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    try:
        done = subprocess.run(
            [sys.executable, ROOT / "experiments/demo.py"],
            cwd=tmp_path,
            env=place.environment({"TRACKED_SPOOL": str(place.spool)}),
            capture_output=True,
            text=True,
            check=False,
            timeout=220,
        )
    finally:
        place.close()

    assert done.returncode == 0, done.stdout + done.stderr
    assert "4  killed and resumed = uninterrupted" in done.stdout
    assert re.search(r"[1-9]\d* points stood beyond it; recomputed, and all equal", done.stdout)
    assert re.search(r"history: 2184 points, each step of each key exactly once, all equal", done.stdout)
