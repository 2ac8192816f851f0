// detail/futex.hpp: sleeping on a word, by futex(2) or by the table that stands in for it.
#include <lastcall/detail/futex.hpp>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/seccomp.hpp"
#include "support/threads.hpp"

#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <thread>
#include <vector>

namespace detail = lastcall::detail;
using lastcall::Clock;
using namespace std::chrono_literals;

TEST_CASE("a word that has changed already is not slept on") {
  detail::Word word{1};
  CHECK(detail::futex_wait_until(word, 0, Clock::time_point::max()));
}

TEST_CASE("a deadline ends the sleep, and not before") {
  const detail::Word word{0};
  const Clock::time_point deadline = Clock::now() + 20ms;
  while (detail::futex_wait_until(word, 0, deadline)) {
  }
  CHECK(Clock::now() >= deadline);
}

TEST_CASE("a deadline that no system call can express is far away") {
  // Seconds that a 32-bit time_t can't hold.
  detail::Word word{0};
  std::atomic<bool> timed_out{false};
  std::thread sleeper([&] {
    const Clock::time_point deadline = Clock::now() + std::chrono::hours(24 * 365 * 100);
    while (word.load() == 0) {
      if (!detail::futex_wait_until(word, 0, deadline)) timed_out = true;
    }
  });
  std::this_thread::sleep_for(20ms);
  word.store(1);
  detail::futex_wake_all(&word);
  sleeper.join();
  CHECK(!timed_out);
}

TEST_CASE("a child finds what it sleeps on in order, whatever the other threads did at the fork") {
  // The others keep every lock busy that a fallback may have. Their words and the child's are many, so
  // that they share it.
  std::vector<detail::Word> words(256);
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (int at = 0; at < 2; ++at) {
    others.emplace_back([&] {
      while (!stop) {
        for (const detail::Word& word : words) {
          detail::futex_wait_until(word, 0, Clock::now());
          detail::futex_wake_all(&word);
        }
      }
    });
  }
  int stuck = 0;
  for (int turn = 0; turn < 100; ++turn) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (const detail::Word& word : words) {
        detail::futex_wait_until(word, 0, Clock::now());
        detail::futex_wake_all(&word);
      }
      ::_exit(0);
    }
    REQUIRE(child > 0);
    int status = 0;
    if (!support::eventually([&] { return ::waitpid(child, &status, WNOHANG) == child; }, 10s)) {
      ++stuck;
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
    }
    if (stuck > 0) break;
  }
  stop = true;
  for (std::thread& other : others) other.join();
  CHECK(stuck == 0);
}

#if defined(SYS_futex)
TEST_CASE("a wake that is refused is tried again, and not for ever") {
  const detail::Word word{0};
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(10);
    if (!support::refuse_call(SYS_futex, EPERM)) ::_exit(0);
    detail::futex_wake_all(&word);
    ::_exit(0);
  }
  REQUIRE(child > 0);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(support::in_words(status) == support::in_words(0));
}
#endif
