/* Everything that differs between operating systems. Linux is tested; the macOS branches are written from its
 * manual pages. Every function may be called from any thread. Sizes and offsets are bytes. Functions that can
 * fail return 0 or a positive errno value, never print and never abort. */
#ifndef HB_OS_H
#define HB_OS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define HB_PAGE 4096u /* the strictest alignment that direct I/O asks for on the disks we know */

/* A read-only file. `direct` reads bypass the page cache and need offset, length and address aligned to `align`. */
struct hb_file {
    int fd;
    bool direct;
    uint32_t align; /* 1 when buffered */
};

int hb_file_open(struct hb_file *file, const char *path, bool direct);
void hb_file_close(struct hb_file *file);

/* Read up to `length` bytes, completing short reads; `*done` is less than `length` only at the end of the file. */
int hb_file_read(const struct hb_file *file, void *dst, size_t length, uint64_t offset, size_t *done);

/* Address space without memory behind it; touching it faults. */
int hb_space_reserve(void **base, size_t size);
/* Zeroed anonymous memory; pages appear when touched. With `huge`, in huge pages where the system has them: fewer TLB
 * misses, but memory is taken and given back in pieces of 2 MiB. */
int hb_space_map(void **base, size_t size, bool huge);
/* Give the pages back; touched again, they are zero. */
void hb_space_drop(void *base, size_t size);
void hb_space_release(void *base, size_t size);

uint64_t hb_now_ns(void); /* monotonic */

/* A FILE* whose bytes come from `read` (which returns the count, or -1) of a source `size` bytes long. */
struct hb_stream_ops {
    int64_t (*read)(void *context, uint64_t offset, void *dst, size_t length);
    void (*close)(void *context);
};
FILE *hb_stream_new(void *context, const struct hb_stream_ops *ops, uint64_t size);

#endif
