// Who wants which signal in this process: the handler, and what it reads.
//
// Constant-initialised and never destroyed: there is nothing to do before main() and nothing left to
// go wrong after it. A shared object with hidden visibility has a registry of its own; the two chain to
// each other like any two users of sigaction(2). The invariants I5 to I10 are at the head of
// <lastcall/signal_trap.hpp>.
#pragma once

#include <lastcall/detail/config.hpp>
#include <lastcall/detail/signal_inbox.hpp>
#include <lastcall/detail/signal_numbers.hpp>

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <ctime>
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
  SignalSet held;          // the numbers that it is subscribed to
  bool unblocks = false;   // it keeps them unblocked in `thread`
  pthread_t thread{};      // who made it
  SignalSet to_block;      // the bits of that thread's mask that are to be set again
  SignalMember* newer = nullptr;
  SignalMember* older = nullptr;

  std::atomic<pid_t> process{0};  // where it was made; 0: a forked child has given it up
};

/// A disposition as it was found. Written once, interned, never freed: there are as many as the
/// program has different handlers, and the handler may read one without a thought to its lifetime.
struct KeptDisposition {
  struct sigaction action;
  const KeptDisposition* once_called;  // what it turns into when called (SA_RESETHAND); null: nothing
  KeptDisposition* next;
};

/// One handler of ours in the chain of handlers of one number.
struct SignalLayer {
  std::atomic<SignalSubscription*> head{nullptr};
  std::atomic<const KeptDisposition*> previous{nullptr};
  bool taken = false;  // under the lock: it was installed, and hasn't been seen to be gone since
};

struct IgnoredSignal {
  unsigned count = 0;  // live SignalIgnores
  const KeptDisposition* before = nullptr;
};

// Why several layers: if somebody else installs a handler over ours and we then install ours over
// theirs, a single function would meet itself in the chain, and call itself for ever. With one function
// for each time that ours is put on top, a chain always comes to its end (I9).
inline constexpr int signal_layers = 8;

struct SignalRegistry {
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  std::atomic<pid_t> process{0};  // whom the lists speak of
  std::atomic<unsigned> epoch{0};
  std::atomic<unsigned> in_flight[2]{};
  SignalLayer layers[signal_layers][signal_limit]{};

  // Under the lock.
  IgnoredSignal ignored[signal_limit]{};
  SignalMember* newest = nullptr;
  KeptDisposition* kept = nullptr;
  bool watches_forks = false;
  sigset_t mask_before_fork{};
};

inline constinit SignalRegistry signal_registry{};

/// Holds the registry, with every signal blocked: no handler of anybody's runs on a thread that has
/// it, so none can hang there, fork there, or jump out of there (I10). Keeps errno.
class SignalRegistryLock {
 public:
  SignalRegistryLock() noexcept {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &mask_after_);
    ::pthread_mutex_lock(&signal_registry.mutex);
  }
  SignalRegistryLock(const SignalRegistryLock&) = delete;
  SignalRegistryLock& operator=(const SignalRegistryLock&) = delete;
  ~SignalRegistryLock() {
    ::pthread_mutex_unlock(&signal_registry.mutex);
    ::pthread_sigmask(SIG_SETMASK, &mask_after_, nullptr);
  }
  /// The thread's mask as it was, and as it will be again: to be changed at will.
  sigset_t& mask_after() noexcept { return mask_after_; }

 private:
  sigset_t mask_after_;
};

// ---- Dispositions

inline bool is_function(const struct sigaction& action) noexcept {
  return action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN;
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
inline const KeptDisposition* keep_disposition(const struct sigaction& action) noexcept {
  for (const KeptDisposition* at = signal_registry.kept; at != nullptr; at = at->next) {
    if (same_disposition(at->action, action)) return at;
  }
  const KeptDisposition* spent = nullptr;
  if (is_function(action) && (static_cast<unsigned>(action.sa_flags) &
                              static_cast<unsigned>(SA_RESETHAND)) != 0) {
    // As the kernel does it: the handler goes, mask and flags stay.
    struct sigaction after = action;
    after.sa_handler = SIG_DFL;
    spent = keep_disposition(after);
    if (spent == nullptr) return nullptr;
  }
  auto* fresh = new (std::nothrow) KeptDisposition{action, spent, signal_registry.kept};
  if (fresh != nullptr) signal_registry.kept = fresh;
  return fresh;
}

// ---- The handler

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

/// Whether siginfo says who sent the signal: in other signals' records those bytes mean other things.
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

inline SignalRecord record_of(int number, const siginfo_t* info) noexcept {
  SignalRecord record;
  record.number = static_cast<std::uint16_t>(number);
  record.received = now_in_handler();
  if (info != nullptr) {
    record.code = info->si_code;
    if (tells_sender(number, info->si_code)) {
      record.sender_pid = info->si_pid;
      record.sender_uid = info->si_uid;
    }
  }
  return record;
}

/// Gives the signal to every trap of the layer; false if there is none. (I5, I6)
inline bool hand_round(SignalLayer& layer, int number, const siginfo_t* info) noexcept {
  // Any of the two sides is right; the latest is only the better one (I6). So: relaxed.
  const unsigned side = signal_registry.epoch.load(std::memory_order_relaxed) & 1U;
  // Sequentially consistent, as are the loads of the list: either the one who unlinks sees this
  // thread in flight, or this thread sees the list without what was unlinked.
  signal_registry.in_flight[side].fetch_add(1, std::memory_order_seq_cst);
  SignalSubscription* at = layer.head.load(std::memory_order_seq_cst);
  const bool any = at != nullptr;
  if (any) {
    SignalRecord record = record_of(number, info);
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

/// The previous disposition is none that can be called: does what it would have done. False: a trap
/// has come meanwhile, and the signal is its. (I8)
inline bool act_as_previous(int layer_index, SignalLayer& layer, bool own, int number) noexcept {
  const KeptDisposition* previous = layer.previous.load(std::memory_order_acquire);
  const struct sigaction now = current_disposition(number);
  if (layer_of(now) == layer_index) {
    if (previous == nullptr || previous->action.sa_handler == SIG_IGN) return true;
    ::sigaction(number, &previous->action, nullptr);
    if (own && layer.head.load(std::memory_order_seq_cst) != nullptr) {
      install_layer(layer_index, number, nullptr);
      return false;
    }
    ::raise(number);  // blocked here: it acts when the handler returns
  } else if (!is_function(now) && now.sa_handler == SIG_DFL) {
    // Nobody can have called us: the signal was on its way here when the last trap went.
    ::raise(number);
  }
  return true;
}

inline void on_signal(int layer_index, int number, siginfo_t* info, void* context) {
  if (!is_signal_number(number)) return;
  SignalLayer& layer = signal_registry.layers[layer_index][number];
  // Acquire, for the lists that were reset before it was set. A child of vfork() or of a bare clone(),
  // or of fork() before our own hook ran, is nobody the lists speak of.
  const bool own = signal_registry.process.load(std::memory_order_acquire) == ::getpid();
  for (;;) {
    if (own && hand_round(layer, number, info)) {
      call_previous(layer, own, number, info, context);
      return;
    }
    if (call_previous(layer, own, number, info, context)) return;
    if (act_as_previous(layer_index, layer, own, number)) return;
  }
}

// ---- Changes. All under the lock.

/// Waits until no handler is left that can have seen what was unlinked before (I6).
inline void wait_for_handlers() noexcept {
  for (int round = 0; round < 2; ++round) {
    const unsigned side = signal_registry.epoch.fetch_add(1, std::memory_order_seq_cst) & 1U;
    // It is a matter of a few system calls of another thread; sleeping lets one of a lower real-time
    // priority have the processor.
    for (int turn = 0; signal_registry.in_flight[side].load(std::memory_order_seq_cst) != 0;
         ++turn) {
      if (turn < 32) {
        ::sched_yield();
      } else {
        const timespec nap{0, 50'000};
        ::nanosleep(&nap, nullptr);
      }
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

/// The last trap of a layer has been unlinked: what was there before comes back, unless somebody else
/// has changed the disposition since. Async-signal-safe.
inline LayerLeft leave_layer(int layer_index, int number) noexcept {
  SignalLayer& layer = signal_registry.layers[layer_index][number];
  const KeptDisposition* previous = layer.previous.load(std::memory_order_acquire);
  const struct sigaction now = current_disposition(number);
  if (layer_of(now) == layer_index) {
    ::sigaction(number, &previous->action, nullptr);
  } else if (!same_disposition(now, previous->action)) {
    return LayerLeft::covered;  // somebody may still call our handler: the layer stays taken
  }
  layer.taken = false;
  return !is_function(previous->action) && previous->action.sa_handler == SIG_DFL
             ? LayerLeft::restored_default
             : LayerLeft::restored;
}

/// The process is the child of the one that the lists speak of: all traps and the threads that were in
/// the handler stayed with the parent. Async-signal-safe, since a child of a process with threads may
/// do nothing else.
inline void become_child() noexcept {
  const int saved = errno;
  SignalRegistry& all = signal_registry;
  for (int layer = 0; layer < signal_layers; ++layer) {
    for (int number = 1; number < signal_limit; ++number) {
      SignalLayer& at = all.layers[layer][number];
      if (!at.taken) continue;
      at.head.store(nullptr, std::memory_order_seq_cst);
      // Now, and not with the next signal: an ignored one must be ignored beyond an exec() too.
      leave_layer(layer, number);
    }
  }
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
  sigset_t all;
  sigset_t mask;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &mask);
  ::pthread_mutex_lock(&signal_registry.mutex);
  signal_registry.mask_before_fork = mask;
}
inline void after_fork_in_parent() noexcept {
  const sigset_t mask = signal_registry.mask_before_fork;
  ::pthread_mutex_unlock(&signal_registry.mutex);
  ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
}
inline void after_fork_in_child() noexcept {
  if (signal_registry.process.load(std::memory_order_relaxed) != 0) become_child();
  after_fork_in_parent();
}

/// Before anything is subscribed or ignored: forks are watched, and the lists speak of this process.
/// 0 or an errno.
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

/// A layer for a new trap of a number whose disposition `now` is somebody else's, with `previous` set
/// to it; -1 if there is none.
inline int choose_layer(int number, const struct sigaction& now, const KeptDisposition* kept) noexcept {
  int spare = -1;
  for (int index = signal_layers - 1; index >= 0; --index) {
    const SignalLayer& at = signal_registry.layers[index][number];
    if (at.taken && at.head.load(std::memory_order_relaxed) != nullptr) continue;
    // Covered once, and nobody's now. With the same previous disposition it makes no chain that
    // wasn't there before; with one that is no function the chain ends here: both can be used again.
    const bool same = at.taken && at.previous.load(std::memory_order_relaxed) == kept;
    if (!at.taken || same || !is_function(now)) spare = index;
    if (same) break;
  }
  if (spare >= 0) {
    signal_registry.layers[spare][number].previous.store(kept, std::memory_order_release);
  }
  return spare;
}

/// Links `member` to `number`, and puts our handler in place if it isn't. `error` is set if the system
/// refused. Under the lock, after enter_registry().
inline Subscribed link_subscription(SignalMember& member, int number, int& error) noexcept {
  const struct sigaction now = current_disposition(number);
  int index = layer_of(now);
  const bool join = index >= 0;
  if (!join) {
    const KeptDisposition* kept = keep_disposition(now);
    if (kept == nullptr) return Subscribed::no_memory;
    index = choose_layer(number, now, kept);
    if (index < 0) return Subscribed::no_layer;
  }
  SignalLayer& layer = signal_registry.layers[index][number];
  SignalSubscription& link = member.subscriptions[number];
  SignalSubscription* const head = layer.head.load(std::memory_order_relaxed);
  link.inbox = &member.inbox;
  link.next.store(head, std::memory_order_relaxed);
  // Before the handler is in place: it finds somebody from its first call on. Sequentially consistent
  // for I6 and I8; and the link is complete by then.
  layer.head.store(&link, std::memory_order_seq_cst);
  if (!join) {
    struct sigaction before {};
    error = install_layer(index, number, &before);
    if (error != 0) {
      layer.head.store(head, std::memory_order_seq_cst);
      return Subscribed::refused;
    }
    // Somebody else's sigaction() came between our look and our own: theirs is what we replaced.
    // (Unless ours was covered: theirs might lead to it, and the chain would bite its tail.)
    if (!same_disposition(before, now) && (!layer.taken || !is_function(before))) {
      if (const KeptDisposition* kept = keep_disposition(before)) {
        layer.previous.store(kept, std::memory_order_release);
      }
    }
  }
  link.layer = index;
  layer.taken = true;
  member.held.add(number);
  return Subscribed::yes;
}

/// Unlinks `member` from `number`. The link must not be reused or freed before wait_for_handlers().
inline LayerLeft unlink_subscription(SignalMember& member, int number) noexcept {
  SignalSubscription& link = member.subscriptions[number];
  SignalLayer& layer = signal_registry.layers[link.layer][number];
  std::atomic<SignalSubscription*>* at = &layer.head;
  for (;;) {
    SignalSubscription* next = at->load(std::memory_order_relaxed);
    if (next == &link) break;
    at = &next->next;
  }
  // The link itself still points on, for a handler that stands on it.
  at->store(link.next.load(std::memory_order_relaxed), std::memory_order_seq_cst);
  member.held.remove(number);
  const int index = link.layer;
  link.layer = -1;
  if (layer.head.load(std::memory_order_relaxed) != nullptr) return LayerLeft::restored;
  return leave_layer(index, number);
}

/// Whether a live trap of this registry holds the number.
inline bool is_trapped(int number) noexcept {
  for (int layer = 0; layer < signal_layers; ++layer) {
    const SignalLayer& at = signal_registry.layers[layer][number];
    if (at.head.load(std::memory_order_relaxed) != nullptr) return true;
  }
  return false;
}

}  // namespace lastcall::detail
