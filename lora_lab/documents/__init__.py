"""Text files: read strictly, filled into dataclasses, written completely or not at all."""
