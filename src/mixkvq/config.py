"""The configuration of a quantized cache, and the presets."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mixkvq.checks import PROMOTED_BITS, ConfigError, check, join

__all__ = ["PROMOTED_BITS", "ConfigError", "MixKVQConfig", "Preset", "all_presets"]

#: Fields that all layers of a cache have in common.
SHARED_FIELDS = ("residual_length", "sinks", "plan_tokens", "scale_dtype", "debug", "layers", "model")
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


#: What a layer has of its own: fields and their values, sorted by name.
LayerFields = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class MixKVQConfig:
    """How keys and values are stored. Immutable, and checked when it is made.

    Use a preset and override what differs::

        MixKVQConfig.preset("default")
        MixKVQConfig.preset("paper", tau_bf16=1.44, tau_uint4=0.79)
        MixKVQConfig.parse("paper:tau_bf16=1.44,tau_uint4=0.79")

    Attributes:
        policy: who decides the bits of each key channel; see ``mixkvq caches``.
        residual_length: R, the newest tokens that stay in the model's type until there are R of them (``recent`` keeps
            more); also the tokens in a page.
        sinks: the first tokens of every sequence that always stay in the model's type.
        key_bits: width of key channels that are not promoted.
        key_axis: what shares a key scale: tokens of one "channel", or the channels of one "token", as with values. With
            "token" no channel can be promoted, and no error can travel between channels.
        key_group: tokens of one channel that share a scale; divides R. With ``key_axis`` "token" at most so many
            channels of one token, as ``value_group``.
        key_rotation: "hadamard" rotates every packed key vector before it is quantized, and queries alike when they
            read it, so that logits stay what they are. It takes ``key_axis`` "token".
        key_rope: "before" quantizes keys before RoPE, which is taken back when they are packed and applied when they
            are read (:mod:`mixkvq.quant.rope`); "after" as the model hands them over.
        key_clip: search the clipping range of key groups of up to 3 bits.
        key_unbiased: undo the shrinkage that quantizing key groups causes (:mod:`mixkvq.quant.affine`).
        key_feedback: damping of query-aware error feedback across key channels (:mod:`mixkvq.quant.feedback`), as a
            share of the queries' mean power; none rounds every channel for itself.
        key_levels: what codes of keys stand for, 2^key_bits rising numbers of steps; none is 0, 1, 2 and so on.
        value_bits: width of values.
        value_group: at most so many channels of one token share a scale (head dimensions that it does not divide
            are cut into equal parts).
        value_clip: search the clipping range of value groups of up to 3 bits.
        value_unbiased: undo the shrinkage of value groups.
        value_symmetric: store no zeros for value groups, whose codes then lie evenly around 0. For rotated values,
            whose mean is near it: they lose nothing, and a quarter of a bit is saved in groups of 64.
        value_rotation: "hadamard" rotates every value vector before it is quantized, and the attention output back.
        value_levels: the same as ``key_levels`` for values.
        outliers: share of the keys and of the values of every head and page that are kept in 16 bits, with places.
        tau_uint4, tau_bf16: absolute thresholds on a channel's salience; above them a channel gets 4 bits, or stays
            in the model's type. For the "mixkvq" policy, instead of a budget.
        budget: mean code bits of a key channel; the most salient channels get 4 bits until it is spent.
        budget_scope: "layer" ranks the channels of all KV heads of a layer together, "head" each head's own.
        channels: for every KV head the key channels that get 4 bits in all blocks. For the "frozen" policy, instead of
            a budget; calibrations bring these.
        salience: "query" is the paper's ``I_d * S_d``; "error" leaves out the query (its ablation).
        plan_tokens: the length of a sequence at which a cache that narrows as it grows has come to its ``key_bits`` and
            ``value_bits``; it holds no more tokens. For the "pm-kvq" policy.
        keep: tokens that a layer keeps of each sequence, for policies that evict the others ("conf-kv", "window").
        keep_confident: the same after a step that the model was confident in ("conf-kv").
        keep_decay: "conf-kv" keeps ``keep_decay^(l / L)`` of these in layer ``l`` of ``L``; 1 is as many in all.
        confidence: from here on a step counts as confident.
        protected: so many of the newest tokens are never evicted ("conf-kv").
        mass_share: what the attention that a token gets counts for in its rank; how new it is counts for the rest.
        recent: share of the context that stays in the model's type as its newest tokens, besides the sinks; layers with
            keys or values of more than 2 bits keep twice the share. For the "kvmix" policy.
        recent_of: what that is a share of: the whole "context", or the "residual", what is in the model's type when
            blocks are packed, so that of a long prompt ever fewer tokens stay.
        scale_dtype: type that scales and zeros are stored in.
        debug: check keys and values for NaN and infinity, and masks for hidden past tokens, at every step.
        layers: what differs in each layer of the model, as a mapping of fields for every one of them, such as
            ``[{"budget": 3.2}, {}, ...]``. Calibrations bring these (docs/calibration.md). Kept as sorted pairs.
        model: the model that ``layers`` are for, as :func:`mixkvq.adapters.transformers.support.model_shape` has it;
            a cache for another model refuses the configuration.
    """

    policy: str = "mixkvq"
    residual_length: int = 128
    sinks: int = 0
    key_bits: int = 2
    key_axis: Literal["channel", "token"] = "channel"
    key_group: int = 32
    key_rotation: Literal["none", "hadamard"] = "none"
    key_rope: Literal["after", "before"] = "after"
    key_clip: bool = False
    key_unbiased: bool = False
    key_feedback: float | None = None
    key_levels: tuple[float, ...] | None = None
    value_bits: int = 2
    value_group: int = 32
    value_clip: bool = False
    value_unbiased: bool = False
    value_symmetric: bool = False
    value_rotation: Literal["none", "hadamard"] = "none"
    value_levels: tuple[float, ...] | None = None
    outliers: float = 0.0
    tau_uint4: float | None = None
    tau_bf16: float | None = None
    budget: float | None = None
    budget_scope: Literal["layer", "head"] = "layer"
    channels: tuple[tuple[int, ...], ...] | None = None
    salience: Literal["query", "error"] = "query"
    plan_tokens: int | None = None
    keep: int | None = None
    keep_confident: int | None = None
    keep_decay: float = 1.0
    confidence: float = 0.7
    protected: int = 64
    mass_share: float = 0.65
    recent: float = 0.0
    recent_of: Literal["context", "residual"] = "context"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    debug: bool = False
    layers: tuple[LayerFields, ...] = ()
    model: str | None = None

    def __post_init__(self) -> None:
        check(self)
        for field in ("key_levels", "value_levels"):
            given = getattr(self, field)
            object.__setattr__(self, field, None if given is None else tuple(given))
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(tuple(head) for head in self.channels))
        object.__setattr__(self, "layers", self._checked_layers())

    def _checked_layers(self) -> tuple[LayerFields, ...]:
        """:attr:`layers` as sorted pairs, each of which makes a valid configuration."""
        checked = []
        for index, given in enumerate(self.layers):
            try:
                fields = dict(given)
            except (TypeError, ValueError):
                raise ConfigError(f"layers[{index}] is a mapping of fields; {given!r} was given.") from None
            for field in fields:
                if field not in _field_names():
                    raise ConfigError(f"layers[{index}]: {_unknown('field', field, _field_names())}")
                if field in SHARED_FIELDS:
                    raise ConfigError(f"layers[{index}]: {field} is the same for all layers of a cache.")
            try:
                own = self.replace(layers=(), **fields)
            except ConfigError as error:
                raise ConfigError(f"layers[{index}]: {error}") from None
            checked.append(tuple((field, getattr(own, field)) for field in sorted(fields)))
        return tuple(checked)

    def for_layer(self, index: int) -> MixKVQConfig:
        """What layer ``index`` of the model stores by: a configuration without :attr:`layers`."""
        return self.replace(layers=(), **dict(self.layers[index])) if self.layers else self

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MixKVQConfig:
        """A preset by name, with fields replaced.

        Raises:
            ConfigError: the preset or a field does not exist, or the result contradicts itself.
        """
        presets = all_presets()
        if name not in presets:
            raise ConfigError(_unknown("preset", name, presets))
        unknown = set(overrides) - _field_names()
        if unknown:
            raise ConfigError(_unknown("field", sorted(unknown)[0], _field_names()))
        return cls(**{**presets[name].fields, **overrides})

    @classmethod
    def parse(cls, text: str) -> MixKVQConfig:
        """A preset as the command line writes it: ``name`` or ``name:field=value,field=value``.

        In place of a preset's name, that of a file: a calibration (:mod:`mixkvq.calibrate.file`) or a configuration.
        """
        name, rest = split_overrides(text)
        overrides: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in rest.split(","))):
            field, equals, value = item.partition("=")
            if not equals:
                raise ConfigError(f"'{item}' in '{text}' is not of the form field=value.")
            if field.strip() not in _field_names():
                raise ConfigError(_unknown("field", field.strip(), _field_names()))
            overrides[field.strip()] = _parse_value(field.strip(), value.strip())
        if name.endswith(".json"):
            from mixkvq.calibrate.file import read_config

            return read_config(Path(name))._overridden(name, overrides)
        return cls.preset(name, **overrides)

    def _overridden(self, name: str, overrides: dict[str, Any]) -> MixKVQConfig:
        """A copy with fields changed that no layer has for itself: there they would change nothing."""
        for field in overrides:
            own = sum(field in dict(fields) for fields in self.layers)
            if own:
                raise ConfigError(
                    f"{field} cannot be overridden in '{name}', where {own} of {len(self.layers)} layers have their "
                    "own: calibrate again for another goal, or start from a preset."
                )
        return self.replace(**overrides)

    def replace(self, **changes: Any) -> MixKVQConfig:
        """A copy with fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(self.as_dict(), indent=2)

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "layers": [dict(fields) for fields in self.layers]}

    @classmethod
    def from_json(cls, text: str | Path) -> MixKVQConfig:
        """From :meth:`to_json`'s text, or a file that holds it."""
        try:
            raw = json.loads(text.read_text() if isinstance(text, Path) else text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"This is not JSON: {error}") from error
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Any) -> MixKVQConfig:
        """From :meth:`as_dict`'s fields."""
        if not isinstance(raw, dict):
            raise ConfigError("A configuration is a JSON object of fields.")
        unknown = set(raw) - _field_names()
        if unknown:
            raise ConfigError(_unknown("field", sorted(unknown)[0], _field_names()))
        return cls(**raw)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the fields that are unlike their defaults."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)

    @property
    def param_dtype(self) -> torch.dtype:
        """:attr:`scale_dtype` as a torch type."""
        return SCALE_DTYPES[self.scale_dtype]

    def value_groups(self, head_dim: int) -> int:
        """Equal parts that a value vector is cut into, none longer than ``value_group``."""
        return _equal_parts(head_dim, self.value_group)

    def key_scales(self, head_dim: int) -> int:
        """Numbers that share a key scale: tokens of one channel, or channels of one token (:attr:`key_axis`)."""
        return self.key_group if self.key_axis == "channel" else head_dim // _equal_parts(head_dim, self.key_group)


@dataclass(frozen=True)
class Preset:
    """A named configuration: ``fields`` override the defaults of :class:`MixKVQConfig`."""

    summary: str
    source: str
    fields: dict[str, Any]


def split_overrides(text: str) -> tuple[str, str]:
    """The name of a preset or file, and the overrides after its colon; a file's name may have colons itself."""
    text = text.strip()
    if text.endswith(".json"):
        return text, ""
    file, found, rest = text.rpartition(".json:")
    if found:
        return f"{file}.json", rest
    name, _, rest = text.partition(":")
    return name, rest


def all_presets() -> dict[str, Preset]:
    """Presets by name. Every policy brings its own (:attr:`mixkvq.policies.Policy.presets`)."""
    from mixkvq.policies import POLICIES

    return {name: preset for policy in POLICIES.values() for name, preset in policy.presets.items()}


def _field_names() -> set[str]:
    return {field.name for field in dataclasses.fields(MixKVQConfig)}


def _type_hints() -> dict[str, Any]:
    return typing.get_type_hints(MixKVQConfig)


def _parse_value(field: str, text: str) -> Any:
    hint = _type_hints()[field]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if bool in options:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{field} is true or false, not '{text}'.")
        return text.lower() == "true"
    for kind in (int, float):
        if kind in options:
            try:
                return kind(text)
            except ValueError:
                raise ConfigError(f"{field} is a number, not '{text}'.") from None
    return text


def _equal_parts(size: int, most: int) -> int:
    """The fewest equal parts of ``size`` that are no longer than ``most``."""
    parts = -(-size // most)
    while size % parts:
        parts += 1
    return parts


def _unknown(kind: str, name: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"There is no {kind} '{name}'.{hint} Known: {join(known)}."
