"""The safetensors files of a model folder as one table of tensors, each read when it is asked for.

Either all tensors lie in model.safetensors, or model.safetensors.index.json says which file holds
which, as transformers writes large models.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class TensorFileError(ValueError):
    """The weights of a folder cannot be read; the message names the file."""


class TensorFiles:
    """Names, shapes and tensors of one folder.

    Raises:
        TensorFileError: there are no safetensors, or a file is missing, broken or lacks a tensor
            that the index promises.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.paths = weight_paths(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every tensor, by name."""
        self._owners: dict[str, Path] = {}
        for path in self.paths:
            self._read_header(path)
        if (folder / INDEX_FILE).is_file():
            promised = _index(folder / INDEX_FILE)
            lost = [name for name in promised if name not in self.shapes]
            if lost:
                raise TensorFileError(f"{folder / INDEX_FILE}: promises {lost[0]}, no file has it")

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, as it was stored. Raises KeyError for an unknown name."""
        with safe_open(self._owners[name], framework="pt") as file:
            return file.get_tensor(name)

    def parts(self, name: str, dim: int, ranges: Sequence[slice]) -> Tensor:
        """Some ranges of a tensor along axis `dim`, one after the other; nothing else is held."""
        with safe_open(self._owners[name], framework="pt") as file:
            stored = file.get_slice(name)
            before = (slice(None),) * dim
            return torch.cat([stored[(*before, each)] for each in ranges], dim)

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise TensorFileError(f"{path}: does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._owners[name] = path
        except SafetensorError as error:
            raise TensorFileError(f"{path}: is not a whole safetensors file: {error}") from None


def weight_paths(folder: str | Path) -> list[Path]:
    """The weight files that a folder should have, in a fixed order.

    Raises:
        TensorFileError: the index is malformed.
    """
    index = Path(folder) / INDEX_FILE
    if not index.is_file():
        return [Path(folder) / WEIGHTS_FILE]
    return [Path(folder) / name for name in sorted(set(_index(index).values()))]


def _index(path: Path) -> dict[str, str]:
    try:
        return {
            str(name): str(file)
            for name, file in json.loads(path.read_text())["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path}: is not an index of weights ({error!r})") from None
