#pragma once

#include "view.hpp"

// The formulas are derived in mold_kernels/value_pool.py. v and dv are [B, H, T, D], mask is bool [B, T];
// pooled and u are contiguous [B, H * D] in the accumulator's type: float32, or float64 for float64 v.
namespace mold {

void value_pool_forward(const View& v, const View& mask, double eps, const View& pooled);

void value_pool_backward(const View& u, const View& v, const View& mask, double eps, const View& dv);

}  // namespace mold
