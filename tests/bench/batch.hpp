// How every figure is taken: batches of at least 15 ms, one a repetition, in an order that Google
// Benchmark shuffles over all cases, so that a machine whose speed drifts drifts for everybody.
#pragma once

#include <benchmark/benchmark.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace bench {

using Clock = std::chrono::steady_clock;

inline constexpr double shortest_batch = 0.015;  // seconds

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Keeps this thread on one processor; false if there is none of that number.
inline bool pin_to(unsigned cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return pthread_setaffinity_np(pthread_self(), sizeof set, &set) == 0;
}

inline void unpin() {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (unsigned cpu = 0; cpu < std::thread::hardware_concurrency(); ++cpu) CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

/// Runs body(thread, operations) on each of `threads` threads at once. Seconds of wall time.
template <class Body>
double run_on(unsigned threads, std::size_t operations, Body& body) {
  if (threads == 1) {
    const auto start = Clock::now();
    body(0U, operations);
    return seconds_since(start);
  }
  std::atomic<unsigned> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> others;
  for (unsigned at = 1; at < threads; ++at) {
    others.emplace_back([&, at] {
      pin_to(at);
      ++ready;
      while (!go.load(std::memory_order_acquire)) sched_yield();
      body(at, operations);
    });
  }
  pin_to(0);
  while (ready.load() != threads - 1) sched_yield();
  const auto start = Clock::now();
  go.store(true, std::memory_order_release);
  body(0U, operations);
  for (std::thread& other : others) other.join();
  const double seconds = seconds_since(start);
  unpin();
  return seconds;
}

/// Registers a case: the time of one operation of one thread. `body(thread, operations)` does that many.
template <class Body>
void add_case(const std::string& name, unsigned threads, Body body) {
  benchmark::RegisterBenchmark(
      name.c_str(),
      [threads, body, operations = std::size_t{0}](benchmark::State& state) mutable {
        if (operations == 0) {
          // The warm-up finds out how many make a batch.
          operations = 64;
          while (run_on(threads, operations, body) < shortest_batch) operations *= 2;
        }
        for (auto _ : state) {
          state.SetIterationTime(run_on(threads, operations, body) /
                                 static_cast<double>(operations));
        }
      })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kNanosecond);
}

/// Registers a case whose body does a fixed piece of work and says itself how long one operation took.
template <class Body>
void add_timed_case(const std::string& name, Body body) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [body](benchmark::State& state) mutable {
                                 for (auto _ : state) state.SetIterationTime(body());
                               })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kNanosecond);
}

}  // namespace bench
