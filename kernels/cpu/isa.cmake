# The inner loops are compiled once per instruction set and chosen at run time (kernels/cpu/isa.c). They are optimized in
# debug and sanitizer builds too: at -O0 the tests would take minutes.
set(QSHARD_KERNEL_OPTIONS -O3 -Wno-psabi)
set_source_files_properties(kernels/cpu/isa_portable.c PROPERTIES COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set_source_files_properties(kernels/cpu/isa_avx2.c PROPERTIES
        COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS};-mavx2;-mfma;-mf16c")
    set_source_files_properties(kernels/cpu/isa_avx512.c PROPERTIES
        COMPILE_OPTIONS "${QSHARD_KERNEL_OPTIONS};-mavx512f;-mavx512bw;-mavx512vl;-mfma;-mf16c;-mprefer-vector-width=512")
endif()
