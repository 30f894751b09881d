"""Reads the config of a Transformers model by the table of `model_families`, and says what it did not read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._arguments import check_types
from . import model_families as table
from .errors import InputError
from .expert_storage import Storage, expert_storage
from .files import parse_json, read_text
from .model_families import FAMILIES, UNKNOWN, Family, Names

MOST_LAYERS, MOST_EXPERTS, MOST_WIDTH = 4096, 65_536, 1 << 24
"""Far beyond any model: larger numbers come from mistakes, or from those who want memory used up."""

CONFIG_BYTES = 1 << 26


class ConfigReading(NamedTuple):
    """What a config says. fields: those of `ModelSpec`. notes: what was assumed, and what was not read. hidden_layers:
    layers with and without experts. encoder_layers: those of an encoder, from which its decoder's are counted on.
    router_rows: what a router gives a score: experts, zero experts, and in some models shared experts behind these.
    expert_sets: sets of experts a layer has, of which the first is placed.

    Example:
        >>> import moeplace as mp
        >>> reading = mp.read_config("path/to/model")  # doctest: +SKIP
        >>> reading.notes  # doctest: +SKIP
        ('not read: moe_every',)
    """

    fields: dict[str, Any]
    notes: tuple[str, ...]
    hidden_layers: int
    encoder_layers: int
    router_rows: int
    expert_sets: int


@check_types
def read_config(config: str | Path | Mapping[str, Any] | Any, expert_dtype: str | None = None) -> ConfigReading:
    """What a Transformers config says of its experts.

    Args:
        config: a `config.json`, its folder, a dict, or a PretrainedConfig. expert_dtype: how experts are stored, in
            place of what the config says of it.

    Raises:
        InputError: the file is missing, no MoE fields are there, or one is not understood; the field is named.

    Example:
        >>> import moeplace as mp
        >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "dtype": "bfloat16"}
        >>> experts = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "expert_banks": 3}
        >>> mp.read_config(sizes | experts).notes
        ('not read: expert_banks',)
    """
    fields, origin, folder = _config_fields(config)
    reader = _Reader(fields, origin)
    family = reader.family
    layers, hidden_layers = _moe_layers(reader)
    shape: dict[str, Any] = {
        "layers": len(layers),
        "moe_layers": layers,
        "experts": reader.of_layers(family.experts, layers, MOST_EXPERTS),
        "top_k": reader.of_layers(family.top_k, layers, MOST_EXPERTS),
        "hidden_size": reader.number(family.hidden, MOST_WIDTH),
        "ffn_size": _expert_width(reader, layers),
        "name": str(fields.get("_name_or_path") or fields.get("model_type") or reader.model_type)[:200],
    }
    if shape["experts"] == 1:
        raise InputError(f"{origin}: one expert a layer, which every token visits: there is nothing to place")
    latent = reader.optional(family.latent, MOST_WIDTH)
    if latent:
        shape |= {"expert_input_size": latent, "expert_output_size": latent}
    shape["matrices"] = family.matrices or _matrices(reader)
    shape["groups"], shape["top_groups"] = _groups(reader, shape["experts"], shape["top_k"])
    shared_width = reader.of_layers(family.shared_width, layers, MOST_WIDTH, missing=0)
    shape["shared_experts"] = reader.of_layers(family.shared, layers, MOST_EXPERTS, missing=int(shared_width > 0))
    shape["zero_experts"] = reader.optional(family.zero, MOST_EXPERTS) or 0
    shape["expert_bias"] = family.bias
    if expert_dtype is None:
        inner, outer = shape["ffn_size"], latent or shape["hidden_size"]
        storage = expert_storage(reader.storage_fields(folder), layers, inner, outer, shape["matrices"], origin)
        reader.notes.extend(storage.notes)
    else:
        storage = Storage(expert_dtype)
    shape |= {"expert_dtype": storage.dtype, "bytes_per_weight": storage.bytes_per_weight}
    reader.note_unread(shape["ffn_size"])
    encoder_layers = reader.number(family.stacks[0][:1], MOST_LAYERS) if family.stacks else 0
    rows = shape["experts"] + shape["zero_experts"] + shape["shared_experts"] * family.router_has_shared
    sizes = [reader.value(name) for name in (*family.experts, *family.ffn) if family.sets]
    sets = max((len(size) for size in sizes if isinstance(size, list | tuple)), default=1)
    return ConfigReading(shape, tuple(reader.notes), hidden_layers, encoder_layers, rows, sets)


class _Reader:
    """The fields of a config's language model, and which of them were read."""

    def __init__(self, fields: Mapping[str, Any], origin: str) -> None:
        self.origin, self.top = origin, fields
        self.notes: list[str] = []
        self.read: set[str] = set()
        types: list[str] = []
        part, path = fields, ""
        holders = [fields]
        while True:
            types.insert(0, str(part.get("model_type") or ""))
            inner = [name for name in table.LANGUAGE_PARTS if isinstance(part.get(name), Mapping)]
            name = next((name for name in inner if _has_experts(part[name])), None)
            if name is None or len(types) > 4:
                break
            part, path = part[name], f"{path}{name}."
            holders.insert(0, part)
        for name in table.EXPERT_PARTS:
            if isinstance(part.get(name), Mapping) and not any(part.get(field) for field in UNKNOWN.experts):
                self.read.add(name)
                inner_part = part[name]
                outside = UNKNOWN.ffn if any(field in inner_part for field in UNKNOWN.ffn) else ()
                part = {field: value for field, value in part.items() if field not in outside} | {**inner_part}
        self.fields, self.path, self.holders = part, path, [part, *holders[1:]]
        named = [name for text in types if (name := text.removesuffix("_text")) in FAMILIES]
        self.model_type = named[0] if named else next(filter(None, types), "")
        self.family: Family = FAMILIES[named[0]] if named else UNKNOWN
        if not named:
            self.notes.append(
                f"model_type {self.model_type[:60]!r} is not one this release knows; its fields were read by name"
                if self.model_type
                else "the config does not say its model_type; its fields were read by name"
            )
        for switch in (self.family.switch, *table.SWITCHES):
            said = self.value(switch) if switch else None
            if said is False or (switch and switch == self.family.switch and not said):
                raise InputError(f"{origin}: {switch} is {said}, such a {self.model_type or 'model'} has no experts")
        every = self.optional((table.SHARED_EXPERTS_EVERY,), MOST_LAYERS) or 1
        if every > 1:
            raise InputError(
                f"{origin}: {table.SHARED_EXPERTS_EVERY} is {every}, so that {every} layers in a row use the same "
                "experts; a plan places each layer's own"
            )

    def value(self, name: str) -> Any:
        """A field, by name or dotted path; the family's own where it is not there, or None."""
        value = self.stated(name)
        return self.family.defaults.get(name) if value is None else value

    def stated(self, name: str) -> Any:
        """A field that is there, or None."""
        self.read.add(name.partition(".")[0])
        value: Any = self.fields
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def first(self, names: Names) -> tuple[str, Any] | None:
        """The first of these fields that is there; where others of the same meaning say otherwise, a note does."""
        present = [(name, value) for name in names if (value := self.stated(name)) is not None]
        if not present:
            present = [(name, value) for name in names if (value := self.family.defaults.get(name)) is not None]
        family = self.family
        if names in (family.experts, family.top_k, family.groups, family.top_groups, family.shared):
            for name, value in present[1:]:
                if value != present[0][1] and type(value) is type(present[0][1]):
                    taken = f"{present[0][0]} is {present[0][1]}, {name} is {value}; {present[0][0]} was taken"
                    self.notes.append(taken[:300])
        return present[0] if present else None

    def optional(self, names: Names, most: int) -> int | None:
        """A whole number of at least 0, or None where no such field is there."""
        entry = self.first(names)
        return None if entry is None else self.whole(*entry, most)

    def number(self, names: Names, most: int) -> int:
        """A whole number of at least 1."""
        number = self.optional(names, most)
        if not number:
            raise self.missing(names)
        return number

    def of_layers(self, names: Names, layers: Sequence[int], most: int, missing: int | None = None) -> int:
        """A whole number, or a list with one for each layer; those of `layers` must not differ."""
        entry = self.first(names)
        single = self.single_layers(names)
        if entry is None and not single:
            if missing is None:
                raise self.missing(names)
            return missing
        name, value = entry or (names[0], None)
        if isinstance(value, list | tuple):
            value = self.listed(name, value, layers)
        by_layer: dict[int, Any] = value if isinstance(value, dict) else dict.fromkeys(layers, value)
        for layer, (other, number) in single.items():
            if layer in by_layer:
                name, by_layer[layer] = other, number
        numbers = {layer: self.whole(name, number, most) for layer, number in by_layer.items() if number is not None}
        if len(set(numbers.values())) > 1:
            low, high = min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)
            raise InputError(differing_layers(self.origin, name, low, numbers[low], high, numbers[high]))
        number = next(iter(numbers.values()), 0)
        if not number and missing is None:
            raise self.missing(names)
        return number

    def listed(self, name: str, value: Sequence[Any], layers: Sequence[int]) -> Any:
        """A list in place of a number: an entry a set of experts, a single one, or one a layer."""
        if self.family.sets and 1 <= len(value) <= 4:
            note = f"{name} is {value}: the layers' other experts are not placed, and were left out"
            if len(set(map(str, value))) > 1 or name in self.family.experts:
                self.notes.append(note)
            return value[0]
        value = [
            self.alike(name, entry) if isinstance(entry, list | tuple) else entry for entry in value[: MOST_LAYERS + 1]
        ]
        if len(value) == 1:
            return value[0]
        if len(value) == len(layers):
            return dict(zip(layers, value, strict=True))
        if len(value) <= layers[-1] or len(value) > MOST_LAYERS:
            raise self.not_understood(name, "a whole number, or one for each layer")
        return {layer: value[layer] for layer in layers}

    def alike(self, name: str, entries: Sequence[Any]) -> Any:
        """What a layer's list says of each of its experts."""
        if not entries or any(entry != entries[0] for entry in entries):
            raise self.not_understood(name, "the same of all experts of a layer")
        return entries[0]

    def single_layers(self, names: Names) -> dict[int, tuple[str, Any]]:
        """Which of these fields single layers have of their own, by layer."""
        own: dict[int, tuple[str, Any]] = {}
        for layer, fields in self.layer_fields():
            for name in names:
                if fields.get(name) is not None:
                    own.setdefault(layer, (name, fields[name]))
        return own

    def layer_fields(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The layers that have fields of their own, with these."""
        for name in table.LAYER_BY_LAYER:
            entries = self.value(name)
            if isinstance(entries, list | tuple):
                yield from ((i, entry) for i, entry in enumerate(entries[:MOST_LAYERS]) if isinstance(entry, Mapping))
            elif isinstance(entries, Mapping):
                for layer, entry in entries.items():
                    if str(layer).isdecimal() and len(str(layer)) < 6 and isinstance(entry, Mapping):
                        yield int(layer), entry

    def whole(self, name: str, value: Any, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise self.not_understood(name, "a whole number" + ("" if type(value) is not int else f" up to {most}"))
        return value

    def missing(self, names: Names) -> InputError:
        return InputError(
            f"{self.origin}: none of the fields {', '.join(names)} is there, or all are 0; is this a "
            "mixture-of-experts model?"
        )

    def not_understood(self, name: str, expected: str) -> InputError:
        text = str(self.value(name))
        return InputError(
            f"{self.origin}: {self.path}{name} is {text if len(text) <= 60 else f'{text[:60]}...'}, expected {expected}"
        )

    def storage_fields(self, folder: Path | None) -> dict[str, Any]:
        """What the config and the files beside it say of how weights are stored."""
        names = (
            "dtype",
            "torch_dtype",
            "expert_dtype",
            "quantization_config",
            "compression_config",
            "quantization",
            "quantize",
        )
        self.read.update(names)
        fields = {name: next((part[name] for part in self.holders if part.get(name)), None) for name in names}
        stored = fields["quantization_config"]
        ascend = isinstance(stored, Mapping) and "model_quant_type" in stored
        if folder is not None and (not stored or ascend):
            nvidia, described = folder / "hf_quant_config.json", sorted(folder.glob("quant_model_description*.json"))
            if len(described) > 1:
                names_there = ", ".join(path.name for path in described[:4])
                raise InputError(f"{folder}: {names_there} describe different weights; keep the one of these weights")
            beside = [path for path in (nvidia, *described) if path.is_file()]
            if beside:
                fields["quantization_config"] = _json_object(beside[-1])
        if not fields["quantization_config"] and isinstance(fields["quantize"], str):
            fields["quantization_config"] = {"model_quant_type": fields["quantize"]}
        return fields

    def note_unread(self, ffn: int) -> None:
        """Names the fields that speak of experts, layers or quantisation, and were not read."""
        if (
            self.family is UNKNOWN
            and self.fields.get("intermediate_size") == ffn
            and not any(self.fields.get(name) for name in UNKNOWN.ffn[: UNKNOWN.ffn.index("intermediate_size")])
        ):
            self.notes.append(f"the width of an expert was taken from intermediate_size ({ffn})")
        if self.family.remark:
            self.notes.append(self.family.remark)
        unread = [f"{self.path}{name}" for name in _speaking(self.fields) if name not in self.read]
        unread += [f"{self.path}{name}" for name in _schedules(self.fields) if name not in self.read]
        if self.path:
            unread += [name for name in _speaking(self.top) if name not in self.read]
        for holder, part in self.parts():
            if holder in self.read:
                continue
            unread += [f"{holder}.{name}" for name in _speaking(part) if name in UNKNOWN.experts]
        if unread:
            listed = ", ".join(dict.fromkeys(unread))
            self.notes.append(f"not read: {listed if len(listed) <= 400 else listed[:400] + '...'}")

    def parts(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Parts of the model beside its language model."""
        used = self.path.split(".")
        part: Mapping[str, Any] = self.top
        for name in used:
            for other, value in part.items():
                if other != name and isinstance(value, Mapping) and str(other).endswith("_config"):
                    yield str(other), value
                    inner = value.get("text_config")
                    if isinstance(inner, Mapping):
                        yield f"{other}.text_config", inner
            part = part.get(name) or {}


def _speaking(fields: Mapping[str, Any]) -> list[str]:
    return [
        str(name)
        for name, value in fields.items()
        if table.SPEAKS.search(str(name))
        and not table.ELSEWHERE.search(str(name))
        and value not in (None, False, 0, "", [], {})
    ]


def _schedules(fields: Mapping[str, Any]) -> list[str]:
    """Lists that tell layers with experts from others by a word, whatever their name."""
    return [
        str(name)
        for name, value in fields.items()
        if isinstance(value, list | tuple)
        and not table.BESIDE.search(str(name))
        and any(isinstance(word, str) and word.lower() in table.EXPERT_WORDS for word in value[:MOST_LAYERS])
    ]


def _has_experts(fields: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether these fields, or a language model among them, name experts."""
    names = {name.rpartition(".")[2] for name in (*UNKNOWN.experts, "moe_num_experts")}
    if any(fields.get(name) not in (None, 0) for name in names):
        return True
    parts = (fields.get(name) for name in (*table.LANGUAGE_PARTS, *table.EXPERT_PARTS, "ffn_config"))
    return depth < 4 and any(isinstance(part, Mapping) and _has_experts(part, depth + 1) for part in parts)


def differing_layers(origin: str, what: str, low: int, fewest: Any, high: int, most: Any) -> str:
    """Why a model, or its routing, whose layers differ is not taken; in the same words wherever it is met.

    Args:
        origin: the file. what: the field or size that differs. low, high: two layers. fewest, most: what they have.
    """
    return (
        f"{origin}: {what} differs between layers ({fewest} in layer {low}, {most} in layer {high}); a plan is of MoE "
        "layers that are alike. Models pruned or searched a layer at a time are such, as Nemotron-3 Puzzle "
        "(nemotron_h_puzzle, served by vLLM and TensorRT-LLM): place each set of like layers by itself"
    )


# Which layers.


def _moe_layers(reader: _Reader) -> tuple[tuple[int, ...], int]:
    """Absolute indices of the layers with routed experts, and how many layers there are."""
    if reader.family.stacks:
        return _stacks(reader)
    total = _hidden_layers(reader)
    listed = [entry for kind in (_words, _patterns, _indices) if (entry := kind(reader, total)) is not None]
    flags = _flags(reader, total)
    ruled = _by_rules(reader, total, steps=flags is None)
    if flags is not None:
        ruled &= flags[1]
    if listed:
        name, layers = listed[0]
        stated = any(reader.fields.get(n) is not None for n in (*table.DENSE_HEAD, *table.FLAGS, *table.DENSE_INDICES))
        others = [other for other, chosen in listed[1:] if chosen != layers]
        if stated and ruled != layers and not others:
            others = [n for n in (*table.DENSE_HEAD, *table.FLAGS, *table.DENSE_INDICES) if reader.fields.get(n)]
        if others:
            reader.notes.append(f"{name} and {', '.join(others)} name different layers; {name} was taken")
    else:
        layers = ruled
    if not layers:
        raise InputError(
            f"{reader.origin}: none of its {total} layers holds experts; is this a mixture-of-experts model?"
        )
    return tuple(sorted(layers)), total


def _hidden_layers(reader: _Reader) -> int:
    total = reader.optional(reader.family.hidden_layers, MOST_LAYERS)
    if total:
        return total
    for name in (*table.PATTERNS, *table.WORDS[1:], "block_configs"):
        value = reader.value(name)
        if isinstance(value, str | list | tuple) and 0 < len(value) <= MOST_LAYERS:
            return len(value)
    raise reader.missing(reader.family.hidden_layers)


def _stacks(reader: _Reader) -> tuple[tuple[int, ...], int]:
    first, layers = 0, []
    for count_field, step_field, offset in reader.family.stacks:
        count = reader.number((count_field,), MOST_LAYERS)
        step = reader.optional((step_field,), MOST_LAYERS) or 0
        layers += [first + i for i in range(count) if step and (i + offset) % step == 0]
        first += count
    if not layers:
        raise InputError(f"{reader.origin}: none of its {first} layers holds experts")
    return tuple(layers), first


def _trimmed(reader: _Reader, name: str, value: Sequence[Any], total: int) -> Sequence[Any]:
    """A list for every layer, without those for multi-token prediction."""
    extra = reader.optional(table.MTP_LAYERS, MOST_LAYERS) or 0
    if not total <= len(value) <= total + extra:
        raise reader.not_understood(name, f"one entry for each of the {total} layers, not {len(value)}")
    if len(value) > total:
        reader.notes.append(f"{name}: entries past layer {total - 1} are of multi-token prediction, and were left out")
    return value[:total]


def _words(reader: _Reader, total: int) -> tuple[str, set[int]] | None:
    words = {layer: fields["block_type"] for layer, fields in reader.layer_fields() if "block_type" in fields}
    if words and any(word in table.EXPERT_WORDS for word in words.values() if isinstance(word, str)):
        return "block_configs", {i for i, word in words.items() if word in table.EXPERT_WORDS and i < total}
    for name in table.WORDS:
        value = reader.value(name)
        if value is None:
            continue
        entries = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
        if name != table.WORDS[0] and not (entries and table.EXPERT_WORDS.intersection(value)):
            continue
        known = table.EXPERT_WORDS | table.DENSE_WORDS
        if not entries or (name == table.WORDS[0] and not known.issuperset(value)):
            raise reader.not_understood(name, f"a list of {', '.join(sorted(known))}, one for each layer")
        value = _trimmed(reader, name, value, total)
        return name, {i for i, word in enumerate(value) if word in table.EXPERT_WORDS}
    return None


def _patterns(reader: _Reader, total: int) -> tuple[str, set[int]] | None:
    for name in table.PATTERNS:
        value = reader.value(name)
        if isinstance(value, str) and value:
            if not table.LETTERS.issuperset(value):
                raise reader.not_understood(name, f"a letter of {''.join(sorted(table.LETTERS))} for each layer")
            value = _trimmed(reader, name, value, total)
            return name, {i for i, letter in enumerate(value) if letter == table.EXPERT_LETTER}
    return None


def _indices(reader: _Reader, total: int) -> tuple[str, set[int]] | None:
    for name in table.INDICES:
        value = reader.value(name)
        if value is None:
            continue
        if isinstance(value, str):
            value = [int(part) if part.strip().isdecimal() and len(part) < 8 else None for part in value.split(",")]
        extra = reader.optional(table.MTP_LAYERS, MOST_LAYERS) or 0
        if (
            not isinstance(value, list | tuple)
            or len(value) > MOST_LAYERS
            or not all(type(layer) is int and 0 <= layer < total + extra for layer in value)
        ):
            raise reader.not_understood(name, f"numbers of layers, from 0 to {total - 1}")
        return name, {layer for layer in value if layer < total}
    return None


def _flags(reader: _Reader, total: int) -> tuple[str, set[int]] | None:
    for name in table.FLAGS:
        value = reader.value(name)
        if isinstance(value, list | tuple):
            if name == "zaya_layers":
                value = [0 if entry == "a" else entry if type(entry) is not int else min(entry, 1) for entry in value]
            expected = f"a step, or a list of {total} numbers, 1 for a layer with experts and 0 for one without"
            if not all(type(flag) in (int, bool) and flag in (0, 1) for flag in value) or len(value) < total:
                raise reader.not_understood(name, expected)
            value = _trimmed(reader, name, value, total)
            return name, {i for i, flag in enumerate(value) if flag}
    return None


def _by_rules(reader: _Reader, total: int, steps: bool) -> set[int]:
    """The layers that are left when each field that leaves layers out has had its say."""
    head = reader.optional(table.DENSE_HEAD, MOST_LAYERS) or 0
    first, last = head, total - 1
    for name in (table.FIRST, table.LAST):
        value = reader.value(name)
        if isinstance(value, list | tuple) and reader.family.sets and value:
            value = value[0]
        if value is None:
            continue
        if type(value) is not int or not -1 <= value <= MOST_LAYERS:
            raise reader.not_understood(name, "the number of a layer")
        if name == table.FIRST:
            first = max(first, value)
        elif value >= 0:
            last = min(last, value)
    layers = set(range(first, last + 1))
    for name in table.DENSE_INDICES:
        value = reader.value(name)
        if value is not None:
            if not isinstance(value, list | tuple) or not all(type(layer) is int for layer in value):
                raise reader.not_understood(name, "a list of layer numbers")
            layers -= set(value)
    for name, offset in table.STEPS.items():
        if not steps and name in table.FLAGS:
            continue
        step = reader.optional((name,), MOST_LAYERS)
        if step == 0:
            raise reader.not_understood(name, "a step of at least 1")
        if step:
            layers = {i for i in layers if (i + offset) % step == 0}
    period = reader.optional((table.PERIOD,), MOST_LAYERS)
    if period:
        offset = reader.optional((table.OFFSET,), MOST_LAYERS) or 0
        layers = {i for i in layers if i % period == offset}
    return layers


# How they compute and route.


def _expert_width(reader: _Reader, layers: Sequence[int]) -> int:
    family = reader.family
    if not family.gate_and_up or reader.first(family.ffn) is not None:
        return reader.of_layers(family.ffn, layers, MOST_WIDTH)
    both = reader.of_layers(family.gate_and_up, layers, MOST_WIDTH)
    if both % 2:
        raise reader.not_understood(reader.first(family.gate_and_up)[0], "an even number, for gate and up")  # type: ignore[index]
    return both // 2


def _matrices(reader: _Reader) -> int:
    entry = reader.first(reader.family.activation)
    name, activation = entry or ("", "")
    if str(activation).lower().replace("_", "") in ("relu2", "squaredrelu", "reluesquared"):
        return 2
    gated = next((value for gate in table.GATES if type(value := reader.value(gate)) is bool), None)
    if gated is not None:
        return 3 if gated else 2
    reader.notes.append(
        f"an expert was taken to be gated, with three matrices ({name or 'no activation'} {activation})"
    )
    return 3


def _groups(reader: _Reader, experts: int, top_k: int) -> tuple[int, int]:
    """Groups that limit the choice of experts, and of how many a token's experts are: (1, 0) where a token may choose
    from all of them, the second 0 where it is not said."""
    family = reader.family
    groups = reader.optional(family.groups, MOST_EXPERTS) or 1
    chosen = reader.optional(family.top_groups, MOST_EXPERTS)
    method = reader.value("topk_method")
    if groups == 1 or method == "greedy" or reader.value("use_grouped_topk") is False:
        return 1, 0
    if experts % groups:
        raise reader.not_understood(reader.first(family.groups)[0], f"a divisor of the {experts} experts")  # type: ignore[index]
    if chosen is None:
        reader.notes.append(f"{groups} groups, but none of {', '.join(family.top_groups)}: taken to limit the choice")
        return groups, 0
    if chosen >= groups:
        return 1, 0
    if top_k > chosen * (experts // groups):
        raise reader.not_understood(
            reader.first(family.top_groups)[0],  # type: ignore[index]
            f"enough groups of {experts // groups} experts for the {top_k} that a token chooses",
        )
    return groups, chosen


# Files.


def _config_fields(config: Any) -> tuple[Mapping[str, Any], str, Path | None]:
    if isinstance(config, Mapping):
        return config, "config", None
    if hasattr(config, "to_dict"):
        return config.to_dict(), type(config).__name__, None
    if not isinstance(config, str | os.PathLike):
        raise InputError(f"a config is a path, a dict or a PretrainedConfig, not a {type(config).__name__}")
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    return _json_object(path), str(path), path.parent


def _json_object(path: Path) -> dict[str, Any]:
    fields = parse_json(read_text(path, limit_bytes=CONFIG_BYTES), str(path))
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields
