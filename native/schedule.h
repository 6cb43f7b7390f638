/* A precision schedule: which precision each expert of each layer got, computation by computation, in a file. A run
 * that replays it computes what the recorded run did, bit by bit, whatever its cache holds.
 *
 * File: "HBSCHED1", the length of a note (4 bytes, little endian), the note, then for each computation of a layer:
 * group, number of experts, and for each expert * 4 + precision; numbers are LEB128. */
#ifndef HB_SCHEDULE_H
#define HB_SCHEDULE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct hb_schedule;

enum hb_schedule_step {
    HB_SCHEDULE_OK,
    HB_SCHEDULE_ENDED, /* nothing more was recorded */
    HB_SCHEDULE_OTHER, /* another computation was recorded here */
    HB_SCHEDULE_IO,    /* errno says why */
};

/* NULL, with errno set, when the file cannot be used; errno 0: it is no schedule. */
struct hb_schedule *hb_schedule_create(const char *path, const char *note);
struct hb_schedule *hb_schedule_open(const char *path);
/* Whether what was written is on its way to the disk. NULL is fine. */
bool hb_schedule_close(struct hb_schedule *schedule);
bool hb_schedule_is_replay(const struct hb_schedule *schedule);

/* Write the precisions of the experts, or replace them by those that were recorded for the same experts. */
enum hb_schedule_step hb_schedule_next(struct hb_schedule *schedule, int32_t group, int32_t n,
                                       const int32_t *experts, int32_t *precisions);

#endif
