/* Description: pairs are grouped by expert, in token order, from ids of any strides, and by the precision they need. */
#include "routing.h"

#include "check.h"
#include "faults.h"
#include "hobbit.h"

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
    int32_t next = 0, previous = -1;
    CHECK_EQUAL(r->n_pairs, ids.ne[0] * ids.ne[1]);
    for (int32_t i = 0; i < r->n_experts; i++) {
        const struct hb_routed *e = &r->experts[i];
        CHECK(e->expert > previous && e->n_pairs > 0);
        CHECK(e->precision == HOBBIT_HIGH && e->slot == -1);
        CHECK_EQUAL(e->first, next);
        previous = e->expert;
        next += e->n_pairs;
        for (int32_t p = e->first; p < next; p++) {
            CHECK_EQUAL(table[r->token[p]][r->n[p]], e->expert);
            bool later = p == e->first || r->token[p] > r->token[p - 1] ||
                         (r->token[p] == r->token[p - 1] && r->n[p] > r->n[p - 1]);
            CHECK(later);
        }
    }
    CHECK_EQUAL(next, r->n_pairs); /* with the order, each pair is there once */
    CHECK(r->n_used == ids.ne[0] && r->n_tokens == ids.ne[1]);
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

/* --- needs --- */

static uint8_t needs[TOKENS * USED];

static void make_needs(uint64_t seed) {
    uint32_t kinds = 1 + (uint32_t) (seed % 4), first = check_random(&seed, 3); /* one, two, or all, evenly or not */
    for (int64_t i = 0; i < ids.ne[0] * ids.ne[1]; i++) {
        needs[i] = (uint8_t) ((first + check_random(&seed, kinds)) % 3);
    }
}

/* The strongest need of the expert's pairs; SKIP + 1: it has none. */
static int32_t strongest_of(int32_t expert) {
    int32_t strongest = HOBBIT_SKIP + 1;
    for (int64_t t = 0; t < ids.ne[1]; t++) {
        for (int64_t n = 0; n < ids.ne[0]; n++) {
            int32_t need = needs[t * ids.ne[0] + n];
            strongest = table[t][n] == expert && need < strongest ? need : strongest;
        }
    }
    return strongest;
}

static void an_expert_gets_its_strongest_need(void) {
    struct hb_routing r = {0};
    for (uint64_t seed = 0; seed < 300; seed++) {
        make_ids(1 + (int64_t) (seed % USED), 1 + (int64_t) (seed * 7 % TOKENS), seed);
        make_needs(seed);
        CHECK(hb_routing_read(&r, &ids, EXPERTS));
        check_routing(&r);
        hb_routing_strongest(&r, needs);
        int32_t at = 0;
        for (int32_t e = 0; e < EXPERTS; e++) {
            if (strongest_of(e) <= HOBBIT_SKIP) {
                CHECK(at < r.n_experts && r.experts[at].expert == e);
                CHECK_EQUAL(r.experts[at].precision, strongest_of(e));
                CHECK(hb_routing_find(&r, e, strongest_of(e)) == &r.experts[at]);
                r.experts[at++].precision = HOBBIT_HIGH; /* nothing else has changed */
            }
        }
        CHECK_EQUAL(at, r.n_experts);
        check_routing(&r);
    }
    hb_block_free(&r.memory);
}

static void pairs_are_divided_by_their_needs(void) {
    struct hb_routing r = {0};
    int more_than_once = 0;
    for (uint64_t seed = 0; seed < 300; seed++) {
        make_ids(1 + (int64_t) (seed % USED), 1 + (int64_t) (seed * 7 % TOKENS), seed);
        make_needs(seed);
        CHECK(hb_routing_read(&r, &ids, EXPERTS));
        hb_routing_divide(&r, needs);
        int32_t at = 0, pair = 0;
        for (int32_t e = 0; e < EXPERTS; e++) {
            int32_t before = at;
            for (int32_t precision = HOBBIT_HIGH; precision <= HOBBIT_SKIP; precision++) {
                int32_t first = pair;
                for (int64_t t = 0; t < ids.ne[1]; t++) { /* in token order */
                    for (int64_t n = 0; n < ids.ne[0]; n++) {
                        if (table[t][n] == e && needs[t * ids.ne[0] + n] == precision) {
                            CHECK(pair < r.n_pairs && r.token[pair] == t && r.n[pair] == n);
                            pair++;
                        }
                    }
                }
                if (pair > first) {
                    const struct hb_routed *entry = hb_routing_find(&r, e, precision);
                    CHECK(at < r.n_experts && entry == &r.experts[at]);
                    CHECK(entry->expert == e && entry->precision == precision && entry->slot == -1);
                    CHECK(entry->first == first && entry->n_pairs == pair - first);
                    at++;
                }
            }
            more_than_once += at - before > 1;
        }
        CHECK_EQUAL(at, r.n_experts);
        CHECK_EQUAL(pair, r.n_pairs);
    }
    CHECK(more_than_once > 100);
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
    RUN(an_expert_gets_its_strongest_need);
    RUN(pairs_are_divided_by_their_needs);
    RUN(no_memory_is_an_answer);
    return 0;
}
