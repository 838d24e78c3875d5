"""Configuration as plain values: there and back for every family, and errors that name the key and the nearest one."""

import json
from dataclasses import fields

import pytest
from engine_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from convolt.augment import AUGMENTS, AlternatingFlip, Crop, Cutout, Flip, Mixup
from convolt.config import assign, build, canonical, parse_assignment, parse_value, plain_name, read_toml, to_plain
from convolt.early_stopping import EarlyStopping
from convolt.errors import ConfigError
from convolt.layers import LAYERS
from convolt.losses import LOSSES, MSE, CrossEntropy, Distillation
from convolt.optimizers import EMA, OPTIMIZERS, SGD, Adam, AdamW, RMSprop
from convolt.recipe import FAMILIES, NonFinite, Recipe, model_from_plain, plain, recipe_from_plain
from convolt.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    CosineCyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Piecewise,
    Plateau,
    Step,
    Triangular,
    WarmRestarts,
    Warmup,
)

# --- there and back --------------------------------------------------------------------------------------------------

part, rate = st.floats(0, 1), st.floats(0, 10)
positive, count, flag = st.floats(0.01, 10), st.integers(1, 50), st.booleans()
lengths = st.builds("{}{}".format, st.integers(1, 100), st.sampled_from(["ep", "ba"])) | st.sampled_from(
    ["0.5dur", ".3dur"]
)
betas = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))
decayed = {"lr": rate, "weight_decay": rate, "decay_norm_and_bias": flag}

losses = st.builds(CrossEntropy, part) | st.builds(MSE) | st.builds(Distillation, positive, part, st.text(max_size=5))
optimizers = (
    st.builds(SGD, momentum=positive, nesterov=flag, decoupled_weight_decay=flag, **decayed)
    | st.builds(Adam, betas=betas, eps=rate, **decayed)
    | st.builds(AdamW, betas=betas, **decayed)
    | st.builds(RMSprop, alpha=part, momentum=part, centered=flag, **decayed)
)
plain_schedules = (
    st.builds(Constant)
    | st.builds(Step, lengths, part)
    | st.builds(MultiStep, st.just(("1ep", "20ep", "0.9dur")), part)
    | st.builds(Piecewise, st.just((("0ba", 0.1), ("5ep", 1.0))), flag)
    | st.builds(Exponential, positive, lengths)
    | st.builds(Cosine, rate)
    | st.builds(CosineCyclic)
    | st.builds(WarmRestarts, lengths)
    | st.builds(Linear, part, part, lengths)
    | st.builds(OneCycle, st.none() | positive, anneal=st.sampled_from(["cos", "linear"]))
    | st.builds(Triangular, st.none() | positive, mode=st.sampled_from(["triangular", "triangular2", "exp_range"]))
    | st.builds(Plateau, part, count)
)
schedules = plain_schedules | st.builds(Warmup, lengths, part, plain_schedules)
augments = (
    st.builds(Flip, part)
    | st.builds(AlternatingFlip)
    | st.builds(Crop, count, st.sampled_from(["reflect", "zeros"]))
    | st.builds(Cutout, count)
    | st.builds(Mixup, positive)
)
recipes = st.builds(
    Recipe,
    epochs=count,
    batch_size=count,
    micro_batch_size=st.none() | count,
    loss=losses,
    optimizer=optimizers,
    schedule=schedules,
    schedules=st.dictionaries(st.just("weight_decay"), schedules),
    precision=st.sampled_from(["fp64", "fp32", "bf16"]),
    seed=st.integers(0, 2**40),
    augment=st.lists(augments, max_size=3).map(tuple),
    clip_norm=st.none() | positive,
    ema=st.none() | st.builds(EMA, part, lengths),
    early_stopping=st.none() | st.builds(EarlyStopping, count, part, st.sampled_from(["valid_loss", "valid_accuracy"])),
    dropout_from=lengths,
    non_finite=st.builds(NonFinite, st.sampled_from(["raise", "skip", "rollback"]), count),
)


@settings(max_examples=150)
@given(recipe=recipes)
def test_a_recipe_goes_through_json_and_back(recipe):
    assert recipe_from_plain(json.loads(json.dumps(plain(recipe)))) == recipe


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_goes_through_json_and_back(case):
    model = case.model
    assert model_from_plain(json.loads(json.dumps(plain(model)))) == model


# The values of arguments that have no default.
NEEDED = {
    "conv2d": {"in_channels": 3, "out_channels": 4, "kernel_size": 3},
    "batchnorm2d": {"num_features": 3},
    "maxpool2d": {"kernel_size": 2},
    "avgpool2d": {"kernel_size": 2},
    "dense": {"in_features": 3, "out_features": 2},
    "residual": {"body": ["relu"]},
    "sequential": {"layers": ["relu", {"type": "dropout", "p": 0.1}]},
    "normalize": {"mean": [0.5], "std": [0.2]},
}


@pytest.mark.parametrize(
    ("interface", "member"),
    [(interface, member) for interface, members in FAMILIES.items() for member in members],
    ids=lambda value: value.__name__,
)
def test_every_member_is_known_by_its_name(interface, member):
    """In any spelling, with all its fields in the plain form."""
    name = plain_name(member)
    made = build(member, NEEDED.get(name, {}), "here", FAMILIES)
    assert to_plain(made) == {
        "type": name,
        **{field.name: to_plain(getattr(made, field.name)) for field in fields(made)},
    }
    assert build(member, to_plain(made), "here", FAMILIES) == made


def test_families_are_whole():
    for family in (LAYERS, OPTIMIZERS, SCHEDULES, LOSSES, AUGMENTS):
        assert any(tuple(members) == tuple(family) for members in FAMILIES.values())


def test_a_name_stands_for_the_defaults():
    recipe = recipe_from_plain({"optimizer": "adamw", "schedule": "One-Cycle", "augment": ["flip", {"type": "crop"}]})
    assert recipe == Recipe(optimizer=AdamW(), schedule=OneCycle(), augment=(Flip(), Crop()))
    assert recipe_from_plain({"augment": "flip", "ema": {}}) == Recipe(augment=(Flip(),), ema=EMA())
    assert canonical("One_Cycle") == canonical("one-cycle") == "onecycle"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, r"recipe: recipe has no key 'epoch'; did you mean 'epochs'\?"),
        ({"optimizer": "adm"}, r"recipe\.optimizer: unknown type 'adm'; did you mean 'adam'\?"),
        ({"optimizer": {"type": "sgd", "beta": 1}}, r"recipe\.optimizer: sgd has no key 'beta'; valid: dampening"),
        (
            {"optimizer": {"type": "adam", "lr": "fast"}},
            r"recipe\.optimizer\.lr: expected `float`, got `str`; got 'fast'",
        ),
        ({"optimizer": {"lr": 1}}, r"recipe\.optimizer: must have a type; valid: adam, adamw"),
        ({"optimizer": 3}, r"recipe\.optimizer: must be a name or a mapping with a type; got 3"),
        ({"optimizer": {"type": "adam", "lr": -1}}, r"Adam: lr must be >= 0; got -1"),
        ({"epochs": "ten"}, r"recipe\.epochs: expected `int`, got `str`; got 'ten'"),
        ({"epochs": 1.5}, r"recipe\.epochs: "),
        ({"augment": ["flip", "flop"]}, r"recipe\.augment\[1\]: unknown type 'flop'; did you mean 'flip'\?"),
        ({"schedules": "cosine"}, r"recipe\.schedules: must be a mapping of names; got 'cosine'"),
        (
            {"schedules": {"momentum": "cosin"}},
            r"recipe\.schedules\.momentum: unknown type 'cosin'; did you mean 'cosine'",
        ),
        (
            {"schedules": {"momentum": "cosine"}},
            r"Recipe: schedules: no hyperparameter 'momentum' to schedule; valid: ",
        ),
        (
            {"schedule": {"type": "step", "step_size": 30}},
            r"Step: step_size must be a length with a unit, .* got 30",
        ),
        (
            {"schedule": {"type": "step", "step_size": "30"}},
            r"Step: step_size must be a length with a unit, such as '10ep'",
        ),
        ({"schedule": {"type": "warmup", "then": "x"}}, r"recipe\.schedule\.then: unknown type 'x'"),
        ({"precision": "fp31"}, r"precision: unknown name 'fp31'; did you mean 'fp32'\?"),
        ({"batch_size": 0}, r"Recipe: batch_size must be an integer >= 1; got 0"),
        ({"optimizer": "convolt.optimizers.Adam"}, r"recipe\.optimizer: unknown type 'convolt\.optimizers\.Adam'"),
    ],
)
def test_wrong_values_are_refused_by_their_key(values, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        recipe_from_plain(values)
    assert "\n" not in str(caught.value)


def test_a_missing_argument_is_named():
    layer = {"type": "conv2d", "in_channels": 3}
    with pytest.raises(ConfigError, match=r"model\.layers\[0\]: conv2d lacks out_channels, kernel_size"):
        model_from_plain({"input_shape": [3, 4, 4], "layers": [layer]})


# --- merging: file, options, --set -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", 0.1),
        ("1e-3", 1e-3),
        ("3", 3),
        ("-2", -2),
        ("(0.9,0.95)", (0.9, 0.95)),
        ("['a', 2]", ["a", 2]),
        ("{'type': 'adam'}", {"type": "adam"}),
        ("true", True),
        ("False", False),
        ("NONE", None),
        ("10ep", "10ep"),
        ("rollback", "rollback"),
        ("'quoted'", "quoted"),
        ("", ""),
        ("a=b", "a=b"),
        ("(" * 300, "(" * 300),
    ],
)
def test_values_are_literals_or_text(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "code", ["__import__('os').getpid()", "1+__import__('os').getpid()", "[x for x in (1,)]", "exit()"]
)
def test_nothing_is_evaluated(code):
    assert parse_value(code) == code


def test_assignments():
    assert parse_assignment("optimizer.betas = (0.9, 0.95)") == ("optimizer.betas", (0.9, 0.95))
    assert parse_assignment("name=a=b") == ("name", "a=b")
    for text in ("optimizer.lr", "=3", " = 3"):
        with pytest.raises(ConfigError, match=r"--set takes key=value, such as optimizer\.betas="):
            parse_assignment(text)


def test_dotted_keys_reach_inside():
    recipe: dict = {}
    for key, value in (
        ("optimizer", "sgd"),
        ("optimizer.momentum", 0.9),
        ("optimizer.lr", 0.1),
        ("schedule", "cosine"),
        ("schedule.eta_min", 1e-5),
        ("non_finite.policy", "skip"),
        ("epochs", 3),
    ):
        assign(recipe, key, value)
    expected = Recipe(
        epochs=3, optimizer=SGD(lr=0.1, momentum=0.9), schedule=Cosine(eta_min=1e-5), non_finite=NonFinite("skip")
    )
    assert recipe_from_plain(recipe) == expected


def test_a_new_type_drops_the_fields_of_the_old_one_and_the_same_keeps_them():
    recipe = {"optimizer": {"type": "sgd", "momentum": 0.9}}
    assign(recipe, "optimizer", "SGD")
    assert recipe["optimizer"] == {"type": "sgd", "momentum": 0.9}
    assign(recipe, "optimizer", "adam")
    assert recipe_from_plain(recipe) == Recipe(optimizer=Adam())


def test_recipe_files(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('epochs = 3\n[optimizer]\ntype = "adamw"\nbetas = [0.9, 0.95]\n')
    assert recipe_from_plain(read_toml(file)) == Recipe(epochs=3, optimizer=AdamW(betas=(0.9, 0.95)))
    file.write_text("epochs = \n")
    with pytest.raises(ConfigError, match=r"recipe\.toml: is not valid TOML: .*line 1"):
        read_toml(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"recipe\.toml: is not valid TOML"):
        read_toml(file)
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")
