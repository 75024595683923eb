"""Parameter-efficient fine-tuning as controlled experiments."""
