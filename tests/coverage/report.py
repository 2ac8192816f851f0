"""Reads what gcov knows of every program of a build tree, and merges it over the headers of include/.

A line, or one way out of a branch, counts as run if any program ran it, in any instantiation. Ways that
only an exception takes are not counted as branches: nearly every call has one.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import subprocess
import sys

LEAST_LINES = 97.0


class Header:
    def __init__(self):
        self.lines = collections.Counter()  # line -> how often it was run
        self.branches = collections.Counter()  # (line, which) -> how often it was taken
        self.functions = {}  # line -> the function that it is in


def read_notes(gcov, include, notes):
    """What one object file and the data that its program left say of the headers."""
    command = [gcov, "--json-format", "--stdout", "--branch-probabilities",
               "--relative-only", "--source-prefix", include, notes]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
                            cwd=os.path.dirname(notes))
    found = []
    for document in answer.stdout.decode().splitlines():
        if not document.startswith("{"):
            continue
        for file in json.loads(document)["files"]:
            name = file["file"]
            if not os.path.isabs(name):
                name = os.path.join(include, name)
            if not name.startswith(include + os.sep):
                continue
            names = {f["name"]: f["demangled_name"] for f in file["functions"]}
            lines = []
            for line in file["lines"]:
                ways = [b["count"] for b in line["branches"] if not b["throw"]]
                lines.append((line["line_number"], line["count"],
                              names.get(line.get("function_name"), ""), ways))
            found.append((os.path.relpath(name, include), lines))
    return found


def merge(gcov, include, tree):
    notes = []
    for folder, _, files in os.walk(tree):
        # A program under AddressSanitizer has code of its own for lines that declare an array.
        if "process_last_rites_leaks" not in folder:
            notes += [os.path.join(folder, f) for f in files if f.endswith(".gcno")]
    headers = collections.defaultdict(Header)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for found in pool.map(lambda n: read_notes(gcov, include, n), sorted(notes)):
            for name, lines in found:
                header = headers[name]
                for number, count, function, ways in lines:
                    # gcov counts the head of a type that has no function in the file: no code to be run.
                    if count == 0 and not function:
                        continue
                    header.lines[number] += count
                    header.functions.setdefault(number, function)
                    for which, taken in enumerate(ways):
                        header.branches[number, which] += taken
    return headers


def read_explained(path):
    """Counts of (header, line's text); a line in column 0 is a header's name or a reason in between."""
    explained = collections.Counter()
    header = ""
    if not os.path.exists(path):
        return explained
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("["):
                header = line.strip()[1:-1]
            elif line.startswith("    ") and line.strip():
                explained[header, line.strip()] += 1
    return explained


def percent(part, whole):
    return 100.0 * part / whole if whole else 100.0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gcov", required=True)
    parser.add_argument("--tree", required=True)
    parser.add_argument("--include", required=True)
    parser.add_argument("--explained", required=True)
    options = parser.parse_args()
    include = os.path.realpath(options.include)

    headers = merge(options.gcov, include, os.path.realpath(options.tree))
    if not headers:
        sys.exit("no coverage data below " + options.tree)
    explained = read_explained(options.explained)

    print(f"{'header':44}{'lines':>14}{'':>8}{'branches':>14}")
    sums = [0, 0, 0, 0]
    uncovered = []
    for name in sorted(headers):
        header = headers[name]
        with open(os.path.join(include, name), encoding="utf-8") as source:
            text = source.read().splitlines()
        run = sum(1 for count in header.lines.values() if count)
        taken = sum(1 for count in header.branches.values() if count)
        row = [run, len(header.lines), taken, len(header.branches)]
        sums = [a + b for a, b in zip(sums, row)]
        print(f"{name:44}{run:6} of {row[1]:4}{percent(run, row[1]):7.1f}%"
              f"{taken:6} of {row[3]:4}{percent(taken, row[3]):7.1f}%")
        uncovered += [(name, number, text[number - 1].strip(), header.functions[number])
                      for number, count in sorted(header.lines.items()) if not count]
    lines = percent(sums[0], sums[1])
    print(f"{'all':44}{sums[0]:6} of {sums[1]:4}{lines:7.1f}%"
          f"{sums[2]:6} of {sums[3]:4}{percent(sums[2], sums[3]):7.1f}%")

    unexplained = 0
    function = None
    print(f"\n{len(uncovered)} lines that no test runs (?: not explained):")
    for name, number, line, inside in uncovered:
        known = explained[name, line] > 0
        explained[name, line] -= known
        unexplained += not known
        if inside != function:
            print(f"  in {inside}")
            function = inside
        print(f"{' ' if known else '?'} {name}:{number}: {line}")
    stale = sorted(key for key, count in explained.items() if count > 0)
    if stale:
        print("\nexplained, but run this time:")
        for name, line in stale:
            print(f"  {name}: {line}")

    print(f"\nlines {lines:.2f} % (at least {LEAST_LINES:.0f} % wanted), "
          f"branches {percent(sums[2], sums[3]):.2f} %, {unexplained} uncovered lines not explained")
    sys.exit(1 if lines < LEAST_LINES or unexplained else 0)


if __name__ == "__main__":
    main()
