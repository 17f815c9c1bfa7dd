r"""What a decode step reads and multiplies against the context: arithmetic, no GPU.

    python -m jobs.decode_arithmetic --config jobs/configs/pretrain/nsa_1b.yaml \
        --json results/decode_arithmetic.json --picture docs/decode_arithmetic.png
    python -m jobs.decode_arithmetic --draw results/decode_arithmetic.json --picture X.png

Of the configuration's NSA, of full attention with the same heads, and of MLA with a latent of as
many channels as those keys and values have. The slope is what one more token of context adds to
the bytes, over what it adds with full attention: 1/16 with the paper's stride. Prints the figures;
writes nothing but what --json and --picture name.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.cli import (
    EXIT_BAD_CONFIG,
    fail,
    interruptible,
    read_record,
    record_arguments,
    write_record,
)
from nsa_platform import figures
from nsa_platform.config.base import ConfigError
from nsa_platform.config.model import MlaAttentionConfig, ModelConfig, NsaAttentionConfig
from nsa_platform.config.runs import PretrainRun
from nsa_platform.model.cost import dense_equivalent
from nsa_platform.serve.planning import decode_attention_flops, decode_read_bytes
from nsa_platform.tracking import origin_tags

ROOT = Path(__file__).resolve().parents[1]
NAME = "decode_arithmetic"
CONTEXTS = tuple(1 << exponent for exponent in range(12, 21))


def systems(model: ModelConfig) -> dict[str, ModelConfig]:
    """The models that are compared.

    Raises:
        ValueError: the model has no NSA.
    """
    heads = model.attention
    if not isinstance(heads, NsaAttentionConfig):
        raise ValueError(f"model.attention.kind must be nsa, got {heads.kind}")
    turning = heads.key_width // 2
    latent = MlaAttentionConfig(
        query_heads=heads.query_heads,
        kv_lora_rank=heads.kv_heads * (heads.key_width + heads.value_width) - turning,
        key_width=heads.key_width + turning,
        rotary_width=turning,
        value_width=heads.value_width,
    )
    mla = model.model_copy(update={"attention": latent})
    return {"nsa": model, "full": dense_equivalent(model), "mla": mla}


def record(model: ModelConfig, command: str) -> dict[str, Any]:
    """Bytes, operations and their quotient for every system and context, as one plain tree."""
    records: list[dict[str, Any]] = []
    for system, config in systems(model).items():
        for context in CONTEXTS:
            read = decode_read_bytes(config, context)
            flops = decode_attention_flops(config, context)
            records.append(
                {
                    "name": f"{system}/{context}",
                    "system": system,
                    "context": context,
                    "value": read,
                    "unit": "bytes",
                    "flops": flops,
                    "intensity": flops / read,
                }
            )
        dense = decode_read_bytes(dense_equivalent(model), 1)
        longest = CONTEXTS[-1]
        added = decode_read_bytes(config, longest) - decode_read_bytes(config, longest // 2)
        slope = added / (longest // 2) / dense
        records.append({"name": f"{system}/slope", "value": slope, "unit": "of full attention"})
    return {
        "name": NAME,
        "device": "none: arithmetic",
        "commit": origin_tags("decode_arithmetic", "").get("mlflow.source.git.commit", ""),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "model": model.name,
        "records": records,
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Bytes and intensity against the context, beside what the measured device can do."""
    measured = {
        each["name"]: each["value"]
        for each in json.loads((ROOT / "results" / "kernels.json").read_text(encoding="utf-8"))
    }
    ridge = measured["ceiling/matmul"] / measured["ceiling/copy"]
    points = [each for each in result["records"] if "context" in each]
    lines = {
        system: [
            (each["context"], each["value"], each["intensity"])
            for each in points
            if each["system"] == system
        ]
        for system in dict.fromkeys(each["system"] for each in points)
    }
    title = f"Attention of one decode step, {result['model']}, bfloat16"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figures.png(figures.decode_arithmetic(lines, ridge=ridge, title=title)))


@interruptible("interrupted; the same command begins anew")
def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, metavar="X.yaml", help="a pretraining run")
    record_arguments(parser)
    options = parser.parse_args(argv)
    if (options.config is None) is (options.draw is None):
        parser.error("give either --config or --draw")
    if options.draw is not None and (options.json or not options.picture):
        parser.error("--draw goes with --picture, and not with --json")
    try:
        if options.draw is not None:
            result = read_record(options.draw)
        else:
            model = PretrainRun.load(options.config).model
            if model is None:
                raise ValueError(f"{options.config}: has no model of its own")
            result = record(model, f"python -m jobs.decode_arithmetic --config {options.config}")
        if options.json is not None:
            write_record(result, options.json)
        if options.picture is not None:
            draw(result, options.picture)
    except (ConfigError, ValueError, OSError) as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    except KeyError as error:
        fail(f"{options.draw} says no {error} of its figures", status=EXIT_BAD_CONFIG)
    for each in result["records"]:
        print(f"{each['name']}: {each['value']:,.4g} {each['unit']}")


if __name__ == "__main__":
    main()
