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

# A tenth of a training's share where both want one core. At 19, a sixtieth, a machine busy with
# anything else would delay the run's ID and its last points by minutes.
NICENESS = 10

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


def environment() -> dict[str, str]:
    """This process's, in which another finds this package too, wherever it was imported from."""
    package = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths}


def give_way() -> None:
    """Let trainings go first, as far as the system allows: called by a process started here."""
    level = max(NICENESS, os.nice(0))  # only the privileged may go back up
    try:
        for thread in Path("/proc/self/task").iterdir():  # Linux: each thread has a niceness of its own
            os.setpriority(os.PRIO_PROCESS, int(thread.name), level)
    except OSError:
        os.setpriority(os.PRIO_PROCESS, 0, level)
    if os.getsid(0) == os.getpid():
        # Linux shares the processors among sessions, and `nice` counts only inside of one (sched(7), autogroup).
        for _ in range(5):
            try:
                Path("/proc/self/autogroup").write_text(str(level))
                return
            except BlockingIOError:  # one change in a tenth of a second, by anybody without privileges
                time.sleep(0.15)
            except OSError:
                return
