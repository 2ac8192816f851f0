// Puts order_service to the test. Starts it, lets clients place orders as fast as it takes them,
// sends it a SIGTERM in the middle, and compares what was acknowledged with what is in the
// database.
//
//   order_load [--seconds N] [--clients N] ORDER_SERVICE
//
// Three kinds of clients, all on 127.0.0.1:
//   - behind a balancer, which asks /healthz and stops sending when that says 503: each of their
//     requests has to be answered, also at a deploy;
//   - stubborn ones, which go on until nobody listens: they will be refused in the end, but no
//     order that was acknowledged may be lost, and none may be kept that they were not told of;
//   - slow requests that are under way when the signal comes: they have to be finished.
#include <httplib.h>
#include <sqlite3.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

namespace {

struct Settings {
  std::string service;
  int seconds = 3;
  int clients = 8;
};

// A temporary directory that goes when the test is over.
class Workplace {
 public:
  Workplace() {
    std::string pattern = std::filesystem::temp_directory_path() / "order_load.XXXXXX";
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary directory");
    path_ = pattern;
  }
  ~Workplace() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Workplace(const Workplace&) = delete;
  Workplace& operator=(const Workplace&) = delete;
  std::string database() const { return path_ / "orders.db"; }

 private:
  std::filesystem::path path_;
};

// order_service as a process of its own. It writes to our terminal; we read where it listens.
class Service {
 public:
  Service(const std::string& program, const std::string& database) {
    int output[2];
    if (::pipe(output) != 0) throw std::runtime_error("no pipe");
    pid_ = ::fork();
    if (pid_ < 0) throw std::runtime_error("no process");
    if (pid_ == 0) {
      ::dup2(output[1], STDOUT_FILENO);
      ::close(output[0]);
      ::close(output[1]);
      ::execl(program.c_str(), program.c_str(), database.c_str(), "--announce", "750", nullptr);
      std::perror(program.c_str());
      ::_exit(127);
    }
    ::close(output[1]);
    FILE* const lines = ::fdopen(output[0], "r");
    char line[256] = "";
    if (std::fgets(line, sizeof line, lines) != nullptr) std::fputs(line, stdout);
    std::fclose(lines);
    const char* const colon = std::strrchr(line, ':');
    if (colon == nullptr || (port_ = std::atoi(colon + 1)) <= 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
      throw std::runtime_error("order_service did not come up");
    }
  }
  ~Service() {
    if (pid_ < 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  Service(const Service&) = delete;
  Service& operator=(const Service&) = delete;

  int port() const { return port_; }
  void terminate() const { ::kill(pid_, SIGTERM); }

  // Its exit code; 128 + n if it died of signal n; -1 if it is still there after `patience`.
  int wait_for_exit(std::chrono::seconds patience) {
    const auto give_up = Clock::now() + patience;
    int status = 0;
    while (::waitpid(pid_, &status, WNOHANG) == 0) {
      if (Clock::now() > give_up) return -1;
      std::this_thread::sleep_for(1ms);
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

 private:
  pid_t pid_ = -1;
  int port_ = 0;
};

using Orders = std::map<std::int64_t, std::string>;  // number -> what was ordered

struct Tally {
  Orders acknowledged;
  int refused = 0;     // answered, but not with a success
  int unanswered = 0;  // sent, or half sent, and no answer
};

httplib::Client connect(int port) {
  httplib::Client client("127.0.0.1", port);
  client.set_keep_alive(true);
  client.set_connection_timeout(5);
  client.set_read_timeout(15);
  return client;
}

// Places orders until `stop`, or until it is refused or nobody answers any more.
Tally place_orders(int port, const std::string& name, const std::atomic<bool>& stop) {
  constexpr int most = 20'000;  // however fast the disk is
  httplib::Client client = connect(port);
  Tally tally;
  for (int i = 0; i < most && !stop; ++i) {
    const std::string item = name + ", order " + std::to_string(i);
    const auto answer = client.Post("/orders", item, "text/plain");
    if (answer && answer->status == 201) {
      const auto at = answer->body.find(": ");
      const auto number = at == std::string::npos ? 0 : std::stoll(answer->body.substr(at + 2));
      tally.acknowledged.emplace(number, item);
    } else {
      ++(answer ? tally.refused : tally.unanswered);
      break;
    }
  }
  return tally;
}

// Sends one request and counts its answer.
Tally ask_slowly(int port, std::chrono::milliseconds span) {
  httplib::Client client = connect(port);
  Tally tally;
  const auto answer = client.Get("/slow?ms=" + std::to_string(span.count()));
  if (!answer) ++tally.unanswered;
  if (answer && answer->status != 200) ++tally.refused;
  return tally;
}

// The load balancer: asks the service how it is, and returns when that is not "200".
void watch_health(int port, const std::atomic<bool>& stop) {
  httplib::Client client = connect(port);
  client.set_keep_alive(false);
  while (!stop) {
    const auto answer = client.Get("/healthz");
    if (!answer || answer->status != 200) {
      std::printf("balancer: /healthz says %d, no new requests\n", answer ? answer->status : 0);
      std::fflush(stdout);
      return;
    }
    std::this_thread::sleep_for(25ms);
  }
}

Orders read_database(const std::string& path) {
  sqlite3* database = nullptr;
  sqlite3_stmt* rows = nullptr;
  Orders orders;
  if (::sqlite3_open_v2(path.c_str(), &database, SQLITE_OPEN_READONLY, nullptr) != SQLITE_OK ||
      ::sqlite3_prepare_v2(database, "SELECT number, item FROM orders", -1, &rows, nullptr) !=
          SQLITE_OK) {
    const std::string error = ::sqlite3_errmsg(database);
    ::sqlite3_close(database);
    throw std::runtime_error("reading the database: " + error);
  }
  while (::sqlite3_step(rows) == SQLITE_ROW) {
    const auto* const item = reinterpret_cast<const char*>(::sqlite3_column_text(rows, 1));
    orders.emplace(::sqlite3_column_int64(rows, 0), item);
  }
  ::sqlite3_finalize(rows);
  ::sqlite3_close(database);
  return orders;
}

Settings parse(int argc, char** argv) {
  Settings settings;
  int i = 1;
  for (; i + 2 < argc; i += 2) {
    const std::string_view option = argv[i];
    const int value = std::clamp(std::stoi(argv[i + 1]), 1, 60);
    if (option == "--seconds") settings.seconds = value;
    if (option == "--clients") settings.clients = value;
  }
  if (i + 1 != argc)
    throw std::invalid_argument("usage: order_load [--seconds N] [--clients N] SERVICE");
  settings.service = argv[i];
  return settings;
}

int run(const Settings& settings) {
  const Workplace workplace;
  Service service(settings.service, workplace.database());
  const int port = service.port();

  std::atomic<bool> unhealthy{false};  // what the balancer knows
  std::atomic<bool> gone{false};       // the service has exited
  const int stubborn = std::max(1, settings.clients / 4);
  std::vector<Tally> tallies(static_cast<std::size_t>(settings.clients));
  std::vector<Tally> slow(3);
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    watch_health(port, gone);
    unhealthy = true;
  });
  for (int i = 0; i < settings.clients; ++i) {
    threads.emplace_back([&, i] {
      const auto& stop = i < stubborn ? gone : unhealthy;
      tallies[static_cast<std::size_t>(i)] =
          place_orders(port, "client " + std::to_string(i), stop);
    });
  }
  std::printf("load: %d clients place orders, %d of them whatever the balancer says\n",
              settings.clients, stubborn);
  std::fflush(stdout);

  std::this_thread::sleep_for(std::chrono::seconds(settings.seconds) - 100ms);
  for (Tally& tally : slow) threads.emplace_back([&] { tally = ask_slowly(port, 1500ms); });
  std::this_thread::sleep_for(100ms);
  std::printf("load: SIGTERM, with %zu slow requests under way\n", slow.size());
  std::fflush(stdout);
  const auto signalled = Clock::now();
  service.terminate();
  const int exit_code = service.wait_for_exit(20s);
  const auto elapsed =
      std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - signalled);
  gone = true;
  for (std::thread& thread : threads) thread.join();

  Orders acknowledged;
  std::size_t twice = 0;  // the same number for two orders
  int failed = 0;         // of the requests that had to be answered with a success
  int refused = 0;
  for (int i = 0; i < settings.clients; ++i) {
    Tally& tally = tallies[static_cast<std::size_t>(i)];
    acknowledged.merge(tally.acknowledged);
    twice += tally.acknowledged.size();
    (i < stubborn ? refused : failed) += tally.refused + tally.unanswered;
  }
  for (const Tally& tally : slow) failed += tally.refused + tally.unanswered;
  const Orders stored = read_database(workplace.database());

  // Counted on both sides: what a customer was promised and isn't there, and what is there untold.
  const auto missing_in = [](const Orders& from, const Orders& in) {
    return std::count_if(from.begin(), from.end(), [&](const auto& order) {
      const auto at = in.find(order.first);
      return at == in.end() || at->second != order.second;
    });
  };
  const auto lost = missing_in(acknowledged, stored) + static_cast<std::ptrdiff_t>(twice);
  const auto untold = missing_in(stored, acknowledged);

  std::printf("load: the stubborn clients were turned away %d times after the last order\n",
              refused);
  std::printf("load: %d requests of balanced clients, or slow ones, failed\n", failed);
  const bool passed =
      !acknowledged.empty() && lost == 0 && untold == 0 && failed == 0 && exit_code == 0;
  std::printf(
      "%s: %zu orders acknowledged, %zu in the database, %s; exit code %d; %lld ms from signal to "
      "exit\n",
      passed ? "PASSED" : "FAILED", acknowledged.size(), stored.size(),
      lost == 0 && untold == 0
          ? "none lost"
          : (std::to_string(lost) + " lost, " + std::to_string(untold) + " untold").c_str(),
      exit_code, static_cast<long long>(elapsed.count()));
  return passed ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "order_load: %s\n", error.what());
    return 1;
  }
}
