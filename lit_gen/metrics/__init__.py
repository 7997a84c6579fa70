"""Distances between image sets that can be trusted: float64, streaming, exact over ranks, and named after
their extractor.
"""

from lit_gen.metrics.evaluation import MEASURES, Evaluation, Summary, check_measures, compare
from lit_gen.metrics.extractors import Extractor, ExtractorId, digits64, digits_classifier
from lit_gen.metrics.files import Record, as_json, read_images, read_reference, records
from lit_gen.metrics.foundation import clip, dinov2
from lit_gen.metrics.frechet import FeatureStatistics, FrechetDistance
from lit_gen.metrics.functional import (
    Estimate,
    Moments,
    frechet_distance,
    frechet_distance_of_features,
    moments,
)
from lit_gen.metrics.inception import inception2015, inception2015_clean
from lit_gen.metrics.reference import reference_moments, reference_summary

__all__ = [
    "MEASURES",
    "Estimate",
    "Evaluation",
    "Extractor",
    "ExtractorId",
    "FeatureStatistics",
    "FrechetDistance",
    "Moments",
    "Record",
    "Summary",
    "as_json",
    "check_measures",
    "clip",
    "compare",
    "digits64",
    "digits_classifier",
    "dinov2",
    "frechet_distance",
    "frechet_distance_of_features",
    "inception2015",
    "inception2015_clean",
    "moments",
    "read_images",
    "read_reference",
    "records",
    "reference_moments",
    "reference_summary",
]
