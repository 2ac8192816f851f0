// ShutdownReport::to_text(), and a straggler in words.
#pragma once

#include <lastcall/detail/bars.hpp>
#include <lastcall/detail/text.hpp>
#include <lastcall/shutdown_report.hpp>

#include <string>
#include <string_view>

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
  std::string out = "finished after " + readable(report.elapsed) + ": " +
                    describe_outcome(report.outcome, report.exit_code);
  if (report.cause) {
    out += " (";
    append_printable(out, report.cause.message());
    out += ')';
  }
  out += '\n';
  BarChart chart;
  chart.request = request_time(report.events);
  chart.end = moved_by(chart.request, report.elapsed);
  chart.append_to(out, report.events);
  if (!report.stragglers.empty()) out += "  still in:\n";
  for (const Straggler& straggler : report.stragglers) {
    out += "    ";
    append_printable(out, straggler.stage.empty() ? "" : straggler.stage + "/");
    append_printable(out, straggler.name);
    const std::string where = describe_straggler(straggler);
    if (!where.empty() && where.front() != '\n') out += ": ";
    for (const char letter : where) {
      out += letter;
      if (letter == '\n') out += "      ";  // a frame
    }
    out += '\n';
  }
  if (!report.failures.empty()) out += "  failed:\n";
  for (const Failure& failure : report.failures) {
    out += "    ";
    append_printable(out, failure.task);
    out += ": ";
    append_printable(out, describe_failure(failure));
    out += '\n';
  }
  return out;
}

}  // namespace lastcall::detail

namespace lastcall {

inline std::string ShutdownReport::to_text() const { return detail::report_text(*this); }

}  // namespace lastcall
