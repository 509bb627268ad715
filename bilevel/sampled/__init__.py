"""Lower levels with many minimisers, by samples of Y: nets, coverings, smooth minima, refinement, the answer."""

from bilevel.sampled.blocks import Blocks, pick
from bilevel.sampled.covering import cover, cover_blocks, edge, near, starts
from bilevel.sampled.smoothing import Smoothness, smooth_min

__all__ = ["Blocks", "Smoothness", "cover", "cover_blocks", "edge", "near", "pick", "smooth_min", "starts"]
