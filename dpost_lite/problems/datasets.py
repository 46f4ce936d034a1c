"""Load problems from five published sets or the user's own file, split them, and check train and test for overlap.

    load ──▶ split_train_dev ──▶ train, dev          check_overlap(train, test) before any training

The sets are the paper's: GSM8K for training, MultiArith, ASDiv and SVAMP for out-of-domain evaluation ("Self-Training
with Direct Preference Optimization Improves Chain-of-Thought Reasoning", Table 2). MATH-500 ("Let's Verify Step by
Step", problems of MATH) is our addition: it is harder, and its answers are LaTeX. Departures: questions that repeat
within a set are dropped (20 of MultiArith's 600, 1 of ASDiv's 2,096), and GSM8K's 6,705/768 split follows a rule that
works for any file, unless the authors' own lists are given as a split file.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpost_lite.errors import DataError, nearest
from dpost_lite.problems.answers import is_number
from dpost_lite.problems.files import (
    EXPECTED_FORM,
    QUESTION_ANSWER,
    RefusedRow,
    Row,
    detect_format,
    normal_question,
    read_rows,
    to_problems,
)
from dpost_lite.problems.latex import check_installed
from dpost_lite.problems.records import Problem

__all__ = ["NAMED", "Loaded", "RefusedRow", "check_overlap", "load", "normal_question", "split_train_dev"]

NAMED = ("gsm8k", "multiarith", "asdiv", "svamp", "math500")

# name -> (repository, configuration, split) on the Hugging Face hub. Evaluation-only sets are split there too; like the
# paper, we evaluate on all of their problems.
HUB: dict[str, tuple[str, str | None, str]] = {
    "gsm8k": ("openai/gsm8k", "main", "{split}"),
    "multiarith": ("ChilleD/MultiArith", None, "train+test"),
    "asdiv": ("EleutherAI/asdiv", None, "validation"),
    "svamp": ("ChilleD/SVAMP", None, "train+test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
}


@dataclass(frozen=True)
class Loaded:
    """The problems of one source in order, the rows that were refused, and the format that was detected.

    `format` is the name of the set, or for a file "question/answer", "prompt/completion", "alpaca", "messages" ….
    """

    problems: list[Problem]
    refused: list[RefusedRow]
    format: str


def load(
    source: str, *, split: Literal["train", "test"] = "test", data_dir: Path | None = None, offline: bool = False
) -> Loaded:
    """Load the problems of a named set or of a `.jsonl`, `.json`, `.csv` or `.parquet` file.

    A named set is read from `data_dir` if given, else from the Hugging Face hub (with `offline`, only from its local
    cache). `split` applies to named sets only.

    Raises:
        DataError: the source is missing, unreachable, for evaluation only, or without a usable row; or an answer is
            LaTeX and math-verify is not installed.
    """
    loaded = _load(source, split, data_dir, offline=offline)
    if not all(is_number(problem.answer) for problem in loaded.problems):
        check_installed()  # now, and not at the first comparison, which may be hours away
    return loaded


def _load(source: str, split: Literal["train", "test"], data_dir: Path | None, *, offline: bool) -> Loaded:
    if source not in NAMED:
        return _load_file(Path(os.path.expanduser(source)))
    if split == "train" and source != "gsm8k":
        raise DataError(f"{source} is for evaluation only: train on gsm8k, synthetic or your own file")
    if data_dir is not None:
        rows = _rows_from_folder(source, split, data_dir)
    else:
        rows = _rows_from_hub(source, split, offline=offline)
    problems, refused = to_problems(rows, QUESTION_ANSWER, id_prefix=f"{source}-{split}")
    if not problems:
        raise _no_usable_row(source, refused)
    return Loaded(problems, refused, source)


def split_train_dev(
    problems: list[Problem], *, dev_size: int, split_file: Path | None = None
) -> tuple[list[Problem], list[Problem]]:
    """Split the problems of a training source into train and dev, each in the order of `problems`.

    By default, dev is the `dev_size` problems whose questions have the smallest SHA-256: the same on every machine and
    for any order of rows. A `split_file` overrides this: JSON with the lists `train` and `dev` of 0-based positions,
    which together name every problem once, and optionally `questions_sha256` for either list (over its questions, each
    followed by a line feed). Pass all problems of the source; limits apply after the split.

    Raises:
        DataError: no training problems would be left, or the split file does not match these problems.
    """
    assert dev_size >= 0, dev_size
    if split_file is not None:
        dev = set(_read_split(split_file, problems))
    elif dev_size >= len(problems):
        raise DataError(
            f"data.dev_size={dev_size} leaves none of {len(problems)} problems to train on: give a smaller size"
        )
    else:
        dev = set(sorted(range(len(problems)), key=lambda k: _sha256([problems[k].question]))[:dev_size])
    return [p for k, p in enumerate(problems) if k not in dev], [p for k, p in enumerate(problems) if k in dev]


def check_overlap(train: list[Problem], test: list[Problem], *, train_name: str, test_name: str) -> None:
    """Check that no test question is also a training question; only letters and digits are compared.

    Raises:
        DataError: questions are shared; the message gives their number and one example.
    """
    trained = {normal_question(problem.question): problem.id for problem in train}
    shared = [(trained[key], p.id) for p in test if (key := normal_question(p.question)) in trained]
    if shared:
        train_id, test_id = shared[0]
        raise DataError(
            f"{len(shared)} of {len(test)} test questions of {test_name} are also in the training data {train_name} "
            f"(such as {test_id} = {train_id}): remove them from one of the two, or evaluate on other problems"
        )


# Files


def _load_file(path: Path) -> Loaded:
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        known = (*NAMED, "synthetic")
        raise DataError(
            f"there is no file or set '{path}'{nearest(str(path).lower(), known)}: give {', '.join(known)} or a path"
        )
    rows = read_rows(path)
    form = detect_format(rows)
    problems, refused = to_problems(rows, form or QUESTION_ANSWER, id_prefix=path.stem)
    if form is None or not problems:
        raise _no_usable_row(str(path), refused)
    return Loaded(problems, refused, form.name)


def _rows_from_folder(name: str, split: str, data_dir: Path) -> list[Row | RefusedRow]:
    path = data_dir / ("gsm8k" if name == "gsm8k" else "") / f"{split if name == 'gsm8k' else name}.jsonl"
    if not path.is_file():
        raise DataError(
            f"--data-dir {data_dir} has no file {path.relative_to(data_dir)}: add it, or give another folder"
        )
    return read_rows(path)


def _no_usable_row(source: str, refused: Sequence[RefusedRow]) -> DataError:
    reasons = "; ".join(f"{row.where}: {row.reason}" for row in refused[:3]) or "it is empty"
    return DataError(f"{source} has no usable row ({reasons}); expected {EXPECTED_FORM}")


# The hub


def _rows_from_hub(name: str, split: str, *, offline: bool) -> list[Row | RefusedRow]:
    repository, configuration, part = HUB[name]
    part = part.format(split=split)
    remedy = f"give the files with --data-dir DIR (DIR/{'gsm8k/' + split if name == 'gsm8k' else name}.jsonl)"
    with _hub_offline(offline):
        import datasets

        try:
            hub_rows = datasets.load_dataset(repository, configuration, split=part)
        # Hub, network and cache errors vary in type by version; the remedy is the same for all of them.
        except Exception as error:
            cause = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{name} cannot be loaded from the Hugging Face hub ({cause}): {remedy}") from error
    rows: list[Row | RefusedRow] = []
    try:
        for number, values in enumerate(hub_rows, start=1):
            if columns := _from_hub_columns(name, values):
                rows.append(Row(f"{repository}[{part}] row {number}", columns))
    except KeyError as error:
        raise DataError(f"{repository} on the Hugging Face hub no longer has a column {error}: {remedy}") from error
    return rows


@contextlib.contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """With `offline`, have `datasets` read its cache only, instead of retrying the network for half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _from_hub_columns(name: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a hub row as question and answer, or None if the row is outside the published subset."""
    if name == "gsm8k":
        return {"question": values["question"], "answer": values["answer"]}
    if name == "multiarith":
        return {"question": " ".join(values["question"].split()), "answer": values["final_ans"]}
    if name == "svamp":
        body = values["Body"].strip()
        joint = " " if body.endswith((".", ",", "?", "!", ";", ":")) else ". "
        return {"question": body + joint + values["Question"].strip(), "answer": values["Answer"]}
    if name == "math500":
        return {
            "id": values["unique_id"], "question": values["problem"], "answer": values["solution"],
            "final": values["answer"],
        }  # fmt: skip
    # ASDiv: keep whole numbers with an optional unit, "9 (apples)": the 2,096 of 2,305 problems that PAL uses.
    number = re.fullmatch(r"(\d+)( \(.*\))?", values["answer"])
    question = " ".join(f"{values['body']} {values['question']}".split())
    return {"question": question, "answer": number[1]} if number else None


# The split


def _read_split(path: Path, problems: Sequence[Problem]) -> list[int]:
    """Return the positions of the dev problems that a split file names."""
    try:
        split = json.loads(path.read_bytes())
        parts = {"train": split["train"], "dev": split["dev"]}
        digests = dict(split.get("questions_sha256", {}))
    except OSError as error:
        raise DataError(f"data.split_file: {path} cannot be read ({error.strerror}); give another file") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"data.split_file: {path} must be a JSON object with the lists train and dev") from error
    if not _all_integers(parts.values()) or sorted(parts["train"] + parts["dev"]) != list(range(len(problems))):
        raise DataError(
            f"data.split_file: {path} does not name each of these {len(problems)} problems once, by 0-based position; "
            "use it with the training file it was made for, which must have no refused rows"
        )
    for name, positions in parts.items():
        if digests.get(name) not in (None, _sha256([problems[k].question for k in positions], end="\n")):
            raise DataError(f"data.split_file: {path} was made for other {name} questions; give another file")
    if not parts["train"]:
        raise DataError(f"data.split_file: {path} leaves no problem to train on; give another file")
    return parts["dev"]


def _all_integers(lists: Iterable[Any]) -> bool:
    return all(isinstance(part, list) and all(type(k) is int for k in part) for part in lists)


def _sha256(texts: Sequence[str], *, end: str = "") -> str:
    return hashlib.sha256("".join(text + end for text in texts).encode()).hexdigest()
