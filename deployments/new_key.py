"""Make an API key: prints it once, and the entry for the file of keys.

    python -m deployments.new_key --name alice --tokens-per-minute 1000000

Only the entry, which holds a hash, is to be kept on the server.
"""

import argparse
import secrets
import sys
from collections.abc import Sequence

import yaml

from deployments.keys import ApiKey, hash_of
from jobs.cli import EXIT_BAD_CONFIG, fail
from nsa_platform.config.base import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Print a fresh key to stderr and its entry to stdout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="whose key it is")
    parser.add_argument("--tokens-per-minute", type=int, help="of prompts and outputs")
    parser.add_argument("--max-concurrent-requests", type=int, help="open at once")
    options = parser.parse_args(argv)
    secret = f"nsa-{secrets.token_urlsafe(32)}"
    try:
        entry = ApiKey.parse({**vars(options), "sha256": hash_of(secret)}, source="flags")
    except ConfigError as error:
        fail(str(error), status=EXIT_BAD_CONFIG)
    print(f"the key, shown this once: {secret}", file=sys.stderr)
    tree = {"keys": [entry.model_dump(exclude_none=True)]}
    print(yaml.safe_dump(tree, sort_keys=False), end="")


if __name__ == "__main__":
    main()
