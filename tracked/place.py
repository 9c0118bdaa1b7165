"""Where runs go: a tracking URI, and this machine's outbox for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tracked import sender, spool
from tracked.address import normalise_uri
from tracked.spool import Outbox

DEFAULT_URI = "sqlite:///mlruns/mlflow.db"


@dataclass(frozen=True)
class Place:
    """Where runs go: the server, and this machine's outbox for it."""

    tracking_uri: str
    spool: Path

    @classmethod
    def choose(cls, tracking_uri: str | None = None, spool_dir: str | Path | None = None) -> Place:
        """From options, else `MLFLOW_TRACKING_URI` and `TRACKED_SPOOL`, else under `mlruns/`.

        Raises:
            UsageError: The address cannot be one of an MLflow server.
        """
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        return cls(normalise_uri(uri), spool.root(spool_dir))

    def outbox(self) -> Outbox:
        return spool.open_outbox(self.spool, self.tracking_uri)

    def start_sender(self) -> Outbox:
        """Have a sender running; called before torch is imported, so that both imports overlap."""
        outbox = self.outbox()
        sender.ensure(outbox, self.tracking_uri)
        return outbox
