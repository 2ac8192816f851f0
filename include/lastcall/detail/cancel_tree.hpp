// The cancellation tree as sources, tokens and callbacks use it: making nodes, waiting, registering, letting
// go. How nodes hang together is in cancel_links.hpp, how a subtree is cancelled in cancel_walk.hpp; the
// invariants (I1 ...) are numbered at the head of cancellation.hpp.
#pragma once

#include <lastcall/detail/cancel_walk.hpp>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace lastcall {

class CancellationToken;

}  // namespace lastcall

namespace lastcall::detail {

// ---- making ---------------------------------------------------------------------------------------

// The node of an armed timer is held from hold() to due().
inline Node* node_of(TimerLink* timer) noexcept { return static_cast<NodeTimer*>(timer)->node; }

inline void hold_timed(TimerLink* timer) noexcept { retain(node_of(timer)); }
inline void due_timed(TimerLink* timer) noexcept {
  Node* const node = node_of(timer);
  CancelWork work;
  {
    // A child that is forked meanwhile would find nodes locked by a thread that it hasn't got.
    const TimerService::NoFork no_fork(*timer->service);
    mark_and_wake(node, record_of(CommonCause::deadline), work, node);
  }
  while (work.run_one()) {
  }
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

/// Whether the nearest deadline of a node comes by a timer: in a forked child it may be one that stayed with the
/// parent. Throws as arm() does.
inline bool deadline_comes(const Node* node) {
  const TimedNode* const timed = nearest_timed(node);
  // Without a timer it is cancelled by now, or never due.
  if (timed == nullptr || timed->timer.service == nullptr) return true;
  return timed->timer.service->still_comes(timed->timer);
}

/// A child that is cancelled at `deadline` at the latest. Throws std::system_error if the timer thread
/// is needed and can't be started.
inline Node* make_timed_child(Node* parent, Clock::time_point deadline, Clock::time_point now) {
  const auto above = parent != nullptr ? nearest_deadline(parent) : std::nullopt;
  const Clock::time_point nearest = above && *above < deadline ? *above : deadline;
  if (parent != nullptr && is_cancelled(parent)) return make_cancelled(parent->cause, nearest);
  if (deadline <= now) return make_cancelled(record_of(CommonCause::deadline), nearest);
  if (above && *above <= deadline) {
    if (deadline_comes(parent)) return make_child(parent);
    deadline = *above;
  }
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
    if (!theirs || (join->deadline && *theirs >= *join->deadline)) continue;
    join->deadline = theirs;
    join->timed = nearest_timed(parents[i]);
  }
  JoinNode* const node = join.release();
  for (std::size_t i = 0; i < count; ++i) {
    node->links[i].node = node;
    if (!attach(parents[i], &node->links[i], LinkKind::join)) {
      node->timed = nullptr;
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
    if ((state & cancelled_flag) == 0) cancel_node(node, record_of(CommonCause::cancelled));
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
  constexpr const char* doing = "making the descriptor of a cancellation token";
  const auto existing = [&]() noexcept {
    Extension* const extension = extension_of(node);
    return extension != nullptr ? extension->flag.get() : nullptr;
  };
  std::uint32_t state = lock_bit(node->state);
  if (PollableFlag* const flag = existing()) {
    const bool inherited = !flag->is_own();
    const int error = inherited ? flag->make_own() : 0;
    const int fd = flag->fd();
    // What it said before the fork it says again.
    if (inherited && (state & cancelled_flag) != 0) flag->raise();
    unlock_bit(node->state, state);
    if (error != 0) throw_system_error(error, doing);
    return fd;
  }
  unlock_bit(node->state, state);
  if (!can_be_cancelled(node)) return -1;
  Owned<PollableFlag> flag(new PollableFlag(doing));
  Owned<Extension> spare(new Extension);
  state = lock_bit(node->state);
  Extension* extension = extension_of(node);
  if (extension == nullptr) extension = set_extension(node, spare.release());
  if (extension->flag.get() == nullptr) {
    extension->flag = std::move(flag);
    // A canceller that has marked the node already may not see the flag.
    if ((state & cancelled_flag) != 0) extension->flag->raise();
  }
  const int fd = extension->flag->fd();
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
