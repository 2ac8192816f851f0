// Who may change the registry: one thread at a time, with every signal blocked; and what a fork makes of it
// (I10).
//
// A fork has the registry from our first hook to our second. Hooks of others that were registered before ours
// run in between, on the same thread, and may make and destroy traps: they find the registry theirs. In the
// child the first of them finds it as our hook would have made it.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/config.hpp>
#include <lastcall/detail/signal_handler.hpp>
#include <lastcall/detail/signal_registry.hpp>
#include <lastcall/detail/thread.hpp>
#include <lastcall/detail/thread_cancellation.hpp>
#include <lastcall/detail/thread_id.hpp>

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>

namespace lastcall::detail {

/// What the registry has to know of a thread. Not for signal handlers: a thread's first look at it may allocate.
struct TrapThread {
  std::uint64_t number = 0;  // nobody else's ever, unlike its pthread_t; 0: it was given none
  unsigned forks =
      0;  // it is inside fork(), from our first hook to our second: so many, in each other
  bool has_nested = false;  // in one of these there was another
  bool holds = false;       // the registry, for the fork
  sigset_t mask{};          // what its mask is to be after the fork
};
inline constinit thread_local TrapThread trap_thread{};

/// Under the lock.
inline std::uint64_t number_of_this_thread() noexcept {
  if (trap_thread.number == 0) trap_thread.number = ++signal_registry.threads;
  return trap_thread.number;
}

/// Under the lock.
inline std::uint32_t next_seat() noexcept {
  if (++signal_registry.seats == 0) ++signal_registry.seats;
  return signal_registry.seats;
}

/// What has become of a layer's place in the chain once its last trap has gone.
enum class LayerLeft { restored_default, restored, covered };

/// The last trap of a layer has been unlinked: what was there before comes back, unless somebody
/// else has changed the disposition since. Async-signal-safe.
inline LayerLeft leave_layer(int layer_index, int number) noexcept {
  SignalLayer& layer = signal_registry.layers[layer_index][number];
  const KeptDisposition* previous = layer.previous.load(std::memory_order_acquire);
  struct sigaction now = current_disposition(number);
  const bool in_place = layer_of(now) == layer_index;
  if (in_place) now = step_aside(layer_index, number, previous->action);
  // Somebody may still call our handler: the layer stays taken. Also if it is the one from before, which may
  // have been put over ours again.
  if (!same_disposition(now, previous->action) || (!in_place && is_function(now))) {
    return LayerLeft::covered;
  }
  layer.taken = false;
  layer.seat.store(0, std::memory_order_relaxed);
  return !is_function(previous->action) && previous->action.sa_handler == SIG_DFL
             ? LayerLeft::restored_default
             : LayerLeft::restored;
}

/// The process is the child of the one that the lists speak of: all traps and the threads that were
/// in the handler stayed with the parent. `mask` is this thread's as it will be: what traps took from it comes
/// back. Async-signal-safe, since a child of a process with threads may do nothing else.
inline void become_child(sigset_t& mask) noexcept {
  const int saved = errno;
  SignalRegistry& all = signal_registry;
  for (int layer = 0; layer < signal_layers; ++layer) {
    for (int number = 1; number < signal_limit; ++number) {
      SignalLayer& at = all.layers[layer][number];
      // relaxed, as the counts below: no other thread is in this process, and a handler of this one comes later.
      at.passing.store(0, std::memory_order_relaxed);
      if (!at.taken) continue;
      at.head.store(nullptr, std::memory_order_seq_cst);  // as every change of a list
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
    if (member->thread == 0 || member->thread != trap_thread.number) continue;
    const SignalSet& taken = member->to_block;
    for (int number = taken.next(0); number != 0; number = taken.next(number)) {
      ::sigaddset(&mask, number);
    }
  }
  all.newest = nullptr;
  for (const int fd : nowhere) {
    if (fd >= 0) ::close(fd);
  }
  // Release: the handler that finds itself at home finds the lists empty.
  all.process.store(::getpid(), std::memory_order_release);
  errno = saved;
}

/// The lists may speak of another process: of a parent's, if a clone() ran no hooks.
inline bool speaks_of_another() noexcept {
  const pid_t process = signal_registry.process.load(std::memory_order_relaxed);
  return process != 0 && process != ::getpid();
}

/// Between two looks at what another thread will be done with in a few system calls. Sleeping lets
/// one of a lower real-time priority have the processor.
inline void back_off(int turn) noexcept {
  if (turn < 32) {
    ::sched_yield();
  } else {
    nap(50'000);
  }
}

/// Blocks every signal, saying what was blocked before.
inline sigset_t block_all_signals() noexcept {
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  return before;
}

/// Under the mutex: handlers give way from now on.
inline void make_handlers_give_way() noexcept {
  // Acquire and release: what a handler that gives way sees is whole, and what it has done is seen.
  for (int turn = 0; signal_registry.changing.exchange(true, std::memory_order_acquire); ++turn) {
    back_off(turn);
  }
}

/// Whether a thread that is inside fork() has the lock, and is in this process. Only the one that forked is in the
/// child, where it has the process's number; and what it has itself it knows, and doesn't ask.
inline bool is_held_by_fork() noexcept {
  // acquire: see claim_lock().
  if (!signal_registry.held_by_fork.load(std::memory_order_acquire)) return false;
#if LASTCALL_LINUX
  return current_thread_id() != ::getpid();
#else
  return true;
#endif
}

/// Before the lock. The child of a fork that our hooks missed (of a bare clone(), or since the hooks were registered
/// when it was on its way) has the lock as the parent's other threads had it: held, maybe, by one that isn't here.
/// Which process it is of is written down before it is taken, so the child's first thread that wants it knows.
inline void claim_lock() noexcept {
  SignalRegistry& all = signal_registry;
  const pid_t self = ::getpid();
  // acquire: pairs with the release below, so that the lock is seen as new.
  pid_t owner = all.lock_process.load(std::memory_order_acquire);
  for (int turn = 0; owner != self;) {
    if (owner == -self) {
      back_off(turn++);
      owner = all.lock_process.load(std::memory_order_acquire);
      continue;
    }
    // Before the exchange: if the fork's thread has let go of it in the meantime, it has written down the new process
    // before, and the exchange fails.
    const bool is_held = is_held_by_fork();
    if (!all.lock_process.compare_exchange_weak(owner, -self, std::memory_order_acquire)) continue;
    if (owner != 0 && !is_held) {
      ::pthread_mutex_init(&all.mutex, nullptr);
      all.changing.store(false, std::memory_order_relaxed);
      all.held_by_fork.store(false, std::memory_order_relaxed);
    }
    all.lock_process.store(self, std::memory_order_release);
    return;
  }
}

/// With every signal blocked. Waits as long as it takes.
inline void lock_registry() noexcept {
  claim_lock();
  ::pthread_mutex_lock(&signal_registry.mutex);
  make_handlers_give_way();
}

/// The same, unless another has it until `deadline`: then false.
inline bool lock_registry_by(Clock::time_point deadline) noexcept {
  claim_lock();
  const bool had =
      try_until(deadline, [] { return ::pthread_mutex_trylock(&signal_registry.mutex) == 0; });
  if (had) make_handlers_give_way();
  return had;
}

inline void unlock_registry() noexcept {
  SignalRegistry& all = signal_registry;
  // relaxed: who holds it has set it, and where it is set nobody else holds it.
  if (all.held_by_fork.load(std::memory_order_relaxed)) {
    // release, both: see claim_lock().
    all.lock_process.store(::getpid(), std::memory_order_release);
    all.held_by_fork.store(false, std::memory_order_release);
  }
  all.changing.store(false, std::memory_order_release);
  ::pthread_mutex_unlock(&all.mutex);
}

/// Whose the registry is when a thread asks for it.
enum class RegistryHold {
  none,   // another's, or nobody's
  fork,   // this thread's already, until the fork is over
  taken,  // this thread's, to be let go
};

/// With every signal blocked. In the child of a fork the hold of the parent's thread is taken over.
inline RegistryHold hold_by_fork() noexcept {
  TrapThread& thread = trap_thread;
  if (!thread.holds) return RegistryHold::none;
  if (!speaks_of_another()) return RegistryHold::fork;
  become_child(thread.mask);
  thread.holds = false;
  return RegistryHold::taken;
}

/// Holds the registry, with every signal blocked: no handler of anybody's runs on a thread that has
/// it, so none can hang there, fork there, or jump out of there (I10). Keeps errno.
class SignalRegistryLock {
 public:
  SignalRegistryLock() noexcept : mask_(block_all_signals()), hold_(hold_by_fork()) {
    if (hold_ != RegistryHold::none) return;
    lock_registry();
    hold_ = RegistryHold::taken;
  }
  /// Tries until `deadline`, and may not have it then.
  explicit SignalRegistryLock(Clock::time_point deadline) noexcept
      : mask_(block_all_signals()), hold_(hold_by_fork()) {
    if (hold_ == RegistryHold::none && lock_registry_by(deadline)) hold_ = RegistryHold::taken;
    if (!owns_lock()) ::pthread_sigmask(SIG_SETMASK, &mask_, nullptr);
  }
  SignalRegistryLock(const SignalRegistryLock&) = delete;
  SignalRegistryLock& operator=(const SignalRegistryLock&) = delete;
  ~SignalRegistryLock() {
    if (!owns_lock()) return;
    if (hold_ == RegistryHold::taken) unlock_registry();
    ::pthread_sigmask(SIG_SETMASK, &mask_, nullptr);
  }
  bool owns_lock() const noexcept { return hold_ != RegistryHold::none; }

  /// The thread's mask as it was before all this, and will be after it.
  sigset_t& mask_after() noexcept { return trap_thread.forks > 0 ? trap_thread.mask : mask_; }

  /// Takes a number from that mask; false if it isn't in there.
  bool unblock(int number) noexcept {
    const bool was_blocked = ::sigismember(&mask_after(), number) == 1;
    ::sigdelset(&mask_after(), number);
    // A fork has every signal blocked. As long as it has the registry, too, it stays so.
    if (hold_ == RegistryHold::taken) ::sigdelset(&mask_, number);
    return was_blocked;
  }
  void block(int number) noexcept {
    ::sigaddset(&mask_after(), number);
    ::sigaddset(&mask_, number);
  }

 private:
  sigset_t mask_;  // at the end
  RegistryHold hold_;
};

inline void before_fork() noexcept {
  const sigset_t before = block_all_signals();
  if (hold_by_fork() == RegistryHold::none) lock_registry();
  TrapThread& thread = trap_thread;
  if (thread.forks == 0) {
    thread.mask = before;
    thread.has_nested = false;
  } else {
    thread.has_nested = true;
  }
  ++thread.forks;
  thread.holds = true;
  signal_registry.held_by_fork.store(true, std::memory_order_relaxed);
  // So that whose child this is can be told afterwards.
  if (speaks_of_another()) become_child(thread.mask);
}
inline void after_fork() noexcept {
  TrapThread& thread = trap_thread;
  if (--thread.forks > 0) return;  // inside another's hook, and that fork is to go on
  if (thread.holds) {
    thread.holds = false;
    unlock_registry();
  }
  ::pthread_sigmask(SIG_SETMASK, &thread.mask, nullptr);
}
inline void after_fork_in_parent() noexcept {
  if (trap_thread.forks > 0) after_fork();  // 0: it was registered while the fork was on its way
}
inline void after_fork_in_child() noexcept {
  TrapThread& thread = trap_thread;
  if (thread.forks == 0) return;
  // If it is held, nobody has come before us, but for a fork in a hook: the first process of a namespace has
  // children with its own process id.
  if (thread.holds && signal_registry.process.load(std::memory_order_relaxed) != 0 &&
      (!thread.has_nested || speaks_of_another())) {
    become_child(thread.mask);
  }
  after_fork();
}

/// Before anything is subscribed or ignored: forks are watched, and the lists speak of this
/// process. 0 or an errno.
inline int enter_registry(SignalRegistryLock& lock) noexcept {
  SignalRegistry& all = signal_registry;
  if (!all.watches_forks) {
    const int error = ::pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    if (error != 0) return error;
    all.watches_forks = true;
  }
  if (all.process.load(std::memory_order_relaxed) == 0) {
    all.process.store(::getpid(), std::memory_order_release);
  } else if (speaks_of_another()) {
    become_child(lock.mask_after());  // of a clone() that ran no hooks
  }
  return 0;
}

}  // namespace lastcall::detail
