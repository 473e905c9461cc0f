#!/usr/bin/env bash
# Fills the folder that tests/gpu.sh takes along to a machine with a GPU and without a network: what that machine may lack.
#
#   tests/gpu_deps.sh [FOLDER]         default build/gpu-deps; at most 40 MiB, which is checked and printed
#
#   FOLDER/prefix    Open MPI, HDF5, Criterion, Jansson, libyaml, xxHash, hwloc, OpenSSL, Random123, pkg-config: headers and
#                    libraries out of the Debian or Ubuntu packages of this machine's release, cut to what is linked
#   FOLDER/inputs    small models with token files: the seed-made tiny one, and the cases of tests/oracle; of SmolLM2 the token
#                    files alone, if QSHARD_SMOLLM2 or build/smollm2 is that model
#
# Packages come by `apt-get download` and are unpacked, not installed: no root needed. Run it on a release whose C library is
# not newer than that of the machine with the GPU; tests/gpu.sh checks there that everything loads.
set -euo pipefail
cd "$(dirname "$0")/.."
. cmake/deps.sh

readonly limit_mib=40
readonly wanted='openmpi-bin libopenmpi-dev libhdf5-dev libcriterion-dev libjansson-dev libyaml-dev libxxhash-dev
    libhwloc-dev librandom123-dev libssl-dev pkgconf'
# What every machine with a compiler has, and what only fast networks, Java and X need.
readonly unwanted='^(lib(c6|c-|gcc|gfortran|stdc|asan|tsan|ubsan|lsan|itm|atomic|quadmath|binutils|ctf|gprofng|cc1|isl|mpc|mpfr|perl|pam|selinux|semanage|sepol|audit|x11|xcb|xau|xdmcp|xext|icu|xml2|js-|crypt-|crypt1|db5|jpeg|nsl|tirpc|gomp|fido|cbor|bsd0|md0|cap|tinfo|edit2|gdbm|ucx|fabric|psm|gssrpc|kadm|kdb|hwloc-plugins|pciaccess|rdmacm|ibverbs|nl-|numa|gmpxx|drm|lzma|debconf|acl1|bz2|uuid|hdf5-(hl|cpp|fortran)|xnvctrl|ltdl)|gcc|g\+\+|cpp|gfortran|binutils|linux-libc|perl|dpkg|tar$|debconf|adduser|passwd|openssh|debianutils|rpcsvc|ibverbs|zlib1g-dev|comerr|krb5-multidev|nettle-dev|autoconf|automake|autotools|m4$|hdf5-helpers)'

folder=${1:-build/gpu-deps}
mkdir -p "$folder" build
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$folder/prefix
rm -rf "$prefix" "$folder/inputs"
mkdir -p "$prefix"/{bin,etc,include,lib,share} "$work"/{none/partial,debs,root}

fail() {
    echo "gpu_deps.sh: $*" >&2
    exit 1
}

# ---- packages ----
for tool in apt-get dpkg-deb readelf; do
    command -v "$tool" >/dev/null || fail "$tool is not here: run this on Debian or Ubuntu"
done
list_packages() { # as if nothing were installed
    # shellcheck disable=SC2086  # a list of words
    apt-get install -y --print-uris --no-install-recommends -o Dir::State::status=/dev/null \
        -o Dir::Cache::archives="$work/none" $wanted 2>/dev/null |
        sed -n "s/^'[^']*' \([^_]*\)_.*/\1/p" | grep -Ev "$unwanted" | sort -u
}
mapfile -t packages < <(list_packages)
[ "${#packages[@]}" -gt 20 ] || fail "apt knows no packages: run apt-get update first"
(cd "$work/debs" && apt-get download "${packages[@]}" >../download.log 2>&1) || {
    tail -n 3 "$work/download.log" >&2
    fail "the packages cannot be downloaded"
}
for deb in "$work"/debs/*.deb; do
    dpkg-deb -x "$deb" "$work/root"
done

# ---- headers ----
root=$work/root
triplet=$(cd "$root/usr/lib" && echo *-linux-gnu*)
lib=$root/usr/lib/$triplet
cp "$lib"/openmpi/include/mpi*.h "$prefix/include/"
find "$root/usr/include/hdf5/serial" -name 'H5[a-zA-Z]*public.h' -exec cp {} "$prefix/include/" \;
cp "$root"/usr/include/hdf5/serial/{hdf5,H5public,H5pubconf,H5version,H5api_adpt,H5Epubgen,H5FD*}*.h "$prefix/include/"
cp -r "$root"/usr/include/{criterion,openssl,hwloc,hwloc.h,Random123,yaml.h,xxhash.h,xxh3.h,jansson.h,jansson_config.h} \
    "$prefix/include/" 2>/dev/null || true # some releases keep a few of them elsewhere
cp -r "$root/usr/include/$triplet/." "$prefix/include/" 2>/dev/null || true
rm -rf "$prefix"/include/{curl,ffi*}

# ---- libraries: what the program and the tests link, and what that needs in turn ----
declare -A copied=()
find_library() { # of this name, anywhere in the packages
    find "$root/usr/lib/$triplet" "$root/lib/$triplet" -maxdepth 1 -name "$1" -print -quit 2>/dev/null
}
needed_by() {
    readelf -d "$1" 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'
}
copy_library() { # NAME as others ask for it; returns 1 if no package has it
    local name=$1 file needed
    [ -z "${copied[$name]:-}" ] || return 0
    file=$(find_library "$name")
    [ -n "$file" ] || return 1
    copied[$name]=1
    cp -L "$file" "$prefix/lib/$name"
    for needed in $(needed_by "$file"); do
        copy_library "$needed" || true # the C library and the compiler's
    done
}
link_library() { # DEV-NAME FILE: what the linker asks for
    local soname
    soname=$(readelf -d "$2" | sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p')
    copy_library "$soname" || fail "no package has $soname"
    ln -sf "$soname" "$prefix/lib/$1"
}
link_library libmpi.so "$(find_library 'libmpi.so.*.*')"
link_library libhdf5.so "$(find_library 'libhdf5_serial.so.*.*')"
for name in criterion jansson yaml xxhash hwloc crypto ssl; do
    link_library "lib$name.so" "$(readlink -f "$(find_library "lib$name.so")")"
done
for soname in libpmix.so.2 $(needed_by "$root/usr/bin/pkgconf" | grep pkgconf) $(needed_by "$root/usr/bin/orterun"); do
    copy_library "$soname" || case $soname in libpmix* | libpkgconf*) fail "no package has $soname" ;; esac
done

# Plugins of Open MPI and PMIx, but those for what nobody calls and for networks whose libraries were left out.
copy_plugins() { # FROM TO
    local plugin needed
    mkdir -p "$2"
    for plugin in "$1"/*mca_*.so; do
        case ${plugin##*/} in
        mca_atomic_* | mca_fcoll_* | mca_fs_* | mca_io_* | mca_memheap_* | mca_scoll_* | mca_sharedfp_* | mca_spml_* | \
            mca_sshmem_*) continue ;; # OpenSHMEM and MPI-IO
        esac
        for needed in $(needed_by "$plugin"); do
            case $needed in
            libfabric* | libuc[pst]* | libpsm* | libibverbs* | librdmacm* | libnl* | libmunge* | libmca_common_ofi* | \
                libmca_common_ucx* | libmca_common_verbs* | liboshmem*) continue 2 ;;
            esac
        done
        cp -L "$plugin" "$2/"
        for needed in $(needed_by "$plugin"); do
            copy_library "$needed" || true
        done
    done
}
copy_plugins "$lib/openmpi/lib/openmpi3" "$prefix/lib/$triplet/openmpi/lib/openmpi3"
copy_plugins "$(dirname "$(find "$lib/pmix2" -name '*mca_*.so' -print -quit)")" "$prefix/lib/pmix"
mkdir -p "$prefix/share/openmpi"
cp "$root"/usr/share/openmpi/help-*.txt "$prefix/share/openmpi/"
for share in "$root"/usr/share/pmix* "$lib"/pmix2/share/pmix; do
    [ ! -d "$share" ] || cp -r "$share" "$prefix/share/pmix"
done
cp -r "$root/etc/openmpi" "$prefix/etc/"
cp -L "$root/usr/bin/orterun" "$prefix/bin/mpirun"
cp -L "$root/usr/bin/orted" "$prefix/bin/orted"
cp -L "$root/usr/bin/pkgconf" "$prefix/bin/pkg-config"

# pkg-config files that find themselves.
mkdir -p "$prefix/lib/pkgconfig"
for name in criterion jansson yaml-0.1 libxxhash hwloc libcrypto libssl openssl; do
    # shellcheck disable=SC2016  # pkg-config's variable
    sed -e 's|^prefix=.*|prefix=${pcfiledir}/../..|' -e 's|^exec_prefix=.*|exec_prefix=${prefix}|' \
        -e 's|^libdir=.*|libdir=${prefix}/lib|' -e 's|^includedir=.*|includedir=${prefix}/include|' \
        -e '/^Requires.private/d' -e '/^Libs.private/d' "$lib/pkgconfig/$name.pc" >"$prefix/lib/pkgconfig/$name.pc"
done
find "$prefix" -name '*.so*' -type f -exec chmod u+w,a+r {} + -exec strip --strip-unneeded {} + 2>/dev/null || true

# ---- inputs ----
require_python
tests/gpu/make_inputs.sh "$folder/inputs" "$PWD/$python"

# ---- what became of it ----
{
    . /etc/os-release
    echo "${PRETTY_NAME:-unknown}, C library $(ldd --version | sed -n '1s/.* //p')"
    (cd "$work/debs" && echo *.deb)
} >"$folder/packages.txt"
kib=$(du -sk --apparent-size "$folder" | cut -f 1)
echo "$folder: $((kib / 1024)) MiB: $(find "$prefix/lib" -name '*.so*' | wc -l) libraries of ${#packages[@]} packages," \
    "$(du -sk "$folder/inputs" | cut -f 1) KiB of inputs"
[ "$kib" -le $((limit_mib * 1024)) ] || fail "that is more than $limit_mib MiB"
