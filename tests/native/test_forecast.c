/* Description: what a layer's router will choose is learned from what it chose, and not from a pass that was broken off. */
#include "forecast.h"

#include <math.h>

#include "check.h"

enum { GROUPS = 3, EMBD = 4, EXPERTS = 4, USED = 1, DEPTH = 2 };

/* Of the last group another number of the input decides than of those before. */
static const float plain[EXPERTS * EMBD] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1};
static const float turned[EXPERTS * EMBD] = {0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0};
static const struct hb_router routers[GROUPS] = {
    {.matrix = plain, .n_embd = EMBD, .n_expert = EXPERTS, .n_used = USED},
    {.matrix = plain, .n_embd = EMBD, .n_expert = EXPERTS, .n_used = USED},
    {.matrix = turned, .n_embd = EMBD, .n_expert = EXPERTS, .n_used = USED},
};

/* Every router gets this: number `k` is the largest. */
static const float *input(int32_t k) {
    static float x[EMBD];
    for (int32_t i = 0; i < EMBD; i++) {
        x[i] = i == k ? 2 : 0;
    }
    return x;
}

static int32_t predict(struct hb_forecast *f, int32_t from, int32_t ahead, int32_t k) {
    int32_t experts[EXPERTS];
    float odds[EXPERTS], p[EXPERTS];
    CHECK(hb_forecast_predict(f, routers, from, ahead, input(k), true, experts, odds, p));
    CHECK(odds[0] >= 0 && odds[0] <= 1 && p[experts[0]] > 0);
    return experts[0];
}

/* The router of a group gets the input of `k` and chooses an expert; how many were predicted right, -1: none was. */
static int32_t learn(struct hb_forecast *f, int32_t at, int32_t k, int32_t expert) {
    int32_t predicted, right = hb_forecast_learn(f, routers, at, input(k), &expert, 1, &predicted);
    CHECK(predicted == 0 || predicted == USED);
    return predicted > 0 ? right : -1;
}

static struct hb_forecast *new_forecast(void) {
    struct hb_forecast *f = hb_forecast_new(GROUPS, EMBD, EXPERTS, DEPTH);
    CHECK(f != NULL);
    return f;
}

static void what_comes_in_between_is_learned(void) {
    struct hb_forecast *f = new_forecast();
    CHECK_EQUAL(predict(f, 0, 1, 2), 2); /* the later router's own answer to this input */
    CHECK_EQUAL(learn(f, 1, 3, 3), 0);   /* it got another */
    for (int i = 0; i < 20; i++) {
        (void) predict(f, 0, 1, 2);
        (void) learn(f, 1, 3, 3);
    }
    CHECK_EQUAL(predict(f, 0, 1, 2), 3);
    CHECK_EQUAL(learn(f, 1, 3, 3), 1);
    CHECK_EQUAL(learn(f, 1, 3, 3), -1); /* it is not learned from twice */
    hb_forecast_free(f);
}

static void a_pass_that_was_broken_off_is_not_learned_from(void) {
    for (int32_t begun = 0; begun < 2; begun++) {
        struct hb_forecast *f = new_forecast();
        for (int i = 0; i < 3; i++) {
            (void) predict(f, 0, 2, 1); /* and there the pass ends */
            if (begun) {
                hb_forecast_begin(f);
            }
            CHECK_EQUAL(predict(f, 1, 1, 3), 2); /* the next one looks a layer ahead */
            CHECK_EQUAL(learn(f, 2, 3, 2), 1);
        }
        CHECK_EQUAL(predict(f, 0, 2, 1), begun ? 0 : 2);
        hb_forecast_free(f);
    }
}

/* A model may compute nonsense for a prompt, or overflow: what was learned stays. */
static void what_is_no_number_is_not_learned(void) {
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        struct hb_forecast *f = new_forecast();
        int32_t expert = 3, predicted;
        for (int k = 0; k < 20; k++) {
            (void) predict(f, 0, 1, 2);
            (void) learn(f, 1, 3, 3);
        }
        const float x[EMBD] = {bad[i], bad[i], bad[i], bad[i]};
        (void) predict(f, 0, 1, 2);
        (void) hb_forecast_learn(f, routers, 1, x, &expert, 1, &predicted);
        int32_t experts[EXPERTS];
        float odds[EXPERTS], p[EXPERTS];
        CHECK(hb_forecast_predict(f, routers, 0, 1, x, true, experts, odds, p));
        CHECK(experts[0] >= 0 && experts[0] < EXPERTS);
        (void) learn(f, 1, 3, 3);
        for (int k = 0; k < 20; k++) {
            (void) predict(f, 0, 1, 2);
            (void) learn(f, 1, 3, 3);
        }
        CHECK_EQUAL(predict(f, 0, 1, 2), 3);
        hb_forecast_free(f);
    }
}

static void what_is_not_known_is_not_predicted(void) {
    struct hb_forecast *f = new_forecast();
    struct hb_router some[GROUPS] = {routers[0], routers[1], routers[2]};
    int32_t experts[EXPERTS];
    float odds[EXPERTS], p[EXPERTS];
    CHECK(!hb_forecast_predict(f, some, 0, DEPTH + 1, input(0), true, experts, odds, p));
    some[1].matrix = NULL;
    CHECK(!hb_forecast_predict(f, some, 0, 1, input(0), true, experts, odds, p));
    some[1] = routers[1], some[1].n_used = EXPERTS;
    CHECK(!hb_forecast_predict(f, some, 0, 1, input(0), true, experts, odds, p));
    some[1] = routers[1], some[1].n_embd = EMBD + 1;
    CHECK(!hb_forecast_predict(f, some, 0, 1, input(0), true, experts, odds, p));
    hb_forecast_free(f);
}

int main(void) {
    RUN(what_comes_in_between_is_learned);
    RUN(a_pass_that_was_broken_off_is_not_learned_from);
    RUN(what_is_no_number_is_not_learned);
    RUN(what_is_not_known_is_not_predicted);
    return 0;
}
