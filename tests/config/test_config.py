"""Configurations: round trips without loss, and one line for every wrong key, type, value and version."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from leanvit import config as configs
from leanvit.cli import VERBS
from leanvit.config import (
    BEST_PASSES,
    BenchmarkConfig,
    Budget,
    DemoConfig,
    ExportConfig,
    MPTQConfig,
    PredictConfig,
    Preprocess,
    QuantizeConfig,
    Scheme,
    TrainConfig,
    ValConfig,
    from_dict,
    load_yaml,
    save_yaml,
    to_dict,
)
from leanvit.config.tasks import DEFAULTS as TASK_DEFAULTS
from leanvit.errors import ConfigError, EnvironmentProblem, LeanvitError

OF_VERBS = [getattr(configs, name) for name, _ in VERBS.values()]
ALL = [*OF_VERBS, MPTQConfig, Preprocess]

# Ranges that the fields' help texts give; every other number may be any from 3 to 1000.
bits = st.integers(2, 8)
share = st.floats(0, 1, exclude_max=True)
positive = st.floats(1e-9, 1e9)
multiples = st.integers(1, 40).map(lambda count: 32 * count)
RANGES: dict[str, st.SearchStrategy[Any]] = {
    "version": st.just(1),
    "weight_bits": bits,
    "activation_bits": bits,
    "first_last_bits": bits,
    "smoothing_alpha": st.floats(0, 1),
    "hflip": st.floats(0, 1),
    "score_threshold": st.floats(0, 1),
    "drop_path": share,
    "drop": share,
    "color_jitter": share,
    "img_size": st.none() | multiples | st.tuples(multiples, multiples),
    # An average and sharded weights exclude each other.
    "fsdp": st.just(False),
    # Of some verbs only beside another option.
    "ray": st.none(),
    "ray_workers": st.none(),
    "multi_label": st.just(False),  # of labelled images alone, which text of a task is not
    "model_ema_decay": share,
    "layer_decay": st.none() | st.floats(0, 1, exclude_min=True),
    "keep_tokens": st.floats(0, 1, exclude_min=True),
    "train_fraction": st.floats(0, 1, exclude_min=True),
    "crop_ratio": st.lists(positive, min_size=2, max_size=2).map(lambda pair: tuple(sorted(pair))),
    **dict.fromkeys(("reprob", "mixup_prob", "mixup_switch_prob", "distillation_alpha"), st.floats(0, 1)),
    "val_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "crop_pct": st.floats(0, 1, exclude_min=True),
    "crop_scale": st.lists(positive, min_size=2, max_size=2).map(lambda pair: tuple(sorted(pair))),
    "size": st.lists(st.integers(32, 4096), min_size=1, max_size=2).map(tuple),
    "scale": st.lists(positive, min_size=2, max_size=2).map(lambda pair: tuple(sorted(pair))),
    "min_objects": st.integers(1, 3),
    "timeout": st.floats(0.1, 1e6),
    "rotation": st.floats(0, 180),
    "occlusion": share,
    "mean": st.tuples(positive, positive, positive),
    "std": st.tuples(positive, positive, positive),
    "models": st.lists(st.text(), max_size=2),
    "batch_sizes": st.lists(st.integers(1, 512), min_size=1).map(tuple),
    "severities": st.lists(st.integers(1, 5), min_size=1, max_size=5),
}


LIMITS = ("average_bits", "model_bytes", "bitops", "latency_ms", "latency_table", "plan")


def budgets() -> st.SearchStrategy[Budget]:
    limit = st.floats(2, 8)
    return st.one_of(
        limit.map(lambda value: Budget(average_bits=value)),
        st.integers(1, 10**9).map(lambda value: Budget(model_bytes=value)),
        limit.map(lambda value: Budget(latency_ms=value, latency_table="table.json", levels=(8, 4))),
    )


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    if hint is Budget:
        return budgets()
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of(*(st.none() if arg is types.NoneType else values_of(arg) for arg in args))
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if origin is list:
        return st.lists(values_of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans()), max_size=3)
    return {bool: st.booleans(), str: st.text(), int: st.integers(3, 1000), float: st.floats(0.001, 1000)}[hint]


def instances(cls: type) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)

    def of_field(name: str) -> st.SearchStrategy[Any]:
        if name == "smoothing" and hints[name] is float:
            return share
        if name == "task" and hints[name] is str:
            # One of the package takes its own options only; those of one from outside are checked where it starts.
            return st.text().filter(lambda task: task not in TASK_DEFAULTS)
        if name == "passes":
            return st.lists(st.sampled_from(BEST_PASSES), unique=True).map(tuple)
        return RANGES[name] if name in RANGES else values_of(hints[name])

    values = st.fixed_dictionaries({f.name: of_field(f.name) for f in dataclasses.fields(cls)})
    # At most one limit, and a latency limit only with its table: the rest is refused, by tests of its own.
    return values.map(lambda v: {**v, **dict.fromkeys(LIMITS)} if cls is QuantizeConfig else v).map(lambda v: cls(**v))


@pytest.mark.parametrize("cls", ALL)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_config_goes_to_json_and_back_without_loss(cls: type, data: st.DataObject) -> None:
    config = data.draw(instances(cls))
    assert from_dict(cls, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("cls", ALL)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_config_goes_to_yaml_and_back_without_loss(
    cls: type, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = data.draw(instances(cls))
    path = tmp_path_factory.getbasetemp() / f"{cls.__name__}.yaml"
    save_yaml(config, path)
    assert from_dict(cls, load_yaml(path)) == config
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == [f.name for f in dataclasses.fields(cls)]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars.filter(lambda k: k == k), inner)
)


@pytest.mark.parametrize("cls", [TrainConfig, PredictConfig, Preprocess])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_plain_values_give_a_config_or_a_config_error(cls: type, data: st.DataObject) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    keys = st.one_of(st.sampled_from(names), st.integers(), st.text(max_size=3))
    values = data.draw(st.dictionaries(keys, plain, max_size=4))
    with contextlib.suppress(ConfigError):
        assert isinstance(from_dict(cls, values), cls)


@settings(max_examples=100, deadline=None)
@given(
    text=st.one_of(st.binary(max_size=40), st.text(alphabet="a: -[]{}#&*!|>'\"%@\n\t01", max_size=40).map(str.encode))
)
def test_any_file_gives_keys_and_values_or_a_config_error(
    text: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text)
    message = str(path)
    try:
        assert isinstance(load_yaml(path), dict)
    except ConfigError as error:
        message = str(error)
    assert str(path) in message


@pytest.mark.parametrize("cls", OF_VERBS)
def test_every_option_has_help_that_is_a_sentence(cls: type) -> None:
    for field in dataclasses.fields(cls):
        assert field.metadata["help"].endswith(".") or field.metadata["help"].endswith("..."), field.name
    assert (cls.__doc__ or "").strip()


@pytest.mark.parametrize("cls", ALL)
def test_a_config_can_not_be_changed_after_it_was_checked(cls: type) -> None:
    needed = {f.name: "x" for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    config = cls(**needed) if cls is not Preprocess else Preprocess(input_size=(8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.version = 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "here: unknown key 'epoch'. Did you mean 'epochs'?"),
        ({1: 3}, "here: unknown key '1'."),
        ({"epochs": "three"}, "here: epochs is 'three', expected int"),
        ({"epochs": True}, "here: epochs is True, expected int"),
        ({"epochs": 2.5}, "here: epochs is 2.5, expected int"),
        ({"resume": 1}, "here: resume is 1, expected bool"),
        ({"amp": "fp16"}, "here: amp is 'fp16', expected one of: auto, bfloat16, float16, none"),
        ({"crop_scale": [0.5]}, "here: crop_scale has 1 entries, expected 2"),
        ({"crop_scale": 0.5}, "here: crop_scale is 0.5, expected a list"),
        ({"img_size": "big"}, "here: img_size is 'big', expected int"),
        ({"lr": math.nan}, "here: lr is nan, expected a finite number"),
        ({"lr": math.inf}, "here: lr is inf, expected a finite number"),
        ({"version": 2}, "here: version is 2, this leanvit reads version 1."),
    ],
)
def test_a_wrong_key_type_or_version_is_named_with_its_place(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, values, "here")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fsdp": True, "model_ema_decay": 0.9}, "fsdp and model_ema_decay are both given"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, expected more than 0 and up to 1"),
        ({"train_fraction": 1.5}, "train_fraction is 1.5, expected a share above 0"),
        ({"mixup_prob": 1.1}, "mixup_prob is 1.1, expected 0 to 1"),
        ({"model_ema_decay": 1.0}, "model_ema_decay is 1.0, expected 0 up to 1"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio is (2.0, 1.0), expected two rising numbers"),
        ({"distillation_tau": 0.0}, "distillation_tau is 0.0, expected more than 0"),
        ({"workers": -1}, "workers is -1, expected at least 0"),
        ({"grad_accum_steps": 0}, "grad_accum_steps is 0, expected at least 1"),
    ],
)
def test_a_training_that_can_not_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert str(caught.value).startswith(message)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="here: missing input_size"):
        from_dict(Preprocess, {}, "here")


@dataclasses.dataclass(frozen=True)
class Nested:
    preprocess: Preprocess
    plan: dict[str, tuple[int, int]]


def test_nested_values_are_checked_as_well() -> None:
    good = {"preprocess": {"input_size": [8, 8]}, "plan": {"a": [4, 8]}}
    assert from_dict(Nested, good) == Nested(Preprocess(input_size=(8, 8)), {"a": (4, 8)})
    for wrong in (
        good | {"preprocess": 5},
        good | {"preprocess": {"input_size": [8]}},
        good | {"plan": 5},
        good | {"plan": [["a", 4]]},
        good | {"plan": {"a": [4, "8"]}},
        good | {"plan": {"a": 4}},
    ):
        with pytest.raises(ConfigError, match=r"preprocess|plan"):
            from_dict(Nested, wrong)


@pytest.mark.parametrize(
    ("cls", "name", "wrong", "right"),
    [
        (TrainConfig, "epochs", [0, -1], [1]),
        (TrainConfig, "batch_size", [0], [1]),
        (TrainConfig, "lr", [0.0, -1.0, math.nan], [1e-9]),
        (TrainConfig, "min_lr", [-1e-9, math.nan], [0.0]),
        (TrainConfig, "warmup_epochs", [-1.0], [0.0, 0.5]),
        (TrainConfig, "weight_decay", [-0.1], [0.0]),
        (TrainConfig, "clip_grad", [-1.0], [0.0]),
        (TrainConfig, "smoothing", [-0.1, 1.0, math.nan], [0.0, 0.99]),
        (TrainConfig, "drop_path", [-0.1, 1.0], [0.0]),
        (TrainConfig, "hflip", [-0.1, 1.1], [0.0, 1.0]),
        (TrainConfig, "degrees", [-1.0], [0.0]),
        (TrainConfig, "img_size", [0, -3], [None, 1]),
        (TrainConfig, "keep_tokens", [0.0, 1.1, math.nan], [0.6, 1.0]),
        (QuantizeConfig, "keep_tokens", [0.0, 1.1, math.nan], [0.6, 1.0]),
        (TrainConfig, "val_fraction", [0.0, 1.0, math.nan], [0.5]),
        (TrainConfig, "crop_scale", [(0.0, 1.0), (0.9, 0.5), (math.nan, 1.0)], [(1.0, 1.0), (0.5, 1.5)]),
        (TrainConfig, "seed", [-1], [0]),
        (MPTQConfig, "weight_bits", [1, 9], [2, 8]),
        (MPTQConfig, "activation_bits", [1, 9], [2, 8]),
        (MPTQConfig, "first_last_bits", [1, 9], [2, 8]),
        (MPTQConfig, "smoothing_alpha", [-0.1, 1.1, math.nan], [0.0, 1.0]),
        (QuantizeConfig, "weight_bits", [1, 9], [2, 8]),
        (QuantizeConfig, "batch_size", [0], [1]),
        (QuantizeConfig, "calibration_images", [0], [1]),
        (QuantizeConfig, "seed", [-1], [0]),
        (ValConfig, "batch_size", [0], [1]),
        (ValConfig, "limit", [0], [None, 1]),
        (ValConfig, "shifts", [-1], [0]),
        (ValConfig, "threads", [-1], [0]),
        (ValConfig, "severities", [[], [0], [1, 6]], [[5, 1]]),
        (ExportConfig, "batch_size", [0], [1]),
        (ExportConfig, "max_drop", [-0.5, math.nan], [0.0]),
        (PredictConfig, "top_k", [0], [1]),
        (PredictConfig, "batch_size", [0], [1]),
        (PredictConfig, "threads", [-1], [0]),
        (BenchmarkConfig, "rounds", [2], [3]),
        (BenchmarkConfig, "threads", [-1], [0]),
        (BenchmarkConfig, "batch_sizes", [(), (0, 1)], [(1,)]),
        (DemoConfig, "epochs", [0], [1]),
        (DemoConfig, "seed", [-1], [0]),
        (Preprocess, "input_size", [(0, 8)], [(1, 1)]),
        (Preprocess, "crop_pct", [0.0, 1.1, math.nan], [1.0]),
        (Preprocess, "std", [(1.0, 0.0, 1.0), (1.0,), ()], [(1.0, 1.0, 1.0)]),
    ],
)
def test_a_value_out_of_range_is_refused_and_its_limit_is_not(
    cls: type, name: str, wrong: list[Any], right: list[Any]
) -> None:
    needed = {"model": "m", "bundle": "b", "input_size": (8, 8)}
    needed = {
        f.name: needed[f.name]
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    for value in right:
        assert getattr(cls(**needed | {name: value}), name) == value
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{name} is .*, expected "):
            cls(**needed | {name: value})


@pytest.mark.parametrize("text", ["lr: 1e-3", "lr: 1.0e-3", "lr: 0.001", "lr: 1E-3", "lr: .001", '{"lr": 1e-3}'])
def test_numbers_are_read_as_numbers_in_every_spelling(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert from_dict(TrainConfig, load_yaml(tmp_path / "c.yaml")).lr == 0.001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("- 1\n- 2", "holds list, expected keys and values"),
        ("", "holds NoneType, expected keys and values"),
        ("a: b: c", "not valid YAML.*line 1"),
        ("a: 1\n b: 2\n", "not valid YAML.*line 2"),
        ("x: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_named_with_the_place(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)


def test_saving_a_config_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "c.yaml"
    save_yaml(TrainConfig(epochs=3), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EnvironmentProblem, match="no space left"):
        save_yaml(TrainConfig(epochs=4), path)
    assert load_yaml(path)["epochs"] == 3
    assert issubclass(EnvironmentProblem, LeanvitError)


def test_mutable_defaults_are_not_shared() -> None:
    first = PredictConfig(bundle="b")
    first.images.append("x")
    assert PredictConfig(bundle="b").images == []


def test_quantize_takes_every_option_of_the_scheme() -> None:
    assert {f.name for f in dataclasses.fields(Scheme)} <= {f.name for f in dataclasses.fields(QuantizeConfig)}
    assert typing.get_type_hints(QuantizeConfig)["weight_bits"] is int
    config = QuantizeConfig(model="m", mode="best", average_bits=5.0, seed=3)
    assert config.scheme() == MPTQConfig(mode="best", seed=3, budget=Budget(average_bits=5.0))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, "no limit"),
        ({"average_bits": 5.0, "bitops": 10}, "exactly one"),
        ({"average_bits": 0.0}, "above 0"),
        ({"latency_ms": 3.0}, "go together"),
        ({"average_bits": 5.0, "levels": (4, 8)}, "falling"),
        ({"average_bits": 5.0, "levels": (16, 8)}, "falling"),
    ],
)
def test_a_budget_that_says_too_little_or_too_much_is_refused(values: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        Budget(**values)


def test_a_plan_and_a_budget_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="expected one"):
        QuantizeConfig(model="m", plan="plan.json", average_bits=5.0)


def test_unknown_passes_are_named_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'balance'"):
        MPTQConfig(passes=("balanced",))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, 1), ({"task": "pose", "data": "x"}, 1), ({"task": "segment", "data": "x"}, 4),
        ({"task": "detect", "data": "x", "batch_size": 6}, 2), ({"task": "detect", "data": "x", "batch_size": 1}, 1),
        ({"task": "detect", "data": "x", "grad_accum_steps": 1}, 1),
    ],
)  # fmt: skip
def test_detectors_learn_a_few_pictures_at_a_time(given: dict[str, Any], parts: int) -> None:
    assert TrainConfig(**given).grad_accum_steps == parts


@pytest.mark.parametrize("task", ["detect", "segment", "semantic"])
def test_a_file_of_0_1_may_hold_the_rotation_that_its_task_never_did(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_dict(TrainConfig, {"task": task, "data": "scenes", "degrees": 30.0, "version": 1})
    assert config.degrees is None
    assert f"degrees 30 is left out, as 0.1 did: task {task}" in capsys.readouterr().err
    assert from_dict(TrainConfig, {"task": "pose", "data": "scenes", "degrees": 30.0}).degrees == 30.0
    with pytest.raises(ConfigError, match="degrees is for classify, multilabel, pose"):
        TrainConfig(task=task, data="scenes", degrees=20.0)
