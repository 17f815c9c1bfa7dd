"""Look at what a model's selection finds in real text: the attention that its blocks hold, and how
far the gates of the branches are open.

    python -m jobs.mechanism runs/nsa-150m/model runs/data/pretrain out --length 8192 --texts 8

MODEL is an exported NSA model, DATA a folder of prepare_data with its tokenizer: held-out rows are
read, each as one text. Writes mechanism.json, attention_held.png and block_attention.png below
OUTPUT.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from jobs.cli import fail, interruptible
from jobs.evaluation_inputs import held_out_origin, held_out_parser, held_out_texts
from jobs.places import check_output
from nsa_platform import figures, storage
from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.mechanism import LayerRecall, Mechanism, look
from nsa_platform.model.weights import load_model
from nsa_platform.train.metrics import device_name

SHARE = "share of the attention"
RECALL = "of what the best blocks hold"
GATE = "gate"
SHOWN = (RECALL, GATE)
SHOWN_LAYERS = 4


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Look, write and print."""
    parser = held_out_parser(__doc__)
    parser.add_argument("--queries", type=int, default=64, help="positions looked at in each")
    options = parser.parse_args(argv)
    for name in ("length", "texts", "queries"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    try:
        record = measure(
            options.model,
            options.data,
            options.output,
            length=options.length,
            texts=options.texts,
            queries=options.queries,
            origin=held_out_origin("mechanism", argv),
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    for each in record["records"]:
        if each["unit"] in SHOWN:
            print(f"{each['name']}: {each['value']:.1%}, {each['unit']}")


def measure(
    model_folder: str,
    data: str,
    output: str,
    *,
    length: int,
    texts: int,
    queries: int,
    origin: dict[str, str],
) -> dict[str, Any]:
    """Look at held-out rows, write the record and its pictures, return the record.

    Args:
        origin: of the record, by held_out_origin.

    Raises:
        ValueError, OSError: model, data and sizes do not fit, or cannot be read or written.
    """
    check_output(output)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model, tokenizer = load_model(model_folder, device=device, dtype=dtype), Tokenizer(model_folder)
    if length > model.config.max_context:
        raise ValueError(
            f"--length={length} must not exceed {model.config.max_context}, the model's max_context"
        )
    rows = held_out_texts(data, tokenizer, length=length, texts=texts)
    seen = [look(model, row.ids.to(device), queries=queries) for row in rows]
    attention = model.config.attention
    assert isinstance(attention, NsaAttentionConfig)
    means = _means(seen)
    record = {
        "model": model.config.name,
        "device": device_name(model.embedding.weight.device),
        **origin,
        "length": length,
        "texts": len(seen),
        "queries": sum(len(each.queries) for each in seen),
        "num_selected_blocks": attention.num_selected_blocks,
        "selection_block_size": attention.selection_block_size,
        "records": _records(means, _gates(seen)),
    }
    _draw(output, means, seen[0], record)
    storage.write_text(storage.join(output, "mechanism.json"), json.dumps(record, indent=1) + "\n")
    return record


def _means(seen: Sequence[Mechanism]) -> dict[int, LayerRecall]:
    """Over texts, all of which have as many queries."""
    return {
        layer: LayerRecall(
            chosen=fmean(each.layers[layer].chosen for each in seen),
            best=fmean(each.layers[layer].best for each in seen),
            forced=fmean(each.layers[layer].forced for each in seen),
        )
        for layer in seen[0].layers
    }


def _gates(seen: Sequence[Mechanism]) -> dict[int, dict[str, float]]:
    """Over texts, all of which have as many tokens."""
    return {
        layer: {branch: fmean(each.gates[layer][branch] for each in seen) for branch in of_branches}
        for layer, of_branches in seen[0].gates.items()
    }


def _records(
    means: dict[int, LayerRecall], gates: dict[int, dict[str, float]]
) -> list[dict[str, Any]]:
    """By layer, and the gates once more as means over layers."""
    found = []
    for layer, held in means.items():
        found += [(f"layer_{layer}/{name}", share, SHARE) for name, share in asdict(held).items()]
        found.append((f"layer_{layer}/recall", held.recall, RECALL))
        found += [(f"layer_{layer}/{name}", gate, GATE) for name, gate in gates[layer].items()]
    for branch in gates[0]:
        found.append((branch, fmean(each[branch] for each in gates.values()), GATE))
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in found]


def _draw(
    output: str, means: dict[int, LayerRecall], first: Mechanism, record: dict[str, Any]
) -> None:
    title = f"{record['model']}, {record['length']:,} tokens"
    count = record["num_selected_blocks"]
    held = {layer: (each.chosen, each.best, each.forced) for layer, each in means.items()}
    layers = sorted(first.maps)
    # Layers from the first to the last in equal steps.
    shown = {layers[i * (len(layers) - 1) // max(1, SHOWN_LAYERS - 1)] for i in range(SHOWN_LAYERS)}
    drawn = {
        "attention_held.png": figures.attention_held(
            held, title=f"Attention held by {count} blocks: {title}"
        ),
        "block_attention.png": figures.block_attention(
            {layer: first.maps[layer].tolist() for layer in shown},
            first.queries.tolist(),
            block=record["selection_block_size"],
            title=f"True attention by block: {title}, one held-out text",
        ),
    }
    for name, figure in drawn.items():
        storage.write_bytes(storage.join(output, name), figures.png(figure))


if __name__ == "__main__":
    main()
