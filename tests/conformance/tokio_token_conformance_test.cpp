// tokio-util's CancellationToken is a tree too. These are the properties that its tests and the loom
// models of its tree_node check: who is reached when handles go in any order, that nothing travels up
// or sideways, and that dropping, making and cancelling may meet at any point.
#include <lastcall/cancellation.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using namespace std::chrono_literals;

namespace {

using AnyCallback = CancellationCallback<std::function<void()>>;

std::string message_of(const CancellationToken& token) { return token.cause().message(); }

/// Counts how often it was woken, as tokio's tests do with their wakers.
struct Woken {
  explicit Woken(const CancellationToken& token) : callback(token, [this] { ++times; }) {}
  int times = 0;
  AnyCallback callback;
};

/// A family by who is under whom: parents[i] of node i are nodes before i; none: a root.
using Family = std::vector<std::vector<std::size_t>>;

std::vector<Family> small_families() {
  std::vector<Family> families;
  for (std::size_t of_1 = 0; of_1 < 2; ++of_1) {
    for (std::size_t of_2 = 0; of_2 < 4; ++of_2) {
      for (std::size_t of_3 = 0; of_3 < 8; ++of_3) {
        // The bits of a number say who the parents are; several: an any_of.
        const auto parents = [](std::size_t bits) {
          std::vector<std::size_t> out;
          for (std::size_t i = 0; i < 3; ++i) {
            if ((bits >> i & 1U) != 0) out.push_back(i);
          }
          return out;
        };
        families.push_back({{}, parents(of_1), parents(of_2), parents(of_3)});
      }
    }
  }
  return families;
}

/// The contract in a few lines: who is cancelled after a cancel of `node`.
void model_cancel(const Family& family, std::vector<bool>& cancelled, std::size_t node) {
  if (cancelled[node]) return;
  cancelled[node] = true;
  for (std::size_t other = node + 1; other < family.size(); ++other) {
    for (const std::size_t parent : family[other]) {
      if (parent == node) model_cancel(family, cancelled, other);
    }
  }
}

CancellationSource make(const Family& family, std::size_t node,
                        const std::vector<std::unique_ptr<CancellationSource>>& made) {
  if (family[node].empty()) return CancellationSource();
  if (family[node].size() == 1) return CancellationSource(made[family[node][0]]->token());
  std::vector<CancellationToken> parents;
  for (const std::size_t parent : family[node]) parents.push_back(made[parent]->token());
  return CancellationSource::any_of(parents);
}

}  // namespace

TEST_CASE("A cancelled token wakes those who wait, and those who come later at once") {
  CancellationSource source;
  const CancellationToken token = source.token();
  std::atomic<bool> woken{false};
  support::Threads threads;
  threads.start([&, mine = token] {
    mine.wait();
    woken = true;
  });
  CHECK_FALSE(woken);
  source.cancel();
  threads.join();
  CHECK(woken);
  CHECK(token.wait_for(1h));
  const Woken late(token);
  CHECK(late.times == 1);
}

TEST_CASE("A child is cancelled through its parent, the parent not through its child") {
  CancellationSource parent;
  CancellationSource child(parent.token());
  const Woken on_parent(parent.token());
  const Woken on_child(child.token());
  SECTION("the parent first") {
    parent.cancel();
    CHECK(on_parent.times == 1);
    CHECK(on_child.times == 1);
    child.cancel();
  }
  SECTION("the child first") {
    child.cancel();
    CHECK(on_parent.times == 0);
    CHECK(on_child.times == 1);
    CHECK_FALSE(parent.is_cancelled());
    parent.cancel();
  }
  CHECK(on_parent.times == 1);
  CHECK(on_child.times == 1);
}

TEST_CASE("A grandchild is cancelled through its grandparent when the child between was dropped") {
  CancellationSource grandparent;
  auto child = std::make_unique<CancellationSource>(grandparent.token());
  const CancellationSource grandchild(child->token());
  const Woken woken(grandchild.token());
  child->disarm();
  child.reset();
  CHECK(woken.times == 0);
  grandparent.cancel(Cause::cancelled("from two levels up"));
  CHECK(woken.times == 1);
  CHECK(message_of(grandchild.token()) == "from two levels up");
}

TEST_CASE("A cancelled child that was dropped before its parent is cancelled is no trouble") {
  CancellationSource parent;
  {
    CancellationSource child(parent.token());
    const Woken woken(child.token());
    child.cancel();
    CHECK(woken.times == 1);
  }
  parent.cancel();
  CHECK(parent.is_cancelled());
}

TEST_CASE("A child made after its parent was cancelled is cancelled") {
  CancellationSource parent;
  parent.cancel();
  const CancellationSource child(parent.token());
  const Woken woken(child.token());
  CHECK(woken.times == 1);
}

TEST_CASE("Several children are dropped in any order, and those that are left are reached") {
  std::array<std::size_t, 3> order{0, 1, 2};
  do {
    for (std::size_t dropped = 0; dropped <= 3; ++dropped) {
      CancellationSource parent;
      std::array<std::unique_ptr<CancellationSource>, 3> children;
      for (auto& child : children) {
        child = std::make_unique<CancellationSource>(parent.token());
        child->disarm();
      }
      for (std::size_t i = 0; i < dropped; ++i) children[order[i]].reset();
      CHECK_FALSE(parent.is_cancelled());
      parent.cancel();
      for (std::size_t i = dropped; i < 3; ++i) CHECK(children[order[i]]->is_cancelled());
      for (std::size_t i = dropped; i < 3; ++i) children[order[i]].reset();
    }
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST_CASE("A cancel reaches all descendants and nobody else, each once") {
  CancellationSource root;
  CancellationSource target(root.token());
  const CancellationSource sibling(root.token());
  std::vector<CancellationSource> below;
  below.emplace_back(target.token());
  below.emplace_back(target.token());
  for (std::size_t i = 0; i < 2; ++i) {
    below.emplace_back(below[i].token());
    below.emplace_back(below[i].token());
  }
  const CancellationSource nephew(sibling.token());
  std::vector<std::unique_ptr<Woken>> reached;
  for (const CancellationSource& one : below)
    reached.push_back(std::make_unique<Woken>(one.token()));
  std::vector<std::unique_ptr<Woken>> spared;
  for (const CancellationToken& one : {root.token(), sibling.token(), nephew.token()}) {
    spared.push_back(std::make_unique<Woken>(one));
  }
  target.cancel();
  for (const auto& one : reached) CHECK(one->times == 1);
  for (const auto& one : spared) CHECK(one->times == 0);
  root.cancel();
  for (const auto& one : reached) CHECK(one->times == 1);
  for (const auto& one : spared) CHECK(one->times == 1);
}

TEST_CASE("A parent that is dropped before its children leaves them to themselves") {
  auto parent = std::make_unique<CancellationSource>();
  CancellationSource first(parent->token());
  CancellationSource second(parent->token());
  parent->disarm();
  parent.reset();
  CHECK_FALSE(first.is_cancelled());
  CHECK_FALSE(second.is_cancelled());
  first.cancel();
  CHECK(first.is_cancelled());
  CHECK_FALSE(second.is_cancelled());
  const CancellationSource grandchild(second.token());
  second.cancel();
  CHECK(grandchild.is_cancelled());
}

TEST_CASE("A drop guard is what every source is, and disarm() is its disarm") {
  auto guard = std::make_unique<CancellationSource>();
  const CancellationToken token = guard->token();
  SECTION("armed") {
    guard.reset();
    CHECK(token.is_cancelled());
  }
  SECTION("disarmed") {
    guard->disarm();
    guard.reset();
    CHECK_FALSE(token.is_cancelled());
  }
  SECTION("cancelled by hand") {
    guard->cancel(Cause::cancelled("by hand"));
    guard.reset();
    CHECK(message_of(token) == "by hand");
  }
}

TEST_CASE("A callback that holds the last token of its own node is no cycle") {
  const auto alive = std::make_shared<int>(0);
  {
    auto source = std::make_unique<CancellationSource>();
    std::unique_ptr<AnyCallback> callback;
    callback = std::make_unique<AnyCallback>(source->token(), [held = source->token(), alive] {
      static_cast<void>(held.is_cancelled());
    });
    source->disarm();
    source.reset();
    CHECK(alive.use_count() > 1);
    callback.reset();
    CHECK(alive.use_count() == 1);
  }
  {
    CancellationSource source;
    std::unique_ptr<AnyCallback> callback;
    callback = std::make_unique<AnyCallback>(source.token(), [held = source.token(), &callback] {
      const CancellationToken copy = held;
      callback.reset();  // and with it `held`, inside the wake-up
      static_cast<void>(copy.is_cancelled());
    });
    source.cancel();
    CHECK(callback == nullptr);
  }
}

TEST_CASE("A callback that holds its own source is cancelled and let go inside itself") {
  auto source = std::make_unique<CancellationSource>();
  CancellationSource* const raw = source.get();
  std::unique_ptr<AnyCallback> callback;
  const auto shared = std::make_shared<std::unique_ptr<CancellationSource>>(std::move(source));
  callback = std::make_unique<AnyCallback>(raw->token(), [shared] { shared->reset(); });
  raw->cancel();
  CHECK(*shared == nullptr);
}

TEST_CASE("In every small family, dropping and cancelling in every order reaches whom it should") {
  // Every family of four nodes with any_ofs, every order in which their sources go, each armed or
  // not. Tokens are kept, so every node's state can be compared with the contract's words.
  int wrong = 0;
  int checked = 0;
  for (const Family& family : small_families()) {
    std::array<std::size_t, 4> order{0, 1, 2, 3};
    do {
      for (unsigned armed = 0; armed < 16; ++armed) {
        std::vector<std::unique_ptr<CancellationSource>> sources(4);
        std::vector<CancellationToken> tokens;
        std::vector<std::unique_ptr<Woken>> woken;
        std::vector<bool> expected(4);
        for (std::size_t node = 0; node < 4; ++node) {
          sources[node] = std::make_unique<CancellationSource>(make(family, node, sources));
          tokens.push_back(sources[node]->token());
          woken.push_back(std::make_unique<Woken>(tokens.back()));
          if ((armed >> node & 1U) == 0) sources[node]->disarm();
        }
        for (const std::size_t node : order) {
          if ((armed >> node & 1U) != 0) model_cancel(family, expected, node);
          sources[node].reset();
          for (std::size_t other = 0; other < 4; ++other) {
            ++checked;
            if (tokens[other].is_cancelled() != expected[other]) ++wrong;
            if (woken[other]->times != (expected[other] ? 1 : 0)) ++wrong;
          }
        }
        for (std::size_t node = 0; node < 4; ++node) {
          // Now that no source is left, only the cancelled ones could ever be cancelled.
          if (tokens[node].can_be_cancelled() != expected[node]) ++wrong;
        }
      }
    } while (std::next_permutation(order.begin(), order.end()));
  }
  CHECK(checked == 4 * 4 * 16 * 24 * 64);
  CHECK(wrong == 0);
}

TEST_CASE("In every small family, nodes whose every handle is gone still pass a cancel on") {
  // No tokens are kept but the last node's: what is between is reached through links alone.
  int wrong = 0;
  for (const Family& family : small_families()) {
    for (std::size_t canceller = 0; canceller < 4; ++canceller) {
      for (unsigned dropped = 0; dropped < 8; ++dropped) {
        if ((dropped >> canceller & 1U) != 0) continue;
        std::vector<std::unique_ptr<CancellationSource>> sources(4);
        for (std::size_t node = 0; node < 4; ++node) {
          sources[node] = std::make_unique<CancellationSource>(make(family, node, sources));
          sources[node]->disarm();
        }
        for (std::size_t node = 0; node < 3; ++node) {
          if ((dropped >> node & 1U) != 0) sources[node].reset();
        }
        std::vector<bool> expected(4);
        model_cancel(family, expected, canceller);
        sources[canceller]->cancel();
        for (std::size_t node = 0; node < 4; ++node) {
          if (sources[node] && sources[node]->is_cancelled() != expected[node]) ++wrong;
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("A parent and its child are cancelled at once: both end cancelled, each callback once") {
  constexpr int rounds = support::under_sanitizer ? 150 : 1500;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource parent;
    CancellationSource child(parent.token());
    std::atomic<int> on_parent{0};
    std::atomic<int> on_child{0};
    const CancellationCallback first(parent.token(), [&] { ++on_parent; });
    const CancellationCallback second(child.token(), [&] { ++on_child; });
    support::StartingLine line(2);
    support::Threads threads;
    threads.start([&] {
      line.ready_steady_go();
      parent.cancel();
    });
    line.ready_steady_go();
    child.cancel();
    threads.join();
    if (on_parent != 1 || on_child != 1) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("A child is dropped while its parent is cancelled, and the other way round") {
  constexpr int rounds = support::under_sanitizer ? 300 : 3000;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    auto parent = std::make_unique<CancellationSource>();
    auto child = std::make_unique<CancellationSource>(parent->token());
    auto grandchild = std::make_unique<CancellationSource>(child->token());
    const CancellationToken seen = grandchild->token();
    child->disarm();
    grandchild->disarm();
    support::StartingLine line(2);
    support::Threads threads;
    const bool parent_goes = round % 2 == 0;
    threads.start([&] {
      line.ready_steady_go();
      child.reset();
      if (round % 3 == 0) grandchild.reset();
    });
    line.ready_steady_go();
    if (parent_goes) {
      parent.reset();
    } else {
      parent->cancel();
    }
    threads.join();
    if (!seen.is_cancelled()) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("Siblings are made, dropped and cancelled at once under one parent") {
  constexpr int rounds = support::under_sanitizer ? 40 : 300;
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    CancellationSource parent;
    std::atomic<int> astray{0};
    support::StartingLine line(3);
    support::Threads threads;
    for (int thread = 0; thread < 3; ++thread) {
      threads.start([&, thread] {
        line.ready_steady_go();
        for (int i = 0; i < 40; ++i) {
          auto child = std::make_unique<CancellationSource>(parent.token());
          const CancellationSource grandchild(child->token());
          if ((i + thread) % 3 == 0) child->disarm();
          if ((i + thread) % 3 == 1 && (!child->cancel() || !grandchild.is_cancelled())) ++astray;
          const bool armed = (i + thread) % 3 != 0;
          child.reset();
          if (grandchild.is_cancelled() != armed) ++astray;
        }
      });
    }
    threads.join();
    if (astray != 0 || parent.is_cancelled()) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("A long line of descent loses its middle handles from either end, or from within") {
  for (int way = 0; way < 3; ++way) {
    CancellationSource top;
    std::vector<CancellationSource> line;
    line.emplace_back(top.token());
    for (int i = 0; i < 200; ++i) line.emplace_back(line.back().token());
    for (CancellationSource& one : line) one.disarm();
    const CancellationSource bottom(line.back().token());
    if (way == 0) {
      while (!line.empty()) line.pop_back();
    } else if (way == 1) {
      for (CancellationSource& one : line) one = CancellationSource();
    } else {
      for (std::size_t step = 0; step < line.size(); ++step) {
        line[(step * 77) % line.size()] = CancellationSource();
      }
    }
    CHECK_FALSE(bottom.is_cancelled());
    top.cancel(Cause::cancelled("down the line"));
    CHECK(message_of(bottom.token()) == "down the line");
  }
}
