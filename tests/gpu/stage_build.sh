#!/usr/bin/env bash
# Stage build of tests/gpu.sh.
# shellcheck disable=SC2015,SC2317  # functions are called through check
. tests/gpu/common.sh
: >"$part"

options=(-S . -B "$build" -D CMAKE_BUILD_TYPE=Release)
command -v cmake >/dev/null || refuse "no cmake"
command -v ninja >/dev/null && options+=(-G Ninja)
from_prefix=() missing=()

# take NAME TEST-COMMAND -- CMAKE-OPTIONS: from the prefix if the test says that the machine lacks it
take() {
    local name=$1 words=() file=$2
    shift 2
    while [ "$1" != -- ]; do
        words+=("$1")
        shift
    done
    shift
    if "${words[@]}" >/dev/null 2>&1; then
        return
    elif [ -e "$prefix/$file" ]; then
        from_prefix+=("$name")
        options+=("$@")
    else
        missing+=("$name")
    fi
}

if ! command -v "${PKG_CONFIG:-pkg-config}" >/dev/null; then
    take pkg-config bin/pkg-config false -- -D "PKG_CONFIG_EXECUTABLE=$prefix/bin/pkg-config"
fi
if [ -d "$prefix/lib/pkgconfig" ]; then # behind what the machine has itself
    export PKG_CONFIG_PATH=${PKG_CONFIG_PATH:+$PKG_CONFIG_PATH:}$prefix/lib/pkgconfig
fi
pkgconf=$(command -v "${PKG_CONFIG:-pkg-config}" || echo "$prefix/bin/pkg-config")
has_package() {
    PKG_CONFIG_PATH='' "$pkgconf" --exists "$1"
}
take MPI lib/libmpi.so command -v mpicc -- -D MPI_C_LIB_NAMES=mpi -D "MPI_mpi_LIBRARY=$prefix/lib/libmpi.so" \
    -D "MPI_C_HEADER_DIR=$prefix/include" -D MPI_SKIP_COMPILER_WRAPPER=ON
take HDF5 lib/libhdf5.so hdf5_exists -- -D "HDF5_ROOT=$prefix"
take OpenSSL lib/libcrypto.so header_found openssl/evp.h -- -D "OPENSSL_ROOT_DIR=$prefix"
take Random123 include/Random123/philox.h header_found Random123/philox.h -- -D "RANDOM123_INCLUDE_DIR=$prefix/include"
for name in jansson yaml-0.1 libxxhash hwloc criterion; do
    take "$name" "lib/pkgconfig/$name.pc" has_package "$name" --
done
[ "${#from_prefix[@]}" = 0 ] || {
    say "- from ${deps##"$PWD"/}: ${from_prefix[*]}"
    options+=(-D "CMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,$prefix/lib")
}
# cuBLASLt and NCCL may be there as Python's packages only, without the names that a linker looks for.
from_wheels() {
    local toolkit wheels library header name
    toolkit=$(dirname "$(dirname "$(readlink -f "$(nvcc_path)")")")
    wheels=$([ -z "$python" ] || "$python" -c 'import nvidia; print(*nvidia.__path__)' 2>/dev/null)
    [ -n "$wheels" ] || return 0
    for name in cublasLt nccl; do
        if [ -z "$(find -L "$toolkit" -name "lib$name.so" -print -quit 2>/dev/null)" ] && ! header_found "$name.h"; then
            # shellcheck disable=SC2086  # a list of folders
            library=$(find $wheels -name "lib$name.so.*" -print -quit) header=$(find $wheels -name "$name.h" -print -quit)
            if [ -n "$library" ] && [ -n "$header" ]; then
                say "- $name from ${library%/*}"
                case $name in
                nccl) options+=(-D "NCCL_LIBRARY=$library" -D "NCCL_INCLUDE_DIR=${header%/*}") ;;
                *) options+=(-D "CUDA_cublasLt_LIBRARY=$library" -D "CMAKE_C_FLAGS=-isystem ${header%/*}") ;;
                esac
            fi
        fi
    done
}

kernels_only=OFF
for name in ${missing[@]+"${missing[@]}"}; do
    cannot "$name" "neither on this machine nor in ${deps##"$PWD"/}: tests/gpu_deps.sh brings it"
    [ "$name" = criterion ] || kernels_only=ON
done
case " ${missing[*]-} " in
*' pkg-config '* | *' Random123 '*) refuse "nothing can be built without pkg-config and Random123" ;;
esac
case "$kernels_only ${missing[*]-}" in
ON*) cannot "the program qshard" "built are the kernels and their tests alone" ;;
*criterion*) options+=(-D QSHARD_TESTS=OFF) ;; # the full tests ask for Criterion
esac
options+=(-D "QSHARD_KERNELS_ONLY=$kernels_only")

if [ "$mode" = emulated ]; then
    options+=(-D QSHARD_CUDA=OFF)
    targets=(qshard_emulated)
elif nvcc_path >/dev/null; then
    options+=(-D QSHARD_CUDA=ON -D "QSHARD_CUDA_ARCHITECTURES=$(card_architecture)" -D "CMAKE_CUDA_COMPILER=$(nvcc_path)")
    targets=(qshard_cuda)
    from_wheels
    say "- for $(card_architecture)$(have_gpu || echo ", without a GPU at hand")"
else
    refuse "no nvcc in PATH, CUDACXX or /usr/local/cuda"
fi

check configure cmake "${options[@]}" || finish
targets+=(bench_ops bench_products op_dump)
[ "$kernels_only" = ON ] || targets+=(qshard make_tokens)
case " ${missing[*]-} " in
*' criterion '*) cannot "the kernels' tests" "they need Criterion" ;;
*)
    for file in tests/twins/test_{twin,core}_*.c; do
        targets+=("$(basename "$file" .c)")
    done
    ;;
esac
case "$kernels_only ${missing[*]-} " in
ON* | *' criterion '*) ;;
*) targets+=(case_{half,tile,pairs,isa} test_ops_{products,linear,attention,lora,bits}) ;; # for stage cpu
esac
check compile cmake --build "$build" -j "$(nproc)" --target "${targets[@]}" || finish

# Everything loads; a library that is missing is named here, not by the first stage that stumbles.
loads() {
    local lines
    lines=$(ldd "$1" | grep -E 'not found' || true)
    echo "$lines"
    [ -z "$lines" ]
}
for name in qshard bench_ops "${plugin##*/}"; do
    [ ! -e "$build/$name" ] || check "$name loads" loads "$build/$name"
done
if [ -e "$qshard" ]; then
    check "qshard starts" "$qshard" --version
fi

# Without a driver, device: cuda is one clear line and exit 8.
refuses() { # WORK
    local code=0 text case=$deps/inputs/tiny2
    "$qshard" quantize "$case/model" -o "$1/base.h5" || return 1
    text=$("$qshard" train "$case/run.yaml" --set base="$1/base.h5" --set data.train="$case/train.h5" --set data.eval= \
        --set lora.init= --set output="$1/run" --set device=cuda 2>&1) || code=$?
    echo "$text"
    [ "$code" = 8 ] && [ "$(echo "$text" | grep -c '^error\[')" = 1 ]
}
if [ -x "$qshard" ] && ! have_gpu; then
    if [ -d "$deps/inputs/tiny2" ]; then
        work=$(mktemp -d)
        check "device: cuda is refused without a GPU" refuses "$work"
        say "  $(grep -h '^error\[' "$report"/build.device*.log)"
        rm -rf "$work"
    else
        cannot "the refusal of device: cuda" "no inputs in ${deps##"$PWD"/}: tests/gpu_deps.sh makes them"
    fi
fi
finish
