"""Provenance: what a run records of its origin, and that no secret is among it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tracked import provenance

SECRET = "hunter2-Zq8"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "inner").mkdir(parents=True)
    git(root, "init", "-b", "trunk")
    (root / "inner" / "file.py").write_text("a = 1\n")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    return root


def test_commit_branch_and_place_in_the_repository_are_known(repository: Path) -> None:
    known = provenance.collect(repository / "inner")
    assert known["git_commit"] == git(repository, "rev-parse", "HEAD")
    assert (known["git_branch"], known["git_path"], known["git_dirty"]) == ("trunk", "inner", "false")


def test_a_changed_file_makes_it_dirty_and_an_untracked_one_does_not(repository: Path) -> None:
    (repository / "mlruns").mkdir()
    (repository / "mlruns" / "mlflow.db").touch()
    assert provenance.collect(repository)["git_dirty"] == "false"
    (repository / "inner" / "file.py").write_text("a = 2\n")
    assert provenance.collect(repository)["git_dirty"] == "true"


def test_a_detached_head_and_a_repository_without_commit_leave_out_what_is_unknown(repository: Path) -> None:
    git(repository, "checkout", "--detach")
    detached = provenance.collect(repository)
    assert "git_branch" not in detached
    assert "git_commit" in detached
    fresh = repository / "fresh"
    fresh.mkdir()
    git(fresh, "init", "-b", "trunk")
    assert "git_commit" not in provenance.collect(fresh)


def test_a_repositorys_own_file_monitor_is_not_started(repository: Path) -> None:
    witness = repository / "started"
    git(repository, "config", "core.fsmonitor", f"touch {witness}; false")
    assert "git_commit" in provenance.collect(repository)
    assert not witness.exists()


def test_without_git_the_rest_is_known(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    known = provenance.collect(repository)
    assert "git_commit" not in known
    assert known["python"] == ".".join(map(str, sys.version_info[:3]))
    assert known["host"] == provenance.host_name()


def test_a_git_that_hangs_is_given_up(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec {shutil.which('sleep')} 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent))
    monkeypatch.setattr(provenance, "GIT_TIMEOUT", 0.3)
    assert "git_commit" not in provenance.collect(repository)
    pids = (tmp_path / "pids").read_text().split()
    assert 1 <= len(pids) <= 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_working_directory_that_is_gone_is_survived(tmp_path: Path) -> None:
    code = (
        "import os, sys; from tracked import provenance; "
        "os.mkdir('x'); os.chdir('x'); os.rmdir('../x'); print(provenance.collect()['python'])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr


def test_versions_are_read_without_importing(tmp_path: Path) -> None:
    code = (
        "import sys; from tracked import provenance; known = provenance.collect(); "
        "print(known['torch'], known['mlflow'], 'torch' in sys.modules, 'mlflow' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch, mlflow, *imported = answer.stdout.split()
    assert torch[0].isdigit()
    assert mlflow[0].isdigit()
    assert imported == ["False", "False"]


def test_the_command_holds_no_secret_and_can_be_typed_again() -> None:
    words = [
        "train",
        "x.py",
        "lr=1e-3",
        f"token={SECRET}",
        "--password",
        SECRET,
        "title=a b",
        "max_tokens=512",
    ]
    words += [
        "--tracking-uri",
        f"https://me:{SECRET}@host/path",
        f"secret=two {SECRET} words",
        "--run-key",
        "nightly",
    ]
    code = "from tracked import provenance; print(provenance.collect()['command'])"
    command = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    ).stdout
    assert SECRET not in command
    assert "words" not in command
    for kept in ("train x.py lr=1e-3", "'title=a b'", "max_tokens=512", "host/path", "--run-key nightly"):
        assert kept in command


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{SECRET}@host:5000/x",
        f"postgresql+psycopg://user:{SECRET}@host/db",
        f"https://{SECRET}@host",
        f"MLFLOW_TRACKING_PASSWORD={SECRET}",
        f"api_key = {SECRET}",
        f"apiKey: {SECRET}",
        f"?token={SECRET}&user=me",
        f"{{'password': '{SECRET} and more {SECRET}'}}",
        f'{{"client_secret": "{SECRET}"}}',
        f"--hf-token {SECRET}",
        f"--hf-token '{SECRET} x'",
        f"Authorization: Bearer {SECRET}",
        f"Authorization: Basic {SECRET}==",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"wandbToken={SECRET}",
        f"key={SECRET}",
        *(f"--pass {SECRET}", f"--db-pass={SECRET}", f"DB_PASS={SECRET}", f"--auth user:{SECRET}"),
        *(f"--pat {SECRET}", f"--cookie {SECRET}", f"https://x.net/a?sv=2024&sig={SECRET}&se=1"),
        f"https://x.net/a?X-Amz-Signature={SECRET}",
        f"PASSWORD=12345 PWD_FILE=x secret={SECRET}",
    ],
)
def test_a_secret_is_taken_out(text: str) -> None:
    assert SECRET not in provenance.redact_text(text)
    assert provenance.REDACTED in provenance.redact_text(text)


@pytest.mark.parametrize(
    "token",
    [
        *("ghp_" + "a1" * 18, "hf_" + "aB" * 17, "AKIA" + "A1" * 8, "sk-" + "a1" * 20),
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.a_b-C1",
        "eyJhbGciOiJkaXIifQ..iv.ciphertext.tag",
    ],
)
def test_a_token_of_known_shape_is_taken_out_of_anything(token: str) -> None:
    assert token not in provenance.redact_text(f"x.load('{token}')")


@pytest.mark.parametrize(
    "text",
    [
        "lr=1e-3 max_tokens=512 num_keys=4 tokenizer=bpe monkey=george pad_token=0",
        "http://host:5000/#/experiments/1",
        "--run-key nightly --run-key=nightly run_key=nightly",
        "python -m tracked.run train digits.py --epochs 3",
        "C:/data/x.py:3: ValueError: 12:30",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert provenance.redact_text(text) == text


def test_a_password_of_the_environment_is_taken_out_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    assert (
        provenance.redact_text(f"could not log in as {SECRET}!")
        == f"could not log in as {provenance.REDACTED}!"
    )


def test_the_working_directory_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/me/project")
    monkeypatch.setenv("OLDPWD", "/home/me/other")
    text = 'File "/home/me/project/boom.py", line 3, in /home/me/other/net.py'
    assert provenance.redact_text(text) == text
    assert SECRET not in provenance.redact_text(f"PWD={SECRET}")


@pytest.mark.parametrize(
    "shape",
    [
        *("a", "a.b-", "-a", " ", "a: ", "a='", 'a=\\"', "token=", "key='\\", "--token '"),
        *("a://b", "bearer ", "hf_a-", "eyJaaaaaaaaaa-", "eyJaaaaaaaaaa."),
    ],
)
def test_a_megabyte_of_anything_is_looked_through_in_seconds(shape: str) -> None:
    text = shape * (1_000_000 // len(shape))
    began = time.process_time()
    provenance.redact_text(text)
    assert time.process_time() - began < 10


def test_what_is_no_utf8_is_a_tag_that_can_be_sent() -> None:
    tags = provenance.mlflow_tags({"command": "train.py --data /data/caf\udce9"})
    assert tags["mlflow.tracked.command"] == "train.py --data /data/caf\\udce9"


def test_tags_use_mlflows_own_names_where_it_has_one() -> None:
    tags = provenance.mlflow_tags(
        {"git_commit": "abc", "user": "me", "source": "x.py", "torch": "2", "host": "h"}
    )
    assert tags == {
        "mlflow.source.git.commit": "abc",
        "mlflow.user": "me",
        "mlflow.source.name": "x.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.tracked.torch": "2",
        "mlflow.tracked.host": "h",
    }


def test_host_and_boot_are_safe_names_of_folders_and_stay_the_same() -> None:
    for name in (provenance.host_name(), provenance.boot_id()):
        assert name == Path(name).name
        assert name not in ("", ".", "..")
    assert provenance.boot_id() == provenance.boot_id()


def test_git_root_takes_a_worktrees_file_and_survives_hostile_paths(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", str(tmp_path / "tree"))
    assert provenance.git_root(tmp_path / "tree") == (tmp_path / "tree").resolve()
    assert provenance.git_root(repository / "inner" / "file.py") == repository.resolve()
    assert provenance.git_root(Path("a\0b")) is None
