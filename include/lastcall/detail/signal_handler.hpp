// The signal handler. Everything in this file is async-signal-safe.
#pragma once

#include <lastcall/detail/signal_inbox.hpp>
#include <lastcall/detail/signal_numbers.hpp>
#include <lastcall/detail/signal_registry.hpp>

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>

namespace lastcall::detail {

using SignalEntry = void (*)(int, siginfo_t*, void*);

inline void on_signal(int layer, int number, siginfo_t* info, void* context);

/// The function that the kernel calls: one for each layer.
template <int Layer>
void signal_entry(int number, siginfo_t* info, void* context) {
  const int saved = errno;
  on_signal(Layer, number, info, context);
  errno = saved;
}

inline constexpr SignalEntry signal_entries[signal_layers] = {
    signal_entry<0>, signal_entry<1>, signal_entry<2>, signal_entry<3>,
    signal_entry<4>, signal_entry<5>, signal_entry<6>, signal_entry<7>};

/// Which of our layers a disposition is; -1: it is somebody else's.
inline int layer_of(const struct sigaction& action) noexcept {
  if (!is_function(action)) return -1;
  for (int layer = 0; layer < signal_layers; ++layer) {
    if (action.sa_sigaction == signal_entries[layer]) return layer;
  }
  return -1;
}

/// Puts a layer's handler in place; 0 or an errno. Async-signal-safe.
inline int install_layer(int layer, int number, struct sigaction* before) noexcept {
  struct sigaction ours {};
  ours.sa_sigaction = signal_entries[layer];
  ours.sa_flags = SA_RESTART | SA_SIGINFO | SA_ONSTACK;
  ::sigfillset(&ours.sa_mask);
  return ::sigaction(number, &ours, before) == 0 ? 0 : errno;
}

/// Puts `wanted` in place of a disposition that is ours by `is_ours`, and in place of nobody else's; returns
/// what is in place now. Async-signal-safe.
template <class IsOurs>
struct sigaction replace_disposition(int number, const struct sigaction& wanted,
                                     IsOurs is_ours) noexcept {
  struct sigaction put = wanted;
  struct sigaction replaced {};
  if (::sigaction(number, &put, &replaced) != 0 || is_ours(replaced)) return put;
  // Somebody else's sigaction() came since the caller looked. Theirs goes back, the newest if there are more.
  // (There is no compare-and-exchange of dispositions, so who looks at this very moment sees ours.)
  for (int turn = 0; turn < 100; ++turn) {
    const struct sigaction theirs = replaced;
    ::sigaction(number, &theirs, &replaced);
    if (same_disposition(replaced, put)) return theirs;
    put = theirs;
  }
  return put;
}
inline struct sigaction replace_layer(int layer, int number,
                                      const struct sigaction& wanted) noexcept {
  return replace_disposition(number, wanted, [layer](const struct sigaction& action) {
    return layer_of(action) == layer;
  });
}

/// Takes a layer's handler away from where it is in place, for `wanted`; returns what is in place now. Under the
/// flag of I8. Async-signal-safe.
inline struct sigaction step_aside(int index, int number, const struct sigaction& wanted) noexcept {
  std::atomic<std::uint32_t>& seat = signal_registry.layers[index][number].seat;
  const std::uint32_t before = seat.load(std::memory_order_relaxed);
  // First: who finds the previous handler in place finds out, too, that it was we who put it there. The two
  // system calls, which take one lock, order the stores for a thread that sees their effect.
  seat.store(0, std::memory_order_seq_cst);
  const struct sigaction now = replace_layer(index, number, wanted);
  // Somebody else's has covered it at this moment.
  if (!same_disposition(now, wanted)) seat.store(before, std::memory_order_release);
  return now;
}

/// Whether layer `a` was put in place after `b`, both by the clock of their seats.
inline bool was_put_later(int number, int a, int b) noexcept {
  // acquire: what was there before the layer is what was found.
  const auto seat_of = [number](int index) {
    return signal_registry.layers[index][number].seat.load(std::memory_order_acquire);
  };
  const std::uint32_t later = seat_of(a);
  const std::uint32_t earlier = seat_of(b);
  // The clock may have gone round.
  return later != 0 && earlier != 0 && later != earlier && later - earlier < 0x80000000U;
}

/// Whether siginfo says who sent the signal: in other signals' records those bytes mean other
/// things.
inline bool tells_sender(int number, int code) noexcept {
  if (code == SI_USER || code == SI_QUEUE) return true;
#if defined(SI_TKILL)
  if (code == SI_TKILL) return true;
#endif
#if defined(SI_LWP)
  if (code == SI_LWP) return true;
#endif
#if defined(SI_MESGQ)
  if (code == SI_MESGQ) return true;
#endif
  return number == SIGCHLD && code > 0;
}

inline SignalRecord record_of(int number, const siginfo_t* info, Clock::rep received) noexcept {
  SignalRecord record{};
  record.number = static_cast<std::uint16_t>(number);
  record.received = received;
  if (info != nullptr) {
    record.code = info->si_code;
    if (tells_sender(number, info->si_code)) {
      record.sender_pid = info->si_pid;
      record.sender_uid = info->si_uid;
    }
  }
  return record;
}

/// Gives the signal to every trap of `count` layers from `first` on; false if there is none. `others`: a trap of
/// another layer has got it. `since` is when it came, null: now. (I5, I6)
inline bool hand_round(int first, int count, int number, const siginfo_t* info, bool others,
                       const Clock::time_point* since = nullptr) noexcept {
  // Any of the two sides is right; the latest is only the better one (I6). So: relaxed.
  const unsigned side = signal_registry.epoch.load(std::memory_order_relaxed) & 1U;
  // Sequentially consistent, as are the loads of the list: either the one who unlinks sees this
  // thread in flight, or this thread sees the list without what was unlinked.
  signal_registry.in_flight[side].fetch_add(1, std::memory_order_seq_cst);
  SignalSubscription* lists[signal_layers];
  int any = 0;
  for (int index = first; index < first + count; ++index) {
    SignalSubscription* head =
        signal_registry.layers[index][number].head.load(std::memory_order_seq_cst);
    if (head != nullptr) lists[any++] = head;
  }
  if (any > 0) {
    SignalRecord record = record_of(
        number, info, since == nullptr ? now_in_handler() : since->time_since_epoch().count());
    for (int list = 0; list < any; ++list) {
      SignalSubscription* at = lists[list];
      SignalSubscription* next = at->next.load(std::memory_order_seq_cst);
      record.exclusive = !others && any == 1 && next == nullptr;
      // Each link is read once, so who counted as "another trap" is given the signal for certain.
      for (;;) {
        at->inbox->post(record);
        if (next == nullptr) break;
        at = next;
        next = at->next.load(std::memory_order_seq_cst);
      }
    }
  }
  // Release: all that was read and written here is over before who waits for it frees anything.
  signal_registry.in_flight[side].fetch_sub(1, std::memory_order_release);
  return any > 0;
}

// ---- A signal on its way through several layers (I11). All relaxed: who passes a signal on and who sees it
// come are one thread, and otherwise these are counts.

inline constexpr std::uint32_t one_passing = 1;
inline constexpr std::uint32_t one_unseen = 0x10000;
inline constexpr std::uint32_t all_passing = 0xFFFF;

/// The layer has handed the signal out, and calls the next handler; false if too many others do.
inline bool begin_passing(SignalLayer& layer) noexcept {
  signal_registry.passes_on.store(true, std::memory_order_relaxed);
  std::uint32_t seen = layer.passing.load(std::memory_order_relaxed);
  do {
    // Those that have never come back are counted, too.
    if ((seen & all_passing) == all_passing) return false;
  } while (!layer.passing.compare_exchange_weak(seen, seen + one_passing + one_unseen,
                                                std::memory_order_relaxed));
  return true;
}

/// The handler has returned: no more can be unseen than are on their way.
inline void end_passing(SignalLayer& layer) noexcept {
  std::uint32_t seen = layer.passing.load(std::memory_order_relaxed);
  std::uint32_t next = 0;
  do {
    // A new trap has set the counts to zero meanwhile.
    if ((seen & all_passing) == 0) return;
    next = seen - one_passing;
    if (next / one_unseen > (next & all_passing)) next -= one_unseen;
  } while (!layer.passing.compare_exchange_weak(seen, next, std::memory_order_relaxed));
}

/// Whether the signal that has come to a layer was handed out by one above.
inline bool was_handed_out_above(int index, int number) noexcept {
  if (!signal_registry.passes_on.load(std::memory_order_relaxed)) return false;
  bool any = false;
  for (int above = 0; above < signal_layers; ++above) {
    SignalLayer& layer = signal_registry.layers[above][number];
    std::uint32_t seen = layer.passing.load(std::memory_order_relaxed);
    if (seen < one_unseen || !was_put_later(number, above, index)) continue;
    while (seen >= one_unseen) {
      if (layer.passing.compare_exchange_weak(seen, seen - one_unseen, std::memory_order_relaxed)) {
        any = true;
        break;
      }
    }
  }
  return any;
}

// ---- The handler beneath

/// Whether two dispositions are one function, however they were installed.
inline bool same_function(const struct sigaction& a, const struct sigaction& b) noexcept {
  return is_function(a) && is_function(b) && a.sa_handler == b.sa_handler;
}

/// Whether the handler that a layer was put over has since been put over the layer: then it is who has called
/// us, and would again. (I9)
inline bool is_above(int index, int number, const struct sigaction& previous) noexcept {
  const std::atomic<std::uint32_t>& seat = signal_registry.layers[index][number].seat;
  // acquire, twice: with the same seat before and after, nobody has taken the layer away between.
  const std::uint32_t before = seat.load(std::memory_order_acquire);
  if (before == 0) return false;
  const struct sigaction now = current_disposition(number);
  if (layer_of(now) == index) return false;
  if (same_function(now, previous)) return seat.load(std::memory_order_acquire) == before;
  // A later layer of ours found it in place.
  for (int other = 0; other < signal_layers; ++other) {
    if (other == index || !was_put_later(number, other, index)) continue;
    const KeptDisposition* found =
        signal_registry.layers[other][number].previous.load(std::memory_order_acquire);
    if (found != nullptr && same_function(found->action, previous)) return true;
  }
  return false;
}

/// A signal in a layer of ours.
struct SignalPassage {
  int index;
  int number;
  siginfo_t* info;
  void* context;
  bool own;     // the lists speak of this process
  bool handed;  // a trap has got it, here or above
  SignalLayer& layer() const noexcept { return signal_registry.layers[index][number]; }
};

/// Calls the handler that ours replaced; false if there was no function. Not in flight any more: it
/// may hang, or jump, without anybody's waiting for it (I7). `in_place`: ours was the one that the kernel calls.
inline bool call_previous(const SignalPassage& signal, bool in_place) {
  SignalLayer& layer = signal.layer();
  // Acquire: the disposition is read as it was written.
  const KeptDisposition* previous = layer.previous.load(std::memory_order_acquire);
  if (previous == nullptr || !is_function(previous->action)) return false;
  if (!in_place && is_above(signal.index, signal.number, previous->action)) return true;
  while (signal.own && previous->once_called != nullptr) {
    if (layer.previous.compare_exchange_weak(previous, previous->once_called,
                                             std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
      break;
    }
  }
  if (!is_function(previous->action)) return false;  // another thread has spent it
  const bool passing = signal.own && signal.handed && begin_passing(layer);
  if ((static_cast<unsigned>(previous->action.sa_flags) & static_cast<unsigned>(SA_SIGINFO)) != 0) {
    previous->action.sa_sigaction(signal.number, signal.info, signal.context);
  } else {
    previous->action.sa_handler(signal.number);
  }
  if (passing) end_passing(layer);
  return true;
}

/// No trap of the layer wants the signal: does what would have been done without us. False: a trap
/// has come meanwhile, and the signal is its. (I8)
inline bool act_as_previous(const SignalPassage& signal) {
  const int number = signal.number;
  SignalLayer& layer = signal.layer();
  struct sigaction now = current_disposition(number);
  const bool in_place = layer_of(now) == signal.index;
  if (in_place) {
    // Nobody else's handler is above: what is raised again comes straight back here.
    std::atomic<bool>& changing = signal_registry.changing;
    // acquire and release: the lock's flag (signal_lock.hpp). So relaxed is enough for the list under it.
    if (signal.own && changing.exchange(true, std::memory_order_acquire)) {
      ::raise(number);
      return true;
    }
    if (signal.own && layer.head.load(std::memory_order_relaxed) != nullptr) {
      changing.store(false, std::memory_order_release);
      return false;
    }
    // Out of the way first. So who is called next finds itself in place: it may be the handler of
    // another copy of this library, with no trap left either.
    const KeptDisposition* next = layer.previous.load(std::memory_order_acquire);
    if (next->once_called != nullptr) next = next->once_called;
    if (signal.own) {
      now = step_aside(signal.index, number, next->action);
      changing.store(false, std::memory_order_release);
    } else {
      now = replace_layer(signal.index, number, next->action);  // the seat may be the parent's
    }
  }
  if (call_previous(signal, in_place)) return true;
  // The number is blocked here: it acts when the handler returns. If it wasn't we who put SIG_DFL
  // there, nobody can have called us: the signal was on its way when the last trap went.
  if (!is_function(now) && now.sa_handler == SIG_DFL) ::raise(number);
  return true;
}

inline void on_signal(int layer, int number, siginfo_t* info, void* context) {
  if (!is_signal_number(number)) return;
  SignalPassage signal{layer, number, info, context, false, false};
  // Acquire, for the lists that were reset before it was set. A child of vfork() or of a bare
  // clone(), or of fork() before our own hook ran, is nobody the lists speak of.
  signal.own = signal_registry.process.load(std::memory_order_acquire) == ::getpid();
  signal.handed = signal.own && was_handed_out_above(layer, number);
  for (;;) {
    if (signal.own && hand_round(layer, 1, number, info, signal.handed)) {
      signal.handed = true;
      call_previous(signal, false);
      return;
    }
    if (act_as_previous(signal)) return;
  }
}

}  // namespace lastcall::detail
