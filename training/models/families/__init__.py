"""What differs between families of models: heads, token ids, ends of a response, noise."""
