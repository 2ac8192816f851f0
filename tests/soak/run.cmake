# A service under load for as long as you like, and nothing may grow or be lost:
#   cmake [-DMINUTES=2] [-DPLANT=leak] -P tests/soak/run.cmake
# PLANT has the service make a mistake on purpose (leak, descriptor, thread, lost, early): then this has to
# fail. The build tree is build/soak.
cmake_minimum_required(VERSION 3.22)
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
cmake_path(GET source PARENT_PATH source)
include("${source}/cmake/Prerequisites.cmake")
set(build "${source}/build/soak")
if(NOT DEFINED MINUTES)
  set(MINUTES 2)
endif()

lastcall_prerequisites(compiler make catch2)
message(STATUS "Building the service and its clients")
lastcall_run("${CMAKE_COMMAND}" -S "${source}" -B "${build}" -G "Unix Makefiles" --log-level=WARNING
             -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLASTCALL_BUILD_EXAMPLES=OFF)
execute_process(
  COMMAND "${CMAKE_COMMAND}" --build "${build}" --parallel ${LASTCALL_JOBS} --target soak
  RESULT_VARIABLE result
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${output}")
endif()
set(plant "")
if(DEFINED PLANT)
  set(plant --plant "${PLANT}")
endif()
lastcall_run("${build}/tests/soak/soak_driver" "${build}/tests/soak/soak_service" --minutes
             ${MINUTES} ${plant})
