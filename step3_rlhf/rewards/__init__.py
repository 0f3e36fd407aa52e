"""Sources of rewards, and how reward models read prompts and responses."""
