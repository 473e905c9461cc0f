# Version and build facts for `qshard --version`: the commit and whether the tree was clean.
execute_process(COMMAND git -C ${CMAKE_CURRENT_SOURCE_DIR} describe --always --dirty --exclude=*
                OUTPUT_VARIABLE QSHARD_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT QSHARD_COMMIT)
    set(QSHARD_COMMIT "unknown")
endif()
string(TOUPPER "${CMAKE_BUILD_TYPE}" QSHARD_BUILD_TYPE_UPPER)
string(STRIP "${CMAKE_C_FLAGS} ${CMAKE_C_FLAGS_${QSHARD_BUILD_TYPE_UPPER}}" QSHARD_C_FLAGS)
configure_file(${CMAKE_CURRENT_SOURCE_DIR}/cmake/version.h.in
               ${CMAKE_CURRENT_BINARY_DIR}/generated/qshard_version.h)
add_library(qshard_version INTERFACE)
target_include_directories(qshard_version INTERFACE ${CMAKE_CURRENT_BINARY_DIR}/generated)
