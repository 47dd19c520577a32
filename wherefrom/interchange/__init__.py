"""Reading and writing file formats of related projects."""

from wherefrom.interchange.fastgda import read_fastgda_ranker, read_fastgda_teacher, write_fastgda_ranker
from wherefrom.interchange.safe_pickle import read_pickle

__all__ = ["read_fastgda_ranker", "read_fastgda_teacher", "read_pickle", "write_fastgda_ranker"]
