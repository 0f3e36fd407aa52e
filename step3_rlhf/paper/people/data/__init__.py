"""ProtoQA's questions as the project's ordinary records."""
