#include "nested.h"

#include <stdint.h>
#include <string.h>

#include "hobbit.h"

#define HALF 16          /* elements j and j + HALF of a block share a byte */
#define FP16_INFINITY 0x7c00u
#define FP16_SIGN 0x8000u

/* The magnitude of a finite fp16 as n * 2^-24 * 2^shift. */
struct magnitude {
    uint32_t n;
    int shift;
};

static struct magnitude magnitude(uint16_t half) {
    uint32_t exponent = (half & FP16_INFINITY) >> 10, fraction = half & 0x3ffu;
    return exponent == 0 ? (struct magnitude) {fraction, 0} : (struct magnitude) {fraction | 0x400u, (int) exponent - 1};
}

/* n * 2^-24 * 2^shift as fp16, to nearest even; FP16_INFINITY or more when it is too large. `n` < 2^30. */
static uint32_t to_half(uint32_t n, int shift) {
    int drop = 0; /* bits beyond the 11 of an fp16, or below its smallest step */
    while (n >> drop >= 0x800u) {
        drop++;
    }
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

static uint16_t load_half(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return half;
}

static void store_half(uint8_t *to, uint32_t half) {
    uint16_t bits = (uint16_t) half;
    memcpy(to, &bits, sizeof bits);
}

/* Nibbles of one block; returns the sum of the low ones. */
static uint32_t split_nibbles(const uint8_t *q, uint8_t *high, uint8_t *low) {
    uint32_t sum = 0;
    for (int j = 0; j < HALF; j++) {
        uint8_t a = q[j] ^ 0x80u, b = q[j + HALF] ^ 0x80u; /* q + 128 */
        high[j] = (uint8_t) (a >> 4 | (b & 0xf0u));
        low[j] = (uint8_t) ((a & 0x0fu) | b << 4);
        sum += (a & 0x0fu) + (b & 0x0fu);
    }
    return sum;
}

bool hb_nested_split(const void *q8_0, void *high_plane, void *low_plane, size_t n_blocks) {
    const uint8_t *in = q8_0;
    uint8_t *high = high_plane, *low = low_plane;
    for (size_t i = 0; i < n_blocks; i++, in += HB_Q8_0_BLOCK, high += HB_HIGH_BLOCK, low += HB_LOW_BLOCK) {
        uint16_t d = load_half(in);
        if ((d & FP16_INFINITY) == FP16_INFINITY) {
            return false;
        }
        uint32_t sum = split_nibbles(in + 2, high + 4, low);
        /* minimum = d * (sum / 32 - 128), which has the sign that d has not */
        struct magnitude m = magnitude(d);
        uint32_t scale = to_half(m.n, m.shift + 4);
        uint32_t minimum = to_half(m.n * (128u * 32u - sum), m.shift - 5);
        if (scale >= FP16_INFINITY || minimum >= FP16_INFINITY) {
            return false;
        }
        store_half(high, scale | (d & FP16_SIGN));
        store_half(high + 2, minimum | (~d & FP16_SIGN));
    }
    return true;
}

/* scale / 16, of a scale that is 16 d. */
static uint32_t undo_scale(uint16_t scale) {
    if ((scale & FP16_INFINITY) > 4u << 10) {
        return scale - (4u << 10);
    }
    struct magnitude m = magnitude(scale);
    return (m.n << m.shift >> 4) | (scale & FP16_SIGN);
}

void hb_nested_merge(const void *high_plane, const void *low_plane, void *q8_0, size_t n_blocks) {
    const uint8_t *high = high_plane, *low = low_plane;
    uint8_t *out = q8_0;
    for (size_t i = 0; i < n_blocks; i++, high += HB_HIGH_BLOCK, low += HB_LOW_BLOCK, out += HB_Q8_0_BLOCK) {
        uint8_t h[HALF], l[HALF], q[2 * HALF]; /* the block's input is read before its output is written */
        memcpy(h, high + 4, sizeof h);
        memcpy(l, low, sizeof l);
        for (int j = 0; j < HALF; j++) {
            q[j] = (uint8_t) ((h[j] << 4 | (l[j] & 0x0fu)) ^ 0x80u);
            q[j + HALF] = (uint8_t) (((h[j] & 0xf0u) | l[j] >> 4) ^ 0x80u);
        }
        store_half(out, undo_scale(load_half(high)));
        memcpy(out + 2, q, sizeof q);
    }
}

int32_t hobbit_nested_split(const void *q8_0, void *high_plane, void *low_plane, size_t n_blocks) {
    return hb_nested_split(q8_0, high_plane, low_plane, n_blocks) ? HOBBIT_OK : HOBBIT_UNSUPPORTED;
}

void hobbit_nested_merge(const void *high_plane, const void *low_plane, void *q8_0, size_t n_blocks) {
    hb_nested_merge(high_plane, low_plane, q8_0, n_blocks);
}
