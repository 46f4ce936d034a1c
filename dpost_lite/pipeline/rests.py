"""The task that samples rests of right rationales again, for step-controlled pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpost_lite.models.credit import token_logprobs
from dpost_lite.models.loading import load_prompter
from dpost_lite.models.training import Progress
from dpost_lite.pipeline.tasks import SamplingTask
from dpost_lite.problems.code_format import is_clean
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import Problem, Rationale, Rest, append_jsonl, read_jsonl, resume_jsonl, write_jsonl
from dpost_lite.problems.steps import choose_cuts, is_repetitive, is_usable, least_certain, step_ends
from dpost_lite.runs.folder import UNFINISHED, read_json, write_json
from dpost_lite.sampling.rests import Cut, sample_rests
from dpost_lite.sampling.sampler import seed_of


@dataclass(frozen=True, slots=True)
class SampleRests(SamplingTask):
    """Cut the first right rationale of each problem in `samples_dir` and sample its rest again until it is wrong."""

    samples_dir: Path
    purpose: str

    def run(self, out: Path, progress: Progress) -> dict[str, Any]:
        prompter = load_prompter(self.model_dir, self.recipe.model)
        file = out / "rests.jsonl"
        unfinished = out / UNFINISHED / file.name
        model = None
        if self.recipe.rests.cut == "least-certain":
            model = self._model()
            cuts = self._least_certain_cuts(prompter, model, unfinished.with_name("cuts.json"), progress)
        else:
            cuts = self.cuts(prompter)
        done = resume_jsonl(unfinished, Rest)
        num_right, settled = sum(rest.correct for rest in done), {rest.cut for rest in done if is_usable(rest)}
        sampling = self.recipe.sampling.model_copy(update={"memory_gib": self.memory_gib})
        recipe = self.recipe.model_copy(update={"sampling": sampling})
        with unfinished.open("a", encoding="utf-8", newline="\n") as appended:
            if cuts and model is None:
                model = self._model()
            for rest in sample_rests(model, prompter, cuts, recipe, purpose=self.purpose, done=list(done)):
                append_jsonl(appended, rest)
                done.append(rest)
                num_right += rest.correct
                if is_usable(rest) or rest.attempt == recipe.rests.max_tries - 1:
                    settled.add(rest.cut)
                progress(len(settled), len(cuts), "cuts", right=num_right / len(done))
        order = {cut.key: i for i, cut in enumerate(cuts)}
        done.sort(key=lambda rest: (order[rest.cut], rest.attempt))
        write_jsonl(file, done)
        return {
            "cuts": len(cuts),
            "rests": len(done),
            "right": sum(rest.correct for rest in done),
            "unfinished": sum(rest.end == "limit" for rest in done),
            "repetitive": sum(is_repetitive(rest.token_ids) for rest in done),
            "usable": sum(map(is_usable, done)),
            "tokens": sum(len(rest.token_ids) for rest in done),
        }

    def cuts(self, prompter: Prompter) -> list[Cut]:
        """Return where the first right rationale of each problem is cut, in the order of the problems drawn."""
        rule = self.recipe.rests.cut
        return [
            Cut(problem, rationale, num_kept)
            for problem, rationale, ends in self._ends(prompter)
            for num_kept in choose_cuts(ends, rule, seed_of(self.recipe.seed, self.purpose, problem.id))
        ]

    def _least_certain_cuts(self, prompter: Prompter, model: Any, file: Path, progress: Progress) -> list[Cut]:
        """Return the cuts before the least certain step.

        They are kept in `file`, since other rounding, on another machine that resumes the stage, could give others.
        """
        drawn = [(problem, rationale, ends) for problem, rationale, ends in self._ends(prompter) if ends]
        if not file.exists():
            answers = [(prompter.prompt_ids(problem.question), rationale.token_ids) for problem, rationale, _ in drawn]
            found = token_logprobs(
                model, answers, max_rows=1, progress=lambda done: progress(done, len(answers), "rationales read")
            )
            own = [
                [None if is_forced else p for p, is_forced in zip(row, rationale.forced, strict=True)]
                for row, (_, rationale, _) in zip(found, drawn, strict=True)
            ]
            write_json(file, [least_certain(ends, row) for (_, _, ends), row in zip(drawn, own, strict=True)])
        return [
            Cut(problem, rationale, num_kept)
            for (problem, rationale, _), num_kept in zip(drawn, read_json(file), strict=True)
        ]

    def _ends(self, prompter: Prompter) -> list[tuple[Problem, Rationale, list[int]]]:
        """Return the first right rationale of each problem, and where its steps end."""
        problems = {problem.id: problem for problem in read_jsonl(self.data_dir / "train.jsonl", Problem)}
        first: dict[str, Rationale] = {}
        for rationale in read_jsonl(self.samples_dir / "rationales.jsonl", Rationale):
            if rationale.correct and rationale.end == "stop" and is_clean(rationale.text):
                first.setdefault(rationale.problem_id, rationale)
        text_of = prompter.token_text()
        return [(problems[i], r, step_ends(r.token_ids, text_of)) for i, r in first.items()]
