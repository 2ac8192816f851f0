// The tree is Go's context tree. These are the properties that the tests of Go's context package
// check (context_test, x_test, afterfunc_test, benchmarks aside), asked of sources and tokens: a
// context is a token, its CancelFunc is its source, Done() is wait() or fd(), Err() and Cause() are
// cause(), AfterFunc is a callback, its stop is the callback's end.
#include <lastcall/cancellation.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::Clock;
using namespace std::chrono_literals;

namespace {

using AnyCallback = CancellationCallback<std::function<void()>>;

std::string message_of(const CancellationToken& token) { return token.cause().message(); }

/// context.AfterFunc: runs once when the token is cancelled, unless stop() came first.
class AfterFunc {
 public:
  AfterFunc(const CancellationToken& token, std::function<void()> f)
      : state_(std::make_shared<State>()) {
    state_->f = std::move(f);
    callback_ = std::make_unique<AnyCallback>(token, [state = state_] {
      // Whoever takes the word first decides: run or stop.
      if (!state->taken.exchange(true)) state->f();
    });
  }
  /// True if this call kept the function from running.
  bool stop() {
    const bool prevented = !state_->taken.exchange(true);
    callback_.reset();
    return prevented;
  }

 private:
  struct State {
    std::atomic<bool> taken{false};
    std::function<void()> f;
  };
  std::shared_ptr<State> state_;
  std::unique_ptr<AnyCallback> callback_;
};

/// One step that cancels somebody: by hand with a cause, or by letting a deadline pass.
struct Step {
  enum class Who { parent, child } who;
  const char* cause;
};

}  // namespace

// --------------------------------------------------------------------------- causes, in every order

TEST_CASE(
    "Causes: whoever is cancelled first keeps its cause, in every order of parent and child") {
  using Who = Step::Who;
  struct Row {
    std::vector<Step> steps;
    std::string parent;  // "" : not cancelled
    std::string child;
  };
  const std::vector<Row> table = {
      {{}, "", ""},
      {{{Who::parent, "p"}}, "p", "p"},
      {{{Who::child, "c"}}, "", "c"},
      {{{Who::parent, "p"}, {Who::child, "c"}}, "p", "p"},
      {{{Who::child, "c"}, {Who::parent, "p"}}, "p", "c"},
      {{{Who::parent, "p"}, {Who::parent, "q"}}, "p", "p"},
      {{{Who::child, "c"}, {Who::child, "d"}}, "", "c"},
      {{{Who::child, "c"}, {Who::parent, "p"}, {Who::child, "d"}, {Who::parent, "q"}}, "p", "c"},
      {{{Who::parent, nullptr}}, "plain", "plain"},
      {{{Who::child, nullptr}}, "", "plain"},
      {{{Who::parent, nullptr}, {Who::child, "c"}}, "plain", "plain"},
      {{{Who::child, "c"}, {Who::parent, nullptr}}, "plain", "c"},
      {{{Who::child, nullptr}, {Who::parent, "p"}}, "p", "plain"},
  };
  const std::string plain = Cause::cancelled().message();
  for (std::size_t row = 0; row < table.size(); ++row) {
    INFO("row " << row);
    CancellationSource parent;
    CancellationSource child(parent.token());
    const CancellationSource grandchild(child.token());
    for (const Step& step : table[row].steps) {
      CancellationSource& whose = step.who == Who::parent ? parent : child;
      const bool fresh = !whose.is_cancelled();
      const bool did = step.cause == nullptr ? whose.cancel(Cause())
                                             : whose.cancel(Cause::cancelled(step.cause));
      CHECK(did == fresh);
    }
    const auto expected = [&](const std::string& word) { return word == "plain" ? plain : word; };
    CHECK(parent.is_cancelled() == !table[row].parent.empty());
    CHECK(child.is_cancelled() == !table[row].child.empty());
    CHECK(message_of(parent.token()) == expected(table[row].parent));
    CHECK(message_of(child.token()) == expected(table[row].child));
    CHECK(message_of(grandchild.token()) == expected(table[row].child));
  }
}

TEST_CASE("Causes: a deadline and a cancel, in both orders, on parent and child") {
  {
    CancellationSource source(CancellationToken(), 5ms);
    source.token().wait();
    CHECK_FALSE(source.cancel(Cause::cancelled("after the deadline")));
    CHECK(source.token().cause().kind() == CauseKind::deadline_exceeded);
  }
  {
    CancellationSource source(CancellationToken(), 1h);
    CHECK(source.cancel(Cause::cancelled("before the deadline")));
    CHECK(message_of(source.token()) == "before the deadline");
  }
  {
    CancellationSource parent;
    const CancellationSource child(parent.token(), 5ms);
    child.token().wait();
    parent.cancel(Cause::cancelled("the parent, late"));
    CHECK(child.token().cause().kind() == CauseKind::deadline_exceeded);
    CHECK(message_of(parent.token()) == "the parent, late");
  }
  {
    const CancellationSource parent(CancellationToken(), 5ms);
    CancellationSource child(parent.token());
    const CancellationSource other(parent.token());
    child.cancel(Cause::cancelled("the child, early"));
    other.token().wait();
    const CancellationToken token = child.token();
    // The parent's deadline may have passed first on a slow machine: then that is the cause.
    CHECK((message_of(token) == "the child, early" ||
           token.cause().kind() == CauseKind::deadline_exceeded));
    CHECK(other.token().cause().kind() == CauseKind::deadline_exceeded);
  }
}

TEST_CASE("Causes: a failure's exception travels down as it is") {
  const auto error = std::make_exception_ptr(std::runtime_error("upstream broke"));
  CancellationSource root;
  const CancellationSource middle(root.token(), 1h);
  const CancellationSource leaf(middle.token());
  root.cancel(Cause::failure(error));
  CHECK(leaf.token().cause().exception() == error);
  CHECK(message_of(leaf.token()) == "upstream broke");
}

// --------------------------------------------------------------------------------------------- layers

TEST_CASE("Layers: a random stack of cancels and deadlines answers right at every height") {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    INFO("seed " << seed);
    support::Random random(seed);
    const auto far = Clock::now() + 1h;
    struct Layer {
      CancellationSource source;
      std::optional<Clock::time_point> nearest;
    };
    std::vector<Layer> layers;
    layers.push_back({CancellationSource(), std::nullopt});
    for (int i = 0; i < 30; ++i) {
      const CancellationToken above = layers.back().source.token();
      std::optional<Clock::time_point> nearest = layers.back().nearest;
      switch (random.below(3)) {
        case 0: layers.push_back({CancellationSource(above), nearest}); break;
        case 1: {
          const auto at = far + std::chrono::seconds(random.below(3600));
          if (!nearest || at < *nearest) nearest = at;
          layers.push_back({CancellationSource(above, at), nearest});
          break;
        }
        default:
          layers.push_back({CancellationSource::any_of({above, CancellationToken()}), nearest});
      }
    }
    for (const Layer& layer : layers) {
      CHECK_FALSE(layer.source.is_cancelled());
      CHECK(layer.source.token().can_be_cancelled());
      CHECK(layer.source.token().deadline() == layer.nearest);
    }
    // From the bottom, in leaps: each cancel takes what is below it and has not gone yet.
    std::size_t lowest = layers.size();
    while (lowest > 0) {
      const std::size_t at = random.below(lowest);
      CHECK(layers[at].source.cancel(Cause::cancelled(std::to_string(at))));
      for (std::size_t i = 0; i < layers.size(); ++i) {
        const CancellationToken token = layers[i].source.token();
        CHECK(token.is_cancelled() == (i >= at));
        if (i >= at && i < lowest) CHECK(message_of(token) == std::to_string(at));
        CHECK(token.deadline() == layers[i].nearest);
      }
      lowest = at;
    }
  }
}

TEST_CASE(
    "Layers: a deadline in the middle of the stack cancels what is below it and nothing above") {
  support::Random random(7);
  for (int round = 0; round < 10; ++round) {
    std::vector<CancellationSource> layers;
    layers.emplace_back();
    const std::size_t timed = 1 + random.below(8);
    for (std::size_t i = 1; i < 10; ++i) {
      const CancellationToken above = layers.back().token();
      if (i == timed) {
        layers.emplace_back(above, 3ms);
      } else if (random.one_in(2)) {
        layers.emplace_back(above, 1h);
      } else {
        layers.emplace_back(above);
      }
    }
    layers.back().token().wait();
    for (std::size_t i = timed; i < layers.size(); ++i) {
      // Who sees the lowest cancelled waits a moment for the layer that did it.
      CHECK(layers[i].token().wait_for(30s));
      CHECK(layers[i].token().cause().kind() == CauseKind::deadline_exceeded);
    }
    for (std::size_t i = 0; i < timed; ++i) CHECK_FALSE(layers[i].is_cancelled());
  }
}

// ---------------------------------------------------------------------- simultaneous and interlocked

TEST_CASE("Simultaneous cancels: a random tree, every node cancelled at once by several threads") {
  constexpr int rounds = support::under_sanitizer ? 15 : 60;
  int left = 0;
  int without_cause = 0;
  for (int round = 0; round < rounds; ++round) {
    support::Random random(static_cast<std::uint64_t>(round) + 100);
    std::vector<CancellationSource> nodes;
    nodes.emplace_back();
    while (nodes.size() < 100) nodes.emplace_back(nodes[random.below(nodes.size())].token());
    std::vector<std::size_t> order(nodes.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (std::size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random.below(i)]);
    std::atomic<int> woken{0};
    support::StartingLine line(4);
    support::Threads threads;
    for (std::size_t thread = 0; thread < 4; ++thread) {
      threads.start([&, thread] {
        line.ready_steady_go();
        for (std::size_t i = thread; i < order.size(); i += 4) {
          nodes[order[i]].cancel(Cause::cancelled(std::to_string(order[i])));
          nodes[order[i]].token().wait();
          ++woken;
        }
      });
    }
    threads.join();
    left += 100 - woken;
    for (const CancellationSource& node : nodes) {
      if (message_of(node.token()).empty()) ++without_cause;
    }
  }
  CHECK(left == 0);
  CHECK(without_cause == 0);
}

TEST_CASE("Interlocked cancels: a child's callback cancels its parent, a parent's its child") {
  {
    CancellationSource parent;
    CancellationSource child(parent.token());
    const CancellationSource sibling(parent.token());
    const CancellationCallback up(child.token(), [&] { parent.cancel(Cause::cancelled("up")); });
    CHECK(child.cancel(Cause::cancelled("child")));
    CHECK(message_of(child.token()) == "child");
    CHECK(message_of(parent.token()) == "up");
    CHECK(message_of(sibling.token()) == "up");
  }
  {
    CancellationSource parent;
    CancellationSource child(parent.token());
    bool inner = true;
    const CancellationCallback down(parent.token(), [&] { inner = child.cancel(); });
    CHECK(parent.cancel(Cause::cancelled("parent")));
    CHECK_FALSE(inner);
    CHECK(message_of(child.token()) == "parent");
  }
}

TEST_CASE("Interlocked cancels: two trees whose callbacks cancel each other, from two threads") {
  constexpr int rounds = support::under_sanitizer ? 100 : 600;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource a;
    CancellationSource b;
    const CancellationSource under_a(a.token());
    const CancellationSource under_b(b.token());
    std::atomic<int> runs{0};
    const CancellationCallback on_a(under_a.token(), [&] {
      ++runs;
      b.cancel(Cause::cancelled("by a"));
    });
    const CancellationCallback on_b(under_b.token(), [&] {
      ++runs;
      a.cancel(Cause::cancelled("by b"));
    });
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      a.cancel(Cause::cancelled("a"));
    });
    line.ready_steady_go();
    b.cancel(Cause::cancelled("b"));
    threads.join();
    if (runs != 2 || !under_a.is_cancelled() || !under_b.is_cancelled()) ++wrong;
    const std::string cause_a = message_of(a.token());
    const std::string cause_b = message_of(b.token());
    if (cause_a != "a" && cause_a != "by b") ++wrong;
    if (cause_b != "b" && cause_b != "by a") ++wrong;
    if (cause_a == "by b" && cause_b == "by a") ++wrong;  // somebody was first
  }
  CHECK(wrong == 0);
}

TEST_CASE("Interlocked cancels: a ring of trees, each cancelling the next") {
  for (std::size_t size = 2; size <= 50; size += 12) {
    std::vector<CancellationSource> ring(size);
    std::vector<std::unique_ptr<AnyCallback>> callbacks;
    std::size_t runs = 0;
    for (std::size_t i = 0; i < size; ++i) {
      callbacks.push_back(std::make_unique<AnyCallback>(ring[i].token(), [&, i] {
        ++runs;
        ring[(i + 1) % size].cancel();
      }));
    }
    ring[size / 2].cancel();
    CHECK(runs == size);
  }
}

TEST_CASE("Interlocked cancels: threads that wait for one and cancel the other") {
  constexpr int rounds = support::under_sanitizer ? 60 : 300;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource parent;
    CancellationSource child(parent.token());
    support::Threads threads;
    threads.start([&] {
      parent.token().wait();
      child.cancel();
    });
    threads.start([&] {
      child.token().wait();
      parent.cancel();
    });
    if (round % 2 == 0) {
      parent.cancel();
    } else {
      child.cancel();
    }
    threads.join();
    if (!parent.is_cancelled() || !child.is_cancelled()) FAIL("somebody was left behind");
  }
  SUCCEED();
}

// ---------------------------------------------------------------------------------------- being born

TEST_CASE("Born cancelled: whatever kind of child is made under a cancelled parent") {
  CancellationSource parent;
  parent.cancel(Cause::cancelled("gone before"));
  const CancellationSource plain(parent.token());
  const CancellationSource timed(parent.token(), 1h);
  const CancellationSource by_point(parent.token(), Clock::now() + 1h);
  const CancellationSource past(parent.token(), -1h);
  const CancellationSource merged = CancellationSource::any_of({parent.token()});
  for (const auto* child : {&plain, &timed, &by_point, &past, &merged}) {
    CHECK(child->is_cancelled());
    CHECK(message_of(child->token()) == "gone before");
    CHECK(child->token().wait_for(0s));
    CHECK(support::is_readable(child->token().fd()));
    int runs = 0;
    const CancellationCallback callback(child->token(), [&] { ++runs; });
    CHECK(runs == 1);
  }
}

TEST_CASE("Racing construction: whoever is made while its parent is cancelled ends up cancelled") {
  constexpr int rounds = support::under_sanitizer ? 60 : 400;
  int uncancelled = 0;
  int wrong_cause = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource root;
    CancellationSource middle(root.token());
    std::vector<CancellationSource> made[2];
    support::StartingLine line(3);
    support::Threads threads;
    for (std::size_t thread = 0; thread < 2; ++thread) {
      threads.start([&, thread] {
        line.ready_steady_go();
        for (int i = 0; i < 15; ++i) {
          const CancellationToken above =
              made[thread].empty() || i % 3 == 0 ? middle.token() : made[thread].back().token();
          switch (i % 4) {
            case 0: made[thread].emplace_back(above); break;
            case 1: made[thread].emplace_back(above, 1h); break;
            case 2:
              made[thread].push_back(CancellationSource::any_of({root.token(), above}));
              break;
            default: made[thread].emplace_back(above, Clock::now() + 2h);
          }
        }
      });
    }
    line.ready_steady_go();
    root.cancel(Cause::cancelled("race"));
    threads.join();
    for (const auto& some : made) {
      for (const CancellationSource& source : some) {
        if (!source.is_cancelled()) ++uncancelled;
        if (message_of(source.token()) != "race") ++wrong_cause;
      }
    }
  }
  CHECK(uncancelled == 0);
  CHECK(wrong_cause == 0);
}

TEST_CASE("Racing construction: who has seen the cancel makes only cancelled children") {
  constexpr int rounds = support::under_sanitizer ? 100 : 600;
  std::atomic<int> uncancelled{0};
  for (int round = 0; round < rounds; ++round) {
    CancellationSource parent;
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      while (!parent.is_cancelled()) {
      }
      if (!CancellationSource(parent.token()).is_cancelled()) ++uncancelled;
      if (!CancellationSource(parent.token(), 1h).is_cancelled()) ++uncancelled;
      if (!CancellationSource::any_of({parent.token()}).is_cancelled()) ++uncancelled;
    });
    line.ready_steady_go();
    parent.cancel();
  }
  CHECK(uncancelled == 0);
}

// ------------------------------------------------------------------------------- timeouts, deadlines

TEST_CASE("WithDeadline: cancelled at its deadline, and so is a WithCancel below it") {
  for (int form = 0; form < 3; ++form) {
    const auto begin = Clock::now();
    const CancellationSource outer = form == 0
                                         ? CancellationSource(CancellationToken(), begin + 8ms)
                                         : CancellationSource(CancellationToken(), begin + 1h);
    const CancellationSource inner = form == 1   ? CancellationSource(outer.token(), begin + 8ms)
                                     : form == 2 ? CancellationSource(outer.token(), 8ms)
                                                 : CancellationSource(outer.token());
    const CancellationSource leaf(inner.token());
    CHECK(leaf.token().wait_for(30s));
    CHECK(Clock::now() - begin >= 8ms);
    CHECK(leaf.token().cause().kind() == CauseKind::deadline_exceeded);
    if (form > 0) CHECK_FALSE(outer.is_cancelled());
  }
}

TEST_CASE("WithTimeout: an earlier deadline of the parent wins, a later one does not") {
  const auto now = Clock::now();
  const CancellationSource parent(CancellationToken(), now + 10ms);
  const CancellationSource child(parent.token(), now + 1h);
  CHECK(child.token().deadline() == now + 10ms);
  CHECK(child.token().wait_for(30s));
  CHECK(parent.token().wait_for(30s));
  const CancellationSource late_parent(CancellationToken(), now + 1h);
  const CancellationSource early_child(late_parent.token(), Clock::now() + 5ms);
  CHECK(early_child.token().wait_for(30s));
  CHECK_FALSE(late_parent.is_cancelled());
}

TEST_CASE("WithTimeout: zero and negative are exceeded at birth, on top of a deadline too") {
  const CancellationSource parent(CancellationToken(), 1h);
  for (const auto span : {0ms, -1ms, -3'600'000ms}) {
    const CancellationSource child(parent.token(), span);
    CHECK(child.is_cancelled());
    CHECK(child.token().cause().kind() == CauseKind::deadline_exceeded);
    REQUIRE(child.token().deadline().has_value());
    CHECK(*child.token().deadline() <= Clock::now());
  }
  CHECK_FALSE(parent.is_cancelled());
}

TEST_CASE("WithTimeout: cancelled long before its time, it says cancelled and stays so") {
  CancellationSource parent(CancellationToken(), 1h);
  CancellationSource child(parent.token(), 30min);
  const CancellationSource leaf(child.token(), 20min);
  CHECK(child.cancel());
  CHECK(leaf.token().cause().kind() == CauseKind::cancelled);
  CHECK_FALSE(parent.is_cancelled());
}

TEST_CASE("Racing a deadline against a cancel: one cause, for the whole subtree") {
  constexpr int rounds = support::under_sanitizer ? 60 : 250;
  support::Random random(12);
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source(CancellationToken(),
                              std::chrono::microseconds(500 + random.below(1500)));
    const CancellationSource child(source.token());
    const CancellationSource merged = CancellationSource::any_of({child.token()});
    std::atomic<int> runs{0};
    const CancellationCallback callback(merged.token(), [&] { ++runs; });
    CancellationToken().wait_for(std::chrono::microseconds(500 + random.below(1500)));
    const bool did = source.cancel(Cause::cancelled("by hand"));
    const Cause cause = source.token().cause();
    if (did != (cause.kind() == CauseKind::cancelled)) ++wrong;
    if (child.token().cause().kind() != cause.kind()) ++wrong;
    if (merged.token().cause().kind() != cause.kind()) ++wrong;
    if (!support::eventually([&] { return runs == 1; })) ++wrong;
  }
  CHECK(wrong == 0);
}

// -------------------------------------------------------------------------------------- nothing left

TEST_CASE("Children are removed: a parent that lives on keeps nothing of those that are gone") {
  const int before = support::open_descriptors();
  CancellationSource parent;
  int made = 0;
  for (int i = 0; i < 300; ++i) {
    // A descriptor shows that the node is alive.
    CancellationSource cancelled(parent.token());
    const CancellationSource below(cancelled.token());
    if (cancelled.token().fd() >= 0 && below.token().fd() >= 0) ++made;
    switch (i % 3) {
      case 0: cancelled.cancel(); break;
      case 1: cancelled.disarm(); break;
      default: break;
    }
  }
  CHECK(made == 300);
  CHECK(support::open_descriptors() == before);
  parent.cancel();
  CHECK(support::open_descriptors() == before);
}

TEST_CASE("Children are removed when the parent is cancelled, too, with their last handle") {
  const int before = support::open_descriptors();
  {
    CancellationSource parent;
    std::vector<CancellationSource> children;
    std::vector<CancellationToken> tokens;
    for (int i = 0; i < 50; ++i) {
      children.emplace_back(parent.token());
      tokens.push_back(children.back().token());
      static_cast<void>(tokens.back().fd());
    }
    parent.cancel();
    children.clear();
    CHECK(support::open_descriptors() >= before + 50);
    tokens.clear();
    CHECK(support::open_descriptors() == before);
  }
  CHECK(support::open_descriptors() == before);
}

#if defined(__linux__)
TEST_CASE("No thread a child, a callback, a merge or a deadline") {
  const CancellationSource first(CancellationToken(), 1h);  // the timer thread is there from now on
  const int before = support::live_threads();
  CancellationSource parent;
  std::vector<CancellationSource> children;
  std::vector<std::unique_ptr<AnyCallback>> callbacks;
  for (int i = 0; i < 200; ++i) {
    children.emplace_back(parent.token());
    children.emplace_back(parent.token(), 1h);
    children.push_back(CancellationSource::any_of({parent.token(), children.back().token()}));
    callbacks.push_back(std::make_unique<AnyCallback>(children.back().token(), [] {}));
  }
  CHECK(support::live_threads() == before);
  parent.cancel();
  CHECK(support::live_threads() == before);
}
#endif

TEST_CASE("Done, asked for by many threads before and after the cancel, is one and the same") {
  constexpr int rounds = support::under_sanitizer ? 30 : 150;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    const CancellationSource child(source.token());
    std::array<std::atomic<int>, 4> fds{};
    support::StartingLine line(5);
    support::Threads threads;
    for (std::size_t i = 0; i < fds.size(); ++i) {
      threads.start([&, i] {
        line.ready_steady_go();
        fds[i] = child.token().fd();
        if (!support::is_readable(fds[i], 30'000)) fds[i] = -2;
      });
    }
    line.ready_steady_go();
    source.cancel();
    threads.join();
    for (const auto& fd : fds) {
      if (fd < 0 || fd != fds[0]) ++wrong;
    }
  }
  CHECK(wrong == 0);
}

// ------------------------------------------------------------------------------------------ AfterFunc

TEST_CASE("AfterFunc: called once, after the cancel, and stop() is false then") {
  CancellationSource source;
  int calls = 0;
  AfterFunc after(source.token(), [&] { ++calls; });
  CHECK(calls == 0);
  source.cancel();
  CHECK(calls == 1);
  CHECK_FALSE(after.stop());
  CHECK_FALSE(after.stop());
  CHECK(calls == 1);
}

TEST_CASE("AfterFunc: called after a timeout, and at once on what is cancelled") {
  std::atomic<int> calls{0};
  const CancellationSource timed(CancellationToken(), 5ms);
  AfterFunc after(timed.token(), [&] { ++calls; });
  CHECK(support::eventually([&] { return calls == 1; }));
  AfterFunc at_once(timed.token(), [&] { ++calls; });
  CHECK(calls == 2);
  CHECK_FALSE(at_once.stop());
  CHECK_FALSE(after.stop());
}

TEST_CASE("AfterFunc: not called after stop(), which is true the first time only") {
  CancellationSource source;
  int calls = 0;
  AfterFunc after(source.token(), [&] { ++calls; });
  CHECK(after.stop());
  CHECK_FALSE(after.stop());
  source.cancel();
  CHECK(calls == 0);
}

TEST_CASE("AfterFunc: several on one token are independent of each other") {
  CancellationSource source;
  int first_calls = 0;
  int second_calls = 0;
  AfterFunc first(source.token(), [&] { ++first_calls; });
  AfterFunc second(source.token(), [&] { ++second_calls; });
  CHECK(first.stop());
  source.cancel();
  CHECK(first_calls == 0);
  CHECK(second_calls == 1);
  CHECK_FALSE(second.stop());
}

TEST_CASE("AfterFunc: called when an ancestor is cancelled, not when a descendant is") {
  CancellationSource root;
  const CancellationSource middle(root.token());
  CancellationSource leaf(middle.token());
  int calls = 0;
  AfterFunc after(middle.token(), [&] { ++calls; });
  leaf.cancel();
  CHECK(calls == 0);
  root.cancel();
  CHECK(calls == 1);
}

TEST_CASE("AfterFunc: stop() racing the cancel: it ran, or it was stopped, never both or neither") {
  constexpr int rounds = support::under_sanitizer ? 150 : 1000;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    std::atomic<int> calls{0};
    AfterFunc after(source.token(), [&] { ++calls; });
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      source.cancel();
    });
    line.ready_steady_go();
    const bool prevented = after.stop();
    threads.join();
    if (calls + (prevented ? 1 : 0) != 1) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("AfterFunc: wakes somebody who waits for something else") {
  // Go's example: a condition variable that a cancel interrupts.
  CancellationSource source;
  std::mutex mutex;
  std::condition_variable changed;
  bool stopped = false;
  support::Threads threads;
  threads.start([&] {
    const AnyCallback wake(source.token(), [&] {
      const std::lock_guard<std::mutex> lock(mutex);
      stopped = true;
      changed.notify_all();
    });
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return stopped; });
  });
  source.cancel();
  threads.join();
  CHECK(stopped);
}

// ---------------------------------------------------------------------------------------------- merge

TEST_CASE("Merge: a context of one request and of the whole service, whichever ends first") {
  for (const bool service_first : {true, false}) {
    CancellationSource service;
    CancellationSource request;
    const CancellationSource merged =
        CancellationSource::any_of({service.token(), request.token()});
    const CancellationSource work(merged.token(), 1h);
    (service_first ? service : request).cancel(Cause::cancelled("first"));
    (service_first ? request : service).cancel(Cause::cancelled("second"));
    CHECK(message_of(work.token()) == "first");
  }
}

TEST_CASE("Merge: many requests merged with one service leave nothing when they end") {
  const int before = support::open_descriptors();
  const CancellationSource service;
  for (int i = 0; i < 200; ++i) {
    const CancellationSource request;
    const CancellationSource merged =
        CancellationSource::any_of({service.token(), request.token()});
    static_cast<void>(merged.token().fd());
  }
  CHECK_FALSE(service.is_cancelled());
  CHECK(support::open_descriptors() == before);
}
