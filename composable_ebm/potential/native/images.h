/* Images and operations on them, and where they lie in working memory. */

#ifndef IMAGES_H
#define IMAGES_H

#include "vectors.h"

enum { CONVOLUTION, ACTIVATION, SUM, NORMALISATION, POOLING, CONCATENATION, UPSAMPLING, SCALING, MIXING };
enum { IDENTITY, SILU, RELU, TANH, SIGMOID, ELU, GELU, GELU_BY_TANH, SQUARE };

typedef struct {
    int height, width, channels;     /* channels as stored: padded, but for a thin image that comes in */
    int border, gradient_border;     /* zeros around */
    int at, gradient_at;             /* places in memory */
} Image;

typedef struct {
    int kind, first, second, out;    /* what it is, and its images */
    int adds;                        /* 1, 2: the gradient of first, second has parts already */
    int kernel_height, kernel_width, stride, padding;
    int weight, backward_weight, bias; /* places in the array of weights */
    int by_tiles;                    /* whether its products are those of tiles, see `convolve_tiles` */
    int thin;                        /* whether it reads a thin image, and in which place planes are kept */
    int kept;                        /* place of what the way back needs: slopes, or values of norm 1 */
    int function, groups, real;      /* of an activation; of a normalisation, with its channels unpadded */
    float number;                    /* slope of relu below zero, size of elu, epsilon, factor of a pooling */
} Operation;

/* Working memory of an image: what is kept until the way back, and what is not. */
typedef struct {
    float *kept, *rest;
    int size; /* of what is kept */
} Memory;

INLINE float *place(Memory m, int at) { return at < m.size ? m.kept + at : m.rest + (at - m.size); }
INLINE ptrdiff_t pitch(const Image *i) { return (ptrdiff_t)(i->width + 2 * i->border) * i->channels; }
INLINE ptrdiff_t gradient_pitch(const Image *i) {
    return (ptrdiff_t)(i->width + 2 * i->gradient_border) * i->channels;
}
INLINE float *values(Memory m, const Image *i) {
    return place(m, i->at) + i->border * (pitch(i) + i->channels);
}
INLINE float *gradient(Memory m, const Image *i) {
    return place(m, i->gradient_at) + i->gradient_border * (gradient_pitch(i) + i->channels);
}

/* Places are used again by what comes later, so zeros are written around an image before it is. */
static void clear_border(float *image, int height, int width, int channels, int border) {
    size_t line = (size_t)(width + 2 * border) * channels, side = (size_t)border * channels;
    if (!border) return;
    memset(image, 0, border * line * sizeof(float));
    for (int row = 0; row < height; row++) {
        float *start = image + (border + row) * line;
        memset(start, 0, side * sizeof(float));
        memset(start + line - side, 0, side * sizeof(float));
    }
    memset(image + (border + height) * line, 0, border * line * sizeof(float));
}

INLINE void open_values(Memory m, const Image *i) {
    clear_border(place(m, i->at), i->height, i->width, i->channels, i->border);
}
INLINE void open_gradient(Memory m, const Image *i) {
    clear_border(place(m, i->gradient_at), i->height, i->width, i->channels, i->gradient_border);
}

#endif
