"""Measurements of lora_lab itself."""
