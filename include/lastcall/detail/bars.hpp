// The summary's picture: a bar for every stage, and under it one for every hook.
//
//   service           |##########                              |    412 ms  ok
//     close listener  |#                                       |    1.2 ms  ok
//   storage           |          !!!!!!!!!!!!!!!!!!!!!!!!!!!!!!|    24.6 s  overran
//
// Plain ASCII, because it is read in whatever a log ends up in.
#pragma once

#include <lastcall/detail/event.hpp>
#include <lastcall/detail/text.hpp>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lastcall::detail {

/// ANSI colours, or nothing.
struct Palette {
  bool on = false;
  std::string_view good() const noexcept { return on ? "\x1b[32m" : ""; }
  std::string_view bad() const noexcept { return on ? "\x1b[31m" : ""; }
  std::string_view late() const noexcept { return on ? "\x1b[33m" : ""; }
  std::string_view strong() const noexcept { return on ? "\x1b[1m" : ""; }
  std::string_view faint() const noexcept { return on ? "\x1b[2m" : ""; }
  std::string_view plain() const noexcept { return on ? "\x1b[0m" : ""; }
  std::string_view of(EventResult result) const noexcept {
    switch (result) {
      case EventResult::ok: return good();
      case EventResult::failed: return bad();
      case EventResult::overran: return late();
      case EventResult::skipped: return faint();
      case EventResult::begun: break;
    }
    return "";
  }
};

struct Bar {
  const Event* event;     // the one that ended it, or the one that began it
  Clock::time_point end;  // of what has only begun: the end of the picture
};

/// Stages and hooks from `request` on, each once: an event that ends something takes the place of the
/// one that began it. Stages in the order they appear in, each followed by its hooks.
inline std::vector<Bar> bars_of(std::span<const Event> events, Clock::time_point request,
                                Clock::time_point end) {
  std::vector<Bar> bars;
  std::vector<std::size_t> open;  // indices of bars that have only begun
  for (const Event& event : events) {
    if (event.kind != EventKind::stage && event.kind != EventKind::hook) continue;
    if (event.end < request) continue;
    if (event.result == EventResult::begun) {
      open.push_back(bars.size());
      bars.push_back({&event, end});
      continue;
    }
    // Newest first: what ends has nearly always begun last.
    const auto begun = std::find_if(open.rbegin(), open.rend(), [&](std::size_t index) {
      const Event& other = *bars[index].event;
      return other.kind == event.kind && other.name == event.name &&
             stage_of(other) == stage_of(event);
    });
    if (begun == open.rend()) {
      bars.push_back({&event, event.end});
    } else {
      bars[*begun] = {&event, event.end};
      open.erase(std::next(begun).base());
    }
  }
  std::vector<std::string_view> order;
  for (const Bar& bar : bars) {
    const std::string_view stage = stage_of(*bar.event);
    if (std::find(order.begin(), order.end(), stage) == order.end()) order.push_back(stage);
  }
  // Not std::stable_sort, whose buffer is deprecated: clang warns of libstdc++ 12's.
  std::vector<Bar> sorted;
  sorted.reserve(bars.size());
  for (const std::string_view stage : order) {
    for (const bool whole_stage : {true, false}) {
      std::copy_if(bars.begin(), bars.end(), std::back_inserter(sorted), [&](const Bar& bar) {
        return stage_of(*bar.event) == stage &&
               (bar.event->kind == EventKind::stage) == whole_stage;
      });
    }
  }
  return sorted;
}

struct BarChart {
  Clock::time_point request;
  Clock::time_point end;
  std::size_t columns = 80;        // of the whole line, the prefix included
  std::string_view prefix = "  ";  // of every line
  Palette palette;

  static constexpr std::size_t most_rows = 200;

  /// Appends one line a bar. Nothing if there are neither stages nor hooks.
  void append_to(std::string& out, std::span<const Event> events) const {
    const std::vector<Bar> bars = bars_of(events, request, end);
    std::size_t names = 0;
    for (const Bar& bar : bars) names = std::max(names, columns_of(label(bar)));
    names = std::min<std::size_t>(names, 32);
    // What isn't bar: "  |", "|", ten for the time and ten for " overran".
    const std::size_t others = columns_of(prefix) + names + 24;
    const std::size_t width = std::max<std::size_t>(columns > others ? columns - others : 0, 10);
    std::size_t rows = 0;
    for (const Bar& bar : bars) {
      if (++rows > most_rows) break;
      append_row(out, bar, names, width);
    }
    if (bars.size() > most_rows) {
      out += prefix;
      out += "(and " + std::to_string(bars.size() - most_rows) + " more)\n";
    }
  }

 private:
  static std::string label(const Bar& bar) {
    const bool inside = bar.event->kind == EventKind::hook && !bar.event->stage.empty();
    std::string out = inside ? "  " : "";
    append_printable(out, bar.event->name);
    return out;
  }

  std::size_t cell(Clock::time_point at, std::size_t width) const noexcept {
    if (at <= request || end <= request) return 0;
    if (at >= end) return width;
    return static_cast<std::size_t>(static_cast<double>(span_between(request, at).count()) /
                                    static_cast<double>(span_between(request, end).count()) *
                                    static_cast<double>(width));
  }

  void append_row(std::string& out, const Bar& bar, std::size_t names, std::size_t width) const {
    const Event& event = *bar.event;
    std::string name = label(bar);
    cut_to_columns(name, names);
    out += prefix;
    append_padded(out, name, names);
    out += "  |";
    const std::string_view colour =
        event.result == EventResult::begun ? palette.late() : palette.of(event.result);
    if (event.result == EventResult::skipped) {
      out.append(width, ' ');
    } else {
      const std::size_t from = std::min(cell(event.begin, width), width - 1);
      const std::size_t to = std::clamp(cell(bar.end, width), from + 1, width);
      out.append(from, ' ');
      out += colour;
      out.append(to - from, mark(event.result));
      out += palette.plain();
      out.append(width - to, ' ');
    }
    out += '|';
    append_right(
        out,
        event.result == EventResult::skipped ? "" : readable(span_between(event.begin, bar.end)),
        10);
    out += "  ";
    out += colour;
    out += event.result == EventResult::begun ? "still in" : name_of(event.result);
    out += palette.plain();
    if (!headline_of(event).empty()) {
      out += ": ";
      append_printable(out, headline_of(event));
    }
    out += '\n';
  }

  static char mark(EventResult result) noexcept {
    if (result == EventResult::ok) return '#';
    return result == EventResult::failed ? 'x' : '!';
  }
};

}  // namespace lastcall::detail
