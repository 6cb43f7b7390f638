/* Description: a routing trace is what was written, byte for byte, and a file that cannot be written is an error. */
#include "trace.h"

#include <errno.h>
#include <math.h>

#include "faults.h"
#include "files.h"

static const struct hobbit_pool pools[] = {{.bytes = 1 << 20, .slot_bytes = {8192, 4096}, .n_slots = {3, 5}},
                                           {.bytes = 7, .slot_bytes = {7, 0}, .n_slots = {1, 0}}};
static const struct hb_trace_group groups[] = {
    {.layer = 1, .n_expert = 256, .pool = 0, .expert_bytes = {8000, 4000}, .slot_bytes = {8192, 4096}},
    {.layer = 2, .n_expert = 257, .pool = 1, .expert_bytes = {5, 0}, .slot_bytes = {7, 0}},
};
static const struct hb_trace_head head = {
    .note = "{\"a\":1}", .flags = HOBBIT_TRACE_PROBS, .pools = pools, .groups = groups, .n_pools = 2, .n_groups = 2};

/* --- what the file holds, read by what docs/trace.md says --- */

static struct {
    uint8_t *data;
    size_t size, at;
} in;

static void read_back(const char *path) {
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL && fseek(file, 0, SEEK_END) == 0);
    in.size = (size_t) ftell(file);
    in.at = 0;
    rewind(file);
    in.data = malloc(in.size);
    CHECK(in.data != NULL && fread(in.data, 1, in.size, file) == in.size && fclose(file) == 0);
}

static uint64_t number(int bytes) {
    uint64_t value = 0;
    CHECK(in.at + (size_t) bytes <= in.size);
    for (int i = 0; i < bytes; i++) {
        value |= (uint64_t) in.data[in.at++] << (8 * i);
    }
    return value;
}

static uint64_t varint(void) {
    uint64_t value = 0, byte = 0x80;
    for (int shift = 0; byte >= 0x80; shift += 7) {
        byte = number(1);
        value |= (byte & 0x7f) << shift;
    }
    return value;
}

static float real(void) {
    uint32_t bits = (uint32_t) number(4);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void check_head(void) {
    CHECK(in.size > 8 && memcmp(in.data, "HBTRACE1", 8) == 0);
    in.at = 8;
    CHECK_EQUAL(number(4), HOBBIT_TRACE_PROBS);
    CHECK_EQUAL(number(4), 7);
    CHECK(memcmp(in.data + in.at, head.note, 7) == 0);
    in.at += 7;
    CHECK_EQUAL(number(4), 2);
    CHECK_EQUAL(number(4), 2);
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(number(8), pools[i].bytes);
        for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
            CHECK_EQUAL(number(8), pools[i].slot_bytes[p]);
            CHECK_EQUAL(number(4), pools[i].n_slots[p]);
        }
    }
    for (int g = 0; g < 2; g++) {
        CHECK_EQUAL(number(4), groups[g].layer);
        CHECK_EQUAL(number(4), groups[g].n_expert);
        CHECK_EQUAL(number(4), groups[g].pool);
        for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
            CHECK_EQUAL(number(8), groups[g].expert_bytes[p]);
            CHECK_EQUAL(number(8), groups[g].slot_bytes[p]);
        }
    }
}

static void check_end(uint64_t n_events) {
    CHECK_EQUAL(number(1), 0);
    CHECK_EQUAL(number(8), n_events);
    CHECK_EQUAL(in.at, in.size);
    free(in.data);
}

/* The event's fields up to the experts. */
static void check_layer(int kind, const struct hb_trace_layer *l, int64_t sequence, int64_t first) {
    CHECK_EQUAL(number(1), kind);
    CHECK_EQUAL(varint(), l->group);
    CHECK_EQUAL(varint(), l->n_rows);
    CHECK_EQUAL(varint(), l->n_used);
    CHECK_EQUAL(varint(), sequence);
    CHECK_EQUAL(varint(), first);
    for (int64_t i = 0; i < l->n_rows * l->n_used; i++) {
        CHECK_EQUAL(number(groups[l->group].n_expert > 256 ? 2 : 1), l->experts[i]);
    }
}

/* --- tests --- */

static void every_kind_of_event_is_written(void) {
    const char *path = file_make(1);
    struct hb_trace *t = hb_trace_create(path, &head);
    CHECK(t != NULL && hb_trace_flags(t) == HOBBIT_TRACE_PROBS);
    static const int32_t experts[] = {255, 0, 3, 7, 256, 1};
    static const float weights[] = {0.5f, -0.25f, 1e-30f, INFINITY};
    static uint16_t probs[2 * 257];
    for (int i = 0; i < 2 * 257; i++) {
        probs[i] = (uint16_t) (i * 127);
    }
    const struct hb_trace_layer first = {.group = 0, .n_used = 2, .n_rows = 2, .experts = experts, .weights = weights};
    const struct hb_trace_layer second = {.group = 1, .n_used = 1, .n_rows = 2, .experts = experts + 4,
                                          .probs = probs};
    const struct hb_trace_layer listed = {.group = 0, .n_used = 1, .n_rows = 2, .experts = experts,
                                          .sequences = (int32_t[]) {3, 0}, .tokens = (int32_t[]) {300, 4}};
    CHECK(hb_trace_layer(t, &first) && hb_trace_layer(t, &second) && hb_trace_forget(t));
    CHECK(hb_trace_sequence(t, 200) && hb_trace_layer(t, &listed));
    CHECK(hb_trace_predicted(t, 1, 2, experts + 4, weights) && hb_trace_close(t));

    read_back(path);
    check_head();
    check_layer(0x11, &first, 0, 0);
    for (int i = 0; i < 4; i++) {
        CHECK(real() == weights[i]);
    }
    check_layer(0x21, &second, 0, 0);
    for (int i = 0; i < 2 * 257; i++) {
        CHECK_EQUAL(number(2), probs[i]);
    }
    CHECK_EQUAL(number(1), 4);
    CHECK_EQUAL(number(1), 2);
    CHECK_EQUAL(varint(), 200);
    static const int expected[] = {0x41, 0, 2, 1, 3, 300 % 128 + 128, 300 / 128, 0, 4, 255, 0};
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++) {
        CHECK_EQUAL(number(1), expected[i]);
    }
    CHECK_EQUAL(number(1), 3);
    CHECK_EQUAL(varint(), 1);
    CHECK_EQUAL(varint(), 2);
    CHECK(number(2) == 256 && number(2) == 1 && real() == 0.5f && real() == -0.25f);
    check_end(6);
}

static void tokens_are_counted(void) {
    static const struct {
        int32_t group, n_rows, first; /* n_rows -1: a sequence begins */
    } steps[] = {{0, 4, 0}, {1, 4, 0}, {0, 3, 4}, {1, 1, 6}, {0, 1, 7}, {0, 1, 7}, {1, 0, 8}, {0, 2, 8},
                 {0, -1, 0}, {0, 2, 0}, {1, 2, 0}, {1, 2, 0}, {0, 1, 2}};
    static const int32_t experts[8];
    const char *path = file_make(1);
    struct hb_trace *t = hb_trace_create(path, &head);
    enum { N = sizeof steps / sizeof steps[0] };
    for (int i = 0; i < N; i++) {
        CHECK(steps[i].n_rows < 0 ? hb_trace_sequence(t, 5)
                                  : hb_trace_layer(t, &(struct hb_trace_layer) {.group = steps[i].group, .n_used = 2,
                                                        .n_rows = steps[i].n_rows, .experts = experts}));
    }
    CHECK(hb_trace_close(t));
    read_back(path);
    check_head();
    for (int i = 0, sequence = 0; i < N; i++) {
        if (steps[i].n_rows < 0) {
            CHECK_EQUAL(number(1), 2);
            sequence = (int) varint();
            continue;
        }
        const struct hb_trace_layer l = {.group = steps[i].group, .n_used = 2, .n_rows = steps[i].n_rows,
                                         .experts = experts};
        check_layer(1, &l, sequence, steps[i].first);
    }
    check_end(N);
}

/* With a single group each event is a ubatch. */
static void tokens_of_one_layer_are_counted(void) {
    struct hb_trace_head one = head;
    one.n_groups = 1;
    const char *path = file_make(1);
    struct hb_trace *t = hb_trace_create(path, &one);
    const struct hb_trace_layer l = {.n_used = 1, .n_rows = 3, .experts = (int32_t[]) {1, 2, 3}};
    CHECK(hb_trace_layer(t, &l) && hb_trace_layer(t, &l) && hb_trace_close(t));
    read_back(path);
    in.at = in.size - 9 - 9; /* the last event, and the end */
    check_layer(1, &l, 0, 3);
    check_end(2);
}

/* More than the buffer holds, in one event and in many; and no memory is asked for. */
static void long_traces_are_whole(void) {
    enum { ROWS = 40000, EVENTS = 20 };
    static int32_t experts[ROWS];
    static float weights[ROWS];
    for (int i = 0; i < ROWS; i++) {
        experts[i] = i * 7 % 257;
        weights[i] = (float) i;
    }
    const char *path = file_make(1);
    struct hb_trace *t = hb_trace_create(path, &head);
    struct hb_trace_layer l = {.group = 1, .n_used = 1, .experts = experts, .weights = weights};
    atomic_store(&faults_allocation, 1);
    for (int i = 0; i < EVENTS; i++) {
        l.n_rows = ROWS - i;
        CHECK(hb_trace_layer(t, &l));
    }
    CHECK(hb_trace_close(t));
    CHECK_EQUAL(atomic_exchange(&faults_allocation, 0), 1);
    read_back(path);
    check_head();
    for (int i = 0; i < EVENTS; i++) {
        l.n_rows = ROWS - i;
        check_layer(0x11, &l, 0, i); /* a group in a row is one ubatch, of as many rows as the largest */
        for (int64_t j = 0; j < l.n_rows; j++) {
            CHECK(real() == weights[j]);
        }
    }
    check_end(EVENTS);
}

static void a_full_disk_is_an_error(void) {
    struct hb_trace *t = hb_trace_create("/dev/full", &head);
    if (t == NULL) {
        return; /* the system has no such file */
    }
    static const int32_t experts[1000];
    const struct hb_trace_layer l = {.group = 1, .n_used = 1, .n_rows = 1000, .experts = experts};
    int n = 0;
    while (n < 1000 && hb_trace_layer(t, &l)) {
        n++;
    }
    CHECK(n > 100 && n < 1000);
    CHECK_EQUAL(errno, ENOSPC);
    errno = 0;
    CHECK(!hb_trace_layer(t, &l) && errno == ENOSPC);
    CHECK(!hb_trace_forget(t) && !hb_trace_sequence(t, 1) && !hb_trace_predicted(t, 0, 0, NULL, NULL));
    errno = 0;
    CHECK(!hb_trace_close(t) && errno == ENOSPC);
    t = hb_trace_create("/dev/full", &head); /* what is buffered is missed at the end */
    CHECK(hb_trace_layer(t, &l) && !hb_trace_close(t) && errno == ENOSPC);
}

static void what_cannot_be_made_is_an_error(void) {
    int before = files_open();
    CHECK(hb_trace_create("no/such/folder", &head) == NULL && errno == ENOENT);
    CHECK(hb_trace_create(".", &head) == NULL && errno == EISDIR);
    atomic_store(&faults_allocation, 1);
    CHECK(hb_trace_create("unmade", &head) == NULL && errno == ENOMEM);
    CHECK(fopen("unmade", "rb") == NULL);
    CHECK(hb_trace_close(NULL));
    CHECK_EQUAL(files_open(), before);
}

int main(void) {
    RUN(every_kind_of_event_is_written);
    RUN(tokens_are_counted);
    RUN(tokens_of_one_layer_are_counted);
    RUN(long_traces_are_whole);
    RUN(a_full_disk_is_an_error);
    RUN(what_cannot_be_made_is_an_error);
    return 0;
}
