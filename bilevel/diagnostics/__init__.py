"""Convergence diagnostics: what the referee recomputes from (x, y) alone, the lower gap, Goldstein stationarity."""

from bilevel.backend.tree import distance, norm
from bilevel.diagnostics.certificate import GLOBAL, Certificate, certify
from bilevel.diagnostics.classification import STATIONARY, Classification, classify, for_convex_followers
from bilevel.diagnostics.gap import LowerGap, lower_gap, measure_global
from bilevel.diagnostics.goldstein import goldstein
from bilevel.diagnostics.kinks import Kink, steepest_descent
from bilevel.diagnostics.measures import fit_rate, gradient_mapping, measure, multipliers
from bilevel.diagnostics.referees import BY_VALUE, IMPLICIT, REDUCED, as_referee, by_value, for_many_minimisers
from bilevel.diagnostics.regret import regrets
from bilevel.record import Measurement, Referee

__all__ = [
    "BY_VALUE",
    "GLOBAL",
    "IMPLICIT",
    "REDUCED",
    "STATIONARY",
    "Certificate",
    "Classification",
    "Kink",
    "LowerGap",
    "Measurement",
    "Referee",
    "as_referee",
    "by_value",
    "certify",
    "classify",
    "distance",
    "fit_rate",
    "for_convex_followers",
    "for_many_minimisers",
    "goldstein",
    "gradient_mapping",
    "lower_gap",
    "measure",
    "measure_global",
    "multipliers",
    "norm",
    "regrets",
    "steepest_descent",
]
