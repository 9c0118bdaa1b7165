"""Proves a run's history and checkpoints whole, or tells what is not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked.errors import CheckpointError, ServerUnavailable
from tracked.inspection import find, object_in, refuse_foreign, true_state, undelivered
from tracked.names import (
    CHECKPOINT,
    FILE,
    HANDLE,
    MANIFEST,
    POINTS,
    STATE,
    SWEEP,
    folder_name,
    is_system,
    step_of,
)
from tracked.place import Place
from tracked.spool import RunFolder, read_json
from tracked.tables import readable

if TYPE_CHECKING:
    from tracked.server import RunView, Server

Say = Callable[[str], None]

_PATIENCE = 20.0  # seconds for an answer: nothing waits for this, and a history may be long


@dataclass
class Proof:
    """What was checked of a run: lines that hold, and lines that do not."""

    run_id: str
    proven: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def verify(place: Place, word: str, say: Say) -> Proof:
    """Check that the history is whole, each point once, and that the checkpoints are what they should be.

    Of a run that is being trained, what is up to its committed checkpoint is checked.

    Raises:
        RunNotFound: There is no such run, or several.
        RunNotResumable: It was not made by this package.
        ServerError: The server does not answer.
    """
    from tracked.server import Server

    server = Server(place.tracking_uri, timeout=_PATIENCE, create=False)
    view, local = find(server, place, word, say)
    refuse_foreign(view)
    proof = Proof(view.run_id or view.tags[HANDLE])
    running = true_state(view, local) == "running"
    waiting = sum(undelivered(run) for run in local)
    if running:
        proof.proven.append("the run is being trained: checked up to its committed checkpoint")
    elif waiting:
        proof.wrong.append(f"{waiting} records wait in the spool; try: python -m tracked.run sync")
    if not view.status:
        proof.wrong.append("the server was not asked, or does not have the run yet")
        return proof
    _check_rejected(local, proof)
    histories = _check_history(server, view, proof)
    if SWEEP in view.tags:
        proof.proven.append(
            "the parent of a sweep has no checkpoints; its trials have, each a run of its own"
        )
        return proof
    manifest = _check_checkpoints(server, view, proof, running=running)
    if manifest is not None:
        _check_counts(histories, manifest, proof)
    state = view.tags.get(STATE)
    if state in ("finished", "stopped_early") and POINTS in view.tags and not running:
        found = sum(len(steps) for key, steps in histories.items() if not is_system(key))
        logged = int(view.tags[POINTS])
        _note(
            proof,
            found == logged,
            f"the training logged {logged} points, and so many are there",
            f"the training logged {logged} points, and {found} are there",
        )
    return proof


def _check_rejected(local: Sequence[RunFolder], proof: Proof) -> None:
    for run in local:
        rejected = run.path / "rejected.jsonl"
        if rejected.exists():
            proof.wrong.append(
                f"the server found {len(rejected.read_text().splitlines())} records invalid: {rejected}"
            )


def _check_history(server: Server, view: RunView, proof: Proof) -> dict[str, list[int]]:
    """The steps of each key, ascending."""
    histories: dict[str, list[int]] = {}
    twice = 0
    for key in sorted(view.latest):
        steps = [step for step, _, _ in server.history(view.run_id, key)]
        repeated = sorted({step for step, following in pairwise(steps) if step == following})
        if repeated:
            twice += 1
            shown = ", ".join(map(str, repeated[:5])) + (" …" if len(repeated) > 5 else "")
            proof.wrong.append(f"{key} stands more than once at step {shown}")
        histories[key] = steps
    if not twice:
        total = sum(map(len, histories.values()))
        proof.proven.append(f"{total} points of {len(histories)} metrics, each (metric, step) once")
    return histories


def _check_counts(histories: dict[str, list[int]], manifest: dict[str, Any], proof: Proof) -> None:
    step, counts = manifest["step"], manifest.get("points", {})
    found = {key: sum(at <= step for at in steps) for key, steps in histories.items() if not is_system(key)}
    differing = [
        f"{key}: {found.get(key, 0)} of {counts.get(key, 0)}"
        for key in sorted({*counts, *(key for key, count in found.items() if count)})
        if found.get(key, 0) != counts.get(key, 0)
    ]
    _note(
        proof,
        not differing,
        f"all {sum(counts.values())} points up to step {step}, as the checkpoint counts them",
        f"up to step {step} there are other points than the checkpoint counts: {'; '.join(differing)}",
    )


def _check_checkpoints(
    server: Server, view: RunView, proof: Proof, *, running: bool
) -> dict[str, Any] | None:
    """Download and check each; the manifest of the one that the tag names, if it is sound."""
    pointer = object_in(view.tags.get(CHECKPOINT))
    steps = sorted(
        step for name in server.directories(view.run_id, "checkpoints") if (step := step_of(name)) is not None
    )
    committed = pointer.get("step")
    if committed is None:
        (proof.proven if running else proof.wrong).append("no checkpoint is committed")
    elif committed not in steps:
        proof.wrong.append(f"the tag names the checkpoint of step {committed}, which is not on the server")
    named: dict[str, Any] | None = None
    for step in steps:
        if committed is None or step > committed:
            proof.proven.append(f"checkpoint of step {step}: not committed, so resume does not use it")
            continue
        try:
            manifest = _sound(server, view.run_id, step)
        except ServerUnavailable:
            raise
        except CheckpointError as error:
            # A training deletes what is superseded, also while this looks.
            if not running or folder_name(step) in server.directories(view.run_id, "checkpoints"):
                proof.wrong.append(f"checkpoint of step {step}: {error.found}")
            continue
        if step == committed:
            named = manifest
            if manifest["sha256"] != pointer.get("sha256") or manifest["bytes"] != pointer.get("bytes"):
                proof.wrong.append(f"checkpoint of step {step}: whole, and not the one that the tag names")
                continue
        size = readable(manifest["bytes"])
        tag = ", named by the tag" if step == committed else ""
        proof.proven.append(
            f"checkpoint of step {step}: {size}, SHA-256 as recorded, loads as plain data{tag}"
        )
    return named


def _sound(server: Server, run_id: str, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint whose file is what it says.

    Raises:
        CheckpointError: It is not.
    """
    from tracked.checkpoint import load

    with tempfile.TemporaryDirectory(prefix="tracked-verify-") as folder:
        directory = f"checkpoints/{folder_name(step)}"
        manifest = read_json(server.download(run_id, f"{directory}/{MANIFEST}", Path(folder) / MANIFEST))
        if not isinstance(manifest.get("sha256"), str) or manifest.get("step") != step:
            raise CheckpointError("its manifest cannot be read, or is another step's")
        file = server.download(run_id, f"{directory}/{FILE}", Path(folder) / FILE)
        size = file.stat().st_size
        if size != manifest.get("bytes"):
            raise CheckpointError(f"the file has {size} bytes instead of {manifest.get('bytes')}")
        state = load(file, manifest["sha256"])
        if state["step"] != step:
            raise CheckpointError(f"the file holds step {state['step']}")
    return manifest


def _note(proof: Proof, holds: bool, so: str, otherwise: str) -> None:
    (proof.proven if holds else proof.wrong).append(so if holds else otherwise)
