"""Solvers along the exact gradient of F: the lower level is solved at every point, constrained or not.

Few steps, each as dear as the lower level is: for deterministic problems of small and medium size. What a step
calls is not known before it is done, so that the record has no oracle calls.
"""
