/* Description: files, address space and streams of the operating system layer, its errors too. */
#include "os.h"

#include <errno.h>
#include <sys/mman.h>

#include "faults.h"
#include "files.h"

#define SIZE 10000

static void opening_what_is_not_there_says_why(void) {
    struct hb_file file;
    int open_before = files_open();
    CHECK_EQUAL(hb_file_open(&file, "no such file", false), ENOENT);
    CHECK_EQUAL(hb_file_open(&file, "no such file", true), ENOENT);
    hb_file_close(&file);
    CHECK_EQUAL(files_open(), open_before);
}

static void small_files_are_read_buffered(void) {
    struct hb_file file;
    CHECK_EQUAL(hb_file_open(&file, file_make(100), true), 0);
    CHECK(!file.direct);
    CHECK_EQUAL(file.align, 1);
    hb_file_close(&file);
}

static ssize_t refuse_unaligned(int fd, void *dst, size_t length, off_t offset) {
    if ((uintptr_t) dst % HB_PAGE != 0 || length % HB_PAGE != 0 || offset % HB_PAGE != 0) {
        errno = EINVAL;
        return -1;
    }
    return faults_real_pread(fd, dst, length, offset);
}

static ssize_t refuse_all(int fd, void *dst, size_t length, off_t offset) {
    (void) fd, (void) dst, (void) length, (void) offset;
    errno = EINVAL;
    return -1;
}

static void direct_reads_are_believed_after_a_real_one(void) {
    const char *path = file_make(4 * HB_PAGE);
    struct hb_file file;
    CHECK_EQUAL(hb_file_open(&file, path, true), 0);
    bool works = file.direct;
    hb_file_close(&file);
    int open_before = files_open();
    faults_pread = refuse_unaligned;
    CHECK_EQUAL(hb_file_open(&file, path, true), 0);
    CHECK(file.direct == works && file.align == (works ? HB_PAGE : 1));
    hb_file_close(&file);
    faults_pread = refuse_all;
    CHECK_EQUAL(hb_file_open(&file, path, true), 0);
    CHECK(!file.direct && file.align == 1);
    hb_file_close(&file);
    faults_pread = NULL;
    atomic_store(&faults_allocation, 1); /* no memory for the probe */
    CHECK_EQUAL(hb_file_open(&file, path, true), 0);
    hb_file_close(&file);
    atomic_store(&faults_allocation, 0);
    CHECK_EQUAL(files_open(), open_before);
}

static void reads_stop_at_the_end(void) {
    static char data[SIZE];
    struct hb_file file;
    size_t done;
    CHECK_EQUAL(hb_file_open(&file, file_make(SIZE), false), 0);
    CHECK_EQUAL(hb_file_read(&file, data, SIZE, 0, &done), 0);
    CHECK(done == SIZE && file_equals(data, 0, SIZE));
    CHECK_EQUAL(hb_file_read(&file, data, SIZE, SIZE - 7, &done), 0);
    CHECK(done == 7 && file_equals(data, SIZE - 7, 7));
    CHECK_EQUAL(hb_file_read(&file, data, SIZE, 10 * SIZE, &done), 0);
    CHECK_EQUAL(done, 0);
    faults_pread = refuse_all;
    CHECK_EQUAL(hb_file_read(&file, data, SIZE, 0, &done), EINVAL);
    faults_pread = NULL;
    hb_file_close(&file);
    CHECK_EQUAL(hb_file_read(&file, data, 1, 0, &done), EBADF);
}

static void space_is_mapped_or_refused(void) {
    void *base = NULL;
    CHECK_EQUAL(hb_space_reserve(&base, (size_t) 1 << 36), 0);
    hb_space_release(base, (size_t) 1 << 36);
    for (int huge = 0; huge < 2; huge++) {
        CHECK_EQUAL(hb_space_map(&base, 3 * HB_PAGE, huge), 0);
        CHECK((uintptr_t) base % HB_PAGE == 0 && ((char *) base)[3 * HB_PAGE - 1] == 0);
        memset(base, 1, 3 * HB_PAGE);
        hb_space_release(base, 3 * HB_PAGE);
    }
    hb_space_release(NULL, 5);
    base = NULL;
    atomic_store(&faults_map, 1);
    CHECK_EQUAL(hb_space_map(&base, HB_PAGE, true), ENOMEM);
    CHECK(base == NULL);
}

static int resident_pages(void *base, int n) {
    unsigned char there[64];
    CHECK(n <= 64 && mincore(base, (size_t) n * HB_PAGE, there) == 0);
    int resident = 0;
    for (int i = 0; i < n; i++) {
        resident += there[i] & 1;
    }
    return resident;
}

static void dropped_pages_go_and_are_zero_again(void) {
    enum { N = 64 };
    char *pages;
    void *base = NULL;
    CHECK_EQUAL(hb_space_map(&base, N * HB_PAGE, false), 0);
    pages = base;
    CHECK_EQUAL(resident_pages(base, N), 0);
    pages[5 * HB_PAGE] = 1;
    CHECK_EQUAL(resident_pages(base, N), 1); /* no huge page came */
    memset(base, 1, N * HB_PAGE);
    CHECK_EQUAL(resident_pages(base, N), N);
    hb_space_drop(pages + 3 * HB_PAGE, 2 * HB_PAGE);
    CHECK_EQUAL(resident_pages(base, N), N - 2);
    CHECK_EQUAL(resident_pages(pages + 3 * HB_PAGE, 2), 0);
    CHECK(pages[3 * HB_PAGE - 1] == 1 && pages[5 * HB_PAGE] == 1);
    for (size_t i = 3 * HB_PAGE; i < 5 * HB_PAGE; i++) {
        CHECK(pages[i] == 0);
    }
    pages[4 * HB_PAGE] = 1; /* and still ours */
    hb_space_release(base, N * HB_PAGE);
}

static int closed;

static int64_t read_numbers(void *context, uint64_t offset, void *dst, size_t length) {
    (void) context;
    length = length > 100 ? 100 : length; /* short, as reads may be */
    file_fill(dst, offset, length);
    return (int64_t) length;
}

static void count_close(void *context) {
    (void) context;
    closed++;
}

static void streams_seek_and_tell(void) {
    static char data[SIZE];
    const struct hb_stream_ops ops = {read_numbers, count_close};
    FILE *file = hb_stream_new(NULL, &ops, SIZE);
    CHECK(file != NULL);
    CHECK_EQUAL(fread(data, 1, SIZE, file), SIZE);
    CHECK(file_equals(data, 0, SIZE));
    CHECK(fgetc(file) == EOF && feof(file));
    CHECK_EQUAL(fseeko(file, 0, SEEK_END), 0);
    CHECK_EQUAL(ftello(file), SIZE);
    CHECK_EQUAL(fseeko(file, -10, SEEK_CUR), 0);
    CHECK_EQUAL(fread(data, 1, 20, file), 10);
    CHECK(file_equals(data, SIZE - 10, 10));
    CHECK(fseeko(file, -1, SEEK_SET) != 0);
    CHECK_EQUAL(fseeko(file, 2 * SIZE, SEEK_SET), 0); /* past the end: reads nothing */
    CHECK_EQUAL(fread(data, 1, 1, file), 0);
    CHECK_EQUAL(fclose(file), 0);
    CHECK_EQUAL(closed, 1);
    atomic_store(&faults_allocation, 1);
    CHECK(hb_stream_new(NULL, &ops, SIZE) == NULL);
    CHECK_EQUAL(closed, 1); /* the context stays the caller's */
}

static void time_goes_on(void) {
    uint64_t before = hb_now_ns();
    usleep(1000);
    CHECK(hb_now_ns() >= before + 1000000);
}

int main(void) {
    RUN(opening_what_is_not_there_says_why);
    RUN(small_files_are_read_buffered);
    RUN(direct_reads_are_believed_after_a_real_one);
    RUN(reads_stop_at_the_end);
    RUN(space_is_mapped_or_refused);
    RUN(dropped_pages_go_and_are_zero_again);
    RUN(streams_seek_and_tell);
    RUN(time_goes_on);
    return 0;
}
