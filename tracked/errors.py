"""Every error this package raises on purpose.

    TrackedError                  exit status 1
    ├── UsageError                exit status 2: what was typed or passed cannot work
    │   ├── ParamError            a hyperparameter that does not exist or cannot be read
    │   ├── ExperimentError       an experiment file that cannot be found, imported or used
    │   ├── RunTaken              another process holds the run
    │   └── StudyTaken            another process holds the study's file
    ├── RunNotFound               no run goes by that ID, prefix or handle
    ├── RunNotResumable           the run has no checkpoint, or was not made by this package
    ├── CheckpointError           a checkpoint that is missing, damaged, or cannot be written
    │   └── StateMismatch         a sound checkpoint whose state does not fit what was built
    ├── MetricError               a value or a name that cannot be logged
    │   └── LossNotFinite         the training loss became NaN or infinite
    ├── SpoolError                the spool cannot be read or written
    ├── StorageError              a study's storage that cannot be reached, read or written
    └── ServerError               an MLflow server that did not do what was asked
        ├── ServerUnavailable     no usable answer: the same request may work later
        │   └── NotDelivered          what was written before a read has not reached the server in time
        ├── ServerRefused         the address or the credentials are wrong (401, 403, 404, HTML)
        ├── NoSuchRun             the server answered that it does not have this run
        └── RecordRejected        the server found this very record invalid: final

An error's text names what was found, what was expected, and the next command to type.
"""

from __future__ import annotations


class TrackedError(Exception):
    """Base of all errors of this package.

    Args:
        found: What is wrong, in one line.
        expected: What would have been right.
        try_next: A command or change that gets the user on.
    """

    exit_status = 1

    def __init__(self, found: str, *, expected: str = "", try_next: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.try_next = try_next

    def __str__(self) -> str:
        lines = [self.found]
        if self.expected:
            lines.append(f"expected: {self.expected}")
        if self.try_next:
            lines.append(f"try: {self.try_next}")
        return "\n  ".join(lines)


class UsageError(TrackedError):
    """What was typed or passed cannot work."""

    exit_status = 2


class ParamError(UsageError):
    """A hyperparameter that does not exist, or a value that cannot be read."""


class ExperimentError(UsageError):
    """An experiment file that cannot be found, imported or used."""


class RunTaken(UsageError):
    """Another process holds the run, or has taken it over."""


class StudyTaken(UsageError):
    """Another process holds the file that the study is kept in."""


class RunNotFound(UsageError):
    """No run goes by that ID, prefix or handle."""


class RunNotResumable(TrackedError):
    """The run has no checkpoint, or was not made by this package."""


class CheckpointError(TrackedError):
    """A checkpoint that is missing or damaged, or that cannot be written."""


class StateMismatch(CheckpointError):
    """A sound checkpoint whose state does not fit what was built."""


class MetricError(TrackedError):
    """A value or a name that cannot be logged."""


class LossNotFinite(MetricError):
    """The training loss became NaN or infinite."""


class SpoolError(TrackedError):
    """The spool cannot be read or written."""


class StorageError(TrackedError):
    """A study's storage that cannot be reached, read or written."""


class ServerError(TrackedError):
    """An MLflow server that did not do what was asked."""


class ServerUnavailable(ServerError):
    """No usable answer: the same request may work later."""


class NotDelivered(ServerUnavailable):
    """What was written before a read has not reached the server in time; it is kept, and on its way."""


class ServerRefused(ServerError):
    """The address or the credentials are wrong: 401, 403, 404, or a page of HTML."""


class RunDeleted(ServerRefused):
    """The run lies in the server's bin, from where it can be restored."""


class NoSuchRun(ServerError):
    """The server answered that it does not have this run."""


class RecordRejected(ServerError):
    """The server found this very record invalid; sending it again cannot help."""
