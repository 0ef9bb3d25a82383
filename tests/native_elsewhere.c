/* Runs the functions in C on another processor than the tests' own: standard input in, standard output out.

   In:  the sizes below, operations, images, weights, states, cotangents.
   Out: outputs and gradients. */

#include <stdio.h>
#include <stdlib.h>

#include "convolutions.c"

static void *block(size_t size) {
    void *memory = calloc(size + 64, 1);
    if (fread(memory, 1, size, stdin) != size) exit(2);
    return memory;
}

int main(void) {
    int *n = block(12 * sizeof(int)), batch = n[9], weights = n[10], pixels = n[11];
    Network network = {block(n[0] * sizeof(Operation)), block(n[1] * sizeof(Image)), NULL, n[0], n[2], n[3], n[4],
                       n[5], n[6], n[7], n[8]};
    network.weights = block(weights * sizeof(float));
    float *x = block((size_t)batch * pixels * sizeof(float)), *cotangents = block(batch * n[3] * sizeof(float));
    float *outputs = calloc(batch * n[3], sizeof(float)), *gradients = calloc((size_t)batch * pixels, sizeof(float));
    float *kept = calloc((size_t)batch * n[5], sizeof(float)), *memory = calloc(n[6], sizeof(float));
    Work there = {.subject = &network, .given = x, .into = outputs, .kept = kept, .memory = memory, .size = n[6],
                  .total = batch, .parts = 1}, back = there;
    back.given = cotangents, back.into = gradients;
    network_outputs(&there, 0);
    network_gradient(&back, 0);
    fwrite(outputs, sizeof(float), batch * n[3], stdout);
    fwrite(gradients, sizeof(float), (size_t)batch * pixels, stdout);
    return lanes() == LANES ? 0 : 3;
}
