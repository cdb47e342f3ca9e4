"""Which sample comes at which position, as pure functions: orders of an epoch, blends of sources, length buckets.

    order = WindowOrder(seed=0, num_samples=10**9, batch_size=256)
    order.at(epoch, np.arange(step * 256, step * 256 + 256))       # sample numbers
    blend = Blend({"pairs": 0.7, "captions": 0.3})
    blend.at(np.arange(256))                                        # source numbers, how many came before

Nothing here has state: position -> sample depends on (seed, epoch, position) alone. What is kept is cache, and
everything may be called from several threads.

The trade-off between the two orders: `FullOrder` is a true shuffle and reads samples one by one from everywhere,
which wants storage that seeks well. `WindowOrder` reads runs of neighbouring samples within a stretch of steps,
which suits ranges and block caches; samples that lie together are then trained on in the same stretch of the
epoch, though never together in one batch as long as the batch is not larger than the number of lanes.
"""

import functools
import hashlib
import heapq
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from mmscale.errors import ConfigError, DataError

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: multiples of it are spread evenly
_CHUNK = 1 << 17  # samples evaluated together
MAX_HISTORY_BYTES = 2048  # of a stream's state, which has to stay below 4 kB


class Order(Protocol):
    """A bijection of [0, num_samples) for each epoch."""

    num_samples: int

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """(n,) int64 offsets into an epoch, 0 <= offset < num_samples, to (n,) int64 sample numbers."""
        ...


class FullOrder:
    """A permutation of all samples in each epoch, evaluated where it is needed.

    A Feistel network over the smallest 2**bits >= n, whose two parts take turns in being changed by a keyed
    hash of the other (so it is a bijection whatever the hash), made one over [0, n) by cycle walking: results
    outside are sent through again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Eight
    rounds; keys from BLAKE2b of (seed, epoch). Fewer than two walks are needed on average.

    On a few bits such a network is visibly biased; sets that fit into one block are sorted by a keyed hash
    instead.
    """

    _BLOCK = 1024  # offsets evaluated together: numpy's cost for each call is shared by them

    def __init__(self, seed: int | str, num_samples: int, *, shuffle: bool = True) -> None:
        self.num_samples = num_samples
        self._seed = seed
        self._shuffle = shuffle
        bits = (num_samples - 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._block = functools.lru_cache(maxsize=8)(self._evaluate_block)

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """(n,) int64 offsets into an epoch, 0 <= offset < num_samples, to (n,) int64 sample numbers."""
        if not self._shuffle:
            return offsets
        numbers = offsets // self._BLOCK
        samples = np.empty_like(offsets)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            samples[here] = self._block(epoch, number)[offsets[here] - number * self._BLOCK]
        return samples

    def _evaluate_block(self, epoch: int, number: int) -> np.ndarray:
        first = number * self._BLOCK
        offsets = np.arange(first, min(first + self._BLOCK, self.num_samples), dtype=np.uint64)
        keys = _keys(f"order/{self._seed}/{epoch}")
        if self.num_samples <= self._BLOCK:
            return np.argsort(_mix(_mix(offsets + keys[0]) + keys[1]))
        samples = self._encrypt(offsets, keys)
        while (outside := samples >= self.num_samples).any():
            samples[outside] = self._encrypt(samples[outside], keys)
        return samples.astype(np.int64)

    def _encrypt(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        high, low = x >> self._low_bits, x & self._low_mask
        for first, second in keys.reshape(4, 2):
            high = high ^ (_mix(low + first) & self._high_mask)
            low = low ^ (_mix(high + second) & self._low_mask)
        return (high << self._low_bits) | low


class WindowOrder:
    """Runs of neighbouring samples, spread over lanes and shuffled in windows, for storage read in ranges.

    The global batch is made of `num_lanes` lanes of `lane_rows` rows each: rows l * lane_rows and following
    belong to lane l, whose samples come from `runs_in_window` runs of `run_length` neighbours at a time. Ranks
    that own whole lanes (any world size that divides num_lanes) never read each other's runs.

    An epoch: the data set, rotated by a keyed shift, is cut into G = num_lanes * runs_in_window strata of equal
    size (to one sample). Of each stratum, each of the `num_windows` windows takes one run (window w takes run
    (P(w) + shift of the stratum) mod num_windows; P a keyed permutation), so that every window holds a stratified
    sample of the whole set. In each window the strata are dealt to the lanes by a keyed permutation, and the
    samples of a lane's runs are shuffled by a keyed permutation of their own (sorted by a 64-bit hash). Lanes
    change windows at different steps, evenly spread, so that new runs are needed at an even rate: lane l runs
    ahead by a phase, and finishes at the end of the epoch the window that it began in the middle.

    What of each stratum fills no runs (less than run_length / lane_rows steps and 1 % of the epoch; in small sets
    up to a ninth of it, by default) comes last, permuted sample by sample. A set with fewer than `runs_per_window`
    runs for each lane is permuted as a whole, as in FullOrder; `num_windows` is 0 then.

    num_lanes is the divisor of batch_size that is nearest to max_lanes (in ratio), so batch_size itself up to
    about max_lanes; runs_per_window and run_length are adjusted to what divides: see `runs_in_window` (from
    runs_per_window to twice that) and `run_length`.
    """

    def __init__(
        self,
        seed: int,
        num_samples: int,
        batch_size: int,
        *,
        run_length: int = 64,
        runs_per_window: int = 8,
        max_lanes: int = 1024,
    ) -> None:
        for name, value in (
            ("num_samples", num_samples),
            ("batch_size", batch_size),
            ("run_length", run_length),
            ("runs_per_window", runs_per_window),
            ("max_lanes", max_lanes),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_lanes = _nearest_divisor(batch_size, max_lanes)
        self.lane_rows = batch_size // self.num_lanes
        self.run_length = self.lane_rows * max(1, run_length // self.lane_rows)
        self._seed = seed
        runs_a_lane = num_samples // (self.num_lanes * self.run_length)
        if runs_a_lane < runs_per_window:
            self.num_windows = self.runs_in_window = 0
            self._whole = FullOrder(seed, num_samples)
            return
        self.runs_in_window = _window_size(runs_a_lane, runs_per_window)
        self.num_windows = runs_a_lane // self.runs_in_window
        self._lane_samples = self.runs_in_window * self.run_length  # of one lane in one window
        self._window_steps = self._lane_samples // self.lane_rows
        self._num_steps = self.num_windows * self._window_steps
        self._num_in_runs = self._num_steps * batch_size  # the other samples are the rest
        self._num_strata = self.num_lanes * self.runs_in_window
        # The first `_num_larger` strata have one sample more than the others.
        self._stratum, self._num_larger = divmod(num_samples, self._num_strata)
        self._rest = self._stratum - self.num_windows * self.run_length
        # Multiples of the golden ratio: the lanes of a rank, which are neighbours, have phases spread evenly.
        lanes = np.arange(self.num_lanes, dtype=np.uint64)
        shares = ((lanes * np.uint64(_GOLDEN)) >> np.uint64(40)).astype(np.int64)  # of 2**24
        self._phases = (shares * self._window_steps) >> 24
        self._windows = FullOrder(f"{seed}/windows", self.num_windows)
        self._whole = FullOrder(f"{seed}/rest", max(1, num_samples - self._num_in_runs))
        self._index_bits = np.uint64((self._lane_samples - 1).bit_length())
        self._index_mask = np.uint64((1 << int(self._index_bits)) - 1)
        self._epoch = functools.lru_cache(maxsize=4)(self._evaluate_epoch)
        self._deal = functools.lru_cache(maxsize=8)(self._evaluate_deal)
        # The window that each lane is in, and its samples: (lanes,) and (lanes, samples of a lane in a window).
        self._lock = threading.Lock()
        self._known = np.full(self.num_lanes, -1, np.int64)
        self._samples = np.zeros((self.num_lanes, self._lane_samples), np.int64)

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """(n,) int64 offsets into an epoch, 0 <= offset < num_samples, to (n,) int64 sample numbers.

        Cheap for the rows of a rank at one step, for steps that follow each other: what it takes then is looked
        up, but for the lanes that enter a window.
        """
        if not self.num_windows:
            return self._whole.at(epoch, offsets)
        if not len(offsets):
            return offsets.astype(np.int64)
        if offsets.max() < self._num_in_runs:
            return self._at_runs(epoch, offsets)
        samples = np.empty(len(offsets), np.int64)
        in_runs = offsets < self._num_in_runs
        samples[in_runs] = self._at_runs(epoch, offsets[in_runs])
        samples[~in_runs] = self._at_rest(epoch, offsets[~in_runs] - self._num_in_runs)
        return samples

    def _at_runs(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        steps, rows = np.divmod(offsets, self.batch_size)
        lanes, rows = np.divmod(rows, self.lane_rows)
        windows, steps = np.divmod((steps + self._phases[lanes]) % self._num_steps, self._window_steps)
        places = steps * self.lane_rows + rows
        wanted = windows + epoch * self.num_windows
        with self._lock:
            missing = self._known[lanes] != wanted
            if not missing.any():
                return self._samples[lanes, places]
            samples = np.empty(len(offsets), np.int64)
            samples[~missing] = self._samples[lanes[~missing], places[~missing]]
            pairs, inverse = np.unique(
                windows[missing] * self.num_lanes + lanes[missing], return_inverse=True
            )
            made = np.empty(len(inverse), np.int64)
            many = max(1, _CHUNK // self._lane_samples)
            for start in range(0, len(pairs), many):
                window, lane = np.divmod(pairs[start : start + many], self.num_lanes)
                table = self._evaluate(epoch, window, lane)
                here = slice(None) if len(pairs) <= many else (inverse >= start) & (inverse < start + many)
                made[here] = table[inverse[here] - start, places[missing][here]]
                # Pairs are sorted, so of several windows of a lane the last one is kept.
                self._samples[lane] = table
                self._known[lane] = window + epoch * self.num_windows
            samples[missing] = made
            return samples

    def _evaluate(self, epoch: int, windows: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """(m,) windows and lanes -> (m, samples of a lane in a window): in which order they come."""
        rotation, shifts, key = self._epoch(epoch)
        keys = _mix(key + (windows * self.num_lanes + lanes).astype(np.uint64))
        hashes = _mix(keys[:, None] + _multiples(self._lane_samples))
        # The places ride in the low bits, so that a sort does what an argsort would, at a third of the time.
        hashes &= ~self._index_mask
        hashes |= np.arange(self._lane_samples, dtype=np.uint64)
        hashes.sort(axis=1)
        hashes &= self._index_mask
        places = hashes.view(np.int64)
        firsts = np.empty((len(windows), self.runs_in_window), np.int64)  # of each run
        for window in np.unique(windows).tolist():
            here = windows == window
            strata = self._deal(epoch, window)[lanes[here]]
            order = self._windows.at(epoch, np.array([window], np.int64))
            runs = (order + shifts[strata]) % self.num_windows
            starts = strata * self._stratum + np.minimum(strata, self._num_larger)
            firsts[here] = starts + runs * self.run_length
        members = firsts[:, :, None] + (np.arange(self.run_length) + rotation)
        members[members >= self.num_samples] -= self.num_samples
        return np.take_along_axis(members.reshape(len(windows), -1), places, axis=1)

    def _at_rest(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        numbers = self._whole.at(epoch, offsets)
        in_larger = self._num_larger * (self._rest + 1)
        larger = numbers < in_larger
        sizes = np.where(larger, self._rest + 1, max(1, self._rest))
        strata, places = np.divmod(np.where(larger, numbers, numbers - in_larger), sizes)
        strata = np.where(larger, strata, strata + self._num_larger)
        starts = strata * self._stratum + np.minimum(strata, self._num_larger)
        in_stratum = self.num_windows * self.run_length + places
        return (starts + in_stratum + self._epoch(epoch)[0]) % self.num_samples

    def _evaluate_epoch(self, epoch: int) -> tuple[int, np.ndarray, np.uint64]:
        """The rotation, the shift of each stratum, and the key of the shuffles in the lanes."""
        keys = _keys(f"lanes/{self._seed}/{epoch}")
        strata = np.arange(self._num_strata, dtype=np.uint64)
        shifts = _mix(_mix(strata + keys[1]) + keys[2]) % np.uint64(self.num_windows)
        return int(keys[0]) % self.num_samples, shifts.astype(np.int64), keys[3]

    def _evaluate_deal(self, epoch: int, window: int) -> np.ndarray:
        """(lanes, runs of a lane): the strata that each lane's runs come from in a window."""
        keys = _keys(f"deal/{self._seed}/{epoch}/{window}")
        strata = np.arange(self._num_strata, dtype=np.uint64)
        order = np.argsort(_mix(_mix(strata + keys[0]) + keys[1]))
        return order.reshape(self.num_lanes, self.runs_in_window)


@functools.lru_cache(maxsize=4)
def _multiples(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)


def _window_size(runs: int, least: int) -> int:
    """From `least` to twice that: the first that leaves at most 1 % of `runs` over, or the one that leaves least."""

    def left(size: int) -> int:
        return 0 if runs % size <= runs // 100 else runs % size

    return min(range(least, 2 * least), key=left)


def _nearest_divisor(number: int, to: int) -> int:
    divisors = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors += [number // d for d in divisors]
    return min(divisors, key=lambda d: (max(d / to, to / d), d))


def _keys(text: str) -> np.ndarray:
    """(8,) uint64 from a text."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=64).digest(), "<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014), on (n,) uint64 with wrap-around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- several sources ---


class Blend:
    """Which source each position draws from, in proportion to weights, never off by one sample or more.

    weights: source -> weight (not negative; their sum is made 1). A float means its shortest decimal form, 0.1 is a
        tenth. With a common denominator Q of at most `resolution` they hold exactly, else they are rounded to
        multiples of 1 / resolution by largest remainders: `effective` has what holds.

    The schedule of one period of Q positions is Tijdeman's ("The chairman assignment problem", 1980): after k
    positions each source has been drawn k * weight times, to within 1 - 1 / (2n - 2) for n sources of positive
    weight, which no schedule betters for all weights. It is an earliest-deadline schedule: the source's draw number
    x may come from the first k with k * weight - x >= 1 / (2n - 2), and of those that may, the one goes that would be
    late first. All in whole numbers, so that it is the same everywhere.

    Raises ConfigError that names the source for a weight that is negative or no number, or that is positive but
    rounded to nothing.
    """

    def __init__(self, weights: Mapping[str, float | int | Fraction], resolution: int = 65536) -> None:
        if not isinstance(resolution, int) or not 1 <= resolution <= 1 << 24:
            raise ValueError(f"resolution must be a whole number from 1 to 2**24, got {resolution!r}")
        self.names = tuple(weights)
        shares, self.period = _shares(weights, resolution)
        self.effective = {
            name: Fraction(share, self.period) for name, share in zip(self.names, shares, strict=True)
        }
        self._shares = np.array(shares, np.int64)
        self._sources = np.array(_chairman(shares), np.uint8 if len(shares) <= 256 else np.uint32)
        # How many of the same source came before in the period.
        by_source = np.argsort(self._sources, kind="stable")
        firsts = np.cumsum(self._shares) - self._shares
        self._counters = np.empty(self.period, np.int32)
        self._counters[by_source] = np.arange(self.period) - firsts[self._sources[by_source]]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m,) int64 positions to source numbers (places in `names`) and counters, both (m,) int64.

        The counter is how many samples of that source came at earlier positions.
        """
        periods, places = np.divmod(positions, self.period)
        sources = self._sources[places].astype(np.int64)
        return sources, periods * self._shares[sources] + self._counters[places]

    def counts(self, position: int) -> np.ndarray:
        """(sources,) int64: how many samples of each source come before `position`."""
        periods, place = divmod(position, self.period)
        return periods * self._shares + np.bincount(self._sources[:place], minlength=len(self.names))


def _shares(weights: Mapping[str, float | int | Fraction], resolution: int) -> tuple[list[int], int]:
    """Whole shares of a period, and the period."""
    exact: list[Fraction] = []
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, float | int | Fraction | np.number):
            raise ConfigError(f"weight of source {name!r}: must be a number, got {weight!r}")
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"weight of source {name!r}: must be finite and not negative, got {weight!r}")
        exact.append(_fraction(weight))
    total = sum(exact)
    if not total:
        raise ConfigError(f"weights: at least one source must have a positive weight, got {dict(weights)}")
    exact = [weight / total for weight in exact]
    period = math.lcm(*(weight.denominator for weight in exact))
    if period > resolution:
        period = resolution
    shares = [math.floor(weight * period) for weight in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i] * period, i))
    for i in by_remainder[: period - sum(shares)]:
        shares[i] += 1
    for name, weight, share in zip(weights, exact, shares, strict=True):
        if weight and not share:
            raise ConfigError(
                f"weight of source {name!r}: {float(weight):.3g} of the samples is less than the schedule can hold, "
                f"1 / {resolution}; give 0 to leave the source out, or a larger weight or resolution"
            )
    common = math.gcd(*shares)
    return [share // common for share in shares], period // common


def _fraction(number: float | int | Fraction) -> Fraction:
    """As written: 0.1 is a tenth, not the binary number next to it."""
    return Fraction(number) if isinstance(number, int | Fraction) else Fraction(repr(float(number)))


def _chairman(shares: Sequence[int]) -> list[int]:
    """Tijdeman's schedule of one period: `shares[i]` times i, sum(shares) in all."""
    period = sum(shares)
    drawn = [i for i, share in enumerate(shares) if share]
    if len(drawn) == 1:
        return drawn * period
    parts = 2 * len(drawn) - 2

    def release(i: int, x: int) -> int:
        """The first k = 1, 2, ... with k * shares[i] / period - x >= 1 / parts."""
        return max(1, -(-period * (parts * x + 1) // (parts * shares[i])))

    def deadline(i: int, x: int) -> int:
        """(x + 1 - 1 / parts) / shares[i], up to common factors, in 64 fractional bits: distinct ones stay so,
        since they differ by at least 1 / (shares[i] * shares[j]) > 2**-48."""
        return ((parts * (x + 1) - 1) << 64) // shares[i]

    waiting = [(release(i, 0), i, 0) for i in drawn]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    schedule: list[int] = []
    for k in range(1, period + 1):
        while waiting and waiting[0][0] <= k:
            _, i, x = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline(i, x), i, x))
        _, i, x = heapq.heappop(ready)
        schedule.append(i)
        if x + 1 < shares[i]:
            heapq.heappush(waiting, (release(i, x + 1), i, x + 1))
    return schedule


def sample_weights(
    token_weights: Mapping[str, float | int | Fraction], mean_tokens: Mapping[str, float | int | Fraction]
) -> dict[str, Fraction]:
    """Weights by samples that give the wanted shares of tokens.

    mean_tokens: source -> tokens in a sample, on average. Raises ConfigError for a source without a positive one.
    """
    weights = {}
    for name, weight in token_weights.items():
        mean = mean_tokens.get(name)
        if mean is None or not math.isfinite(mean) or mean <= 0:
            raise ConfigError(f"mean tokens of source {name!r}: must be a positive number, got {mean!r}")
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"weight of source {name!r}: must be finite and not negative, got {weight!r}")
        weights[name] = _fraction(weight) / _fraction(mean)
    total = sum(weights.values())
    if not total:
        raise ConfigError(
            f"weights: at least one source must have a positive weight, got {dict(token_weights)}"
        )
    return {name: weight / total for name, weight in weights.items()}


@dataclass(frozen=True)
class _Segment:
    start: int
    counts: tuple[int, ...]  # of each source, at the start
    shares: tuple[int, ...]  # of a period

    def blend(self, names: tuple[str, ...]) -> Blend:
        return _blend(names, self.shares)


@functools.lru_cache(maxsize=8)  # a schedule takes up to 50 ms to make and 330 kB to keep
def _blend(names: tuple[str, ...], shares: tuple[int, ...]) -> Blend:
    return Blend(dict(zip(names, shares, strict=True)), resolution=sum(shares))


class BlendHistory:
    """A blend whose weights change during a run: segments, each with a schedule of its own from its start.

        history = BlendHistory({"pairs": 1, "captions": 3})
        history.change(1_000_000, {"pairs": 1, "captions": 1})    # from this position on

    Within a segment each source is drawn (position - start) * weight times since the start, to less than one; counters
    go on over all segments. `to_json` fits a checkpoint: it has the latest segments, the last one always, as many
    as MAX_HISTORY_BYTES hold; older positions can't be replayed from it (`replay_from`). `records` has all.
    """

    def __init__(self, weights: Mapping[str, float | int | Fraction], resolution: int = 65536) -> None:
        self.resolution = resolution
        first = Blend(weights, resolution)
        self.names = first.names
        shares = tuple(
            share.numerator * (first.period // share.denominator) for share in first.effective.values()
        )
        self._segments = [_Segment(0, (0,) * len(self.names), shares)]
        # The largest that a segment may become, so that a run doesn't find out after weeks.
        most = _Segment(10**15, (10**15,) * len(self.names), (resolution,) * len(self.names))
        if self._num_bytes([most]) > MAX_HISTORY_BYTES:
            raise ConfigError(
                f"{len(self.names)} sources: their names and weights don't fit the {MAX_HISTORY_BYTES} bytes that a "
                "state has for them; use fewer sources or shorter names"
            )

    @property
    def replay_from(self) -> int:
        """The first position that is known; 0 but for a history that was read from a state that had lost more."""
        return self._segments[0].start

    @property
    def effective(self) -> dict[str, Fraction]:
        """The weights that hold since the last change."""
        return dict(self._segments[-1].blend(self.names).effective)

    def change(self, position: int, weights: Mapping[str, float | int | Fraction]) -> None:
        """Draw by `weights` from `position` on. The same weights as before change nothing.

        Raises ConfigError for other sources than before (give the weight 0 to one that pauses), ValueError for a
        position before the last change.
        """
        last = self._segments[-1]
        if position < last.start:
            raise ValueError(
                f"the weights changed at position {last.start} already, {position} is before that"
            )
        if set(weights) != set(self.names):
            raise ConfigError(
                f"weights: the sources are {list(self.names)}, got {list(weights)}; weight 0 pauses a source"
            )
        new = Blend({name: weights[name] for name in self.names}, self.resolution)
        shares = tuple(
            share.numerator * (new.period // share.denominator) for share in new.effective.values()
        )
        if shares == last.shares:
            return
        counts = last.counts if position == last.start else tuple(self.counts(position).tolist())
        if position == last.start:
            self._segments.pop()
        self._segments.append(_Segment(position, counts, shares))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Blend.at. Raises DataError for positions before `replay_from`."""
        if len(positions):
            self._check(int(positions.min()))
        starts = np.array([segment.start for segment in self._segments], np.int64)
        numbers = np.searchsorted(starts, positions, side="right") - 1
        sources, counters = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        for number in np.unique(numbers).tolist():
            segment, here = self._segments[number], numbers == number
            found, before = segment.blend(self.names).at(positions[here] - segment.start)
            sources[here], counters[here] = found, before + np.array(segment.counts, np.int64)[found]
        return sources, counters

    def counts(self, position: int) -> np.ndarray:
        """(sources,) int64: how many samples of each source come before `position`."""
        self._check(position)
        segment = next(segment for segment in reversed(self._segments) if segment.start <= position)
        within = segment.blend(self.names).counts(position - segment.start)
        return np.array(segment.counts, np.int64) + within

    def records(self) -> list[dict[str, Any]]:
        """All segments that are known, for a log: [{"position", "counts", "weights"}, ...], fit for JSON."""
        return [
            {
                "position": segment.start,
                "counts": dict(zip(self.names, segment.counts, strict=True)),
                "weights": {name: str(share) for name, share in segment.blend(self.names).effective.items()},
            }
            for segment in self._segments
        ]

    def to_json(self) -> dict[str, Any]:
        """For json.dumps, at most MAX_HISTORY_BYTES in its default form."""
        kept = self._segments[-1:]
        for segment in reversed(self._segments[:-1]):
            if self._num_bytes([segment, *kept]) > MAX_HISTORY_BYTES:
                break
            kept = [segment, *kept]
        return self._to_json(kept)

    def _to_json(self, segments: Sequence[_Segment]) -> dict[str, Any]:
        return {
            "version": 1,
            "resolution": self.resolution,
            "replay_from": segments[0].start,
            "sources": list(self.names),
            "segments": [[s.start, list(s.counts), list(s.shares)] for s in segments],
        }

    def _num_bytes(self, segments: Sequence[_Segment]) -> int:
        return len(json.dumps(self._to_json(segments)))

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "BlendHistory":
        """What `to_json` gave. Raises DataError for anything else."""
        try:
            if state["version"] != 1:
                raise ValueError(f"version {state['version']!r}, not 1")
            names = tuple(state["sources"])
            segments = [
                _Segment(int(a), tuple(map(int, b)), tuple(map(int, c))) for a, b, c in state["segments"]
            ]
            starts = [segment.start for segment in segments]
            if starts != sorted(set(starts)):
                raise ValueError(f"segments start at {starts}")
            for segment in segments:
                if not len(names) == len(segment.counts) == len(segment.shares):
                    raise ValueError(f"{len(names)} sources, but a segment of {len(segment.shares)}")
                if sum(segment.counts) != segment.start or min(segment.counts) < 0:
                    raise ValueError(f"{segment.counts} samples before position {segment.start}")
            history = cls(dict(zip(names, segments[0].shares, strict=True)), int(state["resolution"]))
            history._segments = segments
            for segment in segments:
                segment.blend(names)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"not a history of a blend: {type(error).__name__}: {error}") from error
        return history

    def _check(self, position: int) -> None:
        if position < self.replay_from:
            raise DataError(
                f"the weights at position {position} aren't known: this state can replay from position "
                f"{self.replay_from} on"
            )


# --- samples of similar length ---


class Buckets:
    """An order whose batches hold samples of similar length, so that little is padded.

    order: the underlying order; its windows of `window_batches` batches are rearranged, each in itself.
    lengths: (n,) int64 samples to (n,) lengths in any unit; NaN or negative for an unknown one.
    seed: of the permutations of batches.

    The samples of a window are sorted by (length, position) and cut into batches; the batches come in a keyed
    order. Unknown lengths are together, after the longest. Within a batch the samples of rising length are dealt
    to the rows in golden-ratio steps (the sequence p * golden mod 1, which is spread evenly over any stretch of
    p), so that ranks, which own stretches of rows, get nearly equal sums of lengths, for any world size; the
    batch itself doesn't depend on it. The last window of an epoch may be shorter, and what fills no whole batch
    stays where the order has it.

    The trade-off: a larger window pads less, and lets the lengths of a batch say more about its place in the window.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        lengths: Callable[[np.ndarray], np.ndarray],
        window_batches: int = 32,
        *,
        seed: int = 0,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("window_batches", window_batches)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.num_samples = order.num_samples
        self._order = order
        self._batch_size = batch_size
        self._lengths = lengths
        self._window = window_batches * batch_size
        self._num_in_batches = order.num_samples // batch_size * batch_size
        self._seed = seed
        self._samples = functools.lru_cache(maxsize=3)(self._evaluate)

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """(n,) int64 offsets into an epoch, 0 <= offset < num_samples, to (n,) int64 sample numbers."""
        samples = np.empty(len(offsets), np.int64)
        windows = np.where(offsets < self._num_in_batches, offsets // self._window, -1)
        for window in np.unique(windows).tolist():
            here = windows == window
            if window < 0:
                samples[here] = self._order.at(epoch, offsets[here])
            else:
                samples[here] = self._samples(epoch, window)[offsets[here] - window * self._window]
        return samples

    def _evaluate(self, epoch: int, window: int) -> np.ndarray:
        first = window * self._window
        offsets = np.arange(first, min(first + self._window, self._num_in_batches), dtype=np.int64)
        samples = self._order.at(epoch, offsets)
        lengths = np.asarray(self._lengths(samples), np.float64)
        if lengths.shape != samples.shape:
            raise ValueError(f"lengths of {samples.shape} samples must have that shape, got {lengths.shape}")
        lengths = np.where(lengths >= 0, lengths, np.nan)  # NaN is sorted last
        batches = samples[np.argsort(lengths, kind="stable")].reshape(-1, self._batch_size)
        keys = _keys(f"buckets/{self._seed}/{epoch}/{window}")
        numbers = np.arange(len(batches), dtype=np.uint64)
        batches = batches[np.argsort(_mix(_mix(numbers + keys[0]) + keys[1]))]
        shares = _mix(_mix(numbers + keys[2]) + keys[3])[:, None] + _multiples(self._batch_size)
        ranks = np.argsort(np.argsort(shares, axis=1), axis=1)
        return np.take_along_axis(batches, ranks, axis=1).reshape(-1)
