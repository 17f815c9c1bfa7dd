"""Whatever four GPUs share, by NCCL, they compute what one of them computes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from tests.platform.train.meshes import CASES, MODELS, assert_four_are_as_one, save_steps
from tests.platform.train.tiny_run import write_data
from tests.platform.train.workers import start_workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs"),
]

# Products of a GPU are cut into tiles by their sizes, which differ between one worker and four.
ROUNDING = 1e-4

# Widths that the kernels take.
WIDE = {
    name: ModelConfig.parse(
        model.model_dump()
        | {"attention": model.attention.model_dump() | {"key_width": 16, "value_width": 16}}
    )
    for name, model in MODELS.items()
    if name != "mla"
}
WIDE_CASES = [(model, mesh) for model, mesh in CASES if model != "mla"]


def _worker(rank: int, size: int, folder: str, data: LoaderConfig) -> None:
    device = f"cuda:{rank}"
    torch.cuda.set_device(device)
    meeting = (Path(folder) / f"group-{size}").as_uri()
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meeting, rank=rank, world_size=size)
    cases = [(model, "shard") for model in (*WIDE, "lora")] if size == 1 else WIDE_CASES
    save_steps(cases, Path(folder), data, models=WIDE, device=device)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one GPU and four GPUs have computed."""
    folder = tmp_path_factory.mktemp("gpus")
    data = write_data(folder / "data")
    for size in (1, 4):
        start_workers(_worker, str(folder), data, size=size)
    return folder


@pytest.mark.parametrize(("model", "mesh"), WIDE_CASES, ids=lambda name: name)
def test_four_gpus_compute_what_one_computes(found: Path, model: str, mesh: str) -> None:
    assert_four_are_as_one(found, model, mesh, rounding=ROUNDING)
