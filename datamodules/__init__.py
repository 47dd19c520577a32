"""LightningDataModules: one data set per file, wrapping `wherefrom.data`."""

from datamodules.emoji import Emoji
from datamodules.image_folder import ImageFolder
from datamodules.teacher_rankings import TeacherRankings

__all__ = ["Emoji", "ImageFolder", "TeacherRankings"]
