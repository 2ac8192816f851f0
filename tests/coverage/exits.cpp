// Linked into every program of the build that measures coverage. gcc's runtime library writes what was
// counted when main() has returned; here it does so at _exit() and abort() too, at which a child that forks
// and leaves would otherwise take with it all that it alone has run.
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <initializer_list>

extern "C" void __gcov_exit(void);

namespace support {
// tests/support/allocations.hpp has it, where a program includes that.
[[gnu::weak]] extern bool (*refusal_rule)() noexcept;
}  // namespace support

namespace {

int exit_code = 0;

void leave_anyway(int) { ::syscall(SYS_exit_group, exit_code); }

// A test of what lastcall itself writes says where it wants it; then nothing else may write.
bool is_watched() { return std::getenv("GCOV_PREFIX") != nullptr; }

// Writing takes a descriptor and memory, and without memory gcc's runtime library crashes. What tests refuse,
// they refuse to what is tested.
void refuse_nothing_more() {
  if (&support::refusal_rule != nullptr) support::refusal_rule = nullptr;
  for (const auto resource : {RLIMIT_NOFILE, RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit{};
    ::getrlimit(resource, &limit);
    limit.rlim_cur = limit.rlim_max;
    ::setrlimit(resource, &limit);
  }
}

// Files and allocations at the end of a process that may hang on purpose: a few seconds, and no more.
void write_counters() {
  if (is_watched()) return;
  // One thread ends the process; another that comes meanwhile would end it in the middle of a file.
  static std::atomic_flag begun = ATOMIC_FLAG_INIT;
  while (begun.test_and_set()) ::pause();
  struct sigaction late {};
  late.sa_handler = leave_anyway;
  ::sigaction(SIGALRM, &late, nullptr);
  sigset_t only;
  ::sigemptyset(&only);
  ::sigaddset(&only, SIGALRM);
  ::pthread_sigmask(SIG_UNBLOCK, &only, nullptr);
  ::alarm(3);
  refuse_nothing_more();
  __gcov_exit();
  ::alarm(0);
}

}  // namespace

// The counters can be written once. When lastcall asks for it there is still something to count.
extern "C" void __gcov_dump(void) {
  if (is_watched()) __gcov_exit();
}

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
