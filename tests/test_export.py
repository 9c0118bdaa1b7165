"""What `export` saves is loaded again, to the last bit, by processes that know nothing of this package."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nursery import Nursery
from tests.processes import Workplace
from tests.test_commands import place_of, silent, view_of
from tracked import checkpoint
from tracked.errors import CheckpointError, UsageError
from tracked.export import _separate, export
from tracked.names import FILE, MANIFEST
from tracked.packaging import without_package
from tracked.spool import read_json
from tracked.training import compare_states

LAYERS = """
from torch import nn

class Twice(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.first(inputs).tanh())
"""
EXPERIMENT = """
from dataclasses import dataclass
import torch
import tracked
from torch import nn
from torch.utils.data import TensorDataset
from tracked import (
    Task,
)
from export_layers import Twice

@dataclass(frozen=True)
class Params:
    width: int = 4

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.twice = Twice(width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 1)

    def forward(self, inputs):
        return self.last(self.norm(self.twice(inputs)))

def task(model, width) -> tracked.Task:
    inputs = torch.randn(32, width, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Task(
        model=model, loss=nn.functional.mse_loss, optimizer=optimizer, train_data=data, val_data=data, batch_size=8
    )

def build(params: Params) -> tracked.Task:
    return task(Net(params.width), params.width)
"""
BRANCHING = """
from export_net import Net, Params, task

class Branching(Net):
    def forward(self, inputs):
        return super().forward(inputs if inputs.sum() > 0 else -inputs)

def build(params):
    return task(Branching(params.width), params.width)
"""
LOCAL = """
from export_net import Net, Params, task

def build(params):
    class Local(Net):
        pass
    return task(Local(params.width), params.width)
"""
STOCK = """
from torch import nn
from export_net import Params, task

def build(params):
    class_of_torch = nn.Linear(2, 1)
    return task(class_of_torch, 2)
"""
OWN_LOOP = """
from export_net import Params

def main(run, params):
    pass
"""


@dataclass(frozen=True)
class Trained:
    """A run with the checkpoints of steps 4, its best one by a contrary mode, and 8."""

    workplace: Workplace
    run_id: str

    def folder(self, step: int) -> Path:
        uri = view_of(self.workplace, self.run_id).artifact_uri
        return Path(uri) / f"checkpoints/step-{step:08d}"

    def state(self, step: int) -> dict[str, Any]:
        return checkpoint.load(self.folder(step) / FILE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Trained]:
    path = tmp_path_factory.mktemp("exported")
    workplace = Workplace(path, f"sqlite:///{path}/mlruns/mlflow.db", nursery=nursery)
    workplace.experiment(LAYERS, "export_layers.py")
    file = workplace.experiment(EXPERIMENT, "export_net.py")
    for name, text in (("branching", BRANCHING), ("local", LOCAL), ("stock", STOCK), ("own_loop", OWN_LOOP)):
        workplace.experiment(text, f"export_{name}.py")
    result = workplace.tracked("train", file, "width=6", "--epochs", 2, "--mode", "max", "--json")
    workplace.end_senders()
    yield Trained(workplace, result.json["run_id"])
    workplace.close()


def elsewhere(folder: Path, script: str) -> Any:
    """What a process of its own, with nothing of this repository to import, puts into `found`."""
    lines = [
        "import json, sys, torch",
        script,
        "assert 'tracked' not in sys.modules",
        "torch.save(found, 'found.pt')",
    ]
    subprocess.run([sys.executable, "-I", "-c", "\n".join(lines)], cwd=folder, check=True)
    return torch.load(folder / "found.pt", weights_only=True)


def exported(trained: Trained, form: str, to: Path, *options: str) -> dict[str, dict[str, Any]]:
    """What the command says of each file that it has written, by name."""
    told = trained.workplace.tracked(
        "export", trained.run_id, "--form", form, "--to", to, *options, "--json"
    ).json
    assert told["run_id"] == trained.run_id
    return {Path(each["path"]).name: each for each in told["files"]}


def test_weights_load_as_a_state_dict_and_as_safetensors(trained: Trained, tmp_path: Path) -> None:
    files = exported(trained, "weights", tmp_path / "out")

    found = elsewhere(
        tmp_path,
        "import safetensors.torch\n"
        f"found = [{files['model.pt']['load']}, {files['model.safetensors']['load']}]\n",
    )

    expected = trained.state(8)["model_state_dict"]
    assert "twice.second.weight" in expected
    assert compare_states(dict(found[0]), dict(expected)) == (11, [])
    assert compare_states(found[1], dict(expected)) == (11, [])
    assert {path.name for path in (tmp_path / "out").iterdir()} == files.keys()
    assert files["model.pt"]["bytes"] == (tmp_path / "out/model.pt").stat().st_size


def test_a_module_loads_with_its_classes_and_as_a_program_without_them(
    trained: Trained, tmp_path: Path
) -> None:
    files = exported(trained, "model", tmp_path / "out")

    found = elsewhere(
        tmp_path,
        f"program = {files['model.pt2']['load']}\n"
        "assert 'export_net' not in sys.modules\n"
        f"{files['module.pt']['load'].replace('; ', '; module = ')}\n"
        "inputs = torch.arange(18.0).view(3, 6) / 7\n"
        "tied = module.twice.first.weight is module.twice.second.weight\n"
        "found = [module(inputs).detach(), program(inputs).detach(), dict(module.state_dict()), tied,\n"
        "         module.training]\n",
    )

    assert files.keys() == {"module.pt", "model.pt2", "export_net.py", "export_layers.py"}
    assert found[0].shape == (3, 1)
    torch.testing.assert_close(found[1], found[0])
    assert compare_states(found[2], dict(trained.state(8)["model_state_dict"])) == (11, [])
    assert found[3:] == [True, False]
    with zipfile.ZipFile(tmp_path / "out/model.pt2") as archive:
        samples = [archive.read(name) for name in archive.namelist() if "inputs" in name]
    assert all(len(each) < 2000 for each in samples), "no sample of the training data goes along"


def test_the_training_state_is_the_checkpoint_as_it_is(trained: Trained, tmp_path: Path) -> None:
    files = exported(trained, "training", tmp_path / "out", "--step", "4")

    found = elsewhere(
        tmp_path, f"found = [{files[FILE]['load']}['optimizer_state_dict'], {files[MANIFEST]['load']}]"
    )

    out = tmp_path / "out"
    assert (out / FILE).read_bytes() == (trained.folder(4) / FILE).read_bytes()
    assert compare_states(found[0], trained.state(4)["optimizer_state_dict"])[1] == []
    assert found[1]["sha256"] == hashlib.sha256((out / FILE).read_bytes()).hexdigest()


def test_a_module_without_classes_of_its_own_needs_no_file_beside_it(
    trained: Trained, tmp_path: Path
) -> None:
    stock = trained.workplace.tracked(
        "train", "export_stock.py", "--epochs", 1, "--experiment-name", "stock", "--json"
    ).json["run_id"]

    files = exported(Trained(trained.workplace, stock), "model", tmp_path / "out")

    assert files.keys() == {"module.pt", "model.pt2"}
    assert files["module.pt"]["load"] == f"torch.load('{tmp_path}/out/module.pt', weights_only=False)"


def test_a_module_that_torch_export_cannot_follow_is_saved_without_a_program(
    trained: Trained, tmp_path: Path
) -> None:
    result = trained.workplace.tracked(
        *(
            "export",
            trained.run_id,
            "--form",
            "model",
            "--file",
            "export_branching.py",
            "--to",
            tmp_path / "out",
        )
    )

    assert "no model.pt2: torch.export does not work here" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("module.pt", "export_branching.py", "export_net.py", "export_layers.py")
    }


@pytest.mark.parametrize(
    ("file", "status", "found"),
    [
        ("export_local.py", 1, "the module cannot be pickled"),
        ("export_own_loop.py", 2, "export_own_loop.py has main and no build"),
        ("export_stock.py", 1, "the checkpoint does not fit model"),
        ("nowhere.py", 2, "there is no file 'nowhere.py'"),
    ],
)
def test_a_module_that_cannot_be_made_is_an_error_and_leaves_nothing(
    trained: Trained, tmp_path: Path, file: str, status: int, found: str
) -> None:
    result = trained.workplace.tracked(
        *("export", trained.run_id, "--form", "model", "--file", file, "--to", tmp_path / "out"), check=False
    )

    assert result.returncode == status
    assert found in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_experiments_own_folder_takes_no_module(trained: Trained) -> None:
    before = (trained.workplace.path / "export_net.py").read_bytes()

    result = trained.workplace.tracked(
        "export", trained.run_id, "--form", "model", "--to", ".", "--force", check=False
    )

    assert result.returncode == 2
    assert "another folder" in result.stderr
    assert (trained.workplace.path / "export_net.py").read_bytes() == before


def test_the_best_checkpoint_is_the_one_that_the_mode_says(trained: Trained, tmp_path: Path) -> None:
    place = place_of(trained.workplace)

    _, best, _ = export(place, trained.run_id, "training", tmp_path / "best", silent, best=True)
    _, last, _ = export(place, trained.run_id, "training", tmp_path / "last", silent)

    assert (best, last) == (4, 8)
    assert read_json(tmp_path / "best" / MANIFEST)["value"] > 0


def test_files_are_replaced_only_by_force(trained: Trained, tmp_path: Path) -> None:
    place, run_id = place_of(trained.workplace), trained.run_id
    (tmp_path / "model.safetensors").write_text("mine")

    with pytest.raises(UsageError, match=r"holds model\.safetensors already"):
        export(place, run_id, "weights", tmp_path, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(UsageError, match="is a file"):
        export(place, run_id, "weights", tmp_path / "model.safetensors", silent, force=True)

    export(place, run_id, "weights", tmp_path, silent, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes()[:4] != b"mine"


def test_a_damaged_checkpoint_is_passed_over_and_never_exported(trained: Trained, tmp_path: Path) -> None:
    place, run_id = place_of(trained.workplace), trained.run_id
    last = trained.folder(8) / FILE
    whole = last.read_bytes()
    said: list[str] = []
    last.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    try:
        with pytest.raises(CheckpointError, match=r"step 8: the checkpoint at .* is damaged"):
            export(place, run_id, "training", tmp_path / "asked", said.append, step=8)
        _, step, _ = export(place, run_id, "training", tmp_path / "out", said.append)
    finally:
        last.write_bytes(whole)

    assert not (tmp_path / "asked").exists()
    assert step == 4
    assert (tmp_path / "out" / FILE).read_bytes() == (trained.folder(4) / FILE).read_bytes()
    assert len(said) == 1
    assert "checkpoint of step 8 cannot be used" in said[0]
    with pytest.raises(CheckpointError, match="no committed checkpoint of step 5") as refused:
        export(place, run_id, "training", tmp_path / "asked", silent, step=5)
    assert refused.value.expected.endswith("4, 8")


def test_every_module_of_a_loop_of_ones_own_is_exported(workplace: Workplace, tmp_path: Path) -> None:
    file = workplace.experiment(
        "import torch\n"
        "def main(run, params):\n"
        "    nets = {'encoder': torch.nn.Linear(2, 3), 'decoder': torch.nn.Linear(3, 2)}\n"
        "    weights = [*nets['encoder'].parameters(), *nets['decoder'].parameters()]\n"
        "    run.attach(**nets, optimizer=torch.optim.Adam(weights))\n"
        "    for step in run.steps(2):\n        run.log({'a': step})\n",
        "loop.py",
    )
    run_id = workplace.tracked("train", file, "--json").json["run_id"]

    _, step, files = export(place_of(workplace), run_id, "weights", tmp_path / "out", silent)

    assert step == 2
    assert {each.path.name for each in files} == {
        *("encoder.pt", "encoder.safetensors", "decoder.pt", "decoder.safetensors")
    }
    assert torch.load(tmp_path / "out/decoder.pt", weights_only=True)["weight"].shape == (2, 3)
    with pytest.raises(CheckpointError, match="is its best one"):
        export(place_of(workplace), run_id, "weights", tmp_path / "best", silent, best=True)


def test_tensors_that_share_memory_are_separated_with_their_values() -> None:
    whole = torch.arange(6.0).view(2, 3)

    separate = _separate({"a": whole, "b": whole, "turned": whole.T, "row": whole[1]})

    assert len({each.data_ptr() for each in separate.values()}) == 4
    assert all(each.is_contiguous() for each in separate.values())
    assert separate["turned"].equal(whole.T)
    assert separate["row"].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    "line",
    [
        "import tracked",
        "import tracked as t, json; import math",
        "import math, tracked.names",
        "from tracked import Task as T, Run",
        "from tracked.experiment import (\n    Task,  # of a loop\n)",
        "'é'; import tracked; import math",
    ],
)
def test_a_copied_file_imports_what_it_did_but_this_package(line: str) -> None:
    source = f'"""Doc."""\nfrom __future__ import annotations\n{line}\nafter = 1\n'
    standing = without_package(source)
    script = f"{standing}\nimport sys; assert 'tracked' not in sys.modules; print(after, 'math' in globals())"

    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["1", str("math" in line)]


def test_a_run_that_the_server_does_not_have_yet_is_synced_first(
    workplace: Workplace, tmp_path: Path
) -> None:
    folder = place_of(workplace).outbox().run("ab" * 16)
    folder.make()

    result = workplace.tracked(
        "export", "abababab", "--form", "training", "--to", tmp_path / "out", check=False
    )

    assert result.returncode == 1
    assert "python -m tracked.run sync" in result.stderr
    assert not (tmp_path / "out").exists()
