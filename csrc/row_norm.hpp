#pragma once

#include <stdexcept>
#include <string>

namespace mold {

// How a row of layer_mixture_kl becomes a distribution: by its softmax, or by dividing it, plus an epsilon, by its sum.
enum class RowNorm { softmax, l1 };

inline RowNorm row_norm_named(const std::string& name) {
    if (name == "softmax") return RowNorm::softmax;
    if (name == "l1") return RowNorm::l1;
    throw std::invalid_argument("row_norm: is " + name + ", must be softmax or l1");
}

}  // namespace mold
