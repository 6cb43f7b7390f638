/* Description: pairs are grouped by expert, in token order, from ids of any strides. */
#include "routing.h"

#include "check.h"
#include "faults.h"

#define USED 3
#define TOKENS 40
#define EXPERTS 16

static int32_t table[TOKENS][EXPERTS]; /* as the router's sorted experts: ids are its first columns */
static struct ggml_tensor ids;

static void make_ids(int64_t n_used, int64_t n_tokens, uint64_t seed) {
    ids = (struct ggml_tensor) {.type = GGML_TYPE_I32, .data = table, .ne = {n_used, n_tokens, 1, 1},
                                .nb = {sizeof(int32_t), sizeof table[0], sizeof table, sizeof table}};
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t n = 0; n < n_used; n++) {
            table[t][n] = (int32_t) check_random(&seed, EXPERTS);
        }
    }
}

static void check_routing(const struct hb_routing *r) {
    int32_t next = 0, most = 0, previous = -1;
    CHECK_EQUAL(r->n_pairs, ids.ne[0] * ids.ne[1]);
    for (int32_t i = 0; i < r->n_experts; i++) {
        const struct hb_routed *e = &r->experts[i];
        CHECK(e->expert > previous && e->n_pairs > 0);
        CHECK_EQUAL(e->first, next);
        previous = e->expert;
        next += e->n_pairs;
        most = e->n_pairs > most ? e->n_pairs : most;
        for (int32_t p = e->first; p < next; p++) {
            CHECK_EQUAL(table[r->token[p]][r->n[p]], e->expert);
            bool later = p == e->first || r->token[p] > r->token[p - 1] ||
                         (r->token[p] == r->token[p - 1] && r->n[p] > r->n[p - 1]);
            CHECK(later);
        }
    }
    CHECK_EQUAL(next, r->n_pairs); /* with the order, each pair is there once */
    CHECK_EQUAL(r->max_pairs, most);
}

static void pairs_are_grouped_by_expert(void) {
    struct hb_routing r = {0};
    for (uint64_t seed = 0; seed < 200; seed++) {
        make_ids(1 + (int64_t) (seed % USED), 1 + (int64_t) (seed * 7 % TOKENS), seed);
        CHECK(hb_routing_read(&r, &ids, EXPERTS));
        check_routing(&r);
    }
    hb_block_free(&r.memory);
}

static void a_token_may_use_an_expert_twice(void) {
    struct hb_routing r = {0};
    make_ids(2, 1, 1);
    table[0][0] = table[0][1] = 5;
    CHECK(hb_routing_read(&r, &ids, EXPERTS));
    check_routing(&r);
    CHECK(r.n_experts == 1 && r.experts[0].n_pairs == 2);
    hb_block_free(&r.memory);
}

static void strides_are_followed(void) {
    struct hb_routing r = {0};
    make_ids(TOKENS > EXPERTS ? EXPERTS : TOKENS, 8, 2);
    ids.nb[0] = sizeof table[0]; /* transposed: the n-th expert of token t is table[n][t] */
    ids.nb[1] = sizeof(int32_t);
    ids.ne[0] = 8;
    ids.ne[1] = EXPERTS;
    CHECK(hb_routing_read(&r, &ids, EXPERTS));
    for (int32_t i = 0; i < r.n_experts; i++) {
        for (int32_t p = r.experts[i].first; p < r.experts[i].first + r.experts[i].n_pairs; p++) {
            CHECK_EQUAL(table[r.n[p]][r.token[p]], r.experts[i].expert);
        }
    }
    hb_block_free(&r.memory);
}

static void unknown_experts_are_refused(void) {
    static const int32_t unknown[] = {-1, EXPERTS, INT32_MAX, INT32_MIN};
    struct hb_routing r = {0};
    for (int i = 0; i < 4; i++) {
        make_ids(USED, TOKENS, 3);
        table[TOKENS - 1][USED - 1] = unknown[i];
        CHECK(!hb_routing_read(&r, &ids, EXPERTS));
    }
    make_ids(USED, TOKENS, 3);
    CHECK(hb_routing_read(&r, &ids, EXPERTS));
    check_routing(&r);
    hb_block_free(&r.memory);
}

static void no_memory_is_an_answer(void) {
    struct hb_routing r = {0};
    make_ids(USED, TOKENS, 4);
    atomic_store(&faults_allocation, 1);
    CHECK(!hb_routing_read(&r, &ids, EXPERTS));
    CHECK(hb_routing_read(&r, &ids, EXPERTS));
    check_routing(&r);
    hb_block_free(&r.memory);
}

int main(void) {
    RUN(pairs_are_grouped_by_expert);
    RUN(a_token_may_use_an_expert_twice);
    RUN(strides_are_followed);
    RUN(unknown_experts_are_refused);
    RUN(no_memory_is_an_answer);
    return 0;
}
