// How every figure is taken: batches of at least 15 ms, one a repetition, in an order that Google
// Benchmark shuffles over all cases, so that a machine whose speed drifts drifts for everybody.
#pragma once

#include <benchmark/benchmark.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
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

/// The middle one; 0 of none.
inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Keeps this thread, and those that it makes, on one processor; false if there is none of that number.
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

/// Runs body(operations) on each of `threads` threads at once, each on a processor of its own. Seconds of
/// wall time.
template <class Body>
double run_on(unsigned threads, std::size_t operations, Body& body) {
  if (threads == 1) {
    const auto start = Clock::now();
    body(operations);
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
      body(operations);
    });
  }
  pin_to(0);
  while (ready.load() != threads - 1) sched_yield();
  const auto start = Clock::now();
  go.store(true, std::memory_order_release);
  body(operations);
  for (std::thread& other : others) other.join();
  const double seconds = seconds_since(start);
  unpin();
  return seconds;
}

/// Registers a case whose body does a piece of work and says itself how many seconds one operation took; a
/// negative figure is none. The name is "case@contender".
template <class Body>
void add_timed_case(const std::string& name, Body body) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [body](benchmark::State& state) mutable {
                                 for (auto _ : state) {
                                   const double figure = body();
                                   state.SetIterationTime(std::max(figure, 0.0));
                                   if (figure < 0) state.SkipWithError("no figure");
                                 }
                               })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kNanosecond);
}

/// Registers a case: the time of one operation of one thread. `body(operations)` does that many.
template <class Body>
void add_case(const std::string& name, unsigned threads, Body body) {
  add_timed_case(name, [threads, body, operations = std::size_t{0}]() mutable {
    if (operations == 0) {
      // The warm-up finds out how many make a batch.
      operations = 64;
      while (run_on(threads, operations, body) < shortest_batch) operations *= 2;
    }
    return run_on(threads, operations, body) / static_cast<double>(operations);
  });
}

/// The same for one thread and for two: "case/1@contender", "case/2@contender". `make()` gives the body, a
/// new one for each, so that what grew under two threads isn't there for one.
template <class Make>
void add_pair(const std::string& name, const std::string& contender, Make make) {
  for (const unsigned threads : {1U, 2U}) {
    add_case(name + "/" + std::to_string(threads) + "@" + contender, threads, make());
  }
}

}  // namespace bench
