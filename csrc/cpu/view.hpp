#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace mold {

// A tensor that Python owns and has checked. Strides count elements and may be anything, 0 and negative included.
struct View {
    std::uintptr_t address;
    std::string dtype;  // as torch names it: "float32"
    std::vector<std::int64_t> sizes, strides;

    template <typename Element>
    Element* data() const {
        return reinterpret_cast<Element*>(address);
    }
};

enum class bfloat16 : std::uint16_t {};  // an enum, not a struct: GCC vectorises loops over it

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <typename Element, typename Accumulator>
Element narrow(Accumulator value) {
    if constexpr (std::is_same_v<Element, bfloat16>) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const std::uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return bfloat16(value == value ? nearest_even : 0x7fc0);  // NaN: rounding could carry it into infinity
    } else {
        return value;
    }
}

// Calls function(Element{}, Accumulator{}) for the types that `dtype` names.
template <typename Function>
void dispatch(const std::string& dtype, Function function) {
    if (dtype == "float32") return function(float{}, float{});
    if (dtype == "float64") return function(double{}, double{});
    if (dtype == "bfloat16") return function(bfloat16{}, float{});
    throw std::invalid_argument("dtype was " + dtype + ", must be float32, float64 or bfloat16");
}

}  // namespace mold
