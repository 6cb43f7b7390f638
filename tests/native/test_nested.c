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
        int low = (int) check_random(&seed, 256) - 128, range = 1 + (int) check_random(&seed, (uint32_t) (128 - low));
        for (int j = 0; j < 32; j++) {
            source[i].q[j] = (int8_t) (low + (int) check_random(&seed, (uint32_t) range));
        }
    }
}

static void check_round_trip(void) {
    CHECK(hb_nested_split(source, high, low, BLOCKS, NULL, 1));
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

static void check_scales(struct q8_0 *block) {
    for (uint32_t d = 0; d < 0x8000; d++) {
        set_scale(block, (uint16_t) (d | 0x8000));
        bool good = hb_nested_split(block, high, low, 1, NULL, 1);
        set_scale(block, (uint16_t) d);
        CHECK_EQUAL(hb_nested_split(block, high, low, 1, NULL, 1), good);
        CHECK(good ? d < 0x7000 : d > MAX_SCALE);
        if (good) {
            hb_nested_merge(high, low, merged, 1);
            CHECK(memcmp(merged, block, sizeof *block) == 0);
        }
    }
}

static void every_scale_comes_back_with_every_step_or_is_refused(void) {
    for (int step = 9; step <= 16; step++) {
        memset(source[0].q, -127, sizeof source[0].q);
        source[0].q[7] = (int8_t) (16 * step - 129); /* at most 127 */
        memset(source[1].q, 127, sizeof source[1].q);
        source[1].q[7] = (int8_t) (128 - 16 * step);
        check_scales(&source[0]);
        check_scales(&source[1]);
    }
}

static void every_cut_is_used(void) {
    static int seen[32];
    for (uint64_t seed = 0; seed < 200; seed++) {
        fill(seed, MAX_SCALE);
        check_round_trip();
        for (int i = 0; i < BLOCKS; i++) {
            seen[high[i * HB_HIGH_BLOCK + 2] & 31]++;
        }
    }
    for (int code = 0; code < 32; code++) {
        bool exact = (code >> 1 & 7) == 7; /* 16 d says which d it was */
        CHECK(exact && code >= 16 ? seen[code] == 0 : seen[code] > 0);
    }
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

/* The high plane as ggml dequantises Q4_1, less the block's values. */
static double gap(int i, int j) {
    const uint8_t *block = high + i * HB_HIGH_BLOCK;
    int nibble = j < 16 ? block[4 + j] & 15 : block[4 + j - 16] >> 4;
    return nibble * value(block) + value(block + 2) - value(source[i].d) * source[i].q[j];
}

/* What rounding and the bits hidden in the minimum may change. */
static double tolerance(int i) {
    const uint8_t *block = high + i * HB_HIGH_BLOCK;
    return fabs(value(block + 2)) / 60 + 15 * fabs(value(block)) / 2048 + ldexp(20, -24);
}

static void the_high_plane_is_near(void) {
    for (uint64_t seed = 0; seed < 20; seed++) {
        fill(seed, MAX_SCALE);
        CHECK(hb_nested_split(source, high, low, BLOCKS, NULL, 1));
        for (int i = 0; i < BLOCKS; i++) {
            double mean = 0;
            for (int j = 0; j < 32; j++) {
                CHECK(fabs(gap(i, j)) <= 15 * fabs(value(source[i].d)) + tolerance(i));
                mean += gap(i, j) / 32;
            }
            CHECK(fabs(mean) <= tolerance(i));
        }
    }
}

static void the_mean_follows_the_importance(void) {
    float importance[3 * 32];
    uint64_t state = 9;
    for (int j = 0; j < 3 * 32; j++) {
        importance[j] = j >= 64 ? 0 : (float) check_random(&state, 1000) * 1e-3f * (j % 8 == 0 ? 100 : 1);
    }
    fill(7, MAX_SCALE);
    CHECK(hb_nested_split(source, high, low, BLOCKS, importance, 3));
    hb_nested_merge(high, low, merged, BLOCKS);
    CHECK(memcmp(merged, source, sizeof source) == 0);
    for (int i = 0; i < BLOCKS; i++) {
        double mean = 0, total = 0;
        for (int j = 0; j < 32; j++) {
            double weight = i % 3 == 2 ? 1 : importance[i % 3 * 32 + j]; /* none at all is as all alike */
            mean += weight * gap(i, j);
            total += weight;
        }
        CHECK(fabs(mean / total) <= tolerance(i) + fabs(value(source[i].d)) / 32);
    }
}

static void senseless_importance_does_no_harm(void) {
    static const float bad[] = {NAN, INFINITY, -1, 3e38f};
    float importance[32];
    for (int k = 0; k < 4; k++) {
        for (int j = 0; j < 32; j++) {
            importance[j] = j % 2 == 0 || k == 3 ? bad[k] : 1;
        }
        fill(8, MAX_SCALE);
        CHECK(hb_nested_split(source, high, low, BLOCKS, importance, 1));
        hb_nested_merge(high, low, merged, BLOCKS);
        CHECK(memcmp(merged, source, sizeof source) == 0);
    }
}

static void the_low_plane_may_lie_in_the_outputs_tail(void) {
    for (size_t n = 0; n <= BLOCKS; n++) {
        for (size_t gap = 0; gap < 3; gap++) {
            fill(4 + n, MAX_SCALE);
            CHECK(hb_nested_split(source, high, low, n, NULL, 1));
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
        source[BLOCKS - 1].q[0] = -127;
        source[BLOCKS - 1].q[1] = 127;
        set_scale(&source[BLOCKS - 1], bad[i]);
        CHECK(!hb_nested_split(source, high, low, BLOCKS, NULL, 1));
        CHECK(hb_nested_split(source, high, low, BLOCKS - 1, NULL, 1));
        CHECK_EQUAL(hobbit_nested_split(source, high, low, BLOCKS, NULL, 1), HOBBIT_UNSUPPORTED);
    }
}

static void python_gets_the_same(void) {
    fill(6, MAX_SCALE);
    CHECK_EQUAL(hobbit_nested_split(source, high, low, BLOCKS, NULL, 1), HOBBIT_OK);
    hobbit_nested_merge(high, low, merged, BLOCKS);
    CHECK(memcmp(merged, source, sizeof source) == 0);
}

int main(void) {
    RUN(blocks_come_back);
    RUN(every_scale_comes_back_with_every_step_or_is_refused);
    RUN(every_cut_is_used);
    RUN(extreme_values_come_back);
    RUN(the_high_plane_is_near);
    RUN(the_mean_follows_the_importance);
    RUN(senseless_importance_does_no_harm);
    RUN(the_low_plane_may_lie_in_the_outputs_tail);
    RUN(scales_too_large_are_refused);
    RUN(python_gets_the_same);
    return 0;
}
