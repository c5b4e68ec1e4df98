"""Which versions of other trainers the integrations were tested with."""

import importlib.metadata

TESTED: dict[str, tuple[str, ...]] = {
    "google-tunix": ("0.1.8",),
    "kauldron": ("1.4.4",),
    "keras": ("3.15.1",),
    "marin-levanter": ("0.2.227.dev40316220070",),
    "maxtext": ("0.2.5",),
}
"""The versions of each package that its integration was tested with. Another one raises; add it here to try it."""


def check_version(package: str) -> None:
    """Raises unless the installed version of `package` is one of those in `TESTED`.

    Raises:
      ImportError: it is another one, or the package is not installed.
    """
    tested = TESTED[package]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed; install {package}=={tested[-1]}.") from None
    if version not in tested:
        raise ImportError(
            f"{package} is {version}, and jliger was tested with {', '.join(tested)}; install one of these. To try "
            f"this version, first write jliger.integrations.TESTED[{package!r}] += ({version!r},), and compare a loss "
            "with the trainer's own."
        )
