# shellcheck shell=bash
# Sourced: `launch MODULE ARGUMENTS...` checks a stage's config and starts its processes with the
# DeepSpeed launcher (training/launch/launcher.py).
#   NUM_PROCESSES=2   processes per node (default: every visible GPU; one on a CPU)
#   HOSTFILE=path     several nodes, in DeepSpeed's hostfile format, reached by pdsh over ssh
#   NODE_RANK=0 MASTER_ADDR=host MASTER_PORT=port    with HOSTFILE: only this node's processes,
#                     without ssh; start the same command on every node, each with its own number
#   MASTER_PORT=port  the port at which the processes meet (default: a free one)
#   DEEPSPEED_ARGS=…  anything else for the launcher
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$root/scripts/nodes.sh"

launch() {
    [[ -z "${NUM_PROCESSES:-}" || "$NUM_PROCESSES" =~ ^[1-9][0-9]*$ ]] ||
        fail "NUM_PROCESSES=$NUM_PROCESSES: a number above 0 was expected"
    [[ -z "${HOSTFILE:-}" || -f "$HOSTFILE" ]] || fail "HOSTFILE=$HOSTFILE: no such file"
    LAUNCH_PROCESSES="$(processes_in_all)"
    export LAUNCH_PROCESSES
    # Help, a command that lacks its arguments, and a dry run start no other process.
    if (($# == 1)) || [[ " $* " == *" --help "* || " $* " == *" -h "* || " $* " == *" --dry-run "* ]]; then
        python -m "$@"
        return
    fi
    local arguments=() words=("$@") processes="${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}"
    by_pdsh=""
    if ((gpus > 0 && processes > gpus)) && [[ -z "${HOSTFILE:-}" ]]; then
        fail "NUM_PROCESSES=$processes, but only $gpus GPUs are visible: $visible"
    fi
    # Processes that each use all cores slow one another down.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}"
    if [[ -n "${HOSTFILE:-}" ]]; then
        arguments+=(--master_port "${MASTER_PORT:-$(free_port)}" --hostfile "$HOSTFILE")
        [[ -z "${NUM_PROCESSES:-}" ]] || arguments+=(--num_gpus "$NUM_PROCESSES")
        if [[ -n "${NODE_RANK:-}" ]]; then
            [[ -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" ]] ||
                fail "NODE_RANK=$NODE_RANK: name the first node with MASTER_ADDR and a free port there with MASTER_PORT"
            arguments+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
        elif (($(hosts | wc -l) > 1)); then
            [[ ! "${DEEPSPEED_ARGS:-}" =~ --launcher[=\ ]+([A-Za-z]+) || "${BASH_REMATCH[1],,}" == pdsh ]] ||
                fail "DEEPSPEED_ARGS: ${BASH_REMATCH[0]}: several nodes are reached by pdsh, or started each with its NODE_RANK"
            command -v pdsh >/dev/null ||
                fail "HOSTFILE=$HOSTFILE names several nodes: pdsh is needed here (on Debian: apt install pdsh), or NODE_RANK on each node"
            by_pdsh=yes
        fi
    elif [[ -n "${DEEPSPEED_ARGS:-}" ]]; then
        # Without this, DeepSpeed would use a hostfile that it finds on the machine.
        arguments+=(--master_port "${MASTER_PORT:-$(free_port)}" --hostfile /dev/null)
        if ((gpus == 0)); then
            arguments+=(--num_gpus "$processes")
        else
            # With --num_gpus DeepSpeed would ignore which GPUs are visible.
            arguments+=(--include "localhost:$(cut -d, -f"-$processes" <<<"$visible")")
        fi
    elif ((gpus > 0)); then
        LAUNCH_DEVICES="$(cut -d, -f"-$processes" <<<"$visible")"
        export LAUNCH_DEVICES
    else
        LAUNCH_DEVICES="$(seq -s, 0 $((processes - 1)))"
        export LAUNCH_DEVICES
    fi
    # shellcheck disable=SC2206
    arguments+=(${DEEPSPEED_ARGS:-})
    LAUNCH_ARGUMENTS="$(printf '%s\n' "${arguments[@]}")"
    export LAUNCH_ARGUMENTS
    # The launcher gets its own session, so that Ctrl-C reaches this script alone, which passes it on.
    RANK_PIDS="$(mktemp -d)"
    export RANK_PIDS
    launcher="" signals=0
    if [[ -n "$by_pdsh" ]]; then
        require_plain_paths
        export LAUNCH_BY_PDSH=yes
        own_variables >"$RANK_PIDS.variables"
        export DS_ENV_FILE="$RANK_PIDS.variables" # DeepSpeed sets these on every node
    fi
    trap 'pass_on TERM 143' TERM
    trap 'pass_on TERM 129' HUP
    trap 'pass_on INT 130' INT
    trap 'pass_on USR1 138' USR1
    [[ "$gpus" != 0 || -n "${LD_PRELOAD+set}" ]] || preload_tcmalloc
    # SIGUSR1 would end the launcher, so it inherits a handler that ignores the signal.
    (trap '' USR1 && exec setsid python -m "${words[@]}") &
    launcher=$!
    local code interrupted
    while :; do
        interrupted="$signals" code=0
        wait "$launcher" || code=$?
        [[ "$signals" != "$interrupted" ]] || break # otherwise a signal, not the launcher, ended wait
    done
    trap - TERM HUP INT USR1
    tidy
    return "$code"
}

# Training asks for large blocks of memory and frees them, over and over. glibc gives them back to the
# system each time; tcmalloc keeps them, which saves a quarter of the time on a CPU. It is used where
# it is installed (on Debian: apt install libtcmalloc-minimal4); LD_PRELOAD= turns that off.
preload_tcmalloc() {
    local library
    library="$({ ldconfig -p 2>/dev/null || true; } | awk '/libtcmalloc(_minimal)?\.so/ { print $NF; exit }')"
    [[ -z "$library" ]] || export LD_PRELOAD="$library"
}

# The number of processes over all nodes.
processes_in_all() {
    if [[ -z "${HOSTFILE:-}" ]]; then
        echo "${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}"
    elif [[ -n "${NUM_PROCESSES:-}" ]]; then
        echo $(($(hosts | wc -l) * NUM_PROCESSES))
    else
        hosts | sed -n 's/.*slots=\([0-9]*\).*/\1/p' | awk '{ all += $1 } END { print all }'
    fi
}

# SIGNAL CODE: the first signal goes to the ranks, which save a checkpoint and end. The launcher does
# not get it, since it would kill them after 30 s. If no rank is ready yet, or the second time, all
# processes end at once.
pass_on() {
    signals=$((signals + 1))
    launcher="${launcher:-${!:-}}"
    [[ -n "$launcher" ]] || exit "$2"
    ((signals > 1)) || ! send_ranks "$1" || return 0
    if [[ -n "$by_pdsh" ]]; then
        send_ranks KILL || true
        kill -s INT "$launcher" 2>/dev/null || true # which ends the launchers of all nodes
        wait "$launcher" || true
    else
        kill -KILL -- "-$launcher" 2>/dev/null || true
    fi
    tidy
    exit "$2"
}

# SIGNAL: sends it to the ranks; fails if none has reported that it is ready. There is no plain
# `return`, which in a trap's function has the status of the command before the trap.
send_ranks() {
    if [[ -n "$by_pdsh" ]]; then
        on_nodes "kill -s $1 \$(ls $RANK_PIDS/%n)"
    else
        local ranks
        ranks="$(find "$RANK_PIDS" -type f -printf '%f\n')"
        # shellcheck disable=SC2086
        [[ -n "$ranks" ]] && { kill -s "$1" $ranks 2>/dev/null || true; }
    fi
}

tidy() {
    rm -rf "$RANK_PIDS" "$RANK_PIDS.variables"
    [[ -z "$by_pdsh" ]] || on_nodes "rm -rf $RANK_PIDS" || true
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
