"""Measure a GGUF file with llama.cpp in a child process: token ids of texts, and log-probabilities of given tokens.

The child is `python -m dpost_lite.local.proof`, with a request on its standard input and the reply as its last line.
What the figures mean for an export is decided in pipeline/proof.py.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpost_lite.errors import DpostError, ExportError
from dpost_lite.local import llama

CHUNK = 64  # tokens whose distributions are compared at a time
FULL_BYTES = 2**22  # a disk with less free space than this counts as full


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of a prompt and a rationale; the rationale begins at `start`."""

    token_ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a file's next-token distributions are from the reference's, over the tokens of one rationale.

    `kl` is the mean KL divergence from the reference in nats, `largest_kl` the largest of one token, `same_top` the
    share of tokens (0..1) whose likeliest continuation is the same, and `largest_gap` the largest absolute difference
    in log-probability of a token of the rationale, in nats.
    """

    num_tokens: int
    kl: float
    largest_kl: float
    same_top: float
    largest_gap: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What llama.cpp makes of a file: the token ids of each text, the tokens that end an answer, one `Difference` per
    row that the reference covers.
    """

    text_ids: list[list[int]]
    ending: list[int]
    differences: list[Difference]


def measure(
    file: Path,
    *,
    texts: Sequence[str] = (),
    may_end: Sequence[int] = (),
    rows: Sequence[Row] = (),
    reference: Path | None = None,
    written: Path | None = None,
) -> Measured:
    """Have llama.cpp tokenise `texts` (names of special tokens are recognised, nothing is added), say which tokens of
    `may_end` end an answer, and evaluate `rows`.

    Log-probabilities of the rationales' tokens are written to `written`, a .npy file of float32 (tokens, vocab), and
    compared with those in `reference`, which may hold fewer rows. Raises ExportError if llama.cpp fails or crashes.
    """
    request = {
        "file": str(file),
        "extra_buffers": llama.uses_extra_buffers(file),
        "texts": list(texts),
        "may_end": list(may_end),
        "rows": [[row.token_ids, row.start] for row in rows],
        "reference": str(reference) if reference else None,
        "written": str(written) if written else None,
    }
    child = llama.run_module("dpost_lite.local.proof", text=json.dumps(request))
    if child.returncode:
        if written and shutil.disk_usage(written.parent).free < FULL_BYTES:
            raise ExportError(
                f"the disk of {written.parent} is full: the log-probabilities do not fit; free some space"
            )
        reason = llama.last_lines(child.stderr)
        how = "" if child.returncode == llama.PYTHON_ERROR else f"{llama.ended_by(child.returncode)}: "
        raise ExportError(
            f"llama.cpp failed while the {llama.file_type(file)} file was compared ({how}{reason}); "
            "close other programs and export it again"
        )
    reply = json.loads(child.stdout.decode().splitlines()[-1])
    return Measured(reply["text_ids"], reply["ending"], [Difference(**found) for found in reply["differences"]])


def write_logprobs(file: Path, rows: Sequence[Row], logits_of: Any) -> None:
    """Write float32 log-probabilities (tokens, vocab) of the rationales' tokens as .npy.

    `logits_of(row)` returns the logits (tokens, vocab) from which the rationale's tokens are predicted.
    """
    import numpy as np

    with file.open("wb") as stream:  # a memory map would crash on a full disk
        for i, row in enumerate(rows):
            logits = logits_of(row)
            if i == 0:
                shape, descr = (num_tokens(rows), logits.shape[-1]), np.lib.format.dtype_to_descr(np.dtype(np.float32))
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, len(logits), CHUNK):
                stream.write(_log_softmax(logits[start : start + CHUNK]).astype(np.float32).tobytes())


def num_tokens(rows: Sequence[Row]) -> int:
    """Count the tokens of the rationales."""
    return sum(len(row.token_ids) - row.start for row in rows)


def _differences(rows: Sequence[Row], found: Any, expected: Any) -> Iterator[Difference]:
    """Compare log-probabilities (tokens, vocab) row by row, as far as `expected` goes."""
    import numpy as np

    end = 0
    for row in rows:
        start, end = end, end + len(row.token_ids) - row.start
        if end > len(expected):
            return
        kl, same_top, gap = [], [], []
        for at in range(start, end, CHUNK):
            p, q = (logs[at : min(at + CHUNK, end)].astype(np.float64) for logs in (expected, found))
            first = row.start + at - start
            places = np.arange(len(p)), list(row.token_ids[first : first + len(p)])
            kl += (np.exp(p) * (p - q)).sum(-1).tolist()
            same_top += (p.argmax(-1) == q.argmax(-1)).tolist()
            gap += np.abs(p[places] - q[places]).tolist()
        yield Difference(
            num_tokens=end - start,
            kl=float(np.mean(kl)),
            largest_kl=float(np.max(kl)),
            same_top=float(np.mean(same_top)),
            largest_gap=float(np.max(gap)),
        )


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: carry out the request of `measure`."""
    import llama_cpp
    import numpy as np

    rows = [Row(tuple(ids), start) for ids, start in request["rows"]]
    exact_cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llm = llama.open_gguf(
        Path(request["file"]),
        extra_buffers=request["extra_buffers"],
        n_ctx=max((len(row.token_ids) for row in rows), default=8),
        logits_all=bool(rows),
        n_threads_batch=max(1, (os.cpu_count() or 1) // 2),  # more would wait for each other on a busy machine
        **exact_cache,
    )
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)

    def logits_of(row: Row) -> Any:
        llm.reset()
        prompt = llama.read_prompt(llm, row.token_ids[: row.start])
        read = [*prompt, *row.token_ids[row.start : -1]]
        llm.eval(read)
        logits = np.array(llm.scores[len(prompt) - 1 : len(read)])
        if not np.isfinite(logits).all():
            raise RuntimeError("the logits contain NaN or infinity")
        return logits

    differences: list[Difference] = []
    if rows:
        written = Path(request["written"])
        write_logprobs(written, rows, logits_of)
        if request["reference"]:
            arrays = (np.load(path, mmap_mode="r") for path in (written, request["reference"]))
            differences = list(_differences(rows, *arrays))
    return {
        "text_ids": [llm.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]],
        "ending": [i for i in request["may_end"] if llama_cpp.llama_vocab_is_eog(vocabulary, i)],
        "differences": [asdict(found) for found in differences],
    }


def main() -> None:
    """Read a request from standard input and print the reply."""
    try:
        reply = _answer(json.loads(sys.stdin.buffer.read()))
    except Exception as error:  # one line for the parent's error message
        sys.exit(f"{error}" if isinstance(error, DpostError) else f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    print("\n" + json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
