// A trap without policy: what SignalTrap and the coordinator's signal thread are made of.
#pragma once

#include <lastcall/detail/signal_inbox.hpp>
#include <lastcall/detail/signal_links.hpp>
#include <lastcall/detail/signal_lock.hpp>
#include <lastcall/detail/signal_pin.hpp>
#include <lastcall/detail/signal_registry.hpp>
#include <lastcall/detail/throw_system_error.hpp>
#include <lastcall/signal_info.hpp>

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace lastcall::detail {

/// The signals that were caught and never read, when a trap goes: raised again, or dropped.
enum class Unread { raise_again, drop };

/// Whether a trap unblocks its signals in the thread that makes it.
enum class ThreadMask { keep, unblock };

/// Registers with fork and the like before anything is changed. Throws std::system_error. Under the
/// registry's lock.
inline void enter_registry_or_throw(SignalRegistryLock& lock) {
  if (const int error = enter_registry(lock); error != 0) {
    throw_system_error(error, "registering the fork handlers of the signal registry");
  }
}

/// The set of the numbers listed. Throws std::invalid_argument, naming the one that won't do.
inline SignalSet checked_signals(std::span<const int> numbers) {
  if (numbers.empty()) throw_invalid_argument("the list of signals to trap is empty");
  SignalSet set;
  for (const int number : numbers) {
    check_signal(number, "trapped");
    set.add(number);
  }
  return set;
}

/// Sends signals to this process, in the order in which they came, by which each does what it does now that
/// nobody traps it.
inline void raise_again(UnseenSignals signals) noexcept {
  signals.drop_undone();
  while (!signals.empty()) ::kill(::getpid(), signals.pop());
}

/// Whether this process ignores the number, as far as anybody can see: also if it is a handler of
/// ours that does the ignoring, after its last trap has gone. Throws nothing; false for no signal
/// number.
inline bool is_ignored(int number) noexcept {
  if (!is_signal_number(number)) return false;
  const SignalRegistryLock lock;
  const struct sigaction now = current_disposition(number);
  const int index = layer_of(now);
  if (index < 0) return !is_function(now) && now.sa_handler == SIG_IGN;
  const SignalLayer& layer = signal_registry.layers[index][number];
  if (layer.head.load(std::memory_order_relaxed) != nullptr) return false;
  const KeptDisposition* previous = layer.previous.load(std::memory_order_relaxed);
  return !is_function(previous->action) && previous->action.sa_handler == SIG_IGN;
}

/// Whether a trap of the number calls on a handler that is there now: somebody else's, or another copy's of
/// this library.
inline bool has_handler_beneath(int number) noexcept {
  const SignalRegistryLock lock;
  const struct sigaction now = current_disposition(number);
  const int index = layer_of(now);
  if (index < 0) return is_function(now);
  const KeptDisposition* previous =
      signal_registry.layers[index][number].previous.load(std::memory_order_relaxed);
  return is_function(previous->action);
}

/// Gives a signal that was taken without a handler, and came at `since`, to every trap that holds its number, as
/// our handler does; but no handler beneath is called.
inline void hand_round_taken(int number, const siginfo_t& info, Clock::time_point since) noexcept {
  if (!is_signal_number(number)) return;
  hand_round(0, signal_layers, number, &info, false, &since);
}

/// A pipe with the signals that are subscribed to it. subscribe() may be called by any thread at
/// any time; reading is for one thread at a time, and so is the end.
class TrapCore {
 public:
  /// Throws std::system_error (EMFILE, ENFILE) or std::bad_alloc.
  TrapCore() : member_(new SignalMember) {
    member_->process.store(::getpid(), std::memory_order_relaxed);
    SignalRegistryLock lock;
    enter_registry_or_throw(lock);
    enlist(*member_);
  }
  TrapCore(const TrapCore&) = delete;
  TrapCore& operator=(const TrapCore&) = delete;
  ~TrapCore() { unsubscribe_all(Unread::drop); }

  /// Traps all the numbers, or none and throws: std::invalid_argument for a number that can't be
  /// trapped or an empty list, std::logic_error for one that a live SignalIgnore holds,
  /// std::system_error where the system refuses. Numbers that are subscribed already stay so. With
  /// a list of several, nobody may be reading yet.
  void subscribe(std::span<const int> numbers, ThreadMask mask = ThreadMask::keep) {
    subscribe(checked_signals(numbers), mask);
  }
  void subscribe(int number) { subscribe(std::span<const int>(&number, 1)); }

  /// Puts every disposition back that nobody else has changed, and the mask of this thread if it
  /// was this core that changed it. From its return on no handler touches the core. What was not
  /// read is dropped (somebody may still be reading then), or raised again where it met SIG_DFL and
  /// no other trap of this registry got it (then nobody may be). Idempotent; the descriptor stays
  /// open.
  void unsubscribe_all(Unread unread) noexcept { raise_again(withdraw(unread)); }

  /// The same with what was not read dropped; but gives up, with nothing changed, if another has the registry
  /// until `deadline`, and is false then: a fork holds it while it runs handlers of strangers, which may hang.
  bool unsubscribe_all_by(Clock::time_point deadline) noexcept {
    SignalRegistryLock lock(deadline);
    SignalSet defaults;
    if (lock.owns_lock()) static_cast<void>(put_all_back(lock, defaults));
    return lock.owns_lock();
  }

  /// unsubscribe_all(), but says what is to be raised again instead of doing so.
  UnseenSignals withdraw(Unread unread) noexcept {
    if (has_nothing_left()) return {};
    SignalSet defaults;
    {
      SignalRegistryLock lock;
      if (!put_all_back(lock, defaults)) return {};
    }
    if (unread == Unread::drop) return {};
    return member_->inbox.discard(defaults);
  }

  /// Whether the number is subscribed.
  bool holds(int number) const noexcept {
    const SignalRegistryLock lock;
    return is_signal_number(number) && member_->held.has(number);
  }

  /// Polls readable while a signal is pending. Never to be read from.
  int fd() const noexcept { return member_->inbox.fd(); }

  /// Takes up to `most` pending signals: SIGINT first, then SIGTERM, then by number, first come
  /// first served within one. Never blocks, takes no lock, allocates nothing, keeps errno. If it
  /// leaves any, fd() stays readable.
  std::size_t read_batch(SignalInfo* out, std::size_t most) noexcept {
    return is_foreign() ? 0 : read_own_batch(out, most);
  }
  /// The same for a thread that knows that the core isn't foreign: that costs a system call to ask.
  std::size_t read_own_batch(SignalInfo* out, std::size_t most) noexcept {
    return member_->inbox.take(out, most);
  }

  /// In a forked child: the core is the parent's, and here it catches nothing for ever.
  bool is_foreign() const noexcept {
    // relaxed, as wherever `process` is read: it changes in a fork, where there is one thread.
    return member_->process.load(std::memory_order_relaxed) != ::getpid();
  }

 private:
  void subscribe(const SignalSet& wanted, ThreadMask mask) {
    // Before the first handler is in place, and without a lock: the loader has one of its own.
    pin_module_of(reinterpret_cast<const void*>(signal_entries[0]));
    SignalSet added;
    UnseenSignals to_raise;
    Subscribed result = Subscribed::yes;
    int failed = 0;
    int error = 0;
    {
      SignalRegistryLock lock;
      enter_registry_or_throw(lock);
      if (gone_ || is_foreign()) {
        throw_logic_error(describe_signal(wanted.most_urgent()) +
                          " can't be trapped by a trap that has gone, or is another process's");
      }
      for (int number = wanted.next(0); number != 0; number = wanted.next(number)) {
        if (signal_registry.ignored[number].count > 0) {
          throw_logic_error(describe_signal(number) + " can't be trapped: a SignalIgnore holds it");
        }
      }
      for (int number = wanted.next(0); number != 0; number = wanted.next(number)) {
        if (member_->held.has(number)) continue;
        result = link_subscription(*member_, number, error);
        if (result != Subscribed::yes) {
          failed = number;
          break;
        }
        added.add(number);
      }
      if (result == Subscribed::yes) {
        if (mask == ThreadMask::unblock) take_mask(lock, added);
        return;
      }
      // What came in meanwhile came too early: it does what it would have done.
      const SignalSet defaults = unlink(added);
      if (!added.empty()) to_raise = member_->inbox.discard(added);
      to_raise.keep_only(defaults);
    }
    raise_again(to_raise);
    if (result == Subscribed::no_memory) throw_or_die(std::bad_alloc());
    if (result == Subscribed::no_layer) {
      throw_logic_error(describe_signal(failed) +
                        " can't be trapped: " + std::to_string(signal_layers) +
                        " handlers of lastcall's lie under other people's already");
    }
    throw_system_error(error, "installing the handler of " + describe_signal(failed));
  }

  // Without the lock, which may not be to be had. 0: a fork has put everything back.
  bool has_nothing_left() const noexcept {
    return member_->process.load(std::memory_order_relaxed) == 0 ||
           nothing_left_.load(std::memory_order_acquire);
  }

  // Under the lock. False: somebody has done it, or it is another process's. The numbers whose disposition is
  // SIG_DFL again are put into `defaults`.
  bool put_all_back(SignalRegistryLock& lock, SignalSet& defaults) noexcept {
    static_cast<void>(enter_registry(lock));
    if (gone_ || is_foreign()) return false;
    gone_ = true;
    defaults = unlink(member_->held);
    give_back_mask(lock);
    strike_out(*member_);
    // Last, and released: who reads it without the lock finds all of the above done. The handlers of I6
    // have left, and no list speaks of the member, which that thread may free at once.
    nothing_left_.store(true, std::memory_order_release);
    return true;
  }

  // Under the lock. The numbers whose disposition is SIG_DFL again.
  SignalSet unlink(const SignalSet& numbers) noexcept {
    SignalSet defaults;
    for (int number = numbers.next(0); number != 0; number = numbers.next(number)) {
      if (unlink_subscription(*member_, number) == LayerLeft::restored_default) {
        defaults.add(number);
      }
    }
    wait_for_handlers();
    return defaults;
  }

  // Under the lock: the numbers leave the thread's mask when the lock is let go, and are delivered.
  void take_mask(SignalRegistryLock& lock, const SignalSet& numbers) noexcept {
    member_->thread = number_of_this_thread();
    for (int number = numbers.next(0); number != 0; number = numbers.next(number)) {
      if (lock.unblock(number)) member_->to_block.add(number);
    }
  }

  // Under the lock: what take_mask() took comes back, unless another trap of this thread needs it;
  // then that one puts it back.
  void give_back_mask(SignalRegistryLock& lock) noexcept {
    const SignalSet& mine = member_->to_block;
    if (mine.empty() || member_->thread != number_of_this_thread()) return;
    for (int number = mine.next(0); number != 0; number = mine.next(number)) {
      SignalMember* heir = signal_registry.newest;
      while (heir != nullptr && !(heir->held.has(number) && heir->thread == member_->thread)) {
        heir = heir->older;
      }
      if (heir != nullptr) {
        heir->to_block.add(number);
      } else {
        lock.block(number);
      }
    }
  }

  const std::unique_ptr<SignalMember> member_;
  bool gone_ = false;  // under the lock (I10), and never back
  std::atomic<bool> nothing_left_{false};
};

}  // namespace lastcall::detail
