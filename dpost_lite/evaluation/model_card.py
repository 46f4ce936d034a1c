"""Write the model card of a GGUF file, in the form that the Hugging Face hub reads: what the run's files say, no more.

What is not known (a licence, scores without the calculator, the data of a model that was not trained here) is left out.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpost_lite import __version__
from dpost_lite.evaluation.targets import Target
from dpost_lite.local import t5
from dpost_lite.local.header import read_header
from dpost_lite.local.llama import file_type
from dpost_lite.methods import METHODS
from dpost_lite.models.demo import DEMO_MODEL
from dpost_lite.models.shapes import BASES
from dpost_lite.problems.datasets import HUB
from dpost_lite.problems.records import GradedAnswer, Score, file_name, read_jsonl
from dpost_lite.problems.scoring import score
from dpost_lite.recipe import Recipe
from dpost_lite.report import results, summary
from dpost_lite.runs.folder import Run, read_json, stages_done
from dpost_lite.runs.manifest import NAME as MANIFEST
from dpost_lite.system.machine import REPORTED_PACKAGES, version

MARK = "<!-- written by dpost-lite -->"
"""In every card, so that a README.md of somebody else is not overwritten."""

_DPO_ST = (
    "*Self-Training with Direct Preference Optimization Improves Chain-of-Thought Reasoning* "
    "(DPO-ST, Wang, Li and Lu 2024, [arXiv:2407.18248](https://arxiv.org/abs/2407.18248))"
)
_SCDPO = (
    "*Step-Controlled DPO: Leveraging Stepwise Error for Enhanced Mathematical Reasoning* "
    "(SCDPO, Lu et al. 2024, [arXiv:2407.00782](https://arxiv.org/abs/2407.00782))"
)
_LICENCES = {"Apache-2.0": "apache-2.0", "Llama 3 Community": "llama3", "Llama 3.1 Community": "llama3.1"}
FILES = {".json", ".jsonl", ".csv", ".parquet", ".txt", ".yaml", ".gz", ".zst"}  # names of such files are paths
_DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Release:
    """A GGUF file, written or to be written, and what it holds: a policy of a target, on the base in `model_dir`."""

    file: Path
    target: Target
    policy: str
    policy_dir: Path | None
    """None is the base."""
    model_dir: Path

    @property
    def recipe(self) -> Recipe:
        return self.target.recipe

    @property
    def run(self) -> Run | None:
        return self.target.run

    @property
    def runs_elsewhere(self) -> bool:
        """Whether the file runs in llama.cpp's server and Ollama too, which read no question with an encoder."""
        return read_header(self.file).get("general.architecture") != t5.ARCHITECTURE

    @property
    def base(self) -> str:
        """The base as the hub knows it, or the name of its folder (not its path, which is nobody's business)."""
        name = self.recipe.model.name
        return _DEMO_BASE if name == DEMO_MODEL else Path(name).resolve().name if Path(name).exists() else name


def model_card(release: Release, *, modelfile: str = "Modelfile") -> str:
    """Return the card as Markdown with YAML metadata. `modelfile` is the name of the file for Ollama."""
    sections = [_metadata(release), MARK, *_introduction(release), *_use(release, modelfile)]
    if release.run is not None:
        sections += [*_results(release, release.run), *_method(release.recipe), *_data(release, release.run)]
    return "\n\n".join([*sections, *_manifest(release)]) + "\n"


def costs(release: Release) -> list[str]:
    """Return what the model loses where there is no calculator, as in Ollama, with the scores that are known."""
    if release.recipe.solutions == "code":
        return ["Ollama runs no code: the model writes Python, and makes up what it would print."]
    if not release.recipe.calculator.enabled:
        return []
    lines = ["Ollama has no calculator: the model writes `<<48/2=` and computes by itself. `dpost-lite solve` has one."]
    run = release.run
    known = [score for score in results.scores(run.path) if score.name == release.policy] if run else []
    without = _without_calculator(release, run) if run else None
    if known and without:
        lines.append(
            f"On the run's {known[0].num_problems:,} test problems: {known[0].strict:.1%} right with the calculator, "
            f"{without.strict:.1%} without."
        )
    return lines


def _metadata(release: Release) -> str:
    tags = ["gguf", "math-word-problems", "dpost-lite"]
    datasets = []
    if release.run is not None:
        tags.append(release.recipe.method)
        used = (release.recipe.data.train, release.recipe.data.test, *release.recipe.data.also_test)
        datasets = [HUB[name][0] for name in dict.fromkeys(used) if name in HUB]
    values = {
        "license": _licence(release),
        "base_model": release.base if "/" in release.base else None,
        "pipeline_tag": "text-generation",
        "tags": tags,
        "datasets": datasets,
    }
    return f"---\n{yaml.safe_dump({k: v for k, v in values.items() if v}, sort_keys=False)}---"


def _licence(release: Release) -> str | None:
    """Return the base's licence as the hub names it: from the README.md in its folder, else of a base we know."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        text = (release.model_dir / "README.md").read_text(encoding="utf-8")
        if text.startswith("---"):
            found = yaml.safe_load(text.split("---")[1])
            if isinstance(found, Mapping) and isinstance(found.get("license"), str):
                return found["license"]
    if release.base == _DEMO_BASE:
        return "apache-2.0"
    known = BASES.get(release.base)
    return _LICENCES.get(known.licence) if known else None


def _introduction(release: Release) -> Iterator[str]:
    run, recipe = release.run, release.recipe
    yield f"# {run.path.resolve().name if run else release.file.stem}"
    trained = f" with the LoRA adapter {release.policy}" if release.policy_dir else ""
    if run and release.policy_dir:
        trained = f", self-trained on maths word problems ({release.policy} of a run of `{recipe.method}`)"
    yield (
        f"`{release.file.name}` holds {release.base}{trained}, in {file_type(release.file)} "
        f"({release.file.stat().st_size / 2**20:,.0f} MiB). It was written by dpost-lite {__version__}."
    )


def _use(release: Release, modelfile: str) -> Iterator[str]:
    allow = "--allow-code " if release.recipe.solutions == "code" else ""
    yield "## Use"
    yield f'```\ndpost-lite solve {allow}{release.file.name} "What is 12 times 4?"\n```'
    if not release.runs_elsewhere:
        yield f"{t5.ONLY_HERE}."
        return
    create = f"ollama create {file_name(release.file.stem)} -f {modelfile}"
    yield " ".join([f"In Ollama: `{create}`.", *costs(release)])


def _results(release: Release, run: Run) -> Iterator[str]:
    scores = [*results.scores(run.path)]
    if not scores:
        return
    if (without := _without_calculator(release, run)) is not None:
        scores.append(without)
    yield "## Results"
    scored = "LoRA on the 4-bit base" if release.recipe.model.precision == "4bit" else "weights"
    yield (
        f"Greedy answers to the test problems, of the {scored} before the file was written. *strict* reads the answer "
        "where it has to stand, *flexible* the last number; intervals are 95 % Wilson."
    )
    yield _table(scores, release.policy)
    if release.policy not in {score.name for score in scores}:
        yield f"The exported policy, {release.policy}, was not scored; these are others of its run."
    gained = results.gain(run.path, release.policy) if release.policy != "base" else None
    method = METHODS[release.recipe.method]
    if gained:
        yield summary.verdict(*gained, method)
    for name, further in results.also_scores(run.path).items():
        yield f"On {name}:"
        yield _table(further, release.policy)


def _table(scores: Sequence[Score], exported: str) -> str:
    """Return a table of scores; the name of the exported policy is in bold."""
    tool = "code" if any(score.code for score in scores) else "calculator"
    rows = [("", tool, "strict", "95 % interval", "flexible", "unfinished", "problems")]
    rows += [
        (
            f"**{score.name}**" if score.name == exported else score.name,
            "on" if score.calculator or score.code else "off",
            f"{score.strict:.1%}",
            summary.interval(score),
            f"{score.flexible:.1%}",
            f"{score.num_unfinished:,}",
            f"{score.num_problems:,}",
        )
        for score in scores
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _method(recipe: Recipe) -> Iterator[str]:
    """What was done, and the papers: step-controlled pairs are SCDPO's, as are solutions with code."""
    method = METHODS[recipe.method]
    rounds = f", at most {recipe.rounds} round{'s'[: recipe.rounds > 1]}" if method.has_rounds else ""
    training = {"4bit": "LoRA on a 4-bit base", "16bit": "LoRA on a 16-bit base", "full": "all weights trained"}
    is_stepwise = method.has_dpo and method.samples_rests(recipe.pairs.stepwise)
    papers = [_DPO_ST] if method.has_rounds else []
    papers += [_SCDPO] if is_stepwise or recipe.solutions == "code" or not method.has_rounds else []
    yield "## Method"
    yield f"`{method.name}`: {method.summary}{rounds}; {training[recipe.model.precision]}."
    yield "\n".join(f"- {paper}" for paper in papers)
    if method.has_rounds and method.has_dpo and recipe.dpo.gate and recipe.dpo.keep == "better":
        yield (
            "Not in the paper: after each DPO, the round goes on with the DPO policy only if it clearly draws more "
            "distinct right solutions than the policy before it."
        )


def _data(release: Release, run: Run) -> Iterator[str]:
    done = dict(stages_done(run.path)).get("data")
    if done is None:
        return
    data, counts = release.recipe.data, done["metrics"]
    parts = [f"{counts[part]:,} {words}" for part, words in _PARTS.items() if counts.get(part)]
    source = f"`{_without_folder(data.train)}`" + (f", tested on `{_without_folder(data.test)}`" if data.test else "")
    yield "## Data"
    yield f"{source}: {', '.join(parts)}. Test problems that also occur in the training data are an error before a run."


def _manifest(release: Release) -> Iterator[str]:
    """The file's hash, and what it was made with."""
    with release.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    yield "## Manifest"
    yield f"SHA-256 of `{release.file.name}`: `{digest}`"
    run = release.run
    if run is None:
        yield _versions({name: version(name) for name in REPORTED_PACKAGES})
        return
    found = read_json(run.path / MANIFEST) if (run.path / MANIFEST).is_file() else {}
    machine = found.get("machine", {})
    yield _versions({name: machine.get(name, version(name)) for name in REPORTED_PACKAGES})
    made = {
        "seed": release.recipe.seed,
        "policy": release.policy,
        "processor": machine.get("cpu"),
        "GPU": machine.get("gpu"),
        "commit": found.get("commit"),
    }
    yield "\n".join(f"- {name}: {value}" for name, value in made.items() if value is not None)
    recipe = yaml.safe_dump(_without_folders(release.recipe.model_dump(mode="json")), sort_keys=False)
    yield f"<details><summary>All settings of the run</summary>\n\n```yaml\n{recipe}```\n\n</details>"


_PARTS = {
    "train": "training problems",
    "labelled": "worked solutions for the warm-up",
    "dev": "dev problems to choose the best round",
    "test": "test problems",
}


def _versions(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items() if number)


def _without_folder(text: str) -> str:
    """Return the name of a file or folder; a card is published, and where things lie is nobody's business."""
    is_path = (
        Path(text).is_absolute() or text.startswith(("~", ".")) or Path(text).exists() or Path(text).suffix in FILES
    )
    return Path(text).name if is_path else text


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return _without_folder(value) if isinstance(value, str) and ("/" in value or "\\" in value) else value


def _without_calculator(release: Release, run: Run) -> Score | None:
    """Return the score without the calculator that `eval RUN` has saved in the current folder, if it is there.

    Only answers to all of the run's own test problems count, the newest ones, if the policy was not trained since.
    """
    problems = results.problems(run.path)
    ids = {problem.id for problem in problems}
    name, trained = file_name(release.policy), release.policy_dir / "done.json" if release.policy_dir else None
    since = trained.stat().st_mtime if trained is not None and trained.is_file() else 0.0
    files = Path("evals", file_name(str(run.path))).glob(f"*/{name}-off/answers.jsonl")
    dated = sorted(((file.stat().st_mtime, file) for file in files), reverse=True)
    for file in (file for time, file in dated if time >= since):
        with contextlib.suppress(*results.DAMAGED):
            answers = list(read_jsonl(file, GradedAnswer))
            if ids and {answer.problem_id for answer in answers} == ids:
                return score(release.policy, answers, problems, has_calculator=False)
    return None
