"""The promise: resumed from any checkpoint, the same weights, optimizer state and curves, to the last bit."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import tracked
from tests.experiments import own, tiny
from tests.processes import ROOT, Workplace, wait_until
from tests.trainings import (
    Body,
    State,
    copied,
    differences,
    differing,
    draw_everywhere,
    fitting,
    nothing,
    resume,
    train,
)
from tracked import checkpoint, loop
from tracked.errors import StateMismatch
from tracked.place import Place
from tracked.schedule import Settings
from tracked.tracking import Paused, Run
from tracked.training import Request, check, compare_states, leaving_on_signals

# Steps 3, 6 and 9 lie inside epochs of 7 steps, 7 and 14 at their ends.
SETTINGS = Settings(epochs=2, checkpoint_every=("3 steps", "1 epoch"), keep_last=100, device="cpu")


def tiny_body(**params: Any) -> Body:
    return fitting(lambda: tiny.build(tiny.Params(**params)))


def own_body(**params: Any) -> Body:
    return lambda run: own.main(run, own.Params(**params))


CASES: dict[str, dict[str, Any]] = {
    "augmentation by Python's generator": {"noise": "python"},
    "augmentation by NumPy's generator": {"noise": "numpy"},
    "augmentation by torch's generator": {"noise": "torch"},
    "random collate": {"collate": True, "noise": "none"},
    "tensors fetched whole": {"noise": "none", "batch_size": 6},
    "layers that draw in evaluation": {"stream": True},
    "SGD": {"optimizer": "sgd"},
    "Nesterov momentum and weight decay": {"optimizer": "nesterov"},
    "AdamW": {"optimizer": "adamw"},
    "AMSGrad": {"optimizer": "amsgrad"},
    "RMSprop": {"optimizer": "rmsprop"},
    "Adagrad": {"optimizer": "adagrad"},
    **{
        name: {"optimizer": name.lower(), "lr": 0.01}
        for name in ("Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")
    },
    "LBFGS, which asks several times": {"optimizer": "lbfgs", "accumulate": 3, "clip": 0.5},
    "a fused optimizer behind a scaler": {"optimizer": "fused", "precision": "fp16", "clip": 0.5},
    "two parameter groups": {"optimizer": "two groups", "scheduler": "step"},
    "a schedule per epoch": {"scheduler": "step"},
    "one cycle per step": {"scheduler": "one cycle"},
    "cosine per step": {"scheduler": "cosine", "optimizer": "adamw"},
    "a lambda per step": {"scheduler": "lambda"},
    "a cyclic schedule per step": {"scheduler": "cyclic"},
    "milestones per step": {"scheduler": "multistep"},
    "warm-up, then cosine": {"scheduler": "warm-up"},
    "an exponential schedule per epoch": {"scheduler": "exponential"},
    "a product per step": {"scheduler": "multiplied"},
    "a polynomial per step": {"scheduler": "polynomial"},
    "warm restarts per step": {"scheduler": "restarts"},
    "two schedules at once": {"scheduler": "chained"},
    "a schedule for each group": {"scheduler": "rates by group", "optimizer": "two groups"},
    "a schedule that waits on a plateau": {"scheduler": "plateau"},
    "accumulation, with a short last window": {"accumulate": 3, "samples": 34, "scheduler": "warm-up"},
    "clipped gradients": {"clip": 0.5},
    "bfloat16": {"precision": "bf16"},
    "float16 with a scaler that skips steps": {"precision": "fp16", "scale": 30.0, "lr": 1e-4},
    "a compiled model": {"backend": "aot_eager", "optimizer": "adamw"},
    "a compiled model with a scaler": {"backend": "eager", "precision": "fp16", "clip": 0.5, "accumulate": 2},
    "tied weights": {"tied": True, "optimizer": "adamw"},
    "channels last": {"pictures": True, "optimizer": "adamw"},
    "no validation": {"evaluate": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_resume_from_every_checkpoint_ends_in_the_same_bits(case: dict[str, Any], tmp_path: Path) -> None:
    found = differing(tmp_path, tiny_body(**case), SETTINGS)
    assert found == nothing(found)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_number_of_workers_may_change(before: int, after: int, accumulate: int, tmp_path: Path) -> None:
    # Layers that draw during an evaluation too, which builds its batches in the workers as well.
    case = {"collate": True, "noise": "numpy", "stream": True, "accumulate": accumulate, "samples": 34}
    settings = Settings(epochs=2, checkpoint_every=("4 steps",), keep_last=100, device="cpu")
    later = tiny_body(**case, workers=after)
    straight = train(tmp_path, tiny_body(**case, workers=before), settings)
    for step in straight.steps[1:-1]:
        assert resume(tmp_path, straight, later, settings, step) == []


OWN_LOOPS: dict[str, dict[str, Any]] = {
    "by batches": {},
    "by batches, accumulating": {"accumulate": 3},
    "by steps": {"by_steps": True},
    "gradients set to None": {"set_to_none": True},
}


@pytest.mark.parametrize("case", OWN_LOOPS.values(), ids=OWN_LOOPS.keys())
def test_a_loop_of_ones_own_resumes_as_exactly(case: dict[str, Any], tmp_path: Path) -> None:
    # An average of the weights, a curriculum in run.state, gradients of zero beside None, NaN and infinities.
    found = differing(tmp_path, own_body(**case), Settings(checkpoint_every=("2 steps",), keep_last=100))
    assert found == nothing(found)


def test_the_optimizer_is_mapped_by_name_when_the_order_of_parameters_has_changed(tmp_path: Path) -> None:
    straight = train(tmp_path, tiny_body(optimizer="adamw"), SETTINGS)
    reversed_ = train(tmp_path, tiny_body(optimizer="adamw", reversed=True), SETTINGS, straight.state(6))
    expected, found = straight.last, reversed_.last
    assert compare_states(expected["model_state_dict"], found["model_state_dict"])[1] == []
    assert by_name(expected) == by_name(found)
    assert [point for point in straight.points if point[1] > 6] == reversed_.points


def by_name(state: State) -> dict[str, dict[str, Any]]:
    """What the optimizer knows of each parameter, in a form that `==` compares."""
    (names,) = state["optimizer_parameters"]["optimizer"]
    (group,) = state["optimizer_state_dict"]["param_groups"]
    return {
        name: {key: value.tolist() for key, value in state["optimizer_state_dict"]["state"][index].items()}
        for name, index in zip(names, group["params"], strict=True)
    }


def test_a_plateau_is_judged_by_the_same_value_when_the_evaluation_lies_before_the_checkpoint(
    tmp_path: Path,
) -> None:
    settings = Settings(
        epochs=4, eval_every="2 epochs", checkpoint_every=("1 epoch",), keep_last=100, device="cpu"
    )
    found = differing(tmp_path, tiny_body(scheduler="plateau"), settings)
    assert found == nothing(found)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_by_iterations_that_restarts_the_data_resumes_as_exactly(
    accumulate: int, tmp_path: Path
) -> None:
    # Evaluations and logs on grids of their own, by steps and by epochs, across the ends of epochs.
    params = {"accumulate": accumulate, "collate": True, "scheduler": "one cycle"}
    for evaluated, logged in (("3 steps", "1 epoch"), ("1 epoch", "2 steps")):
        settings = Settings(
            max_steps=11, eval_every=evaluated, log_every=logged, checkpoint_every=("2 steps",), keep_last=100
        )
        found = differing(tmp_path, tiny_body(**params), settings)
        assert found == nothing(found)


def test_a_training_by_iterations_is_made_longer_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    longer = Settings(max_steps=11, checkpoint_every=("100 steps",), keep_last=100, device="cpu")
    first = train(tmp_path, tiny_body(), replace(longer, max_steps=5))
    straight, second = (train(tmp_path, tiny_body(), longer, state) for state in (None, first.last))
    assert (first.run.step, second.run.step) == (5, 11)
    second.points[:] = [point for point in first.points if point[1] <= 5] + second.points
    assert straight.points == second.points
    models = [each.last["model_state_dict"] for each in (straight, second)]
    assert compare_states(*models)[1] == []


def test_what_trains_in_nobodys_hands_has_no_say_in_what_is_clipped(tmp_path: Path) -> None:
    def built() -> tracked.Task:
        task = tiny.build(tiny.Params(clip=0.1, accumulate=2))
        # The other layers gather gradients that nobody takes back.
        task.optimizer = torch.optim.SGD(task.model[4].parameters(), lr=0.05)  # type: ignore[index]
        return task

    found = differing(tmp_path, fitting(built), SETTINGS)
    assert found == nothing(found)


LOADERS: dict[str, dict[str, Any]] = {
    "pinned memory": {"num_workers": 1, "pin_memory": True},
    "workers that seed themselves": {"num_workers": 2, "worker_init_fn": random.seed},
    "workers that stay": {
        "num_workers": 2,
        "persistent_workers": True,
        "prefetch_factor": 3,
        "timeout": 30,
        "drop_last": True,
    },
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
def test_whatever_the_loader_is_told_a_resume_is_exact(loader: dict[str, Any], tmp_path: Path) -> None:
    def built() -> tracked.Task:
        task = tiny.build(tiny.Params(noise="python"))
        task.loader = loader
        return task

    settings = Settings(max_steps=9, checkpoint_every=("4 steps",), keep_last=100, device="cpu")
    found = differing(tmp_path, fitting(built), settings)
    assert found == nothing(found)


@pytest.mark.parametrize("every", [3, 5])
def test_a_mean_over_several_steps_goes_on_across_a_resume(every: int, tmp_path: Path) -> None:
    settings = Settings(epochs=2, log_every=every, checkpoint_every=("2 steps",), keep_last=100, device="cpu")
    found = differing(tmp_path, tiny_body(scheduler="step"), settings)
    assert found == nothing(found)


# No improvement is ever large enough, so the fourth evaluation, at step 12, is the last.
PATIENT = Settings(
    epochs=20,
    eval_every="3 steps",
    checkpoint_every=("2 steps",),
    patience=3,
    min_delta=1e6,
    keep_last=100,
    device="cpu",
)


def test_patience_counts_on_across_a_resume(tmp_path: Path) -> None:
    straight = train(tmp_path, tiny_body(), PATIENT)
    assert straight.run.last_state == "stopped_early"
    stopping = straight.run.stopping
    for step in [step for step in straight.steps if 0 < step < straight.run.step]:
        state = straight.state(step)
        resumed = train(tmp_path, tiny_body(), PATIENT, state, straight)
        assert differences(straight, resumed, step) == []
        assert resumed.run.last_state == "stopped_early"
        assert resumed.run.stopping == stopping
    assert any(straight.state(step)["stopping"]["waited"] for step in straight.steps[:-1])


def test_a_training_out_of_patience_ends_with_its_best_weights(tmp_path: Path) -> None:
    settings = Settings(
        epochs=20, eval_every="3 steps", patience=3, min_delta=1e6, keep_last=100, device="cpu"
    )
    model: list[torch.nn.Module] = []

    def body(run: Run) -> None:
        task = tiny.build(tiny.Params(noise="none"))
        model[:] = [task.model]
        loop.fit(task, run)

    trained = train(tmp_path, body, settings)
    best = trained.state(trained.run.stopping.best_step)
    assert trained.run.stopping.best_step < trained.run.step
    assert compare_states(dict(model[0].state_dict()), best["model_state_dict"])[1] == []
    assert compare_states(trained.last["model_state_dict"], best["model_state_dict"])[1]
    values = {(key, step): float(value) for key, step, value in trained.points}
    assert values["best/val/loss", trained.run.step] == values["val/loss", best["step"]]
    assert values["best/val/loss", trained.run.step] != values["val/loss", trained.run.step]


def test_a_checkpoint_that_the_clock_asked_for_is_as_exact(tmp_path: Path) -> None:
    settings = Settings(epochs=2, checkpoint_every=("0.001 s",), keep_last=100, device="cpu")
    straight = train(tmp_path, tiny_body(scheduler="one cycle"), settings)
    assert len(straight.steps) > 4
    for step in straight.steps[1:-1:3]:
        # What the clock asks for afterwards has no say in any value.
        assert resume(tmp_path, straight, tiny_body(scheduler="one cycle"), settings, step) == []


def test_two_resumes_after_each_other_are_exact_too(tmp_path: Path) -> None:
    straight = train(tmp_path, tiny_body(scheduler="warm-up"), SETTINGS)
    second = train(tmp_path, tiny_body(scheduler="warm-up"), SETTINGS, straight.state(3))
    third = train(tmp_path, tiny_body(scheduler="warm-up"), SETTINGS, second.state(9))
    second.points[:] = [point for point in second.points if point[1] <= 9] + third.points
    third.points = second.points
    assert differences(straight, third, 3) == []


# -- negative controls: what is left out must be missed


def without(*path: str | int) -> Callable[[State], None]:
    """Empty what `path` leads to, as if it had never been saved."""

    def spoil(state: State) -> None:
        found: Any = state
        for key in path[:-1]:
            found = found[key]
        value = found[path[-1]]
        found[path[-1]] = torch.zeros_like(value) if isinstance(value, torch.Tensor) else type(value)()

    return spoil


def with_value(value: Any, *path: str | int) -> Callable[[State], None]:
    def spoil(state: State) -> None:
        found: Any = state
        for key in path[:-1]:
            found = found[key]
        assert found[path[-1]] != value
        found[path[-1]] = value

    return spoil


def last_bit(state: State) -> None:
    weight = state["model_state_dict"]["0.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(math.inf))


def swapped_names(state: State) -> None:
    (names,) = state["optimizer_parameters"]["optimizer"]
    # Two parameters of one shape, so that nothing but the values can tell.
    first, second = names.index("model.1.weight"), names.index("model.1.bias")
    names[first], names[second] = names[second], names[first]


def without_momentum(state: State) -> None:
    for each in state["optimizer_state_dict"]["state"].values():
        each["momentum_buffer"] = None


CONTROLS: dict[str, tuple[dict[str, Any], Callable[[State], None]]] = {
    "the last bit of a weight": ({}, last_bit),
    "a buffer": ({}, without("model_state_dict", "1.running_mean")),
    "the count of batches in a buffer": ({}, without("model_state_dict", "1.num_batches_tracked")),
    "the optimizer's state": ({"optimizer": "adamw"}, without("optimizer_state_dict", "state")),
    "momentum": ({}, without_momentum),
    "the optimizer's own count of steps": (
        {"optimizer": "adamw"},
        without("optimizer_state_dict", "state", 0, "step"),
    ),
    "the learning rate in a group": ({}, with_value(0.04, "optimizer_state_dict", "param_groups", 0, "lr")),
    "the names of the optimizer's parameters": ({"optimizer": "adamw"}, swapped_names),
    "a scheduler per step": ({"scheduler": "one cycle"}, without("scheduler_state_dict")),
    "a scheduler per epoch": ({"scheduler": "step"}, without("scheduler_state_dict")),
    "a scheduler's nested state": (
        {"scheduler": "warm-up"},
        with_value(0, "scheduler_state_dict", "_schedulers", 1, "last_epoch"),
    ),
    "a plateau's count": (
        {"scheduler": "long plateau"},
        with_value(1, "scheduler_state_dict", "num_bad_epochs"),
    ),
    "a plateau's best": ({"scheduler": "plateau"}, with_value(0.0, "scheduler_state_dict", "best")),
    "the place in the epoch": ({}, without("batch")),
    "the epoch": ({}, without("epoch")),
    "the step": ({}, with_value(10, "step")),
    "the seed": ({}, with_value(1, "settings", "seed")),
    "the counts of points": ({}, with_value(1, "points", "counts", "train/loss")),
    "the last learning rate logged": ({}, lambda state: state["points"]["last"].pop("lr")),
    "the best value so far": ({}, with_value(0.0, "stopping", "best")),
    "the scaler": (
        {"precision": "fp16", "scale": 30.0, "lr": 1e-4},
        with_value(65536.0, "scaler_state_dict", "scale"),
    ),
}


@pytest.mark.parametrize(("case", "spoil"), CONTROLS.values(), ids=CONTROLS.keys())
def test_left_out_it_is_missed(case: dict[str, Any], spoil: Callable[[State], None], tmp_path: Path) -> None:
    settings = Settings(epochs=2, checkpoint_every=("9 steps",), keep_last=100, device="cpu")
    straight = train(tmp_path, tiny_body(**case), settings)

    def resumed(state: State) -> list[str]:
        recorded = Settings.from_json(state["settings"])
        return differences(straight, train(tmp_path, tiny_body(**case), recorded, state), 9)

    assert resumed(straight.state(9)) == []
    spoilt = straight.state(9)
    spoil(spoilt)
    assert resumed(spoilt) != []


def test_left_out_a_running_mean_is_missed(tmp_path: Path) -> None:
    settings = Settings(epochs=2, log_every=4, checkpoint_every=("6 steps",), keep_last=100, device="cpu")
    straight = train(tmp_path, tiny_body(), settings)
    assert straight.state(6)["running_loss_state_dict"]["count"] == 2
    assert resume(tmp_path, straight, tiny_body(), settings, 6) == []

    def spoil(state: State) -> None:
        state["running_loss_state_dict"] = {"total": None, "count": 0}

    assert resume(tmp_path, straight, tiny_body(), settings, 6, spoil) != []


@pytest.mark.parametrize("name", ["waited", "best", "judged_step"])
def test_left_out_the_stopping_counters_are_missed(name: str, tmp_path: Path) -> None:
    straight = train(tmp_path, tiny_body(), PATIENT)
    step = next(step for step in straight.steps if straight.state(step)["stopping"]["waited"])
    # An evaluation that seems judged already is not judged again.
    value = {"waited": 0, "best": 1e-9, "judged_step": (step // 3 + 1) * 3}[name]
    spoil = with_value(value, "stopping", name)
    assert resume(tmp_path, straight, tiny_body(), PATIENT, step, spoil) != []


OWN_CONTROLS: dict[str, Callable[[State], None]] = {
    "run.state": without("state"),
    "a value in run.state": with_value(0.1, "state", "curriculum"),
    "which gradients were not None": without("parameters_with_gradient"),
    "the averaged weights": without("average_state_dict", "module.always.weight"),
    "how many were averaged": without("average_state_dict", "n_averaged"),
}


@pytest.mark.parametrize("spoil", OWN_CONTROLS.values(), ids=OWN_CONTROLS.keys())
def test_left_out_in_a_loop_of_ones_own_it_is_missed(spoil: Callable[[State], None], tmp_path: Path) -> None:
    settings = Settings(checkpoint_every=("8 steps",), keep_last=100)
    straight = train(tmp_path, own_body(), settings)
    assert resume(tmp_path, straight, own_body(), settings, 8) == []
    assert resume(tmp_path, straight, own_body(), settings, 8, spoil) != []


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler", "running_loss", "scaler"])
def test_a_part_that_the_checkpoint_lacks_is_refused(part: str, tmp_path: Path) -> None:
    straight = train(tmp_path, tiny_body(scheduler="step"), SETTINGS)
    state = straight.state(3)
    del state[f"{part}_state_dict"]
    with pytest.raises(StateMismatch, match=f"no state for '{part}'"):
        train(tmp_path, tiny_body(scheduler="step"), SETTINGS, state)


# -- what decides bits without being part of a model


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def summing_body() -> Body:
    """A sum over so many numbers that threads share it: its last bits depend on their number."""

    def build() -> tracked.Task:
        generator = torch.Generator().manual_seed(1)
        model = torch.nn.Linear(1, 1)
        inputs = torch.randn(8, 200_001, generator=generator)
        return tracked.Task(
            model=model,
            step=lambda model, batch: (model(batch[0].reshape(-1, 1)).sum() * 1e-6) ** 2,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            train_data=TensorDataset(inputs),
            batch_size=2,
        )

    return fitting(build)


def test_the_number_of_threads_is_restored_and_missed_if_left_out(two_threads: None, tmp_path: Path) -> None:
    settings = Settings(epochs=2, checkpoint_every=("2 steps",), keep_last=100, device="cpu")
    straight = train(tmp_path, summing_body(), settings)
    assert straight.last["determinism"]["threads"] == 2
    torch.set_num_threads(1)
    assert resume(tmp_path, straight, summing_body(), settings, 2) == []
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    spoil = with_value(1, "determinism", "threads")
    wrong = resume(tmp_path, straight, summing_body(), settings, 2, spoil)
    assert any(each.startswith("history") for each in wrong), wrong


def test_the_generators_that_a_resume_starts_with_have_no_say(tmp_path: Path) -> None:
    # Every batch, step and evaluation seeds them, so their saved states can be anything.
    straight = train(tmp_path, tiny_body(collate=True), SETTINGS)

    def other_generators(state: State) -> None:
        state["generators"] = copied(straight.state(0)["generators"])

    assert resume(tmp_path, straight, tiny_body(collate=True), SETTINGS, 6, other_generators) == []


def drawing_steps(run: tracked.Run) -> None:
    """Steps on plain tensors that draw from Python's and NumPy's generators."""
    model = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(model=model, optimizer=optimizer)
    data = TensorDataset(torch.linspace(0, 1, 32).reshape(16, 2))
    for (inputs,) in run.batches(data, batch_size=2):
        loss = (model(inputs) * random.random() + float(np.random.rand())).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log({"train/loss": loss})


def test_steps_on_plain_tensors_that_draw_in_python_and_numpy_resume_exactly(tmp_path: Path) -> None:
    found = differing(tmp_path, drawing_steps, SETTINGS)

    assert found == nothing(found)


@pytest.mark.parametrize("name", ["python", "numpy"])
def test_there_the_saved_generators_have_a_say(tmp_path: Path, name: str) -> None:
    straight = train(tmp_path, drawing_steps, SETTINGS)

    def other_generator(state: State) -> None:
        state["generators"][name] = straight.state(0)["generators"][name]

    wrong = resume(tmp_path, straight, drawing_steps, SETTINGS, 6, other_generator)
    assert any(each.startswith("history") for each in wrong), wrong


def test_a_batch_built_after_the_resume_draws_from_the_seed_alone(tmp_path: Path) -> None:
    drawn: dict[int, list[float]] = {}

    def body(run: tracked.Run) -> None:
        for _ in run.steps(8):
            drawn.setdefault(run.step, []).append(draw_everywhere())

    settings = Settings(checkpoint_every=("3 steps",), keep_last=100)
    straight = train(tmp_path, body, settings)
    train(tmp_path, body, settings, straight.state(3))
    assert all(numbers[0] == numbers[1] for step, numbers in drawn.items() if step > 3)
    assert len({numbers[0] for numbers in drawn.values()}) == 8


class Faulty(tiny.Noisy):
    """Cannot read one of its samples while the file is not there."""

    def __init__(self, mended: Path) -> None:
        super().__init__(26, "torch")
        self.mended = mended

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 7 and not self.mended.exists():
            raise OSError("this sample cannot be read")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_cannot_be_built_costs_no_step(tmp_path: Path, workers: int) -> None:
    mended = tmp_path / "mended"

    def built() -> tracked.Task:
        task = tiny.build(tiny.Params(workers=workers))
        task.train_data = Faulty(mended)
        return task

    settings = Settings(seed=3, epochs=2, checkpoint_every=("1 epoch",), device="cpu")
    with pytest.raises(OSError, match="this sample cannot be read"):
        train(tmp_path / "failed", fitting(built), settings)
    mended.touch()
    state = newest(tmp_path / "failed")
    assert 0 < state["step"] < 7
    straight = train(tmp_path, fitting(built), settings)
    assert straight.steps == [0, 7, 14]
    assert differences(straight, train(tmp_path, fitting(built), settings, state), state["step"]) == []


def newest(root: Path) -> State:
    """The last checkpoint of the only training below `root`."""
    folders = root.glob("*/runs/*/checkpoints/step-*")
    return checkpoint.load(max(folders, key=lambda folder: folder.name) / "checkpoint.pt")


def failing(
    task: tracked.Task,
    at: int,
    spoil: Callable[[tracked.Task], None] = lambda _: None,
    *,
    raises: bool = True,
) -> tracked.Task:
    """Spoils something and raises in the `at`-th batch, when the forward pass has drawn and changed buffers."""
    loss, calls = task.loss, 0

    def raising(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += task.model.training
        if calls == at:
            spoil(task)
            if raises:
                raise RuntimeError("this step cannot be made")
        assert loss is not None
        return loss(outputs, targets)

    task.loss = raising
    return task


@pytest.mark.parametrize(
    "params", [{}, {"noise": "none"}, {"pictures": True, "accumulate": 2, "workers": 2}], ids=str
)
def test_a_step_that_raises_costs_no_step_before_it(tmp_path: Path, params: dict[str, Any]) -> None:
    built = fitting(lambda: tiny.build(tiny.Params(**params)))
    settings = Settings(epochs=3, checkpoint_every=("1 epoch",), keep_last=100, device="cpu")
    with pytest.raises(RuntimeError, match="this step cannot be made"):
        train(tmp_path / "failed", fitting(lambda: failing(tiny.build(tiny.Params(**params)), 6)), settings)
    state = newest(tmp_path / "failed")
    straight = train(tmp_path, built, settings)

    assert state["step"] == 5 // params.get("accumulate", 1)
    assert state["step"] not in straight.steps
    assert differences(straight, train(tmp_path, built, settings, state), state["step"]) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_in_which_it_comes_and_the_resume_is_exact(
    tmp_path: Path, number: signal.Signals
) -> None:
    settings = Settings(epochs=2, device="cpu", keep_last=100)

    def built() -> tracked.Task:
        return failing(tiny.build(tiny.Params()), 5, lambda _: signal.raise_signal(number), raises=False)

    def signalled(run: Run) -> None:
        with leaving_on_signals(run):
            fitting(built)(run)

    with pytest.raises(Paused) as left:
        train(tmp_path / "left", signalled, settings)
    assert (left.value.code, left.value.reason) == (75, number.name)
    state = newest(tmp_path / "left")
    assert state["step"] == 5
    straight = train(tmp_path, fitting(lambda: tiny.build(tiny.Params())), settings)
    again = train(tmp_path, fitting(lambda: tiny.build(tiny.Params())), settings, state)
    assert differences(straight, again, 5) == []


def set_a_weight(task: tracked.Task) -> None:
    with torch.no_grad():
        next(task.model.parameters()).mul_(2)


def replace_a_buffer(task: tracked.Task) -> None:
    task.model[1].running_mean = torch.ones(8)  # type: ignore[index]


def draw_in_numpy(_: tracked.Task) -> None:
    np.random.random()


@pytest.mark.parametrize("spoil", [set_a_weight, replace_a_buffer, draw_in_numpy])
def test_a_step_that_has_changed_what_cannot_be_put_back_is_not_saved(
    tmp_path: Path, spoil: Callable[[tracked.Task], None]
) -> None:
    body = fitting(lambda: failing(tiny.build(tiny.Params(noise="none")), 4, spoil))
    with pytest.raises(RuntimeError, match="this step cannot be made"):
        train(tmp_path, body, Settings(epochs=1, device="cpu"))
    assert newest(tmp_path)["step"] == 0


def test_what_could_not_be_saved_does_not_hide_what_the_data_raised(tmp_path: Path) -> None:
    def body(run: tracked.Run) -> None:
        for _ in run.batches(Faulty(tmp_path / "never"), batch_size=4, epochs=1):
            run.state["step"] = object()

    with pytest.raises(OSError, match="this sample cannot be read"):
        train(tmp_path, body, Settings(seed=3))


def test_weights_that_are_no_numbers_are_not_rescued(tmp_path: Path) -> None:
    def body(run: tracked.Run) -> None:
        run.require_finite("train/loss")
        for _ in run.batches(Faulty(tmp_path / "never"), batch_size=4, epochs=1):
            run.log({"train/loss": math.nan if run.step > 1 else 0.5})

    with pytest.raises(OSError, match="this sample cannot be read"):
        train(tmp_path, body, Settings(seed=3, epochs=1, checkpoint_every=("1 epoch",)))
    assert [path.name for path in tmp_path.glob("*/runs/*/checkpoints/step-*")] == ["step-00000000"]


# -- real processes, a real server

PROCESS = """
import os
import time
import tests.experiments.tiny as tiny
from dataclasses import dataclass

@dataclass(frozen=True)
class Params:
    workers: int = 0

def build(params):
    task = tiny.build(tiny.Params(
        optimizer="adamw", scheduler="cosine", collate=True, noise="numpy", workers=params.workers))
    loss = task.loss
    def slow(outputs, targets):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return loss(outputs, targets)
    task.loss = slow
    return task
"""


def history(workplace: Workplace, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """The whole history of a run as the server has it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(workplace.tracking_uri)
    keys = client.get_run(run_id).data.metrics
    return {
        key: sorted((each.step, each.value) for each in client.get_metric_history(run_id, key))
        for key in keys
    }


def final_state(workplace: Workplace, run_id: str, to: Path) -> State:
    """The last checkpoint as the server has it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(workplace.tracking_uri)
    pointer = json.loads(client.get_run(run_id).data.tags["tracked.checkpoint"])
    to.mkdir()
    path = Path(client.download_artifacts(run_id, pointer["path"], str(to)))
    state = checkpoint.load(path, pointer["sha256"])
    for name in ("checkpoints", "about", "params", "settings", "generators"):
        state.pop(name)
    return state


def assert_same(workplace: Workplace, a: str, b: str, tmp_path: Path) -> None:
    assert history(workplace, a) == history(workplace, b)
    straight, other = final_state(workplace, a, tmp_path / "a"), final_state(workplace, b, tmp_path / "b")
    compared, wrong = compare_states(straight, other)
    assert wrong == []
    assert compared > 50


def committed(place: Workplace, run_id: str, beyond: int) -> int | None:
    """The step of the checkpoint that the server knows, if it lies beyond."""
    from mlflow.tracking import MlflowClient

    tag = MlflowClient(place.tracking_uri).get_run(run_id).data.tags.get("tracked.checkpoint", "{}")
    step = int(json.loads(tag).get("step", 0))
    return step if step > beyond else None


def written_id(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(300)  # five processes that import torch, on a machine that may be busy
def test_a_training_killed_twice_mid_epoch_ends_as_the_one_that_was_not(
    remote_workplace: Workplace, tmp_path: Path
) -> None:
    place = remote_workplace
    file = place.experiment(PROCESS)
    every = ("--epochs", "4", "--checkpoint-every", "3 steps", "--no-progress")
    straight = place.tracked("train", file, *every, "--json").json["run_id"]
    id_file, slowly = place.path / "run-id", {"PAUSE": "0.3"}
    first = place.start("train", file, *every, "--run-id-file", id_file, env=slowly)
    run_id = wait_until(lambda: written_id(id_file), "the run's ID")
    before = wait_until(lambda: committed(place, run_id, 0), "a checkpoint on the server")
    kill(first)
    # With what the spool still holds.
    second = place.start("resume", run_id, "--no-progress", env=slowly)
    between = wait_until(lambda: committed(place, run_id, before), "another checkpoint on the server")
    kill(second)
    # On a machine that has never seen the run.
    place.end_senders()
    shutil.rmtree(place.spool)
    last = place.tracked("resume", run_id, "--json", "--no-progress").json
    assert (last["run_id"], last["state"], last["step"]) == (run_id, "finished", 28)
    assert between <= last["resumed_from"] < 28
    assert_same(place, straight, run_id, tmp_path)


@pytest.mark.timeout(300)
def test_three_epochs_and_then_two_more_are_five(workplace: Workplace, tmp_path: Path) -> None:
    file = workplace.experiment(PROCESS)
    quiet = ("--json", "--no-progress")
    straight = workplace.tracked("train", file, "--epochs", "5", *quiet).json["run_id"]
    run_id = workplace.tracked("train", file, "--epochs", "3", *quiet).json["run_id"]
    # Nothing to do is no failure.
    idle = workplace.tracked("resume", run_id, "--no-progress")
    assert "nothing is left to do" in idle.stdout + idle.stderr
    longer = workplace.tracked("resume", run_id, "--epochs", "5", *quiet).json
    assert longer["step"] == 35
    assert_same(workplace, straight, run_id, tmp_path)


@pytest.mark.parametrize(
    ("file", "override"),
    [("tiny.py", "collate=true"), ("tiny.py", "workers=2"), ("hidden.py", "hidden=false")],
)
def test_check_passes_where_everything_is_known(file: str, override: str, tmp_path: Path) -> None:
    request = Request(Place("", tmp_path), overrides=[override])
    compared, points = check(ROOT / "tests/experiments" / file, request)
    assert compared > 20
    assert points >= 6


def test_check_fails_on_hidden_state_and_names_what_differs(workplace: Workplace) -> None:
    file = str(ROOT / "tests/experiments/hidden.py")
    result = workplace.tracked("train", file, "--check", check=False)
    assert result.returncode == 1
    assert "linear.weight" in result.stderr
    assert "train/loss" in result.stderr
