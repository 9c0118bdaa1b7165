"""The experiment file: loaded, refused with reasons, and found again without trusting a server."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tracked.errors import ExperimentError, ParamError, UsageError
from tracked.experiment import Task, UserCodeError, describe, load, locate

SOUND = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass(frozen=True)
class Inner:
    size: int = 2

@dataclass(frozen=True)
class Params:
    lr: float = 1e-3
    inner: Inner = Inner()

def build(params: Params):
    return params
"""


@pytest.fixture(autouse=True)
def _imports_are_put_back(tmp_path: Path) -> Iterator[None]:
    path = sys.path[:]
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path.resolve())):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "some_experiment.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def task(**changes: Any) -> Task:
    model = torch.nn.Linear(2, 1)
    fields: dict[str, Any] = {
        "model": model,
        "loss": torch.nn.functional.mse_loss,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train_data": TensorDataset(torch.zeros(4, 2), torch.zeros(4, 1)),
    }
    return Task(**{**fields, **changes})


# -- Task ------------------------------------------------------------------------------------------


def test_a_task_has_the_defaults_of_the_contract() -> None:
    made = task()
    assert (made.batch_size, made.accumulate, made.precision, made.monitor) == (32, 1, "fp32", "val/loss")
    assert (made.mode, made.scheduler_interval, made.clip_norm) == ("min", "epoch", None)


def test_a_stream_that_has_a_place_is_not_both_trained_and_validated_on() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    data = Stream()
    with pytest.raises(UsageError, match="train_data is this very one") as refused:
        task(train_data=data, val_data={"val": Stream(), "again": data})
    assert "val_data['again']" in str(refused.value)
    assert task(train_data=data, val_data=Stream()).train_data is data


def test_a_task_with_step_needs_no_loss() -> None:
    assert task(loss=None, step=lambda model, batch: model(batch[0]).sum()).loss is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": None}, "neither loss nor step"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": True}, "accumulate is True"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"mode": "lower"}, "min, max"),
        ({"scheduler_interval": "batch"}, "epoch, step"),
        ({"precision": "float16"}, "fp32, bf16, fp16"),
        ({"clip_norm": 0}, "clip_norm is 0"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"model": torch.nn.Linear}, "the class Linear itself"),
        ({"optimizer": torch.optim.SGD}, "the class SGD itself"),
        ({"scheduler": 3}, "scheduler is 3"),
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"monitor": ""}, "monitor is ''"),
        ({"train_data": None}, "train_data is None"),
        ({"train_data": DataLoader(TensorDataset(torch.zeros(1)))}, "the data set itself"),
        ({"val_data": {"test": DataLoader(TensorDataset(torch.zeros(1)))}}, "val_data['test']"),
        ({"val_data": {}}, "val_data is {}"),
        ({"loader": {"batch_size": 3}}, "loader holds 'batch_size'"),
        ({"metrics": {"loss": torch.nn.functional.l1_loss}}, "val/loss is the loss itself"),
        ({"metrics": {"mae": 3}}, "metrics['mae'] is 3"),
        ({"metrics": {"": torch.nn.functional.l1_loss}}, "a name in metrics"),
    ],
)
def test_a_task_that_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        task(**changes)
    assert said in str(error.value)


# -- load ------------------------------------------------------------------------------------------


def test_params_are_defaults_then_yaml_then_words(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, SOUND))
    config = write(tmp_path, "lr: 1e-2\ninner.size: 3\n", "config.yaml")
    made = experiment.make_params(["inner.size=4"], config)
    assert (made.lr, made.inner.size) == (1e-2, 4)
    assert type(made) is experiment.params_class


def test_the_hash_is_of_the_bytes_that_ran(tmp_path: Path) -> None:
    file = write(tmp_path, SOUND)
    experiment = load(file)
    assert experiment.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert experiment.source == file.read_bytes()


def test_a_file_without_params_takes_none(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, "def main(run, params): pass\n"))
    experiment.make_params([])
    with pytest.raises(ParamError, match="no params"):
        experiment.make_params(["lr=1"])


def test_a_neighbour_is_imported_as_from_a_script(tmp_path: Path) -> None:
    write(tmp_path, "VALUE = 7\n", "neighbour_of_experiment.py")
    text = "from neighbour_of_experiment import VALUE\ndef main(run, params): pass\n"
    assert load(write(tmp_path, text)).main is not None
    assert sys.path[0] == str(tmp_path.resolve())


def test_two_files_of_one_name_do_not_share_a_module(tmp_path: Path) -> None:
    first = load(write(tmp_path / "a", SOUND))
    second = load(write(tmp_path / "b", SOUND.replace("1e-3", "5.0")))
    assert first.params_class.__module__ != second.params_class.__module__
    assert (first.make_params([]).lr, second.make_params([]).lr) == (1e-3, 5.0)


@pytest.mark.parametrize("name", ["json.py", "mlflow.py", "torch.py", "my-own.v2.py"])
def test_a_file_named_like_a_package_takes_nobodys_place(tmp_path: Path, name: str) -> None:
    before = {module: sys.modules.get(module) for module in ("json", "mlflow", "torch")}
    experiment = load(write(tmp_path, SOUND, name))
    assert {module: sys.modules.get(module) for module in before} == before
    assert experiment.make_params([]).inner.size == 2


def test_a_file_changed_and_loaded_again_is_the_new_one(tmp_path: Path) -> None:
    load(write(tmp_path, SOUND))
    assert load(write(tmp_path, SOUND.replace("1e-3", "2e-3"))).make_params([]).lr == 2e-3


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_get_the_files_classes_by_fork_and_by_spawn(tmp_path: Path, method: str) -> None:
    file = write(
        tmp_path, SOUND + "\ndef double(params):\n    return params.lr * 2\n", "pickled_experiment.py"
    )
    code = (
        "import multiprocessing, sys\n"
        "from tracked.experiment import load\n"
        "if __name__ == '__main__':\n"
        "    experiment = load(sys.argv[1])\n"
        "    double = sys.modules[experiment.build.__module__].double\n"
        "    with multiprocessing.get_context(sys.argv[2]).Pool(1) as pool:\n"
        "        print(pool.apply(double, (experiment.make_params(['lr=2']),)))\n"
    )
    script = write(tmp_path / "elsewhere", code, "starter.py")
    answer = subprocess.run(
        [sys.executable, str(script), str(file), method],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert answer.stdout.strip() == "4.0", answer.stderr


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, SOUND, "digits.py")
    with pytest.raises(ExperimentError, match=r"digits\.py"):
        load(tmp_path / "digit.py")
    with pytest.raises(ExperimentError, match="is a folder") as error:
        load(tmp_path)
    assert "digits.py" in error.value.try_next


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def build(params:\n", ":1:"),
        ("x = 1\n\0", "null bytes"),
        ("def biuld(params): pass\ndef other(): pass\n", "rename biuld"),
        ("def biuld(params): pass\ndef other(): pass\n", "biuld, other"),
        ("x = 1\n", "functions: none"),
        ("def build(params): pass\n\ndef main(run, params): pass\n", "build (line 1) and main (line 3)"),
        ("def build(): pass\n", "build takes ()"),
        ("def build(params, more): pass\n", "def build(params)"),
        ("def main(params): pass\n", "def main(run, params)"),
        ("def build(params): pass\ndef suggest(): pass\n", "def suggest(trial)"),
        ("async def main(run, params): pass\n", "async"),
        ("build = 3\n", "build of some_experiment.py is 3"),
    ],
)
def test_a_file_with_nothing_to_train_says_what_is_missing(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ExperimentError) as error:
        load(write(tmp_path, text))
    assert said in str(error.value)


def test_params_that_can_change_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamError, match=r"Params in some_experiment\.py"):
        load(write(tmp_path, SOUND.replace("(frozen=True)\nclass Params", "\nclass Params")))


def test_a_file_that_raises_shows_the_users_own_traceback_and_leaves_no_trace(tmp_path: Path) -> None:
    modules, path = set(sys.modules), sys.path[:]
    with pytest.raises(UserCodeError, match=r"some_experiment\.py:2 raised ZeroDivisionError") as error:
        load(write(tmp_path, "def f():\n    return 1 / 0\n\nf()\n"))
    assert "return 1 / 0" in error.value.user_traceback
    assert "tracked/experiment.py" not in error.value.user_traceback
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert (set(sys.modules), sys.path) == (modules, path)


def test_a_script_that_leaves_on_import_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="__main__"):
        load(write(tmp_path, "import sys\nsys.exit(3)\n"))


def test_build_has_to_return_a_task(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, SOUND))
    with pytest.raises(ExperimentError, match=r"expected: a tracked\.Task"):
        experiment.task(experiment.make_params([]))
    with pytest.raises(ExperimentError, match="has no build"):
        load(write(tmp_path, "def main(run, params): pass\n", "own_loop.py")).task(None)


def test_what_build_raises_comes_through_unchanged(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, "def build(params):\n    raise KeyError('mine')\n"))
    with pytest.raises(KeyError, match="mine"):
        experiment.task(None)


# -- locate ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git repository `work` with `inner/some_experiment.py`, and `outside.py` beside it."""
    write(tmp_path, SOUND, "outside.py")
    (tmp_path / "work" / ".git").mkdir(parents=True)
    write(tmp_path / "work" / "inner", SOUND)
    return (tmp_path / "work").resolve()


def recorded(path: object, absolute: object = None, text: str = SOUND) -> dict[str, object]:
    return {"path": path, "absolute": absolute, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def test_a_described_file_is_found_again_from_any_folder_of_its_repository(tree: Path) -> None:
    described = describe(load(tree / "inner" / "some_experiment.py"))
    assert described["path"] == "inner/some_experiment.py"
    for cwd in (tree, tree / "inner"):
        assert locate(described, file=None, cwd=cwd) == (tree / "inner" / "some_experiment.py", [])


def test_a_repository_that_was_moved_still_finds_its_file(tree: Path, tmp_path: Path) -> None:
    described = describe(load(tree / "inner" / "some_experiment.py"))
    moved = tree.rename(tmp_path / "moved").resolve()
    assert locate(described, file=None, cwd=moved)[0] == moved / "inner" / "some_experiment.py"


def test_a_changed_file_is_found_with_a_warning(tree: Path) -> None:
    _, warnings = locate(recorded("inner/some_experiment.py", text="other"), file=None, cwd=tree)
    assert "changed since" in warnings[0]


def test_of_two_files_the_unchanged_one_is_taken(tree: Path) -> None:
    write(tree, SOUND + "# newer\n")
    write(tree / "inner", SOUND)
    assert locate(recorded("some_experiment.py"), file=None, cwd=tree / "inner") == (
        tree / "inner" / "some_experiment.py",
        [],
    )


def test_an_explicit_file_counts_anywhere(tree: Path, tmp_path: Path) -> None:
    outside = (tmp_path / "outside.py").resolve()
    assert locate(recorded("inner/some_experiment.py"), file=outside, cwd=tree) == (outside, [])
    with pytest.raises(ExperimentError, match=r"outside\.py"):
        locate(recorded("inner/some_experiment.py"), file=tmp_path / "outsid.py", cwd=tree)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.py",
        "inner/../../outside.py",
        "inner/../inner/some_experiment.py",
        "..\\outside.py",
        "/etc/passwd",
        "C:\\outside.py",
        "\\\\host\\share\\outside.py",
        "inner/some_experiment.py\0",
        "\udcff.py",
        "x" * 5000 + ".py",
        "inner",
        "",
        ".",
        "link.py",
        "linked/outside.py",
        "loop.py",
        "pipe.py",
        "inner/data.txt",
        "mlruns/artifacts/0/r/artifacts/source/some_experiment.py",
        "own_store/0/r/artifacts/source/some_experiment.py",
        ".git/hook.py",
        None,
        3,
        ["inner/some_experiment.py"],
    ],
)
def test_a_hostile_record_chooses_nothing(tree: Path, name: object) -> None:
    (tree / "link.py").symlink_to(tree.parent / "outside.py")
    (tree / "linked").symlink_to(tree.parent)
    (tree / "loop.py").symlink_to(tree / "loop.py")
    os.mkfifo(tree / "pipe.py")
    write(tree / "inner", SOUND, "data.txt")
    write(tree / "mlruns/artifacts/0/r/artifacts/source", SOUND)
    write(tree / "own_store/0/r/artifacts/source", SOUND)
    write(tree / ".git", SOUND, "hook.py")
    absolute = str(tree / name) if isinstance(name, str) else name
    for record in (recorded(name), recorded(None, absolute), recorded(None, name)):
        with pytest.raises(ExperimentError, match="never run"):
            locate(record, file=None, cwd=tree)


def test_an_absolute_path_counts_inside_the_tree_only(tree: Path) -> None:
    inside = tree / "inner" / "some_experiment.py"
    assert locate(recorded(None, str(inside)), file=None, cwd=tree)[0] == inside
    with pytest.raises(ExperimentError, match="--file"):
        locate(recorded("gone.py", str(tree.parent / "outside.py")), file=None, cwd=tree)


def test_the_root_of_the_file_system_is_no_working_tree(tree: Path) -> None:
    with pytest.raises(ExperimentError, match="--file"):
        locate(recorded(None, str(tree.parent / "outside.py")), file=None, cwd=Path("/"))


def test_the_error_says_how_to_fetch_the_copy() -> None:
    with pytest.raises(ExperimentError) as error:
        locate(recorded("gone/digits.py"), file=None, cwd=Path(__file__).parent, run_id="abc123")
    assert "mlflow artifacts download --run-id abc123 --artifact-path source/digits.py" in str(error.value)
    assert "tracked resume abc123 --file" in str(error.value)


@pytest.mark.parametrize("name", ["x; rm -rf y.py", "$(reboot).py", "--help.py", "\x1b[2J.py", "a b.py"])
def test_a_hostile_name_never_reaches_a_line_to_be_pasted(tree: Path, name: str) -> None:
    with pytest.raises(ExperimentError) as error:
        locate(recorded(name), file=None, cwd=tree, run_id="abc; reboot")
    assert name not in error.value.try_next
    assert "\x1b" not in str(error.value)
    assert "'abc; reboot'" in error.value.try_next


def test_a_file_without_repository_is_recorded_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "sub", SOUND)
    monkeypatch.chdir(tmp_path)
    described = describe(load(file))
    assert described["path"] == "sub/some_experiment.py"
    assert locate(described, file=None, cwd=tmp_path)[0] == file.resolve()


def test_defaults_are_what_a_resume_makes_of_them(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "from dataclasses import dataclass, field\nimport tracked\n"
        "@dataclass(frozen=True)\nclass Params:\n    warmup: float = 100\n    layers: list[int] = (64, 32)\n"
        "def main(run, params): ...\n",
    )
    made = load(file).make_params([])

    assert (repr(made.warmup), made.layers) == ("100.0", [64, 32])
