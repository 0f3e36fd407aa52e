# Sourced: `launch MODULE ARGUMENTS...` starts a stage with the DeepSpeed launcher.
#   NUM_PROCESSES=2   processes per node (default: every visible GPU; one on a CPU)
#   HOSTFILE=path     several nodes, in DeepSpeed's hostfile format
#   MASTER_PORT=port  the port at which the processes meet (default: a free one)
#   DEEPSPEED_ARGS=…  anything else for the launcher, such as --no_ssh --node_rank=1
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

launch() {
    local arguments=(--log_level error)
    arguments+=(--master_port "${MASTER_PORT:-$(free_port)}")
    if [[ -n "${HOSTFILE:-}" ]]; then
        [[ -f "$HOSTFILE" ]] || fail "HOSTFILE=$HOSTFILE: no such file"
        arguments+=(--hostfile "$HOSTFILE")
        [[ -z "${NUM_PROCESSES:-}" ]] || arguments+=(--num_gpus "$NUM_PROCESSES")
    else
        # DeepSpeed would read a hostfile of the machine's own accord; one node is meant here.
        arguments+=(--hostfile /dev/null)
        if [[ "$gpus" == 0 ]]; then
            local processes="${NUM_PROCESSES:-1}"
            # Processes that each take all cores slow one another down.
            export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}"
            arguments+=(--num_gpus "$processes")
        elif [[ -n "${NUM_PROCESSES:-}" && -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
            # With --num_gpus DeepSpeed would forget which GPUs are visible.
            arguments+=(--include "localhost:$(cut -d, -f"-$NUM_PROCESSES" <<<"$CUDA_VISIBLE_DEVICES")")
        elif [[ -n "${NUM_PROCESSES:-}" ]]; then
            arguments+=(--num_gpus "$NUM_PROCESSES")
        fi
    fi
    # shellcheck disable=SC2086
    deepspeed "${arguments[@]}" ${DEEPSPEED_ARGS:-} --module "$@"
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
