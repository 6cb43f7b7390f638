/* What is expected of the layers to come: copies that are cached are protected, the others are read ahead. */
#include "model_impl.h"

/* Of a pool's slots at most this share is protected or being read ahead, so that what is needed now finds room. */
#define SHARE 4

static struct hb_load *load_of(struct hobbit_model *m, struct hb_key key) {
    int32_t slot = hb_cache_slot(m->cache, key);
    struct hb_load *load = slot >= 0 ? &m->pools[m->pool_of_group[key.group]].banks[key.precision].loads[slot] : NULL;
    bool under_way = load != NULL && hb_cache_peek(m->cache, key) < 0 && load->background &&
                     load->key.group == key.group && load->key.expert == key.expert;
    return under_way ? load : NULL;
}

static bool is_expected(const struct hobbit_model *m, struct hb_key key) {
    for (int32_t i = 0; i < m->n_expected; i++) {
        const struct hb_key *other = &m->expected[i].key;
        if (other->group == key.group && other->expert == key.expert && other->precision == key.precision) {
            return true;
        }
    }
    return false;
}

/* False when nothing more is to be expected: no room to remember it, or for too much of the cache. */
static bool expect(struct hobbit_model *m, struct hb_key key, bool read) {
    int32_t most = hb_model_arena(m, key.group, key.precision).n_slots / SHARE;
    if (m->n_expected == HB_MOST_EXPECTED || m->n_expected >= most) {
        return false;
    }
    struct hb_expected *e = &m->expected[m->n_expected];
    *e = (struct hb_expected) {.key = key};
    if (hb_cache_peek(m->cache, key) >= 0) {
        hb_cache_pin(m->cache, key, true);
        e->pinned = true;
    } else if (hb_cache_slot(m->cache, key) < 0) {
        if (!read) {
            return true;
        }
        if (!hb_model_start_read(m, key, true)) {
            return false;
        }
        load_of(m, key)->ahead = true;
        atomic_fetch_add(&m->counters.ahead, 1);
    }
    m->n_expected++;
    return true;
}

bool hb_model_expect(struct hobbit_model *m, int32_t group, int32_t n, const int32_t *experts,
                     const int32_t *precisions, const float *odds) {
    bool all_cached = true;
    for (int32_t i = 0; i < n; i++) {
        struct hb_key key = {group, experts[i], precisions[i]};
        if (key.precision == HOBBIT_SKIP || is_expected(m, key)) {
            continue;
        }
        all_cached = all_cached && hb_cache_peek(m->cache, key) >= 0;
        if (!expect(m, key, odds[i] >= m->prediction.least_odds)) {
            return false;
        }
    }
    return all_cached;
}

void hb_model_unprotect(struct hobbit_model *m, int32_t group) {
    for (int32_t i = 0; i < m->n_expected; i++) {
        if (m->expected[i].pinned && (group < 0 || m->expected[i].key.group == group)) {
            hb_cache_pin(m->cache, m->expected[i].key, false);
            m->expected[i].pinned = false;
        }
    }
}

void hb_model_give_up(struct hobbit_model *m, int32_t group) {
    int32_t kept = 0;
    hb_model_unprotect(m, group);
    for (int32_t i = 0; i < m->n_expected; i++) {
        struct hb_expected e = m->expected[i];
        if (group >= 0 && e.key.group != group) {
            m->expected[kept++] = e;
            continue;
        }
        struct hb_load *load = load_of(m, e.key);
        if (load != NULL && load->ahead) {
            hb_reader_cancel(m->reader, &load->job);
        }
    }
    m->n_expected = kept;
}

static int32_t kind_of_arm(const struct hobbit_model *m, int32_t arm) {
    static const int32_t all[HB_TRIAL_ARMS] = {HOBBIT_PREDICT_NONE, HOBBIT_PREDICT_GATE, HOBBIT_PREDICT_MAP};
    return m->prediction.kind == HOBBIT_PREDICT_AUTO ? all[arm] : arm == 0 ? HOBBIT_PREDICT_NONE : m->prediction.kind;
}

static int32_t most_experts(const struct hobbit_model *m) {
    int32_t most = 0;
    for (int32_t g = 0; g < m->catalog.n_groups; g++) {
        most = m->catalog.groups[g].n_expert > most ? m->catalog.groups[g].n_expert : most;
    }
    return most;
}

uint64_t hobbit_prediction_bytes(const struct hobbit_prediction *p, int32_t n_groups, int32_t n_expert) {
    bool gate = p->kind == HOBBIT_PREDICT_GATE || p->kind == HOBBIT_PREDICT_AUTO;
    return gate ? hb_forecast_bytes(n_groups, p->n_embd, n_expert, p->depth) : 0;
}

int32_t hobbit_model_set_prediction(struct hobbit_model *m, const struct hobbit_prediction *prediction, char *err,
                                    size_t err_len) {
    int32_t kind = prediction->kind;
    bool good = kind >= HOBBIT_PREDICT_NONE && kind <= HOBBIT_PREDICT_AUTO && prediction->depth >= 1 &&
                prediction->depth <= HB_FORECAST_DEPTH && prediction->n_embd > 0 && prediction->least_odds >= 0;
    if (!good) {
        snprintf(err, err_len, "the prediction has a number that makes no sense");
        return HOBBIT_ARG;
    }
    struct hb_forecast *forecast = NULL;
    if (kind == HOBBIT_PREDICT_GATE || kind == HOBBIT_PREDICT_AUTO) {
        forecast = hb_forecast_new(m->catalog.n_groups, prediction->n_embd, most_experts(m), prediction->depth);
        if (forecast == NULL) {
            snprintf(err, err_len, "out of memory");
            return HOBBIT_NOMEM;
        }
    }
    hb_model_lock(m);
    hb_forecast_free(m->forecast);
    m->forecast = forecast;
    m->prediction = *prediction;
    bool trial = kind != HOBBIT_PREDICT_NONE && !prediction->always;
    hb_trial_start(&m->trial, !trial ? 1 : kind == HOBBIT_PREDICT_AUTO ? HB_TRIAL_ARMS : 2);
    hb_model_unlock(m);
    return HOBBIT_OK;
}

int32_t hb_model_predictor(const struct hobbit_model *m, int32_t *depth) {
    *depth = m->prediction.depth;
    return m->trial.n_arms > 1 ? kind_of_arm(m, m->trial.arm) : m->prediction.kind;
}

void hb_model_note_pass(struct hobbit_model *m, int32_t n_tokens) {
    uint64_t now = hb_now_ns();
    if (m->pass.single && n_tokens == 1) {
        hb_trial_took(&m->trial, now - m->pass.start);
    }
    m->pass.start = now;
    m->pass.single = n_tokens == 1;
}

int32_t hb_model_last_rows(const struct hobbit_model *m) {
    return m->pass.last_rows;
}

struct hb_router *hb_model_routers(struct hobbit_model *m) {
    return m->routers;
}

struct hb_forecast *hb_model_forecast(struct hobbit_model *m) {
    return m->forecast;
}
