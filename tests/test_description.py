"""What MLflow shows of a run beside its numbers is there, is renewed, and leaves alone what a person wrote."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from tests.processes import Workplace
from tracked import provenance
from tracked.confusion import Confusion
from tracked.datasets import described, merged
from tracked.description import renewed
from tracked.server import RunView

NOTE = "mlflow.note.content"
RUN_ID = "0" * 32


def seen(workplace: Workplace, run_id: str) -> MlflowRun:
    return MlflowClient(workplace.tracking_uri).get_run(run_id)


def test_a_run_is_described_and_its_data_named_once_whatever_is_resumed(remote_workplace: Workplace) -> None:
    workplace = remote_workplace
    file = workplace.experiment()
    begun = workplace.tracked("train", file, "lr=0.05", "--epochs", 1, "--json")
    run_id = begun.json["run_id"]
    first = seen(workplace, run_id)
    text = first.data.tags[NOTE]
    assert text.startswith("A training of **experiment**, `")
    assert f"Begun with\n\n    {first.data.tags['mlflow.tracked.command']}\n\n" in text
    assert f"    python -m tracked.run resume {run_id} --epochs N" in text
    assert first.data.tags["tracked.best"] in text
    assert "Attempts: 1, the last one finished." in text

    workplace.tracked("resume", run_id, "--epochs", 2)
    second = seen(workplace, run_id)
    assert "Attempts: 2, the last one finished." in second.data.tags[NOTE]
    assert second.data.tags["tracked.best"] in second.data.tags[NOTE]
    # One data set trains and validates there, so it is one input.
    for run in (first, second):
        assert run.inputs is not None
        (used,) = run.inputs.dataset_inputs
        assert used.dataset.name == "TensorDataset"
        assert [(tag.key, tag.value) for tag in used.tags] == [
            ("mlflow.data.context", "training, validation")
        ]
        assert json.loads(used.dataset.profile or "") == {"num_rows": 64}
        shapes = [
            each["tensor-spec"]["shape"]
            for each in json.loads(used.dataset.schema or "")["mlflow_tensorspec"]["features"]
        ]
        assert shapes == [[-1, 4], [-1, 1]]
        assert json.loads(used.dataset.source)["tags"]["mlflow.source.name"].endswith(file)

    MlflowClient(workplace.tracking_uri).set_tag(run_id, NOTE, "**Mine**: do not delete")
    workplace.tracked("resume", run_id, "--epochs", 3)
    assert seen(workplace, run_id).data.tags[NOTE] == "**Mine**: do not delete"


PROGRAM = """
import torch
import tracked
from . import width  # which its file alone cannot

with tracked.start("modules", checkpoint_every="1 epoch") as run:
    model = torch.nn.Linear(width, 1)
    run.attach(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in run.steps(3):
        pass
"""


def test_a_program_that_was_started_as_a_module_is_gone_on_with_as_one(workplace: Workplace) -> None:
    package = workplace.path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("width = 2\n")
    (package / "train.py").write_text(PROGRAM)
    begun = workplace.program("-m", "package.train")
    assert begun.wait(90) == 0, begun.communicate()
    client = MlflowClient(workplace.tracking_uri)
    experiment = client.get_experiment_by_name("modules")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    line = run.data.tags[NOTE].rpartition("\n\n    ")[2]
    assert line == f"python -m tracked.run resume {run.info.run_id} -- python -m package.train"
    # The line says `python`, as is typed where the environment is activated.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    gone_on = workplace.program(*shlex.split(line)[1:], env={"PATH": path})
    assert gone_on.wait(90) == 0, gone_on.communicate()
    assert "Attempts: 2, the last one finished." in seen(workplace, run.info.run_id).data.tags[NOTE]


@pytest.mark.parametrize(
    ("source", "command", "line"),
    [
        ("train.py", "python train.py --lr 1", "-- python train.py"),
        ("train.py", "python train.py -m package", "-- python train.py"),
        ("my nets/train.py", "", "-- python 'my nets/train.py'"),
        (".", "python .", "-- python ."),
        ("./", "python ./ --lr 1", "-- python ./"),
        ("/home/me/package/train.py", "python -um package.train x=1", "-- python -m package.train"),
        ("/home/me/package/__main__.py", "python -X dev -m package", "-- python -m package"),
    ],
)
def test_the_line_starts_the_program_as_it_was_started(source: str, command: str, line: str) -> None:
    assert last_line(source, command) == f"python -m tracked.run resume {RUN_ID} {line}"


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("/opt/ipykernel_launcher.py", "python -m ipykernel_launcher -f kernel.json"),
        ("/opt/colab_kernel_launcher.py", ""),
        ("/opt/ipykernel/__main__.py", "python -m ipykernel -f kernel.json"),
        ("/usr/bin/ipython", "python /usr/bin/ipython"),
        ("-c", "python -c 'import tracked'"),
        ("", "python"),
    ],
)
def test_what_was_typed_into_python_is_gone_on_with_there(source: str, command: str) -> None:
    assert last_line(source, command) == f'with tracked.resume("{RUN_ID}") as run:'


def last_line(source: str, command: str) -> str:
    """The line that goes on with a run of this program."""
    tags = {"mlflow.source.name": source, "mlflow.tracked.command": command}
    view = RunView(RUN_ID, "1", "a-run", "FINISHED", 0, 1, "artifacts", tags=tags)
    return renewed(view, "digits", {})[NOTE].rpartition("\n\n    ")[2]


CLASSES = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

class Flowers(TensorDataset):
    classes = ["iris", "rose", "tulip"]

def build(params):
    inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    data = Flowers(inputs, inputs[:, :3].argmax(1))
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return tracked.Task(
        model=model, loss=nn.functional.cross_entropy, optimizer=optimizer, train_data=data, val_data=data,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1), batch_size=20,
    )
"""


def git(workplace: Workplace, *words: str) -> None:
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *author, *words], cwd=workplace.path, check=True, capture_output=True)


def test_a_classification_has_its_pictures_and_what_is_not_committed(remote_workplace: Workplace) -> None:
    workplace = remote_workplace
    git(workplace, "init", "-q")
    file = workplace.experiment(CLASSES)
    (workplace.path / "settings.py").write_text("rate = 1\n")
    git(workplace, "add", file, "settings.py")
    git(workplace, "commit", "-q", "-m", "as it was")
    (workplace.path / "settings.py").write_text("rate = 2\npassword = 'topsecret'\n")

    run_id = workplace.tracked("train", file, "--epochs", 2, "--log-diff", "--json").json["run_id"]
    client = MlflowClient(workplace.tracking_uri)
    assert {each.path for each in client.list_artifacts(run_id, "plots")} == {
        "plots/curves.png",
        "plots/confusion.png",
    }
    patch = Path(client.download_artifacts(run_id, "source/diff.patch", str(workplace.path))).read_text()
    assert "-rate = 1\n+rate = 2\n" in patch
    assert "password" in patch
    assert "topsecret" not in patch
    assert "with changes that are not committed" in seen(workplace, run_id).data.tags[NOTE]


def test_confusion_counts_classes_and_passes_over_what_is_none() -> None:
    confusion = Confusion()
    confusion.update(torch.randn(4, 3), torch.randn(4))
    confusion.update(torch.randn(4, 31), torch.zeros(4, dtype=torch.long))
    confusion.update(torch.randn(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long))
    confusion.update({"logits": 1}, None)
    assert confusion.counts is None
    scores = torch.eye(3)[[0, 1, 1, 2]]
    confusion.update(scores, torch.tensor([0, 1, 2, -100]))
    confusion.update(scores, torch.tensor([0, 0, 0, 0], dtype=torch.uint8))
    assert confusion.counts == [[2, 2, 1], [0, 1, 0], [0, 1, 0]]


def test_a_long_diff_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace = Workplace(tmp_path, "")
    git(workplace, "init", "-q")
    (tmp_path / "a.txt").write_text("one\n")
    git(workplace, "add", "a.txt")
    git(workplace, "commit", "-q", "-m", "as it was")
    assert provenance.diff(tmp_path) == ""
    (tmp_path / "a.txt").write_text("word\n" * 1000)
    monkeypatch.setattr(provenance, "LONGEST_DIFF", 500)
    text = provenance.diff(tmp_path)
    assert text.startswith("diff --git a/a.txt b/a.txt\n")
    assert re.search(r"\n# \d+ more characters are left out\n$", text)
    assert len(text) < 600
    assert provenance.diff(tmp_path / "missing") == ""


INPUTS = torch.arange(40.0).view(10, 4)


def digest(data: Dataset[object]) -> str:
    return described(data, "training")["digest"]


def test_a_data_sets_digest_tells_apart_what_differs_in_type_length_or_a_sample_that_is_looked_at() -> None:
    same = [digest(TensorDataset(INPUTS)), digest(TensorDataset(INPUTS.clone()))]
    other = INPUTS.clone()
    other[5] += 1
    differing = [
        TensorDataset(INPUTS[:9]),
        TensorDataset(other),
        TensorDataset(INPUTS.double()),
        Subset(TensorDataset(INPUTS), range(10)),
    ]
    assert len({*same, *map(digest, differing)}) == 5
    assert described(differing[-1], "training")["name"] == "TensorDataset"


class Opening(Dataset[torch.Tensor]):
    """Opens what it reads on first use, and augments."""

    def __init__(self) -> None:
        self.opened = False
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> torch.Tensor:
        self.opened = True
        self.asked.append(index)
        return index + torch.rand(2)


def test_of_a_data_set_of_ones_own_no_sample_is_drawn() -> None:
    data = Opening()
    assert digest(data) == digest(Opening())
    assert digest(Subset(data, [0])) != digest(data)
    assert data.asked == []
    assert not data.opened


class Stream(IterableDataset[int]):
    name = "tweets"

    def __iter__(self) -> None:  # type: ignore[override]
        raise AssertionError("it is not gone through")


class Broken(Opening):
    def __getitem__(self, index: int) -> torch.Tensor:
        raise OSError("no such file")


def test_of_what_cannot_be_looked_at_type_and_length_have_to_do() -> None:
    stream, broken = described(Stream(), "training"), described(Broken(), "validation")
    assert (stream["name"], stream["profile"]) == ("tweets", "{}")
    assert (broken["name"], json.loads(broken["profile"])) == ("Broken", {"num_rows": 1_000_000})


def test_a_data_set_of_two_uses_is_one_input_with_both() -> None:
    train, val = described(TensorDataset(INPUTS), "training"), described(TensorDataset(INPUTS), "validation")
    (one,) = merged([train, val, val])
    assert one["context"] == "training, validation"
