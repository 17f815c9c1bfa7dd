"""Plans: by hand where they can be, against the real cache where they cannot."""

import json
from pathlib import Path

import pytest
import torch

from jobs import decode_arithmetic, plan
from nsa_platform import storage
from nsa_platform.config.base import ConfigError
from nsa_platform.config.model import ModelConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.config.train import TrackingConfig
from nsa_platform.model.cost import count_parameters, dense_equivalent
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import export_model
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.planning import GPUS, Gpu, decode_read_bytes, plan_serving, reserved_bytes
from nsa_platform.tracking import open_run, register_model

ROOT = Path(__file__).resolve().parents[2]
NSA_1B = ROOT / "jobs/configs/pretrain/nsa_1b.yaml"


MLA = {"kind": "mla", "query_heads": 32, "kv_lora_rank": 192, "key_width": 128, "value_width": 64}

MOBA = {"kind": "moba", "query_heads": 32, "kv_heads": 2}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return plan.read_sizes(NSA_1B, [])[0]


def test_what_a_decode_reads_is_the_papers_sum(model):
    # 24 layers, 2 heads, 128 + 128 wide, 2 bytes: 24,576 bytes a key.
    tokens = 65536
    keys = (tokens - 32) // 16 + 1 + 16 * 64 + 512
    assert decode_read_bytes(model, tokens) == 24_576 * keys
    dense = decode_read_bytes(dense_equivalent(model), tokens)
    assert dense == 24_576 * tokens
    # Section 3 of the paper's arithmetic: 11.6 times fewer at 64k.
    assert dense / decode_read_bytes(model, tokens) == pytest.approx(11.6, abs=0.1)
    assert decode_read_bytes(model, 20) == 24_576 * 40


def test_the_recorded_arithmetic_is_that_of_today(model):
    stored = json.loads((ROOT / "results" / "decode_arithmetic.json").read_text())
    found = decode_arithmetic.record(model, stored["command"])["records"]
    assert found == stored["records"]
    values = {each["name"]: each for each in found}
    # One pair of keys and values for each 16 tokens; 32 heads share two of them.
    assert values["nsa/slope"]["value"] == pytest.approx(1 / 16)
    assert values["nsa/65536"]["intensity"] == values["full/65536"]["intensity"] == 16
    # MLA reads as much here, for 32 heads at once: 2 x 32 x (512 + 448) of 512 x 2 bytes.
    assert values["mla/65536"]["value"] == values["full/65536"]["value"]
    assert values["mla/65536"]["intensity"] == pytest.approx(60)


def test_the_arithmetic_is_written_where_it_is_told_alone(tmp_path: Path) -> None:
    kept = {path: path.read_bytes() for path in (ROOT / "results").glob("decode_*")}
    kept |= {path: path.read_bytes() for path in (ROOT / "docs").glob("decode_*")}
    made, picture = tmp_path / "a.json", tmp_path / "a.png"
    smoke = ["--config", str(ROOT / "jobs/configs/pretrain/smoke.yaml")]
    decode_arithmetic.main(smoke)
    decode_arithmetic.main([*smoke, "--json", str(made)])
    assert json.loads(made.read_text())["records"] and not picture.exists()
    decode_arithmetic.main(["--draw", str(made), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(kept) == 2 and all(path.read_bytes() == content for path, content in kept.items())


def test_a_latent_cache_holds_and_reads_its_latents_alone(model):
    latent = ModelConfig.parse(model.model_dump() | {"attention": MLA})
    # 24 layers, 192 + 64 channels, 2 bytes.
    assert decode_read_bytes(latent, 1000) == 12_288 * 1000
    found = plan_serving(latent, GPUS["H100"], EngineConfig(max_num_seqs=4), context=32768)
    assert found.sequence.total == 12_288 * 32768
    with pytest.raises(ValueError, match=r"kv_cache_dtype=fp8 takes a model .*kind=nsa or full"):
        plan_serving(
            latent, GPUS["H100"], EngineConfig(max_num_seqs=4, kv_cache_dtype="fp8"), context=32768
        )
    with pytest.raises(ValueError, match=r"kv_cache_dtype=fp8 takes a GPU .* 8\.9"):
        plan_serving(
            model, GPUS["A100"], EngineConfig(max_num_seqs=4, kv_cache_dtype="fp8"), context=32768
        )
    blocks = ModelConfig.parse(model.model_dump() | {"attention": MOBA})
    with pytest.raises(ValueError, match="kind=moba has no cache"):
        plan_serving(blocks, GPUS["H100"], EngineConfig(max_num_seqs=4), context=32768)


@pytest.mark.parametrize("context", [32768, 131072])
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_the_cache_is_as_large_as_the_real_one(model, context, dtype):
    engine = EngineConfig(kv_cache_dtype=dtype)
    found = plan_serving(model, GPUS["H100"], engine, context=context)
    real = KvCache(
        model,
        num_tokens=8 * context,
        max_new_tokens=2048,
        max_sequences=8,
        max_step_tokens=2048,
        device=torch.device("meta"),
        dtype=torch.bfloat16,
        kv_dtype=torch.float8_e4m3fn if dtype == "fp8" else None,
    )
    assert found.sequence.total == pytest.approx(real.num_bytes() / 8, rel=0.05)


def test_memory_decides_how_many(model):
    many = EngineConfig(max_num_seqs=1000)
    found = plan_serving(model, GPUS["H100"], many, context=131072)
    assert found.weight_bytes == 2 * count_parameters(model).total
    # As many as an engine with these sizes reserves, prefix cache and all.
    held, one_more = (
        reserved_bytes(model, EngineConfig(), context=131072, sequences=number)
        for number in (found.num_sequences, found.num_sequences + 1)
    )
    assert held <= found.budget_bytes < one_more
    plain = plan_serving(
        model,
        GPUS["H100"],
        EngineConfig(max_num_seqs=1000, enable_prefix_caching=False),
        context=131072,
    )
    assert (found.num_sequences, plain.num_sequences) == (18, 20)
    few = plan_serving(model, GPUS["H100"], EngineConfig(max_num_seqs=4), context=131072)
    assert few.num_sequences == 4
    rounded = plan_serving(
        model, GPUS["H100"], EngineConfig(max_num_seqs=1000, kv_cache_dtype="fp8"), context=131072
    )
    assert 1.7 * found.num_sequences < rounded.num_sequences < 2 * found.num_sequences
    assert rounded.step_s < found.step_s
    twice = plan_serving(model, GPUS["H200"], many, context=131072)
    assert twice.num_sequences > 1.7 * found.num_sequences


def test_gpus_that_share_a_model_hold_a_part_each(model, capsys):
    many = EngineConfig(max_num_seqs=1000)
    one, two = (
        plan_serving(model, GPUS["H100"], many, context=131072, num_ranks=number)
        for number in (1, 2)
    )
    assert two.sequence.total == one.sequence.total // 2
    # Embedding and norms are whole on each.
    assert one.weight_bytes / 2 < two.weight_bytes < 0.55 * one.weight_bytes
    assert two.num_fitting > 2 * one.num_fitting
    assert two.ttft_s < 0.55 * one.ttft_s
    flags = ["--config", str(NSA_1B), "--gpu", "H100", "--context", "131072"]
    assert plan.main([*flags, "--tensor-parallel-size", "2"]) == 0
    assert "2 x H100" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        plan.main([*flags, "--tensor-parallel-size", "4"])
    assert end.value.code == 2
    assert "tensor_parallel_size=4 must divide the model's kv_heads=2" in capsys.readouterr().err


def test_speeds_are_bounds_by_bytes_and_products(model):
    gpu = Gpu(79 << 30, 1e12, 1e15)
    found = plan_serving(model, gpu, EngineConfig(max_num_seqs=8), context=131072)
    weights, cached = found.weight_bytes, decode_read_bytes(model, 131072)
    assert found.step_s == pytest.approx((weights + cached) / 1e12)
    assert found.full_tokens_per_s == pytest.approx(8e12 / (weights + 8 * cached))
    assert found.tokens_per_s < found.full_tokens_per_s < 8 * found.tokens_per_s
    # Two operations for each parameter and token, and what attention takes on top.
    least = 2 * 131072 * (count_parameters(model).total - 2 * 32768 * 2048) / 1e15
    assert least < found.ttft_s < 3 * least
    dense = plan_serving(dense_equivalent(model), gpu, EngineConfig(max_num_seqs=8), context=131072)
    assert dense.ttft_s > found.ttft_s


def test_what_does_not_fit_is_said(capsys):
    flags = ["--config", str(NSA_1B), "--gpu", "L40S", "--context"]
    assert plan.main([*flags, "131072"]) == 0
    out = capsys.readouterr().out
    assert "sequences at once" in out and "meant for 8,192 tokens" in out
    assert plan.main([*flags, "4000000"]) == 1
    assert "No sequence of this length fits" in capsys.readouterr().out
    tiny = Gpu(1 << 30, 1e12, 1e15)
    none = plan_serving(plan.read_sizes(NSA_1B, [])[0], tiny, EngineConfig(), context=1000)
    assert none.budget_bytes < 0 and (none.num_sequences, none.full_tokens_per_s) == (0, 0.0)


def test_wrong_input_is_refused(tmp_path, capsys):
    bad = tmp_path / "x.yaml"
    bad.write_text("name: x\n")
    with pytest.raises(ConfigError, match="neither `applications` nor a `model`"):
        plan.read_sizes(bad, [])
    with pytest.raises(ConfigError, match="patches deployments"):
        plan.read_sizes(NSA_1B, ["a=1"])
    for flags in (
        ["--config", str(bad), "--context", "10"],
        ["--config", str(NSA_1B), "--context", "0"],
        ["--config", str(NSA_1B), "--context", "10", "--tensor-parallel-size", "0"],
        ["--config", str(NSA_1B), "--context", "10", "--tensor-parallel-size", "-1"],
    ):
        with pytest.raises(SystemExit) as end:
            plan.main([*flags, "--gpu", "H100"])
        assert end.value.code == 2
    deployment = ROOT / "deployments/configs/nsa_150m.yaml"
    with pytest.raises(SystemExit) as end:
        plan.main(["--config", str(deployment), "--gpu", "H100", "--context", "10",
                   "--set", "applications.0.args.llm_configs.0.model_loading_config.model_source="
                   f"{tmp_path}/nothing"])  # fmt: skip
    assert end.value.code == 2
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        plan.main(["--config", str(deployment), "--gpu", "H100", "--context", "0"])
    assert end.value.code == 2
    assert "--context must be at least 1, got 0" in capsys.readouterr().err


def test_a_deployments_model_may_lie_elsewhere(capsys, monkeypatch, tmp_path, s3_environment):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    deployment = ROOT / "deployments/configs/nsa_150m.yaml"
    place = "applications.0.args.llm_configs.0.model_loading_config"
    flags = ["--config", str(deployment), "--gpu", "H100", "--context", "64"]
    flags += ["--set", f"{place}.model_source=models:/planned@champion"]
    with pytest.raises(SystemExit) as end:
        plan.main(flags)
    assert end.value.code == 2
    assert "name it by model_loading_config.tracking_uri" in capsys.readouterr().err
    config = ModelConfig.parse(
        {
            "name": "planned", "vocab_size": 64, "layers": 1, "width": 32, "ffn_width": 32,
            "max_context": 64,
            "attention": {"kind": "nsa", "query_heads": 2, "kv_heads": 1, "key_width": 16,
                          "value_width": 16},
        },
        source="planned",
    )  # fmt: skip
    export_model(tmp_path / "model", config, Transformer(config).state_dict())
    handle = open_run(
        TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="plan"),
        job="pretrain", name="planned", params={}, tags={}, yaml_text="", queue_dir=tmp_path / "q",
    )  # fmt: skip
    register_model(handle, tmp_path / "model", "planned", "champion")
    config_file = storage.join(s3_environment.bucket("plans"), "model", "config.json")
    storage.write_bytes(config_file, (tmp_path / "model/config.json").read_bytes())
    for override in (
        f"{place}.tracking_uri={handle.uri}",
        f"{place}.model_source={config_file.rpartition('/')[0]}",  # where no weights are
    ):
        assert plan.main([*flags, "--set", override]) == 0
        assert "planned, 64 tokens, one H100" in capsys.readouterr().out
