// CancellationCallback follows std::stop_callback's rules to the letter. These are the properties
// that the test suites of libstdc++, libc++, folly and stdexec check for stop_source, stop_token and
// stop_callback (C++20 [thread.stoptoken]) and their kin, asked of the cancellation tree.
#include <lastcall/cancellation.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using namespace std::chrono_literals;

namespace {

using AnyCallback = CancellationCallback<std::function<void()>>;

// ---- what can be said in types --------------------------------------------------------------------

// std::stoppable_token, as the C++26 working draft words it in [stoptoken.concepts].
template <template <class> class>
struct AliasExists;

template <class Token>
concept StoppableToken = requires(const Token token) {
  typename AliasExists<Token::template callback_type>;
  { token.stop_requested() }
  noexcept->std::same_as<bool>;
  { token.stop_possible() }
  noexcept->std::same_as<bool>;
  { Token(token) }
  noexcept;
}
&&std::copyable<Token>&& std::equality_comparable<Token>;
static_assert(StoppableToken<CancellationToken>);
static_assert(std::regular<CancellationToken>);
static_assert(std::swappable<CancellationToken>);

template <class Token, class Function, class Initializer = Function>
concept StoppableCallbackFor =
    std::invocable<Function> && std::constructible_from<Function, Initializer> && requires {
  typename Token::template callback_type<Function>;
} &&
    std::constructible_from<typename Token::template callback_type<Function>, Token, Initializer> &&
    std::constructible_from<typename Token::template callback_type<Function>, Token&, Initializer>&&
        std::constructible_from<typename Token::template callback_type<Function>, const Token,
                                Initializer>&&
            std::constructible_from<typename Token::template callback_type<Function>, const Token&,
                                    Initializer>;

struct Plain {
  void operator()() {}
};
struct MoveOnly {
  MoveOnly() = default;
  MoveOnly(MoveOnly&&) = default;
  void operator()() {}
};
// No default constructor, made from a number only; may throw.
struct FromNumber {
  explicit FromNumber(int value) noexcept(false) : number(value) {
    if (value < 0) throw std::invalid_argument("a negative number");
  }
  void operator()() {}
  int number;
};
struct RvalueOnly {
  void operator()() && {}
};
struct LvalueOnly {
  void operator()() & {}
};
struct ReturnsSomething {
  int operator()() { return 7; }
};
struct Overaligned {
  void operator()() {}
  alignas(64) char payload[64] = {};
};

static_assert(StoppableCallbackFor<CancellationToken, Plain>);
static_assert(StoppableCallbackFor<CancellationToken, Plain, Plain&>);
static_assert(StoppableCallbackFor<CancellationToken, Plain, const Plain&>);
static_assert(StoppableCallbackFor<CancellationToken, MoveOnly>);
static_assert(StoppableCallbackFor<CancellationToken, FromNumber, int>);
static_assert(StoppableCallbackFor<CancellationToken, std::function<void()>, Plain>);
static_assert(StoppableCallbackFor<CancellationToken, void (*)()>);
static_assert(StoppableCallbackFor<CancellationToken, RvalueOnly>);
static_assert(StoppableCallbackFor<CancellationToken, Plain&>);
static_assert(StoppableCallbackFor<CancellationToken, LvalueOnly&>);
static_assert(StoppableCallbackFor<CancellationToken, ReturnsSomething>);

static_assert(std::is_same_v<CancellationCallback<Plain>::callback_type, Plain>);
static_assert(std::is_same_v<CancellationCallback<Plain&>::callback_type, Plain&>);
static_assert(std::is_same_v<CancellationToken::callback_type<Plain>, CancellationCallback<Plain>>);

// [stopcallback.cons]: only from what the callable can be made of, noexcept if that is.
static_assert(!std::is_constructible_v<CancellationCallback<FromNumber>, CancellationToken, Plain>);
static_assert(
    !std::is_constructible_v<CancellationCallback<MoveOnly>, CancellationToken, const MoveOnly&>);
static_assert(!std::is_constructible_v<CancellationCallback<Plain&>, CancellationToken, Plain>);
static_assert(
    std::is_nothrow_constructible_v<CancellationCallback<Plain>, const CancellationToken&, Plain>);
static_assert(
    std::is_nothrow_constructible_v<CancellationCallback<Plain>, CancellationToken, Plain>);
static_assert(
    !std::is_nothrow_constructible_v<CancellationCallback<FromNumber>, CancellationToken, int>);

// Neither copied nor moved: its address is what is registered.
static_assert(!std::is_copy_constructible_v<CancellationCallback<Plain>>);
static_assert(!std::is_move_constructible_v<CancellationCallback<Plain>>);
static_assert(!std::is_copy_assignable_v<CancellationCallback<Plain>>);
static_assert(!std::is_move_assignable_v<CancellationCallback<Plain>>);
static_assert(!std::is_default_constructible_v<CancellationCallback<Plain>>);
static_assert(std::is_nothrow_destructible_v<CancellationCallback<Plain>>);

// The deduction guide: a callable by value, whatever it was made of.
template <class Init>
using Deduced =
    decltype(CancellationCallback(std::declval<CancellationToken>(), std::declval<Init>()));
static_assert(std::is_same_v<Deduced<Plain>, CancellationCallback<Plain>>);
static_assert(std::is_same_v<Deduced<Plain&>, CancellationCallback<Plain>>);
static_assert(std::is_same_v<Deduced<const Plain&>, CancellationCallback<Plain>>);
static_assert(std::is_same_v<Deduced<void (&)()>, CancellationCallback<void (*)()>>);

/// A callback in a box of its own, which others may empty.
struct Box {
  template <class F>
  void fill(const CancellationToken& token, F f) {
    callback = std::make_unique<AnyCallback>(token, std::function<void()>(std::move(f)));
  }
  std::unique_ptr<AnyCallback> callback;
};

/// Code of a child process in which std::terminate() was called.
constexpr int terminated = 77;

}  // namespace

// -------------------------------------------------------------------------------------------- running

TEST_CASE("A callback runs once, when its token is cancelled, on the cancelling thread") {
  CancellationSource source;
  int runs = 0;
  std::thread::id runner;
  const CancellationCallback callback(source.token(), [&] {
    ++runs;
    runner = std::this_thread::get_id();
  });
  CHECK(runs == 0);
  std::thread::id canceller;
  std::thread thread([&] {
    canceller = std::this_thread::get_id();
    source.cancel();
  });
  thread.join();
  CHECK(runs == 1);
  CHECK(runner == canceller);
  source.cancel();
  CHECK(runs == 1);
}

TEST_CASE("A callback has run when the cancel() that was true returns") {
  CancellationSource source;
  std::atomic<int> runs{0};
  std::vector<std::unique_ptr<AnyCallback>> callbacks;
  for (int i = 0; i < 100; ++i) {
    callbacks.push_back(std::make_unique<AnyCallback>(source.token(), [&] { ++runs; }));
  }
  REQUIRE(source.cancel());
  CHECK(runs == 100);
}

TEST_CASE("A callback made on a cancelled token runs in its constructor") {
  CancellationSource source;
  source.cancel();
  std::thread::id runner;
  int runs = 0;
  {
    const CancellationCallback callback(source.token(), [&] {
      ++runs;
      runner = std::this_thread::get_id();
    });
    CHECK(runs == 1);
    CHECK(runner == std::this_thread::get_id());
    source.cancel();
  }
  CHECK(runs == 1);
}

TEST_CASE("A callback made on a token that can never be cancelled never runs") {
  int runs = 0;
  {
    const CancellationCallback on_empty(CancellationToken(), [&] { ++runs; });
    auto source = std::make_unique<CancellationSource>();
    const CancellationToken token = source->token();
    source->disarm();
    source.reset();
    REQUIRE_FALSE(token.can_be_cancelled());
    const CancellationCallback on_dead(token, [&] { ++runs; });
  }
  CHECK(runs == 0);
}

TEST_CASE("A callback whose destructor has returned doesn't run") {
  CancellationSource source;
  int runs = 0;
  {
    const CancellationCallback callback(source.token(), [&] { ++runs; });
  }
  source.cancel();
  CHECK(runs == 0);
}

TEST_CASE("A callback that never ran never runs when the last token and the source go") {
  int runs = 0;
  {
    auto source = std::make_unique<CancellationSource>();
    const CancellationCallback callback(source->token(), [&] { ++runs; });
    source->disarm();
    source.reset();
  }
  CHECK(runs == 0);
}

TEST_CASE("A source's destructor runs the callbacks as its cancel() does") {
  auto source = std::make_unique<CancellationSource>();
  int runs = 0;
  const CancellationCallback callback(source->token(), [&] { ++runs; });
  source.reset();
  CHECK(runs == 1);
}

TEST_CASE("Assigning over a source runs the callbacks of the old") {
  CancellationSource source;
  int old_runs = 0;
  int new_runs = 0;
  CancellationSource next;
  const CancellationCallback on_old(source.token(), [&] { ++old_runs; });
  const CancellationCallback on_new(next.token(), [&] { ++new_runs; });
  source = std::move(next);
  CHECK(old_runs == 1);
  CHECK(new_runs == 0);
}

TEST_CASE("Several callbacks may hang on one token, and each on several") {
  CancellationSource a;
  CancellationSource b;
  std::vector<int> runs(4);
  const auto bump = [&runs](std::size_t i) { return [&runs, i] { ++runs[i]; }; };
  const CancellationCallback first(a.token(), bump(0));
  const CancellationCallback second(a.token(), bump(1));
  const CancellationCallback third(b.token(), bump(2));
  const CancellationCallback fourth(b.token(), bump(3));
  a.cancel();
  CHECK(runs == std::vector<int>{1, 1, 0, 0});
  b.cancel();
  CHECK(runs == std::vector<int>{1, 1, 1, 1});
}

TEST_CASE("Callbacks may be made on a copied, a moved and a temporary token") {
  CancellationSource source;
  int runs = 0;
  const auto bump = [&runs] { ++runs; };
  const CancellationToken named = source.token();
  CancellationToken moved = source.token();
  const CancellationCallback on_const(named, bump);
  const CancellationCallback on_moved(std::move(moved), bump);
  const CancellationCallback on_temporary(source.token(), bump);
  source.cancel();
  CHECK(runs == 3);
}

TEST_CASE("Callbacks of the whole subtree run, of descendants and of any_ofs below") {
  CancellationSource root;
  const CancellationSource child(root.token());
  const CancellationSource grandchild(child.token());
  const CancellationSource merged =
      CancellationSource::any_of({grandchild.token(), root.token(), CancellationToken()});
  const CancellationSource stranger;
  std::vector<int> runs(5);
  std::vector<std::unique_ptr<AnyCallback>> callbacks;
  const CancellationToken tokens[] = {root.token(), child.token(), grandchild.token(),
                                      merged.token(), stranger.token()};
  for (std::size_t i = 0; i < 5; ++i) {
    callbacks.push_back(std::make_unique<AnyCallback>(tokens[i], [&runs, i] { ++runs[i]; }));
  }
  root.cancel();
  CHECK(runs == std::vector<int>{1, 1, 1, 1, 0});
}

TEST_CASE("No callback meets an uncancelled node of the subtree, nor a token without its cause") {
  CancellationSource root;
  std::vector<CancellationSource> nodes;
  nodes.emplace_back(root.token());
  for (std::size_t i = 0; i < 60; ++i) nodes.emplace_back(nodes[i * 3 / 4].token());
  nodes.push_back(CancellationSource::any_of({nodes[3].token(), nodes[40].token()}));
  int wrong = 0;
  int runs = 0;
  std::vector<std::unique_ptr<AnyCallback>> callbacks;
  for (const CancellationSource& node : nodes) {
    callbacks.push_back(std::make_unique<AnyCallback>(node.token(), [&] {
      ++runs;
      if (!root.is_cancelled()) ++wrong;
      for (const CancellationSource& other : nodes) {
        if (!other.is_cancelled() || other.token().cause().message() != "all at once") ++wrong;
      }
    }));
  }
  root.cancel(Cause::cancelled("all at once"));
  CHECK(runs == static_cast<int>(nodes.size()));
  CHECK(wrong == 0);
}

TEST_CASE("No lock is held while a callback runs: it may use the tree as it likes") {
  CancellationSource root;
  CancellationSource child(root.token());
  CancellationSource stranger;
  int runs = 0;
  bool cancelled_again = true;
  bool stranger_cancelled = false;
  const CancellationCallback on_stranger(stranger.token(), [&] { ++runs; });
  const CancellationCallback callback(child.token(), [&] {
    ++runs;
    cancelled_again = root.cancel() || child.cancel();
    stranger_cancelled = stranger.cancel();
    const CancellationSource born(root.token());
    const CancellationSource timed(child.token(), 1h);
    const CancellationSource merged = CancellationSource::any_of({root.token(), child.token()});
    if (born.is_cancelled() && timed.is_cancelled() && merged.is_cancelled()) ++runs;
    const CancellationCallback nested(root.token(), [&] { ++runs; });
    if (root.token().wait_for(1h) && root.token().fd() >= 0) ++runs;
    // Also from another thread while this one is inside the callback.
    std::thread([&] {
      const CancellationCallback elsewhere(child.token(), [&] { ++runs; });
      const CancellationSource below(child.token());
      if (below.is_cancelled() && !root.cancel()) ++runs;
    }).join();
  });
  CHECK(root.cancel());
  CHECK_FALSE(cancelled_again);
  CHECK(stranger_cancelled);
  CHECK(runs == 7);
}

TEST_CASE("A callback that is registered while others run, runs in its constructor") {
  CancellationSource source;
  std::unique_ptr<AnyCallback> late;
  bool ran_in_constructor = false;
  int runs = 0;
  const CancellationCallback callback(source.token(), [&] {
    late = std::make_unique<AnyCallback>(source.token(), [&] { ++runs; });
    ran_in_constructor = runs == 1;
  });
  source.cancel();
  CHECK(ran_in_constructor);
  CHECK(runs == 1);
}

TEST_CASE("A cancel inside a callback of the same source is false and returns at once") {
  CancellationSource source;
  bool inner = true;
  bool seen = false;
  const CancellationCallback callback(source.token(), [&] {
    inner = source.cancel();
    seen = source.is_cancelled();
  });
  CHECK(source.cancel());
  CHECK_FALSE(inner);
  CHECK(seen);
}

TEST_CASE("A second cancel() doesn't wait for the callbacks of the first") {
  CancellationSource source;
  support::Gate inside;
  support::Gate release;
  const CancellationCallback callback(source.token(), [&] {
    inside.open();
    release.wait();
  });
  support::Threads threads;
  threads.start([&] { source.cancel(); });
  REQUIRE(inside.wait());
  const bool second = source.cancel();
  const bool released_by_then = release.is_open();
  release.open();
  CHECK_FALSE(second);
  CHECK_FALSE(released_by_then);
}

// ------------------------------------------------------------------------- destroying, on one thread

TEST_CASE("A callback may destroy itself inside itself") {
  CancellationSource source;
  auto alive = std::make_shared<int>(1);
  std::unique_ptr<AnyCallback> callback;
  int runs = 0;
  bool came_back = false;
  callback = std::make_unique<AnyCallback>(source.token(), [&, kept = alive] {
    ++runs;
    // What the lambda captured goes with the callback: only locals may be used from here on.
    bool* const back = &came_back;
    std::unique_ptr<AnyCallback>* const own = &callback;
    own->reset();
    *back = true;
  });
  int others = 0;
  const CancellationCallback before_or_after(source.token(), [&] { ++others; });
  CHECK(source.cancel());
  CHECK(runs == 1);
  CHECK(came_back);
  CHECK(others == 1);
  CHECK(alive.use_count() == 1);
}

TEST_CASE("A callback on the heap may delete itself inside itself") {
  struct SelfOwned {
    SelfOwned(const CancellationToken& token, int& count)
        : runs(count), callback(token, [this] {
            ++runs;
            delete this;
          }) {}
    int& runs;
    AnyCallback callback;
  };
  CancellationSource source;
  int runs = 0;
  for (int i = 0; i < 5; ++i) static_cast<void>(new SelfOwned(source.token(), runs));
  source.cancel();
  CHECK(runs == 5);
}

TEST_CASE("A callback may destroy a peer that has not run: the peer never runs") {
  CancellationSource source;
  std::array<Box, 4> boxes;
  int runs = 0;
  // Whoever is first destroys all the others, whatever the order is.
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    boxes[i].fill(source.token(), [&, i] {
      ++runs;
      for (std::size_t other = 0; other < boxes.size(); ++other) {
        if (other != i) boxes[other].callback.reset();
      }
    });
  }
  source.cancel();
  CHECK(runs == 1);
}

TEST_CASE("A callback may destroy a peer on another node of the subtree: it never runs") {
  for (int direction = 0; direction < 2; ++direction) {
    CancellationSource root;
    const CancellationSource child(root.token());
    Box upper;
    Box lower;
    int runs = 0;
    upper.fill(root.token(), [&] {
      ++runs;
      lower.callback.reset();
    });
    lower.fill(child.token(), [&] {
      ++runs;
      upper.callback.reset();
    });
    root.cancel();
    CHECK(runs == 1);
  }
}

TEST_CASE("A callback may destroy a peer that has run already, without waiting") {
  CancellationSource source;
  std::array<Box, 3> boxes;
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    boxes[i].fill(source.token(), [&, i] {
      for (const std::size_t done : order) boxes[done].callback.reset();
      order.push_back(i);
    });
  }
  source.cancel();
  CHECK(order.size() == 3);
}

TEST_CASE("A callback may destroy itself and every peer") {
  CancellationSource source;
  auto boxes = std::make_unique<std::array<Box, 5>>();
  int runs = 0;
  for (Box& box : *boxes) {
    box.fill(source.token(), [&runs, &boxes] {
      int* const count = &runs;
      boxes.reset();
      ++*count;
    });
  }
  source.cancel();
  CHECK(runs == 1);
}

TEST_CASE(
    "A callback may replace itself and its peers, and the new ones run in their constructors") {
  CancellationSource source;
  std::array<Box, 2> boxes;
  int replaced = 0;
  int fresh = 0;
  const CancellationToken token = source.token();
  for (Box& box : boxes) {
    box.fill(token, [&, peers = &boxes] {
      // One of them is this very lambda: only locals may be used from there on.
      int* const fresh_runs = &fresh;
      const CancellationToken again = token;
      ++replaced;
      for (Box& other : *peers) {
        other.callback.reset();
        other.fill(again, [fresh_runs] { ++*fresh_runs; });
      }
    });
  }
  source.cancel();
  CHECK(replaced == 1);
  CHECK(fresh == 2);
}

TEST_CASE(
    "A callback that is destroyed by another tree's callback, inside itself, is not waited for") {
  CancellationSource outer;
  CancellationSource inner;
  Box box;
  int runs = 0;
  const CancellationCallback destroyer(inner.token(), [&] {
    ++runs;
    box.callback.reset();  // it runs further up on this very stack
  });
  box.fill(outer.token(), [&] {
    ++runs;
    CancellationSource* const other = &inner;
    other->cancel();
  });
  outer.cancel();
  CHECK(runs == 2);
}

TEST_CASE("A callback may drop the last token and the source inside itself") {
  auto source = std::make_unique<CancellationSource>();
  auto token = std::make_unique<CancellationToken>(source->token());
  int runs = 0;
  const CancellationCallback callback(*token, [&] {
    ++runs;
    token.reset();
    source.reset();
  });
  source->cancel();
  CHECK(runs == 1);
  CHECK(source == nullptr);
}

TEST_CASE("A source that is destroyed inside its own cancel() still runs every callback") {
  auto source = std::make_unique<CancellationSource>();
  auto child = std::make_unique<CancellationSource>(source->token());
  std::vector<std::unique_ptr<AnyCallback>> callbacks;
  int runs = 0;
  for (int i = 0; i < 10; ++i) {
    callbacks.push_back(
        std::make_unique<AnyCallback>(i % 2 == 0 ? source->token() : child->token(), [&] {
          ++runs;
          source.reset();
          child.reset();
        }));
  }
  CancellationSource* const raw = source.get();
  CHECK(raw->cancel());
  CHECK(runs == 10);
}

TEST_CASE("A callback may destroy itself, the source and the last token in one go") {
  struct Everything {
    Everything() : child(source.token()), callback(child.token(), [this] { own->reset(); }) {}
    CancellationSource source;
    CancellationSource child;
    std::unique_ptr<Everything>* own = nullptr;
    AnyCallback callback;
  };
  auto everything = std::make_unique<Everything>();
  everything->own = &everything;
  CancellationSource& source = everything->source;
  CHECK(source.cancel());
  CHECK(everything == nullptr);
}

TEST_CASE(
    "A callback outlives its source and every token, and its destructor may be the last to go") {
  std::unique_ptr<AnyCallback> callback;
  int runs = 0;
  SECTION("never cancelled") {
    {
      CancellationSource source;
      callback = std::make_unique<AnyCallback>(source.token(), [&] { ++runs; });
      source.disarm();
    }
    callback.reset();
    CHECK(runs == 0);
  }
  SECTION("cancelled by its source going") {
    {
      const CancellationSource source;
      callback = std::make_unique<AnyCallback>(source.token(), [&] { ++runs; });
    }
    CHECK(runs == 1);
    callback.reset();
    CHECK(runs == 1);
  }
  SECTION("cancelled by the parent of a node that has no handle left") {
    CancellationSource parent;
    {
      CancellationSource source(parent.token());
      callback = std::make_unique<AnyCallback>(source.token(), [&] { ++runs; });
      source.disarm();
    }
    parent.cancel();
    CHECK(runs == 1);
  }
}

TEST_CASE("Callbacks may be destroyed in any order") {
  support::Random random(11);
  for (int round = 0; round < 50; ++round) {
    CancellationSource source;
    std::vector<std::unique_ptr<AnyCallback>> callbacks;
    std::vector<int> runs(12);
    std::vector<int> expected(12, 1);
    for (std::size_t i = 0; i < runs.size(); ++i) {
      callbacks.push_back(std::make_unique<AnyCallback>(source.token(), [&runs, i] { ++runs[i]; }));
    }
    for (int i = 0; i < 6; ++i) {
      const std::size_t victim = random.below(runs.size());
      callbacks[victim].reset();
      expected[victim] = 0;
    }
    source.cancel();
    CHECK(runs == expected);
  }
}

// -------------------------------------------------------------------- destroying, on another thread

TEST_CASE("The destructor on another thread waits for its running callback to return") {
  for (const bool below : {false, true}) {
    CancellationSource source;
    const CancellationSource child(source.token());
    support::Gate inside;
    support::Gate release;
    std::atomic<bool> returned{false};
    std::atomic<bool> seen_by_destroyer{false};
    std::atomic<bool> destroyed{false};
    std::atomic<pid_t> destroyer{0};
    auto callback = std::make_unique<AnyCallback>(below ? child.token() : source.token(), [&] {
      inside.open();
      release.wait();
      returned = true;
    });
    support::Threads threads;
    threads.start([&] { source.cancel(); });
    REQUIRE(inside.wait());
    threads.start([&] {
      destroyer = support::thread_id();
      callback.reset();
      seen_by_destroyer = returned.load();
      destroyed = true;
    });
    support::let_it_block(destroyer, [&] { return destroyed.load(); });
    const bool too_early = destroyed;
    release.open();
    threads.join();
    CHECK_FALSE(too_early);
    CHECK(seen_by_destroyer);
  }
}

TEST_CASE(
    "The destructor on another thread waits for its own callback alone, not for a running peer") {
  CancellationSource source;
  const CancellationSource child(source.token());
  support::Gate inside;
  support::Gate release;
  std::atomic<int> finished{0};
  std::array<Box, 3> boxes;
  std::atomic<int> blocked{-1};
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    boxes[i].fill(i == 2 ? child.token() : source.token(), [&, i] {
      int nobody = -1;
      if (blocked.compare_exchange_strong(nobody, static_cast<int>(i))) {
        inside.open();
        release.wait();
      }
      ++finished;
    });
  }
  support::Threads threads;
  threads.start([&] { source.cancel(); });
  REQUIRE(inside.wait());
  // One is running and can't go on; the others wait behind it, or have run. They go at once.
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    if (static_cast<int>(i) != blocked) boxes[i].callback.reset();
  }
  const bool still_blocked = !release.is_open();
  const int finished_by_then = finished;
  release.open();
  threads.join();
  CHECK(still_blocked);
  CHECK(finished_by_then == 0);  // the first that ran is the one that blocks
  CHECK(finished == 1);          // and those destroyed meanwhile never ran
}

TEST_CASE("A callback that has returned is destroyed at once, though its peer still runs") {
  CancellationSource source;
  support::Gate inside;
  support::Gate release;
  std::array<Box, 2> boxes;
  std::atomic<int> turn{0};
  std::atomic<int> first{-1};
  for (std::size_t i = 0; i < 2; ++i) {
    boxes[i].fill(source.token(), [&, i] {
      if (turn++ == 0) {
        first = static_cast<int>(i);
        return;
      }
      inside.open();
      release.wait();
    });
  }
  support::Threads threads;
  threads.start([&] { source.cancel(); });
  REQUIRE(inside.wait());
  REQUIRE(first >= 0);
  boxes[static_cast<std::size_t>(first.load())].callback.reset();
  CHECK_FALSE(release.is_open());
  release.open();
}

TEST_CASE("Two threads cancel two trees, and each destroys a callback of the other tree") {
  constexpr int rounds = support::under_sanitizer ? 100 : 500;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource a;
    CancellationSource b;
    std::atomic<int> runs{0};
    Box on_a;
    Box on_b;
    on_a.fill(a.token(), [&] { ++runs; });
    on_b.fill(b.token(), [&] { ++runs; });
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      a.cancel();
      on_b.callback.reset();
    });
    line.ready_steady_go();
    b.cancel();
    on_a.callback.reset();
    threads.join();
    if (runs < 0 || runs > 2) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("What a callback did happens before its destructor returns on another thread") {
  constexpr int rounds = support::under_sanitizer ? 200 : 2000;
  int torn = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    int plain[2] = {0, 0};  // no atomics: the sanitizer checks the order
    auto callback = std::make_unique<AnyCallback>(source.token(), [&plain] {
      plain[0] = 1;
      plain[1] = 1;
    });
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      source.cancel();
    });
    line.ready_steady_go();
    callback.reset();
    if (plain[0] != plain[1]) ++torn;
  }
  CHECK(torn == 0);
}

TEST_CASE("What its captures need is destroyed only after the callback has returned") {
  struct Tracked {
    ~Tracked() { alive = false; }
    std::atomic<bool> alive{true};
  };
  std::atomic<int> used_dead{0};
  struct Calls {
    Tracked* tracked;
    std::atomic<int>* used;
    void operator()() const {
      for (int look = 0; look < 50; ++look) {
        if (!tracked->alive) ++*used;
      }
    }
  };
  constexpr int rounds = support::under_sanitizer ? 200 : 1000;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    auto tracked = std::make_unique<Tracked>();
    auto callback = std::make_unique<CancellationCallback<Calls>>(source.token(),
                                                                  Calls{tracked.get(), &used_dead});
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      source.cancel();
    });
    line.ready_steady_go();
    callback.reset();
    tracked.reset();
  }
  CHECK(used_dead == 0);
}

// --------------------------------------------------------------------------------------------- races

TEST_CASE("Registering while the token is cancelled: each callback runs exactly once") {
  constexpr int rounds = support::under_sanitizer ? 100 : 500;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    const CancellationSource child(source.token());
    constexpr int each = 8;
    std::array<std::atomic<int>, 3 * each> runs{};
    support::StartingLine line(4);
    std::vector<std::unique_ptr<AnyCallback>> made[3];
    {
      support::Threads threads;
      for (std::size_t thread = 0; thread < 3; ++thread) {
        threads.start([&, thread] {
          const CancellationToken token = thread == 1 ? child.token() : source.token();
          line.ready_steady_go();
          for (std::size_t i = 0; i < each; ++i) {
            std::atomic<int>& count = runs[thread * each + i];
            made[thread].push_back(std::make_unique<AnyCallback>(token, [&count] { ++count; }));
          }
        });
      }
      line.ready_steady_go();
      source.cancel();
    }
    for (const auto& count : runs) {
      if (count != 1) ++wrong;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("Deregistering while the token is cancelled: at most once, never after the destructor") {
  constexpr int rounds = support::under_sanitizer ? 100 : 500;
  std::atomic<int> after_death{0};
  int more_than_once = 0;
  int missed = 0;
  for (int round = 0; round < rounds; ++round) {
    struct Watched {
      std::atomic<int> runs{0};
      std::atomic<bool> dead{false};
      std::unique_ptr<AnyCallback> callback;
    };
    CancellationSource source;
    std::vector<std::unique_ptr<Watched>> watched;
    for (int i = 0; i < 12; ++i) {
      watched.push_back(std::make_unique<Watched>());
      Watched* const one = watched.back().get();
      one->callback = std::make_unique<AnyCallback>(source.token(), [one, &after_death] {
        if (one->dead) ++after_death;
        ++one->runs;
      });
    }
    support::StartingLine line(3);
    {
      support::Threads threads;
      for (std::size_t thread = 0; thread < 2; ++thread) {
        threads.start([&, thread] {
          line.ready_steady_go();
          for (std::size_t i = thread; i < 8; i += 2) {
            watched[i]->callback.reset();
            watched[i]->dead = true;
          }
        });
      }
      line.ready_steady_go();
      source.cancel();
    }
    for (std::size_t i = 0; i < watched.size(); ++i) {
      if (watched[i]->runs > 1) ++more_than_once;
      if (i >= 8 && watched[i]->runs != 1) ++missed;
    }
  }
  CHECK(after_death == 0);
  CHECK(more_than_once == 0);
  CHECK(missed == 0);
}

TEST_CASE("Callbacks are registered and deregistered by many threads, then cancelled") {
  CancellationSource source;
  std::atomic<int> stray_runs{0};
  std::atomic<int> kept_runs{0};
  std::vector<std::unique_ptr<AnyCallback>> kept[4];
  {
    support::StartingLine line(4);
    support::Threads threads;
    for (std::size_t thread = 0; thread < 4; ++thread) {
      threads.start([&, thread] {
        line.ready_steady_go();
        for (int i = 0; i < 3000; ++i) {
          const AnyCallback gone(source.token(), [&] { ++stray_runs; });
          if (i % 100 == 0) {
            kept[thread].push_back(
                std::make_unique<AnyCallback>(source.token(), [&] { ++kept_runs; }));
          }
        }
      });
    }
  }
  CHECK(stray_runs == 0);
  CHECK(source.cancel());
  CHECK(kept_runs == 120);
  CHECK(stray_runs == 0);
}

TEST_CASE("Many threads cancel at once: one is true, and each callback runs once on that thread") {
  constexpr int rounds = support::under_sanitizer ? 100 : 500;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    std::atomic<int> runs{0};
    std::atomic<int> winners{0};
    std::thread::id runner;
    std::thread::id winner;
    const CancellationCallback callback(source.token(), [&] {
      ++runs;
      runner = std::this_thread::get_id();
    });
    support::StartingLine line(3);
    {
      support::Threads threads;
      for (int i = 0; i < 3; ++i) {
        threads.start([&] {
          line.ready_steady_go();
          if (source.cancel()) {
            ++winners;
            winner = std::this_thread::get_id();
          }
        });
      }
    }
    if (winners != 1 || runs != 1 || runner != winner) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("The last token goes on one thread while the source cancels on another") {
  constexpr int rounds = support::under_sanitizer ? 300 : 3000;
  for (int round = 0; round < rounds; ++round) {
    auto source = std::make_unique<CancellationSource>();
    auto token = std::make_unique<CancellationToken>(source->token());
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      token.reset();
    });
    line.ready_steady_go();
    source->cancel();
    source.reset();
  }
  SUCCEED();
}

TEST_CASE("A callback goes on one thread while the last handles go on another") {
  constexpr int rounds = support::under_sanitizer ? 300 : 3000;
  for (int round = 0; round < rounds; ++round) {
    auto parent = std::make_unique<CancellationSource>();
    auto source = std::make_unique<CancellationSource>(parent->token());
    auto callback = std::make_unique<AnyCallback>(source->token(), [] {});
    if (round % 2 == 0) source->disarm();
    if (round % 3 == 0) parent->disarm();
    support::StartingLine line(3);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      callback.reset();
    });
    threads.start([&] {
      line.ready_steady_go();
      parent.reset();
    });
    line.ready_steady_go();
    source.reset();
  }
  SUCCEED();
}

// ------------------------------------------------------------------------------- the callable itself

TEST_CASE("A callable is called as std::forward<F>(f)(): an F as an rvalue, an F& as an lvalue") {
  struct Categories {
    explicit Categories(std::string& said) : heard(&said) {}
    void operator()() & { *heard = "lvalue"; }
    void operator()() const& { *heard = "const lvalue"; }
    void operator()() && { *heard = "rvalue"; }
    void operator()() const&& { *heard = "const rvalue"; }
    std::string* heard;
  };
  std::string said[4];
  Categories lvalue(said[1]);
  const Categories const_lvalue(said[3]);
  for (const bool cancelled_before : {false, true}) {
    CancellationSource source;
    if (cancelled_before) source.cancel();
    for (std::string& one : said) one.clear();
    const CancellationCallback<Categories> by_value(source.token(), said[0]);
    const CancellationCallback<Categories&> by_reference(source.token(), lvalue);
    const CancellationCallback<const Categories> const_value(source.token(), said[2]);
    const CancellationCallback<const Categories&> const_reference(source.token(), const_lvalue);
    source.cancel();
    CHECK(said[0] == "rvalue");
    CHECK(said[1] == "lvalue");
    CHECK(said[2] == "const rvalue");
    CHECK(said[3] == "const lvalue");
  }
}

TEST_CASE("A callable is made once, from the initialiser as it was passed, and never copied") {
  struct Counts {
    explicit Counts(int) : how("converted") {}
    Counts(const Counts&) : how("copied") {}
    Counts(Counts&&) noexcept : how("moved") {}
    void operator()() const { *said = how; }
    std::string how;
    std::string* said = nullptr;
  };
  std::string said;
  struct Reports : Counts {
    Reports(const Counts& from, std::string* where) : Counts(from) { said = where; }
  };
  CancellationSource source;
  struct Init {
    std::string* where;
  };
  struct Direct {
    explicit Direct(Init init) : where(init.where) {}
    Direct(const Direct&) = delete;
    Direct& operator=(const Direct&) = delete;
    void operator()() const { *where = "neither copied nor moved"; }
    std::string* where;
  };
  const CancellationCallback<Direct> direct(source.token(), Init{&said});
  source.cancel();
  CHECK(said == "neither copied nor moved");

  struct Records {
    explicit Records(std::vector<std::string>& into) : log(&into) {}
    Records(const Records& other) : log(other.log) { log->push_back("copy"); }
    Records(Records&& other) noexcept : log(other.log) { log->push_back("move"); }
    void operator()() const {}
    std::vector<std::string>* log;
  };
  std::vector<std::string> log;
  Records records(log);
  const CancellationCallback<Records> from_lvalue(source.token(), records);
  CHECK(log == std::vector<std::string>{"copy"});
  log.clear();
  const CancellationCallback<Records> from_rvalue(source.token(), std::move(records));
  CHECK(log == std::vector<std::string>{"move"});
}

TEST_CASE("A callable that is move-only, over-aligned, a function pointer, or returns something") {
  CancellationSource source;
  static int calls = 0;
  calls = 0;
  const CancellationCallback<void (*)()> pointer(source.token(), [] { ++calls; });
  const CancellationCallback owner(
      source.token(), [held = std::make_unique<int>(3)] { calls += *held == 3 ? 1 : 0; });
  const CancellationCallback<ReturnsSomething> returns(source.token(), ReturnsSomething());
  const CancellationCallback<MoveOnly> moved(source.token(), MoveOnly());
  auto wide = std::make_unique<CancellationCallback<Overaligned>>(source.token(), Overaligned());
  CHECK(reinterpret_cast<std::uintptr_t>(wide.get()) % 64 == 0);
  source.cancel();
  CHECK(calls == 2);
}

TEST_CASE("A callable whose constructor throws leaves nothing registered") {
  CancellationSource source;
  CHECK_THROWS_AS((CancellationCallback<FromNumber>(source.token(), -1)), std::invalid_argument);
  const CancellationCallback<FromNumber> good(source.token(), 1);
  CHECK(source.cancel());
  // On a cancelled token too: it throws instead of being called.
  CHECK_THROWS_AS((CancellationCallback<FromNumber>(source.token(), -1)), std::invalid_argument);
}

TEST_CASE("A callable is destroyed with its callback object, not when it has run") {
  const auto tracked = std::make_shared<int>(0);
  CancellationSource source;
  std::unique_ptr<AnyCallback> callback;
  callback = std::make_unique<AnyCallback>(source.token(), [tracked] {});
  source.cancel();
  CHECK(tracked.use_count() > 1);
  callback.reset();
  CHECK(tracked.use_count() == 1);
}

TEST_CASE("A callback that throws terminates") {
  if (support::under_tsan) return;  // it dislikes what follows a fork
  const auto dying = [](auto body) {
    return support::in_child_process([&] {
      std::set_terminate([] { ::_exit(terminated); });
      try {
        body();
      } catch (...) {
        return 1;
      }
      return 0;
    });
  };
  CHECK(dying([] {
          CancellationSource source;
          const CancellationCallback callback(source.token(),
                                              [] { throw std::runtime_error("x"); });
          source.cancel();
        }) == terminated);
  CHECK(dying([] {
          CancellationSource source;
          source.cancel();
          const CancellationCallback callback(source.token(),
                                              [] { throw std::runtime_error("x"); });
        }) == terminated);
  CHECK(dying([] {
          auto parent = std::make_unique<CancellationSource>();
          const CancellationSource child(parent->token());
          const CancellationCallback callback(child.token(), [] { throw 42; });
          parent.reset();
        }) == terminated);
}

TEST_CASE("A generic algorithm written for std::stoppable_token takes a CancellationToken") {
  // As stdexec's and [exec] code does: only the concept's names, through the token's alias.
  const auto count_until_stopped = []<class Token>(Token token) {
    std::atomic<int> stops{0};
    struct OnStop {
      std::atomic<int>* stops;
      void operator()() const noexcept { ++*stops; }
    };
    if (!token.stop_possible()) return -1;
    const typename Token::template callback_type<OnStop> callback(token, OnStop{&stops});
    while (!token.stop_requested()) std::this_thread::yield();
    while (stops == 0) std::this_thread::yield();
    return stops.load();
  };
  CancellationSource source;
  support::Threads threads;
  threads.start([&] { source.cancel(); });
  CHECK(count_until_stopped(source.token()) == 1);
  CHECK(count_until_stopped(CancellationToken()) == -1);
}
