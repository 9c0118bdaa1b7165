"""What is attached is saved by name, put back exactly, and refused where it does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tracked.errors import StateMismatch, UsageError
from tracked.state import Parts
from tracked.training import compare_states


def network(hidden: int = 3) -> Any:
    return nn.Sequential(nn.Linear(2, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 1))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss: torch.Tensor = model(torch.randn(4, 2)).sum()
    loss.backward()
    optimizer.step()


def attached(**parts: Any) -> Parts:
    found = Parts()
    for name, part in parts.items():
        found.attach(name, part)
    return found


def trained(hidden: int = 3) -> dict[str, Any]:
    """The state of a model and its optimizer after a step."""
    model = network(hidden)
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer)
    return copy.deepcopy(attached(model=model, optimizer=optimizer).capture())


def test_what_was_captured_is_put_back_to_the_last_bit() -> None:
    state = trained()
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    parts = attached(model=model, optimizer=optimizer)
    parts.restore(copy.deepcopy(state))
    assert compare_states(state, parts.capture())[1] == []


def test_capturing_copies_nothing() -> None:
    model = network()
    state = attached(model=model).capture()
    assert state["model_state_dict"]["0.weight"].data_ptr() == model[0].weight.data_ptr()


@pytest.mark.parametrize("part", [3, {"a": 1}, "text", None, lambda: None])
def test_what_has_no_state_cannot_be_attached(part: object) -> None:
    with pytest.raises(UsageError, match=r"run\.state"):
        Parts().attach("part", part)


def test_a_name_is_taken_once() -> None:
    parts = attached(model=network())
    with pytest.raises(UsageError, match="attached already"):
        parts.attach("model", network())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "2.weight is not in the model"),
        (nn.Sequential(*network(), nn.Linear(1, 1)), "3.weight is not in the checkpoint"),
        (network(5), "0.weight is (3, 2) in the checkpoint and (5, 2) in the model"),
    ],
)
def test_another_model_is_refused_by_what_differs_and_left_alone(other: nn.Module, said: str) -> None:
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateMismatch) as refused:
        attached(model=other).restore(trained())
    assert said in str(refused.value)
    assert compare_states(before, other.state_dict())[1] == []


def test_an_optimizer_over_other_parameters_is_refused_by_their_names() -> None:
    model = network()
    optimizer = torch.optim.Adam(model[2].parameters())
    with pytest.raises(StateMismatch, match=r"model\.0\.bias was optimized, and is not now"):
        attached(model=model, optimizer=optimizer).restore(trained())


def test_an_optimizer_with_other_groups_is_refused() -> None:
    model = network()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1:].parameters())}]
    with pytest.raises(StateMismatch, match="groups"):
        attached(model=model, optimizer=torch.optim.Adam(groups)).restore(trained())


def test_a_missing_part_is_named_with_what_there_is() -> None:
    with pytest.raises(StateMismatch) as refused:
        attached(ema=network()).restore(trained())
    assert "no state for 'ema'" in str(refused.value)
    assert "model, optimizer" in str(refused.value)


def test_optimizer_state_of_another_dtype_than_its_parameter_keeps_its_bits() -> None:
    model = nn.Linear(2, 1).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precise = torch.tensor([[1.0 + 2**-20, 2.0]])
    optimizer.state[model.weight]["master"] = precise
    state = copy.deepcopy(attached(model=model, optimizer=optimizer).capture())
    fresh = nn.Linear(2, 1).to(torch.bfloat16)
    restored = torch.optim.SGD(fresh.parameters(), lr=0.1)
    attached(model=fresh, optimizer=restored).restore(state)
    assert restored.state[fresh.weight]["master"].dtype == torch.float32
    assert restored.state[fresh.weight]["master"].equal(precise)


def test_gradients_of_zero_are_told_from_none() -> None:
    model = network()
    model[0].weight.grad = torch.ones(3, 2)
    state = attached(model=model).capture()
    assert state["parameters_with_gradient"] == ["model.0.weight"]
    fresh = network()
    attached(model=fresh).restore(state)
    assert fresh[0].weight.grad is not None
    assert fresh[0].weight.grad.eq(0).all()
    assert fresh[0].bias.grad is None


def test_a_compiled_model_is_saved_under_its_own_names() -> None:
    model = network()
    state = attached(model=torch.compile(model)).capture()
    assert "0.weight" in state["model_state_dict"]
    attached(model=network()).restore(state)


def test_a_compiled_part_of_a_model_goes_by_the_names_that_it_has_without() -> None:
    def built(compiled: bool) -> nn.Sequential:
        part = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        part[1].register_buffer("drawn", torch.rand(2), persistent=False)
        whole = nn.Sequential(part, nn.Linear(3, 1))
        if compiled:
            whole[0] = torch.compile(part)  # type: ignore[assignment]
        return whole

    for compiled in (True, False):
        model, other = built(compiled), built(not compiled)
        optimizer = torch.optim.AdamW(model.parameters())
        state = copy.deepcopy(attached(model=model, optimizer=optimizer).capture())
        assert "_orig_mod" not in str(state)
        attached(model=other, optimizer=torch.optim.AdamW(other.parameters())).restore(state)
        pairs = zip(
            (*model.parameters(), *model.buffers()), (*other.parameters(), *other.buffers()), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


class Trainer:
    """Saves the optimizer that it holds."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def test_a_scheduler_without_the_optimizer_that_it_drives_is_refused() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.raises(UsageError, match="'scheduler' is attached without the optimizer"):
        attached(scheduler=scheduler).check_together(("scheduler",))
    for saved in (optimizer, Trainer(optimizer)):
        attached(saved=saved, scheduler=scheduler).check_together(("saved", "scheduler"))


def test_the_device_is_that_of_the_first_parameter() -> None:
    assert attached(model=network().to("meta")).device().type == "meta"
    assert Parts().device().type == "cpu"


class Halving:
    """A scheduler of one's own, which goes back to the rates that it was made with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.count = 0

    def step(self) -> None:
        self.count += 1
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate / 2**self.count

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates, self.count = state["rates"], state["count"]


def warming_up(optimizer: torch.optim.Optimizer) -> Any:
    warm = lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.StepLR(optimizer, 3, gamma=0.5)], [4])


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5),
    "warm-up": warming_up,
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=8),
    "from zero": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda count: min(1, count / 8)),
    "milestones": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 8]),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=20),
    "own": Halving,
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=20
    ),
}


def scheduled(rate: float, schedule: Callable[[torch.optim.Optimizer], Any]) -> tuple[Parts, Any, Any]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate, momentum=0.9)
    scheduler = schedule(optimizer)
    return attached(scheduler=scheduler, optimizer=optimizer), optimizer, scheduler


def rates(steps: int, optimizer: torch.optim.Optimizer, scheduler: Any) -> list[float]:
    seen = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append(float(optimizer.param_groups[0]["lr"]))
    return seen


def test_a_scheduler_is_not_attached_apart_from_its_optimizer() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    parts = attached(optimizer=optimizer)
    parts.check_together(("optimizer",))
    parts.attach("scheduler", SCHEDULES["step"](optimizer))
    with pytest.raises(UsageError, match=r"run\.attach\(…, optimizer=optimizer, scheduler=scheduler\)"):
        parts.check_together(("scheduler",))


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_overridden_rate_goes_on_where_the_schedule_stands(name: str) -> None:
    parts, *recorded = scheduled(0.1, SCHEDULES[name])
    rates(6, *recorded)
    state = copy.deepcopy(parts.capture())
    _, *straight = scheduled(0.2, SCHEDULES[name])
    expected = rates(11, *straight)
    (doubled, *new), (same, *old) = scheduled(0.2, SCHEDULES[name]), scheduled(0.2, SCHEDULES[name])
    doubled.restore(copy.deepcopy(state), overridden=True)
    same.restore(copy.deepcopy(state))

    found = [new[0].param_groups[0]["lr"], *rates(5, *new)]
    assert found == pytest.approx(expected[5:])
    # What the code builds says nothing where nothing was asked for.
    assert rates(5, *old) == rates(5, *recorded)


def test_an_overridden_schedule_holds_without_moving_the_rate() -> None:
    parts, *recorded = scheduled(0.1, lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [8]))
    rates(6, *recorded)
    later, *new = scheduled(0.1, lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [9]))
    later.restore(copy.deepcopy(parts.capture()), overridden=True)
    assert rates(4, *new) == pytest.approx([0.1, 0.1, 0.01, 0.01])

    parts, *recorded = scheduled(0.1, SCHEDULES["linear"])
    rates(9, *recorded)
    over, *new = scheduled(
        0.1, lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=8)
    )
    over.restore(copy.deepcopy(parts.capture()), overridden=True)
    assert [new[0].param_groups[0]["lr"], *rates(2, *new)] == pytest.approx([0.1] * 3)


class Agent:
    """A model and its optimizer in one object."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])


def test_an_object_that_holds_a_model_is_saved_once() -> None:
    state = attached(agent=Agent()).capture()
    assert "agent_state_dict" in state
    assert state["built"] == {}


def test_what_a_constructor_set_stays_as_it_was_recorded() -> None:
    def built(rate: float) -> tuple[Parts, torch.optim.SGD]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(rate))
        return attached(optimizer=optimizer), optimizer

    state = copy.deepcopy(built(0.1)[0].capture())
    parts, optimizer = built(0.5)
    parts.restore(state, overridden=True)
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert float(parts.capture()["built"]["optimizer"][0]["lr"]) == 0.5


def test_an_overridden_option_without_a_schedule_is_set() -> None:
    def built(**options: Any) -> tuple[Parts, torch.optim.SGD]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], **options)
        return attached(optimizer=optimizer), optimizer

    parts, recorded = built(lr=0.1, momentum=0.9)
    recorded.param_groups[0]["weight_decay"] = 0.5  # set by hand, on the way
    state = copy.deepcopy(parts.capture())
    parts, changed = built(lr=0.3, momentum=0.9)
    parts.restore(state, overridden=True)
    group = changed.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.9, 0.5)


class Remembering(nn.Module):
    """Keeps what its `state_dict` leaves out: a random constant, a sum, a cache that grows, one made late."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("projection", torch.randn(2, 3), persistent=False)
        self.register_buffer("positions", torch.arange(3).expand(2, -1), persistent=False)
        self.register_buffer("total", torch.zeros(2), persistent=False)
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("first", torch.ones(1), persistent=False)
        self.total: torch.Tensor
        self.cache: torch.Tensor | None
        self.first: torch.Tensor | None
        self.late: torch.Tensor

    def see(self, inputs: torch.Tensor) -> None:
        self.total.data.add_(inputs.sum(0))
        self.cache = inputs if self.cache is None else torch.cat([self.cache, inputs])
        self.first = None
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(1), persistent=False)
        self.late += 1


def test_buffers_that_a_module_does_not_save_are_saved() -> None:
    kept = Remembering()
    parts = attached(**{"model.a": torch.compile(nn.Sequential(kept), backend="eager")})
    for _ in range(2):
        kept.see(torch.randn(3, 2))
    state = copy.deepcopy(parts.capture())

    fresh = Remembering()
    restored = attached(**{"model.a": nn.Sequential(fresh)})
    total = fresh.total
    restored.restore(state)
    assert compare_states(restored.capture(), state)[1] == []
    assert fresh.total is total  # in place: others may refer to it
    assert fresh.cache is not None
    assert fresh.first is None
    fresh.see(torch.ones(1, 2))
    assert restored.capture()["other_buffers"]["model.a"]["0.late"] == 3


def test_a_buffer_whose_place_is_gone_is_named() -> None:
    state = attached(model=nn.Sequential(Remembering())).capture()
    other = nn.Sequential(nn.Module())
    other[0].linear = nn.Linear(2, 1)
    other[0].total = [0, 0]  # type: ignore[assignment] # what was a buffer is none
    with pytest.raises(StateMismatch, match=r"the buffer 0\.total is not in the model"):
        attached(model=other).restore(state)


def test_a_longer_schedule_goes_on_where_it_would_stand_had_it_been_as_long_from_the_start() -> None:
    parts, *recorded = scheduled(0.1, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10))
    assert rates(10, *recorded)[-1] == 0.0
    _, *straight = scheduled(0.1, SCHEDULES["cosine"])
    expected = rates(15, *straight)
    longer, *new = scheduled(0.1, SCHEDULES["cosine"])
    longer.restore(copy.deepcopy(parts.capture()), overridden=True)
    assert [new[0].param_groups[0]["lr"], *rates(5, *new)] == pytest.approx(expected[9:])


def test_a_rate_overridden_from_zero_follows_the_schedule() -> None:
    parts, *recorded = scheduled(0.0, SCHEDULES["step"])
    rates(6, *recorded)
    raised, *new = scheduled(0.1, SCHEDULES["step"])
    raised.restore(copy.deepcopy(parts.capture()), overridden=True)
    assert [new[0].param_groups[0]["lr"], *rates(3, *new)] == pytest.approx([0.025, 0.025, 0.025, 0.0125])
