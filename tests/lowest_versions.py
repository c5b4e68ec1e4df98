"""Prints requirements that pin what pyproject.toml asks for to the lowest version that it allows."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEST_TOOLS = ("hypothesis", "jax-triton", "pytest", "pytest-xdist", "triton")


def main() -> None:
    tools = [entry for entry in EXTRAS["test"] if re.match(r"[\w-]+", entry)[0] in TEST_TOOLS]
    for entry in [*PROJECT["dependencies"], *tools]:
        name, version, marker = re.fullmatch(r"([\w\[\]-]+)>=([\d.]+)[^;]*(;.*)?", entry).groups()
        print(f"{name}=={version}{marker or ''}")


if __name__ == "__main__":
    main()
