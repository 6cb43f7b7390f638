"""Models by name: which there are, where they are, and what is known of those that are not here."""

from .location import Located as Located
from .location import locate as locate
from .skeleton import is_estimate as is_estimate
