"""Attribution methods, all behind `Attributor`."""

from wherefrom.attributors.base import Attributor
from wherefrom.attributors.influence.attributor import InfluenceFunction
from wherefrom.attributors.influence.banked import InfluenceBank
from wherefrom.attributors.learned_ranker import Fast
from wherefrom.attributors.magnitude import BySize
from wherefrom.attributors.rank_ensemble import RankEnsemble
from wherefrom.attributors.rerank import AmongNearest
from wherefrom.attributors.similarity import CaptionSimilarity, ImageSimilarity, PixelSimilarity, Random
from wherefrom.attributors.trak.attributor import TRAK
from wherefrom.attributors.trak.journey import JourneyTRAK
from wherefrom.attributors.unlearning.attributor import AttributionByUnlearning
from wherefrom.queries.types import Query, Scores, TrainingData

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
