"""Record into a run without ever waiting for the store: points queue up and a thread delivers."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nsa_platform.tracking import library
from nsa_platform.tracking.handle import RunHandle, flatten, recall
from nsa_platform.tracking.journal import (
    Entry,
    Journal,
    drop_blob,
    keep_blob,
    note_rejected,
    orphans,
    points,
)
from nsa_platform.tracking.store import METRICS_PER_CALL, Refused, RunLink, explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

GATHER_S = 1.0
"""Points gather this long before a delivery: a call costs tens of milliseconds, however small."""
LONGEST_PAUSE_S = 30.0
LAST_TRIES = 3
"""Failed deliveries in a row after which finish() gives up."""
_METRIC_NAME = re.compile(r"^[/\w.\- :]{1,250}$")

log = logging.getLogger(__name__)


class Tracker:
    """Attach to a run and record into it.

    Every method returns at once and none raises because the store is out of reach: what is
    recorded goes to memory and to a journal in the handle's queue folder, and a background thread
    delivers it, retrying for as long as the tracker lives. What earlier processes left undelivered
    in the same folder is delivered first. Only one tracker should log a given metric of a run.
    """

    def __init__(
        self, handle: RunHandle, *, creates_run: bool = True, creates_store: bool = False
    ) -> None:
        """Start delivering.

        Args:
            creates_run: may create the run if the driver could not; false for ranks other than 0.
            creates_store: may make a SQLite file that does not exist; only on the driver.
        """
        library.load()
        self.handle = handle
        self._queue_dir = Path(handle.queue_dir)
        self._journal = Journal.create(handle)
        self._link = RunLink(handle, creates_run=creates_run, creates_store=creates_store)
        self._pending: deque[Entry] = deque()
        self._adopted: dict[Journal, tuple[RunLink, deque[Entry]]] = {}
        self._guard = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._closed = False
        self._rejected = 0
        self._problem: str | None = None
        self._courier = threading.Thread(target=self._deliver_all, name="tracking", daemon=True)
        self._courier.start()

    @property
    def run_id(self) -> str | None:
        """The store's id of the run; None until the store has been reached."""
        return self._link.run_id or self.handle.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step; of each metric, steps must ascend, others are not recorded.

        Raises:
            ValueError: a name holds something else than letters, digits and / _ . - : and blanks.
        """
        for name in metrics:
            if not _METRIC_NAME.match(name):
                raise ValueError(
                    f"metric name {name!r}: MLflow takes letters, digits, / _ . - : and blanks"
                )
        values = {name: float(value) for name, value in metrics.items()}
        self._queue({"kind": "metrics", "step": int(step), "values": values})

    def set_status(self, status: Status) -> None:
        """Say how the run stands, while recording goes on."""
        self._queue({"kind": "status", "status": status})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested ones become dotted names."""
        self._queue({"kind": "params", "values": flatten(params)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._queue({"kind": "tags", "values": {k: str(v) for k, v in tags.items()}})

    def log_figure(self, figure: Figure, path: str) -> None:
        """Keep a matplotlib figure under the artifact path, drawn now, as its suffix says."""
        blob = self._blob(path)
        figure.savefig(blob, dpi=120)
        self._queue({"kind": "file", "path": path, "blob": str(blob)})

    def log_text(self, text: str, path: str) -> None:
        """Keep a text under the artifact path."""
        blob = self._blob(path)
        blob.write_text(text, encoding="utf-8")
        self._queue({"kind": "file", "path": path, "blob": str(blob)})

    def log_dict(self, tree: Mapping[str, Any], path: str) -> None:
        """Keep a mapping as indented JSON under the artifact path."""
        self.log_text(json.dumps(tree, indent=2) + "\n", path)

    def log_table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: str) -> None:
        """Keep a table under the artifact path (.json), in the form MLflow's pages show as one.

        Raises:
            ValueError: a row has another length than `columns`, or the path does not end in .json.
        """
        if not path.endswith(".json"):
            raise ValueError(f"table path {path!r} must end in .json")
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"{path}: a row of {len(row)} for {len(columns)} columns")
        blob = self._blob(path)
        tree = {"columns": list(columns), "data": [list(row) for row in rows]}
        blob.write_text(json.dumps(tree), encoding="utf-8")
        self._queue({"kind": "table", "path": path, "blob": str(blob)})

    def log_file(self, local: str | Path, folder: str = "") -> None:
        """Keep a copy of a file in the artifact folder, as it is now."""
        local = Path(local)
        path = f"{folder}/{local.name}" if folder else local.name
        blob = self._blob(path)
        shutil.copyfile(local, blob)
        self._queue({"kind": "file", "path": path, "blob": str(blob)})

    def log_dataset(
        self, manifest: Mapping[str, Any], name: str, context: str, *, source: str = ""
    ) -> None:
        """Record shards as an input of the run, by their manifest's digest.

        Args:
            manifest: must hold `digest`; its other plain values and `totals` are shown with it.
            context: what the data is for: training, validation, evaluation.
            source: where the shards are.
        """
        plain = {k: v for k, v in manifest.items() if isinstance(v, str | int | float)}
        entry = {"kind": "dataset", "name": name, "context": context, "source": source}
        profile = {**plain, **manifest.get("totals", {})}
        self._queue({**entry, "digest": str(manifest["digest"]), "profile": profile})

    def finish(self, status: Status | None, *, timeout_s: float = 60.0, report: bool = True) -> int:
        """Deliver what is left, end the run with `status` (None: leave it as it is), stop.

        Waits at most `timeout_s`, and only while the store answers. Returns how many points and
        files have not arrived; one line says where they are kept. They are delivered by the next
        tracker of the same queue folder. Calling it again does nothing. `report=False` leaves out
        the line.
        """
        if self._closing:
            return self._undelivered()
        if status is not None:
            self.set_status(status)
        self._closing = True
        self._wake.set()
        self._courier.join(timeout_s)
        left = self._undelivered()
        if left and report:
            log.warning(
                "%d points and files of run %r did not reach %s (%s); they are kept in %s and are "
                "delivered by the next run with the same name and storage",
                left,
                self.handle.name,
                self.handle.uri,
                self._problem or f"{timeout_s:.0f} s were not enough",
                self._queue_dir,
            )
        if not self._courier.is_alive():
            self._close(status, left)
        return left

    def _close(self, status: Status | None, left: int) -> None:
        with self._guard:
            self._closed = True
            self._journal.close(delete=not self._pending)
            for journal in self._adopted:
                journal.close(delete=False)
        if status == "FINISHED" and not left:
            self._remember(unfinished=False)

    def _undelivered(self) -> int:
        with self._guard:
            queues = [self._pending, *(pending for _, pending in self._adopted.values())]
            return sum(points(entry) for queue in queues for entry in queue) + self._rejected

    def _blob(self, path: str) -> Path:
        return keep_blob(self._queue_dir, Path(path).name)

    def _queue(self, entry: Entry) -> None:
        entry["time_ms"] = int(time.time() * 1000)
        with self._guard:
            if self._closed:
                log.warning("run %r is finished; not recorded: %s", self.handle.name, entry)
                return
            try:
                self._journal.append(entry)
            except OSError as error:  # A full disk must not stop training either.
                log.warning("%s: %s; points are kept in memory alone", self._journal.path, error)
            self._pending.append(entry)

    def _deliver_all(self) -> None:
        """The courier: every second, and at once when closing, deliver; pause longer on failure."""
        pause, failures, adopted = 0.0, 0, False
        while True:
            self._wake.wait(pause)
            closing = self._closing
            try:
                if not adopted or closing:
                    self._adopt()
                self._drain()
                self._serve_others()
            except Exception as error:
                # Whatever MLflow, its database or the network throws: the data is kept, try later.
                failures += 1
                pause = min(LONGEST_PAUSE_S, 2.0**failures / 2)
                self._note_failure(error, failures)
                if closing:
                    if failures >= LAST_TRIES:
                        return
                    time.sleep(pause / 2)
                continue
            if failures:
                log.warning("%s answers again; what was kept is delivered", self.handle.uri)
            pause, failures, adopted, self._problem = GATHER_S, 0, True, None
            if closing and not self._pending:
                return

    def _note_failure(self, error: Exception, failures: int) -> None:
        self._link.detach()
        self._problem = explain(error)
        if failures == 1:
            log.warning(
                "%s does not take points now (%s); they are kept in %s and delivered when it does",
                self.handle.uri,
                self._problem,
                self._queue_dir,
            )

    def _adopt(self) -> None:
        """Take over what processes that are gone have left in the queue folder.

        Points of this run go before its new ones; what belongs to another run is delivered later,
        if its store answers.
        """
        for journal in orphans(self._queue_dir):
            same = journal.handle.key == self.handle.key
            link = self._link if same else RunLink(journal.handle, creates_run=True)
            with self._guard:
                self._adopted[journal] = (link, deque(journal.entries()))
        for journal, (link, pending) in list(self._adopted.items()):
            if link is self._link:
                self._deliver(link, pending)
                self._release(journal, delete=True)

    def _serve_others(self) -> None:
        """Deliver what other runs have left; theirs stays where it is if their store is away."""
        for journal, (link, pending) in list(self._adopted.items()):
            if link is not self._link:
                try:
                    self._deliver(link, pending)
                except Exception as error:  # Their trouble is not this run's.
                    log.warning("%s: not delivered (%s)", journal.path, explain(error))
                self._release(journal, delete=not pending)

    def _release(self, journal: Journal, *, delete: bool) -> None:
        journal.close(delete=delete)
        with self._guard:
            del self._adopted[journal]

    def _drain(self) -> None:
        first = self._link.run_id is None
        self._link.attach()
        if first:
            self._remember(unfinished=True)
        self._deliver(self._link, self._pending)
        with self._guard:
            if not self._pending:
                self._journal.clear()

    def _remember(self, *, unfinished: bool) -> None:
        known = recall(self._queue_dir)
        if known is not None and known.handle.key == self.handle.key:
            handle = dataclasses.replace(known.handle, run_id=self._link.run_id)
            dataclasses.replace(known, handle=handle, unfinished=unfinished).write()

    def _deliver(self, link: RunLink, pending: deque[Entry]) -> None:
        while True:
            with self._guard:
                entries = _next(pending)
            if not entries:
                return
            try:
                link.deliver(entries)
            except Refused as refusal:
                self._reject(entries, str(refusal))
            with self._guard:
                for entry in entries:
                    pending.popleft()
                    drop_blob(entry)

    def _reject(self, entries: Sequence[Entry], reason: str) -> None:
        log.warning("%s refuses %s: %s", self.handle.uri, entries[0]["kind"], reason)
        for entry in entries:
            note_rejected(self._queue_dir, entry, reason)
            self._rejected += points(entry)


def _next(pending: deque[Entry]) -> list[Entry]:
    """The oldest entries that go into one delivery: metrics up to a call's worth, others alone."""
    if not pending or pending[0]["kind"] != "metrics":
        return [pending[0]] if pending else []
    taken: list[Entry] = []
    room = METRICS_PER_CALL
    for entry in pending:
        room -= points(entry)
        if entry["kind"] != "metrics" or (taken and room < 0):
            break
        taken.append(entry)
    return taken
