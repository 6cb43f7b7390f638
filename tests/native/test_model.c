/* Description: one streamed model from open to close: its bytes, its failures, and that neither leaves a trace. */
#include "model.h"

#include <errno.h>

#include "faults.h"
#include "files.h"

#define FILE_SIZE 600000
#define EXPERTS 6

static const char *paths[2];
static struct hobbit_file files[2];
static char err[256];

/* Group 0 spans both files; group 1's experts are an odd distance apart; their slots differ in size. */
static const struct hobbit_matrix matrices[] = {
    {.name = "a.up", .group = 0, .file = 0, .ne0 = 8, .ne1 = 8, .offset = 10016, .expert_bytes = 8192},
    {.name = "a.down", .group = 0, .file = 1, .ne0 = 8, .ne1 = 8, .offset = 333, .expert_bytes = 20480},
    {.name = "b.up", .group = 1, .file = 1, .ne0 = 8, .ne1 = 8, .offset = 200032, .expert_bytes = 3001},
};
static const struct hobbit_group groups[] = {{.layer = 0, .n_expert = EXPERTS}, {.layer = 1, .n_expert = EXPERTS}};
static const struct hobbit_extent extents[] = {
    {.offset = 0, .length = 6, .source = HOBBIT_SOURCE_MEMORY, .file = -1, .data = "header"},
    {.offset = 6, .length = 1000, .source = HOBBIT_SOURCE_FILE, .file = 1, .file_offset = 500},
    {.offset = 1006, .length = 100000, .source = HOBBIT_SOURCE_HOLE},
};

static struct hobbit_options describe(int32_t io) {
    return (struct hobbit_options) {.files = files, .matrices = matrices, .groups = groups, .extents = extents,
                                    .n_files = 2, .n_matrices = 3, .n_groups = 2, .n_extents = 3, .io = io,
                                    .io_threads = 2};
}

static struct hobbit_model *open_model(int32_t io) {
    struct hobbit_options options = describe(io);
    struct hobbit_model *m = NULL;
    CHECK_EQUAL(hobbit_model_open(&options, &m, err, sizeof err), HOBBIT_OK);
    CHECK(m != NULL && !hb_model_ready(m));
    return m;
}

static int32_t allocate(struct hobbit_model *m, int32_t slots_a, int32_t slots_b) {
    const struct hobbit_pool pools[] = {{slots_a, hobbit_model_slot_bytes(m, 0)},
                                        {slots_b, hobbit_model_slot_bytes(m, 1)}};
    return hobbit_model_allocate(m, pools, 2, (int32_t[]) {0, 1}, err, sizeof err);
}

static struct hobbit_model *ready_model(int32_t io, int32_t slots) {
    struct hobbit_model *m = open_model(io);
    CHECK_EQUAL(allocate(m, slots, slots), HOBBIT_OK);
    CHECK(hb_model_ready(m));
    return m;
}

static bool slot_holds(struct hobbit_model *m, int32_t group, int32_t expert, int32_t slot) {
    const struct hb_group *g = &hb_model_catalog(m)->groups[group];
    struct hb_arena arena = hb_model_arena(m, group);
    bool same = slot < arena.n_slots;
    for (int32_t i = 0; i < g->n_matrices; i++) {
        const struct hb_matrix *matrix = g->matrices[i];
        const char *data = arena.base + (uint64_t) slot * arena.slot_bytes + matrix->slot_offset;
        same = same && file_equals(data, matrix->offset + (uint64_t) expert * matrix->expert_bytes,
                                   matrix->expert_bytes);
    }
    return same;
}

static struct hobbit_stats stats_of(const struct hobbit_model *m) {
    struct hobbit_stats stats;
    hobbit_model_stats(m, &stats);
    return stats;
}

static void the_description_is_checked(void) {
    struct hobbit_options options = describe(HOBBIT_IO_AUTO);
    struct hobbit_model *m = NULL;
    options.n_matrices = 0;
    CHECK_EQUAL(hobbit_model_open(&options, &m, err, sizeof err), HOBBIT_ARG);
    for (int bad = 0; bad < 4; bad++) {
        struct hobbit_extent wrong[3];
        memcpy(wrong, extents, sizeof wrong);
        wrong[1].offset += bad == 0; /* a gap */
        wrong[1].offset -= bad == 1; /* an overlap */
        wrong[2].length = bad == 2 ? 0 : wrong[2].length;
        wrong[1].file = bad == 3 ? 2 : wrong[1].file;
        options = describe(HOBBIT_IO_AUTO);
        options.extents = wrong;
        CHECK_EQUAL(hobbit_model_open(&options, &m, err, sizeof err), HOBBIT_FORMAT);
        CHECK_TEXT(err, "extents");
    }
    static const struct hobbit_extent endless[] = {
        {.offset = 0, .length = UINT64_MAX, .source = HOBBIT_SOURCE_HOLE},
        {.offset = UINT64_MAX, .length = 1, .source = HOBBIT_SOURCE_HOLE}, /* ends at 0 */
        {.offset = 0, .length = 6, .source = HOBBIT_SOURCE_MEMORY, .data = "header"},
    };
    options.extents = endless;
    CHECK_EQUAL(hobbit_model_open(&options, &m, err, sizeof err), HOBBIT_FORMAT);
    CHECK(m == NULL);
    hobbit_model_close(NULL);
}

static void the_arena_is_checked(void) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    uint64_t a = hobbit_model_slot_bytes(m, 0), b = hobbit_model_slot_bytes(m, 1);
    CHECK(a > b && b >= 3001);
    const struct hobbit_pool small[] = {{2, b}, {2, b}}, odd[] = {{2, a + 1}, {2, b}}, none[] = {{0, a}, {2, b}};
    const struct hobbit_pool huge[] = {{1 << 30, (uint64_t) 1 << 34}, {2, b}}; /* the product is 0 */
    const struct hobbit_pool *wrong[] = {small, odd, none, huge};
    for (int i = 0; i < 4; i++) {
        CHECK_EQUAL(hobbit_model_allocate(m, wrong[i], 2, (int32_t[]) {0, 1}, err, sizeof err), HOBBIT_ARG);
    }
    const struct hobbit_pool good[] = {{2, a}};
    CHECK_EQUAL(hobbit_model_allocate(m, good, 1, (int32_t[]) {0, 1}, err, sizeof err), HOBBIT_ARG);
    CHECK_EQUAL(hobbit_model_allocate(m, good, 1, (int32_t[]) {-1, 0}, err, sizeof err), HOBBIT_ARG);
    CHECK_EQUAL(hobbit_model_allocate(m, good, 0, (int32_t[]) {0, 0}, err, sizeof err), HOBBIT_ARG);
    CHECK(!hb_model_ready(m));
    CHECK_EQUAL(hobbit_model_allocate(m, good, 1, (int32_t[]) {0, 0}, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(allocate(m, 2, 2), HOBBIT_ARG); /* once only */
    CHECK_EQUAL(stats_of(m).cache_bytes, 2 * a);
    CHECK_EQUAL(stats_of(m).n_slots, 2);
    hobbit_model_close(m);
}

/* One computation's use of these experts: look up, fetch, collect, release. Returns how many reads failed. */
static int use(struct hobbit_model *m, int32_t group, int32_t first, int32_t n) {
    int loading = 0, failed = 0;
    int32_t slots[EXPERTS];
    hb_model_lock(m);
    for (int32_t i = 0; i < n; i++) {
        slots[i] = hb_model_look_up(m, group, (first + i) % EXPERTS);
        if (slots[i] < 0) {
            CHECK(hb_model_fetch(m, group, (first + i) % EXPERTS));
            loading++;
        }
    }
    for (; loading > 0; loading--) {
        struct hb_arrival a = hb_model_arrival(m, true);
        CHECK(a.expert >= 0 && a.expert < EXPERTS);
        slots[(a.expert + EXPERTS - first) % EXPERTS] = a.failed ? -1 : a.slot;
        failed += a.failed;
    }
    CHECK_EQUAL(hb_model_arrival(m, true).expert, -1);
    for (int32_t i = 0; i < n; i++) {
        if (slots[i] >= 0) {
            CHECK(slot_holds(m, group, (first + i) % EXPERTS, slots[i]));
            hb_model_release(m, group, (first + i) % EXPERTS);
        }
    }
    hb_model_unlock(m);
    return failed;
}

static void experts_arrive_byte_by_byte(void) {
    for (int32_t io = HOBBIT_IO_AUTO; io <= HOBBIT_IO_BUFFERED; io += 2) {
        for (int32_t slots = 1; slots <= EXPERTS; slots++) {
            struct hobbit_model *m = ready_model(io, slots);
            uint64_t seed = (uint64_t) slots;
            for (int i = 0; i < 60; i++) {
                int32_t n = 1 + (int32_t) check_random(&seed, (uint32_t) slots);
                CHECK_EQUAL(use(m, (int32_t) check_random(&seed, 2), (int32_t) check_random(&seed, EXPERTS), n), 0);
            }
            struct hobbit_stats stats = stats_of(m);
            CHECK(stats.hits > 0 && stats.misses > 0 && stats.n_cached <= 2 * slots);
            CHECK((stats.evictions == 0) == (slots == EXPERTS));
            CHECK_EQUAL(hb_model_home(m, 1), slots == EXPERTS ? 0 : -1);
            hobbit_model_close(m);
        }
    }
}

static void counters_tell_what_happened(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_BUFFERED, 2);
    CHECK_EQUAL(use(m, 0, 0, 2), 0);
    CHECK_EQUAL(use(m, 0, 1, 2), 0);
    struct hobbit_stats stats = stats_of(m);
    CHECK_EQUAL(stats.hits, 1);
    CHECK_EQUAL(stats.misses, 3);
    CHECK_EQUAL(stats.evictions, 1);
    CHECK_EQUAL(stats.n_cached, 2);
    CHECK_EQUAL(stats.n_slots, 4);
    CHECK_EQUAL(stats.read_bytes, 3 * (8192 + 20480));
    CHECK_EQUAL(stats.read_calls, 6);
    CHECK_EQUAL(stats.direct_io, 0);
    hobbit_model_close(m);
}

static void pinned_experts_keep_their_slots(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 1);
    CHECK_EQUAL(use(m, 0, 3, 1), 0);
    hb_model_lock(m);
    int32_t slot = hb_model_look_up(m, 0, 3);
    CHECK_EQUAL(slot, 0);
    CHECK(!hb_model_fetch(m, 0, 4));
    CHECK(hb_model_fetch(m, 1, 4)); /* another pool */
    CHECK(!hb_model_arrival(m, true).failed);
    CHECK(slot_holds(m, 0, 3, slot));
    hb_model_release(m, 0, 3);
    CHECK(hb_model_fetch(m, 0, 4));
    CHECK(!hb_model_arrival(m, true).failed);
    hb_model_release(m, 0, 4);
    hb_model_release(m, 1, 4);
    hb_model_unlock(m);
    hobbit_model_close(m);
}

static ssize_t fail(int fd, void *dst, size_t length, off_t offset) {
    (void) fd, (void) dst, (void) length, (void) offset;
    errno = EIO;
    return -1;
}

static void failed_reads_leave_the_cache_usable(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_BUFFERED, 3);
    CHECK_EQUAL(use(m, 0, 0, 1), 0);
    faults_pread = fail;
    CHECK_EQUAL(use(m, 0, 0, 3), 2); /* expert 0 is cached */
    faults_pread = NULL;
    hobbit_model_take_error(m, err, sizeof err);
    CHECK_TEXT(err, strerror(EIO));
    CHECK(strstr(err, paths[0]) != NULL || strstr(err, paths[1]) != NULL);
    hobbit_model_take_error(m, err, sizeof err);
    CHECK(err[0] == '\0');
    CHECK_EQUAL(stats_of(m).n_cached, 1);
    for (int i = 0; i < 10; i++) {
        CHECK_EQUAL(use(m, 0, i, 3), 0);
    }
    CHECK_EQUAL(stats_of(m).n_cached, 3);
    hobbit_model_close(m);
}

static void a_file_cut_short_is_named_with_the_offset(void) {
    const char *whole = files[1].path;
    files[1].path = file_make(333 + 2 * 20480 + 100); /* ends inside expert 2 of a.down */
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 3);
    CHECK_EQUAL(use(m, 0, 0, 3), 1);
    hobbit_model_take_error(m, err, sizeof err);
    CHECK_TEXT(err, files[1].path);
    CHECK_TEXT(err, " 41293 "); /* 333 + 2 * 20480 */
    CHECK_EQUAL(use(m, 0, 0, 2), 0);
    hobbit_model_close(m);
    files[1].path = whole;
}

static ssize_t slow(int fd, void *dst, size_t length, off_t offset) {
    usleep(10000);
    return faults_real_pread(fd, dst, length, offset);
}

static void closing_waits_for_reads_under_way(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, EXPERTS);
    faults_pread = slow;
    hb_model_lock(m);
    for (int32_t e = 0; e < EXPERTS; e++) {
        CHECK(hb_model_fetch(m, 0, e));
    }
    hb_model_unlock(m);
    hobbit_model_close(m);
    faults_pread = NULL;
}

static void waiting_counts_as_stall(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 1);
    faults_pread = slow;
    CHECK_EQUAL(use(m, 1, 0, 1), 0);
    faults_pread = NULL;
    CHECK(stats_of(m).stall_ns > 1000000);
    hobbit_model_close(m);
}

static void cancelling_is_a_switch_of_the_caller(void) {
    int32_t flag = 0;
    struct hobbit_options options = describe(HOBBIT_IO_AUTO);
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    CHECK(!hb_model_cancelled(m)); /* without a switch: never */
    hobbit_model_close(m);
    options.cancelled = &flag;
    CHECK_EQUAL(hobbit_model_open(&options, &m, err, sizeof err), HOBBIT_OK);
    CHECK(!hb_model_cancelled(m));
    flag = 1;
    CHECK(hb_model_cancelled(m));
    hobbit_model_close(m);
}

static void reads_not_begun_can_be_withdrawn(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_BUFFERED, EXPERTS);
    atomic_store(&faults_gate_open, false);
    atomic_store(&faults_pread_calls, 0);
    faults_pread = faults_gated_pread;
    hb_model_lock(m);
    for (int32_t e = 0; e < EXPERTS; e++) {
        CHECK(hb_model_fetch(m, 0, e));
    }
    faults_await_preads(2); /* both threads are at expert 0 */
    hb_model_withdraw(m);
    for (int32_t e = 1; e < EXPERTS; e++) {
        struct hb_arrival a = hb_model_arrival(m, true);
        CHECK(a.expert == e && a.failed);
    }
    atomic_store(&faults_gate_open, true);
    struct hb_arrival first = hb_model_arrival(m, true);
    CHECK(first.expert == 0 && !first.failed && slot_holds(m, 0, 0, first.slot));
    hb_model_release(m, 0, 0);
    CHECK_EQUAL(hb_model_arrival(m, true).expert, -1);
    hb_model_unlock(m);
    faults_pread = NULL;
    hobbit_model_take_error(m, err, sizeof err);
    CHECK(err[0] == '\0'); /* nothing went wrong */
    CHECK_EQUAL(use(m, 0, 0, EXPERTS), 0);
    hobbit_model_close(m);
}

static void a_failure_can_be_told_in_words(void) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    hb_model_fail(m, "why");
    hobbit_model_take_error(m, err, sizeof err);
    CHECK(strcmp(err, "why") == 0);
    hobbit_model_close(m);
}

static void the_stream_is_the_virtual_file(void) {
    char data[2000];
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    FILE *file = hobbit_model_stream(m, err, sizeof err);
    CHECK(file != NULL);
    CHECK_EQUAL(fread(data, 1, 1006, file), 1006);
    CHECK(memcmp(data, "header", 6) == 0 && file_equals(data + 6, 500, 1000));
    CHECK(stats_of(m).dense_bytes >= 1000);
    CHECK_EQUAL(hobbit_stream_close(file), 0);
    hobbit_model_close(m);
}

static void matrices_are_read_past_the_cache(void) {
    static char data[5000];
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    const struct hb_matrix *matrix = hb_catalog_find(hb_model_catalog(m), "b.up");
    CHECK(hb_model_read(m, matrix, data, 3001 + 7, sizeof data));
    CHECK(file_equals(data, 200032 + 3001 + 7, sizeof data));
    faults_pread = fail;
    CHECK(!hb_model_read(m, matrix, data, 0, 1));
    faults_pread = NULL;
    hobbit_model_take_error(m, err, sizeof err);
    CHECK_TEXT(err, strerror(EIO));
    CHECK(!hb_model_read(m, matrix, data, FILE_SIZE - 200032, 1)); /* past the end */
    hobbit_model_take_error(m, err, sizeof err);
    CHECK_TEXT(err, "the file is shorter than that");
    hobbit_model_close(m);
}

static void every_failure_to_open_is_undone(void) {
    int open_before = files_open();
    struct hobbit_options options = describe(HOBBIT_IO_BUFFERED);
    struct hobbit_model *m = NULL;
    for (int n = 1; m == NULL; n++) {
        atomic_store(&faults_allocation, n);
        int32_t status = hobbit_model_open(&options, &m, err, sizeof err);
        CHECK(status == HOBBIT_NOMEM || m != NULL);
        CHECK(m != NULL || files_open() == open_before);
    }
    atomic_store(&faults_allocation, 0);
    hobbit_model_close(m);
    m = NULL;
    for (int n = 1; n <= 2; n++) {
        atomic_store(&faults_thread, n);
        CHECK_EQUAL(hobbit_model_open(&options, &m, err, sizeof err), HOBBIT_NOMEM);
        CHECK_TEXT(err, "threads");
    }
    CHECK_EQUAL(files_open(), open_before);
}

static void every_failure_to_allocate_is_undone(void) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    usleep(1000); /* its threads have their buffers */
    atomic_store(&faults_map, 1);
    CHECK_EQUAL(allocate(m, 2, 2), HOBBIT_NOMEM);
    CHECK_TEXT(err, "no memory");
    int n = 1;
    for (int32_t status = HOBBIT_NOMEM; status == HOBBIT_NOMEM; n++) {
        atomic_store(&faults_allocation, n);
        status = allocate(m, 2, 2);
        CHECK(status == HOBBIT_NOMEM ? !hb_model_ready(m) : status == HOBBIT_OK);
    }
    atomic_store(&faults_allocation, 0);
    CHECK(n > 10);
    CHECK_EQUAL(use(m, 0, 0, 2), 0);
    hobbit_model_close(m);
}

int main(void) {
    for (int i = 0; i < 2; i++) {
        files[i] = (struct hobbit_file) {file_make(FILE_SIZE), FILE_SIZE};
        paths[i] = files[i].path;
    }
    RUN(the_description_is_checked);
    RUN(the_arena_is_checked);
    RUN(experts_arrive_byte_by_byte);
    RUN(counters_tell_what_happened);
    RUN(pinned_experts_keep_their_slots);
    RUN(failed_reads_leave_the_cache_usable);
    RUN(a_file_cut_short_is_named_with_the_offset);
    RUN(closing_waits_for_reads_under_way);
    RUN(waiting_counts_as_stall);
    RUN(cancelling_is_a_switch_of_the_caller);
    RUN(reads_not_begun_can_be_withdrawn);
    RUN(a_failure_can_be_told_in_words);
    RUN(the_stream_is_the_virtual_file);
    RUN(matrices_are_read_past_the_cache);
    RUN(every_failure_to_open_is_undone);
    RUN(every_failure_to_allocate_is_undone);
    return 0;
}
