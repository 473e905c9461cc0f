# The plugin for NVIDIA GPUs, libqshard_cuda.so: device, kernels, communicator. Built where nvcc is found, and loaded at run
# time by programs that do not know CUDA, so that one build runs with and without a GPU.
#
#   QSHARD_CUDA                 AUTO, ON (an error without nvcc) or OFF
#   QSHARD_CUDA_ARCHITECTURES   machine code for these cards; the last one, virtual, lets the driver compile for newer ones
set(QSHARD_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 100-real 120-real 100-virtual
    CACHE STRING "GPUs that the plugin is built for, as CMAKE_CUDA_ARCHITECTURES")

set(QSHARD_HAVE_CUDA OFF)
if(NOT QSHARD_CUDA STREQUAL "OFF")
    include(CheckLanguage)
    if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND EXISTS /usr/local/cuda/bin/nvcc)
        set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc)
    endif()
    if(NOT CMAKE_CUDA_COMPILER)
        check_language(CUDA)
    endif()
    # What nvcc cannot compile for must be left out before CMake tries it on its test program.
    set(QSHARD_NVCC_VERSION 0)
    if(CMAKE_CUDA_COMPILER)
        execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET)
        if(nvcc_says MATCHES "release ([0-9]+\\.[0-9]+)")
            set(QSHARD_NVCC_VERSION ${CMAKE_MATCH_1})
        endif()
        if(QSHARD_NVCC_VERSION VERSION_LESS 12.4)
            if(QSHARD_CUDA STREQUAL "ON")
                message(FATAL_ERROR "CUDA ${QSHARD_NVCC_VERSION} (${CMAKE_CUDA_COMPILER}) is too old: 12.4 or later is needed")
            endif()
            message(STATUS "No GPU plugin: CUDA ${QSHARD_NVCC_VERSION} is too old, 12.4 or later is needed")
            unset(CMAKE_CUDA_COMPILER)
            unset(CMAKE_CUDA_COMPILER CACHE)
        elseif(QSHARD_NVCC_VERSION VERSION_LESS 12.8)
            list(TRANSFORM QSHARD_CUDA_ARCHITECTURES REPLACE "^100-virtual$" "90-virtual")
            list(FILTER QSHARD_CUDA_ARCHITECTURES EXCLUDE REGEX "^1[0-9][0-9]")
        endif()
    endif()
    # Hopper's attention is made of instructions that only "90a" has.
    list(TRANSFORM QSHARD_CUDA_ARCHITECTURES REPLACE "^90(-real)?$" "90a-real")
    if(CMAKE_CUDA_COMPILER)
        set(CMAKE_CUDA_ARCHITECTURES ${QSHARD_CUDA_ARCHITECTURES})
        enable_language(CUDA)
        find_package(CUDAToolkit REQUIRED)
        set(QSHARD_HAVE_CUDA ON)
    elseif(QSHARD_CUDA STREQUAL "ON")
        message(FATAL_ERROR "QSHARD_CUDA=ON, but no nvcc is found: put it into PATH, or set CUDACXX to its path")
    endif()
endif()

if(QSHARD_HAVE_CUDA)
    file(GLOB QSHARD_CUDA_SOURCES CONFIGURE_DEPENDS kernels/cuda/*.cu kernels/cuda/*.c)
    list(APPEND QSHARD_CUDA_SOURCES src/device/device_cuda.c src/backend/plugin_cuda.c)

    # NCCL carries what several ranks say to each other; one rank needs none.
    find_library(NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR})
    find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
    set(QSHARD_HAVE_NCCL OFF)
    if(NCCL_LIBRARY AND NCCL_INCLUDE_DIR AND NOT QSHARD_KERNELS_ONLY)
        set(QSHARD_HAVE_NCCL ON)
        list(APPEND QSHARD_CUDA_SOURCES src/comm/comm_nccl.c src/comm/comm_nccl_try.c)
    else()
        list(APPEND QSHARD_CUDA_SOURCES src/backend/no_nccl.c)
    endif()

    add_library(qshard_cuda MODULE ${QSHARD_CUDA_SOURCES})
    target_include_directories(qshard_cuda PRIVATE src ${CMAKE_CURRENT_SOURCE_DIR})
    target_include_directories(qshard_cuda SYSTEM PRIVATE ${RANDOM123_INCLUDE_DIR} ${CUDAToolkit_INCLUDE_DIRS})
    target_link_libraries(qshard_cuda PRIVATE qshard_flags CUDA::cudart_static CUDA::cublasLt)
    if(QSHARD_HAVE_NCCL)
        target_include_directories(qshard_cuda SYSTEM PRIVATE ${NCCL_INCLUDE_DIR})
        target_link_libraries(qshard_cuda PRIVATE ${NCCL_LIBRARY})
    endif()
    # As on the CPU, a*b+c is fused only where the source says fmaf.
    target_compile_options(qshard_cuda PRIVATE
        $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;-Xcompiler=-Wall,-Wextra,-Wno-enum-compare,-ffp-contract=off,-fno-math-errno>)
    list(JOIN QSHARD_CUDA_ARCHITECTURES " " QSHARD_CUDA_LIST)
    target_compile_definitions(qshard_cuda PRIVATE
        $<$<COMPILE_LANGUAGE:C>:QSHARD_CUDA_ARCHITECTURES="${QSHARD_CUDA_LIST}">)
    set_target_properties(qshard_cuda PROPERTIES
        CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
        C_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden
        LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}
        BUILD_RPATH "${CUDAToolkit_LIBRARY_DIR}" INSTALL_RPATH "${CUDAToolkit_LIBRARY_DIR}"
        INSTALL_RPATH_USE_LINK_PATH ON)
    install(TARGETS qshard_cuda LIBRARY DESTINATION lib/qshard) # where the program looks for it
endif()
