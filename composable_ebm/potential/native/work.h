/* What a call is about, and how the threads of a team share it. */

#ifndef WORK_H
#define WORK_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const void *subject, *level;    /* a network; or a product, and what depends on the noise level */
    const float *given;             /* states, or cotangents */
    float *into, *gradients, *kept; /* what comes out, and what is kept of each state until the way back */
    float *memory;                  /* `size` floats for each part */
    size_t size;
    int total, parts, by_networks;  /* states; parts of them, or of the networks */
} Work;

/* Where a part of `count` things begins. */
static inline int start_of(const Work *w, int part, int count) { return (int)((int64_t)count * part / w->parts); }

#endif
