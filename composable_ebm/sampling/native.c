/* Energy and input gradient of a chain of convolutions, one image at a time, everything in cache.

   Layout is height, width, channels; channels are padded to LANES, the border of every input with
   zeros. A linear layer is a convolution of a single pixel with many channels. One primitive does nearly all the
   work, `tile`: a few pixels times a few vectors of output channels, kept in registers,

       z[p] = bias + sum over rows r, j < length of x[p][r * row_step + j] * w[r, j],

   for the forward pass (rows and j run over the kernel) and, for each place of a pixel modulo the
   stride, for the input gradient (they run over the taps that reach such a pixel). */

#include <stddef.h>
#include <string.h>

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ivec __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))
#define LOAD(address) ((vec) * (const loose *)(address))
#define STORE(address, value) (*(loose *)(address) = (loose)(value))
#define SPLAT(value) ((vec){0} + (value))
#define WHERE(mask, a, b) ((vec)(((mask) & (ivec)(a)) | (~(mask) & (ivec)(b))))

/* Or gcc loads it again for every pixel, and loads become the bottleneck. */
#ifdef __AVX512F__
#define STAY_IN_REGISTER(value) __asm__("" : "+v"(value))
#else
#define STAY_IN_REGISTER(value)
#endif

enum { SILU = 1, RELU = 2 };

typedef struct {
    int in_channels, in_height, in_width;       /* channels as stored: padded, but for the first layer */
    int out_channels, out_height, out_width;    /* channels padded to LANES */
    int kernel_height, kernel_width, stride, padding;
    int activation;
    int forward_weight, backward_weight, bias;  /* places in the array of weights */
} Layer;

INLINE vec exponential(vec x) {
    x = WHERE(x > 88.0f, SPLAT(88.0f), x);
    x = WHERE(x < -87.0f, SPLAT(-87.0f), x);
    vec shifted = x * 1.44269504f + 12582912.0f;  /* rounds to the nearest integer */
    vec n = shifted - 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = SPLAT(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec scale = ((ivec)shifted - 0x4B400000 + 127) << 23;
    return p * (vec)scale;
}

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
                vec gate = 1.0f / (1.0f + exponential(-a));
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

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Sums of neighbours: those of `a` in the first half, those of `b` in the second. */
INLINE vec neighbours(vec a, vec b) {
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* Lanes 0 to 7: the sums over the lanes of eight vectors. */
INLINE vec totals(const vec v[8]) {
    vec fours[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        fours[i] = neighbours(neighbours(v[4 * i], v[4 * i + 1]), neighbours(v[4 * i + 2], v[4 * i + 3]));
    vec eight = neighbours(fours[0], fours[1]);
    return neighbours(eight, eight);
}

/* dz, with its border, to dx without one. Weights lie by place modulo the stride, then by tap. */
static void backward(const Layer *l, const float *weights, const float *dz, float *dx, int thin) {
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
                if (!thin) {
                    pixels_times_weights(count, source, rows, (ptrdiff_t)width * depth, length, w, channels,
                                         NULL, target);
                    continue;
                }
                for (int c = 0; c < channels; c++) { /* fewer channels than lanes: lanes along dz */
                    vec sum[8];
                    const float *column = w + (ptrdiff_t)c * rows * length;
#pragma GCC unroll 8
                    for (int p = 0; p < 8; p++) sum[p] = SPLAT(0.0f);
                    for (int r = 0; r < rows; r++)
                        for (int j = 0; j < length; j += LANES, column += LANES) {
                            vec factor = LOAD(column);
#pragma GCC unroll 8
                            for (int p = 0; p < 8; p++)
                                sum[p] += factor * LOAD(source[p] + (ptrdiff_t)r * width * depth + j);
                        }
                    vec sums = totals(sum);
                    for (int p = 0; p < count; p++) target[p][c] = sums[p];
                }
            }
            w += (ptrdiff_t)rows * length * channels;
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

/* Floats of working memory: padded inputs, slopes, gradients with borders, one plain gradient. */
size_t working_memory(const Layer *layers, int count) {
    size_t total = 0, largest = 0;
    for (int i = 0; i < count; i++) {
        const Layer *l = layers + i;
        size_t plain = (size_t)l->in_height * l->in_width * l->in_channels;
        largest = plain > largest ? plain : largest;
        total += image_size(l) + output_size(l) + bordered_size(l);
    }
    return total + largest + LANES;
}

/* energy[i] and gradient[i] of image[i], channels first. The last layer has one output. `memory`
   is zero where it was never written, and may be used again by the same layers. */
void energy_and_gradient(const Layer *layers, int count, const float *weights, const float *images,
                         float *energy, float *gradient, int batch, float *memory) {
    float *input[32], *slope[32], *bordered[32], *next = memory;
    for (int i = 0; i < count; i++) {
        input[i] = next, next += image_size(layers + i);
        slope[i] = next, next += output_size(layers + i);
        bordered[i] = next, next += bordered_size(layers + i);
    }
    const Layer *first = layers, *last = layers + count - 1;
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
        for (int i = count - 1; i >= 0; i--) {
            const Layer *l = layers + i;
            int by = border(l->kernel_height, l->stride), bx = border(l->kernel_width, l->stride);
            int width = (l->out_width + 2 * bx) * l->out_channels, line = l->out_width * l->out_channels;
            for (int row = 0; row < l->out_height; row++) {
                float *target = bordered[i] + (ptrdiff_t)(row + by) * width + bx * l->out_channels;
                const float *a = d + (ptrdiff_t)row * line, *b = slope[i] + (ptrdiff_t)row * line;
                for (int j = 0; j < line; j += LANES)
                    STORE(target + j, l == last ? LOAD(a + j) : LOAD(a + j) * LOAD(b + j));
            }
            backward(l, weights, bordered[i], next, i == 0);
            d = next;
        }
        float *target = gradient + (ptrdiff_t)image * area * channels;
        for (int c = 0; c < channels; c++)
            for (int pixel = 0; pixel < area; pixel++) target[c * area + pixel] = d[pixel * channels + c];
    }
}
