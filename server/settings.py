"""Every setting: its flag, its environment variable, its default, its range, where it came from.

One model, one order: flag, then environment variable, then default. An empty variable counts as not
given, as compose files pass it. This is the only module that looks at `KVPAGING_…` variables.
Resolved once, then frozen. Knows nothing of what the settings do.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from kvpaging.base.config import EngineOptions
from kvpaging.base.errors import ConfigError
from kvpaging.cache.eviction.names import DEFAULT_POLICY, POLICIES
from kvpaging.cache.retention import MAX_RETENTION_PRIORITY

ENV_PREFIX: Final = "KVPAGING_"
DEMO_NAME: Final = "kvpaging-demo"
NOT_SETTINGS: Final = ("KVPAGING_TRACES", "KVPAGING_REQUIRE_REDIS")
"""Variables with our prefix that are somebody else's: those of the tests."""

SECRETS: Final = ("api_key", "operator_key", "remote_cache")
"""Settings whose values are never shown."""

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_size(value: object) -> object:
    """Bytes from `4GiB`, `512MiB`, `1.5 GB` or a plain number; anything else stays as it is."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError("a number with an optional unit, such as 4GiB, 512MiB, 2GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _auto(value: object) -> object:
    """`auto` is the word for "decide at start"."""
    return None if value == "auto" else value


def _none(value: object) -> object:
    """`none` is the word for "as it is"."""
    return None if value == "none" else value


def _policy(value: str) -> str:
    if value not in POLICIES:
        raise ValueError(f"one of {', '.join(POLICIES)}{did_you_mean(value, POLICIES)}")
    return value


def _keys(value: SecretStr) -> SecretStr:
    """Refuse what would let everybody in, or nobody: no key, or one that no header can carry."""
    text = value.get_secret_value()
    if not _split(text):
        raise ValueError("a key, or several with commas between, not only commas and spaces")
    if not (text.isascii() and text.isprintable()):
        raise ValueError("of printable ASCII characters: HTTP headers carry no others")
    return value


def _key(value: SecretStr) -> SecretStr:
    """Refuse what no header can carry."""
    text = value.get_secret_value()
    if not text or not (text.isascii() and text.isprintable()) or text != text.strip():
        raise ValueError("a key of printable ASCII characters without spaces around it")
    return value


def _split(keys: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in keys.split(",") if key.strip())


Size = Annotated[int, BeforeValidator(parse_size)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
MinUses = Annotated[
    int,
    Field(ge=0, le=1000, description="uses after which a page goes there; 0: as it leaves above"),
]


class Settings(BaseModel):
    """What the operator decides. `None` means: decided at start, and printed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What is served.
    model: str | None = Field(
        None, description="checkpoint directory or Hugging Face hub id; default: the demo model"
    )
    served_model_name: str | None = Field(
        None, description="name that clients see; default: the model's own"
    )
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, BeforeValidator(_auto)] = (
        Field(None, description="auto, float32, bfloat16 or float16")
    )
    quantization: Annotated[Literal["int8"] | None, BeforeValidator(_none)] = Field(
        None,
        description="none or int8: linears' weights in a byte each, a scale for each output",
    )
    kv_cache_dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8", "fp8_e4m3"] | None, BeforeValidator(_auto)
    ] = Field(
        None,
        description="what KV pages hold: auto (the model's dtype), int8, or fp8_e4m3 on a GPU that "
        "has it",
    )
    device: Annotated[
        Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None, BeforeValidator(_auto)
    ] = Field(None, description="auto, cpu, cuda or cuda:N")
    kernels: Annotated[Literal["native", "triton", "torch"] | None, BeforeValidator(_auto)] = Field(
        None, description="auto, native, triton or torch"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads that compute")

    exact: bool = Field(
        True, description="cached equals computed bit for bit; off, a GPU may be faster"
    )

    # How much of it.
    page_size: int = Field(16, ge=1, le=256, description="tokens in a KV page")
    max_num_seqs: int = Field(256, ge=1, le=65_536, description="sequences that run at once")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, le=1_048_576, description="tokens computed in one step"
    )
    max_model_len: int | None = Field(
        None, ge=1, le=16_777_216, description="tokens of one sequence, prompt and output"
    )
    max_num_waiting: int = Field(
        1024, ge=1, le=1_000_000, description="requests that may wait before 429"
    )
    kv_cache_memory: Annotated[Size, Field(ge=1)] | None = Field(
        None, description="memory for KV pages, such as 4GiB"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory that may be used in all"
    )
    async_scheduling: Annotated[bool | None, BeforeValidator(_auto)] = Field(
        None, description="plan the next step while one computes; default: on a GPU"
    )
    enforce_eager: bool = Field(
        False, description="launch each kernel; else captured decode steps are replayed"
    )
    prefix_cache: bool = Field(True, description="keep pages for prompts that begin alike")
    eviction_policy: Annotated[str, AfterValidator(_policy)] = Field(
        DEFAULT_POLICY, description=f"which cached page goes first: {', '.join(POLICIES)}"
    )
    max_pinned_ratio: float = Field(
        0.25, ge=0, le=1, description="share of the KV pages that pins may hold; 0: no pins"
    )
    tenant_budget: float | None = Field(
        None,
        gt=0,
        le=2**31,
        description="KV pages that each tenant may have, or up to 1: share of them; the file of "
        "keys may say otherwise for one; default: all",
    )
    max_cache_priority: int | None = Field(
        None,
        ge=0,
        le=MAX_RETENTION_PRIORITY,
        description="highest cache.priority that requests may ask for: with one tenant 100, with "
        "several 0, so that no tenant keeps the others' pages out",
    )
    preload: Path | None = Field(
        None, description="file of prompts or messages (JSON lines) to compute ahead when idle"
    )
    record: Path | None = Field(
        None, description="file to record what each step was given to, for 'kvpaging replay'"
    )

    # Where pages go that leave the device.
    host_cache: Annotated[Size, Field(ge=0)] = Field(
        0, description="memory for pages that left the device, such as 8GiB; 0: none"
    )
    host_cache_min_uses: MinUses = 0
    disk_cache: str | None = Field(
        None, min_length=1, description="directory for pages, kept over restarts; default: none"
    )
    disk_cache_size: Annotated[Size, Field(ge=2**20)] = Field(
        16 * 2**30, description="bound of the disk cache, such as 64GiB"
    )
    disk_cache_min_uses: MinUses = 1
    disk_cache_compress: bool = Field(
        False, description="a third less room on disk, for processor time"
    )
    remote_cache: SecretStr | None = Field(
        None, min_length=1, description="redis://… of a server for pages that servers share"
    )
    remote_cache_min_uses: MinUses = 1
    remote_cache_compress: bool = Field(
        True, description="a third less to send and to keep, for processor time"
    )
    remote_cache_deadline_ms: float = Field(
        200,
        ge=1,
        le=2000,
        description="for one exchange with that server; what is late is computed",
    )
    remote_cache_ttl_s: float = Field(
        7 * 86_400,
        ge=1,
        le=10 * 365 * 86_400,
        description="how long that server keeps a page after it was stored last",
    )
    cache_secret: str | None = Field(
        None, min_length=1, description="file with a secret, shared by servers that share pages"
    )

    # Who may ask, and how long.
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Port = Field(8000, description="port to listen on; 0: any free one")
    api_key: Annotated[SecretStr, AfterValidator(_keys)] | None = Field(
        None,
        description="key that clients must send, or several with commas between, each a tenant; "
        "as a variable, since others see flags",
    )
    api_keys: Path | None = Field(
        None, description="file of keys and their tenants, read again when it changes"
    )
    shared_scope: bool = Field(
        False, description="clients may share a prompt's pages with all tenants (cache_scope)"
    )
    operator_key: Annotated[SecretStr, AfterValidator(_key)] | None = Field(
        None,
        description="key for /metrics, /pages and /cache, which clients' keys do not open; "
        "as a variable, since others see flags",
    )
    max_body: Annotated[Size, Field(ge=1024, le=2**30)] = Field(
        16 * 2**20, description="largest request body, such as 16MiB"
    )
    max_header: Annotated[Size, Field(ge=1024, le=2**20)] = Field(
        32 * 2**10, description="largest request line and headers together, such as 32KiB"
    )
    max_connections: int = Field(
        4096, ge=1, le=1_000_000, description="open connections before 503"
    )
    header_timeout_s: Seconds = Field(10.0, description="seconds for a request's headers")
    body_timeout_s: Seconds = Field(30.0, description="seconds for a request's body")
    keep_alive_s: Seconds = Field(75.0, description="seconds that an idle connection stays open")
    write_timeout_s: Seconds = Field(
        30.0, description="seconds that a reader may take nothing before it is cut off"
    )
    grace_period_s: float = Field(
        30.0, ge=0, le=86_400, description="seconds that running requests have after SIGTERM"
    )
    stall_limit_s: Seconds = Field(
        60.0,
        description="seconds without a step before /health says stalled; "
        "after three times as many the engine is started again",
    )

    log_format: Literal["console", "json"] = Field("console", description="console or json")

    @property
    def listed_keys(self) -> tuple[str, ...]:
        """The keys of `api_key` by themselves."""
        return _split(self.api_key.get_secret_value()) if self.api_key else ()

    def key_for_shell(self, environ: Mapping[str, str] = os.environ) -> str:
        """How a shell with the operator's environment writes the first key, without showing it."""
        variable = variable_of("api_key")
        is_set_there = bool(self.listed_keys) and (
            _split(environ.get(variable, "")) == self.listed_keys
        )
        return f"${{{variable}%%,*}}" if is_set_there else "YOUR_KEY"

    @property
    def model_or_demo(self) -> str:
        """The model, or the directory of the bundled demo model."""
        return self.model or str(resources.files("kvpaging") / "demo_model")

    @property
    def model_name(self) -> str:
        """What clients call the model: as told, else the hub id or the directory's last part."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model is None:
            return DEMO_NAME
        directory = Path(self.model).expanduser()
        return directory.resolve().name if directory.is_dir() else self.model

    def engine_options(self) -> EngineOptions:
        """What the engine process is told."""
        return EngineOptions(
            model=self.model_or_demo,
            device=self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            page_size=self.page_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_num_waiting=self.max_num_waiting,
            kv_cache_memory_bytes=self.kv_cache_memory,
            gpu_memory_utilization=self.gpu_memory_utilization,
            threads=self.threads,
            kernels=self.kernels,
            async_scheduling=self.async_scheduling,
            enforce_eager=self.enforce_eager,
            prefix_cache=self.prefix_cache,
            exact=self.exact,
            eviction_policy=self.eviction_policy,
            max_pinned_ratio=self.max_pinned_ratio,
            record=None if self.record is None else str(self.record.expanduser().absolute()),
            host_cache_bytes=self.host_cache,
            host_cache_min_uses=self.host_cache_min_uses,
            disk_cache_dir=None if self.disk_cache is None else os.path.abspath(self.disk_cache),
            disk_cache_bytes=self.disk_cache_size,
            disk_cache_min_uses=self.disk_cache_min_uses,
            disk_cache_compress=self.disk_cache_compress,
            remote_cache_url=(
                None if self.remote_cache is None else self.remote_cache.get_secret_value()
            ),
            remote_cache_min_uses=self.remote_cache_min_uses,
            remote_cache_compress=self.remote_cache_compress,
            remote_cache_deadline_s=self.remote_cache_deadline_ms / 1000,
            remote_cache_ttl_s=self.remote_cache_ttl_s,
            cache_secret_file=(
                None if self.cache_secret is None else os.path.abspath(self.cache_secret)
            ),
        )


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings, and for each one that was given the flag or variable that gave it."""

    settings: Settings
    origins: Mapping[str, str]

    def warnings(self) -> list[str]:
        """What was asked for and had better be asked for in another way."""
        return [
            f"{origin} shows a secret to everybody who lists this machine's processes; give "
            f"{variable_of(name)} instead"
            for name, origin in self.origins.items()
            if name in SECRETS and origin == flag_of(name)
        ]

    def lines(self) -> list[str]:
        """One line a setting: name, value, origin. Secrets are masked by their type."""
        values = {name: getattr(self.settings, name) for name in Settings.model_fields}
        values["model"] = self.settings.model_or_demo
        values["served_model_name"] = self.settings.model_name
        for secret in SECRETS:
            if values[secret] is None:
                values[secret] = "none"
        width = max(map(len, values))
        return [
            f"{name:<{width}}  {_shown(value):<12}  {self.origins.get(name, 'default')}"
            for name, value in values.items()
        ]


def _shown(value: object) -> str:
    return "auto" if value is None else str(value)


def flag_of(field: str) -> str:
    """`page_size` -> `--page-size`."""
    return "--" + field.replace("_", "-")


def variable_of(field: str) -> str:
    """`page_size` -> `KVPAGING_PAGE_SIZE`."""
    return ENV_PREFIX + field.upper()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give the parser one flag for each setting. Values stay text: `resolve` checks them."""
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f" (default: {field.default})"
        text = f"{field.description}{default} [{variable_of(name)}]".replace("%", "%%")
        if field.annotation in (bool, bool | None):
            action: Any = argparse.BooleanOptionalAction
            parser.add_argument(flag_of(name), action=action, default=None, help=text)
        else:
            parser.add_argument(flag_of(name), metavar="VALUE", help=text)


def resolve(flags: Mapping[str, object], environ: Mapping[str, str]) -> Resolved:
    """Settings from flags (`None`: not given), then the environment, then defaults.

    Raises `ConfigError` with one line for each thing that is wrong, naming flag or variable, limit
    and value.
    """
    unknown = unknown_variables(environ)
    if unknown:
        raise ConfigError("\n".join(unknown))
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for name in Settings.model_fields:
        flag, variable = flags.get(name), environ.get(variable_of(name), "")
        if flag is not None:
            values[name], origins[name] = flag, flag_of(name)
        elif variable:
            values[name], origins[name] = variable, variable_of(name)
    try:
        settings = Settings.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_faults(error, origins))) from None
    if settings.api_key is not None and settings.api_keys is not None:
        raise ConfigError(
            f"{origins['api_keys']} and {origins['api_key']} both say who may ask; give one"
        )
    return Resolved(settings, origins)


def _faults(error: pydantic.ValidationError, origins: Mapping[str, str]) -> list[str]:
    """One line for each field: `--page-size must be at most 256, not '512'`."""
    lines: dict[str, str] = {}
    for fault in error.errors():
        name, limits = str(fault["loc"][0]), fault.get("ctx", {})
        rule = _RULES.get(fault["type"], "").format(**limits) or fault["msg"]
        if name in _WORDS:
            rule = _WORDS[name]
        given = "" if name in SECRETS else f", not {fault['input']!r}"
        lines.setdefault(name, f"{origins[name]} {rule}{given}")
    return list(lines.values())


_RULES: Final = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "literal_error": "must be auto, {expected}",
    "value_error": "must be {error}",
    "too_short": "must not be empty",
}
_WORDS: Final = {
    "device": "must be auto, cpu, cuda or cuda:N",
    "log_format": "must be console or json",
}


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """One complaint for each `KVPAGING_…` variable that is no setting."""
    known = [variable_of(name) for name in Settings.model_fields]
    return [
        f"{name} is not a setting{did_you_mean(name, known)}"
        for name in sorted(environ)
        if name.startswith(ENV_PREFIX) and name not in (*known, *NOT_SETTINGS)
    ]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing."""
    nearest = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


class FlagParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations, whose complaint about a flag offers the nearest."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, allow_abbrev=False)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`, or print what is wrong and exit with 2."""
        namespace, rest = self.parse_known_args(argv)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            word = rest[0].split("=", 1)[0]
            self.error(f"{word} is not a flag{did_you_mean(word, known)}")
        return namespace

    def error(self, message: str) -> NoReturn:
        """Print one line and where help is, and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\nSee {self.prog} --help.\n")
