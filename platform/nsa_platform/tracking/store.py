"""The door to MLflow's tracking store: find or create a run, and put entries into it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_platform.tracking import library
from nsa_platform.tracking.handle import SQLITE, RunHandle, parent_handle
from nsa_platform.tracking.journal import Entry

if TYPE_CHECKING:
    from nsa_platform.tracking.library import Metric, MlflowClient, Run

KEY_TAG = "nsa.run_key"
PARENT_TAG = "mlflow.parentRunId"
TABLES_TAG = "mlflow.loggedArtifacts"
RACE_SETTLES_S = 0.5
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
DIGEST_LENGTH = 36
"""MLflow keeps no longer digest of a dataset; the whole one goes into its profile."""

_REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}

log = logging.getLogger(__name__)


class TrackingError(OSError):
    """The tracking store does not answer, or does not have what was asked for."""


class Refused(Exception):
    """The store will never take this entry; trying again is useless."""


def connect(uri: str, *, creates: bool = False) -> MlflowClient:
    """A client of the store at the absolute `uri`.

    Raises:
        TrackingError: the SQLite file does not exist on this machine and `creates` is false.
    """
    if uri.startswith(SQLITE):
        path = Path(uri.removeprefix(SQLITE))
        if not creates and not path.exists():
            raise TrackingError(
                f"{path} is not on this machine; workers on several machines need tracking.uri to "
                "be a server or a shared file"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    # The reason for a failure is reported once by us; urllib3 would report every attempt.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return library.MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_run(client: MlflowClient, handle: RunHandle) -> Run | None:
    """The handle's run: by id, else by key (the oldest, if two processes raced to create it)."""
    if handle.run_id is not None:
        try:
            run = client.get_run(handle.run_id)
        except library.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active":
                return run
    experiment = client.get_experiment_by_name(handle.experiment)
    if experiment is None:
        return None
    found = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.`{KEY_TAG}` = '{handle.key}'",
        run_view_type=library.ViewType.ACTIVE_ONLY,
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        max_results=2,
    )
    return client.get_run(found[0].info.run_id) if found else None


def create_run(client: MlflowClient, handle: RunHandle) -> Run:
    """Create the handle's run and, before it, its experiment and the run below which it stands.

    Several processes may do this at once when a store comes back. In a SQLite file they take turns.
    At a server, which may serve many machines, the oldest run with the key wins and the others take
    theirs back.
    """
    if handle.run_id is not None:
        log.warning("%s does not know run %s; it goes on as a new run", handle.uri, handle.run_id)
    parent = parent_handle(handle)
    tags = {KEY_TAG: handle.key}
    if parent is not None:
        above = find_run(client, parent) or create_run(client, parent)
        tags[PARENT_TAG] = above.info.run_id
    if handle.uri.startswith(SQLITE):
        with _turn_in(Path(handle.uri.removeprefix(SQLITE)).parent):
            return find_run(client, handle) or _new_run(client, handle, tags)
    run = _new_run(client, handle, tags)
    # Whoever asked for the time before this process may still be writing its run.
    time.sleep(RACE_SETTLES_S)
    winner = find_run(client, handle)
    if winner is None or winner.info.run_id == run.info.run_id:
        return client.get_run(run.info.run_id)
    client.delete_run(run.info.run_id)
    return winner


def _new_run(client: MlflowClient, handle: RunHandle, tags: dict[str, str]) -> Run:
    return client.create_run(
        _experiment_id(client, handle),
        start_time=int(time.time() * 1000),
        tags=tags,
        run_name=handle.name,
    )


@contextmanager
def _turn_in(folder: Path) -> Iterator[None]:
    """One process or thread at a time; the lock ends with its holder, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _experiment_id(client: MlflowClient, handle: RunHandle) -> str:
    experiment = client.get_experiment_by_name(handle.experiment)
    if experiment is None:
        try:
            return client.create_experiment(handle.experiment, artifact_location=handle.artifacts)
        except library.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(handle.experiment)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {handle.experiment!r} of {handle.uri} is deleted; restore it or set "
            "tracking.experiment to another name"
        )
    return experiment.experiment_id


class RunLink:
    """One run in reach: looked up when first needed and again after every failure.

    The last step of each metric is read from the store and points up to it are not sent, so that a
    delivery may be repeated after a crash or a lost answer, and a resumed run that goes over old
    steps again neither doubles nor disorders its curves.
    """

    def __init__(
        self, handle: RunHandle, *, creates_run: bool, creates_store: bool = False
    ) -> None:
        self.handle = handle
        self.run_id: str | None = None
        self._creates_run = creates_run
        self._creates_store = creates_store
        self._client: MlflowClient | None = None
        self._last_steps: dict[str, int] = {}
        self._params: dict[str, str] = {}
        self._ended_ms: int | None = None
        self._parent_id: str | None = None

    def attach(self) -> str:
        """Return the run's id, found or created. Raises what MLflow raises out of reach."""
        if self._client is not None and self.run_id is not None:
            return self.run_id
        client = connect(self.handle.uri, creates=self._creates_store)
        run = find_run(client, self.handle)
        if run is None and self._creates_run:
            run = create_run(client, self.handle)
        if run is None:
            raise TrackingError(f"{self.handle.uri}: run {self.handle.name!r} is not created yet")
        self._last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._params = dict(run.data.params)
        self._ended_ms = run.info.end_time
        if self.handle.parent is not None:
            self._parent_id = run.data.tags.get(PARENT_TAG)
        self._client, self.run_id = client, run.info.run_id
        return run.info.run_id

    def detach(self) -> None:
        """Forget what is known of the store: a failed call may have arrived."""
        self._client = None

    def deliver(self, entries: Sequence[Entry]) -> None:
        """Put entries of one kind into the run; several only of kind metrics.

        Raises:
            Refused: the store will never take them.
            Exception: whatever MLflow raises when it cannot be reached; try again later.
        """
        run_id = self.attach()
        client = self._client
        assert client is not None
        try:
            _DELIVERIES[entries[0]["kind"]](self, client, run_id, entries)
        except library.MlflowException as error:
            if error.error_code in _REFUSED:
                raise Refused(explain(error)) from error
            raise

    def _metrics(self, client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
        last = dict(self._last_steps)
        fresh: list[Metric] = []
        for entry in entries:
            step = entry["step"]
            for name, value in entry["values"].items():
                if step > last.get(name, -1):
                    fresh.append(library.Metric(name, value, entry["time_ms"], step))
                    last[name] = step
        for start in range(0, len(fresh), METRICS_PER_CALL):
            client.log_batch(run_id, metrics=fresh[start : start + METRICS_PER_CALL])
        self._last_steps = last

    def _write_params(self, client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
        """MLflow's parameters never change: of a continued run, changed ones become one tag."""
        values: dict[str, str] = entries[0]["values"]
        fresh = [library.Param(k, v) for k, v in values.items() if k not in self._params]
        for start in range(0, len(fresh), PARAMS_PER_CALL):
            client.log_batch(run_id, params=fresh[start : start + PARAMS_PER_CALL])
        changed = [
            f"{k}: {self._params[k]} -> {v}"
            for k, v in values.items()
            if self._params.get(k, v) != v
        ]
        if changed:
            client.set_tag(run_id, "nsa.changed_params", "\n".join(changed)[:8000])
        self._params = {**values, **self._params}

    def _tags(self, client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
        tags = [library.RunTag(k, v[:8000]) for k, v in entries[0]["values"].items()]
        client.log_batch(run_id, tags=tags)

    def _file(self, client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
        blob = Path(entries[0]["blob"])
        if not blob.exists():
            return  # It is dropped only after it has arrived.
        folder, _, _ = entries[0]["path"].rpartition("/")
        client.log_artifact(run_id, str(blob), folder or None)

    def _table(self, client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
        """A table is a JSON file that a tag announces to MLflow's pages."""
        self._file(client, run_id, entries)
        known = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
        table = {"path": entries[0]["path"], "type": "table"}
        if table not in known:
            client.set_tag(run_id, TABLES_TAG, json.dumps([*known, table]))

    def _dataset(self, client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
        entry = entries[0]
        dataset = library.Dataset(
            name=entry["name"],
            digest=entry["digest"][:DIGEST_LENGTH],
            source_type="arrow_shards",
            source=json.dumps({"uri": entry["source"]}),
            schema=None,
            profile=json.dumps(entry["profile"]),
        )
        tag = library.InputTag("mlflow.data.context", entry["context"])
        client.log_inputs(run_id, datasets=[library.DatasetInput(dataset, tags=[tag])])

    def _status(self, client: MlflowClient, run_id: str, entries: Sequence[Entry]) -> None:
        """The run above has no life of its own: it stands as the run below it that moved last."""
        status, time_ms = entries[0]["status"], entries[0]["time_ms"]
        for moved in (run_id, self._parent_id):
            if moved is None:
                continue
            if status != "RUNNING":
                client.set_terminated(moved, status=status, end_time=time_ms)
            elif self._ended_ms is None or self._ended_ms < time_ms:
                client.update_run(moved, status="RUNNING")


_DELIVERIES = {
    "metrics": RunLink._metrics,
    "params": RunLink._write_params,
    "tags": RunLink._tags,
    "file": RunLink._file,
    "table": RunLink._table,
    "dataset": RunLink._dataset,
    "status": RunLink._status,
}


def explain(error: BaseException) -> str:
    """Why the store could not be reached: the system's own reason, else the error's first line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
