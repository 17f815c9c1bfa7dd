"""Folders that jobs write to, looked at before any work."""

import os
import tempfile
from pathlib import Path

from nsa_platform import storage


def check_output(output: str, *, replaced: bool = False) -> None:
    """Find out whether a folder can be made or written to: a temporary one is made there, and goes
    again. Nothing is asked of a remote one.

    Args:
        replaced: the folder is to be replaced as a whole, for which one is made beside it.

    Raises:
        ValueError: it cannot.
    """
    if storage.is_remote(output):
        return
    folder = Path(output).absolute()
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"output={output}: is a file, must be a folder")
    places = folder.parents if replaced else (folder, *folder.parents)
    nearest = next(place for place in places if os.path.exists(place))
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise ValueError(
            f"output={output}: nothing can be written in {nearest} ({error.strerror}); "
            "give another folder"
        ) from None
