// A drain thread that hangs where nobody can take over from it, in an allocation of its own: who comes for the end
// has a report all the same, and if nobody can have one, last words name whoever is in.
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using support::Child;
using support::contains;
using support::Ended;
using support::expect;
using namespace std::chrono_literals;

// Sanitizers have operators of their own, which look whether what was taken by one of them is given back so.
#if !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)

namespace {

// How many allocations the thread that sets it still gets; the next one never returns. Negative: all.
thread_local int allocations_left = -1;
std::atomic<bool> has_hung{false};

// With the observer and the last words that one has without a choice.
ShutdownOptions short_of_time() {
  ShutdownOptions options;
  options.grace_period = 300ms;
  options.abort_margin = 100ms;
  return options;
}

// Each operator new of the drain thread after the last hook in turn (those for more than usual alignment left out):
// `body` in a process whose drain thread hangs in it; several at once, since they do little but wait. Exit 9: it hung;
// exit 0: there was none left to hang in.
template <class Body, class Check>
void sweep(Body body, Check check) {
  constexpr int most = 400;
  constexpr int at_once = 10;
  int allocations = 0;
  bool any_hung = true;
  while (any_hung && allocations < most) {
    any_hung = false;
    std::vector<Child> children;
    for (int more = 0; more < at_once; ++more) {
      children.push_back(Child::run([&body, left = allocations + more] {
        body(left);
        support::leave(has_hung ? 9 : 0);
      }));
    }
    for (Child& child : children) {
      const Ended ended = child.end();
      INFO("after " << allocations << " allocations: " << ended.err);
      check(ended);
      any_hung = any_hung || ended.how != "exit 0";
      ++allocations;
    }
  }
  CHECK(allocations > at_once);
  CHECK_FALSE(any_hung);
}

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  if (allocations_left == 0) {
    has_hung = true;
    support::hang();
  }
  if (allocations_left > 0) --allocations_left;
  if (void* const block = std::malloc(size == 0 ? 1 : size)) return block;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* block) noexcept { std::free(block); }
[[gnu::noinline]] void operator delete(void* block, std::size_t) noexcept { std::free(block); }

TEST_CASE("whichever allocation holds the drain thread, drain() returns a report that ends once") {
  int late = 0;
  sweep(
      [](int allocations) {
        ShutdownCoordinator coordinator(short_of_time());
        coordinator.spawn("held worker", [] { support::hang(); });
        coordinator.on_stop("hook", [allocations] { allocations_left = allocations; });
        coordinator.request_shutdown();
        const ShutdownReport report = coordinator.drain();
        // The drain thread itself would have ended before the grace period.
        if (report.elapsed >= 300ms) support::say("late");
        const std::string story = support::story_of(report.events, {lastcall::EventKind::phase});
        const std::string end = "phase begun finished\n";
        expect(support::count_of(story, end) == 1, "one end: " + story);
        expect(story.size() >= end.size() && story.substr(story.size() - end.size()) == end,
               "the end comes last: " + story);
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect(support::find_straggler(report.stragglers, "held worker") != nullptr, "who hangs");
      },
      [&late](const Ended& ended) {
        late += ended.out == "late" ? 1 : 0;
        // If it has the list of events locked there can be no report, and the process has ended.
        if (ended.how == "exit 124") {
          CHECK(contains(ended.err, "held worker"));
        } else {
          CHECK((ended.how == "exit 0" || ended.how == "exit 9"));
        }
      });
  CHECK(late > 0);
}

TEST_CASE(
    "whichever allocation holds the drain thread, the destructor is not silent about who is in") {
  int late = 0;
  sweep(
      [](int allocations) {
        ShutdownCoordinator coordinator(short_of_time());
        coordinator.spawn("held worker", [] { support::hang(); });
        coordinator.on_stop("hook", [allocations] { allocations_left = allocations; });
      },
      [&late](const Ended& ended) {
        late += contains(ended.err, "lastcall: out of time") ? 1 : 0;
        CHECK((ended.how == "exit 0" || ended.how == "exit 9"));
        if (ended.how == "exit 9") CHECK(contains(ended.err, "held worker"));
      });
  CHECK(late > 0);
}

#endif
