/* Description: the catalog lays slots out for direct reads and refuses descriptions that do not fit the files, or low
 * copies that do not fit the high ones. */
#include "catalog.h"

#include "faults.h"
#include "files.h"

#define FILE_SIZE 400000

static struct hobbit_file files[2];
static struct hobbit_group groups[2];
static struct hobbit_matrix matrices[8];
static struct hobbit_options options;
static char err[256];

/* Two groups of 4 and 3 experts; the second is in both files and its distance between experts is odd. */
static void describe(void) {
    const struct hobbit_matrix good[] = {
        {.name = "a.up", .group = 0, .file = 0, .type = 8, .ne0 = 64, .ne1 = 32, .offset = 1056, .expert_bytes = 4096},
        {.name = "a.gate", .group = 0, .file = 0, .type = 8, .ne0 = 64, .ne1 = 32, .offset = 17440,
         .expert_bytes = 4096},
        {.name = "a.down", .group = 0, .file = 1, .type = 8, .ne0 = 32, .ne1 = 64, .offset = 0, .expert_bytes = 512},
        {.name = "b.up", .group = 1, .file = 1, .type = 0, .ne0 = 7, .ne1 = 9, .offset = 3008, .expert_bytes = 333},
        {.name = "b.down", .group = 1, .file = 0, .type = 0, .ne0 = 9, .ne1 = 7, .offset = FILE_SIZE - 3 * 1024,
         .expert_bytes = 1024}, /* ends with the file */
    };
    memset(matrices, 0, sizeof matrices);
    memcpy(matrices, good, sizeof good);
    groups[0] = (struct hobbit_group) {.layer = 0, .n_expert = 4};
    groups[1] = (struct hobbit_group) {.layer = 1, .n_expert = 3};
    files[0].size = files[1].size = FILE_SIZE;
    options = (struct hobbit_options) {.files = files, .matrices = matrices, .groups = groups, .n_files = 2,
                                       .n_matrices = 5, .n_groups = 2, .io = HOBBIT_IO_AUTO};
}

/* And low copies of the first group, in other types and sizes. */
static void describe_low(void) {
    const struct hobbit_matrix low[] = {
        {.name = "a.up", .precision = HOBBIT_LOW, .file = 1, .type = 2, .ne0 = 64, .ne1 = 32, .offset = 100032,
         .expert_bytes = 1024},
        {.name = "a.gate", .precision = HOBBIT_LOW, .file = 0, .type = 3, .ne0 = 64, .ne1 = 32, .offset = 150001,
         .expert_bytes = 4096},
        {.name = "a.down", .precision = HOBBIT_LOW, .file = 1, .type = 2, .ne0 = 32, .ne1 = 64,
         .offset = FILE_SIZE - 4 * 777, .expert_bytes = 777}, /* ends with the file */
    };
    describe();
    memcpy(matrices + 5, low, sizeof low);
    options.n_matrices = 8;
}

static void check_slot(const struct hb_catalog *c, const struct hb_copy *g) {
    uint64_t end = 0, bytes = 0;
    for (int i = 0; i < g->n_matrices; i++) {
        const struct hb_matrix *m = g->matrices[i];
        CHECK_EQUAL(m->role, i);
        CHECK(&c->groups[m->group].copies[m->precision] == g);
        const struct hb_file *file = &c->files[m->file];
        uint64_t lead = m->bounce ? 0 : m->offset % file->align;
        uint64_t tail = (file->align - (m->offset + m->expert_bytes) % file->align) % file->align;
        CHECK(m->slot_offset >= end + lead); /* an aligned read leaves the matrix before alone */
        CHECK(m->bounce || m->slot_offset % file->align == m->offset % file->align);
        CHECK((m->slot_offset - lead) % 64 == 0);
        CHECK_EQUAL(m->bounce, file->direct && m->expert_bytes % file->align != 0);
        end = m->slot_offset + m->expert_bytes + (m->bounce ? 0 : tail);
        bytes += m->expert_bytes;
    }
    CHECK(g->slot_bytes >= end && g->slot_bytes % HB_PAGE == 0 && g->slot_bytes < end + 2 * HB_PAGE);
    CHECK_EQUAL(g->expert_bytes, bytes);
}

static void slots_have_room_for_aligned_reads(void) {
    for (int32_t io = HOBBIT_IO_AUTO; io <= HOBBIT_IO_BUFFERED; io += 2) {
        struct hb_catalog c;
        describe();
        options.io = io;
        CHECK_EQUAL(hb_catalog_open(&c, &options, err, sizeof err), HOBBIT_OK);
        CHECK(c.n_groups == 2 && c.n_matrices == 5 && c.n_files == 2);
        for (int g = 0; g < 2; g++) {
            const struct hb_copy *copies = c.groups[g].copies;
            CHECK_EQUAL(copies[HOBBIT_HIGH].n_matrices, g == 0 ? 3 : 2);
            check_slot(&c, &copies[HOBBIT_HIGH]);
            CHECK_EQUAL(copies[HOBBIT_LOW].n_matrices, 0);
            CHECK_EQUAL(copies[HOBBIT_LOW].slot_bytes, 0);
            CHECK_EQUAL(copies[HOBBIT_LOW].expert_bytes, 0);
        }
        CHECK(io != HOBBIT_IO_BUFFERED || !c.files[0].direct);
        hb_catalog_close(&c);
        hb_catalog_close(&c); /* closed is empty */
    }
}

static void matrices_are_found_by_their_whole_name(void) {
    struct hb_catalog c;
    describe();
    char name[] = "a.gate";
    matrices[1].name = name;
    CHECK_EQUAL(hb_catalog_open(&c, &options, err, sizeof err), HOBBIT_OK);
    name[0] = 'x'; /* the catalog has its own copy */
    CHECK(hb_catalog_find(&c, "a.gate") == &c.matrices[1]);
    CHECK(hb_catalog_find(&c, "b.down") == &c.matrices[4]);
    CHECK(hb_catalog_find(&c, "a.gat") == NULL);
    CHECK(hb_catalog_find(&c, "") == NULL);
    hb_catalog_close(&c);
}

static void refuse(enum hobbit_status expected, const char *reason) {
    struct hb_catalog c;
    int open_before = files_open();
    err[0] = '\0';
    CHECK_EQUAL(hb_catalog_open(&c, &options, err, sizeof err), expected);
    CHECK_TEXT(err, reason);
    CHECK(c.files == NULL && c.matrices == NULL && c.groups == NULL && c.paths == NULL);
    CHECK_EQUAL(files_open(), open_before);
    describe();
}

static void refuse_low(const char *reason) {
    refuse(HOBBIT_FORMAT, reason);
    describe_low();
}

static void missing_files_are_named(void) {
    describe();
    const char *path = files[1].path;
    files[1].path = "no such part";
    refuse(HOBBIT_IO, "no such part");
    files[1].path = path;
}

static ssize_t refuse_reads(int fd, void *dst, size_t length, off_t offset) {
    (void) fd, (void) dst, (void) length, (void) offset;
    return 0;
}

static void direct_reads_can_be_demanded(void) {
    describe();
    faults_pread = refuse_reads; /* the probe finds that direct reads do not work */
    options.io = HOBBIT_IO_DIRECT;
    refuse(HOBBIT_UNSUPPORTED, files[0].path);
    faults_pread = NULL;
}

static void hostile_descriptions_are_refused(void) {
    describe();
    matrices[1].offset = FILE_SIZE - 4 * 4096 + 1; /* one byte too far */
    refuse(HOBBIT_FORMAT, "a.gate");
    matrices[0].offset = UINT64_MAX - 4096;
    refuse(HOBBIT_FORMAT, "a.up");
    matrices[0].expert_bytes = UINT64_MAX / 4 + 1; /* times 4 experts is 0 */
    refuse(HOBBIT_FORMAT, "a.up");
    matrices[0].expert_bytes = 0;
    refuse(HOBBIT_FORMAT, "a.up");
    matrices[0].ne0 = 0;
    refuse(HOBBIT_FORMAT, "a.up");
    matrices[0].ne1 = -1;
    refuse(HOBBIT_FORMAT, "a.up");
    matrices[2].group = 2;
    refuse(HOBBIT_FORMAT, "a.down");
    matrices[2].group = -1;
    refuse(HOBBIT_FORMAT, "a.down");
    matrices[2].file = 2;
    refuse(HOBBIT_FORMAT, "a.down");
    matrices[2].file = -1;
    refuse(HOBBIT_FORMAT, "a.down");
    groups[1].n_expert = 0;
    refuse(HOBBIT_FORMAT, "layer 1");
    groups[1].n_expert = INT32_MIN;
    refuse(HOBBIT_FORMAT, "layer 1");
    options.n_matrices = 3; /* none for the second group */
    refuse(HOBBIT_FORMAT, "layer 1");
    files[0].size = UINT64_MAX; /* sums of such sizes would wrap */
    matrices[0].expert_bytes = UINT64_MAX / 4 - 4096;
    refuse(HOBBIT_FORMAT, "a.up");
}

static void a_group_has_room_for_four_matrices(void) {
    describe();
    for (int i = 5; i < 7; i++) {
        matrices[i] = matrices[0];
        matrices[i].name = "a.more";
    }
    options.n_matrices = 6;
    struct hb_catalog c;
    CHECK_EQUAL(hb_catalog_open(&c, &options, err, sizeof err), HOBBIT_OK);
    check_slot(&c, &c.groups[0].copies[HOBBIT_HIGH]);
    hb_catalog_close(&c);
    options.n_matrices = 7;
    refuse(HOBBIT_FORMAT, "a.more");
}

static void low_copies_are_laid_out_beside_the_high_ones(void) {
    for (int32_t io = HOBBIT_IO_AUTO; io <= HOBBIT_IO_BUFFERED; io += 2) {
        struct hb_catalog alone, c;
        describe();
        options.io = io;
        CHECK_EQUAL(hb_catalog_open(&alone, &options, err, sizeof err), HOBBIT_OK);
        describe_low();
        options.io = io;
        CHECK_EQUAL(hb_catalog_open(&c, &options, err, sizeof err), HOBBIT_OK);
        const struct hb_copy *copies = c.groups[0].copies;
        CHECK(copies[HOBBIT_HIGH].n_matrices == 3 && copies[HOBBIT_LOW].n_matrices == 3);
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            check_slot(&c, &copies[p]);
            for (int i = 0; i < 3; i++) {
                const struct hobbit_matrix *from = &matrices[p == HOBBIT_LOW ? 5 + i : i];
                const struct hb_matrix *m = copies[p].matrices[i];
                CHECK(m == &c.matrices[p == HOBBIT_LOW ? 5 + i : i]); /* their numbers stay */
                CHECK(strcmp(m->name, from->name) == 0 && m->file == from->file && m->type == from->type);
                CHECK(m->offset == from->offset && m->expert_bytes == from->expert_bytes && m->precision == p);
            }
        }
        CHECK_EQUAL(copies[HOBBIT_HIGH].slot_bytes, alone.groups[0].copies[HOBBIT_HIGH].slot_bytes);
        CHECK_EQUAL(copies[HOBBIT_LOW].expert_bytes, 1024 + 4096 + 777);
        CHECK_EQUAL(c.groups[1].copies[HOBBIT_LOW].n_matrices, 0);
        CHECK_EQUAL(c.groups[1].copies[HOBBIT_LOW].slot_bytes, 0);
        CHECK(hb_catalog_find(&c, "a.up") == &c.matrices[0]); /* the high one of two of that name */
        CHECK(hb_catalog_find(&c, "a.down") == &c.matrices[2]);
        hb_catalog_close(&c);
        hb_catalog_close(&alone);
    }
}

static void low_copies_have_to_fit_the_high_ones(void) {
    describe_low();
    matrices[5].name = "a.upp";
    refuse_low("a.upp");
    matrices[6].name = "b.up"; /* of another group */
    refuse_low("b.up");
    matrices[7].ne0 = 64;
    refuse_low("a.down");
    matrices[7].ne1 = 32;
    refuse_low("a.down");
    struct hobbit_matrix first = matrices[5];
    matrices[5] = matrices[6]; /* another order than the high ones */
    matrices[6] = first;
    refuse_low("a.gate");
    options.n_matrices = 7; /* one is missing */
    refuse_low("layer 0");
    options.n_matrices = 6;
    refuse_low("layer 0");
    matrices[7].precision = HOBBIT_HIGH; /* after low ones */
    refuse_low("a.down");
    matrices[7].precision = HOBBIT_SKIP;
    refuse_low("a.down");
    matrices[7].precision = -1;
    refuse_low("a.down");
    matrices[2].precision = HOBBIT_LOW; /* before its high one */
    refuse_low("a.down");
    matrices[0].precision = HOBBIT_LOW; /* before all */
    refuse_low("a.up");
    matrices[3] = matrices[7]; /* all of a group's are low */
    matrices[3].group = matrices[4].group = 1;
    matrices[4].precision = HOBBIT_LOW;
    refuse_low("a.down");
    matrices[7].offset++; /* one byte too far */
    refuse_low("a.down");
    matrices[7].expert_bytes = 0;
    refuse_low("a.down");
    struct hobbit_matrix more[9]; /* than there are high ones */
    memcpy(more, matrices, sizeof matrices);
    more[8] = matrices[5];
    more[8].name = "a.more";
    options.matrices = more;
    options.n_matrices = 9;
    refuse_low("a.more");
}

static void every_failed_allocation_is_survived(void) {
    int open_before = files_open();
    struct hb_catalog c;
    enum hobbit_status status = HOBBIT_NOMEM;
    describe_low();
    options.io = HOBBIT_IO_BUFFERED; /* a failed probe would only turn direct reads off */
    for (int n = 1; status == HOBBIT_NOMEM; n++) {
        atomic_store(&faults_allocation, n);
        status = hb_catalog_open(&c, &options, err, sizeof err);
        CHECK(status == HOBBIT_OK || files_open() == open_before);
    }
    atomic_store(&faults_allocation, 0);
    CHECK_EQUAL(status, HOBBIT_OK);
    hb_catalog_close(&c);
    CHECK_EQUAL(files_open(), open_before);
}

int main(void) {
    files[0].path = file_make(FILE_SIZE);
    files[1].path = file_make(FILE_SIZE);
    RUN(slots_have_room_for_aligned_reads);
    RUN(matrices_are_found_by_their_whole_name);
    RUN(missing_files_are_named);
    RUN(direct_reads_can_be_demanded);
    RUN(hostile_descriptions_are_refused);
    RUN(a_group_has_room_for_four_matrices);
    RUN(low_copies_are_laid_out_beside_the_high_ones);
    RUN(low_copies_have_to_fit_the_high_ones);
    RUN(every_failed_allocation_is_survived);
    return 0;
}
