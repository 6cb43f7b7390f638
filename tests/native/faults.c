#include "faults.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

atomic_int faults_allocation, faults_thread, faults_map, faults_pread_calls;
atomic_bool faults_gate_open;
faults_pread_function *_Atomic faults_pread;

static bool fails(atomic_int *countdown) {
    return atomic_load(countdown) > 0 && atomic_fetch_sub(countdown, 1) == 1;
}

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size) {
    return fails(&faults_allocation) ? NULL : __real_malloc(size);
}

void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size) {
    return fails(&faults_allocation) ? NULL : __real_calloc(n, size);
}

void *__real_aligned_alloc(size_t align, size_t size);
void *__wrap_aligned_alloc(size_t align, size_t size);
void *__wrap_aligned_alloc(size_t align, size_t size) {
    return fails(&faults_allocation) ? NULL : __real_aligned_alloc(align, size);
}

int __real_posix_memalign(void **out, size_t align, size_t size);
int __wrap_posix_memalign(void **out, size_t align, size_t size);
int __wrap_posix_memalign(void **out, size_t align, size_t size) {
    return fails(&faults_allocation) ? ENOMEM : __real_posix_memalign(out, align, size);
}

char *__real_strdup(const char *text);
char *__wrap_strdup(const char *text);
char *__wrap_strdup(const char *text) {
    return fails(&faults_allocation) ? NULL : __real_strdup(text);
}

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument) {
    return fails(&faults_thread) ? EAGAIN : __real_pthread_create(thread, attributes, start, argument);
}

void *__real_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    if (fails(&faults_map)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return __real_mmap(address, length, protection, flags, fd, offset);
}

ssize_t __real_pread(int fd, void *dst, size_t length, off_t offset);
ssize_t __wrap_pread(int fd, void *dst, size_t length, off_t offset);
ssize_t __wrap_pread(int fd, void *dst, size_t length, off_t offset) {
    atomic_fetch_add(&faults_pread_calls, 1);
    faults_pread_function *instead = faults_pread;
    return instead != NULL ? instead(fd, dst, length, offset) : __real_pread(fd, dst, length, offset);
}

ssize_t faults_real_pread(int fd, void *dst, size_t length, off_t offset) {
    return __real_pread(fd, dst, length, offset);
}

ssize_t faults_gated_pread(int fd, void *dst, size_t length, off_t offset) {
    while (!atomic_load(&faults_gate_open)) {
        usleep(100);
    }
    return __real_pread(fd, dst, length, offset);
}

void faults_await_preads(int n) {
    while (atomic_load(&faults_pread_calls) < n) {
        usleep(100);
    }
}
