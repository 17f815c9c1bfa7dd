"""Training on a GPU: sharded and compiled, with several checkpoints in one process."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nsa_platform.config.model import ModelConfig
from tests.platform.train.tiny_run import MODEL, run, settings, write_data

pytestmark = pytest.mark.gpu

# Widths that the kernels take.
WIDE = ModelConfig.parse(
    MODEL.model_dump()
    | {"attention": MODEL.attention.model_dump() | {"key_width": 16, "value_width": 16}}
)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=(tmp_path / "meeting").as_uri(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("parallel", "dtype"), [("replicate", "float32"), ("shard", "bfloat16")])
def test_a_run_goes_on_from_its_second_checkpoint(
    parallel: str, dtype: str, process_group: None, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data")
    changes = {"parallel": parallel, "dtype": dtype, "checkpoint": {"every_steps": 2}}
    place = {"model_config": WIDE, "device": "cuda:0"}
    straight = run(settings(**changes), data, tmp_path / "straight", **place)
    assert straight.lines == []
    assert straight.losses()[-1] < straight.losses()[0]
    shutil.copytree(tmp_path / "straight" / "step-00000004", tmp_path / "again" / "step-00000004")
    resumed = run(settings(**changes), data, tmp_path / "again", **place)
    assert sorted(resumed.metrics) == [5, 6]
    assert resumed.losses() == straight.losses()[4:]
