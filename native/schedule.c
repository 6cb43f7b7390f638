#include "schedule.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hobbit.h"

static const char magic[8] = {'H', 'B', 'S', 'C', 'H', 'E', 'D', '1'};

struct hb_schedule {
    FILE *file;
    bool replay;
};

static struct hb_schedule *open_file(const char *path, bool replay) {
    struct hb_schedule *s = calloc(1, sizeof *s);
    if (s == NULL) {
        return NULL;
    }
    s->replay = replay;
    s->file = fopen(path, replay ? "rb" : "wb");
    if (s->file == NULL) {
        free(s);
        return NULL;
    }
    return s;
}

bool hb_schedule_close(struct hb_schedule *s) {
    bool good = s == NULL || fclose(s->file) == 0;
    free(s);
    return good;
}

bool hb_schedule_is_replay(const struct hb_schedule *s) {
    return s->replay;
}

struct hb_schedule *hb_schedule_create(const char *path, const char *note) {
    struct hb_schedule *s = open_file(path, false);
    size_t length = strlen(note);
    uint8_t bytes[4] = {(uint8_t) length, (uint8_t) (length >> 8), (uint8_t) (length >> 16), (uint8_t) (length >> 24)};
    if (s != NULL && (fwrite(magic, sizeof magic, 1, s->file) != 1 || fwrite(bytes, sizeof bytes, 1, s->file) != 1 ||
                      fwrite(note, 1, length, s->file) != length)) {
        int error = errno;
        (void) hb_schedule_close(s);
        errno = error;
        return NULL;
    }
    return s;
}

struct hb_schedule *hb_schedule_open(const char *path) {
    struct hb_schedule *s = open_file(path, true);
    char head[sizeof magic];
    uint8_t bytes[4];
    if (s != NULL && (fread(head, sizeof head, 1, s->file) != 1 || memcmp(head, magic, sizeof magic) != 0 ||
                      fread(bytes, sizeof bytes, 1, s->file) != 1 ||
                      fseek(s->file, bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (long) bytes[3] << 24, SEEK_CUR))) {
        (void) hb_schedule_close(s);
        errno = 0;
        return NULL;
    }
    return s;
}

static bool put(FILE *file, uint32_t value) {
    for (; value >= 0x80; value >>= 7) {
        if (putc((int) (value & 0x7f) | 0x80, file) == EOF) {
            return false;
        }
    }
    return putc((int) value, file) != EOF;
}

static bool get(FILE *file, uint32_t *value) {
    *value = 0;
    for (int shift = 0; shift < 32; shift += 7) {
        int byte = getc(file);
        if (byte == EOF) {
            return false;
        }
        *value |= (uint32_t) (byte & 0x7f) << shift;
        if (byte < 0x80) {
            return true;
        }
    }
    return false;
}

static enum hb_schedule_step record(FILE *file, int32_t group, int32_t n, const int32_t *experts,
                                    const int32_t *precisions) {
    bool good = put(file, (uint32_t) group) && put(file, (uint32_t) n);
    for (int32_t i = 0; good && i < n; i++) {
        good = put(file, (uint32_t) experts[i] * 4 + (uint32_t) precisions[i]);
    }
    return good ? HB_SCHEDULE_OK : HB_SCHEDULE_IO;
}

static enum hb_schedule_step replay(FILE *file, int32_t group, int32_t n, const int32_t *experts,
                                    int32_t *precisions) {
    uint32_t value;
    if (!get(file, &value)) {
        return ferror(file) ? HB_SCHEDULE_IO : HB_SCHEDULE_ENDED;
    }
    if (value != (uint32_t) group || !get(file, &value) || value != (uint32_t) n) {
        return HB_SCHEDULE_OTHER;
    }
    for (int32_t i = 0; i < n; i++) {
        if (!get(file, &value) || value / 4 != (uint32_t) experts[i] || value % 4 > HOBBIT_SKIP) {
            return HB_SCHEDULE_OTHER;
        }
        precisions[i] = (int32_t) (value % 4);
    }
    return HB_SCHEDULE_OK;
}

enum hb_schedule_step hb_schedule_next(struct hb_schedule *s, int32_t group, int32_t n, const int32_t *experts,
                                       int32_t *precisions) {
    return s->replay ? replay(s->file, group, n, experts, precisions)
                     : record(s->file, group, n, experts, precisions);
}
