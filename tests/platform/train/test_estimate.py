"""What a run takes, against the model that it builds."""

import pytest
import torch

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.train import ClusterConfig
from nsa_platform.model.transformer import Transformer
from nsa_platform.train.estimate import STATE_BYTES, estimate
from tests.platform.train.tiny_run import CONTEXT, MODEL, MOE, settings

DATA = LoaderConfig(path="unused", context_length=CONTEXT)


@pytest.mark.parametrize("model", [MODEL, MOE])
def test_state_is_that_of_the_built_model(model) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(model).parameters())
    plan = estimate(model, DATA, settings(), ClusterConfig(num_workers=2))
    assert plan.parallel == "replicate"
    assert plan.parameters.total == parameters
    assert plan.state_bytes == STATE_BYTES * parameters


def test_shards_share_the_state() -> None:
    alone = estimate(MODEL, DATA, settings(), ClusterConfig())
    shared = estimate(MODEL, DATA, settings(), ClusterConfig(num_workers=2, use_gpu=True))
    assert shared.parallel == "shard"
    assert shared.state_bytes == alone.state_bytes // 2
    assert (alone.microbatches, shared.microbatches) == (4, 2)


def test_a_mesh_deals_rows_and_holds_copies() -> None:
    mesh = {"context_parallel_degree": 2, "data_parallel_replicate_degree": 2}
    alone = estimate(MODEL, DATA, settings(), ClusterConfig())
    plan = estimate(MODEL, DATA, settings(mesh=mesh), ClusterConfig(num_workers=8))
    assert plan.parallel == "shard"
    assert plan.state_bytes == alone.state_bytes // 4
    assert plan.microbatches == 1
    assert plan.activation_bytes == alone.activation_bytes // 2
    assert plan.mesh == "replicate 2, context 2, state over 4"
    assert alone.mesh == ""


def test_totals_and_what_makes_activations_small() -> None:
    plan = estimate(MODEL, DATA, settings(steps=10), ClusterConfig())
    assert plan.tokens == 10 * 8 * CONTEXT
    assert plan.flops_per_step > 6 * plan.parameters.total * 0.5 * 8 * CONTEXT
    kept = [
        estimate(
            model, DATA, settings(activation_checkpointing=mode), ClusterConfig()
        ).activation_bytes
        for model in (MODEL.model_copy(update={"layers": 8}),)
        for mode in ("none", "selective", "branches", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_layers_that_compute_nothing_again_keep_everything() -> None:
    model = MODEL.model_copy(update={"layers": 9})

    def kept(*modes: str) -> int:
        config = settings(activation_checkpointing=modes)
        return estimate(model, DATA, config, ClusterConfig()).activation_bytes

    by_every = [kept("full"), kept("full", "none"), kept("full", "none", "none")]
    assert by_every == sorted(by_every)
    # 9, 5 and 3 layers keep their input alone.
    assert (by_every[2] - by_every[1]) * 4 == (by_every[1] - by_every[0]) * 2
    assert kept("none", "none") == kept("none")
    assert kept("full", "full") == kept("full")
    assert kept("full") < kept("full", "branches") < kept("branches")
