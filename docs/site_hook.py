"""What the site makes of the pages: the Python reference from docstrings, formulas as MathML, files of the repository.

Pages read well without it, as files of a checkout do; the site adds what needs a program.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from html import escape, unescape
from pathlib import Path
from typing import Any

from griffe import Docstring
from latex2mathml.converter import convert

API = re.compile(r"^<!-- api: ([\w ]+) -->$", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any, **_: Any) -> Any:
    """Called by MkDocs once: the navigation has every page of results."""
    docs = Path(config["docs_dir"])
    config["nav"].append({"Results": sorted(page.relative_to(docs).as_posix() for page in docs.glob("results/*.md"))})
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with each page's source."""
    markdown = API.sub(lambda marker: "\n\n".join(entries(marker[1].split())), markdown)
    return OUTSIDE.sub(lambda link: _outside(link[1], link[2], Path(page.file.abs_src_path)), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs with each page's HTML: formulas need no script."""
    return FORMULA.sub(
        lambda found: convert(unescape(found[2]), display="block" if found[1] == "div" else "inline"), html
    )


def _outside(label: str, target: str, page: Path) -> str:
    """A link to a page of the site where the target is one, else the file's name: the site holds docs alone."""
    docs = Path(__file__).parent.resolve()
    path = (page.parent / target).resolve()
    if path.is_relative_to(docs):
        return f"[{label}]({target})"
    name = path.relative_to(docs.parent).as_posix()
    return label if f"`{name}`" in label else f"{label} (`{name}`)"


def entries(names: list[str]) -> Iterator[str]:
    """Markdown of each public name: signature, docstring, and public methods of classes."""
    package = importlib.import_module("moeplace")
    for name in names:
        thing = getattr(package, name)
        yield f"### `mp.{name}` {{ #{name} }}"
        yield from _entry(name, thing)
        if inspect.isclass(thing) and not issubclass(thing, enum.Enum):
            for member, value in vars(thing).items():
                if _shown(member, value):
                    yield f"#### `{name}.{member}` {{ #{name}.{member} }}"
                    yield from _entry(member, value)


def _shown(name: str, value: Any) -> bool:
    function = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
    return not name.startswith(("_", "model_")) and callable(function) and bool(inspect.getdoc(function))


def _entry(name: str, thing: Any) -> Iterator[str]:
    if isinstance(thing, property) or hasattr(thing, "func"):
        thing = getattr(thing, "fget", None) or thing.func
    else:
        signature = _signature(getattr(thing, "__func__", thing))
        if signature:
            yield f"```python\n{name}{signature}\n```"
    yield from _docstring(inspect.getdoc(thing) or "")


def _signature(thing: Callable[..., Any]) -> str:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    words: list[str] = []
    keyword = False
    for parameter in parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            keyword = True
            words.append("*")
        words.append(_parameter(parameter))
    line = f"({', '.join(words)})"
    return line if len(line) < 90 else "(\n" + "".join(f"    {word},\n" for word in words) + ")"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = star + parameter.name
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {parameter.annotation if isinstance(parameter.annotation, str) else _type(parameter.annotation)}"
    if parameter.default is not inspect.Parameter.empty:
        default = repr(parameter.default)
        text += f" = {default if len(default) < 40 else '...'}"
    return text


def _type(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):  # Annotated: bounds are checked, and told by the error
        annotation = annotation.__origin__
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")


def _docstring(text: str) -> Iterator[str]:
    for section in Docstring(text, parser="google").parse(warnings=False):
        kind, value = section.kind.value, section.value
        if isinstance(value, str):
            # Names of arrays and sizes in brackets are no links.
            yield re.sub(r"(?<!`)(\[[^\]]*\])(?!\()", lambda size: escape(size[1]).replace("[", "\\["), value)
        elif isinstance(value, list):
            yield f"**{kind.capitalize()}**"
            yield "\n".join(f"- {_item(item)}" for item in value)


def _item(item: Any) -> str:
    name = getattr(item, "name", "") or getattr(item, "annotation", "") or ""
    description = " ".join(str(item.description).split()).replace("[", "\\[")
    return f"`{name}`: {description}" if name else description
