// Signals as tests of the trap use them: dispositions, masks, handlers of "somebody else", storms.
#pragma once

#include "catch.hpp"
#include "process.hpp"

#include <lastcall/signal_trap.hpp>

#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <exception>
#include <string>
#include <thread>

namespace support {

using lastcall::SignalTrap;

using Handler = void (*)(int);

inline struct sigaction disposition_of(int number) {
  struct sigaction now {};
  ::sigaction(number, nullptr, &now);
  return now;
}

inline Handler handler_of(int number) { return disposition_of(number).sa_handler; }
inline bool is_default(int number) { return handler_of(number) == SIG_DFL; }

inline void set_handler(int number, Handler handler, int flags = 0) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(number, &action, nullptr);
}

inline void set_blocked(int number, bool blocked) {
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, number);
  ::pthread_sigmask(blocked ? SIG_BLOCK : SIG_UNBLOCK, &set, nullptr);
}

inline bool is_blocked(int number) {
  sigset_t now;
  ::pthread_sigmask(SIG_BLOCK, nullptr, &now);
  return ::sigismember(&now, number) == 1;
}

// Handlers of "somebody else".
inline std::atomic<int> plain_calls{0};
inline std::atomic<int> info_calls{0};
inline std::atomic<pid_t> info_sender{0};
inline void plain_handler(int) { ++plain_calls; }
inline void info_handler(int, siginfo_t* info, void* context) {
  ++info_calls;
  info_sender = context != nullptr ? info->si_pid : -1;
}
inline void set_info_handler(int number) {
  struct sigaction action {};
  action.sa_sigaction = info_handler;
  action.sa_flags = SA_SIGINFO;
  ::sigemptyset(&action.sa_mask);
  ::sigaddset(&action.sa_mask, SIGALRM);
  ::sigaction(number, &action, nullptr);
}

// A handler on top of others, as a well-behaved library installs it: it calls what was there.
inline struct sigaction beneath;
inline std::atomic<int> top_calls{0};
inline void top_handler(int number, siginfo_t* info, void* context) {
  ++top_calls;
  if ((beneath.sa_flags & SA_SIGINFO) != 0) {
    beneath.sa_sigaction(number, info, context);
  } else if (beneath.sa_handler != SIG_DFL && beneath.sa_handler != SIG_IGN) {
    beneath.sa_handler(number);
  }
}
inline void install_on_top(int number) {
  struct sigaction action {};
  action.sa_sigaction = top_handler;
  action.sa_flags = SA_SIGINFO;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(number, &action, &beneath);
}

// Sends `count` times `number` to its parent (for ever, if that is negative), from a process of its
// own; returns that process. A `pause` between them lets a parent that sleeps get anywhere at all:
// a thread that the kernel wakes for a signal which another thread has taken starts its sleep anew.
inline pid_t storm(int number, int count, std::chrono::microseconds pause = 0us) {
  const pid_t target = ::getpid();
  const pid_t sender = ::fork();
  if (sender != 0) return sender;
  for (int sent = 0; count < 0 || sent < count; ++sent) {
    if (::kill(target, number) != 0 || ::getppid() != target) break;
    if (pause > 0us) std::this_thread::sleep_for(pause);
  }
  ::_exit(0);
}

inline void stop(pid_t sender) {
  ::kill(sender, SIGKILL);
  ::waitpid(sender, nullptr, 0);
}

inline int pending(SignalTrap& trap) {
  int count = 0;
  while (trap.try_wait()) ++count;
  return count;
}

template <class Body>
std::string message_of(Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// The child ended well: nothing that it expected failed.
inline void check_clean(const Ended& ended) {
  INFO(ended.err);
  INFO(ended.out);
  CHECK(ended.how == "exit 0");
}

}  // namespace support
