"""Sphinx's settings for the documentation: `make docs`."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "scripts"))

from site_pages.benchmark_tables import benchmarks_page  # noqa: E402
from site_pages.config_keys import config_pages  # noqa: E402
from site_pages.python_api import api_page  # noqa: E402
from site_pages.repository_files import GENERATED, copied_pages, relinked  # noqa: E402

import qwenvl_lit  # noqa: E402

project = "qwenvl_lit"
release = qwenvl_lit.__version__
html_title = f"{project} {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3  # anchors as on GitHub, so that links work there too
default_role = "code"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # those of Lightning refer to pages of Lightning
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
highlight_language = "none"  # blocks without a language are commands

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False


def write_generated_pages(app):
    """Writes the pages that are made from docstrings, comments, records and other files."""
    pages = copied_pages() | config_pages()
    pages |= {"api": api_page(), "benchmarks": benchmarks_page()}
    GENERATED.mkdir(exist_ok=True)
    for file in GENERATED.glob("*.md"):
        if file.stem not in pages:
            file.unlink()
    for name, text in pages.items():
        file = GENERATED / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def mend_links(app, name, content):
    """Replaces links to files outside docs/ by links to their pages."""
    file = DOCS / f"{name}.md"
    if file.parent == DOCS:
        content[0] = relinked(content[0], file, file)


def setup(app):
    """Connects the functions above with the build."""
    app.connect("builder-inited", write_generated_pages)
    app.connect("source-read", mend_links)
