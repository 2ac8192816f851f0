// What soak.cpp puts under load: a service on plain sockets that uses every brick for each kind of
// request. It listens on a free port of 127.0.0.1, which it prints.
//
//   soak_service [--plant leak | descriptor | thread | lost | early]
//
// A request is a line "<kind> <number>", its answer "<kind> <number> <generation> <how>", where the
// generation is how often SIGHUP has made it reload, and how is "ok" or, once a shutdown is announced,
// "last": who gets that is to send no more. Kinds:
//   W  work with a guard, a child token, a callback
//   D  a deadline of 20 ms, waited for
//   G  a task group of three, one of which throws
//   T  a trap that comes and goes, and a signal for it
//   C  a child process by posix_spawn
//   F  a child by fork that makes a trap and a deadline of its own
//   N  a thread's name, stack and whereabouts: a snapshot
//
// --plant puts in a mistake that the soak has to notice: 1 KiB a request that is never freed, a descriptor
// a hundred requests, a thread a thousand, an answer in a thousand that never comes, a deadline that isn't
// waited for.
#include <lastcall/lastcall.hpp>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

extern char** environ;

namespace {

using lastcall::CancellationSource;
using lastcall::CancellationToken;
using namespace std::chrono_literals;

std::string_view planted;

/// What a reload replaces while requests read it.
class Configuration {
 public:
  void reload() {
    auto fresh = std::make_shared<const std::string>(4096, 'c');
    const std::lock_guard<std::mutex> lock(mutex_);
    text_ = std::move(fresh);
    ++generation_;
  }
  std::pair<std::shared_ptr<const std::string>, long> read() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {text_, generation_};
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const std::string> text_;
  long generation_ = 0;
};

[[noreturn]] void broken(const char* what) { throw std::runtime_error(what); }
void require(bool holds, const char* what) {
  if (!holds) broken(what);
}

int status_of(pid_t child) {
  int status = -1;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

/// Everything as JSON to nowhere, which costs what it costs; to people only the end.
class Log final : public lastcall::Observer {
 public:
  explicit Log(int nowhere) : json_(lastcall::json_observer(nowhere)) {}
  void on_request(lastcall::Clock::time_point when) override {
    requested_ = true;
    json_->on_request(when);
    text_->on_request(when);
  }
  void on_event(const lastcall::Event& event) override {
    json_->on_event(event);
    if (requested_) text_->on_event(event);
  }

 private:
  std::shared_ptr<lastcall::Observer> json_;
  std::shared_ptr<lastcall::Observer> text_ = lastcall::stderr_observer();
  bool requested_ = false;
};

class Service {
 public:
  explicit Service(lastcall::ShutdownCoordinator& coordinator) : coordinator_(coordinator) {}

  Configuration& configuration() { return configuration_; }

  void serve(int connection, const CancellationToken& token) {
    std::string waiting;
    for (;;) {
      const std::size_t end = waiting.find('\n');
      if (end == std::string::npos) {
        // Cancelled: what has come already is still answered.
        const bool draining = lastcall::poll(connection, POLLIN, token) != lastcall::Ready::ready;
        pollfd look{connection, POLLIN, 0};
        if (draining && ::poll(&look, 1, 0) <= 0) return;
        char bytes[512];
        const ssize_t got = ::recv(connection, bytes, sizeof bytes, 0);
        if (got <= 0) return;
        waiting.append(bytes, static_cast<std::size_t>(got));
        continue;
      }
      const std::string request = waiting.substr(0, end);
      waiting.erase(0, end + 1);
      handle(request);
      const long number = ++served_;
      plant(number);
      if (planted == "lost" && number % 1000 == 0) continue;
      std::string answer = request + " " + std::to_string(configuration_.read().second);
      answer += coordinator_.is_ready() ? " ok\n" : " last\n";
      if (::send(connection, answer.data(), answer.size(), MSG_NOSIGNAL) < 0) return;
    }
  }

 private:
  static void plant(long number) {
    if (planted == "leak") {
      static std::atomic<char*> latest;
      char* const lost = new char[1024];
      std::memset(lost, 1, 1024);
      latest = lost;
    }
    if (planted == "descriptor" && number % 100 == 0) static_cast<void>(::dup(STDERR_FILENO));
    if (planted == "thread" && number % 1000 == 0) std::thread([] { ::pause(); }).detach();
  }

  void handle(const std::string& request) {
    switch (request[0]) {
      case 'W': work(request); break;
      case 'D': wait_for_deadline(); break;
      case 'G': work_together(); break;
      case 'T': trap_a_signal(); break;
      case 'C': start_a_program(); break;
      case 'F': fork_a_child(); break;
      case 'N': require(!coordinator_.snapshot().empty(), "nobody is in"); break;
      default: broken("an unknown kind of request");
    }
  }

  void work(const std::string& request) {
    const auto guard = coordinator_.try_enter(request);
    const CancellationSource source(coordinator_.abort_token(), 1min);
    const CancellationSource both =
        CancellationSource::any_of({source.token(), coordinator_.token()});
    std::atomic<bool> called{false};
    {
      CancellationSource child(both.token());
      const lastcall::CancellationCallback callback(child.token(), [&called] { called = true; });
      lastcall::WaitGroup group;
      {
        const auto member = group.enter("a member of " + request);
        child.cancel(lastcall::Cause::cancelled("done with " + request));
      }
      group.wait();
      require(group.members().empty(), "a member is left");
    }
    require(called, "a callback was not called");
    require(configuration_.read().first->size() == 4096, "a configuration is broken");
  }

  void wait_for_deadline() {
    const auto begin = lastcall::Clock::now();
    const CancellationSource source(CancellationToken(), 20ms);
    if (planted != "early") source.token().wait();
    require(planted == "early" || lastcall::Clock::now() - begin >= 20ms, "a deadline came early");
    require(planted == "early" || source.token().fd() >= 0, "no descriptor");
  }

  static void work_together() {
    lastcall::TaskGroup group;
    std::atomic<int> woken{0};
    group.spawn("waits", [&woken](const CancellationToken& token) {
      token.wait();
      ++woken;
    });
    group.spawn("sleeps", [&woken](const CancellationToken& token) {
      require(!lastcall::sleep_for(1min, token), "slept it all");
      ++woken;
    });
    group.spawn("throws", [] { broken("on purpose"); });
    bool thrown = false;
    try {
      group.wait();
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    require(thrown && woken == 2 && group.failures().size() == 1, "a task group went another way");
  }

  static void trap_a_signal() {
    lastcall::SignalTrap trap{SIGUSR2};
    ::raise(SIGUSR2);
    const auto got = trap.wait_for(30s);
    require(got && got->number == SIGUSR2, "a signal was lost");
    while (trap.try_wait()) {
    }
  }

  static void start_a_program() {
    char name[] = "true";
    char* const arguments[] = {name, nullptr};
    pid_t child = -1;
    require(::posix_spawnp(&child, name, nullptr, nullptr, arguments, environ) == 0, "no program");
    require(status_of(child) == 0, "a program failed");
  }

  static void fork_a_child() {
    const pid_t child = ::fork();
    require(child >= 0, "no child");
    if (child == 0) {
      lastcall::SignalTrap trap{SIGUSR1};
      ::raise(SIGUSR1);
      const auto got = trap.try_wait();
      const CancellationSource source(CancellationToken(), 2ms);
      source.token().wait();
      ::_exit(got && got->number == SIGUSR1 ? 0 : 1);
    }
    require(status_of(child) == 0, "in a child a trap or a deadline failed");
  }

  lastcall::ShutdownCoordinator& coordinator_;
  Configuration configuration_;
  std::atomic<long> served_{0};
};

int listen_somewhere(int& port) {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = ::htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (listener < 0 || ::bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      ::listen(listener, 128) != 0 ||
      ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    throw std::runtime_error("cannot listen on 127.0.0.1");
  }
  port = ::ntohs(address.sin_port);
  return listener;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--plant") == 0) planted = argv[2];
  // Traps of single requests come and go: SIGUSR2 may arrive when none is there.
  std::signal(SIGUSR2, [](int) {});

  lastcall::ShutdownOptions options;
  options.grace_period = 20s;
  options.announce_delay = 3s;
  options.observer = std::make_shared<Log>(::open("/dev/null", O_WRONLY | O_CLOEXEC));
  lastcall::ShutdownCoordinator coordinator(options);
  Service service(coordinator);
  service.configuration().reload();

  coordinator.on_signal(SIGHUP,
                        [&](const lastcall::SignalInfo&) { service.configuration().reload(); });
  lastcall::Stage& storage = coordinator.stage("storage", 2s);
  storage.spawn("flusher", [](const CancellationToken& token) {
    const lastcall::Ticker tick(250ms);
    while (tick.wait(token)) {
    }
  });
  std::atomic<bool> released{false};
  storage.on_drained("release", [&] { released = true; });

  int port = 0;
  const int listener = listen_somewhere(port);
  coordinator.spawn("acceptor", [&, listener](const CancellationToken& token) {
    while (const auto connection = lastcall::accept(listener, token)) {
      const int fd = *connection;
      const int one = 1;
      ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      coordinator.spawn("connection", [&service, fd](const CancellationToken& stop) {
        struct Closed {
          int fd;
          ~Closed() { ::close(fd); }
        } const closed{fd};
        service.serve(fd, stop);
      });
    }
  });
  coordinator.on_drained("close listener", [listener] { ::close(listener); });

  std::printf("%d\n", port);
  std::fflush(stdout);
  coordinator.run();
}
