/* Description: the reader brings every byte to its place, whatever the alignment, in the order of urgency, and reports
 * what it cannot bring or was told not to. */
#include "reader.h"

#include <errno.h>

#include "faults.h"
#include "files.h"

#define MIB ((size_t) 1 << 20)
#define FILE_SIZE (9 * MIB + 1234)
#define GUARD ((size_t) 2 * HB_PAGE)
#define GUARD_BYTE 0xa5

static const char *path;
static unsigned char image[FILE_SIZE]; /* what is in the file */

/* A job of one to four pieces with memory of its own; guards around each piece. */
struct task {
    struct hb_job job;
    char *memory[HB_JOB_PIECES];
};

static struct hb_file open_file(bool direct) {
    struct hb_file file;
    CHECK_EQUAL(hb_file_open(&file, path, direct), 0);
    return file;
}

static size_t memory_size(const struct hb_piece *piece) {
    return (piece->length + 3 * GUARD + HB_PAGE) / HB_PAGE * HB_PAGE;
}

static void add_piece(struct task *t, const struct hb_file *file, uint64_t offset, size_t length, bool bounce) {
    int i = t->job.n_pieces++;
    struct hb_piece *piece = &t->job.pieces[i];
    *piece = (struct hb_piece) {.file = file, .file_index = 10 + i, .bounce = bounce, .offset = offset,
                                .length = length};
    t->memory[i] = aligned_alloc(HB_PAGE, memory_size(piece));
    CHECK(t->memory[i] != NULL);
    memset(t->memory[i], GUARD_BYTE, memory_size(piece));
    piece->dst = t->memory[i] + GUARD + (bounce ? 13 : offset % file->align);
}

/* Right bytes, and nothing written further than the aligned superset. */
static void check_task(const struct task *t) {
    for (int i = 0; i < t->job.n_pieces; i++) {
        const struct hb_piece *p = &t->job.pieces[i];
        CHECK(memcmp(p->dst, image + p->offset, p->length) == 0);
        size_t slack = p->bounce ? 0 : p->file->align - 1;
        const char *end = t->memory[i] + memory_size(p);
        for (const char *c = t->memory[i]; c < p->dst - slack; c++) {
            CHECK((unsigned char) *c == GUARD_BYTE);
        }
        for (const char *c = p->dst + p->length + slack; c < end; c++) {
            CHECK((unsigned char) *c == GUARD_BYTE);
        }
    }
}

static void free_task(struct task *t) {
    for (int i = 0; i < t->job.n_pieces; i++) {
        free(t->memory[i]);
    }
    *t = (struct task) {0};
}

static struct hb_reader *open_reader(int threads) {
    struct hb_reader *r = NULL;
    CHECK_EQUAL(hb_reader_open(&r, threads), 0);
    return r;
}

static size_t random_length(uint64_t *seed, uint64_t offset) {
    static const size_t lengths[] = {1, 31, 511, 512, 4096, 4097, 70000, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 5 * MIB};
    size_t length = lengths[check_random(seed, sizeof lengths / sizeof lengths[0])];
    return length < FILE_SIZE - offset ? length : FILE_SIZE - offset;
}

static void read_many(bool direct, bool bounce, int threads) {
    enum { N = 16 };
    static struct task tasks[N];
    uint64_t seed = 7, wanted = 0, bytes, calls, pieces = 0;
    struct hb_file file = open_file(direct);
    struct hb_reader *r = open_reader(threads);
    for (int i = 0; i < N; i++) {
        int n = 1 + (int) check_random(&seed, HB_JOB_PIECES);
        for (int k = 0; k < n; k++, pieces++) {
            uint64_t offset = check_random(&seed, FILE_SIZE);
            offset -= check_random(&seed, 2) * (offset % HB_PAGE);
            add_piece(&tasks[i], &file, offset, random_length(&seed, offset), bounce);
            wanted += tasks[i].job.pieces[k].length;
        }
        tasks[i].job.owner = &tasks[i];
        hb_reader_submit(r, &tasks[i].job, HB_DEMAND);
    }
    for (int i = 0; i < N; i++) {
        struct hb_job *job = hb_reader_next(r, true);
        CHECK(job != NULL);
        CHECK_EQUAL(job->error, 0);
        check_task(job->owner);
        free_task(job->owner);
    }
    CHECK(hb_reader_next(r, true) == NULL);
    hb_reader_counters(r, &bytes, &calls);
    CHECK_EQUAL(bytes, wanted);
    CHECK(calls >= pieces);
    hb_reader_close(r);
    hb_file_close(&file);
}

static void buffered_reads_are_exact(void) {
    read_many(false, false, 1);
    read_many(false, false, 3);
    read_many(false, true, 2);
}

static bool direct_works(void) {
    struct hb_file file = open_file(true);
    bool works = file.direct;
    hb_file_close(&file);
    return works;
}

static bool skipped;

static void direct_reads_are_exact(void) {
    if (!direct_works()) {
        printf("  no direct reads in this folder: skipped\n");
        skipped = true;
        return;
    }
    read_many(true, false, 1);
    read_many(true, false, 3);
    read_many(true, true, 2);
}

static int read_one(struct hb_reader *r, struct task *t) {
    hb_reader_submit(r, &t->job, HB_DEMAND);
    CHECK(hb_reader_next(r, true) == &t->job);
    return t->job.error;
}

static void pieces_may_end_with_the_file(void) {
    for (int direct = 0; direct < 2; direct++) {
        struct hb_file file = open_file(direct);
        struct hb_reader *r = open_reader(1);
        struct task t = {0};
        add_piece(&t, &file, FILE_SIZE - 5000, 5000, false);
        add_piece(&t, &file, FILE_SIZE - 3 * MIB, 3 * MIB, true);
        CHECK_EQUAL(read_one(r, &t), 0);
        check_task(&t);
        free_task(&t);
        hb_reader_close(r);
        hb_file_close(&file);
    }
}

static void the_end_of_the_file_inside_a_piece_is_reported(void) {
    for (int direct = 0; direct < 2; direct++) {
        struct hb_file file = open_file(direct);
        struct hb_reader *r = open_reader(2);
        struct task bad = {0}, good = {0};
        add_piece(&bad, &file, 100, 100, false);
        add_piece(&bad, &file, FILE_SIZE - 100, 101, false);
        add_piece(&good, &file, 0, 5000, false);
        CHECK_EQUAL(read_one(r, &bad), HB_SHORT_READ);
        CHECK_EQUAL(bad.job.error_file, 11);
        CHECK_EQUAL(bad.job.error_offset, FILE_SIZE - 100);
        CHECK_EQUAL(read_one(r, &good), 0);
        check_task(&good);
        free_task(&bad);
        add_piece(&bad, &file, FILE_SIZE + 10 * MIB, 5, true); /* far beyond the end */
        CHECK_EQUAL(read_one(r, &bad), HB_SHORT_READ);
        free_task(&bad);
        free_task(&good);
        hb_reader_close(r);
        hb_file_close(&file);
    }
}

/* --- faults below --- */

static ssize_t fail_around_five_mib(int fd, void *dst, size_t length, off_t offset) {
    if (offset <= (off_t) (5 * MIB) && (off_t) (5 * MIB) < offset + (off_t) length) {
        errno = EIO;
        return -1;
    }
    return faults_real_pread(fd, dst, length, offset);
}

static void failed_reads_are_reported_and_the_rest_arrives(void) {
    struct hb_file file = open_file(false);
    struct hb_reader *r = open_reader(2);
    faults_pread = fail_around_five_mib;
    struct task bad = {0}, good = {0};
    add_piece(&bad, &file, 0, 1000, false);
    add_piece(&bad, &file, MIB, 6 * MIB, false); /* its third block fails */
    add_piece(&good, &file, 6 * MIB, 3 * MIB, false);
    hb_reader_submit(r, &bad.job, HB_DEMAND);
    hb_reader_submit(r, &good.job, HB_DEMAND);
    for (int i = 0; i < 2; i++) {
        struct hb_job *job = hb_reader_next(r, true);
        CHECK_EQUAL(job->error, job == &bad.job ? EIO : 0);
    }
    CHECK_EQUAL(bad.job.error_file, 11);
    CHECK(bad.job.error_offset > 3 * MIB && bad.job.error_offset <= 5 * MIB);
    check_task(&good);
    faults_pread = NULL;
    CHECK_EQUAL(read_one(r, &bad), 0); /* a job can be submitted again */
    check_task(&bad);
    free_task(&bad);
    free_task(&good);
    hb_reader_close(r);
    hb_file_close(&file);
}

static atomic_int hook_calls;

static ssize_t short_and_interrupted(int fd, void *dst, size_t length, off_t offset) {
    if (atomic_fetch_add(&hook_calls, 1) % 3 == 0) {
        errno = EINTR;
        return -1;
    }
    return faults_real_pread(fd, dst, length > 60000 ? 59904 : length, offset); /* 59904 = 117 * 512 */
}

static void short_and_interrupted_reads_are_completed(void) {
    for (int direct = 0; direct < 2; direct++) {
        struct hb_file file = open_file(direct);
        if (file.align <= 512) {
            struct hb_reader *r = open_reader(2);
            struct task t = {0};
            add_piece(&t, &file, 12345, 3 * MIB, false);
            add_piece(&t, &file, 54321, MIB, true);
            faults_pread = short_and_interrupted;
            CHECK_EQUAL(read_one(r, &t), 0);
            faults_pread = NULL;
            check_task(&t);
            free_task(&t);
            hb_reader_close(r);
        }
        hb_file_close(&file);
    }
}

static ssize_t slow(int fd, void *dst, size_t length, off_t offset) {
    usleep(20000);
    return faults_real_pread(fd, dst, length, offset);
}

static void waiting_and_not_waiting(void) {
    struct hb_file file = open_file(false);
    struct hb_reader *r = open_reader(2);
    CHECK(hb_reader_next(r, false) == NULL);
    CHECK(hb_reader_next(r, true) == NULL); /* nothing under way: does not wait */
    atomic_store(&faults_gate_open, false);
    faults_pread = faults_gated_pread;
    struct task tasks[4] = {0};
    for (int i = 0; i < 4; i++) {
        add_piece(&tasks[i], &file, (uint64_t) i * MIB, 1000, false);
        hb_reader_submit(r, &tasks[i].job, HB_DEMAND);
    }
    CHECK(hb_reader_next(r, false) == NULL);
    atomic_store(&faults_gate_open, true);
    for (int i = 0; i < 4; i++) {
        struct hb_job *job = hb_reader_next(r, true);
        CHECK(job != NULL && job->error == 0);
    }
    faults_pread = NULL;
    for (int i = 0; i < 4; i++) {
        check_task(&tasks[i]);
        free_task(&tasks[i]);
    }
    hb_reader_close(r);
    hb_file_close(&file);
}

static void closing_waits_for_what_is_under_way(void) {
    for (int threads = 1; threads <= 3; threads++) {
        struct hb_file file = open_file(false);
        struct hb_reader *r = open_reader(threads);
        faults_pread = slow;
        struct task tasks[6] = {0};
        for (int i = 0; i < 6; i++) {
            add_piece(&tasks[i], &file, (uint64_t) i * MIB, 1000, i % 2 == 0);
            hb_reader_submit(r, &tasks[i].job, i % 3 == 0 ? HB_AHEAD : HB_DEMAND);
        }
        hb_reader_close(r);
        faults_pread = NULL;
        for (int i = 0; i < 6; i++) {
            check_task(&tasks[i]);
            free_task(&tasks[i]); /* nobody may touch it now */
        }
        hb_file_close(&file);
    }
}

static void jobs_not_begun_can_be_withdrawn(void) {
    enum { N = 8 };
    struct hb_file file = open_file(false);
    struct hb_reader *r = open_reader(1);
    hb_reader_withdraw(r);
    atomic_store(&faults_gate_open, false);
    atomic_store(&faults_pread_calls, 0);
    faults_pread = faults_gated_pread;
    struct task tasks[N] = {0};
    for (int i = 0; i < N; i++) {
        add_piece(&tasks[i], &file, (uint64_t) i * 1000, 3 * MIB, i % 2 == 0); /* two blocks */
        hb_reader_submit(r, &tasks[i].job, HB_DEMAND);
    }
    faults_await_preads(1);
    hb_reader_withdraw(r);
    for (int i = 1; i < N; i++) {
        struct hb_job *job = hb_reader_next(r, false);
        CHECK(job == &tasks[i].job);
        CHECK_EQUAL(job->error, ECANCELED);
    }
    CHECK(hb_reader_next(r, false) == NULL);
    atomic_store(&faults_gate_open, true);
    CHECK(hb_reader_next(r, true) == &tasks[0].job);
    CHECK_EQUAL(tasks[0].job.error, 0);
    check_task(&tasks[0]);
    hb_reader_withdraw(r);
    CHECK_EQUAL(read_one(r, &tasks[1]), 0); /* goes on as before */
    check_task(&tasks[1]);
    faults_pread = NULL;
    for (int i = 0; i < N; i++) {
        free_task(&tasks[i]);
    }
    hb_reader_close(r);
    hb_file_close(&file);
}

/* --- urgency: one thread reads behind the gate, and what it reads is written down --- */

enum { SCENE_JOBS = 5 };

struct scene {
    struct hb_file file;
    struct hb_reader *r;
    struct task tasks[SCENE_JOBS];
};

static char order[64]; /* a letter for the job and a digit for the block, of each read */

/* Job i begins at page i of the file, so an offset tells job and block. */
static ssize_t note_order(int fd, void *dst, size_t length, off_t offset) {
    size_t n = strlen(order), place = (size_t) offset;
    CHECK(n + 2 < sizeof order);
    order[n] = (char) ('a' + place % (2 * MIB) / HB_PAGE);
    order[n + 1] = (char) ('0' + place / (2 * MIB));
    return faults_gated_pread(fd, dst, length, offset);
}

/* Jobs of three blocks; the last is of one. */
static void begin_scene(struct scene *s, int threads) {
    *s = (struct scene) {.file = open_file(false), .r = open_reader(threads)};
    for (int i = 0; i < SCENE_JOBS; i++) {
        add_piece(&s->tasks[i], &s->file, (uint64_t) i * HB_PAGE, i < SCENE_JOBS - 1 ? 4 * MIB + 100 : 100, false);
    }
    memset(order, 0, sizeof order);
    atomic_store(&faults_gate_open, false);
    atomic_store(&faults_pread_calls, 0);
    faults_pread = threads == 1 ? note_order : faults_gated_pread;
}

static struct hb_job *job_of(struct scene *s, char name) {
    return &s->tasks[name - 'a'].job;
}

static void submit(struct scene *s, const char *names, enum hb_urgency urgency) {
    for (const char *c = names; *c != '\0'; c++) {
        hb_reader_submit(s->r, job_of(s, *c), urgency);
    }
}

/* The first job is submitted, and its first block is being read. */
static void submit_begun(struct scene *s, const char *name, enum hb_urgency urgency) {
    submit(s, name, urgency);
    faults_await_preads(1);
}

/* The next jobs to finish, in this order; those with capital letters are cancelled. */
static void expect_finished(struct scene *s, const char *names, bool wait) {
    for (const char *c = names; *c != '\0'; c++) {
        bool cancelled = *c < 'a';
        struct hb_job *job = hb_reader_next(s->r, wait);
        CHECK(job == job_of(s, cancelled ? (char) (*c - 'A' + 'a') : *c));
        CHECK_EQUAL(job->error, cancelled ? ECANCELED : 0);
        if (!cancelled) {
            check_task(&s->tasks[*c - 'a']);
        }
    }
    CHECK(hb_reader_next(s->r, false) == NULL);
}

static void end_scene(struct scene *s, const char *finished, const char *reads) {
    atomic_store(&faults_gate_open, true);
    expect_finished(s, finished, true);
    CHECK(hb_reader_next(s->r, true) == NULL);
    if (strcmp(order, reads) != 0) {
        fprintf(stderr, "read %s, not %s\n", order, reads);
        exit(1);
    }
    faults_pread = NULL;
    hb_reader_close(s->r);
    for (int i = 0; i < SCENE_JOBS; i++) {
        free_task(&s->tasks[i]);
    }
    hb_file_close(&s->file);
}

static void demand_overtakes_ahead_between_blocks(void) {
    struct scene s;
    begin_scene(&s, 1);
    submit_begun(&s, "a", HB_AHEAD);
    submit(&s, "b", HB_AHEAD);
    submit(&s, "cd", HB_DEMAND);
    submit(&s, "e", HB_AHEAD);
    end_scene(&s, "cdabe", "a0c0c1c2d0d1d2a1a2b0b1b2e0");
}

static void promoted_jobs_go_behind_the_demand(void) {
    struct scene s;
    begin_scene(&s, 1);
    submit_begun(&s, "a", HB_DEMAND);
    submit(&s, "bce", HB_AHEAD);
    submit(&s, "d", HB_DEMAND);
    CHECK(hb_reader_promote(s.r, job_of(&s, 'c'))); /* from the middle */
    CHECK(hb_reader_promote(s.r, job_of(&s, 'e'))); /* from the end */
    CHECK(hb_reader_promote(s.r, job_of(&s, 'd'))); /* is demand already: keeps its place */
    end_scene(&s, "adceb", "a0a1a2d0d1d2c0c1c2e0b0b1b2");
}

static void a_begun_job_is_promoted_with_what_is_left(void) {
    struct scene s;
    begin_scene(&s, 1);
    submit_begun(&s, "a", HB_AHEAD);
    submit(&s, "b", HB_AHEAD);
    submit(&s, "c", HB_DEMAND);
    hb_reader_promote(s.r, job_of(&s, 'a'));
    submit(&s, "d", HB_DEMAND);
    hb_reader_promote(s.r, job_of(&s, 'b')); /* was the only one left */
    submit(&s, "e", HB_AHEAD);
    end_scene(&s, "cadbe", "a0c0c1c2a1a2d0d1d2b0b1b2e0");
}

static void jobs_not_begun_are_cancelled_at_once(void) {
    struct scene s;
    begin_scene(&s, 1);
    submit_begun(&s, "a", HB_DEMAND);
    submit(&s, "bcd", HB_AHEAD);
    hb_reader_cancel(s.r, job_of(&s, 'c')); /* from the middle, the end, the beginning */
    hb_reader_cancel(s.r, job_of(&s, 'd'));
    hb_reader_cancel(s.r, job_of(&s, 'd')); /* finished, not collected */
    expect_finished(&s, "CD", false);
    submit(&s, "d", HB_AHEAD);
    hb_reader_cancel(s.r, job_of(&s, 'b'));
    expect_finished(&s, "B", false);
    submit(&s, "c", HB_DEMAND); /* may be submitted again */
    end_scene(&s, "acd", "a0a1a2c0c1c2d0d1d2");
}

static int finish_calls;

static void count_finish(struct hb_job *job) {
    (void) job;
    finish_calls++;
}

static void begun_jobs_stop_within_a_block(void) {
    for (int urgency = HB_DEMAND; urgency <= HB_AHEAD; urgency++) {
        struct scene s;
        uint64_t bytes, calls;
        begin_scene(&s, 1);
        submit_begun(&s, "a", urgency);
        submit(&s, "b", HB_DEMAND);
        job_of(&s, 'a')->finish = count_finish;
        hb_reader_cancel(s.r, job_of(&s, 'a'));
        hb_reader_cancel(s.r, job_of(&s, 'a')); /* is so already */
        CHECK(!hb_reader_promote(s.r, job_of(&s, 'a'))); /* nothing is left of it */
        CHECK(hb_reader_next(s.r, false) == NULL);
        atomic_store(&faults_gate_open, true);
        expect_finished(&s, "Ab", true);
        hb_reader_counters(s.r, &bytes, &calls);
        CHECK_EQUAL(bytes, 2 * MIB + 4 * MIB + 100);
        CHECK_EQUAL(calls, 4);
        CHECK_EQUAL(finish_calls, urgency - HB_DEMAND);
        submit(&s, "a", HB_DEMAND);
        end_scene(&s, "a", "a0b0b1b2a0a1a2");
        CHECK_EQUAL(finish_calls, urgency - HB_DEMAND + 1);
    }
}

static void a_cancelled_job_ends_with_all_blocks_under_way(void) {
    struct scene s;
    begin_scene(&s, 2);
    submit(&s, "a", HB_AHEAD);
    faults_await_preads(2);
    hb_reader_cancel(s.r, job_of(&s, 'a'));
    CHECK(hb_reader_next(s.r, false) == NULL);
    end_scene(&s, "A", "");
    CHECK_EQUAL(atomic_load(&faults_pread_calls), 2);
}

/* Hangs if fewer do. */
static void as_many_threads_wake_as_there_are_blocks(void) {
    for (int threads = 2; threads <= 5; threads++) {
        struct scene s;
        begin_scene(&s, threads);
        usleep(20000); /* all sleep now, or this shows less */
        submit(&s, "a", HB_DEMAND);
        faults_await_preads(threads < 3 ? threads : 3);
        end_scene(&s, "a", "");
    }
}

static void what_is_wholly_taken_arrives(void) {
    struct scene s;
    begin_scene(&s, 1);
    submit_begun(&s, "e", HB_AHEAD); /* one block */
    submit(&s, "a", HB_DEMAND);
    hb_reader_promote(s.r, job_of(&s, 'e'));
    hb_reader_cancel(s.r, job_of(&s, 'e'));
    hb_reader_withdraw(s.r);
    end_scene(&s, "Ae", "e0");
}

static void withdrawing_leaves_only_demand_that_was_begun(void) {
    struct scene s;
    begin_scene(&s, 1);
    submit_begun(&s, "a", HB_AHEAD);
    submit(&s, "bd", HB_AHEAD);
    submit(&s, "ce", HB_DEMAND);
    hb_reader_withdraw(s.r);
    expect_finished(&s, "CEBD", false);
    end_scene(&s, "A", "a0");
    begin_scene(&s, 1);
    submit_begun(&s, "a", HB_AHEAD);
    submit(&s, "bc", HB_DEMAND);
    hb_reader_promote(s.r, job_of(&s, 'a')); /* begun, and last */
    hb_reader_withdraw(s.r);
    expect_finished(&s, "BC", false);
    submit(&s, "d", HB_AHEAD); /* goes on as before */
    end_scene(&s, "ad", "a0a1a2d0d1d2");
}

static ssize_t fail_at_the_start(int fd, void *dst, size_t length, off_t offset) {
    if (offset == 0) {
        errno = EIO;
        return -1;
    }
    return faults_gated_pread(fd, dst, length, offset);
}

static void cancelling_hides_what_failed_before(void) {
    struct scene s;
    begin_scene(&s, 1);
    faults_pread = fail_at_the_start;
    submit(&s, "a", HB_AHEAD);
    faults_await_preads(2); /* the first block failed, and the second is being read */
    hb_reader_cancel(s.r, job_of(&s, 'a'));
    end_scene(&s, "A", "");
}

static void failing_to_start_is_an_error(void) {
    for (int n = 1; n <= 4; n++) {
        struct hb_reader *r = NULL;
        atomic_store(&faults_thread, n);
        CHECK_EQUAL(hb_reader_open(&r, 4), EAGAIN);
        CHECK(r == NULL);
    }
    atomic_store(&faults_thread, 0);
    struct hb_reader *r = NULL;
    atomic_store(&faults_allocation, 1);
    CHECK_EQUAL(hb_reader_open(&r, 4), ENOMEM);
    CHECK(r == NULL);
    hb_reader_close(NULL);
}

static void a_thread_without_its_buffer_reads_in_place_only(void) {
    struct hb_file file = open_file(false);
    struct task t = {0}, bounced = {0};
    add_piece(&t, &file, 5, 3 * MIB, false);
    add_piece(&bounced, &file, 5, 100, true);
    atomic_store(&faults_allocation, 2); /* the first is the reader itself */
    struct hb_reader *r = open_reader(1);
    CHECK_EQUAL(read_one(r, &t), 0);
    check_task(&t);
    CHECK_EQUAL(read_one(r, &bounced), ENOMEM);
    atomic_store(&faults_allocation, 0);
    free_task(&t);
    free_task(&bounced);
    hb_reader_close(r);
    hb_file_close(&file);
}

/* A reader that does no I/O shows what is lost or doubled under load. */
static ssize_t null_read(int fd, void *dst, size_t length, off_t offset) {
    (void) fd, (void) dst, (void) offset;
    return (ssize_t) length;
}

static void no_job_is_lost_or_doubled(void) {
    enum { N = 64, ROUNDS = 40 };
    struct hb_file file = open_file(false);
    struct hb_reader *r = open_reader(4);
    static struct hb_job jobs[N];
    static int submitted[N], finished[N];
    static char sink[64];
    uint64_t seed = 3, expected = 0, bytes, calls;
    faults_pread = null_read;
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < N; i++) {
            jobs[i] = (struct hb_job) {.n_pieces = 1 + (int32_t) check_random(&seed, HB_JOB_PIECES)};
            for (int k = 0; k < jobs[i].n_pieces; k++) {
                uint64_t offset = check_random(&seed, 1 << 30);
                size_t length = 1 + check_random(&seed, 7 * (uint32_t) MIB);
                jobs[i].pieces[k] = (struct hb_piece) {.file = &file, .offset = offset, .length = length, .dst = sink};
                expected += length;
            }
            hb_reader_submit(r, &jobs[i], i % 3 == 0 ? HB_AHEAD : HB_DEMAND);
            submitted[i]++;
            struct hb_job *done = hb_reader_next(r, false);
            finished[done != NULL ? done - jobs : 0] += done != NULL;
        }
        for (struct hb_job *done; (done = hb_reader_next(r, true)) != NULL;) {
            finished[done - jobs]++;
        }
        CHECK(memcmp(submitted, finished, sizeof submitted) == 0);
    }
    faults_pread = NULL;
    hb_reader_counters(r, &bytes, &calls);
    CHECK_EQUAL(bytes, expected);
    hb_reader_close(r);
    hb_file_close(&file);
}

/* --- whatever is asked for while the workers are at it, in whatever order --- */

enum { STORM_JOBS = 10, STORM_BLOCKS = 6, STORM_STEPS = 500, STORM_SEEDS = 12 };
enum outcome { ARRIVED, ARRIVED_THOUGH_CANCELLED, FAILED, CANCELLED_UNREAD, CANCELLED_BETWEEN, N_OUTCOMES };

/* Plain variables: ThreadSanitizer sees a worker that touches a job after it was collected, and a second read of a
 * block counts twice. */
struct storm_job {
    struct hb_job job;
    char *memory; /* of each block only the first byte is used: how often it was read */
    int n_blocks;
    bool submitted, cancelled, finished_well;
};

static struct storm_job storm_jobs[STORM_JOBS];
static int outcomes[N_OUTCOMES];

static void storm_finish(struct hb_job *job) {
    ((struct storm_job *) job->owner)->finished_well = true;
}

static bool storm_block_fails(uint64_t offset) {
    return offset / (2 * MIB) % 16 == 15;
}

static ssize_t storm_read(int fd, void *dst, size_t length, off_t offset) {
    (void) fd;
    uint64_t block = (uint64_t) offset / (2 * MIB);
    usleep((useconds_t) (block * 7 % 60));
    if (storm_block_fails((uint64_t) offset)) {
        errno = EIO;
        return -1;
    }
    ++*(char *) dst;
    usleep((useconds_t) (block * 11 % 30));
    return (ssize_t) length;
}

static void storm_submit(struct hb_reader *r, struct storm_job *s, const struct hb_file *file, uint64_t *seed) {
    s->job = (struct hb_job) {.owner = s, .finish = storm_finish};
    s->n_blocks = 1 + (int) check_random(seed, STORM_BLOCKS);
    s->submitted = true;
    s->cancelled = s->finished_well = false;
    uint64_t offset = check_random(seed, 100) * 2 * MIB;
    int first = 1 + (int) check_random(seed, (uint32_t) s->n_blocks); /* blocks of the first piece */
    for (int block = 0; block < s->n_blocks; block += first, first = s->n_blocks - block) {
        s->job.pieces[s->job.n_pieces++] = (struct hb_piece) {
            .file = file, .offset = offset + (size_t) block * 2 * MIB, .length = (size_t) first * 2 * MIB,
            .dst = s->memory + (size_t) block * 2 * MIB};
    }
    hb_reader_submit(r, &s->job, check_random(seed, 2) == 0 ? HB_DEMAND : HB_AHEAD);
}

static void storm_collect(struct hb_job *job) {
    struct storm_job *s = job->owner;
    CHECK(s->submitted);
    s->submitted = false;
    int read = 0, failing = 0;
    for (int i = 0; i < s->n_blocks; i++) {
        char *count = s->memory + (size_t) i * 2 * MIB;
        CHECK(*count == 0 || *count == 1);
        read += *count;
        *count = 0;
        failing += storm_block_fails(job->pieces[0].offset + (size_t) i * 2 * MIB);
    }
    CHECK_EQUAL(s->finished_well, job->error == 0);
    if (job->error == ECANCELED) {
        CHECK(s->cancelled && read + failing <= s->n_blocks);
        outcomes[read == 0 ? CANCELLED_UNREAD : CANCELLED_BETWEEN]++;
        return;
    }
    CHECK_EQUAL(job->error, failing > 0 ? EIO : 0);
    CHECK_EQUAL(read, s->n_blocks - failing);
    outcomes[failing > 0 ? FAILED : s->cancelled ? ARRIVED_THOUGH_CANCELLED : ARRIVED]++;
}

static void storm_step(struct hb_reader *r, const struct hb_file *file, uint64_t *seed) {
    struct storm_job *s = &storm_jobs[check_random(seed, STORM_JOBS)];
    uint32_t what = check_random(seed, 64);
    if (!s->submitted) {
        storm_submit(r, s, file, seed);
    } else if (what < 12) {
        hb_reader_promote(r, &s->job);
    } else if (what < 18) {
        s->cancelled = true;
        hb_reader_cancel(r, &s->job);
    } else if (what == 18) {
        for (int i = 0; i < STORM_JOBS; i++) {
            storm_jobs[i].cancelled = true;
        }
        hb_reader_withdraw(r);
    } else if (what < 24) {
        usleep(what * 10);
    } else {
        struct hb_job *job = hb_reader_next(r, what < 48);
        if (job != NULL) {
            storm_collect(job);
        }
    }
}

static void every_job_of_a_storm_ends_once_and_whole(void) {
    struct hb_file file = open_file(false);
    void *memory = NULL;
    CHECK_EQUAL(hb_space_map(&memory, STORM_JOBS * STORM_BLOCKS * 2 * MIB, false), 0);
    faults_pread = storm_read;
    for (uint64_t seed = 1; seed <= STORM_SEEDS; seed++) {
        uint64_t state = seed;
        struct hb_reader *r = open_reader(1 + (int) (seed % 4));
        for (int i = 0; i < STORM_JOBS; i++) {
            storm_jobs[i].memory = (char *) memory + (size_t) i * STORM_BLOCKS * 2 * MIB;
        }
        for (int i = 0; i < STORM_STEPS; i++) {
            storm_step(r, &file, &state);
        }
        for (struct hb_job *job; (job = hb_reader_next(r, true)) != NULL;) {
            storm_collect(job);
        }
        for (int i = 0; i < STORM_JOBS; i++) {
            CHECK(!storm_jobs[i].submitted);
        }
        hb_reader_close(r);
    }
    faults_pread = NULL;
    for (int i = 0; i < N_OUTCOMES; i++) {
        CHECK(outcomes[i] > 0); /* or this is no storm */
    }
    hb_space_release(memory, STORM_JOBS * STORM_BLOCKS * 2 * MIB);
    hb_file_close(&file);
}

int main(void) {
    path = file_make(FILE_SIZE);
    file_fill(image, 0, FILE_SIZE);
    int open_before = files_open();
    RUN(buffered_reads_are_exact);
    RUN(direct_reads_are_exact);
    RUN(pieces_may_end_with_the_file);
    RUN(the_end_of_the_file_inside_a_piece_is_reported);
    RUN(failed_reads_are_reported_and_the_rest_arrives);
    RUN(short_and_interrupted_reads_are_completed);
    RUN(waiting_and_not_waiting);
    RUN(closing_waits_for_what_is_under_way);
    RUN(jobs_not_begun_can_be_withdrawn);
    RUN(demand_overtakes_ahead_between_blocks);
    RUN(promoted_jobs_go_behind_the_demand);
    RUN(a_begun_job_is_promoted_with_what_is_left);
    RUN(jobs_not_begun_are_cancelled_at_once);
    RUN(begun_jobs_stop_within_a_block);
    RUN(a_cancelled_job_ends_with_all_blocks_under_way);
    RUN(as_many_threads_wake_as_there_are_blocks);
    RUN(what_is_wholly_taken_arrives);
    RUN(withdrawing_leaves_only_demand_that_was_begun);
    RUN(cancelling_hides_what_failed_before);
    RUN(failing_to_start_is_an_error);
    RUN(a_thread_without_its_buffer_reads_in_place_only);
    RUN(no_job_is_lost_or_doubled);
    RUN(every_job_of_a_storm_ends_once_and_whole);
    CHECK_EQUAL(files_open(), open_before);
    return skipped ? CHECK_SKIPPED : 0;
}
