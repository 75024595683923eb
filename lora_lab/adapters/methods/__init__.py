"""One file per method: paper, formula, tensors, spec, class."""
