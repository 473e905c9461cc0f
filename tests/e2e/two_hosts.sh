#!/usr/bin/env bash
# Two network namespaces as two hosts, h1 and h2, joined by a virtual cable:
#
#   two_hosts.sh up [MBIT]     make them, with their own names and addresses 10.199.7.1 and .2; with MBIT the cable carries so
#                              many Mbit/s each way (QSHARD_SLOW_LINK: the program that carries; 0: as fast as it can)
#   two_hosts.sh run NP CMD..  mpirun -np NP over both, launched from h1
#   two_hosts.sh down
#   two_hosts.sh agent ...     what mpirun starts instead of ssh: runs the rest in the namespace of the host it is given
#
# Needs root and iproute2. QSHARD_HOSTS_TAG tells several pairs apart. QSHARD_HOSTS_MAP=slot makes neighbours of the ranks of
# a host, as most launchers do; by default (node) they take turns. QSHARD_MOUNTS_h1 and QSHARD_MOUNTS_h2 give a host files of its
# own: "DIR=TARGET DIR=TARGET ..." puts the folder DIR where the host sees TARGET.
set -euo pipefail
tag=${QSHARD_HOSTS_TAG:-qsh}
export QSHARD_HOSTS_OUTSIDE=${QSHARD_HOSTS_OUTSIDE:-$$} # a process that sees no host's mounts: h2 is entered from within h1
export QSHARD_HOSTS_TAG=$tag OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
here=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")

inside() { # inside HOST CMD...: in its network, under its name, with its mounts
    local host=$1 mounts=QSHARD_MOUNTS_$1
    shift
    # shellcheck disable=SC2016 # the inner shell expands
    nsenter --mount="/proc/$QSHARD_HOSTS_OUTSIDE/ns/mnt" --net="/run/netns/$tag-$host" --wd="$PWD" unshare --uts --mount --propagation private sh -ec \
        'hostname "$1"; for pair in $2; do mount --bind "${pair%%=*}" "${pair#*=}"; done; shift 2; exec "$@"' \
        sh "$host" "${!mounts:-}" "$@"
}

case ${1:-} in
up)
    for i in 1 2; do
        ip netns add "$tag-h$i"
        ip -n "$tag-h$i" link set lo up
    done
    if [[ -n ${2:-} ]]; then
        ready=$(mktemp)
        "$QSHARD_SLOW_LINK" "$tag-h1" 10.199.7.1 "$tag-h2" 10.199.7.2 eth0 "$2" >"$ready" 2>&1 &
        echo $! >"/run/netns/$tag.pid"
        for _ in $(seq 100); do
            if grep -q ready "$ready"; then break; fi
            sleep 0.05
        done
        grep -q ready "$ready" || { cat "$ready" >&2 && exit 1; }
        rm "$ready"
        exit 0
    fi
    ip -n "$tag-h1" link add eth0 type veth peer name eth0 netns "$tag-h2"
    for i in 1 2; do
        ip -n "$tag-h$i" addr add "10.199.7.$i/24" dev eth0
        ip -n "$tag-h$i" link set eth0 up
    done
    ;;
down)
    if [[ -e /run/netns/$tag.pid ]]; then
        kill "$(cat "/run/netns/$tag.pid")" 2>/dev/null || true
        rm -f "/run/netns/$tag.pid"
    fi
    for i in 1 2; do
        ip netns pids "$tag-h$i" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del "$tag-h$i" 2>/dev/null || true
    done
    ;;
run)
    np=$2
    shift 2
    export OMPI_MCA_btl_tcp_if_include=eth0 OMPI_MCA_oob_tcp_if_include=eth0 OMPI_MCA_btl=tcp,self,vader
    inside h1 mpirun -np "$np" --host "10.199.7.1:$(((np + 1) / 2)),10.199.7.2:$((np / 2))" --map-by "${QSHARD_HOSTS_MAP:-node}" \
        --mca plm rsh --mca plm_rsh_agent "$here agent" --mca orte_keep_fqdn_hostnames 1 --bind-to none \
        -x QSHARD_HOSTS_TAG -x OMP_NUM_THREADS "$@"
    ;;
agent)
    shift
    while [[ ${1:-} == -* ]]; do shift; done
    case $1 in
    10.199.7.2 | h2) host=h2 ;;
    *) host=h1 ;;
    esac
    shift
    inside "$host" sh -c "$*"
    ;;
*)
    echo "usage: two_hosts.sh up|run NP CMD...|down" >&2
    exit 2
    ;;
esac
