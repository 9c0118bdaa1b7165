"""Where a run comes from: git commit, command, host, versions; and the redaction of secrets in such text.

Nothing here raises: a run without provenance is better than no run.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REDACTED = "[redacted]"
GIT_TIMEOUT = 2.0  # seconds, for each of at most two calls
_DIFF_TIMEOUT = 10.0
LONGEST_DIFF = 1_000_000  # characters
LONGEST_COMMAND = 4000  # characters; MLflow refuses tags of more than 8000

_PACKAGES = ("torch", "mlflow", "optuna", "numpy")

_SECRET_NAME = re.compile(
    r"passw(or)?d|passphrase|\bpwd\b|secret|credential|authorization|(api|access|private)[_-]?key",
    re.IGNORECASE,
)
# What `…token` and the like name is a secret unless it is a plain number or yes or no: `pad_token=0` is a
# hyperparameter, and so is anything about `tokens` or `keys`. `--run-key` is an option of this package.
_LIKELY = frozenset({"auth", "cookie", "key", "pass", "pat", "sig", "signature", "token"})
_HARMLESS = re.compile(r"[-+]?[\d.]+(?:e[-+]?\d+)?|true|false|yes|no|none|null", re.IGNORECASE)

# A diff may be a million characters of anything: a pattern that can begin at each character of a run, and fail
# at its end, would take hours for it.
_USERINFO = re.compile(r'://[^\s/"<>]*@')
_BEARER = re.compile(r"\b(bearer|basic)(\s+)[\w.~+/=-]{6,}", re.IGNORECASE)
_KNOWN_SHAPES = re.compile(
    r"\b(?:gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_\w{16,}|sk-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|dapi[0-9a-f]{32}|eyJ[\w.-]{11,})"
)
_ASSIGNMENT = re.compile(
    r"""(?P<name>(?<![\w.-])[\w.-]+)(?P<sign>["']?\s*(?:=|:(?!//))\s*)"""
    r"""(?P<value>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s&"']+)"""
)
_OPTION = re.compile(
    r"""(?P<name>(?<!\S)--?[\w-]+)(?P<sign>\s+)(?P<value>"[^"]*"|'[^']*'|[^\s"'-][^\s"']*)"""
)


def collect(cwd: Path | None = None) -> dict[str, str]:
    """What is known about this process and the code it runs; unknown things are left out.

    Keys: `command` (shell-quoted, secrets redacted), `source` (the script), `user`, `host`, `python`,
    `platform`, `torch`, `mlflow`, `optuna`, `numpy` (versions, read without importing them), and inside a git
    repository `git_commit`, `git_branch`, `git_dirty` ("true" or "false"; only files that git tracks count,
    so `mlruns/` makes nothing dirty) and `git_path` (`cwd` relative to the repository's root).

    Args:
        cwd: Folder whose repository is meant; the working directory by default.
    """
    import platform

    known = {
        "command": _command(sys.orig_argv),
        "source": redact_text(sys.argv[0]) if sys.argv else "",
        "user": _user(),
        "host": host_name(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_versions(),
        **_git(cwd),
    }
    return {name: value for name, value in known.items() if value}


def diff(cwd: Path) -> str:
    """How the files that git tracks differ from the last commit, as a patch, with secrets redacted.

    Empty if nothing differs, and where git does not answer in time. Files that git does not track are not in it.
    Of more than a million characters the rest is left out, as its last line then says.

    Args:
        cwd: A folder in the repository.
    """
    # Neither a program of the repository's settings nor a colour of the user's has a say in it.
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-relative")
    found = _run_git(cwd, "-c", "core.fsmonitor=false", "diff", *plain, "HEAD", timeout=_DIFF_TIMEOUT) or ""
    cut = redact_text(found[:LONGEST_DIFF])
    left = len(found) - LONGEST_DIFF
    return f"{cut}\n# {left} more characters are left out\n" if left > 0 else cut


def mlflow_tags(provenance: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run, under MLflow's own names where it has one, else `mlflow.tracked.<key>`."""
    own = {
        "source": "mlflow.source.name",
        "user": "mlflow.user",
        "git_commit": "mlflow.source.git.commit",
        "git_branch": "mlflow.source.git.branch",
    }
    tags = {own.get(name, f"mlflow.tracked.{name}"): _sendable(value) for name, value in provenance.items()}
    return {**tags, "mlflow.source.type": "LOCAL"}


def _sendable(text: str) -> str:
    """The text with what is no UTF-8, as file names and arguments may be, as escapes: no request can carry it."""
    return text.encode("utf-8", "backslashreplace").decode()


def host_name() -> str:
    """This machine's name, safe as the name of a folder; "localhost" if it has none."""
    import platform

    name = re.sub(r"[^\w.-]", "_", platform.node(), flags=re.ASCII).strip(".")
    return name or "localhost"


def boot_id() -> str:
    """Changes with each boot on Linux; elsewhere the constant "boot". Safe as the name of a folder."""
    try:
        found = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return "boot"
    return found if re.fullmatch(r"[0-9a-f-]{8,64}", found) else "boot"


def git_root(path: Path) -> Path | None:
    """The resolved folder with `.git` (folder, or file in a worktree) that `path` lies in, or None."""
    try:
        start = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links, a working directory that is gone
        return None
    for folder in (start, *start.parents):
        # Path.exists would raise where a folder may not be read
        if os.path.exists(folder / ".git"):  # noqa: PTH110
            return folder
    return None


def redact_text(text: str) -> str:
    """The text without what looks like a secret; rather too much is taken out than too little.

    Taken out: user and password of URLs; what is assigned to names like password, secret, token, key (`a=b`,
    `a: b`, `--a b`); bearer and basic credentials; tokens of well-known shape; and the values of this
    process's environment variables with such names, wherever they stand.
    """
    for name, value in os.environ.items():
        if name == "PWD":
            continue  # a shell's working directory, which stands in every traceback
        if len(value) >= 6 and (_SECRET_NAME.search(name) or name.upper().endswith("TOKEN")):
            text = text.replace(value, REDACTED)
    text = _USERINFO.sub(f"://{REDACTED}@", text)
    text = _BEARER.sub(rf"\1\2{REDACTED}", text)
    text = _KNOWN_SHAPES.sub(REDACTED, text)
    text = _ASSIGNMENT.sub(_redact_match, text)
    return _OPTION.sub(_redact_match, text)


def redact_values(values: Mapping[str, str]) -> dict[str, str]:
    """`values` with those taken out whose names say that they are secrets."""
    return {name: REDACTED if _secret(name, value) else value for name, value in values.items()}


def _redact_match(match: re.Match[str]) -> str:
    name, sign, value = match["name"], match["sign"], match["value"]
    if value.lower() in ("bearer", "basic") or not _secret(name, value):
        return match[0]
    quote = value[0] if value[0] in "\"'" and value.endswith(value[0]) else ""
    return f"{name}{sign}{quote}{REDACTED}{quote}"


def _secret(name: str, value: str) -> bool:
    if _SECRET_NAME.search(name):
        return True
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    likely = bool(words) and words[-1] in _LIKELY and words[-2:] != ["run", "key"]
    return likely and not _HARMLESS.fullmatch(value.strip("\"'"))


def _command(argv: Sequence[str]) -> str:
    """The command line as one could type it, redacted word by word: a secret may hold spaces and quotes."""
    import shlex

    words: list[str] = []
    option = ""  # the option that the next word may be the value of
    for word in argv:
        name, equals, value = word.partition("=")
        if option and not word.startswith("--") and _secret(option, word):
            words.append(REDACTED)
        elif equals and re.fullmatch(r"[\w.-]+", name) and _secret(name, value):
            words.append(f"{name}={REDACTED}")
        else:
            words.append(redact_text(word))
        option = word if word.startswith("-") and not equals else ""
    if words:
        words[0] = Path(words[0]).name
    command = shlex.join(words).replace(f"'{REDACTED}'", REDACTED)
    return command if len(command) <= LONGEST_COMMAND else command[: LONGEST_COMMAND - 1] + "…"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no name for this user ID, as in many containers
        return ""


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except (metadata.PackageNotFoundError, KeyError, OSError):
            continue
    return found


def _git(cwd: Path | None) -> dict[str, str]:
    try:
        folder = (cwd or Path()).resolve()
    except (OSError, ValueError, RuntimeError):
        return {}
    root = git_root(folder)
    if root is None:
        return {}
    found = {"git_path": folder.relative_to(root).as_posix()}
    # a plain status also asks the repository's file monitor, which may be any command
    status = _run_git(folder, "-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "-uno")
    if status is None:  # too slow in a huge tree: the commit alone needs no look at the files
        commit = _run_git(folder, "rev-parse", "--verify", "HEAD")
        return {**found, "git_commit": commit.strip()} if commit else found
    for line in status.splitlines():
        if line.startswith("# branch.oid ") and not line.endswith(")"):  # "(initial)": no commit yet
            found["git_commit"] = line.split()[-1]
        elif line.startswith("# branch.head ") and not line.endswith(")"):  # "(detached)"
            found["git_branch"] = line.split()[-1]
    dirty = any(line and not line.startswith("#") for line in status.splitlines())
    return {**found, "git_dirty": "true" if dirty else "false"}


def _run_git(folder: Path, *arguments: str, timeout: float | None = None) -> str | None:
    import subprocess

    try:
        answer = subprocess.run(
            ["git", *arguments],  # noqa: S607 - the user's own git, wherever it is
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout or GIT_TIMEOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # take no lock from a git the user runs beside
            check=False,
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return answer.stdout if answer.returncode == 0 else None
