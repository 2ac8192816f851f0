// What bench_process measures: C++ programs that end on SIGTERM, each in a process of its own.
#pragma once

#include <time.h>

#include <cstdint>
#include <string>

namespace bench {

/// CLOCK_MONOTONIC in nanoseconds: the same in every process.
inline std::int64_t now() {
  timespec at{};
  clock_gettime(CLOCK_MONOTONIC, &at);
  return std::int64_t{at.tv_sec} * 1'000'000'000 + at.tv_nsec;
}

/// Prints `ready`, has `waiters` threads wait for the end, and ends as `subject` does on SIGTERM.
int serve(const std::string& subject, int waiters);

/// Prints `ready`, and for each SIGTERM when the worker of `subject` ran; for ever.
int await(const std::string& subject);

}  // namespace bench
