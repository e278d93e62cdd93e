"""A sampler as numbers: one row per UNet call, run by one three-line loop.

::

    y = init * unit_noise
    for row in table.rows():
        m = guide(unet(y, row.t))
        h = [row.p*y + row.q*m, *h[:K-1]]
        y = row.a*y + sum(b_j * h_j) + row.c*noise

`y` is the variance-preserving state, so it is also the UNet's input; the `y` of the last row is the final
latent. A sampler without clipping is linear in its start, in the model's outputs and in its noise. So one run
of its formula on unit vectors (`trace`) reads all of its coefficients out. docs/samplers.md derives the form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import SamplerError
from ...engines.noise_schedule import Level
from ...engines.spec import HISTORY, MASKED_ROW, ROW, Array

Vector: TypeAlias = NDArray[np.float64]
Predict: TypeAlias = Callable[[Vector, Level], Vector]
Noise: TypeAlias = Callable[[], Vector]
Traced: TypeAlias = Callable[[Vector, Predict, Noise], Vector]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# A traced coefficient is exact to about 1e-13; a sampler that is not in the form misses by its own size.
_TRACE_TOLERANCE = 1e-9
_NEGLIGIBLE = 1e-12
COLUMNS = ("t", "alpha_bar", "p", "q", "a", "b", "c", "draws")


class Row(NamedTuple):
    """One row of a table as plain floats, which take the dtype of the arrays they multiply.

    The fields are the columns of `Table`. `keep` has the factors of a clean latent and of unit noise whose
    sum is as noisy as the state after the row.
    """

    t: float
    p: float
    q: float
    a: float
    b: tuple[float, ...]
    c: float
    draws: bool
    keep: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A whole sampling schedule; immutable, so one table may serve many threads.

    Args:
        name: short name of the sampler.
        prediction_type: what the model's output `m` is: "epsilon", "v_prediction" or "sample". Already folded
            into `p` and `q`; kept for previews.
        t: (N,) timesteps that the model is told, fractional where the schedule is (Karras).
        p: (N,) and
        q: (N,) turn the state and the model's output into what the history holds.
        a: (N,) factor of the state.
        b: (N, K) factors of the history, newest first.
        c: (N,) factor of the noise drawn in this row.
        draws: (N,) bool, whether a noise tensor is drawn in this row. A draw with c = 0 still moves the
            generator, so it belongs to the meaning of a seed.
        alpha_bar: (N,) signal share of the state that enters the UNet: y = sqrt(alpha_bar)*x0 +
            sqrt(1-alpha_bar)*eps.
        init: factor from unit noise to the first state.
        last_alpha_bar: signal share of the latent after the last row; 1 unless the table was cut.

    Raises:
        SamplerError: a shape, a non-finite number, more than HISTORY columns in `b`, noise that is not
            drawn.
    """

    name: str
    prediction_type: str
    t: Vector
    p: Vector
    q: Vector
    a: Vector
    b: Vector
    c: Vector
    draws: NDArray[np.bool_]
    alpha_bar: Vector
    init: float
    last_alpha_bar: float = 1.0

    def __post_init__(self) -> None:
        """Check, copy and freeze the columns."""
        rows = len(np.atleast_1d(self.t))
        for column in COLUMNS:
            kind = np.bool_ if column == "draws" else np.float64
            values = np.array(getattr(self, column), dtype=kind)
            if values.shape[:1] != (rows,) or values.ndim != (2 if column == "b" else 1) or rows == 0:
                raise self._fault(f"column {column} has shape {values.shape}", f"{rows} rows, at least one")
            if not np.isfinite(values).all():
                raise self._fault(f"column {column} holds NaN or infinity", "finite coefficients")
            values.flags.writeable = False
            object.__setattr__(self, column, values)
        if not 1 <= self.b.shape[1] <= HISTORY:
            raise self._fault(f"a history of {self.b.shape[1]} outputs", f"1 to {HISTORY}")
        if bool(np.any((self.c != 0) & ~self.draws)):
            raise self._fault("noise in a row that draws none", "c = 0 where draws is false")
        if not (np.isfinite(self.init) and self.init > 0):
            raise self._fault(f"an initial scale of {self.init}", "a positive number")
        if self.prediction_type not in PREDICTION_TYPES:
            raise self._fault(f"prediction_type {self.prediction_type!r}", " or ".join(PREDICTION_TYPES))

    def _fault(self, found: str, expected: str) -> SamplerError:
        return SamplerError(
            f"sampler {self.name}: {found}",
            expected=expected,
            fix="Change the step count or the schedule, or choose another sampler.",
        )

    def __len__(self) -> int:
        """Number of UNet calls."""
        return len(self.t)

    @property
    def history(self) -> int:
        """K, the number of predictions the loop remembers."""
        return self.b.shape[1]

    def head(self, rows: int) -> Table:
        """The first `rows` rows, 1 or more: a run that another model will finish."""
        if rows >= len(self):
            return self
        cut = {column: getattr(self, column)[:rows] for column in COLUMNS}
        return replace(self, **cut, last_alpha_bar=float(self.alpha_bar[rows]))

    @property
    def keeps(self) -> Vector:
        """(N, 2): factors of a clean latent and unit noise, to be as noisy as the state after the row."""
        after = np.append(self.alpha_bar[1:], self.last_alpha_bar)
        return np.sqrt(np.stack([after, 1 - after], axis=1))

    def rows(self) -> list[Row]:
        """The rows in order, for loops in NumPy."""
        columns = (self.t, self.p, self.q, self.a, self.b, self.c, self.draws, self.keeps)
        return [
            Row(t, p, q, a, tuple(b), c, draws, (keep[0], keep[1]))
            for t, p, q, a, b, c, draws, keep in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def packed_rows(self, guidance_scales: Array, guidance_rescale: float) -> Array:
        """The rows as the net `step_masked` takes them; `step` takes the first `len(ROW)` numbers of each.

        Args:
            guidance_scales: (N,) of each row.
            guidance_rescale: of all rows.

        Returns:
            (N, len(MASKED_ROW)) float32, guidance included.
        """
        rows = np.zeros((len(self), len(MASKED_ROW)), np.float32)
        rows[:, len(ROW) :] = self.keeps
        values = {"p": self.p, "q": self.q, "a": self.a, "c": self.c}
        values |= {f"b{j}": self.b[:, j] for j in range(self.history)}
        for name, column in values.items():
            rows[:, ROW.index(name)] = column
        rows[:, ROW.index("guidance_scale")] = guidance_scales
        rows[:, ROW.index("guidance_rescale")] = guidance_rescale
        return rows

    def format(self) -> str:
        """The table as aligned text: one line per UNet call, columns in the order of the loop."""
        factors = [f"b{j}" for j in range(self.history)]
        lines = [["row", "t", "alpha_bar", "p", "q", "a", *factors, "c", "noise"]]
        for i, (row, alpha_bar) in enumerate(zip(self.rows(), self.alpha_bar, strict=True)):
            t = f"{row.t:.3f}".rstrip("0").rstrip(".")
            numbers = [f"{number:.6f}" for number in (alpha_bar, row.p, row.q, row.a, *row.b, row.c)]
            lines.append([str(i), t, *numbers, "yes" if row.draws else "-"])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        body = ["  ".join(map(str.rjust, line, widths)) for line in lines]
        calls = f"{len(self)} UNet calls, history {self.history}"
        return "\n".join([f"{self.name}: {calls}, {self.prediction_type}, init {self.init:.6f}", *body])

    def to_json(self) -> dict[str, Any]:
        """The table as plain lists and numbers, which `table_file.parse_table` reads back to the bit."""
        head = {"name": self.name, "prediction_type": self.prediction_type, "init": float(self.init)}
        head |= {"last_alpha_bar": float(self.last_alpha_bar)}
        return head | {column: getattr(self, column).tolist() for column in COLUMNS}


class _Call(NamedTuple):
    """One UNet call of a traced run."""

    state: Vector  # (D,) the state it was given, in basis coordinates, variance-preserving
    level: Level
    output: int  # coordinate of what it returned


class _Recorder:
    """Runs a formula on unit vectors and notes what it asked for.

    Coordinate 0 is the initial unit noise; each UNet call and each noise draw takes the next free one.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 1
        self.calls: list[_Call] = []
        self.noises: list[list[int]] = []

    def _fresh(self) -> Vector:
        unit = np.zeros(self.size)
        unit[self.used % self.size] = 1.0
        self.used += 1
        return unit

    def predict(self, x: Vector, level: Level) -> Vector:
        self.calls.append(_Call(x * level.vp_scale, level, self.used))
        self.noises.append([])
        return self._fresh()

    def noise(self) -> Vector:
        self.noises[-1].append(self.used)
        return self._fresh()

    def run(self, formula: Traced, x_scale: float) -> Vector:
        start = np.zeros(self.size)
        start[0] = x_scale
        return formula(start, self.predict, self.noise)


def trace(formula: Traced, *, name: str, history: str, prediction_type: str, x_scale: float = 1.0) -> Table:
    """Run `formula` once on basis vectors and read its table off.

    Args:
        formula: `formula(x, predict, noise) -> x`, written for any state x = alpha*x0 + sigma*eps;
            `predict(x, level)` asks for what the history holds, `noise()` for a unit normal tensor.
        name: goes into the table and into messages.
        history: what `predict` returns: "x0" (data), "eps" (noise) or "output" (the model's raw output).
        prediction_type: what the model returns, see `Table`.
        x_scale: the standard deviation of the first x.

    Returns:
        The table, its state rescaled to be variance preserving. K is the smallest history that reproduces the
        run.

    Raises:
        SamplerError: the sampler is outside the row form, its coefficients are not finite, or it asks for
            epsilon at a level without signal.
    """
    # sigma = 0 gives infinite log-SNR, on purpose; Table refuses what stays infinite
    with np.errstate(all="ignore"):
        count = _Recorder(size=1)
        count.run(formula, x_scale)
        recorder = _Recorder(size=count.used)
        final = recorder.run(formula, x_scale)
        levels = [call.level for call in recorder.calls]
        states = np.stack([*(call.state for call in recorder.calls), final])
        _refuse_non_finite(states, name)
        outputs = [call.output for call in recorder.calls]
        a, b, c = _read_rows(states, outputs, recorder.noises, name)
        conversions = [_conversion(level, history, prediction_type, name) for level in levels]
    return Table(
        name=name,
        prediction_type=prediction_type,
        t=np.array([float(np.float32(level.t)) for level in levels]),  # as the UNet's embedding rounds it
        p=np.array([p for p, _ in conversions]),
        q=np.array([q for _, q in conversions]),
        a=a,
        b=b,
        c=c,
        draws=np.array([bool(drawn) for drawn in recorder.noises]),
        alpha_bar=np.array([(level.alpha * level.vp_scale) ** 2 for level in levels]),
        init=float(states[0, 0]),
    )


def _refuse_non_finite(states: Vector, name: str) -> None:
    if not np.isfinite(states).all():
        raise SamplerError(
            f"sampler {name}: its update divides by zero on this schedule",
            expected="a final sigma its order can reach, and distinct noise levels",
            fix="Use lower_order_final, final_sigmas_type='sigma_min', or fewer steps.",
        )


def _read_rows(
    states: Vector, outputs: Sequence[int], noises: Sequence[Sequence[int]], name: str
) -> tuple[Vector, Vector, Vector]:
    """Solve every row for (a, b, c) with the shortest history that leaves no remainder."""
    for k in range(1, HISTORY + 1):
        rows = [_read_row(states, outputs, noises[i], i, k) for i in range(len(outputs))]
        solved = [row for row in rows if row is not None]
        if len(solved) == len(rows):
            a, b, c = zip(*solved, strict=True)
            return np.array(a), np.array(b), np.array(c)
    raise SamplerError(
        f"sampler {name} is outside the row form (older outputs or more than one noise per UNet call)",
        expected=f"updates linear in the state, the last {HISTORY} outputs and one noise",
        fix="Choose another sampler; docs/samplers.md lists those in the form.",
    )


def _read_row(
    states: Vector, outputs: Sequence[int], drawn: Sequence[int], i: int, k: int
) -> tuple[float, Vector, float] | None:
    """(a, b, c) of row i for a history of k, or None when k does not suffice."""
    before, after = states[i], states[i + 1]
    window = [outputs[i - j] for j in range(min(k, i + 1))]
    inner = [*window, *drawn]
    outside = np.ones(len(before), dtype=np.bool_)
    outside[inner] = False
    # `a` comes from the largest coordinate outside the window, not always from the initial noise: LCM nearly
    # erases that one, and a ratio of two tiny numbers is noise.
    anchor = int(np.argmax(np.where(outside, np.abs(before), -1.0)))
    a = float(after[anchor] / before[anchor]) if abs(before[anchor]) > _NEGLIGIBLE else 0.0
    rest = after - a * before
    if float(np.max(np.abs(rest[outside]), initial=0.0)) > _TRACE_TOLERANCE * float(np.max(np.abs(after))):
        return None
    noisy = [n for n in drawn if abs(rest[n]) > _NEGLIGIBLE]
    if len(noisy) > 1:
        return None
    b = np.zeros(k)
    b[: len(window)] = rest[window]
    return a + 0.0, b, float(rest[noisy[0]]) if noisy else 0.0  # + 0.0 turns -0.0 into 0.0


def _conversion(level: Level, history: str, prediction_type: str, name: str) -> tuple[float, float]:
    """(p, q) such that p*y + q*m is the history's quantity at this level."""
    alpha, sigma = level.alpha * level.vp_scale, level.sigma * level.vp_scale
    if history == "output" or (history, prediction_type) in (("x0", "sample"), ("eps", "epsilon")):
        return 0.0, 1.0
    if prediction_type == "v_prediction":  # v = alpha*eps - sigma*x0 (Salimans & Ho 2022, Appendix D)
        return (alpha, -sigma) if history == "x0" else (sigma, alpha)
    divisor, other = (alpha, sigma) if history == "x0" else (sigma, alpha)
    if divisor == 0:
        raise SamplerError(
            f"sampler {name}: prediction_type {prediction_type!r} at alpha_bar = {alpha**2:g}",
            expected="v_prediction where the schedule has zero terminal SNR",
            fix="Set prediction_type to what the model was trained for, or rescale_betas_zero_snr to false.",
        )
    return 1 / divisor, -other / divisor
