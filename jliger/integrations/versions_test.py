"""A trainer's version that was not tested raises; those that .ci/integrations installs were."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from jliger import integrations
from jliger.integrations.versions import check_version

PINS = Path(__file__).parents[2] / "tests" / "integrations"


def test_a_version_that_was_tested(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"maxtext": "0.2.5"}.get)
    check_version("maxtext")


def test_another_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"maxtext": "0.3.0"}.get)
    with pytest.raises(ImportError, match=r"maxtext is 0\.3\.0, and jliger was tested with 0\.2\.5"):
        check_version("maxtext")
    monkeypatch.setitem(integrations.TESTED, "maxtext", (*integrations.TESTED["maxtext"], "0.3.0"))
    check_version("maxtext")


def test_not_installed(monkeypatch):
    monkeypatch.setitem(integrations.TESTED, "no-such-trainer", ("1.0",))
    with pytest.raises(ImportError, match="install no-such-trainer==1"):
        check_version("no-such-trainer")


def test_tested_versions_are_those_of_the_environments():
    pins = {}
    for path in PINS.glob("*/requirements.txt"):
        pins |= dict(re.findall(r"^([\w-]+)==(\S+)$", path.read_text(), flags=re.MULTILINE))
    # tunix's release has no hooks yet.
    for package in integrations.TESTED.keys() - {"google-tunix"}:
        assert pins[package] in integrations.TESTED[package]
