"""Validate a model, remember what came of it, and draw the run so far."""

from nsa_platform import figures
from nsa_platform.config.model import NsaAttentionConfig
from nsa_platform.model.transformer import Transformer
from nsa_platform.tracking import Tracker
from nsa_platform.train.health import health_figures, health_metrics, health_values
from nsa_platform.train.history import History
from nsa_platform.train.needles import FIGURE
from nsa_platform.train.progress import Progress
from nsa_platform.train.samples import COLUMNS, TABLE
from nsa_platform.train.validation import Validated, Validation


def validate(
    model: Transformer,
    validation: Validation,
    progress: Progress,
    tracker: Tracker | None,
) -> dict[str, float]:
    """Validate, have samples answered and needles looked for; returns the metrics.

    Args:
        progress: of the run when the model was as it is; its history gets the validation.
        tracker: gets figures and samples, not the metrics.
    """
    validated = validation.run(model)
    found = History(
        valid=[(progress.tokens, validated.loss)],
        health=[(progress.step, health_values(validated.health))],
    )
    if validation.samples is not None:
        found.samples.append((progress.step, validation.samples.answers(model)))
    progress.history.add_validations(found)
    if tracker:
        draw(tracker, validated, history=progress.history, model=model)
    metrics = validated.metrics() | health_metrics(validated.health)
    if validation.needles is not None:
        needles = validation.needles.find(model)
        metrics |= needles.metrics()
        if tracker:
            tracker.log_figure(needles.figure(), FIGURE)
    return metrics


def draw(tracker: Tracker, validated: Validated, *, history: History, model: Transformer) -> None:
    """Figures and samples of the run so far, and of its newest validation."""
    attention = model.config.attention
    block_size = (
        attention.selection_block_size if isinstance(attention, NsaAttentionConfig) else None
    )
    drawn = health_figures(history.health, validated.health, block_size=block_size)
    drawn["figures/loss.png"] = figures.loss_curve(history.train, history.valid)
    drawn["figures/loss_by_position.png"] = figures.loss_by_position(
        validated.position_edges, validated.position_losses, unit="nats per token"
    )
    for path, figure in drawn.items():
        tracker.log_figure(figure, path)
    if history.samples:
        # Whole each time, so that a run that goes over old steps again doubles no row.
        rows = [(step, *sample) for step, samples in history.samples for sample in samples]
        tracker.log_table(COLUMNS, rows, TABLE)
