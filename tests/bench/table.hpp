// The table: medians of the batches, side by side, with the ratio and what it has to reach.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace bench {

struct Row {
  const char* what;
  const char* ours;
  const char* peer;  ///< null: no ratio
  double at_most;    ///< of the ratio; 0: nothing is asked of it
};

// Gathers the single batches instead of printing them.
class Gatherer final : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration) continue;
      batches_[run.run_name.function_name].push_back(run.GetAdjustedRealTime());
    }
  }
  /// Nanoseconds; negative if the case did not run.
  double median(const char* name) {
    std::vector<double>& batches = batches_[name];
    if (batches.empty()) return -1;
    std::sort(batches.begin(), batches.end());
    return batches[batches.size() / 2];
  }

 private:
  std::map<std::string, std::vector<double>> batches_;
};

inline std::string readable(double nanoseconds) {
  char text[32];
  if (nanoseconds < 0) return "-";
  if (nanoseconds < 1e3) {
    std::snprintf(text, sizeof text, "%.2f ns", nanoseconds);
  } else if (nanoseconds < 1e6) {
    std::snprintf(text, sizeof text, "%.2f us", nanoseconds / 1e3);
  } else {
    std::snprintf(text, sizeof text, "%.2f ms", nanoseconds / 1e6);
  }
  return text;
}

/// Runs every registered case 15 times, shuffled, and prints the rows. (Bytes are shown as ns.)
inline int run_and_print(int argc, char** argv, std::span<const Row> rows) {
  std::vector<std::string> given(argv, argv + argc);
  given.insert(given.begin() + 1,
               {"--benchmark_repetitions=15", "--benchmark_enable_random_interleaving=true"});
  std::vector<char*> arguments;
  for (std::string& argument : given) arguments.push_back(argument.data());
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  Gatherer gatherer;
  benchmark::RunSpecifiedBenchmarks(&gatherer);
  std::printf("%-42s %12s %12s %8s %8s\n", "", "lastcall", "beside", "ratio", "target");
  for (const Row& row : rows) {
    const double ours = gatherer.median(row.ours);
    if (ours < 0) continue;
    const double peer = row.peer == nullptr ? -1 : gatherer.median(row.peer);
    std::printf("%-42s %12s %12s", row.what, readable(ours).c_str(), readable(peer).c_str());
    if (peer > 0) std::printf(" %8.2f", ours / peer);
    if (peer > 0 && row.at_most > 0) {
      std::printf(" %8.2f  %s", row.at_most, ours / peer <= row.at_most ? "reached" : "MISSED");
    }
    std::printf("\n");
  }
  return 0;
}

}  // namespace bench
