/* Faults made to order: the linker puts these functions in place of the C library's (see CMakeLists.txt). */
#ifndef FAULTS_H
#define FAULTS_H

#include <stdatomic.h>
#include <sys/types.h>

/* The n-th call from now on fails, once; 0: none does. Counted down by each call. */
extern atomic_int faults_allocation; /* malloc, calloc, posix_memalign, aligned_alloc, strdup */
extern atomic_int faults_thread;     /* pthread_create */
extern atomic_int faults_map;        /* mmap */

/* In place of pread where not NULL; may call faults_real_pread. Set while nobody reads. */
typedef ssize_t faults_pread_function(int fd, void *dst, size_t length, off_t offset);
extern faults_pread_function *_Atomic faults_pread;
ssize_t faults_real_pread(int fd, void *dst, size_t length, off_t offset);
extern atomic_int faults_pread_calls;
/* For faults_pread: reads that begin, and end once the gate is open. */
extern atomic_bool faults_gate_open;
ssize_t faults_gated_pread(int fd, void *dst, size_t length, off_t offset);
/* Wait until so many reads have begun since faults_pread_calls was set to 0. */
void faults_await_preads(int n);

#endif
