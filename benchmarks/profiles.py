"""Where a step's time goes on a device, by the named scopes of the program."""

import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence

import jax

from benchmarks import expert_step, measuring

SCOPES = ("attention", "experts", "head", "optimizer")
SCOPE = re.compile(rf"\b({'|'.join(SCOPES)})\b")
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
CONTAINERS = re.compile(r"(while|conditional|call)[.\d]*$")  # their events last as long as those inside


def profile(ready: expert_step.Ready, steps: int = 3) -> measuring.Row:
    """Milliseconds of device events per step by named scope; never an error, since a profiler may be missing."""
    try:
        with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about types of the profiler's own
            with jax.profiler.trace(home):
                for _ in range(steps):
                    ready.once()
            path = next(pathlib.Path(home).rglob("*.xplane.pb"))
            events = list(_events(jax.profiler.ProfileData.from_file(str(path))))
        return {"profile_ms": by_scope(events, ready.run.as_text(), steps), "profile_events": len(events)}
    except Exception as error:
        return {"profile_ms": {}, "profile_error": measuring.line(error)}


def _events(data: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
    """Instruction and nanoseconds of each event on a device; of the host's where the host is the device."""
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and list(plane.lines)]
    for plane in devices or planes:
        lines = list(plane.lines)
        operations = [line for line in lines if line.name == "XLA Ops"]  # other lines tell the same once more
        for line in operations or [line for line in lines if not devices or line.name.startswith("Stream")]:
            for event in line.events:
                if name := dict(event.stats).get("hlo_op") or (event.name if devices else ""):
                    yield str(name).lstrip("%").partition(" ")[0], event.duration_ns


def by_scope(events: Sequence[tuple[str, float]], text: str, steps: int) -> dict[str, float]:
    """Adds up events by the scope that the compiled program's metadata has for their instruction."""
    scopes = {name: found[1] for name, path in INSTRUCTION.findall(text) if (found := SCOPE.search(path))}
    total = dict.fromkeys((*SCOPES, "other"), 0.0)
    for name, nanoseconds in events:
        if not CONTAINERS.match(name):
            total[scopes.get(name, "other")] += nanoseconds / 1e6 / steps
    return total
