"""The documentation as a site: `make docs`, or `sphinx-build -W docs docs/_build/html`.

The pages are plain Markdown that reads as well where the repository is browsed. Nothing is fetched while building or
reading: the theme brings its own style, search runs in the browser.
"""

project = "align"
copyright = "the authors of align"
html_title = "align"

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # links such as ppo.md#alarms, with the anchors that GitHub gives headings

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False

# A page that no navigation names, a link that leads nowhere and code that cannot be coloured are warnings, and with -W
# errors.
nitpicky = True
