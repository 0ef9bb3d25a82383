/* Vectors of LANES floats, by the vector extensions of gcc and clang, and what the functions share. */

#ifndef VECTORS_H
#define VECTORS_H

#ifndef __AVX512F__
#error "compiled for narrower vectors these functions are slower than what they replace"
#endif

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
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

/* Or gcc loads it again for every use, and loads become the bottleneck. */
#define STAY_IN_REGISTER(value) __asm__("" : "+v"(value))

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* 1/(1 + exp(-x)): exp(-x) = 2^n 2^r with |r| at most a half, 2^r by a polynomial that is right to 2e-9, and
   one step of Newton's method, which makes 28 bits of the 14 of a first guess of the inverse. */
INLINE vec sigmoid(vec x) {
    vec y = (vec)_mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)(x * -1.44269504f)); /* NaN stays NaN */
    vec n = (vec)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = y - n;
    vec p = SPLAT(1.5337576820e-4f);
    p = p * r + 1.3399860363e-3f;
    p = p * r + 9.6185195344e-3f;
    p = p * r + 5.5503289975e-2f;
    p = p * r + 2.4022646609e-1f;
    p = p * r + 6.9314720560e-1f;
    p = p * r + 1.0f;
    vec z = 1.0f + (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
    vec guess = (vec)_mm512_rcp14_ps((__m512)z);
    return guess + guess * (1.0f - z * guess);
}

/* Element j of vector i to element i of vector j. */
INLINE void transpose(vec v[LANES]) {
#pragma GCC unroll 4
    for (int level = 0; level < 4; level++) {
        vec old[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) old[i] = v[i];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            v[2 * i] = SHUFFLE(old[i], old[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            v[2 * i + 1] = SHUFFLE(old[i], old[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }
}

#endif
