"""Policy and scalar models built on Hugging Face's: loading, log-probs, packing, LoRA."""
