/* Description: matches, scores, widths and replacements are what the paper's equations say; a periodic sequence is
 * predicted after one period; a file brings back what was stored, and one that is damaged or not ours is refused. */
#include "maps.h"

#include <errno.h>
#include <math.h>
#include <sys/stat.h>

#include "check.h"
#include "faults.h"
#include "files.h"

#define NEAR(actual, expected) CHECK(fabs((double) (actual) - (expected)) < 1e-4)

static const uint8_t model[HB_MAPS_IDENTITY] = {1, 2, 3};

/* Layers of two experts and embeddings of two numbers, unless it is said. */
static struct hb_maps *new_maps(int32_t n_layers, int32_t capacity, int32_t distance) {
    int32_t n_experts[8] = {2, 2, 2, 2, 2, 2, 2, 2};
    struct hb_maps *m = hb_maps_new(n_layers, n_experts, 2, capacity, distance);
    CHECK(m != NULL && hb_maps_count(m) == 0);
    return m;
}

/* A layer that has its first expert with probability p. */
static void observe(struct hb_maps *m, int32_t layer, float p) {
    hb_maps_observe(m, layer, (float[]) {p, 1 - p});
}

/* A token whose map is p[0], p[1], .. of layers 0, 1, ..; its hint is at an angle, in degrees. */
static void add(struct hb_maps *m, float degrees, int32_t n, const float *p) {
    float radians = degrees * 3.14159265f / 180;
    hb_maps_begin(m, (float[]) {cosf(radians), sinf(radians)});
    for (int32_t l = 0; l < n; l++) {
        observe(m, l, p[l]);
    }
    hb_maps_end(m);
}

static void check_predicts(const struct hb_maps *m, int32_t layer, double p, double score) {
    const float *probs;
    float got;
    CHECK(hb_maps_predict(m, layer, &probs, &got));
    NEAR(probs[0], p);
    NEAR(probs[1], 1 - p);
    NEAR(got, score);
    CHECK(got > 0 && got <= 1);
}

static bool predicts(const struct hb_maps *m, int32_t layer) {
    const float *probs;
    float score;
    return hb_maps_predict(m, layer, &probs, &score);
}

static double cosine(int n, const double *a, const double *b) {
    double dot = 0, aa = 0, bb = 0;
    for (int i = 0; i < n; i++) {
        dot += a[i] * b[i];
        aa += a[i] * a[i];
        bb += b[i] * b[i];
    }
    return dot / sqrt(aa * bb);
}

static void an_empty_store_predicts_nothing(void) {
    struct hb_maps *m = new_maps(2, 2, 1);
    CHECK(!predicts(m, 0)); /* no token either */
    hb_maps_observe(m, 0, (float[]) {1, 0});
    hb_maps_end(m);
    CHECK_EQUAL(hb_maps_count(m), 0);
    hb_maps_begin(m, (float[]) {1, 0});
    CHECK(!predicts(m, 0));
    observe(m, 0, 1);
    CHECK(!predicts(m, 1));
    hb_maps_begin(m, NULL); /* the other one is forgotten */
    hb_maps_end(m);         /* and of this one nothing was observed */
    CHECK_EQUAL(hb_maps_count(m), 0);
    hb_maps_free(m);
    hb_maps_free(NULL);
}

static void the_hint_decides_first_and_the_trajectory_later(void) {
    struct hb_maps *m = new_maps(4, 4, 2);
    add(m, 0, 4, (float[]) {0.75f, 0.5f, 1, 0.25f});
    add(m, 90, 4, (float[]) {0.25f, 1, 0, 0.75f});
    hb_maps_begin(m, (float[]) {3, 4}); /* nearer to the second: 0.8; no unit vector */
    for (int32_t l = 0; l < 4; l++) {
        check_predicts(m, l, (double[]) {0.25, 1, 0, 0.75}[l], 0.8);
    }
    observe(m, 0, 0.75f);
    CHECK(!predicts(m, 0)); /* it is known */
    check_predicts(m, 1, 1, 0.8);
    observe(m, 1, 1);
    /* (3 1 4 0) / 4 with (3 1 2 2) / 4 and with (1 3 4 0) / 4: 18 / sqrt(26 * 18) < 22 / 26 */
    check_predicts(m, 2, 0, 22.0 / 26);
    observe(m, 2, 1);
    check_predicts(m, 3, 0.25, cosine(6, (double[]) {3, 1, 4, 0, 4, 0}, (double[]) {3, 1, 2, 2, 4, 0}));
    CHECK(!predicts(m, 4));
    CHECK(!predicts(m, -1));
    hb_maps_free(m);
}

static void without_a_hint_the_trajectory_decides(void) {
    struct hb_maps *m = new_maps(3, 4, 2);
    add(m, 0, 3, (float[]) {1, 1, 1});
    add(m, 0, 3, (float[]) {0, 0, 0});
    const float bad[2] = {NAN, 1}, big[2] = {INFINITY, 1}, none[2] = {0, 0};
    const float *hints[] = {NULL, none, bad, big};
    for (int i = 0; i < 4; i++) {
        hb_maps_begin(m, hints[i]);
        CHECK(!predicts(m, 0));
        observe(m, 0, 0);
        check_predicts(m, 1, 0, 1);
    }
    hb_maps_end(m);
    hb_maps_begin(m, (float[]) {-1, 0}); /* opposite to two, and the third has none */
    CHECK(!predicts(m, 0));
    hb_maps_free(m);

    m = hb_maps_new(2, (int32_t[]) {2, 2}, 0, 2, 1); /* no hints at all */
    add(m, 0, 2, (float[]) {1, 0});
    hb_maps_begin(m, (float[]) {1, 0});
    CHECK(!predicts(m, 0));
    observe(m, 0, 1);
    check_predicts(m, 1, 0, 1);
    hb_maps_free(m);
}

static void layers_passed_over_count_as_zeros(void) {
    struct hb_maps *m = new_maps(4, 4, 1);
    add(m, 0, 4, (float[]) {1, 1, 0.5f, 0.75f});
    hb_maps_begin(m, NULL);
    observe(m, 1, 1);
    /* (0 0 1 0) with (1 0 1 0) */
    check_predicts(m, 2, 0.5, sqrt(0.5));
    observe(m, 0, 0); /* too late */
    observe(m, 1, 0);
    observe(m, 4, 0); /* no layer */
    observe(m, -1, 0);
    check_predicts(m, 3, 0.75, sqrt(0.5));
    observe(m, 3, 0.75f);
    hb_maps_end(m); /* the same, with holes: 0 and 2 */
    CHECK_EQUAL(hb_maps_count(m), 2);

    hb_maps_begin(m, NULL);
    CHECK(!predicts(m, 0));
    hb_maps_observe(m, 0, (float[]) {0, 0});
    CHECK(!predicts(m, 1)); /* zeros are like nothing */
    observe(m, 1, 1);
    check_predicts(m, 3, 0.75, 1); /* the second's, which had nothing in layer 0 either */
    CHECK(!predicts(m, 2));        /* of which it knows nothing */
    observe(m, 2, 0);
    hb_maps_end(m); /* without the last layer, of which the tokens before had something */
    hb_maps_begin(m, NULL);
    observe(m, 2, 0);
    CHECK(!predicts(m, 3));
    hb_maps_free(m);
}

static void probabilities_are_scaled_and_cleaned(void) {
    struct hb_maps *m = hb_maps_new(2, (int32_t[]) {4, 4}, 0, 2, 1);
    const float *probs;
    float score;
    hb_maps_begin(m, NULL);
    hb_maps_observe(m, 0, (float[]) {1, 0, 0, 0});
    hb_maps_observe(m, 1, (float[]) {3, NAN, -5, 1}); /* a sigmoid's have any sum */
    hb_maps_end(m);
    hb_maps_begin(m, NULL);
    hb_maps_observe(m, 0, (float[]) {1, 0, 0, 0});
    CHECK(hb_maps_predict(m, 1, &probs, &score) && score == 1);
    NEAR(probs[0], 0.75);
    NEAR(probs[3], 0.25);
    CHECK(probs[1] == 0 && probs[2] == 0);
    hb_maps_observe(m, 1, (float[]) {INFINITY, 1, 1, 1});
    hb_maps_end(m);
    hb_maps_begin(m, NULL);
    hb_maps_observe(m, 0, (float[]) {0, 1, 0, 0}); /* orthogonal */
    CHECK(!hb_maps_predict(m, 1, &probs, &score));
    hb_maps_free(m);
}

static void the_most_redundant_map_is_replaced(void) {
    struct hb_maps *m = new_maps(4, 3, 1);
    add(m, 0, 4, (float[]) {1, 1, 1, 1});
    add(m, 0, 4, (float[]) {0, 0, 0, 1});
    add(m, 90, 4, (float[]) {0.5f, 0.5f, 0.5f, 0.5f});
    CHECK_EQUAL(hb_maps_count(m), 3);
    /* RDY = semantic / 4 + 3/4 trajectory: of the first 3/8, of the second 9/16, of the third 1/4 + 3/4 sqrt(1/2) */
    add(m, 90, 4, (float[]) {0, 0, 1, 1});
    CHECK_EQUAL(hb_maps_count(m), 3);
    hb_maps_begin(m, NULL);
    for (int32_t l = 0; l < 3; l++) {
        observe(m, l, 0.5f);
    }
    check_predicts(m, 3, 1, sqrt(0.5)); /* the third is gone */
    hb_maps_begin(m, NULL);
    observe(m, 0, 0);
    observe(m, 1, 0);
    check_predicts(m, 2, 0, 1); /* the second is there */
    observe(m, 2, 1);
    check_predicts(m, 3, 1, 1); /* and so is the new one */
    hb_maps_begin(m, NULL);
    observe(m, 0, 1);
    check_predicts(m, 1, 1, 1);
    hb_maps_free(m);
}

/* The same maps, but a distance of all layers: the hint alone is what counts. */
static void redundancy_weighs_the_hint_by_the_distance(void) {
    for (int32_t distance = 1; distance <= 5; distance += 2) {
        struct hb_maps *m = new_maps(4, 2, distance);
        add(m, 0, 4, (float[]) {1, 1, 1, 1});
        add(m, 90, 4, (float[]) {0, 0, 0, 0});
        add(m, 90, 4, (float[]) {1, 1, 1, 0}); /* RDY 3/4 trajectory, or of the hint distance / 4 */
        hb_maps_begin(m, NULL);
        observe(m, 0, 1);
        observe(m, 1, 1);
        observe(m, 2, 1);
        check_predicts(m, 3, distance == 1 ? 0 : 1, 1); /* where it replaced the second, the first is found first */
        hb_maps_free(m);
    }
    struct hb_maps *m = new_maps(4, 2, 100); /* more than all do not make likeness count against a map */
    add(m, 0, 4, (float[]) {1, 1, 1, 1});
    add(m, 0, 4, (float[]) {0, 0, 0, 0});
    add(m, 0, 4, (float[]) {1, 1, 1, 0}); /* equals: the first one goes */
    hb_maps_begin(m, NULL);
    observe(m, 0, 0);
    check_predicts(m, 1, 0, 1);
    hb_maps_free(m);
}

static void capacity_one_keeps_the_newest(void) {
    struct hb_maps *m = new_maps(2, 1, 1);
    for (int i = 0; i < 5; i++) {
        float p = (float) i / 4;
        add(m, 0, 2, (float[]) {p, 1 - p});
        CHECK_EQUAL(hb_maps_count(m), 1);
        hb_maps_begin(m, (float[]) {1, 0});
        check_predicts(m, 0, p, 1);
        observe(m, 0, p);
        check_predicts(m, 1, 1 - (double) p, 1);
    }
    hb_maps_free(m);
}

#define LAYERS 6
#define EMBD 5
static const int32_t experts_of[LAYERS] = {3, 8, 0, 17, 1, 64};

static float embedding_of(uint64_t token, int i) {
    uint64_t seed = token * 977 + (uint64_t) i;
    return (float) check_random(&seed, 2001) - 1000;
}

/* The probabilities of a token's layer, [experts_of[layer]]. */
static void probs_of(uint64_t token, int32_t layer, float *probs) {
    uint64_t seed = token * 7919 + (uint64_t) layer;
    float sum = 0;
    for (int32_t e = 0; e < experts_of[layer]; e++) {
        probs[e] = (float) (1 + check_random(&seed, 1 << 16));
        sum += probs[e] *= probs[e];
    }
    for (int32_t e = 0; e < experts_of[layer]; e++) {
        probs[e] /= sum;
    }
}

static void begin_token(struct hb_maps *m, uint64_t token) {
    float embedding[EMBD];
    for (int i = 0; i < EMBD; i++) {
        embedding[i] = embedding_of(token, i);
    }
    hb_maps_begin(m, embedding);
}

static void observe_token(struct hb_maps *m, uint64_t token, int32_t layer) {
    float probs[64];
    probs_of(token, layer, probs);
    hb_maps_observe(m, layer, probs);
}

static void add_token(struct hb_maps *m, uint64_t token) {
    begin_token(m, token);
    for (int32_t l = 0; l < LAYERS; l++) {
        observe_token(m, token, l);
    }
    hb_maps_end(m);
}

static void check_predicts_token(const struct hb_maps *m, uint64_t token, int32_t layer) {
    const float *probs;
    float score, expected[64];
    bool known = hb_maps_predict(m, layer, &probs, &score);
    CHECK_EQUAL(known, experts_of[layer] > 0);
    if (known) {
        NEAR(score, 1);
        probs_of(token, layer, expected);
        for (int32_t e = 0; e < experts_of[layer]; e++) {
            NEAR(probs[e], expected[e]);
        }
    }
}

static struct hb_maps *new_mixed(int32_t capacity) {
    struct hb_maps *m = hb_maps_new(LAYERS, experts_of, EMBD, capacity, 2);
    CHECK(m != NULL);
    return m;
}

/* Also when it is full: an exact repetition replaces itself. */
static void a_period_is_predicted_once_it_was_seen(void) {
    enum { PERIOD = 7 };
    for (int32_t capacity = PERIOD; capacity < 3 * PERIOD; capacity += 5) {
        struct hb_maps *m = new_mixed(capacity);
        for (uint64_t t = 0; t < 5 * PERIOD; t++) {
            begin_token(m, t % PERIOD);
            for (int32_t l = 0; l < LAYERS; l++) {
                for (int32_t ahead = l; t >= PERIOD && ahead < LAYERS; ahead++) {
                    check_predicts_token(m, t % PERIOD, ahead);
                }
                observe_token(m, t % PERIOD, l);
            }
            hb_maps_end(m);
        }
        CHECK_EQUAL(hb_maps_count(m), capacity);
        hb_maps_free(m);
    }
}

/* Against a plain search of everything, in doubles. */
static void matches_are_those_of_a_naive_search(void) {
    enum { N = 50, L = 4, J = 24 };
    static double stored[N][L * J];
    uint64_t seed = 11;
    struct hb_maps *m = hb_maps_new(L, (int32_t[]) {J, J, J, J}, 0, N, 1);
    for (int t = 0; t < 3 * N; t++) {
        double now[L * J];
        hb_maps_begin(m, NULL);
        for (int l = 0; l < L; l++) {
            float probs[J], sum = 0, score = 0, best = 0;
            for (int e = 0; e < J; e++) {
                probs[e] = powf((float) (1 + check_random(&seed, 1000)) / 1000, 6);
                sum += probs[e];
            }
            for (int e = 0; e < J; e++) {
                now[l * J + e] = (double) (probs[e] /= sum);
            }
            hb_maps_observe(m, l, probs);
            const float *predicted = NULL;
            for (int i = 0; i < hb_maps_count(m); i++) {
                best = fmaxf(best, (float) cosine((l + 1) * J, now, stored[i]));
            }
            CHECK_EQUAL(hb_maps_predict(m, l + 1, &predicted, &score), t > 0 && l < L - 1);
            NEAR(score, l < L - 1 ? (double) best : 0);
        }
        if (t < N) {
            memcpy(stored[t], now, sizeof now);
            hb_maps_end(m);
        }
    }
    CHECK_EQUAL(hb_maps_count(m), N);
    hb_maps_free(m);
}

static void check_chosen(const float *probs, int32_t n, float score, int32_t least, int32_t most, int32_t count,
                         const int32_t *expected) {
    int32_t experts[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
    CHECK_EQUAL(hb_maps_choose(probs, n, score, least, most, experts), count);
    for (int32_t i = 0; i < count; i++) {
        CHECK_EQUAL(experts[i], expected[i]);
    }
    CHECK(experts[count] == -1);
}

static void the_width_follows_the_score(void) {
    const float p[5] = {0.125f, 0.5f, 0, 0.25f, 0.125f};
    const int32_t order[5] = {1, 3, 0, 4, 2};
    check_chosen(p, 5, 1, 0, 5, 0, order); /* delta 0 */
    check_chosen(p, 5, 1, 2, 5, 2, order);
    check_chosen(p, 5, 0.75f, 0, 5, 1, order);
    check_chosen(p, 5, 0.5f, 0, 5, 1, order); /* exactly delta */
    check_chosen(p, 5, 0.4375f, 0, 5, 2, order);
    check_chosen(p, 5, 0.4375f, 1, 1, 1, order);
    check_chosen(p, 5, 0.125f, 1, 5, 3, order);
    check_chosen(p, 5, 0, 1, 5, 4, order); /* all that is probable */
    check_chosen(p, 5, 0, 5, 5, 5, order);
    check_chosen(p, 5, 0, 7, 7, 5, order); /* there are no more */
    check_chosen(p, 5, -3, 1, 3, 3, order);
    check_chosen(p, 5, 2, 0, 5, 0, order);
    check_chosen(p, 5, NAN, 0, 2, 2, order);
    check_chosen(p, 5, 0, 1, 0, 0, order);
    check_chosen(p, 0, 0, 1, 3, 0, order);
    check_chosen((float[]) {0.25f, 0.25f, 0.25f, 0.25f}, 4, 0.5f, 1, 4, 2, (int32_t[]) {0, 1});
    check_chosen((float[]) {NAN, 0.5f, 0.5f}, 3, 0, 3, 3, 2, (int32_t[]) {1, 2});
}

/* The largest numbers that a store holds. */
static void large_shapes_do_not_overflow(void) {
    enum { E = 4096 };
    static float probs[E], embedding[1 << 20];
    int32_t n_experts[3] = {E, E, E};
    struct hb_maps *m = hb_maps_new(3, n_experts, 1 << 20, 2, 1);
    CHECK(m != NULL);
    for (int i = 0; i < 1 << 20; i++) {
        embedding[i] = i % 2 == 0 ? 1e18f : -1e18f;
    }
    for (int t = 0; t < 3; t++) {
        for (int e = 0; e < E; e++) {
            probs[e] = t == 0 ? 1.0f / E : e == 0 ? 1e30f : 1e25f;
        }
        hb_maps_begin(m, embedding);
        if (t > 0) {
            const float *predicted;
            float score;
            CHECK(hb_maps_predict(m, 2, &predicted, &score) && score == 1);
        }
        for (int l = 0; l < 3; l++) {
            hb_maps_observe(m, l, probs);
        }
        hb_maps_end(m);
    }
    CHECK_EQUAL(hb_maps_count(m), 2);
    hb_maps_free(m);
}

static void shapes_and_memory(void) {
    int32_t two[2] = {128, 128}, bad[2] = {128, -1}, huge[2] = {128, 1 << 20};
    CHECK(hb_maps_new(0, two, 8, 8, 1) == NULL && hb_maps_new(2, two, -1, 8, 1) == NULL);
    CHECK(hb_maps_new(2, two, 8, 0, 1) == NULL && hb_maps_new(2, bad, 8, 8, 1) == NULL);
    CHECK(hb_maps_new(2, huge, 8, 8, 1) == NULL && hb_maps_new(INT32_MAX, two, 8, 8, 1) == NULL);
    CHECK(hb_maps_new(2, two, INT32_MAX, 8, 1) == NULL && hb_maps_new(2, two, 8, INT32_MAX, 1) == NULL);
    CHECK(hb_maps_new(2, two, 8, 8, -1) == NULL);
    CHECK_EQUAL(hb_maps_bytes(2, bad, 8, 8), 0);
    size_t small = hb_maps_bytes(2, two, 8, 1000), large = hb_maps_bytes(2, two, 8, 2000);
    size_t a_map = 2 * (256 + 8) + 2 * 4 + 4 + 4 + 8 + 8;
    CHECK(large - small >= 1000 * a_map - 1024 && large - small <= 1000 * a_map + 1024);
    faults_allocation = 1;
    CHECK(hb_maps_new(2, two, 8, 8, 1) == NULL);
    CHECK_EQUAL(faults_allocation, 0);
}

/* Nothing is allocated once it is there. */
static void a_store_allocates_nothing(void) {
    struct hb_maps *m = new_mixed(3);
    faults_allocation = 1000;
    for (uint64_t t = 0; t < 9; t++) {
        add_token(m, t);
        begin_token(m, t);
        CHECK(predicts(m, 3));
    }
    CHECK_EQUAL(faults_allocation, 1000);
    faults_allocation = 0;
    hb_maps_free(m);
}

static const char *saved(const struct hb_maps *m) {
    const char *path = file_make(1);
    CHECK_EQUAL(hb_maps_save(m, path, model), HB_MAPS_OK);
    return path;
}

static void a_file_brings_back_what_was_stored(void) {
    for (uint64_t n = 0; n <= 9; n += 3) { /* none, some, full, replaced */
        struct hb_maps *m = new_mixed(6), *other = new_mixed(6);
        for (uint64_t t = 0; t < n; t++) {
            add_token(m, t);
        }
        add_token(other, 99);
        const char *path = saved(m);
        CHECK_EQUAL(hb_maps_load(other, path, model), HB_MAPS_OK);
        CHECK_EQUAL(hb_maps_count(other), n < 6 ? (int) n : 6);
        for (uint64_t t = 0; t < 20; t++) { /* and both go on alike */
            begin_token(m, t);
            begin_token(other, t);
            for (int32_t l = 0; l < LAYERS; l++) {
                const float *probs;
                float score = 0, other_score = 0;
                CHECK_EQUAL(hb_maps_predict(m, l, &probs, &score), hb_maps_predict(other, l, &probs, &other_score));
                CHECK(score == other_score);
                observe_token(m, t, l);
                observe_token(other, t, l);
            }
            hb_maps_end(m);
            hb_maps_end(other);
        }
        hb_maps_free(m);
        hb_maps_free(other);
    }
}

static size_t read_file(const char *path, unsigned char *data, size_t most) {
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    size_t size = fread(data, 1, most, file);
    fclose(file);
    return size;
}

static void write_file(const char *path, const unsigned char *data, size_t size) {
    FILE *file = fopen(path, "wb");
    CHECK(file != NULL && fwrite(data, 1, size, file) == size && fclose(file) == 0);
}

static void check_refused(struct hb_maps *m, const char *path, enum hb_maps_status status) {
    add_token(m, 1);
    begin_token(m, 1);
    CHECK_EQUAL(hb_maps_load(m, path, model), status);
    CHECK_EQUAL(hb_maps_count(m), 0);
    CHECK(!predicts(m, 0));
}

static void damaged_files_are_refused(void) {
    static unsigned char data[4096], changed[4096], large[1 << 20];
    struct hb_maps *m = new_mixed(3);
    for (uint64_t t = 0; t < 3; t++) {
        add_token(m, t);
    }
    int open = files_open();
    const char *path = saved(m);
    size_t size = read_file(path, data, sizeof data);
    CHECK_EQUAL(size, 8 + 32 + 4 * (5 + LAYERS) + 3 * 2 * (EMBD + 93) + 8);
    for (size_t cut = 0; cut < size; cut++) {
        write_file(path, data, cut);
        check_refused(m, path, cut < 8 ? HB_MAPS_FOREIGN : HB_MAPS_DAMAGED);
    }
    data[size] = 0;
    write_file(path, data, size + 1);
    check_refused(m, path, HB_MAPS_DAMAGED);
    memcpy(large, data, size);
    large[56] = large[57] = 0xff; /* more maps than fit, and as many bytes */
    write_file(path, large, sizeof large);
    check_refused(m, path, HB_MAPS_DAMAGED);
    for (size_t at = 0; at < size; at++) { /* a bit anywhere; what says whose it is comes first */
        memcpy(changed, data, size);
        changed[at] ^= (unsigned char) (1 << at % 8);
        write_file(path, changed, size);
        bool count = at >= 56 && at < 60, names = at < 40 + 4 * (5 + LAYERS) && !count;
        check_refused(m, path, names ? HB_MAPS_FOREIGN : HB_MAPS_DAMAGED);
    }
    write_file(path, data, size);
    CHECK_EQUAL(hb_maps_load(m, path, model), HB_MAPS_OK);
    CHECK_EQUAL(hb_maps_count(m), 3);
    CHECK_EQUAL(files_open(), open);
    hb_maps_free(m);
}

static void others_files_are_refused(void) {
    struct hb_maps *m = new_mixed(3);
    add_token(m, 0);
    const char *path = saved(m);
    uint8_t another[HB_MAPS_IDENTITY] = {1, 2, 4};
    CHECK_EQUAL(hb_maps_load(m, path, another), HB_MAPS_FOREIGN);
    struct hb_maps *wide = hb_maps_new(LAYERS, experts_of, EMBD + 1, 3, 2), *large = new_mixed(4);
    struct hb_maps *flat = hb_maps_new(LAYERS, (int32_t[]) {3, 8, 0, 17, 2, 63}, EMBD, 3, 2);
    struct hb_maps *deep = hb_maps_new(LAYERS - 1, experts_of, EMBD, 3, 2);
    check_refused(large, path, HB_MAPS_FOREIGN);
    CHECK_EQUAL(hb_maps_load(wide, path, model), HB_MAPS_FOREIGN);
    CHECK_EQUAL(hb_maps_load(flat, path, model), HB_MAPS_FOREIGN);
    CHECK_EQUAL(hb_maps_load(deep, path, model), HB_MAPS_FOREIGN);
    check_refused(m, file_make(5000), HB_MAPS_FOREIGN);
    errno = 0;
    check_refused(m, "no-such-folder/maps", HB_MAPS_IO);
    CHECK_EQUAL(errno, ENOENT);
    check_refused(m, ".", HB_MAPS_IO);
    hb_maps_free(wide);
    hb_maps_free(large);
    hb_maps_free(flat);
    hb_maps_free(deep);
    hb_maps_free(m);
}

/* With a good checksum: numbers that a store does not write could overflow. */
static void forged_numbers_are_refused(void) {
    static unsigned char data[4096];
    struct hb_maps *m = new_mixed(1);
    add_token(m, 0);
    const char *path = saved(m);
    size_t size = read_file(path, data, sizeof data), head = 8 + 32 + 4 * (5 + LAYERS);
    const size_t at[] = {head, head + 2 * EMBD, head + 2 * EMBD + 6, size - 10};
    for (int i = 0; i < 8; i++) {
        unsigned char forged[4096];
        memcpy(forged, data, size);
        for (int k = 0; k < (i % 2 == 0 ? 4 : 2); k++) { /* large ones, or one below zero */
            forged[at[i / 2] + (i / 2 == 3 ? (size_t) -k : (size_t) k)] = i % 2 == 0 && k % 2 == 1 ? 0x7f : 0xff;
        }
        uint64_t sum = 0xcbf29ce484222325u;
        for (size_t k = 0; k < size - 8; k++) {
            sum = (sum ^ forged[k]) * 0x100000001b3u;
        }
        memcpy(forged + size - 8, &sum, 8);
        write_file(path, forged, size);
        enum hb_maps_status status = hb_maps_load(m, path, model);
        CHECK(i == 1 ? status == HB_MAPS_OK : status == HB_MAPS_DAMAGED); /* embeddings may be below zero */
    }
    hb_maps_free(m);
}

static void a_failed_save_leaves_the_old_file(void) {
    struct hb_maps *m = new_mixed(3);
    add_token(m, 0);
    CHECK_EQUAL(hb_maps_save(m, "no-such-folder/maps", model), HB_MAPS_IO);
    CHECK_EQUAL(errno, ENOENT);
    static char long_name[5000];
    memset(long_name, 'x', sizeof long_name - 1);
    CHECK_EQUAL(hb_maps_save(m, long_name, model), HB_MAPS_IO);
    CHECK_EQUAL(errno, ENAMETOOLONG);

    char folder[64], part[128];
    snprintf(folder, sizeof folder, "test-%ld.folder", (long) getpid());
    snprintf(part, sizeof part, "%s.%ld.part", folder, (long) getpid());
    CHECK(mkdir(folder, 0700) == 0);
    CHECK_EQUAL(hb_maps_save(m, folder, model), HB_MAPS_IO); /* cannot be renamed to that */
    CHECK(access(part, F_OK) != 0);
    CHECK(symlink("/dev/full", part) == 0); /* a full disk */
    const char *path = folder;
    CHECK(rmdir(folder) == 0);
    FILE *old = fopen(path, "wb");
    CHECK(old != NULL && fputs("old", old) >= 0 && fclose(old) == 0);
    CHECK_EQUAL(hb_maps_save(m, path, model), HB_MAPS_IO);
    CHECK_EQUAL(errno, ENOSPC);
    unsigned char data[8];
    CHECK(read_file(path, data, sizeof data) == 3 && memcmp(data, "old", 3) == 0 && access(part, F_OK) != 0);
    CHECK_EQUAL(hb_maps_save(m, path, model), HB_MAPS_OK);
    CHECK_EQUAL(hb_maps_load(m, path, model), HB_MAPS_OK);
    unlink(path);
    hb_maps_free(m);
}

int main(void) {
    RUN(an_empty_store_predicts_nothing);
    RUN(the_hint_decides_first_and_the_trajectory_later);
    RUN(without_a_hint_the_trajectory_decides);
    RUN(layers_passed_over_count_as_zeros);
    RUN(probabilities_are_scaled_and_cleaned);
    RUN(the_most_redundant_map_is_replaced);
    RUN(redundancy_weighs_the_hint_by_the_distance);
    RUN(capacity_one_keeps_the_newest);
    RUN(a_period_is_predicted_once_it_was_seen);
    RUN(matches_are_those_of_a_naive_search);
    RUN(the_width_follows_the_score);
    RUN(large_shapes_do_not_overflow);
    RUN(shapes_and_memory);
    RUN(a_store_allocates_nothing);
    RUN(a_file_brings_back_what_was_stored);
    RUN(damaged_files_are_refused);
    RUN(others_files_are_refused);
    RUN(forged_numbers_are_refused);
    RUN(a_failed_save_leaves_the_old_file);
    return 0;
}
