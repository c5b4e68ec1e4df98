"""The layout of the library: who may import whom, how long things may get, and what is public."""

import ast
import graphlib
import importlib
import inspect
from pathlib import Path

import pytest

import jliger
from jliger.ops.linear_head.arguments import HEAD_DEFAULTS, HeadOptions

ROOT = Path(jliger.__file__).parent
# A module imports from its own floor and from those before it. Names that begin alike: the longest counts.
FLOORS = [
    ["jliger.core"],
    ["jliger.ops.logits", "jliger.ops.norms", "jliger.ops.rope", "jliger.ops.gated_mlp"],
    ["jliger.ops.linear_head.types"],
    ["jliger.ops.linear_head.chunks"],
    ["jliger.ops.linear_head.sharding"],
    ["jliger.ops.linear_head", "jliger.ops.logits.cross_entropy"],
    ["jliger.heads", "jliger.losses", "jliger.accumulation", "jliger.labels", "jliger.reference"],
    ["jliger.nnx", "jliger.linen"],
    ["jliger"],
    ["jliger.bench", "jliger.integrations"],
]
MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_MODULE = 60, 400


def name_of(path):
    return ".".join(("jliger", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def is_of_tests(path):
    return path.name.endswith("_test.py") or path.name == "conftest.py" or "testing" in path.parts


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if not is_of_tests(path)}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imports(nodes):
    """Which of the library's modules some statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def floor_of(name):
    floors = {prefix: floor for floor, prefixes in enumerate(FLOORS) for prefix in prefixes}
    return floors[max((prefix for prefix in floors if f"{name}.".startswith(f"{prefix}.")), key=len)]


def test_no_module_imports_upwards():
    upwards = [
        (name, other)
        for name, tree in TREES.items()
        for other in imports(ast.walk(tree))
        if floor_of(other) > floor_of(name)
    ]
    assert not upwards


def test_no_imports_go_in_a_circle():
    # Of a module's top level: an import inside a function waits until the function is called.
    graph = {name: {other for other in imports(tree.body) if other != name} for name, tree in TREES.items()}
    assert sum(map(len, graph.values())) > len(MODULES)
    graphlib.TopologicalSorter(graph).prepare()


def test_functions_and_modules_are_short():
    for name, path in MODULES.items():
        source = path.read_text().splitlines()
        assert len(source) <= MOST_LINES_OF_A_MODULE, name
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef):
                assert lines_of_code(source, node) <= MOST_LINES_OF_A_FUNCTION, f"{name}.{node.name}"


def lines_of_code(source, function):
    """From its `def` to its end, without its docstring, comments and empty lines."""
    lines = source[function.lineno - 1 : function.end_lineno]
    count = sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
    if ast.get_docstring(function) is not None:
        first, last = function.body[0].lineno, function.body[0].end_lineno
        count -= sum(bool(line.strip()) for line in source[first - 1 : last])
    return count


@pytest.mark.parametrize(
    "module", ["jliger", "jliger.losses", "jliger.accumulation", "jliger.nnx", "jliger.linen", "jliger.integrations"]
)
def test_a_module_shows_what_is_public_and_nothing_else(module):
    module = importlib.import_module(module)
    assert dir(module) == sorted(module.__all__)
    imported = {name for name, value in vars(module).items() if getattr(value, "__module__", "").startswith("jliger.")}
    assert imported <= {*module.__all__, "__getattr__", "__dir__"}
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("operation", [jliger.fused_linear_cross_entropy, jliger.linear_logprobs])
def test_an_operation_offers_the_options_of_every_head(operation):
    parameters = inspect.signature(operation).parameters
    assert HeadOptions.__annotations__.keys() == HEAD_DEFAULTS.keys()
    assert {name: parameters[name].default for name in HEAD_DEFAULTS} == HEAD_DEFAULTS
