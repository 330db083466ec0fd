"""The demonstration: a real language model, improved by PPO against a reward model trained on (simulated) preferences."""
