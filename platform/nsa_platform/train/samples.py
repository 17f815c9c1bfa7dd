"""What the model answers to a few held-out prompts, validation after validation."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from nsa_platform.config.train import SamplesConfig
from nsa_platform.data.shards import ShardSet
from nsa_platform.data.tokenizer import Tokenizer
from nsa_platform.model.greedy import continue_greedily
from nsa_platform.model.transformer import Transformer
from nsa_platform.train.mesh import Mesh
from nsa_platform.train.parallel import World, release_gathered

COLUMNS = ("step", "prompt", "answer", "reference")
TABLE = "samples/answers.json"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The beginning of a held-out document and how it goes on."""

    prompt: list[int]
    reference: list[int]


def held_out(shards: ShardSet, config: SamplesConfig) -> Iterator[HeldOut]:
    """The first documents that fit: of a text its beginning, of a chat all before the assistant's
    first turn, which is the reference."""
    longest = config.max_prompt_tokens
    for index in range(len(shards)):
        shard = shards.open(index)
        for start, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            ids = shard.ids[start:end]
            begin, stop = min(longest, len(ids) // 2), len(ids)
            if shard.loss_mask is not None:
                mask = shard.loss_mask[start:end]
                begin = int(mask.argmax())
                stop = begin + int(np.append(~mask[begin:], True).argmax())
            if 0 < begin <= longest:
                reference = ids[begin : min(stop, begin + config.max_new_tokens)]
                yield HeldOut(ids[:begin].tolist(), reference.tolist())


class Samples:
    """The same prompts each time, whatever the number of workers."""

    def __init__(
        self,
        shards: ShardSet,
        tokenizer: Tokenizer,
        config: SamplesConfig,
        *,
        world: World,
        mesh: Mesh,
    ) -> None:
        """Choose up to `config.num_prompts` prompts; fewer where fewer fit."""
        self._tokenizer, self._config = tokenizer, config
        self._world, self._mesh = world, mesh
        self._held_out = list(islice(held_out(shards, config), config.num_prompts))

    def __len__(self) -> int:
        return len(self._held_out)

    def answers(self, model: Transformer) -> list[tuple[str, str, str]]:
        """Prompt, answer and reference of each. Every worker calls it; all get the same."""
        model.eval()
        answers = continue_greedily(
            model,
            [each.prompt for each in self._held_out],
            max_new_tokens=self._config.max_new_tokens,
            stop_ids=self._tokenizer.stop_ids(),
            device=self._world.device,
            partition=self._mesh.partition,
            agreed=self._world.of_first,
        )
        release_gathered(model)
        model.train()
        decode = self._tokenizer.decode
        return [
            (decode(each.prompt, skip_special_tokens=False), decode(answer), decode(each.reference))
            for each, answer in zip(self._held_out, answers, strict=True)
        ]
