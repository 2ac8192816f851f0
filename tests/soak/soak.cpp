// Keeps soak_service under load for as long as it is told to, and checks that nothing grows, nothing is
// lost, and the end is clean.
//
//   soak SOAK_SERVICE [--minutes N] [--clients N] [--plant MISTAKE]
//
// Clients send requests of all kinds; every second a SIGHUP makes the service reload. Now and then the
// clients hold their breath, and in that quiet moment the service has exactly as many threads and
// descriptors as in the first one, and hardly more memory. In the end it gets a SIGTERM under full load:
// every request that was sent is answered, and it exits with 0 within its grace period.
//
// With --plant the service makes a mistake on purpose (see service.cpp): then the soak has to fail.
#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "support/threads.hpp"

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

namespace {

struct Settings {
  std::string service;
  double minutes = 2;
  int clients = 6;
  std::string plant;
};

/// The service as a process of its own.
class Process {
 public:
  explicit Process(const Settings& settings) {
    int output[2];
    if (::pipe(output) != 0) throw std::runtime_error("no pipe");
    pid_ = ::fork();
    if (pid_ < 0) throw std::runtime_error("no process");
    if (pid_ == 0) {
      ::dup2(output[1], STDOUT_FILENO);
      ::close(output[0]);
      ::close(output[1]);
      // Under nohup they would be ignored, and the service would respect that.
      std::signal(SIGHUP, SIG_DFL);
      std::signal(SIGTERM, SIG_DFL);
      // Else each new thread may get an arena of its own, and how many there are is chance.
      ::setenv("MALLOC_ARENA_MAX", "2", 1);
      const char* const plant = settings.plant.empty() ? nullptr : settings.plant.c_str();
      ::execl(settings.service.c_str(), settings.service.c_str(), plant ? "--plant" : nullptr,
              plant, nullptr);
      std::perror(settings.service.c_str());
      ::_exit(127);
    }
    ::close(output[1]);
    FILE* const lines = ::fdopen(output[0], "r");
    if (std::fscanf(lines, "%d", &port_) != 1)
      throw std::runtime_error("the service did not come up");
    std::fclose(lines);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    if (pid_ < 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }

  int port() const { return port_; }
  void send(int signal) const { ::kill(pid_, signal); }
  bool is_there() {
    if (pid_ > 0 && ::waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = -1;
    return pid_ > 0;
  }
  /// Its exit code; 128 + n if it died of signal n; -1 if it had to be killed.
  int wait_for_exit(std::chrono::seconds patience) {
    const auto end = Clock::now() + patience;
    while (is_there() && Clock::now() < end) std::this_thread::sleep_for(1ms);
    if (is_there()) return -1;
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_);
  }

  int threads() const { return entries("task"); }
  int descriptors() const { return entries("fd"); }
  long resident_kib() const {
    std::FILE* const file = std::fopen(("/proc/" + std::to_string(pid_) + "/status").c_str(), "re");
    long kib = -1;
    char line[256];
    while (file != nullptr && std::fgets(line, sizeof line, file) != nullptr) {
      if (std::sscanf(line, "VmRSS: %ld", &kib) == 1) break;
    }
    if (file != nullptr) std::fclose(file);
    return kib;
  }

 private:
  int entries(const char* what) const {
    DIR* const directory = ::opendir(("/proc/" + std::to_string(pid_) + "/" + what).c_str());
    int count = 0;
    if (directory == nullptr) return -1;
    while (const dirent* const entry = ::readdir(directory))
      count += entry->d_name[0] != '.' ? 1 : 0;
    ::closedir(directory);
    return count;
  }
  pid_t pid_ = -1;
  int port_ = 0;
  int status_ = 0;
};

/// Where clients wait in a quiet moment.
class Breath {
 public:
  template <class Before>
  void pass(Before before) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!held_) return;
    before();
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !held_; });
    --waiting_;
  }
  bool hold(int clients, const std::atomic<int>& gone) {
    std::unique_lock<std::mutex> lock(mutex_);
    held_ = true;
    return changed_.wait_for(lock, 60s, [&] { return waiting_ + gone == clients; });
  }
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false;
  int waiting_ = 0;
};

struct Shared {
  explicit Shared(const Settings& from) : settings(from) {}
  const Settings& settings;
  int port = 0;
  Breath breath;
  std::atomic<bool> stop{false};
  std::atomic<int> gone{0};  // clients that have left
  std::atomic<long> answered{0};
  std::atomic<long> generation{0};  // the highest that an answer told of
  std::array<std::atomic<long>, 128> of_kind{};
  std::mutex mutex;
  std::vector<std::string> complaints;

  void complain(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (complaints.size() < 10) complaints.push_back(what);
  }
  bool has_failed() {
    const std::lock_guard<std::mutex> lock(mutex);
    return !complaints.empty();
  }
};

/// A connection that asks and waits for the answer; it complains about every answer that doesn't come.
class Connection {
 public:
  explicit Connection(int port) {
    fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = ::htonl(INADDR_LOOPBACK);
    address.sin_port = ::htons(static_cast<std::uint16_t>(port));
    const timeval patience{60, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    const int one = 1;
    ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      ::close(fd_);
      throw std::runtime_error(std::string("no connection: ") + std::strerror(errno));
    }
  }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() { ::close(fd_); }

  std::string ask(const std::string& request) {
    const std::string line = request + "\n";
    if (::send(fd_, line.data(), line.size(), MSG_NOSIGNAL) < 0)
      throw std::runtime_error("cannot send");
    std::string answer;
    while (answer.empty() || answer.back() != '\n') {
      char bytes[256];
      const ssize_t got = ::recv(fd_, bytes, sizeof bytes, 0);
      if (got <= 0) throw std::runtime_error("no answer");
      answer.append(bytes, static_cast<std::size_t>(got));
    }
    answer.pop_back();
    return answer;
  }

 private:
  int fd_ = -1;
};

// One client keeps its connection; the others come anew for every few requests, and wait in quiet moments
// without one.
void be_a_client(Shared& shared, int who) {
  constexpr std::string_view kinds = "WWWWWWWWWWWWDDGTTWWWWWWWWDWGWTWWWCWWWWWFWWWWWWNWW";
  support::Random random(static_cast<std::uint64_t>(who) + 1);
  std::unique_ptr<Connection> connection;
  long number = 0;
  while (!shared.stop) {
    const std::string request = std::string(1, kinds[random.below(kinds.size())]) + " " +
                                std::to_string(who) + "." + std::to_string(++number);
    const auto asked = Clock::now();
    try {
      if (!connection) connection = std::make_unique<Connection>(shared.port);
      const std::string answer = connection->ask(request);
      if (answer.rfind(request + " ", 0) != 0) throw std::runtime_error("answered with: " + answer);
      if (request[0] == 'D' && Clock::now() - asked < 20ms) throw std::runtime_error("too early");
      const long generation = std::atol(answer.c_str() + request.size());
      long known = shared.generation;
      while (known < generation && !shared.generation.compare_exchange_weak(known, generation)) {
      }
      ++shared.answered;
      ++shared.of_kind[static_cast<std::size_t>(request[0])];
      if (answer.substr(answer.size() - 4) == "last") break;
    } catch (const std::exception& error) {
      shared.complain("request " + request + ": " + error.what());
      break;
    }
    // In a quiet moment only the first client's connection is there.
    if (who != 0 && random.one_in(20)) connection.reset();
    shared.breath.pass([&] {
      if (who != 0) connection.reset();
    });
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(4000)));
  }
  ++shared.gone;
}

struct Sample {
  double seconds;
  long answered;
  long resident;
  int threads;
  int descriptors;
};

/// When everybody holds their breath the service comes to rest: the lowest counts within a few seconds.
Sample quiet_moment(Shared& shared, Process& process, double seconds, const Sample* first) {
  if (!shared.breath.hold(shared.settings.clients, shared.gone))
    shared.complain("a client is stuck");
  Sample sample{seconds, shared.answered, 0, process.threads(), process.descriptors()};
  const auto settled = [&] {
    sample.threads = std::min(sample.threads, process.threads());
    sample.descriptors = std::min(sample.descriptors, process.descriptors());
    return first != nullptr && sample.threads <= first->threads &&
           sample.descriptors <= first->descriptors;
  };
  support::eventually(settled, first == nullptr ? 2000ms : 10'000ms);
  sample.resident = process.resident_kib();
  shared.breath.release();
  return sample;
}

long median_resident(std::vector<Sample> samples) {
  std::sort(samples.begin(), samples.end(),
            [](const Sample& a, const Sample& b) { return a.resident < b.resident; });
  return samples[samples.size() / 2].resident;
}

int soak(const Settings& settings) {
  Process process(settings);
  Shared shared(settings);
  shared.port = process.port();
  support::Threads clients;
  for (int who = 0; who < settings.clients; ++who) {
    clients.start([&shared, who] { be_a_client(shared, who); });
  }

  const auto begin = Clock::now();
  const auto since = [begin] {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  const double length = settings.minutes * 60;
  const double period = std::clamp(length / 40, 1.0, 20.0);
  double next_quiet = length / 5;  // by then every pool and cache has its size
  long reloads = 0;
  std::vector<Sample> samples;
  while (since() < length && process.is_there() && !shared.has_failed()) {
    // A SIGHUP after the last one has been answered for: so none may merge, and none may be lost.
    const long before = shared.generation;
    process.send(SIGHUP);
    ++reloads;
    const bool reloaded =
        support::eventually([&] { return shared.generation > before || shared.has_failed(); }, 60s);
    if (!reloaded) shared.complain("a SIGHUP was lost");
    if (since() >= next_quiet) {
      const Sample sample =
          quiet_moment(shared, process, since(), samples.empty() ? nullptr : &samples[0]);
      samples.push_back(sample);
      next_quiet = since() + period;
      if (sample.threads != samples[0].threads || sample.descriptors != samples[0].descriptors) {
        shared.complain("in a quiet moment " + std::to_string(sample.threads) + " threads and " +
                        std::to_string(sample.descriptors) + " descriptors, at first " +
                        std::to_string(samples[0].threads) + " and " +
                        std::to_string(samples[0].descriptors));
      }
      std::printf(
          "soak: %5.0f s, %8ld answers, %5ld reloads, VmRSS %6ld KiB, %d threads, %d descriptors\n",
          sample.seconds, sample.answered, reloads, sample.resident, sample.threads,
          sample.descriptors);
      std::fflush(stdout);
    }
    std::this_thread::sleep_for(1s);
  }

  // The end, under full load.
  const auto signalled = Clock::now();
  process.send(SIGTERM);
  const int code = process.wait_for_exit(40s);
  const double end_took = std::chrono::duration<double>(Clock::now() - signalled).count();
  shared.stop = true;
  clients.join();
  if (code != 0) shared.complain("the service ended with " + std::to_string(code));
  // Its announce delay, its grace period, and a busy machine.
  if (end_took > 22) shared.complain("the end took " + std::to_string(end_took) + " s");
  if (shared.answered == 0) shared.complain("nobody was answered");

  // Memory: the middle of the first third against the middle of the last. The allocator's own comings and
  // goings have been seen to take 50 KiB.
  constexpr long allowed_kib = 256;
  if (samples.size() < 6) {
    shared.complain("not enough quiet moments");
  } else {
    const std::size_t third = samples.size() / 3;
    const std::vector<Sample> early(samples.begin(), samples.begin() + static_cast<long>(third));
    const std::vector<Sample> late(samples.end() - static_cast<long>(third), samples.end());
    const long grown = median_resident(late) - median_resident(early);
    const long requests = late[third / 2].answered - early[third / 2].answered;
    std::printf("soak: VmRSS grew by %ld KiB over %ld requests; %ld KiB are allowed\n", grown,
                requests, allowed_kib);
    if (grown > allowed_kib) shared.complain("memory grows by " + std::to_string(grown) + " KiB");
  }

  for (const std::string& complaint : shared.complaints)
    std::printf("soak: %s\n", complaint.c_str());
  std::printf("%s: %.1f minutes, %ld requests (", shared.complaints.empty() ? "PASSED" : "FAILED",
              since() / 60, shared.answered.load());
  for (const char kind : std::string_view("WDGTCFN")) {
    std::printf("%s%c %ld", kind == 'W' ? "" : ", ", kind,
                shared.of_kind[static_cast<std::size_t>(kind)].load());
  }
  std::printf("), %s, %ld reloads; exit code %d, %.1f s after SIGTERM\n",
              shared.complaints.empty() ? "none lost" : "see above", reloads, code, end_took);
  return shared.complaints.empty() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  if (argc >= 2) settings.service = argv[1];
  for (int i = 2; i + 1 < argc; i += 2) {
    const std::string_view option = argv[i];
    if (option == "--minutes") settings.minutes = std::atof(argv[i + 1]);
    if (option == "--clients") settings.clients = std::max(std::atoi(argv[i + 1]), 2);
    if (option == "--plant") settings.plant = argv[i + 1];
  }
  if (settings.service.empty() || settings.minutes <= 0) {
    std::fprintf(stderr,
                 "usage: soak SOAK_SERVICE [--minutes N] [--clients N] [--plant MISTAKE]\n");
    return 2;
  }
  try {
    return soak(settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "soak: %s\n", error.what());
    return 1;
  }
}
