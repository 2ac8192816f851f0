# Builds one consumer project from nothing and runs it:
#   cmake -D KIND=find_package -D SOURCE=<lastcall> -D BUILD=<a lastcall build> -D CXX=<compiler>
#         -D VERSION=0.1.0 -P run.cmake
# The installed kinds install that build below ${BUILD}/package first, then move the tree: what is
# installed has to work wherever it has been copied to.
set(work "${BUILD}/package/${KIND}")
set(consumer "${SOURCE}/tests/package/${KIND}")
file(REMOVE_RECURSE "${work}")
file(MAKE_DIRECTORY "${work}")

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result COMMAND_ECHO STDOUT)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${KIND}: ${result} from ${ARGV}")
  endif()
endfunction()

set(prefix "${work}/moved")
if(KIND MATCHES "find_package|pkg_config")
  run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${work}/installed")
  file(RENAME "${work}/installed" "${prefix}")
  if(NOT EXISTS "${prefix}/share/doc/lastcall/LICENSE")
    message(FATAL_ERROR "${KIND}: the licence has not come along")
  endif()
endif()

if(KIND STREQUAL "pkg_config")
  file(MAKE_DIRECTORY "${work}/build")
  set(ENV{PKG_CONFIG_PATH} "${prefix}/share/pkgconfig")
  run(pkg-config --exact-version=${VERSION} lastcall)
  execute_process(COMMAND pkg-config --cflags lastcall OUTPUT_VARIABLE flags)
  if(NOT flags MATCHES "-I[^ ]*/moved/[^ ]*include -pthread")
    message(FATAL_ERROR "pkg-config says: ${flags}")
  endif()
  run(make -C "${consumer}" "CXX=${CXX}" "BUILD=${work}/build")
else()
  string(REGEX MATCH "^[0-9]+" major "${VERSION}")
  run("${CMAKE_COMMAND}" -S "${consumer}" -B "${work}/build" "-DCMAKE_CXX_COMPILER=${CXX}"
      -DCMAKE_BUILD_TYPE=Debug "-DLASTCALL_SOURCE_DIR=${SOURCE}" "-DCMAKE_PREFIX_PATH=${prefix}"
      "-DLASTCALL_VERSION=${VERSION}" "-DLASTCALL_VERSION_MAJOR=${major}")
  run("${CMAKE_COMMAND}" --build "${work}/build")
endif()
run("${work}/build/consumer")
