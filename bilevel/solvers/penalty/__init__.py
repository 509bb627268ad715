"""Solvers by gradients alone: penalties and barriers on the lower value gap."""
