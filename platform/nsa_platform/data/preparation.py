"""Raw corpus to tokenizer, train and validation shards: the whole preparation, without Ray.

Who runs the tasks is the caller's business: `each` maps a function over jobs, in any order and on
any machines. The result is a function of the corpus and the configuration alone, bit for bit.

Order of writing, so that a kill at any point leaves nothing half-written that looks whole: parts
into _staging/ (the next try uses them again; copies are left out of what is read from there, not of
the parts), then the old output goes, its manifests first, then
come shards, tokenizer, manifests, and last prepared.json.
"""

import json
import tempfile
from collections import Counter
from dataclasses import asdict

from nsa_platform import storage
from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.data.corpus import CorpusError
from nsa_platform.data.deduplication import SourceCopies, without_copies
from nsa_platform.data.each import Each, in_turn
from nsa_platform.data.manifest import (
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    write_manifest,
)
from nsa_platform.data.merging import MergeJob, merge_shard, plan_shards, row_ranges
from nsa_platform.data.parts import (
    RECORD,
    SPLITS,
    PartRecord,
    read_record,
    staged_rows,
    tokenise_part,
)
from nsa_platform.data.plan import PREPARED, TOKENIZER, Plan, Prepared, Progress, Report
from nsa_platform.data.tokenizer import Tokenizer


def silent(progress: Progress) -> None:
    """The simplest report: none."""


def prepare(plan: Plan, *, each: Each = in_turn, report: Report = silent) -> Prepared:
    """Make tokenizer/, train/ and validation/ under the run's output, or find them made already.

    Raises:
        CorpusError: an input cannot be read, or no document is left for training.
        TokenizerError: the tokenizer cannot be used.
        StorageError: a store cannot be reached.
    """
    if (done := plan.finished()) is not None:
        return done
    output = plan.run.output
    tokenizer_uri, tokenizer = plan.make_tokenizer(report)
    records, reused = _tokenise(plan, tokenizer_uri, tokenizer, each, report)
    sources: dict[int, SourceCopies] = {}
    if plan.run.deduplicate is not None:
        records, sources = without_copies(
            plan.staging, records, plan.run.deduplicate, each=each, report=report
        )
    skipped = sum((record.skipped for record in records), Counter[str]())
    if not sum(len(record.splits["train"].lengths) for record in records):
        storage.delete_tree(plan.staging)
        raise CorpusError(
            f"no document is left for training out of {len(plan.files)} files: "
            f"{sum(len(record.splits['validation'].lengths) for record in records)} held out, "
            f"skipped {dict(sorted(skipped.items())) or 'none'}"
        )
    plan.forget_old_output()
    shards = _merge(plan, records, each, report)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        storage.upload_tree(folder, storage.join(output, TOKENIZER))
    manifests = {
        split: _manifest(plan, split, shards[split], tokenizer, records) for split in SPLITS
    }
    for split, manifest in manifests.items():
        write_manifest(storage.join(output, split), manifest)
    first = {k: v for record in reversed(records) for k, v in record.skipped_first.items()}
    result = _summary(plan, manifests, reused, sources, first)
    text = json.dumps(asdict(result), indent=2) + "\n"
    storage.write_text(storage.join(output, PREPARED), text)
    storage.delete_tree(plan.staging)
    return result


def prepare_here(run: PrepareDataRun) -> Prepared:
    """Prepare in this process, without a cluster."""
    return prepare(Plan(run, default_cache_dir()))


def default_cache_dir() -> str:
    """Where tasks keep copies of remote tokenizers."""
    return str(storage.default_cache("tokenizers"))


def _tokenise(
    plan: Plan, tokenizer_uri: str, tokenizer: Tokenizer, each: Each, report: Report
) -> tuple[list[PartRecord], int]:
    """Records of all parts in order, and how many of them were there already."""
    present = set(storage.list_names(plan.staging))
    jobs = plan.part_jobs(tokenizer_uri, tokenizer)
    records = {
        job.part.index: read_record(plan.staging, job.part.index, job.fingerprint)
        for job in jobs
        if job.fingerprint + RECORD in present
    }
    reused = len(records)
    missing = [job for job in jobs if job.part.index not in records]
    count = _FileCount(plan)
    report(count.progress(records))
    for record in each(tokenise_part, missing):
        records[record.index] = record
        report(count.progress(records))
    return [records[index] for index in sorted(records)], reused


class _FileCount:
    """Counts the files of which every part is done."""

    def __init__(self, plan: Plan) -> None:
        self._parts: dict[str, set[int]] = {}
        for part in plan.parts:
            for span in part.spans:
                self._parts.setdefault(span.file.uri, set()).add(part.index)

    def progress(self, records: dict[int, PartRecord]) -> Progress:
        return Progress(
            stage="tokenising",
            done=sum(parts <= records.keys() for parts in self._parts.values()),
            total=len(self._parts),
            unit="files",
            documents=sum(record.documents for record in records.values()),
            tokens=sum(record.tokens for record in records.values()),
        )


def _merge(
    plan: Plan, records: list[PartRecord], each: Each, report: Report
) -> dict[str, list[ShardRecord]]:
    jobs: list[MergeJob] = []
    for split in SPLITS:
        files = [
            storage.join(plan.staging, staged_rows(record.fingerprint, split)) for record in records
        ]
        lengths = [record.splits[split].lengths for record in records]
        for number, pieces in enumerate(plan_shards(lengths, plan.run.shard_tokens)):
            slices = tuple(
                (files[piece.part], row_ranges(piece, records[piece.part].splits[split].rows))
                for piece in pieces
            )
            jobs.append(MergeJob(storage.join(plan.run.output, split), split, number, slices))
    made: dict[tuple[str, int], ShardRecord] = {}
    report(Progress("writing shards", 0, len(jobs), "shards"))
    for merged in each(merge_shard, jobs):
        made[merged.split, merged.number] = merged.record
        report(Progress("writing shards", len(made), len(jobs), "shards"))
    return {split: [made[key] for key in sorted(made) if key[0] == split] for split in SPLITS}


def _manifest(
    plan: Plan,
    split: str,
    shards: list[ShardRecord],
    tokenizer: Tokenizer,
    records: list[PartRecord],
) -> Manifest:
    skipped = sum((record.skipped for record in records), Counter[str]())
    return Manifest(
        kind=plan.run.corpus.kind,
        split=split,
        tokenizer=TokenizerRecord(
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        ),
        source=SourceRecord(
            files=len(plan.files),
            bytes=sum(file.size for file in plan.files),
            documents=sum(record.documents for record in records),
            skipped=dict(sorted(skipped.items())),
            replaced_utf8=sum(record.replaced_utf8 for record in records),
        ),
        shards=tuple(shards),
        text_bytes=sum(record.splits[split].text_bytes for record in records),
        loss_tokens=sum(record.splits[split].loss_tokens for record in records),
    )


def _summary(
    plan: Plan,
    manifests: dict[str, Manifest],
    reused: int,
    sources: dict[int, SourceCopies],
    skipped_first: dict[str, str],
) -> Prepared:
    source = manifests["train"].source
    return Prepared(
        fingerprint=plan.fingerprint,
        files=source.files,
        source_bytes=source.bytes,
        documents={split: manifest.rows for split, manifest in manifests.items()},
        tokens={split: manifest.tokens for split, manifest in manifests.items()},
        text_bytes={split: manifest.text_bytes for split, manifest in manifests.items()},
        shards={split: len(manifest.shards) for split, manifest in manifests.items()},
        digests={split: manifest.digest for split, manifest in manifests.items()},
        skipped=dict(source.skipped),
        replaced_utf8=source.replaced_utf8,
        vocab_size=manifests["train"].tokenizer.vocab_size,
        parts=len(plan.parts),
        reused_parts=reused,
        sources={plan.run.corpus.inputs[n]: asdict(each) for n, each in sorted(sources.items())},
        skipped_first=dict(sorted(skipped_first.items())),
    )
