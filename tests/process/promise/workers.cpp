// Workers that don't come back, each held by something else.
#include "../../support/emulation.hpp"
#include "adversary.hpp"

#include <arpa/inet.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <string>
#include <thread>

namespace promise {
namespace {

using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;

// One worker that does `held`, and a main that is where it belongs.
template <class Held>
[[noreturn]] void run_with_worker(Stand& stand, Held held) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand, held](CancellationToken) {
    stand.ready();
    held();
  });
  lifetime.run();
}

void in_read(Stand& stand) {
  run_with_worker(stand, [] {
    char byte = 0;
    while (::read(empty_pipe(), &byte, 1) <= 0) {
    }
  });
}

void in_accept(Stand& stand) {
  run_with_worker(stand, [] {
    const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in here{};
    here.sin_family = AF_INET;
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ::bind(listener, reinterpret_cast<const sockaddr*>(&here), sizeof here);
    ::listen(listener, 1);
    ::accept(listener, nullptr, nullptr);
  });
}

void in_futex(Stand& stand) {
  static std::uint32_t word = 0;
  run_with_worker(stand, [] {
    for (;;) ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
  });
}

void on_mutex(Stand& stand) {
  static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  ::pthread_mutex_lock(&mutex);
  run_with_worker(stand, [] { ::pthread_mutex_lock(&mutex); });
}

void in_a_spin(Stand& stand) {
  run_with_worker(stand, [] { spin(); });
}

void in_sleep(Stand& stand) {
  run_with_worker(stand, [] {
    for (;;) ::sleep(1'000'000);
  });
}

// The kernel lets the parent's thread sleep until the child has gone or executed something, and shows
// it as uninterruptible.
void in_vfork(Stand& stand) {
  run_with_worker(stand, [] {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    const pid_t child = ::vfork();
#pragma GCC diagnostic pop
    if (child == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      for (;;) ::syscall(SYS_ppoll, nullptr, 0, nullptr, nullptr, 0);
    }
  });
}

// Seizes one thread of its parent, stops it, and lets it stand there.
void stop_thread_of_parent(pid_t thread) {
  if (::ptrace(PTRACE_SEIZE, thread, nullptr, nullptr) != 0) ::_exit(1);
  ::ptrace(PTRACE_INTERRUPT, thread, nullptr, nullptr);
  int status = 0;
  ::waitpid(thread, &status, __WALL);
  for (;;) ::pause();
}

void stopped_by_tracer(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  static std::atomic<pid_t> thread{0};
  lifetime.spawn("held worker", [](CancellationToken) {
    thread.store(static_cast<pid_t>(::syscall(SYS_gettid)));
    spin();
  });
  while (thread.load() == 0) std::this_thread::sleep_for(1ms);
  const pid_t tracer = ::fork();
  if (tracer == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    stop_thread_of_parent(thread.load());
  }
  const std::string stat = "/proc/self/task/" + std::to_string(thread.load()) + "/stat";
  for (int turn = 0; turn < 2000; ++turn) {
    char line[256] = {};
    if (std::FILE* file = std::fopen(stat.c_str(), "re")) {
      static_cast<void>(std::fgets(line, sizeof line, file) == nullptr);
      std::fclose(file);
    }
    if (std::string(line).find(") t ") != std::string::npos) break;
    std::this_thread::sleep_for(1ms);
  }
  stand.ready();
  lifetime.run();
}

void many(Stand& stand) {
  constexpr int count = sanitized ? 200 : 2000;
  ShutdownCoordinator lifetime(stand.options());
  static std::atomic<int> in{0};
  for (int i = 0; i < count; ++i) {
    lifetime.spawn("held worker " + std::to_string(i), [](CancellationToken) {
      ++in;
      hang();
    });
  }
  while (in.load() < count) std::this_thread::sleep_for(1ms);
  stand.ready();
  lifetime.run();
}

void many_that_leave(Stand& stand) {
  constexpr int count = sanitized ? 200 : 2000;
  ShutdownCoordinator lifetime(stand.options());
  static std::atomic<int> in{0};
  for (int i = 0; i < count; ++i) {
    lifetime.spawn("worker " + std::to_string(i), [](CancellationToken token) {
      ++in;
      token.wait();
    });
  }
  while (in.load() < count) std::this_thread::sleep_for(1ms);
  stand.ready();
  lifetime.run();
}

void many_guards_without_names(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  std::vector<lastcall::WaitGroup::Guard> guards;
  for (int i = 0; i < 37; ++i) guards.push_back(lifetime.enter());
  guards.push_back(lifetime.enter("held guard"));
  stand.ready();
  lifetime.run();
}

// Both processors are taken, and more than once: the signal thread must get its turn.
void spinners(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  for (int i = 0; i < 8; ++i) {
    lifetime.spawn("held worker", [&stand](CancellationToken) {
      stand.ready();
      spin();
    });
  }
  lifetime.run();
}

void leaves_by_pthread_exit(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("leaver", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
    ::pthread_exit(nullptr);
  });
  lifetime.run();
}

// A child process of its own that holds on to everything it inherited.
void forks_a_child_that_stays(Stand& stand) {
  run_with_worker(stand, [] {
    const pid_t child = ::fork();
    if (child == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      for (;;) ::pause();
    }
    ::waitpid(child, nullptr, 0);
  });
}

void forks_all_the_time(Stand& stand) {
  run_with_worker(stand, [] {
    for (;;) {
      const pid_t child = ::fork();
      if (child == 0) ::_exit(0);
      if (child > 0) ::waitpid(child, nullptr, 0);
    }
  });
}

}  // namespace

void add_workers(std::vector<Adversary>& all) {
  const auto held = [&all](const char* name, void (*body)(Stand&), const char* in) {
    Adversary adversary;
    adversary.name = name;
    adversary.how = "exit 124";
    adversary.says = {"held worker"};
    if (in != nullptr) adversary.says.emplace_back(in);
    adversary.body = body;
    all.push_back(adversary);
  };
  const auto leaves = [&all](const char* name, void (*body)(Stand&)) {
    Adversary adversary;
    adversary.name = name;
    adversary.how = "exit 0";
    adversary.body = body;
    adversary.bound = Bound::at_once;
    all.push_back(adversary);
  };
#if defined(LASTCALL_PORTABLE)
  const auto in = [](const char*) -> const char* { return nullptr; };
#else
  const auto in = [](const char* what) { return what; };
#endif
  // Under an emulator the kernel's own functions are told, which have other names than these.
  const auto call = [in](const char* name) {
    return support::emulator.empty() ? in(name) : nullptr;
  };
  held("worker in read()", in_read, call("read("));
  held("worker in accept()", in_accept, in("accept"));
  held("worker in futex()", in_futex, in("futex"));
  held("worker in pthread_mutex_lock()", on_mutex, in("futex"));
  held("worker in a spin", in_a_spin, in("running"));
  held("worker in sleep(1e6)", in_sleep, call("clock_nanosleep"));
#if defined(LASTCALL_TSAN)
  held("worker in vfork()", in_vfork, nullptr);  // which it turns into fork()
#else
  held("worker in vfork()", in_vfork, in("vfork"));
#endif
  all.back().needs.own_kernel = true;
  held("worker stopped by ptrace", stopped_by_tracer, in("stopped by a debugger"));
  all.back().needs.own_kernel = true;
  held("worker waits for a forked child", forks_a_child_that_stays, call("wait4"));
  held("worker forks all the time", forks_all_the_time, nullptr);
  held("workers, 8, in a spin", spinners, in("running"));
  if constexpr (sizeof(void*) >= 8) {  // there are addresses for their stacks
    held("workers, 2000, held", many, nullptr);
    leaves("workers, 2000, that leave", many_that_leave);
    all.back().bound = Bound::grace;
  }
  held("guards, 37 of them unnamed", many_guards_without_names, nullptr);
  all.back().says = {"37 unnamed", "held guard"};
  leaves("worker leaves by pthread_exit()", leaves_by_pthread_exit);
}

}  // namespace promise
