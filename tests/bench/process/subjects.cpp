#include "subjects.hpp"

#include <lastcall/lastcall.hpp>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stop_token>
#include <string_view>
#include <thread>
#include <vector>

namespace bench {
namespace {

void say(std::string_view line) {
  // NOLINTNEXTLINE(bugprone-unused-return-value): who reads it notices
  [[maybe_unused]] const auto done = ::write(STDOUT_FILENO, line.data(), line.size());
}
void say(std::int64_t time) { say(std::to_string(time) + "\n"); }

// ---- the bare limit: a pipe that a handler writes to, and futex words ----

int self_pipe[2] = {-1, -1};

void write_to_pipe(int) {
  const char byte = 0;
  [[maybe_unused]] const auto done = ::write(self_pipe[1], &byte, 1);
}

void make_self_pipe() {
  if (::pipe2(self_pipe, O_CLOEXEC) != 0) std::perror("pipe2");
  struct sigaction action {};
  action.sa_handler = &write_to_pipe;
  action.sa_flags = SA_RESTART;
  ::sigaction(SIGTERM, &action, nullptr);
}

void read_from_pipe() {
  char byte = 0;
  while (::read(self_pipe[0], &byte, 1) < 0) {
  }
}

using Word = std::atomic<std::uint32_t>;

void futex_wait(Word& word, std::uint32_t expected) {
  ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}
void futex_wake_all(Word& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

[[noreturn]] int serve_bare(int waiters) {
  static Word over{0};
  make_self_pipe();
  for (int i = 0; i < waiters; ++i) {
    std::thread([] {
      while (over.load(std::memory_order_acquire) == 0) futex_wait(over, 0);
    }).detach();
  }
  say("ready\n");
  read_from_pipe();
  ::_exit(0);
}

// The same, but the waiters are told, as those of a token are; still nobody waits for them.
[[noreturn]] int serve_bare_woken(int waiters) {
  static std::mutex mutex;
  static std::condition_variable changed;
  static bool over = false;
  make_self_pipe();
  for (int i = 0; i < waiters; ++i) {
    std::thread([] {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [] { return over; });
    }).detach();
  }
  say("ready\n");
  read_from_pipe();
  {
    const std::lock_guard<std::mutex> lock(mutex);
    over = true;
  }
  changed.notify_all();
  ::_exit(0);
}

// The thread that receives the signal is the worker.
[[noreturn]] void await_pipe() {
  make_self_pipe();
  for (;;) {
    say("ready\n");
    read_from_pipe();
    say(now());
  }
}

// The thread that receives it wakes a worker.
[[noreturn]] void await_pipe_and_futex() {
  static Word turn{0};
  static Word seen{0};
  static std::int64_t woken_at = 0;
  make_self_pipe();
  std::thread([] {
    for (std::uint32_t last = 0;; ++last) {
      while (turn.load(std::memory_order_acquire) == last) futex_wait(turn, last);
      woken_at = now();
      seen.store(last + 1, std::memory_order_release);
      futex_wake_all(seen);
    }
  }).detach();
  for (std::uint32_t last = 0;; ++last) {
    say("ready\n");
    read_from_pipe();
    turn.store(last + 1, std::memory_order_release);
    futex_wake_all(turn);
    while (seen.load(std::memory_order_acquire) == last) futex_wait(seen, last);
    say(woken_at);
  }
}

// No signal at all but to start with: how long a futex takes from one thread to another.
[[noreturn]] void await_futex() {
  static Word turn{0};
  static Word seen{0};
  static std::int64_t took = 0;
  static std::int64_t begin = 0;
  make_self_pipe();
  std::thread([] {
    for (std::uint32_t last = 0;; ++last) {
      while (turn.load(std::memory_order_acquire) == last) futex_wait(turn, last);
      took = now() - begin;
      seen.store(last + 1, std::memory_order_release);
      futex_wake_all(seen);
    }
  }).detach();
  for (std::uint32_t last = 0;; ++last) {
    say("ready\n");
    read_from_pipe();
    begin = now();
    turn.store(last + 1, std::memory_order_release);
    futex_wake_all(turn);
    while (seen.load(std::memory_order_acquire) == last) futex_wait(seen, last);
    say(took);
  }
}

// ---- the standard library: sigwait(), a stop_source, threads that are joined ----

sigset_t only_sigterm() {
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, SIGTERM);
  return set;
}

void wait_for_stop(const std::stop_token& token) {
  std::mutex mutex;
  std::condition_variable_any changed;
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, token, [] { return false; });
}

int serve_std(int waiters) {
  const sigset_t set = only_sigterm();
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  std::stop_source source;
  {
    std::vector<std::jthread> threads;
    threads.reserve(static_cast<std::size_t>(waiters));
    for (int i = 0; i < waiters; ++i) {
      threads.emplace_back([token = source.get_token()] { wait_for_stop(token); });
    }
    say("ready\n");
    int number = 0;
    ::sigwait(&set, &number);
    source.request_stop();
  }
  return 0;
}

[[noreturn]] void await_std() {
  const sigset_t set = only_sigterm();
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  for (;;) {
    std::stop_source source;
    std::int64_t woken_at = 0;
    std::thread worker([&] {
      wait_for_stop(source.get_token());
      woken_at = now();
    });
    say("ready\n");
    int number = 0;
    ::sigwait(&set, &number);
    source.request_stop();
    worker.join();
    say(woken_at);
  }
}

// ---- lastcall ----

lastcall::ShutdownOptions silent() {
  lastcall::ShutdownOptions options;
  options.observer = nullptr;
  return options;
}

// Tasks: each is waited for.
int serve_lastcall(int waiters) {
  lastcall::ShutdownCoordinator coordinator(silent());
  for (int i = 0; i < waiters; ++i) {
    coordinator.spawn("waiter", [](const lastcall::CancellationToken& token) { token.wait(); });
  }
  say("ready\n");
  coordinator.run();
}

// Threads that are nobody's: they are woken, and not waited for.
int serve_lastcall_threads(int waiters) {
  lastcall::ShutdownCoordinator coordinator(silent());
  for (int i = 0; i < waiters; ++i) {
    std::thread([token = coordinator.token()] { token.wait(); }).detach();
  }
  say("ready\n");
  coordinator.run();
}

[[noreturn]] void await_trap() {
  lastcall::SignalTrap trap{SIGTERM};
  for (;;) {
    say("ready\n");
    trap.wait();
    say(now());
  }
}

[[noreturn]] void await_lastcall() {
  for (;;) {
    std::int64_t woken_at = 0;
    {
      lastcall::ShutdownCoordinator coordinator(silent());
      coordinator.spawn("worker", [&](const lastcall::CancellationToken& token) {
        token.wait();
        woken_at = now();
      });
      say("ready\n");
      coordinator.drain();
    }
    say(woken_at);
  }
}

}  // namespace

int serve(const std::string& subject, int waiters) {
  if (subject == "bare") serve_bare(waiters);
  if (subject == "bare_woken") serve_bare_woken(waiters);
  if (subject == "std") return serve_std(waiters);
  if (subject == "lastcall") return serve_lastcall(waiters);
  if (subject == "lastcall_threads") return serve_lastcall_threads(waiters);
  return 2;
}

int await(const std::string& subject) {
  if (subject == "pipe") await_pipe();
  if (subject == "futex") await_futex();
  if (subject == "pipe_and_futex") await_pipe_and_futex();
  if (subject == "std") await_std();
  if (subject == "trap") await_trap();
  if (subject == "lastcall") await_lastcall();
  return 2;
}

}  // namespace bench
