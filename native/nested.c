#include "nested.h"

#include <stdint.h>
#include <string.h>

#include "hobbit.h"

#define HALF 16 /* elements j and j + HALF of a block share a byte */
#define FP16_INFINITY 0x7c00u
#define FP16_SIGN 0x8000u

#define MIN_STEP 9
#define CODE_BITS 5u

/* How a block is cut. */
struct cut {
    int step, base;
    bool from_above;
};

/* The magnitude of a finite fp16 as n * 2^-24 * 2^shift. */
struct magnitude {
    uint32_t n;
    int shift;
};

static struct magnitude magnitude(uint32_t half) {
    uint32_t exponent = (half & FP16_INFINITY) >> 10, fraction = half & 0x3ffu;
    bool normal = exponent != 0;
    return (struct magnitude) {normal ? fraction | 0x400u : fraction, normal ? (int) exponent - 1 : 0};
}

/* n * 2^-24 * 2^shift as fp16, to nearest even; FP16_INFINITY or more when it is too large. `n` < 2^30. */
static uint32_t to_half(uint32_t n, int shift) {
    int drop = n < 0x800u ? 0 : 21 - __builtin_clz(n); /* bits beyond the 11 of an fp16, or below its smallest step */
    drop = shift + drop < 0 ? -shift : drop;
    if (drop > 0) {
        uint32_t odd = n >> drop & 1u, half = 1u << (drop - 1);
        n = (n + half - 1 + odd) >> drop;
        shift += drop;
    }
    while (shift > 0 && n < 0x400u && n != 0) {
        n <<= 1;
        shift--;
    }
    return n == 0 ? 0 : ((uint32_t) shift << 10) + n;
}

static uint32_t load_half(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return half;
}

static void store_half(uint8_t *to, uint32_t half) {
    uint16_t bits = (uint16_t) half;
    memcpy(to, &bits, sizeof bits);
}

static int base_of(int step, bool from_above) {
    return -127 + from_above * (255 - 16 * step); /* without a branch: either side is as likely */
}

/* `u` is q + 128. */
static struct cut choose_cut(const uint8_t *u) {
    uint8_t low = 255, high = 0;
    for (int j = 0; j < 2 * HALF; j++) {
        low = u[j] < low ? u[j] : low;
        high = u[j] > high ? u[j] : high;
    }
    int up = (high - 1) / 16 + 1, down = (255 - low) / 16 + 1; /* steps up from -127 and down from 127 */
    bool from_above = low == 0 || down < up;
    int step = from_above ? down : up;
    step = step < MIN_STEP ? MIN_STEP : step;
    return (struct cut) {step, base_of(step, from_above), from_above};
}

static void split_values(const uint8_t *u, struct cut cut, uint8_t *h, uint8_t *l) {
    uint32_t reciprocal = 0x10000u / (uint32_t) cut.step + 1; /* exact for what fits in a byte */
    uint8_t step = (uint8_t) cut.step, base = (uint8_t) (cut.base + 128);
    for (int j = 0; j < 2 * HALF; j++) {
        uint8_t above = (uint8_t) (u[j] - base);
        h[j] = (uint8_t) (above * reciprocal >> 16);
        l[j] = (uint8_t) (above - h[j] * step);
    }
}

static void pack_nibbles(const uint8_t *values, uint8_t *nibbles) {
    for (int j = 0; j < HALF; j++) {
        nibbles[j] = (uint8_t) (values[j] | values[j + HALF] << 4);
    }
}

/* The mean in 32nds, weighted where there are weights. */
static uint32_t mean(const uint8_t *values, const float *weights) {
    uint32_t even = 0;
    for (int j = 0; j < 2 * HALF; j++) {
        even += values[j];
    }
    float sum = 0, total = 0;
    for (int j = 0; weights != NULL && j < 2 * HALF; j++) {
        sum += weights[j] * values[j];
        total += weights[j];
    }
    float weighted = 32 * (sum / total) + 0.5f;
    return total > 0 && weighted >= 0 && weighted < 16 * 32 ? (uint32_t) weighted : even;
}

/* The d, or the one below it, that has this scale: scale / step rounded down. Of magnitudes. */
static uint32_t divide(uint32_t scale, uint32_t step) {
#define RECIPROCAL(step) (((1u << 24) + (step) - 1) / (step)) /* so large that a product with 11 bits fits */
    static const uint32_t reciprocal[] = {RECIPROCAL(9),  RECIPROCAL(10), RECIPROCAL(11), RECIPROCAL(12),
                                          RECIPROCAL(13), RECIPROCAL(14), RECIPROCAL(15), RECIPROCAL(16)};
    struct magnitude m = magnitude(scale);
    if (m.shift <= 4) {
        return to_half((m.n << m.shift) / step, 0); /* d is subnormal or nearly */
    }
    uint32_t n = m.n * reciprocal[step - MIN_STEP] >> 20; /* 16 n / step: 11 or 12 bits */
    uint32_t carry = n >> 11;
    return ((uint32_t) m.shift - 4 + carry) * 0x400u + (n >> carry);
}

/* The fp16 nearest to `half` whose lowest bits are `code`. Of magnitudes. */
static uint32_t hide(uint32_t half, uint32_t code) {
    uint32_t unit = 1u << CODE_BITS;
    uint32_t nearest = ((half + unit + unit / 2 - code) & -unit) + code; /* too large by a unit, lest it be negative */
    return nearest < unit ? nearest : nearest - unit;
}

static bool split_block(const uint8_t *in, uint8_t *high, uint8_t *low, const float *weights) {
    uint32_t half = load_half(in), d = half & ~FP16_SIGN, sign = half & FP16_SIGN;
    if (d >= FP16_INFINITY) {
        return false;
    }
    uint8_t u[2 * HALF], h[2 * HALF], l[2 * HALF];
    for (int j = 0; j < 2 * HALF; j++) {
        u[j] = in[2 + j] ^ 0x80u;
    }
    struct cut cut = choose_cut(u);
    split_values(u, cut, h, l);
    pack_nibbles(h, high + 4);
    pack_nibbles(l, low);
    struct magnitude m = magnitude(d);
    uint32_t step = (uint32_t) cut.step, scale = to_half(m.n * step, m.shift);
    uint32_t second = d - divide(scale, step);
    /* d (base + mean), which is of the other sign than d */
    uint32_t minimum = to_half(m.n * ((uint32_t) -cut.base * 32 - mean(l, weights)), m.shift - 5);
    minimum = hide(minimum, second << 4 | (step - MIN_STEP) << 1 | cut.from_above);
    store_half(high, scale | sign);
    store_half(high + 2, minimum | (sign ^ FP16_SIGN));
    return scale < FP16_INFINITY && minimum < FP16_INFINITY;
}

bool hb_nested_split(const void *q8_0, void *high_plane, void *low_plane, size_t n_blocks, const float *importance,
                     size_t row_blocks) {
    const uint8_t *in = q8_0;
    uint8_t *high = high_plane, *low = low_plane;
    for (size_t i = 0; i < n_blocks; i++, in += HB_Q8_0_BLOCK, high += HB_HIGH_BLOCK, low += HB_LOW_BLOCK) {
        if (!split_block(in, high, low, importance == NULL ? NULL : importance + i % row_blocks * 2 * HALF)) {
            return false;
        }
    }
    return true;
}

/* step h + l of 16 nibbles each, two at a time: neither leaves its byte. */
static void join_nibbles(const uint16_t *h, const uint16_t *l, uint16_t step, uint8_t *values) {
    uint16_t first[HALF / 2], second[HALF / 2]; /* from the low halves of the bytes, and from the high ones */
    for (int j = 0; j < HALF / 2; j++) {
        first[j] = (uint16_t) ((h[j] & 0x0f0fu) * step + (l[j] & 0x0f0fu));
        second[j] = (uint16_t) ((h[j] >> 4 & 0x0f0fu) * step + (l[j] >> 4 & 0x0f0fu));
    }
    memcpy(values, first, HALF);
    memcpy(values + HALF, second, HALF);
}

void hb_nested_merge(const void *high_plane, const void *low_plane, void *q8_0, size_t n_blocks) {
    const uint8_t *high = high_plane, *low = low_plane;
    uint8_t *out = q8_0;
    for (size_t i = 0; i < n_blocks; i++, high += HB_HIGH_BLOCK, low += HB_LOW_BLOCK, out += HB_Q8_0_BLOCK) {
        uint16_t h[HALF / 2], l[HALF / 2]; /* the block's input is read before its output is written */
        uint8_t q[2 * HALF];
        memcpy(h, high + 4, sizeof h);
        memcpy(l, low, sizeof l);
        uint32_t scale = load_half(high), code = load_half(high + 2);
        uint32_t step = MIN_STEP + (code >> 1 & 7u), second = code >> 4 & 1u;
        uint8_t base = (uint8_t) base_of((int) step, code & 1u);
        join_nibbles(h, l, (uint16_t) step, q);
        for (int j = 0; j < 2 * HALF; j++) {
            q[j] = (uint8_t) (q[j] + base);
        }
        store_half(out, (divide(scale & ~FP16_SIGN, step) + second) | (scale & FP16_SIGN));
        memcpy(out + 2, q, sizeof q);
    }
}

int32_t hobbit_nested_split(const void *q8_0, void *high_plane, void *low_plane, size_t n_blocks,
                            const float *importance, size_t row_blocks) {
    bool good = hb_nested_split(q8_0, high_plane, low_plane, n_blocks, importance, row_blocks);
    return good ? HOBBIT_OK : HOBBIT_UNSUPPORTED;
}

void hobbit_nested_merge(const void *high_plane, const void *low_plane, void *q8_0, size_t n_blocks) {
    hb_nested_merge(high_plane, low_plane, q8_0, n_blocks);
}
