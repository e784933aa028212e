"""Identity of a lease's owner: a process on a machine, distinct from later processes with the same id."""

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

_SIZE = 1024  # size of a lease in bytes, constant since it is overwritten in place


@dataclasses.dataclass(frozen=True)
class Owner:
    """The owner of a lease.

    Attributes:
      token: unique for each lease ever taken.
      machine: kernel boot id and process namespace in which `pid` and `began` (clock ticks) identify a process; "" if
        unknown.
      job, start: job id of the scheduler and its restart count; "" outside a job.
      since: local time of the owner, for people to read.
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
        """The current process, with a new token."""
        pid, environment = os.getpid(), os.environ
        job = environment.get("SLURM_JOB_ID", "")
        start = environment.get("SLURM_RESTART_COUNT", "0") if job else ""
        command = shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return cls(
            uuid.uuid4().hex,
            socket.gethostname(),
            pid,
            this_machine(),
            process_began(pid) or 0,
            job,
            start,
            command,
            now,
        )

    @classmethod
    def parse(cls, content: bytes) -> "Owner":
        """The owner named in a lease; an unknown owner if the content is truncated or foreign."""
        unknown = cls("unreadable-" + hashlib.sha256(content).hexdigest()[:16])
        try:
            values = json.loads(content)["owner"]
            types = {field.name: field.type for field in dataclasses.fields(cls)}
            fits = values.keys() == types.keys() and all(type(values[name]) is kind for name, kind in types.items())
            return cls(**values) if fits and re.fullmatch("[0-9a-f]{32}", values["token"]) else unknown
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return unknown

    def content(self, renewals: int) -> bytes:
        """Content of the lease, always `_SIZE` bytes."""
        text = json.dumps({"renewals": renewals, "owner": dataclasses.asdict(self)})
        if len(text) >= _SIZE:
            return dataclasses.replace(self, command="another job", host=self.host[:60]).content(renewals)
        return text.encode("ascii").ljust(_SIZE - 1) + b"\n"

    def precedes(self, other: "Owner") -> bool:
        """Whether `other` is the same job after a restart by the scheduler."""
        return self.job != "" and self.job == other.job and self.start != other.start

    def __str__(self) -> str:
        where = f"process {self.pid} on {printable(self.host)}" if self.pid else printable(self.host)
        return f"{where}, {printable(self.command)}" + (f", since {printable(self.since)}" if self.since else "")


def this_machine() -> str:
    """Identifier of the kernel boot and process namespace; "" if the system does not provide it."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_began(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if it is gone or a zombie."""
    try:
        fields = (
            pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        )
        return None if fields[0] in "ZXx" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
