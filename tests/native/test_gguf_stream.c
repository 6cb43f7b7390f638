/* Description: the virtual file: extents in order, holes without I/O, seeking, and errors that llama.cpp sees. */
#include "gguf_stream.h"

#include <errno.h>

#include "faults.h"
#include "files.h"

#define HEADER 777
#define FILE_SIZE 300000
#define HOLE ((uint64_t) 1 << 33) /* no machine reads that by accident */

static char header[HEADER];
static char *paths[2];
static char err[256];
static atomic_uint_fast64_t served;

/* memory | file 0 | hole | file 1 | file 0 */
static struct hobbit_extent extents[] = {
    {.length = HEADER, .source = HOBBIT_SOURCE_MEMORY, .file = -1, .data = header},
    {.length = 100000, .source = HOBBIT_SOURCE_FILE, .file = 0, .file_offset = 123},
    {.length = HOLE, .source = HOBBIT_SOURCE_HOLE, .file = 0},
    {.length = 50001, .source = HOBBIT_SOURCE_FILE, .file = 1, .file_offset = 0},
    {.length = 99, .source = HOBBIT_SOURCE_FILE, .file = 0, .file_offset = FILE_SIZE - 99},
};
enum { N_EXTENTS = sizeof extents / sizeof extents[0] };

static void prepare(void) {
    paths[0] = (char *) (uintptr_t) file_make(FILE_SIZE);
    paths[1] = (char *) (uintptr_t) file_make(FILE_SIZE);
    memset(header, 'h', sizeof header);
    for (int i = 1; i < N_EXTENTS; i++) {
        extents[i].offset = extents[i - 1].offset + extents[i - 1].length;
    }
}

static FILE *open_stream(void) {
    atomic_store(&served, 0);
    FILE *file = hb_gguf_stream_open(extents, N_EXTENTS, paths, 2, &served, err, sizeof err);
    CHECK(file != NULL);
    return file;
}

static bool is_header(const char *data, size_t length) {
    return memcmp(data, header, length) == 0;
}

static void reads_cross_extents(void) {
    static char data[HEADER + 100000];
    FILE *file = open_stream();
    CHECK_EQUAL(fread(data, 1, sizeof data, file), sizeof data);
    CHECK(is_header(data, HEADER) && file_equals(data + HEADER, 123, 100000));
    CHECK_EQUAL(fseeko(file, HEADER - 5, SEEK_SET), 0);
    CHECK_EQUAL(fread(data, 1, 10, file), 10);
    CHECK(is_header(data, 5) && file_equals(data + 5, 123, 5));
    CHECK_EQUAL(fseeko(file, (off_t) extents[3].offset + 50001 - 1000, SEEK_SET), 0);
    CHECK_EQUAL(fread(data, 1, 2000, file), 1099);
    CHECK(file_equals(data, 49001, 1000) && file_equals(data + 1000, FILE_SIZE - 99, 99));
    CHECK(feof(file) && !ferror(file));
    fclose(file);
}

static void holes_cost_no_read(void) {
    static char data[1 << 20];
    FILE *file = open_stream();
    atomic_store(&faults_pread_calls, 0);
    /* far from the ends: stdio begins its buffer somewhat before the position */
    CHECK_EQUAL(fseeko(file, (off_t) extents[2].offset + (1 << 24), SEEK_SET), 0);
    for (int i = 0; i < 100; i++) {
        CHECK_EQUAL(fread(data, 1, sizeof data, file), sizeof data);
    }
    CHECK_EQUAL(atomic_load(&faults_pread_calls), 0);
    CHECK_EQUAL(atomic_load(&served), 0);
    CHECK_EQUAL(fseeko(file, (off_t) extents[3].offset, SEEK_SET), 0);
    CHECK_EQUAL(fread(data, 1, 50001 + 99, file), 50001 + 99);
    CHECK(atomic_load(&served) >= 50001 + 99);
    fclose(file);
}

static void seeks_and_tells(void) {
    FILE *file = open_stream();
    const struct hobbit_extent *last = &extents[N_EXTENTS - 1];
    CHECK_EQUAL(fseeko(file, 0, SEEK_END), 0);
    CHECK_EQUAL(ftello(file), last->offset + last->length);
    CHECK_EQUAL(fseeko(file, -1, SEEK_END), 0);
    CHECK_EQUAL(fgetc(file), file_byte(FILE_SIZE - 1));
    CHECK_EQUAL(fgetc(file), EOF);
    CHECK_EQUAL(fseeko(file, HEADER + 7, SEEK_SET), 0);
    CHECK_EQUAL(fgetc(file), file_byte(123 + 7));
    CHECK_EQUAL(fseeko(file, 10, SEEK_CUR), 0);
    CHECK_EQUAL(ftello(file), HEADER + 18);
    CHECK_EQUAL(fgetc(file), file_byte(123 + 18));
    fclose(file);
}

static void every_position_has_its_byte(void) {
    FILE *file = open_stream();
    uint64_t seed = 5;
    for (int i = 0; i < 3000; i++) {
        const struct hobbit_extent *e = &extents[check_random(&seed, N_EXTENTS)];
        uint64_t within = check_random(&seed, (uint32_t) (e->length > 1u << 31 ? 1u << 31 : e->length));
        CHECK_EQUAL(fseeko(file, (off_t) (e->offset + within), SEEK_SET), 0);
        int c = fgetc(file);
        CHECK(c != EOF);
        CHECK(e->source == HOBBIT_SOURCE_HOLE || c == (e->source == HOBBIT_SOURCE_MEMORY ? 'h'
                                                           : file_byte(e->file_offset + within)));
    }
    fclose(file);
}

static ssize_t fail(int fd, void *dst, size_t length, off_t offset) {
    (void) fd, (void) dst, (void) length, (void) offset;
    errno = EIO;
    return -1;
}

static void read_errors_surface(void) {
    static char data[HEADER + 1000];
    FILE *file = open_stream();
    faults_pread = fail;
    size_t n = fread(data, 1, sizeof data, file);
    CHECK(n < sizeof data && ferror(file));
    faults_pread = NULL;
    fclose(file);
    extents[N_EXTENTS - 1].file_offset += 50; /* the file ends inside the extent */
    file = open_stream();
    CHECK_EQUAL(fseeko(file, (off_t) extents[N_EXTENTS - 1].offset, SEEK_SET), 0);
    CHECK(fread(data, 1, 99, file) < 99);
    CHECK(ferror(file));
    extents[N_EXTENTS - 1].file_offset -= 50;
    fclose(file);
}

static void opening_fails_with_a_reason_and_nothing_left(void) {
    int open_before = files_open();
    char *missing[2] = {paths[0], (char *) (uintptr_t) "no such part"};
    CHECK(hb_gguf_stream_open(extents, N_EXTENTS, missing, 2, &served, err, sizeof err) == NULL);
    CHECK_TEXT(err, "no such part");
    FILE *file = NULL;
    for (int n = 1; file == NULL; n++) {
        atomic_store(&faults_allocation, n);
        file = hb_gguf_stream_open(extents, N_EXTENTS, paths, 2, &served, err, sizeof err);
        CHECK(n < 10);
    }
    atomic_store(&faults_allocation, 0);
    fclose(file);
    CHECK_EQUAL(files_open(), open_before);
}

int main(void) {
    prepare();
    RUN(reads_cross_extents);
    RUN(holes_cost_no_read);
    RUN(seeks_and_tells);
    RUN(every_position_has_its_byte);
    RUN(read_errors_surface);
    RUN(opening_fails_with_a_reason_and_nothing_left);
    return 0;
}
