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
def _load(pointers, inside, EVICTION: tl.constexpr):
    """A load, of zeros where `inside` is false; None is true everywhere."""
    if inside is None:
        values = tl.load(pointers, eviction_policy=EVICTION)
    else:
        values = tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)
    return values


@triton.jit
def _load_logits(
    row_ptr,  # [V]
    bias_ptr,  # [V]
    columns,
    inside,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    product = _load(row_ptr + columns, inside, EVICTION)
    if HAS_BIAS:
        bias = _load(bias_ptr + columns, inside, "")
    else:
        bias = 0.0
    return _to_logits(product, bias, SCALE, SOFTCAP)


@triton.jit
def _inside(columns, first, WIDTH: tl.constexpr, HAS_FIRST: tl.constexpr, WHOLE: tl.constexpr):
    """Which columns are the block's; None for all of them, and then nothing is masked."""
    if WHOLE and not HAS_FIRST:
        inside = None
    elif HAS_FIRST:
        inside = (columns < WIDTH) & (columns >= first)
    else:
        inside = columns < WIDTH
    return inside


@triton.jit
def _tile(LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets `[LANES, VECTOR]`: a lane's vector is contiguous, so that it is loaded, and reduced, within a thread."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _finite(below):
    """A difference that is multiplied by its own exponential: clipped where the exponential is 0.

    The bound is small, so that the product with a large coefficient does not overflow; 0 · inf would be NaN.
    """
    return tl.maximum(below, -1024.0)


@triton.jit
def _moved_down(mean, sum_exp, step):
    """`Σ exp(z − m) · (z − m)` where the second `m` is larger by `−step`."""
    return mean + _finite(step) * sum_exp


@triton.jit
def _add_tile(
    lane_max,  # [LANES]
    lane_sum,  # [LANES]
    lane_start,  # [LANES]
    lane_weighted,  # [LANES]
    lane_mean,  # [LANES]
    start,
    row_ptr,  # [V]
    bias_ptr,  # [V]
    class_weights_ptr,  # [V]
    first,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    WITH_WEIGHTED_SUM: tl.constexpr,
    WITH_MEAN_LOGIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = start + _tile(LANES, VECTOR)
    inside = _inside(columns, first, WIDTH, HAS_FIRST, WHOLE)
    logits, _ = _load_logits(row_ptr, bias_ptr, columns, inside, SCALE, SOFTCAP, HAS_BIAS, "evict_last")
    if WITH_WEIGHTED_SUM:
        terms = logits
        if HAS_CLASS_WEIGHTS:
            terms *= _load(class_weights_ptr + columns, inside, "")
        if inside is not None:
            terms = tl.where(inside, terms, 0.0)
        lane_weighted += tl.sum(terms, axis=1)
    if inside is not None:
        logits = tl.where(inside, logits, float("-inf"))
    tile_max = tl.max(logits, axis=1)  # [LANES]
    new_max = tl.maximum(lane_max, tile_max)
    step = lane_max - new_max
    below = logits - new_max[:, None]
    exp = tl.exp(below)
    if WITH_MEAN_LOGIT:
        lane_mean = _moved_down(lane_mean, lane_sum, step) * tl.exp(step)
        lane_mean += tl.sum(exp * _finite(below), axis=1)
    lane_sum = lane_sum * tl.exp(step) + tl.sum(exp, axis=1)
    lane_start = tl.where(tile_max > lane_max, start, lane_start)
    return new_max, lane_sum, lane_start, lane_weighted, lane_mean


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
    HAS_FIRST: tl.constexpr,
    WITH_WEIGHTED_SUM: tl.constexpr,
    WITH_MEAN_LOGIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # First, for nothing waits for it.
    has_label = _inside(label, first, WIDTH, HAS_FIRST, WHOLE=False) & (label >= 0)
    label_logit, _ = _load_logits(row_ptr, bias_ptr, label, has_label, SCALE, SOFTCAP, HAS_BIAS, "")

    # Each lane keeps a maximum and a sum of its own: no tile waits for a reduction across threads.
    lane_max = tl.full([LANES], _LOWEST, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_start = tl.zeros([LANES], tl.int32)
    lane_weighted = tl.zeros([LANES], tl.float32)
    lane_mean = tl.zeros([LANES], tl.float32)
    TILE: tl.constexpr = LANES * VECTOR
    WHOLE_TILES: tl.constexpr = WIDTH // TILE * TILE
    for start in tl.range(0, WHOLE_TILES, TILE, loop_unroll_factor=UNROLL):
        lane_max, lane_sum, lane_start, lane_weighted, lane_mean = _add_tile(
            lane_max,
            lane_sum,
            lane_start,
            lane_weighted,
            lane_mean,
            start,
            row_ptr,
            bias_ptr,
            class_weights_ptr,
            first,
            WIDTH,
            SCALE,
            SOFTCAP,
            HAS_BIAS,
            HAS_CLASS_WEIGHTS,
            HAS_FIRST,
            WITH_WEIGHTED_SUM,
            WITH_MEAN_LOGIT,
            LANES,
            VECTOR,
            WHOLE=True,
        )
    if WHOLE_TILES < WIDTH:
        lane_max, lane_sum, lane_start, lane_weighted, lane_mean = _add_tile(
            lane_max,
            lane_sum,
            lane_start,
            lane_weighted,
            lane_mean,
            WHOLE_TILES,
            row_ptr,
            bias_ptr,
            class_weights_ptr,
            first,
            WIDTH,
            SCALE,
            SOFTCAP,
            HAS_BIAS,
            HAS_CLASS_WEIGHTS,
            HAS_FIRST,
            WITH_WEIGHTED_SUM,
            WITH_MEAN_LOGIT,
            LANES,
            VECTOR,
            WHOLE=False,
        )
    row_max = tl.max(lane_max, axis=0)
    step = lane_max - row_max
    sum_exp = tl.sum(lane_sum * tl.exp(step), axis=0)
    weighted_sum = tl.sum(lane_weighted, axis=0)
    mean_logit = 0.0
    if WITH_MEAN_LOGIT:
        mean_logit = tl.sum(_moved_down(lane_mean, lane_sum, step) * tl.exp(step), axis=0) / sum_exp

    # Lanes remember the tile of their maximum: in columns' order the first lane's vector there is known, and of its
    # columns the first that holds the maximum is read again.
    vectors = tl.where(lane_max == row_max, lane_start + tl.arange(0, LANES) * VECTOR, WIDTH)
    columns = tl.min(vectors, axis=0) + tl.arange(0, VECTOR)
    inside = _inside(columns, first, WIDTH, HAS_FIRST, WHOLE=False)
    logits, _ = _load_logits(row_ptr, bias_ptr, columns, inside, SCALE, SOFTCAP, HAS_BIAS, "evict_last")
    prediction = tl.min(tl.where(inside & (logits == row_max), columns, WIDTH - 1), axis=0)
    return row_max, tl.log(sum_exp), tl.where(has_label, label_logit, 0.0), weighted_sum, mean_logit, prediction


@triton.jit
def _logit_grads(
    row_ptr,  # [V]
    bias_ptr,  # [V]
    class_weights_ptr,  # [V]
    columns,
    inside,
    row_max,
    per_exp,
    per_exp_logit,
    label_coefficient,
    smoothing,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_LOGIT: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Gradients by the products in some columns, all of which are the label's, or none."""
    logits, slope = _load_logits(row_ptr, bias_ptr, columns, inside, SCALE, SOFTCAP, HAS_BIAS, EVICTION)
    below = logits - row_max
    if HAS_LOGIT:
        per_exp += per_exp_logit * _finite(below)
    grads = tl.exp(below) * per_exp - label_coefficient
    if HAS_SMOOTHING:
        if HAS_CLASS_WEIGHTS:
            grads -= smoothing * _load(class_weights_ptr + columns, inside, "")
        else:
            grads -= smoothing
    return grads * slope


@triton.jit
def _store_tile(
    grads_ptr,  # [V]
    start,
    row_ptr,  # [V]
    bias_ptr,  # [V]
    class_weights_ptr,  # [V]
    first,
    row_max,
    per_exp,
    per_exp_logit,
    smoothing,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_LOGIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = start + _tile(LANES, VECTOR)
    inside = _inside(columns, first, WIDTH, HAS_FIRST, WHOLE)
    grads = _logit_grads(
        row_ptr,
        bias_ptr,
        class_weights_ptr,
        columns,
        inside,
        row_max,
        per_exp,
        per_exp_logit,
        0.0,
        smoothing,
        SCALE,
        SOFTCAP,
        HAS_BIAS,
        HAS_CLASS_WEIGHTS,
        HAS_SMOOTHING,
        HAS_LOGIT,
        "evict_first",
    )
    if inside is not None:
        grads = tl.where(inside, grads, 0.0)
    # Streamed: nobody reads them before the next product does, and the cache has better things to hold.
    if WHOLE:
        tl.store(grads_ptr + columns, grads.to(grads_ptr.dtype.element_ty), cache_modifier=".cs")
    else:
        tl.store(
            grads_ptr + columns,
            grads.to(grads_ptr.dtype.element_ty),
            mask=columns < STRIDE,
            cache_modifier=".cs",
        )


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
    per_exp_logit,
    label_coefficient,
    smoothing,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_LOGIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # First, for the tiles need not wait for it.
    has_label = _inside(label, first, WIDTH, HAS_FIRST, WHOLE=False) & (label >= 0)
    label_grad = _logit_grads(
        row_ptr,
        bias_ptr,
        class_weights_ptr,
        label,
        has_label,
        row_max,
        per_exp,
        per_exp_logit,
        label_coefficient,
        smoothing,
        SCALE,
        SOFTCAP,
        HAS_BIAS,
        HAS_CLASS_WEIGHTS,
        HAS_SMOOTHING,
        HAS_LOGIT,
        "",
    )
    TILE: tl.constexpr = LANES * VECTOR
    WHOLE_TILES: tl.constexpr = WIDTH // TILE * TILE
    for start in tl.static_range(WHOLE_TILES, STRIDE, TILE):
        _store_tile(
            grads_ptr,
            start,
            row_ptr,
            bias_ptr,
            class_weights_ptr,
            first,
            row_max,
            per_exp,
            per_exp_logit,
            smoothing,
            STRIDE,
            WIDTH,
            SCALE,
            SOFTCAP,
            HAS_BIAS,
            HAS_CLASS_WEIGHTS,
            HAS_FIRST,
            HAS_SMOOTHING,
            HAS_LOGIT,
            LANES,
            VECTOR,
            WHOLE=False,
        )
    for back in tl.range(TILE, WHOLE_TILES + 1, TILE, loop_unroll_factor=UNROLL):
        _store_tile(
            grads_ptr,
            WHOLE_TILES - back,
            row_ptr,
            bias_ptr,
            class_weights_ptr,
            first,
            row_max,
            per_exp,
            per_exp_logit,
            smoothing,
            STRIDE,
            WIDTH,
            SCALE,
            SOFTCAP,
            HAS_BIAS,
            HAS_CLASS_WEIGHTS,
            HAS_FIRST,
            HAS_SMOOTHING,
            HAS_LOGIT,
            LANES,
            VECTOR,
            WHOLE=True,
        )
    # The label's column again. The barrier puts this store behind that of whichever thread wrote it before.
    tl.debug_barrier()
    tl.store(grads_ptr + label, label_grad.to(grads_ptr.dtype.element_ty), mask=has_label)


@triton.jit
def _load_first(first_ptr, HAS_FIRST: tl.constexpr):
    if HAS_FIRST:
        first = tl.load(first_ptr)
    else:
        first = 0
    return first


@triton.jit
def _load_coefficients(
    row,
    probability_ptr,  # [T]
    probability_lse_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    smoothing_ptr,  # [T]
    probability_logit_ptr,  # [T]
    HAS_LSE: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_LOGIT: tl.constexpr,
):
    probability = tl.load(probability_ptr + row)
    probability_lse = tl.load(probability_lse_ptr + row) if HAS_LSE else 0.0
    label_coefficient = tl.load(label_coefficient_ptr + row)
    smoothing = tl.load(smoothing_ptr + row) if HAS_SMOOTHING else 0.0
    probability_logit = tl.load(probability_logit_ptr + row) if HAS_LOGIT else 0.0
    return probability, probability_lse, label_coefficient, smoothing, probability_logit


@triton.jit
def _per_exp(probability, probability_lse, probability_logit, row_max, log_sum, HAS_LSE: tl.constexpr):
    """What `exp(z − max)` is multiplied with, and `exp(z − max) · (z − max)`."""
    if HAS_LSE:
        probability += probability_lse * (row_max + log_sum)
    per_sum = tl.exp(-log_sum)
    return probability * per_sum, probability_logit * per_sum


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
    mean_logit_ptr,  # [T], written
    prediction_ptr,  # [T], written
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    WITH_WEIGHTED_SUM: tl.constexpr,
    WITH_MEAN_LOGIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_max, log_sum, label_logit, weighted_sum, mean_logit, prediction = _stats_of_row(
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
        HAS_FIRST,
        WITH_WEIGHTED_SUM,
        WITH_MEAN_LOGIT,
        LANES,
        VECTOR,
        UNROLL,
    )
    tl.store(max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(label_logit_ptr + row, label_logit)
    tl.store(weighted_sum_ptr + row, weighted_sum)
    tl.store(mean_logit_ptr + row, mean_logit)
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
    probability_logit_ptr,  # [T]
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
    HAS_LOGIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    probability, probability_lse, label_coefficient, smoothing, probability_logit = _load_coefficients(
        row,
        probability_ptr,
        probability_lse_ptr,
        label_coefficient_ptr,
        smoothing_ptr,
        probability_logit_ptr,
        HAS_LSE,
        HAS_SMOOTHING,
        HAS_LOGIT,
    )
    row_max = tl.load(max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    per_exp, per_exp_logit = _per_exp(probability, probability_lse, probability_logit, row_max, log_sum, HAS_LSE)
    _store_grads_of_row(
        grads_ptr + row * STRIDE,
        product_ptr + row * STRIDE,
        bias_ptr,
        class_weights_ptr,
        tl.load(labels_ptr + row),
        _load_first(first_ptr, HAS_FIRST),
        row_max,
        per_exp,
        per_exp_logit,
        label_coefficient,
        smoothing,
        STRIDE,
        WIDTH,
        SCALE,
        SOFTCAP,
        HAS_BIAS,
        HAS_CLASS_WEIGHTS,
        HAS_FIRST,
        HAS_SMOOTHING,
        HAS_LOGIT,
        LANES,
        VECTOR,
        UNROLL,
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
    probability_logit_ptr,  # [T]
    max_ptr,  # [T], written
    log_sum_ptr,  # [T], written
    label_logit_ptr,  # [T], written
    weighted_sum_ptr,  # [T], written
    mean_logit_ptr,  # [T], written
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
    HAS_LOGIT: tl.constexpr,
    WITH_WEIGHTED_SUM: tl.constexpr,
    WITH_MEAN_LOGIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = product_ptr + row * STRIDE
    label = tl.load(labels_ptr + row)
    first = _load_first(first_ptr, HAS_FIRST)
    # First, for the second pass need not wait for them.
    probability, probability_lse, label_coefficient, smoothing, probability_logit = _load_coefficients(
        row,
        probability_ptr,
        probability_lse_ptr,
        label_coefficient_ptr,
        smoothing_ptr,
        probability_logit_ptr,
        HAS_LSE,
        HAS_SMOOTHING,
        HAS_LOGIT,
    )
    row_max, log_sum, label_logit, weighted_sum, mean_logit, prediction = _stats_of_row(
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
        HAS_FIRST,
        WITH_WEIGHTED_SUM,
        WITH_MEAN_LOGIT,
        LANES,
        VECTOR,
        UNROLL,
    )
    tl.store(max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(label_logit_ptr + row, label_logit)
    tl.store(weighted_sum_ptr + row, weighted_sum)
    tl.store(mean_logit_ptr + row, mean_logit)
    tl.store(prediction_ptr + row, prediction)
    per_exp, per_exp_logit = _per_exp(probability, probability_lse, probability_logit, row_max, log_sum, HAS_LSE)
    _store_grads_of_row(
        grads_ptr + row * STRIDE,
        row_ptr,
        bias_ptr,
        class_weights_ptr,
        label,
        first,
        row_max,
        per_exp,
        per_exp_logit,
        label_coefficient,
        smoothing,
        STRIDE,
        WIDTH,
        SCALE,
        SOFTCAP,
        HAS_BIAS,
        HAS_CLASS_WEIGHTS,
        HAS_FIRST,
        HAS_SMOOTHING,
        HAS_LOGIT,
        LANES,
        VECTOR,
        UNROLL,
    )
