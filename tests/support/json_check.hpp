// A strict reader of JSON for tests: what RFC 8259 doesn't allow, invalid UTF-8 included, is refused. It
// shares no code with the library, so that it can't share its mistakes.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace support {

struct Json {
  enum class Type { null, boolean, number, string, array, object };
  Type type = Type::null;
  std::string text;                // of a string: unescaped; of a number or a literal: as it stands
  std::vector<Json> items;         // of an array; of an object: the members' values
  std::vector<std::string> names;  // of an object: the members' names

  bool is(Type wanted) const { return type == wanted; }
  /// The member of that name, or a null.
  const Json& operator[](std::string_view key) const {
    static const Json nothing;
    for (std::size_t at = 0; at < names.size(); ++at) {
      if (names[at] == key) return items[at];
    }
    return nothing;
  }
  const Json& operator[](const char* key) const { return (*this)[std::string_view(key)]; }
  long long integer() const { return std::atoll(text.c_str()); }
  /// Of a number with at most three decimals: thousandths.
  long long thousandths() const {
    const std::size_t point = text.find('.');
    std::string digits = text.substr(0, point);
    std::string rest = point == std::string::npos ? "" : text.substr(point + 1);
    rest.resize(3, '0');
    return std::atoll((digits + rest).c_str());
  }
  std::string keys() const {
    std::string all;
    for (const std::string& name : names) all += (all.empty() ? "" : " ") + name;
    return all;
  }
};

class JsonReader {
 public:
  /// Empty if `text` is anything but one valid JSON value.
  static std::optional<Json> read(std::string_view text) {
    JsonReader reader(text);
    Json value;
    if (!reader.value(value, 0)) return std::nullopt;
    reader.blanks();
    if (!reader.rest_.empty()) return std::nullopt;
    return value;
  }

 private:
  explicit JsonReader(std::string_view text) : rest_(text) {}

  void blanks() {
    while (!rest_.empty() && std::string_view(" \t\r\n").find(rest_[0]) != std::string_view::npos) {
      rest_.remove_prefix(1);
    }
  }
  bool take(std::string_view wanted) {
    if (rest_.substr(0, wanted.size()) != wanted) return false;
    rest_.remove_prefix(wanted.size());
    return true;
  }

  bool value(Json& out, int depth) {
    if (depth > 50) return false;
    blanks();
    if (rest_.empty()) return false;
    switch (rest_[0]) {
      case '{': return object(out, depth);
      case '[': return array(out, depth);
      case '"': out.type = Json::Type::string; return string(out.text);
      case 't': out = {Json::Type::boolean, "true", {}, {}}; return take("true");
      case 'f': out = {Json::Type::boolean, "false", {}, {}}; return take("false");
      case 'n': out = {Json::Type::null, "null", {}, {}}; return take("null");
      default: out.type = Json::Type::number; return number(out.text);
    }
  }

  bool object(Json& out, int depth) {
    out.type = Json::Type::object;
    take("{");
    blanks();
    if (take("}")) return true;
    for (;;) {
      blanks();
      if (rest_.empty() || rest_[0] != '"' || !string(out.names.emplace_back())) return false;
      blanks();
      if (!take(":") || !value(out.items.emplace_back(), depth + 1)) return false;
      blanks();
      if (take("}")) return true;
      if (!take(",")) return false;
    }
  }

  bool array(Json& out, int depth) {
    out.type = Json::Type::array;
    take("[");
    blanks();
    if (take("]")) return true;
    for (;;) {
      if (!value(out.items.emplace_back(), depth + 1)) return false;
      blanks();
      if (take("]")) return true;
      if (!take(",")) return false;
    }
  }

  bool digits(std::string& out) {
    const std::size_t before = out.size();
    while (!rest_.empty() && rest_[0] >= '0' && rest_[0] <= '9') {
      out += rest_[0];
      rest_.remove_prefix(1);
    }
    return out.size() > before;
  }

  bool number(std::string& out) {
    if (take("-")) out += '-';
    if (take("0")) {
      out += '0';
    } else if (!digits(out)) {
      return false;
    }
    if (take(".")) {
      out += '.';
      if (!digits(out)) return false;
    }
    if (take("e") || take("E")) {
      out += 'e';
      if (take("-")) {
        out += '-';
      } else {
        take("+");
      }
      if (!digits(out)) return false;
    }
    return true;
  }

  std::optional<unsigned> four_hex() {
    unsigned code = 0;
    if (rest_.size() < 4) return std::nullopt;
    for (int at = 0; at < 4; ++at) {
      const std::size_t digit =
          std::string_view("0123456789abcdef")
              .find(
                  static_cast<char>(rest_[0] >= 'A' && rest_[0] <= 'F' ? rest_[0] + 32 : rest_[0]));
      if (digit == std::string_view::npos) return std::nullopt;
      code = code * 16 + static_cast<unsigned>(digit);
      rest_.remove_prefix(1);
    }
    return code;
  }

  // No surrogates: the library has no reason to write any.
  bool escape(std::string& out) {
    if (rest_.empty()) return false;
    const char kind = rest_[0];
    rest_.remove_prefix(1);
    const std::size_t simple = std::string_view("\"\\/bfnrt").find(kind);
    if (simple != std::string_view::npos) {
      out += "\"\\/\b\f\n\r\t"[simple];
      return true;
    }
    if (kind != 'u') return false;
    const std::optional<unsigned> code = four_hex();
    if (!code || (*code >= 0xD800 && *code <= 0xDFFF)) return false;
    if (*code < 0x80) {
      out += static_cast<char>(*code);
    } else if (*code < 0x800) {
      out += static_cast<char>(0xC0U | *code >> 6U);
      out += static_cast<char>(0x80U | (*code & 63U));
    } else {
      out += static_cast<char>(0xE0U | *code >> 12U);
      out += static_cast<char>(0x80U | (*code >> 6U & 63U));
      out += static_cast<char>(0x80U | (*code & 63U));
    }
    return true;
  }

  bool string(std::string& out) {
    take("\"");
    while (!rest_.empty()) {
      const auto byte = static_cast<unsigned char>(rest_[0]);
      if (byte == '"') {
        rest_.remove_prefix(1);
        return true;
      }
      if (byte < 0x20) return false;
      if (byte == '\\') {
        rest_.remove_prefix(1);
        if (!escape(out)) return false;
        continue;
      }
      const std::size_t length = utf8_length(rest_);
      if (length == 0) return false;
      out += rest_.substr(0, length);
      rest_.remove_prefix(length);
    }
    return false;
  }

 public:
  /// How long the character at the front is; 0 if it isn't valid UTF-8 (RFC 3629, section 4).
  static std::size_t utf8_length(std::string_view text) {
    static constexpr struct {
      unsigned char first, last, low, high;
      std::size_t length;
    } forms[] = {
        {0x00, 0x7F, 0, 0, 1},       {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3},
        {0xE1, 0xEC, 0x80, 0xBF, 3}, {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3},
        {0xF0, 0xF0, 0x90, 0xBF, 4}, {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4}};
    const auto byte = [text](std::size_t at) { return static_cast<unsigned char>(text[at]); };
    for (const auto& form : forms) {
      if (text.empty() || byte(0) < form.first || byte(0) > form.last) continue;
      if (text.size() < form.length) return 0;
      for (std::size_t at = 1; at < form.length; ++at) {
        const unsigned char low = at == 1 ? form.low : 0x80;
        const unsigned char high = at == 1 ? form.high : 0xBF;
        if (byte(at) < low || byte(at) > high) return 0;
      }
      return form.length;
    }
    return 0;
  }

 private:
  std::string_view rest_;
};

inline std::optional<Json> read_json(std::string_view text) { return JsonReader::read(text); }

inline bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const std::size_t length = JsonReader::utf8_length(text);
    if (length == 0) return false;
    text.remove_prefix(length);
  }
  return true;
}

}  // namespace support
