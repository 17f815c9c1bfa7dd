"""Configuration: what a user can get wrong, and what the message says."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import read_run
from nsa_platform.config.base import ConfigError, patch
from nsa_platform.config.locations import absolute, locations, resolve_locations
from nsa_platform.config.runs import PrepareDataRun, PretrainRun, SftRun


def tree() -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {
            "vocab_size": 512,
            "layers": 2,
            "width": 64,
            "ffn_width": 128,
            "max_context": 256,
            "attention": {"kind": "nsa", "query_heads": 4, "kv_heads": 1},
        },
        "data": {"path": "data/tiny", "context_length": 256},
        "train": {"steps": 3, "tokens_per_step": 512},
    }


def changed(key: str, value: object) -> dict[str, Any]:
    result = tree()
    node = result
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return result


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trian", {}, "trian: unknown key; did you mean 'train'?"),
        ("train.stpes", 4, "train.stpes: unknown key; did you mean 'steps'?"),
        (
            "model.attention.compresion_stride",
            16,
            "model.attention.compresion_stride: unknown key; did you mean 'compression_stride'?",
        ),
        ("train.optimizer.warmup", 1, "did you mean 'warmup_steps'?"),
        ("train.steps", 0, "train.steps: must be greater than 0, got 0"),
        ("train.steps", [], "train.steps: must be a valid integer, got []"),
        ("train.steps", "many", "train.steps: must be a valid integer"),
        (
            "model.attention.compression_stride",
            12,
            "compression_stride=12 must divide compression_block_size=32 (d | l, Eq. 9)",
        ),
        ("model.attention.num_local_blocks", 16, "must fit into num_selected_blocks=16"),
        ("model.attention.branches", ["sliding", "sliding"], "must name each branch once"),
        (
            "model.attention.branches",
            ["selected", "sliding"],
            "needs branch_kv=shared and compression=mean, got branch_kv=separate",
        ),
        ("model.attention.kv_heads", 3, "kv_heads=3 must divide query_heads=4"),
        (
            "model.attention.kind",
            "sparse",
            "model.attention.kind: unknown kind 'sparse' (valid: nsa, full, mla, moba)",
        ),
        ("train.tokens_per_step", 300, "must be a multiple of data.context_length=256"),
        ("data.context_length", 512, "must not exceed model.max_context=256"),
        ("tracking.uri", "ftp://x", "tracking: uri='ftp://x' must start with"),
        ("data.path", "gs://x/y", "data.path: must be a local path or s3://bucket/key, got 'gs:"),
        ("storage", "s3://", "storage: must be a local path or s3://bucket/key"),
        ("train.steps", True, "train: steps must not be true or false, got True"),
        ("train.optimizer.learning_rate", float("inf"), "learning_rate: must be a finite"),
    ],
)
def test_a_wrong_key_or_value_is_named(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PretrainRun.parse(changed(key, value), source="x.yaml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("x.yaml: ")


def test_problems_between_sections_are_all_named() -> None:
    broken = changed("data.context_length", 320)
    broken["train"]["tokens_per_step"] = 512
    with pytest.raises(ConfigError) as caught:
        PretrainRun.parse(broken, source="x.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("x.yaml: train.tokens_per_step=512 must be a multiple of")
    assert "data.context_length=320 must not exceed model.max_context=256" in line


def test_a_model_may_come_from_the_registry() -> None:
    base = {name: value for name, value in tree().items() if name != "model"}
    assert SftRun.parse(base | {"checkpoint": "models:/a@b"}).checkpoint == "models:/a@b"
    for wrong in ("models:/", "hf://a", ""):
        with pytest.raises(ConfigError, match="checkpoint: must"):
            SftRun.parse(base | {"checkpoint": wrong})


def test_a_model_is_new_or_goes_on_from_an_exported_one() -> None:
    further = {name: value for name, value in tree().items() if name != "model"}
    further |= {"checkpoint": "runs/a/model"}
    assert PretrainRun.parse(further).model is None
    for wrong in (tree() | further, {k: v for k, v in further.items() if k != "checkpoint"}):
        with pytest.raises(ConfigError, match="give exactly one of model and checkpoint"):
            PretrainRun.parse(wrong)


def test_a_missing_key_is_named() -> None:
    broken = tree()
    del broken["model"]["width"]
    with pytest.raises(ConfigError, match=r"model\.width: is required"):
        PretrainRun.parse(broken)


def test_overrides_patch_before_validation(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree()))
    run = PretrainRun.load(path, ["train.steps=7", "train.optimizer.learning_rate=1e-3"])
    assert run.train.steps == 7
    assert run.train.optimizer.learning_rate == 1e-3
    with pytest.raises(ConfigError, match="unknown key; did you mean 'steps'"):
        PretrainRun.load(path, ["train.step=7"])
    with pytest.raises(ConfigError, match=r"must look like a\.b=value"):
        PretrainRun.load(path, ["train.steps"])
    with pytest.raises(ConfigError, match=r"must look like a\.b=value"):
        PretrainRun.load(path, [".steps=7"])
    with pytest.raises(ConfigError, match="name is a value"):
        PretrainRun.load(path, ["name.x=1"])


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1", "", "\x00"])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        PretrainRun.load(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ntrain:\n  steps: 1\n  steps: 2\n")
    with pytest.raises(ConfigError, match="key 'steps' stands twice") as caught:
        PretrainRun.load(path)
    assert str(caught.value).endswith("(line 4, column 3)")


def test_what_is_no_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ntrain: [1,\n  steps: 2\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: is not YAML: .* \(line 4, column 1\)$"):
        PretrainRun.load(path)
    with pytest.raises(ConfigError, match=r"--set name=\[: the value is not YAML: .*column 2\)$"):
        patch(tree(), ["name=["])


def test_a_run_survives_yaml_and_is_fingerprinted() -> None:
    run = PretrainRun.parse(tree())
    again = PretrainRun.parse(yaml.safe_load(run.to_yaml()))
    assert again == run
    assert again.fingerprint() == run.fingerprint()
    other = PretrainRun.parse(changed("train.steps", 4))
    assert other.fingerprint() != run.fingerprint()


def test_a_bad_configuration_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed("train.stpes", 4)))
    with pytest.raises(SystemExit) as caught:
        read_run(PretrainRun, "doc", ["--config", str(path)])
    assert caught.value.code == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        read_run(PretrainRun, "doc", ["--config", str(tmp_path / "none.yaml")])
    assert caught.value.code == 2
    assert "No such file" in capsys.readouterr().err


def test_places_become_absolute_once(tmp_path: Path) -> None:
    run = resolve_locations(PretrainRun.parse(tree()), tmp_path)
    assert run.data.path == str(tmp_path / "data/tiny")
    assert run.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_locations(run, Path("/elsewhere")) == run
    for address in ("s3://bucket/key", "models:/name@champion", "https://host:5000"):
        assert absolute(address, tmp_path) == address


def test_every_place_of_a_run_is_listed() -> None:
    run = PrepareDataRun.parse(
        {
            "name": "x",
            "corpus": {"inputs": ["a", "s3://b/c"]},
            "tokenizer": {"path": "t"},
            "output": "s3://b/o",
        }
    )
    assert locations(run) == {
        "corpus.inputs": ("a", "s3://b/c"),
        "tokenizer.path": ("t",),
        "output": ("s3://b/o",),
    }


@pytest.mark.parametrize(
    ("mesh", "workers", "message"),
    [
        ({"context_parallel_degree": 3}, 4, "num_workers=4 must be a multiple of"),
        ({"context_parallel_degree": 3}, 3, "context_length=256 must be a multiple of"),
        ({"tensor_parallel_degree": 2}, 2, "must divide kv_heads=1"),
        ({"context_parallel_degree": 8}, 8, "context_parallel_degree=8 must divide the 1 key/"),
        ({"expert_parallel_degree": 2}, 2, "must divide model.moe.routed_experts=0"),
        ({"expert_parallel_degree": 3}, 2, "must divide the 2 workers of one copy"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, workers: int, message: str) -> None:
    broken = changed("train.mesh", mesh)
    broken["model"]["attention"] |= {"query_heads": 4, "kv_heads": 1}
    broken["train"]["tokens_per_step"] = 256 * 24
    broken["cluster"] = {"num_workers": workers}
    with pytest.raises(ConfigError, match=r"train\.mesh: ") as caught:
        PretrainRun.parse(broken)
    assert message in str(caught.value)


def test_a_mesh_needs_shards() -> None:
    broken = changed("train.mesh", {"context_parallel_degree": 2})
    broken["train"]["parallel"] = "replicate"
    with pytest.raises(ConfigError, match="the axes of mesh need parallel=shard"):
        PretrainRun.parse(broken)
