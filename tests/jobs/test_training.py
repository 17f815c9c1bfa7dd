"""Pretraining and fine-tuning on real Ray, with workers and drivers killed on the way."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.exceptions import RayActorError
from ray.train import RunConfig, ScalingConfig, UserCallback
from safetensors.torch import load_file

from jobs import pretrain, sft, sweep
from jobs.cluster import connect
from jobs.controlled import ControlledTrainer
from nsa_platform import storage
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.weights import load_model
from nsa_platform.tracking.library import MlflowClient
from nsa_platform.train.adapters import ADAPTER_FILE
from nsa_platform.train.samples import TABLE
from nsa_platform.train.snapshots import damage, snapshots
from tests.conftest import S3Server
from tests.mlflow_server import Server
from tests.waiting import PATIENCE_S, eventually

# Ray warns of its own deprecated settings when a trainer is built.
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.timeout(6 * PATIENCE_S),
]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
STAGES = [
    {
        "steps": STEPS // 2,
        "context_length": 256,
        "yarn": {"factor": 2, "original_context": 128},
        "mesh": {"context_parallel_degree": 2},
    }
]

MODEL = {
    "name": "tiny",
    "vocab_size": 512,
    "layers": 2,
    "width": 32,
    "ffn_width": 64,
    "max_context": 128,
    "attention": {
        "kind": "nsa",
        "query_heads": 4,
        "kv_heads": 2,
        "key_width": 16,
        "value_width": 16,
        "compression_block_size": 8,
        "compression_stride": 4,
        "selection_block_size": 8,
        "num_selected_blocks": 4,
        "num_initial_blocks": 1,
        "num_local_blocks": 2,
        "window_size": 16,
    },
}


@dataclass(frozen=True)
class Place:
    """Where the runs of this file live."""

    folder: Path
    tracking: str

    def config(self, name: str, **changes: Any) -> Path:
        """A YAML file of a run of two workers."""
        run = {
            "name": name,
            "data": {"context_length": 128},
            "train": {
                "steps": STEPS,
                "tokens_per_step": 512,
                "sequences_per_microbatch": 1,
                "validate_every_steps": 12,
                "validation_tokens": 640,
                "optimizer": {"learning_rate": 3e-3, "warmup_steps": 4},
                "checkpoint": {"every_steps": 4},
            },
            "cluster": {"num_workers": 2},
            "tracking": {"uri": self.tracking, "experiment": "tests"},
            "storage": str(self.folder / "runs"),
        }
        for section, values in changes.items():
            run[section] = {**run[section], **values} if section in run else values
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    def client(self) -> MlflowClient:
        return MlflowClient(self.tracking)

    def run_id(self, name: str) -> str:
        """The one MLflow run of this name."""
        client = self.client()
        experiment = client.get_experiment_by_name("tests")
        assert experiment is not None
        found = client.search_runs(
            [experiment.experiment_id], filter_string=f"attributes.run_name = '{name}'"
        )
        assert len(found) == 1
        return found[0].info.run_id

    def losses(self, name: str) -> list[tuple[int, float]]:
        """(step, train/loss) in the order in which the points were recorded."""
        return self._curve(name, "train/loss")

    def validations(self, name: str) -> list[tuple[int, float]]:
        """The same of valid/loss."""
        return self._curve(name, "valid/loss")

    def _curve(self, name: str, metric: str) -> list[tuple[int, float]]:
        history = self.client().get_metric_history(self.run_id(name), metric)
        return [(point.step, point.value) for point in history]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("training")
    return Place(folder, f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="module")
def cluster(s3_server) -> Iterator[None]:
    """A local cluster whose processes know the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        # No node is drained here: a process less for each run.
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        # Two train, one validates.
        with connect(num_cpus=3):
            yield


@pytest.fixture(scope="module")
def straight(place: Place, cluster: None, tiny_shards) -> list[tuple[int, float]]:
    """Losses of an uninterrupted run in two stages, registered as tiny@champion."""
    config = _staged(place, "straight", tiny_shards.path, registered_model="tiny")
    pretrain.main(["--config", str(config)])
    return place.losses("straight")


def _staged(
    place: Place, name: str, data: Path, *, validation: str = "inline", **tracking: Any
) -> Path:
    """A run of STEPS steps: the second half has longer rows, which the workers share."""
    needle = {"lengths": [256], "depths": [0.0, 1.0]}
    changes = {
        "train": {"steps": STEPS // 2, "needle": needle, "validation": validation},
        "stages": STAGES,
        "tracking": tracking,
    }
    return place.config(name, model=MODEL, data={"path": str(data)}, **changes)


def _workers_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_a_run_learns_and_leaves_what_it_should(place: Place, straight, capsys) -> None:
    assert [step for step, _ in straight] == list(range(1, STEPS + 1))
    assert straight[-1][1] < straight[0][1] - 0.5
    folder = place.folder / "runs" / "straight"
    assert [each.step for each in snapshots(str(folder / "checkpoints"))] == [24, 20]
    config = load_model(folder / "model").config
    assert (config.name, config.max_context) == ("tiny", 256)
    assert config.yarn is not None and config.yarn.factor == 2
    client, run_id = place.client(), place.run_id("straight")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert {"valid/loss", "valid/bits_per_byte", "train/grad_norm", "train/tokens_per_s"} <= set(
        run.data.metrics
    )
    assert "nsa/gate_mean/slc/1" in run.data.metrics
    # Only rows of the second stage hold these needles.
    needles = client.get_metric_history(run_id, "valid/needle_exact_at/256")
    assert [point.step for point in needles] == [24]
    assert run.inputs is not None
    assert {dataset.dataset.name for dataset in run.inputs.dataset_inputs} == {
        "train",
        "validation",
    }
    figures = {item.path for item in client.list_artifacts(run_id, "figures")}
    assert {f"figures/{name}.png" for name in ("loss", "gate_means", "needle")} <= figures
    assert client.get_model_version_by_alias("tiny", "champion").run_id == run_id


def test_a_finished_run_is_not_trained_again(place: Place, straight, capsys) -> None:
    pretrain.main(["--config", str(place.folder / "straight.yaml")])
    output = capsys.readouterr().out
    assert "straight is finished already" in output
    assert "starting workers" not in output
    assert place.losses("straight") == straight


def test_a_killed_worker_on_object_storage(
    place: Place, straight, tiny_shards, s3_server, capsys
) -> None:
    bucket = s3_server.bucket("runs")
    config = _staged(place, "killed", tiny_shards.path)
    ended: list[int] = []

    def newest() -> int:
        found = snapshots(f"{bucket}/killed/checkpoints")
        return found[0].step if found else 0

    def kill_one_and_tell_another_to_end() -> None:
        eventually(newest, "checkpoint")
        worker = _workers_of(os.getpid())[-1]
        worker.kill()
        ended.append(worker.pid)
        before = newest()
        eventually(lambda: newest() > before, "checkpoint of the second attempt")
        worker = _workers_of(os.getpid())[-1]
        worker.terminate()
        ended.append(worker.pid)

    killer = threading.Thread(target=kill_one_and_tell_another_to_end)
    killer.start()
    pretrain.main(["--config", str(config), "--set", f"storage={bucket}"])
    killer.join()
    assert len(set(ended)) == 2
    output = capsys.readouterr().out
    assert re.search(r"worker \d failed: .*died", output)
    # Told to end, the workers lose no step: they go on from the one at which they left.
    told = re.search(r"saved step (\d+): worker \d: it was told to end", output)
    assert told and f"goes on from the checkpoint of step {told[1]}\n" in output
    assert place.losses("killed") == straight
    assert place.client().get_run(place.run_id("killed")).info.status == "FINISHED"
    assert "config.json" in storage.list_names(f"{bucket}/killed/model")


def test_killed_servers(place: Place, straight, tiny_shards, s3_server, capsys) -> None:
    """Neither the store of the checkpoints nor that of the curves outlives the run's middle."""
    bucket = s3_server.bucket("outage")
    folder = place.folder / "mlflow-server"
    folder.mkdir()
    mlflow = Server(folder, Path(place.tracking.removeprefix("sqlite:///")))
    mlflow.start()
    served = replace(place, tracking=mlflow.config.uri)
    command = ["--config", str(_staged(served, "outage", tiny_shards.path))]
    command += ["--set", f"storage={bucket}"]

    def kill_both_in_the_middle() -> None:
        eventually(lambda: snapshots(f"{bucket}/outage/checkpoints"), "checkpoint")
        _kill_until_missed(s3_server, mlflow)

    killer = threading.Thread(target=kill_both_in_the_middle)
    killer.start()
    try:
        pretrain.main(command)
        killer.join()
        # What the run could not deliver at its end, the same command does.
        pretrain.main(command)
        assert "outage is finished already" in capsys.readouterr().out
        assert served.losses("outage") == straight
        assert served.client().get_run(served.run_id("outage")).info.status == "FINISHED"
    finally:
        killer.join()
        mlflow.kill()
    last, *_ = snapshots(f"{bucket}/outage/checkpoints")
    assert last.step == STEPS and damage(last) is None
    storage.download_tree(f"{bucket}/outage/model", place.folder / "outage")
    models = place.folder / "runs" / "straight" / "model", place.folder / "outage"
    wanted, found = (load_model(each).state_dict() for each in models)
    assert all(weight.equal(wanted[name]) for name, weight in found.items())


def _kill_until_missed(*servers: S3Server | Server) -> None:
    """kill -9 them all; each comes back when somebody has asked for it in vain."""
    with ExitStack() as stack:
        stand_ins = []
        for server in servers:
            server.kill()
            stand_ins.append(stack.enter_context(_stand_in(server.port)))
        for server, stand_in in zip(servers, stand_ins, strict=True):
            stand_in.accept()[0].close()
            stand_in.close()
            server.start()


def _stand_in(port: int) -> socket.socket:
    """A listener where a server was, as soon as the last of its processes is gone."""

    def bound() -> socket.socket | None:
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", port))

    listener = eventually(bound, f"free port {port}")
    listener.settimeout(PATIENCE_S)
    return listener


def test_a_killed_driver_and_a_killed_validation(
    place: Place, straight, tiny_shards, capsys
) -> None:
    config = _staged(place, "orphan", tiny_shards.path, validation="asynchronous")
    command = [sys.executable, "-m", "jobs.pretrain", "--config", str(config)]
    log = place.folder / "orphan.log"
    with log.open("wb") as output:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        folder = str(place.folder / "runs" / "orphan" / "checkpoints")
        eventually(lambda: snapshots(folder) or driver.poll() is not None, "checkpoint")
        assert driver.poll() is None, log.read_text()[-3000:]
        workers = _workers_of(driver.pid)
        assert len(workers) == 2
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        eventually(lambda: not any(worker.is_running() for worker in workers), "end of the workers")
    first_id = place.run_id("orphan")
    lost = Path(folder) / "step-00000001"
    lost.mkdir()
    marker = {"step": 1, "files": {}, "metrics": {}, "awaits_validation": True}
    (lost / "COMPLETE").write_text(json.dumps(marker))
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_validation, args=[killed])
    killer.start()
    pretrain.main(["--config", str(config)])
    killer.join()
    assert killed
    output = capsys.readouterr().out
    assert "goes on from the checkpoint of step" in output
    assert "checkpoint of step 1 was not validated, training goes on: CheckpointError" in output
    assert place.run_id("orphan") == first_id
    assert place.losses("orphan") == straight
    wanted, found = (place.validations(name) for name in ("straight", "orphan"))
    assert [step for step, _ in found] == [12, 24]
    # The workers shared rows in the second half: float32 in another order.
    assert found[0] == wanted[0]
    assert found[1][1] == pytest.approx(wanted[1][1], rel=1e-5)
    assert [each.step for each in snapshots(folder)] == [24, 20]
    assert "held-out" in output.splitlines()[-3]


def _kill_a_validation(killed: list[int]) -> None:
    """The first that is at work; another process does it again."""

    def at_work() -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return [each for each in children if "ray::validation" in " ".join(_command(each))]

    process = eventually(at_work, "validation")[0]
    process.kill()
    killed.append(process.pid)


def test_fine_tuning_starts_from_the_registered_model(
    place: Place, straight, tiny_chat_shards, tiny_shards, capsys
) -> None:
    config = place.config(
        "tuned",
        checkpoint="models:/tiny@champion",
        data={"path": str(tiny_chat_shards.path), "packing": "whole"},
        train={"steps": 6, "validate_every_steps": 6, "checkpoint": {"every_steps": 3}},
    )
    sft.main(["--config", str(config)])
    losses = place.losses("tuned")
    assert [step for step, _ in losses] == list(range(1, 7))
    # Pretraining began at log(512) = 6.2; whoever starts from its end starts lower.
    assert losses[0][1] < straight[0][1]
    model = place.folder / "runs" / "tuned" / "model"
    assert Tokenizer(model).fingerprint == Tokenizer(tiny_shards.tokenizer).fingerprint
    start = load_model(place.folder / "runs" / "straight" / "model").state_dict()
    tuned = load_model(model).state_dict()
    assert any(not tuned[name].equal(start[name]) for name in start)

    sft.main(["--config", str(config)])
    assert "tuned is finished already" in capsys.readouterr().out
    before = (place.folder / "runs" / "tuned" / "run.yaml").read_text()
    with pytest.raises(SystemExit):
        sft.main(["--config", str(config), "--set", f"checkpoint={model}"])
    assert "belong to another run: start was" in capsys.readouterr().err
    assert (place.folder / "runs" / "tuned" / "run.yaml").read_text() == before


def test_adapters_are_trained_merged_and_kept_alone(
    place: Place, straight, tiny_chat_shards, capsys
) -> None:
    start = place.folder / "runs" / "straight" / "model"
    samples = {"num_prompts": 2, "max_prompt_tokens": 100, "max_new_tokens": 8}
    config = place.config(
        "adapted",
        checkpoint=str(start),
        data={"path": str(tiny_chat_shards.path), "packing": "whole"},
        train={
            **{"steps": 4, "checkpoint": {"every_steps": 2}, "lora": {"rank": 4}},
            **{"validate_every_steps": 2, "samples": samples},
        },
    )
    sft.main(["--config", str(config), "--dry-run"])
    assert re.search(r"trainable +\S+k \(\d+\.\d\d%\): LoRA of rank 4\n", capsys.readouterr().out)
    command = ["--config", str(config), "--set", "train.optimizer.warmup_steps=6"]
    sft.main([*command, "--set", "train.steps=2"])
    sft.main(command)
    assert "goes on from the checkpoint of step 2" in capsys.readouterr().out
    assert [step for step, _ in place.losses("adapted")] == [1, 2, 3, 4]
    local = place.client().download_artifacts(place.run_id("adapted"), TABLE)
    table = json.loads(Path(local).read_text())
    assert table["columns"] == ["step", "prompt", "answer", "reference"]
    assert [row[0] for row in table["data"]] == [2, 2, 4, 4]
    assert all(row[3].startswith("It is") for row in table["data"])
    folder = place.folder / "runs" / "adapted"
    base, plain = (load_model(each).state_dict() for each in (start, folder / "model"))
    adapter = load_file(folder / "adapter" / ADAPTER_FILE)
    changed = {name for name in base if not base[name].equal(plain[name])}
    assert changed == {f"{name.rpartition('.')[0]}.weight" for name in adapter}
    assert "layers.1.ffn.down.weight" in changed and "embedding.weight" not in changed
    with pytest.raises(SystemExit):
        sft.main([*command, "--set", "train.lora.rank=2"])
    assert "belong to another run: train.lora.rank was 4, is 2" in capsys.readouterr().err


def test_a_sweep_trains_all_its_runs_on_workers_that_stay(
    place: Place, cluster: None, tiny_shards, capsys
) -> None:
    base = place.config("base", model=MODEL, data={"path": str(tiny_shards.path)})
    tree = {
        "name": "compared",
        "base": str(base),
        "overrides": ["train.steps=4", "train.guard.halt_after=1"],
        "variants": [
            {"name": "one", "seeds": [0, 1]},
            {"name": "lost", "overrides": ["train.optimizer.learning_rate=1.0e+30"]},
            {"name": "same", "overrides": ["train.validation=asynchronous"]},
        ],
    }
    config = place.folder / "compared.yaml"
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--config", str(config)])
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "compared-lost-seed0 stopped after step" in shown.err
    assert shown.out.count("starting workers") == 1
    losses = {name: place.losses(f"compared-{name}") for name in ("one-seed0", "one-seed1")}
    # A run does not depend on what its workers have done before.
    assert place.losses("compared-same-seed0") == losses["one-seed0"] != losses["one-seed1"]
    folder = place.folder / "runs" / "compared"
    record = json.loads((folder / "results.json").read_text())
    assert [(each["variant"], each["seed"]) for each in record["trials"]] == [
        ("one", 0),
        ("one", 1),
        ("same", 0),
    ]
    # Nor does what a validation finds depend on who validates, and when.
    assert record["summary"][2]["differences"]["valid/loss"]["mean"] == 0.0
    one, _, same = record["trials"]
    assert (same["valid"], same["health"]) == (one["valid"], one["health"])
    assert one["train"][-1] == [4 * 512, losses["one-seed0"][-1][1]]
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        "report.md",
        "loss.png",
        "loss_by_position.png",
    }
    client, parent = place.client(), place.run_id("compared")
    assert "figures/loss.png" in {x.path for x in client.list_artifacts(parent, "figures")}
    run = client.get_run(place.run_id("compared-same-seed0"))
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert client.get_run(place.run_id("compared-lost-seed0")).info.status == "FAILED"
    # What is finished is not trained again.
    tree["variants"] = tree["variants"][::2]
    config.write_text(yaml.safe_dump(tree))
    sweep.main(["--config", str(config)])
    shown = capsys.readouterr().out
    assert "3 of 3 runs are finished" in shown and "starting workers" not in shown
    assert client.get_run(parent).info.status == "FINISHED"


def test_a_broken_shard_ends_the_run_with_its_name(
    place: Place, cluster: None, tiny_shards, capsys
) -> None:
    data = place.folder / "broken"
    shutil.copytree(tiny_shards.path, data)
    for shard in (data / "train").glob("*.arrow"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    config = place.config("broken", model=MODEL, data={"path": str(data)})
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["--config", str(config)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "broken cannot go on: worker" in error
    assert str(data / "train" / "shard-") in error
    assert "sha256" in error
    # Ray aborts a process that disconnects while one of its threads waits for Ray.
    assert "fit" not in {thread.name for thread in threading.enumerate()}
    assert place.client().get_run(place.run_id("broken")).info.status == "FAILED"


class Stuck(UserCallback):
    """Whoever unpickles it writes its process id down and sleeps: a controller that never is up."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        write = f"pathlib.Path({str(self._file)!r}).write_text(str(os.getpid()))"
        return exec, (f"import os, pathlib, time; {write}; time.sleep(3000)",)


def test_a_run_is_ended_before_its_controller_is_up(cluster: None, tmp_path: Path) -> None:
    file, errors = tmp_path / "pid", []
    trainer = ControlledTrainer(
        lambda: None,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=str(tmp_path / "ray"), callbacks=[Stuck(file)]),
    )

    def fit() -> None:
        try:
            trainer.fit()
        except (RayActorError, InterruptedError) as error:
            errors.append(type(error))

    thread = threading.Thread(target=fit)
    thread.start()
    controller = int(eventually(lambda: file.exists() and file.read_text(), "controller"))
    trainer.end()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    eventually(lambda: not psutil.pid_exists(controller), "end of the controller")
    fit()
    assert issubclass(errors[0], RayActorError) and errors[1:] == [InterruptedError]
