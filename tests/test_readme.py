"""Every snippet of the README is run: shell blocks as commands, Python blocks as scripts, the table's examples."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.nursery import Nursery
from tests.processes import ROOT, Workplace

README = (ROOT / "README.md").read_text()
SECTIONS = {
    part.split("\n")[0]: part for part in re.split(r"^## ", README.removeprefix("# "), flags=re.MULTILINE)
}
ANY_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IN_TABLE = re.compile(r"`python -m tracked\.run ([^`]+)` \|$", re.MULTILINE)


@dataclass(frozen=True)
class Done:
    """What a snippet wrote, standard error included."""

    status: int
    output: str


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the experiments, where nothing is set up but what the README says."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    workplace = Workplace(tmp_path, "")
    yield tmp_path
    workplace.close()


def execute(folder: Path, *command: str) -> Done:
    environment = Workplace(folder, "").environment()
    del environment["MLFLOW_TRACKING_URI"]
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    return Done(done.returncode, done.stdout)


def run_snippets(section: str, folder: Path) -> list[str]:
    """The outputs of a section's snippets, run in their order."""
    outputs = []
    for language, text in ANY_BLOCK.findall(SECTIONS[section]):
        if language == "python":
            name = text.split("\n")[0].removeprefix("# ")
            assert name.endswith(".py"), "a Python block begins with the name of its file"
            (folder / name).write_text(text)
            done = execute(folder, sys.executable, name)
        elif language == "bash":
            done = execute(folder, "bash", "-euc", text)
        else:
            continue
        assert done.status == 0, f"{text}\n{done.output}"
        assert "Traceback" not in done.output
        outputs.append(done.output)
    return outputs


def test_all_blocks_are_run_or_say_that_they_are_output() -> None:
    fences = re.findall(r"^ *(?:```|~~~)(.*)$", README, re.MULTILINE)

    assert len(fences) == 2 * len(ANY_BLOCK.findall(README))
    assert {language for language, _ in ANY_BLOCK.findall(README)} == {"bash", "diff", "python", "text"}
    run_here = {"tracked", "An experiment file", "Sweeps", "Your own loop"}
    assert {
        name for name, text in SECTIONS.items() if re.search(r"^```(bash|python)", text, re.MULTILINE)
    } == run_here


@pytest.mark.timeout(300)
def test_what_the_first_screen_shows_is_true(folder: Path) -> None:
    (output,) = run_snippets("tracked", folder)

    run_id = (folder / "run-id").read_text().strip()
    resumed = re.search(rf"run {run_id} goes on from step (\d+)", output)
    assert resumed, output
    assert "finished at step 8640 (epoch 24)" in output
    assert f"resumed from step {resumed[1]}; " in output
    assert "points of 5 metrics, each (metric, step) once" in output
    assert "wrong  " not in output


@pytest.mark.timeout(300)
def test_an_experiment_file_trains(folder: Path) -> None:
    script, trained = run_snippets("An experiment file", folder)

    assert script == ""
    assert '"state": "finished", "step": 24, "epoch": 3' in trained


@pytest.mark.timeout(300)
def test_a_sweep_of_the_same_name_goes_on(folder: Path) -> None:
    (output,) = run_snippets("Sweeps", folder)

    ended = re.findall(r"^trial (\d): (?:finished|pruned)", output, re.MULTILINE)
    assert sorted(ended) == list("012345"), "each once"
    parents = re.findall(r"^sweep digits: parent run (\w+)", output, re.MULTILINE)
    assert len(parents) == 2
    assert parents[0] == parents[1]


@pytest.mark.timeout(300)
def test_a_loop_of_ones_own_works_both_ways(folder: Path) -> None:
    first, commands = run_snippets("Your own loop", folder)

    assert first.rstrip().endswith("finished 24")
    assert "finished at step 16 (epoch 2)" in commands
    assert "resumed from step 16" in commands
    assert "nothing is left to do: the run is complete at step 24" in commands
    runs = re.findall(r"^([0-9a-f]{32}) finished 24$", commands, re.MULTILINE)
    assert len(runs) == 2
    assert runs[0] == runs[1], "the resumed script is the same run"


@pytest.mark.timeout(300)
def test_the_tables_examples_work_in_their_order(folder: Path, nursery: Nursery) -> None:
    workplace = Workplace(folder, "")
    lines = [shlex.split(text) for text in IN_TABLE.findall(SECTIONS["Commands"])]
    shown = {
        "train",
        "resume",
        "fork",
        "pause",
        "list",
        "compare",
        "show",
        "export",
        "verify",
        "sync",
        "gc",
        "ui",
        "sweep",
    }
    assert {line[0] for line in lines} == shown

    for line in lines:
        # The UI serves until it is interrupted, and a pause needs a training; both have tests of their own.
        end = ["--help"] if line[0] in ("ui", "pause") else []
        result = nursery.run(workplace, *line, *end)
        assert "Traceback" not in result.stderr, line


def test_every_option_and_variable_that_is_named_exists(folder: Path) -> None:
    helps = "".join(
        execute(folder, sys.executable, "-m", "tracked.run", command, "--help").output
        for command in (
            *("train", "resume", "sweep", "fork", "pause", "list", "compare", "show", "export", "sync"),
            *("gc", "ui"),
        )
    )
    code = "".join(path.read_text() for path in (ROOT / "tracked").glob("*.py"))

    options = set(re.findall(r"--[a-z][a-z-]+", README)) - {"--help"}
    assert {option for option in options if option not in helps} == set()
    variables = set(re.findall(r"\bTRACKED_[A-Z_]+", README))
    assert {name for name in variables if name not in code} == set()


def test_what_is_made_by_make_is_a_target_and_links_lead_somewhere() -> None:
    makefile = (ROOT / "Makefile").read_text()

    for target in re.findall(r"`make ([\w-]+)`", README):
        assert f"\n{target}:" in makefile
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`(experiments/\w+\.py)`", README):
        assert (ROOT / path).exists(), path


def test_the_figures_have_their_place() -> None:
    assert README.count("<!-- figures -->") == README.count("<!-- /figures -->") == 1
