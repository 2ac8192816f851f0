# cmake -P tests/model/run.cmake: checks every model, as it is and with every planted bug, and prints a table.
# cmake -DFULL=ON -P tests/model/run.cmake: larger configurations too, which take much longer and more memory.
#
# It fails if a clean run has an error or wasn't exhaustive, or if a planted bug isn't found. Spin and a C
# compiler are installed if they are missing (as root with apt). The litmus tests run where there is a cbmc
# (-DCBMC=<path> for one that isn't on the path). -DONLY=<regular expression> picks lines of the table,
# -DJOBS=<n> how many run at once.
cmake_minimum_required(VERSION 3.20)

cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH tests)
cmake_path(GET tests PARENT_PATH root)
set(work "${root}/build/model")
set(models cancellation nudge wait_group signal_trap coordinator)

# ---- What is run: model, definitions for spin, for the C compiler, arguments for the checker

set(runs "")
function(lastcall_runs model compile search)
  foreach(definitions IN LISTS ARGN)
    list(APPEND runs "${model}|${definitions}|${compile}|${search}")
  endforeach()
  set(runs "${runs}" PARENT_SCOPE)
endfunction()

set(safety "-DSAFETY -DCOLLAPSE")
if(FULL)
  lastcall_runs(wait_group "-O2 ${safety} -DMEMLIM=6000" "-m200000" "" "SYMMETRIC" "TIMED")
  lastcall_runs(cancellation "-O1 ${safety} -DMEMLIM=6000" "-m200000"
    "WHO=7" "WHO=11" "WHO=13" "WHO=14" "WHO=19" "WHO=22" "WHO=26" "WHO=28")
  lastcall_runs(coordinator "-O1 ${safety} -DMEMLIM=6000" "-E -m200000"
    "SCENE=1 HOOKS=2" "SCENE=2 HOOKS=2" "SCENE=3 HOOKS=2" "SCENE=4 HOOKS=2" "SCENE=5 HOOKS=2")
  lastcall_runs(signal_trap "-O1 ${safety} -DMEMLIM=6000" "-m200000" "PART=1 MORE" "PART=1 MORE PIPE=2")
endif()

# Clean, the longest first.
lastcall_runs(signal_trap "-O0 ${safety} -DMEMLIM=1900" "-m200000" "PART=2")
lastcall_runs(coordinator "-O0 ${safety} -DMEMLIM=1900" "-E -m200000"
  "SCENE=1" "SCENE=2" "SCENE=3" "SCENE=4" "SCENE=5")
lastcall_runs(wait_group "-O0 ${safety} -DMEMLIM=1900" "-m200000" "ALONE" "ALONE SYMMETRIC")
lastcall_runs(cancellation "-O0 ${safety} -DMEMLIM=1900" "-m200000"
  "WHO=6" "WHO=18" "WHO=10" "WHO=12" "WHO=20" "WHO=37" "WHO=3" "WHO=5" "WHO=9" "WHO=24" "WHO=17")
lastcall_runs(signal_trap "-O0 ${safety} -DMEMLIM=1900" "-m200000" "PART=1" "PART=3" "PART=4" "PART=1 PIPE=2")
lastcall_runs(nudge "-O0 ${safety} -DMEMLIM=1900" "-m200000" "WHAT=1" "WHAT=2")

# Liveness, where the end states don't say it; and that the claim can fail.
lastcall_runs(signal_trap "-O1 -DCOLLAPSE -DMEMLIM=1900" "-a -f -m200000"
  "PART=2 LIVE SIGNALS=1" "BUG=17 PART=2 LIVE SIGNALS=1")

# With each planted bug.
lastcall_runs(cancellation "-O0 ${safety} -DMEMLIM=1900" "-m200000"
  "BUG=1 WHO=3" "BUG=2 WHO=3" "BUG=3 WHO=3" "BUG=4 WHO=3" "BUG=5 WHO=33" "BUG=6 WHO=2" "BUG=7 WHO=3"
  "BUG=8 WHO=2" "BUG=9 WHO=2" "BUG=10 WHO=2" "BUG=11 WHO=8" "BUG=12 WHO=8" "BUG=13 WHO=4" "BUG=14 WHO=1"
  "BUG=15 WHO=2" "BUG=16 WHO=9" "BUG=17 WHO=2" "BUG=18 WHO=17" "BUG=19 WHO=17" "BUG=20 WHO=17"
  "BUG=21 WHO=9" "BUG=22 WHO=3")
lastcall_runs(nudge "-O0 ${safety} -DMEMLIM=1900" "-m200000"
  "BUG=1" "BUG=2" "BUG=3" "BUG=4" "BUG=5" "BUG=6" "BUG=7" "BUG=8" "BUG=9")
lastcall_runs(wait_group "-O0 ${safety} -DMEMLIM=1900" "-m200000"
  "BUG=1" "BUG=2" "BUG=3" "BUG=4" "BUG=5" "BUG=6" "BUG=7" "BUG=8" "BUG=9 SYMMETRIC SIMPLE"
  "BUG=10 SYMMETRIC SIMPLE")
# These are found sooner with the last process first.
lastcall_runs(wait_group "-O0 ${safety} -DREVERSE -DMEMLIM=1900" "-m200000" "BUG=11" "BUG=12" "BUG=13 TIMED")
lastcall_runs(signal_trap "-O0 ${safety} -DMEMLIM=1900" "-m200000"
  "BUG=1 PART=1" "BUG=2 PART=1" "BUG=3 PART=1" "BUG=4 PART=1" "BUG=5 PART=1" "BUG=6 PART=1" "BUG=7 PART=1"
  "BUG=8 PART=1" "BUG=11 PART=2" "BUG=12 PART=2" "BUG=13 PART=2" "BUG=14 PART=2" "BUG=15 PART=2"
  "BUG=16 PART=2" "BUG=17 PART=2" "BUG=18 PART=2" "BUG=19 PART=2" "BUG=20 PART=2" "BUG=21 PART=3"
  "BUG=22 PART=3" "BUG=23 PART=3" "BUG=24 PART=3" "BUG=25 PART=3" "BUG=26 PART=3" "BUG=27 PART=4"
  "BUG=28 PART=4" "BUG=29 PART=4" "BUG=30 PART=4" "BUG=31 PART=4" "BUG=32 PART=4")
lastcall_runs(coordinator "-O0 ${safety} -DMEMLIM=1900" "-E -m200000"
  "BUG=1 SCENE=1" "BUG=2 SCENE=1 HOOKS=2" "BUG=3 SCENE=1" "BUG=4 SCENE=1" "BUG=5 SCENE=1" "BUG=6 SCENE=1 HOOKS=2"
  "BUG=7 SCENE=5" "BUG=8 SCENE=3" "BUG=9 SCENE=1" "BUG=10 SCENE=1" "BUG=11 SCENE=3" "BUG=12 SCENE=2"
  "BUG=13 SCENE=1" "BUG=14 SCENE=1" "BUG=15 SCENE=4" "BUG=16 SCENE=2" "BUG=17 SCENE=4" "BUG=18 SCENE=4"
  "BUG=19 SCENE=2" "BUG=20 SCENE=2")

# Litmus tests: the head of each file says how many bugs it can have.
file(GLOB litmus RELATIVE "${CMAKE_CURRENT_LIST_DIR}" "${CMAKE_CURRENT_LIST_DIR}/litmus/*.c")
if(CBMC)
  foreach(test IN LISTS litmus)
    file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/${test}" bugs REGEX "BUG +[0-9]+ ")
    foreach(memory tso pso)
      list(APPEND runs "${test}||${memory}|cbmc")
      foreach(line IN LISTS bugs)
        if(line MATCHES "BUG +([0-9]+) +\\(([a-z, ]+)\\)" AND CMAKE_MATCH_2 MATCHES "${memory}")
          string(REGEX REPLACE ".*BUG +([0-9]+) .*" "\\1" bug "${line}")
          list(APPEND runs "${test}|BUG=${bug}|${memory}|cbmc")
        endif()
      endforeach()
    endforeach()
  endforeach()
endif()

# ---- One run, in a process of its own; its line of the table goes to a file

function(lastcall_check number)
  list(GET runs ${number} run)
  string(REPLACE "|" ";" run "${run}")
  list(GET run 0 model)
  list(GET run 1 variant)
  list(GET run 2 compile)
  list(GET run 3 search)
  set(place "${work}/${number}")
  file(REMOVE_RECURSE "${place}")
  file(MAKE_DIRECTORY "${place}")
  separate_arguments(definitions UNIX_COMMAND "${variant}")
  list(TRANSFORM definitions PREPEND "-D")
  set(states -)
  set(depth -)
  string(TIMESTAMP begin "%s")
  if(search STREQUAL "cbmc")
    execute_process(
      COMMAND "${CBMC}" --mm ${compile} --no-standard-checks ${definitions}
        "${CMAKE_CURRENT_LIST_DIR}/${model}"
      WORKING_DIRECTORY "${place}" OUTPUT_VARIABLE said ERROR_VARIABLE said TIMEOUT 300)
    set(variant "${variant} ${compile}")
    if(said MATCHES "VERIFICATION SUCCESSFUL")
      set(found clean)
    elseif(said MATCHES "VERIFICATION FAILED")
      set(found error)
    else()
      set(found "no result")
    endif()
  else()
    separate_arguments(compile)
    separate_arguments(search)
    execute_process(
      COMMAND "${SPIN}" ${definitions} -a "${CMAKE_CURRENT_LIST_DIR}/${model}.pml"
      WORKING_DIRECTORY "${place}" RESULT_VARIABLE result OUTPUT_VARIABLE said ERROR_VARIABLE said)
    if(result EQUAL 0)
      execute_process(
        COMMAND "${CC}" ${compile} -w -o pan pan.c
        WORKING_DIRECTORY "${place}" RESULT_VARIABLE result OUTPUT_VARIABLE said ERROR_VARIABLE said)
    endif()
    if(result EQUAL 0)
      execute_process(
        COMMAND ./pan ${search}
        WORKING_DIRECTORY "${place}" OUTPUT_VARIABLE said ERROR_VARIABLE said TIMEOUT 7200)
    endif()
    if(said MATCHES "([0-9.e+]+) states, stored")
      set(states ${CMAKE_MATCH_1})
    endif()
    if(said MATCHES "depth reached ([0-9]+), errors: ([0-9]+)")
      set(depth ${CMAKE_MATCH_1})
      set(errors ${CMAKE_MATCH_2})
      if(errors GREATER 0)
        set(found error)
      elseif(said MATCHES "max search depth too small|out of memory|MEMLIM bound|truncated")
        set(found truncated)
      else()
        set(found clean)
      endif()
    else()
      set(found "no result")
    endif()
  endif()
  string(TIMESTAMP end "%s")
  math(EXPR seconds "${end} - ${begin}")

  set(wanted clean)
  if(variant MATCHES "BUG=")
    set(wanted error)
  endif()
  if(found STREQUAL wanted)
    set(verdict "ok: ${found}")
  else()
    set(verdict "FAILED: ${found}, not ${wanted}")
    message(STATUS "${model} ${variant}: ${found}, not ${wanted}\n${said}")
  endif()
  file(WRITE "${work}/${number}.result" "${model};${variant};${states};${depth};${seconds};${verdict}")
  file(REMOVE_RECURSE "${place}")
endfunction()

if(DEFINED CHECK)
  lastcall_check(${CHECK})
  return()
endif()

# ---- All of them

include("${root}/cmake/Prerequisites.cmake")
set(lastcall_spin "the model checker spin" spin program spin)
set(lastcall_cc "a C compiler" gcc program cc gcc clang)
lastcall_prerequisites(spin cc)
find_program(SPIN spin NO_CACHE REQUIRED)
find_program(CC NAMES cc gcc clang NO_CACHE REQUIRED)
find_program(XARGS xargs NO_CACHE REQUIRED)
if(NOT CBMC)
  find_program(CBMC cbmc NO_CACHE)
  if(CBMC)
    # The table above was made without it: once more, with it.
    set(again ${CMAKE_COMMAND} -DCBMC=${CBMC})
    foreach(option FULL ONLY JOBS)
      if(DEFINED ${option})
        list(APPEND again "-D${option}=${${option}}")
      endif()
    endforeach()
    execute_process(COMMAND ${again} -P "${CMAKE_CURRENT_LIST_FILE}" RESULT_VARIABLE result)
    if(NOT result EQUAL 0)
      message(FATAL_ERROR "The models have not all been checked.")
    endif()
    return()
  endif()
  message(STATUS "Skipped: the litmus tests, since there is no cbmc here (Debian 13 has it)")
endif()

# Every bug that a model can have is in the table.
foreach(model IN LISTS models)
  file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/${model}.pml" lines REGEX "BUG [!=]= [0-9]+")
  foreach(line IN LISTS lines)
    string(REGEX MATCHALL "BUG [!=]= [0-9]+" planted "${line}")
    foreach(bug IN LISTS planted)
      string(REGEX REPLACE "[^0-9]" "" bug "${bug}")
      if(NOT runs MATCHES "${model}\\|BUG=${bug}[| ]")
        message(FATAL_ERROR "${model}.pml: BUG ${bug} is planted, but not run")
      endif()
    endforeach()
  endforeach()
endforeach()

if(NOT JOBS)
  set(JOBS 2)
endif()
file(REMOVE_RECURSE "${work}")
file(MAKE_DIRECTORY "${work}")
list(LENGTH runs count)
set(numbers "")
set(picked "")
math(EXPR last "${count} - 1")
foreach(number RANGE ${last})
  list(GET runs ${number} run)
  if(NOT ONLY OR run MATCHES "${ONLY}")
    string(APPEND numbers "-DCHECK=${number}\n")
    list(APPEND picked ${number})
  endif()
endforeach()
file(WRITE "${work}/numbers" "${numbers}")
string(TIMESTAMP begin "%s")
execute_process(
  COMMAND "${XARGS}" -P ${JOBS} -I THIS "${CMAKE_COMMAND}" "-DFULL=${FULL}" "-DCBMC=${CBMC}" "-DSPIN=${SPIN}"
    "-DCC=${CC}" THIS -P "${CMAKE_CURRENT_LIST_FILE}"
  INPUT_FILE "${work}/numbers" RESULT_VARIABLE result)
string(TIMESTAMP end "%s")
math(EXPR seconds "${end} - ${begin}")

# ---- The table

function(lastcall_line)
  set(line "")
  set(widths 20 18 10 7 8)
  foreach(cell width IN ZIP_LISTS ARGN widths)
    if(NOT width)
      set(width 0)
    endif()
    string(LENGTH "${cell}" length)
    math(EXPR gap "${width} - ${length}")
    if(gap LESS 0)
      set(gap 0)
    endif()
    string(REPEAT " " ${gap} gap)
    string(APPEND line "${cell}${gap}  ")
  endforeach()
  string(STRIP "${line}" line)
  message("${line}")
endfunction()

lastcall_line(model variant states depth seconds verdict)
set(failed 0)
list(LENGTH picked count)
foreach(number IN LISTS picked)
  list(GET runs ${number} run)
  set(cells "${run};;;;FAILED: it left no result")
  if(EXISTS "${work}/${number}.result")
    file(READ "${work}/${number}.result" cells)
  endif()
  lastcall_line(${cells})
  if(cells MATCHES "FAILED")
    math(EXPR failed "${failed} + 1")
  endif()
endforeach()
message("${count} runs in ${seconds} s, ${failed} failed")
if(failed GREATER 0 OR NOT result EQUAL 0)
  message(FATAL_ERROR "The models have not all been checked.")
endif()
