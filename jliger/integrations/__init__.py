"""jliger's losses inside other trainers. Each module imports its trainer; this package imports none.

| module | trainer | what it offers |
| --- | --- | --- |
| `jliger.integrations.maxtext` | MaxText | `install()`, or the module as the program to run |
| `jliger.integrations.tunix` | tunix | `loss_fn` and `install()` |
| `jliger.integrations.kauldron` | kauldron, gemma | a loss, and a mixin for gemma's models |
| `jliger.integrations.keras` | Keras, keras-hub | a mixin for language models |
| `jliger.integrations.levanter` | levanter | an implementation of its fused cross entropy |
"""

from jliger.integrations.versions import TESTED

__all__ = ["TESTED"]


def __dir__() -> list[str]:
    """What is public."""
    return list(__all__)
