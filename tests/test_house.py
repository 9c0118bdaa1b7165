"""The table of modules holds: each imports only from rows above it, and the heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.processes import ROOT, Workplace
from tracked.spool import open_outbox

PACKAGE = ROOT / "tracked"

# A module imports from the rows above its own, and from nowhere else in the package.
ROWS = """
errors
failpoints names address packing params provenance schedule stopping children deferred_compiler tables plots trials
transport spool space ranking trial_runs allocator resumption description confusion
artifacts embedded journal archive sweep_plots flavour system_metrics
server seeding points state delivery drawing
data call_delivery freezing search datasets
streams groups sender experiment storage
place checkpoint
calls
pipe store
tracking progress
attempts loop inspection
retrieval logged_run packaging verification
forking lightning transformers modelling
training upkeep finetune command tensors plugin comparison
export study worker
crew sweep_plan
sweep_parent
sweep
cli
run __main__
"""

# Libraries that take seconds, or that not everybody has: who may import them at all.
ALLOWED = {
    "mlflow": {"server", "embedded", "transport", "artifacts", "store", "transformers", "flavour"},
    "optuna": {"search", "storage", "study", "drawing"},
    "matplotlib": {"plots", "sweep_plots"},
    "click": {"cli"},
    "tqdm": {"progress"},
    "torch": {
        *("seeding", "points", "state", "data", "streams", "checkpoint", "tracking", "loop", "training"),
        *("freezing", "groups", "finetune", "deferred_compiler", "tensors", "export", "crew"),
        *("confusion", "datasets", "packaging", "modelling"),
    },
    "safetensors": {"export", "finetune"},
}


def table() -> dict[str, int]:
    return {module: row for row, line in enumerate(ROWS.split("\n")) for module in line.split()}


@cache
def modules() -> dict[str, ast.Module]:
    """All modules of the package but `__init__`, which only names where things are."""
    files = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    return {path.stem: ast.parse(path.read_text()) for path in files}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported at run time, late imports included; types alone bind nobody."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide from a search"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def own_imports(tree: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imports(tree) if name.startswith("tracked.")}


def test_every_module_stands_in_the_table_once() -> None:
    assert len(ROWS.split()) == len(table())
    assert set(table()) == set(modules())


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_rows_above_it(module: str) -> None:
    rows = table()
    below = {name for name in own_imports(modules()[module]) if rows[name] >= rows[module]}

    assert not below, f"{module} imports from its own row or below: {sorted(below)}"


def test_the_command_line_is_imported_by_its_two_doors_alone() -> None:
    assert {name for name, tree in modules().items() if "cli" in own_imports(tree)} == {"run", "__main__"}


@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_only_where_the_table_says(library: str) -> None:
    found = {
        module
        for module, tree in modules().items()
        if any(name.split(".")[0] == library for name in imports(tree))
    }

    assert found <= ALLOWED[library]


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import tracked", ()),
        ("import tracked.cli", ("click",)),
        ("import tracked.archive", ()),
        ("import tracked.sender", ()),
        ("import tracked.inspection, tracked.upkeep, tracked.command, tracked.verification", ()),
        ("from tracked.cli import main; main(['train', '--help'], standalone_mode=False)", ("click",)),
    ],
)
def test_what_starts_often_imports_nothing_heavy(statement: str, allowed: tuple[str, ...]) -> None:
    heavy = {*ALLOWED, "numpy", "pandas", "sqlalchemy", "requests", "scipy", "yaml"} - {*allowed}
    script = f"{statement}\nimport sys; print(); print(*sorted({heavy!r} & set(sys.modules)), sep=',')"

    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == ""


def test_who_has_a_servers_address_imports_nothing_for_a_database(tmp_path: Path) -> None:
    script = (
        "import sys; from tracked.server import Server; from tracked.store import tracking_store\n"
        "Server('http://127.0.0.1:9'); tracking_store('tracked+http://127.0.0.1:9')\n"
        "print(sorted({'mlflow', 'sqlalchemy', 'alembic'} & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRACKED_SPOOL": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == "['mlflow']"


def test_a_sender_that_is_not_needed_leaves_before_it_imports_mlflow(workplace: Workplace) -> None:
    """Trainers start senders freely, because all but one cost next to nothing."""
    outbox = open_outbox(workplace.spool, workplace.tracking_uri)
    script = (
        "import sys; from pathlib import Path; from tracked import sender, spool\n"
        f"lock = spool.Lock(Path({str(outbox.sender_lock)!r})); assert lock.acquire()\n"
        "import subprocess\n"
        f"line = [sys.executable, '-X', 'importtime', '-m', 'tracked.sender', {str(outbox.path)!r}]\n"
        "done = subprocess.run(line, capture_output=True, text=True)\n"
        "print(done.returncode, 'mlflow' in done.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        env=workplace.environment({"TRACKED_SENDER_URI": workplace.tracking_uri}),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["0", "False"]


def test_modules_say_in_their_first_line_what_they_are_for() -> None:
    for path in sorted({*PACKAGE.glob("*.py")}):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        assert first.endswith((".", ":")), f"{path.name}: {first!r}"


@pytest.mark.parametrize("word", ["helper", "utils", "misc", "manager", "handler", "common"])
def test_no_module_goes_by_a_name_that_says_nothing(word: str) -> None:
    assert not list(PACKAGE.rglob(f"*{word}*.py"))
