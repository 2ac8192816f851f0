// How traps come to be in the registry's lists and go from there, and what a fork makes of them.
// All of it is called under the registry's lock: so relaxed, where nothing else is said, is for what only
// who has it changes. `previous` is released, and acquired, because handlers read it without.
#pragma once

#include <lastcall/detail/signal_handler.hpp>
#include <lastcall/detail/signal_registry.hpp>

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>

namespace lastcall::detail {

/// Waits until no handler is left that can have seen what was unlinked before (I6).
inline void wait_for_handlers() noexcept {
  // seq_cst: the unlinking, the turning and the reading of zero stand in one order with what a handler does
  // in hand_round(); the zero acquires what it released when it left.
  for (int round = 0; round < 2; ++round) {
    const unsigned side = signal_registry.epoch.fetch_add(1, std::memory_order_seq_cst) & 1U;
    for (int turn = 0; signal_registry.in_flight[side].load(std::memory_order_seq_cst) != 0;
         ++turn) {
      back_off(turn);
    }
  }
}

inline void enlist(SignalMember& member) noexcept {
  member.older = signal_registry.newest;
  member.newer = nullptr;
  if (member.older != nullptr) member.older->newer = &member;
  signal_registry.newest = &member;
}

inline void strike_out(SignalMember& member) noexcept {
  if (member.newer != nullptr) {
    member.newer->older = member.older;
  } else {
    signal_registry.newest = member.older;
  }
  if (member.older != nullptr) member.older->newer = member.newer;
}

/// What has become of a layer's place in the chain once its last trap has gone.
enum class LayerLeft { restored_default, restored, covered };

/// The last trap of a layer has been unlinked: what was there before comes back, unless somebody
/// else has changed the disposition since. Async-signal-safe.
inline LayerLeft leave_layer(int layer_index, int number) noexcept {
  SignalLayer& layer = signal_registry.layers[layer_index][number];
  const KeptDisposition* previous = layer.previous.load(std::memory_order_acquire);
  struct sigaction now = current_disposition(number);
  if (layer_of(now) == layer_index) now = replace_layer(layer_index, number, previous->action);
  if (!same_disposition(now, previous->action)) {
    return LayerLeft::covered;  // somebody may still call our handler: the layer stays taken
  }
  layer.taken = false;
  return !is_function(previous->action) && previous->action.sa_handler == SIG_DFL
             ? LayerLeft::restored_default
             : LayerLeft::restored;
}

/// The process is the child of the one that the lists speak of: all traps and the threads that were
/// in the handler stayed with the parent. Async-signal-safe, since a child of a process with
/// threads may do nothing else.
inline void become_child() noexcept {
  const int saved = errno;
  SignalRegistry& all = signal_registry;
  for (int layer = 0; layer < signal_layers; ++layer) {
    for (int number = 1; number < signal_limit; ++number) {
      SignalLayer& at = all.layers[layer][number];
      if (!at.taken) continue;
      at.head.store(nullptr, std::memory_order_seq_cst);  // as every change of a list
      // Now, and not with the next signal: an ignored one must be ignored beyond an exec() too.
      leave_layer(layer, number);
    }
  }
  // relaxed, as the next: no other thread is in this process, and a handler of this one comes later.
  all.in_flight[0].store(0, std::memory_order_relaxed);
  all.in_flight[1].store(0, std::memory_order_relaxed);
  int nowhere[2] = {-1, -1};
  if (all.newest != nullptr && ::pipe(nowhere) != 0) nowhere[0] = nowhere[1] = -1;
  for (SignalMember* member = all.newest; member != nullptr; member = member->older) {
    member->process.store(0, std::memory_order_relaxed);
    member->inbox.cut_off(nowhere[0], nowhere[1]);
  }
  all.newest = nullptr;
  for (const int fd : nowhere) {
    if (fd >= 0) ::close(fd);
  }
  // Release: the handler that finds itself at home finds the lists empty.
  all.process.store(::getpid(), std::memory_order_release);
  errno = saved;
}

inline void before_fork() noexcept {
  const sigset_t mask = lock_registry();
  signal_registry.mask_before_fork = mask;
}
inline void after_fork_in_parent() noexcept {
  const sigset_t mask = signal_registry.mask_before_fork;
  unlock_registry(mask);
}
inline void after_fork_in_child() noexcept {
  if (signal_registry.process.load(std::memory_order_relaxed) != 0) become_child();
  after_fork_in_parent();
}

/// Before anything is subscribed or ignored: forks are watched, and the lists speak of this
/// process. 0 or an errno.
inline int enter_registry() noexcept {
  SignalRegistry& all = signal_registry;
  if (!all.watches_forks) {
    const int error = ::pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    if (error != 0) return error;
    all.watches_forks = true;
  }
  const pid_t process = all.process.load(std::memory_order_relaxed);
  if (process == 0) {
    all.process.store(::getpid(), std::memory_order_release);
  } else if (process != ::getpid()) {
    become_child();  // of a clone() that ran no hooks
  }
  return 0;
}

enum class Subscribed { yes, refused, no_layer, no_memory };

/// A layer for a new trap of a number whose disposition `now` is somebody else's, with `previous`
/// set to it; -1 if there is none.
inline int choose_layer(int number, const struct sigaction& now,
                        const KeptDisposition* kept) noexcept {
  int spare = -1;
  for (int index = signal_layers - 1; index >= 0; --index) {
    const SignalLayer& at = signal_registry.layers[index][number];
    if (at.taken && at.head.load(std::memory_order_relaxed) != nullptr) continue;
    // Covered once, and nobody's now. With the same previous disposition it makes no chain that
    // wasn't there before; with one that is no function the chain ends here: both can be used
    // again.
    const bool same = at.taken && at.previous.load(std::memory_order_relaxed) == kept;
    if (!at.taken || same || !is_function(now)) spare = index;
    if (same) break;
  }
  if (spare >= 0) {
    signal_registry.layers[spare][number].previous.store(kept, std::memory_order_release);
  }
  return spare;
}

/// Links `member` to `number` at the head of a layer's list.
inline void link_at_head(SignalMember& member, int index, int number) noexcept {
  SignalLayer& layer = signal_registry.layers[index][number];
  SignalSubscription& link = member.subscriptions[number];
  link.inbox = &member.inbox;
  link.layer = index;
  link.next.store(layer.head.load(std::memory_order_relaxed), std::memory_order_relaxed);
  // Sequentially consistent for I6; and the link is complete by then.
  layer.head.store(&link, std::memory_order_seq_cst);
}

/// Takes it out again. It must not be reused or freed before wait_for_handlers().
inline void take_link_out(SignalMember& member, int number) noexcept {
  SignalSubscription& link = member.subscriptions[number];
  std::atomic<SignalSubscription*>* at = &signal_registry.layers[link.layer][number].head;
  for (;;) {
    SignalSubscription* next = at->load(std::memory_order_relaxed);
    if (next == &link) break;
    at = &next->next;
  }
  // The link itself still points on, for a handler that stands on it.
  at->store(link.next.load(std::memory_order_relaxed), std::memory_order_seq_cst);
  link.layer = -1;
}

/// Our handler has taken the place of `replaced`, where `expected` was seen: somebody else's sigaction()
/// came in between, and theirs is what was there before. False if the layer can't be put over that.
inline bool adopt_replaced(SignalLayer& layer, const struct sigaction& expected,
                           const struct sigaction& replaced) noexcept {
  if (same_disposition(replaced, expected)) return true;
  // Theirs might lead to a layer that was covered, and the chain would bite its tail.
  if (layer.taken && is_function(replaced)) return false;
  const KeptDisposition* kept = keep_disposition(replaced);
  if (kept == nullptr) return false;
  layer.previous.store(kept, std::memory_order_release);
  // What they have put back may be another layer of ours: for the signals of this moment only, since its
  // place is beneath no other, but beside its traps.
  return layer_of(replaced) < 0;
}

/// Links `member` to `number`, and puts our handler in place if it isn't. `error` is set if the
/// system refused. Under the lock, after enter_registry().
inline Subscribed link_subscription(SignalMember& member, int number, int& error) noexcept {
  struct sigaction now = current_disposition(number);
  for (int turn = 0;; ++turn) {
    int index = layer_of(now);
    const bool join = index >= 0;
    if (!join) {
      const KeptDisposition* kept = keep_disposition(now);
      if (kept == nullptr) return Subscribed::no_memory;
      index = choose_layer(number, now, kept);
      if (index < 0) return Subscribed::no_layer;
    }
    SignalLayer& layer = signal_registry.layers[index][number];
    // Before the handler is in place: it finds somebody from its first call on.
    link_at_head(member, index, number);
    if (!join) {
      struct sigaction before {};
      error = install_layer(index, number, &before);
      // Who races with us without end has it as it was seen.
      const bool again = error == 0 && !adopt_replaced(layer, now, before) && turn < 100;
      if (again) {
        now = replace_layer(index, number, before);
        // Somebody has covered ours in between, and may call it from now on.
        if (!same_disposition(now, before)) layer.taken = true;
      }
      if (error != 0 || again) {
        take_link_out(member, number);
        wait_for_handlers();  // one may have been called through somebody else's
      }
      if (error != 0) return Subscribed::refused;
      if (again) continue;
    }
    layer.taken = true;
    member.held.add(number);
    return Subscribed::yes;
  }
}

/// Unlinks `member` from `number`. The link must not be reused or freed before wait_for_handlers().
inline LayerLeft unlink_subscription(SignalMember& member, int number) noexcept {
  const int index = member.subscriptions[number].layer;
  const SignalLayer& layer = signal_registry.layers[index][number];
  take_link_out(member, number);
  member.held.remove(number);
  if (layer.head.load(std::memory_order_relaxed) != nullptr) return LayerLeft::restored;
  return leave_layer(index, number);
}

/// Whether a live trap of this registry holds the number.
inline bool is_trapped(int number) noexcept {
  for (const auto& layer : signal_registry.layers) {
    if (layer[number].head.load(std::memory_order_relaxed) != nullptr) return true;
  }
  return false;
}

}  // namespace lastcall::detail
