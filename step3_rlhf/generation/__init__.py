"""Drawing tokens. `generator.py` says what a generator is, and chooses one for a policy."""
