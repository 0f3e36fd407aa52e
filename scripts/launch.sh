# Sourced: `launch MODULE ARGUMENTS...` starts a stage with the DeepSpeed launcher.
#   NUM_PROCESSES=2   processes per node (default: every visible GPU; one on a CPU)
#   HOSTFILE=path     several nodes, in DeepSpeed's hostfile format
#   MASTER_PORT=port  the port at which the processes meet (default: a free one)
#   DEEPSPEED_ARGS=…  anything else for the launcher, such as --no_ssh --node_rank=1
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

launch() {
    local gpus port
    gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
    port="${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"
    local arguments=(--master_port "$port" --log_level error)
    if [[ -n "${HOSTFILE:-}" ]]; then
        arguments+=(--hostfile "$HOSTFILE")
        [[ -n "${NUM_PROCESSES:-}" ]] && arguments+=(--num_gpus "$NUM_PROCESSES")
    else
        # DeepSpeed would read a hostfile of the machine's own accord; one node is meant here.
        arguments+=(--hostfile /dev/null)
        if [[ "$gpus" == 0 ]]; then
            export DS_ACCELERATOR=cpu
            # Processes that each take all cores slow one another down.
            export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + ${NUM_PROCESSES:-1} - 1) / ${NUM_PROCESSES:-1} ))}"
            arguments+=(--num_gpus "${NUM_PROCESSES:-1}")
        elif [[ -n "${NUM_PROCESSES:-}" ]]; then
            arguments+=(--num_gpus "$NUM_PROCESSES")
        fi
    fi
    # shellcheck disable=SC2086
    deepspeed "${arguments[@]}" ${DEEPSPEED_ARGS:-} --module "$@"
}
