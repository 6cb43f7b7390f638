/* Description: Q8_0 blocks come back bit for bit from their two planes, and the high plane alone is near them. */
#include "nested.h"

#include <math.h>

#include "check.h"
#include "hobbit.h"

#define BLOCKS 64
#define MAX_SCALE 0x5fe0u /* 504: the minimum is finite whatever the block holds */

struct q8_0 {
    uint8_t d[2];
    int8_t q[32];
};

_Static_assert(sizeof(struct q8_0) == HB_Q8_0_BLOCK, "a block as ggml has it");

static struct q8_0 source[BLOCKS];
static uint8_t high[BLOCKS * HB_HIGH_BLOCK], low[BLOCKS * HB_LOW_BLOCK], merged[BLOCKS * HB_Q8_0_BLOCK];

static void set_scale(struct q8_0 *block, uint16_t d) {
    memcpy(block->d, &d, sizeof d);
}

static double value(const void *half) {
    uint16_t bits;
    memcpy(&bits, half, sizeof bits);
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000 ? -size : size;
}

static void fill(uint64_t seed, uint16_t max_scale) {
    for (int i = 0; i < BLOCKS; i++) {
        set_scale(&source[i], (uint16_t) (check_random(&seed, max_scale + 1u) | check_random(&seed, 2) << 15));
        for (int j = 0; j < 32; j++) {
            source[i].q[j] = (int8_t) ((int) check_random(&seed, 256) - 128);
        }
    }
}

static void check_round_trip(void) {
    CHECK(hb_nested_split(source, high, low, BLOCKS));
    memset(merged, 0xa5, sizeof merged);
    hb_nested_merge(high, low, merged, BLOCKS);
    CHECK(memcmp(merged, source, sizeof source) == 0);
}

static void blocks_come_back(void) {
    for (uint64_t seed = 0; seed < 200; seed++) {
        fill(seed, seed % 2 == 0 ? MAX_SCALE : 0x1400); /* half of them subnormal or nearly */
        check_round_trip();
    }
}

static void every_scale_comes_back_or_is_refused(void) {
    fill(1, 0);
    source[1] = source[0];
    bool good = true;
    for (uint32_t d = 0; d < 0x8000; d++) {
        bool before = good;
        set_scale(&source[0], (uint16_t) d);
        set_scale(&source[1], (uint16_t) (d | 0x8000));
        good = hb_nested_split(source, high, low, 2);
        CHECK_EQUAL(hb_nested_split(&source[1], high, low, 1), good);
        CHECK(good ? before : d > MAX_SCALE); /* refused from some size on, infinity and NaN too */
        if (good) {
            check_round_trip();
        }
    }
    CHECK(!good);
}

static void extreme_values_come_back(void) {
    fill(2, MAX_SCALE);
    for (int i = 0; i < BLOCKS; i++) {
        for (int j = 0; j < 32; j++) {
            source[i].q[j] = (int8_t) (i % 4 == 0 ? -128 : i % 4 == 1 ? 127 : i % 4 == 2 ? j * 8 - 128 : i - j);
        }
    }
    check_round_trip();
}

/* As ggml dequantises Q4_1: what the truncation leaves is at most a nibble, and the block's mean is kept. */
static void the_high_plane_is_near(void) {
    fill(3, MAX_SCALE);
    CHECK(hb_nested_split(source, high, low, BLOCKS));
    for (int i = 0; i < BLOCKS; i++) {
        const uint8_t *block = high + i * HB_HIGH_BLOCK;
        double d = value(source[i].d), error = 0;
        double rounding = fabs(value(block + 2)) / 2048 + ldexp(1, -24);
        CHECK(value(block) == 16 * d);
        for (int j = 0; j < 32; j++) {
            int nibble = j < 16 ? block[4 + j] & 15 : block[4 + j - 16] >> 4;
            double gap = nibble * value(block) + value(block + 2) - d * source[i].q[j];
            CHECK(fabs(gap) <= 15 * fabs(d) + rounding);
            error += gap;
        }
        CHECK(fabs(error / 32) <= rounding);
    }
}

static void the_low_plane_may_lie_in_the_outputs_tail(void) {
    for (size_t n = 0; n <= BLOCKS; n++) {
        for (size_t gap = 0; gap < 3; gap++) {
            fill(4 + n, MAX_SCALE);
            CHECK(hb_nested_split(source, high, low, n));
            uint8_t *output = malloc(n * HB_Q8_0_BLOCK + gap); /* exactly: the sanitizer sees what goes beyond */
            CHECK(output != NULL || n + gap == 0);
            uint8_t *tail = output + n * (HB_Q8_0_BLOCK - HB_LOW_BLOCK) + gap;
            memcpy(tail, low, n * HB_LOW_BLOCK);
            hb_nested_merge(high, tail, output, n);
            CHECK(memcmp(output, source, n * HB_Q8_0_BLOCK) == 0);
            free(output);
        }
    }
}

static void scales_too_large_are_refused(void) {
    static const uint16_t bad[] = {0x7bff, 0x6c00, 0x7c00, 0xfc00, 0x7e00, 0xfe01, 0x6800};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        fill(5, MAX_SCALE);
        set_scale(&source[BLOCKS - 1], bad[i]);
        CHECK(!hb_nested_split(source, high, low, BLOCKS));
        CHECK(hb_nested_split(source, high, low, BLOCKS - 1));
        CHECK_EQUAL(hobbit_nested_split(source, high, low, BLOCKS), HOBBIT_UNSUPPORTED);
    }
}

static void python_gets_the_same(void) {
    fill(6, MAX_SCALE);
    CHECK_EQUAL(hobbit_nested_split(source, high, low, BLOCKS), HOBBIT_OK);
    hobbit_nested_merge(high, low, merged, BLOCKS);
    CHECK(memcmp(merged, source, sizeof source) == 0);
}

int main(void) {
    RUN(blocks_come_back);
    RUN(every_scale_comes_back_or_is_refused);
    RUN(extreme_values_come_back);
    RUN(the_high_plane_is_near);
    RUN(the_low_plane_may_lie_in_the_outputs_tail);
    RUN(scales_too_large_are_refused);
    RUN(python_gets_the_same);
    return 0;
}
