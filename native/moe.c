#include "moe.h"

#include <stdlib.h>

#include "executor.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "model.h"
#include "precision.h"
#include "predict.h"
#include "replica.h"
#include "routing.h"
#include "segment.h"
#include "shape.h"
#include "substitute.h"
#include "tracing.h"

/* Above this, ggml's table of stack depth x pairs costs more than gathering does. */
#define IN_PLACE_TABLE_ENTRIES ((int64_t) 4 << 20)

/* Of an expert within a segment. THERE: its weights are on the device, that has still to compute it; SENT: it does. */
enum { MISSING, LOADING, READY, THERE, SENT, DONE };

struct hb_moe {
    int n_threads;
    struct ggml_threadpool *threads; /* of n_threads; NULL until used. Where ggml lacks OpenMP it keeps them alive */
    ggml_abort_callback abort_callback;
    void *abort_data;
    struct hb_block work; /* ggml's */
    struct hb_routing routing;
    struct hb_replicas replicas;
    struct hb_block batch;  /* pointers to the experts of one batch */
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
    if (s->model != NULL) {
        atomic_fetch_add(&hb_model_counters(s->model)->compute_ns, hb_now_ns() - start);
    }
    return status;
}

/* The state of one segment's computation. */
struct wave {
    struct hb_moe *moe;
    const struct hb_segment *segment;
    struct hb_owners owners;
    int32_t next_missing; /* experts before it are cached, loading or done */
    int32_t loading, ready, done, skipped;
    struct hb_executor *device; /* NULL: no expert is there, or none is used */
    int32_t there, sent;
};

static struct hb_key key_of(const struct wave *w, const struct hb_routed *e) {
    return (struct hb_key) {w->segment->group, e->expert, e->precision};
}

/* Divide an expert's pairs by the sequences they are of, in [HB_RECORDS] shares: their number. */
static int32_t divide(const struct wave *w, const struct hb_routed *e, struct hb_share *shares) {
    if (w->owners.sequences == NULL) {
        shares[0] = (struct hb_share) {.n_pairs = e->n_pairs};
        return 1;
    }
    int32_t n = 0, at = 0;
    for (int32_t i = e->first; i < e->first + e->n_pairs; i++) {
        int32_t index = hb_records_index(w->owners.sequences[w->moe->routing.token[i]]);
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

static void look_up(struct wave *w) {
    struct hobbit_model *model = w->segment->model;
    struct hb_share shares[HB_RECORDS];
    int32_t n_rows = (int32_t) w->moe->routing.n_tokens;
    hb_model_begin(model, w->segment->group, n_rows, w->owners.sequences != NULL ? w->owners.most : n_rows);
    for (int32_t i = 0; i < w->moe->routing.n_experts; i++) {
        struct hb_routed *e = &w->moe->routing.experts[i];
        atomic_fetch_add(&hb_model_counters(model)->pairs[e->precision], (uint64_t) e->n_pairs);
        if (e->precision == HOBBIT_SKIP) {
            e->state = DONE;
            w->done++;
            w->skipped++;
            continue;
        }
        e->slot = w->device != NULL ? hb_model_look_up_there(model, key_of(w, e), e->n_pairs) : -1;
        if (e->slot >= 0) {
            e->state = THERE;
            w->there++;
            continue;
        }
        e->slot = hb_model_look_up(model, key_of(w, e), shares, divide(w, e, shares));
        e->state = e->slot >= 0 ? READY : MISSING;
        w->ready += e->slot >= 0;
    }
}

/* Start as many reads as there are slots to be had. */
static void fetch(struct wave *w) {
    struct hb_routing *r = &w->moe->routing;
    for (; w->next_missing < r->n_experts; w->next_missing++) {
        struct hb_routed *e = &r->experts[w->next_missing];
        if (e->state != MISSING) {
            continue;
        }
        enum hb_fetch fetched = hb_model_fetch(w->segment->model, key_of(w, e), &e->slot);
        if (fetched == HB_FETCH_WAIT) {
            return;
        }
        e->state = fetched == HB_FETCH_READY ? READY : LOADING;
        w->ready += e->state == READY;
        w->loading += e->state == LOADING;
    }
}

/* Take in what has arrived; wait for something when nothing is ready to compute. False when a read failed. */
static bool collect(struct wave *w) {
    bool good = true;
    while (w->loading > 0) {
        struct hb_arrival a = hb_model_arrival(w->segment->model, w->ready == 0);
        if (a.key.expert < 0) {
            break;
        }
        struct hb_routed *e = hb_routing_find(&w->moe->routing, a.key.expert, a.key.precision);
        w->loading--;
        e->state = a.failed ? DONE : READY;
        e->slot = a.slot;
        w->ready += !a.failed;
        good = good && !a.failed;
    }
    return good;
}

static struct hb_arena arena_of(const struct wave *w, int32_t precision) {
    return hb_model_arena(w->segment->model, w->segment->group, precision);
}

/* Ready experts of one precision for one batch, at least one of them. */
static int choose_batch(struct wave *w, const struct hb_routed **experts) {
    int64_t left = 0;
    int n = 0;
    for (int32_t i = 0; i < w->moe->routing.n_experts; i++) {
        const struct hb_routed *e = &w->moe->routing.experts[i];
        if (e->state != READY || (n > 0 && e->precision != experts[0]->precision)) {
            continue;
        }
        if (n == 0) {
            left = hb_replicas_batch_pairs(&w->moe->replicas, arena_of(w, e->precision));
        }
        if (n == 0 || e->n_pairs <= left) {
            left -= e->n_pairs;
            experts[n++] = e;
        }
    }
    return n;
}

static void release(struct wave *w, const struct hb_routed *of) {
    struct hb_routed *e = hb_routing_find(&w->moe->routing, of->expert, of->precision);
    hb_model_release(w->segment->model, key_of(w, e));
    e->state = DONE;
    w->ready--;
    w->done++;
}

static enum ggml_status compute_batch(struct wave *w) {
    struct hb_moe *moe = w->moe;
    const struct hb_routed **experts = (const struct hb_routed **) moe->batch.data;
    int n = choose_batch(w, experts);
    if (!hb_replicas_build(&moe->replicas, arena_of(w, experts[0]->precision), experts, n)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    enum ggml_status status = run(moe, w->segment, moe->replicas.nodes, moe->replicas.n_nodes);
    if (status == GGML_STATUS_SUCCESS) {
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

/* --- the device's part --- */

static void release_there(struct wave *w, struct hb_routed *e, int32_t state) {
    struct hb_tier *tier = hb_model_tier(w->segment->model);
    if (tier != NULL) {
        hb_tier_release(tier, key_of(w, e));
    }
    w->there -= e->state == THERE;
    w->sent -= e->state == SENT;
    w->done += state == DONE;
    e->state = state;
}

/* Those in one state are done, or missing after all: then they are computed here. */
static void end_there(struct wave *w, int32_t from, int32_t to) {
    for (int32_t i = 0; i < w->moe->routing.n_experts; i++) {
        if (w->moe->routing.experts[i].state == from) {
            release_there(w, &w->moe->routing.experts[i], to);
        }
    }
    w->next_missing = to == MISSING ? 0 : w->next_missing;
}

/* As many as fit a batch; those too large for any are computed here. */
static int choose_for_device(struct wave *w, const struct hb_routed **experts) {
    int64_t most = hb_executor_pairs(w->device, w->segment->group), left = most;
    int n = 0;
    for (int32_t i = 0; i < w->moe->routing.n_experts; i++) {
        struct hb_routed *e = &w->moe->routing.experts[i];
        if (e->state == THERE && e->n_pairs > most) {
            release_there(w, e, MISSING);
            w->next_missing = 0;
        } else if (e->state == THERE && e->n_pairs <= left) {
            left -= e->n_pairs;
            experts[n++] = e;
        }
    }
    return n;
}

static void send(struct wave *w) {
    const struct hb_routed **experts = (const struct hb_routed **) w->moe->batch.data;
    int n = choose_for_device(w, experts);
    if (n == 0 || !hb_executor_start(w->device, experts, n)) {
        end_there(w, THERE, MISSING);
        return;
    }
    for (int i = 0; i < n; i++) {
        hb_routing_find(&w->moe->routing, experts[i]->expert, experts[i]->precision)->state = SENT;
    }
    w->sent = n;
    w->there -= n;
}

/* The batch that was sent, if it is finished; false when the device is of no use any more. */
static bool take_back(struct wave *w, bool wait) {
    struct hobbit_model *model = w->segment->model;
    struct hb_counters *counters = hb_model_counters(model);
    char why[480];
    uint64_t start = hb_now_ns();
    enum hb_executed executed = hb_executor_finish(w->device, wait, why, sizeof why);
    atomic_fetch_add(&counters->device_wait_ns, wait ? hb_now_ns() - start : 0);
    if (executed == HB_EXECUTED_NOT_YET) {
        return true;
    }
    if (executed == HB_EXECUTED_FAILED) {
        hb_model_device_failed(model, why);
        w->sent = w->there = 0;
        return false;
    }
    if (executed == HB_EXECUTED_DONE) {
        hb_executor_scatter(w->device);
        atomic_fetch_add(&counters->device_ns, hb_executor_ns(w->device));
        end_there(w, SENT, DONE);
        return true;
    }
    atomic_fetch_add(&counters->device_declined, 1);
    end_there(w, SENT, MISSING);
    if (executed == HB_EXECUTED_UNSUPPORTED) {
        end_there(w, THERE, MISSING);
        hb_model_decline(model, w->segment->group);
    }
    return true;
}

/* Take back what the device has finished, and send it the next batch. */
static bool serve_device(struct wave *w, bool wait) {
    if (w->sent > 0 && !take_back(w, wait)) {
        return false;
    }
    if (w->sent == 0 && w->there > 0) {
        send(w);
    }
    return true;
}

/* Those that were computed here may go there, as far as it is worth it. */
static void offer(struct wave *w) {
    for (int32_t i = 0; i < w->moe->routing.n_experts && hb_model_tier(w->segment->model) != NULL; i++) {
        hb_model_offer(w->segment->model, key_of(w, &w->moe->routing.experts[i]));
    }
}

/* Whether a wait would be for something: then it is waited for. */
static bool wait_for_device(struct wave *w, bool *good) {
    if (w->ready > 0 || w->loading > 0) {
        return false;
    }
    if (w->sent > 0) {
        *good = serve_device(w, true);
        return true;
    }
    return w->there > 0 || hb_model_take_uploads(w->segment->model, true); /* which had copies pinned */
}

/* After a failure nothing may be left pinned or under way. */
static void drain(struct wave *w) {
    if (w->sent > 0) {
        (void) take_back(w, true);
    }
    end_there(w, THERE, DONE);
    if (w->loading > 0) {
        hb_model_withdraw(w->segment->model);
    }
    while (w->loading > 0) {
        w->ready = 0;
        (void) collect(w);
    }
    for (int32_t i = 0; i < w->moe->routing.n_experts; i++) {
        if (w->moe->routing.experts[i].state == READY) {
            release(w, &w->moe->routing.experts[i]);
        }
    }
}

static enum ggml_status compute_in_batches(struct wave *w) {
    struct hb_moe *moe = w->moe;
    if (!hb_block_reserve(&moe->batch, (size_t) moe->routing.n_experts * sizeof(struct hb_routed *)) ||
        !hb_replicas_keep_inputs(&moe->replicas)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    for (int32_t i = 0; i < moe->routing.n_experts && w->skipped > 0; i++) {
        if (moe->routing.experts[i].precision == HOBBIT_SKIP) {
            hb_replicas_skip(&moe->replicas, &moe->routing.experts[i]);
        }
    }
    enum ggml_status status = GGML_STATUS_SUCCESS;
    if (w->device != NULL) {
        hb_executor_begin(w->device, &moe->replicas);
    }
    while (status == GGML_STATUS_SUCCESS && w->done < moe->routing.n_experts) {
        bool good = w->device == NULL || serve_device(w, false);
        if (!good) {
            return GGML_STATUS_FAILED;
        }
        if (w->done == moe->routing.n_experts) {
            break;
        }
        fetch(w);
        if (wait_for_device(w, &good)) {
            status = good ? status : GGML_STATUS_FAILED;
        } else if (!collect(w) || w->ready == 0) {
            status = GGML_STATUS_FAILED;
        } else if (hb_model_cancelled(w->segment->model)) {
            status = GGML_STATUS_ABORTED;
        } else {
            status = compute_batch(w);
        }
    }
    return status;
}

/* All experts are cached in one precision: the segment's own nodes, with the weights pointing into the arena. */
static bool fits_in_place(const struct wave *w) {
    const struct hb_routing *r = &w->moe->routing;
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

static enum ggml_status compute_in_place(struct wave *w) {
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
    return run(moe, s, moe->replicas.nodes, moe->replicas.n_nodes);
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
    struct hb_tier *tier = hb_model_gathered(s->model)->sums == NULL ? hb_model_tier(s->model) : NULL;
    struct wave wave = {.moe = moe, .segment = s, .owners = owners,
                        .device = tier != NULL ? hb_tier_executor(tier) : NULL};
    look_up(&wave);
    fetch(&wave);
    hb_model_give_up(s->model, s->group);
    atomic_fetch_add(&hb_model_counters(s->model)->manage_ns, hb_now_ns() - start);
    hb_predict(&moe->forecast, s, &moe->routing);
    enum ggml_status status = fits_in_place(&wave) ? compute_in_place(&wave) : compute_in_batches(&wave);
    drain(&wave);
    if (wave.device != NULL && status == GGML_STATUS_SUCCESS) {
        offer(&wave);
    }
    return status;
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
        hb_model_lock(s.model);
        atomic_fetch_add(&hb_model_counters(s.model)->splits, 1);
        status = compute_segment(moe, &s);
        hb_model_unlock(s.model);
    }
    return status;
}
