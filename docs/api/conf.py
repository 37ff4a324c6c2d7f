"""Sphinx makes the API reference from docstrings: `pip install '.[docs]' && sphinx-build -W docs/api site`."""

import uhd

project, author, version = "uhd", "the uhd authors", uhd.__version__
copyright = "the uhd authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"uhd {version}"
html_copy_source = html_show_sphinx = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "set_input_embeddings"}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
