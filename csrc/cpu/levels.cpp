#include <stdexcept>

#include "kernels.hpp"

namespace mold {

namespace portable {
extern const Kernels kernels;
}
#ifdef MOLD_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

const std::vector<Level>& levels() {
#ifdef MOLD_X86
    __builtin_cpu_init();  // GCC's constructors have done it, those of other compilers' libraries may not
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#endif
    static const std::vector<Level> all = {
        {"portable", true, &portable::kernels},
#ifdef MOLD_X86
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::kernels},
        {"avx512", avx512, &avx512::kernels},
        {"avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"), &avx512_bf16::kernels},
#endif
    };
    return all;
}

namespace {

const Level*& chosen() {
    static const Level* choice = [] {
        const Level* best = nullptr;
        for (const Level& level : levels()) {
            if (level.supported) best = &level;
        }
        return best;
    }();
    return choice;
}

}  // namespace

const Level& level() { return *chosen(); }

void set_level(const std::string& name) {
    for (const Level& level : levels()) {
        if (level.name == name && level.supported) {
            chosen() = &level;
            return;
        }
    }
    throw std::invalid_argument("level: was " + name + ", must be one that this CPU supports");
}

}  // namespace mold
