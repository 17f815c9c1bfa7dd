"""Models in MLflow's registry: put a folder in under a name and alias, and get it back."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nsa_platform.tracking import library
from nsa_platform.tracking.handle import RunHandle, absolute_uri
from nsa_platform.tracking.store import TrackingError, connect, create_run, explain, find_run

if TYPE_CHECKING:
    from nsa_platform.tracking.library import MlflowClient, ModelVersion

SCHEME = "models:/"
DIGEST_TAG = "nsa.digest"

Result = TypeVar("Result")


def register_model(handle: RunHandle, folder: str | Path, name: str, alias: str) -> int:
    """Upload a model folder as an output of the run and make it a version of the named model.

    The alias then points to that version. If it already points to a version with the same files,
    nothing is uploaded and that version is returned.

    Raises:
        TrackingError: the folder is empty, or the store does not answer or refuses.
    """
    folder = Path(folder)
    digest = _folder_digest(folder)

    def upload() -> int:
        client = connect(handle.uri, creates=True)
        current = _by_alias(client, name, alias)
        if current is not None and current.tags.get(DIGEST_TAG) == digest:
            return int(current.version)
        run = find_run(client, handle) or create_run(client, handle)
        model = client.create_logged_model(
            run.info.experiment_id, name=name, source_run_id=run.info.run_id, model_type="nsa"
        )
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run.info.run_id, [library.LoggedModelOutput(model.model_id, step=0)])
        _ensure_registered(client, name)
        version = client.create_model_version(
            name,
            source=model.artifact_location,
            run_id=run.info.run_id,
            tags={DIGEST_TAG: digest},
            model_id=model.model_id,
        )
        client.set_registered_model_alias(name, alias, version.version)
        return int(version.version)

    return _asking(handle.uri, f"registering {folder} as {name}@{alias}", upload)


def is_model_reference(reference: str) -> bool:
    """Whether a checkpoint is named as models:/name@alias or models:/name/version."""
    return reference.startswith(SCHEME)


def fetch_model(reference: str, uri: str, cache_dir: Path) -> Path:
    """The folder of a registered model, downloaded once into `cache_dir`.

    Args:
        reference: models:/name@alias or models:/name/version.
        uri: tracking store, as in TrackingConfig.

    Raises:
        ValueError: the reference has another form.
        TrackingError: there is no such model, or the store does not answer.
    """
    uri = absolute_uri(uri)

    def download() -> Path:
        client = connect(uri)
        version = _resolve(client, reference)
        digest = version.tags.get(DIGEST_TAG, "")[:12]
        target = cache_dir / f"{version.name}-v{version.version}-{digest}"
        if not target.is_dir():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_dir) as temporary:
                files = library.download_artifacts(
                    artifact_uri=client.get_model_version_download_uri(
                        version.name, str(version.version)
                    ),
                    dst_path=str(Path(temporary, "files")),
                    tracking_uri=uri,
                    registry_uri=uri,
                )
                Path(files).rename(target)
        return target

    return _asking(uri, f"fetching {reference}", download)


def source_run(reference: str, uri: str) -> str | None:
    """Id of the run that produced a registered model; None if the registry does not say.

    Raises:
        ValueError: the reference has another form than models:/name@alias or models:/name/version.
        TrackingError: there is no such model, or the store does not answer.
    """
    uri = absolute_uri(uri)
    return _asking(
        uri, f"looking up {reference}", lambda: _resolve(connect(uri), reference).run_id or None
    )


def _resolve(client: MlflowClient, reference: str) -> ModelVersion:
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if match is None:
        raise ValueError(f"{reference!r} must look like models:/name@alias or models:/name/version")
    name, alias, number = match.groups()
    if alias is None:
        return client.get_model_version(name, number)
    version = _by_alias(client, name, alias)
    if version is None:
        raise TrackingError(f"no model {name!r} with the alias {alias!r}")
    return version


def _by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, alias)
    except library.MlflowException as error:
        # A missing alias of a known model is answered as a bad parameter.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _ensure_registered(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except library.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _folder_digest(folder: Path) -> str:
    """Digest of the names and contents of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise TrackingError(f"{folder}: there is no model to register")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def _asking(uri: str, what: str, ask: Callable[[], Result]) -> Result:
    """Turn whatever the store throws into one clear error."""
    try:
        return ask()
    except (ValueError, TrackingError) as error:
        raise type(error)(f"{what}: {error}") from error
    except Exception as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            raise TrackingError(f"{what}: {explain(error)}") from error
        raise TrackingError(f"{what}: {uri} does not answer: {explain(error)}") from error
