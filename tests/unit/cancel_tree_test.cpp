// detail/cancel_tree.hpp: what the public interface can't show. Timers that are armed, and a node that
// has grown a lane a thread, which must act just as one that has not.
#include <lastcall/cancellation.hpp>
#include <lastcall/detail/cancel_tree.hpp>
#include <lastcall/detail/timer_service.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::Clock;
using namespace std::chrono_literals;

namespace {

using AnyCallback = CancellationCallback<std::function<void()>>;

/// What contention does, without having to make any.
void grow(const CancellationToken& token) {
  lastcall::detail::grow_shards(lastcall::detail::TreeAccess::peek(token));
}
bool has_grown(const CancellationToken& token) {
  const auto* node = lastcall::detail::TreeAccess::peek(token);
  return (node->state.load() & lastcall::detail::sharded_flag) != 0;
}

/// How many nodes there are after `body` has run on a thread of its own, whose store of free ones has gone.
template <class Body>
std::size_t in_use_after(Body body) {
  using lastcall::detail::NodePool;
  std::thread(body).join();
  return NodePool::is_used ? NodePool::census().used : 0;
}

/// Runs on so many threads that every shard gets its share: threads are numbered in turn.
template <class Body>
void on_new_threads(int count, Body body) {
  for (int i = 0; i < count; ++i) std::thread([&body, i] { body(i); }).join();
}

}  // namespace

TEST_CASE("A child whose deadline is no earlier than its parent's costs no timer") {
  auto& service = lastcall::detail::TimerService::instance();
  REQUIRE(support::eventually([&] { return service.armed_for_test() == 0; }));
  const auto at = Clock::now() + 1h;
  const CancellationSource parent(CancellationToken(), at);
  CHECK(service.armed_for_test() == 1);
  const CancellationSource later(parent.token(), at + 1s);
  const CancellationSource same(parent.token(), at);
  const CancellationSource grandchild(later.token(), at + 1h);
  const CancellationSource merged = CancellationSource::any_of({parent.token(), later.token()});
  CHECK(service.armed_for_test() == 1);
  const CancellationSource earlier(grandchild.token(), at - 1s);
  CHECK(service.armed_for_test() == 2);
}

TEST_CASE("A cancelled or destroyed node leaves no timer behind") {
  auto& service = lastcall::detail::TimerService::instance();
  REQUIRE(support::eventually([&] { return service.armed_for_test() == 0; }));
  CancellationSource parent;
  CancellationSource cancelled(parent.token(), 1h);
  CancellationSource by_parent(parent.token(), 1h);
  auto destroyed = std::make_unique<CancellationSource>(parent.token(), 1h);
  auto disarmed = std::make_unique<CancellationSource>(parent.token(), 1h);
  CHECK(service.armed_for_test() == 4);
  cancelled.cancel();
  CHECK(service.armed_for_test() == 3);
  destroyed.reset();
  CHECK(service.armed_for_test() == 2);
  disarmed->disarm();
  disarmed.reset();
  CHECK(service.armed_for_test() == 1);
  parent.cancel();
  CHECK(service.armed_for_test() == 0);
  const CancellationSource born(parent.token(), 1h);
  CHECK(service.armed_for_test() == 0);
}

TEST_CASE("A node that has grown shards cancels what was linked before and after, on any thread") {
  CancellationSource parent;
  std::vector<CancellationSource> children;
  std::vector<std::unique_ptr<AnyCallback>> callbacks;
  std::atomic<int> runs{0};
  int marked_late = 0;
  const auto link = [&](int) {
    children.emplace_back(parent.token());
    callbacks.push_back(std::make_unique<AnyCallback>(parent.token(), [&] {
      ++runs;
      for (const CancellationSource& child : children) {
        if (!child.is_cancelled()) ++marked_late;
      }
    }));
    children.push_back(CancellationSource::any_of({parent.token(), children.back().token()}));
  };
  on_new_threads(4, link);
  grow(parent.token());
  REQUIRE(has_grown(parent.token()));
  on_new_threads(20, link);
  CHECK(parent.cancel(Cause::cancelled("every lane")));
  CHECK(runs == 24);
  CHECK(marked_late == 0);
  for (const CancellationSource& child : children) {
    CHECK(child.token().cause().message() == "every lane");
  }
  CHECK(parent.token().is_cancelled());
  on_new_threads(10, [&](int) {
    const CancellationSource born(parent.token());
    if (!born.is_cancelled()) ++marked_late;
    const AnyCallback at_once(parent.token(), [&] { ++runs; });
  });
  CHECK(marked_late == 0);
  CHECK(runs == 34);
}

TEST_CASE("A node that has grown shards wakes its waiters and raises its descriptor") {
  CancellationSource parent;
  const int fd = parent.token().fd();
  grow(parent.token());
  CHECK(parent.token().fd() == fd);
  std::atomic<int> woken{0};
  std::vector<std::unique_ptr<std::atomic<pid_t>>> ids;
  support::Threads threads;
  for (int i = 0; i < 10; ++i) {
    ids.push_back(std::make_unique<std::atomic<pid_t>>(0));
    threads.start([&, id = ids.back().get(), token = parent.token()] {
      *id = support::thread_id();
      if (token.wait_for(1h)) ++woken;
    });
  }
  for (const auto& id : ids) support::let_it_block(*id);
  CHECK_FALSE(parent.token().wait_for(2ms));
  CHECK(woken == 0);
  parent.cancel();
  threads.join();
  CHECK(woken == 10);
  CHECK(support::is_readable(fd));
}

TEST_CASE("Who must not wait for a node's locks gives up in time, and leaves none of them locked") {
  namespace detail = lastcall::detail;
  CancellationSource parent;
  auto* const node = detail::TreeAccess::peek(parent.token());
  std::uint32_t state = 0;
  const auto is_locked = [](const detail::Lane& lane) {
    return (lane.state.load() & detail::locked_bit) != 0;
  };

  REQUIRE(detail::lock_node_until(node, Clock::now(), state));
  CHECK(is_locked(*node));
  CHECK_FALSE(detail::lock_node_until(node, Clock::now() + 5ms, state));
  detail::unlock_node(node);
  CHECK_FALSE(is_locked(*node));

  grow(parent.token());
  auto* const shards = detail::extension_of(node)->shards.get();
  for (const unsigned held : {0U, 3U, detail::Extension::shard_count - 1}) {
    const std::uint32_t before = detail::lock_bit(shards[held].state);
    const auto begin = Clock::now();
    CHECK_FALSE(detail::lock_node_until(node, begin + 5ms, state));
    CHECK(Clock::now() >= begin + 5ms);
    CHECK_FALSE(is_locked(*node));
    for (unsigned at = 0; at < detail::Extension::shard_count; ++at) {
      CHECK(is_locked(shards[at]) == (at == held));
    }
    detail::unlock_bit(shards[held].state, before);
  }
  REQUIRE(detail::lock_node_until(node, Clock::now(), state));
  for (unsigned at = 0; at < detail::Extension::shard_count; ++at) CHECK(is_locked(shards[at]));
  detail::unlock_node(node);
  CHECK((node->state.load() & detail::sharded_flag) != 0);
  // It works as before.
  CancellationSource child(parent.token());
  CHECK(parent.cancel());
  CHECK(child.is_cancelled());
}

TEST_CASE(
    "Waking what a cancel has marked gives up at a lock that is held, and can be done again") {
  namespace detail = lastcall::detail;
  CancellationSource source;
  const int fd = source.token().fd();
  auto* const node = detail::TreeAccess::peek(source.token());
  detail::CancelWork work;
  CHECK(work.empty());
  std::uint32_t before = detail::lock_bit(node->state);
  work.push(node, true);
  CHECK_FALSE(work.empty());
  CHECK_FALSE(work.wake(Clock::now() + 2ms));  // the lock is held
  CHECK_FALSE(support::is_readable(fd));
  detail::unlock_bit(node->state, before);
  CHECK(work.wake(Clock::now() + 1h));
  CHECK(support::is_readable(fd));
  CHECK_FALSE(work.run_one());
  CHECK(work.empty());
}

TEST_CASE("Waking what a cancel has marked waits for a lock that is held, if it has the time") {
  namespace detail = lastcall::detail;
  CancellationSource source;
  const int fd = source.token().fd();
  auto* const node = detail::TreeAccess::peek(source.token());
  detail::CancelWork work;
  const std::uint32_t before = detail::lock_bit(node->state);
  work.push(node, true);
  std::atomic<bool> woke{false};
  std::thread canceller([&] {
    work.wake();
    woke = true;
  });
  std::this_thread::sleep_for(20ms);
  CHECK_FALSE(woke);
  CHECK_FALSE(support::is_readable(fd));
  detail::unlock_bit(node->state, before);
  canceller.join();
  CHECK(support::is_readable(fd));
  CHECK_FALSE(work.run_one());
}

TEST_CASE("A node is given back whose cancel has run the last of its callbacks") {
  const auto before = in_use_after([] { CancellationSource{}; });
  for (const bool grown : {false, true}) {
    for (std::size_t count = 0; count < 4; ++count) {
      INFO(count << (grown ? " callbacks, shards" : " callbacks"));
      int ran = 0;
      const auto after = in_use_after([&] {
        CancellationSource source;
        if (grown) grow(source.token());
        std::vector<std::unique_ptr<AnyCallback>> callbacks;
        while (callbacks.size() < count) {
          callbacks.push_back(std::make_unique<AnyCallback>(source.token(), [&ran] { ++ran; }));
        }
        source.cancel();
      });
      CHECK(ran == static_cast<int>(count));
      CHECK(after == before);
    }
  }
}

TEST_CASE("Nodes that only what is below holds up go with the last of that") {
  const auto before = in_use_after([] { CancellationSource{}; });
  // Of a source that goes without cancelling.
  const auto token_of_child = [](const CancellationToken& parent) {
    CancellationSource child(parent);
    child.disarm();
    return child.token();
  };
  SECTION("a child, or two") {
    for (const int children : {1, 2}) {
      CHECK(before == in_use_after([&] {
              std::vector<CancellationToken> below;
              const CancellationToken parent = token_of_child(CancellationToken());
              for (int i = 0; i < children; ++i) {
                below.push_back(token_of_child(token_of_child(parent)));
              }
            }));
    }
  }
  SECTION("a callback") {
    CHECK(before == in_use_after([] {
            auto parent = std::make_unique<CancellationSource>();
            const AnyCallback callback(parent->token(), [] {});
            parent->disarm();
            parent.reset();
          }));
  }
  SECTION("a merge: of one, of two, of all, of merges") {
    for (const std::size_t holds :
         {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{5}}) {
      CHECK(before == in_use_after([&] {
              const CancellationSource top;
              std::vector<CancellationToken> parents;
              for (int i = 0; i < 5; ++i) parents.push_back(token_of_child(top.token()));
              const std::vector<CancellationToken> held(
                  parents.begin(), parents.end() - static_cast<std::ptrdiff_t>(holds));
              CancellationSource merged = CancellationSource::any_of(parents);
              parents.clear();
              const CancellationSource again =
                  CancellationSource::any_of({merged.token(), top.token()});
              merged.disarm();
            }));
    }
  }
}

TEST_CASE("Marking stops at a lock that is held, spares what is above it, and can be done again") {
  namespace detail = lastcall::detail;
  const CancellationSource top;
  const CancellationSource middle(top.token());
  const CancellationSource bottom(middle.token());
  const CancellationSource beside(top.token());
  auto* const root = detail::TreeAccess::peek(top.token());
  auto* const held = detail::TreeAccess::peek(bottom.token());
  const Cause cause = Cause::cancelled("enough");
  const auto* const record = detail::CauseAccess::peek(cause);
  const auto references = record->refs.load();
  {
    detail::CancelWork work;
    detail::Marking marking(record, work);
    const std::uint32_t state = detail::lock_bit(held->state);
    CHECK_FALSE(marking.try_mark(root, Clock::now() + 2ms));
    CHECK(beside.is_cancelled());
    CHECK_FALSE(top.is_cancelled());
    CHECK_FALSE(middle.is_cancelled());
    CHECK(root->cause == nullptr);
    detail::unlock_bit(held->state, state);
    CHECK(marking.try_mark(root, Clock::now() + 1h));
    CHECK(bottom.is_cancelled());
    CHECK(middle.token().cause().message() == "enough");
  }
  // One for each node, also for the two that were marked twice.
  CHECK(record->refs.load() == references + 4);
}

TEST_CASE("A node that has grown shards goes with its last handle or link, in whatever order") {
  support::Random random(21);
  for (int round = 0; round < 60; ++round) {
    CancellationSource top;
    auto parent = std::make_unique<CancellationSource>(top.token());
    if (round % 2 == 0) grow(parent->token());
    std::vector<std::unique_ptr<CancellationSource>> children(12);
    std::vector<std::unique_ptr<AnyCallback>> callbacks(12);
    int runs = 0;
    on_new_threads(12, [&](int i) {
      const auto at = static_cast<std::size_t>(i);
      children[at] = std::make_unique<CancellationSource>(parent->token());
      callbacks[at] = std::make_unique<AnyCallback>(parent->token(), [&] { ++runs; });
      if (i == 5) grow(parent->token());
    });
    parent->disarm();
    const std::size_t leaves = random.below(12);
    for (std::size_t i = 0; i < 12; ++i) {
      if (i == leaves) parent.reset();
      children[(i * 5) % 12].reset();
      callbacks[(i * 7) % 12].reset();
      if (i == 10 && random.one_in(2)) top.cancel();
    }
    parent.reset();
    CHECK(runs <= 1);
  }
}

TEST_CASE("Contention makes a node grow shards, and nothing is lost on the way") {
  CancellationSource parent;
  std::atomic<int> kept_runs{0};
  std::atomic<int> stray_runs{0};
  std::vector<std::unique_ptr<AnyCallback>> kept[4];
  std::vector<CancellationSource> children[4];
  {
    support::StartingLine line(4);
    support::Threads threads;
    for (std::size_t thread = 0; thread < 4; ++thread) {
      threads.start([&, thread] {
        const CancellationToken token = parent.token();
        line.ready_steady_go();
        for (int i = 0; i < 20'000; ++i) {
          const AnyCallback gone(token, [&] { ++stray_runs; });
          CancellationSource child(token);
          if (i % 1000 == 0) {
            kept[thread].push_back(std::make_unique<AnyCallback>(token, [&] { ++kept_runs; }));
            children[thread].push_back(std::move(child));
          }
        }
      });
    }
  }
  CHECK(parent.cancel());
  CHECK(stray_runs == 0);
  CHECK(kept_runs == 80);
  for (const auto& some : children) {
    for (const CancellationSource& child : some) CHECK(child.is_cancelled());
  }
}

TEST_CASE("A parent is cancelled while its children come and go and it grows shards") {
  constexpr int rounds = support::under_sanitizer ? 60 : 400;
  int late = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource parent;
    std::atomic<int> wrong{0};
    support::StartingLine line(3);
    support::Threads threads;
    for (int i = 0; i < 2; ++i) {
      threads.start([&, i] {
        line.ready_steady_go();
        for (int turn = 0; turn < 30; ++turn) {
          if (turn == 10 && i == 0) grow(parent.token());
          const bool before = parent.is_cancelled();
          const CancellationSource child(parent.token());
          int runs = 0;
          {
            const CancellationCallback callback(parent.token(), [&] { ++runs; });
            if (before && (runs != 1 || !child.is_cancelled())) ++wrong;
          }
          if (runs > 1) ++wrong;
          if (parent.is_cancelled() && !child.is_cancelled()) ++wrong;
        }
      });
    }
    line.ready_steady_go();
    parent.cancel();
    threads.join();
    late += wrong;
  }
  CHECK(late == 0);
}

// Found by tests/model/cancellation.pml: the one that had looked whether it was the last, and wasn't,
// gave the last handle up all the same when the other one's went in between. Then neither let the node go.
TEST_CASE("Of two who give up the last two handles of a node at the same time one lets it go") {
  namespace detail = lastcall::detail;
  constexpr int rounds = support::under_sanitizer ? 2'000 : 30'000;
  const CancellationSource parent;
  detail::Node* const above = detail::TreeAccess::node_of(parent);
  const auto spin_until = [](const auto& condition) {
    for (int turn = 0; !condition(); ++turn) {
      if (turn > 2'000) std::this_thread::yield();
    }
  };
  std::atomic<detail::Node*> released{nullptr};
  std::atomic<int> round{0};
  std::atomic<int> done{0};
  support::Threads threads;
  threads.start([&] {
    for (int mine = 1; mine <= rounds; ++mine) {
      spin_until([&] { return round.load() == mine; });
      detail::release(released.load());
      done.store(mine);
    }
  });
  int left = 0;
  std::atomic<int> pause{0};
  for (int at = 1; at <= rounds; ++at) {
    detail::Node* const child = detail::make_child(above);
    const std::uint32_t state = detail::lock_bit(child->state);
    released.store(child);
    round.store(at);
    // The other thread has seen its handle alone, and waits for the child's lock. Now there are two.
    spin_until([&] { return (above->state.load() & detail::locked_bit) != 0; });
    detail::retain(child);
    detail::unlock_bit(child->state, state);
    for (pause.store(at % 128); pause.load() > 0; --pause) {
    }
    detail::release(child);
    spin_until([&] { return done.load() == at; });
    if ((above->state.load() & detail::linked_flag) == 0) continue;
    ++left;
    detail::retain(child);  // so that it goes all the same
    detail::release(child);
  }
  CHECK(left == 0);
}
