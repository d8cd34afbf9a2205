"""Two workers of one thread each against one worker of one thread, and the bytes that each sends.

    python benchmarks/workers.py

Both have the same bits, and take turns, step by step. Bytes are those that the sockets of a worker's process have sent, as
Linux counts them for each connection (TCP_INFO: what programs write, without the headers of TCP and IP), beside
those of the messages themselves, which are 48 and 4 a row. Where a machine is busy with other work, the seconds that a
process had of a core say more than those of the clock: the ratio of the slower worker's to the one worker's is given, too.
What the machine allows is measured beside it: each process takes a step with its half of the work at the same time as the other,
and neither hears of the other.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _timing import Table, arguments

import justforward as jf
from justforward.peers import Peers
from justforward.workers import Workers

# rows, tokens, rows at once, samples, populations, and what the optimizer is told
CASES: list[tuple[int, int, int, int, int, dict[str, Any]]] = [
    (8, 32, 4, 1, 1, {"estimator": "activation", "rule": "rms"}),
    (8, 32, 4, 1, 1, {}),
    (8, 32, 8, 2, 2, {}),
    (8, 128, 4, 1, 1, {"estimator": "activation", "rule": "rms"}),
    (8, 128, 4, 1, 1, {}),
    (8, 32, 1, 1, 1, {"estimator": "activation", "rule": "rms"}),
]
# Place of tcpi_bytes_sent in Linux's struct tcp_info, and behind it tcpi_bytes_retrans: what was sent again, as busy machines do.
_BYTES_SENT = 200


def sent() -> int:
    """Bytes that the TCP connections of this process have sent so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as opened:
                if opened.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile
            continue
        all_told, again = struct.unpack_from("<QQ", info, _BYTES_SENT)
        total += all_told - again
    return total


def counted(messages: list[int]) -> Callable[..., list[bytes]]:
    """`Peers.swap`, with the length of what this worker says kept."""
    swap = Peers.swap

    def counting(self: Peers, raw: bytes, *arguments: Any) -> list[bytes]:
        messages.append(len(raw))
        return swap(self, raw, *arguments)

    return counting


def make_model(layers: int) -> Any:
    """SmolLM2's layers, as many as that, with random weights and a short vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def measure(rank: int, store: str, layers: int, rounds: int, out: Any) -> None:
    """One of the two processes."""
    from step import answer_losses, make_batch

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    single = [dist.new_group([which]) for which in range(2)][rank]
    messages: list[int] = []
    Peers.swap = counted(messages)  # type: ignore[method-assign]
    model = make_model(layers)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    losses = answer_losses(model)
    found = []
    for rows, length, at_once, samples, populations, told in CASES:
        batch = make_batch(rows, length, model.config.vocab_size)
        model.load_state_dict(base)  # worker 0 has taken steps alone
        # The rates are such that no weight goes anywhere: it is time that is measured.
        kept = {"rows_at_once": at_once, "check_every": 0}
        pair = Workers(
            jf.MeZO(model, lr=1e-12, num_samples=samples, **told), populations=populations, **kept
        )
        alone = Workers(jf.MeZO(model, lr=1e-12, num_samples=samples, **told), group=single, **kept)
        # Its half of the work: half of the samples, or of the rows.
        apart, half = alone, {name: value[: rows // 2] for name, value in batch.items()}
        if populations > 1:
            optimizer = jf.MeZO(model, lr=1e-12, num_samples=samples // populations, **told)
            apart, half = Workers(optimizer, group=single, **kept), batch
        seconds: dict[str, list[float]] = {
            f"{who}{clock}": [] for who in ("one", "two", "apart") for clock in ("", ", core")
        }
        bytes_sent: list[int] = []
        payload = 0
        for turn in range(rounds + 2):
            order = ("one", "two", "apart")
            for who in order if turn % 2 else reversed(order):
                dist.barrier()
                start, core, before = time.perf_counter(), time.process_time(), sent()
                if who == "two":
                    pair.step(losses, batch)
                    payload = messages[-1] + 4  # and its length
                elif who == "apart":
                    apart.step(losses, half)
                elif rank == 0:
                    alone.step(losses, batch)
                if turn >= 2:
                    seconds[who].append(time.perf_counter() - start)
                    seconds[f"{who}, core"].append(time.process_time() - core)
                    if who == "two":
                        bytes_sent.append(sent() - before)
        found.append((seconds, sorted(bytes_sent)[len(bytes_sent) // 2], payload))
    out.send(found)
    dist.barrier()


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, rounds=12, layers=30)
    if sys.platform != "linux":
        raise SystemExit("bytes of sockets are counted as Linux does: run it there")
    table = Table(given.json)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [
            context.Process(
                target=measure,
                args=(
                    rank,
                    str(Path(folder) / "store"),
                    given.layers,
                    given.rounds,
                    pipes[rank][1],
                ),
            )
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        found = [pipe.recv() for pipe, _ in pipes]
        for process in processes:
            process.join()
    for case, (seconds, wire, payload), (others, other, _) in zip(CASES, *found, strict=True):
        rows, length, at_once, samples, populations, told = case
        kind = told.get("estimator", "weight")
        name = f"{rows} x {length}, {kind}, {at_once} at once"
        name += f", {samples} samples divided" if populations > 1 else ""
        table.ratio(f"{name}: two workers / one", seconds["one"], seconds["two"], at_least=1.9)
        longer = [max(pair) for pair in zip(seconds["apart"], others["apart"], strict=True)]
        table.ratio(f"{name}: two that do not talk / one", seconds["one"], longer)
        slower = [max(pair) for pair in zip(seconds["two, core"], others["two, core"], strict=True)]
        table.ratio(
            f"{name}: the same of the seconds on a core", seconds["one, core"], slower, at_least=1.9
        )
        mine = rows if populations > 1 else rows // 2
        limit = 64 + 4 * mine
        table.add(f"{name}: bytes of a message", payload, f"at most {limit}", payload <= limit)
        table.add(
            f"{name}: bytes sent by sockets a step",
            max(wire, other),
            f"at most {limit}",
            max(wire, other) <= limit,
        )
    table.print()


if __name__ == "__main__":
    main()
