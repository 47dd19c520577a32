"""Attribution methods, all behind `Attributor`."""

from wherefrom.attributors.base import Attributor
from wherefrom.attributors.influence.attributor import InfluenceFunction
from wherefrom.attributors.influence.banked import InfluenceBank
from wherefrom.attributors.learned_ranker import LearnedRanker
from wherefrom.attributors.magnitude import Magnitude
from wherefrom.attributors.rank_ensemble import RankEnsemble
from wherefrom.attributors.rerank import Rerank
from wherefrom.attributors.similarity import CaptionSimilarity, ImageSimilarity, PixelSimilarity, Random
from wherefrom.attributors.trak.attributor import TRAK
from wherefrom.attributors.trak.journey import JourneyTRAK
from wherefrom.attributors.unlearning.attributor import AttributionByUnlearning
from wherefrom.queries.types import Query, Scores, TrainingData

__all__ = [
    "TRAK",
    "AttributionByUnlearning",
    "Attributor",
    "CaptionSimilarity",
    "ImageSimilarity",
    "InfluenceBank",
    "InfluenceFunction",
    "JourneyTRAK",
    "LearnedRanker",
    "Magnitude",
    "PixelSimilarity",
    "Query",
    "Random",
    "RankEnsemble",
    "Rerank",
    "Scores",
    "TrainingData",
]
