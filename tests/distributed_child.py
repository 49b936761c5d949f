"""One of several processes that compute together, in the manner of an entry point.

python -m tests.distributed_child SCENARIO COORDINATOR COUNT INDEX [ARGUMENT]
"""

import ctypes
import json
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from flexjax import distributed, errors

ALWAYS = 120  # seconds, after which a scenario that is to be interrupted gives up


def say(**facts):
    """One line for the test that started this process."""
    os.write(1, f"{json.dumps(facts)}\n".encode())


def summing():
    """A compiled step over all devices of all processes, its first argument, and its result so far."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shares = jax.make_array_from_callback((jax.device_count(),), sharding, lambda at: np.arange(8, dtype=np.float32)[at])
    return jax.jit(lambda values, total: total + jnp.sum(values)), shares, jnp.zeros(())


def talk(argument):
    """Everything that works, in one go: exchange, barriers, a sum over all devices, a stop that one process is asked for."""
    distributed.agree(distributed.versions())
    for turn in range(3):
        values = distributed.exchange("turn / 1", {"turn": turn, "from": distributed.index()})
        assert values == [{"turn": turn, "from": number} for number in range(distributed.count())], values
        distributed.barrier("turn")
    step, shares, total = summing()
    say(event="sum", value=float(step(shares, total)), main=distributed.is_main(), index=distributed.index())
    wanted = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: wanted.append(True))
    for boundary in range(1, 100_000):
        before, total = total, step(shares, total)
        before.block_until_ready()  # as the training loop: at most two steps are under way
        if boundary % (2 + distributed.index()) == 0:  # nobody is at the same step at the same time
            time.sleep(0.005)
        if boundary == 10:
            say(event="running")
        began = time.perf_counter()
        stop = distributed.stop_requested(bool(wanted))
        if stop:
            break
        if boundary == 20:
            say(event="cost", seconds=time.perf_counter() - began)
    say(event="stopped", step=boundary, total=float(total))
    raise errors.Preempted(f"asked to stop, saved step {boundary}")


def facts(argument):
    """The processes have different configs."""
    distributed.agree({"config": argument, "same": "here"})


def collectives(argument):
    """Steps without end."""
    step, shares, total = summing()
    with distributed.lost_peers_are_preemption():
        for number in range(100_000):
            total = step(shares, total)
            total.block_until_ready()
            if number == 10:
                say(event="running")
            time.sleep(0.01)


def barrier_of(argument):
    """Process ARGUMENT waits for the others, which do not come."""
    distributed.barrier("begin")
    say(event="running")
    if distributed.index() == int(argument):
        distributed.barrier("never")
    time.sleep(ALWAYS)


def python_of(argument):
    """Everybody is busy with something of their own."""
    distributed.barrier("begin")
    say(event="running")
    time.sleep(ALWAYS)


def end_of(argument):
    """Process ARGUMENT goes on when the others have finished."""
    distributed.barrier("begin")
    say(event="running")
    if distributed.index() == int(argument):
        time.sleep(ALWAYS)


def thread_locked(argument):
    """Process 1 holds Python's lock in a long call; that is no death."""
    distributed.barrier("begin")
    say(event="running")
    if distributed.index() == 1:
        ctypes.PyDLL(None).sleep(int(argument))
    distributed.barrier("end")


def error(argument):
    """Process ARGUMENT has an error of its own while the others are in a collective."""
    step, shares, total = summing()
    total = step(shares, total)
    say(event="running")
    if distributed.index() == int(argument):
        raise errors.DataError("corpus.jsonl:3 is not valid JSON; mend it")
    with distributed.lost_peers_are_preemption():
        total = step(shares, total)
        total.block_until_ready()


def bug(argument):
    """Everybody meets the same error of ours."""
    raise ZeroDivisionError("a bug")


def abort(argument):
    """Process 1 aborts by an error of its own C++ code."""
    distributed.barrier("begin")
    say(event="running")
    if distributed.index() == 1:
        os.abort()
    time.sleep(ALWAYS)


def late(argument):
    """Process ARGUMENT has more to do than the others."""
    step, shares, total = summing()
    step(shares, total).block_until_ready()
    if distributed.index() == int(argument):
        time.sleep(3)


def broken(argument):
    """An error of the connection, with nobody gone."""
    distributed.barrier("begin")
    with distributed.lost_peers_are_preemption():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Timed out")


def missing(argument):
    """Process 1 does not come to a barrier."""
    distributed.exchange("nobody", 1)
    if distributed.index() == 0:
        distributed.barrier("only one", timeout=0.5)


def main(scenario, coordinator, count, index, argument=""):
    code = 0

    def stop(*_):
        raise errors.Preempted("asked to stop")

    signal.signal(signal.SIGTERM, stop)
    try:
        distributed.start(coordinator, int(count), int(index), timeout=20)
        say(event="started")
        globals()[scenario](argument)
        distributed.finish()
    except errors.FlexjaxError as reason:
        code = reason.exit_code
        print(f"{'stopped' if code == 75 else 'error'}: {reason}", file=sys.stderr)
    except BaseException:
        distributed.finish(1)
        raise
    distributed.finish(code)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
