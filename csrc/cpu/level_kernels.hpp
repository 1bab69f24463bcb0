#pragma once

#include "kernels.hpp"

// The kernels of one level; kernels.hpp says what they do.
namespace mold::MOLD_LEVEL {

void attention_with_lse_forward(
    const View& q, const View& k, const View* v, const Visibility& visibility, const View* out, const View& lse,
    int threads);
void attention_with_lse_backward(
    const View* grad_out, const View& grad_lse, const View& q, const View& k, const View* v,
    const Visibility& visibility, const View* out, const View& lse, const View& dq, const View& dk, const View* dv,
    int threads);
void span_attention_forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, const View* first, int threads);
void key_attention_forward(
    const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
    const View& pooled, const View* first, int threads);
void span_attention_backward(
    const View& grad, const View& q, const View& k, const View& lse, const View* first, const SpanPlan* plans,
    const Visibility& visibility, const View& dq, const View& dk, const View& dlse, int threads);
void layer_mixture_kl_forward(
    const View& teacher, const View& student, const View& weights, const View& num_steps, const View& num_keys,
    double tau, RowNorm row_norm, double l1_epsilon, const View& loss, const View& mixture_grad, int threads);
void layer_mixture_kl_backward(
    const View& grad, const View& mixture_grad, const View& student, const View& weights, const View& dstudent,
    const View& dweights, int threads);
void value_pool_forward(const View& v, const View& mask, double eps, const View& pooled, int threads);
void value_pool_backward(
    const View& u, const View& v, const View& mask, double eps, const View& dv, int threads);

extern const Kernels kernels;

}  // namespace mold::MOLD_LEVEL
