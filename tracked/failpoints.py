"""Named points at which a test may have the process killed.

`TRACKED_FAILPOINT="checkpoint.before-rename@2"` makes the process that reaches that point for the
second time end itself with SIGKILL, as a machine that goes away would. Unset, a point costs one
lookup in an empty dict. Points lie off the training thread or at step boundaries only.
"""

from __future__ import annotations

import os
import signal


def _armed() -> dict[str, int]:
    armed = {}
    for spec in filter(None, os.environ.get("TRACKED_FAILPOINT", "").split(",")):
        name, _, count = spec.partition("@")
        armed[name] = int(count or 1)
    return armed


_remaining = _armed()


def reach(name: str) -> None:
    """End this process with SIGKILL if the point `name` is armed and its count is used up."""
    if name in _remaining:
        _remaining[name] -= 1
        if _remaining[name] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
