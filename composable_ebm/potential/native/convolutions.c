/* Energy and input gradient of a network of convolutions, one image at a time, everything in cache.

   A network is a list of operations on images (convolutions and linear layers, activations, sums, gains
   and biases of channels, normalisations by groups, average pooling), which run forward and then backward. Images lie as height, width,
   channels (rows of tokens are images of height 1); channels are padded to BLOCK, and borders of zeros stand around what a convolution reads,
   forward and backward. A linear layer is a convolution of a single pixel with many channels. One primitive
   does nearly all the work, `tile`: a few pixels times a few vectors of output channels, kept in registers,

       z[p] = start + sum over rows r, j < length of x[p][r * row_step + j] * w[r, j],

   for the forward pass (rows and j run over the kernel) and, for each place of a pixel modulo the
   stride, for the input gradient (they run over the taps that reach such a pixel). */

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

INLINE void tile(const int pixels, const int vectors, const float **x, int rows, ptrdiff_t row_step,
                 int length, const float *w, ptrdiff_t w_step, const float *bias, int adds, float **z) {
    vec sum[8][4];
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[p][v] = bias ? LOAD(bias + v * LANES) : adds ? LOAD(z[p] + v * LANES) : SPLAT(0.0f);
    for (int r = 0; r < rows; r++) {
        const float *source[8];
#pragma GCC unroll 8
        for (int p = 0; p < pixels; p++) source[p] = x[p] + r * row_step;
        for (int j = 0; j < length; j++, w += w_step) {
            vec column[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                column[v] = LOAD(w + v * LANES);
                STAY_IN_REGISTER(column[v]);
            }
#pragma GCC unroll 8
            for (int p = 0; p < pixels; p++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sum[p][v] += source[p][j] * column[v];
        }
    }
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) STORE(z[p] + v * LANES, sum[p][v]);
}

#define TILE(P, V) tile(P, V, x, rows, row_step, length, w + c, channels, bias ? bias + c : NULL, adds, z)

/* `count` pixels (at most 8; the arrays are filled up with repetitions), all output channels. */
static void pixels_times_weights(int count, const float **x, int rows, ptrdiff_t row_step, int length,
                                 const float *w, int channels, const float *bias, int adds, float **z0) {
    float *z[8];
    for (int c = 0; c < channels;) {
#if LANES == 16
        int vectors = channels - c >= 4 * LANES && count == 1 ? 4 : channels - c >= 2 * LANES ? 2 : 1;
#else
        enum { vectors = BLOCK / LANES }; /* all that registers hold beside four or more pixels */
#endif
        for (int p = 0; p < 8; p++) z[p] = z0[p] + c;
        if (count == 1) {
            if (vectors == 4) TILE(1, 4); else if (vectors == 2) TILE(1, 2); else TILE(1, 1);
        } else if (LANES < 16) {
            TILE(4, BLOCK / LANES);
            if (count > 4) {
                const float **all = x;
                x = all + 4;
                memmove(z, z + 4, 4 * sizeof *z);
                TILE(4, BLOCK / LANES);
                x = all;
            }
        } else if (vectors == 2) {
            if (count > 4) TILE(8, 2); else TILE(4, 2);
        } else {
            if (count > 4) TILE(8, 1); else TILE(4, 1);
        }
        c += vectors * LANES;
    }
}

static void convolve(const Operation *o, const Image *in, const Image *out, const float *weights, Memory m) {
    int total = out->height * out->width;
    ptrdiff_t step = pitch(in);
    const float *source[8], *x = values(m, in) - o->padding * (step + in->channels);
    float *target[8], *z = values(m, out);
    for (int first = 0, row = 0, column = 0; first < total; first += 8) {
        int count = total - first < 8 ? total - first : 8;
        for (int p = 0; p < 8; p++) {
            if (p >= count) {
                source[p] = source[p - 1], target[p] = target[p - 1];
                continue;
            }
            source[p] = x + row * o->stride * step + (ptrdiff_t)column * o->stride * in->channels;
            target[p] = z + row * pitch(out) + (ptrdiff_t)column * out->channels;
            if (++column == out->width) column = 0, row++;
        }
        pixels_times_weights(count, source, o->kernel_height, step, o->kernel_width * in->channels,
                             weights + o->weight, out->channels, weights + o->bias, 0, target);
    }
}

/* Taps of the kernel that reach pixels at place `a` modulo the stride: how many, and the output
   (relative to the pixel's own block) that the first of them belongs to. */
static int taps(int a, int kernel, int stride, int padding, int *first) {
    int smallest = (a + padding) % stride;
    int count = smallest < kernel ? (kernel - 1 - smallest) / stride + 1 : 0;
    *first = (a + padding - smallest) / stride - (count - 1);
    return count;
}

/* The gradient by what a convolution reads. Weights lie by place modulo the stride, then by tap. */
static void convolve_back(const Operation *o, const Image *in, const Image *out, const float *weights, Memory m) {
    int s = o->stride, depth = out->channels, channels = in->channels;
    ptrdiff_t step = gradient_pitch(out), width = gradient_pitch(in);
    const float *w = weights + o->backward_weight, *dz = gradient(m, out), *source[8];
    float *target[8], *dx = gradient(m, in);
    for (int a = 0; a < s; a++)
        for (int b = 0; b < s; b++) {
            int first_y, first_x;
            int rows = taps(a, o->kernel_height, s, o->padding, &first_y);
            int columns = taps(b, o->kernel_width, s, o->padding, &first_x);
            int length = columns * depth;
            int high = (in->height - a + s - 1) / s, wide = (in->width - b + s - 1) / s;
            int total = high * wide;
            for (int first = 0, row = 0, column = 0; first < total; first += 8) {
                int count = total - first < 8 ? total - first : 8;
                for (int p = 0; p < 8; p++) {
                    if (p >= count) {
                        source[p] = source[p - 1], target[p] = target[p - 1];
                        continue;
                    }
                    source[p] = dz + (row + first_y) * step + (ptrdiff_t)(column + first_x) * depth;
                    target[p] = dx + (row * s + a) * width + (ptrdiff_t)(column * s + b) * channels;
                    if (++column == wide) column = 0, row++;
                }
                pixels_times_weights(count, source, rows, step, length, w, channels, NULL, o->adds & 1, target);
            }
            w += (ptrdiff_t)rows * length * channels;
        }
}

/* A first layer with fewer input channels than a block: there lanes run along a row of its output:
   dz lies channel by channel, and a vector of it meets all pixels of the image that its outputs read,
   stride² of them for each. */
typedef struct {
    int low_y, low_x;      /* the first output that reaches a block of stride² pixels, relative to it */
    int reach_y, reach_x;  /* how many do */
    int high, wide;        /* blocks */
    ptrdiff_t pitch, size; /* floats of a row of outputs with its border, and of a channel */
} Planes;

static Planes planes_of(const Operation *o, const Image *in) {
    Planes p;
    int s = o->stride;
    p.low_y = -((o->kernel_height - 1 - o->padding) / s), p.low_x = -((o->kernel_width - 1 - o->padding) / s);
    p.reach_y = (s - 1 + o->padding) / s - p.low_y + 1, p.reach_x = (s - 1 + o->padding) / s - p.low_x + 1;
    p.high = (in->height + s - 1) / s, p.wide = (in->width + s - 1) / s;
    p.pitch = p.wide + p.reach_x;
    p.size = (p.high + p.reach_y) * p.pitch + 2 * BLOCK;
    return p;
}

/* dz, pixel by pixel, to planes (channels, rows, columns). */
static void to_planes(const Image *out, const Planes *p, const float *dz, float *planes) {
    for (int row = 0; row < out->height; row++)
        for (int first = 0; first < out->width; first += LANES)
            for (int c = 0; c < out->channels; c += LANES) {
                vec v[LANES];
                const float *at = dz + row * gradient_pitch(out) + (ptrdiff_t)first * out->channels + c;
                for (int i = 0; i < LANES; i++, at += out->channels)
                    v[i] = first + i < out->width ? LOAD(at) : SPLAT(0.0f);
                transpose(v);
                float *target = planes + c * p->size + (row - p->low_y) * p->pitch + first - p->low_x;
                for (int i = 0; i < LANES; i++) STORE(target + i * p->size, v[i]);
            }
}

/* A few rows of blocks and a few channels of the image at once: a weight is read once for all the rows, and a
   vector of dz once for all the channels. */
INLINE void thin_tile(const int s, const int together, const int inputs, int depth, const Image *in, const Planes *p,
                      const float *w, ptrdiff_t w_step, const float *planes, float *dx, int row, int column) {
    vec sum[16];
    const float *source[8];
    const int block = inputs * s * s;
#pragma GCC unroll 16
    for (int i = 0; i < together * block; i++) sum[i] = SPLAT(0.0f);
    for (int c = 0; c < depth; c++, planes += p->size)
        for (int y = 0; y < p->reach_y; y++) {
#pragma GCC unroll 8
            for (int r = 0; r < together; r++) {
                int at = row + r < p->high ? row + r : p->high - 1;
                source[r] = planes + (at + y) * p->pitch + column;
            }
            for (int x = 0; x < p->reach_x; x++, w += s * s)
#pragma GCC unroll 8
                for (int r = 0; r < together; r++) {
                    vec value = LOAD(source[r] + x);
                    STAY_IN_REGISTER(value);
#pragma GCC unroll 4
                    for (int k = 0; k < inputs; k++)
#pragma GCC unroll 16
                        for (int i = 0; i < s * s; i++) sum[r * block + k * s * s + i] += value * w[k * w_step + i];
                }
        }
    int count = p->wide - column < LANES ? p->wide - column : LANES;
    for (int k = 0; k < inputs; k++, dx += (ptrdiff_t)in->height * in->width)
        for (int r = 0; r < together && row + r < p->high; r++)
            for (int a = 0; a < s && (row + r) * s + a < in->height; a++) {
                float line[4 * LANES];
                for (int b = 0; b < s; b++)
                    for (int i = 0; i < LANES; i++) line[i * s + b] = sum[r * block + (k * s + a) * s + b][i];
                int length = in->width - column * s < count * s ? in->width - column * s : count * s;
                memcpy(dx + (ptrdiff_t)((row + r) * s + a) * in->width + column * s, line, length * sizeof(float));
            }
}

#define THIN(S, TOGETHER, INPUTS)                                     \
    for (int row = 0; row < p->high; row += TOGETHER)                 \
        for (int column = 0; column < p->wide; column += LANES)       \
            thin_tile(S, TOGETHER, INPUTS, depth, in, p, w, step, planes, dx, row, column)

/* dz in planes to dx, channels first. Weights: (input channels, outputs, reach_y, reach_x, stride²). */
static void thin_back(const Operation *o, const Image *in, int depth, const Planes *p, const float *w,
                      const float *planes, float *dx) {
    enum { few = LANES == 8 ? 2 : 4 }; /* rows that registers hold beside four sums for each */
    ptrdiff_t step = (ptrdiff_t)depth * p->reach_y * p->reach_x * o->stride * o->stride;
    for (int c = 0, inputs; c < in->channels; c += inputs, w += inputs * step) {
        inputs = o->stride == 1 && in->channels - c >= 3 ? (in->channels - c == 3 ? 3 : 4) : 1;
        switch (o->stride) {
        case 1:
            if (inputs == 4) THIN(1, few, 4);
            else if (inputs == 3) THIN(1, few, 3);
            else THIN(1, 8, 1);
            break;
        case 2: THIN(2, few, 1); break;
        case 3: THIN(3, 1, 1); break;
        default: THIN(4, 1, 1);
        }
        dx += (ptrdiff_t)inputs * in->height * in->width;
    }
}

/* Value and slope of an activation. */
INLINE vec activation(const Operation *o, vec a, vec *slope) {
    vec one = SPLAT(1.0f), gate, value;
    ivec above = a > 0.0f;
    switch (o->function) {
    case SILU:
        gate = sigmoid(a), value = a * gate;
        *slope = gate + value * (1.0f - gate);
        return value;
    case RELU:
        *slope = WHERE(above, one, SPLAT(o->number));
        return a * *slope;
    case TANH:
        value = 2.0f * sigmoid(2.0f * a) - 1.0f;
        *slope = 1.0f - value * value;
        return value;
    case SIGMOID:
        value = sigmoid(a);
        *slope = value * (1.0f - value);
        return value;
    case ELU:
        value = o->number * power_of_two(a * 1.44269504f);
        *slope = WHERE(above, one, value);
        return WHERE(above, a, value - o->number);
    case SQUARE:
        *slope = 2.0f * a;
        return a * a;
    case GELU: { /* erf by Abramowitz and Stegun 7.1.26, right to 1.5e-7 */
        vec size = WHERE(above, a, -a) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * size);
        vec p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
        vec bell = power_of_two(a * a * -0.72134752f);
        gate = 0.5f * p * bell, gate = WHERE(above, 1.0f - gate, gate);
        *slope = gate + 0.39894228f * a * bell;
        return a * gate;
    }
    case GELU_BY_TANH: {
        vec square = a * a;
        gate = sigmoid(a * (1.5957691f + 0.071354816f * square)), value = a * gate;
        *slope = gate + value * (1.0f - gate) * (1.5957691f + 0.21406445f * square);
        return value;
    }
    default:
        *slope = one;
        return a;
    }
}

static void activate(const Operation *o, const Image *in, const Image *out, Memory m) {
    float *slopes = place(m, o->kept);
    int line = in->width * in->channels;
    for (int row = 0; row < in->height; row++, slopes += line) {
        const float *source = values(m, in) + row * pitch(in);
        float *target = values(m, out) + row * pitch(out);
        for (int j = 0; j < line; j += LANES) {
            vec slope, value = activation(o, LOAD(source + j), &slope);
            STORE(target + j, value);
            STORE(slopes + j, slope);
        }
    }
}

/* target (+)= source, times `factors` if there are any, row by row. */
INLINE void pass_back(const Image *from, const Image *to, const float *factors, int adds, Memory m) {
    int line = to->width * to->channels;
    for (int row = 0; row < to->height; row++) {
        const float *source = gradient(m, from) + row * gradient_pitch(from);
        float *target = gradient(m, to) + row * gradient_pitch(to);
        for (int j = 0; j < line; j += LANES) {
            vec value = LOAD(source + j);
            if (factors) value *= LOAD(factors + (ptrdiff_t)row * line + j);
            STORE(target + j, adds ? value + LOAD(target + j) : value);
        }
    }
}

static void add(const Image *first, const Image *second, const Image *out, Memory m) {
    int line = out->width * out->channels;
    for (int row = 0; row < out->height; row++) {
        const float *a = values(m, first) + row * pitch(first), *b = values(m, second) + row * pitch(second);
        float *target = values(m, out) + row * pitch(out);
        for (int j = 0; j < line; j += LANES) STORE(target + j, LOAD(a + j) + LOAD(b + j));
    }
}

/* Every channel times its gain, plus its bias, and back. */
INLINE void scale(const Operation *o, const Image *in, const Image *out, const float *weights, Memory m, const int back) {
    const float *gain = weights + o->weight, *bias = weights + o->bias;
    int channels = in->channels, line = in->width * channels;
    for (int row = 0; row < in->height; row++) {
        float *a = back ? gradient(m, in) + row * gradient_pitch(in) : values(m, in) + row * pitch(in);
        float *b = back ? gradient(m, out) + row * gradient_pitch(out) : values(m, out) + row * pitch(out);
        for (int first = 0; first < line; first += channels)
            for (int c = 0; c < channels; c += LANES) {
                int j = first + c;
                if (!back) STORE(b + j, LOAD(a + j) * LOAD(gain + c) + LOAD(bias + c));
                else if (o->adds & 1) STORE(a + j, LOAD(b + j) * LOAD(gain + c) + LOAD(a + j));
                else STORE(a + j, LOAD(b + j) * LOAD(gain + c));
            }
    }
}

/* Pixels among each other, by a matrix for each group of channels, and back. */
static void mix(const Operation *o, const Image *in, const Image *out, const float *weights, Memory m, int back) {
    enum { together = LANES == 16 ? 8 : 4 };
    int count = in->width, channels = in->channels, size = channels / o->groups;
    const float *matrices = weights + (back ? o->backward_weight : o->weight);
    const float *from = back ? gradient(m, out) : values(m, in), *x[8];
    float *to = back ? gradient(m, in) : values(m, out), *z[8];
    for (int c = 0; c < channels; c += BLOCK) {
        const float *matrix = matrices + (ptrdiff_t)(c / size) * count * count;
        for (int first = 0; first < count; first += together) {
            for (int p = 0; p < together; p++) {
                int at = first + p < count ? first + p : count - 1;
                x[p] = matrix + (ptrdiff_t)at * count, z[p] = to + (ptrdiff_t)at * channels + c;
            }
            tile(together, BLOCK / LANES, x, 1, 0, count, from + c, channels, NULL, back && o->adds & 1, z);
        }
    }
}

/* Means over the pixels and the channels of each group, for every channel; zero for padded ones. */
static void of_groups(const Operation *o, int area, float *sums) {
    int size = o->real / o->groups;
    for (int g = 0; g < o->groups; g++) {
        double total = 0.0;
        for (int c = 0; c < size; c++) total += sums[g * size + c];
        for (int c = 0; c < size; c++) sums[g * size + c] = (float)(total / ((double)area * size));
    }
}

enum { MOST_CHANNELS = 1024 };

static void normalise(const Operation *o, const Image *in, const Image *out, const float *weights, Memory m) {
    float mean[MOST_CHANNELS], inverse[MOST_CHANNELS], *unit = place(m, o->kept);
    int channels = in->channels, area = in->height * in->width;
    const float *scale = weights + o->weight, *shift = weights + o->bias;
    memset(mean, 0, sizeof mean), memset(inverse, 0, sizeof inverse);
    for (int second = 0; second < 2; second++) {
        float *sums = second ? inverse : mean;
        for (int c = 0; c < channels; c += LANES) {
            vec total = SPLAT(0.0f), middle = LOAD(mean + c);
            for (int row = 0; row < in->height; row++) {
                const float *source = values(m, in) + row * pitch(in) + c;
                for (int column = 0; column < in->width; column++, source += channels) {
                    vec value = LOAD(source);
                    total += second ? (value - middle) * (value - middle) : value;
                }
            }
            STORE(sums + c, total);
        }
        of_groups(o, area, sums);
    }
    for (int c = 0; c < channels; c++)
        inverse[c] = c < o->real ? 1.0f / __builtin_sqrtf(inverse[c] + o->number) : 0.0f;
    memcpy(unit + (ptrdiff_t)area * channels, inverse, channels * sizeof(float));
    for (int row = 0; row < in->height; row++) {
        const float *source = values(m, in) + row * pitch(in);
        float *target = values(m, out) + row * pitch(out);
        for (int column = 0; column < in->width; column++)
            for (int c = 0; c < channels; c += LANES, source += LANES, target += LANES, unit += LANES) {
                vec value = (LOAD(source) - LOAD(mean + c)) * LOAD(inverse + c);
                STORE(unit, value);
                STORE(target, value * LOAD(scale + c) + LOAD(shift + c));
            }
    }
}

static void normalise_back(const Operation *o, const Image *in, const Image *out, const float *weights, Memory m) {
    float plain[MOST_CHANNELS], along[MOST_CHANNELS];
    int channels = in->channels, area = in->height * in->width;
    const float *scale = weights + o->weight, *unit = place(m, o->kept), *inverse = unit + (ptrdiff_t)area * channels;
    for (int c = 0; c < channels; c += LANES) {
        vec sum = SPLAT(0.0f), product = SPLAT(0.0f);
        const float *u = unit + c;
        for (int row = 0; row < in->height; row++) {
            const float *source = gradient(m, out) + row * gradient_pitch(out) + c;
            for (int column = 0; column < in->width; column++, source += channels, u += channels) {
                sum += LOAD(source);
                product += LOAD(source) * LOAD(u);
            }
        }
        STORE(plain + c, sum * LOAD(scale + c));
        STORE(along + c, product * LOAD(scale + c));
    }
    of_groups(o, area, plain), of_groups(o, area, along);
    for (int row = 0; row < in->height; row++) {
        const float *source = gradient(m, out) + row * gradient_pitch(out);
        float *target = gradient(m, in) + row * gradient_pitch(in);
        for (int column = 0; column < in->width; column++)
            for (int c = 0; c < channels; c += LANES, source += LANES, target += LANES, unit += LANES) {
                vec value = LOAD(source) * LOAD(scale + c) - LOAD(plain + c) - LOAD(unit) * LOAD(along + c);
                value *= LOAD(inverse + c);
                STORE(target, o->adds & 1 ? value + LOAD(target) : value);
            }
    }
}

/* Means (or sums, by the factor) of windows side by side; those at the end are cut off. */
INLINE void windows(const Operation *o, const Image *in, const Image *out, Memory m, const int back) {
    for (int row = 0; row < out->height; row++)
        for (int column = 0; column < out->width; column++) {
            int y0 = row * o->kernel_height, x0 = column * o->kernel_width;
            int y1 = y0 + o->kernel_height < in->height ? y0 + o->kernel_height : in->height;
            int x1 = x0 + o->kernel_width < in->width ? x0 + o->kernel_width : in->width;
            float factor = o->number > 0 ? o->number : 1.0f / ((y1 - y0) * (x1 - x0));
            for (int c = 0; c < in->channels; c += LANES) {
                vec total = SPLAT(0.0f);
                float *one = back ? gradient(m, out) + row * gradient_pitch(out) : values(m, out) + row * pitch(out);
                one += (ptrdiff_t)column * in->channels + c;
                if (back) total = LOAD(one) * factor;
                for (int y = y0; y < y1; y++) {
                    float *many = back ? gradient(m, in) + y * gradient_pitch(in) : values(m, in) + y * pitch(in);
                    many += (ptrdiff_t)x0 * in->channels + c;
                    for (int x = x0; x < x1; x++, many += in->channels) {
                        if (!back) total += LOAD(many);
                        else STORE(many, o->adds & 1 ? total + LOAD(many) : total);
                    }
                }
                if (!back) STORE(one, total * factor);
            }
        }
}

/* The channels of two images one after the other, and back. */
INLINE void join(const Operation *o, const Image *first, const Image *second, const Image *out, Memory m, const int back) {
    for (int row = 0; row < out->height; row++)
        for (int column = 0; column < out->width; column++) {
            float *whole = back ? gradient(m, out) + row * gradient_pitch(out) : values(m, out) + row * pitch(out);
            whole += (ptrdiff_t)column * out->channels;
            for (int k = 0; k < 2; k++) {
                const Image *i = k ? second : first;
                float *part = back ? gradient(m, i) + row * gradient_pitch(i) : values(m, i) + row * pitch(i);
                part += (ptrdiff_t)column * i->channels;
                for (int c = 0; c < i->channels; c += LANES) {
                    if (!back) STORE(whole + c, LOAD(part + c));
                    else STORE(part + c, o->adds >> k & 1 ? LOAD(part + c) + LOAD(whole + c) : LOAD(whole + c));
                }
                whole += i->channels;
            }
        }
}

/* Every pixel as a window of equal ones, and back. */
INLINE void spread(const Operation *o, const Image *in, const Image *out, Memory m, const int back) {
    int channels = in->channels;
    for (int row = 0; row < in->height; row++)
        for (int column = 0; column < in->width; column++) {
            float *one = back ? gradient(m, in) + row * gradient_pitch(in) : values(m, in) + row * pitch(in);
            one += (ptrdiff_t)column * channels;
            for (int c = 0; c < channels; c += LANES) {
                vec total = back && !(o->adds & 1) ? SPLAT(0.0f) : LOAD(one + c);
                for (int y = row * o->kernel_height; y < (row + 1) * o->kernel_height; y++) {
                    float *many = back ? gradient(m, out) + y * gradient_pitch(out) : values(m, out) + y * pitch(out);
                    many += (ptrdiff_t)column * o->kernel_width * channels + c;
                    for (int x = 0; x < o->kernel_width; x++, many += channels) {
                        if (back) total += LOAD(many);
                        else STORE(many, total);
                    }
                }
                if (back) STORE(one + c, total);
            }
        }
}

static void forward(const Operation *ops, int count, const Image *images, const float *weights, Memory m) {
    for (const Operation *o = ops; o < ops + count; o++) {
        const Image *in = images + o->first, *out = images + o->out;
        open_values(m, out);
        switch (o->kind) {
        case CONVOLUTION: convolve(o, in, out, weights, m); break;
        case ACTIVATION: activate(o, in, out, m); break;
        case SUM: add(in, images + o->second, out, m); break;
        case NORMALISATION: normalise(o, in, out, weights, m); break;
        case CONCATENATION: join(o, in, images + o->second, out, m, 0); break;
        case UPSAMPLING: spread(o, in, out, m, 0); break;
        case SCALING: scale(o, in, out, weights, m, 0); break;
        case MIXING: mix(o, in, out, weights, m, 0); break;
        default: windows(o, in, out, m, 0);
        }
    }
}

static void backward(const Operation *ops, int count, const Image *images, const float *weights, Memory m,
                     float *dx) {
    for (const Operation *o = ops + count - 1; o >= ops; o--) {
        const Image *in = images + o->first, *out = images + o->out;
        int two = o->kind == SUM || o->kind == CONCATENATION;
        if (!(o->adds & 1) && !o->thin) open_gradient(m, in);
        if (two && !(o->adds & 2)) open_gradient(m, images + o->second);
        switch (o->kind) {
        case CONVOLUTION:
            if (o->thin) {
                Planes planes = planes_of(o, in);
                memset(place(m, o->thin), 0, out->channels * planes.size * sizeof(float));
                to_planes(out, &planes, gradient(m, out), place(m, o->thin));
                thin_back(o, in, out->channels, &planes, weights + o->backward_weight, place(m, o->thin), dx);
            } else {
                convolve_back(o, in, out, weights, m);
            }
            break;
        case ACTIVATION: pass_back(out, in, place(m, o->kept), o->adds & 1, m); break;
        case SUM:
            pass_back(out, in, NULL, o->adds & 1, m);
            pass_back(out, images + o->second, NULL, o->adds & 2, m);
            break;
        case NORMALISATION: normalise_back(o, in, out, weights, m); break;
        case CONCATENATION: join(o, in, images + o->second, out, m, 1); break;
        case UPSAMPLING: spread(o, in, out, m, 1); break;
        case SCALING: scale(o, in, out, weights, m, 1); break;
        case MIXING: mix(o, in, out, weights, m, 1); break;
        default: windows(o, in, out, m, 1);
        }
    }
}

/* An image into memory, rows at `target`, a `step` apart: channels first, or `tokens`, as they lie. */
static void take(const Image *i, int channels, int tokens, const float *x, float *target, ptrdiff_t step) {
    if (tokens) {
        memcpy(target, x, (size_t)i->width * channels * sizeof(float));
        return;
    }
    int area = i->height * i->width, width = i->width, depth = i->channels;
    for (int row = 0; row < i->height; row++, target += step, x += width) {
        if (depth == 1) {
            memcpy(target, x, width * sizeof(float));
            continue;
        }
        if (channels < depth) memset(target, 0, (size_t)width * depth * sizeof(float));
        for (int c = 0; c < channels; c++)
            for (int column = 0; column < width; column++) target[column * depth + c] = x[c * area + column];
    }
}

/* And out of it. */
static void give(const Image *i, int channels, int tokens, const float *source, ptrdiff_t step, float *x) {
    if (tokens) {
        memcpy(x, source, (size_t)i->width * channels * sizeof(float));
        return;
    }
    int area = i->height * i->width;
    for (int row = 0; row < i->height; row++, source += step)
        for (int column = 0; column < i->width; column++)
            for (int c = 0; c < channels; c++)
                x[c * area + row * i->width + column] = source[column * i->channels + c];
}

/* How many floats a vector has on this processor. */
int lanes(void) { return LANES; }

typedef struct {
    const Operation *operations;
    const Image *images; /* the first comes in */
    const float *weights;
    int count, channels, outputs, result; /* result: the image with the outputs */
    int kept, memory;                     /* floats that are kept of each image, and working memory */
    int thin;                             /* whether the image that comes in is thin: then dx comes from planes */
    int tokens;                           /* whether rows of tokens come in and go out */
} Network;

static void outputs_of(const Network *n, const float *x, float *outputs, Memory m) {
    const Image *in = n->images, *out = n->images + n->result;
    open_values(m, in);
    take(in, n->channels, n->tokens, x, values(m, in), pitch(in));
    forward(n->operations, n->count, n->images, n->weights, m);
    give(out, n->outputs / (out->height * out->width), n->tokens, values(m, out), pitch(out), outputs);
}

static void gradient_of(const Network *n, const float *cotangents, float *dx, Memory m) {
    const Image *in = n->images, *out = n->images + n->result;
    open_gradient(m, out);
    take(out, n->outputs / (out->height * out->width), n->tokens, cotangents, gradient(m, out), gradient_pitch(out));
    backward(n->operations, n->count, n->images, n->weights, m, dx);
    if (!n->thin) give(in, n->channels, n->tokens, gradient(m, in), gradient_pitch(in), dx);
}

/* Outputs of images first .. first + rows, (images, outputs). `kept` has n->kept floats for each image, and
   `memory` n->memory. With gradients (images, ...) not NULL, those of the first
   output come at once, and nothing is kept. */
void network_outputs(const Network *n, int first, int rows, const float *images, float *outputs,
                     float *gradients, float *kept, float *memory) {
    mode before = without_denormals();
    ptrdiff_t size = (ptrdiff_t)n->channels * n->images->height * n->images->width;
    const float one = 1.0f;
    for (int i = first; i < first + rows; i++) {
        Memory m = {gradients ? memory : kept + (ptrdiff_t)i * n->kept, memory + n->kept, n->kept};
        outputs_of(n, images + i * size, outputs + (ptrdiff_t)i * n->outputs, m);
        if (gradients) gradient_of(n, &one, gradients + i * size, m);
    }
    back_to(before);
}

/* Gradients of Σ cotangent · output, of the images whose outputs were taken last. */
void network_gradient(const Network *n, int first, int rows, const float *cotangents, float *gradients,
                      float *kept, float *memory) {
    mode before = without_denormals();
    ptrdiff_t size = (ptrdiff_t)n->channels * n->images->height * n->images->width;
    for (int i = first; i < first + rows; i++) {
        Memory m = {kept + (ptrdiff_t)i * n->kept, memory + n->kept, n->kept};
        gradient_of(n, cotangents + (ptrdiff_t)i * n->outputs, gradients + i * size, m);
    }
    back_to(before);
}
