// Handlers of the program's own beneath the coordinator's, which are called on, and may hang: wherever they do, and
// whatever the program's threads block, the clock goes on and every wish is taken.
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <lastcall/lastcall.hpp>

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <string>
#include <thread>

using lastcall::CancellationToken;
using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
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

template <class Condition>
void expect_soon(Condition condition, const std::string& what) {
  expect(support::eventually(condition), what);
}

// TERM, then INT after INT, each as soon as the last has had its effect; the last one ends the process.
void four_wishes(ShutdownCoordinator& coordinator) {
  ::kill(::getpid(), SIGTERM);
  expect_soon([&] { return coordinator.phase() == lastcall::Phase::announced; }, "announced");
  ::kill(::getpid(), SIGINT);
  expect_soon([&] { return coordinator.token().is_cancelled(); }, "the delay is skipped");
  expect(!coordinator.abort_token().is_cancelled(), "and no more than that");
  ::kill(::getpid(), SIGINT);
  expect_soon([&] { return coordinator.abort_token().is_cancelled(); }, "aborted");
  ::kill(::getpid(), SIGINT);
}

ShutdownOptions options_for_wishes() {
  ShutdownOptions options;
  options.grace_period = 60s;
  options.announce_delay = 30s;
  options.repeat_window = 0ms;
  options.abort_margin = 20s;
  return options;
}

}  // namespace

TEST_CASE("a handler beneath that would hang, with its signal blocked everywhere, delays nothing") {
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
        expect_equal(handled.load(), 0, "calls by nobody's thread");
        if (held) support::hang();
      });
      ::kill(::getpid(), SIGTERM);
      coordinator.run();
    });
    INFO(ended.err);
    CHECK(ended.how == (held ? "exit 124" : "exit 0"));
    CHECK(contains(ended.err, "still in:") == held);
    CHECK_FALSE(contains(ended.err, "not so"));
    CHECK(watch.elapsed() < 900ms + slack);
  }
}

TEST_CASE("every wish is taken, though a handler beneath hangs in main or would hang") {
  for (const bool in_main : {false, true}) {
    INFO(in_main);
    const Ended ended = in_a_process([in_main] {
      set_handler(SIGTERM, count_and_hang);
      set_handler(SIGINT, count_and_hang);
      sigset_t mask;
      ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
      block_all();
      ShutdownCoordinator coordinator(options_for_wishes());
      coordinator.spawn("held worker", [] { support::hang(); });
      std::thread([&] { four_wishes(coordinator); }).detach();
      if (in_main) ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
      coordinator.run();
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 130");
    CHECK(contains(ended.err, "forced by a third wish"));
    CHECK_FALSE(contains(ended.err, "not so"));
  }
}

TEST_CASE("many reloads above a handler that hangs, and then the shutdown") {
  const Ended ended = in_a_process([] {
    set_handler(SIGHUP, count_and_hang);
    set_handler(SIGTERM, count);
    block_all();
    const std::string before = support::dispositions();
    const int threads = support::live_threads();
    const int descriptors = support::open_descriptors();
    {
      std::atomic<int> reloads{0};
      lastcall::SignalTrap beside{SIGHUP};
      ShutdownCoordinator coordinator(quiet());
      block_all();  // the trap has unblocked its own
      coordinator.on_signal(SIGHUP, [&](const SignalInfo& info) {
        expect(info.sender_pid == ::getpid(), "who sent it");
        ++reloads;
      });
      for (int nth = 1; nth <= 6; ++nth) {
        ::kill(::getpid(), SIGHUP);
        expect_soon([&] { return reloads == nth; }, "reload " + std::to_string(nth));
        expect(beside.try_wait().has_value(), "the other trap has it, too");
      }
      ::kill(::getpid(), SIGTERM);
      const Stopwatch watch;
      expect(coordinator.drain().outcome == Outcome::clean, "drained");
      expect(watch.elapsed() < slack, "in time");
    }
    expect_equal(handled.load(), 0, "calls");
    expect(support::dispositions() == before, "every disposition is back");
    expect_equal(support::open_descriptors(), descriptors, "descriptors");
    if (!support::under_sanitizer) expect_equal(support::live_threads(), threads, "threads");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a handler beneath is called for each signal, if a thread of the program's takes it") {
  if (support::under_tsan) return;  // keeps one of a number for each thread
  const Ended ended = in_a_process([] {
    const int queued = SIGRTMIN + 3;
    set_handler(queued, count);
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_signal(queued, [](const SignalInfo&) {});
    int sent = 0;
    const Stopwatch watch;
    while (watch.elapsed() < 500ms) {
      if (::sigqueue(::getpid(), queued, {}) == 0) ++sent;
    }
    expect_soon([&] { return handled == sent; }, "as many calls as signals");
    std::this_thread::sleep_for(200ms);
    expect_equal(handled.load(), sent, "calls");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a signal that nobody takes is taken, though others come and are taken all the time") {
  const Ended ended = in_a_process([] {
    set_handler(SIGTERM, count_and_hang);
    set_handler(SIGUSR1, count);
    sigset_t term;
    ::sigemptyset(&term);
    ::sigaddset(&term, SIGTERM);
    ::pthread_sigmask(SIG_BLOCK, &term, nullptr);
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_signal(SIGUSR1, [](const SignalInfo&) {});
    ::kill(::getpid(), SIGTERM);
    const Stopwatch watch;
    while (!coordinator.token().is_cancelled() && watch.elapsed() < 10s) {
      ::raise(SIGUSR1);
      std::this_thread::sleep_for(40ms);
    }
    expect(watch.elapsed() < 100ms + slack, "in time");
    coordinator.drain();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("each signal is left to the program for as long, whatever else has waited already") {
  if (support::under_tsan) return;
  const Ended ended = in_a_process([] {
    set_handler(SIGTERM, count_and_hang);
    set_handler(SIGUSR1, count);
    block_all();
    ShutdownOptions options = quiet();
    options.signals = {SIGINT};
    ShutdownCoordinator coordinator(options);
    std::atomic<int> terms{0};
    coordinator.on_signal(SIGTERM, [&](const SignalInfo&) { ++terms; });
    coordinator.on_signal(SIGUSR1, [](const SignalInfo&) {});
    ::kill(::getpid(), SIGTERM);
    std::this_thread::sleep_for(90ms);
    ::kill(::getpid(), SIGUSR1);  // 10 ms before the other's time is up
    expect_soon([&] { return terms == 1; }, "the first one is taken");
    sigset_t one;
    ::sigemptyset(&one);
    ::sigaddset(&one, SIGUSR1);
    const Stopwatch watch;
    ::pthread_sigmask(SIG_UNBLOCK, &one, nullptr);  // as ppoll() of an event loop does it
    expect(handled == 1 || watch.elapsed() > 50ms, "the program's handler has it");
    coordinator.request_shutdown();
    coordinator.drain();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("what it needs is open when the constructor or on_signal() returns, and nothing later") {
  const Ended ended = in_a_process([] {
    set_handler(SIGTERM, count);
    set_handler(SIGHUP, count);
    for (const bool by_constructor : {true, false}) {
      ShutdownOptions options = quiet();
      if (!by_constructor) options.signals = {SIGINT};
      ShutdownCoordinator coordinator(options);
      if (!by_constructor) coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
      const int open = support::open_descriptors();
      std::this_thread::sleep_for(50ms);
      expect_equal(support::open_descriptors(), open, "descriptors");
      if (!by_constructor) continue;
      // Whoever has got its number since keeps his, and no processor is spent on it.
      const int free = ::dup(STDIN_FILENO);
      ::close(free);
#if LASTCALL_LINUX
      if (!support::under_sanitizer) {
        const int file = ::open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
        ::dup2(file, free - 1);
        ::close(file);
        ::kill(::getpid(), SIGTERM);
        std::this_thread::sleep_for(100ms);
        const auto cpu = support::cpu_time_of_process();
        coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
        std::this_thread::sleep_for(500ms);
        expect(support::cpu_time_of_process() - cpu < 250ms, "no time is spent");
        expect(::fcntl(free - 1, F_GETFD) >= 0, "it is still open");
      }
#endif
    }
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("queued signals that nobody takes come all, above a handler beneath as well") {
  if (support::under_tsan) return;  // keeps one of a number for each thread
  const Ended ended = in_a_process([] {
    const int queued = SIGRTMIN + 3;
    set_handler(queued, count_and_hang);
    block_all();
    ShutdownCoordinator coordinator(quiet());
    lastcall::SignalTrap trap{queued};
    block_all();
    coordinator.on_signal(queued, [](const SignalInfo&) {});
    for (int nth = 0; nth < 1900; ++nth) ::sigqueue(::getpid(), queued, {});
    const Stopwatch watch;
    int caught = 0;
    while (caught < 1900 && trap.wait_for(5s)) ++caught;
    expect_equal(caught, 1900, "signals");
    expect(watch.elapsed() < 500ms + slack, "in one go");
    coordinator.request_shutdown();
    coordinator.drain();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

#if LASTCALL_LINUX

TEST_CASE("without a descriptor for it, or after its end, what nobody takes is looked up") {
  for (const bool closed : {false, true}) {
    if (closed && support::under_tsan) return;  // it takes the closing for the library's mistake
    INFO(closed);
    const Ended ended = in_a_process([closed] {
      set_handler(SIGHUP, count_and_hang);
      block_all();
      ShutdownCoordinator coordinator(quiet());
      std::atomic<int> reloads{0};
      const int before = support::open_descriptors();
      if (!closed) {
        rlimit none{};
        ::getrlimit(RLIMIT_NOFILE, &none);
        none.rlim_cur = 0;
        ::setrlimit(RLIMIT_NOFILE, &none);
      }
      coordinator.on_signal(SIGHUP, [&](const SignalInfo&) { ++reloads; });
      if (closed) {
        expect_soon([&] { return support::open_descriptors() == before + 1; }, "one is there");
        const int last = ::dup(STDIN_FILENO);
        ::close(last);
        ::close(last - 1);
      }
      for (int nth = 1; nth <= 2; ++nth) {
        ::kill(::getpid(), SIGHUP);
        expect_soon([&] { return reloads == nth; }, "reload " + std::to_string(nth));
      }
      coordinator.request_shutdown();
      coordinator.drain();
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
  }
}

// The executable's own signalfd(), which goes before the C library's: it may refuse an addition.
namespace {
std::atomic<bool> refuses_additions{false};
}  // namespace

extern "C" int signalfd(int fd, const sigset_t* mask, int flags) noexcept {
  using Make = int (*)(int, const sigset_t*, int);
  static const auto real = reinterpret_cast<Make>(::dlsym(RTLD_NEXT, "signalfd"));
  if (fd >= 0 && refuses_additions) {
    errno = ENOMEM;
    return -1;
  }
  return real(fd, mask, flags);
}

TEST_CASE(
    "a descriptor that can't tell of one more number is closed, and what nobody takes is looked "
    "up") {
  const Ended ended = in_a_process([] {
    set_handler(SIGHUP, count_and_hang);
    set_handler(SIGUSR1, count_and_hang);
    block_all();
    ShutdownCoordinator coordinator(quiet());
    std::atomic<int> calls{0};
    const int before = support::open_descriptors();
    coordinator.on_signal(SIGHUP, [&](const SignalInfo&) { ++calls; });
    ::kill(::getpid(), SIGHUP);
    expect_soon([&] { return calls == 1; }, "the first number");
    expect_equal(support::open_descriptors(), before + 1, "descriptors");
    refuses_additions = true;
    coordinator.on_signal(SIGUSR1, [&](const SignalInfo&) { ++calls; });
    for (const int number : {SIGUSR1, SIGHUP, SIGUSR1}) {
      const int so_far = calls;
      ::kill(::getpid(), number);
      expect_soon([&] { return calls == so_far + 1; }, std::string(lastcall::signal_name(number)));
    }
    expect_equal(support::open_descriptors(), before, "descriptors after the refusal");
    coordinator.request_shutdown();
    coordinator.drain();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

#endif
