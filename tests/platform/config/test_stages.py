"""Stages of a run: what holds in each, and what a user can get wrong."""

from typing import Any

import pytest

from nsa_platform.config.base import ConfigError
from nsa_platform.config.locations import locations
from nsa_platform.config.runs import PretrainRun

MIXED = {"path": "long", "weight": 3.0, "mixture": [{"path": "short", "weight": 1.0}]}


def run(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "staged",
        "model": {
            "vocab_size": 512,
            "layers": 1,
            "width": 64,
            "ffn_width": 64,
            "max_context": 512,
            "attention": {"kind": "nsa", "query_heads": 4, "kv_heads": 2},
        },
        "data": {"path": "data", "context_length": 256, "seed": 5},
        "train": {
            "steps": 10,
            "tokens_per_step": 2048,
            "sequences_per_microbatch": 2,
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        },
        "stages": list(stages),
    } | changes


def test_what_holds_in_each_stage() -> None:
    parsed = PretrainRun.parse(
        run(
            {"steps": 4, "context_length": 512},
            {
                "steps": 3,
                "context_length": 1024,
                "yarn": {"factor": 4, "original_context": 256},
                "learning_rate": 2e-4,
                "data": MIXED,
                "mesh": {"context_parallel_degree": 2},
            },
            {"steps": 2, "context_length": 512, "rope_base": 5e5},
            cluster={"num_workers": 2},
        )
    )
    stages = parsed.in_stages()
    assert [(s.number, s.first_step, s.last_step) for s in stages] == [
        *((0, 0, 10), (1, 10, 14)),
        *((2, 14, 17), (3, 17, 19)),
    ]
    assert [s.data.context_length for s in stages] == [256, 512, 1024, 512]
    # A schedule reaches to the next stage that has one.
    assert [(s.schedule_start, s.schedule_end) for s in stages] == [(0, 14)] * 2 + [(14, 19)] * 2
    optimizers = [s.train.optimizer for s in stages]
    assert [o.learning_rate for o in optimizers] == [1e-3, 1e-3, 2e-4, 2e-4]
    assert [o.warmup_steps for o in optimizers] == [2, 2, 0, 0]
    assert [s.train.sequences_per_microbatch for s in stages] == [2, 1, 1, 1]
    assert [s.train.mesh.context_parallel_degree for s in stages] == [1, 1, 2, 2]
    assert [s.data.path for s in stages] == ["data", "data", "long", "long"]
    assert [len(s.data.mixture) for s in stages] == [0, 0, 1, 1]
    assert len({s.data.seed for s in stages}) == 4
    assert parsed.model is not None
    models = [s.model_of(parsed.model) for s in stages]
    assert models[0] == parsed.model
    assert [m.max_context for m in models] == [512, 512, 1024, 1024]
    assert [m.yarn.factor if m.yarn else None for m in models] == [None, None, 4, 4]
    assert [m.rope_base for m in models] == [1e4, 1e4, 1e4, 5e5]
    assert locations(parsed)["stages.1.data.mixture.0.path"] == ("short",)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"context_length": 512}, "stages.0.steps: is required"),
        ({"steps": 1, "context_lenght": 9}, "stages.0.context_lenght: unknown key; did you mean"),
        ({"steps": 1, "context_length": 768}, "stages.0: train.tokens_per_step=2048 must be a"),
        (
            {"steps": 1, "context_length": 512, "warmup_steps": 3},
            "stages.0: warmup_steps=3 needs the learning_rate of a schedule",
        ),
        (
            {
                "steps": 1,
                "context_length": 2048,
                "yarn": {"factor": 4, "original_context": 256},
            },
            "stages.0: context_length=2048 must not exceed yarn.factor=4 x yarn.original_context",
        ),
        (
            {"steps": 1, "context_length": 512, "mesh": {"tensor_parallel_degree": 2}},
            "stages.0: train.mesh: num_workers=1 must be a multiple",
        ),
    ],
)
def test_a_wrong_stage_is_named(stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PretrainRun.parse(run(stage), source="x.yaml")
    assert said in str(caught.value)


def test_a_mesh_that_the_model_does_not_fit_is_named() -> None:
    stage = {"steps": 1, "context_length": 512, "mesh": {"tensor_parallel_degree": 4}}
    with pytest.raises(ConfigError, match=r"stages\.0\.mesh: tensor_parallel_degree=4 must divide"):
        PretrainRun.parse(run(stage, cluster={"num_workers": 4}))
