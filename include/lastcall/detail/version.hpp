// The version of the library. CMakeLists.txt reads it from here: this is its only place.
#pragma once

#define LASTCALL_VERSION_MAJOR 0
#define LASTCALL_VERSION_MINOR 1
#define LASTCALL_VERSION_PATCH 0

/// For comparisons: major * 10000 + minor * 100 + patch.
#define LASTCALL_VERSION \
  (LASTCALL_VERSION_MAJOR * 10000 + LASTCALL_VERSION_MINOR * 100 + LASTCALL_VERSION_PATCH)
