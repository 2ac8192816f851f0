// What a process does with its signals, in words that can be compared.
#pragma once

#include <signal.h>

#include <csignal>
#include <cstdint>
#include <sstream>
#include <string>

namespace stress {

/// Handlers and flags of every number, and this thread's mask. (No handler's mask: ThreadSanitizer leaves
/// a full one behind.)
inline std::string state_of_process() {
  std::string words;
  for (int number = 1; number <= SIGRTMAX; ++number) {
    struct sigaction now {};
    if (::sigaction(number, nullptr, &now) != 0) continue;
    words += std::to_string(number) + ":" +
             std::to_string(reinterpret_cast<std::uintptr_t>(now.sa_handler)) + "/" +
             std::to_string(now.sa_flags & ~0x04000000) + " ";
  }
  sigset_t mask;
  ::pthread_sigmask(SIG_BLOCK, nullptr, &mask);
  for (int number = 1; number <= SIGRTMAX; ++number) {
    words += ::sigismember(&mask, number) == 1 ? '1' : '0';
  }
  return words;
}

/// The words of the two that differ; empty if none do.
inline std::string difference(const std::string& before, const std::string& after) {
  std::istringstream was(before);
  std::istringstream is(after);
  std::string one;
  std::string other;
  std::string words;
  while (was >> one && is >> other) {
    if (one != other) words += (words.empty() ? "" : ", ") + one + " became " + other;
  }
  return words;
}

}  // namespace stress
