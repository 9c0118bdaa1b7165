"""The public API exists, is documented, and type-checks as a user writes it (`tests/public_api.py`)."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib

import pytest

import tracked
from tests.processes import ROOT


@pytest.mark.parametrize("name", tracked.__all__)
def test_what_is_exported_exists_with_a_docstring_of_its_own(name: str) -> None:
    found = getattr(tracked, name)

    documented = vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__
    assert documented
    assert documented.split("\n")[0].endswith((".", ":"))


def test_public_methods_of_a_run_are_documented() -> None:
    public = {name: value for name, value in vars(tracked.Run).items() if not name.startswith("_")}

    assert {name for name, value in public.items() if not value.__doc__} == set()


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'tracked' has no attribute 'trian'"):
        _ = tracked.trian


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert tracked.__version__ == project["version"]


def test_the_users_view_type_checks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "tests/public_api.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
