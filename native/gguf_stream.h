/* The GGUF that llama.cpp reads: a FILE* over a list of extents. Header and dense tensors come from the files (or
 * from memory, for the merged header of a multi-part model); expert data is a hole that costs no I/O. */
#ifndef HB_GGUF_STREAM_H
#define HB_GGUF_STREAM_H

#include <stdatomic.h>
#include <stdio.h>

#include "hobbit.h"

struct hb_gguf_stream;

/* Opens its own buffered handles: the page cache may help here. `served` counts the bytes taken from files. */
FILE *hb_gguf_stream_open(const struct hobbit_extent *extents, int32_t n_extents, char *const *paths, int32_t n_files,
                          atomic_uint_fast64_t *served, char *err, size_t err_len);

#endif
