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

/// Gives the signal to every trap of the layer; false if there is none. `since` is when it came, null: now.
/// (I5, I6)
inline bool hand_round(SignalLayer& layer, int number, const siginfo_t* info,
                       const Clock::time_point* since = nullptr) noexcept {
  // Any of the two sides is right; the latest is only the better one (I6). So: relaxed.
  const unsigned side = signal_registry.epoch.load(std::memory_order_relaxed) & 1U;
  // Sequentially consistent, as are the loads of the list: either the one who unlinks sees this
  // thread in flight, or this thread sees the list without what was unlinked.
  signal_registry.in_flight[side].fetch_add(1, std::memory_order_seq_cst);
  SignalSubscription* at = layer.head.load(std::memory_order_seq_cst);
  const bool any = at != nullptr;
  if (any) {
    SignalRecord record = record_of(
        number, info, since == nullptr ? now_in_handler() : since->time_since_epoch().count());
    SignalSubscription* next = at->next.load(std::memory_order_seq_cst);
    record.exclusive = next == nullptr;
    // Each link is read once, so who counted as "another trap" is given the signal for certain.
    for (;;) {
      at->inbox->post(record);
      if (next == nullptr) break;
      at = next;
      next = at->next.load(std::memory_order_seq_cst);
    }
  }
  // Release: all that was read and written here is over before who waits for it frees anything.
  signal_registry.in_flight[side].fetch_sub(1, std::memory_order_release);
  return any;
}

/// Calls the handler that ours replaced; false if there was no function. Not in flight any more: it
/// may hang, or jump, without anybody's waiting for it (I7).
inline bool call_previous(SignalLayer& layer, bool own, int number, siginfo_t* info,
                          void* context) {
  // Acquire: the disposition is read as it was written.
  const KeptDisposition* previous = layer.previous.load(std::memory_order_acquire);
  while (own && previous != nullptr && previous->once_called != nullptr) {
    if (layer.previous.compare_exchange_weak(previous, previous->once_called,
                                             std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
      break;
    }
  }
  if (previous == nullptr || !is_function(previous->action)) return false;
  if ((static_cast<unsigned>(previous->action.sa_flags) & static_cast<unsigned>(SA_SIGINFO)) != 0) {
    previous->action.sa_sigaction(number, info, context);
  } else {
    previous->action.sa_handler(number);
  }
  return true;
}

/// No trap of the layer wants the signal: does what would have been done without us. False: a trap
/// has come meanwhile, and the signal is its. (I8)
inline bool act_as_previous(int index, SignalLayer& layer, bool own, int number, siginfo_t* info,
                            void* context) {
  struct sigaction now = current_disposition(number);
  if (layer_of(now) == index) {
    // Nobody else's handler is above: what is raised again comes straight back here.
    std::atomic<bool>& changing = signal_registry.changing;
    // acquire and release: the lock's flag (lock_registry()). So relaxed is enough for the list under it.
    if (own && changing.exchange(true, std::memory_order_acquire)) {
      ::raise(number);
      return true;
    }
    if (own && layer.head.load(std::memory_order_relaxed) != nullptr) {
      changing.store(false, std::memory_order_release);
      return false;
    }
    // Out of the way first. So who is called next finds itself in place: it may be the handler of
    // another copy of this library, with no trap left either.
    const KeptDisposition* next = layer.previous.load(std::memory_order_acquire);
    if (next->once_called != nullptr) next = next->once_called;
    now = replace_layer(index, number, next->action);
    if (own) changing.store(false, std::memory_order_release);
  }
  if (call_previous(layer, own, number, info, context)) return true;
  // The number is blocked here: it acts when the handler returns. If it wasn't we who put SIG_DFL
  // there, nobody can have called us: the signal was on its way when the last trap went.
  if (!is_function(now) && now.sa_handler == SIG_DFL) ::raise(number);
  return true;
}

inline void on_signal(int layer_index, int number, siginfo_t* info, void* context) {
  if (!is_signal_number(number)) return;
  SignalLayer& layer = signal_registry.layers[layer_index][number];
  // Acquire, for the lists that were reset before it was set. A child of vfork() or of a bare
  // clone(), or of fork() before our own hook ran, is nobody the lists speak of.
  const bool own = signal_registry.process.load(std::memory_order_acquire) == ::getpid();
  for (;;) {
    if (own && hand_round(layer, number, info)) {
      call_previous(layer, own, number, info, context);
      return;
    }
    if (act_as_previous(layer_index, layer, own, number, info, context)) return;
  }
}

}  // namespace lastcall::detail
