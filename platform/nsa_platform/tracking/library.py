"""Every name that is taken from MLflow, imported in silence: no telemetry, logs or warnings.

MLflow is imported when the first name is asked for. That takes a second, which a replica that
serves a folder and a worker that records nothing need not wait.
"""

import os
import warnings
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read by MLflow while it is imported; what the user has set stands. Points are retried in the
# background for as long as it takes, so that a single request may give up soon.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}.items():
    os.environ.setdefault(_name, _value)

# MLflow 3.17 maps its tables with a loader that SQLAlchemy 2.1 calls deprecated. It imports them
# when a process first opens a SQLite store, in whatever thread: filters are not a thread's own.
warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated")

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.entities import (
        Dataset,
        DatasetInput,
        InputTag,
        LoggedModelOutput,
        Metric,
        Param,
        Run,
        RunTag,
        ViewType,
    )
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.exceptions import MlflowException
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

__all__ = [
    "BaseMetricsMonitor",
    "CPUMonitor",
    "Dataset",
    "DatasetInput",
    "DiskMonitor",
    "GPUMonitor",
    "InputTag",
    "LoggedModelOutput",
    "Metric",
    "MlflowClient",
    "MlflowException",
    "ModelVersion",
    "NetworkMonitor",
    "Param",
    "Run",
    "RunTag",
    "ViewType",
    "download_artifacts",
]

_HOMES = (
    "mlflow",
    "mlflow.artifacts",
    "mlflow.entities",
    "mlflow.entities.model_registry",
    "mlflow.exceptions",
    "mlflow.system_metrics.metrics.base_metrics_monitor",
    "mlflow.system_metrics.metrics.cpu_monitor",
    "mlflow.system_metrics.metrics.disk_monitor",
    "mlflow.system_metrics.metrics.gpu_monitor",
    "mlflow.system_metrics.metrics.network_monitor",
)


@cache
def load() -> dict[str, Any]:
    """All names, imported now. Filters of warnings are not a thread's own: call it before others
    than the main thread ask for a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        homes = [vars(import_module(home)) for home in _HOMES]
    return {name: next(home[name] for home in homes if name in home) for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load()[name]
