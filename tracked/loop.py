"""The thin training loop: one function that reads from top to bottom."""

from __future__ import annotations

import contextlib
import math
import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset

from tracked.allocator import keep_freed_memory
from tracked.confusion import Confusion
from tracked.data import Batches, size, to_device
from tracked.datasets import innermost
from tracked.errors import SpoolError, TrackedError, UsageError
from tracked.experiment import Task
from tracked.freezing import check_schedule, check_trains, table, train_mode, unfreeze_until
from tracked.names import EXACT
from tracked.points import scalar
from tracked.schedule import Due, Interval
from tracked.seeding import derive, preserved_generators, seed_generators
from tracked.state import Parts, load_module, module_state
from tracked.streams import Stream, batches_of, rewound
from tracked.tracking import Run, not_finite

DEFAULT_EPOCHS = 10
_TRAINING_ONLY = ("shuffle", "drop_last", "sampler", "batch_sampler", "persistent_workers")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fit(task: Task, run: Run) -> None:
    """Train `task`, fresh or from where `run` stands; there is no difference in here.

    Args:
        task: What to train.
        run: Where it is logged, and what draws its batches.

    Raises:
        LossNotFinite: A loss, or the monitored metric, is no finite number.
        UsageError: Task and settings do not go together, or nothing trains.
    """
    settings = run.settings
    device = choose_device(settings.device)
    _check_precision(task, device)
    if device.type == "cpu":
        keep_freed_memory()
    task.model.to(device)
    for metric in task.metrics.values():
        if isinstance(metric, torch.nn.Module):  # as those of torchmetrics are
            metric.to(device)
    check_schedule(task.model, task.optimizer, task.unfreeze)
    unfreeze_until(run.epoch, task.model, task.unfreeze)
    check_trains(task.model, task.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=task.precision == "fp16")
    window_loss = _Mean()
    if task.val_data is not None or task.monitor.startswith("train/"):
        monitor, mode = task.judged_by(settings.monitor, settings.mode)
        settings = replace(settings, monitor=monitor, mode=mode)
    _check_monitor(task, settings.monitor)
    if settings.epochs is None and settings.max_steps is None:
        settings = replace(settings, epochs=DEFAULT_EPOCHS)
    run.configure(
        settings,
        batch_size=task.batch_size,
        accumulate=task.accumulate,
        clip_norm=task.clip_norm,
        precision=task.precision,
    )

    _check_saved(task)
    if isinstance(task.loss, torch.nn.Module):
        task.loss.to(device)
    _check_compiled(task.model, run)
    run.attach(**_parts(task), scaler=scaler, running_loss=window_loss, **_stateful_metrics(task))
    run.require_finite("train/loss")
    for name, data in _validation_sets(task).items():
        run.log_input(data, "validation" if name == "val" else name)

    evaluation = Due([settings.eval_every])
    options = dict(task.loader)
    windows = run.windows(
        task.train_data,
        batch_size=task.batch_size,
        accumulate=task.accumulate,
        shuffle=options.pop("shuffle", True),
        drop_last=options.pop("drop_last", False),
        loader=options,
    )
    begun = 0
    modules = [*task.model.modules()]
    before = _Before(task)
    for window in windows:
        if run.epoch != begun:
            _begin_epoch(task, run, modules, first=not begun)
            begun = run.epoch
        rates = learning_rates(task.optimizer)
        before.note()
        loss = train_step(task, scaler, [to_device(batch, device) for batch in window], device, run, before)
        # On CUDA it is not read before it has to be: reading waits for the device.
        value = loss.item() if loss.is_cpu else loss.double()
        window_loss.update(value)
        run.overfitting.add(value)
        if settings.logs_at(run.step, run.epoch if run.epoch_ended else None):
            run.log({"train/loss": window_loss.take(), **run.changed(rates)})
        if task.scheduler is not None and task.scheduler_interval == "step":
            _advance(task.scheduler, run)
        evaluates = task.val_data is not None and evaluation.is_due(
            step=run.step, epoch=run.epoch, epoch_ended=run.epoch_ended
        )
        if evaluates:
            confusion = Confusion() if run.presents else None
            metrics = evaluate(task, device, run, confusion)
            if settings.monitor is not None and settings.monitor not in (*metrics, "train/loss"):
                raise _never_logged(settings.monitor, sorted(metrics))
            run.log(metrics)
            _tell_of_overfitting(metrics, run)
            if confusion is not None and run.stopping.best_step == run.step:
                _draw_confusion(confusion, task, run)
            if run.stopping.is_out_of_patience:
                run.log(_evaluate_best(task, device, run))
        if run.epoch_ended:
            # Of epochs so short that not each has a loss logged, not each is logged itself.
            if evaluates or window_loss.count < run.epoch_steps:
                run.log({"epoch": run.epoch})
            if task.scheduler is not None and task.scheduler_interval == "epoch":
                _advance(task.scheduler, run)
    if run.stopping.is_out_of_patience and (best := run.best_state()):
        load_module(task.model, best["model_state_dict"])


def _parts(task: Task) -> dict[str, Any]:
    """What is saved of a task under which name, apart from what the loop itself keeps."""
    parts = {"model": task.model, "optimizer": task.optimizer, "scheduler": task.scheduler}
    if isinstance(task.loss, torch.nn.Module) and list(task.loss.parameters()):
        parts = {"loss": task.loss, **parts}
    return {name: part for name, part in parts.items() if part is not None}


def check_fits(task: Task, state: Mapping[str, Any]) -> None:
    """See that a task can go on from a checkpoint; neither is changed.

    Raises:
        StateMismatch: It cannot.
    """
    parts = Parts()
    for name, part in _parts(task).items():
        parts.attach(name, part)
    parts.check(state)


def _begin_epoch(task: Task, run: Run, modules: Sequence[torch.nn.Module], *, first: bool) -> None:
    """Unfreeze what is due and set the modes, which is cheaper than in each step; show what trains when that changes.

    Args:
        modules: All of the model: to list them costs more than to look at them.
        first: Whether it is the first of this process.
    """
    if first:
        _check_due(task, run)
    due = run.epoch in task.unfreeze
    # With a batch an epoch this is the way of every step: what changes nothing is passed over.
    if first or due or not all(module.training for module in modules):
        unfreeze_until(run.epoch, task.model, task.unfreeze)
        train_mode(task.model)
    if due or (first and (task.unfreeze or not all(each.requires_grad for each in task.model.parameters()))):
        text = f"epoch {run.epoch}: parameters that train, and that are frozen\n{table(task.model)}"
        run.progress.say(text)
        try:
            run.log_text(f"{text}\n", "parameters.txt")
        except SpoolError as error:  # a full disk does not end a training
            run.progress.warn(str(error))


def _tell_of_overfitting(metrics: Mapping[str, float], run: Run) -> None:
    """Renew the picture of the curves and, where validation has a loss, the verdict on it."""
    monitor = run.settings.monitor or ""
    losses = [key for key in metrics if key.endswith("/loss")]
    # The set that the run is judged by goes first: of it the gap is told.
    losses.sort(key=lambda key: key.partition("/")[0] != monitor.partition("/")[0])
    if losses:
        run.judge_overfitting(losses[0], metrics[losses[0]])
    others = [[monitor]] if monitor in metrics and monitor not in losses else []
    counts = run.counts()
    rates = [key for key in counts if key.partition("/")[0] == "lr"]
    if any(counts[key] > 1 for key in rates):  # each is logged only when it changes
        others.append(rates)
    run.draw_curves(["train/loss", *losses], *others)


def train_step(
    task: Task,
    scaler: torch.amp.GradScaler,
    window: Sequence[Any],
    device: torch.device,
    run: Run,
    before: _Before,
) -> torch.Tensor:
    """One step over an accumulation window, as on one batch of all of it; its mean loss: a detached scalar.

    Where the user's code raises, the state before the step is put back and saved.

    Raises:
        LossNotFinite: The loss is NaN or infinite (on CUDA found a moment later, by the run itself).
    """
    if not task.model.training:  # a step of one's own has left it in eval mode
        train_mode(task.model)
    losses: list[torch.Tensor] = []

    def closure() -> torch.Tensor:
        _drop_gradients(task.optimizer)
        losses.append(_gradients(task, scaler, window, device, run))
        return losses[-1]

    asks_again = isinstance(task.optimizer, torch.optim.LBFGS)
    try:
        if asks_again:  # several times, and the first time where it stands
            task.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            losses.append(_gradients(task, scaler, window, device, run))
    except TrackedError:
        raise
    except Exception:
        if before.put_back():
            run.undo_step()
        raise
    if not asks_again:
        scaler.step(task.optimizer)
        scaler.update()
    _drop_gradients(task.optimizer)
    return losses[0]


def _gradients(
    task: Task, scaler: torch.amp.GradScaler, window: Sequence[Any], device: torch.device, run: Run
) -> torch.Tensor:
    """Give what the optimizer holds the (clipped) gradients of the window's mean loss, and return that loss."""
    parts, shares = [], []
    first: Any = None
    for batch in window:
        with _autocast(task.precision, device):
            loss, weight = _loss(task, batch)
        if len(window) > 1:
            weight = size(batch) if weight is None else weight
            if isinstance(weight, torch.Tensor):
                weight = weight.item() if weight.is_cpu else weight.reshape(())
            if isinstance(weight, float | int) and weight == 0:
                continue  # a mean over nothing
            # Relative to the first, so that a half precision has room for them.
            first = weight if first is None else first
            shares.append(weight / first)
            loss = loss * shares[-1]
        if device.type == "cpu" and not math.isfinite(loss.item()):
            raise not_finite(run.step, loss.item())
        scaler.scale(loss).backward()
        parts.append(loss.detach())
    if not parts:
        raise UsageError(
            f"all {len(window)} batches of step {run.step} weigh nothing",
            expected="step(model, batch) -> (loss, weight), with a weight above 0 in each window",
        )
    if len(window) > 1:
        # What the window weighs in all is known only now.
        torch._foreach_div_(
            [each.grad for each in _held(task.optimizer) if each.grad is not None], sum(shares)
        )
    if task.clip_norm is not None:
        scaler.unscale_(task.optimizer)
        # Not all of the model: nobody takes back the gradients of what the optimizer does not hold.
        torch.nn.utils.clip_grad_norm_(_held(task.optimizer), task.clip_norm)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum() / sum(shares)


def _drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """`zero_grad()` without torch's hooks for its profiler and compiler, which cost a small step a tenth."""
    if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:  # it may do more
        optimizer.zero_grad()
        return
    for parameter in _held(optimizer):
        parameter.grad = None


def _held(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [each for group in optimizer.param_groups for each in group["params"]]


@torch.no_grad()
def evaluate(
    task: Task, device: torch.device, run: Run, confusion: Confusion | None = None
) -> dict[str, float]:
    """The metrics of every validation set by their logged names; modes and generators are left as they were.

    Args:
        task: What is trained.
        device: Where its model is.
        run: Whose step it is.
        confusion: Takes the outputs of the validation set that the run is judged by.
    """
    with preserved_generators():
        return _evaluate(task, device, run, confusion)


def _evaluate_best(task: Task, device: torch.device, run: Run) -> dict[str, float]:
    """The metrics of the best weights as `best/…`; the model is left as it was, for the last checkpoint."""
    best = run.best_state()
    if best is None:
        return {}
    last = {name: value.clone() for name, value in module_state(task.model).items()}
    load_module(task.model, best["model_state_dict"])
    try:
        return {f"best/{key}": value for key, value in evaluate(task, device, run).items()}
    finally:
        load_module(task.model, last)


def _evaluate(task: Task, device: torch.device, run: Run, confusion: Confusion | None) -> dict[str, float]:
    modes = [(module, module.training) for module in task.model.modules()]
    task.model.eval()
    options = {key: value for key, value in task.loader.items() if key not in _TRAINING_ONLY}
    values: dict[str, float] = {}
    for name, data in _validation_sets(task).items():
        seed = derive(run.settings.seed, "eval", run.step, name)
        seed_generators(seed)
        batches = batches_of(
            rewound(data),
            batch_size=task.batch_size,
            seed=seed,
            shuffle=False,
            stream="eval",
            loader=options,
        )
        loader = _seeded(batches, device, seed)
        if task.evaluate:
            found = task.evaluate(task.model, loader)
        else:
            counts = confusion if name == _judged_set(task, run) else None
            found = _measure(task, loader, device, counts)
        named = {f"{name}/{key}": value for key, value in found.items() if _is_single(value)}
        values |= {key: float(scalar(key, value)) for key, value in named.items()}
    task.model.train(modes[0][1])  # a model may do more in it than set modes
    for module, mode in modes:  # which reaches what is frozen, too
        module.training = mode
    return values


def _validation_sets(task: Task) -> dict[str, Dataset[Any]]:
    if task.val_data is None:
        return {}
    return dict(task.val_data) if isinstance(task.val_data, Mapping) else {"val": task.val_data}


def _judged_set(task: Task, run: Run) -> str:
    """The validation set that the monitored metric is of, else the first one."""
    names = [*_validation_sets(task)]
    monitored = (run.settings.monitor or "").partition("/")[0]
    return monitored if monitored in names else names[0]


def _draw_confusion(confusion: Confusion, task: Task, run: Run) -> None:
    """Have it drawn, if there is one, with the classes' names where the data set has them, as torchvision's do."""
    if (counts := confusion.counts) is not None:
        data = innermost(_validation_sets(task)[_judged_set(task, run)])
        classes = getattr(data, "classes", ())
        run.draw_confusion(counts, classes if isinstance(classes, list | tuple) else ())


def _seeded(batches: Batches | Stream, device: torch.device, seed: int) -> Iterator[Any]:
    """The batches of an evaluation; what the model draws for each is the same with and without workers."""
    for number, batch in enumerate(batches.epoch(0)):
        seed_generators(derive(seed, number))
        yield to_device(batch, device)


def _measure(
    task: Task, loader: Iterator[Any], device: torch.device, confusion: Confusion | None
) -> dict[str, Any]:
    """Loss and functions as means weighted by samples; objects as they compute themselves."""
    functions = {name: metric for name, metric in task.metrics.items() if not hasattr(metric, "compute")}
    objects = {name: metric for name, metric in task.metrics.items() if hasattr(metric, "compute")}
    for metric in objects.values():
        metric.reset()
    sums: dict[str, Any] = {}
    total = 0.0
    for batch in loader:
        with _autocast(task.precision, device):
            found, weight, outputs, targets = _judge(task, batch)
        weight = float(weight)
        if not weight:
            continue  # a mean over nothing
        for name, function in functions.items():
            found[name] = function(outputs, targets)
        for metric in objects.values():
            metric.update(outputs, targets)
        if confusion is not None:
            confusion.update(outputs, targets)
        for name, value in found.items():
            number = scalar(name, value)
            exact = number.double() if isinstance(number, torch.Tensor) else number
            sums[name] = sums.get(name, 0.0) + exact * weight
        total += weight
    if not total:
        raise UsageError(
            "all batches of an evaluation weigh nothing",
            expected="step(model, batch) -> (loss, weight), with a weight above 0 in each validation set",
        )
    means = {name: value / total for name, value in sums.items()}
    for name, metric in objects.items():
        computed = metric.compute()
        if isinstance(computed, Mapping):  # as mean average precision gives, and a collection of metrics
            means |= {f"{name}/{key}": each for key, each in computed.items() if _is_single(each)}
        else:
            means[name] = computed
    return means


def _is_single(value: Any) -> bool:
    """False for a tensor of several numbers or of none, such as the classes of a mean average precision."""
    return not isinstance(value, torch.Tensor) or value.numel() == 1


def _judge(task: Task, batch: Any) -> tuple[dict[str, Any], Any, Any, Any]:
    if task.step is not None:
        loss, weight = _loss(task, batch)
        return {"loss": loss}, size(batch) if weight is None else weight, None, None
    outputs, targets = _forward(task, batch)
    assert task.loss is not None
    return {"loss": task.loss(outputs, targets)}, size(batch), outputs, targets


def _loss(task: Task, batch: Any) -> tuple[torch.Tensor, Any]:
    """The mean loss of a batch, and what it weighs; None if that is its number of samples."""
    if task.step is not None:
        result = task.step(task.model, batch)
        return result if isinstance(result, tuple) else (result, None)
    assert task.loss is not None
    return task.loss(*_forward(task, batch)), None


def _forward(task: Task, batch: Any) -> tuple[Any, Any]:
    if task.forward is not None:
        return task.forward(task.model, batch)
    inputs, targets = batch
    return task.model(inputs), targets


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def _check_saved(task: Task) -> None:
    """See that whatever trains is saved.

    Raises:
        UsageError: The optimizer holds parameters that are neither the model's nor the loss's.
    """
    modules = [each for each in (task.model, task.loss) if isinstance(each, torch.nn.Module)]
    known = {id(parameter) for module in modules for parameter in module.parameters()}
    if lost := [tuple(each.shape) for each in _held(task.optimizer) if id(each) not in known]:
        raise UsageError(
            f"the optimizer holds {len(lost)} parameters that are in neither model nor loss, of shapes {lost[:3]}",
            expected="all that trains in the model, or in a loss that is a module: nothing else is saved",
        )


def _check_compiled(model: torch.nn.Module, run: Run) -> None:
    """Say that a compiled model may not be exact.

    By default a second batch size has kernels made that are then used for the first one too, so the bits
    depend on the sizes that this very process has seen before.
    """
    for module in model.modules():
        context = getattr(module, "dynamo_ctx", None)
        by_default = context is not None and context._dynamic is None  # noqa: SLF001 - nothing else tells
        # Of a module that is compiled in place nobody can tell.
        if by_default or module._compiled_call_impl is not None:  # noqa: SLF001
            run.progress.warn(
                "the kernels of the compiled model depend on the batch sizes seen before: after a resume the bits "
                "may differ\n  to be exact: torch.compile(model, dynamic=False)"
            )
            run.record({EXACT: "false"})
            return


def _check_precision(task: Task, device: torch.device) -> None:
    if (precision := task.precision) == "fp32":
        return
    if precision == "fp16" and isinstance(task.optimizer, torch.optim.LBFGS):
        raise UsageError(
            "precision is 'fp16', and LBFGS asks for the loss several times in a step, which no scaler allows",
            expected="another precision",
            try_next='precision="bf16"',
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns, and goes on in full precision
            with _autocast(precision, device):
                sound = device.type != "cuda" or precision != "bf16" or torch.cuda.is_bf16_supported()
    except (RuntimeError, UserWarning):
        sound = False
    if not sound:
        raise UsageError(
            f"precision is {precision!r}, which the device {device} does not have",
            expected="one that it has",
            try_next='precision="fp32"',
        )


def _check_due(task: Task, run: Run) -> None:
    """Say before the first step what will not come in a training of this length.

    Raises:
        UsageError: Patience waits for it.
    """
    settings, judged_by_training = run.settings, (run.settings.monitor or "").startswith("train/")
    awaited = []
    if task.val_data is not None:
        awaited.append(("an evaluation", "eval-every", settings.eval_every, not judged_by_training))
    if settings.log_every != "auto":
        every = settings.log_every
        text = f"{every} step{'s' * (every != 1)}" if isinstance(every, int) else every
        awaited.append(("the training loss", "log-every", text, judged_by_training))
    for what, option, text, is_judged in awaited:
        interval = Interval.parse(text)
        last = run.total_steps if interval.unit == "step" else run.total_epochs
        if last is None or interval.every <= last:
            continue
        found = f"{what} is due every {text}, and the training has {last} {interval.unit}s"
        if settings.patience is not None and is_judged:
            unit = interval.unit if last >= 1 else "step"
            raise UsageError(found, expected="a shorter interval", try_next=f'--{option} "1 {unit}"')
        run.progress.warn(f"{found}: none will come")
    last = run.total_epochs
    # Unfrozen is when an epoch begins, so one that is not completed counts too.
    if last is not None and (
        late := [each for each in task.unfreeze if each > last + (settings.epochs is None)]
    ):
        run.progress.warn(f"unfreeze at epoch {min(late)} will not come: the training has {last} epochs")


def _check_monitor(task: Task, monitor: str | None) -> None:
    """Refuse before the first batch, as far as that is known by then, a metric that is never logged."""
    if monitor is None:
        if isinstance(task.scheduler, ReduceLROnPlateau):
            raise UsageError(
                "the scheduler waits on a plateau, and no metric is monitored",
                expected="val_data, or another metric that is logged",
                try_next="--monitor train/loss",
            )
        return
    sets = [*task.val_data] if isinstance(task.val_data, Mapping) else ["val"] * (task.val_data is not None)
    names = [f"{each}/{name}" for each in sets for name in ("loss", *task.metrics)] + ["train/loss"]
    if task.evaluate is not None and sets:
        return  # nobody knows what it gives
    # What computes a dict has names of its own.
    objects = [name for name, metric in task.metrics.items() if hasattr(metric, "compute")]
    if monitor not in names and not monitor.startswith(tuple(f"{a}/{b}/" for a in sets for b in objects)):
        raise _never_logged(monitor, names)


def _never_logged(monitor: str, names: Sequence[str]) -> UsageError:
    return UsageError(
        f"the monitored metric {monitor!r} is never logged",
        expected=f"one of {', '.join(names)}",
        try_next=f"--monitor {next(iter(names), 'val/loss')}",
    )


def _advance(scheduler: Any, run: Run) -> None:
    """One step of the schedule; on a plateau, by the newest monitored value, which a resumed run knows too."""
    if not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()
    elif (monitored := run.latest().get(run.settings.monitor or "")) is not None:
        scheduler.step(monitored)


def _stateful_metrics(task: Task) -> dict[str, Any]:
    return {
        f"metric_{name}": metric
        for name, metric in task.metrics.items()
        if hasattr(metric, "state_dict") and hasattr(metric, "load_state_dict")
    }


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`lr`, or one `lr/<group>` for each parameter group when they differ: by its `name`, else its number."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if all(rate == rates[0] for rate in rates):
        return {"lr": rates[0]}
    # Without what MLflow refuses in the name of a metric.
    names = [re.sub(r"[^\w\-. ]", "", str(group.get("name", ""))) for group in optimizer.param_groups]
    if "" in names or len({*names}) < len(names):
        names = [str(number) for number in range(len(rates))]
    return {f"lr/{name}": rate for name, rate in zip(names, rates, strict=True)}


def choose_device(name: str) -> torch.device:
    """The device that `--device` means.

    Raises:
        UsageError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"the device {name!r} cannot be used: {str(error).splitlines()[0]}",
            expected="auto, cpu, cuda or cuda:N",
            try_next="--device cpu",
        ) from None
    return device


class _Before:
    """What a step changes ahead of its parameters, as it was: buffers and torch's generators."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._modules = [each for each in (task.model, task.loss) if isinstance(each, torch.nn.Module)]
        self._parameters = [each for module in self._modules for each in module.parameters()]
        self._on_cuda = any(each.is_cuda for each in self._parameters)
        self._buffers = self._present()
        self._copies = [each.detach().clone() for each in self._buffers]

    def note(self) -> None:
        """Look, before a step; as this is done in each one, without what the generators of others would cost."""
        self._generator = torch.default_generator.get_state()
        if self._on_cuda:
            self._cuda = torch.cuda.get_rng_state()
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)
        self._versions = self._count_changes()

    def put_back(self) -> bool:
        """Whether all stands again as before the step; not where a parameter or another buffer has been set."""
        present = self._present()
        same = len(present) == len(self._buffers) and all(map(operator.is_, present, self._buffers))
        if not same or self._versions != self._count_changes():
            return False
        torch.default_generator.set_state(self._generator)
        if self._on_cuda:
            torch.cuda.set_rng_state(self._cuda)
        with torch.no_grad():
            for buffer, copy in zip(self._buffers, self._copies, strict=True):
                buffer.copy_(copy)
        _drop_gradients(self._task.optimizer)
        return True

    def _count_changes(self) -> int:
        return sum(each._version for each in self._parameters)  # noqa: SLF001 - there is no public way

    def _present(self) -> list[torch.Tensor]:
        return [each for module in self._modules for each in module.buffers()]


class _Mean:
    """The mean of the losses since the last logged one; a single loss goes through untouched."""

    def __init__(self) -> None:
        self.total: float | torch.Tensor | None = None
        self.count = 0

    def update(self, loss: float | torch.Tensor) -> None:
        self.total = loss if self.total is None else self.total + loss
        self.count += 1

    def take(self) -> float | torch.Tensor:
        assert self.total is not None
        mean = self.total if self.count == 1 else self.total / self.count
        self.total, self.count = None, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]
