"""Nothing lost: one writer of a run, signals that end it well, checkpoints that are checked, steps
that went wrong and are not saved.

A checkpoint is checkpoint/step-N-CHECKSUM.pt: written aside, brought to the disk, put in place in
one move. The last two are kept. One whose bytes do not have its checksum is passed over.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import safetensors
import torch

from data import batches

try:
    import fcntl
except ImportError:                                    # Windows: two writers are not noticed there
    fcntl = None

NAME = re.compile(r"step-(\d+)-[0-9a-f]+\.pt")
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


@contextlib.contextmanager
def guarded(job, new):
    """Hold the run's folder, a new one or not, while `job` trains in it. A signal sets job.signal,
    and the run stops after that step, saved. The system lets go of a folder whose process dies."""
    out, previous = Path(job.config.out), {}
    if re.search("[\0-\x1f\ud800-\udfff]", job.config.out):
        raise ValueError(f"--out {job.config.out!r}: not all libraries can open such a name")
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if not job.agree(lambda: is_held(folder) and not (new and (out / "config.json").exists())):
            raise ValueError(f"--out {out}: another process writes this run; wait for it, or take "
                             "another folder")
        previous = {number: signal.signal(number, lambda number, _: hear(job, number))
                    for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
        yield
        job.finish()
        if job.signal:                                 # after the last step
            raise SystemExit(128 + job.signal)
    except Stopped:
        print(f"stopped; go on by: {job.command} --out {out} --resume", file=sys.stderr)
        raise
    except BadStep as error:
        raise FloatingPointError(report(job, error)) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if fcntl:
            os.close(folder)


class Stopped(SystemExit):
    """A run was told to stop, and has saved. Its code is the shell's for that signal."""

    def __init__(self, number):
        super().__init__(128 + number)


def is_held(folder):
    try:
        if fcntl:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                                    # a file system without locks
        pass
    return True


def hear(job, number):
    """The first signal waits for the end of the step, the second one for nothing."""
    if job.heard:                                      # by this process itself
        os._exit(128 + number)
    job.signal = job.heard = number
    with contextlib.suppress(OSError, RuntimeError):   # the terminal may be gone, or being written
        print("\nstopping after this step", file=sys.stderr, flush=True)


# ---- Steps that went wrong -----------------------------------------------------------------------

class BadStep(FloatingPointError):
    """A player's loss, gradient or weights cannot be gone on with."""

    def __init__(self, player, loss, norm, size):
        super().__init__(f"the loss is {loss:g}, the gradient's norm {norm:g}, the norm of the "
                         f"weights then {size:g}")
        self.player = player


def report(job, error):
    player, config = error.player, job.config
    [name] = (name for name, one in job.players.items() if one is player)
    step = sum(one.steps for one in job.players.values())
    training, drafts = job.origins
    origins = drafts if name == "sft" and drafts else training
    origins = [origin for origin in origins for _ in range(len(player.rows) // len(origins))]
    pairs = next(batches(origins, config.batch_size, config.seed, player.steps - 1))
    last = max((step_of(path) for path in kept(Path(config.out) / "checkpoint")), default=None)
    on = f"; {job.command} --out {config.out} --resume --lr SMALLER " + (
        "begins again" if last is None else
        f"goes on from step {last} (if that is bad, too, remove its checkpoint)")
    return (f"step {step}, the {name}'s {player.steps}, is not saved: {error}; look at "
            f"{'--sft-lr' if name == 'sft' else '--lr'}, --beta, the weights it began with and "
            f"these pairs: {', '.join(pairs)}{on if name != 'sft' else ''}")


WARNINGS = {            # what stands in a row of metrics.jsonl: when to warn, what it means
    "ratio": (lambda ratio: ratio < 0.01,
              "the mean ratio r is {ratio:.2g}, so that hardly anything is learned"),
    "clipped": (lambda share: share == 1,
                "Eq. 12 clips all pairs of a step, so that no pair counts by its own ratio r")}


def warn(bar, row):
    """Once for each, in a start of the program."""
    said = vars(bar).setdefault("said", set())
    for name, (is_so, meaning) in WARNINGS.items():
        if name in row and name not in said and is_so(row[name]):
            said.add(name)
            bar.write(f"step {row['step']}, {row['player']}: {meaning.format(**row)}. Shorter "
                      "turns (--n-mu, --n-nu) or a smaller --lr keep the players closer",
                      sys.stderr)


# ---- Checkpoints ---------------------------------------------------------------------------------

def kept(folder):
    """The checkpoints of a folder, by step."""
    return sorted((path for path in Path(folder).glob("step-*-*.pt") if NAME.fullmatch(path.name)),
                  key=step_of)


def step_of(path):
    return int(NAME.fullmatch(path.name)[1])


def checksum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def sync(path):
    """Bring a file to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def parts(folder, step):
    """{file in step-N, beside the checkpoint: its checksum}; empty where one process trains."""
    beside = folder / f"step-{step}"
    return {path.name: checksum(path) for path in beside.iterdir()} if beside.is_dir() else {}


def write_checkpoint(folder, step, state):
    folder.mkdir(exist_ok=True)
    partial = folder / "state.pt.partial"
    try:
        torch.save(state, partial)
    except (OSError, RuntimeError) as error:           # of a full disk, say
        partial.unlink(missing_ok=True)
        raise OSError(f"{partial}: {error}; what checkpoints there are, are whole") from None
    for path in (partial, folder.parent / "metrics.jsonl"):
        sync(path)
    partial.replace(folder / f"step-{step}-{checksum(partial)}.pt")
    for old in kept(folder)[:-2]:
        old.unlink()


def read_checkpoint(job):
    """(state, rows of metrics.jsonl until then) of a run's last checkpoint that is whole, if it was
    made of what `job` is; (None, []): there is none. Later ones are removed: a run that goes on
    from here writes others, and must not come upon these."""
    folder, metrics = Path(job.config.out) / "checkpoint", Path(job.config.out) / "metrics.jsonl"
    rows, bad, later = whole_rows(metrics), [], []
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not as this version writes it; go on with the run by the "
                         "version that began it")
    for path in kept(folder)[::-1]:
        step = step_of(path)
        if len(rows) < step:
            bad.append(f"{metrics} has {len(rows)} of the {step} rows before {path}")
        elif (state := whole_state(path)) is None:
            bad.append(f"{path} is damaged")
        elif not job.agree(lambda: parts(folder, step) == state.get("parts", {})):
            bad.append(f"{folder / f'step-{step}'} is damaged")
        else:
            refuse_other(job, path, state)
            if bad:
                print(f"{'; '.join(bad)}; going on from {path}", file=sys.stderr)
            for other in later:
                other.unlink()
            return state, rows[:step]
        later.append(path)
        state = None                                   # there may be no room for two
    if bad:
        raise ValueError(f"{'; '.join(bad)}; there is no other checkpoint; begin again with "
                         "another --out")
    if rows:
        print(f"{folder} has no checkpoint: beginning again at step 1", file=sys.stderr)
    return None, []


def whole_rows(metrics):
    """The rows of metrics.jsonl up to the first that is not the next step's."""
    rows = []
    with contextlib.suppress(ValueError, LookupError, TypeError):
        for row in metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []:
            if not row.endswith(b"\n") or json.loads(row)["step"] != len(rows) + 1:
                break
            rows.append(row)
    return rows


def whole_state(path):
    """What is in a checkpoint; None where it has not the bytes, or the content, of one."""
    if not path.is_file() or not path.stem.endswith(checksum(path)):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if state["made_of"] and step_of(path) == state["step"] else None
    except Exception:                                  # of a forged one
        return None


def refuse_other(job, path, state):
    """ValueError for a checkpoint that was made of something else. Only --lr may become smaller;
    what it was until then is noted, here and in config.json."""
    was, own, config = state["made_of"], job.made_of, job.config
    slower = config.lr < was["--lr"]
    other = [name for name in own if was.get(name) != own[name] and name != "--lr-was"
             and not (name == "--lr" and slower)]
    if other:
        raise ValueError(f"{path} was made with other {', '.join(other)}; resume needs all as it "
                         "was (--lr may become smaller)")
    note = f"{was['--lr']:g} until step {state['step']}" if slower else None
    own["--lr-was"] = config.lr_was = ", ".join(filter(None, (was["--lr-was"], note))) or None


@contextlib.contextmanager
def whole_folder(folder):
    """A folder to write into, which takes the place of `folder` when all is written."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    except safetensors.SafetensorError as error:       # of a full disk, say
        raise OSError(f"{partial}: {error}") from None
    for path in partial.rglob("*"):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# ---- What a run is made of -----------------------------------------------------------------------

# options that may change within a run; of files what is in them counts, not where they are
FREE = {"out", "model", "data", "held_out", "device", "save_every", "micro_tokens", "eval_prompts",
        "gradient_checkpointing", "offload_resting"}


def ingredients(job, config, shape, folder, training, held_out):
    """{name: what decides the results}: options, and hashes of pairs and of the start's files."""
    files = [] if folder is None else sorted(
        path for path in Path(folder).iterdir()
        if path.suffix in (".json", ".safetensors", ".bin", ".jinja"))
    options = {"--" + name.replace("_", "-"): value for name, value in vars(config).items()
               if name not in FREE}
    return {**options, "command": job.command, "training pairs": digest(training),
            "held-out pairs": digest(held_out),
            "shape of the model": digest(shape),
            "files of the start model": digest([checksum(path) for path in files])}


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()
