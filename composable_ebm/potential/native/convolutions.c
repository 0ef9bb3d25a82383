/* Energy and input gradient of a network of convolutions, one image at a time, everything in cache.

   A network is a list of operations on images (convolutions and linear layers, activations, sums, gains
   and biases of channels, normalisations by groups, average pooling), which run forward and then backward. Images
   lie as height, width, channels (rows of tokens are images of height 1); channels are padded to BLOCK, and borders
   of zeros stand around what a convolution reads, forward and backward. A linear layer is a convolution of a single
   pixel with many channels. */

#include "pointwise.h"
#include "products.h"
#include "work.h"

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

/* Outputs of images, (images, outputs). `kept` has n->kept floats for each image, and parts have n->memory.
   With gradients (images, ...) not NULL, those of the first output come at once, and nothing is kept. */
void network_outputs(const Work *w, int part) {
    const Network *n = w->subject;
    mode before = without_denormals();
    ptrdiff_t size = (ptrdiff_t)n->channels * n->images->height * n->images->width;
    float *memory = w->memory + part * w->size;
    const float one = 1.0f;
    for (int i = start_of(w, part, w->total); i < start_of(w, part + 1, w->total); i++) {
        Memory m = {w->gradients ? memory : w->kept + (ptrdiff_t)i * n->kept, memory + n->kept, n->kept};
        outputs_of(n, w->given + i * size, w->into + (ptrdiff_t)i * n->outputs, m);
        if (w->gradients) gradient_of(n, &one, w->gradients + i * size, m);
    }
    back_to(before);
}

/* Gradients of Σ cotangent · output, of the images whose outputs were taken last. */
void network_gradient(const Work *w, int part) {
    const Network *n = w->subject;
    mode before = without_denormals();
    ptrdiff_t size = (ptrdiff_t)n->channels * n->images->height * n->images->width;
    float *memory = w->memory + part * w->size;
    for (int i = start_of(w, part, w->total); i < start_of(w, part + 1, w->total); i++) {
        Memory m = {w->kept + (ptrdiff_t)i * n->kept, memory + n->kept, n->kept};
        gradient_of(n, w->given + (ptrdiff_t)i * n->outputs, w->into + i * size, m);
    }
    back_to(before);
}

/* What every thread of OpenMP's does of some work: `number` and `count` are OpenMP's own functions. */
typedef struct {
    void (*function)(const Work *, int part);
    const Work *work;
    int (*number)(void), (*count)(void);
} Team;

void in_team(const Team *t) {
    for (int part = t->number(); part < t->work->parts; part += t->count()) t->function(t->work, part);
}
