/* Description: what repeats is predicted, with odds that were measured; routers of every kind are understood; passes of
 * several tokens and tokens that were broken off leave no trace. */
#include "map_predictor.h"

#include <math.h>

#include "check.h"
#include "faults.h"

enum { GROUPS = 4, EXPERTS = 6, USED = 2, DEPTH = 3 };

/* Of this router, an expert's product is a number of the input. */
static float identity[EXPERTS * EXPERTS];
static struct hb_router plain = {.matrix = identity, .n_embd = EXPERTS, .n_expert = EXPERTS, .n_used = USED};
static const int32_t n_experts[GROUPS] = {EXPERTS, EXPERTS, EXPERTS, EXPERTS};

static struct hb_map_predictor *new_predictor(int32_t capacity) {
    struct hb_map_predictor *m = hb_map_predictor_new(GROUPS, n_experts, EXPERTS, capacity, DEPTH);
    CHECK(m != NULL);
    return m;
}

/* An input for which a and then b are the likeliest. */
static const float *input(int32_t a, int32_t b) {
    static float x[EXPERTS];
    for (int32_t e = 0; e < EXPERTS; e++) {
        x[e] = e == a ? 6 : e == b ? 5 : 0;
    }
    return x;
}

/* The two experts of a group that a token of this kind chooses. */
static int32_t choice(int kind, int32_t group, int i) {
    return (kind * 2 + group * (kind + 1) + i * (1 + kind % 2)) % EXPERTS;
}

struct tally {
    int32_t predicted, right, further; /* of the next group; predictions of the others */
};

static void add_group(struct hb_map_predictor *m, int kind, int32_t group, struct tally *tally) {
    int32_t experts[HB_MAP_MOST], predicted, own[] = {choice(kind, group, 0), choice(kind, group, 1)};
    float odds[HB_MAP_MOST], p[EXPERTS];
    tally->right += hb_map_predictor_count(m, group, own, USED, &predicted);
    tally->predicted += predicted;
    hb_map_predictor_observe(m, group, &plain, input(own[0], own[1]));
    for (int32_t ahead = 1; ahead <= DEPTH && group + ahead < GROUPS; ahead++) {
        int32_t n = hb_map_predictor_predict(m, group + ahead, ahead, &plain, experts, odds, p);
        tally->further += ahead > 1 ? n : 0;
        for (int32_t k = 0; k < n; k++) {
            CHECK(experts[k] >= 0 && experts[k] < EXPERTS && odds[k] >= 0 && odds[k] <= 1);
            CHECK(k == 0 || p[experts[k]] <= p[experts[k - 1]]);
        }
    }
}

static struct tally add_token(struct hb_map_predictor *m, int kind) {
    struct tally tally = {0};
    hb_map_predictor_begin(m, true, &plain, input(choice(kind, 0, 0), choice(kind, 0, 1)));
    for (int32_t group = 0; group < GROUPS; group++) {
        add_group(m, kind, group, &tally);
    }
    hb_map_predictor_end(m);
    return tally;
}

static void what_repeats_is_predicted(void) {
    struct hb_map_predictor *m = new_predictor(8);
    CHECK_EQUAL(add_token(m, 0).predicted, 0);
    for (int kind = 1; kind < 3; kind++) {
        (void) add_token(m, kind); /* like the ones before in nothing or little */
    }
    for (int i = 0; i < 6; i++) {
        struct tally tally = add_token(m, i % 3);
        CHECK_EQUAL(tally.predicted, USED * (GROUPS - 1));
        CHECK_EQUAL(tally.right, tally.predicted);
        CHECK_EQUAL(tally.further, USED * 3); /* two groups of the first, one of the second */
    }
    CHECK_EQUAL(hb_maps_count(hb_map_predictor_maps(m)), 8); /* it is full by now */
    hb_map_predictor_free(m);
}

/* Of a group, what the first predicts of it after a token of some kind began. */
static int32_t predict(struct hb_map_predictor *m, const struct hb_router *router, int32_t to, int32_t *experts,
                       float *odds) {
    float p[EXPERTS];
    return hb_map_predictor_predict(m, to, to, router, experts, odds, p);
}

static void odds_are_measured(void) {
    struct hb_map_predictor *m = new_predictor(4);
    int32_t experts[HB_MAP_MOST], predicted, own[] = {4, 5};
    float before[HB_MAP_MOST], odds[HB_MAP_MOST];
    (void) add_token(m, 0);
    for (int i = 0; i < 40; i++) {
        hb_map_predictor_begin(m, true, &plain, input(0, 1));
        hb_map_predictor_observe(m, 0, &plain, input(choice(0, 0, 0), choice(0, 0, 1)));
        CHECK_EQUAL(predict(m, &plain, 1, experts, i == 0 ? before : odds), USED);
        CHECK_EQUAL(predict(m, &plain, 2, experts, odds), USED);
        CHECK_EQUAL(hb_map_predictor_count(m, 1, own, USED, &predicted), 0); /* others */
        CHECK_EQUAL(predicted, USED);
        (void) hb_map_predictor_count(m, 1, experts, USED, &predicted); /* a layer may be computed in parts */
        CHECK_EQUAL(predicted, 0);
        CHECK_EQUAL(hb_map_predictor_count(m, 2, experts, USED, &predicted), 0); /* right, from further */
        CHECK_EQUAL(predicted, 0);
    }
    hb_map_predictor_begin(m, true, &plain, NULL);
    hb_map_predictor_observe(m, 0, &plain, input(choice(0, 0, 0), choice(0, 0, 1)));
    (void) predict(m, &plain, 1, experts, odds);
    CHECK(odds[0] < 0.2f && odds[1] < 0.2f && before[0] > 0.4f);
    (void) predict(m, &plain, 2, experts, odds);
    CHECK(odds[0] > 0.9f && odds[1] > 0.9f);
    hb_map_predictor_free(m);
}

static void a_poor_match_predicts_more(void) {
    struct hb_map_predictor *m = new_predictor(4);
    int32_t experts[HB_MAP_MOST];
    float odds[HB_MAP_MOST], even[EXPERTS] = {0.5f, 0.4f, 0.3f, 0.2f, 0.1f, 0};
    hb_map_predictor_begin(m, true, &plain, even);
    hb_map_predictor_observe(m, 0, &plain, input(0, 1));
    hb_map_predictor_observe(m, 1, &plain, even); /* two have less than half of the sum */
    hb_map_predictor_end(m);
    for (int poor = 0; poor < 2; poor++) {
        hb_map_predictor_begin(m, true, &plain, NULL);
        hb_map_predictor_observe(m, 0, &plain, poor ? input(3, 4) : input(0, 1));
        CHECK_EQUAL(predict(m, &plain, 1, experts, odds), poor ? 2 * USED : USED);
        for (int32_t k = 0; k < USED; k++) {
            CHECK_EQUAL(experts[k], k);
        }
    }
    hb_map_predictor_free(m);
}

static void the_bias_of_choice_decides(void) {
    const float bias[EXPERTS] = {5, 5, 5.9f, 5, 5.8f, 5}; /* far more than the sigmoids */
    struct hb_router router = plain;
    int32_t experts[HB_MAP_MOST];
    float odds[HB_MAP_MOST];
    router.sigmoid = true;
    router.bias_of_choice = bias;
    struct hb_map_predictor *m = new_predictor(4);
    for (int i = 0; i < 2; i++) {
        hb_map_predictor_begin(m, true, &router, input(0, 1));
        hb_map_predictor_observe(m, 0, &router, input(0, 1));
        CHECK_EQUAL(predict(m, &router, 1, experts, odds), i == 0 ? 0 : USED);
        hb_map_predictor_observe(m, 1, &router, input(0, 1)); /* 1, 0.99, .5 + .9, .5 + .8: 2 and 4 win */
        hb_map_predictor_end(m);
    }
    CHECK(experts[0] == 2 && experts[1] == 4);
    hb_map_predictor_free(m);
}

static void several_tokens_leave_no_trace(void) {
    struct hb_map_predictor *m = new_predictor(4);
    struct tally tally = {0};
    for (int i = 0; i < 2; i++) {
        hb_map_predictor_begin(m, false, &plain, input(0, 1));
        for (int32_t group = 0; group < GROUPS; group++) {
            add_group(m, 0, group, &tally);
        }
        hb_map_predictor_end(m);
        CHECK(tally.predicted == 0 && tally.further == 0);
        CHECK_EQUAL(hb_maps_count(hb_map_predictor_maps(m)), i);
        CHECK_EQUAL(hb_map_predictor_has_new(m), i > 0);
        (void) add_token(m, 0); /* of which nothing is left in what follows */
    }
    hb_map_predictor_free(m);
}

static void a_token_that_was_broken_off_is_forgotten(void) {
    struct hb_map_predictor *m = new_predictor(4);
    int32_t predicted, experts[HB_MAP_MOST];
    float odds[HB_MAP_MOST];
    struct tally tally = {0};
    (void) add_token(m, 0);
    hb_map_predictor_begin(m, true, &plain, NULL);
    add_group(m, 0, 0, &tally);
    hb_map_predictor_begin(m, true, &plain, NULL);
    CHECK_EQUAL(predict(m, &plain, 1, experts, odds), 0); /* nothing of it is known */
    (void) hb_map_predictor_count(m, 1, (int32_t[]) {0}, 1, &predicted);
    CHECK_EQUAL(predicted, 0);
    hb_map_predictor_end(m); /* nothing was observed */
    CHECK_EQUAL(hb_maps_count(hb_map_predictor_maps(m)), 1);
    hb_map_predictor_free(m);
    m = new_predictor(4);
    hb_map_predictor_begin(m, true, &plain, input(0, 1));
    hb_map_predictor_end(m);
    CHECK(!hb_map_predictor_has_new(m));
    hb_map_predictor_free(m);
}

static void what_is_not_known_is_not_predicted(void) {
    struct hb_map_predictor *m = new_predictor(4);
    int32_t experts[HB_MAP_MOST];
    float odds[HB_MAP_MOST];
    struct hb_router unknown = plain, all = plain, narrow = plain, wide = plain;
    unknown.matrix = NULL;
    all.n_used = EXPERTS;
    narrow.n_embd = EXPERTS - 1;
    wide.n_expert = EXPERTS + 1; /* than was said: left out */
    (void) add_token(m, 0);
    hb_map_predictor_begin(m, true, &narrow, (float[EXPERTS - 1]) {1}); /* no hint */
    hb_map_predictor_observe(m, 0, &wide, input(0, 1));
    CHECK_EQUAL(predict(m, &plain, 1, experts, odds), 0);
    hb_map_predictor_observe(m, 0, &plain, input(choice(0, 0, 0), choice(0, 0, 1)));
    CHECK_EQUAL(predict(m, &unknown, 1, experts, odds), 0);
    CHECK_EQUAL(predict(m, &all, 1, experts, odds), 0); /* there is nothing to say */
    CHECK_EQUAL(predict(m, &plain, 1, experts, odds), USED);
    CHECK_EQUAL(hb_map_predictor_predict(m, 1, DEPTH + 1, &plain, experts, odds, odds), 0);
    hb_map_predictor_free(m);
}

static void as_many_experts_as_there_is_room_for(void) {
    enum { MANY = 2 * HB_MAP_MOST };
    static float matrix[MANY], p[MANY];
    struct hb_router router = {.matrix = matrix, .n_embd = 1, .n_expert = MANY};
    struct hb_map_predictor *m = hb_map_predictor_new(2, (int32_t[]) {MANY, MANY}, 1, 4, 1);
    int32_t experts[HB_MAP_MOST];
    float odds[HB_MAP_MOST];
    CHECK(m != NULL);
    for (int i = 0; i < 2; i++) {
        for (int32_t used = 1; i == 1 && used < MANY; used++) {
            router.n_used = used;
            hb_map_predictor_begin(m, true, &router, (float[]) {1});
            for (int e = 0; e < MANY; e++) {
                matrix[e] = e < MANY / 2 ? 9 : 0;
            }
            hb_map_predictor_observe(m, 0, &router, (float[]) {1}); /* alike by 0.7: more than 0.3 is wanted */
            int32_t n = hb_map_predictor_predict(m, 1, 1, &router, experts, odds, p);
            CHECK(used < HB_MAP_MOST ? n >= used && n <= 2 * used && n <= HB_MAP_MOST : n == 0);
        }
        memset(matrix, 0, sizeof matrix);
        hb_map_predictor_begin(m, true, &router, (float[]) {1});
        hb_map_predictor_observe(m, 0, &router, (float[]) {1});
        hb_map_predictor_observe(m, 1, &router, (float[]) {1});
        hb_map_predictor_end(m);
    }
    hb_map_predictor_free(m);
}

static void shapes_are_checked_and_failures_undone(void) {
    CHECK(hb_map_predictor_bytes(GROUPS, n_experts, EXPERTS, 8, DEPTH) >
          hb_maps_bytes(GROUPS, n_experts, EXPERTS, 8));
    const int32_t bad[][3] = {{0, 8, 1}, {GROUPS, 0, 1}, {GROUPS, 8, 0}, {GROUPS, 8, HB_MAP_DEPTH + 1}};
    for (int i = 0; i < 4; i++) {
        CHECK(hb_map_predictor_new(bad[i][0], n_experts, EXPERTS, bad[i][1], bad[i][2]) == NULL);
        CHECK_EQUAL(hb_map_predictor_bytes(bad[i][0], n_experts, EXPERTS, bad[i][1], bad[i][2]), 0);
    }
    int n = 0;
    for (bool failed = true; failed; n++) {
        atomic_store(&faults_allocation, n + 1);
        struct hb_map_predictor *m = hb_map_predictor_new(GROUPS, n_experts, EXPERTS, 8, DEPTH);
        failed = atomic_exchange(&faults_allocation, 0) <= 0;
        CHECK(failed == (m == NULL));
        hb_map_predictor_free(m);
    }
    CHECK(n > 3);
}

static void nothing_is_allocated_later(void) {
    struct hb_map_predictor *m = new_predictor(4);
    atomic_store(&faults_allocation, 1 << 20);
    for (int i = 0; i < 8; i++) {
        (void) add_token(m, i % 3);
    }
    CHECK_EQUAL(atomic_exchange(&faults_allocation, 0), 1 << 20);
    hb_map_predictor_free(m);
}

int main(void) {
    for (int e = 0; e < EXPERTS; e++) {
        identity[e * EXPERTS + e] = 1;
    }
    RUN(what_repeats_is_predicted);
    RUN(odds_are_measured);
    RUN(a_poor_match_predicts_more);
    RUN(the_bias_of_choice_decides);
    RUN(several_tokens_leave_no_trace);
    RUN(a_token_that_was_broken_off_is_forgotten);
    RUN(what_is_not_known_is_not_predicted);
    RUN(as_many_experts_as_there_is_room_for);
    RUN(shapes_are_checked_and_failures_undone);
    RUN(nothing_is_allocated_later);
    return 0;
}
