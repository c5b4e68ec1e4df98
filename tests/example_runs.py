"""What tests of the examples ask of a run: what it wrote, and how it ended."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def records(run: Path, event: str) -> dict[int, dict[str, Any]]:
    """A run's records of an event by step, the last one of each; what a killed process left of a line is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record for record in found if record["event"] == event}


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    return {step: record["loss"] for step, record in records(run, "train").items()}


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interruption(example: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which an interrupted example ends, and the status that shells know it by."""
    with pytest.raises(SystemExit) as ended:
        example.main(arguments)
    assert ended.value.code == 130
    return capsys.readouterr().err


def refusal(example: ModuleType, arguments: list[str]) -> str:
    """The message with which an example ends (which is a message, not a traceback)."""
    with pytest.raises(SystemExit) as ended:
        example.main(arguments)
    assert isinstance(ended.value.code, str)
    return ended.value.code
