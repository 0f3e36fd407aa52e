"""Where rewards come from, and how reward models read the texts."""
