"""sandbox.py: what passes, and what a program can reach; on this machine's sandboxes."""

import contextlib
import functools
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sandbox
from data import UserError

CHILD = "import time; time.sleep(60)"
HOLDS_THE_PIPE = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(20)"
CLEAN = "import os; assert not {'OPENAI_API_KEY', 'SHELL'} & {*os.environ} and not os.listdir('.')"
FRAMES = """
import os, sys
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
        if isinstance(value, (bytes, str)):
            for fd in range(64):
                try: os.write(fd, value if isinstance(value, bytes) else value.encode())
                except OSError: pass
os._exit(0)
"""
FLOOD = """
import os
for fd in range(1, 64):
    try:
        while True: os.write(fd, b'x' * 65536)
    except OSError: pass
"""
PROGRAMS = [
    ("x = 1 + 1\nassert x == 2", True),
    ("assert 1 == 2", False),
    ("import sys; sys.exit(0)", False),
    ("import os; os._exit(0)", False),
    ("import atexit, os; atexit.register(os._exit, 0); raise SystemExit(0)", False),
    ("import __main__, os; os.write(__main__.report, __main__.token); os._exit(0)", False),
    (FRAMES, False),
    ("def f(:", False),
    ("x = 1\0", False),
    ("x = '\ud800'", True),
    ("while True: pass", False),
    ("x = bytearray(2 ** 34)", False),
    (CHILD, False),
    (FLOOD, False),
    ("print('noise'); import sys; sys.stderr.write('noise')", True),
    ("open('big', 'w').write('x' * 2 ** 24)", False),
    (f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {CHILD!r}])", True),
    (HOLDS_THE_PIPE, True),
    (CLEAN, True),
]
CONTAINED = [
    ("open('f', 'w').write('x' * 2 ** 20)\nassert len(open('f').read()) == 2 ** 20", True),
    ("for i in range(17): open(str(i), 'w').write('x' * 2 ** 20)", False),  # 16 MiB of disk
    ("import os; assert os.listdir(os.environ['HOME']) == [] and os.getcwd() != '/'", True),
    ("open('/etc/passwd')", False),
    ("open('/proc/self/environ')", False),
    ("import sys; open(sys.prefix + '/left', 'w')", False),
    ("open('/usr/left', 'w')", False),
    ("open('/left', 'w')", False),
    ("import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/usr', b'tmpfs', 0, None) == 0", False),
    ("import os; os.chroot('.')", False),
    ("import os; os.setuid(0); os.listdir('/root/.ssh')", False),
]


@functools.cache
def works(box):
    with contextlib.suppress(OSError, UserError):
        return sandbox.run_program("", box=box)
    return False


@pytest.fixture(params=[sandbox.by_root, sandbox.by_bubblewrap, sandbox.by_user])
def box(request):
    if not works(request.param):
        pytest.skip("does not work on this machine")
    return request.param


@pytest.mark.parametrize("program, passes", PROGRAMS)
@pytest.mark.parametrize("how", ["the machine's sandbox", "unsafe"])
def test_programs_run_in_limits(program, passes, how, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    if how != "unsafe" and not any(map(works, sandbox.BOXES)):
        pytest.skip("neither bwrap nor unshare works here")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    box = sandbox.unsafe if how == "unsafe" else None
    assert sandbox.run_program(program, seconds=2, box=box) is passes
    assert time.perf_counter() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


@pytest.mark.parametrize("program, passes", CONTAINED)
def test_programs_are_contained(program, passes, box):
    assert sandbox.run_program(program, seconds=3, box=box) is passes


def test_a_program_reaches_no_file_process_or_network(tmp_path, box):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        programs = [
            f"open({str(mine)!r})",
            f"open({str(mine)!r}, 'w')",
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
            f"import os; os.kill({os.getpid()}, 0)",
        ]
        for program in programs:
            assert not sandbox.run_program(program, box=box), program
            assert sandbox.run_program(program, box=sandbox.unsafe), program
            mine.write_text("mine")


def test_a_program_has_few_processes(box):
    if not os.geteuid() and box is not sandbox.by_root:
        pytest.skip("the kernel counts no process of the machine's root; by_root is nobody")
    program = "import os\nfor i in range({}):\n    if not os.fork():\n        while 1: pass"
    assert sandbox.run_program(program.format(20), box=box)
    assert not sandbox.run_program(program.format(70), box=box)


def running(mark):
    """Command lines of the machine's processes that hold mark."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process that has ended since
            commands.append(path.read_bytes())
    assert len(commands) > 1
    return [line for line in commands if mark.encode() in line]


@pytest.mark.parametrize("end", ["import time\ntime.sleep(0.5)", "while True: pass"])
def test_nothing_of_a_program_is_left_running(box, end):
    mark = f"{os.getpid()}{time.time_ns()}"
    program = "import os, subprocess, sys\nif not os.fork():\n    os.setsid()\n"
    program += (
        f"    if not os.fork(): subprocess.run([sys.executable, '-c', {CHILD!r}, '{mark}'])\n"
    )
    sandbox.run_program(program + end, seconds=1, box=box)
    time.sleep(0.2)
    assert not running(mark)


def test_a_program_ends_with_a_killed_command(box):
    mark = f"{os.getpid()}{time.time_ns()}"
    program = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {!r}, {!r}])"
    call = f"sandbox.run_program({program!r}.format({CHILD!r}, sys.stdin.read()), box=sandbox."
    command = [sys.executable, "-c", f"import sandbox, sys; {call}{box.__name__})"]
    root, pipe = Path(sandbox.__file__).parent, subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdin=pipe) as process:
        process.stdin.write(mark.encode())
        process.stdin.close()
        until(lambda: running(mark))
        process.kill()
    until(lambda: not running(mark))


def until(condition):
    """Wait for it, 8 s at most: less than the limit of a program."""
    for _ in range(80):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to be")


def test_without_a_sandbox_code_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "python_needs", lambda: ["/nowhere"])
    sandbox.find_box.cache_clear()
    try:
        with pytest.raises(UserError, match="neither works here.*--allow_code unsafe"):
            sandbox.run_program("")
        started = time.perf_counter()
        for box in (
            ["false"],
            ["sh", "-c", "setsid sleep 5 & sleep 0.3; exit 1"],
        ):  # the pipe stays open
            with pytest.raises(UserError, match="did not start"):
                sandbox.run_program("", box=lambda _, box=box: box)
        assert time.perf_counter() - started < 4
    finally:
        sandbox.find_box.cache_clear()
