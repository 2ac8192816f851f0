// Causes and the cancellation tree with too little memory: each call either has its effect or throws and
// has none. cancel() and destructors need no memory at all.
#include "starvation/sweep.hpp"
#include "support/catch.hpp"

#include <lastcall/cancellation.hpp>

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::detail::NodePool;
using starvation::sweep;
using support::expect;

// What is mapped for the pool of nodes is refused; then they come from operator new.
bool refuses_slabs = false;

const char* const long_words = "words that are too long for a small string";

struct CancelledCause {
  Cause cause;
  std::string words = long_words;
  void call() { cause = Cause::cancelled(words); }
  std::string state() const { return std::string(cause.message()); }
  void check() const { expect(cause.message() == long_words, "the cause has its message"); }
};

struct SignalCause {
  Cause cause;
  void call() {
    cause = Cause::signal({SIGTERM, SI_USER, ::getpid(), ::getuid(), lastcall::Clock::now()});
  }
  std::string state() const { return std::string(cause.message()); }
  void check() const {
    expect(cause.message().substr(0, 16) == "SIGTERM from pid", "the cause has its message");
  }
};

struct FailureCause {
  std::exception_ptr error = std::make_exception_ptr(std::runtime_error(long_words));
  Cause cause;
  void call() { cause = Cause::failure(error); }
  std::string state() const { return std::string(cause.message()); }
  void check() const {
    expect(cause.message() == long_words, "the cause has its message");
    expect(cause.exception() == error, "the cause has its exception");
  }
};

struct NullFailure {
  bool refused = false;
  void call() {
    try {
      static_cast<void>(Cause::failure(nullptr));
    } catch (const std::invalid_argument&) {
      refused = true;
    }
  }
  void check() const { expect(refused, "a null exception is refused"); }
};

struct Root {
  std::optional<CancellationSource> source;
  void call() { source.emplace(); }
  void check() const { expect(source->token().can_be_cancelled(), "it can be cancelled"); }
};

struct Child {
  CancellationSource parent;
  std::optional<CancellationSource> source;
  void call() { source.emplace(parent.token()); }
  void check() {
    expect(parent.cancel(), "the parent was not cancelled before");
    expect(source->is_cancelled(), "the child is cancelled with its parent");
  }
};

// The lists of a node with many links are sharded, which takes memory; it goes on without.
struct ManyChildren {
  CancellationSource parent;
  std::vector<CancellationSource> children;
  ManyChildren() { children.reserve(600); }
  void call() {
    while (children.size() < 600) children.emplace_back(parent.token());
  }
  std::string state() const { return parent.is_cancelled() ? "cancelled" : "alive"; }
  void check() {
    parent.cancel();
    for (const CancellationSource& child : children) {
      if (!expect(child.is_cancelled(), "every child is cancelled with its parent")) return;
    }
  }
};

struct Timeout {
  CancellationSource parent;
  std::optional<CancellationSource> source;
  void call() { source.emplace(parent.token(), 1h); }
  std::string state() const {
    return std::to_string(lastcall::detail::TimerService::instance().armed_for_test());
  }
  void check() const {
    expect(source->token().deadline().has_value(), "it has a deadline");
    expect(lastcall::detail::TimerService::instance().armed_for_test() == 1, "one timer is armed");
  }
};

// With no look at the timers beforehand: the first of the process.
struct FirstDeadline {
  std::optional<CancellationSource> source;
  void call() { source.emplace(CancellationToken(), lastcall::Clock::now() + 5ms); }
  void check() const {
    expect(source->token().wait_for(10s), "the deadline comes");
    expect(source->token().cause().kind() == CauseKind::deadline_exceeded, "and says what it was");
  }
};

// The C library has room for 48 fork handlers; the next one, the timers', takes memory.
struct DeadlineInAChild {
  std::optional<CancellationSource> source;
  DeadlineInAChild() {
    for (int at = 0; at < 48; ++at) ::pthread_atfork(nullptr, nullptr, [] {});
  }
  void call() { source.emplace(CancellationToken(), 1h); }
  void check() const {
    const pid_t child = ::fork();
    if (child == 0) {
      const CancellationSource soon(CancellationToken(), 1ms);
      ::_exit(soon.token().wait_for(5s) ? 0 : 1);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    expect(status == 0, "a deadline made in a forked child comes");
  }
};

struct PastDeadline {
  std::optional<CancellationSource> source;
  void call() { source.emplace(CancellationToken(), -1s); }
  void check() const { expect(source->is_cancelled(), "it is born cancelled"); }
};

template <int Count>
struct AnyOf {
  std::vector<CancellationSource> sources;
  std::vector<CancellationToken> parents;
  std::optional<CancellationSource> any;
  AnyOf() {
    for (int at = 0; at < Count; ++at) {
      sources.emplace_back();
      parents.push_back(sources.back().token());
    }
  }
  void call() { any.emplace(CancellationSource::any_of(parents)); }
  std::string state() const {
    std::string all;
    for (const CancellationToken& parent : parents) all += parent.is_cancelled() ? 'x' : '.';
    return all;
  }
  void check() {
    expect(!any->is_cancelled(), "nobody has cancelled it");
    if (Count == 0) return;
    sources.back().cancel(Cause::cancelled(long_words));
    expect(any->is_cancelled(), "it is cancelled with the last of its parents");
    expect(any->token().cause().message() == long_words, "with its cause");
  }
};

struct Descriptor {
  CancellationSource source;
  int fd = -1;
  void call() { fd = source.token().fd(); }
  void check() {
    expect(!support::is_readable(fd), "it is not readable yet");
    source.cancel();
    expect(support::is_readable(fd), "it is readable once cancelled");
    expect(source.token().fd() == fd, "it stays the same");
  }
};

struct DescriptorOfACancelled {
  CancellationSource source;
  int fd = -1;
  DescriptorOfACancelled() { source.cancel(); }
  void call() { fd = source.token().fd(); }
  void check() const { expect(support::is_readable(fd), "it is readable"); }
};

struct Calls {
  int* count;
  void operator()() const noexcept { ++*count; }
};

struct Callbacks {
  CancellationSource source;
  int count = 0;
  std::optional<CancellationCallback<Calls>> callbacks[100];
  void call() {
    for (auto& callback : callbacks) {
      if (!callback) callback.emplace(source.token(), Calls{&count});
    }
  }
  void check() {
    expect(count == 0, "none was called early");
    source.cancel();
    expect(count == 100, "each was called once");
  }
};

struct CallbackOfACancelled {
  CancellationSource source;
  int count = 0;
  std::optional<CancellationCallback<Calls>> callback;
  CallbackOfACancelled() { source.cancel(); }
  void call() { callback.emplace(source.token(), Calls{&count}); }
  void check() const { expect(count == 1, "it was called in its constructor"); }
};

// A tree that is cancelled and torn down with no memory at all.
struct CancelAndDestroy {
  Cause cause = Cause::cancelled(long_words);
  std::optional<CancellationSource> root{std::in_place};
  std::vector<CancellationSource> children;
  CancellationToken seen;
  int count = 0;
  CancelAndDestroy() {
    for (int at = 0; at < 40; ++at) {
      children.emplace_back(at < 5 ? root->token()
                                   : children[static_cast<std::size_t>(at - 5)].token());
      if (at % 3 == 0) children.emplace_back(children.back().token(), 1h);
    }
    static_cast<void>(children.back().token().fd());
    seen = children.back().token();
  }
  void call() {
    {
      const CancellationCallback<Calls> callback(children.back().token(), Calls{&count});
      root->cancel(cause);
    }
    children.clear();
    root.reset();
  }
  void check() const {
    expect(count == 1, "the callback was called");
    expect(seen.cause().message() == long_words, "the cause came down to the last of them");
  }
};

struct Waits {
  CancellationSource source;
  bool cancelled = true;
  void call() {
    cancelled =
        source.token().wait_for(1ms) || source.token().wait_until(lastcall::Clock::now() + 1ms);
  }
  void check() const { expect(!cancelled, "the time was up first"); }
};

struct Throws {
  CancellationSource source;
  bool thrown = false;
  Throws() { source.cancel(Cause::cancelled(long_words)); }
  void call() {
    try {
      source.token().throw_if_cancelled();
    } catch (const lastcall::OperationCancelled& stopped) {
      thrown = stopped.cause().message() == long_words;
    }
  }
  void check() const { expect(thrown, "it has thrown what it should"); }
};

struct Assigned {
  CancellationSource source;
  CancellationToken before = source.token();
  void call() { source = CancellationSource(); }
  std::string state() const { return before.is_cancelled() ? "cancelled" : "alive"; }
  void check() const { expect(before.is_cancelled(), "assigning over it has cancelled it"); }
};

}  // namespace

#if !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN) && defined(SYS_mmap)
// In the place of the C library's; its own allocator doesn't call it by this name.
extern "C" void* mmap(void* address, std::size_t length, int protection, int flags, int fd,
                      off_t offset) noexcept {
  if (refuses_slabs) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return reinterpret_cast<void*>(
      ::syscall(SYS_mmap, address, length, protection, flags, fd, offset));
}
#endif

TEST_CASE("causes are made whole or not at all") {
  CHECK(sweep<CancelledCause>().problems == "");
  CHECK(sweep<SignalCause>().problems == "");
  CHECK(sweep<FailureCause>().problems == "");
  CHECK(sweep<NullFailure>().problems == "");
  CHECK(sweep<FailureCause>().failures >= 4);
}

TEST_CASE(
    "a source that can't be made leaves nothing behind, with nodes from the pool and without") {
  for (const bool refused : {false, true}) {
    refuses_slabs = refused;
    CHECK(sweep<Root>().problems == "");
    CHECK(sweep<Child>().problems == "");
    CHECK(sweep<PastDeadline>().problems == "");
    CHECK(sweep<Assigned>().problems == "");
    if (refused || !NodePool::is_used) CHECK(sweep<Child>().failures >= 2);
  }
}

TEST_CASE("a node with hundreds of children does without the memory for its shards") {
  for (const bool refused : {false, true}) {
    refuses_slabs = refused;
    const starvation::Swept swept = sweep<ManyChildren>(starvation::Reach::this_thread, 30);
    CHECK(swept.problems == "");
    if (refused || !NodePool::is_used) CHECK(swept.failures >= 20);
  }
}

TEST_CASE("a deadline that can't be had leaves no timer behind") {
  CHECK(sweep<Timeout>().problems == "");
  const starvation::Swept first = sweep<FirstDeadline>();
  CHECK(first.problems == "");
  CHECK(first.failures >= 3);
}

TEST_CASE("a deadline is had with what it needs to survive a fork, or not at all") {
  CHECK(sweep<DeadlineInAChild>().problems == "");
}

TEST_CASE("any_of is linked to all of its parents or to none") {
  CHECK(sweep<AnyOf<0>>().problems == "");
  CHECK(sweep<AnyOf<1>>().problems == "");
  CHECK(sweep<AnyOf<2>>().problems == "");
  const starvation::Swept many = sweep<AnyOf<9>>();
  CHECK(many.problems == "");
  CHECK(many.failures >= 2);
}

TEST_CASE("merges are given back, whether or not others hold what they merge") {
  const auto make_and_let_go = [](std::size_t held) {
    const CancellationSource top;
    std::vector<CancellationToken> parents;
    while (parents.size() < 5) {
      CancellationSource parent(top.token());
      parent.disarm();
      parents.push_back(parent.token());
    }
    CancellationSource merged = CancellationSource::any_of(parents);
    parents.resize(held);
    const CancellationSource again = CancellationSource::any_of({merged.token(), top.token()});
    merged.disarm();
  };
  for (const std::size_t held : {std::size_t{5}, std::size_t{4}, std::size_t{1}, std::size_t{0}}) {
    make_and_let_go(held);  // the first one may have something made that stays
    const long before = starvation::live_objects;
    make_and_let_go(held);
    CHECK(starvation::live_objects == before);
  }
}

TEST_CASE("a token's descriptor is there or is not") {
  const starvation::Swept swept = sweep<Descriptor>();
  CHECK(swept.problems == "");
  CHECK(swept.failures >= 2);
  CHECK(sweep<DescriptorOfACancelled>().problems == "");
}

TEST_CASE("callbacks and waits ask for no memory that they need") {
  const starvation::Swept callbacks = sweep<Callbacks>();
  CHECK(callbacks.problems == "");
  CHECK(callbacks.failures == 0);
  CHECK(sweep<CallbackOfACancelled>().refusals == 0);
  CHECK(sweep<Waits>().refusals == 0);
  CHECK(sweep<Throws>().problems == "");
}

TEST_CASE("a tree is cancelled and destroyed without asking for memory") {
  const starvation::Swept swept = sweep<CancelAndDestroy>();
  CHECK(swept.problems == "");
  CHECK(swept.refusals == 0);
}
