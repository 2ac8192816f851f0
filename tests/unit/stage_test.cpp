// Stages and hooks: their order, their budgets, what is refused when. What hangs is in
// tests/process/coordinator_hangs_test.cpp.
#include <lastcall/stage.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/threads.hpp"

#include <lastcall/shutdown_coordinator.hpp>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::EventKind;
using lastcall::EventResult;
using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using lastcall::Stage;
using lastcall::WaitGroup;
using support::contains;
using support::Diary;
using support::quiet;
using support::refusal;
using support::starts_with;
using support::story_of;

TEST_CASE("the stages stop in the order declared, the first being the coordinator itself") {
  ShutdownCoordinator coordinator(quiet());
  Diary diary;
  Stage& second = coordinator.stage("second", 1s);
  Stage& third = coordinator.stage("third", 1s);
  // Registered in another order than they stop in.
  third.on_stop("stop", diary.entry("third stops"));
  third.on_drained("drained", diary.entry("third drained"));
  second.on_drained("drained", diary.entry("second drained"));
  coordinator.on_drained("drained", diary.entry("first drained"));
  second.on_stop("stop", diary.entry("second stops"));
  coordinator.on_stop("stop", diary.entry("first stops"));
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(diary.text() ==
        "first stops\nfirst drained\nsecond stops\nsecond drained\nthird stops\nthird drained\n");
  CHECK(story_of(report.events) ==
        "phase begun announced\n"
        "phase begun draining\n"
        "stage begun service\n"
        "hook begun service/stop\nhook ok service/stop\n"
        "hook begun service/drained\nhook ok service/drained\n"
        "stage ok service\n"
        "stage begun second\n"
        "hook begun second/stop\nhook ok second/stop\n"
        "hook begun second/drained\nhook ok second/drained\n"
        "stage ok second\n"
        "stage begun third\n"
        "hook begun third/stop\nhook ok third/stop\n"
        "hook begun third/drained\nhook ok third/drained\n"
        "stage ok third\n"
        "phase begun finished\n");
  CHECK(report.outcome == Outcome::clean);
}

TEST_CASE("begun events have no length, and every event's times are in order") {
  ShutdownCoordinator coordinator(quiet());
  coordinator.stage("second", 1s).on_stop("hook", [] {});
  coordinator.on_drained("hook", [] { std::this_thread::sleep_for(2ms); });
  coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); });
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  lastcall::Clock::time_point last = report.events.front().end;
  for (const lastcall::Event& event : report.events) {
    INFO(support::line_of(event));
    if (event.result == EventResult::begun) CHECK(event.end == event.begin);
    CHECK(event.end >= event.begin);
    if (event.kind != EventKind::task) {  // those are told by threads of their own
      CHECK(event.end >= last);
      last = event.end;
    }
  }
  const lastcall::Event* const hook = support::find_event(report.events, "hook ok service/hook");
  REQUIRE(hook != nullptr);
  CHECK(hook->end - hook->begin >= 2ms);
}

TEST_CASE("on_stop hooks run in the order registered, on_drained hooks newest first") {
  ShutdownCoordinator coordinator(quiet());
  Diary diary;
  for (const char* const name : {"a", "b", "c"}) {
    coordinator.on_stop(name, diary.entry(std::string("stop ") + name));
    coordinator.on_drained(name, diary.entry(std::string("drained ") + name));
  }
  coordinator.request_shutdown();
  coordinator.drain();
  CHECK(diary.text() == "stop a\nstop b\nstop c\ndrained c\ndrained b\ndrained a\n");
}

TEST_CASE(
    "a stage's token is cancelled before its callbacks, those before its on_stop hooks, those "
    "before its group is closed, and on_drained comes after the last member") {
  ShutdownCoordinator coordinator(quiet());
  Diary diary;
  const CancellationToken token = coordinator.token();
  const lastcall::CancellationCallback callback(token, [&] {
    diary.add(token.is_cancelled() ? "callback, cancelled" : "callback too early");
  });
  WaitGroup::Guard late;
  coordinator.on_stop("stop", [&] {
    late = coordinator.try_enter("late guard");
    diary.add(late ? "stop, still open" : "stop, closed");
  });
  coordinator.on_drained("drained", [&] {
    diary.add(coordinator.try_enter() ? "drained, still open" : "drained, closed");
  });
  support::Gate leave;
  REQUIRE(coordinator.spawn("task", [&] {
    leave.wait();
    diary.add("task leaves");
    late.release();
  }));
  coordinator.request_shutdown();
  // Nothing can be drained as long as the task is in.
  REQUIRE(support::eventually([&] { return diary.has("stop, still open"); }));
  leave.open();
  coordinator.drain();
  CHECK(diary.text() == "callback, cancelled\nstop, still open\ntask leaves\ndrained, closed\n");
}

TEST_CASE("the next stage's token is not cancelled before the stage before it is through") {
  ShutdownCoordinator coordinator(quiet());
  Diary diary;
  Stage& second = coordinator.stage("second", 5s);
  REQUIRE(coordinator.spawn("first", [&](const CancellationToken& token) {
    token.wait();
    std::this_thread::sleep_for(20ms);
    diary.add(second.token().is_cancelled() ? "second cancelled too early" : "second still works");
  }));
  REQUIRE(second.spawn("second", [&](const CancellationToken& token) {
    token.wait();
    diary.add("second stops");
  }));
  coordinator.on_drained("check", [&] {
    diary.add(second.token().is_cancelled() ? "second cancelled too early" : "second works on");
    diary.add(second.try_enter() ? "second still open" : "second closed too early");
  });
  second.on_stop("check", [&] { diary.add("on_stop of second"); });
  CHECK_FALSE(second.token() == coordinator.token());
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
  const std::string text = diary.text();
  INFO(text);
  CHECK(starts_with(text, "second still works\nsecond works on\nsecond still open\n"));
  CHECK(contains(text, "second stops\n"));
  CHECK(contains(text, "on_stop of second\n"));
}

TEST_CASE("every stage's token is cancelled with the cause of the shutdown") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("second", 1s);
  coordinator.request_shutdown(lastcall::Cause::cancelled("maintenance"));
  coordinator.drain();
  CHECK(coordinator.token().cause().message() == "maintenance");
  CHECK(second.token().cause().message() == "maintenance");
}

TEST_CASE("what a stage doesn't use of its budget costs nobody anything") {
  ShutdownOptions options = quiet(50s);
  ShutdownCoordinator coordinator(options);
  for (int number = 0; number < 9; ++number) coordinator.stage(std::to_string(number), 5s);
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(report.elapsed < 20s);
  CHECK(report.outcome == Outcome::clean);
}

TEST_CASE(
    "stage() refuses a budget that leaves nothing for the first stage, and says what is left") {
  ShutdownOptions options = quiet(1000ms);
  options.announce_delay = 100ms;
  options.abort_margin = 200ms;
  ShutdownCoordinator coordinator(options);
  const auto stage = [&](const char* name, std::chrono::milliseconds budget) {
    return refusal([&] { coordinator.stage(name, budget); });
  };
  // 1000 - 100 - 200 ms are the first one's.
  const std::string all = stage("all", 700ms);
  INFO(all);
  CHECK(starts_with(all, "invalid_argument: "));
  CHECK(contains(all, "all"));
  CHECK(contains(all, "700"));
  CHECK(stage("most", 600ms) == "nothing");
  CHECK(starts_with(stage("rest", 100ms), "invalid_argument: "));
  CHECK(stage("nearly the rest", 99ms) == "nothing");
  CHECK(starts_with(stage("one more", 1ms), "invalid_argument: "));
  CHECK(starts_with(stage("for ever", std::chrono::milliseconds::max()), "invalid_argument: "));
}

TEST_CASE("the abort margin is at most half of what the announce delay leaves") {
  ShutdownOptions options = quiet(1000ms);
  options.announce_delay = 200ms;
  options.abort_margin = 10min;
  ShutdownCoordinator coordinator(options);
  // 800 ms are left, 400 of them are the margin.
  CHECK(starts_with(refusal([&] { coordinator.stage("all", 400ms); }), "invalid_argument: "));
  CHECK(refusal([&] { coordinator.stage("most", 399ms); }) == "nothing");
}

TEST_CASE("who leaves at the abort has half of the abort margin for it, however small that is") {
  for (const auto grace : {100ms, 1000ms, 25000ms}) {
    for (const auto margin : {1ms, 10ms, 30ms, 50ms, 100ms, 2000ms}) {
      INFO(grace.count() << " ms, of which " << margin.count());
      ShutdownOptions options = quiet(grace);
      options.abort_margin = margin;
      lastcall::detail::EngineState state(options);
      const lastcall::Clock::time_point end = lastcall::Clock::now() + grace;
      state.end_at.store(end);
      CHECK(state.wait_until() - (end - state.margin) >= state.margin / 2);
      CHECK(state.wait_until() < end);
    }
  }
}

TEST_CASE("without an abort margin, too, the report has time of its own before the end") {
  for (const auto grace : {100ms, 1000ms, 25000ms}) {
    INFO(grace.count() << " ms");
    ShutdownOptions options = quiet(grace);
    options.abort_margin = 0ms;
    lastcall::detail::EngineState state(options);
    const lastcall::Clock::time_point end = lastcall::Clock::now() + grace;
    state.end_at.store(end);
    CHECK(end - state.wait_until() == std::min<lastcall::Clock::duration>(grace / 20, 50ms));
  }
}

TEST_CASE("stage() refuses no budget at all and a negative one") {
  ShutdownCoordinator coordinator(quiet());
  for (const auto budget : {0ms, -5ms, std::chrono::milliseconds::min()}) {
    const std::string words = refusal([&] { coordinator.stage("db", budget); });
    INFO(words);
    CHECK(starts_with(words, "invalid_argument: "));
    CHECK(contains(words, std::to_string(budget.count())));
  }
  CHECK(refusal([&] { coordinator.stage("db", 1ms); }) == "nothing");
}

TEST_CASE("stage() refuses a name that is taken, \"service\" being the first stage's") {
  ShutdownCoordinator coordinator(quiet());
  coordinator.stage("db", 1s);
  for (const char* const name : {"db", "service"}) {
    const std::string words = refusal([&] { coordinator.stage(name, 1s); });
    INFO(words);
    CHECK(starts_with(words, "invalid_argument: "));
    CHECK(contains(words, name));
  }
  CHECK(refusal([&] { coordinator.stage("cache", 1s); }) == "nothing");
}

TEST_CASE("stage() after the request is a logic error, at once and after the drain") {
  ShutdownOptions options = quiet();
  options.announce_delay = 50ms;
  ShutdownCoordinator coordinator(options);
  coordinator.request_shutdown();
  const std::string during = refusal([&] { coordinator.stage("late", 1s); });
  INFO(during);
  CHECK(starts_with(during, "logic_error: "));
  CHECK(contains(during, "late"));
  coordinator.drain();
  CHECK(starts_with(refusal([&] { coordinator.stage("later", 1s); }), "logic_error: "));
}

namespace {

// What a thread does in its next allocation, as if it had been left without the processor there.
std::function<void()>* before_allocation = nullptr;
thread_local bool stops_at_allocation = false;
bool stop_here() noexcept {
  if (std::exchange(stops_at_allocation, false)) (*before_allocation)();
  return false;
}

}  // namespace

TEST_CASE("stage() that comes to its end when the drain has been through the stages is refused") {
  if (!support::can_refuse_allocations) return;
  ShutdownCoordinator coordinator(quiet());
  std::thread drainer;
  std::function<void()> drain = [&] {
    drainer = std::thread([&] { coordinator.drain(); });
    coordinator.request_shutdown();
    support::eventually([&] { return coordinator.phase() == lastcall::Phase::finished; });
  };
  before_allocation = &drain;
  support::refusal_rule = &stop_here;
  std::string name = "a name that is longer than what a string holds without an allocation";
  stops_at_allocation = true;
  const std::string words = refusal([&] { coordinator.stage(std::move(name), 1s); });
  support::refusal_rule = nullptr;
  drainer.join();
  INFO(words);
  CHECK(starts_with(words, "logic_error: "));
  CHECK(contains(words, "a name that is longer"));
  CHECK(coordinator.phase() == lastcall::Phase::finished);
}

TEST_CASE("a stage's name is as given, and a reference to it stays good when others are declared") {
  ShutdownCoordinator coordinator(quiet());
  std::vector<Stage*> stages;
  for (int number = 0; number < 100; ++number) {
    stages.push_back(&coordinator.stage("stage " + std::to_string(number), 10ms));
  }
  for (int number = 0; number < 100; ++number) {
    CHECK(stages[static_cast<std::size_t>(number)]->name() == "stage " + std::to_string(number));
  }
}

TEST_CASE("an on_stop registered after its stage's cancel runs at once on the caller") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("second", 5s);
  coordinator.request_shutdown();
  REQUIRE(coordinator.token().is_cancelled());
  std::thread::id ran_on;
  coordinator.on_stop("late", [&] { ran_on = std::this_thread::get_id(); });
  CHECK(ran_on == std::this_thread::get_id());
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::clean);
  CHECK(support::find_event(report.events, "hook ok service/late") != nullptr);

  bool also_after_the_drain = false;
  second.on_stop("very late", [&] { also_after_the_drain = true; });
  CHECK(also_after_the_drain);
}

TEST_CASE("a late on_stop is told after the request, however early it ran") {
  for (int round = 0; round < 20; ++round) {
    ShutdownCoordinator coordinator(quiet());
    coordinator.request_shutdown();
    coordinator.on_stop("late", [] {});
    const ShutdownReport report = coordinator.drain();
    const std::string story =
        story_of(report.events, {EventKind::phase, EventKind::hook}).substr(0, 21);
    CHECK(story == "phase begun announced");
  }
}

TEST_CASE("a late on_stop that throws is written down, and goes no further") {
  ShutdownCoordinator coordinator(quiet());
  coordinator.request_shutdown();
  CHECK(refusal([&] {
          coordinator.on_stop("late", [] { throw std::runtime_error("no such socket"); });
        }) == "nothing");
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::failed);
  CHECK(report.exit_code == 1);
  const lastcall::Event* const event =
      support::find_event(report.events, "hook failed service/late");
  REQUIRE(event != nullptr);
  CHECK(contains(event->detail, "no such socket"));
  REQUIRE(report.failures.size() == 1);
  CHECK(report.failures[0].task == "late");
}

TEST_CASE("during the announce delay an on_stop waits for its turn") {
  ShutdownOptions options = quiet();
  options.announce_delay = 10s;
  ShutdownCoordinator coordinator(options);
  coordinator.request_shutdown();
  std::atomic<bool> ran{false};
  coordinator.on_stop("in time", [&] { ran = true; });
  CHECK_FALSE(ran);
  ::kill(::getpid(), SIGINT);  // ends the delay
  coordinator.drain();
  CHECK(ran);
}

TEST_CASE("on_drained after the drain is a logic error") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("second", 1s);
  coordinator.request_shutdown();
  coordinator.drain();
  for (const auto& on_drained :
       {std::function<void()>([&] { coordinator.on_drained("late", [] {}); }),
        std::function<void()>([&] { second.on_drained("late", [] {}); })}) {
    const std::string words = refusal(on_drained);
    INFO(words);
    CHECK(starts_with(words, "logic_error: "));
    CHECK(contains(words, "late"));
  }
}

TEST_CASE("on_drained before the drain reaches it is taken, also from an on_stop hook or a task") {
  ShutdownCoordinator coordinator(quiet());
  Diary diary;
  coordinator.on_stop("stop", [&] { coordinator.on_drained("by hook", diary.entry("by hook")); });
  REQUIRE(coordinator.spawn("task", [&](const CancellationToken& token) {
    token.wait();
    coordinator.on_drained("by task", diary.entry("by task"));
  }));
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
  CHECK(diary.has("by hook"));
  CHECK(diary.has("by task"));
}

TEST_CASE("a hook that throws is written down, the rest still run, and the outcome is failed") {
  ShutdownCoordinator coordinator(quiet());
  Diary diary;
  Stage& second = coordinator.stage("second", 1s);
  coordinator.on_stop("a", [] { throw std::runtime_error("first trouble"); });
  coordinator.on_stop("b", diary.entry("b"));
  coordinator.on_drained("c", diary.entry("c"));
  coordinator.on_drained("d", [] { throw 5; });
  second.on_stop("e", diary.entry("e"));
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(diary.text() == "b\nc\ne\n");
  CHECK(report.outcome == Outcome::failed);
  CHECK(report.exit_code == 1);
  const lastcall::Event* const event = support::find_event(report.events, "hook failed service/a");
  REQUIRE(event != nullptr);
  CHECK(contains(event->detail, "first trouble"));
  CHECK(support::find_event(report.events, "hook failed service/d") != nullptr);
  CHECK(support::find_event(report.events, "stage ok service") != nullptr);
  REQUIRE(report.failures.size() == 2);
  CHECK(report.failures[0].task == "a");
  CHECK(report.failures[1].task == "d");
  CHECK_THROWS_AS(std::rethrow_exception(report.failures[0].error), std::runtime_error);
  CHECK_THROWS_AS(std::rethrow_exception(report.failures[1].error), int);
}

TEST_CASE("an empty function is an invalid argument, whichever hook it was for") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("second", 1s);
  using Register = std::function<void()>;
  for (const Register& call : {Register([&] { coordinator.on_stop("nothing", nullptr); }),
                               Register([&] { coordinator.on_drained("nothing", nullptr); }),
                               Register([&] { second.on_stop("nothing", nullptr); }),
                               Register([&] { second.on_drained("nothing", nullptr); }),
                               Register([&] { coordinator.on_signal(SIGHUP, nullptr); })}) {
    CHECK(starts_with(refusal(call), "invalid_argument: "));
  }
}

TEST_CASE("once its stage is closed nobody enters it, but for copies of a guard that is in") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("second", 5s);
  WaitGroup::Guard inside = coordinator.enter("inside");
  std::string refused;
  WaitGroup::Guard copy;
  second.on_stop("unused", [] {});
  REQUIRE(coordinator.spawn("task", [&](const CancellationToken& token) {
    token.wait();
    while (coordinator.try_enter()) std::this_thread::sleep_for(1ms);  // until it is closed
    refused += refusal([&] { coordinator.enter(); }) + "\n";
    refused += refusal([&] { coordinator.enter("named"); }) + "\n";
    if (coordinator.try_enter("named")) refused += "try_enter\n";
    if (coordinator.spawn("more", [] {})) refused += "spawn\n";
    auto wrapped = coordinator.wrap("wrapped", [&] { refused += "wrapped ran\n"; });
    if (wrapped) refused += "wrap\n";
    wrapped();
    if (!second.spawn("other stage", [] {})) refused += "second refuses\n";
    if (!second.try_enter()) refused += "second refuses\n";
    copy = inside;
    inside.release();
    if (!copy) refused += "no copy\n";
    copy.release();
  }));
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
  INFO(refused);
  CHECK(support::count_of(refused, "logic_error: ") == 2);
  CHECK(support::count_of(refused, "\n") == 2);
  CHECK_FALSE(second.try_enter());
}

TEST_CASE("a stage's tasks get its token, and all kinds of members are waited for") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("second", 5s);
  Diary diary;
  REQUIRE(second.spawn("takes a token", [&](const CancellationToken& token) {
    if (token == second.token()) diary.add("its own token");
    token.wait();
  }));
  REQUIRE(second.spawn("takes nothing", [&] { second.token().wait(); }));
  auto wrapped = second.wrap("wrapped", [&](const CancellationToken& token) {
    token.wait();
    std::this_thread::sleep_for(5ms);
    diary.add("wrapped is through");
  });
  REQUIRE(wrapped);
  std::thread executor(wrapped);
  wrapped = {};
  WaitGroup::Guard guard = second.enter();
  std::thread unnamed([&] {
    second.token().wait();
    std::this_thread::sleep_for(10ms);
    diary.add("guard leaves");
    guard.release();
  });
  second.on_drained("all out", diary.entry("all out"));
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  executor.join();
  unnamed.join();
  CHECK(report.outcome == Outcome::clean);
  const std::string text = diary.text();
  INFO(text);
  CHECK(starts_with(text, "its own token\n"));
  CHECK(contains(text, "wrapped is through\n"));
  CHECK(contains(text, "guard leaves\nall out\n"));
}

TEST_CASE("a wrapped callable that is dropped without having run is not waited for") {
  ShutdownCoordinator coordinator(quiet());
  {
    auto never = coordinator.wrap("never", [] {});
    CHECK(never);
    CHECK(coordinator.snapshot().size() == 1);
  }
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
}

TEST_CASE("threads may enter and leave a stage while it drains") {
  ShutdownCoordinator coordinator(quiet());
  std::atomic<bool> stop{false};
  std::atomic<int> inside{0};
  std::atomic<bool> too_late{false};
  coordinator.on_drained("nobody is in", [&] {
    if (inside != 0) too_late = true;
  });
  support::Threads threads;
  for (int number = 0; number < 3; ++number) {
    threads.start([&] {
      while (!stop) {
        const WaitGroup::Guard guard = coordinator.try_enter();
        if (!guard) return;
        ++inside;
        --inside;
      }
    });
  }
  std::this_thread::sleep_for(5ms);
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
  stop = true;
  threads.join();
  CHECK_FALSE(too_late);
}
