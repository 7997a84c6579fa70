"""Models as objects: of a run folder or checkpoint, of an official file, with guidance; and what they
generate."""

from lit_gen.models.generation import *
from lit_gen.models.loading import *
from lit_gen.models.starting import *
