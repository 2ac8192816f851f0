#!/usr/bin/env bash
# The matrix: compilers, standard libraries, processors, the portable path, and bare Debian systems.
#
#   bash tests/matrix/run.sh                  every row
#   bash tests/matrix/run.sh gcc14 s390x      these rows
#   bash tests/matrix/run.sh --full gcc14     all unit and process tests, and not only the bricks'
#   bash tests/matrix/run.sh --headers gcc14  the headers alone, and no tests
#   bash tests/matrix/run.sh --here portable  on this machine as it is, without a chroot
#   bash tests/matrix/run.sh --list           what there is
#
# Each row runs in a chroot of the Debian that has its compiler, in mount and process namespaces of its
# own, so that nothing of it is left behind. Root and debootstrap are required, but for --here.
#
#   LASTCALL_MATRIX_CACHE   where chroots, build trees and logs are kept (default: build/matrix)
#   LASTCALL_MATRIX_MIRROR  whose packages are installed (default: the first that apt knows here)
#   LASTCALL_MATRIX_JOBS    how many jobs at once (default: as many as there are processors)
set -euo pipefail
shopt -s inherit_errexit
source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$source_dir/tests/matrix
jobs=${LASTCALL_MATRIX_JOBS:-$(nproc)}

# name | suite | packages | compiler | C++ of the tests | what it is
rows() {
  cat <<'ROWS'
gcc12|bookworm|g++-12|g++-12|20|g++-12, libstdc++
clang14|bookworm|clang-14 libstdc++-12-dev|clang++-14|20|clang-14, libstdc++ 12
clang19|bookworm|clang-19 libstdc++-12-dev|clang++-19|23|clang-19, libstdc++ 12
portable|bookworm|g++-12 clang-14 binutils|g++-12|20|the POSIX fallback of everything that is Linux-only
gcc14|trixie|g++-14|g++-14|23|g++-14, libstdc++
clang19-libc++|trixie|clang-19 libc++-19-dev libc++abi-19-dev|clang++-19|23|clang-19, libc++
weverything|trixie|clang-19 libstdc++-14-dev|clang++-19|20|clang's -Weverything, less weverything.txt
gcc-newest|forky|g++-NEWEST|g++-NEWEST|26|the newest g++ of Debian testing
clang-newest-libc++|forky|clang-NEWEST libc++-NEWEST-dev libc++abi-NEWEST-dev|clang++-NEWEST|26|the newest clang of Debian testing, libc++
aarch64|trixie|g++-14-aarch64-linux-gnu qemu-user|aarch64-linux-gnu-g++-14|20|ARM, 64 bits, by qemu
riscv64|trixie|g++-14-riscv64-linux-gnu qemu-user|riscv64-linux-gnu-g++-14|20|RISC-V, 64 bits, by qemu
s390x|trixie|g++-14-s390x-linux-gnu qemu-user|s390x-linux-gnu-g++-14|20|big-endian, 64 bits, by qemu
armhf|trixie|g++-14-arm-linux-gnueabihf qemu-user|arm-linux-gnueabihf-g++-14|20|ARM, 32 bits, by qemu
fresh-bookworm|bookworm||c++|20|the README's commands on a bare Debian 12
fresh-trixie|trixie||c++|20|the README's commands on a bare Debian 13
ROWS
}

# Reads the row's fields into name, suite, packages, compiler, standard, title; false: there is no such row.
read_row() {
  local line
  line=$(rows | awk -F'|' -v wanted="$1" '$1 == wanted')
  [ -n "$line" ] || return 1
  IFS='|' read -r name suite packages compiler standard title <<<"$line"
}

say() { printf '%s\n' "$*"; }
fail() {
  say "$*" >&2
  exit 1
}

# What a row has to say in the table: built and run are added to, the compiler is set.
report() { printf '%s\n' "$2" >>"$work/$1"; }

# ---- Inside: one row, in its chroot or here

warnings="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Werror"
# The bricks. What is made of them has its turn with --full.
bricks="blocking cancel_tree cancellation cause futex observer signal_inbox signal_info signal_trap
        task_group ticker wait_group wait_group_memory wait_group_threads"
brick_processes="no_exceptions signal_trap signal_trap_fork signal_trap_raise_again"

headers() { (cd "$source_dir/include" && find lastcall -name '*.hpp' | sort); }

# Compiles the headers named on standard input, each alone and twice in a row. $1: options.
headers_alone() {
  # shellcheck disable=SC2016
  xargs -P "$jobs" -I{} sh -c '
    printf "#include <%s>\n#include <%s>\n" "$1" "$1" |
      $2 -x c++ -fsyntax-only -I"$3/include" $4 - || { echo "$1: does not compile alone" >&2; exit 255; }
  ' sh {} "$compiler" "$source_dir" "$1"
}

# The standards that the compiler knows, as it calls them.
standards() {
  local known
  for known in 20 23 26; do
    if echo | $compiler -x c++ -std=c++$known -fsyntax-only - 2>/dev/null; then
      echo c++$known
    elif [ $known = 26 ] && echo | $compiler -x c++ -std=c++2c -fsyntax-only - 2>/dev/null; then
      echo c++2c
    fi
  done
}

# $1: options. Where only the processor is another, the umbrella stands for all.
compile_headers() {
  local flags="$1" without known
  if [ -z "$emulated" ]; then
    headers | headers_alone "-std=c++20 $warnings $flags"
    report built "$(headers | wc -l) headers alone"
  fi
  for known in $(standards); do
    for without in "" -fno-rtti -fno-exceptions "-fno-exceptions -fno-rtti"; do
      echo lastcall/lastcall.hpp | headers_alone "-std=$known $warnings $flags $without"
    done
  done
  report built "umbrella in $(standards | sed 's/c++//' | paste -sd/), also without RTTI, exceptions"
}

# Catch2 for a standard library or a processor that Debian has no binary of it for, from Debian's source.
# Built once, in few pieces. The rest of the arguments goes to cmake.
catch2_from_source() {
  local root=$build_root/catch2
  [ "$full" != headers ] || return 0
  if [ ! -e "$root/source/CMakeLists.txt" ]; then
    rm -rf "$root/source"
    mkdir -p "$root/source" "$root/download"
    (cd "$root/download" && apt-get source -qq --download-only catch2)
    tar -x -f "$root"/download/catch2_*.orig.tar.* -C "$root/source" --strip-components=1
  fi
  catch2=$root/$name
  if [ ! -e "$catch2/installed" ]; then
    cmake -S "$root/source" -B "$catch2/build" -G "Unix Makefiles" -DCATCH_INSTALL_DOCS=OFF \
      -DCMAKE_PROJECT_INCLUDE="$here/catch2_in_few_pieces.cmake" -DCMAKE_INSTALL_PREFIX="$catch2" \
      -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_STANDARD=20 -DCMAKE_CXX_FLAGS_DEBUG=-g0 "$@"
    cmake --build "$catch2/build" --parallel "$jobs"
    cmake --install "$catch2/build"
    touch "$catch2/installed"
  fi
}

# Builds and runs unit and process tests. The rest of the arguments goes to cmake.
run_tests() {
  local targets="" unit process names without="" first ran all list
  [ "$full" != headers ] || return 0
  cmake -S "$source_dir" -B "$work/build" -G "Unix Makefiles" -DCMAKE_CXX_STANDARD="$standard" \
    -DCMAKE_CXX_COMPILER="${compiler%% *}" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O0 -g0" \
    -DLASTCALL_BUILD_EXAMPLES=OFF "$@"
  if [ "$full" = yes ]; then
    make -C "$work/build/tests/unit" -j "$jobs"
    make -C "$work/build/tests/process" -j "$jobs"
    names='^(unit|process)/'
  else
    for unit in $bricks; do targets="$targets unit_$unit"; done
    for process in $brick_processes; do targets="$targets process_$process"; done
    # shellcheck disable=SC2086
    cmake --build "$work/build" --parallel "$jobs" --target $targets
    # shellcheck disable=SC2086
    names="^(unit/($(echo $bricks | tr ' ' '|'))|process/($(echo $brick_processes | tr ' ' '|')))/"
  fi
  report built "tests in C++$standard"
  # Lines of <row>.txt, and of qemu.txt: a regular expression, two blanks, and why those tests can't be run
  # there.
  for list in "$here/without/$name.txt" ${emulated:+"$here/without/qemu.txt"}; do
    [ -e "$list" ] || continue
    without=${without:+$without|}$(grep -v '^#' "$list" | sed 's/   *.*//' | paste -sd'|')
  done
  # What fails beside others has a second try by itself: many tests bound how long something may take.
  all=$(ctest --test-dir "$work/build" -N -R "$names" | sed -n 's/^Total Tests: //p')
  ran=$(ctest --test-dir "$work/build" -N -R "$names" ${without:+-E "$without"} | sed -n 's/^Total Tests: //p')
  [ "${ran:-0}" -gt 0 ] || fail "no tests"
  ctest --test-dir "$work/build" -R "$names" ${without:+-E "$without"} --parallel "$jobs" --timeout 300 \
    --output-on-failure ||
    ctest --test-dir "$work/build" --rerun-failed --timeout 300 --output-on-failure | tee "$work/ctest" || {
    first=$(sed -n 's/.*, \(.*\) tests failed out of .*/\1/p' "$work/ctest" | head -n 1)
    report ran "${first:-some} of $ran tests failed"
    return 1
  }
  report ran "$ran tests"
  if [ -n "$without" ]; then
    report ran "without $((all - ran)) - see tests/matrix/without"
  fi
}

check_portable() {
  local objects linux_only found
  # Not even the names of what POSIX doesn't have: a compiler that is told that this isn't Linux, and
  # that only POSIX.1-2008 is wanted, finds all it needs.
  echo lastcall/lastcall.hpp | compiler=${CLANGXX:-clang++-14} headers_alone "-std=c++20 -DLASTCALL_PORTABLE -U__linux__
    -U__gnu_linux__ -Ulinux -U_GNU_SOURCE -D_XOPEN_SOURCE=700 -include $here/posix_only.hpp"
  report built "umbrella with POSIX.1-2008 alone"
  # And with all of GNU/Linux there to be used, none of it is.
  printf '#include <lastcall/lastcall.hpp>\nint main() { lastcall::ShutdownCoordinator().drain(); }\n' \
    >"$work/portable.cpp"
  $compiler -std=c++20 -DLASTCALL_PORTABLE -I"$source_dir/include" -c "$work/portable.cpp" \
    -o "$work/portable.o"
  linux_only='syscall|eventfd|pipe2|dup3|accept4|prctl|ppoll|epoll_.*|timerfd_.*|signalfd|gettid|tgkill'
  linux_only="$linux_only|pwritev2|pthread_(try|timed)join_np|_dl_find_object|_Unwind_Backtrace|dladdr"
  found=$(nm -u "$work/portable.o" | grep -E " ($linux_only)(@.*)?\$" || true)
  [ -z "$found" ] || fail "Linux's own, in spite of LASTCALL_PORTABLE:" "$found"
  report built "no Linux call in its objects"
}

check_weverything() {
  local less source log=$work/weverything.log
  less=$(grep -v '^#' "$here/weverything.txt" | awk '{ print $1 }' | paste -sd' ')
  echo lastcall/lastcall.hpp | headers_alone "-std=c++20 -Weverything -Werror -ferror-limit=0 $less"
  report built "umbrella with -Weverything"
  # Templates are looked at where they are used. The warnings of the tests themselves are not the point.
  : >"$log"
  for source in "$source_dir"/tests/unit/*_test.cpp; do
    $compiler -std=c++20 -fsyntax-only -Weverything $less -ferror-limit=0 -I"$source_dir/include" \
      -I"$source_dir/tests" "$source" 2>>"$log" || { cat "$log" && return 1; }
  done
  if grep -A 5 -E 'include/lastcall/[^ ]*: warning:' "$log"; then return 1; fi
  report built "unit tests: no warning from the headers"
}

inside() {
  emulated=""
  local prefix flags="" link=""
  [ ! -d "$work" ] || rm -f "$work"/{built,ran,compiler}
  mkdir -p "$work"
  case $compiler in
    *NEWEST)
      compiler=$(compgen -c "${compiler%NEWEST}" | grep -E '[+-][0-9]+$' | sort -V | tail -n 1) ;;
  esac
  report compiler "$($compiler --version | head -n 1)"
  case $name in
    portable)
      check_portable
      run_tests -DLASTCALL_PORTABLE=ON
      ;;
    weverything) check_weverything ;;
    *-libc++)
      compile_headers -stdlib=libc++
      catch2_from_source -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_FLAGS=-stdlib=libc++
      run_tests -DCMAKE_CXX_FLAGS=-stdlib=libc++ -DCMAKE_PREFIX_PATH="${catch2:-}"
      ;;
    aarch64 | riscv64 | s390x | armhf)
      prefix=${compiler%-g++-*}
      emulated="/usr/bin/qemu-${name/armhf/arm};-L;/usr/$prefix"
      local cross=(-DCMAKE_SYSTEM_NAME=Linux "-DCMAKE_SYSTEM_PROCESSOR=$name"
        "-DCMAKE_CXX_COMPILER=$compiler" "-DCMAKE_CROSSCOMPILING_EMULATOR=$emulated")
      compile_headers ""
      catch2_from_source "${cross[@]}"
      run_tests "${cross[@]}" -DCMAKE_PREFIX_PATH="${catch2:-}"
      ;;
    *)
      compile_headers ""
      run_tests
      ;;
  esac
}

# ---- Outside: chroots, rows, the table

# Runs a command in a chroot, with the usual file systems mounted and the repository at /source.
enter() {
  local root=$1
  shift
  # shellcheck disable=SC2016
  unshare --mount --pid --fork --kill-child -- bash -euc '
    root=$1 source=$2 work=$3
    shift 3
    mount --make-rprivate /
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for device in null zero full random urandom tty; do
      : >"$root/dev/$device"
      mount --bind "/dev/$device" "$root/dev/$device"
    done
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
    mount -t tmpfs tmpfs "$root/dev/shm"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    for number in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${number%:*}" "$root/dev/${number#*:}"; done
    if [ -n "$source" ]; then
      mkdir -p "$root/source" "$root/matrix"
      mount --bind -o ro "$source" "$root/source"
      mount --bind "$work" "$root/matrix"
    fi
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8 \
      DEBIAN_FRONTEND=noninteractive ${http_proxy:+http_proxy="$http_proxy"} "$@"
  ' enter "$root" "$mounted_source" "$mounted_work" "$@"
}

# A bare system, made once.
bare() {
  local root=$cache/bare-$1 script=/usr/share/debootstrap/scripts/$1
  # A debootstrap that is older than the suite: all suites are made alike.
  [ -e "$script" ] || script=/usr/share/debootstrap/scripts/sid
  if [ ! -e "$root/.complete" ]; then
    rm -rf "$root"
    mkdir -p "$cache"
    [ -n "$mirror" ] || fail "apt knows no mirror here: name one in LASTCALL_MATRIX_MIRROR"
    debootstrap --variant=minbase "$1" "$root" "$mirror" "$script"
    touch "$root/.complete"
  fi
}

# The chroot of the rows, with what the row needs installed.
prepare() {
  local root=$cache/$suite package newest wanted=""
  bare "$suite"
  if [ ! -e "$root/.complete" ]; then
    rm -rf "$root"
    cp -a "$cache/bare-$suite" "$root"
    printf 'deb %s %s main\ndeb-src %s %s main\n' "$mirror" "$suite" "$mirror" "$suite" \
      >"$root/etc/apt/sources.list"
    # A mirror may stand still, so that runs can be repeated.
    echo 'Acquire::Check-Valid-Until "false";' >"$root/etc/apt/apt.conf.d/90matrix"
    enter "$root" apt-get -qq update
    touch "$root/.complete"
  fi
  for package in cmake make catch2 $packages; do
    case $package in
      *NEWEST*)
        # The newest of its name, with the version between two literal parts: g++-16, libc++-22-dev.
        newest=$(enter "$root" apt-cache pkgnames "${package%%NEWEST*}" |
          awk -v before="${package%%NEWEST*}" -v after="${package#*NEWEST}" '
            { version = substr($0, length(before) + 1, length($0) - length(before) - length(after)) }
            version ~ /^[0-9]+$/ && $0 == before version after' | sort -V | tail -n 1)
        [ -n "$newest" ] || fail "$suite has no $package"
        package=$newest
        ;;
    esac
    enter "$root" dpkg -s "$package" >/dev/null 2>&1 || wanted="$wanted $package"
  done
  if [ -n "$wanted" ]; then
    # shellcheck disable=SC2086
    enter "$root" sh -c "apt-get -qq update && apt-get -qq -y --no-install-recommends install $wanted"
  fi
}

# The README's two commands, as they stand there, in a system that has nothing.
fresh() {
  local root=$cache/$name command log begin work=$mounted_work/$name
  bare "$suite"
  mkdir -p "$work"
  rm -rf "$root" "$work"/{built,ran,compiler}
  cp -a "$cache/bare-$suite" "$root"
  mkdir "$root/lastcall"
  tar -C "$source_dir" --exclude=./build --exclude=./.git -c . | tar -C "$root/lastcall" -x
  for log in demo test; do
    command=$(grep -m 1 "cmake -P cmake/$log.cmake" "$source_dir/README.md")
    begin=$SECONDS
    mounted_source="" enter "$root" sh -c "cd /lastcall && $command"
    report ran "$log.cmake ($((SECONDS - begin)) s)"
  done
  mounted_source="" enter "$root" sh -c 'c++ --version' | head -n 1 >"$work/compiler"
  report built "everything"
  rm -rf "$root"
}

# The row as it runs under `run_row`: in a process of its own, with its output in a log.
one() {
  read_row "$1"
  case $name in
    fresh-*) fresh ;;
    *)
      prepare
      enter "$cache/$suite" env LASTCALL_MATRIX_JOBS="$jobs" LASTCALL_MATRIX_FULL="$full" \
        bash /source/tests/matrix/run.sh --inside "$name"
      ;;
  esac
}

table() {
  local name field
  say ""
  printf '%-20s  %-6s  %7s  %s\n' row result seconds "compiler; built; run"
  for name in "${done_rows[@]}"; do
    printf '%-20s  %-6s  %7s  %s\n' "$name" "${results[$name]}" "${seconds[$name]}" \
      "$(for field in compiler built ran; do
        [ ! -e "$logs/$name/$field" ] || paste -sd, "$logs/$name/$field" | sed 's/, */, /g'
      done | paste -sd';' | sed 's/; */; /g')"
  done
}

# "deb [options] <address> ..." in sources.list, or "URIs: <address>" in a .sources file; maybe none.
known_mirror() {
  cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    sed -nE 's/^(deb( \[[^]]*\])?|URIs:)[[:space:]]+(https?:[^[:space:]]+).*/\3/p' | sed -n 1p || true
}

main() {
  full=${LASTCALL_MATRIX_FULL:-no}
  cache=${LASTCALL_MATRIX_CACHE:-$source_dir/build/matrix}
  mirror=${LASTCALL_MATRIX_MIRROR:-$(known_mirror)}
  on_this_machine=no
  wanted=()
  while [ $# -gt 0 ]; do
    case $1 in
      --list)
        rows | awk -F'|' '{ printf "%-20s  %-9s  %s\n", $1, $2, $6 }'
        exit 0
        ;;
      --full) full=yes ;;
      --headers) full=headers ;;
      --here) on_this_machine=yes ;;
      --inside)
        build_root=/matrix
        read_row "$2"
        work=$build_root/$name
        inside
        exit 0
        ;;
      --one)
        mounted_source=$source_dir
        mounted_work=$cache/work
        one "$2"
        exit 0
        ;;
      -*) fail "unknown option $1" ;;
      *)
        read_row "$1" || fail "no row is called $1; --list names them"
        wanted+=("$1")
        ;;
    esac
    shift
  done
  if [ ${#wanted[@]} -eq 0 ]; then
    mapfile -t wanted < <(rows | cut -d'|' -f1)
  fi

  logs=$cache/work
  mkdir -p "$logs"
  cache=$(cd "$cache" && pwd)
  logs=$cache/work
  declare -gA results seconds
  done_rows=()

  if [ "$on_this_machine" = yes ]; then
    for row in "${wanted[@]}"; do
      case $row in
        portable | weverything | gcc* | clang14 | clang19) ;;
        *) fail "--here is not for $row" ;;
      esac
    done
  else
    [ "$(id -u)" = 0 ] || fail "the matrix needs root, for chroots; rows for this machine: --here"
    for tool in debootstrap unshare; do
      command -v $tool >/dev/null || fail "the matrix needs $tool (Debian: apt-get install $tool)"
    done
  fi

  broken=0
  for row in "${wanted[@]}"; do
    begin=$SECONDS
    say "$row: log in $logs/$row.log"
    status=0
    if [ "$on_this_machine" = yes ]; then
      read_row "$row"
      (
        set -e
        build_root=$logs
        work=$logs/$name
        inside
      ) >"$logs/$row.log" 2>&1 &
      wait $! || status=$?
    else
      LASTCALL_MATRIX_FULL=$full LASTCALL_MATRIX_CACHE=$cache \
        bash "$here/run.sh" --one "$row" >"$logs/$row.log" 2>&1 || status=$?
    fi
    done_rows+=("$row")
    seconds[$row]=$((SECONDS - begin))
    if [ $status = 0 ]; then
      results[$row]=passed
    else
      results[$row]=FAILED
      broken=1
      tail -n 40 "$logs/$row.log"
    fi
  done
  table
  return $broken
}

main "$@"
exit
