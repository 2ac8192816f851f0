// Tests of another processor's build, run by an emulator: how they execute a program that was built with them,
// and what can be told there of where a thread waits.
#pragma once

#include <unistd.h>

#if __has_include(<sys/syscall.h>)
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

namespace support {

// CMake's CMAKE_CROSSCOMPILING_EMULATOR, its words with blanks between.
#if !defined(LASTCALL_TEST_EMULATOR)
#define LASTCALL_TEST_EMULATOR ""
#endif
inline constexpr std::string_view emulator = LASTCALL_TEST_EMULATOR;

/// A grace period whose last part is to do for stacks, report and flush: an emulator translates first what it has not
/// run yet.
constexpr std::chrono::milliseconds enough(std::chrono::milliseconds period) {
  return emulator.empty() ? period : 8 * period;
}

/// The words that execute a program that was built with this one.
inline std::vector<std::string> built(const std::string& program,
                                      const std::vector<std::string>& arguments = {}) {
  std::vector<std::string> words;
  for (std::string_view rest = emulator; !rest.empty();) {
    const std::string_view word = rest.substr(0, rest.find(' '));
    words.emplace_back(word);
    rest.remove_prefix(std::min(rest.size(), word.size() + 1));
  }
  words.push_back(program);
  words.insert(words.end(), arguments.begin(), arguments.end());
  return words;
}

/// The words that execute this program.
inline std::vector<std::string> this_program(const std::vector<std::string>& arguments = {}) {
  char path[4096] = {};
  if (::readlink("/proc/self/exe", path, sizeof path - 1) < 0) ::abort();
  return built(path, arguments);
}

/// Whether that is told of a thread in pause(). Some processors have no such system call, and libc makes ppoll()
/// of it. Where the calls of an emulator's kernel can't be told, its functions are, whose names have that in them.
inline bool tells_pause(std::string_view told) {
  const auto tells = [told](std::string_view part) {
    return told.find(part) != std::string_view::npos;
  };
  if (!emulator.empty()) return tells("pause") || tells("poll") || tells("suspend");
#if defined(SYS_ppoll) && !defined(SYS_pause)
  return tells("ppoll");
#else
  return tells("pause");
#endif
}

/// What a program that was built with this one wrote on stderr, without what its emulator has to say of its end.
inline std::string without_emulator(std::string written) {
  const std::size_t at = written.rfind("qemu: uncaught target signal");
  if (!emulator.empty() && at != std::string::npos) written.erase(at);
  return written;
}

/// What is told at the least of a thread that reads from a pipe.
inline constexpr std::string_view told_of_read = emulator.empty() ? "read(" : "pipe_read";

inline bool tells_read(std::string_view told, int descriptor) {
  return emulator.empty() ? told == "read(" + std::to_string(descriptor) + ")"
                          : told.find(told_of_read) != std::string_view::npos;
}

/// Whether a thread in read(2) can have that as the innermost frame. libc is a shared object, whose functions
/// have names in any build; but where read() ends in a jump, which it can since glibc 2.41 where processors pass
/// as many arguments in registers, it has no frame, and what has one has no name.
inline bool is_in_read(std::string_view frame) {
#if defined(__x86_64__) || defined(__i386__)
  return frame.find("read") != std::string_view::npos;
#else
  return frame.find("read") != std::string_view::npos || frame.substr(0, 7) == "libc.so";
#endif
}

}  // namespace support
