"""Reading one line of glyphs with tesseract: its library kept loaded in this process, or its program.

Guarantees: library and program give the same words, since both get the same picture and the same settings; a
line that cannot be read within `TIMEOUT_S` counts as writing. Loading the library once instead of starting
the program for every line takes a sixth of the CPU time. No socket is opened.
"""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

TIMEOUT_S = 20
_LIBRARY = "libtesseract.so.5"
_SINGLE_LINE = 7


@dataclass(frozen=True, slots=True)
class Word:
    """A word that tesseract read and its confidence, 0 to 100."""

    text: str
    confidence: float


_UNREADABLE = [Word("UNREADABLE", 100.0)]


def read_words(ink: npt.NDArray[np.uint8]) -> list[Word]:
    """Read one line, dark on white; a line that tesseract cannot finish counts as writing."""
    engine = _engine()
    table = _by_program(ink) if engine is None else engine.read(ink)
    if table is None:
        return _UNREADABLE
    fields = [row.split("\t") for row in table.splitlines()]
    return [
        Word(row[11], float(row[10]))
        for row in fields
        if len(row) == 12 and row[0] == "5" and row[11].strip()
    ]


@lru_cache(maxsize=1)
def tesseract() -> str | None:
    """Return the path of the tesseract program, or None."""
    return shutil.which("tesseract")


@lru_cache(maxsize=1)
def tesseract_version() -> str:
    """Return the version of tesseract, or 'not installed'."""
    program = tesseract()
    if program is None:
        return "not installed"
    done = subprocess.run([program, "--version"], capture_output=True, timeout=TIMEOUT_S, check=False)
    first = done.stdout.decode("utf-8", "replace").splitlines()[:1]
    return first[0].removeprefix("tesseract ") if first else "unknown"


def _by_program(ink: npt.NDArray[np.uint8]) -> str | None:
    buffer = io.BytesIO()
    Image.fromarray(ink).save(buffer, "PNG", compress_level=1)
    try:
        done = subprocess.run(
            [str(tesseract()), "-", "-", "--psm", str(_SINGLE_LINE), "-l", "eng", "tsv"],
            input=buffer.getvalue(),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
            env={"PATH": os.environ.get("PATH", ""), "OMP_THREAD_LIMIT": "1"},
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.decode("utf-8", "replace")


class _Engine:
    """The C interface of tesseract 5 (capi.h), single-threaded, with the English model loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        for name, result, arguments in (
            ("TessBaseAPICreate", pointer, ()),
            ("TessBaseAPIInit3", number, (pointer, text, text)),
            ("TessBaseAPISetVariable", number, (pointer, text, text)),
            ("TessBaseAPISetPageSegMode", None, (pointer, number)),
            ("TessBaseAPISetImage", None, (pointer, text, number, number, number, number)),
            ("TessBaseAPIRecognize", number, (pointer, pointer)),
            ("TessBaseAPIGetTsvText", pointer, (pointer, number)),
            ("TessBaseAPIClear", None, (pointer,)),
            ("TessDeleteText", None, (pointer,)),
            ("TessMonitorCreate", pointer, ()),
            ("TessMonitorDelete", None, (pointer,)),
            ("TessMonitorSetDeadlineMSecs", None, (pointer, number)),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        self._handle = library.TessBaseAPICreate()
        library.TessBaseAPISetVariable(self._handle, b"debug_file", b"/dev/null")
        if library.TessBaseAPIInit3(self._handle, None, b"eng") != 0:
            raise OSError("tesseract has no English model")
        library.TessBaseAPISetPageSegMode(self._handle, _SINGLE_LINE)

    def read(self, ink: npt.NDArray[np.uint8]) -> str | None:
        """Return tesseract's table of words, or None when it could not finish."""
        library, handle = self._library, self._handle
        height, width = ink.shape
        library.TessBaseAPISetImage(handle, np.ascontiguousarray(ink).tobytes(), width, height, 1, width)
        monitor = library.TessMonitorCreate()
        library.TessMonitorSetDeadlineMSecs(monitor, TIMEOUT_S * 1000)
        try:
            if library.TessBaseAPIRecognize(handle, monitor) != 0:
                return None
            table = library.TessBaseAPIGetTsvText(handle, 0)
            if not table:
                return None
            try:
                return (ctypes.string_at(table) or b"").decode("utf-8", "replace")
            finally:
                library.TessDeleteText(table)
        finally:
            library.TessMonitorDelete(monitor)
            library.TessBaseAPIClear(handle)


@lru_cache(maxsize=1)
def _engine() -> _Engine | None:
    """Load the library once per process; None where it cannot be used, and the program reads instead."""
    try:
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)
        return _Engine(ctypes.CDLL(_LIBRARY))
    except (OSError, AttributeError):
        return None
