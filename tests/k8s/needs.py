"""What the tests of the manifests need from outside, and what it means when it is not there."""

import os
import shutil
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Skip on a person's machine; where changes are judged nothing may be left out."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, but CI=true: all checks must run")
    pytest.skip(what)


def find_kubectl() -> str:
    """The path of kubectl, or the test ends here."""
    found = shutil.which("kubectl")
    if found is None:
        lacking("kubectl is not on PATH (k8s/README.md says where to get it)")
    return found
