// Whole shutdowns during which the nth request for memory is refused, or it and all later ones, whoever
// asks: the process ends in time, with the code that it would have ended with.
#include "starvation/refusals.hpp"
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <atomic>
#include <chrono>
#include <csignal>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using starvation::Lasting;
using starvation::Layer;
using starvation::Reach;
using starvation::Refusal;
using starvation::Starving;

constexpr auto grace = 600ms;

enum class Story { clean, failing_task, hung_task, destroyed, drained };

/// What the user's code has seen; it asks for no memory itself.
struct Seen {
  std::atomic<int> stops{0};
  std::atomic<int> drained{0};
  std::atomic<int> tasks{0};
};

// Its exit code is the coordinator's, or 99 for what a drain() has to say.
int service(Story story, const Refusal& how, long nth) {
  ShutdownOptions options;
  options.grace_period = grace;
  options.abort_margin = 100ms;
  const bool overruns = story == Story::hung_task;
  static Seen seen;
  std::optional<ShutdownCoordinator> coordinator(std::in_place, options);
  lastcall::Stage& second = coordinator->stage("second", 150ms);
  coordinator->on_stop("stop", [] { ++seen.stops; });
  second.on_stop("stop", [] { ++seen.stops; });
  coordinator->on_drained("drained", [] { ++seen.drained; });
  second.on_drained("drained", [] { ++seen.drained; });
  coordinator->on_signal(SIGHUP, [](const lastcall::SignalInfo&) {});
  coordinator->spawn("listens", [](const CancellationToken& token) {
    token.wait();
    ++seen.tasks;
  });
  second.spawn("flushes", [](const CancellationToken& token) {
    token.wait();
    ++seen.tasks;
  });
  if (overruns) coordinator->spawn("hangs", [] { support::hang(); });
  static std::atomic<bool> fail{false};
  if (story == Story::failing_task) {
    coordinator->spawn("fails", [] {
      while (!fail) ::usleep(500);
      throw 7;
    });
  }
  // Everybody is at rest before memory runs short.
  std::this_thread::sleep_for(5ms);
  Starving starving(how, nth);
  ::raise(SIGHUP);
  if (story == Story::destroyed) {
    coordinator.reset();
    if (seen.stops != 2 || seen.drained != 2 || seen.tasks != 2) return 98;
    return starving.refused() > 0 ? 0 : 77;
  }
  if (story == Story::failing_task) {
    fail = true;
  } else {
    ::raise(SIGTERM);
  }
  if (story == Story::drained) {
    int code = -1;
    for (int attempt = 0; attempt < 2 && code < 0; ++attempt) {
      try {
        code = coordinator->drain().exit_code;
      } catch (const std::bad_alloc&) {
        if (starving.refused() == 0) return 97;
        starving.stop();  // what it can't copy it has still
      }
    }
    if (seen.stops != 2 || seen.drained != 2 || seen.tasks != 2) return 98;
    const bool refused = starving.refused() > 0;
    starving.stop();
    return code == 0 && !refused ? 77 : code;
  }
  coordinator->run();
}

// The requests of several threads: how many there are differs from run to run. It is past the last of
// them when a batch of runs in a row had nothing refused; the stories that exit can't say so.
std::string sweep_shutdown(Story story, const std::string& code) {
  constexpr long batch = 8;
  std::string problems;
  for (const Layer layer : {Layer::operator_new, Layer::malloc}) {
    if (layer == Layer::malloc && !support::can_refuse_allocations) continue;
    for (const Lasting lasting : {Lasting::one, Lasting::all}) {
      for (long first = 1; first <= 8 * batch && problems.size() < 4000; first += batch) {
        const support::Stopwatch watch;
        std::vector<support::Child> children;
        for (long nth = first; nth < first + batch; ++nth) {
          children.push_back(support::Child::run([&] {
            return service(story, {layer, lasting, Reach::process}, nth);
          }));
        }
        long unrefused = 0;
        for (long at = 0; at < batch; ++at) {
          const support::Ended ended = children[static_cast<std::size_t>(at)].end(20s);
          if (ended.how == "exit 77") {
            ++unrefused;
          } else if (ended.how != code || watch.elapsed() > grace + 100ms + support::slack) {
            problems += "request " + std::to_string(first + at) +
                        (lasting == Lasting::all ? " and all later ones: " : ": ") + ended.how +
                        " after " + std::to_string(watch.elapsed().count()) + " ms\n" + ended.err;
          }
        }
        if (unrefused == batch) break;
      }
    }
  }
  return problems;
}

}  // namespace

TEST_CASE("a clean shutdown is clean with too little memory") {
  CHECK(sweep_shutdown(Story::clean, "exit 0") == "");
}

TEST_CASE("a task's failure is what ends the process with too little memory") {
  CHECK(sweep_shutdown(Story::failing_task, "exit 1") == "");
}

TEST_CASE("a hung task is overrun in time with too little memory") {
  CHECK(sweep_shutdown(Story::hung_task, "exit 124") == "");
}

TEST_CASE("a destroyed coordinator drains with too little memory") {
  CHECK(sweep_shutdown(Story::destroyed, "exit 0") == "");
}

TEST_CASE("drain() sees a shutdown through with too little memory") {
  CHECK(sweep_shutdown(Story::drained, "exit 0") == "");
}
