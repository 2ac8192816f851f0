// Getting a thread out of a blocking system call when its token is cancelled.
//
// There is one call that the library can neither poll for nor make non-blocking: accept(2) on a
// listener that blocks. poll(2) may say that a connection is there, and another thread or process takes
// it first; then accept(2) blocks until the next one. O_NONBLOCK would be the listener's, for all who
// have it; a second description of a socket can't be opened; SO_RCVTIMEO is seen by all and inherited
// by what is accepted; serialising our own loops, even across processes, says nothing of the others';
// and taking the connection on another thread, to be abandoned or cancelled by the C library, can lose
// it. What is left is what the kernel offers: a signal, sent to that one thread, whose handler doesn't
// restart system calls. accept(2) ends with EINTR then, and no connection is lost by it.
//
//  * The number is the highest real-time signal, short of the topmost four, that nobody uses (SIGURG
//    where there are none). Its handler does nothing, and stays. That is the whole footprint, and only
//    for who blocks in such a call. Before each use the disposition is looked at: if somebody has
//    taken the number meanwhile, another is chosen.
//  * The signal is unblocked in the thread for the length of the call, and afterwards taken from what is
//    pending: it never reaches what the thread does next.
//  * A signal that comes just before the thread enters the kernel interrupts nothing. So it is sent
//    again until the thread is out of the call (Nudge).
//
// Where no number is free, the call stays blocked until a connection comes.
#pragma once

#include <lastcall/cancellation.hpp>
#include <lastcall/detail/nudge.hpp>
#include <lastcall/detail/signal_pin.hpp>

#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <csignal>

namespace lastcall::detail {

extern "C" inline void lastcall_interrupt_handler(int) {}

inline bool is_our_interrupt(int number) noexcept {
  struct sigaction now {};
  return ::sigaction(number, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) == 0 &&
         now.sa_handler == &lastcall_interrupt_handler;
}

inline bool is_unclaimed(const struct sigaction& action, bool also_ignored) noexcept {
  if ((action.sa_flags & SA_SIGINFO) != 0) return false;
  return action.sa_handler == SIG_DFL || (also_ignored && action.sa_handler == SIG_IGN);  // NOLINT
}

// Makes `number` ours if nobody has it.
inline bool claim_interrupt(int number, bool also_ignored) noexcept {
  struct sigaction before {};
  if (::sigaction(number, nullptr, &before) != 0 || !is_unclaimed(before, also_ignored))
    return false;
  pin_module_of(reinterpret_cast<const void*>(&lastcall_interrupt_handler));
  struct sigaction ours {};
  ours.sa_handler = &lastcall_interrupt_handler;
  ours.sa_flags = SA_ONSTACK;  // and not SA_RESTART
  ::sigemptyset(&ours.sa_mask);
  if (::sigaction(number, &ours, &before) != 0) return false;
  if (is_unclaimed(before, also_ignored) || before.sa_handler == &lastcall_interrupt_handler)
    return true;
  ::sigaction(number, &before, nullptr);  // somebody was quicker
  return false;
}

/// The number of the signal that interrupts, or 0 if there is none.
inline int interrupt_signal() noexcept {
  static std::atomic<int> chosen{0};
  // relaxed: a number, checked before use; two threads that choose at once choose the same.
  int number = chosen.load(std::memory_order_relaxed);
  if (number != 0 && is_our_interrupt(number)) return number;
#if defined(SIGRTMIN) && defined(SIGRTMAX)
  // The topmost ones are taken by tools (valgrind, some virtual machines).
  for (number = SIGRTMAX - 4; number >= SIGRTMIN; --number) {
    if (!is_our_interrupt(number) && !claim_interrupt(number, false)) continue;
    chosen.store(number, std::memory_order_relaxed);
    return number;
  }
#endif
  // Ignored by default, so a claim takes nothing from a process that doesn't use it.
  if (!is_our_interrupt(SIGURG) && !claim_interrupt(SIGURG, true)) return 0;
  chosen.store(SIGURG, std::memory_order_relaxed);
  return SIGURG;
}

/// Runs a system call on the calling thread that ends with EINTR when the token is cancelled.
class Interruptible {
 public:
  /// `call` returns -1 with an errno, or a success. Cancelled already: -1 with EINTR, not called. Throws
  /// std::system_error if there is no thread to be had for the nudging.
  template <class Call>
  int run(const CancellationToken& token, Call call) {
    const Unblocked unblocked(number_);
    int result = -1;
    int error = EINTR;
    {
      Nudge nudge(TreeAccess::peek(token), &Interruptible::attempt, this);
      if (nudge.enter()) {
        result = call();
        error = errno;
      }
      nudge.leave();
    }
    errno = error;
    return result;
  }

 private:
  // Lets the signal through, and takes away what is left of it.
  class Unblocked {
   public:
    explicit Unblocked(int number) noexcept {
      ::sigemptyset(&only_);
      if (number != 0) ::sigaddset(&only_, number);
      ::pthread_sigmask(SIG_UNBLOCK, &only_, &before_);
      number_ = number;
    }
    Unblocked(const Unblocked&) = delete;
    Unblocked& operator=(const Unblocked&) = delete;
    ~Unblocked() {
      const int saved = errno;
      ::pthread_sigmask(SIG_BLOCK, &only_, nullptr);
      sigset_t pending;
      while (number_ != 0 && ::sigpending(&pending) == 0 && ::sigismember(&pending, number_) == 1) {
        int taken = 0;
        if (::sigwait(&only_, &taken) != 0) break;
      }
      ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
      errno = saved;
    }

   private:
    sigset_t only_{};
    sigset_t before_{};
    int number_ = 0;
  };

  // Whether the thread was in the call already can't be told. It is settled when it is out of it, which the
  // nudging thread sees; or if there is nothing to try with.
  static bool attempt(void* target) noexcept {
    auto* const self = static_cast<Interruptible*>(target);
    if (self->number_ == 0) return true;
    if (is_our_interrupt(self->number_)) ::pthread_kill(self->thread_, self->number_);
    return false;
  }

  const pthread_t thread_ = ::pthread_self();
  const int number_ = interrupt_signal();
};

}  // namespace lastcall::detail
