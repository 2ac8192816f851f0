// A drain thread that hangs where nobody can take over from it, in an allocation of its own: who comes for the end
// has a report all the same, and if nobody can have one, last words name whoever is in. So they do if it is refused
// an allocation.
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <thread>
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

// How many allocations the thread that sets it still gets; the next one never returns, or throws. Negative: all.
thread_local int allocations_left = -1;
thread_local bool throws_once = false;
std::atomic<bool> has_hung{false};
std::atomic<bool> all_hang{false};

// With the observer and the last words that one has without a choice.
ShutdownOptions short_of_time() {
  ShutdownOptions options;
  options.grace_period = support::enough(300ms);
  options.abort_margin = support::enough(100ms);
  return options;
}

// A worker that stays, and a hook after which the drain thread is alone; `then` is done on that thread.
template <class Then>
void hold_worker_and_hook(ShutdownCoordinator& coordinator, Then then) {
  coordinator.spawn("held worker", [] { support::hang(); });
  coordinator.on_stop("hook", then);
}

// Each operator new of the drain thread after the last hook in turn (those for more than usual alignment left out):
// `body` in a process whose drain thread hangs in it, or is refused it; several at once, since they do little but wait.
// Until there is none left: what it is says so on stdout.
template <class Body, class Check>
void sweep(Body body, Check check) {
  constexpr int most = 400;
  // An emulator's take longer, and all of a processor.
  constexpr int at_once = support::emulator.empty() ? 10 : 3;
  constexpr int step = support::emulator.empty() ? 1 : 4;
  int allocations = 0;
  bool any_refused = true;
  while (any_refused && allocations < most) {
    any_refused = false;
    std::vector<Child> children;
    for (int more = 0; more < at_once; ++more) {
      children.push_back(Child::run([&body, left = allocations + more * step] {
        body(left);
        support::leave(0);
      }));
    }
    for (Child& child : children) {
      const Ended ended = child.end();
      INFO("after " << allocations << " allocations: " << ended.err);
      check(ended);
      any_refused = any_refused || contains(ended.out, "refused ");
      allocations += step;
    }
  }
  CHECK(allocations > at_once);
  CHECK_FALSE(any_refused);
}

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  if (all_hang) support::hang();
  if (allocations_left == 0) {
    support::say("refused ");
    if (!throws_once) {
      has_hung = true;
      support::hang();
    }
    allocations_left = -1;
    throw std::bad_alloc();
  }
  if (allocations_left > 0) --allocations_left;
  if (void* const block = std::malloc(size == 0 ? 1 : size)) return block;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* block) noexcept {
  if (all_hang) support::hang();
  std::free(block);
}
[[gnu::noinline]] void operator delete(void* block, std::size_t) noexcept {
  operator delete(block);
}

TEST_CASE("whichever allocation holds the drain thread, drain() returns a report that ends once") {
  int late = 0;
  int stacks = 0;
  sweep(
      [](int allocations) {
        ShutdownCoordinator coordinator(short_of_time());
        hold_worker_and_hook(coordinator, [allocations] { allocations_left = allocations; });
        coordinator.request_shutdown();
        const ShutdownReport report = coordinator.drain();
        // The drain thread itself would have ended before the grace period.
        if (report.elapsed >= support::enough(300ms)) {
          support::say("late");
          for (const lastcall::Straggler& straggler : report.stragglers) {
            if (!LASTCALL_LINUX) break;
            const bool hook = straggler.name != "held worker";  // left behind, if it allocates
            expect(straggler.thread_name == (hook ? "lastcall-drain" : "held worker"),
                   "the name of its thread, and not " + straggler.thread_name);
            expect(!straggler.waiting_in.empty(), "what it waits in");
            if (!straggler.stack.empty()) support::say(", with a stack");
          }
        }
        const std::string story = support::story_of(report.events, {lastcall::EventKind::phase});
        const std::string end = "phase begun finished\n";
        expect(support::count_of(story, end) == 1, "one end: " + story);
        expect(story.size() >= end.size() && story.substr(story.size() - end.size()) == end,
               "the end comes last: " + story);
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect(support::find_straggler(report.stragglers, "held worker") != nullptr, "who hangs");
      },
      [&late, &stacks](const Ended& ended) {
        late += contains(ended.out, "late") ? 1 : 0;
        stacks += contains(ended.out, "with a stack") ? 1 : 0;
        // If it has the list of events locked there can be no report, and the process has ended.
        CHECK((ended.how == "exit 0" ||
               (ended.how == "exit 124" && contains(ended.err, "held worker"))));
      });
  CHECK(late > 0);
  CHECK((stacks > 0 || !LASTCALL_LINUX || !support::emulator.empty()));
}

TEST_CASE(
    "whichever allocation holds the drain thread, the destructor is not silent about who is in") {
  int late = 0;
  sweep(
      [](int allocations) {
        ShutdownCoordinator coordinator(short_of_time());
        hold_worker_and_hook(coordinator, [allocations] { allocations_left = allocations; });
      },
      [&late](const Ended& ended) {
        late += contains(ended.err, "lastcall: out of time") ? 1 : 0;
        CHECK(ended.how == "exit 0");
        CHECK(contains(ended.err, "held worker"));
      });
  CHECK(late > 0);
}

namespace {

void throw_once_after(int allocations) {
  throws_once = true;
  allocations_left = allocations;
}

}  // namespace

TEST_CASE("whichever allocation is refused to the drain thread, whoever is in is named") {
  for (const bool runs : {true, false}) {
    sweep(
        [runs](int allocations) {
          ShutdownCoordinator coordinator(short_of_time());
          hold_worker_and_hook(coordinator, [allocations] { throw_once_after(allocations); });
          coordinator.request_shutdown();
          if (runs) coordinator.run();
        },
        [runs](const Ended& ended) {
          CHECK(ended.how == (runs ? "exit 124" : "exit 0"));
          CHECK(contains(ended.err, "held worker"));
        });
  }
}

TEST_CASE("whichever allocation is refused to the drain thread, its report has whoever is in") {
  sweep(
      [](int allocations) {
        ShutdownCoordinator coordinator(short_of_time());
        hold_worker_and_hook(coordinator, [allocations] { throw_once_after(allocations); });
        coordinator.request_shutdown();
        const ShutdownReport report = coordinator.drain();
        expect(report.outcome == Outcome::overrun, "an overrun");
        expect(support::find_straggler(report.stragglers, "held worker") != nullptr, "who hangs");
      },
      [](const Ended& ended) { CHECK(ended.how == "exit 0"); });
}

namespace {

struct DestructorHangs {
  DestructorHangs() = default;
  DestructorHangs(const DestructorHangs&) = default;
  ~DestructorHangs() { support::hang(); }
};

}  // namespace

TEST_CASE(
    "whichever allocation is refused to the drain thread, what a hook threw goes where it may "
    "hang") {
  sweep(
      [](int allocations) {
        ShutdownCoordinator coordinator(short_of_time());
        coordinator.on_stop("thrower", [allocations] {
          throw_once_after(allocations);
          throw DestructorHangs();
        });
        coordinator.on_stop("next", [] { support::say("next "); });
        coordinator.request_shutdown();
        static_cast<void>(coordinator.drain());
        support::leave(0);
      },
      [](const Ended& ended) {
        CHECK(ended.how == "exit 0");
        CHECK(contains(ended.out, "next "));
      });
}

TEST_CASE("a run() that comes while drain() makes a late report ends with it") {
  for (const std::chrono::milliseconds moment : {0ms, 310ms, 325ms, 340ms, 360ms}) {
    const support::Stopwatch watch;
    const Ended ended = support::in_a_process([moment] {
      const support::Stopwatch since;
      ShutdownCoordinator coordinator(short_of_time());
      coordinator.spawn("held worker", [] { support::hang(); });
      coordinator.on_stop("takes the allocator", [] { all_hang = true; });
      std::thread other([&] {
        coordinator.token().wait();
        if (moment > since.elapsed()) std::this_thread::sleep_for(moment - since.elapsed());
        coordinator.run();
      });
      coordinator.request_shutdown();
      static_cast<void>(coordinator.drain());
      support::leave(5);
    });
    INFO(moment.count() << " ms: " << ended.err);
    CHECK(ended.how == "exit 124");
    CHECK(contains(ended.err, "held worker"));
    CHECK(watch.elapsed() < support::enough(300ms) + support::slack);
  }
}

TEST_CASE("with the allocator held the destructor frees nothing, and returns in time") {
  for (const int finished : {0, 1, 20}) {
    INFO(finished << " tasks that are through");
    const Ended ended = support::in_a_process(
        [finished] {
          ShutdownOptions options = short_of_time();
          support::Stopwatch watch;
          {
            ShutdownCoordinator coordinator(options);
            std::atomic<bool> all{false};
            coordinator.spawn("held worker", [&all] {
              support::eventually([&all] { return all.load(); });
              all_hang = true;
              support::hang();
            });
            for (int number = 0; number < finished; ++number) coordinator.spawn("short", [] {});
            support::eventually([&] { return coordinator.snapshot().size() == 1; });
            all = true;
            support::eventually([] { return all_hang.load(); });
          }
          support::leave(watch.elapsed() < support::enough(300ms) + support::slack ? 4 : 5);
        },
        20s);
    INFO(ended.err);
    CHECK(ended.how == "exit 4");
    CHECK(contains(ended.err, "held worker"));
  }
}

TEST_CASE(
    "a drain thread that waits for a lock which a stranger holds is named itself, if nobody is "
    "in") {
  // In the middle of adding a hook, with the lock of its stage's hooks.
  const Ended ended = support::in_a_process([] {
    {
      ShutdownCoordinator coordinator(short_of_time());
      std::thread([&coordinator] {
        allocations_left = 0;
        const std::function<void()> hook = [] {};
        for (;;) coordinator.on_stop("hook", hook);
      }).detach();
      support::eventually([] { return has_hung.load(); });
    }
    support::leave(5);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 5");
  CHECK(contains(ended.err, "lastcall: out of time"));
  CHECK(contains(ended.err, "lastcall:   'the drain thread', thread "));
#if LASTCALL_LINUX
  CHECK(contains(ended.err, ", in futex"));
#endif
}

#if defined(__GLIBC__)

extern "C" void __libc_free(void*);
extern "C" void free(void* block) {
  if (all_hang) support::hang();
  __libc_free(block);
}

// glibc frees the stacks of ended threads, and what it keeps for them, once there are more than 40 MB of them.
TEST_CASE(
    "with the allocator held the destructor doesn't let ended threads go, which would free them") {
  const Ended ended = support::in_a_process(
      [] {
        {
          ShutdownCoordinator coordinator(short_of_time());
          for (int number = 0; number < 20; ++number) {
            coordinator.on_stop("ends its thread", [] { ::pthread_exit(nullptr); });
          }
          coordinator.on_stop("takes the allocator", [] {
            all_hang = true;
            support::hang();
          });
        }
        support::leave(4);
      },
      20s);
  INFO(ended.err);
  CHECK(ended.how == "exit 4");
}

#endif

#endif
