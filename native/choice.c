/* Who gets which precision: the rule, the schedule, and what is cached. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "model_impl.h"

static bool thresholds_fit(const struct hobbit_model *m, const struct hobbit_rule *rule, char *err, size_t err_len) {
    for (int32_t g = 0; g < m->catalog.n_groups; g++) {
        float t1 = rule->t1[g], t2 = rule->t2[g];
        if (!(t1 <= t2)) {
            snprintf(err, err_len, "T1 is %g and T2 is %g: T1 must not be above T2", (double) t1, (double) t2);
            return false;
        }
        bool never_low = t1 == t2 || t1 >= 1;
        if (!never_low && m->catalog.groups[g].copies[HOBBIT_LOW].n_matrices == 0) {
            snprintf(err, err_len, "the model was loaded without low-precision experts");
            return false;
        }
    }
    return true;
}

int32_t hobbit_model_set_rule(struct hobbit_model *m, const struct hobbit_rule *rule, char *err, size_t err_len) {
    bool active = rule->t1 != NULL && rule->t2 != NULL;
    if ((rule->t1 == NULL) != (rule->t2 == NULL) || rule->experts < 0 || rule->patience < 0 ||
        rule->patience > UINT16_MAX || !(rule->substitute >= 0)) {
        snprintf(err, err_len, "the rule has a number that makes no sense");
        return HOBBIT_ARG;
    }
    if (active && !thresholds_fit(m, rule, err, err_len)) {
        return HOBBIT_ARG;
    }
    size_t bytes = (size_t) m->catalog.n_groups * sizeof *rule->t1;
    if (m->ranges == NULL) {
        m->ranges = calloc((size_t) m->catalog.n_groups, sizeof *m->ranges);
        m->in_vain = calloc((size_t) m->catalog.n_experts, sizeof *m->in_vain);
    }
    if (m->ranges == NULL || m->in_vain == NULL) {
        snprintf(err, err_len, "out of memory");
        return HOBBIT_NOMEM;
    }
    struct hb_rule new = {
        .active = active,
        .deterministic = rule->deterministic != 0,
        .renormalise = rule->renormalise != 0,
        .per_token = rule->per_token != 0 && rule->deterministic != 0,
        .reversed = rule->reversed != 0,
        .patience = rule->patience,
        .experts = rule->experts,
        .substitute = rule->substitute,
    };
    if (active) {
        new.t1 = malloc(bytes);
        new.t2 = malloc(bytes);
        if (new.t1 == NULL || new.t2 == NULL) {
            free(new.t1);
            free(new.t2);
            snprintf(err, err_len, "out of memory");
            return HOBBIT_NOMEM;
        }
        memcpy(new.t1, rule->t1, bytes);
        memcpy(new.t2, rule->t2, bytes);
    }
    hb_model_lock(m);
    struct hb_rule old = m->rule;
    m->rule = new;
    hb_model_unlock(m);
    free(old.t1);
    free(old.t2);
    return HOBBIT_OK;
}

static int32_t set_schedule(struct hobbit_model *m, struct hb_schedule *schedule, const char *path, char *err,
                            size_t err_len) {
    if (schedule == NULL) {
        snprintf(err, err_len, "%s: %s", path, errno != 0 ? strerror(errno) : "is not a precision schedule");
        return errno != 0 ? HOBBIT_IO : HOBBIT_FORMAT;
    }
    hb_model_lock(m);
    struct hb_schedule *old = m->schedule;
    m->schedule = schedule;
    hb_model_unlock(m);
    (void) hb_schedule_close(old);
    return HOBBIT_OK;
}

int32_t hobbit_model_record(struct hobbit_model *m, const char *path, const char *note, char *err, size_t err_len) {
    return set_schedule(m, hb_schedule_create(path, note), path, err, err_len);
}

int32_t hobbit_model_replay(struct hobbit_model *m, const char *path, char *err, size_t err_len) {
    return set_schedule(m, hb_schedule_open(path), path, err, err_len);
}

int32_t hobbit_model_schedule_end(struct hobbit_model *m, char *err, size_t err_len) {
    hb_model_lock(m);
    struct hb_schedule *schedule = m->schedule;
    m->schedule = NULL;
    hb_model_unlock(m);
    if (!hb_schedule_close(schedule)) {
        snprintf(err, err_len, "the precision schedule cannot be written: %s", strerror(errno));
        return HOBBIT_IO;
    }
    return HOBBIT_OK;
}

void hobbit_model_observe(struct hobbit_model *m, int64_t *histogram) {
    hb_model_lock(m);
    m->gathered.scores = histogram;
    hb_model_unlock(m);
}

void hobbit_model_collect(struct hobbit_model *m, float *const *sums, int64_t *const *counts) {
    hb_model_lock(m);
    m->gathered.sums = sums;
    m->gathered.counts = counts;
    hb_model_unlock(m);
}

const struct hb_rule *hb_model_rule(const struct hobbit_model *m) {
    return &m->rule;
}

const struct hb_gathered *hb_model_gathered(const struct hobbit_model *m) {
    return &m->gathered;
}

bool hb_model_has(const struct hobbit_model *m, struct hb_key key) {
    return hb_model_is_here(m, key) || hb_model_is_there(m, key);
}

bool hb_model_is_here(const struct hobbit_model *m, struct hb_key key) {
    return hb_cache_peek(m->cache, key) >= 0;
}

float hb_model_mean_range(struct hobbit_model *m, int32_t group, float range) {
    struct range *r = &m->ranges[group];
    r->sum += (double) range;
    r->n++;
    return (float) (r->sum / (double) r->n);
}

bool hb_model_has_schedule(const struct hobbit_model *m) {
    return m->schedule != NULL;
}

bool hb_model_schedule(struct hobbit_model *m, int32_t group, int32_t n, const int32_t *experts,
                       int32_t *precisions) {
    static const char *const reasons[] = {
        [HB_SCHEDULE_ENDED] = "the replayed precision schedule ends here: it is of a shorter run",
        [HB_SCHEDULE_OTHER] = "the run departs from the replayed precision schedule: the prompt, the seed, the batch "
                              "sizes and the model have to be those of the recorded run",
    };
    enum hb_schedule_step step = hb_schedule_next(m->schedule, group, n, experts, precisions);
    if (step == HB_SCHEDULE_IO) {
        char text[HB_ERROR_BYTES];
        snprintf(text, sizeof text, "the precision schedule cannot be %s: %s",
                 hb_schedule_is_replay(m->schedule) ? "read" : "written", strerror(errno));
        hb_model_fail(m, text);
    } else if (step != HB_SCHEDULE_OK) {
        hb_model_fail(m, reasons[step]);
    }
    return step == HB_SCHEDULE_OK;
}

/* Promote where there is room, or what is asked for again before as many others were as fit the cache. Not now: what is
 * evicted for it may have been chosen, and not be pinned yet. */
static void ask_for_high(struct hobbit_model *m, struct hb_key key) {
    uint64_t *asked_at = &m->asked_at[hb_model_number(m, key)];
    uint64_t before = *asked_at;
    *asked_at = ++m->asks;
    uint64_t window = (uint64_t) hb_model_arena(m, key.group, HOBBIT_HIGH).n_slots;
    bool again = before > 0 && m->asks - before <= window;
    bool wanted = again || hb_cache_has_room(m->cache, key);
    if (wanted && m->in_background + m->n_wanted < HB_MAX_BACKGROUND) {
        m->wanted[m->n_wanted++] = key;
    }
}

static struct hb_wanted wanted(const struct hobbit_model *m, int32_t group, int32_t expert, int32_t need) {
    struct hb_key high = {group, expert, HOBBIT_HIGH};
    uint16_t *in_vain = m->in_vain != NULL ? &m->in_vain[hb_model_number(m, high)] : NULL;
    return (struct hb_wanted) {.high = high, .need = need, .in_vain = in_vain,
                               .elsewhere = hb_model_is_there(m, high),
                               .low_elsewhere = hb_model_is_there(m, hb_key_in(high, HOBBIT_LOW)),
                               .has_low = m->catalog.groups[group].copies[HOBBIT_LOW].n_matrices > 0};
}

int32_t hb_model_choose(struct hobbit_model *m, int32_t group, int32_t expert, int32_t need) {
    struct hb_wanted asked = wanted(m, group, expert, need);
    bool high = m->rule.deterministic || hb_model_has(m, asked.high);
    if (need == HOBBIT_HIGH && m->low_kept && !high) {
        bool low = hb_model_has(m, hb_key_in(asked.high, HOBBIT_LOW));
        atomic_fetch_add(&m->counters.stand_ins, low);
        if (low && hb_cache_slot(m->cache, asked.high) < 0) {
            ask_for_high(m, asked.high);
        }
        return low ? HOBBIT_LOW : HOBBIT_HIGH;
    }
    int32_t precision = hb_rule_choose(&m->rule, m->cache, &asked);
    atomic_fetch_add(&m->counters.stand_ins, need == HOBBIT_HIGH && precision == HOBBIT_LOW);
    return precision;
}

int32_t hb_model_expectation(const struct hobbit_model *m, int32_t group, int32_t expert, int32_t need) {
    struct hb_wanted asked = wanted(m, group, expert, need);
    return hb_rule_expect(&m->rule, m->cache, &asked, m->low_kept);
}
