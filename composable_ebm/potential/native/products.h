/* Convolutions, linear layers and mixings of tokens, and their gradients.

   One primitive does nearly all the work, `tile`: a few pixels times a few vectors of output channels, kept in
   registers,

       z[p] = start + sum over rows r, j < length of x[p][r * row_step + j] * w[r, j],

   for the forward pass (rows and j run over the kernel) and, for each place of a pixel modulo the
   stride, for the input gradient (they run over the taps that reach such a pixel). */

#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "images.h"

INLINE void tile(const int pixels, const int vectors, const float **x, int rows, ptrdiff_t row_step,
                 int length, const float *w, ptrdiff_t w_step, const float *bias, int adds, float **z) {
    vec sum[8][4];
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[p][v] = bias ? LOAD(bias + v * LANES) : adds ? LOAD(z[p] + v * LANES) : SPLAT(0.0f);
    const float *source[8];
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++) source[p] = x[p];
    for (int r = 0; r < rows; r++)
        for (ptrdiff_t j = r * row_step, end = j + length; j < end; j++, w += w_step) {
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
        int vectors = channels - c >= 4 * LANES && count <= 4 ? 4 : channels - c >= 2 * LANES ? 2 : 1;
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
        } else if (vectors == 4) {
            TILE(4, 4);
        } else if (vectors == 2) {
            if (count > 4) TILE(8, 2); else TILE(4, 2);
        } else {
            if (count > 4) TILE(8, 1); else TILE(4, 1);
        }
        c += vectors * LANES;
    }
}

/* z = x w for `rows` rows that lie one after another. */
INLINE void rows_tile(const int rows, const int vectors, const float *x, int length, const float *w, float *z, int outputs) {
    vec sum[8][4];
#pragma GCC unroll 8
    for (int p = 0; p < rows; p++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[p][v] = SPLAT(0.0f);
    for (int j = 0; j < length; j++, w += outputs) {
        vec column[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            column[v] = LOAD(w + v * LANES);
            STAY_IN_REGISTER(column[v]);
        }
#pragma GCC unroll 8
        for (int p = 0; p < rows; p++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[p][v] += x[p * length + j] * column[v];
    }
#pragma GCC unroll 8
    for (int p = 0; p < rows; p++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) STORE(z + p * outputs + v * LANES, sum[p][v]);
}

static void rows_times_weights(int rows, const float *x, int length, const float *w, float *z, int outputs) {
    int c = 0;
#if LANES == 16
    for (; rows <= 4 && c + 4 * LANES <= outputs; c += 4 * LANES) rows_tile(4, 4, x, length, w + c, z + c, outputs);
    for (; c + 2 * LANES <= outputs; c += 2 * LANES)
        if (rows > 4) rows_tile(8, 2, x, length, w + c, z + c, outputs);
        else rows_tile(4, 2, x, length, w + c, z + c, outputs);
    if (c < outputs) {
        if (rows > 4) rows_tile(8, 1, x, length, w + c, z + c, outputs);
        else rows_tile(4, 1, x, length, w + c, z + c, outputs);
    }
#else
    for (; c < outputs; c += BLOCK)
        for (int p = 0; p < rows; p += 4)
            rows_tile(4, BLOCK / LANES, x + p * length, length, w + c, z + p * outputs + c, outputs);
#endif
}

/* Winograd's F(2x2, 3x3), Lavin and Gray (2016), arXiv 1509.09308: 16 products for four pixels, each of a sum of
   pixels and one of taps, where taps times pixels are 36. For 3x3 taps at stride 1; `x` is the first pixel that they
   reach, weights are (16, inputs, outputs). Tiles at the end of odd sides go over pixels that are there already. */
enum { MOST_IN_TILES = 256 };

static void convolve_tiles(const float *x, ptrdiff_t x_step, int inputs, const float *w, const float *bias, int adds,
                           float *z, ptrdiff_t z_step, int outputs, int height, int width) {
    float seen[16 * 8 * MOST_IN_TILES] __attribute__((aligned(64)));
    float products[16 * 8 * MOST_IN_TILES] __attribute__((aligned(64)));
    int across = (width + 1) / 2, total = across * ((height + 1) / 2);
    for (int first = 0; first < total; first += 8) {
        int count = total - first < 8 ? total - first : 8, rows[8], columns[8];
        for (int t = 0; t < (count > 4 ? 8 : 4); t++) {
            int tile = first + t < total ? first + t : total - 1, row = tile / across * 2, column = tile % across * 2;
            rows[t] = row < height - 1 ? row : height - 2, columns[t] = column < width - 1 ? column : width - 2;
            const float *corner = x + rows[t] * x_step + (ptrdiff_t)columns[t] * inputs;
            for (int c = 0; c < inputs; c += LANES) {
                vec half[4][4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const float *at = corner + j * inputs + c;
                    vec a = LOAD(at), b = LOAD(at + x_step), d = LOAD(at + 2 * x_step), e = LOAD(at + 3 * x_step);
                    half[0][j] = a - d, half[1][j] = b + d, half[2][j] = d - b, half[3][j] = b - e;
                }
                float *target = seen + t * inputs + c;
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++, target += 4 * 8 * inputs) {
                    vec a = half[i][0], b = half[i][1], d = half[i][2], e = half[i][3];
                    STORE(target, a - d), STORE(target + 8 * inputs, b + d);
                    STORE(target + 16 * inputs, d - b), STORE(target + 24 * inputs, b - e);
                }
            }
        }
        for (int p = 0; p < 16; p++) {
            const float *taps = w + (ptrdiff_t)p * inputs * outputs;
            rows_times_weights(count, seen + p * 8 * inputs, inputs, taps, products + p * 8 * outputs, outputs);
        }
        for (int t = 0; t < count; t++) {
            int done_y = rows[t] & 1, done_x = columns[t] & 1;
            for (int c = 0; c < outputs; c += LANES) {
                const float *at = products + t * outputs + c;
                float *corner = z + rows[t] * z_step + (ptrdiff_t)columns[t] * outputs + c;
                vec half[2][4], start = bias ? LOAD(bias + c) : SPLAT(0.0f);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++, at += 8 * outputs) {
                    vec a = LOAD(at), b = LOAD(at + 32 * outputs), d = LOAD(at + 64 * outputs), e = LOAD(at + 96 * outputs);
                    half[0][j] = a + b + d, half[1][j] = b - d - e;
                }
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++, corner += z_step) {
                    vec left = half[i][0] + half[i][1] + half[i][2] + start;
                    vec right = half[i][1] - half[i][2] - half[i][3] + start;
                    if (i < done_y) continue;
                    if (!done_x) STORE(corner, adds ? left + LOAD(corner) : left);
                    STORE(corner + outputs, adds ? right + LOAD(corner + outputs) : right);
                }
            }
        }
    }
}

static void convolve(const Operation *o, const Image *in, const Image *out, const float *weights, Memory m) {
    int total = out->height * out->width;
    ptrdiff_t step = pitch(in);
    const float *source[8], *x = values(m, in) - o->padding * (step + in->channels);
    float *target[8], *z = values(m, out);
    if (o->by_tiles) {
        convolve_tiles(x, step, in->channels, weights + o->weight, weights + o->bias, 0, z, pitch(out), out->channels,
                       out->height, out->width);
        return;
    }
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
    if (o->by_tiles) {
        int far = 2 - o->padding;
        convolve_tiles(dz - far * (step + depth), step, depth, w, NULL, o->adds & 1, dx, width, channels, in->height,
                       in->width);
        return;
    }
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

#endif
