// Rows of one quantisation type to another, by ggml's own routines, with a measure of what is lost. No state: any
// number of threads may be in here.
#include <math.h>
#include <stdlib.h>

#include "ggml.h"
#include "hobbit.h"

// Floats of scratch memory that a step works on, unless a single row is longer: well inside a core's cache.
enum { STEP_FLOATS = 1 << 15, LANES = 8 };

static bool known(int32_t type) {
    return type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size((enum ggml_type) type) > 0;
}

static bool is_float(enum ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

// ggml aborts the process on a type that it cannot convert. Those it can are the floats, and the quantised
// types that it can also read back (q8_1 and q8_K are only for activations).
static bool convertible(enum ggml_type type) {
    return is_float(type) || (ggml_is_quantized(type) && ggml_get_type_traits(type)->to_float);
}

static void to_floats(enum ggml_type type, const void *src, float *dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        const float *floats = src;
        for (int64_t i = 0; i < n; i++) {
            dst[i] = floats[i];
        }
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

// In lanes, so that the compiler may use vectors: it must not reorder a sum by itself. n is a multiple of LANES in all
// quantised types; the rest of a float row is added singly.
static double sum_of_squares(const float *x, const float *y, int64_t n) {
    double lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            const double d = y ? (double) x[i + j] - y[i + j] : x[i + j];
            lane[j] += d * d;
        }
    }
    double sum = 0;
    for (int j = 0; j < LANES; j++) {
        sum += lane[j];
    }
    for (; i < n; i++) {
        const double d = y ? (double) x[i] - y[i] : x[i];
        sum += d * d;
    }
    return sum;
}

// Some of ggml's quantisers abort the process when a weight times its importance is not a number.
static bool usable(const float *importance, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(importance[i]) || importance[i] < 0) {
            return false;
        }
    }
    return true;
}

int32_t hobbit_can_quantize(int32_t from_type, int32_t to_type) {
    return known(from_type) && known(to_type) && convertible((enum ggml_type) from_type) &&
           convertible((enum ggml_type) to_type);
}

int32_t hobbit_needs_importance(int32_t type) {
    return known(type) && ggml_quantize_requires_imatrix((enum ggml_type) type);
}

int32_t hobbit_quantize(int32_t from_type, const void *src, int32_t to_type, void *dst, int64_t n_rows,
                        int64_t row_len, const float *importance, double *squared_error, double *squared_norm) {
    if (!hobbit_can_quantize(from_type, to_type)) {
        return HOBBIT_UNSUPPORTED;
    }
    const enum ggml_type from = (enum ggml_type) from_type, to = (enum ggml_type) to_type;
    if (n_rows < 0 || row_len <= 0 || row_len > INT32_MAX || row_len % ggml_blck_size(from) ||
        row_len % ggml_blck_size(to) || (!importance && ggml_quantize_requires_imatrix(to)) ||
        (importance && !usable(importance, row_len))) {
        return HOBBIT_ARG;
    }
    const int64_t step = row_len < STEP_FLOATS ? STEP_FLOATS / row_len : 1;
    const size_t from_row = ggml_row_size(from, row_len), to_row = ggml_row_size(to, row_len);
    float *floats = malloc(sizeof(float) * 2 * (size_t) (step * row_len));
    if (!floats) {
        return HOBBIT_NOMEM;
    }
    float *again = floats + step * row_len;
    int32_t status = HOBBIT_OK;
    double error = 0, norm = 0;
    for (int64_t row = 0; row < n_rows; row += step) {
        const int64_t rows = n_rows - row < step ? n_rows - row : step, n = rows * row_len;
        char *out = (char *) dst + (size_t) row * to_row;
        to_floats(from, (const char *) src + (size_t) row * from_row, floats, n);
        const double squares = sum_of_squares(floats, NULL, n);
        if (!isfinite(squares)) {
            status = HOBBIT_FORMAT;
            break;
        }
        ggml_quantize_chunk(to, floats, out, 0, rows, row_len, importance);
        to_floats(to, out, again, n);
        norm += squares;
        error += sum_of_squares(floats, again, n);
    }
    free(floats);
    *squared_error = error;
    *squared_norm = norm;
    return status;
}
