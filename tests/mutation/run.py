#!/usr/bin/env python3
"""Breaks the headers on purpose, in one small way at a time, and sees whether a test notices.

    python3 tests/mutation/run.py --mutants 200 --seed 1

Which edits there are, and how they get into the headers, is described in mutants.py. The seed chooses
among them; each header has a share according to its code. All that were chosen are compiled at once, each
behind a switch, so that the tests are built once and not once a mutant; a mutant that does not compile is
discarded, and the next one of its header takes its place.

First every test case runs with no mutant on, and what it could reach is noted: an edit is tried with the
test cases that pass it, and with no others (that is what a scan of who includes what would say, only more
exactly), to the first failure: those that found other edits of the same header, then the shortest. A failure
counts if the test case then passes without the edit, and fails once more with it; one that takes far longer than
without it has failed, too. An edit that no test case passes has survived, and so has one that none noticed in
a quarter of an hour. Each test case runs in a process namespace of its own if that can be had (as root).

Results are kept in build/mutation/results.jsonl, and what is there is not run again: stop it and start it at
will. --again survived (or the names of mutants) forgets those results first. What survived and why nobody
could notice is in survivors.md. Needs Python 3, CMake, Catch2 and a compiler (CXX; else clang++-14, g++-12).
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True
import mutants as edits  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
WORK = os.path.join(ROOT, "build", "mutation")
TREE = os.path.join(WORK, "tree")
BUILD = os.path.join(WORK, "build")
MAP_SIZE = 65536

# A test case may take so much longer than without a mutant, and then it hangs.
PATIENCE_FACTOR = 8
PATIENCE_SECONDS = 20.0
# And so long all test cases together, with one mutant: those that are left then are not tried.
PATIENCE_A_MUTANT = 900.0


def say(text=""):
    print(text, flush=True)


def fail(text):
    sys.exit("mutation: " + text)


def write_if_different(path, text):
    try:
        with open(path, encoding="utf-8") as old:
            if old.read() == text:
                return
    except OSError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as new:
        new.write(text)


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


# ---- which mutants there are, and which are tried -----------------------------------------------------


def order_of(seed, mutant):
    return hashlib.sha256(f"{seed} {mutant.name}".encode()).digest()


class Headers:
    def __init__(self, compiler):
        self.compiler = compiler
        self.sources, self.sites, self.weights = {}, {}, {}
        include = os.path.join(ROOT, "include")
        for folder, _, files in os.walk(include):
            for file in files:
                path = os.path.join(folder, file)
                name = os.path.relpath(path, include)
                self.sources[name] = read(path)
        active = self.active_lines(include)
        for name, source in self.sources.items():
            lines = active.get(name, set())
            self.sites[name] = edits.Finder(name, source, lines).find()
            self.weights[name] = len(lines)

    def active_lines(self, include):
        """The lines that the preprocessor leaves, by header."""
        command = [self.compiler, "-std=c++20", "-E", "-I", include, "-x", "c++", "-"]
        wanted = "".join(f"#include <{name}>\n" for name in sorted(self.sources))
        answer = subprocess.run(command, input=wanted, stdout=subprocess.PIPE, text=True, check=True)
        found = collections.defaultdict(set)
        name, number = "", 0
        for line in answer.stdout.splitlines():
            mark = re.match(r'#(?:line)? (\d+) "([^"]*)"', line)
            if mark:
                number = int(mark.group(1))
                name = os.path.relpath(mark.group(2), include)
            else:
                if line.strip():
                    found[name].add(number)
                number += 1
        return found

    def choose(self, count, seed, discarded):
        """So many mutants, by header; those in `discarded` are passed over."""
        offered = {}
        for name in sorted(self.sites):
            # The order hangs on each mutant's own name, so that a change of a header leaves most of what was
            # chosen, and what is known of it.
            order = {m.name: m for site in self.sites[name] for m in site.mutants}
            offered[name] = sorted(order.values(), key=lambda m: order_of(seed, m))
        whole = sum(self.weights[name] for name in offered if offered[name])
        shares = {n: count * self.weights[n] / whole for n in offered if offered[n]}
        quota = {n: int(share) for n, share in shares.items()}
        rest = sorted(shares, key=lambda n: (quota[n] - shares[n], n))
        for name in rest[:count - sum(quota.values())]:
            quota[name] += 1
        chosen = []
        for name in sorted(quota):
            left = [m for m in offered[name] if m.name not in discarded]
            chosen += left[:quota[name]]
        for number, mutant in enumerate(chosen, 1):
            mutant.number = number
        return chosen

    def write(self, chosen):
        names = {m.name for m in chosen}
        for header, source in self.sources.items():
            woven = edits.weave(source, self.sites[header], names)
            write_if_different(os.path.join(TREE, "include", header), woven)

    def blamed(self, chosen, messages):
        """The chosen mutants that a compiler's error messages may be about."""
        at = set()
        for match in re.finditer(r"include/(lastcall/[\w/]+\.hpp):(\d+):(?:\d+:)? (?:fatal )?error", messages):
            at.add((match.group(1), int(match.group(2))))
        names = {m.name for m in chosen}
        found = {}
        for header, sites in self.sites.items():
            for site in sites:
                line = self.sources[header].count("\n", 0, site.begin) + 1
                for m in site.mutants:
                    if m.name in names and ((header, line) in at or (header, m.line) in at):
                        found[m.name] = m
        return found


# ---- building -----------------------------------------------------------------------------------------


def compiler_to_use():
    for name in [os.environ.get("CXX", ""), "clang++-14", "g++-12", "c++"]:
        if name and shutil.which(name):
            return shutil.which(name)
    return fail("no C++ compiler")


def copy_project(headers):
    """All but include/, which is woven. What is no longer in the project goes from the copy, too."""
    # The standard headers that the headers under test include are precompiled along with Catch2. Theirs
    # are not: there are tests that put something else in a system call's place before they include them.
    standard = sorted({name for source in headers.sources.values()
                       for name in re.findall(r"^#include (<[a-z_]+>)", source, re.MULTILINE)} -
                      {"<coroutine>", "<expected>", "<print>", "<stop_token>"})
    copied = {os.path.join("include", name) for name in headers.sources}
    for name in ["CMakeLists.txt", "cmake", "tests"]:
        path = os.path.join(ROOT, name)
        files = [path] if os.path.isfile(path) else [
            os.path.join(folder, f) for folder, _, found in os.walk(path) for f in found]
        for file in files:
            if not file.endswith((".hpp", ".cpp", ".txt", ".cmake", ".in")):
                continue
            text = read(file)
            if file.endswith(os.path.join("support", "catch.hpp")):
                text += "".join(f"#include {name}\n" for name in standard)
            copied.add(os.path.relpath(file, ROOT))
            write_if_different(os.path.join(TREE, os.path.relpath(file, ROOT)), text)
    for folder, _, files in os.walk(TREE):
        for file in files:
            if os.path.relpath(os.path.join(folder, file), TREE) not in copied:
                os.remove(os.path.join(folder, file))


def quiet(command, log, **more):
    with open(os.path.join(WORK, log), "w", encoding="utf-8") as out:
        return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, **more).returncode


def build(compiler, folders, jobs):
    switches = os.path.join(WORK, "switches.o")
    hpp = os.path.join(TREE, "tests", "mutation", "switches.hpp")
    cpp = os.path.join(TREE, "tests", "mutation", "switches.cpp")
    subprocess.run([compiler, "-std=c++20", "-O1", "-c", cpp, "-o", switches], check=True)
    if quiet(["cmake", "-S", TREE, "-B", BUILD, "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=Debug",
              "-DCMAKE_CXX_COMPILER=" + compiler, "-DLASTCALL_BUILD_EXAMPLES=OFF",
              "-DLASTCALL_INSTALL=OFF", "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
              f"-DCMAKE_CXX_FLAGS=-w -include {hpp}", f"-DCMAKE_EXE_LINKER_FLAGS={switches}"],
             "configure.log") != 0:
        fail("cmake failed, see " + os.path.join(WORK, "configure.log"))
    if quiet(["make", "-k", f"-j{jobs}", "-C", BUILD] + targets_of(folders), "build.log") != 0:
        return True, read(os.path.join(WORK, "build.log"))
    return False, ""


def targets_of(folders):
    """What tests/CMakeLists.txt makes of the *_test.cpp."""
    found = []
    for folder in folders:
        place = os.path.join(TREE, "tests", folder)
        for file in sorted(os.listdir(place)) if os.path.isdir(place) else []:
            if file.endswith("_test.cpp"):
                found.append(f"{folder}_" + re.sub(f"(_{folder})?_test.cpp$", "", file))
    return found


def build_with(headers, options, compiler):
    """Chooses, weaves and builds; drops what does not compile. Returns the mutants."""
    path = os.path.join(WORK, "discarded.json")
    try:
        discarded = json.loads(read(path))
    except OSError:
        discarded = {}
    copy_project(headers)

    def discard(chosen, messages):
        found = headers.blamed(chosen, messages)
        if not found:
            say(messages[-4000:])
            fail("the tests do not build, and no mutant seems to be why")
        for mutant in found.values():
            discarded[mutant.name] = f"{mutant.header}:{mutant.line}: {mutant.kind}"
        write_if_different(path, json.dumps(discarded, indent=1))
        say(f"  {len(found)} mutants discarded: they may not compile")

    everything = os.path.join(WORK, "everything.cpp")
    write_if_different(everything, "#include <lastcall/lastcall.hpp>\n")
    while True:
        chosen = headers.choose(options.mutants, options.seed, discarded)
        headers.write(chosen)
        say(f"compiling {len(chosen)} mutants")
        alone = subprocess.run(
            [compiler, "-std=c++20", "-fsyntax-only", "-w", "-I", os.path.join(TREE, "include"), "-include",
             os.path.join(HERE, "switches.hpp"), everything],
            stderr=subprocess.PIPE, text=True, check=False)
        if alone.returncode != 0:
            discard(chosen, alone.stderr)
            continue
        failed, messages = build(compiler, options.folders, options.jobs)
        if not failed:
            return chosen, discarded
        discard(chosen, messages)


# ---- running ------------------------------------------------------------------------------------------


class TestCase:
    def __init__(self, entry, folder):
        self.name = entry["name"]
        self.command = entry["command"]
        program = os.stat(self.command[0])
        self.program = [program.st_size, program.st_mtime_ns]
        self.folder = folder
        properties = {p["name"]: p["value"] for p in entry.get("properties", [])}
        self.directory = properties.get("WORKING_DIRECTORY", folder)
        self.seconds, self.passes = 0.0, False
        self.reached = set()


def test_cases(folders):
    found = []
    for folder in folders:
        place = os.path.join(BUILD, "tests", folder)
        answer = subprocess.run(["ctest", "--show-only=json-v1"], cwd=place, stdout=subprocess.PIPE,
                                check=True)
        wanted = {os.path.join(place, target) for target in targets_of([folder])}
        found += [TestCase(entry, place) for entry in json.loads(answer.stdout)["tests"]
                  if entry.get("command", [""])[0] in wanted]
    return found


NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", '"$@"; exit $?', "sh"]


def namespace_or_not():
    if shutil.which("unshare"):
        if subprocess.run(NAMESPACE + ["true"], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return NAMESPACE
    say("no process namespaces here: a mutant may signal processes that are none of its business")
    return []


def prepare_child():
    # A shell starts what it puts in the background with the first two ignored, and nohup with the third.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # What a broken loop could write to files.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run_case(case, prefix, mutant, limit, map_path=None):
    """'passed', 'failed' or 'hung', and the seconds that it took."""
    environment = dict(os.environ)
    environment["LASTCALL_MUTANT_ON"] = str(mutant)
    environment.pop("LASTCALL_MUTANTS_REACHED", None)
    if map_path:
        environment["LASTCALL_MUTANTS_REACHED"] = map_path
    began = time.monotonic()
    process = subprocess.Popen(prefix + case.command, cwd=case.directory, env=environment,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True,
                               preexec_fn=prepare_child)
    try:
        code = process.wait(limit)
        outcome = "passed" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        outcome = "hung"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass
    process.wait()
    return outcome, time.monotonic() - began


def baseline(cases, prefix, options, chosen):
    """Runs each test case as it is, notes what it reaches and how long it takes."""
    path = os.path.join(WORK, "baseline.json")
    try:
        known = json.loads(read(path))
    except (OSError, ValueError):
        known = {}
    # As long as a program is the same, so is what its test cases reach. One that failed may have met a busy
    # machine.
    missing = [case for case in cases if known.get(case.name, {}).get("program") != case.program or
               not known[case.name]["passes"]]
    if missing:
        say(f"running {len(missing)} test cases with no mutant on")
    lock = threading.Lock()

    def measure(case):
        for _ in range(3):
            with tempfile.NamedTemporaryFile(dir=WORK, prefix="reached.") as file:
                file.truncate(MAP_SIZE)
                outcome, seconds = run_case(case, prefix, 0, 300.0, file.name)
                reached = file.read()
            if outcome == "passed":
                break
        with lock:
            known[case.name] = {
                "program": case.program, "seconds": round(seconds, 3), "passes": outcome == "passed",
                "reached": [m.name for m in chosen if reached[m.number]]}
            if len(known) % 50 == 0:
                write_if_different(path, json.dumps(known))

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(measure, missing))
    write_if_different(path, json.dumps(known))
    for case in cases:
        entry = known[case.name]
        case.seconds, case.passes = entry["seconds"], entry["passes"]
        case.reached = set(entry["reached"])
    for case in cases:
        if not case.passes:
            say(f"  fails without a mutant, left out: {case.name}")
    return [case for case in cases if case.passes]


def judge(mutant, cases, prefix, killers):
    """Tries a mutant; what became of it."""
    # First what has noticed others of its header, then the shortest.
    relevant = sorted((case for case in cases if mutant.name in case.reached),
                      key=lambda c: (-killers[mutant.header, c.name] / (1.0 + c.seconds), c.seconds))
    result = {"name": mutant.name, "header": mutant.header, "line": mutant.line, "kind": mutant.kind,
              "verdict": "survived", "by": "", "cases": 0, "reached_by": len(relevant)}
    began = time.monotonic()
    for case in relevant:
        if time.monotonic() - began > PATIENCE_A_MUTANT:
            break
        limit = PATIENCE_SECONDS + PATIENCE_FACTOR * case.seconds
        result["cases"] += 1
        outcome, _ = run_case(case, prefix, mutant.number, limit)
        if outcome != "passed":
            # Is it just that this machine is busy? Then it fails without the mutant, or passes with it.
            if run_case(case, prefix, 0, limit)[0] != "passed":
                continue
            if outcome == "failed":
                outcome, _ = run_case(case, prefix, mutant.number, limit)
        if outcome != "passed":
            result["verdict"] = "killed"
            result["by"] = case.name
            result["hung"] = outcome == "hung"
            killers[mutant.header, case.name] += 1
            break
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def load_results(path):
    results = {}
    if os.path.exists(path):
        for line in read(path).splitlines():
            if line.strip():
                entry = json.loads(line)
                results[entry["name"]] = entry
    return results


# ---- what came of it ----------------------------------------------------------------------------------


def report(chosen, discarded, results):
    explained = set(re.findall(r"\b[0-9a-f]{10}\b", read(os.path.join(HERE, "survivors.md")))
                    if os.path.exists(os.path.join(HERE, "survivors.md")) else [])
    rows = collections.defaultdict(lambda: [0, 0, 0])
    survivors = []
    for mutant in chosen:
        entry = results.get(mutant.name)
        if entry is None:
            continue
        killed = entry["verdict"] == "killed"
        rows[mutant.header][0 if killed else 1] += 1
        if not killed:
            survivors.append((mutant, entry))
    for place in discarded.values():
        rows[place.split(":")[0]][2] += 1
    say()
    say(f"{'header':44}{'killed':>8}{'survived':>10}{'discarded':>11}")
    for header in sorted(rows):
        say(f"{header:44}{rows[header][0]:8}{rows[header][1]:10}{rows[header][2]:11}")
    sums = [sum(row[i] for row in rows.values()) for i in range(3)]
    say(f"{'all':44}{sums[0]:8}{sums[1]:10}{sums[2]:11}")
    say()
    for mutant, entry in survivors:
        known = "explained" if mutant.name in explained else "not explained"
        cases = entry["cases"]
        say(f"survived {cases} of {entry.get('reached_by', cases)} test cases, {known}: {mutant.diff()}")
    counted = sums[0] + sums[1]
    unexplained = sum(1 for mutant, _ in survivors if mutant.name not in explained)
    rate = 100.0 * sums[0] / counted if counted else 0.0
    say(f"{counted} mutants, {rate:.1f} % killed (at least 90 % wanted), {len(survivors)} survived, "
        f"{unexplained} of them not explained in tests/mutation/survivors.md")
    return counted > 0 and rate >= 90.0 and unexplained == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", default="1", help="which (1)")
    parser.add_argument("--jobs", type=int, default=2, help="at once (2)")
    parser.add_argument("--again", nargs="*", default=[], help="'survived', or mutants by name: once more")
    parser.add_argument("--folders", nargs="*", default=["unit", "process", "conformance", "starvation"],
                        help="of tests/ (unit process conformance starvation)")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    options = parser.parse_args()
    os.makedirs(WORK, exist_ok=True)
    os.nice(max(0, 15 - os.nice(0)))

    compiler = compiler_to_use()
    headers = Headers(compiler)
    path = os.path.join(WORK, "results.jsonl")
    results = load_results(path)
    if options.report:
        known = os.path.join(WORK, "discarded.json")
        discarded = json.loads(read(known)) if os.path.exists(known) else {}
        chosen = headers.choose(options.mutants, options.seed, discarded)
        sys.exit(0 if report(chosen, discarded, results) else 1)

    chosen, discarded = build_with(headers, options, compiler)
    prefix = namespace_or_not()
    cases = baseline(test_cases(options.folders), prefix, options, chosen)
    again = set(options.again)
    results = {n: r for n, r in results.items()
               if n not in again and not ("survived" in again and r["verdict"] == "survived")}
    waiting = [m for m in chosen if m.name not in results]
    say(f"trying {len(waiting)} mutants; {len(chosen) - len(waiting)} are known")

    with open(path, "a", encoding="utf-8") as out, \
            concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        killers = collections.Counter((r["header"], r["by"]) for r in results.values() if r["by"])
        tried = {pool.submit(judge, mutant, cases, prefix, killers): mutant for mutant in waiting}
        for done, future in enumerate(concurrent.futures.as_completed(tried), 1):
            entry = future.result()
            results[entry["name"]] = entry
            out.write(json.dumps(entry) + "\n")
            out.flush()
            say(f"{done:4} of {len(waiting)}: {entry['verdict']:9}{entry['seconds']:7.1f} s  {entry['header']}:"
                f"{entry['line']} {entry['kind']}  {entry['by']}")
    sys.exit(0 if report(chosen, discarded, results) else 1)


if __name__ == "__main__":
    main()
