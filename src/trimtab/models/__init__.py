"""Hugging Face models that read packed batches: the policy, scorers (reward model, critic) and the reference."""
