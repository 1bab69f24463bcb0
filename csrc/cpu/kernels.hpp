#pragma once

#include <string>
#include <vector>

#include "../row_norm.hpp"
#include "span_pieces.hpp"
#include "view.hpp"

// What every instruction set has. Shapes and formulas are those of the Python file of the same name; `threads` is the
// most that a kernel may use.
namespace mold {

// What rows see of the keys, and by which score. mask bool [B, Tk] and ranges int32 [2, Tk] (see Ranges) are null where
// there is none, and so is first, the position of an example's first row, int32 [B], where rows are keys or attention is
// not causal; softcap is 0 where scores are not capped.
struct Visibility {
    const View *mask, *first, *ranges;
    double scale, softcap;
    bool causal;

    std::int64_t first_position(std::int64_t example) const {
        return first ? *first->at<const std::int32_t>(example) : 0;
    }
};

struct Kernels {
    // q and out [B, Hq, Tq, D], k and v [B, Hkv, Tk, D], lse [B, Hq, Tq]. v and out are null where lse alone is wanted.
    void (*attention_with_lse_forward)(
        const View& q, const View& k, const View* v, const Visibility& visibility, const View* out, const View& lse,
        int threads);

    // dk and dv are contiguous, of lse's dtype, and hold zeros, which stay where no row sees a key. grad_out, v, out and dv are null where lse alone was wanted.
    void (*attention_with_lse_backward)(
        const View* grad_out, const View& grad_lse, const View& q, const View& k, const View* v,
        const Visibility& visibility, const View* out, const View& lse, const View& dq, const View& dk, const View* dv,
        int threads);

    // q [B, Hq, Tq, D], k [B, Hkv, Tk, D], lse [B, Hq, Tq], pooled [B, H', S, M] contiguous; the mask is in the plans. `first`,
    // int32 like pooled or null, becomes the row of each maximum, the first of equal ones, -1 where all rows have 0.
    void (*span_attention_forward)(
        const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
        const View& pooled, const View* first, int threads);

    // Where every key is a key word.
    void (*key_attention_forward)(
        const View& q, const View& k, const View& lse, const SpanPlan* plans, const Visibility& visibility,
        const View& pooled, const View* first, int threads);

    // Either's. Adds nothing: writes the rows of dq and dlse that a step holds and the rows of dk (in lse's dtype) that a
    // key word holds. The caller has set the others to zero. Examples may share tensors if they share no step and word.
    // `first` is the forward's, null where rows are added up.
    void (*span_attention_backward)(
        const View& grad, const View& q, const View& k, const View& lse, const View* first, const SpanPlan* plans,
        const Visibility& visibility, const View& dq, const View& dk, const View& dlse, int threads);

    // teacher [L1, B, S, M], student [L2, B, S, M], weights [B, L2] and the loss [B] of one dtype, float32 or float64;
    // num_steps and num_keys int64 [B]; l1_epsilon is added to an entry where rows are divided by their sums.
    // mixture_grad, contiguous [B, S, M], is the gradient of an example's loss by its mixed student attention.
    void (*layer_mixture_kl_forward)(
        const View& teacher, const View& student, const View& weights, const View& num_steps, const View& num_keys,
        double tau, RowNorm row_norm, double l1_epsilon, const View& loss, const View& mixture_grad, int threads);
    void (*layer_mixture_kl_backward)(
        const View& grad, const View& mixture_grad, const View& student, const View& weights, const View& dstudent,
        const View& dweights, int threads);

    // v and dv [B, H, T, D], mask bool [B, T]; pooled and u [B, H * D] contiguous, float32 or float64 as v's sums are.
    void (*value_pool_forward)(const View& v, const View& mask, double eps, const View& pooled, int threads);
    void (*value_pool_backward)(
        const View& u, const View& v, const View& mask, double eps, const View& dv, int threads);
};

struct Level {
    std::string name;
    bool supported;  // by this CPU
    const Kernels* kernels;
};

// From the portable one upwards.
const std::vector<Level>& levels();

// The one in use: the best that this CPU supports unless set_level named another.
const Level& level();

// Throws std::invalid_argument unless `name` is a supported level.
void set_level(const std::string& name);

}  // namespace mold
