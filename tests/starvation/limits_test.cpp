// With no descriptor, thread or address space left (RLIMIT_NOFILE, RLIMIT_NPROC, RLIMIT_AS): documented
// errors, all as it was before, and the same call works once there is room. Shutdowns need none of them.
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <thread>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::SignalTrap;
using support::Ended;
using support::expect;
using support::expect_equal;

using Resource = decltype(RLIMIT_NOFILE);

/// While it lives, no more than this of the resource is to be had.
class Limit {
 public:
  Limit(Resource resource, rlim_t most) : resource_(resource) {
    ::getrlimit(resource_, &before_);
    rlimit lower = before_;
    lower.rlim_cur = most;
    if (::setrlimit(resource_, &lower) != 0) std::abort();
  }
  Limit(const Limit&) = delete;
  Limit& operator=(const Limit&) = delete;
  ~Limit() { ::setrlimit(resource_, &before_); }

 private:
  Resource resource_;
  rlimit before_{};
};

// The lowest number that is free: with that as the limit none can be had.
rlim_t lowest_free_descriptor() {
  const int fd = ::dup(STDOUT_FILENO);
  ::close(fd);
  return static_cast<rlim_t>(fd);
}

rlim_t address_space() {
  std::size_t pages = 0;
  if (std::FILE* const file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%zu", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return static_cast<rlim_t>(pages) * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE));
}

// What stays as it is when a call is refused.
std::string process_state() {
  return support::dispositions() + support::signal_mask() + "\n" +
         std::to_string(support::open_descriptors()) + " descriptors\n" +
         std::to_string(support::live_threads()) + " threads\n";
}

// The call is refused with `error` and words that hold `part`, with every room that isn't enough for it;
// then it works. How often it was refused.
int refused_until(Resource resource, const std::function<rlim_t(rlim_t)>& most, int error,
                  std::string_view part, const std::function<void()>& call) {
  const std::string before = process_state();
  int refusals = 0;
  for (rlim_t room = 0; room < 64; ++room) {
    try {
      {
        const Limit limit(resource, most(room));
        call();
      }
      return refusals;
    } catch (const std::system_error& refusal) {
      ++refusals;
      const std::string words = refusal.what();
      expect_equal(refusal.code().value(), error, "the errno of \"" + words + "\"");
      expect(support::starts_with(words, "lastcall: "), "who says \"" + words + "\"");
      expect(support::contains(words, part), "what was being done: \"" + words + "\"");
    } catch (const std::bad_alloc&) {
      ++refusals;
      expect(resource == RLIMIT_AS, "no memory, but for want of address space");
    }
    std::string after;
    support::eventually([&] { return (after = process_state()) == before; }, 2s);
    expect(after == before, "as before:\n" + after + "instead of\n" + before);
  }
  expect(false, "there was never room enough");
  return refusals;
}

int refused_descriptors(std::string_view part, const std::function<void()>& call) {
  const rlim_t first = lowest_free_descriptor();
  return refused_until(
      RLIMIT_NOFILE, [first](rlim_t room) { return first + room; }, EMFILE, part, call);
}

// Of a user who has no other process.
bool become_somebody() {
  constexpr uid_t somebody = 64123;
  if (::geteuid() != 0) return false;
  return ::setgid(somebody) == 0 && ::setuid(somebody) == 0;
}

int refused_threads(std::string_view part, const std::function<void()>& call) {
  return refused_until(
      RLIMIT_NPROC, [](rlim_t room) { return room + 1; }, EAGAIN, part, call);
}

int refused_space(const std::function<void()>& call) {
  return refused_until(
      RLIMIT_AS, [](rlim_t room) { return address_space() + room * 1024 * 1024; }, EAGAIN,
      "starting", call);
}

int serve(ShutdownCoordinator& coordinator, bool hook_hangs) {
  if (hook_hangs) {
    coordinator.on_stop("hangs", [] { support::hang(); });
  } else {
    coordinator.on_stop("stop", [] {});
  }
  coordinator.spawn("worker", [](const CancellationToken& token) { token.wait(); });
  return 0;
}

// A shutdown by SIGTERM with nothing of the resource left from the request on; how it ended.
Ended shut_down_without(Resource resource, bool hook_hangs) {
  support::Child child = support::Child::run([=] {
    if (resource == RLIMIT_NPROC && !become_somebody()) return 77;
    lastcall::ShutdownOptions options = support::quiet(600ms);
    options.abort_margin = 100ms;
    options.observer = lastcall::stderr_observer();
    options.last_words = STDERR_FILENO;
    ShutdownCoordinator coordinator(options);
    serve(coordinator, hook_hangs);
    const Limit limit(resource, resource == RLIMIT_NOFILE ? lowest_free_descriptor()
                                : resource == RLIMIT_AS   ? address_space()
                                                          : 1);
    ::raise(SIGTERM);
    coordinator.run();
  });
  const support::Stopwatch watch;
  Ended ended = child.end(20s);
  if (watch.elapsed() > 600ms + 100ms + support::slack) ended.how += ", too late";
  return ended;
}

// RLIMIT_AS is of no use under a sanitizer, which reserves terabytes.
constexpr bool has_address_limit = !support::under_sanitizer;

}  // namespace

TEST_CASE("with no descriptors left a trap, a token and a coordinator say so, and change nothing") {
  const Ended ended = support::in_a_process([] {
    CancellationSource source;
    expect_equal(refused_descriptors("", [&] { static_cast<void>(source.token().fd()); }), 1,
                 "refusals of a token's descriptor");
    expect(support::is_readable((source.cancel(), source.token().fd())), "it works afterwards");

    std::optional<SignalTrap> trap;
    expect_equal(refused_descriptors("", [&] { trap.emplace(); }), 2, "refusals of a trap");
    CancellationSource other;
    expect_equal(refused_descriptors("",
                                     [&] {
                                       std::thread canceller([&other] {
                                         std::this_thread::sleep_for(5ms);
                                         other.cancel();
                                       });
                                       struct Join {
                                         std::thread& thread;
                                         ~Join() { thread.join(); }
                                       } const join{canceller};
                                       other = CancellationSource();
                                       static_cast<void>(trap->wait(other.token()));
                                     }),
                 1, "refusals of a trap that waits with a token");
    trap.reset();

    std::optional<ShutdownCoordinator> coordinator;
    const int refusals = refused_descriptors("", [&] { coordinator.emplace(support::quiet()); });
    expect(refusals >= 3, "refusals of a coordinator: " + std::to_string(refusals));
    ::raise(SIGTERM);
    expect_equal(coordinator->drain().exit_code, 0, "the exit code");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("accept waits for a descriptor, and for its token meanwhile") {
  const Ended ended = support::in_a_process([] {
    const int listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int client = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    // The empty path: an abstract name of the kernel's choosing.
    socklen_t size = sizeof(sa_family_t);
    expect(::bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0, "bound");
    expect(::listen(listener, 8) == 0, "listening");
    size = sizeof address;
    ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
    expect(::connect(client, reinterpret_cast<sockaddr*>(&address), size) == 0, "connected");

    CancellationSource source;
    const rlim_t none = lowest_free_descriptor();
    {
      const CancellationSource soon(source.token(), 50ms);
      const Limit limit(RLIMIT_NOFILE, none);
      expect(!lastcall::accept(listener, soon.token()), "the token was heard");
    }
    std::optional<int> accepted;
    std::optional<Limit> limit(std::in_place, RLIMIT_NOFILE, none);
    std::thread acceptor([&] { accepted = lastcall::accept(listener, source.token()); });
    std::this_thread::sleep_for(30ms);
    limit.reset();
    acceptor.join();
    expect(accepted.has_value(), "the connection was accepted once there was room");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("with no threads left deadlines, tasks and coordinators say so, and change nothing") {
  const Ended ended = support::in_a_process([] {
    if (!become_somebody()) return 77;
    std::optional<CancellationSource> source;
    expect_equal(refused_threads("timer thread", [&] { source.emplace(CancellationToken(), 5ms); }),
                 1, "refusals of a deadline");
    expect(source->token().wait_for(10s), "the deadline comes");

    lastcall::TaskGroup group;
    std::atomic<int> runs{0};
    // The timer thread is there by now.
    expect_equal(refused_threads("'a task'",
                                 [&] {
                                   group.spawn("a task", [&] { ++runs; });
                                   static_cast<void>(group.wait_for(10s));
                                 }),
                 2, "refusals of a task");
    group.wait();
    expect_equal(runs.load(), 1, "runs of the task");

    std::optional<ShutdownCoordinator> coordinator;
    expect_equal(refused_threads("thread", [&] { coordinator.emplace(support::quiet()); }), 3,
                 "refusals of a coordinator");
    expect_equal(refused_threads("on_signal thread",
                                 [&] { coordinator->on_signal(SIGHUP, [](const auto&) {}); }),
                 4, "refusals of on_signal");
    ::raise(SIGTERM);
    expect_equal(coordinator->drain().exit_code, 0, "the exit code");
    return 0;
  });
  if (ended.how == "exit 77") {
    WARN("only root can become a user with no other process");
    return;
  }
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("with no address space left they say so, and change nothing") {
  if (!has_address_limit) return;
  const Ended ended = support::in_a_process([] {
    std::optional<CancellationSource> source;
    expect(refused_space([&] { source.emplace(CancellationToken(), 5ms); }) > 0, "a deadline");
    expect(source->token().wait_for(10s), "the deadline comes");
    std::optional<ShutdownCoordinator> coordinator;
    expect(refused_space([&] { coordinator.emplace(support::quiet()); }) > 0, "a coordinator");
    ::raise(SIGTERM);
    expect_equal(coordinator->drain().exit_code, 0, "the exit code");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a shutdown needs no new descriptors, threads or address space") {
  for (const Resource resource : {RLIMIT_NOFILE, RLIMIT_NPROC, RLIMIT_AS}) {
    if (resource == RLIMIT_AS && !has_address_limit) continue;
    INFO("resource " << static_cast<int>(resource));
    const Ended clean = shut_down_without(resource, false);
    if (clean.how == "exit 77") continue;
    INFO(clean.err);
    CHECK(clean.how == "exit 0");
    const Ended overrun = shut_down_without(resource, true);
    INFO(overrun.err);
    CHECK(overrun.how == "exit 124");
    CHECK(support::contains(overrun.err, "hangs"));
  }
}
