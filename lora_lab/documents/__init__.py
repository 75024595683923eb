"""Files of text: read strictly, filled into dataclasses, written whole or not at all."""
