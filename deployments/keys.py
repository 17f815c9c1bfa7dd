"""API keys: kept as hashes, compared in constant time, each with limits of its own."""

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, PositiveInt, model_validator

from nsa_platform.config.base import ConfigError, Strict, read_yaml
from nsa_platform.config.locations import Location


class ApiKey(Strict):
    """One key, as it lies in a file or a secret."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    """Whose it is; stands in logs and refusals."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key, in hex. Keys are 256 random bits, so a fast hash does not give them away."""
    tokens_per_minute: PositiveInt | None = None
    """Tokens of prompts and outputs, on average over minutes; null: no limit."""
    max_concurrent_requests: PositiveInt | None = None
    """Requests that may be open at once; null: no limit."""


class KeyFile(Strict):
    """What a file or variable of keys holds, as YAML."""

    keys: Annotated[tuple[ApiKey, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [key.name for key in self.keys]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"keys: names must differ, {', '.join(twice)} comes twice")
        return self


class AccessSettings(Strict):
    """Who may ask, and what is written down about it."""

    api_keys_file: Location | None = None
    """YAML file of keys, such as a mounted secret; null: see api_keys_env."""
    api_keys_env: str | None = None
    """Environment variable that holds the same YAML. Neither: anybody may ask."""
    log_requests: bool = True
    """Write a line of JSON for every request."""
    log_prompts: bool = False
    """Put what was asked into it too: private text in logs."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.api_keys_file is not None and self.api_keys_env is not None:
            raise ValueError("api_keys_file and api_keys_env exclude each other")
        return self


class KeyRing:
    """The keys that open the server."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self.keys = tuple(keys)

    def find(self, secret: str) -> ApiKey | None:
        """Whose key this is. Takes the same time for every secret, right or wrong."""
        digest = hash_of(secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found


def hash_of(secret: str) -> str:
    """sha256 of a key, in hex."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def read_keys(settings: AccessSettings) -> KeyRing | None:
    """The keys that the settings name; None: anybody may ask.

    Raises:
        ConfigError: there is no such file or variable, or what it holds is no list of keys.
    """
    if settings.api_keys_file is not None:
        source = f"access.api_keys_file={settings.api_keys_file}"
        tree = read_yaml(Path(settings.api_keys_file))
    elif settings.api_keys_env is not None:
        tree, source = _from_environment(settings.api_keys_env), f"${settings.api_keys_env}"
    else:
        return None
    return KeyRing(KeyFile.parse(tree, source=source).keys)


def _from_environment(name: str) -> Any:
    text = os.environ.get(name)
    if not text:
        raise ConfigError(f"access.api_keys_env: there is no variable {name}, or it is empty")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        # Without the parser's own words: they would quote the secret.
        raise ConfigError(f"${name}: is not YAML") from None
