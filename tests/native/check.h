/* What a C test needs: a check that ends the program, named cases, exit status 77 for "cannot run here", and random
 * numbers that are the same on every run. */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK_SKIPPED 77

#define CHECK(condition) check_that((condition), #condition, __FILE__, __LINE__)
#define CHECK_EQUAL(actual, expected) \
    check_equal((int64_t) (actual), (int64_t) (expected), #actual, __FILE__, __LINE__)
#define CHECK_TEXT(text, part) check_text((text), (part), __FILE__, __LINE__)
#define RUN(test) (printf("%s\n", #test), fflush(stdout), test())

static inline void check_that(bool good, const char *what, const char *file, int line) {
    if (!good) {
        fprintf(stderr, "%s:%d: %s\n", file, line, what);
        exit(1);
    }
}

static inline void check_equal(int64_t actual, int64_t expected, const char *what, const char *file, int line) {
    if (actual != expected) {
        fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", file, line, what, (long long) actual, (long long) expected);
        exit(1);
    }
}

static inline void check_text(const char *text, const char *part, const char *file, int line) {
    if (strstr(text, part) == NULL) {
        fprintf(stderr, "%s:%d: \"%s\" is not in \"%s\"\n", file, line, part, text);
        exit(1);
    }
}

/* splitmix64; below `limit`. */
static inline uint32_t check_random(uint64_t *state, uint32_t limit) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t) ((z ^ (z >> 31)) % limit);
}

#endif
