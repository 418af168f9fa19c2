from __future__ import annotations

from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpaging.base.config import EngineOptions
from kvpaging.base.errors import ConfigError
from server.settings import Settings, did_you_mean, flag_of, parse_size, resolve, variable_of


def test_defaults() -> None:
    settings = resolve({}, {}).settings
    assert (settings.host, settings.port, settings.page_size) == ("127.0.0.1", 8000, 16)
    options = settings.engine_options()
    assert options == EngineOptions(str(resources.files("kvpaging") / "demo_model"))
    assert settings.model_name == "kvpaging-demo"


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default() -> None:
    resolved = resolve(
        {"port": "1", "page_size": None}, {"KVPAGING_PORT": "2", "KVPAGING_PAGE_SIZE": "32"}
    )
    assert (resolved.settings.port, resolved.settings.page_size) == (1, 32)
    assert resolved.origins == {"port": "--port", "page_size": "KVPAGING_PAGE_SIZE"}


def test_every_setting_has_a_flag_and_a_variable_of_its_name() -> None:
    issue = (
        "--model --host --port --dtype --device --page-size --max-num-seqs "
        "--max-num-batched-tokens --max-model-len --gpu-memory-utilization --kv-cache-memory "
        "--served-model-name --api-key"
    )
    assert set(issue.split()) <= {flag_of(name) for name in Settings.model_fields}
    assert variable_of("kv_cache_memory") == "KVPAGING_KV_CACHE_MEMORY"
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("variable", "complaint"),
    [
        ("KVPAGING_PROT", "KVPAGING_PROT is not a setting; did you mean KVPAGING_PORT?"),
        ("KVPAGING_ZZZZZZ", "KVPAGING_ZZZZZZ is not a setting"),
        ("KVPAGING_page_size", "KVPAGING_page_size is not a setting"),
    ],
)
def test_an_unknown_variable_is_refused(variable: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({}, {variable: "1", "PATH": "/bin"})
    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("page_size", "0", "--page-size must be at least 1, not '0'"),
        ("page_size", "257", "--page-size must be at most 256, not '257'"),
        ("page_size", "four", "--page-size must be a whole number, not 'four'"),
        ("port", "65536", "--port must be at most 65535, not '65536'"),
        ("device", "tpu", "--device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        ("gpu_memory_utilization", "1.1", "--gpu-memory-utilization must be at most 1.0"),
        ("gpu_memory_utilization", "nan", "--gpu-memory-utilization must be"),
        ("header_timeout_s", "0", "--header-timeout-s must be above 0"),
        ("kv_cache_memory", "4 apples", "--kv-cache-memory must be a number with an optional unit"),
        ("kv_cache_memory", "0", "--kv-cache-memory must be at least 1"),
        ("dtype", "int3", "--dtype must be auto, 'float32', 'bfloat16' or 'float16', not 'int3'"),
        ("prefix_cache", "maybe", "--prefix-cache must be true or false, not 'maybe'"),
        ("log_format", "xml", "--log-format must be console or json, not 'xml'"),
    ],
)
def test_what_is_out_of_range_names_flag_limit_and_value(
    name: str, value: str, complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({name: value}, {})
    assert str(caught.value).startswith(complaint)


def test_all_faults_are_named_at_once_each_by_what_gave_it() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"port": "-1"}, {"KVPAGING_PAGE_SIZE": "0"})
    lines = str(caught.value).splitlines()
    assert sorted(line.split()[0] for line in lines) == ["--port", "KVPAGING_PAGE_SIZE"]


def test_an_empty_variable_is_not_given_and_auto_means_decide() -> None:
    resolved = resolve({"device": "auto"}, {"KVPAGING_API_KEY": "", "KVPAGING_DTYPE": "auto"})
    assert resolved.settings.api_key is None
    assert resolved.settings.dtype is None
    assert resolved.settings.device is None


@pytest.mark.parametrize("given", [",", " ", " , ,", "kéy", "a,\u200bb", "a\tb"])
def test_keys_that_would_let_everybody_in_or_nobody_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"^KVPAGING_API_KEY must be (a key|of printable ASCII)"):
        resolve({}, {"KVPAGING_API_KEY": given})


def test_keys_come_from_one_place() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"api_keys": "keys"}, {"KVPAGING_API_KEY": "open sesame"})
    assert str(caught.value) == ("--api-keys and KVPAGING_API_KEY both say who may ask; give one")


def test_secrets_on_the_command_line_are_warned_of() -> None:
    given = {"api_key": "open sesame", "remote_cache": "redis://:sesame@host", "port": "1"}
    warnings = resolve(given, {}).warnings()
    assert [line.split()[0] for line in warnings] == ["--remote-cache", "--api-key"]
    assert "sesame" not in "".join(warnings)
    assert not resolve({}, {"KVPAGING_API_KEY": "open sesame"}).warnings()


def test_the_remote_cache_is_waited_for_and_keeps_pages_as_long_as_was_said() -> None:
    options = resolve({"remote_cache_deadline_ms": "50"}, {}).settings.engine_options()
    assert (options.remote_cache_deadline_s, options.remote_cache_ttl_s) == (0.05, 604_800)
    given = {"KVPAGING_REMOTE_CACHE_TTL_S": "3600"}
    assert resolve({}, given).settings.engine_options().remote_cache_ttl_s == 3600
    with pytest.raises(ConfigError, match="remote-cache-deadline-ms"):
        resolve({"remote_cache_deadline_ms": "5000"}, {})


def test_several_keys() -> None:
    given = {"KVPAGING_API_KEY": " a, b c ,,"}
    settings = resolve({}, given).settings
    assert settings.listed_keys == ("a", "b c")
    assert settings.key_for_shell(given) == "${KVPAGING_API_KEY%%,*}"
    assert settings.key_for_shell({}) == "YOUR_KEY"
    assert Settings().listed_keys == ()


def test_secrets_are_masked_also_when_refused() -> None:
    resolved = resolve({}, {"KVPAGING_API_KEY": "open sesame"})
    assert "sesame" not in "\n".join(resolved.lines())
    with pytest.raises(ConfigError) as caught:
        resolve({"api_key": ""}, {})
    assert "must be a key" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("1.5K", 1500),
        ("2GB", 2 * 10**9),
        ("123", 123),
        ("7b", 7),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@given(st.text(max_size=12))
def test_a_size_is_a_number_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert isinstance(size, int)
    assert size >= 0


def test_did_you_mean() -> None:
    assert did_you_mean("--prot", ["--port", "--host"]) == "; did you mean --port?"
    assert did_you_mean("--xyz", ["--port", "--host"]) == ""


@pytest.mark.parametrize("key", ["", " op", "o\np", "öp"])
def test_an_operator_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"operator_key": key}, {})
    assert str(caught.value).startswith("--operator-key must be a key of printable ASCII")
    assert "not" not in str(caught.value)


def test_the_operator_key_is_never_shown() -> None:
    lines = resolve({}, {"KVPAGING_OPERATOR_KEY": "xyzzy"}).lines()
    assert any(
        line.startswith("operator_key") and "KVPAGING_OPERATOR_KEY" in line for line in lines
    )
    assert not any("xyzzy" in line for line in lines)
