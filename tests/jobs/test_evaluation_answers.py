"""Answers of an evaluation's engine: those of one prompt at a time, whoever else is asked."""

import re
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from jobs.evaluation_answers import Answers, check_sizes
from nsa_platform.config.evaluate import EvaluationEngineConfig
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.evaluate.prompt import Decoding, Prompt
from nsa_platform.model.transformer import Transformer
from nsa_platform.serve.generator import Generator
from nsa_platform.serve.sampler import Sampling
from tests.platform.evaluate.small import make_corpus, make_model

LENGTHS = (1, 7, 33, 90, 12, 48)
NEW_TOKENS = 20
LONGEST = max(LENGTHS) + NEW_TOKENS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_corpus(tmp_path_factory.mktemp("answers")).tokenizer


@pytest.fixture(scope="module", params=["nsa", "full"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Transformer:
    """Noise on every weight: an untrained model says the same to everything."""
    model = make_model(tokenizer.vocab_size, max_context=256, kind=request.param)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    return model


def prompts_of(*, temperature: float) -> list[Prompt]:
    dice = torch.Generator().manual_seed(0)
    return [
        Prompt(
            torch.randint(0, 290, (length,), generator=dice).tolist(),
            NEW_TOKENS,
            Decoding(temperature, top_p=0.95, seed=number),
        )
        for number, length in enumerate(LENGTHS)
    ]


def one_at_a_time(model: Transformer, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    how = prompt.decoding
    sampling = Sampling(how.temperature, how.top_p, seed=how.seed)
    stream = Generator(model).stream(
        prompt.ids, prompt.max_new_tokens, stop_ids=tokenizer.stop_ids(), sampling=sampling
    )
    return list(stream)


def answers_of(model: Transformer, tokenizer: Tokenizer, **sizes: object) -> Answers:
    config = EvaluationEngineConfig.parse({"max_num_batched_tokens": 64, **sizes})
    return Answers(model, tokenizer, config, longest=LONGEST)


def written(answers: Answers, prompts: list[Prompt]) -> list[list[int]]:
    found = list(answers.write(prompts))
    assert sorted(place for place, _ in found) == list(range(len(prompts))), "each once"
    return [ids for _, ids in sorted(found)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_one_prompt_at_a_time(
    model: Transformer, tokenizer: Tokenizer, temperature: float
) -> None:
    prompts = prompts_of(temperature=temperature)
    wanted = [one_at_a_time(model, tokenizer, prompt) for prompt in prompts]
    assert len({token for ids in wanted for token in ids}) > 20
    assert written(answers_of(model, tokenizer), prompts) == wanted


def test_a_stop_id_ends_an_answer_and_is_left_out(model: Transformer, tokenizer: Tokenizer) -> None:
    prompts = prompts_of(temperature=0.0)
    said = Counter(token for ids in written(answers_of(model, tokenizer), prompts) for token in ids)
    # The same model, but that it stops where it said what it said most.
    ids = [said.most_common(1)[0][0], tokenizer.eos_id]
    stopping = deepcopy(model)
    with torch.no_grad():
        stopping.embedding.weight[ids] = model.embedding.weight[ids[::-1]]
    found = written(answers_of(stopping, tokenizer), prompts)
    assert found == [one_at_a_time(stopping, tokenizer, prompt) for prompt in prompts]
    assert min(len(ids) for ids in found) < NEW_TOKENS
    assert not {token for ids in found for token in ids} & set(tokenizer.stop_ids())


def test_a_stop_string_ends_an_answer_with_the_token_that_completes_it(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    prompts = prompts_of(temperature=0.0)
    whole = written(answers_of(model, tokenizer), prompts)
    # Two characters that tokens part or hold, another place for each prompt, and no broken ones.
    texts = [tokenizer.decode(ids) for ids in whole]
    stops = [re.findall("[^\ufffd]{2}", text)[i % 3] for i, text in enumerate(texts)]
    stopping = [replace(each, stops=(stop,)) for each, stop in zip(prompts, stops, strict=True)]
    found = written(answers_of(model, tokenizer), stopping)
    for ids, every, stop in zip(found, whole, stops, strict=True):
        assert ids == every[: len(ids)]
        assert stop in tokenizer.decode(ids)
        assert stop not in tokenizer.decode(ids[:-1])
    assert max(len(ids) for ids in found) < NEW_TOKENS


def test_drawn_answers_hang_on_their_seed_and_not_on_the_batch(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    prompts = prompts_of(temperature=0.8)
    together = written(answers_of(model, tokenizer, max_num_seqs=8), prompts)
    assert written(answers_of(model, tokenizer, max_num_seqs=1), prompts) == together
    answers = answers_of(model, tokenizer, max_num_seqs=8)
    alone = [written(answers, [prompt])[0] for prompt in reversed(prompts)]
    assert alone[::-1] == together
    again = [Prompt(p.ids, p.max_new_tokens, Decoding(0.8, 0.95, seed=99)) for p in prompts]
    assert written(answers, again) != together


def test_more_prompts_than_the_engine_takes_are_fed_as_room_comes(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    prompts = prompts_of(temperature=0.0)
    few = answers_of(model, tokenizer, max_num_seqs=2, max_num_queued=1)
    assert few.engine.max_num_requests == 3 < len(prompts)
    assert written(few, prompts) == written(answers_of(model, tokenizer), prompts)


def test_the_cache_is_made_for_the_longest_prompt_and_answer(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    engine = answers_of(model, tokenizer, max_num_seqs=3).engine
    assert engine.max_model_len == LONGEST < model.config.max_context
    book = engine.cache.book
    assert book.num_pages * book.page_size <= 3 * (LONGEST + 2 * book.page_size)
    assert engine is not answers_of(model, tokenizer).engine
    small = answers_of(model, tokenizer, num_kv_tokens=16, max_num_seqs=1)
    with pytest.raises(ValueError, match="num_kv_tokens"):
        list(small.write([Prompt([1], 1)]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_model_len": 99}, "engine.max_model_len=99 must be at least 110"),
        ({"num_kv_tokens": 109}, "engine.num_kv_tokens=109 must be at least 110"),
        ({"max_model_len": 257}, "engine: max_model_len=257 must not exceed the model's"),
        ({"block_size": 12}, "engine: block_size=12 must be a multiple of"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    model: Transformer, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_sizes(EvaluationEngineConfig.parse(sizes), model.config, longest=LONGEST)
    check_sizes(EvaluationEngineConfig(), model.config, longest=LONGEST)
