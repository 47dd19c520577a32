"""LightningDataModules: one data set per file, wrapping `wherefrom.data`."""

from datamodules.emoji import Emoji
from datamodules.exemplars import Exemplars
from datamodules.image_folder import ImageFolder
from datamodules.laion import LAION
from datamodules.mscoco import MSCOCO
from datamodules.teacher_rankings import TeacherRankings

__all__ = ["LAION", "MSCOCO", "Emoji", "Exemplars", "ImageFolder", "TeacherRankings"]
