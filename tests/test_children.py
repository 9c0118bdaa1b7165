"""A process is started beside forks of this one, and none of them keeps it waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tracked import children


@pytest.fixture
def forked() -> Iterator[list[int]]:
    """The IDs of forked processes that live on, as DataLoader workers do, and are ended here."""
    found: list[int] = []
    yield found
    for pid in found:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def fork_one_that_stays() -> int:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid


def test_no_fork_holds_up_a_process_that_is_being_started(forked: list[int]) -> None:
    codes: list[int] = []

    def start_several() -> None:
        for _ in range(30):
            process = children.start([sys.executable, "-S", "-c", ""])
            codes.append(process.wait())

    thread = threading.Thread(target=start_several, daemon=True)
    thread.start()
    while thread.is_alive() and len(forked) < 60:
        forked.append(fork_one_that_stays())
        thread.join(0.005)
    # The forked ones still live: started in the midst of a fork, a process would wait for their end.
    thread.join(60)
    assert codes == [0] * 30


def test_a_process_that_gives_way_does_so_to_other_sessions_too() -> None:
    asks = "import os; from tracked import children; children.give_way(); print(os.nice(0)); "
    asks += "print(open('/proc/self/autogroup').read() if os.path.exists('/proc/self/autogroup') else '')"
    process = children.start([sys.executable, "-c", asks], stdout=subprocess.PIPE, start_new_session=True)
    nice, _, group = process.communicate()[0].decode().partition("\n")
    assert int(nice) == children.NICENESS
    if grouped := group.split():  # a Linux that groups by session; in a group of nice 0, its own is nothing
        assert grouped[-2:] == ["nice", str(children.NICENESS)]


def test_who_gives_way_leaves_the_session_of_others_alone() -> None:
    asks = "from tracked import children; children.give_way()"
    group = Path("/proc/self/autogroup")
    before = group.read_text() if group.exists() else ""
    assert children.start([sys.executable, "-c", asks]).wait() == 0
    assert (group.read_text() if group.exists() else "") == before
