// A peer program: a library's side of the benchmarks, in a process of its own.
//
// It prints `peer <name> <version>`, then answers each line `run <case> <seconds>` with one line
// `<case> <figure>` or `<case> unsupported`, and ends with its input. A batch takes <seconds> of wall
// time at least; a case that builds a tree, or lets deadlines fire, runs once. The figures are
// nanoseconds an operation unless it says otherwise, and with several threads wall time over the
// operations of one of them. (Programs in other languages do the same in their own words.)
//
//   check/1 check/2 check8/1 check8/2  asking whether a live token is cancelled, at depth 1 and 8
//   child/1 child/2                    a child made and destroyed, under one parent
//   callback/1 callback/2              a callback registered and removed, on one token
//   cancel_wide cancel_deep            a node of a root with 10^6 children, of a chain of 10^6
//   destroy_wide destroy_deep          the same when those trees, cancelled, are destroyed
//   bytes_child                        resident bytes of one of 10^6 children, with what its owner holds
//   guard/1 guard/2                    a group entered and left, which somebody else is in
//   last_out                           the last one leaves -> who waits for that runs, on one processor
//   signal signal_two                  SIGTERM to the own process -> a worker runs, which is not whoever
//                                      received it; on one processor, and wherever they are put
//   signal_handler                     the same if the work is done where the signal is received
//   deadline/1 deadline/2              a child with a deadline an hour away made and cancelled
//   deadlines_fire                     CPU milliseconds of 10^5 deadlines, spread over a second, from
//                                      before they are made until all have fired
//   deadlines_late                     by how many milliseconds 99 of 100 of those are late at most
//
// With `await` as its argument it prints `ready`, waits for a SIGTERM, prints the time (CLOCK_MONOTONIC,
// in nanoseconds) at which its worker ran, and starts again; with `serve <n>` it prints `ready` and has n
// waiters until a SIGTERM, after which all leave and it ends.
#pragma once

#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace peer {

inline constexpr std::size_t deadlines = 100'000;

/// CLOCK_MONOTONIC in nanoseconds: what other processes read, too.
inline std::int64_t now() {
  timespec at{};
  clock_gettime(CLOCK_MONOTONIC, &at);
  return std::int64_t{at.tv_sec} * 1'000'000'000 + at.tv_nsec;
}

inline double seconds_since(std::int64_t begin) { return static_cast<double>(now() - begin) / 1e9; }

inline double cpu_milliseconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto of = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_usec) / 1e3;
  };
  return of(usage.ru_utime) + of(usage.ru_stime);
}

/// Long enough for the other threads to fall asleep.
inline void settle() { std::this_thread::sleep_for(std::chrono::microseconds(200)); }

inline void raise_sigterm() { ::kill(::getpid(), SIGTERM); }

/// Runs body(operations) on so many threads at once, doubling the operations until a batch takes long
/// enough. Nanoseconds per operation of one thread.
template <class Body>
double per_operation(unsigned threads, double seconds, Body body) {
  for (std::size_t operations = 256;; operations *= 2) {
    std::atomic<unsigned> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) {
      others.emplace_back([&] {
        ++ready;
        while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
        body(operations);
      });
    }
    while (ready.load() != threads - 1) std::this_thread::yield();
    const std::int64_t begin = now();
    go.store(true, std::memory_order_release);
    body(operations);
    for (std::thread& other : others) other.join();
    const double took = seconds_since(begin);
    if (took >= seconds) return took * 1e9 / static_cast<double>(operations);
  }
}

/// The median of single latencies, measured for as long as a batch lasts.
template <class Once>
double latency(double seconds, Once once) {
  std::vector<std::int64_t> all;
  for (const std::int64_t begin = now(); seconds_since(begin) < seconds || all.size() < 15;) {
    all.push_back(once());
  }
  std::sort(all.begin(), all.end());
  return static_cast<double>(all[all.size() / 2]);
}

/// By how many milliseconds 99 of 100 are late at most; `fire` adds to `lateness`, in nanoseconds, if nothing
/// has yet.
inline double deadlines_late(std::vector<std::int64_t>& lateness, double (*fire)()) {
  if (lateness.empty()) fire();
  std::sort(lateness.begin(), lateness.end());
  return static_cast<double>(lateness[lateness.size() * 99 / 100]) / 1e6;
}

/// Runs `body` on processor 0, with the threads that it makes.
template <class Body>
double pinned(Body body) {
  cpu_set_t before;
  sched_getaffinity(0, sizeof before, &before);
  cpu_set_t first;
  CPU_ZERO(&first);
  CPU_SET(0, &first);
  sched_setaffinity(0, sizeof first, &first);
  const double figure = body();
  sched_setaffinity(0, sizeof before, &before);
  return figure;
}

/// What a worker thread of the C++ programs waits for.
class Flag {
 public:
  void raise() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      up_ = true;
    }
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return up_; });
    up_ = false;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool up_ = false;
};

/// A worker that says when it was told, again and again.
class Worker {
 public:
  Worker()
      : thread_([this] {
          for (;;) {
            told_.wait();
            if (quit_) return;
            woken_at_ = now();
            done_.raise();
          }
        }) {}
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() {
    quit_ = true;
    told_.raise();
    thread_.join();
  }
  void tell() { told_.raise(); }
  /// When it was told.
  std::int64_t woken() {
    done_.wait();
    return woken_at_;
  }

 private:
  Flag told_;
  Flag done_;
  std::atomic<bool> quit_{false};
  std::int64_t woken_at_ = 0;
  std::thread thread_;
};

/// A case's name, taken apart.
struct Case {
  std::string kind;
  unsigned threads = 1;
};
inline Case parse_case(const std::string& name) {
  const std::size_t slash = name.find('/');
  if (slash == std::string::npos) return {name, 1};
  return {name.substr(0, slash), static_cast<unsigned>(std::atoi(name.c_str() + slash + 1))};
}

/// The program's main loop. run(case, seconds) is empty for what it doesn't know.
template <class Run>
int answer(const std::string& name, const std::string& version, Run run) {
  std::printf("peer %s %s\n", name.c_str(), version.c_str());
  std::fflush(stdout);
  char line[256];
  while (std::fgets(line, sizeof line, stdin) != nullptr) {
    char which[128];
    double seconds = 0;
    if (std::sscanf(line, "run %127s %lf", which, &seconds) != 2) continue;
    const std::optional<double> figure = run(parse_case(which), seconds);
    if (figure) {
      std::printf("%s %.3f\n", which, *figure);
    } else {
      std::printf("%s unsupported\n", which);
    }
    std::fflush(stdout);
  }
  return 0;
}

/// `await`: for each SIGTERM, when once() says that it was seen.
template <class Once>
[[noreturn]] void await(Once once) {
  for (;;) {
    std::printf("ready\n");
    std::fflush(stdout);
    std::printf("%lld\n", static_cast<long long>(once()));
    std::fflush(stdout);
  }
}

}  // namespace peer
