"""jobs.generate on a small exported model: order, restarts, workers, and what it refuses."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import yaml
from pyarrow import ipc

from jobs import generate as job
from jobs.cluster import connect
from jobs.generation import (
    PARTS,
    Generated,
    GenerationPlan,
    Part,
    PartDone,
    generate_part,
    part_file,
    sampling_params,
)
from jobs.prompts import PromptError, read_prompts
from nsa_platform import storage
from nsa_platform.config.generate import GenerateRun
from nsa_platform.data.plan import Progress
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.weights import load_model
from nsa_platform.serve.generator import Generator
from nsa_platform.serve.loading import load_engine
from tests.platform.evaluate.small import export, make_corpus, make_model
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error"]
TOO_LONG = "the cat " * 200


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and rows.jsonl: texts, chats, and two rows that cannot be served."""
    place = tmp_path_factory.mktemp("generate")
    corpus = make_corpus(place / "data")
    export(corpus, make_model(corpus.tokenizer.vocab_size, max_context=160), place / "model")
    rows: list[dict[str, Any]] = [
        {"id": f"row-{number}", "prompt": "the cat sat " * (1 + number % 7)} for number in range(12)
    ]
    rows[2] = {"prompt": "a bird", "answer": "a column of no concern"}
    rows[3] = {"id": 7, "messages": [{"role": "user", "content": "Who sat?"}]}
    rows[4] = {"id": "long", "prompt": TOO_LONG}
    rows[5] = {"id": "empty", "prompt": ""}
    write_rows(place / "rows.jsonl", rows)
    return place


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_file(place: Path, output: Path, **changes: Any) -> str:
    tree = {
        "name": "generation",
        "checkpoint": str(place / "model"),
        "inputs": [str(place / "rows.jsonl")],
        "output": str(output),
        "sampling": {"max_tokens": 12, "temperature": 0.8},
        "engine": {"max_num_seqs": 3, "max_num_batched_tokens": 16, "max_num_queued": 2},
        "rows_per_part": 5,
    }
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return str(path)


class Here:
    """Generates in this process; raises KeyboardInterrupt after some parts."""

    def __init__(self, run: GenerateRun, *, stop_after: int = 1000) -> None:
        self.run = run
        self.stop_after = stop_after

    def __call__(self, parts: Any) -> Iterator[PartDone]:
        engine = load_engine(self.run.checkpoint, self.run.engine, "cpu")
        for count, part in enumerate(parts):
            if count == self.stop_after:
                raise KeyboardInterrupt
            assert isinstance(part, Part)
            results = generate_part(engine, part, sampling_params(self.run.sampling))
            engine.check()
            lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            storage.write_text(storage.join(self.run.output, PARTS, part_file(part.name)), lines)
            yield PartDone(len(results), sum(r["completion_tokens"] for r in results))


def silent(progress: Progress) -> None:
    assert progress.done <= progress.total


def generate_here(config: str, *, stop_after: int = 1000) -> Generated:
    run = GenerateRun.load(config)
    plan = GenerationPlan(run)
    return plan.finished() or plan.generate(Here(run, stop_after=stop_after), silent)


def results_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_every_row_has_its_line_in_order(place: Path, tmp_path: Path) -> None:
    done = generate_here(config_file(place, tmp_path / "out"))
    results = results_of(tmp_path / "out")
    assert [list(result) for result in results] == [KEYS] * 12
    ids = [result["id"] for result in results]
    assert ids == ["row-0", "row-1", 2, 7, "long", "empty", *[f"row-{n}" for n in range(6, 12)]]
    tokenizer = Tokenizer(place / "model")
    length = len(tokenizer.encode(TOO_LONG))
    long, empty = results[4], results[5]
    assert f"{length} prompt tokens + max_tokens=12" in long["error"]
    assert (long["text"], long["finish_reason"], long["prompt_tokens"]) == (None, None, length)
    assert "the prompt is empty" in empty["error"]
    served = [result for result in results if result["error"] is None]
    assert {result["finish_reason"] for result in served} <= {"stop", "length"}
    assert all(0 < result["completion_tokens"] <= 12 for result in served)
    assert (done.rows, done.finished["error"], sum(done.finished.values())) == (12, 2, 12)
    assert done.completion_tokens == sum(result["completion_tokens"] for result in results)
    assert sorted(storage.list_names(str(tmp_path / "out"))) == ["generated.json", "results.jsonl"]


def test_greedy_text_is_that_of_the_generator(place: Path, tmp_path: Path) -> None:
    settings = {"max_tokens": 12, "temperature": 0.0}
    generate_here(config_file(place, tmp_path / "out", sampling=settings))
    tokenizer, model = Tokenizer(place / "model"), load_model(place / "model")
    prompt = tokenizer.encode("the cat sat " * 7)
    ids = list(Generator(model).stream(prompt, 12, stop_ids=tokenizer.stop_ids()))
    result = results_of(tmp_path / "out")[6]
    assert result["prompt_tokens"] == len(prompt)
    assert result["text"] == tokenizer.decode(ids)


def test_rows_are_drawn_by_their_number_alone(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "same.jsonl", [{"prompt": "the cat"}] * 6)
    inputs = [str(tmp_path / "same.jsonl")]
    generate_here(config_file(place, tmp_path / "a", inputs=inputs, rows_per_part=2))
    generate_here(config_file(place, tmp_path / "b", inputs=inputs, rows_per_part=6))
    texts = [result["text"] for result in results_of(tmp_path / "a")]
    assert texts == [result["text"] for result in results_of(tmp_path / "b")]
    assert len(set(texts)) > 1


def test_an_interrupted_run_keeps_its_parts_and_shows_no_result(
    place: Path, tmp_path: Path
) -> None:
    generate_here(config_file(place, tmp_path / "straight"))
    config = config_file(place, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        generate_here(config, stop_after=2)
    assert storage.list_names(str(tmp_path / "out")) == [PARTS]
    done = generate_here(config)
    assert (done.parts, done.reused_parts) == (3, 2)
    assert results_of(tmp_path / "out") == results_of(tmp_path / "straight")
    again = generate_here(config)
    assert again.reused_parts == again.parts == 3


def test_what_changes_the_result_is_generated_anew(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"a {number}"} for number in range(10)]
    inputs = [str(write_rows(tmp_path / "rows.jsonl", rows))]
    config = config_file(place, tmp_path / "out", inputs=inputs)
    generate_here(config)
    write_rows(tmp_path / "rows.jsonl", [*rows[:9], {"prompt": "another"}])
    first = results_of(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        generate_here(config, stop_after=1)
    # Until the new result is whole the old one stays.
    assert results_of(tmp_path / "out") == first
    assert generate_here(config).reused_parts == 1
    assert results_of(tmp_path / "out")[:9] == first[:9]
    changed = config_file(place, tmp_path / "out", inputs=inputs, sampling={"max_tokens": 3})
    assert generate_here(changed).reused_parts == 0


def test_all_formats_hold_the_same_rows(place: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "the cat", "messages": None},
        {"id": None, "prompt": None, "messages": [{"role": "user", "content": "Hi"}]},
    ]
    text = write_rows(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.rstrip()))
    table = pa.Table.from_pylist(rows)
    with ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    with ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    expected = list(read_prompts(str(tmp_path / "a.jsonl")))
    assert [row.id for row in expected] == ["a", None]
    for name in ("b.jsonl.gz", "c.arrow", "d.arrow"):
        assert list(read_prompts(str(tmp_path / name))) == expected
    config = config_file(place, tmp_path / "out", inputs=[str(tmp_path)])
    assert generate_here(config).rows == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": ', "line 2: is not JSON"),
        (b'\n["a"]', "line 2: must be an object, got list"),
        (b'{"prompt": "\xff"}', "line 1: is not UTF-8"),
        (b'{"text": "a"}', "line 1: must have either 'prompt' or 'messages', it has text"),
        (b'{"prompt": "a", "messages": []}', "must have either 'prompt' or 'messages'"),
        (b'{"prompt": 5}', "line 1: prompt must be a string, got int"),
        (b'{"id": 1.5, "prompt": "a"}', "line 1: id must be a string or an integer, got 1.5"),
        (b'{"messages": []}', "line 1: messages must be a non-empty list"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "line 1: messages[0].role"),
        (b'{"prompt": "\\ud800"}', "line 1: holds half a character"),
        (b"[" * 100_000, "line 1: is not JSON"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(PromptError) as raised:
        list(read_prompts(str(tmp_path / "rows.jsonl")))
    assert str(raised.value).startswith(f"{tmp_path}/rows.jsonl: ")
    assert message in str(raised.value)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.arrow"):
        (tmp_path / name).write_bytes(b"neither of them, for sure")
        with pytest.raises(PromptError, match=f"{name}: cannot be read"):
            list(read_prompts(str(tmp_path / name)))
    table = pa.table({"question": ["a"]})
    with ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(PromptError, match="neither a column 'prompt' nor 'messages', but question"):
        list(read_prompts(str(tmp_path / "c.arrow")))


@pytest.mark.parametrize(
    ("changes", "message", "status"),
    [
        ({"inputs": ["nowhere.jsonl"]}, "nowhere.jsonl: it does not exist", 2),
        ({"inputs": ["."]}, "must be or hold files .jsonl", 2),
        ({"checkpoint": "nowhere"}, "nowhere: it does not exist", 2),
        ({"checkpoint": "models:/nobody@champion"}, "fetching models:/nobody@champion", 1),
        ({"sampling": {"max_tokens": 160}}, "sampling.max_tokens=160 leaves no room", 2),
        (
            {"sampling": {"max_tokens": 9, "stop_token_ids": [9999]}},
            "sampling.stop_token_ids: ids must be",
            2,
        ),
        ({"sampling": {"max_tokens": 2, "min_tokens": 3}}, "min_tokens=3 must not exceed", 2),
        ({"sampling": {"temprature": 1}}, "did you mean 'temperature'", 2),
        ({"engine": {"max_model_len": 999}}, "max_model_len=999 must not exceed", 2),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
    status: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(SystemExit) as end:
        config = config_file(place, tmp_path / "out", tracking_uri=store, **changes)
        job.main(["--config", config])
    assert end.value.code == status
    assert message in capsys.readouterr().err
    assert not ray.is_initialized() and not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.jsonl").write_text("keep me")
    with pytest.raises(SystemExit) as end:
        job.main(["--config", config_file(place, tmp_path / "full")])
    assert end.value.code == 2
    assert "full holds results.jsonl, which is not only" in capsys.readouterr().err
    assert (tmp_path / "full" / "results.jsonl").read_text() == "keep me"


def test_the_dry_run_starts_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.main(["--config", config_file(place, tmp_path / "out"), "--dry-run"])
    assert "max_num_batched_tokens: 16" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster(s3_server: Any) -> Iterator[str]:
    """A local Ray cluster of two CPUs whose workers know the S3 server; yields its address."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        with connect(num_cpus=2):
            yield ray.get_runtime_context().gcs_address


@pytest.mark.cluster
def test_two_workers_and_s3_give_the_same_lines(
    cluster: str,
    place: Path,
    tmp_path: Path,
    s3_server: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generate_here(config_file(place, tmp_path / "here"))
    bucket = s3_server.bucket("generate")
    storage.upload_file(place / "rows.jsonl", f"{bucket}/in/rows.jsonl")
    storage.upload_tree(place / "model", f"{bucket}/model")
    there = {"checkpoint": f"{bucket}/model", "inputs": [f"{bucket}/in"]}
    config = config_file(place, tmp_path / "s3", **there, cluster={"num_workers": 2})
    main = ["--config", config, "--set", f"output={bucket}/out"]
    job.main(main)
    shown = capsys.readouterr()
    assert "generating: 12 of 12 rows" in shown.err
    assert f"generated {bucket}/out/results.jsonl" in shown.out and "2 error" in shown.out
    here = (tmp_path / "here" / "results.jsonl").read_bytes()
    assert storage.read_bytes(f"{bucket}/out/results.jsonl") == here
    job.main(main)
    assert "(nothing had changed)" in capsys.readouterr().out


@pytest.mark.cluster
def test_a_killed_driver_goes_on(
    cluster: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"the {'cat ' * (number % 9)}"} for number in range(20)]
    changes = {
        "inputs": [str(write_rows(tmp_path / "rows.jsonl", rows))],
        "sampling": {"max_tokens": 48, "ignore_eos": True},
        "rows_per_part": 2,
    }
    config = config_file(place, tmp_path / "out", **changes)
    command = [sys.executable, "-m", "jobs.generate", "--config", config]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def has_a_part() -> bool:
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        return any((tmp_path / "out" / PARTS).glob("*.jsonl"))

    eventually(has_a_part, "a part is done", every_s=0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "out" / "results.jsonl").exists()
    job.main(["--config", config])
    assert " of 10 parts were done by an earlier try" in capsys.readouterr().out
    generate_here(config_file(place, tmp_path / "here", **changes))
    assert results_of(tmp_path / "out") == results_of(tmp_path / "here")
