"""Programs that a model wrote, run where they can do no harm: humaneval and mbpp of eval.py.

What is contained: no network, no file but the system's and Python's own (read-only) and an empty
folder, no process outside, no right of root; time, memory, disk, processes and output are bounded.
What is not: a program shares its interpreter with its test. One written against this file can dig
its token out of the interpreter's memory, as it can put any object into its test's hands: it then
passes that test, and no more. The kernel is the wall: for its holes, use a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

from data import UserError

CODE_SECONDS, CODE_BYTES = 10, 4 * 2**30  # limits of one generated program: time, memory
CODE_PROCESSES, CODE_DISK = 64, 16 * 2**20  # at once; bytes of its folder, all that it can write
LIMITED = """
import os, resource, sys
os.write(1, b"+")
os.chdir(os.environ["HOME"])
seconds, size = map(int, sys.argv[1:])
for name, most in ("CPU", seconds), ("AS", size), ("FSIZE", 2 ** 20), ("CORE", 0):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
def run(source):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    return b""
# the token gets no name: it stands in no module and in no variable of a frame
os.write(os.dup(1), os.read(0, 32) + run(sys.stdin.buffer.read()))
"""
# Arguments: folder, what Python needs, --, command. The new root lies over the folder. This shell
# stays outside of it as process 1: when it ends, or what started it, the kernel ends all others.
NEW_ROOT = """
set -e
umask 022
root=$1; shift
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --rbind "$1" "$root$1"
    mount -o remount,bind,ro,nosuid,nodev "$root$1"
    shift
done
shift
mkdir -p "$root/dev" "$root/etc" "$root$root"
for file in /dev/null /dev/urandom /etc/ld.so.cache; do
    [ -e "$file" ] || continue
    : > "$root$file"
    mount --bind "$file" "$root$file"
done
mount -t tmpfs -o size=SIZE,mode=777,nosuid,nodev tmpfs "$root$root"
mount -o remount,bind,ro,nosuid,nodev "$root"
chroot "$root" "$@" || exit 1
""".replace("SIZE", str(CODE_DISK))
APART = ["--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts"]


def python_needs() -> list[str]:
    """The folders without which this Python does not start."""
    system = [path for path in ("/usr", "/lib", "/lib64", "/bin") if os.path.isdir(path)]
    own = sorted({sys.prefix, sys.base_prefix})
    return system + [path for path in own if not f"{path}/".startswith("/usr/")]


def by_namespaces(folder: str, first: list[str], last: list[str]) -> list[str]:
    """util-linux's tools around a command; first: more of unshare, last: more of setpriv."""
    apart = [flag.replace("unshare-", "") for flag in [*APART, "--unshare-mount"]]
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *first, *apart, "--fork"]
    command += ["--kill-child", "sh", "-c", NEW_ROOT, "sh", folder, *python_needs(), "--"]
    command += ["setpriv", *last, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    return [*command, "prlimit", f"--nproc={CODE_PROCESSES}"]


def by_root(folder: str) -> list[str]:
    """Where root may make namespaces: the program is nobody, not root."""
    return by_namespaces(folder, [], ["--reuid=65534", "--regid=65534", "--clear-groups"])


def by_bubblewrap(folder: str) -> list[str]:
    command = ["bwrap", *APART, "--cap-drop", "ALL", "--new-session", "--die-with-parent"]
    for path in python_needs():
        command += ["--ro-bind", path, path]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", path, path]
    command += ["--size", str(CODE_DISK), "--tmpfs", folder, "--remount-ro", "/"]
    return [*command, "prlimit", f"--nproc={CODE_PROCESSES}"]


def by_user(folder: str) -> list[str]:
    return by_namespaces(folder, ["--user", "--map-root-user"], [])


def unsafe(folder: str) -> list[str]:
    """--allow_code unsafe: limits on time, memory and file size, but no sandbox."""
    return []


BOXES = (by_root, by_bubblewrap, by_user)


@functools.cache
def find_box() -> Callable:
    """The first sandbox that works on this machine: function(folder) -> what stands before a
    command. Raises UserError."""
    for box in BOXES:
        with contextlib.suppress(OSError, UserError):
            if run_program("", box=box):
                return box
    needs = "needs bubblewrap (bwrap) or user namespaces (unshare), and neither works here"
    raise UserError(f"--allow_code: {needs}; in a container of its own: --allow_code unsafe")


def run_program(
    source: str, seconds: int = CODE_SECONDS, memory: int = CODE_BYTES, box: Callable | None = None
) -> bool:
    """Run generated Python in a box (None: find_box()'s), in an empty folder and environment. True
    only if it ran to its end (an early exit(0) does not pass): then it has sent a token, which this
    process, out of its reach, compares. seconds of processor time, and a second more by the clock;
    memory: bytes of each of its processes. Raises UserError where the box does not start."""
    token = os.urandom(16).hex().encode()
    reader, writer = os.pipe()  # read once, at the end: a flood fills the pipe and then waits
    os.set_blocking(reader, False)
    with tempfile.TemporaryDirectory() as folder, open(reader, "rb", 0) as report:
        own = {"cwd": folder, "env": {"HOME": folder, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}}
        streams = {"stdin": subprocess.PIPE, "stdout": writer, "stderr": subprocess.DEVNULL}
        try:
            command = [*(box or find_box())(folder), sys.executable, "-I", "-c", LIMITED]
            command += [str(seconds), str(memory)]
            process = subprocess.Popen(command, start_new_session=True, **own, **streams)
        finally:
            os.close(writer)
        try:
            process.communicate(token + source.encode("utf-8", "replace"), timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = report.read(64)
    if not said:
        raise UserError("--allow_code: a program's sandbox did not start; is the machine full?")
    return process.returncode == 0 and said == b"+" + token


# ---- For lm-eval ---------------------------------------------------------------------------------
def pass_at_k(total: int, correct: int, k: int) -> float:
    """HumanEval's unbiased pass@k of `total` samples: 1 - C(total - correct, k) / C(total, k)."""
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


class CodeEval:
    """In place of the hub's code_eval, which lm-eval's code tasks load: the same by run_program."""

    box = None  # as run_program has it; the class's, since lm-eval keeps the first object it loads

    def compute(self, references: list[str], predictions: list[list[str]], k=(1,), **_) -> tuple:
        passed = []
        for test, candidates in zip(references, predictions):
            programs = [f"{candidate}\n{test}" for candidate in candidates]
            passed.append([run_program(program, box=CodeEval.box) for program in programs])
        values = {}
        for n in (n for n in k if n <= min(map(len, passed))):
            rates = [pass_at_k(len(row), sum(row), n) for row in passed]
            values[f"pass@{n}"] = sum(rates) / len(rates)
        return values, passed


def load_metric(path: str, *args, **kwargs) -> object:
    """evaluate.load, but code_eval is CodeEval."""
    from evaluate.loading import load

    return CodeEval() if path == "code_eval" else load(path, *args, **kwargs)
