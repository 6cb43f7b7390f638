/* Where the experts' bytes are: in the files, and in a slot of the arena. Built once from a checked description,
 * then read-only. */
#ifndef HB_CATALOG_H
#define HB_CATALOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hobbit.h"
#include "os.h"

#define HB_GROUP_MATRICES 4

struct hb_matrix {
    char *name;
    int32_t group, precision, role; /* groups[group].copies[precision].matrices[role] is this one */
    int32_t file, type;
    int64_t ne0, ne1;
    uint64_t offset;       /* of expert 0 in the file */
    uint64_t expert_bytes;
    uint64_t file_bytes;   /* of an expert in the file, and the distance between them: less than all of a nested one */
    uint64_t slot_offset;  /* of the matrix within a slot */
    uint64_t load_offset;  /* where in a slot the file's bytes go: the end of a nested matrix, else its beginning */
    bool bounce;           /* the distance between experts breaks the file's alignment */
};

/* The matrices of one precision. */
struct hb_copy {
    int32_t n_matrices; /* 0: the group has no low copies */
    struct hb_matrix *matrices[HB_GROUP_MATRICES];
    uint64_t expert_bytes; /* of all matrices */
    uint64_t slot_bytes;   /* expert_bytes plus padding */
    bool nested;           /* to be completed by the low copy */
};

struct hb_group {
    int32_t layer, n_expert;
    int32_t first_expert; /* of n_experts in all groups */
    struct hb_copy copies[HOBBIT_PRECISIONS];
};

struct hb_catalog {
    int32_t n_files, n_matrices, n_groups, n_experts;
    int32_t most_experts; /* of a group */
    char **paths;
    struct hb_file *files;
    struct hb_matrix *matrices;
    struct hb_group *groups;
};

/* Opens the files. On failure everything is undone and `err` says why. */
enum hobbit_status hb_catalog_open(struct hb_catalog *catalog, const struct hobbit_options *options, char *err,
                                   size_t err_len);
/* What is there to know of the experts, without the files and names: for who may outlive the catalog. */
bool hb_catalog_copy(struct hb_catalog *copy, const struct hb_catalog *catalog);
void hb_catalog_close(struct hb_catalog *catalog); /* also of a copy */
/* The high matrix of that name, or NULL. */
const struct hb_matrix *hb_catalog_find(const struct hb_catalog *catalog, const char *name);

#endif
