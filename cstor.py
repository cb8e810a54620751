#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Read podman's, buildah's and CRI-O's images without podman: no root, no mount, no writes.

cstor.py reads containers/storage (drivers overlay and vfs) straight from disk and rebuilds every
layer's tar bit for bit from its tar-split metadata.  It is one file for Python 3.9 and later, uses
the standard library alone, and can be run, piped to ``python3 -`` over ssh, zipped or vendored.

As a library::

    import cstor
    with cstor.Storage.discover() as storage:        # or Storage.open("/mnt/containers/storage")
        for image in storage.images():
            print(image.names, image.size)
        layer = storage.image("docker.io/library/alpine").layers()[-1]
        with open("layer.tar", "wb") as out:
            layer.export(out)                        # sha256 checked against diff-digest

Its classes, and what one does with them (``pydoc cstor.Storage`` shows all of one)::

    Storage     images image layers layer containers container resolve_link check disk_usage
    Image       manifest config history layers size single instances faults  tree toc blame
                extract export copy_to_oci verify
    Layer       diff_digest diff_size faults  members pieces open_file tree toc extract export
                verify
    Container   state details faults  tree extract export
    Tree        walk glob lookup read content diff export verify
    RpcServer   serve; RpcClient, ProxyV2Client and VarlinkClient: images layers layer; a Registry
                is given out by a RegistryServer: serve

As a command: ``cstor.py image extract alpine /srv/alpine``; ``cstor.py help`` lists all commands.

It never writes to a store: it creates no lock file, no directory and no database side file there,
and changes no owner, mode or time (but for the atime that the kernel itself notes of a reading,
where O_NOATIME is not allowed).  It holds shared locks only while it reads the JSON records.

Sections; classes and module-level code use what stands above, a method may call down:

     1 errors                one tree; a hint says what to do next
     2 text and constants    what is on disk, by origin; names, JSON, times
     3 file descriptors      opening beneath a root, full reads, copies
     4 checksums             CRC-64/ISO of tar-split, digests
     5 compression           gzip, zstd, bzip2, xz: read and written
     6 configuration         storage.conf, drop-ins, environment
     7 records               layers, images and containers; big data
     8 storage               locks, roots, chains, podman's db.sql
     9 references            names, digests, ID prefixes, platforms
    10 layers                where the bytes of one file are
    11 tar headers           types, sizes, owners, times, links, xattrs
    12 tar-split             entries, members, pieces; writing and verifying the tar
    13 layer trees           what one layer has, as it is unpacked
    14 tree                  the merged view: walk, look up, read, patterns; TOC
    15 comparing             two trees; which layer brought or hid a path
    16 tar-diff              two tars, header by header, field by field
    17 extract               files out into a directory, by reflink
    18 archives              OCI layout, docker-archive, oci-archive, a tree as a tar
    19 streams               splitfdstream and splitdirfdstream: contents as open files
    20 transport             JSON-RPC and varlink messages with file descriptors
    21 server                the layer service
    22 clients               of our server, of composefs, of proxies
    23 rootless              the helper in a user namespace, for private contents
    24 check                 what is damaged: findings with stable codes
    25 salvage               what is left where records are damaged or lost
    26 disk usage            what images cost, and what removing them frees
    27 registry              images over HTTP, to every client of the OCI ecosystem
    28 formats               tables, JSON, sizes and ages, progress, outputs
    29 queries               filters, order, Go templates; what podman says of objects
    30 commands              one function per command
    31 command line          the tables of commands and options, main()
"""

# Copyright (c) 2026 the cstor.py authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

from __future__ import annotations

import errno
import gc
import io
import os
import stat
import sys
import time
from _thread import allocate_lock
from _weakref import ref
from collections import ChainMap, Counter, defaultdict
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import cached_property, lru_cache
from itertools import accumulate, chain, groupby, islice, product, takewhile, zip_longest


# This line comes before all others that an older Python cannot parse, since its SyntaxError quotes
# the first one.  Only Python 3.9 and later take any expression as a decorator.
@(lambda kind: kind)  # cstor.py needs Python 3.9 or later
class _Module:
    """A standard module that is imported, or whose lack is reported, when it is first used."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        globals()[self.name] = module = __import__(self.name)
        return getattr(module, attribute)


# Start-up budget: 20 ms.  What only some commands need is imported, and patterns are compiled (re
# keeps them), where it is used; _signal has no enums.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import binascii
    import builtins
    import bz2
    import ctypes
    import difflib
    import fcntl
    import gzip
    import hashlib
    import heapq
    import hmac
    import json
    import lzma
    import marshal
    import mmap
    import pwd
    import queue
    import re
    import select
    import shutil
    import signal
    import socket
    import ssl
    import struct
    import subprocess
    import tempfile
    import threading
    import traceback
    import zlib
    from typing import (Any, BinaryIO, Callable, Generator, Iterable, Iterator, Mapping, NoReturn,
                        Sequence, TypeVar)

    T = TypeVar("T")
    R = TypeVar("R", bound="Record")
    S = TypeVar("S", bound="Closing")
    X = TypeVar("X", bound="Transaction")
    D = TypeVar("D", bound="Directory")
    Ranges = list[tuple[int, int, int]]  # of IDs; see map_id()
    Entry = tuple[Any, "bytes | None", int, bytes]  # see TarSplit
    Item = tuple[bytes, "Member | None", Iterable["bytes | Extent"]]  # see LayerReader
    Command = tuple[Callable[[Any, Any], int | None], str]  # see COMMANDS
    PlainRow = tuple[bytes, str, int, bytes, tuple[int, Any], int, bytes]  # see PlainHeaders
    Manifest = tuple[str, bytes, str]  # digest, bytes and media type
    ImageRow = tuple["Image", str, str]  # see image_rows()
    Progress = Callable[[int, int], None]  # bytes and files done so far; 0, 0 begins a part
    from http.server import BaseHTTPRequestHandler as HttpHandler  # see RegistryServer
else:
    import _signal as signal

    HttpHandler = object

if __name__ == "__main__":
    gc.disable()  # main() enables it: nothing that is made until then is ever garbage

for _name in (
        "argparse", "builtins", "bz2", "ctypes", "difflib", "gzip", "hashlib", "heapq", "hmac",
        "lzma", "marshal", "mmap", "pwd", "queue", "select", "shutil", "socket", "ssl", "struct",
        "subprocess", "tempfile", "threading", "traceback"):
    globals()[_name] = _Module(_name)
for _name in ("binascii", "fcntl", "json", "re", "zlib"):
    try:
        globals()[_name] = __import__(_name)
    except ImportError:  # Debian's python3-minimal lacks json
        globals()[_name] = _Module(_name)

__version__ = "0.1.0"

__all__ = [
    "Storage", "Image", "Layer", "Container", "Tree", "Node", "Member", "Extent", "LayerTree",
    "Finding", "DiskUsage", "Config", "ProxiedStorage", "FetchedImage", "PassedFile",
    "LayerStream", "RpcServer", "RpcClient", "ProxyV2Client", "VarlinkClient", "Registry",
    "RegistryServer", "SplitfdstreamReader", "SplitfdstreamWriter", "SplitdirfdstreamReader",
    "SplitdirfdstreamWriter", "CstorError", "NotFound", "ImageUnknown", "LayerUnknown",
    "ContainerUnknown", "Ambiguous", "FormatError", "IntegrityError", "Unsupported",
    "NeedsUnshare", "ProtocolError", "load_config", "extract_tree", "copy_to_oci",
    "write_docker_archive", "write_oci_archive", "diff_trees", "diff_tars", "write_stream",
    "read_stream", "fetch_layer", "extract_streams", "crc64", "spell", "unspell", "main",
]


class _Name(str):
    """A public name, which sorts as in __all__: pydoc shows Storage first, its errors last."""

    def __lt__(self, other: str) -> bool:
        order = [*__all__, self, other]
        return order.index(self) < order.index(other)


def __dir__() -> list[str]:
    return list(map(_Name, (*__all__, "__version__")))


# ================================================================================================
# 1. Errors
#
# OSError passes through with the name of its file; all other errors are CstorErrors.  ERRORS tells
# what becomes of each: the command's exit status, and what a server answers.
# ================================================================================================

EXIT_NO, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_CHECKSUM, EXIT_PERMISSION, EXIT_FAILURE = 1, 2, 3, 4, 5, 6
EXIT_PIPE = 141

# Error codes of JSON-RPC 2.0, of servers of layers, and of jsonrpc-fdpass.
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, BAD_PARAMS, INTERNAL_ERROR = (
    -32700, -32600, -32601, -32602, -32603)
NO_LAYER, NO_IMAGE, NO_FILE, IO_ERROR, FD_ERROR = -32000, -32001, -32002, -32003, -32050


class _ErrorKind(type):
    """The type of errors: dir(), and so pydoc, leaves out what every exception of Python has."""

    def __dir__(cls) -> list[str]:
        return sorted({*super().__dir__()} - {*dir(Exception)})


class CstorError(Exception, metaclass=_ErrorKind):
    """Base of all errors that cstor.py raises by itself; OSError passes through unchanged.

    ``hint`` is the next step for a person, or "": the command line prints it, str() does not.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class NotFound(CstorError, LookupError):
    """What was asked for is not there."""


class ImageUnknown(NotFound):
    """No image, in the words of containers/storage: ``image not known: X``."""


class LayerUnknown(NotFound):
    """No layer, in the words of containers/storage: ``layer not known: X``."""


class ContainerUnknown(NotFound):
    """No container, in the words of containers/storage: ``container not known: X``."""


class Ambiguous(NotFound):
    """A reference fits several objects: ``candidates`` lists them, each one line."""

    def __init__(self, message: str, candidates: Sequence[str] = (), *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.candidates = list(candidates)


class FormatError(CstorError, ValueError):
    """Malformed metadata, tar or stream.

    ``file`` names it; ``line`` counts from 1, ``offset`` (decompressed) from 0; None if unknown.
    """

    def __init__(self, message: str, *, file: str = "", line: int | None = None,
                 offset: int | None = None, hint: str = "") -> None:
        place = file + f":{line}" * (line is not None) \
            + f" at offset {offset}" * (offset is not None)
        super().__init__(f"{place}: {message}" if place else message, hint=hint)
        self.file, self.line, self.offset = file, line, offset


class IntegrityError(CstorError):
    """Content that is not what the metadata promises.

    ``layer`` is the layer ID or "", ``name`` the file's name in the tar or b"" for the whole layer,
    ``expected`` and ``actual`` are checksums, sizes or types in words.
    """

    def __init__(self, message: str, *, layer: str = "", name: bytes = b"", expected: str = "",
                 actual: str = "", hint: str = "") -> None:
        where = f'layer {layer}: ' if layer else ""
        what = f'"{display(name)}": ' if name else ""
        wanted = f": expected {expected}, got {actual}" if expected or actual else ""
        super().__init__(f"{where}{what}{message}{wanted}", hint=hint)
        self.layer, self.name, self.expected, self.actual = layer, name, expected, actual


class Unsupported(CstorError):
    """Valid, but this program cannot read it: another driver, or contents that are gone."""


class NeedsUnshare(CstorError, PermissionError):
    """Permission denied: mostly for a sub-uid's file, which needs a user namespace."""


class ProtocolError(CstorError):
    """A peer broke the protocol; ``code`` is the JSON-RPC error code."""

    def __init__(self, message: str, *, code: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


def add_hint(error: BaseException, text: str) -> None:
    """Add a next step to what the command line prints for an error."""
    vars(error)["hint"] = "; ".join(filter(None, [getattr(error, "hint", ""), text]))


class _UsageError(Exception):
    """Wrong use of the command line."""


class _Silent(ProtocolError):
    """A peer did nothing in time."""


# Class, exit status, code of JSON-RPC, name in org.composefs.Oci; the first row that fits counts.
ERRORS: tuple[tuple[type[BaseException], int, int, str], ...] = (
    (_UsageError, EXIT_USAGE, INTERNAL_ERROR, "InternalError"),
    (Ambiguous, EXIT_NOT_FOUND, BAD_PARAMS, "InternalError"),
    (LayerUnknown, EXIT_NOT_FOUND, NO_LAYER, "NoSuchLayer"),
    (ImageUnknown, EXIT_NOT_FOUND, NO_IMAGE, "RepoNotFound"),
    (NotFound, EXIT_NOT_FOUND, NO_FILE, "InternalError"),
    (IntegrityError, EXIT_CHECKSUM, IO_ERROR, "InternalError"),
    (NeedsUnshare, EXIT_PERMISSION, IO_ERROR, "InternalError"),
    (PermissionError, EXIT_PERMISSION, IO_ERROR, "InternalError"),
    (OSError, EXIT_FAILURE, IO_ERROR, "InternalError"),
    (Unsupported, EXIT_FAILURE, INTERNAL_ERROR, "InternalError"),
    (BaseException, EXIT_FAILURE, INTERNAL_ERROR, "InternalError"))


def error_row(error: BaseException) -> tuple[int, int, str]:
    """Return (exit status, code of JSON-RPC, name in org.composefs.Oci) of an error."""
    status, code, name = next(row[1:] for row in ERRORS if isinstance(error, row[0]))
    if isinstance(error, ProtocolError):
        code, name = error.code, name if error.code == INTERNAL_ERROR else "InvalidRequest"
    return status, code, name


def error_of(code: int, message: str, kind: object = None) -> CstorError:
    """Return the error that a server tells of: its class is ``kind``, as ours says, or by code."""
    for each, _, number, _ in ERRORS:
        if issubclass(each, CstorError) and (each.__name__ == kind or code == number and code in (
                NO_LAYER, NO_IMAGE, NO_FILE)):
            return each(message)
    return ProtocolError(message, code=code)


# ================================================================================================
# 2. Text and constants
#
# Names inside layers are bytes, paths of the host and names of images str.  display() spells both
# for people, on one line that cannot steer a terminal; spell() spells bytes for JSON without loss.
# Times are nanoseconds since 1970.
# ================================================================================================

# containers/storage: drivers, the first before others, and where they keep the layers' files.  The
# names of all directories of records begin with that of the driver.
DRIVERS = {"overlay": b"overlay", "vfs": b"vfs/dir"}
OTHER_DRIVERS = ("btrfs", "zfs", "aufs", "devicemapper", "windowsfilter")
LINK_ID = r"[A-Z2-7]{26}"  # overlay/<id>/link: standard base32, no padding
HEX64 = r"[0-9a-f]{64}"

# tar (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU), and whiteouts of AUFS, which OCI took over.
BLOCK = 512
TYPE_AT = 156  # offset of typeflag in a header block
SIZE_AT = slice(124, 136)  # the size field: octal, ended by a space or NUL, or base-256
HEADER_ONLY = b"123456"  # link, symlink, char, block, directory, FIFO: no data whatever size says
SPECIALS = b"xLK"  # headers about the next header: pax, GNU long name, GNU long link
PAX_GLOBAL = b"g"
OPAQUE_MARKER = b".wh..wh..opq"

# System calls of Linux.
NO_ID = 0xFFFFFFFF  # chown(2): keep the owner; as a mask, the bits of an ID
AT_FDCWD = -100  # openat(2): the working directory, in place of a descriptor
OPEN_DIRECTORY = os.O_PATH | os.O_DIRECTORY  # os.open() adds O_CLOEXEC
OPEN_NEW_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
OPEN_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

# Media type of a layer's headers with the contents of its files as open files.
SPLITFDSTREAM = "application/vnd.containers.splitfdstream"

# Limits: what is larger is refused, so that a hostile store costs bounded memory and time.
MAX_SYMLINKS = 40  # as the kernel's path walk
MAX_WALK = 1 << 16  # components that one lookup on disk opens, each ".." from the root again
MAX_LOWERS = 500  # layers below one another; maxDepth of the overlay driver
MAX_DIFFS = 128  # directories of layers open at a time, each by up to three descriptors
MAX_JSON = 256 << 20  # one metadata file
MAX_BIG_DATA = 256 << 20  # one big data item (a TOC of a million files is about 200 MB)
MAX_SPECIAL = 1 << 20  # one pax or GNU long header; Go's maxSpecialFileSize
MAX_HEADERS = 8 << 20  # all headers before one file's data
MAX_OBJECT = 4 << 20  # one JSON object of a stream
MAX_TRIED = 4 << 30  # bytes of a tar that is made again and again to find a sparse file's map
MAX_EXPANDED = 16 << 30  # the holes of all sparse files of a tar that is compared
MAX_BROKEN = 64  # damaged objects of one JSON array, each of which can be read to the end
MAX_EMPTY = 1 << 16  # segments, or chunks of a stream, that hold nothing
MAX_EXTENTS = 1 << 20  # data runs of one sparse file
MAX_PATH = 4095  # a name in a layer; PATH_MAX of the kernel, so that nothing longer was unpacked
MAX_FILE_NAME = 4096  # of a stream's external file, below its directory

CHUNK = 1 << 20  # unit of reading, hashing and writing contents
INLINE_THRESHOLD = 4096  # contents of up to so many bytes go inline in a stream
READ_SIZE = 32 << 10  # unit of reading compressed metadata, which grows about 20 times


def check_type(what: str, value: object, kind: type) -> None:
    """Raise TypeError for an argument of another type: names inside layers are bytes."""
    if not isinstance(value, kind):
        why = {"bytes str": ": names inside layers are bytes, as os.fsencode() returns them",
               "str bytes": " (os.fsdecode() returns str)"
               }.get(f"{kind.__name__} {type(value).__name__}", "")
        raise TypeError(f"{what} must be {kind.__name__}, not {type(value).__name__}{why}")


def check_words(what: str, words: Iterable[str], known: Sequence[str] = ()) -> list[str]:
    """Return a list of str.  Raises TypeError for another, ValueError for one not ``known``."""
    if isinstance(words, (str, bytes)):
        raise TypeError(f"{what} must be a list of str, not {type(words).__name__}")
    words = list(words)
    for word in words:
        check_type(f"each of {what}", word, str)
        if known and word not in known:
            raise ValueError(f"{what}: unknown {word!r}; expected {', '.join(map(repr, known))}")
    return words


def explain_import(error: ImportError) -> str:
    """Say which standard module this Python lacks, and which package of Debian has it."""
    what = f"this Python has no module {error.name}" if isinstance(error, ModuleNotFoundError) \
        else f"this Python cannot load a module: {display(str(error))}"
    return f"{what}; on Debian, `apt install python3` brings it (libpython3-stdlib)"


def display(name: str | bytes) -> str:
    """Spell a name from a store so that it fits one line and cannot steer a terminal.

    Bytes that are not UTF-8 become ``\\xNN``; control characters and lone surrogates are escaped.
    """
    if isinstance(name, bytes):
        name = name.decode("utf-8", "backslashreplace")
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else
                   c.encode("unicode_escape").decode("ascii") for c in name)


def can_be_path(text: str) -> bool:
    """Tell whether a file can have this name: no NUL byte, no lone surrogate of JSON's."""
    with suppress(UnicodeEncodeError):
        return b"\0" not in os.fsencode(text)
    return False


def counted(number: object, noun: str) -> str:
    """Spell a number of things: "1 file", "2 files", "0 directories"."""
    if str(number) != "1":
        noun = noun[:-1] + "ies" if noun.endswith("y") and noun != "day" else noun + "s"
    return f"{number} {noun}"


def spell(name: bytes) -> str:
    """Spell a name for JSON without loss: UTF-8 as it is, any other byte as U+EF00 plus its value.

    U+EF80 to U+EFFF themselves (private use; the rule is that of MirBSD's OPTU-8) become three
    such characters, one for each byte, so that unspell() gives every name back.
    """
    check_type("name", name, bytes)
    text = name.decode("utf-8", "surrogateescape")
    if text.isascii():
        return text
    text = re.sub("[\uef80-\uefff]",
                  lambda m: m[0].encode().decode("ascii", "surrogateescape"), text)
    return re.sub("[\udc80-\udcff]", lambda m: chr(ord(m[0]) + 0xEF00 - 0xDC00), text)


def unspell(text: str) -> bytes:
    """Return the name that spell() made a string of."""
    check_type("text", text, str)
    text = re.sub("[\uef80-\uefff]", lambda m: chr(ord(m[0]) - 0xEF00 + 0xDC00), text)
    return text.encode("utf-8", "surrogateescape")


def parse_json(data: bytes, file: str) -> Any:
    """Parse one JSON document; FormatError with the file's name and the offset otherwise."""
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (RecursionError, ValueError) as error:  # also for an integer of 4,301 digits
        raise FormatError(f"malformed JSON: {getattr(error, 'msg', error)}", file=file,
                          offset=getattr(error, "pos", None)) from None


def parse_object(data: bytes, file: str) -> dict[str, Any]:
    """Parse one JSON object; FormatError otherwise."""
    if not isinstance(value := parse_json(data, file), dict):
        raise FormatError("expected a JSON object", file=file)
    return value


def whole_objects(data: bytes) -> list[dict[str, Any]]:
    """Return the records that are whole in a damaged JSON array: Go writes "id" first in each."""
    text, found, end, broken = data.decode("utf-8", "replace"), [], 0, 0
    for match in re.finditer(r'\{\s*"id"\s*:', text):
        if match.start() >= end and broken < MAX_BROKEN:
            try:
                value, end = json.JSONDecoder().raw_decode(text, match.start())
                found.append(value)
            except (RecursionError, ValueError):
                broken += 1
    return found


class ObjectStream:
    """JSON objects one after another, read from chunks of bytes as they are needed."""

    def __init__(self, chunks: Iterator[bytes], file: str) -> None:
        self.file, self._chunks = file, chunks
        self._buffer = b""
        self._at = 0
        self._offset = 0  # of the buffer in the stream

    def more(self) -> bool:
        """Read on; False at the end of the stream."""
        chunk = next(self._chunks, b"")
        self._buffer = self._buffer[self._at:] + chunk
        self._offset += self._at
        self._at = 0
        return bool(chunk)

    def fill(self, count: int) -> None:
        """Read on until ``count`` bytes are at hand, or the stream ends."""
        while len(self._buffer) - self._at < count and self.more():
            pass

    def find(self, pattern: bytes, count: int) -> bool:
        """Go behind what matches a pattern in the next ``count`` bytes, if anything does."""
        self.fill(count)
        if match := re.compile(pattern).search(self._buffer, self._at, self._at + count):
            self._at = match.end()
        return bool(match)

    def skip(self, blank: bytes) -> bytes:
        """Go to the next byte that is not in ``blank`` and return it; b"" at the end."""
        while True:
            part = self._buffer[self._at:self._at + 64]
            rest = part.lstrip(blank)
            self._at += len(part) - len(rest)
            if rest or not part and not self.more():
                return rest[:1]

    def object(self) -> dict[str, Any]:
        """Read one object, looking at more and more of the stream."""
        window = 4096
        while True:
            self.fill(window)
            # One character a byte, so that the end found is a place in the buffer.
            text = self._buffer[self._at:self._at + window].decode("latin-1")
            try:
                value, end = json.JSONDecoder().raw_decode(text)
                if not text.isascii():
                    data = self._buffer[self._at:self._at + end]
                    value = json.loads(data.decode("utf-8", "replace"))
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and len(text) == window < MAX_OBJECT:
                    window *= 8
                    continue
                raise self.error(f"malformed, truncated or too large: {error}") from None
            if not isinstance(value, dict):
                raise self.error("expected a JSON object")
            self._at += end
            return value

    def error(self, message: str) -> FormatError:
        return FormatError(message, file=self.file, offset=self._offset + self._at)


@lru_cache(4096)  # lists sort by it, and show it
def parse_time(text: str) -> int | None:
    """Return an RFC 3339 time in nanoseconds since 1970; None for Go's zero time.

    Raises FormatError.  Python before 3.11 cannot read the nine digits that Go writes.
    """
    match = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?"
                         r"(?:[Zz]|([+-])(\d\d):(\d\d))", text, re.ASCII)
    if text.startswith("0001-01-01T00:00:00") and match:
        return None
    parts = tuple(int(part) for part in match.groups()[:6]) if match else (0,) * 6
    year, month, day, hour, minute, second = parts
    # Days since 1970 in the proleptic Gregorian calendar, years counted from March.
    year -= month < 3
    days = (365 * year + year // 4 - year // 100 + year // 400
            + (153 * ((month + 9) % 12) + 2) // 5 + day - 719469)
    seconds = days * 86400 + hour * 3600 + minute * 60 + second
    if not match or time.gmtime(seconds)[:6] != parts:  # no such day or hour
        raise FormatError(f'malformed time: "{display(text)}"')
    if match[8]:
        offset = int(match[9]) * 3600 + int(match[10]) * 60
        seconds += -offset if match[8] == "+" else offset
    return seconds * 10**9 + int((match[7] or "").ljust(9, "0"))


@lru_cache(4096)  # the files of an image have few distinct times
def format_time(moment: int) -> str:
    """Return nanoseconds since 1970 as RFC 3339 in UTC, without zeros at the end, as Go does.

    "" outside the years 1 to 9999, for which RFC 3339 has no words.
    """
    seconds, nanoseconds = divmod(moment, 10**9)
    if not -62135596800 <= seconds < 253402300800:
        return ""
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    return "%04d-%02d-%02dT%02d:%02d:%02d" % time.gmtime(seconds)[:6] + fraction + "Z"


def as_list(value: Any) -> list[Any]:
    """Return ``value`` when it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> dict[str, Any]:
    """Return ``value`` when it is an object of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_plain(name: bytes) -> bool:
    """Tell whether JSON holds a path as it is, whatever wrote it, and a pattern can match it."""
    return name.count(b"/") < 64 and is_utf8(name) and not re.search(
        rb"""[\0-\x1f"\\<>&\x7f]|\xe2\x80[\xa8\xa9]""", name)


def is_utf8(text: bytes) -> bool:
    """Tell whether bytes are valid UTF-8."""
    return text.decode("utf-8", "replace").encode() == text


def decode_base64(text: str | bytes) -> bytes:
    """Decode base64 strictly: Python before 3.11 can only skip other characters."""
    data = binascii.a2b_base64(text)
    if (len(data) + 2) // 3 * 4 != len(text):
        raise ValueError("characters that are not base64")
    return data


def compact_json(value: Any) -> bytes:
    """Return JSON without spaces; FormatError for a number that JSON has not, such as 1e999."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise FormatError(f"it cannot be written as JSON: {error}") from None


# ================================================================================================
# 3. File descriptors
#
# Everything below a store is opened through a Directory.  Lookups go component by component, and
# find what openat2(2) finds with RESOLVE_IN_ROOT: absolute links and ".." stop at the directory, as
# after chroot(2).  (openat2 itself would need ctypes, whose import costs as much as 1,000 walks.)
# The last component is never followed, and only regular files are opened.
# ================================================================================================

# _IOW(0x94, 9, int): these architectures encode the direction of an ioctl differently.
FICLONE = 0x80049409 if os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha")) \
    else 0x40049409
CAPABILITIES = {0: "CAP_CHOWN", 1: "CAP_DAC_OVERRIDE", 2: "CAP_DAC_READ_SEARCH"}  # that matter here
F_SETPIPE_SZ = 1031  # fcntl(2); the fcntl module has it since Python 3.10


class Opened(int):
    """A descriptor (-1: none) that its ``with`` block closes at the end."""

    def __enter__(self) -> int:
        return self

    def __exit__(self, *_: object) -> None:
        if self >= 0:
            os.close(self)


class OnError:
    """A context that makes a call when an exception leaves it."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._call, self._args = call, args

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self._call(*self._args)


class ErrorsAs(OnError):
    """A context that raises the call's result in place of an OSError."""

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if isinstance(error[0], OSError):
            raise self._call(error[0], *self._args) from None


def open_in_root(root_fd: int, name: bytes) -> int:
    """Open the directory ``name`` (O_PATH) as if ``root_fd`` were "/"; return a new descriptor."""
    if b"\0" in name:
        raise FormatError(f'name with a NUL byte: "{display(name)}"')
    todo = name.split(b"/")[::-1]
    done: list[bytes] = []  # real names from the root down to fd
    links = steps = 0
    fd = os.dup(root_fd)
    try:
        while todo:
            steps += 1
            if links > MAX_SYMLINKS or steps > MAX_WALK:
                kind = NotADirectoryError if links > MAX_SYMLINKS else OSError  # none is there
                raise kind(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(name))
            if (part := todo.pop()) in (b"", b"."):
                continue
            # Start over for "..": after a rename it could lead out of the root.
            found = b"/" + b"/".join(done[:-1]) if part == b".." else _open_or_read(fd, part)
            if isinstance(found, int):
                above, fd = fd, found
                os.close(above)
                done.append(part)
                continue
            links += part != b".."
            todo += found.split(b"/")[::-1]
            if found.startswith(b"/"):
                fd, done = os.dup2(root_fd, fd, False), []
        return fd
    except BaseException:
        os.close(fd)
        raise


def _open_or_read(dir_fd: int, name: bytes) -> int | bytes:
    """Open the directory ``name``, or return the target of the symbolic link."""
    try:
        return os.open(name, OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
    except NotADirectoryError:
        if stat.S_ISLNK(os.lstat(name, dir_fd=dir_fd).st_mode):
            return os.readlink(name, dir_fd=dir_fd)
        raise


def open_beneath(root_fd: int, name: bytes) -> int:
    """Open the directory ``name`` (O_PATH) beneath ``root_fd``, where no component may be a link.

    ``name`` is clean: relative, without ".." (or b"." alone).  Raises OSError: ENOTDIR for a link.
    """
    fd = root_fd
    for part in name.split(b"/"):
        above = fd
        try:
            fd = os.open(part, OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
        finally:
            if above != root_fd:
                os.close(above)
    return fd


class Closing:
    """An owner of descriptors: a context manager that calls close(), which may be repeated."""

    def close(self) -> object:
        """Close all descriptors; harmless when repeated."""
        raise NotImplementedError

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Directory(Closing):
    """A directory that is the root of all lookups made through it; owns its descriptor.

    Names are bytes, relative, with "/" between components; nothing outside is reachable.  An
    OSError names the path; NeedsUnshare: no permission.  Threads share all but parent(), inspect().
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path, self.fd = path, fd
        self._parent = self._near = b""
        self._parent_fd = self._near_fd = -1
        self._flags = OPEN_FILE | os.O_NOATIME

    @classmethod
    def at(cls: type[D], path: str) -> D:
        """Open the host directory ``path``, links followed."""
        with ErrorsAs(with_path, path):
            return cls(path, os.open(path, OPEN_DIRECTORY))

    def close(self) -> None:
        fds = self._near_fd, self._parent_fd, self.fd
        self.fd = self._parent_fd = self._near_fd = -1  # a signal can come now
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        self.close()

    def host_path(self, name: bytes) -> str:
        """Spell ``name`` as a host path, for messages."""
        return os.path.join(self.path, os.fsdecode(name))

    def explain(self, error: OSError, name: bytes) -> OSError:
        """Return ``error`` with the path of ``name``; see with_path()."""
        return with_path(error, self.host_path(name))

    def directory(self, name: bytes) -> Directory:
        """Open a directory below as a root of its own."""
        with ErrorsAs(self.explain, name):
            return Directory(self.host_path(name), open_in_root(self.fd, name))

    def parent(self, name: bytes) -> int:
        """Return the descriptor of the directory ``name``; it stays ours, until the next call."""
        if not name:
            return self.fd
        if name != self._parent:  # tars are in depth-first order: mostly it is the one before
            old, self._parent_fd, self._parent = self._parent_fd, self._open_near(name), name
            if old >= 0:
                os.close(old)
        return self._parent_fd

    def locate(self, name: bytes) -> tuple[int, bytes]:
        """Return the directory of ``name``, as parent() does, and the last component."""
        parent, _, base = name.rpartition(b"/")
        return self.parent(parent), base or b"."

    def _open_near(self, name: bytes) -> int:
        """Open a directory from one above it that stays open, since its neighbours come next."""
        # So the time for a deep tree does not grow with the square of its depth.
        start, parts = self.fd, name.split(b"/")
        if b".." in parts:
            return self._open_parent(name)
        for known, fd in ((self._near, self._near_fd), (self._parent, self._parent_fd)):
            if known and name.startswith(known + b"/"):
                start, parts = fd, name[len(known) + 1:].split(b"/")
        try:
            if len(parts) > (2 if start == self.fd else 64):
                left = min(len(parts) // 3, 32)
                fd = open_beneath(start, b"/".join(parts[:-left]))
                old, self._near, self._near_fd = self._near_fd, name.rsplit(b"/", left)[0], fd
                if old >= 0:
                    os.close(old)
                start, parts = fd, parts[-left:]
            return open_beneath(start, b"/".join(parts))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # a link, or another place now
            return self._open_parent(name)

    def _open_parent(self, name: bytes) -> int:
        return open_in_root(self.fd, name)

    def _in_parent(self, name: bytes, action: Callable[[int, bytes], T]) -> T:
        """Call ``action`` with the descriptor of the parent directory and the last component."""
        parent, _, base = name.rpartition(b"/")
        with ErrorsAs(self.explain, name), \
                Opened(self._open_parent(parent) if parent else -1) as fd:
            return action(fd if parent else self.fd, base or b".")

    def lstat(self, name: bytes) -> os.stat_result:
        """Return lstat(2) of ``name``."""
        return self._in_parent(name, lambda fd, base: os.lstat(base, dir_fd=fd))

    def inspect(self, name: bytes) -> Any:
        """Return what look_at() returns for ``name``, by parent()."""
        with ErrorsAs(self.explain, name):
            return look_at(*self.locate(name))

    def exists(self, name: bytes) -> bool:
        """Tell whether ``name`` exists; raises all errors but its absence."""
        with suppress(FileNotFoundError, NotADirectoryError):
            self.lstat(name)
            return True
        return False

    def names(self, name: bytes) -> list[bytes]:
        """Return the names in the directory ``name``, none where there is no directory."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return self.listdir(name)
        return []

    def readlink(self, name: bytes) -> bytes:
        """Return the target of the symbolic link ``name``."""
        return self._in_parent(name, lambda fd, base: os.readlink(base, dir_fd=fd))

    def listdir(self, name: bytes) -> list[bytes]:
        """Return the names in the directory ``name``, sorted."""
        with self.directory(name) as directory, ErrorsAs(self.explain, name):
            return directory.list_at(directory.fd)

    def list_at(self, dir_fd: int, name: bytes = b".") -> list[bytes]:
        """Return the names in a directory that parent() returned, or in one below it, sorted."""
        with Opened(self._open(dir_fd, name, os.O_DIRECTORY)) as fd:
            return sorted(os.fsencode(entry) for entry in os.listdir(fd))

    def open(self, name: bytes) -> int:
        """Open the regular file ``name`` for reading; FormatError for anything else."""
        if (fd := self.open_one(name)) < 0:
            raise FormatError(f"is a {file_type(-fd)}, not a regular file",
                              file=self.host_path(name))
        return fd

    def open_one(self, name: bytes) -> int:
        """Open a regular file; for another type return the negative type."""
        return self._in_parent(name, self.open_at)[0]

    def open_at(self, dir_fd: int, base: bytes) -> tuple[int, os.stat_result]:
        """Open ``base`` in a directory that parent() returned; return descriptor and status.

        For anything but a regular file it is the negative type, which is checked before the file
        is opened: opening a FIFO can block, and opening a device can trigger an action.
        """
        status = os.lstat(base or b".", dir_fd=dir_fd)
        kind = stat.S_IFMT(status.st_mode)
        return self._open(dir_fd, base, 0) if kind == stat.S_IFREG else -kind, status

    def open_near(self, name: bytes) -> int:
        """Do what open_one() does by parent()."""
        with ErrorsAs(self.explain, name):
            return self.open_at(*self.locate(name))[0]

    def _open(self, dir_fd: int, base: bytes, more: int) -> int:
        try:
            return os.open(base, self._flags | more, dir_fd=dir_fd)
        except PermissionError as error:
            # Only the owner and CAP_FOWNER may use O_NOATIME.
            if error.errno != errno.EPERM or not self._flags & os.O_NOATIME:
                raise
            self._flags = OPEN_FILE
            return os.open(base, self._flags | more, dir_fd=dir_fd)

    def read(self, name: bytes, limit: int) -> bytes:
        """Return the whole regular file ``name``; FormatError when it is larger than ``limit``."""
        return read_whole(self.open(name), limit, self.host_path(name))


class Target(Directory):
    """A directory to make files in: no lookup follows a link below it."""

    def _open_parent(self, name: bytes) -> int:
        return open_beneath(self.fd, name)

    def explain(self, error: OSError, name: bytes) -> OSError:
        """Return ``error`` with the path in the target; errors of the store unchanged."""
        if isinstance(error, CstorError) or isinstance(error.filename, str) \
                and not error.filename.startswith("/proc/self/fd/"):
            return error
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return OSError(error.errno, "another process put a link or file where a directory was",
                           self.host_path(name))
        found = OSError(error.errno, error.strerror, self.host_path(name))
        if error.errno == errno.EACCES and os.geteuid():
            add_hint(found, "--same-owner has access to what your sub-uids own")
        return found


def look_at(dir_fd: int, name: bytes) -> tuple[os.stat_result, bytes, dict[bytes, bytes]] | None:
    """Return lstat(2), the target of a symbolic link, and xattrs; None if it has vanished."""
    try:
        status = os.lstat(name, dir_fd=dir_fd)
        link = os.readlink(name, dir_fd=dir_fd) if stat.S_ISLNK(status.st_mode) else b""
        try:
            return status, link, read_xattrs(b"/proc/self/fd/%d/%s" % (dir_fd, name))
        except FileNotFoundError:
            if has_proc():
                raise
            return status, link, in_directory(dir_fd, lambda: read_xattrs(name))
    except FileNotFoundError:
        return None


def read_xattrs(place: int | bytes) -> dict[bytes, bytes]:
    """Return the xattrs of an open file, or of a path, whose last component is not followed."""
    follow = isinstance(place, int)
    try:
        return {os.fsencode(key): os.getxattr(place, key, follow_symlinks=follow)
                for key in os.listxattr(place, follow_symlinks=follow)
                if key != "security.selinux"}  # the label of this place, not of the file
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODATA, errno.EPERM):
            return {}
        raise


def name_error(error: BaseException | None, path: str) -> None:
    """Add ``path`` to an OSError without a file name; errors of other files have one."""
    if isinstance(error, OSError) and error.errno and error.filename is None:
        error.filename = path


def with_path(error: OSError, path: str) -> OSError:
    """Return ``error`` with the path in the store; NeedsUnshare when permission is denied."""
    if isinstance(error, CstorError):
        return error
    if error.errno == errno.EACCES:
        return NeedsUnshare(f"{display(path)}: {os.strerror(errno.EACCES)}",
                            hint="run it as root or as the owner of the store, or for a rootless "
                                 "store inside `podman unshare`")
    text = "the storage is closed, or the tree" if error.errno == errno.EBADF \
        else os.strerror(error.errno or 0)
    kind = NotADirectoryError if isinstance(error, NotADirectoryError) else OSError
    return kind(error.errno, text, path)


def file_type(mode: int) -> str:
    """Name the type of ``st_mode`` in words."""
    return {stat.S_IFREG: "regular file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link",
            stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device",
            stat.S_IFBLK: "block device"}.get(stat.S_IFMT(mode), "file of unknown type")


def read_up_to(fd: int, count: int) -> bytes:
    """Read until ``count`` bytes or the end of the file."""
    parts = []
    while part := os.read(fd, min(count, CHUNK)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_whole(fd: int, limit: int, path: str) -> bytes:
    """Return what an open file holds, and close it; FormatError when it is more than ``limit``."""
    # The size is checked first: a sparse file can claim to hold terabytes.
    with Opened(fd), ErrorsAs(with_path, path):
        data = read_up_to(fd, limit + 1) if os.fstat(fd).st_size <= limit else None
    if data is not None and len(data) <= limit:
        return data
    raise FormatError(f"larger than {limit} bytes", file=path)


def input_size(path: str) -> int:
    """Return the size of a host file, 0 for a pipe or the like; "-" is stdin.  Raises NotFound."""
    if path != "-" and not os.path.exists(path):
        if not has_proc() and os.path.realpath(path).startswith("/proc/"):
            os.stat(path)
        raise NotFound(f"no such file or directory: {path}")
    status = os.fstat(0) if path == "-" else os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def open_input(path: str) -> int:
    """Open a regular file of the host, links followed; FormatError for anything else.

    A pipe that is already open (/dev/fd/N) is accepted, but not a FIFO: it may never have a writer.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) and os.path.exists(os.path.realpath(path)):
        raise FormatError(f"is a {file_type(found.st_mode)}, not a regular file", file=path)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK * stat.S_ISREG(found.st_mode))


def write_all(fd: int, data: bytes | bytearray | memoryview, timeout: float | None = None) -> None:
    """Write all of ``data``, however often write(2) comes back short, or would block."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view):]
        except BlockingIOError:  # the other end can set O_NONBLOCK on a pipe that we share
            Deadline(timeout).wait(fd, "POLLOUT")


def widen_pipe(fd: int) -> None:
    """Give a pipe room for a whole chunk, so that writer and reader change places less often."""
    with suppress(ImportError, OSError):  # no pipe, or fs.pipe-user-pages-soft is used up
        fcntl.fcntl(fd, F_SETPIPE_SZ, CHUNK)


def read_proc(name: str) -> str:
    """Return a file below /proc as text, "" where there is none."""
    with suppress(OSError), open("/proc/" + name, "rb") as file:
        return file.read().decode("utf-8", "replace")
    return ""


def has_proc(need: str = "") -> bool:
    """Tell whether open files can be named through /proc.  Raises Unsupported for a ``need``."""
    found = os.path.exists("/proc/self/fd")
    if need and not found:
        raise Unsupported(f"{need} through /proc, which is not mounted",
                          hint="mount -t proc proc /proc")
    return found


def in_directory(dir_fd: int, action: Callable[[], T]) -> T:
    """Run ``action`` in a directory, for calls without dir_fd where /proc is not mounted."""
    with Directory("", os.open(".", OPEN_DIRECTORY)) as here:
        try:
            os.fchdir(dir_fd)
            return action()
        finally:
            os.fchdir(here.fd)


def read_at(fd: int, count: int, offset: int) -> bytes:
    """Return what pread(2) does; errors name this file, not the one that is written."""
    try:
        return os.pread(fd, count, offset)
    except OSError as error:
        raise with_path(error, os.readlink(f"/proc/self/fd/{fd}") if has_proc() else "content"
                        ) from None


def capabilities() -> list[str]:
    """Return which of CAPABILITIES are effective."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", read_proc("self/status"), re.MULTILINE)
    if not match:  # no /proc: ask the kernel with capget(2), which takes 5 ms more for ctypes
        found = (ctypes.c_uint32 * 6)()
        ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522), found)
    bits = int(match[1], 16) if match else found[0]
    return [word for bit, word in CAPABILITIES.items() if bits >> bit & 1]


def soft_limit() -> int:
    """Return how many files this process may have open."""
    soft = os.sysconf("SC_OPEN_MAX")  # the soft RLIMIT_NOFILE; -1 is none
    return soft if 0 <= soft < 1 << 20 else 1 << 20


class Copier:
    """Copies ranges of files by the fastest call that the kernel allows.

    copy_file_range(2), then sendfile(2), then read and write.  A call that the file systems do not
    support is not tried again, so each pair of file systems needs its own Copier.
    """

    NOT_HERE = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM,
                          errno.EBADF, errno.ETXTBSY, errno.EAGAIN})

    def __init__(self) -> None:
        self.refused = ""  # why no file is shared between these file systems
        self.strikes = 0  # files in a row that were not; -1: one was
        self._ways: list[Callable[[int, int, int, int], int]] = [
            self._read_write, lambda fd, offset, count, out_fd: os.sendfile(
                out_fd, fd, offset, min(count, 1 << 30))]
        if hasattr(os, "copy_file_range"):
            self._ways.append(lambda fd, offset, count, out_fd: os.copy_file_range(
                fd, out_fd, min(count, 1 << 30), offset_src=offset))

    def copy(self, fd: int, offset: int, count: int, out_fd: int) -> int:
        """Copy ``count`` bytes of ``fd`` from ``offset``; return how many there were."""
        done = 0
        while done < count:
            try:
                n = self._ways[-1](fd, offset + done, count - done, out_fd)
            except OSError as error:
                if error.errno not in self.NOT_HERE or len(self._ways) == 1:
                    raise
                n = 0
            if n:
                done += n
            elif len(self._ways) == 1:
                break
            else:  # some file systems answer 0 to copy_file_range: ask read(2)
                self._ways.pop()
        return done

    def _read_write(self, fd: int, offset: int, count: int, out_fd: int) -> int:
        data = read_at(fd, min(count, CHUNK), offset)
        write_all(out_fd, data)
        return len(data)


LINK_MODES = ("auto", "reflink", "hardlink", "copy")


class ContentCopier:
    """Fills new files with contents: by FICLONE, or else by a Copier.

    FICLONE is not tried again for a pair of file systems that refuses it; ``mode`` is auto, reflink
    (fail rather than copy), or copy; ``device`` that of all new files, 0 if it can be several.
    """

    # Errors of a pair of file systems, and errors that one file alone can cause: btrfs gives
    # EINVAL for a file without checksums, and any file system ETXTBSY for a swap file.
    NEVER = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS})
    NOT_THIS = frozenset({errno.EINVAL, errno.EPERM, errno.ETXTBSY})
    PATIENCE = 8  # refusals in a row after which a pair of file systems is not tried again

    def __init__(self, mode: str = "auto", device: int = 0) -> None:
        check_words("link_mode", [mode], LINK_MODES)
        self.mode, self._device = mode, device
        self._copiers: dict[tuple[int, int], Copier] = defaultdict(Copier)  # by devices
        self._sure: Copier | None = None  # if the last file was shared, so that the next one may be

    def fill(self, fd: int, size: int, out_fd: int, name: Callable[[], bytes] = bytes,
             layer: str = "") -> str:
        """Give the new file ``out_fd`` the content of ``fd``; return why it was copied, "" if not.

        ``name`` and ``layer`` are for errors.  Raises OSError, IntegrityError if ``fd`` changes
        meanwhile, Unsupported if mode "reflink" is impossible.
        """
        before, copier = (None, self._sure) if self._sure else self._pair(fd, out_fd)
        why = "--link-mode copy" if self.mode == "copy" else copier.refused
        if not why:
            try:
                fcntl.ioctl(out_fd, FICLONE, fd)
                copier.strikes, self._sure = -1, copier
                return ""
            except OSError as error:
                self._sure = None
                if error.errno not in self.NEVER | self.NOT_THIS:
                    raise
                why = f"FICLONE: {os.strerror(error.errno or 0)}"
                if self.mode == "reflink":
                    place = "/" * bool(layer) + display(name())
                    raise Unsupported(f'"{place}" cannot be shared by reflink: {why}',
                                      hint="--link-mode auto copies such files") from None
                if copier.strikes >= 0:
                    copier.strikes += 1
                    if error.errno in self.NEVER or copier.strikes > self.PATIENCE:
                        copier.refused = why
        if not before:
            before, copier = self._pair(fd, out_fd)
        if before.st_size != size:  # else a hole would replace what was cut off
            raise IntegrityError("changed while it was read", layer=layer, name=name(),
                                 expected=counted(size, "byte"), actual=str(before.st_size))
        for offset, length in data_runs(fd, size) if before.st_blocks * 512 < size \
                else ((0, size),):
            if offset:
                os.lseek(out_fd, offset, os.SEEK_SET)
            copier.copy(fd, offset, length, out_fd)
        if before.st_blocks * 512 < size:
            os.ftruncate(out_fd, size)
        after = os.fstat(fd)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise IntegrityError("changed while it was read", layer=layer, name=name())
        return why

    def _pair(self, fd: int, out_fd: int) -> tuple[os.stat_result, Copier]:
        """Return the status of a file, and what copies from its file system."""
        status, device = os.fstat(fd), self._device or os.fstat(out_fd).st_dev
        return status, self._copiers[status.st_dev, device]


def data_runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the parts of a file that are not holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            start, end = end, size  # a file system without holes
        if start < end:
            yield start, end - start


class SignalsHeld:
    """A context in which SIGINT, SIGTERM and SIGHUP wait, so that nothing interrupts a clean-up."""

    def __enter__(self) -> SignalsHeld:
        self.before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.before)


class _Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP came: unwind and clean up."""


def raise_after_finalizer(ignored: Any) -> None:
    """Serve as sys.unraisablehook: raise again, after a finalizer, what a signal raised in it.

    Python drops what is raised in finalizers and weakref callbacks.  It drops what this hook
    raises, too, so the next call that the thread makes raises it: a profile function can do that.
    """
    kind, args = ignored.exc_type, getattr(ignored.exc_value, "args", ())

    def raise_again(_frame: object, event: str, _arg: object) -> None:
        if event in ("call", "c_call"):
            sys.setprofile(None)
            raise kind(*args)

    if issubclass(kind, (KeyboardInterrupt, _Stopped)):
        sys.setprofile(raise_again)
    else:
        sys.__unraisablehook__(ignored)


def remove_acls(place: int | str | bytes) -> None:
    """Remove the ACLs that a new file has inherited, if any."""
    try:
        for name in {"system.posix_acl_access", "system.posix_acl_default"} \
                & set(os.listxattr(place)):
            os.removexattr(place, name)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.ENODATA):
            raise


class Transaction:
    """A context that makes something at ``path``: all of it, or after an error nothing.

    on_error() takes the steps that remove what was made.  They run in reverse, with signals held;
    the error's hint says what stays: the path of a failed step, or a step's result.  keep() forgets
    them.  on_exit() takes steps that end the context in either case, the last one first.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._undo: list[tuple[str, Callable[[], str | None]]] = []
        self._end = ExitStack()
        self.on_exit, self._own = self._end.callback, self._end.enter_context

    def _open(self) -> None:
        """Make the first files of the context, while signals are held."""
        raise NotImplementedError

    def __enter__(self: X) -> X:
        try:
            with SignalsHeld():
                self._open()
        except BaseException as error:
            if isinstance(error, OSError) and error.errno:
                error.filename = self.path
            self.__exit__(type(error), error)
            raise
        return self

    def on_error(self, path: str, step: Callable[[], str | None]) -> None:
        """Let ``step`` remove ``path`` after an error."""
        self._undo.append((path, step))

    def keep(self) -> None:
        """Keep what was made so far, whatever happens."""
        self._undo.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 *_: object) -> None:
        name_error(error, self.path)
        with SignalsHeld(), self._end:
            while error is not None and self._undo:
                path, step = self._undo.pop()
                try:
                    add_hint(error, step() or "")
                except FileNotFoundError:
                    pass
                except OSError as trouble:  # it must not hide the first error
                    add_hint(error, f"{path} stays: {trouble.strerror}")

    def open_directory(self, path: str) -> tuple[Target, int, bool]:
        """Open a directory to make files in; return it, its final mode, and whether it was made.

        A new one is private until then, and inherits no group and no ACL.  Raises OSError, also
        if another process put another directory in its place.
        """
        if os.path.lexists(path):
            if not os.path.exists(path):
                raise OSError(errno.ENOENT, "is a dangling symbolic link")
            return self._own(Target(path, os.open(path, OPEN_DIRECTORY))), 0, False
        above, name = os.path.split(path.rstrip("/"))
        with Directory("", os.open(above or ".", OPEN_DIRECTORY)) as folder:
            os.mkdir(name, dir_fd=folder.fd)
            self.on_error(path, lambda: os.rmdir(path))
            try:
                made = os.open(name, OPEN_NEW_DIRECTORY, dir_fd=folder.fd)
            except NotADirectoryError:
                raise OSError(errno.EBUSY, "another process put something else in its place"
                              ) from None
        with Opened(made):
            status = os.fstat(made)
            if os.listdir(made):
                raise OSError(errno.EBUSY, "another process put something else in its place")
            if status.st_uid != os.geteuid():
                raise OSError(errno.EPERM, f"belongs to user {status.st_uid} right after mkdir: "
                              "another process put it there, or its file system sets owners")
            remove_acls(made)
            os.fchmod(made, 0o700)
            target = Target(path, os.open(b".", OPEN_DIRECTORY, dir_fd=made))
        return self._own(target), stat.S_IMODE(status.st_mode), True


class NewFile(Transaction):
    """A file that gets its name in ``folder``, which it owns, when it is whole; ``fd`` is open.

    Until then it has no name (O_TMPFILE), or where that is unsupported, a lock and a name made from
    the target's, by which the next run finds what a kill left, and removes it (``removed``: names).
    """

    def __init__(self, path: str, folder: Directory, target: bytes) -> None:
        super().__init__(path)
        self._folder, self._target = self._own(folder), target
        self._name = b""  # until it has its final one
        self.fd, self.removed = -1, remove_dead(folder.fd, target)

    def _open(self) -> None:
        try:
            self.fd = os.open(b"." if has_proc() else b"", os.O_TMPFILE | os.O_RDWR, 0o666,
                              dir_fd=self._folder.fd)
        except OSError:
            self._name = partial_name(self._target)
            self.fd = os.open(self._name, OPEN_NEW_FILE, 0o666, dir_fd=self._folder.fd)
        self.on_exit(self._close)
        try_lock(self.fd, wait=True)

    def appear(self, name: bytes) -> None:
        """Give the file its name; a file that has it is replaced."""
        os.close(os.dup(self.fd))  # NFS and quotas report a failed write here
        folder = self._folder.fd
        if not self._name:  # only rename(2) replaces a file
            self._name = partial_name(name)
            os.link(f"/proc/self/fd/{self.fd}", self._name, dst_dir_fd=folder, follow_symlinks=True)
        os.rename(self._name, name, src_dir_fd=folder, dst_dir_fd=folder)
        self._name = b""

    def _close(self) -> None:
        os.close(self.fd)
        if self._name:
            unlink_quietly(self._folder.fd, self._name)


def partial_name(target: bytes) -> bytes:
    """Return a new temporary name for a file that will be ``target``."""
    return b".cstor-%s-%s.partial" % (target[:40], os.urandom(6).hex().encode())


def partials(folder: Target, target: bytes = b"") -> list[bytes]:
    """Return the names in ``folder`` that partial_name() made for ``target``, or for any."""
    which = re.escape(target[:40]) + b"-" if target else b"(?:.*-)?"
    return [name for name in map(os.fsencode, os.listdir(folder.fd))
            if re.fullmatch(rb"\.cstor-%s[0-9a-f]{12}\.partial" % which, name, re.DOTALL)]


def try_lock(fd: int, wait: bool = False) -> bool:
    """Lock an open file or directory until we end; False if it is locked, or locking fails."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    return False


def remove_dead(dir_fd: int, target: bytes = b"", name: bytes = b".") -> list[bytes]:
    """Remove what killed processes left of ``target`` in a directory, and return the names.

    Without ``target`` no other run works there, and all leftovers go; else those stay that are
    locked, or will be within half a second.  Failures do no harm and are ignored.
    """
    with suppress(OSError), Target("", os.open(name, OPEN_NEW_DIRECTORY, dir_fd=dir_fd)) as folder:
        return [name for name in partials(folder, target)
                if _remove_dead(folder.fd, name, bool(target))]
    return []  # no permission to list it


def _remove_dead(dir_fd: int, name: bytes, others: bool) -> bool:
    """Remove a partial, unless one of ``others`` may work on it; return whether it is gone."""
    with suppress(OSError):
        status = os.lstat(name, dir_fd=dir_fd)
        is_dir, age = stat.S_ISDIR(status.st_mode), time.time() - status.st_ctime
        if not is_dir and (not others or stat.S_ISSOCK(status.st_mode) and age > 10):
            os.unlink(name, dir_fd=dir_fd)  # a socket has this name only for a moment
            return True
        if is_dir or stat.S_ISREG(status.st_mode):
            with Target("", os.open(name, OPEN_FILE, dir_fd=dir_fd)) as found:
                if others and age < 0.5 and try_lock(found.fd):  # its owner may be about to lock it
                    fcntl.flock(found.fd, fcntl.LOCK_UN)
                    time.sleep(min(0.5 - age, 0.5))
                if not others or try_lock(found.fd):
                    if is_dir:
                        remove_content(found)
                    (os.rmdir if is_dir else os.unlink)(name, dir_fd=dir_fd)
                    return True
    return False


class Scratch(Target):
    """A temporary directory: close() removes it, or after a kill the next one there."""

    def __init__(self, above: str) -> None:
        super().__init__(above, -1)
        remove_dead(AT_FDCWD, b"scratch", os.fsencode(above))
        with SignalsHeld():
            while self.fd < 0:
                self.path = os.path.join(above, os.fsdecode(partial_name(b"scratch")))
                os.mkdir(self.path, 0o700)
                with suppress(FileNotFoundError):
                    self.fd = os.open(self.path, OPEN_NEW_DIRECTORY)
                    try_lock(self.fd, wait=True)
                if not is_at(self, self.path):  # another run took it for dead before the lock
                    super().close()

    def close(self) -> None:
        if self.fd >= 0:
            with SignalsHeld():
                remove_failed(self, self.path)
                super().close()


def unlink_quietly(dir_fd: int, name: bytes) -> None:
    """Remove a file, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dir_fd)


def is_at(target: Target, directory: str) -> bool:
    """Tell whether a target is still where it was."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(directory), os.fstat(target.fd))
    return False


def remove_failed(target: Target, directory: str) -> str:
    """Remove what a failed run made, and ``directory`` unless ""; return what stays if it moved."""
    if directory and not is_at(target, directory):
        return f"{directory} was moved or removed, and its contents stay"
    remove_content(target)
    if directory:
        os.rmdir(directory)
    return ""


def remove_content(target: Target) -> None:
    """Empty a directory, however deep and whatever its modes; no link is followed."""
    folders = [b""]
    for folder in folders:
        with ErrorsAs(target.explain, folder):
            above, base = target.locate(folder)
            with Opened(os.open(base, OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)) as fd:
                if os.geteuid() and ~os.fstat(fd).st_mode & 0o700:  # its owner lacks a permission
                    os.chmod(b"/proc/self/fd/%d" % fd if has_proc() else base, 0o700, dir_fd=above)
                inside = os.open(b".", OPEN_NEW_DIRECTORY, dir_fd=fd)
            with Opened(inside), os.scandir(inside) as entries:
                # The mark of OutputDirectory goes last: directories are removed in reverse.
                for entry in sorted(entries, key=lambda found: found.name[:7] != ".cstor-"):
                    name = os.fsencode(entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(folder + b"/" + name if folder else name)
                    else:
                        os.unlink(name, dir_fd=inside)
    for folder in folders[:0:-1]:
        with ErrorsAs(target.explain, folder):
            above, base = target.locate(folder)
            os.rmdir(base, dir_fd=above)


class Deadline:
    """A time limit in seconds (None: no limit), for all locks of a storage or for one peer."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + (float("inf") if seconds is None else seconds)

    def left(self) -> float:
        """Return how many seconds are left, 0 when the time is over."""
        return max(self._end - time.monotonic(), 0)

    def pause(self) -> bool:
        """Sleep a moment, where no event tells when to go on; False when the time is over."""
        left = self.left()
        time.sleep(min(0.01, left))
        return left > 0

    def wait(self, peer: Any, event: str) -> None:
        """Wait for a poll(2) event of a descriptor or socket.  Raises error() at the deadline."""
        poll = select.poll()
        poll.register(peer, getattr(select, event))
        if not poll.poll(None if self.seconds is None else self.left() * 1000):
            raise self.error()

    def error(self, words: str = "done nothing") -> ProtocolError:
        """Return the error for a peer that is late."""
        return _Silent(f"the other end has {words} for {counted(f'{self.seconds:g}', 'second')}",
                       hint="--timeout SECONDS waits longer")


def end_process(process: Any) -> Any:
    """Ask a process to end, and SIGKILL it after three seconds; return its status."""
    process.terminate()
    try:
        return process.wait(3)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def spawn(command: Sequence[str], **how: Any) -> Any:
    """Start a program as Popen does; a signal that stops us meanwhile leaves none behind."""
    # It is met once the program is known.  A mask, as in SignalsHeld, would be inherited.
    process: Any = None
    came: list[int] = []
    before: dict[int, Any] = {}
    try:
        with SignalsHeld(), suppress(ValueError):  # other threads are never interrupted
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if callable(signal.getsignal(number)):
                    before[number] = signal.signal(number, lambda number, _: came.append(number))
        process = subprocess.Popen(command, **how)
        return process
    finally:
        with OnError(lambda: process and end_process(process)), SignalsHeld():
            for each, handler in before.items():
                signal.signal(each, handler)
            for each in came:
                signal.raise_signal(each)


def wait_for(pid: int) -> int:
    """Wait for the end of a child; return its status as waitpid(2) does."""
    with suppress(ChildProcessError):  # a process that ignores SIGCHLD cannot wait for children
        return os.waitpid(pid, 0)[1]
    return 0


# ================================================================================================
# 4. Checksums
#
# tar-split guards each file with CRC-64/ISO in the reflected form of Go's hash/crc64: polynomial
# x^64 + x^4 + x^3 + x + 1, initial value and final xor all ones.  The polynomial is sparse, and
# squaring is linear over GF(2), so x^(64n) = x^(4n) + x^(3n) + x^n + 1 (mod P) for n = 1, 2, 4, ...
# A block of 64n bits is thus folded onto the next one with four shifts of a big integer, where a
# table would need 8n steps.  Bit 0 of the integer is the coefficient of the highest power.
# ================================================================================================

_ONES = (1 << 64) - 1
_FOLD_BYTES = 32 << 10  # the fastest block on 64-bit CPython; a power of two, at least 16
_TABLE = list(range(256))  # what becomes of each byte in eight steps
for _bit in range(8):
    _TABLE = [value >> 1 ^ (0xD800000000000000 if value & 1 else 0) for value in _TABLE]


def crc64(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """Return the CRC-64/ISO of ``data``; ``crc`` is that of the bytes before it.

    tar-split stores it big-endian.  ``crc64(b"hello world\\n")`` is 0x44e9cf3f572ad9ac.
    """
    state = crc ^ _ONES
    view = memoryview(data)
    head = len(view) % _FOLD_BYTES  # so that all blocks after the first are whole
    if head < 64:
        for byte in view[:head]:
            state = _TABLE[(state ^ byte) & 255] ^ state >> 8
        view = view[head:]
        if not view:
            return state ^ _ONES
        head = _FOLD_BYTES
    rest = int.from_bytes(view[:head], "little") ^ state
    bits = _FOLD_BYTES * 8 if len(view) > head else 1 << (head * 8 - 1).bit_length()
    rest <<= bits - head * 8  # bits missing in front count as zeros
    for at in range(head, len(view), _FOLD_BYTES):
        rest = _fold(rest, bits) ^ int.from_bytes(view[at:at + _FOLD_BYTES], "little")
    while bits > 64:  # fold the first half onto the second
        bits //= 2
        rest = _fold(rest & (1 << bits) - 1, bits) ^ rest >> bits
    return _fold(rest, 64) ^ _ONES


def _fold(high: int, bits: int) -> int:
    """Return ``high`` times x^bits modulo P, as an integer of ``bits`` bits (64, 128, 256, ...)."""
    n = bits // 64
    # What the shifts push out below bit 0 has degree bits to bits + 4n - 1 ...
    low = high & (1 << 4 * n) - 1
    over = (low << 3 * n ^ low << n ^ low) & (1 << 4 * n) - 1
    # ... and comes back by the same rule, now with room to spare.
    back = over << 4 * n ^ over << 3 * n ^ over << n ^ over
    return high ^ high >> n ^ high >> 3 * n ^ high >> 4 * n ^ back << bits - 8 * n


def read_checked(fd: int, size: int, *, offset: int = 0, checksum: int | None = None,
                 name: bytes = b"", layer: str = "") -> Iterator[bytes]:
    """Yield ``size`` bytes of an open file from ``offset``; then compare their CRC-64, if known.

    Raises IntegrityError, also for a file that has become shorter.
    """
    crc = done = 0
    while done < size:
        try:
            data = os.pread(fd, min(CHUNK, size - done), offset + done)
        except OSError as error:
            raise with_path(error, f"layer {layer}: " * bool(layer) + display(name)) from None
        if not data:
            raise shrank(size, done, name, layer)
        done += len(data)
        if checksum is not None:
            crc = crc64(data, crc)
        yield data
    if size and checksum not in (None, crc):
        raise IntegrityError("file integrity checksum failed", layer=layer, name=name,
                             expected=f"CRC-64 {checksum:016x}", actual=f"{crc:016x}")


def shrank(size: int, done: int, name: bytes, layer: str) -> IntegrityError:
    """Return the error for a file that held ``done`` bytes where ``size`` were promised."""
    return IntegrityError("the file shrank while it was read", layer=layer, name=name,
                          expected=counted(size, "byte"), actual=str(done))


def new_sha256(size: int = CHUNK) -> Any:
    """Return an empty SHA-256: for less than a chunk without OpenSSL, which takes 4 ms to load."""
    if size < CHUNK and "hashlib" not in sys.modules:
        with suppress(ImportError):  # not in a Python that leaves all hashing to OpenSSL
            return __import__("_sha2" if sys.version_info >= (3, 12) else "_sha256").sha256()
    return hashlib.sha256()


def sha256_digest(data: bytes) -> str:
    """Return ``sha256:`` and the hex digest of ``data``."""
    return sha256_of((data,), len(data))


def sha256_of(chunks: Iterable[bytes], size: int = CHUNK) -> str:
    """Return what sha256_digest() does, of ``size`` bytes that come in chunks."""
    digest = new_sha256(size)
    for data in chunks:
        digest.update(data)
    return f"sha256:{digest.hexdigest()}"


# ================================================================================================
# 5. Compression
#
# The standard library reads gzip, bzip2 and xz; its module (Python 3.14) or the zstd program, as a
# filter process, reads zstd.  The reader gets plain bytes, or a FormatError that names the file.
# ================================================================================================

def gunzip(fd: int, file: str) -> Iterator[bytes]:
    """Yield the content of a gzip file of one or more members; FormatError for damage."""
    data = os.read(fd, READ_SIZE)
    total, parts, size, members = 0, [], 0, 0
    try:
        while True:
            inflate = zlib.decompressobj(wbits=31)
            while not inflate.eof:
                if not data:
                    raise FormatError("truncated gzip stream", file=file, offset=total)
                piece = inflate.decompress(data, 8 * READ_SIZE)
                data = inflate.unconsumed_tail or inflate.unused_data or os.read(fd, READ_SIZE)
                parts.append(piece)
                size += len(piece)
                if size >= READ_SIZE or inflate.eof and not data:  # a member can be of one byte
                    total += size
                    yield b"".join(parts)
                    parts, size = [], 0
            if not data:
                return
            members += 1
            if members > total + size + MAX_EMPTY:
                raise FormatError(f"more than {MAX_EMPTY} empty gzip members", file=file)
    except zlib.error as error:
        raise FormatError(f"damaged gzip stream: {error}", file=file, offset=total) from None


class ChunkFile(io.RawIOBase):
    """A raw file of what ``chunks`` yields; an error stays one, however often it is read on."""

    def __init__(self, chunks: Iterable[bytes],
                 on_close: Callable[[], object] = lambda: None) -> None:
        self._chunks, self._on_close = iter(chunks), on_close
        self._view = memoryview(b"")
        self._failed: BaseException | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._on_close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        if self._failed:
            raise self._failed
        try:
            while not self._view:
                if (data := next(self._chunks, None)) is None:
                    return 0
                self._view = memoryview(data)
        except BaseException as error:
            self._failed = error
            raise
        count = min(len(buffer), len(self._view))
        buffer[:count], self._view = self._view[:count], self._view[count:]
        return count


class Decompressed(Closing):
    """Reads a file, or stdin for "-", decompressed: plain, gzip, bzip2, xz or zstd.

    Of a descriptor ``fd``, which it owns, ``path`` is the name in errors.  It never seeks, so a
    pipe will do.  Raises FormatError for a damaged stream, Unsupported where nothing reads zstd.
    """

    def __init__(self, path: str, fd: int = -1) -> None:
        self.path = path
        self._damage: tuple[type[Exception], ...] = ()
        if fd < 0:
            fd = os.dup(0) if path == "-" else open_input(path)
        self._raw = open(fd, "rb", buffering=0)
        with OnError(self._raw.close):
            self._reader = self._open()

    def close(self) -> None:
        self._reader.close()
        self._raw.close()

    def tell(self) -> int:
        """Return how many bytes of the file were read, -1 of a pipe."""
        with suppress(OSError):
            return os.lseek(self._raw.fileno(), 0, os.SEEK_CUR)
        return -1

    def _open(self) -> Any:
        """Return what reads the file, by its first bytes."""
        with ErrorsAs(with_path, self.path):
            magic = read_up_to(self._raw.fileno(), 6)
        chunks = self._read_on(magic)
        file = io.BufferedReader(ChunkFile(chunks), 2 * READ_SIZE)
        if magic.startswith(b"\x1f\x8b"):
            self._damage = EOFError, zlib.error, gzip.BadGzipFile
            return gzip.GzipFile(fileobj=file)
        if magic.startswith(b"BZh"):
            self._damage = EOFError, OSError
            return bz2.BZ2File(file)
        if magic == b"\xfd7zXZ\0":
            self._damage = EOFError, lzma.LZMAError
            return lzma.LZMAFile(file)
        if magic.startswith(b"\x28\xb5\x2f\xfd"):
            try:
                zstd = __import__("compression.zstd", fromlist=["ZstdFile"])  # Python 3.14
            except ImportError:
                program = ZstdProgram("-dc", path=self.path)
                return io.BufferedReader(ChunkFile(program.run(chunks), program.close), CHUNK)
            self._damage = EOFError, zstd.ZstdError
            return zstd.ZstdFile(file)
        return file

    def _read_on(self, first: bytes) -> Iterator[bytes]:
        """Yield the file, whose first bytes have been read."""
        with ErrorsAs(with_path, self.path):
            yield first
            yield from iter(lambda: self._raw.read(CHUNK), b"")

    def pieces(self, size: int = CHUNK, step: int = CHUNK) -> Iterator[bytes]:
        """Yield the content in pieces of ``size`` bytes; the last one can be shorter.

        That can be the one before damage, which takes up to ``step`` decompressed bytes with it.
        """
        parts, left = [], size
        try:
            while part := self._reader.read1(min(left, step) if self._damage else left):
                parts.append(part)
                left -= len(part)
                if not left:
                    yield b"".join(parts)
                    parts, left = [], size
            yield b"".join(parts)
        except Exception as error:
            yield b"".join(parts)
            if not isinstance(error, self._damage) or isinstance(error, OSError) and error.errno:
                raise
            raise FormatError(f"damaged: {error}", file=self.path) from None


class ZstdProgram(Closing):
    """The program zstd as a filter, run with ``words``.

    It reads a file at ``path``, or without one writes.  Raises FormatError when what it reads is
    damaged, Unsupported when there is no such program, CstorError when it fails otherwise.
    """

    def __init__(self, *words: str, path: str = "") -> None:
        self._path, pipe = path, subprocess.PIPE
        self._program: Any = None
        try:
            self._program = spawn(["zstd", "-q", *words], bufsize=0, stdin=pipe, stdout=pipe,
                                  stderr=pipe)
        except (FileNotFoundError, PermissionError):
            raise Unsupported(f"{path or '--compress zstd'}: zstd needs Python 3.14 or the program "
                              "zstd", hint="" if path else "--compress gzip needs nothing"
                              ) from None
        except OSError as error:
            raise with_path(error, "zstd") from None
        self._source, self._sink = self._program.stdin, self._program.stdout
        os.set_blocking(self._source.fileno(), False)
        self._poll = select.poll()
        for file, event in ((self._source, select.POLLOUT), (self._sink, select.POLLIN)):
            widen_pipe(file.fileno())
            self._poll.register(file, event)

    def run(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield what the program makes of ``chunks``."""
        for chunk in chunks:
            yield from self.feed(chunk)
        yield from self.finish()

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Give ``data`` to the program; yield what it has ready meanwhile."""
        view, source, sink = memoryview(data), self._source.fileno(), self._sink.fileno()
        while view:
            if sink in dict(self._poll.poll()):
                yield os.read(sink, CHUNK) or self._fail()
                continue
            try:
                view = view[os.write(source, view):]
            except BrokenPipeError:
                self._fail()

    def finish(self) -> Iterator[bytes]:
        """Yield what is left once all was fed."""
        self._source.close()
        yield from iter(lambda: os.read(self._sink.fileno(), CHUNK), b"")
        if self._program.wait():
            self._fail()

    def _fail(self) -> NoReturn:
        words = self._program.stderr.read().decode("utf-8", "replace").strip()
        if self._path:
            raise FormatError(f"damaged: {words}", file=self._path)
        raise CstorError(f"zstd failed with status {self._program.wait()}: {words}")

    def kill(self) -> None:
        """Let nothing wait for the program any more."""
        self._program.kill()

    def close(self) -> None:
        self.kill()
        self._program.wait()
        for file in (self._source, self._sink, self._program.stderr):
            file.close()


class Threads:
    """Up to ``count`` threads; where the system or this Python has none for us, submit() works."""

    def __init__(self, count: int) -> None:
        self._threads: list[Any] = []
        self._missing = count  # they start with the first job

    def _start(self) -> None:
        count, self._missing = self._missing, 0
        with suppress(ImportError, RuntimeError):  # RuntimeError: can't start new thread
            self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
            for _ in range(count):
                thread = threading.Thread(target=self._run, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _run(self) -> None:
        for run in iter(self._jobs.get, None):
            run()

    def submit(self, call: Callable[[], object]) -> Callable[[], Any]:
        """Have a call made; return what waits for its end, and returns or raises what it does."""
        outcome: list[Any] = []  # value, error
        running = allocate_lock()
        running.acquire()

        def run() -> None:
            try:
                outcome[:] = call(), None
            except BaseException as error:  # handed over in result()
                outcome[:] = None, error
            running.release()

        def result() -> Any:
            while not outcome:  # a signal that comes just before a wait does not end it
                if running.acquire(timeout=0.5):
                    running.release()
            value, error = outcome
            if error:
                raise error
            return value

        if self._missing:
            self._start()
        if self._threads:
            self._jobs.put(run)
        else:
            run()
        return result

    def close(self, patience: float | None = None) -> None:
        """Wait for the threads to do what was submitted, and end; harmless when repeated."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(patience)


class GzipWriter(Closing):
    """Compresses what is written to it in several threads, and passes it on to ``write``.

    Blocks are compressed for themselves, each with the end of the one before as its dictionary, as
    pigz does: only level and zlib decide the bytes.  The header holds neither name nor time.
    """

    BLOCK_SIZE = 256 << 10
    DICTIONARY = 32 << 10

    def __init__(self, write: Callable[[bytes], object], level: int = 6) -> None:
        self._write, self._level = write, level
        threads = min(os.cpu_count() or 1, 8)
        self._threads, self._most = Threads(threads), threads + 2
        self._blocks: list[Callable[[], Any]] = []  # those that are compressed now
        self._buffer, self._before = bytearray(), b""
        self._crc = self._size = 0
        write(b"\x1f\x8b\x08\0\0\0\0\0%c\xff" % {1: 4, 9: 2}.get(level, 0))

    def write(self, data: bytes | memoryview) -> int:
        """Take uncompressed bytes; they may be changed afterwards."""
        self._buffer += data
        while len(self._buffer) > self.BLOCK_SIZE:
            self._compress(bytes(self._buffer[:self.BLOCK_SIZE]), last=False)
            del self._buffer[:self.BLOCK_SIZE]
        return len(data)

    def _compress(self, block: bytes, *, last: bool) -> None:
        self._crc = zlib.crc32(block, self._crc)
        self._size += len(block)
        before, self._before = self._before, block[-self.DICTIONARY:]
        self._blocks.append(self._threads.submit(lambda: self._deflate(block, before, last)))
        while self._blocks and (last or len(self._blocks) > self._most):
            self._write(self._blocks.pop(0)())

    def _deflate(self, block: bytes, dictionary: bytes, last: bool) -> bytes:
        deflate = zlib.compressobj(self._level, zlib.DEFLATED, -15, 8, zlib.Z_DEFAULT_STRATEGY,
                                   dictionary)
        return deflate.compress(block) + deflate.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)

    def finish(self) -> None:
        """Write what is left and the trailer."""
        self._compress(bytes(self._buffer), last=True)
        self._write(self._crc.to_bytes(4, "little") + (self._size % 2**32).to_bytes(4, "little"))
        self.close()

    def close(self) -> None:
        self._threads.close()


class ZstdWriter(Closing):
    """Compresses by Python's compression.zstd (3.14), or else by the program zstd."""

    def __init__(self, write: Callable[[bytes], object], level: int = 3) -> None:
        self._write = write
        self._program: ZstdProgram | None = None
        try:
            zstd = __import__("compression.zstd", fromlist=["ZstdCompressor"])
            self._compressor: Any = zstd.ZstdCompressor(level)
        except ImportError:
            self._program = ZstdProgram("-c", f"-{level}", "-T0")

    def write(self, data: bytes | memoryview) -> int:
        for part in self._program.feed(data) if self._program \
                else (self._compressor.compress(data),):
            self._write(part)
        return len(data)

    def abort(self) -> None:
        if self._program:
            self._program.kill()

    def finish(self) -> None:
        for part in self._program.finish() if self._program else (self._compressor.flush(),):
            self._write(part)

    def close(self) -> None:
        if self._program:
            self._program.close()


def parse_compression(text: str) -> tuple[str, int]:
    """Return the kind and level of ``none``, ``gzip[:1-9]`` or ``zstd[:1-19]``; ValueError."""
    if not (match := re.fullmatch(r"none|gzip(?::([1-9]))?|zstd(?::(1?[1-9]|10))?", text)):
        raise ValueError(f'expected none, gzip[:1 to 9] or zstd[:1 to 19], got "{text}"')
    kind = text.partition(":")[0]
    return kind, int(match[1] or match[2] or {"none": 0, "gzip": 6, "zstd": 3}[kind])


# ================================================================================================
# 6. Configuration
#
# storage.conf as containers/storage finds it.  Two schemes are in use, and they disagree:
#   old (up to c/storage 1.62)  one file.  Root's own counts only if $XDG_CONFIG_HOME is set.  For a
#                               rootless user the system's file sets only driver and
#                               rootless_storage_path, and his own file replaces it
#   new (1.63 and later)        one main file and drop-ins from six directories, merged key by key;
#                               graphroot of any file holds for everybody
# podman 4 and 5 follow the old one, podman 6 the new one.  What is on disk decides; "own" is the
# graph root of the old scheme, and "other" that of the new one if it differs:
#
#   own store   other graph root                                   what is read
#   there       named by root's configuration, readable or not     own
#   there       a store that a drop-in of the caller names         other, with a warning
#   there       anything else that the caller names                own, with a warning
#   unreadable  no store that a drop-in of the caller names        own: permission denied
#   missing     a store that the caller owns, or names             other
#   missing     another user's, readable or not                    nothing: no storage at OWN
#   missing     missing                                            nothing: no storage at OWN
#
# All files count as root's own.  A rootless user's are those below $XDG_CONFIG_HOME or ~/.config
# and those that a variable names.  Only podman 6 reads drop-ins: if there are any, the new scheme
# also holds where both agree on the graph root, and says where a store is still to be made.
# ================================================================================================

class Config:
    """Where the storage is.

    ``driver``, ``graphroot``, ``runroot``, ``imagestore`` ("" = none), ``stores`` (additional image
    stores, in search order), ``layer_stores`` (additional layer stores), ``transient_store``,
    ``rootless``, ``uid``; ``scheme`` is "old", "new" or "environment"; ``files`` lists the
    configuration files that were read, ``named_in`` is the one that names the graph root or "".
    ``faults`` are warnings, ``hint`` tells where else a store was looked for, and ``elsewhere`` the
    store of who called sudo.  ``own``: the caller himself names the graph root, or it is the
    default; ``foreign``: it is another user's; ``lack``: why no store can be read there, or "".
    """

    driver = graphroot = runroot = imagestore = named_in = hint = elsewhere = lack = ""
    stores: Sequence[str] = ()
    layer_stores: Sequence[str] = ()
    drop_ins: Sequence[str] = ()
    own = foreign = transient_store = False

    def __init__(self, scheme: str, rootless: bool, uid: int) -> None:
        self.rootless, self.uid, self.scheme = rootless, uid, scheme
        self.files: list[str] = []
        self.faults: list[str] = []


NO_STORAGE = "no storage there"
CONF_VARIABLES = "CONTAINERS_STORAGE_CONF", "CONTAINERS_STORAGE_CONF_OVERRIDE"
READERS = {"old": "podman 4 and 5", "new": "podman 6"}  # which follow each scheme


def load_config(environ: Mapping[str, str] | None = None, *, euid: int | None = None,
                system_root: str = "/") -> Config:
    """Find the storage configuration as containers/storage does.

    ``environ`` and ``euid`` default to this process's; ``system_root`` is put before /etc, /usr and
    the default directories (for tests and for another system's disk).  Raises FormatError with file
    and line for what cannot be understood, OSError for a file that cannot be read.
    """
    search = _ConfigSearch(os.environ if environ is None else environ,
                           os.geteuid() if euid is None else euid, system_root)
    found: list[Config] = []
    failures: list[Exception] = []
    for scheme in (search.old_scheme, search.new_scheme):
        try:
            found.append(scheme())
        except (CstorError, OSError) as error:  # in a file that the other may not look at
            failures.append(error)
    if failures and (not found or found[0].foreign or found[0].lack):
        raise failures[0]
    config, other = found[0], found[-1]
    config.faults += [f"{READERS['new' if config.scheme == 'old' else 'old']} cannot read the "
                      f"configuration: {failure}" for failure in failures]
    if search.decide(config, other):
        config, other = other, config
    search.explain(config, other)
    return config


def holds_store(root: str, drivers: Iterable[str] = (*DRIVERS, *OTHER_DRIVERS)) -> bool:
    """Tell whether one of the drivers keeps images in ``root``; PermissionError if unknown."""
    return any(is_there(os.path.join(root, driver + end)) for driver in drivers
               for end in ("", "-layers", "-images"))


def stores_near(path: str, name: str = "") -> list[str]:
    """Return the graph roots around ``path``, of those that hold the file ``name``."""
    # People often name a directory above or below the one meant: a disk's root, a home, docker's.
    path = os.path.abspath(path)
    above, end = os.path.dirname(path), ".local/share/containers/storage"
    places = [path[:at] for at, char in enumerate(path) if char == "/" and at]
    places += [os.path.join(path, base, "storage") for base in (
        "", "containers", "../containers", "lib/containers", "var/lib/containers",
        "share/containers", ".local/share/containers", "root/.local/share/containers")]
    for parent, base in ((path, end), (os.path.join(path, "home"), end),
                         *([(path, ""), (above, "")] if name else [])):
        if os.path.isdir(parent) and os.access(parent, os.R_OK | os.X_OK):
            places += [os.path.join(parent, entry, base) for entry in sorted(os.listdir(parent))]
    found: dict[str, str] = {}
    for place in map(os.path.normpath, places):
        with suppress(OSError):  # permission denied
            if place != path and holds_store(place) and is_there(os.path.join(place, name)):
                found[os.path.realpath(place)] = place
    return list(found.values())[:3]


def is_docker(root: str) -> bool:
    """Tell whether a directory is Docker's, which can hold ``overlay`` or ``vfs`` as well."""
    return is_there(os.path.join(root, "image")) and is_there(os.path.join(root, "containers"))


def no_store(root: str, option: str = "--root") -> CstorError:
    """Return the error for a directory that holds no store; its hint names those around it."""
    near = [f"{option} {path}" for path in stores_near(root)]
    hint = f"use {' or '.join(near)}" if near else ""
    if is_docker(root) or is_docker(os.path.dirname(root)):
        return Unsupported(f"{root} is Docker's, which is not containers/storage",
                           hint=hint or "`docker save` writes archives that `podman load` reads")
    word = "containers/storage store" if os.path.isdir(root) else "storage"
    return NotFound(f"no {word} at {root}", hint=hint or f"name a graph root, the directory that "
                    f"holds overlay-images, with {option} DIR")


def is_there(path: str) -> bool:
    """Tell whether a file is there; errors other than its absence are raised."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)
        return True
    return False


def find_user(who: int | str) -> Any:
    """Return the passwd entry of a user ID or name, None when there is none."""
    with suppress(ImportError, KeyError):
        return pwd.getpwuid(who) if isinstance(who, int) else pwd.getpwnam(who)
    return None


class _ConfigSearch:
    """One search for configuration files with one environment."""

    def __init__(self, environ: Mapping[str, str], euid: int, system_root: str) -> None:
        if bad := [name for name, value in environ.items() if not can_be_path(value)]:
            raise FormatError("holds a NUL byte", file=f"environment variable {bad[0]}")
        self.environ, self.system_root = environ, system_root
        self.rootless = euid != 0
        self.uid = self.euid = euid
        outer = environ.get("_CONTAINERS_ROOTLESS_UID", "")
        if environ.get("_CONTAINERS_USERNS_CONFIGURED") and re.fullmatch("0*[1-9][0-9]*", outer):
            self.rootless, self.uid = True, int(outer)  # root only inside podman unshare
        self.home = environ.get("HOME") or str(getattr(find_user(self.uid), "pw_dir", "/"))
        self.user_file = os.path.join(environ.get("XDG_CONFIG_HOME") or os.path.join(
            self.home, ".config"), "containers/storage.conf")
        self._sources: dict[str, str] = {}  # of each key, the file that set it
        self._files: dict[str, Toml] = {}  # what was read, mostly by both schemes

    def system(self, path: str) -> str:
        return os.path.join(self.system_root, path)

    def decide(self, own: Config, other: Config) -> bool:
        """Tell whether the new scheme's ``other`` wins over the old one's; see the banner."""
        if own is other or other.foreign:
            return False
        if os.path.realpath(own.graphroot) == os.path.realpath(other.graphroot):
            return bool(other.drop_ins)
        if other.own and other.named_in in other.drop_ins and not other.lack:
            return True
        return own.lack == NO_STORAGE and bool(other.drop_ins or not other.lack)

    def explain(self, config: Config, other: Config) -> None:
        """Say where else a store was looked for, and warn of a configuration that is ignored."""
        data = self.environ.get("XDG_DATA_HOME")
        parts = [f"{config.named_in} names it" if config.named_in else
                 f"the default for XDG_DATA_HOME={data}" if self.rootless and data else
                 f"the default for HOME={self.home}" if self.rootless else "the default"]
        if os.path.realpath(config.graphroot) != os.path.realpath(other.graphroot):
            place = f"{other.graphroot} ({other.named_in or 'the default'})"
            parts.append(f"{place} is another user's" if other.foreign else
                         f"looked also at {place}")
            if other.own and (other.named_in or not other.lack):
                config.faults.append(f"{READERS[other.scheme]} would use {place}"
                                     + (other.lack and f": {other.lack}"))
        config.elsewhere = self._store_of_sudo_user()
        config.hint = "; ".join([*parts, *filter(None, [config.elsewhere]),
                                 "name a graph root with --root DIR"])

    def _store_of_sudo_user(self) -> str:
        """Name the graph root of the user who called sudo, if a store is there; else ""."""
        name = self.environ.get("SUDO_USER", "root")
        if not self.euid and name != "root" and (user := find_user(name)):
            with suppress(CstorError, OSError):  # it would only be a hint
                root = _ConfigSearch({"HOME": user.pw_dir, "USER": name}, user.pw_uid,
                                     self.system_root).old_scheme().graphroot
                if holds_store(root):
                    return f"{name}'s storage is at {root}: run it without sudo, or use --root " \
                           + root
        return ""

    def old_scheme(self) -> Config:
        if self.environ.get("CONTAINERS_STORAGE_CONF_OVERRIDE"):
            return self.new_scheme()  # no older tool knows it
        config = Config("old", self.rootless, self.uid)
        if (named := self.environ.get("CONTAINERS_STORAGE_CONF")) is not None:
            values = self._read(named, config)
        elif not self.rootless:
            values = self._read_main(config, bool(self.environ.get("XDG_CONFIG_HOME")))
        else:
            values = self._read_main(config, False)
            own = self._has_user_file()  # it replaces all but this
            values = {key: value for key, value in values.items() if key.endswith("_storage_path")
                      or key == "storage.driver" and not own}
            values.update(self._read(self.user_file, config) if own else {})
        return self._finish(config, values)

    def new_scheme(self) -> Config:
        config = Config("new", self.rootless, self.uid)
        if named := self.environ.get("CONTAINERS_STORAGE_CONF"):
            values = self._read(named, config)
        else:
            values = self._read_main(config, True)
            config.drop_ins = self._drop_ins()
        override = self.environ.get("CONTAINERS_STORAGE_CONF_OVERRIDE")
        for path in (*config.drop_ins, *([override] if override else [])):
            values.update(self._read(path, config, values))
        return self._finish(config, values)

    def _drop_ins(self) -> list[str]:
        """Return drop-ins, sorted by file name; of one name the highest directory's counts."""
        kinds = [f"rootless.conf.d/{self.uid}", "rootless.conf.d"] if self.rootless \
            else ["rootful.conf.d"]
        dirs = [f"{self.user_file}.d/", *(
            self.system(f"{base}/containers/storage.{kind}/") for base in ("etc", "usr/share")
            for kind in (*kinds, "conf.d"))]
        chosen = {name: folder + name for folder in filter(is_there, reversed(dirs))
                  for name in os.listdir(folder)
                  if name.endswith(".conf") and not os.path.isdir(folder + name)}
        return [chosen[name] for name in sorted(chosen)]

    def _read_main(self, config: Config, own: bool) -> dict[str, Any]:
        """Read the first main file there is, the user's own only where it counts."""
        paths = [self.user_file] if own and self._has_user_file() else list(filter(is_there, (
            self.system(f"{base}/containers/storage.conf") for base in ("etc", "usr/share"))))
        return self._read(paths[0], config) if paths else {}

    def _has_user_file(self) -> bool:
        try:
            return is_there(self.user_file)
        except PermissionError:
            raise NeedsUnshare(f"{self.user_file}: Permission denied", hint="HOME and "
                               "XDG_CONFIG_HOME must name directories that you can read") from None

    def _read(self, path: str, config: Config, before: Mapping[str, Any] = {}
              ) -> dict[str, Any]:
        named = [name for name in CONF_VARIABLES if self.environ.get(name) == path]
        if named and not is_there(path):
            raise NotFound(f'{named[0]} names a file that does not exist: "{display(path)}"',
                           hint="unset it, or let it name a storage.conf")
        if path not in self._files:
            data = b"" if path == os.devnull else read_whole(open_input(path), MAX_SPECIAL, path)
            self._files[path] = Toml(data, path)
        config.files.append(path)
        values = self._files[path].settings(before)
        self._sources.update(dict.fromkeys(values, path))
        return values

    def _finish(self, config: Config, values: dict[str, Any]) -> Config:
        """Fill in merged keys, environment and defaults, and judge what is there."""
        config.driver = self.environ.get("STORAGE_DRIVER") or values.get("storage.driver") or ""
        if config.driver == "overlay2":
            config.driver = "overlay"
        config.transient_store = bool(values.get("storage.transient_store", False))
        config.imagestore = values.get("storage.imagestore") or ""
        config.stores = self._stores(values, "additionalimagestore", "imagestore")
        config.layer_stores = self._stores(values, "additionallayerstore")
        data, run = self.system("var/lib"), self.system("run/containers/storage")
        if self.rootless:
            data = self.environ.get("XDG_DATA_HOME") or os.path.join(self.home, ".local/share")
            run = self.system(f"run/user/{self.uid}")
            if not os.path.isdir(run):
                run = os.path.join(self.environ.get("TMPDIR") or "/tmp", f"storage-run-{self.uid}")
            run = os.path.join(self.environ.get("XDG_RUNTIME_DIR") or run, "containers")
        config.graphroot = (
            self.environ.get("CONTAINERS_GRAPHROOT") or self._path(values, "graphroot")
            or self.rootless and self._path(values, "rootless_storage_path")
            or os.path.join(data, "containers/storage"))
        config.runroot = (self.environ.get("CONTAINERS_RUNROOT") or self._path(values, "runroot")
                          or run)
        config.named_in = next((self._sources[key] for key in (
            "storage.graphroot", "storage.rootless_storage_path")[:1 + self.rootless]
            if values.get(key)), "")
        if self.environ.get("CONTAINERS_GRAPHROOT"):
            config.scheme, config.named_in = "environment", "CONTAINERS_GRAPHROOT"
        self._judge(config)
        return config

    def _judge(self, config: Config) -> None:
        """Find out whose a graph root is, and what is there."""
        config.own = not self.rootless or config.named_in.startswith(
            os.path.dirname(self.user_file) + "/") or config.named_in in (
            "", *map(self.environ.get, CONF_VARIABLES))
        try:
            config.lack = "" if holds_store(config.graphroot) else NO_STORAGE
            config.foreign = not config.own and is_there(config.graphroot) \
                and os.stat(config.graphroot).st_uid != self.euid
        except OSError as error:
            config.lack, config.foreign = error.strerror or "unreadable", not config.own

    def _stores(self, values: dict[str, Any], *keys: str) -> list[str]:
        """Return the additional stores of one kind: STORAGE_OPTS replaces all driver options."""
        # The drivers take their options imagestore and additionalimagestore for the same.
        if not (given := self.environ.get("STORAGE_OPTS")):
            return list(values.get(f"storage.options.{keys[0]}s", []))
        stores, key = [], ""
        for item in given.split(","):  # a value can hold commas itself
            if "=" in item:
                key, _, item = item.partition("=")
                key = re.sub(r"^(overlay2?|vfs)?\.", "", key.strip().lower())
            if key in keys and item:
                stores.append(item)
        return stores

    def _path(self, values: dict[str, Any], key: str) -> str:
        """Expand $UID, then $NAME and ${NAME} as Go's os.ExpandEnv, then links when it exists."""
        path = (values.get("storage." + key) or "").replace("$UID", str(self.uid))
        path = re.sub(r"\$(?:\{([^}]*)\}|(\w+))",
                      lambda m: self.environ.get(m[1] or m[2] or "", ""), path, flags=re.ASCII)
        if path and not os.path.isabs(path):
            raise FormatError(f"{key} is not an absolute path: {display(path)}",
                              file=self._sources["storage." + key])
        return os.path.realpath(path) if path and os.path.exists(path) else path


def sub_ids(uid: int, file: str = "/etc/subuid") -> list[tuple[int, int]]:
    """Return the ranges (first ID, count) that a user has in /etc/subuid or a file like it, sorted.

    In this order podman maps them to the IDs from 1 on.  [] when there are none, or the file cannot
    be read; what only NSS knows is not seen.  A passwd beside the file has the user's names.
    """
    def read(path: str) -> str:
        with suppress(OSError, FormatError):
            return os.fsdecode(read_whole(open_input(path), MAX_SPECIAL, path))
        return ""

    etc = os.path.dirname(file)
    users = re.findall(r"^([^:\n]+):[^:\n]*:(\d+):", read(etc + "/passwd"), re.M)
    names = {str(uid), *(name for name, number in users if int(number) == uid)}
    if not users or etc == "/etc":
        names.add(getattr(find_user(uid), "pw_name", ""))
    found = re.findall(r"^[ \t]*([^:#\s]+):(\d{1,10}):0*([1-9]\d{0,9})[ \t]*$", read(file), re.M)
    return sorted((int(first), int(count)) for name, first, count in found if name in names)


def owner_ranges(uid: int, given: str, below: str, made_at: str = ""
                 ) -> list[list[tuple[int, int]]]:
    """Return the sub-uids and the sub-gids of who owns the store at ``below``; see sub_ids().

    The machine that wrote the store counts.  ``given`` is a file for both, or a directory like
    /etc.  Without it etc/ of the nearest directory above that has etc/subuid or etc/passwd serves:
    a disk's, or at last that of "/", but not for a store that podman made at another path,
    ``made_at``.  Raises NotFound when ``given`` has none.
    """
    above = os.path.realpath(below)
    moved = made_at and (not can_be_path(made_at) or os.path.realpath(made_at) != above)
    while not (given or above == "/" or os.path.lexists(above + "/etc/subuid")
               or os.path.lexists(above + "/etc/passwd")):
        above = os.path.dirname(above)
    if moved and above == "/" and not given:  # from another machine, or a copy: nobody knows
        return [[], []]
    etc = given or os.path.join(above, "etc")
    found = [sub_ids(uid, os.path.join(etc, name) if os.path.isdir(etc) else given)
             for name in ("subuid", "subgid")]
    if given and not found[0]:
        raise NotFound(f"{given} has no range of uid {uid}, who owns the store"
                       if os.path.exists(given) else f"no such file or directory: {given}",
                       hint=f"write lines like {uid}:100000:65536, or name a directory like /etc")
    return found


class Toml:
    """A parser of TOML 1.1, which podman 6 reads; older ones read 1.0.

    It takes what BurntSushi's decoder takes: a byte order mark, and headers and dotted keys that
    add to one another's tables.  ``root`` is all, with numbers and times as bytes, settings() what
    concerns us; it and the constructor raise FormatError with file and line.
    """

    SETTINGS: dict[str, tuple[type[Any], str]] = {
        "storage.transient_store": (bool, "boolean"),
        "storage.options.additionalimagestores": (list, "list of strings"),
        "storage.options.additionallayerstores": (list, "list of strings"),
        **{"storage." + key: (str, "string") for key in (
            "driver", "graphroot", "runroot", "imagestore", "rootless_storage_path")}}
    SPACE = "[ \t]*"
    GAP = "(?:[ \t\n]|#[^\n]*)*"  # between lines, and between the elements of an array
    END = r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)"
    BARE = "[A-Za-z0-9_-]+"
    ESCAPE = (r'\\([btnfre"\\]|x[0-9A-Fa-f]{2}|u(?![dD][89A-Fa-f])[0-9A-Fa-f]{4}'
              r"|U(?!0000[dD][89A-Fa-f])00(?:0[0-9A-Fa-f]|10)[0-9A-Fa-f]{4}|[ \t]*\n[ \t\n]*|)")
    SHORT = r'"((?:[^"\\\n]|\\.)*)"', r"'([^'\n]*)'"
    LONG = (r'"""\n?((?:[^"\\]|\\[\s\S]|""?(?!"))*"{0,2})"""',
            r"'''\n?((?:[^']|''?(?!'))*'{0,2})'''")
    ESCAPES = dict(zip('btnfre"\\', '\b\t\n\f\r\x1b"\\'))
    WORD = r"[A-Za-z0-9_.:+-]+(?:(?<=\d{4}-\d\d-\d\d) \d[0-9.:Zz+-]*)?"
    DIGITS = "[0-9](?:_?[0-9])*"
    CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
    TIME = rf"{CLOCK}(?::[0-5][0-9](?:\.[0-9]+)?)?"
    SCALAR = (rf"[+-]?(?:inf|nan|(?:0|[1-9](?:_?[0-9])*)(?:\.{DIGITS})?(?:[eE][+-]?{DIGITS})?)"
              "|0x[0-9A-Fa-f](?:_?[0-9A-Fa-f])*|0o[0-7](?:_?[0-7])*|0b[01](?:_?[01])*"
              rf"|([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}})(?:[Tt ]{TIME}(?:[Zz]|[+-]{CLOCK})?)?|{TIME}")

    def __init__(self, data: bytes, file: str) -> None:
        self.file, self.at = file, 0
        self._places: dict[tuple[int, str], int] = {}  # of each key of a table, by its id()
        self._whole: set[int] = set()  # tables and arrays that a header or braces made, by id()
        self.root: dict[str, Any] = {}
        try:
            self.text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise FormatError("not UTF-8", file=file,
                              line=data.count(b"\n", 0, error.start) + 1) from None
        self._parse()

    def settings(self, before: Mapping[str, Any] = {}) -> dict[str, Any]:
        """Return what concerns us as {"storage.key": value}, whatever the case of the keys.

        An array replaces that of ``before``, the files read earlier, or adds to it if it says so.
        """
        found: dict[str, Any] = {}
        tables = [("", self.root)]
        for above, table in tables:
            # Go's decoder matches names whatever their case; the exact one shall win.
            for key in sorted(table, key=str.islower):
                name, value, self.at = above + key.lower(), table[key], self._places[id(table), key]
                if "." in key:
                    continue
                if name in ("storage", "storage.options"):
                    if not isinstance(value, dict):
                        self._refuse(f'"{name}" must be a table')
                    tables.append((name + ".", value))
                elif name in self.SETTINGS:
                    found[name] = self._setting(name, value, before)
        return found

    def _setting(self, name: str, value: Any, before: Mapping[str, Any]) -> Any:
        kind, word = self.SETTINGS[name]
        if kind is list and isinstance(value, list):
            # {append=true} among the elements: they follow those of earlier files.
            marks = [item for item in value if item in ({"append": True}, {"append": False})]
            value = [*(before.get(name, ()) if marks and marks[-1]["append"] else ()),
                     *(item for item in value if item not in marks)]
        strings = value if isinstance(value, list) else [value] * (kind is str)
        if not isinstance(value, kind) or not all(isinstance(item, str) for item in strings):
            self._refuse(f'"{name}" must be a {word}')
        if any("\0" in item for item in strings):
            self._refuse(f'"{name}" holds a NUL byte')
        return value

    def _parse(self) -> None:
        if stray := re.search("[\0-\x08\x0b-\x1f\x7f]", self.text):
            self.at = stray.start()
            self._refuse(f'control character "{display(stray[0])}"')
        table = self.root
        try:
            while self._match(self.GAP) is not None and self.at < len(self.text):
                if self.text.startswith("[", self.at):
                    table = self._header()
                else:
                    self._pair(table)
                self._match(self.END, "the end of the line")
        except RecursionError:
            self._refuse("nested too deeply")

    def _header(self) -> dict[str, Any]:
        """Read the name of a table, or of the next one of an array; return it."""
        start, brackets = self.at, self._match(r"\[\[?") or ""
        *above, last = self._keys()
        end = "]" * len(brackets)
        self._match(end, end)
        table, is_array = self._below(self.root, above, start), end == "]]"
        self._places.setdefault((id(table), last), start)
        new: Any = [] if is_array else {}
        made = table.setdefault(last, new)
        if type(made) is not type(new) or made is not new and is_array != (id(made) in self._whole):
            self._refuse(f'"{".".join([*above, last])}" is defined twice')
        self._whole.add(id(made))
        if is_array:
            made.append({})
        return self._below(table, [last], start)

    def _below(self, table: dict[str, Any], keys: Sequence[str], place: int) -> dict[str, Any]:
        """Return the table that ``keys`` lead to, made where it is missing."""
        for key in keys:
            below = table.setdefault(key, {})
            self._places.setdefault((id(table), key), place)
            if isinstance(below, list) and id(below) in self._whole:
                below = below[-1]
            if not isinstance(below, dict):
                self._refuse(f'"{key}" is not a table')
            table = below
        return table

    def _pair(self, table: dict[str, Any]) -> None:
        start = self.at
        *above, last = self._keys()
        self._match("=" + self.SPACE, "=")
        value = self._value()
        table = self._below(table, above, start)
        if last in table:
            self.at = start
            self._refuse(f'"{".".join([*above, last])}" is defined twice')
        table[last], self._places[id(table), last] = value, start

    def _keys(self) -> list[str]:
        parts: list[str] = []
        while not parts or self._match("[.]"):
            self._match(self.SPACE)
            part = self._match(self.BARE)
            parts.append(self._string(self.SHORT, "a key") if part is None else part)
            self._match(self.SPACE)
        return parts

    def _value(self) -> Any:
        if self.text.startswith(('"', "'"), self.at):
            is_long = self.text.startswith(('"""', "'''"), self.at)
            return self._string(self.LONG if is_long else self.SHORT, "a string and its end")
        if self.text.startswith("[", self.at):
            values: list[Any] = []
            self._items("]", lambda: values.append(self._value()))
            return values
        if self.text.startswith("{", self.at):
            table: dict[str, Any] = {}
            self._whole.add(id(table))
            self._items("}", lambda: self._pair(table))
            return table
        place, word = self.at, self._match(self.WORD) or ""
        match = re.fullmatch(self.SCALAR, word)
        try:
            if match and match[1]:
                time.strptime(match[1], "%Y-%m-%d")
            return match[0].encode() if match else {"true": True, "false": False}[word]
        except (KeyError, ValueError):
            self.at = place
            self._refuse(f'malformed value "{display(word[:40])}"' if word else "expected a value")

    def _string(self, patterns: Sequence[str], wanted: str) -> str:
        """Read a string, with escapes or without."""
        literal = self.text.startswith("'", self.at)
        if not (match := re.compile(patterns[literal]).match(self.text, self.at)):
            self._refuse(f"expected {wanted}")
        text = match[1] if literal else re.sub(self.ESCAPE, self._escape, match[1])
        self.at = match.end()
        return text

    def _escape(self, match: re.Match[str]) -> str:
        if not (code := match[1]):
            self._refuse(f'malformed escape in "{display(match.string[:40])}"')
        if code[-1] in " \t\n":  # the string goes on at the next word
            return ""
        return self.ESCAPES.get(code) or chr(int(code[1:], 16))

    def _items(self, end: str, read: Callable[[], None]) -> None:
        """Read the items in brackets; a comma may follow the last one."""
        self.at += 1
        while self._match(self.GAP + re.escape(end)) is None:
            self._match(self.GAP)
            read()
            self._match(f"{self.GAP}(?:,|(?={re.escape(end)}))", f"a comma or {end}")

    def _match(self, pattern: str, wanted: str = "") -> str | None:
        """Return what matches ``pattern`` and go behind it; else None, or refuse if ``wanted``."""
        match = re.compile(pattern).match(self.text, self.at)
        if not match and wanted:
            self._refuse(f"expected {wanted}")
        self.at = match.end() if match else self.at
        return match[0] if match else None

    def _refuse(self, message: str) -> NoReturn:
        raise FormatError(message, file=self.file, line=self.text.count("\n", 0, self.at) + 1)


# ================================================================================================
# 7. Records
#
# Each kind of object is one JSON array per driver (overlay or vfs) and root of a storage.  Unknown
# fields are kept; a field of the wrong type or a reference to nothing becomes a fault of its record
# and hides no other.  "Big data" (manifests, configurations, TOCs) are files of their own.
# ================================================================================================

COMPRESSION = ("none", "bzip2", "gzip", "xz", "zstd")  # archive.Compression in Go, by number
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
TAR_SPLIT = b".tar-split.gz"  # end of a file's name beside layers.json


def is_safe_id(text: str) -> bool:
    """Tell whether an ID may become one component of a path."""
    # containers/storage takes any `create-layer --id`, also "../../evil" (seen with 4.3.1).
    return bool(text) and len(text) < 200 and text not in (".", "..") and text.isprintable() \
        and "/" not in text


def big_data_file(key: str) -> bytes:
    """Return the file name of a big data item, by the rule of makeBigDataBaseName in Go.

    The key itself when all of it, but perhaps the last character, is one of ``a-z0-9.``; otherwise
    "=" and its base64.  Raises FormatError for a key that would leave the directory.
    """
    name = key.encode("utf-8", "surrogatepass")
    if re.match(r"[a-z0-9.]*(?:.\Z|\Z)", key, re.DOTALL):
        name = name.rstrip(b"/")  # the last character may be one: path.Join drops it
    else:
        name = b"=" + binascii.b2a_base64(name, newline=False)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise FormatError(f'big data key that cannot be a file name: "{display(key)}"')
    return name


def is_schema1(manifest: bytes) -> bool:
    """Tell whether a manifest is docker schema1, whose digest leaves out the signatures in it."""
    with suppress(FormatError):
        return parse_object(manifest, "manifest").get("schemaVersion") == 1
    return False


def is_index(manifest: Any) -> bool:
    """Tell whether a manifest is a list of manifests."""
    return isinstance(manifest, dict) and (
        manifest.get("mediaType") in (OCI_INDEX, DOCKER_LIST) or "manifests" in manifest)


class Record:
    """What layers, images and containers have in common.

    ``record`` is the JSON object as stored; ``root`` the Directory that holds it; ``faults`` what
    is wrong with it, in words.  ``id``, ``names``, ``created`` (RFC 3339), ``metadata``,
    ``big_data_names``, ``flags``, ``volatile`` and ``readonly`` (of an additional store); ``lost``
    for a record that was lost, with what Salvage found; ``label``, kind and ID; the ``storage``.
    """

    WORD = ""
    lost = False  # whether it was made by Salvage

    def __init_subclass__(cls) -> None:
        fields = str(Record.__doc__).partition(".")[2]
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}{fields}"  # pydoc shows no other class's

    def __init__(self, storage: Storage, root: Contents, record: Any, *, volatile: bool = False,
                 readonly: bool = False) -> None:
        self.storage, self.root = storage, root
        self._faults: list[str] = []
        if not isinstance(record, dict):
            self._faults.append("the record is not a JSON object")
        self.record = record = as_dict(record)
        # Go's decoder matches names whatever their case, the exact one first.
        self._fields = record if all(map(str.islower, record)) \
            else {**{key.lower(): value for key, value in record.items()}, **record}
        self.volatile, self.readonly = volatile, readonly
        self.id = self._field("id", "")
        self.label = f"{self.WORD} {self.id}"
        self.names = self._strings("names")
        self.created = self._field("created", "")
        self.metadata = self._field("metadata", "")
        self.big_data_names = self._strings("big-data-names")
        self.flags: dict[str, Any] = self._field("flags", {})
        self._sizes: dict[str, Any] = self._field("big-data-sizes", {})  # not of layers
        self._digests: dict[str, Any] = self._field("big-data-digests", {})
        if not is_safe_id(self.id):
            self._faults.append(f'unusable ID "{display(self.id)}"')
        self._read_fields()

    def _read_fields(self) -> None:
        """Read the other fields of this kind of record."""

    @cached_property
    def faults(self) -> list[str]:
        """What is wrong, in words; other records and files are looked at only now."""
        try:
            self._look()
        except (CstorError, OSError) as error:
            self._faults.append(re.sub(f"^{self.WORD} {re.escape(self.id)}: ", "", str(error)))
        return self._faults

    def _look(self) -> None:
        """Raise what is wrong with the objects that the record names."""

    def _unproven(self, layers: Sequence[Layer]) -> list[str]:
        """Say what was lost: the record, and the digests of how many of its layers."""
        if not self.storage.salvage:
            return []
        count = sum(layer.lost and not layer.proven for layer in layers)
        return ["its record is lost"] * self.lost + [
            f"{counted(count, 'layer')} not verified"] * bool(count)

    def checked_chain(self) -> tuple[Layer, ...]:
        """Return the layers that contents come from, base first, when they are the right ones."""
        try:
            return self._chain()
        except CstorError as error:
            add_hint(error, "`layer list` and the other `layer` commands still read what is there")
            raise

    def _chain(self) -> tuple[Layer, ...]:
        return ()

    def tree(self) -> Tree:
        """Return the tree of its files."""
        raise NotImplementedError

    def extract(self, directory: str, *, paths: Sequence[str] = (), exclude: Sequence[str] = (),
                strip: int = 0, whiteouts: bool = True, force: bool = False,
                clean: bool | None = None, link_mode: str = "auto", owners: bool | None = None,
                owner_map: Sequence[str] = (), verify: bool = False, workers: int = 0,
                progress: Progress | None = None) -> dict[str, Any]:
        """Put its files into a directory, those of a layer alone; see extract_tree()."""
        options: Any = {**locals()}
        with options.pop("self").tree() as tree:
            return extract_tree(tree, **options)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {display(self.id)}>"

    @property
    def title(self) -> str:
        """What people call it: its first name, or the start of its ID."""
        return display(self.names[0] if self.names else self.id[:12])

    def _field(self, key: str, default: T) -> T:
        """Return a field, or ``default`` when it is missing, null or of another type."""
        if (value := self._fields.get(key)) is None \
                or type(value) is type(default) is not int:  # as usual
            return default if value is None else value
        if not isinstance(value, type(default)) or isinstance(value, bool) \
                or isinstance(value, int) and not -1 << 63 <= value < 1 << 63:
            self._faults.append(f'field "{key}" must be of type {type(default).__name__}')
            return default
        return value

    def _strings(self, key: str) -> list[str]:
        values: list[Any] = self._field(key, [])
        found = [value for value in values if isinstance(value, str)]
        if len(found) < len(values):
            self._faults.append(f'field "{key}" holds more than strings')
        return found

    def path(self, name: bytes = b"", home: bytes = b"") -> bytes:
        """Return the name below the root of a file in this object's own directory."""
        if not is_safe_id(self.id):
            raise FormatError(f'unusable {self.WORD} ID "{display(self.id)}"')
        return b"/".join((home or self.storage.home(self.WORD), self.id.encode(), name))

    @property
    def created_ns(self) -> int | None:
        """Creation time in nanoseconds since 1970; None when unknown."""
        with suppress(FormatError):
            return parse_time(self.created) if self.created else None
        return None

    def big_data(self, key: str) -> bytes:
        """Return the item ``key``, checked against its recorded size and sha256 digest.

        Raises NotFound, FormatError when it is recorded but missing, IntegrityError.
        """
        name, label = self.path(big_data_file(key)), f"{self.label}: "
        fd, path = self.storage.open_first(name, self.root)
        if fd < 0 and key in self.big_data_names:
            raise FormatError(f'{label}big data item "{display(key)}" is recorded, but missing')
        if fd < 0:
            raise NotFound(f'{label}no big data item "{display(key)}"')
        size, digest, actual = self._sizes.get(key), self._digests.get(key), os.fstat(fd).st_size
        if isinstance(size, int) and size != actual:
            os.close(fd)
            raise IntegrityError(f"{path}: wrong size", expected=f"{size:x} (hex)"
                                 if abs(size) >> 64 else str(size), actual=str(actual))
        data = read_whole(fd, MAX_BIG_DATA, path)
        if isinstance(digest, str) and digest.startswith("sha256:"):
            found = sha256_digest(data)
            if found != digest and not (key.startswith("manifest") and is_schema1(data)):
                raise IntegrityError(f"{path}: wrong digest", expected=digest, actual=found)
        return data


class Layer(Record):
    """One layer, a record of layers.json; see Storage.layer() and Image.layers().

    ``parent`` is a layer ID or "".  ``diff_digest`` is the DiffID of the uncompressed tar or "",
    ``diff_size`` its bytes or -1 when unknown; ``compressed_diff_digest`` and
    ``compression`` (a word) describe the blob as it was pulled; ``toc_digest`` that of partial
    pulls.  ``uidmap`` and ``gidmap`` are lists of {container_id, host_id, size}; ``mapped`` layers
    have one, as copies of others for other user IDs.  ``incomplete`` tells whether its creation or
    removal has not finished.  The DiffID of a layer whose record is ``lost`` is what an image makes
    of it until it is ``proven``: computed, or a container's record says that there is none.
    """

    WORD = "layer"
    UNFINISHED = "its creation or removal has not finished"  # Go sets the flag before either
    _damage: list[str] | None = None
    proven, unverified = False, ""

    def _read_fields(self) -> None:
        self.parent = self._field("parent", "")
        self.compressed_diff_digest = self._field("compressed-diff-digest", "")
        self.diff_digest = self._field("diff-digest", "")
        # Go omits 0: an empty blob has a digest and no size; without a digest nothing is known.
        self.diff_size = self._field("diff-size", 0 if self.diff_digest else -1)
        self.toc_digest = self._field("toc-digest", "")
        number = self._field("compression", 0)
        self.compression = COMPRESSION[number] if 0 <= number < len(COMPRESSION) else str(number)
        self.uidmap: list[Any] = self._field("uidmap", [])
        self.gidmap: list[Any] = self._field("gidmap", [])
        self.mapped = bool(self.uidmap or self.gidmap)
        self.incomplete = self.flags.get("incomplete") is True
        if self.incomplete:
            self._faults.append(f"incomplete: {self.UNFINISHED}")

    def _look(self) -> None:
        self._faults += self._unproven([self]) + self.damage()
        self._faults += [f"parent {layer.id} is incomplete" for layer in self.storage.chain(
            self.id)[:-1] if layer.incomplete][-1:]

    def has_diff_id(self, digest: Any) -> bool:
        """Tell whether this is the layer of a DiffID, as far as the record can be believed."""
        # podman 4.3.1 imports bzip2 and xz with the digest of the compressed file.
        return not self.diff_digest or digest in (self.diff_digest, self.compressed_diff_digest) \
            or is_safe_id(self.id) and self.overlay_file(b"additionallayer")[0] is not None

    @property
    def link_id(self) -> str:
        """The 26 characters that stand for this layer in overlay/l; "" when they are lost."""
        return self.read_overlay_file(b"link")

    def damage(self) -> list[str]:
        """Return which of its files are missing or empty, as far as lstat(2) tells."""
        if self._damage is None:
            self._damage = [f"{place.decode()} is {word}" for _, place, word in self.gaps()]
        return self._damage

    def gaps(self) -> Iterator[tuple[str, bytes, str]]:
        """Yield what of its files is "missing" or "empty", as (what, place below a root, word)."""
        home, is_vfs = self.storage.home(), self.storage.driver == "vfs"
        if self.incomplete or not is_safe_id(self.id) or not is_vfs and self._is_usual(home):
            return
        self.storage._folders = {}  # replaced? A thread may still use the old ones
        for what, end in (("layer-dir", b""), ("diff", b"/diff"), ("link", b"/link")):
            place = self.id.encode() + end
            word = self._state(home, place)
            if word and (what == "link" or not self.overlay_file(b"additionallayer")[0] and (
                    word == "missing" or not end and not is_vfs or self._has_files())):
                yield what, home + b"/" + place, word
            if not end and (word or is_vfs):
                break
        if self.diff_digest:
            home, _, place = self.tar_split.partition(b"/")
            word = self._state(home, place)
            if word and not self.overlay_file(b"additionallayer")[0]:
                yield "tar-split", self.tar_split, word

    def _is_usual(self, home: bytes) -> bool:
        """Tell by four calls whether all is there; only if not, gaps() looks at each file."""
        storage, name = self.storage, self.id.encode()
        with suppress(OSError):
            folder = storage.folder(self.root, home)
            if stat.S_ISDIR(os.lstat(name, dir_fd=folder.fd).st_mode):
                diff = os.lstat(name + b"/diff", dir_fd=folder.fd)
                link = split = os.lstat(name + b"/link", dir_fd=folder.fd)
                if self.diff_digest:
                    near = storage.folder(self.root, storage.home(self.WORD))
                    split = os.lstat(name + TAR_SPLIT, dir_fd=near.fd)
                return stat.S_ISREG(link.st_mode) and stat.S_ISREG(split.st_mode) \
                    and link.st_size > 0 < split.st_size and stat.S_ISDIR(diff.st_mode) and (
                        diff.st_nlink > 2 or self.diff_size <= 2 * BLOCK
                        or bool(folder.list_at(folder.fd, name + b"/diff")))
        return False

    def _state(self, home: bytes, place: bytes) -> str:
        """Say whether a file is "missing" or "empty", without the helper; "" when nobody knows.

        What is behind a symbolic link is missing if that leads out of the root or to no directory.
        """
        top, _, below = place.partition(b"/")
        for root in [self.root, *self.storage.roots]:
            try:
                folder = self.storage.folder(root, home)
                is_link = below and stat.S_ISLNK(os.lstat(top, dir_fd=folder.fd).st_mode)
                with Directory.directory(root, home + b"/" + top) if is_link \
                        else nullcontext(folder) as near:
                    at = below if is_link else place
                    found = os.lstat(at, dir_fd=near.fd)
                    if stat.S_ISDIR(found.st_mode):  # one that holds no directory can be empty
                        return "empty" * (found.st_nlink <= 2 and not near.list_at(near.fd, at))
                if not place.endswith(TAR_SPLIT) and not (
                        below == b"link" and stat.S_ISREG(found.st_mode)):
                    os.close(open_in_root(root.fd, home + b"/" + place))
                return "" if found.st_size else "empty"
            except (FileNotFoundError, NotADirectoryError):
                pass
            except PermissionError:
                return ""
            except OSError as error:
                raise with_path(error, root.host_path(home + b"/" + place)) from None
        return "missing"

    def _has_files(self) -> bool:
        """Tell whether by its tar something has to be in "diff"."""
        with suppress(CstorError, OSError):  # what cannot be read is another fault
            return not self.mapped and not self.toc_digest and self.diff_size > 2 * BLOCK and any(
                member.type in ("reg", "dir", "symlink") and clean_name(member.name)
                and b".wh." not in member.name for member in self.members())
        return False

    def overlay_file(self, name: bytes) -> tuple[Contents | None, bytes]:
        """Return (root that has overlay/<id>/name or None, that name below it)."""
        # Of vfs, "diff" is the whole tree vfs/dir/<id>, and nothing else is there.
        path, whole = self.path(name, self.storage.home()), self.storage.driver == "vfs"
        path = os.path.dirname(path) if whole else path
        return None if whole and name != b"diff" else self.storage.find(path, self.root), path

    def read_overlay_file(self, name: bytes) -> str:
        """Return a small text file of overlay/<id>, "" when it is missing."""
        root, path = self.overlay_file(name)
        return root.read(path, 64 << 10).decode("utf-8", "replace").strip() if root else ""

    def lower_ids(self) -> list[str]:
        """Return the IDs of the overlay lower chain, top first.

        ``lower-layers`` (c/storage 1.63 and later) holds IDs, ``lower`` holds l/<link>.  Below a
        mapped layer is its template, not its parent.  Raises LayerUnknown, FormatError.
        """
        if text := self.read_overlay_file(b"lower-layers"):
            found = text.split(":")
        else:
            found = [self.storage.resolve_link(item[2:] if item.startswith("l/") else item)
                     for item in self.read_overlay_file(b"lower").split(":") if item]
        if len(found) > MAX_LOWERS or not all(map(is_safe_id, found)):
            raise FormatError("malformed lower chain", file=f"layer {self.id}")
        return found

    def diff(self) -> Contents:
        """Open the directory of its files.  Raises LayerUnknown, Unsupported when it is gone."""
        root, path = self.overlay_file(b"diff")
        if root is None:
            why = self.UNFINISHED if self.incomplete else f"no {path.decode()}"
            raise self.removed() or Unsupported(f"layer {self.id}: its files are gone: {why}")
        return root.directory(path)

    def additional(self) -> Contents | None:
        """Open the files that an additional layer store has of it; None when they are our own.

        The storage names the place, so it is opened below a configured store only, and nothing else
        is touched there: looking at ``use`` would take and release the layer.  Raises Unsupported.
        """
        root, path = self.overlay_file(b"additionallayer")
        if root is None:
            return None
        place = root.read(path, 64 << 10).strip()
        for store in self.storage.layer_stores:
            top = os.fsencode(re.sub(":ref$", "", store).rstrip("/")) + b"/"
            if place.startswith(top):
                with Directory.at(os.fsdecode(top)) as directory:
                    name = clean_name(place[len(top):]) + b"/diff"
                    return Contents(self.storage, directory.directory(name))
        raise Unsupported(f"layer {self.id}: its files are in an additional layer store that is "
                          f"not configured: {display(place)}",
                          hint="additionallayerstores in storage.conf names it, without --root")

    def removed(self, name: bytes = b"") -> LayerUnknown | None:
        """Return an error if its record has changed or is gone, else None."""
        if self.storage.is_current(self):
            return None
        what = f'"{display(name)}"' if name else "it"
        return LayerUnknown(f"layer not known: {self.id}: it was removed while {what} was read")

    @property
    def tar_split(self) -> bytes:
        """The name below the root of its tar-split file."""
        return self.path()[:-1] + TAR_SPLIT

    def open_tar_split(self) -> tuple[int, str]:
        """Open its tar-split file; return (descriptor, host path).  Unsupported says why not."""
        fd, path = self.storage.open_first(self.tar_split, self.root)
        if fd >= 0:
            return fd, path
        hint = ""
        if self.overlay_file(b"additionallayer")[0]:
            why = "it comes from an additional layer store"
        elif gone := self.removed():
            raise gone
        elif self.incomplete:
            why = self.UNFINISHED
        elif not (diff := self.overlay_file(b"diff")[0]) or self.diff_digest or self.toc_digest:
            why = "it was pulled without, or the file is lost" if diff \
                else "its files are gone as well"
            near = stores_near(self.root.path, os.fsdecode(self.tar_split)) or ["GRAPHROOT"]
            hint = (f"in a split store it is below the graph root: use --root {near[0]} "
                    f"--imagestore {self.root.path}")
        else:
            why = "it is the writable layer of a container, or was made by create-layer"
        raise Unsupported(f"layer {self.id} has no tar-split data: {why}; its tar cannot be "
                          "rebuilt", hint=hint)

    def members(self) -> Iterator[Member]:
        """Yield the members of the tar, in order, from the headers alone."""
        return (member for _, member, _ in LayerReader(self).headers() if member)

    def items(self) -> Generator[Item, None, None]:
        """Yield (bytes, member whose content follows or None, its content), together the tar."""
        return LayerReader(self).items()

    def pieces(self) -> Generator[bytes | Extent, None, None]:
        """Yield the tar as bytes and Extents; an Extent is good until the next piece."""
        return join_pieces(self.items())

    def open_file(self, path: bytes) -> BinaryIO:
        """Open the content of a regular file of this layer by its name in the tar."""
        check_type("path", path, bytes)
        with LayerFiles(self) as files:
            return open(files.open(path), "rb")

    def export(self, out: int | BinaryIO | None, *, verify: bool = True,
               progress: Progress | None = None,
               also: Callable[[bytes | Extent], object] | None = None) -> str:
        """Write the tar, bit for bit, to a descriptor or a binary file, with None nowhere.

        Returns its sha256 digest, equal to ``diff_digest``; "" when ``verify`` is false.  ``also``
        is given each piece as well.  When the digest is wrong or unknown, CRC-64 finds the file at
        fault.  Raises IntegrityError (the tar is no good), Unsupported, FormatError, NeedsUnshare.
        """
        sink = TarSink(out, hashing=verify, layer=self.id, progress=progress)
        digest = sink.take_all(self.pieces(), also)
        if verify and digest != self.diff_digest:
            self.check_files()
            if self.diff_digest:
                raise IntegrityError("its tar has the wrong digest, though all files match their "
                                     "checksums: tar-split data or layers.json was changed",
                                     layer=self.id, expected=self.diff_digest, actual=digest)
        if verify and self.lost:
            self.proven = digest == self.diff_digest or digest in self.storage.named
            self._mark("" if self.proven else f"no image names its DiffID {digest}")
        return digest

    def _mark(self, why: str) -> None:
        """Warn that nothing proves what the layer is, with "" no more."""
        marks = self.storage.unverified
        marks[:] = [text for text in marks if text != self.unverified]
        self.unverified = why and f"layer {self.id}: not verified: {why}"
        marks += [self.unverified] * bool(why)

    def verify(self, *, quick: bool = False, workers: int = 0, progress: Progress | None = None
               ) -> list[Finding]:
        """Return all that is damaged, [] for a sound layer.

        The digest of its tar, each file's type, size and CRC-64, and each header's checksum must be
        as recorded; with ``quick`` no content is read.  Raises NeedsUnshare, LayerUnknown.
        """
        return verify_layers([self], quick=quick, workers=workers, progress=progress)

    def check_files(self) -> int:
        """Check the CRC-64 of every file; return their number.  Raises IntegrityError."""
        count = 0
        for piece in join_pieces(LayerReader(self, whole=True).items()):
            if isinstance(piece, Extent):
                for _ in read_checked(piece.fd, piece.length, checksum=piece.member.checksum,
                                      name=piece.member.name, layer=self.id):
                    pass
                count += 1
        return count

    def tree(self) -> Tree:
        """Return the tree of this layer alone, with its whiteouts."""
        return Tree([self.own_tree()], f"layer {self.id[:12]}", raw=True)

    def own_tree(self) -> LayerTree:
        """Return its own tree: from tar-split, or from disk where a layer never has that.

        When records are salvaged, also from disk where its tar-split data are lost.
        """
        doubted = self.lost and not self.proven
        salvage = self.storage.salvage and not self.incomplete
        if self.storage.find(self.tar_split, self.root) and not (salvage and self._is_cut()):
            if doubted:
                self._mark("its record is lost (what compares the digest of its tar proves it: "
                           "--verify, verify, exports of layers)")
            return LayerTree(self)
        if additional := self.additional():
            tree = DiskTree(additional, self)
            tree.maps = []  # owners are those of the image
            return tree
        if salvage and (doubted or self.diff_digest) and not keeps_objects(self):
            self._mark("its tar-split data are missing or damaged, so that only its directory is "
                       "read")
        elif doubted or self.diff_digest or self.toc_digest or self.incomplete:
            return LayerTree(self)
        return DiskTree(self.diff(), self, overlay=self.storage.driver != "vfs")

    def _is_cut(self) -> bool:
        """Tell whether its tar-split data cannot be read to the end."""
        with suppress(FormatError, IntegrityError):
            return any(False for _ in LayerReader(self).headers())
        return True

    def toc(self, *, digests: bool = False) -> dict[str, Any]:
        """Return the table of contents: members in the order of the tar, whiteouts among them."""
        return {"version": 1, "entries": list(layer_toc(self, digests=digests))}


class Image(Record):
    """One image, a record of images.json; see Storage.image() and Storage.images().

    ``digest`` is that of the first manifest ever seen or ""; ``layer`` the ID of the top layer or
    ""; ``mapped_layers`` are its copies for other user IDs; ``names_history`` newest first;
    ``digests`` all by which it can be asked for.
    """

    WORD = "image"

    def _read_fields(self) -> None:
        self.digest = self._field("digest", "")
        self.layer = self._field("layer", "")
        self.names_history = self._strings("names-history")
        self.mapped_layers = self._strings("mapped-layers")
        self.digests = {digest for key, digest in [("manifest", self.digest),
                                                   *self._digests.items()]
                        if digest and isinstance(digest, str) and key.startswith("manifest")}
        if "manifest" not in self.big_data_names:
            self._faults.append("no manifest")

    def _look(self) -> None:
        chain = self.storage.chain(self.layer)
        self._faults += self._unproven(chain)
        for layer in chain:
            self._faults += [f"layer {layer.id}: {fault}" for fault in (
                layer.faults if layer is chain[-1] and not layer.lost else layer.damage())]
        if not self.is_list and not self._chain() and self.diff_ids() is None:
            self._faults.append("no layer")

    def manifest(self) -> dict[str, Any]:
        """Return the default manifest, parsed: OCI, docker schema2 or schema1, or a list."""
        return parse_object(self.big_data("manifest"), f"manifest of image {self.id}")

    @property
    def is_list(self) -> bool:
        """Whether this is a manifest list (OCI index): it has no layer and no config."""
        with suppress(CstorError, OSError):  # said to who asks for the manifest, or the layers
            return not self.layer and is_index(self.manifest())
        return False

    def list_bytes(self) -> bytes:
        """Return the manifest list that this is, or was pulled through, as stored; else b""."""
        for key in ("manifest", f"manifest-{self.digest}", *self.big_data_names[::-1]):
            if key.startswith("manifest") and key in self.big_data_names:
                data = self.big_data(key)
                if is_index(parse_json(data, f"{key} of image {self.id}")):
                    return data
        return b""

    def entries(self) -> list[tuple[dict[str, Any], Image | None]]:
        """Return each descriptor of the manifest list, and its image if the storage has it."""
        images = [image for image in self.storage.images() if image.layer]
        value = parse_json(self.list_bytes() or b"{}", f"manifest list of image {self.id}")
        return [(entry, next((image for image in images
                              if str(entry.get("digest")) in image.digests), None))
                for entry in as_list(value.get("manifests")) if isinstance(entry, dict)]

    def instances(self) -> list[tuple[str, Image]]:
        """Return (``os/arch[/variant]``, image) for each entry that the storage has."""
        return [(platform_name(entry.get("platform")), image)
                for entry, image in self.entries() if image]

    def single(self, platform: str = "") -> Image:
        """Return this image, or of a manifest list the instance for os/arch[/variant].

        Raises NotFound when it is not here; Unsupported if "", for this machine, was asked for.
        """
        if not self.is_list:
            have = platform_name(self.config()) if platform else ""
            if platform and not best_platform([(have, self)], platform):
                raise NotFound(f"image {self.title} is for {have}, not {platform}")
            return self
        instances = self.instances()
        for image in best_platform(instances, platform, self.title):
            return image
        names = ", ".join(f"{image.id[:12]} ({name})" for name, image in instances)
        raise Unsupported(f"image {self.id} is a manifest list without an instance for this "
                          "machine", hint=f"its instances here: {names or 'none'}")

    def config_bytes(self, manifest: dict[str, Any] | None = None) -> bytes:
        """Return the image configuration as stored; for schema1 as containers/image makes it.

        ``manifest`` is parsed already.  Raises Unsupported for a list, NotFound without manifest.
        """
        manifest = self.manifest() if manifest is None else manifest
        if manifest.get("schemaVersion") == 1:
            # As Go marshals a map: keys sorted, and what HTML minds escaped.
            text = json.dumps(dict(sorted(self._schema1_config(manifest).items())),
                              separators=(",", ":"), ensure_ascii=False)
            return re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text).encode(
                "utf-8", "replace")
        if not isinstance(digest := as_dict(manifest.get("config")).get("digest"), str):
            raise Unsupported(f"image {self.id}: " + (
                "it is a manifest list, which has no configuration" if self.is_list
                else "its manifest names no configuration"))
        return self.big_data(digest)

    def config(self, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the image configuration, parsed."""
        return parse_object(self.config_bytes(manifest), f"configuration of image {self.id}")

    @cached_property
    def _summary(self) -> dict[str, Any]:
        """What lists need of the configuration, which is read once."""
        manifest = self.manifest()
        config = self.config(manifest)
        steps = as_list(config.get("history"))
        labels = as_dict(as_dict(config.get("config")).get("Labels"))
        found = as_dict(config.get("rootfs")).get("diff_ids")
        # Go writes null for none.
        found = found if isinstance(found, list) else None if self.layer else []
        if manifest.get("schemaVersion") == 1:
            # It names layers as they were pulled, but there must be some.
            found = None if self.layer else [row for row in steps if not row.get("empty_layer")]
        return {**platform_in(config), "diff-ids": found, "history": steps,
                "labels": {key: str(value) for key, value in labels.items()}}

    @property
    def about(self) -> dict[str, Any]:
        """What the configuration says: architecture, os, labels ...; {} when it is not readable."""
        with suppress(CstorError, OSError):
            return self._summary
        return {}

    @cached_property
    def steps(self) -> tuple[str, ...]:
        """The steps of its history, spelled in one way whatever wrote the configuration."""
        keys = "created_by", "author", "comment", "empty_layer"
        return tuple(repr((go_moment(step.get("created")), *(step.get(key) or "" for key in keys)))
                     for step in map(as_dict, self.about.get("history", ())))

    @property
    def architecture(self) -> str:
        """The machine that the configuration names, as Go does; "" when it is not readable."""
        return str(self.about.get("architecture", ""))

    @property
    def labels(self) -> dict[str, str]:
        """The labels of the configuration."""
        return self.about.get("labels") or {}

    @property
    def repo_digests(self) -> list[str]:
        """Each repository that it has a name of, with each digest of its manifests."""
        repositories = [split_reference(name)[0] for name in self.names]
        return sorted({f"{name}@{digest}" for name in repositories for digest in self.digests})

    def diff_ids(self) -> list[Any] | None:
        """Return the DiffIDs of the configuration, base first; None when it does not tell."""
        found: list[Any] | None = None
        with suppress(NotFound, Unsupported):  # made with no manifest or no configuration
            found = self._summary["diff-ids"]
        return found

    def _chain(self) -> tuple[Layer, ...]:
        chain, wanted = self.storage.chain(self.layer), self.diff_ids()
        if wanted in (None, [layer.diff_digest for layer in chain]):
            return chain
        below = len(wanted) - len(chain)
        if below < 0 or not all(layer.has_diff_id(digest) for layer, digest in
                                zip(chain, wanted[below:])):
            raise self.wrong_layers(wanted, [layer.diff_digest for layer in chain])
        if below:  # a record does not name the next layer
            raise FormatError(f"image {self.id}: " + (
                f"layer {chain[0].id} has no parent" if chain else "no layer")
                + ", but the configuration names more")
        return chain

    def wrong_layers(self, wanted: Sequence[Any], found: Sequence[str]) -> CstorError:
        """Return the error for layers that are not those of the configuration."""
        return IntegrityError(
            f"image {self.id}: its layers are not those that its configuration names",
            expected=" ".join(map(str, wanted)), actual=" ".join(found))

    def _schema1_config(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Derive a configuration from v1Compatibility, whose entries are newest first."""
        texts = [as_dict(item).get("v1Compatibility") for item in as_list(manifest.get("history"))]
        entries = [parse_object(
            text.encode("utf-8", "replace") if isinstance(text, str) else b"null",
            f"history in the manifest of image {self.id}") for text in texts]
        if not entries:
            raise Unsupported(f"image {self.id}: its schema1 manifest has no history")
        drop = ("id", "parent", "parent_id", "layer_id", "throwaway", "Size")
        config = {key: value for key, value in entries[0].items() if key not in drop}
        history = []
        for entry in reversed(entries):
            command = as_dict(entry.get("container_config")).get("Cmd")
            row = {"created": entry.get("created"), "author": entry.get("author"),
                   "created_by": " ".join(map(str, as_list(command))),
                   "comment": entry.get("comment"), "empty_layer": entry.get("throwaway") or None}
            history.append({key: value for key, value in row.items() if value})
        diff_ids = [layer.diff_digest for layer in self.storage.chain(self.layer)]
        return {**config, "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history}

    @property
    def size(self) -> int:
        """Bytes as ``podman images`` counts, mapped layers as well; -1 if unknown."""
        data = sum(size for size in self._sizes.values() if isinstance(size, int)
                   and 0 <= size < 1 << 63)
        with suppress(CstorError):
            tops = [self.layer, *filter(self.storage.layer_by_id, self.mapped_layers)]
            layers = set(chain.from_iterable(map(self.storage.chain, tops)))
            if any(layer.lost and layer.diff_size < 0 for layer in layers):
                return -1
            data += sum(max(layer.diff_size, 0) for layer in layers)
        return data

    def history(self) -> list[dict[str, Any]]:
        """Return the history, oldest first, with ``layer`` and ``size`` for entries that made one.

        Lower layers that it does not tell of come first, as podman aligns them; if it tells of
        more than there are, nobody knows which made which, and all come last.
        """
        layers = [{"layer": layer.id, "size": layer.diff_size}
                  for layer in self.storage.chain(self.layer)]
        rows = [{key: value for key, value in entry.items() if key not in ("layer", "size")}
                for entry in map(as_dict, as_list(self.config().get("history")))]
        made = [row for row in rows if not row.get("empty_layer")]
        below = len(layers) - len(made)
        if below < 0:
            for row in made:
                row["size"] = -1
            return rows + layers
        for row, layer in zip(made, layers[below:]):
            row.update(layer)
        return layers[:below] + rows

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers, base first.  Raises LayerUnknown, FormatError."""
        return self.storage.chain(self.layer)

    def verify(self, *, quick: bool = False, workers: int = 0, progress: Progress | None = None
               ) -> list[Finding]:
        """Return all that is damaged in it and its layers; see Layer.verify()."""
        return verify_images([self], quick=quick, workers=workers, progress=progress)

    def tree(self, known: dict[str, LayerTree] | None = None, platform: str = "") -> Tree:
        """Return the merged tree, of a manifest list that of an instance: see single().

        ``known`` keeps the trees of layers by ID, to be shared with other images.
        """
        return merged_tree(self.single(platform).checked_chain(), f"image {self.title}", known)

    def export(self, out: int | BinaryIO, form: str = "rootfs", *, names: Sequence[str] = (),
               platform: str = "", verify: bool = False, progress: Progress | None = None) -> None:
        """Write its files as one tar, or an archive, to a descriptor or binary file.

        ``form`` is rootfs, docker-archive or oci-archive; an archive gives it ``names``, and always
        verifies its layers.  write_docker_archive() and write_oci_archive() take several images.
        """
        check_words("form", [form], ("rootfs", *ARCHIVES))
        image = self.single(platform)
        if form == "rootfs":
            with image.tree() as tree:
                tree.export(out, verify=verify, progress=progress)
        else:
            ARCHIVES[form](out, [(image, check_words("names", names))], progress)

    def blame(self, patterns: Sequence[str] = (), *, hidden: bool = False, platform: str = ""
              ) -> Iterator[dict[str, Any]]:
        """Yield the layer and step of each file, and what it hides; or all ``hidden`` files."""
        image = self.single(platform)
        with image.tree() as tree:
            yield from blame_tree(tree, image, patterns, hidden)

    def copy_to_oci(self, directory: str, tag: str = "", *, compression: str = "none",
                    platform: str = "", every: bool = False, progress: Progress | None = None,
                    tell: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
        """Add the image to an OCI layout; see copy_to_oci()."""
        return copy_to_oci(self, directory, tag, compression=compression, platform=platform,
                           every=every, progress=progress, tell=tell)

    def toc(self, *, digests: bool = False) -> dict[str, Any]:
        """Return the table of contents of the merged tree, sorted; see toc_entry()."""
        with self.tree() as tree:
            return {"version": 1, "entries": list(tree_toc(tree, digests=digests))}


class Container(Record):
    """One container, a record of containers.json; see Storage.container().

    ``image`` ("" for ``podman --rootfs``) and ``layer`` are IDs; ``uidmap``, ``gidmap``: see Layer.
    """

    WORD = "container"

    def _read_fields(self) -> None:
        self.image = self._field("image", "")
        self.layer = self._field("layer", "")
        self.uidmap: list[Any] = self._field("uidmap", [])
        self.gidmap: list[Any] = self._field("gidmap", [])

    def _look(self) -> None:
        if self.image and self.image not in [image.id for image in self.storage.images()]:
            self._faults.append(f"image not known: {display(self.image)}")
        self._faults += self._unproven(self.storage.chain(self.layer)[:-1])
        self._faults += [fault for layer in self._chain()[-1:] for fault in layer.damage()]

    def _chain(self) -> tuple[Layer, ...]:
        for key in ("image", "layer"):  # Go writes both, "" for no image
            if not isinstance(self._fields.get(key), str) or key == "layer" and not self.layer:
                raise FormatError(f"container {self.id}: its record " + (
                    f"is lost, and nothing tells its {key}" if self.lost else f"has no {key}"))
        chain = self.storage.chain(self.layer)
        for image in self.storage.images():  # one layer is the container's own
            if image.id == self.image and len(chain) <= len(image.diff_ids() or ()):
                raise FormatError(f"container {self.id}: layer {chain[0].id} has no parent, but "
                                  "the configuration of its image names more")
        return chain

    def details(self) -> dict[str, Any]:
        """Return ``metadata`` parsed: image-name, name, created-at of podman; pod-name of CRI-O."""
        with suppress(FormatError):  # buildah and others store what they like
            return as_dict(parse_json(self.metadata.encode("utf-8", "replace"), "metadata"))
        return {}

    @property
    def state(self) -> dict[str, Any]:
        """What its engine keeps: engine, name, state, pod, rootfs, ...; {} when that is unknown.

        podman has a database, buildah and CRI-O a file in the container's directory.
        """
        return self.storage.podman_containers().get(self.id) or self._state_in(
            b"buildah.json") or self._state_in(b"state.json" if "pod-id" in self.details() else b"")

    def userdata(self, name: bytes) -> dict[str, Any]:
        """Return an object of JSON that its engine keeps in its directory; {} for any failure."""
        with suppress(CstorError, OSError):
            path = self.path(b"userdata/" + name)
            return parse_object(self.root.read(path, MAX_BIG_DATA), self.root.host_path(path))
        return {}

    def _state_in(self, name: bytes) -> dict[str, Any]:
        if not (said := self.userdata(name)):
            return {}
        if name == b"buildah.json":  # podman calls its containers so
            return {"engine": "buildah", "state": "storage", "name": said.get("container-name"),
                    "image-name": said.get("image"), "mountpoint": said.get("mountpoint", "")}
        return {"engine": "cri-o", "state": str(said.get("status", "")),
                "name": self.details().get("metadata-name"), "exit-code": said.get("exitCode"),
                "pod": self.details().get("pod-name"), "pod-id": self.details().get("pod-id"),
                "pid": said.get("pid"), "started": said.get("started")}

    def sizes(self, known: dict[str, int] | None = None) -> tuple[int, int]:
        """Return what `podman ps --size` does: bytes of files in its writable layer, and below it.

        -1 = unknown.  ``known`` keeps the sizes of layers by ID, for other containers.
        """
        known = {} if known is None else known
        layers: tuple[Layer, ...] = ()
        with suppress(CstorError):
            layers = self.storage.chain(self.layer)
        for layer, below in zip(layers, (None, *layers)):
            if layer.id not in known:
                known[layer.id] = -1
                with suppress(CstorError, OSError):
                    known[layer.id] = files_size(layer, below)
        *rest, own = [known[layer.id] for layer in layers] or [-1]
        return -1 if self.state.get("rootfs") else own, -1 if min([own, *rest]) < 0 else sum(rest)

    @property
    def status(self) -> str:
        """Its state in podman's words: "storage" when another program made it, "" when unknown."""
        unknown = "" if self.details() and not self.storage.podman_containers() else "storage"
        return str(self.state.get("state", unknown))

    @property
    def labels(self) -> dict[str, str]:
        """The labels that podman's database has."""
        return {key: str(value) for key, value in as_dict(self.state.get("labels")).items()}

    @property
    def image_name(self) -> str:
        """The name of the image that it was made of, "" when nobody knows."""
        names = [name for image in self.storage.images() if image.id == self.image
                 for name in image.names]
        return str(self.state.get("image-name") or self.details().get("image-name")
                   or (names[0] if names else ""))

    def export(self, out: int | BinaryIO, *, verify: bool = False,
               progress: Progress | None = None) -> None:
        """Write its files, with the writable layer, as one tar to a descriptor or binary file."""
        with self.tree() as tree:
            tree.export(out, verify=verify, progress=progress)

    def tree(self, known: dict[str, LayerTree] | None = None) -> Tree:
        """Return the merged tree of its image's layers and its own writable one.

        Of ``podman --rootfs`` it is the directory that was given, which is opened only if podman's
        database can be trusted; else NeedsUnshare says why not.
        """
        rootfs = self.state.get("rootfs", "")
        if self.state.get("rootfs-refused"):
            raise NeedsUnshare(f"container {self.title}: its --rootfs directory {display(rootfs)} "
                               f"is not opened: {self.state['rootfs-refused']}",
                               hint="read it on the machine where podman made the container, as "
                                    "the user whose store it is")
        if rootfs:
            try:
                contents = Contents(self.storage, Directory.at(rootfs))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise Unsupported(f"container {self.title}: its --rootfs directory "
                                  f"{display(rootfs)}: {error.strerror}") from None
            return Tree([DiskTree(contents, overlay=False)], f"container {self.title}")
        chain = self.checked_chain()
        if not self.image and not self.state and self.details().get("name"):
            raise Unsupported(f"container {self.title} was made by --rootfs, and the database of "
                              "podman that knows the directory is not read",
                              hint="`container inspect` and `store info` say why")
        tree = merged_tree(chain, f"container {self.title}", known)
        if isinstance(top := tree.layers[0], DiskTree):
            top.writable = True
            if top.layer and not top.layer.uidmap:
                # The layer is mounted with a map.
                top.maps.append((id_ranges(self.uidmap), id_ranges(self.gidmap)))
        return tree


# ================================================================================================
# 8. Storage
#
# A storage joins several roots of one layout: the graph root, the run root (volatile records), a
# split-off imagestore, and additional image stores that are only read.
#
# containers/storage guards each JSON file with a classic POSIX lock on <kind>.lock; its first 64
# bytes are a token that every writer changes.  All podman commands take write locks when they
# start, so a shared lock of ours would hold up even "podman images": it is held for the few
# milliseconds of reading.  The JSON files are replaced by rename(2), so that reading without the
# lock is safe too; only a change between two files has to be noticed, by token and stat.
# ================================================================================================

LEFT = "--salvage reads what is left of the records"
LOCK_TOKEN_SIZE = 64  # "last write" token at the start of a lock file
CONTAINER_STATE = ("unknown", "created", "initialized", "running", "stopped", "paused", "exited",
                   "removing", "stopping")  # podman's define.ContainerStatus, as `podman ps` says
DATABASE_FILES = (b"db.sql", b"db.sql-journal", b"db.sql-wal")
_PODMAN_QUERY = """SELECT c.ID, c.Name, c.JSON, s.State, s.JSON, p.Name,
(SELECT GraphRoot FROM DBConfig)
FROM ContainerConfig c LEFT JOIN ContainerState s ON s.ID = c.ID
LEFT JOIN PodConfig p ON p.ID = c.PodID"""
LOCK_PATIENCE = 0.4  # seconds in all that opening a storage may wait for locks


def read_consistently(root: Directory, lock: bytes, names: Sequence[bytes],
                      patience: Deadline, faults: list[str] | None = None) -> list[bytes]:
    """Read the JSON files ``names`` below ``root`` as one state; b"" for a file that is missing.

    With ``faults`` another type of file counts as missing, and one of them says so.
    ``lock`` is taken shared if it is free within ``patience``.  Without it the files are read
    again while they or the lock's token change, at most ten times.
    """
    lock_fd = -1
    with suppress(OSError, FormatError):  # it is never made
        lock_fd = Directory.open(root, lock)  # a lock is not worth a helper
    with Opened(lock_fd):
        _lock_shared(lock_fd, patience)
        # Also with the lock: it is the process's, and another thread that closes the file drops it.
        for _ in range(10):
            before = _state(root, lock_fd, names)
            data = [_read_json(root, name, faults) for name in names]
            if _state(root, lock_fd, names) == before:
                break
    return data


def _lock_shared(fd: int, patience: Deadline) -> None:
    while fd >= 0:
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except (ImportError, OSError) as error:
            # ENOLCK and the like: a file system without locks (NFS without lockd, some FUSE).
            if not isinstance(error, (BlockingIOError, PermissionError)) or not patience.pause():
                return


def _state(root: Directory, lock_fd: int, names: Sequence[bytes]) -> list[object]:
    """Return what changes whenever a writer was at work."""
    state: list[object] = [os.pread(lock_fd, LOCK_TOKEN_SIZE, 0) if lock_fd >= 0 else None]
    with suppress(OSError):
        state.append(os.stat(root.path).st_ino)
    for name in names:
        state.append(None)
        with suppress(FileNotFoundError, NotADirectoryError):
            status = root.lstat(name)
            state[-1] = status.st_ino, status.st_mtime_ns, status.st_size
    return state


def _read_json(root: Directory, name: bytes, faults: list[str] | None = None) -> bytes:
    try:
        return root.read(name, MAX_JSON)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except FormatError as error:
        if faults is None:
            raise
        faults += [str(error)] * (str(error) not in faults)
        return b""


def drivers_in(root: Directory, *ends: str) -> list[str]:
    """Return the drivers that have one of some files, by the ends of their names, in a root."""
    return [name for name in (*DRIVERS, *OTHER_DRIVERS)
            if any(root.exists(os.fsencode(name + end)) for end in ends)]


class Contents(Directory):
    """A directory of a storage (None: of the host): a root, or one that contents are read from.

    Where permission is denied in it, the storage's opener may have a helper that looks and opens.
    """

    def __init__(self, storage: Storage | None, directory: Directory) -> None:
        super().__init__(directory.path, directory.fd)
        directory.fd = -1
        self.storage = storage
        self._ahead: dict[bytes, int] = {}  # files that the helper opened before they are needed

    def close(self) -> None:
        self.keep({})
        super().close()

    def keep(self, ahead: dict[bytes, int]) -> None:
        """Take the descriptors of files that are needed next, and close those left over."""
        while self._ahead:
            os.close(self._ahead.popitem()[1])
        self._ahead = ahead

    @property
    def opener(self) -> Opener:
        return self.storage.opener if self.storage else Opener()

    def _ask(self, action: Callable[[bytes], T], name: bytes, ask: Callable[[Any], Any]) -> T:
        """Return what ``action`` returns, or where permission is denied what the helper says."""
        try:
            return action(name)
        except NeedsUnshare as error:
            found: T = ask(self.opener.helper(error))
            return found

    def directory(self, name: bytes) -> Contents:
        return Contents(self.storage, self._ask(super().directory, name, lambda helper: Directory(
            self.host_path(name), helper.enter(self.path, name))))

    def lstat(self, name: bytes) -> os.stat_result:
        return self._ask(super().lstat, name, lambda helper: helper.look(self.path, name)[1])

    def readlink(self, name: bytes) -> bytes:
        return self._ask(super().readlink, name, lambda helper: helper.look(self.path, name)[2])

    def inspect(self, name: bytes) -> Any:
        return self._ask(super().inspect, name, lambda helper: helper.look(self.path, name)[1:])

    def listdir(self, name: bytes) -> list[bytes]:
        return self._ask(super().listdir, name, lambda helper: [
            row[0] for row in helper.scan(self.path, name, b"")])

    def scan(self, path: bytes, look: Callable[[int, bytes], Any] = look_at
             ) -> Iterator[tuple[Any, ...]]:
        """Yield the name of each file in a directory, and what ``look`` returns; sorted."""
        last = b""
        try:
            with ErrorsAs(self.explain, path):
                fd = self.parent(path)
                for name in self.list_at(fd):
                    if found := look(fd, name):
                        yield (name, *found)
                    last = name
        except NeedsUnshare as denied:
            yield from self.opener.helper(denied).scan(self.path, path, last)

    def open_one(self, name: bytes) -> int:
        if name in self._ahead:
            return self._ahead.pop(name)
        return self._ask(super().open_one, name, lambda helper: helper.open_one(self.path, name))

    def look(self, parent: bytes, base: bytes) -> tuple[int, os.stat_result]:
        """Open a regular file as open_at() does; return its descriptor and status."""
        name = parent + b"/" + base if parent else base
        fd = self._ahead.pop(name, -1) if self._ahead else -1
        try:
            if fd < 0:
                return self.open_at(self.parent(parent), base)
        except PermissionError as error:
            if error.errno != errno.EACCES:
                raise
            denied: Any = self.explain(error, name)
            fd = self.opener.helper(denied).open_one(self.path, name)
        return fd, os.stat_result((-fd, *bytes(9))) if fd < 0 else os.fstat(fd)

    def is_closed(self, name: bytes) -> bool:
        """Tell whether this user probably may not read a file, which need not exist."""
        try:
            above, base = self.locate(name)
            return not os.access(base, os.R_OK, dir_fd=above, effective_ids=True,
                                 follow_symlinks=False)
        except (OSError, ValueError) as error:
            return isinstance(error, PermissionError)


OPEN_STORAGES: set[ref[Storage]] = set()  # nothing may be written in them


class Storage(Closing):
    """A containers/storage storage, read-only: the joined records of all its roots.

    A context manager for one thread at a time.  Records are read once, when first asked for;
    reload() forgets them.  ``graphroot``, ``runroot`` and ``imagestore`` are paths, ``config`` what
    discover() found, ``owner_ids`` as given, ``elsewhere`` a hint, ``opener`` opens contents.
    ``driver`` is overlay or vfs.  ``faults`` names what of the storage as a whole cannot be used,
    ``notes`` what a reader should know of its layers, and ``unverified`` what Tree.verify() passed
    over.  ``salvage`` tells whether lost records are found again, ``named`` is for that;
    ``linked`` are paths of directories that are symbolic links, which nobody follows; ``id_maps``
    tell whose the files are; ``database_error`` is why podman's database cannot be read.
    """

    config: Config | None = None
    layer_stores: Sequence[str] = ()  # additional layer stores
    watch: Any = nullcontext  # makes a context of the progress of what is hashed, or of None

    def __init__(self, graphroot: str, runroot: str = "", imagestore: str = "",
                 stores: Sequence[str] = (), owner_ids: str = "", driver: str = "",
                 configured: str = "", salvage: bool = False) -> None:
        if driver not in ("", *DRIVERS):
            raise ValueError(f"driver must be {' or '.join(DRIVERS)}, not {display(driver)}")
        self.graphroot, self.runroot, self.imagestore = (os.path.abspath(os.fsdecode(
            path)) if path else "" for path in (graphroot, runroot, imagestore))
        self.owner_ids, self.salvage = os.fsdecode(owner_ids), salvage
        self.opener = Opener(self)  # of all contents
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.unverified: list[str] = []
        self.elsewhere = ""  # where an image that is unknown may be instead
        self._own: list[Contents] = []
        self._additional: list[Contents] = []
        self._run: Contents | None = None
        self._graph: Contents | None = None
        self._folders: dict[tuple[Directory, bytes], Directory] = {}  # of roots, by name
        with OnError(self.close):
            if imagestore:
                self._open_other(imagestore, self._own, "imagestore")
            for store in check_words("stores", stores):
                self._open_other(store, self._additional, "additional image store")
            try:
                self._graph = Contents(self, self._open_graphroot())
                self._own.insert(0, self._graph)
            except NotFound as error:  # nothing was made yet but what other stores hold
                if not self.roots:
                    raise
                self.faults.append(str(error))
            self.driver = driver or configured or "overlay"  # owner() asks before it is chosen
            self.driver = self._choose_driver(driver, configured)
            self.linked = list(self._find_linked())
            if runroot and os.path.isdir(runroot):
                self._run = Contents(self, Directory.at(self.runroot))
            if owner_ids and self.owner[0]:
                owner_ranges(self.owner[0], self.owner_ids, "")  # raises NotFound now
            elif owner_ids:
                self.faults.append("--owner-ids is not used: root owns the store")
        OPEN_STORAGES.add(ref(self, OPEN_STORAGES.discard))
        self.reload()

    def _open_graphroot(self) -> Directory:
        try:
            root = Directory.at(self.graphroot)
        except (FileNotFoundError, NotADirectoryError):
            raise no_store(self.graphroot) from None
        drivers = drivers_in(root, "", "-layers", "-images")  # the errors of a closed root first
        if is_docker(self.graphroot):
            drivers = drivers_in(root, "-layers")
        if not any(name in DRIVERS for name in drivers):
            root.close()
            if drivers:
                raise Unsupported(f"{self.graphroot}: storage driver {drivers[0]} is not "
                                  f"supported: only {' and '.join(DRIVERS)} are read")
            raise no_store(self.graphroot)
        return root

    def _choose_driver(self, driver: str, configured: str) -> str:
        """Return the driver whose records are read: the one asked for, or else as podman chooses.

        Where both have records, that is what podman's database or the configuration names.
        """
        top = self.roots[0]
        places, records = (
            [name for name in drivers_in(top, *ends) if name in DRIVERS] for ends in (
                ("-layers", "-images", ""), ("-layers/layers.json", "-images/images.json")))
        there = records or places or [configured or driver or "overlay"]
        if driver:
            if driver not in places + there:
                raise NotFound(f"no {driver} store at {top.path}: it holds {' and '.join(there)}",
                               hint=f"use --driver {there[0]}, or leave --driver out")
            return driver
        if there == [configured or there[0]]:
            return there[0]
        named = self.recorded_roots().get("GraphDriver", "")
        if len(there) == 1:
            if named != there[0]:
                self.faults.append(f"{top.path} holds no {configured} store, which the "
                                   f"configuration names: {there[0]} is read")
            return there[0]
        chosen, source = (named, "podman's database") if named in there \
            else (configured, "the configuration")
        if chosen not in there:
            raise Ambiguous(f"{top.path} contains several valid graphdrivers: {', '.join(there)}",
                            hint="choose one: --driver " + " or --driver ".join(there))
        other = there[chosen == there[0]]
        self.faults.append(f"{top.path} holds {' and '.join(there)} stores: {chosen} is read, as "
                           f"{source} names it (--driver {other} reads the other)")
        return chosen

    def _find_linked(self) -> Iterator[str]:
        """Yield the paths of directories that are symbolic links, which podman follows."""
        # We do not: a store of another machine or user must not lead us out of it.
        homes = [self.home(word).partition(b"/")[0] for word in ("", "layer", "image", "container")]
        for root, name in product(self.roots, homes):
            with suppress(OSError):
                target = display(root.readlink(name))
                self.faults.append(f"{root.host_path(name)} is a symbolic link to {target}, which "
                                   "is not followed (mount --bind makes it a directory)")
                yield root.host_path(name)

    def home(self, word: str = "") -> bytes:
        """Return the directory of all layers' files, or of records: ``word`` is their WORD."""
        return f"{self.driver}-{word}s".encode() if word else DRIVERS[self.driver]

    def _open_other(self, path: str, roots: list[Contents], word: str) -> None:
        try:
            if not os.path.isabs(path):
                raise OSError(errno.EINVAL, "not an absolute path")
            root = Directory.at(path)
        except OSError as error:
            reason = error.strerror or str(error).replace(f"{path}: ", "", 1)
            self.faults.append(f"{word} {path}: {reason}")
            return
        if any(os.path.samestat(os.fstat(root.fd), os.fstat(other.fd)) for other in self.roots) \
                or os.path.realpath(path) == os.path.realpath(self.graphroot):
            root.close()  # named twice
        else:
            roots.append(Contents(self, root))

    def reload(self) -> None:
        """Forget all records, so that the next call reads them again.

        Roots that were made anew, as by ``podman system reset``, are opened again.
        """
        for root in self.roots:
            with suppress(OSError), Directory.at(root.path) as found:
                if not os.path.samestat(os.fstat(found.fd), os.fstat(root.fd)):
                    os.dup2(found.fd, root.fd, inheritable=False)
                    root._parent = root._near = b""
                    if self.opener._helper:  # it has the old one open
                        self.opener._helper.is_broken = True
        self._patience: Deadline | None = None
        self._layers: tuple[Any, ...] | None = None
        self._images: tuple[Any, ...] | None = None
        self._containers: tuple[Any, ...] | None = None
        self._layer_by_id: dict[str, Layer] = {}
        self._folders = {}
        self._malformed: dict[bytes, FormatError] = {}  # JSON files
        self._salvage: Salvage | None = None
        self.database_error: Exception | None = None
        self.named: set[str] = set()  # DiffIDs that configurations name, when salvage is asked for
        for cached in ("id_maps", "_all_links"):
            vars(self).pop(cached, None)
        self._podman: dict[str, dict[str, Any]] | None = None

    def close(self) -> None:
        OPEN_STORAGES.discard(ref(self))
        for root in filter(None, [*self.roots, *self._folders.values(), self._run]):
            root.close()
        if self.opener.storage is self:
            self.opener.close()

    @property
    def is_proxied(self) -> bool:
        """Whether a helper opens what this user may not."""
        return self.opener.is_proxied

    @property
    def roots(self) -> list[Contents]:
        """All roots in search order: graph root, imagestore, additional stores."""
        return self._own + self._additional

    @property
    def additional_stores(self) -> list[str]:
        """The paths of the additional image stores that could be opened."""
        return [root.path for root in self._additional]

    def find(self, name: bytes, first: Contents | None = None) -> Contents | None:
        """Return the root that has ``name``, looking in ``first`` first; None when none has it."""
        # With a split imagestore, an image layer's record, tar-split and files lie in two roots.
        return next((root for root in [first, *self.roots] if root and root.exists(name)), None)

    def open_first(self, name: bytes, first: Contents) -> tuple[int, str]:
        """Open a file in the root that find() would return, and return its path; -1 for none."""
        for root in [first, *self.roots]:
            with suppress(FileNotFoundError, NotADirectoryError):
                return root.open(name), root.host_path(name)
        return -1, ""

    def folder(self, root: Directory, kind: bytes) -> Directory:
        """Open the directory ``kind`` of a root, and keep it open."""
        if (root, kind) not in self._folders:
            self._folders[root, kind] = root.directory(kind)
        return self._folders[root, kind]

    @property
    def owner(self) -> tuple[int, int]:
        """User and group ID of the user who writes the records."""
        root = self._graph or self.roots[0]
        status = os.fstat(root.fd)
        with suppress(OSError):
            status = Directory.lstat(root, self.home("layer") + b"/layers.json")  # the helper, too
        return status.st_uid, status.st_gid

    @property
    def rootless(self) -> bool:
        """Whether overlayfs is mounted in a user namespace, where its xattrs begin with user."""
        return self.owner[0] != 0 or read_proc("self/uid_map").split() not in (
            [], ["0", "0", str(NO_ID)])

    @cached_property
    def id_maps(self) -> tuple[Ranges, Ranges]:
        """How to read IDs on disk, for users and groups: see map_id(); [] = as they are.

        The user who writes the records is root in his containers; his sub-uids follow, see
        owner_ranges().  Seen by root of his namespace, it is so already.
        """
        found: tuple[Ranges, Ranges] = [], []
        uid, gid = self.owner
        made_at = "" if uid in (0, os.geteuid()) else self.recorded_roots().get("GraphRoot", "")
        both = owner_ranges(uid, self.owner_ids, self.graphroot, made_at) if uid else []
        for maps, own, ranges in zip(found, (uid, gid), both):
            at = 0
            for first, count in [(own, 1), *ranges]:
                maps.append((first, at, count))
                at += count
        return found

    def strays(self, word: str, known: Iterable[Record]) -> list[str]:
        """Name directories without a record; c/storage 1.58 makes none for additional layers."""
        ids, home = {record.id for record in known}, self.home(word)
        return [f"{root.host_path(home + b'/' + name)} has no record"
                for root in self.roots for name in root.names(home)
                if re.fullmatch(HEX64, os.fsdecode(name)) and name.decode() not in ids
                and not root.exists(b"/".join((home, name, b"additionallayer")))]

    def layers(self) -> tuple[Layer, ...]:
        """Return all layers as stored, parents mostly first, damaged ones with their ``faults``."""
        if self._layers is None:
            self._layers = self._load(Layer)
            for layer in self._layers:
                self._layer_by_id.setdefault(layer.id, layer)
            if self.salvage:
                self._salvage = Salvage(self, self._layers)
                self._salvage.images(self._images or self._load(Image))
        return self._layers

    def images(self) -> tuple[Image, ...]:
        """Return all images, damaged ones with their ``faults``; of one ID the first counts."""
        if self._images is None:
            self._images = self._load(Image)
            if self.salvage and self.layers() is not None and self._salvage:
                self._salvage.images(self._images, hashing=True)
            if self._graph and not self.imagestore:
                self._look_for_imagestore(self._graph)
        return self._images

    def _look_for_imagestore(self, graph: Directory) -> None:
        """Say so when layers have their tar-split data here and their files elsewhere."""
        try:
            split = {name[:-len(TAR_SPLIT)] for name in graph.listdir(self.home(Layer.WORD))
                     if name.endswith(TAR_SPLIT)}
            lost = sorted(split - set(graph.listdir(self.home())) if split else ())
        except OSError:  # said where it is needed
            return
        near = stores_near(self.graphroot, f"{os.fsdecode(self.home())}/{display(lost[0])}") \
            if lost else []
        if near or lost and not self._images:
            self.elsewhere = "images may be in an imagestore: use --imagestore " \
                + (near[0] if near else "DIR")
            self.faults.append(f"{counted(len(lost), 'layer')} without files below "
                               f"{self.graphroot}: {self.elsewhere}")

    def containers(self) -> tuple[Container, ...]:
        """Return all containers of podman, buildah and CRI-O."""
        if self._containers is None:
            self._containers = self._load(Container)
            if self.salvage and self.images() is not None and self._salvage:
                self._salvage.containers(self._containers)
        return self._containers

    def layer_by_id(self, layer_id: str) -> Layer | None:
        """Return the layer of exactly this ID, or None; see strays()."""
        self.layers()
        found = self._layer_by_id.get(layer_id)
        if not found and is_safe_id(layer_id) and self.driver == "overlay":
            if root := self.find(b"/".join((self.home(), layer_id.encode(), b"additionallayer"))):
                found = self._layer_by_id[layer_id] = Layer(self, root, {"id": layer_id})
                found.parent = "".join(found.lower_ids()[:1])
        return found

    def is_current(self, record: Layer | Image) -> bool:
        """Tell whether a record is still there, and whole, by reading the records once more."""
        return self.salvage or any(other.id == record.id and other.flags == record.flags
                                   for other in self._load(type(record)))

    def _load(self, new: type[R]) -> tuple[R, ...]:
        """Read the records of one kind from all roots; later sources of ours add new IDs only."""
        home, word = self.home(new.WORD), new.WORD.encode() + b"s"
        if home in self._malformed:  # said once more, not read for each image
            raise self._malformed[home].with_traceback(None)
        plain, volatile = (home + b"/" + name + word + b".json" for name in (b"", b"volatile-"))
        if self._patience is None:
            self._patience = Deadline(LOCK_PATIENCE)
        found: list[R] = []
        seen: set[str] = set()
        cut: list[Contents] = []  # roots whose records are not whole
        # As containers/storage searches: for images imagestore, graph root, additional.
        own = self._own[::-1] if new is Image else self._own
        sources = [(root, [plain, volatile] if root is self._graph and new is not Image
                    else [plain]) for root in own if new is not Container or root is self._graph]
        sources += [(self._run, [volatile])] if self._run and new is not Image else []
        sources += [(root, [plain]) for root in self._additional if new is not Container]
        for root, names in sources:
            readonly = root in self._additional
            owner = self._graph or root if root is self._run else root  # of the records' files
            for path, data in zip(names, read_consistently(
                    root, home + b"/" + word + b".lock", names, self._patience,
                    self.faults if self.salvage else None)):
                try:
                    items = parse_json(data, root.host_path(path)) if data.strip() else None
                    if not isinstance(items, (list, type(None))):
                        raise FormatError("expected a JSON array", file=root.host_path(path))
                    cut += [owner] * (path == plain and (self.salvage or not items))
                except FormatError as error:
                    if not self.salvage:
                        self._malformed[home] = error
                        add_hint(error, LEFT)
                        raise
                    cut, items = [*cut, owner], whole_objects(data)
                    self.faults += [str(error)] * (str(error) not in self.faults)
                for item in items or ():  # Go writes null for an empty list
                    record = new(self, owner, item, volatile=path == volatile, readonly=readonly)
                    if readonly or not record.id or record.id not in seen:
                        found.append(record)
                    if not readonly:
                        seen.add(record.id)
        for root in dict.fromkeys(cut):
            found += self._left(new, root, {record.id for record in found})
        return tuple(found)

    def _left(self, new: type[R], root: Contents, known: set[str]) -> list[R]:
        """Return records of what is left of a root where their file is damaged, empty, missing."""
        # Without ``salvage`` there are none, and a fault tells of it.
        ids = sorted({each for each in left_ids(self, new.WORD, root) if is_safe_id(each)} - known)
        if ids and not self.salvage:
            self.elsewhere = self.elsewhere or LEFT
            text = (f"{root.host_path(self.home(new.WORD))}: no record of "
                    f"{counted(len(ids), new.WORD)}: {LEFT}")
            self.faults += [text] * (text not in self.faults)
        found = [new(self, root, left_record(self, new.WORD, root, each),
                     readonly=root in self._additional) for each in ids if self.salvage]
        for record in found:
            record.lost = True
        return found

    def chain(self, layer_id: str) -> tuple[Layer, ...]:
        """Return the layer and its ancestors, base first; () for "".

        Raises LayerUnknown for a missing one, FormatError for a loop or a chain that is too long.
        """
        found: list[Layer] = []
        while layer_id:
            if (layer := self._layer_by_id.get(layer_id) or self.layer_by_id(layer_id)) is None:
                below = f" (parent of {found[-1].id})" if found else ""
                raise LayerUnknown(
                    f"layer not known: {display(layer_id)}{below}", hint=LEFT * bool(
                        not self.salvage and is_safe_id(layer_id) and self.find(
                            self.home() + b"/" + layer_id.encode())))
            found.append(layer)
            if len(found) > MAX_LOWERS + 1:
                raise FormatError(f"layer {found[0].id}: its chain of parents is a loop or "
                                  f"longer than {MAX_LOWERS}")
            layer_id = layer.parent
        return tuple(found[::-1])

    def adopt(self, layer: Layer) -> Layer:
        """Return a layer of another Storage of the same roots as one of this, for another thread.

        Only the records of its chain are taken over; all are read when one more is needed.
        """
        self.reload()
        ours = {root.path: root for root in self.roots}
        for each in layer.storage.chain(layer.id):
            self._layer_by_id[each.id] = Layer(self, ours.get(each.root.path, each.root),
                                               each.record, readonly=each.readonly)
        return self._layer_by_id[layer.id]

    def resolve_link(self, link: str) -> str:
        """Return the ID of the layer whose short link in overlay/l is ``link``.

        One that a crash has lost is found in the layers' own ``link`` files.  Raises LayerUnknown.
        """
        check_type("link", link, str)
        if re.fullmatch(LINK_ID, link) and self.driver == "overlay":
            for root in self.roots:
                try:
                    target = root.readlink(self.home() + b"/l/" + link.encode())
                except OSError:
                    continue
                # ../<id>/diff; absolute with some imagestore builds of 1.47 to 1.55
                layer_id = os.path.basename(os.path.dirname(target)).decode("utf-8", "replace")
                if is_safe_id(layer_id) and root.exists(self.home() + b"/" + layer_id.encode()):
                    return layer_id
            if found := self._all_links.get(link):
                return found
        raise LayerUnknown(f"layer not known: no layer has the link {display(link)}",
                           hint="a link is 26 characters, as in overlay/l")

    @cached_property
    def _all_links(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for root in self.roots:
            for name in root.names(home := self.home()):
                with suppress(OSError, ValueError):  # not a layer's directory, or damaged
                    link = root.read(home + b"/" + name + b"/link", 4096).decode("ascii")
                    found.setdefault(link, name.decode("utf-8", "replace"))
        return found

    def podman_containers(self) -> dict[str, dict[str, Any]]:
        """Return what podman's db.sql says of each container, by ID; {} without a database.

        Keys: name, state (a word), pod (name), rootfs (path of ``--rootfs``), rootfs-refused (why
        that path must not be opened, or ""), exit-code, labels, and mounted, pid, started of the
        state.  A database that is damaged is named in ``faults``; see also unread_database().
        """
        if self._podman is None:
            self._podman = {}
            for root in filter(None, (self._graph, self._run)):
                for row in self._podman_rows(root, _PODMAN_QUERY):
                    try:
                        container_id, entry = podman_container(row)
                        if entry["rootfs"]:
                            entry["rootfs-refused"] = self.distrust(root, str(row[6])) or (
                                "" if os.path.isabs(entry["rootfs"])
                                and can_be_path(entry["rootfs"]) else "not an absolute path")
                        self._podman.setdefault(container_id, entry)
                    except FormatError as error:
                        self.faults.append(f"container {display(str(row[0]))}: {error}")
        return self._podman

    def unread_database(self) -> list[str]:
        """Say so if podman's database is one of before 4.8 (BoltDB), which is not read; else []."""
        text = ("podman's database is libpod/bolt_state.db, which is not read: states, pods and "
                "rootfs paths of its containers are unknown")
        return [text] * bool(self._graph and self._graph.exists(b"libpod/bolt_state.db"))

    def recorded_roots(self, *, trusted: bool = False) -> dict[str, str]:
        """Return GraphRoot, RunRoot and GraphDriver of podman's database, {} when not trusted."""
        if self._graph:
            for row in self._podman_rows(self._graph,
                                         "SELECT GraphRoot, RunRoot, GraphDriver FROM DBConfig"):
                if not trusted or not self.distrust(self._graph, str(row[0])):
                    return dict(zip(("GraphRoot", "RunRoot", "GraphDriver"), map(str, row)))
        return {}

    def distrust(self, root: Directory, graphroot: str) -> str:
        """Return why no path that podman's database in ``root`` names may be opened; "" = it may.

        A user's database must not lead root to files of the host, nor the database of a copied or
        mounted store anybody: the database and our graph root must belong to the caller, and
        ``graphroot``, which the database records, must be our graph root.
        """
        top = self._graph or root
        for place, name in ((top, b"."), *((root, name) for name in DATABASE_FILES)):
            uid = place.lstat(name).st_uid if place.exists(name) else os.geteuid()
            if uid != os.geteuid():
                return f"{os.path.normpath(place.host_path(name))} belongs to uid {uid}"
        with suppress(OSError, ValueError):  # it is not on this machine
            if os.path.isabs(graphroot) and os.path.samestat(os.stat(graphroot), top.lstat(b".")):
                return ""
        return f"podman's database records another graph root, {display(graphroot)}"

    def _podman_rows(self, root: Directory, query: str) -> list[tuple[Any, ...]]:
        try:
            return query_database(root, query) if root.exists(DATABASE_FILES[0]) else []
        except (CstorError, OSError) as error:
            self.faults += [str(error)] * (str(error) not in self.faults)
            self.database_error = error
            return []

    @classmethod
    def discover(cls, *, runroot: str = "", imagestore: str = "", stores: Sequence[str] = (),
                 owner_ids: str = "", driver: str = "", salvage: bool = False) -> Storage:
        """Open the storage that podman would use for this user: see load_config().

        ``runroot`` and ``imagestore`` replace the configured ones, ``stores`` are further
        additional image stores; ``owner_ids``: see owner_ranges(); ``driver``, ``salvage``: see
        open().  Raises NotFound, Unsupported, FormatError.
        """
        config = load_config()
        if not driver and config.driver not in ("", *DRIVERS):
            raise Unsupported(f"storage driver {config.driver} is not supported: only "
                              f"{' and '.join(DRIVERS)} are read",
                              hint="it is set by STORAGE_DRIVER or storage.conf; --driver overlay "
                                   "or --driver vfs reads such a store anyway")
        imagestore = imagestore or config.imagestore
        try:
            storage = cls(config.graphroot, runroot or config.runroot, imagestore,
                          [*config.stores, *stores], owner_ids, driver, config.driver, salvage)
        except NotFound as error:
            error.hint = error.hint if isinstance(error, Ambiguous) else config.hint
            raise
        storage.config = config
        if not runroot and not os.path.isdir(config.runroot):
            # podman goes on with the run root of its database when the configuration has changed.
            recorded = storage.recorded_roots(trusted=True).get("RunRoot", "")
            if os.path.isdir(recorded):
                storage.runroot, storage._run = recorded, Contents(storage, Directory.at(recorded))
                storage.reload()
        storage.faults += config.faults
        storage.elsewhere, storage.layer_stores = config.elsewhere, config.layer_stores
        return storage

    @classmethod
    def open(cls, root: str, *, runroot: str = "", imagestore: str = "",
             stores: Sequence[str] = (), owner_ids: str = "", driver: str = "",
             salvage: bool = False) -> Storage:
        """Open the storage with graph root ``root``, whatever is configured.

        ``owner_ids``: see owner_ranges(); ``driver`` is overlay or vfs, which must be there, "" =
        the one that is.  ``salvage`` makes records where their files are damaged or lost: see
        Salvage.  Raises NotFound, Ambiguous for both, Unsupported, OSError.
        """
        return cls(root, runroot, imagestore, stores, owner_ids, driver, salvage=salvage)

    def check(self) -> list[Finding]:
        """Return how records and disk disagree, and what is left over; opens no content."""
        if not self.salvage:
            return check_storage(self)
        self.salvage = False  # it would hide what is lost
        self.reload()
        try:
            return check_storage(self)
        finally:
            self.salvage = True
            self.reload()

    def disk_usage(self) -> DiskUsage:
        """Measure what its images, layers and containers take on disk."""
        return DiskUsage(self)

    def layer(self, reference: str) -> Layer:
        """Return one layer by ID, name, link, digest, the start of one, or a path of its files.

        Raises LayerUnknown, Ambiguous.
        """
        check_type("reference", reference, str)
        places = re.findall("/(?:overlay/(?:l/)?|vfs/dir/)([^/]+)", os.path.abspath(reference))
        reference = next((name for name in places if "/" in reference and (
            self.layer_by_id(name) or re.fullmatch(LINK_ID, name))), reference)
        with guessing(self, "layer", reference):
            return find_layer(self, reference)

    def image(self, reference: str, platform: str = "") -> Image:
        """Return one image by name, digest, ID or the start of an ID.

        Of images that share a digest it is that for ``platform``, os/arch[/variant], or else for
        this machine.  Raises ImageUnknown, Ambiguous.
        """
        with guessing(self, "image", reference):
            return find_image(self, reference, platform)

    def container(self, reference: str) -> Container:
        """Return one container by ID, name, layer ID or the start of an ID.

        Raises ContainerUnknown, Ambiguous.
        """
        with guessing(self, "container", reference):
            return find_container(self, reference)


def podman_container(row: tuple[Any, ...]) -> tuple[str, dict[str, Any]]:
    """Turn a row of _PODMAN_QUERY into (ID, entry)."""
    container_id, name, config_json, state, state_json, pod, _ = row
    config, status = (as_dict(parse_json(text if isinstance(text, bytes) else
                                         str(text or "{}").encode("utf-8", "replace"), "db.sql"))
                      for text in (config_json, state_json))
    # podman 5.8 leaves the columns State and ExitCode as they were when it made the row.
    state = status.get("state", state)
    known = isinstance(state, int) and 0 <= state < len(CONTAINER_STATE)
    return str(container_id), {
        "name": str(name), "state": CONTAINER_STATE[state if known else 0],
        "engine": "podman", "exit-code": status.get("exitCode", 0), "pod": str(pod or ""),
        "pod-id": str(config.get("pod") or ""), "rootfs": str(config.get("rootfs") or ""),
        "image-name": str(config.get("rootfsImageName") or ""),
        "image-id": str(config.get("rootfsImageID") or ""), "labels": config.get("labels"),
        "mounted": bool(status.get("mounted")), "mountpoint": status.get("mountPoint") or "",
        "pid": status.get("pid") or 0, "started": status.get("startedTime") or "",
        "config": config, "status": status}


def query_database(root: Directory, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of ``query`` on podman's database, which must not be written.

    A private copy is read, with journal and WAL, taken while nothing changed: SQLite makes ``-shm``
    beside a database in WAL mode, rolls back a hot journal, and follows what else lies there.
    Raises FormatError when SQLite cannot read it, Unsupported when this Python has no SQLite.
    """
    try:
        import sqlite3
    except ImportError as error:
        raise Unsupported(f"{root.host_path(DATABASE_FILES[0])}: {explain_import(error)}") from None

    problem: Exception = FormatError("it changes all the time")
    end = time.thread_time() + 1  # for all attempts; no pause of the machine counts
    for _ in range(5):
        with Scratch(tempfile.gettempdir()) as scratch:
            before = _state(root, -1, DATABASE_FILES)
            for name in filter(root.exists, DATABASE_FILES):
                with open(scratch.host_path(name), "xb") as target:
                    target.write(root.read(name, MAX_JSON))
            try:
                if _state(root, -1, DATABASE_FILES) == before:
                    return _query(sqlite3, scratch.host_path(DATABASE_FILES[0]), query, end)
            except sqlite3.Error as error:
                problem = error
    raise FormatError(f"podman's database cannot be read: {problem}",
                      file=root.host_path(DATABASE_FILES[0]))


def _query(sqlite3: Any, path: str, query: str, end: float) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as database:
        # Any bytes can stand there, but no path has a NUL byte.
        database.text_factory = lambda data: data.decode("utf-8", "replace").replace("\0", "\ufffd")
        # A hostile database can hold views without an end.
        database.set_progress_handler(lambda: time.thread_time() > end, 10_000)
        database.execute("PRAGMA trusted_schema=OFF")
        return list(database.execute(query).fetchmany(100_000))


# ================================================================================================
# 9. References
#
# One string to one object, in the order in which podman 4 and 5 look (libimage's LookupImage, then
# the store's own lookup).  Where Go does not find an ambiguous prefix, candidates are listed here.
# ================================================================================================

DIGEST = r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[0-9a-f]{32,}"
REPOSITORY = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"  # one component of a name
REPOSITORY_NAME = (r"(?:(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?/)?"
                   f"{REPOSITORY}(?:/{REPOSITORY})*")
TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386",
                 "armv6l": "arm/v6", "armv7l": "arm/v7", "armv8l": "arm/v8"}  # of uname


def split_reference(text: str) -> tuple[str, str, str]:
    """Split ``[registry/]name[:tag][@digest]`` into (name, tag, digest); "" for a missing part."""
    name, _, digest = text.partition("@")
    head, slash, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return head + slash + last, tag, digest


def normalize_name(name: str) -> list[str]:
    """Return the full names that a repository name can stand for, best first.

    ``alpine`` is ``localhost/alpine``, then ``docker.io/library/alpine``.
    """
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        first = "docker.io" if first == "index.docker.io" else first
        if first == "docker.io" and "/" not in rest:
            rest = "library/" + rest
        return [f"{first}/{rest}"]
    return [f"localhost/{name}", f"docker.io/{name}" if slash else f"docker.io/library/{name}"]


def find_image(storage: Storage, reference: str, platform: str = "") -> Image:
    """Return the image that ``reference`` names; see Storage.image()."""
    check_type("reference", reference, str)
    check_type("platform", platform, str)
    best_platform((), platform)  # a wrong one is one for every image
    if reference.startswith("containers-storage:["):
        raise Unsupported(f"store specifier in reference: {display(reference)}",
                          hint="name the store with --root DIR")
    text = reference.removeprefix("containers-storage:").removeprefix("@")
    bare, images = text.removeprefix("sha256:"), storage.images()
    if re.fullmatch(HEX64, bare):
        found = [image for image in images if image.id == bare] \
            or [image for image in images if f"sha256:{bare}" in image.digests]
    else:
        # Of an image that is ours as well, the names in an additional store do not count.
        own = {image.id for image in images if not image.readonly}
        named = [image for image in images if not image.readonly or image.id not in own]
        found = _images_by_name(named, text) or _by_prefix(images, bare) \
            or _images_by_short_name(named, text)
    if len(found) > 1 and ("@" in text or re.fullmatch(HEX64, bare)):
        found = best_platform([(platform_name(image.config()), image) for image in found],
                              platform, display(reference)) or found
    return _one(storage, Image, found, reference, lambda image: ", ".join(image.names) or "<none>")


def _images_by_name(images: Sequence[Image], text: str) -> list[Image]:
    name, tag, digest = split_reference(text)
    if name and digest and not re.fullmatch(DIGEST, digest):  # name@<id> of containers-storage:
        return [image for image in images if image.id == digest]
    for full in normalize_name(name) if name and not text.endswith(":") else []:
        if digest:
            # podman 4.3.1 takes any name for it; here a name that it had, or any for a nameless.
            found = [image for image in images if f"{full}@{digest}" in image.names
                     or digest in image.digests and full in [
                         split_reference(other)[0] for other in
                         image.names + image.names_history or [full]]]
        else:
            found = _named(images, f"{full}:{tag or 'latest'}")
        if found:
            return found
    return _named(images, text)


def _named(images: Sequence[Image], name: str) -> list[Image]:
    """Return the image that holds a name: the first store's last record, as after Go's repair."""
    holders = [image for image in images if name in image.names]
    return [image for image in holders if image.root is holders[0].root][-1:]


def _images_by_short_name(images: Sequence[Image], text: str) -> list[Image]:
    """Find repositories that end in /NAME with the same tag or digest, whatever the registry."""
    name, tag, digest = split_reference(text)
    if len(normalize_name(name)) == 1 or text.endswith(":"):  # not short, not a reference
        return []
    return [image for image in images if any(
        f"/{their_name}".endswith(f"/{name}")
        and (digest in image.digests if digest else their_tag == (tag or "latest"))
        for their_name, their_tag, _ in map(
            split_reference, image.names + image.names_history * bool(digest)))]


def _by_prefix(records: Sequence[R], text: str) -> list[R]:
    """Return the records whose IDs start with ``text``, of the first store that has any."""
    found = [record for record in records if text and record.id.startswith(text)]
    return [record for record in found if record.readonly == found[0].readonly]


def find_layer(storage: Storage, reference: str) -> Layer:
    """Return the layer of a reference, of one diff-digest no mapped copy; see Storage.layer()."""
    if storage.salvage and ":" in reference:
        storage.images()  # computes DiffIDs
    layers = storage.layers()
    if re.fullmatch(LINK_ID, reference):
        reference = storage.resolve_link(reference)
    text = reference.removeprefix("sha256:")
    by_digest = [layer for layer in layers if layer.diff_digest.startswith("sha256:" + text)]
    found = [layer for layer in layers if reference in (layer.id, *layer.names)] \
        or [layer for layer in by_digest if layer.diff_digest == reference] \
        or by_digest * (text != reference) or _by_prefix(layers, text) or by_digest \
        or list(filter(None, [storage.layer_by_id(reference)]))
    if len({layer.diff_digest for layer in found}) == 1:
        found = [layer for layer in found if not layer.mapped] or found
    return _one(storage, Layer, found if text else (), reference,
                lambda layer: layer.diff_digest or "no diff-digest")


def find_container(storage: Storage, reference: str) -> Container:
    """Return the container of an ID, a name, a layer ID or the start of an ID."""
    check_type("reference", reference, str)
    containers = storage.containers() if reference else ()
    found = [c for c in containers if reference in (c.id, *c.names, c.layer)] \
        or _by_prefix(containers, reference)
    return _one(storage, Container, found, reference, lambda c: ", ".join(c.names))


def _one(storage: Storage, new: type[R], found: Sequence[R], reference: str,
         gloss: Callable[[R], str]) -> R:
    """Return the only object; of one ID in several stores the first store's counts."""
    by_id = {item.id: item for item in found[::-1]}
    if not by_id:
        raise UNKNOWN[new](f"{new.WORD} not known: {display(reference)}",
                           hint=storage.elsewhere or f"`{new.WORD} list` shows what there is")
    if len(by_id) > 1:
        raise Ambiguous(f"{display(reference)} is ambiguous", [
            f"{display(key)}  {display(gloss(item))}" for key, item in sorted(by_id.items())],
            hint="give more of the ID")
    return by_id.popitem()[1]


UNKNOWN: dict[type[Record], type[NotFound]] = {
    Image: ImageUnknown, Layer: LayerUnknown, Container: ContainerUnknown}
FINDERS: dict[str, Any] = {"image": find_image, "container": find_container, "layer": find_layer}


def did_you_mean(text: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a hint that gives the nearest of ``known``, of a dict what it stands for, or ""."""
    return "".join(f"did you mean {display(known[word] if isinstance(known, dict) else word)}?"
                   for word in difflib.get_close_matches(text, list(known), 1, cutoff))


def short_names(name: str) -> list[str]:
    """Return the forms in which an image's name can be given, the shortest first."""
    parts = name.split("/")
    return ["/".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]


def guess(storage: Storage, kind: str, reference: str) -> str:
    """Return what an unknown reference may mean, as a hint: another kind, or a near name."""
    for word, find in FINDERS.items():
        with suppress(CstorError, OSError):
            if word != kind and len(reference) > 2 and find(storage, reference):
                what = f"it is {'an' if word == 'image' else 'a'} {word}: "
                return what + ("`image layers` lists its layers" if (kind, word) == (
                    "layer", "image") else f"the {word} commands read it")
    text = reference.removeprefix("sha256:")
    is_id, size = re.fullmatch("[0-9a-f]{6,}", text), max(12, len(text))
    known: dict[str, str] = {}
    for record in getattr(storage, kind + "s")():
        for form in chain.from_iterable(map(short_names, record.names)):
            known.setdefault(split_reference(form)[0], form)
            known[form] = form
        for name in [record.id, getattr(record, "diff_digest", "")[7:]] if is_id else ():
            known[name[:size]] = name[:size]
    return did_you_mean(text, known, 0.8 if is_id else 0.6)


@contextmanager
def guessing(storage: Storage, kind: str, reference: str) -> Iterator[None]:
    """Add a guess to the error of a reference that is not known."""
    try:
        yield
    except tuple(UNKNOWN.values()) as error:
        with suppress(CstorError, OSError):
            error.hint = "; ".join(filter(None, [
                guess(storage, kind, reference), storage.elsewhere * (kind == "image")
                ])) or error.hint
        raise


def intermediate_images(storage: Storage) -> set[str]:
    """Return the IDs of images without a name that another was built on, as podman tells them."""
    if all(image.names for image in storage.images()):
        return set()
    return {parent.id for parent, _ in related_images(storage) if not parent.names}


def listed_images(storage: Storage) -> set[str]:
    """Return the IDs of images that are in manifest lists here: podman 5 does not prune them."""
    found: set[str] = set()
    for image in storage.images():
        with suppress(CstorError, OSError):
            found.update(each.id for _, each in (image.instances() if image.is_list else ()))
    return found


def related_images(storage: Storage) -> Iterator[tuple[Image, Image]]:
    """Yield each image with one that was built on it.

    The other has the same top layer, the next one, or like it none, and one more step of history.
    """
    histories = {image: image.steps for image in storage.images() if image.about}
    known: dict[tuple[str, Any], list[Image]] = {}
    for image, steps in histories.items():
        known.setdefault((image.layer, steps), []).append(image)
    for image, steps in histories.items():
        layer = storage.layer_by_id(image.layer)
        for top in {image.layer: 0, layer and layer.parent or image.layer: 1}:
            for parent in known.get((top, steps[:-1]), ()) if steps else ():
                ids = parent.about["diff-ids"] or []
                if parent is not image and ids == (image.about["diff-ids"] or [])[:len(ids)]:
                    yield parent, image


def names_to_give(image: Image, reference: str) -> list[str]:
    """Return the names that an image takes along: the one it was asked for by, or else all."""
    # Only names with a tag: a digest is not a name to give.
    tagged = [name for name in image.names if re.fullmatch(f"{REPOSITORY_NAME}:{TAG}", name)]
    asked = reference.rpartition("@")[0] or reference
    found = [name for wanted in (asked, asked + ":latest") for name in tagged
             if f"/{name}".endswith(f"/{wanted}")]
    return found[:1] or tagged


def platform_in(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration or descriptor says of a platform, as far as it is well-formed."""
    found: dict[str, Any] = {
        key: said[key] for key in ("architecture", "os", "os.version", "variant")
        if isinstance(said.get(key), str) and said[key]}
    features = [each for each in as_list(said.get("os.features")) if isinstance(each, str)]
    return {**found, **({"os.features": features} if features else {})}


def platform_name(said: Any) -> str:
    """Spell the platform of a configuration or descriptor as os/arch[/variant]."""
    words = platform_in(as_dict(said))
    return "/".join(words.get(key, "") for key in ("os", "architecture", "variant")).rstrip("/")


def best_platform(items: Sequence[tuple[str, T]], platform: str, title: str = "") -> list[T]:
    """Return those of ``items``, given by os/arch[/variant], that are best for ``platform``.

    "" is this machine.  A variant is taken when none is asked for; arm64 always is arm64/v8; of arm
    the newest that runs there is best, as for podman.  With a ``title`` NotFound says what is here.
    """
    if not re.fullmatch("|[^/]+(/[^/]+){1,2}", platform):
        raise ValueError(f"platform must be os/arch[/variant], not {display(platform)}")
    words = (platform.lower() or f"linux/{os.uname().machine}").split("/")
    named = [(f"{name}/".replace("/arm64/v8/", "/arm64/"), item) for name, item in items]
    wanted = "/".join(ARCHITECTURES.get(word, word) for word in [*words, ""])
    wanted = wanted.replace("/arm64/v8/", "/arm64/")
    arm = re.fullmatch("(.*/arm/)(?:v([5-8])/)?", wanted)
    older = [f"{arm[1]}v{n}/" for n in range(int(arm[2] or 8), 4, -1)] + [arm[1]] if arm else []
    for choice in [wanted, *older]:
        if found := [item for name, item in named if name == choice]:
            return found
    found = [item for name, item in named if name.startswith(wanted)]
    if title and platform and not found:
        raise NotFound(f"image {title} has no instance {platform}",
                       hint=f"here: {', '.join(name for name, _ in items) or 'none'}")
    return found


# ================================================================================================
# 10. Layers
#
# A layer's tar is rebuilt from headers in tar-split and from file contents below overlay/<id>/diff,
# or below vfs/dir/<id>, which also has all that the layers below have.
# Contents lie elsewhere in three cases:
#   mapped layers     a copy for other user IDs: "diff" is new and empty, and "diff1" holds stubs or
#                     shifted copies.  The bytes are in the template, next in the lower chain
#   metacopy stubs    a file with an overlay.metacopy xattr has the right size and no data; the
#                     bytes are in the next lower that has the name
#   flat (composefs)  "diff" holds objects named by their sha256; the layer's big data item
#                     zstd-chunked-manifest (the TOC) says which file is which object
# ================================================================================================

METACOPY_XATTRS = ("trusted.overlay.metacopy", "user.overlay.metacopy")


def clean_name(name: bytes) -> bytes:
    """Return a name in a tar as containers/storage unpacks it: relative, no ".", "..", "//".

    ".." is resolved in the text and stops at the root, as Go's filepath.Join("/", name) does.
    Raises FormatError for a NUL byte; b"" is the root itself.
    """
    if b"\0" in name:
        raise FormatError(f'name with a NUL byte: "{display(name)}"')
    path = b"/" + name + b"/"
    # normpath() would keep "//" at the start.
    return os.path.normpath(b"/." + path)[1:] if b"//" in path or b"/." in path else name


def read_objects(chunks: Iterator[bytes], file: str) -> dict[bytes, bytes]:
    """Read a TOC; return the sha256 of each file's content by the file's cleaned name."""
    # Its entries are taken one at a time: of a TOC of 30 MB, names and digests are a third.
    stream = ObjectStream(chunks, file)
    if not stream.find(rb'"entries"[ \t\r\n]*:[ \t\r\n]*\[', READ_SIZE):
        raise stream.error("malformed TOC: it has no entries")
    found: dict[bytes, bytes] = {}
    while stream.skip(b" \t\r\n,") != b"]":
        entry = stream.object()
        name, digest = entry.get("name"), entry.get("digest")
        if entry.get("type") == "reg" and isinstance(name, str) and isinstance(digest, str) \
                and re.fullmatch("sha256:" + HEX64, digest):
            found[clean_name(name.encode("utf-8", "surrogatepass"))] = bytes.fromhex(digest[7:])
    return found


def keeps_objects(layer: Layer) -> bool:
    """Tell whether a layer's files are kept by digest."""
    key = "zstd-chunked-layer-data"
    return layer.overlay_file(b"composefs-data")[0] is not None or key in layer.big_data_names \
        and as_dict(parse_json(layer.big_data(key), key)).get("format") == 1


class LayerFiles(Closing):
    """Opens the contents of one layer's files by their names in the tar.

    A context manager; owns the directories that it searches.  ``opened`` lists those that are open
    of all layers that share it: the oldest is closed when they are too many.  Raises Unsupported
    from the constructor when the layer's files are not kept as files.
    """

    def __init__(self, layer: Layer, opened: list[tuple[LayerFiles, int]] | None = None) -> None:
        self.layer, self._opened = layer, [] if opened is None else opened
        self._diffs: dict[int, Contents] = {}  # the layer's own is 0, lowers follow
        self._places: list[tuple[Contents | None, bytes]] = [(None, b"")]
        self._raw_parent = self._parent = b""
        self._objects: dict[bytes, bytes] | None = None
        self._plain = not (layer.mapped or layer.overlay_file(b"diff1")[0])
        self._diff(0)
        with OnError(self.close):
            if keeps_objects(layer):
                self._read_toc()

    def _read_toc(self) -> None:
        name = self.layer.path(big_data_file("zstd-chunked-manifest"))
        fd, path = self.layer.storage.open_first(name, self.layer.root)
        if fd < 0:
            raise Unsupported(f"layer {self.layer.id}: its files are kept by digest, and its TOC "
                              "(zstd-chunked-manifest) is lost")
        with Opened(fd):
            self._objects = read_objects(iter(lambda: os.read(fd, CHUNK), b""), path)

    def close(self) -> None:
        while self._diffs:
            self._diffs.popitem()[1].close()

    def _diff(self, number: int) -> Contents:
        """Return the open directory of the layer, 0, or of a lower."""
        if number not in self._diffs:
            root, path = self._places[number]
            self._diffs[number] = root.directory(path) if root else \
                self.layer.additional() or self.layer.diff()
            self._opened.append((self, number))
            if len(self._opened) > max(1, min(MAX_DIFFS, soft_limit() // 8)):
                files, oldest = self._opened.pop(0)
                if diff := files._diffs.pop(oldest, None):
                    diff.close()
        return self._diffs[number]

    def open(self, name: bytes, size: int | None = None) -> int:
        """Open the content of the regular file ``name`` and return its descriptor.

        ``size`` is what the file must hold, None = whatever it does.  Raises IntegrityError when
        it is missing, of another type or size, NeedsUnshare when permission is denied, and
        LayerUnknown when the whole layer was removed meanwhile.
        """
        if size == 0 and self._objects is not None:
            return os.open(os.devnull, os.O_RDONLY)  # no object is kept for it
        parent, base = self._place(name)
        for diff in self._search():
            try:
                fd, status = diff.look(parent, base)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise self._explain(error, name, diff.host_path(os.path.join(parent, base))
                                    ) from None
            # A stub has no data blocks; asking only then saves a call for every other file.
            if fd >= 0 and (status.st_blocks * 512 < status.st_size or self.layer.mapped) \
                    and self._is_stub(fd):
                os.close(fd)
                self._plain = False
            elif fd >= 0 and size in (None, status.st_size):
                return fd
            else:
                with Opened(fd):
                    raise self._objection(name, base, size, status)
        raise self._missing(name, size)

    def find(self, name: bytes, size: int) -> tuple[int, bytes, bytes, os.stat_result] | None:
        """Return a plain file unopened, as (directory, its name, name in it, status).

        None where open() must look closer: a file of another type or size, or perhaps a stub.
        """
        with suppress(OSError, ValueError):
            if self.is_plain:
                parent, _, base = clean_name(name).rpartition(b"/")
                dir_fd = self._diff(0).parent(parent)
                found = os.lstat(base, dir_fd=dir_fd)
                if stat.S_ISREG(found.st_mode) and size == found.st_size <= found.st_blocks * 512:
                    return dir_fd, parent, base, found
        return None

    @property
    def is_plain(self) -> bool:
        """Whether all that the layer has is below "diff", by its own name."""
        return self._plain and self._objects is None

    def status(self, name: bytes) -> os.stat_result | None:
        """Return lstat(2) of a name below "diff"; None when it is missing."""
        try:
            parent, _, base = clean_name(name).rpartition(b"/")
            return os.lstat(base, dir_fd=self._diff(0).parent(parent))
        except PermissionError:
            return self._diff(0).lstat(clean_name(name))
        except (OSError, ValueError):
            return None

    def where(self, name: bytes) -> tuple[Contents, bytes] | None:
        """Return where open() looks first, as (directory, name in it); None = nowhere."""
        try:
            return self._diff(0), b"/".join(filter(None, self._place(name)))
        except CstorError:  # raised again when it is opened
            return None

    def _objection(self, name: bytes, base: bytes, size: int | None, status: os.stat_result
                   ) -> CstorError:
        """Return what is wrong with a file that is there."""
        if not base:
            return Unsupported(f'{self.layer.label}: "{display(name)}" names the root: '
                               "containers/storage does not keep its content")
        if stat.S_ISREG(status.st_mode):
            return self._wrong(name, "wrong size", str(size), str(status.st_size))
        if size is None:  # the caller does not know from the tar that it is a file
            return Unsupported(f'layer {self.layer.id}: "{display(name)}" is a '
                               f"{file_type(status.st_mode)}, not a regular file")
        return self._wrong(name, "is not a regular file on disk", "regular file",
                           file_type(status.st_mode))

    def _place(self, name: bytes) -> tuple[bytes, bytes]:
        """Return where below ``diff`` the content of ``name`` is, as (directory, name in it)."""
        if self._objects is None:
            parent, _, base = name.rpartition(b"/")
            if parent != self._raw_parent:  # most files lie beside the one before
                self._raw_parent, self._parent = parent, clean_name(parent)
            if base.strip(b".") and b"\0" not in base:
                return self._parent, base
            parent, _, base = clean_name(name).rpartition(b"/")
            return parent, base
        if (wanted := clean_name(name)) not in self._objects:
            raise self._wrong(name, "is not in the layer's TOC (zstd-chunked-manifest)")
        digest = self._objects[wanted].hex().encode()
        return digest[:2], digest[2:]

    def _search(self) -> Iterator[Contents]:
        """Yield the directories to search; lowers are opened when they are needed."""
        yield self._diff(0)
        # Only a mapped layer or a stub leads to lowers: they can hold another file of this name.
        if self._plain:
            return
        if len(self._places) == 1:
            lowers = map(self.layer.storage.layer_by_id, self.layer.lower_ids())
            places = [lower.overlay_file(b"diff") for lower in lowers if lower]
            self._places += [place for place in places if place[0]]
        yield from map(self._diff, range(1, len(self._places)))

    def _is_stub(self, fd: int) -> bool:
        try:
            return self.layer.storage.driver == "overlay" and any(
                name in METACOPY_XATTRS for name in os.listxattr(fd))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(fd)
                raise
            return False

    def _wrong(self, name: bytes, message: str, expected: str = "", actual: str = ""
               ) -> IntegrityError:
        return IntegrityError(message, layer=self.layer.id, name=name, expected=expected,
                              actual=actual)

    def _missing(self, name: bytes, size: int | None) -> CstorError:
        """Return the error for a file that is nowhere."""
        if gone := self.layer.removed(name):
            return gone
        if clean_name(name).rpartition(b"/")[2].startswith(b".wh."):
            return Unsupported(f'layer {self.layer.id}: "{display(name)}" is a whiteout with '
                               "content: containers/storage does not keep that content")
        if size is None:
            return NotFound(f'layer {self.layer.id}: no file "{display(name)}"')
        return self._wrong(name, "is missing from the layer's files")

    def _explain(self, error: OSError, name: bytes, path: str) -> Exception:
        if error.errno == errno.ELOOP:
            return self._wrong(name, "is behind a loop of symbolic links")
        if error.errno == errno.ENAMETOOLONG:
            return FormatError(f'name too long: "{display(name[:80])}..."',
                               file=f"layer {self.layer.id}")
        return with_path(error, path)


# ================================================================================================
# 11. Tar headers
#
# They are read as Go's archive/tar reads them, since that split the tar.  Special headers (pax, GNU
# long names) stand before a member's own header and give their length: header_parts() is the only
# walker over them.  What decides the length of the content is read at once, the rest when used.
# ================================================================================================

PAX_NAMES = (b"path", b"linkpath", b"uname", b"gname")  # records that hold no NUL
TAR_TYPES = {b"1": "hardlink", b"2": "symlink", b"3": "char", b"4": "block", b"5": "dir",
             b"6": "fifo", PAX_GLOBAL: "global"}  # all others are regular files, as for Go


class Member:
    """One entry of a layer's tar.

    ``name`` is the name in the tar, ``typeflag`` one byte, ``size`` the length of the file,
    ``stored`` the length of its content in the tar (less for sparse files, 0 for links, directories
    and devices), ``header`` all header blocks verbatim, including pax and GNU long names.
    ``sparse`` is None, a list of (offset, length), or "1.0" when the map stood before the content
    and must be reconstructed.

    ``mode`` (permissions, 0 to 0o7777), ``uid``, ``gid``, ``mtime_ns`` (since 1970),
    ``linkname``, ``uname``, ``gname`` (bytes), ``devmajor``, ``devminor``, ``xattrs`` (name to
    value, bytes) and ``pax`` (all records of its pax header) are read when they are first used;
    that raises FormatError for a malformed field.  ``padding`` bytes follow the content; ``base64``
    is the checksum as tar-split spells it.
    """

    __slots__ = ("name", "typeflag", "size", "stored", "header", "sparse", "padding", "base64",
                 "mode", "uid", "gid", "mtime_ns", "linkname", "uname", "gname", "devmajor",
                 "devminor", "pax")

    def __init__(self, header: bytes, name: bytes, size: int, checksum: bytes) -> None:
        self.header, self.name, self.size, self.base64 = header, name, size, checksum
        self.sparse: None | str | list[tuple[int, int]] = None
        self.typeflag = header[TYPE_AT:TYPE_AT + 1]
        if size and len(header) == BLOCK and self.typeflag == b"0" \
                and header[SIZE_AT] == b"%011o\0" % size:  # a short cut for most members
            self.stored, self.padding = size, -size % BLOCK
        else:
            self._measure()

    def __repr__(self) -> str:
        return f"<Member {display(self.name)}>"

    @property
    def checksum(self) -> int | None:
        """The CRC-64/ISO of the content; None for members of size 0."""
        return int.from_bytes(binascii.a2b_base64(self.base64), "big") if self.base64 else None

    @property
    def type(self) -> str:
        """reg, dir, symlink, hardlink, char, block, fifo, or global (for all that follows)."""
        if self.typeflag == b"\0" and self.name.endswith(b"/"):
            return "dir"  # in a v7 archive only the name tells a directory
        return TAR_TYPES.get(self.typeflag, "reg")

    @classmethod
    def parse(cls, header: bytes) -> Member:
        """Make a member from its header blocks in a tar; only tar-split knows a ``checksum``."""
        block, _, pax, gnu = scan_header(header)
        found = parse_number(block[SIZE_AT]) if block is header and block[TYPE_AT] == 0x30 else -1
        member = cls(header, gnu.get(b"L") or pax.get(b"path") or name_in_block(block),
                     max(found, -1), b"")
        member.size = member.stored
        if member.sparse is not None:
            size = pax.get(b"GNU.sparse.size") or pax.get(b"GNU.sparse.realsize")
            member.size = parse_decimal(size) if size else member.stored
            member.name = pax.get(b"GNU.sparse.name") or member.name
        return member

    def _measure(self) -> None:
        """Find the type and how many bytes are stored."""
        block, rest, pax, _ = scan_header(self.header)
        self.typeflag = block[TYPE_AT:TYPE_AT + 1]
        self.stored = 0
        if self.typeflag == PAX_GLOBAL:
            # The records are part of the header; tar-split keeps their padding with the next entry.
            self.padding = -len(self.header) % BLOCK
            return
        if rest:
            raise FormatError(f"{len(rest)} bytes after its header")
        if self.typeflag not in HEADER_ONLY and self.type != "dir":
            # To Go an empty value means that there is no such record.
            self.stored = parse_decimal(pax[b"size"]) if pax.get(b"size") \
                else parse_number(block[SIZE_AT])
            self.sparse = self._sparse_map(pax)
            if self.stored < 0 or self.sparse is None and self.stored != self.size >= 0:
                raise FormatError(f"{self.stored} bytes by its header, {self.size} by tar-split")
        self.padding = -self.stored % BLOCK

    if not TYPE_CHECKING:  # else no misspelled name would be reported
        def __getattr__(self, name: str) -> Any:
            if name not in Member.__slots__:
                raise AttributeError(name)
            self.read_fields()
            return object.__getattribute__(self, name)

    def read_fields(self) -> None:
        """Read all other fields of the header.  Raises FormatError for a malformed one."""
        block, _, pax, gnu = scan_header(self.header)
        check_sum(block)
        self.pax = pax
        self.mode = parse_number(block[100:108]) & 0o7777
        self.uid, self.gid = parse_number(block[108:116]), parse_number(block[116:124])
        self.mtime_ns = parse_number(block[136:148]) * 10**9
        # Those of special headers count, unless they are empty.
        if pax.get(b"uid"):
            self.uid = parse_decimal(pax[b"uid"])
        if pax.get(b"gid"):
            self.gid = parse_decimal(pax[b"gid"])
        if pax.get(b"mtime"):
            self.mtime_ns = parse_pax_time(pax[b"mtime"])
        self.linkname = gnu.get(b"K") or pax.get(b"linkpath") or text_field(block[157:257])
        # A v7 archive has no further fields.
        has_more = block[257:263] == b"ustar\0" or block[257:265] == b"ustar  \0"
        more = block[265:345] if has_more else bytes(80)
        self.uname = pax.get(b"uname") or text_field(more[:32])
        self.gname = pax.get(b"gname") or text_field(more[32:64])
        device = more[64:] if self.typeflag in b"34" else bytes(16)
        self.devmajor, self.devminor = parse_number(device[:8]), parse_number(device[8:])

    @property
    def xattrs(self) -> dict[bytes, bytes]:
        """The extended attributes of the pax header.

        SCHILY.xattr.NAME holds the value as it is (star, GNU tar, Go), LIBARCHIVE.xattr.NAME its
        base64 under a percent-encoded name (bsdtar, which writes both).
        """
        found = {}
        for key, value in self.pax.items():
            if key.startswith(b"LIBARCHIVE.xattr."):
                name = re.sub(rb"%([0-9A-Fa-f]{2})", lambda m: bytes([int(m[1], 16)]), key[17:])
                try:
                    found[name] = binascii.a2b_base64(value + b"=" * (-len(value) % 4))
                except binascii.Error:
                    raise FormatError(f'malformed xattr "{display(name)}" in a pax header'
                                      ) from None
        return {**found, **star_xattrs(self.pax)}

    @staticmethod
    def _sparse_map(pax: dict[bytes, bytes]) -> None | str | list[tuple[int, int]]:
        """Recognize the sparse formats of GNU tar's --sparse-version as Go does."""
        version = pax.get(b"GNU.sparse.major", b"") + b"." + pax.get(b"GNU.sparse.minor", b"")
        text = pax.get(b"GNU.sparse.map", b"")
        if version == b"1.0":
            return version.decode()
        if version not in (b"0.0", b"0.1", b".") or not text and version == b".":
            return None
        numbers = [parse_decimal(number) for number in text.split(b",")] if text else []
        if len(numbers) % 2 or len(numbers) > 2 * MAX_EXTENTS or min(numbers, default=0) < 0:
            raise FormatError("malformed GNU.sparse.map")
        return list(zip(numbers[::2], numbers[1::2]))


def scan_header(header: bytes) -> tuple[bytes, bytes, dict[bytes, bytes], dict[bytes, bytes]]:
    """Return the last header block, what follows it, pax records, and GNU long names by typeflag.

    L is the name, K the target of a link.  Raises FormatError.
    """
    if len(header) == BLOCK and header[TYPE_AT:TYPE_AT + 1] not in SPECIALS:
        return header, b"", {}, {}
    pax, gnu, blocks = {}, {}, io.BytesIO(header)
    parts, _ = header_parts(blocks.read)
    for flag, _, data, _ in parts:
        if data is None:
            raise FormatError(f"malformed header size, or more than {MAX_SPECIAL} bytes")
        if flag in (b"x", PAX_GLOBAL):
            pax = parse_pax(data)
        elif flag in SPECIALS:
            gnu[flag] = text_field(data)
    if not parts or parts[-1][0] in SPECIALS:
        raise FormatError("its header is cut off")
    return parts[-1][1], blocks.read(), pax, gnu


def text_field(field: bytes) -> bytes:
    """Return a text field of a header, which ends at the first NUL."""
    return field.partition(b"\0")[0]


def name_in_block(block: bytes) -> bytes:
    """Return the name that a header block holds, with its prefix."""
    name = text_field(block[:100])
    if block[257:263] != b"ustar\0":
        return name
    prefix = text_field(block[345:476 if block[508:] == b"tar\0" else 500])  # star, ustar
    return prefix + b"/" + name if prefix else name


@lru_cache(1)  # a stream's headers are checked before anything else is read of them
def check_sum(block: bytes) -> None:
    """Raise FormatError unless a block's checksum is right; old Suns and NeXT sum signed bytes."""
    stored = parse_number(block[148:156])
    # The low half of adler32 is 1 + the sum of up to 256 bytes, and much faster than sum().
    unsigned = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2 \
        - sum(block[148:156]) + 8 * 32
    if stored == unsigned:
        return
    if stored != unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise FormatError(f"wrong header checksum: expected {stored}, got {unsigned}")


def parse_pax_time(text: bytes) -> int:
    """Return a pax time, seconds with a decimal fraction, in nanoseconds; FormatError."""
    seconds, _, fraction = text.partition(b".")
    if fraction.strip(b"0123456789"):
        raise FormatError(f'malformed pax time: "{display(text[:40])}"')
    nanoseconds = int(fraction[:9].ljust(9, b"0"))
    return parse_decimal(seconds) * 10**9 + (-nanoseconds if text[:1] == b"-" else nanoseconds)


def star_xattrs(pax: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the extended attributes of a pax header that Go and so containers/storage reads."""
    return {key[13:]: value for key, value in pax.items()
            if value and key.startswith(b"SCHILY.xattr.")}  # to Go, empty is absent


def tar_header(name: bytes, typeflag: bytes, *, mode: int = 0o644, uid: int = 0, gid: int = 0,
               size: int = 0, mtime_ns: int = 0, linkname: bytes = b"", uname: bytes = b"",
               gname: bytes = b"", devmajor: int = 0, devminor: int = 0,
               xattrs: Mapping[bytes, bytes] | None = None) -> bytes:
    """Return the header of one entry: ustar where it holds every field, else with a pax header.

    The same fields give the same bytes.  Go cannot read an xattr with an empty value: to it there
    is no such record.  Raises FormatError for what neither can hold: a NUL in a name, a device
    number of more than 21 bits, more than 1 MiB of records.
    """
    pax: dict[bytes, bytes] = {}
    for key, value in (xattrs or {}).items():
        if b"\0" in key:
            raise FormatError(f'"{display(name)}" does not fit into a tar')
        if b"=" in key:  # star's records cannot hold it
            pax[b"LIBARCHIVE.xattr." + key.replace(b"%", b"%25").replace(b"=", b"%3D")] = \
                binascii.b2a_base64(value, newline=False)
        else:
            pax[b"SCHILY.xattr." + key] = value

    def text(key: bytes, value: bytes, width: int, most: int) -> bytes:
        if len(value) > most:
            pax[key] = value
        return value[:most].ljust(width, b"\0")

    def number(key: bytes, value: int, width: int) -> bytes:
        if not 0 <= value < 8 ** (width - 1):
            pax[key] = b"%d" % value
            value = 0
        return b"%0*o\0" % (width - 1, value)

    prefix, base = split_name(name)
    if not base:
        pax[b"path"] = name
    seconds, fraction = divmod(abs(mtime_ns), 10**9)
    front = (text(b"", base or name[:100], 100, 100) + number(b"mode", mode & 0o7777, 8)
             + number(b"uid", uid, 8) + number(b"gid", gid, 8) + number(b"size", size, 12)
             + number(b"mtime", seconds if mtime_ns >= 0 else 0, 12))
    if fraction or mtime_ns < 0:
        pax[b"mtime"] = b"%s%d.%09d" % (b"-" if mtime_ns < 0 else b"", seconds, fraction)
        pax[b"mtime"] = pax[b"mtime"].rstrip(b"0").rstrip(b".")
    back = (text(b"linkpath", linkname, 100, 100) + b"ustar\x0000"
            + text(b"uname", uname, 32, 31) + text(b"gname", gname, 32, 31)
            + number(b"devmajor", devmajor, 8) + number(b"devminor", devminor, 8) + prefix)
    if {b"devmajor", b"devminor"} & set(pax) or b"\0" in name + linkname + uname + gname:
        raise FormatError(f'"{display(name)}" does not fit into a tar')
    header = seal_header(front, typeflag, back)
    if not pax:
        return header
    records = pax_records(pax)
    front = ((b"PaxHeaders/" + (base or name).rstrip(b"/").rpartition(b"/")[2])[:100].ljust(
        100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + b"%011o\0" % len(records) + b"0" * 11
        + b"\0")
    return (seal_header(front, b"x", bytes(100) + b"ustar\x0000") + records
            + bytes(-len(records) % BLOCK) + header)


def seal_header(front: bytes, typeflag: bytes, back: bytes) -> bytes:
    """Return a block of the fields before and after checksum and typeflag, with its checksum."""
    block = (front + b" " * 8 + typeflag + back).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """Split a name into ustar's prefix (155 bytes) and name (100), both empty if it is too long."""
    if len(name) <= 100:
        return b"", name
    at = name.find(b"/", max(1, len(name) - 101))
    if 0 < at <= 155 and at < len(name) - 1:
        return name[:at], name[at + 1:]
    return b"", b""


def pax_records(pax: Mapping[bytes, bytes]) -> bytes:
    """Return pax records, sorted; hdrcharset comes first when a name is not UTF-8 (POSIX pax).

    Raises FormatError for more than 1 MiB, which Go's reader refuses.
    """
    rows = sorted(pax.items())
    if not all(is_utf8(pax.get(key, b"")) for key in PAX_NAMES):
        rows.insert(0, (b"hdrcharset", b"BINARY"))
    records = []
    for key, value in rows:
        rest = len(key) + len(value) + 3  # a space, "=" and a newline
        length = rest + len(str(rest))
        length = rest + len(str(length))  # the digits of the length count as well
        records.append(b"%d %s=%s\n" % (length, key, value))
    if len(data := b"".join(records)) > MAX_SPECIAL:
        raise FormatError(f"a pax header of {len(data)} bytes, more than {MAX_SPECIAL}")
    return data


def header_parts(take: Callable[[int], bytes],
                 accept: Callable[[bytes], bool] = lambda block: len(block) == BLOCK
                 ) -> tuple[list[tuple[bytes, bytes, bytes | None, bytes]], bytes]:
    """Read special headers and the member's own; return them, and a block that is not a header.

    ``take(n)`` returns n bytes, or fewer at the end.  A header is (typeflag, block, data, padding):
    the data are what a special header says (None: its size is malformed or too large), of GNU tar's
    old sparse format the blocks that continue the map.  A block that ``accept`` refuses ends them.
    A global pax header is a member of its own.
    """
    parts, total = [], 0
    while accept(block := take(BLOCK)):
        flag, padding = block[TYPE_AT:TYPE_AT + 1], b""
        data: bytes | None = b""
        if flag in SPECIALS or flag == PAX_GLOBAL:
            try:
                length = parse_number(block[SIZE_AT])
            except FormatError:
                length = -1
            total += BLOCK + length
            data = None
            if 0 <= length <= MAX_SPECIAL and total <= MAX_HEADERS:
                data, padding = take(length), take(-length % BLOCK)
        elif flag == b"S" and block[482]:
            blocks = [take(BLOCK)]
            while blocks[-1][504:505].strip(b"\0") and len(blocks) < MAX_HEADERS // BLOCK:
                blocks.append(take(BLOCK))
            data = b"".join(blocks)
        parts.append((flag, block, data, padding))
        if flag not in SPECIALS or data is None:
            return parts, b""
    return parts, block


def read_sparse_map(take: Callable[[int], bytes]) -> tuple[list[tuple[int, int]], int]:
    """Read the map in front of the content (sparse format 1.0): the runs, and its bytes."""
    parts = [take(BLOCK)]
    count = parse_decimal(parts[0].partition(b"\n")[0])
    if not 0 <= count <= MAX_EXTENTS:
        raise FormatError("malformed sparse map")
    lines = parts[0].count(b"\n")
    while lines <= 2 * count and len(parts) < MAX_HEADERS // BLOCK * 8:
        parts.append(take(BLOCK))
        lines += parts[-1].count(b"\n")
    text = b"".join(parts)
    values = [parse_decimal(number) for number in text.split(b"\n", 2 * count + 1)[1:2 * count + 1]]
    if len(values) != 2 * count or min(values, default=0) < 0:
        raise FormatError("malformed sparse map")
    return list(zip(values[::2], values[1::2])), len(text)


def split_count(count: int) -> Iterator[int]:
    """Return the sizes of chunks that make up ``count`` bytes."""
    return (min(count - at, CHUNK) for at in range(0, count, CHUNK))


@lru_cache(4096)  # the headers of a tar have few distinct numbers
def parse_number(field: bytes) -> int:
    """Read a number of 64 bits: octal amid spaces and NULs, or GNU base-256; else FormatError."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & (1 << 8 * len(field) - 1) - 1
        if field[0] & 0x40:
            value -= 1 << 8 * len(field) - 1
        if not -1 << 63 <= value < 1 << 63:
            raise FormatError("header number out of range")
        return value
    digits = field.strip(b" \0").partition(b"\0")[0]
    if digits.strip(b"01234567"):
        raise FormatError(f"malformed header number: {field!r}")
    return int(digits or b"0", 8)


def parse_decimal(text: bytes) -> int:
    """Read a pax number of 64 bits as Go's ParseInt does, "+5" and "005" too; else FormatError."""
    digits = text[1:] if text[:1] in (b"+", b"-") else text
    value = digits.lstrip(b"0")[:20] or b"0"
    if not digits.isdigit() or len(value) > 19 or int(value) >> 63:
        raise FormatError(f'malformed pax number: "{display(text[:40])}"')
    return -int(value) if text[:1] == b"-" else int(value)


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """Parse the records ``LENGTH KEY=VALUE\\n`` of a pax header; the last of a key counts.

    Sparse format 0.0 repeats GNU.sparse.offset and .numbytes: they are joined to GNU.sparse.map,
    as Go does.  Raises FormatError.
    """
    records: dict[bytes, bytes] = {}
    runs: list[bytes] = []
    for _, _, key, value in pax_spans(data):
        if not key or b"\0" in key or key in PAX_NAMES and b"\0" in value:
            raise FormatError("malformed pax record")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (key == b"GNU.sparse.numbytes") != len(runs) % 2:
                raise FormatError("malformed sparse map in a pax header")
            runs.append(value)
        else:
            records[key] = value
    if runs:
        records[b"GNU.sparse.map"] = b",".join(runs)
    return records


def pax_spans(data: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Yield (start, end, key, value) of each pax record; what is malformed has no key."""
    at, size = 0, len(data)
    while at < size:
        space = data.find(b" ", at, at + 20)
        digits = data[at:space].removeprefix(b"+")  # as Go, which reads a sign
        end = at + int(digits) if space > at and digits.isdigit() else -1
        key, equals, value = data[space + 1:end - 1].partition(b"=")
        if not space < end <= size or not key or not equals or data[end - 1] != 10:
            key, value, end = b"", data[at:], size
        yield at, end, key, value
        at = end


# ================================================================================================
# 12. tar-split
#
# overlay-layers/<id>.tar-split.gz is a gzip stream of JSON objects.  Type 2, a segment, holds bytes
# of the tar in base64: everything but file contents.  Type 1, a file, stands where a member's
# content was, with its name, size and CRC-64.  Go writes, one object a line,
#     {"type":2,"payload":"BASE64","position":0}
#     {"type":1,"name":"etc/hosts","size":42,"payload":"BASE64 OF 8 BYTES","position":1}
# and a regular expression reads that; a JSON parser reads all else.  A segment starts with the
# padding of the content before it and ends with the header of the content after it.  What follows
# the last member (end of archive, garbage) is in segments of up to 1 MiB, or in one of any size if
# tar-split 0.11 or older wrote it.
#
# Every tar is read as one stream of items (bytes, member whose content follows or None, its
# content), all together the tar bit for bit: LayerReader makes it of a layer, TarSource of a tar
# that comes in chunks.  A content is bytes and Extents, valid until the next item is read.
# ================================================================================================

# How GNU tar maps a sparse file: the block size, and whether an empty run always ends the map.
# First --hole-detection=seek (the default since 1.29), then raw.
SPARSE_CONVENTIONS = ((4096, True), (512, False), (4096, False), (512, True))


class Extent:
    """``length`` bytes at ``offset`` of the open file ``fd``: content of ``member``.

    Valid until the next piece is read: ``fd`` is closed then.  ``origin`` is that of a PassedFile.
    """

    __slots__ = ("fd", "offset", "length", "member", "origin")

    def __init__(self, fd: int, offset: int, length: int, member: Member,
                 origin: tuple[Directory, bytes, bytes] | None = None) -> None:
        self.fd, self.offset, self.length, self.member = fd, offset, length, member
        self.origin = origin

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes.  Raises IntegrityError when the file has become shorter."""
        return read_checked(self.fd, self.length, offset=self.offset, name=self.member.name)

    @property
    def is_whole_file(self) -> bool:
        """Whether it is all of a file, and all of its member's content."""
        return self.offset == 0 and self.member.sparse is None \
            and os.fstat(self.fd).st_size == self.length


def whole_chunks(piece: bytes | Extent) -> Iterator[bytes]:
    """Yield the bytes of a piece; see Extent.chunks()."""
    return piece.chunks() if isinstance(piece, Extent) else iter((piece,))


class PlainHeaders:
    """Reads entries of the usual form from the text of tar-split, much faster than Member does.

    Their headers are one block of a file, directory or symbolic link with canonical numbers, behind
    zeros.  All is checked that Member checks, to which any other entry is left.  ``padding`` is
    that in front of the next header, -1 if it is not known.
    """

    KINDS = {b"0": "reg", b"2": "symlink", b"5": "dir"}
    SEGMENT = b'{"type":2,"payload":"'
    FILE = (rb'"(?:,"position":\d+)?\}\n\{"type":1,'
            rb'(?:"name":"([^"\\]*)"|"name_raw":"([^"\\]+)"),(?:"size":(\d{1,18}),)?'
            rb'"payload":(?:null|"([A-Za-z0-9+/]{11}=)")(?:,"position":\d+)?\}\n')

    def __init__(self) -> None:
        self.padding = 0
        self._starts = [self.SEGMENT + b"A" * (padding // 3 * 4) for padding in range(BLOCK)]
        self._sum = lru_cache(4096)(lambda field: parse_number(field) - 8 * 32 + sum(field))
        self._time = lru_cache(4096)(lambda field: parse_number(field) * 10**9)
        self._rest = lru_cache(256)(self._read_rest)

    def read(self, buffer: bytes, at: int) -> tuple[list[PlainRow], int]:
        """Read entries from a place of the text on, as long as they are plain; return their end.

        A row is (name, type, size, checksum, (mode, owner), mtime_ns, target of a link).
        """
        rows, padding = [], self.padding
        find, decode, adler32 = re.compile(self.FILE).match, binascii.a2b_base64, zlib.adler32
        while padding >= 0:
            # So many characters hold 159 bytes: up to two of padding, and up to the typeflag.
            start, shift = self._starts[padding], padding % 3
            first = at + len(start)
            middle, last = first + 212, first + (684 if shift < 2 else 688)
            file = find(buffer, last)
            if not file or not buffer.startswith(start, at):
                break
            name, raw, digits, checksum = file.groups(b"")
            size = int(digits or 0)
            try:
                head = decode(buffer[first:middle])[shift:]
                if len(head) != 159 - shift:
                    break
                total, target, owners = self._rest(buffer[middle:last])
                owner, mtime_ns = owners(head[100:124]), self._time(head[136:148])
                wanted = self._sum(head[148:156])
            except ValueError:
                break
            kind = self.KINDS.get(head[156:157])
            # The low half of an Adler-32 is the sum of so few bytes, plus one.
            if total + (adler32(head) & 0xFFFF) != wanted or not kind \
                    or head[124:136] != b"%011o\0" % size or size and kind != "reg" or raw \
                    or len(target) != 98 + shift or not 0 <= mtime_ns < 1 << 63 \
                    or (digits == b"") != (checksum == b""):
                break
            target = text_field(head[157:] + target) if kind == "symlink" else b""
            if kind == "symlink" and not target:
                break
            rows.append((name, kind, size, checksum, owner, mtime_ns, target))
            at, padding = file.end(), -size % BLOCK
        self.padding = padding
        return rows, at

    @staticmethod
    def _read_rest(text: bytes) -> tuple[int, bytes, Callable[[bytes], Any]]:
        """Return of the rest of a header the sum, the link's part, and what reads the owner."""
        data = decode_base64(text)
        if data[-255:-249] != b"ustar\0" and data[-255:-247] != b"ustar  \0":
            raise ValueError
        uname, gname = text_field(data[-247:-215]), text_field(data[-215:-183])

        def owner(field: bytes) -> tuple[int, tuple[int, int, bytes, bytes]]:
            mode, uid, gid = (parse_number(field[at:at + 8]) for at in (0, 8, 16))
            if not 0 <= min(uid, gid) <= max(uid, gid) < NO_ID:
                raise ValueError
            return mode & 0o7777, (uid, gid, uname, gname)

        return sum(data) - 1, data[:-255], lru_cache(4096)(owner)


class TarSplit(ObjectStream):
    """The entries of one tar-split stream, in order.

    Iterating yields (segment, name, size, checksum): bytes of the tar, then the member whose
    content follows them.  ``name`` is None when no content follows this segment.  ``checksum`` is
    the base64 of 8 bytes, b"" for members of size 0.  Raises FormatError with the offset in the
    decompressed stream.  With ``plain`` a segment can be a list: its rows of several members.
    """

    SEGMENT = PlainHeaders.SEGMENT
    PAIR = rb'\{"type":2,"payload":"([^"]*)' + PlainHeaders.FILE
    END = rb'"(?:,"position":\d+)?\}'

    def __init__(self, chunks: Iterator[bytes], file: str, plain: PlainHeaders | None = None
                 ) -> None:
        super().__init__(chunks, file)
        self.plain = plain

    def __iter__(self) -> Generator[Entry, None, None]:
        pair = re.compile(self.PAIR)
        while True:
            start = self._at
            if self.plain:
                rows, self._at = self.plain.read(self._buffer, start)
                if rows:
                    yield rows, None, 0, b""
            buffer, at = self._buffer, self._at
            for match in pair.finditer(buffer, at) if buffer.startswith(self.SEGMENT, at) else ():
                text, name, raw, size, checksum = match.groups(b"")
                if match.start() != at or (size == b"") != (checksum == b""):
                    break
                try:
                    segment = decode_base64(text)
                except ValueError:
                    break
                if self.plain:  # most likely; LayerReader corrects it in the same process
                    self.plain.padding = -int(size or 0) % BLOCK
                yield segment, self._base64(raw) if raw else name, int(size or 0), checksum
                at = self._at = match.end()
                if self.plain:
                    break
            if self.plain and at > start:
                continue
            # The end of the buffer, or an object that PAIR does not match.
            if len(buffer) - at < READ_SIZE and self.more():
                continue
            if not self.skip(b" \t\r\n"):
                return
            if self._buffer.startswith(self.SEGMENT, self._at):
                yield from self._lone_segment()
            else:
                yield self._entry(self.object())

    def _lone_segment(self) -> Iterator[Entry]:
        """Yield a segment that PAIR does not match, a long one in parts of whole base64 quanta."""
        self.fill(2 * MAX_SPECIAL)
        ends, start = re.compile(self.END).match, self._at + len(self.SEGMENT)
        end = self._buffer.find(b'"', start)
        if end >= 0 and not ends(self._buffer, end):
            yield self._entry(self.object())
            return
        self._at = start
        while (end := self._buffer.find(b'"', self._at)) < 0:
            end = len(self._buffer) - (len(self._buffer) - self._at) % 4
            yield self._base64(self._buffer[self._at:end]), None, 0, b""
            self._at = end
            if not self.more():
                raise self.error("truncated object")
        yield self._base64(self._buffer[self._at:end]), None, 0, b""
        self._at = end
        while not (match := ends(self._buffer, end)):
            if len(self._buffer) - self._at > 64 or not self.more():
                raise self.error("malformed segment")
            end = self._at
        self._at = match.end()

    def _entry(self, value: dict[str, Any]) -> Entry:
        value = {**{key.lower(): item for key, item in value.items()}, **value}
        kind, size, payload = value.get("type"), value.get("size") or 0, value.get("payload") or ""
        name, raw = value.get("name") or "", value.get("name_raw") or ""
        if not (isinstance(payload, str) and isinstance(name, str) and isinstance(raw, str)
                and isinstance(size, int) and -1 << 63 <= size < 1 << 63):
            raise self.error("a field of the wrong type")
        text = payload.encode("ascii", "replace").translate(None, b"\r\n")
        data = self._base64(text)
        if kind == 2:
            return data, None, 0, b""
        if kind != 1:
            raise self.error(f"an object of unknown type {kind!r}")
        if size > 0 and len(data) != 8:
            raise self.error("a checksum that is not of 8 bytes")
        path = self._base64(raw.encode("ascii", "replace")) if raw \
            else name.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
        return b"", path, size, text if size > 0 else b""

    def _base64(self, text: bytes) -> bytes:
        try:
            return decode_base64(text)
        except ValueError as error:
            raise self.error(f"malformed base64: {error}") from None


class LayerReader:
    """Reads the tar of a layer: headers from tar-split, contents from the layer's files.

    All that leaves a layer is made of the items that headers() and items() yield.  With ``whole``
    the content of a member is one Extent, the file as it is on disk.

    containers/storage stores sparse files expanded, and tar-split keeps no content.  The map of a
    sparse file is in its header (formats 0.0 and 0.1), or it stood before the content (1.0) and is
    reconstructed by ``convention``, or by the one that gives the digest of the layer.
    """

    PARSE_AHEAD = 256 << 10  # bytes of tar-split, of some 4,000 members; less saves no time

    def __init__(self, layer: Layer, convention: tuple[int, bool, int, int] | None = None, *,
                 whole: bool = False) -> None:
        self.layer, self._convention, self._whole = layer, convention, whole
        self.files: LayerFiles | None = None
        self.ahead = False  # whether another process parses tar-split although no file is opened

    def items(self) -> Generator[Item, None, None]:
        """Yield all items; the opener learns which files are opened next."""
        with LayerFiles(self.layer) as files:
            self.files = files
            yield from self.layer.storage.opener.ahead(
                self.headers(),
                lambda item: files.where(item[1].name) if item[1] and item[1].stored else None,
                lambda item: 1 + len(item[0]) // (8 << 10))

    def _entries(self, fd: int, path: str, plain: PlainHeaders | None
                 ) -> Generator[Entry, None, None]:
        """Return what yields the entries of the open tar-split file."""
        def parse() -> Generator[Entry, None, None]:
            with ErrorsAs(with_path, path):
                os.lseek(fd, 0, os.SEEK_SET)
            if plain:
                plain.padding = 0  # also when this process does it again
            return iter(TarSplit(gunzip(fd, path), path, plain))

        ahead = (self.files or self.ahead) and default_workers() > 1 \
            and os.fstat(fd).st_size > self.PARSE_AHEAD
        return work_ahead(parse, again=True) if ahead else parse()

    def headers(self, plain: PlainHeaders | None = None) -> Generator[Item, None, None]:
        """Yield all items without contents; with ``plain`` most are lists (b"", None, rows)."""
        layer, (fd, path) = self.layer, self.layer.open_tar_split()
        with Opened(fd), closing(self._entries(fd, path, plain)) as entries:
            pending: list[bytes] = []
            # Go writes no size of 0: the layer is empty, or older than the sizes in records.
            limit = layer.diff_size if layer.diff_digest and layer.diff_size > 0 else float("inf")
            length = padding = total = empty = 0
            for segment, name, size, checksum in entries:
                if plain and isinstance(segment, list):
                    for row in segment:
                        total += padding + BLOCK + row[2]
                        padding = -row[2] % BLOCK
                    yield b"", None, segment
                    if total > limit:
                        break
                    continue
                if plain:
                    plain.padding = -1
                length += len(segment)
                total += len(segment)
                empty += not segment and name is None
                if total > limit or empty > MAX_EMPTY:
                    break
                if name is None:
                    if length <= MAX_HEADERS:
                        pending.append(segment)
                    yield segment, None, ()
                    continue
                if length > MAX_HEADERS:
                    raise FormatError(f'"{display(name)}": more than {MAX_HEADERS} bytes of '
                                      "headers", file=path)
                header = b"".join([*pending, segment]) if pending else segment
                try:
                    member = Member(header[padding:], name, size, checksum)
                except FormatError as error:
                    raise FormatError(f'"{display(name)}": {error}', file=path) from None
                padding, length = member.padding, 0
                if plain:
                    plain.padding = padding
                total += member.stored
                if total > limit:
                    break
                pending.clear()
                yield segment, member, self._content(member) if self.files and member.stored \
                    else ()
            if empty > MAX_EMPTY:
                raise FormatError(f"more than {MAX_EMPTY} empty segments", file=path)
            if total != limit < float("inf"):
                raise IntegrityError(
                    "its tar has the wrong size", layer=layer.id, expected=str(limit),
                    actual=str(total) if total < limit else "more",
                    hint=f"its record's diff-size and {path} disagree, one is damaged; its files "
                         f"are in {layer.overlay_file(b'diff')[1].decode()}")

    def _content(self, member: Member) -> Iterator[bytes | Extent]:
        assert self.files
        if member.sparse == "1.0" and self._convention is None and not self._whole:
            self._convention = self._find_convention(member.name)
        fd = self.files.open(member.name, member.size)
        try:  # faster than Opened
            if member.sparse is None or self._whole:
                yield Extent(fd, 0, member.size, member)
                return
            table, runs = (b"", member.sparse) if isinstance(member.sparse, list) \
                else sparse_table(
                    fd, member.size, *(self._convention or (BLOCK, False, -1, 0)), member.stored)
            if len(table) + sum(length for _, length in runs) != member.stored \
                    or any(offset + length > member.size for offset, length in runs):
                raise self._lost_map(member.name)
            yield table
            for offset, length in runs:
                yield Extent(fd, offset, length, member)
        finally:
            os.close(fd)

    def _find_convention(self, name: bytes) -> tuple[int, bool, int, int]:
        """Return the convention for maps of sparse files (format 1.0) that gives the digest.

        File systems can have larger blocks, and zeros that were written are data.  Maps by several
        conventions can have the same length, so that only the layer's digest tells them apart.
        Raises IntegrityError for a damaged file, Unsupported when no convention gives the digest:
        it names the file at which the longest attempt stopped.
        """
        layer, found, reached = self.layer, self._lost_map(name), (0, 0)
        ways = [(*way, -1, 0) for way in SPARSE_CONVENTIONS]
        ways += [(1 << bit, end, -1, 0) for bit in range(13, 21) for end in (False, True)]
        ways += [(*way, gap, at << 12) for at in range(-1, 128) for gap in range(4)
                 for way in SPARSE_CONVENTIONS if at < 1 or way[0] == 4096]
        for convention in ways[:52 + MAX_TRIED // max(layer.diff_size, 1)] \
                if layer.diff_digest else ():
            sink = TarSink(None, hashing=True, layer=layer.id)
            try:
                pieces = join_pieces(LayerReader(layer, convention).items())
                if sink.take_all(pieces) == layer.diff_digest:
                    return convention
            except Unsupported as error:
                if (sink.size, sink.files) > reached:
                    found, reached = error, (sink.size, sink.files)
        layer.check_files()
        raise found

    def _lost_map(self, name: bytes) -> Unsupported:
        """Return the error for a sparse file without a map that fits."""
        return Unsupported(f'layer {self.layer.id}: "{display(name)}": the map of this sparse file '
                           "was not stored, and no reconstruction gives the layer's digest",
                           hint="its tar cannot be rebuilt; `image cat`, `cp`, `extract` and "
                                "`export` still work")


def join_pieces(items: Generator[Item, None, None]) -> Generator[bytes | Extent, None, None]:
    """Yield a tar as bytes and Extents; an Extent is valid until the next piece is read."""
    with closing(items):
        for literal, _, content in items:
            if literal:
                yield literal
            yield from content


class PassedFile:
    """The whole content of the open file ``fd``, from offset 0.

    ``length`` is the size that the sender told, or -1; ``origin`` is (directory, name in it, what
    settle() returned before it was read or b"") where the file can be opened again.  ``fd`` is -1
    if another process has read it.  Valid until the next chunk is read, when its maker closes it.
    """

    __slots__ = ("fd", "length", "origin")

    def __init__(self, fd: int, length: int = -1,
                 origin: tuple[Directory, bytes, bytes] | None = None) -> None:
        self.fd, self.length, self.origin = fd, length, origin

    def measure(self, file: str) -> int:
        """Return its size; ``file`` names the stream.  Raises as check_passed(), IntegrityError."""
        size = check_passed(self.fd) if self.fd >= 0 else self.length
        if self.length not in (-1, size):
            raise IntegrityError(f"{file}: a passed file has another size than its sender says",
                                 expected=str(self.length), actual=str(size))
        self.length = size
        return size


def check_passed(fd: int) -> int:
    """Return the size of a passed file; ProtocolError unless it is regular and open for reading."""
    status, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
    if not stat.S_ISREG(status.st_mode):
        raise ProtocolError(f"a {file_type(status.st_mode)} was passed, not a regular file",
                            code=FD_ERROR)
    if flags & os.O_PATH or flags & (os.O_WRONLY | os.O_RDWR) == os.O_WRONLY:
        raise ProtocolError("the passed file is not open for reading", code=FD_ERROR)
    return status.st_size


class TarSource:
    """A tar that comes in chunks; ``offset`` counts the bytes that were read."""

    def __init__(self, chunks: Iterable[bytes | PassedFile], file: str) -> None:
        self.file, self.offset = file, 0
        self._chunks = iter(chunks)
        self._data, self._at, self._missing = b"", 0, 0  # bytes that the end left out of headers
        self._last: bytes | None = b""  # data of the last header; see header_parts()
        self._cut = False  # whether the headers just read end before the member's own
        self.rest = b""  # blocks that were read and are not a header
        self._passed: PassedFile | None = None

    def _error(self, message: str) -> FormatError:
        return FormatError(message, file=self.file, offset=self.offset)

    def _fill(self) -> bool:
        """Read on until there are bytes or a passed file; return False at the end."""
        for _ in range(MAX_EMPTY + 2):
            if self._at < len(self._data) or self._passed:
                return True
            if (chunk := next(self._chunks, None)) is None:
                return False
            if isinstance(chunk, PassedFile):
                self._passed = chunk if chunk.measure(self.file) else None
            else:
                self._data, self._at = chunk, 0
        raise self._error(f"more than {MAX_EMPTY} empty chunks")

    def _some(self, most: int) -> bytes:
        """Return up to ``most`` bytes, b"" at the end."""
        if self._at == len(self._data) and not self._fill():
            return b""
        if self._passed:
            raise self._error("unexpected file descriptor inside headers")
        data = self._data[self._at:self._at + most]
        self._at += len(data)
        self.offset += len(data)
        return data

    def up_to(self, count: int) -> bytes:
        """Return ``count`` bytes, or fewer at the end."""
        end = self._at + count
        if end <= len(self._data):
            data = self._data[self._at:end]
            self._at = end
            self.offset += count
            return data
        parts = []
        while count and (part := self._some(count)):
            parts.append(part)
            count -= len(part)
        self._missing += count
        return b"".join(parts)

    def take(self, count: int) -> bytes:
        """Return ``count`` bytes.  Raises FormatError at the end."""
        if len(data := self.up_to(count)) < count:
            raise self._error("the tar is cut off")
        return data

    def items(self, *, need_end: bool = False, pairs: bool = False) -> Iterator[Item]:
        """Yield what read_stream() does."""
        padding = b""
        while True:
            start = self.offset
            try:
                header = self._read_header()
                member = self._parse(header, start)
            except FormatError as error:
                words = str(error) if start else f"not a tar: {error}"
                raise error if error.file else FormatError(words, file=self.file, offset=start) \
                    from None
            if not member:
                padding += header
                break
            content = self._content(member) if member.stored else ()
            yield padding + header, member, content
            for _ in content:  # what the caller did not read
                pass
            padding = bytes(member.padding) if pairs else self.up_to(member.padding)
            if self.rest:
                break
        if pairs and not self.rest:
            self.rest = bytes(2 * BLOCK)
        else:
            self.rest += self.up_to(BLOCK)
        if need_end and self.rest != bytes(2 * BLOCK):
            raise self._error("the tar has no end: it was cut off")
        yield padding + self.rest, None, ()
        for data in iter(lambda: self._some(CHUNK), b""):
            yield data, None, ()

    def _read_header(self) -> bytes:
        """Read the headers of one member; ``rest`` is a block behind them that is not one."""
        self._missing = 0
        parts, self.rest = header_parts(self.up_to, self._accept)
        self._last = parts[-1][2] if parts else b""
        self._cut = not parts or parts[-1][0] in SPECIALS and self._last is not None
        return parts[0][1] if len(parts) == 1 and not parts[0][2] else \
            b"".join([piece for part in parts for piece in part[1:] if piece])

    def _accept(self, block: bytes) -> bool:
        """Tell whether a block begins a header; zeros and the end of the file do not."""
        if not block.strip(b"\0"):
            return False
        check_sum(block.ljust(BLOCK, b"\0"))
        return len(block) == BLOCK

    def _parse(self, header: bytes, start: int) -> Member | None:
        """Make a member of its headers; None at the end, as for Go if its own header is missing."""
        if self._missing > (BLOCK - len(self.rest)) * self._cut or self._missing and any(self.rest):
            raise self._error("the tar is cut off inside headers")
        if self._cut:
            return None
        member = Member.parse(header)
        if member.typeflag == b"S":
            raise Unsupported(f'{self.file}: "{display(member.name)}" is a sparse file of GNU '
                              "tar's old format")
        return member

    def _cut_off(self, member: Member) -> None:
        """Handle the end of the tar inside a content."""
        raise self._error(f'the tar is cut off inside "{display(member.name)}"')

    def _content(self, member: Member) -> Iterator[bytes | Extent]:
        left = member.stored
        if self._at == len(self._data) and self._fill() and self._passed and member.sparse is None:
            passed, self._passed = self._passed, None
            if passed.length != left:
                raise IntegrityError(f"{self.file}: the passed file has another size than the "
                                     "tar's header says", name=member.name, expected=str(left),
                                     actual=str(passed.length))
            self.offset += left
            yield Extent(passed.fd, 0, left, member, passed.origin)
            return
        while left:
            if not (data := self._some(min(left, CHUNK))):
                self._cut_off(member)
                return
            left -= len(data)
            yield data


def read_stream(chunks: Iterable[bytes | PassedFile], file: str, *, need_end: bool = False,
                pairs: bool = False) -> Iterator[Item]:
    """Yield (bytes of the tar, member whose content follows or None, its content) of a stream.

    All together are the tar, bit for bit: the bytes include padding, special headers and what
    follows the last member.  A content has ``member.stored`` bytes and is valid until the next item
    is read; a passed file is one Extent.  With ``need_end`` the tar must end with two zero blocks:
    without them a cut between members cannot be noticed.  ``pairs`` is for streams of
    containers/storage's Go code, which lack padding and end: both are added.

    Raises FormatError with the offset in the tar, IntegrityError for passed files of another size,
    ProtocolError for a passed directory or device, Unsupported for GNU tar's old sparse files.
    """
    return TarSource(chunks, file).items(need_end=need_end, pairs=pairs)


def expand_content(member: Member, content: Iterable[bytes | Extent]) -> Iterator[bytes]:
    """Yield the content of a sparse member of a stream, its holes as zeros."""
    # The content of a sparse file is never passed as a file.
    chunks = (piece for piece in content if isinstance(piece, bytes))
    take = TarSource(chunks, f'"{display(member.name)}"').take
    left, runs = member.stored, member.sparse
    if runs == "1.0":
        runs, used = read_sparse_map(take)
        left -= used
    done = 0
    for offset, length in runs if isinstance(runs, list) else [(0, left)]:
        if offset < done or length > left or offset + length > member.size:
            raise FormatError(f'"{display(member.name)}": malformed sparse map')
        yield from map(bytes, split_count(offset - done))
        for count in split_count(length):
            yield take(count)
        done, left = offset + length, left - length
    if left:
        raise FormatError(f'"{display(member.name)}": malformed sparse map')
    yield from map(bytes, split_count(member.size - done))


def sparse_table(fd: int, size: int, block: int, always_end: bool, gap: int = -1, shift: int = 0,
                 stored: int = 0) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the map of sparse format 1.0 as stored before the content, and its runs.

    ``gap`` is the number of a gap between runs where zeros were written, as many as ``stored``
    lacks, ``shift`` bytes behind its start; -1 is at its end.
    """
    runs: list[tuple[int, int]] = []

    def add(start: int, length: int) -> None:
        if runs and sum(runs[-1]) == start:
            start, length = runs[-1][0], runs.pop()[1] + length
        runs.append((start, length))
        if len(runs) > MAX_EXTENTS:
            raise FormatError("a sparse file with too many runs")

    def table() -> tuple[bytes, list[tuple[int, int]]]:
        full = runs + [(size, 0)] * (always_end or not runs or sum(runs[-1]) < size)
        text = "".join(f"{number}\n" for number in (len(full), *(n for run in full for n in run)))
        return text.encode() + bytes(-len(text) % BLOCK), full

    at, zeros = 0, bytes(CHUNK)
    while at < size and (data := read_at(fd, CHUNK, at)):
        for start in range(0, len(data), block) if data != zeros[:len(data)] else ():
            if (part := data[start:start + block]) != zeros[:len(part)]:
                add(at + start, len(part))
        at += len(data)
    if 0 <= gap <= len(runs):
        length = stored - len(table()[0]) - sum(length for _, length in runs)
        first, last = [0, *map(sum, runs)][gap], [*(start for start, _ in runs), size][gap]
        start = last - length if shift < 0 else first + shift
        if length > 0 and first <= start <= last - length:
            found, runs = sorted([*runs, (start, length)]), []
            for run in found:
                add(*run)
    return table()


def write_out(out: int | BinaryIO, data: bytes | memoryview) -> None:
    """Write all of ``data`` to a descriptor, or to a binary file, which may take less at a time."""
    if isinstance(out, int):
        write_all(out, data)
        return
    view = memoryview(data)
    while view:
        if (count := out.write(view)) is None:
            raise BlockingIOError(errno.EAGAIN, "the output would block")
        view = view[count:]


class TarSink:
    """Collects a tar in large buffers, which a second thread hashes and writes.

    hashlib and write(2) release the GIL to the thread that reads.  Without ``hashing`` the kernel
    copies large extents.  ``out`` is a descriptor, an object with write(), or None.
    """

    KERNEL_COPY = 1 << 20  # for less, waiting for the other thread costs more
    BUFFERS = 4

    def __init__(self, out: int | BinaryIO | None, *, hashing: bool, layer: str,
                 progress: Progress | None = None, chunk: int = CHUNK) -> None:
        self.size = self.files = 0
        self._layer, self._progress = layer, progress
        if out is not None and not isinstance(out, int) and not hasattr(out, "write"):
            raise TypeError(f"out must be a descriptor or a binary file, not {type(out).__name__}")
        if progress:
            progress(0, 0)
        self._out = os.dup(out) if isinstance(out, int) else out  # the thread may outlive us
        self._copier = Copier() if isinstance(self._out, int) and not hashing else None
        self._hash = new_sha256() if hashing else None
        self._error: BaseException | None = None
        self._chunk = chunk
        # What returns the buffers, each when it was written, the next one first.
        self._buffers: list[Callable[[], Any]] = [lambda: bytearray(chunk)] * self.BUFFERS
        self._take_buffer()
        self._thread = Threads(1)

    def _take_buffer(self) -> None:
        self._buffer = self._buffers.pop(0)()
        self._view, self._fill = memoryview(self._buffer), 0

    def _write(self, view: memoryview) -> object:
        """Hash and write a buffer; return it, also after an error."""
        try:
            if self._error is None:
                if self._hash:
                    self._hash.update(view)
                if self._out is not None:
                    write_out(self._out, view)
        except BaseException as error:  # _flush() raises it in the thread that reads
            self._error = error
        return view.obj

    def _flush(self) -> None:
        self.size += self._fill
        view = self._view[:self._fill]
        self._buffers.append(self._thread.submit(lambda: self._write(view)))
        self._take_buffer()
        if self._error:
            raise self._error
        if self._progress:
            self._progress(self.size, self.files)

    def _drain(self) -> None:
        """Write all that is left, and wait for it."""
        self._flush()
        for written in self._buffers:
            written()
        if self._error:
            raise self._error

    def literal(self, data: bytes | memoryview) -> None:
        """Take bytes of the tar."""
        end = self._fill + len(data)
        if end > self._chunk:
            self._flush()
            data = memoryview(data)
            while len(data) > self._chunk:
                self._view[:], self._fill = data[:self._chunk], self._chunk
                data = data[self._chunk:]
                self._flush()
            end = len(data)
        self._buffer[self._fill:end] = data
        self._fill = end

    def extent(self, piece: Extent) -> None:
        """Take a range of a file.  Raises IntegrityError when the file is shorter."""
        at, left = piece.offset, piece.length
        self.files += 1
        if self._copier and left >= self.KERNEL_COPY:
            self._drain()
            assert isinstance(self._out, int)
            copied = self._copier.copy(piece.fd, at, left, self._out)
            self.size, at, left = self.size + copied, at + copied, left - copied
        while left:
            fill = self._fill
            try:
                n = os.preadv(piece.fd, [self._view[fill:fill + left]], at)
            except OSError as error:
                raise with_path(error, f"layer {self._layer}: {display(piece.member.name)}"
                                ) from None
            self._fill += n
            if n == left:
                return
            if n == 0 and fill < self._chunk:
                raise shrank(piece.length, piece.length - left, piece.member.name, self._layer)
            if self._fill == self._chunk:
                self._flush()
            at += n
            left -= n

    def take_all(self, pieces: Generator[bytes | Extent, None, None],
                 also: Callable[[bytes | Extent], object] | None = None) -> str:
        """Take a whole tar, each piece after ``also`` has had it; return as finish() does."""
        with closing(pieces), OnError(self.abort):
            for piece in pieces:
                if also:
                    also(piece)
                if isinstance(piece, Extent):
                    self.extent(piece)
                else:
                    self.literal(piece)
            return self.finish()

    def finish(self) -> str:
        """Write what is left; return the digest, "" without ``hashing``."""
        self._drain()
        self._close()
        return f"sha256:{self._hash.hexdigest()}" if self._hash else ""

    def abort(self) -> None:
        """End the thread after an error; it may be blocked by a reader that reads nothing."""
        self._error = InterruptedError()  # another one would keep all frames, and files, alive
        if abort := getattr(self._out, "abort", None):  # the thread may wait for it
            abort()
        self._close(0.5 if isinstance(self._out, int) else None)

    def _close(self, patience: float | None = None) -> None:
        out, self._out = self._out, None
        if isinstance(out, int):
            self._thread.submit(lambda: os.close(out))
        self._thread.close(patience)


# ================================================================================================
# 13. Layer trees
#
# What one layer has, built from its headers as containers/storage unpacks them:
#   .wh.NAME         hides NAME of the layers below, .wh..wh..opq all that they have in a directory;
#                    neither touches its own layer, wherever it stands in the tar
#   .wh..wh.*        else is bookkeeping of AUFS and is not shown; its parents are made
#   trusted.overlay.* xattrs (user.overlay.* in a user's store) act as in the mount
#   a hard link      is another name of the file, which takes owner, mode and time of its header
#   a parent         without an entry is made: root's, mode 0755; one that is a link is followed
#   char device 0,0  is a whiteout: to overlayfs there is no difference
#   times            before 1970 or after 2262 become 1970, but for symbolic links (Go's Chtimes)
# The driver vfs unpacks a layer into a copy of those below: parents without an entry stay as they
# are, links lead on, whiteouts remove, and no xattr or device means anything to overlayfs.
# A writable layer has no tar-split and is read from disk, where whiteouts, opaque directories,
# renamed directories (redirect) and stubs (metacopy) are devices and xattrs.
# ================================================================================================

# Files on disk as the TOC of eStargz names them.
NODE_TYPES = {stat.S_IFREG: "reg", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink",
              stat.S_IFCHR: "char", stat.S_IFBLK: "block", stat.S_IFIFO: "fifo",
              stat.S_IFSOCK: "socket"}
FILE_TYPES = {word: kind for kind, word in NODE_TYPES.items()}

# fuse-overlayfs and containers/storage with force_mask keep owner, mode and type in an xattr; the
# first of these that a file has counts.
OVERRIDES = (b"security.fuseoverlayfs.override_stat", b"user.fuseoverlayfs.override_stat",
             b"user.containers.override_stat")
FUSE_XATTRS = (b"user.fuseoverlayfs.", b"security.fuseoverlayfs.") + OVERRIDES[-1:]
# What the kernel takes as a redirect: one name, or an absolute path; no ".", ".." or "//".
REDIRECT = rb"(?:/(?!\.{1,2}(?:/|\Z))[^/]+)+|(?!\.{1,2}\Z)[^/]+"
MAX_ENTRIES = 4 << 20  # of one tree, at some 400 bytes each
MAX_XATTRS = 64 << 20  # all xattrs of one tree
MAX_STEPS = 16 << 20  # components of links that are followed to unpack one layer
UNPROVEN = "not proven without reading the layer"
_NO_CHILDREN: dict[bytes, Node] = {}
_NO_EXTRA: dict[str, Any] = {}


def linux_keeps(name: bytes, value: bytes, kind: str) -> bool:
    """Tell whether an xattr stays with a file: one rule for extract, stat, toc and diff.

    The kernel knows four namespaces, and takes user.* of files and directories alone, and an ACL of
    three entries for a mode.  security.selinux belongs to a place, so podman drops it, too.
    """
    if (space := name.partition(b".")[0]) == b"user":
        return kind in ("reg", "dir", "hardlink")
    if space == b"system":
        return kind == "dir" and name == b"system.posix_acl_default" or \
            kind != "symlink" and name == b"system.posix_acl_access" and len(value) > 28
    return space in (b"trusted", b"security") and name != b"security.selinux"


class Node:
    """One file of a layer: all names of a hard-link group share it.

    ``type`` is reg, dir, symlink, char, block, fifo, socket or whiteout.  ``mode`` (0 to 0o7777),
    ``mtime_ns``, ``size`` and ``linkname`` (a symbolic link's target) are as a container sees them.
    ``name`` is its last component, ``parent`` its directory's node, ``owner`` (uid, gid, uname,
    gname), ``extra`` what else is known; ``children`` map names to nodes.  ``opaque`` directories
    hide what lower layers have in them; ``implicit`` ones have no entry.  ``tree``: the LayerTree.
    """

    __slots__ = ("tree", "parent", "name", "type", "mode", "owner", "mtime_ns", "size", "linkname",
                 "opaque", "implicit", "children", "extra", "_checksum")

    def __init__(self, tree: LayerTree, parent: Node | None, name: bytes, kind: str) -> None:
        self.tree, self.parent, self.name, self.type = tree, parent, name, kind
        self.mode, self.mtime_ns, self.size = 0o755, 0, 0
        self.owner: tuple[int, int, bytes, bytes] = (0, 0, b"", b"")
        self.linkname = b""
        self.opaque = self.implicit = False
        self.children: dict[bytes, Node] = {} if kind == "dir" else _NO_CHILDREN
        self.extra: dict[str, Any] = _NO_EXTRA
        self._checksum: None | int | bytes = None

    def __repr__(self) -> str:
        return f"<Node {display(self.path)}>"

    @property
    def path(self) -> bytes:
        """The (first) name in its layer, relative."""
        parts, node = [], self
        while node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/".join(parts[::-1]) or node.name

    @property
    def uid(self) -> int:
        """The owner's ID in the container; ``owner`` is (uid, gid, user name, group name)."""
        return self.owner[0]

    @property
    def gid(self) -> int:
        """The group's ID in the container."""
        return self.owner[1]

    @property
    def xattrs(self) -> dict[bytes, bytes]:
        """Extended attributes, name to value: as a container sees them, or all of a layer alone."""
        found: dict[bytes, bytes] = self.extra.get("xattrs", {})
        hidden = FUSE_XATTRS + self.tree.hidden * (
            self.tree.kernel_made and self.tree.whiteouts or self.tree.below is not None)
        return {name: value for name, value in found.items()
                if linux_keeps(name, value, self.type) and not name.startswith(hidden)}

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor number; (0, 0) for what is not a device."""
        numbers: tuple[int, int] = self.extra.get("device", (0, 0))
        return numbers

    @property
    def checksum(self) -> int | None:
        """The CRC-64/ISO of the content as recorded; None when it is not."""
        if self.extra.get("data"):  # a stub: the content is that of another node
            recorded: int | None = self.extra["data"].checksum
            return recorded
        if isinstance(self._checksum, bytes):
            return int.from_bytes(binascii.a2b_base64(self._checksum), "big")
        return self._checksum

    @property
    def place(self) -> tuple[Contents, bytes] | None:
        """Where its content is opened; None where its layer has none.  See Opener."""
        return self.tree.where(self.path) if self.type == "reg" and self.size \
            and "data" not in self.extra else None

    def checked(self, fd: int) -> Iterator[bytes]:
        """Yield its content from its open file; see read_checked()."""
        return read_checked(fd, self.size, checksum=self.checksum, name=self.path,
                            layer=self.tree.layer_id)

    def describe(self, member: Member) -> None:
        """Set the fields from a header; of a hard link's all but size and content."""
        member.read_fields()
        self.mode, self.mtime_ns = member.mode, member.mtime_ns
        self.owner = self.tree.intern((member.uid, member.gid, member.uname, member.gname))
        if (kind := member.type) == "reg":
            self.size, self._checksum = member.size, member.base64
        elif kind == self.type:  # no other name of something else
            if kind in ("symlink", "hardlink"):
                self.linkname = member.linkname
            elif kind in ("char", "block"):
                self.extra = {"device": (member.devmajor, member.devminor)}
        if xattrs := star_xattrs(member.pax):
            self.extra = {**self.extra, "xattrs": xattrs}

    def find(self, parts: Sequence[bytes]) -> Node | None:
        """Return what its own layer has at a path below this directory, also a whiteout."""
        node: Node | None = self
        for part in parts:
            node = node.children.get(part) if node else None
        return node


def copy_fields(old: Node, new: Node) -> None:
    """Give a directory the metadata of another one."""
    for field in ("mode", "owner", "mtime_ns", "extra", "implicit"):
        setattr(new, field, getattr(old, field))


class LayerTree(Closing):
    """The tree of one layer, from its headers, which are read when it is first used.

    A context manager; owns the layer's directories once a content was opened.
    """

    whiteouts = True  # names beginning with .wh. have their meaning
    kernel_made = False  # whether the kernel itself wrote overlayfs's xattrs
    below: Tree | None = None  # the layers that it lies on, when they are merged
    opened: list[tuple[LayerFiles, int]] | None = None  # what is open of all layers
    rootless = False  # whether overlayfs's xattrs begin with user.
    whole = False  # whether it was unpacked into a copy of the layers below, by the driver vfs
    LARGE = 1 << 20  # bytes of tar-split, of some 16,000 entries

    def __init__(self, layer: Layer | None) -> None:
        if layer:
            self.rootless, self.whole = layer.storage.rootless, layer.storage.driver == "vfs"
        self.layer, self.layer_id = layer, layer.id if layer else ""
        self.label = layer.label if layer else "tree"  # what it is, for messages
        self.storage = layer.storage if layer else None
        self.heeded: tuple[bytes, ...] = () if self.whole else (  # overlayfs never sees it
            b"user.overlay." if self.rootless else b"trusted.overlay.",)
        # A container sees none of these; in a user namespace there is no trusted.*.
        self.hidden = (b"trusted.",) * self.rootless + self.heeded
        self._files: LayerFiles | None = None
        self._owners: dict[Any, Any] = {}
        self._parts: dict[tuple[tuple[bytes, ...], ...], LayerTree] = {}  # see limited()
        self.note = ""  # what a reader should know of it
        self._clear()

    def _clear(self) -> None:
        """Forget what was read."""
        self.linked: dict[Node, list[tuple[Node, bytes]]] = {}  # by node, its further names
        self._root: Node | None = None
        self._unheeded = False  # whether read_ahead() has left _heed() to do
        self._at: bytes | None = None  # the directory of the last entry
        self._directory: Any = None
        self._count = self._steps = self._xattrs = self._holes = 0  # against MAX_ENTRIES etc.
        self._aufs: list[tuple[Node, bytes]] = []
        self._under: dict[Node, list[Node]] = {}  # see _covered()
        self._marked: dict[Node, None] = {}  # what has xattrs that overlayfs heeds
        self._moved: list[Node] = []  # renamed directories and stubs
        self._unseen: dict[Node, int] = {}  # how many more names a file has on disk

    def close(self) -> None:
        """Close what content was opened through; harmless when repeated."""
        if self._files:
            self._files.close()
            self._files = None

    @property
    def root(self) -> Node:
        """The root directory.  Raises FormatError, Unsupported, NeedsUnshare."""
        if self._root is None or self._unheeded:
            with OnError(self._clear):
                for tree in self.below.layers[::-1] if self.whole and self.below else ():
                    assert tree.root  # not one from within the other, of hundreds
                if self._root is None:
                    self._root = self._new_root()
                    self._load()
                self._unheeded = False
                self._heed()
                self._under.clear()
        return self._root

    def _new_root(self) -> Node:
        root = Node(self, None, b"", "dir")
        root.implicit, root.mode = True, 0o555  # as containers/storage makes it
        return root

    def reach(self, parts: Sequence[bytes], *, below: bool = False) -> Node:
        """Return a root that has at least what is at a path, and with ``below`` all below it."""
        return self.part([parts], below).root

    def part(self, tops: Sequence[Sequence[bytes]], below: bool) -> LayerTree:
        """Return a tree of what is on the way to some paths, and with ``below`` all below them."""
        return self

    @property
    def unread(self) -> bool:
        """Whether it is a layer's whole tree, and was not read yet."""
        return type(self) is LayerTree and self.layer is not None and self._root is None \
            and not self.whole

    def limited(self, tops: Sequence[Sequence[bytes]]) -> LayerTree:
        """Return a tree that has at least what is below some paths, with the same hard links."""
        key = tuple(map(tuple, tops))
        if key not in self._parts and self.unread and len(self._parts) < Lookups.TRIES \
                and all(parts and is_plain(b"/".join(parts)) for parts in tops):
            part = PartTree(self, tops)
            self._parts[key] = part if part.proven() else self
        return self._parts.get(key, self)

    def _load(self) -> None:
        items: Any = LayerReader(self.layer).headers(PlainHeaders()) if self.layer else ()
        for _, member, rows in items:
            if member:
                self.add(member)
            elif rows:
                self._add_plain(rows)

    def is_large(self) -> bool:
        """Tell whether another process saves time in reading it."""
        assert self.layer
        with suppress(CstorError, OSError), Opened(self.layer.open_tar_split()[0]) as fd:
            return os.fstat(fd).st_size > self.LARGE
        return False

    def read_ahead(self) -> Generator[None, None, None]:
        """Read it in steps: another process reads the entries, and this one makes the nodes."""
        # Nothing stays of it after an error.
        assert self.layer
        reader = LayerReader(self.layer)
        with OnError(self._clear), closing(work_ahead(lambda: (
                (member.header, member.name, member.size, member.base64) if member else (b"", rows)
                for _, member, rows in reader.headers(PlainHeaders())), lot=64 << 10)) as items:
            self._root = self._new_root()
            for header, *rest in items:
                if header:
                    self.add(Member(header, *rest))
                else:
                    self._add_plain(*rest)
                yield
            self._unheeded = True

    def _add_plain(self, rows: list[PlainRow]) -> None:
        """Enter the members that PlainHeaders read, as add() does."""
        for name, kind, size, checksum, owner, mtime_ns, target in rows:
            node: Node | None
            parent, _, base = name.rpartition(b"/")
            if parent == self._at and base not in (b"", b".", b"..") and base[:4] != b".wh." \
                    and base not in self._directory.children and b"\0" not in base \
                    and len(name) <= MAX_PATH:
                node = self._directory.children[base] = Node(self, self._directory, base, kind)
                self._count += 1
                if self._count > MAX_ENTRIES:
                    raise FormatError(f"more than {MAX_ENTRIES} entries", file=self.label)
            else:
                node = self._node_for(name, kind)
                if node is None:
                    continue
            node.mode, node.owner = owner
            node.mtime_ns, node.implicit = mtime_ns, False
            if kind == "reg":
                node.size, node._checksum = size, checksum
            elif kind == "symlink":
                node.mode, node.linkname, node.owner = 0o777, target, self.intern(node.owner)

    def intern(self, value: T) -> T:
        """Return an equal value that was seen before, so that each is kept once."""
        return self._owners.setdefault(value, value)  # type: ignore[no-any-return]

    def expand(self, member: Member, content: Iterable[bytes | Extent]) -> Iterator[Any]:
        """Return the content of a member of a stream, of a sparse file with its holes."""
        if member.sparse is None:
            return iter(content)
        self._holes += member.size - member.stored
        if self._holes > MAX_EXPANDED:
            raise Unsupported(f'{self.label}: "{display(member.name)}": sparse files with holes of '
                              f"more than {MAX_EXPANDED >> 30} GiB")
        return expand_content(member, content)

    def add(self, member: Member) -> Node | None:
        """Enter one member of the tar; return its node, if it gets one.  Raises FormatError."""
        node = self._node_for(member.name, member.type, member)
        if node is None or node.tree is not self:  # of a layer below: nothing of it changes
            return None
        try:
            self._apply(node, member)
        except FormatError as error:
            raise FormatError(f'"{display(member.name)}": {error}', file=self.label) from None
        return node

    def _node_for(self, name: bytes, kind: str, member: Member | None = None) -> Node | None:
        """Return the node for a name in the tar; None when nothing is made of it."""
        name = clean_name(name)
        parent, _, base = name.rpartition(b"/")
        if kind == "global":
            return None
        if len(name) > MAX_PATH:
            raise FormatError(f'name too long: "{display(name[:80])}..."', file=self.label)
        whiteout = self.whiteouts and base.startswith(b".wh.")
        if parent != self._at:
            self._at = None
            self._directory = self._make_directory(parent, "skip" if whiteout else "make")
            if self._directory is None:  # rm -rf d can give .wh.d and d/.wh.f: Go passes over it
                return None
            self._at = parent
        directory = self._directory
        if not base:
            return self.root if kind == "dir" else None  # Go makes nothing of a file named ""
        if whiteout:
            self._add_whiteout(directory, base)
            return None
        if kind == "hardlink":
            assert member
            return self._add_link(directory, base, member)
        return self._add_node(directory, base, kind)

    def _apply(self, node: Node, member: Member) -> None:
        """Set a node's fields from a header, as Go and the kernel read it."""
        kind, mtime, owner, extra = member.type, node.mtime_ns, node.owner, node.extra
        node.describe(member)
        if len(member.linkname) > MAX_PATH or kind == "symlink" and not member.linkname:
            raise FormatError("its link is empty or too long")
        node.implicit = False
        if node.type == "symlink":  # a hard link's header sets its owner, not mode and time
            node.mode = 0o777
            node.mtime_ns = mtime if kind == "hardlink" else \
                (node.mtime_ns + (1 << 63)) % (1 << 64) - (1 << 63)  # Go's UnixNano()
        elif not 0 <= node.mtime_ns < 1 << 63:
            node.mtime_ns = 0
        uid, gid, uname, gname = node.owner
        if not (0 <= uid < NO_ID and 0 <= gid < NO_ID):  # -1: chown(2) changes nothing
            uid, gid = (old if new & NO_ID == NO_ID else new & NO_ID
                        for old, new in ((owner[0], uid), (owner[1], gid)))
            node.owner = self.intern((uid, gid, uname, gname))
        if node.extra is extra and not extra:
            return
        xattrs = star_xattrs(member.pax)
        if kind == "hardlink" or kind == "dir" and self.whole:
            # Its xattrs are added; a change of owner takes capabilities.
            before = dict(extra.get("xattrs", {}))
            if owner[:2] != node.owner[:2]:
                before.pop(b"security.capability", None)
            node.extra = {**extra, "xattrs": {**before, **xattrs}}
        elif kind in ("char", "block"):
            device = member.devmajor & 0xFFF, member.devminor & 0xFFFFF
            node.extra = {**node.extra, "device": device}
            if kind == "char" and self.whiteouts and device == (0, 0) and not self.whole:
                node.type = "whiteout"
        if self.whiteouts and node.parent and xattrs:
            self._marked[node] = None
        self._xattrs += sum(map(len, xattrs.values()))
        if self._xattrs > MAX_XATTRS or any(len(key) > 255 or len(value) > 64 << 10
                                            for key, value in xattrs.items()):
            raise FormatError("its xattrs are too long, or too many in all")

    def _add_node(self, directory: Node, base: bytes, kind: str) -> Node:
        old = directory.children.get(base)
        if old is not None and old.type == kind == "dir":
            return old
        node = Node(self, directory, base, kind)
        if kind == "dir":
            node.mode |= directory.mode & stat.S_ISGID  # mkdir(2) passes it on
        covered = self._covered(directory, base) if kind == "dir" and self.whole else []
        if old is not None:
            node.opaque = kind == "dir" and (old.type == "whiteout" or old.opaque)
        elif covered and covered[0].type == "dir":
            copy_fields(covered[0], node)
        self._put(directory, base, node)
        return node

    def _put(self, directory: Node, base: bytes, node: Node) -> None:
        """Give a name to a node, and take it from another."""
        self._count += 1
        if self._count > MAX_ENTRIES:
            raise FormatError(f"more than {MAX_ENTRIES} entries", file=self.label)
        if base in directory.children:
            self._at = None  # it may be the last entry's directory, which is replaced
        directory.children[base] = node
        if self.whiteouts and base.startswith(b".wh..wh."):
            self._aufs.append((directory, base))

    def _add_link(self, directory: Node, base: bytes, member: Member) -> Node:
        """Give the target one more name; in an image that podman never had it can lie below."""
        parent, _, last = clean_name(member.linkname).rpartition(b"/")
        above = self._make_directory(parent, "look")
        node: Node | None = above.children.get(last) if above else None
        if self.below and (self.whole or not self.layer) and node is None:
            with suppress(NotFound):
                node = Tree([self, *self.below.layers]).look_up(
                    clean_name(member.linkname), False)[1]
        if node is None or node.type == "dir":
            raise FormatError(f'"{display(member.name)}" is a hard link to '
                              f'"{display(member.linkname[:200])}", which its layer does not have',
                              file=self.label)
        if directory.children.get(base) is not node:
            self._put(directory, base, node)
            node.tree.linked.setdefault(node, []).append((directory, base))
        return node

    def _heed(self) -> None:
        """Apply the names and xattrs that have a meaning, once all are known."""
        for directory, base in self._aufs:
            directory.children.pop(base, None)
        words = {word for node in self._marked for word in self._interpret(node)}
        if self.below and self._moved:
            self._join(self.below)
        if words and not self.kernel_made:
            refused = [display(node.path) for node in self._moved if node.extra["refused"]]
            self.note = (f"layer {self.layer_id or self.label}: overlayfs's own xattrs in it "
                         f"({', '.join(sorted(words))}) act as in a mount"
                         f"{' with metacopy=on' * ('metacopy' in words)}"
                         f"{'; refused: ' * bool(refused)}{', '.join(refused)[:99]}")
            if self.storage and self.note not in self.storage.notes:
                self.storage.notes.append(self.note)

    def _warn(self, text: str) -> None:
        if self.storage and f"{self.label}: {text}" not in self.storage.faults:
            self.storage.faults.append(f"{self.label}: {text}")

    def _interpret(self, node: Node) -> set[str]:
        """Read overlayfs's xattrs of a node as the kernel does; return its words."""
        found = {name[len(prefix):].decode("latin-1"): value for prefix in self.heeded
                 for name, value in node.extra["xattrs"].items() if name.startswith(prefix)}
        redirect, stub = found.get("redirect", b"").partition(b"\0")[0], "metacopy" in found
        if node.type == "dir":
            stub, node.opaque = False, node.opaque or found.get("opaque") == b"y"
        elif node.type != "reg" or "whiteout" in found and not node.size:
            stub, node.type = False, "whiteout" if node.type == "reg" else node.type
        if (self.below or self.kernel_made) and (
                stub or redirect and node.type == "dir" and not node.opaque):
            bad = self.rootless or redirect and not re.fullmatch(REDIRECT, redirect) or stub \
                and len(found["metacopy"]) < 4
            node.extra = {**node.extra, "redirect": redirect, **({"data": None} if stub else {}),
                          "refused": bool(bad) and not self.kernel_made}
            self._moved.append(node)
        return {"opaque", "whiteout", "redirect", "metacopy"} & set(found)

    def _join(self, below: Tree) -> None:
        """Fill in what renamed directories and stubs take from the layers below."""
        places = [below._find(lower_path(node), top=False) for node in self._moved]
        self._count += max(layer._count * bool(layer._moved) for layer in below.layers)  # adds up
        for node, found in zip(self._moved, places):
            kind = found[0].type if found and not node.extra["refused"] else ""
            if node.type == kind == "dir":
                self._graft(node, found, below)
            elif node.type == "dir":
                node.opaque, node.children = True, {} if node.extra["refused"] else node.children
            elif kind == "reg" and (found[0].size == node.size or not self.kernel_made):
                node.extra, node.size = {**node.extra, "data": found[0]}, found[0].size

    def _graft(self, directory: Node, nodes: Sequence[Node], below: Tree) -> None:
        """Put into a renamed directory what the layers below have at its old place."""
        todo = [(directory, nodes)]
        while todo:
            directory, nodes = todo.pop()
            directory.opaque = True  # nothing else of the layers below belongs here
            for name, found in below._merge(nodes):
                child = directory.children.get(name)
                if child is None and found[0].type != "dir":
                    self._put(directory, name, found[0])
                    continue
                if child is None:
                    child = self._add_node(directory, name, "dir")
                    copy_fields(found[0], child)
                elif child.type != "dir" or child.opaque or "redirect" in child.extra \
                        or found[0].type != "dir":
                    continue
                todo.append((child, found))

    def _add_whiteout(self, directory: Node, base: bytes) -> None:
        if base == OPAQUE_MARKER:
            directory.opaque = True
            return
        target = base[4:]
        if target in (b"", b".", b".."):
            raise FormatError(f'malformed whiteout: "{display(base)}"', file=self.label)
        if (old := directory.children.get(target)) is None or self.whole:
            self._add_node(directory, target, "whiteout")
        else:
            old.opaque = old.type == "dir"

    def _make_directory(self, path: bytes, how: str) -> Any:
        """Return the directory ``path``, links followed.

        ``how`` says what happens to a component that is missing or not a directory: "make" creates
        the first and raises FormatError for the second, "skip" creates the first and returns None
        for the second, "look" returns None for both.
        """
        node, links = self.root, 0
        todo = path.split(b"/")[::-1]
        while todo:
            if (part := todo.pop()) in (b"", b"."):
                continue
            if part == b"..":
                node = node.parent or node
                continue
            child: Node | None = node.children.get(part)
            if child is None and self.whole:
                child = next((old for old in self._covered(node, part) if old.type == "symlink"),
                             None)
            if child is not None and child.type == "symlink":
                links += 1
                todo += child.linkname.split(b"/")[::-1]
                self._steps += len(todo)
                if links > MAX_SYMLINKS or self._steps > MAX_STEPS:
                    raise FormatError(f'"{display(path)}" is behind a loop of symbolic links',
                                      file=self.label)
                if child.linkname.startswith(b"/"):
                    node = self.root
                continue
            if child is None or child.type != "dir":
                if how == "look" or child is not None and how == "skip" and not (
                        self.whole and child.type == "whiteout"):
                    return None
                if child is not None and child.type != "whiteout":
                    raise FormatError(f'"{display(path)}" is not a directory, but has entries',
                                      file=self.label)
                child = self._add_node(node, part, "dir")
                child.implicit = True
            node = child
        if links and len(node.path) > MAX_PATH:
            raise FormatError(f'name too long: "{display(node.path[:80])}..."', file=self.label)
        return node

    def _covered(self, directory: Node, name: bytes) -> list[Node]:
        """Return what the layers below, which vfs unpacks this one into, have at a name.

        As of Tree._find(): one node, or the directories that are merged there.
        """
        if not self.whole or self.below is None or directory.opaque:
            return []
        if (nodes := self._under.get(directory)) is None:
            nodes = self._under[directory] = self._covered(directory.parent, directory.name) \
                if directory.parent else self.below._find([], top=False)
        self._steps += len(nodes)
        if self._steps > MAX_STEPS:
            raise FormatError("too many directories in too many layers", file=self.label)
        found: list[Node] = []
        for child in filter(None, [node.children.get(name) for node in nodes]):
            if child.type == "dir" or not found:
                found.append(child)
            if child.type != "dir" or child.opaque:
                break
        return found

    @property
    def files(self) -> LayerFiles:
        """What opens the contents."""
        assert self.layer
        if self._files is None:
            self._files = LayerFiles(self.layer, self.opened)
        return self._files

    @property
    def opener(self) -> Opener:
        """What opens the contents of its storage."""
        return self.storage.opener if self.storage else Opener()

    def where(self, path: bytes) -> tuple[Contents, bytes] | None:
        """Return where a content of this layer is; see Opener.  None in a stream's tree."""
        return self.files.where(path) if self.layer else None

    def open(self, node: Node) -> int:
        """Open the content of a regular file; a stub's is in a layer below."""
        if "data" not in node.extra:
            return self._open(node)
        data: Node | None = node.extra["data"]
        if data is None:
            why = "overlayfs refuses its redirect or metacopy xattr" if node.extra["refused"] \
                else "its content is not in the layers below"
            raise Unsupported(f'{self.label}: "{display(node.path)}" cannot be read: {why}')
        return data.tree.open(data)

    def _open(self, node: Node) -> int:
        for parent, name in self.linked.get(node, ()):
            if self.root.find(node.path.split(b"/")) is node:
                break
            node.parent, node.name = parent, name  # another file has the first name now
        return self.files.open(node.path, node.size)

    def staged(self, node: Node) -> tuple[int, bytes, str] | None:
        """Return where a content lies that may be moved into place; None for one to be copied."""
        # That is (directory, name in it, why it is a copy or "").
        return None

    def recheck(self, node: Node, fd: int) -> None:
        """Check again, after a content was copied, that ``fd`` is what was read and verified."""


class DiskTree(LayerTree):
    """The tree of a directory: a container's writable layer, or any host directory.

    ``overlay`` says that whiteouts have their meaning; of a layer of the driver vfs it is what it
    changes, by its whole tree and that of the layer below.  Owns ``directory``.
    """

    def __init__(self, directory: Directory, layer: Layer | None = None, *,
                 overlay: bool = True) -> None:
        super().__init__(layer)
        self.directory = directory if isinstance(directory, Contents) else Contents(None, directory)
        self.label, self.storage = directory.path, self.directory.storage
        self.whiteouts = overlay
        self.heeded = (b"trusted.overlay.", b"user.overlay.", b"user.fuseoverlayfs.")
        # How IDs on disk are to be read, one map after the other.
        self.maps = [self.storage.id_maps] if self.storage else []
        if layer:
            self.maps.append((id_ranges(layer.uidmap), id_ranges(layer.gidmap)))
        self._strangers: dict[str, set[tuple[int, int]]] = {}  # files at 65534, by why
        self._groups: dict[tuple[int, int], Node] = {}

    kernel_made = True
    writable = False  # whether it is a container's own layer, which never has a digest
    _tops: Sequence[Sequence[bytes]] = ()  # see part(); without any it is the whole tree
    _deep = True

    def close(self) -> None:
        for why, files in self._strangers.items():
            self._warn(f"owner or group 65534 in {counted(len(files), 'file')}: {why}")
        self.directory.close()

    def where(self, path: bytes) -> tuple[Contents, bytes]:
        return self.directory, path

    def limited(self, tops: Sequence[Sequence[bytes]]) -> LayerTree:
        part = self.part(tops, True)
        return part if part is not self and part.root and not any(part._unseen.values()) else self

    def part(self, tops: Sequence[Sequence[bytes]], below: bool) -> DiskTree:
        if self._root or self.whiteouts or self._tops or below and not all(tops):
            return self
        part = DiskTree(self.directory, self.layer, overlay=False)  # with hard links of its own
        part.maps, part._strangers, part._tops, part._deep = self.maps, self._strangers, tops, below
        return part

    def _load(self) -> None:
        """Read it by descriptors of its own: what is there now, and none stays open."""
        top = self.directory
        with Contents(top.storage, Directory(top.path, os.dup(top.fd))) as directory:
            self._fill(self.root, *directory.inspect(b"."))
            chain = self.layer.storage.chain(self.layer.id) if self.layer and self.whole else []
            with chain[-2].diff() if chain[1:] else nullcontext() as old:
                for parts in self._tops or ((),):
                    self._read(directory, old, parts, self._deep)

    def _read(self, directory: Contents, old: Contents | None, parts: Sequence[bytes], below: bool
              ) -> None:
        """Enter a path, with ``below`` all below it; of vfs what differs from the layer below."""
        top, depth = self.root, 0
        while not old and depth < len(parts) and (known := top.children.get(parts[depth])):
            top, depth = known, depth + 1
        todo = [(top, b"/".join(parts[:depth]), old, parts[depth:])]
        same: list[Node] = []  # directories
        while todo:
            above, path, parent, rest = todo.pop()
            if above.type != "dir" or not (below or rest):
                continue
            before = {row[0]: row[1:] for row in self._rows(parent, path, rest)}
            for name, *found in self._rows(directory, path, rest):
                other = before.pop(name, None)
                equal = other is not None and is_same_file(other, found)
                if equal and not stat.S_ISDIR(found[0].st_mode):
                    continue
                node = rest and above.children.get(name) or self._enter(above, name, *found)
                if node and node.type == "dir":
                    same += [node] * equal
                    todo.append((node, path + b"/" + name if path else name, parent if other and
                                 stat.S_ISDIR(other[0].st_mode) else None, rest[1:]))
            for name in before:
                self._add_node(above, name, "whiteout")
        for node in reversed(same):
            if not node.children and node.parent:
                del node.parent.children[node.name]

    @staticmethod
    def _rows(directory: Contents | None, path: bytes, parts: Sequence[bytes]
              ) -> Iterator[tuple[Any, ...]]:
        """Yield what scan() yields of a directory, or of the first of ``parts`` alone."""
        if directory and not parts:
            yield from directory.scan(path)
        elif directory and len(parts[0]) < 256 and b"\0" not in parts[0]:
            with suppress(FileNotFoundError, NotADirectoryError):
                name = path + b"/" + parts[0] if path else parts[0]
                if found := directory.inspect(name):
                    yield (parts[0], *found)

    def _enter(self, above: Node, name: bytes, status: os.stat_result, link: bytes,
               xattrs: dict[bytes, bytes]) -> Node | None:
        """Enter one name; return its node, None for a whiteout."""
        if self.whiteouts and name.startswith(b".wh."):
            if name in (OPAQUE_MARKER, b".wh..opq"):  # AUFS, and fuse-overlayfs
                above.opaque = True
            elif not name.startswith(b".wh..wh."):
                self._add_whiteout(above, name)
            return None
        node = Node(self, above, name, NODE_TYPES[stat.S_IFMT(status.st_mode)])
        self._fill(node, status, link, xattrs)
        old = above.children.get(name)
        if old is not None and old.type == "whiteout":
            node.opaque = node.type == "dir"
        group = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and node.type not in ("dir", "whiteout"):
            node = self._groups.setdefault(group, node)
            self._unseen[node] = self._unseen.get(node, status.st_nlink) - 1
            if node.name != name or node.parent is not above:
                self.linked.setdefault(node, []).append((above, name))
        self._put(above, name, node)
        return node

    def _fill(self, node: Node, status: os.stat_result, link: bytes, xattrs: dict[bytes, bytes]
              ) -> None:
        """Set a node's fields from what look_at() returns."""
        node.linkname = link
        node.mode, node.mtime_ns = stat.S_IMODE(status.st_mode), status.st_mtime_ns
        uid, gid = self._owner(node, status)
        for uids, _ in self.maps:
            capability = xattrs.get(b"security.capability", b"")
            if uids and len(capability) == 24 and map_id(
                    int.from_bytes(capability[20:], "little"), uids, -1) == 0:  # of root in there
                xattrs[b"security.capability"] = capability[:3] + b"\x02" + capability[4:20]
        node.size = status.st_size if node.type == "reg" else 0
        node.implicit = False
        device = os.major(status.st_rdev), os.minor(status.st_rdev)
        extra: dict[str, Any] = {"xattrs": xattrs} if xattrs else {}
        if self.whiteouts:
            if xattrs:
                self._marked[node] = None
            if not node.parent and any(name.startswith(b"user.overlay.") for name in xattrs):
                self.hidden += (b"user.overlay.",)  # root has a copy of a rootless store
            uid, gid, device = self._override(node, xattrs, (uid, gid, device))
        if node.type in ("char", "block"):
            extra["device"] = device
            if self.whiteouts and node.type == "char" and device == (0, 0):
                node.type = "whiteout"
        node.owner = self.intern((uid, gid, b"", b""))
        node.extra = extra or _NO_EXTRA

    def _owner(self, node: Node, status: os.stat_result) -> tuple[int, int]:
        """Return owner and group in the container; close() reports what no map covers."""
        uid, gid = status.st_uid, status.st_gid
        for number, (uids, gids) in enumerate(self.maps):
            if number and uids and uid == gid == 0 and node.parent is None:
                if map_id(0, uids, -1):
                    self._warn("shown as its container's root's: podman gives it to that when it "
                               "first starts the container")
                break
            known, uid, gid = min(uid, gid), map_id(uid, uids, -1), map_id(gid, gids, -1)
            if min(uid, gid) < 0 <= known:
                self._strangers.setdefault(
                    "the container's own map does not cover their IDs" if number else "their IDs "
                    "are in no range known of the store's owner (--owner-ids FILE names more)",
                    set()).add((status.st_dev, status.st_ino))
        return 65534 if uid < 0 else uid, 65534 if gid < 0 else gid

    @staticmethod
    def _override(node: Node, xattrs: dict[bytes, bytes], found: tuple[int, int, tuple[int, int]]
                  ) -> tuple[int, int, tuple[int, int]]:
        """Return owner and device as force_mask keeps them in an xattr; set type and mode too."""
        override = re.fullmatch(
            rb"(\d{1,10}):(\d{1,10}):([0-7]{1,7})"
            rb"(?::(file|dir|pipe|socket|char|block)(?:-(\d{1,10})-(\d{1,10}))?)?",
            next((xattrs[name] for name in OVERRIDES if name in xattrs), b""))
        if not override:
            return found
        uid, gid, device = int(override[1]), int(override[2]), found[2]
        node.mode = int(override[3], 8) & 0o7777
        if override[4] and override[4] not in (b"file", b"dir"):
            word = override[4].decode()
            node.type = {"pipe": "fifo"}.get(word, word)
            node.size = 0
            device = int(override[5] or 0), int(override[6] or 0)
        return uid, gid, device

    def _open(self, node: Node) -> int:
        path = node.path
        fd = self.directory.open(path)
        if os.fstat(fd).st_size != node.size:
            os.close(fd)
            raise IntegrityError(f'{self.directory.host_path(path)}: changed while it was read')
        return fd


def is_same_file(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Tell from what look_at() returns whether a file is the unchanged copy of another."""
    keys = [(status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_mtime_ns,
             0 if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_nlink),
             link, xattrs) for status, link, xattrs in (a, b)]
    return keys[0] == keys[1]


class DiskPart(DiskTree):
    """What "diff" has at some paths without a helper; Unsupported where that proves nothing."""

    def __init__(self, layer: Layer) -> None:
        root, path = layer.overlay_file(b"diff")
        if root is None or layer.incomplete or layer.mapped or keeps_objects(layer) \
                or any(layer.overlay_file(name)[0] for name in (b"diff1", b"additionallayer")):
            raise Unsupported(UNPROVEN)
        super().__init__(Directory.directory(root, path), layer)
        self.maps = [layer.storage.id_maps]
        self._root, self._directories = Node(self, None, b"", "dir"), {b"": True}  # that are there
        with OnError(self.close):
            self._fill(self.root, *self.directory.inspect(b"."))

    def reach(self, parts: Sequence[bytes], *, below: bool = False) -> Node:
        self._read(self.directory, None, parts, below and bool(parts))
        for node in self._marked:
            self._interpret(node)
        self._marked.clear()
        if self._moved or any(part.startswith(b".wh.") for part in parts):
            raise Unsupported(UNPROVEN)
        return self.root

    def has_directory(self, path: bytes) -> bool:
        """Tell whether the path of a name in the tar is a directory, and leads through no link."""
        todo = []
        while path not in self._directories:
            todo.append(path)
            path = path.rpartition(b"/")[0]
        found = self._directories[path]
        while found and todo:
            path = todo.pop()
            status = os.lstat(path, dir_fd=self.directory.fd)
            found = self._directories[path] = stat.S_ISDIR(status.st_mode)
        return found


class TarTree(LayerTree):
    """The tree of a tar file, plain or compressed by gzip, bzip2, xz or zstd.

    ``whiteouts`` says whether they have their meaning, as in the tar of a layer.
    """

    def __init__(self, path: str, *, whiteouts: bool = False) -> None:
        super().__init__(None)
        self.label, self.whiteouts = path, whiteouts

    def _load(self) -> None:
        with Decompressed(self.label) as reader:
            for _, member, content in read_stream(reader.pieces(), self.label):
                crc = 0
                for data in self.expand(member, content) if member else ():
                    crc = crc64(data, crc)
                node = self.add(member) if member else None
                if node and member and member.type == "reg":
                    node._checksum = crc

    def open(self, node: Node) -> int:
        raise Unsupported(f"{self.label}: only what is in its headers is known")


def map_id(number: int, ranges: Sequence[Sequence[int]], unknown: int) -> int:
    """Return the ID for another one by ``ranges``: first ID, first ID that it becomes, count.

    What no range covers is ``unknown``; without any range all stay the same.
    """
    for first, other, count in ranges:
        if first <= number < first + count:
            return other + number - first
    return unknown if ranges else number


def id_ranges(mappings: Sequence[Any]) -> Ranges:
    """Return the map of a record as ranges from IDs on disk; a malformed entry covers none."""
    rows: list[Any] = [[as_dict(entry).get(key) for key in ("host_id", "container_id", "size")]
                       for entry in mappings]
    return [tuple(row) if all(isinstance(each, int) for each in row) else (0, 0, 0) for row in rows]


# ================================================================================================
# 14. Tree
#
# What a container sees: the layers of an image merged as overlayfs merges them.  The highest layer
# that has a path hides it in the others, but for directories, which are merged unless one is
# opaque.  Names are compared and sorted as bytes.
# ================================================================================================

class PartTree(LayerTree):
    """What a layer has at some paths, from those entries of its tar that name them.

    The text of the tar-split data is searched for entries with a name of ``paths``: what is there,
    and what could hide it.  All these must lie in directories of ``disk``, the layer's "diff":
    behind a link they could be anything.  Without ``disk`` it is to have all below its paths; see
    proven().  Raises Unsupported where Go writes another text.
    """

    MOST = 4096  # entries, or a seventh of all: to read them all takes no longer than more
    FILE = b'{"type":1,'
    PLACE = rb'"name(?:":"((?:[^"]*/)?(?:\.{0,2}")?)|_raw)'  # what an entry lies in, or a directory

    def __init__(self, whole: LayerTree, paths: Iterable[Sequence[bytes]],
                 disk: DiskPart | None = None) -> None:
        super().__init__(whole.layer)
        self.below, self._whole, self._disk = whole.below, whole, disk
        self._paths = list(map(tuple, paths))
        self._tops: tuple[bytes, ...] = ()
        self._ways, self._places = set[bytes](), set[bytes]()

    @property
    def files(self) -> LayerFiles:
        return self._whole.files

    def reach(self, parts: Sequence[bytes], *, below: bool = False) -> Node:
        if self._disk and all(tuple(parts) != path[:len(parts)] for path in self._paths):
            raise Unsupported(UNPROVEN)
        return self.root

    def proven(self) -> bool:
        """Tell whether "diff" has the same files at the paths, and no name leads through a link."""
        # What changes a file by a hard link is not found in the text.
        assert self.layer
        with suppress(CstorError, OSError, ValueError), DiskPart(self.layer) as disk:
            for number, parts in enumerate(self._paths):
                root = disk.reach(parts, below=True)
                there = [depth for depth in range(len(parts)) if root.find(parts[:depth])]
                self._paths[number] = parts[:len(there)]  # below what is missing there is nothing
            views = Tree([self], raw=True), Tree([disk], raw=True)
            same = not (any(node.implicit and path for path, node, _ in views[0].walk())
                        or any(disk._unseen.values()) or any(diff_trees(*views, ["content"])))
            known = {place[:-1] for place in self._places if place.endswith(b'/"')}
            needed = {place.rpartition(b"/")[0] + b"/" for place in (
                *self._places, *(name[:-1] for name in known)) if place[-1:] != b'"'}
            return same and all(map(disk.has_directory, map(clean_name, needed - known)))
        return False

    def _load(self) -> None:
        members = list(self._members())
        targets = {clean_name(member.linkname) for member in members if member.type == "hardlink"}
        if self._disk and (targets := targets - {clean_name(item.name) for item in members}):
            self._paths += [tuple(name.split(b"/")) for name in targets]
            members = list(self._members())
        for member in members:
            self.add(member)

    def _interpret(self, node: Node) -> set[str]:
        if super()._interpret(node):
            raise Unsupported(UNPROVEN)
        return set()

    def _members(self) -> Iterator[Member]:
        """Yield the members that a search finds in windows of the text."""
        assert self.layer
        find, buffer, done, total, count = self._search(), b"", 0, 0, 0
        fd, path = self.layer.open_tar_split()
        with Opened(fd):
            for chunk in gunzip(fd, path):
                segment = max(buffer.rfind(TarSplit.SEGMENT, 0, done), 0)  # its file may come now
                keep = max(buffer.rfind(self.FILE, 0, segment), 0)
                buffer, done, total = buffer[keep:] + chunk, done - keep, total + len(chunk)
                end = buffer.rfind(b"\n", done) + 1 or done
                for place, name in find(buffer, done, end):
                    if self._is_wanted(name):
                        yield self._member_at(buffer, place)
                        count += 1
                if len(buffer) > 2 * MAX_HEADERS or count > max(self.MOST, total >> 13):
                    raise Unsupported(UNPROVEN)
                done = end
        if buffer[done:].strip():
            raise Unsupported(UNPROVEN)

    def _is_wanted(self, name: bytes) -> bool:
        """Tell whether to read a member; Unsupported if it may be elsewhere than its name says."""
        above, slash, base = clean_name(name).rpartition(b"/")
        if not self._disk:
            self._places.add(above + slash)  # it may be no UTF-8
        elif b"\\" in name or not self._disk.has_directory(above):
            raise Unsupported(UNPROVEN)
        hidden = base[4:] if base.startswith(b".wh.") else base
        return base != b"" and self._is_near(
            above if base == OPAQUE_MARKER else above + slash + hidden)

    def _is_near(self, path: bytes) -> bool:
        """Tell whether a path is one of these, or on the way to one, or below it."""
        at = path + b"/" if path else b""
        return at in self._ways or at.startswith(self._tops)

    def _member_at(self, buffer: bytes, place: int) -> Member:
        """Return the member whose entry is at a place: one segment, and a file; before it, one."""
        first = max(buffer.rfind(TarSplit.SEGMENT, 0, place), 0)
        pair = re.compile(TarSplit.PAIR).match(buffer, first)
        before = buffer.rfind(b"\n", 0, first - 1) + 1 if first else 0
        if pair and pair.end() > place and (not first or buffer.startswith(self.FILE, before)):
            text, name, raw, size, checksum = pair.groups(b"")
            if (size == b"") == (checksum == b""):
                with suppress(ValueError):
                    header, name = decode_base64(text), decode_base64(raw) if raw else name
                    # In front is the padding of the content before: headers are whole blocks.
                    return Member(header[len(header) % BLOCK:], name, int(size or 0), checksum)
        raise Unsupported(UNPROVEN)

    def _search(self) -> Callable[[bytes, int, int], Iterable[tuple[int, bytes]]]:
        """Return what finds the places of names in a buffer, from a start to an end."""
        self._tops = tuple(b"/".join(parts) + b"/" for parts in self._paths)
        self._ways = {top[:found.end()] for top in self._tops for found in re.finditer(b"^|/", top)}
        if not self._disk:
            return lambda *text: self._find(
                rb'"name(?:_raw)?":"[^"]*"', *text) if self._note(*text) else ()
        nodes = [self._disk.reach(parts).find(parts) for parts in self._paths]
        if all(nodes) and all(len(parts) > 1 for parts in self._paths):
            pattern = b"|".join(sorted({  # twice as fast
                b"/" + re.escape(parts[-1]) + b"/" * (node.type == "dir") + b'"'
                for parts, node in zip(self._paths, nodes) if node}))
        else:
            names = sorted({re.escape(name) for parts in self._paths for name in parts})
            places = [rb'|(?:\.?/)?%s[^"]*' % re.escape(top)  # an entry there would make it
                      for top, node in zip(self._tops, nodes) if not node]
            pattern = (rb'"name(?:":"(?:(?:[^"]*/)?(?:(?:\.wh\.)?(?:%s|\.wh\.\.opq)|\.\.?|/)%s)/?|'
                       rb'_raw":"[^"]+)"') % (b"|".join(names), b"".join(places))
        return lambda *text: self._find(pattern, *text)

    def _note(self, buffer: bytes, start: int, end: int) -> bool:
        """Note what entries lie in; tell whether some may be near the paths."""
        found = set(re.compile(self.PLACE).findall(buffer, start, end))
        self._places |= found
        return any(self._is_near(clean_name(place.rstrip(b'/"'))) for place in found)

    @staticmethod
    def _find(pattern: bytes, buffer: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield the place and name of each entry whose name ends as a match does."""
        for found in re.compile(pattern).finditer(buffer, start, end):
            at = buffer.rfind(b'"', 0, found.end() - 1) + 1
            name = buffer[at:found.end() - 1]
            if buffer.startswith(b'"name":"', at - 8):
                yield at, name
            elif buffer.startswith(b'"name_raw":"', at - 12):
                yield at, decode_base64(name)


class Tree(Closing):
    """The merged view of several LayerTrees, the top one first.

    Paths are bytes, relative to the root of the image; a leading "/" does not matter.  ``raw``
    shows whiteouts as whiteouts; ``label`` says whose it is.  Owns the LayerTrees, ``layers``.
    """

    def __init__(self, layers: Sequence[LayerTree], label: str = "", *, raw: bool = False) -> None:
        self.layers = list(layers) or [LayerTree(None)]
        self.label, self.raw = label, raw
        self._lookups = Lookups(self.layers)

    def close(self) -> None:
        for layer in self.layers:
            layer.close()

    # -- looking up ----------------------------------------------------------------------------

    def _find(self, parts: Sequence[bytes], *, top: bool = True) -> list[Node]:
        """Return the visible nodes at a path without links, [] when there are none.

        That is one node, or the directories that are merged there, with ``top`` the first alone.
        """
        found: list[Node] = []
        seen = 0  # so many components are directories in layers above
        for layer in self.layers:
            node = layer.reach(parts, below=not top)
            last = node.opaque
            for depth, part in enumerate(parts, 1):
                if (child := node.children.get(part)) is None:
                    break
                if child.type != "dir" and (depth <= seen or depth < len(parts)
                                            or child.type == "whiteout"):
                    return found
                node, seen = child, max(seen, depth)
                last = last or node.opaque
            else:
                found.append(node)
                if top or node.type != "dir":
                    break
            if last:
                break
        return found

    def seek(self, paths: Iterable[bytes], *, follow: bool = True) -> None:
        """Prepare lookup() of several paths: layers that were not read are searched only once."""
        paths = list(paths)
        for path in paths:
            check_type("path", path, bytes)
        self._lookups.seek(paths, follow)

    def lookup(self, path: bytes, *, follow: bool = True) -> tuple[bytes, Node]:
        """Return (path without links, node); ``follow`` tells whether to follow a last link.

        Symbolic links never leave the image: "/" and ".." stop at its root.  Layers are read only
        where Lookups finds no proof.  Raises NotFound, FormatError for a loop.
        """
        self.seek([path], follow=follow)
        if found := self._lookups.found.get((path, follow)):
            return found
        passed: dict[tuple[bytes, ...], Node] = {}
        try:
            found = self.look_up(path, follow, passed)
        except NotFound as error:
            add_hint(error, self._lookups.damage((path, follow), passed))
            raise
        self._lookups.damage((path, follow), passed)
        return found

    def look_up(self, path: bytes, follow: bool,
                passed: dict[tuple[bytes, ...], Node] | None = None) -> tuple[bytes, Node]:
        """Do what lookup() does, in the trees of the layers; ``passed`` gets what is on the way."""
        done: list[bytes] = []
        todo = path.split(b"/")[::-1]
        links = steps = 0
        view, way = self, [b""]  # what is on the way as far as that is known
        while todo:
            part = todo.pop()
            steps += len(done)
            if part in (b"", b".", b".."):
                del done[len(done) - (part == b".."):]
                continue
            parts = [*done, part]
            if parts != way[:len(parts)]:
                way = parts + [name for name in takewhile(b"..".__ne__, todo[::-1])
                               if name not in (b"", b".")]
                view = Tree([layer.part([way], False) for layer in self.layers])
            nodes = view._find(parts)
            if not nodes or todo and nodes[0].type not in ("dir", "symlink"):
                place = b"/" + b"/".join([*done, part])
                where = f', where a link leads to "{display(place)}"' * bool(links)
                raise NotFound(f'no such file in {self.label}: "{display(path)}"{where}' + (
                    f': "{display(place)}" is not a directory' if nodes else ""))
            node = nodes[0]
            if passed is not None:
                passed[(*done, part)] = node
            if node.type == "symlink" and (follow or todo):
                links += 1
                if links > MAX_SYMLINKS or steps > MAX_STEPS // 16:
                    raise FormatError(f'"{display(path)}": too many levels of symbolic links')
                if node.linkname.startswith(b"/"):
                    done = []
                todo += node.linkname.split(b"/")[::-1]
                continue
            done.append(part)
        return b"/".join(done), self._find(done)[0] if done else self.root

    @property
    def opener(self) -> Opener:
        """What opens the contents: all layers are of one storage."""
        return self.layers[0].opener

    @property
    def root(self) -> Node:
        """The root directory of the topmost layer that has an entry for it."""
        roots = [layer.reach(()) for layer in self.layers]
        return next((root for root in roots if not root.implicit), roots[0])

    # -- walking -------------------------------------------------------------------------------

    def read_ahead(self) -> None:
        """Read several large layers at once where there are processors for it."""
        # An error is left to who uses its layer, which is read again then.
        unread = [tree for tree in self.layers if tree.unread] if default_workers() > 1 else []
        large = [tree for tree in unread[1:] and unread if tree.is_large()]
        running = [tree.read_ahead() for tree in large[1:] and large]
        with ExitStack() as stack:
            for steps in running:
                stack.callback(steps.close)
            while running:
                for steps in running[-MAX_WORKERS:]:  # from the base on
                    with suppress(Exception):
                        next(steps)
                        continue
                    running.remove(steps)

    def walk(self, path: bytes = b"") -> Iterator[tuple[bytes, Node, bytes | None]]:
        """Yield (path, node, first name) of ``path`` and all below it, sorted, depth first.

        "First name" is that of a hard-link group which was yielded before, else None.
        """
        check_type("path", path, bytes)
        path = clean_name(path)
        if not path:
            self.read_ahead()
        nodes = self._find(path.split(b"/") if path else [], top=False)
        if not nodes:
            return
        firsts: dict[Node, bytes] = {}
        yield path, nodes[0] if path else self.root, None
        todo = [(path + b"/" if path else b"", self._merge(nodes))]
        while todo:
            prefix, children = todo[-1]
            for base, nodes in children:
                name, node = prefix + base, nodes[0]
                first = firsts.setdefault(node, name) if node in node.tree.linked else name
                yield name, node, first if first != name else None
                if node.type == "dir":
                    todo.append((name + b"/", self._merge(nodes)))
                    break
            else:
                todo.pop()

    def _merge(self, nodes: Sequence[Node]) -> Iterator[tuple[bytes, list[Node]]]:
        """Yield (name, visible nodes) in merged directories, sorted by name."""
        if nodes[0].type != "dir":
            return
        merged: dict[bytes, list[Node]] = {}
        closed: set[bytes] = set()
        for directory in nodes:
            for name, child in directory.children.items():
                if name not in merged:
                    merged[name] = [child]
                elif name in closed:
                    continue
                elif child.type == "dir":
                    merged[name].append(child)
                if child.type != "dir" or child.opaque:
                    closed.add(name)
        for name in sorted(merged):
            if self.raw or merged[name][0].type != "whiteout":
                yield name, merged[name]

    def paths(self) -> Iterator[bytes]:
        """Yield the paths that walk() yields."""
        return (path for path, _, _ in self.walk())

    def glob(self, patterns: Sequence[str]) -> Iterator[tuple[bytes, Node, bytes | None]]:
        """Yield what walk() yields for the paths that fit a pattern; see compile_patterns()."""
        part = self.limited(patterns)
        fits = compile_patterns(patterns, part.paths)
        return (item for item in part.walk() if fits(item[0]))

    def limited(self, patterns: Sequence[str]) -> Tree:
        """Return a tree that has at least what can fit patterns; it need not be closed."""
        return self.part(literal_tops(patterns))

    def part(self, tops: Sequence[Sequence[bytes]]) -> Tree:
        """Return a tree that has at least what is below some paths; it need not be closed."""
        part = Tree([layer.limited(tops) for layer in self.layers], self.label, raw=self.raw)
        whole = [not isinstance(layer, PartTree) for layer in part.layers]
        # What is nowhere could have another name, and not be on disk.  Of a file of a whole layer,
        # a part above it could hide names.
        if not all(whole) and (not all(map(part._find, tops)) or any(
                layer.reach(()) and (layer._moved or layer.linked and not all(whole[:number + 1])
                                     and whole[number])
                for number, layer in enumerate(part.layers))):
            return self
        return part

    # -- contents ------------------------------------------------------------------------------

    def notes(self) -> list[str]:
        """Return what a reader should know of the layers that were read, the top one first."""
        return [text for tree in self.layers for text in (
            tree.note, tree.layer.unverified if tree.layer else "") if text]

    def verify(self, progress: Progress | None = None) -> None:
        """Compare the tar of each layer, headers and contents, with its DiffID.

        A container's writable layer never has one: ``unverified`` of the storage names it.  Raises
        IntegrityError, and Unsupported for any other layer without a DiffID.
        """
        for tree in reversed(self.layers):
            layer = tree.layer
            if isinstance(tree, DiskTree) and tree.writable and not self.raw and tree.storage:
                tree.storage.unverified.append(
                    f"{tree.label}: not verified: the container's writable layer has no DiffID")
            elif layer is None and isinstance(tree, DiskTree) or layer and not layer.diff_digest:
                raise Unsupported(f"{tree.label} has no DiffID, so it cannot be verified",
                                  hint="without --verify, sizes and recorded CRC-64s are checked")
            elif layer:
                layer.export(None, progress=progress)
        if progress:
            progress(0, 0)

    def open(self, node: Node) -> int:
        """Open the content of a regular file and return its descriptor.

        Raises CstorError for another type of file, and what LayerFiles.open() raises.
        """
        check_type("node", node, Node)
        if node.type != "reg":
            word = file_type(FILE_TYPES[node.type]) if node.type in FILE_TYPES else node.type
            raise CstorError(f'"/{display(node.path)}" is a {word}, not a regular file',
                             hint="cp copies directories" if node.type == "dir" else "")
        return node.tree.open(node)

    def content(self, node: Node) -> Iterator[bytes]:
        """Yield the content of a regular file; its size and CRC-64 are checked at the end."""
        with Opened(self.open(node)) as fd:
            yield from node.checked(fd)

    def crc64(self, node: Node) -> int:
        """Return the CRC-64 of a regular file's content: as recorded, or by reading it."""
        check_type("node", node, Node)
        if (crc := node.checksum) is None:
            crc = 0
            for data in self.content(node):
                crc = crc64(data, crc)
        return crc

    def export(self, out: int | BinaryIO, *, path: bytes = b"", name: bytes = b"",
               verify: bool = False, progress: Progress | None = None) -> None:
        """Write all files, or ``path`` as ``name``, as one tar: the same bytes each time.

        ``out`` is a descriptor or binary file; with ``verify`` see verify().
        """
        if verify:
            self.verify(progress)
        for data in tar_out(self, path, name, progress):
            write_out(out, data)

    def diff(self, other: Tree, *, ignore: Sequence[str] = ()
             ) -> Iterator[tuple[bytes, Node | None, Node | None, list[str]]]:
        """Yield what differs in another tree, the newer one; see diff_trees()."""
        return diff_trees(self, other, ignore)

    def read(self, path: bytes, *, follow: bool = True) -> Iterator[bytes]:
        """Yield the content of the regular file ``path``, checked; see lookup() and content()."""
        yield from self.content(self.lookup(path, follow=follow)[1])


class Lookups:
    """Finds files in a tree without reading its layers: the disk chooses, the text confirms.

    A path is looked up in the directories "diff", and then in trees of those entries that a search
    in the text of the tar-split data finds: of the layer that has the file, its own; of those
    above, what could hide it.  The same file in both, with the same metadata and content, is the
    answer.  Neither would do alone: rootless and partial layers lack devices, a file can be lost,
    and entries can go through links of their layer or change others by a hard link.  All else is
    left to reading the layers, errors and what is not there too.
    """

    TRIES = 8  # after which layers are read: each try takes a tenth of that
    PATHS = 48  # at a time
    CHECKED = 64 << 20  # the size up to which contents are compared

    def __init__(self, layers: Sequence[LayerTree]) -> None:
        self._layers, self._left = layers, self.TRIES
        self.found: dict[tuple[bytes, bool], tuple[bytes, Node] | None] = {}
        self._doubts: dict[tuple[bytes, bool], Node] = {}  # on disk, and not confirmed

    def seek(self, paths: Sequence[bytes], follow: bool) -> None:
        """Look for paths that were not looked for before; ``found`` then has them, or None."""
        keys = [(path, follow) for path in paths if (path, follow) not in self.found]
        if len(keys) > self.PATHS or len(self._layers) > soft_limit() // 8:
            self._left = 0
        if not keys or not self._left or not any(layer.unread for layer in self._layers):
            return
        self._left -= 1
        disk = Tree(list(map(self._on_disk, self._layers)))
        passed: dict[tuple[bytes, ...], Node] = {}
        try:
            for key in keys:
                self.found[key] = None
                with suppress(CstorError, OSError):
                    self.found[key] = disk.look_up(*key, passed)
            self._confirm(disk, passed, keys)
        finally:
            for layer in disk.layers:
                if isinstance(layer, DiskPart):
                    layer.close()

    @staticmethod
    def _on_disk(layer: LayerTree) -> LayerTree:
        """Return what a layer has on disk, or where that proves nothing the layer's own tree."""
        if layer.layer and layer.unread:
            with suppress(CstorError, OSError):
                return DiskPart(layer.layer)
        return layer

    def _confirm(self, disk: Tree, passed: dict[tuple[bytes, ...], Node],
                 keys: Sequence[tuple[bytes, bool]]) -> None:
        """Replace what the disk has by what the text has, if that is the same."""
        ends = {pair[1] for key in keys if (pair := self.found[key])}
        depths = {parts: disk.layers.index(node.tree) for parts, node in passed.items()
                  if (node.type != "dir" or node in ends) and is_plain(b"/".join(parts))
                  and node.tree in disk.layers}
        text = Tree([PartTree(self._layers[number], [
            parts for parts, depth in depths.items() if depth >= number], layer)
            if isinstance(layer, DiskPart) else layer for number, layer in enumerate(disk.layers)])
        for key in keys:
            pair, self.found[key] = self.found[key], None
            with suppress(CstorError, OSError, ValueError):
                if pair and pair[0]:
                    self._doubts[key] = one = pair[1]
                    place, node = text.look_up(*key)
                    if place == pair[0] and node is not one and not node.implicit \
                            and (node.tree, one.tree) in zip(text.layers, disk.layers) \
                            and node.size <= self.CHECKED:
                        if "content" in (words := compare_nodes(disk, one, text, node, [])):
                            one._checksum = disk.crc64(one)  # for damage()
                        names = len(one.tree.linked.get(one, ())) + one.tree._unseen.get(one, 0)
                        if not words and names <= len(node.tree.linked.get(node, ())):
                            self.found[key] = place, node
                    elif place == pair[0] and node is one:
                        self.found[key] = place, node

    def damage(self, key: tuple[bytes, bool], passed: dict[tuple[bytes, ...], Node]) -> str:
        """Return, and note in the storage, how "diff" contradicts the headers where seek() failed.

        ``passed`` has what reading the layers found on the way, and at its end.
        """
        nodes, doubt = list(passed.values()), self._doubts.get(key)
        if doubt:
            place = doubt.path.split(b"/")
            number = [layer.layer for layer in self._layers].index(doubt.tree.layer)
            for layer in self._layers[:number]:
                if not layer.unread and hides(layer, place) in ("whiteout", "opaque directory"):
                    return self._note(layer, doubt.path)  # it is not on disk
            if not (layer := self._layers[number]).unread:
                if self._differ(doubt, other := layer.root.find(place)):
                    return self._note(layer, doubt.path)
                if other and nodes[-1:] == [other] and other.type == doubt.type:
                    return ""  # and nothing on disk hides it
        for parts, node in passed.items() if key in self.found else ():
            own, layers = node.path.split(b"/"), self._layers
            for layer in layers[:layers.index(node.tree) + 1] if node.tree in layers and (
                    node.type == "symlink" or node is nodes[-1]) else ():
                if layer.layer and type(layer) is LayerTree:
                    with suppress(CstorError, OSError), DiskPart(layer.layer) as disk:
                        if layer is not node.tree and disk.reach(parts) and hides(disk, parts) \
                                or layer is node.tree and self._differ(
                                    node, disk.reach(own).find(own)):
                            return self._note(layer, b"/".join(parts))
        return ""

    @staticmethod
    def _differ(one: Node, other: Node | None) -> bool:
        """Tell whether two files differ in what is the same in any storage."""
        return one.type in ("reg", "dir", "symlink") and not one.extra.keys() - {"xattrs"} and (
            not other or any(getattr(one, field) != getattr(other, field)
                             for field in ("type", "size", "linkname"))
            or None not in (one.checksum, other.checksum) and one.checksum != other.checksum)

    @staticmethod
    def _note(layer: LayerTree, path: bytes) -> str:
        text = f'{layer.label}: "diff" and headers differ at "/{display(path)}"'
        if layer.storage:
            layer.storage.faults += [text] * (text not in layer.storage.faults)
        return text


def lower_path(node: Node) -> list[bytes]:
    """Return the path at which the layers below have ``node``, which may have been renamed.

    Below an opaque directory there is none, unless an absolute redirect leads out of it.
    """
    parts: list[bytes] = []
    at: Node | None = node
    while at is not None and at.parent is not None:
        redirect = at.extra.get("redirect", b"")
        if at.opaque:
            return [b""]
        if redirect.startswith(b"/"):
            return clean_name(redirect).split(b"/") + parts
        parts.insert(0, redirect or at.name)
        at = at.parent
    return parts


def compile_patterns(patterns: Sequence[str], names: Callable[[], Iterable[bytes]] = tuple
                     ) -> Callable[[bytes], bool]:
    """Return a test whether a relative path fits one of the patterns; without any, all do.

    ``*`` and ``?`` stop at "/", ``**`` does not; ``[a-z]`` and ``[!a-z]`` are sets; a backslash
    makes the next character an ordinary one.  A pattern without "/" is compared with the last
    component, any other with the whole path.  What a pattern begins with, if ``names()`` has it as
    written, is taken literally: people name directories ``[slug]``.  A literal pattern, or one
    without ``*?[``, also fits everything below that path.
    """
    patterns = clean_patterns(patterns)
    literal = literal_parts(patterns, names)
    alternatives = []
    for pattern in patterns:
        name = pattern.strip("/")
        text = "" if "/" in pattern.rstrip("/") else "(?:.*/)?"
        end = literal.get(pattern, 0)
        tokens = ["\\" + char for char in name[:end]] + re.findall(
            r"\\.|(?:\*\*+/)+|\*+|\?|\[!?\]?(?:\\.|[^]\\])*\]|.", name[end:], re.DOTALL)
        text += "".join(map(translate_token, tokens))
        if not name:
            text = ".*"
        elif not any(token[0] in "*?[" for token in tokens):
            text += "(?:/.*)?"
        else:
            text += "(?<!\\A)"  # only the pattern "/" fits the root
        alternatives.append(f"(?:{text})")
    fits = re.compile("|".join(alternatives) or ".*", re.DOTALL).fullmatch
    return lambda path: bool(fits(path.decode("utf-8", "surrogateescape"))
                             or not path.isascii() and fits(spell(path)))


def clean_patterns(patterns: Sequence[str]) -> list[str]:
    """Return patterns without "." and empty components, as the kernel reads paths."""
    return [re.sub(r"\A\.(?=/|\Z)|/\.(?=/)|/(?=/)", "", pattern)
            for pattern in check_words("patterns", patterns)]


def literal_tops(patterns: Sequence[str]) -> list[list[bytes]]:
    """Return paths, none below another, where all lies that can fit patterns; [] is the root."""
    tops: list[list[bytes]] = []
    for pattern in clean_patterns(patterns) or [""]:
        text = pattern.strip("/") if "/" in pattern.rstrip("/") else ""
        # Characters outside ASCII can be written in two ways.
        plain = re.match(r"(?:(?!\.\.?(?:/|\Z))[!-)+-.0->@-Z\]-~ ]+(?:/|\Z))*", text)
        tops.append(plain[0].strip("/").encode().split(b"/") if plain and plain[0] else [])
    return [top for number, top in enumerate(tops) if not any(top[:len(other)] == other and (
        other != top or at < number) for at, other in enumerate(tops))]


def literal_parts(patterns: Sequence[str], names: Callable[[], Iterable[bytes]]) -> dict[str, int]:
    """Return by pattern how many characters ``names()`` has as written, slashes around it apart.

    That is the longest path that a pattern begins with, or a last component.
    """
    wanted: dict[tuple[bool, bytes], list[tuple[str, int]]] = {}
    for pattern in patterns:
        name, whole = pattern.strip("/"), "/" in pattern.rstrip("/")
        for end in [found.start() for found in re.finditer("/|\\Z" if whole else "\\Z", name)]:
            for text in {os.fsencode(name[:end]), unspell(name[:end])}:
                if re.search(rb"[*?[\\]", text):
                    wanted.setdefault((whole, text), []).append((pattern, end))
    found: dict[str, int] = {}
    for path in names() if wanted else ():
        for key in ((True, path), (False, path.rpartition(b"/")[2])):
            for pattern, end in wanted.get(key, ()):
                found[pattern] = max(found.get(pattern, 0), end)
    return found


def translate_token(token: str) -> str:
    """Return the regular expression of one token of a pattern; "/" is in no set."""
    if token.startswith("**"):
        return "(?:.*/)?" if token.endswith("/") else ".*"
    if token[0] != "[" or token == "[":
        return {"*": "[^/]*", "?": "[^/]"}.get(token) or re.escape(token[-1])
    inside, items = token[1:-1], ""
    negated = inside.startswith("!")
    for start, end, single in re.findall(r"(\\?.)-(\\?.)|(\\?.)", inside[negated:], re.DOTALL):
        if single:
            items += re.escape(single[-1])
        elif start[-1] <= end[-1]:
            items += f"{re.escape(start[-1])}-{re.escape(end[-1])}"
    if not items:  # only ranges that are the wrong way round
        return "[^/]" if negated else "(?!)"
    return f"(?!/)[{'^' * negated}{items}]"


def need_match(tree: Tree, patterns: Sequence[str]) -> None:
    """Raise NotFound when patterns were given, and none matches."""
    if patterns:
        raise NotFound(f"no file in {tree.label} matches " + ", ".join(map(display, patterns)),
                       hint="a pattern with a slash must match the whole path; ** crosses slashes"
                       if any("/" in pattern for pattern in patterns) else "")


def peek(items: Iterator[T]) -> tuple[T | None, Iterator[T]]:
    """Return the first item, or None, and an iterator of all: errors come before any output."""
    first = next(items, None)
    return first, (item for part in ([] if first is None else [first], items) for item in part)


def merged_tree(layers: Sequence[Layer], label: str,
                known: dict[str, LayerTree] | None = None) -> Tree:
    """Return the tree of layers given base first; ``known`` shares trees with other images."""
    known = {} if known is None else known
    opened = next((tree.opened for tree in known.values()), [])
    for number, layer in enumerate(layers):
        if layer.id not in known:
            known[layer.id] = layer.own_tree()
            known[layer.id].opened = opened
            known[layer.id].below = Tree([known[below.id] for below in layers[:number][::-1]])
    return Tree([known[layer.id] for layer in reversed(layers)], label)


# -- table of contents ---------------------------------------------------------------------------

def toc_entry(name: bytes, node: Node, *, first: bytes | None = None, links: int = 0,
              digest: str = "") -> dict[str, Any]:
    """Return an entry of a TOC by the rules of eStargz; names are made by spell().

    ``first`` makes it a hard link to that name; ``links`` is the number of names.  A time that
    format_time() has no words for is left out.
    """
    kind = "hardlink" if first is not None else node.type
    entry: dict[str, Any] = {"name": spell(name) + "/" * (kind == "dir" and name[-1:] != b"/"),
                             "type": kind}
    if kind == "reg":
        entry["size"] = node.size
    if not node.implicit and (modtime := format_time(node.mtime_ns)):
        entry["modtime"] = modtime
    if kind in ("symlink", "hardlink"):
        entry["linkName"] = spell(node.linkname if first is None else first)
    entry["mode"] = node.mode
    entry["uid"], entry["gid"], uname, gname = node.owner
    if uname:
        entry["userName"] = spell(uname)
    if gname:
        entry["groupName"] = spell(gname)
    if kind in ("char", "block"):
        entry["devMajor"], entry["devMinor"] = node.device
    if node.extra and node.xattrs:
        entry["xattrs"] = {spell(key): binascii.b2a_base64(value, newline=False).decode()
                           for key, value in sorted(node.xattrs.items())}
    if links > 1 and kind == "reg":
        entry["NumLink"] = links
    if digest:
        entry["digest"] = digest
    return entry


def layer_entries(layer: Layer, tree: LayerTree | None = None
                  ) -> Iterator[tuple[bytes, Node, None]]:
    """Yield (name as in the tar, node of ``tree``, None) of each member, as in its header."""
    tree = tree or LayerTree(layer)
    for member in layer.members():
        if member.type != "global":
            node = Node(tree, None, clean_name(member.name), member.type)
            try:
                node.describe(member)
            except FormatError as error:
                raise FormatError(f'"{display(member.name)}": {error}',
                                  file=f"layer {layer.id}") from None
            yield member.name, node, None


def layer_toc(layer: Layer, *, digests: bool = False, progress: Progress | None = None
              ) -> Iterator[dict[str, Any]]:
    """Yield the entries of a layer's TOC, in the order of the tar, whiteouts among them."""
    links = Counter(clean_name(member.linkname) for member in layer.members()
                    if member.type == "hardlink")
    with layer.tree() as tree:
        items = layer_entries(layer, tree.layers[0])
        for name, node, _, digest in hash_contents(items, tree, digests, progress):
            yield toc_entry(name, node, links=links[node.name] + 1, digest=digest)


def tree_toc(tree: Tree, *, digests: bool = False, progress: Progress | None = None
             ) -> Iterator[dict[str, Any]]:
    """Yield the entries of a merged tree's TOC, sorted; the root only if a layer has it."""
    tree.read_ahead()
    linked = any(layer.root and layer.linked for layer in tree.layers)
    seen = Counter(node for _, node, _ in (tree.walk() if linked else ())
                   if node in node.tree.linked)
    for name, node, first, digest in hash_contents(tree.walk(), tree, digests, progress):
        if (name or not node.implicit) and node.type != "socket":  # eStargz has no word for it
            yield toc_entry(name or b".", node, first=first, links=seen[node], digest=digest)


def hash_contents(items: Iterable[tuple[bytes, Node, bytes | None]], tree: Tree, wanted: bool,
                  progress: Progress | None) -> Iterator[tuple[bytes, Node, bytes | None, str]]:
    """Add the sha256 of each regular file, checked by size and CRC-64, to what walk() yields.

    "" for an empty file, another name of a file, and other types.
    """
    size = files = 0
    for name, node, first in tree.opener.ahead(
            items, lambda item: item[1].place) if wanted else items:
        digest = ""
        if wanted and node.type == "reg" and node.size and first is None:
            digest = sha256_of(tree.content(node))
            size, files = size + node.size, files + 1
            if progress:
                progress(size, files)
        yield name, node, first, digest


# ================================================================================================
# 15. Comparing
#
# Two merged trees are compared name by name, in the order of their names.  A path is followed down
# the layers to tell which one brought it, and which one hid what lower layers have there.
# ================================================================================================

DIFFERENCES = ("type", "mode", "owner", "size", "content", "time", "link", "device", "xattr")


def diff_trees(old: Tree, new: Tree, ignore: Sequence[str] = ()
               ) -> Iterator[tuple[bytes, Node | None, Node | None, list[str]]]:
    """Yield (path, old node, new node, what differs) for each path that is not the same in both.

    A node of None means added or deleted; what differs are words of DIFFERENCES.  Contents are
    compared by size and CRC-64, and read only where no CRC-64 is recorded.
    """
    ignore = check_words("ignore", ignore, DIFFERENCES)
    groups: tuple[dict[Node, bytes], dict[Node, bytes]] = ({}, {})

    def rows(side: int, tree: Tree) -> Iterator[tuple[bytes, int, Node]]:
        return ((path.replace(b"/", b"\0"), side, node) for path, node, _ in tree.walk())

    for key, found in groupby(heapq.merge(rows(0, old), rows(1, new)), lambda row: row[0]):
        nodes = {side: node for _, side, node in found}
        a, b, what = nodes.get(0), nodes.get(1), []
        if a and b:
            if a is not b:
                what = compare_nodes(old, a, new, b, ignore)
            if a in a.tree.linked or b in b.tree.linked:  # are the same names one file in both?
                names = [group.setdefault(node, key) for group, node in zip(groups, (a, b))]
                if names[0] != names[1] and not {"link", "type"} & {*what, *ignore}:
                    what = [word for word in DIFFERENCES if word in (*what, "link")]
        if what or not (a and b):
            yield key.replace(b"\0", b"/"), a, b, what


def compare_nodes(old: Tree, a: Node, new: Tree, b: Node, ignore: Sequence[str]) -> list[str]:
    """Return in which of DIFFERENCES two nodes of one path differ."""
    if a.type != b.type or a.type == "whiteout":
        return ["type"] if a.type != b.type and "type" not in ignore else []
    no_entry = a.implicit or b.implicit  # a directory's time is any then, and all of a root
    any_root = no_entry and not a.parent and not b.parent
    same = {
        "type": not (old.raw and new.raw) or a.opaque == b.opaque,
        "mode": a.mode == b.mode or any_root,
        "owner": a.owner[:2] == b.owner[:2] or any_root,
        "size": a.size == b.size,
        "time": a.mtime_ns == b.mtime_ns or no_entry,
        "link": a.linkname == b.linkname,
        "device": a.device == b.device,
        "xattr": a.xattrs == b.xattrs or any_root}
    if a.type == "reg" and "content" not in ignore:
        same["content"] = a.size == b.size and (not a.size or old.crc64(a) == new.crc64(b))
    return [word for word in DIFFERENCES if not same.get(word, True) and word not in ignore]


def older_nodes(tree: Tree, path: bytes, node: Node) -> list[Node]:
    """Return the nodes of lower layers that a visible node hides at its path, newest first.

    Directories that are merged into it, and what layers in between hide already, are left out.
    """
    found: list[Node] = []
    parts = path.split(b"/") if path else []
    merged = node.type == "dir" and not node.opaque
    for layer in tree.layers[tree.layers.index(node.tree) + 1:]:
        older = layer.root.find(parts)
        merged = merged and older is not None and older.type == "dir"
        if older is not None and older.type != "whiteout" and not merged:
            found.append(older)
        how = hides(layer, parts)
        if how in ("whiteout", "opaque directory") or how and older is None:
            break
    return found


def hides(layer: LayerTree, parts: Sequence[bytes]) -> str:
    """Tell how a layer hides a file of a layer below; "" when it does not."""
    node = layer.root
    for part in parts:
        if node.opaque:
            return "opaque directory"
        if (child := node.children.get(part)) is None:
            return ""
        if child.type != "dir":
            return "whiteout" if child.type == "whiteout" else "replaced"
        node = child
    return "replaced"


def blame_tree(tree: Tree, image: Image, patterns: Sequence[str], hidden: bool
               ) -> Iterator[dict[str, Any]]:
    """Yield, for each file that matches, its layer, that layer's history line, and what it hides.

    With ``hidden``, yield hidden_rows() of those that match.
    """
    steps: dict[str, str] = {}
    with suppress(NotFound):  # an image without a manifest
        steps = {row["layer"]: str(row.get("created_by") or "")
                 for row in image.history() if "layer" in row}
    if hidden:
        yield from hidden_rows(tree, steps, compile_patterns(patterns, lambda: (
            path for layer in tree.layers for path in Tree([layer]).paths())))
        return
    part = tree.limited(patterns)
    for path, node, _ in part.glob(patterns):
        if path:
            yield {**layer_row(path, node, steps), "hides": [
                layer_row(path, older, steps) for older in older_nodes(part, path, node)]}


def layer_row(path: bytes, node: Node, steps: dict[str, str]) -> dict[str, Any]:
    """Return the JSON of one file of one layer."""
    layer = node.tree.layer_id
    return {"path": spell(b"/" + path), "type": node.type, "layer": layer, "created-by": steps.get(
        layer, ""), **({"size": node.size} if node.type == "reg" else {})}


def hidden_rows(tree: Tree, steps: dict[str, str], fits: Callable[[bytes], bool]
                ) -> Iterator[dict[str, Any]]:
    """Yield each file that nobody sees, what hides it, and the bytes that it wastes.

    "how" is whiteout, opaque directory, or replaced.  "wasted" is 0 if the file has another,
    visible name or was counted before.  Layers come base first.
    """
    visible = {path: node for path, node, _ in tree.walk()}
    counted = set(visible.values())
    for number in range(len(tree.layers) - 1, 0, -1):
        layer = tree.layers[number]
        for path, node, _ in Tree([layer]).walk():
            if node.type == "dir" or visible.get(path) is node or node.tree is not layer:
                continue
            for above in tree.layers[number - 1::-1]:
                if how := hides(above, path.split(b"/")):
                    wasted = 0 if node in counted else node.size
                    counted.add(node)
                    if fits(path):
                        yield {**layer_row(path, node, steps), "wasted": wasted, "how": how,
                               "hidden-by": above.layer_id}
                    break


# ================================================================================================
# 16. tar-diff
#
# Both tars are read entry by entry.  Up to the first difference both are at the same place, so that
# position alone tells the field.  From there on entries are paired by name, the n-th of a name with
# the n-th of that name; memory for entries that are not paired yet is bounded.  A malformed header
# is one more difference, not an error.  All that follows the last entry is the trailer.
# ================================================================================================

# The fields of a header block with their offsets; HEADER_FIELDS are those that all formats share.
HEADER_FIELDS = (("name", 0), ("mode", 100), ("uid", 108), ("gid", 116), ("size", 124),
                 ("mtime", 136), ("chksum", 148), ("typeflag", 156), ("linkname", 157),
                 ("magic", 257), ("version", 263), ("uname", 265), ("gname", 297),
                 ("devmajor", 329), ("devminor", 337))
USTAR_FIELDS = (("prefix", 345), ("header padding", 500))
GNU_FIELDS = (("atime", 345), ("ctime", 357), ("offset", 369), ("longnames", 381),
              ("header padding", 385), ("sparse", 386), ("isextended", 482), ("realsize", 483),
              ("header padding", 495))
STAR_FIELDS = (("prefix", 345), ("atime", 476), ("ctime", 488), ("header padding", 500))
OCTAL_FIELDS = ("uid", "gid", "size", "devmajor", "devminor", "offset", "realsize")
HEADER_KINDS = {b"x": "pax", PAX_GLOBAL: "global", b"L": "long name", b"K": "long link"}
SPARSE_FIELDS = (("sparse", 0, 504), ("isextended", 504, 505), ("header padding", 505, BLOCK))
LONG_FIELDS = {"long name": "name", "long link": "linkname"}
MAX_UNPAIRED = 512 << 20  # memory for names, and for entries without a counterpart so far


def diff_tars(a: str, b: str, progress: Progress | None = None) -> Iterator[dict[str, Any]]:
    """Yield how two tars differ, byte by byte and entry by entry; nothing when they are identical.

    ``a`` and ``b`` are paths, or "-" for stdin; compressed files are decompressed (see
    Decompressed).  Names and values are made by spell().  ``change`` of a row is

    - "first", the first row: ``offset`` in the decompressed tar, ``index`` (from 0) and name of the
      ``entry`` there, both None in the trailer, and the ``field``; ``contentOffset`` when that is
      "content"; ``ended``, "a" or "b", when it is "end of file";
    - "changed": ``field`` of ``entry`` with its values ``a`` and ``b``, None if it is missing;
    - "missing", "extra": only in ``a``, only in ``b``; "reordered": in both.  ``a`` and ``b`` are
      the indexes;
    - "duplicated": ``a`` and ``b`` count the entries of that name;
    - "unreadable": why no more entries of ``a`` or ``b`` can be read.

    ``progress`` gets what was read of both files, or if one is a pipe, of the first tar.  Raises
    FormatError for what is not a tar or damaged by its compression, Unsupported, OSError.
    """
    check_words("tars", [a, b])
    with TarSide(a) as left, TarSide(b, left) as right:
        yield from _TarDiff(left, right).rows(progress)


class TarEntry(Member):
    """One entry of a tar that is compared, or its trailer, which has no header.

    ``name`` is shown, ``key`` pairs entries.  ``start`` is the offset of the header, ``done`` the
    length of the content that was found, ``digest`` its SHA-256, ``filler`` its padding.
    """

    __slots__ = ("index", "start", "key", "content", "done", "sha", "digest", "filler")

    def __init__(self, index: int, start: int, header: bytes,
                 outline: tuple[bytes, bytes, int] = (b"", b"", 0)) -> None:
        self.index, self.start, self.header = index, start, header
        self.sparse = None
        self.name, self.key, self.stored = outline
        self.padding = -self.stored % BLOCK if self.stored > 0 else 0
        self.content: Iterator[Any] = iter(())
        self.done, self.digest, self.filler = 0, b"", b""
        self.sha: Any = None

    def feed(self, data: bytes) -> None:
        self.sha = self.sha or new_sha256()
        self.sha.update(data)
        self.done += len(data)

    @property
    def memory(self) -> int:
        """About how many bytes the entry takes while it waits for its counterpart."""
        return len(self.header) + 2 * len(self.name) + 700

    def summary(self) -> dict[str, Any]:
        return {"size": self.done, "sha256": self.digest.hex() or sha256_digest(b"")[7:]}


class TarSide(TarSource, Closing):
    """One of two tars that are compared, read once from start to end; a context manager.

    ``trailer`` is None until it was reached, ``why`` says why no more entries can be read, or "".
    A header that equals the last one of ``other``, bytes that were parsed already, is taken whole.
    """

    def __init__(self, path: str, other: TarSide | None = None) -> None:
        self._reader = Decompressed(path)
        self.tell = self._reader.tell
        super().__init__(self._reader.pieces(2 * READ_SIZE, READ_SIZE // 4), path)
        self.why, self.count = "", 0
        self.trailer: TarEntry | None = None
        self._items = self.items()
        self._next: Item | None = None
        self._other, self._parsed = other, (b"", (b"", b"", 0))  # the last header, its outline

    def close(self) -> None:
        self._reader.close()

    def next_entry(self) -> TarEntry:
        """Return the next entry, its content unread; the last one is the trailer."""
        literal, entry, content = self._next or next(self._items)
        if not isinstance(entry, TarEntry):
            self.trailer = entry = TarEntry(self.count, self.offset - len(literal), b"")
            content = (data for items in ([(literal,)], self._items) for data, *_ in items if data)
        entry.content = iter(content)
        return entry

    def finish(self, entry: TarEntry) -> None:
        """Read the rest of an entry, and the header of the next one."""
        for data in entry.content:
            entry.feed(data)
        if entry.sha:
            entry.digest, entry.sha = entry.sha.digest(), None
        if entry.header:
            literal, member, content = next(self._items)
            entry.filler = literal[:entry.padding]
            self._next = literal if member else literal[entry.padding:], member, content

    def _accept(self, block: bytes) -> bool:
        if self.why or not block.strip(b"\0"):
            return False
        if not is_header(block):
            if self.offset == len(block):
                raise FormatError("not a tar", file=self.file)
            self.why = f"no header at block {(self.offset - len(block)) // BLOCK}"
        return not self.why

    def _read_header(self) -> bytes:
        if self._other and (header := self._other._parsed[0]) and not self.why \
                and self._data.startswith(header, self._at):
            self._last, self._cut, self._parsed = b"", False, self._other._parsed
            self.up_to(len(header))
            return header
        return super()._read_header()

    def _parse(self, header: bytes, start: int) -> TarEntry | None:
        if not header:
            return None
        if header is not self._parsed[0]:
            self._parsed = header, read_outline(header)
        entry = TarEntry(self.count, start, header, self._parsed[1])
        self.count += 1
        if self._last is None:
            self.why = "malformed header size"
        elif self._cut:
            self.why = self.why or f"no header at block {(start + len(header)) // BLOCK}"
        elif entry.stored < 0:
            self.why = f'the size of "{spell(entry.name)}" is malformed'
        if self.why:
            entry.stored = entry.padding = 0
            self._parsed = b"", self._parsed[1]
        return entry

    def _cut_off(self, member: Member) -> None:
        self.why = f'the content of "{spell(member.name)}" is cut off'


class _TarDiff:
    def __init__(self, left: TarSide, right: TarSide) -> None:
        self.sides = left, right
        self.first: dict[str, Any] | None = None
        self.counts: dict[bytes, list[int]] = {}  # how often a key came on either side
        # For a counterpart, by key and how often that came before.
        self.waiting: tuple[dict[tuple[bytes, int], TarEntry], ...] = {}, {}
        self.high = -1, -1  # indexes of the last pair that is in order
        self.room = MAX_UNPAIRED

    def rows(self, progress: Progress | None) -> Iterator[dict[str, Any]]:
        while not all(side.trailer for side in self.sides):
            a, b = pair = [None if side.trailer else side.next_entry() for side in self.sides]
            same = not self.first
            if a and b and same:
                self._compare(a, b)
            if progress:
                done = [side.tell() for side in self.sides]
                progress(sum(done) if min(done) >= 0 else self.sides[0].offset, self.sides[0].count)
            for side, entry in zip(self.sides, pair):
                if entry:
                    side.finish(entry)
            if a and b and not self.first and a.filler != b.filler:
                self._note(a, b, [a.filler, b.filler], "padding")
            for entry in filter(None, pair) if self.first else ():
                entry.filler = entry.filler.rstrip(b"\0")
            if self.first and same:
                yield self.first
            yield from self._settle(a, b)
        if self.first:
            yield from self._ends()

    def _compare(self, a: TarEntry, b: TarEntry) -> None:
        """Read two entries in step as long as they are equal."""
        if a.header is not b.header:  # trailers are contents
            heads = [entry.header + side.rest for side, entry in zip(self.sides, (a, b))]
            if heads[0] != heads[1]:
                self._note(a, b, heads)
                return
        for parts in zip_longest(a.content, b.content, fillvalue=b""):
            if parts[0] != parts[1]:
                self._note(a, b, parts, "content" if a.header else "trailer")
                if a.sha:
                    b.sha, b.done = a.sha.copy(), a.done
                a.feed(parts[0])
                b.feed(parts[1])
                return
            a.feed(parts[0])
        b.sha, b.done = a.sha, a.done

    def _note(self, a: TarEntry, b: TarEntry, parts: Sequence[bytes], field: str = "") -> None:
        """Note the first difference: in what follows the headers (``field``), or in the headers.

        A sound header tells name and field: in the other one, a changed byte damages a checksum or
        a pax record.  Where only one tar has a header, that one tells.
        """
        at = len(os.path.commonprefix(parts))
        ended = [len(part) <= at for part in parts]
        entry, start = a, a.start + (len(a.header) + a.done if field else 0)
        if not field:
            entry = (b if ended[0] else a) if any(ended) else max(
                (a, b), key=lambda entry: 2 * is_sound(entry.header) + bool(entry.header))
            field = next((name for start, end, name, *_ in header_spans(entry.header)
                          if start <= at < end), "trailer")
        inside = field != "trailer"
        self.first = {"change": "first", "offset": start + at,
                      "index": entry.index if inside else None,
                      "entry": spell(entry.name) if inside else None,
                      "field": "end of file" if any(ended) else field}
        if any(ended):
            self.first["ended"] = "a" if ended[0] else "b"
        elif field == "content":
            self.first["contentOffset"] = a.done + at

    def _settle(self, a: TarEntry | None, b: TarEntry | None) -> Iterator[dict[str, Any]]:
        """Find the counterparts of the entries just read, and yield how they differ."""
        for place, entry in enumerate((a, b)):
            if entry and entry.header:
                if (counts := self.counts.get(entry.key)) is None:
                    counts = self.counts[entry.key] = [0, 0]
                    self._reserve(place, len(entry.key) + 250)
                number = counts[place]
                counts[place] += 1
                if b and entry is a and entry.key == b.key and number == counts[1]:
                    counts[1] += 1
                    yield from self._match(a, b)
                    return
                if found := self.waiting[1 - place].pop((entry.key, number), None):
                    self.room += found.memory
                    yield from self._match(*((found, entry) if place else (entry, found)))
                else:
                    self._reserve(place, entry.memory)
                    self.waiting[place][entry.key, number] = entry

    def _reserve(self, place: int, memory: int) -> None:
        self.room -= memory
        if self.room < 0:
            raise Unsupported(f"{self.sides[place].file}: too many entries that are missing or at "
                              "another place in the other tar")

    def _match(self, a: TarEntry, b: TarEntry) -> Iterator[dict[str, Any]]:
        """Yield how an entry differs from its counterpart."""
        if a.index > self.high[0] and b.index > self.high[1]:
            self.high = a.index, b.index
        else:  # a pair was settled that is behind it in one tar and before it in the other
            yield tar_row("reordered", a, "", a.index, b.index)
        if not self.first:
            return
        if a.header != b.header:
            yield from compare_headers(a, b)
        if (a.done, a.digest) != (b.done, b.digest):
            yield tar_row("changed", a, "content", a.summary(), b.summary())
        if a.filler != b.filler:
            yield tar_row("changed", a, "padding", spell(a.filler), spell(b.filler))

    def _ends(self) -> Iterator[dict[str, Any]]:
        """Yield what differs at the end: trailers, and entries without a counterpart."""
        a, b = [side.trailer or TarEntry(0, 0, b"") for side in self.sides]
        if (a.done, a.digest) != (b.done, b.digest):
            yield tar_row("changed", None, "trailer", a.summary(), b.summary())
        left, right = self.sides
        if left.why != right.why:
            yield tar_row("unreadable", None, "", left.why or None, right.why or None)
        for place, word in enumerate(("missing", "extra")):
            for (key, number), entry in self.waiting[place].items():
                counts = self.counts[key]
                if number > counts[1 - place]:
                    continue  # one row for all entries of a name
                if 0 in counts:
                    yield tar_row(word, entry, "", *[None if i != place else entry.index
                                                     for i in (0, 1)])
                if counts[place] > 1:
                    yield tar_row("duplicated", entry, "", *counts)


def tar_row(change: str, entry: TarEntry | None, field: str, a: Any, b: Any) -> dict[str, Any]:
    """Return a row of diff_tars()."""
    return {"change": change, "entry": spell(entry.name) if entry else None,
            **({"field": field} if field else {}), "a": a, "b": b}


def compare_headers(a: TarEntry, b: TarEntry) -> list[dict[str, Any]]:
    """Return a row for each field in which two headers differ, also if its value is the same."""
    fields_a, fields_b = header_fields(a.header), header_fields(b.header)
    rows = []
    for field in {**fields_a, **fields_b}:
        raw = fields_a.get(field), fields_b.get(field)
        if raw[0] == raw[1] or field == "pax order" and (
                not raw[0] or not raw[1] or sorted(raw[0].split()) != sorted(raw[1].split())):
            continue  # added and removed records have rows of their own
        if None in raw and " header " in field and not field.endswith(" size"):
            continue  # one row is enough for a special header that only one has
        x, y = (field_value(field, value) for value in raw)
        if x == y:
            x, y = (field_value("", value) for value in raw)
        rows.append(tar_row("changed", a, field, x, y))
    return rows or [tar_row("changed", a, "header", *(
        sha256_digest(entry.header) for entry in (a, b)))]


def is_header(block: bytes) -> bool:
    """Tell whether a block is a header, possibly with a wrong checksum."""
    if len(block) < BLOCK:
        return False
    try:
        check_sum(block)
        return True
    except FormatError:
        signs = (block[0], block.startswith(b"ustar", 257), *(re.fullmatch(
            rb"[ \0]*[0-7]+[ \0]*", field) for field in (block[148:156], block[SIZE_AT])))
        return sum(map(bool, signs)) > 1  # a changed byte damages one of four


def is_sound(header: bytes) -> bool:
    """Tell whether all checksums and pax records of an entry's header are valid."""
    with suppress(FormatError):
        for _, kind, block, data in header_blocks(header):
            check_sum(block)
            if kind in ("pax", "global"):
                parse_pax(data)
        return True
    return False


def header_blocks(header: bytes) -> Iterator[tuple[int, str, bytes, bytes]]:
    """Yield (offset, kind, block, data) of each header, the kind "" of the last."""
    at = 0
    for flag, block, data, padding in header_parts(io.BytesIO(header).read)[0]:
        yield at, HEADER_KINDS.get(flag, ""), block, data or b""
        at += BLOCK + len(data or b"") + len(padding)


def read_outline(header: bytes) -> tuple[bytes, bytes, int]:
    """Return an entry's name, what it is paired by, and its content's size, -1 if malformed."""
    pax: dict[bytes, bytes] = {}
    name, block = b"", header
    for _, kind, head, data in header_blocks(header) if len(header) > BLOCK else ():
        block = head
        if kind == "pax":
            pax.update((key, value) for _, _, key, value in pax_spans(data))
        elif kind == "long name":
            name = text_field(data)
    flag = block[TYPE_AT:TYPE_AT + 1]
    if flag == PAX_GLOBAL:
        return text_field(block[:100]), b"g" + text_field(block[:100]), 0
    name = name or pax.get(b"GNU.sparse.name") or pax.get(b"path") or name_in_block(block)
    try:
        size = 0 if flag in HEADER_ONLY + SPECIALS or flag == b"\0" and name.endswith(b"/") else \
            parse_decimal(pax[b"size"]) if pax.get(b"size") else parse_number(block[SIZE_AT])
    except FormatError:
        size = -1
    return name, b" " + name, size


def header_spans(header: bytes) -> Iterator[tuple[int, int, str, bytes | None, bool]]:
    """Yield (start, end, name, value, special) of all fields of an entry's header.

    A value of None is padding.  ``special`` fields replace others of the same name.
    """
    for at, kind, block, data in header_blocks(header):
        after = at + BLOCK
        end = after + len(data)
        if kind in ("pax", "global"):
            records = list(pax_spans(data))
            for start, stop, key, value in records:
                label = f"pax {spell(key)}" if key else "pax records"
                if key.startswith(b"SCHILY.xattr."):
                    label = f"xattr {spell(key[13:])}"
                yield after + start, after + stop, label, value, True
            yield end, end, "pax order", b" ".join(key for _, _, key, _ in records), True
        elif data:
            for start in range(after, end, BLOCK) if not kind else ():
                for field, first, last in SPARSE_FIELDS:
                    yield start + first, start + last, field, None, True
            yield after, end, LONG_FIELDS.get(kind, "sparse map"), data, True
        yield end, end + -len(data) % BLOCK, f"{kind} padding", None, True
        starts = HEADER_FIELDS + (GNU_FIELDS if block[257:265] == b"ustar  \0" else
                                  STAR_FIELDS if block[508:512] == b"tar\0" else USTAR_FIELDS)
        for (field, start), (_, stop) in zip(starts, (*starts[1:], ("", BLOCK))):
            name = f"{kind} header {field.replace('header ', '')}" if kind else field
            yield at + start, at + stop, name, checksum_words(block) \
                if field == "chksum" else block[start:stop], field == "chksum"


def header_fields(header: bytes) -> dict[str, bytes]:
    """Return all fields of an entry's header as stored, long ones as their digests."""
    fields: dict[str, bytes] = {}
    for _, _, field, raw, special in header_spans(header):
        if raw is not None and (special or field not in fields):
            fields[field] = raw if len(raw) <= MAX_PATH else b"%s (%d bytes)" % (
                sha256_digest(raw).encode(), len(raw))
    return fields


def checksum_words(block: bytes) -> bytes:
    """Tell whether a header's checksum is right: its value differs whenever another field does."""
    try:
        check_sum(block)
    except FormatError as error:
        return str(error).encode()
    shape = re.sub(rb"[0-7]", b"0", block[148:156])
    return b"right" if shape == b"000000\0 " else b"right, spelled " + shape


def field_value(field: str, raw: bytes | None) -> Any:
    """Return the value of a header field: number, octal mode, RFC 3339 time, or text.

    A malformed value is returned as text, that of a missing field as None.
    """
    word = field.rpartition(" header ")[2] if not field.startswith("xattr ") else ""
    with suppress(FormatError):
        if raw is None:
            return None
        if word == "mode":
            return f"{parse_number(raw):04o}"
        if word in OCTAL_FIELDS:
            return parse_number(raw)
        if word in ("mtime", "atime", "ctime"):
            moment = parse_number(raw) * 10**9
            return format_time(moment) or moment
    text = word in ("name", "linkname", "uname", "gname", "prefix")
    return spell(text_field(raw or b"") if text else raw or b"")


# ================================================================================================
# 17. Extract
#
# All directories are made first, then files, directory by directory, by several processes, then
# hard links; last the metadata of directories, deepest first, since making files in them changes
# their times.  Threads would lose the gain by handing over the interpreter at each system call
# (2 CPUs, 67,000 reflinks: one 2.8 s, two threads 2.3 s, two processes 1.5 s).
#
# Nothing leaves the target: its directories are opened from its descriptor, no component may be a
# link, and files are made only under new names (O_EXCL).  Links and devices have no open
# descriptor: they are checked again before their metadata are set.  Files are made private, and set
# in the order owner, xattrs, mode, time: chown(2) clears setuid and capabilities, and user.* xattrs
# need write permission, which mode 0444 lacks.
# ================================================================================================

BATCH = 4 << 20  # bytes, or 64 files, that a process extracts at a time
MAX_WORKERS = 8  # processes that extract


def select_nodes(tree: Tree, paths: Sequence[str] = (), exclude: Sequence[str] = (), *,
                 top: bytes = b"", whiteouts: bool = True) -> Iterator[tuple[bytes, Node]]:
    """Yield (path below ``top``, node) of what matches ``paths`` (all, without any), to extract it.

    A directory brings all its contents; it comes after its parents and before its contents.
    ``exclude`` skips what matches, with all below.  The root comes first, unless it is only a
    parent of the selected files.  Whiteouts of a raw tree are files called .wh.NAME.
    """
    if not exclude:
        tree = tree.limited(paths)
    fits = compile_patterns(paths, tree.paths)
    omits = compile_patterns(exclude, tree.paths) if exclude else lambda path: False
    inside: tuple[bytes, ...] = ()  # prefix of all in the last directory that was selected
    outside: tuple[bytes, ...] = ()  # ... excluded
    above: list[tuple[bytes, Node]] = []  # parents of which no file was selected yet
    check_type("path", top, bytes)
    cut = len(clean_name(top) + b"/") if clean_name(top) else 0
    for place, node, _ in tree.walk(top):
        if place.startswith(outside):
            continue
        path, below = place[cut:], place + b"/" if place else b""
        if omits(place):
            outside = (below,)
            continue
        while above and not path.startswith(above[-1][0] + b"/"):
            above.pop()
        if not place.startswith(inside):
            if not fits(place):
                if node.type == "dir" and path:
                    above.append((path, node))
                continue
            if node.type == "dir":
                inside = (below,)
        yield from above
        above = []
        if node.type != "whiteout":
            yield path, node
        elif whiteouts:
            folder, slash, base = path.rpartition(b"/")
            yield folder + slash + b".wh." + base, node
        if tree.raw and node.opaque and whiteouts:
            marker = Node(node.tree, node, OPAQUE_MARKER, "whiteout")
            yield (path + b"/" if path else b"") + OPAQUE_MARKER, marker


def strip_components(items: Iterator[tuple[bytes, Node]], count: int
                     ) -> Iterator[tuple[bytes, Node]]:
    """Remove ``count`` leading components from paths; skip paths that have no more.

    Raises CstorError when two files get the same path.
    """
    seen: dict[bytes, tuple[bytes, str]] = {}
    for path, node in items:
        if not (rest := b"/".join(path.split(b"/")[count:])):
            continue
        other, kind = seen.setdefault(rest, (path, node.type))
        if other != path and not kind == node.type == "dir":
            raise CstorError(f'"/{display(other)}" and "/{display(path)}" both become '
                             f'"{display(rest)}" without {count} components')
        if other == path:
            yield rest, node


def source_date_epoch() -> int:
    """Return SOURCE_DATE_EPOCH in nanoseconds, for times that no record gives; else 1970."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "") or "0"
    if not re.fullmatch(r"\d{1,11}", text):
        raise CstorError(f'SOURCE_DATE_EPOCH is not a number of seconds: "{display(text)}"')
    return int(text) * 10**9


class OwnerMap:
    """Shifts owners: ranges (first ID inside, first ID outside, count), for users and groups.

    ``ranges`` are [u:|g:]INSIDE:OUTSIDE:COUNT: for users, groups, or both.  Raises ValueError.
    """

    def __init__(self, ranges: Sequence[str]) -> None:
        self.users: Ranges = []
        self.groups: Ranges = []
        for text in check_words("owner_map", ranges):
            match = re.fullmatch(r"(?:([ug]):)?(\d{1,10}):(\d{1,10}):(\d{1,10})", text)
            numbers = tuple(map(int, match.groups()[1:])) if match else ()
            if not match or not numbers[2] or max(numbers[0], numbers[1]) + numbers[2] > NO_ID:
                raise ValueError(f'owner-map must be [u:|g:]INSIDE:OUTSIDE:COUNT, not "{text}"')
            for letter, mappings in (("u", self.users), ("g", self.groups)):
                if match[1] in (None, letter):
                    mappings.append((numbers[0], numbers[1], numbers[2]))

    def owner(self, node: Node) -> tuple[int, int]:
        """Return owner and group outside, unchanged without any mapping.  Raises CstorError."""
        uid, gid = node.owner[:2]
        found = map_id(uid, self.users, -1), map_id(gid, self.groups, -1)
        if -1 in found:
            number = uid if found[0] < 0 else gid
            raise CstorError(f'"/{display(node.path)}": ID {number} is not covered by --owner-map')
        return found

    def capability(self, value: bytes) -> bytes:
        """Return security.capability for the shifted root: capabilities(7), namespaced ones.

        Version 2 has 20 bytes and belongs to the machine's root; version 3 names its root.
        """
        root = map_id(0, self.users, 0)
        if not root or len(value) != 20 or value[3] != 2:
            return value
        return value[:3] + b"\x03" + value[4:] + root.to_bytes(4, "little")


def share_out(jobs: int, processes: int, work: Callable[[int], None], report: Callable[[], T],
              tick: Callable[[int], None]) -> list[T]:
    """Call ``work`` for each number below ``jobs`` in several processes, of which this is one.

    Return what ``report`` returns in the others at the end.  ``tick`` is called here with the
    number of jobs begun.  The first error of any is raised and stops all.
    """
    # The first job of each lot is in a pipe that all read from, in four bytes.  A page always
    # fits.  (A memfd would not work: two processes can read at the same offset.)
    size = -(-jobs // 1024) or 1
    tokens, write_fd = os.pipe()
    workers: dict[int, BinaryIO] = {}

    def do_lots(begin: Callable[[int], object]) -> Iterator[None]:
        with OnError(os.read, tokens, 4096):  # so that no process begins another job
            for token in iter(lambda: os.read(tokens, 4), b""):
                first = int.from_bytes(token, "big")
                begin(first)
                for job in range(first, min(first + size, jobs)):
                    work(job)
                yield

    try:
        with open(write_fd, "wb") as pipe:
            pipe.write(b"".join(first.to_bytes(4, "big") for first in range(0, jobs, size)))
        with SignalsHeld() as held:
            for _ in range(processes - 1):
                if not fork_worker(workers, held.before, lambda _: do_lots(lambda first: None),
                                   report):
                    break  # the system allows no more processes
        for _ in do_lots(tick):
            pass
        return [finish_worker(workers, pid) for pid in list(workers)]
    finally:
        with SignalsHeld():
            os.close(tokens)
            stop_workers(workers, signal.SIGTERM)  # after an error


def fork_worker(workers: dict[int, BinaryIO], signals: Any, work: Callable[[int], Iterator[object]],
                report: Callable[[], Any]) -> bool:
    """Start a process that consumes what ``work`` returns, while signals are held.

    ``workers`` gets its ID, and the end of a pipe; ``work`` gets the other end, where its report
    comes last.  Return False if the system allows no more processes.
    """
    parent = os.getpid()
    fds: tuple[int, ...] = ()
    try:
        read_fd, write_fd = fds = os.pipe()
        pid = os.fork()
    except OSError:
        for fd in fds:
            os.close(fd)
        return False
    if pid:
        os.close(write_fd)
        workers[pid] = open(read_fd, "rb")
        return True
    try:
        os.close(read_fd)  # so that writing without a reader gives EPIPE
        for pipe in workers.values():
            pipe.close()
        # A terminal signals the whole group; the parent stops us with SIGTERM.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _stop_worker)
        sys.unraisablehook = raise_after_finalizer
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            gc.disable()  # it would write to, and so copy, all shared memory
            for _ in work(write_fd):
                if os.getppid() != parent:
                    break
            answer = marshal.dumps((report(), None))
        except BaseException as error:
            answer = marshal.dumps((None, pack_error(error)))
        write_all(write_fd, answer)
    finally:
        os._exit(0)


def _stop_worker(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # one is enough: unfinished files are removed now
    raise KeyboardInterrupt


def pack_error(error: BaseException) -> tuple[Any, ...]:
    """Return an exception as plain data (pickle asks for a module that can be imported)."""
    args = (error.errno, error.strerror, error.filename) if type(error) is not NeedsUnshare \
        and isinstance(error, OSError) else error.args
    plain = {key: value for key, value in vars(error).items()
             if isinstance(value, (str, bytes, int, list, type(None)))}
    return type(error).__name__, tuple(
        arg if isinstance(arg, (str, bytes, int, type(None))) else str(arg) for arg in args), plain


def unpack_error(name: str, args: tuple[Any, ...], plain: dict[str, Any]) -> BaseException:
    """Return the exception that pack_error() got, if its class is in this file or Python's own."""
    kind = globals().get(name) or getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return CstorError(f"{name}: {' '.join(map(str, args))}")
    error: BaseException = kind.__new__(kind, *args)
    error.args = args[:2] if isinstance(error, OSError) else args
    vars(error).update(plain)
    return error


def finish_worker(workers: dict[int, BinaryIO], pid: int) -> Any:
    """Return the report of a process that has finished; raise its error."""
    data = workers[pid].read()
    workers.pop(pid).close()
    status = wait_for(pid)
    try:
        answer, error = marshal.loads(data)
    except (EOFError, ValueError, TypeError):
        raise CstorError(f"a worker process died with wait status {status}") from None
    if error:
        raise unpack_error(*error)
    return answer


def stop_workers(workers: dict[int, BinaryIO], number: int) -> None:
    """Send a signal to all processes, and wait for them."""
    for pid, pipe in workers.items():
        pipe.close()
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    for pid in workers:
        wait_for(pid)


def work_ahead(work: Callable[[], Iterable[Any]], *, again: bool = False, lot: int = CHUNK
               ) -> Generator[Any, None, None]:
    """Yield what ``work`` returns, made by another process while this one uses it.

    Items are tuples of plain data, bytes or a list first, and come in lots of some ``lot`` bytes.
    Errors, also that it was killed, are raised here; with ``again`` by doing the work again here.
    """
    def send(fd: int) -> Iterator[None]:
        """Send lists of items, each behind its length, until a length of 0."""
        batch: list[Any] = []
        room = lot
        widen_pipe(fd)
        try:
            for item in work():
                batch.append(item)
                room -= (4 << 10) + len(item[0]) * (1 if isinstance(item[0], bytes) else 256)
                if room < 0:
                    flush(fd, batch)
                    room = lot
                    yield
        finally:
            flush(fd, batch)
            write_all(fd, bytes(4))

    def flush(fd: int, batch: list[Any]) -> None:
        data = marshal.dumps(batch)
        batch.clear()
        write_all(fd, len(data).to_bytes(4, "little") + data)

    workers: dict[int, BinaryIO] = {}
    done = 0
    try:
        with SignalsHeld() as held:
            again = not fork_worker(workers, held.before, send, lambda: None) or again
        for pid, pipe in list(workers.items()):
            while size := int.from_bytes(pipe.read(4), "little"):
                if len(data := pipe.read(size)) < size:
                    break  # it was killed, as finish_worker() says
                batch = marshal.loads(data)
                yield from batch
                done += len(batch)
            finish_worker(workers, pid)
            return
    except Exception:
        if not again:
            raise
    finally:
        stop_workers(workers, signal.SIGKILL)
    yield from islice(work(), done, None)


def default_workers() -> int:
    """Return how many processes to use: one where fork(2) could harm running threads."""
    threading = sys.modules.get("threading")
    if threading and threading.active_count() > 1:
        return 1
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


class _LeftOut(Exception):
    """A file that this user cannot make or that a plain copy skips, usually a device."""


class Extraction:
    """Makes the files of a tree in an OutputDirectory; run() returns what was done.

    ``link_mode`` is one of LINK_MODES.  ``owners``: True sets them or fails, False leaves them,
    None sets them when we are root, as far as the kernel lets us.  ``owner_map``: see OwnerMap.
    ``verify`` reads back what was made and compares its CRC-64.  ``plain`` is for a copy that
    the user owns: no owners, setuid, xattrs, devices.
    """

    def __init__(self, output: OutputDirectory, *, link_mode: str = "auto",
                 owners: bool | None = None, owner_map: Sequence[str] = (), verify: bool = False,
                 plain: bool = False, workers: int = 0, progress: Progress | None = None) -> None:
        self.output, self.target, self.verify, self.plain = output, output.target, verify, plain
        self._workers, self._progress = workers, progress
        # Files or bytes, of this process, by kind and word: "made" by type of file, "bytes" by
        # reflink, copy and so on, "refused files" and "refused bytes" by why they are not shared,
        # "unset" by what could not be set.
        self.counts: Counter[tuple[str, str]] = Counter()
        self.left_out: list[bytes] = []  # paths that could not be made
        self._map = OwnerMap(owner_map)
        self._us = os.geteuid(), os.getegid()
        self._set_owners = not plain and (self._us[0] == 0 if owners is None else owners
                                          ) or bool(owner_map)
        self._insist = owners or bool(owner_map)
        self._hardlinks, self._copier = link_mode == "hardlink", ContentCopier(
            link_mode, 0 if output.merge else os.fstat(self.target.fd).st_dev)
        self._shared: set[tuple[int, int]] = set()  # inodes of the store with a new link
        self._firsts: dict[Node, bytes] = {}  # of files with several names, the path made first
        self._links: list[tuple[bytes, bytes]] = []  # hard links to make: path, first path
        self._folders: list[tuple[bytes, Node]] = []  # whose metadata are set last
        self._directories = 0
        self.merge = output.merge
        self._no_acls = self.merge or has_default_acl(self.target)  # else nothing can be inherited
        self._stores = storage_inodes() if self.merge else {}  # where merging must stop
        self._made = source_date_epoch()  # the time of directories without an entry

    # -- planning --------------------------------------------------------------------------------

    def run(self, items: Iterator[tuple[bytes, Node]]) -> dict[str, Any]:
        """Make all ``items``, as select_nodes() yields them; return summary().

        Raises IntegrityError, OSError with the path, Unsupported, NeedsUnshare; what is made stays.
        """
        batches = list(self._batches(items))
        # Only one process can track which of the store's files were hard-linked.
        workers = 1 if self._hardlinks else self._workers or default_workers()
        workers = min(workers, len(batches) // 2 or 1)
        if workers > 1:
            # Permission is denied only if the mode of a file or its directory says so.
            batches[0][2].tree.opener.prepare(
                node.place for batch in batches for node in batch[2::3]
                if node.parent and not (node.mode & stat.S_IROTH
                                        and node.parent.mode & stat.S_IXOTH))
        for numbers, left_out in share_out(len(batches), workers,
                                           lambda number: self._make_batch(batches[number]),
                                           lambda: (dict(self.counts), self.left_out),
                                           self._ticker(batches)):
            self.counts.update(numbers)
            self.left_out += left_out
        self.counts["made", "dir"] += self._directories
        self._make_links()
        self._finish_directories()
        self.output.finish()
        return self.summary()

    def _batches(self, items: Iterable[tuple[bytes, Node]]) -> Iterator[list[Any]]:
        """Make directories, and yield other files in batches: directory, name, node, and so on.

        Two workers in one directory wait for each other in the kernel: a directory is split only
        above sixteen batches.  The lists are flat: a tuple for each of 500,000 files takes 30 MB.
        """
        batch: list[Any] = []
        room = BATCH
        for path, node in items:
            if node.type == "dir":
                self._make_directory(path, node)
                continue
            if node in node.tree.linked and (first := self._firsts.setdefault(node, path)) != path:
                self._links.append((path, first))  # a later name is made of the first one
                continue
            parent, _, base = path.rpartition(b"/")
            if room < 0 and (parent != batch[-3] or room < -16 * BATCH):
                yield batch
                batch, room = [], BATCH
            if batch and parent == batch[-3]:
                parent = batch[-3]
            batch += (parent, node.name if node.name == base else base, node)
            room -= node.size + BATCH // 64
        yield from [batch] * bool(batch)

    def _ticker(self, batches: Sequence[list[Any]]) -> Callable[[int], None]:
        """Return a function that shows the progress, given how many batches were begun."""
        if not (progress := self._progress):
            return lambda number: None
        sizes = [0, *accumulate(sum(node.size for node in batch[2::3]) for batch in batches)]
        files = [0, *accumulate(len(batch) // 3 for batch in batches)]
        return lambda number: progress(sizes[number], files[number])

    def _make_directory(self, path: bytes, node: Node) -> None:
        made = not self.merge or self.output.resume
        if path:
            with ErrorsAs(self.target.explain, path):
                made = self._mkdir(*self.target.locate(path), path)
        if made or not node.implicit:  # an implicit entry must not change an existing directory
            self._folders.append((path, node))
        self._directories += 1

    def _mkdir(self, dir_fd: int, base: bytes, path: bytes) -> bool:
        """Make the directory ``path``; return whether it is ours, also from a killed run."""
        try:
            os.mkdir(base, 0o700, dir_fd=dir_fd)
        except FileExistsError:
            if not self.merge:
                raise
            status = os.lstat(base, dir_fd=dir_fd)
            if store := self._stores.get((status.st_dev, status.st_ino)):
                raise CstorError(f"{self.target.host_path(path)} is inside {store}",
                                 hint="--exclude leaves it out") from None
            if stat.S_ISDIR(status.st_mode):
                if self.output.resume:
                    remove_dead(dir_fd, name=base)
                return self.output.resume
            os.unlink(base, dir_fd=dir_fd)
            os.mkdir(base, 0o700, dir_fd=dir_fd)
        return True

    def _make_links(self) -> None:
        absent = set(self.left_out)
        with Target(self.target.path, os.dup(self.target.fd)) as sources:
            for path, first in self._links:
                if first in absent:
                    self.left_out.append(path)
                    continue
                with ErrorsAs(self.target.explain, path):
                    self._make(self._link, *self.target.locate(path), *sources.locate(first))

    def _finish_directories(self) -> None:
        for path, node in reversed(self._folders):
            with ErrorsAs(self.target.explain, path):
                if not path:
                    self.output.unmark()  # later it would change the directory's time
                above, base = self.target.locate(path)
                with Opened(os.open(base, OPEN_NEW_DIRECTORY, dir_fd=above)) as fd:
                    self._describe(fd, os.fstat(fd), node)

    # -- making files ----------------------------------------------------------------------------

    def _make_batch(self, batch: list[Any]) -> None:
        triples = iter(batch)
        for parent, base, node in batch[2].tree.opener.ahead(
                zip(triples, triples, triples), lambda triple: triple[2].place):
            path = parent + b"/" + base if parent else base
            fd = node.tree.open(node) if node.type == "reg" and node.size else -1
            try:  # no contexts: they cost 4 % of an extraction
                self._make(self._create, self.target.parent(parent), base, node, fd)
            except _LeftOut:
                self.left_out.append(path)
            except OSError as error:
                raise self.target.explain(error, path) from None
            finally:
                if fd >= 0:
                    os.close(fd)

    def _make(self, create: Callable[..., None], dir_fd: int, base: bytes, *args: Any) -> None:
        """Let ``create`` make a file; a merge stages it, and moves it to its place when whole."""
        if not self.merge:
            create(dir_fd, base, *args)
            return
        place = b".cstor-%s.partial" % os.urandom(6).hex().encode()
        try:
            create(dir_fd, place, *args)
            try:
                os.rename(place, base, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            except IsADirectoryError:
                os.rmdir(base, dir_fd=dir_fd)
                os.rename(place, base, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        finally:  # also if both are names of one file: rename(2) does nothing then
            unlink_quietly(dir_fd, place)

    def _link(self, dir_fd: int, base: bytes, from_fd: int, name: bytes) -> None:
        os.link(name, base, src_dir_fd=from_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        self.counts["made", "hardlink"] += 1

    def _create(self, dir_fd: int, base: bytes, node: Node, fd: int) -> None:
        if self.plain and node.type not in ("reg", "symlink", "fifo"):
            raise _LeftOut
        if node.type != "reg":
            self._create_special(dir_fd, base, node)
        elif fd < 0 or not (self._move(dir_fd, base, node, fd)
                            or self._hardlinks and self._share(dir_fd, base, node, fd)):
            self._create_regular(dir_fd, base, node, fd)
        self.counts["made", node.type] += 1

    def _create_regular(self, dir_fd: int, base: bytes, node: Node, fd: int) -> None:
        # Create with the final mode only if we remain the owner; no chmod is needed then.
        ours = not node.extra and self._owner(node) == self._us
        new = -1
        try:
            new = os.open(base, OPEN_NEW_FILE, node.mode & 0o777 if ours else 0o600, dir_fd=dir_fd)
            if node.size:
                self._account(node, self._copier.fill(
                    fd, node.size, new, lambda: node.path, node.tree.layer_id))
                node.tree.recheck(node, fd)
            status = os.fstat(new)
            check_copy(new, status, node, self.verify)
            self._describe(new, status, node)
        except FileExistsError:
            raise
        except BaseException:  # a signal can come before the caller has the descriptor
            unlink_quietly(dir_fd, base)
            raise
        finally:
            if new >= 0:
                os.close(new)

    def _account(self, node: Node, why: str) -> None:
        self.counts["bytes", "copied" if why else "reflinked"] += node.size
        if why:
            self._refuse(why, node)

    def _refuse(self, why: str, node: Node) -> None:
        self.counts["refused files", why] += 1
        self.counts["refused bytes", why] += node.size

    def _move(self, dir_fd: int, base: bytes, node: Node, fd: int) -> bool:
        """Give a staged file its metadata and its place, where no file may exist.

        rename(2) would replace a file that another process makes meanwhile, and follows no link.
        """
        if (staged := node.tree.staged(node)) is None:
            return False
        folder, name, why = staged
        status = os.fstat(fd)
        check_copy(fd, status, node, self.verify)
        self._describe(fd, status, node)
        try:
            os.rename(name, base, src_dir_fd=folder, dst_dir_fd=dir_fd)
        except OSError as error:
            if error.errno != errno.EXDEV:  # another file system is mounted below the target
                raise
            return False
        self._account(node, why)
        return True

    def _share(self, dir_fd: int, base: bytes, node: Node, fd: int) -> bool:
        """Give the store's own file one more name, if it has all the right metadata.

        We set nothing in its inode; the kernel changes its link count and ctime.
        """
        status = os.fstat(fd)
        check_copy(fd, status, node, self.verify)
        inode = status.st_dev, status.st_ino
        why = "already hard-linked under another name" if inode in self._shared else ""
        if (stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid), status.st_mtime_ns,
                read_xattrs(fd)) != (node.mode, self._owner(node), node.mtime_ns, node.xattrs):
            why = "mode, owner, time or xattrs in the store differ from the image's"
        try:
            if not why:
                os.link(f"/proc/self/fd/{fd}", base, dst_dir_fd=dir_fd, follow_symlinks=True)
                self._shared.add(inode)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOENT,
                                   errno.EOPNOTSUPP):
                raise
            why = (error.strerror or "") if has_proc() else "/proc is not mounted"
        if why:
            self._refuse(f"link: {why}", node)
            return False
        self.counts["bytes", "hardlinked"] += node.size
        return True

    def _create_special(self, dir_fd: int, base: bytes, node: Node) -> None:
        """Make a symbolic link, device, FIFO or socket, or the empty file of a whiteout."""
        kind = FILE_TYPES.get(node.type, stat.S_IFREG)
        if node.type == "whiteout":
            with open(os.open(base, OPEN_NEW_FILE, 0, dir_fd=dir_fd), "wb") as file:
                os.utime(file.fileno(), ns=(0, 0))
            return
        if node.type == "symlink":
            os.symlink(node.linkname, base, dir_fd=dir_fd)
        else:
            try:
                os.mknod(base, kind | 0o600, os.makedev(*node.device), dir_fd=dir_fd)
            except PermissionError:
                if node.type not in ("char", "block"):
                    raise
                raise _LeftOut from None
        with OnError(unlink_quietly, dir_fd, base), Opened(os.open(
                base, os.O_PATH | os.O_NOFOLLOW, dir_fd=dir_fd)) as fd:
            status = os.fstat(fd)
            if stat.S_IFMT(status.st_mode) != kind or status.st_nlink != 1:
                raise OSError(errno.EBUSY, "another process put something else in its place")
            if has_proc():
                self._describe(f"/proc/self/fd/{fd}", status, node)
            else:
                in_directory(dir_fd, lambda: self._describe(base, status, node))

    # -- metadata --------------------------------------------------------------------------------

    def _owner(self, node: Node) -> tuple[int, int]:
        return self._us if self.plain else self._map.owner(node)

    def _describe(self, place: int | str | bytes, status: os.stat_result, node: Node) -> None:
        """Set owner, xattrs, mode and time, by a descriptor, its path below /proc/self/fd, or name.

        A name (bytes) is relative to the working directory, and is not followed.
        """
        found, wanted = (status.st_uid, status.st_gid), self._owner(node)
        if found != wanted and self._chown(place, wanted, node):
            found = wanted
        xattrs = node.xattrs if node.extra and not self.plain else {}
        if self._no_acls and node.type != "symlink":
            remove_acls(place)
        for name, value in xattrs.items():
            self._set_xattr(place, name, value)
        if node.type != "symlink":
            mode = node.mode
            if self.plain:
                mode &= 0o1777 if node.type == "dir" else 0o777
            if node.implicit and node.parent is None and self._us[0]:
                mode |= stat.S_IWUSR  # containers/storage's 0555 would prevent removal
            elif node.type != "dir" and found != wanted:  # a program must not become another user
                drop = stat.S_ISUID * (found[0] != wanted[0]) | stat.S_ISGID * (
                    found[1] != wanted[1])
                if mode & drop:
                    self.counts["unset", "setuid"] += 1
                mode &= ~drop
            if stat.S_IMODE(status.st_mode) != mode or xattrs:  # an ACL in them also sets it
                os.chmod(place, mode)
        moment = self._made if node.implicit else node.mtime_ns
        os.utime(place, ns=(moment, moment), follow_symlinks=not isinstance(place, bytes))

    def _chown(self, place: int | str | bytes, owner: tuple[int, int], node: Node) -> bool:
        if self._set_owners:
            try:
                os.chown(place, *owner, follow_symlinks=not isinstance(place, bytes))
                return True
            except OSError as error:
                # EINVAL: the user namespace does not map this ID.
                if error.errno not in (errno.EPERM, errno.EINVAL):
                    raise
                if self._insist:
                    raise NeedsUnshare(
                        f'"/{display(node.path)}" cannot be given to {owner[0]}:{owner[1]}: '
                        f"{error.strerror}", hint="run it as root, or use --no-same-owner to "
                        "own all files yourself") from None
        self.counts["unset", "owner"] += 1
        return False

    def _set_xattr(self, place: int | str | bytes, name: bytes, value: bytes) -> None:
        if name == b"security.capability":
            value = self._map.capability(value)
        try:
            os.setxattr(place, name, value, follow_symlinks=not isinstance(place, bytes))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise OSError(error.errno, f"xattr {display(name)} of "
                              f"{counted(len(value), 'byte')}: {error.strerror}") from None
            self.counts["unset", "xattr"] += 1

    def _by_word(self, kind: str) -> dict[str, int]:
        return {word: number for (found, word), number in sorted(self.counts.items())
                if found == kind}

    def summary(self) -> dict[str, Any]:
        """Return what was made and how, as numbers of files and bytes, for JSON.

        ``refused`` tells why files were not shared, ``unset`` how many files lack an owner, a
        setuid bit or an xattr, ``left-out`` the paths that could not be made.
        """
        made, size = self._by_word("made").get, self._by_word("bytes")
        refused = self._by_word("refused bytes")
        return {
            "files": made("reg", 0), "directories": made("dir", 0), "symlinks": made("symlink", 0),
            "hardlinks": made("hardlink", 0), "devices": made("char", 0) + made("block", 0),
            "fifos": made("fifo", 0), "sockets": made("socket", 0),
            "whiteouts": made("whiteout", 0), "bytes": sum(size.values()),
            **{f"bytes-{way}": size.get(way, 0) for way in ("reflinked", "hardlinked", "copied")},
            "refused": [{"why": why, "files": files, "bytes": refused[why]}
                        for why, files in self._by_word("refused files").items()],
            "unset": self._by_word("unset"),
            "left-out": [spell(b"/" + path) for path in sorted(self.left_out)]}


def extract_tree(tree: Tree, directory: str, *, paths: Sequence[str] = (),
                 exclude: Sequence[str] = (), strip: int = 0, whiteouts: bool = True,
                 force: bool = False, clean: bool | None = None, link_mode: str = "auto",
                 owners: bool | None = None, owner_map: Sequence[str] = (), verify: bool = False,
                 workers: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Put the files of a tree into ``directory``: a new one, an empty one, or with ``force`` any.

    ``paths`` and ``exclude`` are patterns, ``strip`` the number of leading components to remove.
    With ``clean`` (None: if the directory is new) an error leaves nothing there.  ``verify``
    compares all layers with their DiffIDs before it makes anything, and then the new files with
    their CRC-64.  Extraction explains ``link_mode``, ``owners``, ``owner_map``.  Return its
    summary() with the tree's ``notes``.  Raises as these do, and NotFound if nothing matches.
    """
    output = OutputDirectory(directory, force=force, clean=clean)
    if verify:
        tree.verify(progress)
    items = chosen_nodes(tree, paths, exclude, strip, whiteouts)
    with output:
        extraction = Extraction(output, link_mode=link_mode, owners=owners, owner_map=owner_map,
                                verify=verify, workers=workers, progress=progress)
        return {**extraction.run(items), "notes": tree.notes()}


def chosen_nodes(tree: Tree, paths: Sequence[str], exclude: Sequence[str], strip: int,
                 whiteouts: bool) -> Iterator[tuple[bytes, Node]]:
    """Return what select_nodes() and strip_components() yield.  Raises NotFound now, not later."""
    check_type("strip", strip, int)
    if strip < 0:
        raise ValueError("strip is negative")
    items = select_nodes(tree, paths, exclude, whiteouts=whiteouts)
    if strip:
        items = strip_components(items, strip)
    first, items = peek(items)
    if first is None:
        need_match(tree, paths)
    return items


class OutputDirectory(Transaction):
    """A directory to extract into: a new one, an empty one, or with ``force`` any.

    After an error the files are removed again if ``clean`` (None: if the directory is new); the
    error's hint says what stays.  Until the end other users cannot enter the directory, and
    ``staging``, a directory for unfinished files, marks it as incomplete.  A mark
    without a lock is from a killed run, which ``force`` resumes.  With ``whole`` the directory has
    a temporary name until the end; ``removed`` are such names left by killed runs.
    """

    def __init__(self, directory: str, *, force: bool = False, clean: bool | None = None,
                 whole: bool = False) -> None:
        if not directory or force and clean:
            raise ValueError("clean would remove files that were there before" if directory
                             else "the name of the directory is empty")
        refuse_storage(directory)
        super().__init__(directory)
        self._place, self._force, self._clean = directory, force, clean
        self.removed: list[bytes] = []
        if whole:
            above, name = map(os.fsencode, os.path.split(directory.rstrip("/")))
            self.removed = remove_dead(AT_FDCWD, name, above or b".")
            self._place = os.fsdecode(os.path.join(above, partial_name(name)))
        self.merge = self.resume = False  # files that exist are replaced; a killed run is resumed

    def _open(self) -> None:
        self.target, self._mode, self._made = self.open_directory(self._place)
        self.target.path = self.path
        self.merge = self._force and not self._made
        lock = self._own(Target("", os.open(b".", OPEN_NEW_DIRECTORY, dir_fd=self.target.fd)))
        alone, marks = try_lock(lock.fd, wait=self._place != self.path), partials(lock)
        if not self._force and (len(os.listdir(lock.fd)) > len(marks) or marks and not alone):
            self.keep()
            error = OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), self.path)
            add_hint(error, "--force merges into it" if not marks else "another run is filling it"
                     if not alone else "a killed run left it incomplete: --force resumes it")
            raise error
        if marks and alone:
            self.resume = True
            self._mode = int(re.sub(rb"\.cstor-(?:([0-7]+)-)?.*", rb"0\1", max(marks)), 8)
            remove_dead(self.target.fd)
        self._mark = partial_name(b"%04o" % self._mode)
        os.mkdir(self._mark, 0o700, dir_fd=self.target.fd)
        self.staging = self._own(Target(self.target.host_path(self._mark), os.open(
            self._mark, OPEN_NEW_DIRECTORY, dir_fd=self.target.fd)))
        self.keep()  # _clean_up() removes the directory itself
        if not self.resume:  # else the next run must also resume it; last: we can be killed
            self.on_error(self.staging.path, self.unmark)
        self.on_error(self.path, self._clean_up)
        os.fchmod(self.staging.fd, 0o700)  # without the setgid bit that it may have inherited
        remove_acls(self.staging.fd)

    def unmark(self) -> None:
        """Remove the mark with its contents; harmless when repeated."""
        if self._mark:
            with SignalsHeld():
                remove_content(self.staging)
                os.rmdir(self._mark, dir_fd=self.target.fd)
                self._mark = b""

    def finish(self) -> None:
        """Give the directory its final name, and mode and time, unless those of a root are set."""
        if self._mark:  # else it was unmarked to set them
            self.unmark()
            if self._mode:
                os.chmod(".", self._mode, dir_fd=self.target.fd)
                os.utime(".", ns=(source_date_epoch(),) * 2, dir_fd=self.target.fd)
        if not is_at(self.target, self._place):
            raise OSError(errno.ESTALE, "moved or removed during extraction", self.path)
        with ErrorsAs(lambda error: OSError(error.errno, error.strerror, self.path)):
            if self._place != self.path:
                os.rename(self._place, self.path)

    def _clean_up(self) -> str:
        if self._made if self._clean is None else self._clean:
            return remove_failed(self.target, self._place if self._made else "")
        return f"{self.path} is left incomplete"


def refuse_storage(path: str) -> None:
    """Raise CstorError when ``path`` is inside a storage that is open or configured.

    Called before anything is made.  Links and ".." are followed; bind mounts are recognized by
    inode, those from deep inside a storage by /proc, or else by a search of all its directories.
    """
    check_type("path", path, str)
    place, stores = os.path.realpath(path), storage_inodes()
    while True:
        if store := stores.get(place) or stores.get(inode_at(place)):
            raise CstorError(f"{path} is inside {store}",
                             hint="cstor never writes to a storage: choose another place")
        if place == "/":
            return
        place = os.path.dirname(place)


def storage_inodes() -> dict[Any, str]:
    """Return real paths, and device with inode, of the storages that are open or configured.

    The values name them.  Directories where a part of a storage is mounted count as well.
    """
    found = storage_places()
    mounts = [[re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)
               for word in line.split(" ")[2:5]]  # device, directory there, mount point
              for line in read_proc("self/mountinfo").splitlines()]
    for place, name in list(found.items()):
        above = [mount for mount in mounts if f"{place}/".startswith(f"{mount[2].rstrip('/')}/")]
        for device, root, point in sorted(above, key=lambda mount: len(mount[2]))[-1:]:
            inside = os.path.join(root, place[len(point):].lstrip("/"), "")
            found.update((mount[2], name) for mount in mounts
                         if mount[0] == device and f"{mount[1]}/".startswith(inside))
    inodes: dict[Any, str] = {inode_at(place): name for place, name in found.items()}
    for place, name in [] if mounts else found.items():
        for folder, names, _ in os.walk(place):  # any directory can be mounted elsewhere
            inodes.setdefault(inode_at(folder), name)
            names[:] = [each for each in names if not os.path.ismount(os.path.join(folder, each))]
    return {**inodes, **found, (0, 0): ""}


def storage_places() -> dict[str, str]:
    """Return directories of storages, in run roots containers/storage's own, and their names."""
    storages = [([root.path for root in storage.roots], storage.runroot) for storage in filter(
        None, [entry() for entry in list(OPEN_STORAGES)])]
    with suppress(CstorError, OSError):  # an unreadable configuration names no storage
        config = load_config()
        storages.append(([config.graphroot, config.imagestore, *config.stores], config.runroot))
    inside = [driver + end for driver in DRIVERS for end in (
        "", *(f"-{kind.WORD}s" for kind in (Layer, Image, Container)))]
    return {os.path.realpath(os.path.join(root, name)): "the storage at " + (
                root if root != run else f"{roots[0]}, in its run root {run}")
            for roots, run in storages for root in filter(None, [run, *roots])
            for name in [*[""] * (root != run), *inside]}


def inode_at(path: str) -> tuple[int, int]:
    """Return device and inode number of a path, (0, 0) if it cannot be looked up."""
    with suppress(OSError):  # then nothing can be made below it
        return os.stat(path).st_dev, os.stat(path).st_ino
    return 0, 0


def has_default_acl(target: Target) -> bool:
    """Tell whether new files in a directory inherit an ACL; True without permission to look."""
    try:
        with Directory("", os.open(b".", OPEN_NEW_DIRECTORY, dir_fd=target.fd)) as found:
            return "system.posix_acl_default" in os.listxattr(found.fd)
    except OSError as error:
        return error.errno == errno.EACCES  # else ACLs are unsupported there


def copy_content(tree: Tree, node: Node, fd: int, progress: Progress) -> None:
    """Copy a regular file, checked, with its holes, mode and time; a device gets only the bytes."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        for data in tree.content(node):
            write_all(fd, data)
        return
    with Opened(tree.open(node)) as source:
        if node.size:
            ContentCopier().fill(source, node.size, fd, lambda: node.path, node.tree.layer_id)
    check_copy(fd, os.fstat(fd), node, True, progress)
    os.fchmod(fd, node.mode & 0o777)
    os.utime(fd, ns=(node.mtime_ns, node.mtime_ns))


def check_copy(fd: int, status: os.stat_result, node: Node, verify: bool,
               progress: Progress = lambda size, files: None) -> None:
    """Compare the content of a file with its metadata."""
    if status.st_size != node.size:
        raise IntegrityError("changed while it was read", layer=node.tree.layer_id, name=node.path,
                             expected=counted(node.size, "byte"), actual=str(status.st_size))
    done = 0
    for data in node.checked(fd) if verify and node.checksum is not None else ():
        done += len(data)
        progress(done, 1)


# ================================================================================================
# 18. Archives
#
# Formats for other tools.  An OCI layout is a directory: "oci-layout", "index.json" with a
# descriptor (media type, digest, size) of each manifest, and blobs named by their sha256.  A
# docker-archive is a tar of layers' tars, configurations and "manifest.json".  All is written as a
# stream: a tar needs digests and sizes beforehand.  They come from the layers' records, and are
# checked after the layer was written.  A configuration is written as it is stored, so the image
# keeps its ID; so is a manifest that already describes exactly these blobs.
# ================================================================================================

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"  # +gzip, +zstd

# Annotations: the name of an image in an OCI layout, and what a manifest was made from.
REF_NAME = "org.opencontainers.image.ref.name"
ORIGINAL_DIGEST = "dev.cstor.original-manifest-digest"

LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
COMPRESSIONS = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}  # suffixes of layers' media types

# Types of the optional fields of manifests and their entries.
ENTRY_TYPES = {"artifactType": str, "annotations": dict, "platform": dict, "subject": dict,
               "urls": list}


# -- descriptions of images ----------------------------------------------------------------------

def descriptor(media_type: str, digest: str, size: int) -> dict[str, Any]:
    """Return an OCI content descriptor."""
    return {"mediaType": media_type, "digest": digest, "size": size}


def layer_blob(layer: Layer) -> tuple[str, int]:
    """Return (digest, size) of a layer's tar: as recorded, or from making it once."""
    if re.fullmatch("sha256:" + HEX64, layer.diff_digest) and (
            layer.diff_size > 0 or layer.diff_digest == sha256_digest(b"")):
        return layer.diff_digest, layer.diff_size
    sizes: list[int] = []
    digest = layer.export(None, progress=lambda size, _: sizes.append(size))
    return digest, sizes[-1]


def check_config(image: Image, digests: Sequence[str]) -> bytes:
    """Return an image's configuration, whose DiffIDs must be those of its layers' tars.

    Raises IntegrityError if they differ, and as Image.config() does.
    """
    wanted = as_list(as_dict(image.config().get("rootfs")).get("diff_ids"))
    if wanted != list(digests):
        raise image.wrong_layers(wanted, digests)
    return image.config_bytes()


def image_parts(image: Image) -> tuple[list[tuple[Layer, str, int]], bytes]:
    """Return an image's layers, each with digest and size of its tar, and configuration."""
    layers = [(layer, *layer_blob(layer)) for layer in image.checked_chain()]
    return layers, check_config(image, [digest for _, digest, _ in layers])


def manifest_descriptor(digest: str, size: int, said: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a manifest, with its configuration's platform if it names os and architecture."""
    blob, platform = descriptor(OCI_MANIFEST, digest, size), platform_in(said)
    return {**blob, "platform": platform} if {"os", "architecture"} <= set(platform) else blob


def derived(document: Mapping[str, Any], original: str) -> bytes:
    """Return a document with the digest of what it was made from in an annotation."""
    annotations = {**as_dict(document.get("annotations")), ORIGINAL_DIGEST: original}
    return compact_json({**document, "annotations": annotations})


def oci_manifest(image: Image, config: bytes, layers: Sequence[dict[str, Any]]) -> bytes:
    """Return the manifest of an image whose layers are the blobs ``layers``.

    It is the stored one, byte for byte, if that is an OCI manifest of exactly these blobs; else a
    new one, with the stored one's digest in an annotation.
    """
    data = image.big_data("manifest")
    stored = image.manifest()
    old = as_dict(stored.get("config"))
    kind = old.get("mediaType") if isinstance(old.get("mediaType"), str) else ""
    is_oci = stored.get("mediaType", OCI_MANIFEST) == OCI_MANIFEST and "fsLayers" not in stored \
        and not str(kind).startswith("application/vnd.docker.")
    strict = is_oci and is_strict(stored)
    blob = descriptor(str(kind) if is_oci and kind else OCI_CONFIG, sha256_digest(config),
                      len(config))
    if strict and [
            {key: entry.get(key) for key in blob} for entry in (old, *stored["layers"])
            ] == [blob, *layers]:
        return data
    before = image.digest if stored.get("schemaVersion") == 1 else sha256_digest(data)
    kept = kept_fields(stored, "schemaversion", "mediatype", "config", "layers", "manifests") \
        if strict else {}
    return derived({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": blob,
                    "layers": list(layers), **kept}, before)


def plain_manifest(image: Image) -> tuple[list[tuple[Layer, str, int]], bytes, bytes]:
    """Return what image_parts() does, and the manifest of uncompressed layers."""
    layers, config = image_parts(image)
    return layers, config, oci_manifest(image, config, [
        descriptor(OCI_LAYER, digest, size) for _, digest, size in layers])


def is_strict(manifest: dict[str, Any]) -> bool:
    """Tell whether every reader accepts a manifest: whether its fields have the right types."""
    kind, other = ("manifests", "layers") if "manifests" in manifest else ("layers", "manifests")
    entries = manifest.get(kind)
    if type(manifest.get("schemaVersion")) is not int or manifest["schemaVersion"] != 2 \
            or not isinstance(entries, list) or other in manifest:
        return False
    with suppress(FormatError):
        compact_json(manifest)  # Python's parser accepts NaN, which is not JSON
        return all(map(has_right_types, (
            manifest, *entries, *[manifest.get("config")] * (kind == "layers"))))
    return False


def has_right_types(entry: Any) -> bool:
    """Tell whether a manifest or descriptor is an object whose fields have the right types."""
    if not isinstance(entry, dict) or type(entry.get("size", 0)) is not int or not all(
            isinstance(entry[key], kind) for key, kind in ENTRY_TYPES.items()
            if entry.get(key) is not None):
        return False
    platform, annotations = entry.get("platform") or {}, entry.get("annotations") or {}
    words = {"architecture", "os", "os.version", "variant"} & set(platform)
    return isinstance(platform.get("os.features") or [], list) and all(
        isinstance(text, str) for text in chain(map(platform.get, words), annotations.values()))


def oci_index(image: Image, blobs: Sequence[dict[str, Any] | None]) -> bytes:
    """Return the index of a manifest list, as oci_manifest(), of ``blobs``; None = left out."""
    data, manifests = image.list_bytes(), list(filter(None, blobs))
    stored = parse_json(data, "manifest list")
    kept: dict[str, Any] = {}
    if is_strict(stored) and "manifests" in stored:
        if stored.get("mediaType", OCI_INDEX) == OCI_INDEX and [
                {key: entry.get(key) for key in ("digest", "size")} for entry in stored["manifests"]
                ] == [{key: blob[key] for key in ("digest", "size")} for blob in manifests]:
            return data
        kept = kept_fields(stored, "schemaversion", "mediatype", "manifests")
        manifests = [{**blob, **kept_fields(entry, "mediatype", "digest", "size", "data", "urls")}
                     for blob, entry in zip(blobs, [
                         entry for entry, instance in image.entries() if instance]) if blob]
    return derived({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests, **kept},
                   sha256_digest(data))


def kept_fields(stored: Mapping[str, Any], *own: str) -> dict[str, Any]:
    """Return the fields of a strict object except ``own``; Go ignores the case of names."""
    known = ("annotations", "artifactType", "platform", "subject")
    other = {key.lower() for key in known}.union(own)
    return {key: value for key, value in stored.items() if value is not None
            and (key in known or key.lower() not in other)}


def choose_instances(image: Image, platform: str, every: bool) -> list[Image]:
    """Return the images to copy for ``image``: see single(), or all of its list."""
    found = [instance for _, instance in image.instances()] if every else []
    if every and image.is_list and not found:
        raise NotFound(f"image {image.title} has no instance in the storage")
    return found or [image.single(platform)]


# -- OCI layout ----------------------------------------------------------------------------------

def open_blob(layout: Directory, digest: str, size: int = -1) -> int:
    """Open a blob of an OCI layout, whose content has the ``digest`` and, unless -1, the ``size``.

    Raises IntegrityError, FileNotFoundError, FormatError for what is not a regular file.
    """
    name = b"blobs/sha256/" + digest[7:].encode()
    fd = layout.open(name)
    with OnError(os.close, fd):
        actual = os.fstat(fd).st_size
        if actual != size >= 0:  # else terabytes of a hole would be hashed
            raise IntegrityError(f"{layout.host_path(name)}: wrong size",
                                 expected=counted(size, "byte"), actual=counted(actual, "byte"))
        if (found := sha256_of(read_checked(fd, actual, name=name))) != digest:
            raise IntegrityError(f"{layout.host_path(name)}: wrong digest", expected=digest,
                                 actual=found)
        return fd


def read_index(layout: Directory, file: str) -> dict[str, Any]:
    """Return the index of an OCI layout, with a list of manifests; errors name it ``file``."""
    index = parse_object(layout.read(b"index.json", MAX_JSON), file)
    if "manifests" not in index or not isinstance(index["manifests"] or [], list):
        raise FormatError("not an OCI index", file=file)
    return {**index, "manifests": index["manifests"] or []}


class OciLayout(Transaction):
    """An OCI layout that images are added to.  A context manager.

    While it is open it is locked (flock(2) on the directory) against other writers, and after
    an error it is as it was before; a new layout is removed.
    """

    def __init__(self, directory: str) -> None:
        refuse_storage(directory)
        super().__init__(directory)

    def __enter__(self) -> OciLayout:
        waits = [0.01] * 1000  # the time in which another writer has the lock does not count
        while True:
            try:
                super().__enter__()
                self._prepare()
                return self
            except BaseException as error:
                self.__exit__(type(error), error)
                # Another writer has just made it, or failed and removed it.
                if getattr(error, "errno", 0) not in (errno.EEXIST, errno.EBUSY, errno.ESTALE) \
                        or not waits:
                    raise
                time.sleep(waits.pop())

    def _open(self) -> None:
        self.target, mode, made = self.open_directory(self.path)
        if made:
            os.chmod(".", mode, dir_fd=self.target.fd)  # an image is not a secret

    def _prepare(self) -> None:
        lock = self._own(Target("", os.open(b".", OPEN_NEW_DIRECTORY, dir_fd=self.target.fd)))
        try:
            fcntl.flock(lock.fd, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        if not is_at(self.target, self.path):
            raise OSError(errno.ESTALE, "another writer removed it", self.path)
        remove_dead(self.target.fd)
        names = self.target.listdir(b".")
        if names:  # we do not own what another writer made there
            self.keep()
        if b"oci-layout" in names:
            version = as_dict(parse_json(self.target.read(b"oci-layout", READ_SIZE), (
                f"{self.path}/oci-layout"))).get("imageLayoutVersion")
            if not isinstance(version, str) or not version.startswith("1."):
                raise Unsupported(f"{self.path}: image layout version {version!r}")
        elif any(name != b"blobs" and not name.startswith(b".cstor-") for name in names):
            raise CstorError(f"{self.path} is not an OCI layout, and not empty")
        for folder in (b"blobs", b"blobs/sha256"):
            with ErrorsAs(self.target.explain, folder):
                if not self.target.exists(folder):
                    above, base = self.target.locate(folder)
                    os.mkdir(base, dir_fd=above)
                    self._note(folder, os.rmdir)
        remove_dead(self.target.parent(b"blobs/sha256"))

    def _note(self, path: bytes, remove: Callable[..., None]) -> None:
        """Remove ``path`` after an error: the index does not name it."""
        self.on_error(self.target.host_path(path), lambda: remove(
            os.path.basename(path), dir_fd=self.target.locate(path)[0]))

    def has(self, digest: str, size: int = -1) -> bool:
        """Tell whether a blob exists and is whole: a power cut can damage it and leave its size."""
        with suppress(FileNotFoundError, FormatError, IntegrityError):
            if re.fullmatch("sha256:" + HEX64, digest):
                os.close(open_blob(self.target, digest, size))
                return True
        return False

    def write(self, folder: bytes, fill: Callable[[int], Any], name: bytes = b"") -> None:
        """Make a file that ``fill`` writes to, under ``name``, or else the name that it returns."""
        with ErrorsAs(self.target.explain, folder):
            parent = Directory("", os.dup(self.target.parent(folder)))
        with NewFile(self.target.host_path(folder), parent, b"blob") as new:
            name = fill(new.fd) or name
            path = folder + b"/" + name if folder else name
            with SignalsHeld():
                if not self.target.exists(path):
                    self._note(path, os.unlink)
                new.appear(name)
                if path == b"index.json":  # now the index names all that was added
                    self.keep()

    def put(self, folder: bytes, name: bytes, data: bytes) -> None:
        """Make a small file, or replace it, at once."""
        self.write(folder, lambda fd: write_all(fd, data), name)

    def add(self, data: bytes) -> tuple[str, int]:
        """Add a small blob; return its digest and size."""
        digest = sha256_digest(data)
        if not self.has(digest, len(data)):
            self.put(b"blobs/sha256", digest[7:].encode(), data)
        return digest, len(data)

    def add_layer(self, layer: Layer, compression: tuple[str, int] = ("none", 0),
                  progress: Progress | None = None) -> tuple[str, dict[str, Any]]:
        """Add a layer's tar, verified; return its DiffID and the descriptor of the blob."""
        diff_id = digest = layer.diff_digest
        known = compression[0] == "none" and self.has(digest, layer.diff_size)

        def fill(fd: int) -> bytes:
            nonlocal diff_id, digest
            diff_id, digest = write_blob(layer, fd, compression, progress)
            return digest[7:].encode()

        if not known:
            self.write(b"blobs/sha256", fill)
        size = self.target.lstat(b"blobs/sha256/" + digest[7:].encode()).st_size
        if known and progress:
            progress(0, 0)
            progress(size, 0)
        return diff_id, descriptor(OCI_LAYER + COMPRESSIONS[compression[0]], digest, size)

    def add_image(self, image: Image, compression: tuple[str, int] = ("none", 0),
                  progress: Progress | None = None) -> dict[str, Any]:
        """Add an image's layers, configuration and manifest; return the manifest's descriptor."""
        layers = [self.add_layer(layer, compression, progress) for layer in image.checked_chain()]
        config = check_config(image, [diff_id for diff_id, _ in layers])
        self.add(config)
        manifest = oci_manifest(image, config, [blob for _, blob in layers])
        return manifest_descriptor(*self.add(manifest), image.config())

    def tag(self, blob: dict[str, Any], tag: str) -> list[Any]:
        """Enter a manifest in the index, under ``tag`` if it is not ""; the last step.

        The image that had the tag leaves the index; its blobs stay.  Returns its digest, if any.
        """
        index: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
        with suppress(FileNotFoundError):
            index = read_index(self.target, f"{self.path}/index.json")

        def stays(entry: Any) -> bool:
            old = as_dict(entry)
            name = as_dict(old.get("annotations")).get(REF_NAME)
            return name != tag if tag else name is not None or old.get("digest") != blob["digest"]

        entry = {**blob, "annotations": {REF_NAME: tag}} if tag else blob
        replaced = [old.get("digest") for old in index["manifests"] if not stays(old)]
        index["manifests"] = [*filter(stays, index["manifests"]), entry]
        if not self.target.exists(b"oci-layout"):
            self.put(b"", b"oci-layout", LAYOUT_FILE)
        self.put(b"", b"index.json", compact_json(index))
        return [digest for digest in replaced if digest != blob["digest"]]


def write_blob(layer: Layer, fd: int, compression: tuple[str, int], progress: Progress | None
               ) -> tuple[str, str]:
    """Write a layer's blob; return the DiffID, verified, and the digest of what was written."""
    kind, level = compression
    if kind == "none":
        digest = layer.export(fd, progress=progress)
        return digest, digest
    make: Any = GzipWriter if kind == "gzip" else ZstdWriter
    sink = TarSink(fd, hashing=True, layer=layer.id)
    with OnError(sink.abort), make(sink.literal, level) as writer:
        diff_id = layer.export(writer, progress=progress)
        writer.finish()
        return diff_id, sink.finish()


def check_tag(tag: str) -> None:
    """Raise ValueError for an invalid tag of an OCI layout; "" is none."""
    if tag and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@+/-]*", tag):
        raise ValueError(f'malformed tag: "{display(tag)}"')


def copy_to_oci(image: Image, directory: str, tag: str = "", *,
                compression: str = "none", platform: str = "", every: bool = False,
                progress: Progress | None = None,
                tell: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """Add an image to the OCI layout ``directory``; return the descriptor in its index.

    Of a manifest list it adds the instance for ``platform`` or this machine; with ``every`` an
    index of all instances in the storage, also of the list that the image was pulled through.
    ``tell`` gets what is skipped or replaced.  Raises CstorError, ValueError, OSError.
    """
    check_tag(tag)
    how = parse_compression(compression)
    chosen = choose_instances(image, platform, every)
    with OciLayout(directory) as layout:
        blobs = [layout.add_image(instance, how, progress) for instance in chosen]
        blob = blobs[0]
        if every and image.list_bytes():
            blob = descriptor(OCI_INDEX, *layout.add(oci_index(image, blobs)))
            if not is_strict(parse_json(image.list_bytes(), "manifest list")):
                tell("the stored manifest list is malformed: only its instances are copied")
        replaced = layout.tag(blob, tag)
    for entry, instance in image.entries() if every else ():
        if not instance:
            kind = entry.get("artifactType") or platform_name(entry.get("platform"))
            tell(display(f"not in the storage, skipped: {entry.get('digest')} ({kind})"))
    for digest in replaced:
        tell(f"{tag} was the tag of {display(str(digest))}")
    return blob


# -- archives ------------------------------------------------------------------------------------

def write_files(out: int | BinaryIO, files: Iterable[tuple[str, Any]], progress: Progress | None
                ) -> None:
    """Write a tar of files, each name once, without owners and all with one time.

    A content is bytes, or (layer, digest, size) for a layer's tar.  Raises IntegrityError.
    """
    made = source_date_epoch()
    names: set[str] = set()
    for name, content in files:
        if name in names:
            continue
        names.add(name)
        layer, digest, size = content if isinstance(content, tuple) else (None, "", len(content))
        kind, mode = (b"5", 0o755) if name.endswith("/") else (b"0", 0o644)
        write_out(out, tar_header(name.encode(), kind, mode=mode, size=size, mtime_ns=made))
        if not layer:
            write_out(out, content)
        elif (actual := layer.export(out, progress=progress)) != digest:
            raise IntegrityError("its tar has the wrong digest", layer=layer.id, expected=digest,
                                 actual=actual)
        write_out(out, bytes(-size % BLOCK))
    write_out(out, bytes(2 * BLOCK))


def write_docker_archive(out: int | BinaryIO, images: Sequence[tuple[Image, Sequence[str]]],
                         progress: Progress | None = None) -> None:
    """Write what ``podman load`` and ``docker load`` read: images, each with the names to give it.

    Names are ``repository:tag``.  Raises IntegrityError, after which the output is invalid.
    """
    def files() -> Iterator[tuple[str, Any]]:
        rows = []
        for image, names in images:
            layers, config = image_parts(image)
            config_name = sha256_digest(config)[7:] + ".json"
            tars = [digest[7:] + ".tar" for _, digest, _ in layers]
            yield config_name, config
            yield from zip(tars, layers)
            rows.append({"Config": config_name, "RepoTags": list(names) or None, "Layers": tars})
        yield "manifest.json", compact_json(rows)

    write_files(out, files(), progress)


def write_oci_archive(out: int | BinaryIO, images: Sequence[tuple[Image, Sequence[str]]],
                      progress: Progress | None = None) -> None:
    """Write a tar of an OCI layout: images, each with the names to give it in the index."""
    def files() -> Iterator[tuple[str, Any]]:
        entries = []
        yield from (("oci-layout", LAYOUT_FILE), ("blobs/", b""), ("blobs/sha256/", b""))
        for image, names in images:
            layers, config, manifest = plain_manifest(image)
            digest = sha256_digest(manifest)
            yield from ((f"blobs/sha256/{key[7:]}", content) for key, content in (
                (sha256_digest(config), config), (digest, manifest),
                *((layer[1], layer) for layer in layers)))
            blob = manifest_descriptor(digest, len(manifest), image.config())
            # Only one name: readers would load two entries as two images.
            entries += [{**blob, "annotations": {REF_NAME: name}} for name in names[:1]] or [blob]
        yield "index.json", compact_json({"schemaVersion": 2, "manifests": entries})

    write_files(out, files(), progress)


ARCHIVES = {"docker-archive": write_docker_archive, "oci-archive": write_oci_archive}


def tar_out(tree: Tree, path: bytes, name: bytes, progress: Progress | None = None
            ) -> Iterator[bytes]:
    """Yield a tar of ``path`` and all below it, whose names begin with ``name``.

    Sorted, with owners, xattrs, hard links and times in nanoseconds; the same tree gives the same
    bytes.  Only a raw tree shows whiteouts; sockets are skipped, as tar does.
    """
    prefix = name + b"/" if name else b""
    flags = {"reg": b"0", "symlink": b"2", "char": b"3", "block": b"4", "dir": b"5", "fifo": b"6"}
    firsts: dict[Node, bytes] = {}  # of files with several names, the first one
    size = files = 0
    made = source_date_epoch()  # the time of directories without an entry
    for place, node in tree.opener.ahead(select_nodes(tree, top=path), lambda item: item[1].place):
        entry = prefix + place if place else name or b"."
        if node.type == "whiteout":
            yield tar_header(entry, b"0", mode=0)
        if node.type not in flags:
            continue
        first = firsts.setdefault(node, entry) if node in node.tree.linked else entry
        uid, gid, uname, gname = node.owner
        major, minor = node.device
        yield tar_header(
            entry + b"/" * (node.type == "dir"), flags[node.type] if first == entry else b"1",
            mode=node.mode, uid=uid, gid=gid, uname=uname, gname=gname,
            linkname=node.linkname if first == entry else first,
            size=node.size if first == entry else 0, devmajor=major, devminor=minor,
            mtime_ns=made if node.implicit else node.mtime_ns, xattrs=node.xattrs)
        if node.type == "reg" and first == entry:
            yield from tree.content(node)
            yield bytes(-node.size % BLOCK)
            size, files = size + node.size, files + 1
            if progress:
                progress(size, files)
    yield bytes(2 * BLOCK)


def true_type(media_type: str, start: bytes) -> str:
    """Return the media type of a layer with the compression that its first bytes show."""
    if media_type not in [OCI_LAYER + end for end in COMPRESSIONS.values()]:
        return media_type
    return OCI_LAYER + ("+gzip" if start.startswith(b"\x1f\x8b") else "+zstd"
                        if start == b"\x28\xb5\x2f\xfd" else "")


def reference_tag(reference: str) -> str:
    """Return the tag in a reference of skopeo, "" if it has none."""
    transport, _, rest = reference.partition(":")
    rest, at, _ = rest.partition("@")
    _, colon, tag = rest.rpartition("/")[2].rpartition(":")
    return tag if colon else "latest" if transport == "docker" and not at else ""


def measure_files(directory: str) -> tuple[int, int]:
    """Return bytes and number of the files below a directory that another program writes to."""
    sizes = []
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append(os.lstat(os.path.join(folder, name)).st_size)
    return sum(sizes), len(sizes)


# `skopeo copy` converts docker manifests, and leaves blobs unchanged; it calls all layers of a
# docker-archive compressed (1.9.3).  Its output is checked like any other input.
class FetchedImage(Closing):
    """An image of any transport, which skopeo copies to a temporary OCI layout.

    ``reference`` is as for ``skopeo copy``, ``platform`` (os/arch[/variant]) says which instance of
    a manifest list is meant.  A context manager: the layout lies in TMPDIR until close().  If
    skopeo writes nothing for ``timeout`` seconds, it is stopped::

        with FetchedImage("docker-archive:app.tar") as image:
            image.extract("/srv/root")

    Raises Unsupported without skopeo, NotFound or CstorError in skopeo's words if it fails,
    FormatError and IntegrityError for data that differ from the manifest.
    """

    def __init__(self, reference: str, *, platform: str = "", timeout: float = 300,
                 progress: Progress | None = None) -> None:
        self.reference, self._timeout, self._progress = reference, timeout, progress
        self._scratch, self.size = Scratch(tempfile.gettempdir()), 0  # bytes that were fetched
        with OnError(self.close):
            if ":" in (path := self._scratch.path):
                raise CstorError(f"skopeo cannot use a directory with a colon: {path}",
                                 hint="set TMPDIR to another one")
            self._fetch(platform)
            self._layout = self._scratch.directory(b"oci")
            self._load(platform)

    def close(self) -> None:
        self._scratch.close()

    def _fetch(self, platform: str) -> None:
        options = ("--override-os", "--override-arch", "--override-variant")
        command = ["skopeo", *chain(*zip(options, filter(None, platform.split("/")))), "copy",
                   "--quiet", "--dest-oci-accept-uncompressed-layers", "--", self.reference,
                   f"oci:{self._scratch.path}/oci"]
        with open(self._scratch.host_path(b"log"), "w+b") as log:
            try:
                process = spawn(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                stderr=log, env={**os.environ, "TMPDIR": self._scratch.path})
            except OSError as error:
                raise Unsupported(f"skopeo cannot be run: {error.strerror}",
                                  hint="install skopeo") from None
            try:
                self._await(process)
            finally:
                with SignalsHeld():
                    end_process(process)
            if process.returncode:
                said = os.pread(log.fileno(), MAX_SPECIAL, 0).decode("utf-8", "replace")
                self._refuse(process.returncode, said)

    def _await(self, process: Any) -> None:
        """Wait until skopeo ends; raise ProtocolError if it writes nothing for a long time."""
        deadline = Deadline(self._timeout)
        while process.poll() is None:
            size, files = measure_files(self._scratch.path)
            if size != self.size:
                self.size, deadline = size, Deadline(self._timeout)
                if self._progress:
                    self._progress(size, files)
            if not deadline.pause():
                raise ProtocolError("skopeo has written nothing for "
                                    + counted(f"{self._timeout:g}", "second"))

    def _refuse(self, status: int, log: str) -> NoReturn:
        """Raise the error for skopeo's exit status, with the last line of its log."""
        last = log.strip().rpartition("\n")[2]
        quoted = re.search(r'msg="((?:[^"\\]|\\.)*)"', last)
        last = quoted[1].replace(r"\"", '"') if quoted else last
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        words = f"{display(self.reference)}: {display(last[-500:])}" if status == 1 and last \
            else f"skopeo {how}{last and ': ' + display(last[-500:])}"
        if "policy.json" in words:
            raise CstorError(words, hint="skopeo needs one: see containers-policy.json(5)")
        if "Invalid source name" in words:
            raise CstorError(words, hint="expected oci:DIR:TAG, dir:DIR, docker-archive:FILE, "
                                         "docker://NAME or another transport of skopeo")
        missing = re.search("no such file|not found|unknown|no (descriptor|image) found|"
                            "does not resolve", words)
        raise NotFound(words) if missing else CstorError(words)

    def _load(self, platform: str) -> None:
        found = read_index(self._layout, f"{self.reference}: index")["manifests"]
        if len(found) != 1:
            raise FormatError("expected one manifest", file=f"{self.reference}: index")
        self.manifest = self._small(found[0], "index")
        manifest = parse_object(self.manifest, f"{self.reference}: manifest")
        if not isinstance(manifest.get("layers"), list):
            raise FormatError("not an OCI manifest", file=f"{self.reference}: manifest")
        self.layers: list[dict[str, Any]] = manifest["layers"]
        self.config_blob: Any = manifest.get("config")
        for entry in self.layers:
            self._check(entry, "manifest")
        self.config = parse_object(self._small(self.config_blob, "manifest"),
                                   f"{self.reference}: configuration")
        have = platform_name(platform_in(self.config))
        if platform and not (have + "/").startswith(platform + "/") and not self._is_of_list():
            raise NotFound(f"image {self.reference} is for {have}, not {platform}")

    def _is_of_list(self) -> bool:
        """Tell whether skopeo chose the image from a list, which then decides on the platform."""
        # podman 4.3.1 names its own platform in configurations.
        with spawn(["skopeo", "inspect", "--raw", "--", self.reference], stdin=subprocess.DEVNULL,
                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process, \
                OnError(end_process, process):
            data = process.communicate(timeout=self._timeout)[0]
        return not process.returncode and "manifests" in parse_object(
            data, f"{self.reference}: manifest")

    def _check(self, entry: Any, what: str) -> None:
        """Check a descriptor.  Raises FormatError, Unsupported for a digest other than sha256."""
        size, digest = map(as_dict(entry).get, ("size", "digest"))
        if type(size) is not int or not 0 <= size < 1 << 53 or not isinstance(digest, str):
            raise FormatError("malformed descriptor", file=f"{self.reference}: {what}")
        if not re.fullmatch("sha256:" + HEX64, digest):
            raise Unsupported(f"{self.reference}: the digest {display(digest)} is not a sha256")

    def _small(self, entry: Any, what: str) -> bytes:
        self._check(entry, what)
        return read_whole(self._open(entry), MAX_BIG_DATA, f"{self.reference}: {what}")

    def _open(self, entry: dict[str, Any]) -> int:
        try:
            return open_blob(self._layout, entry["digest"], entry["size"])
        except FileNotFoundError:
            raise NotFound(f"{self.reference}: skopeo wrote no blob {entry['digest']}") from None

    def copy_to_oci(self, directory: str, tag: str = "", *, progress: Progress | None = None
                    ) -> dict[str, Any]:
        """Add the image to an OCI layout, blobs unchanged; return the descriptor in its index.

        It has skopeo's manifest, or if types in it are wrong, a new one that notes the old digest.
        """
        check_tag(tag)
        layers: list[dict[str, Any]] = []
        done = 0

        def copy(fd: int) -> None:
            nonlocal done
            for data in iter(lambda: blob.read(CHUNK), b""):
                write_all(fd, data)
                done += len(data)
                if progress:
                    progress(done, len(layers))

        with OciLayout(directory) as layout:
            for entry in [*self.layers, self.config_blob]:
                with open(self._open(entry), "rb", buffering=0) as blob:
                    kind = true_type(str(entry.get("mediaType")), os.pread(blob.fileno(), 4, 0))
                    if not layout.has(entry["digest"], entry["size"]):
                        layout.write(b"blobs/sha256", copy, entry["digest"][7:].encode())
                layers.append({**entry, "mediaType": kind})
            layers.pop()  # the configuration
            data = self.manifest
            if layers != self.layers:
                data = derived({**json.loads(data), "layers": layers}, sha256_digest(data))
            found = manifest_descriptor(*layout.add(data), self.config)
            layout.tag(found, tag)
        return found

    def streams(self) -> Iterator[LayerStream]:
        """Yield the layers' tars, base first, each to be read before the next is asked for.

        Raises IntegrityError if the configuration names another number of layers.
        """
        diff_ids = as_dict(self.config.get("rootfs")).get("diff_ids")
        if not isinstance(diff_ids, list) or not all(
                isinstance(each, str) and re.fullmatch("sha256:" + HEX64, each)
                for each in diff_ids):
            raise FormatError("it names no layers", file=f"{self.reference}: configuration")
        if len(self.layers) != len(diff_ids):
            raise IntegrityError(f"{self.reference}: its layers are not those that its "
                                 "configuration names", expected=counted(len(diff_ids), "layer"),
                                 actual=str(len(self.layers)))
        for entry, diff_id in zip(self.layers, diff_ids):
            with LayerStream(self._tar(entry), label=entry["digest"], digest=diff_id) as stream:
                yield stream

    def _tar(self, entry: dict[str, Any]) -> Iterator[bytes]:
        with Decompressed(f"{self.reference}: {entry['digest']}", self._open(entry)) as reader:
            yield from reader.pieces()

    def extract(self, directory: str, *, paths: Sequence[str] = (), exclude: Sequence[str] = (),
                strip: int = 0, whiteouts: bool = True, force: bool = False,
                clean: bool | None = None, link_mode: str = "auto", owners: bool | None = None,
                owner_map: Sequence[str] = (), verify: bool = False, workers: int = 0,
                progress: Progress | None = None) -> dict[str, Any]:
        """Put the root file system into a directory; see extract_streams()."""
        options: Any = {**locals(), "label": f"image {self.reference}"}
        return extract_streams(options.pop("self").streams(), **options)


# ================================================================================================
# 19. Streams
#
# A layer's tar on its way to another program: headers and padding as bytes, contents as bytes or
# as open files, which the receiver can reflink.  Joined again they are the tar, bit for bit.  Two
# codecs, neither with a header, an end mark or a checksum:
#   splitfdstream     i64 -N and N bytes, or i64 P: the content of open file P, from 0
#   splitdirfdstream  00 u32 N and N bytes of headers and padding; 01 the same with content;
#                     02 u64 SIZE u32 D u32 N and N bytes: the content of that file in directory D
# Numbers are little-endian.  A reader yields chunks: bytes or a PassedFile.  read_stream() finds
# the tar's headers in them, which bound each content; LayerStream checks the whole.  No memory is
# taken for a length that a peer announces before its bytes are there.
# ================================================================================================

FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap): the extents of a file; see shared_extents()
FIEMAP_SYNC = bytes(8) + b"\xff" * 8 + (1).to_bytes(4, sys.byteorder) + bytes(12)
MAX_INLINE = 256 << 20  # one chunk of a stream


def identify(fd: int) -> bytes:
    """Return 64 bytes that are others for another file, or after a change; last its size."""
    status = os.fstat(fd)
    return b"%016x" * 4 % (status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size)


def settle(fd: int) -> bytes:
    """Return identify(), which every later change will alter; b"" if the file system cannot.

    Who has mapped the file can change it without a new ctime until its pages are written to disk.
    """
    with suppress(OSError):
        fcntl.ioctl(fd, FIEMAP, FIEMAP_SYNC)
        return identify(fd)
    return b""


class _ChunkReader:
    """Reads the parts of a stream of chunks; ``file`` names it in errors."""

    def __init__(self, read: Callable[[int], bytes], file: str) -> None:
        self.file, self.offset = file, 0
        self._read = read

    def _error(self, message: str) -> FormatError:
        return FormatError(message, file=self.file, offset=self.offset)

    def _take(self, count: int, *, end: bool = False) -> bytes:
        """Return ``count`` bytes, or b"" where the stream may end."""
        data = self._read(count)
        if len(data) < count and (data or not end):
            raise self._error("the stream is cut off")
        self.offset += count
        return data

    def _inline(self, count: int) -> Iterator[bytes]:
        if count > MAX_INLINE:
            raise self._error(f"a chunk of {count} bytes, more than {MAX_INLINE}")
        return map(self._take, split_count(count)) if count > CHUNK else iter((self._take(count),))


class SplitfdstreamReader(_ChunkReader):
    """The chunks of a splitfdstream: iterating yields bytes and PassedFile.

    ``read(n)`` returns n bytes, or fewer at the end only; ``externals(p)`` the descriptor of
    external file p, which the caller keeps (IndexError, KeyError: unknown).  Raises FormatError.
    """

    def __init__(self, read: Callable[[int], bytes], externals: Callable[[int], int],
                 file: str = "splitfdstream") -> None:
        super().__init__(read, file)
        self._externals = externals

    def __iter__(self) -> Iterator[bytes | PassedFile]:
        while prefix := self._take(8, end=True):
            if (number := int.from_bytes(prefix, "little", signed=True)) < 0:
                yield from self._inline(-number)
                continue
            try:
                fd = self._externals(number)
            except (IndexError, KeyError):
                raise self._error(f"there is no external file {number}") from None
            yield PassedFile(fd)


class SplitdirfdstreamReader(_ChunkReader):
    """The chunks of a splitdirfdstream: iterating yields bytes and PassedFile.

    ``directories`` are descriptors, which the caller keeps; files are opened beneath them, and no
    link leads out.  Files of up to ``threshold`` bytes become bytes.  Raises FormatError, OSError.
    """

    def __init__(self, read: Callable[[int], bytes], directories: Sequence[int],
                 file: str = "splitdirfdstream", *, threshold: int = 0) -> None:
        super().__init__(read, file)
        self._fds, self._threshold = directories, threshold
        self._numbers = struct.Struct("<QII").unpack
        self.opened: dict[int, Directory] = {}  # each closes itself with the last that refers to it
        self.index = 0  # of the directory that the last file is in
        self.explain: Callable[[], object] = lambda: None  # raises what a peer says of damage

    def __iter__(self) -> Iterator[bytes | PassedFile]:
        try:
            while kind := self._take(1, end=True):
                if kind in b"\0\1":
                    yield from self._inline(int.from_bytes(self._take(4), "little"))
                    continue
                if kind != b"\2":
                    raise self._error(f"a chunk of unknown type {kind[0]}")
                length, fd, origin = self._open()
                with Opened(fd):
                    if length <= self._threshold and check_passed(fd) == length:
                        yield from read_checked(fd, length)
                    else:
                        yield PassedFile(fd, length, origin)
        except Exception as error:  # whose traceback refers to them
            for directory in self.opened.values():
                directory.close()
            if isinstance(error, FormatError):
                self.explain()
            raise

    def _open(self) -> tuple[int, int, tuple[Directory, bytes, bytes]]:
        """Return length, descriptor and origin of the file that is named next."""
        length, self.index, count = self._numbers(self._take(16))
        if not 0 < count <= MAX_FILE_NAME:
            raise self._error(f"a file name of {count} bytes")
        name = self._take(count)
        if b"\0" in name or name.startswith(b"/") or b".." in name.split(b"/"):
            raise self._error(f'not a file name: "{display(name)}"')
        directory = self.directory(self.index)
        if (fd := directory.open_near(name)) < 0:
            raise self._error(f'"{display(name)}" is a {file_type(-fd)}, not a regular file')
        return length, fd, (directory, name, b"")

    def directory(self, index: int) -> Directory:
        """Open a directory by its number.  Raises FormatError, ProtocolError."""
        if index in self.opened:
            return self.opened[index]
        if index >= len(self._fds):
            raise self._error(f"there is no directory {index}")
        mode = os.fstat(self._fds[index]).st_mode
        if not stat.S_ISDIR(mode):  # composefs puts /dev/null and the like where it names nothing
            raise ProtocolError(f"{self.file}: descriptor {index} is a {file_type(mode)}, not "
                                "a directory", code=FD_ERROR)
        self.opened[index] = Directory(f"{self.file}: directory {index}", os.dup(self._fds[index]))
        return self.opened[index]


class _ChunkWriter:
    """Writes pieces as chunks; ``write`` takes all bytes, and no reader takes ``broken``."""

    def __init__(self, write: Callable[[Any], object], broken: bytes) -> None:
        self._write, self._broken = write, broken
        self._room = 0  # bytes that are missing of the last chunk

    def _inline(self, head: Callable[[int], bytes], piece: bytes | Extent) -> None:
        """Write a piece as chunks, each behind ``head(length)``, nothing for an empty one."""
        left = piece.length if isinstance(piece, Extent) else len(piece)
        if isinstance(piece, bytes) and 0 < left <= min(CHUNK, MAX_INLINE):
            self._write(head(left) + piece)
            return
        for data in whole_chunks(piece):
            view = memoryview(data)
            while view:
                if not self._room:
                    self._room = min(left, MAX_INLINE)
                    self._write(head(self._room))
                part, view = view[:self._room], view[self._room:]
                self._write(part)
                left -= len(part)
                self._room -= len(part)

    def break_off(self) -> None:
        """After an error, damage the stream: without an end mark it would look whole."""
        if not self._room:
            self._write(self._broken)


class SplitfdstreamWriter(_ChunkWriter):
    """Writes a splitfdstream from the pieces of Layer.pieces().

    A whole file of more than ``threshold`` bytes is offered to ``external(extent)``, which takes it
    as number ``files`` and returns True; else it is written inline.
    """

    def __init__(self, write: Callable[[Any], object],
                 external: Callable[[Extent], bool] | None = None, *,
                 threshold: int = INLINE_THRESHOLD) -> None:
        super().__init__(write, b"\xff" * 8)  # a chunk without its one byte
        self.files = 0  # external ones so far
        self._external, self._threshold = external, threshold

    def add(self, piece: bytes | Extent) -> None:
        """Write one piece.  Raises IntegrityError when its file is shorter than it was."""
        if isinstance(piece, Extent) and piece.length > self._threshold and self._external \
                and piece.is_whole_file and self._external(piece):
            self._write(self.files.to_bytes(8, "little"))
            self.files += 1
        else:
            self._inline(lambda count: (-count).to_bytes(8, "little", signed=True), piece)


class SplitdirfdstreamWriter(_ChunkWriter):
    """Writes a splitdirfdstream from the pieces of Layer.pieces().

    A whole file is offered to ``external(extent)``, which returns (number of a directory, relative
    name in it), or None to write it inline.  Composefs refuses names that are not UTF-8: inline.
    """

    def __init__(self, write: Callable[[Any], object],
                 external: Callable[[Extent], tuple[int, bytes] | None] | None = None
                 ) -> None:
        super().__init__(write, b"\xff")  # a chunk of unknown type
        self._external = external

    def add(self, piece: bytes | Extent) -> None:
        """Write one piece.  Raises IntegrityError when its file is shorter than it was."""
        kind = b"\1" if isinstance(piece, Extent) else b"\0"
        if isinstance(piece, Extent) and piece.length and self._external and piece.is_whole_file \
                and self.refer(piece.length, self._external(piece)):
            return
        self._inline(lambda count: kind + count.to_bytes(4, "little"), piece)

    def refer(self, length: int, place: tuple[int, bytes] | None) -> bool:
        """Write that a whole file lies at ``place``; return False where that cannot be said."""
        index, name = place or (0, b"")
        if name and is_utf8(name):
            self._write(b"\2" + length.to_bytes(8, "little") + index.to_bytes(4, "little")
                        + len(name).to_bytes(4, "little") + name)
            return True
        return False


class LayerStream(Closing):
    """A layer whose tar comes as chunks, from a peer or a file; it can be read once.

    ``label`` is the layer's ID, or names the stream in errors.  ``digest`` is the sha256 of the
    tar, "" when it is not known, ``size`` its length or -1; ``pairs`` as for read_stream().
    A context manager: ``close`` is called at its end.
    """

    def __init__(self, chunks: Iterable[bytes | PassedFile], *, label: str, digest: str = "",
                 size: int = -1, pairs: bool = False,
                 close: Callable[[], object] | None = None) -> None:
        self.label, self.digest, self.size = label, digest, size
        self.taken, self.hashed = 0, ""  # bytes of the tar so far; see hash_apart()
        self._chunks, self._pairs = iter(chunks), pairs
        self._reader = chunks if isinstance(chunks, SplitdirfdstreamReader) else None
        self._end = ExitStack()
        self.also_close = self._end.callback  # calls a function when the stream is closed
        if close:
            self.also_close(close)

    def expect(self, reference: str) -> LayerStream:
        """Ask for the tar of a digest, if ``reference`` is one; return the stream itself.

        Raises IntegrityError, also where it is that of a compressed blob, which cannot be compared.
        """
        if re.fullmatch("sha256:" + HEX64, reference):
            if self.digest not in ("", reference):
                self.close()
                raise IntegrityError("the server sends another layer than the one that was asked "
                                     "for", expected=reference, actual=self.digest)
            self.digest = reference
        return self

    def close(self) -> None:
        if hasattr(self._chunks, "close"):  # a generator, which may hold the last file
            self._chunks.close()
        self._reader = None  # with it go the directories that nobody else uses
        self._end.close()

    def hash_apart(self) -> bool:
        """Let another process read and hash the chunks and the files that they name, if they can.

        It ends with the stream.  ``hashed`` is the digest, once all items were read.
        """
        if self._reader:
            self._chunks = self._from_process(self._chunks, self._reader)
        return self._reader is not None

    def _from_process(self, chunks: Iterator[bytes | PassedFile], reader: SplitdirfdstreamReader
                      ) -> Generator[bytes | PassedFile, None, None]:
        with closing(work_ahead(lambda: self._hash(chunks, reader))) as parts:
            for data, index, size in parts:
                if index >= 0:
                    yield PassedFile(-1, size, (reader.directory(index), data[64:], data[:64]))
                elif size:
                    yield data
                else:
                    self.hashed = data.decode()

    def _hash(self, chunks: Iterator[bytes | PassedFile], reader: SplitdirfdstreamReader
              ) -> Iterator[tuple[bytes, int, int]]:
        """Hash all; yield what settle() returned before a file was read, with its name, or bytes.

        With them come the number of the file's directory or -1, and its size; a 0 is the digest's.
        """
        digest = new_sha256()  # no thread: three processes are at work already
        for chunk in chunks:
            if isinstance(chunk, bytes):
                digest.update(chunk)
                yield chunk, -1, 1
                continue
            size, origin, found = chunk.length, chunk.origin, settle(chunk.fd)
            assert origin
            if not found or int(found[48:], 16) != size:
                chunk.measure(self.label)
            for data in read_checked(chunk.fd, size, name=origin[1]):
                digest.update(data)
                if not found:
                    yield data, -1, 1
            if found:
                yield found + origin[1], reader.index, size
        yield f"sha256:{digest.hexdigest()}".encode(), -1, 0

    def items(self, verify: bool = True) -> Generator[Item, None, None]:
        """Yield what read_stream() does; call check() afterwards, with a digest if ``verify``.

        A content that would make the tar longer than ``size`` is refused before it is read.
        """
        for item in read_stream(self._chunks, self.label, pairs=self._pairs,
                                need_end=self.size < 0 and not (verify and self.digest)):
            self.taken += len(item[0]) + (item[1].stored if item[1] else 0)
            if self.taken > self.size >= 0:
                self.check("")
            yield item

    def pieces(self, verify: bool = True) -> Generator[bytes | Extent, None, None]:
        """Yield the tar as bytes and Extents; an Extent is good until the next piece."""
        return join_pieces(self.items(verify))

    def check(self, digest: str) -> None:
        """Raise IntegrityError unless the tar was as it is known; a digest of "" was not taken."""
        for what, expected, actual in (
                ("size", str(self.size) if self.size >= 0 else "", str(self.taken)),
                ("digest", self.digest if digest else "", digest)):
            if expected and expected != actual:
                raise IntegrityError(f"its tar has the wrong {what}", layer=self.label,
                                     expected=expected, actual=actual)

    def export(self, out: int | BinaryIO, *, verify: bool = True,
               progress: Progress | None = None) -> str:
        """Write the tar to a descriptor or binary file; return its digest, "" without ``verify``.

        Raises IntegrityError (what was written is then no good), and as read_stream() does.
        """
        sink = TarSink(out, hashing=verify, layer=self.label, progress=progress)
        digest = sink.take_all(self.pieces(verify))
        self.check(digest)
        return digest

    def chunks(self) -> Iterator[bytes]:
        """Yield the tar in chunks; a wrong digest or size raises IntegrityError at the end."""
        digest = new_sha256()
        for piece in self.pieces():
            for data in whole_chunks(piece):
                digest.update(data)
                yield data
        self.check(f"sha256:{digest.hexdigest()}")

    def open(self) -> BinaryIO:
        """Return the tar as a file, which cannot seek: for ``tarfile.open(fileobj=, mode="r|")``.

        Reading on to the end raises what chunks() raises.  Closing it closes the stream.
        """
        return io.BufferedReader(ChunkFile(self.chunks(), self.close), CHUNK)

    def extract(self, directory: str, *, paths: Sequence[str] = (), exclude: Sequence[str] = (),
                strip: int = 0, whiteouts: bool = True, force: bool = False,
                clean: bool | None = None, link_mode: str = "auto", owners: bool | None = None,
                owner_map: Sequence[str] = (), verify: bool = False, workers: int = 0,
                check: bool = True, progress: Progress | None = None) -> dict[str, Any]:
        """Put the files of this layer alone into a directory; see extract_streams()."""
        options: Any = {**locals(), "label": self.label, "raw": True}
        return extract_streams([options.pop("self")], **options)


class StreamTree(LayerTree):
    """The tree of a layer that came as a stream; contents are in a Staging, or in directories."""

    kept = False  # whether contents stay in the Staging, since other names may need them

    def __init__(self, label: str) -> None:
        self.rootless = os.geteuid() != 0  # as in a store of ours
        super().__init__(None)
        self.label = label
        self.contents: dict[Node, tuple[int, bytes, str]] = {}  # as staged() returns them
        self._places: dict[Node, tuple[Directory, bytes]] = {}  # what settle() returned, and name

    def close(self) -> None:
        for directory in {directory for directory, _ in self._places.values()}:
            directory.close()

    def finish(self) -> None:
        """Apply links and overlayfs's xattrs, once all members are entered."""
        self._heed()
        if self._moved and self.below:
            for layer in self.below.layers:
                if isinstance(layer, StreamTree):
                    layer.kept = True

    def locate(self, node: Node, piece: bytes | Extent) -> bool:
        """Note where a node's content can be opened once all is verified, if it is a named file."""
        if not isinstance(piece, Extent) or not piece.origin:
            return False
        directory, name, found = piece.origin
        if found := found or settle(piece.fd):
            self._places[node] = directory, found + name
        return bool(found)

    def staged(self, node: Node) -> tuple[int, bytes, str] | None:
        return None if self.kept or "data" in node.extra else self.contents.get(node)

    def _open(self, node: Node) -> int:
        if staged := self.contents.get(node):
            return os.open(staged[1], OPEN_FILE, dir_fd=staged[0])
        directory, place = self._places[node]
        if (fd := directory.open_near(place[64:])) < 0:
            raise IntegrityError("another file has replaced it", name=node.path)
        return fd

    def recheck(self, node: Node, fd: int) -> None:
        if node in self._places and identify(fd) != self._places[node][1][:64]:
            raise IntegrityError("changed after it was verified", name=node.path)


class Staging:
    """The private directory of ``output``, where contents wait until all were read.

    Those stay where they are that can be opened again by name.  ``link_mode`` is "auto", "copy" or
    "reflink", which is asked of what comes as an open file.  Without ``check`` no digest is taken.
    ``crc`` keeps the CRC-64 of contents.  With several ``workers`` one of them can take the digest.
    """

    def __init__(self, output: OutputDirectory, *, link_mode: str = "auto", check: bool = True,
                 crc: bool = False, workers: int = 1, progress: Progress | None = None) -> None:
        self._target, self._own = output.staging, output._own
        self._copier = ContentCopier(link_mode)
        self._check, self._crc, self._progress = check, crc, progress
        # Of what another process has read there is nothing to copy here.
        self._apart = check and not crc and workers > 1 and link_mode != "reflink"
        self._count = 0

    def read(self, stream: LayerStream, below: Tree | None = None) -> StreamTree:
        """Read a stream to its end, and return its tree when digest and size are right.

        ``below`` are the layers that it lies on.  Raises as LayerStream.export() does, and
        Unsupported for what cannot be shared though link_mode is "reflink".
        """
        tree = self._own(StreamTree(stream.label))
        tree.below = below
        self._own(stream)
        sink = None if not self._check or self._apart and stream.hash_apart() \
            else TarSink(None, hashing=True, layer=stream.label)
        with OnError(sink.abort) if sink else nullcontext():
            for literal, member, content in stream.items(self._check):
                if sink:
                    sink.literal(literal)
                    content = _hashed(content, sink)
                if member is None:
                    continue
                node = tree.add(member)
                if node and member.type == "reg" and node.size:
                    self._store(tree, node, member, content)
                for _ in content:  # of a whiteout with content, say
                    pass
                if self._progress:
                    self._progress(stream.taken, self._count)
            digest = sink.finish() if sink else stream.hashed
        stream.check(digest)
        tree.finish()
        return tree

    def _store(self, tree: StreamTree, node: Node, member: Member,
               content: Iterable[bytes | Extent]) -> None:
        name, why = b"%d" % self._count, ""
        crc = 0 if self._crc else None
        self._count += 1
        pieces = tree.expand(member, content)
        first = next(pieces, b"")
        if tree.locate(node, first):
            for data in whole_chunks(first) if crc is not None else ():
                node._checksum = crc = crc64(data, crc or 0)
            return
        # With the file's own mode, so that none is left to set: nobody else enters the directory.
        with Opened(os.open(name, OPEN_NEW_FILE, node.mode & 0o777 | 0o600,
                            dir_fd=self._target.fd)) as fd:
            for piece in chain((first,), pieces):
                if isinstance(piece, Extent):
                    why = self._copier.fill(piece.fd, piece.length, fd, lambda: member.name)
                    if why:  # of a copy ours is what counts
                        piece.fd = fd
                elif member.sparse is not None and piece.count(0) == len(piece):
                    os.lseek(fd, len(piece), os.SEEK_CUR)
                else:
                    why = "it came inline"
                    write_all(fd, piece)
                if crc is not None:
                    for data in whole_chunks(piece):
                        crc = crc64(data, crc)
            if member.sparse is not None:
                os.ftruncate(fd, node.size)
        tree.contents[node], node._checksum = (self._target.fd, name, why), crc


def _hashed(content: Iterable[bytes | Extent], sink: TarSink) -> Iterator[bytes | Extent]:
    """Yield pieces, each of which is hashed when the next is asked for.

    Of a copy that is the copy.  Raises IntegrityError when a file that was shared has changed: the
    pages of it are written before, so that no change goes without a new ctime.
    """
    for piece in content:
        if isinstance(piece, Extent):
            fd, before = piece.fd, identify(piece.fd)
            yield piece
            sink.extent(piece)
            if piece.fd == fd and identify(fd) != before:
                raise IntegrityError("changed while it was read", name=piece.member.name)
        else:
            yield piece
            sink.literal(piece)


def extract_streams(streams: Iterable[LayerStream], directory: str, *, label: str = "stream",
                    raw: bool = False, paths: Sequence[str] = (), exclude: Sequence[str] = (),
                    strip: int = 0, whiteouts: bool = True, force: bool = False,
                    clean: bool | None = None, check: bool = True, link_mode: str = "auto",
                    owners: bool | None = None, owner_map: Sequence[str] = (),
                    verify: bool = False, workers: int = 0, progress: Progress | None = None
                    ) -> dict[str, Any]:
    """Put what streams hold into ``directory``, as extract_tree() does with a tree.

    ``streams`` come base first; they are read one after another, closed at the end, and merged, or
    with ``raw`` whiteouts are files.  Nothing is put in its place before all digests and sizes were
    found right; without ``check`` no digest is taken, and with ``verify`` what was made is compared
    with what came by CRC-64.  ``link_mode`` is one of LINK_MODES; there is nothing to make hard
    links of, so "hardlink" is "auto".  A new directory has a temporary name until all is done,
    unless ``clean`` is False.  Return the summary.  Raises as Staging.read() and extract_tree() do.
    """
    link_mode = "auto" if link_mode == "hardlink" else link_mode
    whole = clean is not False and not os.path.lexists(directory)
    output = OutputDirectory(directory, force=force, clean=clean, whole=whole)
    removed = [f"removed what a killed run left beside it: {os.fsdecode(name)}"
               for name in output.removed]
    with output:
        staging = Staging(output, link_mode=link_mode, check=check, crc=verify,
                          workers=workers or default_workers(), progress=progress)
        trees: list[LayerTree] = []
        for stream in streams:
            trees.append(staging.read(stream, None if raw else Tree(trees[::-1])))
        tree = Tree(trees[::-1], label, raw=raw)
        items = chosen_nodes(tree, paths, exclude, strip, whiteouts)
        extraction = Extraction(output, link_mode=link_mode, owners=owners, owner_map=owner_map,
                                verify=verify, workers=workers)
        return {**extraction.run(items), "notes": removed + tree.notes()}


# -- streams in files ----------------------------------------------------------------------------

CODECS = ("splitfdstream", "splitdirfdstream")


def tell_codec(head: bytes, file: str) -> str:
    """Return the codec of a stream by its first 8 bytes: the headers of a tar are inline."""
    if not head or len(head) == 8 and head[4:] == b"\xff" * 4:  # a length, negative
        return CODECS[0]
    if head[0] <= 1 and len(head) >= 5 and int.from_bytes(head[1:5], "little") <= MAX_INLINE:
        return CODECS[1]
    raise FormatError(f"not a stream of a layer, neither {CODECS[0]} nor {CODECS[1]}", file=file)


def write_stream(layer: Layer, out: BinaryIO, listing: BinaryIO | None = None, *,
                 codec: str = CODECS[0], threshold: int = INLINE_THRESHOLD,
                 progress: Progress | None = None) -> str:
    """Write a layer as a stream to ``out``; return the tar's digest, checked as by Layer.export().

    Without ``listing`` all contents are inline.  With it files of more than ``threshold`` bytes
    stay where they are, and JSON lines are written there for ExternalFiles: a head, and for a
    splitfdstream each file by number; a splitdirfdstream needs but the storage's directories.
    """
    check_words("codec", [codec], CODECS)
    roots = [os.readlink(b"/proc/self/fd/%d" % root.fd) for root in layer.storage.roots
             if listing and has_proc("paths of open files are found")]

    def take(piece: Extent) -> bool:
        if (path := place_of(piece.fd)) and listing:
            listing.write(compact_json({"index": writer.files, "path": spell(path),
                                        "size": piece.length}) + b"\n")
        return bool(path)

    def name(piece: Extent) -> tuple[int, bytes] | None:
        path = place_of(piece.fd) if piece.length > threshold else b""
        return next(((index, path[len(root) + 1:]) for index, root in enumerate(roots)
                     if path.startswith(root + b"/")), None)

    if listing:
        head = {"version": 1, "codec": codec, "layer": layer.id, "digest": layer.diff_digest,
                "size": layer.diff_size}
        if codec != CODECS[0]:
            head["directories"] = [spell(root) for root in roots]
        listing.write(compact_json(head) + b"\n")
    writer: Any = SplitdirfdstreamWriter(out.write, name if listing else None) \
        if codec != CODECS[0] else \
        SplitfdstreamWriter(out.write, take if listing else None, threshold=threshold)
    with OnError(writer.break_off):
        return layer.export(None, progress=progress, also=writer.add)


def place_of(fd: int) -> bytes:
    """Return the absolute path of an open file, b"" when it was removed."""
    with suppress(OSError):
        path = os.readlink(b"/proc/self/fd/%d" % fd)
        if os.path.samestat(os.lstat(path), os.fstat(fd)):
            return path
    return b""


class ExternalFiles(Closing):
    """What a list of write_stream() names, opened when a stream asks for it; "" is an empty list.

    ``codec``, ``digest`` and ``size`` are as the list says, "" and -1 when it does not;
    ``directories`` are open.  A context manager.  Raises FormatError with the line, OSError.
    """

    def __init__(self, path: str) -> None:
        self.codec = self.digest = ""
        self.size, self.path = -1, path
        self.directories: list[int] = []
        self._files: list[tuple[bytes, int]] = []
        self._end = ExitStack()
        self._file = self._end.enter_context(ExitStack())  # what closes the last one
        if path:
            with OnError(self.close), open(open_input(path), "rb") as file:
                self._read(iter(lambda: file.readline(MAX_OBJECT), b""))

    def close(self) -> None:
        self._end.close()

    def _read(self, lines: Iterator[bytes]) -> None:
        for number, line in enumerate(lines, 1):
            row = parse_json(line, f"{self.path}:{number}")
            try:
                if number == 1:
                    if row["version"] != 1 or row["codec"] not in CODECS:
                        raise ValueError
                    self.codec, self.digest = row["codec"], str(row["digest"])
                    self.size = int(row["size"])
                    for path in row.get("directories", ()):
                        folder = Opened(os.open(self._absolute(path), OPEN_DIRECTORY))
                        self.directories.append(self._end.enter_context(folder))
                elif row["index"] != len(self._files):
                    raise ValueError
                else:
                    self._files.append((self._absolute(row["path"]), int(row["size"])))
            except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
                raise FormatError("not a line of a list of external files", file=self.path,
                                  line=number) from None
        if not self.codec:
            raise FormatError("an empty list of external files", file=self.path)

    @staticmethod
    def _absolute(text: str) -> bytes:
        path = unspell(text)
        if not path.startswith(b"/") or b"\0" in path:
            raise ValueError
        return path

    def open(self, number: int) -> int:
        """Open a file by its number; the one before is closed.  IndexError when there is none."""
        path, size = self._files[number]
        self._file.close()
        folder, base = os.path.split(path)
        with Directory.at(os.fsdecode(folder)) as directory:
            fd = self._file.enter_context(Opened(directory.open(base)))
        if (found := os.fstat(fd).st_size) != size:
            raise IntegrityError(f"{display(path)}: it has another size than the list says",
                                 expected=str(size), actual=str(found))
        return fd


# ================================================================================================
# 20. Transport
#
# JSON objects over a Unix stream socket, with file descriptors (SCM_RIGHTS), in two framings:
#   JSON-RPC 2.0  objects back to back, with or without white space between them.  A message with
#                 descriptors has their number in "fds" (jsonrpc-fdpass), or, as before 2026, an
#                 object {"__jsonrpc_fd__":true,"index":i} for each in its params.  They queue up
#                 in the order of sending: 253 at a time, the next with the remaining bytes, or
#                 with a space each.  A reader waits for late ones and keeps early ones: a sender
#                 may join messages, and the kernel cuts them anywhere.  None may be left when
#                 nothing more is due
#   varlink       each object ends with a NUL byte; descriptors come with their message's first
#                 byte.  The kernel ends a read after the bytes that descriptors came with: once
#                 all those bytes are taken, so is the message of the descriptors
# Caller asks and Dispatcher answers, in both.  What a peer can make this process hold is bounded:
# message size, nesting, descriptors, waiting time.
# ================================================================================================

MAX_MESSAGE = 64 << 20  # one JSON message between processes
MAX_DEPTH = 64  # of objects and arrays in a message
FDS_PER_SEND = 253  # SCM_MAX_FD of the kernel
MAX_QUEUED_FDS = 4096  # file descriptors that a peer sent and nobody took yet
RECEIVE_SIZE = 256 << 10  # unit of receiving from a socket
PEER_TIMEOUT = 30.0  # seconds without a byte, after which a peer is given up
SHUT_RD, SHUT_WR, SHUT_RDWR = 0, 1, 2  # shutdown(2)


class Message(Closing):
    """One message of a peer: the object ``value``, and ``fds``; close() closes those not taken."""

    def __init__(self, value: dict[str, Any], fds: list[int]) -> None:
        self.value, self.fds = value, fds

    def take(self) -> list[int]:
        """Return the descriptors, which are the caller's from now on."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        for fd in self.take():
            os.close(fd)


class Connection(Closing):
    """One end of a Unix stream socket that carries messages; owns it and what it received.

    ``timeout`` is how many seconds a peer may do nothing where something is due, ``max_fds`` how
    many descriptors may wait, ``max_message`` the bytes of one message.  ``varlink`` changes the
    framing; with ``either`` the first message decides it.  Every mistake of a peer: ProtocolError.
    """

    def __init__(self, sock: socket.socket, *, timeout: float | None = PEER_TIMEOUT,
                 max_fds: int = MAX_QUEUED_FDS, max_message: int = MAX_MESSAGE,
                 either: bool = False) -> None:
        self.socket, self.timeout = sock, timeout
        self.max_fds, self.max_message = max_fds, max_message
        self.varlink, self.either = False, either
        self._buffer = bytearray()
        self._received = 0  # bytes in all
        self._fds: list[tuple[int, int]] = []  # and how many bytes were received with them
        self.idle_since = float("inf")  # when it began to wait for a message
        self._deadline = Deadline(timeout)  # of what is due: some bytes go, or a message is whole
        # So far the buffer was looked at; brackets that are open there; tokens of the message.
        self._at = self._depth = self._tokens = 0
        self._inside = False  # of a string
        sock.settimeout(None)  # no call blocks: MSG_DONTWAIT

    def close(self) -> None:
        self.socket.close()
        while self._fds:
            os.close(self._fds.pop()[1])

    def send(self, value: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one message with descriptors, which the caller keeps."""
        if fds and not self.varlink:
            value = {**value, "fds": len(fds)}
        self.send_bytes(compact_json(value) + b"\0" * self.varlink, fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes, and descriptors with the first of them and with spaces after them."""
        view, rest = memoryview(data), list(fds)
        while view or rest:
            batch = rest[:FDS_PER_SEND]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(batch)}i", *batch))
                      ] if batch else []
            self._deadline = Deadline(self.timeout)
            sent = self._when_ready("POLLOUT", self.socket.sendmsg, [view or b" "], rights,
                                    socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            view, rest = view[sent:], rest[len(batch):]

    def _when_ready(self, event: str, call: Callable[..., T], *args: Any) -> T:
        """Make a call on the socket, again when it can do something."""
        while True:
            try:
                return call(*args)
            except BlockingIOError:
                self._deadline.wait(self.socket, event)
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.ECONNRESET):
                    raise ProtocolError("the other end has closed the connection") from None
                if error.errno != errno.ETOOMANYREFS:
                    raise ProtocolError(f"the connection failed: {error.strerror}") from None
                if not self._deadline.pause():  # too many descriptors are in flight
                    raise self._deadline.error() from None

    def receive(self, idle: float | None = None) -> Message | None:
        """Return the next message, None when the other end has closed between messages.

        It must begin within ``idle`` seconds, and be complete within ``timeout``.  After an error
        nothing more can be received on this connection.
        """
        self.idle_since = time.monotonic()
        end, fresh = self._boundary(), not self._buffer
        self._deadline = Deadline(self.timeout if idle is None or not fresh else idle)
        while end < 0:
            if len(self._buffer) > self.max_message:
                raise ProtocolError(f"a message of more than {self.max_message} bytes",
                                    code=INVALID_REQUEST)
            if not self._receive_bytes():
                if self._buffer or self._fds:
                    raise ProtocolError("the connection ended inside a message", code=PARSE_ERROR)
                return None
            if fresh:
                fresh, self._deadline = False, Deadline(self.timeout)
            end = self._boundary()
        value = parse_message(bytes(self._buffer[:end]))
        self._drop(end)
        if self.either:  # varlink has neither "jsonrpc" nor "id"
            self.either, self.varlink = False, not {"jsonrpc", "id"} & value.keys()
        if self.varlink:
            if not self._buffer and not self._receive_bytes() or self._buffer[0]:
                raise ProtocolError("no NUL byte after a varlink message", code=PARSE_ERROR)
            self._drop(1)
        taken = self._received - len(self._buffer)
        count = sum(at <= taken for at, _ in self._fds) if self.varlink else count_fds(value)
        if count > self.max_fds:
            raise ProtocolError(f"{counted(count, 'file descriptor')} with one message",
                                code=FD_ERROR)
        while len(self._fds) < count:
            self._skip_blanks()
            if self._buffer or not self._receive_bytes():
                raise ProtocolError(f"mismatched count: expected {counted(count, 'descriptor')}"
                                    f", got {len(self._fds)}", code=FD_ERROR)
        message = Message(value, [fd for _, fd in self._fds[:count]])
        del self._fds[:count]
        self.idle_since = float("inf")
        return message

    def _receive_bytes(self) -> bool:
        """Receive some bytes, and descriptors with them; False at the end."""
        if not self._deadline.left():
            raise self._deadline.error("sent no whole message")
        data, rights, flags, _ = self._when_ready(
            "POLLIN", self.socket.recvmsg, RECEIVE_SIZE, socket.CMSG_SPACE(4 * FDS_PER_SEND),
            socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
        self._received += len(data)
        self._buffer += data
        for level, kind, content in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += [(self._received, fd) for fd in memoryview(content).cast("i")]
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("file descriptors were lost on the way", code=FD_ERROR,
                                hint="the limit of open files (ulimit -n) may be too low")
        if len(self._fds) > self.max_fds:
            raise ProtocolError(f"more than {counted(self.max_fds, 'file descriptor')} are waiting",
                                code=FD_ERROR)
        return bool(data)

    def _boundary(self) -> int:
        """Return the end of the first message, -1 if it is incomplete; no byte is read twice."""
        buffer = self._buffer
        if self.varlink and not self.either:
            end = buffer.find(0, self._at)
            self._at = len(buffer)
            return end
        if not self._depth:
            self._skip_blanks()
        outside = re.compile(rb'["{}\[\]]').search
        inside = re.compile(rb'"|\\.', re.DOTALL).search
        while match := (inside if self._inside else outside)(buffer, self._at):
            self._at = match.end()
            self._tokens += 1
            if match[0] == b'"':
                self._inside = not self._inside
            elif not self._inside:
                self._depth += 1 if match[0] in b"{[" else -1
            if not 0 <= self._depth <= MAX_DEPTH:
                raise ProtocolError("malformed JSON, or nested too deep", code=PARSE_ERROR)
            if self._tokens > self.max_message // 16:  # parsed, it is 30 times as large
                raise ProtocolError("a message of too many parts", code=INVALID_REQUEST)
            if not self._depth and not self._inside:
                self._tokens = 0
                return self._at
        self._at = max(self._at, len(buffer) - 1)  # its last byte may be half an escape
        return -1

    def _skip_blanks(self) -> None:
        """Skip white space.  Raises ProtocolError unless an object begins after it."""
        blank = re.compile(rb"[ \t\r\n]*").match(self._buffer)
        self._drop(blank.end() if blank else 0)
        if self._buffer and self._buffer[0] != 0x7b:
            array = self._buffer[0] == 0x5b
            raise ProtocolError("an array of messages" if array else "malformed JSON: no object",
                                code=INVALID_REQUEST if array else PARSE_ERROR)

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._at = 0

    def settle(self) -> None:
        """Raise ProtocolError when descriptors are left although nothing more is due."""
        if self._fds:
            raise ProtocolError("mismatched count: more file descriptors came than a message says",
                                code=FD_ERROR)


def parse_message(data: bytes) -> dict[str, Any]:
    """Parse the JSON object of a message; refuse what parsers disagree on: double names, NaN."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("an object has the same name twice")
        return dict(pairs)

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text[:20]} is not a number")

    def integer(text: str) -> int:
        return int(text) if len(text) < 25 else refuse(text)  # it costs the square of its length

    def real(text: str) -> float:
        return float(text) if abs(float(text)) < float("inf") else refuse(text)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse,
                           parse_int=integer, parse_float=real)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed JSON: {error}", code=PARSE_ERROR) from None
    if not isinstance(value, dict):
        raise ProtocolError("the message is not an object", code=INVALID_REQUEST)
    return value


def count_fds(value: dict[str, Any]) -> int:
    """Return how many descriptors a JSON-RPC message announces, by number or placeholders."""
    indices: list[Any] = []
    todo: list[Any] = [value.get("params")]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            if item.get("__jsonrpc_fd__") is True:
                indices.append(item.get("index"))
            todo += item.values()
        elif isinstance(item, list):
            todo += item
    count = value.get("fds", len(indices))
    if type(count) is not int or count < 0:
        raise ProtocolError('"fds" is not a number of file descriptors: '
                            + display(repr(count)[:40]), code=FD_ERROR)
    if indices and (count != len(indices) or {*map(repr, indices)} != {*map(repr, range(count))}):
        raise ProtocolError("the placeholders of file descriptors are not numbered from 0 to "
                            f"{count - 1}", code=FD_ERROR)
    return count


class Caller(Closing):
    """Asks a peer for one thing after another, by JSON-RPC or by varlink; owns the connection."""

    varlink = False

    def __init__(self, connection: Connection) -> None:
        self.connection, self._number = connection, 0
        connection.varlink = connection.either = self.varlink  # the answer tells what it speaks

    def close(self) -> Any:
        self.connection.close()

    def call(self, method: str, params: Any = None) -> dict[str, Any]:
        """Return the result of a method that passes no files."""
        self._ask(method, params or {})
        with self._next() as message:
            result = self._result(message)
            if result is None or message.fds:
                raise ProtocolError(f"{method}: the answer is not a result without files")
            return result

    def _ask(self, method: str, params: dict[str, Any], *, more: bool = False) -> None:
        """Send a request; with ``more`` a varlink server may answer several times."""
        self._number += 1
        if self.varlink:  # zlink closes the connection for empty parameters
            request = {"method": method, **({"parameters": params} if params else {}),
                       **({"more": True} if more else {})}
        else:
            request = {"jsonrpc": "2.0", "method": method, "params": params, "id": self._number}
        try:
            self.connection.send(request)
        except ProtocolError:  # a server that refuses its client says why before it closes
            with self._next() as message:
                self._result(message)
            raise

    def _next(self) -> Message:
        if (message := self.connection.receive()) is None:
            raise ProtocolError("the other end has closed the connection")
        return message

    def _result(self, message: Message) -> dict[str, Any] | None:
        """Return what an answer says, None for what is not one; raise its error."""
        value = message.value
        if self.varlink:
            return self._parameters(value)
        if "method" in value or value.get("jsonrpc") != "2.0":
            return None
        if (error := value.get("error")) is not None:
            raise self._error(as_dict(error))
        if value.get("id") != self._number or "result" not in value:
            raise ProtocolError("the answer belongs to another request")
        self.connection.settle()
        return as_dict(value["result"])

    @staticmethod
    def _error(error: dict[str, Any]) -> Exception:
        code = error.get("code")
        return error_of(code if type(code) is int else INTERNAL_ERROR,
                        display(str(error.get("message"))), error.get("data"))

    def _parameters(self, value: dict[str, Any]) -> dict[str, Any]:
        if not self.connection.varlink:
            raise ProtocolError("the server speaks JSON-RPC, not varlink", code=NO_METHOD)
        params = as_dict(value.get("parameters"))
        if (name := value.get("error")) is None:
            return params
        words = display(", ".join(map(str, params.values())))
        last = str(name).rpartition(".")[2]
        if last == "NoSuchLayer":
            raise LayerUnknown(f"layer not known: {words}")
        if str(name).endswith("Oci.InternalError"):
            raise error_of(INTERNAL_ERROR, display(str(params.get("message"))), params.get("kind"))
        codes = {"MethodNotFound": NO_METHOD, "InterfaceNotFound": NO_METHOD,
                 "InvalidHandle": BAD_PARAMS}
        raise ProtocolError(f"{display(str(name))}: {words}", code=codes.get(last, INTERNAL_ERROR))


class Dispatcher(Closing):
    """Answers the requests of one peer, each by the function of this object that ``METHODS`` names.

    Methods of varlink have an interface, those of JSON-RPC have none.  A function takes the
    parameters; it returns the result, or None when it has sent the answer itself.  ``idle`` is how
    many seconds the peer may ask nothing.
    """

    METHODS: dict[str, str] = {}

    def __init__(self, connection: Connection, idle: float | None = None) -> None:
        self.connection, self._idle = connection, idle
        self._message = Message({}, [])  # the request that is answered
        self._number: Any = None  # its ID
        self._done = False

    def run(self) -> None:
        """Answer all requests.  Raises ProtocolError where the peer can no longer be understood."""
        while not self._done:
            self._number = None
            try:
                message = self.connection.receive(self._idle)
            except ProtocolError as error:
                if error.code:
                    self.connection.timeout = 1.0
                    self._send_error(error)
                raise
            if message is None:
                return
            with message:
                self._message = message
                self._answer(message.value)

    def _answer(self, value: dict[str, Any]) -> None:
        varlink = self.connection.varlink
        wanted = value.get("oneway") is not True if varlink else "id" in value
        if not (wanted or varlink or value.get("method") == "shutdown"):  # a notification
            return
        try:
            name, params = self._read(value)
            result = getattr(self, name)(params)
            if wanted and result is not None:
                self._reply(result)
        except Exception as error:  # a defect, too: it must not end the server for this peer
            if isinstance(error, ProtocolError) and not error.code:
                raise  # of the connection itself
            if wanted:
                self._send_error(error if isinstance(error, (CstorError, OSError)) else
                                 ProtocolError(f"internal error: {type(error).__name__}: {error}",
                                               code=INTERNAL_ERROR))

    def _read(self, value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the function and the parameters of a request."""
        varlink, number, method = self.connection.varlink, value.get("id"), value.get("method")
        params = value.get("parameters" if varlink else "params") or {}
        is_number = not isinstance(number, (bool, dict, list))
        self._number = number if is_number else None
        if not isinstance(method, str) or not is_number \
                or not varlink and value.get("jsonrpc") != "2.0":
            raise ProtocolError(f"not a {'varlink' if varlink else 'JSON-RPC 2.0'} request",
                                code=INVALID_REQUEST)
        if not isinstance(params, dict):
            raise ProtocolError("params must be an object", code=BAD_PARAMS)
        interface = method.rpartition(".")[0]
        if method in self.METHODS and bool(interface) == varlink:
            return self.METHODS[method], params
        if not varlink:
            raise ProtocolError(f'unknown method: "{display(method[:80])}"', code=NO_METHOD)
        if interface and any(each.rpartition(".")[0] == interface for each in self.METHODS):
            raise VarlinkError("org.varlink.service.MethodNotFound", "method", method)
        raise VarlinkError("org.varlink.service.InterfaceNotFound", "interface", interface)

    def _param(self, params: dict[str, Any], name: str, default: T) -> T:
        """Return a parameter of the type of its default; one with the default "" is required."""
        if (value := params.get(name)) is None:
            value = default
        if type(value) is not type(default) or value == "" \
                or isinstance(value, int) and not 0 <= value < 1 << 32:
            raise ProtocolError(f'parameter "{name}" is missing or wrong', code=BAD_PARAMS)
        return value

    def _reply(self, result: dict[str, Any], fds: Sequence[int] = ()) -> None:
        self.connection.send({"parameters": result} if self.connection.varlink else
                             {"jsonrpc": "2.0", "result": result, "id": self._number}, fds)

    def _send_error(self, error: Exception) -> None:
        self.connection.send(varlink_error(error) if self.connection.varlink else {
            "jsonrpc": "2.0", "error": {"code": error_row(error)[1], "message": str(error),
                                        "data": self._data(error)}, "id": self._number})

    def _data(self, error: Exception) -> Any:
        """Return what tells more of an error than its code does."""
        return type(error).__name__


class VarlinkError(CstorError):
    """An error by its name in varlink, with its one parameter."""

    def __init__(self, name: str, parameter: str, value: str) -> None:
        super().__init__(f"{name}: {value}")
        self.reply = {"error": name, "parameters": {parameter: value}}


def varlink_error(error: Exception) -> dict[str, Any]:
    """Return the reply of varlink that tells of an error, by the names of composefs's interface."""
    if isinstance(error, VarlinkError):
        return error.reply
    name, text = error_row(error)[2], str(error)
    params = {"NoSuchLayer": {"diff_id": text.removeprefix("layer not known: ")},
              "InternalError": {"message": text, "kind": type(error).__name__}}
    return {"error": f"org.composefs.Oci.{name}", "parameters": params.get(name, {"message": text})}


def hang_up(sock: socket.socket, how: int = SHUT_RDWR) -> None:
    """Call shutdown(2); it does not matter when the peer has already closed."""
    with suppress(OSError):
        socket.socket.shutdown(sock, how)  # that of an SSLSocket would go on in plain text


def drain(sock: Any, patience: float) -> bool:
    """Send no more, and read on so that the other end gets all; return whether it has closed."""
    # What is unread at the end would break the connection.
    hang_up(sock, SHUT_WR)
    try:
        sock.settimeout(patience)
        return any(not sock.recv(RECEIVE_SIZE) for _ in range(16))
    except OSError as error:
        return not isinstance(error, socket.timeout)


def peer_uid(sock: socket.socket) -> int:
    """Return the uid of the process at the other end, as of when it connected."""
    return memoryview(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)).cast("i")[1]


def refuse_user(sock: socket.socket) -> str:
    """Return why the user at the other end of a Unix socket is not served, "" if he is."""
    return "" if peer_uid(sock) in (0, os.geteuid()) else \
        f"this server serves only uid {os.geteuid()} and root"


def with_short_path(path: str, action: Callable[[str], T]) -> T:
    """Call ``action`` with an address for a socket at ``path``: an address has 108 bytes."""
    if len(os.fsencode(path)) < 108:
        return action(path)
    folder, name = os.path.split(path)
    name = "" if len(os.fsencode(name)) > 80 else f"/{name}"  # only to connect there
    has_proc("sockets with long paths are opened")
    with Opened(os.open(folder or "." if name else path, os.O_PATH)) as fd:
        return action(f"/proc/self/fd/{fd}{name}")


def connect(path: str, timeout: float = PEER_TIMEOUT) -> socket.socket:
    """Connect to the Unix socket at ``path``.

    Raises OSError with the path; ProtocolError when nobody accepts for ``timeout`` seconds.
    """
    sock, deadline = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), Deadline(timeout)
    with OnError(sock.close):
        sock.setblocking(False)
        while (code := with_short_path(path, sock.connect_ex)) == errno.EAGAIN:
            if not deadline.pause():  # too many wait to be accepted
                raise deadline.error()
        if code:
            raise OSError(code, os.strerror(code), path)
        sock.setblocking(True)
        return sock


class ListeningSocket(Transaction):
    """A Unix socket at ``path`` that listens, open to this user alone; removed at the end.

    A context manager that gives the socket.  It replaces the socket of a server that was killed.
    Raises OSError with the path: EADDRINUSE when a server listens, EEXIST for another kind of file.
    """

    def __init__(self, path: str) -> None:
        refuse_storage(path)
        super().__init__(path)
        super().__enter__()

    def _open(self) -> None:
        self._check()
        folder, name = os.path.split(os.fsencode(self.path))
        remove_dead(AT_FDCWD, name, folder or b".")
        temporary = os.fsdecode(os.path.join(folder, partial_name(name)))
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.on_exit(self.socket.close)
        try:
            with_short_path(temporary, self.socket.bind)
            os.chmod(temporary, 0o600)  # nobody can connect before it listens
            status = os.lstat(temporary)
            self.socket.listen(64)
            os.link(temporary, self.path)  # of several servers one comes first
            self.on_exit(lambda: self._remove(status))
        except FileExistsError:
            raise OSError(errno.EADDRINUSE, "another server listens there") from None
        finally:
            unlink_quietly(AT_FDCWD, os.fsencode(temporary))

    def _remove(self, status: os.stat_result) -> None:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self.path), status):
                os.unlink(self.path)

    def _check(self) -> None:
        """Remove what a killed server left.  Raises OSError for anything else."""
        with suppress(FileNotFoundError):
            status = os.lstat(self.path)
            if not stat.S_ISSOCK(status.st_mode):
                raise OSError(errno.EEXIST, "it is not a socket")
            try:
                with suppress(_Silent):  # too busy to answer
                    connect(self.path, 1.0).close()
                raise OSError(errno.EADDRINUSE, "another server listens there")
            except ConnectionRefusedError:
                self._remove(status)

    def __enter__(self) -> Any:
        return self.socket


def passed_socket(*families: str) -> socket.socket:
    """Return the socket that systemd passed (LISTEN_FDS), or that stdin is.  Raises _UsageError."""
    count = os.environ.get("LISTEN_FDS", "") \
        if os.environ.get("LISTEN_PID") == str(os.getpid()) else ""
    if re.fullmatch("[1-9][0-9]+|[2-9]", count):  # the clients of the others would wait for ever
        raise _UsageError(f"systemd passed {count} sockets: one ListenStream= can be served")
    fd = 3 if count == "1" else 0
    with suppress(OSError):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            found = socket.socket(fileno=os.dup(fd))
            if found.family.name in families and found.type == socket.SOCK_STREAM:
                return found
            found.close()
    raise _UsageError("no stream socket was passed: use --socket PATH or --registry [HOST:]PORT")


# ================================================================================================
# 21. Server
#
# Each client is a connection, served by a thread.  The protocol is detected from the first message.
# When a layer fails while it is sent, its stream ends damaged: no reader takes it for whole.
# ================================================================================================

F_ADD_SEALS, F_SEAL_ALL = 1033, 15  # no more seals, not shorter, not longer, not written
# The interfaces of varlink that are served, described in its own language.
VARLINK = {
    "org.varlink.service": """method GetInfo() -> (vendor: string, product: string, version: string,
  url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)
error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error InvalidParameter (parameter: string)
""",
    "org.composefs.Oci": """type StorageLayer (storage_path: string, layer_id: string)
type GetLayerParams (diff_id: ?string, storage: ?StorageLayer,
  consumer_has_cap_dac_override: bool)
method GetInfo() -> (features: []string)
method GetLayer(handle: int, params: GetLayerParams) ->
  (dir_count: int, layer: ?string, digest: ?string, size: ?int)
error RepoNotFound (message: string)
error NoSuchLayer (diff_id: string)
error InvalidRequest (message: string)
error InternalError (message: string, kind: ?string)
error FdLimitExceeded (fd_count: int, max_per_frame: int)
""",
    "dev.cstor.Store": """method ListImages() -> (images: []object)
method ListLayers() -> (layers: []object)
"""}
MAX_REQUEST = 1 << 20  # ... of a client
MAX_OPEN_IMAGES = 1024  # of one client
MAX_SPOOL = 8 << 30  # of a stream that is written before it is sent
MAX_MEMFD = 64 << 20  # of a stream that is kept in memory
DEFAULT_FDS = 252  # files for a client which does not say how many it takes with one message
SEGMENT_SIZE = 256 << 10  # bytes of a tar in one message
SHORTAGES = errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS  # they pass


class ClientServer:
    """Serves the clients of a listening socket, each in a thread; a subclass has handle().

    With ``clients`` connected, a new one replaces the one that is idle for longest, or waits for
    ``patience`` seconds.  ``timeout`` is how many seconds a client may do nothing where something
    is due, ``idle`` how many between its requests.
    """

    patience, grace = 2.0, 10.0

    def __init__(self, *, clients: int, timeout: float, idle: float) -> None:
        self.timeout, self.idle, self._room = timeout, idle, clients
        self._clients: set[Any] = set()  # Connections, or what else has socket and idle_since
        self._lock = threading.Condition()  # notified when a client leaves
        self.stopping = 0  # calls of stop()

    def stop(self) -> None:
        """Let serve() return, at the second call at once; for signal handlers and other threads."""
        self.stopping += 1
        for client in [*self._clients]:  # they are told of no other request, or of nothing
            hang_up(client.socket, SHUT_RD if self.stopping == 1 else SHUT_RDWR)

    def serve(self, listener: socket.socket) -> None:
        """Accept clients until stop(); then close, and give each ``grace`` seconds to finish."""
        listener.setblocking(False)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        try:
            while not self.stopping:
                poll.poll(100)  # no signal ends it: Python goes on after the handler
                if threading.active_count() > 4 * self._room + 16:  # many wait: others queue up
                    time.sleep(0.05)
                    continue
                try:
                    sock = listener.accept()[0]
                except OSError as error:
                    if error.errno in SHORTAGES:
                        time.sleep(0.1)  # until some client goes
                    continue
                try:
                    threading.Thread(target=self.handle, args=(sock,), daemon=True).start()
                except RuntimeError:  # can't start new thread: the others wait for this client
                    self.handle(sock)
        finally:
            listener.close()  # who comes now is refused at once
            self._finish()

    def _finish(self) -> None:
        for calls, seconds in ((1, self.grace), (2, 1.0)):
            if self.stopping < calls:  # the time is over, or an exception has ended serve()
                self.stop()
            deadline = Deadline(seconds)
            while self._clients and self.stopping <= calls and deadline.pause():
                pass

    def handle(self, sock: socket.socket) -> None:
        """Answer one client until it closes its end; close this end, too."""
        raise NotImplementedError

    def _admit(self, client: Any) -> str:
        """Give a client a place, when there is one soon; return why it has none, else ""."""
        deadline = Deadline(self.patience)
        with self._lock:
            while len(self._clients) >= self._room and not self.stopping:
                longest = min(self._clients, key=lambda each: each.idle_since, default=client)
                if longest.idle_since < time.monotonic() - 1:
                    self._clients.discard(longest)
                    hang_up(longest.socket)
                elif not deadline.left():
                    return "too many clients"
                self._lock.wait(0.05)
            client.idle_since = time.monotonic()  # it was not idle while it waited here
            self._clients.add(client)
        return "the server is shutting down" if self.stopping else ""  # seen by it, or by stop()

    def _leave(self, client: Any) -> None:
        """Give the place of a client, whose socket is closed, to another one."""
        with self._lock:
            self._clients.discard(client)
            self._lock.notify_all()


class RpcServer(ClientServer):
    """Gives the layers of a storage to this user's processes and root's, over Unix sockets.

    ``opener`` is called for each client; see ClientServer for the others.
    """

    def __init__(self, opener: Callable[[], Storage], *, clients: int = 64,
                 timeout: float = PEER_TIMEOUT, idle: float = 600.0) -> None:
        super().__init__(clients=clients, timeout=timeout, idle=idle)
        self.opener = opener
        self._spare_fds = max(soft_limit() - 4 * clients, 64)  # for contents that are passed

    def handle(self, sock: socket.socket) -> None:
        connection = Connection(sock, timeout=self.timeout, max_fds=0, max_message=MAX_REQUEST,
                                either=True)
        try:
            if refusal := refuse_user(sock) or self._admit(connection):
                connection.send({"jsonrpc": "2.0", "error": {
                    "code": INTERNAL_ERROR, "message": refusal}, "id": None})
                return
            with _Session(self, connection) as session:
                session.run()
        except (CstorError, ImportError, OSError, MemoryError):
            pass  # the client was told, or is gone
        finally:
            connection.close()  # before it counts as gone
            self._leave(connection)

    @contextmanager
    def spare_fds(self, wanted: int) -> Iterator[int]:
        """Lend a client as many of the wanted descriptors as can be spared; give their number."""
        with self._lock:
            count = min(wanted, self._spare_fds * 3 // 4)  # leave some to others
            self._spare_fds -= count
        try:
            yield count
        finally:
            with self._lock:
                self._spare_fds += count


class _Session(Dispatcher):
    METHODS = {"GetLayerSplitfdstream": "splitfdstream", "GetImage": "go_image",
               "StreamLayer": "stream", "ListImages": "list_images",
               "ListLayers": "list_layers", "GetLayer": "get_layer", "Initialize": "initialize",
               "OpenImage": "open_image", "CloseImage": "close_image",
               "GetLayerTarSplit": "tar_split", "Shutdown": "shutdown", "shutdown": "shutdown",
               "org.varlink.service.GetInfo": "service_info",
               "org.varlink.service.GetInterfaceDescription": "describe_interface",
               "org.composefs.Oci.GetInfo": "oci_info", "org.composefs.Oci.GetLayer": "oci_layer",
               "dev.cstor.Store.ListImages": "list_images",
               "dev.cstor.Store.ListLayers": "list_layers"}

    def __init__(self, server: RpcServer, connection: Connection) -> None:
        super().__init__(connection, server.idle)
        self.server = server
        self._storage: Storage | None = None
        self._images: dict[int, Image] = {}

    def close(self) -> None:
        if self._storage:
            self._storage.close()

    @property
    def storage(self) -> Storage:
        """The storage, with its records as they are now."""
        self._storage = self._storage or self.server.opener()
        self._storage.reload()
        return self._storage

    def _layer(self, params: dict[str, Any], name: str) -> Layer:
        return find_layer(self.storage, self._param(params, name, ""))

    def _need_root(self, path: Any) -> None:
        """Raise ImageUnknown unless a root of the storage is at ``path``."""
        if not isinstance(path, str) or not can_be_path(path) or os.path.realpath(path) not in [
                os.path.realpath(root.path) for root in self.storage.roots]:
            raise ImageUnknown(f"this server has no storage at {display(str(path))}")

    def splitfdstream(self, params: dict[str, Any]) -> None:
        """Send a layer as a file that holds the stream, and its external files."""
        layer = self._layer(params, "layer")
        if params.get("compressed") not in (None, False):
            raise ProtocolError("layers are sent uncompressed only", code=BAD_PARAMS)
        threshold = self._param(params, "threshold", INLINE_THRESHOLD)
        with self.server.spare_fds(self._param(params, "maxFds", DEFAULT_FDS)) as most, \
                Message({}, []) as passed:
            chosen, inline = choose_external(layer, threshold, most)

            def external(piece: Extent) -> bool:
                if is_chosen := next(chosen):
                    passed.fds.append(os.dup(piece.fd))
                return is_chosen

            if inline > MAX_SPOOL:
                raise ProtocolError(f"{counted(inline, 'byte')} are too many for one stream file: "
                                    "use StreamLayer, which has no limit", code=INVALID_REQUEST)
            with open_spool(inline) as spool, closing(layer.pieces()) as pieces:
                writer = SplitfdstreamWriter(spool.write, external, threshold=threshold)
                for piece in pieces:
                    writer.add(piece)
                result = {"mediaType": SPLITFDSTREAM, "streamSize": spool.tell(),
                          "digest": layer.diff_digest, "size": layer.diff_size}
                passed.fds.insert(0, seal_spool(spool))
            self._reply(result, passed.fds)

    def stream(self, params: dict[str, Any]) -> dict[str, Any]:
        """Send a layer as notifications, each with a file or some bytes of the tar."""
        layer = self._layer(params, "layer")
        threshold = self._param(params, "threshold", INLINE_THRESHOLD)
        known = {"digest": layer.diff_digest, "size": layer.diff_size}
        os.close(layer.open_tar_split()[0])  # if it is missing, say so before the start
        self._notify("stream.start", {"layer": layer.id, **known})
        count = self._send_chunks(layer, threshold, "stream.seg", "stream.file", lambda member: {})
        self._notify("stream.end", {**known, "files": count})
        return {"success": True}

    def tar_split(self, params: dict[str, Any]) -> dict[str, Any]:
        """Do the same as a proxy of the second version does."""
        image, digest = self._image_of(params), self._param(params, "layer_digest", "")
        threshold = self._param(params, "threshold", INLINE_THRESHOLD)
        layer = next((each for each in image.checked_chain()
                      if digest in (each.diff_digest, each.compressed_diff_digest)), None)
        if not layer:
            raise LayerUnknown(f"layer not known: image {image.id} has no {display(digest)}")
        self._notify("layer.start", {"digest": layer.diff_digest,
                                     "uncompressed_size": layer.diff_size})
        count = self._send_chunks(layer, threshold, "layer.segment", "layer.file", lambda member: {
            "mode": member.mode, "uid": member.uid, "gid": member.gid,
            **({"mtime": mtime} if (mtime := format_time(member.mtime_ns)) else {}),
            "fd": {"__jsonrpc_fd__": True, "index": 0}})
        self._notify("layer.end", {"files_sent": count, "checksum": layer.diff_digest})
        return {"success": True}

    def _notify(self, method: str, params: dict[str, Any], fds: Sequence[int] = ()) -> None:
        self.connection.send({"jsonrpc": "2.0", "method": method, "params": params}, fds)

    def _send_chunks(self, layer: Layer, threshold: int, segment: str, file: str,
                     more: Callable[[Member], dict[str, Any]]) -> int:
        """Send the pieces of a layer; return how many files were passed."""
        buffer, count = bytearray(), 0

        def flush() -> None:
            if buffer:
                self._notify(segment, {"data": binascii.b2a_base64(buffer, newline=False).decode()})
                buffer.clear()

        with closing(layer.pieces()) as pieces:
            for piece in pieces:
                if isinstance(piece, Extent) and piece.length > threshold and piece.is_whole_file:
                    flush()
                    self._notify(file, {"name": spell(piece.member.name), "size": piece.length,
                                        **more(piece.member)}, [piece.fd])
                    count += 1
                    continue
                for data in whole_chunks(piece):
                    buffer += data
                    if len(buffer) >= SEGMENT_SIZE:
                        flush()
        flush()
        return count

    # -- images and lists ------------------------------------------------------------------------

    def list_images(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"images": [{**image.record, "size": image.size, "readonly": image.readonly}
                           for image in self.storage.images()]}

    def list_layers(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"layers": [{**layer.record, "store": layer.root.path}
                           for layer in self.storage.layers()]}

    def get_layer(self, params: dict[str, Any]) -> dict[str, Any]:
        layer = self._layer(params, "layer")
        return {"layer": {**layer.record, "store": layer.root.path}}

    def go_image(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return manifest, configuration and layers, the top one first."""
        image = self.storage.image(self._param(params, "imageId", "")).single()
        return {"manifest": image.big_data("manifest").decode("utf-8", "replace"),
                "config": image.config_bytes().decode("utf-8", "replace"),
                "layerDigests": [layer.id for layer in image.checked_chain()[::-1]]}

    def initialize(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the version of a proxy, in the form that the client asks for."""
        if params.get("version") == 2:
            return {"version": "2.0.0", "capabilities": ["tar-split-stream"]}
        return {"value": {"version": "1.0.0", "v1_compat": "0.2.8"}}

    def open_image(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the number that names an image from now on."""
        reference, driver = self._param(params, "image_ref", ""), self.storage.driver
        match = re.fullmatch(rf"containers-storage:(?:\[(?:{driver}@)?([^\]]+)\])?(.*)", reference)
        if match and match[1]:
            self._need_root(match[1].partition("+")[0])
        image = self.storage.image(match[2] if match else reference).single()
        image.checked_chain()
        number = max(self._images, default=0) + 1
        if len(self._images) >= MAX_OPEN_IMAGES:
            raise ProtocolError("too many open images", code=INVALID_REQUEST)
        self._images[number] = image
        return {"image_id": number}

    def _image_of(self, params: dict[str, Any]) -> Image:
        if (number := self._param(params, "image_id", 0)) not in self._images:
            raise ImageUnknown(f"image not known: no open image has the number {number}")
        self.storage.reload()  # it was opened by an earlier request
        return self._images[number]

    def close_image(self, params: dict[str, Any]) -> dict[str, Any]:
        self._image_of(params)
        del self._images[params["image_id"]]
        return {}

    def shutdown(self, _: dict[str, Any]) -> dict[str, Any]:
        self._done = True
        return {"success": True}

    # -- varlink ---------------------------------------------------------------------------------

    def service_info(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"vendor": "cstor", "product": "cstor.py", "version": __version__,
                "url": "https://varlink.org", "interfaces": list(VARLINK)}

    def describe_interface(self, params: dict[str, Any]) -> dict[str, Any]:
        name = params.get("interface")
        if not isinstance(name, str):
            raise VarlinkError("org.varlink.service.InvalidParameter", "parameter", "interface")
        if name not in VARLINK:
            raise VarlinkError("org.varlink.service.InterfaceNotFound", "interface", name)
        return {"description": f"interface {name}\n\n{VARLINK[name]}"}

    def oci_info(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"features": ["splitdirfdstream-v0", "source-containers-storage", "read-only"]}

    def _oci_layer(self, params: dict[str, Any]) -> Layer:
        """Return the layer that a call names: by its place, or by DiffID."""
        place, diff_id = params.get("storage"), params.get("diff_id")
        if (place is None) == (diff_id is None):
            raise ProtocolError("give exactly one of storage and diff_id", code=INVALID_REQUEST)
        if place is None:
            return self._layer(params, "diff_id")
        self._need_root(as_dict(place).get("storage_path"))
        return self._layer(place, "layer_id")

    def oci_layer(self, params: dict[str, Any]) -> None:
        """Send a layer as a splitdirfdstream, through a pipe, with the directory of its files."""
        if self._message.value.get("more") is not True or self._message.value.get("oneway") is True:
            raise ProtocolError("GetLayer must be called with more", code=INVALID_REQUEST)
        inner = params.get("params")
        if not isinstance(inner, dict):
            raise ProtocolError("params are missing", code=INVALID_REQUEST)
        layer = self._oci_layer(inner)
        diff = layer.diff()
        os.close(layer.open_tar_split()[0])  # if it is missing, say so before the reply
        source, sink, kept, alive = (open(fd, mode, 0) for _ in range(2) for fd, mode in zip(
            os.pipe(), ("rb", "wb")))
        with source, sink, kept, alive, diff:
            place = _Place(diff, inner.get("consumer_has_cap_dac_override") is True)
            self.connection.send({"parameters": {
                "dir_count": 1, "layer": layer.id, "digest": layer.diff_digest,
                "size": layer.diff_size}, "continues": False},
                [source.fileno(), diff.fd, alive.fileno()])
            source.close()  # so that writing fails when the client is gone
            pipe = _PipeWriter(sink.fileno(), self.server.timeout)
            writer = SplitdirfdstreamWriter(pipe.write, place.find)
            try:
                place.write(LayerReader(layer), writer)
                pipe.flush()
            except (CstorError, OSError) as error:
                # The answer is sent: a client that reads on learns why, others see the damage.
                if not isinstance(error, ProtocolError):
                    self.connection.send(varlink_error(error))
                    writer.break_off()
                    pipe.flush()
                raise ProtocolError(str(error)) from None


class _PipeWriter:
    """Writes to a pipe; the last byte waits for flush(), so that a kill cuts a chunk."""

    def __init__(self, fd: int, timeout: float) -> None:
        self._fd, self._timeout, self._buffer = fd, timeout, bytearray()
        os.set_blocking(fd, False)
        widen_pipe(fd)

    def write(self, data: bytes | memoryview) -> None:
        self._buffer += data
        if len(self._buffer) >= SEGMENT_SIZE:
            self.flush(1)

    def flush(self, kept: int = 0) -> None:
        """Write all but the last ``kept`` bytes."""
        data = bytes(self._buffer[:len(self._buffer) - kept])
        del self._buffer[:len(data)]
        try:
            write_all(self._fd, data, self._timeout)
        except BrokenPipeError:
            raise ProtocolError("the other end has closed the pipe") from None


class _Place:
    """Names open files below a layer's directory for a client that may read them there."""

    def __init__(self, diff: Directory, ignores_modes: bool) -> None:
        has_proc("files of layers are passed")
        self._diff, self._all = diff, ignores_modes
        self._root = os.readlink(b"/proc/self/fd/%d" % diff.fd) + b"/"
        self._open: dict[bytes, bool] = {b"": True}  # by directory, if all may search it

    def write(self, reader: LayerReader, writer: SplitdirfdstreamWriter) -> None:
        """Write a layer's tar; plain files are not opened, and paths read once for a directory."""
        parent, folder = b"/", b""
        with closing(reader.items()) as items:
            for literal, member, content in items:
                writer.add(literal)
                if member and member.stored and member.sparse is None and reader.files \
                        and (found := reader.files.find(member.name, member.size)):
                    dir_fd, name, base, status = found
                    if name != parent:
                        parent, folder = name, os.readlink(b"/proc/self/fd/%d" % dir_fd) + b"/"
                    if writer.refer(member.size, self._entry(folder + base, status.st_mode)):
                        continue
                for piece in content:
                    writer.add(piece)

    def find(self, piece: Extent) -> tuple[int, bytes] | None:
        """Return (0, name) of a piece's file; None when the client cannot open it by name."""
        return self._entry(os.readlink(b"/proc/self/fd/%d" % piece.fd), os.fstat(piece.fd).st_mode)

    def _entry(self, path: bytes, mode: int) -> tuple[int, bytes] | None:
        name = path[len(self._root):]
        if not path.startswith(self._root) or len(name) > MAX_FILE_NAME:
            return None  # of a layer below, or removed meanwhile
        may = self._all or mode & stat.S_IROTH and self._searchable(name.rpartition(b"/")[0])
        return (0, name) if may else None

    def _searchable(self, folder: bytes) -> bool:
        if folder not in self._open:
            mode = os.lstat(folder, dir_fd=self._diff.fd).st_mode
            self._open[folder] = bool(mode & stat.S_IXOTH) \
                and self._searchable(folder.rpartition(b"/")[0])
        return self._open[folder]


def choose_external(layer: Layer, threshold: int, most: int) -> tuple[Iterator[bool], int]:
    """Choose the ``most`` largest of the files above ``threshold``: there reflinks save most.

    Return for each of those files whether it is chosen, and how many bytes stay inline.
    """
    sizes, total = [], 0
    for literal, member, _ in LayerReader(layer).headers():
        total += len(literal) + (member.stored if member else 0)
        if member and member.stored > threshold and member.sparse is None:
            sizes.append(member.stored)
    chosen = set(sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:most])
    return (number in chosen for number in range(len(sizes))), \
        total - sum(sizes[number] for number in chosen)


def open_spool(size: int) -> BinaryIO:
    """Return a file without a name for about ``size`` bytes: in memory when they are few."""
    if size <= MAX_MEMFD:
        return open(os.memfd_create("cstor-stream", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    return tempfile.TemporaryFile(prefix="cstor-")


def seal_spool(spool: BinaryIO) -> int:
    """Return a descriptor that reads a spool from its beginning; nobody can write to it now."""
    has_proc("files of layers are passed")
    spool.flush()
    with suppress(OSError):  # no memfd
        fcntl.fcntl(spool.fileno(), F_ADD_SEALS, F_SEAL_ALL)
    return os.open(f"/proc/self/fd/{spool.fileno()}", os.O_RDONLY)


# ================================================================================================
# 22. Clients
#
# What a server tells about a layer (sizes, digest, end) is checked against what it sends.  Every
# wait ends after the timeout, and what came in part is removed.
# ================================================================================================

SEGMENT_METHODS = ("stream.seg", "stream.segment", "layer.segment")
FILE_METHODS = ("stream.file", "layer.file")
END_METHODS = ("stream.end", "layer.end")


class RpcClient(Caller):
    """Asks a server of layers, by JSON-RPC; ``where`` is the path of its socket, or a socket.

    A context manager.  Read a layer to its end before the next request, or close the client.
    Raises LayerUnknown, ImageUnknown, ProtocolError.
    """

    def __init__(self, where: str | socket.socket, *, timeout: float = PEER_TIMEOUT) -> None:
        self.limit = max(soft_limit() - (
            len(os.listdir("/proc/self/fd")) if has_proc() else 64) - 32, 8)
        sock = connect(where, timeout) if isinstance(where, str) else where
        super().__init__(Connection(sock, timeout=timeout, max_fds=min(self.limit, MAX_QUEUED_FDS)))
        uid = peer_uid(sock)
        if isinstance(where, str) and uid not in (0, os.geteuid()):
            # It could name files for us to open that it may not open itself.
            self.close()
            raise ProtocolError(f"the server at {where} runs as uid {uid}, neither root nor you",
                                code=INTERNAL_ERROR)

    def images(self) -> list[dict[str, Any]]:
        """Return the records of all images."""
        return [as_dict(record) for record in as_list(self.call("ListImages").get("images"))]

    def layers(self) -> list[dict[str, Any]]:
        """Return the records of all layers."""
        return [as_dict(record) for record in as_list(self.call("ListLayers").get("layers"))]

    def layer(self, reference: str, form: str = "stream", *,
              threshold: int = INLINE_THRESHOLD) -> LayerStream:
        """Return a layer; read it before the next request.

        ``form`` is how it comes: "stream", a notification for each file, of which there may be any
        number; "splitfdstream", one file with the stream, and the largest files beside it; "push",
        notifications of a server that sends one layer without a request (``reference`` names it in
        errors).  Contents of more than ``threshold`` bytes come as open files.
        """
        check_words("form", [form], ("stream", "splitfdstream", "push"))
        if form == "stream":
            self._ask("StreamLayer", {"layer": reference, "threshold": threshold})
        if form in ("stream", "push"):
            return self._notified(reference)
        self._ask("GetLayerSplitfdstream", {
            "layer": reference, "threshold": threshold, "compressed": False,
            "maxFds": self.connection.max_fds - 1})
        message = self._next()
        with OnError(message.close):
            result, fds = self._result(message), message.fds
            if result is None or not fds:
                raise ProtocolError("the answer to GetLayerSplitfdstream has no stream",
                                    code=FD_ERROR)
            if (media_type := result.get("mediaType", SPLITFDSTREAM)) != SPLITFDSTREAM:
                raise Unsupported(f"the server sends {display(str(media_type))}, not "
                                  f"{SPLITFDSTREAM}")
            found, size = check_passed(fds[0]), result.get("streamSize")
            if size not in (None, found):
                raise ProtocolError(f"streamSize is {display(repr(size))}, but "
                                    f"{counted(found, 'byte')} came")
            stream = open(fds[0], "rb", closefd=False)
            stream.seek(0)
            chunks = SplitfdstreamReader(stream.read, lambda number: fds[number + 1])
            return self._received(reference, chunks, result, message.close)

    def _notified(self, label: str) -> LayerStream:
        """Wait for the first notification, and return the layer that it begins."""
        with self._next() as message:
            if not str(message.value.get("method")).endswith(".start") or message.fds:
                self._result(message)
                raise ProtocolError("expected stream.start")
            start = as_dict(message.value.get("params"))
        start.setdefault("size", start.get("uncompressed_size"))
        stream = self._received(label, self._chunks(lambda: stream), start)
        return stream

    @staticmethod
    def _received(reference: str, chunks: Iterable[bytes | PassedFile], said: dict[str, Any],
                  close: Callable[[], object] | None = None) -> LayerStream:
        """Return the layer that a server sends, with the digest and size that it has ``said``."""
        digest, size = said.get("digest"), said.get("size")
        return LayerStream(chunks, label=str(said.get("layer") or reference), close=close,
                           digest=digest if isinstance(digest, str) else "",
                           size=size if type(size) is int else -1).expect(reference)

    def _chunks(self, stream: Callable[[], LayerStream]) -> Iterator[bytes | PassedFile]:
        """Yield what comes until the answer.  Raises ProtocolError when the end is missing."""
        method, files = None, 0
        while method not in END_METHODS:
            with self._next() as message:
                method, params = message.value.get("method"), as_dict(message.value.get("params"))
                if method is None:
                    self._result(message)
                    raise ProtocolError("the server ended the layer early")
                if len(message.fds) != (method in FILE_METHODS):
                    raise ProtocolError(f"{display(str(method))} is out of place: it has "
                                        f"{counted(len(message.fds), 'file')}", code=FD_ERROR)
                if method in SEGMENT_METHODS:
                    try:
                        data = decode_base64(params["data"])
                    except (KeyError, TypeError, ValueError):
                        raise ProtocolError("malformed base64", code=BAD_PARAMS) from None
                    yield data
                elif method in FILE_METHODS:
                    size = params.get("size")
                    if type(size) is not int or size < 0:
                        raise ProtocolError(f"a file of {counted(display(repr(size)), 'byte')}",
                                            code=BAD_PARAMS)
                    files += 1
                    yield PassedFile(message.fds[0], size)
                elif method not in END_METHODS:
                    raise ProtocolError(f"{display(str(method))} inside a layer", code=NO_METHOD)
        layer, digest = stream(), params.get("digest", params.get("checksum"))
        count = params.get("files", params.get("files_sent", files))
        if not isinstance(digest, (str, type(None))) or layer.digest and digest \
                and digest != layer.digest or count != files:
            raise ProtocolError("the end of the layer contradicts what came before it")
        layer.digest = digest or layer.digest
        # Without a request there is no answer, and cstor-rs sends none at all.
        if self._number and (answer := self.connection.receive()):
            with answer:
                result = self._result(answer)
                if result is None or answer.fds or result.get("success") is False:
                    raise ProtocolError("the server ended the layer without success")
        self.connection.settle()


class ProxyV2Client(RpcClient):
    """Asks a proxy of version 2, or our own server, for the layers of images.

    ``image = client.open_image("containers-storage:alpine")``, then ``client.image_layer(image,
    digest)`` for each DiffID, then ``client.shutdown()``.
    """

    def initialize(self) -> dict[str, Any]:
        """Return version and capabilities; ProtocolError unless the version is 1 or 2."""
        result = self.call("Initialize", {"version": 2})
        found = as_dict(result.get("value", result))
        if not re.match(r"[12]\.", str(found.get("version"))):
            raise ProtocolError(f"unknown proxy version {display(str(found.get('version')))}")
        return found

    def open_image(self, reference: str) -> int:
        """Return the number of an image; ``reference`` begins with its transport."""
        result = self.call("OpenImage", {"image_ref": reference})
        number = result.get("image_id", result.get("value"))
        if type(number) is not int or number < 1:
            raise ProtocolError(f"the answer to OpenImage is {display(repr(number))}")
        return number

    def close_image(self, image: int) -> None:
        """Let the proxy forget an image."""
        self.call("CloseImage", {"image_id": image})

    def image_layer(self, image: int, digest: str) -> LayerStream:
        """Return a layer by its digest; read it before the next request."""
        self._ask("GetLayerTarSplit", {"image_id": image, "layer_digest": digest})
        return self._notified(digest)

    def shutdown(self) -> None:
        """Let the proxy end this connection, and close it."""
        self.call("Shutdown")
        self.close()


class VarlinkClient(RpcClient):
    """Asks a server of composefs's interface ``org.composefs.Oci``, or our own, by varlink."""

    varlink = True

    def call(self, method: str, params: Any = None) -> dict[str, Any]:
        return super().call(method if "." in method else f"dev.cstor.Store.{method}", params)

    def open_repository(self, path: str = "") -> int:
        """Return this connection's handle of a repository; "" is the system's, or the user's."""
        which = {"path": path} if path else {"user" if os.geteuid() else "system": True}
        handle = self.call("org.composefs.Repository.OpenRepository", which).get("handle")
        if type(handle) is not int:
            raise ProtocolError(f"the answer to OpenRepository is {display(repr(handle))}")
        return handle

    def layer(self, reference: str, form: str = "", *, threshold: int = 0,
              handle: int | None = None) -> LayerStream:
        """Return a layer by STORAGE_PATH#ID or DiffID; read it before the next request.

        When a server needs the ``handle`` of a repository and none is given, one is opened.  Our
        own server also takes an ID or a link; ``threshold`` as for SplitdirfdstreamReader.
        """
        check_words("form", [form], ("", "varlink"))
        path, _, name = reference.rpartition("#") if reference.startswith("/") \
            else ("", "", reference)
        passed = Message({}, [])
        fds = passed.fds
        with OnError(passed.close):
            try:
                count, reply = self._get_layer(path, name, handle or 0, fds)
            except ProtocolError as error:
                if error.code != BAD_PARAMS or handle is not None:
                    raise
                count, reply = self._get_layer(path, name, self.open_repository(), fds)
            if not stat.S_ISFIFO(os.fstat(fds[0]).st_mode) or fcntl.fcntl(
                    fds[0], fcntl.F_GETFL) & (os.O_PATH | os.O_WRONLY | os.O_RDWR):
                raise ProtocolError("the first descriptor is not a pipe to read from",
                                    code=FD_ERROR)
            os.set_blocking(fds[0], False)
            reader = io.BufferedReader(ChunkFile(read_pipe(fds[0], self.connection.timeout)), CHUNK)
            chunks = SplitdirfdstreamReader(reader.read, fds[1:count + 1], threshold=threshold)
            chunks.explain = self._explain
            return self._received(name, chunks, reply, passed.close)

    def _explain(self) -> None:
        """Raise the reason that our own server sends for a damaged stream, if it is there."""
        poll = select.poll()
        poll.register(self.connection.socket, select.POLLIN)
        if poll.poll(0) and (message := self.connection.receive()):
            with message:
                self._result(message)

    def _get_layer(self, path: str, name: str, handle: int, fds: list[int]
                   ) -> tuple[int, dict[str, Any]]:
        """Ask for a layer of the storage at ``path``, or by DiffID.

        Put the descriptors of all replies into ``fds``; return (directories, first reply).
        """
        place = {"storage_path": path, "layer_id": name} if path else None
        self._ask("org.composefs.Oci.GetLayer", {"handle": handle, "params": {
            "diff_id": None if place else name, "storage": place,
            "consumer_has_cap_dac_override": "CAP_DAC_OVERRIDE" in capabilities()}}, more=True)
        replies: list[dict[str, Any]] = []
        more = True
        while more:
            with self._next() as message:
                replies.append(self._parameters(message.value))
                more = message.value.get("continues") is True
                if not message.fds or len(fds) + len(message.fds) > self.limit:
                    raise ProtocolError("a reply with " + counted(
                        len(message.fds), "file descriptor"), code=FD_ERROR)
                fds += message.take()
        count = replies[0].get("dir_count")
        if type(count) is not int or not 0 <= count <= len(fds) - 2 <= count + 2 \
                or any(reply.get("dir_count") != count for reply in replies):
            raise ProtocolError(f"{counted(len(fds), 'file descriptor')} for "
                                f"{counted(display(repr(count)), 'directory')}", code=FD_ERROR)
        return count, replies[0]


def fetch_layer(path: str, reference: str, *, digest: str = "", verify: bool = True,
                timeout: float = PEER_TIMEOUT) -> LayerStream:
    """Return a layer of the server at ``path``, in the fastest form that it knows.

    Directories (varlink) take half the time of a message for each file.  "-" is what a server sends
    without a request.  The tar must have ``digest``; when neither this nor the server gives one,
    IntegrityError is raised before the transfer, unless ``verify`` is false.  Raises LayerUnknown,
    ProtocolError, OSError.
    """
    unknown = (0, NO_METHOD, PARSE_ERROR, INVALID_REQUEST)  # to a server that speaks otherwise
    trouble: ProtocolError | None = None
    forms: Any = ((VarlinkClient, ""), (RpcClient, "stream"), (RpcClient, "splitfdstream"))
    for kind, form in forms if reference != "-" else ((RpcClient, "push"),):
        client = kind(path, timeout=timeout)
        try:
            with OnError(client.close):
                stream = client.layer(reference if form != "push" else path, form)
        except ProtocolError as error:
            spoken = client.connection.varlink and not client.connection.either
            if spoken or isinstance(error, _Silent) or error.code not in unknown:
                raise  # varlink servers wait for a NUL
            trouble = trouble or error
            continue
        stream.also_close(client.close)
        stream.expect(digest)
        if verify and not stream.digest:
            stream.close()
            raise IntegrityError("the server sent no digest, so its tar cannot be verified",
                                 layer=stream.label, hint="use --digest SHA256 or --no-verify")
        return stream
    assert trouble
    raise trouble


def read_pipe(fd: int, timeout: float | None) -> Iterator[bytes]:
    """Yield what comes from a pipe; ProtocolError when nothing does for ``timeout`` seconds."""
    while True:
        try:
            yield from iter(lambda: os.read(fd, CHUNK), b"")
            return
        except BlockingIOError:
            Deadline(timeout).wait(fd, "POLLIN")


# ================================================================================================
# 23. Rootless
#
# All metadata of a rootless store belong to the user; contents belong to the user and the sub-uids.
# Their private files (mode 0600 or 0000, or in directories of 0700) can be read only by root of the
# user's namespace.  A helper does that: this very code, as a process of that namespace.  It starts
# at the first content that the user may not read, gets names through a socket that is its stdin,
# and sends open descriptors back.  It ends with its socket, whichever process is killed.
# newuidmap(1) and newgidmap(1) make the namespace, as podman does it, or else `podman unshare`,
# which writes to lock files of the user's own storage and leaves a process behind.
# ================================================================================================

AHEAD = 128  # files that a helper opens at a time, below FDS_PER_SEND
START_TIMEOUT = 10  # seconds that a helper may take to start
HELPER_TIMEOUT = 120  # ... to open AHEAD files

UNSHARED_MARK = "_CSTOR_UNSHARED"  # in the environment of what runs in a namespace made by us
_CODE = sys._getframe().f_code  # this module, wherever it came from: file, zip, stdin, another name
IS_SCRIPT = not (sys._getframe().f_back or hasattr(sys, "frozen"))  # Python has just compiled it
# What runs first in the namespace: it makes it, if podman did not, and gets _CODE from the socket.
BOOTSTRAP = """\
import marshal, os, sys
way, function, *words = sys.argv[1:]
if way == "newuidmap":
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000):  # CLONE_NEWUSER
        sys.exit("unshare: " + os.strerror(ctypes.get_errno()))
    os.write(0, b"!")
with open(0, "rb", closefd=False) as file:  # nothing comes after the code until we say hello
    code = marshal.loads(file.read(int(file.read(8), 16)))
module = type(sys)("cstor")
sys.modules["cstor"] = module
exec(code, vars(module))
sys.exit(getattr(module, function)(words))
"""


def id_map(kind: str) -> list[list[int]]:
    """Return uid_map or gid_map: first ID in this user namespace, first one outside, count."""
    return [[int(word) for word in line.split()] for line in read_proc(f"self/{kind}").splitlines()]


def describe_process() -> dict[str, Any]:
    """Return which files this process may read, and what can help it; nothing is started.

    ``user-namespace`` is "initial", "podman unshare" or "other"; maps are as of id_map(), sub-IDs
    as of sub_ids(); programs are paths or "".
    """
    uid, configured = os.geteuid(), os.environ.get("_CONTAINERS_USERNS_CONFIGURED")
    outer = os.environ.get("_CONTAINERS_ROOTLESS_UID", "")
    if not uid and configured and outer.isdecimal():
        uid = int(outer)
    maps = id_map("uid_map")
    return {"uid": os.geteuid(), "capabilities": capabilities(),
            "user-namespace": "initial" if maps in ([], [[0, 0, NO_ID]]) else
            "podman unshare" if configured else "other",
            "uid-map": maps, "gid-map": id_map("gid_map"),
            "sub-uids": sub_ids(uid), "sub-gids": sub_ids(uid, "/etc/subgid"),
            **{name: shutil.which(name) or "" for name in ("podman", "newuidmap", "newgidmap")}}


def explain_process(process: dict[str, Any]) -> str:
    """Say in words what describe_process() returns."""
    words = [f"uid {process['uid']}"]
    inside = process["user-namespace"] != "initial"
    if inside:
        words.append("in a user namespace" + " of podman unshare" * (
            process["user-namespace"] == "podman unshare"))
    if {"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"} & set(process["capabilities"]):
        words.append("reads all files" + " of its IDs" * inside)
    elif not process["uid"]:
        words.append("without CAP_DAC_OVERRIDE")
    else:
        ranges = (f"{first} to {first + count - 1}" for first, count in process["sub-uids"])
        ways = " or ".join(unshare_ways(process))
        words += ["sub-uids " + ", ".join(ranges) if process["sub-uids"] else "no sub-uids",
                  f"private files through {ways}" if ways else "no way to read private files"]
    return ", ".join(words)


def unshare_ways(process: dict[str, Any]) -> list[str]:
    """Return the programs that can make a user namespace with our sub-uids, the best first."""
    ways = [way for way, there in (
        ("newuidmap", process["newuidmap"] and process["newgidmap"] and process["sub-uids"]
         and process["sub-gids"]), ("podman", process["podman"])) if there]
    # Where AppArmor keeps namespaces from having capabilities, podman is an exception.
    if read_proc("sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1":
        ways.reverse()
    return ways


def why_no_helper(storage: Storage) -> str:
    """Return, as the next step for a person, why no helper can read a storage; "" if one can."""
    (owner, _), uid = storage.owner, os.geteuid()
    if uid:
        return "" if uid == owner else \
            f"the store belongs to uid {owner}: run it as root or as that user"
    if id_map("uid_map") in ([], [[0, 0, NO_ID]]):
        return "this root has no CAP_DAC_OVERRIDE: give it that capability"
    return ("this user namespace does not map the store's owner: run it outside, as root or as the "
            "owner of the store")


class Unshared(Caller):
    """This very program once more, as root of a user namespace with our sub-uids.

    It calls ``function`` of this module with ``words``, which says hello and then speaks over
    ``connection``, its stdin.  A context manager; owns the process, which may take ``grace``
    seconds to end.  Raises NeedsUnshare in the words of newuidmap or podman.
    """

    def __init__(self, function: str, words: Sequence[str], grace: float = 2) -> None:
        self._grace, self._owner = grace, os.getpid()
        process = describe_process()
        reasons = []
        for way in unshare_ways(process) if sys.executable else ():
            try:
                self._start(way, function, words, process)
                return
            except (CstorError, ImportError, OSError) as error:
                reasons.append(f"{way}: {error}")
        user = os.environ.get("USER") or process["uid"]
        hint = "run it as root"
        if not sys.executable:
            reasons.append("this Python does not know its own program (sys.executable)")
        elif not (process["sub-uids"] and process["sub-gids"]):
            reasons.append("no subuid ranges: /etc/subuid and /etc/subgid have none for this user")
            hint += f", or `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`"
        elif not reasons:
            reasons.append("neither newuidmap nor podman found")
            hint += ", or install one of them"
        elif not has_proc():
            hint += ", or mount /proc: mount -t proc proc /proc"
        elif read_proc("sys/user/max_user_namespaces").strip() == "0":
            hint += ", or set the sysctl user.max_user_namespaces"
        raise NeedsUnshare("no user namespace: " + "; ".join(reasons), hint=hint)

    def _start(self, way: str, function: str, words: Sequence[str], process: dict[str, Any]
               ) -> None:
        command = [sys.executable, "-IS", "-c", BOOTSTRAP, way, function, *words]
        environ = {**os.environ, UNSHARED_MARK: "1"}
        if way == "podman":
            command[:0] = [process["podman"], "unshare"]
        else:  # what podman says to those inside
            environ.update(_CONTAINERS_USERNS_CONFIGURED="done",
                           _CONTAINERS_ROOTLESS_UID=str(os.geteuid()),
                           _CONTAINERS_ROOTLESS_GID=str(os.getegid()))
        ours, theirs = socket.socketpair()
        super().__init__(Connection(ours, timeout=START_TIMEOUT))
        log, end = map(Opened, os.pipe())
        with log:
            with theirs, end, OnError(ours.close):
                self._process = spawn(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL,
                                      stderr=end, env=environ, start_new_session=True)
            try:
                with OnError(self.close):
                    if way == "newuidmap":
                        Deadline(START_TIMEOUT).wait(ours, "POLLIN")
                        if ours.recv(1) == b"!":
                            self._map_ids(process)
                    code = marshal.dumps(_CODE)
                    self.connection.send_bytes(b"%08x%s" % (len(code), code))
                    with self._next() as hello:
                        if hello.value.get("method") != "hello":
                            raise CstorError("another program answers")
                    self.connection.timeout = HELPER_TIMEOUT
            except (CstorError, OSError) as error:
                os.set_blocking(log, False)  # podman's other processes may have the other end
                said = b""
                with suppress(BlockingIOError):
                    said = os.read(log, CHUNK).strip().rpartition(b"\n")[2]
                raise CstorError(display(said) or str(error)) from None

    def _map_ids(self, process: dict[str, Any]) -> None:
        """Map root in the namespace to this user, and the IDs from 1 on to the sub-IDs."""
        for program, own, ranges in (("newuidmap", os.geteuid(), process["sub-uids"]),
                                     ("newgidmap", os.getegid(), process["sub-gids"])):
            words, at = [], 0
            for first, count in [(own, 1), *ranges]:
                words += [str(at), str(first), str(count)]
                at += count
            try:
                done = subprocess.run(
                    [process[program], str(self._process.pid), *words], check=False,
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    timeout=START_TIMEOUT)
            except subprocess.TimeoutExpired:
                raise CstorError(f"{program} did not end in {START_TIMEOUT} seconds") from None
            if done.returncode:
                raise CstorError(f"{program}: {display(done.stdout.strip()[-300:])}")

    def close(self) -> int:
        """End the process, by the end of its input, SIGTERM or SIGKILL; return its exit status."""
        # Harmless when repeated, and in processes that were forked.
        if os.getpid() == self._owner and self.connection.socket.fileno() >= 0:
            with SignalsHeld():
                for number in (0, signal.SIGTERM, signal.SIGKILL):
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(self._process.pid, number)  # it is the leader of its session
                    with suppress(subprocess.TimeoutExpired):
                        if drain(self.connection.socket, self._grace):  # all there have ended
                            self._process.wait(self._grace)
                            break
        self.connection.close()
        code: int = self._process.returncode or 0
        return 128 - code if code < 0 else code


def say_hello(roots: Sequence[str] = ()) -> Connection:
    """Send the first message of a process in the namespace; return its connection, stdin."""
    connection = Connection(socket.socket(fileno=os.dup(0)), timeout=None)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    connection.send({"jsonrpc": "2.0", "method": "hello",
                     "params": {"version": __version__, "roots": roots}})
    return connection


def run_unshared(function: str, words: Sequence[str]) -> int:
    """Run a function that calls take_over() in a namespace; return the status that it returns."""
    with Opened(os.open(os.devnull, os.O_RDWR)) as nothing, \
            Unshared(function, words, grace=60) as process:
        process.connection.send({"jsonrpc": "2.0", "method": "run"}, [
            fd if os.path.exists(f"/proc/self/fd/{fd}") else nothing for fd in range(3)])
        process.connection.timeout = None
        with process.connection.receive() or Message({}, []) as done:
            status = done.value.get("status")
    if not isinstance(status, int):
        raise CstorError("the process in the user namespace ended early, with status "
                         f"{process.close()}")
    return status


def take_over() -> Connection:
    """Take stdin, stdout and stderr of run_unshared(); SIGTERM comes when that ends.

    A signal, since a waiting thread would keep the extraction from forking processes.
    """
    connection = say_hello()
    message = connection.receive()
    if message is None or len(message.fds) != 3:
        raise ProtocolError("stdin, stdout and stderr were not passed")
    with message:
        for number, (fd, name) in enumerate(zip(message.fds, ("stdin", "stdout", "stderr"))):
            os.dup2(fd, number)
            old = getattr(sys, name)  # it has already asked whether it can seek
            setattr(sys, name, open(number, old.mode, encoding=old.encoding, errors=old.errors,
                                    closefd=False))
    sock = connection.socket
    fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sock, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(sock, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    if select.select([sock], [], [], 0)[0]:  # it ended before the signal was set up
        raise ProtocolError("the other end has closed the connection")
    return connection


# -- the helper: who asks ------------------------------------------------------------------------

class Helper(Unshared):
    """Opens files below ``roots`` that this user may not open; ContentServer is the other end.

    Threads and forked processes share it, in turns.  Raises CstorError when the helper has ended.
    """

    is_broken = False  # whether an answer was not read to its end, so that no other can be read
    _turn = -1  # a file locked by whose turn it is, of one byte until that has the whole answer

    def __init__(self, roots: Sequence[str]) -> None:
        super().__init__("serve_contents", roots)
        self._lock = threading.Lock()
        self._turn = os.memfd_create("cstor-turn")

    def close(self) -> int:
        if self._turn >= 0:
            os.close(self._turn)
        self._turn = -1
        return super().close()

    def _call(self, method: str, params: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Return the result of a method and the descriptors that came with it."""
        with self._lock:
            if self._turn < 0:  # another thread found that it is broken
                raise CstorError("the helper in the user namespace has ended")
            fcntl.lockf(self._turn, fcntl.LOCK_EX)
            try:
                if os.fstat(self._turn).st_size:
                    raise ProtocolError("a process was killed while it was asking")
                os.ftruncate(self._turn, 1)
                self._ask(method, params)
                message = self._next()
                os.ftruncate(self._turn, 0)
            except BaseException as error:
                self.is_broken = True
                if not isinstance(error, ProtocolError):
                    raise
                raise CstorError(f"the helper in the user namespace has failed: {error}") from None
            finally:
                fcntl.lockf(self._turn, fcntl.LOCK_UN)
        with message:
            return self._result(message) or {}, message.take()

    @staticmethod
    def _error(error: dict[str, Any]) -> Exception:
        return OSError(code, os.strerror(code)) if isinstance(code := error.get("data"), int) \
            else CstorError(f"the helper refuses: {error.get('message')}")

    def open(self, directory: str, names: Sequence[bytes]) -> list[int]:
        """Open up to AHEAD regular files in a directory.

        Return for each a descriptor, or minus an errno, or minus the type of another kind of file.
        """
        result, fds = self._look_up("open", directory, b"", names=list(map(spell, names)))
        opened = iter(fds)
        return [-code or next(opened) for code in result["codes"]]

    def open_one(self, directory: str, name: bytes) -> int:
        """Open a file as open() does; raise OSError when it cannot be opened."""
        fd = self.open(directory, [name])[0]
        if -stat.S_IFIFO < fd < 0:
            raise self._explain(OSError(-fd, os.strerror(-fd)), directory, name)
        return fd

    def scan(self, directory: str, name: bytes, start: bytes) -> Iterator[tuple[Any, ...]]:
        """Yield (name, status, target, xattrs) of what follows ``start`` in a directory, sorted."""
        more = True
        while more:
            result, _ = self._look_up("scan", directory, name, after=spell(start))
            for row in map(self._read_row, result["rows"]):
                start = row[0]
                yield row
            more = result["more"]

    def look(self, directory: str, name: bytes) -> tuple[Any, ...]:
        """Return what scan() yields of one file."""
        return self._read_row(self._look_up("look", directory, name)[0]["row"])

    def enter(self, directory: str, name: bytes) -> int:
        """Open the directory ``name`` in another one (O_PATH) and return its descriptor."""
        return self._look_up("enter", directory, name)[1].pop()

    def _look_up(self, method: str, directory: str, name: bytes, **more: Any
                 ) -> tuple[dict[str, Any], list[int]]:
        with ErrorsAs(self._explain, directory, name):
            return self._call(method, {"directory": spell(os.fsencode(directory)),
                                       "name": spell(b"" if name == b"." else name), **more})

    @staticmethod
    def _explain(error: OSError, directory: str, name: bytes) -> OSError:
        found = with_path(error, os.path.join(directory, os.fsdecode(name)))
        if isinstance(found, NeedsUnshare):
            found.hint = "its owner is not one of your sub-uids: run it as root"
        return found

    @staticmethod
    def _read_row(row: Sequence[Any]) -> tuple[Any, ...]:
        base, numbers, link, xattrs = row
        more = dict(zip(("st_rdev", "st_mtime_ns", "st_blocks"), numbers[7:]))
        return (unspell(base), os.stat_result((*numbers[:7], 0, 0, 0), more), unspell(link),
                {unspell(key): bytes.fromhex(value) for key, value in xattrs.items()})


class Opener(Closing):
    """Opens the contents of a ProxiedStorage that this user may not, through a Helper.

    All that opens contents of a storage goes through its opener.  Elsewhere it opens nothing, and
    permission denied is NeedsUnshare.
    """

    is_proxied = False  # whether there is a helper
    _helper: Helper | None = None
    _failure: NeedsUnshare | None = None

    def __init__(self, storage: Storage | None = None) -> None:
        self.storage = storage  # whose close() closes it
        self._lock = allocate_lock()  # threads start one helper, not one each

    def helper(self, error: NeedsUnshare) -> Helper:
        """Return the helper, started if need be; raise ``error`` where there is none."""
        if not isinstance(self.storage, ProxiedStorage):
            raise error
        with self._lock:
            if self._helper and self._helper.is_broken:  # said to whom it happened
                self._helper.close()
                self._helper = None
            if self._helper is None and self._failure is None:
                try:
                    self._helper = self._start(self.storage)
                except NeedsUnshare as failure:
                    self._failure = failure
            if self._helper is None:
                why = f": {self._failure}" if str(self._failure) else ""
                raise NeedsUnshare(f"{error}{why}", hint=getattr(self._failure, "hint", ""))
            self.is_proxied = True
            return self._helper

    @staticmethod
    def _start(storage: Storage) -> Helper:
        if hint := why_no_helper(storage):
            raise NeedsUnshare("", hint=hint)
        rootfs = [value["rootfs"] for value in (storage._podman or {}).values()
                  if not value.get("rootfs-refused") and os.path.isdir(value["rootfs"])]
        return Helper([root.path for root in storage.roots] + rootfs)

    def ahead(self, items: Iterable[T], file_of: Callable[[T], tuple[Contents, bytes] | None],
              weigh: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
        """Yield ``items``; the helper opens the files of some before, AHEAD if so many may be.

        ``file_of`` returns an item's directory and the name in it, None for an item without a
        file; ``weigh`` how many files' room an item takes in memory.
        """
        items, most = iter(items), max(min(AHEAD, soft_limit() // 4), 1)
        for first in items:
            if not self.is_proxied:
                yield first
                continue
            batch, room = [first], most - weigh(first)
            for item in items if room > 0 else ():
                batch.append(item)
                if (room := room - weigh(item)) <= 0:
                    break
            self._open_ahead(map(file_of, batch))
            yield from batch

    def _open_ahead(self, files: Iterable[tuple[Contents, bytes] | None]) -> None:
        wanted: dict[Contents, dict[bytes, None]] = {}
        for contents, name in filter(None, files):
            wanted.setdefault(contents, {})[name] = None
        for contents, names in wanted.items():
            contents.keep({})
            if closed := list(filter(contents.is_closed, names)):
                try:
                    fds = self.helper(NeedsUnshare("")).open(contents.path, closed)
                except OSError:  # said of the file that is opened: its layer may have been removed
                    continue
                contents.keep({name: fd for name, fd in zip(closed, fds) if fd >= 0})

    def prepare(self, files: Iterable[tuple[Contents, bytes] | None]) -> None:
        """Start the helper, for forked processes to share it, if one of ``files`` is closed."""
        if any(contents.is_closed(name) for contents, name in filter(None, files)):
            with suppress(NeedsUnshare):  # said when the content is needed
                self.helper(NeedsUnshare(""))

    def close(self) -> None:
        if self._helper:
            self._helper.close()


class ProxiedStorage(Storage):
    """A Storage that opens what this user may not through a helper in his user namespace.

    The helper is started for the first such content, never for metadata, and ends with close();
    ``is_proxied`` tells whether it runs.  Where there can be none, NeedsUnshare says why.
    """


# -- the helper: who answers ---------------------------------------------------------------------

def serve_contents(roots: Sequence[str]) -> int:
    """Answer on stdin what Helper asks, until the other end closes; return the exit status."""
    connection = say_hello(roots=[spell(os.fsencode(root)) for root in roots])
    with suppress(ProtocolError):  # nobody is there any more, or it is not a Helper
        ContentServer(connection, roots).run()
        return 0
    return 1


class ContentServer(Dispatcher):
    """Looks below ``roots`` (host paths) alone; opens files to read, and directories (O_PATH)."""

    METHODS = {name: name for name in ("open", "scan", "look", "enter")}

    def __init__(self, connection: Connection, roots: Sequence[str]) -> None:
        super().__init__(connection)
        self._roots = [Directory.at(root) for root in roots]
        self._directory: Directory | None = None  # the last one asked for
        self._last = b""  # the last name there
        self._listed: tuple[Any, list[bytes]] = None, []  # what is scanned, and its names
        self._maps = id_map("uid_map"), id_map("gid_map")

    def _data(self, error: Exception) -> Any:
        return errno.EACCES if isinstance(error, PermissionError) else \
            getattr(error, "errno", None) or super()._data(error)

    def open(self, params: dict[str, Any]) -> None:
        """Send the descriptors of regular files, and a code for each: 0, an errno, or its type."""
        directory, names = self._open_directory(params), params.get("names")
        if not isinstance(names, list) or len(names) > AHEAD:
            raise ProtocolError(f"names must be a list of at most {AHEAD}", code=BAD_PARAMS)
        found = [self._open(directory, name) for name in [*map(self._name, names)]]
        with Message({}, [fd for fd in found if fd >= 0]) as opened:
            self._reply({"codes": [max(-fd, 0) for fd in found]}, opened.fds)

    def enter(self, params: dict[str, Any]) -> None:
        directory, name = self._look_below(params)
        with Opened(open_in_root(directory.fd, name)) as fd:
            self._reply({}, [fd])

    def look(self, params: dict[str, Any]) -> dict[str, Any]:
        directory, name = self._look_below(params)
        if not (seen := directory.inspect(name)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return {"row": self._row(name, seen)}

    def scan(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return rows [name, numbers, link, xattrs] of some files, and whether there are more."""
        directory, name = self._look_below(params)
        after = self._name(params.get("after"))
        rows: list[Any] = []
        size = 0
        place, folder = (directory.path, name), directory.parent(name)
        if not after or self._listed[0] != place:
            self._listed = place, directory.list_at(folder)
        for base in self._listed[1]:
            if size > CHUNK:
                return {"rows": rows, "more": True}
            if base > after and (found := look_at(folder, base)):
                rows.append(self._row(base, found))
                size += 256 + len(base) + sum(map(len, found[2].values()))
        return {"rows": rows, "more": False}

    @staticmethod
    def _name(text: Any) -> bytes:
        if not isinstance(text, str) or len(text) > 4 * MAX_PATH:
            raise ProtocolError("a name is not a string, or is too long", code=BAD_PARAMS)
        return unspell(text)

    def _look_below(self, params: dict[str, Any]) -> tuple[Directory, bytes]:
        """Return the directory and the clean name; a walk finds what is there when it begins."""
        name = self._name(params.get("name"))
        if clean_name(name) != name:
            raise ProtocolError("the name is not clean", code=BAD_PARAMS)
        last, self._last = self._last, name
        return self._open_directory(params, not name.startswith(last + b"/")), name

    def _open_directory(self, params: dict[str, Any], again: bool = False) -> Directory:
        path = self._name(params.get("directory"))
        if self._directory and os.fsencode(self._directory.path) == path and not again:
            return self._directory
        for root in self._roots:
            top = os.fsencode(root.path).rstrip(b"/")
            rest = path[len(top) + 1:]
            if path == top or path.startswith(top + b"/") and clean_name(rest) == rest:
                self._directory = Directory(os.fsdecode(path), open_in_root(root.fd, rest))
                return self._directory
        raise ProtocolError(f"{display(path[:200])} is outside the storage", code=BAD_PARAMS)

    @staticmethod
    def _open(directory: Directory, name: bytes) -> int:
        """Open a regular file; return its descriptor, or a negative number as Helper.open()."""
        try:
            if not name or clean_name(name) != name:
                return -errno.EINVAL
            fd = directory.open_near(name)
            if fd < 0 or stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)  # another file has just taken its place
            return -errno.EAGAIN
        except OSError as error:
            return -(error.errno or errno.EACCES)  # NeedsUnshare has no number
        except FormatError:
            return -errno.EINVAL

    def _row(self, name: bytes, found: tuple[os.stat_result, bytes, dict[bytes, bytes]]
             ) -> list[Any]:
        status, link, xattrs = found
        numbers = [*status[:7], status.st_rdev, status.st_mtime_ns, status.st_blocks]
        numbers[4:6] = [map_id(number, ranges, number)  # user and group
                        for number, ranges in zip(numbers[4:6], self._maps)]
        return [spell(name), numbers, spell(link),
                {spell(key): value.hex() for key, value in xattrs.items()}]


# ================================================================================================
# 24. Check
#
# verify reads all that layers and images hold.  One damage is one finding, whatever it causes.
# ================================================================================================

FINDING = ("code", "severity", "kind", "object", "path", "message", "expected", "actual", "affects",
           "mend")
# By code: severity, what finds it (v: verify, q: verify --quick, c: store check), kind, meaning.
CODES = {
    "file-missing": ("damage", "vq", "missing", "a file of the layer is missing"),
    "file-truncated": ("damage", "vq", "truncated", "a file is shorter than recorded"),
    "file-longer": ("damage", "vq", "longer", "a file is longer than recorded"),
    "file-changed": ("damage", "v", "changed", "a file's content is not as recorded"),
    "file-type": ("damage", "vq", "wrong type", "something else is in place of a file"),
    "file-unreadable": ("damage", "v", "changed", "a file cannot be read"),
    "header-damaged": ("damage", "vq", "metadata", "a tar header in the tar-split data is damaged"),
    "tar-split-missing": ("damage", "vqc", "missing", "the layer's tar-split data are missing"),
    "tar-split-empty": ("damage", "vqc", "truncated", "the layer's tar-split data are empty"),
    "tar-split-damaged": ("damage", "vq", "changed", "the tar-split data cannot be read"),
    "tar-split-wrong": ("damage", "vq", "metadata", "tar-split data and the record disagree"),
    "layer-incomplete": ("waste", "vqc", "truncated", "a layer's creation or removal was cut off"),
    "layer-dir-missing": ("damage", "vqc", "missing", "the layer's directory is missing"),
    "layer-dir-empty": ("damage", "vqc", "missing", "the layer's directory is empty"),
    "diff-missing": ("damage", "vqc", "missing", "the directory of the layer's files is missing"),
    "diff-empty": ("damage", "vqc", "missing", "the directory of the layer's files is empty"),
    "big-data-missing": ("damage", "vqc", "missing", "an image's manifest, say, is missing"),
    "big-data-truncated": ("damage", "vqc", "truncated", "an image's manifest, say, is shorter"),
    "big-data-longer": ("damage", "vqc", "longer", "an image's manifest, say, is longer"),
    "big-data-changed": ("damage", "vqc", "changed", "an image's manifest, say, has changed"),
    "name-digest-wrong": ("damage", "vqc", "metadata", "an image's name has another's digest"),
    "image-layers-wrong": ("damage", "vqc", "metadata", "its configuration names other layers"),
    "layer-unknown": ("damage", "vqc", "missing", "a record names a layer that has none"),
    "json-damaged": ("damage", "c", "changed", "a file of records cannot be read"),
    "database-damaged": ("damage", "c", "changed", "podman's database cannot be read"),
    "records-lost": ("damage", "c", "missing", "records are missing of what is still there"),
    "id-twice": ("damage", "c", "metadata", "two records of one store have the same ID"),
    "name-twice": ("damage", "c", "metadata", "two records of one store have the same name"),
    "record-malformed": ("damage", "c", "metadata", "a field of a record is malformed"),
    "layer-record-lost": ("damage", "c", "missing", "a layer that is needed has no record"),
    "image-record-lost": ("damage", "c", "missing", "an image that is needed has no record"),
    "image-unknown": ("damage", "c", "missing", "a container's image has no record"),
    "parent-wrong": ("damage", "c", "metadata", "a layer's record names the wrong parent"),
    "parent-cycle": ("damage", "c", "metadata", "layers are each other's parents, or too many"),
    "container-layer-wrong": ("damage", "c", "metadata", "a container's layer is not its image's"),
    "link-missing": ("damage", "c", "missing", "a layer's short link is missing or malformed"),
    "link-wrong": ("damage", "c", "metadata", "a layer's short link is another layer's"),
    "l-missing": ("damage", "c", "missing", "a short link in overlay/l is missing"),
    "l-wrong": ("damage", "c", "metadata", "a short link in overlay/l leads to another layer"),
    "lower-missing": ("damage", "c", "missing", "a layer's chain of lower layers is missing"),
    "lower-wrong": ("damage", "c", "metadata", "a layer's chain of lower layers is not its own"),
    "mode-wrong": ("damage", "c", "metadata", "the owner of the store lacks permission"),
    "owner-wrong": ("damage", "c", "metadata", "another user owns records of the store"),
    **dict.fromkeys(("layer-orphan", "image-orphan", "container-orphan"),
                    ("waste", "c", "unused", "its files have no record (--salvage)")),
    "big-data-orphan": ("waste", "c", "unused", "an item that no record names"),
    "l-orphan": ("waste", "c", "unused", "a short link in overlay/l leads to no layer"),
    "temporary": ("waste", "c", "unused", "what an interrupted command left behind"),
    "id-shared": ("note", "c", "metadata", "another store has a record of the same ID"),
    "directory-linked": ("note", "c", "metadata", "a directory is a symbolic link, not followed"),
    "id-unusable": ("note", "c", "metadata", "a record's ID cannot be a file name"),
    "not-verified": ("note", "vq", "metadata", "the storage does not keep what would prove it")}
SUMMED = 1024  # small files whose CRC-64s are compared at once, each times another power of x


class Finding:
    """What verify() and check() find; as_json() returns all of it.

    ``code`` is one of CODES.  ``severity`` is damage, waste (bytes that nothing uses) or note;
    ``kind`` is missing, truncated, longer, changed, wrong type, metadata or unused.  ``object``
    names a layer, image or container by its ID, ``path`` a file in it or of the storage.
    ``expected`` and ``actual`` are words, ``affects`` the objects that need this one, ``mend`` is
    for podman, ``offset`` a place in the layer's tar.  All are None where they do not apply.
    """

    __slots__ = (*FINDING, "layer", "images", "offset", "bytes")

    def __init__(self, code: str, what: str, path: str | None = None, expected: Any = None,
                 actual: Any = None, message: str = "", offset: int | None = None,
                 size: int | None = None) -> None:
        self.code, self.object, self.path, self.offset, self.bytes = code, what, path, offset, size
        self.severity, _, self.kind, meaning = CODES[code]
        self.message, self.expected, self.actual = message or meaning, expected, actual
        self.layer: str | None = what[6:] if what.startswith("layer ") else None
        self.affects: list[str] | None = None
        self.images: list[str] | None = None
        self.mend: str | None = None

    def row(self) -> tuple[Any, ...]:
        """Return the arguments that make it again, in another process."""
        return (self.code, self.object, self.path, self.expected, self.actual, self.message,
                self.offset, self.bytes)

    def as_json(self) -> dict[str, Any]:
        """Return what `--format json` prints."""
        return {key: value for key in self.__slots__
                if (value := getattr(self, key)) is not None or key in FINDING}

    def concern(self, users: Mapping[str, Sequence[Record]]) -> Finding:
        """Say what needs the object, and how podman mends its damage; see users_of()."""
        records = users.get(self.object, ())
        images = {record.id: record for record in records if isinstance(record, Image)}
        self.affects = [record.label for record in records if not isinstance(record, Layer)
                        and record.label != self.object] or self.affects
        self.images = list(images) if self.layer else None
        if images and self.severity == "damage":
            pulls = [f"podman pull {name}" for image in images.values() for name in image.names]
            self.mend = " && ".join([f"podman rmi -f {' '.join(images)}", *pulls])
        return self


def users_of(storage: Storage) -> dict[str, list[Record]]:
    """Return, by "layer ID" and "image ID", the objects that need each, an image itself first."""
    found: dict[str, list[Record]] = {}
    records: list[Any] = []
    for get in (storage.layers, storage.images, storage.containers):
        with suppress(CstorError):  # said where the file is read
            records += get()
    parents = {record.id: record.parent for record in records if isinstance(record, Layer)}
    for record in records:
        if not isinstance(record, Layer):
            found.setdefault(f"image {getattr(record, 'image', record.id)}", []).append(record)
        for layer_id in [record.parent if isinstance(record, Layer) else record.layer,
                         *getattr(record, "mapped_layers", ())]:
            seen = {""}
            while layer_id not in seen:
                found.setdefault(f"layer {layer_id}", []).append(record)
                seen.add(layer_id)
                layer_id = parents.get(layer_id, "")
    return found


def check_image(image: Image) -> Iterator[Finding]:
    """Compare an image's big data, names and chain of layers with its record."""
    damaged = set()
    for key in image.big_data_names if is_safe_id(image.id) else ():
        name, digest = image.path(big_data_file(key)), re.sub("^manifest-", "", key)
        try:
            data = image.big_data(key)
            if re.fullmatch("sha256:" + HEX64, digest) and not is_schema1(data) \
                    and (actual := sha256_digest(data)) != digest:
                raise IntegrityError("wrong digest", expected=digest, actual=actual)
            continue
        except IntegrityError as error:
            code = "changed" if not error.expected.isdigit() else "longer" if int(error.expected) \
                < int(error.actual) else "truncated"
            told: Any = [error.expected, error.actual]
        except FormatError as error:
            code = "changed" if image.root.exists(name) else "missing"
            told = ["", "", str(error)]
        damaged.add(key)
        yield Finding(f"big-data-{code}", image.label, image.root.host_path(name), *told)
    for title in image.names:
        if "@" in title and title.rpartition("@")[2] not in image.digests:
            yield Finding("name-digest-wrong", image.label, None, actual=title)
    if not any(re.match("manifest$|sha256:", key) for key in damaged):
        yield from check_chain(image)


def check_chain(image: Image) -> Iterator[Finding]:
    """Compare an image's layers with its configuration."""
    try:
        with suppress(Unsupported):  # it was made with no configuration
            if image.layer and "manifest" in image.big_data_names:
                image.config()
            image._chain()
    except IntegrityError as error:
        yield Finding("image-layers-wrong", image.label, None, error.expected, error.actual)
    except FormatError as error:
        yield Finding("image-layers-wrong", image.label, message=str(error))
    except NotFound as error:
        what = "layer-unknown" if isinstance(error, LayerUnknown) else "big-data-missing"
        yield Finding(what, image.label, message=str(error))


def layer_files(layer: Layer) -> list[Finding]:
    """Return what lstat(2) finds missing of a layer first: its directories, its tar-split data."""
    if not is_safe_id(layer.id):
        return [Finding("not-verified", layer.label, message="unusable ID")]
    if layer.incomplete:
        return [Finding("layer-incomplete", layer.label, message=layer.UNFINISHED)]
    return [Finding(f"{code}-{word}", layer.label, layer.root.host_path(place))
            for code, place, word in layer.gaps() if code != "link"][:1]


class LayerCheck:
    """Finds all damages of one layer's files and tar-split data; run() yields them.

    One reading compares types, sizes, headers and the digest of the tar, and sums of CRC-64s for
    many small files at once; where something is wrong, a second one looks at each file by itself.
    ``quick`` reads no content, and at first parses no headers of the usual form.  Two processes can
    share the work: ``part`` 0 computes the digest, 1 most of the sums.
    """

    def __init__(self, layer: Layer, quick: bool = False, progress: Progress | None = None,
                 part: int = -1) -> None:
        self.layer, self.quick, self._progress, self._part = layer, quick, progress, part
        self.label = layer.label
        self._sums: dict[int, int] | None = None  # by the number of bits of a file's size
        self._digest = ""  # of the tar; "" when none could be made
        self._count = self._contents = 0
        self._tree: Tree | None = None
        self.ahead = False  # see LayerReader

    def run(self, *, summing: bool = True) -> Iterator[Finding]:
        """Yield all findings.  Raises NeedsUnshare, and LayerUnknown when the layer is removed."""
        found, size = layer_files(self.layer), None
        if found:
            yield from found
            return
        if self.layer.lost and not self.layer.diff_digest:
            yield Finding("not-verified", self.label, message="its record is lost, and no image "
                          "that was found is of it: nothing tells its DiffID")
        self._sums = {} if summing else None
        try:
            for finding in self._read(self.layer):
                found.append(finding)
            if self._part < 1 and not (found or self.quick or self._digest):  # sparse files
                self._digest = self._sink().take_all(self.layer.pieces())
            if self._sums is not None and self._digest \
                    and self.layer.diff_digest not in (self._digest, ""):
                raise IntegrityError("")  # a header, say
        except (FormatError, IntegrityError, Unsupported) as error:
            size = error if isinstance(error, IntegrityError) else None  # the tar's is wrong
            if summing and not (size and size.expected):
                yield from self.run(summing=False)  # a sum is wrong, or was not compared yet
                return
            if not size:
                yield from found
                yield Finding("tar-split-damaged" if isinstance(error, FormatError)
                              else "not-verified", self.label,
                              message=str(error).replace(f"{self.label} ", ""))
                return
        yield from self._judge(found, size)

    @staticmethod
    def _fits(files: LayerFiles, name: bytes, kind: str, size: int, *more: Any) -> bool:
        """Compare type and size of a file with its header; a whiteout can be anything."""
        if b".wh." in name and not size:
            return True
        status = files.status(name.rstrip(b"/"))
        if not status or stat.S_IFMT(status.st_mode) != FILE_TYPES[kind]:
            return False
        if kind == "reg" and size > status.st_blocks * 512:  # sparse, or a stub
            try:
                os.close(files.open(name, size))
            except (CstorError, OSError):
                return False
        return kind == "dir" or status.st_size == (size or len(more[-1]))

    def _sink(self) -> TarSink:
        return TarSink(None, hashing=True, layer=self.layer.id, progress=self._progress)

    def _read(self, place: Layer) -> Iterator[Finding]:
        """Yield the findings of each member by itself, with the files of ``place``."""
        # Raises IntegrityError for what has to be looked at once more.
        lost: tuple[bytes, ...] = ()
        offset = self._contents = 0
        sink = None if self.quick or self._part > 0 else self._sink()
        reader, is_first = LayerReader(self.layer), self.quick and self._sums is not None
        reader.ahead = self.ahead and is_first
        with LayerFiles(place) as files, closing(reader.headers(
                PlainHeaders() if is_first and files.is_plain else None)) as items, \
                OnError(lambda: sink.abort() if sink else None):
            for literal, member, rows in items if self.quick else place.storage.opener.ahead(
                    items, lambda item: files.where(item[1].name)
                    if item[1] and item[1].stored else None):
                if isinstance(rows, list) and not (
                        all(self._fits(files, *row) for row in rows) and files.is_plain):
                    raise IntegrityError("")
                offset += len(literal)
                if sink:
                    sink.literal(literal)
                if not member or member.name.startswith(lost):
                    continue
                found = self._header(member) or (self._content(files, member, sink) if member.stored
                                                 else self._look(files, member))
                if found and is_first:
                    raise IntegrityError("")
                if found:
                    found.path = spell(member.name)
                    found.offset = offset - len(member.header) * (found.code == "header-damaged")
                    lost += (member.name.rstrip(b"/") + b"/",) * (member.type == "dir")
                    yield found
                if sink and (found or member.sparse is not None):
                    sink.abort()
                    sink = None
                offset += member.stored
            self._settle()
            self._digest = sink.finish() if sink else ""

    def _header(self, member: Member) -> Finding | None:
        """Compare the checksums of headers, unless the digest of the tar tells all the same."""
        if self._sums is not None and not self.quick:
            return None
        try:
            for _, _, block, _ in header_blocks(member.header):
                check_sum(block)
        except FormatError as error:
            return Finding("header-damaged", self.label, message=str(error))
        return None

    def _content(self, files: LayerFiles, member: Member, sink: TarSink | None) -> Finding | None:
        """Compare a file's type and size, and unless ``quick`` its CRC-64."""
        self._contents += 1
        mine = self._part < 0 or (self._part > 0) == (self._contents % 4 > 0)
        if not (mine or sink) or self.quick and files.find(member.name, member.size):
            return None
        try:
            with Opened(files.open(member.name, member.size)) as fd:
                for data in () if self.quick else self._chunks(fd, member, mine):
                    if sink:
                        sink.literal(data)
        except IntegrityError as error:
            if not error.expected and not error.name:
                raise
            code = "changed" if error.expected.startswith("CRC") else "type" \
                if error.expected == "regular file" else "missing" if not error.expected else \
                "longer" if int(error.actual) > member.size else "truncated"
            return Finding(f"file-{code}", self.label, None, error.expected or None,
                           error.actual or None)
        except (NeedsUnshare, LayerUnknown):
            raise
        except Unsupported as error:
            return Finding("not-verified", self.label, message=str(error))
        except OSError as error:
            return Finding("file-unreadable", self.label, message=str(error.strerror))
        return None

    def _chunks(self, fd: int, member: Member, mine: bool) -> Iterator[bytes]:
        """Yield a content; IntegrityError for a wrong CRC-64, or after many files for a wrong sum.

        The CRC-64 of n bits M is M·x^64 + ones·x^n modulo P, plus ones: the sum of that and the
        recorded one is zero, also times x.  Files of a size class end at the same bit.
        """
        size = member.size
        if size > CHUNK or self._sums is None or not mine:
            yield from read_checked(fd, size, checksum=member.checksum if mine else None,
                                    name=member.name)
            return
        if len(data := os.pread(fd, size, 0)) != size:
            raise IntegrityError("")
        bits, checksum = size.bit_length(), member.checksum or 0
        at = (8 << bits) + SUMMED - self._count
        self._sums[bits] = self._sums.get(bits, 0) ^ (
            int.from_bytes(data, "little") ^ _ONES) << at - 8 * size ^ (checksum ^ _ONES) << at
        self._count += 1
        if self._count == SUMMED:
            self._settle()
        yield data

    def _settle(self) -> None:
        """Raise IntegrityError unless all sums are zero modulo P."""
        for bits, rest in (self._sums or {}).items():
            used = (8 << bits) + SUMMED + 64
            width = 1 << (used - 1).bit_length()
            rest <<= width - used
            while width > 64:
                width //= 2
                rest = _fold(rest & (1 << width) - 1, width) ^ rest >> width
            if rest:
                raise IntegrityError("")
        self._sums, self._count = self._sums and {}, 0

    def _look(self, files: LayerFiles, member: Member) -> Finding | None:
        """Compare type and size of what has no content in the tar; rootless stores lack devices."""
        name, kind = member.name.rstrip(b"/"), member.type
        if self._part > 0 or kind not in ("reg", "dir", "symlink", "hardlink") \
                or b".wh." in name or not files.is_plain or not clean_name(name):
            return None
        status = files.status(name)
        have, size = (stat.S_IFMT(status.st_mode), status.st_size) if status else (0, 0)
        if have == FILE_TYPES.get(kind) and (kind == "dir" or size == len(member.linkname)) \
                or kind == "hardlink" and have == stat.S_IFREG:
            return None
        with suppress(NotFound):  # another member, or a link on the way, can have changed it
            self._tree = self._tree or self.layer.tree()
            node = self._tree.lookup(clean_name(name), follow=False)[1]
            wanted = {"reg": node.size, "dir": size, "symlink": len(node.linkname)}.get(node.type)
            if wanted is not None and have != FILE_TYPES[node.type]:
                return Finding("file-type" if have else "file-missing", self.label, None,
                               file_type(FILE_TYPES[node.type]), file_type(have) if have else None)
            if wanted not in (None, size):
                return Finding("file-longer" if size > wanted else "file-truncated", self.label,
                               None, str(wanted), str(size))
        return None

    def _judge(self, found: list[Finding], size: IntegrityError | None) -> Iterator[Finding]:
        """Yield the findings of files, or the one that they follow from."""
        layer = self.layer
        bad = sum(finding.code.startswith("file-") for finding in found)
        owner = self._owner() if bad and bad == self._contents else ""
        expected, actual = (size.expected, size.actual) if size else (
            layer.diff_digest, f"the files of layer {owner}" if owner else self._digest)
        if size or owner or not found and actual and expected not in (actual, ""):
            yield Finding("tar-split-wrong", self.label, layer.root.host_path(layer.tar_split),
                          expected, actual)
        if not owner and (not size or 2 * bad < self._contents):
            yield from found

    def _owner(self) -> str:
        """Return the ID of another layer whose files are those that the tar-split data tell of."""
        layer, self._sums = self.layer, None
        for other in layer.storage.layers():
            if other.diff_size == layer.diff_size and other.diff_digest not in (
                    layer.diff_digest, "") and not layer_files(other) \
                    and not any(self._read(other)):
                return other.id
        return ""


def verify_layers(layers: Sequence[Layer], *, quick: bool = False, workers: int = 0,
                  progress: Progress | None = None) -> list[Finding]:
    """Return the damages of layers, which several processes share out; see LayerCheck.

    ``progress`` is called in this process alone, with the sums of all.
    """
    workers, here = workers or default_workers(), os.getpid()
    jobs: list[tuple[int, int]] = []
    large = max(16 * CHUNK, sum(layer.diff_size for layer in layers) // workers)
    for number in sorted(range(len(layers)), key=lambda number: -layers[number].diff_size):
        shared = workers > 1 and not quick and layers[number].diff_size > large
        jobs += [(number, 0), (number, 1)] if shared else [(number, -1)]
    rows: list[tuple[Any, ...]] = []
    done = memoryview(mmap.mmap(-1, 16 * len(jobs) or 16)).cast("q")  # bytes and files of each job

    def tell_all() -> None:
        if progress and os.getpid() == here:
            progress(sum(done[::2]), sum(done[1::2]))

    def work(job: int) -> None:
        def tell(size: int, files: int) -> None:
            if size > done[2 * job]:  # less when a layer is read again
                done[2 * job], done[2 * job + 1] = size, files
            tell_all()

        number, part = jobs[job]
        check = LayerCheck(layers[number], quick, tell if progress else None, part)
        check.ahead = layers[number].diff_size > large
        found = check.run()
        if part >= 0 and next(found, None):  # look at it as a whole; the other process may, too
            found = LayerCheck(layers[number]).run()
        rows.extend((number, *finding.row()) for finding in found)

    reports = share_out(len(jobs), min(workers, len(jobs)), work, lambda: rows, lambda job: None)
    tell_all()
    rows += chain.from_iterable(reports)
    for number in {row[0] for row in rows}:
        if gone := layers[number].removed():
            raise gone
    users = users_of(layers[0].storage) if rows else {}
    return [Finding(*row[1:]).concern(users)
            for row in sorted(dict.fromkeys(rows), key=lambda row: row[0])]


def layers_of(images: Sequence[Image]) -> list[Layer]:
    """Return the layers of images, each once; those of a broken chain are left out."""
    layers: dict[str, Layer] = {}
    for image in images:
        with suppress(LayerUnknown, FormatError):  # check_image() finds it
            layers.update((layer.id, layer) for layer in image.layers())
    return list(layers.values())


def verify_images(images: Sequence[Image], *, quick: bool = False, workers: int = 0,
                  progress: Progress | None = None) -> list[Finding]:
    """Return the damages of images and their layers; see verify_layers()."""
    users = users_of(images[0].storage) if images else {}
    found = []
    for image in images:
        damages = [finding.concern(users) for finding in check_image(image)]
        if damages and not image.storage.is_current(image):
            raise ImageUnknown(f"image not known: {image.id}: it was removed while it was read")
        found += damages
    return found + verify_layers(layers_of(images), quick=quick, workers=workers, progress=progress)


def refused_fields(record: Record) -> Iterator[str]:
    """Yield what podman refuses, with all records of the file, in fields that are read as text."""
    fields = record._fields
    for key, kind in (("uidset", list), ("gidset", list), ("compression", int),
                      ("compressed-size", int), ("mountlabel", str)
                      ) if isinstance(record, Layer) else ():
        if not isinstance(fields.get(key), (kind, type(None))):
            yield f'field "{key}" must be of type {kind.__name__}'
    if isinstance(fields.get("created"), str):
        try:
            parse_time(record.created)
        except FormatError as error:
            yield f'field "created": {error}'
    own = {"digest": fields.get("digest")} if isinstance(record, Image) else {}
    for key, digest in {**own, **record._digests}.items():
        if isinstance(digest, str) and not re.fullmatch(
                f"|sha256:{HEX64}|sha384:[0-9a-f]{{96}}|sha512:[0-9a-f]{{128}}", digest):
            yield f'field "{display(key)}" is not a digest: "{display(digest)}"'
    for name in record.names if isinstance(record, Image) else ():
        if not re.fullmatch(f"{REPOSITORY_NAME}(:{TAG})?(@{DIGEST})?", name):
            yield f'field "names": not a name that an image can have: "{display(name)}"'
    if isinstance(record, Layer) and record.diff_size < -1:
        yield f'field "diff-size" is {record.diff_size}'


class StoreCheck:
    """Compares all records of a storage with what is on its disk; run() returns the findings.

    No content is read, and of tar-split data the first bytes alone.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.found: list[Finding] = []
        self.users = users_of(storage)
        self.explained: set[Record] = set()  # records whose layers another finding speaks of
        self.known: dict[str, set[str]] = {}  # IDs by kind; none where records are lost
        self.links: dict[str, str] = {}  # by layer, as its file "link" says
        self.lowers: dict[str, list[list[str]]] = {}  # by layer, as "lower", "lower-layers" say
        self.named: dict[str, str] = {}  # layers by their names in overlay/l

    def add(self, code: str, what: str, path: str | None = None, expected: Any = None,
            actual: Any = None, message: str = "", size: int | None = None) -> None:
        """Take a finding."""
        self.found.append(Finding(code, what, path, expected, actual, message, size=size))

    def run(self) -> list[Finding]:
        storage = self.storage
        layers, images, containers = map(self._records, (Layer, Image, Container))
        if "layer" in self.known:
            self._references([*layers, *images, *containers])
            self._layers(() if storage.linked else layers)
        for path in storage.linked:
            self.add("directory-linked", "store", path)
        storage.podman_containers()
        if isinstance(storage.database_error, FormatError):
            self.add("database-damaged", "containers", storage.database_error.file,
                     message=str(storage.database_error))
        for image in images:
            for finding in check_image(image):
                of_layers = finding.code in ("layer-unknown", "image-layers-wrong")
                if not of_layers or image not in self.explained and "layer" in self.known:
                    self.found.append(finding)
                    self.explained.update([image] * of_layers)
            if image.root in storage._own and is_safe_id(image.id) and not isinstance(
                    image._fields.get("big-data-names"), (int, str, dict)):
                self._items(image)
        for container in containers if len(self.known) > 2 else ():
            self._container(container)
        self._strays()
        for finding in self.found:
            finding.concern(self.users)
            if finding.code == "layer-incomplete" and finding.affects:
                finding.severity = "damage"
        return self.found

    def _records(self, new: type[Record]) -> Any:
        """Look at the files of one kind of records, and return the records."""
        word, home, storage = new.WORD, self.storage.home(new.WORD), self.storage
        try:
            records = getattr(storage, word + "s")()
        except FormatError as error:
            self.add("json-damaged", f"{word}s", error.file, message=str(error))
            return ()
        is_blank = True
        places: dict[str, str] = {}  # roots by IDs
        for root in filter(None, [*storage.roots, storage._run]):
            seen: set[str] = set()
            for name in (f"{word}s.json", f"volatile-{word}s.json"):
                file = home + b"/" + name.encode()
                data, path = _read_json(root, file).strip(), root.host_path(file)
                is_blank &= not data or name[0] == "v"
                for item in map(as_dict, as_list(parse_json(data or b"[]", name))):
                    if not isinstance(item.get("id"), str):  # said of the record itself
                        continue
                    keys = [item["id"], *map(str, as_list(item.get("names")))]
                    is_new = keys[0] not in seen
                    if is_new and places.setdefault(keys[0], root.path) != root.path:
                        self.add("id-shared", f"{word} {keys[0]}", path, actual=places[keys[0]])
                    for key in keys if is_new else keys[:1]:
                        if key in seen:
                            self.add("name-twice" if is_new else "id-twice", f"{word} {keys[0]}",
                                     path, actual=key)
                        seen.add(key)
        there = storage.strays(word * (new is not Layer), records) if is_blank else ()
        if there:
            self.add("records-lost", f"{word}s", actual=counted(len(there), word))
        else:
            self.known[word] = {record.id for record in records}
        for record in records:
            for fault in chain(record._faults, refused_fields(record)):
                if fault.startswith(("field", "the record", "unusable ID")):
                    self.add("id-unusable" if record.id and not is_safe_id(record.id)
                             else "record-malformed", record.label, message=fault)
                    self.explained.update([record], self.users.get(record.label, ()))
        return records

    def _references(self, records: Sequence[Any]) -> None:
        """Look for layers that records name and that have none."""
        missing: dict[str, Record] = {}  # the first record that names each
        for record in records:
            layer_id = record.parent if isinstance(record, Layer) else record.layer
            if layer_id and not self.storage.layer_by_id(layer_id):
                missing.setdefault(layer_id, record)
        for layer_id, record in missing.items():
            self.explained.update(self.users[f"layer {layer_id}"])
            if not self._is_lost("layer", layer_id):
                self.add("layer-unknown", record.label, actual=layer_id)
                self.found[-1].affects = [each.label for each in self.users[f"layer {layer_id}"]
                                          if each is not record]

    def _is_lost(self, word: str, record_id: str) -> bool:
        """Tell whether there are files of an object that is needed and has no record."""
        self.known[word].add(record_id)
        name = os.fsencode(record_id) if is_safe_id(record_id) else b""
        for place in (self.storage.home(word * (word != "layer")) + b"/" + name,
                      self.storage.home(word) + b"/" + name + TAR_SPLIT):
            if name and (root := self.storage.find(place)):
                self.add(f"{word}-record-lost", f"{word} {record_id}", root.host_path(place))
                return True
        return False

    def _container(self, container: Container) -> None:
        if container in self.explained:
            return
        image = next((image for image in self.users.get(f"image {container.image}", ())
                      if isinstance(image, Image)), None)
        if not image and container.image and container.image not in self.known["image"]:
            if not self._is_lost("image", container.image):  # one finding for all containers of it
                self.add("image-unknown", container.label, actual=container.image)
        elif image and image.layer and image not in self.explained:
            below = {layer.id for layer in self.storage.chain(container.layer)[:-1]}
            if below.isdisjoint([image.layer, *image.mapped_layers]):
                self.add("container-layer-wrong", container.label, None, image.layer,
                         container.layer)

    def _layers(self, layers: Sequence[Layer]) -> None:
        """Look at the directories, tar-split data and links of layers, parents first."""
        storage, home = self.storage, self.storage.home() + b"/l"
        for root in storage.roots if storage.driver == "overlay" else ():
            for name in root.names(home):
                with suppress(OSError):
                    above = os.path.dirname(root.readlink(home + b"/" + name))
                    self.named[os.fsdecode(name)] = os.fsdecode(os.path.basename(above))
        parents: list[tuple[Layer, list[str]]] = []  # of each layer, the nearest first
        for layer in layers:
            try:
                if is_safe_id(layer.id) and self._files(layer):
                    parents.append((layer, [each.id for each in storage.chain(layer.id)[-2::-1]]))
            except LayerUnknown:  # said by _references()
                pass
            except NeedsUnshare as error:
                self.add("not-verified", layer.label, message=str(error))
            except FormatError as error:
                if layer not in self.explained:
                    self.add("parent-cycle", layer.label, message=str(error))
                self.explained.update(self.users[layer.label], [layer])
        heads = {layer.parent: lower[0][2:] for layer, _ in parents if not layer.mapped
                 for lower in self.lowers[layer.id][:1] if lower}
        for layer, below in sorted(parents, key=lambda pair: len(pair[1])):
            self._link(layer, heads)
            if layer not in self.explained and not layer.mapped:
                self._lower(layer, below)

    def _files(self, layer: Layer) -> bool:
        """Read the small files of a layer; tell whether there are links and lowers to compare."""
        found = layer_files(layer)
        if not found:
            with suppress(Unsupported):  # it has no tar-split data
                head, path = b"", layer.root.host_path(layer.tar_split)
                with suppress(zlib.error, FormatError):
                    fd, path = layer.open_tar_split()
                    with Opened(fd):
                        head = zlib.decompressobj(31).decompress(os.read(fd, BLOCK), 64)
                if head.lstrip()[:1] != b"{":
                    self.add("tar-split-damaged", layer.label, path)
        self.found += found
        if found or self.storage.driver != "overlay":
            return False
        texts = []
        for name in (b"link", b"lower", b"lower-layers"):
            try:
                texts.append(layer.read_overlay_file(name))
            except FormatError:  # another type of file, or too large
                texts.append("?")
        self.links[layer.id] = texts[0]
        self.lowers[layer.id] = [list(filter(None, text.split(":"))) for text in texts[1:]]
        return True

    def _link(self, layer: Layer, heads: Mapping[str, str]) -> None:
        """Compare a layer's short link with overlay/l; layers above tell which of two is wrong."""
        what, link = layer.label, self.links[layer.id]
        if self.named.get(link) == layer.id:
            return
        file, place = (layer.root.host_path(self.storage.home() + name.encode())
                       for name in (f"/{layer.id}/link", f"/l/{link}"))
        mine = [name for name, found in self.named.items() if found == layer.id]
        if not re.fullmatch(LINK_ID, link):
            self.add("link-missing", what, file, mine[0] if mine else None, link)
        elif link not in self.named and not mine:
            self.add("l-missing", what, place)
        elif link not in mine:
            head, other = heads.get(layer.id), heads.get(self.named.get(link, ""))
            is_link = bool(mine) and head != link and (head is not None or other in (None, link))
            self.add(*(("link-wrong", what, file, mine[0], link) if is_link else
                       ("l-wrong", what, place, layer.id, self.named.get(link))))

    def _lower(self, layer: Layer, chain: list[str]) -> None:
        """Compare a layer's chain on disk with its parents; its images tell which is wrong."""
        def is_called(item: str, layer_id: str) -> bool:
            name = item[2:]
            return self.links.get(layer_id) == name or self.named.get(name) == layer_id \
                or re.fullmatch("l/" + LINK_ID, item) is not None and name not in self.named \
                and name not in self.links.values()

        lower, ids = self.lowers[layer.id]
        depth = next((number for number, layer_id in enumerate(chain)
                      if self.storage._layer_by_id[layer_id].mapped), len(chain))
        is_right = all(map(is_called, lower[:depth], chain)) and (
            len(lower) == len(chain) or depth < len(chain))
        wrong = ["lower"] * (not is_right) + ["lower-layers"] * (
            ids != [] and ids[:depth] != chain[:depth])
        above = self.users.get(layer.label, [])
        if not wrong:
            return
        if len(wrong) > 1 or any(finding.code == "image-layers-wrong" for record in above
                                 if isinstance(record, Image) for finding in check_chain(record)):
            self.add("parent-wrong", layer.label, actual=layer.parent)
        else:
            self.add("lower-wrong" if lower or wrong[0] != "lower" else "lower-missing",
                     layer.label, layer.root.host_path(layer.path(wrong[0].encode(),
                                                                  self.storage.home())))
        self.explained.update(above, [layer])

    def _strays(self) -> None:
        storage = self.storage
        strays: dict[str, list[tuple[Contents, bytes]]] = {}
        for root in storage._own:  # the containers of other stores are not known here
            for word in ("", "layer", "image", "container"):
                home, kind = storage.home(word), word or "layer"
                self._modes(root, home)
                for name in root.names(home) if kind in self.known else ():
                    stray, path = os.fsdecode(name.replace(TAR_SPLIT, b"")), home + b"/" + name
                    if name.startswith(b".tmp-"):
                        self._temporary(root, path)
                    elif stray not in self.known[kind] and re.fullmatch(HEX64, stray) \
                            and not root.exists(path + b"/additionallayer"):
                        strays.setdefault(f"{kind} {stray}", []).append((root, path))
                for below in (b"staging", b"tempdirs", b"tmp") if kind == "layer" else ():
                    for name in root.names(home + b"/" + below):
                        if not name.startswith(b"lock-"):
                            self._temporary(root, b"/".join((home, below, name)))
        for what, places in strays.items():
            self.add(f"{what.split()[0]}-orphan", what, places[0][0].host_path(places[0][1]),
                     size=sum(disk_size(*place) for place in places))
        for link, layer_id in self.named.items():  # none where records of layers are lost
            what, place = f"layer {layer_id}", b"overlay/l/" + os.fsencode(link)
            top = storage.find(place) or storage.roots[0]
            if layer_id not in self.known["layer"] and top in storage._own and what not in strays:
                self.add("l-orphan", what, top.host_path(place))

    def _items(self, image: Image) -> None:
        """Look for items of big data that the image's record does not name."""
        named = {b"userdata", *map(big_data_file, image.big_data_names)}
        for place in map(image.path, image.root.names(image.path())):
            if os.path.basename(place).startswith(b".tmp-"):
                self._temporary(image.root, place)
            elif os.path.basename(place) not in named:
                self.add("big-data-orphan", image.label, image.root.host_path(place),
                         size=disk_size(image.root, place))

    def _temporary(self, root: Contents, path: bytes) -> None:
        """Take what is older than an hour, and that nobody has locked."""
        locks = path + b"/staging.lock", path.replace(b"/temp-dir-", b"/lock-")
        if time.time() - root.lstat(path).st_mtime > 3600 and not any(
                is_locked(root, lock) for lock in locks):
            self.add("temporary", "store", root.host_path(path), size=disk_size(root, path))

    def _modes(self, root: Contents, home: bytes) -> None:
        """Compare owner and mode of a directory that podman writes to."""
        with suppress(FileNotFoundError):
            status, owner = root.lstat(home), self.storage.owner[0]
            if status.st_mode & 0o700 != 0o700:
                self.add("mode-wrong", "store", root.host_path(home), "0700",
                         f"{stat.S_IMODE(status.st_mode):04o}")
            if status.st_uid != owner:
                self.add("owner-wrong", "store", root.host_path(home), owner, status.st_uid)


def is_locked(root: Contents, name: bytes) -> bool:
    """Tell whether another process holds a lock on a file; F_GETLK takes none."""
    with suppress(OSError, FormatError), Opened(Directory.open(root, name)) as fd:
        lock = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0))
        return bool(struct.unpack("hhqqi", lock)[0] != fcntl.F_UNLCK)
    return False


def check_storage(storage: Storage) -> list[Finding]:
    """Return what is damaged or wasted; what is so only while others write does not count."""
    def state() -> list[Any]:
        locks = [(root, storage.home(word) + f"/{word}s.lock".encode())
                 for root in storage._own for word in ("layer", "image", "container")]
        return [(is_locked(*lock), _state(lock[0], -1, [lock[1]])) for lock in locks]

    found: list[Finding] | None = None
    for number in range(7):
        before = state()
        with suppress(FileNotFoundError, NotADirectoryError, LayerUnknown):  # removed meanwhile
            now = StoreCheck(storage).run()
            rows = {finding.row() for finding in now}
            found = now if found is None else [each for each in found if each.row() in rows]
            if before == state() and not any(held for held, _ in before) \
                    or all(finding.severity == "note" for finding in found):
                return found
        time.sleep(0.02 * 2 ** number)
        storage.reload()
    for finding in found or ():
        if finding.code in ("layer-incomplete", "layer-orphan") and state()[0][0]:
            finding.severity = "note"
    return StoreCheck(storage).run() if found is None else found


# ================================================================================================
# 25. Salvage
#
# After a power cut a file of records can be cut, zeroed or gone while all else is still there.
# Big data items have their digests in their names, a layer's directory names those below it, and
# the ID of a layer that was pulled is made of its parent's ID and its DiffID.  All that is a claim
# until the tar is hashed, as is whatever leaves a layer as a tar.
# ================================================================================================

def left_ids(storage: Storage, word: str, root: Contents) -> Iterator[str]:
    """Yield the IDs of what has files in a root, or is a container of podman's database."""
    records, files = storage.home(word), storage.home()
    for name in root.names(records):
        if storage.salvage and name.endswith(TAR_SPLIT) or word != "layer" \
                and root.names(records + b"/" + name):
            yield os.fsdecode(name.replace(TAR_SPLIT, b""))
    for name in root.names(files) if word == "layer" else ():
        with suppress(NeedsUnshare):  # a rootless user's container, say
            if root.exists(b"/".join((files, name, b"additionallayer"))):
                continue
        if re.fullmatch(HEX64, os.fsdecode(name)):
            yield name.decode()
    yield from storage.podman_containers() if storage.salvage and word == "container" else ()


def left_record(storage: Storage, word: str, root: Contents, record_id: str) -> dict[str, Any]:
    """Return what is left of a record: its big data; of a container what those who run it tell.

    Digests are those in the names of items, with which contents are compared when they are read.
    """
    place = b"/".join((storage.home(word), os.fsencode(record_id), b""))
    record: dict[str, Any] = {"id": record_id, "big-data-names": []}
    for name in root.names(place):
        with suppress(ValueError, OSError):  # not an item
            key = (decode_base64(name[1:]) if name[:1] == b"=" else name).decode()
            if big_data_file(key) == name and stat.S_ISREG(root.lstat(place + name).st_mode):
                record["big-data-names"].append(key)
    if word == "image":
        digests = record["big-data-digests"] = {key: key[-71:] for key in record["big-data-names"]
                                                if re.search(f"sha256:{HEX64}$", key)}
        with suppress(CstorError, OSError):
            data = root.read(place + b"manifest", MAX_BIG_DATA)
            record["digest"] = digests["manifest"] = sha256_digest(data)
    elif word == "container":
        state, told = storage.podman_containers().get(record_id, {}), {}
        for file in (b"config.json", b"buildah.json"):  # of the OCI runtime, of buildah
            with suppress(CstorError, OSError):
                told.update(parse_object(root.read(place + b"userdata/" + file, MAX_OBJECT), ""))
        mount = told.get("mount-point") or as_dict(told.get("root")).get("path")
        layer = re.search(f"/(?:overlay|vfs/dir)/({HEX64})(?:/|$)", str(mount))
        title = str(state.get("name") or told.get("container-name") or "")
        record.update(names=[title] * bool(title), layer=layer[1] if layer else "",
                      image=str(state.get("image-id") or told.get("image-id") or ""))
    return record


class Salvage:
    """Finds what records that are lost told: whose parent a layer is, and which image's it is.

    Layers whose IDs tell nothing are hashed, each once, and only to find those of an image.
    """

    def __init__(self, storage: Storage, layers: Sequence[Layer]) -> None:
        self.storage = storage
        self._above: dict[str, list[Layer]] = defaultdict(list)  # by parent
        self._loose: dict[Layer, str] = {}  # those whose parent nothing tells
        self._tried: set[tuple[Layer, str | None]] = set()  # DiffIDs layers lack, None = any
        self._done: set[Image] = set()
        self._progress: Progress | None = None
        for layer in layers:
            if layer.lost and not self._look_below(layer):
                self._loose[layer] = ""
            else:
                self._above[layer.parent].append(layer)
            layer.record.update({"parent": layer.parent} if layer.parent else {})

    @staticmethod
    def _look_below(layer: Layer) -> bool:
        """Tell whether the files of a layer tell its parent, which it has then."""
        with suppress(CstorError, OSError):
            lower = layer.lower_ids()
            if layer.overlay_file(b"diff1")[0]:  # a copy of the first one for other user IDs
                del lower[0]
            layer.parent = "".join(lower[:1])
            return bool(lower) or layer.overlay_file(b"empty")[0] is not None
        return False

    def _settle(self, layer: Layer, parent: str, digest: str) -> None:
        if layer in self._loose:
            del self._loose[layer]
            self._above[parent].append(layer)
        layer.parent, layer.diff_digest = parent, digest
        layer.record.update({"diff-digest": digest, "parent": parent})

    def _step(self, parent: str, digest: str, hashing: bool) -> list[Layer]:
        """Return the layers of a DiffID that are on top of ``parent``, "" for nothing."""
        chain_id = sha256_digest(f"{parent}+{digest[7:]}".encode()) if parent else digest
        near, loose = self._above[parent], self._loose
        layer = self.storage.layer_by_id(chain_id[7:])
        if layer and layer.lost and not layer.diff_digest and (layer in loose or layer in near):
            self._settle(layer, parent, digest)
        for layer in [*near, *loose] if hashing else ():
            if layer.lost and not layer.diff_digest:
                self._hash(layer, digest)
        found = [layer for layer in near
                 if digest in (layer.diff_digest, layer.compressed_diff_digest)]
        if not found:  # one copy for each parent
            found = [layer for layer in loose if layer.diff_digest == digest][:1]
            for layer in found:
                self._settle(layer, parent, digest)
        return found

    def _hash(self, layer: Layer, wanted: str = "") -> None:
        """Compute a DiffID that is lost; some sparse files can be read only with the right one."""
        for digest in ("", wanted):
            if layer.diff_digest or not self._tried.isdisjoint([(layer, None), (layer, digest)]):
                continue
            self._tried.add((layer, digest))
            layer.diff_digest, actual = digest, ""
            sink = TarSink(None, hashing=True, layer=layer.id, progress=self._progress)
            try:
                with suppress(Unsupported):  # also without tar-split data
                    actual = sink.take_all(layer.pieces())
                    layer.proven, layer.diff_size = True, sink.size
                    layer.record.update({"diff-digest": actual, "diff-size": sink.size})
            except (CstorError, OSError) as error:  # no other DiffID helps
                self._tried.add((layer, None))
                self._loose.pop(layer, None)
                self.storage.faults.append(f"layer {layer.id}: its DiffID is not known: {error}")
            layer.diff_digest = actual

    def images(self, images: Sequence[Image], *, hashing: bool = False) -> None:
        """Find the layers of images, by ``hashing`` where nothing else tells."""
        lost = [image for image in images if image.lost]
        if lost or any(layer.lost for layer in self.storage.layers()):
            with self.storage.watch() as self._progress:
                for image, way in product(images, (False, True)[:1 + hashing]):
                    with suppress(CstorError, OSError):  # faults of the image say it
                        if image not in self._done and self._find(image, way):
                            self._done.add(image)
        names = self._names() if lost else {}
        known = {name for image in images if not image.lost for name in image.names}
        for image in lost:
            image.names = [name for name in names if names[name] == {image.id} and "/" in name
                           and name not in known]
            image.record.update(names=image.names, layer=image.layer, created=image.created)

    def _find(self, image: Image, hashing: bool) -> bool:
        """Find the layers of an image; tell whether there is no more to find."""
        config, level = image.config(), [""]
        if image.lost:
            image.created = str(config.get("created") or "")
        if image.manifest().get("schemaVersion") == 1:
            return self._find_schema1(image, config, hashing)
        ids = [str(digest) for digest in as_list(as_dict(config.get("rootfs")).get("diff_ids"))]
        if not all(re.fullmatch("sha256:" + HEX64, digest) for digest in ids):
            return True
        self.storage.named.update(ids)
        chain = self.storage.chain(image.layer)
        if len(chain) != len(ids):
            for digest in ids[:MAX_LOWERS + 1]:
                level = [layer.id for below in level
                         for layer in self._step(below, digest, hashing)]
            image.layer = image.layer or (level or [""])[0]
            chain = self.storage.chain(image.layer)
        for layer, digest in zip(chain, ids) if len(chain) == len(ids) else ():
            if layer.lost and not layer.diff_digest:
                self._settle(layer, layer.parent, digest)
        return len(chain) == len(ids)

    def _find_schema1(self, image: Image, config: dict[str, Any], hashing: bool) -> bool:
        """Find the layers whose DiffIDs give the ID of the image: its configuration's digest."""
        count = sum(not row.get("empty_layer") for row in config["history"])
        for top in [image.layer] * bool(image.layer) or [each.id for each in self.storage.layers()]:
            with suppress(LayerUnknown, FormatError):
                chain = self.storage.chain(top)
                for layer in chain if hashing and len(chain) == count else ():
                    if layer.lost:
                        self._hash(layer)
                found = Image(self.storage, image.root, {**image.record, "layer": top})
                if len(chain) == count and sha256_digest(found.config_bytes())[7:] == image.id:
                    image.layer = top
                    return True
        return False

    def _names(self) -> dict[str, set[str]]:
        """Return the IDs of images by the names that containers give them."""
        found: dict[str, set[str]] = defaultdict(set)
        for container in self.storage._load(Container):
            name = container.details().get("image-name") or container.state.get("image-name")
            found[str(name)].add(container.image)
        return found

    def containers(self, containers: Sequence[Container]) -> None:
        """Find the writable layers of containers by their names, and what is below them."""
        storage, images = self.storage, self.storage.images()
        named = {name: layer.id for layer in storage.layers() for name in layer.names}
        for container in containers:
            if container.lost and container.names and not container.layer:
                container.layer = named.get(f"{container.names[0]}-layer", "")
            if not (layer := storage.layer_by_id(container.layer)):
                continue
            above = [image.id for image in images if layer.parent and image.layer == layer.parent]
            if container.lost and not container.image and len(above) == 1:
                container.image = above[0]
            if layer in self._loose:
                layer.parent = "".join(image.layer for image in images
                                       if image.id == container.image)
            layer.proven = layer.proven or not container.lost and not layer.diff_digest
            container.record.update(layer=layer.id, image=container.image)


# ================================================================================================
# 26. Disk usage
#
# What lies on disk belongs to units: layers, images and containers by word and ID, with the path of
# an additional store behind them.  A block counts once, whichever hard links and reflinks lead to
# it, and is freed with the last unit that holds it.  The unit "" holds what also has a name, or
# shares an extent, elsewhere; it never goes away.
# ================================================================================================

FIEMAP_LAST, FIEMAP_ENCODED, FIEMAP_SHARED = 0x1, 0x8, 0x2000
NO_REFLINKS = ("ext2", "ext3", "ext4", "tmpfs")  # file systems without shared extents
MOUNTS = (b"merged", b"mapped", b"composefs-layers")  # in a layer's directory


def status_at(dir_fd: int, name: bytes) -> tuple[os.stat_result] | None:
    """Return lstat(2) alone; None if the file has vanished."""
    try:
        return (os.lstat(name, dir_fd=dir_fd),)
    except FileNotFoundError:
        return None


def walk_disk(root: Contents, top: bytes, denied: list[str],
              look: Callable[[int, bytes], Any] = status_at) -> Iterator[tuple[Any, ...]]:
    """Yield ``top`` and all below it, with what ``look`` tells, but nothing that is mounted there.

    Directories that cannot be read are added to ``denied``; what is removed meanwhile is left out.
    """
    try:
        status = root.lstat(top)
    except NeedsUnshare:
        denied.append(root.host_path(top))
        return
    yield top, status
    device, mounts = status.st_dev, {top + b"/" + name for name in MOUNTS}
    todo = [top] * stat.S_ISDIR(status.st_mode)
    while todo:
        folder, rows = todo.pop(), []
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                rows = list(root.scan(folder, look))
        except NeedsUnshare:
            denied.append(root.host_path(folder))
        for name, status, *more in rows:
            if status.st_dev == device:
                path = folder + b"/" + name
                yield path, status, *more
                todo += [path] * (stat.S_ISDIR(status.st_mode) and path not in mounts)


def disk_size(root: Contents, path: bytes) -> int:
    """Return the bytes of disk that a file, or a directory with all this user sees, takes."""
    found: dict[Any, int] = {(status.st_dev, status.st_ino): status.st_blocks
                             for _, status, *_ in walk_disk(root, path, [])}
    return 512 * sum(found.values())


def files_size(layer: Layer, below: Layer | None = None) -> int:
    """Return the bytes of a layer's files, each inode once, as Go's directory.Size() counts.

    Of vfs, those that differ from ``below``.  -1 when a directory is missing or cannot be read.
    """
    def facts(layer: Layer) -> Iterator[tuple[Any, ...]]:
        root, path = layer.overlay_file(b"diff")
        if root is None:
            denied.append(os.fsdecode(path))
            return
        for name, found, *more in walk_disk(root, path, denied, look):
            if not stat.S_ISDIR(found.st_mode):
                yield (found.st_ino, found.st_size, name[len(path):], found.st_mode,
                       found.st_mtime_ns, repr(more), *(found.st_uid, found.st_gid)[:owners])

    denied: list[str] = []
    owners = 0 if layer.mapped else 2  # a mapped layer shifts them all
    if layer.overlay_file(b"additionallayer")[0]:
        return layer.diff_size
    look: Any = look_at if layer.storage.driver == "vfs" else status_at
    known = {row[1:] for row in facts(below)} if below and look is look_at else ()
    sizes: dict[int, int] = {row[0]: row[1] for row in facts(layer) if row[1:] not in known}
    return -1 if denied else sum(sizes.values())


def shared_extents(fd: int) -> list[tuple[tuple[int, int], int, int]]:
    """Return (key, place, bytes) of the extents that a file shares with others.

    Only the first 8,192 extents are looked at.  Raises OSError where the file system cannot tell.
    """
    rows: list[tuple[int, ...]] = []
    buffer = bytearray(32 + 56 * 128)
    for _ in range(64):
        start = rows[-1][0] + rows[-1][2] if rows else 0
        struct.pack_into("=QQLLLL", buffer, 0, start, (1 << 64) - 1 - start, 0, 0, 128, 0)
        fcntl.ioctl(fd, FIEMAP, buffer)
        count = struct.unpack_from("=L", buffer, 20)[0]
        rows += struct.iter_unpack("=QQQ16xL12x", buffer[32:32 + 56 * count])
        if not count or rows[-1][3] & FIEMAP_LAST:
            break
    # btrfs counts compressed extents, also in st_blocks, by what they hold: their places overlap.
    return [((1, place), 0, length) if flags & FIEMAP_ENCODED else ((0, 0), place, length)
            for _, place, length, flags in rows if flags & FIEMAP_SHARED]


class DiskUsage:
    """What a storage takes on disk, in bytes; as_json() returns all that `store df` shows.

    ``storage`` is the one that was measured, ``units`` what each of its records needs.
    ``orphans`` are findings of what no record names, ``unused_layers`` those that no image and no
    container needs, ``dangling`` images without a name that nothing needs.  ``unreadable`` names
    directories that could not be read: what is in them is not counted.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        found = storage.check()
        self.orphans = [finding for finding in found if finding.bytes is not None]
        self.unreadable: list[str] = []
        self.units: dict[Any, set[str]] = {}  # that a record needs
        self._files: Counter[str] = Counter()  # bytes of files, by unit
        self._held: Counter[frozenset[str]] = Counter()  # bytes of disk, by all that hold them
        self._ends: list[tuple[Any, ...]] = []  # of what is shared: see _share()
        self._plain = {os.makedev(*map(int, line.split()[2].split(":")))
                       for line in read_proc("self/mountinfo").splitlines()
                       if line.partition(" - ")[2].split()[0] in NO_REFLINKS}
        self._find_units([*storage.images(), *storage.containers(), *storage.layers()])
        named = set().union(*(units for record, units in self.units.items() if isinstance(
            record, Container) or isinstance(record, Image) and record.names))
        used = named.union(*(self.units[image] for image in storage.images()))
        below, listed = intermediate_images(storage), listed_images(storage)
        self.dangling = [
            image for image in storage.images()
            if not image.names and image.label not in named and image.id not in listed
            and (image.id not in below or f"layer {image.layer}" not in named)]
        self.unused_layers = [layer for layer in storage.layers()
                              if not layer.readonly and layer.label not in used]
        if any(finding.code in ("json-damaged", "records-lost") for finding in found) \
                or any(record.lost for record in self.units):
            self.dangling, self.unused_layers = [], []  # lost records may name or need them
        self._measure()

    def _find_units(self, records: Sequence[Any]) -> None:
        """Find what each record needs; what an additional store has it finds there."""
        users = [(record.label, [record]) for record in records]
        own = {record.label for record in records if not record.readonly}
        fixed = {record.label: self._unit(record.label, record.root)
                 for record in records if record.readonly}
        self._fixed = set(fixed.values())
        for key, needing in chain(users, users_of(self.storage).items()):
            for record in needing:
                self.units.setdefault(record, set()).add(
                    key if key in own and not record.readonly else fixed.get(key, key))

    def _unit(self, key: str, root: Directory) -> str:
        return f"{key} of {root.path}" if root in self.storage._additional else key

    def _measure(self) -> None:
        """Look at all that the storage has, and join what several units hold."""
        for root in self.storage.roots:
            for word in ("", "layer", "image", "container"):
                home = self.storage.home(word)
                try:
                    for name in root.names(home):
                        record_id = os.fsdecode(name.replace(TAR_SPLIT, b""))
                        with suppress(FileNotFoundError, NotADirectoryError):  # just removed
                            self._take(self._unit(f"{word or 'layer'} {record_id}", root), root,
                                       home + b"/" + name, not word)
                except NeedsUnshare:
                    self.unreadable.append(root.host_path(home))
        counts: Counter[str] = Counter()
        before = 0
        for _, place, step, unit, holders in sorted(self._ends):
            if counts and place > before:
                here = [*counts, *[""] * (sum(counts.values()) < holders)]
                self._held[frozenset(here)] += place - before
            before, counts[unit] = place, counts[unit] + step
            if not counts[unit]:
                del counts[unit]
        self._shared = {units: size for units, size in self._held.items() if len(units) > 1}

    def _take(self, unit: str, root: Contents, top: bytes, is_layer: bool) -> None:
        """Count what is at and below ``top``."""
        files = own = 0
        linked: dict[tuple[int, int], int] = {}  # bytes of files with several names
        content = top + b"/diff" * (self.storage.driver == "overlay")
        for path, status, *_ in walk_disk(root, top, self.unreadable):
            is_file, file = not stat.S_ISDIR(status.st_mode), (status.st_dev, status.st_ino)
            if file not in linked:
                size = status.st_blocks * 512 - self._reflinked(unit, root, path, status)
                files += status.st_size * (is_file and is_layer and path.startswith(content))
            if is_file and status.st_nlink > 1:
                self._share((status.st_dev, 2, status.st_ino), 0, linked.setdefault(file, size),
                            unit, status.st_nlink)
            else:
                own += size
        self._held[frozenset([unit])] += own
        self._files[unit] += files

    def _share(self, device: tuple[int, ...], place: int, size: int, *more: Any) -> None:
        self._ends += [(device, place, 1, *more), (device, place + size, -1, *more)]

    def _reflinked(self, unit: str, root: Contents, path: bytes, status: os.stat_result) -> int:
        """Take the extents that a file shares with others; return their bytes."""
        size = status.st_blocks * 512
        if not stat.S_ISREG(status.st_mode) or not size or status.st_dev in self._plain:
            return 0
        try:
            with Opened(root.open_near(path)) as fd:
                found = shared_extents(fd)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                self._plain.add(status.st_dev)
            return 0
        for key, place, length in found:
            self._share((status.st_dev, *key), place, length, unit, 2)
        return min(sum(length for *_, length in found), size)

    def disk_size(self, units: set[str], *, alone: bool = False) -> int:
        """Return the bytes of disk that units take; ``alone``: that nothing else holds."""
        return sum(self._held[frozenset([unit])] for unit in units) + sum(
            size for holders, size in self._shared.items()
            if (holders <= units if alone else not holders.isdisjoint(units)))

    def if_removed(self, records: Iterable[Record]) -> dict[str, Any]:
        """Return what removing all these records would free.

        Keys: ``freed`` and ``kept``, bytes of disk, and ``kept-by``, the objects that need these.
        podman keeps an image that another was built on, and with an image removes those without a
        name that only it was built on.
        """
        asked = set(records)
        removed = set(asked)
        built: dict[Record, set[Record]] = defaultdict(set)
        for parent, child in related_images(self.storage):
            built[parent].add(child)
        used = {container.image for container in self.storage.containers()
                if container not in removed}
        while kept := {record for record in removed if not built[record] <= removed}:
            removed -= kept
        while more := {parent for parent in built if built[parent] <= removed
                       and not parent.names and parent.id not in used} - removed:
            removed |= more
        parts = {unit for record in asked | removed for unit in self.units[record]
                 if not isinstance(record, Container)
                 or unit in (f"container {record.id}", f"layer {record.layer}")}
        keepers = {record: units for record, units in self.units.items() if record not in removed
                   and (record in self.unused_layers or not isinstance(record, Layer))}
        freed = self.disk_size(parts.difference(self._fixed, *keepers.values()), alone=True)
        return {"freed": freed, "kept": self.disk_size(parts) - freed, "kept-by": [
            record.label for record, units in keepers.items() if not parts.isdisjoint(units)]}

    def _row(self, record: Any, units: set[str], **more: Any) -> dict[str, Any]:
        return {"id": record.id, "names": record.names, "created": record.created,
                "apparent-size": sum(self._files[unit] for unit in units),
                "disk-size": self.disk_size(units), **more, "store": record.root.path}

    def images(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each image; ``unique-size``: of ``disk-size``, what no other needs."""
        images, containers = self.storage.images(), self.storage.containers()
        users = Counter(chain(*(self.units[image] for image in images)))
        several = {unit for unit in users if users[unit] > 1}
        for image in images:
            row = self._row(image, self.units[image], dangling=image in self.dangling,
                            readonly=image.readonly, containers=[
                                each.id for each in containers if each.image == image.id])
            unique = self.disk_size(self.units[image] - several, alone=True)
            yield {**row, "shared-size": row["disk-size"] - unique, "unique-size": unique}

    def as_json(self) -> dict[str, Any]:
        """Return what `store df` shows: rows, the sum of all, and of what can be freed."""
        lost = {finding.object for finding in self.orphans
                if finding.code == finding.object.split()[0] + "-orphan"}
        freed = {"dangling-images": self.if_removed(self.dangling)["freed"],
                 "unused-layers": self.if_removed(self.unused_layers)["freed"],
                 "orphans": self.disk_size(lost, alone=True) + sum(
                     finding.bytes or 0 for finding in self.orphans if finding.object not in lost)}
        return {"images": list(self.images()), "containers": [self._row(
            container, {container.label, f"layer {container.layer}"},
            image=container.image) for container in self.storage.containers()],
            "unused-layers": [self._row(layer, {layer.label}) for layer in self.unused_layers],
            "orphans": [finding.as_json() for finding in self.orphans],
            "disk-size": sum(self._held.values()),
            "can-be-freed": {**freed, "total": sum(freed.values())}, "unreadable": self.unreadable}


# ================================================================================================
# 27. Registry
#
# The pull side of the OCI Distribution Specification 1.1; the standard library carries HTTP.
# A repository is the name of an image.  Its manifest is that of copy-to-oci, so its layers are
# uncompressed tars, which are made while they are sent.  Not every client checks digests: the last
# block of a layer leaves only when the whole tar has the right one.  What was told once stays
# served by its digest until its image is removed.  Nothing that a client says becomes a file name.
# ================================================================================================

IMAGE_ID = "[0-9a-f]{12,64}"  # or the start of one
MAX_HEAD = 80 << 10  # bytes of a request; one line may have 64 KiB
MAX_DOCUMENT = 4 << 20  # of a manifest or configuration: clients refuse larger ones
SEND_SIZE = 256 << 10  # of a layer: what a slow client must take within the timeout
MAX_HTTP_CLIENTS = 128  # connections: a client has several


# -- what is served ------------------------------------------------------------------------------

class Registry:
    """What a storage has for the clients of a registry; threads can share it, not the storage.

    ``only`` limits it to repositories, names with a tag or digest, and images by ID.
    """

    def __init__(self, storage: Storage, only: Sequence[str] = ()) -> None:
        self.storage = storage
        self._only = parse_only(only)
        self._lock, self._seen = allocate_lock(), None  # type: Any, Any
        self._images: dict[str, Image] = {}  # that are served, by ID
        self._names: dict[tuple[str, str], Image] = {}  # by repository and tag
        self._made: dict[str, Manifest | Exception] = {}  # by ID: the manifest, or why not
        # All that was ever told, by ID of the image and digest: manifests, and of each blob the ID
        # of the layer, "" for the configuration.
        self._manifests: dict[str, dict[str, Manifest]] = {}
        self._blobs: dict[str, dict[str, str]] = {}
        self._damaged: dict[tuple[str, str], str] = {}  # layers, by ID and time of their making

    def names(self, name: str = "", host: str = "") -> list[str]:
        """Return the tags of a repository, or without a name the repositories, sorted."""
        with self._lock:
            self._refresh()
            places = self._places(name, host)
            found = {tag if name else place.partition("/")[2] if ":" in place else place
                     for place, tag in self._names if place in places or not name}
            # Any tag will do for an ID; this is what clients ask for.
            return sorted(found, key=tag_order) or ["latest"] * bool(self._by_id(name, host))

    def manifest(self, name: str, reference: str, host: str = "") -> Manifest:
        """Return the digest, bytes and media type of a manifest.

        ``name`` is a repository, with or without the registry that it came from, or an image's ID.
        A client that asks for another registry's image says which one, the ``host``.  Raises
        NotFound, Ambiguous and other CstorErrors that say why an image cannot be served.
        """
        with self._lock:
            self._refresh()
            if re.fullmatch(DIGEST, reference):
                return self._by_digest(reference)
            found = {self._names[place, reference].id: f"{place}:{reference}"
                     for place in self._places(name, host) if (place, reference) in self._names} \
                or self._by_id(name, host)
            if len(found) > 1:
                raise Ambiguous(f"ambiguous: {', '.join(sorted(found.values()))}")
            for key in found:
                return self._make(self._images[key])
            raise NotFound(f"no image {display(name)}:{display(reference)} is served here")

    def blob(self, digest: str) -> tuple[bytes, Layer | None, int]:
        """Return a configuration, or b"" and the layer that has the blob, and its size."""
        with self._lock:
            self._refresh()
            why: Exception = NotFound(f"no image here has the blob {digest}: layers are served "
                                      "uncompressed, by their DiffID")
            for image, layer_id in self._told(self._blobs, digest):
                try:
                    if layer := self.storage.layer_by_id(layer_id):
                        self._check(layer)
                        data, (found, size) = b"", layer_blob(layer)
                    else:
                        data = image.config_bytes()
                        found, size = sha256_digest(data), len(data)
                    if found == digest:
                        return data, layer, size
                except (CstorError, OSError) as error:  # damaged, or the layer has another ID since
                    why = error
                    if not isinstance(self._made.get(image.id), Exception):
                        self._made.clear()  # its manifest is refused, too, and left out of lists
            raise why

    def adopt(self, storage: Storage, layer: Layer) -> Layer:
        """Return a layer as one of another storage, which belongs to another thread."""
        with self._lock:
            return storage.adopt(layer)

    def refuse(self, layer: Layer, reason: str) -> None:
        """Serve a layer that turned out to be damaged no more, unless it is made anew."""
        with self._lock:
            self._damaged[layer.id, layer.created] = reason
            self._made.clear()

    def _refresh(self) -> None:
        """Read the records again if they have changed."""
        storage = self.storage
        files = [b"%s/%ss.json" % (storage.home(word), word.encode())
                 for word in (Image.WORD, Layer.WORD)]
        if (state := [_state(root, -1, files) for root in storage.roots]) == self._seen:
            return
        self._seen = None  # until all of them are read
        storage.reload()
        self._made.clear()
        self._names, self._images = {}, {}
        images = storage.images()
        self._manifests = {image.id: self._manifests.get(image.id, {}) for image in images}
        self._blobs = {image.id: self._blobs.get(image.id, {}) for image in images}
        own = {image.id for image in images if not image.readonly}
        for image in images:
            names = [] if image.readonly and image.id in own else [
                split_reference(name)[:2] for name in image.names]
            names = [name for name in [*names, ("", "")] if self._fits(image, *name)]
            for name in names:  # as _named() chooses
                if name[1] and self._names.get(name, image).root is image.root:
                    self._names[name] = image
            if names or self._manifests[image.id]:  # told, as it still had such a name
                self._images.setdefault(image.id, image)
        self._seen = state

    def _fits(self, image: Image, repository: str, tag: str) -> bool:
        """Tell whether ``only`` lets an image out by a name, or by its ID alone ("")."""
        return not self._only or any(
            repository in normalize_name(name) and wanted in ("", tag)
            and (not digest or digest in image.digests)
            or re.fullmatch(IMAGE_ID, text) and image.id.startswith(text)
            for text, name, wanted, digest in self._only)

    def without_paths(self, text: str) -> str:
        """Return a text for clients: they need not know where the storage is."""
        text = display(text)
        for path in [display(root.path) for root in self.storage.roots]:
            text = text.replace(f"{path}/", "").replace(path, "the storage")
        return text

    def is_empty(self) -> bool:
        """Tell whether there is no image now that it lets out."""
        self._refresh()
        return not self._images

    def _places(self, name: str, host: str) -> set[str]:
        """Return the repositories that a client's name can stand for."""
        there = {place for place, _ in self._names}
        return {f"{host}/{name}"} if host else {name} & there or {
            place for place in there if place.partition("/")[2] == name}

    def _by_id(self, name: str, host: str) -> dict[str, str]:
        """Return the images whose ID, or its start, a client's name is."""
        if host or not re.fullmatch(IMAGE_ID, name):
            return {}
        if self._only:  # a list lets its instances out
            self._make_all()
        return {key: name for key in self._images if key.startswith(name)}

    def _told(self, known: dict[str, dict[str, T]], digest: str) -> Iterator[tuple[Image, T]]:
        """Yield what was told by a digest, with its image; then all is learned that can be told."""
        for learn in (str, self._make_all):
            learn()
            for image in [*self._images.values()]:
                if digest in known[image.id]:
                    yield image, known[image.id][digest]

    def _by_digest(self, digest: str) -> Manifest:
        for _, found in self._told(self._manifests, digest):
            return found
        for image in self._images.values():
            if digest in image.digests:
                raise NotFound(f"{digest} is the manifest as it was pulled, with compressed layers;"
                               f" the store keeps them uncompressed: {self._make(image)[0]}")
        raise NotFound(f"no image here has the manifest {digest}")

    def _make_all(self) -> None:
        """Learn the digests of all that is served."""
        for image in [*self._images.values()]:
            with suppress(CstorError):
                self._make(image)

    def _make(self, image: Image) -> Manifest:
        """Return the manifest of an image; raise why it has none."""
        if image.id not in self._made:
            try:
                data, media_type, size = self._make_index(image) if image.is_list \
                    else self._make_manifest(image)
                if size > MAX_DOCUMENT:
                    raise Unsupported(f"its manifest or configuration has {size} bytes, more than "
                                      "clients take")
                self._made[image.id] = made = sha256_digest(data), data, media_type
                self._manifests[image.id][made[0]] = made
            except (CstorError, OSError) as error:
                if getattr(error, "errno", 0) in SHORTAGES:
                    raise
                self._made[image.id] = error
        if isinstance(found := self._made[image.id], Exception):
            raise Unsupported(f"image {image.title} cannot be served: {found}")
        return found

    def _make_manifest(self, image: Image) -> tuple[bytes, str, int]:
        layers, config, data = plain_manifest(image)
        for layer, _, _ in layers:
            self._check(layer)
        self._blobs[image.id].update((digest, layer.id) for layer, digest, _ in layers)
        self._blobs[image.id][sha256_digest(config)] = ""
        return data, OCI_MANIFEST, max(len(data), len(config))

    def _make_index(self, image: Image) -> tuple[bytes, str, int]:
        blobs: list[dict[str, Any] | None] = []
        for _, each in image.instances():
            blobs.append(None)
            with suppress(CstorError):
                digest, data, _ = self._make(each)
                blobs[-1] = manifest_descriptor(digest, len(data), each.config())
                self._images.setdefault(each.id, each)  # also where ``only`` names just the list
        if not any(blobs):
            raise NotFound("none of its instances can be served")
        data = oci_index(image, blobs)
        return data, OCI_INDEX, len(data)

    def _check(self, layer: Layer) -> None:
        """Raise why a layer's tar cannot be made, as far as that is known without making it."""
        if reason := self._damaged.get((layer.id, layer.created)):
            raise Unsupported(reason)
        os.close(layer.open_tar_split()[0])
        layer.diff().close()


def tag_order(text: str) -> tuple[str, str]:
    """Return a sort key: the specification wants lists of tags without regard to case."""
    return text.lower(), text


def parse_only(words: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Return what each word can be: (ID, name, tag, digest).  Raises ValueError."""
    for word in check_words("only", words):
        if not re.fullmatch(f"{REPOSITORY_NAME}(?::{TAG})?(?:@{DIGEST})?", word):
            raise ValueError(f"only: not the name or ID of an image: {display(word)}")
    return [(word.removeprefix("sha256:"), *split_reference(word)) for word in words]


def is_public(storage: Storage) -> bool:
    """Tell whether each user of this machine may read all of a storage, by the modes of its files.

    podman makes the records private; what was opened to all (``chmod -R``) is looked at whole.
    """
    def paths() -> Iterator[tuple[str, int]]:
        for root in storage.roots:
            top = os.path.realpath(root.path)
            yield from ((top[:at.start()] or "/", stat.S_IXOTH) for at in re.finditer("/|$", top))
            for home in map(storage.home, (Image.WORD, Layer.WORD, "")):
                for folder, folders, names in os.walk(os.path.join(top, os.fsdecode(home))):
                    for name in ("", *folders):  # also those that walk() cannot list
                        yield os.path.join(folder, name), stat.S_IROTH | stat.S_IXOTH
                    yield from ((os.path.join(folder, name), stat.S_IROTH) for name in names
                                if not name.endswith(".lock"))

    return all(not wanted & ~os.lstat(path).st_mode for path, wanted in paths()
               if not os.path.islink(path))


# -- HTTP ----------------------------------------------------------------------------------------

class _HttpError(CstorError):
    """An answer that is no success, with the specification's code."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Enough(Exception):
    """All that a client wants of a layer was sent."""


class _HeldBack:
    """Sends a range of a tar that is written to it; its last block waits for release()."""

    def __init__(self, send: Callable[[Any], object], start: int, end: int, size: int) -> None:
        self._send, self._at, self._kept = send, 0, bytearray()
        self._start, self._free, self._end = start, max(min(size - BLOCK, end), 0), end

    def write(self, data: memoryview) -> int:
        """Send what is in the range and not in the last block."""
        start, free, end = (min(max(at - self._at, 0), len(data)) for at in (
            self._start, self._free, self._end))
        self._at += len(data)
        if start < free:
            self._send(data[start:free])
        self._kept += data[max(start, free):end]
        if self._at >= self._end == self._free:
            raise _Enough
        return len(data)

    def release(self) -> None:
        self._send(self._kept)


class _HttpClient(HttpHandler):
    """Answers one client of a registry."""

    protocol_version, server_version, sys_version = "HTTP/1.1", f"cstor/{__version__}", ""
    default_request_version = request_version = "HTTP/1.0"  # never 0.9, which has no status
    command = requestline = ""

    def __init__(self, server: RegistryServer, sock: Any) -> None:
        self.registry, self._server, self.socket = server.registry, server, sock
        peer = sock.getpeername()
        self._peer = str(peer[0]) if isinstance(peer, tuple) else "local"
        self.close_connection, self._sent = False, 0
        self._expect()
        self.wfile: Any = self
        self.rfile: Any = io.BufferedReader(ChunkFile(self._received()))

    def run(self) -> None:
        """Answer requests until the client has enough."""
        if self.rfile.peek(1)[:1] == b"\x16":  # a hello of TLS: Go's clients then say what it is
            self.write(b"HTTP/1.0 400 Bad Request\r\nConnection: close\r\n\r\n")
            return
        while not self.close_connection and not self._server.stopping:
            self.handle_one_request()
            self._expect()

    def _expect(self) -> None:
        """Expect a request: its first byte within the idle time, and then all of it in time."""
        self.idle_since = time.monotonic()
        self._deadline, self._room = Deadline(self._server.idle), MAX_HEAD

    def _received(self) -> Iterator[bytes]:
        import http.client

        while True:
            if self._room <= 0:
                raise http.client.HTTPException(f"more than {MAX_HEAD} bytes of headers")
            self.socket.settimeout(max(self._deadline.left(), 0.001))
            if not (data := self.socket.recv(min(READ_SIZE, self._room))):
                return
            if self._room == MAX_HEAD:
                self._deadline = Deadline(self._server.timeout)
            self._room -= len(data)
            yield data

    def write(self, data: Any) -> int:
        """Send all; meanwhile the client can lose its place to another one."""
        self.idle_since = time.monotonic()
        self.socket.settimeout(self._server.timeout)  # for all of it
        self.socket.sendall(data)
        self.idle_since = float("inf")
        self._sent += len(data)
        return len(data)

    def parse_request(self) -> bool:
        """Read the head of a request; what comes after one with a body is no other request."""
        from email.errors import MissingHeaderBodySeparatorDefect as NoHeader

        if not super().parse_request():
            return False
        if any(isinstance(each, NoHeader) for each in self.headers.defects):
            self.send_error(400, "malformed header")
            return False
        if "Transfer-Encoding" in self.headers or {*self.headers.get_all("Content-Length", ())} \
                - {"0"} or re.search(r"(?i)\bclose\b", str(self.headers.get_all("Connection"))):
            self.close_connection = True
        return True

    def do_GET(self, refusal: _HttpError | None = None) -> None:
        """Answer a request, also with an error, in the specification's form."""
        self.idle_since, begin = float("inf"), time.monotonic()
        self._status, self._sent, self._unknown, why = 0, 0, "UNSUPPORTED", ""
        try:
            if refusal:
                raise refusal
            self._route()
        except (CstorError, OSError) as error:
            why = f": {error}"
            if self._status:  # the answer has begun: it is cut
                raise
            if not isinstance(error, _HttpError):
                error = _HttpError(429, "TOOMANYREQUESTS", str(error)) \
                    if getattr(error, "errno", 0) in SHORTAGES \
                    else _HttpError(404, self._unknown, str(error))
            self._reply(compact_json({"errors": [{
                "code": error.code, "message": self.registry.without_paths(str(error))}]}),
                status=error.status, headers=error.headers)
        finally:
            self._server.log(f'{self._peer} "{display(self.requestline[:300])}" {self._status} '
                             f"{self._sent} {time.monotonic() - begin:.3f}s{display(why)}")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def handle_expect_100(self) -> bool:
        """Let the client wait for the answer: it is never that a body may come."""
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server cannot read, or has no method for."""
        self.close_connection |= code != 501
        self.do_GET(None if code == 501 else _HttpError(
            code, "TOOMANYREQUESTS" if code == 429 else "UNSUPPORTED",
            message or self.responses[code][0]))

    def log_message(self, *_: object) -> None:
        """Do nothing: do_GET() logs, at the end, and all that was written is sent."""

    flush = log_message

    def _reply(self, data: bytes, media_type: str = "application/json", status: int = 200, *,
               size: int = -1, headers: Mapping[str, str] | None = None) -> None:
        """Send an answer, or with ``size`` the head of one whose body follows."""
        self._status = status
        self.send_response(status)
        for name, value in {"Content-Type": media_type,
                            "Content-Length": str(len(data) if size < 0 else size),
                            "Docker-Distribution-API-Version": "registry/2.0",
                            **(headers or {})}.items():
            self.send_header(name, value)
        if self.close_connection or self._server.stopping:
            self.send_header("Connection", "close")
        self.end_headers()
        self._sent = 0  # of the body
        if self.command != "HEAD":
            self.write(data)

    def _route(self) -> None:
        from urllib.parse import parse_qsl, unquote

        if self._server.passwords and not self._is_known():
            raise _HttpError(401, "UNAUTHORIZED", "authentication required",
                             WWW_Authenticate='Basic realm="cstor"')
        if self.command not in ("GET", "HEAD"):
            raise _HttpError(405, "UNSUPPORTED", "this registry is read-only", Allow="GET, HEAD")
        self.path = re.sub("(?i)^https?://[^/?]*", "", self.path)  # a target can be a whole URL
        path, _, query = self.path.partition("?")
        fields = dict(parse_qsl(query))
        found = re.fullmatch("/v2(?:/?|/(_catalog)|/(.+)/(?:(tags)/list|(manifests|blobs|referrers)"
                             "/([^/]+)))", unquote(path), re.DOTALL)
        if not found:
            raise NotFound("no such endpoint")
        catalog, name, tags, kind, reference = found.groups("")
        if name and (len(name) > 255 or not re.fullmatch(f"{REPOSITORY}(?:/{REPOSITORY})*", name)):
            raise _HttpError(400, "NAME_INVALID", f"invalid repository name: {display(name)}")
        if kind in ("blobs", "referrers") and not re.fullmatch(DIGEST, reference):
            raise _HttpError(400, "DIGEST_INVALID", f"invalid digest: {display(reference)}")
        self._unknown = {"manifests": "MANIFEST_UNKNOWN", "blobs": "BLOB_UNKNOWN"}.get(
            kind, "NAME_UNKNOWN")
        if catalog or tags:
            self._list(name, fields)
        elif kind == "manifests":
            self._document(*self.registry.manifest(name, reference, fields.get("ns", "")))
        elif kind == "blobs":
            data, layer, size = self.registry.blob(reference)
            self._document(reference, data, "application/octet-stream", layer, size)
        elif kind:
            self._reply(compact_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}),
                        OCI_INDEX, headers={"OCI-Filters-Applied": "artifactType"}
                        if "artifactType" in fields else {})
        else:
            self._reply(b"{}")

    def _is_known(self) -> bool:
        """Tell whether the client gave a user and his password, in a time that tells nothing."""
        kind, _, words = self.headers.get("Authorization", "").partition(" ")
        given = sha256_digest(words.strip().encode())
        fits = sum(hmac.compare_digest(given, each) for each in self._server.passwords)
        return fits > 0 and kind.lower() == "basic"

    def _list(self, name: str, fields: dict[str, str]) -> None:
        """Answer one page of repositories or tags."""
        from urllib.parse import urlencode

        names = self.registry.names(name, fields.get("ns", ""))
        if name and not names:
            raise NotFound(f"no repository {name} is served here")
        count = fields.get("n", str(len(names)))
        if not re.fullmatch("[0-9]{1,18}", count):
            raise _HttpError(400, "UNSUPPORTED", f"n must be a number, not {display(count)}")
        later = [each for each in names if tag_order(each) > tag_order(fields.get("last", ""))]
        page, more = later[:int(count)], {}
        if 0 < len(page) < len(later):
            query = urlencode({**fields, "last": page[-1]})
            more["Link"] = f'<{self.path.partition("?")[0]}?{query}>; rel="next"'
        self._reply(compact_json({"name": name, "tags": page} if name else {"repositories": page}),
                    headers=more)

    def _document(self, digest: str, data: bytes, media_type: str, layer: Layer | None = None,
                  size: int = -1) -> None:
        """Answer a manifest or a blob, or the part of it that the client wants."""
        size, tag = len(data) if size < 0 else size, f'"{digest}"'
        headers = {"Docker-Content-Digest": digest, "ETag": tag}
        known = re.findall(r'\*|"[^"]*"', ",".join(self.headers.get_all("If-None-Match", ())))
        if tag in known or "*" in known:
            self._reply(b"", media_type, 304, size=size, headers=headers)
            return
        status, start, end = 200, 0, size
        if self._unknown == "BLOB_UNKNOWN":
            headers["Accept-Ranges"] = "bytes"
            wanted = self.headers.get("Range", "") if self.command == "GET" and self.headers.get(
                "If-Range", tag) == tag else ""
            if part := byte_range(wanted, size):
                status, (start, end) = 206, part
                if start >= end:
                    raise _HttpError(416, "UNSUPPORTED", "the range is outside the blob",
                                     Content_Range=f"bytes */{size}")
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._reply(data[start:end], media_type, status, size=end - start, headers=headers)
        if layer and self.command != "HEAD":
            with self._server.opener() as storage:  # this thread's own
                self._send_layer(self.registry.adopt(storage, layer), digest,
                                 _HeldBack(self.write, start, end, size))

    def _send_layer(self, layer: Layer, digest: str, out: Any) -> None:
        """Send a layer's tar; after an error the client misses its end."""
        try:
            sink = TarSink(out, hashing=True, layer=layer.id, chunk=SEND_SIZE)
            if (found := sink.take_all(layer.pieces())) != digest:
                raise IntegrityError("its tar has the wrong digest (`layer verify` says where)",
                                     layer=layer.id, expected=digest, actual=found)
            out.release()
        except _Enough:
            pass
        except (IntegrityError, FormatError, Unsupported, NeedsUnshare) as error:
            if not layer.removed():
                self.registry.refuse(layer, str(error))
                self._server.warn(f"{error}; it is not served any more")
            raise


def byte_range(text: str, size: int) -> tuple[int, int] | None:
    """Return start and end of the part that a Range header asks for, None for all.

    A malformed header, or one for several parts, asks for all; a start behind the end for nothing.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text, re.ASCII)
    first, last = match.groups() if match else ("", "")
    if not first + last or first and last and int(last) < int(first):
        return None
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


class RegistryServer(ClientServer):
    """Serves a Registry over HTTP, with an ``ssl_context`` over TLS.

    ``opener`` opens the same storage for each client.  ``passwords`` are user:password, of which a
    client must give one; without any, over a Unix socket, only this user and root are served,
    unless ``insecure``.  ``log`` gets a line for each request, ``warn`` what is damaged.
    """

    patience = PEER_TIMEOUT

    def __init__(self, registry: Registry, opener: Callable[[], Storage], *,
                 ssl_context: Any = None, passwords: Sequence[bytes] = (), insecure: bool = False,
                 clients: int = MAX_HTTP_CLIENTS, timeout: float = PEER_TIMEOUT,
                 idle: float = 120.0, log: Callable[[str], object] = str,
                 warn: Callable[[str], object] = str) -> None:
        from http.server import BaseHTTPRequestHandler

        clients = min(clients, max(soft_limit() // 12, 1))
        super().__init__(clients=clients, timeout=timeout, idle=idle)
        self.grace = timeout
        self.registry, self.opener, self.log, self.warn = registry, opener, log, warn
        self.passwords = [sha256_digest(binascii.b2a_base64(each, newline=False))
                          for each in passwords]
        self._context, self._is_open = ssl_context, insecure or bool(passwords)
        self._session: Any = type("HttpClient", (_HttpClient, BaseHTTPRequestHandler), {})

    def handle(self, sock: Any) -> None:
        client: Any = None
        try:
            sock.settimeout(self.timeout)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            elif not self._is_open and refuse_user(sock):
                return
            if self._context:
                sock = self._context.wrap_socket(sock, server_side=True,
                                                 do_handshake_on_connect=False)
            client = self._session(self, sock)
            if why := self._admit(client):
                client.send_error(429, why)
                return
            if self._context:
                sock.do_handshake()
            client.run()
        except (CstorError, ImportError, OSError, MemoryError):
            pass  # the client was told, or is gone
        finally:
            if client:
                client.idle_since = time.monotonic()
            drain(sock, 1.0)
            hang_up(sock)  # also for processes that were forked meanwhile
            sock.close()
            self._leave(client)


def read_passwords(path: str) -> list[bytes]:
    """Return the lines ``user:password`` of a file that others must not read."""
    with open(open_input(path), "rb") as file:
        if os.fstat(file.fileno()).st_mode & stat.S_IRWXO:
            raise NeedsUnshare(f"{path}: others may read or change it", hint=f"chmod 600 {path}")
        lines = [line for line in file.read(1 << 20).splitlines()
                 if line.strip() and not line.startswith(b"#")]
    for line in lines:
        if not re.match(rb"[^:]+:(?!\$(?:2[aby]|apr1|[156])\$|\{SHA\}).", line):
            raise FormatError("expected user:password; hashes of htpasswd are not supported",
                              file=path)
    if not lines:
        raise FormatError("it names no user", file=path)
    return lines


def tls_context(cert: str, key: str) -> Any:
    """Return what wraps sockets in TLS, with a certificate and its key in PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for path in (cert, key):
        os.close(open_input(path))
    try:
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise FormatError("not a certificate and its unencrypted key"
                          + f": {error.reason}" * bool(error.reason),
                          file=f"{cert}, {key}") from None
    return context


def listen_at(address: str) -> Any:
    """Return a context that gives a listening socket: ``[HOST:]PORT``, ``unix:PATH`` or "-"."""
    if address == "-":
        sock = passed_socket("AF_UNIX", "AF_INET", "AF_INET6")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise _UsageError("the socket that was passed does not listen: systemd needs Accept=no")
        return sock
    if re.match("unix:.", address):
        return ListeningSocket(address[5:])
    found = re.fullmatch(r"(?:(\[[^\]]+\]|[^:\[\]]+):)?([0-9]{1,5})", address)
    if not found or int(found[2]) > 65535:
        raise _UsageError("--registry must be [HOST:]PORT, unix:PATH or - for a passed socket, not "
                          + display(address))
    try:
        family, _, _, _, place = socket.getaddrinfo(
            (found[1] or "127.0.0.1").strip("[]"), int(found[2]), type=socket.SOCK_STREAM)[0]
        return socket.create_server(place, family=family, backlog=MAX_HTTP_CLIENTS,
                                    dualstack_ipv6=family == socket.AF_INET6
                                    and socket.has_dualstack_ipv6())
    except (OSError, UnicodeError) as error:  # of a name that DNS cannot have
        why = getattr(error, "strerror", "not a host name").partition(" (")[0]  # the address again
        raise CstorError(f"cannot listen at {display(address)}: {why}") from None


# ================================================================================================
# 28. Formats
#
# Tables are for people: short IDs, sizes and ages.  JSON holds raw values.  Only a terminal shows
# progress.  A result gets its name when it is whole.
# ================================================================================================

def to_json(value: Any, indent: int | None = None, comma: str = ",", **options: Any) -> str:
    """Return JSON; numbers that it has not, such as 1e999, become strings."""
    options.update(indent=indent, separators=None if indent else (comma, ":"))
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=str), **options)


def print_json(value: Any, head: str = "[", indent: int | None = 2) -> None:
    """Print JSON in ASCII: an object, a list, or an iterator's values as they come.

    ``head`` begins what holds these values: a list, or an object that ends with it.
    """
    # Without indent, a newline behind each comma; only between an iterator's objects one remains.
    if isinstance(value, (dict, list)):
        print(to_json(value, indent, ",\n"))
        return
    _, value = peek(value)
    sys.stdout.write(head)
    between = "\n"
    for entry in value if indent else iter(lambda: list(islice(value, 100)), []):
        text = to_json(entry, indent, ",\n")
        text = "  " + text.replace("\n", "\n  ") if indent else text[1:-1].replace(',\n"', ',"')
        sys.stdout.write(between + text)
        between = ",\n"
    sys.stdout.write("\n]}\n" if head[0] == "{" else "\n]\n")


def table_lines(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield aligned columns; columns that are empty in every row are left out."""
    kept = [i for i in range(len(headers)) if not rows or any(row[i] for row in rows)]
    lines = [[headers[i] for i in kept]] + [[display(row[i]) for i in kept] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()


def show(args: Any, value: Any, text: Iterable[Any], headers: Sequence[str] = (),
         ids: Iterable[str] = (), head: Callable[[], str] = lambda: "[") -> None:
    """Print ``value`` as JSON or ``text`` for people, as --format says; both may be lazy.

    With ``headers`` the text is the rows of a table; -q prints ``ids`` instead.  Without, it is
    lines, and values of an iterator are printed as they come.
    """
    if args.format == "json":
        print_json(list(value) if headers and not isinstance(value, dict) else value, head())
        return
    if getattr(args, "ids", False):
        text = (display(short_id(name, args)) for name in dict.fromkeys(ids) if name)
    elif headers:
        text = table_lines(headers, list(text))
    for line in text:
        if isinstance(line, bytes):
            sys.stdout.buffer.write(line)
        else:
            print(line)


def show_inspected(args: Any, entries: Iterable[dict[str, Any]]) -> None:
    """Print objects as a JSON array, or as tables of keys and values; nothing if all failed."""
    found = list(entries)
    if args.format == "json" and found:
        print_json(found)
    for entry in found if args.format == "table" else ():
        show(args, None, ([key, value if isinstance(value, str) else json.dumps(value)]
                          for key, value in entry.items()), ["KEY", "VALUE"])


def human_size(size: int) -> str:
    """Spell bytes as podman does: powers of 1000, three digits."""
    if size < 0:
        return "unknown"
    value, units = float(size), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and units[1:]:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def human_age(moment: int | None) -> str:
    """Spell how long ago ``moment`` (ns since 1970) was, as podman does; "" for None."""
    if moment is None:
        return ""
    seconds = max(0, min(time.time_ns() - moment, (1 << 63) - 1) // 10**9)  # Go's longest
    minutes, hours = seconds // 60, (seconds + 1800) // 3600
    unit, count = next((unit, count) for unit, count, fits in (
        ("second", seconds, seconds < 60), ("minute", minutes, minutes < 60),
        ("hour", hours, hours < 48), ("day", hours // 24, hours < 24 * 14),
        ("week", hours // 168, hours < 24 * 60), ("month", hours // 720, hours < 24 * 730),
        ("year", hours // 8760, True)) if fits)
    return {("second", 0): "Less than a second", ("minute", 1): "About a minute",
            ("hour", 1): "About an hour"}.get((unit, count), counted(count, unit)) + " ago"


def age_of(text: Any) -> str:
    """Spell how long ago an RFC 3339 time was; other text as it is."""
    with suppress(FormatError, TypeError):
        return human_age(parse_time(text))
    return str(text or "")


def short_id(text: str, args: Any) -> str:
    """Cut each word, an ID or digest, to twelve characters unless --no-trunc is given."""
    return text if args.no_trunc else " ".join([
        word.replace("sha256:", "", 1)[:12] for word in text.split(" ")])


def short_step(command: str, args: Any, width: int = 40) -> str:
    """Cut a history line unless --no-trunc is given."""
    return command if args.no_trunc or len(command) <= width else command[:width - 3] + "..."


def image_json(image: Image) -> dict[str, Any]:
    """Return an image's record with what listings add: size, manifest-list, store, faults ..."""
    instances = {"instances": [
        {"platform": platform_name(entry.get("platform")), "digest": entry.get("digest"),
         "id": instance and instance.id} for entry, instance in image.entries()]
        } if image.is_list else {}
    return {**image.record, "names": image.names, "size": image.size,
            "architecture": image.about.get("architecture", ""), "os": image.about.get("os", ""),
            "labels": image.labels, "repo-digests": image.repo_digests,
            "manifest-list": image.is_list, **instances, "store": image.root.path,
            "readonly": image.readonly, "faults": image.faults}


def layer_json(layer: Layer) -> dict[str, Any]:
    """Return a layer's record with what listings add: store, readonly, faults."""
    return {**layer.record, "names": layer.names, "store": layer.root.path,
            "readonly": layer.readonly, "faults": layer.faults}


def container_json(container: Container) -> dict[str, Any]:
    """Return a container's record with image-name, and podman's state, pod and rootfs."""
    details, state = container.details(), container.state
    return {**container.record, "names": container.names, "image-name": container.image_name,
            "state": container.status, "engine": state.get(
                "engine", "cri-o" if "pod-id" in details else "podman" if details else ""),
            "pod": state.get("pod") or details.get("pod-name", ""),
            "rootfs": state.get("rootfs", ""), "labels": container.labels,
            "volatile": container.volatile, "store": container.root.path,
            "faults": container.faults}


def file_json(path: bytes, node: Node, first: bytes | None = None) -> dict[str, Any]:
    """Return what is known of a file, as in a TOC, with its path and layer."""
    entry = toc_entry(path, node, first=None if first is None else b"/" + first)
    entry.pop("name")
    mark = {"unverified": True} if node.tree.layer and node.tree.layer.unverified else {}
    return {"path": spell(path), **entry, "layer": node.tree.layer_id, **mark}


def file_line(item: tuple[bytes, Node, bytes | None], args: Any, raw: bool) -> bytes:
    """Return a name, or with -l a line like that of ``ls -l``; ``raw``: unescaped."""
    path, node, first = item
    end = b"\0" if args.null else b"\n"
    name, target = (text if raw else display(text).encode("utf-8", "replace") for text in
                    (path, node.linkname if first is None else b"/" + first))
    if not args.long:
        return name + end
    letters = stat.filemode(FILE_TYPES.get(node.type, 0) | node.mode)
    hard = first is not None or node.type == "hardlink"
    size = f"{node.device[0]}, {node.device[1]}" if node.type in ("char", "block") \
        else str(node.size)
    owner, group = (display(word) if word else str(number) for word, number in
                    zip(node.owner[2:], node.owner[:2]))
    moment = "-" if node.implicit else format_time(node.mtime_ns)[:19].replace("T", " ") \
        or str(node.mtime_ns // 10**9)
    text = (f"{'h' + letters[1:] if hard else letters}"
            f"{'+' if node.extra and node.xattrs else ' '} "
            f"{owner:>8} {group:>8} {size:>12} {moment:19} ").encode()
    return text + name + ((b" link to " if hard else b" -> ") + target if target else b"") + end


def summary_lines(summary: dict[str, Any]) -> tuple[str, str]:
    """Return the two lines that say what an extraction made."""
    words = ("files", "directories", "symlinks", "hardlinks", "devices", "fifos", "sockets",
             "whiteouts")
    made = ", ".join(counted(summary[word], word[:-3] + "y" if word == words[1] else word[:-1])
                     for word in words if summary[word] or word in words[:2])
    parts = [f"{human_size(summary[key])} {gloss}" for key, gloss in (
        ("bytes-reflinked", "shared by reflink"), ("bytes-hardlinked", "shared by hard link"),
        ("bytes-copied", "copied")) if summary[key]]
    why = [f"{row['why']}, {counted(row['files'], 'file')}" for row in summary["refused"]]
    return made, (", ".join(parts) or "0 B") + (f" ({'; '.join(why)})" if why else "")


def difference_lines(first: dict[str, Any], rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines for differences of two tars."""
    place = f'{display(unspell(first["entry"]))}: ' if first["entry"] is not None else ""
    inside = f' at {first["contentOffset"]}' if "contentOffset" in first else ""
    yield (f'first difference at offset {first["offset"]}: {place}{display(first["field"])}'
           f'{inside}{" of " + first["ended"].upper() if "ended" in first else ""}')
    for row in rows:
        name = f' {display(unspell(row["entry"]))}' if row["entry"] is not None else ""
        field = f' {display(row["field"])}' if "field" in row else ""
        values = ["-" if value is None else f'{value["size"]} bytes, sha256:{value["sha256"]}'
                  if isinstance(value, dict) else display(unspell(value))
                  if isinstance(value, str) else str(value) for value in (row["a"], row["b"])]
        word = "cannot be read further" if row["change"] == "unreadable" else row["change"]
        yield f"{word}{name}{field}: {values[0]} -> {values[1]}"


def blame_lines(rows: Iterable[dict[str, Any]], args: Any) -> Iterator[str]:
    """Yield the lines for what blame_tree() yields."""
    count = wasted = 0
    yield f"{'LAYER':12}  {'WASTED' if args.hidden else 'SIZE':>9}  {'STEP':40}  PATH"
    for row in rows:
        count, wasted = count + 1, wasted + row.get("wasted", 0)
        size = row.get("wasted" if args.hidden else "size")
        gloss = f"{row['how']} in {short_id(row['hidden-by'], args)}" if args.hidden \
            else ", ".join(f"hides {short_id(item['layer'], args)} "
                           f"({human_size(item.get('size', 0))})" for item in row["hides"])
        yield (f"{short_id(row['layer'], args):12}  {'' if size is None else human_size(size):>9}  "
               f"{display(short_step(row['created-by'], args)):40}  "
               f"{display(unspell(row['path']))}" + (f"  ({gloss})" if gloss else ""))
    if args.hidden:
        yield (f"{count} hidden, {human_size(wasted)} wasted; `layer cat LAYER PATH` still shows "
               "them")


class ProgressLine:
    """A line on stderr that shows the progress of a long job; only on a terminal."""

    INTERVAL = 0.2  # seconds

    def __init__(self, total: int, quiet: bool) -> None:
        self.total = total
        self.active = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self.start = self.shown = time.monotonic()
        self._done = self._before = (0, 0)  # bytes and files in all, and before this part

    def __call__(self, size: int, files: int) -> None:
        if not size and not files:
            self._before = self._done
        self._done = self._before[0] + size, self._before[1] + files
        if self.active and time.monotonic() - self.shown >= self.INTERVAL:
            self.shown = time.monotonic()
            self._draw(self._done[0])

    def expect(self, nodes: Iterable[Node], verified: Sequence[LayerTree] = ()) -> None:
        """Compute the total, if it is shown: the sizes of files, each once, and of layers' tars."""
        several: set[Node] = set()  # with more than one name
        if self.active:
            try:
                for node in nodes:
                    self.total += node.size if node not in several else 0
                    several.update([node] * (node in node.tree.linked))
                self.total += sum(max(tree.layer.diff_size, 0) for tree in verified if tree.layer)
            except (CstorError, OSError):  # the work itself will report it
                self.total = 0

    def _draw(self, size: int) -> None:
        """Show as much as fits the terminal; text in its last column would begin a new line."""
        rate = size / (self.shown - self.start)
        text, percent = human_size(size), f"{min(100 * size // max(self.total, 1), 100)}%"
        if self.total > 0:
            left = int(max(self.total - size, 0) / rate) if rate else 0
            text += f" of {human_size(self.total)} ({percent}), {left // 60}:{left % 60:02d} left"
        texts = [f"{text}, {counted(self._done[1], 'file')}, {human_size(int(rate))}/s", text,
                 percent if self.total > 0 else text]
        room = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
        text = next((text for text in texts if len(text) <= room), texts[-1][:room])
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.active and not kind and self.shown > self.start and self.total > 0:
            self._draw(self.total)
        self.stop()

    def stop(self) -> None:
        """Remove the line for good."""
        if self.active:
            self.active = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@contextmanager
def open_output(path: str | None, timeout: float, *, text: bool = False) -> Iterator[int]:
    """Open what takes a stream, and return its descriptor: stdout, FIFO, device or NewFile."""
    def explain(error: OSError) -> Exception:
        name_error(error, path or "stdout")  # errors of the source name their file
        return CstorError(f"{display(path)}: {error.strerror}") \
            if path and isinstance(error, BrokenPipeError) else error  # main() blames stdout

    def rename(error: OSError) -> Exception:
        return OSError(error.errno, error.strerror, path)

    if path in (None, "-"):
        path, fd = None, sys.stdout.fileno()
        if os.isatty(fd) and not text:
            raise _UsageError("refusing to write a tar to a terminal: use -o FILE or redirect")
        widen_pipe(fd)
        with ErrorsAs(explain):
            yield fd
        return
    if not path or path.endswith("/"):
        raise _UsageError(f'not a file name: "{path}"')
    opened = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", {
        "/dev/stdout": "/dev/fd/1", "/dev/stderr": "/dev/fd/2"}.get(path, path), re.ASCII)
    if not opened:
        refuse_storage(path)
    if opened or os.path.exists(path) and not os.path.isfile(path):
        # A new file would replace the one that the shell appends to.
        with ErrorsAs(explain), Opened(os.dup(int(opened[1])) if opened
                                       else open_special(path, timeout)) as fd:
            yield fd
        return
    folder, name = os.path.split(os.fsencode(os.path.realpath(path)))
    unwind_on_signals()
    with ErrorsAs(rename):
        file = NewFile(path, Directory("", os.open(folder, OPEN_DIRECTORY)), name)
    with file:
        say_removed(folder, file.removed)
        yield file.fd
        with ErrorsAs(rename), SignalsHeld():
            file.appear(name)


def open_special(path: str, timeout: float) -> int:
    """Open a device, or a FIFO; wait until it has a reader."""
    deadline = Deadline(timeout)
    flags = os.O_WRONLY | os.O_NONBLOCK * stat.S_ISFIFO(os.stat(path).st_mode)
    while True:
        try:
            fd = os.open(path, flags)
            os.set_blocking(fd, True)
            return fd
        except OSError as error:
            if error.errno != errno.ENXIO or not flags & os.O_NONBLOCK:
                raise
        if not deadline.pause():
            raise CstorError(
                f"{display(path)}: no program has opened this FIFO for reading for "
                f"{counted(f'{timeout:g}', 'second')}", hint="--timeout SECONDS waits longer")


@contextmanager
def writing(args: Any, total: int) -> Iterator[tuple[int, ProgressLine]]:
    """Open what -o names, or stdout; return its descriptor and the progress of ``total`` bytes."""
    with open_output(getattr(args, "output", None), args.timeout) as fd, \
            ProgressLine(total, args.quiet) as progress:
        yield fd, progress


def say_removed(folder: bytes, names: Iterable[bytes]) -> None:
    """Say what remove_dead() has removed."""
    for name in names:
        say(f"warning: removed what a killed run left: {display(os.path.join(folder, name))}")


def unwind_on_signals() -> None:
    """Let the first SIGINT, SIGTERM or SIGHUP raise, and ignore others, so that we clean up."""
    def stop(number: int, _: object) -> None:
        for other in _handlers:
            signal.signal(other, lambda *_: None)
        raise _Stopped(number)

    with suppress(ValueError):  # only the main thread can handle signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if (before := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler):
                _handlers[number] = before
                signal.signal(number, stop)


_handlers: dict[int, Any] = {}  # that unwind_on_signals() replaced


def say(message: str) -> None:
    """Print one line on stderr, where there is one."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"cstor: {message}\n")  # at once: threads log, too
    except OSError:  # stderr fails; at exit Python would try again, and return 120
        sys.stderr = None


def note(args: Any, text: str) -> None:
    """Print a note, unless -q is given."""
    if not args.quiet:
        say(f"note: {text}")


def describe(error: Exception) -> str:
    """Return an error as one line: what, where, and the next step."""
    if isinstance(error, OSError) and error.strerror:
        place = display(os.fsencode(error.filename)) + ": " \
            if isinstance(error.filename, (str, bytes)) else ""
        text = place + error.strerror
        if error.errno == errno.EMFILE:
            text += f": at most {soft_limit()} are allowed (ulimit -n N allows more)"
        if place and error.errno == errno.ENOENT and not has_proc() and os.path.realpath(
                os.fsencode(error.filename)).startswith(b"/proc/"):  # /dev/stdout leads there
            text += ": /proc is not mounted (mount -t proc proc /proc; - is stdin and stdout)"
    elif isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, ImportError):
        text = explain_import(error)
    else:
        text = display(str(error)) or type(error).__name__
    if isinstance(error, Ambiguous) and error.candidates:
        text += ": " + "; ".join(error.candidates)
    hint = getattr(error, "hint", "")
    return f"{text} ({hint})" if hint else text


def report_error(error: Exception, trace: bool) -> int:
    """Say on one line of stderr what failed, after its traceback if asked; return the status."""
    if trace:
        traceback.print_exception(type(error), error, error.__traceback__)
    say(f"error: {describe(error)}")
    return error_row(error)[0]


def for_each(args: Any, words: Iterable[str], action: Callable[[str], T]) -> Iterator[T]:
    """Yield what ``action`` returns for each argument; report those that fail, and go on.

    The highest status counts.  An OSError without a file name comes from the output, and ends all;
    so does an error object that comes twice, since all share its cause: a malformed file.
    """
    last: Exception | None = None
    for word in words:
        try:
            yield action(word)
        except (CstorError, OSError) as error:
            if not isinstance(error, CstorError) and error.filename is None:
                raise
            if error is last:
                return
            last = error
            args.status = max(args.status, report_error(error, args.verbose > 1))


def find_named(storage: Storage, args: Any, reference: str | None = None) -> Any:
    """Return the image, layer or container that the arguments name."""
    platform = [args.platform] if args.kind == "image" else []
    return getattr(storage, args.kind)(
        getattr(args, args.kind) if reference is None else reference, *platform)


def open_tree(storage: Storage, args: Any, reference: str | None = None) -> Tree:
    """Return the tree of the image, layer or container that the arguments name."""
    platform = {"platform": args.platform} if args.kind == "image" else {}
    tree: Tree = find_named(storage, args, reference).tree(**platform)
    return tree


def path_of(tree: Tree, text: str) -> bytes:
    """Return the path that an argument names: as given, or else in the spelling of JSON."""
    path = os.fsencode(text)
    if unspell(text) != path:
        try:
            tree.lookup(path, follow=False)
        except NotFound:
            return unspell(text)
    return path


PATH_SIDE = r"(?:dir:|tar:(?=.)|(?=[/.])|(?=-\Z))(.*)"


def open_side(storage: Storage, text: str, known: dict[str, LayerTree], platform: str
              ) -> Tree | None:
    """Return the tree of one side of a comparison, None for a path of the host.

    An image, container or layer is looked up in this order, unless ``image:``, say, tells the kind.
    """
    if re.fullmatch(PATH_SIDE, text, re.DOTALL):
        return None
    kind, _, rest = text.partition(":")
    for word, find in FINDERS.items():
        options: Any = {"platform": platform} if word == "image" else {}
        for reference in [text] + [rest] * (word == kind and bool(rest)):
            try:
                found = find(storage, reference, **options)
            except tuple(UNKNOWN.values()):
                continue
            tree: Tree = found.tree() if word == "layer" else found.tree(known, **options)
            return tree
    raise ImageUnknown(f"image not known: {display(text)}", hint=guess(storage, "image", text)
                       or "no container or layer has this name either; a path begins with / or ./")


def open_path(text: str, raw: bool) -> Tree:
    """Return the tree of a directory or tar file of the host; "-" is a tar on stdin."""
    path = re.sub(PATH_SIDE, r"\1", text, count=1, flags=re.DOTALL)
    if os.path.isdir(path):
        return Tree([DiskTree(Directory.at(path), overlay=raw)], path)
    input_size(path)  # that it is there
    return Tree([TarTree(path, whiteouts=raw)], path)


def print_layers(layers: Sequence[Layer], args: Any) -> None:
    """Print layers in the given order."""
    show(args, map(layer_json, layers), (
        [short_id(layer.id, args), short_id(layer.parent, args), short_id(layer.diff_digest, args),
         human_age(layer.created_ns), human_size(layer.diff_size), ", ".join(layer.names),
         "; ".join(layer.faults)] for layer in layers),
        ["LAYER ID", "PARENT", "DIFF DIGEST", "CREATED", "SIZE", "NAMES", "FAULTS"],
        (layer.id for layer in layers))


def layer_branches(layers: Iterable[Layer]) -> Iterator[tuple[str, Layer]]:
    """Yield layers, each behind its parent, with the branch that leads to it in podman's style."""
    known = {layer.id: layer for layer in layers}
    below: dict[str | None, list[Layer]] = {}  # a malformed ID is ""
    for layer in known.values():
        above = layer.parent if layer.parent and layer.parent in known else None
        try:
            with suppress(LayerUnknown):
                layer.storage.chain(layer.id)
        except FormatError:  # a loop
            above = None
        below.setdefault(above, []).append(layer)
    todo: list[tuple[Any, ...]] = [("", *below[None][::-1])] if below else []
    while todo:
        indent, *rest, layer = todo.pop()
        todo += [(indent, *rest)] * bool(rest)
        yield indent + ("├── " if rest else "└── "), layer
        if layer.id in below:
            todo.append((indent + ("│   " if rest else "    "), *below[layer.id][::-1]))


def show_tree(branches: Iterable[tuple[str, Layer]], args: Any, value: dict[str, Any] | None = None,
              head: Iterable[str] = ()) -> None:
    """Print layers as a tree, with the images and containers that need each; JSON has a list."""
    rows, lines, users = [], list(head), dict[str, list[Record]]()
    for branch, layer in branches:
        users = users or users_of(layer.storage)
        needing: list[Any] = users.get(layer.label, [])
        tops = [each for each in needing if not isinstance(each, Layer) and each.layer == layer.id]
        images = [each.id for each in needing if isinstance(each, Image)]
        rows.append({**layer_json(layer), "depth": len(branch) // 4 - 1, "images": images,
                     "top-layer-of": [each.id for each in tops]})
        text = " ".join(display(name) for each in tops for name in each.names or [each.id[:12]])
        lines.append(
            f"{branch}ID: {short_id(layer.id, args)} Size: {human_size(layer.diff_size):>7}"
            + f" Top Layer of: [{text}]" * bool(tops)
            + f" Shared by: {len(images)} images" * (len(images) > 1))
    show(args, rows if value is None else {**value, "layers": rows}, lines,
         ids=(row["id"] for row in rows))


def note_open_steps(history: Sequence[dict[str, Any]], args: Any) -> None:
    """Say on stderr that layers have no known step in a history."""
    bare = sum("layer" in row and len(row) == 2 for row in history)
    if any("size" in row and "layer" not in row for row in history):
        note(args, "the history has more steps than layers: the step of each layer is unknown")
    elif bare:
        note(args, f"the history has no step for the {counted(bare, 'lowest layer')}")


def show_findings(args: Any, found: Sequence[Finding], sound: str) -> bool:
    """Print findings, ``sound`` for none; tell whether there is more than notes."""
    rows = [[each.severity, each.code, short_id(each.object, args), each.path or "",
             each.message + f": expected {each.expected}" * (each.expected not in (None, ""))
             + f", got {each.actual}" * bool(each.actual)] for each in found]
    show(args, [each.as_json() for each in found], rows if rows else [sound],
         ["SEVERITY", "CODE", "OBJECT", "PATH", "MESSAGE"] * bool(rows))
    return any(each.severity != "note" for each in found)


def usage_lines(found: Mapping[str, Any], args: Any) -> Iterator[str]:
    """Yield the lines of `store df`, tables as those of `podman system df -v`."""
    def row(entry: dict[str, Any], front: list[str], *keys: str) -> list[str]:
        return [*front, short_id(entry["id"], args), age_of(entry["created"]), *(
            human_size(entry[key]) for key in ("apparent-size", "disk-size", *keys))]

    sizes = ["CREATED", "SIZE", "ON DISK"]
    yield "Images space usage:\n"
    yield from table_lines(
        ["REPOSITORY", "TAG", "IMAGE ID", *sizes, "SHARED SIZE", "UNIQUE SIZE", "CONTAINERS"],
        [[*row(entry, [repository, tag or "<none>"], "shared-size", "unique-size"),
          str(len(entry["containers"]))] for entry in found["images"] for repository, tag, _ in
         map(split_reference, entry["names"] or ["<none>"])])
    for key, title in (("containers", "Containers"), ("unused-layers", "Unused layers")):
        if found[key]:
            yield f"\n{title} space usage:\n"
            yield from table_lines(["NAMES", "ID", *sizes], [
                row(entry, [", ".join(entry["names"])]) for entry in found[key]])
    yield f"\n{human_size(found['disk-size'])} on disk"
    parts = ", ".join(f"{key.replace('-', ' ')} {human_size(size)}"
                      for key, size in found["can-be-freed"].items() if key != "total")
    yield f"{human_size(found['can-be-freed']['total'])} can be freed: {parts}"


def info_text(value: Any) -> str:
    """Return a value of `store info` as text."""
    if isinstance(value, (dict, list)):
        return ", ".join(value if isinstance(value, list) else map(" ".join, value.items()))
    return {"None": "unknown", "True": "yes", "False": "no"}.get(str(value), str(value))


def export_tree(tree: Tree, args: Any, path: bytes = b"", name: bytes = b"") -> None:
    """Write a tree, or ``path`` as ``name``, as a tar to stdout or a file."""
    verify = getattr(args, "verify", False)
    with tree, writing(args, 0) as (fd, progress):
        part = tree.part([path.split(b"/")]) if path else tree
        progress.expect((node for _, node, _ in part.walk(path)), tree.layers * verify)
        part.export(fd, path=path, name=name, verify=verify, progress=progress)


def copy_directory(tree: Tree, path: bytes, dest: str, args: Any) -> None:
    """Copy a directory to a new name, or over an empty directory; it appears when it is whole."""
    if os.path.lexists(dest) and (os.path.islink(dest) or not os.path.isdir(dest)
                                  or os.listdir(dest)):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), dest)
    unwind_on_signals()
    tree = tree.part([path.split(b"/")]) if path else tree
    output = OutputDirectory(dest, whole=True)
    say_removed(os.fsencode(os.path.dirname(dest)), output.removed)
    with output, ProgressLine(0, args.quiet) as progress:
        progress.expect(node for _, node in select_nodes(tree, top=path))
        left_out = Extraction(output, plain=True, verify=True, progress=progress).run(
            select_nodes(tree, top=path))["left-out"]
    for place in left_out:
        say("warning: skipped (device, socket or whiteout): "
            f"{display(b'/' + path if path else b'')}{display(unspell(place))}")


@contextmanager
def fetched(args: Any, target: str) -> Iterator[tuple[FetchedImage, Any]]:
    """Fetch the image that --via-skopeo names; return it, and the progress to go on with."""
    if args.via_skopeo.startswith("containers-storage:"):
        raise _UsageError("skopeo would write to the storage and leave a mount there: name the "
                          "image itself, without --via-skopeo")
    refuse_storage(target)
    with ProgressLine(0, args.quiet) as progress, FetchedImage(
            args.via_skopeo, platform=args.platform, progress=progress) as image:
        progress(0, 0)
        yield image, progress


# ================================================================================================
# 29. Queries
#
# What lists show, in which order and how: filters, sort keys and Go templates as podman has them.
# A row has podman's fields; our own lists take the same rows and print records.
# ================================================================================================

class Fields(dict):  # type: ignore[type-arg]
    """A struct of Go: it has no other fields, while a map can lack any key.

    JSON leaves out the fields in ``omit`` when they are empty, and shows ``raw`` instead, if given.
    """

    def __init__(self, fields: Mapping[str, Any], omit: str = "", raw: Fields | None = None
                 ) -> None:
        super().__init__(fields)
        self.omit, self.raw = omit.split(), raw or self

    def find(self, name: str) -> Any:
        """Return a field by Go's name or JSON's, which differ in case, "_" and "-"."""
        if name not in self:
            same = {re.sub("[-_]", "", key).lower(): key for key in self}
            if name.lower() not in same:
                raise _UsageError(f"unknown field in the template: .{display(name)}; there are "
                                  + ", ".join(f".{key.replace('-', '')}" for key in self))
            name = same[name.lower()]
        return self[name]


class GoTime(str):
    """An RFC 3339 time of JSON, which templates print in Go's own form."""


ZERO_TIME = "0001-01-01T00:00:00Z"  # of Go
NO_VALUE = ()  # what a map has for a missing key
NIL: list[Any] = []  # a list that is not there: JSON has null
ACTION = (r"""\{\{(-(?=\s))?((?:/\*[^*]*\*/|"(?:\\.|[^"\\])*"|`[^`]*`"""
          r"""|(?!/\*[^*]*\*/)[^"`{}])*)\}\}""")
TOKEN = r"""\)(?:\.\w+)+|[()|,]|:?=|"(?:\\.|[^"\\])*"|`[^`]*`|[^\s()|,"`:=]+"""


def as_json(value: Any) -> Any:
    """Return a value without the fields that JSON leaves out."""
    if isinstance(value, dict):
        omit, fields = (value.raw.omit, value.raw) if isinstance(value, Fields) else ([], value)
        return {key: as_json(each) for key, each in fields.items() if each or key not in omit}
    return None if value is NIL else list(map(as_json, value)) if isinstance(value, list) else value


def go_moment(text: Any) -> int:
    """Return an RFC 3339 time in nanoseconds since 1970, Go's zero time for any other text."""
    moment = None
    with suppress(FormatError, TypeError):
        moment = parse_time(text)
    return -62135596800 * 10**9 if moment is None else moment


def go_time(text: str, layout: str = "2006-01-02 15:04:05.999999999 -0700 MST") -> str:
    """Return an RFC 3339 time in its own zone, in a layout of Go's."""
    zone = "".join(re.findall(r"[+-]\d\d:\d\d\Z", text))
    moment, wall = go_moment(text), go_moment(text.removesuffix(zone) + "Z" * bool(zone))
    when, here = time.gmtime(wall // 10**9), time.localtime(moment // 10**9)
    words = dict(zip("January Monday Jan Mon 01 02 03 04 05 06 15 PM 1 2 3 4 5".split(),
                     time.strftime("%B %A %b %a %m %d %I %M %S %y %H %p %-m %-d %-I %-M %-S",
                                   when).split()))
    words.update({
        "2006": f"{when.tm_year:04}", "-0700": zone.replace(":", "") or "+0000",
        "Z07:00": zone or "Z", "MST": "UTC" if not zone else here.tm_zone
        if here.tm_gmtoff == (wall - moment) // 10**9 else zone.replace(":", ""),
        ".000": f".{wall % 10**9:09}"[:4],
        ".999999999": f".{wall % 10**9:09}".rstrip("0").rstrip(".")})
    return re.sub("|".join(sorted(map(re.escape, words), key=len, reverse=True)),
                  lambda match: words[match[0]], layout)


def go_text(value: Any) -> str:
    """Return a value as Go prints it."""
    if value is None or value == NO_VALUE:
        return "map[]" if value is None else "<no value>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{' '.join(map(go_text, value))}]"
    if isinstance(value, Fields):
        return f"{{{' '.join(map(go_text, value.values()))}}}"
    if isinstance(value, dict):
        return f"map[{' '.join(f'{key}:{go_text(value[key])}' for key in sorted(value))}]"
    return go_time(value) if isinstance(value, GoTime) else str(value)


def go_field(value: Any, path: str) -> Any:
    """Return what the fields in ``path``, each behind a dot, lead to."""
    for name in path.split(".")[1:]:
        if isinstance(value, GoTime):
            value = Fields({"Year": int(go_time(value, "2006")), "Unix": go_moment(value) // 10**9,
                            "Format": lambda layout, *, text=value: go_time(text, layout)})
        if isinstance(value, Fields):
            value = value.find(name)
        elif isinstance(value, dict) or not value:
            value = (value or {}).get(name, NO_VALUE)
        else:
            raise ValueError(f"{go_text(value)[:40]} has no field .{name}")
    return value


def go_index(value: Any, *keys: Any) -> Any:
    """Return an element of a list or map, "" for a missing key of a map."""
    for key in keys:
        value = dict(enumerate(value))[key] if isinstance(value, (list, str)) \
            else (value or {}).get(key, "")
    return value


def go_call(word: str, first: Any, *arguments: Any) -> Any:
    """Return what a function gives for arguments, or without arguments any other value."""
    with suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        if not any(map(callable, arguments)):
            return first(*arguments) if callable(first) or arguments else first
    given = ["a function" if callable(each) else go_text(each)[:40] for each in arguments]
    raise ValueError(f"{word} cannot be called with {', '.join(given) or 'no arguments'}")


def go_print(*values: Any) -> str:
    """Return values with a space between two of which neither is a string."""
    return "".join(" " * (str not in (type(one), type(two))) + go_text(two)
                   for one, two in zip(("", *values), values))


def go_quote(value: Any) -> str:
    """Return a value as Go's %q prints it."""
    return f"[{' '.join(map(go_quote, value))}]" if isinstance(value, list) \
        else json.dumps(go_text(value), ensure_ascii=False)


def go_printf(form: str, *values: Any) -> str:
    """Return values in a format of Go: Python's, and the verbs v, t and q."""
    verbs = re.findall(r"%[-.\d]*(.)", form.replace("%%", ""))
    words = [go_quote(value) if verb == "q" else go_text(value) if verb in "svt" else value
             for verb, value in zip(verbs, values)]
    return re.sub(r"(%[-.\d]*)[vtq]", r"\1s", form) % (*words, *values[len(verbs):])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value, "eq": lambda value, other, *more: value in (other, *more),
    "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "index": go_index,
    "len": lambda value: len([] if value is None else value),
    "join": lambda words, by: by.join(words), "split": lambda text, by: text.split(by),
    "lower": lambda text: text.lower(), "upper": lambda text: text.upper(),
    "title": lambda text: re.sub(r"(?<!\w)\w", lambda match: match[0].upper(), text),
    "slice": lambda value, first=0, end=None: value[first:end],
    "truncate": lambda text, length: text[:length],
    "json": lambda value: to_json(as_json(value), ensure_ascii=False),
    "print": go_print, "println": lambda *values: " ".join(map(go_text, values)) + "\n",
    "printf": go_printf}


class Template:
    """A Go template: text with actions in ``{{ }}``, whose pipelines become functions of a scope.

    A scope has "." and variables, and looks for others in the scope of the block around its own.
    """

    def __init__(self, text: str) -> None:
        parts = re.split(ACTION, text)  # text, then "-" or None, action, text for each action
        self._items: list[str | list[str]] = []
        trim = False
        for plain, dash, action in zip_longest(parts[::3], parts[1::3], parts[2::3]):
            if "{{" in plain:
                action = plain[plain.index("{{"):].partition("\n")[0]
                raise _UsageError(f"malformed template: {display(action)} has no }}}}")
            plain = plain.lstrip() if trim else plain
            words = re.findall(TOKEN, action or "")
            trim = words[-1:] == ["-"]
            self._items += [plain.rstrip() if dash else plain, words[:-1] if trim else words]
        try:
            self._nodes, end = self._block()
        except RecursionError:
            raise _UsageError("malformed template: too deeply nested") from None
        if end:
            raise _UsageError(f"malformed template: unexpected {{{{{end[0]}}}}}")

    def render(self, dot: Any, top: Any = None) -> str:
        """Return the text for a value, one of ``top`` if that is given."""
        try:
            return self._text(self._nodes, ChainMap({".": dot, "$": dot if top is None else top}))
        except ValueError as error:
            raise _UsageError(f"the template does not fit: {display(str(error))}") from None
        except KeyError as error:
            raise _UsageError(f"there is no variable {error.args[0]} in the template") from None
        except RecursionError:
            raise _UsageError("malformed template: too deeply nested") from None

    def _text(self, nodes: Sequence[Any], scope: ChainMap[str, Any]) -> str:
        return "".join(node if isinstance(node, str) else self._run(scope, *node) for node in nodes)

    def _run(self, scope: ChainMap[str, Any], word: str, names: Sequence[str],
             value: Callable[[ChainMap[str, Any]], Any], body: Sequence[Any], other: Sequence[Any]
             ) -> str:
        """Return the text of an action that _action() has read."""
        found = value(scope)
        if word == "range" and found:
            if not isinstance(found, (dict, list)):
                raise ValueError(f"range needs a list or map, not {go_text(found)[:40]}")
            pairs = sorted(found.items()) if isinstance(found, dict) else enumerate(found)
            return "".join(self._text(body, scope.new_child({".": item, **dict(
                zip(names[::-1], (item, key)))})) for key, item in pairs)
        if word.isalpha():
            dot = {".": found} if word == "with" and found else {}
            return self._text(body if found else other, scope.new_child({
                **dot, **dict.fromkeys(names, found)}))
        for name in names:
            _ = word == "=" and scope[name]  # it must be there
            next(each for each in scope.maps if not word or name in each)[name] = found
        return "" if names else go_text(found)

    def _block(self) -> tuple[list[Any], list[str]]:
        """Read up to ``{{end}}`` or ``{{else}}``, and return its words as well."""
        nodes: list[Any] = []
        while self._items:
            item = self._items.pop(0)
            if isinstance(item, str):
                nodes.append(item)
            elif item[:1] in (["end"], ["else"]):
                return nodes, item
            elif item and not item[0].startswith("/*"):
                nodes.append(self._action(item))
        return nodes, []

    def _action(self, tokens: list[str]) -> tuple[Any, ...]:
        """Read an action: its word, if any, the variables it sets, its value, and two blocks."""
        word = tokens.pop(0) if tokens[0] in ("if", "range", "with") else ""
        at = next((at for at, token in enumerate(tokens, 1) if token in (":=", "=")), 0)
        names = [token for token in tokens[:at] if token[0] == "$"]
        value, other = self._pipeline(tokens[at:]), []
        body, end = self._block() if word else ([], ["end"])
        if end[:1] == ["else"]:
            other, end = ([self._action(end[1:])], ["end"]) if end[1:] else self._block()
        if end != ["end"]:
            raise _UsageError(f"malformed template: {{{{{word}}}}} has no {{{{end}}}}")
        return word or "=" * (tokens[at - 1:at] == ["="]), names, value, body, other

    def _pipeline(self, tokens: list[str], end: str = "") -> Callable[[ChainMap[str, Any]], Any]:
        """Compile commands, each of which gets the value of the one before it."""
        stages: list[list[Any]] = [[]]  # the first word of each, and its operands
        while tokens and tokens[0][0] != ")":
            token = tokens.pop(0)
            if token == "|":
                stages.append([])
            else:
                stages[-1] += [token] * (not stages[-1])
                stages[-1].append(self._pipeline(tokens, ")") if token == "("
                                  else self._operand(token))
        closing = tokens.pop(0) if tokens else ""
        if not all(stages) or closing[:1] != end:
            raise _UsageError("malformed template: a value or parenthesis is missing")

        def run(scope: ChainMap[str, Any]) -> Any:
            before: list[Any] = []
            for word, *operands in stages:
                before = [go_call(word, *[operand(scope) for operand in operands], *before)]
            return go_field(before[0], closing[1:])

        return run

    @staticmethod
    def _operand(token: str) -> Callable[[ChainMap[str, Any]], Any]:
        """Compile a field, variable, function, or literal."""
        name, _, path = token.partition(".")
        if name == "" or name[0] == "$":
            path = f".{path}" if path else ""
            return lambda scope: go_field(scope[name or "."], path)
        words = {"true": True, "false": False, "nil": None, **FUNCTIONS}
        try:
            literal = words[token] if token in words else token[1:-1] if token[0] == "`" \
                else json.loads(token, strict=False)  # which takes a line break as it is
        except ValueError:
            raise _UsageError(f"unknown function in the template: {display(token)}; there are "
                              + ", ".join(FUNCTIONS)) from None
        return lambda scope: literal


class Headings(Fields):
    """The names of columns: a field in words, unless it is listed."""

    def find(self, name: str) -> Any:
        return self.get(name) or re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ",
                                        name).upper()


def print_rows(text: str, rows: Iterable[Fields], headings: Headings | None) -> None:
    """Print a template for each row; "table" before it aligns columns below their headings."""
    table = text.startswith("table ")
    text = text[6:].replace(" ", "\t") if table else text
    breaks = re.search(r"\{\{[^}]*\\n", text)  # podman then leaves all of them to the template
    text = text.replace("\\t", "\t").replace("\\n", "\n")
    text += "\n" * (text[-1:] != "\n" and not breaks)
    whole = re.match(r"\{\{-?\s*range\s+([$\w, ]+:=\s*)?\.\s*-?\}\}", text)
    template, rows = Template(text), list(rows)
    if table and sys.stdout.isatty():
        rows = [Fields({key: display(value) if type(value) is str else value
                        for key, value in row.items()}, raw=row.raw) for row in rows]
    heads = [headings] if table and headings is not None else []
    texts: Iterable[str] = map(template.render, [heads, rows][not heads:]) if whole \
        else (template.render(row, rows) for row in (*heads, *rows))
    if table and (text := "".join(texts)):
        lines = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
        widths = [max(12, *(len(cell) + 2 for cell in column))  # as Go's tabwriter for podman
                  for column in zip_longest(*(line[:-1] for line in lines), fillvalue="")]
        texts = ("".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0])) + "\n"
                 for line in lines)
    for text in texts:
        sys.stdout.write(re.sub(r"[^\t\n -~]+", lambda match: display(match[0]), text)
                         if sys.stdout.isatty() else text)


# -- filters and order ---------------------------------------------------------------------------

UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
BOOLEANS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
FILTERS = {kind: tuple(words.split()) for kind, words in {
    "image": "arch before containers dangling digest id intermediate label manifest readonly "
             "reference since until",
    "layer": "before digest id readonly since until",
    "container": "ancestor before exited id label name pod since status until"}.items()}
ENDED = ("stopped", "exited")  # podman takes one for the other
SORTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "images": {"created": lambda row: -go_moment(row[0].created), "id": lambda row: row[0].id,
               "repository": lambda row: row[1], "size": lambda row: row[0].size,
               "tag": lambda row: row[2]},
    "layers": {"created": lambda layer: -go_moment(layer.created), "id": lambda layer: layer.id,
               "size": lambda layer: layer.diff_size},
    "containers": {"command": lambda row: row["Command"] or [],
                   "created": lambda row: go_moment(row["Created"]), "id": lambda row: row["Id"],
                   "image": lambda row: row["Image"], "names": lambda row: row["Names"],
                   "runningfor": lambda row: row["StartedAt"],
                   "size": lambda row: (row["Size"] or {}).get("rootFsSize", 0),
                   "status": lambda row: row["State"]}}


def parse_moment(text: str) -> int:
    """Return a time in nanoseconds since 1970, given as an age (1h30m), a date or seconds."""
    part = rf"(\d+\.?\d*|\.\d+)({'|'.join(UNITS)})"
    if re.fullmatch(f"[+-]?({part})+", text, re.ASCII):
        age = sum(float(count) * UNITS[unit] for count, unit in re.findall(part, text))
        if age < 1 << 63:  # Go's longest, 292 years
            return time.time_ns() + int(age) * (1 if text[0] == "-" else -1)
    if re.fullmatch(r"\d{1,12}(\.\d+)?", text, re.ASCII):
        return int(float(text) * 10**9)
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d)(?:(:\d\d)(:\d\d(?:\.\d+)?)?)?)?"
                         "(Z|[+-].*)?", text)
    day, hour, minute, second, zone = match.groups() if match else [""] * 5
    moment = go_moment(f"{day}T{hour or '00'}{minute or ':00'}{second or ':00'}{zone or 'Z'}")
    if moment == go_moment(""):
        raise ValueError("must be an age such as 24h, or a time such as 2024-01-31T12:00:00")
    return moment - (0 if zone else time.localtime(moment // 10**9).tm_gmtoff) * 10**9


def compile_filters(storage: Storage, kind: str, texts: Sequence[str]) -> Callable[[Any], bool]:
    """Return the test for ``key=value`` filters of images, layers or containers.

    Of one key any must fit, of labels all; no ``key!=value`` must.
    """
    tests: dict[str, list[tuple[bool, Callable[[Any], Any]]]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name, negated = key.rstrip("!"), key.endswith("!")
        name = "since" if name == "after" else name
        if not equals or name not in FILTERS[kind]:
            raise _UsageError(f"--filter {display(text)}: " + (
                "unknown key" if equals else "must be KEY=VALUE or KEY!=VALUE")
                + f"; the keys are {', '.join(FILTERS[kind])}")
        try:
            test = make_filter(storage, kind, name, value)
        except (ValueError, re.error) as error:
            raise _UsageError(f"--filter {display(text)}: {error}") from None
        tests.setdefault(text if negated or name == "label" else name, []).append((negated, test))
    return lambda record: all(any(bool(test(record)) != negated for negated, test in alike)
                              for alike in tests.values())


def make_filter(storage: Storage, kind: str, key: str, value: str) -> Callable[[Any], Any]:
    """Return the test for one filter.  Raises ValueError for an impossible value."""
    if key in ("until", "before", "since"):
        limit = parse_moment(value) if key == "until" \
            else go_moment(getattr(storage, kind)(value).created)
        return lambda it: (go_moment(it.created) - limit) * (1 if key == "since" else -1) > 0
    if key == "digest" and not value.startswith("sha256:"):
        raise ValueError("must start with sha256:")
    if key == "status" and value not in (states := (*CONTAINER_STATE, "storage")):
        raise ValueError(f"must be one of {', '.join(states)}")
    if key == "exited" and not re.fullmatch("[+-]?[0-9]{1,10}", value):
        raise ValueError("must be an exit status")
    search: Any = re.compile(value if key == "ancestor" else value.replace("/", "")).search \
        if key in ("ancestor", "id", "name") else None
    if key == "ancestor":
        with suppress(NotFound, Unsupported):
            value = storage.image(value).id
    label, _, wanted = value.partition("=")
    pattern = re.compile(".*".join(map(re.escape, label.split("*"))), re.DOTALL)
    is_label = pattern.search if "*" in label else pattern.fullmatch
    tests: dict[str, Callable[[Any], Any]] = {
        "ancestor": lambda it: value in it.image or search(it.image_name),
        "arch": lambda it: it.about.get("architecture") == value
        or f"{platform_name(it.about)}/".startswith(f"{value}/"),
        "digest": lambda it: any(digest.startswith(value) for digest in (
            it.digests if kind == "image" else [it.diff_digest])),
        "exited": lambda it: it.status in ENDED and it.state.get("exit-code") == int(value),
        "id": lambda it: it.id.startswith(value) or re.escape(value) != value and search(it.id),
        "label": lambda it: any(is_label(name) and wanted in ("", text)
                                for name, text in it.labels.items()),
        "name": lambda it: any(map(search, it.names)),
        "pod": lambda it: value == it.state.get("pod") or value and str(
            it.state.get("pod-id", "")).startswith(value),
        "status": lambda it: it.status in (ENDED if value in ENDED else (value,))}
    return reference_filter(storage, value) if key == "reference" \
        else tests.get(key) or flag_filter(storage, key, value)


def reference_filter(storage: Storage, value: str) -> Callable[[Image], bool]:
    """Return the test for the image that podman would find, or names that fit a pattern.

    That may lack the registry or the whole path, and the tag or digest; no ``*`` fits a slash.
    """
    found = ""
    with suppress(NotFound, Unsupported):
        found = storage.image(value).id
    tokens = re.findall(r"\\.|\*|\[(?:\\.|[^]\\])+\]|.", value.replace("[^", "[!"), re.DOTALL)
    fits = re.compile("".join(map(translate_token, tokens))).fullmatch

    def test(image: Image) -> bool:
        return image.id == found or any(
            fits(part) for name in image.names for text in (name, split_reference(name)[0])
            for part in (text, text.partition("/")[2], text.rpartition("/")[2]))

    return test


def flag_filter(storage: Storage, key: str, value: str) -> Callable[[Image], bool]:
    """Return the test for a filter of images that is true or false."""
    containers: Sequence[Container] = storage.containers() if key == "containers" else ()
    inner = intermediate_images(storage) if key in ("dangling", "intermediate") else set()
    inner.update(listed_images(storage) if key == "dangling" else ())
    if value == "external" and key == "containers":
        value, containers = "true", [each for each in containers if each.status == "storage"]
    if value.lower() not in BOOLEANS:
        raise ValueError("must be true or false")
    used = {container.image for container in containers}
    get: Callable[[Image], bool] = {
        "containers": lambda image: image.id in used,
        "dangling": lambda image: not image.names and image.id not in inner,
        "intermediate": lambda image: image.id in inner, "manifest": lambda image: image.is_list,
        "readonly": lambda image: image.readonly}[key]
    return lambda image: get(image) == BOOLEANS[value.lower()]


# -- rows ----------------------------------------------------------------------------------------

def image_rows(storage: Storage, args: Any) -> list[ImageRow]:
    """Return the images that are asked for, with repository and tag: a row for each name."""
    fits, rows = compile_filters(storage, "image", args.filter), []
    every = args.all or any(text.startswith("intermediate") for text in args.filter)
    hidden = set() if every else intermediate_images(storage)
    for image in storage.images():
        if fits(image) and (image.id not in hidden or image.faults):
            names = list(map(split_reference, image.names))
            names = [name for name in names if name[1] or not name[2]] or names[:1] or [
                ("<none>", "", "")]
            rows += [(image, repository, tag or "<none>") for repository, tag, _ in names]
    return sorted(rows, key=SORTS["images"][args.sort])


def image_texts(storage: Storage, rows: Sequence[ImageRow], args: Any) -> Iterator[Fields]:
    """Yield the fields that templates of ``podman images`` have; ``raw`` is what its JSON has."""
    kin = [(child.id, parent.id) for parent, child in related_images(storage)][::-1]
    parents, inner = dict(kin), listed_images(storage).union(parent for _, parent in kin)
    used = Counter(container.image for container in storage.containers())
    for image, repository, tag in rows:
        created = go_moment(image.created) // 10**9
        moment, age = GoTime(format_time(created * 10**9)), human_age(go_moment(image.created))
        fields = Fields({
            "Id": image.id, "ParentId": parents.get(image.id, ""), "RepoTags": None,
            "RepoDigests": image.repo_digests, "Size": image.size, "SharedSize": 0,
            "VirtualSize": image.size, "Labels": image.labels or None,
            "Containers": used[image.id], "ReadOnly": image.readonly,
            "Dangling": not image.names and image.id not in inner,
            "Arch": image.about.get("architecture", ""), "Digest": image.digest,
            "History": image.names_history, "IsManifestList": image.is_list,
            "Names": image.names, "Os": image.about.get("os", ""), "Created": created,
            "CreatedAt": moment}, "ReadOnly Dangling Arch Digest History IsManifestList Names Os")
        yield Fields({
            "ID": f"sha256:{image.id}" if args.no_trunc else image.id[:12],
            "Repository": repository, "Tag": tag, **fields, "Names": image.names or NIL,
            "RepoTags": image.names or NIL,
            "Size": human_size(image.size), "History": ", ".join(image.names_history) or "<none>",
            "Created": age, "CreatedSince": age, "CreatedAt": moment, "CreatedTime": moment},
            raw=fields)


def container_rows(storage: Storage, args: Any) -> list[tuple[Fields, Container]]:
    """Return containers, each behind what ``podman ps --format json`` says of it."""
    fits = compile_filters(storage, "container", args.filter)
    known: dict[str, int] | None = {} if args.size else None
    rows = [(container_fields(each, known), each) for each in storage.containers() if fits(each)]
    return sorted(rows, key=lambda row: SORTS["containers"][args.sort](row[0]))


def of_kind(kind: type[T], value: Any) -> list[T]:
    """Return a list's items of one type, [] for anything else."""
    return [each for each in as_list(value) if isinstance(each, kind)]


def container_fields(container: Container, known: dict[str, int] | None = None) -> Fields:
    """Return a row of container_rows(), with sizes if layers' sizes are ``known``, or none yet."""
    state = container.state
    status = container.status if state.get("engine", "podman") == "podman" else "storage"
    config, now = as_dict(state.get("config")), as_dict(state.get("status"))
    notes = as_dict(as_dict(config.get("spec")).get("annotations"))
    made = GoTime(config.get("createdTime") or container.created)
    created, started, ended = map(go_moment, (
        made, now.get("startedTime"), now.get("finishedTime")))
    fields = go_struct("ps", {**state, "config": config, "now": now, "notes": notes}, {
        "AutoRemove": notes.get("io.podman.annotations.autoremove") == "TRUE",
        "Command": [state.get("engine", "storage")] if status == "storage"
        else of_kind(str, config.get("command")) or None,
        "CreatedAt": human_age(created), "ExitedAt": ended // 10**9,
        "ExposedPorts": as_dict(config.get("exposedPorts")) or None,
        "Id": container.id, "Image": container.image_name or "scratch" * (status == "storage"),
        "ImageID": container.image, "Labels": container.labels or None,
        "Mounts": of_kind(str, config.get("userVolumes")), "Namespaces": {},
        "Names": container.names[:1] or ["unknown"],
        "Networks": sorted(as_dict(config.get("newNetworks"))),
        "Ports": [go_struct("Port", {"range": 1, **port}, {})
                  for port in of_kind(dict, config.get("newPortMappings"))] or None,
        "Size": None if known is None else dict(
            zip(("rwSize", "rootFsSize"), container.sizes(known))),
        "StartedAt": started // 10**9, "State": status, "Created": made})
    fields["Status"] = f"Up {human_age(started)[:-4]}" if status == "running" \
        else f"Exited ({fields['ExitCode']}) {human_age(ended)}" if status in ENDED \
        else status.title()
    return fields


def exposed_ports(row: Fields) -> list[tuple[str, int]]:
    """Return the protocol and number of each port that an image or user exposes, sorted."""
    return sorted((str(kind), int(number)) for number, kinds in (row["ExposedPorts"] or {}).items()
                  for kind in as_list(kinds) if re.fullmatch("[0-9]{1,5}", number))


def ports_text(row: Fields) -> str:
    """Return published ports, and those that are only exposed, as podman prints them."""
    def span(first: int, count: int) -> str:
        return f"{first}-{first + count - 1}" if count > 1 else str(first)

    texts = [f"{port['host_ip'] or '0.0.0.0'}:{span(port['host_port'], port['range'])}->"
             f"{span(port['container_port'], port['range'])}/{port['protocol']}"
             for port in row["Ports"] or ()]
    taken = port_bindings(row)
    bare = enumerate(port for port in exposed_ports(row) if "{1}/{0}".format(*port) not in taken)
    for (kind, _), run in groupby(bare, lambda item: (item[1][0], item[1][1] - item[0])):
        ports = [port for _, (_, port) in run]
        texts.append(f"{span(ports[0], len(ports))}/{kind}")
    return ", ".join(texts)


def container_texts(row: Fields, args: Any) -> Fields:
    """Return the fields that templates of ``podman ps`` have for a row."""
    width = 64 if args.no_trunc else 12
    command, labels, size = " ".join(row["Command"] or ()), row["Labels"] or {}, row["Size"]
    return Fields({
        "ID": row["Id"][:width], **row, "ImageID": row["ImageID"][:width],
        "Pod": row["Pod"][:width], "Names": row["Names"][0],
        "Command": command if args.no_trunc or len(command) <= 17 else command[:17] + "...",
        "Networks": ",".join(row["Networks"]), "Ports": ports_text(row),
        "CreatedAt": row["Created"], "CreatedHuman": row["CreatedAt"],
        "RunningFor": row["CreatedAt"], "Label": lambda key: labels.get(key, ""),
        "Size": "{} (virtual {})".format(*(
            human_size(each).replace(" ", "") for each in size.values())) if size else ""}, raw=row)


def history_texts(image: Image, args: Any) -> Iterator[Fields]:
    """Yield the fields that templates of ``podman history`` have; ``raw`` is what its JSON has."""
    used, layers = set(), list(image.layers())
    for step in image.history()[::-1]:
        if not step.keys() - {"layer", "size"}:  # of a layer without history
            continue
        here = [each for each in image.storage.images() if layers and each.layer == layers[-1].id]
        name = here[0].id if here and here[0].id not in used else "<missing>"
        used.add(name)
        created = GoTime(step.get("created") or ZERO_TIME)
        moment = GoTime(format_time(go_moment(created) // 10**9 * 10**9))
        age = str(moment) if args.human is False else human_age(go_moment(created))
        fields = Fields({
            "id": name, "created": created, "CreatedBy": str(step.get("created_by") or ""),
            "tags": [tag for each in here for tag in each.names],
            "size": max(step.get("size", 0), 0), "comment": step.get("comment", ""),
            "Created": moment}, "comment tags")
        yield Fields({
            "ID": name[:64 if args.no_trunc else 12], "Created": age, "CreatedSince": age,
            "CreatedBy": short_step(fields["CreatedBy"], args, 45), "CreatedAt": moment,
            "Size": human_size(fields["size"]), "Comment": fields["comment"],
            "Tags": fields["tags"]}, raw=fields)
        if "layer" in step and layers:
            layers.pop()


def layer_fields(layer: Layer) -> Fields:
    """Return a layer's record for templates: ``diff-digest`` is ``.DiffDigest``."""
    record = {"id": layer.id, "parent": layer.parent, "diff-digest": layer.diff_digest,
              "diff-size": layer.diff_size, "created": layer.created, **layer_json(layer)}
    return Fields({key.title().replace("-", ""): value for key, value in record.items()})


def is_template(args: Any) -> bool:
    """Tell whether --format is a template.  Raises _UsageError for an unknown word."""
    if args.format not in ("table", "json") and "{{" not in args.format:
        hint = did_you_mean(args.format, ["table", "json"])
        raise _UsageError(f"--format {display(args.format)}: must be table, json or a Go template"
                          f"{hint and f'; {hint}'}")
    return args.format not in ("table", "json")


def print_listing(args: Any, texts: Iterable[Fields], columns: Sequence[str] = (),
                  headings: Headings | None = None, indent: int | None = 5,
                  rows: Iterable[Fields] | None = None) -> None:
    """Print rows as podman does: IDs, a template, a table of ``columns``, or JSON of ``rows``."""
    form = args.format or "json" * (not columns)
    if re.fullmatch(r"\s*(json|\{\{\s*json\s*\.?\s*\}\})\s*", form):
        print(to_json(as_json(list(texts if rows is None else rows)), indent))
    elif getattr(args, "ids", False):
        print_rows("{{.ID}}", texts, headings)
    else:
        columns = [f"{{{{.{column}}}}}" for column in columns]
        print_rows(form or "table " + "\t".join(columns), texts,
                   None if getattr(args, "noheading", False) else headings)


IMAGE_HEADINGS = Headings({"ID": "IMAGE ID", "ReadOnly": "R/O"})
CONTAINER_HEADINGS = Headings({"ID": "CONTAINER ID", "CreatedHuman": "CREATED", "Pod": "POD ID",
                               "PodName": "PODNAME"})


# -- inspect -------------------------------------------------------------------------------------

def inspect_image(image: Image) -> Fields:
    """Return what ``podman image inspect`` says of an image."""
    manifest = image.manifest()
    config, kind = image.config(manifest), manifest.get("mediaType") or OCI_MANIFEST
    if manifest.get("schemaVersion") == 1:
        kind = "application/vnd.docker.distribution.manifest.v1+" + (
            "prettyjws" if "signatures" in manifest else "json")
    said = as_dict(config.get("config"))
    settings = go_struct("ImageConfig", said, {})
    for key in ("ExposedPorts", "Volumes"):  # of empty structs
        settings[key] = {each: Fields({}) for each in as_dict(settings[key])}
    steps = [go_struct("History", step, {}) for step in of_kind(dict, config.get("history"))]
    comment = "".join(str(step["comment"]) for step in steps[:1])
    return Fields({
        "Id": image.id, "Digest": image.digest,
        "RepoTags": [name for name in image.names if split_reference(name)[1]],
        "RepoDigests": image.repo_digests, "Parent": next((
            parent.id for parent, child in related_images(image.storage) if child is image), ""),
        "Comment": comment if kind == OCI_MANIFEST else config.get("comment", ""),
        "Created": GoTime(config.get("created") or ZERO_TIME), "Config": settings,
        "Version": config.get("docker_version", ""), "Author": config.get("author", ""),
        "Architecture": config.get("architecture", ""), "Os": config.get("os", ""),
        "Size": image.size, "VirtualSize": image.size,
        "GraphDriver": graph_driver(image.storage, image.layer),
        "RootFS": Fields({"Type": "layers",
                          "Layers": [layer.diff_digest for layer in image.layers()]}),
        "Labels": settings["Labels"] or None, "Annotations": as_dict(manifest.get("annotations")),
        "ManifestType": kind, "User": settings["User"], "History": steps,
        "NamesHistory": image.names_history, "Healthcheck": said.get("Healthcheck")}, "Healthcheck")


def graph_driver(storage: Storage, layer_id: str) -> Fields:
    """Return where the files of a layer and those below it are."""
    def place(layer: Layer | None, name: bytes) -> str:
        root, path = layer.overlay_file(name) if layer else (None, b"")
        return root.host_path(path) if root else ""

    data, layer = {}, storage.layer_by_id(layer_id)
    if layer and storage.driver == "overlay":
        data = {"LowerDir": ":".join(place(storage.layer_by_id(below), b"diff")
                                     for below in layer.lower_ids()),
                "UpperDir": place(layer, b"diff"), "WorkDir": place(layer, b"work")}
    return Fields({"Name": storage.driver,
                   "Data": {key: value for key, value in data.items() if value}})


# podman's structs: each key, with "?" if JSON leaves it out when it is empty, the type of its value
# and where the source has it, if not by the same name; who makes the struct knows the others.
GO_STRUCTS = {
    "": """Id:s Created:t Path Args State Image:s:ImageID ImageDigest ImageName:s:Image Rootfs:s
        Pod:s ResolvConfPath:s:now:bindMounts:/etc/resolv.conf
        HostnamePath:s:now:bindMounts:/etc/hostname HostsPath:s:now:bindMounts:/etc/hosts
        StaticDir:s OCIConfigPath?:s:now:configPath OCIRuntime:s:runtime ConmonPidFile:s
        PidFile:s:pid_file Name RestartCount:i:Restarts Driver MountLabel:s ProcessLabel:s
        AppArmorProfile:s:process:apparmorProfile Dependencies:l
        EffectiveCaps:L:process:capabilities:effective BoundingCaps:L:process:capabilities:bounding
        GraphDriver Mounts NetworkSettings IsInfra:b IsService:b Config HostConfig""",
    "State": """OciVersion:s:spec:ociVersion Status:s:State Running Paused OOMKilled:b:now:oomKilled
        Pid:i ConmonPid?:i:now:conmonPid ExitCode:i Error:s:now:error StartedAt:t:now:startedTime
        FinishedAt:t:now:finishedTime CheckpointedAt:t:now:checkpointedTime
        RestoredAt:t:now:restoredTime""",
    "NetworkSettings": "Ports",
    "Config": """Hostname User:s Tty:b:process:terminal OpenStdin:b:stdin ExposedPorts?
        Env:l:process:env Cmd:L:Command Image:s WorkingDir:s:process:cwd Entrypoint:L Labels:n
        Annotations:n:spec:annotations StopSignal:i Healthcheck?:n CreateCommand?:l Timezone?:s
        Umask?:s Timeout:i StopTimeout:i Passwd?:b sdNotifyMode?:s:sdnotifyMode""",
    "HostConfig": """Binds CgroupManager:s CgroupMode ContainerIDFile:s:CIDFile LogConfig
        NetworkMode PortBindings RestartPolicy AutoRemove:b Annotations:n:spec:annotations
        Dns:l:dnsServer DnsOptions:l:dnsOption DnsSearch:l ExtraHosts:l:hostsAdd GroupAdd:l:groups
        IpcMode OomScoreAdj:i:process:oomScoreAdj PidMode Privileged:b
        ReadonlyRootfs:b:spec:root:readonly SecurityOpt Tmpfs UTSMode ShmSize:i
        Memory:i:limits:memory:limit NanoCpus:i CgroupParent:s CpuPeriod:i:limits:cpu:period
        CpuQuota:i:limits:cpu:quota CpuShares:i:limits:cpu:shares CpusetCpus:s:limits:cpu:cpus
        CpusetMems:s:limits:cpu:mems MemoryReservation:i:limits:memory:reservation
        MemorySwap:i:limits:memory:swap PidsLimit:i:limits:pids:limit Ulimits""",
    "LogConfig": "Type:s:logDriver Path:s:logPath Tag:s:logTag",
    "Ulimit": "Name:s:type Soft:i Hard:i",
    "ps": """AutoRemove Command CreatedAt CIDFile:s:notes:io.podman.annotations.cid-file
        Exited:b:now:exited ExitedAt ExitCode:i:exit-code ExposedPorts Id Image ImageID
        IsInfra:b:config:pause Labels Mounts Names Namespaces Networks Pid:i Pod:s:pod-id
        PodName:s:pod Ports Restarts:i:now:restartCount Size StartedAt State Created""",
    "Port": "host_ip:s container_port:i host_port:i range:i protocol:s",
    "ImageConfig": """User?:s ExposedPorts?:n Env?:l Entrypoint?:l Cmd?:l Volumes?:n WorkingDir?:s
        Labels?:n StopSignal?:s""",
    "History": "created:t created_by?:s author?:s comment?:s empty_layer?:b",
    "RestartPolicy": "Name:s:restart_policy MaximumRetryCount:i:restart_retries"}
GO_EMPTY = {"s": "", "b": False, "i": 0, "l": [], "L": NIL, "n": None, "t": ZERO_TIME}


def go_struct(name: str, source: dict[str, Any], known: dict[str, Any]) -> Fields:
    """Return a struct of GO_STRUCTS; a value of another type counts as missing."""
    def read(key: str, kind: str = "", *path: str) -> Any:
        if not kind:
            return known[key] if key in known else go_struct(key, source, known)
        value, empty = source, GO_EMPTY[kind]  # type: Any, Any
        for step in path or [key if key in source else key[:1].lower() + key[1:]]:
            value = as_dict(value).get(step)
        if not isinstance(value, type(empty) if kind != "n" else (dict, list)) \
                or kind == "i" and isinstance(value, bool):
            value = empty
        return GoTime(value) if kind == "t" else value

    words = [word.split(":") for word in GO_STRUCTS[name].replace("?", "").split()]
    return Fields({word[0]: read(*word) for word in words},
                  " ".join(re.findall(r"(\w+)\?", GO_STRUCTS[name])))


def inspect_container(container: Container, sizes: bool = False) -> Fields:
    """Return what ``podman container inspect`` says of a container, as far as it is known."""
    row, config = container_fields(container), as_dict(container.state.get("config"))
    now, storage = as_dict(container.state.get("status")), container.storage
    # What podman made of its settings when it last started it, else these.
    spec = now.get("configPath") and container.userdata(b"config.json") \
        or as_dict(config.get("spec"))
    process, linux = as_dict(spec.get("process")), as_dict(spec.get("linux"))
    spaces = {str(space.get("type")): space.get("path") or ""
              for space in of_kind(dict, linux.get("namespaces"))}
    words, notes = as_list(process.get("args")), as_dict(spec.get("annotations"))
    published, exposed = port_bindings(row), [f"{port}/{kind}" for kind, port in exposed_ports(row)]

    def mode(kind: str, private: str = "private", key: str = "") -> str:
        other, path = config.get(f"{key or kind}NsCtr"), spaces.get(kind)
        return f"container:{other}" if other else ("host" if spec else "") if path is None \
            else f"ns:{path}" if path else private

    network = str(config.get("networkMode") or mode("network", "none", "net"))
    bare = () if network == "host" or network.startswith("container:") else exposed
    made = go_struct("", {
        **config, **row, "process": process, "now": now, "limits": linux.get("resources"),
        "spec": spec, "restart_policy": config.get("restart_policy") or "no"}, {
        "Path": words[0] if words else "", "Args": words[1:] or words, "Name": row["Names"][0],
        "Running": row["State"] == "running", "Paused": row["State"] == "paused",
        "ImageDigest": "".join([image.digest for image in storage.images()
                                if image.id == container.image][:1]),
        "Driver": storage.driver, "GraphDriver": graph_driver(storage, container.layer),
        **user_mounts(container, config, spec), "PortBindings": published,
        "Ports": dict(sorted({**dict.fromkeys(bare, NIL), **published}.items())),
        "ExposedPorts": {name: Fields({}) for name in sorted({*exposed, *published})},
        "Hostname": spec.get("hostname") or container.id[:12] * (mode("uts") == "private"),
        "Ulimits": [go_struct("Ulimit", limit, {})
                    for limit in of_kind(dict, process.get("rlimits"))],
        "SecurityOpt": [*["no-new-privileges"] * (process.get("noNewPrivileges") is True), *(
            f"{key}={notes[name]}" for key in ("label", "seccomp", "apparmor")
            for name in [f"io.podman.annotations.{key}"] if name in notes),
            *["unmask=all"] * (not (linux.get("maskedPaths") or linux.get("readonlyPaths")))],
        "CgroupMode": mode("cgroup"), "PidMode": mode("pid"), "UTSMode": mode("uts"),
        "IpcMode": mode("ipc", "shareable"), "NetworkMode": network})
    host, number = made["HostConfig"], made["Config"]["StopSignal"]
    host["NanoCpus"] = 10**4 * host["CpuQuota"] * (host["CpuPeriod"] == 10**5)
    host["CgroupParent"] *= host["CgroupParent"] not in ("/libpod_parent", "machine.slice")
    made["Config"]["StopSignal"] = f"SIGRTMIN+{number - 34}" if number > 34 else "".join(
        sorted(name for name, value in vars(signal).items() if value == number > 0 and re.match(
            "SIG[^_]", name))[:1])
    if sizes:
        made["SizeRw"], made["SizeRootFs"] = container.sizes()
    return made


def user_mounts(container: Container, config: dict[str, Any], spec: dict[str, Any]
                ) -> dict[str, Any]:
    """Return what users mounted in a container: volumes, then directories of the host, tmpfs."""
    home = os.path.join(container.storage.graphroot, "volumes")
    found = {str(each.get(key)): each for mounts, key in (
        (spec.get("mounts"), "destination"), (config.get("namedVolumes"), "dest"))
        for each in of_kind(dict, mounts)}
    places = [place for place in of_kind(str, config.get("userVolumes")) if place in found]
    made: dict[str, Any] = {"Mounts": [], "Binds": [], "Tmpfs": {}}
    for place in sorted(places, key=lambda place: "dest" not in found[place]):
        mount, options = found[place], of_kind(str, found[place].get("options"))
        name, source = mount.get("volumeName", ""), mount.get("source", "")
        text, is_volume = ",".join(options), "dest" in mount
        if mount.get("type") == "tmpfs":
            made["Tmpfs"][place] = text
            continue
        label, spread = ([word for word in options if re.fullmatch(kind, word)]
                         for kind in ("[zZ]", "r?(private|shared|slave)"))
        made["Binds"].append(":".join([str(name or source), place, *[text] * bool(text)]))
        made["Mounts"].append(Fields({
            "Type": "volume" if is_volume else "bind", "Name": name,
            "Source": f"{home}/{name}/_data" if is_volume else source, "Destination": place,
            "Driver": "local" * is_volume, "Mode": "".join(label[-1:]),
            "Options": [word for word in options if word not in ("ro", "rw", *label, *spread)],
            "RW": "ro" not in options, "Propagation": "".join(spread[-1:]),
            "SubPath": mount.get("subPath", "")}, "Name SubPath"))
    return made


def port_bindings(row: Fields) -> dict[str, list[Fields]]:
    """Return where the host publishes each port of a container."""
    found: dict[str, list[Fields]] = {}
    every = ((port, at) for port in row["Ports"] or () for at in range(max(1, port["range"])))
    for port, at in islice(every, 1 << 16):
        here = found.setdefault(f"{port['container_port'] + at}/{port['protocol']}", [])
        here.append(Fields({"HostIp": port["host_ip"] or "0.0.0.0",
                            "HostPort": str(port["host_port"] + at)}))
    return dict(sorted(found.items()))  # as Go's JSON has them


# ================================================================================================
# 30. Commands
#
# A command gets the storage and its arguments, prints to stdout, and returns the exit status.
# ================================================================================================

def open_storage(args: Any) -> Storage:
    """Open the storage that the global options name."""
    stores = list(map(os.path.abspath, args.store))
    for option, path in (*product(["--store"], stores), ("--imagestore", args.imagestore)):
        if path and not holds_store(path, [args.driver] if args.driver else DRIVERS):
            raise no_store(path, option)
    if args.runroot and not os.path.isdir(args.runroot):
        raise NotFound(f"not a directory: {args.runroot}", hint="--runroot names the run root")
    if args.root == "":
        raise _UsageError("--root is empty")
    kind = Storage if args.no_helper else ProxiedStorage
    options: Any = {"runroot": args.runroot, "stores": stores, "owner_ids": args.owner_ids,
                    "driver": args.driver, "salvage": args.salvage,
                    "imagestore": args.imagestore and os.path.abspath(args.imagestore)}
    return kind.open(args.root, **options) if args.root else kind.discover(**options)


def cmd_image_list(storage: Storage, args: Any) -> None:
    """list images"""
    storage.faults += storage.strays(Image.WORD, storage.images())
    rows = image_rows(storage, args)
    if is_template(args):
        print_rows(args.format, (
            Fields({**texts, **image_json(image)}, raw=texts.raw) for texts, (image, *_) in
            zip(image_texts(storage, rows, args), rows)), IMAGE_HEADINGS)
        return
    machines = [image.architecture for image, *_ in rows]
    several = len({*machines, ""}) > 2
    show(args, map(image_json, dict.fromkeys(image for image, *_ in rows)), (
        [repository, tag, short_id(image.id, args), human_age(image.created_ns),
         "list" if image.is_list else human_size(image.size), machine * several,
         "yes" if image.readonly else "", "; ".join(image.faults)]
        for (image, repository, tag), machine in zip(rows, machines)),
        ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE", "ARCH", "R/O", "FAULTS"],
        (image.id for image, *_ in rows))


def cmd_images(storage: Storage, args: Any) -> None:
    """list images, with podman's options and output"""
    args.filter += [f"reference={args.name}"] if args.name else []
    rows = image_rows(storage, args)
    rows = list({row[0]: row for row in rows}.values()) if args.ids else rows
    columns = ["Repository", "Tag", *["Digest"] * args.digests, "ID", "Created", "Size",
               *["History"] * args.history,
               *["ReadOnly"] * any(image.readonly for image, *_ in rows)]
    print_listing(args, image_texts(storage, rows, args), columns, IMAGE_HEADINGS, 4)


def cmd_ps(storage: Storage, args: Any) -> None:
    """list running containers, with podman's options and output; -a: all"""
    last = 1 if args.latest else args.last
    storage.faults += storage.unread_database()
    every = args.all or last > 0 or any(text.startswith("status") for text in args.filter)
    rows = [row for row, _ in container_rows(storage, args) if (
        every or row["State"] in ("running", "")) and (row["State"] != "storage" or args.external)]
    if last > 0:
        rows = sorted(rows, key=SORTS["containers"]["created"])[-last:]
    columns = ["ID", "Image", "Command", "CreatedHuman", "Status", "Ports", "Names",
               *["Pod", "PodName"] * args.pod, *["Size"] * args.size]
    args.ids = args.ids and not args.format  # podman's other lists prefer -q
    print_listing(args, (container_texts(row, args) for row in rows), columns, CONTAINER_HEADINGS,
                  2, (Fields({**row, "Created": go_moment(row["Created"]) // 10**9})
                      for row in rows))


def cmd_history(storage: Storage, args: Any) -> None:
    """show the history of an image, with podman's options and output"""
    print_listing(args, history_texts(storage.image(args.image).single(), args),
                  ["ID", "Created", "CreatedBy", "Size", "Comment"], Headings({}), None)


def inspect_each(storage: Storage, args: Any, record: Callable[[Any], dict[str, Any]],
                 fields: Callable[[Any], Fields]) -> None:
    """Show what each argument names as a record, or by a template of podman's fields."""
    template = is_template(args)
    found: Iterator[Any] = for_each(args, getattr(args, args.kind), lambda name: (
        fields if template else record)(find_named(storage, args, name)))
    (print_listing if template else show_inspected)(args, found)


def cmd_inspect(storage: Storage, args: Any) -> None:
    """show a container or image or layer, with podman's options and output"""
    if bool(args.name) == args.latest:
        raise _UsageError("give either NAME, or --latest for the container that was made last")
    if args.latest:
        rows = sorted(map(container_fields, storage.containers()),
                      key=SORTS["containers"]["created"])
        args.name = [row["Id"] for row in rows if row["State"] != "storage"][-1:] or ["latest"]
        args.type = "container"
    kinds: dict[str, Callable[[Any], Fields]] = {
        "container": lambda container: inspect_container(container, args.size),
        "image": lambda image: inspect_image(image.single()), "layer": layer_fields}
    wanted = kinds if args.type == "all" else [args.type]

    def inspect(name: str) -> Fields:
        for kind in wanted:
            with suppress(*UNKNOWN.values()):
                found = getattr(storage, kind)(name)
                break
        else:
            raise NotFound(f'no such object: "{display(name)}"', hint=next(filter(None, (
                guess(storage, kind, name) for kind in wanted)), ""))
        return kinds[kind](found)

    print_listing(args, for_each(args, args.name, inspect))


def cmd_save(storage: Storage, args: Any) -> None:
    """write images to an archive or directory, with podman's options"""
    if args.format == "docker-dir":
        raise _UsageError("--format docker-dir: use --format oci-dir -o DIR, and then skopeo copy "
                          "oci:DIR dir:OTHER")
    if args.format == "oci-dir":
        if not args.output or len(args.image) > 1:
            raise _UsageError("--format oci-dir takes one image and -o DIR")
        image = storage.image(args.image[0])
        unwind_on_signals()
        image.copy_to_oci(args.output, *names_to_give(image, args.image[0])[:1])
        return
    several = args.multi_image_archive
    named = [(image.single(), names_to_give(image, name))
             for name in args.image[:None if several else 1] for image in [storage.image(name)]]
    for name, tag, digest in map(split_reference, () if several else args.image[1:]):
        named[0][1].append(f"{normalize_name(name)[0]}:{tag or digest or 'latest'}")
        if not re.fullmatch(f"{REPOSITORY_NAME}:{TAG}", named[0][1][-1]):
            raise _UsageError(f"not a name that an image can have: {display(named[0][1][-1])}")
    write_archive(args, args.format, named)


def cmd_exists(storage: Storage, args: Any) -> int:
    """tell by the exit status whether there is one: 0 yes, 1 no"""
    try:
        found = find_named(storage, args)
        if args.kind == "image" and args.platform:
            found.single(args.platform)
    except Ambiguous:
        raise
    except NotFound:
        return EXIT_NO
    return 0


def cmd_image_inspect(storage: Storage, args: Any) -> None:
    """show the record, manifest and configuration of images"""
    def record(image: Image) -> dict[str, Any]:
        image = image.single(args.platform) if args.platform else image
        entry = image_json(image)
        for key, get in (("layers", lambda: [layer.id for layer in image.layers()]),
                         ("manifest", image.manifest), ("config", image.config)):
            entry[key] = None
            with suppress(CstorError):  # image.faults say why
                entry[key] = get()
        return entry

    inspect_each(storage, args, record, lambda image: inspect_image(image.single(args.platform)))


def cmd_image_layers(storage: Storage, args: Any) -> None:
    """list the layers of an image, base first"""
    print_layers(storage.image(args.image, args.platform).single(args.platform).layers(), args)


def cmd_image_history(storage: Storage, args: Any) -> None:
    """show the history of an image, newest first"""
    history = storage.image(args.image, args.platform).single(args.platform).history()[::-1]
    note_open_steps(history, args)
    show(args, history, (
        [short_id(row.get("layer", ""), args) or ("<unknown>" if "size" in row else "<empty>"),
         age_of(row.get("created")), short_step(str(row.get("created_by") or ""), args, 60),
         human_size(row.get("size", 0)), str(row.get("comment") or "")] for row in history),
        ["LAYER", "CREATED", "CREATED BY", "SIZE", "COMMENT"],
        (row.get("layer", "") for row in history))


def cmd_image_tree(storage: Storage, args: Any) -> None:
    """show the layers of an image as a tree, and the images that share them"""
    image: Any = storage.image(args.image, args.platform).single(args.platform)
    branches: Iterable[tuple[str, Layer]] = [
        ("├── " if layer.id != image.layer else "└── ", layer) for layer in image.layers()]
    if args.whatrequires:
        branches = layer_branches([*image.layers()[-1:], *of_kind(
            Layer, users_of(storage).get(f"layer {image.layer}", ()))])
    show_tree(branches, args, {"id": image.id, "names": image.names, "size": image.size}, [
        f"Image ID: {short_id(image.id, args)}", f"Tags:     [{display(' '.join(image.names))}]",
        f"Size:     {human_size(image.size)}", "No " * (not image.layer) + "Image Layers"])


def cmd_layer_list(storage: Storage, args: Any) -> None:
    """list layers, with --tree each below its parent, and the images that share them"""
    fits = compile_filters(storage, "layer", args.filter)
    layers = sorted(filter(fits, storage.layers()), key=SORTS["layers"][args.sort])
    if args.tree:
        show_tree(layer_branches(layers), args)
    elif is_template(args):
        print_rows(args.format, (Fields({**layer_fields(layer), "Size": human_size(
            layer.diff_size)}) for layer in layers), Headings({}))
    else:
        print_layers(layers, args)


def cmd_layer_inspect(storage: Storage, args: Any) -> None:
    """show the record of layers, and where their files are"""
    def record(layer: Layer) -> dict[str, Any]:
        entry = layer_json(layer)
        entry["compression-name"] = layer.compression
        if args.chain:
            entry["chain"] = [below.id for below in storage.chain(layer.id)]
        _ = storage.images(), storage.containers()  # raise what is wrong with their records
        for word in ("image", "container"):
            users = {record.id: record for record in users_of(storage).get(layer.label, ())
                     if record.WORD == word}
            entry[word + "s"] = list(users)
            entry[word + "-names"] = [name for user in users.values() for name in user.names]
        try:
            entry["link"] = layer.link_id
            root, path = layer.overlay_file(b"diff")
            entry["diff"] = root.host_path(path) if root else None
            entry["lower"] = layer.lower_ids()
            entry["tar-split"] = None
            fd, entry["tar-split"] = layer.open_tar_split()
            os.close(fd)
        except CstorError as error:
            if layer.diff_digest:  # a writable layer has none
                entry["faults"] = [*layer.faults, str(error)]
        return entry

    inspect_each(storage, args, record, layer_fields)


def cmd_layer_export(storage: Storage, args: Any) -> None:
    """write a layer's tar, bit for bit as it was pulled or built"""
    with ask_server(args) if args.socket is not None else nullcontext() as stream:
        source: Any = stream or storage.layer(args.layer)
        label, size = (stream.label, stream.size) if stream else (source.id, source.diff_size)
        with writing(args, size) as (fd, progress):
            digest = source.export(fd, verify=not args.no_verify, progress=progress)
            if args.digest not in (None, digest):
                raise IntegrityError("the tar's digest differs from --digest",
                                     expected=args.digest, actual=digest)
    if args.verbose:
        say(f"layer {label}: {digest or 'not verified'}")


def cmd_layer_verify(storage: Storage, args: Any) -> int:
    """find all that is damaged in layers: headers, contents, sizes"""
    layers = list(for_each(args, args.layer, storage.layer))
    with ProgressLine(sum(max(layer.diff_size, 0) for layer in layers), args.quiet) as progress:
        found = verify_layers(layers, quick=args.quick, progress=progress)
    return EXIT_CHECKSUM * show_findings(args, found, f"{counted(len(layers), 'layer')} verified")


def cmd_image_verify(storage: Storage, args: Any) -> int:
    """find all that is damaged in images, with their layers: records, headers, contents"""
    if bool(args.image) == args.all:
        raise _UsageError("name images, or use --all")

    def named(name: str) -> list[Image]:
        images = [storage.image(name, args.platform)]
        if args.platform:
            with suppress(FormatError, IntegrityError):  # which is a finding of its own
                images.append(images[0].single(args.platform))
        return images

    found: dict[Image, None] = dict.fromkeys(storage.images() if args.all else chain.from_iterable(
        for_each(args, args.image, named)))
    for image in [] if args.platform else list(found):
        found.update((each, None) for _, each in (image.instances() if image.is_list else ()))
    layers = layers_of(list(found))
    with ProgressLine(sum(max(layer.diff_size, 0) for layer in layers), args.quiet) as progress:
        damages = verify_images(list(found), quick=args.quick, progress=progress)
    sound = f"{counted(len(found), 'image')} of {counted(len(layers), 'layer')} verified"
    return EXIT_CHECKSUM * show_findings(args, damages, sound)


def ask_server(args: Any) -> LayerStream:
    """Return a layer from the server that --socket names."""
    try:
        return fetch_layer(args.socket, args.layer, digest=args.digest or "",
                           verify=not args.no_verify, timeout=args.timeout)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotFound(f"no server listens at {args.socket}: {error.strerror}",
                       hint=f"start one: cstor serve --socket {args.socket}") from None


def cmd_serve(storage: Storage, args: Any) -> None:
    """serve layers or images to other programs: over a Unix socket, or as an OCI registry, until
    SIGTERM or SIGINT"""
    def opener() -> Storage:
        found = open_storage(args)
        found.opener = storage.opener  # one helper for all clients
        return found

    def stop(*_: object) -> None:
        for server in servers:
            server.stop()

    servers: dict[ClientServer, tuple[Any, str]] = {}  # where each listens, and its name
    with ExitStack() as stack:
        if args.socket or args.registry is None:
            has_proc("files of layers are passed")
            server = RpcServer(opener, timeout=args.timeout)
            passed = None if args.socket else passed_socket("AF_UNIX")
            if passed and not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                signal.signal(signal.SIGTERM, lambda *_: server.stop())
                server.handle(passed)
                return
            servers[server] = (stack.enter_context(passed or ListeningSocket(args.socket)),
                               args.socket or "the socket that was passed")
        if args.registry is not None:
            listener = stack.enter_context(listen_at(args.registry))
            url = check_access(listener, storage, args)
            servers[make_registry(storage, opener, args)] = listener, url
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, stop)
        for _, place in () if args.quiet else servers.values():
            say(f"serving {storage.graphroot} at {place}")
        (first, (listener, _)), *others = servers.items()
        for each, (other, _) in others:
            thread = threading.Thread(target=each.serve, args=[other])
            thread.start()
            stack.callback(thread.join)
        first.serve(listener)


def make_registry(storage: Storage, opener: Callable[[], Storage], args: Any) -> RegistryServer:
    """Return the server that the options of a registry describe."""
    for text in () if args.quiet else args.only:
        if Registry(storage, [text]).is_empty():
            hint = guess(storage, "image", text)
            say(f"warning: --only {display(text)}: no such image now{hint and f' ({hint})'}")
    return RegistryServer(
        Registry(storage, args.only), opener, insecure=args.insecure, timeout=args.timeout,
        ssl_context=None if args.tls_cert is None else tls_context(args.tls_cert, args.tls_key),
        passwords=() if args.password_file is None else read_passwords(args.password_file),
        log=say if args.verbose else str,
        warn=str if args.quiet else lambda text: say(f"warning: {display(text)}"))


def check_access(listener: Any, storage: Storage, args: Any) -> str:
    """Return the URL of a registry; raise _UsageError if others could read what they may not."""
    place = listener.getsockname()
    if not isinstance(place, tuple):
        return str(args.registry if args.registry != "-" else "the socket that was passed")
    host, port = place[:2]
    is_local = host == "::1" or host.startswith("127.")
    if not (is_local or args.insecure or args.tls_cert and args.password_file):
        raise _UsageError(f"a registry at {host} needs --tls-cert, --tls-key and "
                          "--password-file, or --insecure, with which everybody can read it")
    if is_local and not (args.insecure or args.password_file or is_public(storage)):
        raise _UsageError("not every user of this machine can read the store: use "
                          "--password-file, --registry unix:PATH or --insecure")
    return f"http{'s' * bool(args.tls_cert)}://{f'[{host}]' if ':' in host else host}:{port}/"


def cmd_layer_stream(storage: Storage, args: Any) -> None:
    """write a layer as a stream, contents inline or, with --external, as references to files"""
    ends = [os.path.realpath("/dev/stdout" if end in (None, "-") else end)
            for end in (args.output, args.external)]
    if args.external is not None and ends[0] == ends[1] != os.devnull:
        raise _UsageError("the stream and LIST cannot both go to the same file")
    layer = storage.layer(args.layer)
    with writing(args, layer.diff_size) as (fd, progress), \
            open(fd, "wb", CHUNK, closefd=False) as out, ExitStack() as stack:
        rows = None
        if args.external is not None:
            listing = stack.enter_context(open_output(args.external, args.timeout, text=True))
            rows = stack.enter_context(open(listing, "wb", closefd=False))
        digest = write_stream(layer, out, rows, codec=args.codec or CODECS[0],
                              threshold=args.threshold, progress=progress)
    if args.verbose:
        say(f"layer {layer.id}: {digest}")


def cmd_stream_to_tar(storage: Storage | None, args: Any) -> None:
    """turn a stream of a layer back into its tar, bit for bit"""
    if args.stream == "-" and sys.stdin is None:
        raise CstorError("stdin is closed")
    label, source = ("stdin", 0) if args.stream == "-" else (args.stream, open_input(args.stream))
    with open(source, "rb", CHUNK, closefd=source != 0) as file, \
            ExternalFiles(args.external or "") as external:
        if args.codec and external.codec not in ("", args.codec):
            raise _UsageError(f"--codec: the list is of a {external.codec}")
        head = io.BytesIO(file.read(8))

        def read(count: int) -> bytes:
            data = head.read(count)
            return data + file.read(count - len(data))

        codec = args.codec or external.codec or tell_codec(head.getvalue(), label)
        size = external.size if head.getvalue() else max(external.size, 0)  # of an empty layer
        chunks = SplitdirfdstreamReader(read, external.directories, label) \
            if codec == CODECS[1] else SplitfdstreamReader(read, external.open, label)
        stream = LayerStream(chunks, label=label, digest=args.digest or external.digest, size=size)
        total = max(external.size, 0) or input_size(args.stream)
        with stream, writing(args, total) as (fd, progress):
            digest = stream.export(fd, progress=progress if external.size > 0 or not total
                                   else lambda _, files: progress(file.tell(), files))
    if args.verbose:
        say(f"{label}: {digest}")


def cmd_container_list(storage: Storage, args: Any) -> None:
    """list containers: those of podman, buildah and CRI-O"""
    rows = container_rows(storage, args)[::-1 if args.sort == "created" else 1]
    storage.faults += storage.unread_database()
    entries = [container_json(container) for _, container in rows]
    for (row, _), entry in zip(rows, entries) if args.size else ():
        for key, size in zip(("size-rw", "size-root-fs"), row["Size"].values()):
            entry[key] = size if size >= 0 else None
    if is_template(args):
        print_rows(args.format, (Fields({**container_texts(row, args), **entry}, raw=row)
                                 for (row, _), entry in zip(rows, entries)), CONTAINER_HEADINGS)
        return
    show(args, entries, (
        [short_id(container.id, args), ", ".join(container.names),
         str(entry["image-name"] or entry["rootfs"] or short_id(container.image, args)),
         human_age(container.created_ns), entry["state"], str(entry["pod"]),
         "{} (virtual {})".format(*map(human_size, row["Size"].values())) if args.size else "",
         "; ".join(container.faults)]
        for entry, (row, container) in zip(entries, rows)),
        ["CONTAINER ID", "NAMES", "IMAGE", "CREATED", "STATE", "POD", "SIZE", "FAULTS"],
        (container.id for _, container in rows))


def cmd_container_inspect(storage: Storage, args: Any) -> None:
    """show the record of containers, and their entry in podman's database"""
    def record(container: Container) -> dict[str, Any]:
        row = storage.podman_containers().get(container.id, {})
        return {**container_json(container), "details": container.details(), "podman": {
            key: value for key, value in row.items() if key not in ("config", "status")}}

    storage.faults += storage.unread_database()
    inspect_each(storage, args, record, inspect_container)


def cmd_toc(storage: Storage, args: Any) -> None:
    """print the table of contents as JSON, by the rules of eStargz"""
    with ProgressLine(0, args.quiet or not args.digests) as progress:
        options: Any = {"digests": args.digests, "progress": progress}
        with open_tree(storage, args) as tree:
            layer = storage.layer(args.layer) if args.kind == "layer" else None
            progress.expect((node for _, node, _ in (layer_entries(layer) if layer
                                                     else tree.walk())), tree.layers * args.verify)
            if args.verify:
                tree.verify(progress)
            entries = layer_toc(layer, **options) if layer else tree_toc(tree, **options)
            print_json(entries, '{"version":1,"entries":[', 2 if args.pretty else None)


def cmd_files(storage: Storage, args: Any) -> None:
    """list files by name: all, or those that match a pattern"""
    with open_tree(storage, args) as tree:
        items: Iterator[Any] = ((b"/" + path, node, first)
                                for path, node, first in tree.glob(args.pattern))
        if args.kind == "layer" and not isinstance(tree.layers[0], DiskTree):
            layer = storage.layer(args.layer)  # names as in the tar, with whiteouts
            fits = compile_patterns(args.pattern,
                                    lambda: (node.name for _, node, _ in layer_entries(layer)))
            items = (item for item in layer_entries(layer) if fits(item[1].name))
        first_item, items = peek(items)
        if first_item is None:
            need_match(tree, args.pattern)
        raw = args.null or not sys.stdout.isatty()
        show(args, (file_json(*item) for item in items),
             (file_line(item, args, raw) for item in items))


def cmd_stat(storage: Storage, args: Any) -> None:
    """show all metadata of files"""
    found = []
    with open_tree(storage, args) as tree:
        tree.seek(map(os.fsencode, args.path), follow=args.follow)
        for path, node in for_each(args, args.path, lambda text: tree.lookup(
                path_of(tree, text), follow=args.follow)):
            entry = file_json(b"/" + path, node)
            if node.checksum is not None and node.size:
                entry["crc64"] = f"{node.checksum:016x}"
            if args.format != "json":
                text = {"path": display(b"/" + path), "linkName": display(node.linkname),
                        "mode": f"{node.mode:04o}", "xattrs": ", ".join(
                            f"{display(name)}={display(content)}" for name, content in
                            sorted(node.xattrs.items()))}
                entry.update((key, text[key]) for key in entry.keys() & text)
            found.append(entry)
    show_inspected(args, found)


def cmd_cat(storage: Storage, args: Any) -> None:
    """write the contents of files, checked, to stdout"""
    with open_tree(storage, args) as tree, open_output(args.output, args.timeout, text=True) as fd:
        def copy(path: str) -> None:
            for data in tree.read(path_of(tree, path), follow=not args.no_follow):
                write_all(fd, data)

        tree.seek(map(os.fsencode, args.path), follow=not args.no_follow)
        # -o FILE appears only when it is whole: the first failure ends the command.
        list(for_each(args, args.path, copy) if args.output in (None, "-")
             else map(copy, args.path))


def cmd_cp(storage: Storage, args: Any) -> None:
    """copy a file or directory out, or with - as a tar to stdout; you own the copies"""
    reference, colon, text = args.source.partition(":/") if ":/" in args.source \
        else args.source.rpartition(":")
    if not colon or not reference or not args.dest:
        raise _UsageError(f'expected {args.kind.upper()}:PATH, got "{args.source}"')
    with open_tree(storage, args, reference) as tree:
        path, node = tree.lookup(path_of(tree, text))
        name = path.rpartition(b"/")[2]
        if args.dest == "-":
            export_tree(tree, args, path, name)
            return
        above, last = os.path.split(args.dest.rstrip("/"))
        dest = os.path.join(os.path.realpath(above), last) if last.strip(".") \
            else os.path.realpath(args.dest)
        if os.path.isdir(dest):
            dest = os.path.join(dest, os.fsdecode(name)) if name else dest
        elif args.dest.endswith("/"):
            raise NotFound(f"no such directory: {args.dest}")
        if node.type == "dir":
            copy_directory(tree, path, dest, args)
        else:
            args.output = dest
            with writing(args, node.size) as (fd, progress):
                copy_content(tree, node, fd, progress)


def cmd_extract(storage: Storage, args: Any) -> None:
    """extract files into a directory: with all metadata, by reflink where possible"""
    if not args.dir:
        raise _UsageError("the name of the directory is empty")
    unwind_on_signals()
    selection: Any = {"paths": args.path, "exclude": args.exclude,
                      "whiteouts": not getattr(args, "no_whiteouts", False)}
    options: Any = {"strip": args.strip_components, "force": args.force,
                    "clean": args.clean_on_error, "owners": args.same_owner,
                    "link_mode": "copy" if args.no_reflinks else args.link_mode,
                    "owner_map": args.owner_map, "verify": args.verify, **selection}
    if getattr(args, "via_skopeo", None) is not None:
        with fetched(args, args.dir) as (image, progress):
            summary = image.extract(args.dir, progress=progress, **options)
    elif getattr(args, "socket", None) is not None:
        with ask_server(args) as stream, ProgressLine(stream.size, args.quiet) as progress:
            summary = extract_streams(
                [stream], args.dir, label=f"layer {stream.label[:12]}", raw=True,
                check=not args.no_verify, progress=progress, **options)
    else:
        with open_tree(storage, args) as tree, ProgressLine(0, args.quiet) as progress:
            progress.expect((node for _, node in select_nodes(tree, **selection)),
                            tree.layers * args.verify)
            summary = extract_tree(tree, args.dir, progress=progress, **options)
    for text in summary["notes"]:
        if not storage or text not in storage.notes + storage.unverified:  # printed at the end
            note(args, display(text))
    show(args, {"directory": spell(os.fsencode(os.path.abspath(args.dir))), **summary},
         () if args.quiet else summary_lines(summary))
    for word, noun, what in (
            ("owner", "file", "{} owned by you: owners could not be set"),
            ("setuid", "file", "lost setuid/setgid because {} owner could not be set"),
            ("xattr", "extended attribute", "could not be set")):
        if word in summary["unset"] and not args.quiet:
            count = summary["unset"][word]
            which = ("is", "its") if count == 1 else ("are", "their")
            say(f"warning: {counted(count, noun)} {what.format(which[word == 'setuid'])}")
    if summary["left-out"] and not args.quiet:
        say(f"warning: {counted(len(summary['left-out']), 'device')} not made (only root can): "
            + ", ".join(summary["left-out"][:3]) + ", ..." * (len(summary["left-out"]) > 3))


def cmd_copy_to_oci(storage: Storage, args: Any) -> None:
    """add an image to an OCI layout, which is made if it does not exist"""
    # Split at the first colon, as podman does, or after a directory that exists.
    parts = args.layout.split(":")
    pairs = [(":".join(parts[:i]), ":".join(parts[i:])) for i in range(1, len(parts) + 1)]
    directory, tag = next((pair for pair in pairs if os.path.isdir(pair[0])), pairs[0])
    if not directory or directory + ":" == args.layout:
        raise _UsageError(f'expected DIR or DIR:TAG, got "{args.layout}"')
    unwind_on_signals()
    compression = "none" if args.compress is None else args.compress
    try:
        parse_compression(compression)
        check_tag(tag)
        if args.via_skopeo is None:
            image = storage.image(args.image, args.platform)
            tag = tag or split_reference([*names_to_give(image, args.image), ""][0])[1]
            total = sum(max(layer.diff_size, 0) for chosen in choose_instances(
                image, args.platform, args.all) for layer in chosen.layers())
            with ProgressLine(total, args.quiet) as progress:
                blob = image.copy_to_oci(
                    directory, tag, compression=compression, platform=args.platform,
                    every=args.all, progress=progress, tell=lambda text: note(args, text))
        else:
            tag = tag or reference_tag(args.via_skopeo)
            with fetched(args, directory) as (copied, progress):
                blob = copied.copy_to_oci(directory, tag, progress=progress)
    except ValueError as error:
        if isinstance(error, CstorError):
            raise
        raise _UsageError(str(error)) from None
    show(args, {"directory": spell(os.fsencode(os.path.abspath(directory))), "tag": tag, **blob},
         () if args.quiet else [f"{blob['digest']}{' ' + tag if tag else ''}"])


def cmd_image_export(storage: Storage, args: Any) -> None:
    """write images as one stream: the root file system as a tar, or an archive to load"""
    kind = vars(args)["as"]
    if kind == "rootfs":
        if len(args.image) > 1:
            raise _UsageError("--as rootfs takes one image; --as docker-archive takes several")
        export_tree(open_tree(storage, args, args.image[0]), args)
        return
    write_archive(args, kind, [
        (image.single(args.platform), names_to_give(image, reference))
        for reference in args.image for image in [storage.image(reference, args.platform)]])


def write_archive(args: Any, kind: str, named: Sequence[tuple[Image, Sequence[str]]]) -> None:
    """Write images with the names that they get to stdout or a file."""
    total = sum({layer.diff_digest: max(layer.diff_size, 0) for image, _ in named
                 for layer in image.layers()}.values())
    with writing(args, total) as (fd, progress):
        ARCHIVES[kind](fd, named, progress)  # verifies each layer as it writes it


def cmd_container_export(storage: Storage, args: Any) -> None:
    """write the root file system of a container, with its writable layer, as a tar"""
    export_tree(open_tree(storage, args), args)


def cmd_diff(storage: Storage, args: Any) -> int:
    """compare two images, or an image with a layer, container, directory or tar file"""
    known: dict[str, LayerTree] = {}
    sides = [open_side(storage, text, known, args.platform) for text in (args.a, args.b)]
    raw = all(side is None or side.raw for side in sides) and any(sides)
    with (sides[0] or open_path(args.a, raw)) as old, (sides[1] or open_path(args.b, raw)) as new:
        old.raw = new.raw = raw  # comparing layers includes whiteouts
        first, found = peek(diff_trees(old, new, args.ignore))
        show(args, ({"path": spell(b"/" + path),
                     "change": "changed" if a and b else "deleted" if a else "added",
                     "what": what, "a": file_json(b"/" + path, a) if a else None,
                     "b": file_json(b"/" + path, b) if b else None}
                    for path, a, b, what in found),
             (f"{'C' if a and b else 'D' if a else 'A'} /{display(path)}"
              + (f"  {','.join(what)}" if what else "") for path, a, b, what in found))
        return 0 if first is None else EXIT_NO


def cmd_tar_diff(storage: Storage | None, args: Any) -> int:
    """compare two tars, plain or compressed, byte by byte and entry by entry"""
    sizes = input_size(args.a), input_size(args.b)
    with ProgressLine(sum(sizes) if all(sizes) else 0, args.quiet) as progress:
        first, rows = peek(diff_tars(args.a, args.b, progress))
        if first and sys.stdout.isatty():  # the rows follow soon
            progress.stop()
        next(rows, None)
        found = first and {key: value for key, value in first.items() if key != "change"}
        head = {"identical": not first, "first": found}
        show(args, rows, difference_lines(first, rows) if first else (),
             head=lambda: json.dumps(head)[:-1] + ', "differences": [')
    return EXIT_NO if first else 0


def cmd_blame(storage: Storage, args: Any) -> None:
    """show which layer and step added each file, and what it hides; --hidden: list hidden files
    instead"""
    image: Any = storage.image(args.image, args.platform).single(args.platform)
    history = []
    with suppress(NotFound):  # an image without a manifest
        history = image.history()
    with image.tree() as tree:
        note_open_steps(history, args)
        first, rows = peek(blame_tree(tree, image, args.pattern, args.hidden))
        if first is None and not args.hidden:
            need_match(tree, args.pattern)
        show(args, rows, blame_lines(rows, args))


def cmd_store_info(storage: Storage, args: Any) -> None:
    """show where the storage is and what is in it"""
    config = storage.config
    counts: dict[str, int | None] = {}
    damage: dict[str, None] = {}  # in order, each once
    for word, get in (("", storage.layers), (Image.WORD, storage.images),
                      (Container.WORD, storage.containers)):
        counts[get.__name__] = None
        try:
            records: Sequence[Record] = get()
            counts[get.__name__] = len(records)
            damage.update((f"{record.label}: {fault}", None) for record in records
                          for fault in record.faults if fault not in damage)
            damage.update((fault, None) for fault in storage.strays(word, records))
        except (CstorError, OSError) as error:
            damage[describe(error)] = None
    storage.faults += storage.unread_database()
    info: dict[str, Any] = {
        "driver": storage.driver, "graph-root": storage.graphroot, "run-root": storage.runroot,
        "imagestore": storage.imagestore, "additional-image-stores": storage.additional_stores,
        "additional-layer-stores": list(storage.layer_stores),
        "configuration": config.files if config else [],
        "scheme": config.scheme if config else "--root",
        "rootless": config.rootless if config else os.geteuid() != 0,
        "transient-store": bool(config and config.transient_store),
        **counts, "podman-database": storage.recorded_roots(),
        "process": describe_process(), "faults": [*storage.faults, *damage]}
    texts = [[key, info_text(value)] for key, value in {
        **info, "process": explain_process(info["process"])}.items() if key != "faults"]
    show(args, info, texts + [["fault", fault] for fault in info["faults"]], ["KEY", "VALUE"])


def cmd_store_check(storage: Storage, args: Any) -> int:
    """compare all records with what is on disk, and list what is damaged or left over"""
    if args.codes:
        names = {"v": "verify", "q": "verify --quick", "c": "check"}
        heads = ["CODE", "SEVERITY", "FOUND BY", "KIND", "MEANING"]
        rows = [[code, row[0], ", ".join(names[by] for by in row[1]), *row[2:]]
                for code, row in CODES.items()]
        show(args, [dict(zip(map(str.lower, heads), row)) for row in rows], rows, heads)
        return 0
    found = storage.check()
    show_findings(args, found, "sound: records and disk agree")
    if storage.linked:
        raise Unsupported(f"not all was checked: {storage.linked[0]} is a symbolic link, which is "
                          "not followed", hint="mount --bind makes it a directory")
    return EXIT_NO * any(finding.severity == "damage" for finding in found)


def cmd_store_df(storage: Storage, args: Any) -> None:
    """show what takes space on disk: images, containers, layers, and what can be freed"""
    def find(reference: str) -> Record:
        try:
            return storage.image(reference)
        except ImageUnknown as error:
            with suppress(ContainerUnknown):
                return storage.container(reference)
            error.hint = "no container has this name either"
            raise

    usage = storage.disk_usage()
    found, lines = usage.as_json(), None
    if args.if_removed:
        found["if-removed"] = result = usage.if_removed(map(find, args.if_removed))
        names = [short_id(name, args) for name in result["kept-by"]]
        keepers = ", ".join(names[:9]) + ", ..." * (len(names) > 9)
        lines = [f"{human_size(result['freed'])} would be freed"] + [
            f"{human_size(result['kept'])} would stay" + f", needed by {keepers}" * bool(keepers)
            ] * bool(result["kept"])
    show(args, found, lines or usage_lines(found, args))
    if usage.unreadable:
        more = f" and {len(usage.unreadable) - 1} more" * (len(usage.unreadable) > 1)
        say(f"warning: sizes are too small: permission denied in {display(usage.unreadable[0])}"
            f"{more} (run it as root)")


def cmd_resolve_link(storage: Storage, args: Any) -> None:
    """name the layer of a short link in overlay/l"""
    layer_id = storage.resolve_link(args.link)
    show(args, {"link": args.link, "layer": layer_id,
                "known": storage.layer_by_id(layer_id) is not None}, [layer_id])


# ================================================================================================
# 31. Command line
#
# One table of commands and one of options make the parser.  Options with values mean the same
# before the command and behind it.
# ================================================================================================

def cmd_help(storage: Storage | None, args: Any) -> None:
    """show this list, or the options and examples of a command"""
    _, command, rest = split_words(args.command)
    if rest and args.command != ["options"]:
        raise unknown_command(command, rest)
    print_help(" ".join([command, *rest]).strip())


def cmd_completion(storage: Storage | None, args: Any) -> None:
    """print the completion of a shell, to source or to install"""
    if not args.word:
        program = program_name()
        print(COMPLETION[args.shell].replace("PROGRAM", program).replace(
            "NAME", re.sub(r"\W", "_", program)), end="")
        return
    *before, current = args.word
    for word, text in dict(candidates(before, current)).items():
        if word == FILES or word.startswith(current):
            print({"bash": word, "fish": f"{word}\t{text}",
                   "zsh": word.replace(":", "\\:") + f":{text}"}[args.shell])


def look_inside(kind: str, extract: str = "") -> dict[str, Command]:
    """Return the rows of COMMANDS that images, layers and containers have in common."""
    rows: dict[str, Command] = {
        "files": (cmd_files, " PATTERN* -l -0 --format"),
        "stat": (cmd_stat, " PATH+ --follow --format"),
        "cat": (cmd_cat, " PATH+ -o --no-follow"),
        "cp": (cmd_cp, ":PATH DEST"),
        "extract": (cmd_extract, " DIR --path --exclude --strip-components --link-mode "
                    "--no-reflinks --verify --no-same-owner --same-owner --owner-map --force "
                    "--no-clean-on-error --clean-on-error --format " + extract)}
    return {f"{kind.lower()} {verb}": (function, kind + more)
            for verb, (function, more) in rows.items()}


# Words of the command, function, arguments; "+" after an argument = one or more, "*" = any number.
COMMANDS: dict[str, Command] = {
    "image list": (cmd_image_list, "-a -q -f --sort --format --no-trunc"),
    "image inspect": (cmd_image_inspect, "IMAGE+ -f"),
    "image layers": (cmd_image_layers, "IMAGE -q --format --no-trunc"),
    "image history": (cmd_image_history, "IMAGE -q --format --no-trunc"),
    "image tree": (cmd_image_tree, "IMAGE --whatrequires --format --no-trunc"),
    "image toc": (cmd_toc, "IMAGE --digests --pretty --verify"),
    **look_inside("IMAGE", "--via-skopeo"),
    "image export": (cmd_image_export, "IMAGE+ --as -o --verify"),
    "image copy-to-oci": (
        cmd_copy_to_oci, "IMAGE DIR[:TAG] --compress --all --format --via-skopeo"),
    "image exists": (cmd_exists, "IMAGE"),
    "image verify": (cmd_image_verify, "IMAGE* --all --quick --format --no-trunc"),
    "image diff": (cmd_diff, "A B --ignore --format"),
    "image blame": (cmd_blame, "IMAGE PATTERN* --hidden --format --no-trunc"),
    "layer list": (cmd_layer_list, "--tree -q -f --sort --format --no-trunc"),
    "layer inspect": (cmd_layer_inspect, "LAYER+ --chain -f"),
    "layer toc": (cmd_toc, "LAYER --digests --pretty --verify"),
    **look_inside("LAYER", "--no-whiteouts --socket --digest --no-verify"),
    "layer export": (cmd_layer_export, "LAYER -o --no-verify --socket --digest"),
    "layer exists": (cmd_exists, "LAYER"),
    "layer verify": (cmd_layer_verify, "LAYER+ --quick --format --no-trunc"),
    "layer stream": (cmd_layer_stream, "LAYER -o --codec --threshold --external"),
    "container list": (cmd_container_list, "-a -s -q -f --sort --format --no-trunc"),
    "container inspect": (cmd_container_inspect, "CONTAINER+ -f"),
    **look_inside("CONTAINER"),
    "container export": (cmd_container_export, "CONTAINER -o --verify"),
    "container exists": (cmd_exists, "CONTAINER"),
    "images": (cmd_images, "NAME? -a -q -n --digests --history -f --sort --format --no-trunc"),
    "ps": (cmd_ps, "-a -q -n -l -p -s --external --noheading -f --sort --format --no-trunc"),
    "inspect": (cmd_inspect, "NAME* -t -f -l -s"),
    "history": (cmd_history, "IMAGE -q -H --no-human --format --no-trunc"),
    "save": (cmd_save, "IMAGE+ -o -m --format --uncompressed"),
    "store info": (cmd_store_info, "--format"),
    "store df": (cmd_store_df, "--if-removed* --format --no-trunc"),
    "store check": (cmd_store_check, "--codes --format --no-trunc"),
    "serve": (
        cmd_serve, "--socket --registry --only --password-file --tls-cert --tls-key --insecure"),
    "resolve-link": (cmd_resolve_link, "LINK --format"),
    "tar-diff": (cmd_tar_diff, "A B --format"),
    "stream-to-tar": (cmd_stream_to_tar, "STREAM -o --codec --external --digest"),
    "completion": (cmd_completion, "SHELL WORD*"),
    "help": (cmd_help, "COMMAND*")}
# Arguments and options with their help, for add_argument(): the flags, then a value: METAVAR or
# lower-case choices, "..." when it may be repeated, "=DEFAULT"; "?" is neither yes nor no unless
# given.  A command's own form of an option has the verb before it.
OPTIONS = {
    "IMAGE": "name, digest, ID or the start of an ID",
    "LAYER": "ID, name, DiffID, short link, the start of an ID or DiffID, or a path of its files",
    **dict.fromkeys(("CONTAINER", "NAME"), "name, ID or the start of an ID"),
    "images NAME": "show only images whose names fit, as --filter reference=NAME does",
    "LINK": "26 characters, as in overlay/l",
    "PATH": "path inside, with or without a leading slash",
    "PATTERN": "path, or pattern of * ** ? [a-z] [!a-z]; \\ makes the next character literal; a "
               "path that exists is literal; without a slash it must match the last component",
    **{f"{word}:PATH": f"{word.lower()} and the path inside" for word in (
        "IMAGE", "LAYER", "CONTAINER")},
    "DEST": "file or directory to make, directory to copy into, or - for a tar on stdout",
    "DIR[:TAG]": "OCI layout; TAG can be a full name; default: the image's own tag",
    "DIR": "directory to make or fill; must be empty unless --force is given",
    "STREAM": "file that holds a stream; - is stdin",
    "SHELL": "bash, zsh or fish",
    "WORD": "words of a command line, behind --: print what its last word can become",
    "COMMAND": "words of a command, or options",
    "A": "image, container, layer, directory or tar file; image: container: layer: dir: or tar: "
         "before it tells its kind",
    "B": "like A",
    "tar-diff A": "tar file, plain or compressed by gzip, bzip2, xz or zstd; - is stdin",
    "-0 --null": "print names unchanged, each followed by a NUL byte",
    "-a --all": "also list images without a name that another image was built on",
    "container list -a --all": "list all containers, which is done in any case",
    "ps -a --all": "list all containers, not only running ones",
    **dict.fromkeys(("ps -l --latest", "inspect -l --latest"),
                    "show only the container that was made last"),
    "-l --long": "mode (+ = has xattrs), owner, group, size, time (UTC), link",
    "-m --multi-image-archive": "all arguments are images; else those after the first are names",
    "ps -n --last N=0": "show only the last N containers that were made",
    "-p --pod": "show pods",
    "-t --type all|container|image|layer=all": "what NAME is",
    **{f"{word} -f --filter FILTER...": f"show only what fits KEY=VALUE or KEY!=VALUE; may be "
       f"repeated; keys: {', '.join(FILTERS[kind])}" for kind, word in (
           ("image", "image list"), ("image", "images"), ("layer", "layer list"),
           ("container", "container list"), ("container", "ps"))},
    "inspect -f --format FORMAT=": "Go template for each object; default: json",
    "-o --output FILE": "write to FILE, which appears when it is whole and verified; default: "
                        "stdout",
    "-q --quiet": "print only IDs, one a line, each once",
    "--all": "copy all instances of a manifest list that are in the storage",
    "verify --all": "verify all images, each layer once",
    "--as rootfs|docker-archive|oci-archive=rootfs": "what to write; archives take several images",
    "--chain": "add the IDs of the layer and its parents, base first",
    "--no-clean-on-error ?": "after an error, keep what was already made",
    "--clean-on-error ?": "leave nothing in DIR after an error; default: if DIR is new",
    f"--codec {'|'.join(CODECS)}": "format of the stream; default: splitfdstream",
    "--codes": "list all codes of findings, and check nothing",
    "--compress HOW": "layers: none, gzip[:1-9], zstd[:1-19] (Python 3.14 or the program)",
    "--digest SHA256": "digest of the tar; default: that of the storage, LIST or server",
    "images --digests": "show digests",
    "ps --external --storage": "also list containers of other programs, such as buildah",
    "images --history": "show the names that the image had",
    "-H --human ?": "show ages; the default",
    "--no-human ?": "show times instead of ages; also --human=false",
    **dict.fromkeys(("images -n --noheading", "--noheading"), "print no column headings"),
    **{f"{word} --sort created|id|repository|size|tag=created":
       "created (newest first), id, repository, size or tag" for word in ("image list", "images")},
    "layer list --sort created|id|size=created": "created (newest first), id or size",
    **{f"{word} --sort command|created|id|image|names|runningfor|size|status=created":
       f"created ({age} first), command, id, image, names, runningfor, size or status"
       for word, age in (("container list", "newest"), ("ps", "oldest"))},
    "--digests": "add the sha256 of each file, checked",
    "--exclude PATTERN...": "skip what matches and all below it; may be repeated",
    "--external LIST": "leave contents in their files and list the files in LIST, as JSON lines",
    "--follow": "follow a link at the end of a path",
    "--no-follow": "refuse a link at the end of a path",
    "--force": "merge into a directory that is not empty: replace files, follow no links",
    **dict.fromkeys(("--format table|json=table", "image history --format table|json=table")),
    **{f"{word} inspect -f --format FORMAT=json":
       "table, json or a Go template with the fields of podman's own inspect"
       for word in ("image", "layer", "container")},
    "list --format FORMAT=table": "table, json or a Go template such as '{{.ID}} {{.Size}}'",
    **{f"{word} --format FORMAT=": "json or a Go template; table before it aligns columns"
       for word in ("images", "ps", "history")},
    "save --format docker-archive|oci-archive|oci-dir|docker-dir=docker-archive":
        "what to write; docker-dir is left to skopeo",
    "--uncompressed": "keep the layers uncompressed, which is done in any case",
    "--hidden": "list files that other layers hide, and the bytes that they waste",
    "--if-removed NAME": "images and containers: what removing all of them would free",
    "--ignore WHAT...": f"ignore differences in: {', '.join(DIFFERENCES)}; may be repeated",
    f"--link-mode {'|'.join(LINK_MODES)}=auto":
        "auto: reflink, else copy; reflink: fail rather than copy; hardlink: link the store's own "
        "files where all their metadata are right; copy: share nothing",
    "--owner-map [u:|g:]IN:OUT:COUNT...": "shift owners: IDs from IN on become OUT and so on; may "
                                          "be repeated",
    "--path PATTERN...": "extract only what matches, with all below it and the directories "
                         "above; may be repeated",
    "--platform OS/ARCH=": "which instance of a manifest list; default: for this machine",
    "--pretty": "indent the JSON",
    "--quick": "compare sizes, types and headers alone; read no content",
    "--no-reflinks": "the same as --link-mode copy",
    "--no-same-owner ?": "leave all files owned by you",
    "--same-owner ?": "set owners or fail; default: root sets those that the kernel allows",
    "-s --size": "also show the bytes of the writable layer, and of the image as virtual",
    "--socket PATH": "read from the server at PATH instead of a storage",
    "serve --socket PATH": "where to listen; default: the socket on stdin, or one that systemd "
                           "passes",
    "--registry ADDRESS": "where to serve images to clients of OCI registries: [HOST:]PORT (HOST: "
                          "127.0.0.1; PORT 0: any), unix:PATH, or - for the socket that is passed",
    "--only NAME...": "serve only this name, with or without tag or digest, or ID; may be repeated",
    "--password-file FILE": "lines user:password, one of which a client must give; not readable by "
                            "others",
    "--tls-cert FILE": "serve over TLS with this certificate (PEM)",
    "--tls-key FILE": "the key of --tls-cert (PEM)",
    "--insecure": "let everybody who can connect read all that is served, over plain HTTP",
    "--strip-components N=0": "remove N leading components from the paths",
    f"--threshold N={INLINE_THRESHOLD}": "contents of up to N bytes stay inline; default: "
                                         "%(default)s",
    "--tree": "show each layer below its parent, and the images that share it",
    "--no-trunc": "show full IDs and commands",
    "--verify": "first compare each layer's tar, headers and contents, with its DiffID; extract "
                "also reads back what it made",
    "--no-verify": "skip the checksums; sizes are still checked",
    "--via-skopeo REF": "instead of IMAGE, one that skopeo fetches: oci:DIR:TAG, dir:DIR, "
                        "docker-archive:FILE, docker://NAME ...",
    "--whatrequires": "show the layers that are built on the image instead",
    "--no-whiteouts": "skip the .wh. files that hide files of lower layers"}
# Options before or after any command; the last one counts, except for --store.
GLOBALS = {
    "-r --root DIR": "graph root, instead of the configured one",
    "--runroot DIR=": "run root, which can hold volatile records",
    "--imagestore DIR=": "where images are, if not in the graph root",
    "--store DIR...": "additional image store; may be repeated",
    "--owner-ids FILE=": "ranges of the store's owner on another machine: lines as in /etc/subuid, "
                         "with the owner's name or ID, for users and groups; or a directory with "
                         "subuid, subgid, passwd",
    f"--timeout SECONDS={PEER_TIMEOUT:g}": "how long to wait for a silent server or client; "
                                           f"default: {PEER_TIMEOUT:g}",
    "--driver overlay|vfs=": "storage driver, where a graph root holds stores of both",
    "--salvage": "read what is left where files of records are damaged or lost",
    "--no-helper": "never enter a user namespace",
    "-q --quiet": "no progress, no warnings",
    "-v --verbose +": "say more; twice: show tracebacks"}
# Types and choices of values, and names of arguments that differ from their METAVAR.
VALUES: dict[str, dict[str, Any]] = {
    "N": {"type": int}, "SECONDS": {"type": float}, "WHAT": {"choices": DIFFERENCES},
    "SHELL": {"choices": ("bash", "zsh", "fish")}}
NAMES = {"DIR[:TAG]": "layout", **dict.fromkeys(
    ("IMAGE:PATH", "LAYER:PATH", "CONTAINER:PATH"), "source")}
ACTIONS: dict[str, dict[str, Any]] = {
    "": {"action": "store_true"}, "?": {"action": "store_const"},
    "+": {"action": "count", "default": 0}}
ALIASES = {"ls": "list", "copy": "copy-to-oci", "system": "store"}
# Options that exclude each other; why, or what to do instead.
CONFLICTS = (
    ("--verify", "--no-verify", ""),
    ("--digest", "--no-verify", ""),
    ("--clean-on-error", "--force", ": it would remove files that were there before"),
    ("--owner-map", "--no-same-owner", ": it needs owners to be set"),
    ("--link-mode reflink", "--via-skopeo", ": its blobs share no contents with files"),
    ("--link-mode hardlink", "--via-skopeo", ": its blobs share no contents with files"),
    ("--link-mode hardlink", "--socket", ": a passed file cannot get another name"),
    ("--compress", "--via-skopeo", ": blobs are copied unchanged"),
    ("--all", "--via-skopeo", "; choose one image with --platform"),
    ("--all", "--platform", ""))
# An option that others need, and these.
NEEDS = {cmd_serve: ["--registry", "--only", "--password-file", "--tls-cert", "--insecure"],
         cmd_extract: ["--socket", "--digest", "--no-verify"]}
# podman's options that are not here, and what to use instead.
ELSEWHERE = {
    "version": "use --version", "save --compress": "use image copy-to-oci --compress gzip",
    "ps --ns": "lsns shows the namespaces of running processes",
    "ps --sync": "only podman asks the OCI runtime: use podman ps --sync",
    **dict.fromkeys(("ps --watch", "ps -w"), "use watch, which repeats any command")}
# What podman does and cstor does not.
WRITERS = ("attach build commit create events exec generate healthcheck import kill kube load "
           "login logs mount network play pod port prune pull push rename restart rm rmi run "
           "search secret sign start stats stop tag top unmount untag update volume wait").split()
# What people want, and the last words of the commands for it, in the order of `help`.
PURPOSES = {
    "Look": "list inspect layers history tree files stat toc info df exists resolve-link",
    "Take out": "cat cp extract export copy-to-oci stream stream-to-tar",
    "Compare": "diff blame tar-diff",
    "Check": "verify check",
    "Serve": "serve",
    "As in podman": "images ps inspect history save",
    "Learn": "help completion"}
STATUSES = ("0 done, 1 differences or damage of the store found, 2 usage, 3 not found or "
            "ambiguous, 4 content fails its checksum, 5 permission, 6 malformed or unsupported "
            "data or other failure, 130 interrupted, 141 stdout was closed.")
FILES = "/"  # stands for all files among what completes a word
COMPLETION = {"bash": """\
_NAME() {
    local -a words found
    local prefix
    read -ra words <<< "${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:0:COMP_POINT} == *[[:space:]] ]] && words+=("")
    mapfile -t found < <("${1/#\\~\\//$HOME/}" completion bash -- "${words[@]:1}" 2>/dev/null)
    [[ ${found[0]} == / ]] && found=("${found[@]:1}") && compopt -o default
    [[ ${found[0]} == *[:=] ]] && compopt -o nospace
    prefix=${words[-1]}  # of a word that readline splits at : and = only the end is replaced
    [[ ${COMP_WORDS[COMP_CWORD]} == [:=] ]] || prefix=${prefix%"${COMP_WORDS[COMP_CWORD]}"}
    COMPREPLY=("${found[@]#"$prefix"}")
}
complete -F _NAME PROGRAM
""", "zsh": """\
#compdef PROGRAM
_NAME() {
    local program=${(Q)words[1]/#\\~\\//$HOME/}
    local found before=("${(@Q)words[2,CURRENT-1]}")
    found=("${(@f)$($program completion zsh -- $before "$PREFIX" 2>/dev/null)}")
    [[ ${found[1]%%:*} == / ]] && shift found && _files
    compset -P '*=' && found=("${found[@]#*=}")
    (( $#found )) && _describe -t values value found
}
if [[ $funcstack[1] == _NAME ]]; then _NAME "$@"; else compdef _NAME PROGRAM; fi
""", "fish": """\
function __NAME_complete
    set -l words (commandline -opc)
    set -l found ($words[1] completion fish -- $words[2..-1] (commandline -ct) 2>/dev/null)
    if string match -q '/*' -- $found[1]
        set -e found[1]
        __fish_complete_path (commandline -ct)
    end
    printf '%s\\n' $found
end
complete -c PROGRAM -f -a '(__NAME_complete)'
"""}
# The arguments of two examples for each command; or for the last word of several, with their NAME.
EXAMPLES = {
    "toc": "NAME --pretty; NAME --digests --verify",
    "files": "NAME -l; NAME '**/*.conf' -0 | xargs -0 -n 1 echo",
    "stat": "NAME /etc/passwd; NAME /bin/sh --follow --format table",
    "cat": "NAME /etc/os-release; NAME /etc/passwd -o passwd",
    "cp": "NAME:/etc ./etc; NAME:/etc - | tar -tv",
    "extract": "NAME root; NAME some --path etc --path '**/*.so'",
    "image list": "-f label=env --sort size; --format '{{.ID}}'",
    "image inspect": "alpine; alpine app:2 --format table",
    "image layers": "app:2; app:2 --format json",
    "image history": "app:2; app:2 --no-trunc",
    "image tree": "app:2; alpine --whatrequires",
    "image export": "alpine | tar -tv; --as docker-archive -o both.tar app:1 app:2",
    "image copy-to-oci": "alpine layout:3.20; alpine layout --compress gzip",
    "image verify": "app:2; --all --quick",
    "image diff": "app:1 app:2 --ignore time; alpine container:web",
    "image blame": "app:2 /etc/passwd; app:2 --hidden",
    "layer list": "--format json; --sort size --format '{{.Id}} {{.DiffSize}}'",
    "layer inspect": "3c42d5a; 3c42d5a --chain --format table",
    "layer export": "3c42d5a -o layer.tar; 3c42d5a | tar -tv",
    "layer verify": "3c42d5a; 3c42d5a --quick --format json",
    "layer stream": "3c42d5a -o base.stream; 3c42d5a -o head.stream --external files.list",
    "container list": "--format json; -f name=^web --format '{{.ID}} {{.Names}}'",
    "container inspect": "web; web --format table",
    "container export": "web -o web.tar; web | tar -tv",
    "exists": "NAME && echo yes || echo no; NAME -v && echo there",
    "images": "--filter dangling=false -q; --format 'table {{.Repository}} {{.Tag}} {{.Size}}'",
    "ps": "-a; -a --format '{{.Names}} {{.Status}}'",
    "inspect": "alpine web; alpine --format '{{json .Config.Labels}}'",
    "history": "app:2; app:2 --format '{{.CreatedBy}}'",
    "save": "-o app.tar app:2; --format oci-archive -o both.tar -m app:1 app:2",
    "store info": "; --format json",
    "store df": "; --if-removed app:1",
    "store check": "; --format json --no-trunc",
    "serve": "--socket ./cstor.sock; --registry 5000 --insecure --only localhost/app",
    "resolve-link": "TQE2IHLMZRYWDCVLQ6HUE7ZCM7; TQE2IHLMZRYWDCVLQ6HUE7ZCM7 --format json",
    "tar-diff": "old.tar new.tar.gz; old.tar - --format json < new.tar.gz",
    "stream-to-tar": "layer.stream -o layer.tar; - < layer.stream | tar -tv",
    "completion": "bash > cstor.bash; zsh -- image l",
    "help": "image extract; options"}


def split_words(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Return the global options before and between the words of a command, these, and the rest."""
    valued = {flag for *flags, value in map(str.split, GLOBALS) if value[0] not in "-+"
              for flag in flags}
    lead: list[str] = []
    command, left = "", list(words)
    while left and command not in COMMANDS:
        short = re.fullmatch(r"-([qv]+)(r.*)?", left[0], re.DOTALL)
        if short:  # several in one
            left[:1] = [f"-{part}" for part in (*short[1], short[2]) if part]
        if left[0].startswith("-") and len(left[0]) > 1:
            count = 1 + (left[0] in valued)
            lead, left = lead + left[:count], left[count:]
            continue
        longer = " ".join([*command.split(), ALIASES.get(left[0], left[0])])
        if not left[0] or not commands_below(longer):
            break
        command, left = longer, left[1:]
    return lead, command, left


def commands_below(start: str) -> list[str]:
    """Return the command with these words, or all that begin with them."""
    return [each for each in COMMANDS if f"{each} ".startswith(f"{start} ".lstrip())]


def parse_words(words: Sequence[str]) -> Any:
    """Return the arguments; print help and raise SystemExit where they ask for it.

    argparse takes half a millisecond for each parser and a third for each argument.
    """
    lead, command, rest = split_words(words)
    if command not in COMMANDS:
        new_parser().parse_args([word for word in lead if word not in ("-h", "--help")])
        wants_help = {"-h", "--help"} & {*lead, *rest}
        if rest and rest[0] not in wants_help:
            raise unknown_command(command, rest)
        print_help(command)
        if wants_help:
            raise SystemExit
        raise _UsageError(f"missing COMMAND (see {program_name(command)} --help)")
    parser = command_parser(command, words)
    end = [*rest, "--"].index("--")
    lead, rest[:end] = ([each for word in words for each in plain_flag(parser, word)]
                        for words in (lead, rest[:end]))
    quiet = {"-q", "--quiet"} & set(lead)
    parser.set_defaults(quiet=bool(quiet))  # behind the command -q can be another option
    args, more = parser.parse_known_args([*(word for word in lead if word not in quiet), *rest])
    if "pattern" in args and not any(word.startswith("-") for word in more):
        args.pattern += more  # after an option argparse takes no more
    elif more:
        flag = more[0].partition("=")[0]
        flags = ELSEWHERE.get(f"{command} {flag}") \
            or did_you_mean(flag, [*parser._option_string_actions])
        parser.error(f"unrecognized arguments: {' '.join(more)}" + (
            "; --via-skopeo replaces IMAGE" if getattr(args, "via_skopeo", None)
            else flags and f"; {flags}"))
    return args


def plain_flag(parser: Any, word: str) -> list[str]:
    """Return --FLAG for --FLAG=true, as Go's programs take it, and for =false --no-FLAG or []."""
    flag, _, value = word.partition("=")
    known = parser._option_string_actions
    if flag not in known or known[flag].nargs != 0 or value.lower() not in BOOLEANS:
        return [word]
    no = "--no-" + known[flag].option_strings[-1][2:]
    return [flag] if BOOLEANS[value.lower()] else [no] * (no in known)


def unknown_command(command: str, rest: Sequence[str]) -> _UsageError:
    """Return the error of words that are not a command, with those that may be meant."""
    word, asked = rest[0], f"{command} {rest[0]}".lstrip()
    phrases = [phrase for each in COMMANDS for phrase in (each, each.split()[0])]
    verbs = {verb: ", ".join(each for each in COMMANDS if each.split()[-1] == verb)
             for verb in (each.split()[-1] for each in COMMANDS)}
    if word in WRITERS:
        podman = re.sub("^store (?!events|prune)", "", re.sub("^layer", "image", asked))
        podman = podman.replace("store", "system")
        raise _UsageError(f"unknown command: {asked}; cstor only reads stores: use podman {podman}")
    hint = ELSEWHERE.get(asked) or did_you_mean(word, verbs, 1) \
        or did_you_mean(" ".join([*command.split(), *rest[:2]]), phrases, 0.8) \
        or did_you_mean(asked, phrases) or did_you_mean(word, verbs)
    return _UsageError(f"unknown command: {display(asked)}{hint and f'; {hint}'} "
                       f"(see {program_name()} --help)")


def print_help(command: str) -> None:
    """Print the help of a command, of all that begin with it, or of the global options."""
    if command in COMMANDS:
        print(command_parser(command).format_help(), end="")
    elif command == "options":
        print(new_parser(usage="%(prog)s [OPTION...] COMMAND ... [OPTION...]",
                         description="Options of every command, before or after it.",
                         epilog=f"Exit status: {STATUSES}").format_help(), end="")
    else:
        print("\n".join(overview(command)))


def overview(start: str) -> Iterator[str]:
    """Yield the screen that lists all commands, or those that begin with ``start``."""
    yield f"usage: {program_name(start)} COMMAND [ARGUMENT...] [OPTION...]"
    yield "Read images of containers/storage: no podman, no root, no mount, no writes."
    own = PURPOSES["As in podman"]
    for purpose, verbs in PURPOSES.items():
        rows = []
        for verb in verbs.split():
            found = {command.rpartition(" ")[0]: COMMANDS[command][0].__doc__ or ""
                     for command in commands_below(start) if command.split()[-1] == verb
                     and (command in own.split()) == (verbs is own)}
            text = re.sub(r"\b(images|layers|containers)\b", "them" if len(found) > 1 else r"\1",
                          gist([*found.values(), ""][0]))
            rows += [f"  {f'{chr(124).join(found)} {verb}'.lstrip():<32}{text}"] * bool(found)
        yield from [f"\n{purpose}", *rows] * bool(rows)
    yield f"\nOptions and examples of a command: {program_name()} COMMAND --help"
    yield f"Options of every command, such as --root DIR: {program_name()} help options"


def gist(text: str) -> str:
    """Return the first clause of a help text."""
    return re.split("[,;:] ", " ".join(text.split()))[0].replace("==SUPPRESS==", "")


def candidates(before: Sequence[str], current: str) -> Iterator[tuple[str, str]]:
    """Yield what the next word of a command line can be, each with a gloss."""
    lead, command, rest = split_words(before)
    if command == "help":
        lead, command, rest = split_words(rest)
    known = command in COMMANDS
    parser = command_parser(command) if known else new_parser()
    flags, places = parser._option_string_actions, parser._get_positional_actions()
    waiting, count, given = None, 0, [*lead, *rest]
    for word in given:
        action = None if waiting else flags.get(word)
        count += not waiting and not action
        waiting = action if action and action.nargs != 0 else None
    due = [waiting] if waiting else places[count:] or [each for each in places[-1:] if each.nargs]
    option, equals, value = current.partition("=")
    if not waiting and equals and option in flags:
        for word, gloss in values_for(flags[option], given, value):
            yield (word if word == FILES else f"{option}={word}"), gloss
    elif not waiting and current.startswith("-"):
        yield from ((flag, gist(action.help or "")) for flag, action in flags.items())
    elif due:
        yield from values_for(due[0], given, current)
    for each in commands_below(command) if not (known or rest or waiting) else ():
        word, *more = each[len(command):].split()
        yield word, "commands" if more else gist(COMMANDS[each][0].__doc__ or "")


def values_for(action: Any, given: Sequence[str], current: str) -> Iterator[tuple[str, str]]:
    """Yield the values that an option or argument can take."""
    what = action.metavar or ""
    yield from ((choice, "") for choice in action.choices or ["table", "json"] * (what == "FORMAT"))
    for kind in ["image", "container"] if what in ("A", "B", "NAME") else [
            kind for kind in FINDERS if what.partition(":")[0] == kind.upper()]:
        args = new_parser().parse_known_args([*given, "--no-helper"])[0]
        with suppress(CstorError, OSError), open_storage(args) as storage:
            for name, gloss in names_of(storage, kind, current):
                yield name + ":" * what.endswith(":PATH"), gloss
    if what in ("A", "B", "DEST", "DIR", "DIR[:TAG]", "FILE", "LIST", "STREAM") \
            or what == "PATH" and action.option_strings:
        yield FILES, ""


def names_of(storage: Storage, kind: str, current: str) -> Iterator[tuple[str, str]]:
    """Yield the names of all images, layers or containers in their shortest form, and IDs."""
    for record in getattr(storage, kind + "s")():
        gloss = human_size(record.diff_size) if kind == "layer" else record.id[:12]
        for name in record.names:
            form = next((form for form in short_names(name) if form.startswith(current)), name)
            if re.fullmatch(r"[\w.:/@+-]+", form, re.ASCII):  # nothing that a shell acts on
                yield form, gloss
        if current or kind == "layer" or not record.names:
            yield record.id[:max(12, len(current))], gloss


def examples(command: str) -> list[str]:
    """Return the examples of a command."""
    kind, _, verb = command.rpartition(" ")
    name = {"image": "alpine", "layer": "3c42d5a", "container": "web"}.get(kind, "")
    text = EXAMPLES.get(command, EXAMPLES.get(verb, "")).replace("NAME", name)
    return [f"{command} {arguments}".rstrip() for arguments in text.split("; ")]


def command_parser(command: str, words: Sequence[str] = ()) -> Any:
    """Return the parser of what comes with a command; "-q" of a list prints IDs."""
    function, names = COMMANDS[command]
    parser = new_parser(command, description=function.__doc__)
    group, _, verb = command.rpartition(" ")
    parser.set_defaults(function=function, kind=group)
    names += " --platform" * (group == "image" and verb != "list")
    if "--via-skopeo" in names and any(word.partition("=")[0] == "--via-skopeo" for word in words):
        names = names.replace("IMAGE ", "", 1)
    specs = {match[0]: (spec[len(match[1]):], OPTIONS[spec]) for spec in OPTIONS
             for match in [re.match(r"((?:[a-z][a-z-]* )*)\S+", spec)] if match}
    for name in names.split():
        word = name.rstrip("+*?")
        spec = next(specs[key] for key in (f"{command} {word}", f"{verb} {word}", word)
                    if key in specs)
        more: Any = {"nargs": name[-1]} if word != name else {"dest": "ids"} if word == "-q" else {}
        add_argument(parser, *spec, **more)
    shown = [flag for spec in GLOBALS for flag in spec.split() if flag.startswith("--")]
    parser.add_argument_group("options of every command", f"{', '.join(shown)} "
                              f"(see {program_name()} help options)")
    parser.footer = "\nexamples:\n" + "".join(
        f"  {program_name()} {example}\n" for example in examples(command))
    return parser


def program_name(command: str = "") -> str:
    """Return the name by which cstor.py was called, and the words of a command."""
    name = os.path.basename(sys.argv[0])
    return f"{'cstor' if name in ('-', '-c', '', '__main__.py') else name} {command}".rstrip()


def new_parser(command: str = "", **options: Any) -> Any:
    """Return a parser of the global options, which the help of a command only names."""
    class Parser(argparse.ArgumentParser):
        footer = ""

        def format_help(self) -> str:
            width = shutil.get_terminal_size().columns or 80  # 0 before Python 3.11
            self.formatter_class = lambda prog: argparse.HelpFormatter(
                prog, width=max(40, min(width, 100)) - 2, max_help_position=28)
            return super().format_help() + self.footer

        def _check_value(self, action: argparse.Action, value: Any) -> None:
            if action.choices is not None and value not in action.choices:
                choices = [*map(str, action.choices)]
                hint = did_you_mean(str(value), choices)
                raise argparse.ArgumentError(action, f"invalid choice: {value}" + (
                    hint and f"; {hint}") + f" (choose from {', '.join(choices)})")

        def error(self, message: str) -> NoReturn:
            raise _UsageError(f"{message} (see {self.prog} --help)")

    names = vars(argparse)
    translate, names["_"] = names["_"], str  # gettext takes a millisecond
    try:
        parser = Parser(
            prog=program_name(command), allow_abbrev=False,
            conflict_handler="resolve",  # -q of lists
            formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80), **options)
    finally:
        names["_"] = translate
    for spec, text in GLOBALS.items():
        add_argument(parser, spec, argparse.SUPPRESS if command else text)
    parser.add_argument("--version", action="version", version=f"{program_name()} {__version__}",
                        help=argparse.SUPPRESS if command else "show the version")
    return parser


def add_argument(parser: Any, spec: str, text: str | None, **more: Any) -> None:
    """Add the argument or option that ``spec`` describes, as in OPTIONS."""
    words = spec.split()
    flags = [word for word in words if word[0] == "-"]
    value, equals, default = "".join(words[len(flags):]).partition("=")
    metavar = value[:-3] if value.endswith("...") else value
    options: dict[str, Any] = {"metavar": metavar, **VALUES.get(metavar, {})}
    if value in ACTIONS:
        options = dict(ACTIONS[value])
    elif value == value.lower():
        options = {"choices": value.split("|"), **({"metavar": "KEY"} if "--sort" in flags else {})}
    if metavar != value:
        options.update(action="append", default=[])
    if equals:
        options["default"] = options.get("type", str)(default)
    if value == "?":
        options.update(const=not spec.startswith("--no-"),
                       dest=re.sub(r"\A--(no-)?", "", flags[-1]).replace("-", "_"))
    parser.add_argument(*flags or [NAMES.get(value, value.lower())], help=text,
                        **{**options, **more})


def check_options(args: Any) -> None:
    """Raise _UsageError for options that exclude each other, and numbers out of range."""
    def given(option: str) -> bool:
        name, _, value = option[2:].replace("-", "_").partition(" ")
        found = getattr(args, name, None)
        if name == "no_same_owner":
            found = getattr(args, "same_owner", None) is False
        return bool(found == value if value else found)

    for one, other, why in CONFLICTS:
        if given(one) and given(other):
            raise _UsageError(f"{one} cannot be used with {other}{why}")
    for option in ("strip_components", "threshold"):
        if getattr(args, option, 0) < 0:
            raise _UsageError(f"--{option.replace('_', '-')} must be at least 0")
    needed, *options = NEEDS.get(args.function, [""])
    for option in options:
        if given(option) and getattr(args, needed[2:], None) is None:
            raise _UsageError(f"{option} needs {needed}")
    if {getattr(args, side, "").removeprefix("tar:") for side in "ab"} == {"-"}:
        raise _UsageError("stdin can be read only once")
    if given("--tls-cert") != given("--tls-key"):
        raise _UsageError("--tls-cert and --tls-key need each other")
    if not 0 < args.timeout <= 1e6:
        raise _UsageError("--timeout must be a number of seconds above 0")
    if getattr(args, "digest", None):
        args.digest = "sha256:" + args.digest.removeprefix("sha256:")
        if not re.fullmatch(f"sha256:{HEX64}", args.digest):
            raise _UsageError("--digest must be a SHA-256: 64 hexadecimal digits")
    try:
        best_platform((), getattr(args, "platform", ""))
        OwnerMap(getattr(args, "owner_map", ()))
        parse_only(getattr(args, "only", ()))
    except ValueError as error:
        raise _UsageError(f"--{error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (sys.argv[1:] when None) and return the exit status."""
    words = sys.argv[1:] if argv is None else check_words("argv", argv)
    if argv is None:
        gc.set_threshold(10_000)  # records are many, and garbage only at the end
        gc.freeze()  # what is there stays to the end: no collection looks at it, not even the last
        gc.enable()
        if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
            # With -u Python loses, and nobody notices, what a short write leaves over.
            sys.stdout = open(sys.stdout.fileno(), "w", 1, sys.stdout.encoding, closefd=False)
    stdout, before, sys.unraisablehook = sys.stdout, sys.unraisablehook, raise_after_finalizer
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        status = EXIT_PIPE
    except (CstorError, ImportError, OSError, _UsageError, MemoryError, RecursionError) as error:
        try:
            sys.stdout.flush()  # it may fail again
        except (OSError, ValueError) as again:
            if again.args[:1] == error.args[:1]:
                name_error(error, "stdout")
        verbose = [word for word in words if word == "--verbose" or (
            word[:1] == "-" and not word[1:].strip("v"))]
        status = report_error(error, "".join(verbose).count("v") > 1)
    except (KeyboardInterrupt, _Stopped) as error:
        status = 128 + int(error.args[0]) if error.args else 130
        if getattr(error, "hint", ""):  # says what is left behind
            say(f"interrupted: {display(vars(error)['hint'])}")
    while _handlers:  # that unwind_on_signals() replaced; a process that ends ignores signals
        with suppress(KeyboardInterrupt, _Stopped):  # all work is done
            number, handler = _handlers.popitem()
            signal.signal(number, (lambda *_: None) if argv is None else handler)
    sys.unraisablehook = before
    try:
        sys.stdout.flush()
    except OSError:
        if argv is None:  # Python flushes stdout again at exit: let it flush to /dev/null
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if stdout is None and argv is not None:
        with suppress(OSError):  # it has lost what was printed
            sys.stdout.close()
        sys.stdout = stdout
    return status


def main_inside(words: Sequence[str]) -> int:
    """Run a command line, ``words`` with the name of the program, for run_unshared()."""
    with take_over() as connection:
        sys.argv = list(words)
        status = main()
        with suppress(ProtocolError):  # the process that asked was killed
            connection.send({"jsonrpc": "2.0", "method": "done", "status": status})
        return status


def drop_syntax_tree() -> None:
    """Start this process anew with the code that Python has made of the script."""
    # Python would keep the script's syntax tree, 50 MB, to the end.  Nothing else changes.
    with suppress(Exception), Opened(os.memfd_create("cstor")) as memory:  # else go on like this
        os.pwrite(memory, marshal.dumps((_CODE, sys.path)), 0)
        with Opened(fcntl.fcntl(memory, fcntl.F_DUPFD, 3)) as fd:  # not that of a closed stream
            flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
            code = ("import marshal, sys; del sys.argv[0]; "
                    f"file = open({fd}, 'rb'); code, sys.path = marshal.loads(file.read()); "
                    "file.close(); __file__ = code.co_filename; exec(code)")
            os.execv(sys.executable, [sys.executable, *flags, "-c", code, *sys.argv])


def _run(words: Sequence[str]) -> int:
    if sys.stdout is None:  # no other file gets its number, and what writes to it fails
        while (fd := os.open(os.devnull, os.O_RDONLY)) < 1:  # stdin is closed, too
            pass
        sys.stdout = open(fd, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names can hold any bytes
    if not all(map(can_be_path, words)):
        raise _UsageError("an argument holds a NUL byte or a lone surrogate")
    try:
        args = parse_words(words)
    except SystemExit:  # after --help and --version
        return 0
    args.status = 0
    check_options(args)
    if args.function is cmd_serve and IS_SCRIPT:
        drop_syntax_tree()
    if args.function is cmd_extract and args.same_owner and os.geteuid() and not (
            args.no_helper or UNSHARED_MARK in os.environ or "CAP_CHOWN" in capabilities()):
        unwind_on_signals()
        return run_unshared("main_inside", [sys.argv[0], *words])
    elsewhere = args.function is not cmd_serve and any(
        getattr(args, name, None) is not None for name in ("socket", "via_skopeo"))
    try:
        opened = None if args.function in (cmd_tar_diff, cmd_stream_to_tar, cmd_completion, cmd_help
                                           ) else open_storage(args)
    except (CstorError, OSError):
        if not elsewhere or args.root:
            raise
        opened = None  # there is no storage to protect from writing
    if not opened:
        return args.function(None, args) or 0
    with opened as storage:
        storage.watch = lambda: ProgressLine(0, args.quiet)
        status = args.function(storage, args) or 0
        hidden = args.quiet or args.status
        for fault in [*storage.unverified, *([] if hidden else storage.faults)]:
            say(f"warning: {display(fault)}")
        for text in [] if hidden else storage.notes:
            note(args, display(text))
    return max(status, int(args.status))


if __name__ == "__main__":
    sys.exit(main())
