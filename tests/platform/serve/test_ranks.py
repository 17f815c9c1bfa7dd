"""Two ranks of one model: the text of one, pages alike, weights read by shares, clear refusals."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_platform.config.serve import EngineConfig
from nsa_platform.model.cost import count_parameters
from nsa_platform.model.partition import Axis
from nsa_platform.model.tensor_parallel import share_of
from nsa_platform.model.transformer import Transformer
from nsa_platform.model.weights import export_model, load_config, load_model
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.kv_cache import KvCache
from nsa_platform.serve.loading import load_engine, load_follower
from nsa_platform.serve.ranks import Ranks, find_meeting, open_meeting
from nsa_platform.serve.request import SamplingParams

MOE = {
    "moe": {
        "routed_experts": 4,
        "experts_per_token": 2,
        "shared_experts": 1,
        "expert_width": 12,
        "dense_layers": 1,
    }
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nsa": ({"qkv_bias": True, "qk_norm": True}, {}),
    "shared-moe": ({"branch_kv": "shared", "compression": "linear"}, MOE),
    "full": ({"kind": "full", "gated": True}, {}),
}
SIZES: dict[str, Any] = {"max_num_seqs": 3, "max_num_batched_tokens": 24, "max_step_ms": None}


def follow(port: int, folder: Path, config: EngineConfig, left: Any) -> None:
    """The second rank, as a process of its own; leaves what its cache holds."""
    torch.set_num_threads(1)
    meeting = find_meeting("127.0.0.1", port)
    ranks = Ranks.meet(meeting, rank=1, size=2, device="cpu")
    try:
        runner = load_follower(folder, config, "cpu", ranks)
        runner.follow()
        left.send([tensor.numpy() for tensor in tensors_of(runner.cache)])
    finally:
        ranks.part()


def tensors_of(cache: KvCache) -> list[torch.Tensor]:
    """Pages of all layers, [P, rows, heads, width] each."""
    return [t for layer in cache.layers for t in layer.page_tensors() + layer.window_tensors()]


@dataclass
class TwoRanks:
    """The first of two ranks, and the process of the other."""

    engine: Engine
    other: Any
    left: Any

    def end(self) -> list[torch.Tensor]:
        """End the other one; what its cache held."""
        ranks = self.engine.runner.ranks
        assert ranks is not None
        ranks.end()
        tensors = [torch.from_numpy(each) for each in self.left.recv()]
        self.other.join(60)
        assert self.other.exitcode == 0
        return tensors


@contextmanager
def two_ranks(folder: Path, **sizes: Any) -> Iterator[TwoRanks]:
    config = EngineConfig(tensor_parallel_size=2, **{**SIZES, **sizes})
    forkserver.set_forkserver_preload(["nsa_platform.serve.loading"])
    context = multiprocessing.get_context("forkserver")
    meeting = open_meeting("127.0.0.1")
    left, leaving = context.Pipe(duplex=False)
    other = context.Process(target=follow, args=(meeting.port, folder, config, leaving))
    other.start()
    ranks = Ranks.meet(meeting, rank=0, size=2, device="cpu")
    try:
        yield TwoRanks(load_engine(folder, config, "cpu", ranks), other, left)
    finally:
        ranks.part()
        other.kill()
        other.join()


def ask(engine: Engine) -> dict[str, list[Any]]:
    """Tokens, log probabilities and blocks of requests that come one after the other."""
    chance = torch.Generator().manual_seed(3)
    answers: dict[str, list[Any]] = {}
    waiting = {
        f"r{i}": torch.randint(0, 260, (length,), generator=chance).tolist()
        for i, length in enumerate((40, 3, 61, 17))
    }
    is_sparse = engine.block_size is not None
    while engine.has_work or waiting:
        if waiting:
            name, prompt = waiting.popitem()
            params = SamplingParams(
                max_tokens=12,
                temperature=0.0,
                ignore_eos=True,
                logprobs=1,
                selected_blocks=is_sparse and name == "r2",
            )
            engine.add(name, prompt, params)
        for output in engine.step():
            answers.setdefault(output.request_id, []).append(
                (output.token_ids, output.selected_blocks)
            )
        engine.check()
    return answers


@pytest.fixture
def export(make_speaker, toy_tokenizer, tmp_path):
    def make(name: str) -> Path:
        attention, fields = MODELS[name]
        model: Transformer = make_speaker(attention, **fields)
        return export_model(
            tmp_path / name, model.config, model.state_dict(), tokenizer_dir=toy_tokenizer.folder
        )

    return make


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_say_what_one_says(export, name):
    folder = export(name)
    alone = load_engine(folder, EngineConfig(**SIZES), "cpu")
    wanted = ask(alone)
    with two_ranks(folder, async_scheduling=name == "nsa") as pair:
        assert ask(pair.engine) == wanted
        own, others = tensors_of(pair.engine.cache), pair.end()
    # The same pages of both, each with its half of the heads.
    for whole, first, second in zip(tensors_of(alone.cache), own, others, strict=True):
        torch.testing.assert_close(torch.cat([first, second], 2)[1:], whole[1:])


def test_a_rank_that_dies_is_noticed_at_once(export):
    with two_ranks(export("nsa")) as pair:
        pair.other.kill()
        pair.engine.add("a", [5, 6, 7], SamplingParams(max_tokens=5))
        with pytest.raises(RuntimeError, match=r"(?i)connection|peer|gloo"):
            while pair.engine.has_work:
                pair.engine.step()


@pytest.mark.parametrize("name", MODELS)
def test_a_rank_holds_its_share_alone(export, name):
    folder = export(name)
    config = load_config(folder)
    own = share_of(config, 2)
    for rank in (0, 1):
        model = load_model(folder, tensor=Axis(rank, 2))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == count_parameters(own).total < count_parameters(config).total


def test_what_cannot_be_dealt_is_refused_before_anything_is_loaded(export):
    folder = export("shared-moe")
    (folder / "model.safetensors").unlink()

    def refused(size: int, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            load_engine(folder, EngineConfig(tensor_parallel_size=size), "cpu")

    refused(2, "tensor_parallel_size=2 needs as many ranks, and here is 1")
    refused(3, "tensor_parallel_size=3 must divide the model's kv_heads=2")
    config = load_config(folder)
    for field, message in (("ffn_width", "ffn_width=49"), ("moe", "moe.expert_width=49")):
        odd = (
            49
            if config.moe is None or field == "ffn_width"
            else config.moe.model_copy(update={"expert_width": 49})
        )
        with pytest.raises(ValueError, match=message):
            share_of(config.model_copy(update={field: odd}), 2)
