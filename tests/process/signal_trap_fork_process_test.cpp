// The trap and its process's children: fork, vfork, bare clones, and programs that are executed.
#include <lastcall/signal_trap.hpp>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/signals.hpp"
#include "support/threads.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <atomic>
#include <chrono>
#include <csignal>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

using namespace std::chrono_literals;
using namespace support;
using lastcall::SignalIgnore;
using lastcall::SignalInfo;
using lastcall::SignalTrap;

TEST_CASE("in a forked child a trap made before acts as if it weren't there") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGTERM, SIGINT, SIGHUP, SIGUSR1};
    const auto how = in_a_grandchild([] { ::raise(SIGTERM); });
    expect(how == "SIGTERM", "the default action: " + how);
    const auto sent = in_a_grandchild([] {
      ::kill(::getpid(), SIGINT);
      ::pause();
    });
    expect(sent == "SIGINT", "the default action: " + sent);
    expect_equal(pending(trap), 0, "the parent's signals");
    expect(!is_readable(trap.fd()), "and nothing to read");
    ::raise(SIGTERM);
    expect_equal(pending(trap), 1, "the parent's own");
  }));
}

TEST_CASE("in a forked child the previous disposition is back, whatever it was") {
  check_clean(in_a_process([] {
    set_handler(SIGHUP, SIG_IGN);
    set_handler(SIGUSR1, plain_handler);
    install_on_top(SIGUSR2);
    SignalTrap trap{SIGTERM, SIGHUP, SIGUSR1, SIGUSR2};
    const auto how = in_a_grandchild([] {
      ::raise(SIGHUP);
      ::raise(SIGUSR1);
      ::raise(SIGUSR2);
      expect_equal(plain_calls.load(), 1, "calls of the plain handler");
      expect_equal(top_calls.load(), 1, "calls of the SA_SIGINFO handler");
      expect(handler_of(SIGHUP) == SIG_IGN, "ignored, also for the programs that it executes");
      expect(is_default(SIGTERM), "the default");
    });
    expect(how == "exit 0", how);
    expect_equal(pending(trap), 0, "the parent's signals");
  }));
}

TEST_CASE("a child's signals never reach the parent's trap, nor the parent's the child's") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGTERM, SIGUSR1};
    ::raise(SIGUSR1);  // pending at the fork
    int ends[2];
    expect(::pipe(ends) == 0, "a pipe");
    const pid_t parent = ::getpid();
    const auto how = in_a_grandchild([&] {
      SignalTrap own{SIGTERM, SIGUSR1};
      expect_equal(pending(own), 0, "signals from before");
      ::raise(SIGTERM);
      ::kill(parent, SIGUSR1);
      const SignalInfo got = own.wait();
      expect_equal(got.number, SIGTERM, "what the child got");
      expect_equal(got.sender_pid, ::getpid(), "who sent it");
      expect(!own.wait_for(50ms), "nothing else came");
    });
    expect(how == "exit 0", how);
    expect_equal(pending(trap), 2, "the parent's signals");
  }));
}

TEST_CASE("a new trap in a forked child works, and its end puts back what was there") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    std::optional<SignalTrap> old;
    old.emplace(std::initializer_list<int>{SIGTERM, SIGUSR1});
    const auto body = [&](bool old_goes_first) {
      {
        SignalTrap trap{SIGTERM, SIGUSR1};
        if (old_goes_first) old.reset();
        ::raise(SIGTERM);
        ::raise(SIGUSR1);
        expect_equal(pending(trap), 2, "signals of the new trap");
        expect_equal(plain_calls.load(), 1, "calls of the handler from before");
      }
      expect(is_default(SIGTERM), "the default is back");
      expect(handler_of(SIGUSR1) == plain_handler, "the handler is back");
      old.reset();
      expect(is_default(SIGTERM), "the default is there still");
      const auto how = in_a_grandchild([] { ::raise(SIGTERM); });
      expect(how == "SIGTERM", how);
    };
    for (const bool old_goes_first : {false, true}) {
      const auto how = in_a_grandchild([&] { body(old_goes_first); });
      expect(how == "exit 0", how);
    }
    // What children did to their copy of the trap concerns nobody here.
    ::raise(SIGTERM);
    expect_equal(pending(*old), 1, "signals of the parent's trap");
  }));
}

TEST_CASE("in a forked child the parent's trap is empty, and takes nothing from the parent") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGUSR1};
    ::raise(SIGUSR1);
    ::raise(SIGUSR1);
    expect(trap.try_wait().has_value(), "one is read, one is in the buffer");
    ::raise(SIGUSR1);
    const auto how = in_a_grandchild([&] {
      expect(!is_readable(trap.fd()), "nothing to read");
      expect(!trap.try_wait(), "nothing pending");
      expect(!trap.wait_for(20ms), "nothing comes");
      lastcall::CancellationSource source;
      source.cancel();
      expect(!trap.wait(source.token()), "cancelled");
      const std::string why = message_of([&] { trap.wait(); });
      expect(why.find("forked") != std::string::npos, "refused to wait for ever: " + why);
      const SignalIgnore ignore(SIGUSR1);  // nobody holds it here
      lastcall::detail::TrapCore core;
      core.subscribe(SIGUSR2);
    });
    expect(how == "exit 0", how);
    expect_equal(pending(trap), 2, "the parent's signals");
  }));
}

TEST_CASE("signals that nobody read are not raised again in a forked child") {
  check_clean(in_a_process([] {
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGTERM});
    ::raise(SIGTERM);
    const auto how = in_a_grandchild([&] { trap.reset(); });
    expect(how == "exit 0", how);
    trap->wait();
  }));
}

TEST_CASE("in a forked child nobody waits for handlers that run on the parent's threads") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGUSR1};
    // As a thread of the parent would count itself, that isn't there in the child.
    for (std::atomic<unsigned>& side : lastcall::detail::signal_registry.in_flight) ++side;
    const auto how = in_a_grandchild([] {
      { const SignalTrap own{SIGUSR1}; }
      expect(is_default(SIGUSR1), "the trap has gone");
    });
    expect(how == "exit 0", how);
    for (std::atomic<unsigned>& side : lastcall::detail::signal_registry.in_flight) --side;
  }));
}

namespace {

// Somebody's fork hooks, registered before the first trap: so in the parent the first comes after ours, and
// the two others before ours.
void (*in_prepare)() = nullptr;
void (*in_the_parent)() = nullptr;
void (*in_the_child)() = nullptr;
template <void (**Hook)()>
void call_hook() {
  if (*Hook != nullptr) (*Hook)();
}
void register_hooks() {
  ::pthread_atfork(call_hook<&in_prepare>, call_hook<&in_the_parent>, call_hook<&in_the_child>);
}

std::optional<SignalTrap> hooks_trap;

sigset_t mask_now() {
  sigset_t now;
  ::pthread_sigmask(SIG_BLOCK, nullptr, &now);
  return now;
}
bool is_same_mask(const sigset_t& a, const sigset_t& b) {
  for (int number = 1; number < NSIG; ++number) {
    if (::sigismember(&a, number) != ::sigismember(&b, number)) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("a trap may go in a fork hook that was there before the first trap") {
  check_clean(in_a_process([] {
    register_hooks();
    const sigset_t mask = mask_now();
    for (auto* const hook : {&in_prepare, &in_the_parent, &in_the_child}) {
      hooks_trap.emplace(std::initializer_list<int>{SIGUSR1});
      *hook = [] { hooks_trap.reset(); };
      const auto how = in_a_grandchild([&] {
        expect(is_default(SIGUSR1), "the default is back");
        expect(is_same_mask(mask_now(), mask), "the mask is as it was");
        SignalTrap own{SIGUSR1};
        ::raise(SIGUSR1);
        expect_equal(pending(own), 1, "signals of a new trap in the child");
      });
      *hook = nullptr;
      expect(how == "exit 0", how);
      expect(hooks_trap.has_value() == (hook == &in_the_child), "the parent's trap");
      if (hooks_trap) {
        ::raise(SIGUSR1);
        expect_equal(pending(*hooks_trap), 1, "signals of the parent's trap");
        hooks_trap.reset();
      }
      expect(is_default(SIGUSR1), "the default is back");
      expect(is_same_mask(mask_now(), mask), "the mask is as it was");
    }
  }));
}

TEST_CASE("a trap may be made in a fork hook that was there before the first trap, and works") {
  check_clean(in_a_process([] {
    register_hooks();
    set_blocked(SIGUSR1, true);
    const sigset_t mask = mask_now();
    const SignalTrap first{SIGUSR2};
    for (auto* const hook : {&in_prepare, &in_the_parent, &in_the_child}) {
      *hook = [] { hooks_trap.emplace(std::initializer_list<int>{SIGUSR1}); };
      const auto look = [&](bool is_there) {
        expect(is_blocked(SIGUSR1) == !is_there, "its signal is unblocked, or blocked as before");
        expect(is_default(SIGUSR1) == !is_there, "it is there, or it isn't");
        if (is_there) {
          ::raise(SIGUSR1);
          expect_equal(pending(*hooks_trap), 1, "signals of the trap");
        }
        hooks_trap.reset();
        expect(is_default(SIGUSR1), "the default is back");
        expect(is_same_mask(mask_now(), mask), "the mask is as it was");
      };
      const auto how = in_a_grandchild([&] { look(hook == &in_the_child); });
      expect(how == "exit 0", how);
      look(hook != &in_the_child);
      *hook = nullptr;
    }
  }));
}

TEST_CASE("a trap that is made in the child's fork hook works in there, and others after it") {
  check_clean(in_a_process([] {
    register_hooks();
    set_blocked(SIGUSR1, true);
    const sigset_t mask = mask_now();
    hooks_trap.emplace(std::initializer_list<int>{SIGUSR2, SIGUSR1});
    in_the_child = [] {
      const sigset_t before = mask_now();
      {
        SignalTrap trap{SIGUSR1};
        ::raise(SIGUSR1);
        expect_equal(pending(trap), 1, "signals inside the hook");
        expect(!hooks_trap->try_wait(), "the parent's trap is empty");
      }
      expect(is_same_mask(mask_now(), before), "the hook's mask is as it was");
      hooks_trap.emplace(std::initializer_list<int>{SIGUSR1});
    };
    const auto how = in_a_grandchild([&] {
      ::raise(SIGUSR1);
      expect_equal(pending(*hooks_trap), 1, "signals of the hook's second trap");
      const auto grandchild = in_a_grandchild([&] {
        ::raise(SIGUSR1);
        expect_equal(pending(*hooks_trap), 1, "signals in the child's child");
      });
      expect(grandchild == "exit 0", grandchild);
      expect_equal(pending(*hooks_trap), 0, "signals in the child");
      hooks_trap.reset();
      expect(is_same_mask(mask_now(), mask), "the mask is as it was");
    });
    expect(how == "exit 0", how);
    ::raise(SIGUSR1);
    expect_equal(pending(*hooks_trap), 1, "signals of the parent's trap");
  }));
}

TEST_CASE("a fork inside a fork hook, with traps on both sides, leaves the registry to both") {
  check_clean(in_a_process([] {
    register_hooks();
    hooks_trap.emplace(std::initializer_list<int>{SIGUSR1});
    const sigset_t mask = mask_now();
    static void (**fork_in)() = nullptr;
    const auto fork_once = [] {
      *fork_in = nullptr;
      expect(::fork() >= 0, "a child of the hook");
    };
    for (auto* const hook : {&in_prepare, &in_the_parent, &in_the_child}) {
      fork_in = hook;
      *hook = fork_once;
      const pid_t parent = ::getpid();
      const pid_t outer = ::fork();
      // Whoever it is, and there are four if it was before the fork: a trap works.
      if (::getpid() != parent) {
        expect(is_default(SIGUSR1), "the parent's trap isn't there");
        expect(is_same_mask(mask_now(), mask), "the mask is as it was");
        SignalTrap own{SIGUSR1};
        ::raise(SIGUSR1);
        expect_equal(pending(own), 1, "signals of a trap in a child");
        int status = 0;
        while (::wait(&status) > 0) expect(in_words(status) == "exit 0", in_words(status));
        leave(0);
      }
      *hook = nullptr;
      expect(outer > 0, "a child");
      int status = 0;
      while (::wait(&status) > 0) expect(in_words(status) == "exit 0", in_words(status));
      ::raise(SIGUSR1);
      expect_equal(pending(*hooks_trap), 1, "signals of the parent's trap");
      expect(is_same_mask(mask_now(), mask), "the mask is as it was");
    }
  }));
}

TEST_CASE("in a forked child the mask is as before the trap, from the fork on") {
  check_clean(in_a_process([] {
    set_blocked(SIGUSR1, true);
    const sigset_t mask = mask_now();
    hooks_trap.emplace(std::initializer_list<int>{SIGUSR1, SIGUSR2});
    std::optional<SignalTrap> second(std::in_place, std::initializer_list<int>{SIGUSR1});
    for (int round = 0; round < 2; ++round) {
      const auto how = in_a_grandchild([&] {
        expect(is_same_mask(mask_now(), mask), "the mask is as before the trap");
        hooks_trap.reset();
        expect(is_same_mask(mask_now(), mask), "and after it");
      });
      expect(how == "exit 0", how);
      expect(!is_blocked(SIGUSR1), "in the parent it is unblocked");
      second.reset();
    }
    // A thread that made no trap keeps its own.
    std::thread other([] {
      const auto how = in_a_grandchild([] { expect(!is_blocked(SIGUSR1), "it stays unblocked"); });
      expect(how == "exit 0", how);
    });
    other.join();
    hooks_trap.reset();
    expect(is_same_mask(mask_now(), mask), "the mask is as it was");
  }));
}

TEST_CASE("children of children, with traps at each level, each mind their own signals") {
  check_clean(in_a_process([] {
    SignalTrap top{SIGUSR1};
    const auto how = in_a_grandchild([] {
      SignalTrap middle{SIGUSR1};
      const auto innermost = in_a_grandchild([] {
        SignalTrap bottom{SIGUSR1};
        ::raise(SIGUSR1);
        expect_equal(pending(bottom), 1, "signals at the bottom");
      });
      expect(innermost == "exit 0", innermost);
      expect_equal(pending(middle), 0, "signals in the middle");
    });
    expect(how == "exit 0", how);
    expect_equal(pending(top), 0, "signals at the top");
  }));
}

#if defined(__linux__)

// A fork without its hooks.
pid_t bare_clone() {
#if defined(__s390__)
  return static_cast<pid_t>(::syscall(SYS_clone, nullptr, SIGCHLD, nullptr, nullptr, nullptr));
#else
  return static_cast<pid_t>(::syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr));
#endif
}

TEST_CASE("a child of a bare clone, that ran no fork hook, is as well served") {
  check_clean(in_a_process([] {
    if (under_sanitizer) return;  // they know nothing of such a child
    SignalTrap trap{SIGTERM, SIGUSR1, SIGURG};
    const auto cloned = [](auto body) { return in_a_grandchild(body, &bare_clone); };
    const auto killed = cloned([] { ::raise(SIGTERM); });
    expect(killed == "SIGTERM", "the default action: " + killed);
    const auto ignored = cloned([&] {
      ::raise(SIGURG);
      expect(!trap.try_wait(), "the parent's trap is empty");
    });
    expect(ignored == "exit 0", ignored);
    const auto trapped = cloned([] {
      {
        SignalTrap own{SIGTERM};
        ::raise(SIGTERM);
        expect_equal(pending(own), 1, "signals of the child's own trap");
      }
      expect(is_default(SIGTERM), "the default is back");
    });
    expect(trapped == "exit 0", trapped);
    const auto gone = cloned([&] {
      trap.~SignalTrap();
      SignalTrap own{SIGTERM};
      ::raise(SIGTERM);
      expect_equal(pending(own), 1, "signals of the child's own trap");
    });
    expect(gone == "exit 0", gone);
    expect_equal(pending(trap), 0, "the parent's signals");
  }));
}

TEST_CASE("a child of vfork that gets a signal dies of it, and the parent's trap doesn't see it") {
  check_clean(in_a_process([] {
    if (under_tsan) return;  // there, vfork() is fork()
    SignalTrap trap{SIGTERM};
    for (int turn = 0; turn < 3; ++turn) {
      const pid_t child = ::vfork();
      if (child == 0) {
        ::kill(::getpid(), SIGTERM);
        ::_exit(1);
      }
      int status = 0;
      ::waitpid(child, &status, 0);
      expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM, "it died of the signal");
      expect_equal(pending(trap), 0, "the parent's signals");
    }
    ::raise(SIGTERM);
    expect_equal(pending(trap), 1, "the parent's own");
  }));
}

TEST_CASE("a vfork child that is killed inside the handler leaves nobody waiting") {
  check_clean(in_a_process([] {
    if (under_tsan) return;
    set_handler(SIGUSR1, [](int) { ::kill(::getpid(), SIGKILL); });
    {
      const SignalTrap trap{SIGUSR1};
      const pid_t child = ::vfork();
      if (child == 0) {
        ::kill(::getpid(), SIGUSR1);
        ::_exit(1);
      }
      ::waitpid(child, nullptr, 0);
    }
    expect(!is_default(SIGUSR1), "the trap has gone");
  }));
}

TEST_CASE(
    "a program that is executed gets no descriptor of a trap, and the dispositions from before") {
  const auto listing = [](bool with_trap) {
    Ended ended = in_a_process([=] {
      set_handler(SIGHUP, SIG_IGN);
      std::vector<std::unique_ptr<SignalTrap>> traps;
      if (with_trap) {
        for (int count = 0; count < 3; ++count) {
          traps.push_back(
              std::make_unique<SignalTrap>(std::initializer_list<int>{SIGINT, SIGTERM, SIGHUP}));
        }
      }
      // One child of a fork, and one that this process itself becomes.
      const pid_t child = ::fork();
      if (child == 0) {
        ::execlp("sh", "sh", "-c", "ls /proc/self/fd; grep -E 'Sig(Ign|Cgt|Blk)' /proc/self/status",
                 nullptr);
        ::_exit(127);
      }
      ::waitpid(child, nullptr, 0);
      ::execlp("sh", "sh", "-c", "ls /proc/self/fd", nullptr);
      return 127;
    });
    return ended.out + ended.err + ended.how;
  };
  const std::string with = listing(true);
  CHECK(with == listing(false));
  CHECK(with.find("SigIgn") != std::string::npos);
}

#endif

TEST_CASE("a signal that was ignored when the program started is trapped, and said to have been") {
  check_clean(in_a_process([] {
    set_handler(SIGHUP, SIG_IGN);
    expect(lastcall::detail::is_ignored(SIGHUP), "it is ignored");
    expect(!lastcall::detail::is_ignored(SIGTERM), "this one isn't");
    {
      SignalTrap trap{SIGHUP};
      ::raise(SIGHUP);
      expect_equal(pending(trap), 1, "signals");
      ::raise(SIGHUP);
    }
    expect(handler_of(SIGHUP) == SIG_IGN, "it is ignored again, and nothing was raised again");
  }));
}

TEST_CASE("a program that is executed inherits a SignalIgnore") {
  const Ended ended = in_a_process([] {
    const SignalIgnore ignore(SIGTERM);
    ::execlp("sh", "sh", "-c", "kill -TERM $$; echo still here", nullptr);
    return 127;
  });
  CHECK(ended.how == "exit 0");
  CHECK(ended.out == "still here\n");
}

TEST_CASE("a fork in the middle of signals and traps that come and go leaves both sides whole") {
  check_clean(in_a_process([] {
    // Such a child may not allocate there: the sanitizers' own locks are not made for it.
    if (under_sanitizer) return;
    set_handler(SIGUSR1, plain_handler);
    const pid_t sender = storm(SIGUSR1, -1, 100us);
    std::atomic<bool> over{false};
    Threads threads;
    for (int at = 0; at < 2; ++at) {
      threads.start([&] {
        while (!over) {
          { const SignalTrap trap{SIGUSR1, SIGUSR2}; }
          std::this_thread::sleep_for(100us);  // a mutex is not fair
        }
      });
    }
    SignalTrap trap{SIGUSR2};
    for (int turn = 0; turn < 100; ++turn) {
      const auto how = in_a_grandchild([] {
        {
          SignalTrap own{SIGUSR1};
          ::raise(SIGUSR1);
          expect_equal(pending(own), 1, "signals of the child's trap");
        }
        expect(handler_of(SIGUSR1) == plain_handler, "the handler is back");
      });
      if (!expect(how == "exit 0", how)) break;
    }
    over = true;
    threads.join();
    stop(sender);
    ::raise(SIGUSR2);
    expect_equal(pending(trap), 1, "signals of the parent's trap");
  }));
}

void forks_among_ignores(pid_t (*fork_by)()) {
  check_clean(in_a_process([fork_by] {
    if (under_sanitizer) return;
    { const SignalIgnore first(SIGUSR1); }
    std::atomic<bool> over{false};
    Threads threads;
    for (int at = 0; at < 2; ++at) {
      threads.start([&] {
        while (!over) const SignalIgnore ignore(SIGUSR1);
      });
    }
    for (int turn = 0; turn < 200; ++turn) {
      const auto how = in_a_grandchild(
          [fork_by] {
            { const SignalIgnore own(SIGUSR2); }
            expect(is_default(SIGUSR2), "the default is back");
            if (fork_by == &::fork) {
              const bool counted = lastcall::detail::signal_registry.ignored[SIGUSR1].count > 0;
              expect_equal(counted, !is_default(SIGUSR1), "it is ignored, and counted");
            }
          },
          fork_by);
      if (!expect(how == "exit 0", how)) break;
    }
    over = true;
    threads.join();
  }));
}

TEST_CASE("a fork in the middle of SignalIgnores, and no trap ever, leaves both sides whole") {
  forks_among_ignores(&::fork);
}

// A fork that is on its way when another thread makes the first trap, by which forks are watched: it is in a
// stranger's hook then, until that thread has the registry's lock.
enum class Moment { none, forking, locked, over };
std::atomic<Moment> moment{Moment::none};
void await(Moment wanted) {
  expect(eventually([wanted] { return moment == wanted; }, 20s), "the moment has come");
}
void strangers_hook() {
  if (moment == Moment::none) {
    moment = Moment::forking;
    await(Moment::locked);
  } else if (moment == Moment::forking) {
    moment = Moment::locked;
    await(Moment::over);
  }
}

enum class Holder { changes, forks };
void miss_a_fork(pid_t (*fork_by)(), Holder holder) {
  check_clean(in_a_process([fork_by, holder] {
    // Where all tests run in one process, forks have been watched for long.
    if (under_sanitizer || lastcall::detail::signal_registry.watches_forks) return;
    ::pthread_atfork(&strangers_hook, nullptr, nullptr);
    std::thread other([holder] {
      await(Moment::forking);
      { const SignalIgnore first(SIGUSR2); }
      if (holder == Holder::forks) {
        const pid_t child = ::fork();
        if (child == 0) ::_exit(0);
        ::waitpid(child, nullptr, 0);
      } else {
        const lastcall::detail::SignalRegistryLock lock;
        moment = Moment::locked;
        await(Moment::over);
      }
    });
    if (fork_by != &::fork) {
      moment = Moment::forking;
      await(Moment::locked);
    }
    const auto how = in_a_grandchild(
        [] {
          SignalTrap own{SIGUSR1};
          ::raise(SIGUSR1);
          expect_equal(pending(own), 1, "signals of the child's own trap");
        },
        fork_by);
    moment = Moment::over;
    other.join();
    expect(how == "exit 0", how);
  }));
}

TEST_CASE("a child that fork's hooks missed finds no lock that a thread of its parent's holds") {
  for (const Holder holder : {Holder::changes, Holder::forks}) miss_a_fork(&::fork, holder);
}

#if defined(__linux__)
TEST_CASE("a bare clone in the middle of SignalIgnores, or of a fork, harms neither side") {
  forks_among_ignores(&bare_clone);
  for (const Holder holder : {Holder::changes, Holder::forks}) miss_a_fork(&bare_clone, holder);
}
#endif

TEST_CASE("a forked child has no descriptor more than its parent, also with stdin closed") {
  check_clean(in_a_process([] {
    ::close(STDIN_FILENO);
    SignalTrap trap{SIGTERM};
    const int before = open_descriptors();
    const auto how = in_a_grandchild([&] {
      expect(::fcntl(STDIN_FILENO, F_GETFD) == -1, "stdin is still closed");
      expect_equal(open_descriptors(), before, "descriptors");
    });
    expect(how == "exit 0", how);
  }));
}
