/* Description: experts computed on a device while the CPU computes others equal, bit for bit, those of the CPU, whatever
 * is where. The device is ggml's CPU, through all that a device with memory of its own would go through; with a server
 * in another process tests/test_devices.py has one that really has. */
#include <unistd.h>

#include "costs.h"
#include "executor.h"
#include "faults.h"
#include "ggml-backend-impl.h"
#include "guard.h"
#include "on_device.h"

/* Who computes what, in the tests to come; and what reading is said to take. */
static int32_t dispatch = HOBBIT_DISPATCH_SPLIT;
static uint64_t read_ns_per_mib = 0;

static int32_t use_device(struct arm *arm, struct hobbit_device *device, int32_t n_slots, uint64_t batch_bytes,
                          uint64_t token_bytes, char *err, size_t err_len) {
    const struct hobbit_device_pool pool = {{whole_expert(HOBBIT_HIGH)}, {n_slots}};
    const int32_t pool_of_group[LAYERS] = {0};
    const struct hobbit_device_plan plan = {&pool, pool_of_group, 1, batch_bytes, token_bytes,
                                            .dispatch = dispatch, .n_threads = 1,
                                            .read_ns_per_mib = read_ns_per_mib};
    return hobbit_model_use_device(arm->model, device, &plan, err, err_len);
}

struct split {
    int32_t host_slots, device_slots;
    uint64_t batch_bytes, token_bytes;
};

static void compare(struct split split) {
    struct arm *reference = open_arm(0, 0), *arm = open_arm(split.host_slots, HOBBIT_IO_AUTO);
    struct hobbit_device *device = open_device();
    struct input in;
    char err[256];
    uint64_t seed = 71;
    CHECK_EQUAL(use_device(arm, device, split.device_slots, split.batch_bytes, split.token_bytes, err, sizeof err),
                HOBBIT_OK);
    for (int i = 0; i < 12; i++) {
        random_input(&in, i % 4 == 0 ? MAX_TOKENS - i : 1 + i % 3, &seed);
        check_same(arm, reference, &in);
        if (i % 2 == 0) {
            settle(arm);
        }
    }
    struct hobbit_stats stats = stats_of(arm);
    bool used = split.device_slots > 0 && split.batch_bytes > 100000;
    CHECK((stats.device_pairs > 0) == used || dispatch == HOBBIT_DISPATCH_AUTO);
    CHECK((stats.device_hits > 0) == used || dispatch != HOBBIT_DISPATCH_SPLIT);
    CHECK((stats.device_brought > 0) == used || dispatch != HOBBIT_DISPATCH_DEVICE);
    CHECK((stats.device_bytes > 0) == (split.device_slots > 0) || dispatch == HOBBIT_DISPATCH_AUTO);
    CHECK(stats.device_bytes % whole_expert(HOBBIT_HIGH) == 0);
    CHECK_EQUAL(stats.device_declined, 0);
    close_arm(arm);
    hobbit_device_close(device);
    close_arm(reference);
}

static const uint64_t much = (uint64_t) 1 << 30, batch = 4 << 20;

static void results_do_not_depend_on_what_is_where(void) {
    for (int32_t host = 1; host <= LAYERS * EXPERTS; host += 5) {
        for (int32_t device = 0; device <= LAYERS * EXPERTS; device += 4) {
            compare((struct split) {host, device, batch, much});
        }
    }
    compare((struct split) {LAYERS * EXPERTS, 4, batch, whole_expert(HOBBIT_HIGH) / 3});
}

/* The batch's memory holds a few pairs only: several batches a layer, and experts with more pairs stay here. */
static void small_batches_are_enough(void) {
    compare((struct split) {3, LAYERS * EXPERTS, 160000, much});
}

/* With copies made for the layer that is computed, also where a single slot is all there is, here or there. */
static void results_do_not_depend_on_who_computes(void) {
    for (dispatch = HOBBIT_DISPATCH_AUTO; dispatch <= HOBBIT_DISPATCH_DEVICE; dispatch++) {
        for (int32_t host = 1; host <= LAYERS * EXPERTS; host += 5) {
            for (int32_t device = 1; device <= LAYERS * EXPERTS; device += 5) {
                compare((struct split) {host, device, batch, device % 2 == 0 ? much : 0});
            }
        }
        compare((struct split) {3, LAYERS * EXPERTS, 160000, much});
    }
    dispatch = HOBBIT_DISPATCH_SPLIT;
}

/* A device that is slower than the CPU is still faster than the disk: what is only there stays there. */
static void what_is_only_there_would_have_to_be_read(void) {
    struct arm *arm = open_arm(LAYERS * EXPERTS, HOBBIT_IO_AUTO);
    struct hobbit_device *device = open_device();
    const struct hobbit_device_delays delays = {.batch_ns = 3000000};
    struct input in;
    char err[256];
    uint64_t seed = 83;
    static float out[EMBD * MAX_TOKENS];
    hobbit_device_delay(device, &delays);
    read_ns_per_mib = 1000000000;
    CHECK_EQUAL(use_device(arm, device, LAYERS * EXPERTS, batch, much, err, sizeof err), HOBBIT_OK);
    read_ns_per_mib = 0;
    for (int i = 0; i < 12; i++) {
        random_input(&in, 3, &seed);
        CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_SUCCESS);
        settle(arm);
    }
    hb_model_lock(arm->model);
    hb_cache_forget(arm->model->cache);
    hb_model_unlock(arm->model);
    CHECK_EQUAL(hobbit_model_set_dispatch(arm->model, HOBBIT_DISPATCH_AUTO), HOBBIT_OK);
    uint64_t misses = stats_of(arm).misses;
    for (int i = 0; i < 12; i++) {
        random_input(&in, 1, &seed);
        CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_SUCCESS);
    }
    CHECK_EQUAL(stats_of(arm).misses, misses);
    close_arm(arm);
    hobbit_device_close(device);
}

/* Not one pair fits: all is computed here although it is there. */
static void a_place_too_small_for_anything_is_left_alone(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_arm(3, HOBBIT_IO_AUTO);
    struct hobbit_device *device = open_device();
    struct input in;
    char err[256];
    uint64_t seed = 73;
    CHECK_EQUAL(use_device(arm, device, LAYERS * EXPERTS, 4096, much, err, sizeof err), HOBBIT_OK);
    for (int i = 0; i < 6; i++) {
        random_input(&in, 4, &seed);
        check_same(arm, reference, &in);
    }
    CHECK_EQUAL(stats_of(arm).device_ns, 0);
    close_arm(arm);
    hobbit_device_close(device);
    close_arm(reference);
}

static void once_there_an_expert_is_not_read_again(void) {
    struct arm *arm = open_arm(MAX_USED, HOBBIT_IO_AUTO), *reference = open_arm(0, 0);
    struct hobbit_device *device = open_device();
    struct input in;
    char err[256];
    uint64_t seed = 77;
    CHECK_EQUAL(use_device(arm, device, LAYERS * EXPERTS, batch, much, err, sizeof err), HOBBIT_OK);
    for (int i = 0; i < 40; i++) {
        random_input(&in, 2, &seed);
        check_same(arm, reference, &in);
        settle(arm);
    }
    uint64_t bytes = stats_of(arm).read_bytes, hits = stats_of(arm).device_hits;
    random_input(&in, MAX_TOKENS, &seed);
    check_same(arm, reference, &in);
    CHECK_EQUAL(stats_of(arm).read_bytes, bytes);
    CHECK(stats_of(arm).device_hits >= hits + LAYERS * 2);
    CHECK_EQUAL(stats_of(arm).device_bytes, LAYERS * EXPERTS * whole_expert(HOBBIT_HIGH));
    hobbit_model_forget(arm->model);
    check_same(arm, reference, &in);
    CHECK(stats_of(arm).read_bytes > bytes);
    allocate(arm->model, (struct room) {2, 0}); /* while copies are under way */
    check_same(arm, reference, &in);
    close_arm(arm);
    hobbit_device_close(device);
    close_arm(reference);
}

/* What a layer to come will probably use goes there before it is used. */
static void what_is_expected_goes_there_ahead(void) {
    struct arm *arm = open_arm(LAYERS * EXPERTS, HOBBIT_IO_AUTO);
    struct hobbit_device *device = open_device();
    struct input in;
    char err[256];
    uint64_t seed = 79;
    static float out[EMBD * MAX_TOKENS];
    CHECK_EQUAL(use_device(arm, device, 2 * EXPERTS, batch, much, err, sizeof err), HOBBIT_OK);
    random_input(&in, MAX_TOKENS, &seed);
    CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_SUCCESS);
    settle(arm);
    hb_model_lock(arm->model);
    hb_tier_forget(hb_model_tier(arm->model));
    const int32_t expert[] = {in.table[0]}, precision[] = {HOBBIT_HIGH};
    const float odds[] = {1};
    const struct hb_key key = {1, expert[0], HOBBIT_HIGH};
    CHECK(!hb_model_is_there(arm->model, key));
    CHECK(hb_model_expect(arm->model, 1, 1, expert, precision, odds)); /* it is cached here */
    hb_model_end_uploads(arm->model);
    CHECK(hb_model_is_there(arm->model, key));
    hb_model_give_up(arm->model, -1);
    hb_model_unlock(arm->model);
    close_arm(arm);
    hobbit_device_close(device);
}

struct computation {
    struct arm *arm;
    const struct input *in;
    float out[EMBD * MAX_TOKENS];
};

static void *compute_in_a_thread(void *argument) {
    struct computation *c = argument;
    CHECK_EQUAL(compute(c->arm, c->in, c->out), GGML_STATUS_SUCCESS);
    return NULL;
}

/* The device is kept from beginning, and the CPU's part is computed all the same. */
static void the_cpu_does_not_wait_for_the_device(void) {
    struct arm *arm = open_arm(LAYERS * EXPERTS, HOBBIT_IO_AUTO), *reference = open_arm(0, 0);
    struct hobbit_device *device = open_device();
    struct computation c = {.arm = arm};
    struct input in, other;
    char err[256];
    uint64_t seed = 83;
    random_input(&in, 1, &seed);
    CHECK_EQUAL(use_device(arm, device, LAYERS * EXPERTS, batch, much, err, sizeof err), HOBBIT_OK);
    check_same(arm, reference, &in);
    settle(arm); /* its experts are there */
    other = in;
    other.table[0] = in.table[EXPERTS - 1]; /* and one of these is not */
    struct hb_task waits;
    hold(device, HB_COMPUTES, &waits);
    uint64_t computed = stats_of(arm).compute_ns, hits = stats_of(arm).device_hits, there = stats_of(arm).device_ns;
    c.in = &other;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, compute_in_a_thread, &c) == 0);
    while (stats_of(arm).compute_ns == computed) {
        usleep(100);
    }
    CHECK(stats_of(arm).device_hits > hits && stats_of(arm).device_ns == there);
    pthread_mutex_unlock(&gate);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(stats_of(arm).device_ns > there);
    check_same(arm, reference, &other);
    close_arm(arm);
    hobbit_device_close(device);
    close_arm(reference);
}

/* A copy is kept from beginning, and what is there is computed all the same; with one thread for both it is not. */
static void the_device_computes_while_it_copies(bool turns) {
    struct arm *arm = open_arm(LAYERS * EXPERTS, HOBBIT_IO_AUTO), *reference = open_arm(0, 0);
    struct hobbit_device *device = open_device();
    struct computation c = {.arm = arm};
    struct input in, other;
    char err[256];
    uint64_t seed = 83;
    hobbit_device_delay(device, &(struct hobbit_device_delays) {.turns = turns});
    random_input(&in, 1, &seed);
    CHECK_EQUAL(use_device(arm, device, LAYERS * EXPERTS, batch, much, err, sizeof err), HOBBIT_OK);
    check_same(arm, reference, &in);
    settle(arm);
    other = in;
    other.table[0] = in.table[EXPERTS - 1]; /* in the host's memory, and not there */
    CHECK_EQUAL(hobbit_model_set_dispatch(arm->model, HOBBIT_DISPATCH_CPU), HOBBIT_OK);
    check_same(arm, reference, &other);
    CHECK_EQUAL(hobbit_model_set_dispatch(arm->model, HOBBIT_DISPATCH_DEVICE), HOBBIT_OK);
    struct hb_curve slow = {1, {{1, 1e6}}}; /* so that a batch more is worth it */
    struct hb_curve slower = {2, {{1, 1}, {101, 1e9}}};
    hb_costs_set(hb_executor_costs(device->executor), HB_LANE_UPLOAD, 0, &slow);
    hb_costs_set(hb_executor_costs(device->executor), HB_LANE_CPU, 0, &slower);
    struct hb_task waits;
    hold(device, turns ? HB_COMPUTES : HB_COPIES, &waits);
    uint64_t there = stats_of(arm).device_ns, brought = stats_of(arm).device_brought;
    c.in = &other;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, compute_in_a_thread, &c) == 0);
    while (turns ? stats_of(arm).device_brought == brought : stats_of(arm).device_ns == there) {
        usleep(100);
    }
    CHECK(stats_of(arm).device_brought > brought);
    CHECK(!turns || stats_of(arm).device_ns == there);
    pthread_mutex_unlock(&gate);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(stats_of(arm).device_ns > there);
    CHECK(stats_of(arm).break_even_pairs > 1 && stats_of(arm).break_even_pairs < 101);
    check_same(arm, reference, &other);
    close_arm(arm);
    hobbit_device_close(device);
    close_arm(reference);
}

static void copies_and_computing_overlap(void) {
    the_device_computes_while_it_copies(false);
    the_device_computes_while_it_copies(true);
}

static void every_failed_allocation_is_survived(void) {
    struct arm *reference = open_arm(0, 0);
    struct input in;
    char err[256];
    float out[EMBD * MAX_TOKENS];
    uint64_t seed = 79;
    random_input(&in, 4, &seed);
    bool failed = true;
    for (int n = 1; failed; n++) {
        struct arm *arm = open_arm(3, HOBBIT_IO_AUTO);
        struct hobbit_device *device = NULL;
        atomic_store(&faults_allocation, n);
        int32_t status = hobbit_device_open("CPU", 1, &device, err, sizeof err);
        if (status == HOBBIT_OK) {
            status = use_device(arm, device, LAYERS * EXPERTS, batch, much, err, sizeof err);
        }
        enum ggml_status computed = status == HOBBIT_OK ? compute(arm, &in, out) : GGML_STATUS_SUCCESS;
        failed = atomic_exchange(&faults_allocation, 0) <= 0;
        CHECK(status == HOBBIT_OK || status == HOBBIT_NOMEM || status == HOBBIT_DEVICE);
        CHECK(computed == GGML_STATUS_SUCCESS || failed);
        check_same(arm, reference, &in);
        check_same(arm, reference, &in);
        close_arm(arm);
        hobbit_device_close(device);
        CHECK(n < 1000);
    }
    close_arm(reference);
}

/* Kept for ever, by design. */
static struct hobbit_device *silent[3];

static struct hobbit_device *open_impatiently(int patience_ms) {
    struct hobbit_device *device = open_device();
    device->patience_ms = patience_ms;
    return device;
}

#ifdef __SANITIZE_THREAD__
#define N_SILENT 2 /* nothing but time is between what a copy reads and the end of the model */
#else
#define N_SILENT 3
#endif

static ggml_backend_buffer_t allocate_at_the_gate(ggml_backend_buffer_type_t type, size_t size) {
    (void) type;
    wait_at_the_gate(NULL);
    return ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
}

/* Be it before it allocates anything, while it does, or in the middle of a copy, which end when the model is gone. */
static void a_device_that_does_not_answer_gets_no_model(void) {
    const uint64_t copy_ns = 2000000000;
    const struct hobbit_device_delays slow = {.copy_ns_per_mib = (copy_ns << 20) / whole_expert(HOBBIT_HIGH)};
    static struct hb_task waits;
    char err[256];
    for (int i = 0; i < N_SILENT; i++) {
        silent[i] = open_impatiently(100);
        hobbit_device_delay(silent[i], &slow);
    }
    static struct ggml_backend_buffer_type slow_type;
    slow_type = *silent[1]->buffer_type;
    slow_type.iface.alloc_buffer = allocate_at_the_gate;
    silent[1]->buffer_type = &slow_type;
    hold(silent[0], HB_COMPUTES, &waits);
    for (int i = 0; i < N_SILENT; i++) {
        struct arm *arm = open_arm(3, HOBBIT_IO_AUTO);
        CHECK_EQUAL(use_device(arm, silent[i], 4, batch, much, err, sizeof err), HOBBIT_DEVICE);
        CHECK_TEXT(err, "device CPU cannot be used: it does not answer");
        CHECK(hb_worker_is_lost(silent[i]->worker));
        CHECK(hb_worker_is_busy(silent[i]->worker));
        close_arm(arm);
    }
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < N_SILENT; i++) {
        hb_worker_rest(silent[i]->worker, HB_WORKER_FOREVER);
        hobbit_device_close(silent[i]);
    }
}

/* The connection is free again once its thread has come back. */
static void a_device_that_does_not_answer_at_its_end_comes_back(void) {
    static struct hb_task waits;
    static struct hobbit_device *late; /* kept for ever */
    late = open_device();
    late->copies_on = HB_COMPUTES;
    hold(late, HB_COMPUTES, &waits);
    hobbit_device_close(late);
    CHECK(hb_guard_has("CPU"));
    pthread_mutex_unlock(&gate);
    while (hb_guard_has("CPU")) {
        usleep(1000);
    }
    hobbit_device_close(open_device());
    CHECK(!hb_guard_has("CPU"));
}

/* Its experts' memory is given back, and the addresses stay. */
static void an_abandoned_model_keeps_no_experts(void) {
    struct arm *arm = open_arm(LAYERS * EXPERTS, HOBBIT_IO_AUTO);
    struct input in;
    float out[EMBD * MAX_TOKENS];
    uint64_t seed = 89;
    random_input(&in, MAX_TOKENS, &seed);
    CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_SUCCESS);
    struct hb_arena arena = hb_model_arena(arm->model, 0, HOBBIT_HIGH);
    uint64_t bytes = arena.slot_bytes * (uint64_t) arena.n_slots, used[2] = {0};
    for (int i = 0; i < 2; i++) {
        for (uint64_t k = 0; k < bytes; k++) {
            used[i] += ((const char *) arena.base)[k] != 0;
        }
        hobbit_model_abandon(arm->model);
    }
    CHECK(used[0] > 0);
    CHECK_EQUAL(used[1], 0);
    close_arm(arm);
}

static void what_does_not_fit_is_refused(void) {
    struct arm *arm = open_arm(3, HOBBIT_IO_AUTO);
    struct hobbit_device *device = open_device(), *none;
    struct hobbit_device_info info;
    char err[256];
    hobbit_device_describe(device, &info);
    CHECK_TEXT(info.name, "CPU");
    CHECK(info.shares_memory && info.total_bytes > 0);
    CHECK_EQUAL(hobbit_device_open("Hobbit", 1, &none, err, sizeof err), HOBBIT_ARG);
    CHECK_TEXT(err, "there is no device Hobbit: there is CPU");
    const struct hobbit_device_pool pools[] = {{{whole_expert(HOBBIT_HIGH) + 1}, {2}}, {{whole_expert(HOBBIT_HIGH)}, {2}}};
    const int32_t first[LAYERS] = {0}, none_there[LAYERS] = {2, 2}, second[LAYERS] = {1, 1};
    const struct hobbit_device_plan wrong[] = {
        {.pools = pools, .pool_of_group = first, .n_pools = 1, .batch_bytes = batch},
        {.pools = pools + 1, .pool_of_group = none_there, .n_pools = 1, .batch_bytes = batch},
        {.pools = pools, .pool_of_group = second, .n_pools = 2, .batch_bytes = batch},
        {.pools = pools + 1, .pool_of_group = first, .n_pools = 1},
    };
    for (int i = 0; i < 4; i++) {
        CHECK_EQUAL(hobbit_model_use_device(arm->model, device, &wrong[i], err, sizeof err), HOBBIT_ARG);
        CHECK_TEXT(err, "does not fit");
    }
    CHECK_EQUAL(use_device(arm, device, 2, batch, 0, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(use_device(arm, device, 2, batch, 0, err, sizeof err), HOBBIT_ARG); /* once */
    close_arm(arm);
    hobbit_device_close(device);
    hobbit_device_close(NULL);
}

static void a_server_that_is_not_there_is_an_error(void) {
    char name[64], err[256];
    CHECK_EQUAL(hobbit_rpc_connect("/nowhere/libggml-rpc.so", "127.0.0.1:1", name, sizeof name, err, sizeof err),
                HOBBIT_DEVICE);
    CHECK_TEXT(err, "/nowhere/libggml-rpc.so is not ggml's RPC backend");
    CHECK_EQUAL(hobbit_rpc_serve("/nowhere/libggml-rpc.so", "127.0.0.1:1", 1, err, sizeof err), HOBBIT_DEVICE);
}

int main(void) {
    for (int i = 0; i < N_VARIANTS; i++) {
        printf("%s\n", variants[i].name);
        make_weights(&variants[i]);
        RUN(results_do_not_depend_on_what_is_where);
        RUN(small_batches_are_enough);
        RUN(once_there_an_expert_is_not_read_again);
        if (i == 0) {
            RUN(results_do_not_depend_on_who_computes);
            RUN(what_is_only_there_would_have_to_be_read);
            RUN(a_place_too_small_for_anything_is_left_alone);
            RUN(what_is_expected_goes_there_ahead);
            RUN(the_cpu_does_not_wait_for_the_device);
            RUN(copies_and_computing_overlap);
            RUN(every_failed_allocation_is_survived);
            RUN(a_device_that_does_not_answer_at_its_end_comes_back);
            RUN(a_device_that_does_not_answer_gets_no_model);
            RUN(an_abandoned_model_keeps_no_experts);
            RUN(what_does_not_fit_is_refused);
            RUN(a_server_that_is_not_there_is_an_error);
        }
        free_weights();
    }
    return 0;
}
