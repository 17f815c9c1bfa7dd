"""Batch inference without Ray: parts of the input, what is done already, the result as a whole.

A part is some rows of the input. What it gives is a function of its rows, the model and the
settings, and its file below `_parts` is named after all of them: a file that is there never has to
be made again. Each part begins with an idle engine, so that the same requests share its steps
whoever else works. Writing is in this order: parts, results.jsonl at once, generated.json.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.prompts import PromptError, PromptRow, find_prompt_files, read_prompts
from nsa_platform import storage
from nsa_platform.config.generate import GenerateRun, SamplingConfig
from nsa_platform.data.chat import render_prompt
from nsa_platform.data.plan import Progress
from nsa_platform.data.tokenizer import Tokenizer, TokenizerError
from nsa_platform.model.weights import load_config, weights_digest
from nsa_platform.serve.capacity import blocks_per_page_of, model_len_of
from nsa_platform.serve.engine import Engine
from nsa_platform.serve.request import SamplingParams
from nsa_platform.tracking import fetch_model, is_model_reference

VERSION = 1
PARTS = "_parts"
RESULTS = "results.jsonl"
RECORD = "generated.json"


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are generated together."""

    name: str
    """Hex digits that change with the rows, their place, the model and the settings."""
    first_row: int
    """Number of its first row in the whole input, from 0."""
    rows: tuple[PromptRow, ...]


@dataclass(frozen=True, slots=True)
class PartDone:
    """What a worker says of a part that it has written."""

    rows: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Generated:
    """What was made; generated.json holds it and is written last."""

    fingerprint: str
    """Of the names of all parts."""
    bytes: int
    """Size of results.jsonl."""
    rows: int
    finished: dict[str, int]
    """Rows by finish_reason, in the order of their names; those that were refused as error."""
    prompt_tokens: int
    completion_tokens: int
    parts: int
    reused_parts: int
    """Parts that an earlier try had finished; all of them if there was nothing to do."""


Each = Callable[[Iterable[Part]], Iterator[PartDone]]
"""Generates parts somewhere, and hands on what comes of them in any order."""


class GenerationPlan:
    """What a run has to do: its rows are read and checked, its parts are known by name.

    Raises:
        PromptError: an input or a row cannot be used, or the output holds something else.
        ValueError: the model cannot be used, or the settings do not fit it.
        OSError: a checkpoint or a store cannot be reached.
    """

    def __init__(self, run: GenerateRun) -> None:
        self.run = run
        self.parts_folder = storage.join(run.output, PARTS)
        _check_output(run.output)
        self.files = find_prompt_files(run.inputs)
        folder = find_model(run)
        self.model = folder.name
        """Name of the model's folder; for models:/ it names version and content."""
        tokenizer = Tokenizer(folder)
        _check_settings(run, folder, tokenizer)
        self._settings = _digest(
            [
                *(VERSION, weights_digest(folder), tokenizer.fingerprint, run.cluster.use_gpu),
                *(run.sampling.model_dump(mode="json"), run.engine.model_dump(mode="json")),
            ]
        )
        self._rows: dict[str, int] = {}
        has_chats = False
        for part in self._read():
            self._rows[part.name] = len(part.rows)
            has_chats = has_chats or any(not isinstance(row.content, str) for row in part.rows)
        if not self._rows:
            raise PromptError(f"inputs: no row in {', '.join(self.files)}")
        if has_chats and tokenizer.chat_template is None:
            raise TokenizerError(
                f"{folder}: has no chat template, so its model cannot answer rows of messages"
            )
        self.fingerprint = _digest(list(self._rows))

    @property
    def num_rows(self) -> int:
        """Rows of the whole input."""
        return sum(self._rows.values())

    def finished(self) -> Generated | None:
        """What an earlier run made, if it was this very run and the result is still there."""
        try:
            text = storage.read_text(storage.join(self.run.output, RECORD))
            done = Generated(**json.loads(text))
            if done.bytes != storage.size(storage.join(self.run.output, RESULTS)):
                return None
        except (storage.MissingFileError, TypeError, ValueError):
            return None
        if done.fingerprint != self.fingerprint:
            return None
        storage.delete_tree(self.parts_folder)
        return Generated(**{**asdict(done), "reused_parts": done.parts})

    def generate(self, each: Each, report: Callable[[Progress], None]) -> Generated:
        """Make what is missing and put it together.

        Raises:
            PromptError: the input has changed since it was checked.
            ValueError, OSError: as the plan, for a worker.
        """
        present = set(storage.list_names(self.parts_folder))
        reused = {name for name in self._rows if part_file(name) in present}
        rows, tokens = sum(self._rows[name] for name in reused), 0
        report(Progress("generating", rows, self.num_rows, "rows"))
        if len(reused) < len(self._rows):
            for done in each(part for part in self._read_again() if part.name not in reused):
                rows += done.rows
                tokens += done.completion_tokens
                report(Progress("generating", rows, self.num_rows, "rows", tokens=tokens))
        return self._merge(len(reused))

    def _read(self) -> Iterator[Part]:
        """The whole input in parts."""
        rows: list[PromptRow] = []
        first = 0
        for uri in self.files:
            for row in read_prompts(uri):
                rows.append(row)
                if len(rows) == self.run.rows_per_part:
                    yield self._part(first, rows)
                    first += len(rows)
                    rows = []
        if rows:
            yield self._part(first, rows)

    def _read_again(self) -> Iterator[Part]:
        for part in self._read():
            if part.name not in self._rows:
                raise PromptError(
                    f"inputs: rows {part.first_row} and after have changed while the job was "
                    "running; start it again"
                )
            yield part

    def _part(self, first: int, rows: list[PromptRow]) -> Part:
        content = [self._settings, first, [[row.id, row.content] for row in rows]]
        return Part(_digest(content), first, tuple(rows))

    def _merge(self, reused: int) -> Generated:
        output = self.run.output
        finished: Counter[str] = Counter()
        prompt_tokens = completion_tokens = 0
        # From here on the record of an older result is no longer true.
        storage.delete_tree(storage.join(output, RECORD))
        with storage.writing(storage.join(output, RESULTS)) as path, path.open("wb") as file:
            for name in self._rows:
                content = storage.read_bytes(storage.join(self.parts_folder, part_file(name)))
                file.write(content)
                for line in content.splitlines():
                    result = json.loads(line)
                    finished[result["finish_reason"] or "error"] += 1
                    prompt_tokens += result["prompt_tokens"]
                    completion_tokens += result["completion_tokens"]
            size = file.tell()
        done = Generated(
            fingerprint=self.fingerprint,
            bytes=size,
            rows=self.num_rows,
            finished=dict(sorted(finished.items())),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            parts=len(self._rows),
            reused_parts=reused,
        )
        text = json.dumps(asdict(done), indent=2) + "\n"
        storage.write_text(storage.join(output, RECORD), text)
        storage.delete_tree(self.parts_folder)
        return done


def find_model(run: GenerateRun) -> Path:
    """Local folder of the run's checkpoint, downloaded if it is elsewhere.

    Raises:
        ValueError, OSError: it cannot be found or fetched.
    """
    if is_model_reference(run.checkpoint):
        return fetch_model(run.checkpoint, run.tracking_uri, storage.default_cache("models"))
    return storage.fetch(run.checkpoint, storage.default_cache("files"))


def part_file(name: str) -> str:
    """Name of the file of a part's results."""
    return f"{name}.jsonl"


def sampling_params(sampling: SamplingConfig) -> SamplingParams:
    """What every request of the run asks for; its seed comes from its number."""
    return SamplingParams(**{name: value for name, value in sampling})


def generate_part(engine: Engine, part: Part, params: SamplingParams) -> list[dict[str, Any]]:
    """Results of a part's rows, in order. The engine is idle before and after.

    A row that the engine refuses, for its prompt is empty or too long, has the reason in `error`.
    """
    results: list[dict[str, Any]] = []
    texts: dict[str, dict[str, Any]] = {}
    waiting = deque(enumerate(part.rows, start=part.first_row))
    while waiting or engine.has_work:
        while waiting and len(texts) < engine.max_num_requests:
            number, row = waiting.popleft()
            ids = _prompt_ids(engine.tokenizer, row)
            result = {
                "id": number if row.id is None else row.id,
                "text": "",
                "finish_reason": None,
                "prompt_tokens": len(ids),
                "completion_tokens": 0,
                "error": None,
            }
            results.append(result)
            try:
                engine.add(str(number), ids, params)
                texts[str(number)] = result
            except ValueError as error:
                result |= {"text": None, "error": str(error)}
        for output in engine.step():
            result = texts[output.request_id]
            result["text"] += output.text
            if output.finish_reason is not None:
                result["finish_reason"] = output.finish_reason
                result["completion_tokens"] = output.num_output_tokens
                del texts[output.request_id]
    return results


def _prompt_ids(tokenizer: Tokenizer, row: PromptRow) -> list[int]:
    if isinstance(row.content, str):
        return tokenizer.encode(row.content)
    return render_prompt(tokenizer, row.content)


def _check_settings(run: GenerateRun, folder: Path, tokenizer: Tokenizer) -> None:
    """Find what does not fit the model before any worker loads it."""
    config = load_config(folder)
    length = model_len_of(config, run.engine)
    blocks_per_page_of(config, run.engine)
    if run.sampling.max_tokens >= length:
        raise ValueError(
            f"sampling.max_tokens={run.sampling.max_tokens} leaves no room for a prompt in "
            f"{length} tokens (engine.max_model_len, or the model's max_context)"
        )
    ids = run.sampling.stop_token_ids
    if ids and max(ids) >= config.vocab_size:
        raise ValueError(
            f"sampling.stop_token_ids: ids must be below {config.vocab_size}, got {max(ids)}"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids and the model knows "
            f"{config.vocab_size}: they do not belong together"
        )


def _check_output(output: str) -> None:
    if storage.exists(output) and not storage.is_folder(output):
        raise PromptError(f"output: {output} is a file, must be a folder")
    names = set(storage.list_names(output))
    if names and not (names & {PARTS, RECORD} and names <= {PARTS, RECORD, RESULTS}):
        raise PromptError(
            f"output: {output} holds {', '.join(sorted(names)[:5])}, which is not only what "
            "generate has made; give an empty or a new folder"
        )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
