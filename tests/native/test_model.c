/* Description: one streamed model from open to close: its bytes, its failures, that neither leaves a trace, and how
 * copies of two precisions stand in for one another. */
#include "model.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

#include "faults.h"
#include "files.h"

#define FILE_SIZE 600000
#define EXPERTS 6

static const char *paths[2];
static struct hobbit_file files[2];
static char err[256];

/* Group 0 spans both files; group 1's experts are an odd distance apart; their slots differ in size. The last two are
 * low copies of group 0. */
static const struct hobbit_matrix matrices[] = {
    {.name = "a.up", .group = 0, .file = 0, .ne0 = 8, .ne1 = 8, .offset = 10016, .expert_bytes = 8192},
    {.name = "a.down", .group = 0, .file = 1, .ne0 = 8, .ne1 = 8, .offset = 333, .expert_bytes = 20480},
    {.name = "b.up", .group = 1, .file = 1, .ne0 = 8, .ne1 = 8, .offset = 200032, .expert_bytes = 3001},
    {.name = "a.up", .precision = HOBBIT_LOW, .file = 1, .ne0 = 8, .ne1 = 8, .offset = 300111, .expert_bytes = 999},
    {.name = "a.down", .precision = HOBBIT_LOW, .file = 0, .ne0 = 8, .ne1 = 8, .offset = 400384,
     .expert_bytes = 8192},
};
enum { HIGH_BYTES = 8192 + 20480, LOW_BYTES = 999 + 8192 };
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

static struct hobbit_model *open_described(struct hobbit_options options) {
    struct hobbit_model *m = NULL;
    CHECK_EQUAL(hobbit_model_open(&options, &m, err, sizeof err), HOBBIT_OK);
    CHECK(m != NULL && !hb_model_ready(m));
    return m;
}

/* Without low copies. */
static struct hobbit_model *open_model(int32_t io) {
    return open_described(describe(io));
}

static struct hobbit_pool plain(int32_t slots, uint64_t slot_bytes) {
    return (struct hobbit_pool) {.bytes = (uint64_t) slots * slot_bytes, .slot_bytes = {slot_bytes, 0},
                                 .n_slots = {slots, 0}};
}

static int32_t allocate(struct hobbit_model *m, int32_t slots_a, int32_t slots_b) {
    const struct hobbit_pool pools[] = {plain(slots_a, hobbit_model_slot_bytes(m, 0, HOBBIT_HIGH)),
                                        plain(slots_b, hobbit_model_slot_bytes(m, 1, HOBBIT_HIGH))};
    return hobbit_model_allocate(m, pools, 2, (int32_t[]) {0, 1}, err, sizeof err);
}

static struct hobbit_model *ready_model(int32_t io, int32_t slots) {
    struct hobbit_model *m = open_model(io);
    CHECK_EQUAL(allocate(m, slots, slots), HOBBIT_OK);
    CHECK(hb_model_ready(m));
    return m;
}

/* A pool for the high and low copies of group 0, and one for group 1, which has no low ones. */
static struct hobbit_model *mixed_model(uint64_t bytes) {
    struct hobbit_options options = describe(HOBBIT_IO_AUTO);
    options.n_matrices = 5;
    struct hobbit_model *m = open_described(options);
    uint64_t high = hobbit_model_slot_bytes(m, 0, HOBBIT_HIGH), low = hobbit_model_slot_bytes(m, 0, HOBBIT_LOW);
    CHECK(high > low && low >= LOW_BYTES && hobbit_model_slot_bytes(m, 1, HOBBIT_LOW) == 0);
    int32_t n_high = bytes / high < EXPERTS ? (int32_t) (bytes / high) : EXPERTS;
    int32_t n_low = bytes / low < EXPERTS ? (int32_t) (bytes / low) : EXPERTS;
    const struct hobbit_pool pools[] = {{.bytes = bytes, .slot_bytes = {high, low}, .n_slots = {n_high, n_low}},
                                        plain(2, hobbit_model_slot_bytes(m, 1, HOBBIT_HIGH))};
    CHECK_EQUAL(hobbit_model_allocate(m, pools, 2, (int32_t[]) {0, 1}, err, sizeof err), HOBBIT_OK);
    return m;
}

static struct hb_key high(int32_t group, int32_t expert) {
    return (struct hb_key) {group, expert, HOBBIT_HIGH};
}

/* By one pair. */
static int32_t look_up(struct hobbit_model *m, struct hb_key key) {
    return hb_model_look_up(m, key, &(struct hb_share) {.n_pairs = 1}, 1);
}

static struct hb_key low(int32_t expert) {
    return (struct hb_key) {0, expert, HOBBIT_LOW};
}

static bool slot_holds(struct hobbit_model *m, struct hb_key key, int32_t slot) {
    const struct hb_copy *g = &hb_model_catalog(m)->groups[key.group].copies[key.precision];
    struct hb_arena arena = hb_model_arena(m, key.group, key.precision);
    bool same = slot < arena.n_slots && g->n_matrices > 0;
    for (int32_t i = 0; i < g->n_matrices; i++) {
        const struct hb_matrix *matrix = g->matrices[i];
        const char *data = arena.base + (uint64_t) slot * arena.slot_bytes + matrix->slot_offset;
        same = same && file_equals(data, matrix->offset + (uint64_t) key.expert * matrix->expert_bytes,
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
    uint64_t a = hobbit_model_slot_bytes(m, 0, HOBBIT_HIGH), b = hobbit_model_slot_bytes(m, 1, HOBBIT_HIGH);
    CHECK(a > b && b >= 3001);
    CHECK(hobbit_model_slot_bytes(m, 0, HOBBIT_LOW) == 0 && hobbit_model_slot_bytes(m, 1, HOBBIT_LOW) == 0);
    const struct hobbit_pool small = plain(2, b), odd = plain(2, a + 1), none = plain(0, a);
    const struct hobbit_pool huge = {2 * a, {(uint64_t) 1 << 34, 0}, {1 << 30, 0}}; /* the product is 0 */
    const struct hobbit_pool short_of_bytes = {2 * a - 1, {a, 0}, {2, 0}}, negative = {2 * a, {a, 0}, {2, -1}};
    const struct hobbit_pool empty = {a, {a, 0}, {0, 0}}, wraps = {UINT64_MAX, {a, 0}, {2, 0}};
    const struct hobbit_pool *wrong[] = {&small, &odd, &none, &huge, &short_of_bytes, &negative, &empty, &wraps};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        const struct hobbit_pool pools[] = {*wrong[i], plain(2, b)};
        CHECK_EQUAL(hobbit_model_allocate(m, pools, 2, (int32_t[]) {0, 1}, err, sizeof err), HOBBIT_ARG);
    }
    const struct hobbit_pool good[] = {plain(2, a)};
    CHECK_EQUAL(hobbit_model_allocate(m, good, 1, (int32_t[]) {0, 1}, err, sizeof err), HOBBIT_ARG);
    CHECK_EQUAL(hobbit_model_allocate(m, good, 1, (int32_t[]) {-1, 0}, err, sizeof err), HOBBIT_ARG);
    CHECK_EQUAL(hobbit_model_allocate(m, good, 0, (int32_t[]) {0, 0}, err, sizeof err), HOBBIT_ARG);
    CHECK(!hb_model_ready(m));
    CHECK_EQUAL(hobbit_model_allocate(m, good, 1, (int32_t[]) {0, 0}, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(stats_of(m).cache_bytes, 2 * a);
    CHECK_EQUAL(stats_of(m).n_slots, 2);
    hobbit_model_close(m);
}

static void the_arena_has_room_for_low_copies(void) {
    struct hobbit_options options = describe(HOBBIT_IO_AUTO);
    options.n_matrices = 5;
    struct hobbit_model *m = open_described(options);
    uint64_t a = hobbit_model_slot_bytes(m, 0, HOBBIT_HIGH), l = hobbit_model_slot_bytes(m, 0, HOBBIT_LOW);
    const struct hobbit_pool wrong[] = {
        {2 * a, {a, l}, {2, 0}},        {2 * a, {a, 0}, {2, 0}},
        {2 * a, {a, l - HB_PAGE}, {2, 2}}, {2 * a, {a, l + 1}, {2, 2}},
        {2 * a, {a, l}, {2, (int32_t) (2 * a / l) + 1}},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        CHECK_EQUAL(hobbit_model_allocate(m, &wrong[i], 1, (int32_t[]) {0, 0}, err, sizeof err), HOBBIT_ARG);
        CHECK(!hb_model_ready(m));
    }
    struct hobbit_pool good = {2 * a, {a, l}, {2, (int32_t) (2 * a / l)}};
    CHECK_EQUAL(hobbit_model_allocate(m, &good, 1, (int32_t[]) {0, 0}, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(stats_of(m).cache_bytes, 2 * a); /* shared, not added */
    struct hb_arena of_high = hb_model_arena(m, 0, HOBBIT_HIGH), of_low = hb_model_arena(m, 0, HOBBIT_LOW);
    CHECK(of_high.slot_bytes == a && of_high.n_slots == 2);
    CHECK(of_low.slot_bytes == l && of_low.n_slots == good.n_slots[HOBBIT_LOW]);
    CHECK(of_low.base >= of_high.base + 2 * a || of_high.base >= of_low.base + l * (uint64_t) of_low.n_slots);
    hobbit_model_close(m);
}

/* Whether a read has started. */
static bool fetch(struct hobbit_model *m, struct hb_key key) {
    int32_t slot;
    enum hb_fetch fetched = hb_model_fetch(m, key, &slot);
    CHECK(fetched != HB_FETCH_READY); /* it was missing a moment ago */
    return fetched == HB_FETCH_STARTED;
}

/* Take in an arrival of one of these copies; whether its read failed. */
static bool take_arrival(struct hobbit_model *m, const struct hb_key *keys, int32_t n, int32_t *slots) {
    struct hb_arrival a = hb_model_arrival(m, true);
    int32_t i = 0;
    while (i < n && memcmp(&keys[i], &a.key, sizeof a.key) != 0) {
        i++;
    }
    CHECK(i < n && slots[i] < 0);
    slots[i] = a.failed ? -1 : a.slot;
    return a.failed;
}

/* One computation's use of these copies: look up, fetch, collect, release. Returns how many reads failed. */
static int use_copies(struct hobbit_model *m, const struct hb_key *keys, int32_t n) {
    int loading = 0, failed = 0;
    int32_t slots[2 * EXPERTS];
    hb_model_lock(m);
    for (int32_t i = 0; i < n; i++) {
        slots[i] = look_up(m, keys[i]);
        if (slots[i] >= 0) {
            continue;
        }
        for (; !fetch(m, keys[i]); loading--) {
            CHECK(loading > 0); /* else nothing of ours is in the way */
            failed += take_arrival(m, keys, n, slots);
        }
        loading++;
    }
    for (; loading > 0; loading--) {
        failed += take_arrival(m, keys, n, slots);
    }
    CHECK_EQUAL(hb_model_arrival(m, true).key.expert, -1);
    for (int32_t i = 0; i < n; i++) {
        if (slots[i] >= 0) {
            CHECK(slot_holds(m, keys[i], slots[i]));
            hb_model_release(m, keys[i]);
        }
    }
    hb_model_unlock(m);
    return failed;
}

static int use_copy(struct hobbit_model *m, struct hb_key key) {
    return use_copies(m, &key, 1);
}

/* High copies of neighbours. */
static int use(struct hobbit_model *m, int32_t group, int32_t first, int32_t n) {
    struct hb_key keys[EXPERTS];
    for (int32_t i = 0; i < n; i++) {
        keys[i] = high(group, (first + i) % EXPERTS);
    }
    return use_copies(m, keys, n);
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
    CHECK_EQUAL(stats.read_bytes, 3 * HIGH_BYTES);
    CHECK_EQUAL(stats.read_calls, 6);
    CHECK_EQUAL(stats.direct_io, 0);
    hobbit_model_close(m);
}

static void pinned_experts_keep_their_slots(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 1);
    CHECK_EQUAL(use(m, 0, 3, 1), 0);
    hb_model_lock(m);
    int32_t slot = look_up(m, high(0, 3));
    CHECK_EQUAL(slot, 0);
    CHECK(!fetch(m, high(0, 4)));
    CHECK(fetch(m, high(1, 4))); /* another pool */
    CHECK(!hb_model_arrival(m, true).failed);
    CHECK(slot_holds(m, high(0, 3), slot));
    hb_model_release(m, high(0, 3));
    CHECK(fetch(m, high(0, 4)));
    CHECK(!hb_model_arrival(m, true).failed);
    hb_model_release(m, high(0, 4));
    hb_model_release(m, high(1, 4));
    hb_model_unlock(m);
    hobbit_model_close(m);
}

static void a_copy_is_read_once_and_pinned_by_all_who_ask(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 1);
    int32_t slot = -1;
    hb_model_lock(m);
    CHECK(fetch(m, high(0, 3)));
    CHECK_EQUAL(hb_model_fetch(m, high(0, 3), &slot), HB_FETCH_WAIT); /* it is under way */
    CHECK_EQUAL(hb_model_fetch(m, high(0, 4), &slot), HB_FETCH_WAIT);
    CHECK(!hb_model_arrival(m, true).failed);
    CHECK_EQUAL(hb_model_fetch(m, high(0, 3), &slot), HB_FETCH_READY);
    CHECK(slot == 0 && slot_holds(m, high(0, 3), slot));
    CHECK_EQUAL(look_up(m, high(0, 3)), 0);
    for (int i = 0; i < 3; i++) { /* one for each of us */
        CHECK(!fetch(m, high(0, 4)));
        hb_model_release(m, high(0, 3));
    }
    CHECK(fetch(m, high(0, 4)));
    CHECK(!hb_model_arrival(m, true).failed);
    hb_model_release(m, high(0, 4));
    CHECK_EQUAL(hb_model_arrival(m, true).key.expert, -1);
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
        CHECK(fetch(m, high(0, e)));
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
        CHECK(fetch(m, high(0, e)));
    }
    faults_await_preads(2); /* both threads are at expert 0 */
    hb_model_withdraw(m);
    for (int32_t e = 1; e < EXPERTS; e++) {
        struct hb_arrival a = hb_model_arrival(m, true);
        CHECK(a.key.expert == e && a.failed);
    }
    atomic_store(&faults_gate_open, true);
    struct hb_arrival first = hb_model_arrival(m, true);
    CHECK(first.key.expert == 0 && !first.failed && slot_holds(m, high(0, 0), first.slot));
    hb_model_release(m, high(0, 0));
    CHECK_EQUAL(hb_model_arrival(m, true).key.expert, -1);
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

static int32_t trace_to(struct hobbit_model *m, const char *path) {
    return hobbit_model_trace(m, path, "{}", 0, err, sizeof err);
}

/* All of a file, its size in `*size`. */
static uint8_t *bytes_of(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL && fseek(file, 0, SEEK_END) == 0);
    *size = (size_t) ftell(file);
    uint8_t *data = malloc(*size + 1);
    rewind(file);
    CHECK(data != NULL && fread(data, 1, *size, file) == *size && fclose(file) == 0);
    return data;
}

static void a_trace_in_the_file_of_the_one_before_is_whole(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 2);
    const char *paths[] = {file_make(1), file_make(1)};
    CHECK_EQUAL(trace_to(m, paths[0]), HOBBIT_OK);
    hobbit_model_forget(m);
    CHECK_EQUAL(trace_to(m, paths[0]), HOBBIT_OK);
    CHECK_EQUAL(trace_to(m, paths[1]), HOBBIT_OK);
    CHECK_EQUAL(hobbit_model_trace_end(m, err, sizeof err), HOBBIT_OK);
    size_t sizes[2];
    uint8_t *found[] = {bytes_of(paths[0], &sizes[0]), bytes_of(paths[1], &sizes[1])};
    CHECK_EQUAL(sizes[0], sizes[1]);
    CHECK(memcmp(found[0], found[1], sizes[0]) == 0);
    free(found[0]);
    free(found[1]);
    hobbit_model_close(m);
}

static void a_trace_is_begun_and_ended(void) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    const char *path = file_make(1);
    CHECK_EQUAL(trace_to(m, path), HOBBIT_ARG);
    CHECK_TEXT(err, "no expert cache");
    CHECK_EQUAL(hobbit_model_trace_end(m, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(allocate(m, 2, 2), HOBBIT_OK);
    CHECK_EQUAL(trace_to(m, "no/such/folder"), HOBBIT_IO);
    CHECK_TEXT(err, "no/such/folder: No such file");
    usleep(1000); /* its threads have their buffers */
    for (int n = 1; n <= 3; n++) {
        atomic_store(&faults_allocation, n);
        CHECK_EQUAL(trace_to(m, path), HOBBIT_IO);
    }
    CHECK(hb_model_trace(m) == NULL);
    CHECK_EQUAL(trace_to(m, path), HOBBIT_OK);
    CHECK(hb_model_trace(m) != NULL);
    int open_before = files_open();
    hobbit_model_forget(m);
    CHECK_EQUAL(trace_to(m, path), HOBBIT_OK); /* ends the one before */
    CHECK_EQUAL(files_open(), open_before);
    hobbit_model_close(m);
    CHECK(files_open() < open_before || open_before == 0);
}

/* --- two precisions --- */

static int32_t set_rule(struct hobbit_model *m, float t1, float t2, bool deterministic) {
    float a[] = {t1, 1}, b[] = {t2, 1};
    struct hobbit_rule rule = {.t1 = a, .t2 = b, .deterministic = deterministic};
    int32_t status = hobbit_model_set_rule(m, &rule, err, sizeof err);
    a[0] = b[0] = -5; /* the model has its own */
    return status;
}

static bool is_cached(struct hobbit_model *m, struct hb_key key) {
    hb_model_lock(m);
    int32_t slot = look_up(m, key);
    if (slot >= 0) {
        hb_model_release(m, key);
    }
    hb_model_unlock(m);
    return slot >= 0;
}

static void both_copies_arrive_byte_by_byte(void) {
    uint64_t seed = 7;
    for (uint64_t pages = 15; pages < 100; pages += 12) {
        struct hobbit_model *m = mixed_model(pages * HB_PAGE);
        CHECK_EQUAL(set_rule(m, 0, 0.5f, pages % 2 == 0), HOBBIT_OK);
        for (int i = 0; i < 100; i++) {
            struct hb_key key = {0, (int32_t) check_random(&seed, EXPERTS), (int32_t) check_random(&seed, 2)};
            CHECK_EQUAL(use_copy(m, key), 0);
            if (i % 4 == 0) {
                CHECK_EQUAL(use(m, 1, i % EXPERTS, 2), 0); /* without low copies */
            }
        }
        hobbit_model_close(m);
    }
}

/* need x high cached x low cached x deterministic, against the table in model.h */
static void a_better_copy_that_is_cached_is_chosen(void) {
    static const int32_t adaptive[HOBBIT_SKIP + 1][2][2] = { /* [need][high cached][low cached] */
        {{HOBBIT_HIGH, HOBBIT_HIGH}, {HOBBIT_HIGH, HOBBIT_HIGH}},
        {{HOBBIT_LOW, HOBBIT_LOW}, {HOBBIT_HIGH, HOBBIT_HIGH}},
        {{HOBBIT_SKIP, HOBBIT_LOW}, {HOBBIT_HIGH, HOBBIT_HIGH}},
    };
    struct hobbit_model *m = mixed_model(EXPERTS * 100000);
    for (int with = 0; with < 4; with++) {
        hobbit_model_forget(m);
        bool with_high = (with & 1) != 0, with_low = (with & 2) != 0;
        CHECK(!with_high || use_copy(m, high(0, 2)) == 0);
        CHECK(!with_low || use_copy(m, low(2)) == 0); /* after the high one, which would have taken its place */
        for (int deterministic = 0; deterministic < 2; deterministic++) {
            CHECK_EQUAL(set_rule(m, 0.25f, 0.5f, deterministic), HOBBIT_OK);
            struct hobbit_stats before = stats_of(m);
            hb_model_lock(m);
            for (int32_t need = HOBBIT_HIGH; need <= HOBBIT_SKIP; need++) {
                int32_t chosen = hb_model_choose(m, 0, 2, need);
                CHECK_EQUAL(chosen, deterministic ? need : adaptive[need][with_high][with_low]);
                CHECK_EQUAL(hb_model_choose(m, 0, 3, need), need); /* nothing of it is cached */
                CHECK_EQUAL(hb_model_choose(m, 1, 2, need), need);
            }
            hb_model_unlock(m);
            struct hobbit_stats after = stats_of(m); /* choosing is no look-up, and reads nothing */
            CHECK(after.hits == before.hits && after.misses == before.misses && after.promotions == before.promotions);
            CHECK_EQUAL(after.n_cached, with_high + with_low);
        }
    }
    hobbit_model_close(m);
}

static void what_is_under_way_is_not_yet_cached(void) {
    struct hobbit_model *m = mixed_model(EXPERTS * 100000);
    hb_model_lock(m);
    CHECK(fetch(m, low(1)));
    CHECK(fetch(m, high(0, 2)));
    CHECK_EQUAL(hb_model_choose(m, 0, 1, HOBBIT_SKIP), HOBBIT_SKIP);
    CHECK_EQUAL(hb_model_choose(m, 0, 2, HOBBIT_LOW), HOBBIT_LOW);
    CHECK(!hb_model_arrival(m, true).failed);
    CHECK(!hb_model_arrival(m, true).failed);
    CHECK_EQUAL(hb_model_choose(m, 0, 1, HOBBIT_SKIP), HOBBIT_LOW); /* pinned or not */
    CHECK_EQUAL(hb_model_choose(m, 0, 2, HOBBIT_LOW), HOBBIT_HIGH);
    hb_model_release(m, low(1));
    hb_model_release(m, high(0, 2));
    hb_model_unlock(m);
    hobbit_model_close(m);
}

static void promotion_takes_the_low_copys_place(void) {
    for (int deterministic = 0; deterministic < 2; deterministic++) {
        struct hobbit_model *m = mixed_model(EXPERTS * 100000);
        CHECK_EQUAL(set_rule(m, 0.25f, 0.5f, deterministic), HOBBIT_OK);
        CHECK_EQUAL(use_copy(m, low(1)), 0);
        CHECK_EQUAL(use_copy(m, low(4)), 0);
        CHECK_EQUAL(stats_of(m).promotions, 0);
        faults_pread = fail;
        CHECK_EQUAL(use_copy(m, high(0, 1)), 1);
        faults_pread = NULL;
        hobbit_model_take_error(m, err, sizeof err);
        CHECK(is_cached(m, low(1))); /* until the high one is there */
        CHECK_EQUAL(use_copy(m, high(0, 1)), 0);
        CHECK_EQUAL(stats_of(m).promotions, 2);
        CHECK_EQUAL(stats_of(m).n_cached, 2 + deterministic);
        CHECK_EQUAL(stats_of(m).evictions, 0);
        CHECK_EQUAL(is_cached(m, low(1)), deterministic);
        CHECK(is_cached(m, low(4)) && is_cached(m, high(0, 1)));
        CHECK_EQUAL(use_copy(m, high(0, 1)), 0); /* a hit */
        CHECK_EQUAL(use_copy(m, high(0, 2)), 0); /* no low one was there */
        CHECK_EQUAL(stats_of(m).promotions, 2);
        hobbit_model_close(m);
    }
}

static void low_copies_are_counted(void) {
    struct hobbit_model *m = mixed_model(EXPERTS * 100000);
    CHECK_EQUAL(use_copy(m, low(0)), 0);
    CHECK_EQUAL(use_copy(m, low(3)), 0);
    CHECK_EQUAL(use_copy(m, low(3)), 0);
    CHECK_EQUAL(use_copy(m, high(0, 5)), 0);
    CHECK_EQUAL(use_copy(m, high(1, 5)), 0);
    faults_pread = fail;
    CHECK_EQUAL(use_copy(m, low(4)), 1);
    faults_pread = NULL;
    struct hobbit_stats stats = stats_of(m);
    CHECK(stats.hits == 1 && stats.misses == 5 && stats.n_cached == 4 && stats.evictions == 0);
    CHECK_EQUAL(stats.read_low_bytes, 2 * LOW_BYTES);
    CHECK_EQUAL(stats.read_bytes, 2 * LOW_BYTES + HIGH_BYTES + 3001);
    hobbit_model_close(m);
}

static void rules_that_make_no_sense_are_refused(void) {
    struct hobbit_model *m = mixed_model(EXPERTS * 100000);
    CHECK(!hb_model_rule(m)->active);
    CHECK_EQUAL(set_rule(m, 0.25f, 0.75f, true), HOBBIT_OK);
    static const float bad[][2] = {{0.5f, 0.25f}, {NAN, 0.5f}, {0.5f, NAN}, {NAN, NAN}, {1, 0.99f}, {0, -1},
                                   {INFINITY, 1}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_EQUAL(set_rule(m, bad[i][0], bad[i][1], false), HOBBIT_ARG);
        CHECK_TEXT(err, "T1");
        const struct hb_rule *rule = hb_model_rule(m); /* the one before is in force */
        CHECK(rule->active && rule->deterministic && rule->t1[0] == 0.25f && rule->t2[0] == 0.75f);
    }
    struct hobbit_rule rule = {.t1 = (float[]) {0, 0.25f}, .t2 = (float[]) {0, 0.5f}};
    CHECK_EQUAL(hobbit_model_set_rule(m, &rule, err, sizeof err), HOBBIT_ARG); /* group 1 has no low copies */
    CHECK_TEXT(err, "without low-precision experts");
    rule.t1 = rule.t2 = (float[]) {0, 0.25f}; /* high or nothing */
    CHECK_EQUAL(hobbit_model_set_rule(m, &rule, err, sizeof err), HOBBIT_OK);
    rule.t1 = (float[]) {0.25f, 1}; /* always high */
    rule.t2 = (float[]) {1, 2};
    CHECK_EQUAL(hobbit_model_set_rule(m, &rule, err, sizeof err), HOBBIT_OK);
    CHECK(hb_model_rule(m)->active && hb_model_rule(m)->t2[1] == 2);
    rule.t1 = (float[]) {0.5f, 0.5f};
    rule.t2 = (float[]) {0.5f, 0.25f}; /* one group's are wrong */
    CHECK_EQUAL(hobbit_model_set_rule(m, &rule, err, sizeof err), HOBBIT_ARG);
    hobbit_model_close(m);
}

static void rules_replace_one_another(void) {
    struct hobbit_model *m = mixed_model(EXPERTS * 100000);
    float t1[] = {0.25f, 1}, t2[] = {0.5f, 1};
    struct hobbit_rule rule = {.t1 = t1, .t2 = t2, .renormalise = 1, .per_token = 1};
    CHECK_EQUAL(hobbit_model_set_rule(m, &rule, err, sizeof err), HOBBIT_OK);
    CHECK(hb_model_rule(m)->renormalise && !hb_model_rule(m)->deterministic);
    CHECK(!hb_model_rule(m)->per_token); /* what is cached is one copy for all */
    rule.deterministic = 1;
    rule.renormalise = 0;
    CHECK_EQUAL(hobbit_model_set_rule(m, &rule, err, sizeof err), HOBBIT_OK);
    CHECK(!hb_model_rule(m)->renormalise && hb_model_rule(m)->deterministic && hb_model_rule(m)->per_token);
    nanosleep(&(struct timespec) {.tv_nsec = 50000000}, NULL); /* the readers have allocated what they need */
    for (int n = 1; n <= 2; n++) {
        atomic_store(&faults_allocation, n);
        CHECK_EQUAL(set_rule(m, 0, 1, false), HOBBIT_NOMEM);
        CHECK(hb_model_rule(m)->per_token && hb_model_rule(m)->t1[0] == 0.25f);
    }
    atomic_store(&faults_allocation, 0);
    rule.t1 = NULL;
    CHECK_EQUAL(hobbit_model_set_rule(m, &rule, err, sizeof err), HOBBIT_ARG); /* half a rule */
    rule.t2 = NULL;
    CHECK_EQUAL(hobbit_model_set_rule(m, &rule, err, sizeof err), HOBBIT_OK);
    CHECK(!hb_model_rule(m)->active);
    hobbit_model_close(m);
}

static void forgetting_drops_what_is_not_in_use(void) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    hobbit_model_forget(m); /* no cache yet */
    hobbit_model_close(m);
    m = mixed_model(EXPERTS * 100000);
    for (int32_t e = 0; e < EXPERTS; e++) {
        CHECK_EQUAL(use_copy(m, e % 2 == 0 ? low(e) : high(0, e)), 0);
    }
    CHECK_EQUAL(use(m, 1, 0, 2), 0);
    CHECK_EQUAL(stats_of(m).n_cached, EXPERTS + 2);
    hb_model_lock(m);
    int32_t slot = look_up(m, low(2));
    hb_model_unlock(m);
    hobbit_model_forget(m);
    CHECK_EQUAL(stats_of(m).n_cached, 1);
    CHECK(slot_holds(m, low(2), slot));
    hb_model_lock(m);
    hb_model_release(m, low(2));
    hb_model_unlock(m);
    for (int32_t e = 0; e < EXPERTS; e++) {
        CHECK(!is_cached(m, high(0, e)) && is_cached(m, low(e)) == (e == 2));
    }
    hobbit_model_forget(m);
    CHECK_EQUAL(stats_of(m).n_cached, 0);
    CHECK_EQUAL(stats_of(m).evictions, 0);
    CHECK_EQUAL(use_copy(m, low(0)), 0);
    hobbit_model_close(m);
}

static uint64_t resident_bytes(const struct hobbit_model *m, int32_t precision, int32_t slot) {
    struct hb_arena arena = hb_model_arena(m, 0, precision);
    unsigned char there[64];
    uint64_t bytes = 0;
    CHECK(arena.slot_bytes <= sizeof there * HB_PAGE && sysconf(_SC_PAGESIZE) == HB_PAGE);
    CHECK_EQUAL(mincore(arena.base + (uint64_t) slot * arena.slot_bytes, arena.slot_bytes, there), 0);
    for (uint64_t i = 0; i < arena.slot_bytes / HB_PAGE; i++) {
        bytes += there[i] & 1 ? HB_PAGE : 0;
    }
    return bytes;
}

static uint64_t all_resident_bytes(const struct hobbit_model *m, int *slots_in_use) {
    uint64_t bytes = 0;
    *slots_in_use = 0;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        for (int32_t i = 0; i < hb_model_arena(m, 0, p).n_slots; i++) {
            uint64_t of_slot = resident_bytes(m, p, i);
            bytes += of_slot;
            *slots_in_use += of_slot > 0;
        }
    }
    return bytes;
}

static void memory_goes_with_the_copies(void) {
    enum { BYTES = 27 * HB_PAGE };
    struct hobbit_model *m = mixed_model(BYTES);
    uint64_t seed = 13;
    int slots = 0, most = 0;
    CHECK_EQUAL(all_resident_bytes(m, &slots), 0);
    for (int i = 0; i < 200; i++) {
        struct hb_key key = {0, (int32_t) check_random(&seed, EXPERTS),
                             check_random(&seed, 40) < (i % 50 < 25 ? 35 : 3) ? HOBBIT_LOW : HOBBIT_HIGH};
        CHECK_EQUAL(use_copy(m, key), 0);
        uint64_t resident = all_resident_bytes(m, &slots);
        CHECK(resident <= BYTES); /* both banks together */
        CHECK(slots >= stats_of(m).n_cached); /* a slot without a copy may still hold some */
        most = slots > most ? slots : most;
        if (i % 67 == 66) {
            hobbit_model_forget(m);
            CHECK(all_resident_bytes(m, &slots) <= BYTES);
        }
    }
    CHECK(stats_of(m).evictions > 20 && most > 4 && stats_of(m).promotions > 0);
    hobbit_model_close(m);
}

/* --- read before it is asked for --- */

static int32_t warm(struct hobbit_model *m, int32_t group, const int32_t *experts, int32_t n) {
    int32_t of_group[EXPERTS];
    for (int32_t i = 0; i < n; i++) {
        of_group[i] = group;
    }
    return hobbit_model_warm(m, of_group, experts, n, err, sizeof err);
}

static void settled(struct hobbit_model *m) {
    while (hobbit_model_settle(m) > 0) {
        usleep(500);
    }
}

static void uses_are_counted(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 2);
    uint64_t counts[2 * EXPERTS];
    CHECK_EQUAL(use(m, 0, 1, 2), 0);
    CHECK_EQUAL(use(m, 1, 5, 1), 0);
    CHECK_EQUAL(use(m, 0, 2, 2), 0);
    CHECK_EQUAL(warm(m, 1, (int32_t[]) {4}, 1), HOBBIT_OK);
    settled(m); /* is no use */
    hobbit_model_usage(m, counts);
    for (int i = 0; i < 2 * EXPERTS; i++) {
        CHECK_EQUAL(counts[i], i == 2 ? 2 : i == 1 || i == 3 || i == EXPERTS + 5);
    }
    uint64_t hits[2], misses[2];
    hobbit_model_look_ups(m, hits, misses);
    CHECK(hits[0] == 1 && misses[0] == 3 && hits[1] == 0 && misses[1] == 1);
    struct hobbit_stats stats = stats_of(m);
    CHECK(stats.hits == 1 && stats.misses == 4);
    hobbit_model_close(m);
}

static void what_there_is_room_for_is_read_in_order(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 3);
    CHECK_EQUAL(hobbit_model_settle(m), 0);
    hb_model_lock(m);
    CHECK_EQUAL(hobbit_model_settle(m), 1); /* it does not wait */
    hb_model_unlock(m);
    CHECK_EQUAL(use(m, 0, 2, 1), 0);
    CHECK_EQUAL(warm(m, 0, (int32_t[]) {5, 2, 0, 1, 3}, 5), HOBBIT_OK);
    settled(m);
    struct hobbit_stats stats = stats_of(m);
    CHECK(stats.n_cached == 3 && stats.evictions == 0 && stats.read_bytes == 3 * HIGH_BYTES);
    CHECK(is_cached(m, high(0, 5)) && is_cached(m, high(0, 2)) && is_cached(m, high(0, 0)));
    CHECK_EQUAL(use(m, 0, 5, 1), 0); /* looks at the bytes */
    CHECK_EQUAL(use(m, 0, 0, 1), 0);
    CHECK_EQUAL(stats_of(m).read_bytes, 3 * HIGH_BYTES);
    CHECK_EQUAL(use(m, 0, 3, 3), 0); /* and all of it may be evicted */
    hobbit_model_close(m);
}

static void another_arena_takes_the_place_of_one(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 3);
    uint64_t seed = 1, before = 0, counts[2 * EXPERTS], sum = 0;
    for (int i = 0; i < 20; i++) {
        int32_t slots = 1 + (int32_t) check_random(&seed, EXPERTS);
        CHECK_EQUAL(use(m, 0, (int32_t) check_random(&seed, EXPERTS), 1), 0);
        CHECK_EQUAL(use(m, 1, (int32_t) check_random(&seed, EXPERTS), 1), 0);
        CHECK_EQUAL(warm(m, 0, (int32_t[]) {5, 2, 0, 1, 3}, 5), HOBBIT_OK); /* reads are under way */
        CHECK_EQUAL(allocate(m, slots, slots), HOBBIT_OK);
        struct hobbit_stats stats = stats_of(m);
        CHECK(stats.n_slots == 2 * slots && stats.n_cached == 0 && stats.evictions >= before);
        before = stats.evictions;
        CHECK_EQUAL(hobbit_model_settle(m), 0); /* and nothing is left of them */
        CHECK_EQUAL(use(m, 0, 0, slots), 0);
        CHECK_EQUAL(use(m, 0, 1, slots), 0);
    }
    CHECK(before > 0);
    hobbit_model_usage(m, counts);
    for (int i = 0; i < 2 * EXPERTS; i++) {
        sum += counts[i];
    }
    CHECK_EQUAL(sum, stats_of(m).hits + stats_of(m).misses);
    const struct hobbit_pool small = plain(1, 1);
    CHECK_EQUAL(hobbit_model_allocate(m, &small, 1, (int32_t[]) {0, 0}, err, sizeof err), HOBBIT_ARG);
    CHECK(hb_model_ready(m)); /* what is refused changes nothing */
    hobbit_model_close(m);
}

static void a_list_of_experts_is_checked(void) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    CHECK_EQUAL(warm(m, 0, (int32_t[]) {0}, 1), HOBBIT_ARG); /* no cache yet */
    CHECK_EQUAL(hobbit_model_settle(m), 0);
    hobbit_model_close(m);
    m = ready_model(HOBBIT_IO_AUTO, 2);
    CHECK_EQUAL(warm(m, 0, (int32_t[]) {0, EXPERTS}, 2), HOBBIT_ARG);
    CHECK_EQUAL(warm(m, 0, (int32_t[]) {-1}, 1), HOBBIT_ARG);
    CHECK_EQUAL(warm(m, 2, (int32_t[]) {0}, 1), HOBBIT_ARG);
    CHECK_EQUAL(warm(m, -1, (int32_t[]) {0}, 1), HOBBIT_ARG);
    usleep(1000); /* its threads have their buffers */
    atomic_store(&faults_allocation, 1);
    CHECK_EQUAL(warm(m, 0, (int32_t[]) {0}, 1), HOBBIT_NOMEM);
    atomic_store(&faults_allocation, 0);
    CHECK_EQUAL(warm(m, 0, NULL, 0), HOBBIT_OK);
    CHECK_EQUAL(hobbit_model_settle(m), 0);
    hobbit_model_close(m);
}

static void a_copy_asked_for_while_it_is_read_is_waited_for(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, EXPERTS);
    faults_pread = slow;
    CHECK_EQUAL(warm(m, 0, (int32_t[]) {3, 4}, 2), HOBBIT_OK);
    CHECK_EQUAL(use(m, 0, 4, 1), 0);
    CHECK_EQUAL(use(m, 0, 3, 1), 0);
    faults_pread = NULL;
    CHECK(hobbit_model_settle(m) == 0 && stats_of(m).read_bytes == 2 * HIGH_BYTES);
    hobbit_model_close(m);
}

static void reads_nobody_waits_for_do_not_stand_in_the_way(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, 2);
    faults_pread = slow;
    for (int i = 0; i < 3; i++) {
        hobbit_model_forget(m);
        CHECK_EQUAL(warm(m, 0, (int32_t[]) {0, 1}, 2), HOBBIT_OK); /* all slots are being read into */
        CHECK_EQUAL(use(m, 0, 2 + i, 2), 0);
    }
    faults_pread = NULL;
    settled(m);
    CHECK(is_cached(m, high(0, 4)) && is_cached(m, high(0, 5)));
    hobbit_model_close(m);
}

static void a_low_copy_in_use_stays(void) {
    struct hobbit_model *m = mixed_model(EXPERTS * 100000);
    CHECK_EQUAL(set_rule(m, 0.5f, 1, false), HOBBIT_OK);
    CHECK_EQUAL(use_copy(m, low(1)), 0);
    hb_model_lock(m);
    int32_t slot = look_up(m, low(1));
    hb_model_unlock(m);
    CHECK_EQUAL(warm(m, 0, (int32_t[]) {1}, 1), HOBBIT_OK);
    settled(m);
    CHECK(is_cached(m, high(0, 1)) && is_cached(m, low(1)) && slot_holds(m, low(1), slot));
    hb_model_lock(m);
    hb_model_release(m, low(1));
    hb_model_unlock(m);
    hobbit_model_close(m);
}

static void reading_ahead_ends_when_it_fails_or_is_forgotten_or_closed(void) {
    struct hobbit_model *m = ready_model(HOBBIT_IO_BUFFERED, EXPERTS);
    const int32_t all[] = {0, 1, 2, 3, 4, 5};
    faults_pread = fail;
    CHECK_EQUAL(warm(m, 0, all, EXPERTS), HOBBIT_OK);
    settled(m);
    faults_pread = NULL;
    hobbit_model_take_error(m, err, sizeof err);
    CHECK(stats_of(m).n_cached == 0 && err[0] == '\0');
    CHECK_EQUAL(use(m, 0, 0, 2), 0);
    faults_pread = slow;
    CHECK_EQUAL(warm(m, 1, all, EXPERTS), HOBBIT_OK);
    hobbit_model_forget(m);
    CHECK_EQUAL(warm(m, 0, all, EXPERTS), HOBBIT_OK);
    hobbit_model_close(m);
    faults_pread = NULL;
}

static void *keep_settling(void *model) {
    uint64_t counts[2 * EXPERTS];
    while (hobbit_model_settle(model) > 0) {
        hobbit_model_usage(model, counts);
        (void) stats_of(model);
        usleep(100);
    }
    return NULL;
}

static void computations_go_on_meanwhile(void) {
    const int32_t all[] = {5, 4, 3, 2, 1, 0};
    for (int32_t slots = 3; slots <= EXPERTS; slots++) {
        struct hobbit_model *m = ready_model(HOBBIT_IO_AUTO, slots);
        uint64_t seed = (uint64_t) slots;
        for (int round = 0; round < 5; round++) {
            pthread_t thread;
            hobbit_model_forget(m);
            CHECK_EQUAL(warm(m, round % 2, all, EXPERTS), HOBBIT_OK);
            CHECK_EQUAL(pthread_create(&thread, NULL, keep_settling, m), 0);
            for (int i = 0; i < 20; i++) {
                CHECK_EQUAL(use(m, (int32_t) check_random(&seed, 2), (int32_t) check_random(&seed, EXPERTS), 3), 0);
            }
            pthread_join(thread, NULL);
        }
        hobbit_model_close(m);
    }
}


static off_t read_at[8];
static int n_read;

static ssize_t note_offset(int fd, void *dst, size_t length, off_t offset) {
    CHECK(n_read < 8);
    read_at[n_read++] = offset;
    return faults_gated_pread(fd, dst, length, offset);
}

/* The only reader thread is held up in the first read of expert `e`, which nobody waits for. */
static void begin_in_background(struct hobbit_model *m, int32_t e) {
    n_read = 0;
    atomic_store(&faults_gate_open, false);
    atomic_store(&faults_pread_calls, 0);
    faults_pread = note_offset;
    CHECK_EQUAL(hb_model_choose(m, 0, e, HOBBIT_HIGH), HOBBIT_LOW);
    hb_model_settle(m);
    faults_await_preads(1);
}

static void take_high(struct hobbit_model *m, int32_t e) {
    struct hb_arrival a = hb_model_arrival(m, true);
    CHECK(a.key.expert == e && !a.failed && slot_holds(m, high(0, e), a.slot));
    hb_model_release(m, a.key);
}

static off_t offset_of(int matrix, int32_t e) {
    return (off_t) (matrices[matrix].offset + (uint64_t) e * matrices[matrix].expert_bytes);
}

/* Group 0 alone, with room for all copies, and one reader thread. */
static struct hobbit_model *low_model(void) {
    const struct hobbit_matrix of_a[] = {matrices[0], matrices[1], matrices[3], matrices[4]};
    struct hobbit_options options = describe(HOBBIT_IO_BUFFERED);
    options.matrices = of_a, options.n_matrices = 4, options.n_groups = 1, options.io_threads = 1;
    struct hobbit_model *m = open_described(options);
    uint64_t h = hobbit_model_slot_bytes(m, 0, HOBBIT_HIGH), l = hobbit_model_slot_bytes(m, 0, HOBBIT_LOW);
    const struct hobbit_pool pool = {.bytes = EXPERTS * (h + l), .slot_bytes = {h, l}, .n_slots = {EXPERTS, EXPERTS}};
    CHECK_EQUAL(hobbit_model_allocate(m, &pool, 1, (int32_t[]) {0}, err, sizeof err), HOBBIT_OK);
    return m;
}

static void low_copies_that_are_read_ahead_are_kept_too(void) {
    struct hobbit_model *m = low_model();
    faults_pread = slow;
    hb_model_lock(m);
    CHECK(!hb_model_expect(m, 0, 1, (int32_t[]) {3}, (int32_t[]) {HOBBIT_LOW}, (float[]) {1}));
    hb_model_unlock(m);
    CHECK_EQUAL(hobbit_model_keep_low(m, err, sizeof err), HOBBIT_OK);
    faults_pread = NULL;
    CHECK_EQUAL(stats_of(m).n_cached, EXPERTS);
    hobbit_model_forget(m);
    CHECK_EQUAL(stats_of(m).n_cached, EXPERTS);
    hobbit_model_close(m);
}

static void what_is_waited_for_goes_before_the_background(void) {
    struct hobbit_model *m = low_model();
    CHECK_EQUAL(hobbit_model_keep_low(m, err, sizeof err), HOBBIT_OK);
    hb_model_lock(m);
    begin_in_background(m, 1);
    CHECK(fetch(m, high(0, 2)));
    atomic_store(&faults_gate_open, true);
    take_high(m, 2);
    CHECK_EQUAL(hb_model_arrival(m, true).key.expert, -1); /* the other is in, and no arrival */
    CHECK(hb_model_has(m, high(0, 1)));
    CHECK(n_read == 4 && read_at[0] == offset_of(0, 1) && read_at[1] == offset_of(0, 2) &&
          read_at[2] == offset_of(1, 2) && read_at[3] == offset_of(1, 1));
    begin_in_background(m, 3);
    CHECK(fetch(m, high(0, 3))); /* after all */
    CHECK(fetch(m, high(0, 4)));
    atomic_store(&faults_gate_open, true);
    take_high(m, 3);
    take_high(m, 4);
    CHECK(n_read == 4 && read_at[0] == offset_of(0, 3) && read_at[1] == offset_of(1, 3) &&
          read_at[2] == offset_of(0, 4) && read_at[3] == offset_of(1, 4));
    begin_in_background(m, 5);
    hb_model_withdraw(m);
    atomic_store(&faults_gate_open, true);
    CHECK_EQUAL(hb_model_arrival(m, true).key.expert, -1);
    CHECK(n_read == 1 && !hb_model_has(m, high(0, 5)));
    hb_model_unlock(m);
    faults_pread = NULL;
    hobbit_model_close(m);
}

/* --- what is expected of the layers to come --- */

/* Both groups in one pool of so many slots, a quarter of which may be expected. */
static struct hobbit_model *one_pool_model(int32_t slots) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    const struct hobbit_pool pool = plain(slots, hobbit_model_slot_bytes(m, 0, HOBBIT_HIGH));
    CHECK_EQUAL(hobbit_model_allocate(m, &pool, 1, (int32_t[]) {0, 0}, err, sizeof err), HOBBIT_OK);
    return m;
}

/* Without using it. */
static bool has(struct hobbit_model *m, struct hb_key key) {
    hb_model_lock(m);
    bool cached = hb_model_has(m, key);
    hb_model_unlock(m);
    return cached;
}

/* High copies; whether all are cached. */
static bool expect(struct hobbit_model *m, int32_t group, const int32_t *experts, int32_t n) {
    const int32_t precisions[EXPERTS] = {HOBBIT_HIGH};
    const float odds[EXPERTS] = {1, 1, 1, 1, 1, 1};
    hb_model_lock(m);
    bool cached = hb_model_expect(m, group, n, experts, precisions, odds);
    hb_model_unlock(m);
    return cached;
}

static void give_up(struct hobbit_model *m, int32_t group) {
    hb_model_lock(m);
    hb_model_give_up(m, group);
    hb_model_unlock(m);
}

static void begin(struct hobbit_model *m, int32_t group) {
    hb_model_lock(m);
    hb_model_begin(m, group, 1, 1);
    hb_model_unlock(m);
}

/* In the slot that an earlier read ahead of the same low copy had. */
static void a_low_copy_that_comes_with_its_high_one_is_no_read_of_its_own(void) {
    const struct hobbit_matrix nested[] = {
        {.name = "n.up", .file = 0, .ne0 = 32, .ne1 = 64, .offset = 4096, .expert_bytes = 64 * 34, .plane_bytes = 64 * 16},
        {.name = "n.up", .precision = HOBBIT_LOW, .file = 0, .ne0 = 32, .ne1 = 64, .offset = 65536,
         .expert_bytes = 64 * 20},
    };
    struct hobbit_options options = describe(HOBBIT_IO_BUFFERED);
    options.matrices = nested, options.n_matrices = 2, options.n_groups = 1;
    struct hobbit_model *m = open_described(options);
    uint64_t h = hobbit_model_slot_bytes(m, 0, HOBBIT_HIGH), l = hobbit_model_slot_bytes(m, 0, HOBBIT_LOW);
    const struct hobbit_pool pool = {.bytes = EXPERTS * (h + l), .slot_bytes = {h, l}, .n_slots = {EXPERTS, EXPERTS}};
    CHECK_EQUAL(hobbit_model_allocate(m, &pool, 1, (int32_t[]) {0}, err, sizeof err), HOBBIT_OK);
    hb_model_lock(m);
    CHECK(!hb_model_expect(m, 0, 1, (int32_t[]) {0}, (int32_t[]) {HOBBIT_LOW}, (float[]) {1}));
    hb_model_unlock(m);
    settled(m);
    CHECK(is_cached(m, low(0)));
    hobbit_model_forget(m);
    CHECK(!is_cached(m, low(0)));
    hb_model_lock(m);
    int32_t slot = -1;
    CHECK_EQUAL(hb_model_fetch(m, high(0, 0), &slot), HB_FETCH_STARTED);
    CHECK_EQUAL(hb_model_fetch(m, low(0), &slot), HB_FETCH_WAIT);
    struct hb_arrival a = hb_model_arrival(m, true);
    CHECK(!a.failed && a.key.precision == HOBBIT_HIGH && hb_model_arrival(m, true).key.expert == -1);
    CHECK(!hb_model_has(m, low(0))); /* beside the high one it is of no use */
    hb_model_release(m, high(0, 0));
    hb_model_unlock(m);
    hobbit_model_close(m);
}

static void what_is_expected_is_protected_until_its_layer_begins(void) {
    for (int how = 0; how < 3; how++) {
        struct hobbit_model *m = one_pool_model(8);
        begin(m, 0);
        CHECK_EQUAL(use(m, 1, 0, 2), 0); /* the oldest */
        CHECK_EQUAL(use(m, 0, 0, 6), 0);
        CHECK(expect(m, 1, (int32_t[]) {0, 1}, 2));
        CHECK(expect(m, 1, (int32_t[]) {1, 0}, 2)); /* once is enough */
        CHECK_EQUAL(use(m, 1, 2, 4), 0);
        CHECK(has(m, high(1, 0)) && has(m, high(1, 1)));
        CHECK(!has(m, high(0, 0)) && !has(m, high(0, 3)) && has(m, high(0, 4)));
        if (how == 0) {
            begin(m, 1);
        } else {
            give_up(m, how == 1 ? 1 : -1);
        }
        CHECK_EQUAL(use(m, 0, 0, 4), 0); /* as the oldest they go first now */
        CHECK(!has(m, high(1, 0)) && !has(m, high(1, 1)));
        CHECK(stats_of(m).ahead == 0);
        hobbit_model_close(m);
    }
}

static void what_was_being_read_is_not_cached_after_forgetting(void) {
    struct hobbit_model *m = one_pool_model(4);
    CHECK(!expect(m, 0, (int32_t[]) {3}, 1));
    while (stats_of(m).read_bytes < HIGH_BYTES) { /* read, and not taken in */
        usleep(100);
    }
    hobbit_model_forget(m);
    CHECK_EQUAL(hobbit_model_settle(m), 0);
    CHECK(!has(m, high(0, 3)) && stats_of(m).n_cached == 0);
    hobbit_model_close(m);
}

static void what_is_expected_of_another_layer_stays(void) {
    struct hobbit_model *m = one_pool_model(8);
    CHECK_EQUAL(use(m, 0, 0, 1), 0);
    CHECK_EQUAL(use(m, 1, 0, 1), 0);
    CHECK(expect(m, 0, (int32_t[]) {0}, 1) && expect(m, 1, (int32_t[]) {0}, 1));
    give_up(m, 1);
    CHECK_EQUAL(use(m, 0, 1, 5), 0);
    CHECK_EQUAL(use(m, 1, 1, 3), 0);
    CHECK(has(m, high(0, 0)) && !has(m, high(1, 0)));
    begin(m, 1);
    CHECK_EQUAL(use(m, 1, 1, 5), 0);
    CHECK(has(m, high(0, 0)));
    begin(m, 0); /* another pass: nothing that was expected of the last one holds */
    CHECK_EQUAL(use(m, 1, 0, 6), 0);
    CHECK_EQUAL(use(m, 0, 1, 5), 0);
    CHECK(!has(m, high(0, 0)));
    hobbit_model_close(m);
}

static void what_is_missing_is_read_ahead(void) {
    struct hobbit_model *m = one_pool_model(8);
    CHECK(!expect(m, 1, (int32_t[]) {3, 5}, 2));
    settled(m);
    CHECK(has(m, high(1, 3)) && has(m, high(1, 5)) && stats_of(m).ahead == 2);
    CHECK(expect(m, 1, (int32_t[]) {3, 5}, 2));
    give_up(m, 1); /* what has arrived stays */
    CHECK_EQUAL(use(m, 1, 3, 1), 0);
    struct hobbit_stats stats = stats_of(m);
    CHECK(stats.hits == 1 && stats.misses == 0 && stats.ahead_used == 1 && stats.ahead_bytes == 2 * 3001);
    CHECK_EQUAL(use(m, 0, 0, 6), 0);
    CHECK_EQUAL(use(m, 1, 0, 2), 0);
    CHECK(!has(m, high(1, 5))); /* in vain */
    CHECK_EQUAL(stats_of(m).ahead_wasted_bytes, 3001);
    hobbit_model_close(m);
}

static void a_share_of_the_cache_is_expected_at_most(void) {
    struct hobbit_model *m = one_pool_model(8);
    CHECK(!expect(m, 1, (int32_t[]) {0, 1, 2, 3}, 4));
    settled(m);
    CHECK(stats_of(m).ahead == 2 && !has(m, high(1, 2)));
    hobbit_model_close(m);
    m = one_pool_model(3);
    CHECK(!expect(m, 1, (int32_t[]) {0}, 1));
    settled(m);
    CHECK(stats_of(m).ahead == 0 && stats_of(m).n_cached == 0);
    hobbit_model_close(m);
}

static void a_read_that_is_given_up_frees_its_slot(void) {
    struct hobbit_model *m = one_pool_model(8);
    atomic_store(&faults_gate_open, false);
    atomic_store(&faults_pread_calls, 0);
    faults_pread = faults_gated_pread;
    CHECK(!expect(m, 0, (int32_t[]) {3, 4}, 2));
    faults_await_preads(2); /* both threads read the first copy, of which nothing is left to drop */
    give_up(m, 0);
    atomic_store(&faults_gate_open, true);
    settled(m);
    faults_pread = NULL;
    CHECK(has(m, high(0, 3)) && !has(m, high(0, 4)));
    CHECK_EQUAL(use(m, 1, 0, 6), 0);
    CHECK_EQUAL(use(m, 0, 5, 1), 0);
    struct hobbit_stats stats = stats_of(m);
    CHECK(stats.n_cached == 8 && stats.evictions == 0);
    CHECK(stats.ahead == 2 && stats.ahead_used == 0 && stats.ahead_bytes == HIGH_BYTES);
    CHECK_EQUAL(use(m, 0, 4, 1), 0); /* as if it had not been expected */
    CHECK_EQUAL(stats_of(m).evictions, 1);
    hobbit_model_close(m);
}

static void a_demand_takes_over_a_read_ahead(void) {
    struct hobbit_model *m = one_pool_model(4);
    atomic_store(&faults_gate_open, false);
    atomic_store(&faults_pread_calls, 0);
    faults_pread = faults_gated_pread;
    CHECK(!expect(m, 0, (int32_t[]) {3}, 1));
    faults_await_preads(1);
    hb_model_lock(m);
    CHECK_EQUAL(look_up(m, high(0, 3)), -1);
    CHECK(fetch(m, high(0, 3)));
    hb_model_give_up(m, 0); /* too late: it is waited for */
    atomic_store(&faults_gate_open, true);
    take_high(m, 3);
    CHECK_EQUAL(hb_model_arrival(m, true).key.expert, -1);
    hb_model_unlock(m);
    faults_pread = NULL;
    struct hobbit_stats stats = stats_of(m);
    CHECK(stats.misses == 1 && stats.ahead_used == 1 && stats.read_bytes == HIGH_BYTES);
    CHECK_EQUAL(stats.ahead_wasted_bytes, 0);
    hobbit_model_close(m);
}

/* With as few slots as a layer needs there is always room for it, whatever is expected and being read. */
static void expectations_never_starve_a_demand(void) {
    faults_pread = slow;
    struct hobbit_model *m = one_pool_model(4);
    for (int32_t i = 0; i < 6; i++) {
        begin(m, i % 2);
        CHECK_EQUAL(use(m, i % 2, i, 4), 0);
        give_up(m, i % 2);
        (void) expect(m, 1 - i % 2, (int32_t[]) {(i + 4) % EXPERTS, i % EXPERTS}, 2);
    }
    faults_pread = NULL;
    hobbit_model_close(m);
    m = one_pool_model(5);
    uint64_t seed = 7;
    for (int32_t i = 0; i < 300; i++) {
        const int32_t next[] = {(int32_t) check_random(&seed, EXPERTS), (int32_t) check_random(&seed, EXPERTS)};
        begin(m, i % 2);
        CHECK_EQUAL(use(m, i % 2, (int32_t) check_random(&seed, EXPERTS), 5), 0);
        give_up(m, i % 2);
        (void) expect(m, 1 - i % 2, next, 2);
        if (i % 50 == 49) {
            hobbit_model_forget(m);
        }
    }
    CHECK(stats_of(m).ahead > 0);
    hobbit_model_close(m);
}

/* --- predictors --- */

static struct hobbit_prediction prediction_of(int32_t kind) {
    return (struct hobbit_prediction) {.kind = kind, .depth = 2, .n_embd = 8, .least_odds = 0.5f, .map_capacity = 4};
}

static int32_t set_prediction(struct hobbit_model *m, struct hobbit_prediction prediction) {
    return hobbit_model_set_prediction(m, &prediction, err, sizeof err);
}

static void *watch_predictor(void *model) {
    int32_t kind;
    do {
        kind = stats_of(model).predictor;
        CHECK(kind == HOBBIT_PREDICT_GATE || kind == HOBBIT_PREDICT_NONE);
    } while (kind != HOBBIT_PREDICT_NONE);
    return NULL;
}

/* While one thread computes, another may ask which predictor is in force. */
static void the_predictor_in_force_is_told_meanwhile(void) {
    struct hobbit_model *m = one_pool_model(4);
    struct hobbit_prediction p = prediction_of(HOBBIT_PREDICT_GATE);
    CHECK_EQUAL(set_prediction(m, p), HOBBIT_OK);
    CHECK_EQUAL(stats_of(m).predictor, HOBBIT_PREDICT_GATE); /* it leads, as it has to learn */
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, watch_predictor, m), 0);
    for (int32_t i = 0; stats_of(m).predictor == HOBBIT_PREDICT_GATE; i++) {
        CHECK(i < 1000);
        begin(m, 1);
        begin(m, 0);
    }
    pthread_join(thread, NULL);
    hobbit_model_close(m);
}

static void predictions_that_make_no_sense_are_refused(void) {
    static const int32_t n_experts[] = {EXPERTS, EXPERTS};
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    uint64_t bytes[HOBBIT_PREDICT_AUTO + 1];
    for (int32_t kind = HOBBIT_PREDICT_NONE; kind <= HOBBIT_PREDICT_AUTO; kind++) {
        struct hobbit_prediction p = prediction_of(kind);
        CHECK_EQUAL(set_prediction(m, p), HOBBIT_OK);
        CHECK_EQUAL(hb_model_forecast(m) != NULL, kind == HOBBIT_PREDICT_GATE || kind == HOBBIT_PREDICT_AUTO);
        CHECK_EQUAL(hb_model_map_predictor(m) != NULL, kind == HOBBIT_PREDICT_MAP || kind == HOBBIT_PREDICT_AUTO);
        bytes[kind] = hobbit_prediction_bytes(&p, 2, n_experts);
    }
    CHECK_EQUAL(bytes[HOBBIT_PREDICT_NONE], 0);
    CHECK_EQUAL(bytes[HOBBIT_PREDICT_AUTO], bytes[HOBBIT_PREDICT_GATE] + bytes[HOBBIT_PREDICT_MAP]);
    CHECK_EQUAL(bytes[HOBBIT_PREDICT_MAP], hb_map_predictor_bytes(2, n_experts, 8, 4, 2));
    for (int bad = 0; bad < 8; bad++) {
        struct hobbit_prediction p = prediction_of(bad == 7 ? HOBBIT_PREDICT_AUTO : HOBBIT_PREDICT_MAP);
        p.always = bad == 7; /* of whichever is fastest */
        p.kind = bad == 0 ? -1 : bad == 1 ? HOBBIT_PREDICT_AUTO + 1 : p.kind;
        p.depth = bad == 2 ? 0 : bad == 3 ? HB_FORECAST_DEPTH + 1 : p.depth;
        p.n_embd = bad == 4 ? 0 : p.n_embd;
        p.least_odds = bad == 5 ? NAN : p.least_odds;
        p.map_capacity = bad == 6 ? 0 : p.map_capacity;
        CHECK_EQUAL(set_prediction(m, p), HOBBIT_ARG);
        CHECK_TEXT(err, "makes no sense");
        CHECK(hb_model_forecast(m) != NULL && hb_model_map_predictor(m) != NULL); /* as it was */
    }
    hobbit_model_close(m);
}

static void every_failure_to_predict_is_undone(void) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    usleep(1000); /* its threads have their buffers */
    int n = 0;
    for (int32_t status = HOBBIT_NOMEM; status == HOBBIT_NOMEM; n++) {
        atomic_store(&faults_allocation, n + 1);
        status = set_prediction(m, prediction_of(HOBBIT_PREDICT_AUTO));
        atomic_store(&faults_allocation, 0);
        CHECK(status == HOBBIT_NOMEM ? hb_model_map_predictor(m) == NULL : status == HOBBIT_OK);
    }
    CHECK(n > 6);
    hobbit_model_close(m);
}

/* A token for which the first expert is the likeliest. */
static void add_map(struct hobbit_model *m) {
    static const float matrix[EXPERTS] = {1};
    struct hb_router router = {.matrix = matrix, .n_embd = 1, .n_expert = EXPERTS, .n_used = 1};
    hb_map_predictor_begin(hb_model_map_predictor(m), true, &router, NULL);
    hb_map_predictor_observe(hb_model_map_predictor(m), 0, &router, (float[]) {2});
    hb_map_predictor_end(hb_model_map_predictor(m));
}

static struct hobbit_model *mapped_model(int32_t capacity) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    struct hobbit_prediction p = prediction_of(HOBBIT_PREDICT_MAP);
    p.map_capacity = capacity;
    CHECK_EQUAL(set_prediction(m, p), HOBBIT_OK);
    return m;
}

static const uint8_t identity[HB_MAPS_IDENTITY] = {7}, other_identity[HB_MAPS_IDENTITY] = {8};

static int32_t load_maps(struct hobbit_model *m, const char *path, const uint8_t *whose, int32_t expected) {
    err[0] = '\0';
    CHECK_EQUAL(hobbit_model_load_maps(m, path, whose, err, sizeof err), expected);
    CHECK(expected == HOBBIT_OK || strstr(err, path) != NULL);
    return hb_maps_count(hb_map_predictor_maps(hb_model_map_predictor(m)));
}

static void maps_are_kept(void) {
    const char *path = file_make(1);
    struct hobbit_model *m = mapped_model(4);
    CHECK_EQUAL(load_maps(m, path, identity, HOBBIT_FORMAT), 0);
    CHECK_EQUAL(unlink(path), 0);
    CHECK_EQUAL(load_maps(m, path, identity, HOBBIT_IO), 0);
    CHECK_EQUAL(hobbit_model_save_maps(m, path, identity, err, sizeof err), HOBBIT_OK);
    CHECK(access(path, F_OK) != 0); /* there was nothing to keep */
    add_map(m);
    add_map(m);
    CHECK_EQUAL(hobbit_model_save_maps(m, path, identity, err, sizeof err), HOBBIT_OK);
    hobbit_model_close(m);
    m = mapped_model(4);
    CHECK_EQUAL(load_maps(m, path, identity, HOBBIT_OK), 2);
    CHECK_EQUAL(unlink(path), 0);
    CHECK_EQUAL(hobbit_model_save_maps(m, path, identity, err, sizeof err), HOBBIT_OK);
    CHECK(access(path, F_OK) != 0); /* nothing new */
    add_map(m);
    CHECK_EQUAL(hobbit_model_save_maps(m, path, identity, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(load_maps(m, path, other_identity, HOBBIT_FORMAT), 0);
    CHECK_EQUAL(load_maps(m, path, identity, HOBBIT_OK), 3);
    hobbit_model_close(m);
    m = mapped_model(5);
    CHECK_EQUAL(load_maps(m, path, identity, HOBBIT_FORMAT), 0);
    add_map(m);
    CHECK_EQUAL(hobbit_model_save_maps(m, "no/such/folder", identity, err, sizeof err), HOBBIT_IO);
    CHECK_TEXT(err, "no/such/folder: No such file");
    hobbit_model_close(m);
}

static void without_a_predictor_there_are_no_maps_to_keep(void) {
    struct hobbit_model *m = open_model(HOBBIT_IO_AUTO);
    CHECK_EQUAL(hobbit_model_load_maps(m, "none", identity, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(hobbit_model_save_maps(m, "none", identity, err, sizeof err), HOBBIT_OK);
    CHECK(access("none", F_OK) != 0);
    hobbit_model_close(m);
}

int main(void) {
    for (int i = 0; i < 2; i++) {
        files[i] = (struct hobbit_file) {file_make(FILE_SIZE), FILE_SIZE};
        paths[i] = files[i].path;
    }
    RUN(the_description_is_checked);
    RUN(the_arena_is_checked);
    RUN(the_arena_has_room_for_low_copies);
    RUN(experts_arrive_byte_by_byte);
    RUN(counters_tell_what_happened);
    RUN(pinned_experts_keep_their_slots);
    RUN(a_copy_is_read_once_and_pinned_by_all_who_ask);
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
    RUN(a_trace_is_begun_and_ended);
    RUN(a_trace_in_the_file_of_the_one_before_is_whole);
    RUN(both_copies_arrive_byte_by_byte);
    RUN(a_better_copy_that_is_cached_is_chosen);
    RUN(what_is_under_way_is_not_yet_cached);
    RUN(promotion_takes_the_low_copys_place);
    RUN(low_copies_are_counted);
    RUN(rules_that_make_no_sense_are_refused);
    RUN(rules_replace_one_another);
    RUN(forgetting_drops_what_is_not_in_use);
    RUN(memory_goes_with_the_copies);
    RUN(uses_are_counted);
    RUN(what_there_is_room_for_is_read_in_order);
    RUN(another_arena_takes_the_place_of_one);
    RUN(a_list_of_experts_is_checked);
    RUN(a_copy_asked_for_while_it_is_read_is_waited_for);
    RUN(reads_nobody_waits_for_do_not_stand_in_the_way);
    RUN(a_low_copy_in_use_stays);
    RUN(reading_ahead_ends_when_it_fails_or_is_forgotten_or_closed);
    RUN(computations_go_on_meanwhile);

    RUN(low_copies_that_are_read_ahead_are_kept_too);
    RUN(what_is_waited_for_goes_before_the_background);
    RUN(what_is_expected_is_protected_until_its_layer_begins);
    RUN(a_low_copy_that_comes_with_its_high_one_is_no_read_of_its_own);
    RUN(what_was_being_read_is_not_cached_after_forgetting);
    RUN(what_is_expected_of_another_layer_stays);
    RUN(what_is_missing_is_read_ahead);
    RUN(a_share_of_the_cache_is_expected_at_most);
    RUN(a_read_that_is_given_up_frees_its_slot);
    RUN(a_demand_takes_over_a_read_ahead);
    RUN(expectations_never_starve_a_demand);
    RUN(the_predictor_in_force_is_told_meanwhile);
    RUN(predictions_that_make_no_sense_are_refused);
    RUN(every_failure_to_predict_is_undone);
    RUN(maps_are_kept);
    RUN(without_a_predictor_there_are_no_maps_to_keep);
    return 0;
}
