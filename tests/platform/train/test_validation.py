"""Held-out loss by position, against each token's own loss."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from nsa_platform.data.loader import Loader
from nsa_platform.data.shards import open_split
from nsa_platform.train.build import build_mesh, build_model
from nsa_platform.train.loss import IGNORED
from nsa_platform.train.validation import Validation, position_edges
from tests.platform.train.tiny_run import CONTEXT, MODEL, settings, this_world, write_data


def test_parts_of_a_longer_context_are_those_of_a_shorter_one_and_more() -> None:
    assert position_edges(128) == [0, 16, 32, 64, 128]
    assert position_edges(1024)[:4] == position_edges(128)[:4]
    assert position_edges(48) == [0, 16, 32, 48]
    assert position_edges(16) == [0, 16]


@pytest.mark.usefixtures("process_group")
def test_loss_by_position_is_the_mean_of_the_tokens_there(tmp_path: Path) -> None:
    data, config, world = write_data(tmp_path), settings(), this_world()
    mesh = build_mesh(MODEL, config, context_length=CONTEXT, world=world)
    model = build_model(MODEL, config, world=world, mesh=mesh)
    shards = open_split(data, "validation")
    validation = Validation(
        shards,
        data,
        tokens=5 * CONTEXT,
        rows_per_microbatch=2,
        world=world,
        mesh=mesh,
        token_bytes=None,
    )
    metrics = validation.run(model).metrics()
    (batch,) = Loader(shards, data, rows_per_microbatch=validation.rows).next_step(validation.rows)
    with torch.no_grad():
        logits = model.logits(model(batch.ids, mesh.inputs(batch)).hidden)
    losses = functional.cross_entropy(logits, batch.targets, reduction="none")
    counts = batch.targets != IGNORED
    for begin, end in ((0, 16), (16, 32), (32, 48)):
        there = counts & (batch.positions >= begin) & (batch.positions < end)
        assert metrics.pop(f"valid/loss_at/{end}") == pytest.approx(losses[there].mean().item())
    assert metrics == {"valid/loss": pytest.approx(losses[counts].mean().item())}
