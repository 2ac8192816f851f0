// Counting who wants a signal ignored, and keeping them apart from those who trap it.
#pragma once

#include <lastcall/detail/signal_core.hpp>
#include <lastcall/detail/throw_system_error.hpp>

#include <cerrno>
#include <csignal>
#include <new>

namespace lastcall::detail {

/// One more who ignores the number. Throws as SignalIgnore's constructor.
inline void ignore_signal(int number) {
  check_signal(number, "ignored");
  SignalRegistryLock lock;
  enter_registry_or_throw(lock);
  if (is_trapped(number)) {
    throw_logic_error(describe_signal(number) + " can't be ignored: a live trap holds it");
  }
  IgnoredSignal& entry = signal_registry.ignored[number];
  struct sigaction now = current_disposition(number);
  if (entry.count == 0 || !ignores(now)) {
    const KeptDisposition* before = keep_disposition(now);
    if (before == nullptr) throw_or_die(std::bad_alloc());
    struct sigaction ignore {};
    ignore.sa_handler = SIG_IGN;
    ::sigemptyset(&ignore.sa_mask);
    struct sigaction replaced {};
    if (::sigaction(number, &ignore, &replaced) != 0) {
      throw_system_error(errno, "ignoring " + describe_signal(number));
    }
    entry.before = before;
    if (!same_disposition(replaced, now)) {  // somebody else's came since we looked
      if (const KeptDisposition* kept = keep_disposition(replaced)) entry.before = kept;
    }
  }
  ++entry.count;
}

/// One less. The last one puts back what the first one found.
inline void stop_ignoring_signal(int number) noexcept {
  const SignalRegistryLock lock;
  IgnoredSignal& entry = signal_registry.ignored[number];
  if (--entry.count > 0) return;
  const struct sigaction now = current_disposition(number);
  if (ignores(now)) replace_disposition(number, entry.before->action, ignores);
}

}  // namespace lastcall::detail
