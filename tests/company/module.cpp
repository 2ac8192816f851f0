// A plugin that uses lastcall, loaded into a program that uses it as well.
#include "module.hpp"

#include <lastcall/lastcall.hpp>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <exception>
#include <initializer_list>
#include <memory>
#include <thread>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::SignalTrap;

void* make_trap(int first, int second) {
  try {
    return new SignalTrap(std::initializer_list<int>{first, second});
  } catch (const std::exception&) {
    return nullptr;
  }
}

int wait_for_signal(void* trap, int milliseconds) {
  const auto got =
      static_cast<SignalTrap*>(trap)->wait_for(std::chrono::milliseconds(milliseconds));
  return got ? got->number : 0;
}

void destroy_trap(void* trap) { delete static_cast<SignalTrap*>(trap); }

bool use_deadline() {
  const CancellationSource source(CancellationToken(), 50ms);
  return source.token().deadline().has_value();
}

bool use_everything() {
  CancellationSource source(CancellationToken(), 5ms);
  std::atomic<int> calls{0};
  const lastcall::CancellationCallback callback(source.token(), [&calls]() noexcept { ++calls; });
  source.token().wait();
  lastcall::WaitGroup group;
  std::thread other([&group] {
    for (int turn = 0; turn < 2000; ++turn) static_cast<void>(group.enter());
  });
  for (int turn = 0; turn < 2000; ++turn) static_cast<void>(group.enter());
  other.join();
  group.wait();
  lastcall::TaskGroup tasks;
  std::atomic<int> runs{0};
  tasks.spawn("a module's task", [&runs] { ++runs; });
  tasks.wait();
  while (calls == 0) std::this_thread::sleep_for(1ms);
  return runs == 1 && calls == 1;
}

bool accept_until_cancelled() {
  const int listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // The empty path: an abstract name of the kernel's choosing.
  if (::bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(sa_family_t)) != 0 ||
      ::listen(listener, 8) != 0) {
    return false;
  }
  // poll(2) says that there is somebody, and another has taken them first: made beforehand, since what
  // counts here is that the handler is there.
  static_cast<void>(lastcall::detail::interrupt_signal());
  CancellationSource source;
  std::thread canceller([&source] { source.cancel(); });
  const bool nobody = !lastcall::accept(listener, source.token());
  canceller.join();
  ::close(listener);
  return nobody;
}

bool follows(const void* token, void (*cancel)()) {
  const CancellationSource source(*static_cast<const CancellationToken*>(token));
  if (source.is_cancelled()) return false;
  cancel();
  return source.is_cancelled();
}

void* make_children(const void* token, int count) {
  auto* const children = new std::vector<CancellationSource>;
  for (int at = 0; at < count; ++at) {
    children->emplace_back(*static_cast<const CancellationToken*>(token));
  }
  return children;
}

void destroy_children(void* children) {
  delete static_cast<std::vector<CancellationSource>*>(children);
}

void* make_timed(const void* token, int milliseconds) {
  return new CancellationSource(*static_cast<const CancellationToken*>(token),
                                std::chrono::milliseconds(milliseconds));
}

void destroy_source(void* source) { delete static_cast<CancellationSource*>(source); }

void destroy_in_callback(const void* token, int* runs) {
  struct Own {
    struct Function {
      Own* own;
      int* runs;
      void operator()() const {
        int* const counter = runs;
        delete own;
        ++*counter;
      }
    };
    std::unique_ptr<lastcall::CancellationCallback<Function>> callback;
  };
  auto* const own = new Own;
  own->callback = std::make_unique<lastcall::CancellationCallback<Own::Function>>(
      *static_cast<const CancellationToken*>(token), Own::Function{own, runs});
}

void cancel(void* source, const char* why) {
  auto* const cancelled = static_cast<CancellationSource*>(source);
  if (why == nullptr) {
    cancelled->cancel();
  } else {
    cancelled->cancel(lastcall::Cause::cancelled(why));
  }
}

int drain_once() {
  lastcall::ShutdownOptions options;
  options.observer = nullptr;
  options.last_words = -1;
  options.grace_period = 10s;
  lastcall::ShutdownCoordinator coordinator(options);
  coordinator.spawn("a module's worker", [](const CancellationToken& token) { token.wait(); });
  ::raise(SIGTERM);
  return coordinator.drain().exit_code;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const CompanyModule* company_module() {
  static const CompanyModule module{make_trap,      wait_for_signal, destroy_trap,
                                    use_everything, use_deadline,    accept_until_cancelled,
                                    follows,        make_children,   destroy_children,
                                    make_timed,     destroy_source,  destroy_in_callback,
                                    cancel,         drain_once};
  return &module;
}
