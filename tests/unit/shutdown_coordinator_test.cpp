// The coordinator inside one process that goes on afterwards: phases, causes, outcomes, reports,
// snapshots, observers, who may call what. Signals, exits and hangs are in
// tests/process/coordinator_*_test.cpp.
#include <lastcall/shutdown_coordinator.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/emulation.hpp"
#include "support/foreign.hpp"
#include "support/json_check.hpp"
#include "support/threads.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::EventKind;
using lastcall::EventResult;
using lastcall::Outcome;
using lastcall::Phase;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using lastcall::SignalInfo;
using lastcall::Stage;
using lastcall::Straggler;
using lastcall::WaitGroup;
using support::contains;
using support::Diary;
using support::eventually;
using support::quiet;
using support::refusal;
using support::starts_with;
using support::story_of;
using support::Witness;

static_assert(!std::is_copy_constructible_v<ShutdownCoordinator>);
static_assert(!std::is_move_constructible_v<ShutdownCoordinator>);
static_assert(noexcept(std::declval<ShutdownCoordinator&>().request_shutdown(Cause())));
static_assert(noexcept(std::declval<const ShutdownCoordinator&>().token()));
static_assert(noexcept(std::declval<const ShutdownCoordinator&>().abort_token()));
static_assert(noexcept(std::declval<const ShutdownCoordinator&>().phase()));
static_assert(noexcept(std::declval<const ShutdownCoordinator&>().is_ready()));
static_assert(noexcept(std::declval<ShutdownCoordinator&>().try_enter()));

TEST_CASE("before the request it is running and ready, and no token is cancelled") {
  ShutdownCoordinator coordinator(quiet());
  CHECK(coordinator.phase() == Phase::running);
  CHECK(coordinator.is_ready());
  CHECK_FALSE(coordinator.token().is_cancelled());
  CHECK_FALSE(coordinator.abort_token().is_cancelled());
  CHECK(coordinator.token().can_be_cancelled());
  CHECK(coordinator.abort_token().can_be_cancelled());
  CHECK_FALSE(coordinator.token() == coordinator.abort_token());
}

TEST_CASE("a request is announced at once; the token is cancelled after the announce delay") {
  ShutdownOptions options = quiet();
  options.announce_delay = 150ms;
  ShutdownCoordinator coordinator(options);
  const support::Stopwatch watch;
  CHECK(coordinator.request_shutdown());
  CHECK_FALSE(coordinator.is_ready());
  CHECK(coordinator.phase() >= Phase::announced);
  // Whoever finds it cancelled this early has found a bug; whoever is late to look finds nothing.
  if (watch.elapsed() < 100ms) {
    CHECK(coordinator.phase() == Phase::announced);
    const bool cancelled = coordinator.token().is_cancelled();
    if (watch.elapsed() < 140ms) CHECK_FALSE(cancelled);
    const bool open = static_cast<bool>(coordinator.try_enter());
    if (watch.elapsed() < 140ms) CHECK(open);  // still serving
  }
  REQUIRE(coordinator.token().wait_for(support::patience));
  CHECK(watch.elapsed() >= 149ms);
  CHECK(coordinator.phase() >= Phase::draining);
  const ShutdownReport report = coordinator.drain();
  CHECK(coordinator.phase() == Phase::finished);
  CHECK_FALSE(coordinator.is_ready());
  CHECK(story_of(report.events, {EventKind::phase}) ==
        "phase begun announced\nphase begun draining\nphase begun finished\n");
  CHECK(report.events[1].begin - report.events[0].begin >= 149ms);
}

TEST_CASE("a task's event says from when until when it ran") {
  ShutdownCoordinator coordinator(quiet());
  REQUIRE(coordinator.spawn("nap", [] { std::this_thread::sleep_for(30ms); }));
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  const auto event = std::find_if(report.events.begin(), report.events.end(), [](const auto& one) {
    return one.kind == EventKind::task && one.result == EventResult::ok;
  });
  REQUIRE(event != report.events.end());
  CHECK(event->end - event->begin >= 30ms);
  CHECK(event->end <= lastcall::Clock::now());
}

TEST_CASE("while a hook takes its time nobody uses the processor, whoever asked") {
  const bool by_signal = GENERATE(false, true);
  ShutdownCoordinator coordinator(quiet());
  coordinator.on_stop("slow", [] { std::this_thread::sleep_for(500ms); });
  const auto before = support::cpu_time_of_process();
  if (by_signal) {
    std::raise(SIGTERM);
  } else {
    coordinator.request_shutdown();
  }
  coordinator.drain();
  if (!support::under_sanitizer) CHECK(support::cpu_time_of_process() - before < 100ms);
}

TEST_CASE("without an announce delay the token is cancelled when request_shutdown() returns") {
  ShutdownCoordinator coordinator(quiet());
  const CancellationToken token = coordinator.token();
  coordinator.request_shutdown();
  CHECK(token.is_cancelled());
  coordinator.drain();
}

TEST_CASE("request_shutdown() is true for the first, and the first cause stays") {
  ShutdownCoordinator coordinator(quiet());
  CHECK(coordinator.request_shutdown(Cause::cancelled("upgrade")));
  CHECK_FALSE(coordinator.request_shutdown(Cause::cancelled("another")));
  CHECK_FALSE(coordinator.request_shutdown());
  const ShutdownReport report = coordinator.drain();
  CHECK_FALSE(coordinator.request_shutdown());
  CHECK(report.cause.kind() == CauseKind::cancelled);
  CHECK(report.cause.message() == "upgrade");
  CHECK(coordinator.token().cause().message() == "upgrade");
}

TEST_CASE("of many threads that request shutdown at once, one is the first") {
  for (int round = 0; round < 20; ++round) {
    ShutdownCoordinator coordinator(quiet());
    support::StartingLine line(4);
    std::atomic<int> first{0};
    std::atomic<int> unlike{0};
    support::Threads threads;
    for (int number = 0; number < 4; ++number) {
      threads.start([&, number] {
        line.ready_steady_go();
        const std::string name = "thread " + std::to_string(number);
        if (coordinator.request_shutdown(Cause::cancelled(name))) {
          ++first;
          if (coordinator.token().cause().message() != name) ++unlike;
        }
      });
    }
    const ShutdownReport report = coordinator.drain();
    threads.join();
    CHECK(first == 1);
    CHECK(unlike == 0);
    CHECK(starts_with(report.cause.message(), "thread "));
  }
}

TEST_CASE("an empty cause means Cause::cancelled(), and no argument \"requested\"") {
  {
    ShutdownCoordinator coordinator(quiet());
    coordinator.request_shutdown(Cause());
    const ShutdownReport report = coordinator.drain();
    CHECK(report.cause.kind() == CauseKind::cancelled);
    CHECK(report.cause.message() == Cause::cancelled().message());
    CHECK(coordinator.token().cause().kind() == CauseKind::cancelled);
  }
  ShutdownCoordinator coordinator(quiet());
  coordinator.request_shutdown();
  CHECK(coordinator.drain().cause.message() == "requested");
}

TEST_CASE("children of the token are cancelled with it, with its cause") {
  ShutdownCoordinator coordinator(quiet());
  const lastcall::CancellationSource child(coordinator.token());
  const lastcall::CancellationSource grandchild(child.token(), 1h);
  coordinator.request_shutdown(Cause::cancelled("bye"));
  CHECK(grandchild.is_cancelled());
  CHECK(grandchild.token().cause().message() == "bye");
  coordinator.drain();
}

TEST_CASE("after a clean drain the abort token is not cancelled") {
  ShutdownCoordinator coordinator(quiet());
  coordinator.request_shutdown();
  coordinator.drain();
  CHECK_FALSE(coordinator.abort_token().is_cancelled());
}

// ---- tasks and outcomes ------------------------------------------------------------------------------

TEST_CASE("a task that throws requests shutdown with Cause::failure, and the outcome is failed") {
  ShutdownCoordinator coordinator(quiet());
  REQUIRE(coordinator.spawn("worker", [](const CancellationToken& token) { token.wait(); }));
  REQUIRE(coordinator.spawn("feeder", [] { throw std::runtime_error("no feed"); }));
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::failed);
  CHECK(report.exit_code == 1);
  CHECK(report.cause.kind() == CauseKind::failure);
  CHECK(contains(report.cause.message(), "no feed"));
  CHECK(contains(report.cause.message(), "feeder"));
  CHECK_THROWS_AS(std::rethrow_exception(report.cause.exception()), std::runtime_error);
  REQUIRE(report.failures.size() == 1);
  CHECK(report.failures[0].task == "feeder");
  CHECK(support::find_event(report.events, "task failed service/feeder") != nullptr);
  CHECK(support::find_event(report.events, "task ok service/worker") != nullptr);
}

TEST_CASE("every failure is in the report, in the order they happened, from whatever stage") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("second", 5s);
  REQUIRE(coordinator.spawn("second", [](const CancellationToken& token) {
    token.wait();
    std::this_thread::sleep_for(5ms);
    throw std::runtime_error("two");
  }));
  coordinator.on_drained("third", [] { throw std::runtime_error("three"); });
  auto wrapped = second.wrap("fourth", [](const CancellationToken& token) {
    token.wait();
    throw std::runtime_error("four");
  });
  std::thread executor(wrapped);
  wrapped = {};
  REQUIRE(coordinator.spawn("first", [] { throw std::runtime_error("one"); }));
  const ShutdownReport report = coordinator.drain();
  executor.join();
  CHECK(report.outcome == Outcome::failed);
  REQUIRE(report.failures.size() == 4);
  CHECK(report.failures[0].task == "first");
  CHECK(report.failures[1].task == "second");
  CHECK(report.failures[2].task == "third");
  CHECK(report.failures[3].task == "fourth");
}

TEST_CASE(
    "a task that throws OperationCancelled after its token was cancelled has simply stopped") {
  ShutdownCoordinator coordinator(quiet());
  REQUIRE(coordinator.spawn("task", [](const CancellationToken& token) {
    token.wait();
    token.throw_if_cancelled();
  }));
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::clean);
  CHECK(report.failures.empty());
  CHECK(support::find_event(report.events, "task ok service/task") != nullptr);
}

TEST_CASE("a task that throws OperationCancelled of somebody else's before that has failed") {
  ShutdownCoordinator coordinator(quiet());
  REQUIRE(coordinator.spawn(
      "task", [] { throw lastcall::OperationCancelled(Cause::deadline_exceeded()); }));
  CHECK(coordinator.drain().outcome == Outcome::failed);
}

TEST_CASE("a request with a failure as its cause makes the outcome failed") {
  ShutdownCoordinator coordinator(quiet());
  coordinator.request_shutdown(
      Cause::failure(std::make_exception_ptr(std::runtime_error("disk full"))));
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::failed);
  CHECK(report.exit_code == 1);
  CHECK(report.cause.message() == "disk full");
  CHECK(report.failures.empty());
}

TEST_CASE("a deadline as the cause is clean") {
  ShutdownCoordinator coordinator(quiet());
  coordinator.request_shutdown(Cause::deadline_exceeded());
  CHECK(coordinator.drain().outcome == Outcome::clean);
}

TEST_CASE("the exit codes are the ones asked for") {
  ShutdownOptions options = quiet();
  options.exit_codes = {3, 4, 5};
  {
    ShutdownCoordinator coordinator(options);
    coordinator.request_shutdown();
    CHECK(coordinator.drain().exit_code == 3);
  }
  {
    ShutdownCoordinator coordinator(options);
    coordinator.on_stop("throws", [] { throw 1; });
    coordinator.request_shutdown();
    CHECK(coordinator.drain().exit_code == 4);
  }
  options.grace_period = support::enough(150ms);
  ShutdownCoordinator coordinator(options);
  WaitGroup::Guard stays = coordinator.enter("stays");
  coordinator.on_stop("throws", [] { throw 1; });
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::overrun);  // over failed
  CHECK(report.exit_code == 5);
}

TEST_CASE("what a task captured is destroyed before the drain is over") {
  struct Captured {
    std::atomic<bool>* gone;
    explicit Captured(std::atomic<bool>& flag) : gone(&flag) {}
    Captured(Captured&& other) noexcept : gone(std::exchange(other.gone, nullptr)) {}
    ~Captured() {
      if (gone == nullptr) return;
      std::this_thread::sleep_for(20ms);
      *gone = true;
    }
  };
  std::atomic<bool> gone{false};
  bool too_early = false;
  ShutdownCoordinator coordinator(quiet());
  coordinator.on_drained("check", [&] { too_early = !gone; });
  REQUIRE(coordinator.spawn(
      "task", [captured = Captured(gone)](const CancellationToken& token) { token.wait(); }));
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
  CHECK_FALSE(too_early);
}

// ---- stop_when_idle -----------------------------------------------------------------------------------

TEST_CASE("with stop_when_idle the last spawned task leaving requests shutdown") {
  ShutdownOptions options = quiet();
  options.stop_when_idle = true;
  ShutdownCoordinator coordinator(options);
  support::Gate gate;
  REQUIRE(coordinator.spawn("first", [&] { gate.wait(); }));
  REQUIRE(coordinator.spawn("second", [] {}));
  // One that leaves while another is in asks for nothing.
  std::this_thread::sleep_for(10ms);
  CHECK(coordinator.is_ready());
  gate.open();
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::clean);
  CHECK(report.cause.kind() == CauseKind::cancelled);
  CHECK_FALSE(report.cause.message().empty());
}

TEST_CASE("with stop_when_idle tasks of every stage count, guards and wrapped ones don't") {
  ShutdownOptions options = quiet();
  options.stop_when_idle = true;
  ShutdownCoordinator coordinator(options);
  Stage& second = coordinator.stage("second", 5s);
  support::Gate gate;
  REQUIRE(second.spawn("in the second", [&] { gate.wait(); }));
  REQUIRE(coordinator.spawn("in the first", [] {}));
  { const WaitGroup::Guard guard = coordinator.enter("guard"); }
  coordinator.wrap("wrapped", [] {})();
  std::this_thread::sleep_for(10ms);
  CHECK(coordinator.is_ready());
  gate.open();
  CHECK(coordinator.drain().outcome == Outcome::clean);
}

TEST_CASE("with stop_when_idle a task that spawns its successor keeps the process going") {
  ShutdownOptions options = quiet();
  options.stop_when_idle = true;
  ShutdownCoordinator coordinator(options);
  std::atomic<int> generations{0};
  std::function<void()> generation = [&] {
    if (++generations < 10) coordinator.spawn("next", generation);
  };
  REQUIRE(coordinator.spawn("first", generation));
  CHECK(coordinator.drain().outcome == Outcome::clean);
  CHECK(generations == 10);
}

TEST_CASE("with stop_when_idle and no task ever spawned nobody asks") {
  ShutdownOptions options = quiet();
  options.stop_when_idle = true;
  ShutdownCoordinator coordinator(options);
  { const WaitGroup::Guard guard = coordinator.enter("guard"); }
  coordinator.wrap("wrapped", [] {})();
  std::this_thread::sleep_for(20ms);
  CHECK(coordinator.is_ready());
  coordinator.request_shutdown();
  CHECK(coordinator.drain().cause.message() == "requested");
}

TEST_CASE("without stop_when_idle the last task leaving changes nothing") {
  ShutdownCoordinator coordinator(quiet());
  REQUIRE(coordinator.spawn("only", [] {}));
  REQUIRE(eventually([&] { return coordinator.snapshot().empty(); }));
  CHECK(coordinator.is_ready());
}

// ---- drain() ------------------------------------------------------------------------------------------

TEST_CASE("drain() called again, or by several threads, gives the same report") {
  ShutdownCoordinator coordinator(quiet());
  std::vector<std::string> reports(3);
  support::Threads threads;
  for (std::string& report : reports) {
    threads.start([&] { report = coordinator.drain().to_json(); });
  }
  std::this_thread::sleep_for(5ms);
  coordinator.on_drained("hook", [] {});
  coordinator.request_shutdown();
  threads.join();
  const std::string again = coordinator.drain().to_json();
  CHECK(contains(again, "hook"));
  for (const std::string& report : reports) CHECK(report == again);
  CHECK(coordinator.drain().to_json() == again);
}

TEST_CASE("from drain()'s return on the dispositions, the mask and the threads are as before") {
  const std::string before = support::dispositions();
  const std::string mask = support::signal_mask();
  const int threads = support::live_threads();
  ShutdownOptions options = quiet();
  options.dump_signal = SIGQUIT;
  ShutdownCoordinator coordinator(options);
  coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
  coordinator.on_signal(SIGRTMIN + 3, [](const SignalInfo&) {});
  CHECK(support::signal_mask() == mask);
  // Each on a line of its own.
  const std::string during = "\n" + support::dispositions();
  for (const int number : {SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGPIPE, SIGRTMIN + 3}) {
    INFO(lastcall::signal_name(number));
    const std::string line = "\n" + std::to_string(number) + ": ";
    CHECK(during.substr(during.find(line), 60) != ("\n" + before).substr(during.find(line), 60));
  }
  REQUIRE(coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); }));
  coordinator.request_shutdown();
  coordinator.drain();
  CHECK(support::dispositions() == before);
  CHECK(support::signal_mask() == mask);
  CHECK(eventually([&] { return support::live_threads() == threads; }));
}

TEST_CASE("a coordinator that has gone leaves neither descriptors nor threads nor dispositions") {
  const auto live_one = [] {
    ShutdownOptions options = quiet();
    options.dump_signal = SIGQUIT;
    options.observer = std::make_shared<Witness>();
    ShutdownCoordinator coordinator(options);
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
    coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); });
    coordinator.stage("second", 1s).on_stop("hook", [] {});
    ::kill(::getpid(), SIGHUP);
    ::kill(::getpid(), SIGQUIT);
  };
  live_one();  // what is made once is made
  const std::string before = support::dispositions();
  const int descriptors = support::open_descriptors();
  const int threads = support::live_threads();
  for (int round = 0; round < 10; ++round) live_one();
  CHECK(support::dispositions() == before);
  CHECK(support::open_descriptors() == descriptors);
  CHECK(eventually([&] { return support::live_threads() <= threads; }));
}

TEST_CASE("after the drain nobody enters, nothing is spawned, and on_signal is a logic error") {
  ShutdownCoordinator coordinator(quiet());
  coordinator.request_shutdown();
  coordinator.drain();
  const int threads = support::live_threads();
  CHECK(starts_with(refusal([&] { coordinator.enter(); }), "logic_error: "));
  CHECK_FALSE(coordinator.try_enter("late"));
  CHECK_FALSE(coordinator.spawn("late", [] {}));
  CHECK(starts_with(refusal([&] { coordinator.on_signal(SIGHUP, [](const SignalInfo&) {}); }),
                    "logic_error: "));
  CHECK(support::live_threads() <= threads);
  CHECK(coordinator.snapshot().empty());
}

TEST_CASE(
    "drain() and run() are a logic error from a task, a hook, a callback, an observer, an "
    "on_signal function and a late on_stop") {
  std::string refusals;
  std::atomic<int> asked{0};
  std::mutex mutex;
  ShutdownCoordinator* the_coordinator = nullptr;
  const auto ask = [&](const char* from) {
    const std::string drain = refusal([&] { the_coordinator->drain(); });
    const std::string run = refusal([&] { the_coordinator->run(); });
    const std::lock_guard<std::mutex> lock(mutex);
    refusals += std::string(from) + " drain: " + drain + "\n" + from + " run: " + run + "\n";
    ++asked;
  };
  ShutdownOptions options = quiet();
  std::atomic<bool> observed{false};
  options.observer = std::make_shared<Witness>([&](const lastcall::Event&) {
    if (!observed.exchange(true)) ask("observer");
  });
  ShutdownCoordinator coordinator(options);
  the_coordinator = &coordinator;
  Stage& second = coordinator.stage("second", 5s);
  coordinator.on_stop("on_stop", [&] { ask("on_stop"); });
  second.on_stop("on_stop of second", [&] { ask("on_stop of second"); });
  coordinator.on_drained("on_drained", [&] { ask("on_drained"); });
  coordinator.on_signal(SIGHUP, [&](const SignalInfo&) { ask("on_signal"); });
  const lastcall::CancellationCallback callback(coordinator.token(), [&] { ask("callback"); });
  REQUIRE(coordinator.spawn("task", [&] { ask("task"); }));
  REQUIRE(second.spawn("task of second", [&] { ask("task of second"); }));
  coordinator.wrap("wrapped", [&] { ask("wrapped"); })();
  ::kill(::getpid(), SIGHUP);
  // Of its functions only that one has a thread that asks nobody's leave.
  REQUIRE(eventually([&] {
    const std::lock_guard<std::mutex> lock(mutex);
    return contains(refusals, "on_signal");
  }));
  coordinator.request_shutdown();
  coordinator.on_stop("late", [&] { ask("late on_stop"); });
  CHECK(coordinator.drain().outcome == Outcome::clean);
  INFO(refusals);
  CHECK(asked == 10);
  CHECK(support::count_of(refusals, ": logic_error: ") == 20);
}

// ---- the destructor -----------------------------------------------------------------------------------

TEST_CASE("the destructor asks if nobody has, drains, and puts every disposition back") {
  const std::string before = support::dispositions();
  Diary diary;
  Cause cause;
  support::Gate stopped;
  {
    ShutdownCoordinator coordinator(quiet());
    REQUIRE(coordinator.spawn("task", [&](const CancellationToken& token) {
      token.wait();
      cause = token.cause();
      stopped.wait();
      diary.add("task");
    }));
    coordinator.on_stop("stop", [&] {
      diary.add("stop");
      stopped.open();
    });
    coordinator.on_drained("drained", diary.entry("drained"));
  }
  CHECK(diary.text() == "stop\ntask\ndrained\n");
  CHECK(cause.kind() == CauseKind::cancelled);
  CHECK(cause.message() == "coordinator destroyed");
  CHECK(support::dispositions() == before);
}

TEST_CASE("the destructor after a request that somebody else made keeps its cause") {
  Cause cause;
  {
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_stop("look", [&] { cause = coordinator.token().cause(); });
    coordinator.request_shutdown(Cause::cancelled("enough"));
  }
  CHECK(cause.message() == "enough");
}

TEST_CASE("a token, a source and a guard's copy outlive the coordinator") {
  CancellationToken token;
  CancellationToken abort;
  std::unique_ptr<lastcall::CancellationSource> child;
  {
    ShutdownCoordinator coordinator(quiet());
    token = coordinator.token();
    abort = coordinator.abort_token();
    child = std::make_unique<lastcall::CancellationSource>(abort);
  }
  CHECK(token.is_cancelled());
  CHECK(token.cause().message() == "coordinator destroyed");
  CHECK(child->is_cancelled() == abort.is_cancelled());
}

// ---- snapshot() ---------------------------------------------------------------------------------------

TEST_CASE("snapshot() says who is in now, and where: named guards, tasks, the unnamed together") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("storage", 5s);
  CHECK(coordinator.snapshot().empty());

  std::atomic<pid_t> worker{0};
  support::Gate gate;
  const lastcall::Clock::time_point before = lastcall::Clock::now();
  const int line_of_guard = __LINE__ + 1;
  WaitGroup::Guard guard = coordinator.enter("a guard");
  const int line_of_task = __LINE__ + 1;
  REQUIRE(second.spawn("a-task-whose-name-is-long", [&] {
    worker = support::thread_id();
    gate.wait();
  }));
  const WaitGroup::Guard unnamed[] = {coordinator.enter(), coordinator.enter(),
                                      coordinator.enter()};
  const WaitGroup::Guard unnamed_of_second = second.enter();
  REQUIRE(eventually([&] { return worker != 0; }));
  support::let_it_block(worker);

  const std::vector<Straggler> all = coordinator.snapshot();
  std::string names;
  for (const Straggler& straggler : all) names += straggler.stage + "/" + straggler.name + "\n";
  CHECK(
      names ==
      "service/a guard\nservice/3 unnamed\nstorage/a-task-whose-name-is-long\nstorage/1 unnamed\n");

  const Straggler* const of_guard = support::find_straggler(all, "a guard");
  REQUIRE(of_guard != nullptr);
  CHECK(contains(of_guard->where.file_name(), "shutdown_coordinator_test.cpp"));
  CHECK(static_cast<int>(of_guard->where.line()) == line_of_guard);
  CHECK(of_guard->age > 0ns);
  CHECK(of_guard->age <= lastcall::Clock::now() - before);

  const Straggler* const of_task = support::find_straggler(all, "a-task-whose-name-is-long");
  REQUIRE(of_task != nullptr);
  CHECK(contains(of_task->where.file_name(), "shutdown_coordinator_test.cpp"));
  // Of a call of several lines some compilers name the last one.
  CHECK(static_cast<int>(of_task->where.line()) >= line_of_task);
  CHECK(static_cast<int>(of_task->where.line()) <= line_of_task + 3);
#if LASTCALL_LINUX
  CHECK(of_guard->thread_id == support::thread_id());
  CHECK(starts_with(of_guard->waiting_in, "running"));
  CHECK(of_task->thread_id == worker);  // its own thread, not its spawner's
  CHECK(of_task->thread_name == "a-task-whose-na");
  CHECK(contains(of_task->waiting_in, "futex"));
  if (!support::under_sanitizer) {
    CHECK_FALSE(of_task->stack.empty());
    CHECK_FALSE(of_guard->stack.empty());  // this thread's own
  }
#endif
  const Straggler* const of_unnamed = support::find_straggler(all, "3 unnamed");
  REQUIRE(of_unnamed != nullptr);
  CHECK(of_unnamed->thread_id == 0);
  CHECK(of_unnamed->stack.empty());

  gate.open();
  guard.release();
  REQUIRE(eventually([&] { return coordinator.snapshot().size() == 2; }));
}

TEST_CASE("snapshot() may be called by several threads, while others come and go, and in a drain") {
  ShutdownCoordinator coordinator(quiet());
  std::atomic<bool> stop{false};
  std::atomic<std::size_t> seen{0};
  for (int hook = 0; hook < 50; ++hook) {
    coordinator.on_stop(
        "a hook with a name that is too long for a short string " + std::to_string(hook),
        [] { std::this_thread::sleep_for(200us); });
  }
  support::Threads threads;
  for (int number = 0; number < 2; ++number) {
    threads.start([&] {
      while (!stop) {
        for (const Straggler& straggler : coordinator.snapshot()) seen += straggler.name.size();
      }
    });
  }
  threads.start([&] {
    while (!stop) {
      const WaitGroup::Guard guard = coordinator.try_enter("comes and goes");
      if (!guard) break;
    }
  });
  std::this_thread::sleep_for(20ms);
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
  stop = true;
  threads.join();
  CHECK(seen > 0);
}

TEST_CASE("a hook that is running is in the snapshot, with its name and its stage") {
  ShutdownCoordinator coordinator(quiet());
  Stage& second = coordinator.stage("second", 5s);
  support::Gate inside;
  support::Gate leave;
  second.on_drained("release the tapes", [&] {
    inside.open();
    leave.wait();
  });
  coordinator.request_shutdown();
  REQUIRE(inside.wait());
  const std::vector<Straggler> all = coordinator.snapshot();
  leave.open();
  REQUIRE(all.size() == 1);
  CHECK(all[0].name == "release the tapes");
  CHECK(all[0].stage == "second");
#if LASTCALL_LINUX
  CHECK(all[0].thread_name == "lastcall-drain");
#endif
  CHECK(coordinator.drain().outcome == Outcome::clean);
}

// ---- observers ----------------------------------------------------------------------------------------

TEST_CASE(
    "the observer is told every event of the report, in its order, on one thread of the library") {
  const auto witness = std::make_shared<Witness>();
  ShutdownOptions options = quiet();
  options.observer = witness;
  ShutdownCoordinator coordinator(options);
  coordinator.stage("second", 5s).on_drained("hook", [] {});
  REQUIRE(coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); }));
  coordinator.on_stop("throws", [] { throw 1; });
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(story_of(witness->events()) == story_of(report.events));
  REQUIRE_FALSE(witness->threads().empty());
  const pid_t thread = witness->threads().front();
  for (const pid_t other : witness->threads()) CHECK(other == thread);
  if (thread != 0) CHECK(thread != support::thread_id());
}

TEST_CASE("the observer is never called from a constructor or from spawn()") {
  const auto witness = std::make_shared<Witness>();
  ShutdownOptions options = quiet();
  options.observer = witness;
  ShutdownCoordinator coordinator(options);
  REQUIRE(coordinator.spawn("task", [](const CancellationToken& token) { token.wait(); }));
  std::this_thread::sleep_for(10ms);
  CHECK(witness->events().empty());
  coordinator.request_shutdown();
  coordinator.drain();
  for (const pid_t thread : witness->threads()) {
    if (thread != 0) CHECK(thread != support::thread_id());
  }
}

TEST_CASE("what an observer throws is swallowed, and it is told the next event") {
  const auto witness = std::make_shared<Witness>([](const lastcall::Event& event) {
    if (event.kind == EventKind::phase) throw std::runtime_error("cannot log");
    throw 7;
  });
  ShutdownOptions options = quiet();
  options.observer = witness;
  ShutdownCoordinator coordinator(options);
  coordinator.on_stop("hook", [] {});
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::clean);
  CHECK(report.failures.empty());
  CHECK(story_of(witness->events()) == story_of(report.events));
}

TEST_CASE(
    "an exception of another language is one like any other: of hooks, observers, functions") {
  const auto witness =
      std::make_shared<Witness>([](const lastcall::Event&) { support::throw_foreign(); });
  ShutdownOptions options = quiet();
  options.observer = witness;
  ShutdownCoordinator coordinator(options);
  std::atomic<int> called{0};
  coordinator.on_signal(SIGHUP, [&called](const lastcall::SignalInfo&) {
    ++called;
    support::throw_foreign();
  });
  coordinator.on_stop("throws", [] { support::throw_foreign(); });
  ::kill(::getpid(), SIGHUP);
  REQUIRE(support::eventually([&called] { return called == 1; }));
  ::kill(::getpid(), SIGHUP);
  REQUIRE(support::eventually([&called] { return called == 2; }));
  coordinator.request_shutdown();
  coordinator.on_stop("throws late", [] { support::throw_foreign(); });
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::failed);
  REQUIRE(report.failures.size() == 2);
  for (const lastcall::Failure& failure : report.failures) {
    CHECK(lastcall::detail::describe_exception(failure.error) ==
          "an exception of another language");
  }
  for (const char* const line : {"hook failed service/throws", "hook failed on SIGHUP"}) {
    const lastcall::Event* const event = support::find_event(report.events, line);
    REQUIRE(event != nullptr);
    CHECK(event->detail == "an exception of another language");
  }
  CHECK(story_of(witness->events()) == story_of(report.events));
}

TEST_CASE("what an observer's on_request() throws costs it no event and no status") {
  struct Thrower : Witness {
    void on_time_limit(lastcall::Clock::duration) override { throw std::runtime_error("limit"); }
    void on_request(lastcall::Clock::time_point) override { throw std::runtime_error("request"); }
    bool wants_status() const noexcept override { return asked = true; }
    mutable std::atomic<bool> asked{false};
  };
  const auto thrower = std::make_shared<Thrower>();
  ShutdownOptions options = quiet();
  options.observer = thrower;
  ShutdownCoordinator coordinator(options);
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(story_of(thrower->events()) == story_of(report.events));
  CHECK(thrower->asked);
}

TEST_CASE("an observer is told its time limit once, before the first event") {
  struct Limited : Witness {
    void on_time_limit(lastcall::Clock::duration most) override {
      diary.add(std::to_string(most / 1ms) + " ms");
    }
    void on_event(const lastcall::Event& event) override {
      diary.add(event.name);
      Witness::on_event(event);
    }
    Diary diary;
  };
  const auto limited = std::make_shared<Limited>();
  ShutdownOptions options = quiet(2s);
  options.observer = limited;
  ShutdownCoordinator coordinator(options);
  coordinator.request_shutdown();
  coordinator.drain();
  const std::string lines = limited->diary.text();
  CHECK(starts_with(lines, "100 ms\nannounced\n"));
  CHECK(support::count_of(lines, " ms") == 1);
}

TEST_CASE("the library's observers outlive a pipe that is full for a while, in a short drain too") {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const int flags = ::fcntl(ends[1], F_GETFL);
  ::fcntl(ends[1], F_SETFL, flags | O_NONBLOCK);
  while (::write(ends[1], "x", 1) > 0) {
  }
  ::fcntl(ends[1], F_SETFL, flags);
  const bool people = GENERATE(true, false);
  INFO((people ? "people" : "machines"));
  ShutdownOptions options = quiet(support::enough(2000ms));
  options.observer = people ? std::make_shared<lastcall::detail::StderrObserver>(ends[1])
                            : lastcall::json_observer(ends[1]);
  ShutdownCoordinator coordinator(options);
  std::atomic<bool> stopped{false};
  std::atomic<bool> read{false};
  coordinator.on_stop("stop", [&] { stopped = true; });
  coordinator.spawn("worker", [&] { eventually([&] { return read.load(); }); });
  coordinator.request_shutdown();
  // By now it has been told of two phases, the stage and the hook, or has been given up.
  CHECK(eventually([&] { return stopped.load(); }));
  std::string text;
  const auto read_all = [&] {
    char buffer[4096];
    while (support::is_readable(ends[0])) {
      const ssize_t got = ::read(ends[0], buffer, sizeof buffer);
      if (got <= 0) break;
      text.append(buffer, static_cast<std::size_t>(got));
    }
  };
  read_all();
  read = true;
  const ShutdownReport report = coordinator.drain();
  read_all();
  CHECK(report.outcome == Outcome::clean);
  CHECK(contains(text, people ? "lines lost: nobody was reading" : "{\"lost\":"));
  CHECK(contains(text, "finished"));
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_CASE("an observer may use the coordinator") {
  ShutdownCoordinator* the_coordinator = nullptr;
  std::atomic<int> calls{0};
  std::atomic<bool> granted{false};
  const auto witness = std::make_shared<Witness>([&](const lastcall::Event&) {
    ++calls;
    the_coordinator->snapshot();
    if (the_coordinator->request_shutdown()) granted = true;
    if (the_coordinator->phase() == Phase::running) granted = true;
    static_cast<void>(the_coordinator->try_enter("observer"));
    the_coordinator->spawn("by the observer", [] {});
  });
  ShutdownOptions options = quiet();
  options.observer = witness;
  ShutdownCoordinator coordinator(options);
  the_coordinator = &coordinator;
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
  CHECK(calls > 0);
  CHECK_FALSE(granted);
}

TEST_CASE("an observer that makes an event of every event doesn't keep the drain from its end") {
  ShutdownCoordinator* the_coordinator = nullptr;
  const auto witness = std::make_shared<Witness>(
      [&](const lastcall::Event&) { the_coordinator->wrap("by the observer", [] {})(); });
  ShutdownOptions options = quiet();
  options.observer = witness;
  ShutdownCoordinator coordinator(options);
  the_coordinator = &coordinator;
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::clean);
  CHECK(story_of(witness->events()) == story_of(report.events));
}

TEST_CASE("an observer that is shared by two coordinators, one after the other, hears both") {
  const auto witness = std::make_shared<Witness>();
  ShutdownOptions options = quiet();
  options.observer = witness;
  for (int round = 0; round < 2; ++round) {
    const ShutdownCoordinator coordinator(options);
  }
  CHECK(support::count_of(story_of(witness->events()), "phase begun finished") == 2);
}

// ---- signals that go to functions ----------------------------------------------------------------------

TEST_CASE("an on_signal function is called for each signal, on a thread of its own") {
  ShutdownCoordinator coordinator(quiet());
  std::atomic<int> calls{0};
  std::atomic<int> wrong{0};
  std::atomic<pid_t> thread{0};
  coordinator.on_signal(SIGHUP, [&](const SignalInfo& info) {
    if (info.number != SIGHUP || info.sender_pid != ::getpid()) ++wrong;
    thread = support::thread_id();
    ++calls;
  });
  for (int sent = 1; sent <= 3; ++sent) {
    ::kill(::getpid(), SIGHUP);
    REQUIRE(eventually([&] { return calls == sent; }));
  }
  CHECK(wrong == 0);
  if (thread != 0) CHECK(thread != support::thread_id());
  CHECK(coordinator.is_ready());
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(support::count_of(story_of(report.events, {EventKind::signal}), "signal ok SIGHUP") == 3);
}

TEST_CASE("on_signal functions of several numbers each get their own") {
  ShutdownCoordinator coordinator(quiet());
  std::atomic<int> hang_ups{0};
  std::atomic<int> users{0};
  coordinator.on_signal(SIGHUP, [&](const SignalInfo& info) { hang_ups += info.number; });
  coordinator.on_signal(SIGUSR1, [&](const SignalInfo& info) { users += info.number; });
  ::kill(::getpid(), SIGUSR1);
  ::kill(::getpid(), SIGHUP);
  CHECK(eventually([&] { return hang_ups == SIGHUP && users == SIGUSR1; }));
}

TEST_CASE("an on_signal function that throws is written down, and called again the next time") {
  ShutdownCoordinator coordinator(quiet());
  std::atomic<int> calls{0};
  coordinator.on_signal(SIGHUP, [&](const SignalInfo&) {
    ++calls;
    throw std::runtime_error("bad configuration");
  });
  for (int sent = 1; sent <= 2; ++sent) {
    ::kill(::getpid(), SIGHUP);
    REQUIRE(eventually([&] { return calls == sent; }));
  }
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  int failed = 0;
  for (const lastcall::Event& event : report.events) {
    if (event.kind == EventKind::hook && event.result == EventResult::failed &&
        contains(event.detail, "bad configuration")) {
      ++failed;
    }
  }
  CHECK(failed >= 1);
}

TEST_CASE("each signal is told before its on_signal function, which begins and ends") {
  const auto witness = std::make_shared<Witness>();
  ShutdownOptions options = quiet();
  options.observer = witness;
  ShutdownCoordinator coordinator(options);
  coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
  std::string expected;
  for (int sent = 0; sent < 100; ++sent) {
    ::kill(::getpid(), SIGHUP);
    expected += "signal ok SIGHUP\nhook begun on SIGHUP\nhook ok on SIGHUP\n";
    REQUIRE(eventually([&] { return witness->events().size() >= std::size_t(sent + 1) * 3; }));
    REQUIRE(story_of(witness->events()) == expected);
  }
}

TEST_CASE("an on_signal function that still runs at the end has overrun, and harms nothing else") {
  const int threads = support::live_threads();
  // The function's thread is let go, and nobody joins it.
  static std::atomic<bool> inside{false};
  static std::atomic<bool> released{false};
  {
    const auto witness = std::make_shared<Witness>();
    ShutdownOptions options = quiet();
    options.observer = witness;
    ShutdownCoordinator coordinator(options);
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {
      inside = true;
      eventually([] { return released.load(); });
    });
    ::kill(::getpid(), SIGHUP);
    REQUIRE(eventually([&] { return inside.load(); }));
    coordinator.request_shutdown();
    const ShutdownReport report = coordinator.drain();
    CHECK(report.outcome == Outcome::clean);
    CHECK(report.stragglers.empty());
    const std::string story = story_of(report.events);
    CHECK(contains(story, "hook begun on SIGHUP\n"));
    CHECK(contains(story, "hook overran on SIGHUP\nphase begun finished\n"));
    const lastcall::Event* const hook =
        support::find_event(report.events, "hook overran on SIGHUP");
    REQUIRE(hook != nullptr);
    CHECK(hook->detail == "still running");
    CHECK(hook->begin < hook->end);
    CHECK(story_of(witness->events()) == story);
  }
  released = true;
  CHECK(eventually([&] { return support::live_threads() == threads; }));
}

TEST_CASE(
    "a second function for the same number, or one for a shutdown or dump signal, is a logic "
    "error") {
  ShutdownOptions options = quiet();
  options.dump_signal = SIGQUIT;
  ShutdownCoordinator coordinator(options);
  coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
  for (const int number : {SIGHUP, SIGTERM, SIGINT, SIGQUIT}) {
    const std::string words =
        refusal([&] { coordinator.on_signal(number, [](const SignalInfo&) {}); });
    INFO(words);
    CHECK(starts_with(words, "logic_error: "));
    CHECK(contains(words, lastcall::signal_name(number)));
  }
}

TEST_CASE("an on_signal function for a number that can't be trapped is an invalid argument") {
  ShutdownCoordinator coordinator(quiet());
  const int threads = support::live_threads();
  for (const int number : {SIGKILL, SIGSTOP, SIGSEGV, 0, 999, -1}) {
    const std::string words =
        refusal([&] { coordinator.on_signal(number, [](const SignalInfo&) {}); });
    INFO(words);
    CHECK(starts_with(words, "invalid_argument: "));
    CHECK(contains(words, std::to_string(number)));
  }
  CHECK(support::live_threads() == threads);
}

TEST_CASE("dump_signal tells the observer who is in, and everything goes on") {
  const auto witness = std::make_shared<Witness>();
  ShutdownOptions options = quiet();
  options.observer = witness;
  options.dump_signal = SIGQUIT;
  ShutdownCoordinator coordinator(options);
  WaitGroup::Guard guard = coordinator.enter("who is it");
  ::kill(::getpid(), SIGQUIT);
  REQUIRE(eventually(
      [&] { return contains(story_of(witness->events()), "task begun service/who is it"); }));
  CHECK(contains(story_of(witness->events()), "signal ok SIGQUIT"));
  CHECK(coordinator.is_ready());
  ::kill(::getpid(), SIGQUIT);
  REQUIRE(eventually([&] {
    return support::count_of(story_of(witness->events()), "task begun service/who is it") == 2;
  }));
  CHECK(coordinator.is_ready());
  guard.release();
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::clean);
}

// ---- signals and the story ------------------------------------------------------------------------------

TEST_CASE("a signal is the cause, with its sender, and comes first in the story") {
  for (int round = 0; round < 30; ++round) {
    ShutdownCoordinator coordinator(quiet());
    ::kill(::getpid(), SIGTERM);
    const ShutdownReport report = coordinator.drain();
    REQUIRE(report.cause.kind() == CauseKind::signal);
    CHECK(report.cause.signal()->number == SIGTERM);
    CHECK(report.cause.signal()->sender_pid == ::getpid());
    CHECK(report.exit_code == 0);
    CHECK(story_of(report.events) ==
          "signal ok SIGTERM\nphase begun announced\nphase begun draining\nstage begun service\n"
          "stage ok service\nphase begun finished\n");
    CHECK(contains(report.events[0].detail, "pid " + std::to_string(::getpid())));
    CHECK(report.events[0].begin <= report.events[1].begin);
  }
}

TEST_CASE("an abort right after the request is told after it: phases are in their order and time") {
  ShutdownOptions options = quiet();
  options.repeat_window = 0ms;
  options.dump_signal = SIGUSR1;
  ShutdownCoordinator* lifetime = nullptr;
  // The drain thread is kept busy until all of it has happened.
  options.observer = std::make_shared<Witness>([&](const lastcall::Event& event) {
    if (event.name != "SIGUSR1") return;
    ::kill(::getpid(), SIGTERM);
    eventually([&] { return lifetime->phase() == Phase::draining; });
    ::kill(::getpid(), SIGINT);
    eventually([&] { return lifetime->abort_token().is_cancelled(); });
  });
  ShutdownCoordinator coordinator(options);
  lifetime = &coordinator;
  coordinator.on_stop("hook", [] {});
  ::kill(::getpid(), SIGUSR1);
  const ShutdownReport report = coordinator.drain();
  CHECK(story_of(report.events, {EventKind::phase}) ==
        "phase begun announced\nphase begun draining\nphase begun aborting\n"
        "phase begun finished\n");
  CHECK(contains(story_of(report.events), "signal ok SIGTERM\nphase begun announced\n"));
  lastcall::Clock::time_point last{};
  for (const lastcall::Event& event : report.events) {
    if (event.kind != EventKind::phase) continue;
    CHECK(last <= event.begin);
    last = event.begin;
  }
}

TEST_CASE("an observer hears of the request before the signal that it was") {
  struct Listener : Witness {
    void on_request(lastcall::Clock::time_point when) override {
      asked = when;
      told_before = events().size();
    }
    lastcall::Clock::time_point asked{};
    std::size_t told_before = 99;
  };
  for (int round = 0; round < 10; ++round) {
    const auto listener = std::make_shared<Listener>();
    ShutdownOptions options = quiet();
    options.observer = listener;
    ShutdownCoordinator coordinator(options);
    ::kill(::getpid(), SIGTERM);
    const ShutdownReport report = coordinator.drain();
    CHECK(listener->told_before == 0);
    const std::vector<lastcall::Event> events = listener->events();
    REQUIRE(!events.empty());
    CHECK(support::line_of(events[0]) == "signal ok SIGTERM");
    CHECK(events[0].begin <= listener->asked);
  }
}

TEST_CASE("a storm of repeated signals leaves a short story, which says how many there were") {
  ShutdownCoordinator coordinator(quiet());
  REQUIRE(coordinator.spawn("task", [](const CancellationToken& token) {
    token.wait();
    for (int sent = 0; sent < 20'000; ++sent) ::kill(::getpid(), SIGTERM);
  }));
  ::kill(::getpid(), SIGTERM);
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::clean);
  CHECK(report.events.size() < 200);
}

TEST_CASE("what a storm's short story leaves out is counted") {
  // Of the signals of one number that come before it hands them on ThreadSanitizer keeps one.
  if (support::under_tsan) return;
  const int queued = SIGRTMIN + 3;  // unlike SIGTERM, each one comes
  ShutdownOptions options = quiet();
  options.signals = {queued};
  ShutdownCoordinator coordinator(options);
  REQUIRE(coordinator.spawn("task", [queued](const CancellationToken& token) {
    token.wait();
    for (int sent = 0; sent < 70; ++sent) ::kill(::getpid(), queued);
  }));
  ::kill(::getpid(), queued);
  const ShutdownReport report = coordinator.drain();
  const std::string told = story_of(report.events, {EventKind::signal});
  INFO(told);
  CHECK(support::count_of(told, "signal skipped SIGRTMIN+3") == 50);
  CHECK(support::count_of(told, "repeated signals") == 1);
  for (const auto& event : report.events) {
    if (event.name == "repeated signals") {
      CHECK(event.detail == "20 more: shutting down already");
    }
  }
}

TEST_CASE(
    "a service that reloads for years doesn't grow: of the time before the request the last "
    "events are kept") {
  ShutdownCoordinator coordinator(quiet());
  std::atomic<int> calls{0};
  coordinator.on_signal(SIGHUP, [&](const SignalInfo&) { ++calls; });
  for (int sent = 1; sent <= 700; ++sent) {
    ::kill(::getpid(), SIGHUP);
    REQUIRE(eventually([&] { return calls == sent; }));
  }
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(report.events.size() > 900);
  CHECK(report.events.size() < 1100);
  CHECK(support::line_of(report.events.back()) == "phase begun finished");
}

// ---- the report -----------------------------------------------------------------------------------------

TEST_CASE("the three views of a report say what happened") {
  ShutdownOptions options = quiet(300ms);
  options.abort_margin = 50ms;
  ShutdownCoordinator coordinator(options);
  const WaitGroup::Guard stays = coordinator.enter("stays \"in\"\n");
  coordinator.on_stop("hook", [] { throw std::runtime_error("broken"); });
  coordinator.request_shutdown(Cause::cancelled("test"));
  const ShutdownReport report = coordinator.drain();

  const std::string text = report.to_text();
  INFO(text);
  CHECK(contains(text, "overrun"));
  CHECK(contains(text, "stays"));
  CHECK(contains(text, "broken"));
  CHECK(contains(text, "test"));

  const auto json = support::JsonReader::read(report.to_json());
  REQUIRE(json.has_value());
  CHECK((*json)["outcome"].text == "overrun");
  CHECK((*json)["exit_code"].integer() == 124);
  CHECK((*json)["cause"]["message"].text == "test");
  CHECK((*json)["events"].items.size() == report.events.size());
  CHECK((*json)["stragglers"].items.at(0)["name"].text == "stays \"in\"\n");
  CHECK((*json)["failures"].items.at(0)["task"].text == "hook");

  const auto trace = support::JsonReader::read(report.to_trace());
  REQUIRE(trace.has_value());
  CHECK((*trace)["traceEvents"].is(support::Json::Type::array));
  CHECK_FALSE((*trace)["traceEvents"].items.empty());
}

TEST_CASE(
    "who overran is in the report with all that is known, and the drain took the whole time") {
  const auto grace = support::enough(400ms);
  ShutdownOptions options = quiet(grace);
  options.abort_margin = grace / 4;
  ShutdownCoordinator coordinator(options);
  Stage& storage = coordinator.stage("storage", grace / 4);
  const CancellationToken abort = coordinator.abort_token();
  const WaitGroup::Guard stays = storage.enter("stays");
  const WaitGroup::Guard unnamed[] = {coordinator.enter(), coordinator.enter()};
  bool released = false;
  storage.on_drained("release", [&] { released = true; });
  const support::Stopwatch watch;
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(watch.elapsed() < grace + support::slack);
  CHECK(report.elapsed > grace / 4 * 3);  // who was in had nearly all of it
  CHECK(report.outcome == Outcome::overrun);
  CHECK(report.exit_code == 124);
  CHECK(abort.is_cancelled());
  CHECK(abort.cause().message() == "requested");
  CHECK_FALSE(released);
  REQUIRE(report.stragglers.size() == 2);
  CHECK(report.stragglers[0].name == "2 unnamed");
  CHECK(report.stragglers[0].stage == "service");
  CHECK(report.stragglers[1].name == "stays");
  CHECK(report.stragglers[1].stage == "storage");
  const std::string story = story_of(report.events);
  INFO(story);
  CHECK(contains(story, "stage overran service\n"));
  CHECK(contains(story, "stage overran storage\n"));
  CHECK(contains(story, "hook skipped storage/release\n"));
  CHECK(contains(story, "phase begun aborting\n"));
  CHECK(contains(story, "task overran storage/stays\n"));
  CHECK(contains(story, "task overran service/2 unnamed\n"));
}

TEST_CASE("abort_token() is cancelled the abort margin before the end") {
  ShutdownOptions options = quiet(600ms);
  options.abort_margin = 200ms;
  ShutdownCoordinator coordinator(options);
  lastcall::Clock::duration asked_after{};
  Phase phase_then{};
  const lastcall::Clock::time_point begin = lastcall::Clock::now();
  REQUIRE(coordinator.spawn("stubborn", [&] {
    coordinator.abort_token().wait();
    asked_after = lastcall::Clock::now() - begin;
    phase_then = coordinator.phase();
  }));
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  CHECK(asked_after >= 400ms);
  CHECK(phase_then == Phase::aborting);
  CHECK(report.outcome == Outcome::clean);  // it left in the end
  const lastcall::Event* const aborting =
      support::find_event(report.events, "phase begun aborting");
  REQUIRE(aborting != nullptr);
  CHECK(aborting->begin - begin >= 400ms);
  CHECK(aborting->begin - begin <= asked_after);
}

TEST_CASE("an abort margin of zero cancels the abort token at the very end") {
  ShutdownOptions options = quiet(300ms);
  options.abort_margin = 0ms;
  ShutdownCoordinator coordinator(options);
  const WaitGroup::Guard stays = coordinator.enter("stays");
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == Outcome::overrun);
}

#if LASTCALL_LINUX
TEST_CASE("a thread is asked about once, and all whom it has share what it says") {
  std::vector<lastcall::Straggler> many(300);
  for (lastcall::Straggler& each : many) each.thread_id = lastcall::detail::current_thread_id();
  many[7].thread_id = 0;
  lastcall::detail::ask_kernel(many, lastcall::Clock::time_point::min());
  CHECK(many[7].waiting_in.empty());
  CHECK(many[299].thread_name == many[0].thread_name);
  CHECK_FALSE(many[299].thread_name.empty());
  CHECK(support::contains(many[299].waiting_in, "running"));
  if (support::under_sanitizer) return;
  lastcall::detail::add_stacks(many, 10s);
  REQUIRE_FALSE(many[0].stack.empty());
  CHECK(many[7].stack.empty());
  CHECK(many[100].stack == many[0].stack);
  CHECK(many[101].stack.empty());  // a hundred have it
}

TEST_CASE("of a thousand threads more is known than their numbers, of those after them not") {
  std::vector<lastcall::Straggler> many(1002);
  pid_t next = 99'999'999;
  for (lastcall::Straggler& each : many) each.thread_id = next--;
  many.back().thread_id = many[999].thread_id;
  lastcall::detail::ask_kernel(many, lastcall::Clock::time_point::max());
  CHECK(many[0].waiting_in == "gone");
  CHECK(many[999].waiting_in == "gone");
  CHECK(many[1000].waiting_in.empty());
  CHECK(many[1001].waiting_in == "gone");
}
#endif

TEST_CASE("the first to be named are asked about even when there is no time left") {
  std::vector<lastcall::Straggler> many(20);
  // Each of another thread, though there is none of that number: of each it is said that it is gone.
  pid_t next = 99'999'999;
  for (lastcall::Straggler& each : many) each.thread_id = next++;
  many.front().thread_id = 0;  // nobody to ask about
  lastcall::detail::ask_kernel(many, lastcall::Clock::time_point::min());
  CHECK(many[0].waiting_in.empty());
#if LASTCALL_LINUX
  CHECK_FALSE(many[1].waiting_in.empty());
  CHECK_FALSE(many[16].waiting_in.empty());
#endif
  CHECK(many[17].waiting_in.empty());
  lastcall::detail::ask_kernel(many, lastcall::Clock::time_point::max());
#if LASTCALL_LINUX
  CHECK_FALSE(many[19].waiting_in.empty());
#endif
}
