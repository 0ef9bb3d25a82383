/* Activations, sums, gains, normalisations, poolings and the like, and their gradients. */

#ifndef POINTWISE_H
#define POINTWISE_H

#include "images.h"

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

#endif
