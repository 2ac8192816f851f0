// The algorithms of the cancellation tree: linking, letting go, cancelling. The invariants (I1 ...)
// are numbered at the head of cancellation.hpp.
#pragma once

#include <lastcall/detail/cancel_node.hpp>

#include <cstddef>
#include <new>
#include <utility>

namespace lastcall {

class CancellationToken;

}  // namespace lastcall

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
        if (timer.due != nullptr) TimerService::instance().disarm(&timer);
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

// ---- cancelling -----------------------------------------------------------------------------------

// The nodes that a cancel has marked and that have waiters, a descriptor or callbacks; each is held by
// a handle. A list through Node::extra: nothing is allocated.
class CancelWork {
 public:
  CancelWork() noexcept = default;
  CancelWork(const CancelWork&) = delete;
  CancelWork& operator=(const CancelWork&) = delete;

  bool empty() const noexcept { return head_ == nullptr; }

  /// Under the node's lock. `asleep`: wake() has something to do there.
  void push(Node* node, bool asleep) noexcept {
    asleep_ = asleep_ || asleep;
    retain(node);
    if (Extension* const extension = extension_of(node)) {
      extension->next_work = head_;
    } else {
      node->extra.store(reinterpret_cast<std::uintptr_t>(head_) | 1U, std::memory_order_relaxed);
    }
    head_ = node;
  }

  /// Wakes every waiter and raises every descriptor. Runs no user code and frees nothing. False: past
  /// `deadline` a lock was still held, and not all are awake; it may be called again.
  bool wake(Clock::time_point deadline = Clock::time_point::max()) noexcept {
    if (!asleep_) return true;
    bool all = true;
    for (Node* node = head_; node != nullptr; node = next_of(node)) {
      std::uint32_t unused = 0;
      if (deadline == Clock::time_point::max()) {
        lock_node(node);
      } else if (!lock_node_until(node, deadline, unused)) {
        all = false;
        continue;
      }
      wake_node(node);
      unlock_node(node);
    }
    asleep_ = !all;
    return all;
  }

  /// The same of one node, whose lock the caller has.
  static void wake_node(Node* node) noexcept {
    for (Lane* lane = node; lane != nullptr; lane = next_lane(node, lane)) wake_lane(lane);
    if (Extension* const extension = extension_of(node); extension && extension->flag) {
      extension->flag->raise();
    }
  }

  /// Runs one callback; false if there is none left.
  bool run_one() noexcept {
    CallbackLink* const callback = take_one();
    if (callback != nullptr) run(callback);
    return callback != nullptr;
  }

  /// A callback that has to be run next, by run() on this thread; null if there is none left. Lets go of
  /// the nodes that are done with. Another thread may go on with the rest while this callback still runs.
  CallbackLink* take_one() noexcept {
    while (head_ != nullptr) {
      Node* const node = head_;
      for (Lane* lane = node; lane != nullptr; lane = next_lane(node, lane)) {
        bool done = false;
        if (CallbackLink* const callback = take_callback(lane, done)) {
          // The node is kept by the callback's link until its destructor (I7).
          if (done) release(node);
          return callback;
        }
      }
      lock_bit(node->state);
      pop(node);
      unlock_bit(node->state, node->state.load(std::memory_order_relaxed));
      release(node);
    }
    return nullptr;
  }

  /// Runs what take_one() gave.
  static void run(CallbackLink* callback) noexcept {
    CallbackLink* current = callback;
    callback->runner_current = &current;
    callback->invoke(callback);
    if (current == nullptr) return;  // it was destroyed by itself
    // acq_rel: what the callback did happens before its destructor returns on another thread. It may
    // be gone after this; the wake uses the address alone.
    Word* const stage = &callback->stage;
    if (stage->exchange(CallbackLink::finished, std::memory_order_acq_rel) ==
        CallbackLink::awaited) {
      futex_wake_all(stage);
    }
  }

 private:
  // Also without the node's lock, under which it may be given an Extension: hence the single load.
  static Node* next_of(Node* node) noexcept {
    // acquire: an Extension that pollable_fd() has just made is whole, with `next_work` moved into it.
    const std::uintptr_t extra = node->extra.load(std::memory_order_acquire);
    if ((extra & 1U) != 0) return reinterpret_cast<Node*>(extra & ~std::uintptr_t{1});
    const auto* const extension = reinterpret_cast<const Extension*>(extra);
    return extension == nullptr ? nullptr : extension->next_work;
  }

  static void wake_lane(Lane* lane) noexcept {
    std::uint32_t state = lane->state.load(std::memory_order_relaxed);
    Link* link = lane->head;
    const Link* const end = link == nullptr ? nullptr : link->prev;
    while (link != nullptr && kind_of(link) == LinkKind::callback) {
      Link* const next = link == end ? nullptr : link->next;
      auto* const waiter = static_cast<CallbackLink*>(link);
      if (waiter->invoke == nullptr) {
        state = erase_link(lane, waiter, state);
        Word* const stage = &waiter->stage;
        // release: the waiter sees the cause. It may be gone after this; the wake uses the address.
        stage->store(CallbackLink::finished, std::memory_order_release);
        futex_wake_one(stage);
      }
      link = next;
    }
    // release: the word may say "cancelled" already, and who reads it from this store has to see the cause.
    lane->state.store(state, std::memory_order_release);
  }

  // Under the lock of the list's first node.
  void pop(Node* node) noexcept {
    head_ = next_of(node);
    if (extension_of(node) == nullptr) node->extra.store(0, std::memory_order_relaxed);
  }

  static bool is_pending(const Link* link) noexcept {
    return kind_of(link) == LinkKind::callback &&
           static_cast<const CallbackLink*>(link)->stage.load(std::memory_order_relaxed) ==
               CallbackLink::pending;
  }

  // The first callback if it has not been taken yet. Turning the circle by one puts it behind all
  // that still wait, where it stays linked, and keeps the node, until its destructor. `done`: it was the last of
  // the node, which has been popped.
  CallbackLink* take_callback(Lane* lane, bool& done) noexcept {
    // A glance without the lock: nothing can be added to a cancelled node. acquire: as if it had been
    // taken; whoever took the last link out is done.
    if ((lane->state.load(std::memory_order_acquire) & linked_flag) == 0) return nullptr;
    const std::uint32_t state = lock_bit(lane->state);
    CallbackLink* taken = nullptr;
    Link* const first = lane->head;
    if (first != nullptr && is_pending(first)) {
      taken = static_cast<CallbackLink*>(first);
      taken->runner_thread = this_thread_mark();
      taken->stage.store(CallbackLink::running, std::memory_order_relaxed);
      lane->head = first->next;
      done = lane == head_ && (state & sharded_flag) == 0 && !is_pending(lane->head);
      if (done) pop(head_);
    }
    unlock_bit(lane->state, state);
    return taken;
  }

  Node* head_ = nullptr;
  bool asleep_ = false;
};

inline Link* last_child(const Lane* lane) noexcept {
  Link* const head = lane->head;
  return head != nullptr && kind_of(head->prev) != LinkKind::callback ? head->prev : nullptr;
}
inline Link* previous_child(const Lane* lane, const Link* link) noexcept {
  return link != lane->head && kind_of(link->prev) != LinkKind::callback ? link->prev : nullptr;
}
inline bool has_callbacks(Node* node) noexcept {
  for (Lane* lane = node; lane != nullptr; lane = next_lane(node, lane)) {
    if (lane->head != nullptr && kind_of(lane->head) == LinkKind::callback) return true;
  }
  return false;
}

// One walk over a subtree, depth first and without recursion: each node stays locked until its whole
// subtree is marked (I3), and is marked when that is so (I2). The path up needs no memory: it is the
// links themselves.
class Marking {
 public:
  /// `fired`: a node whose timer is known to be in no wheel any more.
  Marking(const CauseRecord* cause, CancelWork& work, const Node* fired = nullptr) noexcept
      : cause_(cause), work_(work), fired_(fired) {
    // A reference for each node, taken at once: no counter is touched on the way.
    detail::retain(cause_, plenty);
  }
  Marking(const Marking&) = delete;
  Marking& operator=(const Marking&) = delete;
  ~Marking() { detail::release(cause_, plenty - used_); }

  /// False if `root` is cancelled already; then its subtree is, too.
  bool mark(Node* root) noexcept { return walk(root); }

  /// The same for who must not wait for ever for a lock whose holder was stopped. False: past `deadline`
  /// one was still held. Then all is marked but the node with that lock, what is below it, and what is
  /// above: I2 and I3 hold. It may be called again, with the same cause and the same work.
  bool try_mark(Node* root, Clock::time_point deadline) noexcept {
    deadline_ = deadline;
    walk(root);
    return is_cancelled(root);
  }

 private:
  static constexpr std::uint64_t plenty = std::uint64_t{1} << 40;

  bool walk(Node* root) noexcept {
    std::uint32_t before = 0;
    if (!lock(root, before)) return false;
    if ((before & cancelled_flag) != 0) {
      unlock_node(root);
      return false;
    }
    enter(root);
    Node* node = root;
    Lane* lane = node;
    Link* link = last_child(lane);
    for (;;) {
      if (link == nullptr) {
        lane = next_lane(node, lane);
        if (lane != nullptr) {
          link = last_child(lane);
          continue;
        }
        // The link by which to go back up must be read before the node is unlocked.
        Link* const up = way_up(node);
        leave(node, root);
        if (node == root) return true;
        lane = lane_of(up);
        node = owner_of(lane);
        link = previous_child(lane, up);
        continue;
      }
      bool held = false;
      Node* const child = descend(link, held);
      if (held) spoil(node, root);
      if (child != nullptr) {
        node = child;
        lane = node;
        link = last_child(lane);
      } else {
        link = previous_child(lane, link);
      }
    }
  }

  bool lock(Node* node, std::uint32_t& state) const noexcept {
    if (deadline_ != Clock::time_point::max()) return lock_node_until(node, deadline_, state);
    state = lock_node(node);
    return true;
  }

  // Something below can't be marked: so neither can this node and those above it. They are all locked.
  void spoil(Node* node, const Node* root) noexcept {
    while (node->cause != nullptr) {
      node->cause = nullptr;
      --used_;
      if (node == root) return;
      node = owner_of(lane_of(way_up(node)));
    }
  }

  static Link* way_up(Node* node) noexcept {
    if ((node->state.load(std::memory_order_relaxed) & joined_flag) == 0) return node;
    return static_cast<JoinNode*>(node)->entered;
  }

  void enter(Node* node) noexcept {
    node->cause = cause_;
    ++used_;
  }

  void leave(Node* node, const Node* root) noexcept {
    if (node->cause == nullptr) {
      unlock_node(node);
      return;
    }
    const std::uint32_t state = node->state.load(std::memory_order_relaxed);
    if ((state & timed_flag) != 0 && node != fired_) {
      TimerLink& timer = static_cast<TimedNode*>(node)->timer;
      if (timer.due != nullptr) {
        if (deadline_ == Clock::time_point::max()) {
          TimerService::instance().disarm(&timer);
        } else {
          TimerService::instance().disarm_until(&timer, deadline_);
        }
      }
    }
    const Extension* const extension = extension_of(node);
    const bool has_flag = extension != nullptr && extension->flag;
    if (node == root) {
      // The whole subtree is marked, so who waits here may be woken at once (I8). release: before that it is
      // published, as by unlock_node().
      node->state.store(state | cancelled_flag, std::memory_order_release);
      if (has_flag || has_callbacks(node)) CancelWork::wake_node(node);
      if (has_callbacks(node)) work_.push(node, false);
    } else if (has_flag || has_callbacks(node)) {
      work_.push(node, true);
    }
    unlock_node(node, cancelled_flag);
  }

  // Marks a leaf at once. Returns the child, locked, if there is something below or on it. `held`: it
  // can't be locked.
  Node* descend(Link* link, bool& held) noexcept {
    Node* child = nullptr;
    if (kind_of(link) == LinkKind::join) {
      child = static_cast<JoinLink*>(link)->node;
    } else {
      child = static_cast<Node*>(link);
    }
    // acquire: cancelled and unlocked means that its subtree is marked, whoever did that (I3).
    std::uint32_t state = child->state.load(std::memory_order_acquire);
    if ((state & (cancelled_flag | locked_bit)) == cancelled_flag) return nullptr;
    if ((state & dying_flag) != 0) return nullptr;
    if (!lock(child, state)) {
      held = true;
      return nullptr;
    }
    if ((state & (cancelled_flag | dying_flag)) != 0) {
      unlock_node(child);
      return nullptr;
    }
    enter(child);
    if ((state & (linked_flag | sharded_flag | timed_flag)) == 0 &&
        child->extra.load(std::memory_order_relaxed) == 0) {
      unlock_bit(child->state, state | cancelled_flag);
      return nullptr;
    }
    if (kind_of(link) == LinkKind::join) {
      static_cast<JoinNode*>(child)->entered = static_cast<JoinLink*>(link);
    }
    return child;
  }

  const CauseRecord* cause_;
  CancelWork& work_;
  const Node* fired_;
  std::uint64_t used_ = 0;
  Clock::time_point deadline_ = Clock::time_point::max();
};

/// Cancels the node: marks the subtree, wakes, runs the callbacks. True for the one call that did it.
/// The caller's handle may go in a callback: the node is not touched after it is marked.
[[gnu::noinline]] inline bool cancel_node(Node* node, const CauseRecord* cause,
                                          const Node* fired = nullptr) noexcept {
  // acquire: who is told "cancelled already" may ask for the cause (I2).
  if ((node->state.load(std::memory_order_acquire) & cancelled_flag) != 0) return false;
  CancelWork work;
  {
    Marking marking(cause, work, fired);
    if (!marking.mark(node)) return false;
  }
  work.wake();
  while (work.run_one()) {
  }
  return true;
}

// ---- making ---------------------------------------------------------------------------------------

// The node of an armed timer is held from hold() to due().
inline Node* node_of(TimerLink* timer) noexcept { return static_cast<NodeTimer*>(timer)->node; }

inline void hold_timed(TimerLink* timer) noexcept { retain(node_of(timer)); }
inline void due_timed(TimerLink* timer) noexcept {
  Node* const node = node_of(timer);
  cancel_node(node, &deadline_record, node);
  release(node);
}

/// A node that is cancelled from the start. It hangs on nothing.
inline void born_cancelled(Node* node, const CauseRecord* cause) noexcept {
  detail::retain(cause);
  node->cause = cause;
  // release: I2, though nobody knows the node yet: is_cancelled() asks for no less.
  node->state.fetch_or(cancelled_flag, std::memory_order_release);
}

inline Node* make_root() { return make_plain(sourced_flag); }

/// A node born cancelled; a deadline is only remembered. Out of line: who makes children makes few of these.
[[gnu::cold, gnu::noinline]] inline Node* make_cancelled(
    const CauseRecord* cause, std::optional<Clock::time_point> deadline) {
  Node* const node = deadline ? make_timed(sourced_flag, *deadline) : make_root();
  born_cancelled(node, cause);
  return node;
}

/// The same under a cancelled parent.
[[gnu::cold, gnu::noinline]] inline Node* make_cancelled_below(const Node* parent) {
  return make_cancelled(parent->cause, nearest_deadline(parent));
}

/// A child of `parent` (null: a root), with one handle.
inline Node* make_child(Node* parent) {
  if (parent == nullptr) return make_root();
  if (!is_cancelled(parent)) {
    Node* const node = make_root();
    if (attach(parent, node, LinkKind::child)) return node;
    destroy_node(node);  // too late: it is to be born cancelled
  }
  return make_cancelled_below(parent);
}

/// A child that is cancelled at `deadline` at the latest. Throws std::system_error if the timer thread
/// is needed and can't be started.
inline Node* make_timed_child(Node* parent, Clock::time_point deadline, Clock::time_point now) {
  const auto above = parent != nullptr ? nearest_deadline(parent) : std::nullopt;
  const Clock::time_point nearest = above && *above < deadline ? *above : deadline;
  if (parent != nullptr && is_cancelled(parent)) return make_cancelled(parent->cause, nearest);
  if (deadline <= now) return make_cancelled(&deadline_record, nearest);
  if (above && above.value_or(deadline) <= deadline) return make_child(parent);
  TimedNode* const node = make_timed(sourced_flag, deadline);
  if (deadline != Clock::time_point::max()) {
    node->timer.node = node;
    node->timer.hold = &hold_timed;
    node->timer.due = &due_timed;
    // Armed before it hangs in the tree: a canceller from above must find the timer to take it out.
    LASTCALL_TRY { TimerService::instance().arm(&node->timer, deadline, now); }
    LASTCALL_CATCH(...) {
      destroy_node(node);
      LASTCALL_RETHROW;
    }
  }
  if (parent != nullptr && !attach(parent, node, LinkKind::child)) {
    cancel_node(node, parent->cause);
  }
  return node;
}

/// A node under all of `parents`.
inline Node* make_join(Node* const* parents, std::size_t count) {
  Owned<JoinNode> join(new JoinNode);
  join->links = Owned<JoinLink[]>(new JoinLink[count]);
  join->count = count;
  join->handles.store(1, std::memory_order_relaxed);
  join->state.store(joined_flag | sourced_flag, std::memory_order_relaxed);
  for (std::size_t i = 0; i < count; ++i) {
    const auto theirs = nearest_deadline(parents[i]);
    if (theirs && (!join->deadline || *theirs < *join->deadline)) join->deadline = theirs;
  }
  JoinNode* const node = join.release();
  for (std::size_t i = 0; i < count; ++i) {
    node->links[i].node = node;
    if (!attach(parents[i], &node->links[i], LinkKind::join)) {
      cancel_node(node, parents[i]->cause);
      break;
    }
  }
  return node;
}

// ---- waiting and callbacks ------------------------------------------------------------------------

/// Blocks until the node is cancelled or the deadline has passed. True: cancelled.
inline bool wait_on(Node* node, Clock::time_point deadline) noexcept {
  if (is_cancelled(node)) return true;
  if (deadline <= Clock::now()) return false;
  CallbackLink waiter;
  if (!attach(node, &waiter, LinkKind::callback)) return true;
  // acquire: pairs with the release in wake_lane().
  while (waiter.stage.load(std::memory_order_acquire) == CallbackLink::pending) {
    if (futex_wait_until(waiter.stage, CallbackLink::pending, deadline)) continue;
    // Time is up. Under the lane's lock it shows whether the waker has been here.
    Lane* const lane = lane_of(&waiter);
    std::uint32_t state = lock_bit(lane->state);
    const bool woken = waiter.stage.load(std::memory_order_relaxed) != CallbackLink::pending;
    if (!woken) state = erase_link(lane, &waiter, state);
    unlock_bit(lane->state, state);
    return woken || is_cancelled(node);
  }
  return true;
}

/// Takes a callback out again: std::stop_callback's destructor.
inline void remove_callback(CallbackLink* callback) noexcept {
  if (callback->where == 0) return;  // it ran in its constructor, or never could
  Lane* const lane = lane_of(callback);
  std::uint32_t state = lock_bit(lane->state);
  state = erase_link(lane, callback, state);
  Node* const orphan = claim_orphan(lane, state);
  // acquire, here and below: what the callback did, and the runner's last touch, come before the caller
  // frees it. Pairs with the exchange in CancelWork::run().
  const std::uint32_t stage = callback->stage.load(std::memory_order_acquire);
  const bool runs_here =
      stage == CallbackLink::running && callback->runner_thread == this_thread_mark();
  unlock_bit(lane->state, state);
  if (orphan != nullptr) release(orphan);
  if (stage != CallbackLink::running) return;
  if (runs_here) {
    // Inside itself: the runner must not touch it any more.
    *callback->runner_current = nullptr;
    return;
  }
  std::uint32_t seen = CallbackLink::running;
  callback->stage.compare_exchange_strong(seen, CallbackLink::awaited, std::memory_order_acquire,
                                          std::memory_order_acquire);
  while (callback->stage.load(std::memory_order_acquire) != CallbackLink::finished) {
    futex_wait(callback->stage, CallbackLink::awaited);
  }
}

// ---- what sources and tokens do -------------------------------------------------------------------

/// The destructor of a source that is armed: cancels, then gives up the handle.
inline void abandon_node(Node* node) noexcept {
  // In this order: who gives up the other handle has linked before that what it linked. acquire: to see it.
  const bool alone = node->handles.load(std::memory_order_acquire) == 1;
  const std::uint32_t state = node->state.load(std::memory_order_acquire);
  // With no other handle and nothing on it nobody could tell whether it was cancelled (I5).
  const bool unseen = alone && (state & (locked_bit | linked_flag | sharded_flag)) == 0;
  if (!unseen) {
    if ((state & cancelled_flag) == 0) cancel_node(node, &cancelled_record);
  } else if ((state & (timed_flag | joined_flag)) == 0 && node->where != 0) {
    // The short way of a child that is nothing but a node.
    Lane* const up = lane_of(node);
    const std::uint32_t up_state = lock_bit(up->state);
    if (is_plain_and_last(node)) {
      if (Node* const parent = bury(node, up, up_state)) release(parent);
      return;
    }
    unlock_bit(up->state, up_state);
  }
  release(node);
}

/// The destructor of a source that is disarmed.
inline void disown_node(Node* node) noexcept {
  const std::uint32_t state = lock_bit(node->state);
  unlock_bit(node->state, state & ~sourced_flag);
  release(node);
}

/// See CancellationToken::fd().
inline int pollable_fd(Node* node) {
  const auto existing = [&]() noexcept {
    const Extension* const extension = extension_of(node);
    return extension != nullptr && extension->flag ? extension->flag->fd() : -1;
  };
  std::uint32_t state = lock_bit(node->state);
  int fd = existing();
  unlock_bit(node->state, state);
  unsigned patience = 4096;
  if (fd >= 0 || !can_be_cancelled(node, patience)) return fd;
  Owned<PollableFlag> flag(new PollableFlag("making the descriptor of a cancellation token"));
  Owned<Extension> spare(new Extension);
  state = lock_bit(node->state);
  fd = existing();
  if (fd < 0) {
    Extension* extension = extension_of(node);
    if (extension == nullptr) extension = set_extension(node, spare.release());
    extension->flag = std::move(flag);
    fd = extension->flag->fd();
    // A canceller that has marked the node already may not see the flag.
    if ((state & cancelled_flag) != 0) extension->flag->raise();
  }
  unlock_bit(node->state, state);
  return fd;
}

// For the coordinator and the tests.
struct TreeAccess {
  template <class Token>
  static Node* peek(const Token& token) noexcept {
    return token.node_;
  }
  template <class Token = CancellationToken>
  static Token adopt(Node* node) noexcept {
    return Token(node);
  }
  template <class Source>
  static Node* node_of(const Source& source) noexcept {
    return source.get();
  }
};

}  // namespace lastcall::detail
