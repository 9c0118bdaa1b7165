"""The command line: options, messages, exit status. Nobody imports it, and it imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from tracked.errors import TrackedError, UsageError

if TYPE_CHECKING:
    from tracked.place import Place
    from tracked.server import RunView
    from tracked.tracking import Run
    from tracked.training import Request

_EXAMPLES = {
    "train": "train experiments/digits.py lr=0.01 --epochs 10",
    "resume": "resume last --epochs 20",
    "sweep": 'sweep experiments/digits.py "lr=log(1e-4,1e-1)" --trials 20 --workers 2',
    "fork": "fork last lr=0.001 --epochs 30",
    "pause": "pause last",
    "stop": "stop last --no-wait",
    "list": "list",
    "show": "show last",
    "compare": "compare --experiment digits --top 5 --to curves.png",
    "verify": "verify last",
    "export": "export last --form weights --to weights",
    "sync": "sync",
    "gc": "gc",
    "ui": "ui",
}
FINISHED, FAILED, WRONG_USAGE, UNDELIVERED, PAUSED = 0, 1, 2, 3, 75


class _Commands(click.Group):
    """Lists the commands with an example each, in the order of their use, and shows errors as ours."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [name for name in _EXAMPLES if name in self.commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            for name in self.list_commands(ctx):
                formatter.write(f"  {name:8}{self.commands[name].get_short_help_str(90)}\n")
                formatter.write(f"          python -m tracked.run {_EXAMPLES[name]}\n")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrackedError as error:
            _complain(error)


def _complain(error: TrackedError) -> NoReturn:
    user_traceback = getattr(error, "user_traceback", "")
    if user_traceback:
        click.echo(user_traceback.rstrip(), err=True)
    click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_status)


@click.group(
    cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="tracked")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Train PyTorch models against an MLflow server. Kill it anywhere, resume it by run ID."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _note(text: str) -> None:
    """What goes beside a command's own output."""
    click.echo(text, err=True)


def _print_json(value: Any) -> None:
    """In one line; null stands for NaN and the infinities, which JSON does not have and strict parsers refuse."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    click.echo(json.dumps(finite, allow_nan=False))


# -- options


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_where = _options(
    click.option(
        "--tracking-uri",
        metavar="URI",
        help="MLflow server or SQLite file. Else MLFLOW_TRACKING_URI, else sqlite:///mlruns/mlflow.db.",
    ),
    click.option(
        "--spool-dir", metavar="DIR", help="Where journals wait. Else TRACKED_SPOOL, else mlruns/spool."
    ),
)
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of output.")


def _one_metric(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> str | None:
    if len(given) > 1 or any("," in metric for metric in given):
        raise UsageError(
            f"{' and '.join(map(repr, given))} are to be monitored: several objectives",
            expected="one metric: best, patience and pruning compare by it, and of several none is the best",
            try_next=f"--monitor {given[0].partition(',')[0]}",
        )
    return given[0] if given else None


_loop = _options(
    click.option("--epochs", type=int, metavar="N", help="Train so many epochs in all."),
    click.option(
        "--max-steps", type=int, metavar="N", help="Train so many steps in all, restarting the data."
    ),
    click.option("--eval-every", metavar="INTERVAL", help='"1 epoch" (default) or "200 steps".'),
    click.option(
        "--checkpoint-every",
        multiple=True,
        metavar="INTERVAL",
        help='"1 epoch" (default), "200 steps" or "5 min"; several allowed.',
    ),
    click.option(
        "--log-every",
        metavar="N|INTERVAL|auto",
        help='Steps between two logged losses (default auto), or "1 epoch".',
    ),
    click.option("--keep-last", type=int, metavar="K", help="Newest checkpoints to keep (3)."),
    click.option("--keep-best", type=int, metavar="K", help="Best checkpoints to keep (1)."),
    click.option(
        "--monitor",
        multiple=True,
        callback=_one_metric,
        metavar="METRIC",
        help="The metric that best, patience and pruning look at.",
    ),
    click.option(
        "--mode", type=click.Choice(["min", "max"]), help="Whether a smaller or larger one is better."
    ),
    click.option(
        "--patience", type=int, metavar="K", help="Stop after so many evaluations without improvement."
    ),
    click.option("--min-delta", type=float, metavar="X", help="What an improvement must exceed (0)."),
    click.option("--seed", type=int, metavar="N", help="Decides everything random (0)."),
    click.option("--deterministic", is_flag=True, default=None, help="Prefer deterministic kernels."),
    click.option("--device", metavar="auto|cpu|cuda[:i]", help="Where to train (auto)."),
)
_shown = _options(
    click.option(
        "--system-metrics",
        is_flag=True,
        default=None,
        help="Log how busy processors, memory, disk, network and GPUs are.",
    ),
    click.option(
        "--log-model/--no-log-model",
        default=None,
        help="At the end, log the best weights as a model of MLflow's PyTorch flavour; as a rule it does.",
    ),
    click.option(
        "--register",
        metavar="NAME",
        help="Log the model, and register it under this name; the best version has the alias `best`.",
    ),
)
_how = _options(
    click.option(
        "--run-id-file", type=click.Path(path_type=Path), help="Write the run's ID there once it exists."
    ),
    click.option("--no-progress", is_flag=True, help="No progress bar."),
    click.option(
        "--drain-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="Seconds to wait at the end for the server to take the last points (60).",
    ),
    _as_json,
    _where,
)
_FROM_1 = click.IntRange(min=1)
_budget = _options(
    click.option(
        "--trials", type=_FROM_1, metavar="N", help="Of a sweep: to train in all, by all that take part (20)."
    ),
    click.option("--workers", type=_FROM_1, metavar="N", help="Of a sweep: processes on this machine (1)."),
    click.option(
        "--storage",
        metavar="URL",
        help="Of a sweep: a database, such as postgresql+psycopg://… (else a file).",
    ),
    click.option(
        "--timeout",
        "seconds",
        type=click.FloatRange(min=0, min_open=True),
        metavar="S",
        help="Of a sweep: no new trial after S seconds.",
    ),
    click.option(
        "--max-epochs-total",
        "max_epochs",
        type=_FROM_1,
        metavar="N",
        help="Of a sweep: so many epochs in all.",
    ),
    click.option(
        "--max-retries",
        type=click.IntRange(min=0),
        metavar="K",
        help="Of a sweep: go on with a trial that died so often (3).",
    ),
    click.option("--top", type=_FROM_1, metavar="K", help="Of a sweep: train the K best to --extend-epochs."),
    click.option("--extend-epochs", type=_FROM_1, metavar="N", help="How far --top trains, in all."),
)
_LOOP_NAMES = [
    "epochs",
    "max_steps",
    "eval_every",
    "checkpoint_every",
    "log_every",
    "keep_last",
    "keep_best",
    "monitor",
    "mode",
    "patience",
    "min_delta",
    "seed",
    "deterministic",
    "device",
    "log_model",
    "register",
    "system_metrics",
]


def _place(tracking_uri: str | None, spool_dir: str | None) -> Place:
    from tracked.place import Place

    return Place.choose(tracking_uri, spool_dir)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """The loop's settings that were typed."""
    given = {name: options.pop(name, None) for name in _LOOP_NAMES}
    settings = {name: value for name, value in given.items() if value not in (None, ())}
    every = settings.get("log_every")
    if every is not None and every.isdigit():
        settings["log_every"] = int(every)
    return settings


def _request(options: dict[str, Any], overrides: tuple[str, ...]) -> Request:
    """Everything that can be checked is checked, and the sender started, before torch is imported."""
    from tracked.schedule import Settings

    settings = _settings(options)
    Settings(**settings)
    place = _place(options["tracking_uri"], options["spool_dir"])
    # What the experiment itself reads from a run, as weights to begin with, is looked for on the same server.
    os.environ["MLFLOW_TRACKING_URI"] = place.tracking_uri
    place.start_sender()

    from tracked.progress import Bar
    from tracked.training import Request

    return Request(
        place=place,
        settings=settings,
        overrides=list(overrides),
        experiment_name=options.get("experiment_name"),
        run_name=options.get("run_name"),
        run_key=options.get("run_key"),
        config=options.get("config"),
        file=options.get("file"),
        log_diff=options.get("log_diff", False),
        progress=Bar(show=not options["no_progress"], run_id_file=options["run_id_file"]),
        drain_timeout=options["drain_timeout"],
    )


def _carry_out(work: Callable[[Request], Run], request: Request, *, as_json: bool) -> NoReturn:
    """Train, tell how it ended, and exit with what that means."""
    from tracked.training import NothingLeft

    def tell() -> None:
        if as_json and request.run is not None:
            _print_json(_outcome(request.run))

    try:
        run = work(request)
    except TrackedError as error:
        tell()
        _complain(error)
    except NothingLeft as nothing:
        click.echo(str(nothing), err=True)
        if as_json:
            _print_json(_complete(nothing))
        sys.exit(FINISHED)
    except KeyboardInterrupt:
        click.echo("interrupted twice: left at once; `resume` goes on from the last checkpoint", err=True)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the user's own code raised: theirs to see, whole
        traceback.print_exception(_without_our_frames(error))
        tell()
        sys.exit(FAILED)
    with contextlib.suppress(OSError):  # who reads our words may be gone: the exit status counts
        for line in _summary(run):
            click.echo(line, err=True)
    tell()
    if run.last_state == "paused":
        sys.exit(PAUSED)
    sys.exit(UNDELIVERED if run.undelivered else FINISHED)


def _without_our_frames(error: BaseException) -> BaseException:
    """The traceback from the first frame of the user's own on."""
    package = str(Path(__file__).parent)
    trace = error.__traceback__
    while trace and trace.tb_next and trace.tb_frame.f_code.co_filename.startswith(package):
        trace = trace.tb_next
    return error.with_traceback(trace)


def _outcome(run: Run) -> dict[str, Any]:
    checkpoint = run.checkpoint
    return {
        "run_id": run.id,
        "state": run.last_state,
        "step": run.step,
        "epoch": run.epochs_done,
        "metrics": run.metrics,
        "undelivered": run.undelivered,
        "resumed_from": run.resumed_from,
        "replayed_equal": run.replayed_equal,
        "checkpoint": checkpoint,
    }


def _complete(nothing: Any) -> dict[str, Any]:
    from tracked.names import CHECKPOINT

    view = nothing.view
    checkpoint = json.loads(view.tags.get(CHECKPOINT, "{}"))
    return {
        "run_id": view.run_id,
        "state": view.tags.get("tracked.state"),
        "step": checkpoint.get("step"),
        "epoch": checkpoint.get("epoch"),
        "metrics": {key: latest.value for key, latest in view.latest.items()},
        "undelivered": 0,
        "resumed_from": None,
        "replayed_equal": 0,
        "checkpoint": checkpoint or None,
    }


def _summary(run: Run) -> list[str]:
    from tracked.progress import result

    lines = [result(run)]
    if run.resumed_from is not None:
        proof = f"; {run.replayed_equal} recomputed points were equal" if run.replayed_equal else ""
        began = "forked" if run.attempt == 1 else "resumed"
        lines.append(f"{began} from step {run.resumed_from}{proof}")
    if run.last_state == "paused":
        lines.append(f"to go on: python -m tracked.run resume {run.id}")
    return lines


# -- train and resume


@main.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[NAME=VALUE]…")
@click.option("--check", is_flag=True, help="A few steps, save, reload, compare bitwise, leave.")
@click.option("--experiment-name", metavar="NAME", help="MLflow's experiment (default: the file's name).")
@click.option("--run-name", metavar="NAME", help="The run's name in MLflow.")
@click.option(
    "--run-key",
    metavar="KEY",
    help="The same line started again goes on with this key's unfinished run. "
    "Default: from a Slurm array or an indexed Kubernetes job.",
)
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file of hyperparameters.")
@click.option(
    "--log-diff", is_flag=True, help="Log what git has not committed, as the artifact source/diff.patch."
)
@_shown
@_loop
@_how
def train(
    experiment: Path, overrides: tuple[str, ...], *, check: bool, as_json: bool, **options: Any
) -> None:
    """Train an experiment file as a new run."""
    if not experiment.exists():
        # Told without waiting for torch.
        from tracked.experiment import load

        load(experiment)
    if check:
        _check(experiment, overrides, options)
    request = _request(options, overrides)
    from tracked import training

    request.run_key = request.run_key or training.default_run_key(sys.argv[1:])
    _carry_out(lambda request: training.train(experiment, request), request, as_json=as_json)


def _check(experiment: Path, overrides: tuple[str, ...], options: dict[str, Any]) -> NoReturn:
    from tracked import training

    settings = _settings(options)
    place = _place(options["tracking_uri"], options["spool_dir"])
    os.environ["MLFLOW_TRACKING_URI"] = place.tracking_uri  # as for a training
    request = training.Request(place, settings, list(overrides), config=options["config"])
    tensors, points = training.check(experiment, request)
    click.echo(
        f"exact: {tensors} values of the state and {points} points are equal after a resume, to the last bit"
    )
    sys.exit(FINISHED)


@main.command(context_settings={"allow_interspersed_args": True})
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[NAME=VALUE]… | -- COMMAND…", type=click.UNPROCESSED)
@click.option(
    "--file", type=click.Path(path_type=Path), help="The experiment file, if it lies elsewhere now."
)
@_budget
@_shown
@_loop
@_how
def resume(run: str, overrides: tuple[str, ...], *, as_json: bool, **options: Any) -> None:
    """Go on in the same run from its last checkpoint."""
    if command := _behind_dashes():
        _run_script(["resume", run], _resuming(run, options), command, options)
    given = dict(options)
    request = _request(options, overrides)
    from tracked import training

    def work(request: Request) -> Run:
        try:
            return training.resume(run, request)
        except training.IsSweep as found:
            if overrides:
                raise UsageError(
                    f"run {run} is a sweep's, whose trials have their params: {' '.join(overrides)} changes none",
                    try_next="a new sweep",
                ) from None
            _sweep(given, as_json=as_json, view=found.view)

    _carry_out(work, request, as_json=as_json)


@main.command(context_settings={"allow_interspersed_args": True})
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[NAME=VALUE]… | -- COMMAND…", type=click.UNPROCESSED)
@click.option(
    "--step", type=int, metavar="N", help="From the checkpoint of this step, instead of the last one."
)
@click.option("--experiment-name", metavar="NAME", help="MLflow's experiment (default: that of RUN).")
@click.option("--run-name", metavar="NAME", help="The new run's name in MLflow.")
@click.option(
    "--file", type=click.Path(path_type=Path), help="The experiment file, if it lies elsewhere now."
)
@_shown
@_loop
@_how
def fork(run: str, overrides: tuple[str, ...], *, step: int | None, as_json: bool, **options: Any) -> None:
    """Train a new run from a checkpoint of another, history included."""
    if command := _behind_dashes():
        line = ["fork", run, *([] if step is None else ["--step", str(step)])]
        _run_script(line, {"TRACKED_FORK": f"{run}@{'' if step is None else step}"}, command, options)
    request = _request(options, overrides)
    from tracked import training

    _carry_out(lambda request: training.fork(run, request, step=step), request, as_json=as_json)


@main.command(context_settings={"allow_interspersed_args": True})
@click.argument("experiment", type=click.Path(path_type=Path))
@click.argument("space", nargs=-1, metavar="[NAME=SPACE | NAME=VALUE]…")
@click.option("--sampler", metavar="NAME", help="tpe (default), random, grid, gp, cmaes or qmc.")
@click.option(
    "--sampler-option", "sampler_options", multiple=True, metavar="NAME=VALUE", help="Of the sampler."
)
@click.option(
    "--pruner", metavar="NAME", help="median (default), percentile, sha, hyperband, threshold or none."
)
@click.option("--pruner-option", "pruner_options", multiple=True, metavar="NAME=VALUE", help="Of the pruner.")
@click.option(
    "--promote/--no-promote", default=True, help="With sha: go on with pruned trials that turn out good."
)
@click.option("--study-name", metavar="NAME", help="The same name again goes on with the same study.")
@click.option("--experiment-name", metavar="NAME", help="MLflow's experiment (default: the file's name).")
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file of hyperparameters.")
@_budget
@_loop
@_how
def sweep(experiment: Path, space: tuple[str, ...], *, as_json: bool, **options: Any) -> None:
    """Search hyperparameters: a study whose trials are runs, the bad ones stopped early."""
    _sweep(options, as_json=as_json, file=experiment, words=list(space))


def _sweep(options: dict[str, Any], *, as_json: bool, view: RunView | None = None, **what: Any) -> NoReturn:
    """Carry out a sweep, new or continued, and exit with what it means."""
    from tracked.schedule import Settings

    settings = _settings(options)
    Settings(**settings)
    place = _place(options.pop("tracking_uri"), options.pop("spool_dir"))
    os.environ["MLFLOW_TRACKING_URI"] = place.tracking_uri
    place.start_sender()
    top, epochs = options.pop("top"), options.pop("extend_epochs")
    if (top is None) != (epochs is None):
        raise UsageError(
            "--top and --extend-epochs say one thing together", try_next="--top 3 --extend-epochs 20"
        )

    from tracked import sweep as sweeps
    from tracked.progress import Bar
    from tracked.ranking import ranking
    from tracked.sweep_plan import Request

    options.pop("no_progress")
    progress = Bar(show=False, run_id_file=options.pop("run_id_file"))
    known: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, ())}
    request = Request(
        place, settings=settings, progress=progress, extend=top and (top, epochs), **what, **known
    )
    try:
        found = sweeps.sweep(request) if view is None else sweeps.resume(view, request)
    except KeyboardInterrupt:
        _note("interrupted twice: left at once; `resume` goes on from the last checkpoints")
        sys.exit(130)
    except TrackedError:
        raise
    except Exception as error:  # noqa: BLE001 - the experiment file's own: theirs to see, whole
        traceback.print_exception(_without_our_frames(error))
        sys.exit(FAILED)
    _note(ranking(found.trials, metric=found.metric, mode=found.mode, limit=10))
    if as_json:
        best = found.best
        line = {
            "run_id": found.run_id,
            "study_name": found.study_name,
            "state": found.state,
            "best": best and asdict(best),
            "trials": len(found.trials),
        }
        _print_json(line)
    if found.state == "paused":
        _note(f"paused: {found.reason}\n  try: python -m tracked.run resume {found.run_id}")
        sys.exit(PAUSED)
    if found.state == "failed":
        _note("no trial has finished")
        sys.exit(FAILED)
    sys.exit(UNDELIVERED if found.undelivered else FINISHED)


def _behind_dashes() -> list[str]:
    """The words behind `--`: a command; none if there is none."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


def _resuming(word: str, options: dict[str, Any]) -> dict[str, str]:
    """What tells a script which run it goes on with; behind the plugin's address, in a way that MLflow knows, too."""
    from tracked.address import PLUGIN

    uri = options["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if not uri.strip().startswith(PLUGIN):
        return {"TRACKED_RESUME": word}
    from tracked import logged_run
    from tracked.names import HANDLE

    place = _place(options["tracking_uri"], options["spool_dir"])
    view = logged_run.find(place, word, lambda text: click.echo(text, err=True))
    own = {"MLFLOW_TRACKING_URI": f"{PLUGIN}{place.tracking_uri}", "TRACKED_RESUME": view.run_id}
    return own if HANDLE in view.tags else {**own, "MLFLOW_RUN_ID": view.run_id}


def _run_script(
    line: list[str], variables: dict[str, str], command: list[str], options: dict[str, Any]
) -> NoReturn:
    """Run the user's own script, in which `tracked.start` becomes the run that the variables name."""
    names = ("experiment_name", "run_name")
    if given := [*_settings(options), *(name for name in names if options.get(name))]:
        raise UsageError(
            f"{', '.join(given)} cannot be given to a script from here",
            expected="the loop's settings in the script: tracked.start(…, epochs=20)",
            try_next=f"python -m tracked.run {shlex.join(line)} -- {shlex.join(command)}",
        )
    place = _place(options["tracking_uri"], options["spool_dir"])
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": place.tracking_uri,
        "TRACKED_SPOOL": str(place.spool),
        **variables,
    }
    try:
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    except OSError as error:
        raise UsageError(
            f"the command {command[0]!r} cannot be started: {error.strerror}",
            expected="a command behind --, such as `python train.py`",
        ) from None


# -- asking a training to leave

_asking = _options(
    click.option("--no-wait", is_flag=True, help="Return as soon as the server has taken the command."),
    click.option(
        "--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for its end."
    ),
    _as_json,
    _where,
)


@main.command()
@click.argument("run")
@_asking
def pause(run: str, **options: Any) -> None:
    """Have a training, wherever it runs, checkpoint and leave; `resume` goes on."""
    _ask(run, "pause", **options)


@main.command()
@click.argument("run")
@_asking
def stop(run: str, **options: Any) -> None:
    """Have a training, wherever it runs, checkpoint and end."""
    _ask(run, "stop", **options)


def _ask(
    run: str,
    what: Literal["pause", "stop"],
    *,
    no_wait: bool,
    timeout: float,
    as_json: bool,
    tracking_uri: str | None,
    spool_dir: str | None,
) -> None:
    from tracked import command

    place = _place(tracking_uri, spool_dir)
    run_id, state = command.ask(place, run, what, _note, wait=not no_wait, timeout=timeout)
    if as_json:
        _print_json({"run_id": run_id, "state": state})
    elif no_wait:
        click.echo(f"asked run {run_id} to {what}")
    else:
        click.echo(f"run {run_id} is {state}")
        if state == "paused":
            click.echo(f"to go on: python -m tracked.run resume {run_id}")


# -- looking


@main.command("list")
@click.option("--experiment", metavar="NAME", help="Only runs of this experiment.")
@click.option("--state", metavar="STATE", help="Only runs in this state: running, paused, finished, lost …")
@click.option(
    "--filter",
    "only",
    default="",
    metavar="FILTER",
    help="""Only runs that pass it, in MLflow's search syntax: 'metrics."val/loss" < 0.1'.""",
)
@click.option("--sort-by", metavar="METRIC", help="By this metric's last value, the smallest first.")
@click.option("--descending", is_flag=True, help="With --sort-by: the largest first.")
@click.option("--all", "everyones", is_flag=True, help="Also the runs that other MLflow code has made.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="How many at most, newest first unless they are sorted.",
)
@_as_json
@_where
def list_(tracking_uri: str | None, spool_dir: str | None, *, as_json: bool, **which: Any) -> None:
    """Show what runs there are, and their true state."""
    from tracked import inspection

    place = _place(tracking_uri, spool_dir)
    narrowed = which["experiment"] or which["state"] or which["only"]
    limit = which.pop("limit")
    # One more than are shown tells whether there are more.
    found = inspection.listing(place, which.pop("experiment"), limit + 1, _note, **which)
    shown = found[:limit]
    if as_json:
        _print_json([each.as_json() for each in shown])
    elif shown:
        click.echo(inspection.table(shown, which["sort_by"]))
    elif narrowed:
        click.echo("no such runs: python -m tracked.run list")
    else:
        click.echo("no runs yet: python -m tracked.run train EXPERIMENT.py")
    if not shown and not as_json and not which["everyones"]:
        click.echo("with those of other MLflow code: python -m tracked.run list --all")
    if len(found) > limit:
        _note(f"there are more than these {limit}: --limit {2 * limit}")


@main.command()
@click.argument("run")
@click.option(
    "--tensors",
    is_flag=True,
    help="Also its last checkpoint's tensors (shapes, norms) and learning rates.",
)
@_as_json
@_where
def show(run: str, tracking_uri: str | None, spool_dir: str | None, *, tensors: bool, as_json: bool) -> None:
    """Show one run: state, params, metrics, checkpoints."""
    from tracked import inspection

    place = _place(tracking_uri, spool_dir)
    found = inspection.look(place, run, _note)
    shown, text = found.as_json(), inspection.page(found)
    if tensors:
        from tracked.retrieval import retrieve
        from tracked.tensors import look_inside, page

        with tempfile.TemporaryDirectory(prefix="tracked-show-") as folder:
            inside = look_inside(retrieve(place, found.summary.run_id, Path(folder), _note).state)
        shown, text = shown | inside.as_json(), f"{text}\n\n{page(inside)}"
    if as_json:
        _print_json(shown)
    else:
        click.echo(text)


@main.command()
@click.argument("runs", nargs=-1, metavar="RUN…")
@click.option("--experiment", metavar="NAME", help="Instead of RUN…: the best runs of this experiment.")
@click.option(
    "--top", type=click.IntRange(min=2), default=10, show_default=True, help="Of the experiment: how many."
)
@click.option("--metric", help="What the runs are compared by (default: what they monitor).")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether a smaller or larger one is better.")
@click.option(
    "--to", metavar="FILE.png", type=click.Path(path_type=Path), help="Draw the curves into this file."
)
@_as_json
@_where
def compare(
    runs: tuple[str, ...],
    to: Path | None,
    tracking_uri: str | None,
    spool_dir: str | None,
    *,
    as_json: bool,
    **which: Any,
) -> None:
    """Show what differs between runs, and draw their curves."""
    from tracked import comparison

    if to is not None:
        comparison.check_picture(to)
    place = _place(tracking_uri, spool_dir)
    found = comparison.compare(place, runs, _note, **which, with_curves=to is not None)
    if to is not None:
        comparison.draw(found, to)
    if as_json:
        _print_json({**found.as_json(), "picture": str(to) if to else None})
        return
    click.echo(found.table())
    if to is not None:
        click.echo(f"picture: {to}")
    served = "" if place.tracking_uri.startswith("http") else "python -m tracked.run ui, then "
    click.echo(f"in MLflow: {served}{found.url}")


@main.command()
@click.argument("run")
@_as_json
@_where
def verify(run: str, tracking_uri: str | None, spool_dir: str | None, *, as_json: bool) -> None:
    """Prove a run's history and checkpoints whole, or tell what is not."""
    from tracked import verification

    proof = verification.verify(_place(tracking_uri, spool_dir), run, _note)
    if as_json:
        _print_json({"run_id": proof.run_id, "whole": not proof.wrong, "wrong": proof.wrong})
    else:
        for line in proof.proven:
            click.echo(f"ok     {line}")
        for line in proof.wrong:
            click.echo(f"wrong  {line}")
    sys.exit(FAILED if proof.wrong else FINISHED)


@main.command()
@click.argument("run")
@click.option(
    "--form", required=True, type=click.Choice(["weights", "model", "training"]), help="What to save."
)
@click.option("--to", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where to save it.")
@click.option("--step", type=int, metavar="N", help="The checkpoint of this step, instead of the last one.")
@click.option("--best", is_flag=True, help="The best checkpoint that is kept, instead of the last one.")
@click.option(
    "--file", type=click.Path(path_type=Path), help="The experiment file, if it lies elsewhere now (model)."
)
@click.option("--force", is_flag=True, help="Replace files that are there already.")
@_as_json
@_where
def export(
    run: str,
    form: Literal["weights", "model", "training"],
    tracking_uri: str | None,
    spool_dir: str | None,
    *,
    as_json: bool,
    **options: Any,
) -> None:
    """Save a run's weights, module or training state for use without this package."""
    if options["best"] and options["step"] is not None:
        raise UsageError("--best and --step name two checkpoints", expected="one of them")
    place = _place(tracking_uri, spool_dir)
    from tracked import export as exports
    from tracked.tables import aligned, readable

    run_id, step, files = exports.export(place, run, form, options.pop("to"), _note, **options)
    if as_json:
        listed = [{"path": str(each.path), "bytes": each.bytes, "load": each.load} for each in files]
        _print_json({"run_id": run_id, "step": step, "form": form, "files": listed})
    else:
        rows = [(str(each.path), readable(each.bytes), each.load) for each in files]
        click.echo(aligned([(f"step {step} of {run_id[:8]}", "size", "to load it"), *rows]))


# -- the spool


@main.command()
@click.option(
    "--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for the servers."
)
@_as_json
@_where
def sync(timeout: float, tracking_uri: str | None, spool_dir: str | None, *, as_json: bool) -> None:
    """Deliver what the spool still holds, for all servers or for the one that --tracking-uri names."""
    from tracked import upkeep

    place = _place(tracking_uri, spool_dir)
    left = upkeep.sync(place, timeout, _note, everywhere=tracking_uri is None)
    if as_json:
        _print_json({"undelivered": left})
    sys.exit(UNDELIVERED if left else FINISHED)


@main.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@_as_json
@_where
def gc(tracking_uri: str | None, spool_dir: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Free spool space and superseded checkpoints."""
    from tracked import upkeep

    freed = upkeep.gc(_place(tracking_uri, spool_dir), dry_run=dry_run, say=_note)
    if as_json:
        _print_json({"freed_bytes": freed})


@main.command()
@click.option("--port", type=int, default=5000, show_default=True, help="For the embedded database.")
@_where
def ui(port: int, tracking_uri: str | None, spool_dir: str | None) -> None:
    """Open MLflow's UI over the current tracking URI."""
    from tracked import upkeep

    sys.exit(upkeep.ui(_place(tracking_uri, spool_dir), port, click.echo))


if __name__ == "__main__":
    main()
