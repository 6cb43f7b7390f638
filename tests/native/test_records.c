/* Description: records of several sequences add up to what a list of all uses says; the end of one takes away its part
 * and nothing else. */
#include "records.h"

#include <math.h>

#include "cache.h"
#include "check.h"
#include "faults.h"

#define EXPERTS 12
#define SEQUENCES 5

static const struct hobbit_policy lfu = {.kind = HOBBIT_POLICY_LFU, .half_life = 64};
static const struct hobbit_policy decay = {.kind = HOBBIT_POLICY_DECAY, .half_life = 16};

/* --- brute force: every use, and what is left of it --- */

struct use {
    int32_t sequence, expert, precision;
    double pairs;
    double left; /* of its heat; 0: forgotten */
    uint64_t token, pass;
};

static struct {
    struct use uses[4000];
    int n;
    bool used[SEQUENCES]; /* since its last end */
    uint64_t passes[EXPERTS];
} all;

static struct hb_usage expected_of(const struct hobbit_policy *policy, int32_t expert) {
    struct hb_usage sum = {0};
    for (int i = 0; i < all.n; i++) {
        const struct use *use = &all.uses[i];
        if (use->expert == expert && use->left > 0) {
            sum.last_token = use->token > sum.last_token ? use->token : sum.last_token;
            sum.last_pass = use->pass > sum.last_pass ? use->pass : sum.last_pass;
            sum.uses[use->precision] += use->pairs;
        }
    }
    for (int i = 0; i < all.n; i++) {
        const struct use *use = &all.uses[i];
        if (use->expert == expert && use->left > 0) {
            double age = (double) (sum.last_token - use->token);
            sum.heat += use->left * use->pairs * exp2(-age / (double) policy->half_life);
        }
    }
    return sum;
}

static bool is_near(double a, double b) {
    return fabs(a - b) <= 1e-9 * (fabs(a) + fabs(b));
}

static void check_sums(struct hb_records *records, const struct hobbit_policy *policy) {
    for (int32_t e = 0; e < EXPERTS; e++) {
        const struct hb_usage *found = &hb_records_sums(records)[e];
        struct hb_usage expected = expected_of(policy, e);
        CHECK_EQUAL(found->last_token, expected.last_token);
        CHECK_EQUAL(found->last_pass, expected.last_pass);
        CHECK(is_near(found->uses[HOBBIT_HIGH], expected.uses[HOBBIT_HIGH]));
        CHECK(is_near(found->uses[HOBBIT_LOW], expected.uses[HOBBIT_LOW]));
        CHECK(is_near(found->heat, expected.heat));
    }
}

static void use_some(struct hb_records *records, const struct hobbit_policy *policy, const struct hb_moment *now,
                     uint64_t *seed) {
    struct hb_share shares[SEQUENCES];
    int32_t n = 0, expert = (int32_t) check_random(seed, EXPERTS), precision = (int32_t) check_random(seed, 2);
    uint64_t pass = ++all.passes[expert];
    for (int32_t s = 0; s < SEQUENCES; s++) {
        if (check_random(seed, 3) == 0) {
            shares[n++] = (struct hb_share) {s, 1 + (int32_t) check_random(seed, 3)};
            all.used[s] = true;
            CHECK(all.n < (int) (sizeof all.uses / sizeof all.uses[0]));
            all.uses[all.n++] = (struct use) {s, expert, precision, shares[n - 1].n_pairs, 1, now->token, pass};
        }
    }
    if (n > 0) {
        hb_records_use(records, policy, expert, precision, shares, n, pass, now);
    }
}

static void end(struct hb_records *records, const struct hobbit_policy *policy, int32_t sequence,
                struct hb_moment *now) {
    uint64_t age = hb_policy_age(policy);
    bool any = false;
    CHECK(hb_records_end(records, policy, sequence, now) == all.used[sequence]);
    for (int i = 0; i < all.n && all.used[sequence]; i++) {
        if (all.uses[i].sequence == sequence) {
            all.uses[i].left *= age > 0 ? exp2(-(double) age / (double) policy->half_life) : 0;
        }
    }
    all.used[sequence] = false;
    for (int i = 0; i < all.n; i++) {
        any = any || all.uses[i].left > 0;
    }
    CHECK((now->token == 0) == !any);
}

static void compare_with_brute_force(const struct hobbit_policy *policy) {
    uint64_t seed = 5;
    struct hb_records *records = hb_records_new(EXPERTS);
    struct hb_moment now = {.n_groups = 1};
    memset(&all, 0, sizeof all);
    for (int32_t s = 0; s < SEQUENCES; s++) {
        CHECK(hb_records_add(records, s) && hb_records_add(records, s));
    }
    for (int i = 0; i < 1500; i++) {
        now.token += 1 + check_random(&seed, 3);
        use_some(records, policy, &now, &seed);
        if (check_random(&seed, 20) == 0) {
            end(records, policy, (int32_t) check_random(&seed, SEQUENCES), &now);
        }
        check_sums(records, policy);
    }
    for (int32_t s = 0; s < SEQUENCES; s++) {
        end(records, policy, s, &now);
        check_sums(records, policy);
    }
    hb_records_free(records);
}

static void the_sums_are_those_of_all_uses(void) {
    compare_with_brute_force(&lfu);
    compare_with_brute_force(&decay);
}

static void heat_adds_up_without_a_half_life(void) {
    const struct hobbit_policy lru = {.kind = HOBBIT_POLICY_LRU};
    struct hb_records *records = hb_records_new(1);
    struct hb_moment now = {.token = 3, .n_groups = 1};
    const struct hb_share shares[] = {{0, 2}, {1, 1}, {2, 4}};
    CHECK(hb_records_add(records, 1) && hb_records_add(records, 2));
    hb_records_use(records, &lru, 0, HOBBIT_HIGH, shares, 3, 1, &now);
    CHECK(hb_records_end(records, &lru, 2, &now));
    CHECK(hb_records_sums(records)[0].heat == 3);
    hb_records_free(records);
}

/* --- what stays --- */

static void a_later_sequence_leaves_the_first_as_it_was(void) {
    struct hb_records *records = hb_records_new(2), *alone = hb_records_new(2);
    struct hb_moment now = {.token = 3, .n_groups = 1};
    const struct hb_share first = {0, 2}, second = {9, 1};
    for (int i = 0; i < 2; i++) {
        struct hb_records *r = i == 0 ? records : alone;
        hb_records_use(r, &decay, 0, HOBBIT_HIGH, &first, 1, 1, &now);
        hb_records_sums(r)[0].next_use = 77;
    }
    CHECK(hb_records_add(records, 9));
    CHECK(memcmp(hb_records_sums(records), hb_records_sums(alone), 2 * sizeof(struct hb_usage)) == 0);
    now.token = 8;
    hb_records_use(records, &lfu, 0, HOBBIT_LOW, &second, 1, 2, &now);
    CHECK(hb_records_end(records, &lfu, 9, &now));
    CHECK(memcmp(hb_records_sums(records), hb_records_sums(alone), 2 * sizeof(struct hb_usage)) == 0);
    CHECK_EQUAL(now.token, 8);
    CHECK(!hb_records_end(records, &lfu, 9, &now)); /* nothing of it is left */
    CHECK(!hb_records_end(records, &lfu, 10, &now)); /* never added */
    CHECK(hb_records_end(records, &lfu, 0, &now));
    CHECK_EQUAL(now.token, 0);
    CHECK_EQUAL(hb_records_sums(records)[0].last_pass, 0);
    CHECK_EQUAL(hb_records_sums(records)[0].next_use, 77);
    hb_records_free(records);
    hb_records_free(alone);
}

static void too_many_sequences_share_a_record(void) {
    struct hb_records *records = hb_records_new(2);
    struct hb_moment now = {.token = 1, .n_groups = 1};
    for (int32_t s = 0; s < 2 * HB_RECORDS; s++) {
        CHECK(hb_records_add(records, s));
        hb_records_use(records, &lfu, s % 2, HOBBIT_HIGH, &(struct hb_share) {s, 1}, 1, 1, &now);
    }
    CHECK(hb_records_end(records, &lfu, HB_RECORDS + 5, &now));
    double left = hb_records_sums(records)[0].uses[HOBBIT_HIGH] + hb_records_sums(records)[1].uses[HOBBIT_HIGH];
    CHECK(left == HB_RECORDS - 1);
    CHECK(!hb_records_end(records, &lfu, HB_RECORDS - 1, &now));
    CHECK(hb_records_end(records, &lfu, HB_RECORDS - 2, &now));
    hb_records_free(records);
}

static void what_was_not_added_is_sequence_0s(void) {
    struct hb_records *records = hb_records_new(2);
    struct hb_moment now = {.token = 1, .n_groups = 1};
    CHECK(hb_records_add(records, 3));
    hb_records_use(records, &lfu, 0, HOBBIT_HIGH, (struct hb_share[]) {{7, 1}, {3, 1}}, 2, 1, &now);
    CHECK(hb_records_end(records, &lfu, 0, &now));
    CHECK(hb_records_sums(records)[0].uses[HOBBIT_HIGH] == 1);
    hb_records_free(records);
}

/* --- in a cache --- */

#define GROUPS 2
#define GROUP_EXPERTS 6
#define SLOTS 9
#define EXTRA 4

static void no_memory(void *context, int32_t pool, int32_t precision, int32_t slot) {
    (void) context, (void) pool, (void) precision, (void) slot;
}

static struct hb_cache *new_cache(const struct hobbit_policy *policy) {
    struct hobbit_pool pool = {.bytes = SLOTS, .slot_bytes = {1, 0}, .n_slots = {SLOTS, 0}};
    struct hb_cache *c = hb_cache_new(1, &pool, GROUPS, (int32_t[]) {GROUP_EXPERTS, GROUP_EXPERTS}, (int32_t[]) {0, 0},
                                      no_memory, NULL);
    CHECK(c != NULL && hb_cache_set_policy(c, policy));
    return c;
}

static void look_up(struct hb_cache *c, struct hb_key key, const struct hb_share *shares, int32_t n) {
    (void) hb_cache_find_shared(c, key, shares, n);
    CHECK(hb_cache_is_valid(c));
}

static void load(struct hb_cache *c, struct hb_key key) {
    CHECK(hb_cache_claim(c, key) >= 0);
    hb_cache_loaded(c, key);
    hb_cache_pin(c, key, false);
}

/* Sequence 0 uses the experts below 4, sequence 1 those from 3 on; one token of each at a time. */
static void decode(struct hb_cache *c, bool both, uint64_t *seed) {
    for (int32_t g = 0; g < GROUPS; g++) {
        struct hb_key mine = {g, (int32_t) check_random(seed, 4), HOBBIT_HIGH};
        struct hb_key other = {g, 3 + (int32_t) check_random(seed, 3), HOBBIT_HIGH};
        hb_cache_begin(c, g, 1);
        if (both && mine.expert == other.expert) {
            look_up(c, mine, (struct hb_share[]) {{0, 1}, {1, 1}}, 2);
            continue;
        }
        look_up(c, mine, &(struct hb_share) {0, 1}, 1);
        if (both) {
            look_up(c, other, &(struct hb_share) {1, 1}, 1);
        }
    }
}

/* Who is evicted by each of these, which nobody used; -1 where there is a free slot. */
static void order(struct hb_cache *c, int32_t *numbers) {
    static const struct hb_key extra[EXTRA] = {{0, 4, 0}, {0, 5, 0}, {1, 4, 0}, {1, 5, 0}};
    for (int32_t i = 0; i < EXTRA; i++) {
        bool before[GROUPS * GROUP_EXPERTS];
        for (int32_t n = 0; n < GROUPS * GROUP_EXPERTS; n++) {
            before[n] = hb_cache_peek(c, (struct hb_key) {n / GROUP_EXPERTS, n % GROUP_EXPERTS, HOBBIT_HIGH}) >= 0;
        }
        CHECK(hb_cache_claim(c, extra[i]) >= 0);
        numbers[i] = -1;
        for (int32_t n = 0; n < GROUPS * GROUP_EXPERTS; n++) {
            struct hb_key key = {n / GROUP_EXPERTS, n % GROUP_EXPERTS, HOBBIT_HIGH};
            numbers[i] = before[n] && hb_cache_peek(c, key) < 0 ? n : numbers[i];
        }
    }
}

static void ending_a_sequence_leaves_the_order_of_the_other(const struct hobbit_policy *policy) {
    struct hb_cache *both = new_cache(policy), *alone = new_cache(policy);
    int32_t found[EXTRA], expected[EXTRA];
    CHECK(hb_cache_add_sequence(both, 1));
    for (int32_t n = 0; n < 8; n++) { /* what sequence 0 uses, and no more */
        load(both, (struct hb_key) {n / 4, n % 4, HOBBIT_HIGH});
        load(alone, (struct hb_key) {n / 4, n % 4, HOBBIT_HIGH});
    }
    uint64_t seeds[2] = {3, 3};
    for (int i = 0; i < 200; i++) {
        decode(both, true, &seeds[0]);
        decode(alone, false, &seeds[1]);
    }
    hb_cache_reset(both, 1);
    CHECK(hb_cache_is_valid(both));
    order(both, found);
    order(alone, expected);
    for (int i = 0; i < EXTRA; i++) {
        CHECK_EQUAL(found[i], expected[i]);
        CHECK_EQUAL(found[i] < 0, i == 0);
    }
    hb_cache_free(both);
    hb_cache_free(alone);
}

static void the_others_keep_their_order(void) {
    const struct hobbit_policy policies[] = {
        {.kind = HOBBIT_POLICY_LFU},
        {.kind = HOBBIT_POLICY_LFRU},
        {.kind = HOBBIT_POLICY_LCU, .low_cost = 0.5f},
        {.kind = HOBBIT_POLICY_HOBBIT, .w_lru = 0.3f, .w_lfu = 0.5f, .w_lhu = 0.1f, .w_fld = 0.1f},
    };
    for (size_t i = 0; i < sizeof policies / sizeof *policies; i++) {
        ending_a_sequence_leaves_the_order_of_the_other(&policies[i]);
    }
}

static void failed_allocations_are_survived(void) {
    atomic_store(&faults_allocation, 2);
    CHECK(hb_records_new(4) == NULL);
    struct hb_records *records = hb_records_new(4);
    struct hb_moment now = {.token = 1, .n_groups = 1};
    for (int n = 1; n <= 2; n++) {
        atomic_store(&faults_allocation, n);
        CHECK(!hb_records_add(records, 3 + n));
        atomic_store(&faults_allocation, 0);
        hb_records_use(records, &lfu, 1, HOBBIT_HIGH, &(struct hb_share) {3 + n, 1}, 1, 1, &now);
    }
    CHECK(hb_records_sums(records)[1].uses[HOBBIT_HIGH] == 2);
    CHECK(hb_records_add(records, 4) && hb_records_end(records, &lfu, 0, &now));
    CHECK(hb_records_sums(records)[1].uses[HOBBIT_HIGH] == 0);
    hb_records_free(records);
    hb_records_free(NULL);
}

int main(void) {
    RUN(the_sums_are_those_of_all_uses);
    RUN(heat_adds_up_without_a_half_life);
    RUN(a_later_sequence_leaves_the_first_as_it_was);
    RUN(too_many_sequences_share_a_record);
    RUN(what_was_not_added_is_sequence_0s);
    RUN(the_others_keep_their_order);
    RUN(failed_allocations_are_survived);
    return 0;
}
