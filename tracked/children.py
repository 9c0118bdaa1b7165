"""Starts processes from any thread, while another may fork DataLoader workers.

`subprocess.Popen` returns once the new process closes a pipe. A worker that is forked meanwhile
inherits that pipe, and keeps it open, and the thread waiting, for as long as it lives: an epoch,
or, if the training waits for that thread, for ever. So no fork happens while a process is started.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

_starting = threading.Lock()
os.register_at_fork(
    before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release
)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen`, with the same options; none of them may be `preexec_fn`, which forks itself.

    Raises:
        OSError: The process cannot be started.
    """
    with _starting:
        return subprocess.Popen(command, **options)
