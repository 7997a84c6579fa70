"""Hooks of MkDocs (mkdocs.yml): pages made of the sources, links out of docs/, formulas without a script.

Notebooks, examples, CONTRIBUTING.md and the like become pages where they are, without a copy. Each package
has a page of reference, which mkdocstrings fills from the docstrings. `$...$` in notebooks becomes MathML,
which is drawn without a script, and a page that would load anything from the network stops the build.
"""

import ast
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_gen"
AT_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
NOTEBOOKS = sorted(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb"))
COMMANDS = "reference/commands.md"
# The scripts that nbconvert adds to every notebook, from the network.
ADDED = re.compile(r"<script\b(?:(?!</script>).)*?(?:cdnjs|mathjax).*?</script>", re.DOTALL | re.IGNORECASE)
NOT_PROSE = re.compile(r"(<(?:pre|code|script|style)\b.*?</(?:pre|code|script|style)>|<img[^>]*>)", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
LOADS = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*'
    r'|<link\b(?![^>]*rel="canonical")[^>]*href="(?:https?:)?//[^"]*'
)


def modules() -> dict[str, list[str]]:
    """Package -> the names of its public modules, those of lit_gen itself first."""
    found: dict[str, list[str]] = {"lit_gen": []}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "commands" in parts or "conf" in parts or parts[-1].startswith("__main"):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        found.setdefault(name if path.stem == "__init__" else name.rpartition(".")[0], []).append(name)
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    reference = [{"Commands": COMMANDS}, *({name: f"reference/{name}.md"} for name in modules())]
    assert config.nav is not None
    nav = {title: pages for section in config.nav for title, pages in section.items()}
    nav["Notebooks"], nav["Reference"] = [*NOTEBOOKS, "examples.md"], reference
    listed = str(nav)
    nav["Guides"] += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in listed]
    config.nav = [{title: pages} for title, pages in nav.items()]
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in (*AT_ROOT, *NOTEBOOKS):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    pages = {f"reference/{name}.md": reference(name, parts) for name, parts in modules().items()}
    for path, text in (pages | {COMMANDS: commands(), "examples.md": examples()}).items():
        files.append(File.generated(config, path, content=text))
    return files


def reference(package: str, names: list[str]) -> str:
    """A page of mkdocstrings' directives."""
    root = f"::: {package}\n    options: {{members: false, show_root_heading: false}}\n"
    others = sorted(name for name in names if name != package)
    return f"# {package}\n\n{root}\n" + "\n".join(f"::: {name}\n" for name in others)


def examples() -> str:
    """The scripts of examples/."""
    page = ["# Examples\n\nlit_gen as a library, without Hydra. Tests run these scripts.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        page.append(f"## {path.name}\n\n```python\n{path.read_text()}```\n")
    return "\n".join(page)


def commands() -> str:
    """Every command with its configuration, whose comments explain the options."""
    tree = ast.parse((PACKAGE / "__main__.py").read_text())
    assigned = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    table = assigned["COMMANDS"]
    page = ["# Commands\n\nOptions are `key=value`. `lit-gen COMMAND --help` prints them with all choices.\n"]
    for name, text in ast.literal_eval(table).items():
        options = (ROOT / "conf" / f"{name.replace('-', '_')}.yaml").read_text()
        page.append(f"## lit-gen {name}\n\n{text}\n\n```yaml\n{options}```\n")
    return "\n".join(page)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to pages from elsewhere in the repository; of other files the name alone."""
    if page.file.src_uri in AT_ROOT:
        markdown = markdown.replace("](docs/", "](")
    for name in AT_ROOT:
        markdown = markdown.replace(f"](../{name})", f"]({name})")
    return re.sub(r"\[([^\]]+)\]\((\.\./|tests/|lit_gen/)[^)]*\)", r"\1", markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    if page.file.src_uri not in NOTEBOOKS:
        return html
    html = re.sub(r'href="(\w+)\.ipynb', r'href="\1.html', ADDED.sub("", html))
    html = re.sub(r'href="\.\./docs/([\w-]+)\.md', r'href="../\1.html', html)
    parts = NOT_PROSE.split(html)
    return "".join(part if i % 2 else FORMULA.sub(drawn, part) for i, part in enumerate(parts))


def drawn(formula: re.Match[str]) -> str:
    """`$$...$$` or `$...$` of TeX as MathML."""
    block, inline = formula.groups()
    return convert(unescape(block or inline), display="block" if block else "inline")


def on_post_page(output: str, page: Page, **_: Any) -> str:
    if found := LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads from the network: {found[0]}")
    return output
