// fork, vfork and posix_spawn out of a program whose threads use all of lastcall at once; and threads with
// alternate signal stacks.
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <pthread.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <vector>

extern char** environ;

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::SignalTrap;
using lastcall::TaskGroup;
using lastcall::WaitGroup;
using support::expect;

/// Threads that never rest, each with a brick of its own, until it is destroyed.
class Busy {
 public:
  Busy() {
    keep_doing([] {
      CancellationSource root;
      const CancellationSource soon(root.token(), 1ms);
      const CancellationSource late(root.token(), 1h);
      static_cast<void>(soon.token().wait_for(100us));
    });
    keep_doing([] {
      CancellationSource root;
      const CancellationSource both = CancellationSource::any_of({root.token(), root.token()});
      static_cast<void>(both.token().fd());
      root.cancel();
    });
    keep_doing([this] { static_cast<void>(group_.enter("a name")); });
    keep_doing([this] { static_cast<void>(group_.enter()); });
    keep_doing([] {
      TaskGroup group;
      group.spawn("task", [] {});
      group.wait();
    });
    keep_doing([] {
      SignalTrap trap{SIGUSR1, SIGUSR2};
      ::raise(SIGUSR1);
      static_cast<void>(trap.wait_for(5s));
    });
  }
  ~Busy() {
    over_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  template <class Body>
  void keep_doing(Body body) {
    threads_.emplace_back([this, body] {
      while (!over_) body();
    });
  }

  WaitGroup group_;
  std::atomic<bool> over_{false};
  std::vector<std::thread> threads_;
};

// In a child: all bricks work, as in a process of its own.
int use_everything() {
  SignalTrap trap{SIGTERM};
  ::raise(SIGTERM);
  if (!trap.wait_for(10s)) return 1;
  CancellationSource source(CancellationToken(), 2ms);
  if (!source.token().wait_for(10s)) return 2;
  TaskGroup tasks;
  std::atomic<int> runs{0};
  tasks.spawn("task", [&runs] { ++runs; });
  tasks.wait();
  WaitGroup group;
  { const WaitGroup::Guard guard = group.enter("a name"); }
  if (!group.wait_for(10s)) return 3;
  return runs == 1 ? 0 : 4;
}

// How it ended, within a bound.
std::string wait_for(pid_t child) {
  int status = 0;
  const auto reap = [&] { return ::waitpid(child, &status, WNOHANG) == child; };
  if (support::eventually(reap, 30s)) return support::in_words(status);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  return "hung";
}

}  // namespace

TEST_CASE("children that are forked while every thread is busy are whole, and so is the parent") {
  const support::Ended ended = support::in_a_process([] {
    SignalTrap trap{SIGTERM, SIGHUP};
    {
      const Busy busy;
      for (int turn = 0; turn < 60; ++turn) {
        const pid_t child = ::fork();
        if (child == 0) ::_exit(use_everything());
        const std::string how = wait_for(child);
        if (!expect(how == "exit 0", "a child's end: " + how)) break;
      }
      ::raise(SIGHUP);
      const auto got = trap.wait_for(10s);
      expect(got && got->number == SIGHUP, "the parent's trap has its own signals, and no others");
    }
    expect(!trap.try_wait(), "no child's signal has come here");
    expect(use_everything() == 0, "all works in the parent");
    // use_everything() raises SIGTERM, which the outer trap gets as well.
    static_cast<void>(trap.try_wait());
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a coordinator's process may fork, and the child may have one of its own") {
  const support::Ended ended = support::in_a_process([] {
    lastcall::ShutdownCoordinator parent(support::quiet());
    const Busy busy;
    for (int turn = 0; turn < 10; ++turn) {
      const pid_t child = ::fork();
      if (child == 0) {
        lastcall::ShutdownCoordinator own(support::quiet());
        own.spawn("worker", [](const CancellationToken& token) { token.wait(); });
        ::raise(SIGTERM);
        ::_exit(own.drain().exit_code);
      }
      const std::string how = wait_for(child);
      if (!expect(how == "exit 0", "a child's end: " + how)) break;
    }
    expect(parent.is_ready(), "nobody has asked the parent to stop");
    ::raise(SIGTERM);
    expect(parent.drain().exit_code == 0, "the parent drains");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

namespace {

// In a function of its own, so that the child, which runs on this stack, can't change what the caller keeps in
// registers.
[[gnu::noinline]] pid_t start_by_vfork(char* const* words) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  const pid_t child = ::vfork();
#pragma GCC diagnostic pop
  if (child == 0) {
    ::execv(words[0], words);
    ::_exit(126);
  }
  return child;
}

}  // namespace

TEST_CASE("a program started by posix_spawn or vfork has the default of what is trapped") {
  const support::Ended ended = support::in_a_process([] {
    SignalTrap trap{SIGTERM};  // no thread of ours sends it
    const Busy busy;
    for (int turn = 0; turn < 20; ++turn) {
      const std::string shell = "/bin/sh";
      const std::string option = "-c";
      const std::string script = "kill -TERM $$; exit 7";
      char* words[] = {const_cast<char*>(shell.c_str()), const_cast<char*>(option.c_str()),
                       const_cast<char*>(script.c_str()), nullptr};
      pid_t spawned = -1;
      expect(::posix_spawn(&spawned, "/bin/sh", nullptr, nullptr, words, environ) == 0, "spawned");
      const std::string how = wait_for(spawned);
      expect(how == "SIGTERM", "the spawned program's end: " + how);

      const std::string end = wait_for(start_by_vfork(words));
      expect(end == "SIGTERM", "the vforked program's end: " + end);
    }
    expect(!trap.try_wait(), "their signals were theirs");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

namespace {

struct AlternateStack {
  static constexpr std::size_t size = 64 * 1024;
  char* memory = new char[size];
  std::atomic<pid_t> thread{0};
  std::atomic<bool> over{false};
  static inline std::atomic<std::uintptr_t> handled_at{0};
  bool holds(std::uintptr_t address) const {
    const auto begin = reinterpret_cast<std::uintptr_t>(memory);
    return address >= begin && address < begin + size;
  }
  ~AlternateStack() { delete[] memory; }
};

void note_stack(int) {
  char here = 0;
  AlternateStack::handled_at = reinterpret_cast<std::uintptr_t>(&here);
}

// Nearly all of the thread's stack is in use: a handler on it would run over its end.
__attribute__((noinline)) void fill_stack(AlternateStack& alternate, std::size_t leave) {
  pthread_attr_t attributes;
  void* bottom = nullptr;
  std::size_t size = 0;
  ::pthread_getattr_np(::pthread_self(), &attributes);
  ::pthread_attr_getstack(&attributes, &bottom, &size);
  ::pthread_attr_destroy(&attributes);
  // Looked up now: the loader keeps the vector registers on the stack meanwhile, as a signal's frame does.
  ::usleep(0);
  const auto own_id = support::thread_id();
  char here = 0;
  const auto room = static_cast<std::size_t>(&here - static_cast<char*>(bottom));
  volatile char* const block =
      static_cast<char*>(__builtin_alloca(room > leave ? room - leave : 1));
  block[0] = 1;
  alternate.thread = own_id;
  while (!alternate.over) ::usleep(200);
}

}  // namespace

TEST_CASE("a signal on a thread with no stack left is taken on its alternate stack") {
  const support::Ended ended = support::in_a_process([] {
    struct sigaction chained {};
    chained.sa_handler = &note_stack;
    ::sigaction(SIGUSR1, &chained, nullptr);
    SignalTrap trap{SIGUSR1};
    AlternateStack alternate;
    std::thread sender([&] {
      support::eventually([&] { return alternate.thread != 0; });
      for (int turn = 0; turn < 20; ++turn) {
        AlternateStack::handled_at = 0;
        ::syscall(SYS_tgkill, ::getpid(), alternate.thread.load(), SIGUSR1);
        expect(trap.wait_for(10s).has_value(), "the trap gets it");
        support::eventually([] { return AlternateStack::handled_at != 0; });
        expect(alternate.holds(AlternateStack::handled_at), "it ran on the alternate stack");
      }
      alternate.over = true;
    });
    const bool ran = support::on_stack_of(64 * 1024, [&alternate] {
      stack_t stack{};
      stack.ss_sp = alternate.memory;
      stack.ss_size = AlternateStack::size;
      if (::sigaltstack(&stack, nullptr) != 0) std::abort();
      fill_stack(alternate, 3000);  // less than a signal's frame takes with the vector registers
    });
    expect(ran, "there is a thread with a small stack");
    sender.join();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}
