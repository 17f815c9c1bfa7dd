"""Quality against blocks read: one NSA model, fixed numbers of blocks beside adaptive ones.

    python -m jobs.adaptive runs/nsa-150m/model runs/data/pretrain out --length 8192 \
        --num-blocks 4 8 16 --top-p 0.5 0.7 0.9

MODEL is an exported NSA model, DATA a folder of prepare_data with its tokenizer: held-out rows are
read. Adaptive numbers are capped at the largest of --num-blocks. Writes adaptive.json and
adaptive.png below OUTPUT.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from jobs.cli import fail, interruptible
from jobs.evaluation_inputs import held_out_origin, held_out_parser, held_out_texts
from jobs.places import check_output
from nsa_platform import figures, storage
from nsa_platform.config.model import AttentionConfig, NsaAttentionConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.adaptive import Reading, read
from nsa_platform.model.weights import load_model
from nsa_platform.train.metrics import device_name

UNIT = "bits per byte"


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Score, print and write."""
    parser = _parser()
    options = parser.parse_args(argv)
    for name in ("length", "texts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    try:
        measure(
            options.model,
            options.data,
            options.output,
            length=options.length,
            texts=options.texts,
            num_blocks=options.num_blocks,
            top_ps=options.top_p,
            origin=held_out_origin("adaptive", argv),
        )
    except (ValueError, OSError) as error:
        fail(str(error))


def measure(
    model_folder: str,
    data: str,
    output: str,
    *,
    length: int,
    texts: int,
    num_blocks: Sequence[int],
    top_ps: Sequence[float],
    origin: dict[str, str],
) -> dict[str, Any]:
    """Score held-out rows at every number and every share, say each result, write and return the
    record.

    Args:
        origin: of the record, by held_out_origin.

    Raises:
        ValueError, OSError: model, data and numbers do not fit, or cannot be read or written.
    """
    check_output(output)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model, tokenizer = load_model(model_folder, device=device, dtype=dtype), Tokenizer(model_folder)
    if length > model.config.max_context:
        raise ValueError(
            f"--length={length} must not exceed {model.config.max_context}, the model's max_context"
        )
    _check_blocks(model.config.attention, num_blocks)
    batches = held_out_texts(data, tokenizer, length=length, texts=texts)
    most = max(num_blocks)
    wanted = [(count, None) for count in num_blocks] + [(most, share) for share in top_ps]
    score = partial(read, model, batches, tokenizer.token_bytes(), context_length=length)
    points = [_told(score(num_blocks=count, top_p=share)) for count, share in wanted]
    record = {
        "model": model.config.name,
        "device": device_name(model.embedding.weight.device),
        **origin,
        "length": length,
        "texts": len(batches),
        "records": [_record(point) for point in points],
    }
    lines = {
        "fixed": [(p.blocks, p.bits_per_byte) for p in points if p.selection_top_p is None],
        "adaptive": [(p.blocks, p.bits_per_byte) for p in points if p.selection_top_p is not None],
    }
    title = f"Quality against blocks read: {model.config.name}, {length:,} tokens"
    drawn = figures.quality_by_blocks(lines, title=title)
    storage.write_bytes(storage.join(output, "adaptive.png"), figures.png(drawn))
    storage.write_text(storage.join(output, "adaptive.json"), json.dumps(record, indent=1) + "\n")
    return record


def _told(point: Reading) -> Reading:
    """The same, printed."""
    name = _record(point)["name"]
    print(f"{name}: {point.blocks:.2f} blocks a query, {point.bits_per_byte:.4f} {UNIT}")
    return point


def _record(point: Reading) -> dict[str, Any]:
    top_p, most = point.selection_top_p, point.num_selected_blocks
    return {
        "name": f"all of {most}" if top_p is None else f"top-p {top_p:g} of {most}",
        "value": point.bits_per_byte,
        "unit": UNIT,
        "blocks": point.blocks,
        "num_selected_blocks": most,
        "selection_top_p": top_p,
    }


def _check_blocks(attention: AttentionConfig, num_blocks: Sequence[int]) -> None:
    """A query reads its forced blocks in any case."""
    if not isinstance(attention, NsaAttentionConfig):
        raise ValueError(f"the model has attention.kind={attention.kind}: it selects no blocks")
    forced = attention.num_initial_blocks + attention.num_local_blocks
    if min(num_blocks) < forced:
        raise ValueError(
            f"--num-blocks={min(num_blocks)} must be at least {forced}, the model's "
            "num_initial_blocks + num_local_blocks"
        )


def _parser() -> argparse.ArgumentParser:
    parser = held_out_parser(__doc__)
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--top-p", type=_share, nargs="*", default=[0.5, 0.7, 0.9])
    return parser


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return share


if __name__ == "__main__":
    main()
