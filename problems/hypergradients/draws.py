"""What all draws share: conditioning, scales of x, y, f and g, objectives of random parts, and what a draw is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from problems.hypergradients.exact import Matrix, Unsolved, Vector, definite, exact
from problems.hypergradients.levels import Lower, Upper

DIM_X, TERMS = 3, 3
EASY_CONDITION, EASY_SCALE = 1e6, 6.0


class Case(NamedTuple):
    """One draw."""

    kind: str
    """What it is an example of; the campaign's table has a row for each."""
    data: Any
    """Arrays of the family's shapes, what its `build` makes a problem of."""
    right: list[Vector]
    """The gradient of F; several where each is one; none where the lower level has no solution, or many."""
    sides: list[Vector]
    """Gradients on other branches of a kink, which are right where the status is WEAKLY_ACTIVE."""
    easy: bool
    """float64 at a condition of at most 1e6 and scales from 1e-6 to 1e6, and not degenerate."""
    numbers: dict[str, float]
    """The condition and scales, to be read in a report."""


class Family(NamedTuple):
    """Draws of one static shape, which one compiled function serves."""

    name: str
    build: Callable[[Any], Any]
    """data -> (problem, x, y0, keyword arguments of `hypergradient`); traced."""
    n: int
    """The dimension of y."""
    draw: Callable[["Draw"], Case]
    """Raises `Unsolved` where what it drew has no reference; then it draws again."""


class Draw:
    """Random numbers of one draw, with its dtype, condition and scales."""

    def __init__(self, rng: np.random.Generator, dtype: Any, n: int) -> None:
        """Draw condition and scales; float32 has room for smaller ones."""
        self.rng, self.dtype, self.n = rng, np.dtype(dtype), n
        double = self.dtype == np.float64
        self.condition = 10 ** rng.uniform(0, 10)
        if rng.random() < 0.5:
            spans = (1.0, 1.0, 1.0, 1.0)
        elif double:
            spans = (20.0, 20.0, 20.0, 5.0)
        else:
            spans = (20.0, 15.0, 5.0, 3.0)
        self.exponents = [rng.uniform(-span, span) for span in spans]
        self.f, self.g, self.y, self.x = (2.0 ** round(e * np.log2(10)) for e in self.exponents)
        self.degenerate = not double

    @property
    def easy(self) -> bool:
        """As `Case.easy`."""
        small = max(map(abs, self.exponents)) <= EASY_SCALE
        return small and self.condition <= EASY_CONDITION and not self.degenerate

    def case(self, kind: str, data: Any, right: list[Vector], sides: list[Vector] | None = None) -> Case:
        """The draw as a `Case`."""
        numbers = dict(zip(("f", "g", "y", "x"), self.exponents, strict=True)) | {"condition": self.condition}
        return Case(kind, data, right, sides or [], self.easy and bool(right), numbers)

    def one_of(self, *choices: Any) -> Any:
        """One of them."""
        return choices[self.rng.integers(len(choices))]

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal numbers."""
        return self.rng.normal(size=shape)

    def size(self, low: float, high: float) -> float:
        """A number whose logarithm is uniform."""
        return float(10 ** self.rng.uniform(np.log10(low), np.log10(high)))

    def cast(self, array: Any) -> np.ndarray:
        """In the dtype of the draw."""
        return np.asarray(array, self.dtype)

    def hessian(self, n: int | None = None) -> np.ndarray:
        """A symmetric matrix of the draw's condition, in units of g/y^2: turned, graded or diagonal. Where rounding to
        float32 makes it indefinite its condition is taken back.
        """
        n = self.n if n is None else n
        style = self.one_of("turned", "turned", "graded", "diagonal")
        while True:
            spectrum = np.geomspace(1, 1 / self.condition, n) if n > 1 else np.ones(1)
            Q = np.linalg.qr(self.normal(n, n))[0]
            if style == "turned":
                H = (Q * spectrum) @ Q.T
            elif style == "graded":
                D = np.sqrt(self.rng.permutation(spectrum))
                H = D[:, None] * ((Q * np.geomspace(1, 0.1, n)) @ Q.T) * D
            else:
                H = np.diag(self.rng.permutation(spectrum))
            H = self.cast((H + H.T) / 2 * (self.g / self.y**2))
            if _definite(exact(H), self.g / self.y**2 / self.condition / 30):
                return H
            self.condition /= 3

    def upper(self) -> Upper:
        """Some f, of which parts may be missing."""
        n, rng = self.n, self.rng
        P = self.normal(n, n) / n * rng.integers(0, 2)
        parts = (
            (P + P.T) / self.y**2, self.normal(DIM_X, n) / self.x / self.y * rng.integers(0, 2),
            self.normal(n) / self.y, self.normal(DIM_X) / self.x * rng.integers(0, 2),
            1.0 / self.x**2 * rng.integers(0, 2),
        )  # fmt: skip
        return Upper(*(self.cast(self.f * part) for part in parts))

    def bends(self, bent: bool) -> dict[str, np.ndarray]:
        """The parts tau, K, J, k and a of `Lower`: w of `curved` where `bent`, else nothing."""
        n = self.n
        tau = self.g * self.size(1e-2, 10) if bent else 0.0
        return {
            "tau": self.cast(tau),
            "K": self.cast(self.normal(TERMS, n) / self.y * bent),
            "J": self.cast(self.normal(TERMS, DIM_X) / self.x * bent),
            "k": self.cast(self.normal(TERMS) * bent),
            "a": self.cast(np.zeros(n)),
        }

    def lower(self, H: np.ndarray, bent: bool = False) -> Lower:
        """Some g with this H and h = 0, for `stationary`."""
        G = self.normal(self.n, DIM_X) * (self.g / self.y / self.x)
        return Lower(H=self.cast(H), G=self.cast(G), h=self.cast(np.zeros(self.n)), **self.bends(bent))

    def point(self) -> tuple[np.ndarray, np.ndarray]:
        """(x, y), y to become the solution."""
        return self.cast(self.x * self.normal(DIM_X)), self.cast(self.y * self.normal(self.n))

    def start(self, y: np.ndarray) -> np.ndarray:
        """Where the lower level is to start: at the solution, near it, at zero, or far away."""
        kind = self.one_of("there", "zero", "near", "far")
        far = {"there": 0.0, "zero": 0.0, "near": 0.1, "far": 100.0}[kind]
        return self.cast((kind != "zero") * y + far * self.y * self.normal(self.n))


def stationary(level: Any, g: Lower, y: np.ndarray, pull: np.ndarray) -> Lower:
    """g with the h for which R(x, y) = -pull, rounded: y then solves the level nearly, with C'lam = pull."""
    R = np.array([float(r) for r in level.at(exact(y)).R])
    return g._replace(h=np.asarray(-R - pull, g.h.dtype))


def _definite(H: Matrix, least: float) -> bool:
    shifted = [[p - (exact(least) if i == j else 0) for j, p in enumerate(row)] for i, row in enumerate(H)]
    return definite(shifted)


__all__ = ["Case", "Draw", "Family", "Unsolved", "stationary"]
