# shellcheck shell=bash
# What the build and the tests need from the system: sourced by quickstart.sh and test.sh.
#
#   require_system build|test    installs what is missing with apt (as root, on Debian or Ubuntu), or says what is
#                                missing with the apt, module and Spack line, and leaves with code 8
#   wish "APT PACKAGES" CHECK... installs them with apt, as root, unless CHECK succeeds; where it cannot, nothing is said:
#                                the tests that want them say why they are skipped
#   require_python               makes build/venv with src/prep/requirements.txt; sets $python
# Nothing is installed where everything is there, so a loaded set of modules works as it is.

apt_logged() {
    DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends "$@" >>build/apt.log 2>&1
}

header_exists() {
    printf '#include <%s>\n' "$1" | "${CC:-cc}" -E -x c - >/dev/null 2>&1
}

cmake_is_new() {
    command -v cmake >/dev/null &&
        [ "$(printf '3.25\n%s\n' "$(cmake --version | sed -n '1s/[^0-9]*//p')" | sort -V | head -n 1)" = 3.25 ]
}

python_has_venv() {
    python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1
}

hdf5_exists() {
    pkg-config --exists hdf5-openmpi || pkg-config --exists hdf5 ||
        command -v h5pcc >/dev/null ||
        command -v h5cc >/dev/null ||
        header_exists hdf5.h
}

# need NAME "APT PACKAGES" MODULE SPACK CHECK...: adds a row to the lists of what is missing if CHECK fails.
need() {
    local name=$1 apt=$2 module=$3 spack=$4
    shift 4
    if "$@" >/dev/null 2>&1; then
        return
    fi
    missing_names+="${missing_names:+, }$name"
    missing_apt+=" $apt"
    missing_modules+=" $module"
    missing_spack+=" $spack"
}

each_once() {
    # shellcheck disable=SC2086  # a list of words
    printf '%s\n' $1 | sort -u | paste -sd ' '
}

find_missing() {
    missing_names='' missing_apt='' missing_modules='' missing_spack=''
    need 'a C compiler' 'build-essential' gcc gcc command -v "${CC:-cc}"
    need 'CMake 3.25' cmake cmake cmake cmake_is_new
    need Ninja ninja-build Ninja ninja command -v ninja
    need pkg-config pkg-config pkgconf pkgconf command -v pkg-config
    need mpicc libopenmpi-dev openmpi openmpi command -v mpicc
    need mpirun openmpi-bin openmpi openmpi command -v mpirun
    need HDF5 libhdf5-openmpi-dev hdf5 hdf5 hdf5_exists
    need OpenSSL libssl-dev openssl openssl pkg-config --exists libcrypto
    need Jansson libjansson-dev jansson jansson pkg-config --exists jansson
    need libyaml libyaml-dev libyaml libyaml pkg-config --exists yaml-0.1
    need xxHash libxxhash-dev xxhash xxhash pkg-config --exists libxxhash
    need hwloc libhwloc-dev hwloc hwloc pkg-config --exists hwloc
    need Random123 librandom123-dev random123 random123 header_exists Random123/philox.h
    need 'Python 3.9 with venv' 'python3 python3-venv' python python python_has_venv
    if [ "$1" = test ]; then
        need 'a C++ compiler' 'build-essential' gcc gcc command -v "${CXX:-c++}"
        need Criterion libcriterion-dev criterion criterion pkg-config --exists criterion
        need 'ip (two virtual hosts)' iproute2 iproute2 iproute2 command -v ip
    fi
}

require_system() {
    mkdir -p build
    find_missing "$1"
    if [ -n "$missing_names" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing with apt: $missing_names"
        apt_logged update || true # one unreachable source must not stop the others
        # shellcheck disable=SC2086  # a list of packages
        apt_logged install $missing_apt || true
        find_missing "$1"
        if [ -n "$missing_names" ]; then
            tail -n 5 build/apt.log >&2
        fi
    fi
    if [ -n "$missing_names" ]; then
        echo "error[E801] missing: $missing_names. One of these lines installs it:" >&2
        {
            echo "  apt-get install$missing_apt    # as root, Debian 12 or Ubuntu 24.04"
            echo "  module load $(each_once "$missing_modules")   # names differ between sites: module spider NAME"
            echo "  spack install $(each_once "$missing_spack")   # then spack load, with the same names"
        } >&2
        exit 8
    fi
}

wish() {
    local apt=$1
    shift
    if ! "$@" >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        mkdir -p build
        apt_logged update || true
        # shellcheck disable=SC2086  # a list of packages
        apt_logged install $apt || true
    fi
}

require_python() {
    local stamp=build/venv/.requirements
    mkdir -p build
    python=build/venv/bin/python
    if ! cmp -s src/prep/requirements.txt "$stamp"; then
        echo "installing Python packages into build/venv"
        rm -rf build/venv
        if ! { python3 -m venv build/venv &&
            "$python" -m pip install -q --disable-pip-version-check -r src/prep/requirements.txt; } >build/pip.log 2>&1; then
            tail -n 5 build/pip.log >&2
            echo "error[E801] build/venv: the packages of src/prep/requirements.txt cannot be installed" \
                "(no network? give pip your mirror with PIP_INDEX_URL)" >&2
            exit 8
        fi
        cp src/prep/requirements.txt "$stamp"
    fi
}

# What Open MPI needs as root, in containers, and with fewer cores than ranks; other MPIs ignore it. Without a binding
# policy of none, a rank gets one core whatever its number of threads.
mpi_environment() {
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
    export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_base_warn_component_unused=0
}
