"""What a run needs of the machine: processes, engines, checkpoints, signals, progress."""
