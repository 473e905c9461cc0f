#!/usr/bin/env bash
# A Slurm cluster of two nodes, n1 and n2, on this machine, for test_slurm.py:
#
#   cluster.sh up DIR            start it, with everything that it keeps in DIR; wait until both nodes are idle
#   cluster.sh run DIR CMD...    run sbatch, squeue, ... on its login host, in the working directory of the caller
#   cluster.sh pids DIR          processes on the nodes
#   cluster.sh down DIR          end it and everything that runs on its nodes
#
# A node is a network, host name and mount namespace: its own address on a bridge, its own PMIx folder. The daemons are the real
# ones, run in the foreground under one munged. Needs root, iproute2, and the packages that `cluster.sh check` asks for:
#
#   cluster.sh check             says what is missing and leaves with 77
set -euo pipefail
command=${1:-}
dir=$(realpath -m "${2:-.}")
shift $(($# < 2 ? $# : 2))
tag=qsl$(printf %s "$dir" | cksum | cut -d ' ' -f 1)
net=10.199.9
nodes="n1 n2"
cpus=2

missing() {
    local name
    [ "$(id -u)" = 0 ] || { echo "a cluster of namespaces needs root" && return; }
    for name in ip munged slurmctld slurmd sbatch srun; do
        command -v $name >/dev/null || echo "$name is not installed"
    done
    ls /usr/lib/*/slurm*/mpi_pmix*.so >/dev/null 2>&1 || echo "Slurm has no pmix plugin"
    ls /usr/lib/*/libpmix.so >/dev/null 2>&1 || echo "libpmix.so is not installed, which Slurm's pmix plugin loads"
}

configure() {
    local affinity=task/none
    [ "$(nproc)" -lt $cpus ] || affinity=task/affinity
    {
        echo "127.0.0.1 localhost"
        echo "$net.100 login"
        for node in $nodes; do echo "$net.${node#n} $node"; done
    } >"$dir/hosts"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=$tag
SlurmctldHost=login($net.100)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: 120 s by default. A shared machine may stand still for seconds, and a
# launch that meets an expired credential or no answer within MessageTimeout (10 s by default) fails the job.
AuthInfo=socket=$dir/munge.sock,cred_expire=30
MessageTimeout=60
MpiDefault=pmix
ProctrackType=proctrack/linuxproc
TaskPlugin=$affinity
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
InactiveLimit=0
RebootProgram=/bin/true
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-2] CPUs=$cpus Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    # Two GPUs a node, for which devices stand in that are everywhere: Slurm says in CUDA_VISIBLE_DEVICES which a task sees.
    printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$dir/gres.conf"
    # Nodes that share /tmp would take each other's folder of a step.
    echo "PMIxCliTmpDirBase=$dir/pmix" >"$dir/mpi.conf"
}

wire() {
    ip netns add "$tag-login"
    ip -n "$tag-login" link set lo up
    ip -n "$tag-login" link add br0 type bridge
    ip -n "$tag-login" addr add $net.100/24 dev br0
    ip -n "$tag-login" link set br0 up
    for node in $nodes; do
        ip netns add "$tag-$node"
        ip -n "$tag-$node" link set lo up
        ip -n "$tag-login" link add "to-$node" type veth peer name eth0 netns "$tag-$node"
        ip -n "$tag-login" link set "to-$node" master br0 up
        ip -n "$tag-$node" addr add "$net.${node#n}/24" dev eth0
        ip -n "$tag-$node" link set eth0 up
    done
}

# start HOST CMD...: in the namespaces of the host. Not by `ip netns exec`, whose fresh /sys lacks the cgroups of slurmd.
start() {
    local host=$1
    shift
    mkdir -p "$dir/pmix-$host"
    # shellcheck disable=SC2016 # the inner shell expands
    SLURM_CONF=$dir/slurm.conf setsid nsenter --net="/run/netns/$tag-$host" unshare --uts --mount --propagation private sh -ec \
        'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/pmix-$1" "$2/pmix"; shift 2; exec "$@"' \
        sh "$host" "$dir" "$@" </dev/null >>"$dir/$host.out" 2>&1 &
    echo $! >"$dir/$host.started"
}

on_login() {
    local pid
    pid=$(cat "$dir/login.started")
    # shellcheck disable=SC2016
    SLURM_CONF=$dir/slurm.conf exec nsenter -t "$pid" -n -u -m -- sh -c 'cd "$1"; shift; exec "$@"' sh "$PWD" "$@"
}

up() {
    mkdir -p "$dir/pmix" "$dir/state" "$dir/spool-n1" "$dir/spool-n2"
    chmod 755 "$dir"
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    configure
    wire
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" 2>>"$dir/munged.out"
    start login slurmctld -D -i -f "$dir/slurm.conf"
    for node in $nodes; do start "$node" slurmd -D -N "$node" -f "$dir/slurm.conf"; done
    for _ in $(seq 300); do
        if [ "$( (on_login sinfo -h -N -o %T) 2>/dev/null | grep -c '^idle$')" = 2 ]; then
            return
        fi
        sleep 0.1
    done
    echo "the nodes did not become idle within 30 s:"
    tail -n 4 "$dir"/*.log "$dir"/*.out
    return 1
}

pids() {
    for host in $nodes; do ip netns pids "$tag-$host" 2>/dev/null || true; done
}

down() {
    local pid signal left
    for pid in "$dir"/*.started "$dir/munged.pid"; do
        [ ! -s "$pid" ] || kill "$(cat "$pid")" 2>/dev/null || true
    done
    for signal in TERM KILL; do
        for _ in $(seq 20); do
            left=$(for host in $nodes login; do ip netns pids "$tag-$host" 2>/dev/null || true; done)
            [ -n "$left" ] || break 2
            # shellcheck disable=SC2086 # a list of numbers
            kill -$signal $left 2>/dev/null || true
            sleep 0.1
        done
    done
    for host in $nodes login; do ip netns del "$tag-$host" 2>/dev/null || true; done
}

case $command in
check)
    text=$(missing)
    [ -z "$text" ] || { echo "no Slurm cluster here: $(paste -sd ';' <<<"$text")" && exit 77; }
    ;;
up) up ;;
run) on_login "$@" ;;
pids) pids ;;
down) down ;;
*)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
