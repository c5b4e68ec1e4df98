"""The Triton kernels behind the row functions of pairs: one program a pair of rows, as in `triton_kernels`.

A pair is gone through twice or three times: for the two softmaxes, for the divergence, and for the gradients; of
`KL(teacher ‖ student)` the gradients need no divergence, and the last two are one. Each time it is gone through in the
other direction, so that what was read last, and is still in the cache, is read first.

Tuples stand for what comes in pairs or belongs together, so that functions have few parameters:

* `head`: a row of products and the bias, pointers `[V]`; `MAP`: scale, softcap and whether there is a bias.
* `softmax`: a row's maximum, its log-sum at the temperature, and that at temperature 1.
"""

import triton
import triton.language as tl

from jliger.ops.logits.triton_kernels import _LOWEST, _inside, _load_logits, _tile

_TINIEST = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _logits(head, MAP: tl.constexpr, columns, inside, EVICTION: tl.constexpr):
    return _load_logits(head[0], head[1], columns, inside, MAP[0], MAP[1], MAP[2], EVICTION)


@triton.jit
def _add_to_softmax(
    lanes,
    start,
    head,
    MAP: tl.constexpr,
    WIDTH: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    WITH_HARD_SUM: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    lane_max, lane_sum, lane_hard_sum, lane_start = lanes
    columns = start + _tile(LANES, VECTOR)
    inside = _inside(columns, 0, WIDTH, False, WHOLE)
    logits, _ = _logits(head, MAP, columns, inside, "evict_last")
    if inside is not None:
        logits = tl.where(inside, logits, float("-inf"))
    tile_max = tl.max(logits, axis=1)  # [LANES]
    new_max = tl.maximum(lane_max, tile_max)
    step, below = lane_max - new_max, logits - new_max[:, None]
    lane_sum = lane_sum * tl.exp(step * INVERSE_TEMPERATURE) + tl.sum(tl.exp(below * INVERSE_TEMPERATURE), axis=1)
    if WITH_HARD_SUM:
        lane_hard_sum = lane_hard_sum * tl.exp(step) + tl.sum(tl.exp(below), axis=1)
    lane_start = tl.where(tile_max > lane_max, start, lane_start)
    return new_max, lane_sum, lane_hard_sum, lane_start


@triton.jit
def _softmax_of_row(
    head,
    MAP: tl.constexpr,
    WIDTH: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    WITH_HARD_SUM: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A row's softmax and its prediction."""
    lane_max = tl.full([LANES], _LOWEST, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_hard_sum = tl.zeros([LANES], tl.float32)
    lane_start = tl.zeros([LANES], tl.int32)
    TILE: tl.constexpr = LANES * VECTOR
    WHOLE_TILES: tl.constexpr = WIDTH // TILE * TILE
    for start in tl.range(0, WHOLE_TILES, TILE, loop_unroll_factor=UNROLL):
        lane_max, lane_sum, lane_hard_sum, lane_start = _add_to_softmax(
            (lane_max, lane_sum, lane_hard_sum, lane_start),
            start,
            head,
            MAP,
            WIDTH,
            INVERSE_TEMPERATURE,
            WITH_HARD_SUM,
            LANES,
            VECTOR,
            WHOLE=True,
        )
    if WHOLE_TILES < WIDTH:
        lane_max, lane_sum, lane_hard_sum, lane_start = _add_to_softmax(
            (lane_max, lane_sum, lane_hard_sum, lane_start),
            WHOLE_TILES,
            head,
            MAP,
            WIDTH,
            INVERSE_TEMPERATURE,
            WITH_HARD_SUM,
            LANES,
            VECTOR,
            WHOLE=False,
        )
    row_max = tl.max(lane_max, axis=0)
    step = lane_max - row_max
    log_sum = tl.log(tl.sum(lane_sum * tl.exp(step * INVERSE_TEMPERATURE), axis=0))
    hard_log_sum = log_sum
    if WITH_HARD_SUM:
        hard_log_sum = tl.log(tl.sum(lane_hard_sum * tl.exp(step), axis=0))

    # Lanes remember the tile of their maximum; which column of it that was is read again.
    columns = lane_start[:, None] + _tile(LANES, VECTOR)
    inside = columns < WIDTH
    logits, _ = _logits(head, MAP, columns, inside, "evict_last")
    prediction = tl.min(tl.min(tl.where(inside & (logits == row_max), columns, WIDTH - 1), axis=1), axis=0)
    return (row_max, log_sum, hard_log_sum), prediction


@triton.jit
def _compared(
    student_logits,
    teacher_logits,
    student_softmax,
    teacher_softmax,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
):
    """`p`, `q` and the terms of `D`, as `jliger.ops.logits.distillation_types` has them."""
    # Zeros are told by comparing with 0, which is false for NaN: what is not a number stays one.
    log_p = (student_logits - student_softmax[0]) * INVERSE_TEMPERATURE - student_softmax[1]
    log_r = (teacher_logits - teacher_softmax[0]) * INVERSE_TEMPERATURE - teacher_softmax[1]
    p, r = tl.exp(log_p), tl.exp(log_r)
    if BETA == 0:
        q = -r
        terms = tl.where(r == 0, 0.0, r * (log_r - log_p))
    elif BETA == 1:
        q = tl.where(p == 0, 0.0, p * (log_p - log_r))
        terms = q
    else:
        m = BETA * r + (1 - BETA) * p
        log_m = tl.log(tl.where(m < _TINIEST, _TINIEST, m))
        q = tl.where(p == 0, 0.0, (1 - BETA) * p * (log_p - log_m))
        terms = q + tl.where(r == 0, 0.0, BETA * r * (log_r - log_m))
    return p, q, terms


@triton.jit
def _add_to_divergence(
    lane_value,  # [LANES]
    lane_slope,  # [LANES]
    start,
    heads,
    MAPS: tl.constexpr,
    softmaxes,
    WIDTH: tl.constexpr,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = start + _tile(LANES, VECTOR)
    inside = _inside(columns, 0, WIDTH, False, WHOLE)
    student_logits, _ = _logits(heads[0], MAPS[0], columns, inside, "evict_last")
    teacher_logits, _ = _logits(heads[1], MAPS[1], columns, inside, "evict_last")
    _, q, terms = _compared(student_logits, teacher_logits, softmaxes[0], softmaxes[1], BETA, INVERSE_TEMPERATURE)
    if inside is not None:
        q, terms = tl.where(inside, q, 0.0), tl.where(inside, terms, 0.0)
    return lane_value + tl.sum(terms, axis=1), lane_slope + tl.sum(q, axis=1)


@triton.jit
def _divergence_of_rows(
    heads,
    MAPS: tl.constexpr,
    softmaxes,
    WIDTH: tl.constexpr,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """`D` and `Σ_v q_v`."""
    lane_value = tl.zeros([LANES], tl.float32)
    lane_slope = tl.zeros([LANES], tl.float32)
    TILE: tl.constexpr = LANES * VECTOR
    WHOLE_TILES: tl.constexpr = WIDTH // TILE * TILE
    if WHOLE_TILES < WIDTH:
        lane_value, lane_slope = _add_to_divergence(
            lane_value,
            lane_slope,
            WHOLE_TILES,
            heads,
            MAPS,
            softmaxes,
            WIDTH,
            BETA,
            INVERSE_TEMPERATURE,
            LANES,
            VECTOR,
            WHOLE=False,
        )
    for back in tl.range(TILE, WHOLE_TILES + 1, TILE, loop_unroll_factor=UNROLL):
        lane_value, lane_slope = _add_to_divergence(
            lane_value,
            lane_slope,
            WHOLE_TILES - back,
            heads,
            MAPS,
            softmaxes,
            WIDTH,
            BETA,
            INVERSE_TEMPERATURE,
            LANES,
            VECTOR,
            WHOLE=True,
        )
    return tl.sum(lane_value, axis=0), tl.sum(lane_slope, axis=0)


@triton.jit
def _pair_grads(
    columns,
    inside,
    heads,
    MAPS: tl.constexpr,
    softmaxes,
    slope,
    coefficients,
    label_coefficient,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Gradients by the student's products in some columns, all of which are the label's, or none; and terms of `D`."""
    logits, by_product = _logits(heads[0], MAPS[0], columns, inside, EVICTION)
    teacher_logits, _ = _logits(heads[1], MAPS[1], columns, inside, EVICTION)
    p, q, terms = _compared(logits, teacher_logits, softmaxes[0], softmaxes[1], BETA, INVERSE_TEMPERATURE)
    soft, probability = coefficients
    grads = tl.where(soft == 0, 0.0, soft * (q - p * slope))
    if HAS_LABELS:
        if INVERSE_TEMPERATURE != 1:
            p = tl.exp(logits - softmaxes[0][0] - softmaxes[0][2])
        grads += probability * p - label_coefficient
    return grads * by_product, terms


@triton.jit
def _store_pair_tile(
    lane_value,  # [LANES]
    start,
    grads_ptr,  # [V]
    heads,
    MAPS: tl.constexpr,
    softmaxes,
    slope,
    coefficients,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = start + _tile(LANES, VECTOR)
    inside = _inside(columns, 0, WIDTH, False, WHOLE)
    grads, terms = _pair_grads(
        columns,
        inside,
        heads,
        MAPS,
        softmaxes,
        slope,
        coefficients,
        0.0,
        BETA,
        INVERSE_TEMPERATURE,
        HAS_LABELS,
        "evict_first",
    )
    if inside is not None:
        grads, terms = tl.where(inside, grads, 0.0), tl.where(inside, terms, 0.0)
    if WHOLE:
        tl.store(grads_ptr + columns, grads.to(grads_ptr.dtype.element_ty), cache_modifier=".cs")
    else:
        tl.store(
            grads_ptr + columns,
            grads.to(grads_ptr.dtype.element_ty),
            mask=columns < STRIDE,
            cache_modifier=".cs",
        )
    return lane_value + tl.sum(terms, axis=1)


@triton.jit
def _store_pair_grads_of_row(
    grads_ptr,  # [V]
    heads,
    MAPS: tl.constexpr,
    softmaxes,
    slope,
    coefficients,
    label,
    label_coefficient,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BACKWARD: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Writes a row's gradients; returns `D`."""
    lane_value = tl.zeros([LANES], tl.float32)
    TILE: tl.constexpr = LANES * VECTOR
    WHOLE_TILES: tl.constexpr = WIDTH // TILE * TILE
    for start in tl.static_range(WHOLE_TILES, STRIDE, TILE):
        lane_value = _store_pair_tile(
            lane_value,
            start,
            grads_ptr,
            heads,
            MAPS,
            softmaxes,
            slope,
            coefficients,
            STRIDE,
            WIDTH,
            BETA,
            INVERSE_TEMPERATURE,
            HAS_LABELS,
            LANES,
            VECTOR,
            WHOLE=False,
        )
    for done in tl.range(0, WHOLE_TILES, TILE, loop_unroll_factor=UNROLL):
        if BACKWARD:
            from_start = WHOLE_TILES - TILE - done
        else:
            from_start = done
        lane_value = _store_pair_tile(
            lane_value,
            from_start,
            grads_ptr,
            heads,
            MAPS,
            softmaxes,
            slope,
            coefficients,
            STRIDE,
            WIDTH,
            BETA,
            INVERSE_TEMPERATURE,
            HAS_LABELS,
            LANES,
            VECTOR,
            WHOLE=True,
        )
    if HAS_LABELS:
        # The label's column again, now as one. The barrier puts this store behind that of whichever thread wrote it
        # before.
        has_label = _inside(label, 0, WIDTH, False, WHOLE=False) & (label >= 0)
        label_grad, _ = _pair_grads(
            label,
            has_label,
            heads,
            MAPS,
            softmaxes,
            slope,
            coefficients,
            label_coefficient,
            BETA,
            INVERSE_TEMPERATURE,
            HAS_LABELS,
            "",
        )
        tl.debug_barrier()
        tl.store(grads_ptr + label, label_grad.to(grads_ptr.dtype.element_ty), mask=has_label)
    return tl.sum(lane_value, axis=0)


@triton.jit
def _load_label(row, head, MAP: tl.constexpr, labels_ptr, WIDTH: tl.constexpr, HAS_LABELS: tl.constexpr):
    """The label's column, and its logit, 0 where it is none."""
    label, label_logit = -1, 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        has_label = _inside(label, 0, WIDTH, False, WHOLE=False) & (label >= 0)
        label_logit, _ = _logits(head, MAP, label, has_label, "")
        label_logit = tl.where(has_label, label_logit, 0.0)
    return label, label_logit


@triton.jit
def _load_coefficients(
    row,
    soft_ptr,  # [T]
    probability_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    HAS_LABELS: tl.constexpr,
):
    soft, probability, label_coefficient = tl.load(soft_ptr + row), 0.0, 0.0
    if HAS_LABELS:
        probability = tl.load(probability_ptr + row)
        label_coefficient = tl.load(label_coefficient_ptr + row)
    return (soft, probability), label_coefficient


@triton.jit
def pair_stats_kernel(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    labels_ptr,  # [T]
    student_max_ptr,  # [T], written
    student_log_sum_ptr,  # [T], written
    student_prediction_ptr,  # [T], written
    teacher_max_ptr,  # [T], written
    teacher_log_sum_ptr,  # [T], written
    teacher_prediction_ptr,  # [T], written
    label_logit_ptr,  # [T], written
    hard_log_sum_ptr,  # [T], written
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    STUDENT_HAS_BIAS: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * STRIDE, student_bias_ptr)
    STUDENT: tl.constexpr = (STUDENT_SCALE, STUDENT_SOFTCAP, STUDENT_HAS_BIAS)
    _, label_logit = _load_label(row, student, STUDENT, labels_ptr, WIDTH, HAS_LABELS)
    WITH_HARD_SUM: tl.constexpr = HAS_LABELS and INVERSE_TEMPERATURE != 1
    softmax, prediction = _softmax_of_row(
        student, STUDENT, WIDTH, INVERSE_TEMPERATURE, WITH_HARD_SUM, LANES, VECTOR, UNROLL
    )
    tl.store(student_max_ptr + row, softmax[0])
    tl.store(student_log_sum_ptr + row, softmax[1])
    tl.store(student_prediction_ptr + row, prediction)
    tl.store(label_logit_ptr + row, label_logit)
    tl.store(hard_log_sum_ptr + row, softmax[2])
    teacher = (teacher_ptr + row * STRIDE, teacher_bias_ptr)
    TEACHER: tl.constexpr = (TEACHER_SCALE, TEACHER_SOFTCAP, TEACHER_HAS_BIAS)
    softmax, prediction = _softmax_of_row(teacher, TEACHER, WIDTH, INVERSE_TEMPERATURE, False, LANES, VECTOR, UNROLL)
    tl.store(teacher_max_ptr + row, softmax[0])
    tl.store(teacher_log_sum_ptr + row, softmax[1])
    tl.store(teacher_prediction_ptr + row, prediction)


@triton.jit
def pair_divergence_kernel(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    student_max_ptr,  # [T]
    student_log_sum_ptr,  # [T]
    teacher_max_ptr,  # [T]
    teacher_log_sum_ptr,  # [T]
    value_ptr,  # [T], written
    slope_ptr,  # [T], written
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    STUDENT_HAS_BIAS: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    STUDENT: tl.constexpr = (STUDENT_SCALE, STUDENT_SOFTCAP, STUDENT_HAS_BIAS)
    TEACHER: tl.constexpr = (TEACHER_SCALE, TEACHER_SOFTCAP, TEACHER_HAS_BIAS)
    value, slope = _divergence_of_rows(
        ((student_ptr + row * STRIDE, student_bias_ptr), (teacher_ptr + row * STRIDE, teacher_bias_ptr)),
        (STUDENT, TEACHER),
        (
            (tl.load(student_max_ptr + row), tl.load(student_log_sum_ptr + row)),
            (tl.load(teacher_max_ptr + row), tl.load(teacher_log_sum_ptr + row)),
        ),
        WIDTH,
        BETA,
        INVERSE_TEMPERATURE,
        LANES,
        VECTOR,
        UNROLL,
    )
    tl.store(value_ptr + row, value)
    tl.store(slope_ptr + row, slope)


@triton.jit
def pair_grads_kernel(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    labels_ptr,  # [T]
    student_max_ptr,  # [T]
    student_log_sum_ptr,  # [T]
    hard_log_sum_ptr,  # [T]
    teacher_max_ptr,  # [T]
    teacher_log_sum_ptr,  # [T]
    slope_ptr,  # [T]
    soft_ptr,  # [T]
    probability_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    grads_ptr,  # [T, V], written
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    STUDENT_HAS_BIAS: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label, hard_log_sum = -1, 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        hard_log_sum = tl.load(hard_log_sum_ptr + row)
    coefficients, label_coefficient = _load_coefficients(
        row, soft_ptr, probability_ptr, label_coefficient_ptr, HAS_LABELS
    )
    STUDENT: tl.constexpr = (STUDENT_SCALE, STUDENT_SOFTCAP, STUDENT_HAS_BIAS)
    TEACHER: tl.constexpr = (TEACHER_SCALE, TEACHER_SOFTCAP, TEACHER_HAS_BIAS)
    _store_pair_grads_of_row(
        grads_ptr + row * STRIDE,
        ((student_ptr + row * STRIDE, student_bias_ptr), (teacher_ptr + row * STRIDE, teacher_bias_ptr)),
        (STUDENT, TEACHER),
        (
            (tl.load(student_max_ptr + row), tl.load(student_log_sum_ptr + row), hard_log_sum),
            (tl.load(teacher_max_ptr + row), tl.load(teacher_log_sum_ptr + row)),
        ),
        tl.load(slope_ptr + row),
        coefficients,
        label,
        label_coefficient,
        STRIDE,
        WIDTH,
        BETA,
        INVERSE_TEMPERATURE,
        HAS_LABELS,
        True,
        LANES,
        VECTOR,
        UNROLL,
    )


@triton.jit
def pair_stats_and_grads_kernel(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    labels_ptr,  # [T]
    soft_ptr,  # [T]
    probability_ptr,  # [T]
    label_coefficient_ptr,  # [T]
    student_max_ptr,  # [T], written
    student_log_sum_ptr,  # [T], written
    student_prediction_ptr,  # [T], written
    teacher_max_ptr,  # [T], written
    teacher_log_sum_ptr,  # [T], written
    teacher_prediction_ptr,  # [T], written
    label_logit_ptr,  # [T], written
    hard_log_sum_ptr,  # [T], written
    value_ptr,  # [T], written
    slope_ptr,  # [T], written
    grads_ptr,  # [T, V], written
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    STUDENT_HAS_BIAS: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    BETA: tl.constexpr,
    INVERSE_TEMPERATURE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = (student_ptr + row * STRIDE, student_bias_ptr)
    teacher = (teacher_ptr + row * STRIDE, teacher_bias_ptr)
    STUDENT: tl.constexpr = (STUDENT_SCALE, STUDENT_SOFTCAP, STUDENT_HAS_BIAS)
    TEACHER: tl.constexpr = (TEACHER_SCALE, TEACHER_SOFTCAP, TEACHER_HAS_BIAS)
    label, label_logit = _load_label(row, student, STUDENT, labels_ptr, WIDTH, HAS_LABELS)
    coefficients, label_coefficient = _load_coefficients(
        row, soft_ptr, probability_ptr, label_coefficient_ptr, HAS_LABELS
    )
    WITH_HARD_SUM: tl.constexpr = HAS_LABELS and INVERSE_TEMPERATURE != 1
    student_softmax, student_prediction = _softmax_of_row(
        student, STUDENT, WIDTH, INVERSE_TEMPERATURE, WITH_HARD_SUM, LANES, VECTOR, UNROLL
    )
    teacher_softmax, teacher_prediction = _softmax_of_row(
        teacher, TEACHER, WIDTH, INVERSE_TEMPERATURE, False, LANES, VECTOR, UNROLL
    )
    tl.store(student_max_ptr + row, student_softmax[0])
    tl.store(student_log_sum_ptr + row, student_softmax[1])
    tl.store(student_prediction_ptr + row, student_prediction)
    tl.store(teacher_max_ptr + row, teacher_softmax[0])
    tl.store(teacher_log_sum_ptr + row, teacher_softmax[1])
    tl.store(teacher_prediction_ptr + row, teacher_prediction)
    tl.store(label_logit_ptr + row, label_logit)
    tl.store(hard_log_sum_ptr + row, student_softmax[2])

    heads, softmaxes = (student, teacher), (student_softmax, teacher_softmax)
    MAPS: tl.constexpr = (STUDENT, TEACHER)
    if BETA == 0:
        value, slope = 0.0, -1.0
    else:
        value, slope = _divergence_of_rows(
            heads, MAPS, softmaxes, WIDTH, BETA, INVERSE_TEMPERATURE, LANES, VECTOR, UNROLL
        )
    value_along = _store_pair_grads_of_row(
        grads_ptr + row * STRIDE,
        heads,
        MAPS,
        softmaxes,
        slope,
        coefficients,
        label,
        label_coefficient,
        STRIDE,
        WIDTH,
        BETA,
        INVERSE_TEMPERATURE,
        HAS_LABELS,
        BETA == 0,
        LANES,
        VECTOR,
        UNROLL,
    )
    if BETA == 0:
        value = value_along
    tl.store(value_ptr + row, value)
    tl.store(slope_ptr + row, slope)
