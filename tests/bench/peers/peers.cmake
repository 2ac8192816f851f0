# Builds the programs that the benchmarks put beside lastcall:
#
#   cmake -DBUILD_DIR=build/peers -P tests/bench/peers/peers.cmake
#
# What is missing is installed by apt-get where that may be done; where this Debian's Go or tokio is too
# old, a newer Debian's packages are unpacked below BUILD_DIR, and nothing of them is installed. What can't
# be had is skipped, with its reason. BUILD_DIR/peers.txt then has a line for each program, its path, and
# a line `skipped: <name>: <reason>` for each that there isn't. It may be run again: what is built stays.
cmake_minimum_required(VERSION 3.22)

set(here "${CMAKE_CURRENT_LIST_DIR}")
if(NOT BUILD_DIR)
  cmake_path(SET BUILD_DIR NORMALIZE "${here}/../../../build/peers")
endif()
cmake_path(ABSOLUTE_PATH BUILD_DIR NORMALIZE)
file(MAKE_DIRECTORY "${BUILD_DIR}")
# The suite whose packages are new enough.
set(newer_suite trixie)
set(lines "")

# ---- helpers ----

function(skip name reason)
  message(STATUS "skipped: ${name}: ${reason}")
  set(lines "${lines}skipped: ${name}: ${reason}\n" PARENT_SCOPE)
endfunction()

# built(<name> <path>): a line for the program if it is there, else one that says why not.
macro(built name path)
  if(EXISTS "${path}")
    message(STATUS "built: ${path}")
    string(APPEND lines "${path}\n")
  else()
    skip(${name} "it did not build: ${build_error}")
  endif()
endmacro()

# run(<command>...): sets build_error to the last line of what it said if it fails, else to nothing.
macro(run)
  set(build_error "")
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(NOT result EQUAL 0)
    string(STRIP "${said}" said)
    message(STATUS "${said}")
    string(REGEX REPLACE ".*\n" "" build_error "${said}")
    if(build_error STREQUAL "")
      set(build_error "${result}")
    endif()
  endif()
endmacro()

find_program(apt_get apt-get)
find_program(apt_cache apt-cache)
find_program(dpkg dpkg)
execute_process(COMMAND id -u OUTPUT_VARIABLE user OUTPUT_STRIP_TRAILING_WHITESPACE)
set(ENV{DEBIAN_FRONTEND} noninteractive)

# install(<package>...) installs what this Debian has of them, if this is root. Failing is no error: who
# calls it looks for what he needs afterwards.
function(install)
  if(NOT apt_get OR NOT user STREQUAL "0")
    return()
  endif()
  message(STATUS "Installing ${ARGN}")
  set(command "${apt_get}" -o DPkg::Lock::Timeout=600 install -y --no-install-recommends -qq ${ARGN})
  execute_process(COMMAND ${command} RESULT_VARIABLE result OUTPUT_QUIET ERROR_QUIET)
  if(NOT result EQUAL 0)
    execute_process(COMMAND "${apt_get}" update -qq OUTPUT_QUIET ERROR_QUIET)
    execute_process(COMMAND ${command} OUTPUT_QUIET ERROR_QUIET)
  endif()
endfunction()

set(newer "${BUILD_DIR}/newer")
# unpack(<result> <package>...) fetches packages of the newer suite, from the mirror that this machine's apt
# uses, and unpacks them below ${newer}/root. The result is empty if that worked, else the reason.
function(unpack result)
  list(JOIN ARGN " " wanted)
  string(SHA1 stamp "${newer_suite} ${wanted}")
  if(EXISTS "${newer}/${stamp}")
    set(${result} "" PARENT_SCOPE)
    return()
  endif()
  if(NOT apt_get OR NOT dpkg)
    set(${result} "there is no apt-get to fetch it with" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${apt_get}" indextargets --format "$(SITE) $(ORIGIN) $(LABEL)"
                  OUTPUT_VARIABLE targets ERROR_QUIET)
  if(NOT targets MATCHES "([^ \n]+) Debian Debian\n")
    set(${result} "apt-get knows no mirror of Debian" PARENT_SCOPE)
    return()
  endif()
  set(mirror "${CMAKE_MATCH_1}")
  set(keyring /usr/share/keyrings/debian-archive-keyring.gpg)
  file(WRITE "${newer}/sources.list" "deb [signed-by=${keyring}] ${mirror} ${newer_suite} main\n")
  file(MAKE_DIRECTORY "${newer}/state/lists/partial" "${newer}/cache/archives/partial" "${newer}/fetched")
  set(options
      -o Dir::State=${newer}/state
      -o Dir::State::status=/var/lib/dpkg/status
      -o Dir::Cache=${newer}/cache
      -o Dir::Etc::SourceList=${newer}/sources.list
      -o Dir::Etc::SourceParts=/dev/null
      -o APT::Sandbox::User=root)
  message(STATUS "Fetching from ${newer_suite}: ${wanted}")
  execute_process(COMMAND "${apt_get}" ${options} update -qq RESULT_VARIABLE failed OUTPUT_QUIET
                  ERROR_VARIABLE said)
  if(failed EQUAL 0)
    execute_process(
      COMMAND "${apt_get}" ${options} download -qq ${ARGN}
      WORKING_DIRECTORY "${newer}/fetched"
      RESULT_VARIABLE failed
      OUTPUT_QUIET
      ERROR_VARIABLE said)
  endif()
  if(NOT failed EQUAL 0)
    string(STRIP "${said}" said)
    string(REGEX REPLACE "\n.*" "" said "${said}")
    set(${result} "${newer_suite}'s packages can't be fetched: ${said}" PARENT_SCOPE)
    return()
  endif()
  file(GLOB packages "${newer}/fetched/*.deb")
  foreach(package IN LISTS packages)
    execute_process(COMMAND "${dpkg}" -x "${package}" "${newer}/root" RESULT_VARIABLE failed)
    if(NOT failed EQUAL 0)
      set(${result} "${package} can't be unpacked" PARENT_SCOPE)
      return()
    endif()
    file(REMOVE "${package}")
  endforeach()
  file(WRITE "${newer}/${stamp}" "${wanted}\n")
  set(${result} "" PARENT_SCOPE)
endfunction()

# version_of(<result> <command>...): the first number with a dot in it that the command says.
function(version_of result)
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE said ERROR_QUIET)
  if(said MATCHES "([0-9]+\\.[0-9]+(\\.[0-9]+)?)")
    set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
  else()
    set(${result} 0 PARENT_SCOPE)
  endif()
endfunction()

function(find_header result name)
  find_path(place NAMES "${name}" PATHS /usr/local/include /usr/include NO_CACHE)
  set(${result} "${place}" PARENT_SCOPE)
endfunction()

# ---- Boost.Asio, libuv ----

if(DEFINED ENV{CXX})
  set(compiler "$ENV{CXX}")
else()
  find_program(compiler NAMES g++ c++ clang++ NO_CACHE)
endif()
set(flags -std=c++20 -O2 -pthread)

# cxx_peer(<name> <source> <header> <package> <linker flag>...)
macro(cxx_peer name source header package)
  find_header(found "${header}")
  if(NOT found)
    install(${package})
    find_header(found "${header}")
  endif()
  if(NOT compiler)
    skip(${name} "there is no C++ compiler")
  elseif(NOT found)
    skip(${name} "<${header}> is missing (Debian: ${package})")
  else()
    set(program "${BUILD_DIR}/peer_${name}")
    set(build_error "")
    if(NOT EXISTS "${program}" OR "${here}/${source}" IS_NEWER_THAN "${program}"
       OR "${here}/peer.hpp" IS_NEWER_THAN "${program}")
      file(REMOVE "${program}")
      run("${compiler}" ${flags} "${here}/${source}" -o "${program}" ${ARGN})
    endif()
    built(${name} "${program}")
  endif()
endmacro()

cxx_peer(asio asio.cpp boost/asio/signal_set.hpp libboost-dev)
cxx_peer(libuv uv.cpp uv.h libuv1-dev -luv)

# ---- Go ----

# context.AfterFunc is of 1.21; an older Go does for the rest.
find_program(go go NO_CACHE)
set(go_version 0)
if(go)
  version_of(go_version "${go}" version)
endif()
if(go_version VERSION_LESS 1.21)
  unpack(reason golang-1.24-go golang-1.24-src)
  if(reason STREQUAL "")
    set(go "${newer}/root/usr/lib/go-1.24/bin/go")
  elseif(NOT go)
    install(golang-go)
    find_program(go go NO_CACHE)
  endif()
endif()
if(NOT go)
  skip(go "there is no Go (Debian: golang-go), and ${reason}")
else()
  set(program "${BUILD_DIR}/peer_go")
  file(REMOVE "${program}")
  # Nothing is fetched, and nothing outside of BUILD_DIR is written to.
  run("${CMAKE_COMMAND}" -E env GOTOOLCHAIN=local GOPROXY=off GOFLAGS=-buildvcs=false CGO_ENABLED=0
      "GOCACHE=${BUILD_DIR}/go-cache" "GOPATH=${BUILD_DIR}/go-path"
      "${CMAKE_COMMAND}" -E chdir "${here}/go" "${go}" build -o "${program}" .)
  built(go "${program}")
endif()

# ---- tokio, signal-hook ----

# TaskTracker came with tokio-util 0.7.10. These are all the crates that the two programs are made of.
set(crates
    addr2line adler ahash allocator-api2 autocfg backtrace bytes cfg-if futures-core futures-macro
    futures-sink futures-task futures-util gimli hashbrown libc memchr miniz-oxide mio object once-cell
    pin-project-lite pin-utils proc-macro2 quote rustc-demangle signal-hook signal-hook-registry slab
    socket2 syn tokio tokio-util unicode-ident version-check zerocopy zerocopy-derive)
list(TRANSFORM crates REPLACE "(.+)" "librust-\\1-dev" OUTPUT_VARIABLE crate_packages)

function(find_rust)
  find_program(cargo cargo NO_CACHE)
  find_program(rustc rustc NO_CACHE)
  set(version 0)
  if(cargo AND rustc)
    version_of(version "${rustc}" --version)
  endif()
  set(cargo "${cargo}" PARENT_SCOPE)
  set(rust_version "${version}" PARENT_SCOPE)
endfunction()

find_rust()
if(rust_version VERSION_LESS 1.70)
  # Debian 12 has an old rustc, and beside it a newer one for browsers.
  install(rustc-web cargo-web)
  find_rust()
  if(rust_version VERSION_LESS 1.70)
    install(rustc cargo)
    find_rust()
  endif()
endif()
if(rust_version VERSION_LESS 1.70)
  foreach(name tokio signal-hook)
    skip(${name} "there is no cargo with a rustc of 1.70 or newer (Debian 12: rustc-web, cargo-web; 13: rustc, cargo)")
  endforeach()
else()
  unpack(reason ${crate_packages})
  if(NOT reason STREQUAL "")
    foreach(name tokio signal-hook)
      skip(${name} "${reason}")
    endforeach()
  else()
    set(registry "${newer}/root/usr/share/cargo/registry")
    foreach(name tokio signal-hook)
      file(GLOB crate "${registry}/${name}-[0-9]*")
      string(REGEX REPLACE ".*/${name}-" "" version_of_${name} "${crate}")
    endforeach()
    # Built from a copy: cargo leaves a Cargo.lock beside the manifest.
    file(COPY "${here}/rust" DESTINATION "${BUILD_DIR}")
    file(WRITE "${BUILD_DIR}/rust/.cargo/config.toml"
         "[source.crates-io]\nreplace-with = \"unpacked\"\n[source.unpacked]\ndirectory = \"${registry}\"\n")
    run("${CMAKE_COMMAND}" -E env "PEER_TOKIO_VERSION=${version_of_tokio}"
        "PEER_SIGNAL_HOOK_VERSION=${version_of_signal-hook}" "CARGO_TARGET_DIR=${BUILD_DIR}/cargo"
        "CARGO_HOME=${BUILD_DIR}/cargo-home"
        "${CMAKE_COMMAND}" -E chdir "${BUILD_DIR}/rust" "${cargo}" build --release --offline --quiet)
    built(tokio "${BUILD_DIR}/cargo/release/peer_tokio")
    built(signal-hook "${BUILD_DIR}/cargo/release/peer_signal_hook")
  endif()
endif()

# ---- folly ----

skip(folly "neither Debian 12 nor Debian 13 has a package of it")

file(WRITE "${BUILD_DIR}/peers.txt" "${lines}")
