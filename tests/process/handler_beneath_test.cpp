// Handlers of the program's own beneath the coordinator's, which are called on, and which hang, while every thread
// of the program blocks their signals: the clock goes on, the next signal is taken, and nothing of it stays.
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/other_threads.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <lastcall/lastcall.hpp>

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <string>
#include <thread>

using lastcall::CancellationToken;
using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using lastcall::SignalInfo;
using support::contains;
using support::Ended;
using support::expect;
using support::expect_equal;
using support::in_a_process;
using support::quiet;
using support::slack;
using support::Stopwatch;
using namespace std::chrono_literals;

namespace {

std::atomic<int> handled{0};

void count(int) { ++handled; }
void count_and_hang(int) {
  ++handled;
  support::hang();
}

void set_handler(int number, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(number, &action, nullptr);
}

// In this thread, and in all that it starts.
void block_all() {
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

// Until the handler runs for the n-th time.
void send(int number, int nth) {
  ::kill(::getpid(), number);
  expect(support::eventually([nth] { return handled == nth; }, 5s), "the handler is called");
}

int threads_named(const std::string& wanted) {
  int count = 0;
  for (const auto& thread : support::other_threads()) count += thread.name == wanted ? 1 : 0;
  return count;
}

}  // namespace

TEST_CASE("a handler beneath that hangs, with the signal blocked elsewhere, delays nothing") {
  for (const bool held : {false, true}) {
    INFO(held);
    const Stopwatch watch;
    const Ended ended = in_a_process([held] {
      set_handler(SIGTERM, count_and_hang);
      block_all();
      ShutdownOptions options;  // the observer and the last words that one has without a choice
      options.grace_period = 800ms;
      ShutdownCoordinator coordinator(options);
      coordinator.spawn("held worker", [held](const CancellationToken& token) {
        token.wait();
        if (held) support::hang();
      });
      send(SIGTERM, 1);
      coordinator.run();
    });
    INFO(ended.err);
    CHECK(ended.how == (held ? "exit 124" : "exit 0"));
    CHECK(contains(ended.err, "still in:") == held);
    CHECK(watch.elapsed() < 800ms + slack);
  }
}

TEST_CASE("each wish of a user's is taken, though the handler beneath hangs every time") {
  const Ended ended = in_a_process([] {
    set_handler(SIGTERM, count_and_hang);
    set_handler(SIGINT, count_and_hang);
    block_all();
    ShutdownOptions options;
    options.grace_period = 60s;
    options.announce_delay = 30s;
    options.repeat_window = 0ms;
    options.abort_margin = 20s;
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("held worker", [] { support::hang(); });
    std::thread([&coordinator] {
      send(SIGTERM, 1);
      expect(support::eventually([&] { return coordinator.phase() == lastcall::Phase::announced; }),
             "the first: announced");
      send(SIGINT, 2);
      expect(support::eventually([&] { return coordinator.token().is_cancelled(); }),
             "the second: the delay is skipped");
      expect(!coordinator.abort_token().is_cancelled(), "and no more than that");
      send(SIGINT, 3);
      expect(support::eventually([&] { return coordinator.abort_token().is_cancelled(); }),
             "the third: aborted");
      ::kill(::getpid(), SIGINT);
    }).detach();
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 130");
  CHECK(contains(ended.err, "forced by a third wish"));
}

TEST_CASE("a handler beneath on_signal() that hangs holds neither it nor the shutdown up") {
  const Ended ended = in_a_process([] {
    set_handler(SIGHUP, count_and_hang);
    block_all();
    const std::string before = support::dispositions();
    const int threads = support::live_threads();
    const Stopwatch watch;
    {
      std::atomic<int> reloads{0};
      ShutdownCoordinator coordinator(quiet());
      coordinator.on_signal(SIGHUP, [&](const SignalInfo&) { ++reloads; });
      send(SIGHUP, 1);
      expect(support::eventually([&] { return reloads == 1; }), "reloaded");
      send(SIGHUP, 2);
      expect(support::eventually([&] { return reloads == 2; }), "reloaded again");
      ::kill(::getpid(), SIGTERM);
      expect(coordinator.drain().outcome == Outcome::clean, "drained");
    }
    expect(watch.elapsed() < slack, "in time");
    expect(support::dispositions() == before, "every disposition is back");
    if (!support::under_sanitizer) {
      expect(support::eventually([&] { return support::live_threads() == threads + 2; }, 5s),
             "only those that hang are left");
    }
    support::leave(5);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 5");
}

#if LASTCALL_LINUX

TEST_CASE("the threads for it are there only if there is a handler, and go with the coordinator") {
  if (support::under_sanitizer) return;  // they have threads of their own
  const Ended ended = in_a_process([] {
    const int before = support::live_threads();
    const std::string mask = support::signal_mask();
    set_handler(SIGTERM, count);
    {
      ShutdownOptions options = quiet();
      options.signals = {SIGINT};
      ShutdownCoordinator coordinator(options);
      coordinator.on_signal(SIGUSR1, [](const SignalInfo&) {});
      expect_equal(support::live_threads(), before + 3, "threads without a handler");
      coordinator.on_signal(SIGTERM, [](const SignalInfo&) {});
      expect_equal(support::live_threads(), before + 7, "threads with one");
      set_handler(SIGUSR2, count);
      coordinator.on_signal(SIGUSR2, [](const SignalInfo&) {});
      expect_equal(support::live_threads(), before + 7, "threads with two");
      expect(support::eventually([] { return threads_named("lastcall-take") == 4; }), "their name");
      expect(support::signal_mask() == mask, "the mask");
    }
    expect_equal(support::live_threads(), before, "threads afterwards");
    {
      const lastcall::SignalTrap trap{SIGTERM};
      const ShutdownCoordinator coordinator(quiet());
      expect_equal(support::live_threads(), before + 6, "threads above a trap with a handler");
    }
    set_handler(SIGTERM, SIG_DFL);
    const lastcall::SignalTrap trap{SIGTERM};
    const ShutdownCoordinator coordinator(quiet());
    expect_equal(support::live_threads(), before + 2, "threads above a trap without one");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

#endif
