"""Recipes: the paper's constants, what overrides what, and errors that name the key and the way out."""

import os
from pathlib import Path

import pytest
import yaml

from dpost_lite.errors import RecipeError
from dpost_lite.models.dpo import check_loss
from dpost_lite.problems.corpus import PAPERS_DEV_SIZE
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe, recipes_dir, validate

PRESETS = sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(source=None, *overrides: str) -> str:
    """The one line that a user would see."""
    with pytest.raises(RecipeError) as error:
        load_recipe(source, list(overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


# Presets and defaults


def test_the_default_preset_is_there():
    assert "rehearsal" in PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_holds_only_what_differs(name):
    recipe = load_recipe(name)
    check_loss(recipe.dpo.loss)
    given = yaml.safe_load((recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8"))
    defaults, values = Recipe().model_dump(), recipe.model_dump()
    for key, value in given.items():
        pairs = [(values[key], defaults[key])] if not isinstance(value, dict) else []
        pairs += [(values[key][k], defaults[key][k]) for k in value] if isinstance(value, dict) else []
        assert all(mine != default for mine, default in pairs), key


def test_a_preset_is_the_same_by_name_and_by_path():
    assert load_recipe("rehearsal") == load_recipe(recipes_dir() / "rehearsal.yaml")


def test_defaults_are_the_papers():
    """DPO-ST: section 4.1, Table 5 (Llama columns), and make_dpo_data.py, make_rft_data.py of the released code."""
    recipe = load_recipe()
    assert (recipe.method, recipe.rounds, recipe.seed, recipe.patience) == ("dpo-st", 3, 42, None)
    assert (recipe.data.train, PAPERS_DEV_SIZE) == ("gsm8k", 768)
    sampling = recipe.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.7, 1.0, 300)
    assert (sampling.samples_for_pairs, sampling.samples_for_labels) == (5, 3)
    assert (recipe.pairs.jaccard_threshold, recipe.pairs.max_per_problem) == (0.7, 3)
    assert recipe.pairs.gold_first
    assert recipe.pairs.pool_rounds
    assert (recipe.labels.jaccard_threshold, recipe.labels.cap_percentile) == (0.7, 90)
    assert recipe.labels.max_per_problem == 100
    assert recipe.labels.pool_rounds
    assert (recipe.dpo.beta, recipe.dpo.loss, recipe.dpo.max_steps) == (0.1, "sigmoid", 100)
    assert recipe.sft.epochs == 2
    for part in (recipe.sft, recipe.dpo):
        assert (part.batch_size, part.max_length) == (128, 640)
        assert (part.warmup_ratio, part.min_lr_ratio) == (0.1, 0.1)
        assert (part.weight_decay, part.max_grad_norm) == (0.01, 1.0)


def test_departures_from_the_paper_are_the_known_ones():
    """Adapters need larger steps than full fine-tuning; an unfinished rationale is no rejected answer."""
    recipe = load_recipe()
    assert recipe.sft.learning_rate > 2e-5
    assert recipe.dpo.learning_rate > 3e-7
    assert not recipe.pairs.unfinished_rejected
    assert recipe.dpo.nll_weight == 0


# Precedence


def test_command_line_over_file_over_defaults(tmp_path):
    path = write(tmp_path, "sft:\n  epochs: 5\n  batch_size: 16\nrounds: 1\n")
    recipe = load_recipe(path, ["sft.epochs=7"])
    assert recipe.sft.epochs == 7
    assert recipe.sft.batch_size == 16
    assert recipe.rounds == 1
    assert recipe.sft.weight_decay == Recipe().sft.weight_decay


def test_the_last_of_two_overrides_counts():
    assert load_recipe(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("sft.learning_rate=1e-4", "sft", "learning_rate", 1e-4),  # YAML 1.1 takes this for text
        ("sft.learning_rate=0.0001", "sft", "learning_rate", 1e-4),
        ("pairs.gold_first=false", "pairs", "gold_first", False),
        ("data.limit=64", "data", "limit", 64),
        ("data.limit=", "data", "limit", None),
        ("data.limit=null", "data", "limit", None),
        ("data.train=my=problems.jsonl", "data", "train", "my=problems.jsonl"),
        (" data.data_dir = some/where", "data", "data_dir", Path("some/where")),
        ("model.precision=full", "model", "precision", "full"),
        ("dpo.loss=hinge", "dpo", "loss", "hinge"),
    ],
)
def test_overrides(override, section, key, expected):
    assert getattr(getattr(load_recipe(None, [override]), section), key) == expected


def test_scientific_notation_in_a_file_is_a_number(tmp_path):
    assert load_recipe(write(tmp_path, "dpo: {learning_rate: 5e-6}")).dpo.learning_rate == 5e-6


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load_recipe(write(tmp_path, "# nothing yet\n")) == Recipe()


def test_a_recipe_survives_json():
    recipe = load_recipe("rehearsal", ["data.data_dir=some/where", "data.split_file=split.json"])
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe().rounds = 5


# Errors


@pytest.mark.parametrize(
    ("override", "named", "suggested"),
    [
        ("sft.learning_rat=1", "sft.learning_rat", "'learning_rate'"),
        ("sampling.temprature=1", "sampling.temprature", "'temperature'"),
        ("round=1", "'round'", "'rounds'"),
        ("spt.epochs=1", "'spt'", "'sft'"),
        ("dpo.sft.epochs=1", "dpo.sft", ""),
    ],
)
def test_unknown_key(override, named, suggested):
    message = error_of(None, override)
    assert "unknown key" in message
    assert named in message
    assert suggested in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method=dpo_st", ["method", "'dpo_st'", "did you mean 'dpo-st'"]),
        ("model.precision=4bits", ["model.precision", "did you mean '4bit'"]),
        ("export.quant=q4km", ["export.quant", "did you mean 'q4_k_m'"]),
        ("model.prompt=chatt", ["model.prompt", "did you mean 'chat'"]),
        ("rounds=0", ["rounds", "greater than or equal to 1", "given: 0"]),
        ("rounds=two", ["rounds", "integer", "'two'"]),
        ("rounds=1.5", ["rounds", "integer", "1.5"]),
        ("sft.learning_rate=-1", ["sft.learning_rate", "greater than 0"]),
        ("sft.learning_rate=inf", ["sft.learning_rate", "finite"]),
        ("sampling.top_p=1.2", ["sampling.top_p", "less than or equal to 1"]),
        ("sampling.temperature=0", ["sampling.temperature", "greater than 0"]),
        ("pairs.gold_first=perhaps", ["pairs.gold_first", "boolean", "'perhaps'"]),
        ("labels.cap_percentile=101", ["labels.cap_percentile", "101"]),
        ("synthetic.max_steps=9", ["synthetic.max_steps", "9"]),
        ("synthetic.min_steps=", ["synthetic.min_steps", "integer"]),
        ("sft=fast", ["sft", "'fast'"]),
        ("data.train=[a, b]", ["data.train", "string"]),
        ("data.train=2024-13-45", []),  # YAML sees a date, which is none
    ],
)
def test_bad_value(override, parts):
    if not parts:
        assert load_recipe(None, [override]).data.train == "2024-13-45"
        return
    message = error_of(None, override)
    for part in parts:
        assert part in message


def test_steps_in_the_wrong_order():
    assert "synthetic.min_steps is larger" in error_of(None, "synthetic.min_steps=3", "synthetic.max_steps=2")


@pytest.mark.parametrize("override", ["sft.epochs", "=3", "", "  =3"])
def test_not_an_override(override):
    assert "is not of the form key=value" in error_of(None, override)


def test_a_value_has_no_keys(tmp_path):
    message = error_of(write(tmp_path, "rounds: 3\n"), "rounds.most=4")
    assert "rounds.most" in message
    assert "'rounds' is a value" in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("- rounds\n- 3\n", "keys and values, not a list"),
        ("fast", "keys and values, not a str"),
        ("rounds: [1, 2\n", "cannot be read as YAML"),
        ("a: b: c\n", "cannot be read as YAML"),
        ("day: 2024-13-45\n", "cannot be read as YAML"),
        ("1: 2\n", "1"),
        ("sft:\n", "sft"),
        ("sft:\n  epoch: 3\n", "did you mean 'epochs'"),
    ],
)
def test_broken_files_are_named(tmp_path, content, complaint):
    message = error_of(write(tmp_path, content))
    assert "mine.yaml" in message
    assert complaint in message


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00rounds")
    assert "mine.yaml cannot be read" in error_of(path)


def test_missing_recipes():
    message = error_of("rehersal")
    assert "--recipe" in message
    assert "did you mean 'rehearsal'" in message
    assert "--recipe: there is no file none.yaml" in error_of("none.yaml")


def test_validate_names_where():
    with pytest.raises(RecipeError, match=r"^over there: unknown key 'x'"):
        validate({"x": 1}, where="over there")


def test_unknown_losses_are_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"dpo\.loss.*'sigmoyd'.*did you mean 'sigmoid'"):
        check_loss("sigmoyd")


@pytest.mark.parametrize("given", ["wandb, mlflow", "[wandb, mlflow]"])
def test_trackers_are_one_several_or_none(given):
    assert load_recipe(None, [f"report_to={given}"]).report_to == ("wandb", "mlflow")
    assert load_recipe(None, ["report_to=trackio"]).report_to == ("trackio",)
    assert load_recipe(None).report_to == ()


@pytest.mark.parametrize("given", ["svamp,my/own.jsonl", "[svamp, my/own.jsonl]", '" svamp , my/own.jsonl"'])
def test_further_test_sets_are_a_list_or_separated_by_commas(given):
    recipe = load_recipe(None, [f"data.also_test={given}"])
    assert recipe.data.also_test == ("svamp", "my/own.jsonl")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert load_recipe(None).data.also_test == load_recipe(None, ["data.also_test=[]"]).data.also_test == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data.also_test=svamp,asdiv,svamp", "svamp is already named by this list; leave it out here"),
        ("data.also_test=a.jsonl,./a.jsonl", "./a.jsonl is already named by this list"),
        ("data.also_test=svamp data.test=svamp", "svamp is already named by data.test"),
        ("data.also_test=gsm8k", "gsm8k is already named by data.train"),
        ("data.also_test=svamp,", "should have at least 1 character"),
    ],
)
def test_a_set_is_tested_on_once(given, said):
    with pytest.raises(RecipeError, match=r"data\.also_test.*: ") as caught:
        load_recipe(None, given.split())
    assert said in str(caught.value)
    assert load_recipe(None, ["data.also_test=gsm8k", "data.test=svamp"]).data.also_test == ("gsm8k",)


def test_a_tracker_that_is_unknown_or_not_installed_is_named(monkeypatch):
    from dpost_lite.models import tracking

    with pytest.raises(RecipeError, match=r"report_to\.0: .*\(given: 'wandbb'\)"):
        load_recipe(None, ["report_to=wandbb"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(tracking, "find_spec", lambda module: module == "tensorboardX" or None)
    tracking.check_trackers(["tensorboard"])
    with pytest.raises(RecipeError, match="report_to: wandb is not installed; run pip install wandb, or leave it out"):
        tracking.check_trackers(["tensorboard", "wandb"])


def test_a_tracked_training_is_named_after_its_run_and_asks_nobody_offline(tmp_path, monkeypatch):
    from dpost_lite.models import tracking
    from dpost_lite.models.tracking import track

    for name in ("TENSORBOARD_LOGGING_DIR", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "mine" / "round-1" / "dpo.partial"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    assert track((), out) == {"report_to": "none"}
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    monkeypatch.setenv("WANDB_MODE", "online")
    arguments = track(("wandb",), out)
    assert (arguments["report_to"], arguments["run_name"]) == (["wandb"], "mine/round-1/dpo")
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_MODE"]) == ("mine", "offline")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "mine" / "logs" / "tensorboard" / "round-1" / "dpo")
    with pytest.raises(RecipeError, match="report_to: mlflow does not work with --offline; tensorboard and wandb do"):
        tracking.check_trackers(["mlflow"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dpo.calculated_in_loss=false", "calculator.enabled=false"], "needs calculator.enabled=true"),
        (["sft.calculated_in_loss=false", "calculator.enabled=false"], "sft.calculated_in_loss=false needs calculator"),
        (["labels.from_rests=true"], "labels.from_rests=true needs pairs.stepwise above 0"),
        (["rests.temperature=1.5"], "rests.temperature is larger than rests.max_temperature"),
        (["rests.temperature=0"], "rests.temperature"),
        (["sampling.top_k=0"], "sampling.top_k"),
        (["dpo.max_logp_drop=0"], "dpo.max_logp_drop"),
        (["data.train=synthetic", "synthetic.max_steps=1", "method=scdpo"], "method=scdpo needs problems of two steps"),
        (
            ["data.train=synthetic", "synthetic.max_steps=1", "pairs.stepwise=0.5"],
            r"stepwise=0\.5 needs problems",
        ),
    ],
)
def test_settings_that_do_nothing_together_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, settings)
