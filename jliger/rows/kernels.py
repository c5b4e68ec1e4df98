"""The Triton kernels behind the row functions: one program a row, float32 arithmetic, outputs of their own.

A row of logits is read from device memory once. The second pass, which writes the gradients, goes over the row
backwards: it starts with what the first pass read last, which is what the cache still holds when the rows in flight
are together larger than it.
"""

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tanh(x):
    # Cephes' tanhf: a polynomial where 1 − exp(−2|x|) would cancel.
    size = tl.abs(x)
    decay = tl.exp(-2 * size)
    far = (1 - decay) / (1 + decay)
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _to_logits(product, bias, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logits of a product, and their derivative by it."""
    logits = (product.to(tl.float32) + bias) * SCALE
    slope = SCALE
    if SOFTCAP is not None:
        tanh = _tanh(logits / SOFTCAP)
        logits = SOFTCAP * tanh
        slope = SCALE * (1 - tanh * tanh)
    return logits, slope


@triton.jit
def _load_bias(bias_ptr, columns, inside, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    else:
        bias = 0.0
    return bias


@triton.jit
def _load_first(first_ptr, HAS_FIRST: tl.constexpr):
    if HAS_FIRST:
        first = tl.load(first_ptr)
    else:
        first = 0
    return first


@triton.jit
def _stats_of_row(
    row_ptr,  # [V]
    bias_ptr,  # [V]
    class_weights_ptr,  # [V]
    label,
    first,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    WITH_WEIGHTED_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Each lane keeps a maximum and a sum of its own, so that no block waits for a reduction across the program.
    lanes = tl.arange(0, BLOCK)
    lane_max = tl.full([BLOCK], _LOWEST, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    lane_start = tl.zeros([BLOCK], tl.int32)
    lane_weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + lanes
        inside = (columns < WIDTH) & (columns >= first)
        product = tl.load(row_ptr + columns, mask=inside, other=0.0)  # [BLOCK]
        bias = _load_bias(bias_ptr, columns, inside, HAS_BIAS)
        logits, _ = _to_logits(product, bias, SCALE, SOFTCAP)
        if WITH_WEIGHTED_SUM:
            terms = tl.where(inside, logits, 0.0)
            if HAS_CLASS_WEIGHTS:
                terms *= tl.load(class_weights_ptr + columns, mask=inside, other=0.0)
            lane_weighted += terms
        logits = tl.where(inside, logits, float("-inf"))
        # One exponential: of exp(old max − new max) and exp(logit − new max) one is always 1.
        larger = logits > lane_max
        decay = tl.exp(-tl.abs(logits - lane_max))
        lane_sum = tl.where(larger, lane_sum * decay + 1, lane_sum + decay)
        lane_max = tl.where(larger, logits, lane_max)
        lane_start = tl.where(larger, start, lane_start)
    row_max = tl.max(lane_max, axis=0)
    sum_exp = tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0)
    prediction = tl.min(tl.where(lane_max == row_max, lane_start + lanes, WIDTH), axis=0)
    weighted_sum = tl.sum(lane_weighted, axis=0)

    has_label = (label >= first) & (label < WIDTH)
    label_product = tl.load(row_ptr + label, mask=has_label, other=0.0)
    label_bias = _load_bias(bias_ptr, label, has_label, HAS_BIAS)
    label_logit, _ = _to_logits(label_product, label_bias, SCALE, SOFTCAP)
    return row_max, tl.log(sum_exp), tl.where(has_label, label_logit, 0.0), weighted_sum, prediction


@triton.jit
def _store_grads_of_row(
    grads_ptr,  # [V]
    row_ptr,  # [V]
    bias_ptr,  # [V]
    class_weights_ptr,  # [V]
    label,
    first,
    row_max,
    per_exp,
    label_coefficient,
    smoothing,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    last: tl.constexpr = (STRIDE - 1) // BLOCK * BLOCK
    for back in range(0, STRIDE, BLOCK):
        columns = last - back + lanes
        inside = (columns < WIDTH) & (columns >= first)
        product = tl.load(row_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_first")  # [BLOCK]
        bias = _load_bias(bias_ptr, columns, inside, HAS_BIAS)
        logits, slope = _to_logits(product, bias, SCALE, SOFTCAP)
        grads = tl.exp(logits - row_max) * per_exp - tl.where(columns == label, label_coefficient, 0.0)
        if HAS_SMOOTHING:
            if HAS_CLASS_WEIGHTS:
                grads -= smoothing * tl.load(class_weights_ptr + columns, mask=inside, other=0.0)
            else:
                grads -= smoothing
        grads = tl.where(inside, grads * slope, 0.0)
        tl.store(
            grads_ptr + columns,
            grads.to(grads_ptr.dtype.element_ty),
            mask=columns < STRIDE,
            cache_modifier=".cs",
        )


@triton.jit
def _load_coefficients(
    row,
    row_max,
    log_sum,
    probability_ptr,  # [T]
    probability_lse_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    smoothing_ptr,  # [T]
    HAS_LSE: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    probability = tl.load(probability_ptr + row)
    if HAS_LSE:
        probability += tl.load(probability_lse_ptr + row) * (row_max + log_sum)
    label_coefficient = tl.load(label_coefficient_ptr + row)
    if HAS_SMOOTHING:
        smoothing = tl.load(smoothing_ptr + row)
    else:
        smoothing = 0.0
    return probability * tl.exp(-log_sum), label_coefficient, smoothing


@triton.jit
def row_stats_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V]
    class_weights_ptr,  # [V]
    labels_ptr,  # [T]
    first_ptr,  # [1]
    max_ptr,  # [T], written
    log_sum_ptr,  # [T], written
    label_logit_ptr,  # [T], written
    weighted_sum_ptr,  # [T], written
    prediction_ptr,  # [T], written
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    WITH_WEIGHTED_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_max, log_sum, label_logit, weighted_sum, prediction = _stats_of_row(
        product_ptr + row * STRIDE,
        bias_ptr,
        class_weights_ptr,
        tl.load(labels_ptr + row),
        _load_first(first_ptr, HAS_FIRST),
        WIDTH,
        SCALE,
        SOFTCAP,
        HAS_BIAS,
        HAS_CLASS_WEIGHTS,
        WITH_WEIGHTED_SUM,
        BLOCK,
    )
    tl.store(max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(label_logit_ptr + row, label_logit)
    tl.store(weighted_sum_ptr + row, weighted_sum)
    tl.store(prediction_ptr + row, prediction)


@triton.jit
def row_grads_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V]
    class_weights_ptr,  # [V]
    labels_ptr,  # [T]
    first_ptr,  # [1]
    max_ptr,  # [T]
    log_sum_ptr,  # [T]
    probability_ptr,  # [T]
    probability_lse_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    smoothing_ptr,  # [T]
    grads_ptr,  # [T, V], written
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_max = tl.load(max_ptr + row)
    per_exp, label_coefficient, smoothing = _load_coefficients(
        row,
        row_max,
        tl.load(log_sum_ptr + row),
        probability_ptr,
        probability_lse_ptr,
        label_coefficient_ptr,
        smoothing_ptr,
        HAS_LSE,
        HAS_SMOOTHING,
    )
    _store_grads_of_row(
        grads_ptr + row * STRIDE,
        product_ptr + row * STRIDE,
        bias_ptr,
        class_weights_ptr,
        tl.load(labels_ptr + row),
        _load_first(first_ptr, HAS_FIRST),
        row_max,
        per_exp,
        label_coefficient,
        smoothing,
        STRIDE,
        WIDTH,
        SCALE,
        SOFTCAP,
        HAS_BIAS,
        HAS_CLASS_WEIGHTS,
        HAS_SMOOTHING,
        BLOCK,
    )


@triton.jit
def row_stats_and_grads_kernel(
    product_ptr,  # [T, V]
    bias_ptr,  # [V]
    class_weights_ptr,  # [V]
    labels_ptr,  # [T]
    first_ptr,  # [1]
    probability_ptr,  # [T]
    probability_lse_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    smoothing_ptr,  # [T]
    max_ptr,  # [T], written
    log_sum_ptr,  # [T], written
    label_logit_ptr,  # [T], written
    weighted_sum_ptr,  # [T], written
    prediction_ptr,  # [T], written
    grads_ptr,  # [T, V], written
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    WITH_WEIGHTED_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = product_ptr + row * STRIDE
    label = tl.load(labels_ptr + row)
    first = _load_first(first_ptr, HAS_FIRST)
    row_max, log_sum, label_logit, weighted_sum, prediction = _stats_of_row(
        row_ptr,
        bias_ptr,
        class_weights_ptr,
        label,
        first,
        WIDTH,
        SCALE,
        SOFTCAP,
        HAS_BIAS,
        HAS_CLASS_WEIGHTS,
        WITH_WEIGHTED_SUM,
        BLOCK,
    )
    tl.store(max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(label_logit_ptr + row, label_logit)
    tl.store(weighted_sum_ptr + row, weighted_sum)
    tl.store(prediction_ptr + row, prediction)
    per_exp, label_coefficient, smoothing = _load_coefficients(
        row,
        row_max,
        log_sum,
        probability_ptr,
        probability_lse_ptr,
        label_coefficient_ptr,
        smoothing_ptr,
        HAS_LSE,
        HAS_SMOOTHING,
    )
    _store_grads_of_row(
        grads_ptr + row * STRIDE,
        row_ptr,
        bias_ptr,
        class_weights_ptr,
        label,
        first,
        row_max,
        per_exp,
        label_coefficient,
        smoothing,
        STRIDE,
        WIDTH,
        SCALE,
        SOFTCAP,
        HAS_BIAS,
        HAS_CLASS_WEIGHTS,
        HAS_SMOOTHING,
        BLOCK,
    )
