// A peer that is another program. It is started once, says `peer <name> <version>`, and answers each line
// `run <case> <seconds>` by `<case> <figure>` or `<case> unsupported`, until its input ends. The figure is
// in nanoseconds; of bytes_child in bytes, of deadlines_fire and deadlines_late in milliseconds.
#pragma once

#include "batch.hpp"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>

namespace bench {

class CoProcess {
 public:
  explicit CoProcess(const std::string& path) {
    int to[2];
    int from[2];
    // Others that are started later must not hold the writing end.
    if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0) return;
    pid_ = fork();
    if (pid_ == 0) {
      dup2(to[0], STDIN_FILENO);
      dup2(from[1], STDOUT_FILENO);
      execl(path.c_str(), path.c_str(), nullptr);
      _exit(127);
    }
    close(to[0]);
    close(from[1]);
    out_ = fdopen(to[1], "w");
    in_ = fdopen(from[0], "r");
    std::istringstream words(line());
    std::string greeting;
    words >> greeting >> name_;
    std::getline(words >> std::ws, version_);
    if (greeting != "peer") name_.clear();
  }
  CoProcess(const CoProcess&) = delete;
  CoProcess& operator=(const CoProcess&) = delete;
  ~CoProcess() {
    if (out_ != nullptr) std::fclose(out_);
    if (in_ != nullptr) std::fclose(in_);
    if (pid_ > 0) waitpid(pid_, nullptr, 0);
  }

  /// Empty: it could not be started, or is no peer.
  const std::string& name() const { return name_; }
  const std::string& version() const { return version_; }

  /// One batch of a case; negative: it has no such thing.
  double run(const std::string& name) {
    if (std::fprintf(out_, "run %s %.3f\n", name.c_str(), shortest_batch) < 0) return -1;
    std::fflush(out_);
    std::istringstream words(line());
    std::string echo;
    double figure = -1;
    if (!(words >> echo >> figure) || echo != name) return -1;
    return figure;
  }

 private:
  std::string line() {
    std::string read;
    for (int letter = std::fgetc(in_); letter != EOF && letter != '\n'; letter = std::fgetc(in_)) {
      read += static_cast<char>(letter);
    }
    return read;
  }

  pid_t pid_ = -1;
  std::FILE* out_ = nullptr;
  std::FILE* in_ = nullptr;
  std::string name_;
  std::string version_;
};

/// Registers all cases of a peer. The first batch of each is the warm-up, and is not counted.
inline void add_peer(const std::shared_ptr<CoProcess>& peer) {
  static const char* const cases[] = {
      "check/1",        "check/2",       "check8/1",    "check8/2",    "child/1",
      "child/2",        "callback/1",    "callback/2",  "cancel_wide", "cancel_deep",
      "destroy_wide",   "destroy_deep",  "bytes_child", "guard/1",     "guard/2",
      "last_out",       "signal",        "signal_two",  "deadline/1",  "deadline/2",
      "deadlines_fire", "deadlines_late"};
  for (const std::string name : cases) {
    const bool milliseconds = name.rfind("deadlines_", 0) == 0;
    add_timed_case(name + "@" + peer->name(),
                   [peer, name, milliseconds, warm = false, none = false]() mutable {
                     if (none) return -1.0;
                     if (!warm && !milliseconds) none = peer->run(name) < 0;
                     warm = true;
                     const double figure = none ? -1 : peer->run(name);
                     if (figure < 0) none = true;
                     return figure < 0 ? -1.0 : figure * (milliseconds ? 1e-3 : 1e-9);
                   });
  }
}

}  // namespace bench
