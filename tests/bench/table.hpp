// The table: medians of the batches, side by side, with what was asked and whether it was reached; and all
// batches as JSON.
#pragma once

#include "batch.hpp"

#include <cstdio>
#include <fstream>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace bench {

// What a row's figure of lastcall is asked to be: at most `factor` times the sum of some others, or at most
// a fixed figure.
struct Target {
  double factor = 0;                     // 0: nothing is asked
  std::vector<const char*> beside = {};  // "case@contender"; none: `factor` is the figure itself
  bool ahead_of_all = false;             // and less than every other program's
};

enum class Unit { nanoseconds, milliseconds, bytes };

struct Row {
  const char* what;
  const char* name;  // of the case
  Unit unit;
  Target target;
};

// Gathers the single batches instead of printing them.
class Figures final : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration || run.error_occurred) continue;
      batches_[run.run_name.function_name].push_back(run.GetAdjustedRealTime());
      std::fprintf(stderr, "\r%zu batches", ++count_);
    }
  }
  void Finalize() override { std::fprintf(stderr, "\r%20s\r", ""); }

  /// Nanoseconds (or 1e-9 of whatever else); negative if the case did not run.
  double of(const std::string& name) const {
    const auto found = batches_.find(name);
    return found == batches_.end() ? -1 : median(found->second);
  }
  const std::map<std::string, std::vector<double>>& batches() const { return batches_; }

 private:
  std::map<std::string, std::vector<double>> batches_;
  std::size_t count_ = 0;
};

inline std::string readable(double figure, Unit unit) {
  if (figure < 0) return "-";
  char text[32];
  const char* format = "%.0f ns";
  double shown = figure;
  if (unit == Unit::bytes) {
    format = "%.1f B";
  } else if (unit == Unit::milliseconds) {
    shown = figure / 1e6;
    format = shown < 10 ? "%.2f ms" : "%.0f ms";
  } else if (figure < 10) {
    format = "%.2f ns";
  } else if (figure < 1000) {
    format = "%.1f ns";
  } else {
    shown = figure / 1e3;
    format = "%.2f us";
  }
  std::snprintf(text, sizeof text, format, shown);
  return text;
}

class Table {
 public:
  Table(const Figures& figures, std::vector<std::string> contenders)
      : figures_(figures), contenders_(std::move(contenders)) {}

  void print(std::span<const Row> rows) {
    std::printf("%-40s", "");
    for (const std::string& contender : contenders_) std::printf(" %10s", contender.c_str());
    std::printf("   %-34s %6s\n", "asked", "ratio");
    for (const Row& row : rows) print(row);
  }

  int reached() const { return reached_; }
  int missed() const { return missed_; }

  /// Every batch, in nanoseconds (bytes, for bytes_child), and the rows.
  void write_json(const std::string& path, std::span<const Row> rows,
                  const std::map<std::string, std::string>& about) const {
    std::ofstream out(path);
    out << "{\n  \"about\": {";
    const char* comma = "";
    for (const auto& [key, value] : about) {
      out << comma << "\n    \"" << key << "\": \"" << value << "\"";
      comma = ",";
    }
    out << "\n  },\n  \"rows\": [";
    comma = "";
    for (const Row& row : rows) {
      const Judgement judged = judge(row);
      out << comma << "\n    {\"what\": \"" << row.what << "\", \"case\": \"" << row.name << "\"";
      for (const std::string& contender : contenders_) {
        const double figure = figures_.of(std::string(row.name) + "@" + contender);
        if (figure >= 0) out << ", \"" << contender << "\": " << figure;
      }
      if (judged.ratio >= 0) {
        out << ", \"ratio\": " << judged.ratio << ", \"at_most\": " << row.target.factor
            << ", \"reached\": " << (judged.reached ? "true" : "false");
      }
      out << "}";
      comma = ",";
    }
    out << "\n  ],\n  \"batches\": {";
    comma = "";
    for (const auto& [name, batches] : figures_.batches()) {
      out << comma << "\n    \"" << name << "\": [";
      const char* between = "";
      for (const double batch : batches) {
        out << between << batch;
        between = ", ";
      }
      out << "]";
      comma = ",";
    }
    out << "\n  }\n}\n";
  }

 private:
  struct Judgement {
    double ratio = -1;  // to what it stands beside; negative: can't be told
    bool reached = false;
    std::string asked;
  };

  Judgement judge(const Row& row) const {
    Judgement judged;
    const Target& target = row.target;
    const double ours = figures_.of(std::string(row.name) + "@lastcall");
    if (target.factor <= 0) return judged;
    double beside = target.beside.empty() ? 1 : 0;
    char factor[32];
    std::snprintf(factor, sizeof factor, "<= %.4g", target.factor);
    judged.asked = factor;
    for (const char* other : target.beside) {
      const double figure = figures_.of(other);
      judged.asked += (other == target.beside.front() ? " x " : " + ") + std::string(other);
      beside = figure < 0 || beside < 0 ? -1 : beside + figure;
    }
    if (target.ahead_of_all) judged.asked += ", first";
    if (target.beside.empty()) judged.asked = "<= " + readable(target.factor, row.unit);
    if (ours < 0 || beside <= 0) return judged;
    judged.ratio = target.beside.empty() ? ours / target.factor : ours / beside;
    judged.reached = judged.ratio <= (target.beside.empty() ? 1 : target.factor);
    for (const std::string& contender : contenders_) {
      const double theirs = figures_.of(std::string(row.name) + "@" + contender);
      const bool rival = contender != "lastcall" && contender != "bare";
      if (target.ahead_of_all && rival && theirs >= 0 && theirs < ours) judged.reached = false;
    }
    return judged;
  }

  void print(const Row& row) {
    std::printf("%-40s", row.what);
    for (const std::string& contender : contenders_) {
      const double figure = figures_.of(std::string(row.name) + "@" + contender);
      std::printf(" %10s", readable(figure, row.unit).c_str());
    }
    const Judgement judged = judge(row);
    if (!judged.asked.empty()) {
      std::printf("   %-34s", judged.asked.c_str());
      if (judged.ratio < 0) {
        std::printf(" %6s  can't be told", "");
      } else {
        std::printf(" %6.2f  %s", judged.ratio, judged.reached ? "reached" : "MISSED");
        ++(judged.reached ? reached_ : missed_);
      }
    }
    std::printf("\n");
  }

  const Figures& figures_;
  std::vector<std::string> contenders_;
  int reached_ = 0;
  int missed_ = 0;
};

}  // namespace bench
