"""Heads of Flax NNX: the losses of their logits, without the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

import jliger
from jliger.testing.heads import (
    HIDDEN_SIZE,
    VOCAB,
    as_float64,
    loss_and_grads,
    loss_of_logits,
    make_hidden,
    make_labels,
    randomized,
)
from jliger.testing.oracle import INTERPRETED, Problem, assert_rule_of_two, equations, exact, exact_and_rounding
from jliger.testing.promotion import with_promotion

SIZES = (HIDDEN_SIZE, VOCAB)


@pytest.fixture(autouse=True)
def float32_products():
    """On GPUs too, where those of TensorFloat-32 would be further off than what is allowed here."""
    with jax.default_matmul_precision("highest"):
        yield


def lora(base):
    return nnx.LoRA(HIDDEN_SIZE, 2, VOCAB, base_module=base, rngs=nnx.Rngs(1))


RNGS = nnx.Rngs(0)
LAYERS = {
    "Linear": lambda: nnx.Linear(*SIZES, rngs=RNGS),
    "LinearGeneral": lambda: nnx.LinearGeneral(*SIZES, rngs=RNGS),
    "Einsum with a bias": lambda: nnx.Einsum("BTD,DV->BTV", SIZES, (VOCAB,), rngs=RNGS),
    "Einsum [V, H]": lambda: nnx.Einsum("b t d, v d -> b t v", SIZES[::-1], (VOCAB,), rngs=RNGS),
    "Embed": lambda: nnx.Embed(VOCAB, HIDDEN_SIZE, rngs=RNGS),
    "LoRALinear": lambda: nnx.LoRALinear(*SIZES, lora_rank=2, rngs=RNGS),
    "LoRA of Einsum": lambda: lora(nnx.Einsum("...d,vd->...v", SIZES[::-1], rngs=RNGS)),
    "LMHead": lambda: jliger.nnx.LMHead(*SIZES, rngs=RNGS),
    "TiedLMHead": lambda: jliger.nnx.LMHead.tied(nnx.Embed(VOCAB, HIDDEN_SIZE, rngs=RNGS)),
}


def logits_of(module, hidden):
    return module.attend(hidden) if isinstance(module, nnx.Embed) else module(hidden)


def in_float64(module):
    graphdef, state = nnx.split(module)
    module = nnx.merge(graphdef, as_float64(state))
    for _, part in nnx.iter_modules(module):
        if getattr(part, "dtype", None) is not None:
            part.dtype = jnp.float64
    return module


def of_module(function, module, *arguments):
    """Results and gradients of a function of a module and hidden states."""
    graphdef, state = nnx.split(module)
    return loss_and_grads(lambda state, hidden: function(nnx.merge(graphdef, state), hidden), state, *arguments)


def assert_as_its_logits(module, loss, hidden, unfused_loss):
    """The rule of two for a loss of a module, against the module's own logits, in float64 and as they are."""
    found, theirs = (of_module(function, module, hidden) for function in (loss, unfused_loss))
    with jax.enable_x64(True):
        truth = of_module(unfused_loss, in_float64(module), as_float64(hidden))
        truth = {name: np.asarray(value) for name, value in truth.items()}
    assert_rule_of_two(found, theirs, truth)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_flax(name, implementation):
    module = LAYERS[name]()
    nnx.update(module, randomized(nnx.state(module)))
    labels = make_labels()
    options = {"logit_scale": 0.7, "logit_softcap": 2.0, "implementation": implementation}

    def loss(module, hidden):
        return 3 * jliger.nnx.fused_linear_cross_entropy(module, hidden, labels, **options)

    def unfused_loss(module, hidden):
        return 3 * loss_of_logits(logits_of(module, hidden), labels, 0.7, 2.0)

    assert_as_its_logits(module, loss, make_hidden(), unfused_loss)


@pytest.mark.parametrize("name", ["LoRALinear", "TiedLMHead"])
def test_logprobs_of_layers_of_flax(name, implementation):
    module = LAYERS[name]()
    nnx.update(module, randomized(nnx.state(module)))
    labels = make_labels()
    counted = labels != -100
    cotangents = np.random.default_rng(3).normal(size=(3, *labels.shape))

    def loss(module, hidden):
        found = jliger.nnx.linear_logprobs(module, hidden, labels, logit_softcap=2.0, implementation=implementation)
        return sum(jnp.sum(c * each) for c, each in zip(cotangents, found[:3], strict=True))

    def unfused_loss(module, hidden):
        logits = 2.0 * jnp.tanh(logits_of(module, hidden) / 2.0)
        log_softmax = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_softmax, jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_softmax) * log_softmax, -1)
        lse = jax.nn.logsumexp(logits, -1)
        return sum(
            jnp.sum(c * jnp.where(counted, each, 0)) for c, each in zip(cotangents, (picked, lse, entropy), strict=True)
        )

    assert_as_its_logits(module, loss, make_hidden(), unfused_loss)


@pytest.mark.parametrize(
    ("layer", "dtype", "param_dtype", "hidden_dtype"),
    [
        ("LMHead", None, "float32", "float32"),
        ("LMHead", None, "float32", "bfloat16"),
        ("LMHead", None, "bfloat16", "float32"),
        ("LMHead", "bfloat16", "float32", "float32"),
        ("LMHead", "float32", "bfloat16", "bfloat16"),
        ("Embed", "bfloat16", "float32", "float32"),
    ],
)
def test_dtypes(layer, dtype, param_dtype, hidden_dtype, implementation):
    if INTERPRETED:
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    how = {"dtype": dtype, "param_dtype": jnp.dtype(param_dtype), "rngs": nnx.Rngs(0)}
    if layer == "Embed":
        module, names = nnx.Embed(VOCAB, HIDDEN_SIZE, **how), {"embedding": "kernel"}
    else:
        module, names = jliger.nnx.LMHead(*SIZES, **how), {"kernel": "kernel", "bias": "bias"}
    nnx.update(module, randomized(nnx.state(module)))
    hidden, labels = make_hidden(dtype=hidden_dtype), make_labels()
    products = jliger.nnx.layers.linear_head(module, hidden).product_dtype(hidden)
    assert products == logits_of(module, hidden).dtype

    def loss(module, hidden):
        return jliger.nnx.fused_linear_cross_entropy(
            module, hidden, labels, implementation=implementation, precision="highest"
        )

    def renamed(found):
        keys = {"loss": "loss", "1": "hidden"} | {f"0/{name}/value": new for name, new in names.items()}
        return {keys[name]: value for name, value in found.items()}

    found, theirs = (
        renamed(of_module(function, module, hidden))
        for function in (loss, lambda module, hidden: loss_of_logits(logits_of(module, hidden), labels))
    )
    parameters = {new: getattr(module, name)[...] for name, new in names.items()}
    problem = Problem(
        {"hidden": hidden, **parameters},
        labels,
        {"kernel_layout": "vh" if layer == "Embed" else "hv"},
        jnp.ones(()),
    )
    for name, value in problem.inputs.items():
        assert found[name].dtype == value.dtype, name
    of_products = problem.replace(inputs={name: value.astype(products) for name, value in problem.inputs.items()})
    assert_rule_of_two(found, theirs, exact(problem), more=exact_and_rounding(of_products)[1])


# ---- parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False, "param_dtype": jnp.bfloat16, "kernel_init": nnx.initializers.normal(0.1)},
        {"kernel_metadata": {"out_sharding": ("data", "model")}, "bias_metadata": {"out_sharding": ("model",)}},
        {"kernel_init": nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))},
    ],
)
def test_parameters_are_those_of_linear(options):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        head, layer = (kind(*SIZES, **options, rngs=nnx.Rngs(7)) for kind in (jliger.nnx.LMHead, nnx.Linear))
        found, expected = nnx.state(head), nnx.state(layer)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert nnx.get_partition_spec(found) == nnx.get_partition_spec(expected)
        for one, other in zip(nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True):
            assert (one[0], one[1].get_metadata()) == (other[0], other[1].get_metadata())
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    # A checkpoint of one is one of the other.
    nnx.update(head, randomized(expected))
    nnx.update(layer, nnx.state(head))
    np.testing.assert_array_equal(head(make_hidden()), with_promotion(layer)(make_hidden()))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_logits_are_those_of_the_layer_scaled_and_capped(dtype):
    linear, embed = nnx.Linear(*SIZES, dtype=dtype, rngs=RNGS), nnx.Embed(VOCAB, HIDDEN_SIZE, dtype=dtype, rngs=RNGS)
    head = jliger.nnx.LMHead(*SIZES, logit_scale=0.5, logit_softcap=2.0, dtype=dtype, rngs=RNGS)
    nnx.update(head, nnx.state(linear))
    tied = jliger.nnx.LMHead.tied(embed, logit_scale=0.5, logit_softcap=2.0)
    hidden = make_hidden()
    for found, expected in ((head(hidden), linear(hidden)), (tied(hidden), embed.attend(hidden))):
        assert found.dtype == expected.dtype
        # The same product; but the embedding's is taken without a transpose, and so maybe in another order.
        rounding = float(jnp.finfo(found.dtype).eps) * float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, 2.0 * jnp.tanh(expected * 0.5 / 2.0), atol=rounding, rtol=0)


class TiedModel(nnx.Module):
    """A model of an embedding and nothing else, whose head is made where it is used."""

    def __init__(self):
        self.wte = nnx.Embed(VOCAB, HIDDEN_SIZE, rngs=nnx.Rngs(0))

    def loss(self, tokens, labels):
        return jliger.nnx.LMHead.tied(self.wte, logit_softcap=2.0).loss(self.wte(tokens), labels)

    def unfused_loss(self, tokens, labels):
        return loss_of_logits(self.wte.attend(self.wte(tokens)), labels, softcap=2.0)


def test_a_tied_head_adds_no_parameter_and_gets_both_gradients():
    tokens, labels = jnp.abs(make_labels(1)) % VOCAB, make_labels(2)
    model = TiedModel()
    found, expected = (nnx.grad(f)(model, tokens, labels) for f in (TiedModel.loss, TiedModel.unfused_loss))
    assert [path for path, _ in nnx.to_flat_state(found)] == [("wte", "embedding")]
    np.testing.assert_allclose(
        found.wte.embedding[...], expected.wte.embedding[...], atol=8 * np.finfo(np.float32).eps, rtol=0
    )


def test_a_tied_head_that_is_kept_shares_its_parameter():
    model = TiedModel()
    model.z_head = jliger.nnx.LMHead.tied(model.wte)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model))] == [("wte", "embedding")]
    tokens, labels = jnp.abs(make_labels(1)) % VOCAB, make_labels(2)

    @nnx.jit
    def grad(model):
        return nnx.grad(lambda model: model.z_head.loss(model.wte(tokens), labels))(model)

    def unfused_loss(model):
        return loss_of_logits(model.wte.attend(model.wte(tokens)), labels)

    np.testing.assert_allclose(
        grad(model).wte.embedding[...],
        nnx.grad(unfused_loss)(model).wte.embedding[...],
        atol=8 * np.finfo(np.float32).eps,
        rtol=0,
    )


# ---- LoRA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LoRALinear", "LoRA of Einsum"])
def test_kernels_of_a_lora_are_never_merged(name):
    module = LAYERS[name]()
    graphdef, adapter, rest = nnx.split(module, nnx.LoRAParam, ...)

    def loss(adapter):
        module = nnx.merge(graphdef, adapter, rest)
        return jliger.nnx.fused_linear_cross_entropy(module, make_hidden(), make_labels(), implementation="xla")

    # Of the frozen kernel's shape nothing is computed: neither the sum of kernel and adapter, nor a gradient.
    computed = [
        equation.primitive.name
        for equation in equations(jax.make_jaxpr(jax.grad(loss))(adapter))
        if any(getattr(result.aval, "shape", None) in (SIZES, SIZES[::-1]) for result in equation.outvars)
    ]
    assert not set(computed) & {"dot_general", "add", "add_any", "mul"}, computed


def test_a_lora_of_low_precision(implementation):
    if INTERPRETED:
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    module = nnx.LoRALinear(*SIZES, lora_rank=2, use_bias=False, param_dtype=jnp.bfloat16, rngs=RNGS)
    nnx.update(module, randomized(nnx.state(module)))
    hidden, labels = make_hidden(dtype=jnp.bfloat16), make_labels()

    cotangents = np.random.default_rng(4).normal(size=labels.shape)

    def loss(module, hidden):
        options = {"implementation": implementation, "reduction": "none"}
        return jnp.sum(jliger.nnx.fused_linear_cross_entropy(module, hidden, labels, **options) * cotangents)

    found = of_module(loss, module, hidden)
    dtypes = {name.removesuffix("/value"): value.dtype for name, value in found.items()}
    low, high = jnp.bfloat16, jnp.float32
    assert dtypes == {"loss": high, "1": low, "0/kernel": low, "0/lora/lora_a": high, "0/lora/lora_b": high}
    assert jliger.nnx.layers.linear_head(module, hidden).logits_dtype == with_promotion(module)(hidden).dtype == high

    @with_promotion
    def unfused_loss(module, hidden):
        log_softmax, counted = jax.nn.log_softmax(module(hidden)), labels != -100
        picked = jnp.take_along_axis(log_softmax, jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
        return -jnp.sum(picked * counted * cotangents)

    # Products are all taken in the base's dtype: as exact as a LoRA of that dtype, and not more.
    with jax.enable_x64(True):
        truth = {
            name: np.asarray(value)
            for name, value in of_module(unfused_loss, in_float64(module), as_float64(hidden)).items()
        }
    module.lora.dtype = low
    theirs = of_module(unfused_loss, module, hidden)
    for each in (found, theirs, truth):
        del each["loss"]  # one number alone may be exact by luck
    assert_rule_of_two(found, theirs, truth)


# ---- Medusa --------------------------------------------------------------------------------------------------


def test_medusa_heads(implementation):
    heads = jliger.nnx.MedusaHeads(3, *SIZES, logit_softcap=2.0, rngs=nnx.Rngs(0))
    hidden, labels = make_hidden(), jnp.stack([make_labels(seed) for seed in range(3)])
    # Blocks begin as the identity, and heads each with numbers of their own, as large as one alone would have.
    kernels = heads.heads.kernel[...]
    np.testing.assert_allclose(heads(hidden), 2.0 * jnp.tanh(hidden @ kernels[:, None] / 2.0), atol=1e-6)
    assert len(np.unique(kernels)) == kernels.size
    assert 0.5 < float(kernels.std()) * np.sqrt(HIDDEN_SIZE) < 1.5
    nnx.update(heads, randomized(nnx.state(heads)))

    def loss(heads, hidden):
        return heads.loss(hidden, labels, head_weights=[1.0, 0.3, 0.5], implementation=implementation)

    @with_promotion
    def unfused_loss(heads, hidden):
        kernels, block = heads.heads.kernel[...], heads.blocks[0]
        features = [hidden + nnx.silu(hidden @ block.kernel[i] + block.bias[i]) for i in range(3)]
        return sum(
            weight * loss_of_logits(features[i] @ kernels[i], labels[i], softcap=2.0)
            for i, weight in enumerate([1.0, 0.3, 0.5])
        )

    assert_as_its_logits(heads, loss, hidden, unfused_loss)


def test_medusa_heads_that_begin_as_the_models_own():
    head = jliger.nnx.LMHead(*SIZES, use_bias=False, rngs=RNGS)
    heads = jliger.nnx.MedusaHeads(2, *SIZES, kernel_init=lambda *_: head.kernel[...], rngs=RNGS)
    for logits in heads(make_hidden()):
        np.testing.assert_allclose(logits, head(make_hidden()), atol=1e-6)


def test_the_sharding_of_medusa_heads():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        heads = jliger.nnx.MedusaHeads(2, *SIZES, kernel_metadata={"out_sharding": ("data", "model")}, rngs=RNGS)
    assert nnx.get_partition_spec(nnx.state(heads)).heads.kernel.get_value() == jax.P(None, "data", "model")


# ---- what is refused, and what comes first -------------------------------------------------------------------


class Doubling(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs)


def own_product(*arguments, **options):
    return jax.lax.dot_general(*arguments, **options)


@pytest.mark.parametrize(
    ("says", "module"),
    [
        ("module got a Dropout", lambda: nnx.Dropout(0.1)),
        ("Doubling that overrides Linear.__call__", lambda: Doubling(*SIZES, rngs=RNGS)),
        ("Linear with a product of its own", lambda: nnx.Linear(*SIZES, dot_general=own_product, rngs=RNGS)),
        (r"kernel \(6, 11, 2\)", lambda: nnx.LinearGeneral(HIDDEN_SIZE, (VOCAB, 2), rngs=RNGS)),
        (r"axis \(-2,\)", lambda: nnx.LinearGeneral(*SIZES, axis=-2, rngs=RNGS)),
        (r"batch axes \(0,\)", lambda: nnx.LinearGeneral(*SIZES, batch_axis={0: 3}, rngs=RNGS)),
        ("'btd,dnv->btnv'", lambda: nnx.Einsum("btd,dnv->btnv", (6, 2, 11), rngs=RNGS)),
        ("'btd,dv->bvt'", lambda: nnx.Einsum("btd,dv->bvt", SIZES, rngs=RNGS)),
        ("'btd,bv->btv'", lambda: nnx.Einsum("btd,bv->btv", SIZES, rngs=RNGS)),
        ("'dd,dv->dv'", lambda: nnx.Einsum("dd,dv->dv", SIZES, rngs=RNGS)),
        ("base_module NoneType", lambda: lora(None)),
        ("base_module Embed", lambda: lora(nnx.Embed(VOCAB, HIDDEN_SIZE, rngs=RNGS))),
        ("a LoRA of a LoRA", lambda: lora(lora(nnx.Linear(*SIZES, rngs=RNGS)))),
    ],
)
def test_modules_that_are_no_heads_are_refused(says, module):
    with pytest.raises(NotImplementedError, match=says):
        jliger.nnx.fused_linear_cross_entropy(module(), make_hidden(), make_labels())


@pytest.mark.parametrize("name", ["kernel", "bias", "kernel_layout"])
def test_parameters_are_the_modules_own(name):
    head = jliger.nnx.LMHead(*SIZES, rngs=RNGS)
    with pytest.raises(TypeError, match=f"{name} comes with the head"):
        head.loss(make_hidden(), make_labels(), **{name: None})


def test_options_come_first():
    head = jliger.nnx.LMHead(*SIZES, logit_scale=0.5, logit_softcap=2.0, rngs=RNGS)
    hidden, labels = make_hidden(), make_labels()
    found = head.loss(hidden, labels, logit_scale=2.0, logit_softcap=None)
    expected = jliger.nnx.fused_linear_cross_entropy(nnx.Linear(*SIZES, rngs=RNGS), hidden, labels)
    assert found != expected
    linear = nnx.Linear(*SIZES, rngs=RNGS)
    nnx.update(linear, nnx.state(head))
    assert found == jliger.nnx.fused_linear_cross_entropy(linear, hidden, labels, logit_scale=2.0)


def test_a_promotion_of_ones_own_is_called():
    def promote(arrays, /, *, dtype):
        arrays = tuple(array if array is None else array.astype(jnp.float16) for array in arrays)
        return promote_dtype(arrays, dtype=dtype)

    hidden, labels = make_hidden(), make_labels()
    for module in (
        jliger.nnx.LMHead(*SIZES, promote_dtype=promote, rngs=RNGS),
        nnx.Embed(VOCAB, HIDDEN_SIZE, promote_dtype=promote, rngs=RNGS),
    ):
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(leaf.dtype), nnx.state(module))
        found = jliger.nnx.fused_linear_cross_entropy(module, hidden, labels)
        nnx.update(module, state)
        module.promote_dtype = promote_dtype
        rounded = hidden.astype(jnp.float16).astype(module.dtype or jnp.float16)
        if isinstance(module, jliger.nnx.LMHead):
            module.dtype = jnp.float16
        assert found == jliger.nnx.fused_linear_cross_entropy(module, rounded, labels)
