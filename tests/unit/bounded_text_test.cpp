// detail/bounded_text.hpp: text in memory that the caller has.
#include <lastcall/detail/bounded_text.hpp>

#include "support/catch.hpp"

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

using lastcall::detail::BoundedText;

namespace {

template <class Fill>
std::string filled(Fill fill, std::size_t size = 64) {
  char buffer[65];
  for (char& letter : buffer) letter = '~';
  BoundedText text(buffer, size);
  fill(text);
  CHECK(buffer[size] == '~');
  CHECK(text.length() == text.view().size());
  return std::string(text.view());
}

}  // namespace

TEST_CASE("Numbers of both signs, to the ends of their type") {
  const auto number = [](std::int64_t value) {
    return filled([value](BoundedText& text) { text.add_number(value); });
  };
  CHECK(number(0) == "0");
  CHECK(number(7) == "7");
  CHECK(number(-1) == "-1");
  CHECK(number(-1200) == "-1200");
  CHECK(number(std::numeric_limits<std::int64_t>::max()) == "9223372036854775807");
  CHECK(number(std::numeric_limits<std::int64_t>::min()) == "-9223372036854775808");
}

TEST_CASE("Digits of any base, with zeros in front, never more than there is room for") {
  const auto digits = [](std::uint64_t value, unsigned base, std::size_t width) {
    return filled([=](BoundedText& text) { text.add_digits(value, base, width); });
  };
  CHECK(digits(5, 10, 2) == "05");
  CHECK(digits(255, 16, 1) == "ff");
  CHECK(digits(0, 10, 3) == "000");
  CHECK(digits(12345, 10, 3) == "12345");
  CHECK(digits(7, 10, 24) == std::string(23, '0') + "7");
  CHECK(digits(7, 10, 1000) == std::string(23, '0') + "7");
  CHECK(filled([](BoundedText& text) { text.add_hex(0xdeadbeef); }) == "0xdeadbeef");
  CHECK(filled([](BoundedText& text) { text.add_hex(~std::uint64_t{0}); }) == "0xffffffffffffffff");
}

TEST_CASE("What doesn't fit is dropped, and nothing is written behind the end") {
  const auto fill = [](BoundedText& text) { text.add("abc").add('d').add("efg").add_number(-12); };
  CHECK(filled(fill) == "abcdefg-12");
  CHECK(filled(fill, 9) == "abcdefg-1");
  CHECK(filled(fill, 4) == "abcd");
  CHECK(filled(fill, 1) == "a");
  CHECK(filled(fill, 0).empty());
}
