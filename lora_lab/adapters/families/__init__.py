"""What the methods of one family share; `adapters.base` has what every method needs."""
