"""Runs jobs under torchrun for tests/test_ranks.py: torchrun ... ranks_worker.py JOBS.json.

A job: {"script", "flags"}, and perhaps "copy": [from, to]; "stop", "kill" or "error": [rank, step].
That rank gets a SIGTERM, a SIGKILL or a UserError when it has done that many steps. Rank 0 writes
JOBS.json.out: exit statuses and what each rank holds."""

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import ranks  # noqa: E402
import runs  # noqa: E402

held = []


def watched(save):
    """Run.due, with what the job says to happen at a step."""

    def due(run, done, steps):
        now = [ranks.rank(), done]
        for name, number in (("stop", signal.SIGTERM), ("kill", signal.SIGKILL)):
            if due.job.get(name) == now:
                os.kill(os.getpid(), number)
        if due.job.get("error") == now:
            raise common.UserError("rank 1 is unwell")
        return save(run, done, steps)

    due.job = {}
    return due


def counted(step):
    """common.optimizer_step, which notes how many numbers this rank holds at its end."""

    def optimizer_step(model, optimizer, *rest):
        norm = step(model, optimizer, *rest)
        tensors = list(common.trainable(model))
        for state in optimizer.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        held[:] = [sum(ranks.local(tensor).numel() for tensor in tensors)]
        return norm

    return optimizer_step


def main():
    path = Path(sys.argv[1])
    due = common.Run.due = watched(common.Run.due)
    common.optimizer_step = counted(common.optimizer_step)
    ranks.join()
    runs.ranks.leave = lambda: None  # one process group for all jobs
    results = []
    for job in json.loads(path.read_text()):
        if job.get("copy") and ranks.rank() == 0:
            shutil.copytree(*job["copy"])
        ranks.barrier()
        due.job, status = job, 0
        try:
            importlib.import_module(job["script"]).main(job["flags"])
        except SystemExit as stop:
            status = stop.code
            if "error" in job or "kill" in job:
                raise  # the others are not to be waited for
        results.append({"status": status, "held": ranks.gather(list(held))})
    if ranks.rank() == 0:
        Path(f"{path}.out").write_text(json.dumps(results))
    ranks.barrier()


if __name__ == "__main__":
    main()
