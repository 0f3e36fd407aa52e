# shellcheck shell=bash
# Sourced by launch.sh: several nodes, which DeepSpeed starts through pdsh and ssh.

# The lines of HOSTFILE that name a node.
hosts() { grep -v '^ *#' "$HOSTFILE" | grep slots= || true; }

# DeepSpeed writes both directories into the nodes' command lines as they are.
require_plain_paths() {
    [[ "$PWD$root$prefix" != *[[:space:]\$\`\"\'\\\&\;\(\)]* ]] ||
        fail "Through pdsh, neither $PWD nor $root nor $prefix may have spaces or quotes in its name; start each node with its NODE_RANK"
}

# COMMAND: runs it on every node, with %n as the node's number; fails if it fails on one of them.
on_nodes() {
    PDSH_RCMD_TYPE=ssh pdsh -S -w "$(hosts | awk '{ print $1 }' | paste -sd,)" "$1" >/dev/null 2>&1
}

# The variables that are set here, or in DeepSpeed's own file, for the processes of all nodes. Secrets
# are left out, since they would show in the nodes' lists of processes.
own_variables() {
    local file="${DS_ENV_FILE:-.deepspeed_env}"
    awk '/=/' ~/"$file" "$file" 2>/dev/null || true
    echo "RANK_PIDS=$RANK_PIDS"
    env | grep -E '^(DS_ACCELERATOR|DEEPSPEED_TIMEOUT|PYTORCH_ALLOC_CONF|TORCH_EXTENSIONS_DIR|OMP_NUM_THREADS|(HF|WANDB|TOKENIZERS)_[A-Z_]+)=' |
        grep -vE '^[A-Z_]*_(TOKEN|KEY)=' || true
}
