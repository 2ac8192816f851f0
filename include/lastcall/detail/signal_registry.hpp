// Who wants which signal in this process: what the handler reads. The lock under which it changes is in
// signal_lock.hpp.
//
// Constant-initialised and never destroyed: there is nothing to do before main() and nothing left
// to go wrong after it. A shared object with hidden visibility has a registry of its own; the two
// chain to each other like any two users of sigaction(2). The invariants I5 to I10 are at the head
// of <lastcall/signal_trap.hpp>.
#pragma once

#include <lastcall/detail/config.hpp>
#include <lastcall/detail/signal_inbox.hpp>
#include <lastcall/detail/signal_numbers.hpp>

#include <pthread.h>
#include <sys/types.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <new>

namespace lastcall::detail {

static_assert(std::atomic<void*>::is_always_lock_free && std::atomic<pid_t>::is_always_lock_free &&
                  std::atomic<unsigned>::is_always_lock_free,
              "what a signal handler touches must be lock-free");

/// One trap's wish for one number: a link of the list that the handler walks.
struct SignalSubscription {
  std::atomic<SignalSubscription*> next{nullptr};
  SignalInbox* inbox = nullptr;  // never changes while it is linked
  int layer = -1;                // under the registry's lock; -1: not linked
};

/// Everything that the handler or a fork needs to know of one trap. On the heap, at one address.
struct SignalMember {
  SignalInbox inbox;
  SignalSubscription subscriptions[signal_limit];

  // Under the registry's lock.
  SignalSet held;            // the numbers that it is subscribed to
  std::uint64_t thread = 0;  // in which it keeps them unblocked (TrapThread::number); 0: in none
  SignalSet to_block;        // the bits of that thread's mask that are to be set again
  SignalMember* newer = nullptr;
  SignalMember* older = nullptr;

  std::atomic<pid_t> process{0};  // where it was made; 0: a forked child has given it up
};

/// A disposition as it was found. Written once, interned, never freed: there are as many as the
/// program has different handlers, and the handler may read one without a thought to its lifetime.
struct KeptDisposition {
  struct sigaction action;
  const KeptDisposition* once_called;  // what a call turns it into (SA_RESETHAND); null: nothing
  KeptDisposition* next;
};

/// One handler of ours in the chain of handlers of one number.
struct SignalLayer {
  std::atomic<SignalSubscription*> head{nullptr};
  std::atomic<const KeptDisposition*> previous{nullptr};
  // When it was put in place, by a clock that ticks with each of these; 0: it was taken away again, by us.
  std::atomic<std::uint32_t> seat{0};
  // Signals that it has handed out and is passing on at this moment (low half), and how many of these no
  // layer beneath has seen (high half).
  std::atomic<std::uint32_t> passing{0};
  bool taken = false;  // under the lock: it was installed, and hasn't been seen to be gone since
};

struct IgnoredSignal {
  unsigned count = 0;  // live SignalIgnores
  const KeptDisposition* before = nullptr;
};

// Why several layers: if somebody else installs a handler over ours and we then install ours over
// theirs, a single function would meet itself in the chain, and call itself for ever. With one
// function for each time that ours is put on top, a chain always comes to its end (I9).
inline constexpr int signal_layers = 8;

struct SignalRegistry {
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  std::atomic<pid_t> lock_process{0};     // whose threads lock it: see claim_lock()
  std::atomic<bool> held_by_fork{false};  // by a thread that is inside fork(): the child's first
  std::atomic<pid_t> process{0};          // whom the lists speak of
  std::atomic<unsigned> epoch{0};
  std::atomic<unsigned> in_flight[2]{};
  std::atomic<bool> changing{false};   // by who holds the lock, or by a handler that gives way (I8)
  std::atomic<bool> passes_on{false};  // there was a signal once that a layer passed on (I11)
  SignalLayer layers[signal_layers][signal_limit]{};

  // Under the lock.
  IgnoredSignal ignored[signal_limit]{};
  SignalMember* newest = nullptr;
  KeptDisposition* kept = nullptr;
  bool watches_forks = false;
  std::uint64_t threads = 0;  // that have been given a number
  std::uint32_t seats = 0;    // the clock of SignalLayer::seat
};

inline constinit SignalRegistry signal_registry{};

// ---- Dispositions

inline bool is_function(const struct sigaction& action) noexcept {
  return action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN;
}

inline bool ignores(const struct sigaction& action) noexcept {
  return !is_function(action) && action.sa_handler == SIG_IGN;
}

inline bool same_disposition(const struct sigaction& a, const struct sigaction& b) noexcept {
  unsigned differing = static_cast<unsigned>(a.sa_flags) ^ static_cast<unsigned>(b.sa_flags);
#if defined(__linux__)
  // SA_RESTORER, which the C library adds to whatever it is given.
  differing &= ~0x04000000U;
#endif
  if (differing != 0 || a.sa_handler != b.sa_handler) return false;
  for (int number = 1; number < signal_limit; ++number) {
    if (::sigismember(&a.sa_mask, number) != ::sigismember(&b.sa_mask, number)) return false;
  }
  return true;
}

inline struct sigaction current_disposition(int number) noexcept {
  struct sigaction now {};
  ::sigaction(number, nullptr, &now);
  return now;
}

/// The one kept disposition that equals `action`; null if there is no memory. Under the lock.
inline const KeptDisposition* keep_as(const struct sigaction& action,
                                      const KeptDisposition* once_called) noexcept {
  for (const KeptDisposition* at = signal_registry.kept; at != nullptr; at = at->next) {
    if (same_disposition(at->action, action)) return at;
  }
  auto* fresh = new (std::nothrow) KeptDisposition{action, once_called, signal_registry.kept};
  if (fresh != nullptr) signal_registry.kept = fresh;
  return fresh;
}

/// The same, with what it turns into.
inline const KeptDisposition* keep_disposition(const struct sigaction& action) noexcept {
  const auto flags = static_cast<unsigned>(action.sa_flags);
  if (!is_function(action) || (flags & static_cast<unsigned>(SA_RESETHAND)) == 0) {
    return keep_as(action, nullptr);
  }
  // As the kernel does it: the handler goes, mask and flags stay.
  struct sigaction after = action;
  after.sa_handler = SIG_DFL;
  const KeptDisposition* spent = keep_as(after, nullptr);
  return spent == nullptr ? nullptr : keep_as(action, spent);
}

}  // namespace lastcall::detail
