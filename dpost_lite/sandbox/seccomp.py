"""The system calls that code in a sandbox may make: what Python needs to compute, import and print, and no others.

The list lets code reach nobody but itself: it starts no process or program, sends no signal, opens no socket, and
changes no other process, of which some calls (prlimit, setpriority) need only the same user.
"""

import errno
import struct

Filter = list[tuple[int, int, int, int]]  # instructions of a BPF program: code, jump if true, jump if false, constant

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # by platform.machine(): the kernel's AUDIT_ARCH_*
ALLOWED = {  # name: numbers on x86_64 and aarch64, None where there is no such call
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "close": (3, 57), "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "lseek": (8, 62), "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None), "fstat": (5, 80),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "getdents64": (217, 61), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getrusage": (98, 165),
    "getrlimit": (97, 163), "uname": (63, 160), "sysinfo": (99, 179), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168), "getrandom": (318, 278), "futex": (202, 98),
    "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96), "arch_prctl": (158, None),
    "sigaltstack": (131, 132), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigtimedwait": (128, 137), "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133), "pause": (34, None),
    "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "umask": (95, 166),
}  # fmt: skip
CLONE, CLONE3, PRLIMIT, FCNTL, IOCTL = (56, 220), (435, 435), (302, 261), (72, 25), (16, 29)

CLONE_THREAD = 0x10000
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # not F_SETOWN and F_SETSIG, which make the kernel send a signal to a process
IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # those of Python's own file objects

LOAD, EQUALS, HAS_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
KILL, FAIL, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
NUMBER_AT, MACHINE_AT, ARGUMENTS_AT = 0, 4, 16  # offsets in struct seccomp_data; both machines are little-endian


def allow_list(machine: str) -> bytes:
    """Return the program for the seccomp filter of `machine`, a key of MACHINES.

    Other calls fail with EPERM; clone3 with ENOSYS, so that threads are started with clone, whose flags a filter sees.
    """
    column = list(MACHINES).index(machine)
    refused = FAIL | errno.EPERM
    program: Filter = [(LOAD, 0, 0, MACHINE_AT), (EQUALS, 1, 0, MACHINES[machine]), (RETURN, 0, 0, KILL)]
    program.append((LOAD, 0, 0, NUMBER_AT))
    program += _only_if(CLONE[column], 0, [(HAS_BIT, 0, 1, CLONE_THREAD)], refused)
    program += _only_if(PRLIMIT[column], 0, [(EQUALS, 0, 1, 0)], refused)
    program += _one_of(FCNTL[column], 1, FCNTL_COMMANDS, refused)
    program += _one_of(IOCTL[column], 1, IOCTL_COMMANDS, refused)
    program += [(EQUALS, 0, 1, CLONE3[column]), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += [(EQUALS, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    program.append((RETURN, 0, 0, refused))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _only_if(number: int, argument: int, test: Filter, refused: int) -> Filter:
    """Allow call `number` if `test` of the lower half of its argument, counted from 0, goes on to what follows it."""
    body: Filter = [(LOAD, 0, 0, ARGUMENTS_AT + 8 * argument), *test, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, refused)]
    return [(EQUALS, 0, len(body), number), *body]


def _one_of(number: int, argument: int, values: tuple[int, ...], refused: int) -> Filter:
    last = len(values) - 1
    tests: Filter = [(EQUALS, last - at, 0 if at < last else 1, value) for at, value in enumerate(values)]
    return _only_if(number, argument, tests, refused)
