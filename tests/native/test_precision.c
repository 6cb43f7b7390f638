/* Description: each pair is computed in the precision that the rule and the cache give it, and the result equals, bit
 * for bit, that of the CPU when each pair's expert is taken from a high, a low or no stack in memory: whatever the
 * cache holds, and again after every failure. Calibration gathers what a naive sum does. */
#include "precision.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>

#include "faults.h"
#include "layers.h"
#include "model.h"
#include "scorer.h"

#define PAIRS (MAX_USED * MAX_TOKENS)
#define ALL (LAYERS * EXPERTS)

typedef uint8_t mixture[LAYERS][PAIRS]; /* the precision of pair token * n_used + n */

static struct hobbit_stats stats_of(const struct arm *arm) {
    struct hobbit_stats stats;
    hobbit_model_stats(arm->model, &stats);
    return stats;
}

/* --- rules --- */

struct rule {
    float t1[LAYERS], t2[LAYERS];
    bool deterministic, per_token, renormalise;
    int32_t experts;
};

static void set_rule(const struct arm *arm, const struct rule *rule) {
    struct hobbit_rule r = {0};
    char err[256];
    if (rule != NULL) {
        r = (struct hobbit_rule) {.t1 = rule->t1, .t2 = rule->t2, .deterministic = rule->deterministic,
                                  .renormalise = rule->renormalise, .per_token = rule->per_token,
                                  .experts = rule->experts};
    }
    CHECK_EQUAL(hobbit_model_set_rule(arm->model, &r, err, sizeof err), HOBBIT_OK);
}

static struct rule rule_of(float t1, float t2, bool deterministic) {
    return (struct rule) {.t1 = {t1, t1}, .t2 = {t2, t2}, .deterministic = deterministic};
}

static float random_unit(uint64_t *seed) {
    return (float) check_random(seed, 1 << 20) / (1 << 20);
}

/* All kinds of mixtures: scores begin at 0, and the rest of three experts' is mostly between 0.3 and 0.9. */
static void random_thresholds(struct rule *rule, uint64_t *seed) {
    for (int layer = 0; layer < LAYERS; layer++) {
        float a = random_unit(seed), b = random_unit(seed);
        rule->t1[layer] = a < b ? a : b;
        rule->t2[layer] = a < b ? b : a;
        switch (check_random(seed, 8)) {
            case 0: rule->t1[layer] = -1; break;                             /* none is high */
            case 1: rule->t1[layer] = rule->t2[layer] = a; break;            /* none is low */
            case 2: rule->t2[layer] = 1; break;                              /* none is skipped */
            case 3: rule->t1[layer] = 0; break;                              /* the most important one is high */
            case 4: rule->t1[layer] = -1, rule->t2[layer] = b * 0.1f; break; /* few at all */
            default: break;
        }
    }
    rule->experts = check_random(seed, 3) == 0 ? 1 + (int32_t) check_random(seed, MAX_USED) : 0;
}

/* Whether the n-th of so many gate weights is one of the `most` largest. */
static bool is_among(const float *weights, int n_used, int n, int32_t most) {
    for (int i = 0; i < n_used; i++) {
        float w = fabsf(weights[i]), own = fabsf(weights[n]);
        most -= w > own || (w == own && i < n);
    }
    return most > 0;
}

/* What each pair needs, by itself. */
static void pair_needs(const struct input *in, const struct rule *rule, mixture needs) {
    int n_used = file.variant->n_used;
    for (int t = 0; t < in->n_tokens; t++) {
        const float *weights = &in->weights[t * n_used];
        float scores[MAX_USED];
        hb_scorer_scores(weights, n_used, scores);
        for (int layer = 0; layer < LAYERS; layer++) {
            for (int n = 0; n < n_used; n++) {
                bool used = rule->experts == 0 || is_among(weights, n_used, n, rule->experts);
                int32_t need = hb_scorer_need(scores[n], rule->t1[layer], rule->t2[layer]);
                needs[layer][t * n_used + n] = (uint8_t) (used ? need : HOBBIT_SKIP);
            }
        }
    }
}

static int32_t expert_of(const struct input *in, int pair) {
    return in->table[pair / file.variant->n_used * EXPERTS + pair % file.variant->n_used];
}

static int n_pairs(const struct input *in) {
    return in->n_tokens * file.variant->n_used;
}

/* What each pair gets under a deterministic rule. */
static void precisions(const struct input *in, const struct rule *rule, mixture out) {
    mixture needs;
    pair_needs(in, rule, needs);
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int i = 0; i < n_pairs(in); i++) {
            out[layer][i] = needs[layer][i];
            for (int j = 0; j < n_pairs(in) && !rule->per_token; j++) {
                if (expert_of(in, j) == expert_of(in, i) && needs[layer][j] < out[layer][i]) {
                    out[layer][i] = needs[layer][j];
                }
            }
        }
    }
}

static uint64_t count(const struct input *in, mixture of, int32_t precision) {
    uint64_t n = 0;
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int i = 0; i < n_pairs(in); i++) {
            n += of[layer][i] == precision;
        }
    }
    return n;
}

/* Compute; the result and the counters are those of the mixture. */
static void check_mixture(struct arm *arm, struct arm *reference, const struct input *in, mixture of) {
    struct hobbit_stats before = stats_of(arm);
    reference->mixture = (const uint8_t(*)[PAIRS]) of;
    check_same(arm, reference, in);
    reference->mixture = NULL;
    struct hobbit_stats after = stats_of(arm);
    CHECK_EQUAL(after.pairs_high - before.pairs_high, count(in, of, HOBBIT_HIGH));
    CHECK_EQUAL(after.pairs_low - before.pairs_low, count(in, of, HOBBIT_LOW));
    CHECK_EQUAL(after.pairs_skip - before.pairs_skip, count(in, of, HOBBIT_SKIP));
}

static void check_rule(struct arm *arm, struct arm *reference, const struct input *in, const struct rule *rule) {
    mixture of;
    precisions(in, rule, of);
    set_rule(arm, rule);
    check_mixture(arm, reference, in, of);
}

static bool is_scored(void) {
    return !file.variant->weights_first; /* their product is not in our split */
}

/* The cache, from the smallest there may be to one that holds all copies. */
static const struct room rooms[] = {{1, 0},       {1, 1},   {2, 0},   {3, 2},    {7, 0},
                                    {ALL - 1, 3}, {ALL, 0}, {ALL, 5}, {ALL, ALL}};
enum { N_ROOMS = sizeof rooms / sizeof rooms[0] };

/* --- */

static void where_all_is_high_nothing_changes(void) {
    struct arm *reference = open_arm(0, 0);
    uint64_t seed = 15;
    struct input in;
    struct rule all_high = rule_of(1, 1, false);
    mixture of = {{0}};
    for (int i = 0; i < 3; i++) {
        struct arm *arm = open_mixed_arm((struct room) {i == 0 ? 1 : i == 1 ? 5 : ALL, i}, HOBBIT_IO_AUTO);
        uint64_t pairs = 0;
        random_input(&in, MAX_TOKENS, &seed);
        check_mixture(arm, reference, &in, of); /* without a rule */
        CHECK(stats_of(arm).scored == 0 && stats_of(arm).unscored == 0);
        set_rule(arm, &all_high);
        for (int k = 0; k < 4; k++) {
            random_input(&in, 1 + 7 * k, &seed);
            check_mixture(arm, reference, &in, of);
            pairs += (uint64_t) (LAYERS * n_pairs(&in));
            CHECK_EQUAL(stats_of(arm).scored, is_scored() ? pairs : 0);
            CHECK_EQUAL(stats_of(arm).unscored, is_scored() ? 0 : pairs);
        }
        CHECK_EQUAL(stats_of(arm).read_low_bytes, 0);
        set_rule(arm, NULL);
        check_mixture(arm, reference, &in, of);
        CHECK_EQUAL(stats_of(arm).scored + stats_of(arm).unscored, pairs);
        close_arm(arm);
    }
    close_arm(reference);
}

/* Where the gate weights are not seen, a rule that asks for scores is an error, and the model is as good as before. */
static void check_refused(struct arm *arm, struct arm *reference, const struct input *in) {
    struct rule half = rule_of(0.5f, 0.5f, true);
    float out[EMBD * MAX_TOKENS], wanted[EMBD * MAX_TOKENS];
    char text[256];
    set_rule(arm, &half);
    CHECK_EQUAL(compute(arm, in, out), GGML_STATUS_FAILED);
    hobbit_model_take_error(arm->model, text, sizeof text);
    CHECK(strstr(text, "gate weights of this model are not where") != NULL);
    CHECK(stats_of(arm).scored == 0 && stats_of(arm).unscored > 0);
    set_rule(arm, NULL);
    CHECK_EQUAL(compute(arm, in, out), GGML_STATUS_SUCCESS);
    CHECK_EQUAL(compute(reference, in, wanted), GGML_STATUS_SUCCESS);
    CHECK(memcmp(out, wanted, (size_t) (EMBD * in->n_tokens) * sizeof(float)) == 0);
    CHECK_EQUAL(stats_of(arm).read_low_bytes, 0);
}

static void what_has_no_score_is_refused(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_mixed_arm((struct room) {3, 1}, HOBBIT_IO_AUTO);
    uint64_t seed = 25;
    struct input in;
    random_input(&in, 5, &seed);
    check_refused(arm, reference, &in);
    close_arm(arm);
    close_arm(reference);
}

static bool ask_for_all(struct ggml_tensor *t, bool ask, void *data) {
    (void) t, (void) ask, (void) data;
    return true;
}

/* A caller that looks at every node takes the layer apart. */
static void nodes_asked_for_one_by_one_are_refused(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_mixed_arm((struct room) {3, 1}, HOBBIT_IO_AUTO);
    uint64_t seed = 29;
    struct input in;
    random_input(&in, 5, &seed);
    ggml_backend_sched_set_eval_callback(arm->sched, ask_for_all, NULL);
    check_refused(arm, reference, &in);
    close_arm(arm);
    close_arm(reference);
}

static void deterministic_results_are_those_of_the_mixture(void) {
    struct arm *reference = open_arm(0, 0);
    int every = file.variant == variants ? 1 : 2; /* rooms */
    struct input in;
    uint64_t read_low = 0, mixtures = 0;
    for (int per_token = 0; per_token < 2; per_token++) {
        for (int i = 0; i < N_ROOMS; i += every) {
            struct arm *arm = open_mixed_arm(rooms[i], i % 4 < 2 ? HOBBIT_IO_AUTO : HOBBIT_IO_BUFFERED);
            uint64_t seed = (uint64_t) (41 + i % 4);
            for (int k = 0; k < 6; k++) {
                struct rule rule = {.deterministic = true, .per_token = per_token};
                random_input(&in, k % 4 == 0 ? MAX_TOKENS - k : 1 + k % 3, &seed);
                random_thresholds(&rule, &seed);
                check_rule(arm, reference, &in, &rule);
                check_rule(arm, reference, &in, &rule); /* some of it is cached now */
                mixture of;
                precisions(&in, &rule, of);
                mixtures += count(&in, of, HOBBIT_HIGH) > 0 && count(&in, of, HOBBIT_LOW) > 0 &&
                            count(&in, of, HOBBIT_SKIP) > 0;
            }
            read_low += stats_of(arm).read_low_bytes;
            CHECK(i < N_ROOMS - 1 ? i > 5 || stats_of(arm).evictions > 0 : stats_of(arm).evictions == 0);
            close_arm(arm);
        }
    }
    CHECK(read_low > 0 && mixtures > N_ROOMS / 2);
    close_arm(reference);
}

/* For a single token, every division into precisions. */
static void single_tokens_get_their_precisions(void) {
    struct arm *reference = open_arm(0, 0);
    uint64_t seed = 47;
    struct input in;
    int n_used = file.variant->n_used;
    for (int i = 0; i < N_ROOMS; i += 3) {
        struct arm *arm = open_mixed_arm(rooms[i], HOBBIT_IO_AUTO);
        random_input(&in, 1, &seed);
        for (int n = 0; n < n_used; n++) {
            in.weights[n] = 1.0f / (float) (1 << n); /* scores rise */
        }
        float scores[MAX_USED];
        hb_scorer_scores(in.weights, n_used, scores);
        for (int high = -1; high < n_used; high++) {
            for (int low = high; low < n_used; low++) {
                struct rule rule = rule_of(high < 0 ? -1 : scores[high], low < 0 ? -1 : scores[low], true);
                mixture of;
                precisions(&in, &rule, of);
                CHECK_EQUAL(count(&in, of, HOBBIT_HIGH), LAYERS * (high + 1)); /* with equality */
                CHECK_EQUAL(count(&in, of, HOBBIT_LOW), LAYERS * (low - high));
                check_rule(arm, reference, &in, &rule);
            }
        }
        close_arm(arm);
    }
    close_arm(reference);
}

static void deterministic_results_do_not_depend_on_the_past(void) {
    static float first[EMBD * MAX_TOKENS], again[EMBD * MAX_TOKENS];
    uint64_t seed = 53;
    struct input in, other;
    struct rule rule = rule_of(0.4f, 0.7f, true), another = rule_of(0.1f, 0.9f, false);
    random_input(&in, 7, &seed);
    size_t bytes = (size_t) (EMBD * in.n_tokens) * sizeof(float);
    for (int per_token = 0; per_token < 2; per_token++) {
        rule.per_token = per_token;
        for (int i = 0; i < N_ROOMS; i++) {
            struct arm *arm = open_mixed_arm(rooms[i], HOBBIT_IO_AUTO);
            for (int k = 0; k < 5; k++) {
                set_rule(arm, &rule);
                CHECK_EQUAL(compute(arm, &in, i + k == 0 ? first : again), GGML_STATUS_SUCCESS);
                CHECK(i + k == 0 || memcmp(first, again, bytes) == 0);
                set_rule(arm, k % 2 == 0 ? &another : NULL);
                random_input(&other, 1 + k, &seed);
                CHECK_EQUAL(compute(arm, &other, again), GGML_STATUS_SUCCESS);
                if (k == 3) {
                    hobbit_model_forget(arm->model);
                }
            }
            close_arm(arm);
        }
    }
}

/* --- adaptive --- */

/* All high copies are cached when this is done. */
static void fill(struct arm *arm, uint64_t *seed) {
    static float out[EMBD * MAX_TOKENS];
    struct input in;
    random_input(&in, EXPERTS, seed);
    for (int t = 0; t < EXPERTS; t++) {
        for (int e = 0; e < EXPERTS; e++) {
            in.table[t * EXPERTS + e] = (t + e) % EXPERTS;
        }
    }
    set_rule(arm, NULL);
    CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_SUCCESS);
}

static void where_all_is_cached_high_adaptive_is_exact(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_mixed_arm((struct room) {ALL, 0}, HOBBIT_IO_AUTO);
    uint64_t seed = 65;
    struct input in;
    mixture all_high = {{0}};
    fill(arm, &seed);
    CHECK_EQUAL(stats_of(arm).n_cached, ALL);
    uint64_t read = stats_of(arm).read_bytes;
    for (int i = 0; i < 6; i++) {
        struct rule rule = rule_of(-1, i % 2 == 0 ? -1 : 0.5f, false);
        rule.per_token = i % 3 == 0; /* says nothing here */
        rule.renormalise = i >= 3;
        random_input(&in, 1 + 4 * i, &seed);
        set_rule(arm, &rule);
        check_mixture(arm, reference, &in, all_high);
    }
    CHECK_EQUAL(stats_of(arm).read_bytes, read);
    close_arm(arm);
    close_arm(reference);
}

/* Without evictions, what is cached follows from what was asked for. */
static void adaptive_uses_the_best_copy_there_is(void) {
    struct arm *reference = open_arm(0, 0);
    uint64_t seed = 67, promotions = 0, better = 0;
    struct input in;
    for (int round = 0; round < 4; round++) {
        bool cached[LAYERS][EXPERTS][HOBBIT_PRECISIONS] = {0};
        uint64_t promoted = 0;
        int32_t n_cached = 0;
        struct arm *arm = open_mixed_arm((struct room) {ALL, ALL}, HOBBIT_IO_AUTO);
        for (int k = 0; k < 12; k++) {
            struct rule rule = {.deterministic = false};
            mixture needs, of;
            random_input(&in, 1 + k % 3, &seed);
            random_thresholds(&rule, &seed);
            precisions(&in, &rule, needs);
            for (int layer = 0; layer < LAYERS; layer++) {
                bool before[EXPERTS][HOBBIT_PRECISIONS];
                memcpy(before, cached[layer], sizeof before);
                for (int i = 0; i < n_pairs(&in); i++) {
                    int32_t e = expert_of(&in, i), need = needs[layer][i];
                    int32_t precision = before[e][HOBBIT_HIGH] ? HOBBIT_HIGH
                                        : before[e][HOBBIT_LOW] && need != HOBBIT_HIGH ? HOBBIT_LOW : need;
                    better += precision < need;
                    of[layer][i] = (uint8_t) precision;
                    if (precision == HOBBIT_SKIP || cached[layer][e][precision]) {
                        continue;
                    }
                    cached[layer][e][precision] = true;
                    n_cached++;
                    if (precision == HOBBIT_HIGH && cached[layer][e][HOBBIT_LOW]) {
                        cached[layer][e][HOBBIT_LOW] = false;
                        promoted++;
                        n_cached--;
                    }
                }
            }
            set_rule(arm, &rule);
            check_mixture(arm, reference, &in, of);
            CHECK_EQUAL(stats_of(arm).promotions, promoted);
            CHECK_EQUAL(stats_of(arm).n_cached, n_cached);
        }
        CHECK_EQUAL(stats_of(arm).evictions, 0);
        promotions += promoted;
        close_arm(arm);
    }
    CHECK(promotions > 4 && better > 4);
    close_arm(reference);
}

/* Whatever an evicting cache makes of it, it is a mixture: each pair counts once, and nothing fails. */
static void adaptive_works_in_any_cache(void) {
    static float out[EMBD * MAX_TOKENS];
    struct input in;
    for (int i = 0; i < N_ROOMS; i++) {
        struct arm *arm = open_mixed_arm(rooms[i], HOBBIT_IO_AUTO);
        uint64_t seed = 69, pairs = 0;
        for (int k = 0; k < 12; k++) {
            struct rule rule = {.renormalise = k % 3 == 0};
            random_input(&in, k % 4 == 0 ? MAX_TOKENS : 1 + k % 3, &seed);
            random_thresholds(&rule, &seed);
            set_rule(arm, &rule);
            CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_SUCCESS);
            pairs += (uint64_t) (LAYERS * n_pairs(&in));
            struct hobbit_stats stats = stats_of(arm);
            CHECK_EQUAL(stats.pairs_high + stats.pairs_low + stats.pairs_skip, pairs);
        }
        close_arm(arm);
    }
}

/* --- renormalising --- */

/* Sums of these are exact in any order. */
static void dyadic_weights(struct input *in, uint64_t *seed) {
    for (int i = 0; i < n_pairs(in); i++) {
        in->weights[i] = (float) (1 + check_random(seed, 63)) / 64;
    }
}

/* What is left of a token's weights grows to the sum of all. */
static void grow(struct input *in, const uint8_t *precision) {
    int n_used = file.variant->n_used;
    for (int t = 0; t < in->n_tokens; t++) {
        float sum = 0, left = 0;
        for (int n = 0; n < n_used; n++) {
            sum += in->weights[t * n_used + n];
            left += precision[t * n_used + n] == HOBBIT_SKIP ? 0 : in->weights[t * n_used + n];
        }
        for (int n = 0; n < n_used && left > 0; n++) {
            in->weights[t * n_used + n] *= sum / left;
        }
    }
}

static void renormalising_keeps_the_sum_of_weights(void) {
    static float plain[EMBD * MAX_TOKENS], wanted[EMBD * MAX_TOKENS], got[EMBD * MAX_TOKENS];
    struct arm *reference = open_arm(0, 0);
    struct input in, grown;
    int changed = 0;
    for (int per_token = 0; per_token < 2; per_token++) {
        for (int i = 0; i < N_ROOMS; i++) {
            struct arm *arm = open_mixed_arm(rooms[i], HOBBIT_IO_AUTO);
            uint64_t seed = (uint64_t) (73 + i);
            for (int k = 0; k < 5; k++) {
                float t2 = (float) k * 0.25f;
                struct rule rule = rule_of(k == 0 ? -1 : t2 / 2, t2, true); /* also none, and also all */
                rule.per_token = per_token;
                rule.renormalise = true;
                random_input(&in, 1 + 5 * k, &seed);
                dyadic_weights(&in, &seed);
                mixture of;
                precisions(&in, &rule, of); /* the same in both layers */
                grown = in;
                grow(&grown, of[0]);
                reference->mixture = (const uint8_t(*)[PAIRS]) of;
                CHECK_EQUAL(compute(reference, &in, plain), GGML_STATUS_SUCCESS);
                CHECK_EQUAL(compute(reference, &grown, wanted), GGML_STATUS_SUCCESS);
                reference->mixture = NULL;
                set_rule(arm, &rule);
                CHECK_EQUAL(compute(arm, &in, got), GGML_STATUS_SUCCESS);
                size_t bytes = (size_t) (EMBD * in.n_tokens) * sizeof(float);
                CHECK(memcmp(got, wanted, bytes) == 0);
                changed += memcmp(got, plain, bytes) != 0;
                rule.renormalise = false;
                check_rule(arm, reference, &in, &rule); /* and no longer */
            }
            close_arm(arm);
        }
    }
    CHECK(changed > 2 * N_ROOMS);
    close_arm(reference);
}

/* --- calibration --- */

struct naive {
    const struct arm *arm; /* to compare with */
    const struct input *in;
    double sums[LAYERS][N_MATRICES][EXPERTS][EMBD];
    int64_t counts[LAYERS][N_MATRICES][EXPERTS];
};

static void add_naive(struct naive *naive, const struct ggml_tensor *node, int layer, enum role role,
                      int32_t precision) {
    const struct ggml_tensor *x = node->src[1];
    for (int i = 0; i < n_pairs(naive->in); i++) {
        int n = i % file.variant->n_used, t = i / file.variant->n_used;
        int32_t e = expert_of(naive->in, i);
        if (naive->arm->mixture[layer][i] != precision) {
            continue;
        }
        const float *row = (const float *) ((const char *) x->data + (size_t) (n % x->ne[1]) * x->nb[1] +
                                            (size_t) t * x->nb[2]);
        for (int k = 0; k < EMBD; k++) {
            naive->sums[layer][role][e][k] += (double) row[k] * (double) row[k];
        }
        naive->counts[layer][role][e]++;
    }
}

static bool sum_naively(struct ggml_tensor *node, bool ask, void *data) {
    struct naive *naive = data;
    if (ask || node->op != GGML_OP_MUL_MAT_ID) {
        return true;
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        for (enum role role = UP; role <= GATE_UP; role++) {
            if (node->src[0] == naive->arm->weights[layer][role]) {
                add_naive(naive, node, layer, role, HOBBIT_HIGH);
            } else if (node->src[0] == naive->arm->low_weights[layer][role]) {
                add_naive(naive, node, layer, role, HOBBIT_LOW);
            }
        }
    }
    return true;
}

/* Of the matrix in the options. */
static int matrix_index(const struct arm *arm, int layer, enum role role) {
    char name[16];
    snprintf(name, sizeof name, "%d.%d", layer, role);
    const struct hb_catalog *catalog = hb_model_catalog(arm->model);
    return (int) (hb_catalog_find(catalog, name) - catalog->matrices);
}

static void the_inputs_of_experts_are_summed(void) {
    enum { MATRICES = LAYERS * HOBBIT_PRECISIONS * N_MATRICES };
    static float sums[MATRICES][EXPERTS][EMBD];
    static int64_t counts[MATRICES][EXPERTS];
    static struct naive naive;
    float *into[MATRICES];
    int64_t *counts_into[MATRICES];
    struct arm *reference = open_arm(0, 0);
    for (int i = 0; i < N_ROOMS; i += 2) {
        struct arm *arm = open_mixed_arm(rooms[i], HOBBIT_IO_AUTO);
        struct input in;
        uint64_t seed = (uint64_t) (81 + i);
        memset(sums, 0, sizeof sums);
        memset(counts, 0, sizeof counts);
        memset(&naive, 0, sizeof naive);
        naive.arm = reference;
        naive.in = &in;
        for (int m = 0; m < MATRICES; m++) {
            into[m] = sums[m][0];
            counts_into[m] = counts[m];
        }
        int left_out = matrix_index(arm, 1, DOWN);
        into[left_out] = NULL;
        ggml_backend_sched_set_eval_callback(reference->sched, sum_naively, &naive);
        hobbit_model_collect(arm->model, into, counts_into);
        for (int k = 0; k < 6; k++) { /* high, mixed, and what is cached */
            struct rule rule = rule_of(k < 2 ? 1 : 0.2f, k < 2 ? 1 : 0.6f, true);
            rule.per_token = k % 2 == 0;
            random_input(&in, 1 + 3 * (k / 2), &seed);
            check_rule(arm, reference, &in, &rule);
            check_rule(arm, reference, &in, &rule); /* where all of it is cached, too */
        }
        ggml_backend_sched_set_eval_callback(reference->sched, NULL, NULL);
        hobbit_model_collect(arm->model, NULL, NULL);
        struct rule all_high = rule_of(1, 1, true);
        check_rule(arm, reference, &in, &all_high); /* no longer counted */
        int64_t rows = 0;
        for (int layer = 0; layer < LAYERS; layer++) {
            for (enum role role = UP; role <= GATE_UP; role++) {
                if (!has(file.variant, role)) {
                    continue;
                }
                int m = matrix_index(arm, layer, role);
                for (int e = 0; e < EXPERTS; e++) {
                    CHECK_EQUAL(counts[m][e], m == left_out ? 0 : naive.counts[layer][role][e]);
                    rows += counts[m][e];
                    for (int k = 0; k < EMBD; k++) {
                        double wanted = m == left_out ? 0 : naive.sums[layer][role][e][k];
                        CHECK(fabs((double) sums[m][e][k] - wanted) <= 1e-5 * wanted);
                        sums[m][e][k] = 0;
                    }
                    counts[m][e] = 0;
                }
            }
        }
        CHECK(rows > 0);
        for (int m = 0; m < MATRICES; m++) { /* nothing under the number of a low matrix */
            for (int e = 0; e < EXPERTS; e++) {
                CHECK(counts[m][e] == 0 && sums[m][e][0] == 0);
            }
        }
        close_arm(arm);
    }
    close_arm(reference);
}

static void scores_are_counted_in_bins(void) {
    static int64_t bins[LAYERS][HOBBIT_SCORE_BINS], wanted[LAYERS][HOBBIT_SCORE_BINS];
    struct arm *reference = open_arm(0, 0), *arm = open_mixed_arm((struct room) {6, 0}, HOBBIT_IO_AUTO);
    uint64_t seed = 91, pairs = 0;
    struct input in;
    int n_used = file.variant->n_used;
    memset(bins, 0, sizeof bins);
    memset(wanted, 0, sizeof wanted);
    hobbit_model_observe(arm->model, bins[0]);
    for (int k = 0; k < 8; k++) {
        struct rule rule = rule_of(0.25f, 0.5f, true);
        random_input(&in, 1 + 3 * k, &seed);
        if (k == 3) {
            memset(&in.weights[n_used + 1], 0, sizeof in.weights[0] * (size_t) (n_used - 1)); /* scores of 1 */
        }
        for (int t = 0; t < in.n_tokens; t++) {
            float scores[MAX_USED];
            hb_scorer_scores(&in.weights[t * n_used], n_used, scores);
            for (int n = 0; n < n_used; n++) {
                for (int bin = 0; bin < HOBBIT_SCORE_BINS && scores[n] > 0; bin++) {
                    bool within = scores[n] * HOBBIT_SCORE_BINS >= (float) bin &&
                                  (scores[n] * HOBBIT_SCORE_BINS < (float) (bin + 1) || bin == HOBBIT_SCORE_BINS - 1);
                    wanted[0][bin] += within;
                    wanted[1][bin] += within;
                }
            }
        }
        pairs += (uint64_t) (LAYERS * n_pairs(&in));
        if (k < 4) { /* without a rule too */
            mixture of = {{0}};
            check_mixture(arm, reference, &in, of);
        } else {
            check_rule(arm, reference, &in, &rule);
        }
        CHECK_EQUAL(stats_of(arm).scored, pairs);
    }
    hobbit_model_observe(arm->model, NULL);
    CHECK_EQUAL(compute(arm, &in, (float[EMBD * MAX_TOKENS]) {0}), GGML_STATUS_SUCCESS);
    CHECK(wanted[0][HOBBIT_SCORE_BINS - 1] >= n_used - 1);
    CHECK(memcmp(bins, wanted, sizeof bins) == 0);
    close_arm(arm);
    close_arm(reference);
}

/* --- failures --- */

static atomic_int reads_until_failure;

static ssize_t fail_later(int fd, void *dst, size_t length, off_t offset) {
    if (atomic_fetch_sub(&reads_until_failure, 1) <= 0) {
        errno = EIO;
        return -1;
    }
    return faults_real_pread(fd, dst, length, offset);
}

static void failed_reads_fail_the_computation_and_no_more(void) {
    struct arm *reference = open_arm(0, 0);
    uint64_t seed = 103;
    struct input in;
    float out[EMBD * MAX_TOKENS];
    char err[256];
    int failures = 0;
    for (int i = 0; i < N_ROOMS; i += 2) {
        struct arm *arm = open_mixed_arm(rooms[i], HOBBIT_IO_BUFFERED);
        for (int n = 0; n < 10; n++) {
            struct rule rule = rule_of(0.2f, 0.6f, true);
            rule.per_token = n % 2 == 0;
            random_input(&in, 4, &seed);
            set_rule(arm, &rule);
            atomic_store(&reads_until_failure, n);
            faults_pread = fail_later;
            enum ggml_status status = compute(arm, &in, out);
            faults_pread = NULL;
            hobbit_model_take_error(arm->model, err, sizeof err);
            CHECK(status == GGML_STATUS_FAILED || status == GGML_STATUS_SUCCESS);
            CHECK((status == GGML_STATUS_FAILED) == (err[0] != '\0'));
            failures += status == GGML_STATUS_FAILED;
            check_rule(arm, reference, &in, &rule);
        }
        hobbit_model_forget(arm->model);
        CHECK_EQUAL(stats_of(arm).n_cached, 0); /* nothing was left pinned */
        close_arm(arm);
    }
    CHECK(failures > N_ROOMS);
    close_arm(reference);
}

/* So that what its threads allocate is not counted below. */
static void start_threads(struct hobbit_model *m) {
    struct hb_key key = {0, 0, HOBBIT_LOW};
    hb_model_lock(m);
    int32_t slot;
    CHECK_EQUAL(hb_model_fetch(m, key, &slot), HB_FETCH_STARTED);
    CHECK(!hb_model_arrival(m, true).failed);
    hb_model_release(m, key);
    hb_model_unlock(m);
}

static void every_failed_allocation_is_survived(void) {
    struct arm *reference = open_arm(0, 0);
    uint64_t seed = 107;
    struct input in;
    float out[EMBD * MAX_TOKENS];
    struct rule rule = rule_of(0.2f, 0.6f, true);
    rule.per_token = true;
    random_input(&in, 4, &seed);
    bool failed = true;
    int n = 0;
    while (failed) {
        struct arm *arm = open_mixed_arm((struct room) {2, 1}, HOBBIT_IO_BUFFERED);
        set_rule(arm, &rule);
        start_threads(arm->model);
        atomic_store(&faults_allocation, ++n);
        enum ggml_status status = compute(arm, &in, out);
        failed = atomic_exchange(&faults_allocation, 0) <= 0;
        CHECK(failed || status == GGML_STATUS_SUCCESS);
        check_rule(arm, reference, &in, &rule);
        close_arm(arm);
    }
    CHECK(n > 5);
    close_arm(reference);
}

/* --- threads --- */

static atomic_bool done;

/* Rules under which all is high, to and fro, and the rest of what another thread may do. */
static void *meddle(void *argument) {
    struct arm *arm = argument;
    struct rule all_high = rule_of(1, 1, false);
    char err[256];
    for (int i = 0; !atomic_load(&done); i++) {
        set_rule(arm, i % 2 == 0 ? &all_high : NULL);
        CHECK(stats_of(arm).pairs_low == 0);
        hobbit_model_take_error(arm->model, err, sizeof err);
        CHECK(err[0] == '\0');
        if (i % 5 == 0) {
            hobbit_model_forget(arm->model);
        }
        usleep(200);
    }
    return NULL;
}

static void rules_may_change_while_another_thread_computes(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_mixed_arm((struct room) {5, 2}, HOBBIT_IO_AUTO);
    uint64_t seed = 111;
    struct input in;
    pthread_t thread;
    atomic_store(&done, false);
    CHECK_EQUAL(pthread_create(&thread, NULL, meddle, arm), 0);
    for (int i = 0; i < 15; i++) {
        random_input(&in, 1 + i % 4, &seed);
        check_same(arm, reference, &in);
    }
    atomic_store(&done, true);
    CHECK_EQUAL(pthread_join(thread, NULL), 0);
    close_arm(arm);
    close_arm(reference);
}

int main(void) {
    for (int i = 0; i < N_VARIANTS; i++) {
        printf("%s\n", variants[i].name);
        make_weights(&variants[i]);
        RUN(where_all_is_high_nothing_changes);
        RUN(nodes_asked_for_one_by_one_are_refused);
        if (!is_scored()) {
            RUN(what_has_no_score_is_refused);
            free_weights();
            continue;
        }
        RUN(deterministic_results_are_those_of_the_mixture);
        RUN(single_tokens_get_their_precisions);
        RUN(where_all_is_cached_high_adaptive_is_exact);
        RUN(the_inputs_of_experts_are_summed);
        if (i == 0) {
            RUN(deterministic_results_do_not_depend_on_the_past);
            RUN(adaptive_uses_the_best_copy_there_is);
            RUN(adaptive_works_in_any_cache);
            RUN(renormalising_keeps_the_sum_of_weights);
            RUN(scores_are_counted_in_bins);
            RUN(failed_reads_fail_the_computation_and_no_more);
            RUN(every_failed_allocation_is_survived);
            RUN(rules_may_change_while_another_thread_computes);
        }
        free_weights();
    }
    return 0;
}
