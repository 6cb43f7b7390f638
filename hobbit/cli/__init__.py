"""What `hobbit` on the command line does: parse, call the library, hand over to a renderer."""

from .app import main as main
