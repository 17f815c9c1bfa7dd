"""Whatever four workers share, they compute what one computes: losses, gradients, norms."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.train import NeedleCurveConfig, TrainConfig
from nsa_platform.data.haystack import Haystack
from nsa_platform.data.loader import Loader
from nsa_platform.data.shards import open_split
from nsa_platform.model.greedy import continue_greedily
from nsa_platform.train.build import build_mesh, build_model
from nsa_platform.train.guard import Guard
from nsa_platform.train.needles import Needles
from nsa_platform.train.progress import Progress
from nsa_platform.train.step import take_step
from tests.platform.train.tiny_run import (
    CONTEXT,
    MOE,
    VOCAB,
    full,
    run,
    settings,
    this_world,
    write_data,
)
from tests.platform.train.workers import start_workers

# The same sums in another order: float32 with a few hundred terms.
ROUNDING = 2e-5

NSA = ModelConfig.parse(
    MOE.model_dump()
    | {"moe": MOE.model_dump()["moe"] | {"balance_loss": 0.3, "bias_update_rate": 0.05}}
)
HEADS = {"query_heads": 4, "kv_heads": 2, "key_width": 8, "value_width": 8}
SHARED = {"branch_kv": "shared", "compressed_rotary": "before"}
QWEN = {"qk_norm": True, "qkv_bias": True}
MODELS = {
    "nsa": NSA,
    "full": ModelConfig.parse(
        MOE.model_dump() | {"attention": {"kind": "full", "gated": True, **HEADS, **QWEN}}
    ),
    "shared": ModelConfig.parse(
        MOE.model_dump() | {"attention": MOE.attention.model_dump() | SHARED}
    ),
}
MLA = {"kind": "mla", "query_heads": 4, "kv_lora_rank": 8, "key_width": 8, "rotary_width": 4}
MODELS["mla"] = ModelConfig.parse(NSA.model_dump() | {"attention": {**MLA, "value_width": 8}})
LORA = {"rank": 4, "modules_to_save": ["gate", "compression", "norm"]}
# Warm-up to the end: the rate of a step then does not know how long the run is.
RATES = {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 6}}

MESHES: dict[str, dict[str, int]] = {
    "shard": {},
    "replicate": {"data_parallel_replicate_degree": 2},
    "context": {"context_parallel_degree": 2},
    "context-of-kin": {"context_parallel_degree": 4},
    "tensor": {"tensor_parallel_degree": 2},
    "expert": {"expert_parallel_degree": 2},
    "all-experts": {"expert_parallel_degree": 4},
    "context+tensor": {"context_parallel_degree": 2, "tensor_parallel_degree": 2},
    "context+expert": {"context_parallel_degree": 2, "expert_parallel_degree": 2},
    "context+replicate": {"context_parallel_degree": 2, "data_parallel_replicate_degree": 2},
    "tensor+expert": {"tensor_parallel_degree": 2, "expert_parallel_degree": 4},
    "tensor+replicate": {"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 2},
    "expert+replicate": {"expert_parallel_degree": 2, "data_parallel_replicate_degree": 2},
}
CASES = [
    *(("nsa", mesh) for mesh in MESHES),
    ("full", "context-of-kin"),
    ("full", "context+tensor"),
    ("shared", "context-of-kin"),
    ("mla", "context+tensor"),
    *(("lora", mesh) for mesh in ("context-of-kin", "all-experts", "context+tensor")),
    *(("lora", mesh) for mesh in ("tensor+expert", "expert+replicate")),
]


def _settings(mesh: dict[str, int], **changes: Any) -> TrainConfig:
    # One row a microbatch: the balance loss, a mean over each, then knows no number of workers.
    return settings(
        parallel="shard",
        sequences_per_microbatch=1,
        tokens_per_step=4 * CONTEXT,
        mesh=mesh,
        **changes,
    )


def _two_steps(
    model_config: ModelConfig, config: TrainConfig, data: LoaderConfig
) -> dict[str, Any]:
    """Plain gradient descent, so that weights tell gradients apart from their multiples."""
    world = this_world()
    mesh = build_mesh(model_config, config, context_length=CONTEXT, world=world)
    model = build_model(model_config, config, world=world, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    descent = torch.optim.SGD(trained, lr=0.5, foreach=False)
    loader = Loader(open_split(data, "train"), data, rank=mesh.data_rank, world_size=mesh.data_size)
    parts = {
        "config": config,
        "world": world,
        "mesh": mesh,
        "progress": Progress(Guard(config.guard)),
    }
    results = [take_step(model, descent, loader.next_step(4), **parts) for _ in range(2)]
    answers = continue_greedily(
        model.eval(),
        [[5, 6, 7], [9] * 8],
        max_new_tokens=5,
        stop_ids=(),
        partition=mesh.partition,
        agreed=world.of_first,
    )
    # What greedy decoding writes is found; with another last token it is not.
    wrong = [*answers[0][:2], (answers[0][2] + 1) % VOCAB]
    told = [([5, 6, 7], answers[0]), ([9] * 8, answers[1]), ([5, 6, 7], wrong)]
    texts = [Haystack(prompt, [], answer, "", 0) for prompt, answer in told]
    asked = NeedleCurveConfig(lengths=(64,), depths=(0.0, 0.5, 1.0))
    needles = Needles(texts, asked, asked.lengths, world=world, mesh=mesh).find(model)
    return {
        "answers": answers,
        "needles": (needles.exact, needles.tokens),
        "steps": [
            [torch.tensor(r.loss), r.balance_loss, r.grad_norm, r.expert_load] for r in results
        ],
        "weights": {name: full(p) for name, p in model.named_parameters()},
    }


def _worker(rank: int, size: int, folder: str, data: LoaderConfig) -> None:
    meeting = (Path(folder) / f"group-{size}").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    cases = [(model, "shard") for model in (*MODELS, "lora")] if size == 1 else CASES
    for model, mesh in cases:
        config = _settings(MESHES[mesh], lora=LORA if model == "lora" else None)
        found = _two_steps(MODELS.get(model, NSA), config, data)
        if rank == 0:
            torch.save(found, Path(folder) / f"{model}-{mesh}-{size}.pt")
    if size == 1:
        straight = run(_settings({}, **RATES), data, Path(folder) / "straight", model_config=NSA)
        torch.save(straight.metrics, Path(folder) / "straight.pt")
    else:
        place = Path(folder) / "moving"
        first = _settings(MESHES["expert"], steps=3, activation_checkpointing="selective", **RATES)
        run(first, data, place, model_config=NSA)
        other = _settings(MESHES["context+tensor"], activation_checkpointing="branches", **RATES)
        moved = run(other, data, place, model_config=NSA)
        if rank == 0:
            torch.save(moved.metrics, Path(folder) / "moved.pt")
        _resume_adapters(Path(folder), data)
    dist.destroy_process_group()


def _resume_adapters(folder: Path, data: LoaderConfig) -> None:
    """The whole of a run with adapters beside shared experts, and its two halves."""
    config = _settings(MESHES["expert"], lora=LORA, **RATES)
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
    alone = torch.load(found / f"{model}-shard-1.pt")
    shared = torch.load(found / f"{model}-{mesh}-4.pt")
    for step, reference in zip(shared["steps"], alone["steps"], strict=True):
        for value, wanted in zip(step, reference, strict=True):
            torch.testing.assert_close(value, wanted, rtol=ROUNDING, atol=0)
    assert shared["answers"] == alone["answers"]
    for needles in (shared["needles"], alone["needles"]):
        assert needles == ([[1.0], [1.0], [0.0]], 12 / 13)
    assert shared["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(
            shared["weights"][name],
            weight,
            rtol=0,
            atol=ROUNDING,
            msg=lambda t, n=name: f"{n}: {t}",
        )


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
