// Locks that everybody needs, held for ever: stdio's, the streams', the allocator's, the loader's, fork's.
#include "adversary.hpp"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <streambuf>
#include <string>
#include <thread>

namespace promise {
namespace {

using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;

// ---- stdout ----------------------------------------------------------------------------------------

void stdout_held_by_worker(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    ::flockfile(stdout);
    std::fputs("in the buffer", stdout);
    stand.ready();
    hang();
  });
  lifetime.run();
}

// All goes well but the flush: by a thread that nobody knows of.
void stdout_held_by_stranger(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  std::thread([&stand] {
    ::flockfile(stdout);
    stand.ready();
    hang();
  }).detach();
  lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  lifetime.run();
}

void stderr_held_by_stranger(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  std::thread([&stand] {
    ::flockfile(stderr);
    stand.ready();
    hang();
  }).detach();
  lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  lifetime.run();
}

// ---- std::cout -------------------------------------------------------------------------------------

class LockedBuffer final : public std::streambuf {
 public:
  std::mutex mutex;

 private:
  int sync() override {
    const std::lock_guard<std::mutex> lock(mutex);
    return 0;
  }
};

void cout_held(Stand& stand) {
  auto* const buffer = new LockedBuffer;
  std::cout.rdbuf(buffer);
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand, buffer](CancellationToken) {
    const std::lock_guard<std::mutex> lock(buffer->mutex);
    stand.ready();
    hang();
  });
  lifetime.run();
}

class ThrowingBuffer final : public std::streambuf {
  int sync() override { throw 1; }
};

void cout_throws(Stand& stand) {
  auto* const buffer = new ThrowingBuffer;
  std::cout.rdbuf(buffer);
  std::cout.exceptions(std::ios::badbit);
  ShutdownCoordinator lifetime(stand.options());
  stand.ready();
  lifetime.run();
}

// ---- streams that nobody reads, or that are not there ----------------------------------------------

void prints_much(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("printer", [&stand](CancellationToken token) {
    std::fputs("in the buffer", stdout);  // fully buffered: this is a pipe
    stand.ready();
    token.wait();
  });
  lifetime.on_stop("hook", [] { std::fputs("more in the buffer", stdout); });
  lifetime.run();
}

void worker_held_in_write(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    for (;;) std::fputs("This never gets through, since nobody reads it.\n", stdout);
  });
  lifetime.run();
}

void stderr_closed(Stand& stand) {
  ::close(STDERR_FILENO);
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    hang();
  });
  lifetime.run();
}

void standard_descriptors_closed(Stand& stand) {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::close(fd);
  ShutdownCoordinator lifetime(stand.options());
  std::fputs("to nobody", stdout);
  lifetime.spawn("worker", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
  });
  lifetime.run();
}

// What daemons do who think that all descriptors are theirs. The library's were among them.
void all_descriptors_closed(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    for (int fd = 4; fd < 1000; ++fd) ::close(fd);
    hang();
  });
  lifetime.run();
}

// ---- the allocator ---------------------------------------------------------------------------------

void allocate() {
  void* volatile block = std::malloc(1);  // volatile: or the compiler leaves it out
  std::free(block);
}

void allocator_held_by_worker(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    hold_allocator();
    allocate();
  });
  lifetime.spawn("other worker", [](CancellationToken token) {
    token.wait();
    allocate();
  });
  lifetime.run();
}

// Without its lock: so there is a report, in which it stands with all the others, each with its stack. For
// that some of a longer grace period is kept.
constexpr milliseconds time_for_stacks = 3s;

void held_in_allocator(Stand& stand) {
  lastcall::ShutdownOptions options = stand.options();
  options.grace_period = time_for_stacks;
  options.abort_margin = 1s;
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    hold_allocator_here();
    allocate();
  });
  lifetime.spawn("other worker", [](CancellationToken) { hang(); });
  lifetime.run();
}

void allocator_held_by_hook(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.on_stop("held hook", [] {
    hold_allocator();
    allocate();
  });
  stand.ready();
  lifetime.run();
}

void allocator_held_by_stranger(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  std::thread([&stand] {
    stand.ready();
    hold_allocator();
    allocate();
  }).detach();
  lifetime.run();
}

// What threads leave to the C library when they end, the stacks of others among it, it frees.
void allocator_held_in_destructor(Stand& stand) {
  {
    ShutdownCoordinator lifetime(stand.options());
    for (int number = 0; number < 20; ++number) lifetime.spawn("short task", [] {});
    lifetime.spawn("held worker", [&stand](CancellationToken token) {
      stand.ready();
      token.wait();
      hold_allocator();
      allocate();
    });
    lifetime.token().wait();
  }
  std::_Exit(5);
}

void allocator_held_for_long(Stand& stand) {
  lastcall::ShutdownOptions options = stand.options();
  options.grace_period = 60s;
  options.abort_margin = 20s;
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    hold_allocator();
    allocate();
  });
  lifetime.run();
}

void three_interrupts(Target& target) {
  target.poke(SIGINT);
  target.wait(150ms);
  target.poke(SIGINT);
  target.wait(150ms);
  target.send(SIGINT);
}

// ---- the dynamic loader ----------------------------------------------------------------------------

int hang_in_walk(dl_phdr_info*, std::size_t, void*) { hang(); }

void loader_held(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    ::dl_iterate_phdr(hang_in_walk, nullptr);
  });
  lifetime.on_stop("thrower", [] { throw 1; });  // unwinding may ask the loader where it is
  lifetime.run();
}

#if defined(LASTCALL_HANGING_MODULE)
// dlopen() runs constructors with the loader's main lock held.
void loader_held_in_constructor(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    static_cast<void>(::dlopen(LASTCALL_HANGING_MODULE, RTLD_NOW));
  });
  lifetime.run();
}
#endif

// ---- fork ------------------------------------------------------------------------------------------

// Prepare handlers run in the reverse order of their registration: this one, the first in the program,
// runs last, when all the others have taken the locks that they keep across the fork.
void hang_in_fork(Stand& stand) {
  static Stand* told = nullptr;
  told = &stand;
  ::pthread_atfork(
      [] {
        told->ready();
        hang();
      },
      nullptr, nullptr);
}

void fork_held(Stand& stand) {
  hang_in_fork(stand);
  ShutdownCoordinator lifetime(stand.options());
  CancellationSource later(lifetime.token(), 1h);
  lifetime.spawn("held worker", [](CancellationToken) {
    if (::fork() == 0) ::_exit(0);
  });
  lifetime.spawn("worker", [token = later.token()](CancellationToken) { token.wait(); });
  lifetime.run();
}

// By a thread that nobody waits for: drain() returns, and so does the destructor.
void fork_held_by_stranger(Stand& stand) {
  hang_in_fork(stand);
  {
    ShutdownCoordinator lifetime(stand.options());
    lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
    std::thread([] {
      if (::fork() == 0) ::_exit(0);
    }).detach();
    static_cast<void>(lifetime.drain());
  }
  std::_Exit(5);
}

}  // namespace

void add_locks(std::vector<Adversary>& all) {
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
  add("stdout held by a worker", "exit 124", {"held worker"}, stdout_held_by_worker);
  add("stdout held by a stranger", "exit 0", {"flushing the streams"}, stdout_held_by_stranger);
  add("stderr held by a stranger", "exit 0", {"flushing the streams"}, stderr_held_by_stranger);
  add("std::cout held", "exit 124", {"held worker"}, cout_held);
  add("std::cout throws", "exit 0", {}, cout_throws).bound = Bound::at_once;
  add("nobody reads stdout and stderr", "exit 0", {}, prints_much).streams = Streams::unread;
  add("nobody reads, worker in write()", "exit 124", {}, worker_held_in_write).streams =
      Streams::unread;
  add("stderr closed", "exit 124", {}, stderr_closed);
  add("stdin, stdout, stderr closed", "exit 0", {}, standard_descriptors_closed).bound =
      Bound::at_once;
  add("all descriptors closed", "exit 124", {"held worker"}, all_descriptors_closed);

  const auto plain = [](Adversary& adversary) -> Adversary& {
    adversary.needs.plain_build = true;
    return adversary;
  };
  // With no memory for a report it is last words that name whoever is in.
  plain(add("malloc held by a worker", "exit 124",
            {"'held worker' of stage 'service' (", "locks.cpp:", ", thread "},
            allocator_held_by_worker));
  Adversary& alone =
      plain(add("malloc never returns to one", "exit 124",
                {"held worker: entered at", "other worker: entered at"}, held_in_allocator));
  alone.bound = Bound::at_once;
  alone.extra = time_for_stacks;
#if LASTCALL_HAS_STACKS && defined(__GLIBC__) && \
    !defined(__arm__)  // there it ends before: stack_capture.hpp
  alone.says.insert(alone.says.end(), {"pause", " malloc+0x", " promise::hang()+0x"});
#endif
  plain(add("malloc held by a hook", "exit 124", {"held hook"}, allocator_held_by_hook));
  plain(add("malloc held by a stranger", "exit 124", {}, allocator_held_by_stranger));
  plain(add("malloc held, main in destructor", "exit 5", {"held worker"},
            allocator_held_in_destructor));
  Adversary& wishes =
      plain(add("malloc held, INT INT INT", "exit 130", {"held worker"}, allocator_held_for_long));
  wishes.provoke = three_interrupts;
  wishes.bound = Bound::at_once;
  plain(add("loader held by dl_iterate_phdr()", "exit 124", {"held worker"}, loader_held));
#if defined(LASTCALL_HANGING_MODULE)
  plain(add("loader held by dlopen()", "exit 124", {"held worker"}, loader_held_in_constructor));
#endif
  add("fork held by a handler", "exit 124", {"held worker"}, fork_held);
  add("fork held, main in drain()", "exit 5", {}, fork_held_by_stranger);
}

}  // namespace promise
