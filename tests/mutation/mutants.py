"""Finds the small edits that can be made to a header, and weaves them into it behind switches.

What is looked for stands in a function's body (and in the initializers of members): conditions,
returned values, expression statements, initialized variables, break and continue. The headers are
formatted by clang-format, which is relied on in one thing: a binary operator has blanks around it, and
a template's angle bracket, a pointer's star and a sign have not.

Woven means that all edits are compiled at once, each chosen at run time. The text of the header stays
where it is, on its line; what is added goes before and after it:

    if (a < b)      becomes    if (ON(7) ? bool(a <= b) : ON(8) ? bool(!(a < b)) : bool(a < b))
    f(x);           becomes    { if (!ON(9)) { f(x); } }

Left out is what would be the same program whatever stands around it, so that no test could tell:

    sizeof batch[0]              another index: the operand of sizeof isn't evaluated
    static_cast<void>(f() < 0)   another comparison, or with another number: its value is thrown away
    static_cast<void>(name);     dropped: it is there for the compiler's warnings
    return nullptr;              as return {}, which is the same null; and 0 and std::nullopt likewise
"""

import collections
import hashlib
import re

TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:[^\n\\]|\\.)*)
      |(?P<text>R"(\w*)\(.*?\)\3"|(?:u8|[uUL])?"(?:[^"\\\n]|\\.)*"|(?:u8|[uUL])?'(?:[^'\\\n]|\\.)+')
      |(?P<number>(?:0[xX][0-9a-fA-F']+|\d[\d']*(?:\.\d+)?(?:[eE][+-]?\d+)?)\w*)
      |(?P<word>[A-Za-z_]\w*)
      |(?P<mark><=>|<<=|>>=|->\*|\.\.\.|::|->|\+\+|--|<<|&&|\|\||[-+*/%&|^!=<>]=|\[\[|\]\]|.)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)

Token = collections.namedtuple("Token", "kind text begin end line")

OPENING = {"(": ")", "{": "}", "[": "]"}
SWAPS = {
    "==": "!=", "!=": "==", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "&&": "||", "||": "&&",
    "+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "&": "|", "|": "&", "<<": ">>",
    "+=": "-=", "-=": "+=", "|=": "&=", "&=": "|=",
}
SWAP_NAMES = {
    "==": "comparison", "!=": "comparison", "<": "comparison", "<=": "comparison",
    ">": "comparison", ">=": "comparison", "&&": "and/or", "||": "and/or",
}
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
NUMBER = re.compile(r"^(0[xX][0-9a-fA-F]+|\d+)([uUlL]*|ns|us|ms|s|min|h)$")
NO_EXPRESSION = {
    "alignas", "auto", "case", "class", "const", "constexpr", "co_return", "default", "do", "else", "enum",
    "extern", "for", "friend", "goto", "if", "inline", "namespace", "private", "protected", "public", "return",
    "static", "static_assert", "struct", "switch", "template", "throw", "try", "typedef", "typename",
    "union", "using", "while", "break", "continue", "volatile", "LASTCALL_TRY", "LASTCALL_CATCH",
    "LASTCALL_RETHROW", "catch", "asm", "thread_local",
}


class Mutant:
    """One edit. `number` is given to those that are chosen."""

    def __init__(self, header, line, kind, begin, end, new, source):
        self.header = header
        self.line = line
        self.kind = kind
        self.begin, self.end, self.new = begin, end, new
        self.number = 0
        first = source.rfind("\n", 0, begin) + 1
        last = source.find("\n", end)
        self.before = source[first:last]
        self.after = source[first:begin] + new + source[end:last]
        # The same edit keeps its name while its lines stay as they are, wherever they move.
        earlier = source.count(self.before, 0, first)
        names = "\0".join([header, self.before, self.after, str(earlier)])
        self.name = hashlib.sha256(names.encode()).hexdigest()[:10]

    def diff(self):
        old = "".join("-" + line + "\n" for line in self.before.splitlines())
        new = "".join("+" + line + "\n" for line in self.after.splitlines() if line.strip())
        return f"{self.name} {self.header}:{self.line}: {self.kind}\n{old}{new}"


class Site:
    """A stretch of text at which edits can be chosen: how they are woven in depends on what it is."""

    def __init__(self, shape, begin, end):
        self.shape, self.begin, self.end = shape, begin, end
        self.mutants = []


def tokens_of(source):
    found = []
    line, at = 1, 0
    for match in TOKEN.finditer(source):
        line += source.count("\n", at, match.start())
        at = match.start()
        if match.lastgroup != "skip":
            kind = next(k for k in ("text", "number", "word", "mark") if match.group(k) is not None)
            found.append(Token(kind, match.group(), match.start(), match.end(), line))
    return found


class Finder:
    def __init__(self, header, source, active_lines):
        self.header, self.source, self.active = header, source, active_lines
        self.tokens = tokens_of(source)
        self.closing = {}
        self.sites = []
        stack = []
        for i, token in enumerate(self.tokens):
            if token.kind != "mark":
                continue
            if token.text in OPENING:
                stack.append(i)
            elif token.text in OPENING.values() and stack:
                self.closing[stack.pop()] = i

    def text(self, i):
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def find(self):
        """All sites. Walks over blocks; whatever is in braces inside of an expression is looked at, too."""
        for i in self.closing:
            if self.text(i) == "{":
                kind = self.kind_of_brace(i)
                if kind == "block":
                    self.walk_block(i + 1, self.closing[i])
                elif kind == "class":
                    self.walk_members(i + 1, self.closing[i])
        return self.sites

    def head(self, i):
        """The tokens between the end of the last statement and i."""
        depth = 0
        first = i - 1
        while first >= 0:
            text = self.text(first)
            if text in (")", "]") or (text == "}" and depth > 0):
                depth += 1
            elif text in ("(", "[") or (text == "{" and depth > 0):
                if depth == 0:
                    break
                depth -= 1
            elif depth == 0 and text in (";", "{", "}"):
                break
            first -= 1
        return [token.text for token in self.tokens[first + 1:i]]

    def kind_of_brace(self, i):
        before = self.text(i - 1)
        head = self.head(i)
        if "namespace" in head or (before.startswith('"') and "extern" in head):
            return "namespace"
        if "requires" in head:
            return "other"
        if before in (")", "else", "do", "try", "noexcept", "const", "override", "final", "mutable", "]",
                      ";", "{", "LASTCALL_TRY"):
            return "block" if before != "const" or ")" in head else "other"
        if any(word in ("class", "struct", "union") for word in head):
            return "other" if "=" in head else "class"
        if "enum" in head or before in ("=", ",", "(", "return"):
            return "other"
        if before in ("}", ":"):
            return "block"
        # A return type after an arrow that stands behind a closing bracket.
        for at, word in enumerate(head):
            if word == "->" and at > 0 and head[at - 1] in (")", "mutable", "noexcept"):
                after = head[at + 1:]
                if not set(after) & {"(", "=", ".", "->"}:
                    return "block"
        return "other"

    def statement_end(self, i, end):
        """The index of the semicolon that ends the statement at i."""
        while i < end and self.text(i) != ";":
            i = self.closing.get(i, i) + 1
        return i

    def walk_members(self, i, end):
        while i < end:
            if self.text(i) in ("public", "private", "protected") and self.text(i + 1) == ":":
                i += 2
                continue
            start = i
            equals = None
            plain = True
            while i < end and self.text(i) != ";":
                if self.text(i) == "=" and equals is None and plain:
                    equals = i
                if self.text(i) in ("(", "operator"):
                    plain = plain and equals is not None
                if self.text(i) == "{" and equals is None and not plain:
                    i = self.closing.get(i, i)  # a function's body ends it without a semicolon
                    break
                i = self.closing.get(i, i) + 1
            words = {token.text for token in self.tokens[start:i]}
            fixed = {"static", "constexpr", "using", "friend", "template", "default", "delete", "enum", "class",
                     "struct", "typedef"}
            if equals is not None and not words & fixed and i < end:
                self.add("value", equals + 1, i)
            i += 1

    def walk_block(self, i, end):
        """The statements of one block; those of blocks inside of it are walked by find()."""
        while i < end:
            i = self.walk_statement(i, end)

    def walk_statement(self, i, end):
        text = self.text(i)
        if text in ("{",):
            return self.closing[i] + 1
        if text == "[[":
            while self.text(i) != "]]":
                i += 1
            return i + 1
        if text == ";" or text in ("else", "do", "try", "LASTCALL_TRY"):
            return i + 1
        if text in ("if", "while", "switch", "for"):
            opening = i + 1
            fixed = self.text(opening) == "constexpr"
            if fixed:
                opening += 1
            closing = self.closing[opening]
            if not fixed and text != "switch":
                self.condition(text, opening + 1, closing)
            return closing + 1
        if text in ("catch", "LASTCALL_CATCH"):
            return self.closing[i + 1] + 1
        if text in ("case", "default"):
            while self.text(i) != ":":
                i += 1
            return i + 1
        stop = self.statement_end(i, end)
        if stop >= end and self.text(stop) != ";":
            return stop + 1
        if text in ("break", "continue"):
            other = "continue" if text == "break" else "break"
            site = Site("jump", self.tokens[i].begin, self.tokens[stop].end)
            self.offer(site, i, f"{text} to {other}", self.tokens[i].begin, self.tokens[i].end, other)
            self.sites.append(site)
        elif text == "return":
            if stop > i + 1:
                self.returned(i, stop)
        elif text not in NO_EXPRESSION and not self.is_declaration(i, stop):
            self.expression(i, stop)
        elif text in ("const", "auto", "volatile") or text not in NO_EXPRESSION:
            self.variable(i, stop)
        return stop + 1

    def condition(self, text, i, end):
        parts = [i]
        at = i
        while at < end:
            if self.text(at) == ";":
                parts.append(at + 1)
            at = self.closing.get(at, at) + 1
        if text == "for":
            if len(parts) != 3:
                return
            i, end = parts[1], parts[2] - 1
        elif len(parts) == 2:
            i = parts[1]
        if i >= end or any(self.text(k) == "=" for k in range(i, end)):
            return
        self.add("condition", i, end)

    def returned(self, i, stop):
        site = self.add("return", i + 1, stop, i)
        if self.text(i + 1) in ("true", "false") or self.text(i + 1) == "{":
            return
        if "".join(self.text(k) for k in range(i + 1, stop)) in ("nullptr", "0", "std::nullopt"):
            return
        self.offer(site, i, "nothing returned", self.tokens[i + 1].begin, self.tokens[stop - 1].end, "{}")

    def is_declaration(self, i, stop):
        previous = None
        while i < stop:
            token = self.tokens[i]
            if token.kind == "word":
                if previous and (previous.kind == "word" or previous.text in ("*", "&", ">", "&&")):
                    return previous.text not in ("delete", "new")
            elif token.text in ("=", "(", "{", "+=", "-=", "|=", "&=", "++", "--"):
                return False
            elif token.text == "[":
                i = self.closing.get(i, i)
            elif token.text in ("*", "&") and previous is None:
                return False
            previous = token
            i += 1
        return False

    def expression(self, i, stop):
        site = self.add("statement", i, stop)
        if self.opens_void(i) and self.tokens[i + 5].kind == "word" and i + 7 == stop:
            return
        self.offer(site, i, "statement dropped", self.tokens[i].begin, self.tokens[stop].end, "")

    def opens_void(self, i):
        """Whether static_cast<void>( begins at i, of which the value is token i + 5 and what follows."""
        return [self.text(k) for k in range(i, i + 5)] == ["static_cast", "<", "void", ">", "("]

    def without_effect(self, i, end):
        """The tokens between i and end that can be changed with no effect whatever."""
        found = set()
        for k in range(i, end):
            if self.text(k) == "sizeof" and self.tokens[k + 1].kind == "word" and self.text(k + 2) == "[":
                found.update(range(k + 3, self.closing[k + 2]))
            if self.opens_void(k):
                at, closing = k + 5, self.closing[k + 4]
                inside = []
                while at < closing:
                    inside.append(at)
                    at = self.closing.get(at, at) + 1
                # With one comparison and no other operator of low rank the comparison is the outermost.
                if not {self.text(m) for m in inside} & {"&&", "||", "?", ",", "="}:
                    compares = [m for m in inside if self.text(m) in COMPARISONS and self.is_spaced(m)]
                    if len(compares) == 1:
                        found.add(compares[0])
                        if compares[0] + 2 == closing:
                            found.add(closing - 1)
        return found

    def is_spaced(self, k):
        token = self.tokens[k]
        return self.source[token.begin - 1] in " \n" and self.source[token.end] in " \n"

    def variable(self, i, stop):
        words = {self.text(k) for k in range(i, stop)}
        if words & {"static", "constexpr", "using", "thread_local"}:
            return
        at = i
        while at < stop and self.text(at) != "=":
            at = self.closing.get(at, at) + 1
        if at < stop and self.text(at + 1) not in ("{", "["):
            self.add("value", at + 1, stop)

    def add(self, shape, i, end, start=None):
        """A site of tokens i to end; what is woven around starts at token `start`."""
        begin = self.tokens[i if start is None else start].begin
        last = self.tokens[end].end if shape in ("statement", "return") else self.tokens[end - 1].end
        site = Site(shape, begin, last)
        site.inner = (self.tokens[i].begin, self.tokens[end - 1].end)
        self.sites.append(site)
        if shape == "condition":
            inner = self.source[site.inner[0]:site.inner[1]]
            self.offer(site, i, "condition negated", *site.inner, f"!({inner})")
        # A copy of a lambda's body would be a copy of many statements.
        if all(self.text(k) != ";" for k in range(i, end)):
            idle = self.without_effect(i, end)
            for k in range(i, end):
                if k not in idle:
                    self.edits_of(site, k)
        return site

    def edits_of(self, site, k):
        token = self.tokens[k]
        if token.kind == "mark":
            if token.text in SWAPS and self.is_spaced(k):
                other = SWAPS[token.text]
                kind = SWAP_NAMES.get(token.text, "operator")
                self.offer(site, k, f"{kind}: {token.text} to {other}", token.begin, token.end, other)
            elif token.text == "!":
                self.offer(site, k, "! removed", token.begin, token.end, "")
            elif token.text in ("++", "--"):
                other = "--" if token.text == "++" else "++"
                self.offer(site, k, f"{token.text} to {other}", token.begin, token.end, other)
        elif token.text in ("true", "false"):
            other = "false" if token.text == "true" else "true"
            self.offer(site, k, f"{token.text} to {other}", token.begin, token.end, other)
        elif token.kind == "number":
            match = NUMBER.match(token.text.replace("'", ""))
            if match:
                value = int(match.group(1), 0)
                other = str(value + 1 if value != 1 else 0) + match.group(2)
                self.offer(site, k, f"constant: {token.text} to {other}", token.begin, token.end, other)

    def offer(self, site, k, kind, begin, end, new):
        line = self.tokens[k].line
        if line in self.active:
            site.mutants.append(Mutant(self.header, line, kind, begin, end, new, self.source))


def weave(source, sites, chosen):
    """The header's text with the chosen mutants in it, every line where it was."""
    def flat(text):
        return " ".join(re.sub(r"//[^\n]*", "", text).split("\n"))

    before = collections.defaultdict(list)
    after = collections.defaultdict(list)
    for site in sites:
        mutants = [m for m in site.mutants if m.name in chosen]
        if not mutants:
            continue
        copies = []
        dropped = ""
        for mutant in mutants:
            if mutant.kind == "statement dropped":
                dropped = f"if (!LASTCALL_MUTANT({mutant.number})) "
                continue
            inner = site.inner if site.shape != "jump" else (mutant.begin, mutant.end)
            copy = source[inner[0]:mutant.begin] + mutant.new + source[mutant.end:inner[1]]
            copies.append((mutant.number, flat(copy)))
        if site.shape == "condition":
            front = "(" + "".join(f"LASTCALL_MUTANT({n}) ? static_cast<bool>({c}) : " for n, c in copies)
            front, back = front + "static_cast<bool>(", "))"
        elif site.shape == "value":
            front = "(" + "".join(f"LASTCALL_MUTANT({n}) ? ({c}) : " for n, c in copies)
            front, back = front + "(", "))"
        elif site.shape == "return":
            front = "{ " + "".join(f"if (LASTCALL_MUTANT({n})) return {c}; " for n, c in copies)
            back = " }"
        elif site.shape == "jump":
            front = "{ " + "".join(f"if (LASTCALL_MUTANT({n})) {c}; " for n, c in copies)
            back = " }"
        else:
            front = "{ " + "".join(f"if (LASTCALL_MUTANT({n})) {{ {c}; }} else " for n, c in copies)
            front, back = front + dropped + "{ ", " } }"
        size = site.end - site.begin
        before[site.begin].append((-size, front))
        after[site.end].append((size, back))
    woven = []
    for at in range(len(source) + 1):
        woven += [text for _, text in sorted(after.get(at, []))]
        woven += [text for _, text in sorted(before.get(at, []))]
        if at < len(source):
            woven.append(source[at])
    return "".join(woven)
