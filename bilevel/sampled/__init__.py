"""Lower levels with many minimisers, by samples of Y: nets, coverings, smooth minima, refinement, the answer."""
