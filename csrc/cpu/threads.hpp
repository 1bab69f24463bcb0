#pragma once

namespace mold {

// Calls worker(context) on `threads` threads at once, perhaps on fewer, and returns when all have returned. The threads
// are those of the OpenMP runtime that torch has loaded: a second pool would fight with torch's, whose idle workers
// spin for milliseconds. Where there is none, threads are started for the call.
void run_threads(int threads, void (*worker)(void*), void* context);

// Where run_threads has its threads from, for `mold info`.
const char* thread_source();

}  // namespace mold
