#include "records.h"

#include <stdlib.h>
#include <string.h>

/* An expert's part in one sequence: the fields of hb_usage, smaller. Counts of pairs are exact up to 2^24. */
struct part {
    double heat;
    float uses[HOBBIT_PRECISIONS];
    uint32_t last_token, last_pass;
};

enum state { EMPTY, ENDED, LIVE }; /* ENDED: nothing but what was aged */

struct hb_records {
    int32_t n_experts;
    bool apart; /* parts are kept; while not, the sums are sequence 0's */
    struct hb_usage *sums;
    enum state states[HB_RECORDS];
    struct part *parts[HB_RECORDS]; /* [n_experts], or NULL */
};

struct hb_records *hb_records_new(int32_t n_experts) {
    struct hb_records *r = calloc(1, sizeof *r);
    if (r != NULL) {
        r->n_experts = n_experts;
        r->sums = calloc((size_t) n_experts, sizeof *r->sums);
    }
    if (r != NULL && r->sums == NULL) {
        hb_records_free(r);
        return NULL;
    }
    return r;
}

void hb_records_free(struct hb_records *r) {
    if (r == NULL) {
        return;
    }
    for (int32_t i = 0; i < HB_RECORDS; i++) {
        free(r->parts[i]);
    }
    free(r->sums);
    free(r);
}

struct hb_usage *hb_records_sums(struct hb_records *r) {
    return r->sums;
}

static struct hb_usage usage_of(const struct part *part) {
    return (struct hb_usage) {.last_token = part->last_token, .last_pass = part->last_pass, .heat = part->heat,
                              .uses = {part->uses[HOBBIT_HIGH], part->uses[HOBBIT_LOW]}};
}

static struct part part_of(const struct hb_usage *usage) {
    return (struct part) {.last_token = (uint32_t) usage->last_token, .last_pass = (uint32_t) usage->last_pass,
                          .heat = usage->heat,
                          .uses = {(float) usage->uses[HOBBIT_HIGH], (float) usage->uses[HOBBIT_LOW]}};
}

static bool add_parts(struct hb_records *r, int32_t index) {
    if (r->parts[index] == NULL) {
        r->parts[index] = calloc((size_t) r->n_experts, sizeof *r->parts[index]);
    }
    return r->parts[index] != NULL;
}

bool hb_records_add(struct hb_records *r, int32_t sequence) {
    int32_t index = hb_records_index(sequence);
    if (index == 0 && !r->apart) {
        return true;
    }
    if (!add_parts(r, index) || !add_parts(r, 0)) {
        return false;
    }
    for (int32_t e = 0; e < r->n_experts && !r->apart; e++) {
        r->parts[0][e] = part_of(&r->sums[e]);
        r->states[0] = r->sums[e].last_pass > 0 ? LIVE : r->states[0];
    }
    r->apart = true;
    return true;
}

void hb_records_use(struct hb_records *r, const struct hobbit_policy *policy, int32_t expert, int32_t precision,
                    const struct hb_share *shares, int32_t n_shares, uint64_t pass, const struct hb_moment *now) {
    int32_t n_pairs = 0;
    for (int32_t i = 0; i < n_shares; i++) {
        n_pairs += shares[i].n_pairs;
    }
    hb_policy_use(policy, &r->sums[expert], precision, n_pairs, pass, now);
    for (int32_t i = 0; i < n_shares && r->apart; i++) {
        int32_t index = hb_records_index(shares[i].sequence);
        index = r->parts[index] != NULL ? index : 0;
        struct hb_usage usage = usage_of(&r->parts[index][expert]);
        hb_policy_use(policy, &usage, precision, shares[i].n_pairs, pass, now);
        r->parts[index][expert] = part_of(&usage);
        r->states[index] = LIVE;
    }
}

/* --- ends --- */

/* Add the parts up again. With one part this is the part: 2^0 is 1. */
static void add_up(struct hb_records *r, const struct hobbit_policy *policy, int32_t expert) {
    struct hb_usage sum = {.next_use = r->sums[expert].next_use};
    for (int32_t i = 0; i < HB_RECORDS; i++) {
        if (r->parts[i] == NULL || r->parts[i][expert].last_pass == 0) {
            continue;
        }
        struct hb_usage part = usage_of(&r->parts[i][expert]);
        uint64_t last = part.last_token > sum.last_token ? part.last_token : sum.last_token;
        sum.heat = sum.heat * hb_policy_left(policy, last - sum.last_token) +
                   part.heat * hb_policy_left(policy, last - part.last_token);
        sum.uses[HOBBIT_HIGH] += part.uses[HOBBIT_HIGH];
        sum.uses[HOBBIT_LOW] += part.uses[HOBBIT_LOW];
        sum.last_token = last;
        sum.last_pass = part.last_pass > sum.last_pass ? part.last_pass : sum.last_pass;
    }
    r->sums[expert] = sum;
}

/* Of the only sequence. */
static bool end_all(struct hb_records *r, uint64_t age, struct hb_moment *now) {
    if (age > 0) {
        now->token += age; /* all of them by as much: the order stays */
        return false;
    }
    for (int32_t e = 0; e < r->n_experts; e++) {
        r->sums[e] = (struct hb_usage) {.next_use = r->sums[e].next_use}; /* that is no record of the past */
    }
    now->token = 0;
    return true;
}

static bool anything_left(const struct hb_records *r) {
    for (int32_t i = 0; i < HB_RECORDS; i++) {
        if (r->states[i] != EMPTY) {
            return true;
        }
    }
    return false;
}

bool hb_records_end(struct hb_records *r, const struct hobbit_policy *policy, int32_t sequence,
                    struct hb_moment *now) {
    uint64_t age = hb_policy_age(policy);
    int32_t index = hb_records_index(sequence);
    if (!r->apart) {
        return index == 0 && end_all(r, age, now);
    }
    enum state ended = age > 0 ? ENDED : EMPTY;
    if (r->states[index] <= ended) {
        return false;
    }
    for (int32_t e = 0; e < r->n_experts; e++) {
        struct part *part = &r->parts[index][e];
        if (part->last_pass == 0) {
            continue;
        }
        if (age > 0) {
            part->heat *= hb_policy_left(policy, age);
        } else {
            *part = (struct part) {.heat = 0};
        }
        add_up(r, policy, e);
    }
    r->states[index] = ended;
    now->token = anything_left(r) ? now->token : 0;
    return true;
}
