/* Files whose bytes are a function of their offset, in the working folder, removed at exit. */
#ifndef FILES_H
#define FILES_H

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include "check.h"

#define FILES_MAX 16

static char files_names[FILES_MAX][64];
static int files_n;

static inline unsigned char file_byte(uint64_t offset) {
    return (unsigned char) (offset ^ (offset >> 7) ^ (offset >> 13) * 31);
}

static inline void file_fill(unsigned char *dst, uint64_t offset, size_t length) {
    for (size_t i = 0; i < length; i++) {
        dst[i] = file_byte(offset + i);
    }
}

static inline bool file_equals(const void *data, uint64_t offset, size_t length) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < length; i++) {
        if (bytes[i] != file_byte(offset + i)) {
            return false;
        }
    }
    return true;
}

static inline void files_remove(void) {
    while (files_n > 0) {
        unlink(files_names[--files_n]);
    }
}

static inline const char *file_make(size_t size) {
    CHECK(files_n < FILES_MAX);
    if (files_n == 0) {
        atexit(files_remove);
    }
    char *name = files_names[files_n];
    snprintf(name, sizeof files_names[0], "test-%ld-%d.bin", (long) getpid(), files_n);
    files_n++;
    unsigned char *data = malloc(size);
    CHECK(data != NULL);
    file_fill(data, 0, size);
    FILE *file = fopen(name, "wb");
    CHECK(file != NULL && fwrite(data, 1, size, file) == size && fclose(file) == 0);
    free(data);
    return name;
}

/* How many files this process has open, to find leaked ones; 0 where the system does not tell. */
static inline int files_open(void) {
    int n = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder != NULL && readdir(folder) != NULL) {
        n++;
    }
    if (folder != NULL) {
        closedir(folder);
    }
    return n;
}

#endif
