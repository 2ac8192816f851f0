// The nodes of the cancellation tree and what hangs on them. The invariants (I1 ...) are numbered at
// the head of cancellation.hpp.
//
// Memory orders here and in cancel_links.hpp, cancel_walk.hpp and cancel_tree.hpp. Where nothing else is said,
// relaxed means one of these: the caller has the lock of the lane whose word it is (lock_bit() acquires,
// unlock_bit() releases); the bit or word asked for is constant since before the node was published (shard_flag,
// timed_flag, joined_flag, unpooled_flag, the owner, the deadline), and whoever has a handle got it by something
// that synchronizes; or nobody else knows the node yet, or any more. Every other order has its reason beside it.
#pragma once

#include <lastcall/cause.hpp>
#include <lastcall/detail/node_pool.hpp>
#include <lastcall/detail/owned.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/spin_bit.hpp>
#include <lastcall/detail/timer_service.hpp>

#include <atomic>
#include <cstdint>
#include <optional>

namespace lastcall::detail {

// What a link is. Kept in the low bits of Link::where.
enum class LinkKind : std::uintptr_t { child = 0, join = 1, callback = 2 };

// A member of a lane: a child, an any_of's hold on one of its parents, a callback or a waiter.
// Lanes are circular; callbacks, waiters and wakers stand in front, children behind, and behind those what
// has been called already.
struct Link {
  Link* prev = nullptr;
  Link* next = nullptr;
  std::uintptr_t where = 0;  // the lane and the kind; 0: not linked. Constant while linked
};

// A list with its lock. Every node has one inside; a contended one grows more.
struct alignas(8) Lane {
  // The lock bit and flags. All but the lock bit change only under the lock (I1).
  Word state{0};
  // In a node's own lane: its handles, that is tokens, its source, and cancellers at work (I5).
  Word handles{0};
  Link* head = nullptr;
};

// In a node's own lane: the word of I2. The lowest bit, so that is_cancelled() has no shift behind its load.
inline constexpr std::uint32_t cancelled_flag = 1U;
inline constexpr std::uint32_t linked_flag = 1U << 2;  // the lane is not empty
inline constexpr std::uint32_t orphan_flag = 1U << 3;  // who empties the lane lets the node go (I6)
inline constexpr std::uint32_t shard_flag = 1U << 4;   // the lane is one of an Extension's
inline constexpr std::uint32_t sharded_flag = 1U << 5;    // the node has shards
inline constexpr std::uint32_t timed_flag = 1U << 6;      // the node is a TimedNode
inline constexpr std::uint32_t joined_flag = 1U << 7;     // the node is a JoinNode
inline constexpr std::uint32_t dying_flag = 1U << 8;      // a JoinNode on its way out
inline constexpr std::uint32_t sourced_flag = 1U << 9;    // its CancellationSource is still there
inline constexpr std::uint32_t unpooled_flag = 1U << 10;  // the node is from operator new
inline constexpr unsigned strikes_shift = 16;             // above: how often the lane was contended
inline constexpr std::uint32_t strikes_to_grow = 8;

struct Node;

// Two lines apart: processors fetch lines in pairs.
struct alignas(128) ShardLane : Lane {
  Node* owner = nullptr;
};

// What only some nodes need: made on first use, freed with the node.
struct Extension {
  static constexpr unsigned shard_count = 8;
  Owned<ShardLane[]> shards;  // made once, before sharded_flag is set
  Owned<PollableFlag> flag;   // of CancellationToken::fd()
  Node* next_work = nullptr;  // see Node::extra
};

struct Node : Link, Lane {
  const CauseRecord* cause = nullptr;  // written under the lock before cancelled_flag is set (I2)
  // 0, an Extension*, or the next node of a canceller's worklist with the low bit set. Changes under
  // the node's own lock; read without it only after sharded_flag was seen, when it is constant.
  std::atomic<std::uintptr_t> extra{0};
};
static_assert(sizeof(void*) != 8 || sizeof(Node) == 56, "see cancellation.hpp");

// A timer that knows its node.
struct NodeTimer : TimerLink {
  Node* node = nullptr;
};

struct TimedNode : Node {
  Clock::time_point deadline{};
  NodeTimer timer;  // may never be armed: born cancelled, or never due; then `service` is null
};

struct JoinNode;

struct JoinLink : Link {
  JoinNode* node = nullptr;
  Node* orphan = nullptr;  // while dying: a parent that has to be let go
  JoinLink* next_dead = nullptr;
};

struct JoinNode : Node {
  std::optional<Clock::time_point> deadline;  // the nearest of its parents'
  const TimedNode* timed = nullptr;           // whose it is; null once one of them was not linked
  mutable std::atomic<bool> barren{false};    // see can_be_cancelled()
  JoinLink* entered = nullptr;  // by which link a canceller came down; guarded by the node's lock
  std::size_t unsettled = 0;    // while dying: orphans still to be let go
  std::size_t count = 0;
  Owned<JoinLink[]> links;
};

// A callback, or (invoke == nullptr) a blocked waiter, or (begins as `asleep`) a waker: what is called of it
// is the library's own, doesn't block, and is called where waiters are woken, under the lane's lock.
struct CallbackLink : Link {
  static constexpr std::uint32_t pending = 0;
  static constexpr std::uint32_t running = 1;
  static constexpr std::uint32_t awaited =
      2;  // running, and its destructor waits on another thread
  static constexpr std::uint32_t finished = 3;  // of a waiter: woken
  static constexpr std::uint32_t asleep = 4;    // of a waker: pending

  Word stage{pending};
  void (*invoke)(CallbackLink*) noexcept = nullptr;
  ThreadMark runner_thread = 0;             // set under the lane's lock before `running`
  CallbackLink** runner_current = nullptr;  // on the runner's stack; touched by that thread alone
};

// ---- small questions ------------------------------------------------------------------------------

inline Lane* lane_of(const Link* link) noexcept {
  return reinterpret_cast<Lane*>(link->where & ~std::uintptr_t{3});
}
inline LinkKind kind_of(const Link* link) noexcept {
  return static_cast<LinkKind>(link->where & std::uintptr_t{3});
}
inline Node* owner_of(Lane* lane) noexcept {
  const std::uint32_t state = lane->state.load(std::memory_order_relaxed);
  // By reference: a pointer cast would test for null.
  return (state & shard_flag) != 0 ? static_cast<ShardLane&>(*lane).owner
                                   : &static_cast<Node&>(*lane);
}
inline Extension* extension_of(const Node* node) noexcept {
  // acquire: without the lock too, and then what set_extension() released is whole.
  const std::uintptr_t extra = node->extra.load(std::memory_order_acquire);
  return (extra & 1U) != 0 ? nullptr : reinterpret_cast<Extension*>(extra);
}
/// The one load of I2.
inline bool is_cancelled(const Node* node) noexcept {
  // acquire: the cause, and all that the canceller did before. Pairs with the release in unlock_node().
  return (node->state.load(std::memory_order_acquire) & cancelled_flag) != 0;
}

/// The lane after `lane` of the same node, or null. Under the node's lock, or with sharded_flag seen.
inline Lane* next_lane(Node* node, Lane* lane) noexcept {
  const std::uint32_t state = node->state.load(std::memory_order_relaxed);
  if ((state & sharded_flag) == 0) return nullptr;
  ShardLane* const shards = extension_of(node)->shards.get();
  if (lane == node) return shards;
  ShardLane* const next = static_cast<ShardLane*>(lane) + 1;
  return next == shards + Extension::shard_count ? nullptr : next;
}

/// The other lanes of a node whose own is locked.
inline void lock_shards(Node* node) noexcept {
  for (Lane* lane = next_lane(node, node); lane != nullptr; lane = next_lane(node, lane)) {
    lock_bit(lane->state);
  }
}

inline std::uint32_t lock_node(Node* node) noexcept {
  const std::uint32_t state = lock_bit(node->state);
  lock_shards(node);
  return state;
}

/// The same, but gives up at `deadline`: false, and nothing is locked.
[[gnu::noinline]] inline bool lock_node_until(Node* node, Clock::time_point deadline,
                                              std::uint32_t& state) noexcept {
  if (!lock_bit_until(node->state, deadline, state)) return false;
  for (Lane* lane = next_lane(node, node); lane != nullptr; lane = next_lane(node, lane)) {
    std::uint32_t unused = 0;
    if (lock_bit_until(lane->state, deadline, unused)) continue;
    for (Lane* taken = next_lane(node, node); taken != lane; taken = next_lane(node, taken)) {
      unlock_bit(taken->state, taken->state.load(std::memory_order_relaxed));
    }
    unlock_bit(node->state, state);
    return false;
  }
  return true;
}

/// Unlocks all lanes; each gets the flags of `also` on top of its own. The node's own lane goes last, and
/// each unlocking is a release: who finds it unlocked, with acquire, finds every lane unlocked, and with
/// `cancelled_flag` the cause and the whole subtree (I2).
inline void unlock_node(Node* node, std::uint32_t also = 0) noexcept {
  for (Lane* lane = next_lane(node, node); lane != nullptr; lane = next_lane(node, lane)) {
    unlock_bit(lane->state, lane->state.load(std::memory_order_relaxed) | also);
  }
  unlock_bit(node->state, node->state.load(std::memory_order_relaxed) | also);
}

inline bool any_linked(Node* node) noexcept {
  for (Lane* lane = node; lane != nullptr; lane = next_lane(node, lane)) {
    if ((lane->state.load(std::memory_order_relaxed) & linked_flag) != 0) return true;
  }
  return false;
}

// Where a node comes from that is nothing but a Node.
using NodePool = BlockPool<sizeof(Node)>;

// A new node that nobody knows yet, with one handle.
template <class Made>
[[gnu::always_inline]] inline Made* begin_node(Made* node, std::uint32_t flags) noexcept {
  node->handles.store(1, std::memory_order_relaxed);
  node->state.store(flags, std::memory_order_relaxed);
  return node;
}

// When the pool has none; out of line, so that the usual way is inlined.
[[gnu::cold, gnu::noinline]] inline Node* make_unpooled(std::uint32_t flags) {
  return begin_node(new Node, flags | unpooled_flag);
}

/// A Node with one handle and these flags.
inline Node* make_plain(std::uint32_t flags) {
  void* const room = NodePool::take();
  return room != nullptr ? begin_node(::new (room) Node, flags) : make_unpooled(flags);
}

/// The same of a TimedNode. Not from a pool: many at once, over and over, cost more than with malloc, which
/// keeps their pages.
inline TimedNode* make_timed(std::uint32_t flags, Clock::time_point deadline) {
  TimedNode* const node = begin_node(new TimedNode, flags | timed_flag);
  node->deadline = deadline;
  return node;
}

// Out of line: a compiler that sees what kind of node was made warns of the casts to the other kinds.
[[gnu::noinline]] inline void destroy_special(Node* node) noexcept {
  delete extension_of(node);
  const std::uint32_t state = node->state.load(std::memory_order_relaxed);
  if ((state & timed_flag) != 0) {
    delete static_cast<TimedNode*>(node);
  } else if ((state & joined_flag) != 0) {
    delete static_cast<JoinNode*>(node);
  } else if ((state & unpooled_flag) != 0) {
    delete node;
  } else {
    NodePool::give(node);
  }
}

inline void destroy_node(Node* node) noexcept {
  release(node->cause);
  const std::uint32_t state = node->state.load(std::memory_order_relaxed);
  if ((state & (timed_flag | joined_flag | unpooled_flag)) != 0 ||
      node->extra.load(std::memory_order_relaxed) != 0) {
    destroy_special(node);
  } else {
    NodePool::give(node);
  }
}

/// The nearest deadline of the node and its ancestors. Walks up: what it reads is constant while the
/// node is alive (I4).
inline std::optional<Clock::time_point> nearest_deadline(const Node* node) noexcept {
  for (;;) {
    const std::uint32_t state = node->state.load(std::memory_order_relaxed);
    // A TimedNode's own is nearer than its ancestors', or it would not be one.
    if ((state & timed_flag) != 0) return static_cast<const TimedNode*>(node)->deadline;
    if ((state & joined_flag) != 0) return static_cast<const JoinNode*>(node)->deadline;
    if (node->where == 0) return std::nullopt;
    node = owner_of(lane_of(node));
  }
}

/// The node whose deadline that is; null if it has none, or where it may be gone. Of a node that was not cancelled
/// a moment ago: only then all of a JoinNode's parents are linked, and so are alive.
inline const TimedNode* nearest_timed(const Node* node) noexcept {
  for (;;) {
    const std::uint32_t state = node->state.load(std::memory_order_relaxed);
    if ((state & timed_flag) != 0) return static_cast<const TimedNode*>(node);
    if ((state & joined_flag) != 0) return static_cast<const JoinNode*>(node)->timed;
    if (node->where == 0) return nullptr;
    node = owner_of(lane_of(node));
  }
}

// Whether the node, or what is above it up to the first any_of, can be cancelled otherwise than by way of that
// any_of's parents. If not, `join` is that any_of; null if there is none, or it is barren.
inline bool can_be_cancelled_below_join(const Node* node, const JoinNode*& join) noexcept {
  join = nullptr;
  for (;;) {
    // acquire: as in is_cancelled(), for who then asks for the cause.
    const std::uint32_t state = node->state.load(std::memory_order_acquire);
    if ((state & (cancelled_flag | sourced_flag)) != 0) return true;
    if ((state & timed_flag) != 0 &&
        static_cast<const TimedNode*>(node)->deadline != Clock::time_point::max()) {
      return true;
    }
    if ((state & joined_flag) != 0) {
      const auto* const found = static_cast<const JoinNode*>(node);
      // relaxed: nothing comes with it, and what is not seen is found out again.
      if (!found->barren.load(std::memory_order_relaxed)) join = found;
      return false;
    }
    if (node->where == 0) return false;
    node = owner_of(lane_of(node));
  }
}

/// Whether anything is left that could ever cancel the node: itself cancelled, a source or a deadline,
/// of it or above it.
///
/// Through any_of the way up is a graph, which is searched depth first, with bounded memory and no lock. What can
/// never be cancelled stays so: an any_of of which that has been found out is marked as barren, and not entered
/// again. When there is no room for the whole path its beginning is forgotten, and gone again later: by then at
/// least one more is barren. The last parent of an any_of needs no way back, so a line of them takes no room.
inline bool can_be_cancelled(const Node* node) noexcept {
  struct Step {
    const JoinNode* entered;
    const JoinNode* join;  // where a line of last parents has led to from there
    std::size_t next;
  };
  constexpr std::size_t room = 32;
  const JoinNode* first = nullptr;
  if (can_be_cancelled_below_join(node, first)) return true;
  bool forgot = first != nullptr;
  // relaxed: as above; this thread sees at least what it has stored.
  while (forgot && !first->barren.load(std::memory_order_relaxed)) {
    Step steps[room];
    std::size_t at = 0;
    std::size_t depth = 1;
    steps[0] = Step{first, first, 0};
    forgot = false;
    while (depth > 0) {
      Step& step = steps[at];
      if (step.next == step.join->count) {
        // Nothing below the root of this search that was entered is left: marked for who comes by another way.
        step.entered->barren.store(true, std::memory_order_relaxed);
        step.join->barren.store(true, std::memory_order_relaxed);
        at = (at + room - 1) % room;
        --depth;
        continue;
      }
      const JoinNode* above = nullptr;
      const JoinLink& link = step.join->links[step.next++];
      if (can_be_cancelled_below_join(owner_of(lane_of(&link)), above)) return true;
      if (above == nullptr) continue;
      if (step.next == step.join->count) {
        step.join = above;
        step.next = 0;
        continue;
      }
      at = (at + 1) % room;
      steps[at] = Step{above, above, 0};
      if (depth < room) {
        ++depth;
      } else {
        forgot = true;
      }
    }
  }
  return false;
}

}  // namespace lastcall::detail
