"""Every name that is taken from MLflow, imported in silence: no telemetry, logs or warnings."""

import os
import warnings

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

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
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
