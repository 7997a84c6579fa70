"""Distances between image sets that can be trusted: float64, streaming, exact over ranks, and named after
their extractor.
"""

from lit_gen.metrics.evaluation import *
from lit_gen.metrics.extractors import *
from lit_gen.metrics.files import *
from lit_gen.metrics.foundation import *
from lit_gen.metrics.frechet import *
from lit_gen.metrics.functional import *
from lit_gen.metrics.inception import *
from lit_gen.metrics.reference import *
