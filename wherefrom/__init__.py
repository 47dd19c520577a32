"""wherefrom: which training images did this picture come from?"""

from wherefrom.api import attribute_pictures
from wherefrom.attributors import AttributionByUnlearning, Scores
from wherefrom.pipeline import load_pipeline

__all__ = ["AttributionByUnlearning", "Scores", "attribute_pictures", "load_pipeline"]
