#include "scorer.h"

#include <math.h>

#include "hobbit.h"

void hb_scorer_scores(const float *weights, int n, float *scores) {
    int order[HB_SCORER_EXPERTS];
    double sum = 0;
    for (int i = 0; i < n; i++) {
        int at = i;
        for (; at > 0 && fabsf(weights[order[at - 1]]) < fabsf(weights[i]); at--) {
            order[at] = order[at - 1];
        }
        order[at] = i;
        sum += fabs((double) weights[i]);
    }
    double before = 0;
    for (int i = 0; i < n; i++) {
        double score = sum > 0 ? before / sum : 0;
        scores[order[i]] = score > 1 ? 1 : (float) score; /* rounding must not make it exceed T2 = 1 */
        before += fabs((double) weights[order[i]]);
    }
}

int32_t hb_scorer_need(float score, float t1, float t2) {
    return score > t2 ? HOBBIT_SKIP : score > t1 ? HOBBIT_LOW : HOBBIT_HIGH;
}
