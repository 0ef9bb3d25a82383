/* Networks over noise levels (`experts/networks/diffused.py`) at one state: outputs, then the input gradient.

   A matrix is kept once, transposed, as float16: (inputs, outputs), one row for each input. The product with it
   reads a row as lanes of outputs; the product with its transpose sums over the lanes of a row. So both
   ways share one copy of half the size, and several networks fit the cache. Numbers widen to
   float32 in registers, which costs nothing beside the multiplications.

   Symbols as in `experts/networks/diffused_pass.py`. Rows are chains. A buffer of rows has a stride that is no multiple
   of a page, or neighbouring rows would fight for the same places in the cache. */

#include "vectors.h"
#include "work.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

/* Eight lanes come with sixteen registers, of which VECTORS * ROWS are sums. */
enum { ROWS = 4, VECTORS = LANES == 8 ? 2 : 4, LINE = 32, TOGETHER = 32, INPUT_BLOCK = 128, OUTPUT_BLOCK = 64 };

typedef struct {
    const uint16_t *values; /* inputs rounded up to BLOCK rows */
    int inputs, outputs;    /* outputs rounded up to 4 * BLOCK, with zeros */
} Matrix;

typedef struct {
    Matrix pixels, components, second, third, heads; /* heads: quadratic, linear, one for each value */
    const float *value_bias;
} Network;

/* What depends on the noise level: a row for each chain, or one for all (then the steps are 0). */
typedef struct {
    const float *root, *spread;         /* (rows, components) */
    const float *rest, *shrink, *amount; /* (rows) */
    const float *modulation; /* (networks, rows, 6, hidden): gain and bias of the three layers in turn */
    int rows;
} Level;

typedef struct {
    int networks, pixels, components, hidden, values, quadratic; /* components, hidden: rounded up */
    Matrix axes;
    const Network *network;
    const float *mean, *signs, *linear_bias; /* (pixels), (quadratic), (networks) */
} Product;

INLINE vec widened(const uint16_t *values) {
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)values));
#elif LANES == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)values));
#elif defined(__aarch64__)
    return (vec)vcvt_f32_f16(vld1_f16((const __fp16 *)values));
#else
    ivec bits;
    for (int i = 0; i < LANES; i++) bits[i] = values[i];
    vec size = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
    return (vec)((ivec)size | ((bits & 0x8000) << 16));
#endif
}

/* y[r] += x[r] Wᵀ for a block of inputs and VECTORS vectors of outputs. */
INLINE void forward_tile(const int rows, const float *x, ptrdiff_t x_step, const uint16_t *w, ptrdiff_t w_step,
                         int length, float *y, ptrdiff_t y_step, ptrdiff_t ahead, const int lines) {
    vec sum[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[r][v] = LOAD(y + r * y_step + v * LANES);
    for (int k = 0; k < length; k++, w += w_step) {
        vec column[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            column[v] = widened(w + v * LANES);
            STAY_IN_REGISTER(column[v]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < lines; i++) __builtin_prefetch(w + ahead + i * LINE, 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vec value = SPLAT(x[r * x_step + k]);
            STAY_IN_REGISTER(value);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[r][v] += value * column[v];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) STORE(y + r * y_step + v * LANES, sum[r][v]);
}

/* Lane i: the sum over the lanes of v[i]. At each level a blend and one shuffle bring together what
   is added, where sums of neighbours would need two shuffles. */
#if LANES == 16
INLINE vec totals(vec v[LANES]) {
#define MERGE(A, B, MASK, ...) (_mm512_mask_blend_ps(MASK, A, B) + _mm512_permutex2var_ps(A, _mm512_setr_epi32(__VA_ARGS__), B))
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = (vec)MERGE((__m512)v[i], (__m512)v[i + 8], 0xFF00, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        v[i] = (vec)MERGE((__m512)v[i], (__m512)v[i + 4], 0xF0F0, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        v[i] = (vec)MERGE((__m512)v[i], (__m512)v[i + 2], 0xCCCC, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
    return (vec)MERGE((__m512)v[0], (__m512)v[1], 0xAAAA, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
#undef MERGE
}
#else
INLINE vec totals(vec v[LANES]) {
    transpose(v);
    vec sum = v[0];
    for (int i = 1; i < LANES; i++) sum += v[i];
    return sum;
}
#endif

/* dx[r] += dy[r] W for LANES / rows inputs. */
INLINE void backward_tile(const int rows, const float *dy, ptrdiff_t y_step, const uint16_t *w,
                          int outputs, float *dx, ptrdiff_t x_step, ptrdiff_t ahead, const int lines) {
    const int inputs = LANES / rows;
    vec sum[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sum[i] = SPLAT(0.0f);
    for (int o = 0; o < outputs; o += LANES) {
        vec line[LANES];
#pragma GCC unroll 16
        for (int p = 0; p < inputs; p++) {
            line[p] = widened(w + (ptrdiff_t)p * outputs + o);
            STAY_IN_REGISTER(line[p]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < lines; i++)
            __builtin_prefetch(w + ahead + (ptrdiff_t)inputs * o + i * LINE, 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vec value = LOAD(dy + r * y_step + o);
            STAY_IN_REGISTER(value);
#pragma GCC unroll 16
            for (int p = 0; p < inputs; p++) sum[r * inputs + p] += value * line[p];
        }
    }
    float total[LANES] __attribute__((aligned(64)));
    *(vec *)total = totals(sum);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int p = 0; p < inputs; p++) dx[r * x_step + p] += total[r * inputs + p];
}

/* y += x Wᵀ. A tile of W, INPUT_BLOCK inputs wide, stays in the first cache while all rows pass. Meanwhile
   the one INPUT_BLOCK inputs later is fetched: each group of four rows asks for every second line, which
   spreads it in time. */
static void forward(const Matrix *m, int rows, const float *x, ptrdiff_t x_step, float *y, ptrdiff_t y_step) {
    for (int k = 0; k < m->inputs; k += INPUT_BLOCK) {
        int length = m->inputs - k < INPUT_BLOCK ? m->inputs - k : INPUT_BLOCK;
        for (int o = 0; o < m->outputs; o += VECTORS * LANES) {
            const uint16_t *w = m->values + (ptrdiff_t)k * m->outputs + o;
            for (int r = 0, count; r < rows; r += count) {
                ptrdiff_t ahead = (ptrdiff_t)INPUT_BLOCK * m->outputs + (r & 4 ? LINE : 0);
                const float *source = x + r * x_step + k;
                float *target = y + r * y_step + o;
                count = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
#define TILE(N, LINES) forward_tile(N, source, x_step, w, m->outputs, length, target, y_step, ahead, LINES)
                if (rows >= 8 && count == 4) TILE(4, 1);
                else if (count == 4) TILE(4, 2);
                else if (count == 2) TILE(2, 2);
                else TILE(1, 2);
#undef TILE
            }
        }
    }
}

/* dx += dy W, OUTPUT_BLOCK inputs for all rows at a time. */
static void backward(const Matrix *m, int rows, const float *dy, ptrdiff_t y_step, float *dx, ptrdiff_t x_step) {
    for (int k = 0; k < m->inputs; k += OUTPUT_BLOCK)
        for (int r = 0, count; r < rows; r += count) {
            ptrdiff_t ahead = (ptrdiff_t)OUTPUT_BLOCK * m->outputs + (r & 4 ? LINE : 0);
            count = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
            for (int p = k; p < k + OUTPUT_BLOCK && p < m->inputs; p += LANES / count) {
                const uint16_t *w = m->values + (ptrdiff_t)p * m->outputs;
                const float *source = dy + r * y_step;
                float *target = dx + r * x_step + p;
#define TILE(N, LINES) backward_tile(N, source, y_step, w, m->outputs, target, x_step, ahead, LINES)
                if (rows >= 8 && count == 4) TILE(4, 1);
                else if (count == 4) TILE(4, 2);
                else if (count == 2) TILE(2, 4);
                else TILE(1, 8);
#undef TILE
            }
        }
}

static ptrdiff_t padded(int size) { return (size + BLOCK - 1) / BLOCK * BLOCK + BLOCK; }

/* Buffers of all rows, one after another. */
typedef struct {
    ptrdiff_t wide, along_step, step, head_step; /* strides of rows */
    float *d, *dx, *along, *scaled, *h, *t, *dheads, *first;
    ptrdiff_t layer, network; /* from layer to layer, and from network to network, in `first` */
    ptrdiff_t size;
} Memory;

static Memory divided(const Product *p, ptrdiff_t total, float *memory) {
    Memory m;
    m.wide = padded(p->pixels), m.along_step = padded(p->components), m.step = padded(p->hidden);
    m.head_step = padded(p->network[0].heads.outputs);
    m.d = memory, m.dx = m.d + total * m.wide;
    m.along = m.dx + total * m.wide, m.scaled = m.along + total * m.along_step;
    m.h = m.scaled + total * m.along_step, m.t = m.h + total * m.step;
    m.dheads = m.t + total * m.step;
    m.first = m.dheads + total * m.head_step;
    m.layer = total * m.step, m.network = 3 * m.layer + total * m.head_step;
    m.size = total * (2 * m.wide + 2 * m.along_step + 2 * m.step + m.head_step) + p->networks * m.network;
    return m;
}

/* What one part is about: networks from .. until, rows first .. end. */
typedef struct {
    int from, until, first, end;
} Share;

static void clear(float *buffer, int rows, ptrdiff_t step) { memset(buffer, 0, rows * step * sizeof(float)); }

/* h (+)= silu(a) of a = z gain + bias; the derivative by z over z. */
static void activate(const float *modulation, int hidden, float *z, float *h, int add) {
    const float *gain = modulation, *bias = modulation + hidden;
    for (int j = 0; j < hidden; j += LANES) {
        vec a = LOAD(z + j) * LOAD(gain + j) + LOAD(bias + j);
        vec gate = sigmoid(a), value = a * gate;
        STORE(h + j, add ? LOAD(h + j) + value : value);
        STORE(z + j, (gate + value * (1.0f - gate)) * LOAD(gain + j));
    }
}

static const float *modulation_of(const Product *p, const Level *l, int network, int row, int layer) {
    ptrdiff_t at = (ptrdiff_t)network * l->rows + (l->rows > 1 ? row : 0);
    return l->modulation + (at * 6 + 2 * layer) * p->hidden;
}

static void outputs_of(const Product *p, const Level *l, const Memory *m, Share s, int first, int rows, int total,
                       const float *x, float *outputs) {
    ptrdiff_t step = l->rows > 1;
    float gaussian[TOGETHER];
    clear(m->along + first * m->along_step, rows, m->along_step);
    for (int r = first; r < first + rows; r++) {
        vec squares = SPLAT(0.0f);
        float *d = m->d + r * m->wide;
        const float *state = x + (ptrdiff_t)r * p->pixels;
        int j = 0;
        for (; j + LANES <= p->pixels; j += LANES) {
            vec value = LOAD(state + j) - LOAD(p->mean + j);
            STORE(d + j, value);
            squares += value * value;
        }
        float square = sum_of(squares);
        for (; j < p->pixels; j++) d[j] = state[j] - p->mean[j], square += d[j] * d[j];
        gaussian[r - first] = l->rest[r * step] * square;
    }
    forward(&p->axes, rows, m->d + first * m->wide, m->wide, m->along + first * m->along_step, m->along_step);
    for (int r = first; r < first + rows; r++) {
        vec sum = SPLAT(0.0f);
        float *along = m->along + r * m->along_step, *scaled = m->scaled + r * m->along_step;
        const float *root = l->root + r * step * p->components, *spread = l->spread + r * step * p->components;
        for (int j = 0; j < p->components; j += LANES) {
            vec a = LOAD(along + j);
            sum += LOAD(spread + j) * a * a;
            STORE(scaled + j, a * LOAD(root + j));
        }
        gaussian[r - first] = (gaussian[r - first] + sum_of(sum)) / 2;
    }
    for (int n = s.from; n < s.until; n++) {
        const Network *net = p->network + n;
        float *z = m->first + n * m->network + first * m->step;
        float *heads = m->first + n * m->network + 3 * m->layer + first * m->head_step;
        float *h = m->h + first * m->step;
        for (int layer = 0; layer < 3; layer++, z += m->layer) {
            clear(z, rows, m->step);
            if (layer == 0) {
                forward(&net->pixels, rows, m->d + first * m->wide, m->wide, z, m->step);
                for (int r = 0; r < rows; r++)
                    for (int j = 0; j < p->hidden; j += LANES)
                        STORE(z + r * m->step + j, LOAD(z + r * m->step + j) * l->shrink[(first + r) * step]);
                forward(&net->components, rows, m->scaled + first * m->along_step, m->along_step, z, m->step);
            } else {
                forward(layer == 1 ? &net->second : &net->third, rows, h, m->step, z, m->step);
            }
            for (int r = 0; r < rows; r++)
                activate(modulation_of(p, l, n, first + r, layer), p->hidden, z + r * m->step,
                         h + r * m->step, layer > 0);
        }
        clear(heads, rows, m->head_step);
        forward(&net->heads, rows, h, m->step, heads, m->head_step);
        for (int r = 0; r < rows; r++) {
            const float *head = heads + r * m->head_step;
            float quadratic = 0.0f;
            for (int j = 0; j < p->quadratic; j++) quadratic += p->signs[j] * head[j] * head[j];
            float linear = head[p->quadratic] + p->linear_bias[n];
            float common = gaussian[r] + l->amount[(first + r) * step] * (linear + quadratic / 2);
            for (int v = 0; v < p->values; v++)
                outputs[((ptrdiff_t)n * total + first + r) * p->values + v] =
                    common + head[p->quadratic + 1 + v] + net->value_bias[v];
        }
    }
}

static void gradient_of(const Product *p, const Level *l, const Memory *m, Share s, int first, int rows, int total,
                        const float *cotangents, float *gradient) {
    ptrdiff_t step = l->rows > 1;
    float everything[TOGETHER] = {0};
    float *h = m->h + first * m->step, *t = m->t + first * m->step;
    float *dx = m->dx + first * m->wide, *scaled = m->scaled + first * m->along_step;
    clear(dx, rows, m->wide);
    clear(scaled, rows, m->along_step);
    for (int n = s.until - 1; n >= s.from; n--) { /* the last one is still in the cache */
        const Network *net = p->network + n;
        float *slope = m->first + n * m->network + first * m->step;
        const float *heads = m->first + n * m->network + 3 * m->layer + first * m->head_step;
        float *dheads = m->dheads + first * m->head_step;
        clear(dheads, rows, m->head_step);
        for (int r = 0; r < rows; r++) {
            const float *cotangent = cotangents + ((ptrdiff_t)n * total + first + r) * p->values;
            const float *head = heads + r * m->head_step;
            float *dhead = dheads + r * m->head_step, sum = 0.0f;
            for (int v = 0; v < p->values; v++) sum += dhead[p->quadratic + 1 + v] = cotangent[v];
            everything[r] += sum;
            float strength = sum * l->amount[(first + r) * step];
            for (int j = 0; j < p->quadratic; j++) dhead[j] = head[j] * p->signs[j] * strength;
            dhead[p->quadratic] = strength;
        }
        clear(h, rows, m->step);
        backward(&net->heads, rows, dheads, m->head_step, h, m->step);
        for (int layer = 2; layer >= 0; layer--) {
            for (int r = 0; r < rows; r++) {
                const float *a = h + r * m->step, *b = slope + layer * m->layer + r * m->step;
                for (int j = 0; j < p->hidden; j += LANES)
                    STORE(t + r * m->step + j, LOAD(a + j) * LOAD(b + j));
            }
            if (layer > 0) backward(layer == 2 ? &net->third : &net->second, rows, t, m->step, h, m->step);
        }
        backward(&net->components, rows, t, m->step, scaled, m->along_step);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < p->hidden; j += LANES)
                STORE(t + r * m->step + j, LOAD(t + r * m->step + j) * l->shrink[(first + r) * step]);
        backward(&net->pixels, rows, t, m->step, dx, m->wide);
    }
    for (int r = 0; r < rows; r++) {
        const float *along = m->along + (first + r) * m->along_step;
        const float *root = l->root + (first + r) * step * p->components;
        const float *spread = l->spread + (first + r) * step * p->components;
        float *target = scaled + r * m->along_step;
        for (int j = 0; j < p->components; j += LANES)
            STORE(target + j, LOAD(target + j) * LOAD(root + j) + LOAD(spread + j) * LOAD(along + j) * everything[r]);
    }
    backward(&p->axes, rows, scaled, m->along_step, dx, m->wide);
    for (int r = 0; r < rows; r++) {
        float rest = l->rest[(first + r) * step] * everything[r];
        const float *d = m->d + (first + r) * m->wide, *source = dx + r * m->wide;
        float *target = gradient + (ptrdiff_t)(first + r) * p->pixels;
        for (int j = 0; j < p->pixels; j++) target[j] = source[j] + rest * d[j];
    }
}

/* Floats of working memory for so many chains. */
size_t perceptron_memory(const Product *p, int total) {
    float none;
    return divided(p, total, &none).size;
}

/* Which networks and rows a part is about. */
static Share share_of(const Work *w, int part, int networks) {
    if (w->by_networks)
        return (Share){start_of(w, part, networks), start_of(w, part + 1, networks), 0, w->total};
    return (Share){0, networks, start_of(w, part, w->total), start_of(w, part + 1, w->total)};
}

/* outputs (networks, total, values) at states (total, pixels). Parts of the rows share memory. */
void perceptron_outputs(const Work *w, int part) {
    const Product *p = w->subject;
    mode before = without_denormals();
    Share s = share_of(w, part, p->networks);
    Memory m = divided(p, w->total, w->memory + (w->by_networks ? part * w->size : 0));
    for (int r = s.first; r < s.end; r += TOGETHER) {
        int count = s.end - r < TOGETHER ? s.end - r : TOGETHER;
        outputs_of(p, w->level, &m, s, r, count, w->total, w->given, w->into);
    }
    back_to(before);
}

/* gradient (total, pixels) of Σ cotangent · output, of the outputs last computed in `memory`; one for each part
   of the networks, whose sum it is. */
void perceptron_gradient(const Work *w, int part) {
    const Product *p = w->subject;
    mode before = without_denormals();
    Share s = share_of(w, part, p->networks);
    Memory m = divided(p, w->total, w->memory + (w->by_networks ? part * w->size : 0));
    float *gradient = w->into + (w->by_networks ? (ptrdiff_t)part * w->total * p->pixels : 0);
    for (int r = s.first; r < s.end; r += TOGETHER) {
        int count = s.end - r < TOGETHER ? s.end - r : TOGETHER;
        gradient_of(p, w->level, &m, s, r, count, w->total, w->given, gradient);
    }
    back_to(before);
}
