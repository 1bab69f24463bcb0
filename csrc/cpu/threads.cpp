#include "threads.hpp"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace mold {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The entry point that GCC's OpenMP and LLVM's both export. torch loads its runtime with global symbols.
Parallel openmp() {
    static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return parallel;
}

}  // namespace

void run_threads(int threads, void (*worker)(void*), void* context) {
    if (threads <= 1) return worker(context);
    if (const Parallel parallel = openmp()) return parallel(worker, context, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(worker, context);
    worker(context);
    for (std::thread& other : others) other.join();
}

const char* thread_source() { return openmp() ? "the OpenMP threads of torch" : "started for each call"; }

}  // namespace mold
