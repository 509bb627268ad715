"""Runs of solvers on problems: what there is, what is asked for, files, workers, tuning."""
