"""The log: what is written is what is read; damage shows; a torn end costs the torn step and no other."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from justforward import Step, UserError, noise, read_log, trajectory, verify
from justforward.course import Course
from justforward.durable import Pace
from justforward.trajectory import MAGIC, Log, Writer, rounded

MOST = 8191


def header(groups: int = 1, rule_state: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "noise": noise.NOISE_VERSION,
        "base": "0123",
        "seed": 7,
        "family": "gaussian",
        "groups": [1e-3] * groups,
        "rule": "sgd",
        "rule_state": rule_state,
        "momentum": [0.0, 1],
        "settings": {},
        "tensors": [],
        **changes,
    }


def write(path: Path, steps: Sequence[Step], head: dict[str, Any], seal: bool = True) -> list[int]:
    """Write a log anew; sizes of the file: after the header, after each step."""
    path.unlink(missing_ok=True)
    writer = Writer.create(path, head)
    sizes = [path.stat().st_size]
    for step in steps:
        writer.append(step)
        sizes.append(path.stat().st_size)
    if seal:
        writer.close()
    else:
        writer._file.close()
    return sizes


def kept(steps: Sequence[Step]) -> str:
    """All that a log keeps of steps; as text, which tells -0.0 from 0.0."""
    return repr(
        [
            (s.index, s.coefficients, s.scales, s.decays, s.rule_state, s.norms, s.rates)
            for s in steps
        ]
    )


def message(path: Path) -> str:
    """What `read_log` says against the file: one line that names it."""
    with pytest.raises(UserError) as caught:
        read_log(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    return text


def chained(head: bytes, data: Sequence[int]) -> bytes:
    """Words of 26 bits with their checks, after these bytes of header: the format, spelled out once more."""
    out = b""
    state = zlib.crc32(head[:-4])
    for word in data:
        state = zlib.crc32(struct.pack("<I", word & ~63), state)
        out += struct.pack("<I", word & ~63 | state >> 14 & 63)
    return out


def headed(packed: bytes) -> bytes:
    """The front of a log around any bytes in place of the compressed header, with a good checksum."""
    raw = MAGIC + struct.pack("<I", len(packed)) + packed
    return raw + struct.pack("<I", zlib.crc32(raw))


NUMBERS = st.floats(-(2.0**126), 2.0**126, width=32).map(rounded)
RATES = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5]), st.floats(0.0, 10.0).map(rounded)
)  # never negative


@st.composite
def runs(draw: Any, least: int = 0) -> tuple[dict[str, Any], list[Step]]:
    groups, rule_state = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    some_rates = st.tuples(*[RATES] * groups)
    pool = draw(st.lists(some_rates, min_size=1, max_size=2))  # rates stay for a while
    rule, normed = draw(st.sampled_from(["sgd", "clip(3)+adam"])), draw(st.booleans())
    steps = [
        Step(
            index,
            tuple(draw(st.lists(NUMBERS, min_size=1, max_size=4))),
            draw(st.sampled_from(pool)),
            draw(st.sampled_from(pool)),
            draw(st.tuples(*[NUMBERS] * rule_state)),
            norms=draw(st.sampled_from(pool)) if normed else (),
            rates=draw(st.sampled_from(pool)) if rule != "sgd" else (),
        )
        for index in range(draw(st.integers(least, 6)))
    ]
    return header(groups, rule_state, rule=rule), steps


# Each kind of record: plain, more directions, other scales, other decays, all at once, plain again.
COURSE = [
    Step(0, (0.5,), (1.0, 1.0), (0.0, 0.0), (0.25,)),
    Step(1, (0.5, -1.0, 2.0), (1.0, 1.0), (0.0, 0.0), (0.5,)),
    Step(2, (0.5, -1.0, 0.0), (1.0, 0.125), (0.0, 0.0), (0.75,)),
    Step(3, (1.5, -1.0, -0.0), (1.0, 0.125), (0.5, 0.0), (1.0,)),
    Step(4, (-3.0,), (0.5, 1.0), (0.0, 0.25), (1.25,)),
    Step(5, (rounded(1e-7),), (0.5, 1.0), (0.0, 0.25), (rounded(math.pi),)),
]
HEAD = header(groups=2, rule_state=1)


# ------------------------------------------------------------------------------------------ numbers


def test_steps_are_the_same_by_what_a_log_says_of_them() -> None:
    one = Step(3, (1.0,), rule_state=(2.0,), loss=float("nan"))
    assert (
        one
        == Step(3, (1.0,), rule_state=(2.0,), loss=float("nan"))
        == Step(3, (1.0,), rule_state=(2.0,), loss=1.0)
    )
    assert one != Step(3, (1.5,), rule_state=(2.0,))


@given(x=st.floats(-(2.0**127), 2.0**127, width=32))
@example(x=1.5 * 2.0**-143)
@example(x=-0.0)
@settings(max_examples=300)
def test_rounded_is_the_nearest_of_18_bits(x: float) -> None:
    quantum = 2.0 ** (max(math.frexp(x)[1], -125) - 18)
    nearest = round(x / quantum) * quantum  # Python's round: ties to even
    assert rounded(x) == nearest
    assert rounded(rounded(x)) == rounded(x)
    assert math.copysign(1, rounded(x)) == math.copysign(1, x)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(0x3F800000, 0x3F800000), (0x3F800001, 0x3F800000), (0x3F80001F, 0x3F800000),
     (0x3F800020, 0x3F800000), (0x3F800021, 0x3F800040), (0x3F800060, 0x3F800080),
     (0x3F80005F, 0x3F800040), (0x3FFFFFE0, 0x40000000), (0x00000020, 0x00000000),
     (0x00000060, 0x00000080), (0xBF800060, 0xBF800080), (0x7F7FFFDF, 0x7F7FFFC0)],
)  # fmt: skip
def test_rounded_by_hand(bits: int, expected: int) -> None:
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    assert struct.pack("<f", rounded(value)) == struct.pack("<I", expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -1e300, 3.4028234e38])
def test_rounded_refuses_what_has_no_finite_float32(value: float) -> None:
    with pytest.raises(UserError, match="lower lr"):
        rounded(value)


# --------------------------------------------------------------------------------- write and read


@given(run=runs(), seal=st.booleans())
@settings(max_examples=80)
def test_what_is_written_is_read(run: Any, seal: bool, tmp_path: Path) -> None:
    head, steps = run
    path = tmp_path / "log"
    sizes = write(path, steps, head, seal)
    log = read_log(path)
    assert kept(log.steps) == kept(steps)
    assert log.header == head
    assert (log.path, log.size, log.truncated, log.sealed) == (path, path.stat().st_size, 0, seal)
    assert log.size == sizes[-1] + 12 * seal
    assert all(
        math.isnan(s.loss) and s.projected_grads == () and s.forwards == 0 for s in log.steps
    )


def test_twenty_thousand_plain_steps_take_less_than_100_kb(tmp_path: Path) -> None:
    tensors = [
        [f"model.layers.{i}.mlp.weight", [576, 1536], "torch.float32", 0] for i in range(300)
    ]
    steps = [Step(i, (rounded(1e-6 * math.sin(i)),)) for i in range(20_000)]
    sizes = write(tmp_path / "log", steps, header(tensors=tensors))
    assert (tmp_path / "log").stat().st_size < 100_000
    assert sizes[-1] - sizes[0] == 4 * 20_000
    assert kept(read_log(tmp_path / "log").steps) == kept(steps)


def test_rates_and_counts_cost_nothing_while_they_stay(tmp_path: Path) -> None:
    sizes = write(tmp_path / "log", COURSE, HEAD)
    words = [(b - a) // 4 for a, b in pairwise(sizes)]
    # A coefficient and a scalar of state; a count and two coefficients more; scales (a mark and two numbers);
    # decays; all of them with one coefficient again; plain.
    assert words == [2, 5, 4 + 3, 4 + 3, 1 + 3 + 3 + 2, 2]


def test_the_most_directions_a_step_may_have(tmp_path: Path) -> None:
    steps = [Step(0, (0.5,) * MOST), Step(1, (0.25,))]
    write(tmp_path / "log", steps, header())
    assert kept(read_log(tmp_path / "log").steps) == kept(steps)


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (Step(0, (0.5,) * (MOST + 1)), "8192 directions: this log takes 1 to 8191"),
        (Step(0, ()), "0 directions"),
        (Step(0, (0.5,), (1.0, 1.0)), "2 scales: this log takes 1"),
        (Step(0, (0.5,), (1.0,), ()), "0 decays: this log takes 1"),
        (Step(0, (0.5,), rule_state=(1.0,)), "1 scalars of rule state: this log takes 0"),
        (Step(0, (0.5,), rates=(1.0,)), "1 rates: this log takes 0"),
        (Step(0, (0.5,), norms=(1.0, 1.0)), "2 norms: this log takes 1"),
        (Step(0, (0.1,)), "0.1, which the log would keep as 0.0999"),
        (Step(0, (0.5,), (0.1,)), "0.1, which"),
        (Step(0, (math.inf,)), "lower lr"),
        (Step(0, (0.5,), (1.0,), (math.nan,)), "lower lr"),
    ],
)
def test_a_step_that_the_log_cannot_hold_is_refused(step: Step, named: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    good = Step(0, (0.5,))
    writer = Writer.create(path, header())
    with pytest.raises(UserError, match=named):
        writer.append(step)
    writer.append(good)
    writer.close()
    assert kept(read_log(path).steps) == kept([good])


@pytest.mark.parametrize("rates", [(), (0.5,), (0.1, 0.5)])
def test_a_log_of_a_rule_with_moments_takes_a_rate_for_each_group(
    rates: tuple[float, ...], tmp_path: Path
) -> None:
    writer = Writer.create(tmp_path / "log", header(groups=2, rule="adam"))
    named = "0.1, which" if len(rates) == 2 else f"{len(rates)} rates: this log takes 2"
    with pytest.raises(UserError, match=named):
        writer.append(Step(0, (0.5,), (1.0, 1.0), (0.0, 0.0), rates=rates))
    writer.close()


def test_rates_are_written_when_they_change(tmp_path: Path) -> None:
    rates = [(0.0, 0.0), (0.5, 0.25), (0.5, 0.25), (0.5, 0.0)]
    steps = [Step(i, (1.5,), (1.0, 1.0), (0.0, 0.0), rates=r) for i, r in enumerate(rates)]
    sizes = write(tmp_path / "log", steps, header(groups=2, rule="rmsprop"))
    assert [b - a for a, b in pairwise(sizes)] == [4, 16, 4, 16]
    assert kept(read_log(tmp_path / "log").steps) == kept(steps)


# A log as this format's first version wrote it: two groups, a scalar of rule state, four steps, the seal.
OLD = bytes.fromhex(
    "4a464c4f4720310a7800000078da258cc10ac3201044ff65ce4bd1f650f0574228966c45881adcf55042febd5a"
    "2fc30c33f34ee41285e12ce1ed8781b1f70708c2bcc13d091f9fe2feed45f04d24fadccb504b3b046e3137632c"
    "fd7525d4b60f82840d33bc44bd4e7a2a89b3b6344f34e6c2aa3187ce392f827296520774bd7e5cb82ea7a7b79a"
    "192b00003f1800803ef000807f2300003f100080bf280000402500003f1600887f1900803f0700003e1200003f"
    "280080bf050000001800403f2b00907f3d00003f130000001b00c03f240080bf110000803600803f5700807f03"
    "00887f2000003f0600803f2800907f230000002a00803e100040c02300a03f99bfd633c10f49403c00987f06f4"
    "3200e9ed1a00"
)


def test_an_old_log_reads_as_ever(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(OLD)
    log = verify(tmp_path / "log")
    assert kept(log.steps) == kept(COURSE)
    assert log.header == {**HEAD, "noise": 1}
    assert log.sealed


def test_the_words_are_those_of_the_description(tmp_path: Path) -> None:
    sizes = write(tmp_path / "log", COURSE, HEAD)
    raw = (tmp_path / "log").read_bytes()
    data = struct.unpack(f"<{(len(raw) - sizes[0]) // 4}I", raw[sizes[0] :])
    assert raw[sizes[0] :] == chained(raw[: sizes[0]], data)


def test_a_course_takes_past_directions_along() -> None:
    course = Course(seed=3, beta=0.5, window=2)
    lanes = [[noise.direction_seed(3, s, k) for k in range(n)] for s, n in enumerate((1, 2, 1))]
    for step in (Step(0, (1.0,)), Step(1, (2.0, 4.0))):
        course.move(step)
    move = course.move(Step(2, (8.0,), (1.0, 0.25), (0.0, 0.5)))
    assert move.seeds.tolist() == lanes[1] + lanes[2]  # step 0 is out of the window; newest last
    assert move.coefficients.tolist() == [[1.0, 2.0, 8.0], [0.25, 0.5, 2.0]]
    assert move.decays.tolist() == [0.0, 0.5]
    assert move.dither == noise.step_seed(3, 2)


# ------------------------------------------------------------------------------------------- damage


def test_cut_at_any_byte_all_whole_steps_are_used(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sizes = write(path, COURSE, HEAD)
    raw = path.read_bytes()
    for cut in range(sizes[0], len(raw)):
        path.write_bytes(raw[:cut])
        log = read_log(path)
        whole = sum(size <= cut for size in sizes) - 1
        assert kept(log.steps) == kept(COURSE[:whole])
        assert (log.size, log.truncated, log.sealed) == (sizes[whole], cut - sizes[whole], False)


def test_cut_in_the_header_nothing_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sizes = write(path, COURSE, HEAD)
    raw = path.read_bytes()
    for cut in range(sizes[0]):
        path.write_bytes(raw[:cut])
        assert ("cut short" if cut >= 6 else "not a justforward log") in message(path)


@pytest.mark.parametrize("seal", [True, False])
def test_any_flipped_bit_is_refused_and_named(seal: bool, tmp_path: Path) -> None:
    path = tmp_path / "log"
    sizes = write(path, COURSE, HEAD, seal)
    raw = path.read_bytes()
    for bit in range(8 * len(raw)):
        at = bit // 8
        damaged = bytearray(raw)
        damaged[at] ^= 1 << bit % 8
        path.write_bytes(damaged)
        text = message(path)
        if at < sizes[0]:
            assert any(w in text for w in ("header", "log format", "not a justforward log"))
        else:
            word = at - (at - sizes[0]) % 4
            step = sum(size <= at for size in sizes) - 1
            assert f"damaged at byte {word}, in step {step}: a checksum differs" in text


@given(run=runs(least=1), cut=st.floats(0, 1), where=st.floats(0, 1, exclude_max=True))
@settings(max_examples=150)
def test_cut_and_flipped_never_gives_other_steps(
    run: Any, cut: float, where: float, tmp_path: Path
) -> None:
    head, steps = run
    path = tmp_path / "log"
    sizes = write(path, steps, head)
    raw = path.read_bytes()
    damaged = bytearray(raw[: sizes[0] + round(cut * (len(raw) - sizes[0]))])
    bit = int(8 * sizes[0] + where * 8 * (len(damaged) - sizes[0]))
    if bit // 8 < len(damaged):
        damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    last_whole_word = len(damaged) - (len(damaged) - sizes[0]) % 4
    if bit // 8 < last_whole_word:
        assert "a checksum differs" in message(path)
    else:  # in the last bytes of a torn word, which are left out
        whole = sum(size <= len(damaged) for size in sizes) - 1
        assert kept(read_log(path).steps) == kept(steps[:whole])


def test_another_byte_in_a_sealed_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sizes = write(path, COURSE[:4], HEAD)
    raw = path.read_bytes()
    for at in range(sizes[0], len(raw)):
        for change in range(1 + at % 16, 256, 16):
            damaged = bytearray(raw)
            damaged[at] ^= change
            path.write_bytes(damaged)
            message(path)


def test_the_seal_holds_what_the_checks_of_words_let_through(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sizes = write(path, COURSE, HEAD)
    raw = path.read_bytes()
    data = list(struct.unpack(f"<{(len(raw) - sizes[0]) // 4}I", raw[sizes[0] :]))
    data[0] ^= 1 << 20  # all checks of words are made good again below
    path.write_bytes(raw[: sizes[0]] + chained(raw[: sizes[0]], data))
    assert f"before byte {sizes[-1] + 4}: the seal differs" in message(path)


def test_two_records_swapped_or_one_left_out_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    steps = [Step(i, (float(i),)) for i in range(8)]
    sizes = write(path, steps, header())
    raw = path.read_bytes()
    a, b, c = sizes[2], sizes[3], sizes[4]
    for damaged in (raw[:a] + raw[b:c] + raw[a:b] + raw[c:], raw[:a] + raw[b:], raw[:b] + raw[a:]):
        path.write_bytes(damaged)
        assert "a checksum differs" in message(path)


def test_the_header_of_another_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "one", COURSE, HEAD)
    sizes = write(tmp_path / "two", COURSE, {**HEAD, "seed": 8})
    other = write(tmp_path / "log", COURSE, HEAD)
    raw = (tmp_path / "two").read_bytes()[: sizes[0]] + (tmp_path / "one").read_bytes()[other[0] :]
    (tmp_path / "log").write_bytes(raw)
    assert "in step 0" in message(tmp_path / "log")


# -------------------------------------------------------------------------------- resume and seal


@given(run=runs(least=1), cut=st.floats(0, 1))
@settings(max_examples=80)
def test_resumed_after_a_torn_end_is_as_undisturbed(run: Any, cut: float, tmp_path: Path) -> None:
    head, steps = run
    path = tmp_path / "log"
    sizes = write(path, steps, head)
    raw = path.read_bytes()
    path.write_bytes(raw[: sizes[0] + round(cut * (sizes[-1] - sizes[0]))])
    log = read_log(path)
    writer = Writer.resume(log)
    assert path.stat().st_size == log.size
    for step in steps[len(log.steps) :]:
        writer.append(step)
    writer.close()
    assert path.read_bytes() == raw


def test_a_seal_is_the_mark_of_a_clean_end_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, COURSE[:3], HEAD)
    log = read_log(path)
    assert log.sealed
    writer = Writer.resume(log)
    for step in COURSE[3:]:
        writer.append(step)
        assert not read_log(path).sealed
    writer.close()
    writer.close()  # the second time does nothing
    raw = path.read_bytes()
    assert (
        len(raw) == write(tmp_path / "other", COURSE, HEAD)[-1] + 2 * 12
    )  # rates are not told again
    assert read_log(path).sealed
    assert kept(read_log(path).steps) == kept(COURSE)
    for junk in (b"\0", b"ab", b"abc"):
        path.write_bytes(raw + junk)
        log = read_log(path)
        assert (log.sealed, log.truncated) == (False, len(junk))
        assert kept(log.steps) == kept(COURSE)


def test_a_torn_seal_is_cut_off_and_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sizes = write(path, COURSE, HEAD)
    raw = path.read_bytes()
    for cut in range(sizes[-1], len(raw)):
        path.write_bytes(raw[:cut])
        Writer.resume(read_log(path)).close()
        assert path.read_bytes() == raw


def test_verify_reads_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, COURSE, HEAD)
    assert kept(verify(path).steps) == kept(COURSE)
    path.write_bytes(path.read_bytes()[:-20] + b"x" + path.read_bytes()[-19:])
    with pytest.raises(UserError, match="damaged at byte"):
        verify(path)


# ---------------------------------------------------------------------------- places and full disks


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """The kernel takes what fits of a write, then refuses the next: as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullDisk:
    """A file that takes so many bytes of a write, then has no space left."""

    def __init__(self, file: Any, takes: int) -> None:
        self.file, self.takes = file, takes

    def write(self, raw: bytes) -> int:
        if self.takes == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(raw[: self.takes]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def failing_append(path: Path, disk: Any) -> None:
    whole = COURSE[:4]
    sizes = write(path, COURSE, HEAD)
    undisturbed = path.read_bytes()
    write(path, whole, HEAD, seal=False)
    writer = Writer.resume(read_log(path))
    disk(writer, sizes[4])
    assert path.stat().st_size == sizes[4]
    log = read_log(path)
    assert (kept(log.steps), log.truncated) == (kept(whole), 0)
    for step in COURSE[4:]:  # there is space again: the same writer goes on
        writer.append(step)
    writer.close()
    assert path.read_bytes() == undisturbed


@pytest.mark.parametrize("takes", [0, 1, 4, 13, 35])
def test_no_space_left_leaves_the_log_as_before(takes: int, tmp_path: Path) -> None:
    def disk(writer: Writer, size: int) -> None:
        real = writer._file
        writer._file = FullDisk(real, takes)  # type: ignore[assignment]
        for _ in range(2):
            with pytest.raises(
                UserError, match=r"cannot be written: No space left on device; the step was not"
            ):
                writer.append(COURSE[4])
        writer._file = real

    failing_append(tmp_path / "log", disk)


@pytest.mark.parametrize("takes", [0, 1, 13, 35])
def test_a_write_that_the_kernel_cuts_leaves_the_log_as_before(takes: int, tmp_path: Path) -> None:
    def disk(writer: Writer, size: int) -> None:
        with no_file_longer_than(size + takes), pytest.raises(UserError, match="cannot be written"):
            writer.append(COURSE[4])

    failing_append(tmp_path / "log", disk)


def test_no_space_for_the_seal_leaves_the_log_as_before(tmp_path: Path) -> None:
    path = tmp_path / "log"
    sizes = write(path, COURSE, HEAD, seal=False)
    writer = Writer.resume(read_log(path))
    with no_file_longer_than(sizes[-1] + 5), pytest.raises(UserError, match="cannot be written"):
        writer.close()
    assert path.stat().st_size == sizes[-1]
    writer.close()  # it is closed already
    assert not read_log(path).sealed
    Writer.resume(read_log(path)).close()
    assert read_log(path).sealed


def test_no_space_for_the_header_leaves_no_file(tmp_path: Path) -> None:
    with no_file_longer_than(20), pytest.raises(UserError, match="the log cannot be written"):
        Writer.create(tmp_path / "log", HEAD)
    assert list(tmp_path.iterdir()) == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, COURSE[:2], HEAD, seal=False)
    first = Writer.resume(read_log(path))
    for second in (Writer.resume, lambda log: Writer.rewind(log, 1)):
        with pytest.raises(UserError, match="log: another process, or another optimizer of this"):
            second(read_log(path))
    first.append(COURSE[2])
    first.close()
    assert kept(read_log(path).steps) == kept(COURSE[:3])


def test_a_log_that_has_grown_since_it_was_read_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, COURSE[:2], HEAD, seal=False)
    old = read_log(path)
    writer = Writer.resume(read_log(path))
    writer.append(COURSE[2])
    writer.close()
    with pytest.raises(UserError, match="the log has changed since it was read: try again"):
        Writer.resume(old)
    assert kept(read_log(path).steps) == kept(COURSE[:3])


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 3), (3600.0, 0), (math.inf, 0)])
def test_steps_are_forced_to_the_disk_at_the_pace(
    seconds: float, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    write(path, COURSE[:1], HEAD, seal=False)
    writer = Writer.resume(read_log(path))
    writer.pace = Pace(seconds)
    forced: list[int] = []
    monkeypatch.setattr(trajectory.os, "fsync", forced.append)
    for step in COURSE[1:4]:
        writer.append(step)
    assert len(forced) == calls
    writer.close()  # a clean end always is
    assert len(forced) == calls + 1


def test_a_disk_that_cannot_keep_a_step_leaves_the_log_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def disk(writer: Writer, size: int) -> None:
        writer.pace = Pace(0.0)
        with monkeypatch.context() as broken:
            broken.setattr(trajectory.os, "fsync", fail)
            for _ in range(2):
                with pytest.raises(UserError, match="Input/output error; the step was not taken"):
                    writer.append(COURSE[4])

    failing_append(tmp_path / "log", disk)


def test_a_torn_end_that_cannot_be_cut_off_at_once_is_cut_off_later(tmp_path: Path) -> None:
    class Stuck(FullDisk):
        def truncate(self, size: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "log"
    write(path, COURSE[:4], HEAD, seal=False)
    writer = Writer.resume(read_log(path))
    real = writer._file
    writer._file = Stuck(real, 13)  # type: ignore[assignment]
    for why in ("No space left", "Input/output error"):
        with pytest.raises(UserError, match=f"{why}.*; the step was not taken"):
            writer.append(COURSE[4])
    assert kept(read_log(path).steps) == kept(COURSE[:4])
    writer._file = real
    for step in COURSE[4:]:
        writer.append(step)
    writer.close()
    assert kept(read_log(path).steps) == kept(COURSE)


def test_a_log_that_exists_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, COURSE, HEAD)
    raw = path.read_bytes()
    with pytest.raises(UserError, match="the log exists: resume it"):
        Writer.create(path, HEAD)
    assert path.read_bytes() == raw
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="the log exists"):
            Writer.create(taken, HEAD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "log"]


@pytest.mark.parametrize(
    ("place", "why"),
    [("missing/log", "No such file"), ("file/log", "Not a directory"), ("n" * 300, "too long")],
)
def test_a_place_without_room_for_a_log_is_named(place: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=f"the log cannot be written: .*{why}"):
        Writer.create(tmp_path / place, HEAD)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match=f"the log cannot be read: .*{why}"):
        read_log(tmp_path / place)


def test_a_read_only_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # A file system that is read-only refuses to remove what is not there, too.
    monkeypatch.setattr(trajectory, "open", refuse, raising=False)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="log: the log cannot be written: Read-only file system"):
        Writer.create(tmp_path / "log", HEAD)


def test_a_log_that_went_away_cannot_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, COURSE, HEAD)
    log = read_log(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be written: No such file"):
        Writer.resume(log)
    path.mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        Writer.resume(log)
    assert "cannot be read: Is a directory" in message(path)


# ------------------------------------------------------------------------------------ no log at all


@pytest.mark.parametrize(
    "version", ["2", "10", "0", "1.1", "\udcff".encode("utf-8", "replace").decode()]
)
def test_another_format_is_refused_by_its_name(version: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"JFLOG " + version.encode() + b"\n" + OLD[len(MAGIC) :])
    text = message(path)
    assert f"log format {version!r}" in text
    assert "use the version that wrote it" in text


@pytest.mark.parametrize(
    "raw",
    [b"", b"J", b"jflog 1\n", b"JFLOG\n", b"\x89PNG\r\n", b"\x80\x04\x95", b"step,loss\n0,1.5\n"],
)
def test_a_file_of_another_kind_is_no_log(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(raw)
    assert "not a justforward log" in message(tmp_path / "log")


@pytest.mark.parametrize(
    "inner",
    [
        "not json", "[]", "null", "{}", '{"groups": [0.001]}', "[" * 5000, json.dumps({**HEAD, "rule_state": -1}),
        json.dumps({**HEAD, "groups": 2}), json.dumps({k: v for k, v in HEAD.items() if k != "momentum"}),
    ],
)  # fmt: skip
def test_a_header_of_something_else_is_refused(inner: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(headed(zlib.compress(inner.encode())))
    assert "the header is not one of a log" in message(tmp_path / "log")


def test_a_log_of_a_rule_that_is_not_known_here_is_refused(tmp_path: Path) -> None:
    inner = json.dumps({**HEAD, "rule": "lion(0.9)"}).encode()
    (tmp_path / "log").write_bytes(headed(zlib.compress(inner)))
    assert "'lion(0.9)' is unknown; known are sgd" in message(tmp_path / "log")
    assert "use the version that wrote it" in message(tmp_path / "log")


def usable_or_refused(path: Path, raw: bytes) -> Log | None:
    path.write_bytes(raw)
    try:
        log = read_log(path)
    except UserError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.startswith(f"{path}: ")
        return None
    assert log.size + log.truncated == len(raw)
    return log


@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=200).map(lambda b: MAGIC[:6] + b),
        st.binary(max_size=200).map(lambda b: MAGIC + b),
        st.binary(max_size=100).map(lambda b: headed(b)),
        st.binary(max_size=100).map(lambda b: headed(zlib.compress(b))),
        st.binary(max_size=100).map(lambda b: headed(zlib.compress(json.dumps(HEAD).encode())) + b),
    )
)
@settings(max_examples=300)
def test_any_bytes_are_a_log_or_a_user_error(raw: bytes, tmp_path: Path) -> None:
    usable_or_refused(tmp_path / "log", raw)


MARKS = st.builds(
    lambda kind, argument: (0xFF0 | kind) << 19 | argument << 6, st.integers(0, 15), st.integers(0, MOST)
)  # fmt: skip


@given(
    groups=st.integers(0, 2),
    rule_state=st.integers(0, 2),
    data=st.lists(st.one_of(MARKS, st.integers(0, 2**32 - 1)), max_size=30),
)
@example(
    groups=1, rule_state=0, data=[0xFF0 << 19, 0, 0]
)  # steps of no words at all would never end
@settings(max_examples=300)
def test_any_words_are_steps_or_a_user_error(
    groups: int, rule_state: int, data: list[int], tmp_path: Path
) -> None:
    front = headed(zlib.compress(json.dumps(header(groups, rule_state)).encode()))
    log = usable_or_refused(tmp_path / "log", front + chained(front, data))
    if log is not None:
        assert sum(len(s.coefficients) + len(s.rule_state) for s in log.steps) <= len(data)
        assert all(len(s.scales) == len(s.decays) == groups for s in log.steps)


def test_a_mark_of_a_later_version_is_named(tmp_path: Path) -> None:
    front = headed(zlib.compress(json.dumps(header()).encode()))
    one = struct.unpack("<I", struct.pack("<f", 1.0))[0]
    (tmp_path / "log").write_bytes(front + chained(front, [one, (0xFF0 | 9) << 19]))
    assert f"unknown mark 9 at byte {len(front) + 4}" in message(tmp_path / "log")
