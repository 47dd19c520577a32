"""Attribution methods, all behind `Attributor`."""

from wherefrom.attributors.among import AmongNearest
from wherefrom.attributors.bank import InfluenceBank
from wherefrom.attributors.base import Attributor, Query, Scores, TrainingData
from wherefrom.attributors.baselines import CaptionSimilarity, ImageSimilarity, PixelSimilarity, Random
from wherefrom.attributors.by_size import BySize
from wherefrom.attributors.ensemble import RankEnsemble
from wherefrom.attributors.fast import Fast
from wherefrom.attributors.influence import InfluenceFunction
from wherefrom.attributors.journey_trak import JourneyTRAK
from wherefrom.attributors.trak import TRAK
from wherefrom.attributors.unlearning import AttributionByUnlearning

__all__ = [
    "TRAK",
    "AmongNearest",
    "AttributionByUnlearning",
    "Attributor",
    "BySize",
    "CaptionSimilarity",
    "Fast",
    "ImageSimilarity",
    "InfluenceBank",
    "InfluenceFunction",
    "JourneyTRAK",
    "PixelSimilarity",
    "Query",
    "Random",
    "RankEnsemble",
    "Scores",
    "TrainingData",
]
