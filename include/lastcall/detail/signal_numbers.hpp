// Signal numbers: how many there are, which may be trapped, what they are called, and sets of them.
#pragma once

#include <lastcall/detail/bounded_text.hpp>
#include <lastcall/detail/config.hpp>
#include <lastcall/detail/throw.hpp>

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace lastcall::detail {

/// One more than the largest signal number.
#if defined(_SIG_MAXSIG)
inline constexpr int signal_limit = _SIG_MAXSIG + 1;  // NSIG leaves out the real-time ones here
#elif defined(_NSIG)
inline constexpr int signal_limit = _NSIG;
#elif defined(NSIG)
inline constexpr int signal_limit = NSIG;
#else
inline constexpr int signal_limit = 65;
#endif

inline constexpr bool is_signal_number(int number) noexcept {
  return number > 0 && number < signal_limit;
}

// The names of POSIX, and of who has more. A switch: no table to construct, and two names of one
// number (SIGIO and SIGPOLL) would not compile unnoticed.
inline const char* standard_signal_name(int number) noexcept {
  switch (number) {
    case SIGHUP: return "SIGHUP";
    case SIGINT: return "SIGINT";
    case SIGQUIT: return "SIGQUIT";
    case SIGILL: return "SIGILL";
    case SIGTRAP: return "SIGTRAP";
    case SIGABRT: return "SIGABRT";
    case SIGBUS: return "SIGBUS";
    case SIGFPE: return "SIGFPE";
    case SIGKILL: return "SIGKILL";
    case SIGUSR1: return "SIGUSR1";
    case SIGSEGV: return "SIGSEGV";
    case SIGUSR2: return "SIGUSR2";
    case SIGPIPE: return "SIGPIPE";
    case SIGALRM: return "SIGALRM";
    case SIGTERM: return "SIGTERM";
    case SIGCHLD: return "SIGCHLD";
    case SIGCONT: return "SIGCONT";
    case SIGSTOP: return "SIGSTOP";
    case SIGTSTP: return "SIGTSTP";
    case SIGTTIN: return "SIGTTIN";
    case SIGTTOU: return "SIGTTOU";
    case SIGURG: return "SIGURG";
    case SIGXCPU: return "SIGXCPU";
    case SIGXFSZ: return "SIGXFSZ";
    case SIGVTALRM: return "SIGVTALRM";
    case SIGPROF: return "SIGPROF";
    case SIGSYS: return "SIGSYS";
#if defined(SIGWINCH)
    case SIGWINCH: return "SIGWINCH";
#endif
#if defined(SIGIO)
    case SIGIO: return "SIGIO";
#elif defined(SIGPOLL)
    case SIGPOLL: return "SIGPOLL";
#endif
#if defined(SIGPWR)
    case SIGPWR: return "SIGPWR";
#endif
#if defined(SIGSTKFLT)
    case SIGSTKFLT: return "SIGSTKFLT";
#endif
#if defined(SIGEMT)
    case SIGEMT: return "SIGEMT";
#endif
#if defined(SIGINFO)
    case SIGINFO: return "SIGINFO";
#endif
    default: return nullptr;
  }
}

// "SIGRTMIN", "SIGRTMIN+1", ...: made when compiled, since SIGRTMIN itself is known only when run.
struct RealTimeNames {
  static constexpr std::size_t count = static_cast<std::size_t>(signal_limit);
  char text[count][12] = {};
  unsigned char length[count] = {};

  constexpr RealTimeNames() {
    for (std::size_t index = 0; index < count; ++index) {
      unsigned char at = 0;
      for (const char letter : std::string_view("SIGRTMIN")) text[index][at++] = letter;
      if (index > 0) text[index][at++] = '+';
      if (index >= 100) text[index][at++] = static_cast<char>('0' + index / 100);
      if (index >= 10) text[index][at++] = static_cast<char>('0' + index / 10 % 10);
      if (index > 0) text[index][at++] = static_cast<char>('0' + index % 10);
      length[index] = at;
    }
  }
};
inline constexpr RealTimeNames real_time_names;

inline std::string_view real_time_signal_name(int number) noexcept {
#if defined(SIGRTMIN) && defined(SIGRTMAX)
  if (number >= SIGRTMIN && number <= SIGRTMAX) {
    const auto index = static_cast<std::size_t>(number - SIGRTMIN);
    if (index < RealTimeNames::count) {
      return {real_time_names.text[index], real_time_names.length[index]};
    }
  }
#endif
  static_cast<void>(number);
  return {};
}

/// Empty if the number has no name.
inline std::string_view known_signal_name(int number) noexcept {
  if (const char* name = standard_signal_name(number)) return name;
  return real_time_signal_name(number);
}

/// What signal_name() says, which may be in use on this thread, without its buffer.
inline void add_signal_name(BoundedText& words, int number) noexcept {
  const std::string_view name = known_signal_name(number);
  if (name.empty()) {
    words.add("signal ").add_number(number);
  } else {
    words.add(name);
  }
}

inline std::string_view unknown_signal_name(int number) noexcept {
  thread_local char text[sizeof "signal -" + 3 * sizeof(int)];
  char* const end = text + sizeof text;
  char* at = end;
  // Through unsigned, so that the smallest int has its absolute value too.
  auto rest = number < 0 ? 0U - static_cast<unsigned>(number) : static_cast<unsigned>(number);
  do {
    *--at = static_cast<char>('0' + rest % 10);
    rest /= 10;
  } while (rest > 0);
  if (number < 0) *--at = '-';
  constexpr std::string_view word = "signal ";
  at -= word.size();
  word.copy(at, word.size());
  return {at, static_cast<std::size_t>(end - at)};
}

/// For messages: "SIGKILL (9)", "signal 99".
inline std::string describe_signal(int number) {
  const std::string_view name = known_signal_name(number);
  if (name.empty()) return "signal " + std::to_string(number);
  return std::string(name) + " (" + std::to_string(number) + ")";
}

/// Throws std::invalid_argument, naming the number, if a handler for it can't be had or could only
/// do harm. `done` is what was asked for: "trapped", "ignored".
inline void check_signal(int number, const char* done) {
  bool known = is_signal_number(number);
#if defined(SIGRTMAX)
  known = known && number <= SIGRTMAX;
#endif
  if (!known) throw_invalid_argument(std::to_string(number) + " is not a signal number");
  if (number == SIGKILL || number == SIGSTOP) {
    throw_invalid_argument(describe_signal(number) + " cannot be " + done);
  }
  // Returning from a handler of one of these runs the faulting instruction again, for ever.
  if (number == SIGSEGV || number == SIGBUS || number == SIGFPE || number == SIGILL) {
    throw_invalid_argument(describe_signal(number) + " is a synchronous fault and cannot be " +
                           done);
  }
#if defined(__linux__) && defined(SIGRTMIN)
  // From 32 up to SIGRTMIN: thread cancellation and setuid() of the C library.
  if (number >= 32 && number < SIGRTMIN) {
    throw_invalid_argument(describe_signal(number) +
                           " is reserved by the C library and cannot be " + done);
  }
#endif
}

/// A set of signal numbers that knows the order in which signals are handed out.
class SignalSet {
 public:
  constexpr bool has(int number) const noexcept {
    return (words_[word_of(number)] >> bit_of(number) & 1U) != 0;
  }
  constexpr void add(int number) noexcept { words_[word_of(number)] |= mask_of(number); }
  constexpr void remove(int number) noexcept { words_[word_of(number)] &= ~mask_of(number); }
  constexpr bool empty() const noexcept {
    for (const std::uint64_t word : words_) {
      if (word != 0) return false;
    }
    return true;
  }

  /// The numbers that are in both.
  friend constexpr SignalSet operator&(const SignalSet& a, const SignalSet& b) noexcept {
    SignalSet both = a;
    for (std::size_t at = 0; at < words; ++at) both.words_[at] &= b.words_[at];
    return both;
  }

  /// Who is handed out first: SIGINT, then SIGTERM, then by number; 0 if the set is empty.
  constexpr int most_urgent() const noexcept {
    if (has(SIGINT)) return SIGINT;
    if (has(SIGTERM)) return SIGTERM;
    return next(0);
  }
  /// The smallest number larger than `number`; 0 if there is none.
  constexpr int next(int number) const noexcept {
    for (int at = number + 1; at < signal_limit; ++at) {
      if (has(at)) return at;
    }
    return 0;
  }

 private:
  static constexpr std::size_t word_of(int number) noexcept {
    return static_cast<std::size_t>(number) / 64U;
  }
  static constexpr unsigned bit_of(int number) noexcept {
    return static_cast<unsigned>(number) % 64U;
  }
  static constexpr std::uint64_t mask_of(int number) noexcept {
    return std::uint64_t{1} << bit_of(number);
  }
  static constexpr std::size_t words = static_cast<std::size_t>(signal_limit - 1) / 64U + 1;
  std::uint64_t words_[words] = {};
};

}  // namespace lastcall::detail
