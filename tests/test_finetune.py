"""Transfer learning: what is frozen stays as it is, weights are taken where they fit, and a resume is as exact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tracked
from tests.experiments.tiny import FEATURES, Noisy
from tests.nursery import Nursery
from tests.processes import Workplace
from tests.proofs import state as state_of_run
from tests.trainings import Body, Trained, differing, fitting, nothing, resume, train
from tracked import finetune
from tracked.errors import CheckpointError, RunNotFound, StateMismatch, UsageError
from tracked.schedule import Settings
from tracked.training import compare_states

SETTINGS = Settings(epochs=3, checkpoint_every=("3 steps", "1 epoch"), keep_last=100, device="cpu")
STEPS = 7  # of an epoch


class Net(nn.Module):
    """Two blocks and a head, `[N, 6]` to `[N, outputs]`."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.backbone = nn.Sequential(block(FEATURES), block(8))
        self.fc = nn.Linear(8, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.fc(self.backbone(inputs))
        return outputs


def block(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU())


def frozen(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def differing_names(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# -- freezing by name


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["fc"], ["fc.weight", "fc.bias"]),
        (["fc.weight"], ["fc.weight"]),
        (
            ["*.bias"],
            ["backbone.0.0.bias", "backbone.0.1.bias", "backbone.1.0.bias", "backbone.1.1.bias", "fc.bias"],
        ),
        (["backbone.0.[0]"], ["backbone.0.0.weight", "backbone.0.0.bias"]),
        (["backbone.0.0", "f?"], ["backbone.0.0.weight", "backbone.0.0.bias", "fc.weight", "fc.bias"]),
    ],
)
def test_a_pattern_means_parameters_and_whole_modules(patterns: list[str], expected: list[str]) -> None:
    model = Net()
    finetune.freeze(model, *patterns)
    assert frozen(model) == expected
    finetune.unfreeze(model, *patterns)
    assert frozen(model) == []


def test_a_star_goes_over_dots() -> None:
    model, other = Net(), Net()
    finetune.freeze(model, "backbone.*")
    finetune.freeze(other, "backbone")
    assert (
        frozen(model) == frozen(other) == [name for name, _ in model.named_parameters() if "backbone" in name]
    )


def test_a_compiled_model_goes_by_the_names_of_the_model_in_it() -> None:
    model: Any = torch.compile(Net())
    finetune.freeze(model, "backbone")
    assert len(frozen(model)) == 8
    assert "_orig_mod" not in finetune.table(model)


def test_a_compiled_part_goes_by_the_names_that_it_has_without(tmp_path: Path) -> None:
    model, file = Net(), tmp_path / "weights.pt"
    torch.save(Net().state_dict(), file)
    model.backbone = torch.compile(model.backbone)  # type: ignore[assignment]
    finetune.freeze(model, "backbone.0", "backbone.1.0.weight")
    assert len(frozen(model)) == 5
    assert "_orig_mod" not in finetune.table(model)
    report = finetune.load_weights(model, file)
    assert (report.missing, report.unexpected) == ((), ())
    assert torch.equal(
        dict(model.named_parameters())["backbone._orig_mod.0.0.bias"], torch.load(file)["backbone.0.0.bias"]
    )


@pytest.mark.parametrize(
    ("pattern", "named"), [("bakcbone.*", "backbone"), ("fc.wieght", "fc.weight"), ("xyz", "backbone, fc")]
)
def test_a_pattern_that_freezes_nothing_is_an_error_with_the_nearest_names(pattern: str, named: str) -> None:
    model = Net()
    with pytest.raises(UsageError, match="no parameter goes by") as refused:
        finetune.freeze(model, "fc", pattern)
    assert named in str(refused.value)
    assert frozen(model) == []


def test_no_pattern_at_all_is_an_error() -> None:
    with pytest.raises(UsageError, match="no pattern"):
        finetune.freeze(Net())


def test_what_is_frozen_no_longer_moves_not_by_momentum_nor_by_a_gradient_left_behind() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model(torch.ones(4, FEATURES)).sum().backward()
        optimizer.step()
    finetune.freeze(model, "backbone")
    before = copied(model)
    optimizer.step()
    assert differing_names(before, copied(model)) == ["fc.weight", "fc.bias"]


def test_an_optimizer_gets_what_trains_now_or_later_in_the_order_of_the_model() -> None:
    model = Net()
    finetune.freeze(model, "backbone")
    head = list(model.fc.parameters())
    last = list(model.backbone[1].parameters())
    assert list(map(id, finetune.trainable(model))) == list(map(id, head))
    for also in ("backbone.1", ["backbone.1"], {3: "backbone.1.0", 5: ["backbone.1.1"]}):
        assert list(map(id, finetune.trainable(model, also=also))) == list(map(id, [*last, *head]))
    finetune.freeze(model, "fc")
    with pytest.raises(UsageError, match="every parameter of the model is frozen"):
        finetune.trainable(model)


def test_the_table_names_what_trains_and_counts_it() -> None:
    model = Net()
    finetune.freeze(model, "backbone.0", "fc.bias")
    assert finetune.table(model).splitlines() == [
        "part        trains  frozen",
        "backbone.0       –      72",
        "backbone.1      88       –",
        "fc.weight        8       –",
        "fc.bias          –       1",
        "all             96      73",
        "1 frozen normalization keeps its running statistics",
    ]


# -- frozen normalizations


def test_frozen_normalizations_are_in_eval_mode_and_nothing_else_is() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Dropout()),
        nn.BatchNorm1d(2),
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)),
        nn.BatchNorm1d(2),
    ).eval()
    finetune.freeze(model, "0", "1", "3.bias")
    finetune.train_mode(model)
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name for name, training in modes.items() if not training} == {"0.1", "1"}


# -- in the loop


def task(
    *, optimizer: str = "momentum", unfreeze: Any = None, fine: bool = True, **changes: Any
) -> tracked.Task:
    model = changes.pop("model", None) or Net()
    if fine:
        finetune.freeze(model, "backbone")
    schedule = {2: "backbone.1", 3: ["backbone.0.*"]} if unfreeze is None else unfreeze
    parameters = changes.pop("parameters", None) or finetune.trainable(model, also=schedule)
    made: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    if optimizer == "adamw":
        made = torch.optim.AdamW(parameters, lr=0.01)
    data = Noisy(26, "torch")
    given = {"loss": nn.functional.mse_loss, "train_data": data, "val_data": data, "batch_size": 4, **changes}
    return tracked.Task(
        model=model,
        optimizer=made,
        scheduler=torch.optim.lr_scheduler.StepLR(made, 1, gamma=0.7),
        unfreeze=schedule,
        **given,
    )


def body(**changes: Any) -> Body:
    return fitting(lambda: task(**changes))


def changed_between(trained: Trained, first: int, last: int) -> set[str]:
    """Which children's parameters and statistics differ between two checkpoints."""
    a, b = (trained.state(step)["model_state_dict"] for step in (first, last))
    return {".".join(name.split(".")[:2]) for name in differing_names(a, b)}


def test_the_schedule_unfreezes_at_the_beginning_of_its_epochs(tmp_path: Path) -> None:
    trained = train(tmp_path, body(), SETTINGS)
    head = {"fc.weight", "fc.bias"}
    assert changed_between(trained, 0, STEPS) == head
    assert changed_between(trained, STEPS, 2 * STEPS) == head | {"backbone.1"}
    assert changed_between(trained, 2 * STEPS, 3 * STEPS) == head | {"backbone.0", "backbone.1"}


@pytest.mark.parametrize(
    "case",
    [{"optimizer": "momentum"}, {"optimizer": "adamw"}, {"accumulate": 3, "clip_norm": 0.5}],
    ids=["momentum", "AdamW", "accumulated and clipped"],
)
def test_a_resume_from_every_checkpoint_before_at_and_after_an_unfreezing_is_exact(
    case: dict[str, Any], tmp_path: Path
) -> None:
    found = differing(tmp_path, body(**case), SETTINGS)
    assert found == nothing(found)


def test_an_unfreezing_that_a_resume_leaves_out_would_be_missed(tmp_path: Path) -> None:
    # The same optimizer in both, so that the schedule alone differs.
    later = fitting(lambda: task(unfreeze={2: "backbone.0", 3: "backbone.1"}))
    straight = train(tmp_path, body(), SETTINGS)
    assert resume(tmp_path, straight, body(), SETTINGS, STEPS) == []
    assert resume(tmp_path, straight, later, SETTINGS, STEPS) != []


def test_statistics_stay_also_where_an_evaluation_of_ones_own_ends_in_train_mode(tmp_path: Path) -> None:
    def evaluate(model: nn.Module, batches: Iterator[Any]) -> dict[str, float]:
        model.eval()
        loss = sum(float(nn.functional.mse_loss(model(inputs), targets)) for inputs, targets in batches)
        model.train()
        return {"loss": loss}

    trained = train(tmp_path, body(unfreeze={}, evaluate=evaluate), SETTINGS)
    assert changed_between(trained, 0, 3 * STEPS) == {"fc.weight", "fc.bias"}


def test_a_step_of_ones_own_may_leave_the_model_in_eval_mode(tmp_path: Path) -> None:
    modes: list[bool] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        modes.append(model.training)
        inputs, targets = batch
        model.eval()
        return nn.functional.mse_loss(model(inputs), targets)

    train(tmp_path, body(unfreeze={}, step=step, loss=None, val_data=None), SETTINGS)
    assert modes == [True] * 3 * STEPS


def test_the_table_is_logged_at_the_start_and_at_each_unfreezing(tmp_path: Path) -> None:
    trained = train(tmp_path, body(), SETTINGS)
    tables = logged_tables(trained)
    assert [text.split(":")[0] for text in tables] == ["epoch 1", "epoch 2", "epoch 3"]
    assert ["backbone" in text.split("all")[0] for text in tables] == [True] * 3
    assert [line.split() for text in tables for line in text.splitlines() if line.startswith("all")] == [
        ["all", "9", "160"],
        ["all", "97", "72"],
        ["all", "169", "0"],
    ]
    resumed = train(tmp_path, body(), SETTINGS, trained.state(STEPS))
    assert logged_tables(resumed) == tables[1:]


def test_where_everything_trains_no_table_is_logged(tmp_path: Path) -> None:
    assert logged_tables(train(tmp_path, body(fine=False, unfreeze={}), SETTINGS)) == []


def test_a_table_that_cannot_be_kept_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def without_room(run: tracked.Run) -> None:
        (run._pipe._journal.folder / "files").touch()
        body()(run)

    assert train(tmp_path, without_room, SETTINGS).run.step == 3 * STEPS
    assert "/files" in caplog.text


def logged_tables(trained: Trained) -> list[str]:
    files = trained.checkpoints.parent.glob("attempt-*/files/*/parameters.txt")
    return [path.read_text() for path in sorted(files)]


class Untouched(Noisy):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise AssertionError(f"sample {index} was asked for")


def all_frozen() -> nn.Module:
    model = Net()
    finetune.freeze(model, "*")
    return model


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "everything is frozen": (
        {"model": all_frozen(), "unfreeze": {2: "fc"}},
        "all 10 parameters of the model are frozen",
    ),
    "a schedule that names nothing": (
        {"unfreeze": {2: "backbone.7"}, "parameters": [nn.Parameter(torch.zeros(1))]},
        "no parameter goes by 'backbone.7'",
    ),
    "a schedule of what trains already": ({"unfreeze": {2: "fc"}}, "epoch 2: 'fc' is not frozen by then"),
    "a schedule of what was unfrozen before": (
        {"unfreeze": {2: "backbone", 3: "backbone.1"}},
        "epoch 3: 'backbone.1' is not frozen by then",
    ),
    "an optimizer without what will train": (
        {"unfreeze": {2: "backbone.1"}, "parameters": [nn.Parameter(torch.zeros(1))]},
        "epoch 2: the optimizer does not hold backbone.1.0.weight",
    ),
    "an optimizer of a head that was replaced": (
        {"unfreeze": {}, "parameters": list(Net().fc.parameters())},
        "the optimizer holds none of the parameters that train: fc.weight, fc.bias",
    ),
}


@pytest.mark.parametrize(("case", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_train_is_refused_before_the_first_batch(
    case: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        train(tmp_path, body(train_data=Untouched(26, "none"), **case), SETTINGS)
    assert said in str(refused.value)


@pytest.mark.parametrize("schedule", [{1: "fc"}, {0: "fc"}, {"2": "fc"}, {2: []}, {2: [3]}, "fc"])
def test_a_schedule_that_can_never_act_is_no_task(schedule: Any) -> None:
    model = Net()
    with pytest.raises(UsageError, match="Task: "):
        task(model=model, fine=False, unfreeze=schedule, parameters=list(model.parameters()))


# -- weights


def written(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": each for name, each in state.items()}


FORMS: dict[str, tuple[str, Any]] = {
    "a state dict": ("w.pt", lambda state: state),
    "safetensors": ("w.safetensors", lambda state: state),
    "a training checkpoint": ("w.pt", lambda state: {"step": 3, "model_state_dict": state, "average": {}}),
    "Lightning's": ("w.ckpt", lambda state: {"epoch": 1, "state_dict": prefixed("model.", state)}),
    "of a compiled model in DataParallel": ("w.pth", lambda state: prefixed("module._orig_mod.", state)),
    "under a name of its own": ("w.pt", lambda state: {"net_state_dict": state, "lr": {"a": torch.zeros(1)}}),
}


@pytest.mark.parametrize(("name", "form"), FORMS.values(), ids=FORMS.keys())
def test_weights_are_taken_from_every_usual_form_of_file(name: str, form: Any, tmp_path: Path) -> None:
    model, source = Net(), Net()
    source.get_buffer("backbone.0.1.running_mean").fill_(3.0)
    report = finetune.load_weights(model, written(tmp_path / name, form(copied(source))))
    assert differing_names(copied(model), copied(source)) == []
    assert report.loaded == tuple(model.state_dict())
    assert (report.missing, report.unexpected, dict(report.reshaped)) == ((), (), {})


def test_a_checkpoint_of_this_package_is_a_weights_file(tmp_path: Path) -> None:
    trained = train(tmp_path, body(), SETTINGS)
    model = Net()
    (file,) = trained.checkpoints.glob(f"*{3 * STEPS}/checkpoint.pt")
    finetune.load_weights(model, file)
    assert differing_names(copied(model), trained.last["model_state_dict"]) == []


def test_a_partial_load_reports_what_it_left(tmp_path: Path) -> None:
    source = {name: each + 1 for name, each in Net(outputs=3).state_dict().items()}
    source["extra.weight"] = source.pop("backbone.0.0.bias")
    file = written(tmp_path / "w.pt", source)
    model = Net()
    before = copied(model)

    with pytest.raises(StateMismatch, match="4 tensors do not fit"):
        finetune.load_weights(model, file)
    with pytest.raises(StateMismatch, match="2 tensors do not fit"):
        finetune.load_weights(model, file, partial="fc")
    assert differing_names(before, copied(model)) == []

    report = finetune.load_weights(model, file, partial=True)
    assert report == finetune.load_weights(model, file, partial=["fc", "extra", "*.0.bias"])
    assert (report.missing, report.unexpected) == (("backbone.0.0.bias",), ("extra.weight",))
    assert report.reshaped == {"fc.weight": ((3, 8), (1, 8)), "fc.bias": ((3,), (1,))}
    assert not {"fc.weight", "backbone.0.0.bias"} & {*report.loaded}
    assert differing_names(before, copied(model)) == list(report.loaded)
    assert "fc.weight (3, 8) → (1, 8)" in str(report)


def test_a_tied_tensor_that_a_file_holds_once_is_not_missing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    state = copied(model)
    del state["1.weight"]
    assert finetune.load_weights(model, written(tmp_path / "w.pt", state)).missing == ()


def test_a_file_that_fits_nothing_is_an_error_even_when_little_is_asked(tmp_path: Path) -> None:
    file = written(tmp_path / "w.pt", {"encoder.weight": torch.zeros(2), "fc.bias": torch.zeros(7)})
    with pytest.raises(StateMismatch, match=r"its tensors are encoder\.weight, fc\.bias") as refused:
        finetune.load_weights(Net(), file, partial=True)
    assert "backbone.0.0.weight" in str(refused.value)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_weights_file_is_refused_and_never_run(tmp_path: Path) -> None:
    file = written(tmp_path / "w.pt", {**copied(Net()), "evil": Malicious(tmp_path / "executed")})
    with pytest.raises(CheckpointError, match="cannot be loaded as plain data"):
        finetune.load_weights(Net(), file, partial=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x00" * 100])
def test_a_file_that_is_none_of_weights_is_told(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        finetune.load_weights(Net(), tmp_path / name)


def test_a_file_of_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        finetune.load_weights(Net(), written(tmp_path / "w.pt", torch.zeros(2)))


def test_a_file_that_is_not_there_is_told_with_the_nearest(tmp_path: Path) -> None:
    written(tmp_path / "weights.pt", {})
    with pytest.raises(UsageError, match="no weights file") as refused:
        finetune.load_weights(Net(), tmp_path / "weigths.pt")
    assert str(tmp_path / "weights.pt") in refused.value.try_next


# -- torchvision's models


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("vgg11", "classifier.6"),
        ("densenet121", "classifier"),
        ("mobilenet_v3_small", "classifier.3"),
        ("efficientnet_b0", "classifier.1"),
        ("convnext_tiny", "classifier.2"),
        ("swin_t", "head"),
        ("vit_b_16", "heads.head"),
    ],
)
def test_the_head_of_a_torchvision_classifier_is_replaced(name: str, head: str) -> None:
    with torch.device("meta"):
        model = finetune.pretrained(name)
    inputs = model.get_submodule(head).in_features
    assert finetune.replace_head(model, 7) == head
    replaced: Any = model.get_submodule(head)
    assert (replaced.in_features, replaced.out_features, replaced.weight.device.type) == (inputs, 7, "meta")


def test_a_model_without_a_linear_head_is_told() -> None:
    with torch.device("meta"):
        model = finetune.pretrained("squeezenet1_1")
    with pytest.raises(UsageError, match="SqueezeNet has no linear layer"):
        finetune.replace_head(model, 7)
    with pytest.raises(UsageError, match="0 outputs"):
        finetune.replace_head(Net(), 0)


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("resnet81", None, "'resnet18'"),
        ("resnet18", "IMAGENET1K_V2", "'IMAGENET1K_V1'"),
        ("resnet18", "no/such.pt", "there is no weights file no/such.pt"),
    ],
)
def test_a_model_or_weights_that_do_not_exist_are_told_with_the_nearest(
    name: str, weights: str | None, said: str
) -> None:
    with torch.device("meta"), pytest.raises(UsageError) as refused:
        finetune.pretrained(name, weights)
    assert said in str(refused.value)


SMALL, SMALLS_FILE = "shufflenet_v2_x0_5", "shufflenetv2_x0.5-f707e7126e.pth"


@pytest.fixture
def fetched(tmp_path: Path) -> Iterator[Path]:
    """Where torchvision keeps the weights that it has fetched."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


def test_torchvisions_own_weights_are_loaded_by_name_and_the_head_is_new(fetched: Path) -> None:
    source = copied(finetune.pretrained(SMALL))
    written(fetched / SMALLS_FILE, source)
    model = finetune.pretrained(SMALL, "DEFAULT", head=3)
    found = copied(model)
    assert [name for name in source if not torch.equal(source[name], found[name])] == ["fc.weight", "fc.bias"]
    assert found["fc.weight"].shape == (3, 1024)


def test_code_in_fetched_weights_is_not_run_either(fetched: Path, tmp_path: Path) -> None:
    written(fetched / SMALLS_FILE, Malicious(tmp_path / "executed"))
    with pytest.raises(CheckpointError, match="IMAGENET1K_V1"):
        finetune.pretrained(SMALL, "IMAGENET1K_V1")
    assert not (tmp_path / "executed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.usefixtures("fetched")
def test_weights_that_cannot_be_fetched_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="cannot be fetched"):
        finetune.pretrained(SMALL, "DEFAULT")


def test_a_head_in_a_file_is_taken_if_it_has_as_many_outputs(tmp_path: Path) -> None:
    source = copied(finetune.pretrained(SMALL, head=3))
    file = written(tmp_path / "w.pt", source)
    assert differing_names(source, copied(finetune.pretrained(SMALL, file, head=3))) == []
    other = copied(finetune.pretrained(SMALL, file, head=4))
    assert [name for name in source if not torch.equal(source[name], other[name])] == ["fc.weight", "fc.bias"]
    with pytest.raises(StateMismatch, match="2 tensors do not fit"):
        finetune.pretrained(SMALL, file)


# -- weights of another run

EXPERIMENT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked
from tracked import finetune

@dataclass(frozen=True)
class Params:
    weights: str = ""
    outputs: int = 1

def build(params):
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True).expand(-1, params.outputs))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, params.outputs))
    if params.weights:
        print(finetune.load_weights(model, params.weights, partial="2"))
        finetune.freeze(model, "0", "1")
    optimizer = torch.optim.SGD(finetune.trainable(model), lr=0.1)
    return tracked.Task(model=model, loss=nn.functional.mse_loss, optimizer=optimizer, train_data=data, batch_size=8)
"""


def test_the_weights_of_another_run_on_the_same_server_are_where_a_training_begins(
    nursery: Nursery, workplace: Workplace
) -> None:
    file = workplace.experiment(EXPERIMENT)
    first = nursery.run(workplace, "train", file, "--epochs", "2", "--json").json["run_id"]
    # The address is given as an option alone.
    options = ("--epochs", "1", "--json", "--tracking-uri", workplace.tracking_uri)
    elsewhere = {"MLFLOW_TRACKING_URI": f"sqlite:///{workplace.path}/elsewhere.db"}

    line = ("train", file, f"weights=run:{first}", "outputs=2", *options)
    done = nursery.run(workplace, *line, env=elsewhere)

    theirs, ours = (
        state_of_run(workplace.tracking_uri, run_id)["model_state_dict"]
        for run_id in (first, done.json["run_id"])
    )
    kept = [name for name in theirs if not name.startswith("2")]
    assert compare_states({name: theirs[name] for name in kept}, {name: ours[name] for name in kept}) == (
        7,
        [],
    )
    assert f"7 of the model's 9 tensors loaded from run:{first}" in done.stdout
    assert "reshaped (2): 2.weight (1, 4) → (2, 4), 2.bias (1,) → (2,)" in done.stdout

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    finetune.load_weights(model, f"run:{first[:12]}", tracking_uri=workplace.tracking_uri)
    assert differing_names(copied(model), theirs) == []
    for word, error in (("run:0000", RunNotFound), ("run:last", UsageError), ("run:", UsageError)):
        with pytest.raises(error):
            finetune.load_weights(model, word, tracking_uri=workplace.tracking_uri)
