// Cancelling a node of the tree: one walk marks the subtree, then waiters wake, descriptors are raised and
// callbacks run. The invariants (I1 ...) are numbered at the head of cancellation.hpp.
#pragma once

#include <lastcall/detail/cancel_links.hpp>

#include <atomic>
#include <cstdint>

namespace lastcall::detail {

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
      } else if (waiter->stage.load(std::memory_order_relaxed) == CallbackLink::asleep) {
        // It stays linked (I7), but must not stand before a callback that has to be run. relaxed: under the lock.
        move_to_end(lane, waiter);
        waiter->stage.store(CallbackLink::finished, std::memory_order_relaxed);
        waiter->invoke(waiter);
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
      if (timer.service != nullptr) {
        if (deadline_ == Clock::time_point::max()) {
          timer.service->disarm(&timer);
        } else {
          timer.service->disarm_until(&timer, deadline_);
        }
      }
    }
    const Extension* const extension = extension_of(node);
    const bool has_flag = extension != nullptr && extension->flag;
    // The whole subtree is marked, so the node may be published before it is unlocked. It has to be, where who
    // finds the flag elsewhere may ask this word next: in a shard (I2), or by having been woken (I8). release:
    // as by unlock_node().
    if (node == root || (state & sharded_flag) != 0) {
      node->state.store(state | cancelled_flag, std::memory_order_release);
    }
    if (node == root) {
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

/// Cancels the node, but for its callbacks, which are in `work` then. True for the one call that did it.
[[gnu::always_inline]] inline bool mark_and_wake(Node* node, const CauseRecord* cause,
                                                 CancelWork& work, const Node* fired) noexcept {
  // acquire: who is told "cancelled already" may ask for the cause (I2).
  if ((node->state.load(std::memory_order_acquire) & cancelled_flag) != 0) return false;
  {
    Marking marking(cause, work, fired);
    if (!marking.mark(node)) return false;
  }
  work.wake();
  return true;
}

/// Cancels the node: marks the subtree, wakes, runs the callbacks. True for the one call that did it.
/// The caller's handle may go in a callback: the node is not touched after it is marked.
[[gnu::noinline]] inline bool cancel_node(Node* node, const CauseRecord* cause) noexcept {
  CancelWork work;
  if (!mark_and_wake(node, cause, work, nullptr)) return false;
  while (work.run_one()) {
  }
  return true;
}

}  // namespace lastcall::detail
