"""Measurements against other libraries; each script prints a table and needs the extra `peers`."""
