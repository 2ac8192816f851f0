// cancellation.hpp: what it costs. Depth and breadth on a small stack, allocations, memory and timers
// left behind, processor time of those who wait.
#include <lastcall/cancellation.hpp>
#include <lastcall/detail/timer_service.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/threads.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::Clock;
using namespace std::chrono_literals;

namespace {

using support::Calls;
using support::calls_of;
using support::live_allocations;

constexpr std::size_t million = support::under_sanitizer ? 100'000 : 1'000'000;
constexpr std::size_t small_stack = 128UL * 1024UL;

struct CountUp {
  void operator()() const noexcept { ++*count; }
  long* count;
};

/// Waits until no more allocations are alive than before: the timer thread may still hold a node.
bool settles_at(long before) {
  return support::eventually([&] { return live_allocations <= before; }, 20s);
}

std::size_t armed_timers() {
  return static_cast<std::size_t>(lastcall::detail::TimerService::instance().armed_for_test());
}

}  // namespace

// ------------------------------------------------------------------------------- on 128 KiB of stack

TEST_CASE("A chain of a million is made, cancelled and destroyed on a 128 KiB stack") {
  std::size_t cancelled = 0;
  bool made = false;
  SECTION("destroyed from the bottom") {
    made = support::on_stack_of(small_stack, [&] {
      std::vector<CancellationSource> chain;
      chain.emplace_back();
      while (chain.size() < million) chain.emplace_back(chain.back().token());
      chain.front().cancel();
      for (const CancellationSource& one : chain) cancelled += one.is_cancelled() ? 1U : 0U;
      while (!chain.empty()) chain.pop_back();
    });
  }
  SECTION("destroyed from the top") {
    made = support::on_stack_of(small_stack, [&] {
      std::vector<CancellationSource> chain;
      chain.emplace_back();
      while (chain.size() < million) chain.emplace_back(chain.back().token());
      chain.front().cancel();
      for (const CancellationSource& one : chain) cancelled += one.is_cancelled() ? 1U : 0U;
      chain.clear();
    });
  }
  SECTION("held at its two ends only, and destroyed in one go") {
    made = support::on_stack_of(small_stack, [&] {
      CancellationSource top;
      std::optional<CancellationSource> bottom(std::in_place, top.token());
      for (std::size_t i = 2; i < million; ++i) {
        CancellationSource next(bottom->token());
        bottom->disarm();
        *bottom = std::move(next);
      }
      top.cancel();
      cancelled = bottom->is_cancelled() ? million : 0;
      bottom.reset();
    });
  }
  SECTION("never cancelled, destroyed in one go from the bottom") {
    made = support::on_stack_of(small_stack, [&] {
      CancellationSource bottom;
      for (std::size_t i = 1; i < million; ++i) {
        CancellationSource next(bottom.token());
        bottom.disarm();
        bottom = std::move(next);
      }
      bottom.disarm();
      cancelled = bottom.is_cancelled() ? 0 : million;
    });
  }
  SECTION("cancelled by the destructor of its root") {
    made = support::on_stack_of(small_stack, [&] {
      std::vector<CancellationSource> chain;
      chain.emplace_back();
      while (chain.size() < million) chain.emplace_back(chain.back().token());
      { const CancellationSource root = std::move(chain.front()); }
      cancelled = 1;
      for (const CancellationSource& one : chain) cancelled += one.is_cancelled() ? 1U : 0U;
    });
  }
  REQUIRE(made);
  CHECK(cancelled == million);
}

TEST_CASE("A root with a million children is made, cancelled and destroyed on a 128 KiB stack") {
  std::size_t cancelled = 0;
  bool made = false;
  SECTION("the root goes first") {
    made = support::on_stack_of(small_stack, [&] {
      std::optional<CancellationSource> root(std::in_place);
      std::vector<CancellationSource> children;
      while (children.size() < million) children.emplace_back(root->token());
      root->cancel();
      for (const CancellationSource& one : children) cancelled += one.is_cancelled() ? 1U : 0U;
      root.reset();
      children.clear();
    });
  }
  SECTION("the root goes last") {
    made = support::on_stack_of(small_stack, [&] {
      CancellationSource root;
      std::vector<CancellationSource> children;
      while (children.size() < million) children.emplace_back(root.token());
      root.cancel();
      for (const CancellationSource& one : children) cancelled += one.is_cancelled() ? 1U : 0U;
      while (!children.empty()) children.pop_back();
    });
  }
  REQUIRE(made);
  CHECK(cancelled == million);
}

TEST_CASE("A million callbacks, on one node or down a chain, run on a 128 KiB stack") {
  long runs = 0;
  using Callback = CancellationCallback<CountUp>;
  const std::size_t count = million / 2;
  const bool made = support::on_stack_of(small_stack, [&] {
    CancellationSource root;
    std::vector<CancellationSource> chain;
    std::vector<std::unique_ptr<Callback>> callbacks;
    chain.emplace_back(root.token());
    for (std::size_t i = 0; i < count; ++i) {
      callbacks.push_back(std::make_unique<Callback>(root.token(), CountUp{&runs}));
      callbacks.push_back(std::make_unique<Callback>(chain.back().token(), CountUp{&runs}));
      chain.emplace_back(chain.back().token());
    }
    root.cancel();
  });
  REQUIRE(made);
  CHECK(runs == static_cast<long>(2 * count));
}

TEST_CASE(
    "A chain of any_ofs and a lattice of them are cancelled and destroyed on a 128 KiB stack") {
  const std::size_t count = million / 4;
  std::size_t cancelled = 0;
  bool made = false;
  SECTION("a chain, destroyed in one go") {
    made = support::on_stack_of(small_stack, [&] {
      CancellationSource top;
      CancellationSource bottom(top.token());
      for (std::size_t i = 1; i < count; ++i) {
        CancellationSource next = CancellationSource::any_of({bottom.token()});
        bottom.disarm();
        bottom = std::move(next);
      }
      top.cancel();
      cancelled = bottom.is_cancelled() ? count : 0;
    });
  }
  SECTION("a lattice, held by its last row and destroyed in one go") {
    made = support::on_stack_of(small_stack, [&] {
      CancellationSource top;
      CancellationSource left(top.token());
      CancellationSource right(top.token());
      for (std::size_t i = 0; i < count / 2; ++i) {
        CancellationSource next_left = CancellationSource::any_of({left.token(), right.token()});
        CancellationSource next_right = CancellationSource::any_of({right.token(), left.token()});
        left.disarm();
        right.disarm();
        left = std::move(next_left);
        right = std::move(next_right);
      }
      top.cancel();
      cancelled = left.is_cancelled() && right.is_cancelled() ? count : 0;
    });
  }
  REQUIRE(made);
  CHECK(cancelled == count);
}

TEST_CASE("any_of takes a hundred thousand parents, on a 128 KiB stack") {
  constexpr std::size_t count = 100'000;
  const long before = live_allocations;
  bool made = false;
  std::size_t wrong = 0;
  for (const std::size_t which : {std::size_t{0}, count / 2, count - 1}) {
    made = support::on_stack_of(small_stack, [&] {
      std::vector<CancellationSource> parents(count);
      std::vector<CancellationToken> tokens;
      for (const CancellationSource& parent : parents) tokens.push_back(parent.token());
      const CancellationSource merged = CancellationSource::any_of(tokens);
      const CancellationSource child(merged.token());
      if (merged.is_cancelled()) ++wrong;
      parents[which].cancel(Cause::cancelled("this one"));
      if (child.token().cause().message() != "this one") ++wrong;
      parents.clear();
    });
  }
  REQUIRE(made);
  CHECK(wrong == 0);
  if (support::counts_allocations)
    CHECK(settles_at(before + 1));  // a thread may have left something of its own
}

// -------------------------------------------------------------------------------------- allocations

TEST_CASE("cancel() neither allocates nor frees") {
  CancellationSource root;
  std::vector<CancellationSource> nodes;
  std::vector<std::unique_ptr<CancellationCallback<CountUp>>> callbacks;
  long runs = 0;
  nodes.emplace_back(root.token());
  for (int i = 0; i < 300; ++i) {
    const CancellationToken above = nodes[static_cast<std::size_t>(i) * 2 / 3].token();
    switch (i % 4) {
      case 0: nodes.emplace_back(above); break;
      case 1: nodes.emplace_back(above, 1h); break;
      case 2: nodes.push_back(CancellationSource::any_of({above, nodes[0].token()})); break;
      default: nodes.emplace_back(above); static_cast<void>(nodes.back().token().fd());
    }
    callbacks.push_back(
        std::make_unique<CancellationCallback<CountUp>>(nodes.back().token(), CountUp{&runs}));
  }
  std::vector<std::unique_ptr<std::atomic<pid_t>>> ids;
  support::Threads threads;
  for (int i = 0; i < 4; ++i) {
    ids.push_back(std::make_unique<std::atomic<pid_t>>(0));
    threads.start([&, i, id = ids.back().get()] {
      *id = support::thread_id();
      nodes[static_cast<std::size_t>(i) * 50].token().wait();
    });
  }
  for (const auto& id : ids) support::let_it_block(*id);

  bool did = false;
  Calls calls{};
  SECTION("with the default cause") {
    calls = calls_of([&] { did = root.cancel(); });
  }
  SECTION("with an empty cause") {
    calls = calls_of([&] { did = root.cancel(Cause()); });
  }
  SECTION("with a cause on the heap that the caller keeps") {
    const Cause cause =
        Cause::failure(std::make_exception_ptr(std::runtime_error("kept")), "words");
    calls = calls_of([&] { did = root.cancel(cause); });
  }
  SECTION("with a cause on the heap that is given away") {
    Cause cause = Cause::cancelled("a message that is too long for any small string to hold it");
    calls = calls_of([&] { did = root.cancel(std::move(cause)); });
  }
  SECTION("the second time") {
    root.cancel();
    calls = calls_of([&] { did = !root.cancel() && !nodes[7].cancel(); });
  }
  threads.join();
  CHECK(did);
  CHECK(calls.allocations == 0);
  CHECK(calls.frees == 0);
  CHECK(runs == 300);
}

TEST_CASE("A callback, a wait, a look and a copy allocate nothing, a child one block") {
  CancellationSource root;
  const CancellationSource timed(root.token(), 1h);
  const CancellationToken token = timed.token();
  long runs = 0;
  bool answers = false;
  std::optional<CancellationSource> child;
  {
    const Calls calls =
        calls_of([&] { const CancellationCallback<CountUp> callback(token, CountUp{&runs}); });
    CHECK(calls.allocations == 0);
    CHECK(calls.frees == 0);
  }
  {
    const Calls calls = calls_of([&] {
      answers = token.wait_for(1ms) || token.wait_until(Clock::now() + 1ms) ||
                token.is_cancelled() || !token.can_be_cancelled() || token.cause() ||
                !token.deadline();
      token.throw_if_cancelled();
      CancellationToken copy = token;
      copy = CancellationToken(copy);
      CancellationSource moved = std::move(root);
      root = std::move(moved);
    });
    CHECK(calls.allocations == 0);
    CHECK(calls.frees == 0);
    CHECK_FALSE(answers);
  }
  // At most one: a compiler that sees a pair of new and delete may leave both out.
  CHECK(calls_of([&] { child.emplace(); }).allocations <= 1);
  CHECK(calls_of([&] { child.emplace(token); }).allocations <= 1);
  CHECK(calls_of([&] { child.reset(); }).frees <= 1);
  CHECK(calls_of([&] { child.emplace(token, 1min); }).allocations <= 1);
  CHECK(calls_of([&] { child.reset(); }).frees <= 1);
  root.cancel();
  CHECK(calls_of([&] { child.emplace(token); }).allocations <= 1);
  CHECK(calls_of([&] {
          static_cast<void>(token.cause());
          token.wait();
          const CancellationCallback<CountUp> at_once(token, CountUp{&runs});
        }).allocations == 0);
}

TEST_CASE("The common causes allocate nothing") {
  const Calls calls = calls_of([] {
    Cause cause = Cause::cancelled();
    cause = Cause::deadline_exceeded();
    const Cause copy = cause;
    cause = Cause();
    static_cast<void>(copy.message());
  });
  CHECK(calls.allocations == 0);
}

TEST_CASE("With any one allocation refused, a call throws bad_alloc and nothing has changed") {
  if (!support::can_refuse_allocations) return;
  CancellationSource root;
  const CancellationSource timed(root.token(), 1h);
  CancellationSource other;
  const CancellationToken token = timed.token();
  const std::vector<CancellationToken> parents = {token, other.token(), root.token()};
  const auto error = std::make_exception_ptr(std::runtime_error("an error"));
  const std::string words = "words that are too long for any small string optimisation to hold";
  static_cast<void>(timed.token().can_be_cancelled());
  const std::vector<std::function<void()>> calls = {
      [&] { const CancellationSource source; },
      [&] { const CancellationSource source(token); },
      [&] { const CancellationSource source(token, 1min); },
      [&] { const CancellationSource source(token, -1min); },
      [&] { const CancellationSource source = CancellationSource::any_of(parents); },
      [&] {
        const CancellationSource source = CancellationSource::any_of({token, other.token()});
      },
      [&] {
        const CancellationSource source(root.token());
        static_cast<void>(source.token().fd());
      },
      [&] { static_cast<void>(Cause::cancelled(words)); },
      [&] { static_cast<void>(Cause::failure(error, words)); },
      [&] { static_cast<void>(Cause::failure(error)); },
      [&] {
        static_cast<void>(Cause::signal({15, 0, 1, 0, Clock::now()}));
      },
  };
  const std::size_t armed = armed_timers();
  for (std::size_t i = 0; i < calls.size(); ++i) {
    INFO("call number " << i);
    calls[i]();  // what is made once is made now
    int thrown_in_all = 0;
    for (long nth = 1;; ++nth) {
      const long before = live_allocations;
      const int descriptors = support::open_descriptors();
      bool thrown = false;
      support::refuse_allocation = nth;
      try {
        calls[i]();
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      const bool refused_one = support::refuse_allocation == 0;
      support::refuse_allocation = 0;
      if (!refused_one) break;
      // One that the language runtime asked for, to throw something, comes out of its reserve.
      if (thrown) ++thrown_in_all;
      CHECK(live_allocations == before);
      CHECK(support::open_descriptors() == descriptors);
      CHECK(armed_timers() == armed);
      REQUIRE(nth < 100);
    }
    // A node that is nothing but a node has its memory from the pool, which has some: see node_pool_test.cpp.
    const bool pooled = i < 2 && lastcall::detail::NodePool::is_used;
    CHECK((thrown_in_all > 0) != pooled);
  }
  CHECK_FALSE(root.is_cancelled());
  CHECK(root.cancel());
  CHECK(timed.is_cancelled());
}

// ------------------------------------------------------------------------------------- nothing is left

TEST_CASE(
    "Ten million children made and dropped under one live parent leave the process as small") {
  CancellationSource root;
  const CancellationSource parent(root.token());
  const CancellationToken token = parent.token();
  long runs = 0;
  const auto make_some = [&](std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      CancellationSource child(token);
      if (i % 16 == 0) {
        const CancellationSource grandchild(child.token());
        child.disarm();
      }
      if (i % 16 == 5) child.cancel();
      if (i % 16 == 9) {
        const CancellationCallback<CountUp> callback(child.token(), CountUp{&runs});
        const CancellationSource merged = CancellationSource::any_of({child.token(), root.token()});
      }
    }
  };
  make_some(1000);
  const long before = live_allocations;
  const std::size_t resident = support::resident_bytes();
  make_some(10 * million);
  CHECK(live_allocations == before);
  if (!support::under_sanitizer) CHECK(support::resident_bytes() < resident + 1024UL * 1024UL);
  CHECK_FALSE(parent.is_cancelled());
}

TEST_CASE("Children that outlive their cancelled parent are given back, too") {
  const std::size_t count = million / 10;
  const long before = live_allocations;
  {
    std::vector<CancellationToken> tokens;
    {
      CancellationSource root;
      for (std::size_t i = 0; i < count; ++i) {
        CancellationSource child(root.token());
        if (i % 2 == 0) child.disarm();
        tokens.push_back(child.token());
      }
    }
    for (const CancellationToken& token : tokens) {
      if (!token.is_cancelled()) FAIL("a token was left uncancelled");
    }
  }
  CHECK(live_allocations == before);
}

TEST_CASE("A hundred thousand deadlines made and destroyed leave no timer and no memory") {
  constexpr std::size_t count = 100'000;
  { const CancellationSource first(CancellationToken(), 1h); }  // the thread stays
  const std::size_t armed = armed_timers();
  const auto spread = [](std::size_t i) {
    return 1h + std::chrono::milliseconds(i * 7919 % 86'400'000);
  };
  enum class How { one_by_one, all_at_once, cancelled_from_above, fired };
  for (const How how : {How::one_by_one, How::all_at_once, How::cancelled_from_above, How::fired}) {
    INFO("way " << static_cast<int>(how));
    const long before = live_allocations;
    std::size_t armed_between = armed + count;
    bool in_time = true;
    {
      CancellationSource root;
      std::vector<CancellationSource> timed;
      timed.reserve(count);
      const auto soon = Clock::now() + 20ms;
      for (std::size_t i = 0; i < count; ++i) {
        if (how == How::one_by_one) {
          const CancellationSource goes(root.token(), spread(i));
        } else if (how == How::fired) {
          timed.emplace_back(root.token(), soon + std::chrono::microseconds(i));
        } else {
          timed.emplace_back(root.token(), spread(i));
        }
      }
      if (how == How::all_at_once) armed_between = armed_timers();
      if (how == How::cancelled_from_above) {
        root.cancel();
        armed_between += armed_timers() - armed;
      }
      if (how == How::fired) {
        for (const CancellationSource& one : timed) {
          in_time = in_time && one.token().wait_for(30s) && Clock::now() >= one.token().deadline();
        }
      }
    }
    CHECK(in_time);
    CHECK(armed_between == armed + count);
    CHECK(armed_timers() == armed);
    CHECK(settles_at(before));
  }
}

// ---------------------------------------------------------------------------------- processor time

TEST_CASE("A thousand idle waiters and as many pending deadlines use no processor time") {
  // The stacks of a thousand have no place in 32 bits of address space.
  constexpr int count = sizeof(void*) < 8 ? 200 : 1000;
  CancellationSource root;
  std::vector<CancellationSource> timed;
  for (int i = 0; i < count; ++i) timed.emplace_back(root.token(), 1h + std::chrono::seconds(i));
  std::atomic<int> waiting{0};
  std::atomic<int> woken{0};
  support::Threads threads;
  for (int i = 0; i < count; ++i) {
    threads.start([&, i] {
      const CancellationToken token =
          i % 2 == 0 ? root.token() : timed[static_cast<std::size_t>(i)].token();
      ++waiting;
      if (i % 3 == 0) {
        token.wait();
      } else if (token.wait_for(2h)) {
        ++woken;
      }
    });
  }
  REQUIRE(support::eventually([&] { return waiting == count; }));
  // Until they all sleep, then for a while: whoever polls or spins shows up in any such while.
  std::chrono::nanoseconds spent{};
  const bool quiet = support::eventually(
      [&] {
        const auto before = support::cpu_time_of_process();
        std::this_thread::sleep_for(500ms);
        spent = support::cpu_time_of_process() - before;
        return spent < 5ms;
      },
      20s);
  root.cancel();
  threads.join();
  CHECK(woken == count * 2 / 3);
  if (!support::under_sanitizer) CHECK(quiet);
}

// ------------------------------------------------------------------------------------------ forking

namespace {

// The allocation at which the thread that makes a process's first deadline stands still.
thread_local int allocations_until_stop = 0;
std::atomic<bool> stopped{false};
std::atomic<bool> may_go_on{false};

bool stop_at_allocation() noexcept {
  if (allocations_until_stop > 0 && --allocations_until_stop == 0) {
    stopped = true;
    // Not for ever: the fork may have to wait for this.
    for (int turn = 0; turn < 2000 && !may_go_on; ++turn) ::usleep(500);
  }
  return false;
}

}  // namespace

TEST_CASE("A child that is forked while another thread makes the first deadline may make its own") {
  if (!support::can_refuse_allocations) return;
  for (int at = 1; at <= 3; ++at) {
    INFO("the other thread stands at allocation " << at);
    CHECK(support::in_child_process([at] {
            support::refusal_rule = &stop_at_allocation;
            std::atomic<bool> over{false};
            std::thread other([&] {
              allocations_until_stop = at;
              { const CancellationSource first(CancellationToken(), 1h); }
              allocations_until_stop = 0;
              over = true;
            });
            while (!stopped && !over) ::usleep(500);
            const int outcome = support::in_child_process([] {
              ::alarm(20);
              const CancellationSource own(CancellationToken(), 5ms);
              return own.token().wait_for(15s) ? 0 : 10;
            });
            may_go_on = true;
            other.join();
            if (outcome != 0) return outcome;
            // And forks of the two that have made it are well, too.
            return support::in_child_process([] {
              ::alarm(20);
              const CancellationSource own(CancellationToken(), 5ms);
              return own.token().wait_for(15s) ? 0 : 11;
            });
          }) == 0);
  }
}

TEST_CASE("A child that is forked while a deadline cancels a large tree finds none of it locked") {
  if (support::under_sanitizer) return;
  // Without other threads than the library's, so that the child may do what it likes.
  const int outcome = support::in_child_process([] {
    for (int turn = 0; turn < 5; ++turn) {
      CancellationSource root(CancellationToken(), 500ms);
      std::vector<CancellationSource> children;
      for (int i = 0; i < 200'000; ++i) children.emplace_back(root.token());
      const auto begin = Clock::now();
      while (!children.front().is_cancelled() && !children.back().is_cancelled()) {
        if (Clock::now() - begin > 30s) return 10;
      }
      const int forked = support::in_child_process([&] {
        ::alarm(20);
        if (!root.token().wait_for(1ms) || root.cancel()) return 11;
        const CancellationSource child(root.token());
        return child.is_cancelled() && children[100'000].is_cancelled() ? 0 : 12;
      });
      if (forked != 0) return forked;
      root.token().wait();
    }
    return 0;
  });
  CHECK(outcome == 0);
}
