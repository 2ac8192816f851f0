// What is known of a signal that was received, and what signals are called.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/signal_numbers.hpp>

#include <sys/types.h>

#include <string_view>

namespace lastcall {

/// One signal as it was received. A plain value: copying it costs 24 bytes on common systems.
struct SignalInfo {
  int number = 0;  ///< SIGTERM, ...
  int code = 0;    ///< siginfo_t::si_code: SI_USER from kill(2), SI_KERNEL from a terminal, ...
  pid_t sender_pid = 0;  ///< who sent it; 0 where the kernel doesn't say (a timer, a terminal)
  uid_t sender_uid = 0;  ///< the sender's real user id; 0 where the kernel doesn't say
  Clock::time_point received{};  ///< when the handler began to run
};

/// The name of a signal: "SIGTERM"; "SIGRTMIN+3"; "signal 99" for a number without a name.
///
/// A name lives for ever, but "signal 99" only until this thread's next call. Allocates nothing,
/// never fails, may be called by any thread at any time.
inline std::string_view signal_name(int number) noexcept {
  const std::string_view name = detail::known_signal_name(number);
  return name.empty() ? detail::unknown_signal_name(number) : name;
}

}  // namespace lastcall
