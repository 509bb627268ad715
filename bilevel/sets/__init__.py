"""The closed convex sets that x and y may be confined to: `basic` ones and products of them, `smooth` ones and
intersections.
"""

from bilevel.sets.basic import Ball, Box, Polyhedron, Reals, Set, Simplex
from bilevel.sets.product import Product
from bilevel.sets.smooth import Intersection, SmoothSet

__all__ = ["Ball", "Box", "Intersection", "Polyhedron", "Product", "Reals", "Set", "Simplex", "SmoothSet"]
