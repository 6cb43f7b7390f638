/* A store of expert maps (fMoE, arXiv 2502.05370, EuroSys'26): what the routers of all layers said for past tokens, to
 * predict what they will say for the present one. A map is the whole softmax of every layer's router, P_0 .. P_(L-1),
 * beside a semantic hint, an embedding of the token. The present token's map is matched while it grows:
 *
 *   semantic     score = cos(embedding, that of a stored map)
 *   trajectory   score = cos(P_0 .. P_l, the same part of a stored map), l the last layer observed
 *
 * The best match's later layers are the prediction. A full store replaces the map that the new one makes most
 * redundant:
 *
 *   RDY = d / L * semantic score + (L - d) / L * trajectory score      d the prefetch distance, L the number of layers
 *
 * A search keeps the running dot products of each stored map, so that a layer costs capacity * n_experts
 * multiplications of 16 bit numbers. Sums are of integers, so that results do not depend on the processor.
 * No lock: the caller's. Nothing is allocated after creation. */
#ifndef HB_MAPS_H
#define HB_MAPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HB_MAPS_IDENTITY 32

struct hb_maps;

/* Layers may have different numbers of experts, also none (a dense one); n_embd may be 0: no hints. With fewer than
 * `distance` layers observed the match is the semantic one, after that the trajectory's; 1 is what the paper does.
 * NULL: no memory, or a shape beyond any model. */
struct hb_maps *hb_maps_new(int32_t n_layers, const int32_t *n_experts, int32_t n_embd, int32_t capacity,
                            int32_t distance);
void hb_maps_free(struct hb_maps *maps); /* NULL is fine */
/* All the memory that such a store takes, of which the untouched part is not there before the store fills; 0: a shape
 * that hb_maps_new refuses. */
size_t hb_maps_bytes(int32_t n_layers, const int32_t *n_experts, int32_t n_embd, int32_t capacity);
int32_t hb_maps_count(const struct hb_maps *maps);

/* A new token; one that was not ended is forgotten. `embedding` is [n_embd], or NULL: it then has no semantic match,
 * and the trajectory's counts from the first layer. */
void hb_maps_begin(struct hb_maps *maps, const float *embedding);
/* The router's probabilities, [n_experts[layer]], for the token that was begun. They are scaled to sum 1, so that any
 * router's will do; what is not above 0 counts as 0. Layers come in order: one that was passed over counts as zeros,
 * one that comes too late is ignored. */
void hb_maps_observe(struct hb_maps *maps, int32_t layer, const float *probs);
/* The best match's probabilities of a layer after the last observed one, [n_experts[layer]], valid until the next call,
 * and the match's score, in (0, 1]. False when nothing in the store is alike, or the match does not know that layer. */
bool hb_maps_predict(const struct hb_maps *maps, int32_t layer, const float **probs, float *score);
/* The token is complete: add its map. Nothing is added when nothing was observed. */
void hb_maps_end(struct hb_maps *maps);

/* How many experts to fetch: the most probable ones (of equals the first) until their sum is at least
 * delta = clip(1 - score, 0, 1), but `least` of them at least and `most` at most, never more than n. Writes them in
 * that order and returns their number. */
int32_t hb_maps_choose(const float *probs, int32_t n, float score, int32_t least, int32_t most, int32_t *experts);

enum hb_maps_status {
    HB_MAPS_OK,
    HB_MAPS_IO,      /* errno says why; ENOENT: there is none yet */
    HB_MAPS_FOREIGN, /* no store, or one of another version, model, shape or capacity */
    HB_MAPS_DAMAGED, /* cut short, changed, or with something behind it */
};

/* File, numbers in the machine's byte order: "HBMAPS\r\n"; the model's identity; as 4 bytes each: version, n_layers,
 * n_embd, capacity, number of maps, n_experts of each layer; then as 2 bytes each the maps' unit embeddings, and layer
 * by layer the maps' probabilities, in units of 1 / 32767; then FNV-1a of all that, 8 bytes.
 *
 * It is written under another name in the same folder and renamed when it is complete: a file that was there is
 * replaced as a whole or not at all. Only a loss of power may damage it, which the next load finds. */
enum hb_maps_status hb_maps_save(const struct hb_maps *maps, const char *path, const uint8_t *identity);
/* Replaces what the store holds, also the token that was begun; after an error it is empty. */
enum hb_maps_status hb_maps_load(struct hb_maps *maps, const char *path, const uint8_t *identity);

#endif
