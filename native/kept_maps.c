/* The expert maps between runs. */
#include <errno.h>
#include <string.h>

#include "model_impl.h"

static int32_t told(enum hb_maps_status status, const char *path, char *err, size_t err_len) {
    switch (status) {
    case HB_MAPS_OK:
        return HOBBIT_OK;
    case HB_MAPS_IO:
        snprintf(err, err_len, "%s: %s", path, strerror(errno));
        return HOBBIT_IO;
    case HB_MAPS_FOREIGN:
        snprintf(err, err_len, "%s: has no expert maps of this model and size", path);
        return HOBBIT_FORMAT;
    default:
        snprintf(err, err_len, "%s: the file is damaged", path);
        return HOBBIT_FORMAT;
    }
}

int32_t hobbit_model_save_maps(struct hobbit_model *m, const char *path, const uint8_t *identity, char *err,
                               size_t err_len) {
    enum hb_maps_status status = HB_MAPS_OK;
    hb_model_lock(m);
    if (m->map_predictor != NULL && hb_map_predictor_has_new(m->map_predictor)) {
        status = hb_maps_save(hb_map_predictor_maps(m->map_predictor), path, identity);
    }
    int32_t answer = told(status, path, err, err_len);
    hb_model_unlock(m);
    return answer;
}

int32_t hobbit_model_load_maps(struct hobbit_model *m, const char *path, const uint8_t *identity, char *err,
                               size_t err_len) {
    enum hb_maps_status status = HB_MAPS_OK;
    hb_model_lock(m);
    if (m->map_predictor != NULL) {
        status = hb_maps_load(hb_map_predictor_maps(m->map_predictor), path, identity);
    }
    int32_t answer = told(status, path, err, err_len);
    hb_model_unlock(m);
    return answer;
}
