"""Which blocks a trained model chooses for a text, and how many of them neighbours share.

    PYTHONPATH=platform:kernels:. python3 kernels/benchmarks/trained.py MODEL TEXT [--tokens 65536]

MODEL is the folder of an exported NSA model with its tokenizer, TEXT a file of at least as many
tokens as asked for. Writes results/block_overlap.json, which RESULTS.md shows and from which the
benchmark's own choices are set; --npz keeps the choices themselves, for overlap.py.
Needs the platform's packages beside torch and triton.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench import ROOT, save, stamp
from benchmarks.overlap import Overlap, measure_overlap
from nsa_kernels import NsaConfig, compressed_attention, nsa_attention, select_blocks
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model import attention
from nsa_platform.model.compression import kernel_config
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import load_model

Record = dict[str, Any]


@torch.no_grad()
def recorded_choices(model: Transformer, ids: Tensor) -> list[Tensor]:
    """Blocks int32 [T, G, n] that each layer chooses for one sequence of token ids."""
    choices: list[Tensor] = []

    def recording(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        _, lse = compressed_attention(q, k_cmp, v_cmp, **options)
        choices.append(select_blocks(q, k_cmp, lse, **options))
        return nsa_attention(q, k_cmp, v_cmp, *rest, **options)

    with mock.patch.object(attention, "nsa_attention", recording):
        model(ids, PackedInputs.from_lengths([len(ids)], device=ids.device))
    return choices


def overlap_records(choices: list[Tensor], config: NsaConfig, model: str) -> list[Record]:
    """The mean of all layers, and the layers whose neighbours share least and most.

    Args:
        model: what the model is, for who reads the records.
    """
    found = [measure_overlap(chosen, config) for chosen in choices]
    order = sorted(range(len(found)), key=lambda layer: found[layer].union[16])
    spans = found[0].union
    mean = Overlap(
        kept=sum(each.kept for each in found) / len(found),
        union={span: sum(each.union[span] for each in found) / len(found) for span in spans},
        distance=[sum(q) / len(found) for q in zip(*(e.distance for e in found), strict=True)],
    )
    context = f"trained, {len(choices[0]) // 1024}k"
    shown = {
        f"{context}, mean of {len(found)} layers": mean,
        f"{context}, layer {order[0]}, which shares most": found[order[0]],
        f"{context}, layer {order[-1]}, which shares least": found[order[-1]],
    }
    return [
        {
            "name": f"overlap/{name}",
            "value": each.kept,
            "unit": "share",
            "union": {str(span): size for span, size in each.union.items()},
            "distance": each.distance,
            "model": model,
        }
        for name, each in shown.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "block_overlap.json")
    parser.add_argument("--npz", type=Path)
    parser.add_argument("--commit", help="what to call this version where git cannot tell")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ids = Tokenizer(arguments.model).encode(arguments.text.read_text(encoding="utf-8"))
    if len(ids) < arguments.tokens:
        print(f"trained: {arguments.text} has {len(ids)} tokens only", file=sys.stderr)
        return 2
    model = load_model(arguments.model, device=torch.device(device), dtype=dtype)
    attended = model.config.attention
    if attended.kind != "nsa":
        print(f"trained: {arguments.model} has {attended.kind} attention", file=sys.stderr)
        return 2
    choices = recorded_choices(model, torch.tensor(ids[: arguments.tokens], device=device))
    records = overlap_records(choices, kernel_config(attended), model.config.name)
    for record in records:
        print(record["name"], f"kept {record['value']:.3f}", record["union"])
    about = stamp(device, arguments.commit, "python kernels/benchmarks/trained.py MODEL TEXT")
    save([{**record, **about} for record in records], arguments.json)
    if arguments.npz:
        names = {f"layer{i}": c.short().cpu().numpy() for i, c in enumerate(choices)}
        np.savez_compressed(arguments.npz, **names)  # pyright: ignore[reportArgumentType]
    return 0


if __name__ == "__main__":
    sys.exit(main())
