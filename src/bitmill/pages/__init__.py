"""Pages to look at: one file each, offline, everything escaped: a run, a sweep, files beside each other."""
