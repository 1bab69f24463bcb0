#pragma once

#include <cstdint>

namespace mold {

enum class Dtype { float32, float64, bfloat16, float16, boolean, int32, int64 };

// A tensor of up to four dimensions that Python owns and has checked. Strides count elements and may be anything, 0 and
// negative included. A plain struct: the kernel sources may use nothing that leaves shared inline functions behind
// (see simd.hpp).
struct View {
    std::uintptr_t address;
    Dtype dtype;
    std::int64_t sizes[4], strides[4];

    template <typename Element>
    Element* at(std::int64_t i = 0, std::int64_t j = 0, std::int64_t k = 0) const {
        return reinterpret_cast<Element*>(address) + i * strides[0] + j * strides[1] + k * strides[2];
    }
};

}  // namespace mold
