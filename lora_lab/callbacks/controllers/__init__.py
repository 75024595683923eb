"""One file per controller: paper, rule, schedule, options, class."""
