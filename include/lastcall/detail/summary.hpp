// The summary of a shutdown, for people: what ShutdownReport::to_text() returns, and what
// stderr_observer prints at the end. The one makes it of a report, the other of the events it was told.
//
//   finished after 10.0 s: overrun, exit code 124 (SIGTERM from pid 812 (kubelet))
//     service           |##########                              |    412 ms  ok
//       close listener  |#                                       |    1.2 ms  ok
//     still in:
//       service/reader: entered at service/main.cpp:12 12.0 s ago, thread 813 "reader", read(7)
//         #0 read+0x4d (libc.so.6+0xf81ad)
//     failed:
//       flush: disk full
#pragma once

#include <lastcall/detail/bars.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/event.hpp>
#include <lastcall/detail/text.hpp>

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lastcall::detail {

struct Summary {
  struct Entry {
    std::string who;
    std::string words;  // of those still in: several lines, the first of which may be empty
  };

  std::string how;  // "overrun, exit code 124"
  std::string why;  // the cause; empty if there was none
  Clock::time_point request;
  Clock::duration elapsed{};  // since then
  std::vector<Entry> still_in;
  std::vector<Entry> failed;

  /// The bars are made of `events`. Everything is safe to print, whatever names and words hold.
  /// `columns`: of a whole line with the `prefix` that each gets; the bars fill them.
  void append_to(std::string& out, std::span<const Event> events, std::size_t columns = 80,
                 std::string_view prefix = {}, Palette palette = {}) const {
    out += prefix;
    out += palette.strong();
    out += "finished after " + readable(elapsed);
    if (!how.empty()) {
      out += ": ";
      append_printable(out, how);
    }
    out += palette.plain();
    if (!why.empty()) {
      out += " (";
      append_printable(out, why);
      out += ')';
    }
    out += '\n';
    BarChart chart;
    chart.request = request;
    chart.end = moved_by(request, elapsed);
    chart.columns = columns;
    const std::string indented = std::string(prefix) + "  ";
    chart.prefix = indented;
    chart.palette = palette;
    chart.append_to(out, events);
    append_entries(out, indented, "still in:\n", still_in);
    append_entries(out, indented, "failed:\n", failed);
  }

 private:
  static void append_entries(std::string& out, std::string_view prefix, std::string_view title,
                             const std::vector<Entry>& entries) {
    if (entries.empty()) return;
    out.append(prefix).append(title);
    for (const Entry& entry : entries) {
      out.append(prefix).append("  ");
      append_printable(out, entry.who);
      std::string_view rest = entry.words;
      const std::string_view first = rest.substr(0, rest.find('\n'));
      if (!first.empty()) out += ": ";
      append_printable(out, first);
      out += '\n';
      for (std::size_t at = rest.find('\n'); at != std::string_view::npos; at = rest.find('\n')) {
        rest.remove_prefix(at + 1);
        out.append(prefix).append("    ");  // a frame
        append_printable(out, rest.substr(0, rest.find('\n')));
        out += '\n';
      }
    }
  }
};

}  // namespace lastcall::detail
