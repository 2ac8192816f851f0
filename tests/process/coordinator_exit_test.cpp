// How the process ends: exit codes, the signal itself, what is flushed and what isn't, wherever main is;
// and what drain() hands over.
#include <lastcall/shutdown_coordinator.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using support::Child;
using support::contains;
using support::Ended;
using support::expect;
using support::expect_equal;
using support::hang;
using support::in_a_process;
using support::quiet;
using support::say;
using support::slack;
using support::Stopwatch;

namespace {

ShutdownOptions telling(std::chrono::milliseconds grace) {
  ShutdownOptions options = quiet(grace);
  options.observer = std::make_shared<support::Teller>();
  return options;
}

// What run() does with a coordinator that `body` has been at.
template <class Body>
Ended after_run(const ShutdownOptions& options, Body body) {
  return in_a_process([&] {
    ShutdownCoordinator coordinator(options);
    body(coordinator);
    coordinator.run();
  });
}

}  // namespace

TEST_CASE("main that comes when everything is done is not kept waiting") {
  for (const std::string how : {"run", "drain", "destructor"}) {
    INFO(how);
    const Stopwatch watch;
    const Ended ended = in_a_process([&how] {
      {
        ShutdownCoordinator coordinator(quiet(60s));
        std::atomic<bool> drained{false};
        coordinator.on_drained("last", [&drained] { drained = true; });
        coordinator.request_shutdown();
        support::eventually([&] { return drained.load(); });
        std::this_thread::sleep_for(100ms);  // the drain thread has gone to sleep again
        if (how == "run") coordinator.run();
        if (how == "drain") coordinator.drain();
      }
      support::leave(0);
    });
    CHECK(ended.how == "exit 0");
    CHECK(watch.elapsed() < 200ms + slack);
  }
}

TEST_CASE("run() exits with the code of the outcome") {
  const auto request = [](ShutdownCoordinator& coordinator) { coordinator.request_shutdown(); };
  const auto throwing_task = [](ShutdownCoordinator& coordinator) {
    coordinator.spawn("throws", [] { throw std::runtime_error("no"); });
  };
  const auto throwing_hook = [](ShutdownCoordinator& coordinator) {
    coordinator.on_drained("throws", [] { throw std::runtime_error("no"); });
    coordinator.request_shutdown();
  };
  const auto failure = [](ShutdownCoordinator& coordinator) {
    coordinator.request_shutdown(Cause::failure(std::make_exception_ptr(1)));
  };
  const auto straggler = [](ShutdownCoordinator& coordinator) {
    coordinator.spawn("stays", [] { hang(); });
    coordinator.spawn("throws", [] { throw std::runtime_error("no"); });
  };
  CHECK(after_run(quiet(), request).how == "exit 0");
  CHECK(after_run(quiet(), throwing_task).how == "exit 1");
  CHECK(after_run(quiet(), throwing_hook).how == "exit 1");
  CHECK(after_run(quiet(), failure).how == "exit 1");
  CHECK(after_run(quiet(300ms), straggler).how == "exit 124");

  ShutdownOptions other = quiet();
  other.exit_codes = {11, 12, 13};
  CHECK(after_run(other, request).how == "exit 11");
  CHECK(after_run(other, throwing_task).how == "exit 12");
  other.grace_period = 300ms;
  CHECK(after_run(other, straggler).how == "exit 13");
}

TEST_CASE("the process is gone within the grace period, whoever stays") {
  const auto grace = support::enough(700ms);
  ShutdownOptions options = telling(grace);
  Child child = Child::run([&] {
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("stays", [] { hang(); });
    say("ready\n");
    coordinator.run();
  });
  REQUIRE(child.prints("ready\n"));
  const Stopwatch watch;
  child.send(SIGTERM);
  const Ended ended = child.end();
  CHECK(ended.how == "exit 124");
  CHECK(watch.elapsed() < grace + slack);
  CHECK(watch.elapsed() > grace - 200ms);
  CHECK(contains(ended.out, "task overran service/stays\n"));
}

TEST_CASE("with stop_when_idle a batch job ends by itself") {
  ShutdownOptions options = quiet();
  options.stop_when_idle = true;
  const Ended ended = after_run(options, [](ShutdownCoordinator& coordinator) {
    coordinator.spawn("job", [] { say("done\n"); });
  });
  CHECK(ended.how == "exit 0");
  CHECK(ended.out == "done\n");
}

TEST_CASE(
    "with exit_by_signal the process dies of the signal that was the cause, whatever the outcome") {
  ShutdownOptions options = quiet();
  options.exit_by_signal = true;
  options.signals = {SIGINT, SIGTERM, SIGHUP};
  const auto raise = [](int number) { return [number](ShutdownCoordinator&) { ::raise(number); }; };
  CHECK(after_run(options, raise(SIGTERM)).how == "SIGTERM");
  CHECK(after_run(options, raise(SIGINT)).how == "SIGINT");
  CHECK(after_run(options, raise(SIGHUP)).how == "SIGHUP");
  CHECK(after_run(options, [](ShutdownCoordinator& coordinator) {
          coordinator.on_stop("throws", [] { throw 1; });
          ::raise(SIGTERM);
        }).how == "SIGTERM");
  CHECK(after_run(options, [](ShutdownCoordinator& coordinator) {
          coordinator.request_shutdown();
        }).how == "exit 0");
  // A signal that comes after the request was not the cause.
  CHECK(after_run(options, [](ShutdownCoordinator& coordinator) {
          coordinator.request_shutdown();
          ::raise(SIGTERM);
        }).how == "exit 0");
  CHECK(in_a_process([&] {
          ShutdownCoordinator coordinator(options);
          ::raise(SIGTERM);
          coordinator.drain();
          coordinator.run();
        }).how == "SIGTERM");
  options.grace_period = 300ms;
  CHECK(after_run(options, [](ShutdownCoordinator& coordinator) {
          coordinator.spawn("stays", [] { hang(); });
          ::raise(SIGTERM);
        }).how == "SIGTERM");
  // Also when it is the signal thread that ends it.
  CHECK(after_run(options, [](ShutdownCoordinator&) {
          ::flockfile(stdout);
          std::thread([] {
            ::flockfile(stdout);
            hang();
          }).detach();
          ::raise(SIGTERM);
        }).how == "SIGTERM");
}

TEST_CASE("with exit_by_signal a signal that would only stop the process ends it with 128 + n") {
  for (const int number : {SIGTSTP, SIGTTIN, SIGTTOU}) {
    INFO(lastcall::signal_name(number));
    ShutdownOptions options = quiet(5s);
    options.exit_by_signal = true;
    options.signals = {number};
    Child child = Child::run([&] {
      // Not in an orphaned group, where these do nothing.
      ::setpgid(0, 0);
      ShutdownCoordinator coordinator(options);
      ::raise(number);
      coordinator.run();
    });
    CHECK(child.end(10s).how == "exit " + std::to_string(128 + number));
  }
}

TEST_CASE("with exit_by_signal a third wish, too, dies of the signal that was the cause") {
  ShutdownOptions options = quiet(120s);
  options.exit_by_signal = true;
  options.repeat_window = 1ms;
  options.abort_margin = 50s;
  Child child = Child::run([&] {
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("stays", [&](const CancellationToken& token) {
      token.wait();
      say("cancelled\n");
      coordinator.abort_token().wait();
      say("aborted\n");
      hang();
    });
    say("ready\n");
    coordinator.run();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  REQUIRE(child.prints("cancelled\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("aborted\n"));
  std::this_thread::sleep_for(10ms);
  child.send(SIGINT);
  CHECK(child.end().how == "SIGTERM");
}

#if defined(__linux__)
TEST_CASE("as process 1, which no signal of its own can kill, it exits with 128 + n instead") {
  // The end by the drain thread, by the signal thread after a flush that hangs, and by a third wish.
  for (const char* const end : {"clean", "overrun", "hung flush", "third wish"}) {
    INFO(end);
    const Ended ended = in_a_process([end] {
      if (::unshare(CLONE_NEWPID) != 0) return;  // not permitted here
      const std::string how = support::in_a_grandchild([end] {
        expect_equal(::getpid(), 1, "the process id");
        ShutdownOptions options = quiet(400ms);
        options.exit_by_signal = true;
        options.repeat_window = 0ms;
        ShutdownCoordinator coordinator(options);
        const std::string_view what = end;
        if (what != "clean") coordinator.spawn("stays", [] { hang(); });
        if (what == "hung flush") {
          std::thread([] {
            ::flockfile(stdout);
            hang();
          }).detach();
        }
        ::raise(SIGTERM);
        if (what == "third wish") {
          coordinator.token().wait();
          ::raise(SIGINT);
          coordinator.abort_token().wait();
          ::raise(SIGINT);
        }
        coordinator.run();
      });
      expect(how == "exit 143", "exit 143, but " + how);
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
  }
}
#endif

TEST_CASE("before the exit stdio and the standard streams are flushed") {
  for (const bool overruns : {false, true}) {
    const Ended ended = after_run(quiet(overruns ? support::enough(300ms) : 20s),
                                  [&](ShutdownCoordinator& coordinator) {
                                    std::ios::sync_with_stdio(false);
                                    std::FILE* const file = ::fdopen(::dup(STDOUT_FILENO), "w");
                                    std::fprintf(file, "a file, ");
                                    std::cout << "cout, ";
                                    std::clog << "clog, ";
                                    std::cerr << std::nounitbuf << "cerr, ";
                                    std::printf("stdio, ");
                                    if (overruns) coordinator.spawn("stays", [] { hang(); });
                                    coordinator.request_shutdown();
                                  });
    CHECK(ended.how == (overruns ? "exit 124" : "exit 0"));
    for (const char* const stream : {"a file, ", "cout, ", "stdio, "}) {
      INFO(stream);
      CHECK(contains(ended.out, stream));
    }
    for (const char* const stream : {"clog, ", "cerr, "}) {
      INFO(stream);
      CHECK(contains(ended.err, stream));
    }
  }
}

#if defined(__GLIBC__)

TEST_CASE("a thread that is blocked reading stdin does not hold the exit up") {
  for (const bool drains : {false, true}) {
    INFO(drains);
    const Stopwatch watch;
    const Ended ended = in_a_process([&] {
      ShutdownCoordinator coordinator(quiet(60s));
      std::FILE* const file = ::fdopen(::dup(STDOUT_FILENO), "w");
      std::fprintf(file, "a file, ");
      std::printf("stdio");
      std::thread([] { static_cast<void>(std::fgetc(stdin)); }).detach();
      expect(support::eventually([] {
               if (::ftrylockfile(stdin) != 0) return true;
               ::funlockfile(stdin);
               return false;
             }),
             "it is being read");
      coordinator.request_shutdown();
      if (drains) coordinator.drain();
      coordinator.run();
    });
    CHECK(ended.how == "exit 0");
    CHECK(contains(ended.out, "a file, "));
    CHECK(contains(ended.out, "stdio"));
    CHECK(watch.elapsed() < 30s);
  }
}

#endif

namespace {

// Somebody has the lock of stdout for ever when the shutdown is asked for.
void ask_with_stdout_locked(ShutdownCoordinator& coordinator) {
  support::lock_stdout_for_ever();
  coordinator.request_shutdown();
}

}  // namespace

TEST_CASE("a flush that hangs is bounded by the end of the grace period, and the code stays") {
  const Stopwatch watch;
  const Ended ended = after_run(quiet(500ms), &ask_with_stdout_locked);
  CHECK(ended.how == "exit 0");
  CHECK(watch.elapsed() < 500ms + slack);
}

TEST_CASE("who waits in run() for a flush that hangs leaves the processor to others") {
  const auto cpu_time_of_children = [] {
    rusage used{};
    ::getrusage(RUSAGE_CHILDREN, &used);
    return std::chrono::seconds(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           std::chrono::microseconds(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
  };
  const auto before = cpu_time_of_children();
  const Ended ended = after_run(quiet(1500ms), &ask_with_stdout_locked);
  CHECK(ended.how == "exit 0");
  CHECK(cpu_time_of_children() - before < 500ms);
}

TEST_CASE("run() leaves by std::_Exit: no exit function and no static destructor runs") {
  const Ended ended = after_run(quiet(), [](ShutdownCoordinator& coordinator) {
    struct Static {
      ~Static() { say("static destructor\n"); }
    };
    static const Static at_the_end;
    std::atexit([] { say("exit function\n"); });
    coordinator.request_shutdown();
  });
  CHECK(ended.how == "exit 0");
  CHECK(ended.out.empty());
}

// ---- wherever main is -----------------------------------------------------------------------------------

#if !defined( \
    LASTCALL_TSAN)  // which keeps a signal that finds a thread in read(2) until that returns

TEST_CASE("all starts the moment that it is requested, though main has not come to run() yet") {
  Child child = Child::run([] {
    ShutdownCoordinator coordinator(telling(60s));
    coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); });
    coordinator.on_drained("release", [] { say("released\n"); });
    say("ready\n");
    char letter = 0;
    while (::read(STDIN_FILENO, &letter, 1) < 0) {
    }
    say("main comes\n");
    coordinator.run();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  REQUIRE(child.prints("stage ok service\n"));
  CHECK(contains(child.out(), "released\n"));
  // All are out; it waits for main.
  std::this_thread::sleep_for(50ms);
  child.tell("x");
  const Ended ended = child.end();
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.out, "main comes\nphase begun finished\n"));
}

#endif

TEST_CASE("a signal that comes before main is anywhere near is not lost") {
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(quiet());
    ::raise(SIGTERM);
    std::this_thread::sleep_for(20ms);
    bool cancelled = false;
    coordinator.spawn("late",
                      [&](const CancellationToken& token) { cancelled = token.is_cancelled(); });
    coordinator.run();
  });
  CHECK(ended.how == "exit 0");
}

#if !defined( \
    LASTCALL_TSAN)  // which keeps a signal that finds a thread in read(2) until that returns

TEST_CASE("main blocked in somebody's loop that an on_stop hook ends") {
  Child child = Child::run([] {
    ShutdownCoordinator coordinator(quiet(60s));
    int ends[2];
    expect(::pipe(ends) == 0, "a pipe");
    coordinator.on_stop("server.stop()", [&] { ::close(ends[1]); });
    say("ready\n");
    char letter = 0;
    while (::read(ends[0], &letter, 1) < 0) {  // server.listen()
    }
    say("listen() returned\n");
    coordinator.run();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  const Ended ended = child.end();
  CHECK(ended.how == "exit 0");
  CHECK(ended.out == "ready\nlisten() returned\n");
}

#endif

TEST_CASE("main that never comes is waited for until the end, and then it is the straggler") {
  const auto grace = support::enough(600ms);
  Child child = Child::run([grace] {
    ShutdownCoordinator coordinator(telling(grace));
    say("ready\n");
    hang();
  });
  REQUIRE(child.prints("ready\n"));
  const Stopwatch watch;
  child.send(SIGTERM);
  const Ended ended = child.end();
  CHECK(ended.how == "exit 124");
  CHECK(watch.elapsed() > grace - 150ms);
  CHECK(watch.elapsed() < grace + slack);
  CHECK(contains(ended.out, "stage ok service\n"));
  CHECK(contains(ended.out, "task overran main\n"));
}

TEST_CASE("a coordinator that only a thread waits for ends the process as well") {
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(quiet());
    std::thread([&] { coordinator.run(); }).detach();
    ::raise(SIGTERM);
    hang();
  });
  CHECK(ended.how == "exit 0");
}

// ---- drain() hands over ---------------------------------------------------------------------------------

TEST_CASE("from drain()'s return on nothing exits by force, also after an overrun") {
  const Ended ended = in_a_process([] {
    const auto grace = support::enough(300ms);
    ShutdownOptions options = quiet(grace);
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("stays", [] { hang(); });
    coordinator.on_stop("hangs", [] { hang(); });
    coordinator.request_shutdown();
    const Stopwatch watch;
    const ShutdownReport report = coordinator.drain();
    expect(watch.elapsed() < grace + slack, "in time");
    expect(report.outcome == Outcome::overrun, "an overrun");
    expect_equal(report.exit_code, 124, "the code");
    std::this_thread::sleep_for(500ms);  // past every end
    say("still here\n");
    return 7;
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 7");
  CHECK(ended.out == "still here\n");
}

TEST_CASE("from drain()'s return on signals do what they did before") {
  CHECK(in_a_process([] {
          ShutdownCoordinator coordinator(quiet());
          coordinator.request_shutdown();
          coordinator.drain();
          ::raise(SIGTERM);
        }).how == "SIGTERM");
  CHECK(in_a_process([] {
          ShutdownCoordinator coordinator(quiet());
          coordinator.on_signal(SIGHUP, [](const lastcall::SignalInfo&) {});
          coordinator.request_shutdown();
          coordinator.drain();
          ::raise(SIGHUP);
        }).how == "SIGHUP");
}

TEST_CASE("nothing is raised again after drain(): it has read all of its signals") {
  const Ended ended = in_a_process([] {
    for (int round = 0; round < 20; ++round) {
      ShutdownCoordinator coordinator(quiet());
      std::thread sender([] {
        for (int sent = 0; sent < 20; ++sent) ::kill(::getpid(), SIGTERM);
      });
      sender.join();
      coordinator.drain();
    }
    return 3;
  });
  CHECK(ended.how == "exit 3");
}

TEST_CASE("a third wish during drain() ends the process, as it does during run()") {
  ShutdownOptions options = quiet(120s);
  options.repeat_window = 1ms;
  options.abort_margin = 50s;
  Child child = Child::run([&] {
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("stays", [&](const CancellationToken& token) {
      token.wait();
      say("cancelled\n");
      coordinator.abort_token().wait();
      say("aborted\n");
      hang();
    });
    say("ready\n");
    coordinator.drain();
    return 5;
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  REQUIRE(child.prints("cancelled\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("aborted\n"));
  std::this_thread::sleep_for(10ms);
  child.send(SIGINT);
  CHECK(child.end().how == "exit 130");
}

TEST_CASE("run() after drain() exits at once with the report's code, and flushes") {
  const Stopwatch watch;
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(quiet(400ms));
    coordinator.spawn("stays", [] { hang(); });
    coordinator.request_shutdown();
    expect(coordinator.drain().outcome == Outcome::overrun, "an overrun");
    std::printf("flushed");
    coordinator.run();
  });
  CHECK(ended.how == "exit 124");
  CHECK(ended.out == "flushed");
  CHECK(watch.elapsed() < 400ms + slack);
}

TEST_CASE("run() after drain() is bounded, too, when the flush hangs, which it names") {
  // By one caller or by several at once: it is said once.
  const auto grace = support::enough(400ms);
  for (const int more : {0, 30}) {
    const Stopwatch watch;
    const Ended ended = in_a_process([more, grace] {
      ShutdownOptions options = quiet(grace);
      options.last_words = STDERR_FILENO;
      ShutdownCoordinator coordinator(options);
      coordinator.request_shutdown();
      coordinator.drain();
      support::lock_stdout_for_ever();
#if LASTCALL_LINUX && defined(__LP64__)
      ::prctl(PR_SET_TIMERSLACK, 5'000'000'000UL, 0, 0, 0);  // main's own, to save power
#endif
      for (int caller = 0; caller < more; ++caller) {
        std::thread([&coordinator] { coordinator.run(); }).detach();
      }
      coordinator.run();
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
    CHECK(watch.elapsed() < grace + slack);
    CHECK(support::starts_with(ended.err, "lastcall: out of time after "));
    CHECK(contains(ended.err, " ms; still in:\nlastcall:   'flushing the streams', "));
    CHECK(support::count_of(ended.err, "out of time") == 1);
#if LASTCALL_LINUX
    CHECK(contains(ended.err, ", in futex"));
#endif
  }
}

TEST_CASE("run() after drain() says nothing of a flush that comes through") {
  const Ended ended = in_a_process([] {
    ShutdownOptions options = quiet();
    options.last_words = STDERR_FILENO;
    ShutdownCoordinator coordinator(options);
    coordinator.request_shutdown();
    coordinator.drain();
    coordinator.run();
  });
  CHECK(ended.how == "exit 0");
  CHECK(ended.err.empty());
}

TEST_CASE("run() and drain() at once: the process ends with the outcome's code") {
  for (int round = 0; round < 10; ++round) {
    const Ended ended = in_a_process([] {
      ShutdownCoordinator coordinator(quiet());
      for (int number = 0; number < 2; ++number) {
        std::thread([&] {
          coordinator.drain();
          hang();
        }).detach();
      }
      std::thread([&] { coordinator.run(); }).detach();
      coordinator.on_stop("throws", [] { throw 1; });
      coordinator.request_shutdown();
      hang();
    });
    REQUIRE(ended.how == "exit 1");
  }
}

TEST_CASE("drain() that comes at the very end either returns for good or never") {
  int returned = 0;
  for (int round = 0; round < 24; ++round) {
    const Ended ended = in_a_process([round] {
      ShutdownCoordinator coordinator(quiet(100ms));
      coordinator.request_shutdown();
      // Around the moment when the process ends because nobody has come.
      std::this_thread::sleep_for(94ms + std::chrono::microseconds(round * 60));
      coordinator.drain();
      std::this_thread::sleep_for(250ms);
      return 55;
    });
    INFO(round << " " << ended.err);
    const bool either = ended.how == "exit 55" || ended.how == "exit 124";
    CHECK(either);
    if (ended.how == "exit 55") ++returned;
  }
  INFO("returned " << returned << " times");
  SUCCEED();
}

// ---- what is around -------------------------------------------------------------------------------------

// Static destructors run in these, the test framework's own as well: so each has a process of its own,
// executed and not only forked.
TEST_CASE("exits in a task", "[.][program]") {
  ShutdownCoordinator coordinator(quiet(1s));
  coordinator.spawn("exits", [] { std::exit(9); });
  coordinator.run();
}
TEST_CASE("exits in a hook", "[.][program]") {
  ShutdownCoordinator coordinator(quiet(1s));
  coordinator.on_stop("exits", [] { std::exit(8); });
  coordinator.request_shutdown();
  coordinator.run();
}
TEST_CASE("exits with a static coordinator", "[.][program]") {
  static ShutdownCoordinator coordinator(quiet());
  coordinator.spawn("task", [](const CancellationToken& token) {
    token.wait();
    say("task\n");
  });
  coordinator.on_drained("hook", [] { say("hook\n"); });
  std::exit(6);
}

TEST_CASE("std::exit in a task or hook ends the process with its code, in time") {
  CHECK(Child::exec(support::this_program({"exits in a task"})).end().how == "exit 9");
  CHECK(Child::exec(support::this_program({"exits in a hook"})).end().how == "exit 8");
}

TEST_CASE("a static coordinator is drained when main returns, and the code is main's") {
  const Ended ended = Child::exec(support::this_program({"exits with a static coordinator"})).end();
  CHECK(ended.how == "exit 6");
  CHECK(contains(ended.out, "task\nhook\n"));
}
