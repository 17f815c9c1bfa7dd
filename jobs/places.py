"""Folders that jobs write to, looked at before any work."""

import os
import tempfile
from pathlib import Path

from nsa_platform import storage


def check_output(output: str) -> None:
    """Find out whether a folder can be made or written to: one beside it is, and goes again.
    Nothing is asked of a remote one.

    Raises:
        ValueError: it cannot.
    """
    if storage.is_remote(output):
        return
    folder = Path(output)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"output={output}: is a file, must be a folder")
    beside = next(parent for parent in folder.absolute().parents if os.path.exists(parent))
    try:
        tempfile.TemporaryDirectory(dir=beside).cleanup()
    except OSError as error:
        raise ValueError(
            f"output={output}: nothing can be written in {beside} ({error.strerror}); "
            "give another folder"
        ) from None
