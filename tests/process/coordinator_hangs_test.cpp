// What hangs is written down, abandoned and named, and costs its own stage's budget and nobody else's:
// hooks, callbacks, observers, tasks, reloads. (That the process is gone in time whatever hangs is the
// promise table's; here is what it does until then.)
#include <lastcall/blocking.hpp>
#include <lastcall/shutdown_coordinator.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#if LASTCALL_LINUX
#include <sys/prctl.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::EventKind;
using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using lastcall::SignalInfo;
using lastcall::Stage;
using lastcall::Straggler;
using lastcall::WaitGroup;
using support::Child;
using support::contains;
using support::Diary;
using support::Ended;
using support::expect;
using support::expect_equal;
using support::find_straggler;
using support::hang;
using support::in_a_process;
using support::quiet;
using support::say;
using support::slack;
using support::Stopwatch;
using support::story_of;

namespace {

// Stages have 300 ms each, the first one what is left: some 500 ms.
ShutdownOptions options_with_stages() {
  ShutdownOptions options = quiet(support::enough(1500ms));
  options.abort_margin = support::enough(300ms);
  return options;
}

// Runs in a child that goes on after drain() and expects things of the report.
Ended drained(const ShutdownOptions& options,
              const std::function<void(ShutdownCoordinator&)>& before,
              const std::function<void(const ShutdownReport&)>& after) {
  return in_a_process([&] {
    ShutdownCoordinator coordinator(options);
    before(coordinator);
    coordinator.request_shutdown();
    const Stopwatch watch;
    const ShutdownReport report = coordinator.drain();
    expect(watch.elapsed() < options.grace_period + slack,
           "in time, but after " + std::to_string(watch.elapsed().count()) + " ms");
    after(report);
    if (support::unmet_expectations > 0) {
      support::write_all(STDERR_FILENO, story_of(report.events));
    }
    support::leave(0);  // as it is, with whoever hangs
  });
}

bool has(const ShutdownReport& report, std::string_view line) {
  return support::find_event(report.events, line) != nullptr;
}
void expect_line(const ShutdownReport& report, std::string_view line, bool wanted = true,
                 int from = __builtin_LINE()) {
  expect(has(report, line) == wanted, std::string(wanted ? "" : "no ") + std::string(line), from);
}

// A straggler in hang().
void expect_named(const ShutdownReport& report, std::string_view name, std::string_view stage,
                  int from = __builtin_LINE()) {
  const Straggler* const straggler = find_straggler(report.stragglers, name);
  if (!expect(straggler != nullptr, "a straggler " + std::string(name), from)) return;
  expect(straggler->stage == stage, "its stage, but " + straggler->stage, from);
  expect(straggler->age > 0ns, "its age", from);
#if LASTCALL_LINUX
  expect(straggler->thread_id > 0, "its thread", from);
  expect(!straggler->thread_name.empty(), "the name of its thread", from);
  expect(support::tells_pause(straggler->waiting_in),
         "where it waits, but " + straggler->waiting_in, from);
  if (!support::under_sanitizer) expect(!straggler->stack.empty(), "its stack", from);
#endif
}

}  // namespace

TEST_CASE(
    "a hung on_stop is abandoned and a straggler, the rest still run, and the next stage in full") {
  Diary diary;
  const Ended ended = drained(
      options_with_stages(),
      [&](ShutdownCoordinator& coordinator) {
        Stage& second = coordinator.stage("second", 300ms);
        coordinator.on_stop("before", diary.entry("before"));
        coordinator.on_stop("hangs", [] { hang(); });
        coordinator.on_stop("after", diary.entry("after"));
        coordinator.on_drained("release", diary.entry("release"));
        second.on_stop("stop", [&] {
          std::this_thread::sleep_for(50ms);  // it has the time for it
          diary.add("stop of second");
        });
        second.on_drained("release", diary.entry("release of second"));
        second.spawn("task", [&](const CancellationToken& token) {
          token.wait();
          std::this_thread::sleep_for(100ms);
          diary.add("task of second");
        });
      },
      [&](const ShutdownReport& report) {
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect_equal(report.exit_code, 124, "the code");
        expect(diary.text() == "before\nafter\nstop of second\ntask of second\nrelease of second\n",
               diary.text());
        expect_line(report, "hook overran service/hangs");
        expect_line(report, "hook ok service/after");
        // It was past its budget, and the one that hangs may still use what is to be released.
        expect_line(report, "stage overran service");
        expect_line(report, "hook skipped service/release");
        expect_line(report, "stage ok second");
        expect_equal(report.stragglers.size(), std::size_t{1}, "stragglers");
        expect_named(report, "hangs", "service");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

namespace {

struct WhatHangs : std::exception {
  const char* what() const noexcept override { hang(); }
};
struct DestructorHangs {
  DestructorHangs() = default;
  DestructorHangs(const DestructorHangs&) = default;
  ~DestructorHangs() { hang(); }
};

}  // namespace

TEST_CASE("a hook that throws something whose what() hangs is abandoned, and the rest still run") {
  Diary diary;
  const Ended ended = drained(
      options_with_stages(),
      [&](ShutdownCoordinator& coordinator) {
        coordinator.on_stop("hangs", [] { throw WhatHangs(); });
        coordinator.on_stop("after", diary.entry("after"));
      },
      [&](const ShutdownReport& report) {
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect(diary.text() == "after\n", diary.text());
        expect_line(report, "hook overran service/hangs");
        expect_named(report, "hangs", "service");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("an observer that throws something whose destructor hangs is abandoned and named") {
  Diary diary;
  ShutdownOptions options = options_with_stages();
  options.observer =
      std::make_shared<support::Witness>([](const lastcall::Event&) { throw DestructorHangs(); });
  const Ended ended = drained(
      options,
      [&](ShutdownCoordinator& coordinator) { coordinator.on_stop("hook", diary.entry("hook")); },
      [&](const ShutdownReport& report) {
        expect(diary.text() == "hook\n", diary.text());
        expect(support::find_straggler(report.stragglers, "the observer") != nullptr, "who hangs");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a hung on_drained is abandoned and a straggler, and the rest still run") {
  Diary diary;
  const Ended ended = drained(
      options_with_stages(),
      [&](ShutdownCoordinator& coordinator) {
        Stage& second = coordinator.stage("second", 300ms);
        coordinator.on_drained("after", diary.entry("after"));
        coordinator.on_drained("hangs", [] { hang(); });
        coordinator.on_drained("before", diary.entry("before"));
        second.on_drained("release", diary.entry("release of second"));
      },
      [&](const ShutdownReport& report) {
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect(diary.text() == "before\nafter\nrelease of second\n", diary.text());
        expect_line(report, "hook overran service/hangs");
        expect_line(report, "stage overran service");
        expect_line(report, "stage ok second");
        expect_named(report, "hangs", "service");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("every hook hangs, of every stage: each is named, and each was called") {
  std::atomic<int> called{0};
  const Ended ended = drained(
      options_with_stages(),
      [&](ShutdownCoordinator& coordinator) {
        const auto hook = [&] {
          ++called;
          hang();
        };
        Stage& second = coordinator.stage("second", 200ms);
        Stage& third = coordinator.stage("third", 200ms);
        for (const char* const name : {"a", "b", "c"}) {
          coordinator.on_stop(name, hook);
          second.on_stop(name, hook);
          third.on_stop(name, hook);
        }
      },
      [&](const ShutdownReport& report) {
        expect_equal(called.load(), 9, "hooks called");
        expect_equal(report.stragglers.size(), std::size_t{9}, "stragglers");
        expect_line(report, "stage overran third");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE(
    "a hung task costs its stage's budget: overran, its on_drained skipped, the next begins") {
  Diary diary;
  const Ended ended = drained(
      options_with_stages(),
      [&](ShutdownCoordinator& coordinator) {
        Stage& second = coordinator.stage("second", 300ms);
        coordinator.spawn("hangs", [] { hang(); });
        coordinator.on_drained("one", diary.entry("one"));
        coordinator.on_drained("two", diary.entry("two"));
        second.on_drained("release", diary.entry("release of second"));
      },
      [&](const ShutdownReport& report) {
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect(diary.text() == "release of second\n", diary.text());
        expect_line(report, "stage overran service");
        expect_line(report, "hook skipped service/one");
        expect_line(report, "hook skipped service/two");
        expect_line(report, "stage ok second");
        expect_line(report, "task overran service/hangs");
        expect_named(report, "hangs", "service");
        const lastcall::Event* const stage =
            support::find_event(report.events, "stage overran service");
        // 1500 - 300 - 300 ms were its own.
        if (stage != nullptr) expect(stage->end - stage->begin > 500ms, "it had its budget");
        if (stage != nullptr) expect(contains(stage->detail, "1 still in"), stage->detail);
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("who leaves after its stage's budget, but before the end, is no straggler") {
  Diary diary;
  const Ended ended = drained(
      options_with_stages(),
      [&](ShutdownCoordinator& coordinator) {
        Stage& second = coordinator.stage("second", 300ms);
        coordinator.on_stop("slow", [&] { coordinator.abort_token().wait(); });
        second.spawn("slow too", [&] { coordinator.abort_token().wait(); });
        second.on_drained("release", diary.entry("release of second"));
      },
      [&](const ShutdownReport& report) {
        // All were out in the end.
        expect(report.outcome == Outcome::clean, "clean");
        expect_line(report, "hook overran service/slow");
        expect_line(report, "stage overran service");
        expect_line(report, "stage overran second");
        expect_line(report, "hook skipped second/release");
        expect(report.stragglers.empty(), "no stragglers");
        expect(diary.text().empty(), diary.text());
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a hook that comes back late is no straggler, and one after it that hangs still is") {
  const Ended ended = drained(
      options_with_stages(),
      [&](ShutdownCoordinator& coordinator) {
        coordinator.stage("second", 300ms).on_stop("hangs", [] { hang(); });
        coordinator.on_stop("slow", [&] { coordinator.abort_token().wait(); });
      },
      [&](const ShutdownReport& report) {
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect_line(report, "hook overran service/slow");
        expect_line(report, "hook overran second/hangs");
        expect_equal(report.stragglers.size(), std::size_t{1}, "stragglers");
        expect_named(report, "hangs", "second");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a hung callback is abandoned like a hook: the other callbacks and the hooks still run") {
  Diary diary;
  const Ended ended = drained(
      options_with_stages(),
      [&](ShutdownCoordinator& coordinator) {
        for (int number = 0; number < 3; ++number) {
          new lastcall::CancellationCallback(coordinator.token(), diary.entry("callback"));
          new lastcall::CancellationCallback(coordinator.token(), [] { hang(); });
        }
        new lastcall::CancellationCallback(coordinator.abort_token(), [] { hang(); });
        new lastcall::CancellationCallback(coordinator.abort_token(),
                                           diary.entry("abort callback"));
        coordinator.on_stop("hook", diary.entry("hook"));
        coordinator.stage("second", 300ms).on_drained("release", diary.entry("release of second"));
      },
      [&](const ShutdownReport& report) {
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect(diary.text() ==
                   "callback\ncallback\ncallback\nhook\nrelease of second\nabort callback\n",
               diary.text());
        expect_line(report, "stage overran service");
        expect_line(report, "stage ok second");
        int hung = 0;
        for (const Straggler& straggler : report.stragglers) {
          if (contains(straggler.name, "callback")) ++hung;
        }
        expect_equal(hung, 4, "callbacks that hang");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("an observer that takes its time for every event does not take the hooks'") {
  Diary diary;
  std::atomic<int> told{0};
  ShutdownOptions options = quiet(support::enough(2000ms));
  options.abort_margin = 100ms;
  options.observer = std::make_shared<support::Witness>([&](const lastcall::Event&) {
    ++told;
    // Half a second would be taken for a hang.
    std::this_thread::sleep_for(
        std::min<std::chrono::nanoseconds>(options.grace_period / 30, 400ms));
  });
  const Ended ended = drained(
      options,
      [&](ShutdownCoordinator& coordinator) {
        for (int number = 0; number < 20; ++number) {
          coordinator.on_stop("hook", diary.entry("hook"));
        }
      },
      [&](const ShutdownReport& report) {
        expect_equal(support::count_of(diary.text(), "hook\n"), 20U, "hooks that ran");
        expect(report.outcome == Outcome::clean, "nobody was late");
        // What it had no time for came after the hooks.
        expect(told.load() > 10, "it is told more when they are through");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// The observer is told as many of them as there is time for, and the end of the story in any case.
TEST_CASE("with thousands still in drain() returns in time, and its report names each") {
  constexpr std::size_t many = support::under_sanitizer ? 500 : 4000;
  std::atomic<bool> end_told{false};
  ShutdownOptions options = quiet(support::enough(4000ms));
  options.abort_margin = options.grace_period / 4;
  options.observer = std::make_shared<support::Witness>([&](const lastcall::Event& event) {
    if (event.kind == EventKind::task) std::this_thread::sleep_for(100us);
    if (event.kind == EventKind::phase && event.name == "finished") end_told = true;
  });
  const auto drained_with_many = [&] {
    std::vector<WaitGroup::Guard> guards;
    return drained(
        options,
        [&](ShutdownCoordinator& coordinator) {
          for (std::size_t number = 0; number < many; ++number) {
            guards.push_back(coordinator.enter("guard " + std::to_string(number)));
          }
          coordinator.spawn("held worker", [] { hang(); });
        },
        [&](const ShutdownReport& report) {
          expect(report.outcome == Outcome::overrun, "an overrun");
          expect_equal(report.stragglers.size(), many + 1, "stragglers");
          for (std::size_t number = 0; number < many; number += 99) {
            expect(find_straggler(report.stragglers, "guard " + std::to_string(number)) != nullptr,
                   "guard " + std::to_string(number));
          }
          expect_named(report, "held worker", "service");
          expect(end_told, "the observer is told the end");
        });
  };
  // Others may use this machine as well: one of three tries has to do.
  std::string story;
  for (int attempt = 0; attempt < 3; ++attempt) {
    const Ended ended = drained_with_many();
    if (ended.how == "exit 0") return;
    story += ended.how + " " + ended.err + "\n";
  }
  INFO(story);
  CHECK(false);
}

TEST_CASE("who asks for snapshots without end does not hold the drain up") {
  ShutdownOptions options = quiet(support::enough(4000ms));
  options.abort_margin = 500ms;
  options.dump_signal = SIGUSR1;
  const Ended ended = drained(
      options,
      [&](ShutdownCoordinator& coordinator) {
        coordinator.spawn("leaves", [](const CancellationToken& token) {
          token.wait();
          std::this_thread::sleep_for(100ms);
        });
        lastcall::Stage& storage = coordinator.stage("storage", options.grace_period / 4);
        std::thread([&storage] {
          const lastcall::WaitGroup::Guard guard = storage.enter("deaf");
          sigset_t all;
          ::sigfillset(&all);
          ::pthread_sigmask(SIG_BLOCK, &all,
                            nullptr);  // its stack is asked for in vain, which takes time
          storage.token().wait();
        }).detach();
        expect(support::eventually([&] { return coordinator.snapshot().size() == 2; }),
               "both are in");
        auto over = std::make_shared<std::atomic<bool>>(false);
        auto storm = std::make_shared<std::thread>([over] {
          while (!over->load()) {
            ::kill(::getpid(), SIGUSR1);
            std::this_thread::sleep_for(1ms);
          }
        });
        // Nobody catches it after the drain.
        storage.on_drained("calm", [over, storm] {
          over->store(true);
          storm->join();
        });
      },
      [&](const ShutdownReport& report) {
        expect(report.outcome == Outcome::clean, "nobody was late");
        expect_line(report, "phase begun aborting", false);  // nor was it held up until then
        expect_line(report, "signal ok snapshot");
        expect_line(report, "stage ok service");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a callback that doesn't return holds up nobody who blocks in wait() or accept()") {
  const Ended ended = in_a_process([] {
    const lastcall::detail::UniqueFd listener(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in here{};
    here.sin_family = AF_INET;
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    expect(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&here), sizeof here) == 0 &&
               ::listen(listener.get(), 1) == 0,
           "a listener");
    std::mutex mutex;
    std::condition_variable changed;
    std::atomic<pid_t> consumer{0};
    std::atomic<pid_t> loop{0};
    std::atomic<int> out{0};
    ShutdownCoordinator coordinator(quiet(100s));
    coordinator.spawn("consumer", [&](const CancellationToken& token) {
      consumer = support::thread_id();
      std::unique_lock<std::mutex> lock(mutex);
      lastcall::wait(changed, lock, token, [] { return false; });
      ++out;
    });
    coordinator.spawn("loop", [&](const CancellationToken& token) {
      loop = support::thread_id();
      // As accept() does when a connection is there that somebody else takes.
      lastcall::detail::accept_unless_cancelled(listener.get(), token);
      ++out;
    });
    support::let_it_block(consumer);
    support::let_it_block(loop);
    bool in_time = false;
    // Made last, and called before whatever was made first.
    const auto wait = [&] { in_time = support::eventually([&] { return out == 2; }, 20s); };
    const lastcall::CancellationCallback callback(coordinator.token(), wait);
    coordinator.request_shutdown();
    expect(coordinator.drain().outcome == Outcome::clean, "a clean end");
    expect(in_time, "both were out before the callback returned");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

#if LASTCALL_LINUX && defined(__LP64__)  // so much goes into a long

TEST_CASE("a hung hook is abandoned in time by a process whose timers are late to save power") {
  Diary diary;
  const auto grace = support::enough(400ms);
  const Ended ended = in_a_process([&] {
    ::prctl(PR_SET_TIMERSLACK, 20'000'000'000UL, 0, 0, 0);  // inherited by every thread
    ShutdownOptions options = quiet(grace);
    options.abort_margin = grace / 4;
    ShutdownCoordinator coordinator(options);
    coordinator.on_stop("after", diary.entry("after"));
    coordinator.on_stop("hangs", [] { hang(); });
    coordinator.request_shutdown();
    const Stopwatch watch;
    coordinator.drain();
    expect(watch.elapsed() < grace + slack, "in time");
    expect(diary.text() == "after\n", diary.text());
    support::leave(0);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

#endif

TEST_CASE("an observer that hangs is abandoned, whatever it is told, and every hook still runs") {
  // At each event of the story, the first and the last as well.
  for (int hangs_at = 0; hangs_at < 15; ++hangs_at) {
    INFO("hangs at event " << hangs_at);
    Diary diary;
    std::atomic<int> told{0};
    ShutdownOptions options = quiet(support::enough(500ms));
    options.abort_margin = support::enough(100ms);
    options.observer = std::make_shared<support::Witness>([&](const lastcall::Event&) {
      if (told++ == hangs_at) hang();
    });
    const Ended ended = drained(
        options,
        [&](ShutdownCoordinator& coordinator) {
          coordinator.on_stop("a", diary.entry("a"));
          coordinator.on_drained("b", diary.entry("b"));
          coordinator.stage("second", 100ms).on_stop("c", diary.entry("c"));
          coordinator.stage("third", 100ms);
        },
        [&](const ShutdownReport& report) {
          expect(diary.text() == "a\nb\nc\n", diary.text());
          expect_equal(told.load(), hangs_at + 1, "calls of the observer");
          // Later events reach the report only. It is waited for to the end, as a hook would be.
          std::string story =
              story_of(report.events, {EventKind::phase, EventKind::stage, EventKind::hook});
          const std::size_t aborting = story.find("phase begun aborting\n");
          if (aborting != std::string::npos) story.erase(aborting, 21);
          expect(story ==
                     "phase begun announced\nphase begun draining\nstage begun service\n"
                     "hook begun service/a\nhook ok service/a\n"
                     "hook begun service/b\nhook ok service/b\nstage ok service\n"
                     "stage begun second\nhook begun second/c\nhook ok second/c\nstage ok second\n"
                     "stage begun third\nstage ok third\nphase begun finished\n",
                 story);
        });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
  }
}

TEST_CASE("an observer that hangs at the last event holds neither drain() nor run() up") {
  for (const bool runs : {false, true}) {
    INFO((runs ? "run()" : "drain()"));
    const Stopwatch watch;
    const Ended ended = in_a_process([runs] {
      ShutdownOptions options = quiet(600ms);
      options.observer = std::make_shared<support::Witness>([](const lastcall::Event& event) {
        if (event.name == "finished") hang();
      });
      ShutdownCoordinator coordinator(options);
      const WaitGroup::Guard stays = coordinator.enter("stays");
      coordinator.request_shutdown();
      if (runs) coordinator.run();
      expect(coordinator.drain().outcome == Outcome::overrun, "an overrun");
      std::this_thread::sleep_for(300ms);
      say("still here\n");
      support::leave(3);
    });
    INFO(ended.err);
    CHECK(ended.how == (runs ? "exit 124" : "exit 3"));
    CHECK(watch.elapsed() < 900ms + slack);
  }
}

TEST_CASE("an observer that hangs long before any shutdown doesn't hold one up") {
  const Stopwatch watch;
  Diary diary;
  ShutdownOptions options = quiet(1000ms);
  options.observer = std::make_shared<support::Witness>([](const lastcall::Event&) { hang(); });
  const Ended ended = in_a_process([&] {
    ShutdownCoordinator coordinator(options);
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
    coordinator.on_stop("hook", [] { say("hook\n"); });
    coordinator.spawn("task", [](const CancellationToken& token) {
      token.wait();
      say("task\n");
    });
    ::raise(SIGHUP);
    std::this_thread::sleep_for(200ms);
    ::raise(SIGTERM);
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 124");  // it is still in
  CHECK(contains(ended.out, "hook\n"));
  CHECK(contains(ended.out, "task\n"));
  CHECK(watch.elapsed() < 1200ms + slack);
}

TEST_CASE("an observer's on_request, wants_status and on_status may hang or throw as well") {
  struct Odd : lastcall::Observer {
    explicit Odd(int what) : what_(what) {}
    void on_event(const lastcall::Event&) override {}
    void on_request(lastcall::Clock::time_point) override {
      if (what_ == 0) hang();
      if (what_ == 1) throw 1;
    }
    bool wants_status() const noexcept override {
      if (what_ == 2) hang();
      return true;
    }
    void on_status(const lastcall::LiveStatus&) override {
      if (what_ == 3) hang();
      if (what_ == 4) throw 1;
    }
    const int what_;
  };
  for (int what = 0; what < 5; ++what) {
    INFO(what);
    const bool lasts = what >= 3;  // until the first status
    ShutdownOptions options = quiet(lasts ? 1800ms : support::enough(500ms));
    options.abort_margin = 100ms;
    options.observer = std::make_shared<Odd>(what);
    Diary diary;
    const Ended ended = drained(
        options,
        [&](ShutdownCoordinator& coordinator) {
          coordinator.on_stop("hook", diary.entry("hook"));
          coordinator.spawn("stays a while",
                            [lasts] { std::this_thread::sleep_for(lasts ? 1200ms : 10ms); });
        },
        [&](const ShutdownReport& report) {
          expect(diary.text() == "hook\n", diary.text());
          expect_line(report, "stage ok service");
          const bool hung = what == 0 || what == 2 || what == 3;
          expect(report.outcome == (hung ? Outcome::overrun : Outcome::clean), "the outcome");
        });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
  }
}

TEST_CASE("a hung reload can't stop a drain") {
  const Stopwatch watch;
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(quiet(60s));
    std::atomic<bool> hangs{false};
    coordinator.on_signal(SIGHUP, [&](const SignalInfo&) {
      hangs = true;
      hang();
    });
    coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); });
    coordinator.on_drained("hook", [] { say("drained\n"); });
    ::raise(SIGHUP);
    support::eventually([&] { return hangs.load(); });
    for (int sent = 0; sent < 200; ++sent) ::raise(SIGHUP);
    ::raise(SIGTERM);
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(ended.out == "drained\n");
  CHECK(watch.elapsed() < 30s);
}

TEST_CASE(
    "a second wish while a hook hangs: the stages after it share what is left, and drain() "
    "returns") {
  ShutdownOptions options = quiet(60s);
  options.abort_margin = 1200ms;
  options.repeat_window = 0ms;
  Diary diary;
  const Ended ended = in_a_process([&] {
    ShutdownCoordinator coordinator(options);
    Stage& second = coordinator.stage("second", 10s);
    Stage& third = coordinator.stage("third", 10s);
    coordinator.on_stop("hangs", [] {
      ::kill(::getpid(), SIGINT);  // and somebody loses patience
      hang();
    });
    coordinator.on_stop("after", diary.entry("after"));
    second.on_stop("stop", diary.entry("second"));
    third.on_stop("stop", diary.entry("third"));
    third.spawn("task", [&](const CancellationToken& token) {
      token.wait();
      std::this_thread::sleep_for(50ms);
      diary.add("task of third");
    });
    third.on_drained("release", diary.entry("release of third"));
    coordinator.request_shutdown();
    const Stopwatch watch;
    const ShutdownReport report = coordinator.drain();
    expect(watch.elapsed() < 1200ms + slack, "in time");
    expect(report.outcome == Outcome::overrun, "an overrun");
    for (const char* const line :
         {"after", "second", "third", "task of third", "release of third"}) {
      expect(diary.has(line), line);
    }
    expect_line(report, "hook overran service/hangs");
    expect_line(report, "stage ok third");
    expect_named(report, "hangs", "service");
    support::leave(support::unmet_expectations > 0 ? 1 : 0);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE(
    "after an abort an observer that hangs before the first stage has its share of what is left") {
  ShutdownOptions options = quiet(60s);
  options.abort_margin = 600ms;
  options.repeat_window = 0ms;
  // Half a second is what an observer has else, and 450 ms is what there is: once in five is enough.
  bool in_time = false;
  for (int round = 0; round < 5 && !in_time; ++round) {
    const Ended ended = in_a_process([&] {
      CancellationToken aborted;
      options.observer = std::make_shared<support::Witness>([&](const lastcall::Event& event) {
        if (event.name == "announced") {
          ::kill(::getpid(), SIGINT);
          aborted.wait();
          std::this_thread::sleep_for(50ms);  // until the signal thread is through with it
        }
        if (event.name == "draining") hang();
      });
      ShutdownCoordinator coordinator(options);
      aborted = coordinator.abort_token();
      Stage& second = coordinator.stage("second", 10s);
      coordinator.on_stop("stop", [] { say("first\n"); });
      second.on_stop("stop", [] { say("second\n"); });
      coordinator.request_shutdown();
      coordinator.drain();
      support::leave(0);
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
    in_time = ended.out == "first\nsecond\n";
  }
  CHECK(in_time);
}

TEST_CASE("the budgets of stages that begin late are their shares of what is left") {
  // With no margin the stages' budgets fill the whole grace period, less what the report needs.
  ShutdownOptions options = quiet(1200ms);
  options.abort_margin = 0ms;
  Diary diary;
  const Ended ended = drained(
      options,
      [&](ShutdownCoordinator& coordinator) {
        for (const char* const name : {"second", "third", "fourth"}) {
          Stage& stage = coordinator.stage(name, 300ms);
          stage.spawn("hangs", [] { hang(); });
          stage.on_stop("stop", diary.entry(std::string("stop of ") + name));
        }
        coordinator.spawn("hangs", [] { hang(); });
      },
      [&](const ShutdownReport& report) {
        expect(diary.text() == "stop of second\nstop of third\nstop of fourth\n", diary.text());
        for (const char* const name : {"service", "second", "third", "fourth"}) {
          const lastcall::Event* const stage =
              support::find_event(report.events, std::string("stage overran ") + name);
          if (!expect(stage != nullptr, std::string(name) + " overran")) continue;
          // A quarter each; how much later they are is the machine's affair.
          expect(stage->end - stage->begin > 150ms, std::string(name) + " had its turn");
        }
        expect_equal(report.stragglers.size(), std::size_t{4}, "stragglers");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE(
    "more hung hooks than anybody has threads for: drain() still returns, and says who was "
    "skipped") {
  std::atomic<int> called{0};
  const Ended ended = drained(
      quiet(2500ms),
      [&](ShutdownCoordinator& coordinator) {
        for (int number = 0; number < 100; ++number) {
          coordinator.on_stop("hook " + std::to_string(number), [&] {
            ++called;
            hang();
          });
        }
      },
      [&](const ShutdownReport& report) {
        expect(called > 3, "some were called");
        expect(report.outcome == Outcome::overrun, "an overrun");
        const std::string story = story_of(report.events, {EventKind::hook});
        const std::size_t overran = support::count_of(story, "hook overran ");
        const std::size_t skipped = support::count_of(story, "hook skipped ");
        expect_equal(overran + skipped, std::size_t{100}, "hooks told of");
        expect_equal(overran, static_cast<std::size_t>(called), "hooks that overran");
        expect_equal(report.stragglers.size(), overran, "stragglers");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a hook that ends its thread (pthread_exit) doesn't take the drain with it") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  Diary diary;
  const Ended ended = drained(
      quiet(2000ms),
      [&](ShutdownCoordinator& coordinator) {
        coordinator.on_stop("ends its thread", [] { ::pthread_exit(nullptr); });
        coordinator.on_stop("after", diary.entry("after"));
        coordinator.stage("second", 300ms).on_drained("release", diary.entry("release of second"));
      },
      [&](const ShutdownReport& report) {
        expect(diary.text() == "after\nrelease of second\n", diary.text());
        expect_line(report, "stage ok second");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("an observer that ends its thread after a hook is not taken for the hook") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  Diary diary;
  ShutdownOptions options = quiet(2000ms);
  options.observer = std::make_shared<support::Witness>([](const lastcall::Event& event) {
    if (event.kind == EventKind::hook && event.name == "first" &&
        event.result == lastcall::EventResult::ok) {
      ::pthread_exit(nullptr);
    }
  });
  const Ended ended = drained(
      options,
      [&](ShutdownCoordinator& coordinator) {
        coordinator.on_stop("first", diary.entry("first"));
        coordinator.on_stop("second", diary.entry("second"));
      },
      [&](const ShutdownReport& report) {
        expect(diary.text() == "first\nsecond\n", diary.text());
        int ended_first = 0;
        for (const lastcall::Event& event : report.events) {
          if (event.name != "first" || event.result == lastcall::EventResult::begun) continue;
          ++ended_first;
          expect(event.detail.empty(), "nothing to say of it, but " + event.detail);
        }
        expect_equal(ended_first, 1, "ends of the first hook");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("hooks, callbacks and tasks of a drain may ask for shutdown, spawn, enter and wait") {
  Diary diary;
  ShutdownOptions options = quiet(60s);
  const Ended ended = drained(
      options,
      [&](ShutdownCoordinator& coordinator) {
        Stage& second = coordinator.stage("second", 10s);
        const auto do_all = [&coordinator, &second, &diary](const char* who) {
          if (coordinator.request_shutdown()) diary.add("asked twice");
          second.spawn("spawned", [&diary] { diary.add("spawned"); });
          const WaitGroup::Guard guard = second.try_enter("guard");
          if (!guard) diary.add("refused");
          coordinator.snapshot();
          diary.add(who);
        };
        new lastcall::CancellationCallback(coordinator.token(), [do_all] { do_all("callback"); });
        coordinator.on_stop("hook", [do_all] { do_all("on_stop"); });
        coordinator.on_drained("hook", [do_all] { do_all("on_drained"); });
        coordinator.spawn("task", [do_all](const CancellationToken& token) {
          token.wait();
          do_all("task");
        });
      },
      [&](const ShutdownReport& report) {
        expect(report.outcome == Outcome::clean, "clean");
        for (const char* const who : {"callback", "on_stop", "on_drained", "task"}) {
          expect(diary.has(who), who);
        }
        expect(!diary.has("asked twice") && !diary.has("refused"), diary.text());
        expect_equal(support::count_of(diary.text(), "spawned\n"), std::size_t{4}, "spawned tasks");
      });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// ---- last words ----------------------------------------------------------------------------------------

namespace {

// A child that hangs in several ways and is forced; what `options.last_words` got.
Ended forced(const ShutdownOptions& options) {
  Child child = Child::run([&options] {
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("hung worker", [&](const CancellationToken& token) {
      token.wait();
      say("cancelled\n");
      coordinator.abort_token().wait();
      say("aborted\n");
      hang();
    });
    const WaitGroup::Guard named =
        coordinator.stage("storage", 1s).enter("a \"guard\"\nof two lines");
    const WaitGroup::Guard unnamed[] = {coordinator.enter(), coordinator.enter()};
    coordinator.on_stop("hung hook", [] { hang(); });
    say("ready\n");
    coordinator.run();
  });
  if (!child.prints("ready\n")) return {"never ready", "", ""};
  child.send(SIGTERM);
  if (!child.prints("cancelled\n")) return {"never cancelled", "", ""};
  std::this_thread::sleep_for(50ms);  // into the hook
  child.send(SIGINT);
  if (!child.prints("aborted\n")) return {"never aborted", "", ""};
  std::this_thread::sleep_for(10ms);
  child.send(SIGINT);
  return child.end();
}

ShutdownOptions forceful() {
  ShutdownOptions options = quiet(100s);
  options.abort_margin = 40s;
  options.repeat_window = 1ms;
  return options;
}

}  // namespace

TEST_CASE("a forced end names its stragglers on the descriptor given, in whole lines") {
  ShutdownOptions options = forceful();
  options.last_words = STDERR_FILENO;
  const Ended ended = forced(options);
  INFO(ended.err);
  CHECK(ended.how == "exit 130");
  CHECK(contains(ended.err, "'hung hook' of stage 'service'"));
  CHECK(contains(ended.err, "'hung worker' of stage 'service'"));
  CHECK(contains(ended.err, "coordinator_hangs_test.cpp:"));
  CHECK(contains(ended.err, "2 unnamed of stage 'service'\n"));
  CHECK(contains(ended.err, "of stage 'storage'"));
#if LASTCALL_LINUX
  CHECK(support::tells_pause(ended.err));
#endif
  // A newline in a name forges no line.
  CHECK_FALSE(contains(ended.err, "\nof two lines"));
  REQUIRE_FALSE(ended.err.empty());
  CHECK(ended.err.back() == '\n');
  std::size_t begin = 0;
  for (std::size_t end = ended.err.find('\n'); end != std::string::npos;
       end = ended.err.find('\n', begin)) {
    CHECK(support::starts_with(ended.err.substr(begin, end - begin), "lastcall: "));
    begin = end + 1;
  }
}

TEST_CASE("main that never comes is named by last words where the observer throws") {
  const Ended ended = in_a_process([] {
    ShutdownOptions options = quiet(400ms);
    options.last_words = STDERR_FILENO;
    options.observer = std::make_shared<support::Witness>([](const lastcall::Event&) { throw 1; });
    ShutdownCoordinator coordinator(options);
    coordinator.request_shutdown();
    hang();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 124");
  CHECK(contains(ended.err, "lastcall:   'main', "));
  CHECK(support::count_of(ended.err, "'main'") == 1);
}

TEST_CASE("whoever is in is named also if the observer ends its thread each time (pthread_exit)") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  const Ended ended = in_a_process([] {
    ShutdownOptions options = quiet(500ms);
    options.abort_margin = 100ms;
    options.last_words = STDERR_FILENO;
    options.observer =
        std::make_shared<support::Witness>([](const lastcall::Event&) { ::pthread_exit(nullptr); });
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("held worker", [] { hang(); });
    coordinator.on_drained("release", [] {});
    coordinator.request_shutdown();
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 124");
  CHECK(support::count_of(ended.err, "'held worker' of stage 'service'") == 1);
}

TEST_CASE("whoever is in is named also if no thread is left that might call the observer") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  const Ended ended = in_a_process([] {
    ShutdownOptions options = quiet(1500ms);
    options.abort_margin = 100ms;
    options.last_words = STDERR_FILENO;
    options.observer = std::make_shared<support::Witness>();
    ShutdownCoordinator coordinator(options);
    coordinator.spawn("held worker", [] { hang(); });
    for (int number = 0; number < 70; ++number) {
      coordinator.on_stop("ends its thread", [] { ::pthread_exit(nullptr); });
    }
    coordinator.request_shutdown();
    coordinator.run();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 124");
  CHECK(support::count_of(ended.err, "'held worker' of stage 'service'") == 1);
}

TEST_CASE("last words go to another descriptor, or nowhere") {
  ShutdownOptions options = forceful();
  options.last_words = STDOUT_FILENO;
  const Ended elsewhere = forced(options);
  CHECK(contains(elsewhere.out, "'hung hook'"));
  CHECK(elsewhere.err.empty());

  options.last_words = -1;
  const Ended nowhere = forced(options);
  CHECK(nowhere.how == "exit 130");
  CHECK(nowhere.out == "ready\ncancelled\naborted\n");
  CHECK(nowhere.err.empty());

  options.last_words = 4095;  // nobody has that one
  CHECK(forced(options).how == "exit 130");
}
