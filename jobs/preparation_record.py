"""A preparation as an MLflow run: what was read, what came out, how long it took."""

import hashlib
from pathlib import Path

from nsa_platform.config.runs import PrepareDataRun
from nsa_platform.config.train import TrackingConfig
from nsa_platform.data.manifest import read_manifest
from nsa_platform.data.parts import SPLITS
from nsa_platform.data.plan import Prepared
from nsa_platform.storage import join
from nsa_platform.tracking import Tracker, open_run


def record_preparation(
    run: PrepareDataRun, tracking: TrackingConfig, done: Prepared, *, seconds: float
) -> None:
    """Record it as a run of its own. A store that is out of reach gets it later."""
    key = hashlib.sha256(run.output.encode()).hexdigest()[:12]
    queue = Path.home() / ".cache" / "nsa_platform" / "preparations" / f"{run.name}-{key}"
    handle = open_run(
        tracking,
        job="prepare_data",
        name=run.name,
        params=run.model_dump(mode="json"),
        tags={"nsa.data": run.output},
        yaml_text=run.to_yaml(),
        queue_dir=queue,
        continues=False,
    )
    tracker = Tracker(handle)
    tracker.log_metrics(
        {
            **{f"data/{split}_documents": done.documents[split] for split in done.documents},
            **{f"data/{split}_tokens": done.tokens[split] for split in done.tokens},
            "data/source_bytes": done.source_bytes,
            "data/skipped_documents": sum(done.skipped.values()),
            "data/vocab_size": done.vocab_size,
            "data/seconds": seconds,
        },
        step=0,
    )
    for split in SPLITS:
        folder = join(run.output, split)
        manifest = read_manifest(folder)
        if manifest.tokens:
            context = "training" if split == "train" else "validation"
            tracker.log_dataset(manifest.to_dict(), Path(run.output).name, context, source=folder)
    tracker.finish("FINISHED")
