# shellcheck shell=bash
# Sourced by launch.sh: several nodes, which DeepSpeed starts through pdsh and ssh.

# The lines of HOSTFILE that name a node.
hosts() { grep -v '^ *#' "$HOSTFILE" | grep slots= || true; }

# COMMAND: runs it on every node, with %n as the node's number; fails if it fails on one of them.
on_nodes() {
    PDSH_RCMD_TYPE=ssh pdsh -S -w "$(hosts | awk '{ print $1 }' | paste -sd,)" "$1" >/dev/null 2>&1
}

# pdsh replaces %h and the like, and hands the words to a shell on each node. DeepSpeed puts double
# quotes around words with spaces and leaves the others as they are.
quote_for_nodes() {
    local index word
    for index in "${!words[@]}"; do
        word="${words[index]//%/%%}"
        if [[ "$word" == *" "* ]]; then
            word="${word//\\/\\\\}" word="${word//\$/\\\$}" word="${word//\`/\\\`}"
        else
            printf -v word %q "$word"
        fi
        words[index]="$word"
    done
}

# The variables that are set here, or in DeepSpeed's own file, for the processes of all nodes. Secrets
# are left out, since they would show in the nodes' lists of processes.
own_variables() {
    local file="${DS_ENV_FILE:-.deepspeed_env}"
    awk '/=/' ~/"$file" "$file" 2>/dev/null || true
    echo "RANK_PIDS=$RANK_PIDS"
    env | grep -E '^(DS_ACCELERATOR|TORCH_EXTENSIONS_DIR|OMP_NUM_THREADS|(HF|WANDB|TOKENIZERS)_[A-Z_]+)=' |
        grep -vE '^[A-Z_]*_(TOKEN|KEY)=' || true
}
