#include "calibrate.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-cpu.h"

#define COPIES 3
/* Of what could not be measured. */
#define FOR_EVER_NS_PER_BYTE 1e6
/* A GB/s: until something is measured. */
#define GUESS_NS_PER_BYTE 1.0

/* What the device measures; a lost worker keeps it. */
struct there {
    struct hb_calibration of;
    struct hb_task task;
    struct hb_block memory;
    atomic_bool measured, both; /* the device's part is done; the CPU's too */
    bool good;
    double fixed, copy_ns_per_byte;
    struct hb_curve curve;
};

static void measure_there(void *context) {
    struct there *t = context;
    uint64_t start = hb_now_ns();
    for (int i = 0; i < COPIES; i++) {
        t->of.copy_once(t->of.context);
    }
    t->copy_ns_per_byte = (double) (hb_now_ns() - start) / COPIES / (double) t->of.there.expert_bytes;
    t->good = hb_site_measure(&t->of.there, &t->fixed, &t->curve);
    atomic_store(&t->measured, true);
    while (t->good && !atomic_load(&t->both) && hb_site_time(&t->of.there, 1, 1) > 0) {
    }
}

static struct hb_curve flat(double ns_per_byte) {
    struct hb_curve curve = {.n_points = 1};
    curve.points[0].pairs = 1;
    curve.points[0].ns_per_byte = ns_per_byte;
    return curve;
}

/* What computes here, on the arena. */
struct host {
    ggml_backend_t backend;
    ggml_backend_buffer_t weights, place;
};

static bool open_host(struct host *h, const struct hb_calibration *c) {
    h->backend = ggml_backend_cpu_init();
    h->weights = ggml_backend_cpu_buffer_from_ptr(c->arena.base, c->arena.slot_bytes * (uint64_t) c->arena.n_slots);
    h->place = ggml_backend_cpu_buffer_from_ptr(c->memory->data, c->memory->size);
    if (h->backend != NULL && c->n_threads > 0) {
        ggml_backend_cpu_set_n_threads(h->backend, c->n_threads);
    }
    return h->backend != NULL && h->weights != NULL && h->place != NULL;
}

static void close_host(struct host *h) {
    ggml_backend_buffer_free(h->place);
    ggml_backend_buffer_free(h->weights);
    ggml_backend_free(h->backend);
}

static struct hb_site site_of(const struct host *host, const struct hb_calibration *c) {
    struct hb_site site = c->there;
    site.backend = host->backend;
    site.place = host->place;
    site.batch_ns = site.pair_ns = 0;
    site.n_slots = c->arena.n_slots < HB_SITE_EXPERTS ? c->arena.n_slots : HB_SITE_EXPERTS;
    /* Memory that was never written would all be the same page. */
    memset(c->arena.base, 0, c->arena.slot_bytes * (uint64_t) site.n_slots);
    for (int32_t i = 0; i < site.n_stacks; i++) {
        site.stacks[i].buffer = host->weights;
        site.stacks[i].data = c->arena.base + c->copy->matrices[i]->slot_offset;
        site.stacks[i].ne[2] = site.n_slots;
        site.stacks[i].nb[2] = c->arena.slot_bytes;
        site.stacks[i].nb[3] = c->arena.slot_bytes * (uint64_t) site.n_slots;
    }
    return site;
}

/* Of the time that the device has, what is left; 0: nothing. */
static int patience_left(const struct hb_calibration *c, uint64_t start) {
    int64_t left = c->patience_ms - (int64_t) ((hb_now_ns() - start) / 1000000);
    return c->patience_ms == HB_WORKER_FOREVER ? HB_WORKER_FOREVER : left > 0 ? (int) left : 0;
}

/* Goes on until the device has been measured beside it. */
static void measure_here(struct there *t, const struct hb_site *here, uint64_t start, struct hb_costs *costs) {
    double fixed = 0;
    struct hb_curve curve;
    if (!hb_site_measure(here, &fixed, &curve)) {
        curve = flat(GUESS_NS_PER_BYTE);
    }
    while (!atomic_load(&t->measured) && !hb_worker_is_lost(t->of.worker) &&
           patience_left(&t->of, start) != 0 && hb_site_time(here, 1, 1) > 0) {
    }
    hb_costs_set(costs, HB_LANE_CPU, fixed, &curve);
}

/* Both sides at the same time. */
static bool measure(const struct hb_calibration *calibration, const struct hb_site *here, struct hb_costs *costs) {
    struct there *t = malloc(sizeof *t);
    if (t == NULL) {
        return false;
    }
    *t = (struct there) {.of = *calibration};
    t->of.there.memory = &t->memory;
    t->task = (struct hb_task) {.run = measure_there, .context = t};
    hb_worker_submit(calibration->worker, HB_COMPUTES, &t->task, false);
    uint64_t start = hb_now_ns();
    measure_here(t, here, start, costs);
    atomic_store(&t->both, true);
    if (!hb_worker_done(calibration->worker, &t->task, patience_left(calibration, start))) {
        hb_worker_lose(calibration->worker, "it does not answer");
        return false;
    }
    double read = (double) calibration->read_ns_per_mib / (1 << 20);
    struct hb_curve curves[] = {t->good ? t->curve : flat(FOR_EVER_NS_PER_BYTE), flat(t->copy_ns_per_byte),
                                flat(read > 0 ? read : GUESS_NS_PER_BYTE)};
    hb_costs_set(costs, HB_LANE_DEVICE, t->fixed, &curves[0]);
    hb_costs_set(costs, HB_LANE_UPLOAD, 0, &curves[1]);
    hb_costs_set(costs, HB_LANE_READ, 0, &curves[2]);
    hb_block_free(&t->memory);
    free(t);
    return true;
}

bool hb_calibrate(const struct hb_calibration *calibration, struct hb_costs *costs) {
    struct host host;
    struct hb_block memory = {0};
    bool good = open_host(&host, calibration);
    if (good) {
        struct hb_site here = site_of(&host, calibration);
        here.memory = &memory;
        good = measure(calibration, &here, costs);
    }
    close_host(&host);
    hb_block_free(&memory);
    return good;
}
