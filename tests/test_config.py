"""Presets, overrides, and every contradiction that is refused."""

import re
from pathlib import Path

import pytest

from mixkvq import ConfigError, MixKVQConfig, all_presets


@pytest.mark.parametrize("name", all_presets())
def test_presets_survive_json(name: str, tmp_path):
    config = MixKVQConfig.preset(name)
    assert MixKVQConfig.from_json(config.to_json()) == config
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert MixKVQConfig.from_json(path) == config


def test_overrides_as_the_command_line_writes_them():
    config = MixKVQConfig.parse("paper:tau_bf16=1.44, tau_uint4=0.79,sinks=4,key_clip=true")
    assert config == MixKVQConfig.preset("paper", tau_bf16=1.44, tau_uint4=0.79, sinks=4, key_clip=True)
    switched = MixKVQConfig.parse("paper:tau_bf16=none,tau_uint4=none,budget=2.3")
    assert switched.budget == 2.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("papper", r"no preset 'papper'. Did you mean 'paper'\? Known: bf16, conf-kv, conf-kv-l, default, kitty"),
        ("default:budgte=3", r"no field 'budgte'. Did you mean 'budget'\? Known: budget, "),
        ("default:budget", "not of the form field=value"),
        ("default:budget=high", "budget is a number, not 'high'"),
        ("default:sinks=1.5", "sinks is a number, not '1.5'"),
        ("default:debug=maybe", "debug is true or false, not 'maybe'"),
        (
            "default:policy=kiwi",
            "no policy 'kiwi'. Known: bf16, conf-kv, frozen, kitty, kivi, kvmix, kvquant, kvtuner, mixkvq, pm-kvq",
        ),
        ("default:key_group=48", r"key_group divides residual_length \(128\); key_group=48 was given"),
        ("default:key_group=0", "key_group divides"),
        ("kivi-2:key_axis=token,key_group=0", "key_group is at least 1"),
        ("kivi-2:key_rotation=hadamard", "key_rotation spreads .* it takes key_axis='token', not 'channel'"),
        ("rotatekv-2:key_rotation=none", "rotatekv policy takes key_axis='token' and key_rotation='hadamard'"),
        ("rotatekv-2:budget=3", "rotatekv policy has no budget, which is for kitty, mixkvq: leave it out"),
        ("kivi-2:key_axis=head", "key_axis is one of channel, token"),
        ("default:key_axis=token,key_feedback=none", "the mixkvq policy promotes single channels: use key_axis"),
        ("kitty:key_axis=token", "the kitty policy promotes single channels: use key_axis='channel', or a policy"),
        ("quality:key_axis=token", "key_feedback moves errors between channels .* set key_feedback to none"),
        ("default:residual_length=100", "residual_length is a multiple of 16"),
        ("default:residual_length=0", "residual_length is a multiple of 16"),
        ("default:value_bits=5", "value_bits is one of 2, 3, 4, 8, 16; value_bits=5 was given"),
        ("kivi-2:key_bits=7", "key_bits is one of 2, 3, 4, 8, 16; key_bits=7 was given"),
        ("default:budget=1.9", r"budget lies between key_bits \(2\) and 4, the promoted width; budget=1.9"),
        ("default:budget=4.5", "budget lies between"),
        ("default:sinks=-1", "sinks is 0 or more"),
        ("default:value_group=0", "value_group is at least 1"),
        ("default:value_rotation=random", "value_rotation is one of none, hadamard"),
        ("default:scale_dtype=int8", "scale_dtype is one of float16, bfloat16, float32"),
        ("default:salience=magnitude", "salience is one of query, error"),
        ("default:budget_scope=model", "budget_scope is one of layer, head"),
        ("default:tau_uint4=1", "budget and thresholds .* are two ways"),
        ("default:budget=none", "needs a budget, or both tau_uint4 and tau_bf16"),
        ("paper:tau_bf16=none", "needs a budget, or both tau_uint4 and tau_bf16"),
        ("paper:key_bits=3", "promotes channels above key_bits=2, not 3"),
        ("kivi-2:budget=2.5", "kivi policy has no budget, which is for kitty, mixkvq: leave it out"),
        ("kivi-2:plan_tokens=512", "kivi policy has no plan_tokens, which is for pm-kvq: leave it out"),
        ("conf-kv:outliers=0.01", "The conf-kv policy has no outliers: leave it out"),
        ("window-512:key_axis=token", "The window policy has no key_axis: leave it out"),
        ("kivi-2:tau_uint4=2.5", "kivi policy has no tau_uint4, which is for mixkvq"),
        ("kitty:budget=none", "kitty policy needs a budget"),
        ("kivi-2:recent=0.1", "kivi policy has no recent, which is for kvmix: leave it out"),
        ("kivi-2:recent_of=residual", "kivi policy has no recent_of, which is for kvmix: leave it out"),
        ("kvmix:recent=0.5", "recent is a share from 0 to 0.4; recent=0.5 was given"),
        ("kvmix:recent=-0.1", "recent is a share from 0 to 0.4"),
        ("kvmix:recent=nan", "recent is a share from 0 to 0.4"),
        ("kvmix:recent_of=window", "recent_of is one of context, residual"),
        ("bf16:key_bits=4", "bf16 policy quantizes nothing"),
    ],
)
def test_contradictions_are_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        MixKVQConfig.parse(text)


def test_unknown_fields_in_python_and_json():
    with pytest.raises(ConfigError, match=r"no field 'bugdet'\. Did you mean 'budget'"):
        MixKVQConfig.preset("default", bugdet=3)
    with pytest.raises(ConfigError, match="no field 'colour'"):
        MixKVQConfig.from_json('{"policy": "kivi", "colour": 1}')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON object of fields"),
        ('{"policy": "kivi", "sinks": 1.0}', "sinks is a whole number"),
        ('{"policy": "kivi", "key_group": "32"}', "key_group is a whole number"),
        ('{"tau_bf16": NaN, "tau_uint4": 1}', "tau_bf16 is a finite number"),
    ],
)
def test_json_that_is_no_configuration(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        MixKVQConfig.from_json(text)


@pytest.mark.parametrize(
    ("dim", "group", "parts"),
    [(64, 64, 1), (128, 64, 2), (96, 64, 2), (80, 64, 2), (16, 64, 1), (64, 24, 4), (7, 3, 7)],
)
def test_value_groups_are_equal_and_no_longer_than_asked(dim: int, group: int, parts: int):
    assert MixKVQConfig.preset("default", value_group=group).value_groups(dim) == parts


def test_replace_checks_again():
    config = MixKVQConfig.preset("default").replace(sinks=8)
    assert config.sinks == 8
    with pytest.raises(ConfigError):
        config.replace(budget=9.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": ["kivi"]}, "policy is a name; policy=['kivi'] was given"),
        ({"key_clip": "yes"}, "key_clip is true or false; key_clip='yes' was given"),
        ({"debug": 3}, "debug is true or false; debug=3 was given"),
        ({"model": 5}, "model is a text or none; model=5 was given"),
        ({"layers": 5}, "layers is a list of fields for each layer; layers=5 was given"),
        ({"layers": {"a": 1}}, "layers is a list of fields for each layer"),
        ({"layers": [5]}, "layers[0] is a mapping of fields; 5 was given"),
        ({"layers": [{"policy": ["kivi"]}]}, "layers[0]: policy is a name"),
    ],
)
def test_fields_of_the_wrong_type(fields: dict, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        MixKVQConfig.from_dict({**MixKVQConfig.preset("default").as_dict(), **fields})


def test_fields_that_layers_have_for_themselves_are_not_overridden(tmp_path: Path):
    file = tmp_path / "mine.json"
    file.write_text(MixKVQConfig.preset("default", layers=[{"budget": 3.2}, {}, {"value_bits": 4}]).to_json())
    assert MixKVQConfig.parse(f"{file}:debug=true").debug
    assert MixKVQConfig.parse(f"{file}:key_group=64").for_layer(2).key_group == 64
    with pytest.raises(ConfigError, match=r"budget cannot be overridden in '.*mine.json', where 1 of 3 layers have"):
        MixKVQConfig.parse(f"{file}:budget=3")
