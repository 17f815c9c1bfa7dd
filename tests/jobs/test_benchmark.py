"""jobs.benchmark without a server: its sums, and what it refuses."""

from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import pytest

from jobs import benchmark
from jobs.ports import free_ports
from jobs.serving_load import (
    LoadError,
    Sample,
    draw_prompts,
    draw_turns,
    summary,
    tokens_of,
    waits_s,
)


def test_rates_and_times_are_those_of_the_samples() -> None:
    samples = [
        Sample(100, 3, 64, ttft_s=0.5, itl_s=(0.1, 0.3), e2el_s=0.9),
        Sample(50, 2, ttft_s=1.5, itl_s=(0.2,), e2el_s=1.7),
        Sample(70, error="refused"),
    ]
    result = summary(samples, 2.0)
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (150, 5)
    assert (result["request_throughput"], result["output_throughput"]) == (1.0, 2.5)
    assert result["total_token_throughput"] == 77.5
    assert result["total_cached_tokens"] == 64
    assert (result["mean_ttft_ms"], result["median_ttft_ms"]) == (1000, 1000)
    assert (result["mean_tpot_ms"], result["mean_itl_ms"]) == (200, 200)
    assert result["mean_e2el_ms"] == 1300
    assert result["p99_ttft_ms"] == 1490


def test_goodput_counts_answers_that_keep_every_goal() -> None:
    samples = [
        Sample(1, 3, ttft_s=0.5, itl_s=(0.1, 0.3), e2el_s=0.9),  # 200 ms a token
        Sample(1, 3, ttft_s=0.5, itl_s=(0.1, 0.1), e2el_s=0.7),  # 100 ms
        Sample(1, 3, ttft_s=2.5, itl_s=(0.1, 0.1), e2el_s=2.7),
        Sample(1, error="refused"),
    ]
    assert summary(samples, 2.0)["request_goodput"] is None
    assert summary(samples, 2.0, {"ttft": 1000})["request_goodput"] == 1.0
    assert summary(samples, 2.0, {"ttft": 1000, "tpot": 150})["request_goodput"] == 0.5
    assert summary(samples, 2.0, {"e2el": 700})["request_goodput"] == 0.5
    assert summary(samples, 2.0, {"e2el": 1})["request_goodput"] == 0.0


def test_turns_share_beginnings_in_turn() -> None:
    ids = list(range(1000))
    sizes = {"num_prefixes": 3, "prefix_len": 50, "suffix_len": 7, "seed": 4}
    turns = draw_turns(ids, count=9, **sizes)
    assert {len(turn) for turn in turns} == {57}
    assert [turn[:50] for turn in turns[:3]] == [turn[:50] for turn in turns[3:6]]
    assert len({tuple(turn[:50]) for turn in turns}) == 3
    assert len({tuple(turn) for turn in turns}) == 9
    assert turns == draw_turns(ids, count=9, **sizes)


@pytest.mark.parametrize(("burstiness", "spread"), [(0.25, 2.0), (1.0, 1.0), (16.0, 0.25)])
def test_arrivals_keep_their_rate_and_their_burstiness(burstiness: float, spread: float) -> None:
    waits = list(islice(waits_s(5.0, burstiness, seed=1), 20_000))
    assert fmean(waits) == pytest.approx(0.2, rel=0.05)
    assert stdev(waits) / fmean(waits) == pytest.approx(spread, rel=0.05)


def test_nothing_answered_has_no_times() -> None:
    result = summary([Sample(1, error="no")], 1.0)
    assert result["completed"] == 0 and "mean_ttft_ms" not in result


def test_prompts_are_windows_that_a_seed_repeats() -> None:
    ids = list(range(1000))
    prompts = draw_prompts(ids, length=30, count=20, seed=1)
    assert all(prompt == ids[prompt[0] : prompt[0] + 30] for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) > 10
    assert prompts == draw_prompts(ids, length=30, count=20, seed=1)
    assert prompts != draw_prompts(ids, length=30, count=20, seed=2)
    assert draw_prompts(ids, length=1000, count=1, seed=0) == [ids]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input-length=8"], "unrecognized arguments: --input-length=8"),
        (["--input-len=0"], "must be a whole number above 0, got '0'"),
        (["--num-warmups=-1"], "must be a whole number, 0 or more, got '-1'"),
        (["--goodput", "ttft"], "must be ttft:MS, tpot:MS or e2el:MS"),
        (["--goodput", "itl:30"], "must be ttft:MS"),
        (["--burstiness=0"], "must be a number above 0 or inf, got '0'"),
        (["--dataset-name=sharegpt"], "invalid choice"),
        (["--request-rate=0"], "must be a number above 0 or inf, got '0'"),
        (["--metadata=gpu"], "must be KEY=VALUE, got 'gpu'"),
        (
            ["--base-url=localhost:8000"],
            "must begin with http:// or https://, got 'localhost:8000'",
        ),
        (["--parent=x"], "--parent is of no use without --tracking-uri"),
        (
            ["--dataset-name=prefix_repetition", "--input-len=10"],
            "--input-len is of no use to --dataset-name=prefix_repetition",
        ),
        (
            ["--prefix-repetition-suffix-len=10"],
            "--prefix-repetition-suffix-len is of no use to --dataset-name=random",
        ),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(flags)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ") and said.count("\n") == 1


def test_a_server_that_is_not_there_is_named(capsys) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--base-url", address])
    assert end.value.code == 2
    assert f"{address} does not answer" in capsys.readouterr().err


def test_a_record_without_a_place_is_refused_before_anything_is_asked(
    tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").touch()
    for place, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "File exists")):
        with pytest.raises(SystemExit) as end:
            benchmark.main([f"--result-filename={place}"])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_too_little_text_is_counted(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(LoadError, match="0 tokens of text, and 10 are needed"):
        tokens_of("http://x", "m", [tmp_path / "empty.txt"], count=10, max_model_len=64)
