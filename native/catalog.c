#include "catalog.h"

#include <stdlib.h>
#include <string.h>

#include "nested.h"

/* Matrices start at multiples of this in a slot, for the sake of vector loads. */
#define MATRIX_ALIGN 64u

static uint64_t round_up(uint64_t n, uint64_t to) {
    return (n + to - 1) / to * to;
}

static enum hobbit_status open_files(struct hb_catalog *c, const struct hobbit_options *o, char *err, size_t err_len) {
    c->files = calloc((size_t) o->n_files, sizeof *c->files);
    c->paths = calloc((size_t) o->n_files, sizeof *c->paths);
    if (c->files == NULL || c->paths == NULL) {
        return HOBBIT_NOMEM;
    }
    for (; c->n_files < o->n_files; c->n_files++) {
        const char *path = o->files[c->n_files].path;
        int error = hb_file_open(&c->files[c->n_files], path, o->io != HOBBIT_IO_BUFFERED);
        if (error != 0) {
            snprintf(err, err_len, "cannot open %s: %s", path, strerror(error));
            return HOBBIT_IO;
        }
        c->paths[c->n_files] = strdup(path);
        if (c->paths[c->n_files] == NULL) {
            hb_file_close(&c->files[c->n_files]);
            return HOBBIT_NOMEM;
        }
        if (o->io == HOBBIT_IO_DIRECT && !c->files[c->n_files].direct) {
            snprintf(err, err_len, "%s cannot be read directly on this file system: use --io auto or buffered", path);
            c->n_files++;
            return HOBBIT_UNSUPPORTED;
        }
    }
    return HOBBIT_OK;
}

/* Sizes are kept far from where sums of a few of them could wrap. */
#define MAX_FILE_SIZE ((uint64_t) INT64_MAX / 16)

static bool within_file(const struct hobbit_matrix *m, int64_t n_expert, uint64_t file_size) {
    uint64_t bytes, stored = m->plane_bytes > 0 ? m->plane_bytes : m->expert_bytes;
    return file_size <= MAX_FILE_SIZE && m->expert_bytes > 0 && m->expert_bytes <= MAX_FILE_SIZE &&
           stored <= m->expert_bytes && m->ne0 > 0 && m->ne1 > 0 &&
           !__builtin_mul_overflow(stored, (uint64_t) n_expert, &bytes) && bytes <= file_size &&
           m->offset <= file_size - bytes;
}

static enum hobbit_status add_groups(struct hb_catalog *c, const struct hobbit_options *o, char *err, size_t err_len) {
    c->groups = calloc((size_t) o->n_groups, sizeof *c->groups);
    if (c->groups == NULL) {
        return HOBBIT_NOMEM;
    }
    for (; c->n_groups < o->n_groups; c->n_groups++) {
        const struct hobbit_group *from = &o->groups[c->n_groups];
        if (from->n_expert < 1) {
            snprintf(err, err_len, "layer %d has no experts", from->layer);
            return HOBBIT_FORMAT;
        }
        c->groups[c->n_groups] = (struct hb_group) {.layer = from->layer, .n_expert = from->n_expert,
                                                        .first_expert = c->n_experts};
        if (__builtin_add_overflow(c->n_experts, from->n_expert, &c->n_experts)) {
            snprintf(err, err_len, "too many experts");
            return HOBBIT_FORMAT;
        }
        c->most_experts = from->n_expert > c->most_experts ? from->n_expert : c->most_experts;
    }
    return HOBBIT_OK;
}

/* Lay the matrix out in its group's slot so that a direct read of any expert can write in place: file offset and
 * slot offset agree modulo the file's alignment, with room for the aligned superset. */
static void place(struct hb_copy *copy, struct hb_matrix *m, const struct hb_file *file) {
    uint64_t align = file->align > MATRIX_ALIGN ? file->align : MATRIX_ALIGN;
    uint64_t tail = m->expert_bytes - m->file_bytes;
    m->bounce = file->direct && m->file_bytes % file->align != 0;
    uint64_t lead = m->bounce ? 0 : (m->offset % file->align + align - tail % align) % file->align;
    m->slot_offset = round_up(copy->slot_bytes, align) + lead;
    m->load_offset = m->slot_offset + tail;
    copy->nested |= tail > 0;
    copy->slot_bytes = round_up(m->slot_offset + m->expert_bytes, align);
    copy->expert_bytes += m->expert_bytes;
    m->role = copy->n_matrices;
    copy->matrices[copy->n_matrices++] = m;
}

/* The planes of a nested copy are both there, block for block. */
static bool completes(const struct hb_copy *high, const struct hb_copy *low) {
    for (int32_t i = 0; high->nested && i < high->n_matrices; i++) {
        const struct hb_matrix *m = high->matrices[i];
        uint64_t blocks = m->expert_bytes / HB_Q8_0_BLOCK;
        if (low->n_matrices == 0 || m->expert_bytes != blocks * HB_Q8_0_BLOCK ||
            m->file_bytes != blocks * HB_LOW_BLOCK ||
            low->matrices[i]->expert_bytes != blocks * HB_HIGH_BLOCK) {
            return false;
        }
    }
    return true;
}

/* A low matrix follows its high one: same name, same shape, same place in the order. */
static bool belongs(const struct hb_group *g, const struct hobbit_matrix *m) {
    if (m->precision == HOBBIT_HIGH) {
        return g->copies[HOBBIT_LOW].n_matrices == 0 && g->copies[HOBBIT_HIGH].n_matrices < HB_GROUP_MATRICES;
    }
    int32_t role = m->precision == HOBBIT_LOW ? g->copies[HOBBIT_LOW].n_matrices : HB_GROUP_MATRICES;
    if (role >= g->copies[HOBBIT_HIGH].n_matrices) {
        return false;
    }
    const struct hb_matrix *high = g->copies[HOBBIT_HIGH].matrices[role];
    return strcmp(high->name, m->name) == 0 && high->ne0 == m->ne0 && high->ne1 == m->ne1 && m->plane_bytes == 0;
}

static enum hobbit_status add_matrices(struct hb_catalog *c, const struct hobbit_options *o, char *err,
                                       size_t err_len) {
    c->matrices = calloc((size_t) o->n_matrices, sizeof *c->matrices);
    if (c->matrices == NULL) {
        return HOBBIT_NOMEM;
    }
    for (; c->n_matrices < o->n_matrices; c->n_matrices++) {
        const struct hobbit_matrix *from = &o->matrices[c->n_matrices];
        struct hb_matrix *m = &c->matrices[c->n_matrices];
        if (from->group < 0 || from->group >= c->n_groups || from->file < 0 || from->file >= c->n_files ||
            !belongs(&c->groups[from->group], from) ||
            !within_file(from, c->groups[from->group].n_expert, o->files[from->file].size)) {
            snprintf(err, err_len, "tensor %s does not lie within its file and layer", from->name);
            return HOBBIT_FORMAT;
        }
        *m = (struct hb_matrix) {.name = strdup(from->name), .group = from->group, .precision = from->precision,
                                 .file = from->file, .type = from->type, .ne0 = from->ne0, .ne1 = from->ne1,
                                 .offset = from->offset, .expert_bytes = from->expert_bytes,
                                 .file_bytes = from->plane_bytes > 0 ? from->plane_bytes : from->expert_bytes};
        if (m->name == NULL) {
            return HOBBIT_NOMEM;
        }
        place(&c->groups[m->group].copies[m->precision], m, &c->files[m->file]);
    }
    for (int32_t g = 0; g < c->n_groups; g++) {
        struct hb_copy *copies = c->groups[g].copies;
        int32_t n_high = copies[HOBBIT_HIGH].n_matrices, n_low = copies[HOBBIT_LOW].n_matrices;
        if (n_high == 0 || (n_low != 0 && n_low != n_high) || !completes(&copies[HOBBIT_HIGH], &copies[HOBBIT_LOW])) {
            snprintf(err, err_len, "the experts of layer %d have %d matrices, and %d of low precision",
                     c->groups[g].layer, n_high, n_low);
            return HOBBIT_FORMAT;
        }
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            /* Slots begin on pages, so that every offset above keeps its alignment in the arena. */
            copies[p].slot_bytes = round_up(copies[p].slot_bytes, HB_PAGE);
        }
    }
    return HOBBIT_OK;
}

enum hobbit_status hb_catalog_open(struct hb_catalog *c, const struct hobbit_options *o, char *err, size_t err_len) {
    *c = (struct hb_catalog) {0};
    enum hobbit_status status = open_files(c, o, err, err_len);
    if (status == HOBBIT_OK) {
        status = add_groups(c, o, err, err_len);
    }
    if (status == HOBBIT_OK) {
        status = add_matrices(c, o, err, err_len);
    }
    if (status != HOBBIT_OK) {
        hb_catalog_close(c);
    }
    return status;
}

bool hb_catalog_copy(struct hb_catalog *copy, const struct hb_catalog *c) {
    size_t groups = (size_t) c->n_groups * sizeof *c->groups, matrices = (size_t) c->n_matrices * sizeof *c->matrices;
    *copy = (struct hb_catalog) {.n_groups = c->n_groups, .n_experts = c->n_experts, .most_experts = c->most_experts};
    copy->groups = malloc(groups);
    copy->matrices = malloc(matrices);
    if (copy->groups == NULL || copy->matrices == NULL) {
        hb_catalog_close(copy);
        return false;
    }
    memcpy(copy->groups, c->groups, groups);
    memcpy(copy->matrices, c->matrices, matrices);
    copy->n_matrices = c->n_matrices;
    for (int32_t i = 0; i < c->n_matrices; i++) {
        struct hb_matrix *m = &copy->matrices[i];
        m->name = NULL;
        copy->groups[m->group].copies[m->precision].matrices[m->role] = m;
    }
    return true;
}

void hb_catalog_close(struct hb_catalog *c) {
    for (int32_t i = 0; i < c->n_files; i++) {
        hb_file_close(&c->files[i]);
        free(c->paths[i]);
    }
    for (int32_t i = 0; i < c->n_matrices; i++) {
        free(c->matrices[i].name);
    }
    free(c->matrices);
    free(c->groups);
    free(c->files);
    free(c->paths);
    *c = (struct hb_catalog) {0};
}

const struct hb_matrix *hb_catalog_find(const struct hb_catalog *c, const char *name) {
    for (int32_t i = 0; i < c->n_matrices; i++) {
        if (c->matrices[i].precision == HOBBIT_HIGH && strcmp(c->matrices[i].name, name) == 0) {
            return &c->matrices[i];
        }
    }
    return NULL;
}
