"""Where runs are kept: tracking URIs as a user writes them, made exact, and made fit to be shown.

Nothing here imports MLflow, because the trainer asks too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from tracked.errors import UsageError

PLUGIN = "tracked+"
"""Before a tracking URI: whatever MLflow code writes there goes through the journal."""

_SQLITE = "sqlite:///"
_ACCEPTED = "http://HOST:PORT, https://HOST, or sqlite:///PATH/mlflow.db"
# Greedy up to the last @: a password that holds an unescaped / or @ must not show either.
_USERINFO = re.compile(r"(?<=://)\S*@")


def normalise_uri(uri: str, base: Path | None = None) -> str:
    """The one spelling of a tracking URI: two spellings of a place would get two senders.

    Args:
        uri: ``http://…``, ``https://…`` or ``sqlite:///…``, with or without ``tracked+`` before it. A relative
            SQLite path is taken from `base`.
        base: An absolute folder; the current one by default.

    Returns:
        The URI without a trailing slash or fragment, user and password kept, an SQLite path made absolute.

    Raises:
        UsageError: for any other scheme, for an address without a host, for an SQLite database in memory.
    """
    text = uri.strip().removeprefix(PLUGIN)
    scheme = text.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return _web(text, scheme)
    if text.startswith(_SQLITE):
        path = text.removeprefix(_SQLITE).rstrip("/")
        if not path or path == ":memory:" or "?" in path:
            raise UsageError(
                f"the tracking URI {text!r} names no file",
                expected="sqlite:///PATH/mlflow.db, a file that several processes can open, without options",
                try_next="--tracking-uri sqlite:///mlruns/mlflow.db",
            )
        root = Path.cwd() if base is None else base
        # Not Path.resolve(): a link that is turned later must not change which queue is this place's.
        return f"{_SQLITE}{os.path.abspath(root / Path(path).expanduser())}"  # noqa: PTH100
    raise _unusable(text)


def database(uri: str) -> Path | None:
    """The file of a normalised SQLite tracking URI; None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def redact(uri: str) -> str:
    """`uri`, or any text with addresses in it, without the ``user:password@`` part."""
    return _USERINFO.sub("", uri)


def _web(text: str, scheme: str) -> str:
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port  # the port is parsed only when asked for
    except ValueError:
        raise _unusable(text) from None
    if not host or parts.query:
        raise _unusable(text)
    # What is copied from a browser ends in /#/experiments/1.
    return parts._replace(scheme=scheme, fragment="").geturl().rstrip("/")


def _unusable(text: str) -> UsageError:
    return UsageError(
        f"the tracking URI {redact(text)!r} cannot be used",
        expected=_ACCEPTED,
        try_next="--tracking-uri sqlite:///mlruns/mlflow.db, or the address of your MLflow server",
    )
