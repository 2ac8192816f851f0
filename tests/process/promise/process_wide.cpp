// What happens to the process as a whole in the middle of its drain: stopped, throttled, exiting by
// another door, clocks that jump, limits and filters that close.
#include "adversary.hpp"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <thread>
#include <utility>

namespace promise {
namespace {

using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;

void held_worker(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    hang();
  });
  lifetime.run();
}

// ---- stopped and continued -------------------------------------------------------------------------

void stopped_past_the_end(Target& target) {
  target.send(SIGTERM);
  target.wait(50ms);
  target.poke(SIGSTOP);
  target.wait(target.grace() + 200ms);
  target.restart_clock();
  target.poke(SIGCONT);
}

void stopped_for_a_while(Target& target) {
  target.send(SIGTERM);
  target.wait(50ms);
  target.poke(SIGSTOP);
  target.wait(target.grace() / 4);
  target.poke(SIGCONT);
}

void stopped_before_the_request(Target& target) {
  target.poke(SIGSTOP);
  target.wait(50ms);
  target.poke(SIGTERM);
  target.wait(50ms);
  target.send(SIGCONT);
}

// ---- other doors -----------------------------------------------------------------------------------

// std::exit() in a drain: its code counts, static objects are destroyed under the threads that live.
void worker_exits(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("leaver", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
    std::exit(7);
  });
  lifetime.spawn("held worker", [](CancellationToken) { hang(); });
  lifetime.run();
}

void worker_exits_and_hangs_there(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("leaver", [&stand](CancellationToken token) {
    std::atexit([] { hang(); });
    stand.ready();
    token.wait();
    std::exit(7);
  });
  lifetime.run();
}

void worker_quick_exits(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("leaver", [&stand](CancellationToken token) {
    std::at_quick_exit([] { hang(); });
    stand.ready();
    token.wait();
    std::quick_exit(7);
  });
  lifetime.run();
}

// The coordinator is a static object: std::exit() destroys it in the middle of its own drain.
void static_coordinator(Stand& stand) {
  static ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("leaver", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
    std::exit(7);
  });
  lifetime.run();
}

void main_returns_with_static_coordinator(Stand& stand) {
  static ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [](CancellationToken) { hang(); });
  stand.ready();
  std::this_thread::sleep_for(40ms);
  stand.requested();
  std::exit(7);  // as main's return does
}

void without_core() {
  const rlimit none{0, 0};
  ::setrlimit(RLIMIT_CORE, &none);
}

void worker_aborts(Stand& stand) {
  without_core();
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("leaver", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
    std::abort();
  });
  lifetime.run();
}

void trapped_abort(Stand& stand) {
  without_core();
  lastcall::ShutdownOptions options = stand.options();
  options.signals = {SIGINT, SIGTERM, SIGABRT};
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.spawn("leaver", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
    std::abort();
  });
  lifetime.run();
}

void worker_terminates(Stand& stand) {
  without_core();
  std::set_terminate([] { hang(); });
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
    std::terminate();
  });
  lifetime.run();
}

// ---- a handler of the user's own that hangs --------------------------------------------------------

void handler_hangs(Stand& stand) {
  struct sigaction own {};
  own.sa_handler = [](int) { hang(); };
  ::sigaction(SIGUSR1, &own, nullptr);
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken token) {
    stand.ready();
    ::pthread_kill(::pthread_self(), SIGUSR1);
    token.wait();
  });
  lifetime.run();
}

// It was there before the coordinator, which calls it on, on whatever thread the signal came to.
void chained_handler_hangs(Stand& stand) {
  struct sigaction own {};
  own.sa_handler = [](int) { hang(); };
  ::sigaction(SIGTERM, &own, nullptr);
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("worker", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
  });
  lifetime.run();
}

// The same, and nobody but the library takes the signal, whichever of its threads that is.
void chained_handler_hangs_alone(Stand& stand) {
  struct sigaction own {};
  own.sa_handler = [](int) { hang(); };
  ::sigaction(SIGTERM, &own, nullptr);
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand] {
    stand.ready();
    hang();
  });
  lifetime.run();
}

// ---- starved ---------------------------------------------------------------------------------------

// cgroup v1 or v2, with the right to make one: a fifth of one processor, in slices of 100 ms.
bool throttle() {
  const auto write_to = [](const std::string& path, std::string_view text) {
    const int fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
    if (fd < 0) return false;
    const bool done = ::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
    ::close(fd);
    return done;
  };
  const std::string own = "/lastcall-promise-" + std::to_string(::getpid());
  const std::string v1 = "/sys/fs/cgroup/cpu" + own;
  if (::mkdir(v1.c_str(), 0755) == 0) {
    return write_to(v1 + "/cpu.cfs_period_us", "100000") &&
           write_to(v1 + "/cpu.cfs_quota_us", "20000") && write_to(v1 + "/cgroup.procs", "0");
  }
  const std::string v2 = "/sys/fs/cgroup" + own;
  write_to("/sys/fs/cgroup/cgroup.subtree_control", "+cpu");
  return ::mkdir(v2.c_str(), 0755) == 0 && write_to(v2 + "/cpu.max", "20000 100000") &&
         write_to(v2 + "/cgroup.procs", "0");
}

void throttled(Stand& stand) {
  if (!throttle()) write_out(STDERR_FILENO, "(no cgroup to be had: not throttled)\n");
  ShutdownCoordinator lifetime(stand.options());
  for (int i = 0; i < 2; ++i) {
    lifetime.spawn("held worker", [&stand](CancellationToken) {
      stand.ready();
      spin();
    });
  }
  lifetime.run();
}

void remove_cgroup(pid_t process) {
  const std::string own = "/lastcall-promise-" + std::to_string(process);
  ::rmdir(("/sys/fs/cgroup/cpu" + own).c_str());
  ::rmdir(("/sys/fs/cgroup" + own).c_str());
}

// Of the lowest priority, on one processor, which a busy process of the usual priority shares with it.
void starved(Stand& stand) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(static_cast<std::size_t>(::sched_getcpu()), &one);
  ::sched_setaffinity(0, sizeof one, &one);
  if (::fork() == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::setpriority(PRIO_PROCESS, 0, 0);
    spin();
  }
  ::setpriority(PRIO_PROCESS, 0, 19);
  held_worker(stand);
}

// Timers may be late by seconds, to save power: threads inherit that from their maker.
void lazy_timers(Stand& stand) {
  ::prctl(PR_SET_TIMERSLACK, 5'000'000'000UL, 0, 0, 0);
  held_worker(stand);
}

// The kernel gives the memory back before it says that the process is gone.
void much_memory(Stand& stand) {
  constexpr std::size_t size = std::size_t{256} << 20U;
  auto* const memory = static_cast<char*>(std::malloc(size));
  for (std::size_t at = 0; memory != nullptr && at < size; at += 4096) memory[at] = 1;
  held_worker(stand);
}

// ---- clocks ----------------------------------------------------------------------------------------

// The kernel lets poll(2) be late in proportion to its time, most of all for a nice process on an idle
// machine; and nothing wakes the signal thread before the end.
constexpr milliseconds long_grace = 20s;

void long_grace_period(Stand& stand) {
  ::setpriority(PRIO_PROCESS, 0, 19);
  lastcall::ShutdownOptions options = stand.options();
  options.grace_period = long_grace;
  options.abort_margin = 0ms;
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.spawn("held worker", [](CancellationToken) { hang(); });
  hold_allocator();
  stand.ready();
  lifetime.run();
}

template <int Hours>
void wall_clock_jumps(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
    step_wall_clock(std::chrono::hours(Hours));
    hang();
  });
  lifetime.run();
}

// ---- limits and filters ----------------------------------------------------------------------------

void no_descriptors(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    const rlimit none{0, 0};
    ::setrlimit(RLIMIT_NOFILE, &none);
    stand.ready();
    hang();
  });
  lifetime.run();
}

#if defined(__x86_64__) || defined(__aarch64__)

// From now on these system calls fail, in every thread.
template <std::size_t Count>
bool refuse(const unsigned (&calls)[Count], int error) {
  std::vector<sock_filter> code;
  code.push_back(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)));
  for (const unsigned call : calls) {
    code.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1));
    code.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<unsigned>(error)));
  }
  code.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  sock_fprog program{static_cast<unsigned short>(code.size()), code.data()};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0;
}

void nothing_is_allowed(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  static std::atomic<bool> in{false};
  lifetime.spawn("held worker", [](CancellationToken) {
    in = true;
    spin();
  });
  while (!in) std::this_thread::sleep_for(1ms);
  const unsigned calls[] = {
    SYS_futex,
    SYS_ppoll,
    SYS_openat,
    SYS_clone,
    SYS_clone3,
    SYS_tgkill,
    SYS_membarrier
#if defined(SYS_poll)
    ,
    SYS_poll
#endif
  };
  if (!refuse(calls, EPERM)) write_out(STDERR_FILENO, "(no filter to be had)\n");
  stand.ready();
  lifetime.run();
}

#endif

}  // namespace

void add_process_wide(std::vector<Adversary>& all) {
  const auto add = [&all](const char* name, const char* how, std::vector<std::string> says,
                          void (*body)(Stand&)) -> Adversary& {
    Adversary adversary;
    adversary.name = name;
    adversary.how = how;
    adversary.says = std::move(says);
    adversary.body = body;
    all.push_back(std::move(adversary));
    return all.back();
  };
  Adversary& past =
      add("SIGSTOP, continued past the end", "exit 124", {"held worker"}, held_worker);
  past.provoke = stopped_past_the_end;
  past.bound = Bound::at_once;
  add("SIGSTOP, continued before the end", "exit 124", {"held worker"}, held_worker).provoke =
      stopped_for_a_while;
  add("SIGSTOP before the request", "exit 124", {"held worker"}, held_worker).provoke =
      stopped_before_the_request;
  add("std::exit(7) by a worker", "exit 7", {}, worker_exits).bound = Bound::at_once;
  add("std::exit(7), atexit() hangs", "exit 124", {"leaver"}, worker_exits_and_hangs_there);
  add("std::quick_exit(7), handler hangs", "exit 124", {"leaver"}, worker_quick_exits);
  add("std::exit(7), coordinator static", "exit 7", {}, static_coordinator).bound = Bound::at_once;
  add("main returns, coordinator static", "exit 7", {"held worker"},
      main_returns_with_static_coordinator)
      .provoke = [](Target&) {};
  add("std::abort() by a worker", "SIGABRT", {}, worker_aborts).bound = Bound::at_once;
  Adversary& trapped = add("std::abort(), SIGABRT trapped", "SIGABRT", {}, trapped_abort);
  trapped.bound = Bound::at_once;
#if defined(__s390x__)
  // qemu-user 10.0: SIGILL, if any handler of SIGABRT returns on another thread than the first.
  trapped.needs.own_kernel = true;
#endif
  add("std::terminate(), handler hangs", "exit 124", {"held worker"}, worker_terminates);
  add("signal handler hangs in a worker", "exit 124", {"held worker"}, handler_hangs);
  add("signal handler hangs, chained", "exit 0", {}, chained_handler_hangs).bound = Bound::at_once;
  add("signal handler hangs, all block it", "exit 124", {"held worker"},
      chained_handler_hangs_alone);
  Adversary& slow = add("throttled to a fifth", "exit 124", {"held worker"}, throttled);
  slow.extra = 300ms;  // throttled for up to 80 ms at a time, at every step
  slow.clean_up = remove_cgroup;
  Adversary& nice = add("nice 19 beside a busy process", "exit 124", {"held worker"}, starved);
  nice.extra = 300ms;
  nice.needs.own_kernel = true;
  add("timer slack of 5 s", "exit 124", {"held worker"}, lazy_timers);
  add("256 MiB to be given back", "exit 124", {"held worker"}, much_memory);
  Adversary& forward =
      add("wall clock an hour ahead", "exit 124", {"held worker"}, wall_clock_jumps<1>);
  forward.needs.plain_build = true;
  Adversary& back =
      add("wall clock an hour back", "exit 124", {"held worker"}, wall_clock_jumps<-1>);
  back.needs.plain_build = true;
  Adversary& patient =
      add("nice 19, a grace period of 20 s", "exit 124", {"held worker"}, long_grace_period);
  patient.bound = Bound::at_once;
  patient.extra = long_grace;
  patient.needs.long_form = true;
  patient.needs.plain_build = true;
  Adversary& bare = add("RLIMIT_NOFILE is 0", "exit 124", {"held worker"}, no_descriptors);
  bare.needs.plain_build = true;  // a leak check wants descriptors
#if defined(__x86_64__) || defined(__aarch64__)
  Adversary& filter =
      add("seccomp: no futex, poll, open", "exit 124", {"held worker"}, nothing_is_allowed);
  filter.needs.plain_build = true;
#endif
}

}  // namespace promise
