"""Routes of the service with their fields, examples and answers, from its own OpenAPI document, as Markdown."""

import json
import tempfile
from pathlib import Path
from typing import Any

from fraud_pkg.core.settings import load_settings
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.api import create_app
from fraud_pkg.serve.console import RecentDecisions
from fraud_pkg.serve.metrics import Metrics
from fraud_pkg.serve.rules import ActiveRules
from fraud_pkg.serve.scorer import Scorer
from fraud_pkg.serve.service import Service
from fraud_pkg.store.memory import MemoryStore
from fraud_pkg.store.tiles import retention_of

HEAD = """# HTTP API

What the service takes and gives, for the contract of `settings.ini` as it is shipped; a running service describes its
own at `/openapi.json`, and as a page at `/docs`. How it is used: [Decisions over HTTP](decide.md).
"""


def described() -> dict[str, Any]:
    """The OpenAPI document of a service with a small model."""
    settings = load_settings(environ={})
    with tempfile.TemporaryDirectory() as scratch:
        service = Service(settings.serve, MemoryStore(retention_of(settings.contract)), {})
        service.use(Scorer(example_bundle(Path(scratch) / "bundle"), settings.serve, ActiveRules()))
        return create_app(service, Metrics(), console=RecentDecisions(keep=10, clients=1)).openapi()


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def kind(schema: dict[str, Any]) -> tuple[str, str]:
    """The types that a value may have, and what is said of it."""
    choices = schema.get("anyOf", [schema])
    names = [choice.get("type") or choice.get("$ref", "").rsplit("/", 1)[-1] for choice in choices]
    notes = [schema.get("description"), *(choice.get("description") for choice in choices)]
    inner = [f" of {kind(choice['items'])[0]}" if "items" in choice else "" for choice in choices]
    return (
        ", ".join(name + more for name, more in zip(names, inner, strict=True) if name != "null"),
        next(filter(None, notes), ""),
    )


def fields(schema: dict[str, Any]) -> list[str]:
    rows = ["| field | type | |", "|---|---|---|"]
    for name, value in schema.get("properties", {}).items():
        types, note = kind(value)
        needed = "required" if name in schema.get("required", ()) else ""
        rows.append(f"| `{name}` | {cell(types)} | {cell('; '.join(filter(None, (needed, note))))} |")
    return rows if len(rows) > 2 else []


def route(method: str, path: str, said: dict[str, Any]) -> list[str]:
    lines = [f"## {method.upper()} {path}", "", said["summary"] + "."]
    for content in said.get("requestBody", {}).get("content", {}).values():
        rows = fields(content["schema"])
        lines += ["", *rows] if rows else []
        lines += ["", "```json", json.dumps(content["example"], indent=2), "```"] if "example" in content else []
    lines += ["", "| status | when | answer |", "|---|---|---|"]
    for status, answer in said["responses"].items():
        shapes = [content["schema"] for content in answer.get("content", {}).values()]
        name = shapes[0].get("$ref", "").rsplit("/", 1)[-1] if shapes else ""
        shown = f"[{name}](#{name.lower()})" if name else ""
        when = "done" if status == "200" else answer["description"]
        lines.append(f"| {status} | {cell(when)} | {shown} |")
    return lines


def page() -> str:
    document = described()
    lines = [HEAD]
    for path, methods in document["paths"].items():
        for method, said in methods.items():
            lines += [*route(method, path, said), ""]
    lines += ["## Answers", ""]
    for name, schema in document["components"]["schemas"].items():
        lines += [f"### {name}", "", schema.get("description", ""), "", *fields(schema), ""]
    return "\n".join(lines)
