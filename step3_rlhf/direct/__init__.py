"""Direct optimization: every regularizer from comparisons alone, without a reward model."""
