// The cancellation tree: sources that cancel, tokens that observe, callbacks that react.
//
// The model is Go's context.WithCancel, with std::stop_callback's rules for callbacks. A node of the
// tree is 56 bytes of a pool's (detail/node_pool.hpp; a source or a token is one pointer more), a callback
// and a blocked waiter are their own list nodes, and cancelling allocates nothing.
//
// Invariants. The code in detail/cancel_node, cancel_links, cancel_walk and cancel_tree.hpp, the stress tests and
// the model check refer to them by number.
//
//  I1  A lane (a list with its lock, one inside every node) and its flags change under the lane's lock
//      only. The lock guards a few loads and stores: no user code, no allocation, no system call but
//      the wakes of I8.
//  I2  `cancelled_flag` in a node's own lane is the one word that publishes: it is set once, never
//      cleared, with release, after the cause was written and after every descendant has it. So
//      is_cancelled() is one acquire load; who sees it true sees the cause; and who sees it in a
//      parent sees it in every child. The shards that a contended node has grown say it after that word.
//  I3  Locks are taken from the top down: a lane of the parent before any of the child, and never two
//      siblings'. A canceller keeps a node locked until its whole subtree is marked. Paths in an acyclic
//      graph that are locked from the top down can't deadlock; and a canceller from above that meets
//      one further down waits for its lock, hence for its marking: when cancel() has returned true,
//      all below is marked, whoever marked it.
//  I4  A child stays linked to its parent until it is destroyed, cancelled or not; only its own last
//      release unlinks it. So a node's way up is constant, and a parent outlives its children.
//  I5  Handles count tokens, the source, and cancellers at work. A handle comes from a handle, or is
//      made under a lane's lock of the node or, by the timer thread, under its timer's lock. The last
//      one is given up under the parent's lane lock, all of the node's own, and with its timer
//      disarmed, so nobody can make another meanwhile. A node without links, shards or timer whose
//      lane is seen unlocked (acquire) has nobody in it any more, and needs no lock of its own. Without
//      the lock handles are looked at before links: who gives up a handle has linked before that.
//  I6  What hangs on a node keeps it: with the last handle gone but links left, the node is an orphan,
//      and who empties a lane of an orphan takes a handle under that lane's lock and releases it.
//  I7  A callback stays linked until its destructor, also while it runs and after. So its destructor can
//      always take the lane's lock, finds there whether it is pending, running or finished, and waits,
//      if it runs on another thread, on its own word; the runner writes that word last.
//  I8  A waiter is taken out, its word is set, and it is woken by address (and a descriptor is written to),
//      under the lane's lock and after the whole subtree is marked; at the node that was cancelled that is
//      done before its lock is let go, but after it is published. Then the waiter may leave without a lock. A waker (of wait() on a
//      condition variable, of accept()) is called in the same place, before any callback is run: it is the
//      library's own, and only hands the waiter to a thread that gets it out (detail/nudge.hpp). It stays
//      linked as I7 has it, so its destructor, which takes the lane's lock, comes before the call or after it.
//  I9  Neither cancelling nor destroying recurses: the way up is in the links, nodes with something to
//      run are listed through Node::extra, and orphans are let go in a loop.
//
// Why lanes stay locked while the subtree is marked, instead of references to everything on the way:
// a reference is two atomic read-modify-writes a node, a lock with a plain store to unlock is one; and
// I3's last sentence would need a second protocol.
//
// What was tried, and what it gave (one thread, g++ 12 -O2, AMD Zen 5 as a virtual machine; tests/bench
// measures it on yours). With each node from malloc a child made and destroyed took 20.7 ns, 5.4 of them malloc
// and free, some 9 the two locks. Nodes from the pool: 16.5. The short way of a child that nobody has seen, with
// all that is rare out of line: 14.4, and 165 instructions instead of 341. Letting go a tree of 10^6 went from
// 16.6 to 13.4 ns a node (wide), 25 to 23 (a chain), and a node from 64 bytes to 56. The pool's slabs: of 64 KiB
// they made the chain slower than malloc did (29 ns, and 17 instead of 10 to cancel), of 256 KiB not; of 2 MiB
// in huge pages wide trees took 11 and chains 20, but then the first node of a process is 2 MiB. A lock by
// fetch_or, which needs no load before, gained nothing over load and compare-exchange.
#pragma once

#include <lastcall/cause.hpp>
#include <lastcall/detail/cancel_tree.hpp>

#include <initializer_list>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

namespace lastcall {

template <class F>
class CancellationCallback;

/// Observes a node of the tree. Copying it is one relaxed counter. Every const member may be called
/// from any thread at any time; a token stays valid after its source is gone. In a signal handler only
/// is_cancelled() is safe.
class CancellationToken {
 public:
  /// std::stoppable_token (C++26): the callback type for a callable F.
  template <class F>
  using callback_type = CancellationCallback<F>;

  /// Can never be cancelled, as Go's context.Background().
  CancellationToken() noexcept = default;
  CancellationToken(const CancellationToken& other) noexcept : node_(other.node_) {
    if (node_ != nullptr) detail::retain(node_);
  }
  CancellationToken(CancellationToken&& other) noexcept
      : node_(std::exchange(other.node_, nullptr)) {}
  CancellationToken& operator=(const CancellationToken& other) noexcept {
    CancellationToken(other).swap(*this);
    return *this;
  }
  CancellationToken& operator=(CancellationToken&& other) noexcept {
    CancellationToken(std::move(other)).swap(*this);
    return *this;
  }
  ~CancellationToken() {
    if (node_ != nullptr) detail::release(node_);
  }
  void swap(CancellationToken& other) noexcept { std::swap(node_, other.node_); }

  /// One atomic load, at any depth. Once true, always true; all that the canceller did before is
  /// visible then, and every descendant is cancelled too.
  bool is_cancelled() const noexcept { return node_ != nullptr && detail::is_cancelled(node_); }

  /// False when nothing is left that could ever cancel it: no source or deadline of its own or above.
  /// A cancelled one says true. Cost: a walk to the root, through any_of to all of them.
  bool can_be_cancelled() const noexcept {
    return node_ != nullptr && detail::can_be_cancelled(node_);
  }

  /// Why. Kind none until cancelled, then always the same.
  Cause cause() const noexcept {
    return is_cancelled() ? detail::CauseAccess::share(node_->cause) : Cause();
  }

  /// The nearest of its own and its ancestors' deadlines, if there is one.
  std::optional<Clock::time_point> deadline() const noexcept {
    return node_ == nullptr ? std::nullopt : detail::nearest_deadline(node_);
  }

  /// Blocks until cancelled; for ever on a token that can't be. No allocation, no wake-up before.
  void wait() const { wait_until(Clock::time_point::max()); }

  /// An interruptible sleep: blocks until cancelled (true) or for the time given (false, and not a
  /// moment sooner).
  template <class Rep, class Period>
  bool wait_for(std::chrono::duration<Rep, Period> duration) const {
    return is_cancelled() || wait_until(detail::deadline_after(duration));
  }

  /// The same until a time point of Clock.
  template <class Duration>
  bool wait_until(std::chrono::time_point<Clock, Duration> time) const {
    const Clock::time_point deadline = detail::saturated(time);
    if (node_ != nullptr) return detail::wait_on(node_, deadline);
    const detail::Word nobody{0};
    while (Clock::now() < deadline) detail::futex_wait_until(nobody, 0, deadline);
    return false;
  }

  /// Throws OperationCancelled with the cause if cancelled.
  void throw_if_cancelled() const {
    if (is_cancelled()) detail::throw_or_die(OperationCancelled(cause()));
  }

  /// A descriptor that polls readable (POLLIN) once cancelled and for ever after, for poll, epoll and
  /// event loops. Made on first use, close-on-exec, the same at each call; the tree owns it: never read
  /// or close it. It lives as long as the node: keep a token. A forked child has to ask again: until it does,
  /// what is behind the number is its parent's. -1 if it can never be cancelled. Throws
  /// std::system_error (EMFILE, ENFILE) or std::bad_alloc, and then nothing has changed.
  int fd() const { return node_ == nullptr ? -1 : detail::pollable_fd(node_); }

  /// With stop_possible(): the names of C++26's std::stoppable_token.
  bool stop_requested() const noexcept { return is_cancelled(); }
  bool stop_possible() const noexcept { return can_be_cancelled(); }

  /// Whether both observe the same node.
  friend bool operator==(const CancellationToken& a, const CancellationToken& b) noexcept {
    return a.node_ == b.node_;
  }

 private:
  friend struct detail::TreeAccess;
  explicit CancellationToken(detail::Node* adopted) noexcept : node_(adopted) {}

  detail::Node* node_ = nullptr;
};

/// Owns a node of the tree and cancels it. Move-only. cancel() and token() are thread-safe; moving,
/// disarming and destroying are not.
class CancellationSource {
 public:
  /// A root. May throw std::bad_alloc, as may the other constructors.
  CancellationSource() : node_(tag(detail::make_root())) {}

  /// context.WithCancel: cancelled when `parent` is, at the latest. Under a cancelled parent it is born
  /// cancelled with the parent's cause; under an empty token it is a root.
  explicit CancellationSource(const CancellationToken& parent)
      : node_(tag(detail::make_child(detail::TreeAccess::peek(parent)))) {}

  /// context.WithTimeout. A timeout of zero or less: born cancelled, deadline_exceeded. Never early;
  /// at most a tick (1 ms) and a wake-up late. The first deadline of a process starts the timer
  /// thread: std::system_error (EAGAIN) if that can't be had. In a forked child a deadline from before the
  /// fork doesn't come, unless the parent had no other thread and the child sets a deadline of its own.
  template <class Rep, class Period>
  CancellationSource(const CancellationToken& parent, std::chrono::duration<Rep, Period> timeout)
      : CancellationSource(parent, Clock::now(), timeout) {}

  /// context.WithDeadline. A parent's earlier deadline beats it, and then it costs no timer.
  template <class Duration>
  CancellationSource(const CancellationToken& parent,
                     std::chrono::time_point<Clock, Duration> deadline)
      : node_(tag(detail::make_timed_child(detail::TreeAccess::peek(parent),
                                           detail::saturated(deadline), Clock::now()))) {}

  /// Cancelled with the first of them, with its cause. Of none, or of empty tokens: a root.
  static CancellationSource any_of(std::span<const CancellationToken> parents) {
    const detail::Owned<detail::Node*[]> nodes(new detail::Node*[parents.size()]);
    std::size_t count = 0;
    for (const CancellationToken& parent : parents) {
      if (detail::Node* const node = detail::TreeAccess::peek(parent)) nodes[count++] = node;
    }
    return CancellationSource(count == 0 ? detail::make_root()
                                         : detail::make_join(nodes.get(), count));
  }
  static CancellationSource any_of(std::initializer_list<CancellationToken> parents) {
    return any_of(std::span<const CancellationToken>(parents.begin(), parents.size()));
  }

  CancellationSource(CancellationSource&& other) noexcept : node_(std::exchange(other.node_, 0)) {}
  /// Cancels what it owned, unless that was disarmed.
  CancellationSource& operator=(CancellationSource&& other) noexcept {
    CancellationSource taken(std::move(other));
    std::swap(node_, taken.node_);
    return *this;
  }
  /// Cancels: the `defer cancel()` that nobody can forget. Callbacks run here then.
  ~CancellationSource() {
    detail::Node* const node = get();
    if (node == nullptr) return;
    if ((node_ & disarmed_bit) == 0) {
      detail::abandon_node(node);
    } else {
      detail::disown_node(node);
    }
  }

  /// Its destructor won't cancel any more; cancel() still does.
  void disarm() noexcept {
    if (get() != nullptr) node_ |= disarmed_bit;
  }

  /// A token of this node; the empty token if moved from.
  CancellationToken token() const noexcept {
    detail::Node* const node = get();
    if (node == nullptr) return {};
    detail::retain(node);
    return detail::TreeAccess::adopt(node);
  }

  /// Cancels this node and all below it, wakes who waits, and runs the callbacks on this thread. True
  /// for the one call that did it: then every descendant is cancelled when it returns. False if it was
  /// cancelled already, or moved from. An empty cause means Cause::cancelled(). Neither allocates nor
  /// throws; one pass over the subtree.
  bool cancel(Cause cause = Cause::cancelled()) noexcept {
    detail::Node* const node = get();
    if (node == nullptr) return false;
    const detail::CauseRecord* const record = detail::CauseAccess::peek(cause);
    return detail::cancel_node(
        node, record == nullptr ? detail::record_of(detail::CommonCause::cancelled) : record);
  }

  /// As its token's: one load.
  bool is_cancelled() const noexcept {
    const detail::Node* const node = get();
    return node != nullptr && detail::is_cancelled(node);
  }

 private:
  friend struct detail::TreeAccess;
  // In the low bit of the pointer, so that a source is one word.
  static constexpr std::uintptr_t disarmed_bit = 1;

  explicit CancellationSource(detail::Node* adopted) noexcept : node_(tag(adopted)) {}
  template <class Duration>
  CancellationSource(const CancellationToken& parent, Clock::time_point now, Duration timeout)
      : node_(tag(detail::make_timed_child(detail::TreeAccess::peek(parent),
                                           detail::time_after(now, timeout), now))) {}
  static std::uintptr_t tag(detail::Node* node) noexcept {
    return reinterpret_cast<std::uintptr_t>(node);
  }
  detail::Node* get() const noexcept {
    return reinterpret_cast<detail::Node*>(node_ & ~disarmed_bit);
  }

  std::uintptr_t node_ = 0;
};

/// Runs a callable when its token is cancelled: std::stop_callback's rules, to the letter.
///
/// It runs once, on the cancelling thread, with no lock held; on a token that is cancelled already, in
/// the constructor. One that throws terminates. The destructor takes it out; if it is running on another
/// thread, it waits for that one callback; inside itself it doesn't wait. Costs no allocation; keeps
/// what it needs of the tree alive.
template <class F>
class CancellationCallback : private detail::CallbackLink {
 public:
  static_assert(std::is_invocable_v<F>, "a cancellation callback is called without arguments");
  static_assert(std::is_destructible_v<F>);
  using callback_type = F;

  template <class Init>
  requires std::is_constructible_v<F, Init> CancellationCallback(const CancellationToken& token,
                                                                 Init&& f)
  noexcept(std::is_nothrow_constructible_v<F, Init>) : function_(std::forward<Init>(f)) {
    enlist(detail::TreeAccess::peek(token));
  }
  template <class Init>
  requires std::is_constructible_v<F, Init> CancellationCallback(CancellationToken&& token,
                                                                 Init&& f)
  noexcept(std::is_nothrow_constructible_v<F, Init>) : function_(std::forward<Init>(f)) {
    // Its link keeps the node, so the token may go.
    const CancellationToken taken(std::move(token));
    enlist(detail::TreeAccess::peek(taken));
  }
  CancellationCallback(const CancellationCallback&) = delete;
  CancellationCallback& operator=(const CancellationCallback&) = delete;
  ~CancellationCallback() { detail::remove_callback(this); }

 private:
  void enlist(detail::Node* node) noexcept {
    this->invoke = [](detail::CallbackLink* link) noexcept {
      static_cast<CancellationCallback*>(link)->call();
    };
    if (node != nullptr && !detail::attach(node, this, detail::LinkKind::callback)) call();
  }
  void call() noexcept { static_cast<void>(std::forward<F>(function_)()); }

  [[no_unique_address]] F function_;
};

template <class F>
CancellationCallback(CancellationToken, F) -> CancellationCallback<F>;

}  // namespace lastcall
