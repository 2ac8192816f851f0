// The destructor: it asks, drains, puts everything back; it never throws, never exits the process, and
// after an overrun neither joins nor terminates.
#include <lastcall/shutdown_coordinator.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <pthread.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::SignalInfo;
using lastcall::Stage;
using lastcall::WaitGroup;
using support::Child;
using support::contains;
using support::Ended;
using support::expect;
using support::hang;
using support::in_a_process;
using support::quiet;
using support::say;
using support::slack;
using support::Stopwatch;

namespace {

// Handlers run in the reverse order of their registration: so this one, called before the first coordinator is
// made, runs when the library's own has taken the lock that it keeps across the fork.
std::atomic<bool> fork_hangs{false};
void let_forks_hang() {
  ::pthread_atfork(
      [] {
        fork_hangs = true;
        hang();
      },
      nullptr, nullptr);
}
// By a thread that nobody waits for.
void hang_in_fork() {
  std::thread([] {
    if (::fork() == 0) ::_exit(0);
  }).detach();
  expect(support::eventually([] { return fork_hangs.load(); }), "a fork hangs");
}

}  // namespace

TEST_CASE("after an overrun the destructor returns in time, and what stragglers use outlives it") {
  const Ended ended = in_a_process([] {
    const std::string before = support::dispositions();
    std::atomic<bool> go{false};
    std::atomic<int> through{0};
    WaitGroup::Guard outside;
    CancellationToken token;
    const Stopwatch watch;
    {
      ShutdownOptions options = quiet(400ms);
      options.abort_margin = 100ms;
      ShutdownCoordinator coordinator(options);
      Stage& second = coordinator.stage("second", 100ms);
      token = coordinator.token();
      outside = coordinator.enter("outside");
      const auto straggle = [&go, &through, &second](const CancellationToken& mine) {
        WaitGroup::Guard guard = second.try_enter("guard of a straggler");
        support::eventually([&] { return go.load(); });
        // The coordinator has long gone.
        if (mine.is_cancelled() && second.token().is_cancelled() && !second.try_enter() &&
            second.name() == "second") {
          ++through;
        }
        guard.release();
      };
      for (int number = 0; number < 3; ++number) coordinator.spawn("straggler", straggle);
      auto wrapped = second.wrap("wrapped", straggle);
      std::thread(wrapped).detach();
      coordinator.on_signal(SIGHUP, [&](const SignalInfo&) {
        support::eventually([&] { return go.load(); });
        ++through;
      });
      ::kill(::getpid(), SIGHUP);
      second.on_stop("hook that comes back late", [&] {
        support::eventually([&] { return go.load(); });
        ++through;
      });
      new lastcall::CancellationCallback(coordinator.token(), [&] {
        support::eventually([&] { return go.load(); });
        ++through;
      });
    }
    expect(watch.elapsed() < 400ms + slack, "in time");
    expect(support::dispositions() == before, "every disposition is back");
    expect(token.is_cancelled(), "the token is good");
    go = true;
    outside.release();
    expect(support::eventually([&] { return through == 7; }, 20s),
           "all got through, but " + std::to_string(through));
    {
      // And there is a place for the next one.
      ShutdownCoordinator next(quiet());
      next.spawn("task", [](const CancellationToken& mine) { mine.wait(); });
      ::kill(::getpid(), SIGTERM);
      expect(next.drain().exit_code == 0, "the next one works");
    }
    std::this_thread::sleep_for(50ms);
    say("still here\n");
    support::leave(4);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 4");
  CHECK(ended.out == "still here\n");
}

TEST_CASE("the destructor of a coordinator that aborted nobody does not cancel abort_token()") {
  CancellationToken abort;
  std::atomic<bool> ran{false};
  auto coordinator = std::make_unique<ShutdownCoordinator>(quiet());
  abort = coordinator->abort_token();
  const lastcall::CancellationCallback callback(abort, [&ran] { ran = true; });
  CHECK(abort.can_be_cancelled());
  coordinator.reset();
  CHECK_FALSE(abort.is_cancelled());
  CHECK_FALSE(ran);
  CHECK_FALSE(abort.can_be_cancelled());
}

TEST_CASE("SIGPIPE is as it was, also if a trap or a SignalIgnore of it outlives the coordinator") {
  const std::string before = support::disposition_of(SIGPIPE);
  const auto outlives = [&before](auto make) {
    std::optional<ShutdownCoordinator> coordinator(std::in_place, quiet());
    CHECK(support::disposition_of(SIGPIPE) != before);
    {
      const auto later = make();
      coordinator.reset();
    }
    CHECK(support::disposition_of(SIGPIPE) == before);
  };
  outlives(
      [] { return std::make_unique<lastcall::SignalTrap>(std::initializer_list<int>{SIGPIPE}); });
  outlives([] { return std::make_unique<lastcall::SignalIgnore>(SIGPIPE); });
}

TEST_CASE("the destructor never exits the process: not at the end of the grace period") {
  const Ended ended = in_a_process([] {
    {
      ShutdownCoordinator coordinator(quiet(300ms));
      coordinator.spawn("hangs", [] { hang(); });
      coordinator.on_stop("hangs", [] { hang(); });
      coordinator.on_drained("hangs", [] { hang(); });
      coordinator.stage("second", 50ms).on_stop("hangs", [] { hang(); });
      new lastcall::CancellationCallback(coordinator.token(), [] { hang(); });
    }
    std::this_thread::sleep_for(400ms);
    support::leave(5);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 5");
}

TEST_CASE("the destructor never exits the process: a third wish makes it return at once") {
  ShutdownOptions options = quiet(120s);
  options.abort_margin = 50s;
  options.repeat_window = 1ms;
  for (const char* const who : {"task", "hook"}) {
    INFO(who);
    Child child = Child::run([&] {
      const std::string before = support::dispositions();
      {
        ShutdownCoordinator coordinator(options);
        coordinator.spawn("stays", [&](const CancellationToken& token) {
          token.wait();
          say("cancelled\n");
          coordinator.abort_token().wait();
          say("aborted\n");
          hang();
        });
        if (who == std::string("hook")) coordinator.on_stop("hangs", [] { hang(); });
      }
      expect(support::dispositions() == before, "every disposition is back");
      say("returned\n");
      support::leave(6);
    });
    REQUIRE(child.prints("cancelled\n"));
    std::this_thread::sleep_for(10ms);
    child.send(SIGINT);
    REQUIRE(child.prints("aborted\n"));
    std::this_thread::sleep_for(10ms);
    const Stopwatch watch;
    child.send(SIGINT);
    const Ended ended = child.end();
    INFO(ended.err);
    CHECK(ended.how == "exit 6");
    CHECK(contains(ended.out, "returned\n"));
    CHECK(watch.elapsed() < slack);
  }
}

TEST_CASE(
    "whom an observer that throws has not told of, last words name before the destructor returns") {
  const Ended ended = in_a_process([] {
    {
      ShutdownOptions options = quiet(300ms);
      options.abort_margin = 100ms;
      options.last_words = STDERR_FILENO;
      options.observer = std::make_shared<support::Witness>(
          [](const lastcall::Event&) { throw std::runtime_error("no room"); });
      ShutdownCoordinator coordinator(options);
      coordinator.spawn("held worker", [] { hang(); });
    }
    say("returned\n");
    support::leave(6);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 6");
  CHECK(ended.out == "returned\n");
  CHECK(contains(ended.err, "'held worker' of stage 'service'"));
}

// The drain thread begins to say them at about the time at which the signal thread would, and is at it for long.
TEST_CASE("the last words before a destructor returns are said once, however many are in") {
  for (auto moment = 276ms; moment <= 300ms; moment += 4ms) {
    const Ended ended = in_a_process([moment] {
      {
        ShutdownOptions options = quiet(300ms);
        options.abort_margin = 100ms;
        options.last_words = STDERR_FILENO;
        const Stopwatch watch;
        options.observer = std::make_shared<support::Witness>([&](const lastcall::Event& event) {
          if (event.name == "finished" && watch.elapsed() < moment) {
            std::this_thread::sleep_for(moment - watch.elapsed());
          }
          throw std::runtime_error("no room");
        });
        std::vector<WaitGroup::Guard> guards;
        ShutdownCoordinator coordinator(options);
        for (int number = 0; number < 2000; ++number) guards.push_back(coordinator.enter("guard"));
        coordinator.spawn("held worker", [] { hang(); });
      }
      support::leave(6);
    });
    INFO(moment.count() << " ms: " << ended.err.substr(0, 300));
    CHECK(ended.how == "exit 6");
    CHECK(support::count_of(ended.err, "; still in:") == 1);
  }
}

TEST_CASE("last words say what there was no time to tell the observer, if there is one") {
  // Emulated, or under a sanitizer, there would be no time to name so many.
  if (!support::emulator.empty() || support::under_sanitizer) return;
  for (const bool observed : {false, true}) {
    INFO(observed);
    const Ended ended = in_a_process([observed] {
      std::vector<WaitGroup::Guard> guards;
      {
        ShutdownOptions options = quiet(400ms);
        options.last_words = STDERR_FILENO;
        if (observed) {
          options.observer = std::make_shared<support::Witness>([](const lastcall::Event&) {});
        }
        ShutdownCoordinator coordinator(options);
        while (guards.size() < 5'000) {
          guards.push_back(coordinator.enter("guard " + std::to_string(guards.size())));
        }
        coordinator.request_shutdown();
      }
      support::leave(4);
    });
    INFO(ended.err.substr(0, 2000));
    CHECK(ended.how == "exit 4");
    const bool said = contains(ended.err, "over, and not all could be told");
    // On a busy machine the time may be over even before that.
    if (observed) {
      CHECK((said || contains(ended.err, "out of time")));
    } else {
      CHECK_FALSE(said);
    }
  }
}

TEST_CASE("the destructor has the announce delay, and a SIGINT ends it") {
  ShutdownOptions options = quiet(120s);
  options.announce_delay = 100s;
  Child child = Child::run([&] {
    {
      ShutdownCoordinator coordinator(options);
      say("ready\n");
    }
    return 2;
  });
  REQUIRE(child.prints("ready\n"));
  std::this_thread::sleep_for(50ms);
  child.send(SIGINT);
  CHECK(child.end().how == "exit 2");
}

TEST_CASE("the destructor runs while an exception flies, and throws none") {
  const Ended ended = in_a_process([] {
    try {
      ShutdownCoordinator coordinator(quiet());
      coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); });
      coordinator.on_stop("throws", [] { throw std::runtime_error("in a hook"); });
      throw std::runtime_error("in main");
    } catch (const std::runtime_error& error) {
      expect(error.what() == std::string("in main"), error.what());
    }
    static_assert(std::is_nothrow_destructible_v<ShutdownCoordinator>);
    return 3;
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 3");
}

TEST_CASE("the destructor on another thread than the constructor's") {
  const Ended ended = in_a_process([] {
    auto coordinator = std::make_unique<ShutdownCoordinator>(quiet());
    coordinator->spawn("task", [](const CancellationToken& token) { token.wait(); });
    std::thread([&] { coordinator.reset(); }).join();
    ShutdownCoordinator next(quiet());
    return 3;
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 3");
}

TEST_CASE("a guard that main still holds when the coordinator goes is waited for, then harmless") {
  const Ended ended = in_a_process([] {
    WaitGroup::Guard guard;
    {
      ShutdownCoordinator coordinator(quiet(200ms));
      guard = coordinator.enter("main's own");
    }
    const WaitGroup::Guard copy = guard;
    expect(static_cast<bool>(copy), "a copy is let in");
    guard.release();
    return 3;
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 3");
}

TEST_CASE("thread_local destructors that hang hold neither drain() nor the destructor up") {
  struct Hangs {
    ~Hangs() { hang(); }
    void touch() {}
  };
  const Stopwatch watch;
  const Ended ended = in_a_process([] {
    const auto touch = [] {
      thread_local Hangs hangs;
      hangs.touch();
    };
    {
      ShutdownCoordinator coordinator(quiet(60s));
      coordinator.on_stop("hook", touch);
      coordinator.spawn("task", touch);
      coordinator.on_signal(SIGHUP, [&](const SignalInfo&) {
        touch();
        coordinator.request_shutdown();
      });
      ::kill(::getpid(), SIGHUP);
      coordinator.drain();
    }
    support::leave(4);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 4");
  CHECK(watch.elapsed() < 30s);
}

TEST_CASE(
    "a coordinator that is destroyed from inside drains on by itself, and then there may be "
    "another") {
  for (const char* const inside :
       {"task", "wrapped", "hook", "late hook", "callback", "observer", "on_signal"}) {
    INFO(inside);
    const Ended ended = in_a_process([what = std::string(inside)] {
      const std::string before = support::dispositions();
      std::optional<ShutdownCoordinator> coordinator;
      std::atomic<bool> destroyed{false};
      std::atomic<bool> released{false};
      std::atomic<bool> may{false};
      const auto destroy = [&] {
        if (!may || destroyed) return;
        coordinator.reset();
        destroyed = true;
      };
      ShutdownOptions options = quiet(600ms);
      options.exit_codes.clean = 9;  // whoever exits by the coordinator
      if (what == "observer") {
        options.observer =
            std::make_shared<support::Witness>([&](const lastcall::Event&) { destroy(); });
      }
      coordinator.emplace(options);
      ShutdownCoordinator& inner = *coordinator;
      const CancellationToken token = inner.token();
      auto made = std::make_shared<int>();
      const std::weak_ptr<int> held = made;
      inner.on_drained("release", [&, mine = std::move(made)] { released = true; });
      std::optional<lastcall::CancellationCallback<std::function<void()>>> callback;
      may = true;
      if (what == "task") {
        inner.spawn("destroys", destroy);
      } else if (what == "wrapped") {
        std::thread(inner.wrap("destroys", destroy)).detach();
      } else if (what == "on_signal") {
        inner.on_signal(SIGHUP, [&](const SignalInfo&) { destroy(); });
        ::kill(::getpid(), SIGHUP);
      } else if (what == "late hook") {
        WaitGroup::Guard guard = inner.enter();  // the drain waits until it is registered
        inner.request_shutdown();
        token.wait();
        inner.on_stop("destroys", destroy);
      } else {
        if (what == "hook") inner.on_stop("destroys", destroy);
        if (what == "callback") callback.emplace(token, destroy);
        inner.request_shutdown();
      }
      expect(support::eventually([&] { return destroyed.load(); }), "it returns");
      expect(token.wait_for(20s), "shutdown was asked for");
      expect(support::eventually([&] { return support::dispositions() == before; }),
             "every disposition is back");
      expect(released, "the drain went on to its end");
      std::optional<ShutdownCoordinator> next;
      expect(support::eventually(
                 [&] { return support::refusal([&] { next.emplace(quiet()); }) == "nothing"; }),
             "there may be another");
      next->spawn("task", [](const CancellationToken& mine) { mine.wait(); });
      ::kill(::getpid(), SIGTERM);
      expect(next->drain().exit_code == 0, "which works");
      next.reset();
      // Past the end of the first one's grace period.
      std::this_thread::sleep_for(700ms);
      expect(!held.expired(), "the first one's hooks are kept");
      support::leave(5);
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 5");
  }
}

TEST_CASE(
    "a coordinator that is destroyed from inside, and overruns, exits nothing and names who is "
    "in") {
  for (const bool two_hang : {false, true}) {
    INFO(two_hang);
    const Ended ended = in_a_process([two_hang] {
      const std::string before = support::dispositions();
      std::optional<ShutdownCoordinator> coordinator;
      ShutdownOptions options = quiet(300ms);
      options.abort_margin = 100ms;
      options.last_words = STDERR_FILENO;
      options.observer = std::make_shared<support::Witness>(
          [](const lastcall::Event&) { throw std::runtime_error("no room"); });
      coordinator.emplace(options);
      coordinator->spawn("held worker", [] { hang(); });
      if (two_hang) coordinator->on_stop("hangs", [] { hang(); });
      coordinator->stage("second", 50ms).on_stop("destroys", [&] {
        coordinator.reset();
        hang();
      });
      coordinator->request_shutdown();
      expect(support::eventually([&] { return support::dispositions() == before; }),
             "every disposition is back");
      std::optional<ShutdownCoordinator> next;
      expect(support::eventually(
                 [&] { return support::refusal([&] { next.emplace(quiet()); }) == "nothing"; }),
             "there may be another");
      std::this_thread::sleep_for(400ms);
      say("still here\n");
      support::leave(6);
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 6");
    CHECK(ended.out == "still here\n");
    CHECK(support::count_of(ended.err, "'held worker' of stage 'service'") == 1);
    CHECK(contains(ended.err, "'destroys' of stage 'second'"));
  }
}

TEST_CASE("a coordinator whose straggler destroys it after drain() makes room for another") {
  const Ended ended = in_a_process([] {
    std::optional<ShutdownCoordinator> coordinator;
    std::atomic<bool> go{false};
    coordinator.emplace(quiet(200ms));
    coordinator->spawn("straggler", [&] {
      support::eventually([&] { return go.load(); });
      coordinator.reset();
    });
    coordinator->request_shutdown();
    expect(coordinator->drain().stragglers.size() == 1, "it is in");
    go = true;
    std::optional<ShutdownCoordinator> next;
    expect(support::eventually(
               [&] { return support::refusal([&] { next.emplace(quiet()); }) == "nothing"; }),
           "there may be another");
    next.reset();
    support::leave(3);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 3");
}

TEST_CASE("a stranger's fork that hangs after drain() does not hold the destructor up") {
  const Ended ended = in_a_process(
      [] {
        let_forks_hang();
        {
          ShutdownCoordinator coordinator(quiet());
          coordinator.request_shutdown();
          coordinator.drain();
          hang_in_fork();
        }
        support::leave(4);
      },
      20s);
  INFO(ended.err);
  CHECK(ended.how == "exit 4");
}

// on_signal() has to subscribe, and waits for what the fork has locked.
TEST_CASE("an on_signal() that hangs holds neither drain() nor the destructor up") {
  for (const bool drains : {false, true}) {
    INFO(drains);
    const Ended ended = in_a_process(
        [drains] {
          let_forks_hang();
          const Stopwatch watch;
          {
            ShutdownCoordinator coordinator(quiet());
            coordinator.on_signal(SIGUSR1, [](const SignalInfo&) {});
            hang_in_fork();
            std::atomic<bool> begun{false};
            std::thread([&] {
              begun = true;
              try {
                coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
              } catch (const std::logic_error&) {
                // It came to it too late to be what this is about.
              }
            }).detach();
            support::eventually([&] { return begun.load(); });
            std::this_thread::sleep_for(200ms);
            if (drains) {
              coordinator.request_shutdown();
              coordinator.drain();
              const std::string words = support::refusal(
                  [&] { expect(coordinator.drain().exit_code == 0, "drained again"); });
              expect(words == "nothing", words);
            }
          }
          expect(watch.elapsed() < slack, "in time");
          support::leave(4);
        },
        20s);
    INFO(ended.err);
    CHECK(ended.how == "exit 4");
  }
}

#if LASTCALL_LINUX && defined(__LP64__)  // so much goes into a long

TEST_CASE("a caller whose timers are late by seconds, to save power, is no later for it") {
  for (const bool drains : {false, true}) {
    INFO(drains);
    const Ended ended = in_a_process([drains] {
      ::prctl(PR_SET_TIMERSLACK, 5'000'000'000UL, 0, 0, 0);
      // As the system says it: an emulator's may cut it.
      const long before = ::syscall(SYS_prctl, PR_GET_TIMERSLACK, 0, 0, 0, 0);
      const Stopwatch watch;
      {
        ShutdownOptions options = quiet(400ms);
        options.abort_margin = 100ms;
        ShutdownCoordinator coordinator(options);
        coordinator.spawn("held worker", [] { hang(); });
        coordinator.request_shutdown();
        if (drains) coordinator.drain();
      }
      expect(watch.elapsed() < 400ms + slack, "in time");
      expect(::syscall(SYS_prctl, PR_GET_TIMERSLACK, 0, 0, 0, 0) == before,
             "the slack is the caller's again");
      support::leave(4);
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 4");
  }
}

#endif

// Whatever hangs, one patience is all there is: else each adds its own to the grace period. What others do on this
// machine makes it late as well, but not each time.
TEST_CASE("several that hold the end up do so at the same time") {
  const auto bound = 300ms + 80ms;
  auto best = std::chrono::milliseconds::max();
  for (int turn = 0; turn < 20 && best >= bound; ++turn) {
    const Ended ended = in_a_process([] {
      struct Hangs {
        ~Hangs() { hang(); }
        void touch() {}
      };
      let_forks_hang();
      std::optional<Stopwatch> watch;
      {
        ShutdownOptions options = quiet(300ms);
        options.abort_margin = 100ms;
        // The report is there at the end of the grace period, and no sooner.
        options.observer = std::make_shared<support::Witness>([](const lastcall::Event& event) {
          if (event.name == "finished") hang();
        });
        ShutdownCoordinator coordinator(options);
        coordinator.spawn("ends, but for its thread", [] {
          thread_local Hangs hangs;
          hangs.touch();
        });
        coordinator.spawn("held worker", [] { hang(); });
        hang_in_fork();
        watch.emplace();
      }
      say(std::to_string(watch->elapsed().count()));
      support::leave(4);
    });
    INFO(ended.err);
    REQUIRE(ended.how == "exit 4");
    best = std::min(best, std::chrono::milliseconds(std::stoi(ended.out)));
  }
  INFO(best.count() << " ms");
  CHECK(best < bound);
}
