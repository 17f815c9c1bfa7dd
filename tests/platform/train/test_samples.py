"""Held-out prompts, what is answered to them, and what a run remembers of it."""

import json

import pytest

from nsa_platform.config.base import ConfigError
from nsa_platform.config.data import LoaderConfig
from nsa_platform.config.runs import SftRun
from nsa_platform.config.train import SamplesConfig
from nsa_platform.data.shards import ShardSet, open_split
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.train.history import MOST_TABLES, History
from nsa_platform.train.samples import held_out
from tests.conftest import DataFolder


def _shards(data: DataFolder) -> ShardSet:
    return open_split(LoaderConfig(path=str(data.path), context_length=64), "validation")


def test_a_chat_is_asked_up_to_its_first_answer(tiny_chat_shards: DataFolder) -> None:
    tokenizer = Tokenizer(tiny_chat_shards.tokenizer)
    config = SamplesConfig(num_prompts=3, max_prompt_tokens=100, max_new_tokens=40)
    found = list(held_out(_shards(tiny_chat_shards), config))
    assert len(found) > 10
    for each in found:
        asked = tokenizer.decode(each.prompt, skip_special_tokens=False)
        assert "plus" in asked and "It is" not in asked
        number = int(asked.split("What is ")[1].split()[0])
        assert tokenizer.decode(each.reference).strip() == f"It is {2 * number}."
        assert each.reference[-1] in tokenizer.stop_ids()
    longest = max(len(each.prompt) for each in found)
    shorter = config.model_copy(update={"max_prompt_tokens": longest - 1, "max_new_tokens": 2})
    fewer = list(held_out(_shards(tiny_chat_shards), shorter))
    assert 0 < len(fewer) < len(found)
    assert {len(each.reference) for each in fewer} == {2}


def test_a_text_is_continued_from_its_beginning(tiny_shards: DataFolder) -> None:
    shards = _shards(tiny_shards)
    first = next(held_out(shards, SamplesConfig(max_prompt_tokens=7, max_new_tokens=5)))
    assert [*first.prompt, *first.reference] == shards.open(0).ids[:12].tolist()
    assert len(first.prompt) == 7


def test_a_history_keeps_every_second_table_when_there_are_many() -> None:
    history = History()
    for step in range(MOST_TABLES):
        history.add_validations(History(samples=[(step, [("p", "a", "r"), ("q", "b", "s")])]))
    again = History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again == history
    again.add_validations(History(samples=[(MOST_TABLES, [("p", "a", "r")])]))
    assert [step for step, _ in again.samples] == list(range(0, MOST_TABLES + 1, 2))
    old = {name: value for name, value in history.to_dict().items() if name != "samples"}
    assert History.from_dict(old).samples == []


def test_answers_must_fit_the_context() -> None:
    tree = {
        "name": "x",
        "checkpoint": "m",
        "data": {"path": "unused", "context_length": 64},
        "train": {"steps": 1, "tokens_per_step": 64, "samples": {"max_prompt_tokens": 32}},
    }
    assert SftRun.parse(tree).train.samples.num_prompts == 0
    tree["train"]["samples"]["num_prompts"] = 1
    with pytest.raises(ConfigError, match=r"32 \+ max_new_tokens=64 = 96 must not exceed .*=64"):
        SftRun.parse(tree)
