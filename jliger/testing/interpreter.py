"""Makes Triton's interpreter faster. Not part of the wheel."""

import inspect
from typing import Any


def find_builtins_once() -> None:
    """Finds the functions of Triton's language that the interpreter replaces once, and not in every call.

    Whenever a kernel calls a function, Triton 3.9's interpreter searches all of `triton.language` for what it must
    replace. That takes more than half of a kernel's time. It finds the same members each time, so their names are kept.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    packages = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    names = {
        package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in packages
    }

    def patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
        # All members of a package are replaced together, and once in a kernel.
        if not tl.core.is_builtin(getattr(pkg, names[pkg][0])):
            return
        for name in names[pkg]:
            interpreter._patch_attr(pkg, name, getattr(pkg, name), builder, scope)

    interpreter._patch_builtin = patch_builtin
