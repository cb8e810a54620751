#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tests of cstor.py, in the order of its sections; unittest alone, Python 3.9 and later.

    python3 test_cstor.py [NAME ...]          run all tests, or those whose names contain NAME
    python3 test_cstor.py --make-store DIR    make a sample store, with neither root nor podman
    python3 test_cstor.py --bench [DIR] [--row TEXT] [--json]
                                              measure against the peers (root and podman needed)
    python3 test_cstor.py --build-peer        build a server of composefs, with cargo

Tests that need podman, root or another part that is missing are skipped with the reason; with
CSTOR_TEST_REQUIRE=all a skip is a failure, but for ALLOWED_SKIPS.  CSTOR_TEST_STORES names a
directory of real stores, NAME.tar.xz each with NAME/st and NAME/run.  CSTOR_TEST_FULL=1 makes real
images of 50,000 files where a fifth would do.
"""

from __future__ import annotations

import argparse
import ast
import base64
import bz2
import contextlib
import datetime
import errno
import fcntl
import filecmp
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import os
import pwd
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import unittest
import warnings
import weakref
import zipfile
import zlib
from typing import (Any, Callable, ContextManager, Iterable, Iterator, Mapping, NamedTuple,
                    Sequence, TypeVar)
from unittest import mock

T = TypeVar("T")
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import cstor  # noqa: E402

SCRIPT = HERE + "/cstor.py"
# The command as it is installed: a child that compiles the script takes 0.1 s more each time.
LAUNCH = f"import sys; sys.path.insert(0, {HERE!r}); import cstor; sys.exit(cstor.main())"
COMMAND = sys.executable, "-c", LAUNCH
UMASK = 0o22
os.umask(UMASK)  # whatever is that of who runs them
FULL = bool(os.environ.get("CSTOR_TEST_FULL"))  # real trees of 50,000 files
IDLE = {"PATH": os.environ.get("PATH", ""), "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}


# ================================================================================================
# Tools
# ================================================================================================

def default_signals() -> None:
    """Handle signals as a new interpreter does, whatever nohup ignores."""
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


default_signals()

# Tests that may be skipped though CSTOR_TEST_REQUIRE=all, and why.
ALLOWED_SKIPS = {
    "test_every_layer_from_composefs": "it takes cargo, and crates.io until it was built once"}


def need(condition: object, reason: str, test: str = "") -> None:
    """Skip the test with ``reason`` unless ``condition``; fail where nothing may be skipped.

    ``test`` is the name of one that is on the list of those that may.
    """
    if not condition:
        if os.environ.get("CSTOR_TEST_REQUIRE") == "all" and test not in ALLOWED_SKIPS:
            raise AssertionError(f"nothing may be skipped here: {reason}")
        raise unittest.SkipTest(reason)


def need_proc() -> None:
    """Skip without /proc."""
    need(os.path.exists("/proc/self/fd"), "/proc is not mounted")


def need_mounts() -> None:
    """Skip where no mount can be made that only a command sees, as in a chroot or container."""
    need(os.geteuid() == 0, "only root can mount")
    need_tools("unshare", "mount")
    need_proc()
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/proc"],
                          stderr=subprocess.PIPE, check=False)
    need(not done.returncode, f"no mounts of our own: {done.stderr.decode().strip()}")


def open_terminal() -> tuple[int, int]:
    """Return both ends of a new terminal; skip where there is none."""
    try:
        import pty

        return pty.openpty()
    except (ImportError, OSError) as error:
        need(False, f"no terminals here: {error}")
        raise


def without_owners(said: str) -> str:
    """Return what a command said, without what only an ordinary user is told."""
    return said if os.geteuid() == 0 else re.sub(
        r"cstor: warning: \d+ files? (is|are) owned by you: owners could not be set\n", "", said)


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something is so, or the time is over."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def copy_script(path: str) -> None:
    """Copy cstor.py to where other users read it, too, whatever the mode of the checkout."""
    shutil.copyfile(SCRIPT, path)
    os.chmod(path, 0o755)


def sample(items: Iterable[T]) -> list[T]:
    """Return all items in the run of full size, else the quarter that falls to this Python."""
    return list(items) if FULL else list(items)[sys.version_info[1] % 4::4]


def need_tools(*tools: str) -> None:
    """Skip unless all ``tools`` are on the PATH."""
    for tool in tools:
        need(shutil.which(tool), f"{tool} is not installed")


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def put(path: str | bytes, data: bytes | str = b"") -> None:
    """Write a file anew."""
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def overwrite(path: str, data: bytes) -> None:
    """Write over the begin of a file."""
    with open(path, "r+b") as file:
        file.write(data)


def read_bytes(path: str | bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def read_json(path: str) -> Any:
    return json.loads(read_bytes(path))


def remove(path: str) -> None:
    """Remove what is there; shutil.rmtree would recurse, and does not enter what is closed."""
    subprocess.run(["rm", "-rf", path], check=True)


def snapshot(root: str) -> dict[bytes, tuple[int, ...]]:
    """Return what must not change by reading: all of lstat but the atime, for each path."""
    found: dict[bytes, tuple[int, ...]] = {}
    for directory, dirs, files in os.walk(os.fsencode(root)):
        for name in [b".", *dirs, *files]:
            path = os.path.join(directory, name)
            s = os.lstat(path)
            found[path] = (s.st_mode, s.st_ino, s.st_nlink, s.st_uid, s.st_gid, s.st_size,
                           s.st_mtime_ns, s.st_ctime_ns)
    return found


def open_fds() -> dict[str, str]:
    """Return this process's descriptors and what they are open on."""
    found = {}
    if not os.path.exists("/proc/self/fd"):
        for number in range(min(os.sysconf("SC_OPEN_MAX"), 1 << 12)):
            with contextlib.suppress(OSError):
                status = os.fstat(number)
                found[str(number)] = f"{status.st_dev}:{status.st_ino}"
        return found
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return {fd: target for fd, target in found.items() if not target.startswith("/proc/")}


def peak_memory(*args: str) -> int:
    """Run the command line in a process of its own; return its peak resident memory in KiB.

    getrusage(2) would count what this process had when it forked.
    """
    need_proc()
    code = (f"import sys; sys.path.insert(0, {HERE!r}); import cstor; "
            f"status = cstor.main({args!r}); "
            "print(open('/proc/self/status').read(), file=sys.stderr); sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, check=True)
    return int(next(line.split()[1] for line in done.stderr.decode().splitlines()
                    if line.startswith("VmHWM:")))


def slow_crc64(data: bytes) -> int:
    """CRC-64/ISO bit by bit, from its definition."""
    crc = 0xFFFFFFFFFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xD800000000000000 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFFFFFFFFFF


def make_tar(*entries: tuple[str, bytes | str | None], **fields: Any) -> bytes:
    """Return a tar: (name, bytes) is a file, (name, None) a directory, (name, str) a link to it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT,
                      errors="surrogateescape") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.mtime = 1700000000
            info.mode = 0o644
            for key, value in fields.items():
                setattr(info, key, value)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type = tarfile.DIRTYPE if content is None else tarfile.SYMTYPE
                info.mode = 0o755
                info.linkname = content or ""
                tar.addfile(info)
    return out.getvalue()


def segment(data: bytes) -> dict[str, Any]:
    """Return tar-split's object for bytes that are no file's content."""
    return {"type": 2, "payload": base64.b64encode(data).decode()}


def content_row(name: bytes, data: bytes) -> dict[str, Any]:
    """Return tar-split's object for a file's content."""
    row: dict[str, Any] = {"type": 1}
    try:
        row["name"] = name.decode()
    except UnicodeDecodeError:
        row["name_raw"] = base64.b64encode(name).decode()
    if not data:
        return {**row, "payload": None}
    crc = cstor.crc64(data).to_bytes(8, "big")
    return {**row, "size": len(data), "payload": base64.b64encode(crc).decode()}


def split_tar(tar: bytes) -> list[dict[str, Any]]:
    """Return the tar-split objects of a tar that tarfile reads, as tar-split writes them."""
    rows, at = [], 0
    opened: ContextManager[Iterable[tarfile.TarInfo]] = tarfile.open(
        fileobj=io.BytesIO(tar), errors="surrogateescape", ignore_zeros=False) \
        if tar else contextlib.nullcontext(())
    with opened as members:
        for info in members:
            rows.append(segment(tar[at:info.offset_data]))
            name = info.name.rstrip("/").encode("utf-8", "surrogateescape")  # 3.9 keeps some "/"
            at = info.offset_data + (info.size if info.isreg() else 0)
            rows.append(content_row(name + b"/" * info.isdir(), tar[info.offset_data:at]))
    rows.append(segment(tar[at:]))
    return [{**row, "position": number} if number else row for number, row in enumerate(rows)]


def go_json(entry: Mapping[str, Any]) -> str:
    """Spell a JSON object as Go does."""
    text = json.dumps(entry, separators=(",", ":"), ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text + "\n"


BLOCK = 512
END = bytes(2 * BLOCK)
FIELDS = (("name", 100), ("mode", 8), ("uid", 8), ("gid", 8), ("size", 12), ("mtime", 12),
          ("chksum", 8), ("typeflag", 1), ("linkname", 100), ("magic", 8), ("uname", 32),
          ("gname", 32), ("major", 8), ("minor", 8), ("prefix", 155))


def entry(name: bytes, data: bytes = b"", typeflag: bytes = b"0", *, size: int | bytes = -1,
          padding: bytes = b"\0", signed: bool = False, **fields: bytes) -> bytes:
    """Return one tar member; ``size`` is the header's, raw when bytes, if not that of ``data``.

    ``fields`` holds other raw header fields; ``signed`` sums the header as Sun's old tar did.
    """
    number = len(data) if size == -1 else size
    mode = b"0000755" if typeflag == b"5" or name.endswith(b"/") else b"0000644"
    values = {"name": name, "mode": mode, "uid": b"0000000", "gid": b"0000000",
              "size": number if isinstance(number, bytes) else b"%011o" % number,
              "mtime": b"14000000000",
              "chksum": b" " * 8, "typeflag": typeflag, "magic": b"ustar\x0000", **fields}
    block = bytearray(b"".join(values.get(key, b"").ljust(width, b"\0")
                               for key, width in FIELDS).ljust(BLOCK, b"\0"))
    total = sum(block) - 256 * signed * sum(byte > 127 for byte in block)
    block[148:156] = b"%06o\0 " % (total & 0o777777)
    return bytes(block) + data + padding * (-len(data) % BLOCK)


def directory(name: bytes, **fields: Any) -> bytes:
    return entry(name + b"/", typeflag=b"5", **fields)


def symlink(name: bytes, target: bytes, **fields: Any) -> bytes:
    return entry(name, typeflag=b"2", linkname=target, **fields)


def hardlink(name: bytes, target: bytes, **fields: Any) -> bytes:
    return entry(name, typeflag=b"1", linkname=target, **fields)


def device(name: bytes, kind: bytes, major: int, minor: int, **fields: Any) -> bytes:
    return entry(name, typeflag=kind, major=b"%07o" % major, minor=b"%07o" % minor, **fields)


def pax(records: dict[bytes, bytes], typeflag: bytes = b"x", name: bytes = b"PaxHeaders/x"
        ) -> bytes:
    """Return an extended header."""
    data = b""
    for key, value in records.items():
        body = len(key) + len(value) + 3
        length = body + len(str(body + len(str(body))))
        data += b"%d %s=%s\n" % (length, key, value)
    return entry(name, data, typeflag)


def base256(value: int, width: int) -> bytes:
    """Return a header number in GNU's binary form."""
    return (value + (1 << 8 * width if value < 0 else 1 << 8 * width - 1)).to_bytes(width, "big")


def content_of(storage: cstor.Storage, name: str = "") -> str:
    """Return the place of a file of the layer 000..., as TreeTest.opened() makes it."""
    return os.path.join(storage.graphroot, "overlay", "0" * 64, "diff", name)


KINDS = "layers", "images", "containers"


class StoreBuilder:
    """Makes a synthetic store below ``root``, without root and without podman.

    ``driver`` is overlay or vfs.  layer(), image() and container() return IDs; save() writes the
    records, which stand in ``layers``, ``images`` and ``containers`` until then, to be changed at
    will.
    """

    def __init__(self, root: str, driver: str = "overlay") -> None:
        self.root, self.driver = root, driver
        self.layers: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.containers: list[dict[str, Any]] = []
        self.tars: dict[str, bytes] = {}
        for kind in KINDS:
            os.makedirs(self.path(f"{driver}-{kind}"), exist_ok=True)
            self.write(f"{driver}-{kind}/{kind}.lock", os.urandom(64))
        os.makedirs(self.path("vfs/dir" if driver == "vfs" else "overlay/l"), exist_ok=True)

    def path(self, *names: str) -> str:
        return os.path.join(self.root, *names)

    def write(self, name: str, data: bytes | str) -> str:
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        put(path, data.encode() if isinstance(data, str) else data)
        return path

    def layer(self, tar: bytes | None, parent: str = "", **record: Any) -> str:
        """Add a layer; a ``tar`` of None makes a writable layer without tar-split."""
        digest = sha256(tar) if tar is not None else ""
        layer_id = str(record.pop("id", "")) or hashlib.sha256(
            f"{parent}+{digest or os.urandom(8).hex()}".encode()).hexdigest()
        self.make_home(layer_id, parent)
        entry: dict[str, Any] = {"id": layer_id, "created": "2026-01-02T03:04:05.678901234Z"}
        if parent:
            entry["parent"] = parent
        if tar is not None:
            self.unpack(tar, self.files(layer_id))
            self.tar_split(layer_id, tar)
            entry.update({"diff-digest": digest, "diff-size": len(tar)} if tar else
                         {"diff-digest": digest})
            self.tars[layer_id] = tar
        self.layers.append({**entry, **record})
        return layer_id

    def make_home(self, layer_id: str, parent: str) -> None:
        """Make the place of a layer's files: of vfs a copy of all that its parent has."""
        if self.driver == "vfs":
            if parent:
                subprocess.run(["cp", "-a", self.files(parent), self.files(layer_id)], check=True)
            os.makedirs(self.files(layer_id), exist_ok=True)
            return
        link = base64.b32encode(hashlib.sha256(layer_id.encode()).digest())[:26].decode()
        os.makedirs(self.files(layer_id))
        self.write(f"overlay/{layer_id}/link", link)
        os.symlink(f"../{layer_id}/diff", self.path("overlay/l", link))
        if parent:
            below = self.read(f"overlay/{parent}/link")
            lower = [f"l/{below}", self.read(f"overlay/{parent}/lower")]
            self.write(f"overlay/{layer_id}/lower", ":".join(filter(None, lower)))

    def files(self, layer_id: str) -> str:
        """Return the directory of a layer's files."""
        return self.path(*(("vfs/dir", layer_id) if self.driver == "vfs" else
                           ("overlay", layer_id, "diff")))

    def read(self, name: str) -> str:
        try:
            with open(self.path(name), encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def tar_split(self, layer_id: str, tar: bytes) -> None:
        self.rows(layer_id, split_tar(tar))

    def rows(self, layer_id: str, rows: Iterable[Mapping[str, Any]]) -> str:
        """Write the tar-split data of a layer."""
        text = "".join(map(go_json, rows))
        return self.write(f"{self.driver}-layers/{layer_id}.tar-split.gz",
                          gzip.compress(text.encode(), 1, mtime=0))

    def unpack(self, tar: bytes, directory: str) -> None:
        """Put the files where containers/storage puts them; special files are left out."""
        if not tar:
            return
        with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as members:
            for info in members:
                path = os.path.join(directory, os.path.normpath("/" + info.name).lstrip("/"))
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if self.driver == "vfs":
                    self.clear(path, info.isdir())
                if info.isdir():
                    os.makedirs(path, exist_ok=True)
                elif info.issym():
                    os.symlink(info.linkname, path)
                elif info.islnk():
                    os.link(os.path.join(directory, os.path.normpath(
                        "/" + info.linkname).lstrip("/")), path, follow_symlinks=False)
                elif info.isreg() and not os.path.basename(path).startswith(".wh."):
                    with open(path, "wb") as file:
                        content = members.extractfile(info)
                        assert content
                        shutil.copyfileobj(content, file)

    @staticmethod
    def clear(path: str, keep: bool) -> None:
        """Remove what lies at a path from a copy of the parent's files, or what a whiteout names.

        ``keep`` says whether a directory may stay.  Opaque markers must come first.
        """
        folder, base = os.path.split(path)
        if base == ".wh..wh..opq":
            shutil.rmtree(folder)
            os.mkdir(folder)
        else:
            path = os.path.join(folder, base[4 * base.startswith(".wh."):])
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path) if not keep else None
            elif os.path.lexists(path):
                os.unlink(path)

    def image(self, layer: str, *names: str, history: Sequence[dict[str, Any]] = (),
              **record: Any) -> str:
        """Add an image with an OCI manifest and configuration."""
        chain: list[str] = []
        by_id = {entry["id"]: entry for entry in self.layers}
        at = layer
        while at:
            chain.insert(0, by_id[at]["diff-digest"])
            at = by_id[at].get("parent", "")
        config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {
            "type": "layers", "diff_ids": chain}, "history": list(history) or [
                {"created": "2026-01-02T03:04:05Z", "created_by": f"step {i}"}
                for i in range(len(chain))], "config": {"Labels": {"names": " ".join(names)}}})
        digest = sha256(config.encode())
        manifest = json.dumps({"schemaVersion": 2, "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest,
            "size": len(config)}, "layers": [{"digest": d} for d in chain]})
        image_id = str(record.pop("id", "")) or digest[7:]
        self.images.append({
            "id": image_id, "digest": sha256(manifest.encode()), "names": list(names),
            "layer": layer, "metadata": "{}", "created": "2026-01-02T03:04:05.5+02:00"})
        for key, data in ((digest, config), ("manifest-" + sha256(manifest.encode()), manifest),
                          ("manifest", manifest)):
            self.big_data(self.images[-1], key, data.encode())
        self.images[-1].update(record)
        return image_id

    def big_data(self, record: dict[str, Any], key: str, data: bytes, kind: str = "images") -> None:
        name = os.fsdecode(cstor.big_data_file(key))
        self.write(f"{self.driver}-{kind}/{record['id']}/{name}", data)
        record.setdefault("big-data-names", []).append(key)
        if kind != "layers":
            record.setdefault("big-data-sizes", {})[key] = len(data)
            record.setdefault("big-data-digests", {})[key] = sha256(data)

    def container(self, image: str, layer: str, name: str, **record: Any) -> str:
        container_id = hashlib.sha256(name.encode()).hexdigest()
        self.containers.append({
            "id": container_id, "names": [name], "image": image, "layer": layer,
            "metadata": json.dumps({"image-name": "localhost/app:latest", "name": name}),
            "created": "2026-01-02T03:04:05Z", "flags": {"MountLabel": ""}, **record})
        return container_id

    def save(self) -> StoreBuilder:
        for kind in KINDS:
            self.write(f"{self.driver}-{kind}/{kind}.json", json.dumps(getattr(self, kind)))
        return self


def make_sample(root: str, driver: str = "overlay") -> StoreBuilder:
    """Make the store of ``make demo``: two images on three layers, and a container."""
    store = StoreBuilder(root, driver)
    rng = random.Random(7)
    base = store.layer(make_tar(
        ("bin/", None), ("bin/hello", b"#!/bin/sh\necho hello world\n"), ("bin/sh", "hello"),
        ("etc/", None), ("etc/os-release", b'NAME="Sample"\nVERSION_ID=1\n'),
        ("usr/share/data.bin", rng.getrandbits(8 * 3_000_001).to_bytes(3_000_001, "big")),
        ("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")))
    app = store.layer(make_tar(
        ("srv/", None), ("srv/app.py", b"print('app')\n" * 400), ("etc/.wh.passwd", b""),
        ("srv/caf\u00e9 <&>", b"x"), ("srv/latin1-\udce9", b"not UTF-8\n"),
        ("srv/" + "long-" * 30, b"y" * 512)), base)
    top = store.layer(make_tar(("srv/version", b"2\n")), app)
    store.image(app, "localhost/app:1", "localhost/app:latest")
    image = store.image(top, "docker.io/library/sample:latest")
    rw = store.layer(None, top, names=["web-layer"])
    store.container(image, rw, "web")
    return store.save()


def on_terminal(*args: str, script: bool = True) -> bytes:
    """Return what the script, or Python without it, prints on a terminal."""
    fd, slave = open_terminal()
    code = ("import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
    process = subprocess.Popen([sys.executable, "-c", code, *COMMAND[1:] * script, *args], env=IDLE,
                               stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    output = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while True:
            part = os.read(fd, 65536)
            if not part:
                break
            output += part
    os.close(fd)
    process.wait()
    return output


class Done(subprocess.CompletedProcess[bytes]):
    """What a command said."""

    @property
    def out(self) -> str:
        return self.stdout.decode()

    @property
    def err(self) -> str:
        return self.stderr.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def run_as_program(words: Sequence[str], env: Mapping[str, str], fds: Sequence[int]) -> int:
    """Do in a child what the command does; ``fds`` become its stdin, stdout and stderr."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    tempfile.tempdir = None
    default_signals()
    sys.argv = ["-c", *words]
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=buffering, encoding="utf-8", errors=errors, closefd=False)
        for number, mode, buffering, errors in ((0, "r", -1, "surrogateescape"),
                                                (1, "w", -1, "surrogateescape"),
                                                (2, "w", 1, "backslashreplace")))
    try:
        return cstor.main()
    except BaseException:
        traceback.print_exc()
        return 1


def fork_main(words: Sequence[str], env: Mapping[str, str]) -> Done:
    """Run the command in a child of this process, which spares the start of an interpreter."""
    ends = [os.pipe() for _ in range(2)]
    pid = os.fork()
    if not pid:
        try:
            null = os.open(os.devnull, os.O_RDONLY)
            os._exit(run_as_program(words, env, [null, *(end for _, end in ends)]))
        finally:
            os._exit(99)
    for _, end in ends:
        os.close(end)
    found = {end: bytearray() for end, _ in ends}
    left = set(found)
    while left:
        ready = select.select(left, (), (), 60)[0]
        if not ready:
            os.kill(pid, signal.SIGKILL)
            break  # a child of it can hold the pipes
        for end in ready:
            part = os.read(end, 1 << 16)
            found[end] += part
            left -= set() if part else {end}
    for end in found:
        os.close(end)
    status = os.waitpid(pid, 0)[1]
    return Done(words, os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status),
                *map(bytes, found.values()))


class StoreTest(unittest.TestCase):
    """A test with a store in a temporary directory, which must end as it began.

    Nothing that was given to guard() may change until its end, and no descriptor is left open.
    """

    def setUp(self) -> None:
        self._fds = open_fds()
        self._before: dict[bytes, tuple[int, ...]] = {}
        self._root = ""
        self.dir = tempfile.mkdtemp(prefix="cstor-test-")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.addCleanup(self._check)

    def _check(self) -> None:
        if self._root:
            self.assertEqual(self._before, snapshot(self._root), "the store was changed")
        self.assertEqual(self._fds, open_fds(), "descriptors were left open")

    def guard(self, root: str) -> None:
        """From now on nothing below ``root`` may change."""
        self._root, self._before = root, snapshot(root)

    def sample(self) -> StoreBuilder:
        """Return the sample store."""
        return make_sample(self.dir + "/store")

    def builder(self) -> StoreBuilder:
        """Return an empty store."""
        return StoreBuilder(self.dir + "/store")

    def stack(self, *tars: bytes) -> tuple[StoreBuilder, list[str]]:
        """Return a store of layers, each upon the one before, and their IDs."""
        store, layers = self.builder(), [""]
        for tar in tars:
            layers.append(store.layer(tar, layers[-1]))
        return store.save(), layers[1:]

    @contextlib.contextmanager
    def unchanged(self, root: str) -> Iterator[None]:
        """Nothing below ``root`` may change meanwhile."""
        before = snapshot(root)
        try:
            yield
        finally:
            self.assertEqual(before, snapshot(root), "the store was changed")

    @contextlib.contextmanager
    def open(self, store: StoreBuilder, **kwargs: Any) -> Iterator[cstor.Storage]:
        """Open a store that must not change meanwhile."""
        with self.unchanged(store.root), cstor.Storage.open(store.root, **kwargs) as storage:
            yield storage

    def export(self, layer: cstor.Layer, **kwargs: Any) -> bytes:
        """Return the tar of a layer."""
        out = io.BytesIO()
        layer.export(out, **kwargs)
        return out.getvalue()

    def run_cstor(self, *args: str, status: int = 0, env: Mapping[str, str] | None = None,
                  command: Sequence[str] = (), **kwargs: Any) -> Done:
        """Run the command in a process of its own and check its exit status."""
        env = {**IDLE, **(env or {})}
        if command or kwargs or env["LC_ALL"] == "C" or threading.active_count() > 1:
            done = Done(**vars(subprocess.run([*(command or COMMAND), *args], timeout=60, env=env,
                                              check=False, **{"stdout": subprocess.PIPE, "stderr":
                                                              subprocess.PIPE, "stdin":
                                                              subprocess.DEVNULL, **kwargs})))
        else:
            done = fork_main(args, env)
        self.assertEqual(status, done.returncode, done.stderr)
        if done.stderr and status not in (0, 2):
            self.assertRegex(done.err, r"\Acstor: error: [^\n]+\n\Z")
        return done

    @contextlib.contextmanager
    def serve(self, root: str, *args: str, **kwargs: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Run a server until the end of the block; SIGTERM must end it well."""
        need_proc()  # the server passes files through it
        server = subprocess.Popen([*COMMAND, "--root", root, "serve", *args],
                                  env=IDLE, stderr=subprocess.PIPE, **kwargs)
        try:
            assert server.stderr
            self.assertIn(b"serving", server.stderr.readline())
            yield server
            server.terminate()
            self.assertEqual(b"", server.communicate(timeout=30)[1])
            self.assertEqual(0, server.returncode)
        finally:
            server.kill()
            server.communicate()

    def run_on(self, store: StoreBuilder | cstor.Storage, words: str, *more: str, **options: Any
               ) -> Done:
        """Run a command on a store, which must not change; ``words`` are its first arguments."""
        root = store.root if isinstance(store, StoreBuilder) else store.graphroot
        with self.unchanged(root):
            return self.run_cstor("--root", root, *words.split(), *more, **options)

    def call(self, *words: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Run main() in this process with a terminal that takes ASCII alone."""
        raw = io.BytesIO(), io.BytesIO()
        streams = [io.TextIOWrapper(data, "ascii", write_through=True) for data in raw]
        watched = self.unchanged(words[1]) if words[0] == "--root" else contextlib.nullcontext()
        with mock.patch.dict(os.environ, {**IDLE, **(env or {})}, clear=True), \
                contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), \
                watched:
            status = cstor.main(words)
        out, err = (data.getvalue().decode("utf-8", "replace") for data in raw)
        self.assertRegex(err, r"\A(cstor: [^\n]+\n)*\Z")
        self.assertNotIn("\x1b", out + err)
        return status, out, err


# ================================================================================================
# 0. The house
# ================================================================================================

class House(unittest.TestCase):
    """What holds for the source itself."""

    LINES = 14_475  # 250 more for speed, 600 for damage
    source: str
    tree: ast.Module
    banners: list[tuple[int, int, str]]  # first line, number, title

    @classmethod
    def setUpClass(cls) -> None:
        with open(SCRIPT, encoding="utf-8") as file:
            cls.source = file.read()
        cls.tree = ast.parse(cls.source, feature_version=(3, 9))
        lines = cls.source.splitlines()
        cls.banners = [(i, int(line[2:].partition(".")[0]), line.partition(". ")[2])
                       for i, line in enumerate(lines, 1) if re.match(r"# \d+\. ", line)
                       and lines[i - 2].startswith("# ====")]

    def section_of(self, line: int) -> int:
        return max((number for first, number, _ in self.banners if first <= line), default=0)

    def test_map_matches_banners(self) -> None:
        head = ast.get_docstring(self.tree)
        assert head
        table = head.split("a method may call down:\n\n")[1]
        rows = [line.split(None, 1) for line in table.splitlines()]
        listed = [(int(row[0]), " ".join(row[1].split("  ")[0].split())) for row in rows]
        self.assertEqual(listed, [(number, title.lower()) for _, number, title in self.banners])

    def test_sections_use_only_what_is_above(self) -> None:
        """Classes, functions and module-level code use what is above; a method may call down."""
        defined: dict[str, int] = {}
        for node in self.tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
                target.id for target in getattr(node, "targets", [getattr(node, "target", None)])
                if isinstance(target, ast.Name)]
            defined.update((name, self.section_of(node.lineno)) for name in names)
        used = []

        def visit(node: ast.AST, section: int) -> None:
            for field, value in ast.iter_fields(node):
                if field in ("annotation", "returns"):  # never evaluated
                    continue
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.Name) and defined.get(child.id, 0) > section:
                        used.append(f"line {child.lineno}: {child.id}")
                    if isinstance(child, ast.FunctionDef) and isinstance(node, ast.ClassDef):
                        for part in [*child.decorator_list, child.args]:
                            visit(part, section)
                    elif isinstance(child, ast.AST):
                        visit(child, section)

        for node in self.tree.body:
            visit(node, self.section_of(node.lineno))
        self.assertEqual([], used)

    def test_imports_are_of_the_standard_library(self) -> None:
        allowed = {"__future__", "_signal", "_thread", "_weakref", "argparse", "binascii",
                   "builtins", "bz2", "contextlib", "ctypes", "errno", "fcntl", "functools", "gc",
                   "gzip", "hashlib", "heapq", "importlib", "io", "itertools", "json", "lzma",
                   "marshal", "os", "pwd", "queue", "re", "select", "shutil", "signal", "socket",
                   "sqlite3", "stat", "struct", "subprocess", "sys", "tempfile", "threading",
                   "time", "traceback", "typing", "zlib"}
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
        self.assertEqual(allowed, found)

    def test_an_older_python_is_told(self) -> None:
        """The first line that it cannot parse says what is needed; its SyntaxError quotes it."""
        lines = self.source.splitlines()
        first = next(node for node in self.tree.body[1:]
                     if not isinstance(node, (ast.Import, ast.ImportFrom)))
        assert isinstance(first, ast.ClassDef)
        line = lines[first.decorator_list[0].lineno - 1]
        self.assertEqual("@(lambda kind: kind)  # cstor.py needs Python 3.9 or later", line)
        self.assertTrue(all(ord(char) < 128 for char in self.source[:self.source.index(line)]))
        found = [shutil.which("python2"), *(shutil.which(f"python3.{i}") for i in range(2, 9)),
                 *glob.glob(os.path.expanduser("~/.pyenv/versions/[23].[0-8]*/bin/python"))]
        for python in filter(None, found):
            if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info >= (3, 9))"],
                              stderr=subprocess.DEVNULL, check=False).returncode:
                continue  # 3.10, or a version manager's name for none
            for words in ([SCRIPT, "image", "list"], ["-", "image", "list"], ["-c", "import cstor"],
                          ["-m", "cstor"]):
                with open(SCRIPT, "rb") as script:
                    done = subprocess.run([python, "-B", *words], stdin=script, cwd=HERE,
                                          stderr=subprocess.PIPE, check=False)
                self.assertEqual(1, done.returncode, python)
                self.assertEqual([line, "^", "SyntaxError: invalid syntax"],
                                 [text.strip() for text
                                  in done.stderr.decode().splitlines()[-3:]], python)

    def test_only_formats_and_commands_print_and_exit(self) -> None:
        last = self.banners[-2][0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and node.lineno < last:
                self.assertNotIn(ast.unparse(node.func), ("print", "sys.exit", "exit", "input"))

    def test_type_checkers_see_misspelled_names(self) -> None:
        """A method that serves any name hides misspelled ones: mypy must not see it."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name in cstor.__all__:
                self.assertNotIn("__getattr__", [getattr(part, "name", "") for part in node.body],
                                 node.name)

    def test_functions_are_short_and_public_names_documented(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                top = node in self.tree.body
                self.assertTrue(ast.get_docstring(node) or not top, node.name)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno
                self.assertLessEqual(node.end_lineno - node.lineno + 1, 60, node.name)
        for name in cstor.__all__:
            self.assertTrue(getattr(cstor, name).__doc__, name)

    def test_size_is_kept(self) -> None:
        """The ratchet: what needs more lines makes room first; the number only goes down."""
        self.assertLessEqual(self.source.count("\n"), self.LINES)
        lengths = [node.end_lineno - node.lineno + 1 for node in ast.walk(self.tree)
                   if isinstance(node, ast.FunctionDef) and node.end_lineno]
        self.assertLessEqual(statistics.median(lengths), 10)

    def test_import_is_cheap(self) -> None:
        code = ("import sys; before = set(sys.modules); import cstor; "
                "print(*sorted(set(sys.modules) - before))")
        done = subprocess.run([sys.executable, "-I", "-S", "-c",
                               f"import sys; sys.path.insert(0, {HERE!r}); {code}"],
                              stdout=subprocess.PIPE, check=True)
        dear = {"argparse", "ctypes", "dataclasses", "datetime", "hashlib", "pathlib", "pickle",
                "queue", "signal", "socket", "sqlite3", "subprocess", "tarfile", "tempfile",
                "threading", "typing"}
        self.assertEqual(set(), dear & set(done.stdout.decode().split()))

    def test_readme_lists_the_commands(self) -> None:
        with open(HERE + "/README.md", encoding="utf-8") as file:
            readme = file.read()
        listed = [line.split("`")[1] for line in readme.splitlines() if line.startswith("| `")]
        self.assertEqual([" ".join([words, *(
            name.replace("+", "...") for name in arguments.split() if name[0] != "-")])
            for words, _, arguments in cstor.COMMANDS], listed)


# ================================================================================================
# 1. Errors
# ================================================================================================

class Errors(unittest.TestCase):
    def test_display_is_one_line_of_printable_text(self) -> None:
        for name, shown in ((b"plain", "plain"), (b"caf\xc3\xa9", "café"),
                            (b"\xff\xfe", "\\xff\\xfe"), (b"a\nb\x1b[31m", "a\\nb\\x1b[31m"),
                            ("\ud800", "\\ud800"), ("\u2028\u202e", "\\u2028\\u202e")):
            self.assertEqual(shown, cstor.display(name))

    def test_tree(self) -> None:
        for child, parents in ((cstor.ImageUnknown, (cstor.NotFound, LookupError)),
                               (cstor.Ambiguous, (cstor.NotFound,)),
                               (cstor.FormatError, (ValueError,)),
                               (cstor.NeedsUnshare, (PermissionError,))):
            for parent in (*parents, cstor.CstorError):
                self.assertTrue(issubclass(child, parent))
        error = cstor.FormatError("bad", file="f", line=3, hint="mend it")
        self.assertEqual(("f:3: bad", "f", 3, "mend it"),
                         (str(error), error.file, error.line, error.hint))
        self.assertEqual("no", str(cstor.NeedsUnshare("no", hint="x")))


# ================================================================================================
# 2. Text and constants
# ================================================================================================

class OddText(StoreTest):
    """Lone surrogates, which Python's json reads, and NUL bytes, wherever records hold text."""

    TEXT = "\ud800\0\x1b[31m"

    def spoiled(self) -> StoreBuilder:
        """Return a store whose records hold such text in all fields that are free."""
        store = self.sample()
        text = self.TEXT
        for record in (*store.layers, *store.images, *store.containers):
            record.update({"metadata": text, "created": text, "flags": {text: text}, text: text})
            record["names"] = [*record.get("names", []), text]
            record.setdefault("big-data-names", []).append(text)
        for image in store.images:
            image.update({"names-history": [text], "mapped-layers": [text]})
            manifest, config = (json.loads(store.read(
                f"overlay-images/{image['id']}/{os.fsdecode(cstor.big_data_file(key))}"))
                for key in ("manifest", f"sha256:{image['id']}"))
            config.update({"author": text, text: text, "os": text, "architecture": text})
            config["config"] = {"Labels": {text: text}, "Env": [text], "Cmd": [text]}
            for step in config["history"]:
                step.update({"created_by": text, "comment": text, "created": text})
            manifest.update({"annotations": {text: text}, text: text})
            for key, value in (("manifest", manifest), (f"sha256:{image['id']}", config)):
                image["big-data-names"].remove(key)
                store.big_data(image, key, json.dumps(value).encode())
        store.layers[0].update({"mountlabel": text, "toc-digest": text,
                                "compressed-diff-digest": text})
        return store.save()

    def test_every_command(self) -> None:
        store = self.spoiled()
        image, layer, container = (records[-1]["id"] for records in (
            store.images, store.layers[:3], store.containers))
        self.guard(store.root)
        both = (("image", "list"), ("layer", "list"), ("container", "list"), ("store", "info"),
                ("image", "inspect", image), ("image", "layers", image),
                ("image", "history", image), ("image", "blame", image), ("image", "files", image),
                ("layer", "inspect", layer), ("container", "inspect", container),
                ("image", "diff", "localhost/app:1", image), ("container", "files", "web"))
        for words in both:
            for form in ("table", "json"):
                status, out, err = self.call("--root", store.root, *words, "--format", form)
                self.assertEqual(1 if "diff" in words else 0, status, (words, err))
        status, out, _ = self.call("--root", store.root, "image", "list", "--format", "json")
        self.assertEqual(self.TEXT, json.loads(out)[-1]["names"][-1])
        self.assertIn("\\ud800\\x00\\x1b[31m", self.call("--root", store.root, "image", "list")[1])
        for command in (("toc", image), ("export", image, "-o", "@/tar"),
                        ("export", image, "--as", "docker-archive", "-o", "@/docker"),
                        ("copy-to-oci", image, "@/oci"), ("extract", image, "@/root", "-q"),
                        ("export", image, "--as", "oci-archive", "-o", "@/archive")):
            status, _, err = self.call("--root", store.root, "image", *(
                word.replace("@", self.dir) for word in command))
            self.assertEqual((0, ""), (status, without_owners(err)), command)

    def test_what_names_a_layer_or_an_image(self) -> None:
        """A fault of that record, and an error of what needs it."""
        store = self.sample()
        for kind, field, words, status in (
                ("layers", "id", ("layer", "list"), 0), ("layers", "parent", ("layer", "list"), 0),
                ("layers", "diff-digest", ("layer", "list"), 0),
                ("images", "layer", ("image", "files", "sample"), 3),
                ("images", "id", ("image", "inspect", "sample"), 0),
                ("containers", "layer", ("container", "files", "web"), 3),
                ("containers", "image", ("container", "list"), 0),
                ("containers", "id", ("container", "list"), 0)):
            for text in ("\ud800", "x\0y"):
                record = getattr(store, kind)[-1]
                with mock.patch.dict(record, {field: text}):
                    store.save()
                for form in ("table", "json"):
                    found, _, err = self.call("--root", store.root, *words, "--format", form)
                    self.assertEqual(status, found, (kind, field, err))

    def test_schema1(self) -> None:
        store = self.builder()
        image = store.image(store.layer(make_tar(("a", b"1"))), "localhost/old:1")
        store.images[0]["big-data-names"].remove("manifest")
        store.big_data(store.images[0], "manifest", json.dumps(
            {"schemaVersion": 1, "history": [{"v1Compatibility": '{"author":"\ud800"}'}]}).encode())
        store.save()
        status, out, err = self.call("--root", store.root, "image", "inspect", image)
        self.assertEqual((0, ""), (status, err))
        self.assertEqual("?", json.loads(out)[0]["config"]["author"])

    def test_database(self) -> None:
        store = self.sample()
        for root, rootfs in (("/g\0x", "/a\0b"), ("/g", "/\ud800"), ("", "/\ud800")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(store.path("db.sql"))
            database = make_database(store.root, graphroot=root or store.root, runroot=root,
                                     containers=[(store.containers[0]["id"], "w\0b", 3, {
                                         "rootfs": rootfs, "labels": {"\ud800": "\0"}})])
            database.execute("UPDATE PodConfig SET Name = CAST(x'eda080' AS TEXT)")
            database.commit()
            database.close()
            for form in ("table", "json"):
                for words in (("store", "info"), ("container", "list"), ("container", "inspect",
                                                                         "web")):
                    status, _, err = self.call("--root", store.root, *words, "--format", form)
                    self.assertEqual(0, status, err)
            status, _, err = self.call("--root", store.root, "container", "files", "web")
            self.assertEqual(5, status)
            self.assertIn(f"its --rootfs directory {cstor.display(rootfs)} is not opened", err)

    def test_arguments(self) -> None:
        store = self.sample()
        for text in ("\ud800", "x\0y"):
            for words in (("--root", text, "image", "list"), ("image", "inspect", text),
                          ("layer", "export", "x", "-o", text), ("image", "cat", "sample", text)):
                status, out, err = self.call("--root", store.root, *words)
                self.assertEqual((2, ""), (status, out))
                self.assertEqual("cstor: error: an argument holds a NUL byte or a lone surrogate\n",
                                 err)


# ================================================================================================
# 3. File descriptors
# ================================================================================================

class Openings(StoreTest):
    def test_a_signal_while_a_directory_is_closed(self) -> None:
        """A descriptor that was closed is not closed again: it may be another file's by then."""
        need_proc()
        real = os.close

        def close(fd: int) -> None:
            real(fd)
            raise KeyboardInterrupt

        os.makedirs(self.dir + "/a")
        os.makedirs(self.dir + "/b")
        directory = cstor.Directory.at(self.dir)
        directory.parent(b"a")
        with mock.patch("os.close", close), self.assertRaises(KeyboardInterrupt):
            directory.parent(b"b")
        self.assertEqual("b", os.path.basename(os.readlink(
            f"/proc/self/fd/{directory.parent(b'b')}")))
        left = directory.fd
        with mock.patch("os.close", close), self.assertRaises(KeyboardInterrupt):
            directory.close()
        directory.close()
        real(left)  # which nobody got round to

    @staticmethod
    def openat2(dir_fd: int, name: bytes) -> int:
        """Open a directory by openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        how = (ctypes.c_uint64 * 3)(cstor.OPEN_DIRECTORY, 0, 0x10 | 0x02)
        fd: int = libc.syscall(ctypes.c_long(437), ctypes.c_int(dir_fd), ctypes.c_char_p(name),
                               ctypes.byref(how), ctypes.c_size_t(24))
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd

    def both(self, root: str, name: bytes) -> list[object]:
        """Return (device, inode) or errno from openat2 and from open_in_root()."""
        results: list[object] = []
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
        ways: tuple[Callable[[], int], ...] = (lambda: self.openat2(fd, name.strip(b"/") or b"."),
                                               lambda: cstor.open_in_root(fd, name))
        try:
            for way in ways:
                try:
                    found = way()
                    results.append((os.fstat(found).st_dev, os.fstat(found).st_ino))
                    os.close(found)
                except OSError as error:
                    results.append(error.errno)
        finally:
            os.close(fd)
        return results

    def need_openat2(self) -> None:
        try:
            os.close(self.openat2(-100, b"."))
        except OSError as error:
            need(error.errno not in (errno.ENOSYS, errno.EPERM), "the kernel has no openat2")

    def test_same_answers_and_never_outside(self) -> None:
        self.need_openat2()
        root = self.dir + "/root"
        os.makedirs(root + "/a/b/c")
        os.makedirs(self.dir + "/outside/b")
        put(root + "/file")
        os.mkfifo(root + "/fifo")
        for link, target in (("abs", "/a/b"), ("up", "../../../outside"), ("deep", "a/../../a/b"),
                             ("loop1", "loop2"), ("loop2", "loop1"), ("self", "self/x"),
                             ("dangling", "nowhere"), ("a/out", "/../../outside"),
                             ("tofile", "file"), ("a/b/back", "../.."), ("etc", "/etc"),
                             ("slash", "/"), ("host", self.dir + "/outside")):
            os.symlink(target, os.path.join(root, link))
        inside = {(s.st_dev, s.st_ino) for d, _, _ in os.walk(root) for s in [os.stat(d)]}
        parts = ["a", "b", "c", "..", ".", "", "abs", "up", "deep", "loop1", "self", "dangling",
                 "out", "tofile", "back", "etc", "slash", "host", "file", "fifo", "no\nname",
                 "\udcff"]
        rng = random.Random(3)
        names = [os.fsencode("/".join(rng.choices(parts, k=rng.randint(1, 6))))
                 for _ in range(3000)]
        seen = set()
        for name in names:
            openat2, walk = self.both(root, name)
            self.assertEqual(openat2, walk, name)
            if isinstance(walk, tuple):
                self.assertIn(walk, inside, name)
            seen.add(walk)
        self.assertLess({errno.ENOENT, errno.ELOOP, errno.ENOTDIR}, seen)

    def test_long_chains_of_links(self) -> None:
        self.need_openat2()
        for i in range(50):
            os.symlink(f"l{i + 1}" if i < 49 else ".", f"{self.dir}/l{i}")
        self.assertEqual([errno.ELOOP] * 2, self.both(self.dir, b"l9"))
        results = self.both(self.dir, b"l10")
        self.assertEqual(results[0], results[1])
        self.assertIsInstance(results[0], tuple)

    def test_a_lookup_that_goes_up_and_down_has_an_end(self) -> None:
        os.close(self.make_deep(800))
        os.symlink("d/" * 800 + "../" * 700, os.path.join(self.dir, "up"))
        with cstor.Directory.at(self.dir) as root, self.assertRaises(OSError) as caught:
            root.exists(b"up/x")
        self.assertEqual(errno.ELOOP, caught.exception.errno)

    def make_deep(self, count: int) -> int:
        """Make directories called d, each in the one before; return the last one's descriptor."""
        self.addCleanup(subprocess.run, ["rm", "-rf", os.path.join(self.dir, "d")], check=True)
        fd = os.open(self.dir, os.O_PATH | os.O_DIRECTORY)
        for _ in range(count):
            os.mkdir("d", dir_fd=fd)
            fd, old = os.open("d", os.O_PATH | os.O_DIRECTORY, dir_fd=fd), fd
            os.close(old)
        return fd

    def test_deep_trees_need_few_descriptors(self) -> None:
        fd = self.make_deep(1500)
        expected = os.fstat(fd)
        os.close(fd)
        with cstor.Directory.at(self.dir) as root:
            fd = cstor.open_in_root(root.fd, b"d/" * 1500)
        found = os.fstat(fd)
        os.close(fd)
        self.assertEqual((expected.st_dev, expected.st_ino), (found.st_dev, found.st_ino))

    def test_only_regular_files_are_opened(self) -> None:
        os.mkfifo(self.dir + "/fifo")
        os.symlink("/etc/passwd", self.dir + "/link")
        os.mkdir(self.dir + "/dir")
        with cstor.Directory.at(self.dir) as root:
            for name, word in ((b"fifo", "FIFO"), (b"link", "symbolic link"),
                               (b"dir", "directory")):
                with self.assertRaisesRegex(cstor.FormatError, word):
                    root.open(name)
            self.assertRaises(FileNotFoundError, root.open, b"missing")
            self.assertRaises(cstor.FormatError, root.open, b"nul\0/x")

    def test_reading_leaves_times_of_access(self) -> None:
        """EPERM alone says that O_NOATIME is not for us; what is closed changes nothing."""
        put(self.dir + "/f", "x")
        os.utime(self.dir + "/f", (0, 1 << 30))
        real, seen = os.open, []

        def opened(code: int, name: bytes, flags: int, **options: Any) -> int:
            if name == b"f" and not flags & os.O_PATH:
                seen.append(bool(flags & os.O_NOATIME))
                if code and seen[-1]:
                    raise PermissionError(code, os.strerror(code))
            return real(name, flags, **options)

        with cstor.Directory.at(self.dir) as root:
            for code, tries in ((errno.EACCES, [True]), (0, [True]), (errno.EPERM, [True, False]),
                                (0, [False])):
                self.assertEqual(0, os.stat(self.dir + "/f").st_atime)
                seen.clear()
                with mock.patch("os.open", functools.partial(opened, code)):
                    if code == errno.EACCES:
                        self.assertRaises(cstor.NeedsUnshare, root.read, b"f", 9)
                    else:
                        self.assertEqual(b"x", root.read(b"f", 9))
                self.assertEqual(tries, seen)
                if not seen[-1]:
                    os.utime(self.dir + "/f", (0, 1 << 30))

    def test_no_more_is_read_than_asked_for(self) -> None:
        put(self.dir + "/f", os.urandom(2 * cstor.CHUNK))
        for count in (1, cstor.CHUNK, cstor.CHUNK + 1):
            with open(self.dir + "/f", "rb") as file:
                found = cstor.read_up_to(file.fileno(), count)
            self.assertEqual(read_bytes(self.dir + "/f")[:count], found)

    def test_copier_falls_through_and_remembers(self) -> None:
        source = self.dir + "/source"
        data = os.urandom(300_001)
        put(source, data)
        fd = os.open(source, os.O_RDONLY)
        for flags, ways in ((os.O_APPEND, 1), (0, 3 if hasattr(os, "copy_file_range") else 2)):
            target = f"{self.dir}/target{flags}"
            out = os.open(target, os.O_WRONLY | os.O_CREAT | flags)
            copier = cstor.Copier()
            self.assertEqual(300_000, copier.copy(fd, 1, 300_000, out))
            self.assertEqual(ways, len(copier._ways))
            self.assertEqual(11, copier.copy(fd, len(data) - 11, 50, out))
            os.close(out)
            self.assertEqual(data[1:] + data[-11:], read_bytes(target))
        os.close(fd)


# ================================================================================================
# 4. Checksums
# ================================================================================================

class Checksums(unittest.TestCase):
    def test_known_values(self) -> None:
        self.assertEqual(0x44e9cf3f572ad9ac, cstor.crc64(b"hello world\n"))
        self.assertEqual(0, cstor.crc64(b""))
        self.assertEqual(0xb90956c775a41001, cstor.crc64(b"123456789"))  # CRC-64/GO-ISO's check

    def test_all_lengths_against_the_definition(self) -> None:
        rng = random.Random(5)
        data = bytes(rng.getrandbits(8) for _ in range(cstor._FOLD_BYTES * 2 + 300))
        edge = cstor._FOLD_BYTES
        for size in [*range(140), 255, 256, 257, 1000, edge - 1, edge, edge + 1, edge + 63,
                     edge + 64, edge + 65, 2 * edge - 1, 2 * edge, len(data)]:
            self.assertEqual(slow_crc64(data[:size]), cstor.crc64(data[:size]), size)

    def test_in_parts(self) -> None:
        rng = random.Random(6)
        data = bytes(rng.getrandbits(8) for _ in range(100_000))
        whole = cstor.crc64(data)
        for _ in range(40):
            crc = at = 0
            while at < len(data):
                size = rng.choice((1, 7, 63, 64, 65, 4096, 32768, 50000))
                crc = cstor.crc64(memoryview(data)[at:at + size], crc)
                at += size
            self.assertEqual(whole, crc)


# ================================================================================================
# 6. Configuration
# ================================================================================================

class Toml(unittest.TestCase):
    def parse(self, text: str) -> dict[str, Any]:
        return cstor.Toml(text.encode(), "storage.conf").parse()

    def settings(self, text: str, before: Mapping[str, Any] = {}) -> dict[str, Any]:
        return cstor.Toml(text.encode(), "storage.conf").settings(before)

    # What podman reads (tried with 4.3.1), none of which concerns us.
    VALID = (
        'a = """x\ny"""\nb = """\nnodev,\\\n   \t\n  metacopy=on"""\nc = """"x""y"""""\n',
        "a = '''x\\n\ny'''\nb = '''\n'q' ''z'''\''\n", 'a = ""\nb = \'\'\nc = """"""\n',
        "a = 1979-05-27\nb = 07:32:00\nc = 1979-05-27 07:32:00.5-07:00\nd = 1979-05-27T07:32:00Z\n",
        "[[a]]\nx = 1\n[[a.b]]\ny = 2\n[a.c]\n[[a]]\n[a.b]\n", "[a.b.c]\n[a]\nx = 1\n[a.d]\n",
        'a = [[1, 2], ["a", {b = 1}], []]\n', "a = {b = {c = [1, {d = 2}]}, e.f = 1, 'g' = {}}\n",
        '"a.b" = 1\n\'c"\' . d = 2\n"" = 3\n["x.y".z]\n"\\u00e9\\t" = 1\n1.2 = 3\n',
        "[a]\r\nb = \"\"\"\r\nx\r\ny\"\"\"\r\n# c\r\n", "A = 1\na = 2\n", "a = 1", "",
        "a = inf\nb = +inf\nc = -inf\nd = nan\ne = -nan\n", "# \t\u00e9\n[ a . b ] # c\nx = 1#\n",
        "a = 0xDEAD_beef\nb = 0o17\nc = 0b1_0\nd = -17\ne = +9_9\nf = 0\ng = -0\n",
        "a = 1e5\nb = -1.5E-3\nc = 6_0.0_1\nd = 0.0\ne = 1e0_1\n", "a = " + "[" * 200 + "]" * 200,
        'a = [ # x\n 1, # y\n\n 2,\n]\nb = [true, false, "\\U0001F600\\\\\\""]\n')
    # What it does not, with the line that is to blame.
    MALFORMED = (
        ("[storage", 1), ("a = ", 1), ("\n\nx", 3), ('a = "b', 1), ("[[a]\n", 1), ("[]", 1),
        ("[ [a]]", 1), ('a = """x""', 1), ("a = '''x\n\n", 1), ("a = 1\na = 2", 2),
        ("[t]\n[t]", 2), ("[t]\n[[t]]", 2), ("a = []\n[[a]]", 2), ("a = 1\n[a.b]", 2),
        ("a = 1\na.b = 2", 2), ("a = {b = 1}\n[a]", 2), ("a = {b=1 c=2}", 1), ("a = [1 2]", 1),
        ("a = {b=1,,c=2}", 1), ("a = {", 1), ("a = {b", 1), ('a = "\\q"', 1), ("a = [,]", 1),
        ("a = 1979-13-27", 1), ("a = 1979-02-30", 1), ("a = 07:32:0", 1), ("a = 25:00:00", 1),
        ("a = tru", 1), ("a = True", 1), ('a = "x" y', 1), ("a = 1 b = 2", 1), ("= 1", 1),
        ('a = "\\ud800"', 1), ('a = "\\U00110000"', 1), ("a = 0x", 1), ("a = +0x1", 1),
        ("a = 01", 1), ("a = 1__0", 1), ("a = 1.", 1), ("a = .5", 1), ("a = 1e", 1), ("a = 0X1", 1),
        ('a = "\x01"', 1), ("# \x01", 1), ("a = 1\rb = 2", 1), ("a = 1\f", 1), ('"""a""" = 1', 1),
        ("a = " + "[" * 5000, 1), ("a = " + "{a=" * 5000, 1), ("\na = " + "9" * 5000 + "_", 2))

    def test_what_storage_conf_uses(self) -> None:
        self.assertEqual({
            "storage.driver": "overlay", "storage.graphroot": "/var/lib/x",
            "storage.options.additionalimagestores": ["/a", "/b"],
            "storage.transient_store": True,
        }, self.settings(textwrap.dedent('''\
            # comment
            [storage]
            driver = "overlay"   # trailing
            graphroot='/var/lib/x'
            transient_store = true

            [storage.options]
            additionalimagestores = [ # why
              "/a",
              '/b', # last
            ]
            pull_options = {enable_partial_images = "false", ostree_repos=""}
              [ storage . "options" . overlay ]
            mountopt = """nodev,\\
               metacopy=on"""
            size = 1_0
            [[other]]
            when = 2024-01-01T00:00:00Z
            ''')))

    def test_what_podman_reads(self) -> None:
        """The values are those of Python's own parser, where it has one."""
        try:
            import tomllib
        except ImportError:
            tomllib = None  # type: ignore[assignment]

        def plain(value: Any) -> Any:
            """Numbers as numbers: our parser leaves them as they are written."""
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, list):
                return list(map(plain, value))
            if isinstance(value, bytes):
                with contextlib.suppress(ValueError):
                    return int(value, 0)
                with contextlib.suppress(ValueError):
                    return repr(float(value))
            moment = isinstance(value, (bytes, datetime.date, datetime.time))
            return "moment" if moment else repr(value) if isinstance(value, float) else value

        for text in self.VALID:
            found = plain(self.parse(text))
            if tomllib:
                self.assertEqual(plain(tomllib.loads(text)), found, text)
            self.assertEqual({}, self.settings(text))
        for text, _ in self.MALFORMED if tomllib else ():
            with self.assertRaises((ValueError, RecursionError), msg=text):
                tomllib.loads(text)
        self.assertEqual({"a": "x\ny", "b": "nodev,metacopy=on", "c": '"x""y""'},
                         self.parse(self.VALID[0]))
        self.assertEqual({"A": b"1", "a": b"07:32:00"}, self.parse("A = 1\na = 07:32:00\n"))

    def test_what_only_newer_podman_reads(self) -> None:
        """TOML 1.1, a byte order mark, and what BurntSushi's decoder lets pass."""
        for text, value in (("a = {\nb = 1, # c\n}", {"a": {"b": b"1"}}),
                            ("\ufeffa = 1", {"a": b"1"}),
                            ('a = "\\e\\x41"', {"a": "\x1bA"}),
                            ("[a]\nb.c = 1\n[a.b]\nd = 2",
                             {"a": {"b": {"c": b"1", "d": b"2"}}}),
                            ("a = {b = 1}\na.c = 2", {"a": {"b": b"1", "c": b"2"}}),
                            ("a = 07:32", {"a": b"07:32"})):
            self.assertEqual(value, self.parse(text))

    def test_names_in_any_case_and_in_quotes(self) -> None:
        self.assertEqual({"storage.graphroot": "/b", "storage.runroot": "/r"}, self.settings(
            '[STORAGE]\nGraphRoot = "/a"\ngraphroot = "/b"\n[Storage]\nRUNROOT = "/r"\n'))
        self.assertEqual({}, self.settings('"storage.graphroot" = "/evil"\n'))

    def test_append(self) -> None:
        values = {"storage.options.additionalimagestores": ["/a"]}
        for text, result in (('["/b", {append=true}]', ["/a", "/b"]), ('["/c"]', ["/c"]),
                             ('[{ append = true }, "/d"]', ["/c", "/d"]),
                             ('[{append=false}, "/e"]', ["/e"])):
            values = self.settings(f"[storage.options]\nadditionalimagestores={text}\n", values)
            self.assertEqual({"storage.options.additionalimagestores": result}, values)

    def test_what_is_not_understood_is_refused_with_its_line(self) -> None:
        for text, line in (*self.MALFORMED, ("[storage]\ngraphroot = 3", 2), ("storage = 3", 1),
                           ("[[storage]]\ngraphroot = '/x'", 1), ("[storage]\noptions = 'x'", 2),
                           ("[storage]\n\ngraphroot = 2024-01-01", 3),
                           ("[storage]\ntransient_store = 'x'", 2),
                           ("[Storage]\nGraphRoot = []", 2), ("storage = {graphroot = 1}", 1),
                           ("[storage.options]\nadditionalimagestores = [1]", 2),
                           ("[storage.options]\nadditionalimagestores = [['/a']]", 2),
                           ("[storage.options]\nadditionalimagestores = ['/a', {b = 1}]", 2),
                           ('[storage]\ngraphroot = "a\\u0000b"', 2),
                           ('[storage.options]\nadditionallayerstores = ["a\\u0000b"]', 2)):
            with self.assertRaises(cstor.FormatError, msg=text) as caught:
                self.settings(text)
            self.assertEqual(("storage.conf", line), (caught.exception.file, caught.exception.line),
                             text[:80])
        with self.assertRaises(cstor.FormatError) as caught:
            cstor.Toml(b"a = 1\nb = '\xff'\n", "f").parse()
        self.assertEqual(2, caught.exception.line)


class Discovery(StoreTest):
    """load_config() on made-up systems."""

    def system(self, files: Mapping[str, str], env: Mapping[str, str] | None = None,
               uid: int = 0, stores: Sequence[str] = ()) -> cstor.Config:
        for name, text in files.items():
            path = os.path.join(self.dir, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            put(path, text.replace("@", self.dir))
        for store in stores:
            os.makedirs(os.path.join(self.dir, store, "overlay-images"))
        environ = {key: value.replace("@", self.dir) for key, value in
                   {"HOME": "@/home", **(env or {})}.items()}
        return cstor.load_config(environ, euid=uid, system_root=self.dir)

    def where(self, config: cstor.Config) -> str:
        return os.path.relpath(config.graphroot, self.dir)

    def check(self, files: Mapping[str, str], uid: int = 0, env: Mapping[str, str] | None = None,
              /, **wanted: Any) -> None:
        """Compare fields of the configuration of a new system."""
        shutil.rmtree(self.dir)
        os.mkdir(self.dir)
        config = self.system(files, env, uid)
        found = {name: getattr(config, name) for name in wanted}
        self.assertEqual(wanted, {name: value.replace(self.dir, "@") if isinstance(value, str)
                                  else value for name, value in found.items()})

    def test_environment(self) -> None:
        own = "@/home/.local/share/containers/storage"
        self.check({}, graphroot="@/var/lib/containers/storage", rootless=False, files=[],
                   runroot="@/run/containers/storage")
        self.check({}, 1000, {"XDG_RUNTIME_DIR": "@/run/me", "XDG_DATA_HOME": "@/data"},
                   graphroot="@/data/containers/storage", runroot="@/run/me/containers",
                   rootless=True)
        self.check({}, 1000, {"TMPDIR": "@/tmp"}, graphroot=own,
                   runroot="@/tmp/storage-run-1000/containers")
        self.check({}, 5, {"CONTAINERS_GRAPHROOT": "@/g", "CONTAINERS_RUNROOT": "@/r"},
                   graphroot="@/g", runroot="@/r")
        self.check({}, 0, {"_CONTAINERS_USERNS_CONFIGURED": "done",  # podman unshare
                           "_CONTAINERS_ROOTLESS_UID": "1000"},
                   graphroot=own, rootless=True, uid=1000)

    def test_files(self) -> None:
        etc, usr, mine = ("etc/containers/storage.conf", "usr/share/containers/storage.conf",
                          "home/.config/containers/storage.conf")

        def conf(**values: str) -> str:
            return "[storage]\n" + "".join(f'{key} = "@/{text}"\n' for key, text in values.items())

        # The first main file counts, or the one that is named alone.
        lower = {usr: conf(graphroot="usr", runroot="run")}
        self.check({etc: conf(graphroot="etc"), **lower}, graphroot="@/etc",
                   runroot="@/run/containers/storage")
        self.check(lower, graphroot="@/usr", runroot="@/run")
        named = {etc: conf(graphroot="etc"), etc + ".d/x.conf": conf(graphroot="drop-in"),
                 "mine.conf": conf(graphroot="mine"), "over.conf": conf(runroot="over")}
        env = {"CONTAINERS_STORAGE_CONF": "@/mine.conf"}
        self.check(named, 0, env, graphroot="@/mine", runroot="@/run/containers/storage")
        self.check(named, 0, {**env, "CONTAINERS_STORAGE_CONF_OVERRIDE": "@/over.conf"},
                   graphroot="@/mine", runroot="@/over")
        with self.assertRaisesRegex(cstor.NotFound, "STORAGE_CONF names a file that does not"):
            self.system(named, {"CONTAINERS_STORAGE_CONF": "@/missing"})
        # The user's file replaces the system's in the old scheme.
        self.check({etc: conf(graphroot="system") + 'driver = "vfs"\n', mine: conf(runroot="run"),
                    self.OWN + "/overlay-images/x": ""}, 1000,
                   graphroot="@/" + self.OWN, runroot="@/run", driver="")
        # Drop-ins in their order, one of /etc in place of one of that name in /usr.
        files = {etc: conf(graphroot="main") + 'driver = "overlay"\n',
                 usr + ".d/10-a.conf": conf(graphroot="usr-10"),
                 etc + ".d/10-a.conf": conf(runroot="etc-10"),
                 etc + ".d/20-b.conf": conf(graphroot="etc-20"),
                 etc + ".d/30-c.txt": conf(graphroot="no"), etc + ".d/30-d.conf/x": "",
                 "usr/share/containers/storage.rootful.conf.d": "",
                 "etc/containers/storage.rootful.conf.d/05.conf": conf(graphroot="rootful"),
                 "etc/containers/storage.rootless.conf.d/30.conf": conf(graphroot="rootless"),
                 "etc/containers/storage.rootless.conf.d/1000/40.conf": conf(graphroot="user")}
        self.check(files, graphroot="@/etc-20", runroot="@/etc-10")
        self.check(files, 1001, graphroot="@/rootless")
        self.check(files, 1000, graphroot="@/user")
        self.check({**files, mine + ".d/40.conf": conf(graphroot="home")}, 1000,
                   graphroot="@/home")

    def test_options(self) -> None:
        """Podman 4 and 5 ignore root's additional stores for a user; podman 6 reads drop-ins."""
        etc, options = "etc/containers/storage.conf", "[storage.options]\n"
        shared = {etc: options + 'additionalimagestores = ["/shared"]\n'}
        self.check(shared, stores=["/shared"])
        self.check(shared, 1000, stores=[])
        self.check({**shared, "etc/containers/storage.rootless.conf.d/1.conf": ""}, 1000,
                   stores=["/shared"])
        self.check({**shared, etc + ".d/1.conf": options
                    + 'additionalimagestores = ["/b", {append=true}]\n'}, stores=["/shared", "/b"])
        self.check({etc: options + 'additionallayerstores = ["/als:ref", "/b"]\n'},
                   layer_stores=["/als:ref", "/b"])
        self.check({}, 0, {"STORAGE_OPTS": "overlay.additionallayerstore=/x:ref,/y"},
                   layer_stores=["/x:ref", "/y"], stores=[])
        # The environment replaces the options of the driver.
        files = {etc: '[storage]\ndriver="overlay"\nimagestore="/i"\n' + options
                 + 'additionalimagestores=["/a"]\n'}
        self.check(files, imagestore="/i", stores=["/a"])
        self.check(files, 0, {"STORAGE_DRIVER": "overlay2", "STORAGE_OPTS":
                              "overlay.additionalImageStore=/x,/y,overlay.mountopt=nodev"},
                   driver="overlay", imagestore="/i", stores=["/x", "/y"])
        self.check(files, 0, {"STORAGE_DRIVER": "vfs", "STORAGE_OPTS": "vfs.imagestore=/x"},
                   driver="vfs", imagestore="/i", stores=["/x"])

    def test_an_error_in_a_file_that_is_not_looked_at(self) -> None:
        files = {"etc/containers/storage.conf": "[storage\n",
                 "home/.config/containers/storage.conf": '[storage]\ngraphroot = "@/mine"\n'}
        self.assertRaises(cstor.FormatError, self.system, files, uid=1000)
        config = self.system(files, uid=1000, stores=["mine"])  # new: the user's file alone
        self.assertEqual(("mine", "new"), (self.where(config), config.scheme))
        config = self.system({"home/.config/containers/storage.conf": "[storage\n",
                              "etc/containers/storage.conf": '[storage]\ngraphroot = "@/etc"\n'},
                             stores=["etc"])  # old: root's own file is not looked at
        self.assertEqual(("etc", "old"), (self.where(config), config.scheme))

    OWN, SYSTEM, DATA = "home/.local/share/containers/storage", "system", "data"
    SYSTEM_FILE = {"etc/containers/storage.conf": '[storage]\ngraphroot = "@/system"\n'}

    def whole_system(self, files: Mapping[str, str], *stores: str, uid: int = 1000,
                     owned: Sequence[str] = (), env: Mapping[str, str] | None = None
                     ) -> str | tuple[str, str, list[str]]:
        """Return graph root, scheme and warnings in a new system, or the error.

        Root owns the stores, the user those that are in ``owned`` and his home.
        """
        shutil.rmtree(self.dir)
        os.mkdir(self.dir)
        for store in (*stores, *owned):
            os.makedirs(os.path.join(self.dir, store, "overlay-images"))
        real_stat = os.stat

        def as_owned(path: Any, **kwargs: Any) -> os.stat_result:  # as root or as a user
            status = real_stat(path, **kwargs)
            name = os.path.relpath(path, self.dir) if isinstance(path, str) else ""
            mine = any(name == top or name.startswith(top + "/") for top in (*owned, "home"))
            return os.stat_result((*status[:4], uid if mine else 0, *status[5:10]))

        with mock.patch("os.stat", as_owned):
            try:
                config = self.system(files, env, uid)
            except (cstor.CstorError, OSError) as error:
                return str(error).replace(self.dir, "@")
        return self.where(config), config.scheme, [
            fault.replace(self.dir, "@") for fault in config.faults]

    def test_which_store_a_rootless_user_gets(self) -> None:
        """Each row of the table: own store, other store, whose it is and who names it."""
        own, system, data = self.OWN, self.SYSTEM, self.DATA
        drop_in = {"home/.config/containers/storage.conf.d/1.conf":
                   '[storage]\ngraphroot = "@/data"\n'}
        roots = {"etc/containers/storage.conf.d/1.conf": '[storage]\ngraphroot = "@/system"\n'}
        passed = f"podman 4 and 5 would use @/{own} (the default)"
        for files in (self.SYSTEM_FILE, roots):
            self.assertEqual((own, "old", []), self.whole_system(files, system, owned=[own]))
            self.assertEqual((own, "old", []), self.whole_system(files, owned=[own, system]))
            self.assertEqual((own, "old", []), self.whole_system(files, owned=[own]))
            self.assertEqual((own, "old", []), self.whole_system(files, system))
            self.assertEqual((system, "new", []), self.whole_system(files, owned=[system]))
        self.assertEqual((own, "old", []), self.whole_system(self.SYSTEM_FILE))
        self.assertEqual((data, "new", [passed]), self.whole_system(drop_in, data, owned=[own]))
        missing = f"podman 6 would use @/data (@/{next(iter(drop_in))}): no storage there"
        self.assertEqual((own, "old", [missing]), self.whole_system(drop_in, owned=[own]))
        self.assertEqual((data, "new", []), self.whole_system(drop_in, data))
        # A store of another driver is one, too.
        self.assertEqual((own, "old", []), self.whole_system(
            {**self.SYSTEM_FILE, own + "/vfs-images/x": ""}, system))

    def test_a_store_that_nobody_may_look_into(self) -> None:
        """It never wins over the user's own, and his own, when it is closed, is named."""
        closed = self.dir + "/closed"
        real_stat = os.stat

        def refuse(path: Any, **kwargs: Any) -> os.stat_result:
            if isinstance(path, str) and path.startswith(closed + "/"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return real_stat(path, **kwargs)

        system = {"etc/containers/storage.conf": '[storage]\ngraphroot = "@/closed/system"\n'}
        mine = {"home/.config/containers/storage.conf": '[storage]\ngraphroot = "@/closed/x"\n'}
        with mock.patch("os.stat", refuse):
            config = self.system(system, uid=1000)
            self.assertEqual((self.OWN, "old", []),
                             (self.where(config), config.scheme, config.faults))
            self.assertIn(f"{closed}/system ({self.dir}/etc/containers/storage.conf) is another "
                          "user's; name a graph root", config.hint)
            self.assertEqual("closed/x", self.where(self.system(mine, uid=1000,
                                                                stores=[self.SYSTEM])))
            with self.assertRaises(PermissionError) as caught:
                self.system({}, {"HOME": closed + "/root"}, uid=1000)
            self.assertEqual(f"{closed}/root/.config/containers/storage.conf: Permission denied",
                             str(caught.exception))

    def test_which_store_root_gets(self) -> None:
        """Podman 6 alone reads ~/.config/containers/storage.conf and drop-ins for root."""
        mine = {"home/.config/containers/storage.conf": '[storage]\ngraphroot = "@/data"\n'}
        own, data = "var/lib/containers/storage", self.DATA
        name = "(@/home/.config/containers/storage.conf)"
        self.assertEqual((own, "old", [f"podman 6 would use @/data {name}"]),
                         self.whole_system(mine, own, data, uid=0))
        self.assertEqual((own, "old", [f"podman 6 would use @/data {name}: no storage there"]),
                         self.whole_system(mine, own, uid=0))
        self.assertEqual((data, "new", []), self.whole_system(mine, data, uid=0))
        self.assertEqual((data, "new", [
            "podman 4 and 5 would use @/system (@/etc/containers/storage.conf): no storage there"]),
            self.whole_system({**mine, **self.SYSTEM_FILE}, own, data, uid=0))
        self.assertEqual((data, "old", []), self.whole_system(
            mine, own, data, uid=0, env={"XDG_CONFIG_HOME": "@/home/.config"}))
        drop_in = {"etc/containers/storage.conf.d/1.conf": '[storage]\ngraphroot = "@/data"\n'}
        self.assertEqual((data, "new", [f"podman 4 and 5 would use @/{own} (the default)"]),
                         self.whole_system(drop_in, own, data, uid=0))

    def test_a_configuration_that_cannot_be_read(self) -> None:
        """No other store is taken in silence."""
        own = self.OWN
        bad = {"home/.config/containers/storage.conf": "\n[storage\n"}
        place = '@/home/.config/containers/storage.conf:2: expected ]'
        self.assertEqual(place, self.whole_system(bad, self.SYSTEM, owned=[own]))
        root = "var/lib/containers/storage"
        self.assertEqual((root, "old", [f"podman 6 cannot read the configuration: {place}"]),
                         self.whole_system(bad, root, uid=0))
        self.assertEqual(place, self.whole_system(bad, uid=0))
        etc = {"etc/containers/storage.conf": "[storage\n"}
        place = '@/etc/containers/storage.conf:1: expected ]'
        self.assertEqual(place, self.whole_system(etc, owned=[own]))
        self.assertEqual((own, "new", [f"podman 4 and 5 cannot read the configuration: {place}"]),
                         self.whole_system({**etc, "home/.config/containers/storage.conf": ""},
                                           owned=[own]))
        # What his own file names is not replaced by anything.
        self.assertEqual((self.DATA, "old", []), self.whole_system(
            {"home/.config/containers/storage.conf": '[storage]\ngraphroot = "@/data"\n'},
            self.SYSTEM, owned=[own]))
        self.assertEqual("environment variable CONTAINERS_GRAPHROOT: holds a NUL byte",
                         self.whole_system({}, env={"CONTAINERS_GRAPHROOT": "a\0b"}))

    def test_no_store_at_all(self) -> None:
        """The error names the place, and the hint where it was looked for."""
        env = {"HOME": self.dir, "XDG_CONFIG_HOME": "", "XDG_DATA_HOME": "",
               "CONTAINERS_STORAGE_CONF": self.dir + "/c.conf"}
        put(env["CONTAINERS_STORAGE_CONF"], f'[storage]\ngraphroot = "{self.dir}/none"\n')
        done = self.run_cstor("image", "list", status=3, env=env)
        self.assertEqual(f"cstor: error: no storage at {self.dir}/none ({self.dir}/c.conf names "
                         "it; name a graph root with --root DIR)\n", done.err)
        hint = self.system(self.SYSTEM_FILE, uid=1000).hint
        self.assertEqual(f"the default for HOME={self.dir}/home; looked also at {self.dir}/system "
                         f"({self.dir}/etc/containers/storage.conf); name a "
                         "graph root with --root DIR", hint)
        hint = self.system({}, {"XDG_DATA_HOME": "@/data"}, 1000).hint
        self.assertIn(f"the default for XDG_DATA_HOME={self.dir}/data; ", hint)

    def test_relative_paths(self) -> None:
        """The current directory must not choose the store; podman refuses such paths, too."""
        for key, value in (("graphroot", "g"), ("runroot", "~/r"), ("graphroot", "${NONE}g"),
                           ("rootless_storage_path", "./g")):
            with self.assertRaises(cstor.FormatError) as caught:
                self.system({"etc/containers/storage.conf": f'[storage]\n{key} = "{value}"\n'},
                            uid=1000 if "less" in key else 0)
            self.assertEqual(f"{self.dir}/etc/containers/storage.conf: {key} is not an absolute "
                             f"path: {value.replace('${NONE}', '')}", str(caught.exception))

    def test_the_store_of_who_called_sudo(self) -> None:
        home = self.dir + "/ann"
        os.makedirs(home + "/.local/share/containers/storage/overlay-images")
        entry = pwd.struct_passwd(("ann", "x", 1000, 1000, "", home, "/bin/sh"))
        with mock.patch("pwd.getpwnam", return_value=entry):
            place = home + "/.local/share/containers/storage"
            self.assertEqual(f"the default; ann's storage is at {place}: run it without "
                             f"sudo, or use --root {place}; name a graph root with --root DIR",
                             self.system({}, {"SUDO_USER": "ann"}).hint)
            shutil.rmtree(place)
            self.assertEqual("the default; name a graph root with --root DIR",
                             self.system({}, {"SUDO_USER": "ann"}).hint)

    def test_expansion(self) -> None:
        os.makedirs(self.dir + "/real/1000-ann")
        os.symlink("real", self.dir + "/link")
        config = self.system({"home/.config/containers/storage.conf": textwrap.dedent("""\
            [storage]
            graphroot = "@/link/$UID-$USER"
            runroot = "${HOME}/$NOTHING/run"
            """)}, {"USER": "ann"}, 1000)
        self.assertEqual(("real/1000-ann", self.dir + "/home//run"),
                         (self.where(config), config.runroot))

    def test_command_line_uses_it(self) -> None:
        store = self.sample()
        conf = self.dir + "/storage.conf"
        put(conf, f'[storage]\ndriver = "overlay"\ngraphroot = "{store.root}"\n')
        done = self.run_cstor("store", "info", "--format", "json",
                              env={"CONTAINERS_STORAGE_CONF": conf})
        info = done.json
        self.assertEqual((store.root, [conf], 2), (info["graph-root"], info["configuration"],
                                                   info["images"]))
        env = {"CONTAINERS_STORAGE_CONF": conf, "STORAGE_DRIVER": "zfs"}
        done = self.run_cstor("image", "list", status=6, env=env)
        self.assertIn("storage driver zfs is not supported: only overlay and vfs are read",
                      done.err)
        self.assertEqual("", self.run_cstor("--driver=overlay", "image", "list", env=env).err)

    def test_other_drivers_and_nothing(self) -> None:
        for name in ("zfs", "btrfs-layers"):
            root = os.path.join(self.dir, name + "-store")
            os.makedirs(os.path.join(root, name))
            with self.assertRaisesRegex(cstor.Unsupported, name.partition("-")[0]):
                cstor.Storage.open(root)
        os.makedirs(self.dir + "/new/vfs")
        with cstor.Storage.open(self.dir + "/new") as storage:
            self.assertEqual(("vfs", ()), (storage.driver, storage.images()))
        with self.assertRaisesRegex(ValueError, "driver must be overlay or vfs, not zfs"):
            cstor.Storage.open(self.dir, driver="zfs")

    def test_stores_of_two_drivers(self) -> None:
        """podman's database says which one is read, or else the configuration, or --driver."""
        store = self.sample()
        second = StoreBuilder(store.root, "vfs")
        conf = {"CONTAINERS_STORAGE_CONF": self.dir + "/storage.conf"}
        put(conf["CONTAINERS_STORAGE_CONF"], f'[storage]\ngraphroot = "{store.root}"\n')

        def names(*words: str, status: int = 0, **env: str) -> tuple[list[str], str]:
            done = self.run_cstor(*words, "image", "list", "--format=json", status=status,
                                  env={**conf, **env})
            return [] if status else [image["names"][0] for image in done.json], done.err

        own, others = ["localhost/of-vfs:latest"], [image["names"][0] for image in store.images]
        root = ("--root", store.root)
        # A driver that has no records does not count, unless it is asked for.
        self.assertEqual((others, ""), names(*root))
        self.assertEqual((others, ""), names(STORAGE_DRIVER="overlay"))
        self.assertEqual(([], ""), names("--driver=vfs", *root))
        second.image(second.layer(make_tar(("f", b"1"))), "localhost/of-vfs:latest")
        second.save()
        both = (f"cstor: error: {store.root} contains several valid graphdrivers: overlay, vfs "
                "(choose one: --driver overlay or --driver vfs)\n")
        self.assertEqual(([], both), names(*root, status=3))
        self.assertEqual(([], both), names(status=3))
        read = (f"cstor: warning: {store.root} holds overlay and vfs stores: %s is read, as %s "
                "names it (--driver %s reads the other)\n")
        self.assertEqual((own, read % ("vfs", "the configuration", "overlay")),
                         names(STORAGE_DRIVER="vfs"))
        self.assertEqual((own, ""), names("--driver", "vfs", *root))
        self.assertEqual((others, ""), names("--driver=overlay", STORAGE_DRIVER="vfs"))
        with contextlib.closing(make_database(store.root)):
            self.assertEqual((others, read % ("overlay", "podman's database", "vfs")),
                             names(STORAGE_DRIVER="vfs"))
            self.assertEqual((others, read % ("overlay", "podman's database", "vfs")), names(*root))
            self.assertEqual((own, ""), names("--driver=vfs", STORAGE_DRIVER="overlay"))
        for driver in (None, "overlay", "vfs"):
            with self.open(store, driver=driver or "overlay") as storage:
                self.assertEqual(driver or "overlay", storage.driver)

    def test_another_driver_than_the_configured_one(self) -> None:
        store = make_sample(self.dir + "/store", "vfs")
        conf = self.dir + "/storage.conf"
        put(conf, f'[storage]\ndriver = "overlay"\ngraphroot = "{store.root}"\n')
        info = self.run_cstor("store", "info", "--format=json",
                              env={"CONTAINERS_STORAGE_CONF": conf}).json
        self.assertEqual(("vfs", 2), (info["driver"], info["images"]))
        self.assertIn(f"{store.root} holds no overlay store, which the configuration names: vfs is "
                      "read", info["faults"])
        missing = f"no overlay store at {store.root}: it holds vfs"
        self.assertIn(missing, self.run_on(store, "--driver overlay image list", status=3).err)
        with self.assertRaisesRegex(cstor.NotFound, missing):
            cstor.Storage.open(store.root, driver="overlay")
        self.assertRaises(cstor.NotFound, cstor.Storage.open, self.dir + "/missing")
        self.assertRaises(cstor.NotFound, cstor.Storage.open, self.dir)

    def test_a_root_beside_the_right_one(self) -> None:
        store = make_sample(self.dir + "/disk/var/lib/containers/storage")
        home = self.dir + "/disk/home/ann"
        theirs = StoreBuilder(home + "/.local/share/containers/storage").save()
        for name in ("var/lib/docker/image/overlay2", "var/lib/docker/containers",
                     "var/lib/docker/overlay/x", "srv/docker/image", "srv/docker/containers"):
            os.makedirs(os.path.join(self.dir, "disk", name))
        both = f"use --root {store.root} or --root {theirs.root}"
        use, user = f"use --root {store.root}", f"use --root {theirs.root}"
        docker, save = "is Docker's, which is not containers/storage", \
            "`docker save` writes archives that `podman load` reads"
        none, missing = "no containers/storage store at", "no storage at"
        name_one = "name a graph root, the directory that holds overlay-images, with --root DIR"
        for name, status, message, hint in (
                ("", 3, none, both), ("var", 3, none, use), ("var/lib", 3, none, use),
                ("var/lib/containers", 3, none, use),
                ("var/lib/containers/storage/overlay", 3, none, use),
                ("var/lib/containers/storage/overlay/l", 3, none, use),
                ("var/lib/containers/storage/overlay-images", 3, none, use),
                ("var/lib/containers/storage/overlay-images/images.json", 3, missing, use),
                ("var/lib/containers/storage/volumes", 3, missing, use),
                ("var/lib/docker", 6, docker, use), ("srv/docker", 6, docker, save),
                ("srv/docker/image", 6, docker, save), ("home", 3, none, user),
                ("home/ann", 3, none, user), ("home/ann/.local/share", 3, none, user),
                ("srv", 3, none, name_one), ("none", 3, missing, name_one)):
            root = os.path.join(self.dir, "disk", name).rstrip("/")
            text = f"{root} {message}" if status == 6 else f"{message} {root}"
            self.assertEqual((status, "", f"cstor: error: {text} ({hint})\n"),
                             self.call("--root", root, "image", "list"))
        done = self.run_on(store, "--store", home, "image", "list", status=3)
        self.assertIn(f"({user.replace('--root', '--store')})", done.err)

    def test_a_split_store_without_its_imagestore(self) -> None:
        store = self.sample()
        split = self.dir + "/images"
        layer = store.images[0]["layer"]
        for name in ("overlay", "overlay-images", "overlay-layers"):
            os.makedirs(os.path.join(split, name))
        os.rename(store.path("overlay"), split + "/overlay")
        os.mkdir(store.path("overlay"))
        for name in ("overlay-images", "overlay-layers/layers.json"):
            os.rename(store.path(name), os.path.join(split, name))
        done = self.run_on(store, "image list")
        self.assertEqual(f"cstor: warning: 3 layers without files below {store.root}: "
                         f"images may be in an imagestore: use --imagestore {split}\n", done.err)
        done = self.run_on(store, "image inspect app", status=3)
        self.assertEqual("cstor: error: image not known: app (images may be in an imagestore: use "
                         f"--imagestore {split})\n", done.err)
        done = self.run_cstor("--root", split, "layer", "export", layer, "-o", self.dir + "/x.tar",
                              status=6)
        self.assertIn(f"use --root {store.root} --imagestore {split})", done.err)
        done = self.run_on(store, "--imagestore", split, "image", "list")
        self.assertEqual(b"", done.stderr)

    def test_layers_of_an_additional_layer_store(self) -> None:
        """Their files are looked into where the configuration names the store, else it says so."""
        store = self.builder()
        base = store.layer(make_tar(("a/", None), ("a/f", b"one")))
        top = store.layer(make_tar(("g", b"two")), base)
        image = store.image(top, "localhost/als:1")
        als = self.dir + "/als/sha256:x"
        for number, layer in enumerate((base, top)):
            place = f"{als}{number}"
            os.makedirs(place)
            os.rename(store.path("overlay", layer, "diff"), place + "/diff")
            os.symlink(place + "/diff", store.path("overlay", layer, "diff"))
            store.write(f"overlay/{layer}/additionallayer", place)
            os.unlink(store.path(f"overlay-layers/{layer}.tar-split.gz"))
        store.write(f"overlay/{top}/lower-layers", base)
        store.save()
        conf = self.dir + "/c.conf"
        env = {"CONTAINERS_STORAGE_CONF": conf}
        for layers, names in ((store.layers, [f"{self.dir}/als"]),
                              ([], ["/x", f"{self.dir}/als:ref"])):
            # containers/storage 1.58 and later write no records of such layers.
            store.layers = layers
            store.save()
            put(conf, f'[storage]\ngraphroot = "{store.root}"\n[storage.options]\n'
                f"additionallayerstores = {json.dumps(names)}\n")
            self.guard(store.root)
            info = json.loads(self.call("store", "info", "--format", "json", env=env)[1])
            self.assertEqual(([], names), (info["faults"], info["additional-layer-stores"]))
            target = f"{self.dir}/root{len(layers)}"
            for words, printed in ((("image", "files", "als:1"), "/\n/a\n/a/f\n/g\n"),
                                   (("layer", "files", top), "/\n/g\n"),
                                   (("-q", "image", "extract", "als:1", target), ""),
                                   (("image", "cp", "als:1:/a", target + "/copy"), "")):
                self.assertEqual((0, printed), self.call(*words, env=env)[:2])
            self.assertEqual(b"onetwo", self.run_cstor("image", "cat", "als:1", "a/f", "g",
                                                       env=env).stdout)
            self.assertEqual(["a", "copy", "g"], sorted(os.listdir(target)))
            self.assertEqual(["f"], os.listdir(target + "/copy"))
            none = (f"layer {top} has no tar-split data: it comes from an additional layer store; "
                    "its tar cannot be rebuilt")
            closed = (f"layer {base}: its files are in an additional layer store that is not "
                      f"configured: {als}0 (additionallayerstores in storage.conf names it, "
                      "without --root)")
            for message, call in ((none, ("layer", "export", top, "-o", target + ".tar")),
                                  (closed, ("-r", store.root, "image", "files", image))):
                self.assertEqual((6, "", f"cstor: error: {message}\n"), self.call(*call, env=env))
        # No other place of the host is opened, whatever the storage says.
        for place in (f"{self.dir}/other", f"{self.dir}/als/../other", f"{self.dir}/als2/x"):
            os.makedirs(place + "/diff", exist_ok=True)
            store.write(f"overlay/{base}/additionallayer", place)
            self.guard(store.root)
            status, _, err = self.call("image", "files", image, env=env)
            self.assertEqual(6, status)
            self.assertIn("other/diff: No such file" if ".." in place
                          else "that is not configured", err)

    def test_what_podman_recorded(self) -> None:
        """The configured graph root stays; the run root is podman's, but not that of a copy."""
        store = self.sample()
        run = StoreBuilder(self.dir + "/run")
        run.write("overlay-containers/volatile-containers.json", json.dumps(
            [{"id": "c" * 64, "names": ["volatile"], "image": "", "layer": store.layers[0]["id"]}]))
        database = make_database(store.root, graphroot=store.root, runroot=run.root)
        self.addCleanup(database.close)
        env = {"CONTAINERS_GRAPHROOT": store.root, "CONTAINERS_RUNROOT": "/nonexistent"}
        for recorded, used, count in ((store.root, run.root, 2), ("/elsewhere", "/nonexistent", 1)):
            database.execute("UPDATE DBConfig SET GraphRoot = ?", (recorded,))
            database.commit()
            done = self.run_cstor("store", "info", "--format", "json", env=env)
            info = done.json
            self.assertEqual((store.root, used, count, [], recorded, b""), (
                info["graph-root"], info["run-root"], info["containers"], info["faults"],
                info["podman-database"]["GraphRoot"], done.stderr))

    def test_additional_stores_without_a_store_of_ones_own(self) -> None:
        store = self.sample()
        config = {"etc/containers/storage.conf":
                  '[storage]\ngraphroot="@/none"\n[Storage.Options]\n'
                  'AdditionalImageStores=["@/store"]\n'}
        found = self.system(config)
        self.assertEqual([store.root], found.stores)
        with cstor.Storage.open(found.graphroot, stores=found.stores) as storage:
            self.assertEqual((2, 4, 0), (len(storage.images()), len(storage.layers()),
                                         len(storage.containers())))
            self.assertEqual([f"no storage at {self.dir}/none"], storage.faults)
            layer = storage.image("sample").layers()[0]
            self.assertEqual(store.tars[layer.id], self.export(layer))


# ================================================================================================
# 7. Records
# ================================================================================================

class Records(StoreTest):
    def test_big_data_file_names(self) -> None:
        for key, name in (("manifest", "manifest"), ("A", "A"), ("aB", "aB"), ("a-", "a-"),
                          ("é", "é"), ("xé", "xé"), ("éx", "=w6l4"), ("UP", "=VVA="), ("x/", "x"),
                          ("foo.bar", "foo.bar"), ("with space", "=d2l0aCBzcGFjZQ=="),
                          ("foo/bar", "=Zm9vL2Jhcg=="), ("a\n", "a\n"), ("a\nb", "=YQpi")):
            self.assertEqual(name.encode(), cstor.big_data_file(key), key)
        for key in ("", ".", "..", "/", "\u00fe\u00ff??" + chr(0xfff) * 3, "a\0"):
            if b"/" in base64.b64encode(key.encode()) or len(key) < 3:
                self.assertRaises(cstor.FormatError, cstor.big_data_file, key)

    def test_times(self) -> None:
        for text, ns in (("1970-01-01T00:00:00Z", 0), ("0001-01-01T00:00:00Z", None),
                         ("2026-11-22T01:09:19.984349169Z", 1795309759984349169),
                         ("2024-02-29T23:59:59.5+02:00", 1709243999500000000),
                         ("1969-12-31T23:59:59.1Z", -900000000),
                         ("2000-03-01T00:00:00-00:30", 951870600000000000)):
            self.assertEqual(ns, cstor.parse_time(text), text)
        for text in ("", "yesterday", "2026-11-22", "2026-11-22T01:09:19"):
            self.assertRaises(cstor.FormatError, cstor.parse_time, text)

    def test_missing_and_empty_files_are_empty_lists(self) -> None:
        for content in (None, "", " \n", "null", "[]"):
            store = StoreBuilder(os.path.join(self.dir, f"store-{content!r}".replace("/", "")))
            for kind in KINDS if content is not None else ():
                store.write(f"overlay-{kind}/{kind}.json", content or "")
            with self.open(store) as storage:
                self.assertEqual(((), (), ()), (storage.images(), storage.layers(),
                                                storage.containers()))

    def test_damaged_files_are_named(self) -> None:
        store = self.builder()
        for data in (b"[", b"{}", b"[1,]", b"\xff\xfe", b'[{"id":1e999999}', b"[" * 100_000,
                     b"[" + b"9" * 5000 + b"]x"):
            path = store.write("overlay-layers/layers.json", data)
            with self.open(store) as storage, self.assertRaises(cstor.FormatError) as caught:
                storage.layers()
            self.assertEqual(path, caught.exception.file)

    def test_fields(self) -> None:
        store = self.builder()
        record: dict[str, Any] = {
            "names": ["n"], "compressed-diff-digest": "sha256:" + "0" * 64, "compressed-size": 7,
            "compression": 2, "uidset": [0, 5], "gidset": [0], "toc-digest": "sha256:1",
            "mountlabel": "l", "metadata": "m", "something-new": {"a": 1}}
        layer = store.layer(make_tar(("f", b"x")), **record)
        record = {"names-history": ["old"], "mapped-layers": [layer]}
        image = store.image(layer, "localhost/a:b", **record)
        store.save()
        with self.open(store) as storage:
            found = storage.layer(layer)
            self.assertEqual((["n"], "gzip", [0, 5], "sha256:1", "m", {"a": 1}),
                             (found.names, found.compression, found.record["uidset"],
                              found.toc_digest, found.metadata, found.record["something-new"]))
            self.assertEqual([], found.faults)
            taken = storage.image(image)
            self.assertEqual((["old"], [layer], layer, []),
                             (taken.names_history, taken.mapped_layers, taken.layer, taken.faults))
            self.assertEqual(1767315845500000000, taken.created_ns)
            self.assertEqual(cstor.parse_time("2026-01-02T01:04:05.5Z"), taken.created_ns)

    def test_names_of_fields_match_whatever_their_case(self) -> None:
        store, (layer,) = self.stack(make_tar(("f", b"x")))
        store.layers[0] = {key.upper(): value for key, value in store.layers[0].items()}
        with self.open(store.save()) as storage:
            self.assertEqual(store.tars[layer], self.export(storage.layer(layer)))

    def test_sizes_that_are_absent_or_unknown(self) -> None:
        store = self.builder()
        empty = store.layer(b"")
        odd = store.layer(make_tar(("f", b"x")), empty, **{"diff-size": -1})
        toc = store.layer(make_tar(("g", b"x")), empty)
        del store.layers[2]["diff-digest"], store.layers[2]["diff-size"]
        store.save()
        with self.open(store) as storage:
            self.assertEqual([0, -1, -1], [storage.layer(i).diff_size for i in (empty, odd, toc)])
            for layer in (empty, odd, toc):
                self.assertEqual(store.tars[layer], self.export(storage.layer(layer)))

    def test_one_broken_record_hides_no_other(self) -> None:
        store = self.sample()
        good = store.layers[0]["id"]
        bad_layers: list[Any] = [
            17, {}, {"id": "../../evil"}, {"id": ["x"]}, {"id": "1" * 64, "parent": "2" * 64},
            {"id": "3" * 64, "parent": "3" * 64}, {"id": "4" * 64, "flags": {"incomplete": True}},
            {"id": "5" * 64, "parent": "4" * 64}, {"id": "6" * 64, "created": 5, "names": "x"},
            {"id": "7" * 64, "parent": "8" * 64}, {"id": "8" * 64, "parent": "7" * 64},
            {"id": "esc\x1b[31m"}]
        bad_images: list[Any] = [
            None, {"id": "a" * 64},
            {"id": "b" * 64, "layer": "9" * 64, "big-data-names": ["manifest"]},
            {"id": "c" * 64, "layer": "5" * 64, "names": [3]},
            {"id": "d" * 64, "layer": good, "big-data-names": ["manifest"]}]
        store.layers += bad_layers
        store.images += bad_images
        store.save()
        loop = "its chain of parents is a loop or longer than 500"
        with self.open(store) as storage:
            faults = {layer.id or i: [fault for fault in layer.faults if "overlay/" not in fault]
                      for i, layer in enumerate(storage.layers())}
            self.assertEqual({4: ["the record is not a JSON object", 'unusable ID ""'],
                              5: ['unusable ID ""'], "../../evil": ['unusable ID "../../evil"'],
                              7: ['field "id" must be of type str', 'unusable ID ""'],
                              "1" * 64: [f"layer not known: {'2' * 64} (parent of {'1' * 64})"],
                              "3" * 64: [loop],
                              "4" * 64: ["incomplete: its creation or removal has not finished"],
                              "5" * 64: [f"parent {'4' * 64} is incomplete"],
                              "6" * 64: ['field "names" must be of type list',
                                         'field "created" must be of type str'], "7" * 64: [loop],
                              "8" * 64: [loop], "esc\x1b[31m": ['unusable ID "esc\\x1b[31m"']},
                             {key: value for key, value in faults.items() if value})
            self.assertEqual(16, len(storage.layers()))
            images = {image.id: image.faults for image in storage.images()}
            self.assertEqual(["no manifest", "no layer"], images["a" * 64])
            self.assertEqual([f"layer not known: {'9' * 64}"], images["b" * 64])
            self.assertEqual(['field "names" holds more than strings', "no manifest", *(
                f"layer {'5' * 64}: {fault}" for fault in (
                    f"overlay/{'5' * 64}/diff is missing", f"overlay/{'5' * 64}/link is missing",
                    f"parent {'4' * 64} is incomplete"))], images["c" * 64])
            self.assertEqual(7, len(storage.images()))
            self.assertRaises(cstor.FormatError, storage.image("d" * 64).manifest)
            self.assertRaises(cstor.FormatError, self.export, storage.layer("../../evil"))
            self.assertEqual(store.tars[good], self.export(storage.layer(good)))
        listed = self.run_on(store, "layer list --format json")
        self.assertEqual(16, len(json.loads(listed.stdout)))
        table = self.run_on(store, "layer list").stdout
        self.assertNotIn(b"\x1b", table)

    def test_a_malformed_file_is_read_once(self) -> None:
        store = self.sample()
        store.write("overlay-layers/layers.json", "{")
        with self.open(store) as storage, \
                mock.patch.object(cstor, "parse_json", side_effect=cstor.parse_json) as parse:
            for image in storage.images():
                self.assertRegex("; ".join(image.faults), "layers.json at offset 1: malformed")
            self.assertEqual(1, sum("layers.json" in call[0][1] for call in parse.call_args_list))

    def faults(self, store: StoreBuilder) -> tuple[list[str], list[str]]:
        listed, info = (json.loads(self.run_cstor(
            "--root", store.root, *words, "--format", "json").stdout)
            for words in (["image", "list", "-a"], ["store", "info"]))
        return [fault for image in listed for fault in image["faults"]], info["faults"]

    def test_lost_and_emptied_files_are_faults(self) -> None:
        def make(name: str) -> tuple[StoreBuilder, list[str]]:
            store = StoreBuilder(os.path.join(self.dir, name))
            base = store.layer(make_tar(("a/", None), ("a/f", b"x")))
            top = store.layer(make_tar(("b", b"y")), base)
            image = store.image(top, "localhost/app:1")
            store.container(image, store.layer(None, top, id="8" * 64), "c1")
            store.layer(make_tar(("./", None)), top)  # "diff" is empty by right
            store.layer(b"", top)
            store.layer(make_tar(("b", b"y")), base, id="7" * 64, uidmap=[
                {"container_id": 0, "host_id": 5, "size": 9}])
            shutil.rmtree(store.path("overlay", "7" * 64, "diff"))
            os.mkdir(store.path("overlay", "7" * 64, "diff"))
            return store.save(), [base, top, image, store.layers[2]["id"]]

        store, (base, top, image, own) = make("sound")
        self.assertEqual(([], []), self.faults(store))
        split = "overlay-layers/{}.tar-split.gz"
        for number, (damage, path, words) in enumerate((
                ("lose", split.format(top), "missing"), ("empty", split.format(base), "empty"),
                ("lose", f"overlay/{base}/diff", "missing"), ("clear", f"overlay/{top}/diff",
                                                              "empty"),
                ("empty", f"overlay/{top}/link", "empty"), ("lose", f"overlay/{own}/link",
                                                            "missing"))):
            store, _ = make(str(number))
            place = store.path(path)
            if damage == "empty":
                put(place)
            elif os.path.isdir(place):
                shutil.rmtree(place)
            else:
                os.unlink(place)
            if damage == "clear":
                os.mkdir(place)
            fault = f"layer {re.findall('[0-9a-f]{64}', path)[0]}: {path} is {words}"
            of_image, of_store = self.faults(store)
            self.assertEqual([fault] * (own not in path), of_image)
            self.assertEqual([fault] + [f"container {store.containers[0]['id']}: "
                                        + fault.partition(": ")[2]] * (own in path), of_store)

    def test_store_info_of_any_store(self) -> None:
        store = self.sample()
        image = store.images[1]["id"]
        os.unlink(store.path("overlay-images", image, "manifest"))
        missing = 'big data item "manifest" is recorded, but missing'
        self.assertEqual(([missing], [f"image {image}: {missing}"]), self.faults(store))
        store.write("overlay-images/images.json", bytes(5000))
        store.write("overlay-layers/layers.json", "{")
        for name in ("d" * 64, "no-layer"):
            os.mkdir(store.path("overlay", name))
        info = self.run_on(store, "store info --format json").json
        images, layers = (store.path(f"overlay-{word}/{word}.json at offset {at}: malformed JSON: ")
                          for word, at in (("images", 0), ("layers", 1)))
        self.assertEqual((None, None, 1), (info["images"], info["layers"], info["containers"]))
        self.assertEqual([layers + "Expecting property name enclosed in double quotes",
                          images + "Expecting value"], info["faults"][:2])
        table = self.run_on(store, "store info").out
        self.assertIn(f"fault                    {images}Expecting value\n", table)
        self.assertIn("images                   unknown\n", table)
        self.run_on(store, "image list", status=6)
        # Lost records are noticed, whole ones are not blamed.
        store.save()
        os.unlink(store.path("overlay-images/images.json"))
        os.mkdir(store.path("overlay", "e" * 64))
        strays = sorted(store.path("overlay-images", entry["id"]) + " has no record"
                        for entry in store.images)
        done = self.run_on(store, "image list")
        self.assertEqual(strays, [line[len("cstor: warning: "):] for line in done.err.splitlines()])
        found = self.faults(store)[1]
        self.assertEqual([store.path("overlay", name * 64) + " has no record" for name in "de"]
                         + strays, [fault for fault in found if fault.endswith(" has no record")])

    def test_long_chains_and_many_layers(self) -> None:
        store = self.builder()
        ids = [f"{i:064x}" for i in range(40_000)]
        store.layers = [{"id": layer, "parent": below} for layer, below in zip(ids, ["", *ids])]
        store.save()
        with self.open(store) as storage:
            self.assertEqual(501, len(storage.chain(ids[500])))
            self.assertRaises(cstor.FormatError, storage.chain, ids[501])
            self.assertEqual(40_000, len(storage.layers()))

    def test_manifests(self) -> None:
        store = self.builder()
        base = store.layer(make_tar(("f", b"x")))
        top = store.layer(make_tar(("g", b"x")), base)
        history: list[dict[str, Any]] = [
            {"created_by": "one"}, {"created_by": "none", "empty_layer": True},
            {"created_by": "two", "comment": "c"}]
        oci = store.image(top, "localhost/oci:1", history=history)
        compat = [{"id": "2", "created": "2026-01-01T00:00:00Z", "architecture": "arm64",
                   "os": "linux", "container_config": {"Cmd": ["RUN", "two"]},
                   "config": {"Env": ["A=B"]}},
                  {"id": "1", "throwaway": True}, {"id": "0", "container_config": {"Cmd": ["one"]}}]
        schema1: dict[str, Any] = {"id": "1" * 64, "layer": top, "names": ["localhost/s1:1"]}
        manifest = {"schemaVersion": 1, "signatures": [{}], "history": [
            {"v1Compatibility": json.dumps(entry)} for entry in compat]}
        store.big_data(schema1, "manifest", json.dumps(manifest).encode())
        schema1["big-data-digests"]["manifest"] = "sha256:" + "f" * 64  # without the signatures
        index: dict[str, Any] = {"id": "2" * 64, "names": ["localhost/list:1"]}
        store.big_data(index, "manifest", json.dumps({"mediaType": cstor.OCI_INDEX, "manifests": []}
                                                     ).encode())
        store.images += [schema1, index]
        store.save()
        with self.open(store) as storage:
            image = storage.image(oci)
            self.assertEqual([("one", base), ("none", None), ("two", top)],
                             [(row["created_by"], row.get("layer")) for row in image.history()])
            self.assertEqual(
                len(store.tars[base]) + len(store.tars[top])
                + sum(image.record["big-data-sizes"].values()), image.size)
            old = storage.image("1" * 64)
            config = old.config()
            self.assertEqual(
                (["A=B"], "arm64", [sha256(store.tars[base]), sha256(store.tars[top])]),
                (config["config"]["Env"], config["architecture"], config["rootfs"]["diff_ids"]))
            self.assertEqual(
                [("one", base), ("", None), ("RUN two", top)],
                [(row.get("created_by", ""), row.get("layer")) for row in old.history()])
            self.assertEqual([], storage.image("2" * 64).faults)
            self.assertTrue(storage.image("2" * 64).is_list)
            self.assertRaises(cstor.Unsupported, storage.image("2" * 64).single)
            self.assertRaises(cstor.Unsupported, storage.image("2" * 64).config)
        shown = self.run_on(store, "image inspect list:1 oci:1").json
        self.assertEqual((None, [base, top]), (shown[0]["config"], shown[1]["layers"]))

    def test_history_is_aligned_from_the_top(self) -> None:
        store = self.builder()
        layers: list[str] = []
        for name in "abc":
            layers.append(store.layer(make_tar((name, b"x")), layers[-1] if layers else ""))
        made, empty = {"created_by": "made"}, {"created_by": "none", "empty_layer": True}
        steps: list[tuple[list[dict[str, Any]], list[tuple[Any, Any]], str]] = [
            ([empty, made], [(layers[0], None), (layers[1], None), (None, "none"),
                             (layers[2], "made")],
             "the history has no step for the 2 lowest layers"),
            ([made, empty, {"created_by": "top"}, empty],
             [(layers[0], None), (layers[1], "made"), (None, "none"), (layers[2], "top"),
              (None, "none")], "the history has no step for the 1 lowest layer"),
            ([made] * 3, [(layer, "made") for layer in layers], ""),
            ([made] * 4, [(None, "made")] * 4 + [(layer, None) for layer in layers],
             "the history has more steps than layers: the step of each layer is unknown"),
            ([empty], [*[(layer, None) for layer in layers], (None, "none")],
             "the history has no step for the 3 lowest layers")]
        for number, (history, _, _) in enumerate(steps):
            store.image(layers[2], f"localhost/{number}:1", history=history)
        store.save()
        for number, (_, rows, told) in enumerate(steps):
            with self.subTest(number), cstor.Storage.open(store.root) as storage:
                self.assertEqual(rows, [(row.get("layer"), row.get("created_by")) for row in
                                        storage.image(f"{number}:1").history()])
                for words in (["history"], ["blame", "--format=json"]):
                    done = self.run_on(store, "image", words[0], f"{number}:1", *words[1:])
                    self.assertEqual(f"cstor: note: {told}\n" if told else "", done.err)
                self.assertEqual({layer: step or "" for layer, step in rows if layer},
                                 {row["layer"]: row["created-by"] for row in done.json})
        shown = self.run_cstor("-q", "--root", store.root, "image", "history", "3:1")
        self.assertEqual((b"", 4), (shown.stderr, shown.stdout.count(b"<unknown>")))
        self.assertRegex(shown.stdout.decode(), r"<unknown> +made +unknown\n")

    def test_manifest_lists_stand_for_the_instance_of_this_machine(self) -> None:
        store = self.builder()
        layer = store.layer(make_tar(("f", b"x")))
        ids = {arch: store.image(layer, f"localhost/{arch}:1", id=ident * 64)
               for arch, ident in (("amd64", "3"), ("arm64", "4"), ("s390x", "5"))}
        entries = [{"digest": sha256(arch.encode()),
                    "platform": {"os": "linux", "architecture": arch}} for arch in ids]
        for image, entry in zip(store.images, entries):
            image["digest"] = entry["digest"]
        index = {"id": "e" * 64, "names": ["localhost/list:1"]}
        store.big_data(index, "manifest", json.dumps({"manifests": [*entries, 5, {"digest": []}]}
                                                     ).encode())
        store.images.append(index)
        store.save()
        here = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
        with self.open(store) as storage:
            found = storage.image("list:1")
            self.assertEqual({f"linux/{arch}": image for arch, image in ids.items()},
                             {platform: image.id for platform, image in found.instances()})
            if here in ids:
                self.assertEqual(ids[here], found.single().id)
            self.assertEqual([], found.faults)
        with mock.patch("os.uname", lambda: mock.Mock(machine="riscv64")), \
                cstor.Storage.open(store.root) as storage, \
                self.assertRaises(cstor.Unsupported) as caught:
            storage.image("list:1").single()
        self.assertRegex(caught.exception.hint, r"4{12} \(linux/arm64\)")
        listed = self.run_on(store, "image list").out
        self.assertRegex(listed, r"localhost/list +1 +e{12} .* list\n")

    def test_big_data_is_checked(self) -> None:
        store, (layer,) = self.stack(make_tar(("f", b"x")))
        image = store.image(layer, "localhost/a:1", history=[{"signatures": "amd64"}])
        store.save()
        key = store.images[0]["big-data-names"][0]
        path = store.path("overlay-images", image, os.fsdecode(cstor.big_data_file(key)))
        data = read_bytes(path)
        for damaged in (data[:-1], data[:-2] + b"!}", data.replace(b"amd64", b"arm64")):
            put(path, damaged)
            with self.open(store) as storage:
                self.assertRaises(cstor.IntegrityError, storage.image("a:1").config)

    def test_values_of_any_type(self) -> None:
        store = self.builder()
        layer = store.layer(make_tar(("f", b"x")))
        store.layers[0]["diff-size"] = 10**400
        odd: list[Any] = [5, {"layer": 5, "size": "x", "empty_layer": True}, None,
                          {"created": 7, "created_by": ["x"], "comment": {}}]
        store.image(layer, "localhost/odd:1", history=odd)
        store.images[0]["big-data-sizes"] = {"a": int("9" * 4000), "b": -1}
        store.image(layer, "localhost/number:1", id="d" * 64)
        manifest = json.dumps({"schemaVersion": 1, "history": 5}).encode()
        store.big_data(store.images[1], "manifest", manifest)
        store.container("0" * 64, layer, "c", metadata='{"image-name":5,"pod-name":[]}')
        store.save()
        for form in ("json", "table"):
            for words in ("image list", "layer list", "container list", "image history odd:1",
                          "image inspect odd:1 number:1", "image layers odd:1"):
                self.run_on(store, *words.split(), "--format", form)
            self.run_on(store, "image history number:1 --format", form, status=6)
        with self.open(store) as storage:
            self.assertEqual(['field "diff-size" must be of type int'], storage.layers()[0].faults)
            rows = storage.image("odd:1").history()
            self.assertEqual([layer], [row["layer"] for row in rows if "layer" in row])

    def test_ids_of_any_letters_in_any_locale(self) -> None:
        store = self.builder()
        store.layer(make_tar(("f", b"x")), id="\u6f22\u5b57")
        store.save()
        env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = self.run_on(store, "layer list", env=env)
        self.assertIn(b"\\u6f22", done.stdout)

    def test_links(self) -> None:
        store = self.sample()
        layer, other = store.layers[0]["id"], store.layers[1]["id"]
        link, second = store.read(f"overlay/{layer}/link"), store.read(f"overlay/{other}/link")
        os.unlink(store.path("overlay/l", second))  # lost in a crash
        os.symlink("../../../evil/diff", store.path("overlay/l", "A" * 26))
        os.unlink(store.path("overlay/l", link))
        os.symlink(f"/elsewhere/overlay/{layer}/diff", store.path("overlay/l", link))
        with self.open(store) as storage:
            self.assertEqual([layer, other],
                             [storage.resolve_link(link), storage.resolve_link(second)])
            self.assertEqual(link, storage.layer(layer).link_id)
            self.assertEqual([layer], storage.layer(other).lower_ids())
            for wrong in ("A" * 26, "B" * 26, "../x", "", "l/" + link, "\0"):
                self.assertRaises(cstor.LayerUnknown, storage.resolve_link, wrong)
        self.assertEqual(layer.encode() + b"\n", self.run_cstor(
            "--root", store.root, "resolve-link", link).stdout)
        self.run_on(store, "resolve-link", "B" * 26, status=3)

    def test_lower_layers_is_preferred(self) -> None:
        store = self.sample()
        top = store.layers[2]["id"]
        two = "a" * 64 + ":" + "b" * 64
        for text in (two, "../x", two.replace(":", "::"), ":".join(["a"] * 501)):
            store.write(f"overlay/{top}/lower-layers", text)
            with self.open(store) as storage:
                if text == two:
                    self.assertEqual(two.split(":"), storage.layer(top).lower_ids())
                else:
                    self.assertRaises(cstor.FormatError, storage.layer(top).lower_ids)

    def test_several_roots(self) -> None:
        additional = StoreBuilder(self.dir + "/additional")
        base = additional.layer(make_tar(("base", b"x")))
        shared = additional.image(base, "localhost/shared:1", "localhost/both:1")
        additional.save()
        split = StoreBuilder(self.dir + "/imagestore")
        image_layer = split.layer(make_tar(("split", b"y" * 5000)))
        split.image(image_layer, "localhost/split:1")
        split.save()
        store = self.builder()
        name = f"overlay-layers/{image_layer}.tar-split.gz"
        os.rename(split.path(name), store.path(name))  # where c/storage >= 1.58 keeps it
        own = store.layer(make_tar(("own", b"z")))
        store.layers[-1]["parent"] = base
        store.images = [{"id": "e" * 64, "layer": own, "names": ["localhost/both:1"]}]
        store.save()
        run = StoreBuilder(self.dir + "/run")
        volatile = store.layer(None, own, id="f" * 64)
        run.write("overlay-layers/volatile-layers.json", json.dumps([store.layers.pop()]))
        store.save()
        run.write("overlay-containers/volatile-containers.json", json.dumps(
            [{"id": "c" * 64, "names": ["gone"], "image": shared, "layer": volatile}]))
        with self.open(store, imagestore=split.root, stores=[additional.root, "/nonexistent"],
                       runroot=run.root) as storage:
            self.assertEqual(["additional image store /nonexistent: No such file or directory"],
                             storage.faults)
            closed = cstor.NeedsUnshare(f"{additional.root}: Permission denied")
            with mock.patch.object(cstor.Directory, "at", side_effect=closed):
                storage._open_other(additional.root, [], "store")
            self.assertEqual(f"store {additional.root}: Permission denied", storage.faults.pop())
            self.assertEqual({own, image_layer, base, volatile},
                             {layer.id for layer in storage.layers()})
            self.assertEqual([base, own], [layer.id for layer in storage.image("both:1").layers()])
            self.assertEqual([base], [layer.id for layer in storage.image("shared:1").layers()])
            self.assertTrue(storage.image("shared:1").readonly)
            for layer, made in ((base, additional), (image_layer, split), (own, store)):
                self.assertEqual(made.tars[layer], self.export(storage.layer(layer)))
            container = storage.container("gone")
            self.assertEqual((True, []), (container.volatile, container.faults))
            self.assertEqual([own], storage.layer(volatile).lower_ids())


class HalfImages(StoreTest):
    """Contents leave an image only when its layers are those of its configuration."""

    def setUp(self) -> None:
        super().setUp()
        self.store = store = self.builder()
        self.base, self.middle, self.top = base, middle, top = [
            store.layer(make_tar((name, b"x")), "", id=number * 64)
            for name, number in (("a", "1"), ("b", "2"), ("c", "3"))]
        store.layers[1]["parent"], store.layers[2]["parent"] = base, middle
        self.image = store.image(top, "localhost/a:1")
        store.container(self.image, store.layer(None, top), "c")
        store.layer(make_tar(("d", b"x")), id="4" * 64)
        self.records = json.dumps([store.layers, store.images, store.containers])

    def damaged(self, kind: str, number: int, **change: Any) -> None:
        """Write the records with fields of one of them changed, or with None removed."""
        store = self.store
        store.layers, store.images, store.containers = json.loads(self.records)
        record = getattr(store, kind)[number]
        record.update(change)
        for key in [key for key, value in change.items() if value is None]:
            del record[key]
        store.save()

    def refused(self, kind: str) -> tuple[type, str, list[str]]:
        """Return what looking into the image or container raises, and its faults."""
        with cstor.Storage.open(self.store.root) as storage:
            found = storage.image("a:1") if kind == "image" else storage.container("c")
            with self.assertRaises(cstor.CstorError) as caught:
                found.tree()
            self.assertIn("`layer` commands", caught.exception.hint)
            for layer in (self.base, self.middle, self.top):
                self.assertEqual(self.store.tars[layer], self.export(storage.layer(layer)))
            return type(caught.exception), str(caught.exception), found.faults

    def test_damaged_links(self) -> None:
        other = "its layers are not those that its configuration names"
        digests = {layer: sha256(tar) for layer, tar in self.store.tars.items()}
        wanted = " ".join(digests[layer] for layer in (self.base, self.middle, self.top))
        for kind, number, change, error, text in (
                ("images", 0, {"layer": None}, cstor.FormatError,
                 "no layer, but the configuration names more"),
                ("images", 0, {"layer": 5}, cstor.FormatError,
                 "no layer, but the configuration names more"),
                ("layers", 1, {"parent": None}, cstor.FormatError,
                 f"layer {self.middle} has no parent, but the configuration names more"),
                ("layers", 2, {"parent": None}, cstor.FormatError,
                 f"layer {self.top} has no parent, but the configuration names more"),
                ("images", 0, {"layer": self.middle}, cstor.IntegrityError,
                 f"{other}: expected {wanted}, got {digests[self.base]} {digests[self.middle]}"),
                ("layers", 2, {"parent": self.base}, cstor.IntegrityError,
                 f"{other}: expected {wanted}, got {digests[self.base]} {digests[self.top]}"),
                ("layers", 0, {"parent": "4" * 64}, cstor.IntegrityError,
                 f"{other}: expected {wanted}, got {digests['4' * 64]} {wanted}"),
                ("layers", 2, {"parent": "9" * 64}, cstor.LayerUnknown,
                 f"layer not known: {'9' * 64} (parent of {self.top})")):
            with self.subTest(kind=kind, change=change):
                self.damaged(kind, number, **change)
                found, message, faults = self.refused("image")
                self.assertEqual((error, text), (found, message.replace(
                    f"image {self.image}: ", "")))
                self.assertEqual(text, faults[-1])
        for record, change, text in (
                ("containers", {"layer": None}, "its record has no layer"),
                ("containers", {"layer": ""}, "its record has no layer"),
                ("containers", {"image": None}, "its record has no image"),
                ("containers", {"image": 5}, "its record has no image"),
                ("layers", {"parent": None},
                 "layer {} has no parent, but the configuration of its image names more")):
            with self.subTest(record=record, change=change):
                self.damaged(record, 3 if record == "layers" else 0, **change)
                text = text.format(self.store.layers[3]["id"])
                found, message, faults = self.refused("container")
                self.assertEqual((cstor.FormatError, text), (found, message.partition(": ")[2]))
                self.assertEqual(text, faults[-1])

    def test_commands(self) -> None:
        self.damaged("images", 0, layer=self.middle)
        out = self.dir + "/out"
        for args in (["extract", "a:1", out], ["export", "a:1", "-o", out], ["files", "a:1"],
                     ["cat", "a:1", "a"], ["stat", "a:1", "a"], ["cp", "a:1:/a", out],
                     ["toc", "a:1"], ["blame", "a:1"], ["diff", "a:1", "a:1"],
                     ["diff", self.base, "a:1"], ["copy-to-oci", "a:1", out],
                     ["export", "a:1", "-o", out, "--as=docker-archive"],
                     ["export", "a:1", "-o", out, "--as=oci-archive"]):
            done = self.run_on(self.store, "image", *args, status=4)
            self.assertIn(b"names: expected", done.stderr, args)
            self.assertFalse(os.path.lexists(out))
        for args in (["history", "a:1"], ["layers", "a:1"], ["inspect", "a:1"]):
            self.run_on(self.store, "image", *args)
        listed = self.run_on(self.store, "image list").stdout
        self.assertIn(b"FAULTS\n", listed)
        self.assertIn(b"  its layers are not those that its configuration names: expected", listed)
        with cstor.Storage.open(self.store.root) as storage:
            session = cstor._Session(mock.Mock(opener=lambda: storage), mock.Mock())
            self.assertRaises(cstor.IntegrityError, session.go_image, {"imageId": "a:1"})
            self.assertRaises(cstor.IntegrityError, session.open_image, {"image_ref": "a:1"})
            for take in (storage.image("a:1").toc, lambda: storage.image("a:1").extract(out)):
                self.assertRaises(cstor.IntegrityError, take)

    def test_what_is_whole_or_cannot_be_known(self) -> None:
        compressed = {"compressed-diff-digest": sha256(self.store.tars[self.base])}
        for kind, number, change in (
                ("images", 0, {}), ("containers", 0, {"image": "", "metadata": ""}),
                ("containers", 0, {"image": "9" * 64}),
                ("images", 0, {"big-data-names": []}),  # nobody knows its configuration
                ("layers", 0, {"diff-digest": None, "toc-digest": sha256(b"")}),
                ("layers", 0, {"diff-digest": sha256(b"tar of a .xz"), **compressed})):
            with self.subTest(kind=kind, change=change):
                self.damaged(kind, number, **change)
                with cstor.Storage.open(self.store.root) as storage:
                    for found in (storage.image("a:1"), storage.container("c")):
                        with found.tree() as tree:
                            self.assertEqual(b"x", b"".join(tree.read(b"a")))
        self.damaged("layers", 0, **{"diff-digest": sha256(b"as its store says")})
        self.store.write(f"overlay/{self.base}/additionallayer", "/elsewhere")
        with cstor.Storage.open(self.store.root) as storage:
            self.assertEqual(3, len(storage.image("a:1").checked_chain()))

    def test_images_without_layers(self) -> None:
        """By right when the configuration has no DiffIDs; Go writes null for none."""
        store = self.builder()
        for name, diff_ids in (("empty", []), ("null", None), ("lost", ["sha256:" + "0" * 64])):
            config = json.dumps({"rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
            record: dict[str, Any] = {"id": sha256(config)[7:], "names": [f"localhost/{name}:1"]}
            store.big_data(record, sha256(config), config)
            store.big_data(record, "manifest", json.dumps({"schemaVersion": 2, "config": {
                "digest": sha256(config)}, "layers": []}).encode())
            store.images.append(record)
        old: dict[str, Any] = {"id": "e" * 64, "names": ["localhost/old:1"]}  # and lost its layer
        store.big_data(old, "manifest", json.dumps({"schemaVersion": 1, "history": [
            {"v1Compatibility": "{}"}]}).encode())
        store.images += [old, {"id": "f" * 64, "names": ["localhost/bare:1"]}]
        store.save()
        with self.open(store) as storage:
            self.assertEqual({
                "empty": [], "null": [], "lost": ["no layer, but the configuration names more"],
                "old": ["no layer, but the configuration names more"],
                "bare": ["no manifest", "no layer"]},
                {image.names[0][10:-2]: image.faults for image in storage.images()})
            for name in ("empty", "null", "bare"):  # nobody knows of the last
                with storage.image(name + ":1").tree() as tree:
                    self.assertEqual([b""], [path for path, _, _ in tree.walk()])
            for name in ("lost:1", "old:1"):
                self.assertRaises(cstor.FormatError, storage.image(name).tree)

    def test_a_damaged_configuration(self) -> None:
        """What an image should be cannot be known then, and single layers remain."""
        self.damaged("images", 0)
        config = self.store.images[0]["big-data-names"][0]
        path = self.store.path("overlay-images", self.image,
                               os.fsdecode(cstor.big_data_file(config)))
        os.truncate(path, 0)
        self.assertIs(cstor.IntegrityError, self.refused("image")[0])
        os.unlink(path)
        self.assertEqual((cstor.FormatError, [f'big data item "{config}" is recorded, but missing'
                                              ]), self.refused("image")[::2])


class WrongFiles(StoreTest):
    """What stands in place of a file of the store, of the configuration, or of an input."""

    def names(self, store: StoreBuilder) -> dict[str, list[str]]:
        """Return files of a store, and the command that needs them most."""
        layer, image = store.layers[1]["id"], store.images[0]["id"]
        store.write("db.sql", "x")
        store.write(f"overlay-layers/{layer}/a", "x")
        config = next(key for key in store.images[0]["big-data-names"] if key.startswith("sha256"))
        item = "=" + base64.b64encode(config.encode()).decode()
        os.unlink(store.path("overlay/l", store.read(f"overlay/{layer}/link")))
        return {"overlay-images/images.json": ["image", "list"],
                "overlay-layers/layers.json": ["layer", "list"],
                "overlay-containers/containers.json": ["container", "list"],
                "overlay-layers/layers.lock": ["layer", "list"], "db.sql": ["container", "list"],
                f"overlay-images/{image}/manifest": ["image", "history", image],
                f"overlay-images/{image}/{item}": ["image", "history", image],
                f"overlay/{layer}/link": ["resolve-link", "A" * 26],
                f"overlay-layers/{layer}.tar-split.gz": ["layer", "export", layer, "-o",
                                                         self.dir + "/out"]}

    @staticmethod
    def status(name: str) -> int:
        """Return the exit status without a file: some things can be done."""
        return 3 if name.endswith("link") else 0 if name.endswith(("lock", "db.sql")) else 6

    def answer(self, *words: str) -> tuple[int, str]:
        return self.call("--no-helper", *words)[::2]

    def test_terabytes(self) -> None:
        """A sparse file that says it is of 4 TiB is refused by its size, not read to the limit."""
        real = cstor.read_up_to

        def checked(fd: int, count: int) -> bytes:
            self.assertLess(os.fstat(fd).st_size, 1 << 40)
            return real(fd, count)

        store = self.sample()
        for record in store.images:
            record["big-data-sizes"] = {}
        for name, words in self.names(store.save()).items():
            with self.subTest(name), mock.patch.object(cstor, "read_up_to", checked):
                before = os.stat(store.path(name)).st_size
                os.truncate(store.path(name), 4 << 40)
                status, said = self.answer("--root", store.root, *words)
                os.truncate(store.path(name), before)
                self.assertEqual(self.status(name), status)
                if "tar-split" in name:
                    self.assertIn(f"{name} at offset", said)
                elif name.endswith((".json", "db.sql", "manifest", "=")):
                    self.assertRegex(said, f"{re.escape(name)}: larger than [0-9]+ bytes\n$")
        conf = self.dir + "/storage.conf"
        put(conf)
        os.truncate(conf, 4 << 40)
        done = self.run_cstor("image", "list", env={"CONTAINERS_STORAGE_CONF": conf}, status=6)
        self.assertEqual(f"cstor: error: {conf}: larger than 1048576 bytes\n", done.err)

    def test_terabytes_of_a_recorded_size(self) -> None:
        store = self.sample()
        image_id = store.images[0]["id"]
        os.truncate(store.path("overlay-images", image_id, "manifest"), 4 << 40)
        with self.open(store) as storage:
            image = storage.image(image_id)
            with mock.patch.object(cstor, "read_up_to") as read, self.assertRaisesRegex(
                    cstor.IntegrityError, "manifest: wrong size: .*got 4398046511104"):
                image.big_data("manifest")
            read.assert_not_called()

    def test_fifos_of_a_store(self) -> None:
        store = self.sample()
        for record in store.images:
            record["big-data-sizes"] = {}
        for name, words in self.names(store.save()).items():
            path = store.path(name)
            os.rename(path, path + ".kept")
            for make, remove, word in ((os.mkfifo, os.unlink, "FIFO"),
                                       (os.mkdir, os.rmdir, "directory")):
                make(path)
                with self.subTest(name=name, kind=word):
                    status, said = self.answer("--root", store.root, *words)
                    self.assertEqual(self.status(name), status)
                    if not name.endswith(("lock", "link")):
                        self.assertTrue(said.endswith(
                            f"{path}: is a {word}, not a regular file\n"), said)
                remove(path)
            os.rename(path + ".kept", path)

    def test_inputs(self) -> None:
        need_proc()
        fifo, good = self.dir + "/fifo", self.dir + "/good"
        store = self.sample()
        layer = store.layers[2]["id"]
        self.run_on(store, "layer export", layer, "-o", good)
        self.run_on(store, "layer stream", layer, "-o", good + ".s")
        os.mkfifo(fifo)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.dir + "/socket")
        for path, word in ((fifo, "FIFO"), (self.dir + "/socket", "socket"),
                           ("/dev/zero", "character device"), (self.dir, "directory")):
            commands = [["tar-diff", good, path], ["tar-diff", path, good],
                        ["stream-to-tar", path, "-o", self.dir + "/out"],
                        ["stream-to-tar", good + ".s", "--external", path, "-o", self.dir + "/out"]]
            if word != "directory":
                commands.append(["--root", store.root, "image", "diff", "sample", "dir:" + path])
            wanted = 6, f"cstor: error: {path}: is a {word}, not a regular file\n"
            for words in commands:
                self.assertEqual(wanted, self.answer(*words))
            self.assertEqual(wanted, self.call(
                "image", "list", "--no-helper", env={"CONTAINERS_STORAGE_CONF": path})[::2])
            self.assertFalse(os.path.exists(self.dir + "/out"))
        with mock.patch.dict(os.environ, {"CONTAINERS_STORAGE_CONF": "/dev/null"}):
            self.assertEqual(cstor.load_config(euid=0).files, ["/dev/null"])

    def test_a_pipe_that_the_shell_has_opened(self) -> None:
        need_tools("bash")
        need(os.path.exists("/dev/fd/0"), "/dev/fd is missing")
        store = self.sample()
        words = ["--root", store.root, "layer", "export", store.layers[2]["id"], "-o"]
        self.run_cstor(*words, self.dir + "/good")
        self.run_cstor(self.dir + "/good", command=[
            "bash", "-c", '"$1" -c "$2" tar-diff "$3" <(cat "$3")', "-", sys.executable, LAUNCH])


# ================================================================================================
# 8. Storage
# ================================================================================================

HOLD_LOCK = """\
import fcntl, sys, time
files = [open(path, "r+b") for path in sys.argv[1:]]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(*paths: str) -> Iterator[None]:
    """Let another process hold locks on files."""
    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK, *paths], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdin and holder.stdout
        assert holder.stdout.readline() == b"held\n"
        yield
        holder.stdin.close()


class Locks(StoreTest):
    def test_held_locks_are_not_waited_for(self) -> None:
        store = self.sample()
        with held(*(store.path(f"overlay-{kind}/{kind}.lock") for kind in KINDS)):
            start = time.monotonic()
            with self.open(store) as storage:
                self.assertEqual((2, 4, 1), (len(storage.images()), len(storage.layers()),
                                             len(storage.containers())))
            self.assertLess(time.monotonic() - start, 1)

    def test_missing_locks_are_not_made(self) -> None:
        store = self.sample()
        for kind in KINDS:
            os.unlink(store.path(f"overlay-{kind}/{kind}.lock"))
        with self.open(store) as storage:
            self.assertEqual(2, len(storage.images()))

    def test_locks_are_shared_and_given_back(self) -> None:
        store = self.sample()
        with self.open(store) as storage:
            storage.images()
            storage.containers()
            with held(*(store.path(f"overlay-{kind}/{kind}.lock") for kind in KINDS)):
                pass

    def test_change_without_a_lock_is_noticed(self) -> None:
        store = self.sample()
        os.unlink(store.path("overlay-layers/layers.lock"))
        names = [b"overlay-layers/layers.json", b"overlay-layers/volatile-layers.json"]
        with cstor.Directory.at(store.root) as root:
            read, reads = cstor._read_json, []

            def racing(directory: cstor.Directory, name: bytes) -> bytes:
                reads.append(name)
                data = read(directory, name)
                if len(reads) == 1:  # a writer between the two files
                    store.write("overlay-layers/new", "[]")
                    os.rename(store.path("overlay-layers/new"), store.path(os.fsdecode(names[0])))
                return data

            with mock.patch.object(cstor, "_read_json", racing):
                data = cstor.read_consistently(root, b"overlay-layers/layers.lock", names,
                                               cstor.Deadline(0))
        self.assertEqual(([b"[]", b""], names * 2), (data, reads))


def make_database(root: str, *, graphroot: str = "/g", runroot: str = "/r", wal: bool = False,
                  containers: Sequence[tuple[str, str, int, dict[str, Any]]] = ()
                  ) -> sqlite3.Connection:
    """Write the part of podman's db.sql that is read; return the open connection."""
    database = sqlite3.connect(root + "/db.sql", check_same_thread=False)
    if wal:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA wal_autocheckpoint=0")
    database.executescript("""
        CREATE TABLE DBConfig(ID INTEGER PRIMARY KEY NOT NULL, GraphRoot TEXT, RunRoot TEXT,
                              GraphDriver TEXT);
        CREATE TABLE ContainerConfig(ID TEXT, Name TEXT, PodID TEXT, JSON TEXT);
        CREATE TABLE ContainerState(ID TEXT, State INTEGER, ExitCode INTEGER, JSON TEXT);
        CREATE TABLE PodConfig(ID TEXT, Name TEXT);
        INSERT INTO PodConfig VALUES('p1', 'the-pod');""")
    database.execute("INSERT INTO DBConfig VALUES(1, ?, ?, 'overlay')", (graphroot, runroot))
    for container_id, name, state, config in containers:
        database.execute("INSERT INTO ContainerConfig VALUES(?, ?, ?, ?)",
                         (container_id, name, config.get("pod"), json.dumps(config).encode()))
        # As podman 5.8 leaves it: the columns are those of the container when it was made.
        database.execute("INSERT INTO ContainerState VALUES(?, 1, 0, ?)", (container_id, json.dumps(
            {"pid": 7, "mounted": True, "state": state, "exitCode": 3})))
    database.commit()
    return database


class Database(StoreTest):
    """podman's db.sql."""

    def check_read(self, store: StoreBuilder, rootfs: str) -> None:
        with self.open(store) as storage:
            state = storage.container("web").state
            self.assertEqual(("running", 3, "the-pod", rootfs, 7, True), tuple(
                state[key] for key in ("state", "exit-code", "pod", "rootfs", "pid", "mounted")))
            self.assertEqual([], storage.faults)

    def make(self, **kwargs: Any) -> tuple[StoreBuilder, sqlite3.Connection]:
        store = self.sample()
        database = make_database(store.root, containers=[
            (store.containers[0]["id"], "web", 3, {"pod": "p1", "rootfs": "/srv/rootfs"})],
            **kwargs)
        self.addCleanup(database.close)
        return store, database

    def test_rollback_journal_mode(self) -> None:
        store, database = self.make()
        database.close()
        self.check_read(store, "/srv/rootfs")

    def test_wal_mode_makes_no_files(self) -> None:
        store, database = self.make(wal=True)
        self.assertTrue(os.path.getsize(store.path("db.sql-wal")))
        self.check_read(store, "/srv/rootfs")
        os.unlink(store.path("db.sql-shm"))  # as after a copy of the store
        self.check_read(store, "/srv/rootfs")

    def test_hot_journal_is_rolled_back_in_a_copy(self) -> None:
        store, database = self.make()
        database.execute("PRAGMA cache_size=1")
        database.execute("PRAGMA cache_spill=ON")
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE ContainerConfig SET JSON = '{\"rootfs\":\"/half\"}'")
        database.execute("CREATE TABLE Bulk(x)")
        database.executemany("INSERT INTO Bulk VALUES(?)", [("y" * 2000,)] * 500)
        crashed = StoreBuilder(self.dir + "/crashed")
        for name in os.listdir(store.root):
            path = store.path(name)
            if os.path.isdir(path):
                shutil.copytree(path, crashed.path(name), dirs_exist_ok=True, symlinks=True)
            else:
                shutil.copy(path, crashed.path(name))
        database.rollback()
        self.assertTrue(os.path.getsize(crashed.path("db.sql-journal")))
        self.check_read(crashed, "/srv/rootfs")

    def test_locked_database_is_read_at_once(self) -> None:
        store, database = self.make()
        database.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        self.check_read(store, "/srv/rootfs")
        self.assertLess(time.monotonic() - start, 1)

    def test_hostile_databases(self) -> None:
        store, database = self.make()
        os.mkfifo(store.path("db.sql-wal"))
        with self.open(store) as storage:
            self.assertEqual({}, storage.podman_containers())
            self.assertRegex(storage.faults[0], "is a FIFO")
        os.unlink(store.path("db.sql-wal"))
        database.executescript("""
            UPDATE ContainerConfig SET Name = x'ff00', JSON = '{bad';
            INSERT INTO ContainerConfig VALUES('other', 7, 'p2', '{"rootfs":[1]}');
            INSERT INTO PodConfig VALUES('p2', x'00')""")
        with self.open(store) as storage:
            self.assertEqual(["other"], list(storage.podman_containers()))
            self.assertRegex(storage.faults[0], "container .*malformed JSON")
        for form in ("json", "table"):
            self.run_on(store, "container list --format", form)
        database.executescript("""
            ALTER TABLE ContainerConfig RENAME TO Old;
            CREATE VIEW ContainerConfig AS
            WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t)
            SELECT x AS ID, x AS Name, NULL AS PodID, '{}' AS JSON FROM t WHERE x < 0""")
        start = time.monotonic()
        with self.open(store) as storage:
            self.assertEqual({}, storage.podman_containers())
            self.assertRegex(storage.faults[0], "interrupted")
        self.assertLess(time.monotonic() - start, 10)

    def rootfs(self) -> tuple[StoreBuilder, sqlite3.Connection, str]:
        """Return a store with a container on a directory of the host, and that directory."""
        store, host = self.sample(), self.dir + "/host"
        os.mkdir(host)
        put(host + "/secret", b"of the host")
        database = make_database(store.root, graphroot=store.root, containers=[
            (store.containers[0]["id"], "web", 3, {"rootfs": host})])
        self.addCleanup(database.close)
        return store, database, host

    def refused(self, store: StoreBuilder, rootfs: str, why: str) -> str:
        """Check that neither we nor the helper open a directory; return the error."""
        with mock.patch("cstor.Helper") as helper, mock.patch("cstor.why_no_helper",
                                                              return_value=""), \
                cstor.ProxiedStorage.open(store.root) as storage:
            container = storage.containers()[0]
            self.assertEqual((rootfs, why, []), (
                container.state["rootfs"], container.state["rootfs-refused"], container.faults))
            with self.assertRaises(cstor.NeedsUnshare) as raised:
                container.tree()
            self.assertEqual(f"container web: its --rootfs directory {rootfs} is not opened: {why}",
                             str(raised.exception))
            storage.opener.helper(cstor.NeedsUnshare(""))
            helper.assert_called_once_with([store.root])
            self.assertEqual([], storage.faults)
        return cstor.describe(raised.exception)

    def test_rootfs_that_is_gone(self) -> None:
        store, _, host = self.rootfs()
        os.rename(host, host + "-too")
        for why in ("No such file or directory", "Not a directory"):
            said = f"cstor: error: container web: its --rootfs directory {host}: {why}\n"
            for words in (("files", "web"), ("cat", "web", "secret"), ("export", "web")):
                self.assertEqual((6, "", said),
                                 self.call("--root", store.root, "container", *words))
            put(host)

    def test_rootfs_of_ones_own_database(self) -> None:
        store, database, host = self.rootfs()
        link = self.dir + "/link"
        os.symlink(store.root, link)
        for root, recorded in ((store.root, store.root), (store.root, link), (link, store.root),
                               (store.root, store.root + "/overlay/..")):
            database.execute("UPDATE DBConfig SET GraphRoot = ?", (recorded,))
            database.commit()
            done = self.run_cstor("--root", root, "container", "cat", "web", "/secret")
            self.assertEqual((b"of the host", b""), (done.stdout, done.stderr))
        with mock.patch("cstor.Helper") as helper, mock.patch("cstor.why_no_helper",
                                                              return_value=""), \
                cstor.ProxiedStorage.open(store.root) as storage:
            self.assertEqual(host, storage.containers()[0].state["rootfs"])
            storage.opener.helper(cstor.NeedsUnshare(""))
            helper.assert_called_once_with([store.root, host])

    def test_one_path_of_a_rootfs(self) -> None:
        """No directory of the host is listed but those that are copied: it can be "/"."""
        store, _, host = self.rootfs()
        for number in range(3):
            os.makedirs(f"{host}/d{number}/sub")
            put(f"{host}/d{number}/file", b"%d" % number)
        os.link(host + "/d1/file", host + "/d1/sub/hard")
        os.link(host + "/d1/file", host + "/d2/elsewhere")
        os.symlink("/d1/sub/../file", host + "/link")
        os.symlink(self.dir, host + "/out")
        real = cstor.Directory.list_at
        with self.open(store) as storage, mock.patch.object(
                cstor.Directory, "list_at", autospec=True, side_effect=real) as listed:
            with storage.container("web").tree() as tree:
                self.assertEqual(b"1", b"".join(tree.read(b"/link")))
                self.assertEqual(b"1", b"".join(tree.read(b"/d2/../d2/elsewhere")))
                self.assertEqual("dir", tree.lookup(b"/")[1].type)
                self.assertEqual((b"d1/sub", "dir"), (tree.lookup(b"d1/sub")[0],
                                                      tree.lookup(b"d1/sub")[1].type))
                for name in (b"none", b"d1/none", b"d1/file/none", b"d1/none/x", b"out/host",
                             b"x" * 300, b"d1/" + b"x" * 300):
                    self.assertRaises(cstor.NotFound, tree.lookup, name)
                self.assertEqual(0, listed.call_count)
                walked = [(path, first) for path, _, first in tree.walk(b"d1")]
                self.assertEqual([(b"d1", None), (b"d1/file", None), (b"d1/sub", None),
                                  (b"d1/sub/hard", b"d1/file")], walked)
                self.assertEqual(2, listed.call_count)
                self.assertEqual(b"1", b"".join(tree.read(b"d2/elsewhere")))
                self.assertEqual(2, listed.call_count)
                self.assertEqual(15, len(list(tree.walk())))
                count = listed.call_count
                node = tree.lookup(b"d1/sub")[1]
                self.assertIs(tree.layers[0].root.find([b"d1", b"sub"]), node)
                self.assertEqual(count, listed.call_count)
        for words, wanted in (("cat web /link", b"1"), ("cat web out/host/secret", None),
                              ("cat web /secret d0/file", b"of the host0")):
            done = self.run_on(store, "container", *words.split(), status=0 if wanted else 3)
            self.assertEqual(wanted or b"", done.stdout)

    def test_patterns_in_a_rootfs(self) -> None:
        """Below the components that a pattern begins with alone is walked, with the same answer."""
        store, _, host = self.rootfs()
        for number in range(3):
            os.makedirs(f"{host}/d{number}/sub/[x]")
            put(f"{host}/d{number}/sub/file", b"%d" % number)
            put(f"{host}/d{number}/sub/[x]/x", b"x")
        os.makedirs(host + "/d1/caf\u00e9")
        put(host + "/d1/caf\u00e9/f", b"")
        os.link(host + "/d1/sub/file", host + "/d1/sub/hard")
        os.link(host + "/d0/sub/file", host + "/d2/hard")
        os.symlink("d1", host + "/link")
        real = cstor.Directory.list_at
        for patterns, listed in (
                (["d1/*"], 4), (["/d1/sub"], 2), (["d1/sub/f*"], 2), (["./d1//sub/./*"], 2),
                (["d1/sub/[x]"], 2), (["d1/sub/[x]/*"], 2), (["d1/sub/hard"], 11),
                (["d2/*"], 14), (["d0/sub/**", "d2/**"], 5), (["d2/**", "d2/sub/*", "d0"], 11),
                (["d1/sub/*", "d1/sub/f*", "/d1/none"], 2), (["link/*", "/link"], 0),
                (["d1/../d1/*"], 4), (["d1/caf\u00e9/*"], 4), (["d1/./*", "d3/*"], 4),
                (["/"], 11), (["*"], 11), (["file"], 11), (["d1/sub/file/x", "d1/."], 4),
                ([".", "d1/*"], 11), (["d[1]/sub/*"], 11), ([], 11)):
            with self.open(store) as storage, storage.container("web").tree() as tree, \
                    storage.container("web").tree() as whole:
                list(whole.walk())
                with mock.patch.object(cstor.Directory, "list_at", autospec=True,
                                       side_effect=real) as lists:
                    found = [(path, node.mode, node.size, first)
                             for path, node, first in tree.glob(patterns)]
                    count = lists.call_count
                    self.assertEqual(found, [(path, node.mode, node.size, first)
                                             for path, node, first in whole.glob(patterns)])
                    chosen = [[path for path, _ in cstor.select_nodes(each, patterns)]
                              for each in (tree, whole)]
                    self.assertEqual(*chosen)
                    self.assertEqual(b"1", b"".join(tree.read(b"d1/sub/file")))
                self.assertEqual(listed, count, patterns)

    def test_rootfs_of_another_store_or_user(self) -> None:
        """Neither copied stores nor other users' lead anybody to files of the host."""
        store, database, host = self.rootfs()
        other = self.dir + "/other"
        os.mkdir(other)
        for recorded in ("/var/lib/elsewhere", other, ".", "", "a\1b"):
            database.execute("UPDATE DBConfig SET GraphRoot = ?", (recorded,))
            database.commit()
            error = self.refused(store, host, "podman's database records another graph root, "
                                 + cstor.display(recorded))
        for words in ("cat web /secret", "stat web /secret", "cp web:/secret -", "files web",
                      f"extract web {self.dir}/out", "export web"):
            done = self.run_on(store, "container", *words.split(), status=5)
            self.assertEqual((b"", f"cstor: error: {error}\n"), (done.stdout, done.err))
        self.assertTrue(error.endswith(" (read it on the machine where podman made the container, "
                                       "as the user whose store it is)"))
        database.execute("UPDATE DBConfig SET GraphRoot = ?", (store.root,))
        database.execute("UPDATE ContainerConfig SET JSON = '{\"rootfs\":\"../host\"}'")
        database.commit()
        self.refused(store, "../host", "not an absolute path")
        database.execute("UPDATE ContainerConfig SET JSON = ?", (json.dumps({"rootfs": host}),))
        database.commit()
        need(os.geteuid() == 0, "only root can give files away")
        put(store.path("db.sql-wal"), b"")
        for name in ("", "db.sql", "db.sql-wal"):
            path = os.path.normpath(store.path(name))
            os.chown(path, 1234, 0)
            self.refused(store, host, f"{path} belongs to uid 1234")
            os.chown(path, 0, 0)
        os.unlink(store.path("db.sql-wal"))
        self.run_on(store, "container cat web /secret")

    def test_database_that_is_no_regular_file(self) -> None:
        store, _, _ = self.rootfs()
        store.containers[0].update(image="")
        store.save()
        os.rename(store.path("db.sql"), self.dir + "/db.sql")
        for make, kind in ((lambda path: os.symlink(self.dir + "/db.sql", path), "symbolic link"),
                           (os.mkfifo, "FIFO"), (os.mkdir, "directory")):
            make(store.path("db.sql"))
            done = self.run_on(store, "container cat web /secret", status=6)
            self.assertEqual(b"", done.stdout)
            self.assertIn(b"was made by --rootfs, and the database of podman that knows the "
                          b"directory is not read", done.stderr)
            info = self.run_on(store, "-q store info --format json").json
            self.assertRegex(info["faults"][0], rf"db\.sql: is a {kind}, not a regular file")
            (os.rmdir if kind == "directory" else os.unlink)(store.path("db.sql"))

    def test_python_without_sqlite(self) -> None:
        store, _ = self.make()
        with mock.patch.dict(sys.modules, {"sqlite3": None}), self.open(store) as storage:
            self.assertEqual({}, storage.podman_containers())
            self.assertRegex(storage.faults[0], "no module sqlite3")

    def test_damaged_database_hides_no_container(self) -> None:
        for data in (b"", b"SQLite format 3\0" + bytes(100), os.urandom(5000)):
            store = make_sample(os.path.join(self.dir, str(len(data))))
            store.write("db.sql", data)
            with self.open(store) as storage:
                self.assertEqual((["web"], {}), (storage.containers()[0].names,
                                                 storage.containers()[0].state))
                self.assertEqual(1, len(storage.faults))
        done = self.run_on(store, "container list")
        self.assertIn(b"warning: ", done.stderr)


class Library(StoreTest):
    def test_what_it_does_not_understand_is_refused(self) -> None:
        """Unknown words, a str where bytes or a list are wanted: each says what is right."""
        store = self.sample()
        out = self.dir + "/out"
        modes = "'auto', 'reflink', 'hardlink', 'copy'"
        patterns = "patterns must be a list of str, not str"
        path = "path must be bytes, not str"
        ours, theirs = socket.socketpair()
        self.addCleanup(theirs.close)
        with self.open(store) as storage, storage.image("sample").tree() as tree, \
                cstor.RpcClient(ours) as client:
            image, layer = storage.image("sample"), storage.layers()[0]
            stream = cstor.LayerStream([], label="x")
            anything: Any = cstor  # what mypy refuses is tried here
            nothing: Any = None
            cases: list[tuple[str, Callable[[], Any]]] = [
                *[(f"ValueError: link_mode: unknown {mode!r}; expected {modes}",
                   functools.partial(image.extract, out, link_mode=mode))
                  for mode in ("reflinks", "COPY", "none", "hardlinks", "")],
                (f"ValueError: link_mode: unknown 'x'; expected {modes}",
                 lambda: cstor.extract_streams([stream], out, link_mode="x")),
                ("TypeError: each of link_mode must be str, not NoneType",
                 lambda: image.extract(out, link_mode=nothing)),
                ("ValueError: expected none, gzip[:1 to 9] or zstd[:1 to 19], got \"lz4\"",
                 lambda: image.copy_to_oci(out, "x", compression="lz4")),
                (f"ValueError: codec: unknown 'splitfd'; expected {cstor.CODECS!r}".translate(
                    {40: None, 41: None}),
                 lambda: cstor.write_stream(layer, io.BytesIO(), codec="splitfd")),
                ("ValueError: form: unknown 'splitfd'; expected 'stream', 'splitfdstream', 'push'",
                 lambda: client.layer("x", "splitfd")),
                ("ValueError: form: unknown 'stream'; expected '', 'varlink'",
                 lambda: cstor.VarlinkClient.layer(anything, "x", "stream")),
                (f"ValueError: ignore: unknown 'times'; expected {cstor.DIFFERENCES!r}".translate(
                    {40: None, 41: None}),
                 lambda: list(cstor.diff_trees(tree, tree, ["times"]))),
                ("TypeError: ignore must be a list of str, not str",
                 lambda: list(cstor.diff_trees(tree, tree, "time"))),
                (f"TypeError: {patterns}", lambda: tree.glob("etc")),
                ("TypeError: patterns must be a list of str, not bytes",
                 lambda: tree.glob(anything.OPAQUE_MARKER)),
                ("TypeError: each of patterns must be str, not bytes",
                 lambda: tree.glob([anything.OPAQUE_MARKER])),
                (f"TypeError: {patterns}", lambda: image.extract(out, paths="etc")),
                (f"TypeError: {patterns}", lambda: layer.extract(out, exclude="etc")),
                ("TypeError: owner_map must be a list of str, not str",
                 lambda: image.extract(out, owner_map="0:100000:65536")),
                ("TypeError: stores must be a list of str, not str",
                 lambda: cstor.Storage.open(store.root, stores=store.root)),
                ("TypeError: argv must be a list of str, not str", lambda: cstor.main("--version")),
                (f"TypeError: {path}", lambda: tree.lookup(anything.REF_NAME)),
                (f"TypeError: {path}", lambda: list(tree.walk(anything.REF_NAME))),
                (f"TypeError: {path}", lambda: list(tree.read(anything.REF_NAME))),
                (f"TypeError: {path}", lambda: layer.open_file(anything.REF_NAME)),
                ("TypeError: path must be str, not bytes",
                 lambda: image.extract(anything.OPAQUE_MARKER)),
                ("TypeError: path must be str, not bytes",
                 lambda: image.copy_to_oci(anything.OPAQUE_MARKER)),
                *[("TypeError: reference must be str, not bytes",
                   functools.partial(find, anything.OPAQUE_MARKER))
                  for find in (storage.image, storage.layer, storage.container)],
                ("TypeError: name must be bytes, not str",
                 lambda: cstor.spell(anything.REF_NAME)),
                ("TypeError: out must be a descriptor or a binary file, not str",
                 lambda: layer.export(anything.REF_NAME)),
                ("TypeError: strip must be int, not str",
                 lambda: image.extract(out, strip=anything.REF_NAME)),
                *[("TypeError: node must be Node, not bytes", lambda call=call: call(b"etc"))
                  for call in (tree.open, lambda node: list(tree.content(node)), tree.crc64)],
            ]
            misspelled: Any = {"verfy": True}
            for function in (image.extract, layer.extract, image.copy_to_oci):
                with self.assertRaisesRegex(TypeError, "unexpected keyword argument 'verfy'"):
                    function(out, **misspelled)
            for wanted, call in cases:
                with self.subTest(wanted=wanted):
                    with self.assertRaises((TypeError, ValueError)) as caught:
                        call()
                    self.assertEqual(
                        wanted, f"{type(caught.exception).__name__}: {caught.exception}")
                    self.assertFalse(os.path.exists(out))

    def test_everyday_use(self) -> None:
        store = self.sample()
        self.guard(store.root)
        environ = dict(os.environ)
        os.environ["CONTAINERS_GRAPHROOT"] = store.root
        try:
            with cstor.Storage.discover() as storage:
                self.assertEqual(store.root, storage.graphroot)
                image = storage.image("sample")
                self.assertEqual(["docker.io/library/sample:latest"], image.names)
                layer = image.layers()[1]
                self.assertEqual(["srv/", "srv/app.py", "etc/.wh.passwd", "srv/caf\u00e9 <&>",
                                  "srv/latin1-\udce9", "srv/" + "long-" * 30],
                                 [os.fsdecode(member.name) for member in layer.members()])
                with layer.open_file(b"srv/app.py") as file:
                    self.assertEqual(b"print('app')\n" * 400, file.read())
                self.assertEqual(["web"], storage.containers()[0].names)
        finally:
            os.environ.clear()
            os.environ.update(environ)

    def test_a_server_without_proc(self) -> None:
        """What passes files is refused before a reply, in words; all else is served."""
        store = self.sample()
        exists = os.path.exists
        with self.open(store) as storage, mock.patch.object(
                os.path, "exists", lambda path: path != "/proc/self/fd" and exists(path)):
            for layer in storage.image("sample").layers():
                for form in ("splitfdstream", ""):
                    with self.subTest(form=form), self.assertRaisesRegex(
                            cstor.CstorError, "^files of layers are passed through /proc, which is "
                                              "not mounted"), served_layer(layer, form):
                        self.fail("it was sent")
                with served_layer(layer, "stream") as stream:
                    self.assertEqual(layer.diff_digest, stream.export(io.BytesIO()))

    def test_threads_share_a_storage(self) -> None:
        store = self.sample()
        results: list[bytes] = []
        with self.open(store) as storage:
            layer = storage.layer(store.layers[0]["id"])
            threads = [threading.Thread(target=lambda: results.append(self.export(layer)))
                       for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual([store.tars[layer.id]] * 4, results)

    def read_everything(self, root: str) -> int:
        """Read all there is; return how many layers were rebuilt, each with its own digest."""
        rebuilt = 0

        def attempt(read: Callable[[], object]) -> object:
            try:
                return read()
            except (cstor.CstorError, OSError) as error:
                self.assertGreater(len(cstor.describe(error)), 10)
                self.assertIn(cstor.error_row(error)[0], (3, 4, 5, 6))
                return None

        with cstor.Storage.open(root) as storage:
            for list_all in (storage.images, storage.layers, storage.containers):
                attempt(list_all)
            for image in attempt(storage.images) or ():  # type: ignore[attr-defined]
                for read in (image.manifest, image.config, image.history, image.layers):
                    attempt(read)
            for layer in attempt(storage.layers) or ():  # type: ignore[attr-defined]
                attempt(layer.lower_ids)
                out = io.BytesIO()
                if attempt(lambda layer=layer, out=out: layer.export(out)):  # type: ignore[misc]
                    self.assertIn(layer.diff_digest, ("", sha256(out.getvalue())))
                    rebuilt += 1
        return rebuilt

    def test_damage_anywhere(self) -> None:
        """Cut and flip every file of a store; what is read is right, or an error that says why."""
        store = self.builder()
        base = store.layer(make_tar(("d/", None), ("d/f", b"content")))
        top = store.layer(make_tar(("g", b"more"), ("d/.wh.f", b"")), base, names=["top"])
        image = store.image(top, "localhost/a:1")
        store.container(image, store.layer(None, top), "c")
        store.save()
        self.assertEqual(2, self.read_everything(store.root))
        rng = random.Random(9)
        files = [os.path.join(directory, name) for directory, _, names in os.walk(store.root)
                 for name in names if not os.path.islink(os.path.join(directory, name))]
        self.assertEqual(18, len(files))
        for path in sample(sorted(files)):
            data = read_bytes(path)
            places = rng.sample(range(len(data)), min(len(data), 12))
            damaged = [data[:i] for i in places] + [b"", data + data] + [
                data[:i] + bytes([rng.randrange(256)]) + data[i + 1:] for i in places]
            for content in damaged:
                put(path, content)
                self.assertLessEqual(self.read_everything(store.root), 2, path)
            os.unlink(path)
            self.read_everything(store.root)
            os.symlink("/etc/passwd", path)
            self.read_everything(store.root)
            os.unlink(path)
            os.mkdir(path)
            self.read_everything(store.root)
            os.rmdir(path)
            put(path, data)
        self.assertEqual(2, self.read_everything(store.root))

    def test_closing_twice(self) -> None:
        storage = cstor.Storage.open(self.sample().root)
        storage.close()
        storage.close()


# ================================================================================================
# 9. References
# ================================================================================================

class References(StoreTest):
    def setUp(self) -> None:
        super().setUp()
        self.store = store = self.builder()
        base = store.layer(make_tar(("f", b"x")), id="aa" * 32)
        self.image = store.image(base, "docker.io/library/alpine:latest", "quay.io/org/tool:v1",
                                 id="ab" * 32)
        self.other = store.image(base, "localhost/alpine:3", "registry.example:5000/org/tool:v2",
                                 id="ac" * 32)
        self.third = store.image(base, "docker.io/org/tool:v2", id="bd" * 32)
        self.nameless = store.image(base, id="ff" * 32)
        store.images[-1]["names"] = ["odd name", "UPPER"]
        store.save()

    def test_images(self) -> None:
        digest = self.store.images[0]["digest"]
        with self.open(self.store) as storage:
            for reference, image in (
                    ("alpine", self.image), ("alpine:latest", self.image), ("alpine:3", self.other),
                    ("localhost/alpine:3", self.other), ("docker.io/alpine", self.image),
                    ("index.docker.io/library/alpine", self.image), ("library/alpine", self.image),
                    ("tool:v1", self.image), ("quay.io/org/tool:v1", self.image),
                    ("registry.example:5000/org/tool:v2", self.other), ("org/tool:v2", self.third),
                    ("ab" * 32, self.image), ("sha256:" + "ab" * 32, self.image),
                    ("ab", self.image), ("b", self.third), ("sha256:b", self.third),
                    ("abab", self.image), (digest, self.image), (f"alpine@{digest}", self.image),
                    (f"quay.io/org/tool:v1@{digest}", self.image), (f"tool@{digest}", self.image),
                    ("containers-storage:alpine", self.image), ("@" + "ab" * 32, self.image),
                    (f"containers-storage:docker.io/library/alpine@{'ab' * 32}", self.image),
                    ("odd name", self.nameless), ("UPPER", self.nameless), ("f", self.nameless)):
                self.assertEqual(image, storage.image(reference).id, reference)
            for reference in ("", "nothing", "alpine:4", f"quay.io/wrong/name@{digest}",
                              f"alpine@sha256:{'0' * 64}", "0" * 64, "Alpine", "ine",
                              "containers-storage:", "quay.io/alpine", ":latest", "@", "\ud800",
                              "x" * 10_000, "sha256:", "@sha256:", "alpine:", "b:"):
                self.assertRaises(cstor.ImageUnknown, storage.image, reference)
            self.assertRaises(cstor.Unsupported, storage.image, "containers-storage:[overlay@/x]a")

    def test_ambiguity_lists_the_candidates(self) -> None:
        with self.open(self.store) as storage:
            with self.assertRaises(cstor.Ambiguous) as caught:
                storage.image("a")
            self.assertEqual([
                "ab" * 32 + "  docker.io/library/alpine:latest, quay.io/org/tool:v1",
                "ac" * 32 + "  localhost/alpine:3, registry.example:5000/org/tool:v2"],
                caught.exception.candidates)
            self.assertRaises(cstor.Ambiguous, storage.image, "tool:v2")
        done = self.run_on(self.store, "image inspect a", status=3)
        self.assertIn(("ab" * 32).encode(), done.stderr)

    def test_name_held_twice_belongs_to_the_last(self) -> None:
        self.store.images[1]["names"].append("docker.io/library/alpine:latest")
        self.store.save()
        with self.open(self.store) as storage:
            self.assertEqual(self.other, storage.image("alpine").id)

    def test_layers(self) -> None:
        store = StoreBuilder(self.dir + "/layers")
        tar = make_tar(("g", b"y"))
        one = store.layer(tar, id="11" * 32, names=["the-name"])
        mapped = store.layer(tar, one, id="12" * 32,
                             uidmap=[{"container_id": 0, "host_id": 1, "size": 1}])
        two = store.layer(make_tar(("h", b"z")), one, id="2b" * 32)
        store.save()
        link = store.read(f"overlay/{two}/link")
        with self.open(store) as storage:
            for reference, layer in ((one, one), ("the-name", one), (sha256(tar), one), (link, two),
                                     (sha256(tar)[7:20], one), (sha256(tar)[:15], one), ("2", two),
                                     (mapped, mapped), ("12", mapped)):
                self.assertEqual(layer, storage.layer(reference).id, reference)
            self.assertEqual(one, storage.layer("1").id)  # not the copy for other user IDs
            for reference in ("", "zz", "sha256:", "sha256:" + "0" * 64, "Z" * 26):
                self.assertRaises(cstor.LayerUnknown, storage.layer, reference)

    def test_containers(self) -> None:
        store = make_sample(self.dir + "/containers")
        entry = store.containers[0]
        with self.open(store) as storage:
            for reference in ("web", entry["id"], entry["id"][:1], entry["layer"]):
                self.assertEqual(entry["id"], storage.container(reference).id)
            self.assertRaises(cstor.ContainerUnknown, storage.container, "nobody")
            self.assertRaises(cstor.ContainerUnknown, storage.container, "")


# ================================================================================================
# 10. Layers
# ================================================================================================

class Files(StoreTest):
    """Where the bytes of a file are."""

    def test_names_are_cleaned_as_containers_storage_does(self) -> None:
        for name, clean in ((b"a/b", b"a/b"), (b"./a", b"a"), (b"/etc/x", b"etc/x"), (b"d/", b"d"),
                            (b"x/../y", b"y"), (b"../up", b"up"), (b"a//b", b"a/b"), (b"./", b""),
                            (b"..", b""), (b"a/./b/..", b"a"), (b"a..b/.c", b"a..b/.c"),
                            (b"...", b"..."), (b"a\n", b"a\n"), (b"a/..\n", b"a/..\n")):
            self.assertEqual(clean, cstor.clean_name(name), name)
        self.assertRaises(cstor.FormatError, cstor.clean_name, b"a\0b")

    def one(self, *entries: tuple[str, bytes | str | None]) -> tuple[StoreBuilder, str, str]:
        """Return a store of one layer, its ID and the host path of its diff."""
        store, (layer,) = self.stack(make_tar(*entries))
        return store, layer, store.path("overlay", layer, "diff")

    def refusal(self, store: StoreBuilder, layer: str, error: type[Exception], word: str) -> None:
        """Check that an export fails, with and without verification."""
        with self.open(store) as storage:
            for verify in (True, False):
                with self.assertRaisesRegex(error, word):
                    self.export(storage.layer(layer), verify=verify)

    def test_damage_is_named(self) -> None:
        store, layer, diff = self.one(("d/", None), ("d/file", b"content"), ("e", b"other"))
        path = diff + "/d/file"
        for content, word in ((b"CONTENT", "checksum failed"), (b"", "wrong size"),
                              (b"short", "wrong size: expected 7, got 5"),
                              (b"c" * 70_000, "got 70000")):
            put(path, content)
            with self.open(store) as storage, \
                    self.assertRaisesRegex(cstor.IntegrityError, word) as caught:
                self.export(storage.layer(layer))
            self.assertEqual((layer, b"d/file"), (caught.exception.layer, caught.exception.name))
        obstacles: list[tuple[Callable[[], object], str]] = [
            (lambda: None, '"d/file": is missing'), (lambda: os.mkfifo(path), "FIFO"),
            (lambda: os.mkdir(path), "directory"),
            (lambda: os.symlink("../e", path), "symbolic link"),
            (lambda: os.symlink(path, path), "symbolic link")]
        for make, word in obstacles:
            remove(path)
            make()
            self.refusal(store, layer, cstor.IntegrityError, word)
        for target in ("/etc", "../../../..", "loop"):
            remove(diff + "/d")
            os.symlink(target, diff + "/d")
            self.refusal(store, layer, cstor.IntegrityError, "is missing|loop")

    def test_symlinked_parents_stay_inside(self) -> None:
        store, layer, diff = self.one(("real/", None), ("lnk", "/real"), ("real/f", b"right"))
        tar = make_tar(("real/", None), ("lnk", "/real"), ("lnk/f", b"right"))
        store.tar_split(layer, tar)
        store.layers[0].update({"diff-digest": sha256(tar), "diff-size": len(tar)})
        store.save()
        with self.open(store) as storage:
            self.assertEqual(tar, self.export(storage.layer(layer)))

    def test_closed_files_ask_for_a_namespace(self) -> None:
        need(os.geteuid() == 0, "only root can lend its files to another user")
        store, layer, diff = self.one(("f", b"secret"))
        os.chmod(diff + "/f", 0)
        for directory, _, _ in os.walk(self.dir):
            os.chmod(directory, 0o755)
        self.guard(store.root)
        code = (  # imported first: the interpreter's own files may be closed to others
            "import argparse, ctypes, gettext, hashlib, locale, os, queue, resource, sys\n"
            "import threading\n"
            f"sys.path.insert(0, {HERE!r})\nimport cstor\n"
            "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
            f"sys.exit(cstor.main(['--root', {store.root!r}, 'layer', 'export', {layer!r}]))")
        for closed, words in (("", rb"/diff/f: Permission denied.*belongs to uid 0: run"),
                              (store.root, rb"store/overlay: Permission denied.*owner of the"),
                              (self.dir, rb"store: Permission denied.*owner of the store")):
            if closed:
                os.chmod(closed, 0o700)
                self.guard(store.root)
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, cwd="/", check=False)
            self.assertEqual(5, done.returncode, done.stderr)
            self.assertRegex(done.stderr, words)

    def test_mapped_layers_are_read_from_their_template(self) -> None:
        store, template, _ = self.one(("d/", None), ("d/f", b"data" * 3000))
        tar = store.tars[template]
        mapped = store.layer(tar, id="c" * 64,
                             uidmap=[{"container_id": 0, "host_id": 9, "size": 9}])
        home = store.path("overlay", mapped)
        shutil.rmtree(home + "/diff/d")
        os.makedirs(home + "/diff1/d")
        store.write(f"overlay/{mapped}/diff1/d/f", bytes(12000))
        store.write(f"overlay/{mapped}/lower", "l/" + store.read(f"overlay/{template}/link"))
        store.save()
        with self.open(store) as storage:
            self.assertEqual(tar, self.export(storage.layer(mapped)))
            with storage.layer(mapped).open_file(b"d/f") as file:
                self.assertEqual(b"data" * 3000, file.read())

    def test_metacopy_stubs_are_read_from_the_lower(self) -> None:
        store, base, diff = self.one(("f", b"data" * 3000))
        top = store.layer(make_tar(("f", b"data" * 3000), ("g", b"1")), base)
        stub = store.path("overlay", top, "diff/f")
        os.truncate(stub, 0)
        os.truncate(stub, 12000)
        try:
            os.setxattr(stub, "user.overlay.metacopy", b"")
        except OSError:
            need(False, "no user xattrs on the temporary directory's file system")
        store.save()
        with self.open(store) as storage:
            for verify in (True, False):
                self.assertEqual(store.tars[top], self.export(storage.layer(top), verify=verify))
        os.unlink(diff + "/f")
        self.refusal(store, top, cstor.IntegrityError, "is missing")

    def test_sparse_files_on_disk_are_no_stubs(self) -> None:
        store, layer, diff = self.one(("f", bytes(100_000)))
        os.truncate(diff + "/f", 0)
        os.truncate(diff + "/f", 100_000)
        with self.open(store) as storage:
            self.assertEqual(store.tars[layer], self.export(storage.layer(layer)))

    def flat(self) -> tuple[StoreBuilder, str]:
        store, layer, diff = self.one(("d/", None), ("d/f", b"flat file"), ("./e", b"other"),
                                      ("empty", b""))
        os.rename(diff, diff + "-was")
        entries: list[dict[str, Any]] = [{"type": "dir", "name": "d/"}]
        for name, data in (("d/f", b"flat file"), ("e", b"other")):
            digest = sha256(data)
            entries.append({"type": "reg", "name": name, "digest": digest, "size": len(data),
                            "xattrs": {"user.x": "eA=="}})
            store.write(f"overlay/{layer}/diff/{digest[7:9]}/{digest[9:]}", data)
        os.makedirs(store.path("overlay", layer, "composefs-data"))
        store.big_data(store.layers[0], "zstd-chunked-manifest", json.dumps(
            {"version": 1, "entries": entries}).encode(), "layers")
        return store.save(), layer

    def test_flat_layers(self) -> None:
        store, layer = self.flat()
        with self.open(store) as storage:
            self.assertEqual(store.tars[layer], self.export(storage.layer(layer)))
        os.rmdir(store.path("overlay", layer, "composefs-data"))
        for number in (2, 1):
            data = json.dumps({"format": number}).encode()
            store.big_data(store.layers[0], "zstd-chunked-layer-data", data, "layers")
            store.save()
            if number != 1:
                self.refusal(store, layer, cstor.IntegrityError, "is missing")
        with self.open(store) as storage:
            self.assertEqual(store.tars[layer], self.export(storage.layer(layer)))

    def test_damaged_flat_layers(self) -> None:
        store, layer = self.flat()
        toc = store.path("overlay-layers", layer,
                         os.fsdecode(cstor.big_data_file("zstd-chunked-manifest")))
        data = read_bytes(toc)
        for content, error, word in (
                (data[:-3], cstor.FormatError, "truncated"),
                (b"[]", cstor.FormatError, "it has no entries"),
                (data.replace(sha256(b"other").encode(), b"sha256:../../../../etc/passwd"),
                 cstor.IntegrityError, "not in the layer's TOC")):
            put(toc, content)
            self.refusal(store, layer, error, word)
        os.unlink(toc)
        self.refusal(store, layer, cstor.Unsupported, "zstd-chunked-manifest")

    def test_what_cannot_be_rebuilt_says_why(self) -> None:
        store = self.builder()
        lost = store.layer(make_tar(("f", b"1")))
        os.unlink(store.path(f"overlay-layers/{lost}.tar-split.gz"))
        torn = store.layer(None, lost, flags={"incomplete": True})
        writable = store.layer(None, lost)
        als = store.layer(None, lost, id="a" * 64, **{"diff-digest": "sha256:" + "1" * 64})
        store.write(f"overlay/{als}/additionallayer", "/var/lib/als/x")
        gone = store.layer(make_tar(("f", b"1")), lost, id="b" * 64)
        shutil.rmtree(store.path("overlay", gone))
        whiteout = store.layer(make_tar((".wh.x", b"content")), lost)
        store.save()
        for layer, word in ((lost, "the file is lost"), (torn, "has not finished"),
                            (writable, "writable layer"), (als, "additional layer store"),
                            (gone, "its files are gone"), (whiteout, "whiteout with content")):
            self.refusal(store, layer, cstor.Unsupported, word)

    def test_removal_before_reading(self) -> None:
        store, layer, _ = self.one(("f", b"1"))
        with cstor.Storage.open(store.root) as storage:
            found = storage.layer(layer)
            shutil.rmtree(store.path("overlay", layer))
            self.assertRaises(cstor.Unsupported, self.export, found)
            store.layers = []
            store.save()
            self.assertRaises(cstor.LayerUnknown, self.export, found)
            os.unlink(store.path(f"overlay-layers/{layer}.tar-split.gz"))
            self.assertRaises(cstor.LayerUnknown, self.export, found)

    def test_large_tocs_are_read_entry_by_entry(self) -> None:
        entries = ",".join(json.dumps({
            "type": "reg", "name": f"usr/lib/python3/{i:06d}é", "digest": sha256(b"%d" % i),
            "size": 4, "xattrs": {"a": "b" * 100}}) for i in range(60_000))
        data = f'{{"version":1,"entries":[{entries}],"x":1}}'.encode()
        chunks = (data[i:i + 65_536] for i in range(0, len(data), 65_536))
        found = cstor.read_objects(chunks, "toc")
        self.assertEqual(60_000, len(found))
        self.assertEqual(hashlib.sha256(b"7").digest(), found["usr/lib/python3/000007é".encode()])
        for cut in (10, 30, len(data) // 2, len(data) - 10):
            self.assertRaises(cstor.FormatError, cstor.read_objects, iter([data[:cut]]), "toc")

    def test_removal_while_reading(self) -> None:
        for after in ("diff", ""):
            shutil.rmtree(self.dir + "/store", ignore_errors=True)
            store, (layer,) = self.stack(make_tar(("a", b"1" * 10), ("b", b"2" * 10)))
            with cstor.Storage.open(store.root) as storage:
                pieces = storage.layer(layer).pieces()
                next(pieces), next(pieces)
                shutil.rmtree(store.path("overlay", layer, after))
                store.layers = []
                store.save()
                with self.assertRaisesRegex(cstor.LayerUnknown, "removed while"):
                    list(pieces)

    def removed_by(self, words: str, marked: bool) -> tuple[str, tuple[int, str, str]]:
        """Run a command whose layer is removed when it opens its second file."""
        shutil.rmtree(self.dir + "/store", ignore_errors=True)
        store, (layer,) = self.stack(make_tar(
            ("d/a", b"1" * 10), ("d/b", b"2" * 5000), ("d/c", b"3" * 10)))
        store.image(layer, "localhost/t:latest")
        store.save()
        real, opened = cstor.LayerFiles.open, itertools.count(1)

        def open_file(files: Any, *args: Any) -> int:
            if next(opened) == 2:
                shutil.rmtree(store.path("overlay", layer))
                store.layers = [{**store.layers[0], "flags": {"incomplete": True}}] * marked
                store.save()
            return real(files, *args)

        with mock.patch.object(cstor.LayerFiles, "open", open_file), \
                mock.patch.object(cstor, "default_workers", lambda: 1):
            return layer, self.call(*words.replace("LAYER", layer).split(), "--root", store.root)

    def test_images_that_are_removed_meanwhile(self) -> None:
        """podman marks a layer, removes its files, and then its record."""
        out = self.dir + "/out"
        for words in ("image extract t OUT", "image extract t OUT --verify", "image cp t:/d OUT",
                      "image export t -o OUT", "image export t --as=docker-archive -o OUT",
                      "image copy-to-oci t OUT:x", "image toc t --digests",
                      "image cat t d/a d/b d/c -o OUT", "layer extract LAYER OUT",
                      "layer export LAYER -o OUT", "layer stream LAYER -o OUT"):
            for marked in (False, True):
                with self.subTest(words, marked=marked):
                    layer, (status, _, said) = self.removed_by(words.replace("OUT", out), marked)
                    self.assertEqual(3, status, said)
                    self.assertRegex(said, rf"error: .*layer not known: {layer}: it was removed "
                                           r"while .*was read")
                    self.assertFalse(os.path.lexists(out))
        with cstor.Storage.open(self.dir + "/store") as storage, self.assertRaisesRegex(
                cstor.Unsupported, "its files are gone: its creation or removal has not finished"):
            storage.layer(layer).diff()


# ================================================================================================
# 11. Tar headers
# ================================================================================================

class MemberTest(StoreTest):
    def members(self, tar: bytes) -> list[cstor.Member]:
        store = StoreBuilder(tempfile.mkdtemp(dir=self.dir))
        layer = store.layer(None)
        store.tar_split(layer, tar)
        with cstor.Storage.open(store.save().root) as storage:
            return list(storage.layer(layer).members())


class Fields(MemberTest):
    """The fields of members, against tarfile."""

    FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

    @staticmethod
    def random_info(rng: random.Random, kind: str, name: str) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        wide = kind != "ustar"
        info.type = rng.choice((tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
                                tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE))
        info.mode = rng.choice((0, 0o644, 0o4755, 0o7777))
        ids = (0, 1000, 2097151, *((2097152, 2**32 - 2) if wide else ()))
        info.uid, info.gid = rng.choice(ids), rng.choice(ids)
        info.mtime = rng.choice((0, 1, 1700000000, *((-1, -5000000000, 2**35) if wide else ()),
                                 *((1700000000.5, -1.25) if kind == "pax" else ())))
        info.uname = rng.choice(("", "root", "caf\u00e9" if wide else "x", "u" * 31))
        info.gname = rng.choice(("", "wheel"))
        if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info.linkname = rng.choice(("a", "../b c", "l" * 100, *(("l" * 300, "\udcff") if wide
                                                                  else ())))
        if info.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            info.devmajor, info.devminor = rng.choice(((1, 3), (255, 2097151)))
        return info

    def test_fields_against_tarfile(self) -> None:
        rng = random.Random(4)
        types = {tarfile.REGTYPE: "reg", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink",
                 tarfile.LNKTYPE: "hardlink", tarfile.CHRTYPE: "char", tarfile.BLKTYPE: "block",
                 tarfile.FIFOTYPE: "fifo"}
        for kind, number in self.FORMATS.items():
            out = io.BytesIO()
            infos = []
            with tarfile.open(fileobj=out, mode="w", format=number,
                              errors="surrogateescape") as tar:
                for i in range(300):
                    name = f"{i}/" + rng.choice(("x", "n" * 90 + "/" + "m" * 90, "p" * 140 + "/q"))
                    info = self.random_info(rng, kind, name)
                    info.size = rng.choice((0, 1, 511, 512, 513)) if info.isreg() else 0
                    tar.addfile(info, io.BytesIO(b"z" * info.size))
                    infos.append(info)
            members = self.members(out.getvalue())
            self.assertEqual(len(infos), len(members))
            for info, member in zip(infos, members):
                self.assertEqual(
                    (info.name.encode(), types[info.type], info.size, info.mode, info.uid, info.gid,
                     int(info.mtime * 4) * 25 * 10**7, info.linkname.encode(
                         "utf-8", "surrogateescape"), info.uname.encode(), info.gname.encode(),
                     info.devmajor, info.devminor),
                    (member.name.rstrip(b"/"), member.type, member.size, member.mode, member.uid,
                     member.gid, member.mtime_ns, member.linkname, member.uname, member.gname,
                     member.devmajor, member.devminor), (kind, info.name))

    def test_xattrs(self) -> None:
        tar = make_tar(("f", b"x"), pax_headers={
            "SCHILY.xattr.user.a": "v=1\n", "SCHILY.xattr.security.capability": "\x01\x02",
            "LIBARCHIVE.xattr.user.a": "d3Jvbmc", "LIBARCHIVE.xattr.user.b%3Dc": "AP8",
            "comment": "c"})
        member = self.members(tar)[0]
        self.assertEqual({b"user.a": b"v=1\n", b"security.capability": b"\x01\x02",
                          b"user.b=c": b"\x00\xff"}, member.xattrs)
        self.assertEqual(b"c", member.pax[b"comment"])
        self.assertRaises(cstor.FormatError, getattr, self.members(make_tar(
            ("f", b"x"), pax_headers={"LIBARCHIVE.xattr.a": "A"}))[0], "xattrs")
        self.assertRaises(AttributeError, getattr, member, "colour")

    def test_checksums_of_headers(self) -> None:
        tar = bytearray(make_tar(("f", b"x"), uname="caf\u00e9"))
        block = bytes(tar[1024:1536]) if tar[156:157] == b"x" else bytes(tar[:512])
        cstor.check_sum(block)
        signed = sum(byte - 256 * (byte > 127) for byte in block[:148] + b" " * 8 + block[156:])
        cstor.check_sum(block[:148] + b"%06o\0 " % signed + block[156:])
        for i in range(512):
            damaged = block[:i] + bytes([block[i] ^ 1]) + block[i + 1:]
            if not 154 <= i < 156:  # the checksum's own end
                self.assertRaises(cstor.FormatError, cstor.check_sum, damaged)

    def test_times(self) -> None:
        for text, ns in ((b"0", 0), (b"1.5", 1500000000), (b"-1.25", -1250000000),
                         (b"7.", 7 * 10**9),
                         (b"1.1234567899", 1123456789), (b"-0.5", -500000000)):
            self.assertEqual(ns, cstor.parse_pax_time(text))
        for text in (b"", b"-", b".5", b"1e5", b"1.5x", b"9" * 19, b" 1"):
            self.assertRaises(cstor.FormatError, cstor.parse_pax_time, text)


class Headers(unittest.TestCase):
    def test_numbers(self) -> None:
        for field, value in ((b"0000644\0", 0o644), (b"   644 \0", 0o644), (b"644\0junk", 0o644),
                             (b"        ", 0), (b"\0" * 12, 0), (b"\x80" + bytes(10) + b"\x05", 5),
                             (b"\x80\0\0\0\x7f" + b"\xff" * 7, (1 << 63) - 1),
                             (b"777777777777", 0o777777777777)):
            self.assertEqual(value, cstor.parse_number(field), field)
        for field, value in ((b"\xff" * 12, -1), (b"\xff" * 11 + b"\xfe", -2)):
            self.assertEqual(value, cstor.parse_number(field))
        for field in (b"0000648\0", b"-1\0     ", b"+7      ", b"0o17    ", b"1_0     ",
                      b"\x80\0\0\0\xff" + b"\xff" * 7, b"12 34\0\0\0"):
            self.assertRaises(cstor.FormatError, cstor.parse_number, field)

    def test_pax_records(self) -> None:
        self.assertEqual([(0, 11, b"path", b"a"), (11, 15, b"", b"a=b\n")],
                         list(cstor.pax_spans(b"+11 path=a\na=b\n")))
        self.assertEqual({b"path": b"b", b"k": b"v=w\n"},
                         cstor.parse_pax(b"9 path=a\n9 path=b\n9 k=v=w\n\n"))
        self.assertEqual({b"GNU.sparse.map": b"0,5,9,1"}, cstor.parse_pax(b"".join(
            b"%d GNU.sparse.%s\n" % (len(text) + 15, text)
            for text in (b"offset=0", b"numbytes=5", b"offset=9", b"numbytes=1"))))
        for data in (b"9 path=a", b"99 path=a\n", b"0 path=a\n", b"path=a\n", b"3 a\n", b"-5 a=b\n",
                     b"4 =a\n", b"9" * 30 + b" a=b\n", b"5 a=b\n\0", b" 6 a=b\n", b"7 a=b\n",
                     b"6 a=b\n\0", b"25 GNU.sparse.numbytes=5\n"):
            self.assertRaises(cstor.FormatError, cstor.parse_pax, data)

    def test_a_long_name_that_looks_like_a_header_is_none(self) -> None:
        tar = make_tar(("d" * 200 + "/" + "0" * 156 + "5", b"content"))
        entries = list(split_tar(tar))
        header = base64.b64decode(entries[0]["payload"])
        member = cstor.Member(header, b"name", 7, base64.b64encode(bytes(8)))
        self.assertEqual((b"0", 7, 505), (member.typeflag, member.stored, member.padding))

    def test_limits_are_errors(self) -> None:
        block = tarfile.TarInfo("f")
        block.size, block.type = (1 << 20) + 1, b"x"
        header = block.tobuf(tarfile.USTAR_FORMAT)
        with self.assertRaisesRegex(cstor.FormatError, "more than"):
            cstor.Member(header + bytes(2 << 20), b"f", 1, b"")
        for wrong in (b"", bytes(100), header, header + bytes(512)):
            self.assertRaises(cstor.FormatError, cstor.Member, wrong, b"f", 1, b"")


def tar_members(tar: bytes | bytearray) -> Iterator[tuple[cstor.Member, Iterator[bytes]]]:
    """Yield the members of a physical tar, each with its content, of sparse files expanded."""
    tree = cstor.LayerTree(None)
    for _, member, content in cstor.read_stream([bytes(tar)], "tar"):
        if member:
            yield member, tree.expand(member, content)


class FieldsOfArchives(MemberTest):
    """Member.parse(), read_stream() and tar_header() against GNU tar and tarfile."""

    KINDS = {"-": "reg", "d": "dir", "l": "symlink", "h": "hardlink", "c": "char", "b": "block",
             "p": "fifo"}

    @staticmethod
    def read(tar: bytes) -> list[tuple[cstor.Member, bytes]]:
        """Return the members of a physical tar with their contents."""
        return [(member, b"".join(content)) for member, content in tar_members(tar)]

    def tree(self) -> None:
        """Make a tree with names, times and types of all kinds."""
        top = self.dir + "/tree"
        os.makedirs(os.path.join(top, "d" * 60, "e" * 60))
        names = ("plain", "d" * 60 + "/" + "e" * 60 + "/" + "f" * 60, "caf\u00e9",
                 "latin1-\udce9", "n" * 240, "with space")
        for i, name in enumerate(names):
            path = os.fsencode(os.path.join(top, name))
            put(path, bytes([65 + i]) * (i * 300))
            os.chmod(path, (0o644, 0o4711, 0o2755, 0o1600, 0, 0o777)[i])
            os.utime(path, ns=(0, (1700000000_123456789, 0, 1, -1500000000_250000000, 999999999,
                                   2**33 * 10**9)[i]))
        os.symlink("../" + "t" * 90, top + "/short")
        os.symlink("/" + "t" * 190, top + "/long")
        os.link(top + "/plain", top + "/second")
        os.mkfifo(top + "/fifo")
        os.utime(top, ns=(0, -1500000000))

    def list_by_tar(self, tar: bytes) -> list[tuple[str, ...]]:
        """Return (mode, type, owner, size, time, name and link) as GNU tar prints them."""
        text = subprocess.run(
            ["tar", "-tv", "--full-time", "--numeric-owner", "--quoting-style=literal"], input=tar,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
            env={**IDLE, "TZ": "UTC"}).stdout
        rows: list[tuple[str, ...]] = []
        for line in os.fsdecode(text).splitlines():
            mode, owner, size, day, moment, name = line.split(None, 5)
            rows.append((mode[1:10], self.KINDS[mode[0]], owner, size, f"{day} {moment}", name))
        return rows

    @staticmethod
    def row(member: cstor.Member) -> tuple[str, ...]:
        size = f"{member.devmajor},{member.devminor}" if member.type in ("char", "block") \
            else str(member.size)
        seconds, fraction = divmod(abs(member.mtime_ns), 10**9)
        if member.mtime_ns < 0:
            seconds = -seconds  # GNU tar prints -1.25 as one second before 1970, and ".25"
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
        if fraction:
            moment += f".{fraction:09d}".rstrip("0")
        name = os.fsdecode(member.name)
        arrow = {"symlink": " -> ", "hardlink": " link to "}.get(member.type)
        return (stat.filemode(member.mode)[1:], member.type, f"{member.uid}/{member.gid}", size,
                moment, name + (arrow + os.fsdecode(member.linkname) if arrow else ""))

    def test_members_as_gnu_tar_lists_them(self) -> None:
        """Those of the tar, and those of its tar-split data."""
        need_tools("tar")
        self.tree()
        seen = 0
        for kind in ("v7", "oldgnu", "gnu", "ustar", "posix", "posix --xattrs"):
            tar = subprocess.run(
                ["tar", "-C", self.dir, "--sort=name", *f"--format={kind}".split(), "-c", "tree"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
            members = self.read(tar)
            listed = self.list_by_tar(tar)
            self.assertEqual(listed, [self.row(member) for member, _ in members], kind)
            self.assertEqual(listed, [self.row(member) for member in self.members(tar)], kind)
            for member, content in members:
                if member.type == "reg":
                    path = os.path.join(os.fsencode(self.dir), member.name)
                    self.assertEqual(read_bytes(path), content, (kind, member.name))
                    seen += 1
        self.assertGreaterEqual(seen, 20)  # v7 and ustar hold not all of the names and times

    def test_sparse_files_are_expanded(self) -> None:
        need_tools("tar")
        with tempfile.TemporaryDirectory() as folder:
            for name, tar in sparse_tars():
                subprocess.run(["tar", "-x", "-C", folder], input=tar, check=True)
                members = self.read(tar)
                self.assertEqual(7, len(members), name)
                for member, content in members:
                    self.assertEqual(read_bytes(os.path.join(folder, os.fsdecode(member.name))),
                                     content, (name, member.name))
                    self.assertEqual(len(content), member.size)

    def test_names_as_in_tar_split(self) -> None:
        store = self.sample()
        with self.open(store) as storage:
            for layer in storage.layers():
                if layer.diff_digest:
                    for member in layer.members():
                        again = cstor.Member.parse(member.header)
                        self.assertEqual((member.name, member.size, member.type, member.mtime_ns),
                                         (again.name, again.size, again.type, again.mtime_ns))

    def test_odd_archives_have_the_members_that_tarfile_finds(self) -> None:
        skipped = {"gnu-long-twice", "pax-names-dir", "v7-dir-with-size", "dir-of-negative-size",
                   "pax-size-negative", "pax-global-twice", "pax-then-global", "pax-size-empty",
                   "pax-twice"}  # here tarfile does not do what Go does
        for name, tar in [*header_tars(), *name_tars(), *end_tars(), *content_tars()]:
            if name in skipped:
                continue
            with self.subTest(name):
                found = [(member.name.rstrip(b"/"), data) for member, data in self.read(tar)
                         if member.type != "global"]
                wanted: list[tuple[bytes, bytes]] = []
                if tar:
                    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape",
                                      encoding="utf-8") as opened:
                        infos = iter(opened)
                        while True:
                            try:
                                info = next(infos)
                            except (StopIteration, tarfile.ReadError):
                                break  # it refuses a missing end, which Go takes
                            content = opened.extractfile(info) if info.isreg() else None
                            wanted.append((os.fsencode(info.name.rstrip("/")),
                                           content.read() if content else b""))
                self.assertEqual(wanted, found)

    def test_a_v7_directory_has_no_content_whatever_its_size_says(self) -> None:
        tar = (entry(b"d/", typeflag=b"\0", size=600, magic=b"")
               + entry(b"d/f", b"content", b"\0", magic=b"") + END)
        self.assertEqual([(b"d/", "dir", b""), (b"d/f", "reg", b"content")],
                         [(member.name, member.type, data) for member, data in self.read(tar)])

    def test_headers_made_and_read(self) -> None:
        rng = random.Random(11)
        small = 0
        tars: list[tuple[dict[str, Any], bytes]] = []
        for i in range(3000):
            name = b"%d/" % i + rng.choice((
                b"x", b"n" * 90 + b"/" + b"m" * 80, b"\xe9\xff", b"n" * 300, b"p" * 140 + b"/q",
                "caf\u00e9".encode(), b"new\nline", b" ", b"d/" * 60 + b"f"))
            flag = rng.choice((b"0", b"1", b"2", b"3", b"4", b"5", b"6"))
            fields: dict[str, Any] = {
                "mode": rng.randrange(0o10000), "uid": rng.choice((0, 2097151, 2097152, 2**32 - 2)),
                "gid": rng.choice((0, 1000, 2**31)),
                "size": rng.choice((0, 1, 8**11 - 1, 8**11)) if flag == b"0" else 0,
                "mtime_ns": rng.choice((0, 1, -1, 10**9, -10**9, 1700000000_120000000,
                                        8**11 * 10**9, -1500000001, 8**11 * 10**9 - 10**9)),
                "linkname": rng.choice((b"a", b"l" * 100, b"l" * 101, b"\xff", b"x y")
                                       ) if flag in b"12" else b"",
                "uname": rng.choice((b"", b"root", b"u" * 31, b"u" * 32, "\u00fc".encode())),
                "gname": rng.choice((b"", b"wheel", b"\xe9" * 40)),
                "devmajor": rng.choice((0, 255, 2097151)) if flag in b"34" else 0,
                "devminor": rng.choice((0, 3)) if flag in b"34" else 0,
                "xattrs": rng.choice(({}, {}, {b"user.a": b"v=1\n\0", b"user.b=c%": b"\0\xff"},
                                      {b"security.capability": b"\1"}))}
            header = cstor.tar_header(name, flag, **fields)
            self.assertEqual(header, cstor.tar_header(name, flag, **fields))
            member = cstor.Member.parse(header)
            self.assertEqual({"name": name, "flag": flag, **fields},
                             {"name": member.name, "flag": member.typeflag,
                              **{key: getattr(member, key) for key in fields}})
            fits = (cstor.split_name(name)[1] != b"" and fields["uid"] < 8**7
                    and fields["gid"] < 8**7 and fields["size"] < 8**11
                    and fields["mtime_ns"] >= 0 and not fields["mtime_ns"] % 10**9
                    and fields["mtime_ns"] < 8**11 * 10**9 and len(fields["linkname"]) <= 100
                    and len(fields["uname"]) < 32 and len(fields["gname"]) < 32
                    and not fields["xattrs"])
            self.assertEqual(fits, len(header) == 512, (name, fields))
            small += fits
            if fields["size"] < 2:
                tars.append(({"name": name, "flag": flag, **fields},
                             header + (b"z" * fields["size"]).ljust(512 * fields["size"], b"\0")))
        self.assertGreater(small, 20)
        whole = b"".join(tar for _, tar in tars) + END
        with tarfile.open(fileobj=io.BytesIO(whole), errors="surrogateescape",
                          encoding="utf-8") as opened:
            infos = list(opened)
        self.assertEqual(len(tars), len(infos))
        for (fields, _), info in zip(tars, infos):
            self.assertEqual(
                (os.fsdecode(fields["name"]), fields["mode"], fields["uid"], fields["size"],
                 os.fsdecode(fields["linkname"]), fields["devmajor"]),
                (info.name, info.mode, info.uid, info.size, info.linkname, info.devmajor))
        if shutil.which("tar"):
            plain = [item for item in tars if b"\n" not in item[0]["name"]]
            tar = b"".join(data for _, data in plain) + END
            self.assertEqual(self.list_by_tar(tar),
                             [self.row(member) for member, _ in self.read(tar)])

    def test_what_no_header_holds_is_refused(self) -> None:
        for wrong in ({"name": b"a\0b"}, {"linkname": b"a\0b"}, {"uname": b"\0"},
                      {"devmajor": 8**7}, {"devminor": -1}, {"xattrs": {b"user.x": bytes(1 << 20)}},
                      {"xattrs": {b"user.\0": b"v"}}):
            with self.subTest(str(wrong)[:40]), self.assertRaises(cstor.FormatError):
                fields: dict[str, Any] = {"name": b"f", "typeflag": b"0", **wrong}
                cstor.tar_header(**fields)

    def test_an_absolute_name_is_split_like_any_other(self) -> None:
        name = b"/" + b"a" * 50 + b"/" + b"b" * 49
        header = cstor.tar_header(name, b"0")
        self.assertEqual((name, 512), (cstor.Member.parse(header).name, len(header)))

    def test_numbers_with_many_zeros_are_numbers(self) -> None:
        """As for Go's ParseInt; Python by itself refuses more than 4300 digits."""
        zeros = b"0" * 5000
        self.assertEqual((5, -5), (cstor.parse_decimal(zeros + b"5"),
                                   cstor.parse_decimal(b"-" + zeros + b"5")))
        tar = pax({b"size": zeros + b"1"}) + entry(b"f", b"x") + END
        self.assertEqual([b"x"], [data for _, data in self.read(tar)])

    def test_damaged_archives_raise_only_errors_of_ours(self) -> None:
        rng = random.Random(5)
        bases = [tar for name, tar in [*header_tars(), *name_tars(), *sparse_by_hand()]]
        outcomes = {True: 0, False: 0}
        for _ in range(4000):
            tar = bytearray(rng.choice(bases))
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(tar))
                block = at // 512 * 512
                way = rng.randrange(4)
                if way == 0:
                    tar[at] ^= 1 << rng.randrange(8)
                elif way == 1:
                    del tar[max(at, 512):]
                elif way == 2:
                    other = rng.randrange(len(tar)) // 512 * 512
                    tar[block:block + 512], tar[other:other + 512] = \
                        tar[other:other + 512], tar[block:block + 512]
                else:
                    tar.extend(bytes(-len(tar) % 512))
                    tar[block + rng.choice((100, 124, 136, 156, 257, 330))] = rng.choice(
                        b"\0 07x\x80\xffLKg")
                    tar[block:] = self.sealed(tar[block:block + 512]) + tar[block + 512:]
            try:
                for member, content in tar_members(tar):
                    member.read_fields()
                    if member.size < 1 << 20:
                        self.assertEqual(member.size, len(b"".join(content)))
                    else:
                        break
                outcomes[True] += 1
            except cstor.CstorError:
                outcomes[False] += 1
        self.assertGreater(min(outcomes.values()), 500)

    @staticmethod
    def sealed(block: bytes | bytearray) -> bytes:
        whole = bytes(block).ljust(512, b"\0")
        whole = whole[:148] + b" " * 8 + whole[156:]
        return whole[:148] + b"%06o\0 " % sum(whole) + whole[156:]

    def test_bombs_of_headers_end_soon(self) -> None:
        record = b"6 a=b\n"
        tar = entry(b"x", record, b"x") * 8000 + entry(b"f", b"data") + END
        self.assertEqual([b"data"], [data for _, data in self.read(tar)])
        table = b"999999999\n" + b"0\n" * (1000 * 256)
        self.assertRaises(cstor.FormatError, self.read, sparse_1_0(table, b"", 0) + END)
        tar = pax({b"GNU.sparse.map": b"4611686018427387904,1", b"GNU.sparse.size": b"1"}
                  ) + entry(b"f", b"1") + END
        with self.assertRaises(cstor.FormatError):
            for _, content in tar_members(tar):
                next(content)
                self.fail("4 EiB of zeros were begun")

    def test_a_file_of_holes_is_passed_over_by_what_is_stored(self) -> None:
        tar = pax({b"GNU.sparse.major": b"0", b"GNU.sparse.minor": b"1",
                   b"GNU.sparse.realsize": b"%d" % (1 << 33)}) + entry(b"f") + END
        self.assertEqual([1 << 33], [member.size for member, _ in tar_members(tar)])


# ================================================================================================
# 12. tar-split
# ================================================================================================

class TarSplitTests(StoreTest):
    """Spellings, damage, sparse files, the second thread."""

    def entries(self, text: bytes) -> list[tuple[bytes, bytes | None, int, bytes]]:
        """Return what is read, in chunks of several sizes, which must not matter."""
        results = []
        for step in (len(text) or 1, 1000, 61):
            chunks = (text[i:i + step] for i in range(0, len(text), step))
            results.append(list(cstor.TarSplit(chunks, "f")))
        joined = [self.merge(result) for result in results]
        self.assertEqual([joined[0]] * 3, joined)
        return joined[0]

    @staticmethod
    def merge(entries: list[tuple[bytes, bytes | None, int, bytes]]
              ) -> list[tuple[bytes, bytes | None, int, bytes]]:
        """Join segments that no content follows with what comes next: splits carry no meaning."""
        merged, pending = [], b""
        for segment, name, size, checksum in entries:
            pending += segment
            if name is not None:
                merged.append((pending, name, size, checksum))
                pending = b""
        return [*merged, (pending, None, 0, b"")]

    def test_spellings(self) -> None:
        crc = base64.b64encode(b"12345678").decode()
        expected = [(b"head", "d\u00e9\u2028<\"\\/f".encode(), 5, crc.encode()),
                    (b"more", b"raw\xff", 0, b""), (b"end", None, 0, b"")]
        name = json.dumps("d\u00e9\u2028<\"\\/f")
        raw = base64.b64encode(b"raw\xff").decode()
        go = "".join(go_json(entry) for entry in (
            {"type": 2, "payload": "aGVhZA=="},
            {"type": 1, "name": "d\u00e9\u2028<\"\\/f", "size": 5, "payload": crc, "position": 1},
            {"type": 2, "payload": "bW9yZQ==", "position": 2},
            {"type": 1, "name_raw": raw, "payload": None, "position": 3},
            {"type": 2, "payload": "ZW5k", "position": 4}))
        for text in (go, go.replace("\n", ""), go.replace("\n", "\r\n \t"), go[:-1],
                     ('{"payload":"aGVhZA==", "type":2} '
                      f'{{ "name": {name},"type":1,"payload":"{crc}","size":5}}'
                      '{"type":2,"payload":"bW9yZQ==","x":{"y":[1,"}"]}}'
                      f'{{"type":1,"name_raw":"{raw}"}}{{"type":2,"payload":"ZW5k"}}'),
                     ('{"Type":2,"PAYLOAD":"aGVh\\nZA=="}'
                      f'{{"type":1,"name":{name},"size":5,"payload":"{crc}"}}'
                      '{"type":2,"payload":"bW9y"}{"type":2,"payload":"ZQ=="}'
                      f'{{"type":1,"name":"","name_raw":"{raw}","size":0,"payload":""}}'
                      '{"type":2,"payload":"ZW5k"}{"type":2,"payload":null}{"type":2}'
                      '{"type":2,"payload":""}')):
            self.assertEqual(expected, self.entries(text.encode()), text)

    def test_many_spellings_of_one_object(self) -> None:
        rng = random.Random(11)
        entries = split_tar(make_tar(*((f"dir/\u00e9 {i}\"", b"x" * i) for i in range(40))))
        expected = self.entries("".join(map(go_json, entries)).encode())
        for _ in range(30):
            text = ""
            for entry in entries:
                items = list(entry.items())
                rng.shuffle(items)
                text += rng.choice(("", " ", "\n\n")) + json.dumps(
                    dict(items), ensure_ascii=rng.random() < .5,
                    separators=rng.choice(((",", ":"), (" , ", " :\n"))))
            self.assertEqual(expected, self.entries(text.encode()))

    def test_malformed_objects(self) -> None:
        good = b'{"type":2,"payload":"aGVhZA=="}\n'
        for text in (b"{", b"[]", b"7", b'"x"', b"{}", b'{"type":3}', b'{"type":"2"}',
                     b'{"type":2,"payload":5}', b'{"type":2,"payload":"a"}',
                     b'{"type":2,"payload":"aGV*ZA=="}', b'{"type":2,"payload":"aGVhZA="}',
                     b'{"type":2,"payload":"aGVhZA==="}', b'{"type":2,"payload":"aGVhZA==',
                     b'{"type":2,"payload":"aGVhZA=="',
                     b'{"type":1,"name":"f","size":1,"payload":"MTIzNA=="}',
                     b'{"type":1,"name":"f","size":1,"payload":null}', b'{"type":1,"name":["f"]}',
                     b'{"type":1,"name":"f","size":1e3,"payload":"MTIzNDU2Nzg="}',
                     b'{"type":1,"name":"f","size":%d,"payload":"MTIzNDU2Nzg="}' % (1 << 70),
                     b'{"type":1,"name_raw":"*"}', b"[" * 100_000,
                     b'{"type":2,"x":"' + b"y" * 100_000, b"\xff", b"\0"):
            for before in (b"", good, good * 3000):
                with self.assertRaises(cstor.FormatError, msg=text) as caught:
                    list(cstor.TarSplit(iter([before + text]), "f"))
                self.assertEqual("f", caught.exception.file)
                assert caught.exception.offset is not None
                self.assertTrue(
                    len(before.rstrip()) <= caught.exception.offset <= len(before + text))

    def test_segments_of_any_size_pass_through_in_bounded_parts(self) -> None:
        blob = random.Random(1).getrandbits(8 * 30_000_000).to_bytes(30_000_000, "big")
        text = b'{"type":2,"payload":"' + base64.b64encode(blob) + b'","position":0}\n'
        chunks = (text[i:i + 99_991] for i in range(0, len(text), 99_991))
        parts = [entry[0] for entry in cstor.TarSplit(chunks, "f")]
        self.assertEqual(blob, b"".join(parts))
        self.assertLess(max(map(len, parts)), 2 << 20)
        for cut in (100, len(text) - 20, len(text) - 2):
            with self.assertRaises(cstor.FormatError):
                list(cstor.TarSplit(iter([text[:cut]]), "f"))

    def test_gzip_members_and_damage(self) -> None:
        data = os.urandom(200_000)
        path = self.dir + "/x.gz"

        def read(content: bytes) -> bytes:
            put(path, content)
            with open(path, "rb") as file:
                return b"".join(cstor.gunzip(file.fileno(), path))

        packed = gzip.compress(data)
        for content, found in ((packed, data), (packed * 2, data * 2),
                               (gzip.compress(b"x") * 20_000, b"x" * 20_000),
                               (packed + gzip.compress(b"") + gzip.compress(b"x"), data + b"x")):
            self.assertEqual(found, read(content))
        for wrong in (b"", packed[:-1], packed[:1000], packed[:5], packed + b"garbage", b"plain",
                      *(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1:]
                        for at in (5000, len(packed) - 5))):
            self.assertRaises(cstor.FormatError, read, wrong)

    def test_every_damaged_byte_is_noticed(self) -> None:
        """Flip and cut tar-split data at every place; the tar is right, or an error is raised."""
        tar = make_tar(("d/", None), ("d/file", b"content"), ("d/link", "file"),
                       ("d/" + "n" * 120, b"x" * 600))
        store, (layer,) = self.stack(tar)
        path = store.path(f"overlay-layers/{layer}.tar-split.gz")
        packed = read_bytes(path)
        text = gzip.decompress(packed)
        rng = random.Random(2)
        damaged = [packed[:i] for i in range(0, len(packed), 7)]
        damaged += [packed[:i] + bytes([packed[i] ^ 1 << rng.randrange(8)]) + packed[i + 1:]
                    for i in range(len(packed))]
        for i in rng.sample(range(len(text)), 700):
            damaged.append(gzip.compress(text[:i] + bytes([rng.randrange(256)]) + text[i + 1:], 1))
            damaged.append(gzip.compress(text[:i], 1))
        right = 0
        with cstor.Storage.open(store.root) as storage:
            record = storage.layer(layer)
            for content in sample(damaged):
                put(path, content)
                for verify in (True, False):
                    try:
                        result = self.export(record, verify=verify)
                    except cstor.CstorError:
                        continue
                    if verify:
                        self.assertEqual(tar, result)
                        right += 1
                    self.assertEqual(len(tar), len(result))
        self.assertGreater(right, 0)  # some bytes carry no meaning: gzip's time, "position"

    def test_no_more_than_the_size_that_is_known(self) -> None:
        """A bomb of some hundred KB writes nothing; tar-split data that are short end with it."""
        tar = make_tar(("f", b"1" * 600))
        store, (layer,) = self.stack(tar)
        whole, bomb = split_tar(tar), segment(bytes(6 << 20))
        huge = [whole[0], {**whole[1], "size": 10**15}, *whole[2:]]
        for entries, got, most in (([bomb] * 3 + whole, "more", 0), ([*whole, bomb], "more", None),
                                   ([*whole, segment(bytes(512))], "more", None), (huge, "", 512),
                                   (whole[:2], "1112", None)):
            path = store.rows(layer, entries)
            for command in ("export", "stream")[:1 + (entries[0] is bomb)]:
                done = self.run_on(store, "layer", command, layer, status=4 if got else 6)
                if got:
                    self.assertIn(f"its tar has the wrong size: expected {len(tar)}, got {got} "
                                  f"(its record's diff-size and {path} disagree, one is damaged; "
                                  f"its files are in overlay/{layer}/diff)", done.err)
                self.assertLessEqual(len(done.stdout), 2 * len(tar) if most is None else most + 99)
        text = read_bytes(store.rows(layer, whole))
        for kind, right, wrong in (("segments", 65_536, 70_000), ("gzip members", 65_000, 200_000)):
            for count in (right, wrong):
                if kind == "segments":
                    store.rows(layer, [{"type": 2, "payload": ""}] * count + whole)
                else:
                    put(path, gzip.compress(b"") * count + text)
                done = self.run_on(store, "layer export", layer, status=6 * (count == wrong))
                self.assertEqual(tar if count == right else b"", done.stdout)
            self.assertIn(f"more than 65536 empty {kind}", done.err)

    def test_headers_that_are_too_long(self) -> None:
        store, (layer,) = self.stack(make_tar(("f", b"1")))
        store.layers[0]["diff-size"] = 20 << 20
        store.save()
        store.rows(layer, [segment(bytes(3 << 20))] * 3 + split_tar(store.tars[layer]))
        with self.open(store) as storage, \
                self.assertRaisesRegex(cstor.FormatError, "bytes of headers"):
            self.export(storage.layer(layer))

    def test_sparse_maps(self) -> None:
        """The tables of GNU tar 1.34 for files with holes at every place."""
        def table(content: bytes) -> bytes:
            path = self.dir + "/sparse"
            put(path, content)
            with open(path, "rb") as file:
                text, runs = cstor.sparse_table(file.fileno(), len(content), 4096, False)
            self.assertEqual(0, len(text) % 512)
            self.assertEqual(content, b"".join(
                bytes(offset - end) + content[offset:offset + size] for end, (offset, size) in zip(
                    [0, *(o + s for o, s in runs)], runs)))
            return text.rstrip(b"\0")

        hole, data = bytes(8192), b"x" * 4096
        for content, expected in ((data, b"1\n0\n4096\n"), (hole + data, b"1\n8192\n4096\n"),
                                  (data + hole, b"2\n0\n4096\n12288\n0\n"), (hole, b"1\n8192\n0\n"),
                                  (data + hole + b"y", b"2\n0\n4096\n12288\n1\n")):
            self.assertEqual(expected, table(content))

    def test_wrong_digest_with_sound_files(self) -> None:
        store = self.sample()
        layer = store.layers[0]
        layer["diff-digest"] = "sha256:" + "0" * 64
        store.save()
        with self.open(store) as storage, self.assertRaisesRegex(
                cstor.IntegrityError, "all files match.*expected sha256:000"):
            self.export(storage.layer(layer["id"]))
        layer.update({"diff-digest": sha256(store.tars[layer["id"]]), "diff-size": 5})
        store.save()
        with self.open(store) as storage, \
                self.assertRaisesRegex(cstor.IntegrityError, "wrong size"):
            self.export(storage.layer(layer["id"]))

    def test_unknown_digest_means_checking_every_file(self) -> None:
        store = self.sample()
        layer = store.layers[1]
        del layer["diff-digest"]
        store.save()
        with self.open(store) as storage:
            self.assertEqual(store.tars[layer["id"]], self.export(storage.layer(layer["id"])))
            self.assertEqual(4, storage.layer(layer["id"]).check_files())
        overwrite(store.path("overlay", layer["id"], "diff/srv/app.py"), b"P")
        with self.open(store) as storage, \
                self.assertRaisesRegex(cstor.IntegrityError, "srv/app.py"):
            self.export(storage.layer(layer["id"]))

    def test_targets(self) -> None:
        store = self.sample()
        layer_id = store.layers[0]["id"]
        tar = store.tars[layer_id]
        with self.open(store) as storage:
            layer = storage.layer(layer_id)
            for verify in (True, False):
                target = f"{self.dir}/out-{verify}"
                fd = os.open(target, os.O_WRONLY | os.O_CREAT)
                digest = layer.export(fd, verify=verify)
                os.close(fd)
                self.assertEqual((tar, sha256(tar) if verify else ""), (read_bytes(target), digest))
                with open("/dev/full", "wb") as full, self.assertRaises(OSError) as caught:
                    layer.export(full.fileno(), verify=verify)
                self.assertEqual(errno.ENOSPC, caught.exception.errno)
            seen: list[tuple[int, int]] = []
            layer.export(io.BytesIO(), progress=lambda size, files: seen.append((size, files)))
            self.assertEqual((len(tar), 4), seen[-1])
            self.assertEqual(sorted(seen), seen)

    def test_targets_that_take_less_at_a_time(self) -> None:
        class Raw(io.RawIOBase):
            def __init__(self) -> None:
                self.data = b""

            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                part = bytes(data[:len(data) // 2 + 1])
                self.data += part
                return len(part)

        store = self.sample()
        with self.open(store) as storage:
            out: Any = Raw()
            storage.layers()[0].export(out)
            self.assertEqual(store.tars[storage.layers()[0].id], out.data)

    def test_failed_export_writes_no_more(self) -> None:
        """The caller may close and reuse his descriptor, or object, once an error is raised."""
        store = self.sample()
        os.unlink(store.path("overlay", store.layers[0]["id"], "diff/etc/passwd"))
        written: list[str] = []

        class Slow(io.BytesIO):
            def write(self, data: Any) -> int:
                time.sleep(.7)
                written.append("late")
                return super().write(data)

        with self.open(store) as storage:
            with self.assertRaises(cstor.IntegrityError):
                storage.layers()[0].export(Slow())
            count = len(written)
            time.sleep(1)
            self.assertEqual(count, len(written))

    @staticmethod
    def sparse_member(name: bytes, content: bytes, runs: Sequence[tuple[int, int]],
                      table: bytes = b"") -> tuple[bytes, bytes]:
        """Return header and data of a sparse member of format 1.0."""
        numbers = [len(runs), *itertools.chain(*runs)]
        text = table or b"".join(b"%d\n" % number for number in numbers)
        data = text + bytes(-len(text) % BLOCK) + b"".join(content[at:at + size]
                                                           for at, size in runs)
        records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": name,
                   b"GNU.sparse.realsize": b"%d" % len(content)}
        return pax(records) + entry(b"s/" + name, size=len(data))[:BLOCK], data

    def sparse(self, folder: str, *files: tuple[bytes, bytes, Sequence[tuple[int, int]]],
               table: bytes = b"") -> tuple[StoreBuilder, bytes]:
        """Return a store with a layer of sparse files, and the layer's tar."""
        store = StoreBuilder(os.path.join(self.dir, folder))
        layer = store.layer(make_tar(*((name.decode(), content) for name, content, _ in files)))
        rows, whole = [], b""
        for name, content, runs in files:
            header, data = self.sparse_member(name, content, runs, table)
            rows += [segment(bytes(-len(whole) % BLOCK) + header), content_row(name, content)]
            whole += bytes(-len(whole) % BLOCK) + header + data
        end = bytes(-len(whole) % BLOCK) + END
        store.rows(layer, [*rows, segment(end)])
        whole += end
        store.layers[0].update({"diff-digest": sha256(whole), "diff-size": len(whole)})
        return store.save(), whole

    def test_sparse_members_with_zeros_that_were_written(self) -> None:
        """What the size allows is tried: larger blocks, and one run of zeros in a gap."""
        size, mib = 1 << 20, 1 << 20
        data = bytes(4096) + b"x" * 4096 + bytes(mib - 8192 - 4096) + b"y" * 4096
        for number, (content, runs) in enumerate((
                (bytes(size), [(0, 65536), (size, 0)]),  # GNU tar, 64 KiB of zeros and a hole
                (bytes(size), [(size - 4096, 4096)]),
                (data, [(0, 8192), (mib - 4096, 4096), (mib, 0)]),
                (data, [(4096, 4096 * 9), (mib - 4096, 4096)]),
                (data, [(4096, 4096), (mib - 16384, 16384), (mib, 0)]),
                (data, [(0, 65536), (mib - 65536, 65536)]),  # blocks of 64 KiB
                (data, [(0, mib)]),
                (data + bytes(mib), [(4096, 4096), (mib - 4096, 12288), (2 * mib, 0)]),
                (bytes(size), [(24576, 4096), (size, 0)]),  # in the middle of a gap
                (data, [(4096, 4096), (69632, 40960), (mib - 4096, 4096)]))):
            store, whole = self.sparse(str(number), (b"f", content, runs))
            with self.subTest(runs), cstor.Storage.open(store.root) as storage:
                self.assertEqual(whole, self.export(storage.layers()[0]))

    def test_a_sparse_map_that_cannot_be_found_names_the_file_and_what_works(self) -> None:
        size = 1 << 20
        store, _ = self.sparse("odd", (b"f", bytes(size), [(8192, 4096), (65536, 4096), (size, 0)]))
        layer = store.layers[0]["id"]
        store.image(layer, "localhost/t:latest")
        self.guard(store.save().root)
        done = self.run_on(store, "layer export", layer, "-o", self.dir + "/out", status=6)
        self.assertEqual(
            f'cstor: error: layer {layer}: "f": the map of this sparse file was not stored, and '
            "no reconstruction gives the layer's digest (its tar cannot be rebuilt; `image cat`, "
            "`cp`, `extract` and `export` still work)\n", done.err)
        for words in ("cat t f", f"extract t {self.dir}/out", "export t"):
            self.run_on(store, "image " + words)

    def test_of_several_sparse_files_the_one_whose_map_is_unknown_is_named(self) -> None:
        hole = bytes(1 << 20)
        store, _ = self.sparse(
            "several", (b"a", b"x" * 4096 + hole[4096:], [(0, 4096), (len(hole), 0)]),
            (b"b", hole, [(8192, 4096), (65536, 4096), (len(hole), 0)]))
        with cstor.Storage.open(store.root) as storage:
            with self.assertRaisesRegex(cstor.Unsupported, '"b": the map of this sparse file'):
                self.export(storage.layers()[0])

    def test_sparse_members_by_either_convention(self) -> None:
        """GNU tar ends the map of a file by an empty run always, or only after a hole."""
        content = bytes(8192) + b"x" * 5000 + bytes(4096 * 3 - 5000) + b"y" * 1000
        place = self.dir + "/content"
        put(place, content)
        for block, always in sample(cstor.SPARSE_CONVENTIONS):
            with open(place, "rb") as file:
                table, runs = cstor.sparse_table(file.fileno(), len(content), block, always)
            store, whole = self.sparse(f"{block}{always}", (b"f", content, runs), table=table)
            layer = store.layers[0]["id"]
            with cstor.Storage.open(store.root) as storage:
                for verify in (True, False):
                    self.assertEqual(whole, self.export(storage.layers()[0], verify=verify))
            store.layers[0]["diff-digest"] = sha256(b"")
            store.save()
            with cstor.Storage.open(store.root) as storage:
                self.assertRaises(cstor.Unsupported, self.export, storage.layers()[0])
                overwrite(store.path("overlay", layer, "diff/f"), b"z")
                self.assertRaises(cstor.IntegrityError, self.export, storage.layers()[0])

    def test_abandoned_pieces_close_everything(self) -> None:
        with self.open(self.sample()) as storage:
            pieces = storage.layers()[0].pieces()
            for piece in pieces:
                if isinstance(piece, cstor.Extent):
                    break
            pieces.close()
            members = storage.layers()[0].members()
            self.assertEqual(b"bin/", next(members).name)
            del members

    def test_memory_does_not_grow_with_the_layer(self) -> None:
        files = ((f"d{i % 50}/f{i}", b"x" * (i % 3000)) for i in range(10_000))
        store, (layer,) = self.stack(make_tar(*files, ("big", bytes(80 << 20))))
        self.guard(store.root)
        self.assertLess(peak_memory("--root", store.root, "layer", "export", layer), 64 << 10)


# ================================================================================================
# 13. Layer trees
# ================================================================================================

class TreeTest(StoreTest):
    """A test of the tree of an image made of some tars, base first."""

    def setUp(self) -> None:
        super().setUp()
        self.out = self.dir + "/out"

    @contextlib.contextmanager
    def tree(self, *tars: bytes, files: bool = True) -> Iterator[cstor.Tree]:
        with self.opened(*tars, files=files) as storage, storage.image("t").tree() as tree:
            yield tree

    @contextlib.contextmanager
    def opened(self, *tars: bytes, files: bool = True) -> Iterator[cstor.Storage]:
        """Open a store with the image; without ``files`` it has only the headers."""
        store = StoreBuilder(tempfile.mkdtemp(dir=self.dir))
        parent = ""
        for number, tar in enumerate(tars):
            parent = store.layer(tar + END if files else None, parent, id=f"{number:064x}")
            if not files:
                store.layers[-1]["diff-digest"] = "sha256:" + "0" * 64
                store.rows(parent, self.split(tar))
        store.image(parent, "localhost/t:latest")
        with cstor.Storage.open(store.save().root) as storage:
            yield storage

    @staticmethod
    def split(tar: bytes) -> Iterator[dict[str, Any]]:
        """Do what split_tar() does for members without content, whatever their headers hold."""
        at = start = 0
        while at < len(tar):
            flag, size = tar[at + 156:at + 157], int(tar[at + 124:at + 135], 8)
            name = tar[at:at + 100].rstrip(b"\0").decode("latin-1")
            at += BLOCK + size + -size % BLOCK
            if flag not in b"xLK":
                yield segment(tar[start:at])
                yield {"type": 1, "name": name, "payload": None}
                start = at

    @staticmethod
    def listing(tree: cstor.Tree) -> dict[str, str]:
        """Return what is at each path but the root: a content, "-> target", or a type."""
        found = {}
        for path, node, first in tree.walk():
            text = node.type
            if node.type == "reg":
                text = b"".join(tree.content(node)).decode()
            elif node.type == "symlink":
                text = "-> " + os.fsdecode(node.linkname)
            if path:
                found[os.fsdecode(path)] = text if first is None else "= " + os.fsdecode(first)
        return found

    def names(self, top: str = "") -> list[str]:
        """Return all paths below the target, sorted."""
        top = top or self.out
        return sorted({os.path.relpath(os.fsdecode(path), top) for path in snapshot(top)} - {"."})


class Trees(TreeTest):
    BASE = b"".join((directory(b"d"), entry(b"d/a", b"a1"), entry(b"d/b", b"b1"), directory(b"e"),
                     entry(b"e/f/g", b"g1"), entry(b"x", b"x1"), symlink(b"s", b"d")))

    def test_whiteouts_act_on_lower_layers_wherever_they_stand(self) -> None:
        marker = entry(b"e/.wh..wh..opq")
        mine = [directory(b"e"), entry(b"e/new", b"n"), entry(b"d/.wh.a"), entry(b".wh.s"), marker]
        expected = {"d": "dir", "d/b": "b1", "e": "dir", "e/new": "n", "x": "x1"}
        for members in (mine, [marker, *mine[:-1]], mine[::-1]):
            with self.tree(self.BASE, b"".join(members)) as tree:
                self.assertEqual(expected, self.listing(tree))
        with self.tree(self.BASE, entry(b".wh.d") + entry(b"d/c", b"c2")) as tree:
            self.assertEqual({"d": "dir", "d/c": "c2", "x": "x1", "s": "-> d", "e": "dir",
                              "e/f": "dir", "e/f/g": "g1"}, self.listing(tree))
        with self.tree(self.BASE, entry(b"d/c", b"c2") + entry(b".wh.d")) as tree:
            self.assertEqual({"d", "d/c"}, {name for name in self.listing(tree) if name[0] == "d"})
        with self.tree(self.BASE, entry(b".wh..wh..opq") + entry(b"only", b"o")) as tree:
            self.assertEqual({"only": "o"}, self.listing(tree))
        with self.tree(self.BASE, entry(b".wh.x"), entry(b"x", b"x3")) as tree:
            self.assertEqual("x3", self.listing(tree)["x"])
        with self.tree(self.BASE, entry(b"x", b"", b"3", major=b"0000000", minor=b"0000000")
                       ) as tree:
            self.assertNotIn("x", self.listing(tree))

    def test_whiteouts_below_a_whiteout_are_passed_over(self) -> None:
        base = entry(b"foo/bar", b"x") + entry(b"keep/y", b"y")
        with self.tree(base, entry(b".wh.foo") + entry(b"foo/.wh.bar")) as tree:
            self.assertEqual({"keep": "dir", "keep/y": "y"}, self.listing(tree))
            self.assertEqual([(b"foo/bar", "whiteout")], [
                (path, how) for path, _, _, how, _ in cstor.hidden_nodes(tree)])
        with self.tree(base, entry(b"foo") + entry(b"foo/.wh.bar"), files=False) as tree:
            self.assertEqual("reg", tree.lookup(b"foo")[1].type)

    def test_an_image_without_layers_is_empty(self) -> None:
        with cstor.Tree([]) as tree:
            self.assertEqual([b""], [path for path, _, _ in tree.walk()])
            self.assertEqual("dir", tree.lookup(b"/")[1].type)
            self.assertRaises(cstor.NotFound, tree.lookup, b"x")

    def test_the_root_is_the_topmost_that_has_an_entry(self) -> None:
        root = directory(b".", mode=b"0000700")
        with self.tree(root, entry(b"f")) as tree:
            self.assertEqual(0o700, next(tree.walk())[1].mode)
            self.assertEqual("./", next(cstor.tree_toc(tree))["name"])
        with self.tree(entry(b"f")) as tree:
            self.assertEqual("f", next(cstor.tree_toc(tree))["name"])

    def test_xattrs_that_go_does_not_know(self) -> None:
        header = pax({b"SCHILY.xattr.user.a": b"1", b"LIBARCHIVE.xattr.user.b": b"Mg",
                      b"SCHILY.xattr.trusted.overlay.opaque": b"y"})
        with self.opened(header + entry(b"f")) as storage, storage.image("t").tree() as tree:
            self.assertEqual({b"user.a": b"1"}, tree.lookup(b"f")[1].xattrs)
            self.assertEqual({b"user.a", b"user.b", b"trusted.overlay.opaque"},
                             set(next(storage.layers()[0].members()).xattrs))

    def test_types_that_are_replaced(self) -> None:
        top = entry(b"d", b"file") + directory(b"x") + symlink(b"e", b"x") \
            + entry(b"s/in", b"dir now")
        with self.tree(self.BASE, top) as tree:
            self.assertEqual({"d": "file", "x": "dir", "e": "-> x", "s": "dir", "s/in": "dir now"},
                             self.listing(tree))
        with self.tree(self.BASE, top, self.BASE) as tree:
            self.assertEqual({"d": "dir", "d/a": "a1", "d/b": "b1", "e": "dir", "e/f": "dir",
                              "e/f/g": "g1", "s": "-> d", "x": "x1"}, self.listing(tree))
        # Within one layer, as tar unpacks.
        with self.tree(entry(b"a/b") + entry(b"a"), files=False) as tree:
            self.assertEqual({"a": "reg"}, {path.decode(): node.type
                                            for path, node, _ in tree.walk() if path})

    def test_hard_links_are_one_node(self) -> None:
        base = entry(b"a", b"one", mode=b"0000600", uid=b"0000001") \
            + hardlink(b"d/b", b"./a", mode=b"0004711", uid=b"0000011", mtime=b"00000000005") \
            + symlink(b"l", b"gone") + hardlink(b"m", b"l", mode=b"0000600", uid=b"0000003",
                                         mtime=b"00000000011")
        with self.tree(base) as tree:
            self.assertEqual({"a": "one", "d": "dir", "d/b": "= a", "l": "-> gone", "m": "= l"},
                             self.listing(tree))
            _, node = tree.lookup(b"a")
            self.assertIs(node, tree.lookup(b"/d/b")[1])
            self.assertEqual((0o4711, 9, 5 * 10**9), (node.mode, node.uid, node.mtime_ns))
            _, node = tree.lookup(b"m", follow=False)
            self.assertEqual((0o777, 3, 0o14000000000 * 10**9),
                             (node.mode, node.uid, node.mtime_ns))
        moved = entry(b"d/f") + hardlink(b"g", b"d/f") + entry(b"d")
        with self.opened(moved, files=False) as storage, storage.image("t").tree() as tree:
            path = content_of(storage, "g")
            with open(path, "wb"):
                pass
            fd = tree.open(tree.lookup(b"g")[1])
            self.assertTrue(os.path.samestat(os.stat(path), os.fstat(fd)))
            os.close(fd)
        with self.tree(base, entry(b"a", b"two")) as tree:
            self.assertEqual(("two", "one"), (self.listing(tree)["a"], self.listing(tree)["d/b"]))
        with self.tree(base, entry(b"a", b"two") + hardlink(b"d/b", b"a")) as tree:
            self.assertEqual(("two", "= a"), (self.listing(tree)["a"], self.listing(tree)["d/b"]))

    def test_directories_without_an_entry(self) -> None:
        with self.tree(directory(b"d", mode=b"0000700", uid=b"0000007"), entry(b"d/e/f",
                                                                               b"f")) as tree:
            for path in (b"d", b"d/e"):
                _, node = tree.lookup(path)
                self.assertEqual((True, 0o755, 0, 0), (node.implicit, node.mode, node.uid,
                                                       node.mtime_ns))
            self.assertEqual((True, 0o555), (tree.lookup(b"/")[1].implicit,
                                             tree.lookup(b"")[1].mode))

    def test_names_are_cleaned(self) -> None:
        with self.tree(directory(b".", mode=b"0000711", uid=b"0000044") + entry(b"./a/./b//c", b"1")
                       + entry(b"/abs", b"2") + entry(b"x/../../up", b"3") + entry(b"dir/../f",
                                                                                   b"4") +
                       entry(b"v7/", b"", b"\0", magic=b"")) as tree:
            self.assertEqual({"a": "dir", "a/b": "dir", "a/b/c": "1", "abs": "2", "up": "3",
                              "f": "4", "v7": "dir"}, self.listing(tree))
            root = tree.lookup(b"/")[1]
            self.assertEqual((0o711, 0o44, False), (root.mode, root.uid, root.implicit))

    def test_entries_behind_links(self) -> None:
        with self.tree(directory(b"real/deep") + symlink(b"abs", b"/real")
                       + symlink(b"real/rel", b"../real/deep") + entry(b"abs/one")
                       + entry(b"abs/rel/two") + symlink(b"out", b"../../../real")
                       + entry(b"out/three"), files=False) as tree:
            self.assertEqual({b"abs": "symlink", b"out": "symlink", b"real": "dir",
                              b"real/deep": "dir", b"real/deep/two": "reg", b"real/one": "reg",
                              b"real/three": "reg", b"real/rel": "symlink"},
                             {path: node.type for path, node, _ in tree.walk() if path})

    def test_bookkeeping_of_aufs(self) -> None:
        with self.tree(entry(b".wh..wh.plnk/1.2", b"") + entry(b".wh..wh.aufs")
                       + directory(b"d/.wh..wh.orph") + entry(b".wh..wh..opq/x", b"")
                       + entry(b"kept", b"k")) as tree:
            self.assertEqual({"kept": "k", "d": "dir"}, self.listing(tree))
        # As podman leaves it: parents are made, 0755 and root's, and hard links work.
        base = directory(b"e", mode=b"0000700", uid=b"0000005") + entry(b"e/x", b"x") \
            + entry(b"f", b"file")
        with self.tree(base, entry(b"e/.wh..wh.X", b"q") + entry(b"f/n/.wh..wh.plnk/12.3", b"p")
                       + entry(b".wh..wh.plnk/4.5", b"lnk")
                       + hardlink(b"g", b".wh..wh.plnk/4.5")) as tree:
            self.assertEqual({"e": "dir", "e/x": "x", "f": "dir", "f/n": "dir", "g": "lnk"},
                             self.listing(tree))
            node = tree.lookup(b"e")[1]
            self.assertEqual((0o755, 0, True), (node.mode, node.uid, node.implicit))

    BELOW = directory(b"a") + entry(b"a/low", b"l") + entry(b"o/s/x", b"x") + entry(b"o/y", b"y")

    @staticmethod
    def overlay(name: bytes, data: bytes | None = None, own: bytes = b"trusted",
                **xattrs: bytes) -> bytes:
        """Return a directory, or a file with ``data``, that has overlayfs's own xattrs."""
        return pax({b"SCHILY.xattr.%s.overlay.%s" % (own, key.encode()): value
                    for key, value in xattrs.items()}) + (
            entry(name, typeflag=b"5") if data is None else entry(name, data))

    def test_overlay_xattrs_act_as_in_a_mount(self) -> None:
        """The right values are those of mounts by podman 4.3.1, Linux 6.18 (see RealXattrs)."""
        make, up = self.overlay, entry(b"a/up", b"u")
        all_of_o = {"o": "dir", "o/s": "dir", "o/s/x": "x", "o/y": "y"}
        low, both = {"a": "dir", "a/low": "l", **all_of_o}, {"a/up": "u"}
        moved = {"n": "dir", "n/s": "dir", "n/s/x": "x", "n/y": "y"}
        for top, expected in (
                (make(b"a", opaque=b"y") + up, {"a": "dir", **both, **all_of_o}),
                *((make(b"a", opaque=value) + up, {**low, **both}) for value in (
                    b"Y", b"yy", b"n", b"x")),
                (make(b"a", own=b"user", opaque=b"y") + up, {**low, **both}),
                (make(b"./", opaque=b"y"), low), (make(b"/", opaque=b"y", redirect=b"/o"), low),
                (make(b"a/low", b"", whiteout=b"n"), {"a": "dir", **all_of_o}),
                (make(b"a/low", b"full", whiteout=b"y"), {**low, "a/low": "full"}),
                (make(b"a", whiteout=b"y"), low),
                (make(b"n", redirect=b"/o") + entry(b"n/s/z", b"z") + entry(b".wh.o"),
                 {"a": "dir", "a/low": "l", **moved, "n/s/z": "z"}),
                (make(b"a", redirect=b"o"), {"a": "dir", "a/s": "dir", "a/s/x": "x", "a/y": "y",
                                             **all_of_o}),
                (make(b"n", redirect=b"/o") + make(b"n/t", redirect=b"s\0junk"),
                 {**low, **moved, "n/t": "dir", "n/t/x": "x"}),
                (make(b"n", redirect=b"/o", opaque=b"y"), {**low, "n": "dir"}),
                (make(b"o", opaque=b"y") + make(b"o/t", redirect=b"s"),
                 {"a": "dir", "a/low": "l", "o": "dir", "o/t": "dir"}),
                (make(b"o", opaque=b"y") + make(b"o/t", redirect=b"/o/s"),
                 {"a": "dir", "a/low": "l", "o": "dir", "o/t": "dir", "o/t/x": "x"}),
                *((make(b"a", redirect=value) + up, {"a": "dir", **both, **all_of_o}) for value in (
                    b"/nope", b"/o/y")),
                (make(b"f", b"", redirect=b"/o/y"), {**low, "f": ""}),
                (make(b"o/y", b"....", metacopy=bytes(4)), low),
                (make(b"f", b"_", metacopy=bytes(4), redirect=b"/o/y"), {**low, "f": "y"}),
                (make(b"o/f", b"_", metacopy=bytes(5), redirect=b"y"), {**low, "o/f": "y"}),
                (make(b"a", metacopy=bytes(4)), low)):
            with self.subTest(top=top[:BLOCK * 2].replace(b"\0", b"")), \
                    mock.patch.object(cstor.Storage, "rootless", False), \
                    self.tree(self.BELOW, top) as tree:
                self.assertEqual(expected, self.listing(tree))
                self.assertEqual([], [path for path, node, _ in tree.walk()
                                      if any(b"trusted" in name for name in node.xattrs)])
        chain = self.BELOW, make(b"m", redirect=b"/o") + entry(b"m/m", b"m"), make(
            b"n", redirect=b"/m"), make(b"k", b"", metacopy=bytes(4), redirect=b"/n/y")
        for rest, found in ((chain[1:], True), ((entry(b".wh.o"), *chain[1:3]), False)):
            with mock.patch.object(cstor.Storage, "rootless", False), \
                    self.tree(self.BELOW, *rest) as tree:
                names = self.listing(tree)
                self.assertEqual(found, names.get("n/y") == names.get("m/y") == "y")
                self.assertEqual("y" if found else None, names.get("k"))

    def test_what_overlayfs_refuses_cannot_be_read(self) -> None:
        make, malformed = self.overlay, "overlayfs refuses its redirect or metacopy xattr"
        for own, rootless, path, why, xattrs in (
                *((b"trusted", False, b"n", malformed, {"redirect": value}) for value in (
                    b".", b"..", b"../o", b"a/b", b"/", b"/o/", b"//o", b"/o/../a", b"/o/.")),
                (b"user", True, b"n", malformed, {"redirect": b"/o"}),
                (b"user", True, b"o/y", malformed, {"metacopy": bytes(4)}),
                (b"trusted", False, b"o/y", malformed, {"metacopy": b"y"}),
                (b"trusted", False, b"f", "its content is not in the layers below",
                 {"metacopy": bytes(4)})):
            data = None if path == b"n" else b"f"
            with self.subTest(xattrs), mock.patch.object(cstor.Storage, "rootless", rootless), \
                    self.opened(self.BELOW, make(path, data, own, **xattrs) + entry(
                        b"n/up", b"u")) as storage, storage.image("t").tree() as tree:
                self.assertEqual({"o/s/x", "a/low", "f" if path == b"f" else "o"},
                                 {name.decode() for name, _, _ in tree.walk()} & {
                                     "o/s/x", "a/low", "f" if path == b"f" else "o"})
                if data:
                    with self.assertRaisesRegex(cstor.Unsupported, "cannot be read: " + why):
                        list(tree.read(path))
                self.assertEqual((True, data is not None), tuple(
                    name in tree.paths() for name in (path, b"n/up")))
                note, = storage.notes
                self.assertRegex(note, "layer 0{63}1: overlayfs's own xattrs in it .* act as in "
                                 "a mount" + f".*; refused: {path.decode()}" * (path != b"f"))

    def test_overlay_xattrs_of_a_user_store(self) -> None:
        make = self.overlay
        with mock.patch.object(cstor.Storage, "rootless", True), self.opened(
                self.BELOW, make(b"a", own=b"user", opaque=b"y") + make(b"o", opaque=b"y")
                + make(b"o/s", own=b"trusted", foo=b"1")) as storage:
            with storage.image("t").tree() as tree:
                self.assertEqual({"a": "dir", "o": "dir", "o/s": "dir", "o/s/x": "x", "o/y": "y"},
                                 self.listing(tree))
                self.assertEqual([{}] * 6, [node.xattrs for _, node, _ in tree.walk()])
            note, = storage.notes
            self.assertEqual(f"layer {'0' * 63}1: overlayfs's own xattrs in it (opaque) act as in "
                             "a mount", note)
        store = self.builder()
        os.chown(store.root, os.getuid(), os.getgid())
        with cstor.Storage.open(store.save().root) as storage:
            self.assertEqual(os.getuid() != 0, storage.rootless)
            with mock.patch.object(cstor.Storage, "owner", (1000, 1000)):
                self.assertTrue(storage.rootless)
            with mock.patch.object(cstor.Storage, "owner", (0, 0)), mock.patch.object(
                    cstor, "read_proc", return_value="0 1000 1\n1 100000 65536\n"):
                self.assertTrue(storage.rootless)

    def test_layers_show_their_overlay_xattrs(self) -> None:
        own = b"user" if os.geteuid() else b"trusted"
        with self.opened(self.BELOW, self.overlay(b"a", own=own, opaque=b"y")) as storage:
            name, layer = f"{own.decode()}.overlay.opaque", "0" * 63 + "1"
            for word in ("toc", "stat"):
                done = self.run_on(storage, "layer", word, layer, *["a", "--format",
                                                                    "json"] * (word == "stat"))
                found = done.json
                self.assertEqual({name: "eQ=="}, (found if word == "stat" else found["entries"])[
                    0]["xattrs"])
            done = self.run_on(storage, "layer stat", layer, "a")
            self.assertIn(f"xattrs   {name}=y\n".encode(), done.stdout)
            for options in [], ["-q"]:
                done = self.run_on(storage, "image stat t a", *options)
                self.assertNotIn(b"xattrs", done.stdout)
                self.assertEqual(b"" if options else f"cstor: note: layer {layer}: overlayfs's "
                                 "own xattrs in it (opaque) act as in a mount\n".encode(),
                                 done.stderr)

    def test_grafts_are_counted(self) -> None:
        tars = [entry(b"d/a/x", b"x") + entry(b"d/b/x", b"x")] + [
            self.overlay(b"d", opaque=b"y") + self.overlay(b"d/a", redirect=b"/d")
            + self.overlay(b"d/b", redirect=b"/d") for _ in range(20)]
        with mock.patch.object(cstor.Storage, "rootless", False), mock.patch.object(
                cstor, "MAX_ENTRIES", 1000), self.tree(*tars) as tree, \
                self.assertRaisesRegex(cstor.FormatError, "more than 1000 entries"):
            list(tree.walk())

    def test_malformed_layers(self) -> None:
        loop = symlink(b"a", b"b") + symlink(b"b", b"a") + entry(b"a/f")
        wrong_sum = entry(b"x")[:148] + b"0000001\0" + entry(b"x")[156:]
        for tar, words in (
                (loop, "loop of symbolic links"), (entry(b".wh."), "malformed whiteout"),
                (b"".join(pax({b"SCHILY.xattr.user.x": b"v" * 60000}) + entry(b"%d" % i)
                          for i in range(1200)), "xattrs are too long"),
                (pax({b"SCHILY.xattr.user.x": b"v" * 65537}) + entry(b"x"), "xattrs are too long"),
                (pax({b"linkpath": b"./" * 3000}) + symlink(b"x", b""), "empty or too long"),
                (symlink(b"l", b"./" * 49) + b"".join(
                    entry(b"l/" * 45 + b"%d/x" % i) for i in range(2)), "loop of symbolic links"),
                (entry(b"d/.wh..."), "malformed whiteout"),
                (entry(b"f") + entry(b"f/g"), "not a directory"),
                (hardlink(b"far", b"no"), '"far" is a hard link to "no"'),
                (directory(b"d") + hardlink(b"l", b"d"), "which its layer does not have"),
                (entry(b"d/.wh.."), "whiteout"),
                (entry(b"x", mode=b"9999999"), '"x": malformed header number'),
                (wrong_sum, '"x": wrong header checksum')):
            with self.tree(tar, files=False) as tree, \
                    self.assertRaisesRegex(cstor.FormatError, words):
                list(tree.walk())

    def test_limits(self) -> None:
        for tar in (b"".join(entry(b"%d/" % i + b"d/" * 40) for i in range(30)),
                    b"".join(entry(b".wh.%d" % i) for i in range(1001)),
                    entry(b"a") + b"".join(hardlink(b"%d" % i, b"a") for i in range(1001))):
            with mock.patch.object(cstor, "MAX_ENTRIES", 1000), \
                    self.tree(tar, files=False) as tree, \
                    self.assertRaisesRegex(cstor.FormatError, "more than 1000 entries"):
                list(tree.walk())
        with mock.patch.object(cstor, "MAX_STEPS", 1000), self.tree(
                symlink(b"l", b"./" * 40 + b"r")
                + b"".join(entry(b"l/%d/x" % i) for i in range(99)),
                files=False) as tree, self.assertRaisesRegex(cstor.FormatError, "loop of symbolic"):
            list(tree.walk())

    def test_lookups_follow_links_inside(self) -> None:
        with self.tree(self.BASE + symlink(b"d/up", b"../../../x") + symlink(b"abs", b"/e/f")
                       + symlink(b"loop", b"loop") + symlink(b"dot", b"s/../x")
                       + symlink(b"out", b"/etc"),
                       entry(b"d/.wh.a")) as tree:
            for path, real in ((b"s/b", b"d/b"), (b"/s/./b", b"d/b"), (b"d/up", b"x"),
                               (b"abs/g", b"e/f/g"), (b"e/../x", b"x"), (b"../../x", b"x"),
                               (b"dot", b"x"), (b"s", b"d"), (b"s/", b"d"), (b"/", b"")):
                self.assertEqual(real, tree.lookup(path)[0], path)
            self.assertEqual(b"s", tree.lookup(b"s", follow=False)[0])
            self.assertEqual(b"d", tree.lookup(b"s/", follow=False)[0])
            for path in (b"nope", b"x/y", b"x/", b"d/a", b"out", b"out/passwd", b"s/../y"):
                with self.assertRaises(cstor.NotFound, msg=path):
                    tree.lookup(path)
            walked = [path for path, _, _ in tree.walk(b"/./e//f")]
            self.assertEqual([b"e/f", b"e/f/g"], walked)
            with self.assertRaisesRegex(cstor.NotFound, 'where a link leads to "/etc"'):
                tree.lookup(b"out")
            with self.assertRaisesRegex(cstor.FormatError, "too many levels"):
                tree.lookup(b"loop")
            self.assertEqual(b"loop", tree.lookup(b"loop", follow=False)[0])

    def test_writable_layers_are_read_from_disk(self) -> None:
        store = self.builder()
        base = store.layer(self.BASE + END)
        image = store.image(base, "localhost/t:latest")
        layer = store.layer(None, base)
        store.container(image, layer, "c")
        for name in ("d/.wh.a", "d/c", "e/.wh..wh..opq", "e/new", ".wh.x", ".wh..wh.plnk/1"):
            store.write(f"overlay/{layer}/diff/{name}", b"disk")
        diff = store.path("overlay", layer, "diff")
        os.link(diff + "/d/c", diff + "/d/d")
        os.symlink("d", diff + "/link")
        root = store.save().root
        with cstor.Storage.open(root) as storage, storage.container("c").tree() as tree:
            self.assertEqual({"d": "dir", "d/b": "b1", "d/c": "disk", "d/d": "= d/c", "e": "dir",
                              "e/new": "disk", "link": "-> d", "s": "-> d"}, self.listing(tree))
            self.assertEqual(b"disk", b"".join(tree.read(b"link/d")))
            os.truncate(diff + "/d/c", 1)
            self.guard(store.root)
            with self.assertRaisesRegex(cstor.IntegrityError, "changed while it was read"):
                list(tree.read(b"d/c"))

    def test_what_force_mask_keeps_in_an_xattr(self) -> None:
        node = cstor.Node(cstor.LayerTree(None), None, b"f", "reg")
        for text, result, kind, mode in ((b"1:2:4755", (1, 2, (0, 0)), "reg", 0o4755),
                                         (b"1:2:0600:pipe", (1, 2, (0, 0)), "fifo", 0o600),
                                         (b"0:0:20600:char-5-1", (0, 0, (5, 1)), "char", 0o600),
                                         (b"0:0:644:foo", (7, 8, (0, 0)), "reg", 0o755),
                                         (b"0:0:644:whiteout", (7, 8, (0, 0)), "reg", 0o755),
                                         (b"9" * 5000 + b":0:644", (7, 8, (0, 0)), "reg", 0o755)):
            node.type, node.mode = "reg", 0o755
            self.assertEqual(result, cstor.DiskTree._override(
                node, {b"user.containers.override_stat": text}, (7, 8, (0, 0))), text)
            self.assertEqual((kind, mode), (node.type, node.mode))
        # fuse-overlayfs leaves the one of a lower layer's file beside its own.
        self.assertEqual((3, 4, (0, 0)), cstor.DiskTree._override(
            node, {b"user.containers.override_stat": b"1:2:755",
                   b"user.fuseoverlayfs.override_stat": b"3:4:100600"}, (7, 8, (0, 0))))
        self.assertEqual(("reg", 0o600), (node.type, node.mode))

    def test_read_errors_name_the_file_of_the_store(self) -> None:
        with self.tree(self.BASE) as tree, mock.patch("os.pread", side_effect=OSError(
                errno.EIO, "broken")):
            with self.assertRaises(OSError) as caught:
                list(tree.content(tree.lookup(b"d/b")[1]))
            self.assertIn("d/b", str(caught.exception.filename))

    def test_contents_are_checked(self) -> None:
        with self.opened(self.BASE) as storage, storage.image("t").tree() as tree:
            self.assertEqual(b"b1", b"".join(tree.read(b"s/b")))
            for path in (b"d", b"s"):
                with self.assertRaisesRegex(cstor.CstorError, "not a regular file"):
                    list(tree.read(path, follow=False))
            diff = content_of(storage)
            for content, words in ((b"B1", "checksum failed"), (b"b", "wrong size")):
                put(diff + "/d/b", content)
                with self.assertRaisesRegex(cstor.IntegrityError, words):
                    list(tree.read(b"d/b"))

    def test_one_file_is_read_by_its_path(self) -> None:
        base = self.BASE + symlink(b"bin", b"usr/bin") + entry(b"usr/bin/sh", b"") \
            + entry(b"bin/sh", b"old") + entry(b"./dot", b"dot") + entry(b".wh..wh.plnk/1", b"a")
        tars = base, entry(b"usr/bin/sh", b"new") + entry(b"d/.wh.b") + entry(b"top", b"t")
        for path, content in (
                (b"/d/a", b"a1"), (b"x", b"x1"), (b"dot", b"dot"), (b"d/b", None),
                (b"bin/sh", b"new"), (b"s/a", b"a1"), (b".wh..wh.plnk/1", None), (b"x/", None),
                (b"x/.", None), (b"x/../x", None), (b"usr/bin/sh", b"new"), (b"nope", None),
                (b"top", b"t")):
            with self.subTest(path=path), self.opened(*tars) as storage, \
                    storage.image("t").tree() as tree:
                if content is None:
                    with self.assertRaises(cstor.NotFound):
                        list(tree.read(path))
                else:
                    self.assertEqual(content, b"".join(tree.read(path)))


class Contents(TreeTest):
    """Tables of contents, patterns, comparisons."""

    def test_toc(self) -> None:
        self.maxDiff = None
        tar = pax({b"SCHILY.xattr.user.a": b"\0v", b"mtime": b"1.5"}) + entry(
            b"./f", b"xy", uname=b"joe", gname=b"gr\xe9") + hardlink(b"hard", b"./f") \
            + symlink(b"sym", b"../f") + entry(b"d", typeflag=b"5") + entry(b"null", b"", b"3",
                                                                       major=b"0000001",
                                                                       minor=b"0000003") \
            + entry(b"caf\xe9 \\x", b"") + entry(b".wh.gone") + entry(
                b"old", mtime=base256(-1, 12))
        when, owner = "2021-01-14T08:25:36Z", {"uid": 0, "gid": 0}
        named = {**owner, "userName": "joe", "groupName": "gr\uefe9"}
        file = {"type": "reg", "size": 2, "modtime": "1970-01-01T00:00:01.5Z", "mode": 0o644,
                **named, "xattrs": {"user.a": "AHY="}, "NumLink": 2}
        rest = {"modtime": when, "mode": 0o644, **owner}
        expected: list[dict[str, Any]] = [
            {"name": "./f", **file},
            {"name": "hard", "type": "hardlink", "linkName": "./f", **rest},
            {"name": "sym", "type": "symlink", "linkName": "../f", **rest},
            {"name": "d/", "type": "dir", **rest, "mode": 0o755},
            {"name": "null", "type": "char", **rest, "devMajor": 1, "devMinor": 3},
            {"name": "caf\uefe9 \\x", "type": "reg", "size": 0, **rest},
            {"name": ".wh.gone", "type": "reg", "size": 0, **rest},
            {"name": "old", "type": "reg", "size": 0, **rest, "modtime": "1969-12-31T23:59:59Z"}]
        with self.opened(entry(b"gone", b"g"), tar) as storage:
            self.assertEqual({"version": 1, "entries": expected}, storage.layer("0" * 63 + "1"
                                                                                ).toc())
            with mock.patch.object(cstor.LayerFiles, "open", side_effect=AssertionError):
                entries = storage.image("t").toc()["entries"]
            digest = sha256(b"xy")
            image = [{**item, "name": item["name"].replace("./", "")} for item in expected]
            image[0] = {**image[0], **rest, "xattrs": {"user.a": "AHY="}}  # as the link's header
            del image[0]["userName"], image[0]["groupName"]
            image[1].update(linkName="f", xattrs=image[0]["xattrs"])
            image[2]["mode"], image[7]["modtime"] = 0o777, "1970-01-01T00:00:00Z"
            del image[6]
            image.sort(key=lambda item: cstor.unspell(item["name"]).rstrip(b"/"))
            self.assertEqual(image, entries)
            entries = storage.image("t").toc(digests=True)["entries"]
            self.assertEqual({"f": digest}, {item["name"]: item["digest"] for item in entries
                                             if "digest" in item})

    def test_times_that_rfc_3339_cannot_say_are_left_out(self) -> None:
        with self.opened(entry(b"f", mtime=base256(1 << 60, 12))) as storage:
            self.assertNotIn("modtime", storage.layers()[0].toc()["entries"][0])

    def test_digests_with_few_open_files(self) -> None:
        store = self.builder()
        store.image(store.layer(make_tar(*((f"f{number}", b"x") for number in range(300)))), "t")
        store.save()
        for limit in (24, 64, 256):
            done = self.run_cstor(
                "--root", store.root, "image", "toc", "t", "--digests",
                preexec_fn=lambda limit=limit: resource.setrlimit(
                    resource.RLIMIT_NOFILE, (limit, limit)))
            self.assertEqual(300, done.stdout.count(sha256(b"x").encode()))

    def test_many_layers_with_few_open_files(self) -> None:
        store, top = self.builder(), ""
        names = [f"{place}/b/c/d{number}/f" for number in range(200) for place in "xyz"]
        for number in range(0, len(names), 3):
            top = store.layer(make_tar(*(
                (name, name.encode()) for name in names[number:number + 3])), top)
        store.image(top, "t")
        store.save()
        target = os.path.join(self.dir, "target")
        commands: list[tuple[int, list[str]]] = [
            (256, ["toc", "t", "--digests"]), (64, ["toc", "t", "--digests"]),
            (256, ["cat", "t", *names]), (256, ["extract", "t", target]), (256, ["export", "t"])]
        for limit, args in commands:
            done = self.run_cstor(
                "--root", store.root, "image", *args, preexec_fn=lambda limit=limit:
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
            for name in names if "toc" in args else ():
                self.assertIn(sha256(name.encode()).encode(), done.stdout)
            if "cat" in args:
                self.assertEqual("".join(names), done.out)
        for name in names:
            self.assertEqual(name.encode(), read_bytes(os.path.join(target, name)))

    def test_a_mapped_layer_with_many_lowers_and_few_open_files(self) -> None:
        store, top = self.builder(), ""
        names = [f"a/b/c{number}/f" for number in range(200)]
        for name in names:
            top = store.layer(make_tar((name, name.encode())), top)
        tar = make_tar(*((name, name.encode()) for name in names))
        mapped = store.layer(tar, top)
        shutil.rmtree(store.path("overlay", mapped, "diff"))
        os.makedirs(store.path("overlay", mapped, "diff"))
        os.makedirs(store.path("overlay", mapped, "diff1"))
        store.save()
        done = self.run_cstor(
            "--root", store.root, "layer", "export", mapped,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
        self.assertEqual(tar, done.stdout)

    def test_digests_of_many_files_check_them(self) -> None:
        files = {f"f{i:03d}": bytes([i % 256]) * (i * 37) for i in range(300)}
        with self.opened(b"".join(entry(name.encode(), data) for name, data in files.items())
                         ) as storage:
            image = storage.image("t")
            self.assertEqual({name: sha256(data) for name, data in files.items() if data},
                             {item["name"]: item["digest"] for item in
                              image.toc(digests=True)["entries"] if "digest" in item})
            path = content_of(storage, "f150")
            overwrite(path, b"?")
            with self.assertRaisesRegex(cstor.IntegrityError, "f150"):
                image.toc(digests=True)

    def test_patterns(self) -> None:
        paths = [b"", b"a", b"a/b.c", b"a/d/b.c", b"b.c", b"a/[x]", b"a/d/x\ny", b"ab", b"a^",
                 b"\xc3\xa9"]
        for patterns, fits in (
                ([], paths), (["*.c"], [b"a/b.c", b"a/d/b.c", b"b.c"]), (["/*.c"], [b"b.c"]),
                (["a/*"], [b"a/b.c", b"a/[x]"]),
                (["/a/**"], [p for p in paths if p[:2] == b"a/"]), (["*"], paths[1:]),
                (["**/b.c"], [b"a/b.c", b"a/d/b.c", b"b.c"]), (["/"], paths),
                (["a/**/b.c"], [b"a/b.c", b"a/d/b.c"]), (["**/" * 30 + "nope"], []),
                (["a"], [p for p in paths if p == b"a" or p[:2] == b"a/"]),
                (["/a/d/"], [b"a/d/b.c", b"a/d/x\ny"]), (["?"], [b"a", b"\xc3\xa9"]),
                (["[ab]b"], [b"ab"]), (["a/d/x?y"], [b"a/d/x\ny"]), (["[\u00e0-\u00ff]"],
                                                                  [b"\xc3\xa9"]),
                (["a[!a]"], [b"ab", b"a^"]), (["a[^]"], [b"a^"]), (["?", "b.?"], [
                    b"a", b"a/b.c", b"a/d/b.c", b"b.c", b"\xc3\xa9"]),
                (["a/[[]x]"], [b"a/[x]"]), (["[z-a]"], []), (["[]x]*"], [b"a/d/x\ny"]),
                (["a/[.--]"], []), (["a[--~]"], [b"ab", b"a^"]), (["a/[[&&||~~]x*"], [b"a/[x]"]),
                (["["], []), (["nope*"], []), (["./b.c"], [b"b.c"]), (["."], paths),
                (["./a//./d/*.c", "a/./[[]x]"], [b"a/d/b.c", b"a/[x]"])):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self.assertEqual(fits, list(filter(cstor.compile_patterns(patterns), paths)),
                                 patterns)

    def test_patterns_with_a_backslash_and_names_that_exist_as_written(self) -> None:
        paths = [b"app", b"app/[slug]", b"app/[slug]/p", b"app/s", b"app/a*", b"app/ab",
                 b"x/[slug]", b"back\\slash", b"star\\*", b"caf\xe9[1]", b"caf\xe91", b"app/[s]",
                 b"q]"]
        for pattern, wild, exact in (
                ("app/[slug]", [b"app/s"], [b"app/[slug]", b"app/[slug]/p"]),
                ("/app/[slug]/", [b"app/s"], [b"app/[slug]", b"app/[slug]/p"]),
                ("[slug]", [b"app/s"], [b"app/[slug]", b"app/[slug]/p", b"x/[slug]"]),
                ("app/[slug]/*", [], [b"app/[slug]/p"]),
                ("app/[slug]/p", [], [b"app/[slug]/p"]), ("app/[s]", [b"app/s"], [b"app/[s]"]),
                ("app/a*", [b"app/a*", b"app/ab"], [b"app/a*"]),
                (r"app/\[slug\]", *2 * ([b"app/[slug]", b"app/[slug]/p"],)),
                (r"app/\[slug]/*", *2 * ([b"app/[slug]/p"],)), (r"a\*", *2 * ([b"app/a*"],)),
                (r"app/a[\*]", *2 * ([b"app/a*"],)), (r"[q\]][\]]", *2 * ([b"q]"],)),
                (r"back\slash", [], [b"back\\slash"]), (r"back\\*", *2 * ([b"back\\slash"],)),
                (r"star\*", [], [b"star\\*"]), ("star\\\\\\*", *2 * ([b"star\\*"],)),
                ("caf\udce9[1]", [b"caf\xe91"], [b"caf\xe9[1]"]),
                ("caf\uefe9[1]", [b"caf\xe91"], [b"caf\xe9[1]"]),
                ("app/[slug", [], []), ("p\\", [], []), ("[xyz]", [], [])):
            self.assertEqual(wild, list(filter(cstor.compile_patterns([pattern]), paths)), pattern)
            fits = cstor.compile_patterns([pattern], lambda: paths)
            self.assertEqual(exact, list(filter(fits, paths)), pattern)

    def test_commands_take_an_existing_name_literally(self) -> None:
        base = entry(b"app/[slug]/page.js", b"P") + entry(b"app/s", b"other") + entry(b"old/[x]",
                                                                                      b"hidden")
        with self.opened(base + entry(b"old/x", b"x"), entry(b"old/.wh.[x]")) as storage:
            ids = [layer.id for layer in storage.image("t").layers()]
            for command, names in (
                    ("image files t app/[slug]", ["/app/[slug]", "/app/[slug]/page.js"]),
                    ("image files t [slug]", ["/app/[slug]", "/app/[slug]/page.js"]),
                    ("image files t old/[x]", ["/old/x"]), ("image files t old/\\[x]", []),
                    (f"layer files {ids[0]} old/[x]", ["old/[x]"]),
                    (f"layer files {ids[1]} old/.wh.[x]", ["old/.wh.[x]"])):
                done = self.run_on(storage, *command.split(), status=0 if names else 3)
                self.assertEqual(names, done.out.splitlines(), command)
            for command, path in (("t app/[slug]/page.js", "/app/[slug]/page.js"),
                                  ("t --hidden old/[x]", "/old/[x]")):
                done = self.run_on(storage, "image blame --format json", *command.split())
                self.assertEqual([path], [row["path"] for row in done.json])
            out = self.dir + "/out"
            self.run_on(storage, "image extract t", out, "--path", "app/[slug]", "--exclude", "[x]")
            self.assertEqual([["app"], ["[slug]"], []], [dirs for _, dirs, _ in os.walk(out)])
            self.assertTrue(os.path.isfile(f"{out}/app/[slug]/page.js"))

    def changes(self, old: bytes, new: bytes, *ignore: str) -> dict[str, str]:
        with self.tree(old) as a, self.tree(new) as b:
            return {path.decode(): ",".join(what) if x and y else "deleted" if x else "added"
                    for path, x, y, what in cstor.diff_trees(a, b, ignore)}

    def test_comparisons(self) -> None:
        base = directory(b"d") + entry(b"d/f", b"one") + symlink(b"l", b"d")
        self.assertEqual({}, self.changes(base, base))
        for old, new, what in (
                (entry(b"f", b"a"), entry(b"f", b"b"), "content"),
                (entry(b"f", b"a"), entry(b"f", b"ab"), "size,content"),
                (entry(b"f"), entry(b"f", mode=b"0000600"), "mode"),
                (entry(b"f"), entry(b"f", gid=b"0000600"), "owner"),
                (entry(b"f"), entry(b"f", mtime=b"00000000001"), "time"),
                (entry(b"f"), directory(b"f"), "type"),
                (symlink(b"f", b"a"), symlink(b"f", b"b"), "link"),
                (entry(b"f"), pax({b"SCHILY.xattr.user.x": b"1"}) + entry(b"f"), "xattr"),
                (entry(b"f", typeflag=b"3", minor=b"0000001"),
                 entry(b"f", typeflag=b"3", minor=b"0000002"), "device")):
            self.assertEqual({"f": what}, self.changes(old, new))
            self.assertEqual({}, self.changes(old, new, *what.split(",")))
        self.assertEqual({"d": "deleted", "d/f": "deleted", "d-": "added", "z": "added"},
                         self.changes(base, symlink(b"l", b"d") + entry(b"d-") + entry(b"z")))
        pair = entry(b"a", b"x") + hardlink(b"b", b"a") + hardlink(b"c", b"a")
        self.assertEqual({"b": "link", "c": "link"}, self.changes(
            pair, b"".join(entry(name, b"x") for name in (b"a", b"b", b"c"))))
        self.assertEqual({"a-b": "added", "a/b": "deleted"},
                         self.changes(entry(b"a/b") + entry(b"a.c"),
                                      directory(b"a") + entry(b"a-b") + entry(b"a.c")))
        self.assertEqual({"a": "deleted"}, self.changes(pair, entry(b"b", b"x") + hardlink(b"c",
                                                                                           b"b")))

    def test_blame(self) -> None:
        tars = (entry(b"f", b"one") + entry(b"d/a", b"aa") + entry(b"d/b", b"b")
                + hardlink(b"d/c", b"d/b") + entry(b"e/x", b"xxx"),
                entry(b"f", b"three") + entry(b"d/.wh.a") + entry(b"d/.wh.b"),
                entry(b"f", b"now") + entry(b"e/.wh..wh..opq") + entry(b"e/y", b"y"))
        with self.tree(entry(b"a/b", b"1"), entry(b"a"), entry(b"a/b", b"2")) as tree:
            self.assertEqual([], cstor.older_nodes(tree, b"a/b", tree.lookup(b"a/b")[1]))
        with self.tree(*tars) as tree:
            number = {layer: 2 - i for i, layer in enumerate(tree.layers)}
            self.assertEqual(
                {b"f": (2, [1, 0]), b"d": (1, []), b"d/c": (0, []), b"e": (2, [0]),
                 b"e/y": (2, [])},
                {path: (number[node.tree], [number[old.tree] for old in
                                            cstor.older_nodes(tree, path, node)])
                 for path, node, _ in tree.walk() if path})
            self.assertEqual(
                {(b"f", 0, 1, "replaced", 3), (b"f", 1, 2, "replaced", 5),
                 (b"d/a", 0, 1, "whiteout", 2), (b"d/b", 0, 1, "whiteout", 0),
                 (b"e/x", 0, 2, "opaque directory", 3)},
                {(path, number[node.tree], number[above], how, wasted)
                 for path, node, above, how, wasted in cstor.hidden_nodes(tree)})


class Vfs(TreeTest):
    """Stores of the driver vfs: each layer has the whole tree, as it is with the layers below."""

    STACK = (b"".join((directory(b"d"), entry(b"d/a", b"a1"), entry(b"d/b", b"b1"),
                       directory(b"e", mode=b"0001777", uid=b"0000004"), entry(b"e/x", b"x1"),
                       entry(b"f", b"f1"), hardlink(b"g", b"f"), symlink(b"l", b"d"))),
             b"".join((directory(b"d"), entry(b"d/.wh.a"), entry(b"d/c", b"c2"), entry(b"f", b"f2"),
                       directory(b"e"), entry(b"e/.wh..wh..opq"), entry(b"e/y", b"y2"))),
             b"".join((entry(b"f", b"f3"), entry(b".wh.e"), entry(b"n", b"n3"))))

    def stores(self, *tars: bytes) -> list[StoreBuilder]:
        """Return stores of both drivers with one image and an empty container."""
        stores = []
        for driver in cstor.DRIVERS:
            store, layer = StoreBuilder(tempfile.mkdtemp(dir=self.dir), driver), ""
            for tar in tars:
                layer = store.layer(tar + END, layer)
            image = store.image(layer, "localhost/t:latest")
            store.container(image, store.layer(None, layer, names=["c-layer"]), "c")
            stores.append(store.save())
        return stores

    def test_an_image_is_the_same_by_both_drivers(self) -> None:
        found = []
        for store in self.stores(*self.STACK):
            out = f"{self.dir}/{store.driver}"
            with self.open(store) as storage:
                image = storage.image("t")
                self.assertEqual([], image.faults)
                tars = [self.export(layer) for layer in image.layers()]
                self.assertEqual([tar + END for tar in self.STACK], tars)
                with image.tree() as tree:
                    tree.verify()
                    listed = self.listing(tree)
                    image.extract(out, verify=True, owners=False)
                    self.assertEqual(0, sum(row[1] not in ("owner", "mode") for row in
                                            tree_differences(out, tree)))
                layout = image.copy_to_oci(out + "-oci", "t")
                found.append((listed, layout, image.toc(digests=True), [
                    layer.toc(digests=True) for layer in image.layers()]))
                self.assertEqual((3, 0), (len(image.layers()), len(storage.faults)))
        self.assertEqual(*found)
        self.assertEqual({"d": "dir", "d/b": "b1", "d/c": "c2", "f": "f3", "g": "f1", "l": "-> d",
                          "n": "n3"}, found[1][0])

    def test_commands(self) -> None:
        _, store = self.stores(*self.STACK)
        base, _, top, own = (layer["id"] for layer in store.layers)
        self.assertEqual("f3", self.run_on(store, "image cat t f").out)
        self.assertEqual("/d/b\n", self.run_on(store, "image files t /d/b").out)
        self.assertEqual("f1", self.run_on(store, f"layer cat {store.files(base)}/f f").out)
        self.assertEqual("f\n.wh.e\nn\n", self.run_on(store, f"layer files {top}").out)
        self.assertEqual("b1", self.run_on(store, "container cat c l/b").out)
        self.assertEqual("", self.run_on(store, "image diff t container:c").out)
        self.assertEqual("/\n", self.run_on(store, f"layer files {own}").out)
        info, = self.run_on(store, f"layer inspect {top}").json
        self.assertEqual((store.files(top), [], "", []), (
            info["diff"], info["lower"], info["link"], info["faults"]))
        self.assertEqual("vfs", self.run_on(store, "store info --format json").json["driver"])
        self.assertIn("layer not known: no layer has the link",
                      self.run_on(store, "resolve-link", "A" * 26, status=3).err)

    def test_files_that_mean_something_in_overlay(self) -> None:
        """Names of containers/storage, and xattrs and devices of overlayfs, are just files here."""
        marks = xattrs({"trusted.overlay.opaque": b"y", "user.overlay.opaque": b"y"})
        tars = b"".join((directory(b"d"), entry(b"d/a", b"1"), entry(b"link", b"A" * 26),
                         entry(b"additionallayer", b"/x"), entry(b"lower", b"l/x"))), \
            b"".join((marks, directory(b"d"), device(b"w", b"3", 0, 0), entry(b"diff1", b"2")))
        _, store = self.stores(*tars)
        with self.open(store) as storage, storage.image("t").tree() as tree:
            self.assertEqual({"d": "dir", "d/a": "1", "w": "char", "link": "A" * 26, "lower": "l/x",
                              "additionallayer": "/x", "diff1": "2"}, self.listing(tree))
            self.assertEqual({b"user.overlay.opaque", b"trusted.overlay.opaque"} - (
                {b"trusted.overlay.opaque"} if storage.rootless else set()),
                set(tree.lookup(b"d")[1].xattrs))
            self.assertEqual([], storage.notes)
            top = storage.image("t").layers()[-1]
            self.assertEqual(("", []), (top.link_id, top.lower_ids()))
            self.assertIsNone(storage.layer_by_id("0" * 64))
        store.layers[0]["uidmap"] = [{"container_id": 0, "host_id": 0, "size": 65536}]
        with self.open(store.save()) as storage, mock.patch(
                "os.listxattr", return_value=["user.overlay.metacopy"]):
            self.assertEqual(tars[0] + END, self.export(storage.image("t").layers()[0]))

    def test_what_vfs_unpacks_otherwise(self) -> None:
        """The layers below are there: their links are followed, and directories keep their mode."""
        for driver, wanted in (("vfs", {"d": "dir", "d/a": "1", "d/b": "2", "e": "dir", "e/x": "3",
                                        "l": "-> d", "m": "= d/a", "no": "dir", "x": "dir"}),
                               ("overlay", {"d": "dir", "d/a": "1", "e": "dir", "e/x": "3",
                                            "l": "dir", "l/b": "2", "x": "dir"})):
            store = StoreBuilder(self.dir + "/" + driver, driver)
            base = store.layer(directory(b"d") + entry(b"d/a", b"1") + symlink(b"l", b"d")
                               + directory(b"e", mode=b"0001777", uid=b"0000004")
                               + xattrs({"user.a": b"1"}) + directory(b"x") + END)
            tar = entry(b"l/b", b"2") + entry(b"e/x", b"3")
            tar += xattrs({"user.b": b"2"}) + directory(b"x")
            if driver == "vfs":
                tar += hardlink(b"m", b"d/a") + entry(b".wh.no") + entry(b"no/.wh.where")
                tar += entry(b"y") + entry(b".wh.y")
            store.image(store.layer(tar + END, base), "t")
            with self.open(store.save()) as storage, storage.image("t").tree() as tree:
                self.assertEqual(wanted, self.listing(tree))
                node = tree.lookup(b"e")[1]
                self.assertEqual((0o1777, 4) if driver == "vfs" else (0o755, 0),
                                 (node.mode, node.uid))
                self.assertEqual([b"user.b", b"user.a"][:1 + (driver == "vfs")],
                                 list(tree.lookup(b"x")[1].xattrs)[::-1])
                self.assertEqual(tar + END, self.export(storage.image("t").layers()[-1]))

    def test_hundreds_of_layers(self) -> None:
        """A directory without an entry takes its metadata from below, from all of them in turn."""
        with mock.patch.object(StoreBuilder, "make_home", lambda store, layer, _: os.makedirs(
                store.files(layer))):
            _, store = self.stores(directory(b"d", mode=b"0000711"), *[
                entry(b"d/%d" % number) for number in range(200)])
        with self.open(store) as storage, storage.image("t").tree() as tree:
            self.assertEqual(0o711, tree.lookup(b"d")[1].mode)
            self.assertEqual(202, sum(1 for _ in tree.walk()))

    def test_links_that_lead_outside_or_nowhere(self) -> None:
        canary = self.dir + "/canary"
        os.mkdir(canary)
        put(canary + "/secret", "CANARY")
        lower = entry(b"secret", b"CANARY") + symlink(b"l", os.fsencode(canary)) \
            + symlink(b"a", b"b") + symlink(b"b", b"a")
        store = StoreBuilder(self.dir + "/hostile", "vfs")
        base = store.layer(lower + END)
        with mock.patch.object(store, "unpack"):
            layers = [store.layer(tar + END, base) for tar in (entry(b"l/x", b"1"), entry(b"a/x"))]
        for number, layer in enumerate(layers):
            store.image(layer, f"localhost/i{number}:latest")
        with self.open(store.save()) as storage, storage.image("i0").tree() as tree:
            self.assertIn(canary[1:] + "/x", self.shown(tree))
            self.assertRaises(cstor.IntegrityError, self.export, storage.image("i0").layers()[-1])
            self.assertRaises(cstor.NotFound, tree.lookup, b"l/secret")
        self.assertIn("behind a loop of symbolic links",
                      self.run_on(store, "image files i1", status=6).err)
        shutil.rmtree(store.files(base))
        os.symlink(canary, store.files(base))
        self.assertIn(f"{base}: No such file or directory", self.run_on(
            store, f"--no-helper layer cat {base} secret", status=6).err)
        self.run_on(store, "image cat i0 secret", status=6)

    @staticmethod
    def shown(tree: cstor.Tree) -> list[str]:
        return [os.fsdecode(path) for path, _, _ in tree.walk()]

    def test_a_container_differs_from_its_image(self) -> None:
        _, store = self.stores(*self.STACK)
        layer = store.layers[-1]["id"]
        place = store.files(layer)
        for name in ("d/b", "d/c"):
            os.unlink(f"{place}/{name}")
        os.rmdir(place + "/d")
        put(place + "/d", b"now a file")
        os.unlink(place + "/l")
        os.makedirs(place + "/l/new")
        put(place + "/l/new/.wh.real", b"no whiteout")
        os.chmod(place + "/g", 0o600)
        os.link(place + "/n", place + "/n2")
        with self.open(store) as storage:
            container = storage.container("c")
            self.assertEqual([], container.faults)
            with container.tree() as tree:
                self.assertEqual({"d": "now a file", "f": "f3", "g": "f1", "l": "dir",
                                  "l/new": "dir", "l/new/.wh.real": "no whiteout", "n": "n3",
                                  "n2": "= n"}, self.listing(tree))
                self.assertEqual([], [row for row in tree_differences(place, tree) if row[0]
                                      and row[1] not in ("owner", "mtime")])
                whole = {path: (node.type, node.tree) for path, node, _ in tree.walk()}
            # One path is looked up without all the others.
            for path in (*whole, b"d/b", b"d/b/c", b"no", b"l/new/no", b"n" * 300, b"g/x"):
                with container.tree() as tree, mock.patch.object(cstor.Contents, "scan", None):
                    if path in whole:
                        node = tree.lookup(path, follow=False)[1]
                        self.assertEqual(whole[path][0], node.type, path)
                        self.assertEqual(whole[path][1].layer_id, node.tree.layer_id, path)
                    else:
                        self.assertRaises(cstor.NotFound, tree.lookup, path)
            with container.tree() as tree:
                self.assertEqual([b"n", b"n2"], [row[0] for row in tree.glob(["/n"])]
                                 + [row[0] for row in tree.glob(["/n2"])])
            with storage.layer(layer).tree() as tree:
                found = {path: node.type for path, node, _ in tree.walk()}
                self.assertEqual({b"": "dir", b"d": "reg", b"g": "reg", b"l": "dir",
                                  b"l/new": "dir", b"l/new/.wh.real": "reg", b"n": "reg",
                                  b"n2": "reg"}, found)
        os.unlink(place + "/f")
        with self.open(store) as storage, storage.layer(layer).tree() as tree:
            self.assertIn((b"f", "whiteout"), [(path, node.type) for path, node, _ in tree.walk()])
        out = self.run_on(store, "image diff t c --ignore time", status=1).out
        self.assertEqual("C /d  type\nD /d/b\nD /d/c\nD /f\nC /g  mode\nC /l  type\nA /l/new\n"
                         "A /l/new/.wh.real\nA /n2\n", out)
        self.run_on(store, "container export c -o", self.dir + "/c.tar")
        with tarfile.open(self.dir + "/c.tar") as tar:
            self.assertEqual(["d", "g", "l", "l/new", "l/new/.wh.real", "n", "n2"],
                             [name for name in tar.getnames() if name != "."])

    def test_damage(self) -> None:
        _, store = self.stores(*self.STACK)
        base, middle, top, _ = (layer["id"] for layer in store.layers)
        shutil.rmtree(store.files(base))
        overwrite(store.files(middle) + "/d/c", b"c!")
        os.unlink(store.files(top) + "/n")
        os.unlink(store.path(f"vfs-layers/{top}.tar-split.gz"))
        os.mkdir(store.path("vfs/dir", "0" * 64))
        with self.open(store) as storage:
            self.assertEqual([[f"vfs/dir/{base} is missing"], [],
                              [f"vfs-layers/{top}.tar-split.gz is missing"]],
                             [storage.layer(layer).damage() for layer in (base, middle, top)])
            for layer, kind, text in (
                    (base, cstor.Unsupported, f"its files are gone: no vfs/dir/{base}"),
                    (middle, cstor.IntegrityError, '"d/c": file integrity checksum failed'),
                    (top, cstor.Unsupported, "has no tar-split data")):
                with self.assertRaisesRegex(kind, text):
                    self.export(storage.layer(layer))
        faults = self.run_on(store, "store info --format json").json["faults"]
        self.assertIn(f"{store.root}/vfs/dir/{'0' * 64} has no record", faults)

    def test_additional_stores(self) -> None:
        other, store = self.stores(*self.STACK)[1], StoreBuilder(self.dir + "/mine", "vfs").save()
        with self.open(store, stores=[other.root]) as storage:
            self.assertEqual(3, len(storage.image("t").layers()))
        listed = self.run_on(store, "image list -q --store", other.root).out
        self.assertEqual(13, len(listed))
        os.makedirs(self.dir + "/none/overlay-images")
        self.assertIn(f"no containers/storage store at {self.dir}/none", self.run_on(
            store, "--driver vfs image list --store", self.dir + "/none", status=3).err)


class HostileStores(StoreTest):
    """Makes stores of layers that nobody built in good faith, beside a canary that may not move."""

    def setUp(self) -> None:
        super().setUp()
        self.canary = self.dir + "/canary"
        os.mkdir(self.canary)
        put(self.canary + "/secret", "CANARY")
        self._canary = snapshot(self.canary)
        self.addCleanup(lambda: self.assertEqual(self._canary, snapshot(self.canary)))
        self.out = self.dir + "/out"
        os.mkdir(self.out)

    def store(self, *layers: bytes) -> StoreBuilder:
        """Return a store with an image "x" of layers whose tars cstor, not tarfile, splits."""
        store = StoreBuilder(tempfile.mkdtemp(dir=self.dir))
        parent = ""
        for number, tar in enumerate(layers):
            parent = store.layer(b"", parent, id=f"{number + 1:064x}")
            store.layers[-1]["diff-digest"] = sha256(tar)
            self.split(store, parent, tar)
        store.image(parent, "localhost/x:latest")
        return store.save()

    @staticmethod
    def split(store: StoreBuilder, layer: str, tar: bytes) -> None:
        """Write tar-split, and the contents where containers/storage puts them."""
        rows = []
        contents: dict[tuple[int, Any], bytes] = {}
        tree = cstor.LayerTree(None)
        tree._root = cstor.Node(tree, None, b"", "dir")
        for literal, member, content in cstor.read_stream([tar], "tar"):
            rows.append(segment(literal))
            if member is None:
                continue
            data = b"".join(tree.expand(member, content))
            row = content_row(member.name, data)
            rows.append(row)
            if data:
                member.base64 = row["payload"].encode()
            contents[len(data), member.base64] = data
            try:
                tree.add(member)
            except cstor.CstorError:  # so it will be in the store: what was before counts
                tree.add = lambda member: None  # type: ignore[method-assign]
        for path, node, _ in cstor.Tree([tree]).walk():
            if node.type == "reg" and len(path) < 1000:
                store.write(os.fsdecode(b"overlay/%s/diff/%s" % (layer.encode(), path)),
                            contents[node.size, node._checksum or b""])
        store.rows(layer, rows)

    def cstor(self, store: StoreBuilder, *args: str, status: int = 0, **kwargs: Any) -> bytes:
        """Run a command on a store; stderr must be a line that a terminal can bear."""
        done = self.run_on(store, *args, status=status, **kwargs)
        self.assertRegex(done.err, r"\A(cstor: [ -~]*\n)*\Z")
        self.assertNotIn(b"CANARY", done.stdout + done.stderr)
        return bytes(done.stdout)

    def extracted(self, store: StoreBuilder, *args: str, status: int = 0) -> list[str]:
        """Return what an extraction consists of, which is removed again."""
        dest = self.out + "/root"
        owner = [] if os.geteuid() == 0 else ["--no-same-owner"]
        self.cstor(store, "-q", "image", "extract", "x", dest, *owner, *args, status=status)
        self.assertEqual(self._canary, snapshot(self.canary))
        self.assertEqual([] if status else ["root"], os.listdir(self.out))
        found = {os.path.relpath(os.fsdecode(path), dest) for path in snapshot(dest)}
        remove(dest)
        return sorted(found - {"."})


class HostileTrees(HostileStores):
    """The right answer or a clear error, and no harm."""

    def files(self, store: StoreBuilder) -> list[bytes]:
        return self.cstor(store, "image", "files", "-0", "x").split(b"\0")[:-1]

    def copied(self, store: StoreBuilder, status: int = 0, **options: Any) -> list[str]:
        """Return what a copy of the whole image consists of, which is removed again."""
        dest = self.out + "/copy"
        self.cstor(store, "image", "cp", "x:/", dest, status=status, **options)
        self.assertEqual([] if status else ["copy"], os.listdir(self.out))
        found = {os.path.relpath(os.fsdecode(path), dest) for path in snapshot(dest)}
        shutil.rmtree(dest, ignore_errors=True)
        return sorted(found - {"."})

    def made(self, store: StoreBuilder, status: int = 0) -> list[str]:
        """Return what a copy and an extraction consist of, which must be the same."""
        found = self.copied(store, status)
        self.assertEqual(found, self.extracted(store, status=status))
        return found

    def test_names_that_lead_outside_stay_inside(self) -> None:
        store = self.store(entry(b"../../up") + entry(b"/abs") + entry(b"a/../../b")
                           + entry(b"d/./e//f") + END)
        self.assertEqual([b"/", b"/abs", b"/b", b"/d", b"/d/e", b"/d/e/f", b"/up"],
                         self.files(store))
        self.assertEqual(["abs", "b", "d", "d/e", "d/e/f", "up"], self.made(store))

    def test_links_that_lead_outside_stay_inside(self) -> None:
        canary = os.fsencode(self.canary)
        inside = self.canary.lstrip("/")
        lower = (symlink(b"abs", canary) + symlink(b"up", b"../" * 9 + canary[1:])
                 + entry(b"abs/planted", b"1") + entry(b"up/planted2", b"2")
                 + symlink(b"file", canary + b"/secret") + END)
        store = self.store(lower)
        self.assertLessEqual({canary + b"/planted", canary + b"/planted2"}, set(self.files(store)))
        for path in ("/file", "/abs/secret", "/up/secret"):
            self.cstor(store, "image", "cat", "x", path, status=3)
        planted = {inside + "/planted", inside + "/planted2"}
        self.assertLessEqual({"abs", "up", "file", *planted}, set(self.made(store)))
        with tarfile.open(fileobj=io.BytesIO(self.cstor(store, "image", "cp", "x:/", "-"))) as tar:
            self.assertEqual(self.canary, tar.getmember("./abs" if "./abs" in tar.getnames()
                                                        else "abs").linkname)
        # In the second layer the link is a directory: what the container sees is there.
        store = self.store(lower, entry(b"file", b"replaced") + entry(b"abs/third", b"3") + END)
        self.assertLessEqual({"abs/third", "file", *planted}, set(self.made(store)))

    def test_hard_links_to_nothing_and_to_links(self) -> None:
        secret = os.fsencode(self.canary + "/secret")
        for target in (b"/etc/passwd", b"missing", b"d", b"self", b"../../etc/passwd", secret,
                       b"../" * 9 + secret[1:]):
            store = self.store(entry(b"d", typeflag=b"5") + hardlink(b"self", target) + END)
            self.cstor(store, "image", "cat", "x", "/self", status=6)
            self.cstor(store, "image", "cp", "x:/", "-", status=6)
            self.made(store, status=6)
            with cstor.Storage.open(store.root) as storage:
                entries = storage.layers()[0].toc()["entries"]  # the headers can still be read
            self.assertEqual(["dir", "hardlink"], [item["type"] for item in entries])
        store = self.store(symlink(b"s", secret) + hardlink(b"h", b"s", mode=b"0000777") + END,
                           entry(b"t", b"1") + END)
        self.assertEqual(["h", "s", "t"], self.made(store))

    def test_hard_links_in_a_circle_and_of_devices(self) -> None:
        store = self.store(hardlink(b"a", b"b") + hardlink(b"b", b"a") + END)
        self.cstor(store, "image", "cat", "x", "/b", status=6)
        store = self.store(entry(b"f", b"data") + hardlink(b"g", b"f") + device(b"n", b"3", 1, 3) +
                           hardlink(b"o", b"n") + END)
        self.assertEqual(["f", "g"], self.copied(store))  # devices are left out, both names

    def test_whiteouts_of_a_name_of_several(self) -> None:
        store = self.store(entry(b"f", b"data") + hardlink(b"g", b"f") + END, entry(b".wh.f") + END)
        self.assertEqual([b"/", b"/g"], self.files(store))
        self.assertEqual(b"data", self.cstor(store, "image", "cat", "x", "/g"))
        self.assertEqual(["g"], self.made(store))

    def test_types_change_places(self) -> None:
        canary = os.fsencode(self.canary)
        store = self.store(
            symlink(b"a", canary) + entry(b"b/f", b"1") + entry(b"c", typeflag=b"6")
            + entry(b"d/e/f", b"2") + END,
            entry(b"a", typeflag=b"5") + entry(b"a/secret", b"mine") + entry(b"b", b"file")
            + entry(b"c/x", b"3") + symlink(b"d/e", canary) + END,
            entry(b"b/f", b"4") + entry(b"d/e/secret", b"5") + END)
        paths = ["a", "a/secret", "b", "b/f", "c", "c/x", "d", "d/e", "d/e/secret"]
        self.assertEqual(["/", *("/" + path for path in paths)],
                         list(map(os.fsdecode, self.files(store))))
        self.cstor(store, "image", "cat", "x", "/d/e/f", status=3)
        self.assertEqual(paths, self.made(store))

    def test_malformed_whiteouts(self) -> None:
        for name in (b".wh.", b".wh..", b".wh...", b"d/.wh.."):
            self.cstor(self.store(entry(name) + END), "image", "files", "x", status=6)
        store = self.store(entry(b"d/f") + entry(b"e/f") + END,
                           entry(b"d/.wh..wh..opq", typeflag=b"5") + entry(b".wh..wh.aufs")
                           + entry(b"e/.wh..wh..opq/x") + END)
        self.assertEqual([b"/", b"/d", b"/e", b"/e/f"], self.files(store))

    def test_chains_of_symbolic_links(self) -> None:
        for count, status in ((39, 0), (40, 0), (41, 6)):
            store = self.store(entry(b"l%d" % count, b"end") + b"".join(
                entry(b"l%d" % i, typeflag=b"2", linkname=b"l%d" % (i + 1))
                for i in range(count)) + END)
            out = self.cstor(store, "image", "cat", "x", "/l0", status=status)
            self.assertEqual(b"" if status else b"end", out)
        loop = symlink(b"a", b"b") + symlink(b"b", b"a")
        self.cstor(self.store(loop + END), "image", "cat", "x", "/a", status=6)
        self.cstor(self.store(loop + entry(b"a/f") + END), "image", "files", "x", status=6)

    def test_a_nul_in_a_name_is_refused(self) -> None:
        for key in (b"path", b"linkpath", b"uname", b"gname"):
            self.assertRaises(cstor.FormatError, cstor.parse_pax, pax({key: b"b\0c"})[512:523 + len(
                key)])
        tree = cstor.LayerTree(None)
        tree.add(cstor.Member(entry(b"d/a"), b"d/a", 0, b""))
        for name in (b"d/b\0c", b"d\0/b"):
            with self.assertRaisesRegex(cstor.FormatError, "NUL"):
                tree.add(cstor.Member(entry(b"x"), name, 0, b""))

    def test_numbers_of_many_digits(self) -> None:
        store = self.store(pax({b"uid": b"0" * 5000 + b"7"}) + entry(b"f") + END)
        found = json.loads(self.cstor(store, "image", "stat", "x", "/f", "--format=json"))
        self.assertEqual(7, found[0]["uid"])

    def test_a_terminal_is_not_steered(self) -> None:
        store = self.store(symlink(b"l", b"\x1b]0;evil\x07") + entry(b"\x1b[2J\n\xff", b"1") +
                           hardlink(b"m", b"\x1b[2J\n\xff") + END)
        for command in (["image", "files", "-l", "x"], ["image", "files", "x"],
                        ["image", "blame", "x"], ["image", "stat", "x", "/l", "--no-follow"]):
            master, slave = open_terminal()
            try:
                subprocess.run([*COMMAND, "--root", store.root, *command], stdout=slave,
                               stderr=slave, env=IDLE, check=False)
                text = os.read(master, 65536)
            finally:
                os.close(master)
                os.close(slave)
            self.assertNotIn(b"\x1b", text, command)
            self.assertNotIn(b"\x07", text, command)

    def test_a_path_with_dots_behind_a_link_in_a_large_layer(self) -> None:
        """A small file of a large layer is found without the tree, where that is the same."""
        rng = random.Random(3)
        many = b"".join(entry(b"x%032x" % rng.getrandbits(128), rng.getrandbits(64).to_bytes(
            8, "big")) for _ in range(1500))
        for tail in (b"", many):
            store = self.store(entry(b"r/s", typeflag=b"5") + entry(b"r/f", b"right") +
                               symlink(b"l", b"r/s") + entry(b"f", b"wrong") + tail + END)
            self.assertEqual(b"right", self.cstor(store, "image", "cat", "x", "/l/../f"))
            self.cstor(store, "image", "cat", "x", "/f/", status=3)

    def test_bombs(self) -> None:
        """Little metadata that would become much memory or time."""
        segments = go_json({"type": 2, "payload": "AA=="}) * 150_000
        store = self.store(END)
        store.write(f"overlay-layers/{1:064x}.tar-split.gz", gzip.compress(segments.encode(), 1))
        self.cstor(store, "image", "files", "x")
        target = b"a/" * 500_000
        store = self.store(b"".join(
            pax({b"linkpath": b"%d/" % i + target}) + entry(b"l%d" % i, typeflag=b"2")
            + entry(b"l%d/f" % i) for i in range(2)) + END)
        self.assertEqual(6, self.status_of(store, "image", "files", "x", memory=400 << 20))
        store = self.store(b"".join(
            pax({b"linkpath": (b"l%d/" % (i - 1) if i else b"") + b"d/" * 2000})
            + entry(b"l%d" % i, typeflag=b"2") + entry(b"l%d/f" % i) for i in range(20)) + END)
        self.assertEqual(6, self.status_of(store, "image", "files", "x", memory=400 << 20))

    @staticmethod
    def status_of(store: StoreBuilder, *args: str, memory: int) -> int:
        """Run a command that may not have more memory; return its status, -1 for want of it."""
        code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, "
                f"({memory}, {memory})); sys.path.insert(0, {HERE!r}); import cstor; "
                f"sys.exit(cstor.main({['--root', store.root, *args]!r}))")
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, check=False, timeout=60)
        return -1 if b"MemoryError" in done.stderr else done.returncode

    def test_headers_that_are_too_large(self) -> None:
        for header in (pax({b"comment": b"c" * (1 << 20)}), pax({b"comment": b"c" * 1000_000}) * 9):
            store = self.store(END)
            store.rows(f"{1:064x}", [segment(header + entry(b"f")), content_row(b"f", b"")])
            self.cstor(store, "image", "files", "x", status=6)

    def test_memory_of_many_entries(self) -> None:
        need_proc()
        store = self.store(END)
        with gzip.open(store.path(f"overlay-layers/{1:064x}.tar-split.gz"), "wb", 1) as out:
            for i in range(100_000):
                name = b"d%03d/file-%07d" % (i // 100, i)
                out.write(b'{"type":2,"payload":"%s"}\n{"type":1,"name":"%s","payload":null}\n' % (
                    base64.b64encode(entry(name)), name))
        self.assertLess(peak_memory("--root", store.root, "image", "toc", "x"), 80 << 10)

    def test_ten_thousand_directories_inside_one_another(self) -> None:
        self.addCleanup(remove, self.out)  # rmtree recurses
        self.cstor(self.store(pax({b"path": b"d/" * 10_000}) + entry(b"d", typeflag=b"5") + END),
                   "image", "files", "x", status=6)
        store = self.store(b"".join(pax({b"path": b"d/" * i}) + entry(b"d", typeflag=b"5")
                                    for i in range(1, 1500)) + entry(b"z", b"1") + END)
        self.assertEqual(1501, len(self.files(store)))
        store.write(f"overlay/{1:064x}/diff/z", "2")
        self.copied(store, status=4)

    def test_a_damaged_file_leaves_nothing_behind(self) -> None:
        store = self.store(entry(b"a/f", b"good") + entry(b"z", b"good") + END)
        store.write(f"overlay/{1:064x}/diff/z", "evil")
        target = self.out + "/f"
        self.cstor(store, "image", "cat", "x", "/z", "-o", target, status=4)
        self.cstor(store, "image", "cp", "x:/z", target, status=4)
        self.cstor(store, "image", "cp", "x:/", "-", status=4)
        self.cstor(store, "image", "toc", "--digests", "x", status=4)
        self.copied(store, status=4)

    def test_a_closed_directory_is_removed_by_its_owner_too(self) -> None:
        need(os.geteuid() == 0, "needs root, to become somebody else")
        store = self.store(entry(b"a", typeflag=b"5", mode=b"0000555") + entry(b"a/f", b"good")
                           + entry(b"z", b"good") + END)
        content = store.write(f"overlay/{1:064x}/diff/z", "evil")
        for path in snapshot(self.dir):
            os.chmod(path, 0o755)
        self._canary = snapshot(self.canary)
        os.chown(self.out, 65534, 65534)
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
        self.assertEqual(4, cstor.main(["-q", "--root", store.root, "image", "cp", "x:/",
                                        self.dir + "/warm"]))  # imports what only root may read
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), handlers):
            signal.signal(number, handler)
        for status, data, mode in ((4, "evil", 0o755), (5, "good", 0), (0, "good", 0o755)):
            store.write(f"overlay/{1:064x}/diff/z", data)
            os.chmod(content, mode)
            self.assertEqual(status, self.as_nobody(
                "-q", "--root", store.root, "image", "cp", "x:/", self.out + "/copy"))
            self.assertEqual([] if status else ["copy"], os.listdir(self.out))

    @staticmethod
    def as_nobody(*args: str) -> int:
        """Run a command as another user; some interpreters are where only root can look."""
        pid = os.fork()
        if not pid:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                os._exit(cstor.main(args))
            finally:
                os._exit(99)
        return os.WEXITSTATUS(os.waitpid(pid, 0)[1])

    def test_a_device_keeps_its_mode(self) -> None:
        need(os.geteuid() == 0, "needs root, to make a device")
        null = self.dir + "/null"
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.chmod(null, 0o666)
        self.cstor(self.store(entry(b"f", b"1") + END), "image", "cp", "x:/f", null)
        self.assertEqual(0o666, stat.S_IMODE(os.stat(null).st_mode))

    def test_sigterm_leaves_nothing_behind(self) -> None:
        store = self.store(b"".join(entry(b"d%d/f%d" % (i % 50, i), b"%d" % i)
                                    for i in range(3000)) + END)
        self.guard(store.root)
        with subprocess.Popen([*COMMAND, "--root", store.root, "image", "cp", "x:/",
                               self.out + "/copy"], env=IDLE) as process:
            while not any(name.endswith(".partial") for name in os.listdir(self.out)):
                self.assertIsNone(process.poll(), "it ended before it could be stopped")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(143, process.wait(timeout=30))
        self.assertEqual([], os.listdir(self.out))

    def test_odd_names_are_copied_as_they_are(self) -> None:
        names = [b"new\nline", b"\x1b[31m", b"\xff\xfe", b"-rf", b" ", b"...", b"a\\b", b"n" * 255]
        store = self.store(b"".join(pax({b"path": name}) + entry(b"x", name) for name in names)
                           + END)
        self.assertEqual(sorted(b"/" + name for name in names), sorted(self.files(store)[1:]))
        self.assertEqual(sorted(map(os.fsdecode, names)), self.made(store))
        self.cstor(store, "image", "cp", "x:/", self.canary, status=6)  # it is not empty
        for name in names:
            self.assertEqual(name, self.cstor(store, "image", "cat", "x", "/" + os.fsdecode(name)))
        store = self.store(entry(b"a", b"1") + pax({b"path": b"n" * 256})
                           + entry(b"n", typeflag=b"5") + END)
        self.extracted(store, status=6)  # no file system takes it


# ================================================================================================
# 16. tar-diff
# ================================================================================================

Places = list[tuple[Any, ...]]  # of each byte: index, entry and field


def gnu_entry(name: bytes, data: bytes = b"", typeflag: bytes = b"0", rest: bytes = b"",
              **fields: Any) -> bytes:
    """Return a member of GNU tar's old format; ``rest`` stands where ustar has the prefix."""
    return entry(name, data, typeflag, magic=b"ustar  \0", prefix=rest, **fields)


class PlacedTar:
    """A tar made of labelled pieces, so that the place of each byte is known by construction."""

    REST = {"ustar": (("prefix", 155), ("header padding", 12)),
            "gnu": (("atime", 12), ("ctime", 12), ("offset", 12), ("longnames", 4),
                    ("header padding", 1), ("sparse", 96), ("isextended", 1), ("realsize", 12),
                    ("header padding", 17))}

    def __init__(self) -> None:
        self.tar = b""
        self.places: Places = []
        self.index = 0

    def add(self, data: bytes, *fields: tuple[str, int], name: str | None = None,
            last: bool = True) -> None:
        """Add a header with what follows: ``fields`` are those after the first block."""
        gnu = data[257:265] == b"ustar  \0"
        labels: list[str] = []
        kind = {b"x": "pax", b"g": "global", b"L": "long name", b"K": "long link"}.get(
            data[156:157])
        for field, width in (*FIELDS[:9], ("magic", 6), ("version", 2), *FIELDS[10:12],
                             ("devmajor", 8), ("devminor", 8), *self.REST["gnu" if gnu else
                                                                          "ustar"]):
            labels += [f"{kind} header {field.replace('header ', '')}" if kind else field] * width
        for field, width in fields:
            labels += [field] * width
        labels += [f"{kind} padding" if kind else "padding"] * (len(data) - len(labels))
        assert len(labels) == len(data), (name, len(labels), len(data))
        self.tar += data
        self.places += [(self.index, name, label) for label in labels]
        self.index += last

    def add_pax(self, name: str, records: dict[bytes, bytes], typeflag: bytes = b"x") -> None:
        fields = []
        for key, value in records.items():
            alone = pax({key: value})
            text = key.decode()
            label = f"xattr {text[13:]}" if text.startswith("SCHILY.xattr.") else f"pax {text}"
            fields.append((label, len(alone[BLOCK:].rstrip(b"\0"))))
        self.add(pax(records, typeflag), *fields, name=name, last=typeflag == b"g")

    def end(self, trailer: bytes = END) -> tuple[bytes, Places]:
        self.tar += trailer
        self.places += [(None, None, "trailer")] * len(trailer)
        return self.tar, self.places


def placed_tars() -> Iterator[tuple[str, bytes, Places]]:
    """Yield small tars of all formats, with the place of each of their bytes."""
    tar = PlacedTar()
    tar.add(entry(b"v7", b"seven", magic=b""), ("content", 5), name="v7")
    tar.add(entry(b"v7d/", typeflag=b"\0", magic=b""), name="v7d/")
    yield "v7", *tar.end()

    tar = PlacedTar()
    tar.add(entry(b"base", b"x" * 600, prefix=b"some/prefix", uname=b"root", gname=b"wheel"),
            ("content", 600), name="some/prefix/base")
    tar.add(hardlink(b"hard", b"base"), name="hard")
    tar.add(symlink(b"soft", b"base"), name="soft")
    yield "ustar", *tar.end(END + b"garbage" * 3)

    tar = PlacedTar()
    tar.add(device(b"null", b"3", 1, 3), name="null")
    tar.add(entry(b"loop", typeflag=b"4", major=b"0000007"), name="loop")
    tar.add(entry(b"pipe", typeflag=b"6"), name="pipe")
    yield "devices", *tar.end(b"")  # ends without any trailer

    tar = PlacedTar()
    long = "n" * 120
    tar.add(gnu_entry(b"././@LongLink", long.encode() + b"\0", b"L"), ("name", 121), name=long,
            last=False)
    tar.add(gnu_entry(b"././@LongLink", long.encode() + b"\0", b"K"), ("linkname", 121), name=long,
            last=False)
    tar.add(gnu_entry(long[:100].encode(), typeflag=b"2", linkname=long[:100].encode()), name=long)
    tar.add(gnu_entry(b"after", b"1"), ("content", 1), name="after")
    yield "gnu", *tar.end()

    tar = PlacedTar()
    runs = b"%011o\0" % 0 + b"%011o\0" % 1
    rest = bytes(41) + 4 * runs + b"\1" + b"00000001000\0"
    header = gnu_entry(b"sparse", b"", b"S", rest, size=b"00000000001")
    tar.add(header + (21 * runs)[:504].ljust(504, b"\0") + bytes(8) + b"c" + bytes(511),
            ("sparse", 504), ("isextended", 1), ("header padding", 7), ("content", 1),
            name="sparse")
    yield "gnu-sparse", *tar.end()

    tar = PlacedTar()
    tar.add_pax("pax_global_header", {b"comment": b"global"}, b"g")
    tar.places = [(index, "PaxHeaders/x", field) for index, _, field in tar.places]
    tar.add_pax("path/in/pax", {b"path": b"path/in/pax", b"mtime": b"1700000000.25",
                                b"SCHILY.xattr.user.mime": b"text/plain"})
    tar.add(entry(b"short", b"12345"), ("content", 5), name="path/in/pax")
    tar.add_pax("last", {b"size": b"3", b"linkpath": b"z"})
    tar.add(entry(b"last", b"123", size=0), ("content", 3), name="last")
    yield "pax", *tar.end(END[:BLOCK])


class TarDiffs(StoreTest):
    """tar-diff, on tars made by hand whose places are known."""

    def put(self, name: str, data: bytes) -> str:
        path = os.path.join(self.dir, name)
        put(path, data)
        return path

    def test_a_long_map_of_the_old_sparse_format(self) -> None:
        """A map of 60 runs has three blocks of its own behind the header."""
        need_tools("tar")
        put(self.dir + "/s", b"")
        with open(self.dir + "/s", "r+b") as file:
            for number in range(60):
                file.seek(number << 14)
                file.write(b"%04d" % number * 1024)
            file.truncate(61 << 14)
        put(self.dir + "/z", b"behind")
        tar = subprocess.run(["tar", "-cS", "--format=gnu", "-C", self.dir, "s", "z"],
                             stdout=subprocess.PIPE, check=True).stdout
        self.assertEqual(b"\1\1\0", tar[1016:2552:512][:3] if tar[482] else b"")
        at = tar.rindex(b"behind")
        rows = self.rows(tar, tar[:at] + b"B" + tar[at + 1:])
        self.assertEqual([("first", "z"), ("changed", "z")],
                         [(row["change"], row["entry"]) for row in rows])

    def rows(self, a: bytes, b: bytes) -> list[dict[str, Any]]:
        return list(cstor.diff_tars(self.put("a.tar", a), self.put("b.tar", b)))

    def changes(self, a: bytes, b: bytes) -> list[tuple[Any, ...]]:
        """Return the rows after the first as tuples, without their keys."""
        return [tuple(row.values()) for row in self.rows(a, b)[1:]]

    def test_every_byte(self) -> None:
        for name, tar, places in placed_tars():
            self.assertEqual(len(tar), len(places), name)
            original, other = self.put("a.tar", tar), self.put("b.tar", tar)
            self.assertEqual([], list(cstor.diff_tars(original, other)))
            with open(other, "r+b", buffering=0) as file:
                for at, place in enumerate(places):
                    if not FULL and at % 4 and 8 < at % BLOCK < BLOCK - 8:
                        continue
                    more = (0, tar[at] ^ 0x80)[at % 2:][:FULL]
                    values = {tar[at] ^ 1, *more} - {tar[at]}
                    for value in values:
                        os.pwrite(file.fileno(), bytes([value]), at)
                        with self.subTest(tar=name, at=at, value=value):
                            self.one_byte(original, other, at, place)
                            mutant = tar[:at] + bytes([value]) + tar[at + 1:]
                            self.one_byte(other, original, at, place, mutant)
                    os.pwrite(file.fileno(), tar[at:at + 1], at)

    def one_byte(self, a: str, b: str, at: int, place: tuple[int | None, str | None, str],
                 mutant: bytes = b"") -> None:
        """Check the place of the only byte that differs; ``mutant`` is the tar when ``a`` is one.

        What a changed pax record or long name says is all that is known of it then.
        """
        first, *others = cstor.diff_tars(a, b)
        index, name, field = place
        self.assertEqual(("first", at, index), (first["change"], first["offset"], first["index"]))
        if mutant and first["field"] != field and field.split()[0] in ("pax", "xattr"):
            key = cstor.unspell(first["field"].partition(" ")[2])
            self.assertIn(key + b"=", mutant[at - len(key) - 16:at + len(key) + 16])
        else:
            self.assertEqual(field, first["field"])
        if mutant and first["entry"] != name and field in ("name", "pax path"):
            self.assertIn(cstor.unspell(first["entry"]), mutant)
        else:
            self.assertEqual(name, first["entry"])
        self.assertTrue(others)
        self.assertEqual(field == "content", "contentOffset" in first)

    def test_exit_status_and_text(self) -> None:
        a, b = self.put("a", entry(b"f", b"12") + END), self.put("b", entry(b"f", b"13") + END)
        self.assertEqual(b"", self.run_cstor("tar-diff", a, a).stdout)
        text = self.run_cstor("tar-diff", a, b, status=1).out.splitlines()
        self.assertEqual("first difference at offset 513: f: content at 1", text[0])
        self.assertEqual(["changed f content: 2 bytes, " + sha256(b"12") + " -> 2 bytes, "
                          + sha256(b"13")], text[1:])
        hostile = self.put("c", entry(b"\x1b[31m\n") + END)
        text = self.run_cstor("tar-diff", a, hostile, status=1).out.splitlines()
        self.assertIn("extra \\x1b[31m\\n: - -> 0", text)
        self.run_cstor("tar-diff", a, self.dir + "/nope", status=3)
        self.run_cstor("tar-diff", a, self.dir, status=6)
        self.run_cstor("tar-diff", "-", "-", status=2)
        for data in (b"text\n", b"text" * 500, b"\x7fELF" + bytes(2000)):
            junk = self.put("junk", data)
            self.assertIn(b"not a tar", self.run_cstor("tar-diff", junk, junk, status=6).stderr)
            self.run_cstor("tar-diff", a, junk, status=6)

    def test_json(self) -> None:
        a = self.put("a", entry(b"f\xff", b"12") + END)
        b = self.put("b", entry(b"f\xff", b"12", mode=b"0000600") + entry(b"g") + END)
        same = json.loads(self.run_cstor("tar-diff", a, a, "--format", "json").stdout)
        self.assertEqual({"identical": True, "first": None, "differences": []}, same)
        found = json.loads(self.run_cstor("tar-diff", a, b, "--format", "json", status=1).stdout)
        self.assertEqual(["identical", "first", "differences"], list(found))
        self.assertEqual({"offset": 105, "index": 0, "entry": cstor.spell(b"f\xff"),
                          "field": "mode"}, found["first"])
        self.assertEqual([{"change": "changed", "entry": cstor.spell(b"f\xff"), "field": "mode",
                           "a": "0644", "b": "0600"}, {"change": "extra", "entry": "g", "a": None,
                                                       "b": 1}], found["differences"])

    def test_identical(self) -> None:
        for _, tar in [*odd_tars(), ("empty", b""), ("zeros", END), ("no end", entry(b"f"))]:
            self.assertEqual([], self.rows(tar, tar))

    def test_entries(self) -> None:
        f, g, h = (entry(name, name) for name in (b"f", b"g", b"h"))
        for a, b, rows in (
                (f + g, f + g + h, [("extra", "h", None, 2)]),
                (f + g + h, g + h, [("missing", "f", 0, None)]),
                (f + g, g + f, [("reordered", "f", 0, 1)]),
                (f + g + h, f + g + f + h, [("duplicated", "f", 1, 2)]),
                (f + f + g, g, [("missing", "f", 0, None), ("duplicated", "f", 2, 0)]),
                (f + f, f + f + f, [("duplicated", "f", 2, 3)]),
                (f + g + f, g + f + f, [("reordered", "f", 0, 1)])):
            found = self.changes(a + END, b + END)
            self.assertEqual(rows, [row for row in found if row[0] != "changed"], (a, b))

    def test_an_entry_that_moves_is_one_row(self) -> None:
        names = [b"n%d" % i for i in range(50)]
        moved = [*names[:3], *names[4:40], names[3], *names[40:]]
        for old, new in ((names, moved), (moved, names)):
            found = self.changes(b"".join(map(entry, old)), b"".join(map(entry, new)))
            self.assertEqual([("reordered", "n3")], [row[:2] for row in found])
        swapped = names[10:] + names[:10]
        found = self.changes(b"".join(map(entry, names)), b"".join(map(entry, swapped)))
        self.assertEqual({("reordered", f"n{i}") for i in range(10)}, {row[:2] for row in found})
        self.assertEqual(10, len(found))

    def test_the_nth_of_a_name_meets_the_nth(self) -> None:
        a = b"".join(entry(b"f", text) for text in (b"1", b"2", b"3"))
        b = b"".join(entry(b"f", text) for text in (b"1", b"2", b"4"))
        row = self.changes(entry(b"x") + entry(b"y") + a + END, entry(b"y") + b + entry(b"x")
                           + END)[0]
        self.assertEqual(("changed", "f", "content"), row[:3])
        self.assertEqual({hashlib.sha256(text).hexdigest() for text in (b"3", b"4")},
                         {row[3]["sha256"], row[4]["sha256"]})

    def test_fields(self) -> None:
        def changes(a: dict[str, Any], b: dict[str, Any], flag: bytes = b"0") -> list[Any]:
            return [row[2:] for row in self.changes(entry(b"f", typeflag=flag, **a) + END,
                                                    entry(b"f", typeflag=flag, **b) + END)]

        self.assertEqual([("mode", "0644", "4755"), ("uid", 0, 1000), ("gid", 0, 2**31)], changes(
            {}, {"mode": b"0004755", "uid": b"0001750", "gid": base256(2**31, 8)}))
        self.assertEqual([("mtime", "2021-01-14T08:25:36Z", "1970-01-01T00:00:08Z")],
                         changes({}, {"mtime": b"10"}))
        self.assertEqual([("mode", "0000644 ", "0000644\0")], changes({"mode": b"0000644 "}, {}))
        self.assertEqual([("linkname", "a", "b")], changes(
            {"linkname": b"a"}, {"linkname": b"b"}, b"2"))
        self.assertEqual([("uname", "u", "root"), ("gname", "", "wheel"), ("devmajor", 1, 2),
                          ("devminor", 0, 8)], changes(
            {"uname": b"u", "major": b"1"}, {"uname": b"root", "gname": b"wheel", "major": b"2",
                                             "minor": b"0000010"}, b"3"))
        self.assertEqual([("typeflag", "3", "4")], [row[2:] for row in self.changes(
            entry(b"f", typeflag=b"3"), entry(b"f", typeflag=b"4"))])
        self.assertEqual([("uid", "zzz" + "\0" * 5, 0)], changes({"uid": b"zzz"}, {}))
        wrong = entry(b"f")[:148] + b"000000\0 " + entry(b"f")[156:]
        (_, _, field, a, b), = self.changes(wrong + END, entry(b"f") + END)
        self.assertEqual(("chksum", "right"), (field, b))
        self.assertRegex(a, r"wrong header checksum: expected 0, got \d+")

    def test_pax_records(self) -> None:
        def changes(a: dict[bytes, bytes], b: dict[bytes, bytes]) -> list[Any]:
            return [row[2:] for row in self.changes(pax(a) + entry(b"f") + END,
                                                    pax(b) + entry(b"f") + END)
                    if row[2] != "pax header size"]

        cap = b"SCHILY.xattr.security.capability"
        self.assertEqual([("pax mtime", "1.5", "1.25"), ("xattr security.capability", "1", None),
                          ("pax comment", None, "c")], changes(
            {b"mtime": b"1.5", cap: b"1"}, {b"mtime": b"1.25", b"comment": b"c"}))
        self.assertEqual([("pax order", "a b", "b a")], changes(
            {b"a": b"1", b"b": b"2"}, {b"b": b"2", b"a": b"1"}))
        (field, a, b), = changes({b"a": b"1" * 5000}, {b"a": b"2" * 5000})
        self.assertEqual(("pax a", sha256(b"1" * 5000) + " (5000 bytes)"), (field, a))
        found = self.changes(pax({b"a": b"1"}) + entry(b"f"), pax({b"a": b"1"}, name=b"P")
                             + entry(b"f"))
        self.assertEqual([("changed", "f", "pax header name", "PaxHeaders/x", "P")], found)
        found = self.changes(entry(b"PaxHeaders/x", b"6 aa=\n", b"x") + entry(b"f"),
                             entry(b"PaxHeaders/x", b"6 aa=\n", b"x", padding=b"1") + entry(b"f"))
        self.assertEqual(["header"], [row[2] for row in found])
        self.assertEqual([("pax records", None, "9 a=1\n"), ("pax header size", None, 6)], [
            row[2:] for row in self.changes(entry(b"f"), entry(b"P", b"9 a=1\n", b"x")
                                            + entry(b"f"))])

    def test_trailers(self) -> None:
        first, row = self.rows(entry(b"f") + END, entry(b"f") + END + bytes(BLOCK))
        self.assertEqual(("end of file", "a", None, BLOCK + 1024), (
            first["field"], first["ended"], first["entry"], first["offset"]))
        self.assertEqual(("trailer", 1024, 1536), (row["field"], row["a"]["size"],
                                                   row["b"]["size"]))
        first, row = self.rows(entry(b"f", b"1"), entry(b"f", b"1", padding=b"\1"))
        self.assertEqual(("padding", BLOCK + 1, "f"), (first["field"], first["offset"],
                                                       first["entry"]))
        self.assertEqual(("padding", "", "\1" * 511), (row["field"], row["a"], row["b"]))

    def test_truncated(self) -> None:
        for name, tar, places in placed_tars():
            for cut in [*range(0, len(tar), BLOCK), 3 * BLOCK // 2]:
                for a, b, ended in ((tar, tar[:cut], "b"), (tar[:cut], tar, "a")):
                    first, *others = self.rows(a, b)
                    index, entry_name, _ = places[cut]
                    with self.subTest(tar=name, cut=cut, ended=ended):
                        self.assertEqual(("end of file", ended, cut, index), (
                            first["field"], first["ended"], first["offset"], first["index"]))
                        self.assertEqual(entry_name, first["entry"])
                        self.assertTrue(others)
                self.assertEqual([], self.rows(tar[:cut], tar[:cut]))

    def test_reading_goes_on(self) -> None:
        f, g = entry(b"f", b"1" * 600), entry(b"g", b"2")
        broken = entry(b"f", b"1" * 600, size=b"zz")
        changes = self.changes(f + g + END, broken + g + END)
        self.assertIn(("unreadable", None, None, 'the size of "f" is malformed'), changes)
        self.assertIn(("missing", "g", 1, None), changes)
        changes = self.changes(f + g, (f + g)[:1000])
        self.assertIn(("unreadable", None, None, 'the content of "f" is cut off'), changes)
        flipped = bytearray(f + g + END)
        flipped[BLOCK * 3 + 110] ^= 1  # the uid of g: its checksum is wrong now
        changes = self.changes(f + g + entry(b"h") + END, bytes(flipped[:-1024]) + entry(b"h",
                                                                                   b"3") + END)
        self.assertEqual(["uid", "chksum", "size", "content"], [row[2] for row in changes])

    def test_compressed(self) -> None:
        tar = make_tar(("f", b"1" * 100_000), ("g", random.Random(1).randbytes(100_000)))
        plain = self.put("plain", tar)
        packed = {"gz": gzip.compress(tar), "bz2": bz2.compress(tar), "xz": lzma.compress(tar)}
        if shutil.which("zstd"):
            packed["zst"] = subprocess.run(["zstd", "-c", plain], stdout=subprocess.PIPE,
                                           check=True).stdout
        for kind, data in packed.items():
            path = self.put(f"t.{kind}", data)
            self.run_cstor("tar-diff", plain, path)
            self.assertEqual([], list(cstor.diff_tars(path, plain)))
            other = self.put("other", tar[:-1] + b"1")
            self.assertEqual(len(tar) - 1, next(cstor.diff_tars(other, path))["offset"])
            with open(path, "rb") as file:
                self.run_cstor("tar-diff", "-", plain, stdin=file)
            for broken in (data[:-20], data[:len(data) // 2], data[:len(data) // 2] + b"\xff" * 9
                           + data[len(data) // 2 + 9:]):
                cut = self.put("cut", broken)
                self.assertRegex(self.run_cstor("tar-diff", plain, cut, status=6).stderr,
                                 b"damaged|not a tar")  # bzip2 checks at the end of a block
                self.assertRaises(cstor.FormatError, list, cstor.diff_tars(cut, plain))

    def test_differences_before_damage(self) -> None:
        """All rows come before the error but for those of bytes that were not decompressed."""
        words = [random.Random(number).randbytes(768) for number in range(1201)]
        a, b = [b"".join(entry(b"%d" % number, base64.b64encode(words[number + more]))
                         for number in range(1200)) + END for more in (0, 1)]
        plain, other = self.put("plain", a), self.put("other", b)
        packed: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
            "gz": (gzip.compress(b), lambda data: zlib.decompressobj(31).decompress(data)),
            "bz2": (bz2.compress(b), lambda data: bz2.BZ2Decompressor().decompress(data)),
            "xz": (lzma.compress(b), lambda data: lzma.LZMADecompressor().decompress(data))}
        if shutil.which("zstd"):
            packed["zst"] = subprocess.run(
                ["zstd", "-c", other], stdout=subprocess.PIPE, check=True).stdout, \
                lambda data: subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL, check=False).stdout
        for kind, (data, unpack) in packed.items():
            at = len(data) * 4 // 5
            known = len(unpack(data[:at])) - BLOCK  # the header of the next entry is read first
            with self.subTest(kind=kind):
                self.cut_short(plain, data[:at], known // (3 * BLOCK))
                if kind == "gz":  # what one step decompressed is lost
                    self.cut_short(plain, data[:at] + bytes(99) + data[at + 99:],
                                   (known - 8192) // (3 * BLOCK))

    def cut_short(self, plain: str, damaged: bytes, least: int) -> None:
        """Check that so many entries are told as changed before the error."""
        done = self.run_cstor("tar-diff", plain, self.put("cut", damaged), status=6)
        self.assertIn(b"damaged: ", done.stderr)
        told = [line.split()[1] for line in done.out.splitlines() if line.startswith("changed")]
        self.assertEqual([str(number) for number in range(len(told))], told)
        self.assertGreaterEqual(len(told), least)
        self.assertGreater(least, 500)

    def test_zstd_by_module_or_not_at_all(self) -> None:
        path = self.put("t.zst", b"\x28\xb5\x2f\xfd" + entry(b"f") + END)
        plain = self.put("plain", entry(b"f") + END)

        class ZstdFile(io.BytesIO):
            def __init__(self, file: Any) -> None:
                super().__init__(file.read()[4:])

        module = mock.Mock(ZstdFile=ZstdFile, ZstdError=ZeroDivisionError)
        with mock.patch.dict(sys.modules, {"compression": mock.Mock(), "compression.zstd": module}):
            self.assertEqual([], list(cstor.diff_tars(path, plain)))
        if sys.version_info < (3, 14):
            self.assertIn(b"program zstd", self.run_cstor(
                "tar-diff", path, plain, status=6, env={"PATH": self.dir}).stderr)
        need_tools("zstd")
        self.assertIn(b"damaged", self.run_cstor("tar-diff", path, plain, status=6).stderr)

    def test_zstd_that_nobody_reads_to_the_end(self) -> None:
        need_tools("zstd")
        big = self.put("big", make_tar(("f", random.Random(1).randbytes(3_000_000))))
        subprocess.run(["zstd", "-q", big], check=True)
        junk = self.put("junk", b"no tar")
        self.assertRaises(cstor.FormatError, list, cstor.diff_tars(big + ".zst", junk))

    def test_stdin_that_comes_byte_by_byte(self) -> None:
        tar = entry(b"f", b"1") + END
        plain = self.put("plain", tar)
        for data in (tar, gzip.compress(tar)):
            process = subprocess.Popen([*COMMAND, "tar-diff", "-", plain],
                                       stdin=subprocess.PIPE, env=IDLE)
            assert process.stdin
            with process.stdin as pipe:
                for byte in data[:8]:
                    pipe.write(bytes([byte]))
                    pipe.flush()
                    time.sleep(0.01)
                pipe.write(data[8:])
            self.assertEqual(0, process.wait())
        with open(plain, "rb") as file:  # from where it stands, as any program reads stdin
            file.seek(BLOCK, os.SEEK_SET)
            self.run_cstor("tar-diff", "-", plain, status=6, stdin=file)

    def test_memory(self) -> None:
        small = self.put("small", entry(b"f") + END)
        big = self.put("big", entry(b"f", size=1 << 28))
        os.truncate(big, BLOCK + (1 << 28) + 1024)
        least = peak_memory("tar-diff", small, small)
        self.assertLess(peak_memory("tar-diff", big, big), least + 16 * 1024)

    def test_memory_of_entries_that_wait(self) -> None:
        a = self.put("a", b"".join(entry(b"a%d" % i) for i in range(100)))
        b = self.put("b", b"".join(entry(b"b%d" % i) for i in range(100)))
        self.assertEqual(201, len([row for row in cstor.diff_tars(a, b)
                                   if row["change"] in ("first", "missing", "extra")]))
        with mock.patch("cstor.MAX_UNPAIRED", 50_000):
            self.assertRaises(cstor.Unsupported, list, cstor.diff_tars(a, b))

    def test_any_bytes_end_well(self) -> None:
        rng = random.Random(5)
        tars = [tar for _, tar, _ in placed_tars()]
        for _ in range(1000 if FULL else 200):
            a, b = rng.choice(tars), bytearray(rng.choice(tars))
            for _ in range(rng.randrange(1, 9)):
                b[rng.randrange(len(b))] = rng.choice((0, 0x20, 0x31, 0x37, 0x4C, 0x78, 0x80, 0xFF))
            try:
                rows = self.rows(a, bytes(b))
            except cstor.FormatError as error:
                self.assertIn("not a tar", str(error))
                continue
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            self.assertEqual([at] if a != b else [], [row["offset"] for row in rows[:1]])


# ================================================================================================
# 17. Extract
# ================================================================================================

class Copies(TreeTest):
    TAR = b"".join((directory(b"d", mode=b"0001755", mtime=b"00000000005"),
                    pax({b"mtime": b"7.000000009"}), entry(b"d/f", b"one", mode=b"0004640"),
                    hardlink(b"d/hard", b"d/f", mode=b"0004640", mtime=b"00000000007"),
                    symlink(b"d/sym", b"/etc/passwd"), directory(b"d/closed", mode=b"0000000"),
                    entry(b"d/closed/in", b"x" * 70000), entry(b"d/fifo", typeflag=b"6"),
                    entry(b"d/latin-\xe9", b"l"), device(b"d/null", b"3", 1, 3)))

    def copy(self, tree: cstor.Tree, path: bytes) -> list[bytes]:
        with cstor.OutputDirectory(self.dir + "/copy") as output:
            made = cstor.Extraction(output, plain=True, verify=True).run(
                cstor.select_nodes(tree, top=path))
        return [path + cstor.unspell(place) for place in made["left-out"]]

    def test_a_directory_is_copied(self) -> None:
        with self.tree(self.TAR) as tree:
            self.assertEqual([b"d/null"], self.copy(tree, b"d"))
        top = os.fsencode(self.dir + "/copy")
        found = {}
        for folder, folders, files in os.walk(top):
            for path in (os.path.join(folder, name) for name in [*folders, *files]):
                status = os.lstat(path)
                found[path[len(top) + 1:]] = (
                    stat.filemode(status.st_mode), status.st_mtime_ns if path[-2:] != b"fo" else 0)
        when = 0o14000000000 * 10**9
        self.assertEqual(
            {b"f": ("-rw-r-----", 7 * 10**9), b"hard": ("-rw-r-----", 7 * 10**9),
             b"sym": ("lrwxrwxrwx", when), b"closed": ("d---------", when),
             b"closed/in": ("-rw-r--r--", when), b"fifo": ("prw-r--r--", 0),
             b"latin-\xe9": ("-rw-r--r--", when)},
            found if os.geteuid() == 0 else {**found, b"closed/in": ("-rw-r--r--", when)})
        status = os.stat(top)
        self.assertEqual((0o1755, 5 * 10**9), (stat.S_IMODE(status.st_mode), status.st_mtime_ns))
        self.assertTrue(os.path.samefile(top + b"/f", top + b"/hard"))
        self.assertEqual(b"/etc/passwd", os.readlink(top + b"/sym"))
        os.chmod(top + b"/closed", 0o700)

    def test_a_hard_linked_device_is_left_out(self) -> None:
        null = device(b"d/dev", b"3", 1, 3)
        with self.tree(null + hardlink(b"d/other", b"d/dev"), files=False) as tree:
            self.assertEqual([b"d/dev", b"d/other"], self.copy(tree, b"d"))

    def test_a_tree_as_a_tar(self) -> None:
        with self.tree(self.TAR) as tree:
            tar = b"".join(cstor.tar_out(tree, b"d", b"top"))
            self.assertEqual(tar, b"".join(cstor.tar_out(tree, b"d", b"top")))
            with self.tree(tar[:-1024]) as again:
                self.assertEqual([], list(cstor.diff_trees(
                    self.below(tree, b"d"), self.below(again, b"top"))))
            with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as members:
                self.assertEqual(
                    ["top", "top/closed", "top/closed/in", "top/f", "top/fifo", "top/hard",
                     "top/latin-\udce9", "top/null", "top/sym"], members.getnames())
                self.assertEqual("top/f", members.getmember("top/hard").linkname)

    def below(self, tree: cstor.Tree, path: bytes) -> Any:
        """Return what walks as the subtree ``path`` does."""
        walked = [(place[len(path):], node, first) for place, node, first in tree.walk(path)]
        view = mock.Mock(crc64=tree.crc64)
        view.walk.side_effect = lambda: iter(walked)
        return view

    def test_command(self) -> None:
        with self.opened(self.TAR + entry(b"file", b"content")) as storage:
            ours = ["--root", storage.graphroot]
            target = self.dir + "/target"
            done = self.run_cstor(*ours, "image", "cp", "t:/d", target)
            self.assertIn(b"skipped (device, socket or whiteout): /d/null", done.stderr)
            self.assertEqual({"f", "hard", "sym", "closed", "fifo", "latin-\udce9"},
                             set(os.listdir(target)))
            os.chmod(target + "/closed", 0o700)
            self.run_cstor(*ours, "image", "cp", "t:d", target)  # into it
            os.chmod(target + "/d/closed", 0o700)
            for status, source, dest in (
                    (6, "t:/d", target), (6, "t:/", target), (3, "t:/nope", "x"), (2, "t", "x"),
                    (3, "u:/d", "x"), (6, "t:/file", self.dir + "/no/x"),
                    (3, "t:/d", self.dir + "/no/"),
                    (6, "t:/d", self.dir + "/no/x")):
                self.run_cstor(*ours, "image", "cp", source, dest, status=status)
            self.run_cstor(*ours, "image", "cp", "t:file", target)
            self.assertEqual(b"content", read_bytes(target + "/file"))
            done = self.run_cstor(*ours, "image", "cp", "t:/file", "-")
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as members:
                self.assertEqual(["file"], members.getnames())
            shutil.rmtree(target)
            content = content_of(storage, "d/closed/in")
            overwrite(content, b"?")
            before = set(os.listdir(self.dir))
            for source in ("t:/d", "t:/d/closed/in"):
                self.run_cstor(*ours, "image", "cp", source, target, status=4)
            self.assertEqual(before, set(os.listdir(self.dir)))


class Ladders(StoreTest):
    """How contents get into new files."""

    def setUp(self) -> None:
        super().setUp()
        self.data = os.urandom(100_000)
        self.source = self.file("source", self.data)

    def file(self, name: str, data: bytes) -> int:
        path = os.path.join(self.dir, name)
        put(path, data)
        fd = os.open(path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        return fd

    def cleanups(self) -> None:
        self.doCleanups()

    def fill(self, ladder: cstor.ContentCopier, error: int = 0, devices: tuple[int, int] = (1, 2)
             ) -> tuple[str, bytes, int]:
        """Fill a file; FICLONE answers ``error``.  Return why, the content, how often it ran."""
        path = self.dir + "/target"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

        def clone(out_fd: int, request: int, fd: int) -> int:
            self.assertEqual(cstor.FICLONE, request)
            if error:
                raise OSError(error, os.strerror(error))
            os.pwrite(out_fd, b"cloned", 0)
            return 0

        try:
            with mock.patch("fcntl.ioctl", side_effect=clone) as ioctl:
                why = ladder.fill(self.source, len(self.data), fd, devices)
            return why, os.pread(fd, 1 << 20, 0), ioctl.call_count
        finally:
            os.close(fd)

    def test_what_says_no_for_good_is_asked_once_for_each_pair(self) -> None:
        status = os.fstat(self.source)
        here = status.st_dev, status.st_dev
        for error in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS):
            ladder = cstor.ContentCopier()
            why = "FICLONE: " + os.strerror(error)
            # What the caller takes the file systems to be may be wrong: those of the files count.
            self.assertEqual((why, self.data, 1), self.fill(ladder, error, (7, 8)))
            self.assertEqual((why, self.data, 0), self.fill(ladder, 0, here))
            self.assertEqual(("", b"cloned", 1), self.fill(ladder, 0, (7, 8)))

    def test_what_may_be_of_one_file_is_asked_again(self) -> None:
        status = os.fstat(self.source)
        here = status.st_dev, status.st_dev
        for error in (errno.EINVAL, errno.EPERM, errno.ETXTBSY):
            ladder = cstor.ContentCopier()
            why = "FICLONE: " + os.strerror(error)
            for _ in range(cstor.ContentCopier.PATIENCE + 1):  # none was ever shared
                self.assertEqual((why, self.data, 1), self.fill(ladder, error, here))
            self.assertEqual((why, self.data, 0), self.fill(ladder, error, here))
            ladder = cstor.ContentCopier()
            self.assertEqual(("", b"cloned", 1), self.fill(ladder, 0, here))
            for _ in range(3 * cstor.ContentCopier.PATIENCE):
                self.assertEqual((why, self.data, 1), self.fill(ladder, error, here))

    def test_any_other_error_is_one(self) -> None:
        for error in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EBADF):
            with self.assertRaises(OSError) as caught:
                self.fill(cstor.ContentCopier(), error)
            self.assertEqual(error, caught.exception.errno)

    def test_modes(self) -> None:
        why, data, calls = self.fill(cstor.ContentCopier("copy"))
        self.assertEqual(("--link-mode copy", self.data, 0), (why, data, calls))
        with self.assertRaisesRegex(cstor.Unsupported, "reflink: FICLONE: Operation not supp"):
            self.fill(cstor.ContentCopier("reflink"), errno.EOPNOTSUPP)
        self.assertEqual(("", b"cloned", 1), self.fill(cstor.ContentCopier("reflink")))

    def test_holes_stay_holes(self) -> None:
        size = 40 << 20
        runs = [(1 << 20, b"one"), (17 << 20, b"two" * 3000)]
        for tail in (b"", b"end"):
            source = self.dir + "/sparse"
            with open(source, "wb") as file:
                for offset, data in runs:
                    os.pwrite(file.fileno(), data, offset)
                file.truncate(size)
                os.pwrite(file.fileno(), tail, size - len(tail))
            fd, out = os.open(source, os.O_RDONLY), os.open(self.dir + "/copy",
                                                            os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                need(os.fstat(fd).st_blocks * 512 < 1 << 20, "the file system keeps no holes")
                cstor.ContentCopier("copy").fill(fd, size, out, (0, 0))
                self.assertEqual(size, os.fstat(out).st_size)
                self.assertEqual(list(cstor.data_runs(fd, size)), list(cstor.data_runs(out, size)))
                self.assertLessEqual(os.fstat(out).st_blocks, os.fstat(fd).st_blocks + 8)
                with open(fd, "rb", closefd=False) as a, open(out, "rb", closefd=False) as b:
                    self.assertEqual(hashlib.sha256(a.read()).digest(),
                                     hashlib.sha256(b.read()).digest())
            finally:
                os.close(fd)
                os.close(out)

    def test_a_file_that_is_shorter_than_it_was(self) -> None:
        """It is not filled up by a hole."""
        path = self.dir + "/target"
        for size in (len(self.data) + 1, len(self.data) + (1 << 20), len(self.data) - 1):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                with self.assertRaisesRegex(cstor.IntegrityError, f"expected {size} bytes"):
                    cstor.ContentCopier("copy").fill(self.source, size, fd, (0, 0))
            finally:
                os.close(fd)

    def test_a_file_that_is_written_to_meanwhile(self) -> None:
        def slow(copier: cstor.Copier, fd: int, offset: int, count: int, out_fd: int) -> int:
            overwrite(self.dir + "/source", b"other")
            os.utime(self.dir + "/source", ns=(5, 5))
            return count

        with mock.patch.object(cstor.Copier, "copy", slow), \
                self.assertRaisesRegex(cstor.IntegrityError, "changed while"):
            self.fill(cstor.ContentCopier("copy"))


def send(number: int) -> None:
    """Send a signal to this process, and wait until its handler was called."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def finalize_object(act: Callable[[], None]) -> None:
    """Call ``act`` in a __del__."""
    class Finalized:
        def __del__(self) -> None:
            act()

    Finalized()


def finalize_reference(act: Callable[[], None]) -> None:
    """Call ``act`` in a callback of a weak reference."""
    class Referred:
        pass

    referred = Referred()
    reference = weakref.ref(referred, lambda _: act())
    del referred
    assert reference() is None


def finalize_generator(act: Callable[[], None]) -> None:
    """Call ``act`` while a generator that nobody needs is closed."""
    def generate() -> Iterator[None]:
        try:
            yield
        finally:
            act()

    next(generate())


FINALIZERS = finalize_object, finalize_reference, finalize_generator


def called_first(kind: type, name: str, finalize: Callable[..., None], number: int) -> Any:
    """Patch a method so that it first gets a signal in a finalizer."""
    real = getattr(kind, name)

    def method(*args: Any) -> Any:
        finalize(functools.partial(send, number))
        return real(*args)

    return mock.patch.object(kind, name, method)


class Extracts(TreeTest):
    """What `extract` makes of trees by hand; against podman's mounts see RealTree."""

    BASE = b"".join((
        directory(b".", mode=b"0000711"), directory(b"bin"),
        entry(b"bin/su", b"su" * 999, mode=b"0004755"), symlink(b"bin/sh", b"su"),
        hardlink(b"bin/su2", b"bin/su", mode=b"0004755"),
        directory(b"etc", mode=b"0000700"), entry(b"etc/empty", mode=b"0000000"),
        pax({b"mtime": b"7.000000009"}), entry(b"etc/shadow", b"secret", mode=b"0000640"),
        directory(b"run", mode=b"0001777"), entry(b"run/fifo", typeflag=b"6"),
        entry(b"usr/lib/deep/x.pyc", b"x" * 70_000), entry(b"usr/lib/deep/x.py", b"y")))
    TOP = entry(b"etc/.wh.empty") + entry(b"usr/lib/.wh..wh..opq") + entry(b"usr/lib/new", b"n")
    ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 7, who) for tag, who in (
        (1, 2**32 - 1), (2, 4321), (4, 2**32 - 1), (16, 2**32 - 1), (32, 2**32 - 1)))

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(remove, self.out)

    def same(self, tree: cstor.Tree, *, owners: bool = True) -> None:
        found = tree_differences(self.out, tree)
        self.assertEqual([], [row for row in found if owners or row[1] != "owner"])

    def test_everything_is_as_in_the_tree(self) -> None:
        root = os.geteuid() == 0
        for workers in (1, 2, 3):
            with self.tree(self.BASE, self.TOP) as tree:
                done = cstor.extract_tree(tree, self.out, workers=workers,
                                          owners=None if root else False)
                if root:
                    self.same(tree)
            self.assertEqual(
                (3, 6, 1, 1, 1, 2005),
                tuple(done[key] for key in ("files", "directories", "symlinks", "hardlinks",
                                            "fifos", "bytes")))
            self.assertEqual(done["bytes"], done["bytes-reflinked"] + done["bytes-copied"])
            remove(self.out)

    def test_two_extractions_have_the_same_times(self) -> None:
        tar = entry(b"a/b/c", b"c") + directory(b"d") + entry(b"d/e/f", b"f")
        places = ("", "a", "a/b", "a/b/c", "d", "d/e")
        for epoch, made in ({}, 0), ({"SOURCE_DATE_EPOCH": "5"}, 5), ({}, 0):
            with self.subTest(epoch), mock.patch.dict(os.environ, epoch), \
                    self.opened(tar) as storage:
                storage.image("t").extract(self.out)
                self.assertEqual([made, made, made, 0o14000000000, 0o14000000000, made], [
                    os.stat(os.path.join(self.out, name)).st_mtime for name in places])
                shutil.rmtree(self.out)
                storage.image("t").extract(self.out, paths=["a/b/c"], strip=2)
                self.assertEqual(made, os.stat(self.out).st_mtime)
                shutil.rmtree(self.out)
                storage.layers()[0].extract(self.out)
                self.assertEqual(made, os.stat(self.out + "/a").st_mtime)
                shutil.rmtree(self.out)

    def test_a_fresh_extraction_does_not_differ(self) -> None:
        label, acl = b"system_u:object_r:bin_t:s0\0", struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", *part, 0xFFFFFFFF) for part in ((1, 7), (4, 5), (32, 5)))
        odd = {b"security.selinux": label, b"user.kept": b"1", b"com.apple.x": b"2", b"plain": b"3",
               b"system.nope": b"4", b"system.posix_acl_access": acl, b"user.overlay.origin": b"5"}
        records = {b"SCHILY.xattr." + key: value for key, value in odd.items()}
        tar = pax(records) + entry(b"f", b"f") + pax(records) + symlink(b"l", b"f") + pax(
            records) + directory(b"d") + pax(records) + entry(b"p", typeflag=b"6")
        for rootless in (False, True):
            with mock.patch.object(cstor.Storage, "rootless", rootless), self.opened(
                    tar) as storage, storage.image("t").tree() as tree:
                kept = {b"user.kept": b"1", **({} if rootless else {b"user.overlay.origin": b"5"})}
                self.assertEqual({b"f": kept, b"d": kept, b"l": {}, b"p": {}}, {
                    path: node.xattrs for path, node, _ in tree.walk() if path})
                done = cstor.extract_tree(tree, self.out)
                self.assertNotIn("xattr", done["unset"])
                with cstor.Tree([cstor.DiskTree(cstor.Directory.at(self.out), overlay=False)]) as \
                        disk:
                    self.assertEqual([], list(cstor.diff_trees(tree, disk, ["owner"])))
                toc = {item["name"]: item.get("xattrs") for item in storage.layers()[0].toc()[
                    "entries"]}
                self.assertEqual((["user.kept", "user.overlay.origin"], None),
                                 (sorted(toc["f"]), toc["l"]))
            shutil.rmtree(self.out)

    def altered(self) -> StoreBuilder:
        """Return a store of two layers; the tar-split data of the lower say another mode."""
        store = self.builder()
        tars = entry(b"etc/x", b"x") + entry(b"etc/z", b"zz") + END, entry(b"top", b"t") + END
        base = store.layer(tars[0], id="0" * 64)
        top = store.layer(tars[1], base, id="1" * 64)
        image = store.image(top, "localhost/t:latest")
        store.container(image, store.layer(None, top), "c")
        store.tar_split(base, entry(b"etc/x", b"x", mode=b"0004777") + tars[0][2 * BLOCK:])
        self.guard(store.save().root)
        return store

    def test_verify_compares_headers_with_the_diff_id_before_anything_is_made(self) -> None:
        root, out = self.altered().root, self.out + "/"
        commands = ("image extract t OUT --path top", "layer extract " + "0" * 64 + " OUT",
                    "container extract c OUT", "image export t", "container export c -o OUT",
                    "image toc t", "layer toc " + "0" * 64)
        for command in commands:
            with self.subTest(command):
                words = command.replace("OUT", self.out).split()
                done = self.run_cstor("--root", root, *words, "--verify", status=4)
                self.assertRegex(done.stderr, rb"\Acstor: error: layer 0{64}: its tar has the "
                                 rb"wrong digest, though all files match their checksums: ")
                self.assertEqual(b"", done.stdout)
                self.assertFalse(os.path.lexists(self.out))
        os.mkdir(self.out)
        self.run_cstor("--root", root, "image", "extract", "t", out, "--verify", status=4)
        self.assertEqual([], os.listdir(self.out))
        self.run_cstor("--root", root, "image", "extract", "t", out)  # the contents are right

    def test_verify_says_what_has_no_diff_id(self) -> None:
        store = self.builder()
        base = store.layer(entry(b"f", b"f") + END)
        image = store.image(base, "localhost/t:latest")
        writable = store.layer(None, base)
        store.write(f"overlay/{writable}/diff/new", b"n")
        store.container(image, writable, "c")
        alone = store.layer(None)
        store.write(f"overlay/{alone}/diff/new", b"n")
        store.container(store.image("", "localhost/none:latest"), alone, "alone")
        store.tar_split(store.layer(None, id="5" * 64, **{"toc-digest": "sha256:" + "5" * 64}),
                        entry(b"g", b"") + END)
        self.guard(store.save().root)
        said = os.path.join(store.root, "overlay", writable)
        for words in (["container", "extract", "c", self.out], ["container", "export", "c", "-q"]):
            done = self.run_on(store, *words, "--verify")
            self.assertEqual(f"cstor: warning: {said}/diff: not verified: the container's "
                             "writable layer has no DiffID\n", without_owners(done.err))
        remove(self.out)
        done = self.run_on(store, "container extract alone", self.out, "--verify")
        self.assertIn(b"the container's writable layer has no DiffID\n", done.stderr)
        remove(self.out)
        for layer, name in ((writable, f"{said}/diff"), ("5" * 64, "layer " + "5" * 64)):
            done = self.run_on(store, "layer extract", layer, self.out, "--verify", status=6)
            self.assertEqual(f"cstor: error: {name} has no DiffID, so it cannot be verified "
                             "(without --verify, sizes and recorded CRC-64s are checked)\n",
                             done.err)
            self.assertFalse(os.path.lexists(self.out))
        with cstor.Storage.open(store.root) as storage, storage.image("t").tree() as tree:
            tree.verify()
            self.assertEqual([], storage.faults)

    def test_many_files_by_many_workers(self) -> None:
        rng, count = random.Random(5), 3000 if FULL else 900
        tar = b"".join(entry(b"d%d/e%d/f%d" % (i % 7, i % 31, i), rng.getrandbits(
            8 * (i % 999 + 1)).to_bytes(i % 999 + 1, "big")) for i in range(count))
        with self.tree(tar) as tree:
            for workers in (1, 2, 5):
                done = cstor.extract_tree(tree, self.out, workers=workers, verify=True)
                self.assertEqual(count, done["files"])
                self.assertEqual(sum(i % 999 + 1 for i in range(count)), done["bytes"])
                if os.geteuid() == 0:
                    self.same(tree)
                self.assertEqual(count, sum(len(files) for _, _, files in os.walk(self.out)))
                shutil.rmtree(self.out)

    def test_threads_keep_us_from_forking(self) -> None:
        self.assertEqual(min(len(os.sched_getaffinity(0)), cstor.MAX_WORKERS),
                         cstor.default_workers())
        event = threading.Event()
        thread = threading.Thread(target=event.wait)
        thread.start()
        try:
            self.assertEqual(1, cstor.default_workers())
            with self.tree(self.BASE) as tree, mock.patch.object(os, "fork") as fork:
                cstor.extract_tree(tree, self.out)
            fork.assert_not_called()
        finally:
            event.set()
            thread.join()

    def test_an_error_in_any_worker_is_raised_as_it_is(self) -> None:
        for number in range(6):
            log = os.open(self.dir + "/log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

            def work(job: int, number: int = number, log: int = log) -> None:
                os.write(log, b"%d\n" % job)
                if job == 300:
                    raise ERRORS[number]
                time.sleep(0.0005)

            with self.assertRaises(BaseException) as caught:
                cstor.share_out(4000, 3, work, lambda: None, lambda begun: None)
            self.assertIs(type(ERRORS[number]), type(caught.exception))
            self.assertEqual(str(ERRORS[number]), str(caught.exception))
            self.assertEqual(vars(ERRORS[number]), vars(caught.exception))
            lines = os.pread(log, 1 << 20, 0).split()
            self.assertEqual(len(lines), len(set(lines)), "a job was done twice")
            self.assertLess(len(lines), 3000, "the others went on")
            os.close(log)
        for jobs in (0, 1, 2, 1023, 1024, 1025, 3000):
            seen: list[int] = []
            reports = cstor.share_out(jobs, 3, seen.append, seen.copy, lambda begun: None)
            self.assertEqual(list(range(jobs)), sorted(seen + [
                job for report in reports for job in report]))
            self.assertEqual(2, len(reports))

    def test_without_more_processes(self) -> None:
        with mock.patch.object(os, "fork", side_effect=BlockingIOError(errno.EAGAIN, "no")):
            seen: list[int] = []
            self.assertEqual([], cstor.share_out(2000, 4, seen.append, seen.copy,
                                                 lambda begun: None))
        self.assertEqual(list(range(2000)), seen)

    def test_errors_as_plain_data(self) -> None:
        for error in (cstor.Ambiguous("two", ["a", "b"], hint="say which"), MemoryError(),
                      FileNotFoundError(errno.ENOENT, "No such file", "/x"), KeyboardInterrupt()):
            again = cstor.unpack_error(*cstor.pack_error(error))
            self.assertEqual((type(error), str(error), vars(error)),
                             (type(again), str(again), vars(again)))
        again = cstor.unpack_error("Strange", ("x", 1), {})
        self.assertEqual((cstor.CstorError, "Strange: x 1"), (type(again), str(again)))
        again = cstor.unpack_error(*cstor.pack_error(ValueError(object(), 2)))
        self.assertIsInstance(again, ValueError)

    def test_a_module_that_nobody_can_import(self) -> None:
        """Vendored by importlib, without an entry in sys.modules; workers report all the same."""
        code = textwrap.dedent(f"""
            import importlib.util, sys
            spec = importlib.util.spec_from_file_location("strange", {SCRIPT!r})
            cstor = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(cstor)
            def work(job):
                if job == 600 and len(sys.argv) > 1:
                    raise cstor.IntegrityError("wrong", layer="l", name=b"n")
            try:
                print(len(cstor.share_out(900, 3, work, list, lambda begun: None)))
            except cstor.IntegrityError as error:
                print(error, error.name)
            """)
        for args, expected in (([], b"2\n"), (["x"], b"layer l: \"n\": wrong b'n'\n")):
            done = subprocess.run([sys.executable, "-c", code, *args], stdout=subprocess.PIPE,
                                  check=True)
            self.assertEqual(expected, done.stdout)

    def test_a_large_report_to_nobody(self) -> None:
        """A worker that has much to tell ends when its parent fails or dies."""
        code = textwrap.dedent(f"""
            import os, sys, time
            sys.path.insert(0, {HERE!r})
            import cstor
            parent = os.getpid()
            def work(job):
                if os.getpid() != parent:
                    time.sleep(0.01)
                elif job:
                    time.sleep(1)
                    if sys.argv[1] == "die":
                        os.kill(parent, 9)
                    raise cstor.NotFound("as planned")
            try:
                cstor.share_out(100, 3, work, lambda: b"x" * 1000000, lambda begun: None)
            except cstor.NotFound:
                print("done")
            """)
        for word, status, output in (("fail", 0, b"done\n"), ("die", -9, b"")):
            with subprocess.Popen([sys.executable, "-c", code, word], stdout=subprocess.PIPE,
                                  start_new_session=True) as process:
                self.assertEqual(output, process.communicate(timeout=30)[0])
                self.assertEqual(status, process.returncode)
            self.gone(process.pid)

    def gone(self, group: int) -> None:
        """Wait until no process of a group is left."""
        for _ in range(400):
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            time.sleep(0.025)
        self.fail("processes went on")

    def test_a_worker_that_is_killed(self) -> None:
        parent = os.getpid()

        def work(job: int) -> None:
            time.sleep(0.001)
            if os.getpid() != parent and job > 50:
                os.kill(os.getpid(), signal.SIGKILL)

        with self.assertRaisesRegex(cstor.CstorError, "worker process died with wait status.* 9"):
            cstor.share_out(400, 2, work, lambda: None, lambda begun: None)
        with self.assertRaises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    def test_metadata_is_not_opened_for_others_on_the_way(self) -> None:
        """Modes are never wider than in the image, nor is what is inside a new directory seen."""
        need_proc()
        seen: list[tuple[str, int]] = []
        real = os.chmod

        def chmod(place: Any, mode: int, **kwargs: Any) -> None:
            path = os.readlink(f"/proc/self/fd/{place}" if isinstance(place, int) else place)
            seen.append((os.path.relpath(path, self.out), mode))
            self.assertEqual(0, stat.S_IMODE(os.stat(place).st_mode) & ~mode & 0o077)
            self.assertEqual(0o700, stat.S_IMODE(os.stat(self.out).st_mode))
            real(place, mode, **kwargs)

        before = os.umask(0)
        try:
            with self.tree(self.BASE) as tree, mock.patch.object(os, "chmod", chmod):
                cstor.extract_tree(tree, self.out, workers=1)
        finally:
            os.umask(before)
        self.assertEqual((".", 0o711), seen[-1])
        self.assertIn(("bin/su", 0o4755 if os.geteuid() == 0 else 0o755), seen)

    def give_away(self, path: str) -> None:
        """Give a directory an ACL that lets another user in whatever is made there."""
        try:
            os.setxattr(path, "system.posix_acl_default", self.ACL)
        except OSError as error:
            need(error.errno != errno.EOPNOTSUPP, "the file system has no ACLs")
            raise

    def test_where_it_lies_leaves_no_trace(self) -> None:
        """A setgid bit and an ACL of the directory above are not for what is extracted."""
        need(os.geteuid() == 0, "needs root, to set what users may not")
        above = self.dir + "/above"
        os.mkdir(above)
        os.chown(above, 0, 1234)
        os.chmod(above, 0o2777)
        self.give_away(above)
        self.out = above + "/out"
        for umask in (0, 0o77):
            before = os.umask(umask)
            try:
                with self.tree(self.BASE, self.TOP) as tree:
                    cstor.extract_tree(tree, self.out)
                    self.same(tree)
            finally:
                os.umask(before)
            shutil.rmtree(self.out)

    # -- selection -------------------------------------------------------------------------------

    def selected(self, **options: Any) -> list[str]:
        remove(self.out)
        with self.tree(self.BASE) as tree:
            cstor.extract_tree(tree, self.out, owners=False, **options)
        return self.names()

    def test_paths_and_exclusions(self) -> None:
        deep = ["usr", "usr/lib", "usr/lib/deep"]
        for paths, exclude, expected in (
                (["etc"], [], ["etc", "etc/empty", "etc/shadow"]),
                (["/etc/"], ["shadow"], ["etc", "etc/empty"]),
                (["*.py"], [], [*deep, "usr/lib/deep/x.py"]),
                (["usr/l*"], [], [*deep, "usr/lib/deep/x.py", "usr/lib/deep/x.pyc"]),
                (["*.py*", "run/fifo"], ["**/x.pyc"],
                 ["run", "run/fifo", *deep, "usr/lib/deep/x.py"]),
                (["bin/su2", "bin/sh"], [], ["bin", "bin/sh", "bin/su2"]),
                ([], ["usr", "etc", "bin/su*"], ["bin", "bin/sh", "run", "run/fifo"]),
                ([], ["/"], [])):
            with self.subTest(paths=paths, exclude=exclude):
                self.assertEqual(expected, self.selected(paths=paths, exclude=exclude))
                status = os.stat(self.out)
                self.assertEqual(0o755 if paths or exclude == ["/"] else 0o711,
                                 stat.S_IMODE(status.st_mode))

    def test_selected_links_of_one_file(self) -> None:
        self.selected(paths=["bin/su2"])
        self.assertEqual(1, os.stat(self.out + "/bin/su2").st_nlink)
        self.assertEqual(b"su" * 999, read_bytes(self.out + "/bin/su2"))
        self.selected(paths=["bin/su2", "bin/su"])
        self.assertTrue(os.path.samefile(self.out + "/bin/su2", self.out + "/bin/su"))
        self.assertEqual(2, os.stat(self.out + "/bin/su2").st_nlink)

    def test_metadata_of_directories_above(self) -> None:
        self.selected(paths=["run/fifo"])
        self.assertEqual(0o1777, stat.S_IMODE(os.stat(self.out + "/run").st_mode))

    def test_strip_components(self) -> None:
        self.assertEqual(["x.py", "x.pyc"], self.selected(paths=["usr/lib/deep"], strip=3))
        self.assertEqual(["deep", "deep/x.py", "deep/x.pyc"], self.selected(paths=["usr"], strip=2))
        self.assertEqual(["empty", "fifo", "shadow", "sh", "su", "su2"],
                         sorted(self.selected(exclude=["usr"], strip=1),
                                key=["empty", "fifo", "shadow", "sh", "su", "su2"].index))
        self.assertEqual([], self.selected(strip=9))
        with self.tree(self.BASE + entry(b"run/sh", b"other")) as tree, \
                self.assertRaisesRegex(cstor.CstorError, "bin/sh.*run/sh.*both become"):
            cstor.extract_tree(tree, self.out + "2", strip=1)
        self.assertFalse(os.path.lexists(self.out + "2"))

    def test_nothing_that_fits(self) -> None:
        with self.tree(self.BASE) as tree, self.assertRaises(cstor.NotFound):
            cstor.extract_tree(tree, self.out, paths=["nope"])
        self.assertFalse(os.path.lexists(self.out))

    def test_whiteouts_of_a_raw_layer(self) -> None:
        with self.opened(self.BASE, self.TOP) as storage:
            layer = storage.image("t").layers()[-1]
            done = layer.extract(self.out, owners=False)
            self.assertEqual(["etc", "etc/.wh.empty", "usr", "usr/lib", "usr/lib/.wh..wh..opq",
                              "usr/lib/new"], self.names())
            self.assertEqual(2, done["whiteouts"])
            status = os.stat(self.out + "/etc/.wh.empty")
            self.assertEqual((stat.S_IFREG, 0, 0), (status.st_mode, status.st_size,
                                                    status.st_mtime_ns))
            shutil.rmtree(self.out)
            layer.extract(self.out, owners=False, whiteouts=False)
            self.assertEqual(["etc", "usr", "usr/lib", "usr/lib/new"], self.names())

    # -- targets ---------------------------------------------------------------------------------

    def test_targets(self) -> None:
        with self.tree(self.BASE) as tree:
            for path, error in ((self.dir + "/no/out", errno.ENOENT), (__file__, errno.ENOTDIR),
                                (self.dir, errno.ENOTEMPTY)):
                with self.assertRaises(OSError) as caught:
                    cstor.extract_tree(tree, path)
                self.assertEqual((error, path), (caught.exception.errno, caught.exception.filename))
            os.mkdir(self.out)
            cstor.extract_tree(tree, self.out, owners=False)  # an empty one
            self.assertEqual(0o711, stat.S_IMODE(os.stat(self.out).st_mode))

    def test_merging_replaces_and_follows_no_link(self) -> None:
        outside = self.dir + "/outside"
        os.makedirs(outside + "/lib")
        for name in ("kept", "shadow", "lib/x"):
            put(os.path.join(outside, name), "outside")
        before = snapshot(outside)
        os.makedirs(self.out + "/etc/shadow")  # an empty directory where a file comes
        os.symlink(outside, self.out + "/usr")
        os.makedirs(self.out + "/bin")
        os.symlink(outside + "/kept", self.out + "/bin/su")
        os.link(outside + "/shadow", self.out + "/bin/su2")
        os.mkdir(self.out + "/mine")
        put(self.out + "/run", "a file where a directory comes")
        with self.tree(self.BASE) as tree:
            cstor.extract_tree(tree, self.out, force=True)
            # A user's copy of root's program is setuid no more.
            other = [b"mine"] if os.geteuid() == 0 else [b"bin/su", b"bin/su2", b"mine"]
            self.assertEqual(other, [row[0] for row in tree_differences(self.out, tree)
                                     if row[1] != "owner"])
            after = snapshot(outside)
            key = os.fsencode(outside + "/shadow")
            self.assertEqual(1, after[key][2])  # the link that was replaced is gone
            for found in (before, after):
                found[key] = found[key][:2] + found[key][3:-1]
            self.assertEqual(before, after)
            cstor.extract_tree(tree, self.out, force=True)  # once more
            self.assertEqual(other, [row[0] for row in tree_differences(self.out, tree)
                                     if row[1] != "owner"])
            os.unlink(self.out + "/etc/shadow")
            os.mkdir(self.out + "/etc/shadow")
            put(self.out + "/etc/shadow/mine")
            with self.assertRaisesRegex(OSError, "not empty.*etc/shadow") as caught:
                cstor.extract_tree(tree, self.out, force=True)
            self.assertIn("left incomplete", vars(caught.exception)["hint"])
            self.assertTrue(os.path.exists(self.out + "/etc/shadow/mine"))
            self.assertEqual([], [name for name in self.names() if ".partial" in name])

    def test_a_failed_merge_loses_nothing(self) -> None:
        with self.opened(self.BASE) as storage:
            path = content_of(storage, "etc/shadow")
            put(path, "secret and more")
            os.makedirs(self.out + "/etc")
            put(self.out + "/etc/shadow", "mine")
            with self.assertRaises(cstor.IntegrityError), storage.image("t").tree() as tree:
                cstor.extract_tree(tree, self.out, force=True)
            with open(self.out + "/etc/shadow", encoding="ascii") as file:
                self.assertEqual("mine", file.read())
            self.assertEqual([], [name for name in self.names() if ".partial" in name])

    # -- failures --------------------------------------------------------------------------------

    def test_what_a_failed_run_leaves(self) -> None:
        with self.opened(self.BASE) as storage, storage.image("t").tree() as tree:
            content = content_of(storage, "etc/shadow")
            error = cstor.IntegrityError
            for damage in (["truncate", "-s3"], ["rm"], ["mkfifo"]):
                subprocess.run([*damage, content], check=True)
                with self.assertRaisesRegex(error, "etc/shadow"):
                    cstor.extract_tree(tree, self.out)
                self.assertFalse(os.path.lexists(self.out))
                with self.assertRaisesRegex(error, "etc/shadow") as caught:
                    cstor.extract_tree(tree, self.out, clean=False)
                self.assertEqual(f"{self.out} is left incomplete", caught.exception.hint)
                self.assertNotIn("etc/shadow", self.names())
                remove(self.out)
                os.mkdir(self.out)  # it was there before: so it stays
                with self.assertRaises(error) as caught:
                    cstor.extract_tree(tree, self.out, clean=True)
                self.assertEqual([], os.listdir(self.out))
                os.rmdir(self.out)

    def test_a_closed_tree_is_removed_by_its_owner(self) -> None:
        with self.opened(self.BASE + directory(b"z", mode=b"0000000")
                         + entry(b"z/y/f", b"1")) as storage, storage.image("t").tree() as tree:
            for path in snapshot(self.dir):
                if not os.path.islink(path):
                    os.chmod(path, 0o755)
            b"x".decode("utf-8-sig")  # of storage.conf: that user may not read modules
            for uid in {0, 65534} if os.geteuid() == 0 else {os.geteuid()}:
                target = tempfile.mkdtemp(dir=self.dir)
                os.chown(target, uid, -1)
                pid = os.fork()
                if not pid:
                    status = 9
                    try:
                        os.setresuid(uid, uid, uid)
                        with mock.patch.object(cstor, "is_at", side_effect=[False, True]):
                            cstor.extract_tree(tree, target + "/out", workers=1, owners=False)
                    except OSError as error:
                        status = 0 if "moved or removed" in str(error) else 8
                    finally:
                        os._exit(status)
                self.assertEqual(0, os.waitpid(pid, 0)[1])
                self.assertEqual([], self.names(target))

    def test_a_checksum_is_compared_when_asked(self) -> None:
        with self.opened(self.BASE) as storage:
            content = content_of(storage, "etc/shadow")
            overwrite(content, b"S")
            with storage.image("t").tree() as tree:
                done = cstor.extract_tree(tree, self.out)
                self.assertEqual(5, done["files"])
                self.assertEqual(b"Secret", read_bytes(self.out + "/etc/shadow"))
                shutil.rmtree(self.out)
                for mode in ("auto", "copy", "hardlink"):
                    with self.assertRaisesRegex(cstor.IntegrityError, "etc/shadow.*integrity"):
                        cstor.extract_tree(tree, self.out, verify=True, link_mode=mode)
                    self.assertFalse(os.path.lexists(self.out))

    def test_a_target_that_is_moved_or_removed_meanwhile(self) -> None:
        real = cstor.Extraction._make_links
        for command in (["mv", self.out, self.out + "-moved"], ["rm", "-rf", self.out]):
            def links(extraction: cstor.Extraction, command: Any = command) -> None:
                subprocess.run(command, check=True)
                real(extraction)

            with self.tree(self.BASE) as tree, \
                    mock.patch.object(cstor.Extraction, "_make_links", links), \
                    self.assertRaises(OSError) as caught:
                cstor.extract_tree(tree, self.out)
            self.assertIn(self.out, str(caught.exception))
            self.assertEqual(f"{self.out} was moved or removed, and its contents stay",
                             vars(caught.exception)["hint"])
            self.assertFalse(os.path.lexists(self.out))
            self.assertEqual(command[0] == "mv", os.path.exists(self.out + "-moved/bin/su"))
            remove(self.out + "-moved")

    def test_what_was_there_keeps_metadata_that_no_header_gives(self) -> None:
        os.makedirs(self.out + "/usr/lib", 0o700)
        os.chmod(self.out, 0o700)
        with self.tree(self.BASE[512:]) as tree:  # without "./"
            self.assertTrue(tree.root.implicit)
            cstor.extract_tree(tree, self.out, force=True, owners=False)
        modes = [stat.S_IMODE(os.stat(os.path.join(self.out, name)).st_mode)
                 for name in (".", "usr", "usr/lib", "usr/lib/deep", "run")]
        self.assertEqual([0o700, 0o755 & ~UMASK, 0o700, 0o755, 0o1777], modes)

    def test_force_changes_nothing_where_nothing_is(self) -> None:
        for base in (self.BASE, self.BASE[512:]):
            for force in (False, True):
                with self.tree(base) as tree:
                    cstor.extract_tree(tree, self.out, force=force, owners=False)
                    mode = tree.root.mode if os.geteuid() == 0 else tree.root.mode | 0o200
                self.assertEqual(mode, stat.S_IMODE(os.stat(self.out).st_mode))
                remove(self.out)

    def test_guards_of_the_library(self) -> None:
        os.mkdir(self.out)
        put(self.out + "/mine")
        with self.opened(self.BASE) as storage, storage.image("t").tree() as tree:
            before = snapshot(storage.graphroot)
            wrong: list[dict[str, Any]] = [{"force": True, "clean": True}, {"strip": -1}]
            for options in wrong:
                self.assertRaises(ValueError, cstor.extract_tree, tree, self.out, **options)
            self.assertRaises(ValueError, cstor.extract_tree, tree, "")
            self.assertRaises(ValueError, cstor.extract_tree, tree, self.out + "2", owner_map=["x"])
            for place in ("overlay/x", "overlay/" + "0" * 64 + "/diff"):
                with self.assertRaisesRegex(cstor.CstorError, "is inside the storage"):
                    cstor.extract_tree(tree, os.path.join(storage.graphroot, place), force=True)
            self.assertEqual(before, snapshot(storage.graphroot))
        self.assertEqual((["mine"], False), (self.names(), os.path.lexists(self.out + "2")))

    def test_a_target_without_xattrs(self) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", 7)

        tar = pax({b"SCHILY.xattr.user.x": b"1"}) + entry(b"f", b"1")
        with self.tree(tar) as tree, mock.patch.object(os, "setxattr", refuse), \
                mock.patch.object(os, "listxattr", refuse):
            for mode in ("auto", "hardlink"):
                done = cstor.extract_tree(tree, self.out, link_mode=mode, owners=False)
                self.assertEqual(1, done["unset"]["xattr"])
                shutil.rmtree(self.out)

    def test_errors_name_the_path_in_the_target(self) -> None:
        tar = b"".join((symlink(b"d/sym", b"x"), entry(b"e/pipe", typeflag=b"6"), entry(b"f",
                                                                                        b"1")))

        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EROFS, "Read-only file system", "/proc/self/fd/7")

        for exclude, name in (([], "d/sym"), (["d"], "e/pipe"), (["d", "e"], "f")):
            with self.tree(tar) as tree, mock.patch.object(os, "utime", refuse), \
                    self.assertRaises(OSError) as caught:
                cstor.extract_tree(tree, self.out, exclude=exclude, owners=False, clean=False)
            self.assertEqual(os.path.join(self.out, name), caught.exception.filename)
            self.assertNotIn(name, self.names())  # a half file is none
            shutil.rmtree(self.out)

        def broken(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        with self.opened(tar) as storage, storage.image("t").tree() as tree, \
                mock.patch.object(os, "copy_file_range", broken, create=True), \
                mock.patch.object(cstor.Copier, "NOT_HERE", {errno.EIO}), \
                mock.patch.object(os, "sendfile", broken), mock.patch.object(os, "pread", broken), \
                self.assertRaises(OSError) as caught:
            cstor.extract_tree(tree, self.out, link_mode="copy", owners=False)
        self.assertEqual(content_of(storage, "f") if cstor.has_proc() else "content",
                         caught.exception.filename)

    # -- neighbours ------------------------------------------------------------------------------

    def test_a_new_directory_that_is_swapped_for_a_link(self) -> None:
        """Whoever owns the directory above may put anything in the place of the one we made."""
        victim = self.dir + "/victim"
        os.mkdir(victim)
        os.chmod(victim, 0o755)
        put(victim + "/precious")
        before = snapshot(victim)
        real = os.mkdir
        for empty in (False, True):
            for swap in (["ln", "-s", victim], ["cp", "-a", victim]):
                if empty and swap[0] == "cp":
                    continue  # an empty directory of our own is as good as the one we made

                def mkdir(path: Any, *args: Any, swap: Any = swap, **kwargs: Any) -> None:
                    real(path, *args, **kwargs)
                    folder = kwargs.get("dir_fd")
                    name = os.fsdecode(path)
                    if folder and (name == "out" or name.endswith(".partial")):
                        place = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
                        os.rmdir(place)
                        subprocess.run([*swap, place], check=True)

                with self.opened(self.BASE) as storage:
                    for command in (["extract", "t", self.out], ["cp", "t:/", self.out]):
                        with mock.patch.object(os, "mkdir", mkdir), \
                                mock.patch.object(cstor, "say") as said:
                            status = cstor.main(["--root", storage.graphroot, "image", *command])
                        self.assertEqual(6, status, said.mock_calls)
                        self.assertEqual(before, snapshot(victim))
                        for name in os.listdir(self.dir):
                            if name == "out" or name.endswith(".partial"):
                                remove(os.path.join(self.dir, name))

    def test_a_target_that_is_swapped_at_the_end(self) -> None:
        victim = self.dir + "/victim"
        os.mkdir(victim, 0o700)
        before = snapshot(victim)
        real = cstor.Extraction._finish_directories

        def run_and_swap(extraction: cstor.Extraction) -> None:
            real(extraction)
            os.rename(self.out, self.out + "-ours")
            os.symlink(victim, self.out)

        with self.tree(self.BASE) as tree, self.assertRaises(OSError), \
                mock.patch.object(cstor.Extraction, "_finish_directories", run_and_swap):
            cstor.extract_tree(tree, self.out, paths=["etc"], owners=False)
        self.assertEqual(before, snapshot(victim))
        os.unlink(self.out)
        remove(self.out + "-ours")

    def test_acls_of_the_target_and_of_the_image(self) -> None:
        """Nobody gets more than the mode in the header says."""
        need(os.geteuid() == 0, "needs root, to keep owners")
        for force in (False, True):
            os.mkdir(self.out)
            self.give_away(self.out)
            with self.tree(self.BASE) as tree:
                cstor.extract_tree(tree, self.out, force=force)
                self.same(tree)
            shutil.rmtree(self.out)
        with self.tree(pax({b"SCHILY.xattr.system.posix_acl_access": self.ACL})
                       + entry(b"f", b"1", mode=b"0000640")) as tree:
            cstor.extract_tree(tree, self.out)
        self.assertEqual(0o640, stat.S_IMODE(os.stat(self.out + "/f").st_mode))

    # -- sharing ---------------------------------------------------------------------------------

    def test_hard_links_share_only_what_is_right_already(self) -> None:
        need(os.geteuid() == 0, "needs root: the files in the image are root's")
        need_proc()
        tar = b"".join((entry(b"good", b"1" * 9), entry(b"mode", b"2" * 9, mode=b"0000600"),
                        entry(b"owner", b"3" * 9, uid=b"0000007"), entry(b"time", b"4" * 9),
                        pax({b"SCHILY.xattr.user.x": b"1"}), entry(b"xattr", b"5" * 9),
                        entry(b"more", b"6" * 9), entry(b"twin", b"1" * 9), entry(b"empty"),
                        entry(b"two", b"8" * 9), hardlink(b"two2", b"two")))
        with self.opened(tar) as storage:
            diff = content_of(storage)
            stamp = 0o14000000000
            for name in os.listdir(diff):
                os.chmod(f"{diff}/{name}", 0o644)
                os.utime(f"{diff}/{name}", (stamp, stamp + (name == "time")))
            os.setxattr(diff + "/more", "user.y", b"1")
            os.unlink(diff + "/twin")  # deduplicated, say
            os.link(diff + "/good", diff + "/twin")
            before = {name: os.stat(f"{diff}/{name}") for name in os.listdir(diff)}
            with storage.image("t").tree() as tree:
                done = cstor.extract_tree(tree, self.out, link_mode="hardlink")
                found = tree_differences(self.out, tree)
            self.assertEqual([], found)
            shared = {name for name in before if os.path.samefile(f"{diff}/{name}",
                                                                  f"{self.out}/{name}")}
            self.assertEqual({"good", "two", "two2"}, shared)
            for name, old in before.items():
                new = os.stat(f"{diff}/{name}")
                self.assertEqual([old[i] for i in (0, 4, 5, 6)] + [old.st_mtime_ns],
                                 [new[i] for i in (0, 4, 5, 6)] + [new.st_mtime_ns], name)
            self.assertEqual(18, done["bytes-hardlinked"])
            with storage.image("t").tree() as tree:  # over itself: rename(2) does nothing then
                again = cstor.extract_tree(tree, self.out, link_mode="hardlink", force=True)
            self.assertEqual(18, again["bytes-hardlinked"])
            self.assertEqual(sorted(before), self.names())
            self.assertEqual({"link: mode, owner, time or xattrs in the store differ from the "
                              "image's": 5, "link: already hard-linked under another name": 1},
                             {row["why"]: row["files"] for row in done["refused"]
                              if row["why"].startswith("link")})

    # -- owners ----------------------------------------------------------------------------------

    def test_owner_maps(self) -> None:
        shift = cstor.OwnerMap(["0:1000:10", "u:10:5000:1", "g:10:6000:1"])
        self.assertEqual([1000, 1009, 5000], [shift.shift(n, shift.users) for n in (0, 9, 10)])
        self.assertEqual([1000, 1009, 6000], [shift.shift(n, shift.groups) for n in (0, 9, 10)])
        for number in (11, 4294967294):
            with self.assertRaisesRegex(ValueError, "not covered by --owner-map"):
                shift.shift(number, shift.users)
        self.assertEqual(7, shift.shift(7, []))
        for text in ("", "0", "0:1", "0:1:0", "x:0:1:1", "0:-1:1", "0:0:4294967296",
                     "1:2:3:4", "0:4294967295:1"):
            self.assertRaises(ValueError, cstor.OwnerMap, [text])

    def test_shifted_owners_and_capabilities(self) -> None:
        need(os.geteuid() == 0, "needs root, to give files away")
        tar = b"".join((entry(b"a", b"1", uid=b"0000003", mode=b"0004755"), directory(b"d"),
                        pax({b"SCHILY.xattr.security.capability": CAPABILITY}), entry(b"cap", b"2"),
                        symlink(b"l", b"a", uid=b"0000004"), entry(b"p", typeflag=b"6")))
        with self.tree(tar) as tree:
            cstor.extract_tree(tree, self.out, owner_map=["0:100000:100"])
            found, _ = seen_on_disk(self.out)
            self.assertEqual({b"": (100000, 100000), b"a": (100003, 100000), b"d": (100000, 100000),
                              b"cap": (100000, 100000), b"l": (100004, 100000),
                              b"p": (100000, 100000)},
                             {path: row["owner"] for path, row in found.items()})
            self.assertEqual(0o4755, found[b"a"]["mode"])
            self.assertEqual(CAPABILITY[:3] + b"\3" + CAPABILITY[4:] + (100000).to_bytes(
                4, "little"), found[b"cap"]["xattrs"][b"security.capability"])
            with self.assertRaisesRegex(cstor.CstorError, '"/a": ID 3 is not covered'):
                cstor.extract_tree(tree, self.out + "2", owner_map=["0:100000:3"])
            self.assertFalse(os.path.lexists(self.out + "2"))

    def test_owners_that_are_left(self) -> None:
        tar = b"".join((entry(b"a", b"1", uid=b"0007777", mode=b"0006755"),
                        entry(b"b", b"1", gid=b"0007777", mode=b"0006755"),
                        directory(b"d", gid=b"0007777", mode=b"0002755")))
        with self.tree(tar) as tree:
            done = cstor.extract_tree(tree, self.out, owners=False)
        us = os.geteuid(), os.getegid()
        for name, mode in (("a", 0o2755), ("b", 0o4755), ("d", 0o2755)):
            status = os.stat(os.path.join(self.out, name))
            self.assertEqual(us, (status.st_uid, status.st_gid))
            self.assertEqual(mode if us == (0, 0) else mode & 0o777 if name != "d" else mode,
                             stat.S_IMODE(status.st_mode))
        if us == (0, 0):
            self.assertEqual({"owner": 3, "setuid": 2}, done["unset"])

    def test_an_ordinary_user(self) -> None:
        need(os.geteuid() == 0, "needs root, to become somebody else")
        need_tools("setpriv")
        tar = b"".join((entry(b"f", b"1", mode=b"0004755"), directory(b"d", mode=b"0000555"),
                        pax({b"SCHILY.xattr.user.x": b"1", b"SCHILY.xattr.trusted.t": b"1"}),
                        entry(b"d/ro", b"2", mode=b"0000444"), device(b"d/null", b"3", 1, 3),
                        symlink(b"d/l", b"/etc/passwd"), entry(b"p", typeflag=b"6",
                                                               mode=b"0000622")))
        with self.opened(tar) as storage:
            for path in snapshot(self.dir):
                if not os.path.islink(path):
                    os.chmod(path, 0o755)
            script = self.dir + "/cstor.py"  # where others can read it
            copy_script(script)
            python = "/usr/bin/python3"
            need(os.path.exists(python), "there is no /usr/bin/python3, which others can run")
            os.mkdir(self.dir + "/home")
            os.chown(self.dir + "/home", 65534, 65534)
            self.out = self.dir + "/home/out"
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python,
                       script, "--root", storage.graphroot, "image", "extract", "t", self.out]
            done = self.run_cstor("--format=json", command=command)
            summary = done.json
            self.assertEqual({"owner": 6, "setuid": 1, "xattr": 1}, summary["unset"])
            self.assertEqual(["/d/null"], summary["left-out"])
            self.assertEqual(4, done.stderr.count(b"warning"), done.stderr)
            found, _ = seen_on_disk(self.out)
            self.assertEqual({b"": 0o755, b"f": 0o755, b"d": 0o555, b"d/ro": 0o444, b"d/l": 0o777,
                              b"p": 0o622}, {path: row["mode"] for path, row in found.items()})
            self.assertEqual({b"user.x": b"1"}, found[b"d/ro"]["xattrs"])
            self.assertEqual({(65534, 65534)}, {row["owner"] for row in found.values()})
            remove(self.out)
            for more, words in (([], b"no subuid ranges"),
                                (["--no-helper"], b"--no-same-owner to own all files yourself)")):
                done = self.run_cstor("--same-owner", *more, command=command, status=5)
                self.assertIn(words, done.stderr)
                self.assertEqual([], os.listdir(self.dir + "/home"))
            os.mkdir(self.out)
            os.symlink("mine", self.out + "/l")
            os.chown(self.out, 65534, 65534)
            self.run_cstor("--same-owner", "--no-helper", "--force", "--path=d/l",
                           "--strip-components=1", command=command, status=5)
            self.assertEqual((["l"], "mine"), (self.names(), os.readlink(self.out + "/l")))

    # -- the command -----------------------------------------------------------------------------

    def test_command(self) -> None:
        with self.opened(self.BASE, self.TOP) as storage:
            ours = ["--root", storage.graphroot]
            owner = [] if os.geteuid() == 0 else ["--no-same-owner", "-q"]
            self.guard(storage.graphroot)
            done = self.run_cstor(*ours, "image", "extract", "t", self.out, *owner)
            if not owner:
                self.assertRegex(done.out, r"\A3 files, 6 directories, 1 symlink, "
                                 r"1 hardlink, 1 fifo\n2 kB (shared|copied).*\n\Z")
                self.assertEqual(b"", done.stderr)
            done = self.run_cstor(*ours, "image", "extract", "t", self.out, status=6)
            self.assertIn(b"not empty", done.stderr)
            self.run_cstor(*ours, "image", "extract", "t", self.out, "--force", *owner)
            for option, status in (("--link-mode=reflinks", 2), ("--strip-components=x", 2),
                                   ("--owner-map=1", 2), ("--path=nope", 3),
                                   ("--strip-components=-1", 2)):
                self.run_cstor(*ours, "image", "extract", "t", self.out + "2", option,
                               status=status)
            for more, word in ((["--force", "--clean-on-error"], b"--clean-on-error"),
                               (["--no-same-owner", "--owner-map=0:1:1"], b"--owner-map")):
                done = self.run_cstor(*ours, "image", "extract", "t", self.out + "2", *more,
                                      status=2)
                self.assertIn(word, done.stderr)
            self.run_cstor(*ours, "image", "extract", "t", "", "--force", status=2)
            for inside in ("x", "overlay/x", "overlay-images"):
                done = self.run_cstor(*ours, "image", "extract", "t", "--force", os.path.join(
                    storage.graphroot, inside), status=6)
                self.assertIn(b"is inside the storage", done.stderr)
            self.run_cstor(*ours, "image", "extract", "nope", self.out + "2", status=3)
            self.assertFalse(os.path.lexists(self.out + "2"))
            layer = storage.image("t").layers()[-1].id
            done = self.run_cstor(*ours, "layer", "extract", layer, self.out + "3", "--format=json",
                                  "--no-whiteouts", "--no-reflinks", *owner[:1])
            summary = done.json
            summary.pop("unset")
            self.assertEqual({
                "directory": self.out + "3", "files": 1, "directories": 4, "symlinks": 0,
                "hardlinks": 0, "devices": 0, "fifos": 0, "sockets": 0, "whiteouts": 0, "bytes": 1,
                "bytes-reflinked": 0, "bytes-hardlinked": 0, "bytes-copied": 1, "left-out": [],
                "notes": [],
                "refused": [{"why": "--link-mode copy", "files": 1, "bytes": 1}]}, summary)

    def test_strict_reflinks(self) -> None:
        with self.opened(self.BASE) as storage, tempfile.TemporaryDirectory(
                dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as other:
            done = self.run_on(storage, "image extract t", other + "/out", "--link-mode=reflink",
                               status=6)
            self.assertRegex(done.err, r'"/[a-z/.]+" cannot be shared by reflink: '
                             r'FICLONE: .*\(--link-mode auto copies')
            self.assertEqual([], os.listdir(other))

    @classmethod
    @functools.lru_cache(1)
    def many(cls) -> str:
        """Return the graph root of a store with an image "t" of 6000 files, which tests share."""
        root = tempfile.mkdtemp(prefix="cstor-test-")
        cls.addClassCleanup(remove, root)
        store = StoreBuilder(root)
        store.image(store.layer(b"".join(entry(b"d%d/f%d" % (i % 50, i), b"%d" % i)
                                         for i in range(6000)) + END), "localhost/t:latest")
        return store.save().root

    @contextlib.contextmanager
    def begun(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start an extraction of many() in a session of its own; it has made some of it."""
        with subprocess.Popen(command, env=IDLE, stderr=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, start_new_session=True) as process:
            while not os.path.isdir(self.out + "/d7"):
                self.assertIsNone(process.poll(), "it ended before it could be stopped")
            yield process

    def test_signals_leave_nothing(self) -> None:
        command = [*COMMAND, "--root", self.many(), "image", "extract", "t", self.out]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            for options in ([], ["--no-clean-on-error"]):
                with self.begun(*command, *options) as process:
                    os.killpg(process.pid, number)  # as a terminal does
                    _, errors = process.communicate(timeout=30)
                self.assertEqual(128 + number, process.returncode, errors)
                with self.assertRaises(ProcessLookupError):
                    os.killpg(process.pid, 0)
                if not options:
                    self.assertEqual((b"", False), (errors, os.path.lexists(self.out)))
                    continue
                self.assertIn(b"left incomplete", errors)
                for folder, _, files in os.walk(self.out):
                    for name in files:  # none is half
                        self.assertEqual(name[1:].encode(),
                                         read_bytes(os.path.join(folder, name)))
                remove(self.out)

    def test_a_killed_parent_leaves_no_workers(self) -> None:
        code = (f"import sys; sys.path.insert(0, {HERE!r}); import cstor; "
                f"s = cstor.Storage.open({self.many()!r}); "
                f"s.image('t').extract({self.out!r}, workers=3)")
        with self.begun(sys.executable, "-c", code) as process:
            process.kill()
        self.gone(process.pid)

    def test_a_signal_inside_a_finalizer_is_not_lost(self) -> None:
        """Python ignores what is raised there."""
        for finalize in FINALIZERS:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                with self.subTest(finalize=finalize.__name__, number=number), \
                        self.opened(self.BASE) as storage, \
                        called_first(cstor.Extraction, "_batches", finalize, number), \
                        contextlib.redirect_stderr(io.StringIO()) as said:
                    before = sys.unraisablehook, signal.getsignal(number)
                    self.assertEqual(128 + number, cstor.main([
                        "-q", "--root", storage.graphroot, "image", "extract", "t", self.out]))
                    self.assertEqual("", said.getvalue())
                    self.assertFalse(os.path.lexists(self.out))
                    self.assertEqual(before, (sys.unraisablehook, signal.getsignal(number)))
                    self.assertIs(sys.__unraisablehook__, before[0])  # import sets none

    def test_an_interrupt_inside_a_finalizer_of_a_list(self) -> None:
        """Nothing is to be cleaned up there, so Python's own handler raises KeyboardInterrupt."""
        for finalize in FINALIZERS:
            with self.subTest(finalize=finalize.__name__), self.opened(self.BASE) as storage, \
                    called_first(cstor.Storage, "images", finalize, signal.SIGINT), \
                    contextlib.redirect_stdout(io.StringIO()) as listed, \
                    contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertEqual(130, cstor.main(["--root", storage.graphroot, "image", "list"]))
                self.assertEqual(("", ""), (listed.getvalue(), said.getvalue()))

    def test_what_else_a_finalizer_raises_is_told_as_ever(self) -> None:
        def fail() -> None:
            raise ValueError("no finalizer of ours")

        def images(_: cstor.Storage) -> Any:
            finalize_object(fail)
            return ()

        with self.opened(self.BASE) as storage, \
                mock.patch.object(cstor.Storage, "images", images), \
                contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(0, cstor.main(["--root", storage.graphroot, "image", "list"]))
        self.assertIn("ValueError: no finalizer of ours", said.getvalue())

    def test_a_worker_stops_though_a_finalizer_runs(self) -> None:
        parent = os.getpid()

        def work(finalize: Callable[..., None], begun: str, _: int) -> None:
            if os.getpid() == parent:
                wait_for(lambda: os.path.exists(begun))
            else:
                put(begun)
                finalize(functools.partial(send, signal.SIGTERM))

        for finalize in FINALIZERS:
            path = os.path.join(self.dir, finalize.__name__)
            with self.subTest(finalize=finalize.__name__), \
                    open(path, "w", encoding="ascii", buffering=1) as said, \
                    contextlib.redirect_stderr(said), self.assertRaises(KeyboardInterrupt):
                cstor.share_out(2, 2, functools.partial(work, finalize, path + ".begun"), list,
                                lambda _: None)
            self.assertEqual(0, os.path.getsize(path))

    def test_two_interrupts_and_a_hangup_that_is_ignored(self) -> None:
        command = [*COMMAND, "--root", self.many(), "image", "extract", "t", self.out]
        for wait in (0, 0.001, 0.003, 0.01, 0.05) if FULL else (0, 0.003):
            with self.begun(*command) as process:
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(wait)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
                _, errors = process.communicate(timeout=30)
            self.gone(process.pid)
            # Python itself gives SIGINT its default back when it ends.
            self.assertIn(process.returncode, (130, -signal.SIGINT), errors)
            self.assertEqual((b"", False), (errors, os.path.lexists(self.out)))
        with self.begun("nohup", *command) as process:
            os.killpg(process.pid, signal.SIGHUP)
            process.communicate(timeout=60)
        self.assertEqual(0, process.returncode)
        self.assertEqual(6000, sum(len(files) for _, _, files in os.walk(self.out)))

    def test_progress_on_a_terminal(self) -> None:
        tar = b"".join(entry(b"d%d/f%d" % (i % 50, i), b"%d" % i) for i in range(500))
        with self.opened(tar) as storage, mock.patch.object(cstor.ProgressLine, "INTERVAL", 0):
            code = (f"import sys; sys.path.insert(0, {HERE!r}); import cstor; "
                    "cstor.ProgressLine.INTERVAL = 0; "
                    f"sys.exit(cstor.main(['--root', {storage.graphroot!r}, 'image', 'extract', "
                    f"'t', {self.out!r}] + {[] if os.geteuid() == 0 else ['--no-same-owner']}))")
            output = on_terminal("-c", code, script=False)
            self.assertRegex(output.decode(),
                             r"\d+ B of 1\.39 kB \(\d+%\), 0:0\d left, \d+ files, ")
            self.assertIn(b"500 files, 51 directories", output)


ERRORS: list[BaseException] = [
    cstor.IntegrityError("wrong", layer="l", name=b"n\xff", expected="1", actual="2", hint="h"),
    cstor.NeedsUnshare("closed", hint="run it as root"), OSError(errno.ENOSPC, "No space", "/x/y"),
    cstor.FormatError("bad", file="f", offset=7), cstor.LayerUnknown("gone", hint="x"),
    cstor.Unsupported("no", hint="yes")]


class Outputs(StoreTest):
    """What all that is made has in common."""

    def setUp(self) -> None:
        super().setUp()
        self.store = self.sample()
        self.guard(self.store.root)
        with cstor.Storage.open(self.store.root) as storage:
            self.image = storage.image("sample").id
            self.layer = storage.image("sample").layers()[0].id

    def commands(self, place: str) -> list[list[str]]:
        return [["layer", "export", self.layer, "-o", place],
                ["image", "export", self.image, "-o", place],
                ["image", "export", self.image, "--as=oci-archive", "-o", place],
                ["image", "cat", self.image, "etc/os-release", "-o", place],
                ["image", "extract", self.image, place], ["layer", "extract", self.layer, place],
                ["image", "copy-to-oci", self.image, place + ":tag"],
                ["image", "cp", self.image + ":/etc", place],
                ["image", "cp", self.image + ":/etc/os-release", place],
                ["layer", "stream", self.layer, "-o", place],
                ["layer", "stream", self.layer, "-o", "/dev/null", "--external", place],
                ["serve", "--socket", place]]

    def test_a_fifo_without_a_reader(self) -> None:
        """A reader may come late, but not after the timeout."""
        fifo = self.dir + "/fifo"
        os.mkfifo(fifo)
        command = ["--root", self.store.root, "--timeout", "0.3", "layer", "export", self.layer,
                   "-o", fifo]
        done = self.run_cstor(*command, status=6)
        self.assertEqual(f"cstor: error: {fifo}: no program has opened this FIFO for reading for "
                         "0.3 seconds (--timeout SECONDS waits longer)\n", done.stderr.decode())
        command[3] = "60"
        with subprocess.Popen([sys.executable, "-c", LAUNCH, *command], env=IDLE) as process:
            time.sleep(0.2)
            tar = read_bytes(fifo)
        self.assertEqual((0, self.store.tars[self.layer]), (process.returncode, tar))

    def test_inside_a_storage(self) -> None:
        need_proc()
        other = StoreBuilder(self.dir + "/other")
        run = self.dir + "/run"
        os.makedirs(run + "/overlay-containers")
        os.makedirs(self.dir + "/home/.config/containers")
        put(self.dir + "/home/.config/containers/storage.conf",
            f'[storage]\ndriver="overlay"\ngraphroot="{self.dir}/configured"\n')
        os.mkdir(self.dir + "/configured")
        os.mkdir(self.dir + "/elsewhere")
        link = self.dir + "/link"
        os.symlink(self.store.path("overlay"), link)
        ours = ["--root", self.store.root, "--store", other.root, "--runroot", run]
        env = {"CONTAINERS_STORAGE_CONF": self.dir + "/home/.config/containers/storage.conf"}
        places = {self.store.path("new"): self.store.root, link + "/new": self.store.root,
                  link + "/../new": self.store.root, self.dir + "/elsewhere/../store/l":
                  self.store.root, other.path("overlay/l/new"): other.root,
                  run + "/overlay-containers/new": f"{self.store.root}, in its run root {run}",
                  self.dir + "/configured/new": self.dir + "/configured"}
        before = snapshot(self.dir)
        for place, root in places.items():
            # All commands ask one function: the others are tried with one place.
            for words in self.commands(place)[:None if "link/.." in place else 1]:
                done = self.run_cstor(*ours, *words, status=6, env=env)
                said = done.err
                self.assertRegex(said, "new is inside|l is inside")
                self.assertTrue(said.endswith(
                    f" is inside the storage at {root} (cstor never writes to a storage: choose "
                    "another place)\n"), said)
                self.assertEqual(b"", done.stdout)
        self.assertEqual(before, snapshot(self.dir))
        done = self.run_cstor("stream-to-tar", "-", "-o", self.dir + "/configured/new", status=6,
                              env=env)
        self.assertIn(b"is inside the storage at", done.stderr)
        for word in ("overlay", "overlay-images", "overlay-layers"):
            os.makedirs(os.path.join(self.dir, "looks", word))
        for number, words in enumerate(self.commands(self.dir + "/looks/")[:-1]):
            self.run_cstor(*ours, *(word.replace("looks/", f"looks/{number}") for word in words))

    def test_guards_of_classes(self) -> None:
        with cstor.Storage.open(self.store.root) as storage:
            for place in (self.store.path("x"), self.store.path("overlay/l/../../x")):
                for make in (cstor.ListeningSocket, storage.image(self.image).copy_to_oci,
                             storage.image(self.image).extract, storage.layer(self.layer).extract,
                             functools.partial(cstor.extract_streams, [])):
                    self.assertRaisesRegex(cstor.CstorError, "is inside the storage", make, place)
        with mock.patch.object(cstor, "load_config", side_effect=cstor.FormatError("")):
            cstor.refuse_storage(self.store.root)  # it is not open any more

    def test_holes_are_kept(self) -> None:
        builder = StoreBuilder(self.dir + "/second")
        data = b"start" + bytes(4 << 20) + b"end"
        layer = builder.layer(make_tar(("d/", None), ("d/f", data)))
        builder.image(layer, "localhost/t:1")
        builder.save()
        with open(builder.path("overlay", layer, "diff/d/f"), "r+b") as file:
            file.truncate(0)
            file.write(b"start")
            file.seek(len(data) - 3)
            file.write(b"end")
        for source, place in (("d/f", "x"), ("d", "y")):
            self.run_on(builder, "image cp", f"t:1:{source}", os.path.join(self.dir, place))
        for name in ("x", "y/f"):
            with open(os.path.join(self.dir, name), "rb") as file:
                self.assertEqual(data, file.read())
                self.assertLess(os.fstat(file.fileno()).st_blocks * 512, 1 << 20)
        overwrite(builder.path("overlay", layer, "diff/d/f"), b"S")
        done = self.run_on(builder, "image cp t:1:d/f", self.dir + "/z", status=4)
        self.assertIn(b'"d/f": file integrity checksum failed: expected CRC-64 ', done.stderr)
        self.assertEqual(["second", "store", "x", "y"], sorted(os.listdir(self.dir)))

    SLOW = """import sys, time
sys.path.insert(0, {here!r})
import cstor
def stop(*_, **__):
    print("stopped", flush=True)
    time.sleep(60)
{patch}
sys.exit(cstor.main(sys.argv[1:]))
"""

    @contextlib.contextmanager
    def stopped(self, patch: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command until it calls what ``patch`` replaces by stop(); then it is killed."""
        with subprocess.Popen([sys.executable, "-c", self.SLOW.format(here=HERE, patch=patch),
                               "--root", self.store.root, *args], env=IDLE,
                              stdout=subprocess.PIPE) as process:
            assert process.stdout
            self.assertEqual(b"stopped\n", process.stdout.readline())
            yield process
            process.kill()

    WRITING = "cstor.write_all = cstor.Copier.copy = stop"
    NAMED = "cstor.has_proc = lambda need='': False; "

    def names(self) -> list[str]:
        """Return what lies beside the store."""
        return sorted(set(os.listdir(self.dir)) - {"store"})

    def test_killed_writing_a_file(self) -> None:
        need_proc()
        words = ["image", "export", self.image, "-o", self.dir + "/a.tar"]
        with self.stopped(self.WRITING, *words):
            self.assertEqual([], self.names())
        self.assertEqual([], self.names())
        partial = r"\.cstor-a\.tar-[0-9a-f]{12}\.partial"
        for patch in (self.NAMED + self.WRITING, self.WRITING):
            with self.stopped(patch, *words):
                live = self.names()
                if patch.startswith(self.NAMED):
                    self.assertRegex(" ".join(live), rf"\A{partial}\Z")
                self.run_on(self.store, *words)
                self.assertEqual(sorted({*live, "a.tar"}), self.names())  # it is not a dead one's
            self.assertEqual(sorted({*live, "a.tar"}), self.names())
            self.run_on(self.store, *words[:-1], self.dir + "/b.tar")
            self.assertEqual(sorted({*live, "a.tar", "b.tar"}), self.names())
            self.run_on(self.store, *words)
            self.assertEqual(["a.tar", "b.tar"], self.names())
            os.unlink(self.dir + "/b.tar")

    def test_killed_copying(self) -> None:
        words = ["image", "cp", self.image + ":/usr", self.dir + "/new"]
        for _ in range(2):  # the second removes what the first has left
            with self.stopped(self.WRITING, *words):
                self.assertRegex(" ".join(self.names()), r"\A\.cstor-new-\w{12}\.partial\Z")
        left = os.path.join(self.dir, self.names()[0])
        done = self.run_on(self.store, *words)
        self.assertEqual(f"cstor: warning: removed what a killed run left: {left}\n", done.err)
        self.assertEqual(["new"], self.names())
        self.assertEqual(["share"], os.listdir(self.dir + "/new"))
        words = ["image", "copy-to-oci", self.image, self.dir + "/layout"]
        for patch in (self.WRITING, self.NAMED + self.WRITING):
            with self.stopped(patch, *words):
                pass
            self.assertEqual(["blobs"], os.listdir(self.dir + "/layout"))
        self.run_on(self.store, *words)
        self.assertNotIn(b".partial", b" ".join(snapshot(self.dir + "/layout")))

    def test_killed_extracting(self) -> None:
        words = ["--root", self.store.root, "image", "extract", self.image]
        for place, more in (("/whole", []), ("/part", ["--path", "srv"])):
            self.run_cstor(*words, self.dir + place, *more)
        for number, (patch, place, more) in enumerate((
                (self.WRITING, "/whole", []), ("cstor.Extraction._make_links = stop", "/whole", []),
                ("cstor.Extraction._make_links = stop", "/part", ["--path", "srv"]),
                ("cstor.os.rename = stop", "/whole", ["--force"]))):
            out = f"{self.dir}/{number}"
            if "--force" in more:
                shutil.copytree(self.dir + "/whole", out, symlinks=True)
            with self.subTest(patch=patch, place=place):
                with self.stopped(patch, *words[2:], out, *more):
                    done = self.run_cstor(*words, out, status=6)
                    self.assertEqual(f"cstor: error: {out}: Directory not empty (another run is "
                                     "filling it)\n", done.err)
                done = self.run_cstor(*words, out, status=6)
                self.assertEqual(f"cstor: error: {out}: Directory not empty (a killed run left it "
                                 "incomplete: --force resumes it)\n", done.err)
                self.run_cstor(*words, out, "--force", *more)
                wanted, found = (
                    {name[len(top):]: (status.st_mode, status.st_size, status.st_mtime_ns)
                     for name in snapshot(top) for status in [os.lstat(name)]}
                    for top in (self.dir + place, out))
                self.assertEqual(wanted, found)
        # A killed run was removing what it had made.
        patch = ("def fail(*_):\n    raise OSError(5, 'failed')\n"
                 "rmdir = os.rmdir\ncstor.Extraction._make_links = fail\n"
                 "cstor.os.rmdir = lambda name, **more: rmdir(name, **more) "
                 "if b'.cstor' in os.fsencode(name) else stop()")
        out = self.dir + "/undone"
        with self.stopped("import os\n" + patch, *words[2:], out):
            pass
        self.assertEqual(0, sum(len(files) for _, _, files in os.walk(out)))
        done = self.run_cstor(*words, out, status=6)
        self.assertIn(b"a killed run left it incomplete: --force resumes it", done.stderr)
        self.run_cstor(*words, out, "--force")
        self.assertEqual(*(sorted(name[len(top):] for name in snapshot(top))
                           for top in (self.dir + "/whole", out)))
        os.mkdir(self.dir + "/mine")
        put(self.dir + "/mine/x")
        done = self.run_cstor(*words, self.dir + "/mine", status=6)
        self.assertEqual(f"cstor: error: {self.dir}/mine: Directory not empty (--force merges into "
                         "it)\n", done.err)

    def test_errors_without_a_name(self) -> None:
        out, ours = self.dir + "/out", ["--no-helper", "--root", self.store.root]
        refused = OSError(errno.EIO, os.strerror(errno.EIO))
        for words in (["image", "extract", self.image, out],
                      ["image", "copy-to-oci", self.image, out + ":t"],
                      ["image", "cp", self.image + ":/etc", out],
                      ["image", "cp", self.image + ":/etc/os-release", out],
                      ["layer", "export", self.layer, "-o", out]):
            for call in ("fchmod", "listxattr", "fstat", "mkdir", "chmod", "lseek", "dup", "link",
                         "rename", "utime", "copy_file_range", "write"):
                with self.subTest(words=words, call=call), \
                        mock.patch.object(os, call, side_effect=refused), \
                        mock.patch.object(cstor, "default_workers", lambda: 1):
                    status, _, said = self.call(*ours, *words)
                    if status:
                        self.assertEqual(6, status)
                        self.assertRegex(said, r"\Acstor: error: (/|layer |content)[^\n]*: Input/"
                                               r"output error[^\n]*\n\Z")
                if os.path.lexists(out):
                    self.assertEqual(0, status, (words, call, said))
                    remove(out)
                self.assertEqual([], self.names())
                refused.filename = refused.__traceback__ = None  # which keeps all frames
                vars(refused).pop("hint", None)
        with mock.patch.object(cstor, "table_lines", side_effect=refused):
            self.assertEqual((6, "", "cstor: error: Input/output error\n"),
                             self.call(*ours, "image", "list"))
            refused.__traceback__ = None
        with open("/dev/full", "wb") as full:
            for words in (["image", "list"], ["image", "cat", self.image, "etc/os-release"],
                          ["layer", "export", self.layer], ["--help"]):
                done = self.run_on(self.store, *words, status=6, stdout=full)
                self.assertEqual(b"cstor: error: stdout: No space left on device\n", done.stderr)

    def test_what_is_open_already_is_written_on(self) -> None:
        start = f"{shlex.join(COMMAND)} --root {self.store.root}"
        words = f"{start} image cat {self.image} etc/os-release -o"
        text = self.run_on(self.store, "image cat", self.image, "etc/os-release").stdout
        for place, more in (("/dev/stdout", ">>"), ("/dev/fd/1", ">>"), ("/dev/fd/7", "7>>"),
                            ("/proc/self/fd/1", ">>"), ("/dev/stderr", "2>>")):
            name = self.dir + "/x"
            script = f"echo head > {name}; {words} {place} {more} {name}; echo tail >> {name}"
            subprocess.run(["sh", "-c", script], check=True)
            self.assertEqual(b"head\n" + text + b"tail\n", read_bytes(name))
        done = self.run_on(self.store, "layer export", self.layer, "-o", "/dev/fd/99", status=6)
        self.assertEqual(b"cstor: error: /dev/fd/99: Bad file descriptor\n", done.stderr)

    def test_places_are_called_what_they_are(self) -> None:
        os.chdir(self.dir)
        self.addCleanup(os.chdir, HERE)
        put("file")
        for words in (["extract", self.image], ["copy-to-oci", self.image]):
            done = self.run_on(self.store, "image", *words, "file", status=6)
            self.assertEqual(b"cstor: error: file: Not a directory\n", done.stderr)
        os.unlink("file")
        os.symlink("nowhere", self.dir + "/link")
        for words in (["extract", self.image], ["copy-to-oci", self.image]):
            done = self.run_on(self.store, "image", *words, self.dir + "/link", status=6)
            self.assertEqual(f"cstor: error: {self.dir}/link: is a dangling symbolic link\n",
                             done.err)
        real = os.mkdir

        def swapped(name: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            os.symlink("store", name, dir_fd=dir_fd)

        def foreign(name: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            real(name, mode, dir_fd=dir_fd)
            os.chown(name, 1234, -1, dir_fd=dir_fd)

        for make, number, message in (
                (swapped, errno.EBUSY, "another process put something else in its place"),
                (foreign, errno.EPERM, ("belongs to user 1234 right after mkdir: another "
                                        "process put it there, or its file system sets owners"))):
            if make is foreign and os.geteuid():
                continue
            with mock.patch.object(os, "mkdir", make), self.assertRaises(OSError) as caught, \
                    cstor.OutputDirectory(self.dir + "/new"):
                pass
            self.assertEqual((number, message, self.dir + "/new"), caught.exception.args
                             + (caught.exception.filename,))
            self.assertEqual(["link"] + ["new"] * (make is swapped), self.names())
            if make is swapped:
                os.unlink(self.dir + "/new")

    def test_without_proc(self) -> None:
        need_mounts()
        builder = StoreBuilder(self.dir + "/second")
        layer = builder.layer(make_tar(("d/", None), ("d/f", b"x" * 9000), ("d/l", "f"),
                                       ("d/.wh.gone", b"")) [:-1024] + entry(b"d/fifo",
                                                                             typeflag=b"6",
                                                                             mode=b"0004640") +
                              device(b"d/null", b"3", 1, 3) + pax({b"SCHILY.xattr.trusted.a": b"b"})
                              + symlink(b"d/s", b"f") + bytes(1024))
        image = builder.image(layer, "localhost/t:1")
        builder.save()
        hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "-",
                  *COMMAND, "--root", builder.root]
        seen = [*COMMAND, "--root", builder.root]
        for number, words in enumerate((["layer", "extract", layer], ["image", "extract", image],
                                        ["image", "cp", image + ":/d"],
                                        ["image", "copy-to-oci", image],
                                        ["layer", "export", layer, "-o"],
                                        ["layer", "stream", layer, "-o"])):
            places = [f"{self.dir}/{number}{end}" for end in "ab"]
            for command, place in zip((hidden, seen), places):
                self.run_cstor(*words, place, command=command)
            if os.path.exists(places[0] + "/index.json"):
                self.assertEqual(*(sorted(os.listdir(place + "/blobs/sha256")) for place in places))
            elif os.path.isdir(places[0]):
                for command in (hidden, seen):
                    done = self.run_cstor("image", "diff", f"dir:{places[0]}", f"dir:{places[1]}",
                                          command=command)
                    self.assertEqual((b"", b""), (done.stdout, done.stderr))
            else:
                self.assertTrue(filecmp.cmp(places[0], places[1], shallow=False))
        for words, what in (
                (["layer", "stream", layer, "-o", "/dev/null", "--external", self.dir + "/x"],
                 "paths of open files are found"),
                (["serve", "--socket", self.dir + "/x"], "files of layers are passed")):
            done = self.run_cstor(*words, command=hidden, status=6)
            self.assertEqual(f"cstor: error: {what} through /proc, which is not mounted (mount -t "
                             "proc proc /proc)\n", done.err)
            self.assertFalse(os.path.lexists(self.dir + "/x"))
        done = self.run_cstor("layer", "export", layer, "-o", "/dev/stdout", command=hidden)
        self.assertEqual(builder.tars[layer], done.stdout)
        link = self.dir + "/stdin"
        os.symlink("/proc/self/fd/0", link)  # as /dev/stdin is, where it is
        for line, place in ((f"stream-to-tar {link}", link), (f"tar-diff {link} /dev/null", link),
                            ("tar-diff - /proc/self/fd/0", "/proc/self/fd/0"),
                            (f"image diff {image} tar:{link}", link)):
            done = self.run_cstor(*line.split(), command=hidden, status=6)
            self.assertEqual(f"cstor: error: {place}: No such file or directory: /proc is not "
                             "mounted (mount -t proc proc /proc; - is stdin and stdout)\n",
                             done.err)
        self.run_cstor("tar-diff", self.dir + "/none", "/dev/null", command=hidden, status=3)
        done = self.run_cstor("store", "info", command=hidden)
        self.assertIn(b"uid 0, reads all files\n", done.stdout)

    def test_bind_mounts(self) -> None:
        need_mounts()
        for word in ("a b", "b", "c"):
            os.mkdir(os.path.join(self.dir, word))
        script = (f"set -e; cd {self.dir}; mount --bind store/overlay 'a b'; "
                  f"mount --bind store/overlay/{self.layer}/diff b; mount --bind store c; "
                  "mount -t tmpfs none store/overlay-containers; "
                  '[ -z "$3" ] || mount -t tmpfs none /proc; '
                  f'exec "$1" -c "$2" --root {self.store.root} layer export {self.layer} -o "$4"')
        for proc, place, status in (("", "a b/x", 6), ("", "b/x", 6), ("", "c/x", 6), ("", "x", 0),
                                    ("", "store/overlay-containers/x", 6), ("no", "a b/x", 6),
                                    ("no", "x", 0), ("no", "c/overlay/l/x", 6), ("no", "b/x", 6),
                                    ("no", "store/overlay/l/x", 6)):
            done = self.run_cstor(proc, os.path.join(self.dir, place), status=status, command=[
                "unshare", "-m", "sh", "-c", script, "-", sys.executable, LAUNCH])
            if status:
                self.assertIn(f"{place} is inside the storage at {self.store.root} ".encode(),
                              done.stderr)

    def test_merging_above_a_storage(self) -> None:
        builder = StoreBuilder(self.dir + "/second")
        builder.image(builder.layer(make_tar(("store/", None), ("store/x", b"x"), ("y", b"y"))),
                      "localhost/t:1")
        builder.save()
        for resume in (False, True):
            if resume:
                os.mkdir(self.dir + "/.cstor-0755-0123456789ab.partial")
            words = ["--root", builder.root, "--store", self.store.root, "image", "extract", "t:1",
                     self.dir, "--force"]
            done = self.run_cstor(*words, status=6)
            self.assertEqual(
                f"cstor: error: {self.dir}/store is inside the storage at {self.store.root} "
                f"(--exclude leaves it out; {self.dir} is left incomplete)\n",
                done.err)
            self.run_cstor(*words, "--exclude", "store")
            os.unlink(self.dir + "/y")

    def test_killed_runs_leave_no_scratch(self) -> None:
        scratch = self.dir + "/tmp"
        os.mkdir(scratch)
        dead = cstor.make_scratch(scratch)
        put(dead.path + "/db.sql")
        foreign = scratch + "/.cstor-scratch-0123456789ab.partial"
        os.symlink("..", foreign)
        with cstor.make_scratch(scratch) as live:
            self.assertEqual(3, len(os.listdir(scratch)))  # the lock of another run holds
            os.close(dead.fd)
            dead.fd = -1
            time.sleep(0.03)
            cstor.make_scratch(scratch).close()
            self.assertEqual({live.path, foreign},
                             {os.path.join(scratch, name) for name in os.listdir(scratch)})
        self.assertEqual([os.path.basename(foreign)], os.listdir(scratch))


class HostileExtracts(HostileStores):
    """Images and neighbours that want to write elsewhere: nothing outside the target changes."""

    def test_a_device_that_is_called_like_a_directory(self) -> None:
        need(os.geteuid() == 0, "needs root, to make devices")
        device: Any = {"major": b"0000001", "minor": b"0000003"}
        store = self.store(entry(b"d/f", b"1") + entry(b"n", typeflag=b"3", **device) + END,
                           entry(b"d", typeflag=b"4", **device) + entry(b"n/f", b"2") + END)
        self.assertEqual(["d", "n", "n/f"], self.extracted(store))
        self.extracted(self.store(entry(b"n", typeflag=b"3", **device) + entry(b"n/f", b"1")
                                  + END), status=6)

    def test_three_hundred_nested_links_and_deep_directories(self) -> None:
        links = b"".join(entry(b"l%d" % i, typeflag=b"2", linkname=b"l%d" % (i + 1))
                         for i in range(300))
        self.assertEqual(301, len(self.extracted(self.store(
            links + symlink(b"l300", os.fsencode(self.canary)) + END))))
        self.extracted(self.store(links + entry(b"l0/f", b"1") + END), status=6)
        nested = symlink(b"l", b".") + entry(b"l/" * 30 + b"f", b"1")
        self.assertEqual(["f", "l"], self.extracted(self.store(nested + END)))
        deep = b"".join(pax({b"path": b"d/" * i}) + entry(b"d", typeflag=b"5")
                        for i in range(1, 1500))
        store = self.store(deep + pax({b"path": b"d/" * 1499 + b"f"}) + entry(b"f", b"") + END)
        dest = self.out + "/root"
        self.cstor(store, "-q", "image", "extract", "x", dest, "--no-same-owner")
        done = subprocess.run(["find", dest], stdout=subprocess.PIPE, check=True)
        self.assertEqual(1501, len(done.stdout.splitlines()))
        remove(dest)

    def test_a_neighbour_swaps_directories_for_links(self) -> None:
        """Another process replaces what we make by links to the canary, over and over."""
        store = self.store(b"".join(
            entry(b"d%d/e%d/f%d" % (i % 9, i % 5, i), b"%d" % i, mode=b"0000666")
            + (entry(b"d%d/e%d/g%d" % (i % 9, i % 5, i), typeflag=b"1",
                     linkname=b"d%d/e%d/f%d" % (i % 9, i % 5, i)) if i % 3 == 0 else b"")
            for i in range(3000)) + END)
        dest = self.out + "/root"
        code = textwrap.dedent("""
            import os, sys
            dest, canary = sys.argv[1:]
            number = 0
            while os.path.exists(canary):
                for path in ("d%d" % (number % 9), "d%d/e%d" % (number % 9, number % 5),
                             "d%d/e%d/f%d" % (number % 9, number % 5, number % 3000)):
                    path = os.path.join(dest, path)
                    try:
                        os.rename(path, path + ".away%d" % number)
                        os.symlink(canary + "/secret" * path.count("/f"), path)
                    except OSError:
                        pass
                number += 1
            """)
        swapped = 0
        with subprocess.Popen([sys.executable, "-c", code, dest, self.canary]) as neighbour:
            try:
                for mode in ("--force", "--no-clean-on-error", "--clean-on-error"):
                    for _ in range(4):
                        if mode == "--force":
                            os.makedirs(dest, exist_ok=True)
                        done = subprocess.run(
                            [*COMMAND, "-q", "--root", store.root, "image", "extract", "x",
                             dest, mode, "--no-same-owner"], env=IDLE, timeout=60,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
                        self.assertIn(done.returncode, (0, 6), done.stderr)
                        self.assertNotIn(b"Traceback", done.stderr)
                        swapped += done.returncode == 6
                        self.assertEqual(self._canary, snapshot(self.canary))
                        subprocess.run(["rm", "-rf", dest], stderr=subprocess.DEVNULL, check=False)
            finally:
                neighbour.kill()
        self.assertGreater(swapped, 0, "nothing was ever swapped in time")
        with open(self.canary + "/secret", encoding="ascii") as file:
            self.assertEqual("CANARY", file.read())

    def test_cleaning_up_follows_no_link(self) -> None:
        target = self.out + "/root"
        os.makedirs(target + "/a/b")
        os.symlink(self.canary, target + "/a/link")
        os.symlink(self.canary, target + "/link")
        real = os.scandir

        def scandir(fd: int) -> Any:
            entries = contextlib.nullcontext(list(real(fd)))
            if os.path.isdir(target + "/a/b") and not os.path.islink(target + "/a/b"):
                os.rename(target + "/a", target + "/moved")  # after it was listed
                os.symlink(self.canary, target + "/a")
            return entries

        with cstor.Target.at(target) as root, mock.patch.object(os, "scandir", scandir), \
                self.assertRaises(OSError):
            cstor.remove_content(root)
        self.assertEqual(self._canary, snapshot(self.canary))
        with cstor.Target.at(target) as root:
            cstor.remove_content(root)
        self.assertEqual([], os.listdir(target))
        self.assertEqual(self._canary, snapshot(self.canary))


def make_disk(folder: str, kind: str, size: int) -> str:
    """Make a file system in a file and mount it; return where, after need() when it cannot be."""
    image, place = os.path.join(folder, kind + ".img"), os.path.join(folder, kind)
    with open(image, "wb") as file:
        file.truncate(size)
    os.mkdir(place)
    more = {"xfs": ["-m", "reflink=1"], "ext4": ["-E", "lazy_itable_init=1"]}.get(kind, [])
    for command in ([f"mkfs.{kind}", "-q", *more, image], ["mount", "-o", "loop", image, place]):
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              check=False)
        need(done.returncode == 0, f"{' '.join(command[:1])}: {done.stderr.decode()}")
    return place


def unmount(place: str) -> None:
    """Unmount a disk that make_disk() mounted, and remove its file."""
    subprocess.run(["umount", place], check=True)
    os.unlink(place + ".img")
    os.rmdir(place)


def unshared_extents(paths: Sequence[str]) -> list[str]:
    """Return the files that have an extent which is no other file's as well, or none at all."""
    found = []
    for start in range(0, len(paths), 500):
        done = subprocess.run(["filefrag", "-v", *paths[start:start + 500]], check=True,
                              stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"})
        for part in done.stdout.decode("utf-8", "replace").split("File size of ")[1:]:
            extents = re.findall(r"^ +\d+: .*$", part, re.MULTILINE)
            if not extents or not all("shared" in extent for extent in extents):
                found.append(part)
    return found


@contextlib.contextmanager
def served_layer(layer: cstor.Layer, form: str, threshold: int = 0) -> Iterator[cstor.LayerStream]:
    """Give a layer as a server sends it over a socket; "" is varlink."""
    root = layer.storage.graphroot
    server = cstor.RpcServer(lambda: cstor.Storage.open(root))
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=server.handle, args=(theirs,))
    thread.start()
    try:
        with (cstor.RpcClient if form else cstor.VarlinkClient)(ours) as client, \
                client.layer(layer.id, form, threshold=threshold) as stream:
            yield stream
    finally:
        thread.join()


class Disks(StoreTest):
    """Extraction on file systems of our own."""

    disks: dict[str, str]

    @classmethod
    def setUpClass(cls) -> None:
        need(os.geteuid() == 0, "only root can mount")
        need_tools("mkfs.xfs", "mkfs.btrfs", "mkfs.ext4", "btrfs", "mount", "umount", "filefrag")
        folder = tempfile.TemporaryDirectory(prefix="cstor-disks-")
        cls.addClassCleanup(folder.cleanup)
        cls.disks = {}
        for kind in ("xfs", "btrfs", "ext4"):
            cls.disks[kind] = make_disk(folder.name, kind, 2 << 30)
            cls.addClassCleanup(unmount, cls.disks[kind])
        os.chmod(folder.name, 0o755)

    def setUp(self) -> None:
        super().setUp()
        rng = random.Random(9)
        self.files = {f"d{i % 5}/f{i}": rng.getrandbits(8 * size).to_bytes(size, "big")
                      for i, size in enumerate([5000, 70_000, 1 << 20] * 12 + [1, 100, 3000])}
        self.tar = make_tar(*self.files.items())

    def place(self, kind: str, name: str) -> str:
        """Return a path on a disk, which is removed at the end."""
        path = os.path.join(self.disks[kind], name)
        self.addCleanup(remove, path)
        return path

    def store(self, root: str, tar: bytes = b"") -> StoreBuilder:
        store = StoreBuilder(root)
        store.image(store.layer(tar or self.tar), "localhost/x:latest")
        store.save()
        os.sync()
        return store

    @staticmethod
    def used(kind_place: str) -> int:
        """Return the bytes in use on a file system."""
        fd = os.open(kind_place, os.O_RDONLY)
        os.sync()
        os.close(fd)
        status = os.statvfs(kind_place)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def check_contents(self, out: str, count: int = -1) -> None:
        found = {}
        for folder, _, names in os.walk(out):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    found[os.path.relpath(file.name, out)] = file.read()
        self.assertEqual({name: self.files[name] for name in found}, found)
        self.assertEqual(len(self.files) if count < 0 else count, len(found))

    def check_shared(self, done: Mapping[str, Any], out: str) -> None:
        """All data are shared; on btrfs what is below a block lies beside the inode."""
        size = sum(map(len, self.files.values()))
        self.assertEqual((size, size, 0), tuple(done[key] for key in (
            "bytes", "bytes-reflinked", "bytes-copied")))
        self.check_contents(out)
        self.assertEqual([], unshared_extents([
            os.path.join(out, name) for name, data in self.files.items() if len(data) >= 4096]))

    def test_reflinks_share_all_data(self) -> None:
        for kind in ("xfs", "btrfs"):
            with self.subTest(disk=kind):
                store, out = self.store(self.place(kind, "store")), self.place(kind, "out")
                before = self.used(self.disks[kind])
                with self.open(store) as storage:
                    done = storage.image("x").extract(out, link_mode="reflink", verify=True)
                grown = self.used(self.disks[kind]) - before
                self.check_shared(done, out)
                self.assertLess(grown, 1 << 20)

    def test_streams_share_all_data(self) -> None:
        for kind, codec in (("xfs", CODECS[0]), ("btrfs", CODECS[1])):
            store, out = self.store(self.place(kind, "store")), self.place(kind, "out")
            with cstor.Storage.open(store.root) as storage, \
                    streamed(storage.layers()[0], codec) as stream:
                self.check_shared(stream.extract(out, link_mode="reflink", verify=True), out)
        with cstor.Storage.open(self.store(self.place("xfs", "more")).root) as storage:
            for form in ("stream", "splitfdstream", ""):
                with self.subTest(form=form), served_layer(storage.layers()[0], form) as stream:
                    out = self.place("xfs", f"out-{form}")
                    self.check_shared(stream.extract(out, link_mode="reflink"), out)
            with streamed(storage.layers()[0]) as stream, \
                    self.assertRaisesRegex(cstor.Unsupported, '"d0/f0" cannot be shared'):
                stream.extract(self.place("ext4", "out"), link_mode="reflink")
            with streamed(storage.layers()[0]) as stream:
                done = stream.extract(self.place("ext4", "out"))
            self.assertEqual(sum(map(len, self.files.values())), done["bytes-copied"])
            self.check_contents(self.disks["ext4"] + "/out")

    def test_copies_share_nothing_and_are_the_same(self) -> None:
        store = self.store(self.place("xfs", "store"))
        for kind, mode, why in (("ext4", "auto", "FICLONE: Invalid cross-device link"),
                                ("btrfs", "auto", "FICLONE: Invalid cross-device link"),
                                ("xfs", "copy", "--link-mode copy")):
            out = self.place(kind, "out")
            with cstor.Storage.open(store.root) as storage:
                done = storage.image("x").extract(out, link_mode=mode, verify=True)
            size = sum(map(len, self.files.values()))
            self.assertEqual((0, size, [{"why": why, "files": len(self.files), "bytes": size}]),
                             tuple(done[key] for key in ("bytes-reflinked", "bytes-copied",
                                                         "refused")))
            self.check_contents(out)

    def test_holes_stay_holes_by_every_way(self) -> None:
        size = 30 << 20
        data = bytes(10 << 20) + b"x" * 5000 + bytes(size - (10 << 20) - 5000)
        tar = make_tar(("sparse", data))
        store = self.store(self.place("xfs", "store"), tar)
        path = store.path("overlay", store.layers[0]["id"], "diff/sparse")
        with open(path, "wb") as file:  # as partial pulls of zstd:chunked images leave it
            os.pwrite(file.fileno(), b"x" * 5000, 10 << 20)
            file.truncate(size)
        for kind, mode in (("xfs", "reflink"), ("xfs", "copy"), ("ext4", "auto"),
                           ("btrfs", "auto")):
            out = self.place(kind, "sparse-" + mode)
            with cstor.Storage.open(store.root) as storage:
                storage.image("x").extract(out, link_mode=mode, verify=True)
            status = os.stat(out + "/sparse")
            self.assertEqual(size, status.st_size)
            self.assertLess(status.st_blocks * 512, 1 << 20, (kind, mode))
            self.assertEqual(sha256(data), sha256(read_bytes(out + "/sparse")))

    def test_flat_layers_and_mapped_copies_are_shared_too(self) -> None:
        store = StoreBuilder(self.place("xfs", "store"))
        layer = store.layer(make_tar(*self.files.items()))
        diff = store.path("overlay", layer, "diff")
        toc = []
        for name, data in self.files.items():
            digest = hashlib.sha256(data).hexdigest()
            store.write(f"overlay/{layer}/diff/{digest[:2]}/{digest[2:]}", data)
            toc.append({"type": "reg", "name": name, "size": len(data),
                        "digest": f"sha256:{digest}"})
        for name in self.files:
            os.unlink(os.path.join(diff, name))
        os.makedirs(store.path("overlay", layer, "composefs-data"))
        store.big_data(store.layers[0], "zstd-chunked-manifest",
                       json.dumps({"version": 1, "entries": toc}).encode(), "layers")
        store.image(layer, "localhost/x:latest")
        store.save()
        out = self.place("xfs", "out")
        with cstor.Storage.open(store.root) as storage:
            done = storage.image("x").extract(out, link_mode="reflink")
        self.assertEqual(0, done["bytes-copied"])
        self.check_contents(out)

    def failing(self, store: StoreBuilder, out: str, code: int) -> None:
        """An extraction that ends with an error of the target leaves no half file."""
        with cstor.Storage.open(store.root) as storage, storage.image("x").tree() as tree:
            for clean in (True, False):
                with self.assertRaises(OSError) as caught:
                    cstor.extract_tree(tree, out, clean=clean, link_mode="copy")
                self.assertEqual(code, caught.exception.errno)
                self.assertTrue(str(caught.exception.filename).startswith(out))
                self.assertEqual(not clean, os.path.isdir(out))
            count = sum(len(files) for _, _, files in os.walk(out))
            self.assertGreater(count, 0)
            self.check_contents(out, count)
            remove(out)

    def test_a_full_disk(self) -> None:
        store = self.store(self.dir + "/store")
        with tempfile.TemporaryDirectory() as folder:
            for kind, size in (("ext4", 8 << 20), ("btrfs", 110 << 20), ("xfs", 300 << 20)):
                place = make_disk(folder, kind, size)
                try:
                    status = os.statvfs(place)
                    with open(place + "/filler", "wb") as file:  # all but some 3 MB
                        file.write(bytes(max(0, status.f_bavail * status.f_frsize - (3 << 20))))
                    os.sync()
                    self.failing(store, place + "/out", errno.ENOSPC)
                finally:
                    unmount(place)

    def test_a_quota(self) -> None:
        store = self.store(self.dir + "/store")
        with tempfile.TemporaryDirectory() as folder:
            place = make_disk(folder, "btrfs", 1 << 30)  # whose quotas hold for root as well
            try:
                for command in (["subvolume", "create", place + "/home"],
                                ["quota", "enable", place],
                                ["qgroup", "limit", "3m", place + "/home"]):
                    subprocess.run(["btrfs", *command], stdout=subprocess.DEVNULL, check=True)
                self.failing(store, place + "/home/out", errno.EDQUOT)
            finally:
                unmount(place)

    def test_a_full_disk_under_a_layout(self) -> None:
        store = self.store(self.dir + "/store")
        other = StoreBuilder(self.dir + "/other")
        other.image(other.layer(make_tar(("f", b"small"))), "localhost/x:latest")
        other.save()
        with tempfile.TemporaryDirectory() as folder:
            place = make_disk(folder, "ext4", 8 << 20)
            try:
                for made in (True, False):
                    if not made:
                        self.run_on(other, "image copy-to-oci x", place + "/layout:small")
                        before = {name: row[:6] for name, row in snapshot(place).items()}
                    for compress in ("none", "gzip"):
                        done = self.run_cstor("--root", store.root, "image", "copy-to-oci", "x",
                                              place + "/layout", f"--compress={compress}", status=6)
                        self.assertIn(f"{place}/layout/blobs/sha256: No space left".encode(),
                                      done.stderr)
                        if made:
                            self.assertEqual(["lost+found"], os.listdir(place))
                        else:
                            self.assertEqual(before, {name: row[:6] for name, row
                                                      in snapshot(place).items()})
                self.assertEqual({"small"}, set(read_layout(place + "/layout")))
                subprocess.run(["mount", "-o", "remount,ro", place], check=True)
                done = self.run_on(store, "image copy-to-oci x", place + "/layout", status=6)
                self.assertIn(b"Read-only file system", done.stderr)
            finally:
                unmount(place)

    def test_an_xattr_that_is_too_long(self) -> None:
        tar = pax({b"SCHILY.xattr.user.big": b"x" * 60_000}) + entry(b"f", b"1") + END
        store = self.store(self.dir + "/store", tar)
        out = self.place("ext4", "out")
        done = self.run_on(store, "image extract x", out, status=6)
        self.assertIn(f"{out}/f: xattr user.big of 60000 bytes: No space left".encode(),
                      done.stderr)

    def test_a_read_only_target(self) -> None:
        store = self.store(self.dir + "/store")
        place = self.place("ext4", "ro")
        os.makedirs(place + "/out")
        subprocess.run(["mount", "--bind", place, place], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
            for name in ("new", "out"):
                done = self.run_on(store, "image extract x", f"{place}/{name}", status=6)
                self.assertRegex(done.err, f"{place}/{name}.*: Read-only file system")
        finally:
            subprocess.run(["umount", place], check=True)

    def test_other_mounts_of_one_file_system(self) -> None:
        """A bind mount between store and target is no reason to copy (Linux 5.18), nor to fail."""
        store = self.store(self.place("xfs", "store"))
        out = self.place("xfs", "out")
        os.mkdir(out)
        subprocess.run(["mount", "--bind", out, out], check=True)
        try:
            with cstor.Storage.open(store.root) as storage:
                done = storage.image("x").extract(out)
                self.check_contents(out)
            self.assertEqual(sum(map(len, self.files.values())),
                             done["bytes-reflinked"] + done["bytes-copied"])
        finally:
            subprocess.run(["umount", out], check=True)


# ================================================================================================
# 18. Archives
# ================================================================================================

def read_layout(top: str) -> dict[str, tuple[dict[str, Any], dict[str, Any], list[bytes]]]:
    """Check an OCI layout by itself; return (manifest, configuration, tars) by tag or digest.

    Every blob that is named must be there, of the size and digest that is said, and every file must
    be one that is named.
    """
    with open(top + "/oci-layout", encoding="ascii") as file:
        assert json.load(file) == {"imageLayoutVersion": "1.0.0"}
    index = read_json(top + "/index.json")
    assert index["schemaVersion"] == 2
    found: dict[str, tuple[dict[str, Any], dict[str, Any], list[bytes]]] = {}

    def blob(entry: dict[str, Any]) -> bytes:
        data = read_bytes(os.path.join(top, "blobs/sha256", entry["digest"][7:]))
        assert (sha256(data), len(data)) == (entry["digest"], entry["size"]), entry
        return data

    def image(entry: dict[str, Any], name: str) -> None:
        manifest = json.loads(blob(entry))
        if "manifests" in manifest:
            for instance in manifest["manifests"]:
                image(instance, f"{name}@{instance['platform']['architecture']}")
            return
        config = json.loads(blob(manifest["config"]))
        tars = []
        for layer in manifest["layers"]:
            data = blob(layer)
            kind = layer["mediaType"].partition("tar")[2]
            if kind == "+gzip":
                data = gzip.decompress(data)
            elif kind == "+zstd":
                data = subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE,
                                      check=True).stdout
            tars.append(data)
        assert [sha256(tar) for tar in tars] == config["rootfs"]["diff_ids"]
        found[name] = manifest, config, tars

    for entry in index["manifests"]:
        image(entry, entry.get("annotations", {}).get(cstor.REF_NAME, entry["digest"]))
    return found


class Layouts(StoreTest):
    """OCI layouts, read back by a reader of their own."""

    def setUp(self) -> None:
        super().setUp()
        self.store = self.sample()
        self.out = self.dir + "/layout"
        self.ours = ["--root", self.store.root]

    def copy(self, *args: str, status: int = 0, **options: Any) -> Done:
        return self.run_cstor(*self.ours, "image", "copy-to-oci", *args, status=status, **options)

    def index(self) -> Any:
        return read_json(self.out + "/index.json")

    def state(self) -> dict[bytes, tuple[int, ...]]:
        """Return what a failed run must leave as it is: all but times of directories."""
        return {name: row[:6] for name, row in snapshot(self.out).items()}

    def add_list(self, name: str, value: Any, number: int = 1) -> bytes:
        """Add an image that is a manifest list; return the list."""
        record: dict[str, Any] = {"id": str(number) * 64, "names": ["localhost/" + name]}
        data = json.dumps(value).encode()
        self.store.big_data(record, "manifest", data)
        self.store.images.append(record)
        self.store.save()
        return data

    def writers(self, *runs: tuple[StoreBuilder, str, str, int]) -> None:
        """Copy images at the same time; a run is (store, image, tag, status)."""
        processes = [(status, subprocess.Popen(
            [*COMMAND, "--root", store.root, "image", "copy-to-oci", name, f"{self.out}:{tag}",
             "--compress=gzip:1"], env=IDLE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
            for store, name, tag, status in runs]
        for status, process in processes:
            _, errors = process.communicate(timeout=60)
            self.assertEqual((status, status == 0), (process.returncode, errors == b""), errors)
        self.assertEqual({tag for _, _, tag, status in runs if not status},
                         set(read_layout(self.out)))

    def chain(self, name: str) -> list[bytes]:
        with cstor.Storage.open(self.store.root) as storage:
            return [self.store.tars[layer.id] for layer in storage.image(name).layers()]

    def test_an_image(self) -> None:
        self.guard(self.store.root)
        for compress, end in (("none", ""), ("gzip", "+gzip"), ("gzip:1", "+gzip"),
                              ("zstd", "+zstd")):
            if compress == "zstd":
                need_tools("zstd")
            tag = compress.replace(":", "-")
            done = self.copy("sample", f"{self.out}:{tag}", f"--compress={compress}",
                             "--format=json")
            manifest, config, tars = read_layout(self.out)[tag]
            self.assertEqual(self.chain("sample"), tars)
            self.assertEqual({cstor.OCI_LAYER + end},
                             {layer["mediaType"] for layer in manifest["layers"]})
            with cstor.Storage.open(self.store.root) as storage:
                image = storage.image("sample")
                self.assertEqual(image.config(), config)
                self.assertEqual("sha256:" + image.id, manifest["config"]["digest"])
                self.assertEqual(sha256(image.big_data("manifest")),
                                 manifest["annotations"][cstor.ORIGINAL_DIGEST])
            entry = self.index()["manifests"][-1]
            self.assertEqual({"architecture": "amd64", "os": "linux"}, entry["platform"])
            self.assertEqual(entry["digest"], done.json["digest"])
        self.assertEqual(0o755 & ~UMASK, stat.S_IMODE(os.stat(self.out).st_mode))
        self.assertEqual([], [name for name in snapshot(self.out) if b".partial" in name])

    def test_tags(self) -> None:
        for args, tag in ((["app:1", self.out], "1"), (["localhost/app", self.out], "latest"),
                          (["sample", self.out + ":x/y"], "x/y"), (["sample", self.out + ":"], ""),
                          (["app", self.out + ":localhost/app:1"], "localhost/app:1"),
                          (["app", self.out + ":r.io:5000/a/b@c"], "r.io:5000/a/b@c"),
                          (["sample", self.out + ":a b"], ""), (["sample", ":1"], "")):
            if tag:
                done = self.copy(*args)
                self.assertEqual(tag.encode(), done.stdout.split()[1])
                self.assertEqual(b"", done.stderr)
                self.assertIn(tag, read_layout(self.out))
            else:
                self.copy(*args, status=2)
        self.assertEqual({"1", "latest", "x/y", "localhost/app:1", "r.io:5000/a/b@c"},
                         set(read_layout(self.out)))
        os.mkdir(self.dir + "/a:b")  # a directory that is there is meant
        for text, tags in (("a:b:t:u", {"t:u"}), ("a:b", {"t:u", "latest"})):
            self.copy("sample", text, cwd=self.dir)
            self.assertEqual(tags, set(read_layout(self.dir + "/a:b")))

    def test_a_tag_that_changes_hands(self) -> None:
        first = self.copy("app:1", self.out + ":t").stdout.split()[0]
        self.assertEqual(b"", self.copy("app:1", self.out + ":t").stderr)
        for args, told in ((["sample"], b"cstor: note: t was the tag of %s\n" % first),
                           (["app:1", "-q"], b"")):
            self.assertEqual(told, self.copy(*args, self.out + ":t").stderr)

    def test_the_other_name_of_the_command(self) -> None:
        self.run_cstor(*self.ours, "image", "copy", "sample", self.out + ":x", "--compress=gzip")
        self.assertEqual({"x"}, set(read_layout(self.out)))

    def test_what_is_there_stays(self) -> None:
        self.copy("app:1", self.out + ":one")
        index = self.index()
        index["annotations"] = {"x": "y"}
        index["manifests"][0]["annotations"]["more"] = "kept"
        index["manifests"].append({**index["manifests"][0], "annotations": {"no": "name"}})
        put(self.out + "/index.json", json.dumps(index))
        before = snapshot(self.out + "/blobs/sha256")
        del before[os.fsencode(self.out + "/blobs/sha256/.")]
        self.copy("sample", self.out + ":two")
        after = self.index()
        self.assertEqual((index["annotations"], index["manifests"]),
                         (after["annotations"], after["manifests"][:2]))
        kept = snapshot(self.out + "/blobs/sha256")
        self.assertEqual(before, {name: kept[name] for name in before})
        self.copy("sample", self.out + ":one")  # takes the tag over
        found = read_layout(self.out)
        self.assertEqual(found["two"], found["one"])
        self.assertEqual(3, len(self.index()["manifests"]))

    def test_a_blob_that_is_short_is_written_again(self) -> None:
        self.copy("app:1", self.out + ":x")
        blobs = self.out + "/blobs/sha256/"
        for name in os.listdir(blobs):
            os.truncate(blobs + name, 1)
        self.copy("app:1", self.out + ":x")
        for name in os.listdir(blobs):  # the right size, as after a power cut
            overwrite(blobs + name, b"\0\0\0\0")
        self.copy("app:1", self.out + ":x")
        self.assertEqual(self.chain("app:1"), read_layout(self.out)["x"][2])

    def test_a_manifest_that_fits_is_kept(self) -> None:
        image = self.store.images[0]
        tars = self.chain("app:1")
        config = image["id"]
        with open(self.store.path("overlay-images", config,
                                  os.fsdecode(cstor.big_data_file("sha256:" + config))), "rb") as f:
            size = len(f.read())
        for kind, kept in ((cstor.OCI_MANIFEST, True), ("", True),
                           ("application/vnd.docker.distribution.manifest.v2+json", False)):
            docker = "docker" in kind
            manifest = json.dumps({
                "schemaVersion": 2, **({"mediaType": kind} if kind else {}),
                "config": {"mediaType": "application/vnd.docker.container.image.v1+json" if docker
                           else cstor.OCI_CONFIG, "digest": "sha256:" + config, "size": size},
                "layers": [{"mediaType": "application/vnd.docker.image.rootfs.diff.tar" if docker
                            else cstor.OCI_LAYER, "digest": sha256(tar), "size": len(tar)}
                           for tar in tars], "annotations": {"odd": " sp\u00e4ced "}},
                indent=3).encode()
            image["big-data-names"] = []
            for key in ("manifest", "manifest-" + sha256(manifest)):
                self.store.big_data(image, key, manifest)
            image["big-data-names"].append("sha256:" + config)
            self.store.save()
            digest = self.copy("app:1", self.out + ":x").stdout.decode().split()[0]
            self.assertEqual(kept, digest == sha256(manifest))
            found = read_layout(self.out)["x"][0]
            self.assertEqual(cstor.OCI_CONFIG, found["config"]["mediaType"])
            self.assertEqual(not kept, cstor.ORIGINAL_DIGEST in found["annotations"])
            # With other blobs it is another manifest, that keeps the annotations of an OCI one.
            self.copy("app:1", self.out + ":z", "--compress=gzip")
            found = read_layout(self.out)["z"][0]
            self.assertEqual({cstor.ORIGINAL_DIGEST: sha256(manifest), **(
                {} if docker else {"odd": " sp\u00e4ced "})}, found["annotations"])

    def test_manifest_lists(self) -> None:
        tar = make_tar(("f", b"other machine"))
        arm = self.store.image(self.store.layer(tar), "localhost/app:arm")
        manifests = [{"mediaType": cstor.OCI_MANIFEST, "digest": sha256(data), "size": len(data),
                      "platform": {"os": "linux", **platform}}
                     for data, platform in (
                         (self.manifest(0), {"architecture": "amd64"}),
                         (self.manifest(-1), {"architecture": "arm64", "variant": "v8"}),
                         (b"away", {"architecture": "s390x"}))]
        self.add_list("list:latest", {"schemaVersion": 2, "mediaType": cstor.OCI_INDEX,
                                      "manifests": manifests})
        self.copy("list", self.out + ":arm", "--platform=linux/arm64")
        self.copy("list", self.out + ":v8", "--platform=linux/arm64/v8")
        for platform in ("linux/arm64/v7", "linux/s390x", "linux/arm", "windows/amd64"):
            done = self.copy("list", self.out, "--platform=" + platform, status=3)
            self.assertIn(b"here: linux/amd64, linux/arm64/v8", done.stderr)
        self.copy("list", self.out + ":all", "--all")
        found = read_layout(self.out)
        self.assertEqual({"arm", "v8", "all@amd64", "all@arm64"}, set(found))
        self.assertEqual([tar], found["arm"][2])
        self.assertEqual(found["arm"], found["v8"])
        self.assertEqual(self.chain("app:1"), found["all@amd64"][2])
        self.copy("app:arm", self.out, "--platform=linux/arm64", status=3)
        self.copy("app:arm", self.out + ":same", "--platform=linux/amd64")
        self.assertEqual(arm, read_layout(self.out)["same"][0]["config"]["digest"][7:])
        with mock.patch.object(os, "uname", return_value=mock.Mock(machine="aarch64")), \
                cstor.Storage.open(self.store.root) as storage:
            storage.image("list").copy_to_oci(self.out, "here")
        self.assertEqual([tar], read_layout(self.out)["here"][2])

    def manifest(self, number: int) -> bytes:
        return read_bytes(self.store.path("overlay-images", self.store.images[number]["id"],
                                          "manifest"))

    def pull_list(self, **more: Any) -> tuple[str, list[str], dict[str, Any]]:
        """Store a list's instances as two pulls do; return its digest, their IDs and the list."""
        arm = self.store.layer(make_tar(("etc/", None), ("etc/arch", b"arm64")))
        amd = self.store.layer(make_tar(("etc/", None), ("etc/arch", b"amd64")))
        for layer, names in ((amd, []), (arm, ["quay.io/org/multi:1"])):
            self.store.image(layer, *names)
            self.store.images[-1]["names-history"] = ["quay.io/org/multi:1"]
        records = self.store.images[-2:]
        manifests: list[dict[str, Any]] = [
            {"mediaType": cstor.OCI_MANIFEST, "digest": record["digest"], "size": 7,
             "platform": {"architecture": arch, "os": "linux", "os.features": ["f"], "x.y": 1}}
            for record, arch in zip(records, ("amd64", "arm64"))]
        index = {"schemaVersion": 2, "mediaType": cstor.OCI_INDEX, "manifests": [
            *manifests, {"mediaType": cstor.OCI_MANIFEST, "digest": sha256(b"a"), "size": 1,
                         "artifactType": "text/plain"}], **more}
        data = json.dumps(index).encode()
        for record, arch in zip(records, ("amd64", "arm64")):
            record["digest"] = sha256(data)
            self.store.big_data(record, "manifest-" + sha256(data), data)
            self.retell(record, arch)
        self.store.save()
        return sha256(data), [record["id"] for record in records], index

    def retell(self, record: dict[str, Any], arch: str) -> None:
        """Give an image's configuration an architecture, whatever its digest says."""
        key = record["big-data-names"][0]
        path = self.store.path("overlay-images", record["id"],
                               os.fsdecode(cstor.big_data_file(key)))
        data = read_bytes(path).replace(b"amd64", arch.encode())
        put(path, data)
        record["big-data-digests"][key] = sha256(data)

    def test_a_digest_that_images_share(self) -> None:
        """As after `podman pull --arch amd64` and `--arch arm64`: the second takes the name."""
        digest, (amd, arm), _ = self.pull_list()
        with cstor.Storage.open(self.store.root) as storage:
            for machine, wanted in (("x86_64", amd), ("aarch64", arm)):
                with mock.patch.object(os, "uname", return_value=mock.Mock(machine=machine)):
                    for name in ("quay.io/org/multi@", "quay.io/org/multi:7@", "multi@", ""):
                        self.assertEqual(wanted, storage.image(name + digest).id)
            with mock.patch.object(os, "uname", return_value=mock.Mock(machine="s390x")):
                self.assertRaises(cstor.Ambiguous, storage.image, "quay.io/org/multi@" + digest)
            for platform, wanted in (("linux/amd64", amd), ("linux/arm64", arm),
                                     ("linux/arm64/v8", arm)):
                self.assertEqual(wanted, storage.image("multi@" + digest, platform).id)
            for image in (amd, arm):  # each one's own digest, also of the one without a name
                own = json.loads(storage.image(amd).list_bytes())["manifests"][
                    [amd, arm].index(image)]["digest"]
                self.assertEqual(image, storage.image("quay.io/org/multi@" + own).id)
            self.assertEqual(arm, storage.image("quay.io/org/multi:1").id)
            self.assertRaises(cstor.ImageUnknown, storage.image, "quay.io/org/else@" + digest)
        self.copy("quay.io/org/multi:1", self.out + ":x", "--all")
        self.assertEqual({"x@amd64", "x@arm64"}, set(read_layout(self.out)))
        self.copy("quay.io/org/multi:1", self.out + ":one")
        self.assertIn("one", read_layout(self.out))

    def test_a_malformed_list_loses_what_it_says_with_a_note(self) -> None:
        _, _, index = self.pull_list()
        first = index["manifests"][0]
        wrong: list[dict[str, Any]] = [
            {"annotations": []}, {"annotations": {"a": 1}}, {"schemaVersion": "2"},
            {"artifactType": 5}, {"subject": []}, {"manifests": [{**first, "artifactType": []}]},
            {"manifests": [{**first, "platform": {"os": "linux", "os.features": "x"}}]}]
        for number, more in enumerate(wrong):
            self.add_list(f"l:{number}", {**index, **more}, number)
            done = self.copy(f"l:{number}", self.out, "--all")
            self.assertIn("cstor: note: the stored manifest list is malformed: only its instances "
                          "are copied", done.err.splitlines())

    def test_a_platform_is_of_two_or_three_words(self) -> None:
        self.pull_list()
        self.store.save()
        for wrong in ("arm64", "linux", "linux/", "/arm64", "linux/arm/v7/x"):
            for args in (["layers", "multi:1"], ["stat", "multi:1", "/"], ["inspect", "multi:1"]):
                done = self.run_cstor(*self.ours, "image", *args, "--platform", wrong, status=2)
                self.assertEqual(f"cstor: error: --platform must be os/arch[/variant], not {wrong}"
                                 "\n", done.err)
        for right in ("linux/arm64", "LINUX/aarch64", "linux/arm64/v8"):
            self.run_cstor(*self.ours, "image", "layers", "quay.io/org/multi:1",
                           "--platform", right)
        with self.open(self.store) as storage, self.assertRaises(ValueError):
            storage.image("multi:1", "arm64")

    def test_the_variant_that_podman_takes(self) -> None:
        """What skopeo 1.9 chose from these lists with --override-arch and --override-variant."""
        all_of = ["linux/arm/v6", "linux/arm64/v8", "linux/arm/v7", "linux/amd64/v3"]
        for instances, platform, wanted in (
                (all_of, "linux/arm", "linux/arm/v7"), (all_of, "linux/arm/v7", "linux/arm/v7"),
                (all_of, "linux/arm/v8", "linux/arm/v7"), (all_of, "linux/arm/v6", "linux/arm/v6"),
                (all_of, "linux/arm/v5", None), (all_of, "linux/arm64", "linux/arm64/v8"),
                (["linux/arm/v6", "linux/arm", "linux/arm/v7"], "linux/arm", "linux/arm"),
                (["linux/arm/v6", "linux/arm"], "linux/arm/v5", "linux/arm"),
                (["linux/arm", "linux/arm/v6"], "linux/arm/v7", "linux/arm/v6"),
                (["linux/arm64"], "linux/arm/v8", None), (["linux/arm/v7"], "windows/arm", None)):
            found = cstor.best_platform([(name, name) for name in instances], platform)
            self.assertEqual([wanted] if wanted else [], found, (instances, platform))
        for machine, wanted in (("armv6l", "linux/arm/v6"), ("armv7l", "linux/arm/v7")):
            with mock.patch.object(os, "uname", return_value=mock.Mock(machine=machine)):
                self.assertEqual([wanted], cstor.best_platform([(name, name) for name in all_of],
                                                               ""))

    def test_a_shared_digest_without_the_platform(self) -> None:
        digest, _, _ = self.pull_list()
        done = self.run_cstor(*self.ours, "image", "files", "multi@" + digest,
                              "--platform=linux/s390x", status=3)
        self.assertEqual(f"cstor: error: image multi@{digest} has no instance linux/s390x (here: "
                         "linux/amd64, linux/arm64)\n", done.err)

    def test_what_a_list_says_stays(self) -> None:
        more = {"annotations": {"top": "z"}, "subject": {"mediaType": "a/b", "size": 2, "digest":
                sha256(b"s")}, "artifactType": "c/d", "x-unknown": [1, {"y": None}]}
        digest, (amd, arm), index = self.pull_list(**more)
        index["manifests"][0].update(annotations={"x": "y"}, artifactType="e/f", data="Zm9v",
                                     urls=["https://a"], other={"z": 1.5})
        data = self.add_list("list:latest", {**index, "Manifests": [], "MEDIATYPE": 5,
                                             "Annotations": 7})
        for name, source in (("list", sha256(data)), ("quay.io/org/multi:1", digest)):
            done = self.copy(name, self.out + ":all", "--all", "--format=json")
            told = f"cstor: note: not in the storage, skipped: {sha256(b'a')} (text/plain)"
            self.assertEqual(told, done.err.splitlines()[0])
            found = read_json(f"{self.out}/blobs/sha256/{done.json['digest'][7:]}")
            entries = found.pop("manifests")
            self.assertEqual({**more, "schemaVersion": 2, "mediaType": cstor.OCI_INDEX,
                              "annotations": {"top": "z", cstor.ORIGINAL_DIGEST: source}}, found)
            self.assertEqual([entry["platform"] for entry in index["manifests"][:2]],
                             [entry["platform"] for entry in entries])
            if name == "list":
                self.assertEqual(({"x": "y"}, "e/f", {"z": 1.5}), tuple(
                    entries[0].pop(key) for key in ("annotations", "artifactType", "other")))
            self.assertEqual([{"mediaType", "digest", "size", "platform"}] * 2,
                             list(map(set, entries)))
        shown, = self.run_cstor(*self.ours, "image", "inspect", "list").json
        self.assertEqual(
            [{"platform": "linux/amd64", "digest": index["manifests"][0]["digest"], "id": amd},
             {"platform": "linux/arm64", "digest": index["manifests"][1]["digest"], "id": arm},
             {"platform": "", "digest": sha256(b"a"), "id": None}], shown["instances"])

    def test_a_platform_wherever_an_image_is_named(self) -> None:
        digest, (amd, arm), index = self.pull_list()
        self.add_list("list:latest", index)
        chosen = "--platform=linux/arm64"
        out = self.dir + "/file"

        def ask(*args: str, status: int = 0) -> bytes:
            return self.run_cstor(*self.ours, "image", *args, status=status).stdout

        self.assertEqual(arm, json.loads(ask("inspect", "list", chosen))[0]["id"])
        layer = self.store.images[-2]["layer"]
        for args in (["layers", "list"], ["history", "list"], ["blame", "list", "/etc/arch"]):
            self.assertIn(layer[:12].encode(), ask(*args, chosen))
        for name in ("list", "multi@" + digest):
            for platform in ("linux/amd64", "linux/arm64"):
                self.assertEqual(platform[6:].encode(), ask("cat", name, "etc/arch", "--platform",
                                                            platform))
        for args in (["stat", "list", "etc/arch", "--format=json"],
                     ["files", "list", "--format=json"]):
            self.assertEqual({layer}, {row["layer"] for row in json.loads(ask(*args, chosen))})
        with cstor.Storage.open(self.store.root) as storage:
            self.assertEqual(storage.image(arm).toc(), json.loads(ask("toc", "list", chosen)))
        ask("cp", "list:/etc/arch", out, chosen)
        ask("extract", "list", out + "-tree", chosen)
        for path in (out, out + "-tree/etc/arch"):
            self.assertEqual(b"arm64", read_bytes(path))
        for kind in ("rootfs", "docker-archive"):
            ask("export", "list", "--as", kind, "-o", out + "." + kind, chosen)
        with tarfile.open(out + ".rootfs") as tar:
            self.assertIn(b"arm64", [tar.extractfile(item).read()  # type: ignore[union-attr]
                                     for item in tar if item.isreg()])
        with tarfile.open(out + ".docker-archive") as tar:
            manifest, = json.load(tar.extractfile("manifest.json"))  # type: ignore[arg-type]
        self.assertEqual(["localhost/list:latest"], manifest["RepoTags"])
        self.assertEqual(b"", ask("diff", arm, "list", chosen))
        self.assertEqual(b"", ask("diff", "list", "multi@" + digest, chosen))
        ask("diff", amd, "list", chosen, status=3)
        for platform in ("linux/s390x", "linux/arm/v5"):
            done = self.run_cstor(*self.ours, "image", "files", "list", "--platform", platform,
                                  status=3)
            self.assertIn(f"has no instance {platform} (here: linux/amd64, linux/arm64)".encode(),
                          done.stderr)
        done = self.run_cstor(*self.ours, "image", "cat", "app", "x", chosen, status=3)
        self.assertIn(b"is for linux/amd64, not linux/arm64", done.stderr)

    def test_an_index_that_fits_is_kept(self) -> None:
        with cstor.Storage.open(self.store.root) as storage:
            images = [storage.image(name) for name in ("app:1", "sample")]
            blobs = [{"mediaType": cstor.OCI_MANIFEST, "digest": sha256(b"%d" % i), "size": i}
                     for i in range(2)]
            for listed, kind, kept in ((blobs, cstor.OCI_INDEX, True), (blobs[:1], "", False),
                                       (blobs, cstor.DOCKER_LIST, False)):
                value = {"schemaVersion": 2, "mediaType": kind, "manifests": listed}
                data = json.dumps(value, indent=1).encode()
                with mock.patch.object(cstor.Image, "big_data", return_value=data), \
                        mock.patch.object(cstor.Image, "manifest", return_value=value):
                    self.assertEqual(kept, cstor.oci_index(images[0], blobs) == data)

    def test_damage_leaves_the_layout_as_it_was(self) -> None:
        self.copy("app:1", self.out + ":one")
        before = self.state()
        content = self.store.path("overlay", self.store.images[1]["layer"], "diff/srv/version")
        put(content, "3\n")
        for compress in ("none", "gzip", "zstd"):
            if compress == "zstd":
                need_tools("zstd")
            for target in (self.out, self.out + "-new"):
                done = self.copy("sample", target, f"--compress={compress}", status=4)
                self.assertIn(b"srv/version", done.stderr)
            self.assertEqual(before, self.state())
            self.assertFalse(os.path.lexists(self.out + "-new"))
        put(content, "2\n")
        # A configuration that is of other layers.
        self.store.images[1]["layer"] = self.store.images[0]["layer"]
        self.store.save()
        done = self.copy("sample", self.out, status=4)
        self.assertIn(b"not those that its configuration names", done.stderr)
        self.assertEqual(before, self.state())

    def test_targets_that_are_no_layouts(self) -> None:
        os.mkdir(self.out)
        self.copy("app:1", self.out)  # empty: fine
        for text, wrong in (
                ("[]", "index.json"), ("{", "index.json"), ("{}", "index.json"),
                ('{"schemaVersion":2,"manifests":null}', ""),  # of umoci init
                ('{"manifests":[5]}', ""), ('{"manifests":[],"n":1e999}', "written as JSON"),
                ('{"manifests":[{"x":"\\ud800"}]}', "")):
            put(self.out + "/index.json", text)
            before = self.state()
            done = self.copy("sample", self.out + ":ok", status=6 if wrong else 0)
            self.assertIn(wrong, done.err)
            self.assertEqual(bool(wrong), before == self.state())
            self.assertEqual(not wrong, b"ok" in read_bytes(self.out + "/index.json"))
        os.rename(self.out + "/oci-layout", self.out + "/version")
        for make in (["ln", "-s", "version"], ["mkfifo"], ["mkdir"], ["sh", "-c", "echo 9 >$0"]):
            place = self.out + "/oci-layout"
            subprocess.run([*make, place], check=True)
            self.copy("sample", self.out + ":no", status=6)
            remove(place)
        shutil.rmtree(self.out)
        os.makedirs(self.out + "/blobs")  # of one that was killed in its last steps
        put(self.out + "/.cstor-0123456789ab.partial")
        self.copy("sample", self.out + ":x")
        self.assertEqual({"x"}, set(read_layout(self.out)))
        self.assertEqual({"blobs", "index.json", "oci-layout"}, set(os.listdir(self.out)))
        os.makedirs(self.dir + "/far/away")
        os.symlink("far/away", self.dir + "/link")
        self.copy("sample", "link/../lay:b", cwd=self.dir)
        self.assertEqual({"b"}, set(read_layout(self.dir + "/far/lay")))
        other = self.dir + "/other"
        os.mkdir(other)
        put(other + "/mine")
        with self.unchanged(other):
            for target, options, status, words in (
                    (self.store.path("overlay/lay"), [], 6, "is inside the storage"),
                    (self.out, ["--all", "--platform=linux/amd64"], 2, ""),
                    (other, [], 6, "not an OCI layout, and not empty"),
                    (other + "/mine", [], 6, ""),
                    (other + "/no/where", [], 6, ""),
                    *((other, [f"--compress={how}"], 2, "") for how in (
                        "lz4", "gzip:0", "gzip:10", "zstd:20", "none:1", ""))):
                self.assertIn(words, self.copy("app:1", target, *options, status=status).err)

    def test_writers_that_fail_beside_others(self) -> None:
        bad = make_sample(self.dir + "/bad")
        put(bad.path("overlay", bad.images[0]["layer"], "diff/srv/app.py"), "damaged")
        for _ in range(6 if FULL else 2):
            shutil.rmtree(self.out, ignore_errors=True)
            self.writers(*((self.store, "app:1", f"{i}", 0) if i % 2 == 0 else
                           (bad, "app:1", f"{i}", 4) for i in range(6)))

    def test_several_writers(self) -> None:
        self.writers(*((self.store, name, f"{name.replace(':', '-')}{i}", 0)
                       for i in range(4) for name in ("app:1", "sample")))

    def test_killed_at_any_moment(self) -> None:
        """The layout is as before or complete, and what a killed run left goes with the next."""
        self.copy("app:1", self.out + ":one")
        rng = random.Random(4)
        for number in range(25 if FULL else 9):
            stale = {name for name in snapshot(self.out) if name.endswith(b".partial")}
            signum = signal.SIGKILL if number % 3 else signal.SIGTERM
            with subprocess.Popen([*COMMAND, *self.ours, "image", "copy-to-oci",
                                   "sample", f"{self.out}:n{number}", "--compress=gzip"], env=IDLE,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                time.sleep(0.08 + rng.random() * 0.35)
                process.send_signal(signum)
                process.wait(timeout=30)
            found = read_layout(self.out)
            self.assertTrue(f"n{number}" in found or process.returncode != 0)
            if signum == signal.SIGTERM:
                self.assertLessEqual({name for name in snapshot(self.out)
                                      if name.endswith(b".partial")}, stale)
        self.copy("sample", self.out + ":last")
        self.assertEqual([], [name for name in snapshot(self.out) if name.endswith(b".partial")])
        self.assertIn("last", read_layout(self.out))

    def test_a_signal_behind_the_last_step(self) -> None:
        """What the index names is never removed again."""
        real = cstor.OciLayout.put

        def put(layout: cstor.OciLayout, folder: bytes, name: bytes, data: bytes) -> None:
            real(layout, folder, name, data)
            if name == b"index.json":
                raise KeyboardInterrupt

        for tag in ("new", "more"):
            with cstor.Storage.open(self.store.root) as storage, \
                    mock.patch.object(cstor.OciLayout, "put", put), \
                    self.assertRaises(KeyboardInterrupt):
                storage.image("sample").copy_to_oci(self.out, tag)
            self.assertIn(tag, read_layout(self.out))
        self.assertEqual(0o755 & ~UMASK, stat.S_IMODE(os.stat(self.out).st_mode))

    def test_gzip_is_the_same_by_any_number_of_threads(self) -> None:
        rng = random.Random(2)
        data = b"".join(rng.choice((b"words and words ", rng.getrandbits(800).to_bytes(100, "big")))
                        for _ in range(40_000))
        for size in (0, 1, cstor.GzipWriter.BLOCK_SIZE - 1, cstor.GzipWriter.BLOCK_SIZE,
                     cstor.GzipWriter.BLOCK_SIZE + 1, len(data)):
            found = set()
            for threads in (1, 2, 7):
                for step in (1000, 1 << 20):
                    parts: list[bytes] = []
                    with mock.patch.object(os, "cpu_count", return_value=threads):
                        writer = cstor.GzipWriter(parts.append, 6)
                    for at in range(0, size, step):
                        writer.write(memoryview(data)[at:min(at + step, size)])
                    writer.finish()
                    found.add(b"".join(parts))
            self.assertEqual(1, len(found))
            packed = found.pop()
            self.assertEqual(data[:size], gzip.decompress(packed))
            done = subprocess.run(["gzip", "-dc"], input=packed, stdout=subprocess.PIPE, check=True)
            self.assertEqual(data[:size], done.stdout)
        self.assertLess(len(packed), 1.02 * len(gzip.compress(data, 6)))

    def test_images_that_nobody_built_in_good_faith(self) -> None:
        record = self.store.images[0]
        with cstor.Storage.open(self.store.root) as storage:
            image = storage.image("app:1")
            config, manifest = image.config(), image.manifest()

        def rewrite(config: Any, manifest: Any, **layer: Any) -> None:
            data = json.dumps(config).encode()
            record.update({"big-data-names": [], "big-data-sizes": {}, "big-data-digests": {}})
            self.store.big_data(record, sha256(data), data)
            self.store.big_data(record, "manifest", json.dumps({
                **manifest, "config": {**manifest.get("config", {}), "digest": sha256(data),
                                       "size": len(data)}}).encode())
            self.store.save()

        platforms: list[dict[str, Any]] = [{"architecture": 5}, {"os": True}, {"os.features": "x"},
                                           {"variant": ["8"]}, {"architecture": ""}]
        for change in platforms:
            rewrite({**config, **change}, manifest)
            self.copy("app:1", self.out + ":x")
            read_layout(self.out)
            entry = read_json(self.out + "/index.json")["manifests"][-1]
            if {"architecture", "os"} & set(change):
                self.assertNotIn("platform", entry)
            else:
                self.assertEqual({"architecture": "amd64", "os": "linux"}, entry["platform"])
        wrongs: list[dict[str, Any]] = [
            {"config": {"mediaType": 5}}, {"layers": [5]}, {"annotations": [1]},
            {"annotations": {"a": 5}}, {"mediaType": 7}]
        for wrong in wrongs:
            rewrite(config, {**manifest, **wrong})
            self.copy("app:1", self.out + ":x")
            found = read_layout(self.out)["x"][0]
            self.assertEqual({cstor.ORIGINAL_DIGEST}, set(found["annotations"]))
            self.assertEqual(2, found["schemaVersion"])
        tars = [self.store.tars[layer] for layer in list(self.store.tars)[:2]]
        layers: list[Any] = [{"mediaType": cstor.OCI_LAYER, "digest": sha256(tar),
                              "size": len(tar)} for tar in tars]
        fits: dict[str, Any] = {"schemaVersion": 2, "config": {"mediaType": cstor.OCI_CONFIG},
                                "layers": layers}
        changes: list[tuple[dict[str, Any], bool]] = [
            ({}, True), ({"schemaVersion": 2.0}, False), ({"manifests": []}, False),
            ({"annotations": {"a": 5}}, False), ({"x": float("nan")}, False),
            ({"layers": [*layers, 5]}, False)]
        for change, kept in changes:
            rewrite(config, {**fits, **change})
            self.copy("app:1", self.out + ":x")
            self.assertEqual(kept, cstor.ORIGINAL_DIGEST not in read_layout(
                self.out)["x"][0].get("annotations", {}), change)
        secret = self.dir + "/secret"
        put(secret, "0123456789")
        digest = "sha256:../../../secret"
        self.store.layers[1].update({"diff-digest": digest, "diff-size": 10})
        rewrite({**config, "rootfs": {"type": "layers", "diff_ids": [sha256(tars[0]), digest]}},
                manifest)
        for command in (["copy-to-oci", "app:1", self.out], ["export", "app:1",
                                                             "--as=docker-archive"]):
            done = self.run_cstor(*self.ours, "image", *command, status=4)
            self.assertNotIn(b"secret.tar", done.stdout)

    def test_without_zstd(self) -> None:
        done = self.copy("app:1", self.out, "--compress=zstd", status=6 if sys.version_info < (
            3, 14) else 0, env={"PATH": "/nonexistent"})
        if sys.version_info < (3, 14):
            self.assertIn(b"zstd needs Python 3.14 or the program zstd", done.stderr)
            self.assertFalse(os.path.lexists(self.out))

    def test_zstd_that_fails(self) -> None:
        need(sys.version_info < (3, 14), "Python has zstd itself")
        program = self.dir + "/bin/zstd"
        os.mkdir(os.path.dirname(program))
        for script, status in (("exit 3", 3), ("exit 0", 0), ("head -c 10; exit 4", 4),
                               ("cat >/dev/null; exit 1", 1)):
            put(program, f"#!/bin/sh\n{script}\n")
            os.chmod(program, 0o755)
            done = self.copy("sample", self.out, "--compress=zstd", status=6,
                             env={"PATH": os.path.dirname(program) + ":/usr/bin:/bin"})
            self.assertIn(f"zstd failed with status {status}".encode(), done.stderr)
            self.assertFalse(os.path.lexists(self.out))
        with open(program, "w", encoding="ascii") as file:
            file.write("#!/bin/sh\nexec sleep 1000\n")  # takes nothing and never ends
        with subprocess.Popen([*COMMAND, *self.ours, "image", "copy-to-oci", "sample",
                               self.out, "--compress=zstd"], start_new_session=True,
                              env={**IDLE, "PATH": os.path.dirname(program) + ":/usr/bin:/bin"},
                              stderr=subprocess.DEVNULL) as process:
            time.sleep(1)
            process.terminate()
            self.assertEqual(143, process.wait(timeout=20))
        self.assertRaises(ProcessLookupError, os.killpg, process.pid, 0)
        self.assertFalse(os.path.lexists(self.out))


class Archives(TreeTest):
    """docker-archive, oci-archive and root file systems as tars."""

    def setUp(self) -> None:
        super().setUp()
        self.store = self.sample()
        self.ours = ["--root", self.store.root, "image", "export"]

    def export_images(self, *args: str, status: int = 0, **env: str) -> bytes:
        return bytes(self.run_cstor(*self.ours, *args, status=status, env=env).stdout)

    def test_docker_archive(self) -> None:
        self.guard(self.store.root)
        data = self.export_images("app:1", "sample", "--as=docker-archive")
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            contents = {name: file.read() for name, file in files.items() if file}
            self.assertEqual({(0, 0, 0, 0o644)}, {(m.mtime, m.uid, m.gid, m.mode) for m in tar})
            self.assertEqual(len(set(tar.getnames())), len(tar.getnames()))
        manifest = json.loads(contents.pop("manifest.json"))
        self.assertEqual([["localhost/app:1"], ["docker.io/library/sample:latest"]],
                         [row["RepoTags"] for row in manifest])
        with cstor.Storage.open(self.store.root) as storage:
            for row, name in zip(manifest, ("app:1", "sample")):
                image = storage.image(name)
                self.assertEqual((image.id + ".json", image.config_bytes()),
                                 (row["Config"], contents[row["Config"]]))
                self.assertEqual([self.store.tars[layer.id] for layer in image.layers()],
                                 [contents[layer] for layer in row["Layers"]])
        self.assertEqual({row["Config"] for row in manifest} | {
            layer for row in manifest for layer in row["Layers"]}, set(contents))

    def test_names_that_go_along(self) -> None:
        image = self.store.images[0]["id"]
        for reference, expected in (
                (image, ["localhost/app:1", "localhost/app:latest"]),
                ("app", ["localhost/app:latest"]),
                ("localhost/app:1", ["localhost/app:1"]), (image[:9], 2),
                ("localhost/odd", None)):
            if expected is None:  # neither of these is a name that a tag has
                self.store.images[0]["names"] = ["localhost/odd:1@" + sha256(b""), "Up/Case:1",
                                                 "localhost/odd:latest@" + sha256(b"")]
                self.store.save()
                reference = image
            data = self.export_images(reference, "--as=docker-archive")
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                file = tar.extractfile("manifest.json")
                assert file
                names = json.load(file)[0]["RepoTags"]
            self.assertEqual(expected, len(names) if expected == 2 else names)

    def test_oci_archive(self) -> None:
        data = self.export_images("app:1", "sample", "--as=oci-archive")
        top = self.dir + "/layout"
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                tar.extract(member, top)
        found = read_layout(top)
        self.assertEqual({"localhost/app:1", "docker.io/library/sample:latest"}, set(found))
        self.assertEqual(list(self.store.tars.values()),
                         found["docker.io/library/sample:latest"][2])
        data = self.export_images(self.store.images[0]["id"], "--as=oci-archive")
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            file = tar.extractfile("index.json")
            assert file
            # Two entries would be two images to podman load.
            self.assertEqual(["localhost/app:1"], [
                entry["annotations"][cstor.REF_NAME] for entry in json.load(file)["manifests"]])

    def test_the_same_bytes_each_time(self) -> None:
        for kind in ("rootfs", "docker-archive", "oci-archive"):
            first = self.export_images("sample", "--as=" + kind)
            target = self.dir + "/out.tar"
            self.export_images("sample", "--as=" + kind, "-o", target)
            self.assertEqual(first, read_bytes(target))
            dated = self.export_images("sample", "--as=" + kind, SOURCE_DATE_EPOCH="1234567890")
            self.assertNotEqual(first, dated)
            with tarfile.open(fileobj=io.BytesIO(dated)) as tar:
                times = {member.name: member.mtime for member in tar}
            self.assertEqual(1234567890, times["." if kind == "rootfs" else list(times)[0]])
            for wrong in ("x", "-1", "1.5"):
                self.export_images("sample", "--as=" + kind, status=6, SOURCE_DATE_EPOCH=wrong)

    def test_the_same_bytes_by_another_python(self) -> None:
        other = "/usr/bin/python3"
        need(os.path.exists(other), "there is no /usr/bin/python3")
        for kind in ("rootfs", "docker-archive", "oci-archive"):
            done = self.run_cstor(*self.ours, "sample", "--as=" + kind,
                                  command=[other, "-c", LAUNCH])
            self.assertEqual(sha256(self.export_images("sample", "--as=" + kind)),
                             sha256(done.stdout))

    def test_sizes_and_digests_that_no_record_has(self) -> None:
        with_records = self.export_images("sample", "--as=docker-archive")
        for record in self.store.layers[:2]:
            record["diff-size"] = -1
        self.store.save()
        self.assertEqual(with_records, self.export_images("sample", "--as=docker-archive"))
        del self.store.layers[0]["diff-digest"]
        self.store.layers[0]["toc-digest"] = sha256(b"toc")
        self.store.save()
        self.assertEqual(with_records, self.export_images("sample", "--as=docker-archive"))

    def test_stdout_by_its_name(self) -> None:
        need_proc()
        expected = self.export_images("sample")
        self.assertEqual(expected, self.export_images("sample", "-o", "/dev/stdout"))

    def test_damage_is_no_archive(self) -> None:
        top = self.store.images[1]["layer"]
        put(self.store.path("overlay", top, "diff/srv/version"), "3\n")
        target = self.dir + "/out.tar"
        for kind in ("rootfs", "docker-archive", "oci-archive"):
            self.export_images("sample", "--as=" + kind, "-o", target, status=4)
            self.assertFalse(os.path.lexists(target))
            self.export_images("sample", "--as=" + kind, status=4)
        self.export_images("app", "sample", status=2)

    def test_a_root_file_system_is_what_is_extracted(self) -> None:
        need(os.geteuid() == 0, "needs root, to keep owners")
        need_tools("tar")
        with self.opened(Extracts.BASE + pax({b"SCHILY.xattr.user.x": b"1"}) + entry(
                b"etc/attr", b"2"), Extracts.TOP) as storage:
            ours = ["--root", storage.graphroot, "image"]
            one, other = (os.path.join(self.dir, name) for name in ("one", "other"))
            self.run_cstor(*ours, "extract", "t", one)
            data = self.run_cstor(*ours, "export", "t").stdout
            os.mkdir(other)
            subprocess.run(["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-",
                            "-C", other], input=data, check=True)
            with storage.image("t").tree() as tree:
                self.assertEqual([], tree_differences(one, tree))
                self.assertEqual([], tree_differences(other, tree))

    def test_containers(self) -> None:
        rw = self.store.containers[0]["layer"]
        self.store.write(f"overlay/{rw}/diff/etc/new", "made in the container")
        ours = ["--root", self.store.root, "container", "export", "web"]
        data = self.run_cstor(*ours).stdout
        self.assertEqual(data, self.run_cstor(*ours).stdout)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            file = tar.extractfile("etc/new")
            assert file
            self.assertEqual(b"made in the container", file.read())
            with cstor.Storage.open(self.store.root) as storage, \
                    storage.container("web").tree() as tree:
                self.assertEqual([os.fsdecode(path) or "." for path, _, _ in tree.walk()],
                                 [info.name for info in tar])


class Fetching(StoreTest):
    """Images that skopeo fetches: a fake one, which does its work well or not."""

    def setUp(self) -> None:
        super().setUp()
        self.store = self.sample()
        self.layout = self.dir + "/layout"
        self.out = self.dir + "/out"
        with cstor.Storage.open(self.store.root) as storage:
            image = storage.image("sample")
            for tag in ("none", "gzip", *["zstd"] * bool(shutil.which("zstd"))):
                image.copy_to_oci(self.layout, tag, compression=tag)
        os.mkdir(self.dir + "/tmp")
        path = self.write("skopeo", f"#!{sys.executable}\n{FAKE_SKOPEO}")
        os.chmod(path, 0o755)
        self.env = {"PATH": f"{self.dir}:{os.environ['PATH']}", "FAKE_LAYOUT": self.layout,
                    "TMPDIR": self.dir + "/tmp"}
        patched = mock.patch.dict(os.environ, self.env)
        patched.start()
        self.addCleanup(patched.stop)
        scratch = mock.patch("tempfile.tempdir", self.env["TMPDIR"])
        scratch.start()
        self.addCleanup(scratch.stop)

    def _check(self) -> None:
        super()._check()
        self.assertEqual([], os.listdir(self.dir + "/tmp"))
        with self.assertRaises(ChildProcessError):  # neither running nor a zombie
            os.waitpid(-1, os.WNOHANG)

    def write(self, name: str, text: str) -> str:
        path = os.path.join(self.dir, name)
        put(path, text)
        return path

    def said(self) -> tuple[int, list[str]]:
        with open(self.layout + "/words", encoding="utf-8") as file:
            process, words = json.load(file)
        os.unlink(self.layout + "/words")
        return process, words

    def same_as_sample(self, directory: str) -> None:
        with cstor.Storage.open(self.store.root) as storage, storage.image("sample").tree() as tree:
            self.assertEqual([], [row for row in tree_differences(directory, tree) if not (
                os.geteuid() and (row[1] == "owner" or not row[0]))])  # what root alone can set

    def test_copies(self) -> None:
        before = read_layout(self.layout)
        for tag in before:
            seen: list[int] = []
            with cstor.FetchedImage(f"fake:{tag}") as image:
                blob = image.copy_to_oci(self.out, tag, progress=functools.partial(self.note, seen))
                image.extract(os.path.join(self.dir, tag))
            self.assertEqual(sorted(seen), seen)
            self.assertEqual({"os": "linux", "architecture": "amd64"}, blob["platform"])
            self.same_as_sample(os.path.join(self.dir, tag))
        self.said()
        self.assertEqual(before, read_layout(self.out))

    @staticmethod
    def note(seen: list[int], size: int, _: int) -> None:
        seen.append(size)

    def test_what_the_manifest_says_wrongly(self) -> None:
        """Types are made true, and the manifest tells which it was."""
        manifest, config, tars = read_layout(self.layout)["none"]
        for layer in manifest["layers"]:
            layer["mediaType"] += "+gzip"
        data = json.dumps({**manifest, "annotations": {"a": "b"}}).encode()
        with cstor.OciLayout(self.layout) as layout:
            layout.tag(cstor.descriptor(cstor.OCI_MANIFEST, *layout.add(data)), "none")
        with cstor.FetchedImage("fake:none") as image:
            image.copy_to_oci(self.out, "none")
        found = read_layout(self.out)["none"]
        self.assertEqual((config, tars), found[1:])
        self.assertEqual({cstor.OCI_LAYER}, {entry["mediaType"] for entry in found[0]["layers"]})
        self.assertEqual({"a": "b", cstor.ORIGINAL_DIGEST: sha256(data)}, found[0]["annotations"])

    def test_failures_leave_nothing(self) -> None:
        for fault, kind, message in (
                ("corrupt", cstor.IntegrityError, "wrong digest"),
                ("corrupt=config", cstor.IntegrityError, "wrong digest"),
                ("corrupt=manifest", cstor.IntegrityError, "wrong digest"),
                ("cut", cstor.IntegrityError, "wrong size"),
                ("grow", cstor.IntegrityError, "wrong size"),
                ("lose", cstor.NotFound, "skopeo wrote no blob"),
                ("fifo", cstor.FormatError, "not a regular file|no regular file"),
                ("lose=config", cstor.NotFound, "skopeo wrote no blob"),
                ("index=[]", cstor.FormatError, "index: expected a JSON object"),
                ('index={"manifests":[]}', cstor.FormatError, "expected one manifest"),
                ('index={"manifests":[{"size":1}]}', cstor.FormatError, "malformed descriptor"),
                ('index={"manifests":[{"digest":"sha512:0","size":1}]}', cstor.Unsupported,
                 "not a sha256"),
                ("refuse=lookup: no such file or directory", cstor.NotFound,
                 "fake:gzip:.*: lookup: no such file"),
                ("die", cstor.CstorError, "skopeo was killed by signal 9"),
                ("status=7", cstor.CstorError, "skopeo ended with status 7")):
            for method in ("extract", "copy_to_oci"):
                with self.subTest(fault=fault, method=method), \
                        self.assertRaisesRegex(kind, message):
                    with cstor.FetchedImage(f"fake:gzip:{fault}") as image:
                        getattr(image, method)(self.out)
                self.assertFalse(os.path.exists(self.out))

    def test_hanging(self) -> None:
        for fault in ("hang", "deaf"):
            with self.subTest(fault=fault), self.assertRaisesRegex(
                    cstor.ProtocolError, "has written nothing for 0.3 seconds"):
                cstor.FetchedImage(f"fake:none:{fault}", timeout=0.3)
            self.assertFalse(os.path.exists(f"/proc/{self.said()[0]}"))

    def test_a_colon_in_tmpdir(self) -> None:
        with mock.patch("tempfile.tempdir", self.dir + "/tm:p"):
            os.mkdir(self.dir + "/tm:p")
            with self.assertRaisesRegex(cstor.CstorError, "cannot use a directory with a colon"):
                cstor.FetchedImage("fake:none")
            self.assertEqual([], os.listdir(self.dir + "/tm:p"))

    def test_wrong_layers(self) -> None:
        """The blobs are as the manifest says, but not as the configuration does."""
        manifest, config, _ = read_layout(self.layout)["gzip"]
        diff_ids = config["rootfs"]["diff_ids"]
        for changed, kind, message in (
                (diff_ids[::-1], cstor.IntegrityError, "wrong digest"),
                (diff_ids[:1], cstor.IntegrityError, "its layers are not those"),
                (["sha256:0"], cstor.FormatError, "it names no layers")):
            config["rootfs"]["diff_ids"] = changed
            with cstor.OciLayout(self.layout) as layout:
                digest, size = layout.add(json.dumps(config).encode())
                manifest["config"].update(digest=digest, size=size)
                layout.tag(cstor.descriptor(cstor.OCI_MANIFEST, *layout.add(
                    json.dumps(manifest).encode())), "gzip")
            with cstor.FetchedImage("fake:gzip") as image, self.assertRaisesRegex(kind, message):
                image.extract(self.out)
            self.assertFalse(os.path.exists(self.out))
            self.said()

    def test_platform(self) -> None:
        with cstor.FetchedImage("fake:none", platform="linux/amd64"):
            self.assertEqual(["--override-os", "linux", "--override-arch", "amd64"],
                             self.said()[1][:4])
        with self.assertRaisesRegex(cstor.NotFound, "is for linux/amd64, not linux/arm64/v8"):
            cstor.FetchedImage("fake:none", platform="linux/arm64/v8")
        cstor.FetchedImage("fake:none:list", platform="linux/arm64").close()  # chosen from a list

    # -- command line ----------------------------------------------------------------------------

    def run_via(self, *args: str, status: int = 0, env: Mapping[str, str] | None = None,
                **kwargs: Any) -> Done:
        return self.run_cstor("image", *args, status=status, env={**self.env, **(env or {})},
                              **kwargs)

    def test_commands(self) -> None:
        done = self.run_via("extract", "--via-skopeo", "fake:gzip", self.out, "--format=json")
        self.assertEqual(self.out, done.json["directory"])
        self.same_as_sample(self.out)
        some = self.dir + "/some"
        self.run_via("extract", "--via-skopeo=fake:none", some, "--path=etc", "--verify")
        self.assertEqual(["etc"], os.listdir(some))
        copy = self.dir + "/copy"
        done = self.run_via("copy-to-oci", "--via-skopeo", "fake:gzip", f"{copy}:t")
        self.assertRegex(done.out, r"\Asha256:[0-9a-f]{64} t\n\Z")
        self.run_via("copy-to-oci", "--via-skopeo=fake:none", copy + ":none",
                     "--platform=linux/amd64")
        self.assertEqual({"t", "none"}, set(read_layout(copy)))

    def test_wrong_use(self) -> None:
        for args, message in (
                (["extract", "--via-skopeo", "fake:none", "sample", self.out],
                 "--via-skopeo replaces IMAGE"),
                (["extract", self.out], "arguments are required: DIR"),
                (["extract", "--via-skopeo", "fake:none"], "arguments are required: DIR"),
                (["extract", "--via-skopeo", "fake:none", self.out, "--link-mode=reflink"],
                 "--link-mode reflink cannot be used with --via-skopeo"),
                (["extract", "--via-skopeo", "containers-storage:x", self.out],
                 "without --via-skopeo"),
                (["copy-to-oci", "--via-skopeo", "fake:none", self.out, "--compress=none"],
                 "--compress cannot be used with --via-skopeo: blobs are copied unchanged"),
                (["copy-to-oci", "--via-skopeo", "fake:none", self.out, "--all"],
                 "--all cannot be used with --via-skopeo; choose one image with --platform"),
                (["copy-to-oci", "--via-skopeo", "fake:none", self.out + ":-"], "malformed tag"),
                (["list", "--via-skopeo", "fake:none"], "unrecognized arguments")):
            with self.subTest(args=args):
                done = self.run_via(*args, status=2)
                self.assertIn(message, done.err)
                self.assertFalse(os.path.exists(self.out))
                self.assertFalse(os.path.exists(self.layout + "/words"))

    def test_failing_commands(self) -> None:
        for fault, status, message in (
                ("die", 6, "skopeo was killed by signal 9"), ("corrupt", 4, "wrong digest"),
                ("refuse=open x: no such file or directory", 3, "open x: no such file"),
                ('refuse=Invalid source name \\"x\\"', 6, "expected oci:DIR:TAG"),
                ("refuse=no policy.json file found", 6, "containers-policy.json(5)")):
            for command in ("extract", "copy-to-oci"):
                with self.subTest(fault=fault, command=command):
                    done = self.run_via(command, "--via-skopeo", f"fake:gzip:{fault}",
                                        self.out + ":t" * (command != "extract"), status=status)
                    self.assertIn(message, done.err)
                    self.assertFalse(os.path.exists(self.out))
        done = self.run_via("extract", "--via-skopeo", "fake:gzip", self.out, status=6,
                            env={"PATH": "/nonexistent"})
        self.assertIn("skopeo cannot be run", done.err)

    def test_with_and_without_a_storage(self) -> None:
        """None is needed, and one that is there is not written to."""
        inside = self.store.path("overlay/new")
        self.guard(self.store.root)
        for command in ("extract", "copy-to-oci"):
            config = self.write("storage.conf", f'[storage]\ndriver="overlay"\ngraphroot='
                                f'"{self.store.root}"\nrunroot="{self.dir}/run"\n')
            for words, env in ((["--root", self.store.root], {}),
                               ([], {"CONTAINERS_STORAGE_CONF": config})):
                done = self.run_via(command, "--via-skopeo", "fake:none", inside, *words,
                                    status=6, env=env)
                self.assertIn("is inside the storage", done.err)
                self.assertFalse(os.path.exists(self.layout + "/words"))
            self.run_via(command, "--via-skopeo", "fake:none", self.out, "--root=/dev/null/x",
                         status=3)
            self.write("storage.conf", '[storage]\ndriver="btrfs"\n')
            self.run_via(command, "--via-skopeo", "fake:none", os.path.join(self.dir, command),
                         env={"CONTAINERS_STORAGE_CONF": config})
            self.said()

    def test_a_signal(self) -> None:
        """Both end, and nothing is left."""
        for command in ("extract", "copy-to-oci"):
            with subprocess.Popen([*COMMAND, "image", command, "--via-skopeo", "fake:none:hang",
                                   self.out], stderr=subprocess.PIPE,
                                  env={**IDLE, **self.env}) as ours:
                for _ in range(1000):
                    if os.path.exists(self.layout + "/words"):
                        break
                    time.sleep(0.01)
                time.sleep(0.3)
                ours.terminate()
                self.assertEqual(128 + 15, ours.wait(30))
            self.assertFalse(os.path.exists(self.out))
            self.assertFalse(os.path.exists(f"/proc/{self.said()[0]}"))

    def test_tags_of_references(self) -> None:
        for reference, tag in (
                ("oci:/x/y:t", "t"), ("oci:/x/y", ""), ("docker://a.b:5000/c", "latest"),
                ("docker://a/b:c", "c"), ("docker://a/b@sha256:0", ""), ("dir:/x:y/z", ""),
                ("docker-archive:/x.tar", ""), ("docker-archive:x.tar:a/b:c", "c")):
            self.assertEqual(tag, cstor.reference_tag(reference), reference)


# ================================================================================================
# 19. Streams
# ================================================================================================

CODECS = ("splitfdstream", "splitdirfdstream")


def inline(data: bytes) -> bytes:
    """Return a splitfdstream's chunk of bytes, as WIRE.md 1 has it."""
    return struct.pack("<q", -len(data)) + data


def in_file(number: int) -> bytes:
    """Return a splitfdstream's chunk for an external file."""
    return struct.pack("<q", number)


def typed(kind: int, data: bytes) -> bytes:
    """Return a splitdirfdstream's chunk of bytes, as WIRE.md 2 has it."""
    return struct.pack("<BI", kind, len(data)) + data


def in_directory(size: int, index: int, name: bytes) -> bytes:
    """Return a splitdirfdstream's chunk for an external file."""
    return struct.pack("<BQII", 2, size, index, len(name)) + name


@contextlib.contextmanager
def streamed(layer: cstor.Layer, codec: str = CODECS[0], threshold: int = 0, *,
             external: bool = True, **options: Any) -> Iterator[cstor.LayerStream]:
    """Give a layer as a stream with larger files passed."""
    if external:
        need_proc()
    out = io.BytesIO()
    with tempfile.NamedTemporaryFile() as rows:
        listing: Any = rows if external else None
        cstor.write_stream(layer, out, listing, codec=codec, threshold=threshold)
        rows.flush()
        out.seek(0)
        with cstor.ExternalFiles(rows.name if external else "") as files:
            chunks = cstor.SplitfdstreamReader(out.read, files.open) if codec == CODECS[0] \
                else cstor.SplitdirfdstreamReader(out.read, files.directories)
            with cstor.LayerStream(chunks, **{"label": layer.id, "digest": layer.diff_digest,
                                              "size": layer.diff_size, **options}) as stream:
                yield stream


class Streams(StoreTest):
    """Streams written by hand, and broken in every way."""

    A, B = b"a" * 700, b"b" * 9

    def setUp(self) -> None:
        super().setUp()
        self.tar = (directory(b"d") + entry(b"d/a", self.A) + entry(b"d/empty")
                    + entry(b"d/b", self.B) + END)
        at = self.tar.index(self.A)
        to = self.tar.index(self.B, at)
        self.parts = (self.tar[:at], self.tar[at + 700:to], self.tar[to + 9:])
        head, middle, end = self.parts
        self.fds = [self.file("a", self.A), self.file("b", self.B),
                    os.open(self.dir, os.O_PATH | os.O_DIRECTORY)]
        self.addCleanup(os.close, self.fds[2])
        self.streams = {
            CODECS[0]: inline(head) + in_file(0) + inline(middle) + inline(self.B) + inline(end),
            CODECS[1]: typed(0, head) + in_directory(700, 2, b"a") + typed(0, middle)
            + typed(1, self.B) + typed(0, end)}

    def file(self, name: str, data: bytes, flags: int = os.O_RDONLY) -> int:
        path = os.path.join(self.dir, name)
        put(path, data)
        fd = os.open(path, flags)
        self.addCleanup(os.close, fd)
        return fd

    def reader(self, data: bytes, codec: str = CODECS[0], fds: list[int] | None = None) -> Any:
        fds = self.fds if fds is None else fds
        read = io.BytesIO(data).read
        return cstor.SplitfdstreamReader(read, fds.__getitem__) if codec == CODECS[0] \
            else cstor.SplitdirfdstreamReader(read, fds)

    def tar_of(self, data: bytes, codec: str = CODECS[0], fds: list[int] | None = None,
               **options: Any) -> bytes:
        out = io.BytesIO()
        with cstor.LayerStream(self.reader(data, codec, fds), label="test", **options) as stream:
            digest = stream.export(out)
        self.assertEqual(sha256(out.getvalue()), digest)
        return out.getvalue()

    def refused(self, error: type[BaseException], words: str, data: bytes, codec: str = CODECS[0],
                **options: Any) -> Any:
        with self.assertRaisesRegex(error, words) as caught:
            self.tar_of(data, codec, **options)
        return caught.exception

    def test_streams_by_hand(self) -> None:
        for codec, data in self.streams.items():
            self.assertEqual(self.tar, self.tar_of(data, codec))
            self.assertEqual(self.tar, self.tar_of(data, codec, digest=sha256(self.tar),
                                                   size=len(self.tar)))
        head, middle, end = self.parts
        for parts in ([inline(bytes([byte])) for byte in head], [inline(head)]):
            self.assertEqual(self.tar, self.tar_of(b"".join(parts) + in_file(0) + inline(
                middle + self.B[:4]) + inline(self.B[4:] + end)))
        self.assertEqual(self.tar, self.tar_of(
            typed(0, b"") + typed(0, head) + typed(1, b"") + typed(1, self.A) + typed(0, b"")
            + typed(0, middle) + in_directory(9, 2, b"./b") + typed(1, b"") + typed(0, end),
            CODECS[1]))
        # One file for two members, whatever the offset of its descriptor.
        two = entry(b"x", self.A) + entry(b"y", self.A)
        os.lseek(self.fds[0], 5, os.SEEK_SET)
        self.assertEqual(two + END, self.tar_of(
            inline(two[:512]) + in_file(0) + inline(two[1212:2048]) + in_file(0)
            + inline(two[2748:] + END)))

    def test_vectors(self) -> None:
        self.assertEqual([b"hello"], list(self.reader(bytes.fromhex("000500000068656c6c6f"),
                                                      CODECS[1])))
        self.assertEqual([b""], list(self.reader(bytes.fromhex("0100000000"), CODECS[1])))
        self.file("ab", b"123456789")
        for chunk in self.reader(bytes.fromhex("02 0900000000000000 02000000 02000000 6162"),
                                 CODECS[1]):
            self.assertEqual((9, b"123456789"), (chunk.length, os.pread(chunk.fd, 99, 0)))
        out: list[bytes] = []
        writer = cstor.SplitdirfdstreamWriter(out.append, lambda extent: (2, b"ab"))
        member = cstor.Member.parse(entry(b"ab", b"123456789")[:512])
        writer.add(b"hello")
        writer.add(cstor.Extent(self.file("ab", b"123456789"), 0, 9, member))
        writer.add(b"")
        self.assertEqual("000500000068656c6c6f02090000000000000002000000020000006162",
                         b"".join(out).hex())

    def test_pairs_of_header_and_content(self) -> None:
        """What containers/storage's Go code sends has neither padding nor an end."""
        pieces = [directory(b"d"), pax({b"mtime": b"1.5"}) + entry(b"d/a", self.A)[:512],
                  entry(b"d/empty"), entry(b"d/b", self.B)[:512]]
        data = (inline(pieces[0]) + inline(pieces[1]) + in_file(0) + inline(pieces[2])
                + inline(pieces[3]) + inline(self.B))
        tar = pieces[0] + pieces[1] + self.A + bytes(324) + pieces[2] + pieces[3] + self.B \
            + bytes(503) + END
        self.assertEqual(tar, self.tar_of(data, pairs=True))
        self.refused(cstor.FormatError, "cut off|checksum", data)
        ends = [len(data)]
        for piece in (inline(self.B), inline(pieces[3]), inline(pieces[2]), in_file(0),
                      inline(pieces[1]), inline(pieces[0])):
            ends.append(ends[-1] - len(piece))
        for cut in set(range(len(data))) - {ends[i] for i in (0, 2, 3, 5, 6)}:
            self.refused(cstor.FormatError, "", data[:cut], pairs=True)

    def test_every_cut_is_an_error(self) -> None:
        for codec, data in self.streams.items():
            for cut in sample(range(len(data))):
                for digest in ("", sha256(self.tar)):
                    self.refused(cstor.CstorError, "", data[:cut], codec, digest=digest)
        # A tar that never had an end is whole only by its digest, or its size.
        bare = entry(b"a", b"x")
        self.refused(cstor.FormatError, "no end", inline(bare))
        self.refused(cstor.FormatError, "no end", inline(bare + bytes(512)))
        self.refused(cstor.FormatError, "no end", b"")
        for known in ({"digest": sha256(bare)}, {"size": len(bare)}):
            self.assertEqual(bare, self.tar_of(inline(bare), **known))
        self.assertEqual(b"", self.tar_of(b"", digest=sha256(b"")))
        self.refused(cstor.IntegrityError, "wrong digest", inline(self.tar), digest=sha256(b""))
        self.refused(cstor.IntegrityError, "wrong size", inline(self.tar), size=5)
        endless = cstor.LayerStream(itertools.chain([self.tar], itertools.repeat(bytes(512))),
                                    label="t", size=1 << 20, digest=sha256(self.tar))
        with self.assertRaisesRegex(cstor.IntegrityError, "wrong size"):
            endless.export(io.BytesIO())
        trailer = self.tar + bytes(9000) + b"garbage"
        self.assertEqual(trailer, self.tar_of(inline(trailer)))

    def test_hostile_lengths_cost_nothing(self) -> None:
        asked = []

        def read(count: int) -> bytes:
            asked.append(count)
            return file.read(count)

        for codec, data in (
                (0, struct.pack("<q", -(256 << 20)) + b"x"),
                (0, struct.pack("<q", -(256 << 20) - 1)), (0, struct.pack("<q", -1 << 63)),
                (0, struct.pack("<q", 1 << 32)),
                (0, struct.pack("<q", (1 << 63) - 1)), (0, struct.pack("<q", 3)),
                (1, struct.pack("<BI", 0, 256 << 20)), (1, struct.pack("<BI", 1, (256 << 20) + 1)),
                (1, struct.pack("<BI", 0, 0xFFFFFFFF)), (1, b"\3"), (1, b"\xff"),
                (1, struct.pack("<BQII", 2, 1 << 63, 2, 4097) + b"x" * 4097),
                (1, struct.pack("<BQII", 2, 9, 3, 1) + b"b"),
                (1, struct.pack("<BQII", 2, 9, 2, 0))):
            file = io.BytesIO(data)
            reader: Any = cstor.SplitfdstreamReader(read, self.fds.__getitem__) if not codec \
                else cstor.SplitdirfdstreamReader(read, self.fds)
            with self.subTest(data=data[:30]), self.assertRaises(cstor.FormatError) as caught:
                list(reader)
            self.assertIsNotNone(caught.exception.offset)
        self.assertLessEqual(max(asked), cstor.CHUNK)
        huge = entry(b"f", size=base256(1 << 62, 12))
        self.refused(cstor.FormatError, "cut off", inline(huge + b"x"))
        self.refused(cstor.IntegrityError, "another size", inline(huge) + in_file(0))

    def test_what_is_no_file_to_read(self) -> None:
        os.mkfifo(self.dir + "/fifo")
        os.symlink("a", self.dir + "/link")
        os.mkdir(self.dir + "/sub")
        unlinked = self.file("gone", self.A)
        os.unlink(self.dir + "/gone")
        data = self.streams[CODECS[0]]
        self.assertEqual(self.tar, self.tar_of(data, fds=[unlinked]))
        for name, flags, words in (("sub", os.O_RDONLY, "directory"),
                                   ("fifo", os.O_RDWR, "FIFO"),
                                   ("/dev/null", os.O_RDONLY, "device"),
                                   ("a", os.O_WRONLY, "not open for reading"),
                                   ("a", os.O_PATH, "not open for reading"),
                                   ("link", os.O_PATH | os.O_NOFOLLOW, "symbolic link")):
            fd = os.open(os.path.join(self.dir, name), flags)
            try:
                error = self.refused(cstor.ProtocolError, words, data, fds=[fd])
                self.assertEqual(-32050, error.code)
            finally:
                os.close(fd)
        for name, words in (("sub", "directory"), ("fifo", "FIFO"), ("link", "symbolic link"),
                            (".", "directory"), ("a/", "Not a directory"), ("sub/", "directory")):
            with self.assertRaisesRegex((cstor.FormatError, OSError), words):
                list(self.reader(in_directory(700, 2, name.encode()), CODECS[1]))
        self.refused(FileNotFoundError, "directory 2/none", typed(0, self.parts[0]) + in_directory(
            700, 2, b"none"), CODECS[1])
        with self.assertRaisesRegex(cstor.ProtocolError, "regular file, not a directory"):
            list(self.reader(in_directory(700, 0, b"a"), CODECS[1]))

    def test_names_lead_nowhere_else(self) -> None:
        os.symlink("/", self.dir + "/root")
        os.mkdir(self.dir + "/sub")
        os.symlink("../../../../..", self.dir + "/sub/up")
        os.symlink("..", self.dir + "/sub/here")
        for name in (b"..", b"../a", b"sub/../a", b"/a", b"a\0b", b"/etc/passwd"):
            with self.assertRaisesRegex(cstor.FormatError, "not a file name"):
                list(self.reader(in_directory(700, 2, name), CODECS[1]))
        for name in (b"root/etc/passwd", b"sub/up/etc/passwd", b"root/proc/self/exe"):
            with self.assertRaises(FileNotFoundError):
                list(self.reader(in_directory(700, 2, name), CODECS[1]))
        for name in (b"root/a", b"sub/here/a", b"./a", b"sub//here/./a"):
            self.assertEqual(self.tar, self.tar_of(self.streams[CODECS[1]].replace(
                in_directory(700, 2, b"a"), in_directory(700, 2, name)), CODECS[1]))

    def test_sizes_that_differ(self) -> None:
        for change in (699, 701):
            os.truncate(self.dir + "/a", change)
            for codec, data in self.streams.items():
                self.refused(cstor.IntegrityError, f"another size.*got {change}", data, codec)
        head = self.parts[0]
        self.refused(cstor.IntegrityError, "sender says: expected 8, got 9", typed(
            0, head) + in_directory(8, 2, b"b"), CODECS[1])
        self.refused(cstor.IntegrityError, '"d/a": .*header says: expected 700, got 9', typed(
            0, head) + in_directory(9, 2, b"b"), CODECS[1])

    def test_files_where_none_belongs(self) -> None:
        head, middle, end = self.parts
        sparse = pax({b"GNU.sparse.major": b"0", b"GNU.sparse.minor": b"1",
                      b"GNU.sparse.map": b"0,700", b"GNU.sparse.size": b"9000"}) \
            + entry(b"s", size=700)
        for data in (in_file(0), inline(head[:100]) + in_file(0), inline(head + b"a") + in_file(0),
                     inline(head) + in_file(0) + in_file(0),
                     inline(head) + in_file(0) + inline(middle[:7]) + in_file(0),
                     inline(self.tar) + in_file(0), inline(sparse) + in_file(0)):
            self.refused(cstor.FormatError, "unexpected file descriptor", data)
        # An empty one says nothing.
        empty = self.file("empty", b"")
        self.assertEqual(self.tar, self.tar_of(in_file(3) + self.streams[CODECS[0]],
                                               fds=[*self.fds, empty]))

    def test_mutations(self) -> None:
        rng = random.Random(15 + sys.version_info[1])
        out = self.dir + "/out"
        for number in range(3000 if FULL else 750):
            codec = CODECS[number % 2]
            data = bytearray(self.streams[codec])
            for _ in range(rng.choice((1, 1, 2, 5))):
                at = rng.randrange(len(data))
                if rng.random() < .5:  # where it hurts
                    at = rng.choice((0, 1, 8, 9, len(self.parts[0]) + 4, len(self.parts[0]) + 8,
                                     len(data) - 1))
                data[at:at + rng.choice((1, 1, 1, 0, 8))] = rng.choice(
                    (b"", rng.randbytes(1), rng.randbytes(8), b"\xff" * 7, bytes(3)))
            options: Any = {"digest": sha256(self.tar)} if number % 3 else {}
            with contextlib.suppress(cstor.CstorError, OSError):
                if number % 16:
                    found = self.tar_of(bytes(data), codec, **options)
                    self.assertTrue(not options or found == self.tar)
                else:
                    with cstor.LayerStream(self.reader(bytes(data), codec), label="t", **options
                                           ) as stream:
                        stream.extract(out, owners=False)
                    shutil.rmtree(out)
            self.assertFalse(os.path.lexists(out))

    def test_odd_tars_pass_bit_for_bit(self) -> None:
        rng = random.Random(1)
        for name, tar in odd_tars():
            chunks, at = [], 0
            while at < len(tar):
                chunks.append(tar[at:at + rng.choice((1, 100, 512, 4000))])
                at += len(chunks[-1])
            with self.subTest(tar=name):
                try:
                    stream = cstor.LayerStream(chunks, label=name, size=len(tar))
                    found = b"".join(stream.chunks())
                except (cstor.FormatError, cstor.IntegrityError, cstor.Unsupported):
                    self.assertIn(name, REFUSED)
                    continue
                self.assertEqual(tar, found)

    # -- writing ---------------------------------------------------------------------------------

    def test_what_is_written(self) -> None:
        sizes = {b"f%d" % size: size for size in (0, 1, 4095, 4096, 4097)}
        tar = b"".join(entry(name, b"x" * size) for name, size in sizes.items()) + END
        store = self.builder()
        layer_id = store.layer(tar)
        store.save()
        with self.open(store) as storage:
            layer = storage.layer(layer_id)
            for threshold in (0, 4095, 4096, 1 << 60):
                out, taken, at = io.BytesIO(), [], 0
                expected: list[int | bytes] = []
                for _, size in list(sizes.items())[1:]:  # the header of f0 has a segment of its own
                    start = tar.index(b"x" * size, at)
                    expected += [tar[:512], tar[512:start]] if not at else [tar[at:start]]
                    at = start + size
                    taken += [size] * (size > threshold)
                    expected.append(len(taken) - 1 if size > threshold else b"x" * size)
                passed: list[int] = []
                writer = cstor.SplitfdstreamWriter(
                    out.write, lambda extent, passed=passed: not passed.append(  # type: ignore
                        extent.length), threshold=threshold)
                for piece in layer.pieces():
                    writer.add(piece)
                self.assertEqual([*expected, tar[at:]], self.chunks(out.getvalue()))
                self.assertEqual((taken, len(taken)), (passed, writer.files))

    @staticmethod
    def chunks(data: bytes) -> list[int | bytes]:
        found: list[int | bytes] = []
        while data:
            number, = struct.unpack_from("<q", data)
            length = max(-number, 0)
            found.append(number if number >= 0 else data[8:8 + length])
            data = data[8 + length:]
        return found

    def test_long_pieces_are_split(self) -> None:
        member = cstor.Member.parse(entry(b"a", self.A)[:512])
        for piece in (self.A, cstor.Extent(self.fds[0], 0, 700, member)):
            kind = 1 if isinstance(piece, cstor.Extent) else 0
            with mock.patch.object(cstor, "MAX_INLINE", 300):
                out: list[bytes] = []
                cstor.SplitfdstreamWriter(out.append).add(piece)
                self.assertEqual(2 * inline(b"a" * 300) + inline(b"a" * 100), b"".join(out))
                out = []
                cstor.SplitdirfdstreamWriter(out.append).add(piece)
                self.assertEqual(2 * typed(kind, b"a" * 300) + typed(kind, b"a" * 100),
                                 b"".join(out))

    def test_only_whole_files_are_external(self) -> None:
        whole = cstor.Member.parse(entry(b"a", self.A)[:512])
        sparse = cstor.Member.parse(entry(b"a", self.A)[:512])
        sparse.sparse = [(0, 700)]
        for external, piece in (
                (True, cstor.Extent(self.fds[0], 0, 700, whole)),
                (False, cstor.Extent(self.fds[0], 0, 699, whole)),
                (False, cstor.Extent(self.fds[0], 1, 699, whole)),
                (False, cstor.Extent(self.fds[0], 0, 700, sparse))):
            out: list[bytes] = []
            cstor.SplitfdstreamWriter(out.append, lambda _: True, threshold=0).add(piece)
            self.assertEqual(external, b"".join(out) == in_file(0))
            out = []
            cstor.SplitdirfdstreamWriter(out.append, lambda _: (0, b"a")).add(piece)
            self.assertEqual(external, out[0].startswith(b"\2"))
        with self.assertRaisesRegex(cstor.IntegrityError,
                                    '"a": the file shrank.*701 bytes, got 700'):
            cstor.SplitfdstreamWriter(out.append).add(cstor.Extent(self.fds[0], 0, 701, whole))

    def test_round_trips(self) -> None:
        with self.open(self.sample()) as storage:
            for layer in storage.layers():
                if not layer.diff_digest:
                    continue
                for codec in CODECS:
                    for threshold in (0, 1, 4096, 1 << 60):
                        for external in (True, False):
                            with streamed(layer, codec, threshold, external=external) as stream:
                                self.assertEqual(layer.diff_digest, stream.export(io.BytesIO()))
                            with streamed(layer, codec, threshold, external=external) as stream:
                                self.assertEqual("", stream.export(io.BytesIO(), verify=False))

    # -- as a file -------------------------------------------------------------------------------

    def test_a_stream_as_a_file(self) -> None:
        for codec, data in self.streams.items():
            stream = cstor.LayerStream(self.reader(data, codec), label="t", digest=sha256(self.tar))
            with stream.open() as file, tarfile.open(fileobj=file, mode="r|") as archive:
                found = {}
                for info in archive:
                    content = archive.extractfile(info)
                    found[info.name] = content.read() if content else None
                self.assertEqual({"d": None, "d/a": self.A, "d/empty": b"", "d/b": self.B}, found)
                file.read()
            closed: list[int] = []
            stream = cstor.LayerStream(self.reader(data, codec), label="t", digest=sha256(b"x"),
                                       close=lambda closed=closed: closed.append(1))  # type: ignore
            with stream.open() as file:
                self.assertEqual(self.tar[:600], file.read(600))
                for _ in range(2):  # an error stays one
                    with self.assertRaisesRegex(cstor.IntegrityError, "wrong digest"):
                        file.read()
            self.assertEqual([1], closed)
        cut = cstor.LayerStream(self.reader(self.streams[CODECS[0]][:-9]), label="t").open()
        with cut, self.assertRaisesRegex(cstor.FormatError, "cut off"):
            cut.read()

    def test_an_abandoned_stream_closes_everything(self) -> None:
        for codec, data in self.streams.items():
            with cstor.LayerStream(self.reader(data, codec), label="t") as stream:
                for piece in stream.pieces():
                    if isinstance(piece, cstor.Extent):
                        break

    def test_memory_does_not_grow_with_a_chunk(self) -> None:
        path, size = self.dir + "/stream", 100 << 20
        with open(path, "wb") as file:
            header = entry(b"big", size=size)
            file.write(inline(header) + struct.pack("<q", -size))
            file.seek(size, os.SEEK_CUR)
            file.write(inline(END))
        self.assertLess(peak_memory("stream-to-tar", path), 64 << 10)

    # -- the commands ----------------------------------------------------------------------------

    def test_commands(self) -> None:
        need_proc()
        store = self.sample()
        self.guard(store.root)
        layer = store.layers[0]
        tar = store.tars[layer["id"]]
        stream, rows, out = (os.path.join(self.dir, name) for name in ("s", "list", "out.tar"))
        root = ("--root", store.root)
        for codec in ([], ["--codec", "splitdirfdstream"]):
            done = self.run_cstor(*root, "layer", "stream", layer["id"], *codec)
            self.assertGreater(len(done.stdout), len(tar))
            again = self.run_cstor("stream-to-tar", "-", "-v", *codec, input=done.stdout,
                                   stdin=None)
            self.assertEqual((tar, f"cstor: stdin: {sha256(tar)}\n".encode()),
                             (again.stdout, again.stderr))
            self.run_cstor(*root, "layer", "stream", layer["id"], *codec, "-o", stream,
                           "--external", rows)
            self.assertLess(os.path.getsize(stream), 20_000)
            with open(rows, encoding="ascii") as file:
                head, *files = map(json.loads, file)
            self.assertEqual({"version": 1, "codec": codec[-1] if codec else "splitfdstream",
                              "layer": layer["id"], "digest": sha256(tar), "size": len(tar),
                              **({"directories": [store.root]} if codec else {})}, head)
            self.assertEqual([] if codec else [{"index": 0, "size": 3000001, "path": store.path(
                "overlay", layer["id"], "diff/usr/share/data.bin")}], files)
            self.run_cstor("stream-to-tar", stream, "-o", out, "--external", rows)
            self.assertEqual(tar, read_bytes(out))
            os.unlink(out)
            self.run_cstor("stream-to-tar", stream, "-o", out, "--external", rows, "--digest",
                           sha256(b""), status=4)
            self.run_cstor("stream-to-tar", stream, "-o", out, *codec, status=6)
            with open(stream, "ab") as more:
                more.write(b"\0")
            self.run_cstor("stream-to-tar", stream, "-o", out, "--external", rows, status=6)
            self.assertFalse(os.path.exists(out))
        for args, status in ((("layer", "stream", "x" * 70), 3),
                             (("layer", "stream", layer["id"], "--threshold", "-1"), 2),
                             (("layer", "stream", layer["id"], "--external", "-"), 2),
                             (("layer", "stream", layer["id"], "--codec", "zip"), 2),
                             (("stream-to-tar", stream, "--digest", "sha256:1"), 2),
                             (("stream-to-tar", stream, "--codec", CODECS[0], "--external",
                               rows), 2),
                             (("stream-to-tar", self.dir), 6), (("stream-to-tar", "-"), 0),
                             (("stream-to-tar", stream, "--external", stream + "-none"), 6)):
            self.run_cstor(*root, *args, status=status)
        self.assertIn(b"to a terminal", on_terminal(*root, "layer", "stream", layer["id"]))
        self.assertEqual({"store", "s", "list", "a", "b"}, set(os.listdir(self.dir)))

    def test_a_failed_stream_is_broken(self) -> None:
        """Whatever of it was written, no reader takes it for whole."""
        store = self.sample()
        layer = store.layers[0]["id"]
        os.unlink(store.path("overlay", layer, "diff/etc/os-release"))
        for codec, end in zip(CODECS, (struct.pack("<q", -1), b"\xff")):
            done = self.run_on(store, "layer stream", layer, "--codec", codec, status=4)
            self.assertTrue(done.stdout.endswith(end))
            self.assertGreater(len(done.stdout), 600)
            words = b"is cut off" if codec == CODECS[0] else b"a chunk of unknown type 255"
            again = self.run_cstor("stream-to-tar", "-", input=done.stdout, stdin=None, status=6)
            self.assertIn(words, again.stderr)
        member = cstor.Member.parse(entry(b"a", b"x" * 700)[:512])
        for codec, kind in zip(CODECS, (cstor.SplitfdstreamWriter, cstor.SplitdirfdstreamWriter)):
            for size in (700, 701, 1000, 1400):  # a part of a chunk is missing, or whole chunks
                out: list[bytes] = []
                writer: Any = kind(lambda data, out=out: out.append(bytes(data)))
                with mock.patch.object(cstor, "MAX_INLINE", 700):
                    if size > 700:
                        with self.assertRaises(cstor.IntegrityError):
                            writer.add(cstor.Extent(self.fds[0], 0, size, member))
                    writer.break_off()
                    with self.assertRaises(cstor.FormatError):
                        list(self.reader(b"".join(out), codec))

    def test_the_codec_is_seen(self) -> None:
        path, out = self.dir + "/s", self.dir + "/out.tar"
        whole = {CODECS[0]: inline(self.tar), CODECS[1]: typed(0, self.tar)}
        for codec, data in whole.items():
            for said in ((), ("--codec", codec)):
                put(path, data)
                self.assertEqual(self.tar, self.run_cstor("stream-to-tar", path, *said).stdout)
            reader, writer = os.pipe()  # whose first bytes come one by one
            with subprocess.Popen([*COMMAND, "stream-to-tar", "-"], stdin=reader,
                                  stdout=subprocess.PIPE, env=IDLE) as process:
                os.close(reader)
                for byte in data[:12]:
                    os.write(writer, bytes([byte]))
                    time.sleep(0.002)
                os.write(writer, data[12:])
                os.close(writer)
                self.assertEqual(self.tar, process.communicate(timeout=30)[0])
            # Neither the tar's end nor a chunk's is needed where a digest is given.
            body = self.tar[:-1024]
            put(path, inline(body) if codec == CODECS[0] else typed(0, body))
            done = self.run_cstor("stream-to-tar", path, status=6)
            self.assertIn(b"the tar has no end", done.stderr)
            for word in (sha256(body), sha256(body)[7:]):
                self.assertEqual(body, self.run_cstor("stream-to-tar", path, "--digest", word
                                                      ).stdout)
            self.run_cstor("stream-to-tar", path, "--digest", sha256(self.tar), status=4)
        for data in (inline(END), typed(0, END), typed(0, b"") + typed(0, END)):
            put(path, data)
            self.assertEqual(END, self.run_cstor("stream-to-tar", path).stdout)
        put(path, b"")  # an empty layer's
        for digest, status in (((), 0), (("--digest", sha256(b"")), 0),
                               (("--digest", sha256(b"x")), 4)):
            self.assertEqual(b"", self.run_cstor("stream-to-tar", path, *digest, "-o", out,
                                                 status=status).stdout)
            self.assertEqual(status == 0, os.path.exists(out))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(out)
        words = "s: not a stream of a layer, neither splitfdstream nor splitdirfdstream"
        for data in (self.tar, gzip.compress(self.tar), b"{}\n", b"x", b"\0\1\2", b"\x7fELF" * 9,
                     b"./" + bytes(98) + self.tar[100:], b"\0\xff\xff\xff\xff" + b"x" * 99,
                     bytes([2]) * 99):
            with self.assertRaisesRegex(cstor.FormatError, words):
                cstor.tell_codec(data[:8], "s")
        put(path, self.tar)
        done = self.run_cstor("stream-to-tar", path, "-o", out, status=6)
        self.assertIn(words.encode(), done.stderr)
        put(path, bytes(1 << 20))
        done = self.run_cstor("stream-to-tar", path, "-o", out, status=6)
        self.assertIn(b"more than 65536 empty chunks", done.stderr)
        for count in (65_536, 65_537):
            stream = cstor.LayerStream([*[b""] * count, self.tar], label="t")
            with self.assertRaises(cstor.FormatError) if count > 65_536 \
                    else contextlib.nullcontext():
                stream.export(io.BytesIO())
        self.assertFalse(os.path.exists(out))

    def test_damaged_lists(self) -> None:
        stream, rows = self.dir + "/s", self.dir + "/list"
        put(stream, self.streams[CODECS[0]])
        head = {"version": 1, "codec": CODECS[0], "layer": "l", "digest": sha256(self.tar),
                "size": len(self.tar)}
        row = {"index": 0, "path": self.dir + "/a", "size": 700}
        os.mkfifo(self.dir + "/fifo")
        for lines, status in (
                ([head, row], 0), ([{**head, "digest": "", "size": -1}, row], 0), ([], 6),
                ([{**head, "version": 2}, row], 6), ([{**head, "codec": "x"}, row], 6),
                ([head, {**row, "index": 1}], 6), ([head, {**row, "path": "a"}], 6),
                ([head, {**row, "path": 5}], 6), ([head, [row]], 6), ([head, 7], 6), ([row], 6),
                ([{**head, "directories": 5}, row], 6), ([{**head, "directories": ["x"]}], 6),
                ([head, {**row, "path": self.dir}], 6), ([head, {**row, "size": 701}], 4),
                ([head, {**row, "path": self.dir + "/fifo"}], 6), ([head], 6),
                ([head, {**row, "path": self.dir + "/none"}], 6),
                ([{**head, "size": 5}, row], 4), ([{**head, "digest": sha256(b"")}, row], 4)):
            with open(rows, "w", encoding="ascii") as text:
                text.writelines(json.dumps(line) + "\n" for line in lines)
            with self.subTest(lines=lines):
                done = self.run_cstor("stream-to-tar", stream, "--external", rows, status=status)
                self.assertTrue(status or done.stdout == self.tar)


class StreamExtracts(TreeTest):
    """Directories made from streams are those that are made from the store."""

    BASE, TOP = Extracts.BASE, Extracts.TOP

    def setUp(self) -> None:
        super().setUp()
        self.owners = None if os.geteuid() == 0 else False
        self.addCleanup(remove, self.out)

    def differences(self, tree: cstor.Tree) -> list[Any]:
        """Return what is not as in the tree, but for what an ordinary user cannot set."""
        return [row for row in tree_differences(self.out, tree)
                if self.owners is None or row[1] != "owner" and not (
                    row[1] == "mode" and row[3] & 0o6000 and row[2] == row[3] & 0o1777)]

    def extract(self, image: cstor.Image, codec: str = CODECS[0], threshold: int = 0,
                external: bool = True, **options: Any) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(streamed(layer, codec, threshold, external=external))
                       for layer in image.layers()]
            return cstor.extract_streams(streams, self.out, **{"owners": self.owners, **options})

    def test_hard_links_to_files_of_lower_layers(self) -> None:
        """As umoci unpacks them: another name, and the link's header changes nothing."""
        base = entry(b"d/a", b"AAA", mode=b"0000640") + symlink(b"s", b"nowhere") \
            + symlink(b"l", b"d") \
            + entry(b"null", b"", b"6")
        out = self.dir + "/out"
        for tars, names in (
                ([hardlink(b"c", b"d/a", mode=b"0000777")], ["c", "d/a"]),
                ([hardlink(b"c", b"/l/a") + hardlink(b"e", b"c")], ["c", "d/a", "e"]),
                ([hardlink(b"c", b"d/a"), hardlink(b"e", b"c")], ["c", "d/a", "e"]),
                ([hardlink(b"c", b"d/a") + entry(b"d/.wh.a")], ["c"]),
                ([hardlink(b"c", b"d/a"), entry(b"d/a", b"new")], ["c"]),
                ([hardlink(b"c", b"s")], ["c", "s"]), ([hardlink(b"c", b"d")], []),
                ([hardlink(b"c", b"null")], ["c", "null"]),
                ([entry(b"d/.wh.a"), hardlink(b"c", b"d/a")], []),
                ([entry(b"d/.wh..wh..opq") + hardlink(b"c", b"d/a")], [])):
            streams = [cstor.LayerStream([tar + END], label="t") for tar in (base, *tars)]
            with self.subTest(tars=[tar[:300].replace(b"\0", b"") for tar in tars]):
                if not names:
                    with self.assertRaisesRegex(cstor.FormatError, '"c" is a hard link to "d'):
                        cstor.extract_streams(streams, out, check=False)
                    self.assertFalse(os.path.lexists(out))
                    continue
                cstor.extract_streams(streams, out, check=False)
                found = [os.lstat(os.path.join(out, name)) for name in names]
                self.assertEqual({(found[0].st_ino, len(names))},
                                 {(status.st_ino, status.st_nlink) for status in found})
                if found[0].st_size == 3:
                    self.assertEqual(0o640, stat.S_IMODE(found[0].st_mode))
                shutil.rmtree(out)

    def test_images(self) -> None:
        with self.opened(self.BASE, self.TOP) as storage:
            image = storage.image("t")
            with image.tree() as tree:
                for codec, threshold, external, workers in (
                        (CODECS[0], 0, True, 1), (CODECS[0], 500, True, 2), (CODECS[1], 0, True, 3),
                        (CODECS[0], 0, False, 1), (CODECS[1], 0, False, 2)):
                    done = self.extract(image, codec, threshold, external, workers=workers,
                                        verify=True)
                    self.assertEqual([], self.differences(tree))
                    self.assertEqual(
                        (3, 6, 1, 1, 1, 2005),
                        tuple(done[key] for key in ("files", "directories", "symlinks",
                                                    "hardlinks", "fifos", "bytes")))
                    self.assertEqual(done["bytes"], done["bytes-reflinked"] + done["bytes-copied"])
                    inline = {row["why"]: row["files"] for row in done["refused"]}
                    self.assertEqual({(0, True): 0, (500, True): 2, (0, False): 3}[
                        threshold, external], inline.get("it came inline", 0))
                    self.assertNotIn(".partial", "".join(self.names()))
                    remove(self.out)

    def test_a_hard_link_to_a_whiteout_of_its_layer_is_one(self) -> None:
        """As podman's mount shows it: the name is hidden, although a layer below has the target."""
        tars = entry(b"t", b"t") + entry(b"c", b"c"), entry(b".wh.t") + hardlink(b"c", b"t")
        done = cstor.extract_streams([cstor.LayerStream([tar + END], label="t") for tar in tars],
                                     self.out, check=False)
        self.assertEqual((0, 0), (done["files"], done["hardlinks"]))
        self.assertEqual([], os.listdir(self.out))

    def test_overlay_xattrs_and_aufs_names_act_as_in_the_store(self) -> None:
        def make(name: bytes, data: bytes | None = None, **xattrs: bytes) -> bytes:
            return Trees.overlay(name, data, b"user" if os.geteuid() else b"trusted", **xattrs)

        below = Trees.BELOW
        for words, *tops in (
                ("opaque", make(b"a", opaque=b"y") + entry(b"a/up", b"u")),
                ("whiteout", make(b"a/low", b"", whiteout=b"n")),
                ("redirect", make(b"n", redirect=b"/o") + make(b"a", redirect=b"/none")),
                ("redirect", make(b"m", redirect=b"o"), entry(b".wh.o"), make(b"n", redirect=b"m")),
                ("metacopy", make(b"o/y", b".", metacopy=bytes(4))),
                ("metacopy, redirect", make(b"f", b".", metacopy=bytes(4), redirect=b"/o/y")),
                ("", entry(b"a/.wh..wh.X", b"") + entry(b"o/s/.wh..wh.aufs", b""))):
            if os.geteuid() and {"metacopy", "redirect"} & set(words.split(", ")):
                continue  # refused in a user's store
            with self.subTest(words, tops=len(tops)), self.opened(below, *tops) as storage, \
                    storage.image("t").tree() as tree:
                done = self.extract(storage.image("t"), verify=True)
                # A user could not remove a root of mode 0555.
                self.assertEqual([(b"", "mode", 0o755, 0o555)] if os.geteuid() else [],
                                 self.differences(tree))
                self.assertEqual(tree.notes(), done["notes"])
                self.assertEqual(sorted(storage.notes), sorted(done["notes"]))
                self.assertEqual([words] * sum(b".overlay." in top for top in tops),
                                 [re.sub(r".*\((.*)\).*", r"\1", note) for note in done["notes"]])
                remove(self.out)

    def test_layers_and_selections(self) -> None:
        with self.opened(self.BASE, self.TOP) as storage:
            base, top = storage.image("t").layers()
            for layer, options in ((top, {}), (base, {}), (top, {"whiteouts": False}),
                                   (base, {"paths": ["etc"]}), (base, {"exclude": ["bin/su"]}),
                                   (base, {"paths": ["/usr/lib/**"], "strip": 2}),
                                   (base, {"link_mode": "hardlink"}),
                                   (base, {"link_mode": "copy"})):
                made = []
                for extract in (layer.extract, None):
                    with streamed(layer, CODECS[1]) as stream:
                        if extract and options.get("link_mode") != "hardlink":
                            done = extract(self.out, owners=self.owners, **options)
                        else:
                            done = stream.extract(self.out, owners=self.owners, **options)
                    made.append((seen_on_disk(self.out), done))
                    remove(self.out)
                self.assertEqual([], [row for row in differences(made[0][0], made[1][0])
                                      if row[1] != "mtime" or b"." in row[0]])
                self.assertEqual(made[0][1], made[1][1])
            with streamed(base) as stream, self.assertRaises(cstor.NotFound):
                stream.extract(self.out, paths=["nothing"])
            self.assertFalse(os.path.lexists(self.out))

    def test_plain_tars_are_merged(self) -> None:
        with self.opened(self.BASE, self.TOP) as storage, storage.image("t").tree() as tree:
            streams = (cstor.LayerStream([tar + END], label="t") for tar in (self.BASE, self.TOP))
            cstor.extract_streams(streams, self.out, owners=self.owners)
            self.assertEqual([], self.differences(tree))
        path = self.dir + "/t.gz"
        put(path, gzip.compress(self.BASE + END))
        fd = os.open(path, os.O_RDONLY)
        with cstor.Decompressed("blob", fd) as reader:
            with cstor.LayerStream(reader.pieces(1000), label="t",
                                   digest=sha256(self.BASE + END)) as stream:
                self.assertEqual(sha256(self.BASE + END), stream.export(io.BytesIO()))
        os.close(fd)

    def test_a_cut_inside_headers_is_an_error(self) -> None:
        first, records = entry(b"a", b"hello"), pax({b"comment": b"c" * 1200})
        tar, path = first + records + entry(b"b", b"x"), self.dir + "/t.tar"
        starts = len(first), len(first + records)
        for at in {*starts, starts[0] + BLOCK, starts[1] - 9, starts[1] - BLOCK,
                   *range(BLOCK + 5, len(tar) - BLOCK, 1 if FULL else 41)}:
            put(path, tar[:at])
            with self.subTest(at=at), cstor.Tree([cstor.TarTree(path)]) as tree:
                # A tar can end without its zero blocks, and records of no member are nothing.
                if at <= starts[0] or at == starts[1]:
                    self.assertEqual([b"a"], list(tree.root.children))
                    continue
                with self.assertRaises(cstor.FormatError):
                    tree.lookup(b"a")
                with self.assertRaises(cstor.FormatError):
                    cstor.LayerStream([tar[:at]], label="t").export(io.BytesIO(), verify=False)

    def test_odd_tars(self) -> None:
        need(os.geteuid() == 0, "only root can make devices and set owners")
        path = self.dir + "/t.tar"
        for name, tar in odd_tars():
            if name in REFUSED:
                continue
            put(path, tar)
            with self.subTest(tar=name), cstor.Tree([cstor.TarTree(path, whiteouts=True)]) as tree:
                try:
                    cstor.extract_streams([cstor.LayerStream([tar], label=name, size=len(tar))],
                                          self.out, verify=True)
                    with cstor.Tree([cstor.DiskTree(cstor.Directory.at(self.out), overlay=False)]
                                    ) as made:
                        self.assertEqual([], list(cstor.diff_trees(tree, made, ["time"])))
                finally:
                    remove(self.out)

    def test_sparse_files_keep_their_holes(self) -> None:
        size = 64 << 20
        tar = (pax({b"GNU.sparse.major": b"0", b"GNU.sparse.minor": b"1", b"GNU.sparse.size":
                    b"%d" % size, b"GNU.sparse.map": b"%d,5,%d,0" % (32 << 20, size)})
               + entry(b"s", b"hello") + pax({
                   b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0",
                   b"GNU.sparse.name": b"t", b"GNU.sparse.realsize": b"%d" % size})
               + entry(b"x", b"1\n8192\n5\n".ljust(512, b"\0") + b"world")
               + pax({b"GNU.sparse.major": b"0", b"GNU.sparse.minor": b"1", b"GNU.sparse.size":
                      b"%d" % size, b"GNU.sparse.map": b"%d,0" % size}) + entry(b"u") + END)
        cstor.extract_streams([cstor.LayerStream([tar], label="t")], self.out, verify=True,
                              owners=False)
        for name, at, data in (("s", 32 << 20, b"hello"), ("t", 8192, b"world"), ("u", 0, b"")):
            with open(os.path.join(self.out, name), "rb") as file:
                self.assertEqual(hashlib.sha256(bytes(at) + data + bytes(size - at - len(data))
                                                ).digest(), hashlib.sha256(file.read()).digest())
                self.assertLess(os.fstat(file.fileno()).st_blocks, 4096)
        bomb = pax({b"GNU.sparse.major": b"0", b"GNU.sparse.minor": b"1", b"GNU.sparse.size":
                    b"%d" % (1 << 50), b"GNU.sparse.map": b"0,5"}) + entry(b"s", b"hello") + END
        with self.assertRaisesRegex(cstor.Unsupported, "holes"):
            cstor.extract_streams([cstor.LayerStream([bomb], label="t")], self.out + "2")

    # -- failures --------------------------------------------------------------------------------

    def test_nothing_is_placed_before_all_is_right(self) -> None:
        good, seen = self.BASE + END, []

        def chunks() -> Iterator[bytes]:
            for start in range(0, len(good), 4096):
                yield good[start:start + 4096]
                there = os.path.exists(self.out)
                hidden = glob.glob(self.dir + "/.cstor-out-*.partial")
                self.assertEqual(there, not hidden)
                for name in hidden:
                    self.assertEqual(0o700, stat.S_IMODE(os.lstat(name).st_mode))
                inside = self.out if there else hidden[0]
                seen.append([(name, stat.S_IMODE(os.lstat(os.path.join(inside, name)).st_mode))
                             for name in os.listdir(inside)])

        for options, error in (({"digest": sha256(b"")}, cstor.IntegrityError),
                               ({"size": 5}, cstor.IntegrityError), ({}, None),
                               ({"digest": sha256(b""), "check": False}, None)):
            for there in (False, True):
                check = options.get("check", True)
                about = {key: value for key, value in options.items() if key != "check"}
                if there:
                    os.mkdir(self.out)
                    with open(self.out + "/mine", "w", encoding="ascii"):
                        pass
                stream = cstor.LayerStream(chunks(), label="t", **about)  # type: ignore[arg-type]
                with contextlib.ExitStack() as stack:
                    if error:
                        stack.enter_context(self.assertRaises(error))
                    cstor.extract_streams([stream], self.out, check=bool(check), force=there,
                                          owners=False)
                if error:
                    self.assertEqual(["mine"] if there else None,
                                     self.names() if os.path.exists(self.out) else None)
                else:
                    self.assertIn("usr/lib/deep/x.py", self.names())
                    self.assertNotIn(".partial", "".join(self.names()))
                remove(self.out)
        for row in seen:
            names = dict(row)
            names.pop("mine", None)
            self.assertEqual([0o700], list(names.values()))
            self.assertRegex("".join(names), r"\A\.cstor-[0-7]{4}-[0-9a-f]{12}\.partial\Z")

    def test_errors_leave_nothing(self) -> None:
        def failing() -> Iterator[bytes]:
            yield self.BASE[:5000]
            raise cstor.ProtocolError("the peer is gone")

        for chunks, error in ((failing(), cstor.ProtocolError), (iter([self.BASE]),
                                                                 cstor.FormatError),
                              (iter([self.BASE + hardlink(b"l", b"none") + END]),
                               cstor.FormatError)):
            with self.assertRaises(error):
                cstor.extract_streams([cstor.LayerStream(chunks, label="t")], self.out)
            self.assertFalse(os.path.lexists(self.out))
        for force, clean, path in ((True, True, self.out), (False, None, "")):
            with self.assertRaises(ValueError):
                cstor.extract_streams([], path, force=force, clean=clean)

    def test_a_file_that_changes_meanwhile(self) -> None:
        path = self.dir + "/f"
        put(path, b"good" * 2000)
        tar = entry(b"f", b"good" * 2000) + END
        real = cstor.ContentCopier.fill

        def copy(*args: Any) -> str:
            why = real(*args)
            time.sleep(.02)
            overwrite(path, b"evil")
            return why

        def share(*args: Any) -> str:
            copy(*args)
            return ""

        def other(ladder: Any, fd: int, size: int, new: int, devices: Any, *_: Any) -> str:
            os.write(new, b"evil" * 2000)
            return ""

        fd = os.open(path, os.O_RDONLY)
        chunks: list[Any] = [tar[:512], cstor.PassedFile(fd), tar[8512:]]
        with mock.patch.object(cstor.ContentCopier, "fill", copy):  # what counts is what was copied
            cstor.extract_streams([cstor.LayerStream(chunks, label="t", digest=sha256(tar))],
                                  self.out, owners=False, link_mode="copy")
        os.close(fd)
        self.assertEqual(b"good" * 2000, read_bytes(self.out + "/f"))
        self.assertEqual(b"evil", read_bytes(path)[:4])
        shutil.rmtree(self.out)
        for replaced, words, verify in ((share, "changed while", False),
                                        (other, "checksum failed", True)):
            put(path, b"good" * 2000)
            fd = os.open(path, os.O_RDONLY)
            chunks = [tar[:512], cstor.PassedFile(fd), tar[8512:]]
            with mock.patch.object(cstor.ContentCopier, "fill", replaced), \
                    self.assertRaisesRegex(cstor.IntegrityError, f'"f": .*{words}'):
                cstor.extract_streams([cstor.LayerStream(chunks, label="t", digest=sha256(tar))],
                                      self.out, owners=False, verify=verify)
            os.close(fd)
            self.assertFalse(os.path.lexists(self.out))

    def test_what_cannot_be_moved_is_copied(self) -> None:
        """Another file system can be mounted below a target that is merged into."""
        real = os.rename

        def rename(source: Any, target: Any, **options: Any) -> None:
            if source.isdigit():
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            real(source, target, **options)

        with self.opened(self.BASE, self.TOP) as storage, storage.image("t").tree() as tree:
            os.mkdir(self.out)
            for force in (False, True):
                with mock.patch.object(os, "rename", rename):
                    self.extract(storage.image("t"), force=force, workers=1)
                self.assertEqual([], self.differences(tree))

    def test_merging(self) -> None:
        with self.opened(self.BASE, self.TOP) as storage, storage.image("t").tree() as tree:
            os.makedirs(self.out + "/etc/shadow")
            os.makedirs(self.out + "/bin/su2")
            os.symlink("/nowhere", self.out + "/usr")
            for _ in range(2):
                self.extract(storage.image("t"), force=True)
                self.assertEqual([], self.differences(tree))

    def test_signals_leave_nothing(self) -> None:
        code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import cstor\n"
                "def chunks():\n"
                "    yield bytes.fromhex(sys.argv[3])\n"
                "    print('ready', flush=True)\n"
                "    time.sleep(60)\n"
                "cstor.unwind_on_signals()\n"
                "force = len(sys.argv) > 4\n"
                "cstor.extract_streams([cstor.LayerStream(chunks(), label='t')], sys.argv[2], "
                "force=force, owners=False)\n")
        tar = entry(b"a", b"1" * 600) + entry(b"b", b"2")
        for there in (False, True):
            if there:
                os.mkdir(self.out)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                with subprocess.Popen([sys.executable, "-c", code, HERE, self.out, tar.hex(),
                                       *["force"] * there], stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL) as process:
                    assert process.stdout
                    self.assertEqual(b"ready\n", process.stdout.readline())
                    self.assertEqual(there, os.path.lexists(self.out))
                    [inside] = glob.glob(self.dir + ("/out" if there else "/.cstor-out-*.partial"))
                    [staging] = os.listdir(inside)
                    self.assertRegex(staging, r"\A\.cstor-\w+-\w+\.partial\Z")
                    self.assertEqual(["0", "1"],
                                     sorted(os.listdir(os.path.join(inside, staging))))
                    process.send_signal(number)
                    process.communicate(timeout=30)
                self.assertEqual(there, os.path.lexists(self.out))
                self.assertEqual([], os.listdir(self.out) if there else [])
                self.assertEqual([], glob.glob(self.dir + "/.cstor-*"))

    def test_what_a_killed_run_left_goes_with_the_next(self) -> None:
        code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import cstor\n"
                "def chunks():\n"
                "    yield bytes.fromhex(sys.argv[3])\n"
                "    print('ready', flush=True)\n"
                "    time.sleep(60)\n"
                "cstor.extract_streams([cstor.LayerStream(chunks(), label='t')], sys.argv[2], "
                "owners=False)\n")
        tar = entry(b"a", b"1" * 600) + entry(b"b", b"2")
        with subprocess.Popen([sys.executable, "-c", code, HERE, self.out, tar.hex()],
                              stdout=subprocess.PIPE) as process:
            assert process.stdout
            self.assertEqual(b"ready\n", process.stdout.readline())
            # Another run at the same time neither removes nor fills it.
            done = self.extract_tar(tar, self.out + "/")
            self.assertEqual([], done["notes"])
            remove(self.out)
            process.kill()
            process.communicate(timeout=30)
        [left] = glob.glob(self.dir + "/.cstor-out-*.partial")
        self.assertFalse(os.path.lexists(self.out))
        done = self.extract_tar(tar, self.out)
        self.assertEqual(["removed what a killed run left beside it: " + os.path.basename(left)],
                         done["notes"])
        self.assertEqual(["a", "b"], sorted(os.listdir(self.out)))
        self.assertEqual([], glob.glob(self.dir + "/.cstor-*"))

    def extract_tar(self, tar: bytes, out: str) -> dict[str, Any]:
        return cstor.extract_streams([cstor.LayerStream([tar + END], label="t")], out,
                                     owners=False)

    def test_a_directory_that_appears_meanwhile_stays(self) -> None:
        def chunks() -> Iterator[bytes]:
            yield self.BASE + END
            os.mkdir(self.out)
            put(self.out + "/mine", b"x")

        with self.assertRaisesRegex(OSError, "Directory not empty.*/out'"):
            cstor.extract_streams([cstor.LayerStream(chunks(), label="t")], self.out, owners=False)
        self.assertEqual(["mine"], os.listdir(self.out))
        self.assertEqual([], glob.glob(self.dir + "/.cstor-*"))

    # -- contents that are opened again by name ---------------------------------------------------

    def test_named_contents_are_made_once(self) -> None:
        real, staged = cstor.Extraction.run, []

        def run(extraction: cstor.Extraction, items: Any) -> dict[str, Any]:
            staged.append(sorted(os.listdir(extraction.output.staging.fd)))
            return real(extraction, items)

        with self.opened(self.BASE, self.TOP) as storage, storage.image("t").tree() as tree, \
                mock.patch.object(cstor.Extraction, "run", run):
            image, made = storage.image("t"), []
            names = [str(number) for number in range(5)]
            for codec, force, settle, expected in (
                    (CODECS[0], False, cstor.settle, names), (CODECS[1], False, cstor.settle, []),
                    (CODECS[1], True, cstor.settle, []),
                    (CODECS[1], False, lambda fd: b"", names)):  # as on tmpfs
                if force:
                    os.mkdir(self.out)
                    put(self.out + "/bin", b"in the way")
                with self.subTest(codec=codec, force=force), \
                        mock.patch.object(cstor, "settle", settle):
                    made.append(self.extract(image, codec, force=force, verify=True, workers=2))
                self.assertEqual(expected, staged.pop())
                self.assertEqual([], self.differences(tree))
                self.assertEqual(made[0], made[-1])
                remove(self.out)

    def named(self, tamper: Callable[[str, bytes], None], data: bytes, **options: Any) -> None:
        """Extract a file of the same data, which is changed after it was verified."""
        path, tar = self.dir + "/files/f", entry(b"f", data) + END
        os.makedirs(self.dir + "/files", exist_ok=True)
        if not os.path.exists(path) or read_bytes(path) != data:
            put(path, data)
        real = cstor.Extraction.run

        def run(extraction: cstor.Extraction, items: Any) -> dict[str, Any]:
            tamper(path, data)
            return real(extraction, items)

        out = io.BytesIO()
        writer = cstor.SplitdirfdstreamWriter(out.write)
        writer.add(tar[:BLOCK])
        out.write(b"\2" + struct.pack("<QII", len(data), 0, 1) + b"f")
        writer.add(tar[BLOCK + len(data):])
        out.seek(0)
        with cstor.Directory.at(self.dir + "/files") as folder, \
                mock.patch.object(cstor.Extraction, "run", run):
            chunks = cstor.SplitdirfdstreamReader(out.read, [folder.fd])
            cstor.extract_streams([cstor.LayerStream(chunks, label="t", digest=sha256(tar))],
                                  self.out, owners=False, **options)

    def test_named_contents_that_change_after_verification(self) -> None:
        def rewrite(path: str, data: bytes) -> None:
            overwrite(path, b"evil")

        def replace(path: str, data: bytes) -> None:
            put(path + "2", data)
            os.rename(path + "2", path)

        def to_directory(path: str, data: bytes) -> None:
            os.unlink(path)
            os.mkdir(path)

        def to_link(path: str, data: bytes) -> None:
            os.rename(path, path + "2")
            os.symlink("f2", path)

        self.named(lambda path, data: None, b"good" * 2000)
        self.assertEqual(b"good" * 2000, read_bytes(self.out + "/f"))
        remove(self.out)
        for tamper, words, link_mode in (
                (rewrite, "changed after it was verified", "auto"),
                (rewrite, "changed after it was verified", "copy"),
                (replace, "changed after it was verified", "auto"),
                (to_directory, "another file has replaced it", "auto"),
                (to_link, "another file has replaced it", "auto")):
            with self.subTest(tamper=tamper.__name__, link_mode=link_mode):
                with self.assertRaisesRegex(cstor.IntegrityError, f'"f": {words}'):
                    self.named(tamper, b"good" * 2000, link_mode=link_mode)
                self.assertFalse(os.path.lexists(self.out))
                remove(self.dir + "/files")
        with self.assertRaisesRegex(OSError, "No such file or directory: '.*directory 0/f'"):
            self.named(lambda path, data: os.unlink(path), b"good" * 2000)
        self.assertFalse(os.path.lexists(self.out))

    def test_named_contents_that_change_through_a_mapping(self) -> None:
        """Until the kernel writes a page to disk, it gives no new time for a change in memory."""
        import mmap

        data = b"good" * 2000
        os.mkdir(self.dir + "/files")
        for settle in (cstor.settle, cstor.identify):
            put(self.dir + "/files/f", data)
            with open(self.dir + "/files/f", "r+b") as file, \
                    mmap.mmap(file.fileno(), len(data)) as mapped, \
                    mock.patch.object(cstor, "settle", settle), contextlib.ExitStack() as stack:
                need(cstor.settle(file.fileno()) != b"", "this file system has no FIEMAP")
                mapped[:4] = b"good"  # from now on the page differs from that on disk
                time.sleep(0.05)
                if settle is not cstor.identify:
                    stack.enter_context(self.assertRaisesRegex(
                        cstor.IntegrityError, '"f": changed after it was verified'))
                self.named(lambda path, data: mapped.__setitem__(slice(4), b"evil"), data)
        self.assertEqual(b"evil", read_bytes(self.out + "/f")[:4])  # so this test can fail

    def test_an_ordinary_user(self) -> None:
        need(os.geteuid() == 0, "only root can become another user")
        need_tools("setpriv")
        need(os.path.exists("/usr/bin/python3"), "there is no /usr/bin/python3 for others to run")
        copy_script(self.dir + "/cstor.py")
        os.chmod(self.dir, 0o755)
        os.mkdir(self.dir + "/home")
        os.chown(self.dir + "/home", 65534, 65534)
        out = self.dir + "/home/out"
        tar = (directory(b"d", mode=b"0000555") + pax({b"SCHILY.xattr.user.x": b"1"}) +
               entry(b"d/closed", b"x", mode=b"0000444") + entry(b"d/no", b"y", mode=b"0000000") +
               pax({b"SCHILY.xattr.user.y": b"2"}) + hardlink(b"l", b"d/no", mode=b"0000400") + END)
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import cstor; print(cstor."
                "extract_streams([cstor.LayerStream([bytes.fromhex(sys.argv[3])], label='t')], "
                "sys.argv[2], verify=True)['files'])")
        done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                               "/usr/bin/python3", "-Bc", code, self.dir, out, tar.hex()],
                              stdout=subprocess.PIPE, check=True)
        self.assertEqual(b"2\n", done.stdout)
        found = {name: stat.S_IMODE(os.stat(f"{out}/{name}").st_mode)
                 for name in ("d", "d/closed", "d/no", "l")}
        self.assertEqual({"d": 0o555, "d/closed": 0o444, "d/no": 0o400, "l": 0o400}, found)


# ================================================================================================
# 20. Transport
# ================================================================================================

class Dumb:
    """One end of a Unix stream socket, either one, as WIRE.md tells it: nothing of cstor is used.

    It keeps none of the rules for errors: what it does not expect ends the test.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.data, self.fds = sock, b"", []  # type: socket.socket, bytes, list[int]
        sock.settimeout(20)

    def send(self, value: Any, fds: Sequence[int] = (), end: bytes = b"", batch: int = 253) -> None:
        """Send an object, or bytes as they are; more than a batch of descriptors go on spaces."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode() + end
        for at in range(0, max(len(fds), 1), batch):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(
                f"{len(fds[at:at + batch])}i", *fds[at:at + batch]))] if fds else []
            sent = self.sock.sendmsg([b" " if at else data], rights)
            if not at:
                self.sock.sendall(data[sent:])

    def send_all(self, data: bytes) -> None:
        """Send bytes, as far as they are wanted, and no more."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)
            self.sock.shutdown(socket.SHUT_WR)

    def fill(self) -> None:
        try:
            data, rights, flags, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(4 * 253))
        except ConnectionResetError:  # it was closed before all was read
            raise EOFError from None
        assert not flags & socket.MSG_CTRUNC
        for _, _, content in rights:
            self.fds += struct.unpack(f"{len(content) // 4}i", content)
        if not data:
            raise EOFError
        self.data += data

    def end(self) -> None:
        """Read until the other end closes."""
        with contextlib.suppress(EOFError):
            while True:
                self.fill()

    def finish(self) -> None:
        """Say no more."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        close_all(self.fds)
        self.sock.close()

    def message(self) -> tuple[Any, list[int]]:
        """Return the next object of JSON-RPC, with as many descriptors as its "fds" says."""
        while True:
            try:
                value, at = json.JSONDecoder().raw_decode(self.data.decode().lstrip())
                break
            except ValueError:
                self.fill()
        self.data = self.data.decode().lstrip()[at:].encode()
        while len(self.fds) < value.get("fds", 0):
            self.fill()
        fds, self.fds = self.fds[:value.get("fds", 0)], self.fds[value.get("fds", 0):]
        return value, fds

    def frame(self) -> tuple[Any, list[int]]:
        """Return the next object of varlink, and what came with it."""
        while b"\0" not in self.data:
            self.fill()
        data, _, self.data = self.data.partition(b"\0")
        fds, self.fds = self.fds, []
        return json.loads(data), fds

    def ask(self, method: str, **params: Any) -> None:
        self.send({"jsonrpc": "2.0", "method": method, "params": params, "id": 7})

    def call(self, **params: Any) -> None:
        """Ask for a layer in varlink."""
        self.send(get_layer(**params), end=b"\0")

    def numbers(self) -> tuple[bytes, dict[str, Any], list[int]]:
        """Return the tar of a splitfdstream, the result, and the sizes of the files passed."""
        value, fds = self.message()
        try:
            stream = os.pread(fds[0], os.fstat(fds[0]).st_size, 0)
            assert value["result"].get("streamSize", len(stream)) == len(stream)
            assert fcntl.fcntl(fds[0], 1034) & 15 == 15  # all seals
            assert {os.O_RDONLY} >= {fcntl.fcntl(fd, 3) & os.O_ACCMODE for fd in fds[1:]}
            with contextlib.suppress(OSError):
                raise AssertionError(os.write(fds[0], b"x"))
            return (self.tar_of_numbers(stream, fds[1:]), value["result"],
                    [os.fstat(fd).st_size for fd in fds[1:]])
        finally:
            close_all(fds)

    def names(self) -> bytes:
        """Return the tar of a splitdirfdstream."""
        fds, more = [], True  # type: list[int], bool
        while more:
            value, some = self.frame()
            assert "error" not in value, value
            fds, more = fds + some, value["continues"]
        count = value["parameters"]["dir_count"]
        assert count + 2 <= len(fds) <= count + 4
        try:
            with open(fds[0], "rb", closefd=False) as pipe:
                return self.tar_of_names(pipe.read(), fds[1:1 + count])
        finally:
            close_all(fds)

    def notified(self) -> tuple[bytes, dict[str, Any], int]:
        """Return the tar of notifications, their end, and the number of files."""
        tar, files, end = b"", 0, None
        while True:
            value, fds = self.message()
            method, params = str(value.get("method")).partition(".")[2], value.get("params")
            if "error" in value:
                raise LookupError(value["error"]["code"], value["error"]["message"])
            if "result" in value:
                assert value["id"] == 7 and end is not None and not fds
                return tar, end, files
            assert "id" not in value and len(fds) == (method == "file") and end is None
            if method in ("seg", "segment"):
                tar += base64.b64decode(params["data"], validate=True)
            elif method == "file":
                with open(fds[0], "rb") as file:
                    tar += file.read()
                    assert file.tell() == params["size"]
                files += 1
            elif method == "end":
                end = params

    @staticmethod
    def tar_of_numbers(data: bytes, fds: Sequence[int]) -> bytes:
        """Return the tar of a splitfdstream."""
        tar, at = bytearray(), 0
        while at < len(data):
            number, = struct.unpack_from("<q", data, at)
            at += 8 + max(-number, 0)
            tar += data[at + number:at] if number < 0 else os.pread(
                fds[number], os.fstat(fds[number]).st_size, 0)
        return bytes(tar)

    @staticmethod
    def tar_of_names(data: bytes, directories: Sequence[int]) -> bytes:
        """Return the tar of a splitdirfdstream."""
        tar, at = b"", 0
        while at < len(data):
            if data[at] < 2:
                size, = struct.unpack_from("<I", data, at + 1)
                tar, at = tar + data[at + 5:at + 5 + size], at + 5 + size
                continue
            size, index, length = struct.unpack_from("<QII", data, at + 1)
            at += 17 + length
            with open(os.open(data[at - length:at], os.O_RDONLY, dir_fd=directories[index]),
                      "rb") as file:
                tar += file.read()
                assert file.tell() == size
        return tar


def saying(messages: Iterable[tuple[Any, Sequence[int]]]) -> Callable[[Dumb], None]:
    """Return what sends all of the messages, (object or bytes, descriptors)."""
    def say(dumb: Dumb) -> None:
        for value, fds in messages:
            dumb.send(value, fds)

    return say


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


OCI = "org.composefs.Oci."


def get_layer(**params: Any) -> dict[str, Any]:
    """Return a varlink call for a layer."""
    return {"method": OCI + "GetLayer", "more": True, "parameters": {"handle": 0, "params": params}}


@contextlib.contextmanager
def serving(path: str, *, grace: float = 10.0, opener: Callable[[], cstor.Storage],
            **options: Any) -> Iterator[cstor.RpcServer]:
    """Run a server in a thread."""
    server = cstor.RpcServer(opener, **options)
    with cstor.ListeningSocket(path) as listener:
        thread = threading.Thread(target=server.serve, args=(listener, grace))
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(30)


class MessageTest(StoreTest):
    """A tiny layer, and both ends of a conversation within this thread.

    All that a peer says is sent before the other end runs, and the socket closed for sending: it
    is little enough for the kernel's buffers, and nobody can wait for anything.
    """

    A, B = b"a" * 700, b"b" * 90

    def setUp(self) -> None:
        super().setUp()
        self.tar = (entry(b"d/", typeflag=b"5") + entry(b"d/a", self.A) + entry(b"d/empty")
                    + entry(b"d/b", self.B) + END)
        self.digest, self.size = sha256(self.tar), len(self.tar)
        at = self.tar.index(self.A)
        to = self.tar.index(self.B, at)
        self.parts = (self.tar[:at], self.tar[at + 700:to], self.tar[to + 90:])
        self.a, self.b = self.file("a", self.A), self.file("b", self.B)
        self.folder = self.opened(os.open(self.dir, os.O_PATH | os.O_DIRECTORY))

    def opened(self, fd: int) -> int:
        self.addCleanup(os.close, fd)
        return fd

    def file(self, name: str, data: bytes, flags: int = os.O_RDONLY) -> int:
        """Make a file and open it until the end of the test."""
        path = os.path.join(self.dir, name)
        put(path, data)
        return self.opened(os.open(path, flags))

    @contextlib.contextmanager
    def pair(self) -> Iterator[tuple[socket.socket, Dumb]]:
        """Give two ends of a socket, and look after what is left open when both are closed."""
        before = os.listdir("/proc/self/fd") if cstor.has_proc() else []
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield ours, Dumb(theirs)
        if cstor.has_proc():
            self.assertEqual(before, os.listdir("/proc/self/fd"), "descriptors were left open")

    # -- what a server says ----------------------------------------------------------------------

    def notifications(self, *, segment: str = "stream.seg", file: str = "", start: Any = None,
                      end: Any = None, placeholder: bool = False, fds: bool = True) -> list[Any]:
        """Return the messages of a server, (object, descriptors), with a response at the end."""
        head, middle, tail = (base64.b64encode(part).decode() for part in self.parts)
        kind = segment.partition(".")[0]
        file = file or f"{kind}.file"
        more: dict[str, Any] = {"fd": {"__jsonrpc_fd__": True, "index": 0}} if placeholder else {}

        def message(method: str, params: Any, *passed: int) -> Any:
            count = {"fds": len(passed)} if passed and fds else {}
            return {"jsonrpc": "2.0", "method": method, "params": params, **count}, list(passed)

        return [message(f"{kind}.start", start if start is not None else {}),
                message(segment, {"data": head}),
                message(file, {"name": "d/a", "size": 700, **more}, self.a),
                message(segment, {"data": middle}),
                message(file, {"name": "d/b", "size": 90, **more}, self.b),
                message(segment, {"data": tail}),
                message(f"{kind}.end", end if end is not None else {}),
                ({"jsonrpc": "2.0", "result": {"success": True}, "id": 1}, [])]

    def response(self, **result: Any) -> list[Any]:
        """Return the one message of a server that sends a splitfdstream."""
        head, middle, tail = self.parts
        stream = inline(head) + in_file(0) + inline(middle) + in_file(1) + inline(tail)
        fds = [self.file("stream", stream), self.a, self.b]
        return [({"jsonrpc": "2.0", "result": result, "id": 1, "fds": len(fds)}, fds)]

    @contextlib.contextmanager
    def pipe(self, data: bytes) -> Iterator[list[int]]:
        """Give the reading end of a pipe with data in it, and an end of another pipe."""
        read, write = os.pipe()
        other, alive = os.pipe()
        os.close(other)
        try:
            os.write(write, data)
            os.close(write)
            yield [read, alive]
        finally:
            close_all([read, alive])

    @property
    def named(self) -> bytes:
        """The layer as a splitdirfdstream."""
        head, middle, tail = self.parts
        return (typed(0, head) + in_directory(700, 0, b"a") + typed(0, middle)
                + typed(1, self.B) + typed(0, tail))

    def conversations(self) -> Iterator[tuple[str, list[Any]]]:
        """Yield (form, messages of a server) in the main spellings."""
        known = {"digest": self.digest, "size": self.size}
        yield "stream", self.notifications(start=known, end={"files": 2})
        yield "proxy", self.notifications(
            segment="layer.segment", placeholder=True,
            start={"digest": self.digest, "uncompressed_size": self.size},
            end={"files_sent": 2, "checksum": self.digest})
        yield "splitfdstream", self.response(
            mediaType="application/vnd.containers.splitfdstream", **known)

    # -- our client ------------------------------------------------------------------------------

    def fetched(self, form: str, say: Callable[[Dumb], object], timeout: float = 20.0,
                reference: str = "x") -> bytes:
        """Return the tar that one of our clients makes of what a server says."""
        with self.pair() as (ours, dumb):
            say(dumb)
            dumb.sock.shutdown(socket.SHUT_WR)
            kind: Any = {"proxy": cstor.ProxyV2Client, "varlink": cstor.VarlinkClient}.get(
                form, cstor.RpcClient)
            with kind(ours, timeout=timeout) as client:
                stream = client.image_layer(1, reference) if form == "proxy" \
                    else client.layer(reference, form)
                with stream:
                    out = io.BytesIO()
                    digest = stream.export(out)
                    self.assertEqual(sha256(out.getvalue()), digest)
        return out.getvalue()

    def refused(self, words: str, form: str, say: list[Any] | Callable[[Dumb], object],
                error: type[BaseException] = cstor.ProtocolError, **options: Any) -> Any:
        """Check that a client refuses what a server says; return the error."""
        with self.assertRaisesRegex(error, words) as caught:
            self.fetched(form, saying(say) if isinstance(say, list) else say, **options)
        return caught.exception


CSTOR_ERRORS = {"FormatError", "IntegrityError", "LayerUnknown", "ImageUnknown", "NotFound",
                "ProtocolError", "Unsupported"}
WORDS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\0", b"\xff", b" ", b"null", b"true",
         b"-1", b"1e9", b"9" * 30, b'"fds":1', b'"fds":2,', b'"id":1', b"{}", b"NaN")


def damage(rng: random.Random, data: list[bytearray], fds: list[list[int]], spare: list[int]
           ) -> None:
    """Change a recorded conversation at some place."""
    i = rng.randrange(len(data))
    part = data[i]
    at = rng.randrange(len(part) or 1)
    kind = rng.randrange(10)
    if kind < 3 and part:
        part[at % len(part)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del part[at:at + rng.randrange(1, 9)]
    elif kind == 4:
        part[at:at] = rng.choice(WORDS)
    elif kind == 5:
        part[at:at + rng.randrange(9)] = part[:rng.randrange(9)]
    elif kind == 6:
        j = rng.randrange(len(data))
        data[i], data[j], fds[i], fds[j] = data[j], data[i], fds[j], fds[i]
    elif kind == 7 and len(data) > 1:
        del data[i], fds[i]
    elif kind == 8:
        data.insert(i, bytearray(part))
        fds.insert(i, list(fds[i]))
    elif spare and fds[i] and rng.random() < 0.7:
        fds[i][rng.randrange(len(fds[i]))] = rng.choice(spare)
    elif spare:
        fds[i].append(rng.choice(spare))


class ListeningSockets(StoreTest):
    """Where a server's socket is put, and what may be there before and afterwards."""

    def setUp(self) -> None:
        super().setUp()
        self.path = os.path.join(self.dir, "socket")

    def gone(self) -> None:
        self.assertEqual([], [name for name in os.listdir(self.dir) if "sock" in name])

    def test_it_comes_and_goes(self) -> None:
        self.addCleanup(os.umask, UMASK)
        for mask in (0, 0o22, 0o777):
            os.umask(mask)
            with cstor.ListeningSocket(self.path) as listener:
                self.assertEqual(0o600, stat.S_IMODE(os.stat(self.path).st_mode))
                self.assertFalse(listener.get_inheritable())
                with cstor.connect(self.path) as sock:
                    self.assertFalse(sock.get_inheritable())
                    listener.accept()[0].close()
            self.gone()

    def test_what_is_there_before(self) -> None:
        def refused(number: int, path: str = self.path) -> None:
            with self.assertRaises(OSError) as caught:
                cstor.ListeningSocket(path)
            self.assertEqual((number, path), (caught.exception.errno, caught.exception.filename))

        with cstor.ListeningSocket(self.path):
            refused(errno.EADDRINUSE)
            self.assertTrue(os.path.exists(self.path))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
            stale.bind(self.path)
        with cstor.ListeningSocket(self.path):
            cstor.connect(self.path).close()
        self.gone()
        for make in (put, functools.partial(os.symlink, "nowhere"), os.mkdir):
            make(self.path)
            refused(errno.EEXIST)
            remove(self.path)
        refused(errno.ENOENT, os.path.join(self.dir, "no", "socket"))
        refused(errno.ENAMETOOLONG, os.path.join(self.dir, "s" * 300))
        self.gone()

    def test_a_server_that_is_too_busy(self) -> None:
        """Nobody waits for ever where nobody accepts; and it is not dead."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy, \
                contextlib.ExitStack() as stack:
            busy.bind(self.path)
            busy.listen(0)
            for _ in range(2):
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                waiting.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    waiting.connect(self.path)
            with self.assertRaises(OSError) as caught:
                cstor.ListeningSocket(self.path)
            self.assertEqual(errno.EADDRINUSE, caught.exception.errno)
            with self.assertRaisesRegex(cstor.ProtocolError, "done nothing for 0.1 seconds"):
                cstor.RpcClient(self.path, timeout=0.1)

    def test_long_paths(self) -> None:
        folder = os.path.join(self.dir, "d" * 200)
        os.mkdir(folder)
        with mock.patch("os.path.exists", return_value=False), \
                self.assertRaisesRegex(cstor.Unsupported, "paths are opened through /proc, which"):
            cstor.connect(os.path.join(folder, "socket"))
        need_proc()
        for name in ("socket", "s" * 80, "s" * 81, "s" * 200):
            path = os.path.join(folder, name)
            with cstor.ListeningSocket(path) as listener:
                with cstor.connect(path):
                    listener.accept()[0].close()
                with self.assertRaisesRegex(OSError, "another server"):
                    cstor.ListeningSocket(path)
            self.assertEqual([], os.listdir(folder))

    def test_what_somebody_else_put_there_stays(self) -> None:
        for make in (put, os.mkdir, lambda _: None):
            with cstor.ListeningSocket(self.path):
                os.unlink(self.path)
                make(self.path)
            self.assertEqual(make in (put, os.mkdir), os.path.exists(self.path))
            remove(self.path)
        with cstor.ListeningSocket(self.path):
            os.unlink(self.path)
            with cstor.ListeningSocket(self.path):
                pass
            other = cstor.ListeningSocket(self.path)
        with other:
            cstor.connect(self.path).close()
        self.gone()

    def test_servers_that_start_at_the_same_time(self) -> None:
        with mock.patch.object(cstor.ListeningSocket, "_check"):
            with cstor.ListeningSocket(self.path) as listener:
                with self.assertRaisesRegex(OSError, "another server listens there"):
                    cstor.ListeningSocket(self.path)
                cstor.connect(self.path).close()
                listener.accept()[0].close()
            put(self.path, b"somebody's")
            self.assertRaises(OSError, cstor.ListeningSocket, self.path)
        self.assertEqual(b"somebody's", read_bytes(self.path))
        self.assertEqual(["socket"], os.listdir(self.dir))


# A skopeo that copies from one layout, FAKE_LAYOUT, and then does what the reference says.
FAKE_SKOPEO = r"""
import json, os, shutil, signal, sys, time
words = sys.argv[1:]
with open(os.environ["FAKE_LAYOUT"] + "/words", "w") as file:
    print(json.dumps([os.getpid(), words]), file=file)
if "inspect" in words:
    print(json.dumps({"manifests": []} if words[-1].endswith(":list") else {"layers": []}))
    sys.exit()
reference, target = words[-2], words[-1][4:]
_, tag, *faults = reference.split(":", 2)
fault, _, detail = "".join(faults).partition("=")
if fault == "refuse":
    print(f'time="now" level=fatal msg="{detail}"', file=sys.stderr)
    sys.exit(1)
if fault == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
shutil.copytree(os.environ["FAKE_LAYOUT"], target)
os.unlink(target + "/words")
name = target + "/index.json"
index = json.load(open(name))
index["manifests"] = [entry for entry in index["manifests"]
                      if entry["annotations"]["org.opencontainers.image.ref.name"] == tag]
blob = lambda digest: f"{target}/blobs/sha256/{digest[7:]}"
manifest = json.load(open(blob(index["manifests"][0]["digest"])))
victim = blob({"manifest": index["manifests"][0], "config": manifest["config"]}.get(
    detail, manifest["layers"][-1])["digest"])
if fault == "corrupt":
    with open(victim, "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
elif fault == "cut":
    os.truncate(victim, os.path.getsize(victim) - 1)
elif fault == "grow":
    os.truncate(victim, 1 << 40)
elif fault == "lose":
    os.unlink(victim)
elif fault == "fifo":
    os.unlink(victim)
    os.mkfifo(victim)
elif fault == "index":
    index = json.loads(detail)
open(name, "w").write(json.dumps(index))
if fault in ("hang", "deaf"):
    time.sleep(60)
if fault == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "status":
    sys.exit(int(detail))
"""


# ================================================================================================
# 21. Server
# ================================================================================================

def outcome(action: Callable[[], bytes], tar: bytes) -> str:
    """Return what became of it, in a word."""
    try:
        return "tar" if action() == tar else "other tar"
    except AssertionError:
        raise
    except Exception as error:
        return type(error).__name__


class DumbClients(MessageTest):
    """Our server and clients from WIRE.md alone: good ones, broken ones, and many."""

    def setUp(self) -> None:
        super().setUp()
        self.store = self.builder()
        self.layer = self.store.layer(self.tar)
        self.big = self.store.layer(make_tar(*(
            (f"big{i}", b"%d" % i * 200_000) for i in range(10)), ("small", b"s")), self.layer)
        self.big_tar = self.store.tars[self.big]
        self.image = self.store.image(self.big, "localhost/tiny:1")
        self.store.save()
        self.guard(self.store.root)
        self.opener = functools.partial(cstor.Storage.open, self.store.root)
        self.server = cstor.RpcServer(self.opener, timeout=10.0, idle=10.0)
        self.path = os.path.join(self.dir, "socket")

    def add(self, tar: bytes) -> str:
        """Add a layer, which is the big one from now on."""
        self.big, self.big_tar, self._root = self.store.layer(tar), tar, ""
        self.store.save()
        return self.big

    @contextlib.contextmanager
    def handled(self, *requests: Any) -> Iterator[Dumb]:
        """Give a client whose requests, objects or (bytes or object, descriptors), were answered.
        """
        with self.pair() as (ours, dumb):
            for request in requests:
                dumb.send(*(request if isinstance(request, tuple) else (request,)))
            dumb.finish()
            self.server.handle(ours)
            yield dumb
            self.assertEqual(-1, ours.fileno())

    def answered(self, *requests: Any) -> Dumb:
        """Return a client that has all answers to its requests."""
        with self.handled(*requests) as dumb:
            dumb.end()
            close_all(dumb.fds)
        return dumb

    def request(self, method: str, number: Any = 7, **params: Any) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "method": method, "params": params, "id": number}

    def files(self, layer: str = "", **options: Any) -> dict[str, Any]:
        """Return a request for a layer as a splitfdstream."""
        return self.request("GetLayerSplitfdstream", layer=layer or self.layer, **options)

    def good(self) -> Any:
        return self.request("StreamLayer", layer=self.layer, threshold=10)

    def served_well(self) -> None:
        """A good client gets its layer."""
        with self.handled(self.good()) as dumb:
            tar, _, files = dumb.notified()
            self.assertEqual((self.tar, 2), (tar, files))

    @contextlib.contextmanager
    def running(self, **options: Any) -> Iterator[cstor.RpcServer]:
        """Run a server in a thread; all of its threads must have ended at the end."""
        before = threading.active_count()
        with serving(self.path, opener=self.opener, **{"timeout": 10.0, "idle": 10.0, **options}
                     ) as server:
            yield server
        wait_for(lambda: threading.active_count() == before)
        self.assertEqual(before, threading.active_count())

    def dumb(self) -> Dumb:
        """Return a new connection to the running server."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(self.path)
        self.addCleanup(sock.close)
        return Dumb(sock)

    # -- good ones -------------------------------------------------------------------------------

    def test_without_threads_one_client_is_served_at_a_time(self) -> None:
        with self.running(grace=0.1) as server, \
                mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
            for _ in range(2):
                with cstor.RpcClient(cstor.connect(self.path)) as client:
                    self.assertEqual(1, len(client.images()))
            with cstor.RpcClient(cstor.connect(self.path)) as idle:
                idle.images()
                begin = time.monotonic()
                server.stop()  # for which nobody waits who asks nothing
                wait_for(lambda: server._waker < 0, 5)
                self.assertLess(time.monotonic() - begin, 3)

    def test_every_form(self) -> None:
        need_proc()
        with self.running():
            for layer in (self.layer, self.big):
                tar, dumb = self.store.tars[layer], self.dumb()
                for form, options in itertools.product(
                        ("GetLayerSplitfdstream", "StreamLayer", "GetLayerTarSplit"),
                        ({}, {"threshold": 0}, {"threshold": 300_000})):
                    with self.subTest(form=form, **options):
                        self.assertEqual(tar, self.tar_of(dumb, form, layer, options))
                dumb.close()
            place = {"storage_path": self.store.root, "layer_id": self.layer}
            ways: list[dict[str, Any]] = [{"diff_id": self.digest, "storage": None},
                                          {"diff_id": None, "storage": place}]
            for dac, wanted in itertools.product((False, True), ways):
                dumb = self.dumb()
                dumb.send({"method": OCI + "GetInfo"}, end=b"\0")
                self.assertIn("splitdirfdstream-v0", dumb.frame()[0]["parameters"]["features"])
                dumb.call(consumer_has_cap_dac_override=dac, **wanted)
                self.assertEqual(self.tar, dumb.names())

    def tar_of(self, dumb: Dumb, form: str, layer: str, options: dict[str, Any]) -> bytes:
        """Ask for a layer and put it together, by what WIRE.md says."""
        if form == "StreamLayer":
            dumb.ask(form, layer=layer, **options)
            return dumb.notified()[0]
        if form == "GetLayerSplitfdstream":
            dumb.ask(form, layer=layer, compressed=False, **options)
            tar, result, _ = dumb.numbers()
            self.assertIn("streamSize", result)
            return tar
        digest = sha256(self.store.tars[layer])
        dumb.send({"jsonrpc": "2.0", "method": "Initialize", "params": [], "id": 1})
        self.assertEqual("1.0.0", dumb.message()[0]["result"]["value"]["version"])
        dumb.ask("OpenImage", image_ref="containers-storage:localhost/tiny:1")
        image = dumb.message()[0]["result"]["image_id"]
        dumb.ask(form, image_id=image, layer_digest=digest, **options)
        found, end, files = dumb.notified()
        self.assertEqual({"files_sent": files, "checksum": digest}, end)
        dumb.ask("CloseImage", image_id=image)
        self.assertEqual({}, dumb.message()[0]["result"])
        return found

    def test_no_more_files_than_a_message_takes(self) -> None:
        """The largest are passed where not all can be; of one size as many as can be."""
        need_proc()
        layer = self.add(make_tar(*((f"f{i}", b"%d" % i) for i in range(300))))
        for options, count in (({}, 252), ({"maxFds": 300}, 300), ({"maxFds": 3}, 3)):
            with self.handled(self.files(layer, threshold=0, **options)) as dumb:
                tar, _, sizes = dumb.numbers()
                self.assertEqual((self.big_tar, count), (tar, len(sizes)))
        every = [10, 30, 20, 20, 30, 20, 5]
        layer = self.add(make_tar(*((f"f{i}", b"%d" % i * size) for i, size in enumerate(every))))
        for most, passed in enumerate((
                [], [30], [30, 30], [30, 20, 30], [30, 20, 20, 30], [30, 20, 20, 30, 20],
                [10, 30, 20, 20, 30, 20], every, every)):
            with self.handled(self.files(layer, threshold=0, maxFds=most)) as dumb:
                tar, _, sizes = dumb.numbers()
                self.assertEqual((self.big_tar, passed), (tar, sizes))

    def test_what_a_proxy_says(self) -> None:
        layer = self.store.layer(members(
            "[mtime=1.000000007] a=123456789 [mtime=-1.5] b=123456789 [mtime=-99999999999999] "
            "c=123456789") + END)
        self.store.image(layer, "localhost/times:1")
        self.store.save()
        self._root = ""
        found, answers = [], []  # type: list[Any], list[Any]
        with self.handled(
                self.request("OpenImage", image_ref="localhost/times:1"),
                self.request("GetLayerTarSplit", image_id=1, threshold=0,
                             layer_digest=sha256(self.store.tars[layer])),
                self.request("Nothing"), self.request("Shutdown")) as dumb:
            while len(answers) < 4:
                value, fds = dumb.message()
                if value.get("method") == "layer.file":
                    found.append(value["params"].get("mtime"))
                elif "id" in value:
                    answers.append(value.get("result") or value["error"]["message"])
                close_all(fds)
        self.assertEqual(["1970-01-01T00:00:01.000000007Z", "1969-12-31T23:59:58.5Z", None], found)
        self.assertEqual([{"image_id": 1}, {"success": True}, 'unknown method: "Nothing"',
                          {"success": True}], answers)

    def read_pipe(self, dac: bool = True) -> tuple[bytes, list[Any]]:
        """Return the stream of the big layer as a composefs client gets it, and what else comes."""
        with self.pair() as (ours, dumb):
            thread = threading.Thread(target=self.server.handle, args=(ours,))
            dumb.call(diff_id=sha256(self.big_tar), consumer_has_cap_dac_override=dac)
            thread.start()
            fds = dumb.frame()[1]
            with open(fds[0], "rb") as pipe:
                data = pipe.read()
            close_all(fds[1:])
            dumb.finish()
            thread.join()
            later = []
            with contextlib.suppress(EOFError):
                while True:
                    later.append(dumb.frame()[0])
        return data, later

    def folder_of(self, layer: str) -> int:
        return self.opened(os.open(self.store.path("overlay", layer, "diff"), os.O_PATH))

    def test_a_layer_that_fails_looks_broken(self) -> None:
        """A stream has no mark of its end, so that one without the rest would be whole."""
        need_proc()
        self._root = ""
        folder = self.folder_of(self.big)
        for name, dac in (("big0", True), ("big4", False), ("small", True)):
            path = self.store.path("overlay", self.big, "diff", name)
            data = read_bytes(path)
            os.unlink(path)
            stream, later = self.read_pipe(dac)
            with self.assertRaisesRegex(cstor.FormatError, "a chunk of unknown type 255"):
                list(cstor.SplitdirfdstreamReader(io.BytesIO(stream).read, [folder]))
            self.assertEqual([OCI + "InternalError"], [row["error"] for row in later])
            put(path, data)
        stream, later = self.read_pipe()
        self.assertEqual((self.big_tar, []), (Dumb.tar_of_names(stream, [folder]), later))

    def test_a_killed_server_leaves_a_cut_chunk(self) -> None:
        read, write = os.pipe()
        out = cstor._PipeWriter(write, 9)
        found: list[bytes] = []
        with open(read, "rb") as pipe:
            thread = threading.Thread(target=lambda: found.append(pipe.read()))
            thread.start()
            cstor.SplitdirfdstreamWriter(out.write).add(b"y" * (3 << 20))
            os.close(write)
            thread.join()
        self.assertEqual(5 + (3 << 20) - 1, len(found[0]))

    def test_names_that_are_not_utf_8_go_inline(self) -> None:
        """composefs opens no file by such a name."""
        need_proc()
        layer = self.add(make_tar(("caf\u00e9", b"1" * 9), ("caf\udce9", b"2" * 9),
                                  ("d\udcff/f", b"3" * 9)))
        stream, _ = self.read_pipe()
        for part in (in_directory(9, 0, "caf\u00e9".encode()), typed(1, b"2" * 9),
                     typed(1, b"3" * 9)):
            self.assertIn(part, stream)
        self.assertEqual(self.big_tar, Dumb.tar_of_names(stream, [self.folder_of(layer)]))
        rows, out = os.path.join(self.dir, "rows"), os.path.join(self.dir, "stream")
        self.run_on(self.store, "layer stream", layer, "-o", out, "--codec", CODECS[1],
                    "--threshold", "0", "--external", rows)
        self.assertEqual(1, read_bytes(out).count(b"\2" + struct.pack("<Q", 9)))
        self.assertEqual(self.big_tar, self.run_cstor(
            "stream-to-tar", out, "--external", rows).stdout)

    def test_plain_files_are_named_unopened(self) -> None:
        """The same names as those of open files: links to directories are followed."""
        need_proc()
        layer = self.add(make_tar(("d/", None), ("d/a", b"1" * 9), ("top", b"2" * 9), ("lnk", "/d"),
                                  ("d/b", b"3" * 9), ("closed/", None), ("closed/c", b"4" * 9)))
        tar = make_tar(("d/", None), ("d/a", b"1" * 9), ("./top", b"2" * 9), ("lnk", "/d"),
                       ("lnk/b", b"3" * 9), ("closed/", None), ("closed//c", b"4" * 9))
        self.store.tar_split(layer, tar)
        self.store.layers[-1].update({"diff-digest": sha256(tar), "diff-size": len(tar)})
        self.store.save()
        self.big_tar = tar
        os.chmod(self.store.path("overlay", layer, "diff/closed"), 0o700)
        for dac, missing in ((True, b""), (False, b"closed/c")):
            with mock.patch.object(cstor.LayerFiles, "open", autospec=True,
                                   side_effect=cstor.LayerFiles.open) as opened:
                stream, later = self.read_pipe(dac)
            self.assertEqual(([], 0 if dac else 1), (later, opened.call_count))
            for name in (b"d/a", b"top", b"d/b", b"closed/c"):
                self.assertEqual(name != missing, in_directory(9, 0, name) in stream, name)
            with mock.patch.object(cstor.LayerFiles, "find", lambda *_: None):
                self.assertEqual((stream, []), self.read_pipe(dac))
            self.assertEqual(tar, Dumb.tar_of_names(stream, [self.folder_of(layer)]))

    def test_every_layer_by_every_client(self) -> None:
        need_proc()
        with self.opener() as storage:
            self.assertEqual(14 if FULL else 8, fetch_by_all(self, storage))
        sample = make_sample(os.path.join(self.dir, "sample"))
        with cstor.Storage.open(sample.root) as storage:
            self.assertEqual(21 if FULL else 12, fetch_by_all(self, storage))

    # -- broken ones -----------------------------------------------------------------------------

    def test_every_cut(self) -> None:
        call = json.dumps(get_layer(diff_id=self.digest)) + "\0"
        for data in (json.dumps(self.good()).encode(), json.dumps(self.files()).encode(),
                     call.encode()):
            self.assertEqual(b"", self.answered(b"").data)
            for cut in range(1, len(data)):
                answer = json.loads(self.answered(data[:cut]).data.rstrip(b"\0"))
                if "parameters" not in answer:
                    self.assertEqual((-32700, None), (answer["error"]["code"], answer["id"]))
        self.served_well()

    def test_clients_that_go(self) -> None:
        need_proc()
        with self.running(timeout=5.0):
            for request, count in itertools.product(
                    (self.request("StreamLayer", layer=self.big, threshold=10),
                     self.files(self.big),
                     self.request("StreamLayer", layer=self.big, threshold=10**9)),
                    (0, 1, 100, 1000, 10_000, 300_000)):
                dumb = self.dumb()
                dumb.send(request)
                with contextlib.suppress(EOFError):
                    while len(dumb.data) < count and b'"result"' not in dumb.data:
                        dumb.fill()
                dumb.close()
            for read in (False, True):
                dumb = self.dumb()
                dumb.call(diff_id=sha256(self.big_tar))
                fds = dumb.frame()[1]
                if read:
                    os.read(fds[0], 100)
                close_all(fds)
                dumb.close()
            dumb = self.dumb()
            dumb.send(self.good())
            self.assertEqual(self.tar, dumb.notified()[0])
            dumb.close()

    def test_wrong_requests(self) -> None:
        ask, layer, listing = self.request, self.layer, self.request("ListImages")
        for code, *requests in (
                (-32600, {"jsonrpc": "2.0", "id": 1}, {"jsonrpc": "1.0", "id": 1},
                 {"id": 1, "method": "ListImages"}, {**listing, "id": {}}, {**listing, "method": 5},
                 ask("ListImages", True), ask("ListImages", [1]),
                 {"jsonrpc": "2.0", "result": {}, "id": 1}, b"[]",
                 b'[{"jsonrpc":"2.0","method":"ListImages","id":1}]', b'{"a":"' + b"x" * 100),
                (-32700, b'{"jsonrpc":"2.0","method":"ListImages","id":1e999}', b"}", b"x",
                 b'{"a":1,"a":1}', b'{"a":NaN}', b'{"jsonrpc":"2.0","\xff":1}', b"\0",
                 b'{"a":' * 70, b'{"a":%s}' % (b"1" * 5000)),
                (-32601, ask("Nothing"), ask("__init__"), ask("run"),
                 ask("GetSplitFDStream", layerId=layer)),
                (-32602, {**ask("StreamLayer"), "params": [1]}, ask("StreamLayer"),
                 *(ask("StreamLayer", layer=wrong) for wrong in (5, "")),
                 *(ask("StreamLayer", layer=layer, threshold=wrong)
                   for wrong in (-1, True, "1", 1 << 64)),
                 self.files(maxFds=-1), self.files(compressed=True)),
                (-32000, self.files("nothing"), ask("GetLayer", layer="../x"),
                 ask("StreamLayer", layer="\ud800"), ask("StreamLayer", layer="a\0b")),
                (-32001, ask("GetImage", imageId="nothing"), ask("CloseImage", image_id=1),
                 ask("GetLayerTarSplit", image_id=9, layer_digest="x"),
                 *(ask("OpenImage", image_ref=wrong) for wrong in (
                     "nothing", "containers-storage:[overlay@/x]tiny", "docker://x"))),
                (-32050, {**listing, "fds": 1}, (listing, [self.a]), {**listing, "fds": 1 << 40},
                 {**ask("x"), "fds": -1},
                 ask("ListImages", x={"__jsonrpc_fd__": True, "index": 0}))):
            for request in requests:
                limit = 90 if isinstance(request, bytes) and b"xxx" in request else 1 << 20
                with self.subTest(code=code, request=str(request)[:80]), \
                        mock.patch.object(cstor, "MAX_REQUEST", limit):
                    answer = json.loads(self.answered(request).data)
                    self.assertEqual(code, answer["error"]["code"], answer)
                    self.assertLessEqual({"jsonrpc", "error", "id"}, set(answer))
        # What is no request has no answer, and an error does not end a conversation.
        dumb = self.answered({"jsonrpc": "2.0", "method": "ListImages"}, ask("x", 1), ask("y", "2"),
                             ask("ListImages", None), {"jsonrpc": "2.0", "method": "shutdown"},
                             ask("ListImages", 3))
        got = [dumb.message()[0] for _ in range(3)]
        self.assertEqual([1, "2", None], [value["id"] for value in got])
        self.assertEqual(b"", dumb.data)
        self.served_well()

    def test_wrong_calls(self) -> None:
        describe = {"method": "org.varlink.service.GetInterfaceDescription"}
        for name, *calls in (
                ("org.varlink.service.InterfaceNotFound", {"method": "a.b"},
                 {"method": "org.varlink.GetInfo"}, {"method": "ListImages"},
                 {**describe, "parameters": {"interface": "x"}}),
                ("org.varlink.service.MethodNotFound", {"method": OCI + "No"}),
                ("org.varlink.service.InvalidParameter", describe),
                (OCI + "InvalidRequest", {"method": 5}, {},
                 {**get_layer(diff_id=self.digest), "more": False},
                 {"method": OCI + "GetLayer", "more": True}, get_layer(diff_id=None, storage=None)),
                (OCI + "NoSuchLayer", get_layer(diff_id="sha256:" + "0" * 64)),
                (OCI + "RepoNotFound", get_layer(storage=[]), *(
                    get_layer(storage={"storage_path": path, "layer_id": layer})
                    for path, layer in (("/x\0", self.layer), ("/x\ud800", "x"))))):
            for call in calls:
                with self.subTest(call=call):
                    dumb = self.answered(json.dumps(call).encode() + b"\0")
                    self.assertEqual(name, dumb.frame()[0]["error"])
        dumb = self.answered(b'{"method": "org.varlink.service.GetInfo"}\0',
                             b'{"method": "a.b", "oneway": true}\0', b"{]\0")
        self.assertIn("interfaces", dumb.frame()[0]["parameters"])
        self.assertIn("error", dumb.frame()[0])
        self.assertEqual(b"", dumb.data)

    def test_random_damage(self) -> None:
        rng = random.Random(18)
        image = {"storage_path": self.store.root, "layer_id": self.layer}
        recorded = [[json.dumps(value).encode() for value in values] for values in (
            (self.request("Initialize", 1),
             self.request("OpenImage", 2, image_ref="containers-storage:localhost/tiny:1"),
             self.request("GetLayerTarSplit", 3, image_id=1, layer_digest=self.digest),
             self.request("CloseImage", 4, image_id=1), self.request("Shutdown", 5)),
            (self.good(),), (self.files(threshold=10, maxFds=5),),
            (self.request("GetImage", imageId=self.image),))]
        recorded += [[json.dumps(value).encode() + b"\0" for value in values] for values in (
            (get_layer(diff_id=self.digest, storage=None),),
            ({"method": "org.varlink.service.GetInfo"}, get_layer(storage=image)))]
        with mock.patch.object(threading, "excepthook", side_effect=AssertionError):
            for i in range(2500 if FULL else 600):
                data = [bytearray(part) for part in rng.choice(recorded)]
                fds: list[list[int]] = [[] for _ in data]
                for _ in range(rng.choice((1, 1, 1, 2, 5))):
                    damage(rng, data, fds, [self.a] * (rng.random() < 0.02))
                self.answered(*((bytes(part), passed) for part, passed in zip(data, fds) if part))
                if i % 500 == 0:
                    self.served_well()
        self.served_well()

    # -- slow ones and many ----------------------------------------------------------------------

    def test_others_are_served_meanwhile(self) -> None:
        with self.running(timeout=0.5, idle=0.5):
            idle, never_reads, pipes, drip = slow = [self.dumb() for _ in range(4)]
            never_reads.send(self.request("StreamLayer", layer=self.big, threshold=10**9))
            pipes.call(diff_id=sha256(self.big_tar))
            drip.send(b'{"jsonrpc":')
            for _ in range(3):
                dumb = self.dumb()
                dumb.send(self.request("StreamLayer", layer=self.big, threshold=10))
                self.assertEqual(self.big_tar, dumb.notified()[0])
                dumb.close()
            for client in (idle, drip):  # each is left alone after its time
                self.assertRaises(EOFError, client.fill)
            for client in slow:
                client.end()
                client.close()

    def test_a_hundred_clients(self) -> None:
        done: list[Any] = []

        def fetch() -> None:
            try:
                with cstor.RpcClient(self.path, timeout=30) as client, \
                        client.layer(self.layer, threshold=10) as stream:
                    done.append(stream.export(io.BytesIO()))
            except cstor.CstorError as error:
                done.append(str(error))

        for room, count in ((100, 100), (5, 9)):  # those that only sit there make room for others
            done.clear()
            with self.running(clients=room):
                held = [self.dumb() for _ in range(5)]
                for dumb in held[1:]:  # they are known to be served
                    dumb.ask("ListImages")
                    dumb.message()
                held[2].send(b'{"half":')
                threads = [threading.Thread(target=fetch) for _ in range(count)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
                for dumb in held:
                    if room == 5:
                        self.assertRaises(EOFError, dumb.fill)
                    dumb.close()
            self.assertEqual([self.digest] * count, done)

    def test_a_server_full_of_busy_clients(self) -> None:
        with self.running(clients=2):
            held = [self.dumb() for _ in range(2)]
            for dumb in held:
                dumb.ask("StreamLayer", layer=self.big, threshold=10**9)
                dumb.fill()
            with cstor.RpcClient(self.path) as client, \
                    self.assertRaisesRegex(cstor.ProtocolError, "too many clients"):
                client.layers()
            for dumb in held:
                self.assertEqual(self.big_tar, dumb.notified()[0])
                dumb.close()

    def test_stop(self) -> None:
        self.server.stop()  # before it runs, and again afterwards
        with cstor.ListeningSocket(self.path) as listener:
            self.server.serve(listener)
        with open(os.path.join(self.dir, "other"), "w+b") as other:
            self.server.stop()
            self.assertEqual(b"", other.read())
        for request in (None, self.request("StreamLayer", layer=self.big, threshold=10**9)):
            with self.running(grace=0.3) as server:
                dumb = self.dumb()
                dumb.ask("ListImages")
                dumb.message()
                if request:
                    dumb.send(request)
                    dumb.fill()
                server.stop()
                dumb.end()
                dumb.close()
        # One who comes while it ends is told so.
        answer = json.loads(self.answered(self.good()).data)
        self.assertIn("shutting down", answer["error"]["message"])

    def test_another_user_is_refused(self) -> None:
        need(os.geteuid() == 0, "only root can become somebody else")
        code = ("import os, sys, json, socket; sock = socket.socket(socket.AF_UNIX); "
                "os.setgid(65534); os.setuid(65534); sock.connect(sys.argv[1]); "
                "print(sock.recv(9999).decode())")
        with self.running():
            os.chmod(self.dir, 0o711)
            os.chmod(self.path, 0o666)
            done = subprocess.run([sys.executable, "-c", code, self.path], timeout=30, check=True,
                                  stdout=subprocess.PIPE)
            answer = json.loads(done.stdout)
            self.assertEqual((-32603, "this server serves only uid 0 and root"),
                             (answer["error"]["code"], answer["error"]["message"]))
            client = self.dumb()
            client.send(self.good())
            self.assertEqual(self.tar, client.notified()[0])
            client.close()


class Serving(StoreTest):
    """The server as a program, and the commands that read from it."""

    def setUp(self) -> None:
        super().setUp()
        self.store = self.sample()
        self.guard(self.store.root)
        self.path = os.path.join(self.dir, "socket")
        self.out = os.path.join(self.dir, "out")
        self.opener = functools.partial(cstor.Storage.open, self.store.root)
        with self.opener() as storage:
            self.digests = {layer.id: layer.diff_digest for layer in storage.layers()
                            if layer.diff_digest}
            self.writable, = {layer.id for layer in storage.layers()} - set(self.digests)
        self.layer = min(self.digests)

    def ask(self, *words: str, status: int = 0, said: str = "") -> Done:
        """Run a command that reads a layer from the server; check what it says."""
        done = self.run_cstor("layer", *words, "--socket", self.path, status=status)
        self.assertIn(said, done.err)
        return done

    def served(self, *args: str, **kwargs: Any
               ) -> ContextManager[subprocess.Popen[bytes]]:
        return self.serve(self.store.root, *(args or ("--socket", self.path)), **kwargs)

    def test_export_from_a_server(self) -> None:
        with self.served():
            self.assertEqual(0o600, stat.S_IMODE(os.stat(self.path).st_mode))
            for layer, digest in self.digests.items():
                done = self.ask("export", "-v", layer)
                self.assertEqual((digest, f"cstor: layer {layer}: {digest}\n"),
                                 (sha256(done.stdout), done.err))
            self.ask("export", self.layer, "-o", self.out)
            self.assertEqual(self.digests[self.layer], sha256(read_bytes(self.out)))
            done = self.ask("export", "nothing", status=3)
            self.assertEqual("cstor: error: layer not known: nothing\n", done.err)
            self.ask("export", self.writable, status=6,
                     said="it is the writable layer of a container")
        self.assertFalse(os.path.lexists(self.path))

    def test_extract_from_a_server(self) -> None:
        near, far = (os.path.join(self.dir, name) for name in ("near", "far"))
        with self.served():
            for layer in self.digests:
                self.run_on(self.store, "layer extract", layer, near)
                done = self.ask("extract", layer, far, "--format", "json")
                self.assertEqual(far, done.json["directory"])
                rows = differences(seen_on_disk(near), seen_on_disk(far))
                implicit = [(name, "mtime") for name in (b"", b"etc", b"srv", b"usr", b"usr/share")]
                self.assertEqual([], [row for row in rows if row[:2] not in implicit])
                shutil.rmtree(near)
                shutil.rmtree(far)
            self.ask("extract", "nothing", far, status=3)
            self.assertFalse(os.path.exists(far))
            self.ask("extract", "--root", self.store.root, self.layer,
                     os.path.join(self.store.root, "far"), status=6, said="is inside the storage")

    def test_whoever_asks_by_digest_gets_that_layer_or_an_error(self) -> None:
        """No server is believed that gives another one, or names no digest at all."""
        wanted, other = sorted(self.digests.values())[:2]
        tar = b"".join(iter([entry(b"x", b"y"), END]))

        def said(params: dict[str, Any], ask: Callable[[Any], cstor.LayerStream],
                 kind: Any = cstor.RpcClient) -> str:
            ours, theirs = socket.socketpair()
            with theirs, kind(ours, timeout=5) as client:
                peer = cstor.Connection(theirs)
                for method, more in (
                        (f"{kind is cstor.RpcClient and 'stream' or 'layer'}.start", params),
                        ("stream.seg", {"data": base64.b64encode(tar).decode()}),
                        ("stream.end", {})):
                    peer.send({"jsonrpc": "2.0", "method": method, "params": more})
                peer.send({"jsonrpc": "2.0", "result": {}, "id": 1})
                with ask(client) as stream:
                    return stream.export(io.BytesIO())

        for kind, ask in ((cstor.RpcClient, lambda client: client.layer(wanted)),
                          (cstor.ProxyV2Client, lambda client: client.image_layer(1, wanted))):
            for params in ({"digest": other}, {"digest": sha256(tar)}, {}):
                with self.subTest(kind=kind, params=params), \
                        self.assertRaises(cstor.IntegrityError):
                    said(params, ask, kind)
        self.assertEqual(sha256(tar), said({"digest": sha256(tar)},
                                           lambda client: client.layer("by-name")))

    @contextlib.contextmanager
    def saying(self, *messages: dict[str, Any], hold: bool = False, ask: bool = True
               ) -> Iterator[list[int]]:
        """Run a server that says only this, as far as it is wanted; give how much that was."""
        sent: list[int] = []

        def answer() -> None:
            while True:
                try:
                    sock = listener.accept()[0]
                except OSError:  # the listener was shut down
                    return
                with sock, contextlib.suppress(OSError, cstor.ProtocolError):
                    connection = cstor.Connection(sock, either=True)
                    if ask and (not connection.receive() or connection.varlink):
                        continue
                    for number, message in enumerate(messages):
                        connection.send({"jsonrpc": "2.0", **message})
                        sent.append(number)
                    while hold and sock.recv(99):
                        pass

        with cstor.ListeningSocket(self.path) as listener:
            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            try:
                yield sent
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join(30)

    def test_a_server_without_a_digest(self) -> None:
        """It is said before the transfer, unless the user says what to do."""
        tar = entry(b"x", b"y") + END
        large = base64.b64encode(bytes(1 << 20)).decode()
        said: list[dict[str, Any]] = [
            {"method": "stream.start", "params": {}},
            {"method": "stream.seg", "params": {"data": base64.b64encode(tar).decode()}},
            {"method": "stream.end", "params": {}}]
        answer = {"result": {}, "id": 1}

        def ask(said: str, *words: str, status: int = 0) -> None:
            remove(self.out)
            self.ask(*words, status=status, said=said)
            self.assertEqual(status == 0, os.path.exists(self.out))

        export, extract = ("export", "x", "-o", self.out), ("extract", "x", self.out)
        with self.saying(said[0], *[{"method": "stream.seg", "params": {"data": large}}] * 99
                         ) as sent:
            for command in (export, extract):
                ask("layer x: the server sent no digest, so its tar cannot be verified ("
                    "use --digest SHA256 or --no-verify)", *command, status=4)
            self.assertLess(len(sent), 20)
        with self.saying(*said, answer):
            for command in (export, extract):
                ask("its tar has the wrong digest", *command, "--digest", sha256(b""), status=4)
                for words in (["--digest", "sha256:0"], ["--digest", sha256(b"").upper()],
                              ["--digest", sha256(tar), "--no-verify"]):
                    ask("--digest", *command, *words, status=2)
                ask("", *command, "--digest", sha256(tar))
                ask("", *command, "--no-verify")
            self.assertEqual(b"y", read_bytes(os.path.join(self.out, "x")))
            ask("--verify cannot be used with --no-verify", *extract, "--verify", "--no-verify",
                status=2)
        known = {**said[0], "params": {"digest": sha256(b"other")}}
        with self.saying(known, *said[1:], answer):
            for command in (export, extract):
                ask("sends another layer", *command, "--digest", sha256(tar), status=4)
        with self.saying(*said, hold=True, ask=False):  # a server that talks first
            for command in (("export", "-", "-o", self.out), ("extract", "-", self.out)):
                ask("the server sent no digest", *command, status=4)
                ask("", *command, "--digest", sha256(tar))
                ask("", *command, "--no-verify")

    def test_digests_of_the_storage(self) -> None:
        digest = self.digests[self.layer]
        for status, words, said in (
                (0, f"export -o {self.out} --digest {digest}", ""),
                (4, f"export -o {self.out}2 --digest {sha256(END)}", "differs from --digest"),
                (2, f"export -o {self.out}2 --digest x", "--digest"),
                (2, f"extract {self.out}2 --digest {digest}", "needs --socket"),
                (2, f"extract {self.out}2 --no-verify", "needs --socket")):
            command, *more = words.split()
            done = self.run_on(self.store, "layer", command, self.layer, *more, status=status)
            self.assertIn(said, done.err)
        self.assertFalse(os.path.exists(self.out + "2"))

    def test_nobody_is_waited_for_longer(self) -> None:
        """... than --timeout says: to begin, inside a message, inside a layer."""
        start = {"jsonrpc": "2.0", "method": "stream.start", "params": {"digest": sha256(b"x")}}
        for said in ([], [{"fds": 1, **start}], [start]):
            with self.saying(*said, hold=True):
                for command in (("export", "x"), ("extract", "x", self.out)):
                    begin = time.monotonic()
                    self.ask(*command, "--timeout", "0.3", status=6,
                             said="for 0.3 seconds (--timeout SECONDS waits longer)")
                    self.assertLess(time.monotonic() - begin, 15)
        with self.served("--timeout", "0.3", "--socket", self.path):
            with cstor.connect(self.path) as sock:
                sock.sendall(b"{")
                sock.settimeout(20)
                self.assertEqual(b"", sock.recv(99))
        for wrong in ("0", "-1", "x", "nan", "inf", ""):
            done = self.run_cstor("--timeout", wrong, "image", "list", status=2)
            self.assertRegex(done.err, "--timeout(:| must be a number of seconds above 0)")

    def test_idle_clients_make_room(self) -> None:
        with self.served(), contextlib.ExitStack() as stack:
            for _ in range(64):
                stack.enter_context(cstor.connect(self.path))
            begin = time.monotonic()
            self.assertEqual(self.digests[self.layer],
                             sha256(self.ask("export", self.layer).stdout))
            self.assertLess(time.monotonic() - begin, 15)

    def test_a_server_of_another_user_is_not_asked(self) -> None:
        """It could have a file opened for it that is closed to it."""
        need(os.geteuid() == 0, "only root can be another user")
        os.chmod(self.dir, 0o777)
        child = os.fork()
        if not child:
            try:
                os.setuid(65534)
                with cstor.ListeningSocket(self.path) as listener:
                    with listener.accept()[0] as sock:
                        sock.recv(1)
            finally:
                os._exit(0)
        wait_for(lambda: os.path.exists(self.path))
        self.ask("export", "x", status=6, said="runs as uid 65534, neither root nor you")
        os.waitpid(child, 0)

    def test_no_output_into_a_store(self) -> None:
        link = os.path.join(self.dir, "link")
        os.symlink(os.path.join(self.store.root, "overlay"), link)
        with self.served():
            for words, place in itertools.product(
                    (f"layer export {self.layer}", f"layer stream {self.layer}",
                     "image export sample", f"layer export {self.layer} --socket {self.path}"),
                    (self.store.root, link)):
                done = self.run_on(self.store, words, "-o", place + "/out", status=6)
                self.assertIn("is inside the storage", done.err)
            done = self.run_on(self.store, "image extract --via-skopeo containers-storage:x",
                               link + "/out", status=2)
            self.assertIn("without --via-skopeo", done.err)

    def test_the_reason_of_a_failure_comes_through(self) -> None:
        need_proc()
        self._root = ""  # this test changes the store itself
        with self.opener() as storage:
            layer = storage.image("app:1").layers()[0].id
        os.unlink(os.path.join(self.store.root, "overlay", layer, "diff/etc/os-release"))
        for form in ("varlink", "stream", "splitfdstream"):
            kind = cstor.VarlinkClient if form == "varlink" else cstor.RpcClient
            with self.subTest(form=form), serving(self.path, opener=self.opener), \
                    self.assertRaisesRegex(cstor.IntegrityError, "os-release.* is missing"), \
                    kind(self.path) as client, client.layer(layer, form) as stream:
                stream.export(io.BytesIO())

    def test_a_full_server_says_so_and_a_silent_one_is_asked_once(self) -> None:
        with serving(self.path, opener=self.opener, clients=0), \
                self.assertRaisesRegex(cstor.ProtocolError, "too many clients"):
            cstor.fetch_layer(self.path, self.layer)
        with cstor.ListeningSocket(self.path) as listener:
            with self.assertRaisesRegex(cstor.ProtocolError, "done nothing for 0.1 seconds"):
                cstor.fetch_layer(self.path, self.layer, timeout=0.1)
            listener.accept()[0].close()
            self.assertEqual([], select.select([listener], [], [], 0)[0])

    def test_a_server_of_varlink_is_asked_in_no_other_way(self) -> None:
        """It would wait for a NUL byte, and we for it."""
        refusal = "org.varlink.service.MethodNotFound"

        def answer() -> None:
            with listener.accept()[0] as sock:
                dumb = Dumb(sock)
                dumb.frame()
                dumb.send({"error": refusal, "parameters": {"method": "m"}}, end=b"\0")

        with cstor.ListeningSocket(self.path) as listener:
            thread = threading.Thread(target=answer)
            thread.start()
            with self.assertRaisesRegex(cstor.ProtocolError, f"^{refusal}: m$"):
                cstor.fetch_layer(self.path, self.layer, timeout=5.0)
            thread.join()

    def test_messages_that_never_end(self) -> None:
        for piece in (b" ", b'{"a":"', b"x"):
            ours, theirs = socket.socketpair()
            with ours, cstor.Connection(theirs, timeout=0.3) as connection:
                stop = threading.Event()

                def drip(sock: Any = ours, piece: bytes = piece, stop: Any = stop) -> None:
                    with contextlib.suppress(OSError):
                        while not stop.wait(0.05):
                            sock.sendall(piece)

                thread = threading.Thread(target=drip)
                thread.start()
                with self.assertRaises(cstor.ProtocolError):
                    connection.receive()
                stop.set()
                thread.join()

    def test_messages_of_too_many_parts(self) -> None:
        for data in (b"[],", b'"",'):
            ours, theirs = socket.socketpair()
            with ours, cstor.Connection(theirs, timeout=5, max_message=1 << 16) as connection:
                ours.sendall(b'{"a":[' + data * 5000)
                with self.assertRaisesRegex(cstor.ProtocolError, "too many parts"):
                    connection.receive()

    def test_a_record_that_looks_like_a_descriptor(self) -> None:
        self._root = ""
        path = os.path.join(self.store.root, "overlay-images/images.json")
        records = read_json(path)
        records[0]["metadata"] = {"__jsonrpc_fd__": True, "index": 0}
        put(path, json.dumps(records))
        with self.served(), cstor.RpcClient(self.path, timeout=5) as client:
            self.assertEqual(len(records), len(client.images()))

    def test_notifications_are_never_answered(self) -> None:
        with self.served(), cstor.RpcClient(self.path, timeout=5) as client:
            for wrong in ({"method": "ListImages", "params": [1]}, {"method": 5},
                          {"method": "shutdown", "params": [1]}):
                client.connection.send({"jsonrpc": "2.0", **wrong})
            self.assertEqual(len(self.digests) + 1, len(client.layers()))

    def test_a_signal_just_before_the_server_waits(self) -> None:
        """Its handler runs when the waiting ends by itself, as no signal does that any more."""
        with cstor.ListeningSocket(self.path) as listener:
            server = cstor.RpcServer(self.opener)
            thread = threading.Thread(target=server.serve, args=(listener,))
            thread.start()
            cstor.RpcClient(self.path).close()
            server._stopping = True  # all that stop() does but to wake
            thread.join(20)
            self.assertFalse(thread.is_alive())
        wait_for(lambda: threading.active_count() == 1)  # who serves the client closes it

    def test_hangups(self) -> None:
        with self.served(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as server:
            server.send_signal(signal.SIGHUP)
            self.ask("export", self.layer)
        with self.on_stdin() as (ours, server):
            client = cstor.RpcClient(ours)
            client.layers()
            server.terminate()
            self.assertEqual(0, server.wait(30))
            client.close()

    @contextlib.contextmanager
    def on_stdin(self) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
        """Give a socket whose other end is the stdin of a server, which ends well."""
        need_proc()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server = subprocess.Popen([*COMMAND, "--root", self.store.root, "serve"],
                                      stdin=theirs.fileno(), env=IDLE)
            theirs.close()
            yield ours, server
        self.assertEqual(0, server.wait(30))

    def test_no_server(self) -> None:
        need_proc()
        self.ask("export", "x", status=3, said="no server listens at")
        self.ask("export", "x", status=3, said="serve --socket")
        put(self.path)
        self.ask("export", "x", status=3)
        for status, words, said in (
                (6, f"--socket {self.path}", "it is not a socket"), (2, "", "--socket PATH"),
                (6, f"--socket {self.store.root}/socket", "is inside the storage")):
            done = self.run_on(self.store, "serve " + words, status=status)
            self.assertIn(said, done.err)

    def test_a_killed_server_is_replaced_and_a_living_one_is_not(self) -> None:
        need_proc()
        with contextlib.suppress(AssertionError), self.served() as server:
            server.kill()
            server.wait()
        self.assertTrue(os.path.lexists(self.path))
        with self.served():
            done = self.run_on(self.store, "serve --socket", self.path, status=6)
            self.assertIn("another server listens there", done.err)
            self.ask("export", self.layer)

    def test_a_socket_on_stdin(self) -> None:
        with self.on_stdin() as (ours, _), cstor.RpcClient(ours) as client, \
                client.layer(self.layer) as stream:
            self.assertEqual(self.digests[self.layer], stream.export(io.BytesIO()))

    def test_a_socket_of_systemd(self) -> None:
        need_proc()
        with cstor.ListeningSocket(self.path) as listener:
            script = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True); "
                      "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
                      "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])")
            server = subprocess.Popen(
                [sys.executable, "-c", script, str(listener.fileno()), SCRIPT, "--root",
                 self.store.root, "serve", "-q"], pass_fds=[listener.fileno()], env=IDLE)
            done = self.ask("export", self.layer)
            self.assertEqual(self.digests[self.layer], sha256(done.stdout))
            server.terminate()
            self.assertEqual(0, server.wait(30))
            self.assertTrue(os.path.lexists(self.path))  # it is not the server's to remove

    def test_records_are_read_anew(self) -> None:
        self._root = ""  # this test changes the store itself
        with self.served(), cstor.RpcClient(self.path) as client:
            before = client.layers()
            self.assertEqual({self.writable, *self.digests}, {layer["id"] for layer in before})
            path = os.path.join(self.store.root, "overlay-layers/layers.json")
            put(path + ".new", json.dumps(read_json(path)[:1]))
            os.rename(path + ".new", path)
            self.assertEqual([before[0]["id"]], [layer["id"] for layer in client.layers()])

    def test_a_server_that_dies_inside_a_layer(self) -> None:
        with self.saying({"method": "stream.start", "params": {"digest": sha256(b"x")}},
                         {"method": "stream.seg", "params": {"data": "AAAA"}}):
            self.ask("export", "x", "-o", self.out, status=6,
                     said="the other end has closed the connection")
            self.assertFalse(os.path.exists(self.out))


# ================================================================================================
# 22. Clients
# ================================================================================================

class DumbServers(MessageTest):
    """Our clients and a server from WIRE.md alone: every spelling, and whatever can go wrong."""

    def test_every_spelling(self) -> None:
        whole = {"digest": self.digest, "size": self.size}
        for segment in ("stream.seg", "stream.segment", "layer.segment"):
            for file in ("stream.file", "layer.file"):
                some: tuple[dict[str, Any], ...] = (
                    {"start": whole}, {"start": {}}, {"placeholder": True},
                    {"placeholder": True, "fds": False}, {"end": {"files_sent": 2}},
                    {"end": {"checksum": self.digest}},
                    {"end": {"files": 2, "digest": self.digest, "more": [1]}},
                    {"start": {"uncompressed_size": self.size, "digest": self.digest}})
                for options, form in itertools.product(some, ("stream", "proxy")):
                    said = self.notifications(segment=segment, file=file, **options)
                    self.assertEqual(self.tar, self.fetched(form, saying(said)))
        results: tuple[dict[str, Any], ...] = (
            {}, whole, {"mediaType": "application/vnd.containers.splitfdstream"})
        for result in results:
            self.assertEqual(self.tar, self.fetched("splitfdstream",
                                                    saying(self.response(**result))))

    def test_messages_cut_and_joined(self) -> None:
        """What one read brings is nothing to rely on: here it is 1 byte, or 2, or all."""
        def one_by_one(dumb: Dumb) -> None:
            for value, fds in said:
                data = json.dumps(value).encode()
                dumb.send(data[:1], fds)
                dumb.send(data[1:])

        def at_once(dumb: Dumb) -> None:
            dumb.send(b"\n\t \r".join(json.dumps(value).encode() for value, _ in said) + b"\n",
                      [fd for _, fds in said for fd in fds])

        def late(dumb: Dumb) -> None:
            for value, fds in said:
                dumb.send(value)
                for fd in fds:
                    dumb.send(b" ", [fd])

        def last_byte(dumb: Dumb) -> None:
            for value, fds in said:
                data = json.dumps(value, indent=3).encode()
                dumb.send(data[:-1])
                dumb.send(data[-1:], fds)

        def in_the_middle(dumb: Dumb) -> None:
            for value, fds in said:
                data = json.dumps(value, ensure_ascii=False).encode()
                for i, fd in enumerate([*fds, 0][:-1]):
                    dumb.send(data[i * 9:i * 9 + 9], [fd])
                dumb.send(data[len(fds) * 9:])

        for form, said in self.conversations():
            said[0][0]["\u20ac\u00e9"] = '"\\}]{[\\"'
            for way in (at_once, one_by_one, late, last_byte, in_the_middle):
                for size in (1, 2, 3, 1000):
                    with mock.patch.object(cstor, "RECEIVE_SIZE", size):
                        self.assertEqual(self.tar, self.fetched(form, way))

    def test_slow_bytes(self) -> None:
        (value, fds), = self.response()

        def send(dumb: Dumb) -> None:
            for byte in json.dumps(value).encode():
                dumb.send(bytes([byte]))
                time.sleep(0.0005)
            for fd in fds:
                time.sleep(0.01)
                dumb.send(b" ", [fd])

        with self.pair() as (ours, dumb), cstor.RpcClient(ours, timeout=10) as client:
            thread = threading.Thread(target=send, args=(dumb,))
            thread.start()
            with client.layer("x", "splitfdstream") as stream:
                self.assertEqual(self.digest, stream.export(io.BytesIO()))
            thread.join()

    def test_hundreds_of_descriptors(self) -> None:
        names = [b"%d" % i for i in range(400)]
        members = [entry(name, b"%03d" % i) for i, name in enumerate(names)]
        stream = b"".join(inline(member[:512]) + in_file(i) + inline(member[515:])
                          for i, member in enumerate(members)) + inline(END)
        fds = [self.file("many", stream), *(self.file(os.fsdecode(name), b"%03d" % i)
                                            for i, name in enumerate(names))]
        value = {"jsonrpc": "2.0", "result": {}, "id": 1, "fds": 401}
        for batch in (253, 100, 7):
            def say(dumb: Dumb, batch: int = batch) -> None:
                dumb.send(value, fds, batch=batch)

            self.assertEqual(b"".join(members) + END, self.fetched("splitfdstream", say))

    def test_versions_of_a_proxy(self) -> None:
        results: tuple[dict[str, Any], ...] = (
            {"value": {"version": "1.0.0", "v1_compat": "0.2.8"}},
            {"version": "2.0.0", "capabilities": ["tar-split-stream"]})
        for result in results:
            with self.pair() as (ours, dumb):
                for number, answer in enumerate((result, {"image_id": 3}, {}, {}), 1):
                    dumb.send({"jsonrpc": "2.0", "result": answer, "id": number})
                with cstor.ProxyV2Client(ours, timeout=9) as client:
                    self.assertIn("version", client.initialize())
                    self.assertEqual(3, client.open_image("containers-storage:x"))
                    client.close_image(3)
                    client.shutdown()
                asked = [dumb.message()[0] for _ in range(4)]
                self.assertEqual(["Initialize", "OpenImage", "CloseImage", "Shutdown"],
                                 [value["method"] for value in asked])
                self.assertEqual([1, 2, 3, 4], [value["id"] for value in asked])
        results = ({"version": "3.0.0"}, {}, {"value": 5})
        for result in results:
            with self.pair() as (ours, dumb), cstor.ProxyV2Client(ours) as client:
                dumb.send({"jsonrpc": "2.0", "result": result, "id": 1})
                with self.assertRaisesRegex(cstor.ProtocolError, "unknown proxy version"):
                    client.initialize()

    # -- varlink ---------------------------------------------------------------------------------

    def framed(self, *frames: tuple[Any, list[int]], size: int = 1 << 16, reference: str = "x"
               ) -> bytes:
        """Return the tar of frames, (object or bytes, descriptors)."""
        def say(dumb: Dumb) -> None:
            for value, fds in frames:
                data = value if isinstance(value, bytes) else json.dumps(value).encode() + b"\0"
                dumb.send(data[:1], fds)
                dumb.send(data[1:])

        with mock.patch.object(cstor, "RECEIVE_SIZE", size):
            return self.fetched("varlink", say, 5.0, reference)

    def test_a_server_that_answers_in_json_rpc(self) -> None:
        """It says that it does not understand, and then keeps its client: nothing is waited for."""
        for answer in (b'{"jsonrpc":"2.0","error":{"code":-32600,"message":"?"},"id":null}',
                       b'{"id":null,"error":{"code":-32700,"message":"?"}}\n'):
            with self.pair() as (ours, dumb), cstor.VarlinkClient(ours, timeout=20) as client:
                dumb.send(answer)
                with self.assertRaisesRegex(cstor.ProtocolError, "speaks JSON-RPC, not varlink"
                                            ) as caught:
                    client.layer("x")
                self.assertEqual(cstor.NO_METHOD, caught.exception.code)  # so others are tried

    def test_small_files_are_read_by_threshold(self) -> None:
        size = os.fstat(self.a).st_size
        for threshold in (0, size - 1, size, 1 << 40):
            with self.pipe(self.named) as (data, alive), self.pair() as (ours, dumb):
                dumb.send({"parameters": {"dir_count": 1}}, [data, self.folder, alive], b"\0")
                with cstor.VarlinkClient(ours) as client, \
                        client.layer("x", threshold=threshold) as stream:
                    passed = [piece.length for piece in stream.pieces()
                              if isinstance(piece, cstor.Extent)]
                    self.assertEqual([size] * (size > threshold), passed)

    def test_frames_of_varlink(self) -> None:
        for size in (1, 2, 7, 1 << 16):
            for extra in (0, 1, 2):
                with self.pipe(self.named) as (data, alive):
                    fds = [data, self.folder, alive, *[self.a] * extra]
                    value = {"parameters": {"dir_count": 1}}
                    self.assertEqual(self.tar, self.framed((value, fds), size=size))
                with self.pipe(self.named) as (data, alive):
                    fds = [data, self.folder, alive, *[self.a] * extra]
                    frames = [({"parameters": {"dir_count": 1}, "continues": fd != fds[-1:]}, fd)
                              for fd in (fds[i:i + 1] for i in range(3 + extra))]
                    frames[-1][0]["continues"] = False
                    for frame in frames[:-1]:
                        frame[0]["continues"] = True
                    self.assertEqual(self.tar, self.framed(*frames, size=size))
        # 300 directories, over two frames of 240 descriptors at most.
        with self.pipe(self.named.replace(in_directory(700, 0, b"a"), in_directory(
                700, 299, b"a"))) as (data, alive):
            fds = [data, *[self.folder] * 300, alive]
            self.assertEqual(self.tar, self.framed(*(
                ({"parameters": {"dir_count": 300}, "continues": at == 0}, fds[at:at + 240])
                for at in (0, 240))))

    def test_directories_that_are_none(self) -> None:
        """composefs puts /dev/null and memfds among them: it matters what a chunk names."""
        null = self.opened(os.open("/dev/null", os.O_RDONLY))
        memory = self.opened(os.memfd_create("dummy"))
        regions = [[null, memory], [memory, null], [self.a, null], [null, memory]]
        for at, region in itertools.product(range(3), regions):
            region = [*region[:at], self.folder, *region[at:]]
            stream = self.named.replace(in_directory(700, 0, b"a"), in_directory(700, at, b"a"))
            for frames in (1, 3):
                with self.pipe(stream) as (data, alive):
                    fds = [data, *region, alive, null, memory][:6]
                    self.assertEqual(self.tar, self.framed(*(
                        ({"parameters": {"dir_count": 3}, "continues": i < frames - 1},
                         fds[i * 6 // frames:(i + 1) * 6 // frames]) for i in range(frames))))
        for fd, what in ((null, "character device"), (memory, "regular file")):
            with self.pipe(self.named) as (data, alive), self.assertRaisesRegex(
                    cstor.ProtocolError, f"descriptor 0 is a {what}, not a directory") as caught:
                self.framed(({"parameters": {"dir_count": 2}}, [data, fd, self.folder, alive]))
            self.assertEqual(-32050, caught.exception.code)

    def test_a_service_of_repositories(self) -> None:
        """It wants a handle, which is opened when the caller has none."""
        no_handle = {"error": "org.composefs.Oci.InvalidHandle", "parameters": {"handle": 0}}
        opened = {"parameters": {"handle": 3, "hash_algorithm": "sha256"}}
        usual = {"user" if os.geteuid() else "system": True}

        def ask(handle: int) -> tuple[str, Any]:
            return "GetLayer", (handle, self.digest, None)

        cases: Any = (
                (self.digest, [no_handle, opened], {}, [ask(0), ("OpenRepository", usual), ask(3)]),
                (self.digest, [], {"handle": 7}, [ask(7)]))
        for reference, answers, options, asked in cases:
            with self.pipe(self.named) as (data, alive), self.pair() as (ours, dumb):
                for answer in answers:
                    dumb.send(answer, end=b"\0")
                dumb.send({"parameters": {"dir_count": 1}}, [data, self.folder, alive], b"\0")
                with cstor.VarlinkClient(ours, timeout=9) as client, \
                        client.layer(reference, **options) as stream:
                    self.assertEqual(self.digest, stream.export(io.BytesIO()))
                said = []
                for _ in asked:
                    value = dumb.frame()[0]
                    params = value["parameters"]
                    said.append((value["method"].rpartition(".")[2], (
                        params["handle"], params["params"]["diff_id"], params["params"]["storage"])
                        if "handle" in params else params))
                self.assertEqual(asked, said)
        with self.pair() as (ours, dumb), cstor.VarlinkClient(ours, timeout=9) as client:
            dumb.send(no_handle, end=b"\0")
            with self.assertRaisesRegex(cstor.ProtocolError, "InvalidHandle: 0"):
                client.layer(self.digest, handle=5)
        with self.pair() as (ours, dumb), cstor.VarlinkClient(ours, timeout=9) as client:
            dumb.send({"parameters": {"features": []}}, end=b"\0")
            client.call("org.composefs.Oci.GetInfo")
            self.assertEqual(({"method": "org.composefs.Oci.GetInfo"}, []), dumb.frame())

    def test_a_server_that_talks_first(self) -> None:
        """Notifications of one layer, to which no response belongs: its end is the end."""
        said = self.notifications()[:-1]
        for open_ in (True, False):
            with self.pair() as (ours, dumb), cstor.RpcClient(ours, timeout=9) as client:
                saying(said)(dumb)
                if not open_:
                    dumb.sock.shutdown(socket.SHUT_WR)
                with client.layer("x", "push") as stream:
                    self.assertEqual(self.digest, stream.export(io.BytesIO()))
                self.assertEqual([], select.select([dumb.sock], [], [], 0)[0])  # nothing was asked
        self.refused("closed the connection", "push", said[:-1])
        self.refused("expected stream.start", "push", said[1:])

    def test_parts_of_nothing(self) -> None:
        """Some are right, and without an end they are not."""
        empty: Any = ({"jsonrpc": "2.0", "method": "stream.seg", "params": {"data": ""}}, [])
        said = self.notifications()
        with mock.patch.object(cstor, "MAX_EMPTY", 9):
            self.assertEqual(self.tar, self.fetched("stream", saying(
                [*said[:2], *[empty] * 9, *said[2:]])))
            self.refused("more than 9 empty chunks", "stream", [
                *said[:2], *[empty] * 10, *said[2:]], error=cstor.FormatError)

    def test_a_digest_that_was_asked_for(self) -> None:
        """composefs's server does not say it again; what it sends is checked all the same."""
        for reference in (self.digest, sha256(b"")):
            with self.pipe(self.named) as (data, alive):
                said = ({"parameters": {"dir_count": 1}}, [data, self.folder, alive])
                if reference == self.digest:
                    self.assertEqual(self.tar, self.framed(said, reference=reference))
                    continue
                with self.assertRaisesRegex(cstor.IntegrityError, "wrong digest"):
                    self.framed(said, reference=reference)

    def test_wrong_frames_of_varlink(self) -> None:
        def refused(words: str, *frames: Any, stream: bytes = self.named, kinds: Any = (),
                    error: type[BaseException] = cstor.ProtocolError) -> None:
            with self.pipe(stream) as (data, alive), self.subTest(words=words, frames=frames):
                place = {"data": data, "dir": self.folder, "alive": alive, "file": self.a,
                         "write": alive, **dict(kinds)}
                with self.assertRaisesRegex(error, words):
                    self.framed(*((value, [place[name] for name in names.split()])
                                  for value, names in frames))

        def reply(count: Any, **more: Any) -> Any:
            return {"parameters": {"dir_count": count}, **more}

        for count in (0, 2, -1, 1.0, True, None, "1", 1 << 40):
            refused("3 file descriptors for" if count != 0 else "there is no directory 0",
                    (reply(count), "data dir alive"),
                    error=cstor.FormatError if count == 0 else cstor.ProtocolError)
        refused("file descriptors", (reply(1), ""))
        refused("file descriptors", (reply(1), "data dir"))
        refused("file descriptors", (reply(1), "data dir alive file file file"))
        refused("closed", (reply(1, continues=True), "data dir alive"))
        refused("with 0 file", (reply(1, continues=True), "data"), (reply(1), ""))
        refused("file descriptors for 1", (reply(1, continues=True), "data dir"),
                (reply(2), "alive"))
        refused("not a directory", (reply(1), "data file alive"))
        refused("not a pipe", (reply(1), "file dir alive"))
        refused("not a pipe", (reply(1), "dir dir alive"))
        refused("pipe", (reply(1), "write dir data"))
        fifo = os.path.join(self.dir, "fifo")
        os.mkfifo(fifo)
        for flags in (os.O_RDWR, os.O_PATH):
            fd = self.opened(os.open(fifo, flags))
            refused("pipe to read", (reply(1), "fifo dir alive"), kinds={"fifo": fd}.items())
        refused("no NUL byte", (b'{"parameters":{"dir_count":1}}', "data dir alive"))
        refused("no NUL byte", (b'{"parameters":{"dir_count":1}}{', "data dir alive"))
        refused("ended inside", (reply(1, continues=True), "data dir"), (b'{"parameters"', "alive"))
        refused("an array of messages", (b"[]\0", "data dir alive"))
        refused("malformed|no object", (b"\0", "data dir alive"))
        refused("malformed", (b'{"parameters":{"dir_count":1,"dir_count":1}}\0', "data dir alive"))
        refused("layer not known: y", ({"error": "org.composefs.Oci.NoSuchLayer",
                                        "parameters": {"diff_id": "y"}}, ""),
                error=cstor.LayerUnknown)
        refused("RepoNotFound: m", ({"error": "org.composefs.Oci.RepoNotFound",
                                     "parameters": {"message": "m"}}, "data"))
        for kind in (cstor.Ambiguous, cstor.NotFound, cstor.Unsupported, cstor.NeedsUnshare):
            refused("m", ({"error": "org.composefs.Oci.InternalError",
                           "parameters": {"message": "m", "kind": kind.__name__}}, ""), error=kind)
        for cut in range(len(self.named)):
            if self.named[max(cut - 9, 0):cut + 9] == bytes(18) and cut % 50 and not FULL:
                continue  # one of many zeros
            refused("cut off|no end", (reply(1), "data dir alive"), stream=self.named[:cut],
                    error=cstor.FormatError)
        for name, words in ((b"..", "file name"), (b"/a", "file name"), (b"fifo", "FIFO|fifo"),
                            (b"b", "another size"), (b".", "directory")):
            refused(words, (reply(1), "data dir alive"), error=cstor.CstorError,
                    stream=self.named.replace(in_directory(700, 0, b"a"), in_directory(
                        700, 0, name)))

    # -- faults ----------------------------------------------------------------------------------

    def test_every_cut(self) -> None:
        for form, said in self.conversations():
            data = b"".join(json.dumps(value, separators=(",", ":")).encode() for value, _ in said)
            at, starts = 0, {}
            for value, fds in said:
                starts[at] = fds
                at += len(json.dumps(value, separators=(",", ":")))
            ends = sorted(starts)[1:]
            bare = len(data) - len(json.dumps(said[-1][0], separators=(",", ":")))
            for cut in range(len(data)):
                if form in ("stream", "proxy") and cut == bare:
                    continue  # all but the response, see below
                if data[max(cut - 9, 0):cut + 9] == b"A" * 18 and cut % 50 and not FULL:
                    continue
                self.refused("closed|ended|mismatched", form, [
                    (data[start:min(end, cut)], starts[start])
                    for start, end in zip([0, *ends], [*ends, len(data)]) if start < cut])

    def test_an_end_without_a_response(self) -> None:
        """cstor-rs sends notifications alone: what comes to its end is whole."""
        for segment in ("stream.seg", "layer.segment"):
            said = self.notifications(segment=segment)[:-1]
            self.assertEqual(self.tar, self.fetched("stream", saying(said)))

    def test_each_descriptor_missing_or_too_many(self) -> None:
        for form, said in self.conversations():
            for i, (value, fds) in enumerate(said):
                for wrong in ([*fds, self.a], fds[1:], fds[:-1]):
                    if len(wrong) == len(fds):
                        continue
                    self.refused("mismatched|size", form, [*said[:i], (value, wrong),
                                                           *said[i + 1:]], error=cstor.CstorError)
                    if wrong:  # and it is said so
                        changed = {**value, "fds": len(wrong)}
                        self.refused("out of place|placeholders|stream|start|external file|ended",
                                     form, [*said[:i], (changed, wrong), *said[i + 1:]],
                                     error=cstor.CstorError) \
                            if form in ("stream", "proxy") or wrong == fds[:-1] else None

    def test_lies_about_descriptors(self) -> None:
        for form, said in self.conversations():
            for i in range(len(said)):
                counts: tuple[Any, ...] = (-1, 1.5, 1.0, True, False, "1", None, [], {}, 1 << 40,
                                           1 << 70, 254, 4095, 5000, 253)
                for count in counts:
                    value, fds = said[i]
                    error = self.refused("", form, [*said[:i], ({**value, "fds": count}, fds),
                                                    *said[i + 1:]])
                    self.assertEqual(-32050, error.code, (form, i, count, error))

    def test_placeholders(self) -> None:
        def file(*indices: Any, fds: Any = None, mark: Any = True) -> Any:
            marks = [{"__jsonrpc_fd__": mark, "index": index} for index in indices]
            return ({"jsonrpc": "2.0", "method": "stream.file", "params": {
                "name": "d/a", "size": 700, "fd": marks}, **({} if fds is None else {"fds": fds})},
                [self.a])

        said = self.notifications(placeholder=True, fds=False)
        self.assertEqual(self.tar, self.fetched("stream", saying([*said[:2], file(0), *said[3:]])))
        for wrong in (file(1), file(0, 0), file(0, 2), file(-1), file("0"), file(None), file(False),
                      file(0.0), file([0]), file(0, fds=2), file(0, 1, fds=1), file(0, fds=0),
                      file(0, mark=1), file(0, mark="true"), file()):
            error = self.refused("placeholders|mismatched|0 files", "stream",
                                 [*said[:2], wrong, *said[3:]])
            self.assertEqual(-32050, error.code, wrong)

    def test_kinds_of_descriptors(self) -> None:
        fifo = os.path.join(self.dir, "fifo")
        os.mkfifo(fifo)
        ends = [self.opened(fd) for fd in os.pipe()]
        read, write = os.pipe()
        os.close(write)  # a pipe that is closed at its other end
        path = os.path.join(self.dir, "a")
        pair = socket.socketpair()
        for sock in pair:
            self.addCleanup(sock.close)
        kinds = {
            "directory": self.opened(os.open(self.dir, os.O_RDONLY)), "pipe": ends[0],
            "end": ends[1], "closed": self.opened(read), "path": self.opened(os.open(
                path, os.O_PATH)), "write": self.opened(os.open(path, os.O_WRONLY)),
            "fifo": self.opened(os.open(fifo, os.O_RDWR)), "null": self.opened(os.open(
                "/dev/null", os.O_RDONLY)), "socket": pair[0].fileno(), "O_PATH": self.folder}
        good = self.opened(os.open(path, os.O_RDWR))
        removed = self.file("removed", self.A)
        os.unlink(os.path.join(self.dir, "removed"))
        for form, said in self.conversations():
            for i, (value, fds) in enumerate(said):
                for j in range(len(fds)):
                    for kind, fd in kinds.items():
                        error = self.refused("passed", form, [*said[:i], (value, [
                            *fds[:j], fd, *fds[j + 1:]]), *said[i + 1:]])
                        self.assertEqual(-32050, error.code, kind)
                    if fds[j] == self.a:
                        for fd in (good, removed):
                            self.assertEqual(self.tar, self.fetched(form, saying(
                                [(v, [fd if x == self.a else x for x in f]) for v, f in said])))
            for a, b in ((self.b, self.a), (self.a, self.a), (self.b, self.b)):
                self.refused("size", form, [(v, [{self.a: a, self.b: b}.get(x, x) for x in f])
                                            for v, f in said], error=cstor.IntegrityError)
        # The same size and another content: only the digest tells.
        other = self.file("other", b"A" * 700)
        for form, said in self.conversations():
            self.refused("wrong digest", form, [(v, [other if x == self.a else x for x in f])
                                                for v, f in said], error=cstor.IntegrityError)

    def test_wrong_order(self) -> None:
        said = self.notifications(start={"digest": self.digest})
        start, first, file, second, other, third, end, answer = said
        for form in ("stream", "proxy"):
            for wrong in (
                    said[1:], [start, *said], said[:-2] + [answer], said[:-2] + [end, end, answer],
                    [*said[:-2], end, second, answer], [*said[:-2], end, file, answer],
                    [start, answer], [answer], [end, answer], [start, end, answer],
                    [start, file, first, second, other, third, end, answer],
                    [start, first, second, file, other, third, end, answer],
                    [start, first, file, second, other, end, answer],
                    [start, first, file, second, third, end, answer],
                    [start, first, file, second, other, third, third, end, answer],
                    [start, first, file, file, second, other, third, end, answer]):
                with self.subTest(wrong=[str(value)[:50] for value, _ in wrong]):
                    self.refused("", form, wrong, error=cstor.CstorError)
            error: Any = ({"jsonrpc": "2.0", "error": {"code": -32003, "message": "dies"},
                           "id": 1}, [])
            for i in range(len(said)):
                caught = self.refused("dies", form, [*said[:i], error, *said[i:]])
                self.assertEqual(-32003, caught.code)
            for code, kind in ((-32000, cstor.LayerUnknown), (-32001, cstor.ImageUnknown),
                               (-32002, cstor.NotFound), ("x", cstor.ProtocolError)):
                self.refused("^gone", form, [({"jsonrpc": "2.0", "error": {
                    "code": code, "message": "gone"}, "id": 1}, [])], error=kind)

    def test_wrong_values(self) -> None:
        said = self.notifications(start={"digest": self.digest, "size": self.size})

        wrong: Any

        def change(at: int, *path: str, value: Any) -> list[Any]:
            changed = json.loads(json.dumps(said[at][0]))
            inner = changed
            for name in path[:-1]:
                inner = inner[name]
            inner[path[-1]] = value
            return [*said[:at], (changed, said[at][1]), *said[at + 1:]]

        for wrong in (701, 699, 0, -1, 1 << 64, 700.0, "700", None, True, [700]):
            self.refused("bytes|size", "stream", change(2, "params", "size", value=wrong),
                         error=cstor.CstorError)
        for wrong in (self.size - 1, self.size + 1, 0, 1 << 70):
            self.refused("size", "stream", change(0, "params", "size", value=wrong),
                         error=cstor.IntegrityError)
        for wrong in ("sha256:" + "0" * 64, "", "sha256:", "md5:00", self.digest.upper()):
            if wrong:
                self.refused("digest|end of the layer", "stream", change(
                    0, "params", "digest", value=wrong), error=cstor.CstorError)
                self.refused("contradicts|digest", "stream", change(
                    6, "params", "checksum", value=wrong))
        for wrong in (1, 3, -1, "2", None, 2.5, []):
            self.refused("contradicts", "stream", change(6, "params", "files_sent", value=wrong))
        for wrong in ("A", "AA==A", "AAA", "A-_=", "\u00e9\u00e9\u00e9\u00e9", "AA==AAAA", 5, None,
                      [], {}, " AAA", "AAAA\n", "AA=A", "====", True):
            self.refused("base64", "stream", change(1, "params", "data", value=wrong))
        for wrong in (2, "1", None, 0, [1], {}, 1.5):
            self.refused("another request|as it", "stream", change(7, "id", value=wrong))
        for wrong in ("stream.xx", "", "stream.start", 5, [], {}, ["stream.seg"], None, True):
            for at in (0, 1, 2, 6) if wrong != "stream.start" else (1, 2, 6):
                self.refused("", "stream", change(at, "method", value=wrong),
                             error=cstor.CstorError)
        for wrong in ([], None, 5, "x", [1]):
            self.refused("", "stream", change(1, "params", value=wrong))
            self.refused("", "stream", change(2, "params", value=wrong))
        self.refused("", "stream", change(7, "jsonrpc", value="1.0"))
        self.refused("", "stream", [*said[:-1], ({"jsonrpc": "2.0", "method": None, "id": 1}, [])])
        self.refused("success", "stream", change(7, "result", value={"success": False}))
        for wrong in (0, 10**20, -1, "5", 1.5):
            self.refused("streamSize is", "splitfdstream", self.response(streamSize=wrong))
        (value, fds), = self.response(mediaType="application/vnd.containers.splitfdstream+zstd")
        self.refused("zstd", "splitfdstream", [(value, fds)], error=cstor.Unsupported)

    def test_malformed_json(self) -> None:
        good = json.dumps(self.notifications()[0][0]).encode()
        for data in (b"[]", b"[" + good + b"]", b"5", b'"x"', b"null", b"}", b"{]", b'{"a"}',
                     b"{,}", b'{"a":1,}', b"{'a':1}", b'{"a":1,"a":1}', b'{"a":NaN}',
                     b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":01}', b'{"a":"\n"}',
                     b'{"a":"\0"}', b"\0" + good, good + b"\0", b'{"a":"\xff"}',
                     b'{"a":"\xc0\x80"}',
                     b'{"\xed\xa0\x80":1}', b"\xef\xbb\xbf" + good, b'{"a":"\\x"}',
                     b"// c\n" + good,
                     b'{"a":' + b"1" * 100000 + b"}", b'{"a":' + b"[" * 65 + b"]" * 65 + b"}",
                     b'{"a":' * 100000 + b"1" + b"}" * 100000, b"{" * 100000,
                     b'{"a":{"b":1,"b":2}}', good + b"x"):
            with self.subTest(data=data[:40]), self.pair() as (ours, dumb), \
                    cstor.Connection(ours, timeout=5) as connection:
                thread = threading.Thread(target=dumb.send_all, args=(data,))
                thread.start()
                with self.assertRaises(cstor.ProtocolError) as caught:
                    message = connection.receive()
                    assert message  # what is well said before is heard
                    self.assertEqual(good, data[:len(json.dumps(message.value))])
                    connection.receive()
                self.assertIn(caught.exception.code, (-32700, -32600))
                connection.close()
                thread.join()

    def test_a_long_message_is_looked_at_once(self) -> None:
        """20 MiB in pieces of 4 KiB; what the scanner looks at is counted, not the time."""
        class Counted(cstor.Connection):
            looked = 0

            def _boundary(self) -> int:
                before, self.seen = self._at, len(self._buffer)
                end = super()._boundary()
                Counted.looked += (end if end > 0 else self._at) - before
                return end

        for filling in (b"x", b'\\"', b"[]", b'"",'):
            Counted.looked, count = 0, 0
            data = (b'{"a":"' + b"x" * (20 << 20) + b'"}') if filling == b"x" else \
                b'{"a":"' + filling * (1 << 20) + b'"}' if filling == b'\\"' else \
                b'{"a":[' + filling * 300000 + (b"]}" if filling == b"[]" else b'""]}')
            with self.pair() as (ours, dumb), mock.patch.object(cstor, "RECEIVE_SIZE", 4096):
                thread = threading.Thread(target=dumb.send, args=(data,))
                thread.start()
                with Counted(ours, timeout=20) as connection:
                    if filling == b"[]":
                        with self.assertRaises(cstor.ProtocolError):
                            connection.receive()
                    else:
                        message = connection.receive()
                        assert message
                        count = len(message.value["a"])
                        self.assertGreater(count, 300000)
                thread.join()
            self.assertLessEqual(Counted.looked, 2 * len(data) + 4096)

    def test_too_much(self) -> None:
        with self.pair() as (ours, dumb), cstor.Connection(ours, max_message=5000, timeout=5
                                                           ) as connection:
            dumb.send(b'{"a":"' + b"x" * 5000)
            with mock.patch.object(cstor, "RECEIVE_SIZE", 512), \
                    self.assertRaisesRegex(cstor.ProtocolError, "more than 5000 bytes"):
                connection.receive()
        for varlink in (False, True):
            with self.pair() as (ours, dumb), cstor.Connection(ours, max_fds=600, timeout=5
                                                               ) as connection:
                connection.varlink = varlink
                dumb.send(b"{")
                for _ in range(3):
                    dumb.send(b" ", [self.a] * 253)
                with self.assertRaisesRegex(cstor.ProtocolError, "more than 600") as caught:
                    connection.receive()
                self.assertEqual(-32050, caught.exception.code)
        with self.pair() as (ours, dumb), cstor.Connection(ours, timeout=0.05) as connection:
            for said in (b"", b"{"):
                dumb.send(said) if said else None
                with self.assertRaisesRegex(cstor.ProtocolError, "has done nothing for 0.05 sec"):
                    connection.receive()

    def test_lost_descriptors(self) -> None:
        """Where a process may open no more files, the kernel drops what it cannot pass."""
        need_proc()
        code = ("import sys, socket, resource, os; sys.path.insert(0, sys.argv[1]); import cstor\n"
                "sock = socket.socket(fileno=0); resource.setrlimit(resource.RLIMIT_NOFILE, "
                "(12, 12))\nwith cstor.Connection(sock, timeout=5) as connection:\n"
                "  try: connection.receive()\n"
                "  except cstor.ProtocolError as error: print(error.code, error, error.hint)\n"
                "print(len(os.listdir('/proc/self/fd')))")
        with self.pair() as (ours, dumb):
            dumb.send({"jsonrpc": "2.0", "fds": 50}, [self.a] * 50)
            done = subprocess.run([sys.executable, "-c", code, HERE], stdin=ours.fileno(),
                                  timeout=30, stdout=subprocess.PIPE, check=True)
        self.assertRegex(done.stdout.decode(), r"-32050 .*lost on the way.*ulimit -n.*\n[3-5]\n")

    def test_random_damage(self) -> None:
        rng = random.Random(16)
        known = list(self.conversations())
        outcomes = set()
        for _ in range(4000 if FULL else 1000):
            form, said = known[rng.randrange(len(known))]
            data = [bytearray(json.dumps(value).encode()) for value, _ in said]
            fds = [list(passed) for _, passed in said]
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                damage(rng, data, fds, [self.a, self.b, self.folder])
            say = saying([(bytes(part), passed) for part, passed in zip(data, fds) if part])
            outcomes.add(outcome(functools.partial(self.fetched, form, say), self.tar))
        self.assertIn("tar", outcomes)
        self.assertLessEqual(outcomes, {"tar", "other tar"} | CSTOR_ERRORS)

    def test_random_damage_of_varlink(self) -> None:
        rng = random.Random(17)
        outcomes = set()
        for _ in range(1000 if FULL else 250):
            stream = [bytearray(self.named)]
            data = [bytearray(json.dumps({"parameters": {
                "dir_count": 1, "digest": self.digest, "size": self.size}}).encode() + b"\0")]
            if rng.random() < 0.7:
                damage(rng, stream, [[]], [])
            else:
                damage(rng, data, [[]], [])
            with self.pipe(bytes(stream[0])) as (pipe, alive):
                fds = [[pipe, self.folder, alive]]
                if rng.random() < 0.1:
                    damage(rng, [bytearray(b"  ")], fds, [self.a, alive, self.folder])
                say = saying([(bytes(part), passed) for part, passed in zip(data, fds) if part])
                outcomes.add(outcome(functools.partial(self.fetched, "varlink", say, 2.0),
                                     self.tar))
        self.assertLessEqual(outcomes, {"tar", "FileNotFoundError"} | CSTOR_ERRORS)


def fetch_by_all(test: unittest.TestCase, storage: cstor.Storage, **server: Any) -> int:
    """Let each of our clients fetch every layer of a storage in every form; return how many."""
    root, graph = storage.graphroot, storage.runroot
    rpc = cstor.RpcServer(lambda: cstor.Storage.open(root, runroot=graph), **server)

    def fetch(kind: Any, ask: Callable[[Any], cstor.LayerStream]) -> str:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=rpc.handle, args=(theirs,))
        thread.start()
        try:
            with kind(ours, timeout=60) as client, ask(client) as stream:
                digest = stream.export(io.BytesIO())
                return digest if stream.digest else ""
        finally:
            thread.join()

    def by_proxy(image: str, digest: str, client: Any) -> Any:
        client.initialize()
        return client.image_layer(client.open_image(f"containers-storage:{image}"), digest)

    images = {layer.id: image.id for image in storage.images() if not image.is_list
              for layer in image.layers()}
    count = 0
    for layer in storage.layers():
        for form, threshold in itertools.product(("stream", "splitfdstream", "varlink"),
                                                 (0, 4096) if FULL else (0,)):
            kind = cstor.VarlinkClient if form == "varlink" else cstor.RpcClient

            def ask(client: Any, layer: str = layer.id, form: str = form,
                    threshold: int = threshold) -> Any:
                return client.layer(layer, form, threshold=threshold)

            with test.subTest(layer=layer.id, form=form):
                if not layer.diff_digest:
                    with test.assertRaises(cstor.CstorError):
                        fetch(kind, ask)
                    continue
                test.assertEqual(layer.diff_digest, fetch(kind, ask))
                count += 1
        if layer.diff_digest and layer.id in images:
            with test.subTest(layer=layer.id, form="proxy"):
                test.assertEqual(layer.diff_digest, fetch(cstor.ProxyV2Client, functools.partial(
                    by_proxy, images[layer.id], layer.diff_digest)))
                count += 1
    return count


class ManyFiles(StoreTest):
    """Layers of many files, for processes that may have 1,024 files open each."""

    def test_many_external_files(self) -> None:
        need_proc()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
        counts = (1000, 100_000) if FULL else (1000,)
        store = self.builder()
        layers = [store.layer(b"".join(entry(b"%d/%d" % (i // 500, i), b"%010d" % i)
                                       for i in range(count)) + END) for count in counts]
        store.save()
        self.guard(store.root)
        path = os.path.join(self.dir, "socket")
        with self.serve(store.root, "--socket", path):
            for layer in layers:
                self.transfer(path, layer, store.tars[layer])

    def transfer(self, path: str, layer: str, tar: bytes) -> None:
        for form in ("stream", "splitfdstream", "varlink"):
            kind = cstor.VarlinkClient if form == "varlink" else cstor.RpcClient
            with self.subTest(form=form), kind(path, timeout=60) as client, \
                    client.layer(layer, form, threshold=0) as stream:
                self.assertEqual(sha256(tar), stream.digest)
                passed, out = 0, io.BytesIO()
                for piece in stream.pieces():
                    if isinstance(piece, cstor.Extent):
                        passed += 1
                        out.write(os.pread(piece.fd, 10, 0))
                    else:
                        out.write(piece)
                self.assertEqual(sha256(tar), sha256(out.getvalue()))
                self.assertGreater(passed, 400)
        for options in ({}, {"threshold": 0}, {"threshold": 0, "maxFds": 20}):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(path)
                dumb = Dumb(sock)
                dumb.ask("GetLayerSplitfdstream", layer=layer, **options)
                fds = dumb.message()[1]
                try:
                    with open(os.dup(fds[0]), "rb") as file:
                        self.assertEqual(sha256(tar), sha256(dumb.tar_of_numbers(
                            file.read(), fds[1:])))
                finally:
                    close_all(fds)


# ================================================================================================
# 23. Rootless
# ================================================================================================

class Helpers(StoreTest):
    """The helper's end of the socket, without a namespace, and a requester that is not ours."""

    @contextlib.contextmanager
    def served(self, *roots: str) -> Iterator[tuple[cstor.Connection, int]]:
        """Start serve_contents(); yield our end of its socket and its process ID."""
        ours, theirs = socket.socketpair()
        code = (f"import sys; sys.path.insert(0, {HERE!r}); import cstor; "
                "sys.exit(cstor.serve_contents(sys.argv[1:]))")
        with theirs:
            process = subprocess.Popen([sys.executable, "-c", code, *roots],
                                       stdin=theirs.fileno(), stderr=subprocess.PIPE)
        with process, cstor.Connection(ours, timeout=10) as connection:
            with connection.receive() or self.fail("no hello") as hello:
                self.assertEqual("hello", hello.value["method"])
                self.assertEqual({"version": cstor.__version__, "roots": list(roots)},
                                 hello.value["params"])
            yield connection, process.pid
            connection.close()
            self.assertEqual(b"", process.communicate(timeout=10)[1])
            self.assertLessEqual(0, process.returncode)

    def ask(self, connection: cstor.Connection, method: Any, params: Any, fds: Sequence[int] = ()
            ) -> tuple[Any, list[bytes]]:
        """Return the result, or the code of the error, and the contents of the open files."""
        connection.send({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}, fds)
        with connection.receive() or self.fail("no answer") as message:
            contents = []
            for fd in message.fds:
                self.assertEqual(os.O_RDONLY, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
                contents.append(os.read(fd, 100))
            if "error" in message.value:
                self.assertEqual([], contents)
                return message.value["error"]["code"], []
            result = [*message.value["result"].values()]
            return result[0] if len(result) == 1 else result or None, contents

    def asking(self, connection: cstor.Connection) -> cstor.Helper:
        """Return a Helper whose other end is that of a connection."""
        helper = cstor.Helper.__new__(cstor.Helper)
        helper._lock, helper._is_behind = threading.Lock(), False
        helper._turn = os.memfd_create("turn")
        self.addCleanup(os.close, helper._turn)
        cstor.Caller.__init__(helper, connection)
        return helper

    def place(self) -> str:
        """Make a store's directory with all kinds of files, and secrets outside of it."""
        top = os.path.join(self.dir, "root")
        diff = top + "/overlay/x/diff"
        os.makedirs(diff + "/d")
        for name, data in (("f", b"data"), ("d/g", b"more"), ("\udcff", b"bytes")):
            put(os.path.join(diff, name), data)
        put(os.path.join(self.dir, "secret"), b"secret")
        put(self.dir + "/root-2", b"secret")
        os.mkfifo(diff + "/fifo")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.bind(diff + "/s")
        for name, target in (("link", "f"), ("out", "../../../../secret"), ("up", "../../../.."),
                             ("in", "/d"), ("dev", "/dev"), ("abs", self.dir)):
            os.symlink(target, os.path.join(diff, name))
        os.symlink("x", top + "/overlay/y")
        return top

    def test_answers(self) -> None:
        top = self.place()
        self.guard(top)
        diff = top + "/overlay/x/diff"
        with self.served(self.dir + "/", top + "/") as (connection, _):
            self.assertEqual(([0], [b"secret"]), self.ask(
                connection, "open", {"directory": self.dir + "/", "names": ["secret"]}))
        with self.served(self.dir + "/root", top) as (connection, _):
            names = ["f", "d/g", "in/g", cstor.spell(b"\xff"), "nothing", "f/x", "d"]
            self.assertEqual(
                ([0, 0, 0, 0, errno.ENOENT, errno.ENOTDIR, stat.S_IFDIR],
                 [b"data", b"more", b"more", b"bytes"]),
                self.ask(connection, "open", {"directory": diff, "names": names}))
            rows, more = self.ask(connection, "scan", {"directory": diff, "name": "",
                                                       "after": None})[0]
            self.assertFalse(more)
            self.assertEqual([".", *sorted(os.listdir(os.fsencode(diff)))],
                             [".", *(cstor.unspell(row[0]) for row in rows[1:])])
            status = os.lstat(diff + "/f")
            self.assertIn(["f", [status.st_mode, status.st_ino, status.st_dev, 1, status.st_uid,
                                 status.st_gid, 4, 0, status.st_mtime_ns], "", {}], rows)
            for directory in (top + "/overlay/y/diff", diff + "/up/overlay/x/diff"):  # as we look
                self.assertEqual(([0], [b"data"]), self.ask(
                    connection, "open", {"directory": directory, "names": ["f"]}))
            self.assertEqual(([["g", mock.ANY, "", {}]], False), tuple(self.ask(
                connection, "scan", {"directory": diff, "name": "in", "after": "f"})[0]))

    def test_nothing_else_is_opened(self) -> None:
        top = self.place()
        self.guard(top)
        diff = top + "/overlay/x/diff"
        with self.served(top) as (connection, _):
            for name, code in (
                    ("fifo", stat.S_IFIFO), ("s", stat.S_IFSOCK), ("link", stat.S_IFLNK),
                    ("out", stat.S_IFLNK), ("up/secret", errno.ENOENT),
                    ("abs/secret", errno.ENOENT), ("dev/null", errno.ELOOP), ("", errno.EINVAL),
                    ("..", errno.EINVAL), ("../../../../secret", errno.EINVAL),
                    ("d/../f", errno.EINVAL), ("/f", errno.EINVAL), ("./f", errno.EINVAL),
                    ("f\0", errno.EINVAL), ("d/", errno.EINVAL), ("d//g", errno.EINVAL),
                    ("x" * 300, errno.ENAMETOOLONG)):
                self.assertEqual(([code], []), self.ask(
                    connection, "open", {"directory": diff, "names": [name]}), name)
            for directory in ("/", "/etc", self.dir, self.dir + "/root-2", top + "/..",
                              top + "/overlay/../..", top + "/overlay//x", "", "overlay",
                              top + "/overlay/x/diff/..", top + "\0", "\ud800", 5, None, ["/"],
                              "x" * 100_000, top + "/nothing", diff + "/in", diff + "/f",
                              diff + "/abs", diff + "/dev", diff + "/out"):
                for more in ({"names": ["secret"]}, {"name": ""}):
                    code, contents = self.ask(connection, "open" if "names" in more else "scan",
                                              {"directory": directory, **more})
                    self.assertIn(code, (cstor.BAD_PARAMS, cstor.IO_ERROR, cstor.INTERNAL_ERROR))
                    self.assertEqual([], contents, directory)
            requests: list[tuple[str, dict[str, Any]]] = [
                    ("open", {"directory": diff}), ("open", {"directory": diff, "names": "f"}),
                    ("open", {"directory": diff, "names": ["f"] * 129}),
                    ("open", {"directory": diff, "names": [["f"]]}), ("open", {"names": ["f"]}),
                    ("scan", {"directory": diff}), ("scan", {"directory": diff, "name": ".."}),
                    ("scan", {"directory": diff, "name": "up/.."}),
                    ("scan", {"directory": diff, "name": "f"}),
                    ("scan", {"directory": diff, "name": "abs"}),
                    ("scan", {"directory": diff, "name": "", "after": 5})]
            for method, params in requests:
                code, contents = self.ask(connection, method, params)
                self.assertIn(code, (cstor.BAD_PARAMS, cstor.IO_ERROR), params)
                self.assertEqual([], contents, params)
            for other in ("write", "", "run", "hello", "_open", "attach"):
                self.assertEqual((cstor.NO_METHOD, []), self.ask(connection, other, {}), other)
            for wrong in (None, 5):
                self.assertEqual((cstor.INVALID_REQUEST, []), self.ask(connection, wrong, {}))
            for given in ([1], 1):
                self.assertEqual(cstor.BAD_PARAMS, self.ask(connection, "open", given, [2])[0])
            self.assertEqual(([0], [b"data"]), self.ask(
                connection, "open", {"directory": diff, "names": ["f"]}))

    def test_processes_share_a_helper(self) -> None:
        """Each waits for its turn; when one is killed inside of it, the others learn that."""
        top = self.place()
        with self.served(top) as (connection, _):
            helper = self.asking(connection)

            def ask(count: int) -> None:
                for _ in range(count):
                    fd, missing = helper.open(top + "/overlay/x/diff", [b"f", b"nothing"])
                    assert (os.read(fd, 9), missing) == (b"data", -errno.ENOENT)
                    os.close(fd)

            def fork() -> int:
                if (pid := os.fork()) == 0:
                    status = 1
                    try:
                        ask(200)
                        status = 0
                    finally:
                        os._exit(status)
                return pid

            children = [fork() for _ in range(4)]
            ask(200)
            self.assertEqual([0] * 4, [os.waitpid(child, 0)[1] for child in children])
            with mock.patch.object(helper, "_next", side_effect=lambda: os.kill(
                    os.getpid(), signal.SIGKILL)):
                child = fork()
            self.assertEqual(signal.SIGKILL, os.waitpid(child, 0)[1])
            for _ in range(2):
                with self.assertRaisesRegex(cstor.CstorError, "killed while it was asking"):
                    ask(1)
            self.assertTrue(helper.is_broken)
            with mock.patch.object(helper, "_turn", -1), \
                    self.assertRaisesRegex(cstor.CstorError, "has ended"):
                ask(1)

    def test_broken_messages(self) -> None:
        top = self.place()
        for data in (b"GET / HTTP/1.0\r\n\r\n", b"[1]", b'{"a":1', b'{"fds":3}{', b"\xff" * 99,
                     b"[" * 9999, b'{"a":' * 9999, b'{"method":"open","method":"scan"}',
                     b'{"fds":-1}', b'{"id":' + b"9" * 9999 + b"}", b'{"a":"' + b"x" * 70_000_000):
            with self.served(top) as (connection, _):
                with contextlib.suppress(ConnectionError):
                    connection.socket.sendall(data)
                    connection.socket.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError, cstor.ProtocolError):
                    message = connection.receive()
                    if message:
                        self.assertIn("error", message.value)
                        self.assertEqual([], message.fds)

    def test_pages_of_large_directories(self) -> None:
        top = os.path.join(self.dir, "root")
        os.makedirs(top + "/diff")
        names = [b"%05d" % number + b"x" * 200 for number in range(9000 if FULL else 5000)]
        for name in names:
            os.mknod(os.path.join(os.fsencode(top), b"diff", name))
        os.mkfifo(top + "/diff/z")
        with self.served(top) as (connection, _):
            helper = self.asking(connection)
            for start in (None, b"", b"00007" + b"x" * 200):
                rows = list(helper.scan(top + "/diff", b"", start))
                self.assertEqual([*[b"."] * (start is None),
                                  *(name for name in [*names, b"z"] if name > (start or b""))],
                                 [row[0] for row in rows])
                self.assertEqual(os.lstat(top + "/diff/z").st_mtime_ns, rows[-1][1].st_mtime_ns)
                self.assertTrue(stat.S_ISFIFO(rows[-1][1].st_mode))
            found = helper.open(top + "/diff", [*names[:300], b"z", b"nothing"])
            self.assertEqual([-stat.S_IFIFO, -errno.ENOENT], found[300:])
            close_all(found[:300])
            with self.assertRaisesRegex(cstor.CstorError, "outside the storage"):
                helper.open("/etc", [b"passwd"])
            with self.assertRaises(FileNotFoundError):
                helper.open(top + "/nothing", [b"f"])
            self.assertFalse(helper.is_broken)

    @contextlib.contextmanager
    def proxied(self, helper: Any) -> Iterator[cstor.Storage]:
        """Yield a storage in which everything is closed, and ``helper`` opens it."""
        with mock.patch("cstor.Helper", return_value=helper), \
                mock.patch("cstor.why_no_helper", return_value=""), \
                mock.patch.object(cstor.Contents, "is_closed", return_value=True), \
                cstor.ProxiedStorage.open(self.sample().root) as storage:
            helper.is_broken = False
            storage.opener.helper(cstor.NeedsUnshare(""))
            self.assertTrue(storage.is_proxied)
            yield storage

    def test_files_are_asked_for_once(self) -> None:
        """Hard links, and a name that a tar has twice, are one file."""
        top = self.place()
        asked: list[bytes] = []

        def lend(_: str, names: Sequence[bytes]) -> list[int]:
            asked.extend(names)
            return [os.open(os.devnull, os.O_RDONLY) for _ in names]

        before = open_fds()
        with self.proxied(mock.Mock(open=lend)) as storage, \
                cstor.Contents(storage, cstor.Directory.at(top)) as contents:
            names = [b"a", b"b", b"a", b"a"]
            self.assertEqual(names, list(storage.opener.ahead(
                names, lambda name: (contents, name))))
            self.assertEqual([b"a", b"b"], asked)
        self.assertEqual(before, open_fds())

    def test_contents_of_a_toc_are_opened_ahead(self) -> None:
        """What the helper opened is read: here other bytes, which do not fit the checksums."""
        other = os.path.join(self.dir, "other")
        put(other, b"?" * 99999)

        def lend(directory: str, names: Sequence[bytes]) -> list[int]:
            os.truncate(other, os.path.getsize(os.path.join(os.fsencode(directory), names[0])))
            return [os.open(other, os.O_RDONLY) for _ in names]

        with self.proxied(mock.Mock(open=lend)) as storage:
            layer = storage.image("sample").layers()[0]
            with layer.tree() as tree:
                self.assertRaisesRegex(cstor.IntegrityError, "checksum", list,
                                       cstor.tree_toc(tree, digests=True))
            self.assertRaisesRegex(cstor.IntegrityError, "checksum", layer.toc, digests=True)

    def test_few_open_files(self) -> None:
        asked: list[int] = []

        def lend(_: str, names: Sequence[bytes]) -> list[int]:
            asked.append(len(names))
            return [-errno.ENOENT for _ in names]

        with self.proxied(mock.Mock(open=lend)) as storage, \
                cstor.Contents(storage, cstor.Directory.at(self.dir)) as contents:
            for limit, most in ((8, 2), (64, 16), (512, 128), (1 << 20, 128), (1, 1)):
                with mock.patch("cstor.soft_limit", return_value=limit):
                    found = list(storage.opener.ahead(
                        range(300), lambda number: (contents, b"%d" % number)))
                self.assertEqual(list(range(300)), found)
                self.assertEqual(most, max(asked))
                asked.clear()

    def test_layers_that_are_removed(self) -> None:
        """Not what is announced fails, but what is opened, which says why."""
        lost = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        with self.proxied(mock.Mock(open=mock.Mock(side_effect=lost))) as storage, \
                cstor.Contents(storage, cstor.Directory.at(self.place())) as contents:
            self.assertEqual([b"a"], list(storage.opener.ahead(
                [b"a"], lambda name: (contents, name))))
        asking = cstor.Helper.__new__(cstor.Helper)
        with mock.patch.object(asking, "open", return_value=[-errno.ENOENT]), \
                self.assertRaisesRegex(FileNotFoundError, "/gone/diff"):
            asking.open_one("/gone/diff", b"a")
        with mock.patch.object(asking, "_call", side_effect=lost), \
                self.assertRaisesRegex(FileNotFoundError, "/gone/diff"):
            asking.open("/gone/diff", [b"a"])

    def test_nobody_to_tell(self) -> None:
        """A command in the namespace ends without a traceback when who started it was killed."""
        ours, theirs = socket.socketpair()
        theirs.close()
        with mock.patch("cstor.take_over", return_value=cstor.Connection(ours)), \
                mock.patch.object(sys, "argv", []), contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(0, cstor.main_inside(["cstor", "--version"]))

    def test_large_directories_are_listed_once(self) -> None:
        top = os.path.join(self.dir, "root")
        os.mkdir(top)
        for number in range(30):
            put(f"{top}/{number:02d}")
        params: dict[str, Any] = {"directory": top, "name": "", "after": None}
        server = cstor.ContentServer(mock.Mock(), [top])
        real = cstor.Directory.listdir
        with mock.patch("cstor.CHUNK", 999), mock.patch.object(
                cstor.Directory, "listdir", autospec=True, side_effect=real) as listdir:
            for times in (1, 2):  # another scan lists it anew
                names, more = [""], True
                while more:
                    params["after"] = names[-1].replace(".", "") if len(names) > 1 else None
                    rows, more = server.scan(params).values()
                    names += [row[0] for row in rows]
                self.assertEqual([".", *sorted(os.listdir(top))], names[1:])
                self.assertEqual(times, listdir.call_count)
                put(f"{top}/{times + 50}")
        server._roots[0].close()
        server._directory.close()  # type: ignore[union-attr]

    def test_looking_and_entering(self) -> None:
        top = os.path.join(self.dir, "root")
        os.makedirs(top + "/shut/diff")
        put(top + "/shut/diff/file", b"12345")
        for name, target in (("link", "diff/file"), ("out", self.dir), ("up", "../../..")):
            os.symlink(target, f"{top}/shut/{name}")
        with self.served(top) as (connection, _):
            asking = self.asking(connection)
            for directory, path, size, link in ((top, b"shut/diff/file", 5, b""),
                                                (top + "/shut", b"link", 9, b"diff/file"),
                                                (top + "/shut", b"out", len(self.dir),
                                                 os.fsencode(self.dir))):
                _, status, target, _ = asking.look(directory, path)
                self.assertEqual((size, link), (status.st_size, target))
            self.assertRaises(FileNotFoundError, asking.look, top, b"shut/none")
            for path, wanted in ((b"shut/diff", "/shut/diff"), (b".", ""), (b"shut/up", "")):
                fd = asking.enter(top, path)
                self.assertTrue(os.path.samestat(os.fstat(fd), os.stat(top + wanted)))
                os.close(fd)
            self.assertRaises(FileNotFoundError, asking.enter, top, b"shut/out")
            self.assertRaises(NotADirectoryError, asking.enter, top, b"shut/diff/file")
            for directory, path in ((self.dir, b"root"), (top, b"../x"), (top, b"/shut"),
                                    (top + "/..", b"root")):
                for ask in (asking.look, asking.enter):
                    with self.assertRaisesRegex(cstor.CstorError, "outside|clean"):
                        ask(directory, path)

    def test_a_helper_that_does_not_start(self) -> None:
        process = {**cstor.describe_process(), "podman": "/bin/false"}
        before = open_fds()
        with mock.patch("cstor.describe_process", return_value=process), \
                mock.patch("cstor.unshare_ways", return_value=["podman"]), \
                self.assertRaisesRegex(cstor.NeedsUnshare, "no user namespace: podman: "):
            cstor.Helper([self.dir])
        self.assertEqual(before, open_fds())

    def test_slow_newuidmap(self) -> None:
        path = os.path.join(self.dir, "newuidmap")
        put(path, b"#!/bin/sh\nexec sleep 60\n")
        os.chmod(path, 0o755)
        unshared = cstor.Unshared.__new__(cstor.Unshared)
        unshared._process = mock.Mock(pid=1)
        with mock.patch("cstor.START_TIMEOUT", 0.1), \
                self.assertRaisesRegex(cstor.CstorError, "newuidmap did not end in 0.1 seconds"):
            unshared._map_ids({"newuidmap": path, "sub-uids": [], "newgidmap": path,
                               "sub-gids": []})

    def test_sub_ids(self) -> None:
        path = os.path.join(self.dir, "subuid")
        with open(path, "w") as file:
            file.write("# x:1:1\nroot:900000:10\n0:300000:20\n  root:500000:030\nrooty:1:1\n"
                       "root:1\nroot:x:1\nroot:7:0\nroot:-1:5\nother:1:2\nroot:1:2:3\n")
        self.assertEqual([(300000, 20), (500000, 30), (900000, 10)], cstor.sub_ids(0, path))
        self.assertEqual([], cstor.sub_ids(54321, path))
        self.assertEqual([], cstor.sub_ids(0, path + ".none"))

    def test_ids_of_the_owner(self) -> None:
        need(os.geteuid() == 0, "only root can give files away")
        store = self.sample()
        for uid, ranges, wanted in ((0, [(100, 10)], 5), (5, [(100, 10)], 0), (99, [(4, 10)], 2),
                                    (99, [], 65534)):
            os.chown(store.root + "/overlay-layers/layers.json", uid, uid)
            with self.open(store) as storage, mock.patch("cstor.sub_ids", return_value=ranges):
                uids, gids = storage.id_maps
                self.assertEqual(uids, gids)
                self.assertEqual(wanted, cstor.map_id(5, uids, 65534))

    def foreign(self) -> StoreBuilder:
        """Return a rootless store of uid 1234 on a disk, whose container has a file of uid 8."""
        home = os.path.join(self.dir, "disk/home/u/.local/share/containers/storage")
        store = StoreBuilder(home)
        base = store.layer(make_tar(("f", b"base")))
        writable = store.layer(None, base)
        for name, uid, gid in (("", 1234, 77), ("ours", 1234, 77), ("mapped", 500_007, 600_004),
                               ("group", 1234, 1_000_000), ("none", 400_000, 77)):
            path = os.path.join(home, "overlay", writable, "diff", name)
            if name:
                put(path)
            os.chown(path, uid, gid)
        os.link(path, path + "-too")
        store.container(store.image(base, "localhost/t:1"), writable, "c")
        store.save()
        os.chown(store.path("overlay-layers/layers.json"), 1234, 77)
        return store

    def owners(self, store: StoreBuilder, expected: Sequence[str] = (), *options: str
               ) -> dict[str, tuple[int, int]]:
        """Return the owners in the container; check that all commands say the same warnings."""
        diff = os.path.join(store.path("overlay"), store.layers[1]["id"], "diff")
        said = "".join(f"cstor: warning: {diff}: {text}\n" for text in expected)
        for words in ("files c -l", "stat c none", "export c", f"extract c {self.dir}/out"):
            done = self.run_cstor("--root", store.root, *options, "container", *words.split())
            self.assertEqual(said, done.stderr.decode())
        self.assertEqual(b"", self.run_cstor("--root", store.root, *options, "-q", "container",
                                             "stat", "c", "none").stderr)
        made = {name: os.lstat(f"{self.dir}/out/{name}") for name in os.listdir(self.dir + "/out")}
        shutil.rmtree(self.dir + "/out")
        return {name: (status.st_uid, status.st_gid) for name, status in made.items()}

    UNKNOWN = ("owner or group 65534 in {}: their IDs are in no range known of the store's owner "
               "(--owner-ids FILE names more)")

    def test_ranges_of_another_machine(self) -> None:
        need(os.geteuid() == 0, "only root can give files away")
        store, etc = self.foreign(), os.path.join(self.dir, "disk/etc")
        unknown = {"f": (0, 0), "ours": (0, 0), "mapped": (65534, 65534), "group": (0, 65534),
                   "none": (65534, 0), "none-too": (65534, 0)}
        self.assertEqual(unknown, self.owners(store, [self.UNKNOWN.format("3 files")]))
        os.mkdir(etc)
        put(etc + "/passwd", b"x:x:123:1234::/:/\nu:x:1234:77:U:/home/u:/bin/sh\nroot:x:0:0::/:\n")
        put(etc + "/subuid", b"x:400000:9\nu:500000:1000\nv:600000:10\n")
        put(etc + "/subgid", b"77:600000:1\nu:600001:1000\n")
        found = {**unknown, "mapped": (8, 4)}
        warning = self.UNKNOWN.format("2 files")
        self.assertEqual(found, self.owners(store, [warning]))
        ids = os.path.join(self.dir, "ids")
        os.rename(etc, ids)
        self.assertEqual(found, self.owners(store, [warning], "--owner-ids", ids))
        self.assertEqual({**found, "mapped": (8, 65534)}, self.owners(
            store, [self.UNKNOWN.format("3 files")], "--owner-ids", ids + "/subuid"))
        lines = os.path.join(self.dir, "lines")
        put(lines, b"# those of the owner\n1234:400000:1\n1234:500000:1000000\n")
        self.assertEqual({**found, "mapped": (9, 100_006), "group": (0, 500_002),
                          "none": (1, 0), "none-too": (1, 0)},
                         self.owners(store, [], "--owner-ids", lines))
        with cstor.Storage.open(store.root, owner_ids=lines) as storage, \
                storage.container("c").tree() as tree:
            self.assertEqual((9, 100_006), tree.lookup(b"mapped")[1].owner[:2])

    def test_owner_ids_that_do_not_serve(self) -> None:
        need(os.geteuid() == 0, "only root can give files away")
        store, lines = self.foreign(), os.path.join(self.dir, "lines")
        hint = " (write lines like 1234:100000:65536, or name a directory like /etc)"
        put(lines, b"somebody:1:2\n123:100:200\n")
        none = f"has no range of uid 1234, who owns the store{hint}"
        for path, why in ((lines, f"{lines} {none}"), (self.dir, f"{self.dir} {none}"),
                          (lines + "x", f"no such file or directory: {lines}x{hint}")):
            for words in ("image list", "container files c"):
                done = self.run_cstor("--root", store.root, "--owner-ids", path, *words.split(),
                                      status=3)
                self.assertEqual(f"cstor: error: {why}\n", done.stderr.decode())
        os.makedirs(os.path.join(self.dir, "disk/etc"))
        os.mkfifo(os.path.join(self.dir, "disk/etc/subuid"))  # nobody writes to it
        self.run_cstor("--root", store.root, "container", "files", "c")
        os.chown(store.path("overlay-layers/layers.json"), 0, 0)  # as in the owner's namespace
        done = self.run_cstor("--root", store.root, "--owner-ids", lines, "container", "files", "c")
        self.assertEqual("cstor: warning: --owner-ids is not used: root owns the store\n",
                         done.stderr.decode())

    def test_whose_ranges(self) -> None:
        """This machine's own serve no store that was made elsewhere; see owner_ranges()."""
        here = os.path.join(self.dir, "disk/home/u/storage")
        os.makedirs(here)
        link = os.path.join(self.dir, "link")
        os.symlink(here, link)
        numbers = [(1, 2)], [(3, 4)]

        def found(made_at: str, below: str = here) -> Any:
            with mock.patch.object(cstor, "sub_ids", lambda uid, file: {
                    "/etc/subuid": [(1, 2)], "/etc/subgid": [(3, 4)]}.get(file, [(uid, 9)])):
                return tuple(cstor.owner_ranges(5, "", below, made_at))

        for made_at in ("", here, link):
            self.assertEqual(numbers, found(made_at))
            self.assertEqual(numbers, found(made_at, link))
        for made_at in ("/home/u/storage", "/g\0x", "/\ud800", here + "/x"):
            self.assertEqual(([], []), found(made_at))
        os.mkdir(os.path.join(self.dir, "disk/etc"))  # a system whose users have no sub-uids
        put(os.path.join(self.dir, "disk/etc/passwd"))
        for made_at in ("", "/home/u/storage"):
            self.assertEqual(([(5, 9)], [(5, 9)]), found(made_at))
        store = self.builder().save()
        make_database(store.root, graphroot="/home/u/storage").close()
        if os.geteuid() == 0:
            os.chown(store.path("overlay-layers/layers.json"), 5, 5)
            with mock.patch.object(cstor, "sub_ids", lambda *_: [(1, 2)]), \
                    cstor.Storage.open(store.root) as storage:
                self.assertEqual(1, len(storage.id_maps[0]))

    def test_root_of_a_container_that_never_ran(self) -> None:
        """Until then "/" belongs to the store's owner, whom the container's map may not have."""
        need(os.geteuid() == 0, "only root can give files away")
        store = self.builder()
        base = store.layer(make_tar(("f", b"base")))
        writable = store.layer(None, base)
        put(store.path(f"overlay/{writable}/diff/new"))
        maps = [{"container_id": 0, "host_id": 200_000, "size": 65_536}]
        store.container(store.image(base, "localhost/t:1"), writable, "c", uidmap=maps, gidmap=maps)
        store.save()
        diff = store.path(f"overlay/{writable}/diff")
        first = ("shown as its container's root's: podman gives it to that when it first starts "
                 "the container")
        second = "owner or group 65534 in 1 file: the container's own map does not cover their IDs"
        for root, new, said in ((0, 0, [first, second]), (200_000, 200_003, []),
                                (200_009, 200_003, [])):
            os.chown(diff, root, root)
            os.chown(diff + "/new", new, new)
            done = self.run_cstor("--root", store.root, "container", "files", "c", "--format",
                                  "json")
            self.assertEqual({"/": max(root - 200_000, 0), "/f": 0, "/new": 3 if new else 65534},
                             {row["path"]: row["uid"] for row in json.loads(done.stdout)})
            self.assertEqual("".join(f"cstor: warning: {diff}: {text}\n" for text in said),
                             done.stderr.decode())

    def test_ids_of_containers_with_a_map(self) -> None:
        """Layers that are mounted with a map have none; the container's record has it."""
        need(os.geteuid() == 0, "only root can give files away")
        store = self.builder()
        base = store.layer(make_tar(("f", b"base")))
        writable = store.layer(None, base)
        put(store.path(f"overlay/{writable}/diff/new"))
        maps = [{"container_id": 0, "host_id": 200_000, "size": 65_536}]
        store.container(store.image(base, "localhost/t:1"), writable, "c", uidmap=maps,
                        gidmap=maps)
        store.save()
        capability = bytes.fromhex("0100000300040000000000000000000000000000")
        for owner, root, number, version in ((0, 200_000, 200_005, b"\2"), (7, 7, 8, b"\2"),
                                             (7, 9, 8, b"\3")):
            os.chown(store.path("overlay-layers/layers.json"), owner, owner)
            path = store.path(f"overlay/{writable}/diff/new")
            os.chown(path, number, number)
            os.setxattr(path, "security.capability", capability + root.to_bytes(4, "little"))
            ranges = [(1, 5), (8, 1), (200_000, 65_536)]
            with mock.patch("cstor.sub_ids", return_value=ranges), self.open(store) as storage:
                container = storage.container("c")
                if owner:  # of its own namespace: 7, 1 to 5, 8, ...
                    container.uidmap[0]["host_id"] = container.gidmap[0]["host_id"] = 1
                with container.tree() as tree:
                    node = tree.lookup(b"new")[1]
                self.assertEqual((5, 5), node.owner[:2])
                self.assertEqual(version, node.xattrs[b"security.capability"][3:4])

    def test_process_in_words(self) -> None:
        found = cstor.describe_process()
        self.assertEqual(os.geteuid(), found["uid"])
        ways = {"podman": "/p", "newuidmap": "/n", "newgidmap": "/n"}
        user = {"uid": 7, "capabilities": [], "user-namespace": "initial",
                "sub-uids": [(100, 10)], "sub-gids": [(100, 10)], **ways}
        for change, words in (
                ({}, "uid 7, sub-uids 100 to 109, private files through newuidmap or podman"),
                ({"newgidmap": ""}, "uid 7, sub-uids 100 to 109, private files through podman"),
                ({"sub-uids": [], "podman": ""},
                 "uid 7, no sub-uids, no way to read private files"),
                ({"uid": 0}, "uid 0, without CAP_DAC_OVERRIDE"),
                ({"uid": 0, "capabilities": ["CAP_DAC_READ_SEARCH"]}, "uid 0, reads all files"),
                ({"uid": 0, "capabilities": ["CAP_DAC_OVERRIDE"], "user-namespace": "other"},
                 "uid 0, in a user namespace, reads all files of its IDs")):
            self.assertEqual(words, cstor.explain_process({**user, **change}))
        with mock.patch("cstor.read_proc", return_value="1\n"):  # AppArmor knows podman
            self.assertEqual(["podman", "newuidmap"], cstor.unshare_ways(user))


# ================================================================================================
# 24. Check
# ================================================================================================

def flip(path: str, at: int = -1) -> None:
    """Change one byte of a file, by default in its middle."""
    data = bytearray(read_bytes(path))
    data[at if at >= 0 else len(data) // 2] ^= 0x10
    with open(path, "r+b") as file:
        file.write(data)


def cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) - 1)


def grow(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def put_instead(make: Callable[[str], object]) -> Callable[[str], None]:
    """Return a function that replaces a file by what ``make`` makes."""
    def replace(path: str) -> None:
        os.unlink(path)
        make(path)
    return replace


def change_rows(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[str], None]:
    """Return a function that changes the objects of tar-split data, which stay a sound gzip."""
    def edit(path: str) -> None:
        rows = [json.loads(line) for line in gzip.decompress(read_bytes(path)).splitlines()]
        change(rows)
        put(path, gzip.compress("".join(map(go_json, rows)).encode(), mtime=0))
    return edit


def change_header(at: int, with_checksum: bool = False) -> Callable[[list[dict[str, Any]]], None]:
    """Return a function that changes a byte of the last header that a content follows."""
    def edit(rows: list[dict[str, Any]]) -> None:
        number = max(i for i, row in enumerate(rows) if row["type"] == 1 and row.get("size"))
        data = bytearray(base64.b64decode(rows[number - 1]["payload"]))
        data[at - BLOCK] ^= 1
        if with_checksum:
            data[148 - BLOCK:156 - BLOCK] = b" " * 8
            data[148 - BLOCK:156 - BLOCK] = b"%06o\0 " % sum(data[-BLOCK:])
        rows[number - 1]["payload"] = base64.b64encode(data).decode()
    return edit


SLOW, QUICK = ("full",), ("full", "quick")
# What is done to a regular file of a layer, the code, and the modes of verify that find it.
FILE_DAMAGES: tuple[tuple[str, Callable[[str], object], str, tuple[str, ...]], ...] = (
    ("byte flipped", flip, "file-changed", SLOW), ("cut", cut, "file-truncated", QUICK),
    ("grown", grow, "file-longer", QUICK), ("deleted", os.unlink, "file-missing", QUICK),
    ("directory", put_instead(os.mkdir), "file-type", QUICK),
    ("link", put_instead(lambda path: os.symlink("/etc/passwd", path)), "file-type", QUICK),
    ("FIFO", put_instead(os.mkfifo), "file-type", QUICK))
SPLIT_DAMAGES: tuple[tuple[str, Callable[[str], object], str, tuple[str, ...]], ...] = (
    ("byte flipped", flip, "tar-split-damaged", QUICK),
    ("last byte flipped", lambda path: flip(path, os.path.getsize(path) - 6), "tar-split-damaged",
     QUICK),
    ("cut", cut, "tar-split-damaged", QUICK), ("missing", os.unlink, "tar-split-missing", QUICK),
    ("empty", lambda path: os.truncate(path, 0), "tar-split-empty", QUICK),
    ("not gzip", lambda path: put(path, b"x" * 99), "tar-split-damaged", QUICK),
    ("mode changed", change_rows(change_header(105)), "header-damaged", QUICK),
    ("mode changed and summed", change_rows(change_header(105, True)), "tar-split-wrong", SLOW),
    ("rows lost", change_rows(lambda rows: rows.__delitem__(slice(-3, -1))), "tar-split-wrong",
     QUICK),
    ("wrong checksum", change_rows(lambda rows: next(
        row for row in rows if row.get("size")).update(payload="AAAAAAAAAAA=")), "file-changed",
     SLOW))


class Kept:
    """A context that restores a file or directory, which is moved to ``kept`` and copied back."""

    def __init__(self, path: str, kept: str) -> None:
        self.path, self.kept = path, kept

    def __enter__(self) -> None:
        os.rename(self.path, self.kept)
        subprocess.run(["cp", "-a", self.kept, self.path], check=True)

    def __exit__(self, *_: object) -> None:
        if os.path.isdir(self.path) and not os.path.islink(self.path):
            shutil.rmtree(self.path)
        elif os.path.lexists(self.path):
            os.unlink(self.path)
        os.rename(self.kept, self.path)


def found_by(storage: cstor.Storage, layer_id: str, mode: str) -> list[tuple[str, str, str | None]]:
    """Return (code, object, path) of what verify finds in a layer."""
    found = storage.layer(layer_id).verify(quick=mode == "quick")
    return [(finding.code, finding.object, finding.path) for finding in found]


class Verifying(StoreTest):
    """Each damage of a layer is one finding, and nothing else is found."""

    def damaged(self, store: StoreBuilder, layer_id: str, mode: str) -> Any:
        with cstor.Storage.open(store.root) as storage:
            return found_by(storage, layer_id, mode)

    def test_sound_layers(self) -> None:
        store = self.sample()
        with self.open(store) as storage:
            for layer in storage.layers():
                for quick in (False, True):
                    self.assertEqual(["not-verified"] if not layer.diff_digest else [], [
                        finding.code for finding in layer.verify(quick=quick)])
        done = self.run_on(store, "layer verify", *(layer["id"] for layer in store.layers[:3]))
        self.assertEqual("3 layers verified\n", done.out)

    def test_files(self) -> None:
        store = self.sample()
        layer = store.layers[1]["id"]
        for name in ("srv/app.py", "srv/caf\u00e9 <&>", "srv/latin1-\udce9", "srv/" + "long-" * 30):
            path = store.path("overlay", layer, "diff", name)
            for title, damage, code, modes in FILE_DAMAGES:
                with self.subTest(title, name=ascii(name)), Kept(path, self.dir + "/kept"):
                    damage(path)
                    for mode in QUICK:
                        self.assertEqual([(code, f"layer {layer}", cstor.spell(os.fsencode(name)))]
                                         if mode in modes else [],
                                         self.damaged(store, layer, mode), mode)

    def test_tar_split(self) -> None:
        store = self.sample()
        layer = store.layers[1]["id"]
        path = store.path(f"overlay-layers/{layer}.tar-split.gz")
        for title, damage, code, modes in SPLIT_DAMAGES:
            with self.subTest(title), Kept(path, self.dir + "/kept"):
                damage(path)
                name = "srv/" + "long-" * 30 if code == "header-damaged" else "srv/app.py" \
                    if code == "file-changed" else None if code == "tar-split-damaged" else path
                for mode in QUICK:
                    self.assertEqual([(code, f"layer {layer}", name)] if mode in modes else [],
                                     self.damaged(store, layer, mode), mode)

    def test_what_has_no_content(self) -> None:
        """Links, directories and empty files are compared too."""
        store, (layer,) = self.stack(make_tar(
            ("d/", None), ("d/one", b"1"), ("d/two", b"2"), ("link", "d/one"), ("empty", b""),
            (".wh.gone", b""), ("far/x", b"")))
        top = store.path("overlay", layer, "diff")
        damages: tuple[tuple[str, Callable[[str], object], str], ...] = (
                ("link", os.unlink, "file-missing"), ("empty", os.unlink, "file-missing"),
                ("empty", grow, "file-longer"), ("d", shutil.rmtree, "file-missing"),
                ("link", put_instead(os.mkdir), "file-type"),
                ("link", put_instead(lambda path: os.symlink("longer-one", path)), "file-longer"),
                ("d", lambda path: [shutil.rmtree(path), put(path)], "file-type"))  # type: ignore
        for name, damage, code in damages:
            with self.subTest(name, code=code), Kept(f"{top}/{name}", self.dir + "/kept"):
                damage(f"{top}/{name}")
                for mode in QUICK:
                    self.assertEqual([(code, f"layer {layer}", name + "/" * (name == "d"))],
                                     self.damaged(store, layer, mode), mode)
        self.assertEqual([], self.damaged(store, layer, "full"))

    def test_all_damages_are_found(self) -> None:
        files = [(f"f{number:04}", b"%d" % number * (number % 90)) for number in range(2500)]
        store, (layer,) = self.stack(make_tar(*files))
        top = store.path("overlay", layer, "diff")
        for number in (7, 1023, 1024, 2499):
            flip(f"{top}/f{number:04}", 0)
        cut(f"{top}/f0050")
        with self.open(store) as storage:
            found = storage.layer(layer).verify()
            self.assertEqual([("file-changed", "f0007"), ("file-truncated", "f0050"),
                              ("file-changed", "f1023"), ("file-changed", "f1024"),
                              ("file-changed", "f2499")],
                             [(finding.code, finding.path) for finding in found])
            tar = store.tars[layer]
            for finding in found:
                with tarfile.open(fileobj=io.BytesIO(tar)) as members:
                    self.assertEqual(members.getmember(str(finding.path)).offset_data,
                                     finding.offset)

    def test_the_same_change_of_two_files(self) -> None:
        """Sums of checksums differ even when the same bits of two files have changed."""
        store, (layer,) = self.stack(make_tar(("a", b"same"), ("b", b"same")))
        for name in "ab":
            flip(store.path("overlay", layer, "diff", name), 1)
        self.assertEqual(["a", "b"], [row[2] for row in self.damaged(store, layer, "full")])

    def test_swapped_tar_split(self) -> None:
        store, layers = self.stack(make_tar(("a", b"one")), make_tar(("b", b"two")),
                                   make_tar(("c", b"three" * 9999)))
        for one, other in ((0, 1), (1, 2)):
            paths = [store.path(f"overlay-layers/{layers[i]}.tar-split.gz") for i in (one, other)]
            data = [read_bytes(path) for path in paths]
            for path, content in zip(paths, data[::-1]):
                put(path, content)
            for i, path in zip((one, other), paths):
                for mode in QUICK:
                    self.assertEqual([("tar-split-wrong", f"layer {layers[i]}", path)],
                                     self.damaged(store, layers[i], mode))
            for path, content in zip(paths, data):
                put(path, content)

    def test_missing_directories(self) -> None:
        store = self.sample()
        layer = store.layers[0]["id"]
        home = store.path("overlay", layer)

        def empty(path: str) -> None:
            shutil.rmtree(path)
            os.mkdir(path)

        for path, damage, code in ((home, shutil.rmtree, "layer-dir-missing"),
                                   (home, empty, "layer-dir-empty"),
                                   (home + "/diff", shutil.rmtree, "diff-missing"),
                                   (home + "/diff", empty, "diff-empty")):
            with self.subTest(code), Kept(path, self.dir + "/kept"):
                damage(path)
                for mode in QUICK:
                    self.assertEqual([(code, f"layer {layer}", path)],
                                     self.damaged(store, layer, mode))

    def test_processes_share_a_layer(self) -> None:
        """Two processes read one large layer; what either doubts is looked at as a whole."""
        files = [(f"f{number}", bytes([number]) * 500_000) for number in range(40)]
        store, (layer,) = self.stack(make_tar(*files))
        for number in (None, 0, 3):
            if number is not None:
                flip(store.path("overlay", layer, "diff", f"f{number}"))
            with self.open(store) as storage:
                found = storage.layer(layer).verify(workers=2)
                self.assertEqual([] if number is None else [f"f{i}" for i in {0, number}],
                                 [finding.path for finding in found])

    def test_images(self) -> None:
        """Manifests, configurations, chains; a layer's damage is found once for all images."""
        store = self.sample()
        one, two = store.images
        config = next(key for key in one["big-data-names"] if key.startswith("sha256:"))
        files = {key: store.path("overlay-images", one["id"], os.fsdecode(cstor.big_data_file(key)))
                 for key in one["big-data-names"]}
        mend = (f"podman rmi -f {one['id']} && podman pull localhost/app:1 && "
                "podman pull localhost/app:latest")
        damages: tuple[tuple[Callable[[str], object], str], ...] = (
            (flip, "changed"), (cut, "truncated"), (grow, "longer"), (os.unlink, "missing"),
            (lambda path: os.truncate(path, 0), "truncated"),
            (put_instead(os.mkfifo), "changed"), (put_instead(os.mkdir), "changed"))
        for key, path in files.items():
            for damage, code in damages:
                with self.subTest(key=key, code=code), Kept(path, self.dir + "/kept"):
                    damage(path)
                    for quick in (False, True):
                        with cstor.Storage.open(store.root) as storage:
                            found = storage.image(one["id"]).verify(quick=quick)
                            self.assertEqual(
                                [(f"big-data-{code}", f"image {one['id']}", path, mend)],
                                [(finding.code, finding.object, finding.path, finding.mend)
                                 for finding in found])
                            self.assertEqual([], storage.image(two["id"]).verify(quick=quick))
        for change, code, actual in (
                ({"layer": two["layer"]}, "image-layers-wrong", mock.ANY),
                ({"layer": "0" * 64}, "layer-unknown", None),
                ({"layer": ""}, "image-layers-wrong", mock.ANY),
                ({"names": ["localhost/x@sha256:" + "1" * 64]}, "name-digest-wrong",
                 "localhost/x@sha256:" + "1" * 64),
                ({"big-data-names": [key for key in files if key != config]}, "big-data-missing",
                 None)):
            with self.subTest(code=code, change=change), Kept(files[config], self.dir + "/kept"):
                store.images[0] = {**one, **change}
                store.save()
                if code == "big-data-missing":  # nor is it recorded
                    os.unlink(files[config])
                with self.open(store) as storage:
                    self.assertEqual([(code, f"image {one['id']}", actual)],
                                     [(finding.code, finding.object, finding.actual)
                                      for finding in storage.image(one["id"]).verify()])
        store.images[0] = one
        store.save()
        flip(store.path("overlay", store.layers[0]["id"], "diff/etc/os-release"))
        self.run_cstor("--root", store.root, "image", "verify", "--all", "--quick")
        found = self.run_cstor("--root", store.root, "image", "verify", "sample", "app:1",
                               "--format", "json", status=4).json
        self.assertEqual([("file-changed", [one["id"], two["id"]])],
                         [(row["code"], row["images"]) for row in found])
        self.run_cstor("--root", store.root, "image", "verify", status=2)
        self.run_cstor("--root", store.root, "image", "verify", "--all", "sample", status=2)

    def test_output(self) -> None:
        store = self.sample()
        layer = store.layers[1]["id"]
        images = [image["id"] for image in store.images]
        flip(store.path("overlay", layer, "diff/srv/app.py"))
        done = self.run_cstor("--root", store.root, "layer", "verify", layer, "--format", "json",
                              status=4)
        (found,) = done.json
        self.assertEqual({
            "code": "file-changed", "severity": "damage", "kind": "changed",
            "object": f"layer {layer}", "path": "srv/app.py",
            "message": "a file's content is not as recorded", "expected": mock.ANY,
            "actual": mock.ANY, "layer": layer, "images": images, "offset": mock.ANY,
            "affects": [*(f"image {image}" for image in images),
                        f"container {store.containers[0]['id']}"],
            "mend": f"podman rmi -f {' '.join(images)} && podman pull localhost/app:1 && "
                    "podman pull localhost/app:latest && "
                    "podman pull docker.io/library/sample:latest"}, found)
        self.assertRegex(found["expected"] + found["actual"], "CRC-64 [0-9a-f]{16}")
        done = self.run_cstor("--root", store.root, "layer", "verify", layer, status=4)
        self.assertRegex(done.out, rf"(?m)^damage +file-changed +layer {layer[:12]} +srv/app.py +a")
        self.run_cstor("--root", store.root, "layer", "verify", "--quick", layer)


# ================================================================================================
# 26. Commands
# ================================================================================================

class CommandLine(StoreTest):
    def setUp(self) -> None:
        super().setUp()
        self.store = self.sample()
        self.guard(self.store.root)
        self.layer = self.store.layers[0]["id"]
        self.tar = self.store.tars[self.layer]

    def cstor(self, *args: str, **kwargs: Any) -> Done:
        return self.run_cstor("--root", self.store.root, *args, **kwargs)

    def ask(self, words: str, status: int = 0, out: str = "", err: str = "") -> Done:
        """Run a command, with LAYER for the first layer; look at what it says."""
        done = self.cstor(*(word.replace("LAYER", self.layer) for word in words.split(" ")),
                          status=status)
        for said, wanted in ((done.stdout, out), (done.stderr, err)):
            self.assertTrue(re.search(wanted.encode(), said), (words, wanted, said[-999:]))
        return done

    def test_a_malformed_file_is_one_failure_of_several_arguments(self) -> None:
        for kind in ("images", "layers", "containers"):
            other = StoreBuilder(os.path.join(self.dir, kind))
            other.write(f"overlay-{kind}/{kind}.json", "[{")
            self.run_cstor("--root", other.root, kind[:-1], "inspect", "a", "b", "c", status=6)

    def test_a_list_opens_each_file_of_images_once(self) -> None:
        opened: list[bytes] = []
        before = cstor.Directory.open

        def counting(directory: cstor.Directory, name: bytes) -> int:
            opened.append(name)
            return before(directory, name)

        with mock.patch.object(cstor.Directory, "open", counting), \
                contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(0, cstor.main(["--root", self.store.root, "image", "list"]))
        found = [name for name in opened if name.startswith(b"overlay-images/")
                 and not name.endswith((b".json", b".lock"))]
        self.assertEqual(2 * len(self.store.images), len(found))
        self.assertEqual(len(found), len(set(found)))

    def test_several_arguments_of_which_some_fail(self) -> None:
        """The others are printed, each failure is said, and the highest status counts."""
        overwrite(self.store.path("overlay", self.layer, "diff/bin/hello"), b"X")
        self._before = snapshot(self.store.root)
        image, out = self.store.images[0]["id"], f"{self.dir}/out"
        unknown = ["cstor: error: {0} not known: x (`{0} list` shows what there is)".format(word)
                   for word in ("image", "layer", "container")]
        missing = 'cstor: error: no such file in image localhost/app:1: "{}"'
        wrong = f'cstor: error: layer {self.layer}: "bin/hello": file integrity'
        app = b"print('app')\n" * 400
        for status, words, check, errors in (
                (3, "image inspect x app:1 x", [image], unknown[:1] * 2),
                (3, f"layer inspect x {self.layer}", [self.layer], unknown[1:2]),
                (3, "container inspect web x", [self.store.containers[0]["id"]], unknown[2:]),
                (3, "image stat app:1 a srv/app.py b --format json", ["/srv/app.py"],
                 [missing.format("a"), missing.format("b")]),
                (3, "image inspect x", b"", unknown[:1]),
                (4, "image cat app:1 a bin/hello srv/app.py b", app,
                 [missing.format("a"), wrong, missing.format("b")]),
                (3, f"image cat app:1 a bin/hello -o {out}", b"", [missing.format("a")])):
            with self.subTest(words):
                done = fork_main(["--root", self.store.root, *words.split()], IDLE)
                said = done.err.splitlines()
                self.assertEqual([status, len(errors)], [done.returncode, len(said)], said)
                for line, error in zip(said, errors):
                    self.assertEqual(error, line[:len(error)])
                if isinstance(check, bytes):
                    self.assertEqual(check, done.stdout[-len(check):] if check else done.stdout)
                else:
                    self.assertEqual(check, [entry.get("id") or entry["path"]
                                             for entry in done.json])
        self.assertFalse(os.path.exists(out))

    def test_a_python_without_a_module(self) -> None:
        """Each standard module that can be missing: the work goes on, or one line names it."""
        tar = make_tar(("etc/os-release", b"NAME=Small\n"))
        small = StoreBuilder(os.path.join(self.dir, "small"))
        small.image(small.layer(tar), "docker.io/library/small:latest")
        small.save()
        for name, data in (("", tar), (".gz", gzip.compress(tar)), (".bz2", bz2.compress(tar)),
                           (".xz", lzma.compress(tar))):
            small.write("../in.tar" + name, data)
        out = os.path.join(self.dir, "out")
        commands = {
            "list": ["image", "list"], "export": ["layer", "export", small.layers[0]["id"]],
            "cat": ["image", "cat", "small", "/etc/os-release"],
            "toc": ["image", "toc", "small", "--digests"],
            "extract": ["image", "extract", "small", out, "--no-same-owner"],
            "oci": ["image", "copy-to-oci", "small", out, "--compress", "gzip"],
            **{name: ["tar-diff", *[os.path.join(self.dir, "in.tar" + end) for end in ("", end)]]
               for name, end in (("tar", ""), ("gz", ".gz"), ("bz2", ".bz2"), ("xz", ".xz"))}}
        every = " ".join(commands)
        stops: dict[str, str] = {  # what needs the module; of all others nothing does
            "argparse": every, "re": every, "json": "list export cat toc extract oci",
            "zlib": every.replace("list ", ""), "binascii": "list export cat toc extract oci",
            "hashlib": every, "struct": "gz", "fcntl": "extract oci",
            "gzip": "gz", "bz2": "bz2", "_bz2": "bz2", "lzma": "xz", "_lzma": "xz"}
        loaded = subprocess.run(  # nothing runs without these
            [sys.executable, "-c", "import sys; print(*sys.modules, *sys.builtin_module_names)"],
            stdout=subprocess.PIPE, check=True).stdout.decode().split()
        with open(SCRIPT, encoding="utf-8") as script:
            wanted = {alias.name for node in ast.walk(ast.parse(script.read()))
                      if isinstance(node, ast.Import) for alias in node.names}
        self.assertLess(set(stops) - {"_bz2", "_lzma"}, wanted)
        code = textwrap.dedent("""\
            import io, json, shutil, sys
            module, commands, out = json.loads(sys.argv[1])
            sys.modules.pop(module.lstrip("_"), None)
            sys.modules[module] = None
            import cstor
            sys.argv, said, codes, sys.stdout = ["cstor"], sys.stdout, {}, open("/dev/null", "w")
            for name, words in commands.items():
                sys.stderr = io.StringIO()
                status = cstor.main(words)
                codes[name] = status, sys.stderr.getvalue()
                shutil.rmtree(out, ignore_errors=True)
            print(codes, file=said)
            """)
        for module in sorted(wanted - set(loaded) - {"importlib"} | {"_bz2", "_lzma", "_hashlib"}):
            sent = {name: ["--root", small.root, *words] for name, words in commands.items()}
            done = subprocess.run(
                [sys.executable, "-c", code, json.dumps([module, sent, out])], cwd=HERE, env=IDLE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
            self.assertEqual((0, b""), (done.returncode, done.stderr), module)
            for name, (status, text) in ast.literal_eval(done.stdout.decode()).items():
                stopped = name in stops.get(module, "").split()
                with self.subTest(module=module, command=name):
                    self.assertEqual(6 if stopped else 0, status, text)
                    if stopped:
                        self.assertEqual(
                            f"cstor: error: this Python has no module {module}; on Debian, `apt "
                            "install python3` brings it (libpython3-stdlib)\n", text)
                    else:
                        self.assertNotIn("error", text)

    def test_the_database_without_sqlite(self) -> None:
        self._root = ""
        sqlite3.connect(os.path.join(self.store.root, "db.sql")).close()
        with mock.patch.dict(sys.modules, {"sqlite3": None}), \
                contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(0, cstor.main(["--root", self.store.root, "container", "list"]))
        self.assertIn("web", out.getvalue())
        self.assertEqual(
            f"cstor: warning: {self.store.root}/db.sql: this Python has no module sqlite3; on "
            "Debian, `apt install python3` brings it (libpython3-stdlib)\n", err.getvalue())

    def test_a_system_without_threads_and_processes(self) -> None:
        """What a limit of processes (ulimit -u, a pids cgroup) leaves is one thread."""
        out, none = os.path.join(self.dir, "out"), OSError(errno.EAGAIN, "nothing to be had")
        commands: list[tuple[list[str], int, str]] = [
            (["layer", "export", self.layer, "-o", out + ".tar"], 0, ""),
            (["layer", "export", self.layer, "-o", out + ".tar", "--no-verify"], 0, ""),
            (["image", "toc", "sample", "--digests"], 0, ""),
            (["image", "copy-to-oci", "sample", out + ":gz", "--compress=gzip"], 0, ""),
            (["image", "extract", "sample", out + ".d", "--no-same-owner"], 0, "")]
        if sys.version_info < (3, 14):
            commands.append((["image", "copy-to-oci", "sample", out + ":z", "--compress=zstd"], 6,
                             "cstor: error: zstd: Resource temporarily unavailable\n"))
        plain = [self.cstor(*words) for words, status, _ in commands if not status]
        made = snapshot(self.dir), self.tree_bytes(out + ".tar", out, out + ".d")
        for path in (out + ".tar", out, out + ".d"):
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError(
                "can't start new thread")) as start, \
                mock.patch.object(os, "fork", side_effect=none) as fork, \
                mock.patch.object(subprocess, "Popen", side_effect=none), \
                mock.patch.object(cstor, "default_workers", return_value=4), \
                mock.patch.object(cstor, "BATCH", 1):
            for number, (words, status, text) in enumerate(commands):
                with contextlib.redirect_stderr(io.StringIO()) as err, \
                        mock.patch.object(sys, "stdout", io.TextIOWrapper(io.BytesIO())) as said:
                    self.assertEqual(status, cstor.main(["-q", "--root", self.store.root, *words]))
                    said.flush()
                    if not status:
                        self.assertEqual(plain[number].stdout if "toc" in words else b"",
                                         said.buffer.getvalue() if "toc" in words else b"")
                self.assertEqual(text, err.getvalue())
        self.assertGreaterEqual(start.call_count, 3)
        self.assertTrue(fork.called)
        self.assertEqual(made[1], self.tree_bytes(out + ".tar", out, out + ".d"))

    @staticmethod
    def tree_bytes(*roots: str) -> dict[str, bytes]:
        """Return the contents of all files."""
        return {path: read_bytes(path)
                for root in roots for path in [root, *glob.glob(root + "/**", recursive=True)]
                if os.path.isfile(path)}

    def test_the_installed_command_is_compiled(self) -> None:
        need_tools("make", "install")
        subprocess.run(["make", "-s", "-C", HERE, "install", f"prefix={self.dir}/usr",
                        f"PYTHON={sys.executable}"], check=True)
        self.assertEqual(1, len(os.listdir(f"{self.dir}/usr/lib/cstor/__pycache__")))
        done = self.run_cstor("--version", command=[f"{self.dir}/usr/bin/cstor"])
        self.assertEqual(f"cstor {cstor.__version__}\n", done.out)

    def test_a_start_does_nothing_twice(self) -> None:
        """One parser is made, and one file of configuration read once for both schemes."""
        import argparse

        make, files = argparse.ArgumentParser.__init__, []
        conf = os.path.join(self.dir, "storage.conf")
        put(conf, f'[storage]\ndriver = "overlay"\ngraphroot = "{self.store.root}"\n'
                  f'runroot = "{self.dir}"\n')

        def open_input(path: str) -> int:
            files.append(path)
            return real(path)

        real = cstor.open_input
        with mock.patch.object(cstor, "open_input", open_input), \
                mock.patch.dict(os.environ, {"CONTAINERS_STORAGE_CONF": conf}):
            for words, count in (("image list", 1), ("--timeout 5 image ls -q --no-trunc", 1),
                                 ("layer list --format=json", 1), ("-q image list", 3)):
                files.clear()
                with mock.patch.object(argparse.ArgumentParser, "__init__", autospec=True,
                                       side_effect=make) as made, \
                        contextlib.redirect_stdout(io.StringIO()) as out:
                    self.assertEqual(0, cstor.main(words.split()))
                self.assertTrue(out.getvalue())
                self.assertEqual((count, [conf]), (made.call_count, files), words)

    def test_garbage_is_not_looked_for_in_the_program_itself(self) -> None:
        code = ("import cstor, gc, runpy, sys\n"
                "cstor.main(['--version'])\n"
                "print(gc.get_freeze_count(), gc.isenabled())\n"
                "sys.argv = ['cstor.py', '--version']\n"
                "try:\n    runpy.run_path(%r, run_name='__main__')\n"
                "except SystemExit as end:\n"
                "    print(end.code, gc.get_freeze_count() > 5000, gc.isenabled())\n" % SCRIPT)
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=IDLE, check=True,
                              stdout=subprocess.PIPE).stdout.decode().splitlines()
        self.assertEqual(["0 True", "0 True True"], done[1::2], done)

    def test_one_file_with_byte_code(self) -> None:
        """The Python that made it compiles nothing; any other runs the source that is in it."""
        need_tools("make")
        made: list[bytes] = []
        for moment in ("", "1000000000", "1000000000"):
            path = f"{self.dir}/{len(made)}.pyz"
            subprocess.run(["make", "-s", "-C", HERE, "dist", f"PYZ={path}",
                            f"PYTHON={sys.executable}"], check=True,
                           env={**IDLE, "SOURCE_DATE_EPOCH": moment})
            made.append(read_bytes(path))
        self.assertEqual(["0.pyz", "1.pyz", "2.pyz", "store"], sorted(os.listdir(self.dir)))
        self.assertTrue(made[1] == made[2] != made[0])
        code = ("import runpy, sys, zipimport\n"
                "load, found = zipimport._unmarshal_code, []\n"
                "zipimport._unmarshal_code = lambda *a: (found.append(a[3]), load(*a))[1]\n"
                "sys.argv = ['x.pyz', '--version']\n"
                "try:\n    runpy.run_path(%r, run_name='__main__')\n"
                "except SystemExit:\n    print(found)\n" % path)
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        self.assertIn("['cstor']\n", done.stdout.decode())
        arguments = ["--root", self.store.root, "image", "list", "--format", "json"]
        expected = self.run_cstor(*arguments).stdout
        magic = importlib.util.MAGIC_NUMBER.hex()
        pythons = {magic: sys.executable}
        for python in [*glob.glob("/usr/bin/python3.*[0-9]"), *glob.glob(
                os.path.expanduser("~/.pyenv/versions/3.*/bin/python3"))]:
            code = ("import sys, importlib.util as util\n"
                    "print(util.MAGIC_NUMBER.hex() if sys.version_info >= (3, 9) else '')")
            found = subprocess.run(
                [python, "-c", code],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout.decode()
            pythons.setdefault(found.strip(), python)
        pythons.pop("", None)
        for number, python in list(pythons.items())[:3]:
            command = [python, f"{self.dir}/0.pyz"]
            self.assertEqual(expected, self.run_cstor(*arguments, command=command).stdout)
            done = subprocess.run(
                [python, "-c", "import cstor; print(cstor.__file__)"], check=True,
                env={**IDLE, "PYTHONPATH": command[1]}, stdout=subprocess.PIPE, cwd="/")
            self.assertEqual(command[1] + ("/cstor.pyc" if number == magic else "/cstor.py"),
                             done.stdout.decode().strip())

    def test_the_demo_where_nothing_can_be_written(self) -> None:
        need_tools("make")
        done = subprocess.run(["make", "-s", "-C", HERE, "demo", "DEMO=/dev/null/d",
                               f"PYTHON={sys.executable} -B"], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, env={**IDLE, "LC_ALL": "C"}, check=False)
        self.assertRegex(done.stderr.decode(), r"\Ano sample store was made: /dev/null/d: Not a "
                         r"directory \(make demo DEMO=DIR[^\n]*\)\nmake: [^\n]*Error 1\n\Z")

    def test_export_to_stdout_and_to_a_file(self) -> None:
        self.assertEqual(self.tar, self.cstor("layer", "export", self.layer).stdout)
        target = os.path.join(self.dir, "layer.tar")
        for options in (f"-o {target}", f"--no-verify -o {target}", f"-q --output {target}"):
            done = self.ask(f"layer export {self.layer[:9]} {options}")
            self.assertEqual((b"", b"", self.tar), (done.stdout, done.stderr, read_bytes(target)))
            self.assertEqual({"layer.tar", "store"}, set(os.listdir(self.dir)))

    def test_a_failed_export_leaves_nothing_and_spoils_nothing(self) -> None:
        target = os.path.join(self.dir, "layer.tar")
        put(target, "old")
        self._root = ""
        overwrite(self.store.path("overlay", self.layer, "diff/etc/passwd"), b"R")
        self.ask(f"layer export LAYER -o {target}", 4,
                 err='"etc/passwd": file integrity checksum failed: expected CRC-64 ')
        self.assertEqual({"layer.tar", "store"}, set(os.listdir(self.dir)))
        self.assertEqual(b"old", read_bytes(target))
        for place in ("/none/x", ""):
            self.ask(f"layer export LAYER -o {self.dir}{place}", 6)

    def test_special_targets(self) -> None:
        link, target = os.path.join(self.dir, "link"), os.path.join(self.dir, "target")
        os.symlink(target, link)
        self.ask(f"layer export LAYER -o {link}")
        self.assertTrue(os.path.islink(link))
        self.assertEqual(len(self.tar), os.path.getsize(target))
        before = os.stat("/dev/null")
        self.ask("layer export LAYER -o /dev/null")
        after = os.stat("/dev/null")
        self.assertEqual((before.st_ino, before.st_mode), (after.st_ino, after.st_mode))
        self.ask("layer export LAYER -o /dev/full", 6, err="No space left on device")
        fifo = os.path.join(self.dir, "fifo")
        os.mkfifo(fifo)
        with subprocess.Popen(["sh", "-c", f"cat {fifo} > {target}"]):
            self.ask(f"layer export LAYER -o {fifo}")
        self.assertEqual(self.tar, read_bytes(target))

    def test_interrupted_export(self) -> None:
        code = (f"import sys, time; sys.path.insert(0, {HERE!r}); import cstor\n"
                "cstor.write_all = lambda fd, data: (print('x', flush=True), time.sleep(30))\n"
                "sys.exit(cstor.main())\n")
        target = os.path.join(self.dir, "layer.tar")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with subprocess.Popen(
                    [sys.executable, "-c", code, "--root", self.store.root, "layer", "export",
                     self.layer, "-o", target],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=IDLE) as process:
                assert process.stdout and process.stderr
                self.assertEqual(b"x\n", process.stdout.readline())
                process.send_signal(number)
                self.assertEqual((b"", b""), process.communicate(timeout=20))
            self.assertEqual(128 + number, process.returncode)
            self.assertEqual(["store"], os.listdir(self.dir))

    def test_closed_pipes_end_quietly(self) -> None:
        for words in (f"layer export {self.layer}", f"layer export {self.layer} --no-verify",
                      "layer list --format json", "--help", "image list"):
            reader, writer = os.pipe()
            os.close(reader)
            done = self.cstor(*words.split(), stdout=writer, status=141)
            os.close(writer)
            self.assertEqual(b"", done.stderr)

    def test_closed_standard_streams(self) -> None:
        for words, redirect, status in (
                (["layer", "export", self.layer], ">&-", 6),
                (["layer", "export", self.layer], "2>&-", 0),
                (["layer", "export", self.layer], "<&-", 0),
                (["layer", "export", self.layer], ">/dev/full", 6),
                (["image", "list"], ">&- 2>&-", 6),
                (["image", "inspect", "nothing"], "2>/dev/full", 3),
                (["image", "inspect", "nothing"], "2>&1 >&- | :", 6)):
            done = self.run_cstor("-c", f'set -o pipefail; "$@" {redirect}', "sh", *COMMAND,
                                  "--root", self.store.root, *words, command=["bash"],
                                  status=status)
            if status == 0:
                self.assertEqual(self.tar, done.stdout)

    def test_output_that_does_not_block(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        process = subprocess.Popen(
            [*COMMAND, "--root", self.store.root, "layer", "export", self.layer],
            stdout=writer, stderr=subprocess.PIPE, env=IDLE)
        os.close(writer)
        wait_for(lambda: select.select([reader], [], [], 0)[0])
        time.sleep(.1)  # until it has filled the pipe
        with open(reader, "rb") as file:
            self.assertEqual(self.tar, file.read())
        self.assertEqual(b"", process.communicate()[1])
        self.assertEqual(0, process.returncode)

    def test_words_statuses_and_errors(self) -> None:
        usage = r"\Acstor: error: [^\n]*{}[^\n]*--help\)\n\Z"
        for status, words, err in (
                (0, "image list", ""), (0, "--version", ""), (0, "--help", ""),
                (2, "image", ""), (2, "image list x", ""), (3, "image inspect nothing", ""),
                (3, "layer export zz", ""), (6, f"layer export {self.store.layers[3]['id']}", ""),
                (2, "image list --format xml", ""), (2, "layer export LAYER -o ", ""),
                (2, "layer export LAYER -o missing/", ""), (2, "--root  image list", ""),
                (3, "--root /nonexistent image list", ""), (3, f"--root {SCRIPT} image list", ""),
                (2, "--format json image list", usage.format("choose from .*store")),
                (2, "image lost", usage.format("choose from .*history")),
                (2, "layer export", usage.format("LAYER")),
                (2, "image list --roo x", usage.format("--roo")),
                (3, "--store /none image list", ""), (3, f"--store {self.dir} image list", ""),
                (3, "--imagestore /none image list", ""), (3, "--runroot /none image list", ""),
                (6, f"layer export LAYER -o {self.dir}/none/x", f"{self.dir}/none/x: No "),
                (6, "layer export LAYER -o /dev/full", "/dev/full: No ")):
            self.ask(words, status, err=err)
        self.assertRegex(self.run_cstor(status=2).err, usage.format("COMMAND"))
        for words in (f"layer export {self.layer}", "image list", "--help"):
            with open("/dev/full", "wb") as full:
                done = self.cstor(*words.split(), stdout=full, status=6)
            self.assertEqual("cstor: error: stdout: No space left on device\n", done.err)

    def test_options_before_and_after_the_command(self) -> None:
        root = self.store.root
        for words in (f"--root {root} image ls", f"image ls --root {root}",
                      f"--store {root} image list --root {root}"):
            self.assertIn(b"sample", self.run_cstor(*words.split()).stdout)
        others = [os.path.join(self.dir, name) for name in "abc"]
        for other in others:
            os.makedirs(os.path.join(other, "overlay-images"))
        done = self.run_cstor(
            *f"--store {others[0]} store --store {others[1]} info --root {root} --store c --store "
            f"{root} --store {others[0]} --format json".split(), cwd=self.dir)
        self.assertEqual(others, done.json["additional-image-stores"])

    def test_every_way_to_run_it(self) -> None:
        expected = self.cstor("image", "list", "--format", "json").stdout
        self.assertEqual(2, len(json.loads(expected)))
        other, archive = (os.path.join(self.dir, name) for name in ("other_name", "cstor.zip"))
        copy_script(other)
        with zipfile.ZipFile(archive, "w") as file:
            file.write(SCRIPT, "cstor.py")
            file.write(SCRIPT, "__main__.py")
        with open(SCRIPT, "rb") as script:
            ways: list[tuple[list[str], dict[str, Any]]] = [
                (["-"], {"stdin": script}), (["-m", "cstor"], {"cwd": HERE}), ([other], {}),
                ([archive], {}), (["-m", "cstor"], {"env": {"PYTHONPATH": archive}, "cwd": "/"})]
            for words, options in ways:
                done = self.cstor("image", "list", "--format", "json",
                                  command=[sys.executable, *words], **options)
                self.assertEqual(expected, done.stdout, words)
        done = self.run_cstor("--help", command=[sys.executable, other])
        self.assertIn("usage: other_name ", done.out)

    def test_listings(self) -> None:
        image, layers = self.store.images[1]["id"], [entry["id"] for entry in self.store.layers]
        table = self.ask("image list").out.splitlines()
        self.assertEqual(["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"],
                         [word.strip() for word in table[0].split("  ") if word])
        self.assertEqual(["docker.io/library/sample", "latest", image[:12]],
                         sorted(table[1:])[0].split()[:3])
        self.ask("image ls --no-trunc", out=image)
        listed = self.ask("image layers sample --format json").json
        self.assertEqual(layers[:3], [entry["id"] for entry in listed])
        self.assertEqual(self.store.layers[0], {key: value for key, value in listed[0].items()
                                                if key in self.store.layers[0]})
        history = self.ask("image history sample --format json").json
        self.assertEqual(["step 2", "step 1", "step 0"], [row["created_by"] for row in history])
        self.ask("image history sample", out="step 1")
        container, = self.ask("container list --format json").json
        self.assertEqual((["web"], "localhost/app:latest", ""),
                         (container["names"], container["image-name"], container["state"]))
        self.ask("container list", out="web")
        inspected, = self.ask("layer inspect " + layers[1]).json
        self.assertEqual(
            ([layers[0]], [entry["id"] for entry in self.store.images], [],
             self.store.path(f"overlay-layers/{layers[1]}.tar-split.gz")),
            tuple(inspected[key] for key in ("lower", "images", "faults", "tar-split")))
        found, = self.ask("container inspect web").json
        self.assertEqual(("web", self.store.containers[0]["metadata"]),
                         (found["details"]["name"], found["metadata"]))
        info = self.ask("store info --format json").json
        self.assertEqual((2, 4, 1, self.store.root), tuple(
            info[key] for key in ("images", "layers", "containers", "graph-root")))
        self.ask("store info --format table", out="graph-root")
        for words in ("image inspect sample", "layer inspect LAYER", "container inspect web"):
            self.ask(words + " --format table", out="created")

    def test_ids_alone(self) -> None:
        images, layers, containers = ([entry["id"] for entry in entries] for entries in (
            self.store.images, self.store.layers, self.store.containers))
        for words, ids in (("image history sample", layers[2::-1]), ("image list", images),
                           ("layer ls", layers), ("container list", containers),
                           ("image layers sample", layers[:3])):
            self.assertEqual([name[:12] for name in ids],
                             self.ask(words + " -q").out.splitlines())
            self.assertEqual(ids, self.ask(words + " --no-trunc --quiet").out.splitlines())
            self.ask("-q " + words, out="CREATED")
            key = "layer" if "history" in words else "id"
            self.assertEqual(ids, [entry[key] for entry in self.ask(
                words + " -q --format json").json if key in entry])

    def test_intermediate_images(self) -> None:
        self._root = ""
        steps: list[dict[str, Any]] = [{"created_by": word, "empty_layer": word != "base"}
                                       for word in ("base", "env", "cmd", "other")]
        base, layer = self.layer, self.store.layer(make_tar(("z", b"")), self.layer)
        named = self.store.image(layer, "localhost/n:1", history=[*steps[:2], {"created_by": "z"}])
        first = self.store.image(base, history=steps[:1])
        second = self.store.image(base, history=steps[:2])
        alone = self.store.image(base, history=[steps[0], steps[3]])
        leaf = self.store.image(layer, history=[*steps[:1], steps[2], {"created_by": "z"}])
        self.store.save()

        def listed(*words: str) -> set[str]:
            return {entry["id"] for entry in self.cstor(
                "image", "list", "--format", "json", *words).json}

        samples = {entry["id"] for entry in self.store.images[:2]}
        self.assertEqual({*samples, named, alone, leaf}, listed())
        for word in ("-a", "--all"):
            self.assertEqual({*samples, named, first, second, alone, leaf}, listed(word))
        self.assertEqual(5, len(self.cstor("image", "list", "-q").stdout.splitlines()))
        os.unlink(self.store.path("overlay-images", second, "manifest"))
        self.assertEqual({*samples, named, second, alone, leaf}, listed())

    def test_who_uses_a_layer(self) -> None:
        layers = [entry["id"] for entry in self.store.layers]
        app, top = (entry["id"] for entry in self.store.images)
        web = self.store.containers[0]["id"]
        link = self.store.read(f"overlay/{layers[3]}/link")
        for layer, images, containers in ((layers[0], [app, top], [web]), (layers[2], [top], [web]),
                                          (layers[3], [], [web])):
            for reference in (layer, self.store.path("overlay", layer),
                              self.store.path("overlay", layer, "diff/etc/x"),
                              f"overlay/{layer}/diff/../merged", os.path.relpath(
                                  self.store.path("overlay", layer, "work")),
                              *[self.store.path("overlay/l", link)] * (layer == layers[3])):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    cstor.main(["--root", self.store.root, "layer", "inspect", reference])
                found = json.loads(out.getvalue())[0]
                self.assertEqual((layer, images, containers, ["web"]), (
                    found["id"], found["images"], found["containers"], found["container-names"]))
                self.assertNotIn("chain", found)
        self.assertEqual(["localhost/app:1", "localhost/app:latest",
                          "docker.io/library/sample:latest"], self.cstor(
                              "layer", "inspect", layers[0]).json[0]["image-names"])
        found = self.cstor("layer", "inspect", "--chain", layers[2]).json[0]
        self.assertEqual(layers[:3], found["chain"])
        for path in (f"/else/{layers[0]}/diff", self.dir, self.store.path("overlay", "7" * 64)):
            self.assertIn(b"layer not known", self.cstor("layer", "inspect", path,
                                                         status=3).stderr)

    def test_containers_that_podman_does_not_know(self) -> None:
        self._root = ""
        self.store.container("", self.store.layers[3]["id"], "builder", metadata="")
        self.store.save()
        states = {entry["names"][0]: entry["state"] for entry in self.cstor(
            "container", "list", "--format", "json").json}
        self.assertEqual({"web": "", "builder": "storage"}, states)

    def test_names_cannot_steer_a_terminal(self) -> None:
        self._root = ""
        self.store.images[0]["names"] = ["localhost/\x1b[31mred\u202e\n:x", "\ud800"]
        self.store.save()
        for words in (["image", "list"], ["image", "inspect", self.store.images[0]["id"]]):
            for env in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}):
                shown = self.cstor(*words, env=env).stdout
                self.assertNotIn(b"\x1b", shown)
                shown.decode("ascii")

    def test_terminal(self) -> None:
        master, slave = open_terminal()
        code = (f"import sys; sys.path.insert(0, {HERE!r}); import cstor\n"
                "cstor.ProgressLine.INTERVAL = 0\n"
                "sys.exit(cstor.main())")
        done = self.run_cstor("--root", self.store.root, "layer", "export", self.layer,
                              command=[sys.executable, "-c", code], stderr=slave)
        self.assertEqual(self.tar, done.stdout)
        shown = os.read(master, 4096)
        self.assertRegex(shown, rb"\r[\d.]+ MB of 3.01 MB \(\d+%\), 0:00 left, [0-4] files, "
                                rb"[\d.]+ MB/s")
        self.assertTrue(shown.endswith(b"\r\x1b[K"))
        self.run_cstor("-q", "--root", self.store.root, "layer", "export", self.layer, stdout=slave,
                       status=2)
        os.close(slave)
        os.close(master)

    def shown(self, columns: int, *args: str, status: int = 0) -> list[str]:
        """Return the lines, with their ends, that show on a terminal; progress, or help."""
        master, slave = open_terminal()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 0, columns, 0, 0))
        code = (f"import sys; sys.path.insert(0, {HERE!r}); import cstor\n"
                "cstor.ProgressLine.INTERVAL = 0\nsys.exit(cstor.main())")
        with subprocess.Popen([sys.executable, "-c", code, "--root", self.store.root, *args],
                              env=IDLE, stdin=subprocess.DEVNULL, stderr=slave,
                              stdout=slave if "--help" in args else subprocess.DEVNULL) as process:
            os.close(slave)
            output = b""
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while True:
                    output += os.read(master, 65536)
        os.close(master)
        self.assertEqual(status, process.returncode, output)
        return [line for line in output.decode().replace("\x1b[K", "").split("\r") if line]

    def test_progress_of_many_layers_fits_and_rises_once(self) -> None:
        images = [entry["id"] for entry in self.store.images]
        for number, (columns, words) in enumerate((
                (0, ["image", "export", *images, "--as", "docker-archive", "-o", "@"]),
                (80, ["image", "export", *images, "--as", "oci-archive", "-o", "@"]),
                (50, ["image", "copy-to-oci", images[1], "@"]),
                (39, ["image", "copy-to-oci", images[1], "@", "--compress", "gzip"]),
                (34, ["image", "export", images[1], "-o", "@"]),
                (5, ["image", "extract", images[1], "@",
                     *["--no-same-owner"] * bool(os.geteuid())]),
                (3, ["layer", "export", self.layer, "-o", "@"]),
                (1, ["layer", "export", self.layer, "-o", "@"]))):
            lines = [line for line in self.shown(columns, *(
                os.path.join(self.dir, f"out{number}") if word == "@" else word for word in words))
                     if line.strip() and "owned by you" not in line]  # only users are told
            self.assertLess(max(map(len, lines), default=0), columns or 80, words)
            if columns > 4:
                done = [int(found[1]) for found in (re.search(r"(\d+)%", line) for line in lines)
                        if found]
                self.assertEqual((sorted(done), 100), (done, done[-1]), words)
                self.assertEqual(len(lines), len(done))
            if columns in (0, 80):
                self.assertRegex(lines[-1], r"\A[\d.]+ MB of [\d.]+ MB \(100%\), 0:00 left, "
                                            r"\d+ files, [\d.]+ MB/s\Z")

    def test_progress_of_every_long_command_ends_at_100(self) -> None:
        """What it is of can be known before, but for what comes from a pipe or a registry."""
        need_proc()  # streams name open files
        self.store = builder = StoreBuilder(os.path.join(self.dir, "long"))
        tar = b"".join([entry(b"d/", typeflag=b"5"), *(entry(b"d/f%d" % i, b"%d" % i * 40_000)
                                                       for i in range(9)),
                        entry(b"d/hard", typeflag=b"1", linkname=b"d/f8"), bytes(1024)])
        layer = builder.layer(tar)
        top = builder.layer(make_tar(("e", b"e" * 300_000)), layer)
        builder.image(top, "localhost/t:1")
        builder.save()
        files, tars = 360_000 + 300_000, len(tar) + len(builder.tars[top])
        unset = ["--no-same-owner"] * bool(os.geteuid())
        for words in (["stream", layer, "-o", self.dir + "/inline"],
                      ["stream", layer, "-o", self.dir + "/outside", "--external",
                       self.dir + "/list"], ["export", layer, "-o", self.dir + "/tar"]):
            self.cstor("layer", *words)
        put(self.dir + "/other", tar[:-1024] + entry(b"more") + bytes(1024))
        put(self.dir + "/tar.gz", gzip.compress(tar))
        size = {name: os.path.getsize(self.dir + "/" + name)
                for name in ("inline", "other", "tar.gz")}
        for number, (line, total) in enumerate((
                ("image cp t:1:/ @", files), ("image cp t:1:/d @", 360_000),
                ("image cp t:1:/d -", 360_000), ("image cp t:1:/e @", 300_000),
                (f"layer cp {layer}:/d @", 360_000), ("image toc t:1 --digests", files),
                ("image toc t:1 --digests --verify", tars + files),
                (f"layer toc {layer} --digests", 360_000), ("image extract t:1 @", files),
                ("image extract t:1 @ --verify", tars + files),
                ("image extract t:1 @ --path d/f*", 360_000), ("image export t:1 -o @", files),
                ("image export t:1 -o @ --verify", tars + files),
                ("image export t:1 -o @ --as oci-archive", tars),
                ("image export t:1 -o @ --as docker-archive", tars),
                ("image copy-to-oci t:1 ./oci", tars),
                ("image copy-to-oci t:1 ./oci", tars),  # there is nothing left to be done
                (f"layer export {layer} -o @", len(tar)), (f"layer stream {layer} -o @", len(tar)),
                ("stream-to-tar ./inline -o @", size["inline"]),
                ("stream-to-tar ./outside -o @ --external ./list", len(tar)),
                ("tar-diff ./tar ./tar.gz", len(tar) + size["tar.gz"]),
                ("tar-diff ./tar ./other", len(tar) + size["other"]))):
            words = line.replace("@", f"./out{number}").replace("./", self.dir + "/").split()
            lines = self.shown(80, *words, *unset * ("extract" in words),
                               status=int("other" in line))
            found = [re.match(r"(\S+ \wB|\d+ B) of (\S+ \wB) \((\d+)%\), ", text)
                     for text in lines]
            done = [int(match[3]) for match in found if match]
            self.assertEqual((sorted(done), 100), (done, done[-1]), line)
            # The last line is shown in any case; files are counted when their batch is begun.
            self.assertTrue(done[-2] == 100 or words[1] in ("cp", "extract"), (line, done))
            self.assertEqual({cstor.human_size(total)}, {each[2] for each in found if each}, line)

    def test_help_in_any_terminal(self) -> None:
        for columns, least, most in ((0, 60, 80), (10, 30, 48), (60, 50, 60), (300, 80, 100)):
            longest = max(map(len, "".join(self.shown(
                columns, "image", "list", "--help")).splitlines()))
            self.assertTrue(least < longest <= most, (columns, longest))

    def test_counts_are_grammatical(self) -> None:
        self.assertEqual(["0 files", "1 file", "2 days", "1 directory", "2 directories"], [
            cstor.counted(number, noun) for number, noun in (
                (0, "file"), (1, "file"), (2, "day"), (1, "directory"), (2, "directory"))])
        done = self.cstor("layer", "extract", self.store.layers[2]["id"], os.path.join(
            self.dir, "one"), *["--no-same-owner"] * bool(os.geteuid()))
        self.assertRegex(done.stdout, rb"\A1 file, 2 directories\n2 B ")

    def test_tracebacks_only_when_asked(self) -> None:
        self.ask("image inspect nothing", 3)
        done = fork_main(["-vv", "--root", self.store.root, "image", "inspect", "nothing"], IDLE)
        self.assertRegex(done.err, r"(?s)\ATraceback .*\ncstor: error: image not known")
        self.assertEqual(3, done.returncode)

    def test_humane_numbers(self) -> None:
        for size, text in ((0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"),
                           (999_500, "1 MB"), (675_450_880, "675 MB"), (-1, "unknown"),
                           (10**16, "10 PB"), (10**19, "1e+04 PB")):
            self.assertEqual(text, cstor.human_size(size))
        now = time.time_ns()
        for seconds, text in ((0, "just now"), (1, "1 second ago"), (119, "1 minute ago"),
                              (7200, "2 hours ago"), (86400 * 13, "13 days ago"),
                              (86400 * 14, "2 weeks ago"), (86400 * 59, "8 weeks ago"),
                              (86400 * 400, "1 year ago")):
            self.assertEqual(text, cstor.human_age(now - seconds * 10**9 - 10**8))
        self.assertEqual("", cstor.human_age(None))


class LookingInside(StoreTest):
    """The commands that look inside, on the sample store."""

    def setUp(self) -> None:
        super().setUp()
        self.store = self.sample()
        self.guard(self.store.root)

    def cstor(self, *args: str, status: int = 0) -> str:
        done = self.run_cstor("--root", self.store.root, *args, status=status)
        return (done.stdout or done.stderr).decode("utf-8", "surrogateescape")

    def test_files(self) -> None:
        lines = self.cstor("image", "files", "sample").splitlines()
        self.assertEqual(sorted(lines), lines)
        self.assertEqual(15, len(lines))
        self.assertIn("/srv/latin1-\udce9", lines)
        self.assertNotIn("/etc/passwd", lines)
        self.assertEqual("/srv/app.py\n", self.cstor("image", "files", "sample", "*.py"))
        self.assertEqual("/srv/app.py\0", self.cstor("image", "files", "-0", "sample", "*.py"))
        self.assertRegex(self.cstor("image", "files", "sample", "-l", "sh"),
                         r"\Alrwxrwxrwx  +0 +0 +0 2023-11-14 22:13:20 /bin/sh -> hello\n\Z")
        entry, = json.loads(self.cstor("image", "files", "sample", "latin*", "--format", "json"))
        self.assertEqual(b"/srv/latin1-\xe9", cstor.unspell(entry["path"]))
        self.assertEqual(10, entry["size"])
        layer = json.loads(self.cstor("image", "layers", "sample", "--format", "json"))[1]["id"]
        self.assertIn("etc/.wh.passwd\n", self.cstor("layer", "files", layer))
        self.assertEqual(lines, self.cstor("container", "files", "web").splitlines())
        self.assertIn("no file in image", self.cstor("image", "files", "sample", "nope", status=3))

    def test_stat_and_cat(self) -> None:
        entry, = json.loads(self.cstor("image", "stat", "sample", "/bin/sh", "--format", "json"))
        self.assertEqual(("/bin/sh", "symlink", "hello"),
                         (entry["path"], entry["type"], entry["linkName"]))
        table = self.cstor("image", "stat", "--follow", "sample", "bin/sh", "srv/version")
        self.assertRegex(table, r"(?s)/bin/hello.*mode +0644.*crc64 +[0-9a-f]{16}.*/srv/version")
        self.assertEqual("#!/bin/sh\necho hello world\n2\n",
                         self.cstor("container", "cat", "web", "/bin/sh", "srv/version"))
        self.assertIn("symbolic", self.cstor("image", "cat", "--no-follow", "sample", "bin/sh",
                                            status=6))
        self.assertIn("is a directory", self.cstor("image", "cat", "sample", "etc", status=6))
        self.assertIn('"/etc/passwd"', self.cstor("image", "cat", "sample", "/etc/passwd",
                                                  status=3))
        base = json.loads(self.cstor("image", "layers", "sample", "--format", "json"))[0]["id"]
        self.assertIn("root:x:0", self.cstor("layer", "cat", base, "/etc/passwd"))

    def test_toc(self) -> None:
        toc = json.loads(self.cstor("image", "toc", "sample"))
        self.assertEqual(toc, json.loads(self.cstor("image", "toc", "sample", "--pretty")))
        with cstor.Storage.open(self.store.root) as storage:
            self.assertEqual(storage.image("sample").toc(), toc)
            self.assertEqual(storage.image("sample").toc(digests=True),
                             json.loads(self.cstor("image", "toc", "--digests", "sample")))
            for layer in storage.layers()[:3]:
                self.assertEqual(layer.toc(), json.loads(self.cstor("layer", "toc", layer.id)))

    def test_diff(self) -> None:
        self.assertEqual("", self.cstor("image", "diff", "app", "localhost/app:latest"))
        self.assertEqual("A /srv/version\n", self.cstor("image", "diff", "app", "sample", status=1))
        change, = json.loads(self.cstor("image", "diff", "sample", "app", "--format", "json",
                                        status=1))
        self.assertEqual(("/srv/version", "deleted", None, 2),
                         (change["path"], change["change"], change["b"], change["a"]["size"]))
        self.assertEqual("", self.cstor("image", "diff", "sample", "web"))
        base, app = (entry["id"] for entry in self.store.layers[:2])
        for layer in (base, app):
            tar, data = f"{self.dir}/{layer}.tar", self.store.tars[layer]
            put(tar, data)
            self.assertEqual("", self.cstor("image", "diff", "layer:" + layer, tar))
        for pack, name in ((gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")):
            packed = pack(data)
            for part, status in ((packed, 0), (packed[:len(packed) // 2], 6)):
                put(f"{tar}.{name}", part)
                self.cstor("image", "diff", app, f"{tar}.{name}", status=status)
        folder = os.path.join(self.dir, "folder")
        self.cstor("layer", "cp", base + ":/", folder)
        self.assertEqual("", self.cstor("image", "diff", base, folder, "--ignore", "owner"))
        os.chmod(os.path.join(folder, "etc/passwd"), 0o600)
        overwrite(os.path.join(folder, "etc/os-release"), b"n")
        self.assertEqual("C /etc/os-release  content,time\nC /etc/passwd  mode\n", self.cstor(
            "image", "diff", base, "dir:" + folder, "--ignore", "owner", status=1))
        for status, side in ((3, "nope"), (3, "/nope"), (6, "tar:" + SCRIPT), (3, "layer:nope")):
            self.cstor("image", "diff", "app", side, status=status)

    def test_a_layer_equals_its_tar_with_its_whiteouts(self) -> None:
        layer = json.loads(self.cstor("image", "layers", "sample", "--format", "json"))[1]["id"]
        tar = os.path.join(self.dir, "layer.tar")
        self.cstor("layer", "export", layer, "-o", tar)
        self.assertEqual("", self.cstor("image", "diff", layer, tar))
        with open(tar, "rb") as file:
            done = self.run_cstor("--root", self.store.root, "image", "diff", "-", layer,
                                  stdin=file)
        self.assertEqual(b"", done.stdout)
        with open(tar, "wb") as file:
            file.write(make_tar(("srv/", None), ("etc/.wh.other", b"")))
        lines = self.cstor("image", "diff", tar, layer, status=1).splitlines()
        self.assertIn("A /etc/passwd", lines)
        self.assertIn("D /etc/other", lines)

    def test_a_copied_layer_keeps_its_whiteouts_in_a_tar(self) -> None:
        store = StoreBuilder(os.path.join(self.dir, "whiteouts"))
        layer = store.layer(make_tar(("d/", None), ("d/.wh.x", b""), ("d/.wh..wh..opq", b"")))
        store.save()
        done = self.run_cstor("--root", store.root, "layer", "cp", layer + ":/d", "-")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as members:
            self.assertEqual(["d", "d/.wh..wh..opq", "d/.wh.x"], members.getnames())
        done = self.run_cstor("--root", store.root, "layer", "cp", layer + ":/d",
                              os.path.join(self.dir, "d"))
        self.assertEqual(["/d/.wh..wh..opq", "/d/.wh.x"], [
            line.rpartition("whiteout): ")[2] for line in done.err.splitlines()])

    def test_names_are_taken_as_they_are_or_as_json_spells_them(self) -> None:
        store = StoreBuilder(os.path.join(self.dir, "names"))
        store.image(store.layer(make_tar(("\udc80", b"byte"), ("\uef80", b"private"))),
                    "localhost/names:latest")
        root = store.save().root
        for name, content in (("\udc80", b"byte"), ("\uef80", b"private"),
                              (cstor.spell("\uef80".encode()), b"private")):
            done = self.run_cstor("--root", root, "image", "cat", "names", name)
            self.assertEqual(content, done.stdout)
            done = self.run_cstor("--root", root, "image", "files", "names", name)
            self.assertIn(os.fsencode("/" + name) if len(name) == 1 else b"/\xee\xbe\x80",
                          done.stdout)

    def test_a_link_cannot_steer_the_terminal(self) -> None:
        store = StoreBuilder(os.path.join(self.dir, "evil"))
        store.image(store.layer(make_tar(("l\x1b[2J", "t\x1b]0;x\x07"))), "localhost/evil:latest")
        store.save()
        for args in (("image", "files", "-l", "evil"), ("image", "stat", "evil", "l\x1b[2J"),
                     ("image", "blame", "evil"), ("image", "diff", "evil", self.dir)):
            output = on_terminal("--root", store.root, *args)
            self.assertIn(b"l\\x1b[2J", output, args)
            self.assertNotIn(b"\x1b]", output.replace(b"\x1b[K", b""), args)

    def test_blame(self) -> None:
        rows = json.loads(self.cstor("image", "blame", "sample", "--format", "json"))
        self.assertEqual({"/bin": "step 0", "/etc": "step 1", "/srv/version": "step 2"},
                         {row["path"]: row["created-by"] for row in rows
                          if row["path"] in ("/bin", "/etc", "/srv/version")})
        row, = json.loads(self.cstor("image", "blame", "sample", "--hidden", "--format", "json"))
        self.assertEqual(("/etc/passwd", "step 0", 26, "whiteout"),
                         (row["path"], row["created-by"], row["wasted"], row["how"]))
        table = self.cstor("image", "blame", "sample", "--hidden")
        self.assertIn("1 hidden, 26 B wasted", table)
        self.assertRegex(self.cstor("image", "blame", "sample", "/srv/*"),
                         r"(?m)^[0-9a-f]{12} +2 B +step 2 +/srv/version$")
        self.cstor("image", "blame", "sample", "nope*", status=3)


# ================================================================================================
# Real stores
# ================================================================================================

# composefs's own server of layers, for which there is a function in its crate.
PEER = {
    "Cargo.toml": """[package]
name = "peer"
version = "0.1.0"
edition = "2021"

[dependencies]
composefs-storage = { version = "=0.9.4", features = ["layer-transfer"] }
tokio = { version = "1", features = ["full"] }
""",
    "src/main.rs": """use std::os::unix::net::UnixListener;

fn main() {
    let path = std::env::args().nth(1).expect("path of a socket");
    for client in UnixListener::bind(path).expect("a socket").incoming() {
        let client = client.expect("a client");
        std::thread::spawn(|| composefs_storage::cstor_service::serve_on_socket_blocking(client));
    }
}
"""}


def build_peer() -> str:
    """Return the program of PEER, which is built once on a machine, for all interpreters."""
    test, = ALLOWED_SKIPS
    key = hashlib.sha256(repr(PEER).encode()).hexdigest()[:12]
    folder = f"/var/tmp/cstor-peer-{os.geteuid()}-{key}"
    for place in (folder, os.path.join(folder, "src")):
        os.makedirs(place, 0o700, exist_ok=True)
    assert os.lstat(folder).st_uid == os.geteuid()
    program = os.path.join(folder, "peer")
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(program):
            return program
        cargo = shutil.which("cargo") or os.path.expanduser("~/.cargo/bin/cargo")
        need(os.access(cargo, os.X_OK), "cargo is not installed", test)
        for name, text in PEER.items():
            put(os.path.join(folder, name), text.encode())
        done = subprocess.run([cargo, "build", "--quiet"], cwd=folder, stdin=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, env={**os.environ,
                                                           "CARGO_PROFILE_DEV_DEBUG": "0"})
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()[:1]
        need(done.returncode == 0, f"cargo cannot build it: {words}", test)
        os.rename(os.path.join(folder, "target/debug/peer"), program)
        shutil.rmtree(os.path.join(folder, "target"))
    return program


class RealStores(unittest.TestCase):
    """Whole stores as podman left them, from CSTOR_TEST_STORES."""

    # Layers that have no tar, by archive: how many, and the words that say why.
    WITHOUT = {"podman5.8": (4, "writable layer"), "podman5.4": (1, "writable layer"),
               "schema1": (3, "writable layer|unusable layer ID")}

    @classmethod
    def setUpClass(cls) -> None:
        where = os.environ.get("CSTOR_TEST_STORES", "")
        need(where and os.path.isdir(where), "CSTOR_TEST_STORES names no directory of real stores")
        need(os.geteuid() == 0, "only root can unpack owners and devices")
        need_tools("tar")
        cls.dir = tempfile.mkdtemp(prefix="cstor-stores-")
        cls.addClassCleanup(shutil.rmtree, cls.dir)
        cls.roots = {}
        for name in sorted(os.listdir(where)):
            if name.endswith(".tar.xz"):
                store = name[:-7]
                os.mkdir(os.path.join(cls.dir, store))
                with lzma.open(os.path.join(where, name)) as file:
                    subprocess.run(["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner",
                                    "-C", os.path.join(cls.dir, store), "-x"], input=file.read(),
                                   check=True, stderr=subprocess.DEVNULL)
                cls.roots[store] = os.path.join(cls.dir, store, store)

    dir: str
    roots: dict[str, str]

    def storages(self) -> Iterator[tuple[str, cstor.Storage]]:
        """Yield every store, which must not change, by name."""
        for name, root in self.roots.items():
            before = snapshot(root)
            with cstor.Storage.open(root + "/st", runroot=root + "/run") as storage:
                yield name, storage
            self.assertEqual(before, snapshot(root))

    def layers(self) -> Iterator[tuple[str, cstor.Layer]]:
        """Yield every layer that has a tar."""
        for name, storage in self.storages():
            for layer in storage.layers():
                if layer.diff_digest:
                    yield name, layer

    def things(self) -> Iterator[tuple[str, Any]]:
        """Yield the images and containers, but for one whose directory is not in the archive."""
        for name, storage in self.storages():
            for image in storage.images():
                yield name, image
            for container in storage.containers():
                if not container.state.get("rootfs"):
                    yield name, container

    def test_every_layer_is_rebuilt(self) -> None:
        self.assertEqual({"composefs", "podman5.4", "podman5.8", "rootless", "schema1"},
                         set(self.roots))
        for name, storage in self.storages():
            without = []
            for layer, verify in itertools.product(storage.layers(), (True, False)):
                out = io.BytesIO()
                try:
                    layer.export(out, verify=verify)
                except (cstor.Unsupported, cstor.FormatError) as error:
                    without.append(str(error))
                    self.assertEqual("", layer.diff_digest)
                    continue
                self.assertEqual(layer.diff_digest, sha256(out.getvalue()))
            count, words = self.WITHOUT.get(name, (0, ""))
            self.assertEqual(2 * count, len(without))
            for reason in without:
                self.assertRegex(reason, words)
            for image in storage.images():
                for get in (image.manifest, image.config, image.history):
                    with contextlib.suppress(cstor.NotFound):
                        get()
            for container in storage.containers():
                self.assertEqual("created", container.state["state"])

    def test_every_layer_by_every_client(self) -> None:
        need_proc()
        for name, storage in self.storages():
            layers, served = (5, 4) if name == "podman5.8" else (2, 2)  # served: of an image
            self.assertEqual((6 if FULL else 3) * layers + served, fetch_by_all(self, storage))

    def from_peer(self, path: str, root: str, layer: str) -> bytes:
        """Return what composefs sends of a layer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            dumb = Dumb(sock)
            dumb.call(diff_id=None, consumer_has_cap_dac_override=True,
                      storage={"storage_path": root, "layer_id": layer})
            return dumb.names()

    def test_every_layer_from_composefs(self) -> None:
        """What its own server gives whole comes out the same, and nothing else comes out at all."""
        program = build_peer()
        path, out = os.path.join(self.dir, "peer"), os.path.join(self.dir, "out")
        found: dict[str, list[int]] = {}
        server = subprocess.Popen([program, path])
        try:
            while socket.socket(socket.AF_UNIX).connect_ex(path):  # bound, and listening
                time.sleep(0.01)
            for name in self.roots if FULL else ("podman5.8", "composefs"):
                root, counts = self.roots[name], found.setdefault(name, [0, 0])
                top = os.path.join(root, "st")
                with cstor.Storage.open(top, runroot=os.path.join(root, "run")) as storage:
                    for layer in storage.layers():
                        if layer.diff_digest:
                            with self.subTest(store=name, layer=layer.id):
                                counts[self.layer_of_peer(path, top, layer, out)] += 1
        finally:
            server.kill()
            server.wait()
        # It cannot give names that are not UTF-8, nor contents that composefs itself keeps.
        known = {"composefs": [2, 0], "podman5.4": [1, 1], "podman5.8": [1, 4],
                 "rootless": [1, 1], "schema1": [1, 1]}
        self.assertEqual(known if FULL else {name: known[name] for name in (
            "podman5.8", "composefs")}, found)

    def layer_of_peer(self, path: str, root: str, layer: cstor.Layer, out: str) -> bool:
        """Read a layer in all of our ways; return whether composefs gave it whole."""
        try:
            whole = sha256(self.from_peer(path, root, layer.id)) == layer.diff_digest
        except OSError:  # it names what is not there
            whole = False
        reference, more = f"{root}#{layer.id}", ("--socket", path, "--digest", layer.diff_digest)
        with cstor.VarlinkClient(path) as client, client.layer(reference) as stream:
            self.assertEqual("", stream.digest)
            stream.digest = layer.diff_digest
            with contextlib.nullcontext() if whole else self.assertRaises(
                    (cstor.CstorError, OSError)):
                self.assertEqual(layer.diff_digest, stream.export(io.BytesIO()))
        for command in (("export", reference, "-o", out), ("extract", reference, out)):
            done = fork_main(["layer", *command, *more], IDLE)
            self.assertEqual(whole, done.returncode == 0, done.err)
            self.assertEqual(whole, os.path.exists(out))
            if whole and command[0] == "export":
                self.assertEqual(layer.diff_digest, sha256(read_bytes(out)))
                os.unlink(out)
        if whole:
            layer.extract(out + "-near")
            members = {member.name.strip(b"/") for member in layer.members()}
            rows = differences(seen_on_disk(out + "-near"), seen_on_disk(out))
            self.assertEqual([], [row for row in rows if row[1] != "mtime" or row[0] in members])
            shutil.rmtree(out)
            shutil.rmtree(out + "-near")
        return whole

    def test_every_layer_as_a_stream(self) -> None:
        for name, layer in self.layers():
            for codec, threshold in itertools.product(CODECS, (0, 1, 4096, 1 << 60) if FULL
                                                      else (1,)):
                with self.subTest(store=name, layer=layer.id, codec=codec), \
                        streamed(layer, codec, threshold) as stream:
                    self.assertEqual(layer.diff_digest, stream.export(io.BytesIO()))

    def test_names_in_tocs_and_contents_of_trees(self) -> None:
        tar, layers, files = os.path.join(self.dir, "layer.tar"), 0, 0
        for _, layer in self.layers():
            with open(tar, "wb") as out:
                layer.export(out)
            listed = subprocess.run(["tar", "--quoting-style=literal", "-tPf", tar],
                                    stdout=subprocess.PIPE, check=True).stdout
            self.assertEqual(listed, b"".join(
                cstor.unspell(item["name"]) + b"\n" for item in layer.toc()["entries"]))
            self.assertEqual([], [member for member in layer.members()
                                  if cstor.Member.parse(member.header).name != member.name])
            layers += 1
        for _, thing in self.things():
            with thing.tree() as tree:
                for path, node, _ in tree.walk():
                    if node.type == "reg":
                        self.assertEqual(node.size, sum(map(len, tree.content(node))))
                        self.assertIs(node, tree.lookup(path)[1])
                        files += 1
        self.assertEqual(13, layers)
        self.assertGreater(files, layers)

    def test_everything_is_extracted(self) -> None:
        """Composefs objects, owners of a rootless store, containers with a changed layer."""
        count, out = 0, os.path.join(self.dir, "out")
        for name, thing in self.things():
            with self.subTest(store=name, thing=thing.title), thing.tree() as tree:
                known = thing.title != "nomanifest"  # its one layer was never a tar
                if not known:
                    with self.assertRaisesRegex(cstor.Unsupported, "has no DiffID, so"):
                        thing.extract(out, verify=True)
                done = thing.extract(out, verify=known)
                self.assertEqual([], tree_differences(out, tree))
                self.assertEqual(({}, []), (done["unset"], done["left-out"]))
                self.assertEqual(sum(node.size for _, node, first in tree.walk()
                                     if node.type == "reg" and first is None), done["bytes"])
                shutil.rmtree(out)
                count += 1
        self.assertEqual(13, count)

    def test_every_image_goes_out_and_comes_back(self) -> None:
        """By an OCI layout and skopeo: schema1, schema2, zstd:chunked and composefs too."""
        need_tools("skopeo", "umount")
        store = Store(os.path.join(self.dir, "fresh"))
        self.addCleanup(store.close)
        layout, count = os.path.join(self.dir, "layout"), 0
        for name, storage in self.storages():
            for image in storage.images():
                tag = f"{name}-{image.id[:9]}"
                try:
                    image.copy_to_oci(layout, tag, compression=("gzip", "none")[count % 2])
                except cstor.CstorError as error:
                    self.assertRegex(str(error), "no tar-split data|no big data item")
                    continue
                run("skopeo", "copy", "-q", f"oci:{layout}:{tag}", store.place(tag))
                with cstor.Storage.open(store.root) as fresh:
                    other = fresh.image(f"localhost/{tag}:latest")
                    self.assertEqual(sha256(image.config_bytes()), "sha256:" + other.id)
                    self.assertEqual([layer.diff_digest for layer in image.layers()],
                                     [layer.diff_digest for layer in other.layers()])
                    with image.tree() as old, other.tree() as new:
                        self.assertEqual([], list(cstor.diff_trees(old, new)))
                count += 1
        self.assertEqual(7, count)
        self.assertEqual(7, len(read_layout(layout)))

    def test_one_image_has_one_toc_wherever_it_lies(self) -> None:
        """As root, rootless, by composefs, from schema1: the headers say what the files are."""
        tocs: dict[tuple[str, ...], list[str]] = {}
        for _, storage in self.storages():
            for image in storage.images():
                chain = tuple(layer.diff_digest for layer in image.layers())
                if all(chain) and chain:
                    tocs.setdefault(chain, []).append(json.dumps(image.toc(digests=True)))
        self.assertEqual([2, 5], sorted(map(len, tocs.values())))
        self.assertEqual([1, 1], [len(set(same)) for same in tocs.values()])

    def test_images(self) -> None:
        self.assertEqual(
            {"composefs": [("127.0.0.1:5555/foo:zc2", 2, [])],
             "podman5.4": [("localhost/img3:latest", 2, [])],
             "podman5.8": [("localhost/img3:latest", 2, []), ("localhost/zc2:latest", 2, [])],
             "rootless": [("localhost/img3:latest", 2, [])],
             "schema1": [("localhost/s1:latest", 2, []), ("localhost/s2:latest", 2, []),
                         ("nomanifest", 1, ["no manifest"]),
                         ("nolayers", 0, ["no manifest", "no layer"])]},
            {name: [(image.names[0], len(image.layers()), image.faults)
                    for image in storage.images()] for name, storage in self.storages()})

    def test_schema1_configuration_and_big_data(self) -> None:
        with cstor.Storage.open(self.roots["schema1"] + "/st") as storage:
            old, new = storage.image("s1").config(), storage.image("s2").config()
            self.assertEqual(
                (new["config"], new["architecture"], new["os"], new["rootfs"]),
                (old["config"], old["architecture"], old["os"], old["rootfs"]))
            image = storage.image("localhost/s1:latest")  # whose ID is the digest of such a one
            self.assertEqual("sha256:" + image.id, sha256(image.config_bytes()))
            image = storage.image("nomanifest")
            self.assertEqual(13, len(image.big_data_names))
            for key in image.big_data_names:
                self.assertEqual(image.record["big-data-sizes"][key], len(image.big_data(key)))

    def test_containers(self) -> None:
        with cstor.Storage.open(self.roots["podman5.8"] + "/st") as storage:
            self.assertEqual({"c1", "m1", "rfs", "vol1"},
                             {c.names[0] for c in storage.containers()})
            self.assertEqual([True], [c.volatile for c in storage.containers()
                                      if c.names == ["vol1"]])
            self.assertTrue(storage.container("rfs").state["rootfs"].startswith("/"))
            self.assertEqual("/lab/podman5.8/st", storage.recorded_roots()["GraphRoot"])

    def test_damaged_contents_are_named(self) -> None:
        need_proc()
        for name in ("podman5.8", "composefs"):
            copy = os.path.join(self.dir, "damaged-" + name)
            subprocess.run(["cp", "-a", self.roots[name] + "/st", copy], check=True)
            with cstor.Storage.open(copy) as storage:
                layer = storage.images()[0].layers()[0]
                with layer.open_file(b"d1/hello") as file:
                    path = os.readlink(f"/proc/self/fd/{file.fileno()}")
                with open(path, "r+b") as damaged:
                    damaged.write(b"H")
                with self.assertRaises(cstor.IntegrityError) as caught:
                    layer.export(io.BytesIO())
                self.assertEqual((b"d1/hello", "CRC-64 44e9cf3f572ad9ac"),
                                 (caught.exception.name, caught.exception.expected))


# ================================================================================================
# Real podman
# ================================================================================================

def odd_tars() -> Iterator[tuple[str, bytes]]:
    """Yield (name, tar) for every kind of tar whose layer can be rebuilt, or is refused."""
    yield from header_tars()
    yield from name_tars()
    yield from end_tars()
    yield from content_tars()
    yield from sparse_tars()
    yield from sparse_by_hand()
    yield from refused_tars()


MARKS = {"=>": b"1", "->": b"2", "|": b"6", "%%": b"4", "%": b"3", "=": b"0"}


def members(text: str, **more: bytes) -> bytes:
    """Return the tar members that are told in words.

    "d/" is a directory, "f=text" or "f" a file, "l->t" a symbolic link, "h=>f" a hard link, "p|" a
    FIFO, "c%3,1" and "b%%8,0" are devices, "[key=value,...]" is an extended header of what follows
    and "g[key=value]" of all the rest; ";field=value" sets other fields.  ``more`` has words that
    stand for others.
    """
    found = []
    for word in text.split():
        if word in more:
            found.append(more[word])
        elif word[-1] == "]":
            name, _, records = word[:-1].encode().partition(b"[")
            pairs = dict(each.split(b"=", 1) for each in records.split(b","))
            found.append(pax(pairs, b"g", name) if name else pax(pairs))
        else:
            found.append(member(*word.split(";")))
    return b"".join(found)


def member(word: str, *given: str) -> bytes:
    """Return the tar member that a word of members() tells."""
    mark = next((mark for mark in MARKS if mark in word), "")
    name, _, value = word.partition(mark) if mark else (word, "", "")
    fields: dict[str, Any] = {"typeflag": MARKS.get(mark, b"5" if name[-1] == "/" else b"0")}
    if mark in ("=>", "->"):
        fields["linkname"] = value.encode("latin-1")
    elif mark in ("%", "%%"):
        fields["major"], fields["minor"] = (b"%07o" % int(number) for number in value.split(","))
    for key, _, text in (each.partition("=") for each in given):
        width = 7 if key in ("mode", "uid", "gid") else 0
        fields[key] = int(text) if key == "size" else text.rjust(width, "0").encode()
    return entry(name.encode("latin-1"), value.encode() if mark == "=" else b"", **fields)


def header_tars() -> Iterator[tuple[str, bytes]]:
    """Yield tars of all dialects."""
    text, gnu, wide = b"contents", b"ustar  \0", base256
    long = b"/".join([b"n" * 60] * 12)
    path, v7 = long.decode(), ";typeflag=\0;magic="
    words = {"LONG": entry(b"L", long + b"\0", b"L", magic=gnu),
             "GNU": entry(b"f", text, magic=gnu), "SIGNED": entry(b"\xe9\xe8", text, signed=True)}
    yield "ustar-prefix", entry(b"f" * 100, text, prefix=b"/".join([b"p" * 50] * 3)) + END
    yield "gnu-long", (
        entry(b"././@LongLink", long + b"\0", b"L", magic=gnu) + entry(long[:100], text, magic=gnu)
        + entry(b"././@LongLink", long + b"\0", b"K", magic=gnu)
        + entry(b"././@LongLink", b"s/" + long + b"\0", b"L", magic=gnu)
        + entry(b"s/" + long[:98], typeflag=b"2", linkname=long[:100], magic=gnu) + END)
    yield "gnu-long-twice", (
        entry(b"L", b"1\0", b"L", magic=gnu) + entry(b"L", b"dir-name/" * 60, b"L", magic=gnu)
        + entry(b"f", text) + entry(b"L", b"l" * 150, b"L", magic=b"") + entry(b"g", text) + END)
    yield "pax", (
        pax({b"path": b"pax/" + long, b"mtime": b"1600000000.123456789", b"uid": b"3000000",
             b"SCHILY.xattr.user.x": b"a=b\nc\0d", b"comment": "ü".encode()})
        + entry(b"short", text) + pax({b"linkpath": long}) + members("link->short") + END)
    yield "pax-size", pax({b"size": b"8"}) + entry(b"f", text, size=0) + END
    yield "pax-then-global", members("[size=3] g1[size=3] f=contents g2;typeflag=g g=contents "
                                     "g3[comment=c]")
    yield "base-256", entry(b"f", text, size=wide(8, 12), uid=wide(5_000_000, 8),
                            mtime=wide(-12345, 12)) + END
    yield "base-256-negative", (entry(b"f", text, uid=wide(-2, 8)) + entry(
        b"d", typeflag=b"5", size=wide(1 << 62, 12)) + entry(b"g", text) + END)
    yield "dir-of-negative-size", (entry(b"d", typeflag=b"5", size=wide(-2, 12))
                                   + entry(b"g", text) + END)
    yield "spaces-and-nuls", (
        entry(b"spaces", text, size=b"         10 ", uid=b"     0 ", mode=b"   644 \0")
        + entry(b"nuls", text, size=b"10", mtime=b"", uid=b"\0")
        + entry(b"full", text, size=b"000000000010", uid=b"00000000") + END)
    for name, line in {
            "v7": f"d/{v7} d/f=contents{v7} d/l=>d/f;magic=",
            "v7-dir-with-size": f"d/{v7};size=600 d/f=contents{v7}",
            "name-of-100": f"{'x' * 50}/{'y' * 49}=contents",
            "pax-size-empty": "[size=] f=contents", "pax-size-plus": "[size=+8] f=contents",
            "pax-size-zeros": f"[size={'0' * 30}8] f=contents",
            "pax-size-negative": "[size=-5] l->f f=contents",
            "pax-twice": "[size=3] [mtime=-1.5] f=contents x;typeflag=x g=contents",
            "pax-names-dir": "[path=d/] f;typeflag=\0;size=99 g=contents",
            "pax-v7": f"[path={path}] f=contents{v7}", "pax-last": "f=contents [comment=1]",
            "pax-then-gnu": "[mtime=1.5] LONG GNU", "signed-sum": "SIGNED",
            "pax-of-512": f"[comment={'c' * 499}] f=contents",
            "pax-global": f"pax_global_header[comment={'c' * 40}] a=contents b=contents",
            "pax-global-512": f"pax_global_header[comment={'c' * 499}] a=contents b=contents",
            "pax-global-twice": "g1[comment=1] g2[comment=2] [path=x/a] a=contents g3[comment=3]",
            "hardlink-with-size": "f=contents it=>f;size=1234 g=contents",
            "symlink-with-size": "f=contents it->f;size=1234 g=contents",
            "dir-with-size": "f=contents it;typeflag=5;size=1234;linkname=f g=contents",
            "fifo-with-size": "f=contents it|;size=1234;linkname=f g=contents",
            "char-with-size": "f=contents it;typeflag=3;size=1234;linkname=f g=contents",
            "devices": "null%1,3 disk%%8,1 setuid=contents;mode=4755 closed=contents;mode=0 "
                       "sticky;typeflag=5;mode=1777"}.items():
        yield name, members(line, **words) + END


# Tars with names of all kinds.
NAMES = {
    "dot-names": "./ ./a=a ./d/./b=b d//c=c",
    "absolute-names": "/etc;typeflag=5 /etc/x=x //etc//y=y",
    "parent-names": "x;typeflag=5 x/../y=y ../up=up ../../x/../../z=z",
    "file-with-slash": "file/=content",
    "symlinked-dir": "real;typeflag=5 lnk->/real rel->lnk/../../../real lnk/f=1 rel/g=2",
    "symlinks-outside": "a/up->../../../.. a/up/f=1 root->/ root/root/g=2 host->/etc "
                        "etc;typeflag=5 host/hostname=3",
    "symlink-then-up": "r/s;typeflag=5 l->r/s l/../f=1",
    "symlink-chain": " ".join(f"l{i}->l{i + 1}" for i in range(39)) + " l39;typeflag=5 l0/f=1",
    "hardlink-through-symlink": "r/f=1 l->r h=>l/f",
    "name-of-255": f"[path={'n' * 255}] f=1",
    "whiteout-then-file": "d/.wh.f d/f=1", "opaque-after-file": "f=1 .wh..wh..opq",
    "whiteout-parents": ".wh.d/f=1 .wh..wh.plnk;typeflag=5 .wh..wh.plnk/1.2=2",
    "whiteouts": "d;typeflag=5 .wh.x d/.wh..wh..opq d/f=new d/.wh.f2"}


def name_tars() -> Iterator[tuple[str, bytes]]:
    """Yield tars with names of all kinds."""
    odd = [b"latin1-\xe9\xff", b"<lt>&amp", "u\u2028\u2029x".encode(), b'quote"', b"back\\slash",
           b"new\nline", b"tab\tbell\a", b"\xed\xa0\x80", "\U0001f600".encode(), b" ", b"-rf"]
    yield "odd-names", b"".join(entry(name, name * 3) for name in odd) + END
    yield "odd-dirs", b"".join(directory(name) + entry(name + b"/" + name, name)
                               for name in odd) + END
    for name, line in NAMES.items():
        yield name, members(line) + END


def end_tars() -> Iterator[tuple[str, bytes]]:
    """Yield tars that end, or are padded, in all ways."""
    one, a = entry(b"one", b"1" * 700), entry(b"a", b"a" * 100, padding=b"x")
    yield "dirty-padding", a + entry(b"b", b"b", padding=b"y") + END
    yield "dirty-padding-at-end", a
    yield "no-padding-at-end", a[:BLOCK + 100]
    yield "no-end", one
    yield "half-end", one + END[:BLOCK]
    yield "double-end", one + END * 2
    yield "zeros", one + bytes(3_000_001)
    yield "garbage", one + END + bytes(range(256)) * 9000
    yield "second-tar", one + END + entry(b"two", b"2") + END
    yield "empty", b""
    yield "no-members", END
    yield "one-zero-block", END[:BLOCK]
    for factor in (1, 200):
        size = factor * BLOCK
        yield f"blocking-{factor}", one + END + bytes(-(len(one) + len(END)) % size)


def content_tars() -> Iterator[tuple[str, bytes]]:
    """Yield tars with few large and many small files."""
    sizes = (1, 511, 512, 513, 1024, 4096, 32767, 32768, 65536)
    yield "sizes", b"".join(entry(b"s%d" % size, bytes([size % 251]) * size) for size in sizes
                            ) + END
    large = bytes(range(1, 256)) * 24000
    yield "large", entry(b"before", b"1") + entry(b"large", large) + entry(b"after", b"2") + END
    yield "many", members(" ".join(
        f"d{d}/e{e};typeflag=5 " + " ".join(f"d{d}/e{e}/f{f}={d * e * f}" for f in range(10))
        for d in range(12) for e in range(5))) + END


def sparse_tars() -> Iterator[tuple[str, bytes]]:
    """Yield what GNU tar makes of files with holes in the three formats of --sparse-version."""
    data, hole = b"data" * 5000, b""
    shapes: dict[str, list[bytes]] = {
        "start": [hole, data], "middle": [data, hole, data], "end": [data, hole],
        "none": [data], "all": [hole], "runs": [data, hole] * 40 + [b"tail"],
        "bytes": [b"1", hole, b"2"]}
    with tempfile.TemporaryDirectory() as folder:
        for shape, parts in shapes.items():
            with open(os.path.join(folder, shape), "wb") as file:
                for part in parts:
                    file.write(part) if part else file.seek(20480 - file.tell() % 4096, 1)
                file.truncate()
        for version, seeking in itertools.product(("0.0", "0.1", "1.0"), ("seek", "raw")):
            yield f"sparse-{version}-{seeking}", subprocess.run(
                ["tar", "-cS", "--format=posix", f"--sparse-version={version}",
                 f"--hole-detection={seeking}", "-C", folder, *shapes],
                stdout=subprocess.PIPE, check=True).stdout


def sparse_by_hand() -> Iterator[tuple[str, bytes]]:
    """Yield sparse headers as GNU tar does not write them."""
    numbers = (b"major", b"minor", b"name", b"size", b"numblocks", b"map")
    for name, content, *values in (
            ("odd-runs", b"12345678", b"0", b"1", b"s", b"5000", b"2", b"10,3,100,5"),
            ("zero-runs", bytes(8), b"", b"", b"s", b"5000", b"2", b"10,3,100,5"),
            ("hole", b"", b"", b"", b"", b"700", b"1", b"700,0"),
            ("no-map", b"", b"0", b"1", b"", b"700", b"0", b""),
            ("no-size", b"", b"", b"", b"s", b"0", b"0", b""),
            ("size-alone", b"12345678", b"", b"", b"", b"8", b"", b""),
            ("no-such-version", b"1", b"2", b"0", b"", b"", b"", b"0,1")):
        records = {b"GNU.sparse." + key: value for key, value in zip(numbers, values) if value}
        yield f"sparse-by-hand-{name}", pax(records) + entry(b"f", content) + entry(b"g") + END
    yield "sparse-1.0-of-nothing", sparse_1_0(b"1\n0\n0\n", b"", 0) + END
    yield "sparse-1.0-zero-run", sparse_1_0(b"2\n0\n8192\n16384\n0\n", b"1" + bytes(8191),
                                            16384) + END


def sparse_1_0(table: bytes, data: bytes, size: int) -> bytes:
    """Return a member in sparse format 1.0, whose map stands in front of its data."""
    return pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": b"s",
                b"GNU.sparse.realsize": b"%d" % size}
               ) + entry(b"f", table.ljust(BLOCK, b"\0") + data)


def refused_tars() -> Iterator[tuple[str, bytes]]:
    """Yield tars that podman does not take."""
    for name, line in {
            "unknown-type": "f=data;typeflag=Z", "contiguous": "f=data;typeflag=7",
            "duplicate": "f=1 ./f=2", "duplicate-global": "g[comment=1] g[comment=1] f=1",
            "file-for-root": "/=1", "dangling-parent": "l->/no l/f",
            "whiteout-after-file": "f=1 .wh.f", "name-of-256": f"[path={'n' * 256}] f=1",
            "nul-in-name": "[path=a\0b] f=1"}.items():
        yield name, members(line) + END
    one = entry(b"f", b"1")
    yield "truncated", entry(b"f", b"1" * 2000)[:1500]
    yield "quarter-end", one + END[:100]
    yield "zero-block-first", END[:BLOCK] + one + END
    yield "negative-size", entry(b"f", b"1", size=base256(-2, 12)) + END
    yield "bad-sum", one[:148] + b"000000\0 " + one[156:] + END


def gone_tars() -> dict[str, bytes]:
    """Return tars that podman takes although it cannot keep all their bytes."""
    return {"whiteout-content": members("d/f=1 d/.wh.x=gone") + END,
            "aufs-content": members(".wh..wh.aufs=gone") + END,
            "sparse-1.0-no-run": sparse_1_0(b"0\n", b"", 0) + END,
            "no-name": entry(b"", b"gone") + END, "dot": entry(b".", b"gone") + END,
            "sparse-1.0-odd-runs": sparse_1_0(b"2\n10\n3\n100\n5\n", b"12345678", 5000) + END}


def overwritten_tars() -> dict[str, bytes]:
    """Return tars whose last member replaces the first one, by way of a symbolic link."""
    return {"overwritten": members("f=old l->. l/f=new") + END,
            "overwritten-longer": members("f=old l->. l/f=longer") + END}


REFUSED = {name for name, _ in refused_tars()}
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
READ_ALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
import cstor
def export(layer):
    try:
        return layer.export(sink)
    except cstor.CstorError as error:
        return type(error).__name__
with cstor.Storage.open(sys.argv[2]) as storage, open("/dev/null", "wb") as sink:
    print(json.dumps([{layer.id: export(layer) for layer in storage.layers()},
                      [image.id for image in storage.images()],
                      [container.id for container in storage.containers()], storage.faults]))
"""
HOLD_LOCKS = """
import fcntl, sys
files = [open(name, "r+b") for name in sys.argv[1:]]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
CHURN = """
end=$((SECONDS + 5))
while [ $SECONDS -lt $end ]; do
    "$@" import -q "$FILE" localhost/churn && "$@" rmi -f localhost/churn
done >/dev/null
"""


def run(*command: str, **options: Any) -> str:
    """Return the stdout of a command that must succeed."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120, **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: status {done.returncode}: {done.stderr}")
    return done.stdout


def command(*words: str) -> str:
    """Return the stdout of our own command, which must succeed."""
    done = fork_main(words, os.environ)
    if done.returncode:
        raise AssertionError(f"{' '.join(words)}: status {done.returncode}: {done.err}")
    return done.out


class Store:
    """A graph root of its own that podman, buildah and containers-storage write."""

    def __init__(self, folder: str, driver: str = "overlay") -> None:
        self.root, self.runroot = os.path.join(folder, "root"), os.path.join(folder, "run")
        self.driver = driver
        os.makedirs(folder, exist_ok=True)
        self.globals = ["--root", self.root, "--runroot", self.runroot, "--storage-driver", driver]

    def podman(self, *arguments: str, **options: Any) -> str:
        return run("podman", *self.globals, *arguments, **options)

    def buildah(self, *arguments: str, **options: Any) -> str:
        return run("buildah", *self.globals, *arguments, **options)

    def place(self, name: str) -> str:
        """Return where skopeo finds or puts an image."""
        return f"containers-storage:[{self.driver}@{self.root}+{self.runroot}]localhost/{name}"

    def close(self) -> None:
        """Undo the mount of overlay/ on itself that the tools can leave behind."""
        while subprocess.run(["umount", "-l", self.root + "/overlay"], stderr=subprocess.DEVNULL,
                             check=False).returncode == 0:
            pass


def build_image(store: Store, context: str, name: str) -> None:
    """Build an image of three layers."""
    os.mkdir(context)
    for each in "abc":
        put(f"{context}/{each}", each * 1000)
    put(context + "/Dockerfile",
        "FROM scratch\nCOPY a /\nENV X=1\nCOPY b /d/\nCOPY c /\nCMD /a\n")
    store.buildah("bud", "--layers", "-q", "-t", "localhost/" + name, context)


class RealExport(unittest.TestCase):
    """One store of podman's with every odd tar, an image of three layers and containers."""

    maxDiff = None
    folder: tempfile.TemporaryDirectory[str]
    store: Store
    tars: dict[str, bytes]
    refused: dict[str, str]

    @classmethod
    def setUpClass(cls) -> None:
        need(os.geteuid() == 0, "only root can run podman on a store of its own")
        need_tools("podman", "buildah", "containers-storage", "tar", "mount", "setpriv")
        cls.folder = tempfile.TemporaryDirectory(prefix="cstor-real-")
        cls.addClassCleanup(cls.folder.cleanup)
        cls.store = Store(cls.path("store"))
        cls.addClassCleanup(cls.store.close)
        os.chmod(cls.folder.name, 0o755)
        odd = dict(odd_tars())
        cls.tars = {**{name: odd[name] for name in (*sample(odd), "many", "devices")},
                    **gone_tars(), **overwritten_tars()}
        cls.refused = {}
        for name, data in cls.tars.items():
            cls.import_tar(name, data)
        for name, pack in (("gzip", gzip.compress), ("bzip2", bz2.compress),
                           ("xz", lzma.compress)):
            cls.tars[name] = entry(name.encode(), b"content" * 9999) + END
            cls.import_tar(name, pack(cls.tars[name]))
        cls.build_images()

    @classmethod
    def path(cls, name: str) -> str:
        return os.path.join(cls.folder.name, name)

    @classmethod
    def import_tar(cls, name: str, data: bytes) -> None:
        with open(cls.path("odd.tar"), "wb") as file:
            file.write(data)
        try:
            cls.store.podman("import", "-q", cls.path("odd.tar"), f"localhost/{name}")
        except AssertionError as error:
            cls.refused[name] = str(error)

    @classmethod
    def build_images(cls) -> None:
        build_image(cls.store, cls.path("context"), "three")
        for name in ("quay.io/some/where:1", "docker.io/library/hub:1", "docker.io/own/hub:1"):
            cls.store.podman("tag", "localhost/three", name)
        for name, image in (("first", "three"), ("second", "many")):
            cls.store.podman("create", "--network", "none", "--name", name, f"localhost/{image}",
                             "/a")
        cls.store.buildah("from", "--name", "working", "localhost/three")

    def setUp(self) -> None:
        self.storage = cstor.Storage.open(self.store.root)
        self.addCleanup(self.storage.close)

    def layer(self, name: str) -> cstor.Layer:
        return self.storage.image(f"localhost/{name}:latest").layers()[-1]

    def exact(self) -> list[tuple[str, bytes, cstor.Layer]]:
        """Return (name, tar, layer) of the layers that can be rebuilt."""
        without = {*self.refused, *gone_tars(), *overwritten_tars()}
        return [(name, data, self.layer(name)) for name, data in self.tars.items()
                if name not in without]

    def command(self, *arguments: str) -> str:
        return command("--root", self.store.root, *arguments)

    # -- archives --------------------------------------------------------------------------------

    def fresh(self, name: str) -> Store:
        """Return a new store that is removed at the end."""
        store = Store(self.path("fresh-" + name))
        self.addCleanup(shutil.rmtree, self.path("fresh-" + name))
        self.addCleanup(store.close)
        return store

    def same_image(self, store: Store, image: cstor.Image, name: str) -> None:
        """Compare an image with what another tool made of it elsewhere."""
        with cstor.Storage.open(store.root) as storage:
            other = storage.image(name)
            self.assertEqual(image.id, other.id)
            self.assertEqual(image.config_bytes(), other.config_bytes())
            self.assertEqual([layer.diff_digest for layer in image.layers()],
                             [layer.diff_digest for layer in other.layers()])
            with image.tree() as old, other.tree() as new:
                self.assertEqual([], list(cstor.diff_trees(old, new)))

    def test_layouts_by_skopeo(self) -> None:
        need_tools("skopeo")
        store, layout = self.fresh("skopeo"), self.path("layout")
        self.addCleanup(shutil.rmtree, layout)
        names = [*(name for name, _, _ in self.exact()), "three"]
        for name in ("bzip2", "xz"):  # podman 4.3.1 takes these for tars: DiffIDs nobody can meet
            names.remove(name)
            with self.assertRaisesRegex(cstor.IntegrityError, "that its configuration names"):
                self.storage.image(f"localhost/{name}:latest").copy_to_oci(layout, name)
        for name in names:
            with self.subTest(image=name):
                image = self.storage.image(f"localhost/{name}:latest")
                image.copy_to_oci(layout, name)
                run("skopeo", "copy", "-q", f"oci:{layout}:{name}", store.place(name))
                self.same_image(store, image, f"localhost/{name}:latest")
        self.assertEqual(set(names), set(read_layout(layout)))

    def test_compressed_layouts_by_podman_skopeo_and_umoci(self) -> None:
        need_tools("skopeo", "umoci", "zstd")
        layout = self.path("layout")
        self.addCleanup(shutil.rmtree, layout)
        for name in ("three", "many", "gzip"):
            image = self.storage.image(f"localhost/{name}:latest")
            for compress in ("none", "gzip", "zstd"):
                with self.subTest(image=name, compress=compress):
                    tag = f"{name}-{compress}"
                    self.command("image", "copy-to-oci", name, f"{layout}:{tag}",
                                 f"--compress={compress}")
                    folder = self.path("dir-" + tag)
                    run("skopeo", "copy", "-q", f"oci:{layout}:{tag}", f"dir:{folder}")
                    shutil.rmtree(folder)
                    store = self.fresh(tag)
                    identity = store.podman("pull", "-q", f"oci:layout:{tag}",
                                            cwd=self.folder.name).strip()
                    self.assertEqual(image.id, identity)
                    self.same_image(store, image, identity)
                    if compress != "zstd":  # umoci knows gzip only
                        bundle = self.path("bundle-" + tag)
                        run("umoci", "unpack", "--image", f"{layout}:{tag}", bundle)
                        with image.tree() as tree:
                            self.assertEqual([], [
                                row for row in tree_differences(bundle + "/rootfs", tree)
                                if row[0]])  # umoci gives the root a mode of its own
                        shutil.rmtree(bundle)

    def test_archives_by_podman(self) -> None:
        names = ["three", "many", "gzip", "pax"]
        for kind in ("docker-archive", "oci-archive"):
            store, archive = self.fresh(kind), self.path(kind + ".tar")
            for given in ([names] if kind == "docker-archive" else [[name] for name in names]):
                self.command("image", "export", f"--as={kind}", "-o", archive, *given)
                store.podman("load", "-q", "-i", archive)
                for name in given:
                    with self.subTest(kind=kind, image=name):
                        self.same_image(store, self.storage.image(f"localhost/{name}:latest"),
                                        f"localhost/{name}:latest")

    def test_a_manifest_list_by_skopeo(self) -> None:
        need_tools("skopeo")
        self.store.podman("manifest", "create", "localhost/list")
        self.addCleanup(self.store.podman, "manifest", "rm", "localhost/list")
        for name in ("three", "many"):
            self.store.podman("manifest", "add", "--arch", "amd64" if name == "three" else "arm64",
                              "localhost/list", f"containers-storage:localhost/{name}")
        layout, folder = self.path("layout"), self.path("dir-list")
        self.addCleanup(shutil.rmtree, layout)
        self.addCleanup(shutil.rmtree, folder)
        self.command("image", "copy-to-oci", "list", layout + ":all", "--all")
        self.command("image", "copy-to-oci", "list", layout + ":arm", "--platform=linux/arm64")
        found = read_layout(layout)
        self.assertEqual({"all@amd64", "all@arm64", "arm"}, set(found))
        self.assertEqual(found["all@arm64"], found["arm"])
        self.assertEqual([self.tars["many"]], found["arm"][2])
        run("skopeo", "copy", "-q", "--all", f"oci:{layout}:all", f"dir:{folder}")
        for tag, name in (("arm", "many"), ("all@amd64", "three")):
            self.assertEqual(self.storage.image(f"localhost/{name}:latest").id,
                             found[tag][0]["config"]["digest"][7:])

    def test_a_container_as_podman_exports_it(self) -> None:
        ours, theirs = self.path("ours.tar"), self.path("theirs.tar")
        self.command("container", "export", "second", "-o", ours)
        self.store.podman("export", "-o", theirs, "second")
        rows = []
        for path in (ours, theirs):
            with tarfile.open(path, errors="surrogateescape") as tar:
                found = {}
                for info in tar:
                    file = tar.extractfile(info) if info.isreg() else None
                    found[info.name.rstrip("/")] = (
                        info.type, info.mode & 0o7777, info.uid, info.gid, info.linkname,
                        int(info.mtime),
                        file.read() if file else b"")
                rows.append(found)
            os.unlink(path)
        rows[0].pop(".", None)
        times = {name for name in rows[0] if rows[0][name][5] == 0}  # directories without an entry
        for found in rows:
            for name in times & set(found):
                found[name] = (*found[name][:5], 0, found[name][6])
        self.assertEqual(rows[1], rows[0])

    # -- layers ----------------------------------------------------------------------------------

    def test_podman_refuses(self) -> None:
        self.assertEqual(REFUSED & set(self.tars), set(self.refused), self.refused)

    def test_export(self) -> None:
        for name, data, layer in self.exact():
            for verify in (True, False):
                with self.subTest(tar=name, verify=verify):
                    self.assertEqual((layer.diff_digest, layer.diff_size),
                                     (sha256(data), len(data)))
                    out = io.BytesIO()
                    returned = layer.export(out, verify=verify)
                    self.assertEqual(sha256(out.getvalue()), layer.diff_digest)
                    self.assertEqual(returned, layer.diff_digest if verify else "")

    def test_export_command(self) -> None:
        target = self.path("exported.tar")
        for name, data, layer in self.exact():
            with self.subTest(tar=name):
                self.command("layer", "export", layer.id, "-o", target)
                with open(target, "rb") as file:
                    self.assertEqual(sha256(file.read()), sha256(data))

    def test_gone_bytes(self) -> None:
        for name in gone_tars():
            for verify in (True, False):
                with self.subTest(tar=name, verify=verify), \
                        self.assertRaises(cstor.Unsupported):
                    self.layer(name).export(io.BytesIO(), verify=verify)

    def test_compression(self) -> None:
        for name in ("gzip", "bzip2", "xz", "many"):
            self.assertEqual(self.layer(name).compression, "none" if name == "many" else name)

    def test_overwritten_files(self) -> None:
        for name in overwritten_tars():
            with self.subTest(tar=name), self.assertRaises(cstor.IntegrityError) as caught:
                self.layer(name).export(io.BytesIO())
            self.assertEqual(caught.exception.name, b"f")

    # -- records ---------------------------------------------------------------------------------

    def test_image_list(self) -> None:
        for options in ([], ["-a"]):
            ours = {image["id"]: [image["names"] if "names" in image else [], image["digest"],
                                  (cstor.parse_time(image["created"]) or 0) // 10**9, image["size"]]
                    for image in json.loads(self.command("image", "list", "--format", "json",
                                                         *options))}
            theirs = {image["Id"]: [image.get("Names") or [], image["Digest"], image["Created"],
                                    image["Size"]]
                      for image in json.loads(self.store.podman("images", "--format", "json",
                                                                *options))}
            self.assertEqual(ours, theirs, options)

    def test_layer_list(self) -> None:
        theirs = json.loads(run("containers-storage", "--graph", self.store.root, "--run",
                                self.store.runroot, "--storage-driver", "overlay", "layers", "-j"))
        ours = json.loads(self.command("layer", "list", "--format", "json"))
        for layer in ours:
            self.assertEqual([layer.pop(key) for key in ("store", "readonly", "faults")],
                             [self.store.root, False, []])
        self.assertEqual(ours, theirs)

    def test_container_list(self) -> None:
        ours = {container["id"]: [container["names"], container["image"], container["image-name"],
                                  container["state"]]
                for container in json.loads(self.command("container", "list", "--format", "json"))}
        # Before 4.8 podman kept states in a Bolt database, which is not read.
        in_sqlite = os.path.exists(self.store.root + "/db.sql")
        theirs = {container["Id"]: [container["Names"], container["ImageID"], container["Image"],
                                    container["State"] if in_sqlite else ""]
                  for container in json.loads(self.store.podman("ps", "-a", "--format", "json"))}
        working = [key for key, value in ours.items() if value[0] == ["working"]]
        self.assertEqual(len(working), 1)
        self.assertEqual(ours.pop(working[0])[1], self.storage.image("localhost/three").id)
        self.assertEqual(ours, theirs)

    def test_history(self) -> None:
        ours = json.loads(self.command("image", "history", "three", "--format", "json"))
        theirs = json.loads(self.store.podman("history", "--format", "json", "three"))
        self.assertEqual([[row["created"], row["created_by"], row.get("size", 0),
                           row.get("comment", "")] for row in ours],
                         [[row["created"], row["CreatedBy"], row["size"], row.get("comment", "")]
                          for row in theirs])
        self.assertEqual([row["layer"] for row in ours if "layer" in row],
                         [layer.id for layer in self.storage.image("three").layers()[::-1]])

    def test_references(self) -> None:
        image = self.storage.image("localhost/three:latest")
        other = sha256(b"other")
        references = [
            image.id, image.id[:12], image.id[:1], "sha256:" + image.id, image.id[:-1],
            "three", "three:latest", "three:other", "localhost/three", "localhost/three:latest",
            f"three@{image.digest}", f"localhost/three@{image.digest}", f"three@{other}",
            f"three:latest@{image.digest}",
            "docker.io/library/three", "library/three", "other/three", "THREE", "thre",
            "where:1", "some/where:1", "quay.io/some/where:1", "quay.io/some/where", "where",
            "quay.io/where:1", "hub:1", "library/hub:1", "docker.io/hub:1", "own/hub:1",
            "index.docker.io/library/hub:1", "docker.io/own/hub:1", "hub", "sha256:" + other[7:],
            other[7:], "three:", ":latest"]
        for reference in references:
            with self.subTest(reference=reference):
                try:
                    theirs = self.store.podman("image", "inspect", reference, "--format",
                                               "{{.Id}}").strip()
                except AssertionError:
                    theirs = ""
                try:
                    ours = self.storage.image(reference).id
                except cstor.NotFound:
                    ours = ""
                self.assertEqual(ours, theirs)

    # -- promises --------------------------------------------------------------------------------

    def read_all(self, root: str, *, command: list[str], module: str = "") -> list[Any]:
        """Read everything in another process; [{layer: digest or error}, images, ...]."""
        where = module or os.path.dirname(os.path.abspath(cstor.__file__))
        found: list[Any] = json.loads(run(*command, "-c", READ_ALL, where, root, cwd="/"))
        return found

    def expected(self, *, closed: str) -> list[Any]:
        """Return what read_all() must find; ``closed`` for the layer with a file of mode 0."""
        layers = {layer.id: layer.diff_digest or "Unsupported"
                  for layer in self.storage.layers()}
        for tars, error in ((gone_tars(), "Unsupported"), (overwritten_tars(), "IntegrityError")):
            layers.update((self.layer(name).id, error) for name in tars)
        layers[self.layer("devices").id] = closed or layers[self.layer("devices").id]
        return [layers, [image.id for image in self.storage.images()],
                [container.id for container in self.storage.containers()], []]

    def test_nothing_changes(self) -> None:
        before = snapshot(self.store.root)
        found = self.read_all(self.store.root, command=[sys.executable])
        for command in ("image list", "layer list", "container list", "store info",
                        "image inspect three", "layer inspect " + self.layer("many").id,
                        "container inspect first", "image history three", "image layers three"):
            self.command(*command.split())
        self.assertEqual(snapshot(self.store.root), before)
        self.assertEqual(found, self.expected(closed=""))

    def test_read_only_mount(self) -> None:
        mounted = self.path("read-only")
        os.mkdir(mounted)
        run("mount", "--bind", self.store.root, mounted)
        self.addCleanup(run, "umount", "-l", mounted)
        run("mount", "-o", "remount,ro,bind", mounted)
        with self.assertRaises(OSError):
            os.mkdir(mounted + "/new")
        found = self.read_all(mounted, command=[sys.executable])
        self.assertEqual(found, self.expected(closed=""))

    def test_without_privileges(self) -> None:
        module, copied = self.path("module"), self.path("copied")
        os.mkdir(module)
        os.chmod(module, 0o755)
        shutil.copy(cstor.__file__, module + "/cstor.py")
        os.chmod(module + "/cstor.py", 0o644)
        for python in (sys.executable, "/usr/bin/python3"):
            if subprocess.run([*NOBODY, python, "-c", ""], stderr=subprocess.DEVNULL,
                              check=False).returncode == 0:
                break
        else:
            need(False, f"no Python that other users may run: {sys.executable} is closed")
        run("cp", "-a", "--no-preserve=links", self.store.root, copied)
        run("chown", "-hR", "65534:65534", copied)
        before = snapshot(copied)
        found = self.read_all(copied, command=[*NOBODY, python, "-B"], module=module)
        self.assertEqual(snapshot(copied), before)
        self.assertEqual(found, self.expected(closed="NeedsUnshare"))

    def read_records(self, root: str) -> tuple[cstor.Storage, float]:
        """Return an open storage whose records were read, and the seconds it took."""
        start = time.monotonic()
        storage = cstor.Storage.open(root)
        storage.images()
        storage.layers()
        storage.containers()
        return storage, time.monotonic() - start

    def test_held_locks(self) -> None:
        locks = [f"{self.store.root}/overlay-{kind}/{kind}.lock"
                 for kind in ("layers", "images", "containers")]
        with subprocess.Popen([sys.executable, "-c", HOLD_LOCKS, *locks], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as holder:
            assert holder.stdin and holder.stdout
            self.assertEqual(holder.stdout.readline(), b"held\n")
            storage, seconds = self.read_records(self.store.root)
            holder.stdin.close()
        with storage:
            self.assertLess(seconds, 1)
            self.assertEqual([layer.id for layer in storage.layers()],
                             [layer.id for layer in self.storage.layers()])
            self.assertEqual([image.record for image in storage.images()],
                             [image.record for image in self.storage.images()])

    def test_while_podman_writes(self) -> None:
        store = Store(self.path("churned"))
        self.addCleanup(store.close)
        with open(self.path("churn.tar"), "wb") as file:
            file.write(self.tars["many"])
        store.podman("import", "-q", self.path("churn.tar"), "localhost/stays")
        exported = gone = 0
        with subprocess.Popen(["bash", "-c", CHURN, "churn", "podman", *store.globals],
                              env={**os.environ, "FILE": self.path("churn.tar")}) as churn:
            while churn.poll() is None:
                storage, seconds = self.read_records(store.root)
                with storage:
                    self.assertLess(seconds, 1)
                    try:
                        out = io.BytesIO()
                        storage.image("localhost/churn").layers()[-1].export(out)
                        self.assertEqual(out.getvalue(), self.tars["many"])
                        exported += 1
                    except (cstor.ImageUnknown, cstor.LayerUnknown):
                        gone += 1
        self.assertEqual(churn.returncode, 0)
        self.assertTrue(exported and gone, (exported, gone))


CAPABILITY = b"\1\0\0\2\0\4\0\0" + bytes(12)  # cap_net_bind_service+ep
EARLIER = b"13000000000"
REALPATHS = """
import os, sys
os.path.realpath(os.curdir)
names = sys.stdin.buffer.read().split(b"\\0")
os.chroot(sys.argv[1])
os.chdir("/")
found = [os.path.realpath(b"/" + name)[1:] for name in names]
found = [path if os.path.lexists(b"/" + path) and not os.path.islink(b"/" + path) else b"\\1"
         for path in found]
sys.stdout.buffer.write(b"\\0".join(found))
"""


def xattrs(values: dict[str, bytes]) -> bytes:
    return pax({b"SCHILY.xattr." + name.encode(): value for name, value in values.items()})


def times(*stamps: str) -> str:
    """Return a file, a directory and a symbolic link for each time of a pax header."""
    return " ".join(f"[mtime={stamp}] f{i} [mtime={stamp}] d{i}/ [mtime={stamp}] l{i}->target"
                    for i, stamp in enumerate(stamps))


def layers_of(text: str, **more: bytes) -> list[bytes]:
    """Return the tars, without their ends, of layers that members() tells between bars."""
    for word, meaning in (("OPAQUE", ".wh..wh..opq"), ("BASE", "a/ a/f=1 a/g=2 a/s/ a/s/h=3 t=4"),
                          (";EARLY", ";mode=2600;uid=5;mtime=13000000000")):
        text = text.replace(word, meaning)
    return [members(layer, **more) for layer in text.split(" | ")]


# Images of several layers that hide and replace what is below.
WHITEOUTS = {
    "opaque-after": "BASE | a/ a/n=1 a/OPAQUE",
    "opaque-before": "BASE | a/OPAQUE a/n=1",
    "opaque-between": "BASE | a/ a/f=x a/OPAQUE a/n=1",
    "opaque-nested": "BASE | a/s/OPAQUE a/s/n=1",
    "opaque-dir": "BASE | a/OPAQUE/",
    "opaque-by-link": "BASE | l->a/s a/s/ l/OPAQUE",
    "opaque-then-more": "BASE | a/OPAQUE | a/ a/g=new | a/f=again | a/.wh.g a/OPAQUE",
    "whiteouts": "BASE | a/.wh.f .wh.t .wh.no no/.wh.where",
    "whiteout-again": "BASE | .wh.a | a/ a/n=1 | a/.wh.n | a/n=2 a/f=5",
    "whiteout-below": "BASE | a/s/.wh.h | a/s/h=re | a/.wh.s | a/s/;mode=700",
    "whiteout-kinds": "BASE | .wh.a/ x .wh.t=>x",
    "whiteout-by-link": "BASE | a/ l->a l/.wh.f",
    "whiteout-odd": "BASE | a/.wh.s .wh.t/z=1 ODD",
    "whiteout-device": "BASE | a%0,0 b%%0,0 t%4096,1048576",
    "whiteout-linked": "BASE | .wh.t a/f=>t",
    "types-1": "BASE | a=file | a/ a/f=x",
    "types-2": "BASE | a->t t/ t/f=1 | a/ a/y=1 t|",
    "types-3": "BASE | a%1,3 | a/ | a%%1,3 | a/n=1 | a->/t",
    "types-nested": "BASE a/s/d/x=1 | a/s=file | a/s/d/y=2 | a| | a/s/d/z=3"}
# ... with hard links, links above files, and names to be cleaned.
LINKS = {
    "link-fields": "x=1;mode=4755 y=>x;EARLY",
    "link-xattrs": "A x=1;mode=4755 B y=>x",
    "link-chown": "CAP x=1;mode=4755 y=>x;uid=5 z=1 CAP z2=>z;gid=5",
    "link-kept": "CAP x=1;mode=4755 y=>x",
    "link-names": "x=1;mode=4755 d/y=>./x /z=>/d/../x w=>../x;EARLY",
    "link-symlink": "s->no;uid=7 s2=>s;uid=6;mtime=13000000000",
    "link-special": "p| p2=>p;mode=600 c%1,3 c2=>c;EARLY",
    "link-replaced": "x=1;mode=4755 y=>x z=>x d/w=>z | y=other .wh.x",
    "link-again": "x=1;mode=4755 y=>x | x=1;mode=4755 y=>x;EARLY | y=1 z=>y",
    "link-through": "r/f=1 s->r h=>s/f;EARLY",
    "links-above": "a/s/ l->/a/../a/s/.. l/k=1 m->../../a m/j=1 a/n->s m/n/i=2 l/n/new/o=2",
    "links-below": "a/ l->a | l/k=1 | l->a | l/ l/y=1",
    "alias": "a/;mode=700 a/x=1 l->. l/a/;mode=711;mtime=13000000000 y=1 z=2 l/z=>y",
    "alias-dir": "a/x=1 l->. l/a=file",
    "alias-linked": "x=1 y=>x l->. l/x=new",
    "implicit": "e/;mode=1777;uid=4 e/1=1 | e/2=2 | e/;mode=700",
    "names": "./d/ ./d/1=1 /abs/f=1 x/../y=1 z/q/../../w/e=1 | /d/1=2 ./abs/.wh.f v/../w//e=2",
    "bytes": "BYTES | GONE",
    "deep": f"[path={'/'.join(f'{i:03}' + 'n' * 200 for i in range(17))}] f=1 | "
            f"[path={'/'.join(f'{i:03}' + 'n' * 200 for i in range(17))}] f=1"}
# ... and with metadata of all kinds.
METADATA = {
    "xattrs": "CAP2 x=1;uid=5 D d/ S s->x P p| UMLAUT y | x=1 d/f E y",
    "xattr-empty": "EMPTY f",
    "owners": "OWNERS [uid=4294967294,gid=3000000] 6/ LINKED",
    "times": times("0", "1.123456789123", "1600000000.000000001") + " | "
             + times("-5.25", "-0.000000001", "9223372036.854775807"),
    "times-far": times("9223372036.854775808", "20000000000", "-9999999999"),
    "modes": "1=1;mode=107755 2/;mode=3777 3;mode=0 4|;mode=6666 5;mode=2644;uid=5 6->x;mode=600 "
             "7/;mode=0 7/f=1;mode=7777",
    "devices": "1%259,1000000 2%%4095,1048575 3%%4097,1048577 4%5,1;mode=620;uid=1",
    "formats": "V7 | USTAR | GNU | PAX | BASE256"}


def stacks() -> Iterator[tuple[str, list[bytes]]]:
    """Yield (name, tars of the layers without their ends) for images of several layers."""
    tars = dict(header_tars())
    more = {
        "ODD": entry(b".wh.\xff\n"),
        "CAP": xattrs({"security.capability": CAPABILITY, "user.c": b"3"}),
        "CAP2": xattrs({"security.capability": CAPABILITY, "user.a": b"b\0c=\n",
                        "trusted.t": b"1"}),
        **{name: xattrs({f"user.{name.lower()}": value}) for name, value in (
            ("A", b"1"), ("B", b"2"), ("D", b"1"), ("E", b"2"))},
        "S": xattrs({"trusted.s": b"1"}), "P": xattrs({"trusted.p": b"1"}),
        "UMLAUT": xattrs({"user.\u00fc": b"\xff"}),
        "EMPTY": xattrs({"user.e": b"", "user.f": b"1"}),
        "BYTES": directory(b"\xff\n") + entry(b"\xff\n/\xe9\\", b"1") + entry(
            b"\xff\n/\xee\xbe\x80", b"2") + hardlink(b"\xfe", b"\xff\n/\xe9\\"),
        "GONE": entry(b"\xff\n/.wh.\xe9\\"),
        "OWNERS": entry(b"1", uid=base256(4294967295, 8)) + entry(b"2", gid=base256(4294967294, 8))
        + entry(b"3", uid=base256(2**32 + 5, 8)) + entry(b"5", gid=b"7777777")
        + entry(b"4", uid=base256(-2, 8), gid=base256(-1, 8)),
        "LINKED": entry(b"7", uid=b"0000003") + hardlink(b"8", b"7", uid=base256(-1, 8),
                                                         gid=b"0000002"),
        "V7": tars["v7"], "USTAR": tars["ustar-prefix"], "GNU": tars["gnu-long"],
        "PAX": tars["pax"], "BASE256": tars["base-256"]}
    for name, text in {**WHITEOUTS, **LINKS, **METADATA}.items():
        yield name, layers_of(text, **more)


def write_layout(folder: str, images: dict[str, list[bytes]]) -> None:
    """Write an OCI layout of images given by the tars of their layers; their names are tags."""
    blobs = os.path.join(folder, "blobs/sha256")
    os.makedirs(blobs)
    prefix = "application/vnd.oci.image."

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        with open(os.path.join(blobs, digest), "wb") as file:
            file.write(data)
        return {"mediaType": prefix + kind, "digest": f"sha256:{digest}", "size": len(data)}

    index = []
    for name, tars in images.items():
        layers = [blob("layer.v1.tar", data) for data in tars]
        config = {"architecture": "amd64", "os": "linux", "config": {"Labels": {"name": name}},
                  "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}}
        manifest = {"schemaVersion": 2, "mediaType": prefix + "manifest.v1+json",
                    "config": blob("config.v1+json", json.dumps(config).encode()),
                    "layers": layers}
        index.append({**blob("manifest.v1+json", json.dumps(manifest).encode()),
                      "annotations": {"org.opencontainers.image.ref.name": name}})
    for name, value in (("index.json", {"schemaVersion": 2, "manifests": index}),
                        ("oci-layout", {"imageLayoutVersion": "1.0.0"})):
        with open(os.path.join(folder, name), "w", encoding="ascii") as file:
            json.dump(value, file)


def seen_on_disk(top: str) -> tuple[dict[bytes, dict[str, Any]], set[frozenset[bytes]]]:
    """Return what lies in a directory, and the groups of hard links."""
    found: dict[bytes, dict[str, Any]] = {}
    groups: dict[tuple[int, int], set[bytes]] = {}
    base = os.fsencode(top)
    todo = [b""]
    while todo:
        path = todo.pop()
        place = base + b"/" + path
        try:
            status = os.lstat(place)
        except FileNotFoundError:
            continue  # overlayfs lists the whiteouts of a directory that is in one layer only
        kind = cstor.NODE_TYPES[stat.S_IFMT(status.st_mode)]
        content = b""
        if kind == "reg" and status.st_size:
            with open(place, "rb") as file:
                content = file.read()
        number = status.st_rdev if kind in ("char", "block") else 0
        found[path] = {
            "type": kind, "mode": stat.S_IMODE(status.st_mode),
            "owner": (status.st_uid, status.st_gid), "mtime": status.st_mtime_ns,
            "link": os.readlink(place) if kind == "symlink" else b"",
            "device": (os.major(number), os.minor(number)),
            "xattrs": {os.fsencode(name): os.getxattr(place, name, follow_symlinks=False)
                       for name in os.listxattr(place, follow_symlinks=False)},
            "content": hashlib.sha256(content).digest()}
        if kind == "dir":
            with os.scandir(place) as entries:
                todo += [(path + b"/" if path else b"") + entry.name for entry in entries]
        elif status.st_nlink > 1:
            groups.setdefault((status.st_dev, status.st_ino), set()).add(path)
    return found, {frozenset(group) for group in groups.values() if len(group) > 1}


def seen_in_tree(tree: cstor.Tree) -> tuple[dict[bytes, dict[str, Any]], set[frozenset[bytes]]]:
    """Return what seen_on_disk() does, of a Tree."""
    found: dict[bytes, dict[str, Any]] = {}
    groups: dict[bytes, set[bytes]] = {}
    for path, node, first in tree.walk():
        content = b"".join(tree.content(node)) if node.type == "reg" else b""
        found[path] = {"type": node.type, "mode": node.mode, "owner": (node.uid, node.gid),
                       "mtime": node.mtime_ns, "link": node.linkname, "device": node.device,
                       "xattrs": node.xattrs, "content": hashlib.sha256(content).digest()}
        if node.implicit:
            found[path]["implicit"] = True
        if first is not None:
            groups.setdefault(first, {first}).add(path)
    return found, {frozenset(group) for group in groups.values()}


Seen = tuple[dict[bytes, dict[str, Any]], "set[frozenset[bytes]]"]


def differences(a: Seen, b: Seen) -> list[Any]:
    """Return (path, field, in a, in b) for all that differs.

    Only the time of a directory that has no entry in the tar is passed over: nobody knows it.
    """
    (left, left_groups), (right, right_groups) = a, b
    found: list[Any] = []
    for path in sorted(left.keys() | right.keys()):
        one, other = left.get(path), right.get(path)
        if one is None or other is None:
            found.append((path, "missing", one is None, other is None))
            continue
        implicit = one.get("implicit") or other.get("implicit")
        found += [(path, field, one[field], other[field]) for field in one
                  if field != "implicit" and not (implicit and field == "mtime")
                  and one[field] != other[field]]
    found += [(b"", "groups", group in left_groups, group in right_groups)
              for group in left_groups ^ right_groups]
    return found


def tree_differences(mount: str, tree: cstor.Tree) -> list[Any]:
    """Return what differs between a directory and a tree."""
    return differences(seen_on_disk(mount), seen_in_tree(tree))


def debian_tree(top: str, packages: int = 4000 if FULL else 1000) -> None:
    """Make what Debian's packages make: 12 or 13 files each."""
    for name in ("usr/bin", "usr/lib/x86_64-linux-gnu", "usr/share/doc", "usr/share/locale",
                 "var/lib/dpkg/info", "usr/sbin", "etc/alternatives", "var/cache/apt"):
        os.makedirs(f"{top}/{name}")
    for name in ("bin", "sbin", "lib"):
        os.symlink(f"usr/{name}", f"{top}/{name}")
    for number in range(packages):
        package = f"lib{number:04}"
        doc, info = f"{top}/usr/share/doc/{package}", f"{top}/var/lib/dpkg/info/{package}"
        library = f"{top}/usr/lib/x86_64-linux-gnu/{package}.so"
        os.mkdir(doc)
        put(doc + "/copyright", b"%d" % number)
        for name in ("changelog.gz", "changelog.Debian.gz"):
            put(f"{doc}/{name}")
        for name in ("list", "md5sums", "triggers"):
            put(f"{info}.{name}")
        put(library + ".1.0", b"ELF" * (number % 40))
        os.symlink(f"{package}.so.1.0", library + ".1")
        os.symlink(f"{package}.so.1", library)
        put(f"{top}/usr/bin/{package}")
        if number % 4 == 0:
            os.link(f"{top}/usr/bin/{package}", f"{top}/usr/bin/{package}-alias")
            os.symlink(f"/etc/alternatives/{package}", f"{top}/usr/sbin/{package}")
            os.symlink(f"/bin/{package}", f"{top}/etc/alternatives/{package}")
            locale = f"{top}/usr/share/locale/{package}"
            os.makedirs(locale + "/LC_MESSAGES")
            put(locale + "/LC_MESSAGES/a.mo")
            os.symlink(f"../doc/{package}", f"{locale}/doc")


def rpm_tree(top: str, packages: int = 2700 if FULL else 1000) -> None:
    """Make what RPM's packages make: build IDs, byte code and time zones are linked a lot."""
    for name in ("usr/lib64/python3/__pycache__", "usr/lib/.build-id", "usr/share/licenses",
                 "usr/share/zoneinfo/posix", "usr/share/zoneinfo/right", "var/lib/rpm"):
        os.makedirs(f"{top}/{name}")
    os.symlink("usr/lib64", f"{top}/lib64")
    for number in range(256):
        os.mkdir(f"{top}/usr/lib/.build-id/{number:02x}")
    for number in range(packages):
        name, code = f"m{number:04}", f"{top}/usr/lib64/python3/__pycache__/m{number:04}"
        put(f"{top}/usr/lib64/{name}.so.1", b"ELF" * (number % 30))
        os.symlink(f"{name}.so.1", f"{top}/usr/lib64/{name}.so")
        put(f"{top}/usr/lib64/python3/{name}.py", b"import os" * (number % 3))
        put(code + ".pyc", b"%d" % number)
        for level in (1, 2):
            os.link(code + ".pyc", f"{code}.opt-{level}.pyc")
        for sort in range(4):
            os.symlink(f"../../../lib64/{name}.so.1",
                       f"{top}/usr/lib/.build-id/{number % 256:02x}/{number}.{sort}")
        licenses = f"{top}/usr/share/licenses/{name}"
        os.mkdir(licenses)
        for text in ("COPYING", "AUTHORS", "NOTICE"):
            put(f"{licenses}/{text}")
        zone = f"{top}/usr/share/zoneinfo"
        put(f"{zone}/Z{number}", b"TZif%d" % number)
        os.link(f"{zone}/Z{number}", f"{zone}/posix/Z{number}")
        put(f"{zone}/right/Z{number}")
        os.symlink(f"../Z{number}", f"{zone}/right/L{number}")


def second_step(top: str, folder: str, links: str) -> None:
    """Change a large tree: ``folder`` is made anew, files of ``links`` are hard links."""
    shutil.rmtree(f"{top}/{folder}")
    os.makedirs(f"{top}/{folder}/new")
    put(f"{top}/{folder}/new/file", b"new")
    names = sorted(os.listdir(f"{top}/{links}"))
    files = [f"{top}/{links}/{name}" for name in names if stat.S_ISREG(os.lstat(
        f"{top}/{links}/{name}").st_mode)]
    for path in files[:500:2]:
        os.unlink(path)
    for path in files[1:500:2]:
        os.chmod(path, 0o4711)
    for path in files[500:600]:
        os.chown(path, 7, 8)
    for path in files[600:650]:
        os.unlink(path)
        os.mkdir(path)
        put(path + "/in")
    for path, target in zip(files[650:700], files[700:750]):
        os.unlink(path)
        os.link(target, path)
    for path in files[750:800]:
        os.unlink(path)
        os.symlink("in", path)
    for path in files[800:850]:
        with open(path, "ab") as file:
            file.write(b"more")
    os.utime(files[900], ns=(5, 123456789))
    os.setxattr(files[901], "user.x", b"1")
    os.setxattr(files[902], "security.capability", CAPABILITY)
    os.mknod(f"{top}/{links}/fifo", stat.S_IFIFO | 0o600)
    os.mknod(f"{top}/{links}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(f"{top}/{links}", 0o711)


def third_step(top: str, folder: str, links: str) -> None:
    """Change it once more: deleted names come back, new ones go, all types are replaced."""
    shutil.rmtree(f"{top}/{folder}/new")
    put(f"{top}/{folder}/new", b"now a file")
    os.makedirs(f"{top}/{folder}/lib0001/m0001")
    for name in sorted(os.listdir(f"{top}/{links}"))[250:800:3]:
        path = f"{top}/{links}/{name}"
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
            put(path)
        else:
            os.unlink(path)
            os.mkdir(path)
            os.link(put_new(path + "/one"), path + "/two")
    shutil.rmtree(f"{top}/var")
    os.symlink("usr", f"{top}/var")


def put_new(path: str) -> str:
    put(path, b"linked")
    return path


def container_layers() -> list[bytes]:
    """Return two layers for containers to change."""
    cap = xattrs({"security.capability": CAPABILITY, "user.a": b"1"})
    text = ("BASE b/;mode=1777 b/x=1 b/y/z=2 CAP c=c;mode=4755 d/old=1 e/;uid=3 e/1=1 e/in/2=2 "
            "e/in/er/3=3 h1=h h2=>h1 h3=>h1 s->a/f w/keep=1 w/old/4=4 null%1,3 m/1/2/3/f=m m/g "
            f"big={'0123456789abcdef' * 9000} | "
            ".wh.b w/.wh.old a/new=n e/in/more=5 m/1/OPAQUE m/1/2/k=k")
    return [data + END for data in layers_of(text, CAP=cap)]


# Changes of a mounted container of container_layers(): in every way that a writable layer has,
# ...
CHANGE = r"""
rm -r a/f d e/in/er t null; mkdir -m 750 d; printf 1 > d/new; mkdir -p e/in/er/deeper b t
chmod 2711 c; chmod 600 big; chmod 700 a/s; chown 5:6 h1; chown -h 5:6 s
touch -d @1234567890.123456789 w/keep
ln h2 h4; ln a/g a/g2; printf n > n1; ln n1 w/n2; printf 'now a file' > b/y; ln -s /b w/old
mknod -m 640 t/pipe p; mknod -m 666 t/zero c 1 5; printf 'no device' > null
setfattr -n user.n -v 0x00 a/new; setfattr -n user.w -v w w
printf odd > "$(printf '\377\n\\')"; mkdir moved; printf 1 > moved/f; mv -T moved a/moved
"""
# ... by renaming directories of lower layers, and directories in them, and files put into all,
RENAME = """
mv -T e e2; printf 1 > e2/after; mv -T e2/in e2/out; printf 2 > e2/out/after
mkdir e; printf 'not that one' > e/1; mv -T e2/out a/from-e; mkdir e2/out b
mv -T w b2; mv -T b2 b/w; mv -T b/w w; mv -T m/1/2 m/two; rm m/two/k
mv -T m d/m; printf anew > d/m/two/k; mv -T h3 d/h5; mv -T big d/m/big; chmod 640 h2
"""
# ... the same after CHANGE,
RENAME_AGAIN = """
mv -T e/in d/in; mv -T e d/in/er/e; mkdir e; mv -T d/in/er/e e; mv -T a a2; mv -T a2/s a2/moved/s
printf 1 > a2/moved/s/h2; rm a2/moved/s/h; mv -T m/1 m1; mv -T m1/2 m/1; mv -T c a2/c
mv -T a2 m1/a
"""
# ... and where directories get one another's names, and the lower layers have directories, too;
# one at b, where a layer below has a whiteout.
SWAP = """
mv -T a x; mv -T e a; mv -T x e; rm -r d; mv -T m d; mv -T d/1 m; mv -T m/2 b; printf n > e/1
mkdir w/old; mv -T w b/w; rm -r a/in/er; mv -T a/in a/er
"""


class RealXattrs(unittest.TestCase):
    """Layers that carry overlayfs's own xattrs, against podman's mounts."""

    def test_mounts(self) -> None:
        need(os.geteuid() == 0, "only root can run podman on a store of its own")
        need_tools("podman", "skopeo", "umount")
        make, below = Trees.overlay, Trees.BELOW
        images = {
            "opaque": [below, make(b"a", opaque=b"y") + entry(b"a/up", b"u")],
            "ignored": [below, make(b"a", opaque=b"yes", whiteout=b"y") + make(
                b"o/y", b"full", whiteout=b"y")],
            "whiteout": [below, make(b"a/low", b"", whiteout=b"n")],
            "redirect": [below, make(b"n", redirect=b"/o") + make(b"o/t", redirect=b"s")
                         + make(b"a", redirect=b"/none")],
            "chain": [below, make(b"m", redirect=b"/o"), entry(b".wh.o"),
                      make(b"n", redirect=b"/m") + make(b"o", redirect=b"/o")],
            "hidden": [below, make(b"o", opaque=b"y") + make(b"o/t", redirect=b"s") + make(
                b"o/u", redirect=b"/o/s")],
            "metacopy": [below, make(b"o/y", b".", metacopy=bytes(4)) + make(
                b"f", b".", metacopy=bytes(4), redirect=b"/o/y")],
            "others": [pax({b"SCHILY.xattr.security.selinux": b"x:y:z:s0", b"SCHILY.xattr.user.x":
                            b"1", b"SCHILY.xattr.com.apple.x": b"2",
                            b"SCHILY.xattr.user.overlay.opaque": b"y"}) + below],
            "aufs": [below, entry(b"a/.wh..wh.X", b"q") + entry(b"o/s/.wh..wh.aufs")]}
        with tempfile.TemporaryDirectory(prefix="cstor-xattrs-") as folder:
            store = Store(os.path.join(folder, "store"))
            self.addCleanup(store.close)
            store.globals += ["--storage-opt", "overlay.mountopt=metacopy=on"]
            write_layout(folder + "/layout", {name: [data + END for data in tars]
                                              for name, tars in images.items()})
            for name in images:
                run("skopeo", "copy", "-q", f"oci:{folder}/layout:{name}", store.place(name))
                mount = store.podman("image", "mount", f"localhost/{name}").strip()
                with self.subTest(name), cstor.Storage.open(store.root) as storage, \
                        storage.image(f"localhost/{name}").tree() as tree:
                    self.assertEqual([], tree_differences(mount, tree))
                store.podman("image", "umount", f"localhost/{name}")
            store.close()


class RealTree(unittest.TestCase):
    """Merged trees against what podman mounts."""

    maxDiff = None
    folder: tempfile.TemporaryDirectory[str]
    disks: dict[str, str] = {}
    store: Store
    refused: dict[str, str]
    mounts: dict[str, str]
    odd: dict[str, bytes]
    stores: list[Store]

    LARGE = (("debian", "usr/share/doc", "usr/bin"),
             ("rpm", "usr/share/licenses", "usr/lib64/python3/__pycache__"))

    # What podman shows otherwise, by image: it ignores the root's header ("./") altogether and an
    # opaque marker in the root, a whiteout beside the directory that it names hides nothing, and
    # what AUFS keeps is shown.  Everything else has to be the same.
    OTHERWISE: dict[str, tuple[str, list[tuple[bytes, str]]]] = {
        "root": ("./;mode=700;uid=5 f=1", [(b"", "mode"), (b"", "owner"), (b"", "mtime")]),
        "root-below": ("./;mode=700;uid=5 | g=1", [(b"", "mode"), (b"", "owner"), (b"", "mtime")]),
        "opaque-root": ("BASE | n .wh..wh..opq", [(name, "missing") for name in (
            b"a", b"a/f", b"a/g", b"a/s", b"a/s/h", b"t")]),
        "whiteout-then-dir": ("BASE | .wh.a a/ a/n", [(name, "missing") for name in (
            b"a/f", b"a/g", b"a/s", b"a/s/h")]),
        "aufs": ("BASE | .wh..wh.aufs .wh..wh.plnk/ .wh..wh.plnk/1.2=1 .wh..wh.orph/ a/OPAQUE",
                 [(b".wh..wh.plnk", "missing"), (b".wh..wh.plnk/1.2", "missing")]),
        "dot-names": (NAMES["dot-names"], [(b"", "mode"), (b"", "mtime")]),
        "whiteout-parents": (NAMES["whiteout-parents"],
                             [(b".wh..wh.plnk", "missing"), (b".wh..wh.plnk/1.2", "missing")])}

    # Tars that GNU tar reads otherwise than Go: it takes sizes of directories and devices for
    # content, passes over negative sizes, and heeds GNU.sparse.name whatever the version.
    LISTED_OTHERWISE = frozenset("odd-" + name for name in (
        "v7-dir-with-size", "pax-names-dir", "dir-of-negative-size", "char-with-size",
        "fifo-with-size", "symlink-with-size", "sparse-by-hand-no-map",
        "sparse-by-hand-no-size"))

    @classmethod
    def setUpClass(cls) -> None:
        need(os.geteuid() == 0, "only root can run podman on a store of its own")
        need_tools("podman", "buildah", "skopeo", "tar", "mount", "umount", "mkfs.xfs",
                   "mkfs.btrfs", "mkfs.ext4", "filefrag", "setfattr")
        cls.folder = tempfile.TemporaryDirectory(prefix="cstor-tree-", dir=cls.fast_folder())
        cls.addClassCleanup(cls.folder.cleanup)
        cls.disks, cls.stores = {}, []
        cls.addClassCleanup(cls.close_stores)
        cls.store = cls.make_store("store")
        cls.odd = dict(sample([*odd_tars(), *gone_tars().items()]))
        layers = {**{f"odd-{name}": [data] for name, data in cls.odd.items()},
                  **{f"stack-{name}": [data + END for data in tars] for name, tars in stacks()},
                  **{f"other-{name}": [data + END for data in layers_of(text)]
                     for name, (text, _) in cls.OTHERWISE.items()},
                  "container": container_layers()}
        write_layout(cls.path("layout"), layers)
        write_layout(cls.path("big"), {"big": [
            entry(b"a", b"1") + END, entry(b"b", os.urandom(4 << 20)) + END]})
        cls.refused = {}
        for name in [*layers, "big"]:
            try:
                cls.pull(cls.store, name, "big" if name == "big" else "layout")
            except AssertionError as error:
                cls.refused[name] = str(error)
        build_image(cls.store, cls.path("context"), "built")
        for (name, folder, links), make in zip(cls.LARGE, (debian_tree, rpm_tree)):
            cls.grow(name, make, folder, links)
        for kind in ("xfs", "btrfs", "ext4"):
            cls.disks[kind] = make_disk(cls.folder.name, kind, 6 << 30)
            cls.addClassCleanup(unmount, cls.disks[kind])
        cls.copy_store()
        lines = json.loads(cls.store.podman("image", "mount", "-a", "--format", "json"))
        cls.mounts = {name.split("/")[1].split(":")[0]: line["mountpoint"]
                      for line in lines for name in line["Repositories"]}

    @staticmethod
    def fast_folder() -> str | None:
        """Return a tmpfs that has user's xattrs (Linux 6.6): five times as fast as a disk."""
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            os.setxattr(file.name, "user.x", b"1")
            if shutil.disk_usage("/dev/shm").free > 4 << 30:
                return "/dev/shm"
        return None

    @classmethod
    def path(cls, name: str) -> str:
        return os.path.join(cls.folder.name, name)

    @classmethod
    def copy_store(cls) -> None:
        """Copy the store, but for most large layers, to XFS, where files can be shared.

        podman could not have pulled all there: XFS knows no devices with minor numbers over 2^18.
        """
        top = os.path.join(cls.disks["xfs"], "store")
        os.makedirs(top + "/overlay")
        with cstor.Storage.open(cls.store.root) as storage:
            wanted = {layer.id for image in storage.images() for layer in image.layers()
                      if not image.title.startswith(("localhost/debian", "localhost/rpm-1"))}
        names = [name for name in os.listdir(cls.store.root) if name != "overlay"]
        names += [f"overlay/{name}" for name in ("l", *wanted)]
        for name in names:
            subprocess.run(["cp", "-a", name, os.path.join(top, name)], cwd=cls.store.root,
                           stderr=subprocess.DEVNULL, check=False)

    @classmethod
    def make_store(cls, name: str, *options: str) -> Store:
        store = Store(cls.path(name))
        for option in options:
            store.globals += ["--storage-opt", option]
        cls.stores.append(store)
        return store

    @classmethod
    def close_stores(cls) -> None:
        for store in cls.stores:
            for command in (["umount", "-a", "-f"], ["image", "umount", "-a", "-f"]):
                subprocess.run(["podman", *store.globals, *command], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, check=False)
            store.close()

    @classmethod
    def pull(cls, store: Store, name: str, layout: str = "layout") -> None:
        if store is cls.store:
            run("skopeo", "copy", "-q", f"oci:{cls.path(layout)}:{name}", store.place(name))
        else:  # with its options
            # A relative path: podman takes it for a name, which must not end in "_", say.
            image = store.podman("pull", "-q", f"oci:layout:{name}", cwd=cls.folder.name).strip()
            store.podman("tag", image, f"localhost/{name}")

    @classmethod
    def grow(cls, name: str, make: Any, folder: str, links: str) -> None:
        """Commit a large tree and two changes of it as NAME-1, NAME-2 and NAME-3."""
        base = "scratch"
        for number, step in enumerate((make, second_step, third_step), 1):
            working = cls.store.buildah("from", base).strip()
            top = cls.store.buildah("mount", working).strip()
            step(top, *(() if step is make else (folder, links)))
            base = f"localhost/{name}-{number}"
            cls.store.buildah("commit", "-q", "--rm", working, base)

    def setUp(self) -> None:
        self.storage = cstor.Storage.open(self.store.root)
        self.addCleanup(self.storage.close)

    def image(self, name: str) -> cstor.Image:
        return self.storage.image(f"localhost/{name}:latest")

    def same(self, mount: str, tree: cstor.Tree) -> None:
        with tree:
            self.assertEqual([], tree_differences(mount, tree))

    # -- images ----------------------------------------------------------------------------------

    def test_podman_refuses(self) -> None:
        self.assertEqual({f"odd-{name}" for name in REFUSED & set(self.odd)}, set(self.refused),
                         self.refused)

    def test_every_image_is_mounted(self) -> None:
        self.assertEqual({name.split("/")[1].split(":")[0] for image in self.storage.images()
                          for name in image.names}, set(self.mounts))

    def test_images(self) -> None:
        for name, mount in self.mounts.items():
            if name.startswith("other-") or name[4:] in self.OTHERWISE:
                continue
            with self.subTest(image=name):
                self.same(mount, self.image(name).tree())

    def test_images_that_podman_shows_otherwise(self) -> None:
        for name, (_, expected) in self.OTHERWISE.items():
            with self.subTest(image=name), self.image(f"other-{name}").tree() as tree:
                found = tree_differences(self.mounts[f"other-{name}"], tree)
                self.assertEqual(expected, [(path, field) for path, field, _, _ in found], found)
                status = os.stat(self.mounts[f"other-{name}"])
                self.assertEqual((0o555, 0, 0),
                                 (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid))
                for path, field, mounted, ours in found:
                    if field == "missing":
                        self.assertEqual((False, True), (mounted, ours), path)

    def test_names_in_tocs(self) -> None:
        target, seen = self.path("layer.tar"), set()
        for image in self.mounts:
            if image.partition("-")[2] in {*gone_tars(), "alias-dir", "alias-linked"}:
                continue  # whose tars cannot be had again
            for layer in self.image(image).layers():
                if layer.id in seen:
                    continue
                seen.add(layer.id)
                with self.subTest(image=image, layer=layer.id):
                    with open(target, "wb") as file:
                        layer.export(file, verify=False)
                    listed = subprocess.run(
                        ["tar", "--quoting-style=literal", "-tPf", target],
                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
                    names = [cstor.unspell(item["name"]) + b"\n"
                             for item in layer.toc()["entries"]]
                    plain = [name.replace(b"/\n", b"\n") for name in names]
                    if image in self.LISTED_OTHERWISE:
                        self.assertNotEqual(listed.replace(b"/\n", b"\n"), b"".join(plain))
                        continue
                    self.assertEqual(listed.replace(b"/\n", b"\n"), b"".join(plain))
                    self.assertEqual([], [item for item in layer.toc()["entries"]
                                          if (item["type"] == "dir") > item["name"].endswith("/")])

    def test_reading(self) -> None:
        for name in ("debian-3", "rpm-3", "stack-link-replaced", "stack-links-above"):
            with self.subTest(image=name), self.image(name).tree() as tree:
                files = self.files(tree)
                wrong = [path for path in files if b"".join(tree.read(path))
                         != self.mounted(name, path)]
                self.assertEqual([], wrong)

    def test_reading_a_tree_that_is_not_loaded(self) -> None:
        for name in ("debian-1", "debian-3", "rpm-1", "rpm-3") if FULL else ("debian-3", "rpm-1"):
            with self.image(name).tree() as tree:
                files = self.files(tree)
            full = [path for path in files if self.mounted(name, path)]
            count = 40 if FULL else 2
            for path in random.Random(name).sample(full, count) + random.Random(1).sample(files, 2):
                with self.subTest(image=name, path=path), self.image(name).tree() as tree:
                    data = self.mounted(name, path)
                    self.assertEqual(data, b"".join(tree.read(path)))

    def test_reading_what_is_hidden(self) -> None:
        for base, name in (("debian-1", "debian-3"), ("rpm-1", "rpm-3")):
            with self.image(base).tree() as tree:
                files = self.files(tree)
            gone = [path for path in files
                    if not os.path.isfile(os.path.join(os.fsencode(self.mounts[name]), path))]
            self.assertGreater(len(gone), 500)
            for path in random.Random(name).sample(gone, 6):
                with self.subTest(image=name, path=path), self.image(name).tree() as tree, \
                        self.assertRaises(cstor.CstorError):
                    b"".join(tree.read(path))

    @staticmethod
    def files(tree: cstor.Tree) -> list[bytes]:
        return [path for path, node, _ in tree.walk() if node.type == "reg"]

    def mounted(self, name: str, path: bytes) -> bytes:
        with open(os.path.join(os.fsencode(self.mounts[name]), path), "rb") as file:
            return file.read()

    def test_lookups(self) -> None:
        for name, mount in sample(self.mounts.items()):
            if name.startswith(("other-", "rpm-1", "debian-1")) or "symlink-chain" in name:
                continue
            with self.subTest(image=name), self.image(name).tree() as tree:
                paths = self.detours(tree)
                expected = subprocess.run(
                    [sys.executable, "-c", REALPATHS, mount], input=b"\0".join(paths),
                    stdout=subprocess.PIPE, check=True).stdout.split(b"\0")
                found = [self.looked_up(tree, path) for path in paths]
                wrong = [item for item in zip(paths, expected, found) if item[1] != item[2]]
                self.assertEqual([], wrong[:20])

    @staticmethod
    def looked_up(tree: cstor.Tree, path: bytes) -> bytes:
        try:
            return tree.lookup(path)[0]
        except (cstor.NotFound, cstor.FormatError):
            return b"\1"

    def detours(self, tree: cstor.Tree) -> list[bytes]:
        """Return all paths, and some through each link to a directory."""
        paths = []
        for path, node, _ in tree.walk():
            paths.append(path)
            if node.type == "symlink":
                paths += [path + b"/no"]
                with contextlib.suppress(cstor.CstorError):
                    end, target = tree.lookup(path)
                    if target.type == "dir":
                        paths += [path + b"/..", path + b"/../../../" + path]
                        paths += [path + b"/" + name for name, _, _ in zip(
                            sorted(target.children), range(5), range(5))]
        return paths

    # -- extraction ------------------------------------------------------------------------------

    def extracted(self, mount: str, kind: str, thing: Any, **options: Any) -> dict[str, Any]:
        """Extract an image or container to a disk, and compare it with what is mounted."""
        out = os.path.join(self.disks[kind], "out")
        try:
            done: dict[str, Any] = thing.extract(out, **options)
            expected, found = seen_on_disk(mount), seen_on_disk(out)
            with thing.tree() as tree:
                for path, node, _ in tree.walk():
                    if node.implicit:
                        found[0][path]["implicit"] = True
            if kind != "btrfs":  # no time before 1901 can be kept
                for row in expected[0].values():
                    row["mtime"] = max(row["mtime"], -(1 << 31) * 10**9)
            self.assertEqual([], differences(expected, found))
        finally:
            subprocess.run(["rm", "-rf", out], check=True)
        return done

    def test_extracted_images(self) -> None:
        """On three file systems: by reflink beside the store, elsewhere by copying."""
        large = {"debian-3": ("ext4",) if FULL else (), "rpm-3": ("xfs",)}
        gone = {*gone_tars(), "alias", "alias-dir", "alias-linked"}  # tars that are not to be had
        copy = cstor.Storage.open(os.path.join(self.disks["xfs"], "store"))
        self.addCleanup(copy.close)
        for name, mount in sample(self.mounts.items()):
            if name.startswith("other-") or name[4:] in self.OTHERWISE:
                continue
            kinds = large.get(name, ()) if name.startswith(("debian", "rpm")) else self.disks
            for kind in kinds:
                with self.subTest(image=name, disk=kind):
                    image = copy.image(f"localhost/{name}") if kind == "xfs" else self.image(name)
                    if (name, kind) == ("stack-devices", "xfs"):
                        with self.assertRaisesRegex(OSError, "Invalid argument.*/out/[12]"):
                            image.extract(os.path.join(self.disks[kind], "out"))
                        continue
                    whole = name.partition("-")[2] not in gone
                    if not whole and kind == "btrfs":
                        out = os.path.join(self.disks[kind], "out")
                        with self.assertRaises((cstor.Unsupported, cstor.IntegrityError)):
                            image.extract(out, verify=True)
                        self.assertFalse(os.path.lexists(out))
                    done = self.extracted(mount, kind, image, verify=kind != "ext4" and whole)
                    self.assertEqual(done["bytes"], done["bytes-reflinked" if kind == "xfs"
                                                         else "bytes-copied"])
                    self.assertEqual(({}, []), (done["unset"], done["left-out"]))

    def test_images_from_streams(self) -> None:
        """What comes as a stream is made as if from the store, and shares the store's extents."""
        copy = cstor.Storage.open(os.path.join(self.disks["xfs"], "store"))
        self.addCleanup(copy.close)

        class Streamed:
            def __init__(self, image: cstor.Image, codec: str) -> None:
                self.image, self.codec, self.tree = image, codec, image.tree

            def extract(self, out: str, **options: Any) -> Any:
                with contextlib.ExitStack() as stack:
                    streams = [stack.enter_context(streamed(layer, self.codec))
                               for layer in self.image.layers()]
                    done = cstor.extract_streams(streams, out, **options)
                    paths = [os.path.join(folder, name) for folder, _, names in os.walk(out)
                             for name in names]
                    unshared = unshared_extents([
                        path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)
                        and os.path.getsize(path)])
                    return {**done, "unshared": unshared}

        gone = {*gone_tars(), "alias", "alias-dir", "alias-linked"}  # tars that are not to be had
        for number, (name, mount) in enumerate(sample(self.mounts.items())):
            if name.startswith(("other-", "debian", "rpm-1", "rpm-2")) or name == "stack-devices" \
                    or name[4:] in self.OTHERWISE or name.partition("-")[2] in gone:
                continue
            with self.image(name).tree() as tree:
                names = b"".join(path for path, _, _ in tree.walk())
            # Names that are not UTF-8 are inline in a splitdirfdstream.
            codec = CODECS[number % 2 and names == names.decode("utf-8", "ignore").encode()]
            with self.subTest(image=name):
                done = self.extracted(mount, "xfs", Streamed(copy.image(f"localhost/{name}"),
                                                             codec), verify=True)
                if "sparse" not in name:  # whose contents are inline
                    self.assertEqual((done["bytes"], []),
                                     (done["bytes-reflinked"], done["unshared"]))

    def test_extracted_images_that_podman_shows_otherwise(self) -> None:
        out = os.path.join(self.disks["ext4"], "out")
        for name in self.OTHERWISE:
            with self.subTest(image=name), self.image(f"other-{name}").tree() as tree:
                cstor.extract_tree(tree, out)
                self.assertEqual([], tree_differences(out, tree))
                subprocess.run(["rm", "-rf", out], check=True)

    def test_extracted_layers(self) -> None:
        """A layer's files, with whiteouts spelled as in its tar: the names that tar lists."""
        out = os.path.join(self.disks["xfs"], "out")
        for name in ("debian-3", "rpm-2", "stack-whiteouts", "stack-opaque-then-more"):
            for layer in self.image(name).layers()[1:]:
                with self.subTest(image=name, layer=layer.id):
                    layer.extract(out)
                    expected = {cstor.clean_name(member.name) for member in layer.members()
                                if b"no/.wh.where" not in member.name}
                    for path in list(expected):
                        while b"/" in path:  # parents that have no entry
                            path = path.rpartition(b"/")[0]
                            expected.add(path)
                    self.assertEqual(expected, set(seen_on_disk(out)[0]) - {b""})
                    subprocess.run(["rm", "-rf", out], check=True)

    def test_an_image_that_is_removed_meanwhile(self) -> None:
        out = os.path.join(self.disks["ext4"], "out")
        with open(self.path("doomed.tar"), "wb") as file:
            file.write(make_tar(*((f"d{i % 9}/f{i}", b"%d" % i) for i in range(2000))))
        for when in (0, 5):
            self.store.podman("import", "-q", self.path("doomed.tar"), "localhost/doomed")
            real = cstor.Extraction._make_batch
            calls: list[int] = []

            def remove(extraction: cstor.Extraction, batch: list[Any], when: int = when,
                       calls: list[int] = calls, real: Any = real) -> None:
                if len(calls) == when:
                    self.store.podman("rmi", "-f", "localhost/doomed")
                calls.append(1)
                real(extraction, batch)

            with cstor.Storage.open(self.store.root) as storage, \
                    storage.image("localhost/doomed").tree() as tree, \
                    mock.patch.object(cstor.Extraction, "_make_batch", remove), \
                    self.assertRaisesRegex(cstor.LayerUnknown,
                                           r"removed while (it was|.*d\d/f\d)"):
                cstor.extract_tree(tree, out, workers=1)
            self.assertEqual(when + 1, len(calls))
            self.assertFalse(os.path.lexists(out))

    # -- containers ------------------------------------------------------------------------------

    def container(self, store: Store, name: str, changes: Sequence[str | Callable[[str], None]],
                  *arguments: str) -> dict[str, int]:
        """Make a container, change and compare it; count xattrs by name in its writable layer."""
        identity = store.podman("create", "--network", "none", "--name", name, *arguments,
                                "/a").strip()
        top = store.podman("mount", identity).strip()
        for change in changes:
            run("sh", "-ec", change, cwd=top) if isinstance(change, str) else change(top)
        with cstor.Storage.open(store.root) as storage:
            container = storage.container(identity)
            if not any("fuse-overlayfs" in word for word in store.globals):
                with self.subTest(container=name):  # FUSE keeps what it knew before for a while
                    self.same(top, container.tree())
            store.podman("umount", identity)
            top = store.podman("mount", identity).strip()
            with self.subTest(container=name, mounted="again"):
                self.same(top, container.tree())
            for kind in ("xfs", "ext4"):
                with self.subTest(container=name, extracted=kind):
                    self.extracted(top, kind, container)
        found: dict[str, int] = {}
        for place, names, files in os.walk(f"{store.root}/overlay/{container.layer}/diff"):
            for base in names + files:
                for key in os.listxattr(os.path.join(place, base), follow_symlinks=False):
                    found[key] = found.get(key, 0) + 1
        return found

    def test_containers(self) -> None:
        self.container(self.store, "unchanged", [], "localhost/container")
        found = self.container(self.store, "changed", [CHANGE], "localhost/container")
        self.assertGreater(found.get("trusted.overlay.opaque", 0), 1, found)

    def test_containers_of_large_images(self) -> None:
        for name, folder, links in self.LARGE if FULL else self.LARGE[:1]:
            self.container(self.store, name, [
                lambda top, folder=folder, links=links:  # type: ignore[misc]
                third_step(top, folder, links)], f"localhost/{name}-2")

    def test_containers_with_stubs_and_renamed_directories(self) -> None:
        store = self.make_store("metacopy", "overlay.mountopt=metacopy=on,redirect_dir=on")
        self.pull(store, "container")
        for name, changes in (("changed", [CHANGE]), ("renamed", [RENAME]),
                              ("both", [CHANGE, RENAME_AGAIN]), ("swapped", [SWAP])):
            found = self.container(store, name, changes, "localhost/container")
            if name != "changed":
                self.assertGreater(found.get("trusted.overlay.redirect", 0), 2, found)
            if name != "swapped":
                self.assertGreater(found.get("trusted.overlay.metacopy", 0), 1, found)

    def test_containers_of_fuse_overlayfs(self) -> None:
        need_tools("fuse-overlayfs")
        store = self.make_store("fuse", "overlay.mount_program=/usr/bin/fuse-overlayfs")
        self.pull(store, "container")
        self.container(store, "unchanged", [], "localhost/container")
        self.container(store, "changed", [CHANGE], "localhost/container")

    def test_rootfs_containers(self) -> None:
        top = self.path("rootfs")
        shutil.copytree(self.mounts["stack-links-above"], top, symlinks=True)
        put_new(top + "/.wh.a")
        os.link(top + "/.wh.a", top + "/linked")
        os.setxattr(top + "/linked", "user.x", b"1")
        os.mknod(top + "/zero", stat.S_IFCHR | 0o600, 0)
        os.chmod(top, 0o711)
        self.store.podman("create", "--network", "none", "--name", "rootfs", "--rootfs", top, "/a")
        container = self.storage.container("rootfs")
        if container.state.get("rootfs") != top:  # podman 4 has its database elsewhere
            patch = mock.patch.object(cstor.Container, "state", {"rootfs": top})
            patch.start()
            self.addCleanup(patch.stop)
        self.same(top, container.tree())

    # -- through skopeo --------------------------------------------------------------------------

    def new(self) -> str:
        """Return the path of what is to be made, and is removed at the end."""
        folder = tempfile.mkdtemp(dir=self.folder.name)
        self.addCleanup(remove, folder)
        return os.path.join(folder, "out")

    def via(self, words: str, reference: str, target: str, *args: str) -> str:
        return command("image", words, "--via-skopeo", reference, target, *args)

    def same_files(self, reference: str, name: str) -> None:
        """Extract an image and compare it with the one in the store."""
        out = self.new()
        self.via("extract", reference, out)
        self.same(out, self.image(name).tree())

    def same_image(self, reference: str, name: str) -> str:
        """Copy an image and compare it with the one in the store; return its manifest's digest."""
        out = self.new()
        digest = self.via("copy-to-oci", reference, f"{out}:t").split()[0]
        inspected = json.loads(run("skopeo", "inspect", f"oci:{out}:t"))
        self.assertEqual(digest, inspected["Digest"])
        run("skopeo", "copy", "-q", f"oci:{out}:t", f"dir:{out}-again")
        _, config, _ = read_layout(out)["t"]
        self.assertEqual(self.image(name).config()["rootfs"], config["rootfs"])
        return digest

    def test_fetched_layouts(self) -> None:
        names = [name for name in self.mounts if name.startswith("stack-") or name == "big"]
        names.remove("stack-times-far")  # which ext4 cannot hold
        for name in names if FULL else names[::5]:
            with self.subTest(image=name):
                reference = f"oci:{self.path('big' if name == 'big' else 'layout')}:{name}"
                self.same_files(reference, name)
                self.assertEqual(sha256(run("skopeo", "inspect", "--raw", reference).encode()),
                                 self.same_image(reference, name))

    def test_fetched_transports(self) -> None:
        for transport in ("docker-archive", "oci-archive", "oci-dir"):
            self.store.podman("save", "-q", "--format", transport, "-o", self.path(transport),
                              "localhost/built")
        run("skopeo", "copy", "-q", "--dest-compress", self.store.place("built"),
            f"dir:{self.path('dir')}")
        for reference in (f"docker-archive:{self.path('docker-archive')}",
                          f"docker-archive:{self.path('docker-archive')}:localhost/built:latest",
                          f"oci-archive:{self.path('oci-archive')}", f"dir:{self.path('dir')}",
                          f"oci:{self.path('oci-dir')}"):
            with self.subTest(reference=reference):
                self.same_files(reference, "built")
                self.same_image(reference, "built")

    def test_fetched_zstd(self) -> None:
        need_tools("zstd")
        for compress in ("zstd", "gzip"):
            command("--root", self.store.root, "image", "copy-to-oci", "localhost/big",
                    self.path(f"packed:{compress}"), "--compress", compress)
            self.same_files(f"oci:{self.path('packed')}:{compress}", "big")
            self.same_image(f"oci:{self.path('packed')}:{compress}", "big")

    def test_fetched_platforms(self) -> None:
        _, config, tars = read_layout(self.path("big"))["big"]
        layout, out, wanted = self.path("platforms"), self.new(), {}
        with cstor.OciLayout(layout) as made:
            def add(data: Any, kind: str) -> dict[str, Any]:
                return cstor.descriptor(kind, *made.add(
                    data if isinstance(data, bytes) else json.dumps(data).encode()))

            entries = []
            for arch in ("amd64", "arm64"):
                entries.append(add({"schemaVersion": 2, "mediaType": cstor.OCI_MANIFEST,
                                    "config": add({**config, "architecture": arch},
                                                  cstor.OCI_CONFIG),
                                    "layers": [add(tar, cstor.OCI_LAYER) for tar in tars]},
                                   cstor.OCI_MANIFEST))
                entries[-1]["platform"] = {"os": "linux", "architecture": arch}
                wanted[f"linux/{arch}"] = entries[-1]["digest"]
            made.tag(add({"schemaVersion": 2, "mediaType": cstor.OCI_INDEX, "manifests": entries},
                        cstor.OCI_INDEX), "t")
        for platform, digest in wanted.items():
            self.assertEqual(digest, self.via("copy-to-oci", f"oci:{layout}:t", out,
                                              "--platform", platform).split()[0])
        with self.assertRaisesRegex(AssertionError, "status 3: .*no image found"):
            self.via("copy-to-oci", f"oci:{layout}:t", out, "--platform", "linux/s390x")
        with self.assertRaisesRegex(AssertionError, "status 3: .* is for linux/amd64, not linux/a"):
            self.via("copy-to-oci", f"oci:{self.path('big')}:big", out,
                     "--platform=linux/arm64")

    def test_errors_of_fetching(self) -> None:
        layout = self.path("big")
        for reference, status, message in (
                (f"oci:{layout}:nope", 3, "no descriptor found"),
                (f"oci:{layout}x:nope", 3, "no such file"), ("dir:/nonexistent", 3, "no such file"),
                (f"docker-archive:{layout}/index.json", 6, "docker-archive:"),
                (self.store.place("nope"), 2, "without --via-skopeo"),
                ("nope", 6, "expected oci:DIR:TAG"),
                ("nope:nope", 6, "unknown transport"),
                ("docker://localhost:1/a/b:c", 6, "connection refused")):
            for words in ("extract", "copy-to-oci"):
                out = self.new()
                with self.subTest(reference=reference, command=words):
                    done = fork_main(["image", words, "--via-skopeo", reference, out], os.environ)
                    self.assertRegex(done.err, r"\Acstor: error: [^\n]+\n\Z")
                    self.assertIn(message, done.err)
                    self.assertEqual(status, done.returncode)
                    self.assertFalse(os.path.exists(out))

    def test_damaged_blobs_that_are_fetched(self) -> None:
        damaged = self.path("damaged")
        shutil.copytree(self.path("big"), damaged)
        manifest, _, _ = read_layout(damaged)["big"]
        path = f"{damaged}/blobs/sha256/{manifest['layers'][-1]['digest'][7:]}"
        with open(path, "r+b") as file:
            file.seek(1 << 20)
            file.write(b"damage")
        changes: list[tuple[Callable[[], None], str]] = [
            (lambda: None, "(?i)digest"), (lambda: os.truncate(path, 3 << 20), "(?i)size|digest"),
            (lambda: os.unlink(path), "no such file")]
        for change, message in changes:
            change()
            with self.assertRaisesRegex(cstor.CstorError, message):
                cstor.FetchedImage(f"oci:{damaged}:big")


# Runs a command where seccomp refuses unshare(2), setns(2), clone3(2), and clone(2) into a user
# namespace.
FORBID_UNSHARE = r"""
import ctypes, os, struct, sys
def step(code, jt, jf, k):
    return struct.pack("=HBBI", code, jt, jf, k)
numbers = {"x86_64": (272, 308, 435, 56), "aarch64": (97, 268, 435, 220)}[os.uname().machine]
rules = [step(0x20, 0, 0, 0)]  # load the number of the call
for number in numbers[:2]:
    rules += [step(0x15, 0, 1, number), step(0x06, 0, 0, 0x00050001)]  # EPERM
rules += [step(0x15, 0, 1, numbers[2]), step(0x06, 0, 0, 0x00050026)]  # ENOSYS
rules += [step(0x15, 0, 3, numbers[3]), step(0x20, 0, 0, 16),  # flags
          step(0x45, 0, 1, 0x10000000), step(0x06, 0, 0, 0x00050001)]
rules += [step(0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(rules))
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]
program = Program(len(rules), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
"""


def read_text(path: str) -> str:
    return read_bytes(path).decode("utf-8", "replace")


class RealVfs(unittest.TestCase):
    """A store of podman's driver vfs, with images of many layers and changed containers."""

    # Images that podman refuses, or unpacks so that contents of their tars are gone.
    REFUSED = {"whiteout-linked", "types-3", "types-nested"}
    GONE = {"alias", "alias-dir", "alias-linked"}
    # An opaque marker behind a link has no effect; copies lose xattrs of links and special files.
    OTHERWISE = {"opaque-by-link": [(b"a/s/h", "missing")],
                 "xattrs": [(b"p", "xattrs"), (b"s", "xattrs")]}
    CHANGES = """set -e; cd $1; rm -r d; mkdir -m 700 d; echo new > d/new; ln d/new hard; rm c
        mkdir c; mknod c/null c 0 0; echo literal > .wh.a; ln -s /x link; chmod 600 a; chown 7 a
        setfattr -n user.x -v 1 b; touch -d 2001-01-01 kept"""

    folder: tempfile.TemporaryDirectory[str]
    store: Store
    names: list[str]
    listed: dict[str, set[str]]  # by container, what podman says that it changed

    @classmethod
    def setUpClass(cls) -> None:
        need(os.geteuid() == 0, "only root can run podman on a store of its own")
        need_tools("podman", "buildah", "skopeo", "setfattr")
        cls.folder = tempfile.TemporaryDirectory(prefix="cstor-vfs-")
        cls.addClassCleanup(cls.folder.cleanup)
        cls.store = Store(cls.path("store"), "vfs")
        chosen = dict(sample(stacks()))
        write_layout(cls.path("layout"), chosen)
        cls.names = []
        for name in chosen:
            with contextlib.nullcontext() if name not in cls.REFUSED else \
                    unittest.TestCase().assertRaises(AssertionError):
                run("skopeo", "copy", "-q", f"oci:{cls.path('layout')}:{name}",
                    cls.store.place(name))
                cls.names.append(name)
        os.mkdir(cls.path("context"))
        for each in "abc":
            put(f"{cls.path('context')}/{each}", each * 1000)
        put(cls.path("context") + "/Dockerfile",
            "FROM scratch\nCOPY a b c /\nCOPY a b c /d/\nCOPY c /kept\nCMD /a\n")
        cls.store.buildah("bud", "--layers", "-q", "-t", "localhost/built", cls.path("context"))
        for name, *options in (("same",), ("changed",), ("mapped", "--uidmap=0:100000:65536")):
            cls.store.podman("create", "--network=none", "--name", name, *options, "built", "/a")
        place = cls.store.podman("mount", "changed").strip()
        run("sh", "-c", cls.CHANGES, "sh", place)
        cls.store.podman("umount", "changed")
        cls.listed = {name: set(cls.store.podman("diff", name).splitlines())
                      for name in ("same", "changed")}

    @classmethod
    def path(cls, name: str) -> str:
        return os.path.join(cls.folder.name, name)

    def setUp(self) -> None:
        self.storage = cstor.Storage.open(self.store.root, runroot=self.store.runroot)
        self.addCleanup(self.storage.close)
        before = snapshot(self.store.root)
        self.addCleanup(lambda: self.assertEqual(before, snapshot(self.store.root)))

    def place(self, layer: str) -> str:
        return os.path.join(self.store.root, "vfs/dir", layer)

    def compare(self, layer: str, tree: cstor.Tree) -> list[tuple[bytes, str]]:
        """Return where a tree differs from a layer's directory, which podman mounts as it is."""
        with tree:
            found = tree_differences(self.place(layer), tree)
        return [row[:2] for row in found if row[1] != "mtime" or row[3] >= -(1 << 31) * 10**9]

    def test_layers(self) -> None:
        lost = {layer.id for name in self.GONE & set(self.names)
                for layer in self.storage.image(f"localhost/{name}").layers()[:1]}
        count = 0
        for layer in self.storage.layers():
            self.assertEqual([], layer.faults)
            if not layer.diff_digest:
                with self.assertRaisesRegex(cstor.Unsupported, "writable layer of a container"):
                    layer.export(io.BytesIO())
            elif layer.id in lost:
                with self.assertRaises(cstor.IntegrityError):
                    layer.export(io.BytesIO())
            else:
                out = io.BytesIO()
                self.assertEqual(layer.diff_digest, layer.export(out))
                self.assertEqual(layer.diff_digest, sha256(out.getvalue()))
                count += 1
        self.assertGreater(count, len(self.names))

    def test_images(self) -> None:
        for image in self.storage.images():
            name = image.names[0][10:-7] if image.names else ""  # one of the build's steps
            with self.subTest(image=name):
                self.assertEqual([], image.faults)
                self.assertEqual(self.OTHERWISE.get(name, []),
                                 self.compare(image.layer, image.tree()))

    def test_containers(self) -> None:
        for name in ("same", "changed"):
            container = self.storage.container(name)
            self.assertEqual([], container.faults)
            self.assertEqual([], self.compare(container.layer, container.tree()))
            with self.storage.image("built").tree() as old, container.tree() as new:
                found = {f"{'A' if a is None else 'D' if b is None else 'C'} /{path.decode()}"
                         for path, a, b, _ in cstor.diff_trees(old, new) if path}
            self.assertEqual(self.listed[name], found)
            self.assertEqual(13 if name == "changed" else 0, len(found))
        with self.storage.container("mapped").tree() as tree:
            self.assertEqual({0}, {node.uid for _, node, _ in tree.walk()})

    def test_out_and_back(self) -> None:
        layout = self.path("out")
        image = self.storage.image("built")
        image.copy_to_oci(layout, "built")
        other = Store(self.path("other"))
        self.addCleanup(other.close)
        run("skopeo", "copy", "-q", f"oci:{layout}:built", other.place("built"))
        with cstor.Storage.open(other.root) as storage:
            found = storage.image("built")
            self.assertEqual((image.id, "overlay"), (found.id, storage.driver))
            with image.tree() as old, found.tree() as new:
                self.assertEqual([], list(cstor.diff_trees(old, new)))
            self.assertEqual(image.toc(digests=True), found.toc(digests=True))

    def test_extracted(self) -> None:
        for name, thing in (("image", self.storage.image("built")),
                            ("container", self.storage.container("changed"))):
            thing.extract(self.path(name), verify=True)
            self.assertEqual([], self.compare_with(name, thing))

    def compare_with(self, name: str, thing: Any) -> list[Any]:
        with thing.tree() as tree:
            return tree_differences(self.path(name), tree)

    def test_served(self) -> None:
        need_proc()
        self.assertEqual(3 * (7 if FULL else 4), fetch_by_all(self, self.only("built")))

    def only(self, name: str) -> cstor.Storage:
        """Return the storage with the layers of one image."""
        storage, image = self.storage, self.storage.image(name)
        storage._layers, storage._images = image.layers(), (image,)
        return storage


class RealRootless(unittest.TestCase):
    """Stores of a real user, made by his own podman, seen by him, by root and by others."""

    METADATA = ("image list --format json", "image inspect image", "image blame image",
                "image layers image --format json", "image history image --format json",
                "image files image -l", "image stat image d-1-700/closed", "image toc image",
                "image diff image image", "layer list --format json", "layer inspect LAYER",
                "layer toc LAYER", "container list --format json", "container inspect c")
    CONTENTS = ("image toc image --digests", "image cat image d-1-700/closed f-1000-0 f-0-0",
                "image export image", "layer export LAYER", "layer cat LAYER many/007",
                "image export image --as docker-archive", "image export image --as oci-archive",
                "image cp image:d-1-700 -", "image cp image:/ DIR", "image extract image DIR",
                "image copy-to-oci image DIR", "container files c -l", "container export c",
                "container stat c d-1-700/new/file", "container stat c d-1-700/closed",
                "container cat c hard d-1-700/new/file f-1-600", "container extract c DIR")
    CHANGES = """set -e; m=$(PODMAN mount c); cd $m
        echo secret > f-1-600; rm f-0-0; mkdir -m 700 d-1-700/new; echo new > d-1-700/new/file
        ln d-1-700/new/file hard; chmod 600 hard; ln -s /x d-1-700/new/link
        mkdir d-1-700/new/many; for i in 1 2 3; do echo $i > d-1-700/new/many/$i; done
        chown -R 1:1 d-1-700/new; rm -r d-0-755; mkdir d-0-755; touch d-1000-700/closed
        cd /; PODMAN umount c > /dev/null"""
    LAUNCH = "import sys; sys.path.insert(0, sys.argv.pop(1)); import cstor; sys.exit(cstor.main())"
    folder: str
    home: str
    python: str
    user: int
    env: dict[str, str]
    stores: dict[str, str]
    root: str
    script: list[str]
    layer: cstor.Layer
    link: str

    # -- making a user and his stores --------------------------------------------------------------

    @classmethod
    def setUpClass(cls) -> None:
        need(os.geteuid() == 0, "only root can make users")
        need_tools("useradd", "userdel", "podman", "newuidmap", "newgidmap", "fuse-overlayfs",
                   "mkfs.xfs", "mount", "umount", "unshare")
        need(os.path.exists("/dev/fuse"), "no /dev/fuse")
        cls.folder = tempfile.mkdtemp(prefix="cstor-rootless-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        os.chmod(cls.folder, 0o755)
        copy_script(cls.path("cstor.py"))
        py_compile.compile(cls.path("cstor.py"), doraise=True)  # it is run a hundred times
        os.mkdir(cls.path("python"))
        run("mount", "--bind", sys.base_prefix, cls.path("python"))  # it may lie below /root
        cls.addClassCleanup(run, "umount", cls.path("python"))
        cls.python = os.path.join(cls.path("python"), os.path.relpath(
            os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)))
        cls.addClassCleanup(os.chmod, "/dev/fuse", stat.S_IMODE(os.stat("/dev/fuse").st_mode))
        os.chmod("/dev/fuse", 0o666)
        cls.user = cls.add_user("home")
        cls.home = cls.path("home")
        cls.env = {"HOME": cls.home, "LC_ALL": "C.UTF-8", "XDG_RUNTIME_DIR": cls.path("run"),
                   "PATH": os.environ["PATH"], "LD_LIBRARY_PATH": cls.path("python/lib")}
        cls.addClassCleanup(cls.end_processes)
        os.mkdir(cls.path("run"), 0o700)
        os.chown(cls.path("run"), cls.user, cls.user)
        with open(cls.path("image.tar"), "wb") as file:
            file.write(cls.image_tar())
        cls.stores = {}
        fuse = "overlay.mount_program=" + str(shutil.which("fuse-overlayfs"))
        cls.make_store("native")
        cls.make_store("fuse", fuse)
        cls.make_store("masked", fuse, "overlay.force_mask=0700")
        cls.make_store("vfs")
        cls.root = cls.stores["native"]
        cls.script = [cls.python, cls.path("cstor.py"), "--root", cls.root]
        with cstor.Storage.open(cls.root) as storage:
            cls.layer = storage.image("image").layers()[-1]
            cls.link = cls.layer.link_id

    @classmethod
    def path(cls, name: str) -> str:
        return os.path.join(cls.folder, name)

    @classmethod
    def add_user(cls, home: str, *options: str) -> int:
        """Make a user and a group of one ID, which are removed at the end; return the ID."""
        name = f"cstor-{home}-{os.getpid()}"
        run("useradd", "-m", "-U", "-d", cls.path(home), *options, name)
        cls.addClassCleanup(run, "userdel", name)
        return pwd.getpwnam(name).pw_uid

    @classmethod
    def image_tar(cls) -> bytes:
        parts = [entry(b"many/", typeflag=b"5", mode=b"0000700", uid=b"0000007")]
        parts += [entry(b"many/%03d" % number, b"%d" % number * 999, mode=b"0000600",
                        uid=b"0000007") for number in range(300)]
        for uid in (0, 1, 1000, 65535):
            owner: Any = {"uid": b"%07o" % uid, "gid": b"%07o" % uid}
            parts += [entry(b"f-%d-%o" % (uid, mode), b"%d %o" % (uid, mode) * 999,
                            mode=b"%07o" % mode, **owner) for mode in (0o600, 0, 0o640, 0o644)]
            for mode in (0o700, 0, 0o755, 0o711):
                name = b"d-%d-%o/" % (uid, mode)
                parts += [entry(name, typeflag=b"5", mode=b"%07o" % mode, **owner),
                          entry(name + b"open", name, mode=b"0000644", **owner),
                          entry(name + b"closed", name, mode=b"0000600", **owner),
                          entry(name + b"link", typeflag=b"2", linkname=b"open", **owner)]
        return b"".join(parts) + END

    @classmethod
    def make_store(cls, name: str, *options: str) -> None:
        """Let the user import an image, and make and change a container."""
        root = os.path.join(cls.home, name)
        podman = ["podman", "--root", root, "--runroot", cls.path("run/" + name),
                  "--storage-driver", "vfs" if name == "vfs" else "overlay",
                  *(f"--storage-opt={item}" for item in options)]
        cls.as_user(*podman, "import", "-q", cls.path("image.tar"), "localhost/image")
        cls.as_user(*podman, "create", "--name", "c", "localhost/image", "/x")
        cls.as_user("podman", "unshare", "sh", "-c",
                    cls.CHANGES.replace("PODMAN", " ".join(podman)))
        cls.stores[name] = root

    # -- running and looking -----------------------------------------------------------------------

    @classmethod
    def as_user(cls, *command: str | bytes, status: int = 0, uid: int = 0,
                env: Mapping[str, str] | None = None, **options: Any) -> bytes:
        """Run a command as the user; return its stdout, or its stderr when it is to fail."""
        uid = uid or cls.user
        done = subprocess.run(command, **{
            "user": uid, "group": uid, "extra_groups": [], "timeout": 120, "cwd": "/",
            "env": {**cls.env, **(env or {})}, "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
        if done.returncode != status:
            raise AssertionError(f"{command}: status {done.returncode}: {done.stderr!r}")
        return (done.stderr if status not in (0, 1) else done.stdout) or b""

    def cstor(self, words: str, root: str = "", **options: Any) -> bytes:
        """Run cstor.py as the user, or as ``uid``."""
        return self.as_user(self.python, "-c", self.LAUNCH, self.folder, "--root",
                            root or self.root, *self.words(words), **options)

    def by_root(self, words: str, root: str = "", status: int = 0) -> bytes:
        done = fork_main(["--root", root or self.root, *self.words(words)], self.env)
        self.assertEqual(status, done.returncode, done.err)
        return done.stdout

    @classmethod
    def start(cls, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command as the user."""
        return subprocess.Popen(command, **{
            "user": cls.user, "group": cls.user, "extra_groups": [], "cwd": "/", "env": cls.env,
            "stdin": subprocess.DEVNULL, **options})

    def words(self, text: str) -> list[str]:
        return [{"LAYER": self.layer.diff_digest, "DIR": self.path("target/made"),
                 }.get(word, word) for word in text.split(" ")]

    @classmethod
    def processes(cls) -> dict[int, str]:
        """Return the user's processes, also in his namespaces, by ID."""
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                status = read_text(f"/proc/{name}/status")
                if re.search(rf"^Uid:.*\b{cls.user}\b", status, re.MULTILINE) \
                        and not re.search(r"^State:\tZ", status, re.MULTILINE):
                    found[int(name)] = read_text(f"/proc/{name}/cmdline").replace("\0", " ")
        return found

    @classmethod
    def ours(cls) -> dict[int, str]:
        """Return the processes that are not podman's own, which stay when it has ended."""
        return {pid: command for pid, command in cls.processes().items()
                if "-IS" in command or "cstor" in command.replace(cls.folder + "/home", "")}

    @classmethod
    def end_processes(cls) -> None:
        for pid in cls.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not cls.processes(), 5)

    def setUp(self) -> None:
        self.before = snapshot(self.root)
        self.addCleanup(self.check)
        os.mkdir(self.path("target"))
        os.chmod(self.path("target"), 0o777)
        self.addCleanup(shutil.rmtree, self.path("target"))

    def check(self) -> None:
        wait_for(lambda: not self.ours(), 5)
        self.assertEqual({}, self.ours(), "processes are left")
        self.assertEqual(self.before, snapshot(self.root), "the store was changed")

    def made(self) -> dict[str, str]:
        """Return what was made in the target, type and content, and remove it."""
        found = {}
        top = self.path("target")
        for place, _, files in os.walk(top):
            for name in files:
                path = os.path.join(place, name)
                found[os.path.relpath(path, top)] = os.readlink(path) if os.path.islink(path) \
                    else sha256(read_bytes(path))
        for name in os.listdir(top):
            shutil.rmtree(os.path.join(top, name))
        return found

    # -- the tests ---------------------------------------------------------------------------------

    def test_same_answers_as_root_gets(self) -> None:
        for name, root in self.stores.items():
            if not FULL and name not in ("native", "vfs"):
                continue
            for words in self.METADATA + self.CONTENTS:
                with self.subTest(store=name, words=words):
                    found = [(who("-q " + words, root), self.made())
                             for who in (self.cstor, self.by_root)]
                    self.assertEqual(found[1][1], found[0][1])
                    if "DIR" not in words:
                        self.assertEqual(found[1][0], found[0][0])
                    else:
                        self.assertGreater(len(found[0][1]), 2)
                    if words.startswith("layer export"):
                        self.assertEqual(self.layer.diff_digest, sha256(found[0][0]))

    def test_copies_for_other_ids(self) -> None:
        """Layers of keep-id and --uidmap containers, whose directories are of sub-uids and 0700."""
        for driver in cstor.DRIVERS:
            with self.subTest(driver=driver):
                self.check_copies(driver, os.path.join(self.home, "mapped-" + driver))

    def check_copies(self, driver: str, root: str) -> None:
        podman = ["podman", "--storage-driver", driver, "--root", root, "--runroot",
                  self.path("run/mapped-" + driver)]
        tar = b"".join([entry(b"./", typeflag=b"5"), entry(b"f", b"open"),
                        entry(b"closed", b"secret", mode=b"0000600"),
                        entry(b"of-7", b"seven", mode=b"0000600", uid=b"0000007"),
                        entry(b"d/", typeflag=b"5", mode=b"0000700"), entry(b"d/f", b"deep"),
                        entry(b"d/link", typeflag=b"2", linkname=b"f")]) + END
        with open(self.path("small.tar"), "wb") as file:
            file.write(tar)
        self.as_user(*podman, "import", "-q", self.path("small.tar"), "localhost/image")
        owners = {"keep": {"": 0, "of-7": 7, "new": self.user},
                  "shifted": {"": 0, "of-7": 7, "new": 3}}
        for name, owner, *options in (("keep", 0, "--userns=keep-id"), (
                "shifted", 103, "--uidmap=0:100:5000", "--gidmap=0:100:5000")):
            self.as_user(*podman, "create", *options, "--name", name, "localhost/image", "/x")
            line = " ".join(podman)
            self.as_user(*podman, "unshare", "sh", "-c", f"""set -e; cd "$({line} mount {name})"
                echo new > new; chmod 600 new; rm d/link; chown {owner} new
                cd /; {line} umount {name} > /dev/null""")
        with cstor.Storage.open(root) as storage:
            copies = [layer for layer in storage.layers() if layer.mapped and layer.diff_digest]
            self.assertEqual([sha256(tar)] * 2, [layer.diff_digest for layer in copies])
        before = snapshot(root)
        for name in owners:
            for words in ("container files NAME -l", "container stat NAME new d/f",
                          "container cat NAME f new closed of-7 d/f", "container cp NAME:d -",
                          "container export NAME", "image diff image container:NAME",
                          "container extract NAME DIR", "container list --format json"):
                with self.subTest(name=name, words=words):
                    status = int("diff" in words)
                    found = [(who("-q " + words.replace("NAME", name), root, status=status),
                              self.made()) for who in (self.cstor, self.by_root)]
                    if "DIR" in words:  # how many bytes could be shared, owners not set
                        found = [(b"", made) for _, made in found]
                    self.assertEqual(found[1], found[0])
                    self.assertTrue(found[0][0] + b"".join(map(os.fsencode, found[0][1])))
            rows = json.loads(self.cstor(f"-q container files {name} --format json", root))
            self.assertEqual(["/", "/closed", "/d", "/d/f", "/f", "/new", "/of-7"],
                             [row["path"] for row in rows])
            uids = {row["path"][1:]: row["uid"] for row in rows}
            self.assertEqual(owners[name], {path: uids[path] for path in owners[name]})
            self.assertEqual(b"opennew\nsecretsevendeep", self.cstor(
                f"-q container cat {name} f new closed of-7 d/f", root))
        for layer in copies:
            self.assertEqual(tar, self.cstor(f"-q layer export {layer.id}", root))
            for words in (f"layer files {layer.id} -l", f"layer inspect {layer.id}",
                          f"layer stream {layer.id}", f"layer cat {layer.id} closed"):
                self.assertEqual(self.by_root(words, root), self.cstor(words, root), words)
            error = self.cstor(f"--no-helper layer export {layer.id}", root, status=5)
            self.assertIn(b"Permission denied (run it as root or as the owner", error)
        listed = json.loads(self.cstor("-q container list --format json", root))
        self.assertEqual([[], []], [row["faults"] for row in listed])
        info = json.loads(self.cstor("-q store info --format json", root))
        self.assertEqual((2, []), (info["containers"], [
            fault for fault in info["faults"] if "bolt_state" not in fault]))
        self.assertEqual(before, snapshot(root))

    def test_owners_in_containers(self) -> None:
        for name, root in self.stores.items():
            lines = self.cstor("container files c -l", root).decode()
            with self.subTest(store=name):
                for path, uid in (("f-1-600", 1), ("d-1-700/new/file", 1), ("f-65535-644", 65535),
                                  ("d-0-755", 0), ("f-1000-0", 1000),
                                  ("d-1-700", 0 if name == "masked" else 1)):  # as seen in it
                    self.assertRegex(lines, rf"(?m)^.{{10}} +{uid} +{uid} .* /{path}$")
                self.assertNotIn("f-0-0\n", lines)

    def test_metadata_need_no_process(self) -> None:
        def no_more_processes() -> None:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

        for words in (*self.METADATA, "store info", "image stat image d-1-700/closed --follow",
                      "image files image many/*", "resolve-link LINK"):
            with self.subTest(words=words):
                text = words.replace("LINK", self.link)
                self.cstor(text, preexec_fn=no_more_processes)
        self.assertIn(b"Resource temporarily", self.cstor(
            "image export image", status=5, preexec_fn=no_more_processes))

    def test_one_helper(self) -> None:
        place = self.path("target/bin")
        os.mkdir(place)
        for name in ("newuidmap", "newgidmap", "podman"):
            with open(os.path.join(place, name), "w") as file:
                file.write(f'#!/bin/sh\necho {name} >> {self.path("target/log")}\n'
                           f'exec {shutil.which(name)} "$@"\n')
            os.chmod(file.name, 0o755)
        for words in ("image export image", "image extract image DIR"):
            self.cstor("-q " + words, env={"PATH": place + ":" + self.env["PATH"]})
            self.assertEqual(["newuidmap", "newgidmap"],
                             read_text(self.path("target/log")).split(), words)
            os.unlink(self.path("target/log"))

    def bin(self, *names: str) -> dict[str, str]:
        """Return an environment where nothing but ``names`` is on the PATH."""
        place = self.path("target/bin")
        os.makedirs(place, exist_ok=True)
        for name in names:
            os.symlink(str(shutil.which(name)), os.path.join(place, name))
        return {"PATH": place}

    def test_by_podman_alone(self) -> None:
        # podman itself looks for newuidmap: it is inside already, by its other process.
        wanted = self.by_root("image export image")
        found = self.cstor("image export image", env=self.bin("podman"))
        self.assertEqual(wanted, found)
        self.cstor("-q image extract image DIR --same-owner", env=self.bin())

    def test_without_any_way(self) -> None:
        for words, env, reasons in (
                ("image export image", self.bin(),
                 ("newuidmap nor podman found", "run it as root, or install")),
                ("--no-helper image export image", {}, ("podman unshare",)),
                ("--no-helper image extract image DIR", {}, ("podman unshare",))):
            error = self.cstor(words, status=5, env=env).decode()
            for reason in reasons:
                self.assertIn(reason, error)
            self.assertIn("Permission denied", error)
            self.assertFalse(os.path.exists(self.path("target/made")))

    def test_no_namespaces(self) -> None:
        inside = [sys.executable, "-c", textwrap.dedent(f"""
            import ctypes, os, sys
            first, second = os.pipe(), os.pipe()
            if os.fork() == 0:
                os.read(first[0], 1)
                for kind in "ug":
                    with open(f"/proc/{{os.getppid()}}/{{kind}}id_map", "w") as file:
                        file.write("0 0 4294967295")
                os.write(second[1], b"!")
                os._exit(0)
            assert ctypes.CDLL(None).unshare(0x10000000) == 0
            os.write(first[1], b"!")
            os.read(second[0], 1)
            with open("/proc/sys/user/max_user_namespaces", "w") as file:
                file.write("0")
            os.setgroups([])
            os.setgid({self.user})
            os.setuid({self.user})
            os.execv(sys.argv[1], sys.argv[1:])""")]
        for words, status in (("image list", 0), ("image export image", 5)):
            error = self.as_user(*inside, *self.script,
                                 *words.split(), user=0, group=0, status=status).decode()
        self.assertIn("newuidmap: unshare: No space left on device; podman: ", error)
        self.assertIn("user.max_user_namespaces", error)

    def test_seccomp_forbids_namespaces(self) -> None:
        wrapped = [self.python, self.path("target/wrapper.py"), *self.script]
        put(wrapped[1], FORBID_UNSHARE)
        error = self.as_user(*wrapped, "image", "export", "image", status=5).decode()
        self.assertIn("newuidmap: unshare: Operation not permitted; podman: ", error)
        self.as_user(*wrapped, "image", "toc", "image")

    def test_code_from_anywhere(self) -> None:
        place = self.path("target")
        source = read_bytes(SCRIPT)
        for name in ("vendored/other.py", "pyc/cstor.py"):
            os.makedirs(os.path.dirname(os.path.join(place, name)))
            with open(os.path.join(place, name), "wb") as file:
                file.write(source)
        py_compile.compile(place + "/pyc/cstor.py", place + "/pyc/cstor.pyc")
        os.unlink(place + "/pyc/cstor.py")
        with zipfile.ZipFile(place + "/cstor.zip", "w") as archive:
            archive.writestr("cstor.py", source)
            archive.writestr("__main__.py", "import cstor, sys\nsys.exit(cstor.main())")
        words = ["--root", self.root, "layer", "export", self.layer.id]
        library = (f"import sys; sys.path.insert(0, %r); import %s as cstor; "
                   f"sys.exit(cstor.main({words!r}))")
        for command, stdin in (
                ([self.python, "-", *words], source),
                ([self.python, place + "/cstor.zip", *words], b""),
                ([self.python, "-c", library % (place + "/cstor.zip", "cstor")], b""),
                ([self.python, "-c", library % (place + "/vendored", "other")], b""),
                ([self.python, "-c", library % (place + "/pyc", "cstor")], b""),
                ([self.python, "-O", self.path("cstor.py"), *words], b"")):
            with self.subTest(command=command[:2]):
                found = self.as_user(*command, input=stdin, stdin=None)
                self.assertEqual(self.layer.diff_digest, sha256(found))

    def test_unknown_python(self) -> None:
        code = (f"import sys; sys.path.insert(0, {self.folder!r}); import cstor; "
                "sys.executable = ''; sys.exit(cstor.main(sys.argv[1:]))")
        error = self.as_user(self.python, "-c", code, "--root", self.root, "image", "export",
                             "image", status=5)
        self.assertIn(b"sys.executable", error)

    def test_library(self) -> None:
        code = f"""if True:
            import io, os, sys
            sys.path.insert(0, {self.folder!r})
            import cstor
            fds = os.listdir("/proc/self/fd")
            for _ in range(2):
                with cstor.ProxiedStorage.open({self.root!r}) as storage:
                    image = storage.image("image")
                    assert not storage.is_proxied
                    with image.tree() as tree:
                        tree.layers[0].root
                    assert not storage.is_proxied
                    layer = image.layers()[-1]
                    assert layer.export(io.BytesIO()) == layer.diff_digest
                    assert storage.is_proxied
                    assert layer.check_files() == 348, layer.check_files()
                    with image.tree() as tree:
                        assert b"".join(tree.read(b"d-1-0/closed")) == b"d-1-0/"
                    with layer.open_file(b"f-1-0") as file:
                        assert file.read() == b"1 0" * 999
                    for _ in range(3):  # each forks processes with connections
                        made = {self.path("target/made")!r}
                        summary = image.extract(made, workers=4)
                        assert summary["files"] == 348, summary
                        assert os.system(f"chmod -R u+rwx {{made}}; rm -r {{made}}") == 0
                    try:
                        layer.open_file(b"d-1-0/nothing")
                    except cstor.NotFound:
                        pass
                    try:
                        storage.opener.helper(None).open("/etc", [b"passwd"])
                    except cstor.CstorError as error:
                        assert "outside" in str(error), error
                storage.close()
                assert len(os.listdir("/proc/self/fd")) == len(fds)
            with cstor.Storage.open({self.root!r}) as storage:
                try:
                    storage.image("image").layers()[-1].check_files()
                except cstor.NeedsUnshare:
                    sys.exit(7)"""
        self.as_user(self.python, "-c", code, status=7)

    def test_same_owner(self) -> None:
        """The whole command runs in the namespace, with its arguments and its exit status."""
        target = os.fsencode(self.path("target/\udcff made"))
        command = [os.fsencode(self.python), b"-", b"--root", os.fsencode(self.root), b"image",
                   b"extract", b"image", target, b"--same-owner", b"--format", b"json"]
        source = read_bytes(SCRIPT)
        found = json.loads(self.as_user(*command, input=source, stdin=None))
        self.assertEqual({}, found["unset"])
        first = cstor.sub_ids(self.user)[0][0]
        for name, uid in (("f-0-600", self.user), ("f-1-600", first), ("many/007", first + 6),
                          ("d-65535-0", first + 65534)):
            self.assertEqual(uid, os.lstat(os.path.join(target, name.encode())).st_uid)
        error = self.as_user(*command, input=source, stdin=None,
                             status=6)
        self.assertIn(b"Directory not empty", error)
        # More owners than there are sub-uids.
        error = self.as_user(*command[:-7], b"container", b"extract", b"none",
                             target, b"--same-owner", input=source, stdin=None, status=3)
        self.assertIn(b"container not known", error)
        self.cstor("-q image extract image DIR --same-owner", status=5, env=self.bin())

    def test_kills(self) -> None:
        """Whoever is killed at any moment, nobody stays; the others end with a reason."""
        rng = random.Random(7)
        for number in range(24 if FULL else 9):
            same = ["--same-owner"] * (number % 3 == 0)
            process = self.start(
                *self.script, "-q", "image", "extract", "image", self.path("target/made"), *same,
                env={**self.env, **(self.bin("podman") if number % 4 == 1 else {})},
                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            time.sleep(rng.random() * (0.9 if number % 4 == 1 else 0.5))
            victim = rng.choice([*self.ours(), process.pid])
            how = signal.SIGTERM if number % 2 and victim == process.pid else signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, how)
            error = process.communicate(timeout=30)[1]
            wait_for(lambda: not self.ours(), 5)
            with self.subTest(number=number, victim=victim == process.pid, how=how, error=error):
                self.assertEqual({}, self.ours())
                if process.returncode and victim != process.pid:
                    self.assertGreater(process.returncode, 0)
                    self.assertIn(b"error: ", error)
                if victim != process.pid and not same or how == signal.SIGTERM:
                    made = sum(len(files) for _, _, files in os.walk(self.path("target/made")))
                    self.assertIn(made, (0, 364) if process.returncode else (364,))
            shutil.rmtree(self.path("target/made"), ignore_errors=True)
            shutil.rmtree(self.path("target/bin"), ignore_errors=True)

    def test_killed_setting_owners(self) -> None:
        """When all directories belong to sub-uids already, and the last one is not done."""
        put(self.path("target/slow.py"), textwrap.dedent(f"""\
            import marshal, sys
            sys.path.insert(0, {self.folder!r})
            import cstor
            cstor._CODE = compile('''
            import marshal
            exec(marshal.loads(%r))
            def stop(self, unmark=OutputDirectory.unmark, calls=[]):
                calls.append(self)
                if len(calls) == 1:  # before the last directory; later it cleans up
                    os.mkdir(self.path + ".done")
                    time.sleep(60)
                unmark(self)
            OutputDirectory.unmark = stop
            ''' % marshal.dumps(cstor._CODE), "cstor.py", "exec")
            sys.exit(cstor.main())
            """))
        made = self.path("target/made")
        words = [*self.script, "-q", "image", "extract", "image", made]
        self.as_user(*words, "--same-owner")
        wanted = self.state(made)
        shutil.rmtree(made)
        for killed in ("the parent", "who is inside", "both"):
            with self.subTest(killed=killed), self.start(
                    words[0], self.path("target/slow.py"), *words[2:], "--same-owner",
                    stderr=subprocess.PIPE) as process:
                while not os.path.exists(made + ".done"):
                    self.assertIsNone(process.poll(), "it ended before it was killed")
                    time.sleep(0.01)
                os.rmdir(made + ".done")
                inside = set(self.ours()) - {process.pid}
                if killed == "both":  # none sees that the other one has ended
                    os.kill(process.pid, signal.SIGSTOP)
                for pid in inside if killed != "the parent" else ():
                    with contextlib.suppress(ProcessLookupError):  # a worker of one that ended
                        os.kill(pid, signal.SIGKILL)
                if killed != "who is inside":
                    process.kill()
                error = process.communicate(timeout=30)[1]
                wait_for(lambda: not self.ours(), 5)
                self.assertEqual({}, self.ours())
                if killed == "the parent":  # the other one was told to stop, and has removed all
                    self.assertFalse(os.path.lexists(made))
                    continue
                self.assertEqual(b"" if killed == "both" else b"cstor: error: the process in the "
                                 b"user namespace ended early, with status 137\n", error)
                for more in ([], ["--same-owner"]):
                    error = self.as_user(*words, *more, status=6)
                    self.assertEqual(f"cstor: error: {made}: Directory not empty (a killed run "
                                     "left it incomplete: --force resumes it)\n", error.decode())
                error = self.as_user(*words, "--force", status=5)  # it cannot, and spoils nothing
                self.assertRegex(error.decode(), rf"\Acstor: error: {made}/d-\S+: Permission "
                                 r"denied \(--same-owner has access to what your sub-uids own; "
                                 rf"{made} is left incomplete\)\n\Z")
                self.as_user(*words, "--same-owner", "--force")
                self.assertEqual(wanted, self.state(made))
            shutil.rmtree(made, ignore_errors=True)

    @staticmethod
    def state(top: str) -> dict[bytes, tuple[int, ...]]:
        """Return what is known of all files below a directory."""
        return {name[len(top):]: (status.st_mode, status.st_uid, status.st_gid, status.st_size,
                                  status.st_mtime_ns * (not os.path.islink(name)))
                for name in snapshot(top) for status in [os.lstat(name)]}

    def test_few_open_files(self) -> None:
        def few() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

        for words in ("image toc image --digests", "image export image", "layer export LAYER",
                      "container export c"):
            with self.subTest(words=words):
                self.assertEqual(self.cstor(words), self.cstor(words, preexec_fn=few))
        self.cstor("-q image extract image DIR", preexec_fn=few)

    def test_helper_dies(self) -> None:
        code = f"""if True:
            import io, os, signal, sys
            sys.path.insert(0, {self.folder!r})
            import cstor
            with cstor.ProxiedStorage.open({self.root!r}) as storage:
                pieces = storage.image("image").layers()[-1].pieces()
                for _ in range(4):
                    next(pieces)
                os.kill(storage.opener._helper._process.pid, signal.SIGKILL)
                try:
                    for _ in pieces:
                        pass
                except cstor.CstorError as error:
                    assert "helper in the user namespace has" in str(error), error
                    sys.exit(7)"""
        self.as_user(self.python, "-c", code, status=7)

    def test_server(self) -> None:
        """Clients of a server share one helper; when that dies, the next one gets another."""
        address = self.path("target/socket")
        server = self.start(*self.script, "-q", "serve", "--socket", address)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        wait_for(lambda: os.path.exists(address))
        words = [*self.script[:2], "layer", "export", self.layer.id, "--socket", address]
        helpers = []
        for _ in range(2):
            clients = [self.start(*words, stdout=subprocess.PIPE) for _ in range(4)]
            for client in clients:
                self.assertEqual(self.layer.diff_digest, sha256(client.communicate()[0]))
            helper, = (pid for pid, words in self.ours().items() if "-IS" in words)
            helpers.append(helper)
            os.kill(helper, signal.SIGKILL)
            # The stream of the one that meets it ends too early.
            client = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            client.communicate()
            self.assertIn(client.returncode, (4, 6))
        self.assertNotEqual(*helpers)
        server.terminate()
        self.assertEqual(0, server.wait(20))

    def test_reflinks(self) -> None:
        disk = make_disk(self.folder, "xfs", 1 << 30)
        self.addCleanup(unmount, disk)
        run("cp", "-a", self.root, disk + "/store")
        os.chmod(disk, 0o777)
        for more in ([], ["--same-owner"]):
            found = json.loads(self.cstor(" ".join([
                "image extract image", disk + "/made", "--link-mode reflink --format json", *more]),
                disk + "/store"))
            self.assertEqual(0, found["bytes-copied"])
            self.assertEqual(found["bytes"], found["bytes-reflinked"])
            shutil.rmtree(disk + "/made")

    def test_other_users(self) -> None:
        place = self.path("target/store")
        run("cp", "-a", self.root, place)
        for top in [place, *(entry.path for name in ("", "overlay") for entry in
                             os.scandir(os.path.join(place, name)) if entry.is_dir())]:
            os.chmod(top, 0o755)
        for top, _, files in os.walk(place):
            if "/diff" not in top:
                for name in files:
                    if not os.path.islink(os.path.join(top, name)):
                        os.chmod(os.path.join(top, name), 0o644)
                os.chmod(top, 0o755)
        other, poor = self.add_user("other"), self.add_user(
            "poor", "-K", "SUB_UID_COUNT=0", "-K", "SUB_GID_COUNT=0")
        for uid in (other, poor):
            error = self.cstor("image list", status=5, uid=uid).decode()
            self.assertIn("run it as root or as the owner", error)
            self.cstor("image toc image", place, uid=uid)
            self.cstor("image cat image f-0-644", place, uid=uid)
            error = self.cstor("image cat image f-1-600", place, uid=uid, status=5).decode()
            self.assertIn(f"belongs to uid {self.user}: run it as root or as that user", error)
        # An additional store whose records are root's: its file is named.
        closed = StoreBuilder(self.path("target/closed")).save()
        os.chmod(closed.path("overlay-images"), 0o700)
        error = self.cstor(f"image list --store {closed.root}", status=5).decode()
        self.assertEqual(f"cstor: error: {closed.root}/overlay-images/images.json: Permission "
                         "denied (its owner is not one of your sub-uids: run it as root)\n", error)
        # Copied without its owners' being shifted.
        os.chown(place + "/overlay-layers/layers.json", other, other)
        error = self.cstor("image cat image f-1-600", place, uid=other, status=5).decode()
        self.assertIn("not one of your sub-uids", error)
        os.chown(place + "/overlay-layers/layers.json", poor, poor)
        error = self.cstor("image cat image f-1-600", place, uid=poor, status=5).decode()
        self.assertIn("no subuid ranges", error)
        self.assertIn("usermod --add-subuids", error)

    def test_copies_with_shifted_owners(self) -> None:
        other = self.add_user("shifted")
        (first, count), = cstor.sub_ids(self.user)
        starts = [cstor.sub_ids(other, file)[0][0] for file in ("/etc/subuid", "/etc/subgid")]
        for inside in (False, True):
            place = self.path("target/store")
            run("cp", "-a", self.root, place)
            done = set()
            for top, dirs, files in os.walk(place):
                for name in [".", *dirs, *files]:
                    status = os.lstat(os.path.join(top, name))
                    if status.st_ino in done:
                        continue
                    done.add(status.st_ino)
                    uid = status.st_uid
                    number = uid - first + 1 if first <= uid < first + count else 0
                    new = [(start + number - 1 if number else other) if inside else number
                           for start in starts]
                    os.chown(os.path.join(top, name), *new, follow_symlinks=False)
            for words in ("container files c -l", "container export c", "layer export LAYER"):
                self.assertEqual(self.by_root(words), self.by_root(words, place))
                if inside:
                    self.assertEqual(self.by_root(words), self.cstor(words, place, uid=other,
                                                                     env={"HOME": "/"}))
            shutil.rmtree(place)

    def test_read_only_medium(self) -> None:
        place = self.path("target/disk")
        os.mkdir(place)
        run("mount", "--bind", self.root, place)
        self.addCleanup(run, "umount", place)
        run("mount", "-o", "remount,bind,ro", place)
        for words in ("image toc image", "container files c -l", "layer export LAYER"):
            self.assertEqual(self.by_root(words), self.cstor(words, place))

    def test_inside_namespaces(self) -> None:
        """podman unshare, and a container's namespace in which the store's owner is not known."""
        inside = ["podman", "unshare", *self.script]
        for words in ("container files c -l", "container export c", "layer export LAYER"):
            self.assertEqual(self.by_root(words), self.as_user(*inside, *self.words(words)))
        info = json.loads(self.as_user(*inside, "store", "info", "--format", "json"))
        self.assertEqual("podman unshare", info["process"]["user-namespace"])
        self.assertIn("CAP_DAC_OVERRIDE", info["process"]["capabilities"])
        error = self.as_user("unshare", "-U", "-r", *self.script, "image", "export", "image",
                             status=5).decode()
        self.assertIn("does not map the store's owner", error)

    def test_root_without_capabilities(self) -> None:
        need_tools("setpriv")
        error = self.as_user("setpriv", "--inh-caps=-all", "--bounding-set=-all", sys.executable,
                             SCRIPT, "--root", self.root, "image", "export", "image", user=0,
                             group=0, status=5).decode()
        self.assertIn("Permission denied", error)

    def test_store_info(self) -> None:
        info = json.loads(self.cstor("store info --format json"))["process"]
        first, count = cstor.sub_ids(self.user)[0]
        self.assertEqual((self.user, [], "initial", [[first, count]]),
                         (info["uid"], info["capabilities"], info["user-namespace"],
                          info["sub-uids"]))
        self.assertEqual(shutil.which("podman"), info["podman"])
        words = self.cstor("store info").decode()
        self.assertRegex(words, rf"process +uid {self.user}, sub-uids {first} to "
                         rf"{first + count - 1}, private files through newuidmap or podman")
        self.assertRegex(self.by_root("store info").decode(), "process +uid 0, reads all files")
        self.assertIn("no way to read private files",
                      self.cstor("store info", env=self.bin()).decode())


# ================================================================================================
# Measuring
# ================================================================================================

class Benchmarks(StoreTest):
    """What ``make bench`` prints, from commands that take no time."""

    def test_rows(self) -> None:
        self.assertEqual(len(ROWS), len({row.name for row in ROWS}))
        place = Place("none", self.dir + "/place", lambda: "")
        self.addCleanup(place.close)
        for row in ROWS:
            with self.subTest(row=row.name):
                self.assertTrue(row.peer or row.cpu)
                self.assertEqual(row.share != 1, bool(row.note) and "crc64" not in row.name)
                words = set(re.findall(r"\{(\w+)\}", row.ours + row.peer))
                self.assertEqual(set(), {word for word in words - set(vars(place))
                                         if not hasattr(Place, word)})
                command = re.search(r"(\{(?:cstor|plain|pyz|script)\} )([^;']*)", row.ours)
                if command:
                    chosen = shlex.split(re.sub(r"\{\w+\}", "x", command[2]))
                    self.assertTrue(cstor.make_parser(chosen).parse_args(chosen))

    def test_words_of_a_place(self) -> None:
        place = Place("none", self.dir + "/place", lambda: "ARCHIVE")
        self.addCleanup(place.close)
        self.assertEqual([sys.executable, "-m", "cstor", "--root", place.root, "image", "list"],
                         place.command("{cstor} image list"))
        self.assertEqual(["sh", "-c", "cat ARCHIVE | wc"], place.command("cat {archive} | wc"))
        self.assertEqual(["sh", "-c", "a | b"], place.command("sh -c 'a | b'"))

    def test_a_million_entries(self) -> None:
        root = self.dir + "/million"
        path = make_million(root, 3, 4)
        with cstor.Storage.open(root) as storage, storage.image("million").tree() as tree:
            self.assertEqual(16, len(list(tree.walk())))
            self.assertEqual([b"here"], list(tree.content(tree.lookup(path.encode())[1])))
            layer, = storage.layers()
            self.assertEqual(layer.diff_digest, layer.export(io.BytesIO()))

    def test_table_and_results(self) -> None:
        python = shlex.quote(sys.executable)
        rows = [Row("equal", "none", "sleep 0.05", "sleep 0.05", 3, 2),
                Row("slower", "none", "sleep 0.2", "sleep 0.05", 1, 2),
                Row("a share", "none", "sleep 0.2", "sleep 0.2", 1, 1, share=.1, note="a tenth"),
                Row("no figure", "none", "true", "true"),
                Row("memory", "none", f"{python} -Sc 'bytearray(60 << 20)'", memory=50),
                Row("processors", "none", "true", cpu=5),
                Row("into a pipe", "none", "sh -c '[ -p /dev/stdout ] && touch {out}'",
                    "sh -c '[ -p /dev/stdout ]; [ ! -e {out} ]'", 9, pipe=True),
                Row("it fails", "none", "sh -c 'echo gone >&2; exit 3'", "true", 1),
                Row("no such program", "none", "/nonexistent/program", "true", 1)]
        out = io.StringIO()
        bench = Bench(self.dir, runs=0, out=out)
        bench.run(rows)
        found = {result["name"]: result for result in json.loads(json.dumps(bench.results))}
        self.assertEqual([row.name for row in rows], list(found))
        self.assertEqual({"equal": True, "slower": False, "a share": False, "no figure": None,
                          "memory": False, "processors": True, "into a pipe": True},
                         {name: result["met"] for name, result in found.items()
                          if "skipped" not in result})
        self.assertIn("gone", found["it fails"]["skipped"])
        self.assertIn("/nonexistent/program", found["no such program"]["skipped"])
        for name, low, high in (("slower", 1.5, 4.5), ("a share", 5, 20)):
            self.assertTrue(low < found[name]["ratio"]["median"] < high, found[name])
        ours = found["memory"]["ours"]
        self.assertTrue(60 <= ours["memory"] < 120 and ours["min"] <= ours["median"] <= ours["max"])
        lines = out.getvalue().splitlines()[1:]
        self.assertEqual(Bench.HEAD, lines[0])
        self.assertRegex(lines[1], r"\Aequal +0\.\d{3} +\d+ +0\.\d{3} +\d+ +[0-2]\.\d\d +3 +"
                         r"0\.\d\d +\d+/\d+ met\Z")
        self.assertIn("    a tenth", lines)
        self.assertTrue(any(re.search(r"MISSED \(at most 50 MiB\)\Z", line) for line in lines))
        self.assertFalse(os.path.exists(self.dir + "/none"))

    def test_rows_are_chosen_by_name(self) -> None:
        done = subprocess.run([sys.executable, __file__, "--bench", "--list", "--row", "million",
                               "--row", "crc64"], stdout=subprocess.PIPE, check=True)
        names = done.stdout.decode().splitlines()
        self.assertEqual([row.name for row in ROWS if "million" in row.name or "crc64" in row.name],
                         names)
        self.assertTrue(names)


# ================================================================================================
# Running
# ================================================================================================

class Result(unittest.TextTestResult):
    """Counts what passed, and each test of a class that is skipped."""

    classes: dict[str, list[unittest.TestCase]] = {}  # the chosen tests of each

    def __init__(self, stream: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(stream, *args, **kwargs)
        self.passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def addSkip(self, test: Any, reason: str) -> None:
        whole = re.fullmatch(r"setUpClass \((?:.*\.)?(\w+)\)", str(test))
        for each in self.classes[whole[1]] if whole else [getattr(test, "test_case", test)]:
            if (each, reason) not in self.skipped:  # once for all subtests
                super().addSkip(each, reason)


def run_tests(names: Sequence[str]) -> int:
    """Run the tests whose names contain one of ``names``, or all; return the exit status."""
    suite = unittest.TestSuite()
    for group in unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]):
        assert isinstance(group, unittest.TestSuite)
        chosen = unittest.TestSuite()
        for test in group:
            assert isinstance(test, unittest.TestCase)
            if not names or any(name in test.id() for name in names):
                chosen.addTest(test)
                Result.classes.setdefault(type(test).__name__, []).append(test)
        suite.addTest(chosen)
    result = unittest.TextTestRunner(resultclass=Result, verbosity=1, buffer=True).run(suite)
    assert isinstance(result, Result)
    for test, reason in result.skipped:
        print(f"skipped {test}: {reason}")
    failed = len(result.failures) + len(result.errors)
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
    return 0 if result.wasSuccessful() and result.passed else 1


def main() -> int:
    if sys.argv[1:2] == ["--make-store"] and len(sys.argv) == 3:
        try:
            make_sample(os.path.abspath(sys.argv[2]))
        except OSError as error:
            sys.exit(f"no sample store was made: {error.filename}: {error.strerror} "
                     "(make demo DEMO=DIR takes a directory of yours)")
        return 0
    if sys.argv[1:] == ["--build-peer"]:
        try:
            print(build_peer())
        except unittest.SkipTest as reason:
            print(f"not built: {reason}")
        return 0
    if sys.argv[1:2] == ["--bench"]:
        return bench(sys.argv[2:])
    return run_tests(sys.argv[1:])


# ================================================================================================
# Benchmarks
#
# Two commands run in turn, and the median of the ratios of each pair counts: so a machine that is
# busy for a while slows both.  A row that is not chosen costs nothing: places are made when a row
# needs them.
# ================================================================================================

class Row(NamedTuple):
    """Two commands to compare; words in braces are attributes of the Place that ``where`` names.

    ``wanted`` is the ratio of the times, 0 for none.  Of the peer's time ``share`` counts, as
    ``note`` says.  ``pipe``: both write into a pipe.  ``cpu`` (seconds) and ``memory`` (MiB) limit
    our command.
    """

    name: str
    where: str
    ours: str
    peer: str = ""
    wanted: float = 0
    runs: int = 5
    pipe: bool = False
    share: float = 1.0
    note: str = ""
    cpu: float = 0
    memory: int = 0


# cstor-rs is in no registry: it was measured once beside a tool that everybody has.
RS_PIPE = "cstor-rs: 0.39 of containers-storage diff into a pipe"
RS_FILE = "cstor-rs: 0.40 of containers-storage diff into a file"
RS_TOC = "cstor-rs image toc: 0.10 of podman save | tar -tv"
COMPOSEFS = "composefs's own service: 0.38 of containers-storage diff into a pipe"
MOUNT = "sh -c 'm=$({podman} image mount three) && %s && {podman} image unmount three'"
DIFF = "containers-storage --graph {root} --run {run} diff -u {layer}"
SAVE_TAR = "{podman} save -q localhost/bench | tar -xO --wildcards '*.tar' | tar -x -C {out}"
LIST_TAR = "{podman} save -q localhost/three | tar -tv"
ROWS = (
    Row("image list as a script / podman images", "one", "{script} image list", "{podman} images",
        0, 15),
    Row("image list as cstor.pyz / podman images", "one", "{pyz} image list", "{podman} images",
        1.5, 15),
    Row("image list, installed / podman images", "one", "{cstor} image list", "{podman} images",
        1.0, 15),

    Row("image cat, base layer / podman image mount, cat", "three", "{cstor} image cat three {low}",
        MOUNT % "cat $m{low}", 1.8, 9),
    Row("image cat, top layer / podman image mount, cat", "three", "{cstor} image cat three {high}",
        MOUNT % "cat $m{high}", 0.8, 9),
    Row("image stat, base layer / podman image mount, stat", "three",
        "{cstor} image stat three {low}", MOUNT % "stat $m{low}", 1.8, 9),
    Row("image cp, base layer / podman image mount, cp", "three",
        "{cstor} image cp three:{low} {out}", MOUNT % "cp -a $m{low} {out}", 1.8, 9),
    Row("image cat, base layer / podman run --rm cat", "three", "{cstor} image cat three {low}",
        "{run_in_three} cat {low}", 1.0, 9),
    Row("image cat of a million entries", "million", "{cstor} image cat million {low}", cpu=1.5,
        memory=40),
    Row("image stat of a million entries", "million", "{cstor} image stat million {low}", cpu=1.5,
        memory=40),
    Row("image cp from a million entries", "million", "{cstor} image cp million:{low} {out}",
        cpu=1.5, memory=40),

    Row("image files of a directory / podman image mount, find", "three",
        "{cstor} image files three {low_dir}/*", MOUNT % "find $m{low_dir}"),
    Row("image cp of a directory / podman image mount, cp", "three",
        "{cstor} image cp three:{low_dir} {out}", MOUNT % "cp -a $m{low_dir} {out}"),
    Row("image extract --path / podman image mount, cp", "three",
        "{cstor} image extract three {out} --path {low_dir}", MOUNT % "cp -a $m{low_dir} {out}"),

    Row("image toc / cstor-rs", "three", "{cstor} image toc three", LIST_TAR, 1.3, share=.1,
        note=RS_TOC),
    Row("image files -l / cstor-rs image toc", "three", "{cstor} image files -l three", LIST_TAR,
        1.3, share=.1, note=RS_TOC),
    Row("image diff / cstor-rs image toc", "three", "sh -c '{cstor} image diff base three; exit 0'",
        LIST_TAR, 1.3, share=.1, note=RS_TOC),
    Row("image blame / cstor-rs image toc", "three", "{cstor} image blame three", LIST_TAR, 1.3,
        share=.1, note=RS_TOC),
    Row("image toc / podman save | tar -tv", "three", "{cstor} image toc three", LIST_TAR, 1.0),

    Row("layer export into a pipe / cstor-rs", "one", "{cstor} layer export {layer}", DIFF, 1.0,
        pipe=True, share=.39, note=RS_PIPE, memory=64),
    Row("layer export into a file / cstor-rs", "one", "{cstor} layer export {layer} -o {out}",
        DIFF + " -o {out}", 1.1, share=.40, note=RS_FILE, memory=64),
    Row("layer export / containers-storage diff -u", "one", "{cstor} layer export {layer}", DIFF,
        0.45, memory=64),
    Row("layer export --no-verify | / tar -c |", "one", "{cstor} layer export --no-verify {layer}",
        "tar -c -C {diff} .", 1.5, pipe=True, memory=64),
    Row("layer export from a server / layer export", "one",
        "{plain} layer export {layer} --socket {socket}", "{cstor} layer export {layer}", 3.0,
        memory=64),
    Row("varlink client of serve / composefs's own service", "one", "{drain}", DIFF, 1.0, pipe=True,
        share=.38, note=COMPOSEFS),

    Row("layer extract from a server, xfs / podman save | tar x", "xfs",
        "{plain} layer extract {layer} {out} --socket {socket}",
        "sh -c 'mkdir {out}; " + SAVE_TAR.replace("'", '"') + "'", 0.7),
    Row("layer extract from a server, xfs / skopeo, umoci", "xfs",
        "{plain} layer extract {layer} {out} --socket {socket}", "{unpack}", 1.0, 3),
    Row("image extract on xfs / cp -a --reflink=always", "xfs", "{cstor} image extract bench {out}",
        "cp -a --reflink=always {diff} {out}", 1.0),
    Row("image extract on btrfs / cp -a --reflink=always", "btrfs",
        "{cstor} image extract bench {out}", "cp -a --reflink=always {diff} {out}", 1.0),
    Row("image extract on ext4 / cp -a --reflink=auto", "ext4",
        "{cstor} image extract bench {out}", "cp -a --reflink=auto {diff} {out}", 1.0),
    Row("image extract on xfs / skopeo copy, umoci unpack", "xfs",
        "{cstor} image extract bench {out}", "{unpack}", 0.15, 3),

    Row("image copy-to-oci / skopeo copy (which compresses)", "one",
        "{cstor} image copy-to-oci bench {out}:b", "skopeo copy -q {image} oci:{out}:b", 0.3),
    Row("image copy-to-oci / skopeo copy, uncompressed", "one",
        "{cstor} image copy-to-oci bench {out}:b",
        "skopeo copy --dest-oci-accept-uncompressed-layers -q {image} oci:{out}:b", 1.0),
    Row("image copy-to-oci --compress gzip / skopeo copy", "one",
        "{cstor} image copy-to-oci bench {out}:b --compress=gzip",
        "skopeo copy -q {image} oci:{out}:b", 1.5, 3),
    Row("image copy-to-oci --compress gzip / pigz -6", "one",
        "{cstor} image copy-to-oci bench {out}:b --compress=gzip",
        "sh -c 'pigz -6 -n -c {archive} > {out}'", 1.5, 3),
    Row("crc64() of 256 MiB / of 1 MiB by a bytewise table", "none", "{crc64} 4", "{crc64} 0",
        8.5, 3, note="8.5: 30 times as fast; 1 s: 300 MB/s beside a start", cpu=1.0),
)


def make_bench_tar(path: str, count: int = 67_000, top: str = "usr/lib/python3/dist-packages",
                   large: int = 0) -> None:
    """Write a tar of files in directories as of a system with Python packages; 67,000: 640 MB.

    ``large`` is the size of one more file.
    """
    rng = random.Random(42)
    blob = rng.getrandbits(8 << 20).to_bytes(1 << 20, "big")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        busybox = shutil.which("busybox")
        if busybox:  # something to run in it
            info = tar.gettarinfo(busybox, "busybox")
            tar.addfile(info, io.BytesIO(read_bytes(busybox)))
        made = 0
        while made < count:
            directory = f"{top}/p{made % 37:02d}/module{made:05d}"
            info = tarfile.TarInfo(directory + "/")
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
            for i in range(rng.randint(5, 40)):
                kind = rng.random()
                low, high = (0, 2000) if kind < .5 else (2000, 16000) if kind < .9 \
                    else (16000, 60000) if kind < .9995 else (1 << 20, 4 << 20)
                size = rng.randint(low, high)
                info = tarfile.TarInfo(f"{directory}/file{i:03d}.py")
                info.size, info.mtime = size, 1700000000 + i
                start = rng.randint(0, 1 << 19)
                tar.addfile(info, io.BytesIO((blob[start:] + blob * (size >> 20) + blob)[:size]
                                             if size > 1 << 19 else blob[start:start + size]))
                made += 1
        if large:
            info = tarfile.TarInfo(f"{top}/large")
            info.size = large
            tar.addfile(info, io.BytesIO(blob * (large >> 20)))


def make_million(root: str, directories: int = 1000, files: int = 999) -> str:
    """Make a store with an image of a million entries; return the path of a file in the middle.

    All files but one are empty, and only that one is on disk.
    """
    digest, where = hashlib.sha256(), f"d{directories // 2:04d}/f{files // 2:04d}"
    layer = hashlib.sha256(root.encode()).hexdigest()
    size = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal size
        rest = b""
        for number in range(directories):
            for name in (f"d{number:04d}/", *(f"d{number:04d}/f{i:04d}" for i in range(files))):
                data = b"here" * (name == where)
                head = entry(name.encode(), data, b"5" if name.endswith("/") else b"0")
                tar = rest + head[:BLOCK]
                digest.update(tar + data)
                size += len(tar + data)
                yield segment(tar)
                yield content_row(name.encode(), data)
                rest = head[BLOCK + len(data):]
        digest.update(rest + END)
        size += len(rest + END)
        yield segment(rest + END)

    store = StoreBuilder(root)
    store.layer(None, id=layer)
    store.rows(layer, ({**row, "position": number} for number, row in enumerate(rows())))
    store.layers[-1].update({"diff-digest": "sha256:" + digest.hexdigest(), "diff-size": size})
    for number in range(directories):
        os.mkdir(store.path("overlay", layer, "diff", f"d{number:04d}"))
    store.write(f"overlay/{layer}/diff/{where}", "here")
    store.image(layer, "localhost/million:latest")
    store.save()
    return where


class Place:
    """A store to measure on; its attributes are the words that rows put in braces.

    ``kind``: "one" layer of 67,000 files, which also "xfs", "btrfs" and "ext4" hold on a disk of
    their own; "three" layers of 57,600 entries on XFS; a "million" entries without podman; or none.
    """

    def __init__(self, kind: str, folder: str, archive: Callable[[], str]) -> None:
        self.kind, self._archive = kind, archive
        self._stop: list[Callable[[], object]] = []
        self.dir = folder
        disk = {"three": "xfs"}.get(kind, kind)
        if disk in ("xfs", "btrfs", "ext4"):
            os.mkdir(folder)
            self.dir = make_disk(folder, disk, 8 << 30)
            self._stop.append(self._release)
        store = Store(self.dir)
        self.root, self.run, self.podman = store.root, store.runroot, "podman " + shlex.join(
            store.globals)
        self.out, self.image = os.path.join(self.dir, "out"), store.place("bench")
        self.plain, self.script = f"{sys.executable} -m cstor", f"{sys.executable} {SCRIPT}"
        self.script += f" --root {self.root}"
        self.cstor = f"{self.plain} --root {self.root}"
        self.low = ""
        self._fill(store)

    def _fill(self, store: Store) -> None:
        if self.kind == "million":
            self.low = "/" + make_million(self.root)
        elif self.kind == "three":
            self._stop.append(store.close)
            self._build(store)
        elif self.kind != "none":
            self._stop.append(store.close)
            store.podman("import", "-q", self._archive(), "localhost/bench")

    def _build(self, store: Store) -> None:
        context = os.path.join(self.dir, "context")
        os.mkdir(context)
        for name, count, large, below in (("base", 48_000, 128 << 20, "scratch"),
                                          ("middle", 6_000, 64 << 20, "localhost/base"),
                                          ("three", 1_200, 16 << 20, "localhost/middle")):
            make_bench_tar(f"{context}/{name}.tar", count, f"usr/lib/{name}", large)
            put(context + "/Dockerfile", f"FROM {below}\nADD {name}.tar /\n")
            store.buildah("bud", "--pull=never", "-q", "-t", "localhost/" + name, context)
            os.unlink(f"{context}/{name}.tar")
        with cstor.Storage.open(self.root) as storage:
            self.low, self.high = (next(
                "/" + member.name.decode() for count, member in enumerate(layer.members())
                if count > at and member.type == "reg" and 0 < member.size < 4000)
                for at, layer in zip((24_000, 600), storage.image("three").layers()[::2]))

    high = ""

    @property
    def low_dir(self) -> str:
        """A directory of the base layer."""
        return os.path.dirname(self.low)

    @property
    def archive(self) -> str:
        """The tar of the store's one layer."""
        return self._archive()

    @property
    def layer(self) -> str:
        """The ID of the base layer."""
        with cstor.Storage.open(self.root) as storage:
            return next(layer.id for layer in storage.layers() if not layer.parent)

    @property
    def diff(self) -> str:
        """The base layer's files."""
        return os.path.join(self.root, "overlay", self.layer, "diff")

    @functools.cached_property
    def pyz(self) -> str:
        """The command line of cstor.pyz."""
        target = os.path.join(self.dir, "cstor.pyz")
        subprocess.run(["make", "-s", "-C", HERE, "dist", f"PYZ={target}",
                        f"PYTHON={sys.executable}"], check=True)
        return f"{sys.executable} {target} --root {self.root}"

    @functools.cached_property
    def socket(self) -> str:
        """The path of a server's socket."""
        path = os.path.join(self.dir, "socket")
        server = subprocess.Popen([*shlex.split(self.cstor), "serve", "-q", "--socket", path])
        self._stop += [server.wait, server.terminate]  # the last first
        wait_for(lambda: os.path.exists(path))
        return path

    @property
    def drain(self) -> str:
        """A client that takes a layer by varlink, and leaves named files alone."""
        code = ("import os, sys, cstor; fds = []; client = cstor.VarlinkClient(sys.argv[1])\n"
                "client._get_layer(sys.argv[2], sys.argv[3], 0, fds)\n"
                "while os.read(fds[0], 1 << 20): pass")
        return shlex.join([sys.executable, "-c", code, self.socket, self.root, self.layer])

    @property
    def unpack(self) -> str:
        """What takes an image out of podman's store by way of an OCI layout."""
        return (f"sh -c 'skopeo copy -q {self.image} oci:{self.out}:b && "
                f"umoci unpack --image {self.out}:b {self.out}2'")

    @property
    def run_in_three(self) -> str:
        """The command line of a container; with what it needs to start in many a sandbox."""
        options = ("run --rm --privileged --network=host --pid=host --ulimit=nofile=1024:1024 "
                   "--ulimit=nproc=1000:1000 three /busybox")
        for runtime in ("crun", "runc"):
            command = self.podman.replace("podman", f"podman --runtime {runtime}", 1)
            if not subprocess.call([*shlex.split(f"{command} {options}"), "true"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
                return f"{command} {options}"
        raise unittest.SkipTest("podman cannot start a container here")

    @property
    def crc64(self) -> str:
        """Take the CRC-64 of so many times 64 MiB, or for 0 of one MiB by a loop in Python."""
        code = ("import sys, cstor; times = int(sys.argv[1]); crc = 0\n"
                "data = bytes(range(256)) * (1 << 18 if times else 4096)\n"
                "for _ in range(times): crc = cstor.crc64(data, crc)\n"
                "for byte in b'' if times else data:\n"
                "    crc = cstor._TABLE[(crc ^ byte) & 255] ^ crc >> 8")
        return shlex.join([sys.executable, "-c", code])

    def command(self, text: str) -> list[str]:
        """Return a row's command with this place's words."""
        words = {name: getattr(self, name) for name in re.findall(r"\{(\w+)\}", text)}
        text = text.format_map(words)
        return ["sh", "-c", text] if re.match(r"[^']* \| ", text) else shlex.split(text)

    def close(self) -> None:
        """Stop what runs, and unmount what is mounted."""
        while self._stop:
            self._stop.pop()()

    def _release(self) -> None:
        """Unmount the disk once podman, which cleans up behind a container's end, is gone."""

        def released() -> bool:
            for line in read_bytes("/proc/self/mountinfo").decode().splitlines()[::-1]:
                point = line.split()[4]
                if point.startswith(self.dir + "/"):
                    subprocess.run(["umount", "-l", point], check=False)
            return not subprocess.run(["umount", self.dir], stderr=subprocess.DEVNULL,
                                      check=False).returncode

        wait_for(released, 60)
        os.unlink(self.dir + ".img")
        os.rmdir(self.dir)


# A process of its own starts each command: the peak memory of a child includes what its parent has.
MEASURE = """import os, sys, time
pipe, *command = sys.argv[1:]
null = os.open("/dev/null", os.O_RDWR)
out, reader = null, 0
start = time.monotonic()
if pipe == "pipe":
    source, out = os.pipe()
    reader = os.posix_spawnp("cat", ["cat"], os.environ, file_actions=[
        (os.POSIX_SPAWN_DUP2, source, 0), (os.POSIX_SPAWN_DUP2, null, 1)])
child = os.posix_spawnp(command[0], command, os.environ, file_actions=[
    (os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, out, 1)])
if reader:
    os.close(out)
status, usage = os.wait4(child, 0)[1:]
if reader:
    os.close(source)
    os.waitpid(reader, 0)
print(time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, status)
"""


class Sample(NamedTuple):
    """One run: seconds, seconds of all processors, and MiB of the largest process."""

    wall: float
    cpu: float
    memory: float


def measure(command: Sequence[str], pipe: bool = False, made: str = "") -> Sample:
    """Run a command into /dev/null, or through a pipe; what it makes is removed before."""
    if made and glob.glob(made + "*"):
        subprocess.run(["rm", "-rf", *glob.glob(made + "*")], check=True)
        os.sync()
    done = subprocess.run([sys.executable, "-ISc", MEASURE, "pipe" if pipe else "", *command],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    wall, cpu, memory, status = map(float, done.stdout.split() or (0, 0, 0, 1))
    if status:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise unittest.SkipTest(f"{shlex.join(command)[:200]} failed: {' '.join(last)}")
    return Sample(wall, cpu, memory / 1024)


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Return what is said of the runs of one command."""
    walls = [sample.wall for sample in samples]
    return {"median": statistics.median(walls), "min": min(walls), "max": max(walls),
            "cpu": statistics.median(sample.cpu for sample in samples),
            "memory": max(sample.memory for sample in samples)}


class Bench:
    """Measures rows, in ``folder``, and prints a line for each."""

    HEAD = (f"{'':56} {'cstor':>8}   ±% {'peer':>8}   ±%  ratio wanted   CPU s   peak MiB")

    def __init__(self, folder: str, *, runs: int = 0, out: Any = None) -> None:
        self._folder, self._runs, self._out = folder, runs, out or sys.stdout
        self._places: dict[str, Place] = {}
        self.results: list[dict[str, Any]] = []

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    @functools.cached_property
    def archive(self) -> str:
        """The tar of the layer of 67,000 files."""
        path = os.path.join(self._folder, "layer.tar")
        make_bench_tar(path)
        return path

    def _place(self, kind: str) -> Place:
        if kind not in self._places:
            self._places[kind] = Place(kind, os.path.join(self._folder, kind),
                                       lambda: self.archive)
        return self._places[kind]

    def run(self, rows: Sequence[Row]) -> None:
        """Measure rows; those of one place follow each other, and it is removed after them."""
        self._say(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs, Linux "
                  f"{os.uname().release}; medians of runs in turn\n{self.HEAD}")
        try:
            for number, row in enumerate(rows):
                try:
                    self._add(row, self._row(row, self._place(row.where)))
                except (unittest.SkipTest, AssertionError, subprocess.CalledProcessError,
                        FileNotFoundError) as error:
                    self.results.append({"name": row.name, "skipped": str(error)})
                    self._say(f"{row.name:56} skipped: {error}")
                if row.where not in (later.where for later in rows[number + 1:]):
                    self._end(row.where)
        finally:
            for kind in list(self._places):
                self._end(kind)

    def _end(self, kind: str) -> None:
        place = self._places.pop(kind, None)
        if place:
            place.close()
        shutil.rmtree(os.path.join(self._folder, kind), ignore_errors=True)

    def _row(self, row: Row, place: Place) -> dict[str, Any]:
        """Return the result of a row."""
        commands = [place.command(text) for text in filter(None, (row.ours, row.peer))]
        for command in commands:
            measure(command, row.pipe, place.out)
        pairs = [[measure(command, row.pipe, place.out) for command in commands]
                 for _ in range(self._runs or row.runs)]
        result: dict[str, Any] = {"name": row.name, "ours": summary([pair[0] for pair in pairs]),
                                  "commands": [shlex.join(command) for command in commands]}
        met = [result["ours"][key] <= limit for key, limit in (
            ("cpu", row.cpu), ("memory", row.memory)) if limit]
        if row.peer:
            ratios = [pair[0].wall / pair[1].wall / row.share for pair in pairs]
            result["peer"] = summary([pair[1] for pair in pairs])
            result["ratio"] = {"median": statistics.median(ratios), "min": min(ratios),
                               "max": max(ratios)}
            met += [result["ratio"]["median"] <= row.wanted] * bool(row.wanted)
        return {**result, "wanted": {"ratio": row.wanted or None, "cpu": row.cpu or None,
                                     "memory": row.memory or None}, "share": row.share,
                "note": row.note, "met": all(met) if met else None}

    def _add(self, row: Row, result: dict[str, Any]) -> None:
        """Keep and print a result."""
        self.results.append(result)
        cells = [f"{row.name:56}"]
        for found in (result["ours"], result.get("peer")):
            cells.append(f"{found['median']:8.3f} {spread(found):4.0f}" if found else " " * 13)
        cells.append(f"{result['ratio']['median']:6.2f} {row.wanted or '-':>6}" if row.peer
                     else " " * 13)
        cells.append(f"{result['ours']['cpu']:7.2f}")
        cells.append("/".join(f"{found['memory']:.0f}" for found in (
            result["ours"], result.get("peer")) if found).rjust(10))
        limits = [f"CPU {row.cpu} s"] * bool(row.cpu) + [f"{row.memory} MiB"] * bool(row.memory)
        cells.append({True: "met", False: "MISSED", None: ""}[result["met"]]
                     + f" (at most {', '.join(limits)})" * bool(limits))
        self._say(" ".join(cells).rstrip() + f"\n    {row.note}" * bool(row.note))


def spread(found: Mapping[str, float]) -> float:
    """Return half of the range of the runs, in percent of the median."""
    return 50 * (found["max"] - found["min"]) / found["median"]


def bench(words: Sequence[str]) -> int:
    """Measure the rows that are chosen, and print them as a table or JSON."""
    parser = argparse.ArgumentParser(prog="test_cstor.py --bench", description="Measure cstor.py "
                                     "beside its peers; root, podman and its sister tools needed.")
    parser.add_argument("directory", nargs="?", default="/var/tmp", help="where stores are made")
    parser.add_argument("--row", action="append", default=[], metavar="TEXT",
                        help="measure only rows with this in their name; may be repeated")
    parser.add_argument("--runs", type=int, default=0, help="how often each command runs")
    parser.add_argument("--list", action="store_true", help="only print the names of the rows")
    parser.add_argument("--json", action="store_true", help="print JSON, and the table to stderr")
    args = parser.parse_args(words)
    rows = [row for row in ROWS if not args.row or any(text in row.name for text in args.row)]
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    missing = [tool for tool in ("podman", "buildah", "containers-storage", "tar", "skopeo",
                                 "umoci", "pigz") if not shutil.which(tool)]
    if missing or os.geteuid():
        print(f"skipped: {missing[0]} is not installed (make lab installs it)" if missing
              else "skipped: the peers need root")
        return 0
    with tempfile.TemporaryDirectory(prefix="cstor-bench-", dir=args.directory) as directory:
        os.environ.update(PYTHONPATH=HERE, PYTHONPYCACHEPREFIX=directory + "/pycache")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        measured = Bench(directory, runs=args.runs, out=sys.stderr if args.json else sys.stdout)
        measured.run(rows)
    if args.json:
        print(json.dumps({"python": sys.version.split()[0], "cpus": os.cpu_count(),
                          "kernel": os.uname().release, "rows": measured.results}, indent=2))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
