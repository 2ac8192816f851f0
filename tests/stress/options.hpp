// What every stress program is told on its command line, and how it ends.
//
//   <program> [--seconds N | --minutes N] [--seed S] [--threads T]
//
// T = 0, the default: from 2 to 16, at random. The seed is printed first; the same seed makes the same
// decisions, though not the same interleaving.
#pragma once

#include "support/threads.hpp"

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

namespace stress {

using Clock = std::chrono::steady_clock;

inline const char* program = "stress";
inline std::uint64_t run_seed = 0;
inline std::uint64_t epoch = 0;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "%s: FAILED: %s (seed %llu, epoch %llu)\n", program, what.c_str(),
               static_cast<unsigned long long>(run_seed), static_cast<unsigned long long>(epoch));
  std::fflush(stderr);
  std::abort();
}
inline void check(bool holds, const std::string& what) {
  if (!holds) fail(what);
}
inline void check(bool holds, const char* what) {
  if (!holds) fail(what);
}

struct Options {
  std::chrono::seconds length{2};
  int threads = 0;

  /// This epoch's number of threads.
  int some_threads(support::Random& random) const {
    return threads > 0 ? threads : 2 + static_cast<int>(random.below(15));
  }
};

/// Makes the first thread's stack longer. Valgrind (3.19) can't while it delivers a signal to a thread that
/// waits: it ends the program then.
[[gnu::noinline]] inline void touch_stack() {
  volatile char room[65536];
  for (std::size_t at = 0; at < sizeof room; at += 1024) room[at] = 1;
}

/// Says the seed, and sees to it that the program doesn't hang for ever.
inline Options begin(const char* name, int argc, char** argv) {
  program = name;
  Options options;
  run_seed = static_cast<std::uint64_t>(Clock::now().time_since_epoch().count());
  for (int at = 1; at + 1 < argc; at += 2) {
    const std::string_view option = argv[at];
    const char* const value = argv[at + 1];
    if (option == "--seconds") options.length = std::chrono::seconds(std::atol(value));
    if (option == "--minutes") options.length = std::chrono::minutes(std::atol(value));
    if (option == "--seed") run_seed = std::strtoull(value, nullptr, 0);
    if (option == "--threads") options.threads = std::atoi(value);
  }
  std::printf("%s --seconds %lld --seed %llu --threads %d\n", name,
              static_cast<long long>(options.length.count()),
              static_cast<unsigned long long>(run_seed), options.threads);
  std::fflush(stdout);
  touch_stack();
  std::signal(SIGALRM, [](int) {
    constexpr char words[] = "stuck: nothing has happened for minutes\n";
    static_cast<void>(::write(STDERR_FILENO, words, sizeof words - 1) < 0);
    std::abort();
  });
  return options;
}

/// Runs `one_epoch(random)` again and again until time is up. An epoch that takes four minutes hangs.
template <class Epoch>
void run(const Options& options, Epoch one_epoch) {
  const auto end = Clock::now() + options.length;
  do {
    ::alarm(240);
    support::Random random(run_seed * 1'000'003 + epoch * 1009);
    one_epoch(random);
    ++epoch;
  } while (Clock::now() < end);
  ::alarm(0);
}

}  // namespace stress
