"""Starts processes from any thread, while another may fork DataLoader workers.

`subprocess.Popen` returns once the new process closes a pipe. A worker that is forked meanwhile
inherits that pipe, and keeps it open, and the thread waiting, for as long as it lives: an epoch,
or, if the training waits for that thread, for ever. So no fork happens while a process is started.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
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


def give_way() -> None:
    """Let every other process go first, as far as the system allows: called by a process started here."""
    os.nice(19)
    if os.getsid(0) == os.getpid():
        # Linux shares the processors among sessions, and `nice` counts only inside of one (sched(7), autogroup).
        for _ in range(5):
            try:
                Path("/proc/self/autogroup").write_text("19")
                return
            except BlockingIOError:  # one change in a tenth of a second, by anybody without privileges
                time.sleep(0.15)
            except OSError:
                return
