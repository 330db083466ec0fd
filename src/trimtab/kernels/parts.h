// The kernels that a layer is made of, declared. What they compute is said where they are defined.
#pragma once

#include "vectors.h"

// A layer [out, in], its bias (may be null), rows [rows, out] of what comes out, or of its gradient, and sums of the weight's gradient.
struct Linear {
    const bf16* weight;
    const float* bias;
    bf16* rows;
    float* sums;
    int out;
};

// Attention over a packed batch: see attention.cpp.
struct Attention {
    const bf16 *q, *k, *v;  // [tokens, heads or kv, dim], strides in elements from token to token
    long q_stride, k_stride, v_stride;
    int tokens, heads, kv, dim;
    int groups;
    const int32_t* first;    // [groups + 1]: the sequences of a group, its prompt (perhaps empty) before its responses
    const int32_t* starts;   // [sequences]: the first token
    const int32_t* lengths;  // [sequences]
    float scale, softcap;    // softcap 0: none
    int window;              // 0: unlimited
};

constexpr int NORM_BLOCK = 32;  // rows whose share of the gradient of a norm's weight is added up at once

// Those that return a number return 0, or 1 if memory ran out.
extern "C" {
int linear_forward(const bf16* x, int rows, int in, const Linear* layers, int count, const bf16* plus);
int linear_gated(const bf16* x, int rows, int in, const Linear* layers, bf16* z);
int linear_input(const Linear* layers, int count, int rows, int in, bf16* found);
int linear_weight(const Linear* layers, int count, const bf16* x, int rows, int in);

int attention_forward(const Attention* p, bf16* out, float* lse);
int attention_backward(const Attention* p, const bf16* grad, long stride, const float* lse, bf16* grad_q, bf16* grad_k, bf16* grad_v);

void rms_norm_forward(const bf16* x, const bf16* w, float eps, int rows, int width, bf16* y, float* inverse);
void rms_norm_backward(const bf16* x, const bf16* w, const float* inverse, const bf16* grad, const bf16* plus, int rows, int width, bf16* grad_x,
                       float* grad_w);
void swiglu_forward(const bf16* gate, const bf16* up, int rows, int width, bf16* y);
void swiglu_backward(const bf16* gate, const bf16* up, const bf16* grad, int rows, int width, bf16* grad_gate, bf16* grad_up, bf16* y);
void rotate(const bf16* x, long stride, const bf16* cos, const bf16* sin, int tokens, int heads, int dim, int backward, bf16* y);
}
