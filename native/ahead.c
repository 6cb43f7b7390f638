/* What is expected of the layers to come: copies that are cached are protected, the others are read ahead. */
#include <stdlib.h>

#include "model_impl.h"

/* Of a pool's slots at most this share is protected or being read ahead, so that what is needed now finds room. */
#define SHARE 4
/* Tokens that a predictor has to learn from before it is compared with none. */
#define LEARNING 32

static struct hb_load *load_of(struct hobbit_model *m, struct hb_key key) {
    int32_t slot = hb_cache_slot(m->cache, key);
    struct hb_load *load = slot >= 0 ? &m->pools[m->pool_of_group[key.group]].banks[key.precision].loads[slot] : NULL;
    return load != NULL && load->under_way && load->background ? load : NULL;
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
        if (key.precision == HOBBIT_SKIP || is_expected(m, key) || hb_model_is_there(m, key)) {
            continue;
        }
        all_cached = all_cached && hb_cache_peek(m->cache, key) >= 0;
        if (odds[i] >= m->prediction.least_odds) {
            hb_model_offer(m, key); /* to a device, which has it before that layer then */
        }
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

static bool has_gate(const struct hobbit_prediction *p) {
    return p->kind == HOBBIT_PREDICT_GATE || p->kind == HOBBIT_PREDICT_AUTO;
}

static bool has_maps(const struct hobbit_prediction *p) {
    return p->kind == HOBBIT_PREDICT_MAP || (p->kind == HOBBIT_PREDICT_AUTO && p->map_capacity != 0);
}

uint64_t hobbit_prediction_bytes(const struct hobbit_prediction *p, int32_t n_groups, const int32_t *n_experts) {
    uint64_t bytes = 0;
    if (has_gate(p)) {
        bytes += hb_forecast_bytes(n_groups, p->n_embd, hb_most_experts(n_groups, n_experts), p->depth);
    }
    if (has_maps(p)) {
        bytes += hb_map_predictor_bytes(n_groups, n_experts, p->n_embd, p->map_capacity, p->depth);
    }
    return bytes;
}

static bool is_sensible(const struct hobbit_prediction *p, int32_t n_groups, const int32_t *n_experts) {
    return p->kind >= HOBBIT_PREDICT_NONE && p->kind <= HOBBIT_PREDICT_AUTO &&
           !(p->kind == HOBBIT_PREDICT_AUTO && p->always) && p->depth >= 1 &&
           p->depth <= HB_FORECAST_DEPTH && p->n_embd > 0 && p->least_odds >= 0 &&
           (!has_maps(p) || hb_map_predictor_bytes(n_groups, n_experts, p->n_embd, p->map_capacity, p->depth) > 0);
}

int32_t hb_model_predictor(const struct hobbit_model *m, int32_t *depth) {
    *depth = m->prediction.depth;
    return m->trial.n_arms > 1 ? kind_of_arm(m, m->trial.arm) : m->prediction.kind;
}

static void tell_predictor(struct hobbit_model *m) {
    atomic_store(&m->counters.predictor, (uint64_t) hb_model_predictor(m, &(int32_t) {0}));
}

/* What the predictors need, in place of what there is. */
static enum hobbit_status replace(struct hobbit_model *m, const struct hobbit_prediction *p, const int32_t *n_experts) {
    int32_t n_groups = m->catalog.n_groups;
    struct hb_forecast *forecast = NULL;
    struct hb_map_predictor *maps = NULL;
    if (has_gate(p)) {
        forecast = hb_forecast_new(n_groups, p->n_embd, hb_most_experts(n_groups, n_experts), p->depth);
    }
    if (has_maps(p)) {
        maps = hb_map_predictor_new(n_groups, n_experts, p->n_embd, p->map_capacity, p->depth);
    }
    if ((has_gate(p) && forecast == NULL) || (has_maps(p) && maps == NULL)) {
        hb_forecast_free(forecast);
        hb_map_predictor_free(maps);
        return HOBBIT_NOMEM;
    }
    hb_model_lock(m);
    hb_forecast_free(m->forecast);
    hb_map_predictor_free(m->map_predictor);
    m->forecast = forecast;
    m->map_predictor = maps;
    m->prediction = *p;
    bool trial = p->kind != HOBBIT_PREDICT_NONE && !p->always;
    hb_trial_start(&m->trial, !trial ? 1 : has_gate(p) && has_maps(p) ? HB_TRIAL_ARMS : 2, LEARNING);
    tell_predictor(m);
    hb_model_unlock(m);
    return HOBBIT_OK;
}

int32_t hobbit_model_set_prediction(struct hobbit_model *m, const struct hobbit_prediction *prediction, char *err,
                                    size_t err_len) {
    int32_t *n_experts = malloc((size_t) m->catalog.n_groups * sizeof *n_experts);
    enum hobbit_status status = HOBBIT_NOMEM;
    for (int32_t g = 0; n_experts != NULL && g < m->catalog.n_groups; g++) {
        n_experts[g] = m->catalog.groups[g].n_expert;
    }
    if (n_experts != NULL) {
        bool good = is_sensible(prediction, m->catalog.n_groups, n_experts);
        status = good ? replace(m, prediction, n_experts) : HOBBIT_ARG;
    }
    free(n_experts);
    snprintf(err, err_len, "%s", status == HOBBIT_OK    ? ""
                                 : status == HOBBIT_ARG ? "the prediction has a number that makes no sense"
                                                        : "out of memory");
    return status;
}

void hb_model_note_pass(struct hobbit_model *m, int32_t n_tokens) {
    uint64_t now = hb_now_ns();
    if (m->pass.single && n_tokens == 1) {
        hb_trial_took(&m->trial, now - m->pass.start);
        tell_predictor(m);
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

struct hb_map_predictor *hb_model_map_predictor(struct hobbit_model *m) {
    return m->map_predictor;
}
