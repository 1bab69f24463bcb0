#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace mold::cuda {

// A tensor that Python owns and has checked. Strides count elements and may be anything, 0 and negative included.
struct Tensor {
    std::uintptr_t address;
    std::vector<std::int64_t> sizes, strides;

    template <typename Element>
    Element* data() const {
        return reinterpret_cast<Element*>(address);
    }

    int size(std::size_t axis) const { return static_cast<int>(sizes[axis]); }
};

// A CUDA stream as torch has it: the device's index and the stream's address.
struct Stream {
    int device;
    std::uintptr_t handle;
};

// The strides of a tensor in the form that a kernel takes.
template <std::size_t axes>
struct Strides {
    std::int64_t along[axes];

    explicit Strides(const Tensor& tensor) {
        for (std::size_t axis = 0; axis < axes; ++axis) along[axis] = tensor.strides[axis];
    }
};

}  // namespace mold::cuda
