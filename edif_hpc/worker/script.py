"""Run one script as a whole: as `__main__`, with its arguments, its models and a place for its result.

The process is the same that runs a block, with the same limits: what a script needs beyond a block is no more
than one file that it may write to, an anonymous one. That one is reached through /proc/self/fd, which Landlock
allows since no file system shows it.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from safetensors import SafetensorError

from edif_hpc.core.errors import EdifError, SavedError
from edif_hpc.core.scripts import files, here, plain
from edif_hpc.core.scripts.files import OWN_FORM
from edif_hpc.core.scripts.payload import Script
from edif_hpc.core.wire import ResultFormat
from edif_hpc.worker import results
from edif_hpc.worker.ends import size_text
from edif_hpc.worker.failures import Refusal
from edif_hpc.worker.here import Models

CHUNK = 1024 * 1024
BOTH = (
    f"The script saves values with edif_hpc.save and writes to {here.OUTPUT}; a result is one of the two, so leave one "
    "out."
)

ONE_FILE = (
    f"{here.OUTPUT} is one file without a folder: open it, as `with open(os.environ['{here.OUTPUT}'], 'wb') as file:`, "
    "and write to `file` (numpy.savez(file, ...), file.write(safetensors.torch.save(...))), or use edif_hpc.save."
)


def unpacked(payload: bytes) -> Script:
    """The script in a payload.

    Raises:
        Refusal: it is none.
    """
    try:
        return Script.unpack(payload)
    except EdifError as error:
        raise Refusal(str(error)) from error


class Result:
    """What a script leaves: the values that it saved, or the file that it wrote; of a method, its whole result.

    Args:
        form: the suffix of the file that values become.
        output: an open, empty, anonymous file.
    """

    def __init__(self, form: str, output: int) -> None:
        self.form = form
        self._output = output
        self._values: dict[str, Any] = {}
        self._whole: memoryview | None = None

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self._output}"

    @property
    def own_file(self) -> bool:
        """Whether the script wrote the file itself, in whatever form."""
        return os.fstat(self._output).st_size > 0

    def save(self, name: str, value: Any) -> None:
        """Take one value. What cannot be written is refused now, while its author still sees which line it was."""
        if self.own_file:
            raise Refusal(BOTH)
        if self.form == OWN_FORM:
            raise Refusal(
                f"The result is to be a file that edif_hpc.save does not write: write it to {here.OUTPUT}, or take one "
                f"of .{', .'.join(files.FORMS)}."
            )
        if self.form != "pt":
            try:
                value = plain.plain(name, value)
                files.check(name, value, self.form)
            except SavedError as error:
                raise Refusal(str(error)) from error
        self._values[name] = value

    def take(self, whole: memoryview) -> None:
        """Take the whole result: a file of the form that was asked for."""
        self._whole = whole

    def write(self, fd: int, limit: int, threads: int) -> int:
        """Write the result's file and return its size.

        Raises:
            Refusal: it is too large, or of values that the file cannot hold.
        """
        if self._whole is not None:
            return _within(limit, fd, self._whole, "result takes", "ask for less of it")
        written = os.fstat(self._output).st_size
        if written and self._values:
            raise Refusal(BOTH)
        if written > limit:
            raise Refusal(f"The script's file is larger than the limit of {size_text(limit)}: write less.")
        if written:
            return _copy(self._output, fd, written)
        if self.form == OWN_FORM:
            raise Refusal(
                f"The script wrote nothing to {here.OUTPUT}, and its result was to be that file: write to it, or use "
                f"edif_hpc.save and take one of .{', .'.join(files.FORMS)} for --out."
            )
        if self.form == "pt":
            return results.write(self._values, fd, ResultFormat.FILE, limit, threads)
        try:
            data = files.written(self._values, self.form)
        except SavedError as error:
            raise Refusal(str(error)) from error
        return _within(limit, fd, data, "saved values take", "save fewer or smaller")


def run(script: Script, models: Models, result: Result) -> None:
    """Run it to its end; whatever it raises is raised here, but for an exit that means success."""
    lines = script.source.splitlines(keepends=True)
    linecache.cache[script.file] = (len(script.source), None, lines, script.file)  # nnsight and tracebacks read it
    module = types.ModuleType("__main__")
    module.__file__ = script.file
    with _as_main(module, script, result.path), models.installed(), here.running(result.save, result.take):
        code = compile(script.source, script.file, "exec", dont_inherit=True)
        try:
            exec(code, vars(module))  # noqa: S102 - what executors are for
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise Refusal(_exit_sentence(ended.code)) from ended
        except (OSError, SafetensorError) as error:
            if isinstance(error, SafetensorError) or str(error.filename).startswith(result.path):
                error.add_note(ONE_FILE)
            raise


def _exit_sentence(code: Any) -> str:
    if isinstance(code, EdifError):
        return str(code)
    if isinstance(code, int):
        return f"The script ended with exit code {code}."
    return f"The script ended with: {str(code).strip()[:2000]}"


@contextlib.contextmanager
def _as_main(module: types.ModuleType, script: Script, output: str) -> Iterator[None]:
    """What a script takes for granted, and afterwards what was there before: at level `none` this process goes on."""
    before = sys.modules["__main__"], sys.argv, sys.stderr, dict(os.environ)
    sys.modules["__main__"] = module
    sys.argv = [script.file, *script.arguments]
    sys.stderr = sys.stdout  # already the request's log, where progress bars and warnings belong too
    os.environ[here.OUTPUT] = output
    try:
        yield
    finally:
        sys.modules["__main__"], sys.argv, sys.stderr, environment = before
        os.environ.clear()
        os.environ.update(environment)


def _copy(source: int, target: int, size: int) -> int:
    done = 0
    while done < size:
        data = os.pread(source, min(CHUNK, size - done), done)
        if not data:  # it was cut meanwhile, by a thread of the script's own
            raise Refusal("The script's file became shorter while it was read: let all writing end before the script.")
        done = _put(target, data, done)
    return size


def _within(limit: int, fd: int, data: bytes | memoryview, what: str, advice: str) -> int:
    if len(data) > limit:
        raise Refusal(f"The {what} more than the limit of {size_text(limit)}: {advice}.")
    return _put(fd, data, 0)


def _put(fd: int, data: bytes | memoryview, at: int) -> int:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
    return at
