// The observer for people: one readable line an event, a live countdown on a terminal, a picture at
// the end.
#pragma once

#include <lastcall/detail/config.hpp>
#include <lastcall/detail/event.hpp>
#include <lastcall/detail/line_writer.hpp>
#include <lastcall/detail/summary.hpp>
#include <lastcall/detail/text.hpp>
#include <lastcall/observer.hpp>

#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lastcall::detail {

inline constexpr std::string_view line_prefix = "lastcall: ";

/// One event in words, on one line, without its time: "hook service/flush failed after 3.1 ms: disk
/// full".
inline std::string describe_event(const Event& event, Palette palette = {}) {
  const bool is_phase = event.kind == EventKind::phase;
  std::string out;
  if (is_phase) {
    out += palette.strong();
    out += palette.of(event.result);
  } else {
    out += name_of(event.kind);
    out += ' ';
  }
  if (event.kind != EventKind::stage && !event.stage.empty()) {
    append_printable(out, event.stage);
    out += '/';
  }
  append_printable(out, event.name);
  if (is_phase) out += palette.plain();
  // A phase is simply there. Of a signal or a task "begun" is no news, of a signal "ok" neither.
  const bool passive = event.kind == EventKind::signal || event.kind == EventKind::task;
  const bool silent = is_phase || (passive && event.result == EventResult::begun) ||
                      (event.kind == EventKind::signal && event.result == EventResult::ok);
  if (!silent) {
    out += ' ';
    out += palette.of(event.result);
    out += name_of(event.result);
    out += palette.plain();
  }
  if (!is_phase && event.end > event.begin) {
    out += " after ";
    out += readable(span_between(event.begin, event.end));
  }
  if (!headline_of(event).empty()) {
    out += ": ";
    append_printable(out, headline_of(event));
  }
  return out;
}

class StderrObserver final : public Observer {
 public:
  explicit StderrObserver(int fd) : writer_(fd, lost_notice) {
    if (::isatty(fd) != 1) return;
    const char* const kind = std::getenv("TERM");
    terminal_ = kind != nullptr && *kind != '\0' && std::string_view(kind) != "dumb";
    const char* const no_colour = std::getenv("NO_COLOR");  // see no-color.org
    palette_.on = terminal_ && (no_colour == nullptr || *no_colour == '\0');
  }

  void on_request(Clock::time_point when) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (request_) forget_story();  // of a coordinator that didn't come to its end
    request_ = when;
  }

  void on_time_limit(Clock::duration most) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    writer_.share_time_limit(most);
  }

  void on_event(const Event& event) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!request_ && event.kind == EventKind::phase) request_ = event.begin;
    std::string out = clear_line();
    if (event.kind == EventKind::phase && event.name == "finished") {
      append_summary(out, event);
      forget_story();  // there may be another coordinator
    } else {
      append_event(out, event);
      if (request_) keep_for_summary(event);
    }
    writer_.write(out);
  }

  bool wants_status() const noexcept override { return terminal_; }

  void on_status(const LiveStatus& status) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    // A shell's background job would write all over the line that its user is typing.
    const pid_t foreground = terminal_ ? ::tcgetpgrp(writer_.fd()) : 0;  // -1: no terminal of ours
    if (!terminal_ || (foreground > 0 && foreground != ::getpgrp())) return;
    const std::size_t width = std::min<std::size_t>(terminal_columns(), 160);
    if (width < 24) return;  // there is no room for more than the time
    std::string line(line_prefix);
    append_time(line, status.since_request);
    line += "  ";
    if (!status.stage.empty()) {
      append_printable(line, status.stage);
      line += ": ";
    }
    line += std::to_string(status.in_flight) + " in flight, ";
    // Whole seconds: it is a countdown. Rounded up, so that 0 means over.
    const auto left = std::chrono::ceil<std::chrono::seconds>(status.until_end).count();
    line += std::to_string(std::max<decltype(left)>(left, 0)) + " s left";
    const char* separator = ": ";
    for (const std::string& name : status.names) {
      line += std::exchange(separator, ", ");
      append_printable(line, name);
      if (line.size() > 4 * width) break;  // nobody will see more of them
    }
    if (status.in_flight > status.names.size() && !status.names.empty()) line += ", ...";
    cut_to_columns(line, width - 1);
    // A blank in the last column, whichever that is: a terminal goes on to the next line only with the
    // letter after it. So what somebody else prints now has a line of its own, and ours comes back to
    // its beginning with a \r.
    writer_.draw("\r\x1b[K" + line + "\x1b[999C ");
    drawn_ = true;
  }

 private:
  static std::string lost_notice(std::size_t lost) {
    return std::string(line_prefix) + "(" + std::to_string(lost) +
           (lost == 1 ? " line" : " lines") + " lost: nobody was reading)\n";
  }

  void forget_story() {
    summary_ = {};
    story_.clear();
    request_.reset();
  }

  std::string clear_line() {
    return std::exchange(drawn_, false) ? std::string("\r\x1b[K") : std::string();
  }

  std::size_t terminal_columns() const noexcept {
    winsize size{};
    if (!terminal_ || ::ioctl(writer_.fd(), TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
    return size.ws_col;
  }

  static void append_time(std::string& out, Clock::duration since) {
    std::string seconds;
    append_decimal(seconds, nanoseconds_of(since), 1'000'000'000, 3);
    append_right(out, seconds, 7);
    out += " s";
  }

  void append_event(std::string& out, const Event& event) const {
    std::string line(line_prefix);
    line += palette_.faint();
    if (request_) {
      append_time(line, span_between(*request_, event.end));
    } else {
      line.append(9, ' ');
    }
    line += palette_.plain();
    line += "  ";
    line += describe_event(event, palette_);
    finish_line(out, std::move(line));
    if (is_straggler(event)) return;  // its stack is in the summary, which comes in a moment
    std::string_view rest = event.detail;
    for (std::size_t at = rest.find('\n'); at != std::string_view::npos; at = rest.find('\n')) {
      rest.remove_prefix(at + 1);
      std::string more(line_prefix);
      more.append(13, ' ');
      append_printable(more, rest.substr(0, rest.find('\n')));
      finish_line(out, std::move(more));
    }
  }

  // A line longer than this could be torn by another writer on the same pipe.
  void finish_line(std::string& out, std::string line) const {
    if (line.size() >= atomic_write) {
      line.resize(atomic_write - 16);
      // Not within a colour.
      const std::size_t escape = line.rfind('\x1b');
      if (escape != std::string::npos && line.find('m', escape) == std::string::npos) {
        line.resize(escape);
      }
      while (!line.empty() && !decode_tail_is_whole(line)) line.pop_back();
      line += "...";
      line += palette_.plain();
    }
    out += line;
    out += '\n';
  }
  static bool decode_tail_is_whole(std::string_view line) noexcept {
    std::size_t start = line.size() - 1;
    while (start > 0 && (static_cast<unsigned char>(line[start]) & 0xC0U) == 0x80U) --start;
    const CodePoint last = decode_utf8(line.substr(start));
    return last.valid && start + last.length == line.size();
  }

  // Who was still in when time was up, hooks too. (A hook's own event says when it was abandoned.)
  static bool is_straggler(const Event& event) noexcept {
    return event.kind == EventKind::task && event.result == EventResult::overran;
  }

  void keep_for_summary(const Event& event) {
    if (event.kind == EventKind::stage || event.kind == EventKind::hook) {
      story_.push_back(event);
      story_.back().detail.resize(headline_of(event).size());
    }
    if (event.kind == EventKind::phase && event.name == "announced") summary_.why = event.detail;
    const bool is_call = event.kind == EventKind::task || event.kind == EventKind::hook;
    // A failure of no stage is a reload's: written down, but no reason to have failed.
    if (is_call && event.result == EventResult::failed && !event.stage.empty()) {
      std::string words;
      append_printable(words, event.detail);
      summary_.failed.push_back({event.name, std::move(words)});
    }
    if (is_straggler(event)) {
      summary_.still_in.push_back(
          {event.stage.empty() ? event.name : event.stage + "/" + event.name, event.detail});
    }
  }

  void append_summary(std::string& out, const Event& finished) {
    summary_.how = finished.detail;
    summary_.request = *request_;
    summary_.elapsed = span_between(*request_, finished.end);
    std::string text;
    // In a log: to_text(), line by line.
    const std::size_t width =
        terminal_ ? std::clamp<std::size_t>(terminal_columns(), 40, 160) : 80 + line_prefix.size();
    summary_.append_to(text, story_, width, line_prefix, palette_);
    for (std::string_view rest = text; !rest.empty();) {
      const std::size_t size = rest.find('\n');
      finish_line(out, std::string(rest.substr(0, size)));
      rest.remove_prefix(size + 1);
    }
  }

  mutable std::mutex mutex_;
  LineWriter writer_;
  bool terminal_ = false;
  Palette palette_;
  bool drawn_ = false;  // a live line is on the screen
  std::optional<Clock::time_point> request_;
  std::vector<Event> story_;  // stages and hooks since the request
  Summary summary_;           // so far
};

}  // namespace lastcall::detail

namespace lastcall {

inline std::shared_ptr<Observer> stderr_observer() {
  return std::make_shared<detail::StderrObserver>(STDERR_FILENO);
}

}  // namespace lastcall
