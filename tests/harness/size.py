"""Measures the size of the code base, to compare two commits. Run by `make size`.

    python tests/harness/size.py [FOLDER]

FOLDER is a checkout, by default this one. A code line is a line with a token that is neither comment nor docstring.
Settings, metrics, commands and routes are counted in the source, so an older checkout needs no environment. The last
line is a JSON object.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)


def code_lines(source: str, tree: ast.Module) -> int:
    """Lines with a token that is neither comment nor docstring. An attribute's docstring does not count either."""
    texts = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in _LAYOUT for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - texts)


def functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Length in lines and name of each function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name


def is_section(node: ast.ClassDef) -> bool:
    """Whether a class is a table of the config file: its base is the common section."""
    return any(ast.unparse(base) in ("_Section", "Section") for base in node.bases)


def settings(trees: list[ast.Module]) -> int:
    """Number of config keys that hold a value, not a table."""
    sections = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and is_section(n)]
    names = {section.name for section in sections}
    fields = [n for section in sections for n in section.body if isinstance(n, ast.AnnAssign)]
    return sum(ast.unparse(field.annotation) not in names for field in fields)


def calls(trees: list[ast.Module], pattern: str) -> int:
    """Number of calls and decorators whose name matches."""
    found = (ast.unparse(node.func) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(bool(re.fullmatch(pattern, text)) for text in found)


def measure(root: Path) -> dict[str, object]:
    """Measure one checkout."""
    package = root / "streamlearn"
    sources = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    by_folder: Counter[str] = Counter()
    for path, source in sources.items():
        parts = path.relative_to(package).parts
        by_folder[parts[0] if len(parts) > 1 else "(top)"] += code_lines(source, trees[path])
    every = list(trees.values())
    classes = [node for tree in every for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = Counter(node.name for node in classes if not node.name.startswith("_"))
    sizes = sorted(size for tree in every for size, _ in functions(tree))
    longest, longest_name = max(found for tree in every for found in functions(tree))
    documents = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("deploy/*.md")]
    return {
        "code_lines": sum(by_folder.values()),
        "code_lines_without_lab": sum(count for folder, count in by_folder.items() if folder not in ("lab", "testing")),
        "by_folder": dict(sorted(by_folder.items())),
        "files": len(sources),
        "files_past_450_lines": sorted(p.name for p, s in sources.items() if s.count("\n") > 450),
        "classes": len(classes),
        "names_of_two_classes": sorted(name for name, count in names.items() if count > 1),
        "protocols": sum("Protocol" in [ast.unparse(base) for base in node.bases] for node in classes),
        "settings": settings(every),
        "metrics": calls(every, r"_?[Mm]etric|Metric"),
        "commands": calls(every, r"\w*app\.command|models\.command"),
        "routes": calls(every, r"router\.(get|post|delete|put)"),
        "function_p90_lines": round(quantiles(sizes, n=10)[-1]),
        "function_longest": f"{longest_name} ({longest})",
        "document_words": sum(len(path.read_text().split()) for path in documents),
    }


if __name__ == "__main__":
    figures = measure(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2])
    for name, value in figures.items():
        print(f"{name:24} {json.dumps(value)}")
    print(json.dumps(figures))
