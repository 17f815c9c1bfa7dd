"""Steps of all kinds before the first request: which are run, and that nothing of them is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_platform.config.serve import EngineConfig
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.trial_steps import warm_up

ROOT = Path(__file__).resolve().parents[3]
Shape = tuple[int, int, int]
"""New tokens, sequences, longest context."""


@pytest.fixture
def engine(make_speaker, toy_tokenizer) -> Engine:
    sizes = EngineConfig(max_num_seqs=6, max_num_batched_tokens=200, num_kv_tokens=4096)
    return Engine(make_speaker(max_context=2048), toy_tokenizer, sizes)


def shapes_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """What a warm-up puts through the model."""
    forward, shapes = engine.runner.forward, []

    def watched(ids, inputs):
        shapes.append((len(ids), len(inputs.context_lens), int(inputs.context_lens.max())))
        return forward(ids, inputs)

    monkeypatch.setattr(engine.runner, "forward", watched)
    assert warm_up(engine.runner, engine.scheduler.limits, engine.max_model_len) == len(shapes)
    return shapes


def test_all_kinds_of_steps_are_run_and_leave_nothing(engine, monkeypatch):
    shapes = shapes_of(engine, monkeypatch)
    engine.check()
    assert engine.stats().pages_used == engine.stats().steps_total == 0
    assert {context for _, _, context in shapes} >= {1024, 2048}
    alone = {tokens for tokens, sequences, _ in shapes if sequences == 1}
    assert alone == {2, 4, 8, 16, 32, 64, 128, 200}
    beside = {(tokens, sequences) for tokens, sequences, _ in shapes if sequences > 1}
    assert beside == {(17, 2), (19, 4), (21, 6), (29, 6)}
    for tokens, sequences in beside:
        assert tokens - (sequences - 1) in {16, 4 * sequences}


@pytest.mark.parametrize("num_kv_tokens", [64, 192, 600])
def test_a_small_cache_has_room(make_speaker, toy_tokenizer, monkeypatch, num_kv_tokens):
    sizes = EngineConfig(max_num_seqs=3, max_num_batched_tokens=64, num_kv_tokens=num_kv_tokens)
    engine = Engine(make_speaker(max_context=64), toy_tokenizer, sizes)
    assert shapes_of(engine, monkeypatch)
    engine.check()


def test_steps_meet_no_kernel_that_the_warm_up_has_not_met():
    """Whatever comes together: steps at random, of all lengths."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.platform.serve.kernels_met"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["new"] == []
    assert 10 < found["met"] < 40


def test_a_cpu_is_left_alone(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "forward", lambda *_: pytest.fail("a step was run"))
    engine.warm_up()
