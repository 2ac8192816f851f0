// Coordinators that live and die in one process: stages, tasks, guards and hooks by many threads, while
// signals, requests and failures race for who ends it. Now and then one in a child of its own, with tasks
// that hang and an impatient user.
//
// What is checked:
//  [first]     request_shutdown() is true for one caller at most
//  [order]     on_stop in the order registered, on_drained newest first, stage after stage; each once
//  [drained]   nobody is in when the first on_drained of its stage runs
//  [report]    everybody who calls drain() gets the same report; its outcome follows from what happened
//  [marked]    from drain()'s return on both tokens say so, as does phase()
//  [reload]    an on_signal function is called for a signal of its own while the coordinator runs
//  [back]      dispositions, descriptors and threads are as before
//  [exit]      a process whose tasks hang is gone in time, with an exit code that the wishes allow
#include <lastcall/shutdown_coordinator.hpp>

#include "options.hpp"
#include "process_state.hpp"
#include "support/coordinator.hpp"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::Outcome;
using lastcall::Phase;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownReport;
using lastcall::Stage;
using stress::check;
using support::Random;
using namespace std::chrono_literals;

std::atomic<long> lives{0};
std::atomic<long> children{0};
std::atomic<long> reloads{0};

/// What one stage's hooks and members did.
struct Log {
  std::mutex mutex;
  std::vector<int> stopped;  // numbers of on_stop hooks, in the order they were registered and ran
  std::vector<int> stop_registered;
  std::vector<int> drained;
  std::vector<int> drained_registered;
  std::atomic<int> in{0};
};

struct Life {
  std::array<Log, 3> logs;
  std::atomic<int> first{0};
  std::atomic<bool> failed{false};
  std::atomic<int> reloaded{0};
};

void be_a_task(Life& life, Log& log, std::uint64_t seed, const CancellationToken& token) {
  Random random(seed);
  struct Count {
    explicit Count(Log& of) : log(of) { ++log.in; }
    ~Count() { --log.in; }
    Log& log;
  } const counted(log);
  while (!token.is_cancelled() && !random.one_in(4)) {
    token.wait_for(std::chrono::microseconds(random.below(2000)));
  }
  if (random.one_in(30)) {
    life.failed = true;
    throw std::runtime_error("a task failed on purpose");
  }
}

// The numbers are given under the lock, so the order of the list is the order of registration.
template <class Target>
void add_hooks(Life& life, Log& log, Target& target, Random& random) {
  const std::lock_guard<std::mutex> lock(log.mutex);
  const bool throws = random.one_in(40);
  try {
    if (random.one_in(2)) {
      const int number = static_cast<int>(log.drained_registered.size());
      target.on_drained("drained", [&life, &log, number, throws] {
        check(log.in == 0, "[drained] somebody is in");
        const std::lock_guard<std::mutex> inner(log.mutex);
        log.drained.push_back(number);
        if (!throws) return;
        life.failed = true;
        throw std::runtime_error("a hook failed on purpose");
      });
      log.drained_registered.push_back(number);
    }
  } catch (const std::logic_error&) {
    // Too late.
  }
}

void add_stop_hook(Log& log, ShutdownCoordinator& coordinator, Stage* stage) {
  // Before the request only: one that comes later runs at once, on the caller, among the others.
  const int number = static_cast<int>(log.stop_registered.size());
  log.stop_registered.push_back(number);
  const auto hook = [&log, number] {
    const std::lock_guard<std::mutex> lock(log.mutex);
    log.stopped.push_back(number);
  };
  if (stage == nullptr) {
    coordinator.on_stop("stop", hook);
  } else {
    stage->on_stop("stop", hook);
  }
}

void live(Life& life, ShutdownCoordinator& coordinator, const std::vector<Stage*>& stages,
          Random& random) {
  for (int turn = 0; turn < 15; ++turn) {
    const std::size_t which = random.below(stages.size());
    Stage* const stage = stages[which];
    Log& log = life.logs[which];
    const auto task = [&life, &log, seed = random.next()](const CancellationToken& token) {
      be_a_task(life, log, seed, token);
    };
    switch (random.below(8)) {
      case 0:
        if (stage == nullptr) {
          coordinator.spawn("task", task);
        } else {
          stage->spawn("task", task);
        }
        break;
      case 1: {
        const auto guard =
            stage == nullptr ? coordinator.try_enter("guard") : stage->try_enter("guard");
        if (!guard) break;
        ++log.in;
        std::this_thread::sleep_for(std::chrono::microseconds(random.below(300)));
        --log.in;
        break;
      }
      case 2:
        if (stage == nullptr) {
          add_hooks(life, log, coordinator, random);
        } else {
          add_hooks(life, log, *stage, random);
        }
        break;
      case 3: {
        auto job =
            stage == nullptr ? coordinator.wrap("wrapped", task) : stage->wrap("wrapped", task);
        if (job && random.one_in(2)) job();
        break;
      }
      case 4:
        if (random.one_in(6)) static_cast<void>(coordinator.snapshot());
        break;
      case 5:
        if (random.one_in(15) && coordinator.request_shutdown(Cause::cancelled("by a thread")))
          ++life.first;
        break;
      case 6:
        if (random.one_in(25)) ::kill(::getpid(), random.one_in(2) ? SIGTERM : SIGUSR1);
        break;
      default: std::this_thread::sleep_for(std::chrono::microseconds(random.below(500))); break;
    }
  }
}

void check_life(Life& life, const std::vector<ShutdownReport>& reports, std::size_t stages) {
  check(life.first <= 1, "[first] two requests were the first");
  for (const ShutdownReport& report : reports) {
    check(report.to_json() == reports.front().to_json(), "[report] not the same for everybody");
    check(report.stragglers.empty(), "[report] stragglers: " + report.to_text());
    check(report.outcome == (life.failed ? Outcome::failed : Outcome::clean),
          "[report] another outcome: " + report.to_text());
  }
  for (std::size_t which = 0; which < stages; ++which) {
    Log& log = life.logs[which];
    check(log.in == 0, "[drained] somebody is in after drain()");
    check(log.stopped == log.stop_registered, "[order] on_stop");
    const std::vector<int> newest_first(log.drained_registered.rbegin(),
                                        log.drained_registered.rend());
    check(log.drained == newest_first, "[order] on_drained");
  }
}

void one_life(const stress::Options& options, Random& random) {
  const std::string before = stress::state_of_process();
  const int descriptors = support::open_descriptors();
  auto life = std::make_unique<Life>();
  std::vector<ShutdownReport> reports;
  std::size_t stage_count = 0;
  {
    lastcall::ShutdownOptions shutdown = support::quiet(100s);
    shutdown.signals = {SIGTERM, SIGUSR1};
    if (random.one_in(3)) shutdown.announce_delay = std::chrono::milliseconds(random.below(4));
    ShutdownCoordinator coordinator(shutdown);
    coordinator.on_signal(SIGUSR2, [&life](const lastcall::SignalInfo&) { ++life->reloaded; });
    std::vector<Stage*> stages = {nullptr};
    while (stages.size() < 1 + random.below(3)) {
      stages.push_back(&coordinator.stage("stage " + std::to_string(stages.size()), 10s));
    }
    stage_count = stages.size();
    for (std::size_t which = 0; which < stage_count; ++which) {
      for (std::size_t hooks = random.below(4); hooks > 0; --hooks) {
        add_stop_hook(life->logs[which], coordinator, stages[which]);
      }
    }
    if (random.one_in(3)) {
      ::kill(::getpid(), SIGUSR2);
      check(support::eventually([&] { return life->reloaded == 1; }), "[reload] a signal was lost");
      ++reloads;
    }
    std::mutex mutex;
    support::Threads threads;
    const int count = options.some_threads(random);
    for (int number = 0; number < count; ++number) {
      threads.start([&, number, seed = random.next()] {
        Random own(seed);
        live(*life, coordinator, stages, own);
        if (number > 2 && !own.one_in(4)) return;
        if (number == 0) {
          std::this_thread::sleep_for(std::chrono::microseconds(own.below(2000)));
          if (coordinator.request_shutdown()) ++life->first;
        }
        ShutdownReport report = coordinator.drain();
        check(coordinator.token().is_cancelled() && coordinator.phase() == Phase::finished &&
                  !coordinator.is_ready(),
              "[marked] after drain()");
        const std::lock_guard<std::mutex> lock(mutex);
        reports.push_back(std::move(report));
      });
    }
  }
  check_life(*life, reports, stage_count);
  const std::string changed = stress::difference(before, stress::state_of_process());
  check(changed.empty(), "[back] " + changed);
  check(support::open_descriptors() == descriptors, "[back] descriptors");
  ++lives;
}

// Everything hangs, and the user presses Ctrl-C when he likes.
void one_child(Random& random) {
  const auto begin = stress::Clock::now();
  const auto grace = std::chrono::milliseconds(100 + random.below(400));
  const std::size_t presses = random.below(4);
  const bool asks_nicely = random.one_in(2);
  std::fflush(nullptr);
  int ready[2];
  check(::pipe(ready) == 0, "no pipe");
  const pid_t child = ::fork();
  check(child >= 0, "no fork");
  if (child == 0) {
    lastcall::ShutdownOptions shutdown = support::quiet(grace);
    shutdown.repeat_window = 1ms;
    shutdown.abort_margin = 50ms;
    ShutdownCoordinator coordinator(shutdown);
    coordinator.spawn("hangs", [] { support::hang(); });
    coordinator.on_stop("hangs too", [] { support::hang(); });
    static_cast<void>(::write(ready[1], "r", 1) < 0);
    coordinator.run();
  }
  char letter = 0;
  static_cast<void>(::read(ready[0], &letter, 1) < 0);
  ::close(ready[0]);
  ::close(ready[1]);
  ::kill(child, asks_nicely ? SIGTERM : SIGINT);
  for (std::size_t press = 0; press < presses; ++press) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2 + random.below(60)));
    ::kill(child, SIGINT);
  }
  const int code = support::outcome_of(child);
  const auto took = stress::Clock::now() - begin;
  // The first SIGINT after the request aborts, the second forces; so does the first after an abort by the clock.
  const bool aborted = presses >= 2 || (presses == 1 && took >= grace - 50ms);
  const bool forced = code == 128 + SIGINT && aborted;
  check(code == 124 || forced, "[exit] code " + std::to_string(code));
  check(took < grace + 1s + support::slack * 4, "[exit] not in time");
  ++children;
}

void one_epoch(const stress::Options& options, Random& random) {
  one_life(options, random);
  // ThreadSanitizer doesn't allow a child of a process with threads to have its own.
  if (!support::under_tsan && random.one_in(8)) one_child(random);
}

}  // namespace

int main(int argc, char** argv) {
  const stress::Options options = stress::begin("coordinator_stress", argc, argv);
  // Signals that come when a coordinator has gone do nothing.
  for (const int number : {SIGTERM, SIGUSR1, SIGUSR2}) std::signal(number, [](int) {});
  // What is made once is made now.
  { ShutdownCoordinator first(support::quiet()); }
  stress::run(options, [&](Random& random) { one_epoch(options, random); });
  std::printf("%ld coordinators, %ld reloads, %ld children ended: ok\n", lives.load(),
              reloads.load(), children.load());
  return 0;
}
