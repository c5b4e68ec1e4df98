"""Tests the roles of mesh axes, which follow from shapes and specs alone."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jliger.ops.linear_head.sharding.passes import LossPass
from jliger.ops.linear_head.sharding.plan import Plan, first_column, local_plan
from jliger.ops.linear_head.types import HeadConfig
from jliger.ops.logits import StatsWanted

SIZES = {"data": 2, "seq": 2, "model": 4, "one": 1}
HIDDEN = (8, 4, 16)  # [B, L, H]
KERNEL = (16, 64)  # [H, V]


def make(hidden, kernel, vocab_dim=1, hidden_shape=HIDDEN, kernel_shape=KERNEL):
    return Plan.make(SIZES, (hidden_shape, hidden), (kernel_shape, kernel), vocab_dim)


def make_config():
    types = {"logits_dtype": np.dtype(np.float32), "precision": None, "chunk_size": None, "implementation": "xla"}
    return HeadConfig("hv", 1.0, None, **types, compute_capability=None, stats_wanted=StatsWanted(False, False))


def test_nothing_sharded():
    plan = make(P(), P())
    assert plan[:3] == (((), ()), (), ((), ()))
    assert plan.tokens == plan.summed == ()
    assert plan.spec("th") == P(None, None, None)
    assert plan.spec("t") == P(None, None)
    assert plan.spec("hv") == plan.spec("hv", is_result=True) == P(None, None)
    assert plan.spec("v") == P(None)


def test_data_and_sequence_parallel():
    plan = make(P("data", "seq"), P())
    assert plan.batch == (("data",), ("seq",))
    assert plan.tokens == plan.summed == ("data", "seq")
    assert plan.spec("th") == P("data", "seq", None)
    assert plan.spec("t") == P("data", "seq")
    assert plan.spec("hv", is_result=True) == P(None, None)


@pytest.mark.parametrize(
    ("kernel", "scattered", "summed"),
    [
        (P("data"), (("data",), ()), ("seq",)),
        (P(None, "seq"), ((), ("seq",)), ("data",)),
        (P("seq", "data"), (("seq",), ("data",)), ()),
        (P(("seq", "data")), (("seq", "data"), ()), ()),
    ],
)
def test_fsdp(kernel, scattered, summed):
    plan = make(P("data", "seq"), kernel)
    assert plan.vocab == ()
    assert plan.scattered == scattered
    assert plan.summed == summed
    # The kernel is gathered, and its gradient scattered.
    assert plan.spec("hv") == P(None, None)
    assert plan.spec("hv", is_result=True) == P(*(*kernel, None)[:2])


@pytest.mark.parametrize(("vocab_dim", "kernel"), [(1, P(None, "model")), (0, P("model", None))])
def test_vocabulary_parallel(vocab_dim, kernel):
    shape = KERNEL if vocab_dim == 1 else KERNEL[::-1]
    plan = make(P("data"), kernel, vocab_dim, kernel_shape=shape)
    assert plan.vocab == ("model",)
    assert plan.scattered == ((), ())
    dims = "hv" if vocab_dim == 1 else "vh"
    assert plan.spec(dims) == plan.spec(dims, is_result=True) == kernel
    assert plan.spec("v") == plan.spec("v", is_result=True) == P("model")


def test_both_at_once():
    plan = make(P("data", "seq"), P("data", ("model", "seq")))
    assert plan[:3] == ((("data",), ("seq",)), ("model",), (("data",), ("seq",)))
    assert plan.summed == ()
    assert plan.spec("hv") == P(None, "model")
    assert plan.spec("hv", is_result=True) == P("data", ("model", "seq"))


def test_vocabulary_axes_come_first():
    # Whatever their order in the kernel's spec: the gradient has this order, and is resharded to the kernel's.
    plan = make(P("data"), P(None, ("data", "model")))
    assert plan.spec("hv") == P(None, "model")
    assert plan.spec("hv", is_result=True) == P(None, ("model", "data"))


def test_order_within_a_role_is_kept():
    assert make(P(), P(None, ("model", "data"))).vocab == ("model", "data")
    assert make(P(), P(None, ("data", "model"))).vocab == ("data", "model")
    assert make(P(("seq", "data")), P()).batch == (("seq", "data"), ())


def test_rows_of_the_kernel_over_an_axis_without_tokens_are_gathered():
    plan = make(P("data"), P("model"))
    assert plan[:3] == ((("data",), ()), (), ((), ()))
    assert plan.spec("hv") == plan.spec("hv", is_result=True) == P(None, None)


def test_the_hidden_dimension_is_gathered():
    plan = make(P("data", None, "model"), P("model"))
    assert plan.tokens == ("data",)
    assert plan.spec("th") == plan.spec("th", is_result=True) == P("data", None, None)


@pytest.mark.parametrize(
    ("hidden_shape", "kernel_shape", "expected"),
    [
        ((7, 4, 16), KERNEL, (((), ("seq",)), ("data", "model"), ((), ()))),
        ((8, 3, 16), KERNEL, ((("data",), ()), ("model",), ((), ("data",)))),
        # Both axes shard one dimension; if their product does not divide it, neither is used.
        (HIDDEN, (16, 60), ((("data",), ("seq",)), (), ((), ()))),
    ],
)
def test_an_axis_that_does_not_divide_its_dimension_is_left_out(hidden_shape, kernel_shape, expected):
    hidden, kernel = P("data", "seq"), P(None, ("data", "model"))
    assert make(hidden, kernel, hidden_shape=hidden_shape, kernel_shape=kernel_shape)[:3] == expected


def test_rows_that_do_not_divide():
    assert make(P("data"), P("data"), kernel_shape=(15, 64)).scattered == ((), ())


def test_axes_of_one_device_stay_in_specs_and_move_nothing():
    plan = make(P(("one", "data")), P(None, "one"))
    assert plan.spec("t") == P(("one", "data"), None)
    assert plan.tokens == plan.summed == ("data",)
    assert plan.columns == ()


def test_no_leading_dimensions_but_one():
    plan = make(P("data"), P("data"), hidden_shape=(8, 16))
    assert plan.spec("th") == P("data", None)
    assert plan.spec("t") == P("data")


@pytest.mark.parametrize(
    ("flags", "specs", "examples", "batch", "kernel_grad"),
    [
        # The examples of one vmap are sharded: nothing is summed over their axis, and the kernel is gathered over it.
        ("htk", [P("data"), P("data"), P("data")], [("data",)], [(), ()], P("data", None, None)),
        (
            "ht",
            [P("data", "seq"), P("data", "seq"), P("data", "seq")],
            [("data",)],
            [("seq",), ()],
            P("data", None, "seq"),
        ),
        # Only the labels are sharded.
        ("ht", [P(), P("data"), P(None, "model")], [("data",)], [(), ()], P("data", None, "model")),
        ("t", [P("seq"), P("data", "seq"), P()], [("data",)], [("seq",), ()], P("data", None, None)),
    ],
)
def test_examples_of_a_vmap(flags, specs, examples, batch, kernel_grad):
    shapes = {"th": HIDDEN, "t": HIDDEN[:-1], "hv": KERNEL}
    has = [name in flags for name in ("h", "t", "k")]
    operands = [((8,) * flag + shape, spec) for flag, shape, spec in zip(has, shapes.values(), specs, strict=True)]
    form = LossPass("stats", make_config(), examples=(tuple(has),))
    plan = Plan.of_operands(form, SIZES, tuple(shapes), operands)
    assert (plan.examples, plan.batch) == (tuple(examples), tuple(batch))
    assert plan.tokens == sum(batch, ())
    assert plan.spec("hv", is_result=True) == kernel_grad
    assert plan.spec("t", [has[1]]) == P("data", *plan.spec("t", [False]))


def test_examples_of_two_vmaps():
    # The outer vmap batches kernels and is replicated; the inner one batches tokens and is sharded.
    form = LossPass("stats", make_config(), examples=((False, True), (True, False)))
    operands = [((4, *HIDDEN), P("data")), ((3, *KERNEL), P(None, "data"))]
    plan = Plan.of_operands(form, SIZES, ("th", "hv"), operands)
    assert plan.examples == ((), ("data",))
    assert plan.spec("hv", (True, False)) == P(None, None, None)
    assert plan.spec("th", (False, True)) == P("data", None, None, None)
    assert plan.spec("th", is_result=True) == P(None, "data", None, None, None)


def test_a_share_as_all_there_is():
    plan = local_plan(("model",))
    assert plan.tokens == plan.summed == ()
    assert plan.vocab == ("model",)
    assert first_column((), 64) == 0
