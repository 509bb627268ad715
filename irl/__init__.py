"""Inverse reinforcement learning on the same problem spec. Its first parts follow in a later issue."""
