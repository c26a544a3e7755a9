"""One contestant in a process of its own: sets up, then does as many units of work as standard input asks for.

    python benchmarks/contestant.py '{"name": "ours", "task": "train", ...}'     (benchmarks/speed.py starts it)

A line "N" on standard input asks for N units; the answer is a line of JSON with the seconds they took. "stop" is
answered with the peak memory. What contestants print goes to a log file in their scratch folder.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def give_back_memory() -> None:
    """What is free goes back to the system, or the waiting contestants would fill a small machine."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Of this process's resident set [bytes]. getrusage would count what the parent held when it started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    log = os.open(Path(asked["scratch"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)

    import torch
    from contestants import CONTESTANTS, PRESETS, SAMPLERS, Work

    module, switches, _ = CONTESTANTS[asked["name"]]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset, task = PRESETS[asked["preset"]], asked["task"]
    given = {name: asked[name] for name in ("images", "scratch", "batch_size", "steps")}
    work = Work(preset, **given, sampler=SAMPLERS.get(task, "ddim"), switches=switches, device=device)
    entry = importlib.import_module(f"contestants.{module}")

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    if task == "gflop":
        answer(gflop=entry.gflop(work))
        return
    units = getattr(entry, "sample" if task in SAMPLERS else task)(work)
    next(units)
    answer(ready=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            answer(
                peak_mib=round((torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()) / 2**20)
            )
            break
        wait()
        start = time.perf_counter()
        for _ in range(int(line)):
            next(units)
        wait()
        answer(seconds=time.perf_counter() - start)
        give_back_memory()
    answers.flush()
    os._exit(0)  # some have threads that wait for more work


if __name__ == "__main__":
    main()
