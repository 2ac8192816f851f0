// What a terminal shows of the bytes it got: as far as stderr_observer, and who prints beside it, go.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

namespace support {

/// The lines on an endless screen that is `columns` wide, without blanks at their ends. Knows letters,
/// \r, \n (which begins a line, as the terminal's driver makes it), erasing to the end of the line, moving
/// to the right, and colours, which it leaves out. Like every terminal since the VT100 it goes on to the
/// next line not with the letter that fills the last column, but with the one after it.
inline std::vector<std::string> drawn(std::string_view bytes, std::size_t columns) {
  std::vector<std::string> lines(1);
  std::size_t column = 0;
  bool full = false;  // the last column has its letter
  const auto begin_line = [&] {
    lines.emplace_back();
    column = 0;
    full = false;
  };
  const auto escape = [&](std::string_view rest) -> std::size_t {
    std::size_t at = 2;
    while (at < rest.size() && rest[at] < '@') ++at;
    const auto count = static_cast<std::size_t>(std::atoi(std::string(rest.substr(2)).c_str()));
    if (at < rest.size() && rest[at] == 'K' && column < lines.back().size()) {
      lines.back().resize(column);
    }
    if (at < rest.size() && rest[at] == 'C') {
      column = column + count < columns ? column + count : columns - 1;
    }
    return at;
  };
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    const char letter = bytes[at];
    if (letter == '\r') {
      column = 0;
      full = false;
    } else if (letter == '\n') {
      begin_line();
    } else if (letter == '\x1b' && bytes.substr(at + 1, 1) == "[") {
      at += escape(bytes.substr(at));
    } else {
      if (full) begin_line();
      std::string& line = lines.back();
      if (line.size() <= column) line.resize(column + 1, ' ');
      line[column] = letter;
      if (column + 1 == columns) {
        full = true;
      } else {
        ++column;
      }
    }
  }
  for (std::string& line : lines) line.resize(line.find_last_not_of(' ') + 1);
  if (lines.back().empty()) lines.pop_back();
  return lines;
}

}  // namespace support
