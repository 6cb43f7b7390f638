#include "moe.h"

#include <stdlib.h>

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "precision.h"
#include "predict.h"
#include "router.h"
#include "shape.h"
#include "substitute.h"
#include "tracing.h"
#include "wave.h"

/* Above this, ggml's table of stack depth x pairs costs more than gathering does. */
#define IN_PLACE_TABLE_ENTRIES ((int64_t) 4 << 20)

struct hb_moe {
    int n_threads;
    struct ggml_threadpool *threads; /* of n_threads; NULL until used. Where ggml lacks OpenMP it keeps them alive */
    ggml_abort_callback abort_callback;
    void *abort_data;
    struct hb_block work; /* ggml's */
    struct hb_routing routing;
    struct hb_replicas replicas;
    struct hb_block batch;  /* pointers to the experts of one batch */
    struct hb_block items;  /* what is dispatched */
    uint64_t run_ns;        /* that the latest batch took */
    struct hb_block scores;
    struct hb_block forecast;
};

struct hb_moe *hb_moe_new(void) {
    struct hb_moe *moe = calloc(1, sizeof *moe);
    if (moe != NULL) {
        moe->n_threads = GGML_DEFAULT_N_THREADS;
    }
    return moe;
}

static void drop_threads(struct hb_moe *moe) {
    if (moe->threads != NULL) {
        ggml_threadpool_free(moe->threads);
        moe->threads = NULL;
    }
}

void hb_moe_set_n_threads(struct hb_moe *moe, int n_threads) {
    int wanted = n_threads > 0 ? n_threads : GGML_DEFAULT_N_THREADS; /* as ggml_graph_plan has it */
    if (wanted != moe->n_threads) {
        drop_threads(moe);
        moe->n_threads = wanted;
    }
}

void hb_moe_set_abort_callback(struct hb_moe *moe, ggml_abort_callback callback, void *data) {
    moe->abort_callback = callback;
    moe->abort_data = data;
}

void hb_moe_free(struct hb_moe *moe) {
    if (moe != NULL) {
        hb_block_free(&moe->routing.memory);
        hb_block_free(&moe->batch);
        hb_block_free(&moe->items);
        hb_block_free(&moe->scores);
        hb_block_free(&moe->forecast);
        hb_block_free(&moe->work);
        drop_threads(moe);
        hb_replicas_free(&moe->replicas);
        free(moe);
    }
}

bool hb_moe_supports(const struct ggml_tensor *op) {
    return hb_shape_supports(op, hb_segment_is_streamed);
}

/* Not through a CPU backend object: that allocates with C++'s new, and an exception must not leave our lock held. */
static enum ggml_status run(struct hb_moe *moe, const struct hb_segment *s, struct ggml_tensor **nodes, int n_nodes) {
    struct ggml_cgraph graph = *s->graph; /* shares the use counts, which ggml's fusion asks for */
    graph.nodes = nodes;
    graph.n_nodes = n_nodes;
    uint64_t start = hb_now_ns();
    if (moe->threads == NULL) {
        struct ggml_threadpool_params params = ggml_threadpool_params_default(moe->n_threads);
        moe->threads = ggml_threadpool_new(&params);
    }
    struct ggml_cplan plan = ggml_graph_plan(&graph, moe->n_threads, moe->threads);
    if (!hb_block_reserve(&moe->work, plan.work_size)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    plan.work_data = plan.work_size > 0 ? (uint8_t *) moe->work.data : NULL;
    plan.abort_callback = moe->abort_callback;
    plan.abort_callback_data = moe->abort_data;
    enum ggml_status status = ggml_graph_compute(&graph, &plan);
    moe->run_ns = hb_now_ns() - start;
    if (s->model != NULL) {
        atomic_fetch_add(&hb_model_counters(s->model)->compute_ns, moe->run_ns);
    }
    return status;
}

/* Divide an expert's pairs by the sequences they are of, in [HB_RECORDS] shares: their number. */
static int32_t divide(const struct hb_wave *w, const struct hb_routed *e, struct hb_share *shares) {
    if (w->owners.sequences == NULL) {
        shares[0] = (struct hb_share) {.n_pairs = e->n_pairs};
        return 1;
    }
    int32_t n = 0, at = 0;
    for (int32_t i = e->first; i < e->first + e->n_pairs; i++) {
        int32_t index = hb_records_index(w->owners.sequences[w->routing->token[i]]);
        if (at >= n || shares[at].sequence != index) { /* mostly as the pair before */
            for (at = 0; at < n && shares[at].sequence != index; at++) {
            }
        }
        if (at == n) {
            shares[n++] = (struct hb_share) {.sequence = index};
        }
        shares[at].n_pairs++;
    }
    return n;
}

void hb_wave_look_up(struct hb_wave *w, struct hb_routed *e) {
    struct hb_share shares[HB_RECORDS];
    e->slot = hb_model_look_up(w->segment->model, hb_wave_key(w, e), shares, divide(w, e, shares));
    if (e->slot >= 0) {
        hb_wave_is_ready(w, e);
    } else {
        e->state = HB_MISSING;
    }
}

/* False when memory is short. */
static bool look_up(struct hb_wave *w) {
    struct hobbit_model *model = w->segment->model;
    int32_t n_rows = (int32_t) w->routing->n_tokens;
    hb_model_begin(model, w->segment->group, n_rows, w->owners.sequences != NULL ? w->owners.most : n_rows);
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        struct hb_routed *e = &w->routing->experts[i];
        atomic_fetch_add(&hb_model_counters(model)->pairs[e->precision], (uint64_t) e->n_pairs);
        e->to_device = false;
        if (e->precision == HOBBIT_SKIP) {
            e->state = HB_DONE;
            w->done++;
            w->skipped++;
        } else if (w->device == NULL) {
            hb_wave_look_up(w, e);
        }
    }
    return w->device == NULL || hb_split_look_up(w);
}

/* Start as many reads as there are slots to be had. */
static void fetch(struct hb_wave *w) {
    struct hb_routing *r = w->routing;
    for (; w->next_missing < r->n_experts; w->next_missing++) {
        struct hb_routed *e = &r->experts[w->next_missing];
        if (e->state != HB_MISSING) {
            continue;
        }
        enum hb_fetch fetched = hb_model_fetch(w->segment->model, hb_wave_key(w, e), &e->slot);
        if (fetched == HB_FETCH_WAIT) {
            return;
        }
        if (fetched == HB_FETCH_READY) {
            hb_wave_is_ready(w, e);
            continue;
        }
        e->state = HB_LOADING;
        w->loading++;
        w->read_from = w->read_bytes > 0 ? w->read_from : hb_now_ns();
        w->read_bytes += hb_model_catalog(w->segment->model)->groups[w->segment->group].copies[e->precision].expert_bytes;
    }
}

/* Take in what has arrived; wait for something when nothing is ready to compute. False when a read failed. */
static bool collect(struct hb_wave *w) {
    bool good = true;
    while (w->loading > 0) {
        bool waits = w->ready == 0;
        struct hb_arrival a = hb_model_arrival(w->segment->model, waits);
        if (a.key.expert < 0) {
            break;
        }
        struct hb_routed *e = hb_routing_find(w->routing, a.key.expert, a.key.precision);
        w->loading--;
        e->slot = a.slot;
        if (a.failed) {
            e->state = HB_DONE;
            good = false;
            continue;
        }
        hb_wave_is_ready(w, e);
        if (waits && w->loading == 0 && w->device != NULL) {
            hb_split_has_read(w);
        }
    }
    return good;
}

static struct hb_arena arena_of(const struct hb_wave *w, int32_t precision) {
    return hb_model_arena(w->segment->model, w->segment->group, precision);
}

/* Ready experts of one precision for one batch, at least one of them. */
static int choose_batch(struct hb_wave *w, const struct hb_routed **experts) {
    int64_t left = 0;
    int n = 0;
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        const struct hb_routed *e = &w->routing->experts[i];
        if (e->state != HB_READY || e->to_device || (n > 0 && e->precision != experts[0]->precision)) {
            continue;
        }
        if (n == 0) {
            left = hb_replicas_batch_pairs(w->replicas, arena_of(w, e->precision));
        }
        if (n == 0 || e->n_pairs <= left) {
            left -= e->n_pairs;
            experts[n++] = e;
        }
    }
    return n;
}

static void release(struct hb_wave *w, const struct hb_routed *of) {
    struct hb_routed *e = hb_routing_find(w->routing, of->expert, of->precision);
    hb_model_release(w->segment->model, hb_wave_key(w, e));
    e->state = HB_DONE;
    w->ready--;
    w->done++;
}

static enum ggml_status compute_batch(struct hb_wave *w) {
    struct hb_moe *moe = w->moe;
    const struct hb_routed **experts = (const struct hb_routed **) moe->batch.data;
    int n = choose_batch(w, experts);
    if (!hb_replicas_build(&moe->replicas, arena_of(w, experts[0]->precision), experts, n)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    enum ggml_status status = run(moe, w->segment, moe->replicas.nodes, moe->replicas.n_nodes);
    if (status == GGML_STATUS_SUCCESS) {
        if (w->device != NULL) {
            hb_split_computed_here(w, experts, n, moe->run_ns);
        }
        hb_replicas_scatter(&moe->replicas, experts, n);
        const struct hb_gathered *into = hb_model_gathered(w->segment->model);
        if (into->sums != NULL) {
            hb_replicas_collect(&moe->replicas, into, experts, n);
        }
    }
    for (int i = 0; i < n; i++) {
        release(w, experts[i]);
    }
    return status;
}

/* After a failure nothing may be left pinned or under way. */
static void drain(struct hb_wave *w) {
    if (w->loading > 0) {
        hb_model_withdraw(w->segment->model);
    }
    while (w->loading > 0) {
        w->ready = 0;
        (void) collect(w);
    }
    if (w->device != NULL) {
        hb_split_drain(w);
    }
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        if (w->routing->experts[i].state == HB_READY) {
            release(w, &w->routing->experts[i]);
        }
    }
}

/* Take a step towards the end: compute what can be, or else wait. */
static enum ggml_status advance(struct hb_wave *w) {
    if (w->device != NULL && !hb_split_serve(w)) {
        return GGML_STATUS_FAILED;
    }
    if (w->done == w->routing->n_experts) {
        return GGML_STATUS_SUCCESS;
    }
    fetch(w);
    if (!collect(w)) {
        return GGML_STATUS_FAILED;
    }
    if (hb_model_cancelled(w->segment->model)) {
        return GGML_STATUS_ABORTED;
    }
    if (w->ready > 0) {
        return compute_batch(w);
    }
    return w->device != NULL && hb_split_wait(w) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

/* Before the first batch, here or on the device. False when memory is short. */
static bool prepare_batches(struct hb_wave *w) {
    struct hb_moe *moe = w->moe;
    if (w->in_batches) {
        return true;
    }
    w->in_batches = hb_block_reserve(&moe->batch, (size_t) moe->routing.n_experts * sizeof(struct hb_routed *)) &&
                    hb_replicas_keep_inputs(&moe->replicas);
    if (w->in_batches && w->device != NULL) {
        hb_executor_begin(w->device, &moe->replicas);
    }
    return w->in_batches;
}

static enum ggml_status compute_in_batches(struct hb_wave *w) {
    struct hb_moe *moe = w->moe;
    if (!prepare_batches(w)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    for (int32_t i = 0; i < moe->routing.n_experts && w->skipped > 0; i++) {
        if (moe->routing.experts[i].precision == HOBBIT_SKIP) {
            hb_replicas_skip(&moe->replicas, &moe->routing.experts[i]);
        }
    }
    enum ggml_status status = GGML_STATUS_SUCCESS;
    while (status == GGML_STATUS_SUCCESS && w->done < moe->routing.n_experts) {
        status = advance(w);
    }
    return status;
}

/* All experts are cached in one precision: the segment's own nodes, with the weights pointing into the arena. */
static bool fits_in_place(const struct hb_wave *w) {
    const struct hb_routing *r = w->routing;
    if (w->ready < r->n_experts || hb_model_gathered(w->segment->model)->sums != NULL) {
        return false;
    }
    int32_t precision = r->experts[0].precision;
    for (int32_t i = 1; i < r->n_experts; i++) {
        if (r->experts[i].precision != precision) {
            return false;
        }
    }
    bool at_home = precision == HOBBIT_HIGH && hb_model_home(w->segment->model, w->segment->group) >= 0;
    return at_home || arena_of(w, precision).n_slots * r->n_pairs <= IN_PLACE_TABLE_ENTRIES;
}

/* The CPU computed all of them. */
static void count_in_place(struct hb_wave *w) {
    struct hb_moe *moe = w->moe;
    if (hb_block_reserve(&moe->batch, (size_t) moe->routing.n_experts * sizeof(struct hb_routed *))) {
        const struct hb_routed **experts = (const struct hb_routed **) moe->batch.data;
        for (int32_t i = 0; i < moe->routing.n_experts; i++) {
            experts[i] = &moe->routing.experts[i];
        }
        hb_split_computed_here(w, experts, moe->routing.n_experts, moe->run_ns);
    }
}

static enum ggml_status compute_in_place(struct hb_wave *w) {
    struct hb_moe *moe = w->moe;
    const struct hb_segment *s = w->segment;
    int32_t precision = moe->routing.experts[0].precision;
    struct hb_arena arena = arena_of(w, precision);
    int32_t home = precision == HOBBIT_HIGH ? hb_model_home(s->model, s->group) : -1;
    int32_t n_expert = hb_model_catalog(s->model)->groups[s->group].n_expert;
    bool at_home = home >= 0;
    if (!hb_replicas_in_place(&moe->replicas, arena, at_home, at_home ? home : 0,
                              at_home ? n_expert : arena.n_slots)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    enum ggml_status status = run(moe, s, moe->replicas.nodes, moe->replicas.n_nodes);
    if (w->device != NULL && status == GGML_STATUS_SUCCESS) {
        count_in_place(w);
    }
    return status;
}

/* The device that is to compute with us, or NULL. What is gathered is gathered here. */
static struct hb_executor *device_for(struct hobbit_model *model) {
    struct hb_tier *tier = hb_model_gathered(model)->sums == NULL ? hb_model_tier(model) : NULL;
    struct hb_executor *device = tier != NULL ? hb_tier_executor(tier) : NULL;
    return device != NULL && hb_executor_dispatcher(device)->mode != HOBBIT_DISPATCH_CPU ? device : NULL;
}

/* What is on the device already is computed there while we think about the layers to come. */
static void begin_there(struct hb_wave *w) {
    if (w->device != NULL && w->there > 0 && prepare_batches(w)) {
        (void) hb_split_serve(w); /* if it fails, it does again */
    }
}

static enum ggml_status compute_segment(struct hb_moe *moe, const struct hb_segment *s) {
    int32_t n_expert = hb_model_catalog(s->model)->groups[s->group].n_expert;
    if (!hb_model_ready(s->model)) {
        hb_model_fail(s->model, "the model has no expert cache yet");
        return GGML_STATUS_FAILED;
    }
    if (!hb_substitute(&moe->scores, s)) {
        return GGML_STATUS_FAILED;
    }
    if (!hb_routing_read(&moe->routing, s->ids, n_expert)) {
        hb_model_fail(s->model, "the router chose an expert that does not exist, or memory is short");
        return GGML_STATUS_FAILED;
    }
    struct hb_owners owners = hb_model_owners(s->model, s->group, moe->routing.n_tokens);
    if (!hb_tracing_write(&moe->scores, s, &owners)) {
        return GGML_STATUS_FAILED;
    }
    if (!hb_replicas_begin(&moe->replicas, s, &moe->routing)) {
        hb_model_fail(s->model, "an expert layer of this model has more inputs than hobbit can handle");
        return GGML_STATUS_FAILED;
    }
    uint64_t start = hb_now_ns();
    hb_model_settle(s->model);
    if (!hb_precision_choose(&moe->scores, s, &moe->routing, &moe->replicas.token_scale)) {
        return GGML_STATUS_FAILED;
    }
    struct hb_wave wave = {.moe = moe, .segment = s, .routing = &moe->routing, .replicas = &moe->replicas,
                           .owners = owners, .batch = &moe->batch, .items = &moe->items, .begun = start,
                           .device = device_for(s->model)};
    if (!look_up(&wave)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    fetch(&wave);
    hb_model_give_up(s->model, s->group);
    atomic_fetch_add(&hb_model_counters(s->model)->manage_ns, hb_now_ns() - start);
    begin_there(&wave);
    hb_predict(&moe->forecast, s, &moe->routing);
    enum ggml_status status = fits_in_place(&wave) ? compute_in_place(&wave) : compute_in_batches(&wave);
    drain(&wave);
    if (wave.device != NULL && status == GGML_STATUS_SUCCESS) {
        hb_split_end(&wave);
    }
    return status;
}

static bool wants_router(const struct hb_segment *s) {
    hb_model_lock(s->model);
    bool wants = hb_predict_wants_router(s);
    hb_model_unlock(s->model);
    return wants;
}

enum ggml_status hb_moe_compute(struct hb_moe *moe, const struct ggml_cgraph *graph) {
    enum ggml_status status = GGML_STATUS_SUCCESS;
    for (int begin = 0; status == GGML_STATUS_SUCCESS && begin < graph->n_nodes;) {
        struct hb_segment s = hb_segment_next(graph, begin);
        begin += s.n_nodes;
        if (s.model == NULL) {
            status = run(moe, &s, s.nodes, s.n_nodes);
            continue;
        }
        struct hb_seen *router = hb_router_to_fetch(&s);
        if (router != NULL && wants_router(&s)) {
            hb_router_fetch(router);
        }
        hb_model_lock(s.model);
        atomic_fetch_add(&hb_model_counters(s.model)->splits, 1);
        status = compute_segment(moe, &s);
        hb_model_unlock(s.model);
    }
    return status;
}
