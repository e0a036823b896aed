"""What train.py and eval.py read other people's files through: limits of size, errors as sentences,
and text that has no power over a terminal.

Not defended against: a chat template or a tokenizer that computes for ever, a tokenizer that makes
its text longer and longer (to stop these would take a second process), a pytorch_model.bin that
unpacks to more (take safetensors from strangers). Of a .parquet file or a dataset of the hub only
the size of the rows is looked at.
"""

import contextlib
import errno
import gzip
import json
import os
import signal
import sys
import zlib
from pathlib import Path

import data

try:
    import resource
except ImportError:                                    # Windows: a template's memory has no limit
    resource = None

TEXT = 10**6                # characters of a row, and of what a chat template makes of it
LINE = 8 * TEXT             # bytes of a line, whatever else is in it
UNPACKED = 100              # times its own size, and a megabyte, that a .gz may hold
DEPTH = 50                  # of JSON in JSON
MEMORY = 2**28              # bytes that a template may take
WEIGHTS = (".safetensors", ".bin")
SENTENCE = 4000             # characters


# ---- Pairs ---------------------------------------------------------------------------------------

def load_data(source, held_out=None, leave_out=None):
    """data.load_data, of files that are no bombs and rows that are no books."""
    for path in filter(None, (source, held_out)):
        refuse_rows(Path(path))
    training, test, note = data.load_data(source, held_out, leave_out)
    for pair in (*training, *test):
        short(pair.origin, json.dumps((pair.prompt, pair.chosen, pair.rejected),
                                      ensure_ascii=False))
    return training, test, brief(note)


def read_rows(path):
    refuse_rows(path)
    return data.read_rows(path)


def refuse_rows(path):
    """ValueError for a .jsonl with too long a line, and for a .gz that unpacks to too much. Neither
    is ever held as a whole."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: is neither a file nor a folder")
    if path.is_dir() or not path.name.endswith((".jsonl", ".jsonl.gz")):
        return
    packed, line = path.suffix == ".gz", 0
    left = UNPACKED * path.stat().st_size + 2**20 if packed else float("inf")
    with (contextlib.suppress(OSError, EOFError, zlib.error),          # its reader names these
          (gzip.open if packed else open)(path, "rb") as file):
        while chunk := file.read(2**16):
            begin, *lines = chunk.split(b"\n")
            left, line = left - len(chunk), len(lines[-1]) if lines else line + len(begin)
            if left < 0:
                raise ValueError(f"{path}: unpacked it is over {UNPACKED} times as large; unpack "
                                 "it yourself, if you trust it")
            if line > LINE:
                raise ValueError(f"{path}: has a line of over {LINE} bytes; leave it out")


def short(what, text):
    """The text, if it has at most TEXT characters."""
    if len(text) > TEXT:
        raise ValueError(f"{what}: has {len(text)} characters, the limit is {TEXT}; leave it out")
    return text


def brief(text):
    """What is said, without its middle where somebody's file has made it long."""
    return text if len(text) <= SENTENCE else f"{text[:SENTENCE // 2]} ... {text[-200:]}"


# ---- Models --------------------------------------------------------------------------------------

class Tokenizer(data.Tokenizer):
    """Of somebody else's folder."""

    @classmethod
    def from_pretrained(cls, folder):
        with no_panic(f"{refuse_folder(Path(folder))}: tokenizer.json cannot be read"):
            tokenizer = super().from_pretrained(folder)
        if getattr(tokenizer.backend.model, "dropout", None):
            raise ValueError(f"{folder}: tokenizer.json has a dropout, so that a text is other "
                             "tokens each time; set it to null")
        return tokenizer

    def encode(self, string, rendered=False):
        with no_panic(f"the tokenizer cannot read {string[:40]!r}"):
            return super().encode(string, rendered)

    def decode(self, ids):
        with no_panic("the tokenizer cannot decode an answer"):
            return super().decode(ids)

    def render(self, prompt, add_generation_prompt=False):
        if isinstance(prompt, str):
            return prompt
        with little_memory():
            return short("a dialogue in the chat template",
                         super().render(prompt, add_generation_prompt))


def find_source(name):
    return refuse_folder(data.find_source(name))


def refuse_folder(folder):
    """The folder itself. ValueError for a link out of it, since a model's files are copied into the
    players (the hub's cache links to its blobs), for what is no file, for large files, and for JSON
    that is nested deeper than DEPTH."""
    home = folder.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in sorted(folder.glob("*")):
        if path.suffix not in (*WEIGHTS, ".json", ".jinja", ".model", ".txt", ".py"):
            continue                                   # not read here
        if path.is_symlink() and not any(map(Path(os.path.realpath(path)).is_relative_to, homes)):
            raise ValueError(f"{path} is a link out of its folder; name the folder that it points "
                             "to, or put a copy in its place")
        parsed = path.suffix == ".json" and path.name != "tokenizer.json"
        most = float("inf") if path.suffix in WEIGHTS else 2**24 if parsed else 2**27
        if path.exists() and (not path.is_file() or path.stat().st_size > most):
            raise ValueError(f"{path} is no file, or one of over {most} bytes")
        if parsed and path.exists():
            value = None
            with contextlib.suppress(ValueError, RecursionError):      # its reader names these
                value = json.loads(path.read_bytes())
            if is_deep(value, DEPTH):
                raise ValueError(f"{path} is nested more than {DEPTH} deep")
    return folder


def is_deep(value, room):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return room < 0 or any(is_deep(each, room - 1) for each in inner)


@contextlib.contextmanager
def no_panic(what):
    """A panic of the library's Rust, which is no Exception, becomes a sentence. What Rust itself
    writes of it, to the process' standard error, is none and goes nowhere."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} ({' '.join(str(error).split())})") from None
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


@contextlib.contextmanager
def little_memory():
    """What is within gets a MemoryError where it takes over MEMORY bytes more (on Linux)."""
    pages = Path("/proc/self/statm")
    if resource is None or not pages.exists():
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    size = int(pages.read_bytes().split()[0]) * resource.getpagesize() + MEMORY
    limits = [limit for limit in (before, size) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


# ---- A terminal ----------------------------------------------------------------------------------

class Plain:
    """A stream that shows control characters, and those that turn a line's direction, as \\x1b and
    the like; `kept` are let through."""
    CONTROL = (*range(32), *range(127, 160), *range(0x202a, 0x202f), *range(0x2066, 0x206a))

    def __init__(self, stream, kept):
        self.stream = stream
        self.shown = {code: chr(code).encode("unicode_escape").decode() for code in self.CONTROL
                      if chr(code) not in kept}

    def write(self, text):
        self.quietly(self.stream.write, text.translate(self.shown))
        return len(text)

    def flush(self):
        self.quietly(self.stream.flush)

    @staticmethod
    def quietly(function, *arguments):
        """A run goes on when its terminal has gone, but a full disk is told."""
        try:
            function(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise

    def __getattr__(self, name):
        return getattr(self.stream, name)


def console(reader_may_go=False):
    """Of a program at a terminal: text from models and files does nothing to it, and a character
    that it lacks is shown as its number. A reader that has gone may end it, without a word."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                 # it was closed: >&-
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)     # a full disk: now
    sys.stdout, sys.stderr = Plain(sys.stdout, "\n\t"), Plain(sys.stderr, "\n\t\r")
    if reader_may_go and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
