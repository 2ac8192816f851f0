# Builds the fuzz targets with libFuzzer, AddressSanitizer and UBSan, and runs them, two at a time:
#   cmake [-DSECONDS=60] [-DONLY=tree] -P tests/fuzz/run.cmake
# SECONDS is how long the runs take in all; ONLY names one target. Each starts from tests/fuzz/corpus and
# keeps what it finds worth keeping in build/fuzz/corpus, from which the next run goes on. An input that
# fails is written to build/fuzz/found; to see it fail again:
#   build/fuzz/tests/fuzz/<target>_fuzz build/fuzz/found/<file>
# CXX of the environment may name another clang++ with its libFuzzer.
cmake_minimum_required(VERSION 3.22)
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
cmake_path(GET source PARENT_PATH source)
include("${source}/cmake/Prerequisites.cmake")
set(build "${source}/build/fuzz")
set(jobs 2)
set(longest_input 400)
if(NOT DEFINED SECONDS)
  set(SECONDS 60)
endif()

# See cmake/Prerequisites.cmake.
set(lastcall_clang "clang 14" clang-14 program clang++-14)
set(lastcall_fuzzer "clang 14's libFuzzer" libclang-rt-14-dev header
                    ../lib/llvm-14/lib/clang/14.0.6/include/fuzzer/FuzzedDataProvider.h)
if(DEFINED ENV{CXX})
  set(compiler "$ENV{CXX}")
  lastcall_prerequisites(make catch2)
else()
  set(compiler clang++-14)
  lastcall_prerequisites(make catch2 clang fuzzer)
endif()

function(quietly)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${output}")
  endif()
endfunction()
message(STATUS "Building the fuzz targets with ${compiler}")
quietly("${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "Unix Makefiles"
        "-DCMAKE_CXX_COMPILER=${compiler}" -DCMAKE_BUILD_TYPE=None -DLASTCALL_FUZZ=ON
        -DLASTCALL_BUILD_EXAMPLES=OFF -DLASTCALL_WARNINGS_AS_ERRORS=ON)
quietly("${CMAKE_COMMAND}" --build "${build}" --parallel ${LASTCALL_JOBS} --target fuzz)

file(GLOB targets "${CMAKE_CURRENT_LIST_DIR}/*_fuzz.cpp")
list(TRANSFORM targets REPLACE ".*/(.*)_fuzz\\.cpp$" "\\1")
if(DEFINED ONLY)
  set(targets "${ONLY}")
endif()
list(LENGTH targets count)
math(EXPR rounds "(${count} + ${jobs} - 1) / ${jobs}")
math(EXPR each "${SECONDS} / ${rounds}")
if(each LESS 1)
  set(each 1)
endif()
message(STATUS "Running ${count} targets for ${each} s each, ${jobs} at a time")
file(MAKE_DIRECTORY "${build}/found" "${build}/log")

# What a target says goes to its log; a shell starts it, since two commands of one execute_process() run at
# the same time, and their outputs would mix.
function(command_of target out)
  file(MAKE_DIRECTORY "${build}/corpus/${target}")
  set(kept "${CMAKE_CURRENT_LIST_DIR}/corpus/${target}")
  set(options "-max_total_time=${each} -max_len=${longest_input} -len_control=0 -timeout=60"
              "-print_final_stats=1 -artifact_prefix=${build}/found/${target}-"
              # The trap's target has handlers of its own for these.
              "-handle_int=0 -handle_term=0 -handle_usr1=0 -handle_usr2=0 -malloc_limit_mb=2000")
  list(JOIN options " " options)
  set(${out}
      "'${build}/tests/fuzz/${target}_fuzz' ${options} '${build}/corpus/${target}' '${kept}' >'${build}/log/${target}' 2>&1"
      PARENT_SCOPE)
endfunction()

set(failed "")
function(report target result)
  file(READ "${build}/log/${target}" log)
  string(REGEX MATCH "number_of_executed_units: *([0-9]+)" match "${log}")
  set(runs "${CMAKE_MATCH_1}")
  string(REGEX MATCH "INITED[^\n]*ft: ([0-9]+) corp: ([0-9]+)" match "${log}")
  set(before "${CMAKE_MATCH_1}")
  string(REGEX MATCHALL "cov: [0-9]+ ft: [0-9]+ corp: [0-9]+" matches "${log}")
  list(POP_BACK matches last)
  string(REGEX MATCH "cov: ([0-9]+) ft: ([0-9]+) corp: ([0-9]+)" match "${last}")
  message(STATUS "${target}: ${runs} runs, ${CMAKE_MATCH_1} edges covered, ${before} features at first and ${CMAKE_MATCH_2} at last, ${CMAKE_MATCH_3} inputs kept")
  if(NOT result EQUAL 0)
    string(LENGTH "${log}" length)
    if(length GREATER 8000)
      math(EXPR start "${length} - 8000")
      string(SUBSTRING "${log}" ${start} -1 log)
    endif()
    message("${log}")
    set(failed ${failed} ${target} PARENT_SCOPE)
  endif()
endfunction()

while(targets)
  list(POP_FRONT targets first second)
  command_of(${first} run_first)
  set(commands COMMAND sh -c "${run_first}")
  if(second)
    command_of(${second} run_second)
    list(APPEND commands COMMAND sh -c "${run_second}")
  endif()
  execute_process(${commands} RESULTS_VARIABLE results)
  list(POP_FRONT results first_result second_result)
  report(${first} "${first_result}")
  if(second)
    report(${second} "${second_result}")
  endif()
  unset(second)
endwhile()
if(failed)
  list(JOIN failed ", " failed)
  message(FATAL_ERROR "Found something, see ${build}/found: ${failed}")
endif()
