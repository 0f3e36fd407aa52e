"""What a run needs from the machine: processes, engines, checkpoints, signals, tracking."""
