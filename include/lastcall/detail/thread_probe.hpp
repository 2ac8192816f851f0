// What another thread of this process is doing, as the kernel tells it in /proc/self/task/<tid>/.
//
// The functions that write into a buffer are async-signal-safe: they open, read and close, and take no
// lock of this process, so the last words can use them while everybody else hangs. They write no
// terminating NUL and return how many bytes they wrote. Where there is no /proc they write nothing.
#pragma once

#include <lastcall/detail/bounded_text.hpp>
#include <lastcall/detail/config.hpp>

#include <sys/types.h>

#include <cstddef>
#include <string>
#include <string_view>

#if LASTCALL_LINUX
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/syscall_names.hpp>
#include <lastcall/detail/thread_cancellation.hpp>
#include <lastcall/detail/thread_id.hpp>

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#endif

namespace lastcall::detail {

#if LASTCALL_LINUX

/// The start of /proc/self/task/<thread>/<leaf>; empty if it can't be read. Keeps errno.
inline std::string_view read_thread_file(pid_t thread, std::string_view leaf, char* buffer,
                                         std::size_t size) noexcept {
  const NoThreadCancellation whole;
  const int saved = errno;
  char path[64];
  BoundedText name(path, sizeof path - 1);
  name.add("/proc/self/task/").add_number(thread).add('/').add(leaf);
  path[name.length()] = '\0';
  std::size_t length = 0;
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd >= 0) {
    while (length < size) {
      const ssize_t got = ::read(fd, buffer + length, size - length);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      length += static_cast<std::size_t>(got);
    }
    ::close(fd);
  }
  errno = saved;
  return {buffer, length};
}

/// Whether this process has no thread of that id (any more). Needs no /proc.
inline bool is_thread_gone(pid_t thread) noexcept {
  const int saved = errno;
  const bool gone = ::syscall(SYS_tgkill, ::getpid(), thread, 0) != 0 && errno == ESRCH;
  errno = saved;
  return gone;
}

/// The next word of `text`, which loses it.
inline std::string_view take_word(std::string_view& text) noexcept {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\n' || text.front() == '\t')) {
    text.remove_prefix(1);
  }
  const std::string_view word = text.substr(0, text.find_first_of(" \n\t"));
  text.remove_prefix(word.size());
  return word;
}

/// The number that `text` starts with, with or without "0x"; anything else is 0.
inline std::uint64_t parse_number(std::string_view text, unsigned base = 10) noexcept {
  if (base == 16 && text.substr(0, 2) == "0x") text.remove_prefix(2);
  std::uint64_t value = 0;
  for (const char letter : text) {
    unsigned digit = base;
    if (letter >= '0' && letter <= '9') digit = static_cast<unsigned>(letter - '0');
    if (letter >= 'a' && letter <= 'f') digit = static_cast<unsigned>(letter - 'a') + 10;
    if (digit >= base) break;
    value = value * base + digit;
  }
  return value;
}

struct ProbedState {
  char letter = '?';            // as in ps: R, S, D, T, t, Z, X; '?' if it can't be read
  std::uint64_t cpu_ticks = 0;  // of sysconf(_SC_CLK_TCK)
};

inline ProbedState probed_state(pid_t thread) noexcept {
  char buffer[512];
  std::string_view stat = read_thread_file(thread, "stat", buffer, sizeof buffer);
  ProbedState state;
  // The name stands in brackets and may itself contain brackets and blanks.
  const std::size_t name_end = stat.rfind(')');
  if (name_end == std::string_view::npos) return state;
  stat.remove_prefix(name_end + 1);
  const std::string_view letter = take_word(stat);
  if (letter.empty()) return state;
  state.letter = letter.front();
  for (int field = 4; field < 14; ++field) take_word(stat);
  state.cpu_ticks = parse_number(take_word(stat));
  state.cpu_ticks += parse_number(take_word(stat));
  return state;
}

inline void add_running(BoundedText& out, ProbedState state) noexcept {
  const long rate = ::sysconf(_SC_CLK_TCK);
  const std::uint64_t hundredths =
      state.cpu_ticks * 100 / static_cast<std::uint64_t>(rate > 0 ? rate : 100);
  out.add("running (").add_digits(hundredths / 100);
  out.add('.').add_digits(hundredths % 100, 10, 2).add(" s CPU)");
}

/// Of a thread's file "syscall", read by itself, and so in read(2): whether the number there is another one. The
/// kernel is then of another processor than this program, and an emulator passes its calls on (qemu-user, under
/// which a container of another processor runs): what the kernel tells of calls are its own numbers and arguments.
inline bool tells_other_numbers(std::string_view own_file) noexcept {
  const std::string_view first = take_word(own_file);
  if (first.empty() || first.front() < '0' || first.front() > '9') return false;
  return parse_number(first) != static_cast<std::uint64_t>(SYS_read);
}

enum class Numbers : signed char { unknown, ours, others };
inline constinit std::atomic<Numbers> kernel_numbers{Numbers::unknown};

/// Whether the kernel counts system calls as this program does, as far as read(2) shows (an old processor's under
/// another old one's may be the same there). Looks until it has seen it once.
inline bool kernel_has_our_numbers() noexcept {
  // relaxed: it is all that there is to know, and two that look at once find the same.
  Numbers known = kernel_numbers.load(std::memory_order_relaxed);
  if (known == Numbers::unknown) {
    char buffer[256];
    const std::string_view file =
        read_thread_file(current_thread_id(), "syscall", buffer, sizeof buffer);
    if (file.empty()) return true;  // it doesn't tell: nor of others
    known = tells_other_numbers(file) ? Numbers::others : Numbers::ours;
    kernel_numbers.store(known, std::memory_order_relaxed);
  }
  return known == Numbers::ours;
}

/// Adds the kernel's function that the thread sleeps in; false if the kernel doesn't tell.
inline bool add_wait_channel(BoundedText& out, pid_t thread) noexcept {
  char buffer[128];
  std::string_view file = read_thread_file(thread, "wchan", buffer, sizeof buffer);
  const std::string_view channel = take_word(file);
  if (channel.empty() || channel == "0") return false;
  out.add(channel);
  return true;
}

enum class CallFound { yes, runs, unknown };

/// Adds the system call that the thread is in. `runs`: it is in none; `unknown`: it sleeps elsewhere in
/// the kernel (a page fault), or the kernel doesn't tell, or not in this program's numbers.
inline CallFound add_system_call(BoundedText& out, pid_t thread) noexcept {
  char buffer[256];
  std::string_view file = read_thread_file(thread, "syscall", buffer, sizeof buffer);
  const std::string_view first = take_word(file);
  if (first == "running") return CallFound::runs;
  if (first.empty() || first.front() == '-') return CallFound::unknown;
  if (!kernel_has_our_numbers()) return CallFound::unknown;
  const auto number = static_cast<long>(parse_number(first));
  const SyscallName* const call = find_syscall(number);
  if (call == nullptr) {
    out.add("system call ").add_number(number);
    return CallFound::yes;
  }
  out.add(call->name);
  if (call->takes_descriptor) {
    out.add('(').add_number(static_cast<int>(parse_number(take_word(file), 16))).add(')');
  } else if (call->name == "restart_syscall") {
    // A sleep that a stop and continue interrupted: its name is lost, the kernel's function isn't.
    BoundedText more = out;
    if (add_wait_channel(more.add(" ("), thread)) out = more.add(')');
  }
  return CallFound::yes;
}

/// Where a thread is that is in a system call, and how far its stack reaches down.
struct BlockedAt {
  std::uintptr_t stack = 0;  // 0: it is in none, or the kernel doesn't tell
  std::uintptr_t instruction = 0;
};
inline BlockedAt blocked_at(pid_t thread) noexcept {
  char buffer[256];
  std::string_view file = read_thread_file(thread, "syscall", buffer, sizeof buffer);
  const std::string_view first = take_word(file);
  // An emulator's kernel tells where the emulator is.
  if (first.empty() || first.front() == 'r' || !kernel_has_our_numbers()) return {};
  if (first.front() != '-') {
    for (int argument = 0; argument < 6; ++argument) take_word(file);
  }
  BlockedAt at;
  at.stack = static_cast<std::uintptr_t>(parse_number(take_word(file), 16));
  at.instruction = static_cast<std::uintptr_t>(parse_number(take_word(file), 16));
  return at;
}

/// Whether there is memory at `at` that can be read. The kernel copies the signals to block from there before it
/// looks what to do with them, which is nothing: any process that makes threads is allowed that call.
inline bool is_readable(std::uintptr_t at) noexcept {
  constexpr std::size_t mask_size = 8;
  if (at < mask_size) return false;  // null would be no signals at all
  const int saved = errno;
  const long nothing = -1;  // none of SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK
  const bool refused =
      ::syscall(SYS_rt_sigprocmask, nothing, at / mask_size * mask_size, nullptr, mask_size) != 0 &&
      errno == EFAULT;
  errno = saved;
  return !refused;
}

/// Whether a stack that reaches down to `at` has `size` bytes more, as far as can be seen from outside: below a
/// thread's there is a page that can't be read.
inline bool has_stack_below(std::uintptr_t at, std::size_t size) noexcept {
  constexpr std::uintptr_t page = 4096;  // the smallest that there is
  if (at < size) return false;
  const std::uintptr_t lowest = at - size;
  for (std::uintptr_t below = at / page * page; below > lowest;) {
    below -= std::min(below, page);
    if (!is_readable(std::max(below, lowest))) return false;
  }
  return true;
}

/// What the thread waits in: "futex", "read(7)", "accept4(5)", "running (1.23 s CPU)", "stopped",
/// "gone". Reads three small files: some 20 us. Ask before taking the thread's stack, which interrupts it.
inline std::size_t waiting_in(pid_t thread, char* out, std::size_t size) noexcept {
  BoundedText text(out, size);
  if (is_thread_gone(thread)) return text.add("gone").length();
  const ProbedState state = probed_state(thread);
  switch (state.letter) {
    case 'Z':
    case 'X':
    case 'x': return text.add("gone").length();
    case 'T': return text.add("stopped").length();
    case 't': return text.add("stopped by a debugger").length();
    default: break;
  }
  // Of itself a thread would learn that it reads a file in /proc.
  const bool is_self = thread == current_thread_id();
  const CallFound call = is_self ? CallFound::runs : add_system_call(text, thread);
  if (call == CallFound::runs || (call == CallFound::unknown && state.letter == 'R')) {
    add_running(text, state);
  } else if (call == CallFound::unknown && !add_wait_channel(text, thread)) {
    if (state.letter == 'S') text.add("asleep");
  }
  if (state.letter == 'D') text.add(text.length() == 0 ? "uninterruptible" : " (uninterruptible)");
  return text.length();
}

/// The kernel's name of the thread, at most 15 bytes, whichever they are.
inline std::size_t thread_name(pid_t thread, char* out, std::size_t size) noexcept {
  char buffer[64];
  std::string_view name = read_thread_file(thread, "comm", buffer, sizeof buffer);
  if (!name.empty() && name.back() == '\n') name.remove_suffix(1);
  return BoundedText(out, size).add(name).length();
}

#else

inline bool is_thread_gone(pid_t) noexcept { return false; }
inline std::size_t waiting_in(pid_t, char*, std::size_t) noexcept { return 0; }
inline std::size_t thread_name(pid_t, char*, std::size_t) noexcept { return 0; }

#endif

/// The same as a string; empty where the system doesn't tell.
inline std::string waiting_in(pid_t thread) {
  char buffer[160];
  return {buffer, waiting_in(thread, buffer, sizeof buffer)};
}
inline std::string thread_name(pid_t thread) {
  char buffer[64];
  return {buffer, thread_name(thread, buffer, sizeof buffer)};
}

}  // namespace lastcall::detail
