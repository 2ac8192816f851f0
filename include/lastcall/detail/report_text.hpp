// ShutdownReport::to_text(), and a straggler in words.
#pragma once

#include <lastcall/detail/summary.hpp>
#include <lastcall/detail/text.hpp>
#include <lastcall/shutdown_report.hpp>

#include <string>
#include <utility>

namespace lastcall::detail {

inline std::string describe_straggler(const Straggler& straggler) {
  std::string out;
  const auto separate = [&out] {
    if (!out.empty()) out += ", ";
  };
  if (straggler.where.line() != 0) {
    out += "entered at ";
    append_printable(out, short_path(straggler.where.file_name()));
    out += ':' + std::to_string(straggler.where.line());
  }
  if (straggler.age > Clock::duration::zero()) {
    out += out.empty() ? "in for " : " ";
    out += readable(straggler.age);
    if (straggler.where.line() != 0) out += " ago";
  }
  if (straggler.thread_id != 0) {
    separate();
    out += "thread " + std::to_string(straggler.thread_id);
    if (!straggler.thread_name.empty()) {
      out += " \"";
      append_printable(out, straggler.thread_name);
      out += '"';
    }
  }
  if (!straggler.waiting_in.empty()) {
    separate();
    append_printable(out, straggler.waiting_in);
  }
  for (std::size_t frame = 0; frame < straggler.stack.size(); ++frame) {
    out += "\n#" + std::to_string(frame) + ' ';
    append_printable(out, straggler.stack[frame]);
  }
  return out;
}

inline std::string describe_outcome(Outcome outcome, int exit_code) {
  return std::string(name_of(outcome)) + ", exit code " + std::to_string(exit_code);
}

inline std::string describe_failure(const Failure& failure) {
  return failure.error ? describe_exception(failure.error) : "a failure";
}

inline std::string report_text(const ShutdownReport& report) {
  Summary summary;
  summary.how = describe_outcome(report.outcome, report.exit_code);
  if (report.cause) summary.why = report.cause.message();
  summary.request = request_time(report.events);
  summary.elapsed = report.elapsed;
  for (const Straggler& straggler : report.stragglers) {
    summary.still_in.push_back(
        {straggler.stage.empty() ? straggler.name : straggler.stage + "/" + straggler.name,
         describe_straggler(straggler)});
  }
  for (const Failure& failure : report.failures) {
    std::string words;
    append_printable(words, describe_failure(failure));  // what() may have several lines: not here
    summary.failed.push_back({failure.task, std::move(words)});
  }
  std::string out;
  summary.append_to(out, report.events);
  return out;
}

}  // namespace lastcall::detail

namespace lastcall {

inline std::string ShutdownReport::to_text() const { return detail::report_text(*this); }

}  // namespace lastcall
