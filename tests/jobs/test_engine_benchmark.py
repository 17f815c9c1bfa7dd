"""jobs.engine_benchmark on a toy model: what it records is what the engine did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import engine_benchmark, engine_measures
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.cost import cache_bytes
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.request import SamplingParams

MODEL = {
    "name": "toy",
    "vocab_size": 512,
    "layers": 2,
    "width": 32,
    "ffn_width": 48,
    "max_context": 128,
    "attention": {
        "kind": "nsa",
        "query_heads": 4,
        "kv_heads": 2,
        "key_width": 16,
        "value_width": 8,
        "compression_block_size": 8,
        "compression_stride": 4,
        "selection_block_size": 8,
        "num_selected_blocks": 3,
        "num_local_blocks": 1,
        "window_size": 12,
    },
}


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    run = {
        "name": "toy",
        "model": MODEL,
        "data": {"path": "x", "context_length": 128},
        "train": {
            "steps": 2,
            "tokens_per_step": 128,
            "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 1},
        },
    }
    config = tmp_path / "toy.yaml"
    config.write_text(yaml.safe_dump(run))
    output = tmp_path / "out" / "record.json"
    return ["--config", str(config), "--output", str(output), "--device", "cpu"]


@pytest.fixture(scope="module")
def make_engine() -> Any:
    tokenizer = engine_measures.text_tokenizer(512)
    cpu = torch.device("cpu")
    model = engine_measures.random_model(ModelConfig.parse(MODEL), device=cpu, dtype=torch.float32)
    config = EngineConfig(max_num_seqs=2, num_kv_tokens=256, max_step_ms=None)
    return lambda: Engine(model, tokenizer, config)


def test_both_kinds_are_measured_and_drawn(flags: list[str]) -> None:
    sizes = ["--contexts", "40", "64", "--batch-sizes", "1", "3", "--steps", "2"]
    assert engine_benchmark.main([*flags, *sizes, "--max-prefill-len", "40"]) == 0
    path = Path(flags[3])
    record = json.loads(path.read_text())
    assert record["model"]["name"] == "toy" and record["versions"]["torch"] == torch.__version__
    points = {
        (p["measure"], p["kind"], p["context"], p.get("batch_size")): p for p in record["points"]
    }
    decodes = {("decode", k, c, b) for k in ("nsa", "full") for c in (40, 64) for b in (1, 3)}
    assert set(points) == decodes | {("prefill", k, 40, None) for k in ("nsa", "full")}
    for (measure, kind, context, size), point in points.items():
        assert point["tokens_per_s"] > 0
        if measure == "decode":
            page = 8 if kind == "nsa" else 64
            assert point["pages_used"] <= size * -(-context // page)
            assert point["pages_used"] >= size * ((context - 20) // page)
            assert (
                point["cache_bytes_formula"]
                <= point["cache_bytes"]
                <= 1.5 * (point["cache_bytes_formula"])
            )
            assert point["device_ms"] is None, "there is no GPU here"
    assert engine_benchmark.main(["--draw", str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_named_pages_are_found_and_computed_ones_say_the_same(make_engine: Any) -> None:
    engine = make_engine()
    prompts = engine_measures.random_prompts(engine, 2, 90, seed=3)
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    answers = []
    for is_known in (False, True):
        if is_known:
            engine_measures.know_prompts(engine, prompts, is_computed=True)
        found: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, greedy)
        while engine.has_work:
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
                # 90 tokens: the last page that nothing can change ends at 80.
                assert output.num_cached_tokens == (80 if is_known else 0)
        answers.append(found)
        engine.check()
    assert answers[0] == answers[1]
    engine_measures.know_prompts(engine, prompts, is_computed=False)
    engine.check()
    engine.add("2", prompts[0], greedy)
    assert engine.stats().queued_prefill_tokens == 10
    engine.abort("2")
    engine.check()


def test_a_decode_is_of_all_sequences_at_their_context(make_engine: Any) -> None:
    engine = make_engine()
    engine_measures.fill_cache(engine)
    speed = engine_measures.decode_speed(
        engine, batch_size=2, context=100, num_steps=3, is_computed=False
    )
    # After the measured steps 14 of the 100 tokens are still to come: 86 fill 11 pages of 8.
    assert 2 * 10 <= speed["pages_used"] <= 2 * 12
    formula = cache_bytes(engine.cache.config, 86, element_bytes=4, page_size=8)
    assert speed["cache_bytes_formula"] == pytest.approx(2 * formula.total, rel=0.1)
    assert not engine.has_work and engine.stats().steps_total >= 15


def test_waits_beside_a_long_prompt(flags: list[str]) -> None:
    sizes = ["--contention", "--long-len", "600", "--short-len", "20", "--arrivals", "4"]
    assert (
        engine_benchmark.main(
            [
                *flags,
                *sizes,
                "--rate",
                "200",
                "--kinds",
                "nsa",
                "--engine",
                "max_num_batched_tokens=64",
            ]
        )
        == 0
    )
    (point,) = json.loads(Path(flags[3]).read_text())["points"]
    assert point["p99_busy_ttft_ms"] >= point["p50_busy_ttft_ms"] > 0
    assert point["p99_ratio"] == pytest.approx(
        point["p99_busy_ttft_ms"] / point["p99_idle_ttft_ms"], rel=1e-2
    )


def test_a_point_that_fails_is_recorded_and_the_next_is_measured(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = engine_measures.decode_speed

    def fail_once(engine: Engine, **sizes: Any) -> dict[str, Any]:
        if sizes["context"] == 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if sizes["context"] == 48:
            raise RuntimeError("something\nelse")
        return measured(engine, **sizes)

    monkeypatch.setattr(engine_measures, "decode_speed", fail_once)
    sizes = ["--kinds", "nsa", "--batch-sizes", "1", "--steps", "2", "--max-prefill-len", "0"]
    assert engine_benchmark.main([*flags, *sizes, "--contexts", "40", "64"]) == 0
    errors = [p.get("error") for p in json.loads(Path(flags[3]).read_text())["points"]]
    assert errors == ["out of memory", None]
    assert engine_benchmark.main([*flags, *sizes, "--contexts", "48", "64"]) == 1
    errors = [p.get("error") for p in json.loads(Path(flags[3]).read_text())["points"]]
    assert errors == ["something else", None]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--contexts", "20"], "--contexts: must exceed 50"),
        (["--engine", "max_seqs=4"], "max_seqs: unknown key"),
        (["--engine", "x"], "--engine x: must look like"),
        (["--set", "model.attention.kind=full"], "kind"),
        (["--set", "model.vocab_size=100"], "vocab_size=100"),
        (["--rate", "0"], "--rate: must be positive"),
        (["--draw", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (
            ["--draw", "results/kernels.json"],
            "results/kernels.json: is no record of this benchmark",
        ),
        (["--steps", "0"], "must be a whole number from 1 on"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], more: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        engine_benchmark.main([*flags, *more])
    assert end.value.code == 2
    assert named in capsys.readouterr().err
    assert not Path(flags[3]).exists()
