// How traps come to be in the registry's lists and go from there.
// All of it is called under the registry's lock: so relaxed, where nothing else is said, is for what only
// who has it changes. `previous` is released, and acquired, because handlers read it without.
#pragma once

#include <lastcall/detail/signal_handler.hpp>
#include <lastcall/detail/signal_lock.hpp>
#include <lastcall/detail/signal_registry.hpp>

#include <atomic>
#include <csignal>
#include <cstdint>

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

enum class Subscribed { yes, refused, no_layer, no_memory };

/// A layer for a new trap of a number whose disposition `now` is somebody else's, with `previous`
/// set to it; -1 if there is none.
inline int choose_layer(int number, const struct sigaction& now,
                        const KeptDisposition* kept) noexcept {
  int spare = -1;
  int oldest = -1;
  int same = 0;
  for (int index = signal_layers - 1; index >= 0; --index) {
    const SignalLayer& at = signal_registry.layers[index][number];
    if (at.taken && at.head.load(std::memory_order_relaxed) != nullptr) continue;
    // Over what is no function the chain ends here, whoever may call the layer still.
    if (!at.taken || !is_function(now)) spare = index;
    // Covered once, and nobody's now.
    if (!at.taken || at.previous.load(std::memory_order_relaxed) != kept) continue;
    if (at.seat.load(std::memory_order_relaxed) == 0) {
      spare = index;  // in place again, it has given way
      continue;
    }
    ++same;
    if (oldest < 0 || was_put_later(number, oldest, index)) oldest = index;
  }
  // A function that has come back may have come over our layer, and calls that one: there a chain would bite
  // its tail. But it has written down one, the latest; so what it covered before that is free.
  if (same > (is_function(now) ? 1 : 0)) spare = oldest;
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
      // Before the handler is in place, too; release: who finds the seat finds `previous`.
      const std::uint32_t seat = layer.seat.load(std::memory_order_relaxed);
      layer.passing.store(0, std::memory_order_relaxed);
      layer.seat.store(next_seat(), std::memory_order_release);
      error = install_layer(index, number, &before);
      // Who races with us without end has it as it was seen.
      const bool again = error == 0 && !adopt_replaced(layer, now, before) && turn < 100;
      if (error != 0) layer.seat.store(seat, std::memory_order_release);
      if (again) {
        now = step_aside(index, number, before);
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

/// A handler goes that traps or SignalIgnores were put over, which outlive it: what was there before it is what
/// they put back, and call on, from now on.
inline void replace_beneath(int number, const struct sigaction& going,
                            const KeptDisposition* before) noexcept {
  for (auto& layer : signal_registry.layers) {
    std::atomic<const KeptDisposition*>& previous = layer[number].previous;
    const KeptDisposition* const found = previous.load(std::memory_order_relaxed);
    if (found != nullptr && same_function(found->action, going)) {
      previous.store(before, std::memory_order_release);
    }
  }
  IgnoredSignal& ignored = signal_registry.ignored[number];
  if (ignored.count > 0 && same_function(ignored.before->action, going)) ignored.before = before;
}

/// Whether a live trap of this registry holds the number.
inline bool is_trapped(int number) noexcept {
  for (const auto& layer : signal_registry.layers) {
    if (layer[number].head.load(std::memory_order_relaxed) != nullptr) return true;
  }
  return false;
}

}  // namespace lastcall::detail
