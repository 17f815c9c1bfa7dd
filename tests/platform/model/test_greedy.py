"""Greedy continuation by whole passes, against the paged generation that serves."""

import torch

from nsa_platform.model.greedy import continue_greedily
from nsa_platform.model.transformer import Transformer, init_weights
from nsa_platform.serve.generator import Generator
from tests.platform.train.tiny_run import MODEL

PROMPTS = [[3, 4, 5], [7] * 12, [9]]


def _model() -> Transformer:
    model = Transformer(MODEL)
    init_weights(model, 2)
    return model.eval()


def test_what_is_said_is_what_would_be_served() -> None:
    model = _model()
    answers = continue_greedily(model, PROMPTS, max_new_tokens=9, stop_ids=())
    assert answers == [list(Generator(model).stream(prompt, 9)) for prompt in PROMPTS]
    assert [len(answer) for answer in answers] == [9, 9, 9]


def test_an_answer_ends_where_a_stop_id_comes() -> None:
    model = _model()
    whole = continue_greedily(model, PROMPTS, max_new_tokens=9, stop_ids=())
    stop = whole[0][4]
    cut = continue_greedily(model, PROMPTS, max_new_tokens=9, stop_ids={stop})
    for answer, ended in zip(whole, cut, strict=True):
        assert ended == (answer[: answer.index(stop)] if stop in answer else answer)
    assert len(cut[0]) < 9


def test_all_workers_go_on_with_what_they_agreed_on() -> None:
    ones = continue_greedily(
        _model(), PROMPTS, max_new_tokens=3, stop_ids=(), agreed=torch.ones_like
    )
    assert ones == [[1, 1, 1]] * 3
