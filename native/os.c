#include "os.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* Direct I/O is only believed after a real read: some file systems accept the flag and fail later. */
static bool probe(struct hb_file *file, uint32_t align) {
    void *page = NULL;
    if (posix_memalign(&page, HB_PAGE, 2 * HB_PAGE) != 0) {
        return false;
    }
    struct stat st;
    bool works = fstat(file->fd, &st) == 0 && st.st_size >= (off_t) (2 * align) &&
                 pread(file->fd, (char *) page + align, align, (off_t) align) == (ssize_t) align;
    free(page);
    if (works) {
        file->align = align;
    }
    return works;
}

static bool turn_on_direct(struct hb_file *file, const char *path) {
#if defined(__APPLE__)
    (void) path;
    if (fcntl(file->fd, F_NOCACHE, 1) == 0 && probe(file, HB_PAGE)) {
        return true;
    }
    fcntl(file->fd, F_NOCACHE, 0);
    return false;
#else
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (fd < 0) {
        return false;
    }
    struct hb_file direct = {.fd = fd};
    if (!probe(&direct, 512) && !probe(&direct, HB_PAGE)) {
        close(fd);
        return false;
    }
    close(file->fd);
    *file = direct;
    return true;
#endif
}

int hb_file_open(struct hb_file *file, const char *path, bool direct) {
    *file = (struct hb_file) {.fd = open(path, O_RDONLY | O_CLOEXEC), .align = 1};
    if (file->fd < 0) {
        return errno;
    }
    if (direct) {
        file->direct = turn_on_direct(file, path);
    }
    if (!file->direct) {
        file->align = 1;
    }
    return 0;
}

void hb_file_close(struct hb_file *file) {
    if (file->fd >= 0) {
        close(file->fd);
    }
    file->fd = -1;
}

/* macOS refuses more than INT_MAX bytes in a call. */
#define MAX_CALL ((size_t) 1 << 30)

int hb_file_read(const struct hb_file *file, void *dst, size_t length, uint64_t offset, size_t *done) {
    *done = 0;
    while (*done < length) {
        size_t ask = length - *done < MAX_CALL ? length - *done : MAX_CALL;
        ssize_t n = pread(file->fd, (char *) dst + *done, ask, (off_t) (offset + *done));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return errno;
        }
        if (n == 0) {
            break;
        }
        *done += (size_t) n;
        /* A direct read that stops off its alignment has met the end of the file: asking again would be refused. */
        if (file->direct && *done % file->align != 0) {
            break;
        }
    }
    return 0;
}

static int map(void **base, size_t size, int protection, int flags) {
    void *p = mmap(NULL, size, protection, flags | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        return errno;
    }
    *base = p;
    return 0;
}

int hb_space_reserve(void **base, size_t size) {
    return map(base, size, PROT_NONE, MAP_NORESERVE);
}

int hb_space_map(void **base, size_t size, bool huge) {
    int error = map(base, size, PROT_READ | PROT_WRITE, MAP_NORESERVE);
    (void) huge;
#ifdef MADV_HUGEPAGE
    if (error == 0) {
        (void) madvise(*base, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE); /* a wish: fine without */
    }
#endif
    return error;
}

void hb_space_drop(void *base, size_t size) {
#ifdef __linux__
    (void) madvise(base, size, MADV_DONTNEED);
#else
    (void) mmap(base, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
#endif
}

void hb_space_release(void *base, size_t size) {
    if (base != NULL) {
        munmap(base, size);
    }
}

uint64_t hb_now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t) ts.tv_sec * 1000000000u + (uint64_t) ts.tv_nsec;
}

/* glibc copies what a stream like ours reads through this buffer, whatever the size of the fread, and fills it anew
 * after each seek: large enough for few calls, small enough for small tensors. */
#define STREAM_BUFFER ((size_t) 64 << 10)

struct stream {
    void *context;
    struct hb_stream_ops ops;
    uint64_t size, position;
    char buffer[STREAM_BUFFER];
};

static int64_t stream_read(struct stream *s, char *dst, size_t length) {
    if (s->position >= s->size) {
        return 0;
    }
    if (length > s->size - s->position) {
        length = (size_t) (s->size - s->position);
    }
    int64_t n = s->ops.read(s->context, s->position, dst, length);
    if (n > 0) {
        s->position += (uint64_t) n;
    }
    return n;
}

static int64_t stream_seek(struct stream *s, int64_t offset, int whence) {
    int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? (int64_t) s->position : (int64_t) s->size;
    if (offset < -base || offset > INT64_MAX - base) {
        errno = EINVAL;
        return -1;
    }
    s->position = (uint64_t) (base + offset);
    return base + offset;
}

static int stream_close(void *cookie) {
    struct stream *s = cookie;
    s->ops.close(s->context);
    free(s);
    return 0;
}

#if defined(__APPLE__)
static int cookie_read(void *cookie, char *dst, int length) {
    return (int) stream_read(cookie, dst, (size_t) length);
}
static fpos_t cookie_seek(void *cookie, fpos_t offset, int whence) {
    return stream_seek(cookie, offset, whence);
}
static FILE *cookie_open(struct stream *s) {
    return funopen(s, cookie_read, NULL, cookie_seek, stream_close);
}
#else
static ssize_t cookie_read(void *cookie, char *dst, size_t length) {
    return (ssize_t) stream_read(cookie, dst, length);
}
static int cookie_seek(void *cookie, off64_t *offset, int whence) {
    int64_t position = stream_seek(cookie, *offset, whence);
    *offset = position;
    return position < 0 ? -1 : 0;
}
static FILE *cookie_open(struct stream *s) {
    cookie_io_functions_t functions = {.read = cookie_read, .seek = cookie_seek, .close = stream_close};
    return fopencookie(s, "rb", functions);
}
#endif

FILE *hb_stream_new(void *context, const struct hb_stream_ops *ops, uint64_t size) {
    struct stream *s = malloc(sizeof *s);
    if (s == NULL) {
        return NULL;
    }
    s->context = context;
    s->ops = *ops;
    s->size = size;
    s->position = 0;
    FILE *file = cookie_open(s);
    if (file == NULL) {
        free(s);
        return NULL;
    }
    setvbuf(file, s->buffer, _IOFBF, sizeof s->buffer);
    return file;
}
