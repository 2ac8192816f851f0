// The coordinator's calls with too little memory: each has its effect or throws and has none. Whole
// shutdowns are in memory_shutdown_test.
#include "starvation/sweep.hpp"
#include "support/catch.hpp"

#include <lastcall/lastcall.hpp>

#include <atomic>
#include <chrono>
#include <csignal>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using lastcall::Stage;
using lastcall::WaitGroup;
using starvation::Reach;
using starvation::sweep;
using support::expect;
using support::expect_equal;
using support::quiet;

const char* const long_name = "a name that is too long for a small string";

ShutdownOptions with_everything() {
  ShutdownOptions options = quiet();
  options.signals = {SIGINT, SIGTERM, SIGHUP};
  options.dump_signal = SIGQUIT;
  return options;
}

// ---- The constructor

struct Construct {
  std::optional<ShutdownCoordinator> coordinator;
  void call() { coordinator.emplace(with_everything()); }
  void check() {
    expect(coordinator->is_ready(), "it is ready");
    ::raise(SIGTERM);
    const ShutdownReport report = coordinator->drain();
    expect(report.outcome == lastcall::Outcome::clean, "it drains cleanly");
    expect(report.cause.signal() != nullptr, "by the signal");
  }
};

struct ConstructWithDefaults {
  std::optional<ShutdownCoordinator> coordinator;
  void call() { coordinator.emplace(); }
  void check() const { expect(coordinator->is_ready(), "it is ready"); }
};

struct ConstructBadly {
  bool refused = false;
  void call() {
    ShutdownOptions options = quiet();
    options.announce_delay = options.grace_period;
    try {
      const ShutdownCoordinator coordinator(std::move(options));
    } catch (const std::invalid_argument&) {
      refused = true;
    }
  }
  void check() const { expect(refused, "an announce delay that leaves nothing is refused"); }
};

// A coordinator that is there already; its destructor drains it.
struct Running {
  ShutdownCoordinator coordinator{with_everything()};
  std::string state() const {
    std::string words = coordinator.is_ready() ? "ready" : "not ready";
    for (const lastcall::Straggler& one : coordinator.snapshot()) words += " " + one.name;
    return words;
  }
};

struct ConstructSecond : Running {
  bool refused = false;
  void call() {
    try {
      const ShutdownCoordinator second(quiet());
    } catch (const std::logic_error&) {
      refused = true;
    }
  }
  void check() const { expect(refused, "there is one at a time"); }
};

// ---- Tasks and guards

struct SpawnService : Running {
  std::atomic<int> runs{0};
  bool accepted = false;
  void call() {
    accepted = coordinator.spawn(long_name, [this](const CancellationToken&) { ++runs; });
  }
  void check() {
    expect(accepted, "it was accepted");
    expect(support::eventually([this] { return runs == 1; }), "it runs");
  }
};

struct WrapService : Running {
  int runs = 0;
  void call() {
    coordinator.wrap(long_name, [this] { ++runs; })();
  }
  void check() const { expect_equal(runs, 1, "runs"); }
};

struct EnterService : Running {
  WaitGroup::Guard guards[4];
  void call() {
    guards[0] = coordinator.enter();
    guards[1] = coordinator.try_enter();
    guards[2] = coordinator.enter(long_name);
    guards[3] = coordinator.try_enter(long_name);
  }
  // Those that came before the one that failed are in, and are let go.
  std::string state() const { return coordinator.is_ready() ? "ready" : "not ready"; }
  void check() const {
    for (const WaitGroup::Guard& guard : guards) expect(static_cast<bool>(guard), "a guard is in");
    expect_equal(coordinator.snapshot().size(), std::size_t{3}, "who is in");
  }
};

// ---- Hooks, handlers, stages

struct OnStop : Running {
  int runs = 0;
  void call() {
    coordinator.on_stop(long_name, [this] { ++runs; });
  }
  void check() {
    const ShutdownReport report = (coordinator.request_shutdown(), coordinator.drain());
    expect_equal(runs, 1, "runs of the hook");
    expect(report.outcome == lastcall::Outcome::clean, "the outcome is clean");
  }
};

struct OnDrained : Running {
  int runs = 0;
  void call() {
    coordinator.on_drained(long_name, [this] { ++runs; });
  }
  void check() {
    coordinator.request_shutdown();
    static_cast<void>(coordinator.drain());
    expect_equal(runs, 1, "runs of the hook");
  }
};

struct OnSignal : Running {
  std::atomic<int> runs{0};
  void call() {
    coordinator.on_signal(SIGUSR1, [this](const lastcall::SignalInfo&) { ++runs; });
  }
  void check() {
    ::raise(SIGUSR1);
    expect(support::eventually([this] { return runs == 1; }), "the function is called");
  }
};

struct AddStage : Running {
  Stage* stage = nullptr;
  void call() { stage = &coordinator.stage(long_name, 2s); }
  void check() {
    int runs = 0;
    stage->on_stop("hook", [&runs] { ++runs; });
    expect(stage->spawn("task", [](const CancellationToken& token) { token.wait(); }), "a task");
    coordinator.request_shutdown();
    const ShutdownReport report = coordinator.drain();
    expect_equal(runs, 1, "runs of the hook");
    expect(report.outcome == lastcall::Outcome::clean, "the outcome is clean");
  }
};

struct UseStage : Running {
  Stage& stage = coordinator.stage("second", 2s);
  WaitGroup::Guard guard;
  std::atomic<int> runs{0};
  void call() {
    guard = stage.enter(long_name);
    stage.on_stop(long_name, [this] { ++runs; });
    stage.on_drained(long_name, [this] { ++runs; });
    stage.spawn(long_name, [this] { ++runs; });
    stage.wrap(long_name, [this] { ++runs; })();
  }
  std::string state() const { return coordinator.is_ready() ? "ready" : "not ready"; }
  void check() {
    guard.release();
    coordinator.request_shutdown();
    static_cast<void>(coordinator.drain());
    // Those that came before the one that failed are there twice.
    expect(runs >= 4, "all of them have run");
  }
};

struct StageTwice : Running {
  bool refused = false;
  StageTwice() { coordinator.stage("second", 2s); }
  void call() {
    try {
      coordinator.stage("second", 1s);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
  }
  void check() const { expect(refused, "the name is taken"); }
};

// ---- Looking, asking, draining

struct Snapshot : Running {
  WaitGroup::Guard guard = coordinator.enter(long_name);
  std::vector<lastcall::Straggler> seen;
  Snapshot() {
    coordinator.spawn("a task", [](const CancellationToken& token) { token.wait(); });
  }
  void call() { seen = coordinator.snapshot(); }
  std::string state() const { return coordinator.is_ready() ? "ready" : "not ready"; }
  void check() {
    expect(support::find_straggler(seen, long_name) != nullptr, "the guard is named");
    expect(support::find_straggler(seen, "a task") != nullptr, "the task is named");
    guard.release();
  }
};

struct Request : Running {
  bool first = false;
  void call() { first = coordinator.request_shutdown(); }
  void check() { expect(first, "it was the first"); }
};

// A shutdown can't be taken back: what may be missing is the copy of the report, to be asked for again.
struct Drain {
  static constexpr bool changes_on_failure = true;
  std::optional<ShutdownCoordinator> coordinator{std::in_place, with_everything()};
  int runs = 0;
  ShutdownReport report;
  Drain() {
    coordinator->on_stop(long_name, [this] { ++runs; });
    coordinator->on_drained(long_name, [this] { ++runs; });
    coordinator->spawn(long_name, [](const CancellationToken& token) { token.wait(); });
    coordinator->request_shutdown();
  }
  void call() { report = coordinator->drain(); }
  void check() {
    expect_equal(runs, 2, "runs of hooks");
    expect(report.outcome == lastcall::Outcome::clean, "the outcome is clean");
    expect_equal(report.exit_code, 0, "the exit code");
    coordinator.reset();
  }
};

struct Destroy {
  std::optional<ShutdownCoordinator> coordinator{std::in_place, with_everything()};
  int runs = 0;
  Destroy() {
    coordinator->on_stop(long_name, [this] { ++runs; });
    coordinator->spawn(long_name, [](const CancellationToken& token) { token.wait(); });
  }
  void call() { coordinator.reset(); }
  void check() const { expect_equal(runs, 1, "runs of the hook"); }
};

// ---- Reports and observers

ShutdownReport a_report() {
  ShutdownReport report;
  report.outcome = lastcall::Outcome::overrun;
  report.cause = Cause::cancelled(long_name);
  report.exit_code = 124;
  report.elapsed = 3s;
  const auto now = lastcall::Clock::now();
  for (int at = 0; at < 4; ++at) {
    report.events.push_back({lastcall::EventKind::hook, lastcall::EventResult::failed, "service",
                             long_name, "because of \"this\"", now, now + 2ms});
  }
  lastcall::Straggler straggler{};
  straggler.name = long_name;
  straggler.stage = "service";
  straggler.waiting_in = "futex";
  straggler.stack = {"one frame, which is called something long", "two"};
  report.stragglers.push_back(straggler);
  report.failures.push_back({long_name, std::make_exception_ptr(std::runtime_error(long_name))});
  return report;
}

struct ReportTexts {
  ShutdownReport report = a_report();
  std::string texts[3];
  void call() {
    texts[0] = report.to_text();
    texts[1] = report.to_json();
    texts[2] = report.to_trace();
  }
  void check() const {
    for (const std::string& text : texts) {
      expect(text.find(long_name) != std::string::npos, "the name is in the text");
    }
  }
};

struct CopyReport {
  ShutdownReport report = a_report();
  std::optional<ShutdownReport> copy;
  void call() { copy.emplace(report); }
  void check() const { expect_equal(copy->events.size(), std::size_t{4}, "events"); }
};

struct Observers {
  std::shared_ptr<lastcall::Observer> all[3];
  void call() {
    all[0] = lastcall::stderr_observer();
    all[1] = lastcall::silent_observer();
    all[2] = lastcall::json_observer(STDERR_FILENO);
  }
};

// What is written goes nowhere; that it is attempted is what counts.
struct Observing {
  int nowhere = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
  std::shared_ptr<lastcall::Observer> json = lastcall::json_observer(nowhere);
  ~Observing() { ::close(nowhere); }
  void call() {
    for (const lastcall::Event& event : report.events) json->on_event(event);
  }
  const ShutdownReport report = a_report();
};

}  // namespace

TEST_CASE("a coordinator is made whole or not at all") {
  const starvation::Swept swept = sweep<Construct>();
  CHECK(swept.problems == "");
  CHECK(swept.failures >= 20);
  CHECK(sweep<ConstructWithDefaults>().problems == "");
  CHECK(sweep<ConstructBadly>().problems == "");
  CHECK(sweep<ConstructSecond>().problems == "");
}

TEST_CASE("a coordinator's tasks and guards are in or were never there") {
  CHECK(sweep<SpawnService>().problems == "");
  CHECK(sweep<WrapService>().problems == "");
  CHECK(sweep<EnterService>().problems == "");
}

TEST_CASE("hooks, handlers and stages are there or are not") {
  CHECK(sweep<OnStop>().problems == "");
  CHECK(sweep<OnDrained>().problems == "");
  CHECK(sweep<OnSignal>().problems == "");
  CHECK(sweep<AddStage>().problems == "");
  CHECK(sweep<UseStage>().problems == "");
  CHECK(sweep<StageTwice>().problems == "");
}

TEST_CASE("a snapshot can be had or not, and changes nothing") {
  CHECK(sweep<Snapshot>().problems == "");
}

TEST_CASE("asking for shutdown needs no memory") {
  CHECK(sweep<Request>().problems == "");
  CHECK(sweep<Request>().refusals == 0);
}

TEST_CASE("drain() gives a report or can be called again") {
  CHECK(sweep<Drain>().problems == "");
  CHECK(sweep<Drain>(Reach::process).problems == "");
  CHECK(sweep<Destroy>(Reach::process).problems == "");
}

TEST_CASE("texts of reports are whole or not there") {
  CHECK(sweep<ReportTexts>().problems == "");
  CHECK(sweep<CopyReport>().problems == "");
}

TEST_CASE("observers are made whole, and tell or throw") {
  CHECK(sweep<Observers>().problems == "");
  CHECK(sweep<Observing>().problems == "");
}

TEST_CASE("a failure that there is no memory for is one all the same, and counts as lost") {
  lastcall::detail::EngineLog log;
  std::string task = long_name;
  std::exception_ptr error = std::make_exception_ptr(std::runtime_error(long_name));
  {
    const starvation::Starving starving({}, 1);
    log.add_failure(std::move(task), std::move(error));
  }
  CHECK(log.failures().empty());
  CHECK(log.any_failed());
  CHECK(log.any_lost());
}
