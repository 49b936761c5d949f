"""What the rows of a suite say: bits per byte, the share of the gap that is closed, and how sure both are.

Scores are nats and bytes by document. A resample draws documents of each text with replacement, the same ones for every
method, so that what documents differ by cancels in differences and ratios. With several seeds, an estimate is the mean over
seeds of what was measured within each, on the same resampled documents; what seeds differ by is added with Student's t of
n - 1 degrees of freedom. (Resampling three seeds instead gives 95 % intervals that hold in three of four cases.)

A text is known as `part/domain`; parts are `report`, `tune`, `unseen`, `mixed/interleaved`, `mixed/real`.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from benchmarks.reporting import rows as rows_lib
from benchmarks.reporting.rows import ANCHOR, FLEX, JOINT_1X, JOINT_2X, REPORT, Row
from flexjax import errors

Vector = Float[np.ndarray, " 1+R"]  # what was measured, then R resamples of it
RESAMPLES = 2000
LEVEL = 0.95
SEED = 2507


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; not a number where it is not defined, infinite ends where no bound can be given.

    Attributes:
      value: mean over seeds.
      low, high: the interval, over documents and, with several seeds, over seeds too.
      seeds: what each seed measured.
    """

    value: float
    low: float
    high: float
    seeds: Mapping[int, float]

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; not a number with one."""
        return float(np.std(list(self.seeds.values()), ddof=1)) if len(self.seeds) > 1 else math.nan

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class Sanity:
    """Whether joint-2x beats joint-1x beats the anchor in every seed: without that, no gap means anything."""

    holds: bool
    reasons: tuple[str, ...]


class Measures:
    """The rows of one suite at one size; of several for the same method and seed, the last one counts.

    Args:
      rows: as `rows.jsonl` has them.
      resamples: how many.

    Raises:
      DataError: something is no row, or there is none. IntegrityError: rows of several suites, sizes or corpora, or a method
        that was scored on other documents than the rest; the message names it.
    """

    def __init__(self, rows: Iterable[Row], resamples: int = RESAMPLES) -> None:
        self.resamples = resamples
        self.rows: dict[tuple[str, int], Row] = {}
        for number, row in enumerate(rows, 1):
            rows_lib.check(row, f"row {number}")
            self.rows[row["method"], row["seed"]] = row
        if not self.rows:
            raise errors.DataError("there is no row to report; run the suite first")
        self._check_origin()
        self.methods = list(dict.fromkeys(method for method, _ in self.rows))
        self.seeds = sorted({seed for _, seed in self.rows})
        self._texts = {key: rows_lib.texts(row) for key, row in self.rows.items() if row["status"] == "ok"}
        for seed in self.seeds:
            self._check_documents(seed)
        self._draws: dict[bytes, np.ndarray] = {}
        self._vectors: dict[tuple[str, int, str], Vector] = {}

    def seeds_of(self, method: str) -> list[int]:
        """The seeds in which a method finished."""
        return [seed for seed in self.seeds if (method, seed) in self._texts]

    def of(self, method: str) -> list[Row]:
        """The finished rows of a method, by seed."""
        return [self.rows[method, seed] for seed in self.seeds_of(method)]

    def named(self, method: str) -> Row:
        """A row that says what a method is, finished or not."""
        return next(row for (name, _), row in self.rows.items() if name == method)

    def domains(self, part: str = REPORT) -> list[str]:
        """The domains of a part, in the rows' order; a text that is not divided has one, without a name."""
        found = (text for texts in self._texts.values() for text in texts if rows_lib.within(text, part))
        return list(dict.fromkeys(text[len(part) + 1 :] for text in found))

    def extent(self, part: str) -> tuple[int, int] | None:
        """Documents and bytes of a part in the first seed that has it; None if nobody was scored on it."""
        for seed in self.seeds:
            for method in self.methods:
                if names := self._chosen(method, seed, part, None):
                    sizes = [self._texts[method, seed][name][1] for name in names]
                    return sum(map(len, sizes)), int(sum(size.sum() for size in sizes))
        return None

    def bits_per_byte(self, method: str, part: str = REPORT, domain: str | None = None) -> Estimate | None:
        """Of one domain, or averaged over the part's domains; None if it was not scored."""
        return self._estimate({seed: self._bits(method, seed, part, domain) for seed in self._scored(part, domain, method)})

    def difference(
        self, method: str, other: str, part: str = REPORT, domain: str | None = None, relative: bool = False
    ) -> Estimate | None:
        """Bits per byte of a method minus those of another, paired; None if one was not scored.

        Args:
          method, other: by name.
          part, domain: as for `bits_per_byte`.
          relative: as a share of the other's bits per byte.
        """
        found = {}
        for seed in self._scored(part, domain, method, other):
            mine, theirs = (self._bits(name, seed, part, domain) for name in (method, other))
            found[seed] = mine / theirs - 1 if relative else mine - theirs
        return self._estimate(found)

    def gap(self, method: str, reference: str = JOINT_2X, part: str = REPORT) -> Estimate | None:
        """(anchor - method) / (anchor - reference) in macro bits per byte: 0 is the anchor, 1 the reference.

        None where one of the three was not scored; not a number where the reference is not better than the anchor; without
        bounds where it is not better in some resample.
        """
        found, crossed = {}, False
        for seed in self._scored(part, None, method, ANCHOR, reference):
            mine, anchor, best = (self._bits(name, seed, part, None) for name in (method, ANCHOR, reference))
            width = anchor - best
            if width[0] <= 0:
                return Estimate(math.nan, math.nan, math.nan, {})
            crossed = crossed or bool((width <= 0).any())
            found[seed] = (anchor - mine) / np.where(width > 0, width, 1.0)
        estimate = self._estimate(found)
        return dataclasses.replace(estimate, low=-math.inf, high=math.inf) if estimate and crossed else estimate

    def sanity(self) -> Sanity:
        """Whether anything may be claimed."""
        missing = [name for name in (ANCHOR, JOINT_1X, JOINT_2X) if not self.seeds_of(name)]
        if missing:
            return Sanity(False, tuple(f"{name} {self.absence(name)}" for name in missing))
        reasons, holds = [], True
        for better, worse in ((JOINT_2X, JOINT_1X), (JOINT_1X, ANCHOR)):
            found = self.difference(worse, better)
            if found is None:
                return Sanity(False, (f"{better} and {worse} have no seed in common",))
            wrong = [seed for seed, value in found.seeds.items() if value <= 0]
            lacking = [seed for seed in self.seeds if seed not in found.seeds]
            holds = holds and not wrong and not lacking
            where = f"NOT in seed {', '.join(map(str, wrong))}" if wrong else "in every seed"
            where += f" but {', '.join(map(str, lacking))}, where one is missing" if lacking else ""
            size = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] bits per byte"
            reasons.append(f"{better} is better than {worse} {where}: by {size}")
        return Sanity(holds, tuple(reasons))

    def absence(self, method: str) -> str:
        """Why a method has no figure."""
        return "failed" if method in self.methods else "was not run"

    def ledger(self, method: str, field: str = "training_flops") -> float:
        """A figure of the ledger, mean over seeds; not a number if it has none."""
        values = [row["ledger"][field] for row in self.of(method) if row["ledger"].get(field) is not None]
        return float(np.mean(values)) if values else math.nan

    def expert_run(self) -> float:
        """FLOPs of one expert run of our recipe, mean over runs and seeds; not a number if it was not run."""
        runs = [row["ledger"].get("runs", {}) for row in self.of(FLEX)]
        found = [entry["flops"] for entries in runs for name, entry in entries.items() if name.startswith("expert-")]
        return float(np.mean(found)) if found else math.nan

    def _scored(self, part: str, domain: str | None, *methods: str) -> list[int]:
        """The seeds in which all of these were scored on it."""
        return [seed for seed in self.seeds if all(self._chosen(name, seed, part, domain) for name in methods)]

    def _chosen(self, method: str, seed: int, part: str, domain: str | None) -> list[str]:
        texts = self._texts.get((method, seed), {})
        return [text for text in texts if rows_lib.within(text, part) and domain in (None, text[len(part) + 1 :])]

    def _bits(self, method: str, seed: int, part: str, domain: str | None) -> Vector:
        """Bits per byte: what was measured, and each resample."""
        return np.mean([self._of_text(method, seed, text) for text in self._chosen(method, seed, part, domain)], axis=0)

    def _of_text(self, method: str, seed: int, text: str) -> Vector:
        key = (method, seed, text)
        if key not in self._vectors:
            nats, sizes = self._texts[method, seed][text]
            drawn = self._drawn(text, sizes)
            self._vectors[key] = drawn @ nats / (drawn @ sizes) / math.log(2)
        return self._vectors[key]

    def _drawn(self, text: str, sizes: Float[np.ndarray, " N"]) -> Float[np.ndarray, "1+R N"]:
        """How often each document counts: once, then by resample; the same for all who were scored on these documents."""
        key = text.encode() + sizes.tobytes()
        if key not in self._draws:
            count = len(sizes)
            drawn = np.random.default_rng([SEED, zlib.crc32(key)]).multinomial(count, [1 / count] * count, self.resamples)
            self._draws[key] = np.concatenate([np.ones((1, count)), drawn])
        return self._draws[key]

    def _estimate(self, found: Mapping[int, Vector]) -> Estimate | None:
        """The mean over seeds of what was measured within each, with its interval."""
        if not found:
            return None
        values = np.array(list(found.values()))
        mean, count = values.mean(axis=0), len(values)
        resampled = mean[1:]
        if count > 1:
            error = np.std(values[:, 0], ddof=1) / math.sqrt(count)
            resampled = resampled + error * np.random.default_rng([SEED, count]).standard_t(count - 1, self.resamples)
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(mean[0]), float(low), float(high), {seed: float(each[0]) for seed, each in found.items()})

    def _check_origin(self) -> None:
        """Raises unless all rows are of one suite, size and corpus."""
        for field in ("suite", "size", "corpus"):
            found = {row.get(field): f"method '{row['method']}' of seed {row['seed']}" for row in self.rows.values()}
            if len(found) > 1:
                said = ", ".join(f"{str(value)[:12]} ({where})" for value, where in found.items())
                raise errors.IntegrityError(f"rows differ in {field}: {said}; take out all but those of one, then report again")

    def _check_documents(self, seed: int) -> None:
        """Raises unless all methods of a seed were scored on the same documents, in the same order."""
        known: dict[str, tuple[str, dict[str, list[float]]]] = {}
        methods = [name for name in self.methods if (name, seed) in self._texts]
        for method in sorted(methods, key=lambda name: name != ANCHOR):
            texts = self._texts[method, seed]
            for part in rows_lib.PARTS:
                mine = {text: sizes.tolist() for text, (_, sizes) in texts.items() if rows_lib.within(text, part)}
                other, theirs = known.setdefault(part, (method, mine)) if mine else (method, mine)
                if wrong := [text for text in (*theirs, *mine) if mine.get(text) != theirs.get(text)]:
                    raise errors.IntegrityError(
                        f"method '{method}', seed {seed}: its documents of {wrong[0]} are not those of '{other}', or in "
                        "another order; score both on the same text"
                    )
