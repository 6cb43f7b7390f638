/* Quantising rows: in steps as in one go, from many threads, and what is refused. */
#include <math.h>
#include <pthread.h>

#include "check.h"
#include "faults.h"
#include "ggml.h"
#include "hobbit.h"

enum { WIDTH = 512, ROWS = 200, THREADS = 4 }; /* more rows than a step has */

static float weights[ROWS * WIDTH], importance[WIDTH];
static const int32_t TYPES[] = {GGML_TYPE_Q4_0, GGML_TYPE_Q4_K, GGML_TYPE_IQ2_XXS, GGML_TYPE_F16};
enum { N_TYPES = sizeof TYPES / sizeof *TYPES };

static void prepare(void) {
    uint64_t seed = 1;
    for (int i = 0; i < ROWS * WIDTH; i++) {
        weights[i] = ((float) check_random(&seed, 2001) - 1000) / 500;
    }
    for (int i = 0; i < WIDTH; i++) {
        importance[i] = (float) (1 + check_random(&seed, 100)) / 50;
    }
}

static void *quantised(int32_t type, double *error, double *norm) {
    void *out = malloc(ggml_row_size((enum ggml_type) type, WIDTH) * ROWS);
    CHECK(out != NULL);
    CHECK_EQUAL(hobbit_quantize(GGML_TYPE_F32, weights, type, out, ROWS, WIDTH, importance, error, norm), HOBBIT_OK);
    return out;
}

static void steps_make_what_one_go_makes(void) {
    for (int i = 0; i < N_TYPES; i++) {
        const enum ggml_type type = (enum ggml_type) TYPES[i];
        const size_t size = ggml_row_size(type, WIDTH) * ROWS;
        double error, norm;
        char *out = quantised(TYPES[i], &error, &norm), *expected = malloc(size);
        float *again = malloc(sizeof weights);
        CHECK(expected != NULL && again != NULL);
        ggml_quantize_chunk(type, weights, expected, 0, ROWS, WIDTH, importance);
        CHECK(memcmp(out, expected, size) == 0);
        ggml_get_type_traits(type)->to_float(out, again, ROWS * WIDTH);
        double lost = 0, all = 0;
        for (int j = 0; j < ROWS * WIDTH; j++) {
            lost += ((double) weights[j] - again[j]) * ((double) weights[j] - again[j]);
            all += (double) weights[j] * weights[j];
        }
        CHECK(fabs(error - lost) <= 1e-9 * lost);
        CHECK(fabs(norm - all) <= 1e-9 * all);
        free(again);
        free(expected);
        free(out);
    }
}

static void *worker(void *results) {
    for (int i = 0; i < N_TYPES; i++) {
        double error, norm;
        ((void **) results)[i] = quantised(TYPES[i], &error, &norm);
    }
    return NULL;
}

static void threads_do_not_disturb_each_other(void) {
    pthread_t threads[THREADS];
    void *results[THREADS][N_TYPES];
    for (int t = 0; t < THREADS; t++) {
        CHECK_EQUAL(pthread_create(&threads[t], NULL, worker, results[t]), 0);
    }
    for (int t = 0; t < THREADS; t++) {
        CHECK_EQUAL(pthread_join(threads[t], NULL), 0);
    }
    for (int t = 0; t < THREADS; t++) {
        for (int i = 0; i < N_TYPES; i++) {
            const size_t size = ggml_row_size((enum ggml_type) TYPES[i], WIDTH) * ROWS;
            CHECK(memcmp(results[t][i], results[0][i], size) == 0);
        }
    }
    for (int t = 0; t < THREADS; t++) {
        for (int i = 0; i < N_TYPES; i++) {
            free(results[t][i]);
        }
    }
}

static void rows_of_floats_need_no_blocks(void) {
    const float row[11] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0.1f};
    ggml_fp16_t out[11];
    double error, norm;
    CHECK_EQUAL(hobbit_quantize(GGML_TYPE_F32, row, GGML_TYPE_F16, out, 1, 11, NULL, &error, &norm), HOBBIT_OK);
    CHECK(fabs(norm - 385.01) < 1e-6);
    CHECK(error > 0 && error < 1e-8);
}

static void refusals(void) {
    char out[4096];
    double error, norm;
    const int32_t f32 = GGML_TYPE_F32, q4_0 = GGML_TYPE_Q4_0;
    CHECK_EQUAL(hobbit_quantize(f32, weights, q4_0, out, 1, 33, NULL, &error, &norm), HOBBIT_ARG);
    CHECK_EQUAL(hobbit_quantize(f32, weights, GGML_TYPE_Q8_K, out, 1, WIDTH, NULL, &error, &norm), HOBBIT_UNSUPPORTED);
    CHECK_EQUAL(hobbit_quantize(f32, weights, GGML_TYPE_COUNT, out, 1, WIDTH, NULL, &error, &norm),
                HOBBIT_UNSUPPORTED);
    CHECK_EQUAL(hobbit_quantize(f32, weights, GGML_TYPE_IQ2_XXS, out, 1, WIDTH, NULL, &error, &norm), HOBBIT_ARG);
    faults_allocation = 1;
    CHECK_EQUAL(hobbit_quantize(f32, weights, q4_0, out, 1, WIDTH, NULL, &error, &norm), HOBBIT_NOMEM);
    const float kept = weights[WIDTH - 1];
    weights[WIDTH - 1] = NAN;
    CHECK_EQUAL(hobbit_quantize(f32, weights, q4_0, out, 1, WIDTH, NULL, &error, &norm), HOBBIT_FORMAT);
    weights[WIDTH - 1] = kept;
    importance[0] = -importance[0];
    CHECK_EQUAL(hobbit_quantize(f32, weights, q4_0, out, 1, WIDTH, importance, &error, &norm), HOBBIT_ARG);
    importance[0] = -importance[0];
}

int main(void) {
    prepare();
    RUN(steps_make_what_one_go_makes);
    RUN(threads_do_not_disturb_each_other);
    RUN(rows_of_floats_need_no_blocks);
    RUN(refusals);
    return 0;
}
