"""prepare_data on a real Ray cluster: same result, report, exit statuses, kill and restart."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from jobs.cluster import connect
from jobs.preparation import ProgressDisplay, TaskPool, print_report
from jobs.prepare_data import main
from nsa_platform import storage
from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.data.corpus import CorpusError
from nsa_platform.data.plan import Progress
from nsa_platform.data.preparation import prepare_here
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


def write_yaml(folder: Path, corpus: Any, output: str, **options: Any) -> Path:
    """A run's file; YAML reads JSON."""
    tree = {
        "name": "test",
        "corpus": {"inputs": list(map(str, corpus if isinstance(corpus, list) else [corpus]))},
        "tokenizer": {"train_vocab_size": 400},
        "output": output,
        "shard_tokens": 60_000,
        "validation_fraction": 0.1,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree | options))
    return path


def failing(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert not ray.is_initialized()
    return stopped.value.code, capsys.readouterr().err


def test_mistakes_end_with_status_2_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("x")
    output = str(tmp_path / "out")
    config = str(write_yaml(tmp_path, tmp_path / "nowhere", output))
    status, text = failing(["--config", config], capsys)
    assert status == 2 and "nowhere: it does not exist" in text
    status, text = failing(["--config", config, "--set", "shard_token=5"], capsys)
    assert status == 2 and "did you mean 'shard_tokens'?" in text
    one = ["--config", config, "--set", f"corpus.inputs=[{tmp_path / 'a.txt'}]"]
    status, text = failing([*one, "--set", "tokenizer={path: /nowhere}"], capsys)
    assert status == 2 and "/nowhere: it does not exist" in text
    status, text = failing([*one, "--set", "corpus.suffixes=[.md]"], capsys)
    assert status == 2 and "ends in none of corpus.suffixes (.md)" in text
    assert not (tmp_path / "out").exists()


def test_an_unreachable_store_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    config = str(write_yaml(tmp_path, "s3://bucket/raw", str(tmp_path / "out")))
    status, text = failing(["--config", config], capsys)
    assert status == 1 and "s3://bucket/raw at http://127.0.0.1:9: the endpoint" in text


def test_dry_run_shows_the_run_and_starts_nothing(
    tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_yaml(tmp_path, tiny_corpus, str(tmp_path / "out"))
    main(["--config", str(config), "--dry-run", "--set", "num_tasks=7"])
    assert "num_tasks: 7" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not ray.is_initialized()


def test_progress_on_a_terminal_and_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [Progress("tokenising", done, 4, "files", done, 10 * done) for done in range(5)]
    with open(os.devnull, "w") as sink, ProgressDisplay(Console(file=sink)) as display:
        display.show(steps[0])
    plain = Console(stderr=True, force_terminal=False)
    with ProgressDisplay(plain) as display:
        for step in steps:
            display.show(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenising: 0 of 4 files"
    assert lines[-1].startswith("tokenising: 4 of 4 files  4 documents, 40 tokens, ")
    assert len(lines) == 2
    with ProgressDisplay(Console(stderr=True, force_terminal=True, width=120)) as display:
        for step in steps:
            display.show(step)
    drawn = capsys.readouterr().err
    assert "4/4" in drawn and "━" in drawn and "40 tokens" in drawn


@pytest.fixture(scope="module")
def cluster(s3_server: Any) -> Iterator[str]:
    """A local Ray cluster of two CPUs whose workers know the S3 server; yields its address."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        with connect(num_cpus=2):
            yield ray.get_runtime_context().gcs_address


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        entry.name: Path(entry.uri).read_bytes()
        for entry in storage.walk(str(folder))
        if entry.name != "prepared.json"
    }


def test_a_vocabulary_that_the_text_does_not_fill_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "a.txt"
    raw.write_text("some text " * 99)
    config = write_yaml(tmp_path, raw, str(tmp_path / "out"))
    run = PrepareDataRun.load(config, ["validation_fraction=0"])
    print_report(prepare_here(run), run, Console())
    shown = capsys.readouterr().out
    assert re.search(r"vocabulary  \d+ tokens of 400: the text has no more to merge", shown)


@pytest.mark.cluster
@pytest.mark.parametrize(("num_tasks", "deduplicate"), [(1, None), (3, {"near_similarity": 0.8})])
def test_the_result_does_not_depend_on_the_number_of_tasks(
    cluster: str,
    tmp_path: Path,
    tiny_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    num_tasks: int,
    deduplicate: dict[str, float] | None,
) -> None:
    copy = tmp_path / "copy.py"
    copy.write_text("\n" + sorted(tiny_corpus.iterdir())[7].read_text())
    config = write_yaml(
        tmp_path,
        [tiny_corpus, copy],
        str(tmp_path / "out"),
        num_tasks=num_tasks,
        deduplicate=deduplicate,
    )
    here = PrepareDataRun.load(config, [f"output={tmp_path / 'here'}"])
    expected = prepare_here(here)
    main(["--config", str(config)])
    shown = capsys.readouterr()
    assert files_below(tmp_path / "out") == files_below(tmp_path / "here")
    assert f"digest {expected.digests['train'][:12]}" in shown.out
    assert "vocabulary  400 tokens\n" in shown.out
    # The library of some interpreters has copies of its own.
    assert ("copy" in expected.skipped) == (deduplicate is not None)
    reasons = [f"{count} {reason}" for reason, count in expected.skipped.items()]
    assert f"skipped     {', '.join(reasons) or 'none'}" in shown.out
    told = rf"1 equal and 0 near ones of 1 documents, 100.0% of [\d,]+ tokens, left out of {copy}"
    assert bool(re.search(told, shown.out)) == (deduplicate is not None)
    assert "tokenising: 41 of 41 files" in shown.err
    main(["--config", str(config)])
    shown = capsys.readouterr()
    assert "(nothing had changed)" in shown.out and "replaced" not in shown.err
    main(["--config", str(config), "--set", "validation_fraction=0.3"])
    told = f"warning: {tmp_path / 'out'}: what other settings or inputs made there is replaced"
    assert told in capsys.readouterr().err


@pytest.mark.cluster
def test_a_mistake_in_the_data_ends_with_status_1(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text("some text " * 99)
    (raw / "rows.jsonl").write_text('{"body": "x"}\n')
    config = write_yaml(
        tmp_path, raw, str(tmp_path / "out"), tokenizer={"path": str(tmp_path / "tokenizer")}
    )
    tokenizer_run = PrepareDataRun.load(
        write_yaml(tmp_path, raw / "a.txt", str(tmp_path / "first")), ["validation_fraction=0"]
    )
    prepare_here(tokenizer_run)
    (tmp_path / "first" / "tokenizer").rename(tmp_path / "tokenizer")
    config = write_yaml(
        tmp_path, raw, str(tmp_path / "out"), tokenizer={"path": str(tmp_path / "tokenizer")}
    )
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(config)])
    assert stopped.value.code == 1
    assert "rows.jsonl: no row has the field 'text', but body" in capsys.readouterr().err
    assert storage.list_names(str(tmp_path / "out")) == ["_staging"]


def double_unless_seven(number: int) -> int:
    if number == 7:
        raise CorpusError("seven")
    return 2 * number


@pytest.mark.cluster
def test_task_pool_bounds_and_errors(cluster: str) -> None:
    assert sorted(TaskPool(2)(double_unless_seven, range(5))) == [0, 2, 4, 6, 8]
    with pytest.raises(CorpusError, match=r"^seven$"):
        list(TaskPool(2)(double_unless_seven, range(5, 9)))


@pytest.mark.cluster
def test_from_s3_to_s3_on_ray(
    cluster: str,
    tmp_path: Path,
    tiny_corpus: Path,
    s3_server: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = PrepareDataRun.load(write_yaml(tmp_path, tiny_corpus, str(tmp_path / "here")))
    expected = prepare_here(here)
    bucket = s3_server.bucket("ray-prepare")
    storage.upload_tree(tiny_corpus, f"{bucket}/raw")
    main(["--config", str(write_yaml(tmp_path, f"{bucket}/raw", f"{bucket}/out"))])
    assert f"digest {expected.digests['train'][:12]}" in capsys.readouterr().out
    storage.download_tree(f"{bucket}/out", tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "here")


@pytest.mark.cluster
def test_a_killed_driver_goes_on(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(8):
        (raw / f"{number}.txt").write_text(f"{number} words of a text \n" * 80_000)
    settings = {"num_tasks": 1, "tokenizer": {"train_vocab_size": 300, "train_sample_mb": 1}}
    config = write_yaml(tmp_path, raw, str(tmp_path / "out"), validation_fraction=0, **settings)
    command = [sys.executable, "-m", "jobs.prepare_data", "--config", str(config)]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    first = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    staging = tmp_path / "out" / "_staging"

    def has_a_part() -> bool:
        assert first.poll() is None
        return any(staging.glob("*.npz"))

    eventually(has_a_part, "a part is done")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    main(["--config", str(config)])
    said = capsys.readouterr().out
    assert " of 8 parts were done by an earlier try" in said
    expected = prepare_here(PrepareDataRun.load(config, [f"output={tmp_path / 'here'}"]))
    assert f"digest {expected.digests['train'][:12]}" in said
    assert files_below(tmp_path / "out") == files_below(tmp_path / "here")
