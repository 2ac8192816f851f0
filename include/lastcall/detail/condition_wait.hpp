// Cancelling a wait on a std::condition_variable that belongs to the user.
//
// The user's threads notify it, so the waiter has to block on it, with the user's mutex. It decides to
// block (the predicate is false, the token is not cancelled) while it holds the mutex, and is certain
// to hear a notification only from when the condition variable has released the mutex for it. A
// canceller's notify_all() in between would be lost. The usual remedy, to lock the mutex before
// notifying, is not open: the canceller may hold the mutex itself, or somebody who waits for the
// canceller may.
//
// But if somebody else than the waiter has the mutex, the waiter is past the point of danger: it has
// released it. So pthread_mutex_trylock() settles the question in one case: when it succeeds, any
// notification from then on is heard. (POSIX gives EBUSY also to the owner, where
// std::mutex::try_lock() is undefined.) When it fails, the owner may be the waiter, in its last
// instructions before it sleeps, or anybody else, for however long; portably there is no telling which.
// A notification is enough then in all cases but the first; and the nudging thread (nudge.hpp) goes on to
// try and notify until it has once got the mutex or the waiter is out.
//
// No wake-up is lost, nobody blocks on the user's mutex but the waiter itself, no user code has to return
// first, and nobody is woken before there is a cancel. Latency: two wake-ups, one of the nudging thread
// and one of the waiter; in the one case, a millisecond more.
//
// What else was considered: waiting in slices (wakes idle threads, and only makes the loss shorter);
// locking the mutex on a thread of its own (as Go's context.AfterFunc example does: a thread for each
// cancelled wait, and it blocks as long as the mutex is held); reading the owner out of a
// pthread_mutex_t (glibc only, not for priority-inheriting ones, and no memory order is promised).
#pragma once

#include <lastcall/detail/nudge.hpp>

#include <pthread.h>

#include <condition_variable>
#include <mutex>

namespace lastcall::detail {

class ConditionWaiter {
 public:
  /// Throws std::system_error if there is no thread to be had for the nudging.
  ConditionWaiter(Node* node, std::condition_variable& condition, std::mutex& mutex)
      : condition_(condition),
        mutex_(mutex.native_handle()),
        nudge_(node, &ConditionWaiter::attempt, this) {}

  /// With the mutex locked: waits for a notification. False, perhaps without waiting, if cancelled. May throw,
  /// as the constructor.
  bool block(std::unique_lock<std::mutex>& lock) {
    if (!nudge_.enter()) return false;
    condition_.wait(lock);
    return nudge_.leave();
  }

 private:
  // While the waiter is between enter() and leave(), or just was.
  static bool attempt(void* target) noexcept {
    auto* const self = static_cast<ConditionWaiter*>(target);
    const bool settled = ::pthread_mutex_trylock(self->mutex_) == 0;
    if (settled) ::pthread_mutex_unlock(self->mutex_);
    self->condition_.notify_all();
    return settled;
  }

  std::condition_variable& condition_;
  pthread_mutex_t* const mutex_;
  Nudge nudge_;  // last: it stops before the rest goes
};

}  // namespace lastcall::detail
