// A program that uses lastcall loads shared objects that use it, too: with hidden symbols each has a
// registry of its own and they chain, with visible ones they may share one. Either way each trap gets its
// copy, in whatever order traps and objects go.
//
// Built twice: with the program's own symbols to itself, and lent to the shared objects.
#include "company/module.hpp"
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::SignalTrap;
using support::Child;
using support::Ended;
using support::expect;
using support::expect_equal;

// Loaded until it is closed.
class Module {
 public:
  Module(const char* path, int flags) : handle_(::dlopen(path, RTLD_NOW | flags)) {
    if (!expect(handle_ != nullptr, "the shared object is loaded")) support::leave(0);
    // POSIX has functions come out of dlsym() by this detour.
    const auto get =
        reinterpret_cast<const CompanyModule* (*)()>(::dlsym(handle_, "company_module"));
    calls_ = get();
  }
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  ~Module() { close(); }
  const CompanyModule* operator->() const { return calls_; }
  void close() {
    if (handle_ != nullptr) ::dlclose(handle_);
    handle_ = nullptr;
  }

 private:
  void* handle_;
  const CompanyModule* calls_ = nullptr;
};

struct Pair {
  const char* words;
  const char* first;
  const char* second;
  int flags;
};

const Pair pairs[] = {
    {"both hidden", MODULE_HIDDEN_A, MODULE_HIDDEN_B, RTLD_LOCAL},
    {"hidden and default", MODULE_HIDDEN_A, MODULE_DEFAULT_B, RTLD_LOCAL},
    {"both default, each to itself", MODULE_DEFAULT_A, MODULE_DEFAULT_B, RTLD_LOCAL},
    {"both default, for all to see", MODULE_DEFAULT_A, MODULE_DEFAULT_B, RTLD_GLOBAL},
};

// Runs `body(pair)` in a child for each pair; what went wrong, or "".
template <class Body>
std::string with_each_pair(Body body) {
  std::string problems;
  for (const Pair& pair : pairs) {
    const Ended ended = Child::run([&] { return body(pair); }).end();
    if (ended.how != "exit 0")
      problems += std::string(pair.words) + ": " + ended.how + "\n" + ended.err;
  }
  return problems;
}

int calls_of_previous = 0;
void count_call(int) { ++calls_of_previous; }

}  // namespace

TEST_CASE(
    "each object's traps get their copy, and what was there is back, in every order of going") {
  int order[] = {0, 1, 2};
  do {
    INFO("first to go: " << order[0] << ", then " << order[1]);
    CHECK(with_each_pair([&order](const Pair& pair) {
            struct sigaction handler {};
            handler.sa_handler = &count_call;
            ::sigaction(SIGUSR1, &handler, nullptr);
            const std::string before = support::disposition_of(SIGUSR1);
            Module first(pair.first, pair.flags);
            Module second(pair.second, pair.flags);
            std::optional<SignalTrap> own(std::in_place,
                                          std::initializer_list<int>{SIGTERM, SIGUSR1});
            void* traps[] = {nullptr, first->make_trap(SIGTERM, SIGUSR1),
                             second->make_trap(SIGTERM, SIGUSR1)};
            bool alive[] = {true, true, true};
            for (const int goes : order) {
              for (const int number : {SIGTERM, SIGUSR1}) {
                ::raise(number);
                if (alive[0]) {
                  const auto got = own->wait_for(5s);
                  expect(got && got->number == number, "the program's trap got it");
                }
                if (alive[1]) {
                  expect_equal(first->wait_for_signal(traps[1], 5000), number,
                               "the first's signal");
                }
                if (alive[2]) {
                  expect_equal(second->wait_for_signal(traps[2], 5000), number,
                               "the second's signal");
                }
              }
              alive[goes] = false;
              if (goes == 0) own.reset();
              if (goes == 1) first->destroy_trap(traps[1]);
              if (goes == 2) second->destroy_trap(traps[2]);
            }
            // A handler that another one covers can't take itself off: it gives way when it is called.
            for (int turn = 0; turn < 3; ++turn) ::raise(SIGUSR1);
            expect_equal(calls_of_previous, 6, "calls of the handler that was there before");
            expect(support::disposition_of(SIGUSR1) == before, "what was there is back");
          }) == "");
  } while (std::next_permutation(order, order + 3));
}

TEST_CASE("when all have gone SIGTERM ends the process as it did before") {
  int order[] = {0, 1, 2};
  do {
    for (const Pair& pair : pairs) {
      INFO(pair.words << ", first to go: " << order[0] << ", then " << order[1]);
      const Ended ended = Child::run([&] {
                            Module first(pair.first, pair.flags);
                            Module second(pair.second, pair.flags);
                            std::optional<SignalTrap> own(std::in_place);
                            void* const trap = first->make_trap(SIGTERM, SIGINT);
                            void* const other = second->make_trap(SIGTERM, SIGINT);
                            for (const int goes : order) {
                              if (goes == 0) own.reset();
                              if (goes == 1) first->destroy_trap(trap);
                              if (goes == 2) second->destroy_trap(other);
                            }
                            ::raise(SIGTERM);
                            return 1;
                          }).end();
      CHECK(ended.how == "SIGTERM");
      CHECK(ended.err == "");
    }
  } while (std::next_permutation(order, order + 3));
}

TEST_CASE("an object that is closed with its trap gone leaves no handler that points nowhere") {
  CHECK(with_each_pair([](const Pair& pair) {
          SignalTrap below{SIGTERM, SIGUSR1};
          Module first(pair.first, pair.flags);
          void* const trap = first->make_trap(SIGTERM, SIGUSR1);
          SignalTrap above{SIGUSR1, SIGUSR2};
          first->destroy_trap(trap);
          first.close();
          for (int turn = 0; turn < 3; ++turn) {
            ::raise(SIGUSR1);
            ::raise(SIGTERM);
            expect(above.wait_for(5s).has_value(), "the trap above gets it");
            expect(below.wait_for(5s).has_value(), "the trap below gets one");
            expect(below.wait_for(5s).has_value(), "and the other");
          }
          Module again(pair.first, pair.flags);
          void* const another = again->make_trap(SIGTERM, SIGHUP);
          ::raise(SIGTERM);
          expect_equal(again->wait_for_signal(another, 5000), SIGTERM, "the signal of a new trap");
          again->destroy_trap(another);
          // What nobody has read would be raised again.
          while (below.try_wait()) {
          }
        }) == "");
}

TEST_CASE("an object that is closed while signals rain leaves nobody in the lurch") {
  CHECK(with_each_pair([](const Pair& pair) {
          SignalTrap own{SIGUSR1};
          std::atomic<bool> enough{false};
          std::thread sender([&enough] {
            while (!enough) ::kill(::getpid(), SIGUSR1);
          });
          for (int turn = 0; turn < 20; ++turn) {
            Module module(pair.first, pair.flags);
            void* const trap = module->make_trap(SIGUSR1, SIGUSR2);
            expect(trap != nullptr, "there is a trap");
            if (trap == nullptr) break;
            expect_equal(module->wait_for_signal(trap, 5000), SIGUSR1, "its signal");
            module->destroy_trap(trap);
          }
          enough = true;
          sender.join();
          expect(own.wait_for(5s).has_value(), "the program's trap got some");
          while (own.try_wait()) {
          }
        }) == "");
}

TEST_CASE("an object may be closed when it has used deadlines, groups and tasks") {
  CHECK(with_each_pair([](const Pair& pair) {
          std::thread lives_on;
          support::Gate used;
          support::Gate end;
          {
            Module first(pair.first, pair.flags);
            Module second(pair.second, pair.flags);
            expect(first->use_everything(), "all of it works");
            expect(second->use_everything(), "all of it works in the other, too");
            // A thread that has counted in the object's groups ends after it.
            lives_on = std::thread([&] {
              expect(second->use_everything(), "all of it works on another thread");
              used.open();
              expect(end.wait(), "the gate opens");
            });
            expect(used.wait(), "the gate opens");
          }
          end.open();
          lives_on.join();
          lastcall::CancellationSource source(lastcall::CancellationToken(), 5ms);
          expect(source.token().wait_for(10s), "the program's deadlines come");
          const pid_t child = ::fork();
          if (child == 0) ::_exit(0);
          int status = -1;
          ::waitpid(child, &status, 0);
          expect_equal(status, 0, "the status of a forked child");
        }) == "");
}

TEST_CASE("an object may be closed while its timer thread sleeps") {
  CHECK(with_each_pair([](const Pair& pair) {
          {
            Module first(pair.first, pair.flags);
            Module second(pair.second, pair.flags);
            expect(first->use_deadline(), "a deadline");
            expect(second->use_deadline(), "another");
          }
          // The thread wakes meanwhile, to see that there is nothing to do any more.
          std::this_thread::sleep_for(150ms);
        }) == "");
}

TEST_CASE("an object may be closed when it has got out of a blocking accept") {
  CHECK(with_each_pair([](const Pair& pair) {
          Module module(pair.first, pair.flags);
          expect(module->accept_until_cancelled(), "it came out of it");
          module.close();
          // The handler that interrupts stays, and does nothing.
          for (int number = SIGRTMIN; number <= SIGRTMAX; ++number) {
            struct sigaction now {};
            if (::sigaction(number, nullptr, &now) == 0 && now.sa_handler != SIG_DFL) {
              ::raise(number);
              return 0;
            }
          }
          return 1;
        }) == "");
}

namespace {
lastcall::CancellationSource* shared_source = nullptr;
}

TEST_CASE("a token of the program's is followed inside an object") {
  CHECK(with_each_pair([](const Pair& pair) {
          lastcall::CancellationSource source;
          shared_source = &source;
          const lastcall::CancellationToken token = source.token();
          Module module(pair.first, pair.flags);
          expect(module->follows(&token, [] { shared_source->cancel(); }), "it is cancelled, too");
        }) == "");
}

// With hidden symbols each has a pool of its own, and what one made comes back by way of the other.
TEST_CASE("children that an object made may be destroyed outside of it, and the other way round") {
  CHECK(with_each_pair([](const Pair& pair) {
          using Children = std::vector<lastcall::CancellationSource>;
          constexpr int many = 20'000;
          const lastcall::CancellationSource source;
          const lastcall::CancellationToken token = source.token();
          {
            Module module(pair.first, pair.flags);
            const auto exchange = [&] {
              for (int turn = 0; turn < 10; ++turn) {
                auto* const own = new Children;
                for (int at = 0; at < many; ++at) own->emplace_back(token);
                auto* const theirs = static_cast<Children*>(module->make_children(&token, many));
                module->destroy_children(own);
                delete theirs;
              }
            };
            std::thread first(exchange);
            std::thread second(exchange);
            first.join();
            second.join();
            // These come home when the object is gone.
            auto* const last = static_cast<Children*>(module->make_children(&token, many));
            module.close();
            delete last;
          }
          Children again;
          for (int at = 0; at < many; ++at) again.emplace_back(token);
          int alike = 0;
          for (const lastcall::CancellationSource& one : again) {
            if (!one.is_cancelled() && one.token() != token) ++alike;
          }
          expect_equal(alike, many, "the number of new children");
        }) == "");
}

// With hidden symbols each has a timer thread of its own.
TEST_CASE("a deadline that an object set leaves no timer behind, whoever cancels or destroys it") {
  CHECK(with_each_pair([](const Pair& pair) {
          using lastcall::CancellationSource;
          Module module(pair.first, pair.flags);
          const CancellationSource warm(lastcall::CancellationToken(), 1h);
          auto& service = lastcall::detail::TimerService::instance();
          const std::size_t before = service.armed_for_test();
          for (int turn = 0; turn < 200; ++turn) {
            CancellationSource root;
            const lastcall::CancellationToken token = root.token();
            void* const cancelled = module->make_timed(&token, 20);
            root.cancel();
            module->destroy_source(cancelled);
            CancellationSource other;
            const lastcall::CancellationToken below = other.token();
            // Without having cancelled it: it goes with its timer.
            auto* const destroyed =
                static_cast<CancellationSource*>(module->make_timed(&below, 20));
            destroyed->disarm();
            delete destroyed;
          }
          // What one of them had left in a wheel would be looked at now.
          std::this_thread::sleep_for(100ms);
          expect_equal(service.armed_for_test(), before, "the number of timers");
          CancellationSource root;
          const lastcall::CancellationToken token = root.token();
          void* const last = module->make_timed(&token, 5);
          expect(static_cast<CancellationSource*>(last)->token().wait_for(30s), "it comes");
          delete static_cast<CancellationSource*>(last);
        }) == "");
}

TEST_CASE("a callback of an object's that the program runs may destroy itself") {
  CHECK(with_each_pair([](const Pair& pair) {
          Module module(pair.first, pair.flags);
          lastcall::CancellationSource source;
          const lastcall::CancellationToken token = source.token();
          int runs = 0;
          module->destroy_in_callback(&token, &runs);
          ::alarm(30);
          source.cancel();
          expect_equal(runs, 1, "the number of calls");
        }) == "");
}

TEST_CASE("an object that has only cancelled may be closed, and the cause is still there") {
  CHECK(with_each_pair([](const Pair& pair) {
          for (const char* const why : {static_cast<const char*>(nullptr), "requested", "enough"}) {
            Module module(pair.first, pair.flags);
            lastcall::CancellationSource source;
            const lastcall::CancellationSource child(source.token());
            module->cancel(&source, why);
            module.close();
            const lastcall::CancellationSource late(source.token());
            const std::string words = why == nullptr ? "cancelled" : why;
            for (const auto& token : {source.token(), child.token(), late.token()}) {
              const lastcall::Cause cause = token.cause();
              expect(cause.kind() == lastcall::CauseKind::cancelled, "the kind of cause");
              expect(cause.message() == words, "the words of the cause");
            }
          }
        }) == "");
}

TEST_CASE("a coordinator inside an object drains, and the program's trap gets its copy") {
  CHECK(with_each_pair([](const Pair& pair) {
          SignalTrap own{SIGTERM};
          Module module(pair.first, pair.flags);
          expect_equal(module->drain_once(), 0, "the exit code");
          expect(own.wait_for(5s).has_value(), "the program's trap got it, too");
          module.close();
          ::raise(SIGTERM);
          expect(own.wait_for(5s).has_value(), "and the next one");
          expect(!own.try_wait(), "and no more");
        }) == "");
}
