# Install rules: headers, a package for find_package(lastcall), a file for pkg-config, and the licence. Nothing
# of it depends on the processor, so that all of it goes below share/ and serves every architecture.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/lastcall" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")

install(TARGETS lastcall EXPORT lastcallTargets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/lastcall")
install(EXPORT lastcallTargets NAMESPACE lastcall:: DESTINATION "${package_dir}")
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/lastcallConfig.cmake.in" "${PROJECT_BINARY_DIR}/lastcallConfig.cmake"
  INSTALL_DESTINATION "${package_dir}" NO_SET_AND_CHECK_MACRO)
# Until 1.0 a minor version may change what the one before it promised.
if(PROJECT_VERSION VERSION_LESS 1.0)
  set(compatible_with SameMinorVersion)
else()
  set(compatible_with SameMajorVersion)
endif()
write_basic_package_version_file(
  "${PROJECT_BINARY_DIR}/lastcallConfigVersion.cmake"
  VERSION ${PROJECT_VERSION}
  COMPATIBILITY ${compatible_with}
  ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/lastcallConfig.cmake"
              "${PROJECT_BINARY_DIR}/lastcallConfigVersion.cmake"
        DESTINATION "${package_dir}")

# The .pc file finds the headers from where it lies itself, so that an installed tree can be moved;
# where a packager has set absolute directories, they are used as they are.
if(IS_ABSOLUTE "${CMAKE_INSTALL_DATADIR}" OR IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(LASTCALL_PC_PREFIX "${CMAKE_INSTALL_PREFIX}")
  set(LASTCALL_PC_INCLUDEDIR "${CMAKE_INSTALL_FULL_INCLUDEDIR}")
else()
  file(RELATIVE_PATH up "/prefix/${CMAKE_INSTALL_DATADIR}/pkgconfig" "/prefix")
  string(REGEX REPLACE "/$" "" up "${up}")
  set(LASTCALL_PC_PREFIX "\${pcfiledir}/${up}")
  set(LASTCALL_PC_INCLUDEDIR "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file("${PROJECT_SOURCE_DIR}/cmake/lastcall.pc.in" "${PROJECT_BINARY_DIR}/lastcall.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/lastcall.pc" DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig")
