// Refuses one system call of a child, whichever of its threads makes it, and counts the others: what
// `strace -f -e inject=...` does, by the same ptrace(2).
//
// Why not strace itself: it counts the calls of each thread by themselves, so "the third" hits the third
// of every thread at once; it counts from execve(2) on, so what the dynamic loader does is hit first; it
// can't tell a futex(2) of the C library, which ends the process if that fails for no reason, from one
// that was made by syscall(2); and a run costs fifty times as much.
#pragma once

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

namespace starvation {

#if defined(__x86_64__)
inline constexpr bool can_trace = true;
inline bool skip_call(pid_t thread) {
  return ::ptrace(PTRACE_POKEUSER, thread, offsetof(user_regs_struct, orig_rax), -1L) == 0;
}
inline bool set_result(pid_t thread, long result) {
  return ::ptrace(PTRACE_POKEUSER, thread, offsetof(user_regs_struct, rax), result) == 0;
}
#else
inline constexpr bool can_trace = false;
inline bool skip_call(pid_t) { return false; }
inline bool set_result(pid_t, long) { return false; }
#endif

/// In the child, before anything: its calls of this number (-1: all of them) stop for the tracer, all
/// others run at full speed.
inline bool let_calls_be_traced(long call) {
  const auto number = static_cast<std::uint32_t>(call);
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, call < 0 ? SECCOMP_RET_TRACE : SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE),
  };
  const sock_fprog program{sizeof filter / sizeof filter[0], filter};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) == 0;
}

/// A switch that a scenario turns on before what is meant and off after it: a call that nobody else makes.
inline void toggle_injection() { ::syscall(SYS_getppid); }

struct Injection {
  long call = -1;  // which system call; -1: none, only count
  long nth = 0;    // of all that the process makes while the switch is on, 1 the first
  int error = 0;
  bool made = false;  // it is carried out, and only its result is changed: close(2)
};

struct Traced {
  enum class How { exited, killed, hung, impossible };
  How how = How::impossible;
  int value = 0;  // exit code or signal
  bool injected = false;
  std::map<long, long> calls;  // while the switch was on
};

class Tracer {
 public:
  /// Follows `child`, a child of this process that waits for something which `go` gives it.
  template <class Go>
  static Traced follow(pid_t child, const Injection& injection, std::chrono::milliseconds limit,
                       Go go) {
    Tracer tracer(child, injection);
    return tracer.run(limit, go);
  }

 private:
  Tracer(pid_t child, const Injection& injection) : child_(child), injection_(injection) {}

  template <class Go>
  Traced run(std::chrono::milliseconds limit, Go go) {
    const long options =
        PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACESECCOMP | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL;
    if (::ptrace(PTRACE_SEIZE, child_, nullptr, options) != 0 ||
        ::ptrace(PTRACE_INTERRUPT, child_, nullptr, nullptr) != 0) {
      ::kill(child_, SIGKILL);
      ::waitpid(child_, nullptr, 0);
      return traced_;
    }
    start_alarm();
    const auto end = std::chrono::steady_clock::now() + limit;
    bool gone = false;
    while (!gone) {
      int status = 0;
      const pid_t thread = ::waitpid(-1, &status, __WALL);
      if (thread < 0 && errno == ECHILD) break;
      if (std::chrono::steady_clock::now() > end && traced_.how != Traced::How::hung) {
        traced_.how = Traced::How::hung;
        ::kill(child_, SIGKILL);
      }
      if (thread < 0) continue;
      if (WIFEXITED(status) || WIFSIGNALED(status)) {
        gone = thread == child_;
        if (gone) note_end(status);
        continue;
      }
      if (WIFSTOPPED(status)) {
        go_on(thread, status);
        if (!std::exchange(going_, true)) go();
      }
    }
    stop_alarm();
    return traced_;
  }

  void note_end(int status) {
    if (traced_.how == Traced::How::hung) return;
    traced_.how = WIFEXITED(status) ? Traced::How::exited : Traced::How::killed;
    traced_.value = WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status);
  }

  void go_on(pid_t thread, int status) {
    const int event = status >> 16;
    int deliver = 0;
    bool to_its_end = false;
    if (WSTOPSIG(status) == (SIGTRAP | 0x80)) {
      if (thread == refused_) {
        set_result(thread, -injection_.error);
        refused_ = 0;
      }
    } else if (event == PTRACE_EVENT_SECCOMP) {
      to_its_end = on_call(thread);
    } else if (event == 0) {
      deliver = WSTOPSIG(status);
    }
    // A thread that has been killed meanwhile refuses, and is heard of by waitpid().
    ::ptrace(to_its_end ? PTRACE_SYSCALL : PTRACE_CONT, thread, nullptr, deliver);
  }

  // Whether the thread has to stop again at the end of its call.
  bool on_call(pid_t thread) {
    __ptrace_syscall_info info{};
    if (::ptrace(PTRACE_GET_SYSCALL_INFO, thread, sizeof info, &info) <= 0 ||
        info.op != PTRACE_SYSCALL_INFO_SECCOMP) {
      return false;
    }
    const long call = static_cast<long>(info.seccomp.nr);
    if (call == SYS_getppid) {
      on_ = !on_;
      return false;
    }
    // Of the C library's own ones nothing is known but that it can't do without.
    if (!on_ || (call == SYS_futex && !by_syscall_function(info.instruction_pointer))) return false;
    const long count = ++traced_.calls[call];
    if (call != injection_.call || count != injection_.nth) return false;
    traced_.injected = true;
    refused_ = thread;
    if (!injection_.made) skip_call(thread);
    return true;
  }

  // The child has been forked off this process: the function is at the same place.
  static bool by_syscall_function(std::uint64_t instruction) {
    const auto function = reinterpret_cast<std::uint64_t>(&::syscall);
    return instruction >= function && instruction < function + 64;
  }

  // Its signal does nothing, but ends waitpid().
  static void start_alarm() {
    struct sigaction nothing {};
    nothing.sa_handler = [](int) {};
    ::sigaction(SIGALRM, &nothing, nullptr);
    const itimerval often{{0, 200'000}, {0, 200'000}};
    ::setitimer(ITIMER_REAL, &often, nullptr);
  }
  static void stop_alarm() {
    const itimerval never{};
    ::setitimer(ITIMER_REAL, &never, nullptr);
  }

  const pid_t child_;
  const Injection injection_;
  Traced traced_;
  bool on_ = false;
  bool going_ = false;
  pid_t refused_ = 0;  // the thread that is in the call that is refused
};

}  // namespace starvation
