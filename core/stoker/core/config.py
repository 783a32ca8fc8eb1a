"""Typed configuration: a schema of options, filled from YAML, the environment and flags.

A schema is a frozen dataclass whose fields are made by `option`, or by `section` for a dataclass
of further options. Names decide how a text is read: `*_seconds` takes durations ("10m"), `*_bytes`
takes sizes ("20GiB"). An option has three spellings, all derived from its key, the later ones win:

    metrics.listen        in YAML, `listen` under `metrics`
    PREFIX_METRICS_LISTEN in the environment
    --metrics-listen      as a flag (without the unit: `interval_seconds` is `--interval`)

Whatever is unknown or malformed raises BadInput with the place, the key, what was wanted and what
was found.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from stoker.core.errors import BadInput
from stoker.core.units import format_duration, parse_bytes, parse_duration

T = TypeVar("T")

# A configuration is written by hand; what is larger is some other file.
FILE_BYTES_MAX = 1 << 20
_SHOWN_CHARACTERS_MAX = 60
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
# Kubernetes puts such variables into every pod beside a Service called, say, "stoker-agent";
# nobody wrote them.
_INJECTED = re.compile(r"SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_.*)?)?")


def option(
    default: T,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    flag: str | None = None,
) -> T:
    """Return a schema field: default, one sentence on its meaning, bounds, name of an odd flag."""
    rules = _Rules(doc, minimum, maximum, flag)
    field: Any = dataclasses.field(default_factory=lambda: default, metadata={"stoker": rules})
    return typing.cast("T", field)


def section(schema: type[T]) -> T:
    """Return a schema field that holds the options of `schema` under its own name."""
    field: Any = dataclasses.field(default_factory=schema)
    return typing.cast("T", field)


def load(
    schema: type[T],
    file: Path | None,
    environ: Mapping[str, str],
    prefix: str,
    flags: Mapping[str, object],
) -> T:
    """Return the `schema` filled from its defaults, `file`, `environ` and `flags`; the later wins.

    `prefix` is that of the environment variables with its underscore, such as "STOKER_AGENT_".
    `flags` maps dotted keys to texts or values; a flag of None was not given. Raises BadInput.
    """
    options = {each.key: each for each in _options(schema)}
    given: dict[str, _Given] = {}
    if file is not None:
        given.update(_from_file(schema, options, file))
    given.update(_from_environment(options, environ, prefix))
    for key, value in flags.items():
        if value is not None:
            given[key] = _Given(value, options[key].flag, None)
    values = {key: _convert(options[key], each) for key, each in given.items()}
    return _build(schema, "", values)


def defaults_yaml(schema: type[Any]) -> str:
    """Return a YAML file with every option of `schema`, its meaning and default, commented out."""
    return "\n".join(_rendered(schema, "")) + "\n"


@dataclass(frozen=True, slots=True)
class _Rules:
    doc: str
    minimum: float | None
    maximum: float | None
    flag: str | None


@dataclass(frozen=True, slots=True)
class _Option:
    key: str  # dotted, such as "metrics.listen"
    hint: Any  # the type, without "| None"
    is_optional: bool
    rules: _Rules
    default: object

    @property
    def flag(self) -> str:
        bare = self.key.removesuffix("_seconds").removesuffix("_bytes")
        return self.rules.flag or "--" + bare.replace(".", "-").replace("_", "-")

    @property
    def variable(self) -> str:
        return self.key.replace(".", "_").upper()

    @property
    def wanted(self) -> str:
        """What a person should write."""
        return _described(self.key, self.hint)


@dataclass(frozen=True, slots=True)
class _Given:
    value: object
    place: str  # file and line, the variable, or the flag
    key: str | None  # shown after the place, where the place does not tell it already

    @property
    def name(self) -> str:
        return self.place if self.key is None else f"{self.place}: {self.key}"


def _options(schema: type[Any], above: str = "") -> Iterator[_Option]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint = above + field.name, hints[field.name]
        if _is_section(hint):
            yield from _options(hint, f"{key}.")
            continue
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        bare = [each for each in members if each is not type(None)]
        assert len(bare) == 1, f"{key}: a union of {bare} cannot be read from text"
        assert callable(field.default_factory), f"{key} is not made by option()"
        rules = field.metadata["stoker"]
        yield _Option(key, bare[0], len(members) > 1, rules, field.default_factory())


def _described(key: str, hint: Any) -> str:
    if key.endswith("_seconds"):
        return "a duration such as 45s or 10m"
    if key.endswith("_bytes"):
        return "a size such as 512MiB or 20GiB"
    if typing.get_origin(hint) is tuple:
        return f"a list of {_described('', typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is Mapping:
        return "a mapping of text to text"
    if issubclass(hint, StrEnum):
        return "one of " + ", ".join(hint)
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(hint, "a path")


# --- where values come from


def _from_file(
    schema: type[Any], options: Mapping[str, _Option], file: Path
) -> Iterator[tuple[str, _Given]]:
    root = _compose(_read(file), file)
    if root is not None:
        yield from _walk(schema, options, root, file, "")


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise BadInput(f"config {file}: cannot be read: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise BadInput(f"{file}: larger than {FILE_BYTES_MAX} bytes, this is no configuration")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 at byte {error.start}") from error


def _compose(text: str, file: Path) -> yaml.Node | None:
    """Return the tree of nodes, which know their lines and keep repeated keys apart."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise BadInput(f"{file}{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{file}: not YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise BadInput(f"{file}: nested too deeply") from error


def _walk(
    schema: type[Any], options: Mapping[str, _Option], node: yaml.Node, file: Path, above: str
) -> Iterator[tuple[str, _Given]]:
    sections = _sections(schema)
    for name, child, place in _entries(node, file, above.rstrip(".")):
        key = above + name
        if name in sections:
            if not _is_null(child):  # every option of the section is commented out
                yield from _walk(sections[name], options, child, file, f"{key}.")
        elif key in options:
            yield key, _Given(_plain(child, f"{place}: {key}"), place, key)
        else:
            raise BadInput(f"{place}: {_unknown(key, [*options, *sections])}")


def _sections(schema: type[Any]) -> dict[str, type[Any]]:
    return {name: hint for name, hint in typing.get_type_hints(schema).items() if _is_section(hint)}


def _is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _entries(node: yaml.Node, file: Path, where: str) -> Iterator[tuple[str, yaml.Node, str]]:
    """Yield (key, value, place) of a mapping; a repeated key is an error, not the last one wins."""
    place = f"{file}, line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(
            f"{place}: {where or 'the file'}: wanted keys with values, found {_kind(node)}"
        )
    seen: set[str] = set()
    for key_node, value_node in node.value:
        place = f"{file}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise BadInput(f"{place}: a key must be text, found {_kind(key_node)}")
        key: str = key_node.value
        if key in seen:
            raise BadInput(f"{place}: {_shown(key)} is given twice")
        seen.add(key)
        yield key, value_node, place


def _plain(node: yaml.Node, name: str) -> object:
    """Return the Python value of a node: a scalar, a list of scalars or a mapping of scalars."""
    match node:
        case yaml.SequenceNode():
            return [_scalar(child, name) for child in node.value]
        case yaml.MappingNode():
            pairs: list[tuple[yaml.Node, yaml.Node]] = node.value
            keys = [str(_scalar(key, name)) for key, _ in pairs]
            for key in keys:
                if keys.count(key) > 1:
                    raise BadInput(f"{name}: {_shown(key)} is given twice")
            return {key: _scalar(value, name) for key, (_, value) in zip(keys, pairs, strict=True)}
        case _:
            return _scalar(node, name)


def _scalar(node: yaml.Node, name: str) -> object:
    if not isinstance(node, yaml.ScalarNode):
        raise BadInput(f"{name}: wanted a single value, found {_kind(node)}")
    constructor: Any = yaml.constructor.SafeConstructor()
    try:
        return constructor.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-02-31
        raise BadInput(f"{name}: {_shown(node.value)} cannot be read") from error


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    match node:
        case yaml.SequenceNode():
            return "a list"
        case yaml.MappingNode():
            return "a mapping"
        case _:
            return "a single value"


def _from_environment(
    options: Mapping[str, _Option], environ: Mapping[str, str], prefix: str
) -> Iterator[tuple[str, _Given]]:
    by_variable = {each.variable: each for each in options.values()}
    assert len(by_variable) == len(options), "two options share a variable"
    for variable, value in environ.items():
        if not variable.startswith(prefix):
            continue
        bare = variable.removeprefix(prefix)
        if bare in by_variable:
            key = by_variable[bare].key
            yield key, _Given(value, f"environment variable {variable}", None)
        elif not _INJECTED.fullmatch(bare):
            known = [prefix + each for each in by_variable]
            raise BadInput(f"environment: {_unknown(variable, known)}")


# --- from what was given to what was meant


def _convert(option: _Option, given: _Given) -> object:
    if given.value is None:
        if option.is_optional:
            return None
        raise BadInput(f"{given.name}: wanted {option.wanted}, found nothing")
    value = _typed(option.key, option.hint, given.value, given.name)
    _check_bounds(option.rules, value, given)
    return value


def _typed(key: str, hint: Any, value: object, name: str) -> object:
    if isinstance(value, str):
        _check_utf8(value, name)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_typed(key, item, each, name) for each in _parts(key, hint, value, name))
    if typing.get_origin(hint) is Mapping:
        return types.MappingProxyType(_pairs(key, hint, value, name))
    if key.endswith("_seconds"):
        return _number(key, hint, value, name, parse_duration)
    if key.endswith("_bytes"):
        return _number(key, hint, value, name, parse_bytes)
    return _single(key, hint, value, name)


def _parts(key: str, hint: Any, value: object, name: str) -> Iterator[object]:
    """Yield the parts of a list, or of a text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Sequence):
        raise _mismatch(key, hint, value, name)
    for each in typing.cast("Sequence[object]", parts):
        part = each.strip() if isinstance(each, str) else each
        if part != "":
            yield part


def _pairs(key: str, hint: Any, value: object, name: str) -> dict[str, str]:
    if isinstance(value, Mapping):
        found = typing.cast("Mapping[object, object]", value)
        for label, each in found.items():
            if not isinstance(each, str):
                raise _mismatch(key, str, each, f"{name}: {label}")
            _check_utf8(f"{label}={each}", name)
        return {str(k): str(v) for k, v in found.items()}
    pairs: dict[str, str] = {}
    for part in _parts(key, hint, value, name):
        _check_utf8(str(part), name)
        left, equals, right = str(part).partition("=")
        if not equals or not left:
            raise BadInput(f"{name}: wanted key=value, found {_shown(part)}")
        pairs[left] = right
    return pairs


def _number(key: str, hint: Any, value: object, name: str, parse: Any) -> object:
    if isinstance(value, str):
        return parse(value, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _mismatch(key, hint, value, name)
    if hint is int and not isinstance(value, int):
        raise _mismatch(key, hint, value, name)
    return hint(value)


def _single(key: str, hint: Any, value: object, name: str) -> object:
    if hint is str or issubclass(hint, Path | StrEnum):
        if isinstance(value, Path):
            return value
        if not isinstance(value, str) or (issubclass(hint, StrEnum) and value not in list(hint)):
            raise _mismatch(key, hint, value, name)
        return hint(value)
    if hint is bool:
        text = str(value).lower()
        if isinstance(value, float) or text not in _TRUE | _FALSE:
            raise _mismatch(key, hint, value, name)
        return text in _TRUE
    assert hint in {int, float}, f"{key}: {hint} cannot be read from text"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise _mismatch(key, hint, value, name)
        if hint is int and isinstance(value, float):
            raise _mismatch(key, hint, value, name)
        return hint(value)
    except ValueError:
        raise _mismatch(key, hint, value, name) from None


def _check_utf8(text: str, name: str) -> None:
    """Refuse what the shell or the environment passed on as bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{name}: {_shown(text)} is not UTF-8") from None


def _check_bounds(rules: _Rules, value: object, given: _Given) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low = -math.inf if rules.minimum is None else rules.minimum
    high = math.inf if rules.maximum is None else rules.maximum
    if not (math.isfinite(value) and low <= value <= high):
        bounds = "a finite number" if low == -high else f"{low:g} to {high:g}"
        if math.isinf(high) and math.isfinite(low):
            bounds = f"at least {low:g}"
        raise BadInput(f"{given.name}: wanted {bounds}, found {_shown(given.value)}")


def _mismatch(key: str, hint: Any, value: object, name: str) -> BadInput:
    advice = " (quote it)" if hint is str and isinstance(value, bool | int | float) else ""
    return BadInput(f"{name}: wanted {_described(key, hint)}, found {_shown(value)}{advice}")


def _unknown(key: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(sorted(known))}"
    return f"unknown key {_shown(key)}; {hint}"


def _shown(value: object) -> str:
    """Return a value quoted and cut, so that a hostile one cannot flood a terminal or a log."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS_MAX else text[: _SHOWN_CHARACTERS_MAX - 3] + "..."


def _build(schema: type[T], above: str, values: Mapping[str, object]) -> T:
    arguments: dict[str, object] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(typing.cast("type[Any]", schema)):
        key = above + field.name
        if _is_section(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], f"{key}.", values)
        elif key in values:
            arguments[field.name] = values[key]
    return schema(**arguments)


# --- the commented defaults


def _rendered(schema: type[Any], above: str) -> Iterator[str]:
    indent = "  " * above.count(".")
    options = {each.key: each for each in _options(schema, above)}
    for field in dataclasses.fields(schema):
        key = above + field.name
        if key in options:
            each = options[key]
            yield f"{indent}# {each.rules.doc}"
            yield f"{indent}#{field.name}: {_default_text(each)}"
        else:
            yield f"{indent}{field.name}:"
            yield from _rendered(typing.get_type_hints(schema)[field.name], f"{key}.")


def _default_text(option: _Option) -> str:
    value = option.default
    if isinstance(value, float) and option.key.endswith("_seconds"):
        return format_duration(value).replace(" ", "")
    plain: Any = value
    if isinstance(value, Mapping):
        plain = dict(typing.cast("Mapping[str, str]", value))
    elif isinstance(value, tuple):
        plain = list(typing.cast("tuple[object, ...]", value))
    elif isinstance(value, Path | StrEnum):
        plain = str(value)
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()
