"""Kubernetes objects as YAML text."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Plain YAML: no anchors, and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(tree: Any) -> str:
    """The object as YAML, keys in the order in which they stand."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
