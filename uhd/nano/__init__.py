"""A small model that reads: its task, its parts, its weights, and how well it does.

``uhd.load_nano()`` gives the model, :func:`ask` asks it, ``python -m uhd.nano`` measures it; ``examples/nano`` trains
it.
"""

from uhd.nano.answer import Answer, ask, load_nano
from uhd.nano.build import NanoConfig, build_nano

__all__ = ["Answer", "NanoConfig", "ask", "build_nano", "load_nano"]
