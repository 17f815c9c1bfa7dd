"""What may change between two attempts at a run."""

import copy
import json

import pytest

from nsa_platform.train.resume import ResumeError, check_resumable, describe_run

RUN = {
    "model": {"name": "a", "layers": 4, "attention": {"kind": "nsa", "gate_bias": (0.0, 1.0)}},
    "data": {"path": "/x", "context_length": 128, "packing": "split", "seed": 0},
    "train": {"steps": 10, "lora": None, "optimizer": {"learning_rate": 0.1}},
    "cluster": {"num_workers": 2},
    "tracking": {"uri": "sqlite:///x"},
}


def described(changes: dict[str, object] | None = None, digest: str = "d") -> dict:
    run = copy.deepcopy(RUN)
    for key, value in (changes or {}).items():
        node = run
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return describe_run(run, data_digest=digest)


def test_the_same_run_goes_on_in_silence() -> None:
    saved = json.loads(json.dumps(described()))
    assert check_resumable(saved, described()) == []
    assert check_resumable(saved, described({"data.path": "/moved", "model.name": "b"})) == []


def test_allowed_changes_are_said() -> None:
    changed = described({"train.steps": 20, "cluster.num_workers": 1})
    assert check_resumable(described(), changed) == [
        "cluster.num_workers was 2, is 1",
        "train.steps was 10, is 20",
    ]


def test_rows_of_another_version_are_said() -> None:
    now = described({"data.packing": "whole"})
    saved = now | {"packing_rule": "whole/1"}
    assert check_resumable(saved, now) == ["packing_rule was 'whole/1', is 'whole/2'"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers", 6, "model.layers was 4, is 6"),
        ("model.attention.kind", "full", "model.attention.kind was 'nsa', is 'full'"),
        ("data.context_length", 64, "data.context_length was 128, is 64"),
        ("data.packing", "whole", "data.packing was 'split', is 'whole'"),
        ("data.seed", 1, "data.seed was 0, is 1"),
        ("train.lora", {"rank": 8}, "train.lora.rank was None, is 8"),
    ],
)
def test_another_model_or_other_rows_are_an_error(key: str, value: object, message: str) -> None:
    with pytest.raises(ResumeError, match="belong to another run") as caught:
        check_resumable(described(), described({key: value, "train.steps": 20}))
    assert message in str(caught.value)
    assert "train.steps" not in str(caught.value)


def test_sources_of_a_mixture_may_move_but_not_change() -> None:
    sources = [{"path": "/a", "weight": 1.0}, {"path": "/b", "weight": 2.0}]
    moved = [{"path": "/c", "weight": 1.0}, {"path": "/d", "weight": 2.0}]
    saved = described({"data.mixture": sources})
    assert check_resumable(saved, described({"data.mixture": moved})) == []
    moved[1]["weight"] = 3.0
    with pytest.raises(ResumeError, match=r"data\.mixture\.1\.weight was 2\.0, is 3\.0"):
        check_resumable(saved, described({"data.mixture": moved}))


def test_other_data_is_an_error() -> None:
    with pytest.raises(ResumeError, match="data_digest was 'd', is 'e'"):
        check_resumable(described(), described(digest="e"))


def test_of_earlier_stages_it_counts_what_they_computed_and_where_they_ended() -> None:
    def second(changes: dict[str, object], first: dict[str, object]) -> dict:
        earlier = [described(first)]
        return describe_run(described(changes), data_digest="d", earlier=earlier)

    saved = json.loads(json.dumps(second({}, {})))
    quiet = {"data.path": "/moved", "train.optimizer.learning_rate": 1.0}
    assert check_resumable(saved, second({"train.steps": 20}, quiet)) == [
        "train.steps was 10, is 20"
    ]
    for key, value in (("data.context_length", 64), ("train.steps", 9), ("model.layers", 2)):
        with pytest.raises(ResumeError, match=rf"earlier\.0\.{key} was \d+, is {value}"):
            check_resumable(saved, second({}, {key: value}))
