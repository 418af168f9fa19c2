"""A checkpoint's `config.json` and `generation_config.json` as one frozen, neutral value.

Reads what transformers 4 wrote (`rope_theta`, `rope_scaling`, `torch_dtype`) and what 5 writes
(`rope_parameters`, one dictionary or one for each type of layer; `dtype`). The families' defaults
for fields that a file leaves out stand in one table here, so that a model only ever reads a
`ModelConfig`.

Knows no tensor: what a field means in the forward pass is said by `kvpaging.execution.models`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec

from kvpaging.base.errors import ConfigError, UnsupportedModel

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One rotary embedding; see `kvpaging.execution.rope` for what the numbers do."""

    kind: str
    """`default`, `linear`, `dynamic`, `llama3`, `yarn` or `longrope`."""
    theta: float
    rotary_dim: int
    """How many of a head's numbers turn; even, at most the head size."""
    max_position_embeddings: int
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts in place of some layers' MLP."""

    num_experts: int
    num_chosen: int
    """Experts that compute each token."""
    intermediate_size: int
    normalize: bool
    """The chosen experts' weights are made to sum to one."""
    sparse_layers: tuple[bool, ...]
    """For each layer, whether it has experts rather than a plain MLP."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is built from, whatever its family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str
    """`silu` or `gelu_tanh`."""
    tie_word_embeddings: bool
    attention_bias: bool
    """On all of the attention's projections."""
    mlp_bias: bool
    attention_scale: float
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    windows: tuple[int | None, ...]
    """For each layer, how many keys a query sees, itself included; `None` for all."""
    ropes: tuple[RopeConfig, ...]
    rope_of_layer: tuple[int, ...]
    """For each layer, the index of its rotary embedding in `ropes`."""
    max_model_len: int
    """Tokens of one sequence that the checkpoint was made for, its RoPE scaling included."""
    dtype: str
    """Of the checkpoint: `float32`, `bfloat16` or `float16`."""
    eos_token_ids: tuple[int, ...]
    experts: ExpertsConfig | None = None


_GEMMA_DEFAULTS: Final[dict[str, Any]] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

_GEMMA3_DEFAULTS: Final[dict[str, Any]] = {
    **_GEMMA_DEFAULTS,
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}

DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 4096, "num_key_value_heads": 8},
    "Qwen2ForCausalLM": {"use_sliding_window": False, "max_window_layers": 28},
    "Qwen3ForCausalLM": {"use_sliding_window": False, "max_window_layers": 28, "head_dim": 128},
    "Gemma2ForCausalLM": {
        **_GEMMA_DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": _GEMMA3_DEFAULTS,
    "Gemma3ForConditionalGeneration": _GEMMA3_DEFAULTS,
    "Phi3ForCausalLM": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "Qwen3MoeForCausalLM": {
        "use_sliding_window": False,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    "MixtralForCausalLM": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "num_key_value_heads": 8,
    },
}
"""For each supported architecture, what a missing field means where that is not for all the same.

A checkpoint is written with the fields that differ from transformers' own defaults, so a missing
field means the family's default there.
"""

_WITH_TEXT_CONFIG: Final = frozenset({"Gemma3ForConditionalGeneration"})
_ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
HEAD_DIM_MULTIPLE: Final = 8
"""What the attention kernels take."""
_ROPE_KINDS: Final = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_DTYPES: Final = ("float32", "bfloat16", "float16")


def read_model_config(model_dir: Path) -> ModelConfig:
    """Read and check the configuration of the checkpoint in `model_dir`.

    Raises `ConfigError`, naming file and field, when something is missing or does not fit, and
    `UnsupportedModel` when the checkpoint needs what this server doesn't have.
    """
    raw = _read_json(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return parse_model_config(raw, generation)


def parse_model_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """The same from the two files' parsed contents."""
    architecture = _architecture(raw)
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"]
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModel(
            f"config.json: quantization_config ({name}) is not supported; "
            "use the checkpoint in bfloat16, float16 or float32"
        )
    if architecture in _WITH_TEXT_CONFIG:
        raw = _text_config(raw)
    fields = _Fields({**DEFAULTS[architecture], **raw})
    return _Parser(architecture, fields, generation).parse()


def _text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The text model's fields of a model that also sees; some stand beside its section."""
    section = raw.get("text_config")
    if not isinstance(section, dict):
        raise ConfigError(f"config.json: text_config must be an object, is {section!r}")
    beside = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings")
    return {**{key: raw[key] for key in beside if key in raw}, **section}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent}: no {path.name}; is this a Hugging Face checkpoint directory?"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold an object")
    return value


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    supported = ", ".join(sorted(DEFAULTS))
    if not isinstance(names, list) or not names:
        raise ConfigError(f"config.json: architectures is missing; supported are {supported}")
    for name in names:
        if name in DEFAULTS:
            return str(name)
    raise UnsupportedModel(
        f"config.json: architecture {', '.join(map(str, names))} is not supported; "
        f"supported are {supported}"
    )


class _Fields:
    """Typed access to a parsed file; every complaint names the field."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._values = values
        self._where = where

    def _name(self, key: str) -> str:
        return f"config.json: {self._where}{key}"

    def raw(self, key: str) -> Any:
        return self._values.get(key)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self._name(key)} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self._name(key)} must be a positive whole number, is {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self._name(key)} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{self._name(key)} must be a number above 0, is {value!r}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self._name(key)} must be true or false, is {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self._name(key)} must be a string, is {value!r}")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or not all(
            isinstance(item, int | float) and not isinstance(item, bool) for item in value
        ):
            raise ConfigError(f"{self._name(key)} must be a list of numbers, is {value!r}")
        return tuple(float(item) for item in value)

    def section(self, key: str) -> _Fields | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{self._name(key)} must be an object, is {value!r}")
        return _Fields(value, f"{self._where}{key}.")


class _Parser:
    """One pass over the fields of one checkpoint."""

    def __init__(self, architecture: str, fields: _Fields, generation: dict[str, Any]) -> None:
        self._architecture = architecture
        self._is_gemma3 = architecture.startswith("Gemma3")
        self._fields = fields
        self._generation = generation
        self._num_layers = fields.integer("num_hidden_layers")
        self._num_heads = fields.integer("num_attention_heads")
        self._hidden_size = fields.integer("hidden_size")
        self._head_dim = self._read_head_dim()
        self._max_positions = fields.integer("max_position_embeddings")

    def parse(self) -> ModelConfig:
        fields = self._fields
        num_kv_heads = fields.integer("num_key_value_heads", self._num_heads)
        if self._num_heads % num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads ({self._num_heads}) must be a multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        self._refuse_features()
        layer_types = self._layer_types()
        ropes, rope_of_layer = self._ropes(layer_types)
        scale = fields.optional_number("query_pre_attn_scalar")
        vocab_size = fields.integer("vocab_size")
        return ModelConfig(
            architecture=self._architecture,
            vocab_size=vocab_size,
            hidden_size=self._hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=self._num_layers,
            num_heads=self._num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self._head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            activation=self._activation(),
            tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
            attention_bias=fields.flag("attention_bias", default=False),
            mlp_bias=fields.flag("mlp_bias", default=False),
            attention_scale=(scale if scale is not None else self._head_dim) ** -0.5,
            attention_soft_cap=fields.optional_number("attn_logit_softcapping"),
            logit_soft_cap=fields.optional_number("final_logit_softcapping"),
            windows=self._windows(layer_types),
            ropes=ropes,
            rope_of_layer=rope_of_layer,
            # Gemma 3 gives the length with its scaling included.
            max_model_len=self._max_positions if self._is_gemma3 else _longest(ropes[0]),
            dtype=self._dtype(),
            eos_token_ids=self._eos_token_ids(vocab_size),
            experts=self._experts(),
        )

    def _read_head_dim(self) -> int:
        if not self._fields.has("head_dim") and self._hidden_size % self._num_heads:
            raise ConfigError(
                f"config.json: hidden_size ({self._hidden_size}) must be a multiple of "
                f"num_attention_heads ({self._num_heads}) where head_dim is not given"
            )
        head_dim = self._fields.integer("head_dim", self._hidden_size // self._num_heads)
        if head_dim % HEAD_DIM_MULTIPLE:
            raise UnsupportedModel(
                f"config.json: head_dim {head_dim} is not supported; it must be a multiple of "
                f"{HEAD_DIM_MULTIPLE}"
            )
        return head_dim

    def _refuse_features(self) -> None:
        if self._fields.flag("use_bidirectional_attention", default=False):
            raise UnsupportedModel("config.json: use_bidirectional_attention is not supported")
        if self._is_gemma3 and self._fields.has("attn_logit_softcapping"):
            raise UnsupportedModel(
                f"config.json: attn_logit_softcapping is not supported for {self._architecture}"
            )

    def _activation(self) -> str:
        # Gemma says `hidden_activation`; its older files have a `hidden_act` that isn't meant.
        key = "hidden_activation" if self._fields.has("hidden_activation") else "hidden_act"
        name = self._fields.text(key, "silu")
        if name not in _ACTIVATIONS:
            raise UnsupportedModel(
                f"config.json: {key} {name!r} is not supported; "
                f"supported are {', '.join(sorted(_ACTIVATIONS))}"
            )
        return _ACTIVATIONS[name]

    def _dtype(self) -> str:
        key = "dtype" if self._fields.has("dtype") else "torch_dtype"
        name = self._fields.text(key, "float32") if self._fields.has(key) else "float32"
        name = name.removeprefix("torch.")
        if name not in _DTYPES:
            raise UnsupportedModel(
                f"config.json: {key} {name!r} is not supported; supported are {', '.join(_DTYPES)}"
            )
        return name

    def _layer_types(self) -> tuple[str, ...]:
        fields, layers = self._fields, range(self._num_layers)
        match self._architecture:
            case "LlamaForCausalLM":
                return tuple(FULL for _ in layers)
            case "MistralForCausalLM" | "MixtralForCausalLM" | "Phi3ForCausalLM":
                return tuple(SLIDING if fields.has("sliding_window") else FULL for _ in layers)
            case "Qwen3MoeForCausalLM":
                slides = fields.flag("use_sliding_window", default=False)
                return tuple(SLIDING if slides else FULL for _ in layers)
        given = fields.raw("layer_types")
        if given is not None:
            return self._given_layer_types(given)
        match self._architecture:
            case "Gemma2ForCausalLM":
                return tuple(SLIDING if layer % 2 == 0 else FULL for layer in layers)
            case "Gemma3ForCausalLM" | "Gemma3ForConditionalGeneration":
                pattern = fields.integer("sliding_window_pattern")
                return tuple(FULL if (layer + 1) % pattern == 0 else SLIDING for layer in layers)
        # Qwen2 and Qwen3.
        slides = fields.flag("use_sliding_window", default=False)
        first = fields.raw("max_window_layers")  # may be 0: all layers slide
        if not isinstance(first, int):
            raise ConfigError(
                f"config.json: max_window_layers must be a whole number, is {first!r}"
            )
        return tuple(SLIDING if slides and layer >= first else FULL for layer in layers)

    def _given_layer_types(self, given: Any) -> tuple[str, ...]:
        if not isinstance(given, list) or len(given) != self._num_layers:
            raise ConfigError(
                f"config.json: layer_types must list {self._num_layers} layers, is {given!r}"
            )
        for name in given:
            if name not in (FULL, SLIDING):
                raise UnsupportedModel(f"config.json: layer_types: {name!r} is not supported")
        return tuple(given)

    def _windows(self, layer_types: tuple[str, ...]) -> tuple[int | None, ...]:
        if SLIDING not in layer_types or not self._fields.has("sliding_window"):
            return (None,) * self._num_layers
        window = self._fields.integer("sliding_window")
        return tuple(window if name == SLIDING else None for name in layer_types)

    def _ropes(
        self, layer_types: tuple[str, ...]
    ) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
        """The rotary embeddings, and which of them each layer uses."""
        parameters = self._fields.section("rope_parameters")
        if not self._is_gemma3:
            scaling = parameters or self._fields.section("rope_scaling") or _Fields({})
            # A file may nest one dictionary for each type of layer even where they are equal.
            scaling = scaling.section(layer_types[0]) or scaling
            return (self._rope(scaling, "rope_theta"),), (0,) * self._num_layers

        if parameters is not None:
            full = parameters.section(FULL) or _Fields({})
            sliding = parameters.section(SLIDING) or _Fields({})
        else:
            full = self._fields.section("rope_scaling") or _Fields({})
            sliding = _Fields({})
        ropes = (self._rope(full, "rope_theta"), self._rope(sliding, "rope_local_base_freq"))
        return ropes, tuple(0 if name == FULL else 1 for name in layer_types)

    def _rope(self, scaling: _Fields, theta_key: str) -> RopeConfig:
        kind = scaling.text("rope_type", scaling.text("type", "default"))
        if kind == "su" or (kind == "yarn" and self._architecture == "Phi3ForCausalLM"):
            kind = "longrope"  # early Phi-3 checkpoints call it so
        if kind not in _ROPE_KINDS:
            raise UnsupportedModel(
                f"config.json: RoPE type {kind!r} is not supported; "
                f"supported are {', '.join(_ROPE_KINDS)}"
            )
        partial = scaling.number(
            "partial_rotary_factor", self._fields.number("partial_rotary_factor", 1.0)
        )
        rotary_dim = int(self._head_dim * partial)
        if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
            raise ConfigError(
                f"config.json: partial_rotary_factor {partial} of head_dim {self._head_dim} turns "
                f"{rotary_dim} numbers; it must be an even number, at least 2, at most the head"
            )
        # Phi-3 keeps the trained length beside the RoPE fields; there it has priority.
        key = "original_max_position_embeddings"
        original = (self._fields if self._fields.has(key) else scaling).integer(
            key, self._max_positions
        )
        config = RopeConfig(
            kind=kind,
            theta=scaling.number("rope_theta", self._fields.number(theta_key, 10_000.0)),
            rotary_dim=rotary_dim,
            max_position_embeddings=self._max_positions,
            original_max_position_embeddings=original,
            factor=scaling.optional_number("factor"),
            attention_factor=scaling.optional_number("attention_factor"),
            low_freq_factor=scaling.number("low_freq_factor", 1.0),
            high_freq_factor=scaling.number("high_freq_factor", 4.0),
            beta_fast=scaling.number("beta_fast", 32.0),
            beta_slow=scaling.number("beta_slow", 1.0),
            mscale=scaling.number("mscale") if scaling.raw("mscale") else None,
            mscale_all_dim=scaling.number("mscale_all_dim")
            if scaling.raw("mscale_all_dim")
            else None,
            truncate=scaling.flag("truncate", default=True),
            short_factor=scaling.numbers("short_factor") if kind == "longrope" else (),
            long_factor=scaling.numbers("long_factor") if kind == "longrope" else (),
        )
        _check_rope(config)
        return config

    def _eos_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """The generation configuration wins: it lists every end where config.json has one."""
        value = self._generation.get("eos_token_id")
        if value is None:
            value = self._fields.raw("eos_token_id")
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise ConfigError(
                    f"eos_token_id must be token ids below {vocab_size}, is {value!r}"
                )
        return tuple(ids)

    def _experts(self) -> ExpertsConfig | None:
        fields = self._fields
        if self._architecture == "MixtralForCausalLM":
            num_experts = fields.integer("num_local_experts", 8)
            intermediate_size = fields.integer("intermediate_size")
            normalize = True
            sparse = (True,) * self._num_layers
        elif self._architecture == "Qwen3MoeForCausalLM":
            key = "num_experts" if fields.has("num_experts") else "num_local_experts"
            num_experts = fields.integer(key, 128)
            intermediate_size = fields.integer("moe_intermediate_size")
            normalize = fields.flag("norm_topk_prob", default=False)
            dense = set(fields.raw("mlp_only_layers") or ())
            step = fields.integer("decoder_sparse_step")
            sparse = tuple(
                layer not in dense and (layer + 1) % step == 0 for layer in range(self._num_layers)
            )
        else:
            return None
        num_chosen = fields.integer(
            "num_experts_per_tok", 2 if self._architecture == "MixtralForCausalLM" else 8
        )
        if num_chosen > num_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok ({num_chosen}) exceeds the number of experts "
                f"({num_experts})"
            )
        return ExpertsConfig(
            num_experts=num_experts,
            num_chosen=num_chosen,
            intermediate_size=intermediate_size,
            normalize=normalize,
            sparse_layers=sparse,
        )


def _check_rope(rope: RopeConfig) -> None:
    if rope.kind in ("linear", "dynamic", "llama3") and rope.factor is None:
        raise ConfigError(f"config.json: RoPE type {rope.kind!r} needs a factor")
    if rope.kind == "dynamic" and rope.rotary_dim <= 2:
        raise ConfigError("config.json: RoPE type 'dynamic' needs a rotary dimension above 2")
    if rope.kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ConfigError("config.json: RoPE high_freq_factor must exceed low_freq_factor")
    if rope.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            given = len(getattr(rope, name))
            if given != rope.rotary_dim // 2:
                raise ConfigError(
                    f"config.json: RoPE {name} has {given} numbers; it needs {rope.rotary_dim // 2}"
                )


def _longest(rope: RopeConfig) -> int:
    """The length that a rotary embedding reaches, by what the field takes the fields to mean."""
    if rope.kind in ("linear", "dynamic"):
        return int(rope.max_position_embeddings * (rope.factor or 1.0))
    if rope.kind == "yarn":
        stretched = int(rope.original_max_position_embeddings * (rope.factor or 1.0))
        return max(rope.max_position_embeddings, stretched)
    return rope.max_position_embeddings
