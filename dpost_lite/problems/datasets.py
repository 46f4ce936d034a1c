"""Where problems come from: four published sets, or a user's own file; and how they are split and kept apart.

    load ──▶ split_train_dev ──▶ train, dev          check_overlap(train, test) before anything is trained

The sets are the paper's: GSM8K to train on, MultiArith, ASDiv and SVAMP to evaluate out of domain ("Self-Training with
Direct Preference Optimization Improves Chain-of-Thought Reasoning", Table 2). Departures: a question that repeats
another of its set is left out (20 of MultiArith's 600, 1 of ASDiv's 2,096), and the 6,705/768 division of GSM8K follows
a rule that works for any file, unless the authors' own lists are given as a split file.
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
from dpost_lite.problems.files import (
    EXPECTED_FORM,
    QUESTION_ANSWER,
    Refused,
    Row,
    detect_format,
    normal_question,
    read_rows,
    to_problems,
)
from dpost_lite.problems.records import Problem

__all__ = ["NAMED", "Loaded", "Refused", "check_overlap", "load", "normal_question", "split_train_dev"]

NAMED = ("gsm8k", "multiarith", "asdiv", "svamp")

# name -> (repository, configuration, split) on the Hugging Face hub. The sets without a training part are published
# there in parts all the same; the paper evaluates on the whole.
HUB: dict[str, tuple[str, str | None, str]] = {
    "gsm8k": ("openai/gsm8k", "main", "{split}"),
    "multiarith": ("ChilleD/MultiArith", None, "train+test"),
    "asdiv": ("EleutherAI/asdiv", None, "validation"),
    "svamp": ("ChilleD/SVAMP", None, "train+test"),
}


@dataclass(frozen=True)
class Loaded:
    """The problems of one source in their order, the rows that were refused, and the format they were read as.

    `format` is the set's name, or for a file "question/answer", "prompt/completion", "alpaca", "messages" ….
    """

    problems: list[Problem]
    refused: list[Refused]
    format: str


def load(
    source: str, *, split: Literal["train", "test"] = "test", data_dir: Path | None = None, offline: bool = False
) -> Loaded:
    """Load the problems of a named set or of a `.jsonl`, `.json`, `.csv` or `.parquet` file.

    A named set comes from the files in `data_dir`, or else from the Hugging Face hub; with `offline`, from the hub's
    cache on this machine alone. `split` matters for named sets only: a file has one part.

    Raises:
        DataError: the source is missing, unreachable, for evaluation only, or has no usable row.
    """
    if source not in NAMED:
        return _load_file(Path(os.path.expanduser(source)))
    if split == "train" and source != "gsm8k":
        raise DataError(f"{source} is for evaluation only: train on gsm8k, synthetic or a file of your own")
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
    """Divide the problems of a training source into train and dev, each in the order of `problems`.

    By rule, dev is the `dev_size` problems whose questions have the smallest SHA-256: the same ones on every machine
    and in whatever order the rows stand. Or `split_file` says: JSON with the lists `train` and `dev` of 0-based
    positions, which together name every problem once, and optionally `questions_sha256` of either list (over its
    questions, each followed by a line feed). Give all problems of the source: a limit comes after the split.

    Raises:
        DataError: nothing would be left to train on, or the split file does not belong to these problems.
    """
    assert dev_size >= 0, dev_size
    if split_file is not None:
        dev = set(_read_split(split_file, problems))
    elif dev_size >= len(problems):
        raise DataError(
            f"data.dev_size={dev_size} leaves nothing of {len(problems)} problems to train on: give a smaller one"
        )
    else:
        dev = set(sorted(range(len(problems)), key=lambda k: _sha256([problems[k].question]))[:dev_size])
    return [p for k, p in enumerate(problems) if k not in dev], [p for k, p in enumerate(problems) if k in dev]


def check_overlap(train: list[Problem], test: list[Problem], *, train_name: str, test_name: str) -> None:
    """Refuse a test question that was trained on, compared by letters and digits alone.

    Raises:
        DataError: with the number of shared questions and one example.
    """
    trained = {normal_question(problem.question): problem.id for problem in train}
    shared = [(trained[key], p.id) for p in test if (key := normal_question(p.question)) in trained]
    if shared:
        train_id, test_id = shared[0]
        raise DataError(
            f"{len(shared)} of {len(test)} test questions of {test_name} are also in the training data {train_name} "
            f"(such as {test_id} = {train_id}): take them out of one of the two, or evaluate on other problems"
        )


# Files


def _load_file(path: Path) -> Loaded:
    if not os.path.exists(path):  # unlike Path.exists, it says no to a name too long for a file
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


def _rows_from_folder(name: str, split: str, data_dir: Path) -> list[Row | Refused]:
    path = data_dir / ("gsm8k" if name == "gsm8k" else "") / f"{split if name == 'gsm8k' else name}.jsonl"
    if not path.is_file():
        raise DataError(
            f"--data-dir {data_dir} has no file {path.relative_to(data_dir)}: put it there, or name another folder"
        )
    return read_rows(path)


def _no_usable_row(source: str, refused: Sequence[Refused]) -> DataError:
    reasons = "; ".join(f"{row.where}: {row.reason}" for row in refused[:3]) or "it is empty"
    return DataError(f"{source} has no usable row ({reasons}); expected are {EXPECTED_FORM}")


# The hub


def _rows_from_hub(name: str, split: str, *, offline: bool) -> list[Row | Refused]:
    repository, configuration, part = HUB[name]
    part = part.format(split=split)
    way_out = f"give the files with --data-dir DIR (DIR/{'gsm8k/' + split if name == 'gsm8k' else name}.jsonl)"
    with _hub_offline(offline):
        import datasets

        try:
            hub_rows = datasets.load_dataset(repository, configuration, split=part)
        # Whatever the hub, the network or the cache raises (their types vary by version), the way out is the same.
        except Exception as error:
            cause = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{name} cannot be had from the Hugging Face hub ({cause}): {way_out}") from error
    rows: list[Row | Refused] = []
    try:
        for number, values in enumerate(hub_rows, start=1):
            if columns := _from_hub_columns(name, values):
                rows.append(Row(f"{repository}[{part}] row {number}", columns))
    except KeyError as error:
        raise DataError(f"{repository} on the Hugging Face hub has no column {error} any more: {way_out}") from error
    return rows


@contextlib.contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Let `datasets` look into its cache only, at once, instead of retrying the network for half a minute."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _from_hub_columns(name: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a hub row as question and answer, or None if it is not of the published subset of its set."""
    if name == "gsm8k":
        return {"question": values["question"], "answer": values["answer"]}
    if name == "multiarith":
        return {"question": " ".join(values["question"].split()), "answer": values["final_ans"]}
    if name == "svamp":
        body = values["Body"].strip()
        joint = " " if body.endswith((".", ",", "?", "!", ";", ":")) else ". "
        return {"question": body + joint + values["Question"].strip(), "answer": values["Answer"]}
    # ASDiv: a whole number with an optional unit, "9 (apples)", as in PAL's 2,096 of the 2,305 problems.
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
        raise DataError(f"the split file {path} cannot be read ({error.strerror}): name another") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no split file: it must be a JSON object with the lists train and dev") from error
    if not _all_whole(parts.values()) or sorted(parts["train"] + parts["dev"]) != list(range(len(problems))):
        raise DataError(
            f"the split file {path} does not name each of these {len(problems)} problems once, by 0-based position: "
            "use it with the training file that it was made for, and without refused rows"
        )
    for name, positions in parts.items():
        if digests.get(name) not in (None, _sha256([problems[k].question for k in positions], end="\n")):
            raise DataError(f"the split file {path} was made for other {name} questions: name another")
    if not parts["train"]:
        raise DataError(f"the split file {path} leaves no problem to train on: name another")
    return parts["dev"]


def _all_whole(lists: Iterable[Any]) -> bool:
    return all(isinstance(part, list) and all(type(k) is int for k in part) for part in lists)


def _sha256(texts: Sequence[str], *, end: str = "") -> str:
    return hashlib.sha256("".join(text + end for text in texts).encode()).hexdigest()
