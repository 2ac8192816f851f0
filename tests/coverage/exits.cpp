// Linked into every program of the build that measures coverage: the ends of a process at which gcc's
// runtime library does not write what it counted, _exit() and abort(), write it first. A child that
// forks and leaves would otherwise take with it all that it alone has run.
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

// Not __gcov_dump(): naming it would link it, and lastcall would then never need its other way.
extern "C" void __gcov_exit(void);

namespace {

int exit_code = 0;

void leave_anyway(int) { ::syscall(SYS_exit_group, exit_code); }

// Files and allocations at the end of a process that may hang on purpose: a few seconds, and no more.
void write_counters() {
  struct sigaction late {};
  late.sa_handler = leave_anyway;
  ::sigaction(SIGALRM, &late, nullptr);
  sigset_t only;
  ::sigemptyset(&only);
  ::sigaddset(&only, SIGALRM);
  ::pthread_sigmask(SIG_UNBLOCK, &only, nullptr);
  ::alarm(3);
  __gcov_exit();
  ::alarm(0);
}

}  // namespace

extern "C" [[noreturn]] void _exit(int code) {
  exit_code = code;
  write_counters();
  for (;;) ::syscall(SYS_exit_group, code);
}

extern "C" [[noreturn]] void _Exit(int code) noexcept { _exit(code); }

extern "C" [[noreturn]] void abort() noexcept {
  exit_code = 128 + SIGABRT;
  write_counters();
  reinterpret_cast<void (*)()>(::dlsym(RTLD_NEXT, "abort"))();
  for (;;) ::syscall(SYS_exit_group, exit_code);
}
