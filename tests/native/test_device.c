/* Description: experts computed on a device while the CPU computes others equal, bit for bit, those of the CPU, whatever
 * is where. The device is ggml's CPU, through all that a device with memory of its own would go through; with a server
 * in another process tests/test_devices.py has one that really has. */
#include <pthread.h>
#include <unistd.h>

#include "device.h"
#include "faults.h"
#include "layers.h"
#include "model.h"

static struct hobbit_stats stats_of(const struct arm *arm) {
    struct hobbit_stats stats;
    hobbit_model_stats(arm->model, &stats);
    return stats;
}

static uint64_t whole_expert(void) {
    uint64_t bytes = 0;
    for (enum role role = UP; role <= GATE_UP; role++) {
        bytes += has(file.variant, role) ? expert_bytes(HOBBIT_HIGH, role) : 0;
    }
    return bytes;
}

static struct hobbit_device *open_device(void) {
    struct hobbit_device *device;
    char err[256];
    CHECK_EQUAL(hobbit_device_open("CPU", 1, &device, err, sizeof err), HOBBIT_OK);
    return device;
}

static int32_t use_device(struct arm *arm, struct hobbit_device *device, int32_t n_slots, uint64_t batch_bytes,
                          uint64_t token_bytes, char *err, size_t err_len) {
    const struct hobbit_device_pool pool = {whole_expert(), n_slots};
    const int32_t pool_of_group[LAYERS] = {0};
    const struct hobbit_device_plan plan = {&pool, pool_of_group, 1, batch_bytes, token_bytes};
    return hobbit_model_use_device(arm->model, device, &plan, err, err_len);
}

/* Wait for the copies that are on their way there. */
static void settle(const struct arm *arm) {
    hb_model_lock(arm->model);
    hb_model_end_uploads(arm->model);
    hb_model_unlock(arm->model);
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
    CHECK((stats.device_hits > 0) == (split.device_slots > 0 && split.batch_bytes > 100000));
    CHECK((stats.device_bytes > 0) == (split.device_slots > 0));
    CHECK(stats.device_bytes % whole_expert() == 0);
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
    compare((struct split) {LAYERS * EXPERTS, 4, batch, whole_expert() / 3});
}

/* The batch's memory holds a few pairs only: several batches a layer, and experts with more pairs stay here. */
static void small_batches_are_enough(void) {
    compare((struct split) {3, LAYERS * EXPERTS, 160000, much});
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
    CHECK_EQUAL(stats_of(arm).device_bytes, LAYERS * EXPERTS * whole_expert());
    hobbit_model_forget(arm->model);
    check_same(arm, reference, &in);
    CHECK(stats_of(arm).read_bytes > bytes);
    allocate(arm->model, (struct room) {2, 0}); /* while copies are under way */
    check_same(arm, reference, &in);
    close_arm(arm);
    hobbit_device_close(device);
    close_arm(reference);
}

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

static void wait_at_the_gate(void *context) {
    (void) context;
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
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
    struct hb_task waits = {.run = wait_at_the_gate};
    pthread_mutex_lock(&gate);
    hb_worker_submit(device->worker, &waits, true);
    while (!hb_worker_is_busy(device->worker)) {
        usleep(100);
    }
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
    const struct hobbit_device_pool pools[] = {{whole_expert() + 1, 2}, {whole_expert(), 2}};
    const int32_t first[LAYERS] = {0}, none_there[LAYERS] = {2, 2}, second[LAYERS] = {1, 1};
    const struct hobbit_device_plan wrong[] = {{pools, first, 1, batch, 0},
                                               {pools + 1, none_there, 1, batch, 0},
                                               {pools, second, 2, batch, 0},
                                               {pools + 1, first, 1, 0, 0}};
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
            RUN(a_place_too_small_for_anything_is_left_alone);
            RUN(the_cpu_does_not_wait_for_the_device);
            RUN(every_failed_allocation_is_survived);
            RUN(what_does_not_fit_is_refused);
            RUN(a_server_that_is_not_there_is_an_error);
        }
        free_weights();
    }
    return 0;
}
