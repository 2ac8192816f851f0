// What std::_Exit leaves out and a good end still does: flushing, and the data of coverage, profiling
// and leak checking, where the build has them.
#pragma once

#include <lastcall/detail/config.hpp>
#include <lastcall/detail/thread_end.hpp>

#include <sys/types.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>

#if LASTCALL_LINUX && defined(__GLIBC__)
#include <stdio_ext.h>
#endif

#if defined(__ELF__)  // elsewhere a weak declaration without a definition does not link
extern "C" {
// Weak: null unless the program was built with the instrumentation that defines them. libgcov keeps
// __gcov_dump in an archive member that a weak reference does not pull in; instrumented objects refer
// to __gcov_exit themselves, so that one is there whenever there is something to write.
// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming): theirs
[[gnu::weak]] void __gcov_dump(void);
[[gnu::weak]] void __gcov_exit(void);
[[gnu::weak]] int __llvm_profile_write_file(void);
[[gnu::weak]] void __lsan_do_leak_check(void);
// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)
}
#endif

namespace lastcall::detail {

/// A thread that is blocked reading stdin has its lock, for which fflush(nullptr) would wait, though there is nothing
/// in it to flush. So stdin has no lock any more. Whoever reads it goes on to the exit without.
inline void let_go_of_stdin() noexcept {
#if LASTCALL_LINUX && defined(__GLIBC__)
  if (::ftrylockfile(stdin) != 0) {
    ::__fsetlocking(stdin, FSETLOCKING_BYCALLER);
  } else {
    ::funlockfile(stdin);
  }
#endif
}

/// The last rites one by one: std::cout, std::cerr, std::clog; then stdio, and what instrumentation collected. A
/// stream's buffer may be the user's, and end its thread there: the rest is for another thread then.
inline constexpr unsigned last_rites = 4;

/// May block for as long as somebody holds stdout's lock or nobody reads it: the caller's caller keeps the clock. So
/// it may for who is blocked reading another stdio stream than stdin; elsewhere than with glibc, for stdin as well.
/// Leaks are looked for if everybody is out. What stragglers still use is none; and the check stops
/// every thread, also the one that keeps the clock, until each has stopped: one in vfork() never does.
inline void perform_rite(unsigned rite, bool everybody_out) {
  // A stream that throws on failure has nothing more to say.
  switch (rite) {
    case 0: thrown_by([] { std::cout.flush(); }); return;
    case 1: thrown_by([] { std::cerr.flush(); }); return;
    case 2: thrown_by([] { std::clog.flush(); }); return;
    default: break;
  }
  let_go_of_stdin();
  std::fflush(nullptr);
#if defined(__ELF__)
  if (__gcov_dump != nullptr) {
    __gcov_dump();
  } else if (__gcov_exit != nullptr) {
    __gcov_exit();
  }
  if (__llvm_profile_write_file != nullptr) __llvm_profile_write_file();
  if (everybody_out && __lsan_do_leak_check != nullptr) __lsan_do_leak_check();
#else
  static_cast<void>(everybody_out);
#endif
}

/// Ends the process as if `number` had ended it; where the kernel doesn't let it (a process 1 is immune
/// to signals that it does not handle), as a shell would say it: 128 + number. So it is with the signals
/// that stop a process where nobody handles them: it would be there until somebody continues it.
[[noreturn]] inline void exit_as_by_signal(int number) noexcept {
  if (number == SIGTSTP || number == SIGTTIN || number == SIGTTOU) std::_Exit(128 + number);
  struct sigaction plain {};
  plain.sa_handler = SIG_DFL;
  ::sigemptyset(&plain.sa_mask);
  ::sigaction(number, &plain, nullptr);
  sigset_t only;
  ::sigemptyset(&only);
  ::sigaddset(&only, number);
  ::pthread_sigmask(SIG_UNBLOCK, &only, nullptr);
  // To this thread, so that it acts before the call returns.
  ::raise(number);
  std::_Exit(128 + number);
}

}  // namespace lastcall::detail
