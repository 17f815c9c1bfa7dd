"""Whatever four workers share, they compute what one computes: losses, gradients, norms."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nsa_platform.config.data import LoaderConfig
from tests.platform.train.meshes import (
    CASES,
    LORA,
    MESHES,
    MODELS,
    NSA,
    RATES,
    assert_four_are_as_one,
    mesh_settings,
    save_steps,
)
from tests.platform.train.tiny_run import run, write_data
from tests.platform.train.workers import start_workers

# The same sums in another order: float32 with a few hundred terms.
ROUNDING = 2e-5


def _worker(rank: int, size: int, folder: str, data: LoaderConfig) -> None:
    meeting = (Path(folder) / f"group-{size}").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    cases = [(model, "shard") for model in (*MODELS, "lora")] if size == 1 else CASES
    save_steps(cases, Path(folder), data)
    if size == 1:
        straight = run(
            mesh_settings({}, **RATES), data, Path(folder) / "straight", model_config=NSA
        )
        torch.save(straight.metrics, Path(folder) / "straight.pt")
    else:
        place = Path(folder) / "moving"
        first = mesh_settings(
            MESHES["expert"], steps=3, activation_checkpointing="selective", **RATES
        )
        run(first, data, place, model_config=NSA)
        other = mesh_settings(
            MESHES["context+tensor"], activation_checkpointing="branches", **RATES
        )
        moved = run(other, data, place, model_config=NSA)
        if rank == 0:
            torch.save(moved.metrics, Path(folder) / "moved.pt")
        _resume_adapters(Path(folder), data)
    dist.destroy_process_group()


def _resume_adapters(folder: Path, data: LoaderConfig) -> None:
    """The whole of a run with adapters beside shared experts, and its two halves."""
    config = mesh_settings(MESHES["expert"], lora=LORA, **RATES)
    for place, steps in (("whole", 6), ("halves", 3), ("halves", 6)):
        ran = run(
            config.model_copy(update={"steps": steps}), data, folder / place, model_config=NSA
        )
        if dist.get_rank() == 0:
            torch.save(ran, folder / f"{place}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one worker and four workers have computed."""
    folder = tmp_path_factory.mktemp("meshes")
    data = write_data(folder / "data")
    _worker(0, 1, str(folder), data)
    start_workers(_worker, str(folder), data, size=4)
    return folder


@pytest.mark.parametrize(("model", "mesh"), CASES, ids=lambda name: name)
def test_four_workers_compute_what_one_computes(found: Path, model: str, mesh: str) -> None:
    assert_four_are_as_one(found, model, mesh, rounding=ROUNDING)


def test_a_run_goes_on_with_another_mesh(found: Path) -> None:
    straight, moved = torch.load(found / "straight.pt"), torch.load(found / "moved.pt")
    assert sorted(moved) == [4, 5, 6]
    for step, metrics in moved.items():
        for name in ("train/loss", "train/grad_norm", "train/balance_loss"):
            assert metrics[name] == pytest.approx(straight[step][name], rel=ROUNDING)
    for name in ("valid/loss", "valid/bits_per_byte", "nsa/gate_mean/slc/1"):
        assert moved[6][name] == pytest.approx(straight[6][name], rel=ROUNDING)


def test_sharded_adapters_resume_bit_for_bit(found: Path) -> None:
    whole, halves = (
        torch.load(found / f"{name}.pt", weights_only=False) for name in ("whole", "halves")
    )
    assert sorted(halves.metrics) == [4, 5, 6], halves.lines
    assert halves.losses() == whole.losses()[3:]
    for name, weight in whole.weights.items():
        assert weight.equal(halves.weights[name]), name
    stored = FileSystemReader(found / "halves" / "step-00000006").read_metadata()
    assert "model.layers.1.ffn.shared.down.lora_A" in stored.state_dict_metadata
    assert not [name for name in stored.state_dict_metadata if ".experts." in name]
