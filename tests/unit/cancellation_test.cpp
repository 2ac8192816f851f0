// cancellation.hpp: sources, tokens, causes, deadlines, waiting, descriptors, merging. What concerns
// callbacks is in conformance/stop_token_conformance_test.cpp, what concerns size and cost in
// unit/cancellation_scale_test.cpp.
#include <lastcall/cancellation.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>
#if LASTCALL_LINUX
#include <sys/prctl.h>
#endif

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <ratio>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::Clock;
using lastcall::OperationCancelled;
using namespace std::chrono_literals;

namespace {

// What the contract says in types.
static_assert(std::is_nothrow_default_constructible_v<CancellationToken>);
static_assert(std::is_nothrow_copy_constructible_v<CancellationToken>);
static_assert(std::is_nothrow_copy_assignable_v<CancellationToken>);
static_assert(std::is_nothrow_move_constructible_v<CancellationToken>);
static_assert(std::is_nothrow_move_assignable_v<CancellationToken>);
static_assert(std::is_nothrow_destructible_v<CancellationToken>);
static_assert(noexcept(std::declval<const CancellationToken&>().is_cancelled()));
static_assert(noexcept(std::declval<const CancellationToken&>().can_be_cancelled()));
static_assert(noexcept(std::declval<const CancellationToken&>().cause()));
static_assert(noexcept(std::declval<const CancellationToken&>().deadline()));
static_assert(noexcept(std::declval<const CancellationToken&>().stop_requested()));
static_assert(noexcept(std::declval<const CancellationToken&>().stop_possible()));
static_assert(noexcept(std::declval<const CancellationToken&>() == CancellationToken()));
static_assert(noexcept(std::declval<const CancellationToken&>() != CancellationToken()));
static_assert(std::is_same_v<decltype(std::declval<const CancellationToken&>().deadline()),
                             std::optional<Clock::time_point>>);
static_assert(std::is_same_v<decltype(std::declval<const CancellationToken&>().cause()), Cause>);

static_assert(std::is_default_constructible_v<CancellationSource>);
static_assert(!std::is_copy_constructible_v<CancellationSource>);
static_assert(!std::is_copy_assignable_v<CancellationSource>);
static_assert(std::is_nothrow_move_constructible_v<CancellationSource>);
static_assert(std::is_nothrow_move_assignable_v<CancellationSource>);
static_assert(std::is_nothrow_destructible_v<CancellationSource>);
static_assert(std::is_constructible_v<CancellationSource, const CancellationToken&>);
static_assert(!std::is_convertible_v<CancellationToken, CancellationSource>);
static_assert(
    std::is_constructible_v<CancellationSource, CancellationToken, std::chrono::milliseconds>);
static_assert(
    std::is_constructible_v<CancellationSource, CancellationToken, std::chrono::duration<double>>);
static_assert(std::is_constructible_v<CancellationSource, CancellationToken, Clock::time_point>);
static_assert(std::is_constructible_v<CancellationSource, CancellationToken,
                                      std::chrono::time_point<Clock, std::chrono::seconds>>);
// A point in wall-clock time is no deadline: a stepped clock would move it.
static_assert(!std::is_constructible_v<CancellationSource, CancellationToken,
                                       std::chrono::system_clock::time_point>);
static_assert(noexcept(std::declval<CancellationSource&>().disarm()));
static_assert(noexcept(std::declval<const CancellationSource&>().token()));
static_assert(noexcept(std::declval<const CancellationSource&>().is_cancelled()));
static_assert(noexcept(std::declval<CancellationSource&>().cancel(Cause())));
static_assert(std::is_same_v<decltype(std::declval<CancellationSource&>().cancel()), bool>);

template <class Token>
concept HasWallClockWait = requires(const Token token) {
  token.wait_until(std::chrono::system_clock::now());
};
static_assert(!HasWallClockWait<CancellationToken>);

std::string message_of(const CancellationToken& token) { return token.cause().message(); }

/// Ends a wait that ought to have ended by itself, so that a broken library fails instead of hanging.
CancellationSource fuse() { return CancellationSource(CancellationToken(), 30s); }

struct KeepDescriptorLimit {
  KeepDescriptorLimit() { ::getrlimit(RLIMIT_NOFILE, &before); }
  ~KeepDescriptorLimit() { ::setrlimit(RLIMIT_NOFILE, &before); }
  rlimit before{};
};

/// A random tree with some any_of nodes in it. Node 0 is the root; a parent comes before its children.
struct RandomTree {
  RandomTree(support::Random& random, std::size_t size) {
    sources.emplace_back();
    above.emplace_back();
    while (sources.size() < size) {
      const std::size_t here = sources.size();
      // Mostly short steps up, so that it gets deep as well as wide.
      const auto pick = [&] { return here - 1 - random.below(random.one_in(3) ? here : 1); };
      std::vector<std::size_t> parents{pick()};
      if (random.one_in(6)) {
        parents.push_back(random.below(here));
        parents.push_back(random.below(here));
        std::vector<CancellationToken> several;
        for (const std::size_t parent : parents) several.push_back(sources[parent].token());
        sources.push_back(CancellationSource::any_of(several));
      } else {
        sources.emplace_back(sources[parents.front()].token());
      }
      above.push_back(parents);
    }
    for (const CancellationSource& source : sources) tokens.push_back(source.token());
    for (std::size_t node = 0; node < size; ++node) {
      std::vector<bool> reached(size);
      reached[node] = true;
      std::vector<std::size_t> found;
      for (std::size_t other = node + 1; other < size; ++other) {
        for (const std::size_t parent : above[other]) {
          if (reached[parent]) reached[other] = true;
        }
        if (reached[other]) found.push_back(other);
      }
      below.push_back(found);
    }
  }
  /// How many descendants of `node` are not cancelled.
  int uncancelled_below(std::size_t node) const {
    int count = 0;
    for (const std::size_t other : below[node]) {
      if (!tokens[other].is_cancelled()) ++count;
    }
    return count;
  }

  std::vector<CancellationSource> sources;
  std::vector<CancellationToken> tokens;
  std::vector<std::vector<std::size_t>> above;
  std::vector<std::vector<std::size_t>> below;
};

}  // namespace

// ------------------------------------------------------------------------------- tokens and sources

TEST_CASE("A default token can never be cancelled") {
  const CancellationToken never;
  CHECK_FALSE(never.is_cancelled());
  CHECK_FALSE(never.can_be_cancelled());
  CHECK_FALSE(never.stop_requested());
  CHECK_FALSE(never.stop_possible());
  CHECK(never.cause().kind() == CauseKind::none);
  CHECK_FALSE(never.deadline().has_value());
  CHECK(never.fd() == -1);
  CHECK_NOTHROW(never.throw_if_cancelled());
  CHECK_FALSE(never.wait_for(0s));
  CHECK_FALSE(never.wait_for(2ms));
  CHECK_FALSE(never.wait_until(Clock::now() - 1s));
}

TEST_CASE("A default token is still an interruptible sleep: it sleeps the whole time") {
  const auto begin = Clock::now();
  CHECK_FALSE(CancellationToken().wait_for(20ms));
  CHECK(Clock::now() - begin >= 20ms);
}

TEST_CASE("A fresh source is not cancelled, and can be") {
  const CancellationSource source;
  const CancellationToken token = source.token();
  CHECK_FALSE(source.is_cancelled());
  CHECK_FALSE(token.is_cancelled());
  CHECK_FALSE(token.stop_requested());
  CHECK(token.can_be_cancelled());
  CHECK(token.stop_possible());
  CHECK(token.cause().kind() == CauseKind::none);
  CHECK_FALSE(token.deadline().has_value());
  CHECK_NOTHROW(token.throw_if_cancelled());
}

TEST_CASE("cancel() is true for the one call that did it") {
  CancellationSource source;
  const CancellationToken token = source.token();
  CHECK(source.cancel());
  CHECK_FALSE(source.cancel());
  CHECK_FALSE(source.cancel(Cause::cancelled("late")));
  CHECK(source.is_cancelled());
  CHECK(token.is_cancelled());
  CHECK(token.stop_requested());
  CHECK(token.can_be_cancelled());
  CHECK(token.stop_possible());
}

TEST_CASE("The first cause wins and never changes") {
  CancellationSource source;
  const CancellationToken token = source.token();
  source.cancel(Cause::cancelled("first"));
  source.cancel(Cause::failure(std::make_exception_ptr(std::runtime_error("second"))));
  CHECK(token.cause().kind() == CauseKind::cancelled);
  CHECK(message_of(token) == "first");
  { const CancellationSource goes = std::move(source); }
  CHECK(message_of(token) == "first");
}

TEST_CASE("An empty cause means Cause::cancelled()") {
  CancellationSource empty;
  CancellationSource plain;
  CHECK(empty.cancel(Cause()));
  CHECK(plain.cancel());
  CHECK(empty.token().cause().kind() == CauseKind::cancelled);
  CHECK(message_of(empty.token()) == message_of(plain.token()));
  CHECK_FALSE(message_of(empty.token()).empty());
}

TEST_CASE("A token hands out the very cause that it was cancelled with") {
  const auto error = std::make_exception_ptr(std::runtime_error("disk full"));
  CancellationSource source;
  source.cancel(Cause::failure(error, "flusher"));
  CHECK(source.token().cause().kind() == CauseKind::failure);
  CHECK(source.token().cause().exception() == error);
  CHECK(message_of(source.token()) == "flusher");
  CancellationSource by_signal;
  lastcall::SignalInfo info{};
  info.number = SIGTERM;
  info.sender_pid = 0;
  by_signal.cancel(Cause::signal(info));
  const Cause cause = by_signal.token().cause();
  REQUIRE(cause.signal() != nullptr);
  CHECK(cause.signal()->number == SIGTERM);
}

TEST_CASE("throw_if_cancelled throws OperationCancelled with the cause") {
  CancellationSource source;
  const CancellationToken token = source.token();
  CHECK_NOTHROW(token.throw_if_cancelled());
  source.cancel(Cause::cancelled("stop, please"));
  CHECK_THROWS_AS(token.throw_if_cancelled(), OperationCancelled);
  try {
    token.throw_if_cancelled();
  } catch (const OperationCancelled& error) {
    CHECK(std::string(error.what()) == "stop, please");
    CHECK(error.cause().kind() == CauseKind::cancelled);
  }
}

TEST_CASE("Tokens are equal if they observe the same node") {
  CancellationSource source;
  const CancellationSource other;
  const CancellationSource child(source.token());
  const CancellationToken token = source.token();
  const CancellationToken copy = token;
  CHECK(token == copy);
  CHECK(token == source.token());
  CHECK(token != other.token());
  CHECK(token != child.token());
  CHECK(token != CancellationToken());
  CHECK(CancellationToken() == CancellationToken());
  source.cancel();
  CHECK(token == source.token());
  CHECK(token != child.token());
  { const CancellationSource goes = std::move(source); }
  CHECK(token == copy);
}

TEST_CASE("A token can be copied, moved, assigned and swapped like a value") {
  CancellationSource first;
  CancellationSource second;
  CancellationToken a = first.token();
  CancellationToken b = second.token();
  std::swap(a, b);
  CHECK(a == second.token());
  CHECK(b == first.token());
  CancellationToken& same = a;
  a = same;
  CHECK(a == second.token());
  a = std::move(same);
  CHECK(a == second.token());
  const CancellationToken moved = std::move(b);
  CHECK(moved == first.token());
  b = a;
  CHECK(b == second.token());
  a = CancellationToken();
  CHECK_FALSE(a.can_be_cancelled());
  second.cancel();
  CHECK(b.is_cancelled());
  CHECK_FALSE(moved.is_cancelled());
}

TEST_CASE("A token stays valid after its source is gone") {
  auto source = std::make_unique<CancellationSource>();
  const CancellationToken token = source->token();
  source->cancel(Cause::cancelled("before it went"));
  source.reset();
  CHECK(token.is_cancelled());
  CHECK(message_of(token) == "before it went");
  CHECK(token.wait_for(1h));
  CHECK(support::is_readable(token.fd()));
}

// ----------------------------------------------------------------------------- ownership of a source

TEST_CASE("The destructor cancels: the defer cancel() that nobody can forget") {
  auto source = std::make_unique<CancellationSource>();
  const CancellationToken token = source->token();
  const CancellationSource child(token);
  source.reset();
  CHECK(token.is_cancelled());
  CHECK(token.cause().kind() == CauseKind::cancelled);
  CHECK(child.is_cancelled());
}

TEST_CASE("A disarmed source's destructor doesn't cancel") {
  auto source = std::make_unique<CancellationSource>();
  const CancellationToken token = source->token();
  source->disarm();
  source->disarm();
  source.reset();
  CHECK_FALSE(token.is_cancelled());
}

TEST_CASE("A disarmed source's cancel() still works") {
  CancellationSource source;
  source.disarm();
  CHECK(source.token().can_be_cancelled());
  CHECK(source.cancel(Cause::cancelled("on purpose")));
  CHECK(message_of(source.token()) == "on purpose");
}

TEST_CASE("Moving a source moves what it owns, and the moved-from one has the empty token") {
  CancellationSource first;
  const CancellationToken token = first.token();
  CancellationSource second = std::move(first);
  CHECK(first.token() == CancellationToken());
  CHECK_FALSE(first.token().can_be_cancelled());
  CHECK_FALSE(first.cancel());
  CHECK_FALSE(first.cancel(Cause::cancelled("by nobody")));
  CHECK_FALSE(first.is_cancelled());
  first.disarm();
  CHECK_FALSE(token.is_cancelled());
  CHECK(second.token() == token);
  CHECK(second.cancel());
  CHECK(token.is_cancelled());
}

TEST_CASE("The destructor of a moved-from source cancels nothing") {
  auto first = std::make_unique<CancellationSource>();
  const CancellationSource second = std::move(*first);
  first.reset();
  CHECK_FALSE(second.is_cancelled());
}

TEST_CASE("Assigning over a source cancels what it had") {
  CancellationSource source;
  const CancellationToken old = source.token();
  CancellationSource next;
  const CancellationToken fresh = next.token();
  source = std::move(next);
  CHECK(old.is_cancelled());
  CHECK_FALSE(fresh.is_cancelled());
  CHECK(source.token() == fresh);
  CHECK(next.token() == CancellationToken());
}

TEST_CASE(
    "Assigning over a disarmed source doesn't cancel what it had, and takes what comes as it is") {
  auto source = std::make_unique<CancellationSource>();
  const CancellationToken old = source->token();
  source->disarm();
  CancellationSource next;
  const CancellationToken fresh = next.token();
  *source = std::move(next);
  CHECK_FALSE(old.is_cancelled());
  source.reset();
  CHECK(fresh.is_cancelled());
}

TEST_CASE("Being disarmed travels with a move") {
  CancellationSource first;
  const CancellationToken token = first.token();
  first.disarm();
  {
    CancellationSource second = std::move(first);
    CancellationSource third;
    third = std::move(second);
  }
  CHECK_FALSE(token.is_cancelled());
}

TEST_CASE("Assigning a moved-from source cancels the old and leaves an empty one") {
  CancellationSource source;
  const CancellationToken old = source.token();
  CancellationSource empty;
  { const CancellationSource goes = std::move(empty); }
  source = std::move(empty);
  CHECK(old.is_cancelled());
  CHECK(source.token() == CancellationToken());
  CHECK_FALSE(source.cancel());
}

TEST_CASE("A moved-from source can be used again by assigning to it") {
  CancellationSource source;
  { const CancellationSource goes = std::move(source); }
  source = CancellationSource();
  CHECK(source.token().can_be_cancelled());
  CHECK_FALSE(source.is_cancelled());
  CHECK(source.cancel());
}

TEST_CASE("Moving a source onto itself changes nothing") {
  CancellationSource source;
  const CancellationToken token = source.token();
  CancellationSource& same = source;
  source = std::move(same);
  CHECK_FALSE(token.is_cancelled());
  CHECK(source.token() == token);
}

// ------------------------------------------------------------------------------------------ the tree

TEST_CASE("A child is cancelled with its parent and takes its cause") {
  CancellationSource parent;
  const CancellationSource child(parent.token());
  const CancellationSource grandchild(child.token());
  parent.cancel(Cause::cancelled("from the top"));
  CHECK(child.is_cancelled());
  CHECK(grandchild.is_cancelled());
  CHECK(message_of(child.token()) == "from the top");
  CHECK(message_of(grandchild.token()) == "from the top");
}

TEST_CASE("Cancelling never travels up, nor sideways") {
  CancellationSource parent;
  CancellationSource child(parent.token());
  const CancellationSource sibling(parent.token());
  const CancellationSource grandchild(child.token());
  child.cancel();
  CHECK(grandchild.is_cancelled());
  CHECK_FALSE(parent.is_cancelled());
  CHECK_FALSE(sibling.is_cancelled());
}

TEST_CASE("A descendant cancelled earlier keeps its own cause") {
  CancellationSource parent;
  CancellationSource child(parent.token());
  const CancellationSource grandchild(child.token());
  child.cancel(Cause::cancelled("child's own"));
  parent.cancel(Cause::cancelled("parent's"));
  CHECK(message_of(parent.token()) == "parent's");
  CHECK(message_of(child.token()) == "child's own");
  CHECK(message_of(grandchild.token()) == "child's own");
}

TEST_CASE("A child made under a cancelled parent is born cancelled with the parent's cause") {
  CancellationSource parent;
  parent.cancel(Cause::cancelled("before the birth"));
  CancellationSource child(parent.token());
  CHECK(child.is_cancelled());
  CHECK(message_of(child.token()) == "before the birth");
  CHECK_FALSE(child.cancel(Cause::cancelled("late")));
  CHECK(message_of(child.token()) == "before the birth");
  const CancellationSource grandchild(child.token());
  CHECK(message_of(grandchild.token()) == "before the birth");
}

TEST_CASE("A child of the empty token is a root") {
  CancellationSource source{CancellationToken()};
  CHECK_FALSE(source.is_cancelled());
  CHECK(source.token().can_be_cancelled());
  CHECK(source.cancel());
}

TEST_CASE("A cancel reaches a grandchild past a middle that has no handle left") {
  CancellationSource top;
  auto middle = std::make_unique<CancellationSource>(top.token());
  const CancellationSource bottom(middle->token());
  middle->disarm();
  middle.reset();
  CHECK_FALSE(bottom.is_cancelled());
  top.cancel(Cause::cancelled("all the way down"));
  CHECK(bottom.is_cancelled());
  CHECK(message_of(bottom.token()) == "all the way down");
}

TEST_CASE("A cancel reaches a token whose source is gone") {
  CancellationSource parent;
  auto child = std::make_unique<CancellationSource>(parent.token());
  const CancellationToken token = child->token();
  child->disarm();
  child.reset();
  CHECK(token.can_be_cancelled());
  parent.cancel();
  CHECK(token.is_cancelled());
}

TEST_CASE("When the true cancel() returns, every descendant is cancelled") {
  support::Random random(2);
  for (int round = 0; round < 20; ++round) {
    RandomTree tree(random, 60);
    const std::size_t at = random.below(30);
    REQUIRE(tree.sources[at].cancel(Cause::cancelled("here")));
    CHECK(tree.uncancelled_below(at) == 0);
    for (const std::size_t node : tree.below[at]) CHECK(message_of(tree.tokens[node]) == "here");
    std::vector<bool> expected(tree.tokens.size());
    expected[at] = true;
    for (const std::size_t node : tree.below[at]) expected[node] = true;
    for (std::size_t node = 0; node < tree.tokens.size(); ++node) {
      CHECK(tree.tokens[node].is_cancelled() == expected[node]);
    }
  }
}

TEST_CASE(
    "When the true cancel() returns, that holds also for what another cancel() was still marking") {
  // Nobody writes to `late` but the canceller of the root, after it has returned.
  int late = 0;
  int wrong_results = 0;
  constexpr int rounds = support::under_sanitizer ? 60 : 300;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource root;
    CancellationSource middle(root.token());
    std::vector<CancellationSource> chain;
    std::vector<CancellationToken> tokens;
    chain.emplace_back(middle.token());
    for (int i = 0; i < 300; ++i) chain.emplace_back(chain.back().token());
    chain.push_back(CancellationSource::any_of({chain.back().token(), CancellationToken()}));
    for (const CancellationSource& source : chain) tokens.push_back(source.token());
    support::StartingLine line(2);
    std::atomic<int> winners{0};
    {
      support::Threads threads;
      threads.start([&] {
        line.ready_steady_go();
        if (middle.cancel(Cause::cancelled("middle"))) ++winners;
      });
      line.ready_steady_go();
      if (!root.cancel(Cause::cancelled("root"))) ++wrong_results;
      for (auto token = tokens.rbegin(); token != tokens.rend(); ++token) {
        if (!token->is_cancelled()) ++late;
      }
      if (!middle.is_cancelled()) ++late;
    }
    // Whoever won, one canceller marked the middle.
    const std::string middle_cause = message_of(middle.token());
    if (winners == 1 && middle_cause != "middle") ++wrong_results;
    if (winners == 0 && middle_cause != "root") ++wrong_results;
  }
  CHECK(late == 0);
  CHECK(wrong_results == 0);
}

TEST_CASE("Whoever sees a parent cancelled sees every descendant cancelled, with a cause") {
  support::Random random(3);
  std::atomic<int> violations{0};
  constexpr int rounds = support::under_sanitizer ? 60 : 400;
  for (int round = 0; round < rounds; ++round) {
    RandomTree tree(random, 40);
    support::StartingLine line(3);
    support::Threads threads;
    for (int watcher = 0; watcher < 2; ++watcher) {
      const std::size_t watched = watcher == 0 ? 0 : random.below(20);
      threads.start([&tree, &line, &violations, watched] {
        line.ready_steady_go();
        while (!tree.tokens[watched].is_cancelled()) {
        }
        // The last made are the likeliest to be late.
        const std::vector<std::size_t>& below = tree.below[watched];
        for (auto node = below.rbegin(); node != below.rend(); ++node) {
          if (!tree.tokens[*node].is_cancelled()) ++violations;
          if (!tree.tokens[*node].cause()) ++violations;
        }
      });
    }
    line.ready_steady_go();
    tree.sources[0].cancel();
  }
  CHECK(violations == 0);
}

TEST_CASE("A cause is published before is_cancelled() turns true") {
  std::atomic<int> violations{0};
  constexpr int rounds = support::under_sanitizer ? 100 : 1000;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    const CancellationSource child(source.token());
    const CancellationToken token = round % 2 == 0 ? source.token() : child.token();
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      while (!token.is_cancelled()) {
      }
      if (token.cause().message() != "published first, on the heap, and long") ++violations;
    });
    Cause cause = Cause::cancelled("published first, on the heap, and long");
    line.ready_steady_go();
    source.cancel(std::move(cause));
  }
  CHECK(violations == 0);
}

TEST_CASE("Of many cancel() calls at once exactly one is true, and its cause is the cause") {
  int wrong = 0;
  constexpr int rounds = support::under_sanitizer ? 50 : 300;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    std::atomic<int> winners{0};
    std::atomic<int> winner{-1};
    {
      support::StartingLine line(4);
      support::Threads threads;
      for (int i = 0; i < 4; ++i) {
        threads.start([&, i] {
          line.ready_steady_go();
          if (source.cancel(Cause::cancelled(std::to_string(i)))) {
            ++winners;
            winner = i;
          }
          // Also after the call that returned false its own node is cancelled.
          if (!source.is_cancelled()) ++winners;
        });
      }
    }
    if (winners != 1) ++wrong;
    if (message_of(source.token()) != std::to_string(winner.load())) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("Const members, cancel() and token() may be used by all threads at once") {
  constexpr int rounds = support::under_sanitizer ? 30 : 200;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource parent;
    CancellationSource source(parent.token(), 1h);
    const CancellationToken token = source.token();
    support::StartingLine line(4);
    support::Threads threads;
    for (int i = 0; i < 4; ++i) {
      threads.start([&, i] {
        line.ready_steady_go();
        const CancellationToken mine = i % 2 == 0 ? token : source.token();
        static_cast<void>(mine.is_cancelled());
        static_cast<void>(mine.can_be_cancelled());
        static_cast<void>(mine.cause());
        static_cast<void>(mine.deadline());
        static_cast<void>(mine.fd());
        static_cast<void>(mine == token);
        static_cast<void>(mine.wait_for(10us));
        if (i == 1) static_cast<void>(source.cancel());
        if (i == 2) static_cast<void>(parent.cancel());
        const CancellationSource child(mine);
        mine.wait();
      });
    }
  }
  SUCCEED();
}

// ---------------------------------------------------------------------------------- can_be_cancelled

TEST_CASE("can_be_cancelled() is false once nothing is left that could ever cancel") {
  auto parent = std::make_unique<CancellationSource>();
  auto child = std::make_unique<CancellationSource>(parent->token());
  const CancellationToken parent_token = parent->token();
  const CancellationToken child_token = child->token();

  parent->disarm();
  child->disarm();
  CHECK(parent_token.can_be_cancelled());
  CHECK(child_token.can_be_cancelled());
  SECTION("the parent's source goes first") {
    parent.reset();
    CHECK_FALSE(parent_token.can_be_cancelled());
    CHECK(child_token.can_be_cancelled());
    child.reset();
    CHECK_FALSE(child_token.can_be_cancelled());
    CHECK_FALSE(child_token.stop_possible());
  }
  SECTION("the child's source goes first") {
    child.reset();
    CHECK(parent_token.can_be_cancelled());
    CHECK(child_token.can_be_cancelled());
    parent.reset();
    CHECK_FALSE(parent_token.can_be_cancelled());
    CHECK_FALSE(child_token.can_be_cancelled());
  }
  CHECK_FALSE(parent_token.is_cancelled());
  CHECK_FALSE(child_token.is_cancelled());
}

TEST_CASE("can_be_cancelled() looks past a middle whose handles are gone") {
  CancellationSource top;
  auto middle = std::make_unique<CancellationSource>(top.token());
  auto bottom = std::make_unique<CancellationSource>(middle->token());
  const CancellationToken token = bottom->token();
  middle->disarm();
  bottom->disarm();
  middle.reset();
  bottom.reset();
  CHECK(token.can_be_cancelled());
  top.disarm();
  { const CancellationSource goes = std::move(top); }
  CHECK_FALSE(token.can_be_cancelled());
}

TEST_CASE("can_be_cancelled() is true for ever once cancelled") {
  auto parent = std::make_unique<CancellationSource>();
  auto child = std::make_unique<CancellationSource>(parent->token());
  const CancellationToken token = child->token();
  parent->cancel();
  CHECK(token.can_be_cancelled());
  parent.reset();
  child.reset();
  CHECK(token.can_be_cancelled());
  CHECK(token.stop_possible());
}

TEST_CASE("can_be_cancelled() follows a source that is moved") {
  auto first = std::make_unique<CancellationSource>();
  const CancellationToken token = first->token();
  auto second = std::make_unique<CancellationSource>(std::move(*first));
  first.reset();
  CHECK(token.can_be_cancelled());
  second->disarm();
  second.reset();
  CHECK_FALSE(token.can_be_cancelled());
}

TEST_CASE("can_be_cancelled() counts a deadline that is still to come") {
  auto source = std::make_unique<CancellationSource>(CancellationToken(), 1h);
  const CancellationToken token = source->token();
  source->disarm();
  source.reset();
  CHECK(token.can_be_cancelled());
  CHECK_FALSE(token.is_cancelled());
}

TEST_CASE("can_be_cancelled() of an any_of is true while one of its parents' is") {
  auto a = std::make_unique<CancellationSource>();
  auto b = std::make_unique<CancellationSource>();
  auto merged = std::make_unique<CancellationSource>(
      CancellationSource::any_of({a->token(), b->token(), CancellationToken()}));
  const CancellationToken token = merged->token();
  for (auto* source : {&a, &b, &merged}) (*source)->disarm();
  merged.reset();
  CHECK(token.can_be_cancelled());
  a.reset();
  CHECK(token.can_be_cancelled());
  b.reset();
  CHECK_FALSE(token.can_be_cancelled());
}

namespace {

/// A token of `source`, whose own goes without cancelling.
CancellationToken bereft(CancellationSource source) {
  source.disarm();
  return source.token();
}

}  // namespace

TEST_CASE("can_be_cancelled() is exact however deep, wide and tangled the any_of above") {
  for (const bool mortal : {false, true}) {
    INFO((mortal ? "one source is left" : "no source is left"));
    CancellationSource root;
    const CancellationToken top = root.token();
    root.disarm();
    std::optional<CancellationSource> kept;
    if (mortal) {
      kept.emplace(std::move(root));
    } else {
      const CancellationSource goes = std::move(root);
    }
    const CancellationToken other = bereft(CancellationSource());
    CancellationToken line = top;
    CancellationToken before = top;
    CancellationToken behind = top;
    CancellationToken diamonds = top;
    CancellationToken nets = top;
    for (int level = 0; level < 300; ++level) {
      line = bereft(CancellationSource::any_of({line}));
      before = bereft(CancellationSource::any_of({before, other}));
      behind = bereft(CancellationSource(bereft(CancellationSource::any_of({other, behind}))));
      diamonds = bereft(CancellationSource::any_of({diamonds, diamonds}));
      const CancellationToken knot = bereft(CancellationSource::any_of({other, nets}));
      nets = bereft(CancellationSource::any_of({knot, nets, knot}));
    }
    for (const CancellationToken& token : {line, before, behind, diamonds, nets}) {
      CHECK(token.can_be_cancelled() == mortal);
      CHECK(token.can_be_cancelled() == mortal);
      CHECK((token.fd() >= 0) == mortal);
    }
    std::vector<CancellationToken> many;
    for (int i = 0; i < 5000; ++i) many.push_back(bereft(CancellationSource()));
    many.push_back(top);
    const CancellationToken wide = bereft(CancellationSource::any_of(many));
    CHECK(wide.can_be_cancelled() == mortal);
  }
}

TEST_CASE(
    "can_be_cancelled() looks at all parents of an any_of, also behind a merge of dead ones") {
  for (const std::size_t alive : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{3}}) {
    INFO("parent " << alive << " is alive");
    std::vector<CancellationSource> sources(4);
    std::vector<CancellationToken> parents;
    for (const CancellationSource& source : sources) {
      parents.push_back(
          bereft(CancellationSource::any_of({source.token(), bereft(CancellationSource())})));
    }
    const CancellationToken merged = bereft(CancellationSource::any_of(parents));
    CHECK(merged.can_be_cancelled());
    for (CancellationSource& source : sources) source.disarm();
    std::optional<CancellationSource> kept(std::move(sources[alive]));
    sources.clear();
    CHECK(merged.can_be_cancelled());
    kept.reset();
    CHECK_FALSE(merged.can_be_cancelled());
  }
}

TEST_CASE("A child of a token that can never be cancelled still has its own source") {
  auto parent = std::make_unique<CancellationSource>();
  const CancellationToken dead = parent->token();
  parent->disarm();
  parent.reset();
  REQUIRE_FALSE(dead.can_be_cancelled());
  CancellationSource child(dead);
  CHECK(child.token().can_be_cancelled());
  CHECK(child.cancel());
}

// ----------------------------------------------------------------------------------------- deadlines

TEST_CASE("A deadline is the time given, or so long from now") {
  const auto at = Clock::now() + 1h;
  const CancellationSource by_point(CancellationToken(), at);
  REQUIRE(by_point.token().deadline().has_value());
  CHECK(by_point.token().deadline() == at);
  const auto before = Clock::now();
  const CancellationSource by_span(CancellationToken(), 1h);
  const auto after = Clock::now();
  REQUIRE(by_span.token().deadline().has_value());
  CHECK(*by_span.token().deadline() >= before + 1h);
  CHECK(*by_span.token().deadline() <= after + 1h);
  CHECK_FALSE(by_span.is_cancelled());
}

TEST_CASE("deadline() is the nearest of a token's own and its ancestors'") {
  const auto now = Clock::now();
  const CancellationSource root;
  const CancellationSource early(root.token(), now + 1h);
  const CancellationSource later(early.token(), now + 2h);
  const CancellationSource earlier(early.token(), now + 30min);
  const CancellationSource none(later.token());
  CHECK_FALSE(root.token().deadline().has_value());
  CHECK(early.token().deadline() == now + 1h);
  CHECK(later.token().deadline() == now + 1h);
  CHECK(earlier.token().deadline() == now + 30min);
  CHECK(none.token().deadline() == now + 1h);
  const CancellationSource merged =
      CancellationSource::any_of({root.token(), none.token(), earlier.token()});
  CHECK(merged.token().deadline() == now + 30min);
}

TEST_CASE("deadline() stays what it was when cancelled, and when the sources are gone") {
  const auto at = Clock::now() + 1h;
  auto parent = std::make_unique<CancellationSource>(CancellationToken(), at);
  auto child = std::make_unique<CancellationSource>(parent->token());
  const CancellationToken token = child->token();
  child->cancel();
  CHECK(token.deadline() == at);
  parent.reset();
  child.reset();
  CHECK(token.deadline() == at);
}

TEST_CASE("A child born cancelled has its deadline all the same") {
  const auto at = Clock::now() + 1h;
  CancellationSource parent;
  CancellationSource timed_parent(CancellationToken(), at);
  parent.cancel();
  timed_parent.cancel();
  const CancellationSource own(parent.token(), at);
  const CancellationSource earlier(timed_parent.token(), at - 1min);
  const CancellationSource later(timed_parent.token(), at + 1min);
  const CancellationSource inherited(timed_parent.token());
  const CancellationSource grandchild(inherited.token(), at + 1min);
  const CancellationSource merged = CancellationSource::any_of({own.token(), earlier.token()});
  for (const auto* source : {&own, &earlier, &later, &inherited, &grandchild, &merged}) {
    CHECK(source->is_cancelled());
    CHECK(source->token().cause().kind() == CauseKind::cancelled);
  }
  CHECK(own.token().deadline() == at);
  CHECK(earlier.token().deadline() == at - 1min);
  CHECK(later.token().deadline() == at);
  CHECK(inherited.token().deadline() == at);
  CHECK(grandchild.token().deadline() == at);
  CHECK(merged.token().deadline() == at - 1min);
}

TEST_CASE("A child made while its parent is cancelled has its parent's deadline all the same") {
  const auto at = Clock::now() + 1h;
  int lost = 0;
  constexpr int rounds = support::under_sanitizer ? 200 : 2000;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource parent(CancellationToken(), at);
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      parent.cancel();
    });
    line.ready_steady_go();
    for (int turn = 0; turn < 6; ++turn) {
      const CancellationSource child(parent.token());
      const CancellationSource later(parent.token(), at + 1h);
      if (child.token().deadline() != at || later.token().deadline() != at) ++lost;
    }
  }
  CHECK(lost == 0);
}

TEST_CASE("A deadline cancels with deadline_exceeded, never early") {
  for (const auto span : {1ms, 7ms, 30ms}) {
    const auto begin = Clock::now();
    CancellationSource source(CancellationToken(), span);
    const CancellationToken token = source.token();
    token.wait();
    CHECK(Clock::now() - begin >= span);
    CHECK(Clock::now() >= token.deadline());
    CHECK(token.is_cancelled());
    CHECK(token.cause().kind() == CauseKind::deadline_exceeded);
    CHECK_FALSE(source.cancel());
  }
}

TEST_CASE("No deadline of many is early, and none is forgotten") {
  support::Random random(4);
  std::atomic<int> early{0};
  std::atomic<int> fired{0};
  struct Item {
    explicit Item(Clock::time_point at, std::atomic<int>& early, std::atomic<int>& fired)
        : source(CancellationToken(), at), callback(source.token(), [at, &early, &fired] {
            if (Clock::now() < at) ++early;
            ++fired;
          }) {}
    CancellationSource source;
    CancellationCallback<std::function<void()>> callback;
  };
  std::vector<std::unique_ptr<Item>> items;
  const auto begin = Clock::now();
  for (int i = 0; i < 500; ++i) {
    const auto at = begin + std::chrono::microseconds(random.below(150'000));
    items.push_back(std::make_unique<Item>(at, early, fired));
  }
  CHECK(support::eventually([&] { return fired == 500; }));
  CHECK(early == 0);
  for (const auto& item : items) {
    CHECK(item->source.token().cause().kind() == CauseKind::deadline_exceeded);
  }
}

TEST_CASE("A deadline in the past is born deadline_exceeded") {
  const CancellationToken parent;
  const CancellationSource zero(parent, 0s);
  const CancellationSource negative(parent, -5min);
  const CancellationSource past(parent, Clock::now() - 1s);
  const CancellationSource long_past(parent, Clock::time_point::min());
  for (const auto* source : {&zero, &negative, &past, &long_past}) {
    CHECK(source->is_cancelled());
    CHECK(source->token().cause().kind() == CauseKind::deadline_exceeded);
    CHECK(source->token().deadline().has_value());
  }
}

// Calls `f` once on the timer thread, from below the node with the deadline. A deadline that has come before its callback was made, as on a slow
// machine, would have it called on this one: then a later deadline is tried.
class CalledByTimer {
 public:
  template <class F>
  explicit CalledByTimer(F f) {
    bool too_late = true;
    for (auto timeout = 2ms; too_late; timeout *= 2) {
      too_late = false;
      callback_.reset();
      source_.emplace(CancellationToken(), timeout);
      child_.emplace(source_->token());
      const auto call = [f, &too_late, here = std::this_thread::get_id()] {
        if (std::this_thread::get_id() == here) {
          too_late = true;
        } else {
          f();
        }
      };
      callback_.emplace(child_->token(), call);
    }
  }

 private:
  std::optional<CancellationSource> source_;
  std::optional<CancellationSource> child_;
  std::optional<CancellationCallback<std::function<void()>>> callback_;
};

TEST_CASE("A deadline in the past is born deadline_exceeded, whatever the timer thread is at") {
  support::Gate hold;
  std::atomic<bool> held{false};
  const CalledByTimer blocker([&] {
    held = true;
    hold.wait();
  });
  REQUIRE(support::eventually([&] { return held.load(); }));
  // From here on no deadline fires: the parent's passes, but nobody has cancelled it.
  const CancellationSource parent(CancellationToken(), 1ms);
  REQUIRE(support::eventually([&] { return Clock::now() > parent.token().deadline(); }));
  const bool parent_cancelled = parent.is_cancelled();
  const CancellationSource zero(parent.token(), 0s);
  const CancellationSource past(parent.token(), Clock::now());
  const bool born_zero = zero.is_cancelled();
  const bool born_past = past.is_cancelled();
  hold.open();
  CHECK_FALSE(parent_cancelled);
  CHECK(born_zero);
  CHECK(born_past);
  CHECK(zero.token().deadline() == parent.token().deadline());
  CHECK(parent.token().wait_for(30s));
  CHECK(zero.token().cause().kind() == CauseKind::deadline_exceeded);
  CHECK(past.token().cause().kind() == CauseKind::deadline_exceeded);
}

TEST_CASE("The parent's cause goes before a deadline in the past") {
  CancellationSource parent;
  parent.cancel(Cause::cancelled("the parent was first"));
  const CancellationSource child(parent.token(), -1s);
  CHECK(message_of(child.token()) == "the parent was first");
}

TEST_CASE("A parent's earlier deadline beats a child's later one") {
  const CancellationSource parent(CancellationToken(), 20ms);
  const CancellationSource child(parent.token(), 1h);
  const CancellationSource grandchild(child.token(), 2h);
  CHECK(grandchild.token().wait_for(30s));
  CHECK(grandchild.token().cause().kind() == CauseKind::deadline_exceeded);
  CHECK(parent.is_cancelled());
  CHECK(child.is_cancelled());
}

TEST_CASE("A child's earlier deadline leaves the parent alone") {
  const CancellationSource parent(CancellationToken(), 1h);
  const CancellationSource child(parent.token(), 5ms);
  child.token().wait();
  CHECK(child.token().cause().kind() == CauseKind::deadline_exceeded);
  CHECK_FALSE(parent.is_cancelled());
}

TEST_CASE("Cancelled before its deadline, a token keeps that cause when the deadline passes") {
  CancellationSource source(CancellationToken(), 10ms);
  std::atomic<int> runs{0};
  const CancellationCallback callback(source.token(), [&] { ++runs; });
  const bool first = source.cancel(Cause::cancelled("in time"));
  const CauseKind kind = source.token().cause().kind();
  CancellationToken().wait_for(30ms);
  CHECK(source.token().cause().kind() == kind);
  CHECK((kind == CauseKind::cancelled) == first);
  CHECK(runs == 1);
}

TEST_CASE("A deadline goes on when the source was disarmed and is gone") {
  auto source = std::make_unique<CancellationSource>(CancellationToken(), 20ms);
  const CancellationToken token = source->token();
  source->disarm();
  source.reset();
  CHECK(token.wait_for(30s));
  CHECK(token.cause().kind() == CauseKind::deadline_exceeded);
}

TEST_CASE("A source with a deadline that is destroyed was cancelled, not exceeded") {
  auto source = std::make_unique<CancellationSource>(CancellationToken(), 1h);
  const CancellationToken token = source->token();
  source.reset();
  CHECK(token.cause().kind() == CauseKind::cancelled);
}

TEST_CASE("An earlier deadline made later is not held up by one that is waited for already") {
  const CancellationSource far(CancellationToken(), 1h);
  const CancellationSource farther(CancellationToken(), 2h);
  support::eventually([] { return false; }, 20ms);  // the timer thread has gone to sleep by now
  const CancellationSource near(CancellationToken(), 5ms);
  CHECK(near.token().wait_for(30s));
  CHECK_FALSE(far.is_cancelled());
  CHECK_FALSE(farther.is_cancelled());
}

TEST_CASE("All deadlines share one thread, and their callbacks run on it") {
  std::atomic<std::size_t> first{0};
  std::atomic<std::size_t> second{0};
  const auto self = [] { return std::hash<std::thread::id>()(std::this_thread::get_id()); };
  const CalledByTimer on_a([&] { first = self(); });
  const CalledByTimer on_b([&] { second = self(); });
  REQUIRE(support::eventually([&] { return first != 0 && second != 0; }));
  CHECK(first == second);
  CHECK(first != self());
}

TEST_CASE("A deadline's callback may make, cancel and destroy deadlines, its own among them") {
  auto own = std::make_unique<CancellationSource>(CancellationToken(), 5ms);
  CancellationSource other(CancellationToken(), 1h);
  auto doomed = std::make_unique<CancellationSource>(CancellationToken(), 1h);
  std::unique_ptr<CancellationSource> born;
  std::atomic<bool> done{false};
  const CancellationToken doomed_token = doomed->token();
  const CancellationCallback callback(own->token(), [&] {
    born = std::make_unique<CancellationSource>(CancellationToken(), 5ms);
    other.cancel();
    doomed.reset();
    own.reset();
    done = true;
  });
  REQUIRE(support::eventually([&] { return done.load(); }));
  CHECK(other.is_cancelled());
  CHECK(doomed_token.is_cancelled());
  CHECK(born->token().wait_for(30s));
}

TEST_CASE("A huge timeout saturates: it never comes, and overflows nothing") {
  const CancellationToken parent;
  const auto never = Clock::time_point::max();
  const CancellationSource hours(parent, std::chrono::hours::max());
  const CancellationSource nanoseconds(parent, std::chrono::nanoseconds::max());
  const CancellationSource seconds(parent, std::chrono::duration<double>(1e300));
  const CancellationSource infinite(
      parent, std::chrono::duration<float>(std::numeric_limits<float>::infinity()));
  const CancellationSource point(parent, never);
  const CancellationSource coarse(
      parent, std::chrono::time_point<Clock, std::chrono::hours>(std::chrono::hours::max()));
  const CancellationSource unsigned_rep(
      parent, std::chrono::duration<std::uint64_t>(std::numeric_limits<std::uint64_t>::max()));
  for (const auto* source :
       {&hours, &nanoseconds, &seconds, &infinite, &point, &coarse, &unsigned_rep}) {
    CHECK_FALSE(source->is_cancelled());
    CHECK(source->token().deadline().value_or(never) == never);
  }
  const CancellationSource child(hours.token(), 5ms);
  CHECK(child.token().wait_for(30s));
  CHECK_FALSE(hours.is_cancelled());
}

TEST_CASE("A negative timeout, or none at all, means already") {
  const CancellationToken parent;
  const CancellationSource hours(parent, std::chrono::hours::min());
  const CancellationSource lowest(parent, std::chrono::duration<double>(-1e300));
  const CancellationSource nan(
      parent, std::chrono::duration<double>(std::numeric_limits<double>::quiet_NaN()));
  const CancellationSource coarse(
      parent, std::chrono::time_point<Clock, std::chrono::hours>(std::chrono::hours::min()));
  for (const auto* source : {&hours, &lowest, &nan, &coarse}) {
    CHECK(source->is_cancelled());
    CHECK(source->token().cause().kind() == CauseKind::deadline_exceeded);
  }
}

TEST_CASE("A timeout finer than the clock, or floating, is rounded up: never early") {
  using Picoseconds = std::chrono::duration<long long, std::pico>;
  const auto begin = Clock::now();
  const CancellationSource fine(CancellationToken(), Picoseconds(5'000'000'001));
  const CancellationSource floating(CancellationToken(), std::chrono::duration<double>(0.005));
  CHECK(*fine.token().deadline() - begin >= 5ms);
  fine.token().wait();
  CHECK(Clock::now() - begin > 5ms);
  floating.token().wait();
  CHECK(Clock::now() >= *floating.token().deadline());
}

#if defined(__linux__)
TEST_CASE("Who uses no deadline has no timer thread, and the first deadline starts it") {
  if (support::under_tsan) return;  // TSan has a thread of its own, and none may be made after fork
  const int outcome = support::in_child_process([] {
    if (support::live_threads() != 1) return 10;
    CancellationSource root;
    const CancellationSource child(root.token());
    int runs = 0;
    const CancellationCallback callback(child.token(), [&] { ++runs; });
    const CancellationSource born_exceeded(root.token(), -1s);
    if (!born_exceeded.is_cancelled() || child.token().wait_for(1ms)) return 11;
    if (child.token().fd() < 0 || !root.cancel() || runs != 1) return 12;
    const CancellationSource under_cancelled(root.token(), 1h);
    if (!under_cancelled.is_cancelled()) return 13;
    if (support::live_threads() != 1) return 14;
    const CancellationSource timed(CancellationToken(), 1h);
    if (support::live_threads() != 2) return 15;
    const CancellationSource again(CancellationToken(), 1h);
    return support::live_threads() == 2 ? 0 : 16;
  });
  CHECK(outcome == 0);
}
#endif

#if LASTCALL_LINUX
TEST_CASE(
    "The timer thread has the usual slack for its sleep, whatever the thread has that started it") {
  if (support::under_tsan) return;  // no thread may be made after a fork
  const int outcome = support::in_child_process([] {
    ::prctl(PR_SET_TIMERSLACK, 5'000'000'000UL, 0UL, 0UL, 0UL);
    std::atomic<int> slack{-1};
    const CancellationSource timed(CancellationToken(), 200ms);  // later than the callback is there
    const CancellationCallback callback(
        timed.token(), [&slack] { slack = ::prctl(PR_GET_TIMERSLACK, 0UL, 0UL, 0UL, 0UL); });
    const auto end = Clock::now() + 30s;
    while (slack == -1 && Clock::now() < end) std::this_thread::yield();
    return slack == 50'000 ? 0 : 10;
  });
  CHECK(outcome == 0);
}
#endif

TEST_CASE("In a forked child the timer thread is started again with the next deadline made there") {
  if (support::under_tsan) return;  // it refuses threads after a multi-threaded fork
  const CancellationSource before(CancellationToken(), 5ms);
  before.token().wait();  // the parent's timer thread runs
  CancellationSource pending(CancellationToken(), 1h);
  const int outcome = support::in_child_process([&] {
    const CancellationSource inherited = std::move(pending);
    const auto begin = Clock::now();
    const CancellationSource timed(CancellationToken(), 10ms);
    if (!timed.token().wait_for(30s)) return 10;
    if (Clock::now() - begin < 10ms) return 11;
    if (timed.token().cause().kind() != CauseKind::deadline_exceeded) return 12;
    return inherited.is_cancelled() ? 13 : 0;
  });
  CHECK(outcome == 0);
  // And the parent's goes on as before.
  const CancellationSource after(CancellationToken(), 5ms);
  CHECK(after.token().wait_for(30s));
  CHECK_FALSE(pending.is_cancelled());
}

TEST_CASE("In a forked child no deadline comes for threads that stayed with the parent") {
  if (support::under_tsan) return;
  support::Gate made;
  support::Gate over;
  support::Threads threads;
  int runs = 0;
  threads.start([&] {
    // On the stack of a thread that the child doesn't have: there that memory is anybody's.
    const CancellationSource source(CancellationToken(), 100ms);
    const CancellationCallback callback(source.token(), [&runs] { ++runs; });
    made.open();
    over.wait();
  });
  REQUIRE(made.wait());
  const CancellationSource inherited(CancellationToken(), 100ms);
  const int outcome = support::in_child_process([&] {
    const auto begin = Clock::now();
    const CancellationSource own(CancellationToken(), 300ms);
    if (!own.token().wait_for(30s) || Clock::now() - begin < 300ms) return 10;
    if (runs != 0) return 11;
    return inherited.is_cancelled() ? 12 : 0;  // destroyed here, though its timer is nowhere
  });
  CHECK(outcome == 0);
  CHECK(inherited.token().wait_for(30s));
  over.open();
  threads.join();
  CHECK(runs == 1);
}

#if defined(__linux__) && !defined(LASTCALL_PORTABLE)
TEST_CASE("In the child of a process without other threads a deadline from before the fork comes") {
  if (support::under_sanitizer) return;  // slow to start a thread, or with threads of its own
  const int outcome = support::in_child_process([] {
    const CancellationSource inherited(CancellationToken(), 500ms);
    std::this_thread::sleep_for(100ms);  // until the timer thread sleeps
    const pid_t child = ::fork();
    if (child == 0) {
      const CancellationSource own(CancellationToken(), 5ms);
      const bool came = own.token().wait_for(30s) && inherited.token().wait_for(30s);
      ::_exit(came ? 0 : 10);
    }
    return support::outcome_of(child);
  });
  CHECK(outcome == 0);
}
#endif

TEST_CASE(
    "In a forked child a deadline made there comes also below an earlier one that is inherited") {
  // clang 14's allocator stays locked in the child if the timer thread was just starting.
  if (support::under_sanitizer) return;
  for (const bool has_other_threads : {false, true}) {
    INFO((has_other_threads ? "the parent has other threads" : "the parent has none"));
    const int outcome = support::in_child_process([&] {
      support::Gate over;
      support::Threads threads;
      if (has_other_threads) threads.start([&] { over.wait(); });
      const CancellationSource inherited(CancellationToken(), 200ms);
      const CancellationSource merged = CancellationSource::any_of({inherited.token()});
      const CancellationToken parents[] = {inherited.token(), merged.token()};
      const int result = support::in_child_process([&] {
        ::alarm(40);
        for (const CancellationToken& parent : parents) {
          const CancellationSource own(parent, 400ms);
          if (own.token().deadline() != inherited.token().deadline()) return 10;
          if (!own.token().wait_for(30s) || Clock::now() < *own.token().deadline()) return 11;
          if (own.token().cause().kind() != CauseKind::deadline_exceeded) return 12;
        }
        return 0;
      });
      over.open();
      return result;
    });
    CHECK(outcome == 0);
  }
}

TEST_CASE(
    "A descriptor of a token's is a process's own: a fork's other side doesn't make it readable") {
  if (support::under_tsan) return;
  CancellationSource source;
  const CancellationToken token = source.token();
  const int fd = token.fd();
  CHECK(support::in_child_process([&] {
          source.cancel();
          return support::is_readable(fd) && token.fd() == fd ? 0 : 10;
        }) == 0);
  CHECK_FALSE(support::is_readable(token.fd()));
  CHECK(support::in_child_process([&] {
          if (token.fd() != fd || ::fcntl(fd, F_GETFD) != FD_CLOEXEC) return 10;
          source.cancel();
          return support::is_readable(fd) ? 0 : 11;
        }) == 0);
  CHECK_FALSE(support::is_readable(fd));

  int pipe[2] = {-1, -1};
  REQUIRE(::pipe(pipe) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(40);
    if (token.fd() != fd) ::_exit(10);
    char letter = 0;
    if (::read(pipe[0], &letter, 1) != 1) ::_exit(11);
    if (support::is_readable(token.fd()) || token.is_cancelled()) ::_exit(12);
    source.cancel();
    ::_exit(support::is_readable(fd) ? 0 : 13);
  }
  source.cancel();
  CHECK(support::is_readable(fd));
  CHECK(::write(pipe[1], "x", 1) == 1);
  CHECK(support::outcome_of(child) == 0);
  ::close(pipe[0]);
  ::close(pipe[1]);
  // One that was cancelled before the fork stays readable after it.
  CHECK(support::in_child_process([&] { return support::is_readable(token.fd()) ? 0 : 10; }) == 0);
}

TEST_CASE("A callback's result is nobody's business, whatever its type says") {
  struct [[nodiscard]] Result {};
  CancellationSource source;
  int runs = 0;
  const CancellationCallback callback(source.token(), [&runs] {
    ++runs;
    return Result{};
  });
  source.cancel();
  CHECK(runs == 1);
}

TEST_CASE("A pending pthread_cancel() tears no cancel, no wait and no destructor") {
  struct Ends {
    static void* run(void* argument) {
      auto* const done = static_cast<std::atomic<int>*>(argument);
      use_all(*done);
      ++*done;
      // With nothing on the stack that is to be destroyed: not every unwinder does that.
      ::pthread_testcancel();
      ++*done;
      return nullptr;
    }
    static void use_all(std::atomic<int>& done) {
      CancellationSource source;
      CancellationSource timed(source.token(), 1h);
      const CancellationToken token = timed.token();
      static_cast<void>(token.fd());
      auto with_descriptor = std::make_unique<CancellationSource>();
      static_cast<void>(with_descriptor->token().fd());
      ::pthread_cancel(::pthread_self());
      ++done;
      token.wait_for(1ms);
      ++done;
      source.cancel();
      ++done;
      with_descriptor.reset();
      ++done;
      const CancellationSource another;
    }
  };
  std::atomic<int> done{0};
  pthread_t thread{};
  REQUIRE(::pthread_create(&thread, nullptr, &Ends::run, &done) == 0);
  void* result = nullptr;
  REQUIRE(::pthread_join(thread, &result) == 0);
  CHECK(result == PTHREAD_CANCELED);
  CHECK(done == 5);
}

TEST_CASE("A forked child may cancel, wait on and destroy what it inherited") {
  if (support::under_tsan) return;
  CancellationSource parent;
  CancellationSource child(parent.token(), 1h);
  int runs = 0;
  const CancellationCallback callback(child.token(), [&] { ++runs; });
  const int outcome = support::in_child_process([&] {
    if (child.token().wait_for(1ms)) return 10;
    if (!parent.cancel() || runs != 1) return 11;
    if (!child.token().wait_for(1h)) return 12;
    return child.token().cause().kind() == CauseKind::cancelled ? 0 : 13;
  });
  CHECK(outcome == 0);
  CHECK_FALSE(parent.is_cancelled());
  CHECK(runs == 0);
}

// ------------------------------------------------------------------------------------------- waiting

TEST_CASE("Waiting on a cancelled token returns at once") {
  CancellationSource source;
  source.cancel();
  const CancellationToken token = source.token();
  token.wait();
  CHECK(token.wait_for(0s));
  CHECK(token.wait_for(-1s));
  CHECK(token.wait_for(std::chrono::hours::max()));
  CHECK(token.wait_until(Clock::time_point::max()));
  CHECK(token.wait_until(Clock::time_point::min()));
}

TEST_CASE("A wait that times out says false, and not before its time") {
  const CancellationSource source;
  const CancellationToken token = source.token();
  auto begin = Clock::now();
  CHECK_FALSE(token.wait_for(20ms));
  CHECK(Clock::now() - begin >= 20ms);
  begin = Clock::now();
  CHECK_FALSE(token.wait_until(begin + 20ms));
  CHECK(Clock::now() - begin >= 20ms);
  begin = Clock::now();
  CHECK_FALSE(token.wait_for(std::chrono::duration<double, std::milli>(7.25)));
  CHECK(Clock::now() - begin >= 7250us);
}

TEST_CASE("A wait with no time, a negative time or no number returns at once") {
  const CancellationSource bounded = fuse();
  const CancellationToken token = bounded.token();
  CHECK_FALSE(token.wait_for(0s));
  CHECK_FALSE(token.wait_for(-1h));
  CHECK_FALSE(token.wait_for(std::chrono::hours::min()));
  CHECK_FALSE(token.wait_for(std::chrono::nanoseconds::min()));
  CHECK_FALSE(token.wait_for(std::chrono::duration<double>(-1e300)));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_FALSE(token.wait_for(std::chrono::duration<double>(nan)));
  CHECK_FALSE(token.wait_until(Clock::now() - 1h));
  CHECK_FALSE(token.wait_until(Clock::time_point::min()));
  using Hours = std::chrono::time_point<Clock, std::chrono::hours>;
  CHECK_FALSE(token.wait_until(Hours(std::chrono::hours::min())));
}

TEST_CASE("A wait blocks until the cancel, also with a huge timeout") {
  using Wait = bool (*)(const CancellationToken&);
  const std::vector<Wait> waits = {
      [](const CancellationToken& token) {
        token.wait();
        return true;
      },
      [](const CancellationToken& token) { return token.wait_for(std::chrono::hours::max()); },
      [](const CancellationToken& token) {
        return token.wait_for(std::chrono::nanoseconds::max());
      },
      [](const CancellationToken& token) {
        return token.wait_for(std::chrono::duration<double>(1e300));
      },
      [](const CancellationToken& token) {
        return token.wait_for(
            std::chrono::duration<double>(std::numeric_limits<double>::infinity()));
      },
      [](const CancellationToken& token) {
        return token.wait_for(
            std::chrono::duration<std::uint64_t>(std::numeric_limits<std::uint64_t>::max()));
      },
      [](const CancellationToken& token) { return token.wait_until(Clock::time_point::max()); },
      [](const CancellationToken& token) {
        using Hours = std::chrono::time_point<Clock, std::chrono::hours>;
        return token.wait_until(Hours(std::chrono::hours::max()));
      },
      [](const CancellationToken& token) { return token.wait_until(Clock::now() + 1h); },
  };
  for (std::size_t i = 0; i < waits.size(); ++i) {
    INFO("wait number " << i);
    CancellationSource source;
    std::atomic<pid_t> waiter{0};
    std::atomic<bool> returned{false};
    std::atomic<bool> result{false};
    std::atomic<bool> cancelled_before{false};
    support::Threads threads;
    threads.start([&, token = source.token(), wait = waits[i]] {
      waiter = support::thread_id();
      result = wait(token);
      cancelled_before = token.is_cancelled();
      returned = true;
    });
    support::let_it_block(waiter, [&] { return returned.load(); });
    const bool too_early = returned;
    source.cancel();
    threads.join();
    CHECK_FALSE(too_early);
    CHECK(result);
    CHECK(cancelled_before);
  }
}

TEST_CASE("A cancel wakes every waiter of the subtree, whoever waits however") {
  CancellationSource root;
  const CancellationSource child(root.token());
  const CancellationSource grandchild(child.token());
  const CancellationSource merged =
      CancellationSource::any_of({CancellationToken(), grandchild.token()});
  std::atomic<int> woken{0};
  std::atomic<int> wrong{0};
  std::vector<std::unique_ptr<std::atomic<pid_t>>> ids;
  support::Threads threads;
  for (int i = 0; i < 16; ++i) {
    ids.push_back(std::make_unique<std::atomic<pid_t>>(0));
    const CancellationToken token = i % 4 == 0   ? root.token()
                                    : i % 4 == 1 ? child.token()
                                    : i % 4 == 2 ? grandchild.token()
                                                 : merged.token();
    threads.start([&, token, i, id = ids.back().get()] {
      *id = support::thread_id();
      if (i < 6) {
        token.wait();
      } else if (i < 11) {
        if (!token.wait_for(1h)) ++wrong;
      } else if (!token.wait_until(Clock::now() + 2h)) {
        ++wrong;
      }
      if (token.cause().message() != "everybody up") ++wrong;
      ++woken;
    });
  }
  for (const auto& id : ids) support::let_it_block(*id, [&] { return woken > 0; });
  const int early = woken;
  root.cancel(Cause::cancelled("everybody up"));
  threads.join();
  CHECK(early == 0);
  CHECK(woken == 16);
  CHECK(wrong == 0);
}

TEST_CASE("A waiter wakes only after its whole subtree is marked") {
  support::Random random(5);
  std::atomic<int> violations{0};
  constexpr int rounds = support::under_sanitizer ? 40 : 200;
  for (int round = 0; round < rounds; ++round) {
    RandomTree tree(random, 40);
    std::atomic<int> ready{0};
    support::Threads threads;
    for (int waiter = 0; waiter < 2; ++waiter) {
      const std::size_t watched = waiter == 0 ? 0 : random.below(20);
      threads.start([&tree, &ready, &violations, watched] {
        ++ready;
        tree.tokens[watched].wait();
        violations += tree.uncancelled_below(watched);
      });
    }
    while (ready != 2) std::this_thread::yield();
    if (round % 2 == 0) std::this_thread::sleep_for(200us);
    tree.sources[0].cancel();
  }
  CHECK(violations == 0);
}

TEST_CASE("A waiter that has woken may drop the last handle at once") {
  constexpr int rounds = support::under_sanitizer ? 200 : 2000;
  for (int round = 0; round < rounds; ++round) {
    auto source = std::make_unique<CancellationSource>();
    auto child = std::make_unique<CancellationSource>(source->token());
    std::atomic<int> ready{0};
    support::Threads threads;
    for (int i = 0; i < 2; ++i) {
      auto token = std::make_unique<CancellationToken>(i == 0 ? source->token() : child->token());
      threads.start([&ready, mine = std::move(token)]() mutable {
        ++ready;
        mine->wait();
        mine.reset();
      });
    }
    child->disarm();
    child.reset();
    while (ready != 2) std::this_thread::yield();
    source.reset();
  }
  SUCCEED();
}

TEST_CASE("Who sees a source cancelled may destroy it, though its cancel() has not returned yet") {
  constexpr int rounds = support::under_sanitizer ? 200 : 2000;
  for (int round = 0; round < rounds; ++round) {
    auto source = std::make_unique<CancellationSource>();
    CancellationSource child(source->token());
    std::atomic<bool> ready{false};
    support::Threads threads;
    threads.start([&, mine = std::move(source), other = child.token()]() mutable {
      CancellationSource* const raw = mine.get();
      support::Threads canceller;
      canceller.start([raw, &ready] {
        ready = true;
        raw->cancel();
      });
      if (round % 2 == 0) {
        mine->token().wait();
      } else {
        while (!mine->is_cancelled()) {
        }
      }
      mine.reset();
      other.wait();
    });
  }
  SUCCEED();
}

TEST_CASE("A wait that times out while it is cancelled is one or the other, and leaves nothing") {
  support::Random random(6);
  int inconsistent = 0;
  constexpr int rounds = support::under_sanitizer ? 200 : 1500;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    std::atomic<bool> result{false};
    std::atomic<bool> seen{false};
    support::StartingLine line(2);
    support::Threads threads;
    const auto span = std::chrono::microseconds(random.below(120));
    threads.start([&, token = source.token()] {
      line.ready_steady_go();
      result = token.wait_for(span);
      seen = token.is_cancelled();
    });
    line.ready_steady_go();
    if (random.one_in(2)) std::this_thread::sleep_for(std::chrono::microseconds(random.below(60)));
    source.cancel();
    threads.join();
    if (result && !seen) ++inconsistent;
  }
  CHECK(inconsistent == 0);
}

TEST_CASE("A signal that interrupts a waiting thread ends no wait") {
  struct sigaction action {};
  struct sigaction before {};
  static std::atomic<int> handled{0};
  action.sa_handler = [](int) { ++handled; };
  ::sigemptyset(&action.sa_mask);
  ::sigaction(SIGUSR1, &action, &before);  // no SA_RESTART: system calls return EINTR
  const CancellationSource source;
  std::atomic<bool> ready{false};
  std::atomic<bool> over{false};
  std::atomic<bool> result{true};
  std::chrono::nanoseconds slept{};
  std::thread waiter([&] {
    ready = true;
    const auto begin = Clock::now();
    result = source.token().wait_for(100ms);
    slept = Clock::now() - begin;
    over = true;
  });
  while (!ready) std::this_thread::yield();
  while (!over) {
    ::pthread_kill(waiter.native_handle(), SIGUSR1);
    std::this_thread::sleep_for(3ms);
  }
  waiter.join();
  ::sigaction(SIGUSR1, &before, nullptr);
  CHECK(handled > 0);
  CHECK_FALSE(result);
  CHECK(slept >= 100ms);
}

TEST_CASE("Waiting inside a callback of the same token returns at once") {
  CancellationSource source;
  bool for_ever = false;
  bool bounded = false;
  const CancellationToken token = source.token();
  const CancellationCallback callback(token, [&] {
    token.wait();
    for_ever = true;
    bounded = token.wait_for(1h);
  });
  source.cancel();
  CHECK(for_ever);
  CHECK(bounded);
}

// --------------------------------------------------------------------------------------- descriptors

TEST_CASE("fd() polls readable once cancelled, and for ever after") {
  CancellationSource source;
  const CancellationToken token = source.token();
  const int fd = token.fd();
  REQUIRE(fd >= 0);
  CHECK_FALSE(support::is_readable(fd));
  CHECK(token.fd() == fd);
  const CancellationToken copy = token;
  CHECK(copy.fd() == fd);
  CHECK(source.token().fd() == fd);
  source.cancel();
  CHECK(token.fd() == fd);
  for (int look = 0; look < 3; ++look) CHECK(support::is_readable(fd));
  { const CancellationSource goes = std::move(source); }
  CHECK(token.fd() == fd);
  CHECK(support::is_readable(fd));
}

TEST_CASE("fd() of a token that is cancelled already is readable at once") {
  CancellationSource source;
  source.cancel();
  const CancellationSource born(source.token());
  const CancellationSource exceeded(CancellationToken(), -1s);
  for (const CancellationToken& token : {source.token(), born.token(), exceeded.token()}) {
    const int fd = token.fd();
    REQUIRE(fd >= 0);
    CHECK(support::is_readable(fd));
    CHECK(token.fd() == fd);
    CHECK(support::is_readable(fd));
  }
}

TEST_CASE("fd() turns readable when an ancestor is cancelled, or the deadline passes") {
  CancellationSource root;
  const CancellationSource middle(root.token());
  const CancellationSource leaf(middle.token());
  const CancellationSource merged = CancellationSource::any_of({CancellationToken(), leaf.token()});
  const int leaf_fd = leaf.token().fd();
  const int merged_fd = merged.token().fd();
  CHECK(leaf_fd != merged_fd);
  root.cancel();
  CHECK(support::is_readable(leaf_fd));
  CHECK(support::is_readable(merged_fd));
  const CancellationSource timed(CancellationToken(), 5ms);
  CHECK(support::is_readable(timed.token().fd(), 30'000));
  CHECK(Clock::now() >= timed.token().deadline());
}

TEST_CASE("fd() doesn't leak into exec'ed programs") {
  CancellationSource source;
  CHECK((::fcntl(source.token().fd(), F_GETFD) & FD_CLOEXEC) != 0);
  CancellationSource cancelled;
  cancelled.cancel();
  CHECK((::fcntl(cancelled.token().fd(), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST_CASE("fd() is -1 if the token can never be cancelled") {
  CHECK(CancellationToken().fd() == -1);
  auto source = std::make_unique<CancellationSource>();
  const CancellationToken token = source->token();
  source->disarm();
  source.reset();
  REQUIRE_FALSE(token.can_be_cancelled());
  CHECK(token.fd() == -1);
}

TEST_CASE("fd() stays what it was when the last that could cancel is gone") {
  auto source = std::make_unique<CancellationSource>();
  const CancellationToken token = source->token();
  const int fd = token.fd();
  source->disarm();
  source.reset();
  CHECK(token.fd() == fd);
  CHECK_FALSE(support::is_readable(fd));
}

TEST_CASE("fd() is made on first use and closed with the last handle") {
  const int before = support::open_descriptors();
  {
    CancellationSource source;
    const CancellationSource child(source.token());
    auto token = std::make_unique<CancellationToken>(child.token());
    CHECK(support::open_descriptors() == before);
    const int fd = token->fd();
    CHECK(support::open_descriptors() > before);
    token.reset();
    CHECK(::fcntl(fd, F_GETFD) != -1);  // the child's source is a handle still
    source.cancel();
    CHECK(support::is_readable(fd));
  }
  CHECK(support::open_descriptors() == before);
}

TEST_CASE("fd() may be asked for by many threads at once: they get the same") {
  const int before = support::open_descriptors();
  int different = 0;
  for (int round = 0; round < 100; ++round) {
    const CancellationSource source;
    std::array<std::atomic<int>, 4> got{};
    support::StartingLine line(4);
    support::Threads threads;
    for (std::size_t i = 0; i < 4; ++i) {
      threads.start([&, i] {
        line.ready_steady_go();
        got[i] = source.token().fd();
      });
    }
    threads.join();
    for (const auto& one : got) {
      if (one != got[0] || one < 0) ++different;
    }
  }
  CHECK(different == 0);
  CHECK(support::open_descriptors() == before);
}

TEST_CASE("fd() made while the token is being cancelled is readable") {
  int silent = 0;
  constexpr int rounds = support::under_sanitizer ? 100 : 1000;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource source;
    const CancellationSource child(source.token());
    std::atomic<int> fd{-1};
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      fd = child.token().fd();
    });
    line.ready_steady_go();
    source.cancel();
    threads.join();
    if (!support::is_readable(fd)) ++silent;
  }
  CHECK(silent == 0);
}

TEST_CASE("fd() with no descriptor left throws EMFILE, and works when there is one again") {
  if (support::under_asan) return;  // UBSan's look at an exception's type takes a descriptor, too
  CancellationSource source;
  const CancellationToken token = source.token();
  int code = 0;
  std::string words;
  {
    const KeepDescriptorLimit restore;
    const int next = ::dup(0);
    ::close(next);
    rlimit tight = restore.before;
    tight.rlim_cur = static_cast<rlim_t>(next);
    ::setrlimit(RLIMIT_NOFILE, &tight);
    try {
      static_cast<void>(token.fd());
    } catch (const std::system_error& error) {
      code = error.code().value();
      words = error.what();
    }
  }
  CHECK(code == EMFILE);
  CHECK(words.find("descriptor") != std::string::npos);
  const int fd = token.fd();
  REQUIRE(fd >= 0);
  CHECK_FALSE(support::is_readable(fd));
  source.cancel();
  CHECK(support::is_readable(fd));
}

TEST_CASE("fd() is the same node's: two tokens that are cancelled don't share one by accident") {
  CancellationSource a;
  CancellationSource b;
  const int fd_a = a.token().fd();
  const int fd_b = b.token().fd();
  CHECK(fd_a != fd_b);
  a.cancel();
  CHECK(support::is_readable(fd_a));
  CHECK_FALSE(support::is_readable(fd_b));
}

TEST_CASE("fd() turns readable only after the whole subtree is marked") {
  support::Random random(8);
  std::atomic<int> violations{0};
  for (int round = 0; round < 60; ++round) {
    RandomTree tree(random, 40);
    const std::size_t watched = random.below(20);
    const int fd = tree.tokens[watched].fd();
    std::atomic<bool> ready{false};
    support::Threads threads;
    threads.start([&] {
      ready = true;
      if (!support::is_readable(fd, 30'000)) ++violations;
      violations += tree.uncancelled_below(watched);
    });
    while (!ready) std::this_thread::yield();
    tree.sources[0].cancel();
  }
  CHECK(violations == 0);
}

// -------------------------------------------------------------------------------------------- any_of

TEST_CASE("any_of is cancelled with the first of its parents, with its cause") {
  for (std::size_t which = 0; which < 3; ++which) {
    std::array<CancellationSource, 3> parents;
    const CancellationSource merged =
        CancellationSource::any_of({parents[0].token(), parents[1].token(), parents[2].token()});
    const CancellationSource child(merged.token());
    CHECK_FALSE(merged.is_cancelled());
    parents[which].cancel(Cause::cancelled("number " + std::to_string(which)));
    CHECK(merged.is_cancelled());
    CHECK(child.is_cancelled());
    for (CancellationSource& parent : parents) parent.cancel(Cause::cancelled("late"));
    CHECK(message_of(merged.token()) == "number " + std::to_string(which));
    CHECK(message_of(child.token()) == "number " + std::to_string(which));
  }
}

TEST_CASE("any_of has a cancel() of its own that leaves the parents alone") {
  const CancellationSource a;
  const CancellationSource b;
  CancellationSource merged = CancellationSource::any_of({a.token(), b.token()});
  CHECK(merged.cancel(Cause::cancelled("its own")));
  CHECK(message_of(merged.token()) == "its own");
  CHECK_FALSE(a.is_cancelled());
  CHECK_FALSE(b.is_cancelled());
}

TEST_CASE("any_of nothing is a root") {
  CancellationSource from_list = CancellationSource::any_of({});
  CancellationSource from_span = CancellationSource::any_of(std::span<const CancellationToken>());
  CancellationSource from_empty =
      CancellationSource::any_of({CancellationToken(), CancellationToken()});
  for (auto* source : {&from_list, &from_span, &from_empty}) {
    CHECK_FALSE(source->is_cancelled());
    CHECK(source->token().can_be_cancelled());
    CHECK_FALSE(source->token().deadline().has_value());
    CHECK(source->cancel());
  }
}

TEST_CASE("any_of takes whatever a span can be made of") {
  CancellationSource source;
  const std::vector<CancellationToken> vector(2, source.token());
  const std::array<CancellationToken, 2> array{source.token(), CancellationToken()};
  const CancellationToken plain[] = {source.token()};
  const CancellationSource a = CancellationSource::any_of(vector);
  const CancellationSource b = CancellationSource::any_of(array);
  const CancellationSource c = CancellationSource::any_of(plain);
  source.cancel();
  CHECK(a.is_cancelled());
  CHECK(b.is_cancelled());
  CHECK(c.is_cancelled());
}

TEST_CASE("any_of with a parent that is cancelled already is born cancelled with its cause") {
  CancellationSource done;
  done.cancel(Cause::cancelled("long ago"));
  const CancellationSource live;
  const CancellationSource last = CancellationSource::any_of({live.token(), done.token()});
  const CancellationSource first = CancellationSource::any_of({done.token(), live.token()});
  CHECK(last.is_cancelled());
  CHECK(first.is_cancelled());
  CHECK(message_of(last.token()) == "long ago");
  CHECK(message_of(first.token()) == "long ago");
  CHECK_FALSE(live.is_cancelled());
}

TEST_CASE("any_of with duplicates and empty tokens is as if they were named once, or not at all") {
  CancellationSource a;
  CancellationSource b;
  auto merged = std::make_unique<CancellationSource>(CancellationSource::any_of(
      {a.token(), CancellationToken(), a.token(), b.token(), a.token(), CancellationToken()}));
  int runs = 0;
  const CancellationCallback callback(merged->token(), [&] { ++runs; });
  SECTION("cancelled by the duplicate") {
    a.cancel(Cause::cancelled("a"));
    CHECK(message_of(merged->token()) == "a");
    CHECK(runs == 1);
  }
  SECTION("cancelled by the other") {
    b.cancel(Cause::cancelled("b"));
    a.cancel(Cause::cancelled("a"));
    CHECK(message_of(merged->token()) == "b");
    CHECK(runs == 1);
  }
  SECTION("destroyed before either") {
    merged.reset();
    CHECK(runs == 1);
    a.cancel();
    b.cancel();
    CHECK(runs == 1);
  }
}

TEST_CASE("any_of over an ancestor and its descendant works in both orders and from both ends") {
  for (int order = 0; order < 2; ++order) {
    for (int by = 0; by < 3; ++by) {
      CancellationSource top;
      CancellationSource middle(top.token());
      CancellationSource bottom(middle.token());
      const CancellationSource merged =
          order == 0 ? CancellationSource::any_of({top.token(), middle.token(), bottom.token()})
                     : CancellationSource::any_of({bottom.token(), middle.token(), top.token()});
      int runs = 0;
      const CancellationCallback callback(merged.token(), [&] { ++runs; });
      (by == 0 ? top : by == 1 ? middle : bottom).cancel(Cause::cancelled("x"));
      CHECK(message_of(merged.token()) == "x");
      top.cancel();
      CHECK(runs == 1);
    }
  }
}

TEST_CASE("A node that is reached by many ways is cancelled once") {
  CancellationSource root;
  std::vector<CancellationSource> layer;
  for (int i = 0; i < 4; ++i) layer.emplace_back(root.token());
  std::vector<std::vector<CancellationSource>> layers;
  layers.push_back(std::move(layer));
  int runs = 0;
  std::vector<std::unique_ptr<CancellationCallback<std::function<void()>>>> callbacks;
  for (int depth = 0; depth < 12; ++depth) {  // 4^12 ways from top to bottom
    std::vector<CancellationToken> above;
    for (const CancellationSource& source : layers.back()) above.push_back(source.token());
    std::vector<CancellationSource> next;
    for (int i = 0; i < 4; ++i) {
      next.push_back(CancellationSource::any_of(above));
      callbacks.push_back(std::make_unique<CancellationCallback<std::function<void()>>>(
          next.back().token(), [&runs] { ++runs; }));
    }
    layers.push_back(std::move(next));
  }
  CHECK(root.cancel(Cause::cancelled("once")));
  CHECK(runs == 48);
  for (const CancellationSource& source : layers.back()) {
    CHECK(message_of(source.token()) == "once");
  }
}

TEST_CASE("any_of may outlive its parents' sources, and its parents it") {
  auto a = std::make_unique<CancellationSource>();
  CancellationSource b;
  CancellationSource merged = CancellationSource::any_of({a->token(), b.token()});
  a->disarm();
  a.reset();
  CHECK_FALSE(merged.is_cancelled());
  b.cancel(Cause::cancelled("the one that is left"));
  CHECK(message_of(merged.token()) == "the one that is left");
  { const CancellationSource goes = std::move(merged); }
  CHECK_FALSE(b.cancel());
}

TEST_CASE("Parents of any_ofs in opposite orders may be cancelled at once") {
  int wrong = 0;
  constexpr int rounds = support::under_sanitizer ? 60 : 500;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource a;
    CancellationSource b;
    std::vector<CancellationSource> merged;
    for (int i = 0; i < 6; ++i) {
      merged.push_back(i % 2 == 0 ? CancellationSource::any_of({a.token(), b.token()})
                                  : CancellationSource::any_of({b.token(), a.token()}));
    }
    // And one level more, crosswise.
    merged.push_back(CancellationSource::any_of({merged[0].token(), merged[1].token()}));
    merged.push_back(CancellationSource::any_of({merged[1].token(), merged[0].token()}));
    std::atomic<int> runs{0};
    const CancellationCallback callback(merged.back().token(), [&] { ++runs; });
    support::StartingLine line(2);
    std::atomic<int> late{0};
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      a.cancel(Cause::cancelled("a"));
      for (const CancellationSource& source : merged) {
        if (!source.is_cancelled()) ++late;
      }
    });
    line.ready_steady_go();
    b.cancel(Cause::cancelled("b"));
    for (const CancellationSource& source : merged) {
      if (!source.is_cancelled()) ++late;
    }
    threads.join();
    if (late != 0 || runs != 1) ++wrong;
    for (const CancellationSource& source : merged) {
      const std::string cause = message_of(source.token());
      if (cause != "a" && cause != "b") ++wrong;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("any_ofs may be made and dropped while their parents are cancelled") {
  int wrong = 0;
  constexpr int rounds = support::under_sanitizer ? 60 : 400;
  for (int round = 0; round < rounds; ++round) {
    std::array<CancellationSource, 3> parents;
    support::StartingLine line(3);
    std::atomic<int> unborn{0};
    support::Threads threads;
    for (int i = 0; i < 2; ++i) {
      threads.start([&, i] {
        line.ready_steady_go();
        for (int turn = 0; turn < 20; ++turn) {
          const bool before = parents[0].is_cancelled();
          CancellationSource merged =
              i == 0 ? CancellationSource::any_of(
                           {parents[0].token(), parents[1].token(), parents[2].token()})
                     : CancellationSource::any_of(
                           {parents[2].token(), parents[0].token(), parents[1].token()});
          const CancellationSource child(merged.token());
          if (before && !child.is_cancelled()) ++unborn;
        }
      });
    }
    line.ready_steady_go();
    for (CancellationSource& parent : parents) parent.cancel();
    threads.join();
    if (unborn != 0) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("A deadline of one parent cancels an any_of") {
  const CancellationSource slow;
  const CancellationSource timed(CancellationToken(), 5ms);
  const CancellationSource merged = CancellationSource::any_of({slow.token(), timed.token()});
  CHECK(merged.token().wait_for(30s));
  CHECK(merged.token().cause().kind() == CauseKind::deadline_exceeded);
  CHECK_FALSE(slow.is_cancelled());
}
