// The coordinator and the process around it: dispositions, masks, inherited ones, SIGPIPE, fork and exec,
// descriptors and threads that have run out, and what it costs while nothing happens.
#include <lastcall/shutdown_coordinator.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using lastcall::SignalInfo;
using lastcall::Stage;
using support::Child;
using support::contains;
using support::Ended;
using support::expect;
using support::expect_equal;
using support::hang;
using support::in_a_grandchild;
using support::in_a_process;
using support::quiet;
using support::refusal;
using support::say;
using support::slack;
using support::starts_with;
using support::Stopwatch;

namespace {

using Handler = void (*)(int);

Handler handler_of(int number) {
  struct sigaction now {};
  ::sigaction(number, nullptr, &now);
  return now.sa_handler;
}
void set_handler(int number, Handler handler) {
  struct sigaction action {};
  action.sa_handler = handler;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(number, &action, nullptr);
}

void set_blocked(std::initializer_list<int> numbers) {
  sigset_t set;
  ::sigemptyset(&set);
  for (const int number : numbers) ::sigaddset(&set, number);
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

std::atomic<int> handled{0};
void count_handled(int) { ++handled; }

struct LibraryThread {
  std::string name;
  std::uint64_t blocked = 0;  // bit n - 1: signal n
  long wakeups = 0;
};

// Every thread of the process but this one, as the kernel sees it.
std::vector<LibraryThread> other_threads() {
  std::vector<LibraryThread> all;
#if defined(__linux__)
  DIR* const directory = ::opendir("/proc/self/task");
  if (directory == nullptr) return all;
  while (const dirent* const entry = ::readdir(directory)) {
    if (entry->d_name[0] == '.' || std::atoi(entry->d_name) == support::thread_id()) continue;
    char path[300];
    std::snprintf(path, sizeof path, "/proc/self/task/%s/status", entry->d_name);
    std::FILE* const file = std::fopen(path, "re");
    if (file == nullptr) continue;
    LibraryThread thread;
    char line[256];
    while (std::fgets(line, sizeof line, file) != nullptr) {
      char name[64];
      unsigned long long mask = 0;
      long switches = 0;
      if (std::sscanf(line, "Name: %63s", name) == 1) thread.name = name;
      if (std::sscanf(line, "SigBlk: %llx", &mask) == 1) thread.blocked = mask;
      if (std::sscanf(line, "voluntary_ctxt_switches: %ld", &switches) == 1)
        thread.wakeups = switches;
    }
    std::fclose(file);
    all.push_back(thread);
  }
  ::closedir(directory);
  std::sort(all.begin(), all.end(),
            [](const LibraryThread& a, const LibraryThread& b) { return a.name < b.name; });
#endif
  return all;
}

std::uint64_t bit(int number) { return std::uint64_t{1} << (number - 1); }

}  // namespace

// ---- inherited SIG_IGN ------------------------------------------------------------------------------------

TEST_CASE(
    "an inherited SIG_IGN on SIGINT, SIGHUP or SIGQUIT stays, also against on_signal and a dump "
    "signal") {
  const Ended ended = in_a_process([] {
    for (const int number : {SIGINT, SIGHUP, SIGQUIT}) set_handler(number, SIG_IGN);
    ShutdownOptions options = quiet();
    options.dump_signal = SIGQUIT;
    std::atomic<int> calls{0};
    ShutdownCoordinator coordinator(options);
    coordinator.on_signal(SIGHUP, [&](const SignalInfo&) { ++calls; });
    for (const int number : {SIGINT, SIGHUP, SIGQUIT}) {
      expect(handler_of(number) == SIG_IGN, lastcall::signal_name(number));
      ::kill(::getpid(), number);
    }
    std::this_thread::sleep_for(50ms);
    expect(coordinator.is_ready(), "nothing has happened");
    expect_equal(calls.load(), 0, "calls");
    ::kill(::getpid(), SIGTERM);
    const ShutdownReport report = coordinator.drain();
    expect(report.cause.signal() != nullptr && report.cause.signal()->number == SIGTERM, "SIGTERM");
    for (const int number : {SIGINT, SIGHUP, SIGQUIT}) {
      expect(handler_of(number) == SIG_IGN, "ignored still");
    }
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("an inherited SIG_IGN on any other signal is trapped") {
  const Ended ended = in_a_process([] {
    set_handler(SIGTERM, SIG_IGN);
    set_handler(SIGUSR1, SIG_IGN);
    std::atomic<int> calls{0};
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_signal(SIGUSR1, [&](const SignalInfo&) { ++calls; });
    ::kill(::getpid(), SIGUSR1);
    expect(support::eventually([&] { return calls == 1; }), "on_signal is called");
    ::kill(::getpid(), SIGTERM);
    coordinator.drain();
    expect(handler_of(SIGTERM) == SIG_IGN, "as it was");
    expect(handler_of(SIGUSR1) == SIG_IGN, "as it was");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("with respect_ignored = false an inherited SIG_IGN is trapped, and comes back") {
  const Ended ended = in_a_process([] {
    set_handler(SIGINT, SIG_IGN);
    set_handler(SIGHUP, SIG_IGN);
    ShutdownOptions options = quiet();
    options.respect_ignored = false;
    std::atomic<int> calls{0};
    ShutdownCoordinator coordinator(options);
    coordinator.on_signal(SIGHUP, [&](const SignalInfo&) { ++calls; });
    ::kill(::getpid(), SIGHUP);
    expect(support::eventually([&] { return calls == 1; }), "on_signal is called");
    ::kill(::getpid(), SIGINT);
    coordinator.drain();
    expect(handler_of(SIGINT) == SIG_IGN, "as it was");
    expect(handler_of(SIGHUP) == SIG_IGN, "as it was");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a previous handler that is a function is called, too, and comes back") {
  const Ended ended = in_a_process([] {
    set_handler(SIGTERM, count_handled);
    set_handler(SIGHUP, count_handled);
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
    ::raise(SIGHUP);
    ::raise(SIGTERM);
    coordinator.drain();
    expect_equal(handled.load(), 2, "calls");
    expect(handler_of(SIGTERM) == count_handled, "as it was");
    expect(handler_of(SIGHUP) == count_handled, "as it was");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// ---- SIGPIPE ----------------------------------------------------------------------------------------------

namespace {

// 0, or the errno of writing to a pipe that nobody will ever read.
int write_to_nobody() {
  int ends[2];
  if (::pipe(ends) != 0) return -1;
  ::close(ends[0]);
  const ssize_t written = ::write(ends[1], "x", 1);
  const int error = errno;
  ::close(ends[1]);
  return written < 0 ? error : 0;
}

}  // namespace

TEST_CASE("with ignore_sigpipe a write to a peer that has gone is EPIPE instead of the end") {
  const Ended ended = in_a_process([] {
    {
      ShutdownCoordinator coordinator(quiet());
      expect_equal(write_to_nobody(), EPIPE, "the errno in main");
      coordinator.spawn("task",
                        [] { expect_equal(write_to_nobody(), EPIPE, "the errno in a task"); });
      coordinator.on_stop("hook",
                          [] { expect_equal(write_to_nobody(), EPIPE, "the errno in a hook"); });
      expect(handler_of(SIGPIPE) != SIG_IGN, "not by SIG_IGN, which an exec() would pass on");
      coordinator.request_shutdown();
      coordinator.drain();
      expect(handler_of(SIGPIPE) == SIG_DFL, "as it was");
    }
    write_to_nobody();
  });
  INFO(ended.err);
  CHECK(ended.how == "SIGPIPE");
}

TEST_CASE("an executed child has the default SIGPIPE back, and every other default") {
  const Ended ended = in_a_process([] {
    // What such a child inherited, in its own words, twice.
    const char* const command = "grep -E 'SigIgn|SigBlk' /proc/self/status";
    expect_equal(std::system(command), 0, "the command");
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
    expect_equal(std::system(command), 0, "the command");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
  const std::size_t half = ended.out.size() / 2;
  CHECK(ended.out.substr(0, half) == ended.out.substr(half));
}

TEST_CASE("an existing handler of SIGPIPE, or an inherited SIG_IGN, is not touched") {
  for (const Handler handler : {Handler(count_handled), Handler(SIG_IGN)}) {
    const Ended ended = in_a_process([handler] {
      set_handler(SIGPIPE, handler);
      {
        ShutdownCoordinator coordinator(quiet());
        expect(handler_of(SIGPIPE) == handler, "untouched");
        expect_equal(write_to_nobody(), EPIPE, "the errno");
      }
      expect(handler_of(SIGPIPE) == handler, "untouched");
      expect_equal(handled.load(), handler == SIG_IGN ? 0 : 1, "calls");
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
  }
}

TEST_CASE("with ignore_sigpipe = false SIGPIPE is left alone") {
  const Ended ended = in_a_process([] {
    ShutdownOptions options = quiet();
    options.ignore_sigpipe = false;
    ShutdownCoordinator coordinator(options);
    expect(handler_of(SIGPIPE) == SIG_DFL, "the default");
    write_to_nobody();
  });
  CHECK(ended.how == "SIGPIPE");
}

TEST_CASE("a SIGPIPE handler that somebody has installed since is not touched on the way out") {
  const Ended ended = in_a_process([] {
    {
      ShutdownCoordinator coordinator(quiet());
      set_handler(SIGPIPE, count_handled);
    }
    expect(handler_of(SIGPIPE) == count_handled, "theirs");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("SIGPIPE may be a signal of the coordinator's like any other") {
  const Ended ended = in_a_process([] {
    std::atomic<int> calls{0};
    {
      ShutdownCoordinator coordinator(quiet());
      coordinator.on_signal(SIGPIPE, [&](const SignalInfo&) { ++calls; });
      expect_equal(write_to_nobody(), EPIPE, "the errno");
      expect(support::eventually([&] { return calls == 1; }), "the function is called");
    }
    expect(handler_of(SIGPIPE) == SIG_DFL, "as it was");
    ShutdownOptions options = quiet();
    options.signals = {SIGPIPE};
    ShutdownCoordinator coordinator(options);
    expect_equal(write_to_nobody(), EPIPE, "the errno");
    expect(coordinator.drain().cause.signal() != nullptr, "it asked for shutdown");
    expect(handler_of(SIGPIPE) == SIG_DFL, "as it was");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// ---- masks ------------------------------------------------------------------------------------------------

TEST_CASE(
    "it works when every other thread, or whoever started the process, has its signals blocked") {
  for (const int number : {SIGTERM, SIGINT}) {
    const Ended ended = in_a_process([number] {
      set_blocked({SIGTERM, SIGINT, SIGHUP});  // as if inherited
      std::atomic<int> calls{0};
      ShutdownCoordinator coordinator(quiet());
      const std::string mask = support::signal_mask();
      coordinator.on_signal(SIGHUP, [&](const SignalInfo&) { ++calls; });
      expect(support::signal_mask() == mask, "this thread's mask is its own affair");
      ::kill(::getpid(), SIGHUP);
      expect(support::eventually([&] { return calls == 1; }), "on_signal is called");
      ::kill(::getpid(), number);
      const ShutdownReport report = coordinator.drain();
      expect(report.cause.signal() != nullptr && report.cause.signal()->number == number,
             "the cause");
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
  }
}

TEST_CASE(
    "threads of spawn() keep the mask of their spawner, library threads block all but the "
    "trapped") {
  const Ended ended = in_a_process([] {
    set_blocked({SIGUSR2, SIGALRM});
    const std::string mine = support::signal_mask();
    ShutdownOptions options = quiet();
    options.dump_signal = SIGQUIT;
    options.observer = std::make_shared<support::Witness>();
    ShutdownCoordinator coordinator(options);
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
    std::string theirs;
    coordinator.spawn("task", [&] { theirs = support::signal_mask(); });
    support::eventually([&] { return coordinator.snapshot().empty(); });
    ::kill(::getpid(),
           SIGHUP);  // now every thread of the library is there, and through with starting
    std::vector<LibraryThread> threads;
    const std::uint64_t trapped = bit(SIGINT) | bit(SIGTERM) | bit(SIGQUIT) | bit(SIGHUP);
    // What nobody can block, and what the C library and sanitizers keep for themselves.
    std::uint64_t never = bit(SIGKILL) | bit(SIGSTOP) | bit(32) | bit(33);
    if (support::under_sanitizer) never |= bit(SIGSEGV) | bit(SIGBUS) | bit(SIGFPE) | bit(SIGILL);
    const auto is_as_promised = [&](const LibraryThread& thread) {
      return (~thread.blocked & ~never & ~trapped) == 0;
    };
    support::eventually([&] {
      threads = other_threads();
      return threads.size() >= 3 && std::all_of(threads.begin(), threads.end(), is_as_promised);
    });
    for (const LibraryThread& thread : threads) {
      if (!starts_with(thread.name, "lastcall")) continue;  // a sanitizer's
      expect(is_as_promised(thread), thread.name + " blocks all but the trapped ones");
      if (thread.name == "lastcall-signal") {
        expect((thread.blocked & trapped) == 0, "the signal thread has them unblocked");
      }
    }
    coordinator.request_shutdown();
    coordinator.drain();
    expect(theirs == mine, "a task has its spawner's mask");
    expect(support::signal_mask() == mine, "and so has main");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("no handler of the program's runs on a thread of the library") {
  const Ended ended = in_a_process([] {
    static std::atomic<int> on_library_threads{0};
    set_handler(SIGUSR1, [](int) {
      char name[16] = {};
#if defined(__linux__)
      ::prctl(PR_GET_NAME, name);
#endif
      ++handled;
      if (starts_with(name, "lastcall")) ++on_library_threads;
    });
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
    for (int sent = 0; sent < 100; ++sent) ::kill(::getpid(), SIGUSR1);
    set_blocked({SIGUSR1});  // now none of main's
    for (int sent = 0; sent < 100; ++sent) ::kill(::getpid(), SIGUSR1);
    std::this_thread::sleep_for(20ms);
    expect(handled > 0, "it runs");
    expect_equal(on_library_threads.load(), 0, "calls on the library's threads");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// ---- while nothing happens --------------------------------------------------------------------------------

#if defined(__linux__)
TEST_CASE("an idle coordinator has two threads, and they sleep") {
  if (support::under_sanitizer) return;  // they have threads of their own
  const Ended ended = in_a_process([] {
    const int before = support::live_threads();
    ShutdownCoordinator coordinator(quiet());
    expect_equal(support::live_threads(), before + 2, "threads");
    std::vector<LibraryThread> threads;
    expect(support::eventually([&] {
             threads = other_threads();
             return threads.size() == 2 && threads[0].name == "lastcall-drain" &&
                    threads[1].name == "lastcall-signal";
           }),
           "their names");
    std::this_thread::sleep_for(50ms);
    threads = other_threads();
    const auto cpu = support::cpu_time_of_process();
    std::this_thread::sleep_for(1500ms);
    const std::vector<LibraryThread> later = other_threads();
    for (std::size_t at = 0; at < threads.size() && at < later.size(); ++at) {
      expect_equal(later[at].wakeups, threads[at].wakeups, "wake-ups of " + later[at].name);
    }
    expect(support::cpu_time_of_process() - cpu < 20ms, "no time is spent");
    coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); });
    expect_equal(support::live_threads(), before + 3, "threads");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}
#endif

// ---- fork and exec ----------------------------------------------------------------------------------------

TEST_CASE(
    "in a forked child the parent's coordinator is nobody: its destructor neither hangs nor "
    "kills") {
  const Ended ended = in_a_process([] {
    auto coordinator = std::make_unique<ShutdownCoordinator>(quiet());
    coordinator->on_signal(SIGHUP, [](const SignalInfo&) {});
    coordinator->spawn("task", [](const CancellationToken& token) { token.wait(); });
    const std::string of_child = in_a_grandchild([&] {
      expect(starts_with(refusal([&] { coordinator->drain(); }), "logic_error: "),
             "drain() is refused");
      expect(starts_with(refusal([&] { coordinator->run(); }), "logic_error: "),
             "run() is refused");
      expect(handler_of(SIGTERM) == SIG_DFL, "the default");
      expect(handler_of(SIGHUP) == SIG_DFL, "the default");
      coordinator.reset();
      return 9;
    });
    expect(of_child == "exit 9", "exit 9, but " + of_child);
    const std::string signalled = in_a_grandchild([&] { ::raise(SIGTERM); });
    expect(signalled == "SIGTERM", "SIGTERM, but " + signalled);
    expect(coordinator->is_ready(), "the parent's goes on");
    ::kill(::getpid(), SIGTERM);
    const ShutdownReport report = coordinator->drain();
    expect(report.outcome == Outcome::clean, "and drains");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a forked child may have a coordinator of its own") {
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(quiet());
    const std::string of_child = in_a_grandchild([] {
      for (int round = 0; round < 2; ++round) {
        ShutdownCoordinator own(quiet());
        own.spawn("task", [](const CancellationToken& token) { token.wait(); });
        ::kill(::getpid(), SIGTERM);
        expect(own.drain().exit_code == 0, "it works");
        expect(starts_with(refusal([] { const ShutdownCoordinator second(quiet()); }),
                           "logic_error: "),
               "one at a time here, too");
      }
      ShutdownCoordinator last(quiet());
      ::kill(::getpid(), SIGTERM);
      last.run();
    });
    expect(of_child == "exit 0", "exit 0, but " + of_child);
    expect(coordinator.is_ready(), "the parent's goes on");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a child that is forked in the middle of a drain, and after it, is nobody as well") {
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(quiet());
    std::string of_hook;
    coordinator.on_stop("forks", [&] {
      of_hook = in_a_grandchild([] {
        ShutdownCoordinator own(quiet());
        ::kill(::getpid(), SIGTERM);
        own.drain();
        return 5;
      });
    });
    coordinator.request_shutdown();
    coordinator.drain();
    expect(of_hook == "exit 5", "exit 5, but " + of_hook);
    const std::string after = in_a_grandchild([] {
      ShutdownCoordinator own(quiet());
      return 6;
    });
    expect(after == "exit 6", "exit 6, but " + after);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("no descriptor of the coordinator's leaks into an executed program") {
  const Ended ended = in_a_process([] {
    const auto leaking = [] {
      std::string all;
      for (int fd = 3; fd < 1024; ++fd) {
        const int flags = ::fcntl(fd, F_GETFD);
        if (flags >= 0 && (flags & FD_CLOEXEC) == 0) all += std::to_string(fd) + " ";
      }
      return all;
    };
    const std::string inherited = leaking();
    const int open = support::open_descriptors();
    ShutdownCoordinator coordinator(quiet());
    coordinator.token().fd();
    expect(support::open_descriptors() > open, "it has descriptors");
    expect(leaking() == inherited, "but none that an exec() passes on: " + leaking());
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// ---- nothing left ------------------------------------------------------------------------------------------

TEST_CASE("no descriptors left: EMFILE with what was being done, and nothing has changed") {
  const Ended ended = in_a_process([] {
    { const ShutdownCoordinator warm_up(quiet()); }
    const std::string before = support::dispositions();
    const int threads = support::live_threads();
    const int open = support::open_descriptors();
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    int refusals = 0;
    for (rlim_t most = 0;; ++most) {
      rlimit less = limit;
      less.rlim_cur = most;
      ::setrlimit(RLIMIT_NOFILE, &less);
      const std::string words = refusal([] { const ShutdownCoordinator coordinator(quiet()); });
      ::setrlimit(RLIMIT_NOFILE, &limit);
      expect(support::dispositions() == before, "the dispositions");
      expect_equal(support::open_descriptors(), open, "descriptors");
      if (words == "nothing") break;
      ++refusals;
      if (!expect(starts_with(words, "system_error " + std::to_string(EMFILE) + ": lastcall: "),
                  words) ||
          most > 4096) {
        break;
      }
    }
    expect(refusals > 0, "it was refused");
    expect(support::eventually([&] { return support::live_threads() == threads; }), "threads");
    ShutdownCoordinator coordinator(quiet());
    ::raise(SIGTERM);
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

#if !defined(LASTCALL_ASAN)  // its leak check at the end wants descriptors
TEST_CASE("a drain needs no descriptor that isn't there yet") {
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(quiet());
    coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); });
    coordinator.on_drained("hook", [] { say("drained\n"); });
    rlimit none{};
    ::getrlimit(RLIMIT_NOFILE, &none);
    none.rlim_cur = 3;
    ::setrlimit(RLIMIT_NOFILE, &none);
    ::raise(SIGTERM);
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(ended.out == "drained\n");
}
#endif

#if defined(__linux__)

namespace {

// From now on the kernel gives this process no thread: clone(2) and clone3(2) fail with EAGAIN, the way
// they do when a limit is reached.
bool forbid_threads() {
  sock_filter program[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
#if defined(SYS_clone3)
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 2, 0),
#else
    BPF_STMT(BPF_ALU | BPF_ADD | BPF_K, 0),
#endif
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 1, 0),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EAGAIN),
  };
  sock_fprog filter{sizeof program / sizeof program[0], program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter) == 0;
}

}  // namespace

TEST_CASE("no threads left: EAGAIN with what was being done, and nothing has changed") {
  if (support::under_sanitizer) return;  // theirs end the process when there is no thread
  const Ended ended = in_a_process([] {
    { const ShutdownCoordinator warm_up(quiet()); }
    if (!forbid_threads()) return;
    const std::string before = support::dispositions();
    const std::string mask = support::signal_mask();
    const int open = support::open_descriptors();
    for (int round = 0; round < 3; ++round) {
      const std::string words = refusal([] { const ShutdownCoordinator coordinator(quiet()); });
      expect(starts_with(words, "system_error " + std::to_string(EAGAIN) + ": lastcall: "), words);
      expect(contains(words, "thread"), words);
      expect(support::dispositions() == before, "the dispositions");
      expect(support::signal_mask() == mask, "the mask");
      expect_equal(support::open_descriptors(), open, "descriptors");
    }
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("no threads left to put away what was destroyed from inside: nothing exits by force") {
  if (support::under_sanitizer) return;
  const Ended ended = in_a_process([] {
    std::optional<ShutdownCoordinator> coordinator;
    std::atomic<bool> destroyed{false};
    std::atomic<bool> released{false};
    coordinator.emplace(quiet(500ms));
    const std::string trapped = support::dispositions();
    coordinator->on_stop("destroys", [&] {
      if (!forbid_threads()) support::leave(6);
      coordinator.reset();
      destroyed = true;
    });
    coordinator->on_drained("release", [&] { released = true; });
    coordinator->request_shutdown();
    expect(support::eventually([&] { return destroyed && released; }), "the drain goes on");
    std::this_thread::sleep_for(800ms);  // past the end of the grace period
    expect(support::dispositions() == trapped, "the dispositions stay");
    const std::string words = refusal([] { const ShutdownCoordinator next(quiet()); });
    expect(starts_with(words, "logic_error: "), words);
    support::leave(6);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 6");
}

TEST_CASE("no threads left later: spawn() and on_signal() say so, and a drain goes on without") {
  if (support::under_sanitizer) return;
  const Ended ended = in_a_process([] {
    ShutdownOptions options = quiet(60s);
    const auto witness = std::make_shared<support::Witness>();
    options.observer = witness;
    options.stop_when_idle = true;
    support::Diary diary;
    ShutdownCoordinator coordinator(options);
    support::Gate gate;
    coordinator.spawn("task", [&](const CancellationToken& token) {
      gate.wait();
      token.wait();
    });
    if (!forbid_threads()) support::leave(0);
    const std::string hang_up = support::disposition_of(SIGHUP);
    const std::string words = refusal([&] { coordinator.spawn("no thread for it", [] {}); });
    expect(starts_with(words, "system_error " + std::to_string(EAGAIN) + ": lastcall: "), words);
    expect(contains(words, "no thread for it"), words);
    expect_equal(coordinator.snapshot().size(), std::size_t{1}, "members");
    const std::string of_function =
        refusal([&] { coordinator.on_signal(SIGHUP, [](const SignalInfo&) {}); });
    expect(starts_with(of_function, "system_error " + std::to_string(EAGAIN)), of_function);
    expect(support::disposition_of(SIGHUP) == hang_up, "SIGHUP is as it was");
    expect(coordinator.is_ready(), "nothing was asked for");
    coordinator.on_stop("hook", diary.entry("hook"));
    coordinator.on_drained("hook", diary.entry("drained"));
    gate.open();
    ::raise(SIGTERM);
    const ShutdownReport report = coordinator.drain();
    expect(report.outcome == Outcome::clean, "clean");
    expect(diary.text() == "hook\ndrained\n", diary.text());
    expect(support::story_of(witness->events()) == support::story_of(report.events),
           "the observer");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE(
    "no thread to take over from a hook that hangs: the clock ends the process, with last words") {
  if (support::under_sanitizer) return;
  const Stopwatch watch;
  const Ended ended = in_a_process([] {
    ShutdownOptions options = quiet(500ms);
    options.last_words = STDERR_FILENO;
    ShutdownCoordinator coordinator(options);
    coordinator.on_stop("hangs", [] { hang(); });
    if (!forbid_threads()) {
      support::write_all(STDERR_FILENO, "'hangs'");
      support::leave(124);
    }
    ::raise(SIGTERM);
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 124");
  CHECK(contains(ended.err, "'hangs'"));
  CHECK(watch.elapsed() < 500ms + slack);
}

TEST_CASE("no thread for the flush of run() after drain(): it is left out, and that is said") {
  if (support::under_sanitizer) return;
  const Stopwatch watch;
  const Ended ended = in_a_process([] {
    ShutdownOptions options = quiet(500ms);
    options.last_words = STDERR_FILENO;
    ShutdownCoordinator coordinator(options);
    coordinator.request_shutdown();
    coordinator.drain();
    support::lock_stdout_for_ever();
    if (!forbid_threads()) {
      support::write_all(STDERR_FILENO, "the streams are not flushed");
      support::leave(0);
    }
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.err, "the streams are not flushed"));
  CHECK(watch.elapsed() < 500ms + slack);
}

TEST_CASE(
    "no thread to take over from a hook that hangs: drain() returns all the same, with a report") {
  if (support::under_sanitizer) return;
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(quiet(500ms));
    coordinator.on_stop("runs", [] {});
    coordinator.on_stop("hangs", [] { hang(); });
    const auto guard = coordinator.stage("second", 50ms).enter("stays");
    if (!forbid_threads()) return;
    coordinator.request_shutdown();
    const Stopwatch watch;
    const ShutdownReport report = coordinator.drain();
    expect(watch.elapsed() < 500ms + slack, "in time");
    expect(report.outcome == Outcome::overrun, "an overrun");
    expect_equal(report.exit_code, 124, "the code");
    expect(report.cause.message() == "requested", "the cause");
    expect(support::find_straggler(report.stragglers, "hangs") != nullptr, "who hangs");
    expect(support::find_straggler(report.stragglers, "stays") != nullptr, "who stays");
    expect(support::find_event(report.events, "hook ok service/runs") != nullptr, "the story");
    expect(support::line_of(report.events.back()) == "phase begun finished", "its end");
    expect(coordinator.phase() == lastcall::Phase::finished, "the phase");
    expect(coordinator.drain().to_json() == report.to_json(), "the same again");
    std::this_thread::sleep_for(200ms);
    say("still here\n");
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 124");
  CHECK(ended.out == "still here\n");
}

#endif

// The k-th thread of the library is refused, and none else: by the executable's own pthread_create(), which
// goes before the C library's.
#if defined(__linux__) && !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)

namespace {
std::atomic<int> threads_until_refusal{-1};
std::function<void()> before_refusal = [] {};
}  // namespace

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*body)(void*), void* argument) noexcept {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto real = reinterpret_cast<Create>(::dlsym(RTLD_NEXT, "pthread_create"));
  if (threads_until_refusal >= 0 && threads_until_refusal.fetch_sub(1) == 0) {
    before_refusal();
    return EAGAIN;
  }
  return real(thread, attributes, body, argument);
}

TEST_CASE("whichever of its threads is refused to the constructor, nothing has changed") {
  const Ended ended = in_a_process([] {
    { const ShutdownCoordinator warm_up(quiet()); }
    const std::string before = support::dispositions();
    const int open = support::open_descriptors();
    const int threads = support::live_threads();
    int refusals = 0;
    for (int kth = 0; kth < 5; ++kth) {
      threads_until_refusal = kth;
      const std::string words = refusal([] { const ShutdownCoordinator coordinator(quiet()); });
      threads_until_refusal = -1;
      expect(support::dispositions() == before, "the dispositions");
      expect_equal(support::open_descriptors(), open, "descriptors");
      expect(support::eventually([&] { return support::live_threads() == threads; }), "threads");
      if (words == "nothing") continue;
      ++refusals;
      expect(starts_with(words, "system_error " + std::to_string(EAGAIN) + ": lastcall: "), words);
    }
    expect_equal(refusals, 2, "refusals");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("with stop_when_idle a spawn that found no thread doesn't keep the process waiting") {
  const Ended ended = in_a_process([] {
    // None was ever spawned: it does not ask either.
    ShutdownOptions options = quiet(60s);
    options.stop_when_idle = true;
    {
      ShutdownCoordinator coordinator(options);
      threads_until_refusal = 0;
      expect(starts_with(refusal([&] { coordinator.spawn("refused", [] {}); }), "system_error"),
             "refused");
      std::this_thread::sleep_for(20ms);
      expect(coordinator.is_ready(), "none spawned: never");
    }
    // The only one leaves while another is being refused: so it was the last one.
    ShutdownCoordinator coordinator(options);
    support::Gate gate;
    coordinator.spawn("only", [&] { gate.wait(); });
    before_refusal = [&] {
      gate.open();
      expect(support::eventually([&] { return coordinator.snapshot().size() == 1; }),
             "it has left");
      expect(coordinator.is_ready(), "another one is in");
    };
    threads_until_refusal = 0;
    expect(starts_with(refusal([&] { coordinator.spawn("refused", [] {}); }), "system_error"),
           "refused");
    threads_until_refusal = -1;
    expect(!coordinator.is_ready(), "it asks");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

#endif
