/* Energy and input gradient of a chain of convolutions, one image at a time, everything in cache.

   Layout is height, width, channels; channels are padded to LANES, the border of every input with
   zeros. A linear layer is a convolution of a single pixel with many channels. One primitive does nearly all the
   work, `tile`: a few pixels times a few vectors of output channels, kept in registers,

       z[p] = bias + sum over rows r, j < length of x[p][r * row_step + j] * w[r, j],

   for the forward pass (rows and j run over the kernel) and, for each place of a pixel modulo the
   stride, for the input gradient (they run over the taps that reach such a pixel). */

#include "vectors.h"

enum { SILU = 1, RELU = 2 };

typedef struct {
    int in_channels, in_height, in_width;       /* channels as stored: padded, but for the first layer */
    int out_channels, out_height, out_width;    /* channels padded to LANES */
    int kernel_height, kernel_width, stride, padding;
    int activation;
    int forward_weight, backward_weight, bias;  /* places in the array of weights */
} Layer;

INLINE void tile(const int pixels, const int vectors, const float **x, int rows, ptrdiff_t row_step,
                 int length, const float *w, ptrdiff_t w_step, const float *bias, float **z) {
    vec sum[8][4];
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[p][v] = bias ? LOAD(bias + v * LANES) : SPLAT(0.0f);
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

#define TILE(P, V) tile(P, V, x, rows, row_step, length, w + c, channels, bias ? bias + c : NULL, z)

/* `count` pixels (at most 8; the arrays are filled up with repetitions), all output channels. */
static void pixels_times_weights(int count, const float **x, int rows, ptrdiff_t row_step, int length,
                                 const float *w, int channels, const float *bias, float **z0) {
    float *z[8];
    for (int c = 0; c < channels;) {
        int vectors = channels - c >= 4 * LANES ? 4 : channels - c >= 2 * LANES ? 2 : 1;
        for (int p = 0; p < 8; p++) z[p] = z0[p] + c;
        if (count == 1) {
            if (vectors == 4) TILE(1, 4); else if (vectors == 2) TILE(1, 2); else TILE(1, 1);
        } else if (vectors == 4) {
            TILE(4, 4);
            if (count > 4) {
                const float **all = x;
                x = all + 4;
                memmove(z, z + 4, 4 * sizeof *z);
                TILE(4, 4);
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

static void forward(const Layer *l, const float *weights, const float *x, float *z) {
    int width = l->in_width + 2 * l->padding, total = l->out_height * l->out_width;
    const float *source[8];
    float *target[8];
    for (int first = 0, row = 0, column = 0; first < total; first += 8) {
        int count = total - first < 8 ? total - first : 8;
        for (int p = 0; p < 8; p++) {
            if (p >= count) {
                source[p] = source[p - 1], target[p] = target[p - 1];
                continue;
            }
            source[p] = x + (ptrdiff_t)(row * width + column) * l->stride * l->in_channels;
            target[p] = z + (ptrdiff_t)(first + p) * l->out_channels;
            if (++column == l->out_width) column = 0, row++;
        }
        pixels_times_weights(count, source, l->kernel_height, (ptrdiff_t)width * l->in_channels,
                             l->kernel_width * l->in_channels, weights + l->forward_weight,
                             l->out_channels, weights + l->bias, target);
    }
}

/* h = act(z) into the interior of a padded image; act'(z) over z. */
static void activate(const Layer *l, float *z, float *h, int padding) {
    int width = l->out_width + 2 * padding;
    for (int row = 0; row < l->out_height; row++) {
        float *source = z + (ptrdiff_t)row * l->out_width * l->out_channels;
        float *target = h + (ptrdiff_t)((row + padding) * width + padding) * l->out_channels;
        for (int j = 0; j < l->out_width * l->out_channels; j += LANES) {
            vec a = LOAD(source + j), value = a, slope = SPLAT(1.0f);
            if (l->activation == SILU) {
                vec gate = sigmoid(a);
                value = a * gate;
                slope = gate + value * (1.0f - gate);
            } else if (l->activation == RELU) {
                slope = WHERE(a > 0.0f, SPLAT(1.0f), SPLAT(0.0f));
                value = a * slope;
            }
            STORE(target + j, value);
            STORE(source + j, slope);
        }
    }
}

/* The border around output gradients, wide enough for every tap that reaches an input pixel. */
static int border(int kernel, int stride) { return (kernel - 1) / stride + 1; }

/* Taps of the kernel that reach pixels at place `a` modulo the stride: how many, and the output
   (relative to the pixel's own block) that the first of them belongs to. */
static int taps(int a, int kernel, int stride, int padding, int *first) {
    int smallest = (a + padding) % stride;
    int count = smallest < kernel ? (kernel - 1 - smallest) / stride + 1 : 0;
    *first = (a + padding - smallest) / stride - (count - 1);
    return count;
}

/* dz, with its border, to dx without one. Weights lie by place modulo the stride, then by tap. */
static void backward(const Layer *l, const float *weights, const float *dz, float *dx) {
    int s = l->stride, by = border(l->kernel_height, s), bx = border(l->kernel_width, s);
    int width = l->out_width + 2 * bx, depth = l->out_channels, channels = l->in_channels;
    const float *w = weights + l->backward_weight;
    const float *source[8];
    float *target[8];
    for (int a = 0; a < s; a++)
        for (int b = 0; b < s; b++) {
            int first_y, first_x;
            int rows = taps(a, l->kernel_height, s, l->padding, &first_y);
            int columns = taps(b, l->kernel_width, s, l->padding, &first_x);
            int length = columns * depth;
            int high = (l->in_height - a + s - 1) / s, wide = (l->in_width - b + s - 1) / s;
            int total = high * wide;
            for (int first = 0, row = 0, column = 0; first < total; first += 8) {
                int count = total - first < 8 ? total - first : 8;
                for (int p = 0; p < 8; p++) {
                    if (p >= count) {
                        source[p] = source[p - 1], target[p] = target[p - 1];
                        continue;
                    }
                    source[p] = dz + (ptrdiff_t)((row + first_y + by) * width + column + first_x + bx) * depth;
                    target[p] = dx + (ptrdiff_t)((row * s + a) * l->in_width + column * s + b) * channels;
                    if (++column == wide) column = 0, row++;
                }
                pixels_times_weights(count, source, rows, (ptrdiff_t)width * depth, length, w, channels, NULL,
                                     target);
            }
            w += (ptrdiff_t)rows * length * channels;
        }
}

/* The first layer has fewer input channels than lanes, so there lanes run along a row of its output:
   dz lies channel by channel, and a vector of it meets all pixels of the image that its outputs read,
   stride² of them for each. */
typedef struct {
    int low_y, low_x;      /* the first output that reaches a block of stride² pixels, relative to it */
    int reach_y, reach_x;  /* how many do */
    int high, wide;        /* blocks */
    ptrdiff_t pitch, size; /* floats of a row of outputs with its border, and of a channel */
} Planes;

static Planes planes_of(const Layer *l) {
    Planes p;
    int s = l->stride;
    p.low_y = -((l->kernel_height - 1 - l->padding) / s), p.low_x = -((l->kernel_width - 1 - l->padding) / s);
    p.reach_y = (s - 1 + l->padding) / s - p.low_y + 1, p.reach_x = (s - 1 + l->padding) / s - p.low_x + 1;
    p.high = (l->in_height + s - 1) / s, p.wide = (l->in_width + s - 1) / s;
    p.pitch = p.wide + p.reach_x;
    p.size = (p.high + p.reach_y) * p.pitch + 2 * LANES;
    return p;
}

/* d times slope, (pixels, channels), to planes (channels, rows, columns). */
static void to_planes(const Layer *l, const Planes *p, const float *d, const float *slope, float *planes) {
    int depth = l->out_channels;
    for (int row = 0; row < l->out_height; row++)
        for (int first = 0; first < l->out_width; first += LANES)
            for (int c = 0; c < depth; c += LANES) {
                vec v[LANES];
                ptrdiff_t at = (ptrdiff_t)(row * l->out_width + first) * depth + c;
                for (int i = 0; i < LANES; i++, at += depth)
                    v[i] = first + i < l->out_width ? LOAD(d + at) * LOAD(slope + at) : SPLAT(0.0f);
                transpose(v);
                float *target = planes + c * p->size + (row - p->low_y) * p->pitch + first - p->low_x;
                for (int i = 0; i < LANES; i++) STORE(target + i * p->size, v[i]);
            }
}

/* A few rows of blocks at once, so that a weight is read once for all of them. */
INLINE void thin_tile(const int s, const int together, const Layer *l, const Planes *p, const float *w,
                      const float *planes, float *dx, int row, int column) {
    vec sum[16];
    const float *source[8];
    int squares = s * s;
#pragma GCC unroll 16
    for (int i = 0; i < together * s * s; i++) sum[i] = SPLAT(0.0f);
    for (int c = 0; c < l->out_channels; c++, planes += p->size)
        for (int y = 0; y < p->reach_y; y++) {
#pragma GCC unroll 8
            for (int r = 0; r < together; r++) {
                int at = row + r < p->high ? row + r : p->high - 1;
                source[r] = planes + (at + y) * p->pitch + column;
            }
            for (int x = 0; x < p->reach_x; x++, w += squares)
#pragma GCC unroll 8
                for (int r = 0; r < together; r++) {
                    vec value = LOAD(source[r] + x);
                    STAY_IN_REGISTER(value);
#pragma GCC unroll 16
                    for (int i = 0; i < s * s; i++) sum[r * s * s + i] += value * w[i];
                }
        }
    int count = p->wide - column < LANES ? p->wide - column : LANES;
    for (int r = 0; r < together && row + r < p->high; r++)
        for (int a = 0; a < s && (row + r) * s + a < l->in_height; a++) {
            float line[4 * LANES];
            for (int b = 0; b < s; b++)
                for (int i = 0; i < LANES; i++) line[i * s + b] = sum[(r * s + a) * s + b][i];
            int length = l->in_width - column * s < count * s ? l->in_width - column * s : count * s;
            memcpy(dx + (ptrdiff_t)((row + r) * s + a) * l->in_width + column * s, line, length * sizeof(float));
        }
}

/* dz in planes to dx, channels first. Weights: (input channels, outputs, reach_y, reach_x, stride²). */
static void thin_backward(const Layer *l, const Planes *p, const float *w, const float *planes, float *dx) {
    int s = l->stride, together = s == 1 ? 8 : s == 2 ? 4 : 1;
    ptrdiff_t weights = (ptrdiff_t)l->out_channels * p->reach_y * p->reach_x * s * s;
    for (int c = 0; c < l->in_channels; c++, w += weights, dx += (ptrdiff_t)l->in_height * l->in_width)
        for (int row = 0; row < p->high; row += together)
            for (int column = 0; column < p->wide; column += LANES) {
                if (s == 1) thin_tile(1, 8, l, p, w, planes, dx, row, column);
                else if (s == 2) thin_tile(2, 4, l, p, w, planes, dx, row, column);
                else if (s == 3) thin_tile(3, 1, l, p, w, planes, dx, row, column);
                else thin_tile(4, 1, l, p, w, planes, dx, row, column);
            }
}

/* Rounded up, so that what comes next starts on a cache line. */
static size_t image_size(const Layer *l) {
    size_t area = (size_t)(l->in_height + 2 * l->padding) * (l->in_width + 2 * l->padding);
    return (area * l->in_channels + LANES - 1) / LANES * LANES;
}

static size_t output_size(const Layer *l) {
    return (size_t)l->out_height * l->out_width * l->out_channels;
}

static size_t bordered_size(const Layer *l) {
    return (size_t)(l->out_height + 2 * border(l->kernel_height, l->stride)) *
           (l->out_width + 2 * border(l->kernel_width, l->stride)) * l->out_channels;
}

static size_t planes_size(const Layer *l) { return (size_t)l->out_channels * planes_of(l).size; }

/* Floats of working memory: padded inputs, slopes, gradients with borders, one plain gradient. */
size_t working_memory(const Layer *layers, int count) {
    size_t total = 0, largest = 0;
    for (int i = 0; i < count; i++) {
        const Layer *l = layers + i;
        size_t plain = (size_t)l->in_height * l->in_width * l->in_channels;
        largest = plain > largest ? plain : largest;
        total += image_size(l) + output_size(l) + (i ? bordered_size(l) : planes_size(l));
    }
    return total + largest + LANES;
}

/* energy[i] and gradient[i] of image[i], channels first. The last layer has one output. `memory`
   is zero where it was never written, and may be used again by the same layers. */
void energy_and_gradient(const Layer *layers, int count, const float *weights, const float *images,
                         float *energy, float *gradient, int batch, float *memory) {
    const Layer *first = layers, *last = layers + count - 1;
    const Planes planes = planes_of(first);
    float *input[32], *slope[32], *bordered[32], *next = memory;
    for (int i = 0; i < count; i++) {
        input[i] = next, next += image_size(layers + i);
        slope[i] = next, next += output_size(layers + i);
        bordered[i] = next, next += i ? bordered_size(layers + i) : planes_size(first);
    }
    int area = first->in_height * first->in_width, channels = first->in_channels;
    for (int image = 0; image < batch; image++) {
        const float *x = images + (ptrdiff_t)image * area * channels;
        for (int row = 0; row < first->in_height; row++) {
            int width = first->in_width + 2 * first->padding;
            float *target = input[0] + (ptrdiff_t)((row + first->padding) * width + first->padding) * channels;
            for (int column = 0; column < first->in_width; column++)
                for (int c = 0; c < channels; c++)
                    target[column * channels + c] = x[c * area + row * first->in_width + column];
        }
        for (int i = 0; i < count; i++) {
            forward(layers + i, weights, input[i], slope[i]);
            if (layers + i != last) activate(layers + i, slope[i], input[i + 1], layers[i + 1].padding);
        }
        energy[image] = slope[count - 1][0];
        memset(slope[count - 1], 0, LANES * sizeof(float));
        slope[count - 1][0] = 1.0f;
        float *d = slope[count - 1];
        for (int i = count - 1; i > 0; i--) {
            const Layer *l = layers + i;
            int by = border(l->kernel_height, l->stride), bx = border(l->kernel_width, l->stride);
            int width = (l->out_width + 2 * bx) * l->out_channels, line = l->out_width * l->out_channels;
            for (int row = 0; row < l->out_height; row++) {
                float *target = bordered[i] + (ptrdiff_t)(row + by) * width + bx * l->out_channels;
                const float *a = d + (ptrdiff_t)row * line, *b = slope[i] + (ptrdiff_t)row * line;
                for (int j = 0; j < line; j += LANES)
                    STORE(target + j, l == last ? LOAD(a + j) : LOAD(a + j) * LOAD(b + j));
            }
            backward(l, weights, bordered[i], next);
            d = next;
        }
        to_planes(first, &planes, d, slope[0], bordered[0]);
        thin_backward(first, &planes, weights + first->backward_weight, bordered[0],
                      gradient + (ptrdiff_t)image * area * channels);
    }
}
