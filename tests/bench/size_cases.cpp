// What a child weighs in memory, and what a header weighs in a compilation.
#include "batch.hpp"
#include "cases.hpp"
#include "std_child.hpp"

#include <lastcall/cancellation.hpp>

#include <fcntl.h>
#include <malloc.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>

namespace bench {
namespace {

constexpr std::size_t many = 1'000'000;

double resident_bytes() {
  double pages = 0;
  double resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

template <class Make>
double bytes_each(Make make) {
  // Once for nothing: pages of code, and what a heap begins with, are no child's.
  static_cast<void>(make(1000));
  const double before = resident_bytes();
  const auto kept = make(many);
  benchmark::DoNotOptimize(kept);
  return (resident_bytes() - before) / many;
}

// In a process of its own: in this one, what others have freed would be used again and not counted.
double bytes_in_new_process(const std::string& contender) {
  const std::string command =
      "exec /proc/" + std::to_string(getpid()) + "/exe --bytes-of-child=" + contender;
  std::FILE* const answer = popen(command.c_str(), "r");
  if (answer == nullptr) return -1;
  double figure = -1;
  if (std::fscanf(answer, "%lf", &figure) != 1) figure = -1;
  pclose(answer);
  return figure;
}

// Processor time of one compilation; user and system, so that a busy machine doesn't count.
double compile_seconds(const std::string& source) {
  const pid_t compiler = fork();
  if (compiler == 0) {
    const std::string include = std::string("-I") + LASTCALL_INCLUDE;
    execlp(LASTCALL_CXX, LASTCALL_CXX, "-std=c++20", "-fsyntax-only", include.c_str(), "-x", "c++",
           source.c_str(), nullptr);
    _exit(127);
  }
  int status = 0;
  rusage used{};
  if (compiler < 0 || wait4(compiler, &status, 0, &used) < 0 || status != 0) return -1;
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

void add_compilation(const std::string& name, const std::string& contender,
                     const std::string& text) {
  // A file that the table's program leaves behind in the directory that it runs in would be in the way.
  static char directory[] = "/tmp/lastcall_bench_XXXXXX";
  static const bool made = [] {
    if (mkdtemp(directory) == nullptr) return false;
    std::atexit([] {
      const std::string remove = std::string("rm -r ") + directory;
      if (std::system(remove.c_str()) != 0) std::perror("removing the sources of compile times");
    });
    return true;
  }();
  if (!made) return;
  const std::string source = directory + ("/" + name + "_" + contender + ".cpp");
  std::ofstream(source) << text;
  add_timed_case(name + "@" + contender, [source] { return compile_seconds(source); });
}

}  // namespace

double bytes_of_child(const std::string& contender) {
  if (contender == "lastcall") {
    const lastcall::CancellationSource root;
    return bytes_each([token = root.token()](std::size_t count) {
      std::vector<lastcall::CancellationSource> children;
      children.reserve(count);
      for (std::size_t i = 0; i < count; ++i) children.emplace_back(token);
      return children;
    });
  }
  if (contender == "std") {
    const std::stop_source root;
    return bytes_each([&root](std::size_t count) {
      auto children = std::make_unique<std::optional<StdChild>[]>(count);
      for (std::size_t i = 0; i < count; ++i) children[i].emplace(root.get_token());
      return children;
    });
  }
  return -1;
}

void add_size_cases() {
  for (const std::string contender : {"lastcall", "std"}) {
    add_timed_case("bytes_child@" + contender,
                   [contender] { return 1e-9 * bytes_in_new_process(contender); });
  }
  add_compilation("compile", "std", "#include <stop_token>\n#include <thread>\n");
  for (const std::string header : {"lastcall", "cancellation", "wait_group"}) {
    add_compilation("compile_" + header, "lastcall", "#include <lastcall/" + header + ".hpp>\n");
  }
}

}  // namespace bench
