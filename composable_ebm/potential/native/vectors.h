/* Vectors of LANES floats, by the vector extensions of gcc and clang: as wide as the processor has them.

   AVX-512 has 16 lanes, AVX2 has 8, and NEON (or plain SSE) 4. Memory is laid out in blocks of BLOCK
   floats whatever the width, so that packed weights are the same everywhere. */

#ifndef VECTORS_H
#define VECTORS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
#else
#define LANES 4
#endif
#define BLOCK 16

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ivec __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))
#define LOAD(address) ((vec) * (const loose *)(address))
#define STORE(address, value) (*(loose *)(address) = (loose)(value))
#define SPLAT(value) ((vec){0} + (value))
#define WHERE(mask, a, b) ((vec)(((mask) & (ivec)(a)) | (~(mask) & (ivec)(b))))

/* Or gcc loads it again for every use, and loads become the bottleneck. */
#if defined(__aarch64__)
#define STAY_IN_REGISTER(value) __asm__("" : "+w"(value))
#elif LANES > 4
#define STAY_IN_REGISTER(value) __asm__("" : "+v"(value))
#else
#define STAY_IN_REGISTER(value) (void)0
#endif

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* 2^y: 2^n 2^r with |r| at most a half, 2^r by a polynomial that is right to 2e-9. NaN stays NaN. */
INLINE vec power_of_two(vec y) {
#if LANES == 16
    y = (vec)_mm512_max_ps(_mm512_set1_ps(-126.0f), (__m512)y);
    y = (vec)_mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)y);
    vec n = (vec)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = y - n;
#else
    y = WHERE(y > 126.0f, SPLAT(126.0f), y);
    y = WHERE(y < -126.0f, SPLAT(-126.0f), y);
    vec n = (y + 12582912.0f) - 12582912.0f, r = y - n;
#endif
    vec p = SPLAT(1.5337576820e-4f);
    p = p * r + 1.3399860363e-3f;
    p = p * r + 9.6185195344e-3f;
    p = p * r + 5.5503289975e-2f;
    p = p * r + 2.4022646609e-1f;
    p = p * r + 6.9314720560e-1f;
    p = p * r + 1.0f;
#if LANES == 16
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
#endif
}

/* 1/(1 + exp(-x)), with one step of Newton's method on a first guess of the inverse where there is one. */
INLINE vec sigmoid(vec x) {
    vec z = 1.0f + power_of_two(x * -1.44269504f);
#if LANES == 16
    vec guess = (vec)_mm512_rcp14_ps((__m512)z);
    return guess + guess * (1.0f - z * guess);
#else
    return 1.0f / z;
#endif
}

INLINE float sum_of(vec v) {
    float total = 0.0f;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

/* Element j of vector i to element i of vector j: at each level halves are interleaved. */
#if LANES == 16
#define LEVELS 4
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LEVELS 3
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LEVELS 2
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
INLINE void transpose(vec v[LANES]) {
#pragma GCC unroll 4
    for (int level = 0; level < LEVELS; level++) {
        vec old[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) old[i] = v[i];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            v[2 * i] = SHUFFLE(old[i], old[i + LANES / 2], LOW);
            v[2 * i + 1] = SHUFFLE(old[i], old[i + LANES / 2], HIGH);
        }
    }
}

/* Denormals are zero while a function runs: silu's derivative far out is ten times as slow with them. */
#if defined(__x86_64__)
#if LANES == 4
#include <immintrin.h>
#endif
typedef unsigned mode;
INLINE mode without_denormals(void) {
    mode before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
INLINE void back_to(mode before) { _mm_setcsr(before); }
#elif defined(__aarch64__)
typedef uint64_t mode;
INLINE mode without_denormals(void) {
    mode before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | (1u << 24)));
    return before;
}
INLINE void back_to(mode before) { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#else
typedef int mode;
INLINE mode without_denormals(void) { return 0; }
INLINE void back_to(mode before) { (void)before; }
#endif

#endif
