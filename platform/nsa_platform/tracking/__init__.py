"""The only door to MLflow: runs that survive a dead server, datasets, figures, models."""

from nsa_platform.tracking.handle import RunHandle, flatten, origin_tags
from nsa_platform.tracking.opening import attach_run, open_parent, open_run
from nsa_platform.tracking.reading import RunRecord, read_json, read_run
from nsa_platform.tracking.registry import (
    fetch_model,
    is_model_reference,
    register_model,
    source_run,
)
from nsa_platform.tracking.store import TrackingError
from nsa_platform.tracking.system import SystemMonitor
from nsa_platform.tracking.tracker import Tracker
from nsa_platform.tracking.viewer import ui_command, ui_environment

__all__ = [
    "RunHandle",
    "RunRecord",
    "SystemMonitor",
    "Tracker",
    "TrackingError",
    "attach_run",
    "fetch_model",
    "flatten",
    "is_model_reference",
    "open_parent",
    "open_run",
    "origin_tags",
    "read_json",
    "read_run",
    "register_model",
    "source_run",
    "ui_command",
    "ui_environment",
]
