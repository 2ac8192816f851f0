// The cancellation tree's links: hanging a child, a join or a callback on a node, taking it off again, and
// letting go of a node whose last handle has gone. The invariants (I1 ...) are numbered at the head of
// cancellation.hpp.
#pragma once

#include <lastcall/detail/cancel_node.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace lastcall::detail {

// ---- linking --------------------------------------------------------------------------------------

inline void insert_link(Lane* lane, Link* link, LinkKind kind) noexcept {
  link->where = reinterpret_cast<std::uintptr_t>(lane) | static_cast<std::uintptr_t>(kind);
  Link* const head = lane->head;
  if (head == nullptr) {
    link->prev = link->next = link;
    lane->head = link;
    return;
  }
  // Before the head of a circle is its end; a callback then becomes the head itself.
  link->prev = head->prev;
  link->next = head;
  head->prev->next = link;
  head->prev = link;
  if (kind == LinkKind::callback) lane->head = link;
}

/// Returns the lane's flags after it.
inline std::uint32_t erase_link(Lane* lane, Link* link, std::uint32_t state) noexcept {
  if (link->next == link) {
    lane->head = nullptr;
    return state & ~linked_flag;
  }
  link->prev->next = link->next;
  link->next->prev = link->prev;
  if (lane->head == link) lane->head = link->next;
  return state;
}

/// Puts a link behind all others of its lane.
inline void move_to_end(Lane* lane, Link* link) noexcept {
  Link* const head = lane->head;
  if (head == link) {
    lane->head = link->next;
    return;
  }
  link->prev->next = link->next;
  link->next->prev = link->prev;
  link->prev = head->prev;
  link->next = head;
  head->prev->next = link;
  head->prev = link;
}

inline void grow_shards(Node* node) noexcept;

/// False, and nothing linked, if the node is cancelled. The caller holds a handle of it (I5).
inline bool attach(Node* node, Link* link, LinkKind kind) noexcept {
  // acquire: with sharded_flag come the shards.
  const std::uint32_t glance = node->state.load(std::memory_order_acquire);
  Lane* lane = node;
  if ((glance & sharded_flag) != 0) {
    lane = &extension_of(node)->shards[this_thread_number() % Extension::shard_count];
  }
  bool waited = false;
  std::uint32_t state = lock_bit(lane->state, &waited);
  if ((state & cancelled_flag) != 0) {
    unlock_bit(lane->state, state);
    return false;
  }
  insert_link(lane, link, kind);
  state |= linked_flag;
  bool grow = false;
  if (waited && lane == node && (state & sharded_flag) == 0) {
    state += 1U << strikes_shift;
    grow = (state >> strikes_shift) >= strikes_to_grow;
  }
  unlock_bit(lane->state, state);
  if (grow) grow_shards(node);
  return true;
}

inline void retain(Node* node) noexcept {
  // relaxed: whoever retains holds a handle, or the lock that keeps the last one from going (I5).
  node->handles.fetch_add(1, std::memory_order_relaxed);
}

// The way of who emptied the lane of an orphan; out of line, so that the usual way is inlined.
[[gnu::noinline]] inline Node* claim(Lane* lane, std::uint32_t state) noexcept {
  Node* const node = owner_of(lane);
  if ((state & (shard_flag | sharded_flag | timed_flag)) == 0 &&
      node->handles.load(std::memory_order_relaxed) == 0) {
    // Without handles, who could make one needs this lock: no need for a read-modify-write.
    node->handles.store(1, std::memory_order_relaxed);
  } else {
    retain(node);
  }
  return node;
}

/// Under the lane's lock, with its flags after a link was taken out: a handle of the node if that has to
/// be released now (I6), else null.
inline Node* claim_orphan(Lane* lane, std::uint32_t state) noexcept {
  return (state & (linked_flag | orphan_flag)) == orphan_flag ? claim(lane, state) : nullptr;
}

/// Takes a link out of its lane. Returns the node if it has to be released now (I6), else null.
inline Node* detach(Link* link) noexcept {
  Lane* const lane = lane_of(link);
  std::uint32_t state = lock_bit(lane->state);
  state = erase_link(lane, link, state);
  link->where = 0;
  Node* const orphan = claim_orphan(lane, state);
  unlock_bit(lane->state, state);
  return orphan;
}

/// Under the node's own lock.
inline Extension* set_extension(Node* node, Extension* made) noexcept {
  const std::uintptr_t extra = node->extra.load(std::memory_order_relaxed);
  if ((extra & 1U) != 0) made->next_work = reinterpret_cast<Node*>(extra & ~std::uintptr_t{1});
  node->extra.store(reinterpret_cast<std::uintptr_t>(made), std::memory_order_release);
  return made;
}

// A parent under which several threads link and unlink gets a lane for each. Not having the memory
// for it is no error: it stays as it is, and tries again later.
inline void grow_shards(Node* node) noexcept {
  auto* const shards = new (std::nothrow) ShardLane[Extension::shard_count];
  Owned<ShardLane[]> keep(shards);
  Owned<Extension> spare(shards == nullptr ? nullptr : new (std::nothrow) Extension);
  std::uint32_t state = lock_bit(node->state);
  state &= (1U << strikes_shift) - 1;
  if (spare && (state & (cancelled_flag | sharded_flag)) == 0) {
    for (unsigned i = 0; i < Extension::shard_count; ++i) {
      shards[i].owner = node;
      shards[i].state.store(shard_flag, std::memory_order_relaxed);
    }
    Extension* extension = extension_of(node);
    if (extension == nullptr) extension = set_extension(node, spare.release());
    extension->shards = std::move(keep);
    state |= sharded_flag;
  }
  unlock_bit(node->state, state);
}

// ---- letting go -----------------------------------------------------------------------------------

// Parents to be let go that were found while JoinNodes died: a list instead of a recursion.
struct DeadJoins {
  JoinLink* first = nullptr;
};

inline void free_join(JoinNode* node, DeadJoins& dead) noexcept {
  for (std::size_t i = 0; i < node->count; ++i) {
    JoinLink& link = node->links[i];
    if (link.where == 0) continue;
    link.orphan = detach(&link);
    if (link.orphan == nullptr) continue;
    ++node->unsettled;
    link.next_dead = dead.first;
    dead.first = &link;
  }
  if (node->unsettled == 0) destroy_node(node);
}

// Gives up what looked like the last handle of a node with something on it, which then stays linked to
// its parent: its own lock is enough. False, and nothing given up, if nothing is on it any more.
inline bool left_as_orphan(Node* node) noexcept {
  // A node with one lane and no timer: who could make another handle needs this lock (I5).
  const std::uint32_t seen = lock_bit(node->state);
  // acquire, and acq_rel below: whoever has the last handle has seen all that was done by way of the
  // others, so that it may free the node.
  if ((seen & (linked_flag | sharded_flag | timed_flag)) == linked_flag &&
      node->handles.load(std::memory_order_acquire) == 1) {
    node->handles.store(0, std::memory_order_relaxed);  // no need for a read-modify-write
    unlock_bit(node->state, seen | orphan_flag);
    return true;
  }
  lock_shards(node);
  const bool linked = any_linked(node);
  const bool orphan = linked && node->handles.fetch_sub(1, std::memory_order_acq_rel) == 1;
  unlock_node(node, orphan ? orphan_flag : 0U);
  return linked;
}

// Under its parent's lane lock, if it has one: whether this is the last handle of a node that is nothing but a
// node and has nothing on it, so that it needs no lock of its own (I5). The caller has seen one handle before:
// so who gave up another has linked before this look at the links what it linked; and who made one under the
// node's lock has let that go before this look at the handles.
inline bool is_plain_and_last(const Node* node) noexcept {
  constexpr std::uint32_t not_plain =
      locked_bit | linked_flag | sharded_flag | timed_flag | joined_flag;
  // acquire: whoever was in the node's lane last has unlocked it, and is out of it for good. The same for the
  // handles: what others did with theirs comes before the node is freed.
  return (node->state.load(std::memory_order_acquire) & not_plain) == 0 &&
         node->handles.load(std::memory_order_acquire) == 1;
}

/// The end of a node that is known to go. Returns the parent if that has to be released in turn, else null.
inline Node* bury(Node* node, Lane* up, std::uint32_t up_state) noexcept {
  Node* parent = nullptr;
  if (up != nullptr) {
    up_state = erase_link(up, node, up_state);
    parent = claim_orphan(up, up_state);
    unlock_bit(up->state, up_state);
  }
  destroy_node(node);
  return parent;
}

// Called with what looked like the last handle. Gives it up; if it was, and nothing hangs on the node,
// the node goes. Returns the parent if that has to be released in turn, else null.
inline Node* retire(Node* node, DeadJoins& dead) noexcept {
  // relaxed: a guess, made good under the lock; joined_flag is constant.
  const std::uint32_t glance = node->state.load(std::memory_order_relaxed);
  if ((glance & linked_flag) != 0 && left_as_orphan(node)) return nullptr;
  const bool joined = (glance & joined_flag) != 0;
  // Parent before child (I3). A join has many parents: they are dealt with after it is dying.
  Lane* const up = joined || node->where == 0 ? nullptr : lane_of(node);
  const std::uint32_t up_state = up == nullptr ? 0 : lock_bit(up->state);

  if (!is_plain_and_last(node)) {
    lock_node(node);
    const bool linked = any_linked(node);
    bool disarmed = (glance & timed_flag) == 0;
    // acquire, here and below: as in is_plain_and_last().
    std::uint32_t seen = node->handles.load(std::memory_order_acquire);
    bool last = false;
    // Who has another handle gives it up without this lock, so one exchange must tell which is the last:
    // with nothing linked, and no handle left, nobody would ever come to let the node go.
    for (;;) {
      last = !linked && seen == 1;
      if (last && disarmed) break;
      if (last) {
        // The timer thread takes its handle under the lock that disarm() takes: look again after it.
        TimerLink& timer = static_cast<TimedNode*>(node)->timer;
        if (timer.service != nullptr) timer.service->disarm(&timer);
        disarmed = true;
        seen = node->handles.load(std::memory_order_acquire);
      } else if (node->handles.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                                     std::memory_order_acquire)) {
        break;
      }
    }
    if (!last) {
      unlock_node(node, seen == 1 ? orphan_flag : 0U);
      if (up != nullptr) unlock_bit(up->state, up_state);
      return nullptr;
    }
    unlock_node(node, joined ? dying_flag : 0U);
  }

  if (joined) {
    free_join(static_cast<JoinNode*>(node), dead);
    return nullptr;
  }
  return bury(node, up, up_state);
}

/// Gives up one handle. Never recurses: who lets go the last child of an orphan goes on with it.
[[gnu::noinline]] inline void release(Node* node) noexcept {
  DeadJoins dead;
  for (;;) {
    while (node != nullptr) {
      // acquire: as in retire(), which is to free the node. release: what this thread did with its handle
      // happens before whoever frees it. A failed exchange has seen nothing that matters: relaxed.
      std::uint32_t seen = node->handles.load(std::memory_order_acquire);
      if (seen == 1) {
        node = retire(node, dead);
      } else if (node->handles.compare_exchange_weak(seen, seen - 1, std::memory_order_release,
                                                     std::memory_order_relaxed)) {
        node = nullptr;
      }
    }
    JoinLink* const link = dead.first;
    if (link == nullptr) return;
    dead.first = link->next_dead;
    node = link->orphan;
    JoinNode* const owner = link->node;
    if (--owner->unsettled == 0) destroy_node(owner);
  }
}

}  // namespace lastcall::detail
