// Wishes grow: the first signal asks, the second Ctrl-C aborts, the third ends the process at once. Each
// case is a real process that is sent real signals.
#include <lastcall/shutdown_coordinator.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <thread>

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::Phase;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::SignalInfo;
using lastcall::Stage;
using support::Child;
using support::contains;
using support::Ended;
using support::hang;
using support::quiet;
using support::say;
using support::slack;
using support::Stopwatch;

namespace {

// A long grace period, so that whoever leaves early was told to; and no echo that lasts.
ShutdownOptions long_grace() {
  ShutdownOptions options = quiet(120s);
  options.abort_margin = 50s;
  options.repeat_window = 1ms;
  options.observer = std::make_shared<support::Teller>();
  return options;
}

// Until somebody writes to standard input, or closes it.
void wait_for_input() {
  char letter = 0;
  while (::read(STDIN_FILENO, &letter, 1) < 0) {
  }
}

// A child whose one task says what it sees, and stays until it is told to leave.
Child stubborn(const ShutdownOptions& options) {
  return Child::run([&options] {
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("stubborn", [&](const CancellationToken& token) {
      std::thread watcher([&] {
        token.wait();
        say("task: cancelled\n");
      });
      std::thread aborted([&] {
        coordinator.abort_token().wait();
        say("task: aborted\n");
        if (!token.is_cancelled()) say("task: but not cancelled\n");
      });
      watcher.detach();
      aborted.detach();
      wait_for_input();
      say("task: leaves\n");
    });
    say("ready\n");
    coordinator.run();
  });
}

// Outside any window: the time of a signal is taken when it is received.
void pause_for(std::chrono::milliseconds time) { std::this_thread::sleep_for(time); }

}  // namespace

TEST_CASE("the first signal requests shutdown, whichever of its signals it is") {
  for (const int number : {SIGINT, SIGTERM, SIGUSR1, SIGRTMIN + 1}) {
    INFO(lastcall::signal_name(number));
    ShutdownOptions options = long_grace();
    options.signals = {SIGINT, SIGTERM, SIGUSR1, SIGRTMIN + 1};
    Child child = Child::run([&] {
      ShutdownCoordinator coordinator(options);
      coordinator.spawn("task", [](const CancellationToken& token) {
        token.wait();
        say("the cause is " + std::string(token.cause().message()) + "\n");
      });
      say("ready\n");
      coordinator.run();
    });
    REQUIRE(child.prints("ready\n"));
    child.send(number);
    const Ended ended = child.end();
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
    CHECK(contains(ended.out, "the cause is " + std::string(lastcall::signal_name(number)) +
                                  " from pid " + std::to_string(::getpid())));
  }
}

TEST_CASE("SIGTERM again and again is idempotent, however often and whenever it comes") {
  Child child = stubborn(long_grace());
  REQUIRE(child.prints("ready\n"));
  for (int sent = 0; sent < 50; ++sent) {
    child.send(SIGTERM);
    pause_for(2ms);  // outside the window
  }
  for (int sent = 0; sent < 5000; ++sent) child.send(SIGTERM);
  REQUIRE(child.prints("task: cancelled\n"));
  pause_for(50ms);
  child.tell("x");
  const Ended ended = child.end();
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.out, "task: leaves\n"));
  CHECK_FALSE(contains(ended.out, "aborted"));
}

TEST_CASE("a third wish names main if it has not come, and not if it has") {
  for (const bool comes : {false, true}) {
    INFO(comes);
    ShutdownOptions options = long_grace();
    options.last_words = STDERR_FILENO;
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
      if (comes) coordinator.run();
      hang();
    });
    REQUIRE(child.prints("ready\n"));
    child.send(SIGTERM);
    REQUIRE(child.prints("cancelled\n"));
    child.send(SIGINT);
    REQUIRE(child.prints("aborted\n"));
    pause_for(10ms);
    child.send(SIGINT);
    const Ended ended = child.end();
    INFO(ended.err);
    CHECK(ended.how == "exit 130");
    CHECK(contains(ended.err, "'stays' of stage 'service'"));
    CHECK(contains(ended.err, "'main', ") == !comes);
  }
}

TEST_CASE("every number but SIGINT is idempotent after the request") {
  ShutdownOptions options = long_grace();
  options.signals = {SIGINT, SIGTERM, SIGUSR1, SIGHUP};
  Child child = stubborn(options);
  REQUIRE(child.prints("ready\n"));
  child.send(SIGUSR1);
  REQUIRE(child.prints("task: cancelled\n"));
  for (const int number : {SIGTERM, SIGHUP, SIGUSR1, SIGTERM, SIGHUP, SIGUSR1}) {
    pause_for(5ms);
    child.send(number);
  }
  pause_for(50ms);
  child.tell("x");
  const Ended ended = child.end();
  CHECK(ended.how == "exit 0");
  CHECK_FALSE(contains(ended.out, "aborted"));
}

TEST_CASE("a SIGINT within the repeat window of the last SIGINT is an echo, not a wish") {
  ShutdownOptions options = long_grace();
  options.repeat_window = 100s;
  Child child = stubborn(options);
  REQUIRE(child.prints("ready\n"));
  for (int sent = 0; sent < 10; ++sent) {
    child.send(SIGINT);
    pause_for(5ms);
  }
  REQUIRE(child.prints("task: cancelled\n"));
  pause_for(50ms);
  child.tell("x");
  const Ended ended = child.end();
  CHECK(ended.how == "exit 0");
  CHECK_FALSE(contains(ended.out, "aborted"));
}

TEST_CASE("an echo doesn't make the window longer: it counts from the last SIGINT that counted") {
  ShutdownOptions options = long_grace();
  options.repeat_window = 1600ms;
  Child child = stubborn(options);
  REQUIRE(child.prints("ready\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("task: cancelled\n"));
  pause_for(800ms);
  child.send(SIGINT);  // an echo
  pause_for(900ms);
  child.send(SIGINT);  // outside the window of the first, inside that of the echo, had it one
  CHECK(child.prints("task: aborted\n"));
  child.tell("x");
  CHECK(child.end().how == "exit 0");
}

TEST_CASE("with the longest repeat window the first SIGINT counts, and every other is an echo") {
  ShutdownOptions options = long_grace();
  options.repeat_window = std::chrono::milliseconds::max();
  Child child = stubborn(options);
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  REQUIRE(child.prints("task: cancelled\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("task: aborted\n"));
  for (int sent = 0; sent < 3; ++sent) {
    pause_for(10ms);
    child.send(SIGINT);
  }
  pause_for(50ms);
  child.tell("x");
  CHECK(child.end().how == "exit 0");
}

TEST_CASE("a second SIGINT aborts: abort_token() and every stage's token are cancelled") {
  ShutdownOptions options = long_grace();
  Child child = Child::run([&] {
    ShutdownCoordinator coordinator(options);
    Stage& second = coordinator.stage("second", 1s);
    Stage& third = coordinator.stage("third", 1s);
    coordinator.spawn("first", [&](const CancellationToken& token) {
      token.wait();
      say("draining\n");
      support::expect(!second.token().is_cancelled(), "the second stage goes on");
      support::expect(!coordinator.abort_token().is_cancelled(), "no abort yet");
      second.token().wait();
      third.token().wait();
      coordinator.abort_token().wait();
      support::expect(coordinator.phase() == Phase::aborting, "the phase is aborting");
      support::expect(third.token().cause().message() == token.cause().message(), "one cause");
      support::expect(coordinator.abort_token().cause().signal()->number == SIGINT, "one cause");
      say(support::unmet_expectations == 0 ? "all aborted\n" : "not well\n");
    });
    say("ready\n");
    coordinator.run();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("draining\n"));
  pause_for(20ms);
  child.send(SIGINT);
  const Ended ended = child.end();
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.out, "all aborted\n"));
  CHECK(contains(ended.out, "phase begun aborting\n"));
}

TEST_CASE("after an abort by SIGINT the end is the abort margin away, if that is sooner") {
  ShutdownOptions options = long_grace();
  options.abort_margin = 400ms;
  Child child = stubborn(options);
  REQUIRE(child.prints("ready\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("task: cancelled\n"));
  pause_for(20ms);
  const Stopwatch watch;
  child.send(SIGINT);
  const Ended ended = child.end();
  CHECK(ended.how == "exit 124");
  CHECK(watch.elapsed() >= 300ms);  // it had its margin
  CHECK(watch.elapsed() < 400ms + slack);
  CHECK(contains(ended.out, "task: aborted\n"));
  CHECK(contains(ended.out, "task overran service/stubborn\n"));
}

TEST_CASE("the third wish ends the process at once with 128 + n, and flushes nothing") {
  ShutdownOptions options = long_grace();
  options.observer = nullptr;
  Child child = Child::run([&] {
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("stubborn", [&](const CancellationToken& token) {
      token.wait();
      say("cancelled\n");
      coordinator.abort_token().wait();
      say("aborted\n");
      hang();
    });
    coordinator.on_drained("never", [] { say("drained\n"); });
    std::printf("never to be seen");
    say("ready\n");
    coordinator.run();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("cancelled\n"));
  pause_for(10ms);
  child.send(SIGINT);
  REQUIRE(child.prints("aborted\n"));
  pause_for(10ms);
  const Stopwatch watch;
  child.send(SIGINT);
  const Ended ended = child.end();
  CHECK(ended.how == "exit 130");
  CHECK(watch.elapsed() < slack);
  CHECK(ended.out == "ready\ncancelled\naborted\n");
}

TEST_CASE("three wishes are exact when every user thread, hook, callback and observer hangs") {
  struct Case {
    const char* name;
    std::function<void(ShutdownOptions&)> options;
    std::function<void(ShutdownCoordinator&)> body;
  };
  const auto nothing = [](ShutdownOptions&) {};
  const Case cases[] = {
      {"on_stop", nothing,
       [](ShutdownCoordinator& coordinator) {
         for (int hook = 0; hook < 3; ++hook) coordinator.on_stop("hangs", [] { hang(); });
       }},
      {"on_drained", nothing,
       [](ShutdownCoordinator& coordinator) { coordinator.on_drained("hangs", [] { hang(); }); }},
      {"callback", nothing,
       [](ShutdownCoordinator& coordinator) {
         new lastcall::CancellationCallback(coordinator.token(), [] { hang(); });
         new lastcall::CancellationCallback(coordinator.abort_token(), [] { hang(); });
       }},
      {"observer",
       [](ShutdownOptions& options) {
         options.observer =
             std::make_shared<support::Witness>([](const lastcall::Event&) { hang(); });
       },
       [](ShutdownCoordinator&) {}},
      {"on_signal", nothing,
       [](ShutdownCoordinator& coordinator) {
         coordinator.on_signal(SIGHUP, [](const SignalInfo&) { hang(); });
         ::kill(::getpid(), SIGHUP);
       }},
      {"spinning task", nothing,
       [](ShutdownCoordinator& coordinator) {
         coordinator.spawn("spins", [] {
           for (std::atomic<unsigned> turns{0};;) ++turns;
         });
       }},
      {"main", nothing,
       [](ShutdownCoordinator&) {
         say("ready\n");
         hang();
       }},
      {"all of it",
       [](ShutdownOptions& options) {
         options.observer =
             std::make_shared<support::Witness>([](const lastcall::Event&) { hang(); });
       },
       [](ShutdownCoordinator& coordinator) {
         coordinator.on_stop("hangs", [] { hang(); });
         coordinator.on_drained("hangs", [] { hang(); });
         coordinator.stage("second", 1s).on_stop("hangs", [] { hang(); });
         new lastcall::CancellationCallback(coordinator.token(), [] { hang(); });
         coordinator.spawn("hangs", [] { hang(); });
         coordinator.on_signal(SIGHUP, [](const SignalInfo&) { hang(); });
         ::kill(::getpid(), SIGHUP);
         say("ready\n");
         hang();
       }},
  };
  for (const Case& one : cases) {
    INFO(one.name);
    ShutdownOptions options = long_grace();
    options.observer = nullptr;
    one.options(options);
    Child child = Child::run([&] {
      ShutdownCoordinator coordinator(options);
      coordinator.spawn("stubborn", [&](const CancellationToken& token) {
        token.wait();
        say("cancelled\n");
        coordinator.abort_token().wait();
        say("aborted\n");
        hang();
      });
      one.body(coordinator);
      say("ready\n");
      coordinator.run();
    });
    REQUIRE(child.prints("ready\n"));
    child.send(SIGINT);
    REQUIRE(child.prints("cancelled\n"));
    pause_for(10ms);
    child.send(SIGINT);
    REQUIRE(child.prints("aborted\n"));
    pause_for(10ms);
    const Stopwatch watch;
    child.send(SIGINT);
    CHECK(child.end().how == "exit 130");
    CHECK(watch.elapsed() < slack);
  }
}

TEST_CASE("SIGTERM then SIGINTs: the first of those aborts, the second forces") {
  Child child = stubborn(long_grace());
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  REQUIRE(child.prints("task: cancelled\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("task: aborted\n"));
  pause_for(10ms);
  child.send(SIGTERM);  // idempotent also now
  pause_for(10ms);
  child.send(SIGINT);
  CHECK(child.end().how == "exit 130");
}

TEST_CASE("after a request that the program made, the first SIGINT aborts and the second forces") {
  Child child = Child::run([] {
    ShutdownCoordinator coordinator(long_grace());
    coordinator.spawn("stubborn", [&] {
      coordinator.abort_token().wait();
      say("aborted\n");
      hang();
    });
    coordinator.request_shutdown();
    say("ready\n");
    coordinator.run();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("aborted\n"));
  pause_for(10ms);
  child.send(SIGINT);
  CHECK(child.end().how == "exit 130");
}

TEST_CASE("after an abort that the clock brought, one SIGINT forces") {
  ShutdownOptions options = quiet(1600ms);
  options.repeat_window = 1ms;
  options.abort_margin = 1h;  // at most half: 800 ms
  Child child = Child::run([&] {
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("stubborn", [&] {
      coordinator.abort_token().wait();
      ::raise(SIGINT);  // as soon as can be
      hang();
    });
    say("ready\n");
    coordinator.run();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  CHECK(child.end().how == "exit 130");
}

TEST_CASE("a SIGINT during the announce delay ends it, and is no abort yet") {
  ShutdownOptions options = long_grace();
  options.announce_delay = 60s;
  Child child = stubborn(options);
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  REQUIRE(child.prints("phase begun announced\n"));
  pause_for(20ms);
  CHECK_FALSE(contains(child.out(), "cancelled"));
  child.send(SIGTERM);  // ends nothing
  pause_for(20ms);
  CHECK_FALSE(contains(child.out(), "cancelled"));
  child.send(SIGINT);
  REQUIRE(child.prints("task: cancelled\n"));
  pause_for(20ms);
  CHECK_FALSE(contains(child.out(), "aborted"));
  child.send(SIGINT);
  REQUIRE(child.prints("task: aborted\n"));
  pause_for(10ms);
  child.send(SIGINT);
  CHECK(child.end().how == "exit 130");
}

TEST_CASE("a SIGINT that is the request skips the announce delay") {
  ShutdownOptions options = long_grace();
  options.announce_delay = 60s;
  Child child = stubborn(options);
  REQUIRE(child.prints("ready\n"));
  child.send(SIGINT);
  REQUIRE(child.prints("task: cancelled\n"));
  child.tell("x");
  const Ended ended = child.end();
  CHECK(ended.how == "exit 0");
  const std::size_t announced = ended.out.find("phase begun announced\n");
  CHECK(announced < ended.out.find("phase begun draining\n"));
}

TEST_CASE("without an announce delay a SIGINT right after the request aborts, and skips nothing") {
  for (int round = 0; round < 20; ++round) {
    Child child = Child::run([] {
      ShutdownOptions options = long_grace();
      options.observer = nullptr;
      ShutdownCoordinator coordinator(options);
      coordinator.spawn("stubborn", [&] { coordinator.abort_token().wait(); });
      coordinator.request_shutdown();
      ::raise(SIGINT);
      coordinator.run();
    });
    REQUIRE(child.end().how == "exit 0");
  }
}

TEST_CASE(
    "is_cancelled() turns true, and blocked waiters wake, without waiting for any user code") {
  // Somebody of the user's is called first, and doesn't return before the waiters have woken.
  struct Case {
    const char* name;
    std::function<void(ShutdownOptions&, std::function<void()>)> options;
    std::function<void(ShutdownCoordinator&, std::function<void()>)> body;
  };
  const Case cases[] = {
      {"observer",
       [](ShutdownOptions& options, const std::function<void()>& wait) {
         options.observer =
             std::make_shared<support::Witness>([wait](const lastcall::Event&) { wait(); });
       },
       [](ShutdownCoordinator&, const std::function<void()>&) {}},
      {"callback", [](ShutdownOptions&, const std::function<void()>&) {},
       [](ShutdownCoordinator& coordinator, const std::function<void()>& wait) {
         new lastcall::CancellationCallback(coordinator.token(), wait);
       }},
      {"on_signal", [](ShutdownOptions&, const std::function<void()>&) {},
       [](ShutdownCoordinator& coordinator, const std::function<void()>& wait) {
         coordinator.on_signal(SIGHUP, [wait](const SignalInfo&) { wait(); });
         ::raise(SIGHUP);
       }},
  };
  for (const Case& one : cases) {
    INFO(one.name);
    const Ended ended = support::in_a_process([&] {
      std::atomic<int> woken{0};
      std::atomic<bool> in_time{true};
      const std::function<void()> wait = [&] {
        if (!support::eventually([&] { return woken == 4; }, 20s)) in_time = false;
      };
      ShutdownOptions options = quiet(100s);
      options.announce_delay = 30ms;  // the signal thread's own affair
      one.options(options, wait);
      ShutdownCoordinator coordinator(options);
      one.body(coordinator, wait);
      const lastcall::CancellationSource child(coordinator.token());
      support::Threads waiters;
      waiters.start([&] {
        if (coordinator.token().wait_for(60s)) ++woken;
      });
      waiters.start([&] {
        if (child.token().wait_for(60s)) ++woken;
      });
      waiters.start([&] {
        if (support::is_readable(child.token().fd(), 60'000)) ++woken;
      });
      waiters.start([&] {
        if (support::eventually([&] { return child.token().is_cancelled(); })) ++woken;
      });
      std::this_thread::sleep_for(10ms);
      ::raise(SIGTERM);
      waiters.join();
      support::expect(woken == 4, "all have woken");
      support::expect(in_time, "before the user's code returned");
      coordinator.drain();
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
  }
}
