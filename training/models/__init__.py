"""Policy and scalar models on top of Hugging Face's: loading, log-probabilities, packing, LoRA."""
