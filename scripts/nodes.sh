# shellcheck shell=bash
# Sourced by launch.sh: several nodes, which DeepSpeed starts through pdsh and ssh.

# The lines of HOSTFILE that name a node.
hosts() { grep -v '^ *#' "$HOSTFILE" | grep slots= || true; }

# COMMAND, in which %n is the node's number, on every node; fails where it fails on one.
on_nodes() {
    PDSH_RCMD_TYPE=ssh pdsh -S -w "$(hosts | awk '{ print $1 }' | paste -sd,)" "$1" >/dev/null 2>&1
}

# pdsh replaces %h and its like, and gives the words to a shell on each node. DeepSpeed puts those
# with spaces between double quotes, and the others there as they are.
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

# What was set here, or in DeepSpeed's own file, for the processes of all nodes; no secrets, which
# would be seen there in the list of processes.
own_variables() {
    local file="${DS_ENV_FILE:-.deepspeed_env}"
    awk '/=/' ~/"$file" "$file" 2>/dev/null || true
    echo "RANK_PIDS=$RANK_PIDS"
    env | grep -E '^(DS_ACCELERATOR|TORCH_EXTENSIONS_DIR|OMP_NUM_THREADS|(HF|WANDB|TOKENIZERS)_[A-Z_]+)=' |
        grep -vE '^[A-Z_]*_(TOKEN|KEY)=' || true
}
