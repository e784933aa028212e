"""Who holds a lease: a process on some machine, told apart from all others, also from one with the same process id."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import socket
import sys
import time
import uuid

from pera_jax.common.text import printable

_SIZE = 1024  # bytes of a lease, always: it is written over in place


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    Attributes:
      token: another one for each lease that was ever taken.
      machine: the boot of a kernel and the process namespace in which `pid` and `began` (clock ticks) mean a process; ""
        where that is not known.
      job, start: the scheduler's number of the job and how often it was started again; "" outside of one.
      since: the owner's time of day, for people to read.
    """

    token: str
    host: str = "an unknown host"
    pid: int = 0
    machine: str = ""
    began: int = 0
    job: str = ""
    start: str = ""
    command: str = "another job"
    since: str = ""

    @classmethod
    def this_process(cls) -> "Owner":
        """The running process, with a new token."""
        pid, environment = os.getpid(), os.environ
        job = environment.get("SLURM_JOB_ID", "")
        start = environment.get("SLURM_RESTART_COUNT", "0") if job else ""
        command = shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, this_machine(), process_began(pid) or 0, job, start, command, now)

    @classmethod
    def parse(cls, content: bytes) -> "Owner":
        """The owner that a lease names; one of whom nothing is known where it is cut or foreign."""
        unknown = cls("unreadable-" + hashlib.sha256(content).hexdigest()[:16])
        try:
            values = json.loads(content)["owner"]
            types = {field.name: field.type for field in dataclasses.fields(cls)}
            fits = values.keys() == types.keys() and all(type(values[name]) is kind for name, kind in types.items())
            return cls(**values) if fits and re.fullmatch("[0-9a-f]{32}", values["token"]) else unknown
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return unknown

    def content(self, renewals: int) -> bytes:
        """The bytes of the lease, always as many."""
        text = json.dumps({"renewals": renewals, "owner": dataclasses.asdict(self)})
        if len(text) >= _SIZE:
            return dataclasses.replace(self, command="another job", host=self.host[:60]).content(renewals)
        return text.encode("ascii").ljust(_SIZE - 1) + b"\n"

    def precedes(self, other: "Owner") -> bool:
        """Whether `other` is the same job, which the scheduler has started again."""
        return self.job != "" and self.job == other.job and self.start != other.start

    def __str__(self) -> str:
        where = f"process {self.pid} on {printable(self.host)}" if self.pid else printable(self.host)
        return f"{where}, {printable(self.command)}" + (f", since {printable(self.since)}" if self.since else "")


def this_machine() -> str:
    """Where process ids mean the same processes; "" where the system does not tell."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_began(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None where it is gone or only its parent has not noticed."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        return None if fields[0] in "ZXx" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
