"""What workers may share, as cases: models, meshes, and two steps from which gradients are seen."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
from tests.platform.train.tiny_run import CONTEXT, MOE, VOCAB, full, settings, this_world

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


def mesh_settings(mesh: dict[str, int], **changes: Any) -> TrainConfig:
    # One row a microbatch: the balance loss, a mean over each, then knows no number of workers.
    return settings(
        parallel="shard",
        sequences_per_microbatch=1,
        tokens_per_step=4 * CONTEXT,
        mesh=mesh,
        **changes,
    )


def two_steps(
    model_config: ModelConfig, config: TrainConfig, data: LoaderConfig, *, device: str = "cpu"
) -> dict[str, Any]:
    """Plain gradient descent, so that weights tell gradients apart from their multiples."""
    world = this_world(device)
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
        device=world.device,
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


def save_steps(
    cases: Iterable[tuple[str, str]],
    folder: Path,
    data: LoaderConfig,
    *,
    models: Mapping[str, ModelConfig] = MODELS,
    device: str = "cpu",
) -> None:
    """Take the two steps of each case (model, mesh); the first worker writes what they gave."""
    for model, mesh in cases:
        config = mesh_settings(MESHES[mesh], lora=LORA if model == "lora" else None)
        found = two_steps(models.get(model, models["nsa"]), config, data, device=device)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{model}-{mesh}-{dist.get_world_size()}.pt")


def assert_four_are_as_one(folder: Path, model: str, mesh: str, *, rounding: float) -> None:
    """What four workers have written is what one has: all numbers of each step, and weights."""
    alone = torch.load(folder / f"{model}-shard-1.pt", map_location="cpu")
    shared = torch.load(folder / f"{model}-{mesh}-4.pt", map_location="cpu")
    for step, reference in zip(shared["steps"], alone["steps"], strict=True):
        for value, wanted in zip(step, reference, strict=True):
            torch.testing.assert_close(value, wanted, rtol=rounding, atol=0)
    assert shared["answers"] == alone["answers"]
    for needles in (shared["needles"], alone["needles"]):
        assert needles == ([[1.0], [1.0], [0.0]], 12 / 13)
    assert shared["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(
            shared["weights"][name],
            weight,
            rtol=0,
            atol=rounding,
            msg=lambda t, n=name: f"{n}: {t}",
        )
