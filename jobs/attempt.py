"""One attempt at a training run: its MLflow run, what its workers are told, and how it ends."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from jobs.model_tags import model_tags
from jobs.run_report import REPORT, training_report
from jobs.training_inputs import (
    Inputs,
    Origin,
    cache_folder,
    keep_start,
    private_folder,
    run_folder,
    write_finished,
)
from nsa_platform import storage
from nsa_platform.config.runs import PretrainRun, SftRun
from nsa_platform.tracking import RunHandle, Tracker, TrackingError, open_run, register_model
from nsa_platform.train.task import Events, Outcome, Task


class AttemptError(RuntimeError):
    """The run has not come to a finished model that is where it should be; the message says why."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A run that is being trained, by whoever holds its lock."""

    run: PretrainRun | SftRun
    origin: Origin
    inputs: Inputs
    handle: RunHandle

    @classmethod
    def begin(cls, job: str, run: PretrainRun | SftRun, origin: Origin, inputs: Inputs) -> Self:
        """Write down what is going to be trained and open its MLflow run: a new one, or the one
        that the checkpoint or an earlier attempt belongs to.

        Raises:
            OSError: the run's folder cannot be written.
        """
        origin = keep_start(run, origin)
        storage.write_text(storage.join(run_folder(run), "run.yaml"), run.to_yaml())
        known = inputs.facts["tracking"] if inputs.facts else {}
        same_store = known.get("uri") == run.tracking.uri
        queue_dir = private_folder(run) / "tracking-queue"
        queue_dir.mkdir(parents=True, exist_ok=True)
        handle = open_run(
            run.tracking,
            job=job,
            name=run.name,
            params=run.model_dump(mode="json") | {"model": origin.model.model_dump(mode="json")},
            tags=model_tags(origin.model, run.in_stages()[-1].data.context_length),
            yaml_text=run.to_yaml(),
            queue_dir=queue_dir,
            run_id=known.get("run_id") if same_store else None,
        )
        return cls(run, origin, inputs, handle)

    def task(self, events: Events | None) -> Task:
        """What a worker is told."""
        run, inputs = self.run, self.inputs
        tracking = {"uri": run.tracking.uri, "run_id": self.handle.run_id}
        return Task(
            model=self.origin.model,
            stages=run.in_stages(),
            cpus=run.cluster.cpus_per_worker,
            folder=run_folder(run),
            start_from=self.origin.start_from,
            cache_dir=str(cache_folder(run)),
            has_validation=inputs.has_validation,
            described=inputs.described,
            handle=self.handle.to_dict(),
            identity={"name": run.name, "tracking": tracking},
            events=events,
        )

    def end(self, status: Literal["FAILED", "KILLED"]) -> None:
        """The MLflow run of an attempt that has come to nothing ends."""
        Tracker(self.handle).finish(status)

    def conclude(self, outcome: Outcome, *, seconds: float) -> dict[str, Any]:
        """Register the model, end the MLflow run with a report, and close the run's folder.

        Args:
            seconds: that the workers had.

        Returns:
            What the run has come to, as it is kept in finished.json.

        Raises:
            AttemptError: the run has no finished model, or it is not where it should be.
        """
        tracker, status = Tracker(self.handle), "FAILED"
        try:
            result = self._result(outcome) | {"seconds": seconds}
            report = training_report(self.run, self.origin, self.inputs, result, seconds=seconds)
            tracker.log_text(report, REPORT)
            status = "FINISHED"
        finally:
            tracker.finish(status)
        result["run_id"] = tracker.run_id
        close_folder(self.run, result, report)
        return result

    def _result(self, outcome: Outcome) -> dict[str, Any]:
        run = self.run
        if outcome.problem is not None:
            raise AttemptError(f"{run.name} stopped after step {outcome.step}: {outcome.problem}")
        if outcome.step in outcome.failed_checkpoints:
            raise AttemptError(
                f"{run.name} is trained and its model is in {run_folder(run)}/model, but its last "
                "checkpoint could not be written; the same command trains again from the one before"
            )
        model = storage.join(run_folder(run), "model")
        registered = None
        if run.tracking.registered_model is not None:
            name, alias = run.tracking.registered_model, run.tracking.alias
            try:
                local = storage.fetch(model, cache_folder(run))
                version = register_model(self.handle, local, name, alias)
            except (TrackingError, OSError) as error:
                raise AttemptError(
                    f"{run.name} is trained and its model is in {model}, but: {error}"
                ) from error
            registered = f"models:/{name}@{alias} (version {version})"
        return {
            **asdict(outcome),
            "model": model,
            "registered": registered,
            "handle": self.handle.to_dict(),
        }


def close_folder(run: PretrainRun | SftRun, result: dict[str, Any], report: str = "") -> None:
    """Leave the result for whoever starts the run again and the report for people, and tidy up.

    Raises:
        AttemptError: the folder cannot be written.
    """
    try:
        if report:
            storage.write_text(storage.join(run_folder(run), REPORT), report)
        write_finished(run, result)
        # Ray's own notes of the attempts; nothing reads them again.
        storage.delete_tree(storage.join(run_folder(run), "ray"))
    except OSError as error:
        raise AttemptError(
            f"{run.name} is trained and its model is in {result['model']}, but: {error}"
        ) from error
